"""How an exception becomes a failure that travels, and a failure an exception again."""

import traceback
from dataclasses import replace

import cloudpickle

from djdist._job import Failure
from djdist.database.errors import is_lock_wait, limit_of
from djdist.errors import MakeError, RemoteTraceback

TEXT_LENGTH = 100_000
PICKLE_LENGTH = 1_000_000


def failure_of(error: BaseException) -> Failure:
    """Describe what is being raised."""
    text = str(error)
    message = type(error).__name__ + (f": {text}" if text else "")
    kinds = tuple(kind.__name__ for kind in type(error).__mro__)
    trace, limit, blocked = traceback.format_exc(), limit_of(error), is_lock_wait(error)
    return Failure(_shortened(message), _shortened(trace), error, kinds, limit, blocked)


def portable(failure: Failure) -> Failure:
    """Return a failure that can travel: with its exception pickled, or without it where that can't be."""
    return replace(failure, exception=_pickled(failure.exception))


def exception_of(failure: Failure) -> BaseException:
    """Return what ``make()`` raised, with the traceback of where it did."""
    if isinstance(failure.exception, BaseException):
        return failure.exception
    try:
        error = cloudpickle.loads(failure.exception) if failure.exception else MakeError(failure.message)
    except Exception:
        error = MakeError(failure.message)
    assert isinstance(error, BaseException)
    error.__cause__ = RemoteTraceback(failure.traceback)
    return error


def _shortened(text: str) -> str:
    """Leave the middle out of what is too long to travel."""
    half = TEXT_LENGTH // 2
    return text if len(text) <= TEXT_LENGTH else f"{text[:half]}\n...\n{text[-half:]}"


def _pickled(error: BaseException | bytes | None) -> bytes | None:
    try:
        pickled: bytes = cloudpickle.dumps(error)
        cloudpickle.loads(pickled)
    except Exception:
        return None
    return pickled if len(pickled) <= PICKLE_LENGTH else None
