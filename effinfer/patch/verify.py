"""A tiny forward before and after patching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effinfer.errors import UnsupportedModelError, VerificationError

# Relative L2 of the logits. Stock and patched each round in the model's own type, layer after layer.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
_PROMPT, _STEPS = 12, 2


@dataclass(frozen=True)
class Probe:
    """Some tokens and what the stock model makes of them: one prefill, then single tokens."""

    tokens: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def record(cls, model: nn.Module) -> Probe:
        """Run the stock model."""
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        if vocabulary is None:
            raise UnsupportedModelError("patch: verify needs a language model (config.vocab_size)")
        generator = torch.Generator().manual_seed(0)
        shape = (1, _PROMPT + _STEPS)
        tokens = torch.randint(vocabulary, shape, generator=generator)
        tokens = tokens.to(next(model.parameters()).device)
        return cls(tokens, _run(model, tokens))

    def compare(self, model: nn.Module) -> float:
        """Run the patched model; returns its relative error, raises where it is too large."""
        try:
            logits = _run(model, self.tokens)
        except Exception as error:
            raise VerificationError(
                f"patch: the patched model failed ({type(error).__name__}: {error}); it was restored"
            ) from error
        error_size = ((logits - self.logits).norm() / self.logits.norm()).item()
        allowed = _TOLERANCE.get(next(model.parameters()).dtype, 1e-3)
        if not error_size <= allowed:
            raise VerificationError(
                f"patch: outputs differ from stock by {error_size:.2e} (relative L2; "
                f"{allowed:.0e} allowed); the model was restored"
            )
        return float(error_size)


@torch.inference_mode()
def _run(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    output: Any = model(tokens[:, :_PROMPT], use_cache=True)
    logits = [output[0]]
    for t in range(_PROMPT, tokens.shape[1]):
        key = "cache_params" if "cache_params" in output else "past_key_values"
        output = model(tokens[:, t : t + 1], use_cache=True, **{key: output[key]})
        logits.append(output[0])
    return torch.cat(logits, dim=1).double()
