#!/usr/bin/env bash
# The published closed-set run (github.com/segis95/paligemma2-detection): PaliGemma 2 10B at 448 px, LoRA of
# rank 16 on 402 matrices, COCO train2017, an effective batch of 32 on four GPUs. Ends in an adapter that PEFT
# reads, too.
#
# Known, from its code (training/, configs/train/) and its report (docs/paligemma_cs_report.md):
#   targets     51 groups in random order, then eos; noise boxes overlap neither real ones nor each other by
#               more than 0.15, lie anywhere, are fed back as noise, and their class weighs like any other;
#               pictures without objects are skipped
#   loss        over the whole vocabulary, eos included
#   optimizer   AdamW as PyTorch has it (betas 0.9 and 0.999, decay 0.01), no clipping, 1e-5, cosine, 100 steps
#               of warm-up, 2 pictures x 4 micro-batches x 4 GPUs; bfloat16 below the adapter
# Guessed:
#   caps        off: uv.lock has transformers 4.57.1, which by default applies neither of them (its attention
#               ignores the one, PaliGemma's head the other). The adapter's folder says so to detect.py
#   length      6 epochs are configured, here of the 117,266 pictures with objects; how many the published
#               adapter had is not said
#   last rate   1e-6 as the report says; the code's cosine ends at 0, and Accelerate moves its schedule by four
#               at a step of four processes
# Different here: no rotation (train/data/augment.py says why) and no blur; noise boxes have sides of 8% to 70% of
# the picture's, there 16 pixels to half the shorter side; crowds are left out, there they are objects; the loss
# is the mean over a step's tokens, there over those of two pictures.
#   MODEL, COCO, OUT, LAUNCH: other than below. Add --dry-run for sizes and memory alone, and
#   --pictures N if the data is not here yet.
set -euo pipefail
COCO=${COCO:-coco}
${LAUNCH:-torchrun --standalone --nproc_per_node=4} "$(dirname "$0")/../fit.py" \
    --model "${MODEL:-google/paligemma2-10b-pt-448}" --out "${OUT:-runs/coco-10b-lora}" \
    --data "$COCO/annotations/instances_train2017.json" --images "$COCO/train2017" --augment \
    --lora --lora-targets published --lora-rank 16 --lora-alpha 16 --lora-dropout 0.05 \
    --answers sequence --noise-weight 1 --noise-disguise 0 --noise-near 0 --noise-apart --skip-empty --loss vocabulary \
    --attn-cap 0 --final-cap 0 --beta2 0.999 --weight-decay 0.01 --clip 0 \
    --steps 21987 --batch-size 32 --accumulate 4 --lr 1e-5 --min-lr 1e-6 --warmup 100 \
    --recompute --workers 4 --save-every 500 "$@"
