#!/bin/sh
# Forty classes of Tiny-ImageNet at 32 px: the five nearest PACS forgotten by every method of tiny-imagenet.jobs,
# beside five models retrained without them, under every attack.
#
#   sh launch/recipes/tiny-imagenet.sh TINY PACS [FOLDER]
#
# TINY: train/<wnid>/ and val/<wnid>/; PACS: <domain>/<class>/; FOLDER holds the runs. One process; LAUNCH="torchrun
# --nproc_per_node=2" runs two. The same command goes on with a job that was stopped.
# DTYPE=fp32 is for a processor without instructions for bfloat16, where that is several times slower.
set -eu

source=$1
pacs=$2
out=${3:-runs/tiny-imagenet}
here=$(cd "$(dirname "$0")/.." && pwd)
launch=${LAUNCH:-python}
seed=${SEED:-1}
common="--data $out/data --weights $out/original --dtype ${DTYPE:-bf16}"

step() {
    script=$1
    shift
    echo "$script.py $*"
    $launch "$here/$script.py" "$@"
}

[ -e "$out/data" ] || python "$here/prepare.py" --source "$source" --form arrays --size 32 --out "$out/data"
[ -e "$out/original/run.json" ] || step train --seed "$seed" --data "$out/data" --model resnet20 --dtype "${DTYPE:-bf16}" --epochs 15 --lr 0.1 --batch-size 64 --out "$out/original"
if [ ! -e "$out/forgotten.txt" ]; then
    step forget $common --seed "$seed" --forget top:5 --downstream "$pacs" --out "$out/nearest" no-op
    python -c 'import json, sys; print(*json.load(sys.stdin)["classes"], sep="\n")' \
        < "$out/nearest/request.json" > "$out/forgotten.txt"
fi
step forget $common --seed "$((seed + 1)),$((seed + 2)),$((seed + 3)),$((seed + 4)),$((seed + 5))" --forget "file:$out/forgotten.txt" --out "$out/retrained" \
    retrain --epochs 15 --lr 0.1 --batch-size 64
# A method that ends in numbers that are not finite is named here and left out of the table.
step forget $common --seed "$seed" --forget "file:$out/forgotten.txt" --out "$out/methods" --jobs "$here/recipes/tiny-imagenet.jobs" || [ $? -eq 3 ]
step evaluate --data "$out/data" --downstream "$pacs" --original "$out/original" --retrained "$out"/retrained/* \
    --runs "$out"/methods/* --random-control --dtype "${DTYPE:-bf16}" --depth full --attacks 20 --cache "$out/cache" \
    --out "$out/table" --overwrite
