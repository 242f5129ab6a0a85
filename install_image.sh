#!/usr/bin/env bash
# Installs what the training image (Singularity.def) and the inference image (Dockerfile) have in common.
set -euo pipefail

JOB_GIB=3 # memory that a compiler needs at most

usage() {
    cat <<END
usage: install_image.sh inference|training FOLDER

Creates a Python environment in FOLDER with PyTorch, DALI, and ssd_fast with its CUDA operators. The inference image also
gets LoadGen and ONNX, and loses what only compilers need; the training image gets Horovod with NCCL, and apex. Versions
come from tools/locks, or from requirements.lock for a CUDA without a lock there. FOLDER/installed.txt lists what was
installed. Needs g++ and make, and git for training; no GPU.

  CUDA_HOME   CUDA toolkit 12.6 (Volta to Hopper) or 13.0 (from Turing on); default /usr/local/cuda
  MAX_JOBS    number of compilers at a time; default one per core, but not more than memory allows ($JOB_GIB GiB each)
END
}

fail() {
    echo "install_image.sh: $*" >&2
    exit 1
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit
fi
if [[ $# != 2 || ! $1 =~ ^(inference|training)$ ]]; then
    usage >&2
    exit 2
fi
purpose=$1 environment=$(realpath -m "$2")
cd "$(dirname "$0")"

locked() { sed -n "s/^$1==//p" requirements.lock; }

jobs=$(awk -v cores="$(nproc)" -v each=$JOB_GIB '/^MemAvailable/ {
    jobs = int($2 / 1048576 / each); print jobs < 1 ? 1 : jobs < cores ? jobs : cores }' /proc/meminfo)
export MAX_JOBS=${MAX_JOBS:-$jobs}
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} SSD_FAST_CUDA=1 PIP_DISABLE_PIP_VERSION_CHECK=1
found=$(python3 cuda_toolkit.py in "$CUDA_HOME")
mapfile -t found <<<"$found"
[[ -z ${found[3]:-} ]] || fail "${found[3]}"
cuda=${found[1]}
export TORCH_CUDA_ARCH_LIST=${found[2]}
version=$(locked torch) vision_version=$(locked torchvision)
case $cuda in
    12.6) # PyTorch 2.14 is the last one for it, and so for the V100
        version=2.14.1 vision_version=0.29.1
        torch=("torch==$version+cu126" "torchvision==$vision_version+cu126")
        torch+=(--extra-index-url https://download.pytorch.org/whl/cu126)
        dali=nvidia-dali-cuda120
        ;;
    13.0)
        torch=("torch==$version" "torchvision==$vision_version")
        dali=nvidia-dali-cuda130
        ;;
    *) fail "$CUDA_HOME is CUDA $cuda: expected 12.6 or 13.0, for which PyTorch $version is built" ;;
esac

python3 -m venv "$environment"
export PATH=$environment/bin:$PATH # ninja is installed there below
pip=("$environment/bin/python" -m pip --quiet)
# PyTorch and DALI require the packages of CUDA that match them.
constraints=$environment/constraints.txt
lock=tools/locks/$purpose-cuda$cuda.txt
if [[ -f $lock ]]; then
    cp "$lock" "$constraints"
else
    grep -vE '^(cuda|nvidia)-' requirements.lock >"$constraints"
fi
"${pip[@]}" install --constraint "$constraints" "${torch[@]}" "$dali==$(locked nvidia-dali-cuda130)" ninja setuptools
rm -rf build kernels/_C*.so # compiled elsewhere for another PyTorch
declare -A package=([training]=. [inference]='.[loadgen,export]')
"${pip[@]}" install --constraint "$constraints" --no-build-isolation --editable "${package[$purpose]}"
rm -rf build

if [[ $purpose == training ]]; then
    kept=$(mktemp -d)
    SSD_FAST_CACHE=$kept ./build_horovod.sh "$environment/bin/python"
    rm -rf "$kept"
    ./build_apex.sh "$environment/bin/python"
else # nothing is compiled in the inference image
    site=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    tag=$("$environment/bin/python" -c 'import sys; print(sys.implementation.cache_tag)')
    "${pip[@]}" uninstall --yes triton
    rm -rf "$site"/torch/include "$site"/nvidia/*/include
    rm -f "$site"/nvidia/*/lib/{libcusolverMg.so.*,*.alt.so.*} # no library here links them
    find "$site" \( -name '*.a' -o -name '*.cpython-*.so' ! -name "*.$tag-*" \) -delete
fi
"$environment/bin/python" -m pip list --format=freeze --exclude-editable --exclude pip >"$environment/installed.txt"
