"""What a server runs: a model from a folder, in an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from fastapi import FastAPI

from effinfer.engine import Engine
from effinfer.loading import load_model
from effinfer.serve.app import create_app
from effinfer.serve.settings import ServeSettings


@dataclass(frozen=True)
class ServedModel:
    """A model's place and its engine's options: all that any process needs to serve it.

    Attributes:
        path: a folder in the Hugging Face format, or a .gguf file.
        mode, max_slots, max_queue, memory_bytes: as ``Engine`` takes them.
        threads: of its kernels; None for torch's choice.
    """

    path: Path
    mode: str = "full"
    max_slots: int = 32
    max_queue: int = 256
    memory_bytes: int | None = None
    threads: int | None = None

    def app(self, settings: ServeSettings) -> FastAPI:
        """Load the model, and make the application that serves it.

        Raises:
            Exception: whatever a hostile or truncated file makes the loaders raise.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model, tokenizer = load_model(self.path)

        def make_engine() -> Engine:
            return Engine(
                model,
                tokenizer,
                mode=self.mode,
                max_slots=self.max_slots,
                max_queue=self.max_queue,
                memory_bytes=self.memory_bytes,
                release_weights=True,  # nobody else uses this model
            )

        return create_app(make_engine, tokenizer, settings)
