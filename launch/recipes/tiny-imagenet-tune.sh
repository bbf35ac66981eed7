#!/bin/sh
# A search of TRIALS settings (6) for every method of tiny-imagenet-tune.jobs, without a retrained model or a held-out image.
#
#   sh launch/recipes/tiny-imagenet-tune.sh RUNS
#
# RUNS: the folder of tiny-imagenet.sh, once it has trained its original. A recipe for each is left in
# RUNS/tune/<method>/recipe.toml. The same command goes on; several processes may run it beside each other.
# DTYPE=fp32 is for a processor without instructions for bfloat16, where that is several times slower.
set -eu

out=$1
here=$(cd "$(dirname "$0")/.." && pwd)

sed '/^#/d' "$here/recipes/tiny-imagenet-tune.jobs" | while read -r line; do
    name=${line%% *}
    [ -e "$out/tune/$name/recipe.toml" ] && continue
    # A method that ends in numbers that are not finite, or refuses a value, is named and passed over.
    # shellcheck disable=SC2086
    ${LAUNCH:-python} "$here/main.py" tune --data "$out/data" --weights "$out/original" --dtype "${DTYPE:-bf16}" --seed "${SEED:-1}" \
        --forget "file:$out/forgotten.txt" --out "$out/tune/$name" --trials "${TRIALS:-6}" $line </dev/null ||
        echo "$name: no recipe (exit code $?)" >&2
done
