"""Directives that write down what the code knows, so that no page repeats it by hand."""

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
import yaml
from docutils.nodes import Node
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import djdist
from djdist.cli.commands import app

CODE = Path(djdist.__file__).parent
Settings = type(djdist.config)


class Generated(SphinxDirective):
    """A directive whose content is MyST that a function returns."""

    def run(self) -> list[Node]:
        """Write it again at each build, whatever has changed."""
        self.env.note_reread()
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


class Options(Generated):
    """The options of a function of djdist, from its docstring."""

    required_arguments = 1

    def parts(self) -> Iterator[str]:
        found = documented(getattr(djdist, self.arguments[0]), "Parameters")
        yield table(
            ("option", "meaning"), [(f"`{name}`", myst(meaning)) for name, (_, meaning) in found.items()]
        )


class CommandLine(Generated):
    """All commands of ``djdist`` with their arguments, options and examples."""

    def parts(self) -> Iterator[str]:
        for name, command in commands().items():
            arguments = [each for each in command.params if each.param_type_name == "argument"]
            options = [each for each in command.params if each.param_type_name == "option"]
            usage = " ".join(["djdist", name, *map(_written, arguments)])
            yield f"## djdist {name}\n\n```text\n{usage}{' [OPTIONS]' * bool(options)}\n```"
            yield _with_options_as_code(command.help)
            if arguments:
                yield table(("argument", ""), [(f"`{each.metavar}`", each.help) for each in arguments])
            if options:
                rows = [(_names(each), _with_options_as_code(each.help)) for each in options]
                yield table(("option", ""), rows)
            examples = re.findall("`(.*)`", command.epilog or "")
            yield "```console\n{}\n```".format("\n".join(f"$ {example}" for example in examples))


def commands() -> dict[str, Any]:
    """Return the commands by their names, in the order of the help."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def _written(argument: Any) -> str:
    several = "..." * (argument.nargs != 1)
    return f"{argument.metavar}{several}" if argument.required else f"[{argument.metavar}]{several}"


def _with_options_as_code(text: str) -> str:
    return re.sub(r"(?<![`\w-])--?[a-z][\w-]*", r"`\g<0>`", text)


def _names(option: Any) -> str:
    value = f" {option.metavar}" if option.metavar else ""
    return ", ".join(f"`{name}{value}`" for name in [*option.opts, *option.secondary_opts])


class Metrics(Generated):
    """What djdist measures on Ray, as Prometheus sees it."""

    def parts(self) -> Iterator[str]:
        rows = [
            (f"`ray_{texts[0]}{'_total' * (kind == 'Counter')}`", kind.lower(), texts[1])
            for kind, texts in calls("Counter", "Gauge", "Histogram")
            if texts[0].startswith("djdist_")  # a Counter may be Python's
        ]
        yield table(("metric", "kind", "meaning"), rows)


class LogLines(Generated):
    """All that djdist logs."""

    def parts(self) -> Iterator[str]:
        rows = {
            (LEVELS[method], re.sub(r"%[-+.\d]*[sdrgf]", "…", "…(…) " * (method == "_log") + texts[0]))
            for method, texts in calls(*LEVELS)
            if texts[0]
        }
        yield table(("level", "message"), sorted(rows))


LEVELS = {
    "info": "INFO",
    "warning": "WARNING",
    "_log": "WARNING",  # of one key
    "error": "ERROR",
    "exception": "ERROR",
}


class Citation(Generated):
    """CITATION.cff as BibTeX."""

    def parts(self) -> Iterator[str]:
        cff = yaml.safe_load((CODE.parent / "CITATION.cff").read_text())
        entry = {
            "title": cff["title"],
            "author": f"{{{' and '.join(author['name'] for author in cff['authors'])}}}",
            "version": cff["version"],
            "year": cff["date-released"].year,
            "url": cff["repository-code"],
        }
        lines = "".join(f"  {name} = {{{value}}},\n" for name, value in entry.items())
        yield f"```bibtex\n@software{{djdist,\n{lines}}}\n```"


def calls(*methods: str) -> Iterator[tuple[str, list[str]]]:
    """Yield which of these methods djdist's code calls, and with which texts."""
    for file in sorted(CODE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        known = {
            ast.unparse(node.targets[0]): node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and (name := _name_of(node.func)) in methods:
                yield name, [_text_of(argument, known) for argument in node.args]


def _name_of(function: ast.expr) -> str:
    return str(getattr(function, "attr", "") or getattr(function, "id", ""))


def _text_of(node: ast.expr | None, known: dict[str, ast.expr]) -> str:
    """Return the text that stands there or has that name, or nothing if it is worked out."""
    node = known.get(node.id) if isinstance(node, ast.Name) else node
    return str(node.value) if isinstance(node, ast.Constant) else ""


def table(names: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table in Markdown whose first column holds names."""
    lines = [names, tuple("---" for _ in names), *rows]
    return "\n".join(["{.names}", *(f"| {' | '.join(map(_in_one_line, line))} |" for line in lines)])


def _in_one_line(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")


def documented(of: Any, section: str) -> dict[str, tuple[str, str]]:
    """Return the types and descriptions of the names in a section of a NumPy docstring."""
    text = inspect.getdoc(of) or ""
    body = re.split(rf"^{section}\n-+\n", text, flags=re.MULTILINE)[1]
    body = re.split(r"\n\n\w+\n-+\n", body)[0]
    found = re.findall(r"^(\S[^:\n]*?)(?: : (.*))?\n((?:    .*\n?|\n)+)", body, re.MULTILINE)
    return {name: (of_type, inspect.cleandoc(meaning)) for name, of_type, meaning in found}


def myst(text: str) -> str:
    """Return reStructuredText of a docstring as MyST."""
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    return re.sub(r":(\w+):`", r"{py:\1}`", text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("citation", Citation)
    app.add_directive("command-line", CommandLine)
    app.add_directive("log-lines", LogLines)
    app.add_directive("metrics", Metrics)
    app.add_directive("options-of", Options)
    app.add_directive("public-names", PublicNames)
    app.add_directive("settings", SettingsReference)
    return {"parallel_read_safe": True}
