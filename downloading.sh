# shellcheck shell=bash
# Functions that download_dataset.sh and download_model.sh share; they source this file.
#
# A manifest lists the files of a server, one per line: MD5, size in bytes, and path below the server's base URL.

program=${0##*/}

say() { echo "$program: $*"; }

fail() {
    echo "$program: $*" >&2
    exit 1
}

size_of() { stat -c %s -- "$1" 2>/dev/null || echo 0; }

md5_of() { md5sum <"$1" | cut -c -32; }

in_mb() { echo "$((($1 + 999999) / 1000000)) MB"; }

# Prints the manifest in the file $1, or $2 where $1 is empty. $3 is the variable that names the file.
read_manifest() {
    if [[ -z $1 ]]; then
        echo "$2"
    else
        cat -- "$1" || fail "$3: expected a file that can be read, found '$1'"
    fi
}

# Prints the line for the file named $1 from the manifest $2. $3 names the manifest in errors.
line_of() {
    local found
    found=$(awk -v name="$1" '{ n = split($3, parts, "/") } parts[n] == name { print; exit }' <<<"$2")
    [[ $found =~ ^[0-9a-f]{32}\ +[0-9]+\ +[^\ ]+$ ]] ||
        fail "$3: expected a line 'MD5 BYTES PATH' for $1, found '$found'"
    echo "$found"
}

# Sets downloader to the path of curl or wget.
find_downloader() {
    downloader=$(command -v curl || command -v wget) || fail "neither curl nor wget is installed: one of them is needed"
}

# Creates the folder $1, and locks it until this process ends.
enter() {
    mkdir -p -- "$1"
    exec {lock}<"$1"
    flock --nonblock "$lock" || fail "$1: another download into this folder is running"
}

# Fails unless the folder $1 has room for $2 bytes.
require_space() {
    local free
    free=$(df -B1 --output=avail -- "$1" | tail -n 1)
    ((free >= $2)) || fail "$1: expected $(in_mb "$2") of free disk space, found $(in_mb "$free")"
}

# Prints the answer of the URL $1.
ask() {
    if [[ $downloader == *curl ]]; then
        curl --silent --show-error --fail --location --max-time 60 "$1"
    else
        wget --no-verbose --tries=1 --timeout=60 --output-document - "$1"
    fi
}

# Continues the file $2 from the URL $1. A connection that stays silent for a minute is closed.
transfer() {
    local quiet=()
    if [[ $downloader == *curl ]]; then
        [[ -t 2 ]] && quiet=(--progress-bar) || quiet=(--silent --show-error)
        curl "${quiet[@]}" --fail --location --connect-timeout 60 --speed-limit 1 --speed-time 60 \
            --continue-at - --output "$2" "$1"
    else
        [[ -t 2 ]] && quiet=(--quiet --show-progress) || quiet=(--no-verbose)
        wget "${quiet[@]}" --tries=1 --timeout=60 --continue --output-document "$2" "$1"
    fi
}

# Downloads the file $1, with the MD5 $3 and $4 bytes, from the URL $2. It grows as $1.part, which the next try and the
# next call continue, and gets its name when it is complete. A complete file with the wrong MD5 is deleted.
fetch() {
    local file=$1 url=$2 md5=$3 bytes=$4 part=$1.part before status try is_fresh=0
    if [[ -e $file ]]; then
        [[ $(md5_of "$file") == "$md5" ]] || fail "$file: expected the MD5 $md5: move this file away"
        return
    fi
    (($(size_of "$part") <= bytes)) || rm -f -- "$part"
    [[ -s $part ]] || is_fresh=1
    say "$url ($(in_mb "$bytes"))"
    for try in {1..100}; do
        before=$(size_of "$part")
        status=0
        ((before == bytes)) || transfer "$url" "$part" || status=$?
        if ((status == 0)); then
            if [[ $(md5_of "$part") == "$md5" ]]; then
                mv -- "$part" "$file"
                return
            fi
            rm -f -- "$part"
            ((!is_fresh)) || fail "$url: expected the MD5 $md5, got another file; it was deleted"
            is_fresh=1
            say "$part belongs to another file: starting again"
        elif [[ $downloader == *curl ]] && ((status == 33)); then # this server cannot resume
            rm -f -- "$part"
            is_fresh=1
        elif (($(size_of "$part") > before)); then
            say "interrupted after $(in_mb "$(size_of "$part")"): resuming"
        else
            break
        fi
    done
    [[ -s $part ]] || rm -f -- "$part"
    fail "$url: the download failed at try $try (${downloader##*/}: status $status); repeat the call to resume"
}
