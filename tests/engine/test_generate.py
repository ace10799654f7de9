"""``model.generate(custom_generate=effinfer.generate)`` against transformers' own decoding."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.generation import LogitsProcessor, StoppingCriteria

import effinfer
from tests.patch.models import SIZES, tiny_model, tokens


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


MODELS = {
    "llama": llama,
    "mamba": lambda: tiny_model("mamba"),
    "bamba": lambda: tiny_model("bamba"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def attention_model():
    return llama()


def both(model, ids, **options):
    want = model.generate(ids, **options)
    got = model.generate(ids, custom_generate=effinfer.generate, **options)
    return got, want


OPTIONS = {
    "plain": {},
    "eos": {"eos_token_id": [5, 17, 30, 41, 56, 60, 77, 90], "pad_token_id": 0},
    "repetition penalty": {"repetition_penalty": 1.5},
    "min tokens": {"min_new_tokens": 7, "eos_token_id": list(range(1, 60)), "pad_token_id": 0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_tokens_are_transformers_own(model, name):
    got, want = both(model, tokens(3, 11), max_new_tokens=12, **OPTIONS[name])
    assert got.tolist() == want.tolist()


def test_left_padding_is_no_part_of_the_prompt(model):
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 8)):
        ids[row, :padding] = SIZES["pad_token_id"]
        mask[row, :padding] = 0
    got = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, custom_generate=effinfer.generate
    )
    assert got[:, :9].tolist() == ids.tolist()
    for row, padding in enumerate((0, 4, 8)):
        alone = model.generate(ids[row : row + 1, padding:], max_new_tokens=8)
        assert got[row, padding:].tolist() == alone[0].tolist()


def test_the_model_is_as_it_was_afterwards(model):
    classes = [type(module) for module in model.modules()]
    ids = tokens(2, 6)
    before = model(ids).logits
    model.generate(ids, max_new_tokens=3, custom_generate=effinfer.generate)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(ids).logits, before)


def test_sampling_follows_torch_manual_seed_and_the_filters(attention_model):
    ids = tokens(1, 6).expand(64, -1)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 5, "max_new_tokens": 2}

    def sampled(seed):
        torch.manual_seed(seed)
        return attention_model.generate(ids, custom_generate=effinfer.generate, **options)

    first, again, other = sampled(1), sampled(1), sampled(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    most = attention_model(ids[:1]).logits[0, -1].topk(5).indices.tolist()
    seen = set(first[:, 6].tolist())
    assert seen <= set(most)
    assert len(seen) > 1  # rows have seeds of their own


def test_an_engine_may_be_reused_and_a_dict_returned(attention_model):
    ids = tokens(2, 5)
    want = attention_model.generate(ids, max_new_tokens=6)
    with effinfer.Engine(attention_model, max_slots=2, max_positions=64) as engine:
        for _ in range(2):
            got = attention_model.generate(
                ids,
                max_new_tokens=6,
                custom_generate=effinfer.generate,
                engine=engine,
                return_dict_in_generate=True,
            )
            assert got.sequences.tolist() == want.tolist()


def test_prompt_lookup_changes_no_token(attention_model):
    ids = tokens(2, 4).repeat(1, 4)  # something to look up, and a batch, which transformers refuses
    want = attention_model.generate(ids, max_new_tokens=16)
    got = attention_model.generate(
        ids, max_new_tokens=16, custom_generate=effinfer.generate, max_ngram=3
    )
    assert got.tolist() == want.tolist()
    one = {"max_new_tokens": 16, "prompt_lookup_num_tokens": 3}
    got, want = both(attention_model, ids[:1], **one)
    assert got.tolist() == want.tolist()


class Odd(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_streamer_gets_the_tokens_as_they_come_and_an_end(attention_model):
    class Streamer:
        tokens: ClassVar[list[int]] = []
        ended = 0

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended += 1

    streamer = Streamer()
    options = {"max_new_tokens": 5, "custom_generate": effinfer.generate, "streamer": streamer}
    got = attention_model.generate(tokens(1, 4), **options)
    assert streamer.tokens == got[0].tolist()
    assert streamer.ended == 1
    with pytest.raises(ValueError, match="a streamer is for a batch of one"):
        attention_model.generate(tokens(2, 4), **options)


def test_a_quantized_cache_is_named(attention_model):  # which transformers alone may not have
    config = GenerationConfig(max_new_tokens=2, cache_implementation="quantized")
    with pytest.raises(ValueError, match="not supported: cache_implementation 'quantized'"):
        effinfer.generate(attention_model, tokens(1, 4), generation_config=config)


def test_an_assistant_and_other_positions_are_named(attention_model):
    options = {"max_new_tokens": 2, "custom_generate": effinfer.generate}
    with pytest.raises(ValueError, match="not supported: assistant_model"):
        attention_model.generate(tokens(1, 4), assistant_model=attention_model, **options)
    with pytest.raises(ValueError, match="position_ids must count each prompt's tokens from 0"):
        attention_model.generate(tokens(1, 4), position_ids=torch.tensor([[0, 1, 5, 6]]), **options)


UNSUPPORTED = [
    ({"logits_processor": [Odd()]}, "Odd has no counterpart"),
    ({"stopping_criteria": [Never()]}, "Never has no counterpart"),
    ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor has no counterpart"),
    ({"num_beams": 2}, "not supported: num_beams"),
    ({"return_dict_in_generate": True, "output_scores": True}, "not supported: output_scores$"),
    ({"return_dict_in_generate": True, "output_logits": True}, "not supported: output_logits$"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "not supported: penalty_alpha"),
    ({"dola_layers": "low"}, "not supported: dola_layers"),
    ({"assistant_early_exit": 1}, "not supported: assistant_early_exit"),
]


@pytest.mark.parametrize(("options", "message"), UNSUPPORTED)
def test_what_has_no_counterpart_is_named(attention_model, options, message):
    with pytest.raises(ValueError, match=f"^effinfer.generate: {message}"):
        attention_model.generate(
            tokens(2, 4), max_new_tokens=2, custom_generate=effinfer.generate, **options
        )


def test_a_mask_with_holes_and_a_used_cache_are_named(attention_model):
    ids = tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[1, 2] = 0
    with pytest.raises(ValueError, match="attention_mask must have its zeros on the left"):
        attention_model.generate(
            ids, attention_mask=mask, max_new_tokens=2, custom_generate=effinfer.generate
        )
    cache = attention_model(ids[:, :3]).past_key_values
    with pytest.raises(ValueError, match="past_key_values with tokens in it"):
        attention_model.generate(
            ids, past_key_values=cache, max_new_tokens=2, custom_generate=effinfer.generate
        )
