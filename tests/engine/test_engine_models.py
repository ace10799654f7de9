"""The engine on real models, stock and patched: transformers' own greedy tokens in any company."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import effinfer
from effinfer import SamplingParams
from effinfer.engine import policies
from effinfer.recursive.config import RecursiveConfig
from effinfer.recursive.modeling import RecursiveForCausalLM
from tests.engine.runners import tiny
from tests.engine.test_generate import llama
from tests.patch.models import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
SSM = ("mamba", "mamba2", "jamba", "bamba", "falcon_h1")
ATTENTION = {
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 16, "sliding_window": 6},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "hrm_text": {"num_key_value_heads": 4, "head_dim": 16, "H_cycles": 2, "L_cycles": 2},
}
MODELS = {
    "llama": llama,
    **{name: partial(tiny_model, name) for name in SSM},
    **{name: partial(tiny, name, **changes) for name, changes in ATTENTION.items()},
}
LENGTHS = (3, 17, 1, 40, 8, 23)
NEW = 10


def recursive(loops=3, **options):
    torch.manual_seed(0)
    config = RecursiveConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        block_layers=2,
        loops=loops,
        lora_rank=4,
        initializer_range=0.2,
        **options,
    )
    return RecursiveForCausalLM(config).eval()


def prompts():
    return [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]


def alone(model, prompt, new=NEW):
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=new)[0, len(prompt) :].tolist()


def engine_of(model, **options):
    return effinfer.Engine(
        model, max_slots=4, token_budget=32, prefill_chunk=12, max_positions=80, **options
    )


@pytest.mark.parametrize("name", [*MODELS, *(f"{name}-patched" for name in ("llama", *SSM))])
def test_mixed_requests_get_transformers_own_greedy_tokens(name):
    family, _, patched = name.partition("-")
    model = MODELS[family]()
    want = [alone(model, prompt) for prompt in prompts()]
    if patched:
        effinfer.patch(model)
    with engine_of(model) as engine:
        outputs = engine.generate(prompts(), SamplingParams(max_tokens=NEW))
        again = engine.generate(prompts(), SamplingParams(max_tokens=NEW))  # prefixes reused
    assert [output.tokens for output in outputs] == want
    assert [output.tokens for output in again] == want


@pytest.mark.parametrize("name", ["llama", "mamba", "bamba"])
def test_sampled_tokens_are_the_same_in_any_company(name):
    model = MODELS[name]()
    params = [
        SamplingParams(max_tokens=NEW, temperature=1.0, top_p=0.9, seed=i, repetition_penalty=1.2)
        for i in range(len(LENGTHS))
    ]
    with engine_of(model) as engine:
        together = [output.tokens for output in engine.generate(prompts(), params)]
        backwards = engine.generate(prompts()[::-1], params[::-1])
        one_by_one = [
            engine.generate([prompt], one)[0].tokens
            for prompt, one in zip(prompts(), params, strict=True)
        ]
    assert [output.tokens for output in backwards][::-1] == together
    assert one_by_one == together
    assert len({tuple(tokens) for tokens in together}) == len(together)


@pytest.mark.parametrize("name", ["llama", "mamba", "bamba"])
def test_prompt_lookup_drafts_change_no_token(name):
    model = MODELS[name]()
    head = model.get_output_embeddings().weight
    with torch.no_grad():  # only four tokens come out: text that repeats itself, but not for long
        head.copy_(head[torch.arange(len(head)) % 4])
    repeated = [(prompt * 4)[:30] for prompt in prompts()]
    params = SamplingParams(max_tokens=20)
    with engine_of(model) as engine:
        want = [output.tokens for output in engine.generate(repeated, params)]
    costs = [1.0 + 0.001 * n for n in range(32)]
    with engine_of(model, max_ngram=4, costs=costs) as engine:
        got = [output.tokens for output in engine.generate(repeated, params)]
        stats = engine.stats()
    assert got == want
    assert stats["drafts_accepted"] > 0
    assert stats["drafts_flushed"] > 0


@pytest.mark.parametrize("name", ["llama", "bamba"])
def test_a_cancelled_and_a_late_request_leave_the_others_alone(name):
    model = MODELS[name]()
    want = [alone(model, prompt) for prompt in prompts()]
    with engine_of(model) as engine:
        handles = [engine.submit(p, SamplingParams(max_tokens=NEW)) for p in prompts()]
        late = engine.submit(prompts()[0], SamplingParams(max_tokens=NEW), deadline=0.0)
        engine.step()
        handles[1].cancel()
        outputs = [handle.result() for handle in handles]
        assert late.result().finish_reason == "deadline"
        assert outputs[1].finish_reason == "cancelled"
        assert engine.stats()["running"] == 0
    assert [o.tokens for i, o in enumerate(outputs) if i != 1] == [*want[:1], *want[2:]]


@pytest.mark.parametrize(("loops", "kv_policy"), [(2, "depth"), (4, "depth"), (3, "first")])
@pytest.mark.parametrize("threshold", [0.02, 0.3])
def test_lossless_is_full_depth_and_exit_follows_its_policy(loops, kv_policy, threshold):
    model = recursive(loops, kv_policy=kv_policy)
    params = SamplingParams(max_tokens=NEW)
    want = [alone(model, prompt) for prompt in prompts()]
    costs = [1.0 + 0.001 * n for n in range(32)]
    policy = policies.margin(threshold)
    with engine_of(model) as engine:
        assert [o.tokens for o in engine.generate(prompts(), params)] == want
    with engine_of(model, mode="lossless", policy=policy, costs=costs) as engine:
        assert [o.tokens for o in engine.generate(prompts(), params)] == want
    with engine_of(model, mode="exit", policy=policies.margin(threshold)) as engine:
        together = [(o.tokens, o.depths) for o in engine.generate(prompts(), params)]
        single = [engine.generate([p], params)[0] for p in prompts()]
    assert [(o.tokens, o.depths) for o in single] == together
    depths = {depth for _, one in together for depth in one}
    assert depths <= set(range(1, loops + 1))
    assert min(depths) < loops


@pytest.mark.parametrize("make", [policies.stable_margin, policies.cosine, policies.max_prob])
def test_exact_fill_makes_an_exits_context_full_depths(make):
    """Each token is the model's own at the depth it left, on keys and values of all loops."""
    model = recursive()
    prompt = prompts()[3]
    policy = make(0.05 if make is not policies.cosine else 0.5)
    with engine_of(model, mode="exit", policy=policy) as engine:
        output = engine.generate([prompt], SamplingParams(max_tokens=NEW))[0]
    sequence = torch.tensor([[*prompt, *output.tokens]])
    logits = model(sequence, output_loop_logits=True).loop_logits
    for i, (token, depth) in enumerate(zip(output.tokens, output.depths, strict=True)):
        assert logits[depth - 1][0, len(prompt) + i - 1].argmax() == token
    assert min(output.depths) < 3


@pytest.mark.parametrize("policy", [policies.margin(0.3), policies.cosine(0.5)], ids=["m", "c"])
@pytest.mark.parametrize("exited_kv", ["fill", "propagate"])
def test_requests_with_depths_of_their_own_do_not_touch_each_other(policy, exited_kv):
    model = recursive(4)
    own = [
        {},
        {"mode": "full"},
        {"max_loops": 2},
        {"min_loops": 2, "max_loops": 3, "exit_threshold": -1.0},
        {"exit_threshold": 2.0},
        {"max_loops": 1},
    ]
    params = [SamplingParams(max_tokens=NEW, **depth) for depth in own]
    with engine_of(model, mode="exit", policy=policy, exited_kv=exited_kv) as engine:
        together = [(o.tokens, o.depths) for o in engine.generate(prompts(), params)]
        alone_ = [engine.generate([p], one)[0] for p, one in zip(prompts(), params, strict=True)]
    assert [(o.tokens, o.depths) for o in alone_] == together
    full, depths = alone(model, prompts()[1]), [depth for _, depth in together]
    assert together[1] == (full, [4] * NEW)
    if exited_kv == "propagate":  # a prompt can't exit, so the first token takes all loops
        assert [one.pop(0) for one in depths] == [4] * len(own)
    assert max(depths[2]) <= 2
    # The cosine is with the loop before, which is not looked at before min_loops.
    assert set(depths[3]) == {3 if policy.name == "cosine" else 2}
    assert set(depths[4]) == {4}
    assert set(depths[5]) == {1}


def test_the_policy_in_a_models_configuration_is_used():
    model = recursive(exit={"policy": "margin", "threshold": 0.0})
    with engine_of(model, mode="exit") as engine:
        output = engine.generate([prompts()[0]], SamplingParams(max_tokens=4))[0]
    assert output.depths == [1] * 4


def test_costs_are_measured_where_drafts_are_asked_for():
    model = recursive()
    want = [alone(model, prompt) for prompt in prompts()]
    with engine_of(model, mode="lossless") as engine:
        assert [
            o.tokens for o in engine.generate(prompts(), SamplingParams(max_tokens=NEW))
        ] == want


def test_a_model_is_unpatched_when_the_engine_closes():
    model = tiny_model("mamba")
    classes = [type(module) for module in model.modules()]
    with engine_of(model):
        assert [type(module) for module in model.modules()] != classes
    assert [type(module) for module in model.modules()] == classes
    with pytest.raises(ValueError, match="mode 'lossless' needs a model with loops"):
        engine_of(model, mode="lossless")
    assert [type(module) for module in model.modules()] == classes
    effinfer.patch(model)  # by its owner, and left so
    patched = [type(module) for module in model.modules()]
    with engine_of(model):
        pass
    assert [type(module) for module in model.modules()] == patched
