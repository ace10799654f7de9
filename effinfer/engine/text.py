"""Text from tokens as they come: whole characters only, and up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"  # what decoders put for bytes that are no character, or not one yet
_WINDOW = 12  # tokens after which decoding starts from a later one
_CONTEXT = 4  # tokens before that one that are decoded with it
_LIMIT = 64  # tokens of a window that never ends on a whole character: it is no text


class Detokenizer:
    """Decodes one sequence's tokens as they come; the pieces add up to the whole's text.

    A token is decoded with those before it, because a tokenizer's decoder may join or space it by
    them; and what could still become another character is held back.

    Args:
        tokenizer: with transformers' ``decode(ids, skip_special_tokens=...)``.
        skip_special_tokens: leave out the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # the window: tokens that have been shown, then those that come
        self._shown = 0  # characters of the window's text that have been handed out
        self._borders: list[int] = []  # window lengths at which all of its text was handed out

    def push(self, *tokens: int) -> str:
        """The text that a few more tokens make certain; may be empty."""
        self._ids += tokens
        text = self._decode(self._ids)
        # All broken ones at the end: some decoders break a whole run of bytes over its last one.
        whole = len(text if len(self._ids) >= _LIMIT else text.rstrip(_BROKEN))
        piece = text[self._shown : whole]
        self._shown = max(self._shown, whole)
        if self._shown == len(text):
            self._borders.append(len(self._ids))
            if len(self._ids) >= _WINDOW:
                self._move_window()
        return piece

    def _move_window(self) -> None:
        """Drop tokens up to a border between characters, a few before the last."""
        start = max((b for b in self._borders if b <= len(self._ids) - _CONTEXT), default=0)
        self._ids = self._ids[start:]
        self._borders = [b - start for b in self._borders if b > start]
        self._shown = len(self._decode(self._ids))

    def flush(self) -> str:
        """What was held back, when no token comes after it."""
        piece = self._decode(self._ids)[self._shown :]
        self._ids, self._shown, self._borders = [], 0, []
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )
        return text


class StopStrings:
    """Passes text on until one of some strings is in it, and holds back what may begin one.

    The result doesn't depend on how the text was cut into pieces: the string that is complete
    first ends it, of two complete at once the longer.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The part of the text that is certain to stay; ``found`` tells whether it ends here."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [
            (start + len(string), start)
            for string in self._strings
            if (start := text.find(string)) >= 0
        ]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no text comes after it."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Detokenizer and stop strings of one request; text that is complete before ``min_tokens``
    tokens can't be a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(stop)
        self._watches = bool(stop)
        self._early = max(0, min_tokens - 1)  # tokens that can't end it

    @property
    def stopped(self) -> bool:
        """True when a stop string was found: nothing more comes."""
        return self._stop.found

    def push(self, token: int) -> str:
        """The text that one more token makes certain; may be empty."""
        piece = self._detokenizer.push(token)
        if self._early > 0:
            self._early -= 1
            return piece
        return self._stop.push(piece)

    def push_all(self, tokens: Sequence[int]) -> str:
        """``push`` of each; decoded several at once where no stop string has to be found."""
        if self._watches:
            return "".join(map(self.push, tokens))
        cuts = range(0, len(tokens), _WINDOW)
        return "".join(self._detokenizer.push(*tokens[at : at + _WINDOW]) for at in cuts)

    def flush(self) -> str:
        """The rest of the text, when no token comes any more."""
        return self._stop.push(self._detokenizer.flush()) + self._stop.flush()


def _overlap(text: str, string: str) -> int:
    """The longest end of ``text`` that ``string`` begins with, shorter than ``string``."""
    for n in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:n]):
            return n
    return 0
