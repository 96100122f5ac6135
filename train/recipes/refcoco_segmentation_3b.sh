#!/usr/bin/env bash
# Referring segmentation as big_vision's RefCOCO transfer: {"image", "prefix": "the left dog", "suffix":
# "<loc...>x4<seg...>x16"} lines. STEPS: 5 x lines / 64.
#
# Known, from github.com/google-research/big_vision (configs/proj/paligemma/transfers/refcoco_seg.py), its
# default run: 5 epochs, batch 64, rate 1e-5 with 5% of warm-up and a cosine to 0, no decay, beta2 0.999,
# gradients clipped at 1, the loss a mean over examples of each example's mean.
# Guessed: no soft caps, as PaliGemma 2's paper has it for stage 3; the file was written for PaliGemma 1, which
# has none.
# Different here: there labels are smoothed by 0.3, which fit.py cannot do; and 448 px are its default.
#   MODEL, DATA, IMAGES, OUT, LAUNCH: other than below. Add --dry-run for sizes and memory alone, and
#   --pictures N if the data is not here yet.
set -euo pipefail
${LAUNCH:-torchrun --standalone --nproc_per_node=8} "$(dirname "$0")/../fit.py" \
    --model "${MODEL:-google/paligemma2-3b-pt-224}" --out "${OUT:-runs/refcoco}" \
    --data "${DATA:-refcoco.jsonl}" --images "${IMAGES:-images}" --shard \
    --loss-mean example --attn-cap 0 --final-cap 0 --beta2 0.999 \
    --steps "${STEPS:-10000}" --batch-size 64 --lr 1e-5 --min-lr 0 --warmup 500 --recompute --workers 4 "$@"
