"""Directives that write down what the code knows, so that no page repeats it by hand."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

from docutils.nodes import Node
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import djdist

Settings = type(djdist.config)


class Generated(SphinxDirective):
    """A directive whose content is MyST that a function returns."""

    def run(self) -> list[Node]:
        return self.parse_text_to_nodes("\n\n".join(self.parts()), allow_section_headings=True)

    def parts(self) -> Iterator[str]:
        raise NotImplementedError


class SettingsReference(Generated):
    """All settings, with their types, defaults, limits and environment variables."""

    def parts(self) -> Iterator[str]:
        meanings = documented(Settings, "Attributes")
        for name, field in Settings.model_fields.items():
            of_type, meaning = meanings[name]
            limits = ", ".join(filter(None, map(_limit, field.metadata)))
            yield "\n".join(
                [
                    f"````{{py:attribute}} djdist.config.{name}",
                    f":type: {of_type}",
                    f":value: {field.default!r}",
                    "",
                    myst(meaning),
                    "",
                    f"In the environment: `{Settings.model_config['env_prefix']}{name.upper()}`"
                    + (f"; {limits}." if limits else "."),
                    "````",
                ]
            )


LIMITS = {"ge": "at least", "gt": "more than", "le": "at most"}


def _limit(constraint: Any) -> str:
    limits = [(word, getattr(constraint, name, None)) for name, word in LIMITS.items()]
    return "".join(f"{word} {limit:,.0f}" for word, limit in limits if limit is not None)


class PublicNames(Generated):
    """Functions, executors, exceptions or other names of ``djdist``, documented by their docstrings."""

    required_arguments = 1

    def parts(self) -> Iterator[str]:
        wanted = self.arguments[0]
        for name in public_names():
            if kind_of(getattr(djdist, name)) == wanted:
                yield f"```{{eval-rst}}\n{AUTODOC[wanted].format(name=name)}\n```"


AUTODOC = {
    "functions": ".. autofunction:: djdist.{name}",
    "executors": ".. autoclass:: djdist.{name}",
    "exceptions": ".. autoexception:: djdist.{name}\n   :show-inheritance:",
    "classes": ".. autoclass:: djdist.{name}()\n   :members:",
}


def public_names() -> list[str]:
    """Return the public names of djdist; its executors need an optional library each."""
    return sorted({*djdist.__all__, "DaskExecutor", "LocalExecutor", "RayExecutor"})


def kind_of(value: Any) -> str:
    """Return the section of the reference to which a public name belongs."""
    if not isinstance(value, type):
        return "functions" if callable(value) else "config"
    if issubclass(value, BaseException):
        return "exceptions"
    return "executors" if value.__name__.endswith("Executor") else "classes"


def documented(of: Any, section: str) -> dict[str, tuple[str, str]]:
    """Return the types and descriptions of the names in a section of a NumPy docstring."""
    text = inspect.getdoc(of) or ""
    body = re.split(rf"^{section}\n-+\n", text, flags=re.MULTILINE)[1]
    body = re.split(r"\n\n\w+\n-+\n", body)[0]
    found = re.findall(r"^(\S[^:\n]*) : (.*)\n((?:    .*\n?|\n)+)", body, re.MULTILINE)
    return {name: (of_type, inspect.cleandoc(meaning)) for name, of_type, meaning in found}


def myst(text: str) -> str:
    """Return reStructuredText of a docstring as MyST."""
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    return re.sub(r":(\w+):`", r"{py:\1}`", text)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("settings", SettingsReference)
    app.add_directive("public-names", PublicNames)
    return {"parallel_read_safe": True}
