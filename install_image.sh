#!/usr/bin/env bash
# What the training image (Singularity.def) and the inference image (Dockerfile) have in common.
set -euo pipefail

APEX_COMMIT=4bdecd06b3c4b2c0a8fb6603829a8f9f05a42b49 # tag 25.09

usage() {
    cat <<END
usage: install_image.sh inference|training FOLDER

Makes in FOLDER a Python environment with PyTorch, DALI and ssd_fast with its CUDA operators, for the CUDA toolkit in
CUDA_HOME (default /usr/local/cuda): 12.6, which still serves Volta, or 13.0. For inference also LoadGen and ONNX; for
training Horovod with NCCL, and apex. Versions are those of requirements.lock. Needs g++ and make, and git for training; no GPU.
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

export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} SSD_FAST_CUDA=1 PIP_DISABLE_PIP_VERSION_CHECK=1
cuda=$("$CUDA_HOME/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p') || fail "no CUDA toolkit in $CUDA_HOME"
version=$(locked torch) vision_version=$(locked torchvision)
case $cuda in
    12.6)
        torch=("torch==$version+cu126" "torchvision==$vision_version+cu126")
        torch+=(--extra-index-url https://download.pytorch.org/whl/cu126)
        dali=nvidia-dali-cuda120
        export TORCH_CUDA_ARCH_LIST='7.0;8.0;9.0+PTX'
        ;;
    13.0)
        torch=("torch==$version" "torchvision==$vision_version")
        dali=nvidia-dali-cuda130
        export TORCH_CUDA_ARCH_LIST='7.5;8.0;9.0+PTX'
        ;;
    *) fail "$CUDA_HOME is CUDA $cuda: expected 12.6 or 13.0, for which PyTorch $version is built" ;;
esac

python3 -m venv "$environment"
export PATH=$environment/bin:$PATH # ninja will be there
pip=("$environment/bin/python" -m pip --quiet)
# PyTorch and DALI say which of CUDA's own packages go with them
constraints=$environment/constraints.txt
grep -vE '^(cuda|nvidia)-' requirements.lock >"$constraints"
"${pip[@]}" install --constraint "$constraints" "${torch[@]}" "$dali==$(locked nvidia-dali-cuda130)" ninja setuptools
rm -rf build kernels/_C*.so # compiled elsewhere, for another PyTorch
declare -A package=([training]=. [inference]='.[loadgen,export]')
"${pip[@]}" install --constraint "$constraints" --no-build-isolation --editable "${package[$purpose]}"
rm -rf build

if [[ $purpose == training ]]; then
    kept=$(mktemp -d)
    SSD_FAST_CACHE=$kept ./build_horovod.sh "$environment/bin/python"
    rm -rf "$kept"
    CUDNN_HOME=$("$environment/bin/python" -c 'import nvidia.cudnn; print(*nvidia.cudnn.__path__)') # its headers
    export CUDNN_HOME
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_BNP=1 "${pip[@]}" install --no-build-isolation \
        "apex @ git+https://github.com/NVIDIA/apex@$APEX_COMMIT"
fi
