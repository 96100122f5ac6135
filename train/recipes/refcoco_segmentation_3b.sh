#!/usr/bin/env bash
# Referring segmentation as big_vision's RefCOCO transfer: {"image", "prefix": "the left dog", "suffix":
# "<loc...>x4<seg...>x16"} lines, 5 epochs at batch 64, learning rate 1e-5. STEPS: 5 x lines / 64.
#   MODEL, DATA, IMAGES, OUT, LAUNCH: other than below. Add --dry-run for sizes and memory alone.
set -euo pipefail
${LAUNCH:-torchrun --standalone --nproc_per_node=8} "$(dirname "$0")/../fit.py" \
    --model "${MODEL:-google/paligemma2-3b-pt-224}" --out "${OUT:-runs/refcoco}" \
    --data "${DATA:-refcoco.jsonl}" --images "${IMAGES:-images}" --shard \
    --steps "${STEPS:-10000}" --batch-size 64 --lr 1e-5 --min-lr 0 --warmup 500 --recompute --workers 4 "$@"
