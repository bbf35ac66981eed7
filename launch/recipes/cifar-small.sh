#!/bin/sh
# Every fifth image of CIFAR-10 at 16 px, network `small`: an original and the models retrained without the class truck and without
# 1,000 of the 10,000 training images drawn at random, for cifar-small-tune.sh and cifar-small-table.sh.
#
#   sh launch/recipes/cifar-small.sh CIFAR FOLDER
#
# CIFAR: train/<class>/*.jpg and test/<class>/*.jpg, unpacked; FOLDER holds the runs. COUNT=24 makes more retrained models than 20.
# The same command goes on with a job that was stopped.
# DTYPE=fp32 is for a processor without instructions for bfloat16, where that is several times slower.
set -eu

source=$(cd "$1" && pwd)
mkdir -p "$2"
here=$(cd "$(dirname "$0")/.." && pwd)
launch=${LAUNCH:-python}
cd "$2"

select_images() { # FROM TO: links to the first of every five files of each class, by name
    for folder in "$1"/*/; do
        to=$2/$(basename "$folder")
        mkdir -p "$to"
        find "$folder" -name '*.jpg' | LC_ALL=C sort | awk 'NR % 5 == 1' | xargs ln -sf -t "$to"
    done
}

if [ ! -e data ]; then
    select_images "$source/train" images/train
    select_images "$source/test" images/val
    $launch "$here/prepare.py" --source images --form arrays --size 32 --out data
fi
# One list for all seeds: random-samples:10% would draw other images for each.
python -c 'import random; print(*sorted(random.Random(1).sample(range(10000), 1000)), sep="\n")' > random.txt

for round in "1 class:truck" "${COUNT:-20} class:truck" "${COUNT:-20} samples:random.txt"; do
    $launch "$here/main.py" oracles --data data --model small --dtype "${DTYPE:-bf16}" --epochs 15 --lr 0.1 --batch-size 64 --schedule cosine \
        --count "${round% *}" --forget "${round#* }" --out oracles
done
