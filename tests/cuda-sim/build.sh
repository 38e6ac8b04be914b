#!/bin/sh
# Builds the simulated device where its sources have changed, and prints the folder to set ROLLOUT_CUDA_PATH to.
set -eu
cd "$(dirname "$0")"
command -v g++ > /dev/null || { echo "the simulated CUDA device needs g++" >&2; exit 1; }
out=$PWD/obj
mkdir -p "$out"
exec 9> "$out/lock" && flock 9 # several test programs may come at once
sources="block.cpp memory.cpp driver.cpp nvrtc.cpp cublaslt.cpp"
sum=$(cat build.sh sim.h device.h $sources | cksum)
if [ "$(cat "$out/sources" 2> /dev/null)" != "$sum" ]; then
    rm -rf "$out/cache" # kernels that were compiled with an older device.h
    { printf 'extern const char sim_device_h[];\nconst char sim_device_h[] = R"rollout('; cat device.h; printf ')rollout";\n'; } > "$out/device_h.cpp"
    g++ -std=c++17 -O2 -flto -fno-semantic-interposition -Wall -Wextra -mfma -fPIC -shared -Wl,-soname,libcuda-sim.so -o "$out/libcuda-sim.so" $sources "$out/device_h.cpp" -ldl >&2
    for name in libcuda.so.1 libnvrtc.so.13 libcublasLt.so.13; do ln -sf libcuda-sim.so "$out/$name"; done
    echo "$sum" > "$out/sources"
fi
echo "$out"
