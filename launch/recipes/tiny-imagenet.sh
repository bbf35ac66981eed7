#!/bin/sh
# Forty classes of Tiny-ImageNet at 32 px: forget the five nearest PACS, beside a true retrain.
#
#   sh launch/recipes/tiny-imagenet.sh TINY PACS [FOLDER]
#
# TINY: train/<wnid>/ and val/<wnid>/; PACS: <domain>/<class>/; FOLDER holds the runs.
set -eu

source=$1
pacs=$2
out=${3:-runs/tiny-imagenet}
here=$(cd "$(dirname "$0")/.." && pwd)
launch=${LAUNCH:-torchrun --nproc_per_node=2}
common="--data $out/data --weights $out/original --forget top:5 --downstream $pacs --dtype bf16 --overwrite --seed ${SEED:-1}"

step() {
    script=$1
    shift
    echo "$script.py $*"
    $launch "$here/$script.py" "$@"
}

[ -e "$out/data" ] || python "$here/prepare.py" --source "$source" --form arrays --size 32 --out "$out/data"
step train --seed "${SEED:-1}" --data "$out/data" --model resnet20 --dtype bf16 --epochs 15 --lr 0.1 --batch-size 128 --out "$out/original" --overwrite
step forget $common --out "$out/retrain" retrain --epochs 15 --lr 0.1 --batch-size 128
step forget $common --out "$out/finetune" finetune --epochs 2 --lr 0.05
step forget $common --out "$out/grad-ascent" grad-ascent --epochs 2 --lr 2e-4
step forget $common --out "$out/l1-sparse" l1-sparse --epochs 2 --lr 0.05
step forget $common --out "$out/random-label" random-label --epochs 2 --lr 0.02
step forget $common --out "$out/salun" salun --density 0.5 random-label --epochs 2 --lr 0.02
step forget $common --out "$out/spkd" spkd --epochs 2 --lr 5e-5
step evaluate --data "$out/data" --downstream "$pacs" --original "$out/original" --retrained "$out/retrain" \
    --runs "$out/finetune" "$out/grad-ascent" "$out/l1-sparse" "$out/random-label" "$out/salun" "$out/spkd" \
    --out "$out/table" --overwrite
