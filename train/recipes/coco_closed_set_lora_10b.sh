#!/usr/bin/env bash
# The published closed-set run: PaliGemma 2 10B at 448 px, LoRA of rank 16 on 402 matrices, COCO train2017,
# 6 epochs at an effective batch of 32 on four GPUs. Ends in an adapter that PEFT reads, too.
#   MODEL, COCO, OUT, LAUNCH: other than below. Add --dry-run for sizes and memory alone.
set -euo pipefail
COCO=${COCO:-coco}
${LAUNCH:-torchrun --standalone --nproc_per_node=4} "$(dirname "$0")/../fit.py" \
    --model "${MODEL:-google/paligemma2-10b-pt-448}" --out "${OUT:-runs/coco-10b-lora}" \
    --data "$COCO/annotations/instances_train2017.json" --images "$COCO/train2017" --augment \
    --lora --lora-targets published --lora-rank 16 --lora-alpha 16 --lora-dropout 0.05 \
    --steps 22179 --batch-size 32 --accumulate 4 --lr 1e-5 --min-lr 1e-6 --warmup 100 \
    --recompute --workers 4 --save-every 500 "$@"
