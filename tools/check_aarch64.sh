#!/usr/bin/env bash
# Runs the op tests on 64-bit Arm, under qemu, with the oldest torch that is allowed: Debian 12's
# arm64 Python and PyPI's aarch64 wheels are unpacked into a folder of their own, and the module is
# cross-compiled against them. Nothing is installed on the host.
#
# Usage: tools/check_aarch64.sh [PYTEST ARGUMENT ...]   (default: the smoke selection below)
# EFFINFER_AARCH64_ROOT: the folder to unpack into and to reuse (default: build/aarch64-root).
# QEMU_CPU: the processor to play (default: max).
set -euo pipefail
cd "$(dirname "$0")/.."
root=$(realpath -m "${EFFINFER_AARCH64_ROOT:-build/aarch64-root}")
python=3.11
torch=2.10.0

# apt with a state of its own, so that the host's architectures and package lists stay as they are.
unpack_debian() {
  mkdir -p "$root"/apt/{lists,archives}/partial
  cat >"$root/apt/apt.conf" <<CONF
APT::Architecture "arm64";
APT::Architectures {"arm64";};
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::State "$root/apt";
Dir::State::status "/dev/null";
Dir::Cache "$root/apt";
CONF
  local -x APT_CONFIG="$root/apt/apt.conf"
  apt-get update -qq
  apt-get install -qq -y --download-only --no-install-recommends -o Debug::NoLocking=1 \
    python$python-minimal libpython$python-stdlib libpython$python-dev libstdc++6
  local package
  for package in "$root"/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
  rm -r "$root/apt"
  # pyconfig.h includes the architecture's own by this path.
  ln -s ../aarch64-linux-gnu "$root/usr/include/python$python/aarch64-linux-gnu"
  cat >"$root/python" <<WRAPPER
#!/bin/sh
exec qemu-aarch64-static -L $root -E PYTHONHOME=$root/usr $root/usr/bin/python$python "\$@"
WRAPPER
  chmod +x "$root/python"
}

# --no-deps, with the dependencies listed: pip would judge torch's by the host's processor.
unpack_wheels() {
  python -m pip install -q --target "$root/site" --no-deps --only-binary=:all: \
    --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
    --implementation cp --python-version $python torch==$torch \
    filelock fsspec jinja2 markupsafe mpmath networkx numpy sympy typing-extensions \
    hypothesis iniconfig packaging pluggy pygments pytest sortedcontainers
}

if [ ! -e "$root/complete" ]; then
  rm -rf "$root"
  unpack_debian
  unpack_wheels
  touch "$root/complete"
fi

# The cross-compiled interpreter answers CMake's questions about the module's name and headers.
cmake --preset neon -DEFFINFER_PYTHON=ON -DPython_EXECUTABLE="$root/python" \
  -DPython_INCLUDE_DIR="$root/usr/include/python$python" \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >/dev/null
cmake --build --preset neon --target _C

stage=build/neon/python
rm -rf $stage
mkdir -p $stage
cp -r effinfer tests pyproject.toml tools/one_of_each.py $stage
find $stage -name '*.so' -delete
cp build/neon/csrc/_C.*.so $stage/effinfer/
cd $stage
# One case of each test; the scalar kernels are the native tests' business, and torch.compile and
# opcheck, which take minutes each here, are the host's.
[ $# -gt 0 ] || set -- tests/ops -p one_of_each -k "not scalar and not cuda and not registration"
PYTHONPATH="$PWD:$root/site" "$root/python" -m pytest -q "$@"
