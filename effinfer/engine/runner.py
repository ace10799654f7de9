"""What the engine runs: a model behind one call that takes rows of any sequences at any depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from effinfer.engine.batch import Batch

BLOCK_SIZE = 16


@dataclass(frozen=True)
class RunnerSpec:
    """What the engine must know of a model to schedule and to divide its memory.

    Attributes:
        vocab_size: columns of the logits.
        max_positions: positions a sequence may have.
        loops: R, how often the block runs for a token; 1 for a model that is not recursive.
        r_min: loops every token runs.
        kv_policy: "depth": each loop has its own keys and values; "first": those of loop 0.
        has_kv, has_state: whether sequences need blocks, and state slots.
        block_size: positions in a block.
        bytes_per_block, bytes_per_state: what a block and a state slot take, in all layers.
        dtype: of hidden states.
        window: positions back that every layer sees at most; None where one sees all.
    """

    vocab_size: int
    max_positions: int
    loops: int
    r_min: int
    kv_policy: str
    has_kv: bool
    has_state: bool
    block_size: int
    bytes_per_block: int
    bytes_per_state: int
    dtype: torch.dtype
    window: int | None


@dataclass(frozen=True)
class Room:
    """What ``Runner.allocate`` was asked for."""

    blocks: int
    states: int
    max_rows: int
    max_slots: int


class Runner(Protocol):
    """A model whose sequences live in blocks and slots that the caller hands out.

    One thread drives it. In float32, and where the model's parts are effinfer's, a row's logits
    have the same bits whatever else is in the launch.
    """

    spec: RunnerSpec
    room: Room  # once allocated

    def allocate(
        self, *, blocks: int, states: int, max_rows: int, max_slots: int, arena_rows: int = 0
    ) -> None:
        """Make room: KV blocks, state slots, launches of ``max_rows`` rows, ``max_slots`` lines of
        the block table, and ``arena_rows`` rows that wait between two loops (default:
        ``max_rows``)."""

    def launch(self, batch: Batch) -> torch.Tensor | None:
        """Run every row through its loop; float32 logits ``(wanted, vocab)``, None where none are
        wanted. They are overwritten by the next launch.

        When it raises before the logits, hidden states between loops are as they were, and the rows
        may be launched again, all or some."""

    def propagate(self, exits: np.ndarray[Any, Any]) -> None:
        """Write the keys and values that early exits owe, from the hidden states they had: all loops
        from the first that a row skipped (Depth-Adaptive Transformer, arXiv 1910.10073).

        Args:
            exits: int32 ``(n, 5)``: hidden-arena row, position, line, slot of keys and values, first
                loop skipped.
        """

    def copy_states(self, pairs: np.ndarray[Any, Any]) -> None:
        """Copy state slots: int32 ``(n, 2)``, from and to."""

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        """The hidden states ``(n, hidden)`` of arena rows (n,) int32 after their last loop."""

    def poison(self) -> None:
        """Fill all memory of sequences with NaN, for tests."""

    def close(self) -> None:
        """Give back memory and undo whatever was changed on the model."""


def make_runner(
    model: nn.Module,
    *,
    kv_dtype: torch.dtype | None = None,
    patch: bool = True,
    release_weights: bool = False,
) -> Runner:
    """The fastest runner that can run ``model``.

    Recursive models and llama-like ones (llama, mistral, qwen2, qwen3) run as few native calls per
    layer from packed copies of their weights, taken now. Other Hugging Face causal LMs run through
    their own modules.

    Args:
        model: a causal LM in eval mode, on the CPU.
        kv_dtype: of cached keys and values; None for the model's.
        patch: patch a model that runs through its own modules and is not patched yet, and restore it
            in ``close()``. State space models need it.
        release_weights: packed weights take the place of the model's own until ``close()``, as those of
            experts always do: the model is then of no other use meanwhile.

    Raises:
        UnsupportedModelError: neither can; the message names each reason.
    """
    from effinfer.engine.decoder_model import DecoderModel, describe
    from effinfer.engine.decoder_runner import DecoderRunner
    from effinfer.engine.hf_runner import HFRunner

    described = describe(model)
    if isinstance(described, DecoderModel):
        return DecoderRunner(described, kv_dtype=kv_dtype, release=release_weights)
    return HFRunner(model, kv_dtype=kv_dtype, patch=patch, release=release_weights)
