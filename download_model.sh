#!/usr/bin/env bash
# Downloads published weights. When sourced, it runs as a process of its own and leaves the caller's shell unchanged.
if [ "${BASH_SOURCE[0]:-}" != "$0" ]; then
    bash "${BASH_SOURCE[0]:-$0}" "$@" # in zsh, $0 is the sourced file
    return
fi
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "$0")/downloading.sh"

RECORD=3236545
NAME=resnet34-ssd1200.pytorch

usage() {
    cat <<END
usage: [source] download_model.sh [DIR]

Downloads the weights of MLPerf Inference's detector at 1200x1200 into DIR (default: pretrained). The file is
$NAME of Zenodo's record $RECORD, about 80 MB; a file whose MD5 differs from the one in that record is
rejected and deleted. It is a pickled module: ssd-fast reads its weights and runs none of its code. A repeated call
resumes an interrupted download; a finished one exits at once.
When a script with arguments of its own sources this one, it must name DIR: bash passes the script's arguments on.

  SSD_FAST_MODEL_URL        mirror, default https://zenodo.org
  SSD_FAST_MODEL_MANIFEST   file that replaces Zenodo's record, with MD5, bytes, and path below the mirror:
                            0123456789abcdef0123456789abcdef 80000000 records/$RECORD/files/$NAME
END
}

case ${1:-} in
    -h | --help) usage && exit ;;
    -*) usage >&2 && exit 2 ;;
esac
(($# <= 1)) || { usage >&2 && exit 2; }
folder=$(realpath -m -- "${1:-pretrained}")
url=${SSD_FAST_MODEL_URL:-https://zenodo.org}

# Prints Zenodo's record as a manifest.
ask_zenodo() {
    local answer
    [[ -n $(command -v python3) ]] || fail "python3 is not installed: it is needed to read Zenodo's record"
    { answer=$(ask "$record") && python3 -c '
import json, sys
for file in json.loads(sys.argv[2])["files"]:
    print(file["checksum"].removeprefix("md5:"), file["size"], f"records/{sys.argv[1]}/files/" + file["key"])
' "$RECORD" "$answer" 2>/dev/null; } || fail "$record: cannot be read; SSD_FAST_MODEL_MANIFEST can replace it"
}

record=$url/api/records/$RECORD
manifest=$(read_manifest "${SSD_FAST_MODEL_MANIFEST:-}" '' SSD_FAST_MODEL_MANIFEST)
enter "$folder"
file=$folder/$NAME
if [[ -n $manifest || ! -e $file || ! -e $file.md5 || $(md5_of "$file") != "$(cut -c -32 "$file.md5")" ]]; then
    find_downloader
    [[ -n $manifest ]] || manifest=$(ask_zenodo)
    line=$(line_of "$NAME" "$manifest" "${SSD_FAST_MODEL_MANIFEST:-$record}")
    read -r md5 bytes path <<<"$line"
    [[ -e $file ]] || require_space "$folder" $((bytes - $(size_of "$file.part")))
    fetch "$file" "$url/$path" "$md5" "$bytes"
    echo "$md5  $NAME" >"$file.md5"
fi
say "$file: MD5 $(cut -c -32 "$file.md5")"
