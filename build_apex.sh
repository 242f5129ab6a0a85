#!/usr/bin/env bash
# Builds the two extensions of NVIDIA's apex that the training can use, and installs apex with them.
set -euo pipefail

COMMIT=4bdecd06b3c4b2c0a8fb6603829a8f9f05a42b49 # tag 25.09
REPOSITORY=https://github.com/NVIDIA/apex
here=$(dirname "$(readlink -f "$0")")

usage() {
    cat <<END
usage: build_apex.sh [PYTHON]

Installs NVIDIA's apex for PYTHON (default: .venv/bin/python) with the kernels of FusedSGD (amp_C) and of groupbn (bnp),
for optimizer.implementation = "apex" and distributed.batch_norm_group. Its other extensions are left out: not all of them
compile with CUDA 13, and none is used. Needs git, g++ and a CUDA toolkit of PyTorch's version; no GPU.

  CUDA_HOME              CUDA toolkit; default /usr/local/cuda, or the one of the nvcc on the path
  TORCH_CUDA_ARCH_LIST   GPUs to compile for; default all that this project supports with that CUDA
  MAX_JOBS               number of compilers at a time, default one per core
END
}

fail() {
    echo "build_apex.sh: $*" >&2
    exit 1
}

case ${1:-} in
    -h | --help) usage && exit ;;
    -*) usage >&2 && exit 2 ;;
esac
python=${1:-$here/.venv/bin/python}
facts='import sysconfig, torch; print(torch.version.cuda or "-", sysconfig.get_path("purelib"))'
facts=$("$python" -c "$facts") || fail "$python: expected a Python with PyTorch (make install)"
read -r cuda site <<<"$facts"
found=$("$python" "$here/cuda_toolkit.py" find "${cuda#-}")
mapfile -t found <<<"$found"
[[ -n ${found[0]} ]] || fail "${found[3]}"
command -v git >/dev/null || fail "git is missing: install it (Debian: apt-get install git)"
export CUDA_HOME=${found[0]} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-${found[2]}}
PATH=$(dirname "$(realpath -s "$python")"):$PATH # for ninja

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git init --quiet "$work/apex"
cd "$work/apex"
git fetch --quiet --depth 1 "$REPOSITORY" "$COMMIT" ||
    fail "$REPOSITORY cannot be read: with a clone, git config --global url.file:///CLONE.insteadOf $REPOSITORY"
git checkout --quiet FETCH_HEAD
# Headers of cuDNN, cuBLAS and more, which a toolkit may lack, come with PyTorch.
CPATH=$(printf '%s:' "$site"/nvidia/*/include)${CPATH:-}
export CPATH
log=$work/log
if ! APEX_CUDA_EXT=1 APEX_BNP=1 "$python" - bdist_wheel --dist-dir "$work" &>"$log" <<'END'; then
import runpy
import setuptools

USED = {"amp_C", "bnp"}
setup = setuptools.setup


def setup_used(*, ext_modules, **options):
    used = [module for module in ext_modules if module.name in USED]
    assert {module.name for module in used} == USED, [module.name for module in ext_modules]
    setup(ext_modules=used, **options)


setuptools.setup = setup_used
runpy.run_path("setup.py", run_name="__main__")
END
    tail -n 40 "$log" >&2
    fail "apex did not compile"
fi
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "$work"/apex-*.whl
"$python" -c 'import torch, amp_C, bnp; assert amp_C.multi_tensor_sgd and bnp.bn_fwd_nhwc'
echo "apex ${COMMIT::8} for CUDA $cuda, $TORCH_CUDA_ARCH_LIST: FusedSGD, groupbn"
