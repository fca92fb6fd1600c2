"""docs/troubleshooting.md explains what djdist says, in the words in which it says it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
PLACEHOLDER = re.compile(r"%(?:\.\d)?[a-z]|\{\w+(?:!r)?\}")
SPEAKING = {"warning", "warn", "_log"}
FOR_DEVELOPERS = {"AssertionError", "ArgumentTypeError", "AttributeError"}


def said(expression: ast.expr) -> str:
    """Return what an expression says, with … for what differs from case to case."""
    match expression:
        case ast.Constant(value=str(text)):
            return PLACEHOLDER.sub("…", text)
        case ast.JoinedStr(values=parts):
            return "".join(said(part) or "…" for part in parts)
        case _:
            return ""


def nodes() -> Iterator[ast.AST]:
    for file in (ROOT / "djdist").rglob("*.py"):
        if "demo" not in file.parts:
            yield from ast.walk(ast.parse(file.read_text()))


NODES = list(nodes())
TEXTS = [text for node in NODES if isinstance(node, ast.expr) and (text := said(node))]


def raised_or_logged() -> Iterator[str]:
    """Yield the messages that are written where they are raised or logged, and have words of their own."""
    for node in NODES:
        if isinstance(node, ast.Call) and node.args and re.search(r"\w \w", text := said(node.args[0])):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in SPEAKING or (name.endswith("Error") and name not in FOR_DEVELOPERS):
                yield text


EXPLAINED = re.findall(r"^(?:### |\| )`(.*?)`", PAGE, re.MULTILINE)


@pytest.mark.parametrize("message", EXPLAINED)
def test_each_message_is_djdists(message: str) -> None:
    assert any(message in text for text in TEXTS)


@pytest.mark.parametrize("message", sorted({*raised_or_logged()}))
def test_each_error_and_warning_is_explained(message: str) -> None:
    assert any(explained in message for explained in EXPLAINED)
