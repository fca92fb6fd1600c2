"""What is wrong with an optional library, and what cures it however djdist was installed."""

import sys
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

from djdist.errors import MissingLibraryError

INSTALLED = {"site-packages", "dist-packages"}


def explained(error: ImportError | AttributeError, what: str, extra: str) -> MissingLibraryError:
    """Return an error that says whether a library is missing, hidden by a file of the user's, or broken."""
    named = error.name if isinstance(error, ImportError) else None
    library = (named or extra).split(".")[0]
    file, install = _file_of(library), f"pip install {_requirements(extra)}"
    if file is None:
        return MissingLibraryError(f"{what} needs {library}: {install}")
    if INSTALLED.isdisjoint(file.parts):
        return MissingLibraryError(
            f"{what} needs the library {library}, but {file} hides it: rename that file."
        )
    return MissingLibraryError(
        f"{what} needs {library}, which is there but can't be imported: {type(error).__name__}: {error}. "
        f"Another version may do: {install}"
    )


def _file_of(library: str) -> Path | None:
    """Find what is imported by a name; a folder without Python code, which may be anyone's, is nothing."""
    module = sys.modules.get(library)
    if module is None:
        spec = None if library in sys.modules else find_spec(library)
        file = spec.origin if spec else None
    else:
        file = getattr(module, "__file__", None)
    return Path(file) if file else None


def _requirements(extra: str) -> str:
    """Return what an extra stands for, as pip takes it: ``djdist[extra]`` may not be on any index."""
    try:
        listed = [line.partition(";") for line in requires("djdist") or ()]
    except PackageNotFoundError:  # it runs from a folder
        listed = []
    wanted = [
        name.strip()
        for name, _, marker in listed
        if marker.replace('"', "'").strip() == f"extra == '{extra}'"
    ]
    return " ".join(f'"{name}"' for name in wanted) or f'"djdist[{extra}]"'
