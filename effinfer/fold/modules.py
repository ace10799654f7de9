"""The modules folds work on: plain linears, and norms with a weight per channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn


def is_linear(module: nn.Module) -> bool:
    """A stock ``nn.Linear``, or GPT-2's ``Conv1D``, which keeps its weight transposed.

    Subclasses may compute anything, so they are not taken.
    """
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def linear_weight(module: nn.Module) -> torch.Tensor:
    """The weight as (outputs, inputs), a view."""
    weight = module.get_parameter("weight")
    return weight if isinstance(module, nn.Linear) else weight.t()


def is_norm(module: nn.Module) -> bool:
    """Anything with one weight per channel: LayerNorm, RMSNorm and their many namesakes."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and not is_linear(module)


def channels(module: nn.Module) -> int:
    """Outputs of a linear or of a norm."""
    return (
        linear_weight(module).shape[0] if is_linear(module) else len(module.get_parameter("weight"))
    )


def bias_of(module: nn.Module) -> torch.nn.Parameter | None:
    """The bias parameter, if it has one."""
    return module._parameters.get("bias")


def sharing_reasons(model: nn.Module, name: str) -> list[str]:
    """Why the module's parameters are not its own: tied to others, or used under two names."""
    module = model.get_submodule(name)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    reasons = [
        f"{name}.{key} is tied to another module's parameter"
        for key, parameter in module.named_parameters(recurse=False)
        if owners[id(parameter)] > 1
    ]
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
    if len(names) > 1:
        return [f"{name} is also {', '.join(n for n in names if n != name)}"]
    return reasons


class Transaction:
    """Writes parameters in place; an exception inside the block puts all of them back."""

    def __init__(self) -> None:
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> Transaction:
        return self

    @torch.no_grad()
    def set(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """Round ``value`` (float64) into ``parameter``.

        Raises:
            ValueError: the parameter's type cannot hold it.
        """
        rounded = value.to(parameter.dtype)
        if not bool(rounded.isfinite().all()):
            raise ValueError(f"fold: a scaled weight does not fit in {parameter.dtype}")
        self._before.append((parameter, parameter.clone()))
        parameter.copy_(rounded)

    @torch.no_grad()
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            for parameter, before in reversed(self._before):
                parameter.copy_(before)


def run(model: nn.Module, batch: Any) -> Any:
    """One forward: a mapping goes in as keywords, a tuple or list as arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def tensors(output: Any) -> list[torch.Tensor]:
    """The tensors in a model's output, in order; a cache inside is left out."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [t for part in output for t in tensors(part)]
    return []


def sample(model: nn.Module) -> Any:
    """A batch to probe the model with: the one transformers keeps for every model class.

    Raises:
        ValueError: not a transformers model.
    """
    batch = getattr(model, "dummy_inputs", None)
    if batch is None:
        raise ValueError(f"fold: {type(model).__name__} needs a batch to probe it with")
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
