#!/usr/bin/env bash
# Unpacks NVIDIA's own files, from Debian's packages of them, into a folder laid out as a toolkit's (lib, include, bin), and prints the folder. Tests hold
# the bindings and the compiled kernels against these files. No GPU is needed, nothing is installed, and what is there already is not fetched again.
#   tests/nvidia/fetch.sh [FOLDER]      by default $ROLLOUT_TEST_NVIDIA, or else ${XDG_CACHE_HOME:-~/.cache}/rollout-ci/nvidia: where tests look
# Fails, after one line that says what is missing, where something cannot be had.
set -u
out=${1:-${ROLLOUT_TEST_NVIDIA:-${XDG_CACHE_HOME:-$HOME/.cache}/rollout-ci/nvidia}}

# Suite, package, and what is taken of it as FOLDER/NAME=PATTERN. The driver is bookworm's (CUDA 12.2), the oldest that is tested; all else is sid's (CUDA 12.4,
# NCCL 2.29). CUDA's headers come last: most is to be fetched for them, because gigabytes of static libraries come with them.
lib=usr/lib/x86_64-linux-gnu
packages="
bookworm libcuda1               lib/libcuda.so.1=$lib/nvidia/current/libcuda.so.*.*
sid      libnvrtc12             lib/libnvrtc.so.12=$lib/libnvrtc.so.12.*.*
sid      libnvrtc-builtins12.4  lib/libnvrtc-builtins.so.12.4=$lib/libnvrtc-builtins.so.12.4.*
sid      nvidia-cuda-toolkit    bin/ptxas=usr/bin/ptxas bin/cuobjdump=usr/bin/cuobjdump bin/nvdisasm=usr/bin/nvdisasm
sid      libnccl2               lib/libnccl.so.2=$lib/libnccl.so.2.*.*
sid      libnccl-dev            headers/nccl.h=usr/include/nccl.h
sid      libcu++-dev            headers/nv=usr/include/nv
sid      libcublaslt12          lib/libcublasLt.so.12=$lib/libcublasLt.so.12.*.*
sid      nvidia-cuda-dev        include=usr/include
"

# apt with lists, cache and locks of its own: it needs neither root nor what the system's apt knows. Sid's index need not be of this week.
prepare()
{
    command -v apt-get dpkg-deb > "$log" && [ "$(wc -l < "$log")" -eq 2 ] || { echo "apt-get and dpkg-deb are needed" > "$log"; return 1; }
    mkdir -p "$work/lists/partial" "$work/archives/partial" || return
    printf 'deb http://deb.debian.org/debian %s\n' "bookworm non-free" "sid main non-free contrib" > "$work/sources"
    apt=(apt-get -q -o "Dir::Etc::sourcelist=$work/sources" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work"
        -o APT::Architecture=amd64 -o APT::Architectures=amd64 -o APT::Sandbox::User= -o APT::Update::Error-Mode=any
        -o Acquire::Check-Valid-Until=false -o Acquire::Languages=none -o Acquire::http::Timeout=30 -o Acquire::Retries=2)
    "${apt[@]}" update > "$log" 2>&1
}

has_all()
{
    local file
    for file in "$@"; do [ -e "$out/${file%%=*}" ] || return; done
}

# Unpacked beside its place and moved there, so that what is there is whole.
fetch()
{
    local suite=$1 package=$2 file from; shift 2
    mkdir "$work/$package" && cd "$work/$package" && "${apt[@]}" download "$package/$suite" > "$log" 2>&1 || return
    case $package in
        *-dev) dpkg-deb --fsys-tarfile ./*.deb 2> /dev/null | head --bytes=64M | tar --extract ./usr/include 2> /dev/null ;; # headers are first
        *) dpkg-deb --extract ./*.deb . 2> "$log" || return ;;
    esac
    for file in "$@"; do
        from=$(compgen -G "${file#*=}" | head -n 1)
        [ -n "$from" ] || { echo "it has no ${file#*=}" > "$log"; return 1; }
        mkdir -p "$out/$(dirname "${file%%=*}")" && mv -T "$from" "$out/${file%%=*}" || return
    done
    rm -rf "${work:?}/$package"
}

mkdir -p "$out" && out=$(cd "$out" && pwd) && exec 9> "$out/lock" && flock 9 || exit # several may come at once
rm -rf "$out"/unpacking.* # of one that was killed
work="" log="" missing=""
trap '[ -z "$work" ] || rm -rf "$work"' EXIT
while read -r suite package files; do
    read -ra files <<< "$files"
    [ -z "$package" ] || has_all "${files[@]}" && continue
    if [ -z "$work" ]; then
        work=$(mktemp -d "$out/unpacking.XXXXXX") && log=$work/log || exit
        prepare || { missing=", NVIDIA's files ($(tail -n 1 "$log"))"; break; }
    fi
    (fetch "$suite" "$package" "${files[@]}") || missing+=", $package ($(tail -n 1 "$log"))"
done <<< "$packages"
echo "$out"
[ -z "$missing" ] || { echo "$0: tests are skipped for want of ${missing#, }" >&2; exit 1; }
