#!/usr/bin/env bash
# Downloads COCO 2017. When sourced, it runs as a process of its own and leaves the caller's shell unchanged.
if [ "${BASH_SOURCE[0]:-}" != "$0" ]; then
    bash "${BASH_SOURCE[0]:-$0}" "$@" # in zsh, $0 is the sourced file
    return
fi
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "$0")/downloading.sh"

OFFICIAL='f4bbac642086de4f52a3fdda2de5fa2c 252907541 annotations/annotations_trainval2017.zip
442b8da7639aecaf257c1dceb8ba8c80 815585330 zips/val2017.zip
cced6f7f71b7629ddf16f17bbcfab6b2 19336861798 zips/train2017.zip'

usage() {
    cat <<END
usage: [source] download_dataset.sh [--train] [DIR]

Downloads COCO 2017 into DIR (default: coco). annotations/ and val2017/ are 1.1 GB to download; evaluation and the
benchmark need them. --train adds train2017/, 20.4 GB in all. An archive with the wrong MD5 is rejected and deleted, a
right one is deleted once it is unpacked; a folder appears only when it is complete. Archives that are already in DIR are
used. A repeated call resumes an interrupted download; a finished one exits at once.
When a script with arguments of its own sources this one, it must name DIR: bash passes the script's arguments on.

  SSD_FAST_COCO_URL        mirror, default http://images.cocodataset.org
  SSD_FAST_COCO_MANIFEST   file that lists the archives of the mirror, such as a subset of your own. Each line has MD5,
                           bytes, and path below the mirror. The archives hold the folders annotations, val2017 and
                           train2017, and have these names:
$OFFICIAL
END
}

folder='' archives=(annotations_trainval2017.zip val2017.zip)
while (($#)); do
    case $1 in
        -h | --help) usage && exit ;;
        --train) archives+=(train2017.zip) ;;
        -*) usage >&2 && exit 2 ;;
        *) [[ -z $folder ]] || { usage >&2 && exit 2; }; folder=$1 ;;
    esac
    shift
done
folder=$(realpath -m -- "${folder:-coco}")
url=${SSD_FAST_COCO_URL:-http://images.cocodataset.org}
manifest=$(read_manifest "${SSD_FAST_COCO_MANIFEST:-}" "$OFFICIAL" SSD_FAST_COCO_MANIFEST)

# Prints the name of the folder in the archive $1.
folder_of() { [[ $1 == annotations* ]] && echo annotations || echo "${1%.zip}"; }

count_files() { find "$1" -type f ! -name .archive | wc -l; }

# Succeeds when the folder $1 was unpacked from the archive with the MD5 $2, and returns 1 when there is no such folder.
# Any other content ends the script.
is_there() {
    local md5='' expected='' found
    [[ -e $1 ]] || return 1
    [[ ! -f $1/.archive ]] || read -r md5 expected <"$1/.archive"
    [[ $md5 == "$2" ]] || fail "$1: was not unpacked from the archive with the MD5 $2: move this folder away"
    found=$(count_files "$1")
    ((found == expected)) || fail "$1: expected $expected files, found $found: move this folder away"
}

# Unpacks the archive $1, which has the MD5 $2, into the folder $3.
unpack() {
    local name=${3##*/}
    mkdir -- "$work"
    if [[ -n $(command -v unzip) ]]; then
        unzip -q "$1" -d "$work" </dev/null
    else
        python3 -m zipfile -e "$1" "$work"
    fi || fail "$1: cannot be unpacked; only the archive was kept"
    [[ -d $work/$name ]] || fail "$1: expected the folder $name in it, found $(ls -- "$work")"
    echo "$2 $(count_files "$work/$name")" >"$work/$name/.archive"
    mv -T -- "$work/$name" "$3"
    rm -rf -- "$work" "$1"
}

enter "$folder"
work=$folder/.unpacking
trap 'rm -rf -- "$work"' EXIT
rm -rf -- "$work" # left by a process that was killed

# The disk must hold all unpacked folders and the largest archive, which is the last one.
missing=() unpacked=0 largest=0
for archive in "${archives[@]}"; do
    line=$(line_of "$archive" "$manifest" "${SSD_FAST_COCO_MANIFEST:-}")
    read -r md5 bytes _ <<<"$line"
    ! is_there "$folder/$(folder_of "$archive")" "$md5" || continue
    missing+=("$archive")
    # images do not shrink when zipped, and fill whole blocks of the disk; annotations are text
    [[ $archive == annotations* ]] && percent=350 || percent=103
    unpacked=$((unpacked + bytes * percent / 100))
    rest=$((bytes - $(size_of "$folder/$archive") - $(size_of "$folder/$archive.part")))
    ((rest <= largest)) || largest=$rest
done
if ((${#missing[@]})); then
    find_downloader
    [[ -n $(command -v unzip || command -v python3) ]] ||
        fail "neither unzip nor python3 is installed: one of them is needed"
    require_space "$folder" $((unpacked + largest))
fi
for archive in ${missing[@]+"${missing[@]}"}; do
    line=$(line_of "$archive" "$manifest" "${SSD_FAST_COCO_MANIFEST:-}")
    read -r md5 bytes path <<<"$line"
    fetch "$folder/$archive" "$url/$path" "$md5" "$bytes"
    unpack "$folder/$archive" "$md5" "$folder/$(folder_of "$archive")"
done
for archive in "${archives[@]}"; do
    name=$(folder_of "$archive")
    say "$folder/$name: $(count_files "$folder/$name") files"
done
