#!/usr/bin/env bash
# Packs all that proves and measures the CUDA backend on a machine without .NET and without a network into one archive, with run.sh at
# its top:
#     perf/gpu/pack.sh [--no-build] FILE.tar.xz
# A name without .tar.xz is a folder, which then gets the archive's content as it is.
set -euo pipefail
most=55000000 # bytes of the archive
build=yes
if [ "${1:-}" = --no-build ]; then build=no; shift; fi
[ $# -eq 1 ] || { echo "usage: pack.sh [--no-build] FILE.tar.xz" >&2; exit 2; }
case $1 in /*) target=$1 ;; *) target=$PWD/$1 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ $build = yes ]; then
    for project in perf/gpu sidecar/server tests/kernels tests/engine; do dotnet build -c Release -v quiet --nologo "$project"; done
fi

case $target in
    *.tar.xz) folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT ;;
    *) folder=$target; mkdir -p "$folder" ;;
esac

# The runtimes of this machine's SDK, without what only a debugger or another collector of garbage needs.
root=${DOTNET_ROOT:-$(dirname "$(readlink -f "$(command -v dotnet)")")}
newest() { ls "$1" | sort -V | tail -n 1; }
mkdir -p "$folder/dotnet/host/fxr" "$folder/dotnet/shared"
cp "$root/dotnet" "$folder/dotnet/"
cp -r "$root/host/fxr/$(newest "$root/host/fxr")" "$folder/dotnet/host/fxr/"
for framework in Microsoft.NETCore.App Microsoft.AspNetCore.App; do
    mkdir -p "$folder/dotnet/shared/$framework"
    cp -r "$root/shared/$framework/$(newest "$root/shared/$framework")" "$folder/dotnet/shared/$framework/"
done
find "$folder/dotnet" \( -name 'libmscord*' -o -name 'libclrgc*.so' -o -name 'libcoreclrtrace*' -o -name createdump \) -delete

# The programs.
copy() { mkdir -p "$folder/$2" && cp -r "$1/bin/Release/net10.0/." "$folder/$2/"; }
copy perf/gpu gpu
copy sidecar/server server
copy tests/kernels tests/kernels
copy tests/engine tests/engine
find "$folder/gpu" "$folder/server" "$folder/tests" \( -name '*.pdb' -o -name '*.xml' -o -name TestResults \) -exec rm -rf {} +

# Models with known outputs; the tests look for them beside themselves.
rm -rf "$folder/tests/engine/golden"
mkdir -p "$folder/tests/golden"
cp -r tests/golden/{llama,llama3,qwen2,qwen3} "$folder/tests/golden/"
ln -sfn ../golden "$folder/tests/engine/golden"

# The trainer in Python.
mkdir -p "$folder/client.python" "$folder/examples"
cp -r sidecar/client.python/rollout "$folder/client.python/"
cp examples/python/grpo.py "$folder/examples/"
find "$folder/client.python" -name __pycache__ -exec rm -rf {} +

# .NET hashes by OpenSSL, and some images with Python have none that others can load.
mkdir -p "$folder/openssl"
for library in libssl.so.3 libcrypto.so.3; do
    found=$(PATH=$PATH:/sbin:/usr/sbin ldconfig -p | sed -n "s|.*$library .*x86-64.* => ||p" | head -n 1)
    [ -z "$found" ] || cp -L "$found" "$folder/openssl/$library"
done

cp perf/gpu/run.sh "$folder/"
git describe --always --abbrev=7 --dirty > "$folder/commit" 2> /dev/null || echo unknown > "$folder/commit"
[ "$folder" != "$target" ] || exit 0

tar -C "$folder" --sort=name --owner=0 --group=0 -cf - . | xz -9 -T0 > "$target"
size=$(stat -c %s "$target")
echo "$target: $size bytes"
[ "$size" -le $most ] || { echo "$target is larger than $most bytes" >&2; exit 1; }
