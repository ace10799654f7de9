"""``exited_kv="propagate"``: what an exit owes is made from its hidden state, as a serial oracle in
plain torch makes it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from effinfer import SamplingParams
from effinfer.engine import policies
from tests.engine.test_engine_models import engine_of, prompts, recursive

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = 40
SAMPLED = 64  # one position of so many runs all loops, to be held against full depth


class Oracle:
    """One request alone, on the model's own layers and a transformers cache.

    Attributes:
        tokens, depths: of the answer.
        agreed: of each exit at a sampled position, whether full depth has the same token.
    """

    def __init__(self, model, prompt, threshold):
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.threshold, self.position = threshold, len(prompt)
        self.agreed = []
        logits = model(torch.tensor([prompt]), past_key_values=self.cache).logits
        self.tokens, self.depths = [int(logits[0, -1].argmax())], [model.config.loops]
        while len(self.tokens) < NEW:
            token, depth = self.decode(self.tokens[-1])
            self.tokens.append(token)
            self.depths.append(depth)

    def decode(self, token):
        inner, loops = self.model.model, self.model.config.loops
        x = inner.embed_tokens(torch.tensor([[token]]))
        rotation = inner.rotary_emb(x, torch.tensor([[self.position]]))
        self.position += 1
        chosen = None
        for depth, loop in enumerate(inner.loops, 1):
            for tied, own in zip(inner.layers, loop.layers, strict=True):
                x, _ = own(tied, x, None, rotation, None, self.cache)
            logits = self.model.lm_head(loop.norm(x))[0, -1]
            top = logits.softmax(-1).topk(2).values
            if chosen is None and (depth == loops or top[0] - top[1] > self.threshold):
                chosen = int(logits.argmax()), depth
                if depth < loops and self.position % SAMPLED:
                    self.propagate(x, rotation, inner.loops[depth:])
                    return chosen
        if chosen[1] < loops:
            self.agreed.append(int(logits.argmax()) == chosen[0])
        return chosen

    def propagate(self, x, rotation, loops):
        for loop in loops:
            for tied, own in zip(self.model.model.layers, loop.layers, strict=True):
                normed = own.input_layernorm(x)
                _, keys = own._queries_keys(tied, normed, rotation)
                values = own._by_head(own._project(tied, "v_proj", normed))
                self.cache.update(keys, values, own.layer_idx)


@pytest.mark.parametrize("loops", [2, 4])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "qkv_bias": True}], ids=["", "norms"])
def test_tokens_depths_and_agreement_are_the_oracles(loops, options):
    model = recursive(loops, **options)
    sequences = [prompts()[0], prompts()[3], prompts()[3][:30], prompts()[5]]
    oracles = [Oracle(model, prompt, 0.05) for prompt in sequences]
    with engine_of(
        model, mode="exit", policy=policies.margin(0.05), exited_kv="propagate"
    ) as engine:
        outputs = engine.generate(sequences, SamplingParams(max_tokens=NEW))
        stats = engine.stats()
        engine._scheduler.check()
    for output, oracle in zip(outputs, oracles, strict=True):
        assert (output.tokens, output.depths) == (oracle.tokens, oracle.depths)
    agreed = [one for oracle in oracles for one in oracle.agreed]
    assert (stats["exits_checked"], stats["exits_agreed"]) == (len(agreed), sum(agreed))
    assert len(agreed) > 0
    assert stats["fill_rows"] >= len(agreed)
    early = [depth for output in outputs for depth in output.depths if depth < loops]
    assert len(early) > 5 * len(agreed)


def test_it_is_not_what_filling_gives():
    model, params = recursive(4), SamplingParams(max_tokens=NEW)
    tokens = []
    for exited_kv in ("fill", "propagate"):
        with engine_of(
            model, mode="exit", policy=policies.margin(0.02), exited_kv=exited_kv
        ) as engine:
            tokens.append([o.tokens for o in engine.generate(prompts(), params)])
            filled = engine.stats()["fill_rows"]
    assert tokens[0] != tokens[1]
    assert filled < 10  # of the sampled ones


@pytest.mark.parametrize("mode", ["full", "lossless"])
def test_it_needs_mode_exit(mode):
    with pytest.raises(ValueError, match=f"'propagate' needs mode 'exit', got '{mode}'"):
        engine_of(recursive(), mode=mode, exited_kv="propagate")


def test_it_needs_a_model_that_owes_keys_and_values():
    model = recursive(kv_policy="first")
    with pytest.raises(ValueError, match="needs a model with kv_policy 'depth'; with 'first'"):
        engine_of(model, mode="exit", policy=policies.margin(0.1), exited_kv="propagate")
    with pytest.raises(ValueError, match="exited_kv must be one of fill, propagate, got 'copy'"):
        engine_of(model, exited_kv="copy")
