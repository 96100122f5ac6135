#!/usr/bin/env bash
# Captions from JSONL: {"image": "a.jpg", "prefix": "caption en", "suffix": ["a cat on a mat", ...]} lines, as
# big_vision's COCO caption transfer: 5 epochs of 113,287 pictures, batch 256, learning rate 1e-5.
#   MODEL, DATA, IMAGES, OUT, LAUNCH: other than below. Add --dry-run for sizes and memory alone.
set -euo pipefail
${LAUNCH:-torchrun --standalone --nproc_per_node=8} "$(dirname "$0")/../fit.py" \
    --model "${MODEL:-google/paligemma2-3b-pt-224}" --out "${OUT:-runs/captions}" \
    --data "${DATA:-captions.jsonl}" --images "${IMAGES:-images}" --shard \
    --steps 2213 --batch-size 256 --accumulate 4 --lr 1e-5 --min-lr 0 --warmup 111 --weight-decay 1e-6 \
    --recompute --workers 4 "$@"
