"""Tokens of log probabilities, of the vocabularies that there are."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from effinfer.engine import TokenLogprobs
from effinfer.models import demo_path
from effinfer.serve.answers import ChatAnswers, Choice, CompletionAnswers
from effinfer.serve.words import printed, token_bytes

TEXT = "naïve 日本語 🙂 end"


@pytest.fixture(scope="module")
def byte_level():
    return AutoTokenizer.from_pretrained(demo_path())


class Pieces:
    """A SentencePiece vocabulary, as transformers shows it."""

    pieces = ("\u2581Hello", "\u2581", "<0xE6>", "<0x97>", "<0xA5>", "x")

    def convert_ids_to_tokens(self, token):
        return self.pieces[token]

    def decode(self, tokens):
        [token] = tokens
        return ("Hello", "", "\ufffd", "\ufffd", "\ufffd", "x")[token]


class Told:
    """What the answers need of a handle."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.logprobs = [TokenLogprobs(-1.0, ((token, -1.0),)) for token in tokens]


def test_bytes_of_tokens_add_up_to_the_text(byte_level):
    ids = byte_level(TEXT)["input_ids"]
    words = [token_bytes(byte_level, token) for token in ids]
    assert b"".join(words).decode() == TEXT
    assert any(printed(word).startswith("bytes:") for word in words)  # parts of characters
    assert len({printed(word) for word in words}) == len(set(words))
    every = [token_bytes(byte_level, token) for token in range(256)]
    assert len(set(every)) == len(every)


def test_sentencepiece_keeps_its_spaces_and_bytes():
    ids = [0, 0, 2, 3, 4, 5, 1, 5]
    words = [token_bytes(Pieces(), token) for token in ids]
    assert b"".join(words).decode() == " Hello Hello日x x"


def test_log_probabilities_tell_bytes_and_places(byte_level):
    ids = byte_level(TEXT)["input_ids"]
    chat = ChatAnswers("m", byte_level, 1)._logprobs(Choice(0, Told(ids)))
    told = bytes(byte for one in chat["content"] for byte in one["bytes"])
    assert told.decode() == TEXT
    found = CompletionAnswers("m", byte_level, 1)._logprobs(Choice(0, Told(ids)))
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert TEXT[offset : offset + len(token)] == token
    assert [list(top) for top in found["top_logprobs"]] == [[t] for t in found["tokens"]]
