#!/usr/bin/env bash
# Builds the training image for Apptainer or Singularity.
set -euo pipefail

usage() {
    cat <<END
usage: build_container.sh [--cuda 12.6|13.0] [IMAGE]

Builds Singularity.def into IMAGE (default: ssd_fast-cuda12.6.sif in this folder) with Apptainer or Singularity. CUDA
12.6, the default, serves GPUs from Volta (V100, C4140) to Hopper; 13.0 serves Turing and everything after it.
END
}

fail() {
    echo "build_container.sh: $*" >&2
    exit 1
}

cuda=12.6 image=''
while (($#)); do
    case $1 in
        -h | --help) usage && exit ;;
        --cuda) cuda=${2:-} && shift ;;
        --cuda=*) cuda=${1#*=} ;;
        -*) usage >&2 && exit 2 ;;
        *) [[ -z $image ]] || { usage >&2 && exit 2; }; image=$1 ;;
    esac
    shift || break
done
case $cuda in
    12.6) base=nvidia/cuda:12.6.3-devel-ubuntu24.04 ;;
    13.0) base=nvidia/cuda:13.0.2-devel-ubuntu24.04 ;;
    *) fail "--cuda $cuda: expected 12.6 or 13.0" ;;
esac
image=$(realpath -m "${image:-ssd_fast-cuda$cuda.sif}")
[[ ! -e $image ]] || fail "$image exists: remove it, or name another image"
builder=$(command -v apptainer || command -v singularity) || fail "neither apptainer nor singularity is installed"

cd "$(dirname "$0")" # the definition names its files relative to this folder
definition=$(mktemp)
trap 'rm -f "$definition"' EXIT
commit=$(git describe --always --abbrev=40 --dirty --exclude '*' 2>/dev/null) || commit=unknown
sed "s|^From: .*|From: $base|; s|revision unknown|revision $commit|" Singularity.def >"$definition"
fakeroot=()
((EUID == 0)) || fakeroot=(--fakeroot)
"$builder" build "${fakeroot[@]}" "$image" "$definition"
