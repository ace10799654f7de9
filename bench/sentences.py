"""Real sentences from Python's own documentation strings, split into two sets by module."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SHORTEST, _LONGEST = 8, 40  # words
_SENTENCE = re.compile(r"[A-Z][^.!?]*[a-z][^.!?]*[.!?](?=\s|$)")
_MARKUP = re.compile(r"[<>{}=|\\`*_\[\]]|>>>|\.\.\s")


def calibration_sentences(count: int) -> list[str]:
    """From about half of the standard library's modules, by a hash of their names."""
    return _evenly(_by_module()[0], count)


def evaluation_sentences(count: int) -> list[str]:
    """From the other modules, and none that a module of the first half has too."""
    calibration, others = _by_module()
    known = set(calibration)
    return _evenly([sentence for sentence in others if sentence not in known], count)


def _by_module() -> tuple[list[str], list[str]]:
    halves: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        half = halves[hashlib.sha256(path.name.encode()).digest()[0] % 2]
        half.update(dict.fromkeys(_sentences(path)))
    return list(halves[0]), list(halves[1])


def _evenly(sentences: list[str], count: int) -> list[str]:
    if len(sentences) < count:
        raise SystemExit(f"only {len(sentences)} sentences in the standard library's documentation")
    return [sentences[i * len(sentences) // count] for i in range(count)]


def _sentences(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text("utf-8", errors="replace"))):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        for paragraph in (text or "").split("\n\n"):
            for sentence in _SENTENCE.findall(" ".join(paragraph.split())):
                plain = not _MARKUP.search(sentence)
                if plain and _SHORTEST <= len(sentence.split()) <= _LONGEST:
                    yield sentence
