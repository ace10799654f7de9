"""Streamed text: whole characters, the tokenizer's own spacing, and exact stop strings."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import tokenizers as tk
from hypothesis import given, settings
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from effinfer.engine.text import _LIMIT, Detokenizer, StopStrings, TextStream
from effinfer.models import demo_path

TEXT = "Grüße, 世界! 😀👩‍👩‍👧 é ẍ\u0308 naïve — once upon a time,  there  was\n\ta 🦜 and ¿qué?"


def byte_level():
    return AutoTokenizer.from_pretrained(demo_path())


def sentencepiece():
    """Unknown characters as bytes, and spaces that a decoder strips from the first token."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    for token in ("▁", *"abcdefghinoprstuwy", "▁o", "on", "▁a", "▁th", "▁was", "▁once"):
        vocab.setdefault(token, len(vocab))
    merges = [("▁", "o"), ("o", "n"), ("▁", "a"), ("▁", "t")]
    merges = [m for m in merges if "".join(m) in vocab]
    model = tk.Tokenizer(tk.models.BPE(vocab, merges, byte_fallback=True))
    model.normalizer = tk.normalizers.Sequence(
        [tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")]
    )
    model.decoder = tk.decoders.Sequence(
        [
            tk.decoders.Replace("▁", " "),
            tk.decoders.ByteFallback(),
            tk.decoders.Fuse(),
            tk.decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=model)


def wordpiece():
    """Continuations (##) that the decoder joins to the token before."""
    words = ["[UNK]", "once", "up", "##on", "a", "time", "##ly", "there", "was", ",", "!", "##s"]
    model = tk.Tokenizer(
        tk.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    model.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
    model.decoder = tk.decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=model)


TOKENIZERS = {
    "byte_level": byte_level(),
    "sentencepiece": sentencepiece(),
    "wordpiece": wordpiece(),
}


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer, ids):
    stream = Detokenizer(tokenizer)
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_add_up_and_break_no_character(name):
    tokenizer = TOKENIZERS[name]
    text = "once upon a time, timely there was! onces" if name == "wordpiece" else TEXT * 3
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == whole(tokenizer, ids)
    assert not any("\ufffd" in part for part in parts)
    assert sum(bool(part) for part in parts) > len(ids) / 5  # it streams


@given(text=st.text(max_size=60), name=st.sampled_from(["byte_level", "sentencepiece"]))
@settings(max_examples=60, deadline=None)
def test_any_text_streams_whole(text, name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == whole(tokenizer, ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@given(
    ids=st.lists(st.integers(3, 260), max_size=150),
    borders=st.lists(st.integers(0, 150), max_size=8),
    stop=st.sampled_from([(), ("e",)]),
)
@settings(max_examples=60, deadline=None)
def test_tokens_that_come_together_make_the_same_text(ids, borders, stop):
    tokenizer = TOKENIZERS["byte_level"]
    alone, together = TextStream(tokenizer, stop), TextStream(tokenizer, stop)
    text = "".join(map(alone.push, ids)) + alone.flush()
    parts = [together.push_all(part) for part in cut(ids, borders)]
    assert "".join(parts) + together.flush() == text


def test_special_tokens_are_left_out():
    tokenizer = TOKENIZERS["byte_level"]
    a, b = tokenizer.encode("one"), tokenizer.encode(" two")
    ids = [*a, tokenizer.eos_token_id, *b]
    assert "".join(pieces(tokenizer, ids)) == "one two"


def test_bytes_that_are_no_text_are_shown_within_the_limit():
    tokenizer = TOKENIZERS["sentencepiece"]
    stream = Detokenizer(tokenizer)
    shown = [stream.push(0xFF) for _ in range(3 * _LIMIT)]
    assert "".join(shown[: _LIMIT + 1])
    assert set("".join(shown)) == {"\ufffd"}


def cut(text, borders):
    edges = [0, *sorted(min(b, len(text)) for b in borders), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def stopped_text(text, stops):
    """By definition: grow the text a character at a time until it ends in a stop string."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
    borders=st.lists(st.integers(0, 30), max_size=8),
)
@settings(max_examples=200, deadline=None)
def test_stop_strings_cut_at_the_same_place_however_the_text_comes(text, stops, borders):
    matcher = StopStrings(stops)
    out, seen = "", ""
    for piece in cut(text, borders):
        out += matcher.push(piece)
        seen += piece
        certain = stopped_text(seen, stops)
        assert certain[0].startswith(out)  # nothing handed out is taken back
        longest = max(len(s) for s in stops)
        assert len(certain[0]) - len(out) < longest  # no more is held than a stop string hides
    assert matcher.found == stopped_text(text, stops)[1]
    if not matcher.found:
        out += matcher.flush()
    assert out == stopped_text(text, stops)[0]


def test_a_stop_string_across_token_borders_ends_the_stream():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode(
        "The parrot said hello there, then 😀 flew away", add_special_tokens=False
    )
    text = whole(tokenizer, ids)
    for stop in ("ello the", "😀", "said", ", t", "y"):
        stream = TextStream(tokenizer, (stop, "never"))
        out = ""
        for token in ids:
            out += stream.push(token)
            if stream.stopped:
                break
        assert stream.stopped
        assert out == text[: text.index(stop)]
        assert stream.push(ids[0]) == stream.flush() == ""


def test_held_text_comes_out_when_the_stream_ends_otherwise():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("wait for STO", add_special_tokens=False)
    stream = TextStream(tokenizer, ("STOP",))
    out = "".join(stream.push(token) for token in ids)
    assert out == "wait for "
    assert out + stream.flush() == "wait for STO"
    assert not stream.stopped
