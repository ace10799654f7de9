"""The live page in a browser: it moves as requests run, and its prompt box streams."""

from __future__ import annotations

import pytest

from tests.engine.toy import VOCAB
from tests.serve import browser
from tests.serve.browser import Browser
from tests.serve.test_api import expected

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="chromium is not installed")

SLOTS = "[...document.querySelectorAll('.slot')].map(s => s.querySelectorAll('u.on').length)"
DEPTHS = "[...document.querySelectorAll('#depths .bar')].map(b => +b.lastChild.textContent)"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


def test_page_moves_as_requests_run(chromium, make_server, pool):
    server = make_server(loops=3)
    chromium.open(server.url)
    chromium.until("document.getElementById('state').textContent === 'ready'")
    chromium.until("document.getElementById('model').textContent === 'toy'")
    assert chromium.evaluate(SLOTS) == []
    assert chromium.evaluate("Math.max(...speeds)") == 0
    server.gate.hold()
    answers = [pool.submit(server.complete, max_tokens=n) for n in (20, 30)]
    server.wait_until_there(2)
    server.gate.allow(4)  # the first has a token, and the second has begun
    chromium.until(f"{SLOTS}.includes(1)")
    chromium.until("document.querySelectorAll('.slot').length === 2")
    before = chromium.evaluate(DEPTHS)
    server.gate.allow(12)
    chromium.until(f"{DEPTHS}[2] > {before[2]}")
    chromium.until("Math.max(...speeds) > 0")
    server.gate.open()
    assert [answer.result().status_code for answer in answers] == [200, 200]
    chromium.until(f"{SLOTS}.length === 0")
    assert chromium.evaluate(DEPTHS) == [0, 0, 50]
    assert chromium.errors == []


def test_prompt_box_streams(chromium, make_server):
    server = make_server()
    chromium.open(server.url)
    chromium.until("model === 'toy'")
    server.gate.hold()
    chromium.evaluate("$('prompt').value = 'ABC'; $('tokens').value = 12; $('go').click()")
    out = "$('out').textContent"
    for launches in (4, 3):
        so_far = chromium.evaluate(f"{out}.length")
        server.gate.allow(launches)
        chromium.until(f"{out}.length === {so_far + launches}")
        assert chromium.evaluate("$('go').disabled")
    server.gate.open()
    chromium.until("!$('go').disabled")
    assert chromium.evaluate(out) == expected(max_tokens=12)
    assert chromium.errors == []


def test_page_says_what_went_wrong(chromium, make_server):
    server = make_server(api_key="s3cret")
    chromium.open(server.url)
    chromium.until("$('state').textContent === 'the API key is wrong'")
    chromium.evaluate("$('key').value = 's3cret'")
    chromium.until("$('state').textContent === 'ready'")
    chromium.evaluate(
        f"$('prompt').value = 'A' + String.fromCharCode(65 + {VOCAB}); $('go').click()"
    )
    chromium.until("$('out').textContent.includes('prompt: ')")
