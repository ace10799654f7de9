"""Recurrent mixers that are not patched, run through their own code: Gated DeltaNet, short
convolutions and whatever else keeps its states in transformers' cache.

Such a mixer knows one batch of sequences of one length. In a launch it gets the segments of each
length as such a batch, and a cache that holds their states, gathered from the slots; what it leaves
there goes back. Prompts run as its own code runs them, so results are those of single steps up to
rounding, not to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from effinfer.errors import UnsupportedModelError
from effinfer.ops import state_gather, state_scatter

_MOST_STATES = 8  # of a kind that a mixer may number


@dataclass
class StockMixer:
    """A module that came to the cache for states of its layer."""

    module: nn.Module
    layer: int
    kept: LinearAttentionLayer = field(default_factory=lambda: LinearAttentionLayer(_MOST_STATES))

    def states(self) -> list[torch.Tensor]:
        """Those it keeps, ``(batch, ...)`` each: of convolutions, then recurrent."""
        return [*_there(self.kept.conv_states), *_there(self.kept.recurrent_states)]

    def shapes(self) -> list[tuple[int, ...]]:
        """Of a sequence's states."""
        return [tuple(state.shape[1:]) for state in self.states()]

    def continued(self, states: Sequence[torch.Tensor]) -> LinearAttentionLayer:
        """Transformers' cache of a layer, at these states; zeros are those of a fresh sequence."""
        layer = LinearAttentionLayer(_MOST_STATES)
        layer.device, layer.dtype = self.kept.device, self.kept.dtype
        layer.conv_kernel_size = dict(self.kept.conv_kernel_size)
        layer.has_previous_state = dict.fromkeys(range(_MOST_STATES), True)
        left = iter(states)
        for own, kept, ready in (
            (layer.conv_states, self.kept.conv_states, layer.is_conv_states_initialized),
            (
                layer.recurrent_states,
                self.kept.recurrent_states,
                layer.is_recurrent_states_initialized,
            ),
        ):
            for index, example in kept.items():
                if example is not None:
                    own[index] = next(left).to(example.dtype)
                    ready[index] = True
        return layer


def _there(states: dict[int, torch.Tensor | None]) -> list[torch.Tensor]:
    return [state for state in states.values() if state is not None]


class LayerStates(Cache):  # type: ignore[misc]
    """A cache of one layer's recurrent states, under the model's number of that layer."""

    def __init__(self, layer: int, states: LinearAttentionLayer) -> None:
        super().__init__(layers=[states])
        self._layer = layer

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """As ``Cache.get_conv_state``."""
        found: torch.Tensor | None = super().get_conv_state(self._own(layer_idx), state_idx)
        return found

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """As ``Cache.get_recurrent_state``."""
        found: torch.Tensor | None = super().get_recurrent_state(self._own(layer_idx), state_idx)
        return found

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> torch.Tensor:
        """As ``Cache.update_conv_state``."""
        own = self._own(layer_idx)
        state: torch.Tensor = super().update_conv_state(conv_states, own, state_idx, **options)
        return state

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> torch.Tensor:
        """As ``Cache.update_recurrent_state``."""
        own = self._own(layer_idx)
        state: torch.Tensor = super().update_recurrent_state(
            recurrent_states, own, state_idx, **options
        )
        return state

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """True: zeros are a state too."""
        return True

    def is_recording_past(self, layer_idx: int) -> bool:
        """False: what is flushed comes back from another slot."""
        return False

    def _own(self, layer: int) -> int:
        if layer != self._layer:
            raise UnsupportedModelError(
                f"layer {self._layer} keeps states under the number of layer {layer}"
            )
        return 0


class MixerWatch:
    """Finds the modules that come to a cache for states, by who runs at the time.

    Attributes:
        mixers: those found, by the model's number of their layer.
    """

    def __init__(self) -> None:
        self.mixers: dict[int, StockMixer] = {}
        self._running: list[nn.Module] = []
        self._hooks = ExitStack()

    def watch(self, model: nn.Module) -> ExitStack:
        """Note who runs, until the stack given is closed."""
        for module in model.modules():
            enter = module.register_forward_pre_hook(lambda one, _: self._running.append(one))
            leave = module.register_forward_hook(lambda *_: self._leave())
            self._hooks.callback(enter.remove)
            self._hooks.callback(leave.remove)
        return self._hooks

    def states_of(self, layer: int) -> LayerStates:
        """The states of the module that runs, which keeps those of ``layer``."""
        if not self._running:
            raise UnsupportedModelError(f"layer {layer} keeps states outside a module")
        mixer = self.mixers.setdefault(layer, StockMixer(self._running[-1], layer))
        if mixer.module is not self._running[-1]:
            raise UnsupportedModelError(f"several modules keep states of layer {layer}")
        return LayerStates(layer, mixer.kept)

    def _leave(self) -> None:
        self._running.pop()


def take_over_mixers(
    mixers: Sequence[StockMixer],
    current: Callable[[], Any],
    undo: ExitStack,
) -> None:
    """Have each mixer run segment by segment, while ``current()`` gives the launch's cache."""
    for mixer in mixers:
        _take_over(mixer, current, undo)


def _take_over(mixer: StockMixer, current: Callable[[], Any], undo: ExitStack) -> None:
    stock, own = mixer.module.forward, mixer.module.__dict__

    def forward(*args: Any, **options: Any) -> Any:
        return current().run_stock(mixer, stock, args, options)

    before = own.get("forward")
    own["forward"] = forward
    undo.callback(lambda: own.pop("forward") if before is None else own.update(forward=before))


def run_segments(
    mixer: StockMixer,
    stock: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
    groups: Sequence[Any],
    pools: Sequence[torch.Tensor],
) -> Any:
    """A mixer's forward for the rows of a launch.

    Args:
        mixer, stock: whose, and its own forward.
        args, options: for all rows (1, T, ...), as the model gives them.
        groups: the segments, by length; together they are all rows.
        pools: the slots of each of its states.

    Returns:
        What the forward gives, for all rows.
    """
    parts = []
    for group in groups:
        layer = mixer.continued([state_gather(pool, group.slots) for pool in pools])
        cache = LayerStates(mixer.layer, layer)

        def part(value: Any, group: Any = group, cache: Any = cache) -> Any:
            if isinstance(value, Cache):
                return cache
            if isinstance(value, torch.Tensor):
                rows = value[0].index_select(0, group.rows)
                return rows.view(group.count, group.length, *value.shape[2:])
            return value

        result = stock(*map(part, args), **{name: part(value) for name, value in options.items()})
        parts.append(result)
        kept = [*_there(layer.conv_states), *_there(layer.recurrent_states)]
        for pool, state in zip(pools, kept, strict=True):
            state_scatter(pool, group.slots, state.to(pool.dtype))
    if isinstance(parts[0], torch.Tensor):
        return _joined(parts, groups)
    return tuple(_joined(column, groups) for column in zip(*parts, strict=True))


def _joined(parts: Sequence[Any], groups: Sequence[Any]) -> Any:
    """Rows (1, T, ...) from those of each group (segments, length, ...); others must be None."""
    if all(part is None for part in parts):
        return None
    total = sum(group.count * group.length for group in groups)
    out = parts[0].new_empty(1, total, *parts[0].shape[2:])
    for part, group in zip(parts, groups, strict=True):
        out[0].index_copy_(0, group.rows, part.flatten(0, 1))
    return out
