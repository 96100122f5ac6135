#!/usr/bin/env bash
# Captions from JSONL: {"image": "a.jpg", "prefix": "caption en", "suffix": ["a cat on a mat", ...]} lines, as
# big_vision's COCO caption transfer.
#
# Known, from github.com/google-research/big_vision (configs/proj/paligemma/transfers/cococap.py): 5 epochs of
# 113,287 pictures, batch 256, rate 1e-5 with 5% of warm-up and a cosine to 0, decay 1e-6, beta2 0.999,
# gradients clipped at 1, the loss a mean over examples of each example's mean.
# Its decay is another quantity than PyTorch's: big_vision (optax.py) takes decay x schedule off a weight, where
# the schedule goes up to 1; PyTorch takes decay x learning rate. So 1e-6 there is 1e-6 / 1e-5 = 0.1 here. There
# it is for tensors called kernel alone, SigLIP's and the projector's; here it is for Gemma's matrices as well.
# (No decay does as well, the file says.)
# Guessed: no soft caps, as PaliGemma 2's paper has it for stage 3; the file was written for PaliGemma 1, which
# has none.
#   MODEL, DATA, IMAGES, OUT, LAUNCH: other than below. Add --dry-run for sizes and memory alone, and
#   --pictures N if the data is not here yet.
set -euo pipefail
${LAUNCH:-torchrun --standalone --nproc_per_node=8} "$(dirname "$0")/../fit.py" \
    --model "${MODEL:-google/paligemma2-3b-pt-224}" --out "${OUT:-runs/captions}" \
    --data "${DATA:-captions.jsonl}" --images "${IMAGES:-images}" --shard \
    --loss-mean example --attn-cap 0 --final-cap 0 --beta2 0.999 --weight-decay 0.1 \
    --steps 2213 --batch-size 256 --accumulate 4 --lr 1e-5 --min-lr 0 --warmup 111 \
    --recompute --workers 4 "$@"
