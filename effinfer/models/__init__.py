"""The language model that the wheel carries; trained by bench/train_demo.py."""

from importlib.resources import files
from pathlib import Path


def demo_path() -> Path:
    """Folder of the demo model, in the Hugging Face format: for `from_pretrained`."""
    return Path(str(files(__name__))) / "mamba-demo"
