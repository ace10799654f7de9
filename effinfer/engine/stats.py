"""What an engine has done, counted as it goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from effinfer.engine.handle import FINISH_REASONS


@dataclass
class EngineStats:
    """Counts since the engine was made.

    Attributes:
        tokens: generated.
        prompt_tokens: of requests that were submitted.
        finished: requests ended, by reason.
        rejected: submissions refused because the queue was full.
        launches: of the model's loop.
        rows: in them.
        launch_seconds: in the model.
        choose_seconds: in policies and sampling.
        step_seconds: in steps that launched, all told.
    """

    tokens: int = 0
    prompt_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0))
    rejected: int = 0
    launches: int = 0
    rows: int = 0
    launch_seconds: float = 0.0
    choose_seconds: float = 0.0
    step_seconds: float = 0.0

    def launched(self, rows: int, model: float, choice: float, step: float) -> None:
        """Count a step that launched ``rows`` rows, with the seconds of its parts and of it all."""
        self.launches += 1
        self.rows += rows
        self.launch_seconds += model
        self.choose_seconds += choice
        self.step_seconds += step

    def to_dict(self) -> dict[str, Any]:
        """By name, with what follows from them."""
        seconds = max(self.step_seconds, 1e-9)
        return {
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "finished": dict(self.finished),
            "rejected": self.rejected,
            "launch_seconds": self.launch_seconds,
            "choose_seconds": self.choose_seconds,
            "step_seconds": self.step_seconds,
            "rows_per_launch": self.rows / max(self.launches, 1),
            "tokens_per_second": self.tokens / seconds,
        }
