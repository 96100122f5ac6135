#!/usr/bin/env bash
# How many times do two lines cross? An adapter for the 3B at 224 px, one GPU. The pictures, drawn in seconds:
#   python train/practice/drawings.py crossings --out practice/crossings-224 --size 224 --train 300
#
# Known, from github.com/ariG23498/fine-tune-paligemma (count_intersection/lora_finetune.py): LoRA of rank 8 on
# the decoder's matrices, and as their names match, on SigLIP's queries, keys and values; alpha 8 and no dropout,
# PEFT's own; 2 epochs in batches of 4, 2e-5 with 2 steps of warm-up, decay 1e-6, beta2 0.999; gradients clipped
# at 1, the Trainer's own. Its drawings (create_intersection_dataset.py) have lines of this form.
# Guessed: 100 pictures of each count, as its README makes them, and so 150 steps. No soft caps: it is for
# PaliGemma 1, which has none; the full fine-tuning beside it is for this checkpoint.
# Different here: a cosine where the Trainer's rate falls in a straight line; weights in bfloat16 below the
# adapter; the question's words; and lines that begin, bend and end well apart from each other.
# Nobody has measured this run on the 3B; nano's is in train/README.md.
#   MODEL, DATA, STEPS, OUT, LAUNCH: other than below. Add --dry-run for sizes and memory alone, and
#   --pictures N if the data is not here yet.
set -euo pipefail
${LAUNCH:-python} "$(dirname "$0")/../fit.py" \
    --model "${MODEL:-google/paligemma2-3b-pt-224}" --out "${OUT:-runs/crossings-3b}" \
    --data "${DATA:-practice/crossings-224/train.jsonl}" \
    --lora --lora-rank 8 --lora-alpha 8 --lora-dropout 0 \
    --lora-targets 'decoder\.layers\.\d+\.(attn|mlp)\.\w+_proj|vision\.layers\.\d+\.attn\.[qkv]_proj' \
    --loss-mean example --attn-cap 0 --final-cap 0 --beta2 0.999 --weight-decay 1e-6 --clip 1 \
    --steps "${STEPS:-150}" --batch-size 4 --lr 2e-5 --min-lr 0 --warmup 2 --recompute "$@"
