"""Executes the notebooks, and keeps of their outputs what is worth committing.

``make notebooks`` executes them again and writes them in place.
"""

from __future__ import annotations

import base64
import io
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "notebooks"
SECONDS = 240
COLORS = 64
NO_WIDGETS = 'raise ImportError("bars are to be text, which can be committed")'
BAR = re.compile(r"^\w+: +\d+%\|.*\]$")
VARYING = {
    r" *\d+%\|.*?\| .*?(key/s|s/key), ": " bar ",
    r" on \S+ \((detached|process)": r" on host (\1",
    r", \d+ queued|, queued=\d+": "",
    r"\d+([.:-]\d+)*": "#",
}
"""What a notebook prints differently each time, and what to compare instead."""


def executed(name: str, folder: Path, instead: Mapping[str, str] | None = None) -> Any:
    """Execute a notebook in a folder, from which it reads and into which it writes.

    ``instead`` says what to replace in its code before.
    """
    import nbclient
    import nbformat

    (folder / "hidden").mkdir()
    (folder / "hidden" / "ipywidgets.py").write_text(NO_WIDGETS)
    paths = [str(folder / "hidden"), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    quiet = {"PYTHONWARNINGS": "ignore", "DJ_LOG_LEVEL": "WARNING", "PYTHONPATH": os.pathsep.join(paths)}
    quiet["RAY_agent_register_timeout_ms"] = "60000"  # or no Ray starts on a busy machine
    notebook = nbformat.read(FOLDER / name, as_version=4)
    for cell in notebook.cells:
        for words, others in (instead or {}).items():
            cell.source = cell.source.replace(words, others)
    client = nbclient.NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}})
    client.create_kernel_manager().shutdown_wait_time = SECONDS  # the database ends with the kernel
    client.execute(env={**os.environ, **quiet})
    return cleaned(notebook)


def cleaned(notebook: Any) -> Any:
    """Leave out what tells of this machine, and what is said twice."""
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.metadata.pop("execution", None)
        outputs = [output for output in map(_cleaned, cell.outputs) if output]
        bars = [output for output in outputs if output.get("name") == "stderr"]
        cell.outputs = [output for output in outputs if output not in bars[:-1]]
    return notebook


def said(notebook: Any) -> list[str]:
    """Return what the cells of code print, without what differs from run to run.

    Lines that come at once are one output, and else several.
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [" ".join(" ".join(map(_constant, cell.outputs)).split()) for cell in cells]


def _cleaned(output: Any) -> Any:
    if output.get("name") == "stderr":  # of its bar the last state, and no log
        states = re.split(r"[\r\n]", output.text)
        bars = [state for state in states if BAR.match(state)]
        output.text = f"{bars[-1]}\n" if bars else ""
        return output if bars else None
    if "text" in output:
        output.text = output.text.replace(platform.node(), "laptop")
    data = output.get("data", {})
    if "text/html" in data:
        data["text/html"] = data["text/html"].replace(platform.node(), "laptop")
    if "image/png" in data:
        data["image/png"] = _smaller(data["image/png"])
    if "text/plain" in data:
        shown = "<Figure>" if "image/png" in data else "<table>" if "text/html" in data else None
        data["text/plain"] = shown or data["text/plain"].replace(platform.node(), "laptop")
    return output


def _smaller(png: str) -> str:
    from PIL import Image

    picture, packed = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    picture.convert("RGB").quantize(COLORS).save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def _constant(output: Any) -> str:
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    for varying, instead in VARYING.items():
        text = re.sub(varying, instead, text)
    return " ".join([*sorted(output.get("data", {})), text.strip()])


def main() -> None:
    """Write the notebooks with new outputs."""
    import nbformat

    for file in sorted(FOLDER.glob(sys.argv[1] if len(sys.argv) > 1 else "*.ipynb")):
        # Ray puts sockets there, whose paths must stay short
        with tempfile.TemporaryDirectory(prefix="nb-", ignore_cleanup_errors=True) as folder:
            os.environ["RAY_TMPDIR"] = folder
            nbformat.write(executed(file.name, Path(folder)), file)


if __name__ == "__main__":
    main()
