"""What a Hugging Face model finds where it expects its cache: the launch's pages and slots.

The rows of a launch are given to the model as one sequence (1, T). Its attention layers come to
``update`` and then bring their keys and values when they ask for attention; patched state space
mixers bring their input to ``mix``. Both find each row's own sequence here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from effinfer.engine.batch import FIRST, ROWS, STATE_OUT, Batch
from effinfer.engine.hf_states import MixerWatch, StockMixer, run_segments
from effinfer.engine.kv import KVPages, StatePool
from effinfer.errors import UnsupportedModelError
from effinfer.nn import Mamba1Mixer
from effinfer.ops import paged_attention, rope_write, state_gather, state_scatter

_thread = threading.local()
_OWN_ATTENTION = "its attention is its own, not transformers' attention interface"


class LaunchCache(Cache):  # type: ignore[misc]
    """A cache that keeps nothing by itself; layers without pages or slots are refused."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._layer: int | None = None  # that came to update() last, and is to attend
        self._attended: dict[int, tuple[int, torch.Tensor]] = {}

    def __enter__(self) -> LaunchCache:
        _thread.cache = self
        return self

    def __exit__(self, *error: object) -> None:
        _thread.cache = None
        self._layer = None
        self._attended.clear()

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Only the layer's number counts: what is kept is what comes to the attention, which a model
        of latent attention expands from what it brings here."""
        if self._layer is not None:
            raise UnsupportedModelError(_OWN_ATTENTION)
        self._layer = layer_idx
        return key_states, value_states

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float,
    ) -> torch.Tensor:
        """Attention of query (1, H, T, D) over the sequences of the rows, to which key and value
        (1, KV heads, T, D) belong: (1, T, H, D)."""
        raise NotImplementedError

    def layer_of(self, key: torch.Tensor) -> tuple[int, bool]:
        """The layer whose keys these are, by the model's number, and whether they are new: False
        where a layer attends to the keys of one before it."""
        if self._layer is not None:
            layer, self._layer = self._layer, None
            self._attended[key.data_ptr()] = layer, key  # kept, so that no other lies there
            return layer, True
        if key.data_ptr() not in self._attended:
            raise UnsupportedModelError("an attention layer does not update the cache before")
        return self._attended[key.data_ptr()][0], False

    def mix(self, mixer: Any, hidden: torch.Tensor, direct: Any, norm: Any) -> torch.Tensor:
        """What a patched mixer does with its states: hidden (1, T, H) to the same."""
        raise NotImplementedError

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: how far a sequence is differs from row to row, and positions are given."""
        return 0

    def is_recording_past(self, layer_idx: int) -> bool:
        """False: what is flushed comes back from another slot."""
        return False

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedModelError("a layer keeps a state that no slot is for")

    update_indexer = _refuse


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function a runner puts into a model's configuration."""
    given = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
    if given:
        raise UnsupportedModelError(f"its attention takes {', '.join(given)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return current().attend(query, key, value, scale, sliding_window, softcap or 0.0), None


def current() -> LaunchCache:
    """The cache of the launch that runs in this thread."""
    cache: LaunchCache | None = _thread.__dict__.get("cache")
    if cache is None:
        raise RuntimeError("this model belongs to an engine's runner until that is closed")
    return cache


class ShapeRecorder(LaunchCache):
    """Notes what the model would keep; its attention and mixers give zeros.

    Attributes:
        heads: for each layer that keeps keys and values, by the model's number: heads, and the
            dimension of keys or values, whichever is larger.
        windows: the sliding window that each of these asked for; the longest of those who share them.
        mixers: the patched mixers, by the model's number.
        watch: finds the mixers that are not patched, and runs them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watch = MixerWatch()
        self.heads: dict[int, tuple[int, int]] = {}
        self.windows: dict[int, int | None] = {}
        self.mixers: dict[int, Any] = {}

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float,
    ) -> torch.Tensor:
        """Note the layer's shapes, and its window."""
        layer, new = self.layer_of(key)
        if new:
            self.heads[layer] = (key.shape[1], max(key.shape[3], value.shape[3]))
            self.windows[layer] = window
        elif self.windows[layer] is not None:  # as far as any that attends to these keys sees
            self.windows[layer] = None if window is None else max(window, self.windows[layer] or 0)
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Of a mixer that is not patched; this and the next three as ``Cache``'s."""
        return self.watch.states_of(layer_idx).get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """As ``get_conv_state``."""
        return self.watch.states_of(layer_idx).get_recurrent_state(layer_idx, state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> torch.Tensor:
        """As ``get_conv_state``."""
        states = self.watch.states_of(layer_idx)
        return states.update_conv_state(conv_states, layer_idx, state_idx, **options)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> torch.Tensor:
        """As ``get_conv_state``."""
        states = self.watch.states_of(layer_idx)
        return states.update_recurrent_state(recurrent_states, layer_idx, state_idx, **options)

    def check(self) -> None:
        """Raises UnsupportedModelError when a layer kept its keys, and attended in some other way."""
        if self._layer is not None:
            raise UnsupportedModelError(_OWN_ATTENTION)

    def mix(self, mixer: Any, hidden: torch.Tensor, direct: Any, norm: Any) -> torch.Tensor:
        """Note the mixer."""
        self.mixers[mixer.layer_idx] = mixer
        return torch.zeros_like(hidden)


def state_shapes(mixer: Any) -> list[tuple[int, ...]]:
    """The convolution's and the recurrent state of a patched mixer.

    The convolution's has a column more than is read: of 4 columns a step is twice as fast as of 3.
    """
    convolution = (mixer.conv1d.weight.shape[0], mixer.conv1d.weight.shape[-1])
    if isinstance(mixer, Mamba1Mixer):
        return [convolution, tuple(mixer.A_log.shape)]
    return [convolution, (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)]


@dataclass(frozen=True)
class _Group:
    """Segments of one length, as a batch."""

    rows: torch.Tensor  # int64
    whole: bool  # all rows of the launch, in order
    count: int
    length: int
    slots: torch.Tensor


def _groups(segments: np.ndarray[Any, Any], rows: int) -> list[_Group]:
    groups = []
    for length in np.unique(segments[:, ROWS]).tolist():
        chosen = segments[segments[:, ROWS] == length]
        at = (chosen[:, FIRST, None] + np.arange(length)).reshape(-1)
        groups.append(
            _Group(
                torch.from_numpy(at).long(),
                len(at) == rows,
                len(chosen),
                length,
                torch.from_numpy(np.ascontiguousarray(chosen[:, STATE_OUT])),
            )
        )
    return groups


class SlotCache(LaunchCache):
    """Pages and state slots of all layers, as one launch sees them.

    Args:
        pages: the attention layers' keys and values.
        pool: the mixers' states, two of each.
        attention_layers, mixer_layers: the model's numbers of these, in the order of ``pages`` and
            ``pool``.
        stock: the mixers that are not patched; their states follow in ``pool``.
    """

    def __init__(
        self,
        pages: KVPages,
        pool: StatePool,
        attention_layers: Sequence[int],
        mixer_layers: Sequence[int],
        stock: Sequence[StockMixer] = (),
    ) -> None:
        super().__init__()
        self._pages = {
            layer: (keys, values)
            for layer, keys, values in zip(attention_layers, pages.keys, pages.values, strict=True)
        }
        patched = pool.states[: 2 * len(mixer_layers)]
        pairs = zip(patched[::2], patched[1::2], strict=True)
        self._states = dict(zip(mixer_layers, pairs, strict=True))
        rest = iter(pool.states[len(patched) :])
        self._stock = {m.layer: [next(rest) for _ in m.states()] for m in stock}

    get_conv_state = update_conv_state = LaunchCache._refuse  # all were seen, and taken over
    get_recurrent_state = update_recurrent_state = LaunchCache._refuse

    def begin(self, batch: Batch) -> None:
        """Serve the rows of ``batch`` from now on."""
        self._batch = batch
        stateful = self._states or self._stock
        self._groups = _groups(batch.segments, batch.rows) if stateful else []

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float,
    ) -> torch.Tensor:
        """As ``LaunchCache.attend``; new keys and values are written to the rows' slots before."""
        layer, new = self.layer_of(key)
        batch, (keys, values) = self._batch, self._pages[layer]
        if new:
            self._write(keys, values, key, value)
        out: torch.Tensor = paged_attention(
            query[0].transpose(0, 1),
            keys[0, ..., : key.shape[3]],
            values[0, ..., : value.shape[3]],
            batch.block_table,
            batch.lines,
            batch.positions,
            scale=scale,
            window=window or 0,
            softcap=softcap,
        )
        return out.unsqueeze(0)

    def _write(
        self, keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Keys and values (1, H, T, D) into pages of heads of D or more numbers."""
        heads, size = keys.shape[-2:]
        count, narrowest = key.shape[2], min(key.shape[3], value.shape[3])
        new = key.new_empty if narrowest == size else key.new_zeros  # zeros beside narrow ones
        rows = new(count, 2 * heads, size)
        rows[:, :heads, : key.shape[3]] = key[0].transpose(0, 1)
        rows[:, heads:, : value.shape[3]] = value[0].transpose(0, 1)
        rope_write(
            rows.flatten(1),
            None,
            None,
            keys,
            values,
            self._batch.kv_slots,
            q_heads=0,
            kv_heads=heads,
        )

    def mix(self, mixer: Any, hidden: torch.Tensor, direct: Any, norm: Any) -> torch.Tensor:
        """As ``LaunchCache.mix``: segments of one length together."""
        hidden = hidden.contiguous()
        first = self._groups[0]
        if first.whole:
            output = self._run(
                first, mixer, hidden.view(first.count, first.length, -1), direct, norm
            )
            return output.view(hidden.shape)
        mixed = torch.empty_like(hidden)
        for group in self._groups:
            part = hidden[0].index_select(0, group.rows)
            part = part.view(group.count, group.length, -1)
            output = self._run(group, mixer, part, direct, norm)
            mixed[0].index_copy_(0, group.rows, output.flatten(0, 1))
        return mixed

    def run_stock(
        self,
        mixer: StockMixer,
        stock: Callable[..., Any],
        args: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Any:
        """The forward of a mixer that is not patched, segments of one length together."""
        pools = self._stock[mixer.layer]
        return run_segments(mixer, stock, args, options, self._groups, pools)

    def _run(
        self, group: _Group, mixer: Any, hidden: torch.Tensor, direct: Any, norm: Any
    ) -> torch.Tensor:
        """A mixer on (segments, length, H), whose states move on in their slots."""
        states = self._states[mixer.layer_idx]
        output: torch.Tensor
        if group.length == 1:
            if direct is None:
                output = mixer.step(hidden, *states, group.slots)
            else:
                output = mixer.direct_step(direct, hidden, *states, norm, group.slots)
            return output
        columns, ssm = (state_gather(pool, group.slots) for pool in states)
        before = columns[..., 1:], ssm
        # The bits of steps: where a prompt is cut, and which tokens were drafts, must not show.
        # Mamba-1's scan has them as it is.
        options = {} if isinstance(mixer, Mamba1Mixer) else {"one_by_one": True}
        if direct is None:
            output, columns, ssm = mixer.scan(hidden, *before, **options)
        else:
            output, columns, ssm = mixer.direct_scan(direct, hidden, *before, norm, **options)
        for pool, state in zip(states, (pad(columns, (1, 0)), ssm), strict=True):
            state_scatter(pool, group.slots, state)
        return output
