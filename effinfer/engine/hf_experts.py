"""The experts of Hugging Face mixtures, all rows of a launch in one native call, on packed weights
that take the place of the model's own.

transformers has one interface for what its experts compute (``ExpertsInterface``), with what may be
otherwise in flags. What those allow and is not here (biases, a gate of another kind, ...) runs by the
model's own code.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from effinfer.engine.released import ReleasedWeights
from effinfer.ops.moe_experts import moe_experts, pack_experts, unpack_experts
from effinfer.patch.direct import is_bare

IMPLEMENTATION = "effinfer_grouped"
_OWN_CODE = "runs by the model's own code, expert by expert"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}


@dataclass(frozen=True)
class PackedExperts:
    """The weights of one module, as ``moe_experts`` takes them."""

    up: torch.Tensor
    down: torch.Tensor
    activation: str
    gated: bool

    def unpack_up(self) -> torch.Tensor:
        """``(experts, inner, hidden)``, or gates and these in ``(experts, 2 inner, hidden)``."""
        return unpack_experts(self.up, (1 + self.gated) * self.down.shape[2])

    def unpack_down(self) -> torch.Tensor:
        """``(experts, hidden, inner)``."""
        return unpack_experts(self.down, self.up.shape[2])


def run_experts(
    module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """An experts function of transformers' interface: hidden states (T, H), and each row's experts
    and their weights (T, top_k)."""
    own: PackedExperts = module.__dict__["_effinfer_experts"]
    return moe_experts(
        hidden, index.int(), weights, own.up, own.down, activation=own.activation, gated=own.gated
    )


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds the weights of several experts."""
    return type(module).__name__.endswith("Experts") and bool(module._parameters)


def experts_reasons(module: Any) -> Iterator[str]:
    """Why ``run_experts`` cannot stand for the module's own code."""
    kind = type(module)
    if not (hasattr(kind.forward, "__wrapped__") and hasattr(module, "has_gate")):
        yield "it is not of transformers' experts interface"
        return
    if not is_bare(module):
        yield "it has hooks or another forward"
    if kind._apply_gate.__name__ != "_default_apply_gate":
        yield "its gate is of another kind"
    for flag, text in (
        ("has_bias", "it has biases"),
        ("is_transposed", "its weights are transposed"),
        ("has_post_expert_norm", "it has a norm"),
        ("_is_expert_parallel", "its experts are spread over devices"),
    ):
        if getattr(module, flag, False):
            yield text
    if module.has_gate and not module.is_concatenated:
        yield "its gates lie between the others"
    if _activation(module) is None:
        yield f"its activation is {type(getattr(module, 'act_fn', None)).__name__}"
    name = "gate_up_proj" if module.has_gate else "up_proj"
    if set(module._parameters) != {name, "down_proj"}:
        yield f"its parameters are {', '.join(module._parameters)}"
        return
    up, down = module._parameters[name], module._parameters["down_proj"]
    experts, hidden, inner = down.shape if down.dim() == 3 else (0, 0, 0)
    if experts == 0 or up.shape != (experts, (1 + module.has_gate) * inner, hidden):
        yield f"its weights are {tuple(up.shape)} and {tuple(down.shape)}"
    if up.dtype not in _FLOATS or down.dtype not in _FLOATS:
        yield f"its weights are {up.dtype} and {down.dtype}"


def _activation(module: Any) -> str | None:
    function: Any = getattr(module, "act_fn", None)
    found = _ACTIVATIONS.get(type(function).__name__)
    if found == "gelu" and function.act is not F.gelu:  # another way to compute it
        return None
    return found


def take_over_experts(model: nn.Module, undo: ExitStack) -> None:
    """Put packed weights in the place of those of all experts that can be; ``undo`` gives the model
    its own again, to the bit. Modules' configurations must be copies already.

    Until then their parameters are empty, but ``state_dict()`` gives the weights as ever.
    """
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(IMPLEMENTATION, run_experts)
    # All of them before any is changed: modules may share parameters.
    reasons = {m: list(experts_reasons(m)) for m in model.modules() if is_experts(m)}
    released = ReleasedWeights()
    undo.callback(released.restore)
    packed: dict[int, torch.Tensor] = {}  # by parameter
    for module, why in reasons.items():
        if not why:
            _take_over(module, packed, released, undo)
    for text in {
        f"{type(m).__name__} {_OWN_CODE}: {'; '.join(why)}" for m, why in reasons.items() if why
    }:
        warnings.warn(f"effinfer: {text}", stacklevel=2)


def _take_over(
    module: Any, packed: dict[int, torch.Tensor], released: ReleasedWeights, undo: ExitStack
) -> None:
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    up, down = (module._parameters[name] for name in names)
    for parameter in (up, down):
        if id(parameter) not in packed:
            packed[id(parameter)] = pack_experts(parameter)
    activation = _activation(module)
    assert activation is not None
    own = PackedExperts(packed[id(up)], packed[id(down)], activation, module.has_gate)
    released.release(module, names[0], own.unpack_up)
    released.release(module, names[1], own.unpack_down)
    module.__dict__["_effinfer_experts"] = own
    undo.callback(module.__dict__.pop, "_effinfer_experts")
    stock, module.config = module.config, copy.copy(module.config)
    undo.callback(setattr, module, "config", stock)
    module.config._experts_implementation = IMPLEMENTATION
