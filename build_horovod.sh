#!/usr/bin/env bash
# Builds Horovod from its source on PyPI against the PyTorch of an environment, and installs it there.
set -euo pipefail

VERSION=0.28.1
SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
CMAKE_VERSION=3.31.6
REQUIREMENTS=(cffi cloudpickle packaging psutil pyyaml) # Horovod's own; its setup.py wants them for the build, too

usage() {
    cat <<END
usage: build_horovod.sh [PYTHON]

Builds Horovod $VERSION against the PyTorch that PYTHON has (default: .venv/bin/python), and installs it there. Always
with Gloo; with NCCL where the NCCL wheel of that PyTorch and a CUDA toolkit of its version are. The wheel is kept, by
versions: the next time takes seconds. Needs g++ and make; no MPI.

  SSD_FAST_CUDA    1: a build without NCCL is an error; 0: leave CUDA out
  CUDA_HOME        the toolkit, if not /usr/local/cuda or that of nvcc
  SSD_FAST_CACHE   where wheels are kept, default ${XDG_CACHE_HOME:-~/.cache}/ssd_fast
  MAX_JOBS         compilers at work, default one per core
END
}

fail() {
    echo "build_horovod.sh: $*" >&2
    exit 1
}

# Sets toolkit, or reason: why there is none.
find_toolkit() {
    local home version of_nvcc=''
    if command -v nvcc >/dev/null; then
        of_nvcc=$(readlink -f "$(command -v nvcc)")
    fi
    for home in "${CUDA_HOME:-}" /usr/local/cuda "${of_nvcc%/bin/nvcc}"; do
        if [[ -n $home && -x $home/bin/nvcc && -f $home/include/cuda_runtime.h ]]; then
            version=$("$home/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
            if [[ ${version%%.*} == "${cuda%%.*}" ]]; then
                toolkit=$home
            else
                reason="$home is CUDA ${version:-unknown}, PyTorch was built with $cuda; set CUDA_HOME"
            fi
            return
        fi
    done
    reason="no CUDA $cuda toolkit found; install one, or set CUDA_HOME"
}

# Makes $wheels/*.whl.
build() {
    local work log=$wheels.log
    for tool in "${CXX:-g++}" make; do
        command -v "$tool" >/dev/null || fail "$tool is missing: install it (Debian: apt-get install g++ make)"
    done
    work=$(mktemp -d)
    # shellcheck disable=SC2064 # the path of now
    trap "rm -rf '$work'" EXIT
    mkdir -p "$wheels"
    echo "building Horovod $VERSION, which takes minutes; log: $log"
    "${pip[@]}" install --quiet --target "$work/cmake" "cmake==$CMAKE_VERSION"
    "${pip[@]}" download --quiet --no-deps --no-binary horovod --no-build-isolation --dest "$work" \
        --require-hashes --requirement <(echo "horovod==$VERSION --hash=sha256:$SHA256")
    tar -xzf "$work/horovod-$VERSION.tar.gz" -C "$work"

    # PyTorch's headers need C++17. Without RPATH, the library finds the libraries that `import torch` has loaded, and
    # does not look into this build's folders. Debug information would double the time of compilation.
    # What is for the C++ ABI of before 2015 is not used.
    local source=$work/horovod-$VERSION
    sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 17)/' \
        "$source/CMakeLists.txt" "$source/horovod/torch/CMakeLists.txt"
    sed -i -e '/^project(/a set(CMAKE_SKIP_RPATH ON)' -e 's/"-O2" "-O3"/"-O2 -g" "-O3"/' "$source/CMakeLists.txt"
    sed -i 's/add_library(compatible_horovod_cuda_kernels/& EXCLUDE_FROM_ALL/' \
        "$source/horovod/common/ops/cuda/CMakeLists.txt"

    export HOROVOD_CMAKE=$work/cmake/cmake/data/bin/cmake MAKEFLAGS="-j${MAX_JOBS:-$(nproc)}"
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=1
    export HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITHOUT_MPI=1
    if [[ -n $toolkit ]]; then
        mkdir "$work/nccl" # the NCCL wheel lacks the name that linkers look for
        ln -s "$nccl"/lib/libnccl.so.* "$work/nccl/libnccl.so"
        export CUDA_HOME=$toolkit HOROVOD_CUDA_HOME=$toolkit CUDACXX=$toolkit/bin/nvcc PATH=$toolkit/bin:$PATH
        export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED
        export HOROVOD_NCCL_INCLUDE=$nccl/include HOROVOD_NCCL_LIB=$work/nccl
        # its few kernels copy and scale; PTX for the last serves what comes after
        case ${cuda%%.*} in
            12) export HOROVOD_BUILD_CUDA_CC_LIST=70,80,90 ;;
            *) export HOROVOD_BUILD_CUDA_CC_LIST=75,80,90 ;;
        esac
    else
        export HOROVOD_WITHOUT_NVTX=1
        sed -i 's/CUDA_HOME is not None/False/' "$source/cmake/Modules/FindPytorch.cmake"
    fi
    if ! "${pip[@]}" wheel --no-deps --no-build-isolation --wheel-dir "$work" --verbose "$source" &>"$log"; then
        tail -n 40 "$log" >&2
        fail "the build failed; all of its output: $log"
    fi
    cp "$work"/horovod-*.whl "$wheels/part" # a wheel is there as a whole or not at all
    mv "$wheels/part" "$wheels/$(basename "$work"/horovod-*.whl)"
}

case ${1:-} in
    -h | --help) usage && exit ;;
    -*) usage >&2 && exit 2 ;;
esac
python=${1:-$(dirname "$0")/.venv/bin/python}
facts='
import importlib.util, sys, torch
nccl = importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
print(tag, torch.__version__, torch.version.cuda or "-", nccl.submodule_search_locations[0] if nccl else "-")
'
facts=$("$python" -c "$facts") || fail "$python: expected a Python with PyTorch (make install)"
read -r tag torch cuda nccl <<<"$facts"
pip=("$python" -m pip --disable-pip-version-check)

toolkit='' reason=''
if [[ ${SSD_FAST_CUDA:-} == 0 ]]; then
    reason="SSD_FAST_CUDA=0"
elif [[ $cuda == - ]]; then
    reason="this PyTorch was built without CUDA"
elif [[ ! -f $nccl/include/nccl.h ]]; then
    reason="no NCCL wheel: pip install nvidia-nccl-cu${cuda%%.*}"
else
    find_toolkit
fi
if [[ -z $toolkit && ${SSD_FAST_CUDA:-} == 1 ]]; then
    fail "SSD_FAST_CUDA=1, but $reason"
fi

variant=cpu
if [[ -n $toolkit ]]; then
    variant=nccl$(sed -nE 's/^#define NCCL_(MAJOR|MINOR|PATCH) +([0-9]+).*/\2/p' "$nccl/include/nccl.h" | paste -sd .)
fi
wheels=${SSD_FAST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ssd_fast}/horovod-$VERSION-$tag-torch$torch-$variant
"${pip[@]}" install --quiet --constraint "$(dirname "$0")/requirements.lock" "${REQUIREMENTS[@]}"
compgen -G "$wheels/*.whl" >/dev/null || build
"${pip[@]}" install --quiet --no-deps --force-reinstall "$wheels"/*.whl

# asked of the library itself
built=$("$python" -c '
import horovod.torch as hvd
code = hvd.nccl_built()
nccl = f"NCCL {code // 10000}.{code // 100 % 100}.{code % 100}" if code else ""
print(", ".join(filter(None, ["Gloo" * hvd.gloo_built(), nccl, "CUDA" * hvd.cuda_built(), "MPI" * hvd.mpi_built()])))
')
[[ $built == *Gloo* && ( -z $toolkit || $built == *NCCL*CUDA* ) ]] ||
    fail "the library holds only: $built; remove $wheels, and see $wheels.log"
echo "Horovod $VERSION for PyTorch $torch, $tag: $built${reason:+; without NCCL: $reason} ($(ls "$wheels"/*.whl))"
