"""What single tokens are in a text: bytes, for a character may take several of them."""

from __future__ import annotations

import codecs
import re
from typing import Any

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_BLANK = "\u2581"  # what SentencePiece writes for a space


def _byte_level() -> dict[str, int]:
    """The bytes behind the characters that byte-level vocabularies are written in: the printable
    ones of Latin-1 stand for themselves, the others come after, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + i): byte for i, byte in enumerate(others)},
    }


_BYTE_OF = _byte_level()


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The UTF-8 that a token adds to a text; a part of a character, maybe.

    Args:
        tokenizer: transformers', or anything with its ``decode``.
    """
    word = str(tokenizer.decode([token]))
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return word.encode()
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if found := _BYTE_TOKEN.fullmatch(piece):
        return bytes([int(found[1], 16)])
    if "\ufffd" in word and all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    if piece.startswith(_BLANK) and not word.startswith(" "):
        return b" " + word.encode()
    return word.encode()


def printed(word: bytes) -> str:
    """A token as completions show it: as text, or OpenAI's way to write what is no whole character,
    so that different tokens look different."""
    try:
        return word.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in word)


class Characters:
    """Counts the characters that bytes have made up so far."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._count = 0

    def after(self, word: bytes) -> int:
        """How many there are once ``word`` has come."""
        self._count += len(self._decoder.decode(word))
        return self._count
