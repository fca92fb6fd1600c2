"""Contract of what tells people how a run goes who don't look at it."""

from djdist._job import Key

UNREACHABLE = "The database can't be reached"


class Notifier:
    """Is told what happens to a run; this one keeps it to itself, others pass it on.

    It can be pickled, returns at once and never raises.
    """

    def failed(self, table: str, key: Key, message: str) -> None:
        """Take note of a key that became an error."""

    def unreachable(self, message: str, trouble: str = UNREACHABLE) -> None:
        """Take note that the run can't use its database, and why; it may be told so again and again."""

    def ended(self, summary: str) -> None:
        """Pass on how the run ended, with all that was not yet; this may take some seconds."""
