"""What a model takes in memory."""

from __future__ import annotations

import torch
from torch import nn


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared storage counted once."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    # Meta tensors have no address; they are told apart by themselves.
    sizes = {t.untyped_storage().data_ptr() or id(t): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())
