"""Every patched family against its stock model."""

from __future__ import annotations

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import effinfer
from effinfer.patch import PatchReport

from .models import FAMILIES, PURE_SSM, SIZES, VARIANTS, cache_of, tiny_model, tokens

LENGTH, PADDING = 24, 7

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_variant = pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])


@functools.cache
def _stock(family: str) -> Any:
    return tiny_model(family)


@functools.cache
def _patched(family: str) -> tuple[Any, PatchReport]:
    """A patched model with the stock model's weights; tests do not change it."""
    model = tiny_model(family)
    return model, effinfer.patch(model, strict=True)


@functools.cache
def _float64(family: str) -> Any:
    model = tiny_model(family).double()
    # The grouped matrix multiplication of the default has no float64.
    model.set_experts_implementation("eager")
    return model


def _batch(padded: bool) -> dict[str, torch.Tensor]:
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :PADDING] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _real(values: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return values[batch["attention_mask"].bool()]


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@torch.inference_mode()
def _logits(model: Any, **inputs: Any) -> torch.Tensor:
    return model(**inputs).logits


def _record(model: nn.Module, names: list[str], batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments and the result of the named modules in one forward."""
    seen: dict[str, Any] = {}

    def keep(name: str, args: Any, kwargs: Any, result: torch.Tensor) -> None:
        seen[name] = (args, kwargs, result)

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, result, name=name: keep(name, args, kwargs, result),
            with_kwargs=True,
        )
        for name in names
    ]
    with torch.inference_mode():
        model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@every_variant
def test_every_replaced_module_equals_stock(family: str, padded: bool) -> None:
    model, report = _patched(family)
    batch = _batch(padded)
    names = [r.name for r in report.replaced if r.name]  # the whole model has tests of its own
    calls = _record(_stock(family), names, batch)
    features = {"mixer", "norm", "linear"} | ({"block"} if family in PURE_SSM else set())
    assert {r.feature for r in report.replaced if r.name in calls} == features
    for name, (args, kwargs, want) in calls.items():
        with torch.inference_mode():
            got = model.get_submodule(name)(*args, **kwargs)
        assert got.dtype == want.dtype
        if got.shape[:2] == batch["input_ids"].shape:
            got, want = _real(got, batch), _real(want, batch)
        assert _distance(got, want) <= 1e-5, name


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@every_variant
def test_error_against_float64_is_at_most_stocks(family: str, padded: bool) -> None:
    batch = _batch(padded)
    exact = _real(_logits(_float64(family), **batch), batch)
    stock = _distance(_real(_logits(_stock(family), **batch), batch), exact)
    ours = _distance(_real(_logits(_patched(family)[0], **batch), batch), exact)
    assert ours <= 1.5 * stock


@every_family
def test_greedy_tokens_equal_stock(family: str) -> None:
    batch = _batch(padded=True)
    options = {"max_new_tokens": 16, "do_sample": False, "use_cache": True}
    want = _stock(family).generate(**batch, **options)
    assert torch.equal(_patched(family)[0].generate(**batch, **options), want)


@pytest.mark.parametrize(("batch", "length"), [(2, 5), (5, 100), (1, 900)])
@every_family
def test_direct_calls_are_the_calls_through_the_modules(
    family: str, batch: int, length: int
) -> None:
    model, _ = _patched(family)
    ids = tokens(batch, length + 1)

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            head = model(ids[:, :-1], use_cache=True)
            tail = model(ids[:, -1:], use_cache=True, **cache_of(head))
        return torch.cat([head.logits, tail.logits], dim=1)

    direct = logits()
    seen: list[int] = []
    hooks = [
        m.in_proj.register_forward_hook(lambda *_: seen.append(1))
        for m in model.modules()
        if hasattr(m, "A_log")
    ]
    assert torch.equal(logits(), direct)
    assert len(seen) == 2 * len(hooks)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("inner", ["norm", "mixer"])
@pytest.mark.parametrize("family", PURE_SSM)
def test_hooks_inside_a_block_still_fire(family: str, inner: str) -> None:
    model, _ = _patched(family)
    batch = _batch(padded=False)
    want = _logits(model, **batch)
    seen: list[torch.Tensor] = []
    hooks = [
        layer.get_submodule(inner).register_forward_hook(lambda *call: seen.append(call[-1]))
        for layer in model.backbone.layers
    ]
    assert torch.equal(_logits(model, **batch), want)
    assert [x.shape for x in seen] == [(*batch["input_ids"].shape, SIZES["hidden_size"])] * 3
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", ["mamba2", "falcon_mamba"])
def test_what_a_hook_keeps_is_not_written_again(family: str) -> None:
    model, _ = _patched(family)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, args, _: kept.append((args[0], args[0].clone())))
        for name, module in model.named_modules()
        if ".mixer." in name and "norm" in name
    ]
    assert hooks
    model.generate(tokens(2, 6), max_new_tokens=3, do_sample=False)
    assert len(kept) == 3 * len(hooks)
    assert all(torch.equal(seen, then) for seen, then in kept)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("more", [1, 7, 256])
@every_family
def test_continued_cache_equals_one_shot(family: str, more: int) -> None:
    model, _ = _patched(family)
    ids = tokens(2, LENGTH + more)
    positions = torch.arange(LENGTH + more).expand(2, -1)
    with torch.inference_mode():
        whole = model(ids, position_ids=positions).logits
        head = model(ids[:, :LENGTH], position_ids=positions[:, :LENGTH], use_cache=True)
        tail = model(
            ids[:, LENGTH:],
            position_ids=positions[:, LENGTH:],
            use_cache=True,
            **cache_of(head),
        )
    assert _distance(tail.logits, whole[:, LENGTH:]) <= 5e-6


@every_family
def test_right_padding_leaves_the_states_alone(family: str) -> None:
    model, _ = _patched(family)
    ids = tokens(1, LENGTH)
    mask = torch.ones_like(ids)
    mask[:, -PADDING:] = 0
    with torch.inference_mode():
        padded = model(ids, attention_mask=mask, use_cache=True)
        exact = model(ids[:, :-PADDING], use_cache=True)
    assert _ssm_layers(exact)
    for layer in _ssm_layers(exact):
        for name in ("conv_states", "recurrent_states"):
            got = getattr(_ssm_layers(padded)[layer], name)[0]
            want = getattr(_ssm_layers(exact)[layer], name)[0]
            assert _distance(got[..., 1:], want[..., 1:]) <= 1e-5


@pytest.mark.parametrize("family", PURE_SSM)
def test_padding_may_be_split_anywhere(family: str) -> None:
    model, _ = _patched(family)
    batch = _batch(padded=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.inference_mode():
        whole = model(**batch).logits
        # Not 1: transformers takes no mask for a single token.
        for cut in (2, PADDING - 2, PADDING + 2):
            head = model(ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
            tail = model(
                ids[:, cut:], attention_mask=mask[:, cut:], use_cache=True, **cache_of(head)
            )
            start = max(cut, PADDING)
            assert _distance(tail.logits[:, start - cut :], whole[:, start:]) <= 5e-6


@pytest.mark.parametrize("family", PURE_SSM)
def test_threads_decode_on_scratch_of_their_own(family: str) -> None:
    model, _ = _patched(family)

    def generate(seed: int) -> torch.Tensor:
        return model.generate(tokens(1, 6, seed), max_new_tokens=12, do_sample=False)

    want = [generate(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(generate, range(4)))
    assert all(map(torch.equal, got, want))


def _ssm_layers(output: Any) -> dict[int, Any]:
    (cache,) = cache_of(output).values()
    layers = enumerate(cache.layers)
    return {i: x for i, x in layers if getattr(x, "recurrent_states", {}).get(0) is not None}


@every_family
def test_compiles_without_graph_breaks(family: str) -> None:
    model = _patched(family)[0]
    batch = _batch(padded=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = _real(_logits(compiled, **batch, use_cache=False), batch)
    assert _distance(got, _real(_logits(model, **batch), batch)) <= 1e-5


def test_compiles_with_inductor_and_a_cache() -> None:
    model = tiny_model("mamba", num_hidden_layers=1)
    effinfer.patch(model, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    ids = tokens(1, 8)

    def run(forward: Any) -> torch.Tensor:
        with torch.inference_mode():
            head = forward(ids[:, :7], use_cache=True)
            tail = forward(ids[:, 7:], use_cache=True, **cache_of(head))
        return torch.cat([head.logits, tail.logits], dim=1)

    assert _distance(run(compiled), run(model)) <= 1e-5


@every_family
def test_deepcopy_is_a_patched_model_of_its_own(family: str) -> None:
    model, report = _patched(family)
    batch = _batch(padded=False)
    want = _logits(model, **batch)
    twin = copy.deepcopy(model)
    assert torch.equal(_logits(twin, **batch), want)
    assert effinfer.unpatch(twin) == len(report.replaced)
    assert torch.equal(_logits(model, **batch), want)
    assert torch.equal(_logits(twin, **batch), _logits(_stock(family), **batch))


@every_family
def test_saved_checkpoint_is_a_stock_model(family: str, tmp_path: Path) -> None:
    model, _ = _patched(family)
    stock = _stock(family)
    assert list(model.state_dict()) == list(stock.state_dict())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.architectures == [type(stock).__name__]
    batch = _batch(padded=False)
    assert torch.equal(_logits(again, **batch), _logits(stock, **batch))
    effinfer.patch(again)
    assert torch.equal(_logits(again, **batch), _logits(model, **batch))


def _state_of(model: nn.Module) -> dict[str, Any]:
    """Everything a module dict holds, by module name."""
    return {
        name: (type(m), {k: id(v) for k, v in vars(m).items()}, [*m._parameters], [*m._buffers])
        for name, m in model.named_modules()
    }


@every_family
def test_unpatch_is_exact_and_other_models_are_untouched(family: str) -> None:
    model, other = tiny_model(family), _stock(family)
    batch = _batch(padded=True)
    logits, before, other_before = _logits(model, **batch), _state_of(model), _state_of(other)
    with effinfer.patched(model) as report:
        assert _state_of(model) != before
        assert _state_of(other) == other_before
        assert report.bytes_after > report.bytes_before
    assert _state_of(model) == before
    assert torch.equal(_logits(model, **batch), logits)


@every_family
def test_bfloat16(family: str) -> None:
    model = tiny_model(family, torch.bfloat16)
    batch = _batch(padded=True)
    exact = _real(_logits(_float64(family), **batch), batch)

    def error() -> float:
        # The median token: where rounding flips a routing decision, a token is off in either model.
        logits = _real(_logits(model, **batch), batch)
        return ((logits.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()

    stock = error()
    with effinfer.patched(model, strict=True):
        assert error() <= 1.5 * stock
        model.generate(**batch, max_new_tokens=4, do_sample=False)
