"""Trains the Mamba-1 language model that the wheel carries (effinfer/models/mamba-demo).

    python bench/train_demo.py --out effinfer/models/mamba-demo

The text is Debian's python3.11-doc (the reStructuredText sources of Python's documentation),
fetched with `apt-get download` and unpacked without being installed; `--text DIR` takes a folder
of *.rst.txt files instead. Needs torch, transformers, tokenizers, rich, typer and, for
torch.compile, a C++ compiler. Every random choice comes from `--seed`.
"""

from collections.abc import Callable
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
    score,
    token_stream,
    train,
    train_tokenizer,
)
from mamba_training import CHUNK, check_against_stock, training_loss
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)


def new_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> MambaForCausalLM:
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    config = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return MambaForCausalLM(config)


def is_projection(name: str) -> bool:
    """Which parameters Muon trains."""
    return name.endswith(("in_proj.weight", "out_proj.weight"))


def stock_cost(model: MambaForCausalLM) -> Callable[[Tensor], Tensor]:
    def cost(group: Tensor) -> Tensor:
        logits = model(group[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), group[:, 1:].flatten())

    return cost


def model_card(facts: dict[str, str], held_out: list[Document], length: int) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    names = "\n".join(f"- {document.name}" for document in held_out)
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---

# mamba-demo

A small Mamba-1 language model of Python's documentation: what `effinfer demo` runs, and a real
trained model for tests. It completes reStructuredText in the documentation's style; it knows
nothing and answers nothing. Written by `bench/train_demo.py`.

| | |
|---|---|
{rows}

Perplexities are of the weights as they lie in `model.safetensors`, rounded to float16, computed
in float32 over windows of {length} tokens that each start from an empty state. The whole held-out
text goes through the script's training forward, which is checked against the stock transformers
forward before training and again on a twentieth of the windows after it.

The training text is the documentation of Python 3.11 (Python Software Foundation License 2, its
examples also under the Zero-Clause BSD licence), as Debian packages it.

Held out, one file in {HELD_OUT_ONE_IN} by a hash of its name:

{names}
"""


def main(
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    text: Annotated[Path | None, typer.Option(help="Folder with *.rst.txt files.")] = None,
    vocabulary: int = 2048,
    width: int = 160,
    layers: int = 8,
    steps: int = 1600,
    rows: Annotated[int, typer.Option(help="Sequences per step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    peak: Annotated[float, typer.Option(help="Highest learning rate of AdamW.")] = 3e-3,
    seed: int = 2,
    threads: int = 2,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File to save progress in, and to continue from.")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    training, held_out = read_text(text)
    tokenizer = train_tokenizer(training, vocabulary)
    stream, test_stream = token_stream(tokenizer, training), token_stream(tokenizer, held_out)
    console.log(
        f"{len(training)} files, {len(stream)} tokens to train on; "
        f"{len(held_out)} files, {len(test_stream)} tokens held out"
    )

    model = new_model(tokenizer, width, layers)
    start = stream[: 2 * (4 * CHUNK + 1)].view(2, -1)
    in_logits, in_gradients = check_against_stock(model, start)
    console.log(f"off the stock forward: logits {in_logits:.1e}, gradients {in_gradients:.1e}")
    if max(in_logits, in_gradients) > 1e-5:
        raise SystemExit("the training forward is not the stock model's")
    short = held_out_batches(test_stream, rows, length)
    untrained = score(partial(training_loss, model), short[:1], tokenizer)
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

    shipped = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    saved_tokenizer = AutoTokenizer.from_pretrained(out)
    if not torch.equal(token_stream(saved_tokenizer, held_out), test_stream):
        raise SystemExit("the saved tokenizer is not the trained one")
    whole = score(partial(training_loss, shipped), short, tokenizer)
    sample = short[::20]
    sample_ours = score(partial(training_loss, shipped), sample, tokenizer)
    sample_stock = score(stock_cost(shipped), sample, tokenizer)
    facts = {
        "parameters": f"{model.num_parameters():,} (embeddings tied)",
        "shape": f"d_model {width}, {layers} layers, state 16, conv 4, {vocabulary} tokens",
        "training text": f"{len(stream):,} tokens of {PACKAGE}",
        "seen": f"{steps * rows * length:,} tokens: {steps} steps of {rows} x {length}",
        "training": f"{cpu_seconds / 60:.0f} CPU minutes, seed {seed}, rates {peak} and {MUON_PEAK}",
        "held out": f"{len(held_out)} files, {whole.tokens:,} tokens, {whole.bytes:,} bytes",
        "**held-out perplexity per token**": f"**{whole.perplexity:.2f}**",
        "**held-out bits per byte**": f"**{whole.bits_per_byte:.3f}**",
        "perplexity of the untrained model": f"{untrained.perplexity:.0f}",
        f"a twentieth of the windows ({sample_stock.tokens:,} tokens), stock forward": (
            f"perplexity {sample_stock.perplexity:.4f}"
        ),
        "the same windows, training forward": f"perplexity {sample_ours.perplexity:.4f}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    (out / "README.md").write_text(model_card(facts, held_out, length), "utf-8")
    for name, value in facts.items():
        console.log(f"{name}: {value}")


if __name__ == "__main__":
    typer.run(main)
