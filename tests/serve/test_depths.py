"""Extensions for recursive models: each request's own depths."""

from __future__ import annotations

import openai
import pytest

from effinfer.engine import SamplingParams, policies
from tests.engine.toy import Letters, serial
from tests.serve.running import ToyServer

MARGIN = 0.2
LOOPS = 3


@pytest.fixture(scope="module")
def exits():
    """A server whose model has loops and whose engine exits early."""
    with ToyServer(loops=LOOPS, mode="exit", policy=policies.margin(MARGIN)) as running:
        yield running


OWN = [
    {}, {"mode": "full"}, {"max_loops": 1}, {"min_loops": 2, "exit_threshold": 0},
    {"mode": "exit", "max_loops": 2, "exit_threshold": 0.5},
]  # fmt: skip


def test_depths_reach_the_engine_through_the_openai_client(exits, pool):
    client = openai.OpenAI(base_url=exits.url + "/v1", api_key="none", max_retries=0)

    def complete(fields):
        answer = client.completions.create(
            model="toy", prompt="ABC", max_tokens=9, temperature=0, extra_body=fields
        )
        return answer.choices[0].text

    def chat(fields):
        answer = client.chat.completions.create(
            model="toy", messages=[{"role": "user", "content": "ABC"}], max_tokens=9,
            temperature=0, extra_body=fields,
        )  # fmt: skip
        return answer.choices[0].message.content

    exits.gate.hold()  # all at once, in the same launches
    asked = [(fields, pool.submit(ask, fields)) for fields in OWN for ask in (complete, chat)]
    exits.wait_until_there(len(asked))
    exits.gate.open()
    wanted = set()
    for fields, answer in asked:
        params = SamplingParams(max_tokens=9, **fields)
        tokens, _ = serial([0, 1, 2], params, loops=LOOPS, policy=MARGIN)
        assert answer.result() == Letters().decode(tokens)
        wanted.add(tuple(tokens))
    assert len(wanted) > 2  # they differ


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("mode", {"mode": "fast"}),
        ("mode", {"mode": "lossless"}),
        ("min_loops", {"min_loops": 0}),
        ("min_loops", {"min_loops": LOOPS + 1}),
        ("max_loops", {"max_loops": LOOPS + 1}),
        ("max_loops", {"max_loops": "2"}),
        ("max_loops", {"max_loops": 1, "min_loops": 2}),
        ("max_loops", {"max_loops": 1, "mode": "full"}),
        ("exit_threshold", {"exit_threshold": "high"}),
        ("exit_threshold", {"exit_threshold": 0.1, "mode": "full"}),
    ],
)
def test_depths_that_cannot_be_are_named(exits, field, fields):
    answer = exits.complete(max_tokens=4, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    "fields", [{"mode": "exit"}, {"mode": "lossless"}, {"max_loops": 2}, {"min_loops": 2},
               {"exit_threshold": 0.5}],
)  # fmt: skip
def test_models_without_loops_have_no_depths(server, fields):
    answer = server.complete(max_tokens=4, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == next(iter(fields))
    assert server.complete(max_tokens=4, mode="full").status_code == 200
