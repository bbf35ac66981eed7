#!/bin/sh
# The main job on the embedded digits: a network trained, retrained without the digits 3 and 8, made
# to forget them by each of the seed's methods, and all of them in one table. Minutes on two cores.
#
#   sh launch/recipes/digits.sh [FOLDER]      FOLDER holds the runs; default runs/digits
#
# SEED=2 takes another seed; LAUNCH="torchrun --nproc_per_node=8" runs on ranks.
set -eu

out=${1:-runs/digits}
here=$(cd "$(dirname "$0")/.." && pwd)
launch=${LAUNCH:-python}
forget="--data digits --forget class:3,8 --weights $out/original --overwrite --seed ${SEED:-1}"

step() {
    script=$1
    shift
    echo "$script.py $*"
    $launch "$here/$script.py" "$@"
}

step train --seed "${SEED:-1}" --data digits --model small --epochs 30 --lr 0.05 --out "$out/original" --overwrite
step forget $forget --out "$out/retrain" retrain --epochs 30 --lr 0.05
step forget $forget --out "$out/finetune" finetune --epochs 10 --lr 0.1
step forget $forget --out "$out/grad-ascent" grad-ascent --epochs 3 --lr 3.5e-4
step forget $forget --out "$out/l1-sparse" l1-sparse --epochs 10 --lr 0.1 --alpha 5e-4
step forget $forget --out "$out/random-label" random-label --epochs 6 --lr 0.02
step mask --seed "${SEED:-1}" --data digits --forget class:3,8 --weights "$out/original" --out "$out/masks.safetensors" --overwrite
step forget $forget --out "$out/salun" salun --mask "$out/masks.safetensors" --density 0.5 random-label --epochs 6 --lr 0.02
step forget $forget --out "$out/spkd" spkd --epochs 8 --lr 2.5e-3
step evaluate --data digits --downstream digits --original "$out/original" --retrained "$out/retrain" \
    --runs "$out/finetune" "$out/grad-ascent" "$out/l1-sparse" "$out/random-label" "$out/salun" "$out/spkd" \
    --out "$out/table" --overwrite
