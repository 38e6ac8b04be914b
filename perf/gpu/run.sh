#!/usr/bin/env bash
# Proves and measures the CUDA backend on this machine: see perf/gpu/README.md.
#     run.sh --out DIR [--stage N|all] [--cache FILE|DIR] [--patience N]
#     run.sh --report DIR
# DIR gets rows.jsonl (every measurement), survey.jsonl (cuBLASLt), results.md (the tables), log.txt and cache.tar (compiled kernels and
# choices of algorithms: give it as --cache to the next run). --patience N makes all limits N times as long.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Seconds of stages 1 to 7; what one leaves over the next ones have. A stage that is asked for by itself has them all. Every part of a stage
# has a limit of its own.
limits=(0 60 140 75 180 60 60 10)
all=575

usage() { sed -n '2,7s/^# //p' "$0" >&2; exit 2; }
out="" stage=all cache="" patience=1 report=no
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || usage
    case $1 in
        --out) out=$2 ;;
        --report) out=$2 report=yes ;;
        --stage) stage=$2 ;;
        --cache) cache=$2 ;;
        --patience) patience=$2 ;;
        *) usage ;;
    esac
    shift 2
done
[ -n "$out" ] || usage
case $stage in all) stages="1 2 3 4 5 6" ;; [1-6]) stages=$stage ;; 7) report=yes ;; *) usage ;; esac
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1

export DOTNET_ROOT=$here/dotnet PATH=$here/dotnet:$PATH:/sbin:/usr/sbin
export DOTNET_NOLOGO=1 DOTNET_CLI_TELEMETRY_OPTOUT=1 DOTNET_EnableDiagnostics=0
export ROLLOUT_GPU_PATIENCE=$patience HOME=${HOME:-/tmp}
gpu() { "$DOTNET_ROOT/dotnet" "$here/gpu/Rollout.Gpu.dll" "$@"; }
ldconfig -p 2> /dev/null | grep -q 'libssl\.so' || export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$here/openssl
if [ $report = yes ]; then gpu report --out "$out"; exit; fi

# CUDA's libraries: where the user says, the toolkit or the loader have them, or else in pip's packages.
finds() { ldconfig -p 2> /dev/null | grep -q "$1" || compgen -G "/usr/local/cuda/lib64/$1*" > /dev/null; }
if [ -z "${ROLLOUT_CUDA_PATH:-}" ]; then
    if ! { finds libnvrtc.so && finds libcublasLt.so && finds libnccl.so; }; then
        packages=$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0])' 2> /dev/null) && export ROLLOUT_CUDA_PATH=$packages
    fi
    for folder in /usr/local/nvidia/lib64 /usr/local/nvidia/lib; do
        finds libcuda.so.1 || [ ! -e $folder/libcuda.so.1 ] || export ROLLOUT_CUDA_PATH=${ROLLOUT_CUDA_PATH:+$ROLLOUT_CUDA_PATH:}$folder
    done
fi

# What an earlier run compiled and chose.
export XDG_CACHE_HOME=$here/cache
if [ -d "$cache" ]; then
    XDG_CACHE_HOME=$(cd "$cache" && pwd)
elif [ -n "$cache" ]; then
    mkdir -p "$XDG_CACHE_HOME" && tar -C "$XDG_CACHE_HOME" -xf "$cache" || exit 1
fi

# The machine's facts stand above every table, whichever stage was run.
grep -qs '"table":"Machine"' "$out/rows.jsonl" || gpu part 1 facts --out "$out" >> "$out/log.txt" 2>&1
SECONDS=0 due=0
for stage in $stages; do
    due=$((due + limits[stage]))
    [ "$stages" != "$stage" ] || due=$all
    limit=$((due * patience - SECONDS))
    [ $limit -gt 0 ] || limit=1
    echo "stage $stage, at most $limit s" | tee -a "$out/log.txt"
    timeout --kill-after=5 $limit "$DOTNET_ROOT/dotnet" "$here/gpu/Rollout.Gpu.dll" stage "$stage" --out "$out" \
        >> "$out/log.txt" 2>&1 < /dev/null
    status=$?
    case $status in
        0) why="" ;;
        124 | 137) why="not done within $limit s: what is missing was not measured" ;;
        *) why="ended with $status: $(tail -n 1 "$out/log.txt" | tr -cd '[:alnum:] .,:_()/-' | cut -c 1-200)" ;;
    esac
    row='{"stage":%s,"table":"Stages","name":"%s","column":"result","error":"%s"}\n'
    [ -z "$why" ] || printf "$row" "$stage" "$stage" "$why" >> "$out/rows.jsonl"
    gpu report --out "$out" > /dev/null 2>> "$out/log.txt"
    [ ! -d "$XDG_CACHE_HOME/rollout" ] || tar -C "$XDG_CACHE_HOME" -cf "$out/cache.tar" rollout
done
gpu report --out "$out"
