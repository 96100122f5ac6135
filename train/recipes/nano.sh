#!/usr/bin/env bash
# All of nano, from nothing to the shipped kind of checkpoint: ten and a half hours on two cores, no data set
# (train/README.md).
# Options are handed on to each run of fit.py: --no-compile where there is no C++ compiler.
#   OUT: folder of the runs.
#   STEPS_SCALE: a factor for all numbers of steps, and for the scenes that the codec is measured on; at least 2
#   of each are left. 0.001 tries the whole way in minutes.
#   A run that was killed goes on when the script is started again as it was.
set -euo pipefail
here=$(dirname "$0")/..
OUT=${OUT:-runs/nano}
SCALE=${STEPS_SCALE:-1}
[[ $SCALE =~ ^[0-9]*\.?[0-9]+$ ]] || { echo "nano.sh: STEPS_SCALE $SCALE: must be a number such as 0.001" >&2; exit 1; }
scaled() { LC_ALL=C awk -v n="$1" -v scale="$SCALE" 'BEGIN { s = int(n * scale + 0.5); print (s > 2 ? s : 2) }'; }
fit() { python "$here/fit.py" --resume --compile --min-lr 1e-5 --weight-decay 0.02 "$@"; }

# 1. Detection: first the helper head alone, which stands in for SigLIP's pre-training, then all objects of scenes.
python "$here/nano/untrained.py" --out "$OUT/untrained"
fit --model "$OUT/untrained" --out "$OUT/detect-1" --steps "$(scaled 5900)" --batch-size 64 --lr 2e-3 --muon-lr 1e-2 \
    --patch-weight 0.5 --patch-steps "$(scaled 1200)" "$@"
fit --model "$OUT/detect-1/final" --out "$OUT/detect-2" --steps "$(scaled 10200)" --batch-size 64 --lr 6e-4 \
    --muon-lr 3e-3 --patch-weight 1 --patch-steps "$(scaled 3000)" --first-scene 1000000 "$@"

# 2. The mask codec: 16 tokens a mask.
[ -f "$OUT/codec/codec.safetensors" ] ||
    python "$here/nano/codec.py" --out "$OUT/codec" --steps "$(scaled 8000)" --held-out "$(scaled 300)"

# 3. Words: a vocabulary for them, then all tasks mixed.
python "$here/nano/untrained.py" --out "$OUT/words" --start "$OUT/detect-2/final" --codec "$OUT/codec/codec.safetensors"
fit --model "$OUT/words" --out "$OUT/all-tasks" --tasks all --steps "$(scaled 14800)" --batch-size 32 --lr 1e-3 \
    --muon-lr 5e-3 --patch-weight 1 --warmup 200 --first-scene 4000000 "$@"

# 4. Boxes in parallel: every object a branch, the model's own boxes as noise, locations taught with their neighbours.
fit --model "$OUT/all-tasks/final" --out "$OUT/parallel" --tasks all --answers parallel --noise own --noise-boxes 8 \
    --noise-weight 2 --location-smoothing 6 --steps "$(scaled 7200)" --batch-size 64 --lr 6e-4 --muon-lr 3e-3 \
    --patch-weight 1 --warmup 100 --first-scene 30000000 "$@"

# 5. The end, where locations are taught as they are.
fit --model "$OUT/parallel/final" --out "$OUT/end" --tasks all --answers parallel --noise own --noise-boxes 8 \
    --noise-weight 2 --steps "$(scaled 700)" --batch-size 32 --lr 2e-4 --min-lr 1e-6 --warmup 20 \
    --first-scene 40000000 "$@"
python "$here/../infer/calibrate.py" --model "$OUT/end/final" --count "$(scaled 1000)" ||
    echo "nano.sh: the scores are left as they are"  # after a few steps, no box is right
echo "nano: $OUT/end/final"
