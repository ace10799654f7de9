"""``patch`` and its relations: options, the report, refusals, and going back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import effinfer
from effinfer.patch import Patched
from effinfer.patch.rules import RULES

from .models import FAMILIES, tiny_config, tiny_model, tokens


def _features(report: effinfer.PatchReport) -> set[str]:
    return {r.feature for r in report.replaced}


@pytest.fixture
def model() -> Any:
    return tiny_model("mamba")


@pytest.fixture
def own_rules() -> Iterator[None]:
    """Rules a test may add to."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def test_report_lists_every_replacement_and_what_stays_stock() -> None:
    model = tiny_model("jamba")
    report = effinfer.patch(model)
    assert len(report.replaced) == sum(isinstance(m, Patched) for m in model.modules())
    assert _features(report) == {"mixer", "norm", "linear"}
    stock = {f.module: f.reason for f in report.fallbacks}
    assert stock["JambaAttention"] == "attention stays stock"
    assert stock["JambaExperts"] == "experts stay stock"
    text = str(report)
    for word in ("JambaMambaMixer", "attention stays stock", "experts stay stock", "MB after"):
        assert word in text
    assert json.loads(json.dumps(report.to_dict()))["replaced"][0]["feature"] in _features(report)


def test_bytes_are_those_of_the_tensors(model: Any) -> None:
    report = effinfer.patch(model)
    # The tied embedding counts once, its packed copy again; rows are padded to 16.
    packed = [m._effinfer_packed for m in model.modules() if hasattr(m, "_effinfer_packed")]
    assert report.bytes_after - report.bytes_before == sum(p.nbytes for p in packed)
    assert report.bytes_before == sum(p.nbytes for p in model.parameters())


def test_choosing_modules(model: Any) -> None:
    with effinfer.patched(model, features="norm") as report:
        assert _features(report) == {"norm"}
    with effinfer.patched(model, features=["mixer", "linear"], exclude="lm_head") as report:
        assert _features(report) == {"mixer", "linear"}
        skipped = {s.name: s.reasons for s in report.skipped}
        assert skipped["lm_head"] == ("in exclude",)
        assert skipped["backbone.norm_f"] == ("feature 'norm' not asked for",)
    with effinfer.patched(model, include="backbone.layers.1.*") as report:
        assert {r.name.split(".")[2] for r in report.replaced} == {"1"}
    with effinfer.patched(model, filter_fn=lambda name, m: not isinstance(m, nn.Linear)) as report:
        assert _features(report) == {"block", "mixer", "norm"}
    with pytest.raises(ValueError, match="features must be 'auto' or among linear, mixer, norm"):
        effinfer.patch(model, features="nrom")


def test_dry_run_changes_nothing(model: Any) -> None:
    types = [type(m) for m in model.modules()]
    report = effinfer.patch(model, dry_run=True)
    assert [type(m) for m in model.modules()] == types
    assert report.replaced
    assert "dry run" in str(report)


def test_patching_twice_is_a_conflict(model: Any) -> None:
    effinfer.patch(model)
    with pytest.raises(effinfer.PatchConflictError, match="patched already"):
        effinfer.patch(model, features="norm")
    assert effinfer.unpatch(model) > 0
    assert effinfer.unpatch(model) == 0
    effinfer.patch(model)


def test_foreign_forward_is_left_alone_and_named(model: Any) -> None:
    head = model.lm_head
    head.forward = type(head).forward.__get__(head)
    with pytest.raises(
        effinfer.UnsupportedModelError, match=r"lm_head \(Linear\): its forward was"
    ):
        effinfer.patch(model, strict=True)
    report = effinfer.patch(model)
    assert [s.name for s in report.skipped] == ["lm_head"]
    assert type(head) is nn.Linear


def test_strict_refuses_a_model_without_rules() -> None:
    with pytest.raises(effinfer.UnsupportedModelError, match="no module has a rule"):
        effinfer.patch(nn.Sequential(nn.ReLU()).eval(), strict=True)
    assert not effinfer.patch(nn.Sequential(nn.ReLU()).eval()).replaced


def test_models_that_cannot_be_patched(model: Any) -> None:
    with pytest.raises(effinfer.UnsupportedModelError, match=r"torch\.inference_mode"):
        effinfer.patch(model.train())
    with torch.device("meta"):
        empty = nn.Linear(3, 3).eval()
    with pytest.raises(effinfer.UnsupportedModelError, match="load the weights"):
        effinfer.patch(empty)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        effinfer.patch("mamba")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="quantize"):
        effinfer.patch(model.eval(), quantize=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend must be"):
        effinfer.patch(model, backend="tpu")


def test_reasons_are_all_listed() -> None:
    config = tiny_config("mamba")
    config.hidden_act = "gelu"
    model = type(tiny_model("mamba"))(config).eval().double()
    report = effinfer.patch(model)
    assert not report.replaced
    reasons = next(s.reasons for s in report.skipped if s.feature == "mixer")
    assert [r.split()[0] for r in reasons] == ["activation", "parameters"]


def test_gradients_are_refused(model: Any) -> None:
    effinfer.patch(model)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"torch\.inference_mode"):
        model(tokens(1, 4))
    with torch.no_grad():
        model(tokens(1, 4))


def test_verify_reports_the_difference(model: Any) -> None:
    report = effinfer.patch(model, verify=True)
    assert report.verified is not None
    assert 0 < report.verified < 1e-5
    assert "of stock" in str(report)


class _Wrong(Patched):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * 1.01


class _Broken(Patched):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("oops")


@pytest.mark.usefixtures("own_rules")
@pytest.mark.parametrize(
    ("replacement", "message"),
    [(_Wrong, "differ from stock"), (_Broken, "ZeroDivisionError: oops")],
)
def test_verify_restores_a_model_it_rejects(model: Any, replacement: type, message: str) -> None:
    target = next(t for t in RULES if t.endswith(".modeling_mamba.MambaRMSNorm"))
    effinfer.register_patch(target, replacement, feature="norm", why="wrong", overwrite=True)
    types = [type(m) for m in model.modules()]
    with pytest.raises(effinfer.VerificationError, match=message):
        effinfer.patch(model, verify=True)
    assert [type(m) for m in model.modules()] == types


class _Doubled(nn.ReLU):
    pass


class _Twice:
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * input


@pytest.mark.usefixtures("own_rules")
def test_registering_a_patch_of_ones_own() -> None:
    effinfer.register_patch(_Doubled, _Twice, feature="toy", why="a toy")
    with pytest.raises(effinfer.PatchConflictError, match="already has a rule"):
        effinfer.register_patch(_Doubled, _Twice, feature="toy", why="again")
    module = nn.Sequential(_Doubled()).eval()
    with effinfer.patched(module, features="toy"):
        assert module(torch.tensor(-1.0)) == -2
    assert module(torch.tensor(-1.0)) == 0


def test_patched_restores_after_an_error(model: Any) -> None:
    with pytest.raises(KeyError), effinfer.patched(model):
        raise KeyError
    assert not any(isinstance(m, Patched) for m in model.modules())


def test_hooks_keep_firing(model: Any) -> None:
    fired = []
    model.backbone.layers[0].mixer.register_forward_hook(lambda m, i, o: fired.append(o.shape))
    with effinfer.patched(model), torch.inference_mode():
        model(tokens(2, 5))
    assert fired == [(2, 5, 64)]


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_answers_for_a_configuration(family: str) -> None:
    answer = effinfer.supported(tiny_config(family))
    assert answer
    assert not answer.reasons
    assert answer.report.replaced


def test_supported_says_why_not() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    answer = effinfer.supported(config)
    assert not answer
    assert answer.reasons == ("no mixer of LlamaForCausalLM has a rule",)
