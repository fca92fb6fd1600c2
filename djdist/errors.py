"""Everything that djdist raises on its own account.

.. code-block:: text

    Exception
    └── DjdistError
        ├── OptionError (ValueError)          an argument or a setting that can't be used
        ├── MissingLibraryError (ImportError) an optional library that isn't installed
        ├── DatabaseError                     the jobs table can't be reached or changed
        ├── WorkerSetupError                  the workers can't load the pipeline or connect
        ├── ClusterError                      the cluster can't be joined, or lost the driver
        │   └── DriverLostError               the driver's process or node died
        ├── LeaseLostError                    a job that was rescued belongs to somebody else now
        ├── MakeError                         make() failed otherwise than by an exception that travels
        └── IncompatibleDataJointError        this version of DataJoint works otherwise than djdist knows
    SystemExit
    └── Terminated                            SIGTERM came while populate() was running

What ``make()`` itself raises is raised at the caller as it is.
"""


class DjdistError(Exception):
    """Base class of what djdist raises."""


class OptionError(DjdistError, ValueError):
    """An argument or a setting that can't be used; the message says what can."""


class MissingLibraryError(DjdistError, ImportError):
    """An optional library isn't installed, is hidden or broken; the message says what to do."""


class DatabaseError(DjdistError):
    """The jobs table can't be reached or changed."""


class WorkerSetupError(DjdistError):
    """The workers can't load the pipeline or connect to the database.

    Attributes
    ----------
    may_pass : bool
        The same call may do later: the workers died, or couldn't reach the database.
    """

    def __init__(self, message: str = "", *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class ClusterError(DjdistError):
    """The Ray or Dask cluster can't be joined, or lost the run's driver."""


class DriverLostError(ClusterError):
    """The process or the node of a run's driver died."""


class LeaseLostError(DjdistError):
    """The job was rescued and belongs to somebody else now."""


class MakeError(DjdistError):
    """``make()`` failed with an exception that can't be pickled, or closed its connection."""


class IncompatibleDataJointError(DjdistError):
    """This version of DataJoint works otherwise than djdist knows it."""


class Terminated(SystemExit):
    """SIGTERM came while ``populate()`` was running."""


class RemoteTraceback(Exception):  # noqa: N818 - shown as the cause of an exception from a worker
    """Where on a worker an exception was raised."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}" if self.args else ""
