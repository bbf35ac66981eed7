#!/bin/sh
# The main job on the embedded digits: a network trained, retrained without the digits 3 and 8, made
# to forget them by each of the seed's methods, and all of them in one table. Minutes on two cores.
#
#   sh launch/recipes/digits.sh [FOLDER]      FOLDER holds the runs; default runs/digits
#
# Where torchrun's ranks are wanted, set LAUNCH="torchrun --nproc_per_node=8".
set -eu

out=${1:-runs/digits}
here=$(cd "$(dirname "$0")/.." && pwd)
launch=${LAUNCH:-python}
forget="--data digits --forget class:3,8 --weights $out/original --overwrite"

step() {
    script=$1
    shift
    echo "$script.py $*"
    $launch "$here/$script.py" "$@"
}

step train --data digits --model small --epochs 30 --lr 0.05 --schedule cosine --out "$out/original" --overwrite
step forget $forget --out "$out/retrain" retrain --epochs 30 --lr 0.05
step forget $forget --out "$out/finetune" finetune --epochs 5 --lr 0.02
step forget $forget --out "$out/grad-ascent" grad-ascent --epochs 2 --lr 0.002
step forget $forget --out "$out/l1-sparse" l1-sparse --epochs 5 --lr 0.02
step forget $forget --out "$out/random-label" random-label --epochs 5 --lr 0.01
step forget $forget --out "$out/salun" salun --density 0.5 random-label --epochs 5 --lr 0.01
step forget $forget --out "$out/spkd" spkd --epochs 5 --lr 0.001
step evaluate --data digits --downstream digits --original "$out/original" --retrained "$out/retrain" \
    --runs "$out/finetune" "$out/grad-ascent" "$out/l1-sparse" "$out/random-label" "$out/salun" "$out/spkd" \
    --out "$out/table" --overwrite
