#!/usr/bin/env bash
# Stands in for Apptainer: `apptainer.sh exec [--nv] [--bind FROM[:TO[:ro]]]... IMAGE COMMAND...` runs a command in IMAGE,
# a folder, by chroot; / is the host itself. As with --contain, it sees nothing of the host but its devices, processes
# and what is bound.
#   HIDDEN   folders of IMAGE that are empty within it
set -euo pipefail
[[ -n ${IN_OWN_MOUNTS:-} ]] || exec env IN_OWN_MOUNTS=1 unshare --mount --propagation slave "$0" "$@"
unset IN_OWN_MOUNTS

shift # exec
binds=()
while [[ $1 == --* ]]; do
    [[ $1 != --bind ]] || { binds+=("$2") && shift; }
    shift
done
image=$1 root=/mnt/root
shift

for bind in "${binds[@]}"; do
    [[ -e ${bind%%:*} ]] || { echo "FATAL: mount ${bind%%:*}: no such file or directory" >&2 && exit 255; }
done
mount -t tmpfs tmpfs /mnt # in these mounts alone
mkdir /mnt/{upper,work,root,host}
mount --rbind / /mnt/host # what is hidden can still be bound
if [[ $image == / ]]; then
    mount --rbind / $root
else
    mount -t overlay -o "lowerdir=$image,upperdir=/mnt/upper,workdir=/mnt/work" overlay $root
fi
for hidden in ${HIDDEN:-}; do
    mount -t tmpfs tmpfs "$root$hidden"
done
for bind in /dev /proc /sys /etc/hosts "${binds[@]}"; do
    IFS=: read -r from to mode <<<"$bind"
    to=$root${to:-$from}
    mkdir -p "$(dirname "$to")"
    if [[ -d $from ]]; then mkdir -p "$to"; else touch "$to"; fi
    mount --rbind "/mnt/host$from" "$to"
    [[ $mode != ro ]] || mount -o remount,bind,ro "$to"
done
# shellcheck disable=SC2016 # for the shell within
exec chroot $root /bin/sh -c '
    cd "$0" 2>/dev/null || cd /
    for settings in /.singularity.d/env/*.sh; do [ ! -e "$settings" ] || . "$settings"; done
    exec "$@"
' "$PWD" "$@"
