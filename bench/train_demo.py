"""Trains the Mamba-1 language model that the wheel carries (effinfer/models/mamba-demo).

    python bench/train_demo.py --out effinfer/models/mamba-demo

The text is Debian's python3.11-doc (the reStructuredText sources of Python's documentation),
fetched with `apt-get download` and unpacked without being installed; `--text DIR` takes a folder
of *.rst.txt files instead. Needs torch, transformers, tokenizers, rich, typer and, for
torch.compile, a C++ compiler. Every random choice comes from `--seed`.
"""

import copy
import hashlib
import json
import math
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import torch.nn.functional as F
import transformers
import typer
from mamba_training import CHUNK, check_against_stock, training_loss
from muon import Muon
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

PACKAGE = "python3.11-doc"
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_ONE_IN = 20
MUON_PEAK = 0.02
console = Console()


@dataclass(frozen=True)
class Document:
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Decided by the name alone: adding or losing a file moves no other across the split."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Score:
    """What predicting some text cost."""

    nats: float
    tokens: int
    bytes: int

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def download_documents() -> list[Document]:
    with TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg", "-x", package.name, "unpacked"], cwd=folder, check=True)
        return read_documents(Path(folder) / "unpacked/usr/share/doc/python3.11/html/_sources")


def read_documents(folder: Path) -> list[Document]:
    paths = sorted(folder.rglob("*.rst.txt"))
    if not paths:
        raise typer.BadParameter(f"no *.rst.txt file under {folder}", param_hint="--text")
    return [Document(p.relative_to(folder).as_posix(), p.read_text("utf-8")) for p in paths]


def train_tokenizer(documents: list[Document], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text has tokens, none is unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((d.text for d in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> Tensor:
    """All documents in one row, an end-of-text token before, between and after them."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    stream = [end]
    for document in documents:
        stream += [*tokenizer.backend_tokenizer.encode(document.text).ids, end]
    return torch.tensor(stream)


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


def batches(stream: Tensor, rows: int, length: int) -> Iterator[Tensor]:
    """Endless (rows, length + 1) batches: each epoch cuts the stream at another offset."""
    while True:
        offset = int(torch.randint(length, ()))
        starts = torch.arange(offset, len(stream) - length, length)
        order = starts[torch.randperm(len(starts))]
        for group in order.split(rows):
            if len(group) == rows:
                yield torch.stack([stream[s : s + length + 1] for s in group.tolist()])


def rate_factor(step: int, steps: int) -> float:
    """Warm-up, a flat stretch, then a straight line to zero over the last fifth of the steps.

    Until it falls the rate doesn't depend on `steps`: an interrupted run may still change them.
    """
    warmup, fall = 100, steps / 5
    return min(1.0, (step + 1) / warmup, (steps - step) / fall)


def optimizers_for(model: MambaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the large projections, AdamW for all else; neither decays A, D, norms or biases."""
    projections, others = [], []
    for name, parameter in model.named_parameters():
        is_projection = name.endswith(("in_proj.weight", "out_proj.weight"))
        (projections if is_projection else others).append(parameter)
    return [
        Muon(projections, lr=MUON_PEAK),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(
    model: MambaForCausalLM,
    stream: Tensor,
    *,
    steps: int,
    rows: int,
    length: int,
    peak: float,
    checkpoint: Path | None,
    save_every: int,
) -> float:
    """Trains in place; returns the CPU seconds taken, those before an interruption included."""
    optimizers = optimizers_for(model, peak)
    schedules = [LambdaLR(o, lambda step: rate_factor(step, steps)) for o in optimizers]
    source = batches(stream, rows, length)
    model.train()
    done, spent = 0, 0.0
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        for part, saved in zip([*optimizers, *schedules], state["optimizers"], strict=True):
            part.load_state_dict(saved)
        done, spent = state["step"], state["cpu_seconds"]
        for _ in range(done):
            next(source)  # the batches an uninterrupted run would have seen
        console.log(f"continues after step {done}")
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
    )
    spent -= time.process_time()
    with progress:
        task = progress.add_task("train", total=steps, completed=done, loss=math.nan)
        recent: deque[float] = deque(maxlen=50)
        for step in range(done, steps):
            loss = training_loss(model, next(source))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for part in [*optimizers, *schedules]:
                part.step()
            model.zero_grad(set_to_none=True)
            recent.append(loss.item())
            mean_loss = sum(recent) / len(recent)
            progress.update(task, advance=1, loss=mean_loss)
            if (step + 1) % 50 == 0:
                console.log(f"step {step + 1} of {steps}: loss {mean_loss:.3f}")
            if checkpoint and (step + 1) % save_every == 0:
                state = {
                    "model": model.state_dict(),
                    "optimizers": [part.state_dict() for part in [*optimizers, *schedules]],
                    "step": step + 1,
                    "cpu_seconds": spent + time.process_time(),
                }
                torch.save(state, checkpoint)
    return spent + time.process_time()


def save(model: MambaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Weights as float16, but declared float32: stock CPU code is slow and less exact in half."""
    copy.deepcopy(model).half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written owner-only, but a wheel is for everyone
    edit_json(out / "config.json", dtype="float32")
    # The class's public name in every release; some releases write an internal alias of it.
    edit_json(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def edit_json(path: Path, **changes: str) -> None:
    content = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def held_out_batches(stream: Tensor, rows: int, length: int) -> list[Tensor]:
    """(rows, length + 1) windows in order; each overlaps the next by the one token it predicts."""
    starts = range(0, len(stream) - length, length)
    windows = [stream[s : s + length + 1] for s in starts]
    usable = len(windows) // rows * rows
    return [torch.stack(windows[i : i + rows]) for i in range(0, usable, rows)]


@torch.no_grad()
def score(
    cost: Callable[[Tensor], Tensor], groups: list[Tensor], tokenizer: PreTrainedTokenizerFast
) -> Score:
    """Cost of the windows, by a function that gives the mean loss of one batch of them."""
    total = Score(0.0, 0, 0)
    for group in groups:
        targets = group[:, 1:]
        texts = tokenizer.batch_decode(targets, skip_special_tokens=True)
        total += Score(
            nats=float(cost(group)) * targets.numel(),
            tokens=targets.numel(),
            bytes=sum(len(text.encode()) for text in texts),
        )
    return total


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
    documents = read_documents(text) if text else download_documents()
    held_out = [d for d in documents if d.held_out]
    training = [d for d in documents if not d.held_out]
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
        stream,
        steps=steps,
        rows=rows,
        length=length,
        peak=peak,
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
