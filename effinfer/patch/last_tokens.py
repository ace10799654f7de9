"""The last block's output for those tokens only whose logits are asked for.

``generate`` reads a prompt with ``logits_to_keep=1``. Every block must move its states on by all of
it, but of the last one's output the rest would be thrown away: with its gate and output projection
that is 2.6 % of the products of Mamba-130M.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from effinfer.patch.direct import is_bare
from effinfer.patch.swap import Patched

_thread = threading.local()


class LastTokensLM(Patched):
    """mamba, falcon_mamba, mamba2: tells the last block how many tokens are read of it."""

    stock_name = True
    backbone: Any
    config: Any

    # Not ``forward``, whose signature ``generate`` reads.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        tokens = None if torch.compiler.is_compiling() else self._tokens_read(args, kwargs)
        if tokens is None:
            return stock.__call__(*args, **kwargs)
        before = _thread.__dict__.get("last_block")
        _thread.last_block = self.backbone.layers[-1], tokens
        try:
            return stock.__call__(*args, **kwargs)
        finally:
            _thread.last_block = before

    def _tokens_read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """How many tokens are read of the last block's output; None for all."""
        tokens = kwargs.get("logits_to_keep")
        # What the options are is known by name only: families order their arguments differently.
        if type(tokens) is not int or tokens <= 0 or len(args) > 1:
            return None
        states = kwargs.get("output_hidden_states")
        if self.config.output_hidden_states if states is None else states:
            return None
        backbone = self.backbone
        modules = (backbone, backbone.layers[-1], backbone.norm_f)
        return tokens if all(map(is_bare, modules)) else None


def tokens_read(block: Any) -> int | None:
    """How many of its last tokens are read of ``block``'s output; None for all."""
    found = _thread.__dict__.get("last_block")
    return found[1] if found is not None and found[0] is block else None
