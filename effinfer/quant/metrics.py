"""How much a layer matters: the scores behind :func:`effinfer.plan_bits`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from effinfer.fold.modules import tensors
from effinfer.quant.calibrate import Batch
from effinfer.quant.layers import Layer, is_conv1d
from effinfer.quant.relevance import relevance

SAMPLED_ROWS = 512  # inputs kept per layer: enough for an error's size and a Gram matrix
OMPQ_BETA = 1.0

Loss = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], torch.Tensor]
Rows = dict[str, torch.Tensor]


def z_score_distribution(model: nn.Module, names: Sequence[str]) -> dict[str, float]:
    """1 - ZD, with ZD the share of a layer's weights more than one standard deviation above their
    mean (arXiv 2406.17415): the fewer there are, the longer the tail, the more the layer matters."""
    scores = {}
    for name in names:
        weight = model.get_submodule(name).get_parameter("weight").detach().float()
        deviation = weight.std(correction=0)
        above = (weight - weight.mean() > deviation) if deviation > 0 else torch.zeros(1)
        scores[name] = 1 - float(above.float().mean())
    return scores


def input_modification(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch]
) -> dict[str, float]:
    """1 + LIM, with LIM minus the cosine of a block's input and output (arXiv 2406.17415).

    The block is the innermost member of a ``ModuleList`` or ``Sequential`` around the layer; where it
    has none, or its output has another width, input and output count as orthogonal.
    """
    blocks = {name: _block_around(model, name) for name in names}
    cosines: dict[str, list[float]] = {block: [] for block in blocks.values() if block}

    def watch(block: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x, y = tensors((args, kwargs)), tensors(output)
        if x and y and x[0].shape == y[0].shape:
            cosine = F.cosine_similarity(x[0].double(), y[0].double(), dim=-1)
            cosines[block].append(float(cosine.mean()))

    with ExitStack() as hooks, torch.no_grad():
        for block in cosines:
            hook = model.get_submodule(block).register_forward_hook(
                lambda _, args, kwargs, output, b=block: watch(b, args, kwargs, output),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        for args, kwargs in batches:
            model(*args, **kwargs)
    mean = {block: sum(values) / len(values) for block, values in cosines.items() if values}
    return {name: 1 - (mean.get(block, 0.0) if block else 0.0) for name, block in blocks.items()}


def orthogonality(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch]
) -> dict[str, float]:
    """``exp(-beta * mean over j of ORM_ij)`` with ``ORM_ij`` the likeness of what layers i and j
    compute, ``<K_i, K_j> / (|K_i| |K_j|)`` of the centred Gram matrices ``K`` of their outputs (OMPQ,
    arXiv 2109.07865): a layer like no other matters most.

    The mean where the paper has the sum, so that beta (1 here) does not depend on depth. Only layers
    that see as many rows as most do are compared: not a pooler, not an expert.
    """
    with torch.no_grad():
        outputs = sampled_rows(model, names, batches, of_outputs=True)
    if not outputs:
        return {}
    (usual, _), *_ = Counter(map(len, outputs.values())).most_common()
    alike = [name for name, rows in outputs.items() if len(rows) == usual]
    grams = []
    for name in alike:
        centred = outputs[name] - outputs[name].mean(0)
        gram = (centred @ centred.T).flatten().double()
        grams.append(gram / gram.norm().clamp_min(1e-30))
    orm = torch.stack(grams) @ torch.stack(grams).T
    likeness = (orm.sum(1) - orm.diagonal()) / max(len(alike) - 1, 1)
    theta = torch.exp(-OMPQ_BETA * likeness)
    mean = float(theta.mean())
    return dict.fromkeys(names, mean) | dict(zip(alike, theta.tolist(), strict=True))


def layer_scores(
    metric: str, model: nn.Module, names: Sequence[str], batches: Sequence[Batch]
) -> dict[str, float]:
    """The score of each layer, 0 or more, by "lim", "zd", "ompq" or "lrp".

    A layer that is never called (an expert no token took, a weight multiplied by hand) has the mean
    score of the others.
    """
    if metric == "zd":
        return z_score_distribution(model, names)
    by_metric = {"lim": input_modification, "ompq": orthogonality, "lrp": relevance}
    scores = by_metric[metric](model, names, batches)
    if not scores:
        raise ValueError("plan_bits: the calibration reaches no layer")
    mean = sum(scores.values()) / len(scores)
    return dict.fromkeys(names, mean) | scores


def sampled_rows(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch], *, of_outputs: bool = False
) -> Rows:
    """Up to about ``SAMPLED_ROWS`` rows (float32) of each layer's inputs, or outputs: evenly spaced,
    the same positions in every layer. Layers that are never called have none."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    each = -(-SAMPLED_ROWS // max(len(batches), 1))

    def keep(name: str, x: torch.Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        parts[name].append(rows[:: -(-len(rows) // each) or 1].float())

    with ExitStack() as hooks, torch.no_grad():
        for name in names:
            hook = model.get_submodule(name).register_forward_hook(
                lambda _, args, output, n=name: keep(n, output if of_outputs else args[0])
            )
            hooks.callback(hook.remove)
        for args, kwargs in batches:
            model(*args, **kwargs)
    return {name: torch.cat(rows) for name, rows in parts.items() if rows}


def relative_error(
    weight: torch.Tensor, quantized: torch.Tensor, inputs: torch.Tensor | None
) -> float:
    """``|X (W - Q)^T|^2 / |X W^T|^2``, or of the weights alone without inputs."""
    weight, off = weight.detach().float(), weight.detach().float() - quantized
    if inputs is not None:
        weight, off = inputs @ weight.T, inputs @ off.T
    size = float(weight.double().square().sum())
    return float(off.double().square().sum()) / size if size > 0 else 0.0


class LossIncrease:
    """The calibration loss of the model as it is, and with one weight replaced.

    The loss is, the first that applies: ``loss(output, args, kwargs)`` as given; the model's own ``loss``
    where batches have labels; the cross-entropy of the next token for a model that generates; the
    squared relative error of the outputs, where ``attention_mask`` counts them.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], loss: Loss | None) -> None:
        self._model, self._batches, self._given = model, batches, loss
        with torch.no_grad():
            outputs = self._outputs()
        self._references = [tensors(output)[0] for output in outputs]
        self._before = self._mean(outputs)

    def with_weight(self, layer: Layer, weight: torch.Tensor) -> float:
        """Loss with ``weight`` ``(N, K)`` in a layer of the model, minus the loss without: the mean
        over the rounding error and its negative.

        The part of the increase that is linear in the error cancels. On a small calibration set it
        outweighs the rest, with a sign that says nothing about other data.
        """
        mirrored = 2 * layer.weight.float() - weight
        losses = []
        for changed in (weight, mirrored):
            with torch.no_grad(), _replaced(layer.module, changed):
                losses.append(self._mean(self._outputs()))
        return sum(losses) / 2 - self._before

    def _outputs(self) -> list[Any]:
        return [self._model(*args, **kwargs) for args, kwargs in self._batches]

    def _mean(self, outputs: Sequence[Any]) -> float:
        losses = [
            float(self._loss(*case))
            for case in zip(outputs, self._batches, self._references, strict=True)
        ]
        return sum(losses) / len(losses)

    def _loss(self, output: Any, batch: Batch, reference: torch.Tensor) -> torch.Tensor:
        args, kwargs = batch
        if self._given is not None:
            return self._given(output, args, kwargs)
        fields: Mapping[str, Any] = output if isinstance(output, Mapping) else {}
        if fields.get("loss") is not None:
            loss: torch.Tensor = fields["loss"]
            return loss
        ids = kwargs.get("input_ids", args[0] if args else None)
        generates = getattr(self._model, "can_generate", lambda: False)()
        if generates and "logits" in fields and ids is not None:
            logits = fields["logits"][:, :-1].flatten(0, 1).float()
            return F.cross_entropy(logits, ids[:, 1:].flatten())
        off, reference = (tensors(output)[0] - reference).double(), reference.double()
        mask = kwargs.get("attention_mask")
        if mask is not None and off.shape[: mask.dim()] == mask.shape:
            off, reference = off[mask.bool()], reference[mask.bool()]
        return off.square().sum() / reference.square().sum().clamp_min(1e-30)


@contextmanager
def _replaced(module: nn.Module, weight: torch.Tensor) -> Iterator[None]:
    """Another weight in this module alone, also where its own is tied to others."""
    own = module._parameters["weight"]
    assert own is not None
    if is_conv1d(module):
        weight = weight.t()
    module._parameters["weight"] = nn.Parameter(weight.to(own.dtype), requires_grad=False)
    try:
        yield
    finally:
        module._parameters["weight"] = own


def _block_around(model: nn.Module, name: str) -> str | None:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        parent = model.get_submodule(".".join(parts[: length - 1]))
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            return ".".join(parts[:length])
    return None
