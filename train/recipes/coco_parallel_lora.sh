#!/usr/bin/env bash
# Closed-set detection of COCO with boxes in parallel (model/decoding/parallel.py, train/branches.py): PaliGemma 2
# 3B or 10B at 448 px, LoRA of rank 16 on the matrices of the published run, one node of four GPUs. No such run is
# published: data, adapter, optimizer and length are those of coco_closed_set_lora_10b.sh, so that the two can be
# compared, and the rest is what nano was trained with. Nobody has measured this on COCO yet.
#   targets     every object a branch of its own, 4 locations and a class: no order, no limit of 51 groups in
#               decoding; 16 branches more are boxes drawn from the current weights, of which the class is taught
#   locations   a Gaussian of 1 bin around the right one: half a pixel of 448
#   caps        the checkpoint's own, with which it was pre-trained
# The cost of a picture, in tokens after the image's 1,024: 256 in sequence; here 4 x (7.3 objects on average + 16
# own boxes) = 93, and one forward pass more without gradients, in which the own boxes are drawn. By tokens alone
# that is 1.15 times the sequence's work (3 passes, as activations are recomputed, of 1,122 and one of 1,077
# tokens, against 3 of 1,285), and 0.90 times at 224 px. Detecting costs 5 steps a picture instead of 255.
#   MODEL=google/paligemma2-10b-pt-448 trains the 10B. MODEL, COCO, OUT, LAUNCH: other than below. Add --dry-run for
#   sizes and memory alone, and --pictures N if the data is not here yet.
set -euo pipefail
COCO=${COCO:-coco}
${LAUNCH:-torchrun --standalone --nproc_per_node=4} "$(dirname "$0")/../fit.py" \
    --model "${MODEL:-google/paligemma2-3b-pt-448}" --out "${OUT:-runs/coco-parallel-lora}" \
    --data "$COCO/annotations/instances_train2017.json" --images "$COCO/train2017" --augment \
    --answers parallel --noise own --noise-boxes 16 --noise-weight 1 --branches 100 --location-smoothing 1 \
    --lora --lora-targets published --lora-rank 16 --lora-alpha 16 --lora-dropout 0.05 \
    --beta2 0.999 --weight-decay 0.01 --clip 1 \
    --steps 21987 --batch-size 32 --accumulate 4 --lr 1e-5 --min-lr 1e-6 --warmup 100 \
    --recompute --workers 4 --save-every 500 "$@"
