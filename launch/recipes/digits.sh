#!/bin/sh
# The main job on the embedded digits; what it does is in digits.toml. Minutes on two cores.
#
#   sh launch/recipes/digits.sh [FOLDER]      FOLDER holds the runs; default runs/digits
#
# SEED=2 takes another seed; LAUNCH="torchrun --nproc_per_node=8" runs on ranks. The same command
# goes on with a job that was stopped.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
${LAUNCH:-python} "$here/jobs/run.py" "$here/recipes/digits.toml" --out "${1:-runs/digits}" --seed "${SEED:-1}"
