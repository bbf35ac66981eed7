#!/bin/sh
# A search of TRIALS settings (6) for every method of cifar-small-tune.jobs, without a retrained model.
#
#   sh launch/recipes/cifar-small-tune.sh FOLDER class|samples
#
# FOLDER: that of cifar-small.sh, once it has trained its original. A recipe for each method is left in
# FOLDER/tune-REQUEST/<method>/recipe.toml. The same command goes on; several processes may run it beside each other.
# DTYPE=fp32 is for a processor without instructions for bfloat16, where that is several times slower.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
cd "$1"
request=$2
case $request in
class) forget=class:truck ;;
samples) forget=samples:random.txt ;;
*) echo "got the request $request; expected class or samples" >&2 && exit 2 ;;
esac

sed '/^#/d' "$here/recipes/cifar-small-tune.jobs" | while read -r line; do
    name=${line%% *}
    out=tune-$request/$name
    [ -e "$out/recipe.toml" ] && continue
    # A method that cannot have this request, refuses a value or ends in numbers that are not finite is named and passed over.
    # shellcheck disable=SC2086
    ${LAUNCH:-python} "$here/main.py" tune --data data --weights oracles/original-seed1 --dtype "${DTYPE:-bf16}" --seed 1 \
        --forget "$forget" --out "$out" --trials "${TRIALS:-6}" --at-once "${TRIALS:-6}" $line </dev/null ||
        echo "$name: no recipe (exit code $?)" >&2
done
