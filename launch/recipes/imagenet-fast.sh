#!/bin/sh
# ImageNet from new weights by the fast schedule: all classes, then without those to be forgotten.
#
#   sh launch/recipes/imagenet-fast.sh IMAGENET resnet50 16 file:random100.txt [FOLDER]
#
# Networks resnet18 and resnet50; 16, 32 or 88 epochs, after ffcv-imagenet (Leclerc et al. 2023):
# 160 pixels, 192 near the end; a rate that rises for two epochs and falls to 0; smoothed labels;
# norms without decay. LAUNCH says how it is started; MORE adds options to both, such as --ema 0.999.
# The table shows each image mirrored too. Not run by us on ImageNet: docs/methods.md.
set -eu

data=$1
model=$2
epochs=$3
forget=$4
out=${5:-runs/imagenet-$model-$epochs}
here=$(cd "$(dirname "$0")/.." && pwd)
launch=${LAUNCH:-torchrun --nproc_per_node=8}

case $model in
    resnet50) size="--batch-size 4096 --lr 1.7 --weight-decay 1e-4" ;;
    resnet18) size="--batch-size 1024 --lr 0.5 --weight-decay 5e-5" ;;
    *) echo "error: got $model; expected resnet18 or resnet50" >&2; exit 2 ;;
esac
case $epochs in
    16) grow=12 ;;
    32) grow=25 ;;
    88) grow=71 ;;
    *) echo "error: got $epochs epochs; expected 16, 32 or 88" >&2; exit 2 ;;
esac
precision="--dtype bf16 --compile default"
recipe="--epochs $epochs $size --schedule linear --warmup 2 --label-smoothing 0.1 --no-decay-norms --sizes 160 192 --grow-at $grow ${MORE:-}"

step() {
    script=$1
    shift
    echo "$script.py $*"
    [ -n "${DRY:-}" ] || $launch "$here/$script.py" "$@"
}

step train --data "$data" --model "$model" $precision --out "$out/original" $recipe
step forget --data "$data" --weights "$out/original" --forget "$forget" $precision --out "$out/retrain" retrain $recipe
step evaluate --data "$data" --original "$out/original" --retrained "$out/retrain" --flip --out "$out/table"
