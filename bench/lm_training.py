"""What training a small language model on the documentation of Python takes: text, tokenizer,
batches, a loop that can be stopped and resumed, saving, and scoring.

The text is Debian's python3.11-doc (the reStructuredText sources of Python's documentation),
fetched with `apt-get download` and unpacked without being installed.
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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import typer
from muon import Muon
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerFast

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


def read_text(folder: Path | None) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and those held out; from the folder, or downloaded."""
    documents = read_documents(folder) if folder else download_documents()
    return [d for d in documents if not d.held_out], [d for d in documents if d.held_out]


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


def optimizers_for(
    model: nn.Module, is_projection: Callable[[str], bool], peak: float
) -> list[torch.optim.Optimizer]:
    """Muon for the large projections, AdamW without decay for all else."""
    projections, others = [], []
    for name, parameter in model.named_parameters():
        (projections if is_projection(name) else others).append(parameter)
    return [
        Muon(projections, lr=MUON_PEAK),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    optimizers: list[torch.optim.Optimizer],
    source: Iterator[Tensor],
    *,
    steps: int,
    checkpoint: Path | None,
    save_every: int,
) -> float:
    """Minimises the loss of batches, in place.

    Returns the CPU seconds taken, those before an interruption included.
    """
    schedules = [LambdaLR(o, lambda step: rate_factor(step, steps)) for o in optimizers]
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
            loss = loss_of(next(source))
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


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Weights as float16, but declared float32: stock CPU code is slow and less exact in half."""
    copy.deepcopy(model).half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written owner-only, but a wheel is for everyone
    edit_json(out / "config.json", dtype="float32")
    # The class's public name in every release; some releases write an internal alias of it.
    edit_json(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def edit_json(path: Path, **changes: Any) -> None:
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
