"""Trains the recursive language models that the wheel carries (effinfer/models/recursive-demo-*).

    python bench/train_recursive.py --loops 4 --steps 1600 --out effinfer/models/recursive-demo-r4
    python bench/train_recursive.py --loops 2 --steps 2200 --out effinfer/models/recursive-demo-r2
    python bench/calibrate_recursive.py  # their exits, into their config.json
    python bench/recursive_quality.py    # what became of both

A block of two layers runs `--loops` times, with norms and low-rank additions of its own in each
loop ("Relaxed Recursive Transformers", arXiv 2410.20672), trained from random weights so that
every loop can end in logits. Loops before the last learn the text and, more, what the last loop
says of it (self-distillation from the detached final output): an early exit should agree with full
depth, right or wrong.

`--text DIR` takes a folder of *.rst.txt files instead of downloading python3.11-doc. With
`--checkpoint FILE` the run can be stopped and resumed. Every random choice comes from `--seed`.
"""

import math
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import transformers
import typer
from lm_training import (
    END_OF_TEXT,
    HELD_OUT_ONE_IN,
    MUON_PEAK,
    PACKAGE,
    Document,
    batches,
    console,
    held_out_batches,
    optimizers_for,
    read_text,
    save,
    token_stream,
    train,
    train_tokenizer,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from effinfer.recursive.config import RecursiveConfig
from effinfer.recursive.modeling import RecursiveForCausalLM

# Weights of an early loop's losses; the last loop's is 1.
TEXT_LOSS = 0.15
DISTILLATION_LOSS = 0.25
HELD_OUT_WINDOWS_ONE_IN = 4  # of the held-out text, what is scored: to save time


def new_model(
    tokenizer: PreTrainedTokenizerFast, loops: int, rank: int, length: int
) -> RecursiveForCausalLM:
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    config = RecursiveConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_attention_heads=4,
        block_layers=2,
        loops=loops,
        lora_rank=rank,
        max_position_embeddings=length,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = RecursiveForCausalLM(config)
    with torch.no_grad():  # the residual stream should not grow with the layers that add to it
        for layer in model.model.layers:
            for name in ("o_proj", "down_proj"):
                layer.projection(name).weight.div_(math.sqrt(2 * config.block_layers * loops))
    return model


def is_projection(name: str) -> bool:
    """Which parameters Muon trains: the tied ones; low-rank factors are left to AdamW."""
    return name.endswith("_proj.weight")


def loop_log_probs(model: RecursiveForCausalLM, inputs: Tensor) -> list[Tensor]:
    """Log-probabilities (tokens, vocab) of each loop, for the token after each of inputs."""
    output = model(inputs, use_cache=False, output_loop_logits=True)
    return [logits.flatten(0, 1).log_softmax(-1) for logits in output.loop_logits]


def training_loss(model: RecursiveForCausalLM, tokens: Tensor) -> Tensor:
    """Loss of all loops for tokens (batch, T + 1)."""
    targets = tokens[:, 1:].flatten()
    *early, last = loop_log_probs(model, tokens[:, :-1])
    loss = F.nll_loss(last, targets)
    teacher = last.detach().exp()
    for log_probs in early:
        distillation = -(teacher * log_probs).sum(-1).mean()
        loss = loss + TEXT_LOSS * F.nll_loss(log_probs, targets) + DISTILLATION_LOSS * distillation
    return loss


@torch.no_grad()
def held_out_nats(model: RecursiveForCausalLM, groups: list[Tensor]) -> list[float]:
    """Mean cost of a held-out token, per loop."""
    sums = torch.zeros(model.config.loops, dtype=torch.float64)
    for tokens in groups:
        targets = tokens[:, 1:].flatten()
        sums += torch.tensor(
            [F.nll_loss(p, targets) for p in loop_log_probs(model, tokens[:, :-1])]
        )
    return (sums / len(groups)).tolist()


def model_card(name: str, facts: dict[str, str], held_out: list[Document], length: int) -> str:
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    names = "\n".join(f"- {document.name}" for document in held_out)
    return f"""---
license: apache-2.0
language: en
library_name: effinfer
---

# {name}

A small recursive language model of Python's documentation, trained for early exits: a real model
for `effinfer demo --recursive`, tests and benchmarks. It completes reStructuredText in the
documentation's style; it knows nothing and answers nothing. Written by `bench/train_recursive.py`.

    import effinfer
    effinfer.register_with_transformers()
    model = AutoModelForCausalLM.from_pretrained("{name}")

| | |
|---|---|
{rows}

Figures are of the weights as they lie in `model.safetensors`, rounded to float16, computed in
float32 over windows of {length} tokens that each start afresh. How often an early loop agrees with
full depth, and what exit rules make of it: `bench/results/recursive_quality.json`.

The training text is the documentation of Python 3.11 (Python Software Foundation License 2, its
examples also under the Zero-Clause BSD licence), as Debian packages it.

Held out, one file in {HELD_OUT_ONE_IN} by a hash of its name:

{names}
"""


def main(
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    loops: Annotated[int, typer.Option(help="How often the block runs.")] = 4,
    text: Annotated[Path | None, typer.Option(help="Folder with *.rst.txt files.")] = None,
    vocabulary: int = 1024,
    rank: Annotated[int, typer.Option(help="Of the low-rank additions.")] = 8,
    steps: int = 1200,
    rows: Annotated[int, typer.Option(help="Sequences per step.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    peak: Annotated[float, typer.Option(help="Highest learning rate of AdamW.")] = 3e-3,
    seed: int = 2,
    threads: int = 1,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File to save progress in, and to continue from.")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    training, held_out = read_text(text)
    tokenizer = train_tokenizer(training, vocabulary)
    stream, test_stream = token_stream(tokenizer, training), token_stream(tokenizer, held_out)
    groups = held_out_batches(test_stream, rows, length)[::HELD_OUT_WINDOWS_ONE_IN]
    console.log(f"{len(stream)} tokens to train on, {len(test_stream)} held out")

    model = new_model(tokenizer, loops, rank, length)
    cpu_seconds = train(
        model,
        partial(training_loss, model),
        optimizers_for(model, is_projection, peak),
        batches(stream, rows, length),
        steps=steps,
        checkpoint=checkpoint,
        save_every=save_every,
    )
    save(model, tokenizer, out)

    shipped = RecursiveForCausalLM.from_pretrained(out, dtype=torch.float32)
    nats = held_out_nats(shipped, groups)
    predicted = torch.cat([group[:, 1:].flatten() for group in groups])
    size = len(tokenizer.decode(predicted, skip_special_tokens=True).encode())
    bits = nats[-1] * len(predicted) / math.log(2) / size
    facts = {
        "parameters": f"{model.num_parameters():,} (embeddings tied)",
        "shape": f"2 layers x {loops} loops, d_model 128, 4 heads, rank {rank}, {vocabulary} tokens",
        "training text": f"{len(stream):,} tokens of {PACKAGE}",
        "seen": f"{steps * rows * length:,} tokens: {steps} steps of {rows} x {length}",
        "loss": f"1 x text in the last loop; {TEXT_LOSS} x text + {DISTILLATION_LOSS} x "
        "cross-entropy to the last loop's detached output in each before it",
        "training": f"{cpu_seconds / 60:.0f} CPU minutes, seed {seed}, rates {peak} and {MUON_PEAK}",
        "held out": f"{len(held_out)} files, {len(predicted):,} tokens, {size:,} bytes",
        "**held-out nats per token, by loop**": ", ".join(f"**{n:.3f}**" for n in nats),
        "held-out perplexity per token, by loop": ", ".join(f"{math.exp(n):.2f}" for n in nats),
        "**held-out bits per byte, last loop**": f"**{bits:.3f}**",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    (out / "README.md").write_text(model_card(out.name, facts, held_out, length), "utf-8")
    for name, value in facts.items():
        console.log(f"{name}: {value}")


if __name__ == "__main__":
    typer.run(main)
