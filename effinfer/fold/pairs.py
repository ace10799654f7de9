"""Where a scale can move: a norm or linear, and the linears that read it, and only they."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effinfer.fold.modules import (
    bias_of,
    channels,
    is_linear,
    is_norm,
    linear_weight,
    run,
    sharing_reasons,
    tensors,
)

# Names inside one block of the common families. What a name promises is not trusted: the probe
# below decides.
_IN_A_BLOCK: tuple[tuple[str, tuple[str, ...]], ...] = (
    # Llama, Mistral, Qwen, Gemma, ...
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("mlp.up_proj", ("mlp.down_proj",)),
    # GPT-2
    ("ln_1", ("attn.c_attn",)),
    ("ln_2", ("mlp.c_fc",)),
    # OPT
    ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("final_layer_norm", ("fc1",)),
    ("self_attn.v_proj", ("self_attn.out_proj",)),
    # BERT and MiniLM; their norms feed the residual too, which the probe finds
    ("attention.output.LayerNorm", ("intermediate.dense",)),
    ("attention.self.value", ("attention.output.dense",)),
    # ViT
    ("layernorm_before", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    ("layernorm_after", ("mlp.fc1",)),
    # Mamba and Mamba-2
    ("norm", ("mixer.in_proj",)),
)


@dataclass(frozen=True)
class Pair:
    """Modules of a model by name: ``source``'s output is what all ``targets`` multiply.

    With grouped heads each of the source's heads, ``head_dim`` channels wide, is read ``repeat``
    times in a row by the targets.
    """

    source: str
    targets: tuple[str, ...]
    repeat: int = 1
    head_dim: int = 1

    def spread(self, per_channel: torch.Tensor) -> torch.Tensor:
        """A value per channel of the source as one per input of a target."""
        if self.repeat == 1:
            return per_channel
        heads = per_channel.view(-1, self.head_dim)
        return heads.repeat_interleave(self.repeat, dim=0).flatten()

    def gather(self, per_input: torch.Tensor) -> torch.Tensor:
        """The largest value among the inputs that read a channel."""
        return per_input.view(-1, self.repeat, self.head_dim).amax(1).flatten()


def find_pairs(model: nn.Module) -> list[Pair]:
    """Pairs of common families by the names of their modules, not yet checked."""
    names = {name for name, _ in model.named_modules()}
    found: list[Pair] = []
    for block, _ in model.named_modules():
        prefix = f"{block}." if block else ""
        for source, targets in _IN_A_BLOCK:
            pair = Pair(prefix + source, tuple(prefix + target for target in targets))
            if pair.source in names and names.issuperset(pair.targets):
                found.append(_with_heads(model, pair))
    return found


def _with_heads(model: nn.Module, pair: Pair) -> Pair:
    """Grouped heads show as a target with several times the inputs that the source has outputs."""
    source, target = (model.get_submodule(name) for name in (pair.source, pair.targets[0]))
    attention = model.get_submodule(pair.source.rpartition(".")[0])
    head_dim = getattr(attention, "head_dim", None)
    if not (is_linear(source) and is_linear(target) and isinstance(head_dim, int)):
        return pair
    inputs, outputs = linear_weight(target).shape[1], channels(source)
    if inputs == outputs or inputs % outputs or outputs % head_dim:
        return pair
    return Pair(pair.source, pair.targets, inputs // outputs, head_dim)


def usable(
    model: nn.Module, pairs: Sequence[Pair], batch: Any
) -> list[tuple[Pair, tuple[str, ...]]]:
    """Each pair with every reason why a scale cannot move there; no reasons: it is exact.

    Whether something else reads the source, or what lies between is not linear in it, is tried: a
    power of two on each channel of the source, taken off again before the targets, must leave every
    bit of the model's outputs as it was.
    """
    reasons = {pair: _structural_reasons(model, pair) for pair in pairs}
    sound = [pair for pair in pairs if not reasons[pair]]
    with torch.no_grad():
        before = tensors(run(model, batch))
        if not _unmoved(model, sound, batch, before):
            for pair in sound:
                if not _unmoved(model, [pair], batch, before):
                    reasons[pair].append(
                        "something else reads it, or what lies between is not linear in it"
                    )
    return [(pair, tuple(reasons[pair])) for pair in pairs]


def _structural_reasons(model: nn.Module, pair: Pair) -> list[str]:
    names = (pair.source, *pair.targets)
    modules = {name: model.get_submodule(name) for name in names}
    source = modules[pair.source]
    reasons = []
    if not (is_linear(source) or is_norm(source)):
        reasons.append(f"{pair.source} ({type(source).__name__}) has no weight per channel")
    for name in pair.targets:
        if not is_linear(modules[name]):
            reasons.append(f"{name} ({type(modules[name]).__name__}) is not a plain linear")
    if any(p.is_meta for m in modules.values() for p in m.parameters(recurse=False)):
        reasons.append("its weights are on the meta device")
    if reasons:
        return reasons
    for name in pair.targets:
        inputs = linear_weight(modules[name]).shape[1]
        if inputs != channels(source) * pair.repeat:
            reasons.append(f"{name} reads {inputs} channels, not the source's {channels(source)}")
    reasons += [reason for name in names for reason in sharing_reasons(model, name)]
    if is_norm(source) and not _proportional(source):
        reasons.append(
            f"the output of {pair.source} ({type(source).__name__}) is not proportional to its weight"
        )
    return reasons


def _powers_of_two(size: int, like: torch.Tensor) -> torch.Tensor:
    """1/2, 1 or 2 for each channel, the same at each call."""
    exponents = torch.randint(-1, 2, (size,), generator=torch.Generator().manual_seed(size))
    return torch.exp2(exponents.double()).to(like)


@torch.no_grad()
def _proportional(norm: nn.Module) -> bool:
    """Do powers of two on weight and bias come out unchanged? (Not with ``1 + weight``.)"""
    trial = copy.deepcopy(norm)
    weight = trial.get_parameter("weight")
    scale = _powers_of_two(len(weight), weight)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, len(weight), generator=generator, dtype=torch.float64).to(weight)
    before = trial(x)
    for parameter in trial.parameters():
        parameter.mul_(scale)
    return torch.equal(trial(x), before * scale)


@contextmanager
def _scaled(model: nn.Module, pair: Pair) -> Iterator[None]:
    source = model.get_submodule(pair.source)
    scale = _powers_of_two(channels(source), source.get_parameter("weight"))

    def put_on(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * scale.to(output.dtype)

    def take_off(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0] / pair.spread(scale).to(args[0].dtype), *args[1:])

    with ExitStack() as hooks:
        hooks.callback(source.register_forward_hook(put_on).remove)
        for name in pair.targets:
            target = model.get_submodule(name)
            hooks.callback(target.register_forward_pre_hook(take_off).remove)
        yield


def _unmoved(
    model: nn.Module, pairs: Sequence[Pair], batch: Any, before: list[torch.Tensor]
) -> bool:
    with ExitStack() as scales:
        for pair in pairs:
            scales.enter_context(_scaled(model, pair))
        after = tensors(run(model, batch))
    return len(after) == len(before) and all(map(torch.equal, after, before))


@torch.no_grad()
def divide(
    model: nn.Module, pair: Pair, scale: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The parameters, and their float64 values, after ``scale`` moved from source to targets."""
    source = model.get_submodule(pair.source)
    scale = scale.double()
    weight = source.get_parameter("weight")
    rows = scale[:, None] if type(source) is nn.Linear else scale
    new: list[tuple[torch.Tensor, torch.Tensor]] = [(weight, weight.double() / rows)]
    bias = bias_of(source)
    if bias is not None:
        new.append((bias, bias.double() / scale))
    for name in pair.targets:
        view = linear_weight(model.get_submodule(name))
        new.append((view, view.double() * pair.spread(scale)))
    return new
