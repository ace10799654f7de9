"""Follow docs/adding-an-op.md to the letter in a copy of the tree: write its files, build, test.

Usage: python tools/check_adding_an_op.py [WORK_DIR]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE_BLOCK = re.compile(r"^`([^`\n]+)`\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLE_ROW = re.compile(r"^\| \d+ \| `([^`]+)`", re.MULTILINE)


def write_the_op(tree: Path) -> list[str]:
    """Write each file block and the two added lines; return the touched places."""
    text = (ROOT / "docs" / "adding-an-op.md").read_text()
    touched = []
    for name, body in FILE_BLOCK.findall(text):
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(body)
        touched.append(name)
    build = tree / "csrc" / "CMakeLists.txt"
    build.write_text(
        build.read_text().replace("set(EFFINFER_OPS\n", "set(EFFINFER_OPS\n    relu_squared\n", 1)
    )
    ops = tree / "effinfer" / "ops" / "__init__.py"
    ops.write_text(ops.read_text() + "\nfrom effinfer.ops.relu_squared import relu_squared\n")
    touched += ["csrc/CMakeLists.txt", "effinfer/ops/__init__.py"]
    assert sorted(touched) == sorted(TABLE_ROW.findall(text)), "the page's table and blocks differ"
    assert len(touched) < 10
    return touched


def main() -> None:
    work = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    tree = work / "effinfer"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".git", "build", ".venv*", "*.so", "__pycache__")
    )
    touched = write_the_op(tree)
    env = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "CCACHE_BASEDIR": str(tree),
        "CCACHE_NOHASHDIR": "1",
    }

    def run(*command: str) -> None:
        subprocess.run(command, cwd=tree, env=env, check=True)

    options = ["-DEFFINFER_INPLACE=ON", "-DEFFINFER_CUDA=OFF", "-GNinja"]
    run("cmake", "-S", ".", "-B", "build", *options)
    run("cmake", "--build", "build")
    run(sys.executable, "-m", "pytest", "-q", "tests/ops/test_relu_squared.py")
    run("build/bench/effinfer-bench", "--op", "relu_squared", "--threads", "1", "--seconds", "0.05")
    print(f"added relu_squared in {len(touched)} places")
    if len(sys.argv) < 2:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
