#!/bin/sh
# A control that forgets nothing and looks as if it had: head distillation on the embedded digits,
# beside five networks retrained without the digits 3 and 8. Minutes on two cores.
#
#   sh launch/recipes/head-distillation.sh [FOLDER]     FOLDER holds the runs
#
# Another set than the digits is named by the variables below; docs/results has one with CIFAR-10.
# The retrained networks have other seeds than the original: one that starts from the original's
# own initial weights stays unusually like it.
set -eu

out=${1:-runs/head-distillation}
here=$(cd "$(dirname "$0")/.." && pwd)
launch=${LAUNCH:-python}
data=${DATA:-digits}
downstream=${DOWNSTREAM-digits}
seeds=${SEEDS:-2 3 4 5 6}
training=${TRAINING:---epochs 30 --lr 0.1 --schedule cosine}
common="--data $data ${PRECISION:-}"
forget="$common --forget ${FORGET:-class:3,8} --weights $out/original"

step() {
    script=$1
    shift
    echo "$script.py $*"
    $launch "$here/$script.py" "$@"
}

run_once() {
    name=$1
    shift
    [ -e "$out/$name/run.json" ] || step forget $forget --out "$out/$name" --overwrite "$@"
}

[ -e "$out/original/run.json" ] ||
    step train $common --model "${MODEL:-small}" --seed 1 $training --out "$out/original" --overwrite
retrained=
for seed in $seeds; do
    run_once "retrain-$seed" --seed "$seed" retrain $training
    retrained="$retrained $out/retrain-$seed"
done
for seed in 1 2 3; do
    run_once "head-distillation-$seed" --seed $seed head-distillation
done
run_once finetune --seed 1 finetune ${FINETUNE:---epochs 10 --lr 0.1}
run_once random-label --seed 1 random-label ${RANDOM_LABEL:---epochs 6 --lr 0.02}
step evaluate $common ${downstream:+--downstream "$downstream"} --original "$out/original" \
    --retrained $retrained \
    --runs "$out"/head-distillation-[1-3] "$out/finetune" "$out/random-label" \
    --random-control --depth full --relearn 100 --out "$out/table" --overwrite
