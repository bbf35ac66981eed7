#!/bin/sh
# CIFAR-10, one class forgotten by a ResNet-20 trained elsewhere, on two processes of a CPU.
#
#   sh launch/recipes/cifar10.sh CIFAR WEIGHTS [FOLDER]
#
# CIFAR: a folder or archive of CIFAR-10 images; WEIGHTS: a ResNet-20 checkpoint; FOLDER holds the
# runs. The schedules are short, for a CPU: about an hour on two cores. LAUNCH=python runs one process.
# DTYPE=fp32 is for a processor without instructions for bfloat16, where that is several times slower.
set -eu

source=$1
weights=$2
out=${3:-runs/cifar10}
here=$(cd "$(dirname "$0")/.." && pwd)
launch=${LAUNCH:-torchrun --nproc_per_node=2}
common="--data $out/data --weights $weights --model resnet20 --forget class:truck --dtype ${DTYPE:-bf16} --overwrite --seed ${SEED:-1}"

step() {
    script=$1
    shift
    echo "$script.py $*"
    $launch "$here/$script.py" "$@"
}

[ -e "$out/data" ] || python "$here/prepare.py" --source "$source" --form arrays --size 32 --out "$out/data"
[ -e "$out/retrain/run.json" ] || step forget $common --out "$out/retrain" retrain --epochs 20 --lr 0.1 --batch-size 128
step forget $common --out "$out/finetune" finetune --epochs 1 --lr 0.05
step forget $common --out "$out/grad-ascent" grad-ascent --epochs 2 --lr 5e-5
step forget $common --out "$out/l1-sparse" l1-sparse --epochs 1 --lr 0.05
step forget $common --out "$out/random-label" random-label --epochs 1 --lr 0.013
step forget $common --out "$out/salun" salun --density 0.5 random-label --epochs 1 --lr 0.013
step forget $common --out "$out/spkd" spkd --epochs 2 --lr 3e-5
step evaluate --data "$out/data" --model resnet20 --original "$weights" --retrained "$out/retrain" \
    --runs "$out/finetune" "$out/grad-ascent" "$out/l1-sparse" "$out/random-label" "$out/salun" "$out/spkd" \
    --out "$out/table" --overwrite
