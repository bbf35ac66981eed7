#!/bin/sh
# Every method of cifar-small-classes/ or cifar-small-samples/ with the settings that cifar-small-tune.sh found, and controls, one run a
# seed, beside the retrained models of cifar-small.sh, under every attack.
#
#   sh launch/recipes/cifar-small-table.sh FOLDER class|samples
#
# FOLDER: that of cifar-small.sh. SEEDS=1,2 are two seeds, ATTACKS=0 leaves the attacks out that run the network. The same command
# goes on with a job that was stopped.
# DTYPE=fp32 is for a processor without instructions for bfloat16, where that is several times slower.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
cd "$1"
request=$2
case $request in
class) forget=class:truck recipes=cifar-small-classes oracles=oracles/class_truck ;;
samples) forget=samples:random.txt recipes=cifar-small-samples oracles=oracles/samples_random_txt ;;
*) echo "got the request $request; expected class or samples" >&2 && exit 2 ;;
esac

for file in "$here/recipes/$recipes"/*.toml; do
    echo "--recipe $recipes/$(basename "$file" .toml)"
done > "$request.jobs"
[ "$request" = samples ] || echo "head-distillation --epochs 2 --batch-size 64 --lr 0.1" >> "$request.jobs" # of classes alone
cat >> "$request.jobs" <<CONTROLS
one-point-contraction --epochs 1 --batch-size 64 --lr 0.01
no-op
CONTROLS
# A method that ends in numbers that are not finite is named here and left out of the table.
${LAUNCH:-python} "$here/main.py" forget --data data --weights oracles/original-seed1 --dtype "${DTYPE:-bf16}" --seed "${SEEDS:-1,2,3}" \
    --forget "$forget" --out "methods-$request" --jobs "$request.jobs" || [ $? -eq 3 ]
${LAUNCH:-python} "$here/main.py" evaluate --data data --oracles "$oracles" --runs "methods-$request"/* --random-control \
    --dtype "${DTYPE:-bf16}" --depth full --attacks "${ATTACKS:-20}" --out "table-$request" --overwrite
