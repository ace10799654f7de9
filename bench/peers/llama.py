"""llama.cpp through llama-cpp-python's low-level interface."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.common import PeerUnavailable, peers_dir

UBATCH = 512  # llama.cpp's own default


def load_llama_cpp() -> Any:
    peers_dir()
    try:
        import llama_cpp
    except ImportError as error:
        raise PeerUnavailable(f"llama_cpp does not import: {error}") from error
    return llama_cpp


class LlamaModel:
    """One context over a GGUF file; `sequences` of them decode in one llama_batch."""

    def __init__(self, path: Path, threads: int, sequences: int = 1, *, mmap: bool = True) -> None:
        self.api = load_llama_cpp()
        self._quiet = self.api.llama_log_callback(lambda *_: None)
        self.api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self.api.llama_backend_init()
        settings = self.api.llama_model_default_params()
        settings.use_mmap = mmap
        self.model = self.api.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp refuses {path}")
        self.threads, self.sequences = threads, sequences
        self.vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))

    def open(self) -> LlamaModel:
        """Creates the context: compute buffers and states."""
        settings = self.api.llama_context_default_params()
        settings.n_ctx = 4096 * self.sequences
        settings.n_batch, settings.n_ubatch = 2048, UBATCH
        settings.n_seq_max = self.sequences
        settings.n_threads = settings.n_threads_batch = self.threads
        self.context = self.api.llama_init_from_model(self.model, settings)
        self.batch = self.api.llama_batch_init(2048, 0, 1)
        self.position = 0
        return self

    def prefill(self, ids: list[int]) -> np.ndarray:
        """A fresh run over `ids` as sequence 0; the logits of its last token."""
        self._forget()
        last = len(ids) - 1
        self._decode([(token, i, 0, i == last) for i, token in enumerate(ids)])
        self.position = len(ids)
        return self._logits(last, 1)[0]

    def start(self, ids: list[list[int]]) -> list[int]:
        """Prefills one prompt a sequence, all of one length; each one's most likely next token."""
        self._forget()
        tokens = []
        for sequence, row in enumerate(ids):
            self._decode([(t, i, sequence, i == len(row) - 1) for i, t in enumerate(row)])
            tokens.append(int(self._logits(len(row) - 1, 1).argmax()))
        self.position = len(ids[0])
        return tokens

    def step(self, tokens: list[int]) -> np.ndarray:
        """One more token for every sequence; their logits (sequences, vocab)."""
        self._decode([(token, self.position, row, True) for row, token in enumerate(tokens)])
        self.position += 1
        return self._logits(0, len(tokens))

    def _forget(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wants_logits) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wants_logits
        if (code := self.api.llama_decode(self.context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def _logits(self, first: int, rows: int) -> np.ndarray:
        pointer = self.api.llama_get_logits_ith(self.context, first)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.vocab))
