#!/bin/sh
# Two settings each of some methods, from which tiny-imagenet.jobs has the better one.
#
#   sh launch/recipes/tiny-imagenet-grid.sh TINY RUNS
#
# TINY: train/<wnid>/; RUNS: the folder of tiny-imagenet.sh, once it has trained its original. The runs read all
# training images, and are measured on a fifth of them. Held-out images are not opened, and no retrained model is asked.
# Better is the smaller mean of FA and of what RA has lost against the original: RUNS/grid/table has both.
set -eu

source=$1
out=$2
here=$(cd "$(dirname "$0")/.." && pwd)
launch=${LAUNCH:-python}
grid=$out/grid

if [ ! -e "$grid/measured" ]; then
    python - "$source/train" "$grid/fifth" <<'PY'
import sys
from pathlib import Path

source, out = Path(sys.argv[1]), Path(sys.argv[2])
for number, path in enumerate(sorted(p for p in source.glob("*/*") if p.is_file())):
    for half in ("train", "val") if number % 5 == 0 else ():
        where = out / half / path.parent.name
        where.mkdir(parents=True, exist_ok=True)
        (where / path.name).symlink_to(path.resolve())
PY
    python "$here/prepare.py" --source "$grid/fifth" --form arrays --size 32 --out "$grid/measured"
fi
# Exit code 3: a run ended in numbers that are not finite; it is named, and has no row.
$launch "$here/forget.py" --data "$out/data" --weights "$out/original" --dtype bf16 --seed "${SEED:-1}" \
    --forget "file:$out/forgotten.txt" --out "$grid/runs" --jobs "$here/recipes/tiny-imagenet-grid.jobs" || [ $? -eq 3 ]
$launch "$here/evaluate.py" --data "$grid/measured" --other-images --original "$out/original" --dtype bf16 \
    --runs "$grid"/runs/* --out "$grid/table" --overwrite
