"""Pre-LN transformers as Pre-RMSNorm ones (arXiv 2305.14858)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effinfer.fold.modules import (
    Transaction,
    bias_of,
    is_linear,
    linear_weight,
    run,
    sample,
    sharing_reasons,
    tensors,
)
from effinfer.fold.report import Folded, FoldReport, Refused
from effinfer.fold.scale import check_eval
from effinfer.ops.rms_norm import rms_norm


class BiasedRMSNorm(nn.Module):
    """``x / rms(x) * weight + bias``: what a LayerNorm does to a row whose mean is zero."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., channels) of any float type."""
        if x.dtype is torch.float64:  # no kernel takes it
            y = nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        else:
            y = rms_norm(x, self.weight, self.eps)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class ResidualStream:
    """All that writes the residual stream, and all norms that read it, by name."""

    writers: tuple[str, ...]
    norms: tuple[str, ...]


# Names of a backbone's embeddings and last norm, and of its blocks' writers and norms.
_FAMILIES = (
    # GPT-2
    (("wte", "wpe"), "ln_f", "h", ("attn.c_proj", "mlp.c_proj"), ("ln_1", "ln_2")),
    # GPT-NeoX, Pythia
    (
        ("embed_in",),
        "final_layer_norm",
        "layers",
        ("attention.dense", "mlp.dense_4h_to_h"),
        ("input_layernorm", "post_attention_layernorm"),
    ),
    # OPT
    (
        ("embed_tokens", "embed_positions"),
        "final_layer_norm",
        "layers",
        ("self_attn.out_proj", "fc2"),
        ("self_attn_layer_norm", "final_layer_norm"),
    ),
)


def find_stream(model: nn.Module) -> ResidualStream:
    """The residual stream of a Pre-LN family by the names of its modules.

    Raises:
        ValueError: no such names; give ``to_rms_norm`` a ``ResidualStream``.
    """
    names = {name for name, _ in model.named_modules()}
    for embeddings, last, blocks, writers, norms in _FAMILIES:
        for backbone in names:
            prefix = f"{backbone}." if backbone else ""
            wanted = {prefix + name for name in (*embeddings, last, blocks)}
            if not names.issuperset(wanted):
                continue
            each = [f"{prefix}{blocks}.{i}." for i in range(_length(model, prefix + blocks))]
            stream = ResidualStream(
                (*(prefix + e for e in embeddings), *(b + w for b in each for w in writers)),
                (*(b + n for b in each for n in norms), prefix + last),
            )
            if names.issuperset(stream.writers + stream.norms):
                return stream
    raise ValueError(
        f"to_rms_norm: {type(model).__name__} is no Pre-LN family known by its names; give a "
        "ResidualStream"
    )


def to_rms_norm(
    model: nn.Module,
    stream: ResidualStream | None = None,
    *,
    untie: bool = False,
    batch: Any = None,
) -> FoldReport:
    """Replace every LayerNorm on the residual stream by an RMSNorm, exactly.

    A LayerNorm ignores the mean of its input, so each writer (embedding or linear) may have its own
    mean over channels taken out of its weight and bias; the stream's mean is then zero, and LayerNorm
    and RMSNorm with the same eps, weight and bias agree. One pass over a row less for each norm.

    Args:
        model: in eval mode; changed in place, completely or not at all.
        stream: what writes and reads the stream; by default found by the names of common families.
        untie: give a writer that is tied (an embedding that is also the head) its own copy, and
            clear ``config.tie_word_embeddings``.
        batch: a forward's arguments to try the result on; transformers models need none.

    Returns:
        The norms replaced; or, in ``refused``, why the model was left as it was.

    Raises:
        ValueError: no stream given or found, a model in training mode.
    """
    check_eval(model)
    stream = stream or find_stream(model)
    batch = sample(model) if batch is None else batch
    report = FoldReport("to_rms_norm")
    reasons = _reasons(model, stream, untie)
    if not reasons:
        with torch.no_grad():
            reasons = _apply(model, stream, batch)
    if reasons:
        report.refused = [Refused("the residual stream", stream.norms, tuple(reasons))]
    else:
        report.folded = [Folded(norm, ()) for norm in stream.norms]
    return report


def _length(model: nn.Module, name: str) -> int:
    blocks = model.get_submodule(name)
    return len(blocks) if isinstance(blocks, nn.ModuleList) else 0


def _reasons(model: nn.Module, stream: ResidualStream, untie: bool) -> list[str]:
    reasons = []
    for name in stream.norms:
        norm = model.get_submodule(name)
        if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1:
            reasons.append(f"{name} ({type(norm).__name__}) is not a LayerNorm over channels")
    for name in stream.writers:
        writer = model.get_submodule(name)
        if not (is_linear(writer) or isinstance(writer, nn.Embedding)):
            reasons.append(f"{name} ({type(writer).__name__}) is neither a linear nor an embedding")
        elif not untie:
            reasons += sharing_reasons(model, name)
    if any(p.is_meta for p in model.parameters()):
        reasons.append("weights are on the meta device")
    return reasons


class _Refuse(Exception):
    """Carries a reason out of the transaction, which then puts everything back."""


def _apply(model: nn.Module, stream: ResidualStream, batch: Any) -> list[str]:
    before = tensors(run(model, batch))
    norms = {name: model.get_submodule(name) for name in stream.norms}
    tied = _untie(model, stream)
    try:
        with Transaction() as transaction:
            for name in stream.writers:
                _centre(model.get_submodule(name), transaction)
            for name, norm in norms.items():
                assert isinstance(norm, nn.LayerNorm)
                model.set_submodule(name, BiasedRMSNorm(norm))
            reason = _difference(model, stream, batch, before)
            if reason:
                raise _Refuse(reason)
    except BaseException as error:
        for name, norm in norms.items():
            model.set_submodule(name, norm)
        for module, parameter in tied:
            module.weight = parameter
        if isinstance(error, _Refuse):
            return [str(error)]
        raise
    config: Any = getattr(model, "config", None)
    if tied and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False
    return []


def _untie(model: nn.Module, stream: ResidualStream) -> list[tuple[nn.Module, nn.Parameter]]:
    """Own weights for tied writers; returns what they had."""
    tied = []
    for name in stream.writers:
        if sharing_reasons(model, name):
            writer = model.get_submodule(name)
            weight = writer.get_parameter("weight")
            tied.append((writer, weight))
            writer.weight = nn.Parameter(weight.clone(), requires_grad=weight.requires_grad)
    return tied


def _centre(writer: nn.Module, transaction: Transaction) -> None:
    """Take the mean over channels out of all the writer can write."""
    if isinstance(writer, nn.Embedding):
        weight = writer.weight.double()
        transaction.set(writer.weight, weight - weight.mean(1, keepdim=True))
        return
    view = linear_weight(writer)
    transaction.set(view, view.double() - view.double().mean(0, keepdim=True))
    bias = bias_of(writer)
    if bias is not None:
        transaction.set(bias, bias.double() - bias.double().mean())


def _difference(
    model: nn.Module, stream: ResidualStream, batch: Any, before: Sequence[torch.Tensor]
) -> str | None:
    """What is wrong with the result: a norm's input with a mean, or other outputs."""
    means: dict[str, float] = {}

    def watch(name: str, x: torch.Tensor) -> None:
        rows = x.double()
        means[name] = float(
            (rows.mean(-1).abs() / rows.square().mean(-1).sqrt().clamp_min(1e-30)).max()
        )

    with ExitStack() as hooks:
        for name in stream.norms:
            norm = model.get_submodule(name)
            hook = norm.register_forward_pre_hook(lambda _, args, n=name: watch(n, args[0]))
            hooks.callback(hook.remove)
        after = tensors(run(model, batch))
    # Rounding leaves some mean; a writer that was missed leaves one of the order of its own.
    allowed = 64 * torch.finfo(before[0].dtype).eps
    for name, mean in means.items():
        if not mean <= allowed:
            return f"the input of {name} has a mean of {mean:.1e} of its size: not all writers are known"
    for old, new in zip(before, after, strict=True):
        error = float((new.double() - old.double()).norm() / old.double().norm().clamp_min(1e-30))
        if not error <= 16 * allowed:
            return f"outputs would differ by {error:.1e}: something else reads the residual stream"
    return None
