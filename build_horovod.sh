#!/usr/bin/env bash
# Builds Horovod from its source on PyPI against the PyTorch of an environment, and installs it there.
set -euo pipefail

VERSION=0.28.1
CHANGES=5 # version of the changes that build() makes to the source; part of the cached wheel's folder
SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
CMAKE_VERSION=3.31.6
REQUIREMENTS=(cffi cloudpickle packaging psutil pyyaml) # Horovod's own, which its setup.py needs, too
here=$(dirname "$(readlink -f "$0")")

usage() {
    cat <<END
usage: build_horovod.sh [PYTHON]

Builds Horovod $VERSION against the PyTorch of PYTHON (default: .venv/bin/python), and installs it there. It has Gloo;
it also has NCCL where the NCCL wheel of that PyTorch and a CUDA toolkit of its version are present. The wheel is cached
by version, so that the next call takes seconds. Needs g++ and make; no MPI.

  SSD_FAST_CUDA    1: fail rather than build without NCCL; 0: leave CUDA out
  CUDA_HOME        CUDA toolkit; default /usr/local/cuda, or the one of the nvcc on the path
  SSD_FAST_CACHE   folder for wheels, default ${XDG_CACHE_HOME:-~/.cache}/ssd_fast
  MAX_JOBS         number of compilers at a time, default one per core
END
}

fail() {
    echo "build_horovod.sh: $*" >&2
    exit 1
}

# Builds the wheel in the folder $wheels.
build() {
    local work log=$wheels.log
    for tool in "${CXX:-g++}" make; do
        command -v "$tool" >/dev/null || fail "$tool is missing: install it (Debian: apt-get install g++ make)"
    done
    work=$(mktemp -d)
    # shellcheck disable=SC2064 # expand the path now
    trap "rm -rf '$work'" EXIT
    mkdir -p "$wheels"
    echo "building Horovod $VERSION takes minutes; log: $log"
    "${pip[@]}" install --quiet --target "$work/cmake" "cmake==$CMAKE_VERSION"
    "${pip[@]}" download --quiet --no-deps --no-binary horovod --no-build-isolation --dest "$work" \
        --require-hashes --requirement <(echo "horovod==$VERSION --hash=sha256:$SHA256")
    tar -xzf "$work/horovod-$VERSION.tar.gz" -C "$work"

    # The headers of PyTorch 2.14 need C++20, which those of 2.11 accept. Without RPATH, the library uses the libraries
    # that `import torch` has loaded instead of looking into this build's folders. Debug information would double the
    # compile time. The kernels for the C++ ABI from before 2015 are not used.
    local source=$work/horovod-$VERSION
    sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 20)/' \
        "$source/CMakeLists.txt" "$source/horovod/torch/CMakeLists.txt"
    # HOROVOD_GLOO_IFACE: Horovod forgets the interface where it connects the ranks for their collectives, and takes the
    # one of the host's name.
    sed -i '/::InitializeForProcessSet/,/CreateDevice/s/= gloo_iface_;/= global_context.gloo_iface_;/' \
        "$source/horovod/common/gloo/gloo_context.cc"
    grep -q 'iface = global_context.gloo_iface_;' "$source/horovod/common/gloo/gloo_context.cc"
    # The rendezvous server: of more than 5 ranks that ask at once, the others wait for a second or more to ask again.
    sed -i '/^class RendezvousHTTPServer(/a \    request_queue_size = 1024\n' "$source/horovod/runner/http/http_server.py"
    grep -q 'request_queue_size = 1024' "$source/horovod/runner/http/http_server.py"
    # A rank that is lost while the others connect to it: Horovod aborts them, without a word on which one it was.
    sed -i '/std::thread(BackgroundThreadLoop, std::ref(horovod_global))/c\
        std::thread([] {\
          try {\
            BackgroundThreadLoop(horovod_global);\
          } catch (const std::exception\& error) {\
            LOG(ERROR) << "Horovod background thread: " << error.what();\
            horovod_global.initialization_failed = true;\
          }\
        });' "$source/horovod/common/operations.cc"
    grep -q 'Horovod background thread: ' "$source/horovod/common/operations.cc"
    # A lost rank: the thread that drops the waiting gradients holds Horovod's locks and needs Python's. The thread that
    # adds a gradient holds Python's and needs Horovod's. They wait for ever, unless it releases Python's.
    sed -i 's/\(&Do[A-Za-z]*\));/\1, py::call_guard<py::gil_scoped_release>());/' "$source/horovod/torch/mpi_ops_v2.cc"
    grep -q '&DoGroupedAllreduce, py::call_guard' "$source/horovod/torch/mpi_ops_v2.cc"
    sed -i -e '/^project(/a set(CMAKE_SKIP_RPATH ON)' -e 's/"-O2" "-O3"/"-O2 -g" "-O3"/' "$source/CMakeLists.txt"
    sed -i 's/add_library(compatible_horovod_cuda_kernels/& EXCLUDE_FROM_ALL/' \
        "$source/horovod/common/ops/cuda/CMakeLists.txt"

    export HOROVOD_CMAKE=$work/cmake/cmake/data/bin/cmake MAKEFLAGS="-j${MAX_JOBS:-$(nproc)}"
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=1
    export HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITHOUT_MPI=1
    if [[ -n $toolkit ]]; then
        mkdir "$work/nccl" # the NCCL wheel lacks the name that a linker looks for
        ln -s "$nccl"/lib/libnccl.so.* "$work/nccl/libnccl.so"
        export CUDA_HOME=$toolkit HOROVOD_CUDA_HOME=$toolkit CUDACXX=$toolkit/bin/nvcc PATH=$toolkit/bin:$PATH
        export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED
        export HOROVOD_NCCL_INCLUDE=$nccl/include HOROVOD_NCCL_LIB=$work/nccl
        # "7.5;8.0;9.0+PTX" as "75,80,90": Horovod always adds PTX for the last one
        HOROVOD_BUILD_CUDA_CC_LIST=$(sed 's/+PTX//; s/\.//g; s/;/,/g' <<<"$architectures")
        export HOROVOD_BUILD_CUDA_CC_LIST
    else
        export HOROVOD_WITHOUT_NVTX=1
        sed -i 's/CUDA_HOME is not None/False/' "$source/cmake/Modules/FindPytorch.cmake"
    fi
    if ! "${pip[@]}" wheel --no-deps --no-build-isolation --wheel-dir "$work" --verbose "$source" &>"$log"; then
        tail -n 40 "$log" >&2
        fail "the build failed; its full output is $log"
    fi
    cp "$work"/horovod-*.whl "$wheels/part" # the wheel appears only when it is complete
    mv "$wheels/part" "$wheels/$(basename "$work"/horovod-*.whl)"
}

case ${1:-} in
    -h | --help) usage && exit ;;
    -*) usage >&2 && exit 2 ;;
esac
python=${1:-$here/.venv/bin/python}
facts='
import importlib.util, sys, torch
nccl = importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
print(tag, torch.__version__, torch.version.cuda or "-", nccl.submodule_search_locations[0] if nccl else "-")
'
facts=$("$python" -c "$facts") || fail "$python: expected a Python with PyTorch (make install)"
read -r tag torch cuda nccl <<<"$facts"
pip=("$python" -m pip --disable-pip-version-check)

found=$("$python" "$here/cuda_toolkit.py" find "${cuda#-}")
mapfile -t found <<<"$found"
toolkit=${found[0]} architectures=${found[2]} reason=${found[3]:-}
if [[ -n $toolkit && ! -f $nccl/include/nccl.h ]]; then
    toolkit='' reason="no NCCL wheel: pip install nvidia-nccl-cu${cuda%%.*}"
fi
if [[ -z $toolkit && ${SSD_FAST_CUDA:-} == 1 ]]; then
    fail "SSD_FAST_CUDA=1, but $reason"
fi

variant=cpu
if [[ -n $toolkit ]]; then
    variant=nccl$(sed -nE 's/^#define NCCL_(MAJOR|MINOR|PATCH) +([0-9]+).*/\2/p' "$nccl/include/nccl.h" | paste -sd .)
fi
wheels=${SSD_FAST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ssd_fast}/horovod-$VERSION-$CHANGES-$tag-torch$torch-$variant
"${pip[@]}" install --quiet --constraint "$here/requirements.lock" "${REQUIREMENTS[@]}"
compgen -G "$wheels/*.whl" >/dev/null || build
"${pip[@]}" install --quiet --no-deps --force-reinstall "$wheels"/*.whl

# What the library itself says it was built with
built=$("$python" -c '
import horovod.torch as hvd
code = hvd.nccl_built()
nccl = f"NCCL {code // 10000}.{code // 100 % 100}.{code % 100}" if code else ""
print(", ".join(filter(None, ["Gloo" * hvd.gloo_built(), nccl, "CUDA" * hvd.cuda_built(), "MPI" * hvd.mpi_built()])))
')
[[ $built == *Gloo* && ( -z $toolkit || $built == *NCCL*CUDA* ) ]] ||
    fail "the library was built with $built only: see $wheels.log, and remove $wheels"
echo "Horovod $VERSION for PyTorch $torch, $tag: $built${reason:+; without NCCL: $reason} ($(ls "$wheels"/*.whl))"
