from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import djdist
from djdist._needs import Needs
from djdist._settings import Settings
from djdist.errors import OptionError


def test_the_defaults() -> None:
    settings = Settings()
    assert (settings.executor, settings.lease_seconds, settings.max_worker_losses) == ("local", 60, 3)
    assert settings.ship_credentials
    assert settings.preload == ()


def test_the_environment_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJDIST_EXECUTOR", "ray")
    monkeypatch.setenv("DJDIST_LEASE_SECONDS", "120")
    monkeypatch.setenv("DJDIST_SHIP_CREDENTIALS", "false")
    settings = Settings()
    assert (settings.executor, settings.lease_seconds, settings.ship_credentials) == ("ray", 120, False)


def test_a_file_beside_datajoints_sets_them_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = '{"lab.Sorting": {"gpus": 1, "memory": "16GiB"}}'
    settings = f'{{"retries": 2, "lease_seconds": 30, "preload": ["lab.rig"], "needs": {needs}}}'
    (tmp_path / "djdist.json").write_text(settings)
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    monkeypatch.chdir(project / "scripts")
    monkeypatch.setenv("DJDIST_RETRIES", "3")
    found = Settings()
    assert (found.retries, found.lease_seconds, found.preload) == (3, 30, ("lab.rig",))
    assert found.needs_of("lab", "Sorting") == Needs(gpus=1, memory="16GiB")
    (project / ".git").mkdir()
    assert Settings().lease_seconds == 60


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_a_file_that_is_none_is_refused(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "djdist.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=r"The settings file .*djdist\.json can't be read as JSON"):
        Settings()


def test_needs_that_are_none_are_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"needs has \{'gpu': 1\} for lab.Sorting: write djdist.Needs"):
        Settings(needs={"lab.Sorting": {"gpu": 1}}).needs_of("lab", "Sorting")


@pytest.mark.parametrize("given", ["OSError", OSError, [OSError], ("OSError",)])
def test_errors_worth_another_try_are_classes_or_names(given: object) -> None:
    settings = Settings()
    settings.retry_on = given  # type: ignore[assignment]
    assert settings.retry_on == ("OSError",)


def test_names_in_the_environment_have_commas_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJDIST_RETRY_ON", "OSError, KeyError")
    monkeypatch.setenv("DJDIST_PRELOAD", "lab.rig")
    settings = Settings()
    assert (settings.retry_on, settings.preload) == (("OSError", "KeyError"), ("lab.rig",))


def test_the_environment_is_read_when_djdist_is_imported() -> None:
    code = "import djdist; print(djdist.config.executor, djdist.config.max_worker_losses)"
    environment = {"DJDIST_EXECUTOR": "dask", "DJDIST_MAX_WORKER_LOSSES": "5"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["dask", "5"]


def test_a_former_name_works_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJDIST_MAX_LOSSES", "5")
    with pytest.warns(FutureWarning, match="max_losses is now djdist.config.max_worker_losses"):
        settings = Settings()
    assert settings.max_worker_losses == 5
    with pytest.warns(FutureWarning):
        settings.max_losses = 7  # type: ignore[misc]
    with pytest.warns(FutureWarning):
        assert (settings.max_losses, settings.max_worker_losses) == (7, 7)
    monkeypatch.setenv("DJDIST_MAX_WORKER_LOSSES", "6")
    with pytest.warns(FutureWarning):
        assert Settings().max_worker_losses == 6


def test_assignments_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(djdist.config, "lease_seconds", 120)
    assert djdist.config.lease_seconds == 120
    executor = object()
    monkeypatch.setattr(djdist.config, "executor", executor)
    assert djdist.config.executor is executor


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lease_seconds", 0),
        ("lease_seconds", 65_536),
        ("lease_seconds", "soon"),
        ("max_worker_losses", 0),
        ("preload", 5),
        ("retry_on", 5),
        ("retry_on", [5]),
        ("ship_credentials", "perhaps"),
        ("exekutor", "ray"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, value: object) -> None:
    settings = Settings()
    with pytest.raises(OptionError, match=name):
        setattr(settings, name, value)
    assert settings == Settings()


def test_the_longest_lease_fits_into_a_token() -> None:
    from djdist.job_stores.jobs_table.lease import LEASE_RANGE, new_token

    longest = LEASE_RANGE - 1
    settings = Settings()
    settings.lease_seconds = longest
    assert new_token(longest) % LEASE_RANGE == longest
