"""Answers in OpenAI's words, and bad fields by name before the engine sees them."""

from __future__ import annotations

import json

import openai
import pytest

from effinfer.engine import SamplingParams
from tests.engine.toy import POISON, Letters, serial
from tests.serve.running import events_of


def expected(prompt="ABC", **params):
    tokens, _ = serial(Letters()(prompt)["input_ids"], SamplingParams(**params))
    return Letters().decode(tokens)


def test_completion_is_the_models(server):
    answer = server.complete(max_tokens=9).json()
    assert answer["choices"] == [
        {"index": 0, "text": expected(max_tokens=9), "logprobs": None, "finish_reason": "length"}
    ]
    assert answer["object"] == "text_completion"
    assert answer["model"] == "toy"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}


def test_prompts_of_every_kind(server):
    texts = ["ABC", "BCD"]
    both = server.complete(texts, max_tokens=5).json()
    assert [choice["text"] for choice in both["choices"]] == [
        expected(text, max_tokens=5) for text in texts
    ]
    assert both["usage"]["prompt_tokens"] == 6
    ids = server.complete([0, 1, 2], max_tokens=5).json()
    assert ids["choices"][0]["text"] == expected(max_tokens=5)
    many = server.complete([[0, 1, 2], [1, 2, 3]], max_tokens=5).json()
    assert [c["text"] for c in many["choices"]] == [c["text"] for c in both["choices"]]


def test_choices_count_their_prompt_once(server):
    answer = server.complete(n=3, max_tokens=4, temperature=1.0, seed=5).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    wanted = [expected(max_tokens=4, temperature=1.0, seed=5 + i) for i in range(3)]
    assert [choice["text"] for choice in answer["choices"]] == wanted
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


def test_stop_strings_end_the_text(server):
    text = expected(max_tokens=12)
    answer = server.complete(max_tokens=12, stop=text[5:7]).json()["choices"][0]
    assert answer["text"] == text[: text.index(text[5:7])]
    assert answer["finish_reason"] == "stop"


def test_stream_adds_up(server):
    with server.stream(max_tokens=10, stream_options={"include_usage": True}) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        events = events_of(answer.iter_lines())
    text = "".join(c["text"] for event in events for c in event["choices"])
    assert text == expected(max_tokens=10)
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 10


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_line_up_with_their_tokens(server, stream):
    options = {"max_tokens": 6, "logprobs": 2}
    whole = server.complete(**options).json()["choices"][0]
    if stream:
        with server.stream(**options) as answer:
            pieces = [event["choices"][0] for event in events_of(answer.iter_lines())]
        found = {key: [] for key in whole["logprobs"]}
        for piece in pieces:
            for key, values in piece["logprobs"].items():
                found[key] += values
    else:
        found = whole["logprobs"]
    assert "".join(found["tokens"]) == expected(max_tokens=6)
    assert found["text_offset"] == list(range(6))
    assert all(p <= 0 for p in found["token_logprobs"])
    for token, logprob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert len(top) == 2
        assert top[token] == pytest.approx(logprob)  # greedy: the likeliest is the one taken


def test_openai_client_works_unchanged(server):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["toy"]
    done = client.completions.create(model="toy", prompt="ABC", max_tokens=7, temperature=0)
    assert done.choices[0].text == expected(max_tokens=7)
    messages = [{"role": "user", "content": "ABC"}]
    chat = client.chat.completions.create(
        model="toy", messages=messages, max_completion_tokens=7, temperature=0, logprobs=True,
        top_logprobs=1,
    )  # fmt: skip
    assert chat.choices[0].message.content == expected(max_tokens=7)
    assert len(chat.choices[0].logprobs.content) == 7
    stream = client.chat.completions.create(
        model="toy", messages=messages, max_tokens=7, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected(max_tokens=7)
    assert chunks[-1].usage.total_tokens == 10
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="toy", prompt="ABC", max_tokens=-5)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="ABC")


BAD = [
    ("max_tokens", -5), ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", "9"),
    ("max_tokens", True), ("temperature", -1), ("temperature", 3), ("temperature", "hot"),
    ("temperature", "1"), ("temperature", True),
    ("top_p", 0), ("top_p", 1.5), ("top_k", -2), ("min_p", 2), ("n", 0), ("n", 1000),
    ("seed", "x"), ("stop", 7), ("stop", [""]), ("stop", ["a"] * 1000), ("logprobs", 100),
    ("presence_penalty", 9), ("frequency_penalty", "1"), ("stream", "yes"), ("echo", True),
    ("best_of", 3), ("suffix", "x"), ("logit_bias", {"1": 2}), ("stop_token_ids", [-1]),
    ("stop_token_ids", [10**6]), ("min_tokens", 99), ("priority", 10**9), ("deadline_s", 0),
    ("logit_bias", []), ("metadata", {"a": 1}), ("stream_options", {"x": 1}), ("prompt", []), ("prompt", [""]), ("prompt", ""), ("prompt", 5),
    ("prompt", [[]]), ("prompt", [-1]), ("prompt", [10**6]), ("prompt", [1, "a"]),
    ("prompt", [[1], "a"]), ("prompt", None), ("no_such_field", 1),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda x: json.dumps(x)[:30])
def test_bad_fields_are_named(server, field, value):
    before = server.stats["requests"]
    body = {"model": "toy", "prompt": "ABC", "max_tokens": 4, field: value}
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field
    assert field in error["message"]
    assert error["type"] == "invalid_request_error"
    assert server.stats["requests"] == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []), ("messages", [{"role": "wizard", "content": "x"}]),
        ("messages", [{"role": "user"}]), ("messages", "hello"), ("max_tokens", -1),
        ("top_logprobs", 3), ("tools", [{}]), ("response_format", {"type": "json_object"}),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        ("messages", [{"role": "assistant", "content": "A", "tool_calls": [{"id": "1"}]}]),
        ("messages", [{"role": "tool", "content": "A", "tool_call_id": "1"}]),
        ("response_format", {"type": "json_schema"}), ("modalities", ["audio"]), ("store", True),
        ("tool_choice", "required"), ("functions", [{}]), ("service_tier", "flex"),
        ("logit_bias", {"5": 100}), ("reasoning_effort", "low"),
    ],
)  # fmt: skip
def test_bad_chat_fields_are_named(server, field, value):
    body = {"model": "toy", "messages": [{"role": "user", "content": "ABC"}], field: value}
    answer = server.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


class Turns(Letters):
    """Letters with a chat template, which keeps the turns it was given."""

    chat_template = "all texts in a row"

    def __init__(self):
        self.given = []

    def apply_chat_template(self, turns, **_):
        self.given.append(turns)
        return self("".join(turn["content"] for turn in turns))


def test_a_chat_goes_on_with_the_answers_that_came(make_server):
    tokenizer = Turns()
    server = make_server(tokenizer=tokenizer)
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "ABC", "name": "E"}]
    for _ in range(2):
        answer = client.chat.completions.create(
            model="toy", messages=messages, max_tokens=5, temperature=0
        )
        messages += [answer.choices[0].message, {"role": "user", "content": "D"}]
    first = expected(max_tokens=5)
    assert tokenizer.given[-1] == [
        {"role": "user", "content": "ABC", "name": "E"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "D"},
    ]
    assert answer.choices[0].message.content == expected("ABC" + first + "D", max_tokens=5)


ASKS_FOR_NOTHING = {
    "store": False, "metadata": {"run": "7"}, "tools": [], "tool_choice": "none", "functions": [],
    "parallel_tool_calls": True, "response_format": {"type": "text"}, "modalities": ["text"],
    "service_tier": "auto", "logit_bias": {}, "safety_identifier": "u", "prompt_cache_key": "k",
    "user": "u", "top_k": -1,
    **dict.fromkeys((
        "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "logprobs",
        "top_logprobs", "presence_penalty", "frequency_penalty", "max_completion_tokens", "audio",
    )),
}  # fmt: skip


@pytest.mark.parametrize("field", ASKS_FOR_NOTHING)
def test_fields_that_ask_for_nothing_are_taken(server, field):
    body = {"model": "toy", "messages": [{"role": "user", "content": "ABC"}], "max_tokens": 4}
    value = ASKS_FOR_NOTHING[field]
    answer = server.client.post("/v1/chat/completions", json={**body, field: value})
    assert answer.status_code == 200, answer.text


def test_what_is_wrong_is_said_in_plain_words(server):
    def message(**fields):
        return server.complete(**fields).json()["error"]["message"]

    assert message(echo=True) == "echo: is not supported; only false is"
    assert message(best_of=2) == "best_of: is not supported; only 1 is"
    assert message(warmth=1) == "warmth: no such field"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_bodies_must_say_that_they_are_json(server, kind):
    content = json.dumps({"model": "toy", "prompt": "ABC", "max_tokens": 2})
    headers = {} if kind is None else {"content-type": kind}
    answer = server.client.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 415
    assert answer.json()["error"]["message"].startswith("Content-Type must be application/json")
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    answer = server.client.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'"x"',
        b"{}",
        b"[" * 100_000,
        b"1" * 5000,
        b'{"\\ud800": 1}',
        b'{"model": "toy", "prompt": "\\ud800"}',
    ],
    ids=lambda content: repr(content)[:20],
)
def test_bodies_that_are_no_request(server, content):
    headers = {"content-type": "application/json"}
    answer = server.client.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_too_long_is_refused(server):
    answer = server.complete(max_tokens=10**6)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_poisoned_request_fails_alone(server, pool):
    poison = [0, POISON, 2]
    bodies = [[0, 1, 2], poison, [1, 2, 3]]
    server.gate.hold()  # until all three are there, to run in the same launches
    answers = [pool.submit(server.complete, ids, max_tokens=5) for ids in bodies]
    server.wait_until_there(3)
    server.gate.open()
    assert [answer.result().status_code for answer in answers] == [200, 500, 200]
    with server.stream(poison, max_tokens=5) as answer:
        assert "error" in events_of(answer.iter_lines())[-1]
    server.wait_idle()


def test_unknown_paths_and_methods(server):
    nothing = server.client.post("/v1/nothing", json={})
    assert nothing.status_code == 404
    assert nothing.json()["error"]["message"] == "POST /v1/nothing: Not Found"
    assert server.client.get("/v1/completions").status_code == 405
    assert server.client.get("/v1/models/toy").json()["id"] == "toy"
    assert server.client.get("/v1/models/other").status_code == 404
