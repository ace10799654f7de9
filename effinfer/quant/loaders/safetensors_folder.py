"""The safetensors files of a model folder, read tensor by tensor, each error naming its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsFolder:
    """Tensors by name, from ``model.safetensors`` or from the files its index lists.

    Nothing but safetensors is read: no pickle, no path outside the folder.

    Raises:
        ValueError: a file is damaged, or an index that lists what is not there.
        FileNotFoundError: no safetensors in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).is_file():
            listed = read_json(folder / INDEX).get("weight_map")
            if not isinstance(listed, dict):
                raise ValueError(f"{folder / INDEX}: weight_map must be an object")
            self.files = {str(name): self._inside(file) for name, file in listed.items()}
        elif (folder / SINGLE).is_file():
            self.files = dict.fromkeys(self._open(folder / SINGLE).keys(), folder / SINGLE)
        else:
            raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def get(self, name: str) -> Tensor | None:
        """A tensor, or None where no file has it."""
        return self[name] if name in self.files else None

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, copied out of its file.

        Raises:
            ValueError: no file has it, or the file is damaged.
        """
        if name not in self.files:
            raise ValueError(f"{self.folder}: tensor {name!r} is missing")
        path = self.files[name]
        try:
            tensor: Tensor = self._open(path).get_tensor(name)
        except Exception as error:  # a dtype torch lacks raises what it likes
            raise ValueError(f"{path}: cannot read tensor {name!r}: {error}") from error
        return tensor

    def _inside(self, file: Any) -> Path:
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{self.folder / INDEX}: must list files of the folder, got {file!r}")
        return self.folder / file

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it holds something else, or no JSON.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return found
