#!/bin/sh
# CIFAR-10, the class truck forgotten by a ResNet-20 trained elsewhere: methods that cost at most one epoch, without a retrained model.
#
#   sh launch/recipes/cifar10-cheap.sh CIFAR WEIGHTS [FOLDER]
#
# CIFAR: a folder or archive of CIFAR-10 images; WEIGHTS: a ResNet-20 checkpoint; FOLDER holds the runs. One process.
# DTYPE=fp32 is for a processor without instructions for bfloat16, where that is several times slower.
set -eu

source=$1
weights=$2
out=${3:-runs/cifar10-cheap}
here=$(cd "$(dirname "$0")/.." && pwd)
launch=${LAUNCH:-python}

[ -e "$out/data" ] || python "$here/prepare.py" --source "$source" --form arrays --size 32 --out "$out/data"
$launch "$here/forget.py" --data "$out/data" --weights "$weights" --model resnet20 --forget class:truck --dtype "${DTYPE:-bf16}" \
    --seed "${SEED:-1}" --out "$out/runs" \
    spkd --epochs 1 --lr 1e-3,3e-3 + pseudo-label --epochs 1 --batch-size 128 --lr 5e-4,2e-3 \
    + delete --epochs 1 --batch-size 128 --lr 5e-4,4e-3 + esc --share 0.015,0.1
$launch "$here/evaluate.py" --data "$out/data" --model resnet20 --original "$weights" --dtype "${DTYPE:-bf16}" \
    --runs "$out"/runs/* --out "$out/table" --overwrite
