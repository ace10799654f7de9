"""QuantConfig: what it refuses, and that it survives JSON."""

from __future__ import annotations

from typing import Any

import pytest

from effinfer.quant.config import QuantConfig, format_of

EVERYTHING = QuantConfig(
    bits=3,
    group_size=64,
    method="gptq+cd",
    activations="f32",
    symmetric=False,
    scale_dtype="bfloat16",
    exclude=["head", "*.gate"],
    plan={"a.b": 8, "a.c": "int2", "a.d": None},
    quantize_head=True,
    damping=0.05,
    sweeps=3,
    layers={"a.b": {"format": "int8"}},
)


@pytest.mark.parametrize("config", [QuantConfig(), EVERYTHING])
def test_json_round_trip(config: QuantConfig) -> None:
    again = QuantConfig.from_json(config.to_json())
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert config.to_dict()["quant_method"] == "effinfer"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits must be one of"),
        ({"bits": 0}, "bits must be one of"),
        ({"bits": True}, "bits must be one of"),
        ({"bits": "int5"}, "bits must be one of"),
        ({"bits": float("nan")}, "bits must be one of"),
        ({"plan": {"a": 7}}, "bits must be one of"),
        ({"group_size": 0}, "group_size must be -1 or positive"),
        ({"group_size": -128}, "group_size must be -1 or positive"),
        ({"method": "awq"}, "method must be one of rtn, gptq"),
        ({"activations": "int4"}, "activations must be one of int8, f32"),
        ({"scale_dtype": "float64"}, "scale_dtype must be one of float16"),
        ({"damping": -0.1}, "damping must be 0 or more"),
        ({"damping": float("nan")}, "damping must be 0 or more"),
        ({"sweeps": 0}, "sweeps must be 1 or more"),
        ({"bits": 1.58, "symmetric": False}, "ternary has no zero point"),
    ],
)
def test_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(**changes)


@pytest.mark.parametrize(
    "changes", [{"group_size": 1.5}, {"group_size": True}, {"symmetric": 1}, {"exclude": [3]}]
)
def test_of_the_wrong_kind(changes: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(changes))):
        QuantConfig(**changes)


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ValueError, match="bitz"):
        QuantConfig.from_dict({"bitz": 4})
    with pytest.raises(ValueError, match="quant_method"):
        QuantConfig.from_dict({"quant_method": "gptq"})


def test_which_layers_get_what() -> None:
    assert EVERYTHING.format_for("a.b") == "int8"
    assert EVERYTHING.format_for("a.c") == "int2"
    assert EVERYTHING.format_for("a.d") is None
    assert EVERYTHING.format_for("a.gate") is None
    assert EVERYTHING.format_for("model.head") is None
    assert EVERYTHING.format_for("model.other") == "int3"
    assert format_of(1.58) == "ternary"


def test_columns_per_scale() -> None:
    assert QuantConfig().columns_per_scale("int4", 4096) == 128
    assert QuantConfig().columns_per_scale("int4", 100) == 100
    assert QuantConfig(group_size=-1).columns_per_scale("int4", 4096) == 4096
    assert QuantConfig().columns_per_scale("ternary_dense", 4096) == 4096
