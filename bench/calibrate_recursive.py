"""Finds an exit threshold for each carried recursive model and stores it in its config.json.

    python bench/calibrate_recursive.py

On text held out of training, on every second window of those that `recursive_quality.py` looks at:
that script then tells on the others what the stored rule does. With what is stored,
`Engine(model, mode="exit")` needs no policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from lm_training import edit_json, read_text
from recursive_quality import MODELS, held_out_windows

from effinfer.engine import calibrate
from effinfer.loading import load_model


def main(
    text: Annotated[Path | None, typer.Option(help="Folder with *.rst.txt files.")] = None,
    models: Annotated[Path, typer.Option(help="Folder of the models' folders.")] = MODELS,
    policy: Annotated[str, typer.Option(help="Exit rule.")] = "margin",
    agreement: Annotated[float, typer.Option(help="With full depth's tokens.")] = 0.99,
    confidence: Annotated[float, typer.Option(help="That it is reached.")] = 0.95,
    windows_one_in: Annotated[int, typer.Option(help="Held-out windows to look at.")] = 8,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    _, held_out = read_text(text)
    for folder in sorted(models.glob("recursive-demo-r*")):
        model, tokenizer = load_model(folder)
        groups = held_out_windows(model, tokenizer, held_out)[::windows_one_in]
        print(folder.name, flush=True)
        calibrate(
            model,
            [group[::2, :-1] for group in groups],
            policy=policy,
            agreement=agreement,
            confidence=confidence,
        )
        edit_json(folder / "config.json", exit=model.config.exit)


if __name__ == "__main__":
    typer.run(main)
