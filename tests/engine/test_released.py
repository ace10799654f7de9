"""Models whose weights an engine holds alone: as fast as ever, once in memory, and back to the bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import effinfer
from effinfer import SamplingParams
from effinfer.engine import decoder_runner
from effinfer.engine.projection import FloatProjection
from effinfer.engine.runner import make_runner
from effinfer.patch.linear import LinearWithPacked
from tests.engine.runners import Driver, prompts, tiny
from tests.engine.test_engine_models import recursive
from tests.patch.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
DECODERS = {
    "llama_biased": partial(tiny, "llama_biased"),
    "qwen3": partial(tiny, "qwen3"),  # its head is its embedding
    "llama_bfloat16": partial(tiny, "llama", dtype=torch.bfloat16),
    "recursive": recursive,
}
HUGGING_FACE = {
    "gemma2": partial(tiny, "gemma2", head_dim=16, sliding_window=6),
    "mixtral": partial(tiny, "mixtral", num_local_experts=4),
    **{name: partial(tiny_model, name) for name in ("mamba", "mamba2", "zamba2")},
}
MODELS = DECODERS | HUGGING_FACE


def tokens_of(model, **options):
    with effinfer.Engine(model, max_slots=4, max_positions=64, **options) as engine:
        outputs = engine.generate(prompts(9, 3, 1), SamplingParams(max_tokens=8))
        during = {name: weight.clone() for name, weight in model.state_dict().items()}
    return [output.tokens for output in outputs], during


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens_and_the_weights_come_back(name):
    model = MODELS[name]()
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    want, _ = tokens_of(model)
    got, during = tokens_of(model, release_weights=True)
    assert got == want
    for state in (during, model.state_dict()):
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[key], saved[key]) for key in saved)
    assert all(parameters[key] is value for key, value in model.named_parameters())


def storages(tensors):
    """Bytes of the memory behind them, each once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def packed_tensors(model, runner):
    """Packed weights that the runner or the model's linears keep."""
    for layer in getattr(runner, "_layers", ()):
        yield from (p.packed for p in layer.projections if isinstance(p, FloatProjection))
    if hasattr(runner, "_head"):
        yield runner._head.packed
    for module in model.modules():
        if isinstance(module, LinearWithPacked):
            yield module._effinfer_packed
        own = module.__dict__.get("_effinfer_experts")
        yield from () if own is None else (own.up, own.down)


@pytest.mark.parametrize(
    "name", ["llama_biased", "llama_bfloat16", "recursive", "mixtral", "mamba2"]
)
def test_the_weights_are_there_once(name):
    """But for outputs that are padded to 16: a head of 97, a projection of 328."""
    model = MODELS[name]()
    before = storages(model.parameters())
    bytes_of = {}
    for release in (False, True):
        runner = make_runner(model, release_weights=release)
        bytes_of[release] = storages([*model.parameters(), *packed_tensors(model, runner)])
        runner.close()
    assert bytes_of[False] > (1.1 if name == "mixtral" else 1.5) * before
    assert bytes_of[True] < 1.1 * before


def test_what_has_two_readers_is_kept():
    model = tiny("llama")
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    second.o_proj.weight = first.o_proj.weight
    tied = tiny("qwen3")
    for each, kept in ((model, first.o_proj.weight), (tied, tied.model.embed_tokens.weight)):
        runner = make_runner(each, release_weights=True)
        assert kept.numel()
        assert not each.model.layers[0].mlp.up_proj.weight.numel()
        Driver(runner, prompts(5)).run()
        runner.close()


def test_a_runner_that_fails_gives_them_back(monkeypatch):
    model = tiny("llama")
    project, seen = decoder_runner.project, []

    def failing(*linears):
        seen.append(model.model.layers[0].mlp.up_proj.weight.numel())
        if linears == (model.lm_head,):
            raise MemoryError
        return project(*linears)

    monkeypatch.setattr(decoder_runner, "project", failing)
    with pytest.raises(MemoryError):
        make_runner(model, release_weights=True)
    assert seen[-1] == 0
    assert all(p.numel() for p in model.parameters())


def test_a_patched_model_stays_patched():
    model = tiny_model("mamba")
    effinfer.patch(model)
    x = torch.tensor([[5, 6, 7]])
    want = model(x).logits
    packed = [m._effinfer_packed for m in model.modules() if isinstance(m, LinearWithPacked)]
    with effinfer.Engine(model, max_positions=32, release_weights=True):
        pass
    assert torch.equal(model(x).logits, want)
    after = [m._effinfer_packed for m in model.modules() if isinstance(m, LinearWithPacked)]
    assert all(a is b for a, b in zip(packed, after, strict=True))  # none was packed again


def test_a_released_model_fails_rather_than_compute_something_else():
    model = tiny("llama")
    runner = make_runner(model, release_weights=True)
    with pytest.raises(RuntimeError):
        model(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="weight must have 2 dimensions"):
        make_runner(model)
    runner.close()
    assert torch.isfinite(model(torch.tensor([[1, 2]])).logits).all()
