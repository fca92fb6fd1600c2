"""What one key needs, as it is said."""

from __future__ import annotations

import pytest

from djdist._needs import ONE_CPU, Needs
from djdist.errors import OptionError


def test_what_a_table_says_wins_over_the_executor_and_the_rest_is_the_executors() -> None:
    executor = Needs(cpus=4, memory="8GiB", custom={"scanner": 1})
    assert Needs(gpus=1).over(executor) == Needs(4, 1, "8GiB", {"scanner": 1})
    assert Needs(cpus=2, memory="1GiB", custom={"camera": 1}).over(executor) == Needs(
        2, 0, "1GiB", {"camera": 1}
    )
    assert Needs(gpus=1).over(ONE_CPU) == Needs(gpus=1)
    assert ONE_CPU.over(executor) == executor


@pytest.mark.parametrize("gpus", [0, 0.5, 1, 2, 2.0])
def test_gpus_are_parts_of_one_or_whole(gpus: float) -> None:
    assert Needs(gpus=gpus).gpus == gpus
    with pytest.raises(OptionError, match="whole above 1"):
        Needs(gpus=gpus + 1.5 - gpus % 1)
