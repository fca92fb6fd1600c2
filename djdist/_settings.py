"""Settings of djdist, from assignments, ``DJDIST_*`` environment variables and ``djdist.json``."""

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, JsonConfigSettingsSource, NoDecode, SettingsConfigDict

from djdist._job import LONGEST_SECONDS, KeysPerTransaction, checked_keys_per_transaction
from djdist._needs import EXAMPLE, Needs, checked
from djdist.errors import OptionError

PREFIX = "DJDIST_"
FILE = "djdist.json"
RENAMED = {"max_losses": "max_worker_losses"}
"""Settings by their former names, which work for one release."""

ExceptionClasses: TypeAlias = str | type[BaseException] | Iterable[str | type[BaseException]]


def class_names(given: Any) -> tuple[str, ...]:
    """Return the names of exception classes; given are one or several, or their names.

    Raises
    ------
    OptionError
        Something else is given.
    """
    listed = [given] if isinstance(given, type) else _separated(given)
    if not isinstance(listed, Iterable):
        raise OptionError(f"retry_on={given!r} must be exception classes or their names.")
    names = tuple(each.__name__ if isinstance(each, type) else each for each in listed)
    if not all(isinstance(name, str) for name in names):
        raise OptionError(f"retry_on={given!r} must be exception classes or their names.")
    return names


def _separated(given: Any) -> Any:
    """Take a text for names with commas between them, as the environment gives them."""
    return [name.strip() for name in given.split(",") if name.strip()] if isinstance(given, str) else given


def _separated_urls(given: Any) -> Any:
    """Take a text for URLs with commas between them; a comma within one is followed by no scheme."""
    if not isinstance(given, str):
        return given
    return [url for url in re.split(r"[\s,]+(?=[\w+.-]+://)", given.strip(" ,")) if url]


def number_or_auto(given: Any) -> Any:
    """Take a text for a number of keys per transaction, as the environment and the command line give it."""
    is_number = isinstance(given, str) and given.strip().isdecimal()
    return checked_keys_per_transaction(int(given) if is_number else given)


def _current(name: str) -> str:
    """Return the name of a setting, and warn of a former one."""
    if name in RENAMED:
        message = (
            f"djdist.config.{name} is now djdist.config.{RENAMED[name]}; the next release won't know it."
        )
        warnings.warn(message, FutureWarning, stacklevel=3)
    return RENAMED.get(name, name)


def _formerly_named_in_environment() -> dict[str, str]:
    """Return settings whose variable has a former name, unless it is there with the current one, too."""
    present = {name.lower(): value for name, value in os.environ.items()}
    variables = {name: f"{PREFIX}{name}".lower() for name in (*RENAMED, *RENAMED.values())}
    former = {_current(name): present[variables[name]] for name in RENAMED if variables[name] in present}
    return {name: value for name, value in former.items() if variables[name] not in present}


def _file() -> Path | None:
    """Return the settings file, which is found as DataJoint finds its own: here or above, in the project."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / FILE).is_file():
            return folder / FILE
        if (folder / ".git").exists() or (folder / ".hg").exists():
            break
    return None


@contextmanager
def _refusing_clearly() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        refusals = [f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors()]
        raise OptionError(f"djdist.config.{'; '.join(refusals)}") from error


def _in_file(settings: type[BaseSettings], file: Path | None) -> JsonConfigSettingsSource:
    try:
        return JsonConfigSettingsSource(settings, file)
    except (OSError, ValueError, TypeError) as error:
        raise OptionError(f"The settings file {file} can't be read as JSON: {error}") from error


class Settings(BaseSettings):
    """Settings of djdist.

    Each may be assigned (``djdist.config.lease_seconds = 120``), come from the
    environment (``DJDIST_LEASE_SECONDS=120``, ``DJDIST_PRELOAD=lab.rig,lab.ephys``), or else from the
    file ``djdist.json`` in this folder or above (``{"lease_seconds": 120}``). What
    can't be used raises :class:`~djdist.errors.OptionError`.

    Attributes
    ----------
    executor : str or object
        Where ``populate()`` runs when no ``executor=`` is given. Default ``"local"``.
    lease_seconds : int
        Seconds after which a reservation that wasn't renewed goes back to pending. Default 60.
    max_worker_losses : int
        How many workers a key may lose in a run before it becomes an error. Default 3. Its former name
        ``max_losses`` still works in this release, with a warning.
    grace_seconds : float
        How long what runs may go on after Ctrl-C, SIGTERM or a stop, before it is ended
        and goes back to pending. Default 10.
    timeout_seconds : float or None
        A ``make()`` that takes longer is ended and becomes an error. Default None: no limit.
    retries : int
        How often a failed key is retried in the same call. Default 0.
    retry_on : tuple of str
        Names of the exception classes, or of their bases, that are worth a retry; may
        be assigned as classes. Default: all.
    retry_pause_seconds : float
        How long a failed key waits before it is retried; the pause doubles with each
        try, up to 5 minutes. Default 1.
    task_seconds : float
        How long the group of keys should take that a worker is sent at once. Larger spares the
        cluster's scheduler; smaller lets urgent keys be made sooner. Default 0.5.
    max_errors_listed : int
        How many errors ``populate()`` returns at most; the jobs table holds all. Default 1000.
    database_patience_seconds : float
        How long a run waits for a database that went away. Default 300.
    ship_credentials : bool
        Send the caller's connection settings to the workers. If False, the workers
        use their own configuration of DataJoint. Default True.
    preload : tuple of str
        Modules that every worker imports before the table's own module, for example
        one that activates the schemas of a pipeline.
    needs : dict of str to Needs
        What one key of a table needs, by ``"schema.Table"``, where the table itself can't say it; from the
        environment as JSON: ``DJDIST_NEEDS='{"lab.Sorting": {"gpus": 1}}'``.
    notify : tuple of str
        Who is told when keys fail, a run ends or its database can't be reached: URLs as apprise writes
        them, such as ``slack://…`` or ``mailto://…``. They need the extra ``notify``. Default: nobody.
    keys_per_transaction : int or "auto"
        How many tiny keys may share a transaction, for tables that don't say it themselves; their ``make()``
        may run twice then. Default 1.
    notify_period_seconds : float
        The same cause is told at most once in this time. Default 3600.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, validate_assignment=True, extra="forbid")

    executor: Any = "local"
    lease_seconds: int = Field(default=60, ge=1, le=65_535)
    max_worker_losses: int = Field(default=3, ge=1)
    grace_seconds: float = Field(default=10, ge=0)
    timeout_seconds: float | None = Field(default=None, gt=0, le=LONGEST_SECONDS)
    retries: int = Field(default=0, ge=0)
    retry_pause_seconds: float = Field(default=1, gt=0, le=300)
    task_seconds: float = Field(default=0.5, gt=0, le=60)
    retry_on: Annotated[tuple[str, ...], NoDecode, BeforeValidator(class_names)] = ()
    max_errors_listed: int = Field(default=1000, ge=1)
    database_patience_seconds: float = Field(default=300, ge=0)
    ship_credentials: bool = True
    preload: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_separated)] = ()
    needs: dict[str, Any] = {}
    keys_per_transaction: Annotated[KeysPerTransaction, BeforeValidator(number_or_auto)] = 1
    notify: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_separated_urls)] = Field((), repr=False)
    notify_period_seconds: float = Field(default=3600, gt=0, le=LONGEST_SECONDS)

    def __init__(self, **values: Any) -> None:
        values = {_current(name): value for name, value in values.items()}
        with _refusing_clearly():
            super().__init__(**_formerly_named_in_environment() | values)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: Any, env_settings: Any, *_: Any, **__: Any
    ) -> tuple[Any, ...]:
        """Return where settings come from, the first of which wins."""
        return init_settings, env_settings, _in_file(settings_cls, _file())

    def __setattr__(self, name: str, value: Any) -> None:
        with _refusing_clearly():
            super().__setattr__(_current(name), value)

    def needs_of(self, schema: str, *names: str) -> Any:
        """Return what is said that a table needs, by any of its names; None for nothing.

        Raises
        ------
        OptionError
            It is none, or has an amount that can't be.
        """
        name = next((name for each in names if (name := f"{schema}.{each}") in self.needs), None)
        if name is None:
            return None
        said = self.needs[name]
        try:
            return checked(Needs(**said) if isinstance(said, dict) else said, name)
        except (TypeError, OptionError) as error:
            why = error if isinstance(error, OptionError) else f"write {EXAMPLE}."
            raise OptionError(f"djdist.config.needs has {said!r} for {name}: {why}") from error

    @property
    def max_losses(self) -> int:
        """The former name of ``max_worker_losses``."""
        return int(getattr(self, _current("max_losses")))


config = Settings()
