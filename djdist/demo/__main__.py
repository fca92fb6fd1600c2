"""``python -m djdist.demo``: a real pipeline on an embedded database."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import datajoint as dj

import djdist
from djdist._libraries import explained
from djdist.jobs.history import history
from djdist.jobs.table import all_jobs_to_look_at

FOLDER = Path("djdist-demo")
PICTURE = "djdist-demo.png"
LOOK_ON = """\
    import djdist; djdist.embedded({folder!r}); djdist.enable()
    from djdist.demo import pipeline; djdist.progress(pipeline)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code: 0 if every key was made."""
    options = _options(arguments)
    try:
        return _run(options)
    except djdist.DjdistError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped. What was made is kept: the same command goes on from here.\n")
        return 130


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m djdist.demo", description=__doc__)
    parser.add_argument(
        "--executor", default="ray", choices=["ray", "dask", "local"], help="where keys are made (ray)"
    )
    parser.add_argument("--processes", type=_processes, default=2, help="processes of the local executor (2)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the database lies (%(default)s)")
    parser.add_argument("--output", type=_picture, default=PICTURE, help="the picture to write (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget the results of an earlier run")
    return parser.parse_args(arguments)


def _processes(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number from 1")
    return int(text)


def _picture(text: str) -> Path:
    """Check it now rather than after all the work."""
    path = Path(text).expanduser()
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text} must end in .png")
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} can't be written: no such folder, or not yours")
    return path


def _run(options: argparse.Namespace) -> int:
    database = djdist.embedded(options.folder)
    _say("Database", f"PostgreSQL runs in {database.folder} as long as this demo.")
    _say("Look on", f"Meanwhile, in another Python:\n{LOOK_ON.format(folder=str(database.folder))}")
    pipeline = _pipeline(fresh=options.fresh)
    djdist.enable()
    dj.config.jobs.keep_completed = True  # remember when and where keys were made, for the picture
    with _executor(options) as executor:
        _say(
            "Populate",
            f"{len(pipeline.Image())} images by {len(pipeline.Method())} methods, on {executor!r}.",
        )
        _populate(pipeline, executor)
        if pipeline.Statistics.jobs.errors:
            _repair(pipeline)
            _populate(pipeline, executor)
    return _report(pipeline, options.output)


def _pipeline(*, fresh: bool) -> Any:
    """Import the tables, which declares them in the database that dj.config names now."""
    try:
        pipeline = import_module("djdist.demo.pipeline")
    except ImportError as error:
        raise explained(error, "The demo", "demo") from error
    if fresh:
        with dj.config.override(safemode=False):
            for table in (pipeline.GreyImage, pipeline.DarkObjects):
                table.delete()
    elif len(pipeline.Statistics()):
        _say("Already there", f"{len(pipeline.Statistics())} keys of an earlier run; --fresh starts over.")
    return pipeline


def _executor(options: argparse.Namespace) -> Any:
    if options.executor == "local":
        return djdist.LocalExecutor(options.processes)
    return djdist.RayExecutor() if options.executor == "ray" else djdist.DaskExecutor()


def _populate(pipeline: Any, executor: Any) -> None:
    djdist.populate(
        pipeline, reserve_jobs=True, suppress_errors=True, display_progress=True, executor=executor
    )


def _repair(pipeline: Any) -> None:
    """Show the errors, remove their cause, and retry the keys."""
    errors = pipeline.Statistics.jobs.errors
    held_back = len(pipeline.Image()) - len(pipeline.Choice())
    _say("Errors", f"{len(errors)} keys failed. So there is no Choice yet for {held_back} images.")
    print("Statistics.jobs.errors.to_pandas() shows why:")
    print(errors.to_pandas()[["error_message"]].sort_index().to_string(max_colwidth=100))
    images = pipeline.Image & errors.keys()
    _say("Cure", f"The objects of {', '.join(images.to_arrays('image'))} are darker than their background.")
    pipeline.DarkObjects.insert(images, skip_duplicates=True)
    errors.delete()
    with dj.config.override(safemode=False):
        (pipeline.Segmentation & pipeline.DarkObjects).delete()
    _say("Retry", "The keys of these images are made again, the others are left alone.")


def _report(pipeline: Any, output: Path) -> int:
    figure = import_module("djdist.demo.figure")
    left = len(pipeline.Statistics.jobs.errors)
    regions = len(pipeline.Statistics.Region())
    _say("Result", f"{regions} objects in {len(pipeline.Statistics())} segmentations, {left} errors left.")
    run = history(all_jobs_to_look_at([pipeline]))
    _say("Picture", str(figure.draw_results(output, run).resolve()))
    return 1 if left else 0


def _say(title: str, text: str) -> None:
    print(f"\n{title}: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
