#!/usr/bin/env bash
# Builds the wheel as a user's pip would, and checks what is promised of it: valid metadata, no
# torch, Python-library or CUDA dependency in the module, and a demo that runs where it is installed
# without a compiler.
set -euo pipefail
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
python -m build --wheel --no-isolation --outdir "$out" >"$out/build.log" 2>&1 || { tail -40 "$out/build.log"; exit 1; }
wheel=$(ls "$out"/*.whl)
twine check "$wheel"
python -m zipfile -e "$wheel" "$out/unpacked"
module=$(ls "$out"/unpacked/effinfer/_C.*.so)
if nm -D "$module" | grep -iE ' U .*(torch|c10|cuda)'; then echo "$module needs torch or CUDA symbols"; exit 1; fi
if readelf -d "$module" | grep NEEDED | grep -iE 'torch|c10|cuda|gomp|omp'; then
  echo "$module links torch, CUDA or OpenMP"; exit 1
fi
# torch and transformers come from the current environment; effinfer only from the wheel.
python -m venv --system-site-packages --without-pip "$out/venv"
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$site" >"$("$out/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
python -m pip --python "$out/venv/bin/python" install -q --no-deps --no-index "$wheel"
cd "$out"
env -u PYTHONPATH PATH="$out/venv/bin:/usr/bin:/bin" CC=/bin/false CXX=/bin/false \
  "$out/venv/bin/effinfer" demo --tokens 32 | tee "$out/demo.log"
grep -q "tokens identical" "$out/demo.log"
"$out/venv/bin/effinfer" info >/dev/null
"$out/venv/bin/effinfer-bench" --version
[ -s "$out/unpacked/effinfer/serve/page/index.html" ] || { echo "the wheel lacks the live page"; exit 1; }
du -k "$wheel" | awk '{print "wheel: " $1 " KB"}'
