"""The command's own way from a folder to answers, over the models that the wheel carries."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from effinfer import cli
from effinfer.loading import load_model
from effinfer.models import demo_path, recursive_demo_path
from effinfer.serve import run as serving
from tests.serve.running import RunningServer, events_of

PROMPT = "The :mod:`json` module"
TOKENS = 8
PATHS = {"demo": demo_path, "demo-recursive-r2": lambda: recursive_demo_path(2)}


@pytest.fixture
def serve(monkeypatch):
    """What the command would serve, and its output."""

    def command(*arguments):
        served = []
        monkeypatch.setattr(serving, "run", lambda *what: served.append(what))
        result = CliRunner().invoke(cli.app, ["serve", *arguments])
        return served, result

    return command


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("demo", []),
        ("demo-recursive-r2", ["--mode", "full"]),
        ("demo-recursive-r2", ["--mode", "lossless"]),
    ],
)
def test_served_text_is_the_models(serve, name, options):
    served, result = serve(name, "--max-slots", "4", "--memory-gb", "0.05", *options)
    assert result.exit_code == 0, result.output
    [(app, settings, host, port)] = served
    assert (settings.model_name, host, port) == (name, "127.0.0.1", 8000)
    model, tokenizer = load_model(PATHS[name]())
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    wanted = tokenizer.decode(out, skip_special_tokens=True)
    with RunningServer(app, settings) as server:
        whole = server.complete(PROMPT, max_tokens=TOKENS).json()
        assert whole["choices"][0]["text"] == wanted
        with server.stream(PROMPT, max_tokens=TOKENS) as answer:
            pieces = [event["choices"][0]["text"] for event in events_of(answer.iter_lines())]
        assert "".join(pieces) == wanted
        messages = [{"role": "user", "content": PROMPT}]
        chat = {"model": name, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
        answer = server.client.post("/v1/chat/completions", json=chat).json()
        assert answer["choices"][0]["message"]["content"] == wanted


def test_options_reach_the_server(serve):
    served, result = serve(
        "demo", "--name", "mine", "--host", "0.0.0.0", "--port", "81", "--deadline", "5",
        "--drain", "7", "--max-queued-tokens", "9", "--cors-origin", "https://a.example",
    )  # fmt: skip
    [(_, settings, host, port)] = served
    assert (settings.model_name, host, port) == ("mine", "0.0.0.0", 81)
    assert (settings.deadline_s, settings.drain_s, settings.max_queued_tokens) == (5, 7, 9)
    assert settings.cors_origins == ("https://a.example",)
    assert "no --api-key" in result.output
    [(_, keyed, _, _)], quiet = serve("demo", "--host", "0.0.0.0", "--api-key", "k")
    assert keyed.api_key == "k"
    assert "no --api-key" not in quiet.output


def test_what_cannot_be_served_is_said_before_anything_listens(serve):
    served, result = serve("demo", "--mode", "exit")
    assert (served, result.exit_code) == ([], 1)
    assert "mode 'exit' needs a model with loops" in result.output
    served, result = serve("demo", "--mode", "fast")
    assert (served, result.exit_code) == ([], 1)
    assert "mode must be one of full, exit, lossless" in result.output
    for options in (["--replicas", "2"], ["--max-replicas", "2"]):
        served, result = serve("demo", *options)
        assert (served, result.exit_code) == ([], 1)
        assert "need --ray" in result.output


def test_folders_that_hold_no_model(serve, tmp_path):
    served, result = serve(str(tmp_path))
    assert (served, result.exit_code) == ([], 1)
    assert "no config.json" in result.output
    (tmp_path / "config.json").write_text("{")
    served, result = serve(str(tmp_path))
    assert (served, result.exit_code) == ([], 1)
    assert "cannot serve" in result.output
