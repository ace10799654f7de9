"""What layers are given: ``X^T X`` of their inputs over some texts or batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Batch = tuple[tuple[Any, ...], dict[str, Any]]  # what the model is called with
TOKENS = 512  # of a text in one call


@dataclass
class InputStatistics:
    """``hessian`` = ``X^T X`` ``(K, K)`` float32 over ``rows`` rows of a layer's input."""

    hessian: torch.Tensor
    rows: int = 0


def as_batches(model: nn.Module, data: Any, tokenizer: Any = None) -> list[Batch]:
    """Calls of ``model`` from calibration data: texts, tensors, tuples of arguments or mappings.

    Texts are cut into pieces of 512 tokens by ``tokenizer``, by default the one in the folder that
    the model was loaded from.

    Raises:
        ValueError, TypeError: no data, or of no such kind, or texts without a tokenizer.
    """
    if isinstance(data, (str, torch.Tensor, Mapping)):
        data = [data]
    if not isinstance(data, Iterable):
        raise TypeError(f"quantize_: calibration must hold texts or batches, got {data!r:.80}")
    batches: list[Batch] = []
    for item in data:
        if isinstance(item, str):
            tokenizer = tokenizer or _own_tokenizer(model)
            ids = tokenizer(item, return_tensors="pt")["input_ids"]
            device = next(model.parameters()).device
            batches += [((), {"input_ids": piece.to(device)}) for piece in ids.split(TOKENS, dim=1)]
        elif isinstance(item, torch.Tensor):
            batches.append(((item,), {}))
        elif isinstance(item, Mapping):
            batches.append(((), dict(item)))
        elif isinstance(item, (tuple, list)):
            batches.append((tuple(item), {}))
        else:
            raise TypeError(
                "quantize_: calibration must hold texts, tensors, mappings or tuples of arguments, "
                f"got {type(item).__name__}"
            )
    batches = [b for b in batches if not any(_is_empty(v) for v in (*b[0], *b[1].values()))]
    if not batches:
        raise ValueError("quantize_: calibration is empty")
    return batches


def _is_empty(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 0


def _own_tokenizer(model: nn.Module) -> Any:
    folder = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"quantize_: calibration texts need a tokenizer, and {folder or 'the model'!r} has none "
            f"here ({type(error).__name__}); pass tokenizer="
        ) from error


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    advance: Callable[[], None] = lambda: None,
) -> dict[str, InputStatistics]:
    """Run ``batches`` through ``model`` and sum up what each of ``layers`` is called with.

    No activation outlives its call. Layers that are given the very same tensor share its product.

    Args:
        model: in eval mode.
        layers: by name, all of them called with one tensor ``(..., K)``.
        advance: called after every batch.

    Raises:
        ValueError: a layer was given NaN or infinity.
    """
    found: dict[str, InputStatistics] = {}
    last: list[Any] = [None, None]  # an input and its product

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if last[0] is not x:
                rows = x.detach().reshape(-1, x.shape[-1]).float()
                last[:] = x, rows.t() @ rows
            statistics = found.get(name)
            if statistics is None:
                statistics = found[name] = InputStatistics(torch.zeros_like(last[1]))
            statistics.hessian += last[1]
            statistics.rows += x.shape[:-1].numel()

        return hook

    handles = [
        layer.register_forward_pre_hook(hook_for(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with torch.inference_mode():
            for args, kwargs in batches:
                model(*args, **kwargs)
                last[:] = None, None
                advance()
    finally:
        for handle in handles:
            handle.remove()
    for name, statistics in found.items():
        if not bool(statistics.hessian.isfinite().all()):
            raise ValueError(f"quantize_: calibration gave layer {name} NaN or infinity")
    return found


def in_groups(sizes: Mapping[str, int], budget: int) -> list[list[str]]:
    """Names in order, in runs whose ``sizes`` add up to at most ``budget``, or of one name."""
    runs: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not runs or size > room:
            runs.append([])
            room = budget
        runs[-1].append(name)
        room -= size
    return runs
