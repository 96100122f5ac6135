#!/usr/bin/env bash
# Nano fine-tuned on small drawings, from nothing to a picture of its answers before and after:
#   train/recipes/drawings_nano.sh crossings    # how many times do two lines cross?
#   train/recipes/drawings_nano.sh captions     # of made-up creatures
#   train/recipes/drawings_nano.sh masks        # of creatures, from PNG masks of one class
# Options after that are handed on to fit.py; of an option given twice, the last one counts. Figures are printed;
# before.png and after.png show the first answers.
#   OUT: another folder than runs/TASK. TRAIN, TEST: how many drawings.
set -euo pipefail
here=$(dirname "$0")/..
task=${1:-}
case $task in
    crossings) kind=crossings lines= rate="--lora --dtype float32 --lr 3e-3" ;;
    captions) kind=creatures lines= rate="--lr 5e-4" ;;  # all weights: an adapter teaches no new words
    masks) kind=creatures lines=-codes rate="--lora --dtype float32 --lr 3e-3" ;;
    *) echo "drawings_nano.sh ${task:-without a task}: must be crossings, captions or masks" >&2; exit 1 ;;
esac
shift
OUT=${OUT:-runs/$task}
data=$OUT/data
answers() { python "$here/../infer/evaluate_answers.py" --data "$data/test$lines.jsonl" --sheet "$OUT/$1.png" "${@:2}"; }

mkdir -p "$OUT"
[ -d "$data" ] || python "$here/practice/drawings.py" $kind --out "$data" --train "${TRAIN:-6000}" --test "${TEST:-300}"
if [ $task = masks ]; then
    for part in train test; do
        python "$here/convert.py" masks-to-jsonl --data "$data/$part-masks.jsonl" --out "$data/$part-codes.jsonl" --force
    done
fi
answers before --model nano
python "$here/fit.py" --model nano --data "$data/train$lines.jsonl" --out "$OUT/run" --batch-size 16 --steps 300 \
    $rate --min-lr 1e-5 --warmup 20 "$@"
if [ -f "$OUT/run/final/adapter_config.json" ]; then answers after --adapter "$OUT/run/final"
else answers after --model "$OUT/run/final"; fi
