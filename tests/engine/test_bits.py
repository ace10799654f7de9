"""In float32 a request's logits have the same bits whatever shares its launches: other requests, how
its prompt is cut, which prefix was there already, and which of its tokens were drafts."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import effinfer
from effinfer import SamplingParams
from tests.engine.runners import prompts, tiny
from tests.engine.test_generate import llama
from tests.patch.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
SSM = ("mamba", "falcon_mamba", "mamba2", "bamba", "falcon_h1")
EXPERTS = ("jamba", "granitemoehybrid", "nemotron_h")
MODELS = {
    "llama": llama,
    "mixtral": partial(tiny, "mixtral", num_local_experts=4),
    "gemma2": partial(tiny, "gemma2", head_dim=16, sliding_window=6),
    # A sigmoid, of one number a row, gates its shared expert.
    "qwen2_moe": partial(tiny, "qwen2_moe", num_experts=8, moe_intermediate_size=64,
                         shared_expert_intermediate_size=64),
    **{name: partial(tiny_model, name) for name in (*SSM, *EXPERTS)},
    "zamba2": partial(tiny_model, "zamba2"),  # with GELU
}  # fmt: skip
LENGTHS = (37, 5, 70, 37, 1, 23)
PARAMS = SamplingParams(max_tokens=10)
MIXES = {
    "alone": {"max_slots": 1, "token_budget": 128, "prefill_chunk": 128},
    "together": {"token_budget": 64, "prefill_chunk": 24},
    "in small pieces": {"token_budget": 13, "prefill_chunk": 5, "prefix_cache": False},
    "with drafts": {"token_budget": 40, "prefill_chunk": 17, "max_ngram": 4,
                    "costs": [1.0 + 0.001 * n for n in range(40)]},
}  # fmt: skip


class Seen(dict[tuple[int, ...], torch.Tensor]):
    """The logits after every sequence of tokens that an engine has seen; the bits are compared where
    it comes again."""

    def __init__(self) -> None:
        super().__init__()
        self.again = 0

    def watch(self, engine):
        """Look at the logits of every launch from now on."""
        choose, scheduler = engine._core._chooser.choose, engine._scheduler

        def watched(logits, **options):
            for i, row in enumerate(logits):
                tokens = tuple(scheduler.history(i).tolist())
                before = self.setdefault(tokens, row.clone())
                assert torch.equal(before, row), f"other bits after {len(tokens)} tokens"
                self.again += before is not row
            return choose(logits, **options)

        engine._core._chooser.choose = watched


@pytest.mark.parametrize("name", MODELS)
def test_logits_have_the_same_bits_in_every_mix(name):
    model, seen = MODELS[name](), Seen()
    head = model.get_output_embeddings().weight
    with torch.no_grad():  # only four tokens come out, so that prompt lookup has something to find
        head.copy_(head[torch.arange(len(head)) % 4])
    sequences = [
        (prompt * 3)[:length] for prompt, length in zip(prompts(*LENGTHS), LENGTHS, strict=True)
    ]
    tokens = []
    for mix in MIXES.values():
        with effinfer.Engine(model, max_positions=96, **{"max_slots": 4, **mix}) as engine:
            seen.watch(engine)
            tokens.append([o.tokens for o in engine.generate(sequences, PARAMS)])
            tokens.append([o.tokens for o in engine.generate(sequences[::-1], PARAMS)][::-1])
            stats = engine.stats()
    assert all(one == tokens[0] for one in tokens)
    assert stats["drafts_flushed"] > 0 < stats["drafts_accepted"]
    assert seen.again > 5 * len(LENGTHS) * PARAMS.max_tokens
