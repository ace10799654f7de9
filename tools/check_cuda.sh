#!/usr/bin/env bash
# Compiles every ops/*/cuda.cu for every GPU target with warnings as errors, links the module
# effinfer/_C_cuda without a GPU, and checks what came out. Usage: tools/check_cuda.sh [BUILD_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/cuda}
if ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then
  echo "check_cuda: no nvcc on this machine, nothing compiled" >&2
  exit 3
fi
launcher=()
command -v ccache >/dev/null && launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache
                                          -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
started=$SECONDS
cmake -G Ninja -S . -B "$build" -DEFFINFER_CUDA=ON -DEFFINFER_SHIM=OFF -DEFFINFER_TESTS=OFF \
  -DEFFINFER_BENCH=OFF -DEFFINFER_INPLACE=ON "${launcher[@]}" >/dev/null
ninja -C "$build" -j"$(nproc)" _C_cuda
python3 tools/fatbin_targets.py --expect sm_80,sm_90,sm_120,ptx_120 effinfer/_C_cuda*.so
echo "check_cuda: $(find csrc/ops -name cuda.cu | wc -l) cuda.cu files, $((SECONDS - started)) s"
