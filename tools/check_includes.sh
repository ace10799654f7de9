#!/usr/bin/env bash
# The native code knows no torch, but for what its comments say; only csrc/python knows Python.
if grep -rniE 'torch|ATen/|c10/' csrc | sed 's,//.*,,' | grep -iE ':.*:.*(torch|ATen/|c10/)'; then exit 1; fi
if grep -rnE '#include *[<"](Python\.h|pybind11)' csrc --include='*.h' --include='*.cpp' --include='*.cu' |
  grep -v '^csrc/python/'; then exit 1; fi
