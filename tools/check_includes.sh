#!/usr/bin/env bash
# The native core knows neither torch nor Python; only csrc/python knows Python.
if grep -rnE '#include *[<"](torch|ATen|c10)' csrc; then exit 1; fi
if grep -rnE '#include *[<"](Python\.h|pybind11)' csrc --include='*.h' --include='*.cpp' --include='*.cu' |
  grep -v '^csrc/python/'; then exit 1; fi
