#!/usr/bin/env bash
# PaliGemma 2's own detection protocol (its paper, appendix C): all weights, objects in random order followed
# by noise boxes, 50 epochs of COCO train2017. The paper gives no learning rate or batch: these are the ones
# of its other transfers. It writes class names in words; here they are single tokens (README, How it detects).
#   MODEL, COCO, OUT, LAUNCH: other than below. Add --dry-run for sizes and memory alone.
set -euo pipefail
COCO=${COCO:-coco}
${LAUNCH:-torchrun --standalone --nproc_per_node=8} "$(dirname "$0")/../fit.py" \
    --model "${MODEL:-google/paligemma2-3b-pt-448}" --out "${OUT:-runs/coco-3b}" \
    --data "$COCO/annotations/instances_train2017.json" --images "$COCO/train2017" --augment --shard \
    --steps 92412 --batch-size 64 --lr 1e-5 --min-lr 0 --warmup 4620 --recompute --workers 4 "$@"
