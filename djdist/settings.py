"""Settings of djdist, from ``DJDIST_*`` environment variables and assignments."""

from typing import Any

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Settings of djdist.

    Each may be assigned (``djdist.config.lease_seconds = 120``) or come from the
    environment (``DJDIST_LEASE_SECONDS=120``).

    Attributes
    ----------
    executor : str or object
        Where ``populate()`` runs when no ``executor=`` is given. Default ``"local"``.
    lease_seconds : int
        A reservation that was not renewed for so long goes back to pending. Default 60.
    max_losses : int
        A key that lost so many workers in a run becomes an error. Default 3.
    grace_seconds : float
        So long may what runs go on after Ctrl-C, SIGTERM or a stop, before it is ended
        and goes back to pending. Default 10.
    timeout_seconds : float or None
        A ``make()`` that takes longer is ended and becomes an error. Default None: no limit.
    retries : int
        So often a key that failed is tried again in the same call. Default 0.
    retry_on : tuple of str
        Names of the exception classes, or of their bases, that are worth another try.
        Default: all.
    max_errors_listed : int
        How many errors ``populate()`` returns at most; the jobs table holds all. Default 1000.
    database_patience_seconds : float
        So long a run waits for a database that went away. Default 300.
    ship_credentials : bool
        Send the caller's connection settings to the workers. If False, the workers
        use their own configuration of DataJoint. Default True.
    preload : tuple of str
        Modules that every worker imports before the table's own module, for example
        one that activates the schemas of a pipeline.
    """

    model_config = SettingsConfigDict(env_prefix="DJDIST_", validate_assignment=True, extra="forbid")

    executor: Any = "local"
    lease_seconds: int = Field(default=60, ge=1, le=65_535)
    max_losses: int = Field(default=3, ge=1)
    grace_seconds: float = Field(default=10, ge=0)
    timeout_seconds: float | None = Field(default=None, gt=0)
    retries: int = Field(default=0, ge=0)
    retry_on: tuple[str, ...] = ()
    max_errors_listed: int = Field(default=1000, ge=1)
    database_patience_seconds: float = Field(default=300, ge=0)
    ship_credentials: bool = True
    preload: tuple[str, ...] = ()


config = Settings()
