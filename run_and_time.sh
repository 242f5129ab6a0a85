#!/usr/bin/env bash
# Runs the inference benchmark on COCO's val2017, and reports whether it reaches the target mAP.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

usage() {
    cat <<END
usage: run_and_time.sh [SEED] [TARGET] [OPTION...]

Evaluates the detector at 1200x1200 on the GPU, or on the CPU where there is none. It prints where the time went, COCO's
twelve numbers, and whether the mAP reaches TARGET (default: 0.20). OPTIONs go to ssd-fast evaluate, such as
--only-annotated or --set training.precision=fp16. A copy of the output goes to run.log.SEED (default: 1). SEED is only a
name, as nothing in an evaluation is random.

  DATASET_DIR   folder in COCO's layout; default coco
  CHECKPOINT    weights; default pretrained/resnet34-ssd1200.pytorch, or the .pth of the same name
  CONFIG        recipe; default configs/ssd1200.toml beside this script; empty for the checkpoint's own
  BATCH_SIZE    number of images in a batch; default the recipe's

Exit status: 0 if the target is reached, 1 if it is not, 2 for an error.
END
}

fail() {
    echo "run_and_time.sh: $*" >&2
    exit 2
}

[[ ${1:-} != -h && ${1:-} != --help ]] || { usage && exit; }
seed=${1:-1} target=${2:-0.20}
shift $(($# < 2 ? $# : 2))
[[ $seed =~ ^[0-9]+$ ]] || fail "SEED = $seed: expected a whole number"
[[ $target =~ ^-?[0-9]*\.?[0-9]+$ ]] || fail "TARGET = $target: expected a COCO mAP from 0 to 1"

data=${DATASET_DIR:-coco}
checkpoint=${CHECKPOINT:-pretrained/resnet34-ssd1200.pytorch}
[[ -n ${CHECKPOINT:-} || -e $checkpoint || ! -e ${checkpoint%.pytorch}.pth ]] || checkpoint=${checkpoint%.pytorch}.pth
config=${CONFIG-$here/configs/ssd1200.toml}
[[ -d $data ]] || fail "$data: no such folder: expected COCO (./download_dataset.sh), or DATASET_DIR to name it"
[[ -f $checkpoint ]] || fail "$checkpoint: no such file: expected weights (./download_model.sh), or CHECKPOINT to name them"

ssd_fast=$here/.venv/bin/ssd-fast
[[ -x $ssd_fast ]] || ssd_fast=$(command -v ssd-fast) || fail "ssd-fast is not installed: run make install"
log=run.log.$seed
: >"$log" || fail "$PWD/$log: cannot be written"

arguments=(--checkpoint "$checkpoint" --data "$data" --timing "--target=$target")
[[ -z $config ]] || arguments+=(--config "$config")
[[ -z ${BATCH_SIZE:-} ]] || arguments+=(--set "evaluation.batch_size=$BATCH_SIZE")
set +e
"$ssd_fast" evaluate "${arguments[@]}" "$@" | tee "$log"
statuses="${PIPESTATUS[*]}"
case $statuses in
    "0 0") exit 0 ;;
    "3 0") exit 1 ;;
    *) exit 2 ;;
esac
