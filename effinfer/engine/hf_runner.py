"""Runs Hugging Face causal LMs through their own modules, with sequences in pages and slots.

All rows of a launch go through the model as one sequence (1, T) with their positions; what joins a
row to its own sequence is the cache (hf_cache.py) and an attention function in a copy of the model's
configuration. Before a model is taken, a few tokens in pieces are compared with one forward of the
whole: a model that does something else with its past is refused.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from effinfer.engine.batch import STATE_IN, STATE_OUT, Batch, Span
from effinfer.engine.hf_cache import ShapeRecorder, SlotCache, attention, current, state_shapes
from effinfer.engine.hf_experts import take_over_experts
from effinfer.engine.hf_rowwise import take_over_products
from effinfer.engine.hf_states import take_over_mixers
from effinfer.engine.kv import KVPages, StatePool
from effinfer.engine.released import release_patched_linears
from effinfer.engine.runner import BLOCK_SIZE, Room, RunnerSpec
from effinfer.errors import UnsupportedModelError
from effinfer.patch import Patched, unpatch
from effinfer.patch import patch as patch_model

ATTENTION = "effinfer_paged"
_UNBOUNDED = 1 << 20  # positions of a model without a limit of its own
_held: weakref.WeakSet[Any] = weakref.WeakSet()  # models that a runner has changed
# How far logits in pieces may be from those of one forward, relative to the largest.
_BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class HFRunner:
    """A ``Runner`` on a Hugging Face causal LM."""

    def __init__(
        self,
        model: Any,
        *,
        kv_dtype: torch.dtype | None = None,
        patch: bool = True,
        release: bool = False,
    ) -> None:
        reasons = list(_reasons(model))
        if reasons:
            raise UnsupportedModelError(_message(model, reasons))
        self._model = model
        self._configs: list[tuple[Any, Any]] = []
        self._undo = ExitStack()
        self._release = release
        names = inspect.signature(type(model).forward).parameters
        self._cache_name = "cache_params" if "cache_params" in names else "past_key_values"
        self._options = {name for name in ("position_ids", "logits_to_keep") if name in names}
        self._patched = patch and not any(isinstance(m, Patched) for m in model.modules())
        _held.add(model)
        try:
            if self._patched:
                patch_model(model)
            self._examine(kv_dtype)
        except BaseException as error:
            self.close()
            if isinstance(error, UnsupportedModelError):
                raise UnsupportedModelError(_message(model, [str(error)])) from error
            if isinstance(error, Exception) and not isinstance(error, MemoryError):
                what = f"a few tokens in it raise {type(error).__name__}: {error}"
                raise UnsupportedModelError(_message(model, [what])) from error
            raise

    def _examine(self, kv_dtype: torch.dtype | None) -> None:
        """Find out what the model keeps for a sequence, and that it can be kept in pieces."""
        model, config = self._model, self._model.config.get_text_config()
        tokens = _probe_tokens(config)
        whole = self._forward(tokens, None, None)
        self._take_over()
        recorder = ShapeRecorder()
        with recorder, recorder.watch.watch(model):
            self._forward(tokens, torch.arange(tokens.shape[1])[None], recorder)
            recorder.check()
        self._attention_layers = sorted(recorder.heads)
        self._heads = [recorder.heads[layer] for layer in self._attention_layers]
        self._mixer_layers = sorted(recorder.mixers)
        shapes = [state_shapes(recorder.mixers[layer]) for layer in self._mixer_layers]
        self._shapes = [shape for pair in shapes for shape in pair]
        self._stock = list(recorder.watch.mixers.values())
        self._shapes += [shape for mixer in self._stock for shape in mixer.shapes()]
        take_over_mixers(self._stock, current, self._undo)
        dtype = next(model.parameters()).dtype
        self._kv_dtype = dtype if kv_dtype is None else kv_dtype
        windows = [recorder.windows.get(layer) for layer in self._attention_layers]
        reasons = list(_window_reasons(config, self._attention_layers, windows))
        if self._heads and "position_ids" not in self._options:
            reasons.append("its forward takes no position_ids")
        if reasons:
            raise UnsupportedModelError("; ".join(reasons))
        self.spec = RunnerSpec(
            vocab_size=whole.shape[-1],
            max_positions=getattr(config, "max_position_embeddings", None) or _UNBOUNDED,
            loops=1,
            r_min=1,
            kv_policy="depth",
            has_kv=bool(self._heads),
            has_state=bool(self._shapes),
            block_size=BLOCK_SIZE,
            bytes_per_block=KVPages.bytes_per_block(self._heads, 1, BLOCK_SIZE, self._kv_dtype),
            bytes_per_state=StatePool.bytes_per_slot(self._shapes),
            dtype=dtype,
            window=None if None in windows else max((w for w in windows if w), default=None),
        )
        self._compare(tokens[0].tolist(), whole, dtype)

    def _take_over(self) -> None:
        """Copies of the configurations in all modules, with our attention function in them; and
        what torch computes by the number of rows replaced."""
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, attention)
        copies: dict[int, Any] = {}
        for module in self._model.modules():
            own = module.__dict__.get("config")
            if own is None or not hasattr(own, "_attn_implementation"):
                continue
            if id(own) not in copies:
                copies[id(own)] = copy.deepcopy(own)
                copies[id(own)]._attn_implementation = ATTENTION
                copies[id(own)]._experts_implementation = "eager"  # where it stays the model's code
            self._configs.append((module, own))
            module.config = copies[id(own)]
        with torch.inference_mode(False), torch.no_grad():
            take_over_experts(self._model, self._undo)
            take_over_products(self._model, self._undo)
            if self._release:
                release_patched_linears(self._model, self._undo)

    def _compare(self, tokens: list[int], whole: torch.Tensor, dtype: torch.dtype) -> None:
        """Run ``tokens`` in pieces, two sequences at a time, against the logits of one forward."""
        size, count = BLOCK_SIZE, len(tokens)
        per_line = -(-count // size)
        self.allocate(blocks=2 * per_line, states=3, max_rows=2 * count, max_slots=2)
        table = np.arange(2 * per_line, dtype=np.int32).reshape(2, per_line)
        got = torch.zeros_like(whole).repeat(2, 1, 1)
        edges = [0, 1, count // 2, count - 1, count]
        for step in range(len(edges)):
            spans = []
            for line in (0, 1):  # the second sequence a piece behind the first
                if 0 <= step - line < len(edges) - 1:
                    start, stop = edges[step - line : step - line + 2]
                    state = line if start else -1
                    spans.append(Span(tokens[start:stop], start, 0, line, state, line))
            rows = sum(len(span.tokens) for span in spans)
            logits = self.launch(Batch.of_spans(spans, table, size, wanted=range(rows)))
            assert logits is not None
            pieces = torch.split(logits, [len(span.tokens) for span in spans])
            for span, piece in zip(spans, pieces, strict=True):
                got[span.line, span.start : span.start + len(span.tokens)] = piece
        self._cache: SlotCache | None = None
        error = float((got - whole).abs().max() / whole.abs().max())
        if not error <= _BOUNDS[dtype]:
            raise UnsupportedModelError(
                f"its logits of a sequence in pieces are {error:.2g} from those of one forward: "
                "it keeps its past, or its positions, in a way of its own"
            )

    def allocate(
        self, *, blocks: int, states: int, max_rows: int, max_slots: int, arena_rows: int = 0
    ) -> None:
        """As ``Runner.allocate``."""
        self.room = Room(blocks, states, max_rows, max_slots)
        with torch.inference_mode(False), torch.no_grad():
            self._pages = KVPages(
                self._heads, planes=1, blocks=blocks, block_size=BLOCK_SIZE, dtype=self._kv_dtype
            )
            self._pool = StatePool(self._shapes, states if self._shapes else 0)
        self._cache = SlotCache(
            self._pages, self._pool, self._attention_layers, self._mixer_layers, self._stock
        )

    def launch(self, batch: Batch) -> torch.Tensor | None:
        """As ``Runner.launch``."""
        if batch.rows == 0:
            return None
        cache = self._cache
        assert cache is not None, "allocate() comes before launch()"
        if self.spec.has_state:
            self._move_states(batch.segments)
        with cache:
            cache.begin(batch)
            # A launch without wanted rows still gives one row to the head, which is no special case.
            wanted = batch.wanted.long() if batch.n_wanted else torch.zeros(1, dtype=torch.long)
            positions = batch.positions.long()[None]
            logits = self._forward(batch.tokens.long()[None], positions, cache, wanted)
        return logits[0] if batch.n_wanted else None

    def _move_states(self, segments: np.ndarray[Any, Any]) -> None:
        """Each segment's state into the slot it is to end in."""
        fresh = segments[:, STATE_IN] < 0
        moved = ~fresh & (segments[:, STATE_IN] != segments[:, STATE_OUT])
        self._pool.clear(torch.from_numpy(np.ascontiguousarray(segments[fresh, STATE_OUT])))
        self._pool.copy(segments[moved][:, [STATE_IN, STATE_OUT]])

    def _forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None,
        cache: Any,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Float32 logits (1, T or wanted, vocab)."""
        options: dict[str, Any] = {self._cache_name: cache, "use_cache": cache is not None}
        if positions is not None and "position_ids" in self._options:
            options["position_ids"] = positions
        keeps = wanted is not None and "logits_to_keep" in self._options
        if keeps:
            options["logits_to_keep"] = wanted
        with torch.inference_mode():
            logits: torch.Tensor = self._model(tokens, **options).logits
            if wanted is not None and not keeps:
                logits = logits[:, wanted]
            return logits.float()

    def propagate(self, exits: np.ndarray[Any, Any]) -> None:
        """Nothing exits here."""
        raise UnsupportedModelError("keys and values of skipped loops: the model is not recursive")

    def copy_states(self, pairs: np.ndarray[Any, Any]) -> None:
        """As ``Runner.copy_states``."""
        self._pool.copy(pairs)

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        """No hidden states wait between loops here."""
        raise UnsupportedModelError("hidden states between loops: the model is not recursive")

    def poison(self) -> None:
        """As ``Runner.poison``."""
        self._pages.poison()
        self._pool.poison()

    def close(self) -> None:
        """Give the model its configurations and weights back, and its stock modules if it was patched
        here."""
        _held.discard(self._model)
        self._undo.close()
        for module, config in self._configs:
            module.config = config
        self._configs = []
        if self._patched:
            unpatch(self._model)
            self._patched = False


def _message(model: Any, reasons: list[str]) -> str:
    return f"no runner for {type(model).__name__}: " + "; ".join(reasons)


def _reasons(model: Any) -> Iterator[str]:
    """Why the model cannot be tried."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "_attn_implementation"):
        yield "it is not a Hugging Face causal LM"
        return
    if model.get_output_embeddings() is None:
        yield "it has no head that gives logits of tokens: load it with AutoModelForCausalLM"
    if model in _held:
        yield "another engine runs it: close that one first, or use it for these requests too"
    if getattr(config, "is_encoder_decoder", False):
        yield "it is an encoder-decoder"
    if model.training:
        yield "it is in training mode: call model.eval()"
    for name, weight in model.named_parameters():
        if not weight.is_cpu:
            yield f"{name} is on {weight.device}, and this runner is for the CPU"
            break
    if next(model.parameters()).dtype not in _BOUNDS:
        yield f"its weights are {next(model.parameters()).dtype}"
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    for kind in sorted(_rope_types(rope)):
        if kind in ("dynamic", "longrope"):
            yield f"its rope type {kind} makes angles depend on the rows beside"


def _rope_types(rope: Any) -> set[str]:
    """The rope types in a configuration, which has one or one for each kind of layer."""
    if not isinstance(rope, dict):
        return set()
    if isinstance(rope.get("rope_type"), str):
        return {rope["rope_type"]}
    return set().union(*map(_rope_types, rope.values()))


def _window_reasons(config: Any, layers: list[int], windows: list[int | None]) -> Iterator[str]:
    """Whether layers that the configuration gives a window asked for it."""
    kinds = getattr(config, "layer_types", None) or []
    if "chunked_attention" in kinds:
        yield "it has chunked attention"
    size = getattr(config, "sliding_window", None)
    if size is not None and size >= (getattr(config, "max_position_embeddings", None) or size + 1):
        return  # it never cuts anything off
    everywhere = not kinds and size is not None
    wrong = [
        str(layer)
        for layer, window in zip(layers, windows, strict=True)
        if window is None
        and (everywhere or kinds[layer : layer + 1] in (["sliding_attention"], ["hybrid_sliding"]))
    ]
    if wrong:
        yield f"layers {', '.join(wrong)} have a sliding window that their attention is not told of"


def _probe_tokens(config: Any) -> torch.Tensor:
    """A few tokens, more than a small window's."""
    window = getattr(config, "sliding_window", None) or 0
    count = window + 8 if window <= 64 else 12
    count = min(count, getattr(config, "max_position_embeddings", None) or count)
    vocab = int(config.vocab_size)
    return torch.arange(count)[None] * 7 % max(vocab - 1, 1) + min(1, vocab - 1)
