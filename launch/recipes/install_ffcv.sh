#!/bin/sh
# Builds and installs the ffcv package for --loader ffcv: sh launch/recipes/install_ffcv.sh [python]
#
# ffcv 1.0.2 comes as source, wants Python 3.11 (it imports distutils) and finds OpenCV by
# pkg-config. Debian's libopencv-dev, which has the description, is 214 packages; the two modules
# that ffcv links are 12, and the description and the one header they lack are written here.
set -eu
python=${1:-python}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
  echo "error: got $("$python" --version 2>&1), expected Python 3.11 for ffcv; use --loader beton, which reads the same files" >&2
  exit 2
}

packages="g++ pkg-config libturbojpeg0-dev libopencv-core-dev libopencv-imgproc-dev"
"$python" -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null ||
  packages="$packages python3.11-dev"
missing=
for package in $packages; do
  dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
if [ -n "$missing" ]; then
  if [ "$(id -u)" -ne 0 ]; then
    echo "error: got no$missing, expected them for building ffcv; run: sudo apt-get install$missing" >&2
    exit 2
  fi
  export DEBIAN_FRONTEND=noninteractive
  [ -n "${APT_UPDATED:-}" ] || apt-get -o DPkg::Lock::Timeout=180 update -qq
  # shellcheck disable=SC2086
  apt-get -o DPkg::Lock::Timeout=180 install -y -qq --no-install-recommends $missing
fi

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
if ! pkg-config --exists opencv4; then
  mkdir -p "$build/include/opencv2"
  printf '#pragma once\n#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' \
    > "$build/include/opencv2/opencv.hpp"
  printf 'Name: OpenCV\nDescription: core and imgproc\nVersion: 4\nLibs: -lopencv_imgproc -lopencv_core\nCflags: -I%s/include -I/usr/include/opencv4\n' \
    "$build" > "$build/opencv4.pc"
fi
export PKG_CONFIG_PATH="$build${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"

# What it imports; it asks for other OpenCV and test packages too, which are not needed.
"$python" -m pip install --quiet numba opencv-python-headless tqdm pillow pytorch_pfn_extras psutil
"$python" -m pip install --quiet --no-deps "ffcv==1.0.2"
"$python" -c 'import ffcv.loader, ffcv.writer; print("ffcv is installed: try --loader ffcv")'
