"""The carried recursive language models: each loop's quality, and what exit rules make of it.

    python bench/recursive_quality.py

On held-out text, teacher forced, with keys and values of full depth (exact fill). Thresholds are
chosen on every second window to reach an agreement with full depth, and reported on the others; so
is the rule in the model's configuration, which `calibrate_recursive.py` chose on the same half.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from lm_training import Document, held_out_batches, read_text, token_stream
from torch import Tensor

from effinfer.loading import load_model

MODELS = Path(__file__).parents[1] / "effinfer" / "models"
RESULTS = Path(__file__).parent / "results" / "recursive_quality.json"
AGREEMENTS = (0.999, 0.99, 0.98, 0.95, 0.90)
THRESHOLDS = 1000  # tried for each rule: quantiles of its scores
ROWS = 8


def held_out_windows(model: Any, tokenizer: Any, held_out: list[Document]) -> list[Tensor]:
    """(ROWS, T + 1) windows of the held-out text, of the model's context, in order."""
    stream = token_stream(tokenizer, held_out)
    return held_out_batches(stream, ROWS, model.config.max_position_embeddings)


def judge(model: Any, group: Tensor) -> dict[str, Tensor]:
    """What every loop says of the windows (rows, T + 1): each value (loops, rows * T).

    Scores of exit rules grow with confidence; -inf where a rule cannot tell, in the first loop.
    """
    ends: list[Tensor] = []
    hooks = [
        loop.norm.register_forward_hook(lambda *seen: ends.append(seen[1][0].flatten(0, 1)))
        for loop in model.model.loops
    ]
    output = model(group[:, :-1], use_cache=False, output_loop_logits=True)
    for hook in hooks:
        hook.remove()
    log_probs = torch.stack(output.loop_logits).flatten(1, 2).log_softmax(-1)
    hidden = torch.stack(ends)
    probs = log_probs.exp()
    top, best = probs.topk(2), probs.argmax(-1)
    targets = group[:, 1:].flatten()
    unknown = torch.full_like(best[:1], 0, dtype=torch.float32) - torch.inf
    margin = top.values[..., 0] - top.values[..., 1]
    stable = best[1:] == best[:-1]
    divergence = (probs[1:] * (log_probs[1:] - log_probs[:-1])).sum(-1)
    return {
        "best": best,
        "nats": torch.stack([F.nll_loss(p, targets, reduction="none") for p in log_probs]),
        "correct": best == targets,
        "margin": margin,
        "max_prob": top.values[..., 0],
        "entropy": (probs * log_probs).sum(-1),
        "stable_margin": torch.cat([unknown, margin[1:].where(stable, -torch.inf)]),
        "cosine": torch.cat([unknown, F.cosine_similarity(hidden[1:], hidden[:-1], dim=-1)]),
        "divergence": torch.cat([unknown, -divergence]),
    }


def exits(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Index of the first loop whose score exceeds the threshold, else the last; (n,)."""
    sure = scores > threshold
    sure[-1] = True
    return sure.argmax(0)


def agreement_of(agrees: np.ndarray, at: np.ndarray) -> float:
    """How often the token at the exit is full depth's."""
    return float(agrees[at, np.arange(len(at))].mean())


def rule_table(
    scores: np.ndarray, agrees: np.ndarray, half: np.ndarray
) -> list[dict[str, float | None]]:
    """For each wanted agreement, the least mean depth that reaches it on one half of the tokens,
    and what the same threshold does on the other."""
    loops = len(scores)
    finite = scores[:-1][np.isfinite(scores[:-1])]
    tried = [np.inf]  # nobody leaves: with two loops all that rules on two of them can do
    if finite.size:
        tried += np.quantile(finite, np.linspace(1, 0, THRESHOLDS)).tolist()
    chosen, rest = (scores[:, half], agrees[:, half]), (scores[:, ~half], agrees[:, ~half])
    tries = [(t, exits(chosen[0].copy(), t)) for t in tried]
    measured = [(t, at.mean() + 1, agreement_of(chosen[1], at)) for t, at in tries]
    table = []
    for wanted in AGREEMENTS:
        threshold = min((m for m in measured if m[2] >= wanted), key=lambda m: m[1])[0]
        at = exits(rest[0].copy(), threshold)
        table.append(
            {
                "agreement_wanted": wanted,
                "threshold": threshold if np.isfinite(threshold) else None,
                "agreement": agreement_of(rest[1], at),
                "mean_depth": float(at.mean() + 1),
                "loops_over_depth": float(loops / (at.mean() + 1)),
            }
        )
    return table


def stored_rule(
    stored: dict[str, Any] | None, scores: dict[str, np.ndarray], agrees: np.ndarray, on: np.ndarray
) -> dict[str, Any] | None:
    """What the rule in a model's configuration does on windows it was not calibrated on."""
    if stored is None:
        return None
    at = exits(scores[stored["policy"]][:, on], stored["threshold"])
    measured = {"agreement": agreement_of(agrees[:, on], at), "mean_depth": float(at.mean() + 1)}
    return {"calibration": stored, "elsewhere": measured}


def report(model: Any, groups: list[Tensor]) -> dict[str, Any]:
    """Quality per loop, oracle depths and a table for every exit rule."""
    with torch.inference_mode():
        parts = [judge(model, group) for group in groups]
    seen = {name: torch.cat([part[name] for part in parts], 1).numpy() for name in parts[0]}
    best = seen.pop("best")
    nats, correct = seen.pop("nats"), seen.pop("correct")
    agrees = best == best[-1]
    settled = np.flip(np.logical_and.accumulate(np.flip(agrees, 0), 0), 0)
    loops, tokens = best.shape
    shares = np.bincount(agrees.argmax(0), minlength=loops) / tokens
    window = groups[0].shape[1] - 1
    half = np.arange(tokens) // window % 2 == 0
    return {
        "loops": loops,
        "tokens": tokens,
        "nats_per_token": nats.mean(1).tolist(),
        "top1_accuracy": correct.mean(1).tolist(),
        "agreement_with_full_depth": agrees.mean(1).tolist(),
        "oracle_exit_shares": shares.tolist(),
        "oracle_depth": float(agrees.argmax(0).mean() + 1),
        "stable_oracle_depth": float(settled.argmax(0).mean() + 1),
        "lowest_loss_loop_shares": (np.bincount(nats.argmin(0), minlength=loops) / tokens).tolist(),
        "rules": {rule: rule_table(scores, agrees, half) for rule, scores in seen.items()},
        "stored": stored_rule(model.config.exit, seen, agrees, ~half),
    }


def main(
    text: Annotated[Path | None, typer.Option(help="Folder with *.rst.txt files.")] = None,
    windows_one_in: Annotated[int, typer.Option(help="Held-out windows to look at.")] = 8,
    models: Annotated[Path, typer.Option(help="Folder of the models' folders.")] = MODELS,
    out: Annotated[Path, typer.Option(help="Results file.")] = RESULTS,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    _, held_out = read_text(text)
    results = {}
    for folder in sorted(models.glob("recursive-demo-r*")):
        model, tokenizer = load_model(folder)
        groups = held_out_windows(model, tokenizer, held_out)[::windows_one_in]
        results[folder.name] = report(model, groups)
        print(folder.name, json.dumps(results[folder.name], indent=1), flush=True)
    out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)
