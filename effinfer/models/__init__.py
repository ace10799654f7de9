"""The language models that the wheel carries.

Trained by bench/train_demo.py and bench/train_recursive.py.
"""

from importlib.resources import files
from pathlib import Path

RECURSIVE_LOOPS = (2, 4)


def demo_path() -> Path:
    """Folder of the demo model, in the Hugging Face format: for `from_pretrained`."""
    return _folder("mamba-demo")


def recursive_demo_path(loops: int = 4) -> Path:
    """Folder of the recursive demo model whose block runs ``loops`` times, 2 or 4.

    For ``effinfer.loading.load_model``; or for `from_pretrained` once
    ``effinfer.register_with_transformers()`` was called.
    """
    if loops not in RECURSIVE_LOOPS:
        raise ValueError(f"recursive_demo_path: loops must be 2 or 4, got {loops!r}")
    return _folder(f"recursive-demo-r{loops}")


def _folder(name: str) -> Path:
    return Path(str(files(__name__))) / name
