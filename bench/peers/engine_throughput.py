"""Output tokens a second of a mixed workload: the engine, transformers' and llama.cpp's batching.

An 8-layer, 512-wide llama (8 heads of 64, inner width 1536, vocabulary 32000, untied: 60 M
parameters) from its configuration with seeded random weights, float32 and greedy on every side. All
requests are there at the start; a run ends with the last one, and every request generates exactly
as many tokens as the workload says. No side may keep prompts from one run to the next.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from bench.peers.common import OURS, Side, arguments, measure
from bench.peers.gguf_llama import write_gguf
from bench.peers.llama_slots import LlamaSlots
from bench.workloads import load_workload
from effinfer import Engine, SamplingParams

WORKLOAD, QUICK = "mixed", 8  # requests of the workload with --quick
LENGTH = 512  # positions of a request at most
SLOTS = 32
# Of a side's tokens with ours, up to where texts first differ: random logits are often close, and
# llama.cpp approximates silu and keeps keys in float16. Another model would share next to none.
AGREEMENT = 0.5
# transformers' settings: the fastest on this CPU of both attentions, pages of 32 and 256, 8 to 32
# requests and 64 to 1024 tokens a batch, and both schedulers. Its asynchronous batching wants CUDA, and compiling it took minutes.
ATTENTION = "sdpa"
CONTINUOUS: dict[str, Any] = {
    "page_size": 32,
    "num_blocks": LENGTH // 32 * SLOTS,
    "max_batch_tokens": 256,
    "max_requests_per_batch": SLOTS,
    "allow_block_sharing": False,
    "auto_switch_to_flash": False,
}

Tokens = list[list[int]]


def config() -> LlamaConfig:
    """The model's; no token ends a text."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


@dataclass
class Work:
    """The requests: seeded random prompts of the workload's lengths."""

    prompts: Tokens
    outputs: list[int]

    @classmethod
    def mixed(cls, count: int | None, vocab: int) -> Work:
        generator = torch.Generator().manual_seed(0)
        requests = load_workload(WORKLOAD)[:count]
        prompts = [
            torch.randint(vocab, (request.prompt,), generator=generator).tolist()
            for request in requests
        ]
        return cls(prompts, [request.output for request in requests])


def effinfer_engine(folder: Path, work: Work) -> Callable[[], Tokens]:
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    engine = Engine(model, max_slots=SLOTS, prefix_cache=False)
    params = [SamplingParams(max_tokens=count) for count in work.outputs]
    return lambda: [list(output.tokens) for output in engine.generate(work.prompts, params)]


class ContinuousBatching:
    """transformers' manager in its own thread, as its server runs it."""

    def __init__(self, folder: Path, work: Work) -> None:
        transformers.logging.set_verbosity_error()
        model = LlamaForCausalLM.from_pretrained(folder, attn_implementation=ATTENTION).eval()
        self.work, self.numbers = work, itertools.count()
        self.manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(**CONTINUOUS),
        )
        self.manager.start()

    def serve(self) -> Tokens:
        names = [
            self.manager.add_request(
                prompt, f"{next(self.numbers)}", max_new_tokens=count, eos_token_id=-1
            )
            for prompt, count in zip(self.work.prompts, self.work.outputs, strict=True)
        ]
        done: dict[str, list[int]] = {}
        while len(done) < len(names):
            result = self.manager.get_result(timeout=10)
            if result is None and not self.manager.is_running():
                raise RuntimeError("transformers' batching stopped")
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                done[result.request_id] = list(result.generated_tokens)
        return [done[name] for name in names]

    def stop(self) -> None:
        """Ends its thread, which the interpreter would wait for."""
        self.manager.stop(block=True)


def llama_cpp(folder: Path, work: Work, threads: int) -> Callable[[], Tokens]:
    path = folder / "model.gguf"
    write_gguf(LlamaForCausalLM.from_pretrained(folder), path)
    slots = LlamaSlots(path, threads, SLOTS, LENGTH)
    return lambda: slots.serve(work.prompts, work.outputs)


def agreement(tokens: Tokens, ours: Tokens) -> float:
    """The share of tokens before texts first differ."""
    same = 0
    for theirs, own in zip(tokens, ours, strict=True):
        if len(theirs) != len(own):
            raise AssertionError(f"a request got {len(theirs)} tokens, not {len(own)}")
        pairs = zip(theirs, own, strict=True)
        same += next((i for i, (a, b) in enumerate(pairs) if a != b), len(own))
    return same / sum(map(len, ours))


def compare(folder: Path, args: argparse.Namespace) -> None:
    work = Work.mixed(QUICK if args.quick else None, config().vocab_size)
    tokens: dict[str, Tokens] = {}  # of each side's last run
    managers: list[ContinuousBatching] = []

    def side(name: str, make: Callable[[], Callable[[], Tokens]]) -> Callable[[], Side]:
        def build() -> Side:
            serve = make()
            return Side(lambda: tokens.update({name: serve()}))

        return build

    def transformers_serve() -> Callable[[], Tokens]:
        managers.append(ContinuousBatching(folder, work))
        return managers[0].serve

    def facts() -> dict[str, Any]:
        shares = {
            name: agreement(theirs, tokens[OURS])
            for name, theirs in tokens.items()
            if name != OURS and OURS in tokens
        }
        for name, share in shares.items():
            if share < AGREEMENT:
                raise AssertionError(f"{name}: only {share:.0%} of the tokens are the engine's")
        return {
            "agreement": shares,
            "requests": len(work.prompts),
            "prompt_tokens": sum(map(len, work.prompts)),
            "slots": SLOTS,
            "transformers": {"attention": ATTENTION, **CONTINUOUS},
            "llama.cpp": "llama-server's loop in this process; unified cache in float16",
        }

    try:
        measure(
            "engine_throughput",
            f"{WORKLOAD}, llama 8 x 512, threads={args.threads}",
            {
                OURS: side(OURS, lambda: effinfer_engine(folder, work)),
                "transformers": side("transformers", transformers_serve),
                "llama.cpp": side("llama.cpp", lambda: llama_cpp(folder, work, args.threads)),
            },
            args,
            unit={"tok/s": sum(work.outputs)},
            facts=facts,
        )
    finally:
        for manager in managers:
            manager.stop()


def main() -> None:
    args = arguments(__doc__)
    if not args.quick:
        args.seconds *= 20  # a call serves the whole workload
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config()).save_pretrained(folder)
        compare(Path(folder), args)


if __name__ == "__main__":
    main()
