#!/usr/bin/env bash
# PaliGemma 2's own detection protocol (its paper, appendix C): all weights, objects in random order followed
# by noise boxes, 50 epochs of COCO train2017. It writes class names in words; here they are single tokens
# (README, How it detects).
#
# Known, from the paper: the prompt, the order, noise boxes up to the greatest length with a class of their own,
# that class taught and their coordinates not, neither noise nor eos drawn at inference, 50 epochs; and of its
# stage 3, to which transfers belong: no soft caps.
# Known, from the transfers in github.com/google-research/big_vision (configs/proj/paligemma/transfers), but not
# of this one: beta2 0.999, gradients clipped at 1, cosine to 0 after 5% of warm-up, nothing frozen, the loss a
# mean over examples of each example's mean.
# Guessed: learning rate and batch, which the paper does not give: those of its other transfers. After Pix2seq's
# code, whose protocol this is: the noise class weighs 1, and half the noise boxes are near real ones. Also that
# noise is fed as noise, that pictures without objects take part, and --augment.
#   MODEL, COCO, OUT, LAUNCH: other than below. Add --dry-run for sizes and memory alone, and
#   --pictures N if the data is not here yet.
set -euo pipefail
COCO=${COCO:-coco}
${LAUNCH:-torchrun --standalone --nproc_per_node=8} "$(dirname "$0")/../fit.py" \
    --model "${MODEL:-google/paligemma2-3b-pt-448}" --out "${OUT:-runs/coco-3b}" \
    --data "$COCO/annotations/instances_train2017.json" --images "$COCO/train2017" --augment --shard \
    --answers sequence --noise-weight 1 --noise-disguise 0 --loss vocabulary --loss-mean example \
    --attn-cap 0 --final-cap 0 --beta2 0.999 \
    --steps 92412 --batch-size 64 --lr 1e-5 --min-lr 0 --warmup 4620 --recompute --workers 4 "$@"
