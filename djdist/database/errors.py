"""What errors of the database mean, whether its driver raises them or DataJoint."""

import re
import sys

RIGHTS = 'See "Database rights" in djdist\'s documentation.'

DENIED = frozenset({"42501", 1044, 1142, 1143})
"""What PostgreSQL and MySQL say to those who lack a right."""

BEING_DECLARED = 1684
"""What MariaDB says of a table that somebody declares right now, instead of whether it is there."""

DEADLOCK_OR_LOST = frozenset(
    {1020, 1040, 1053, 1203, 1226, 1205, 1213, 1243, BEING_DECLARED, 1836, 1927, 4031, 2003, 2006, 2013, 2055}
)
"""MySQL's numbers for a row that has changed since the transaction began, too many connections, shutdown,
lock wait, deadlock, a prepared statement that is gone with its session, a table that is being declared, a
server that may only be read, as one from which another one takes over, and lost connections."""

LOST = {None, 0, 2006, 2013, 2055}
"""MySQL's numbers for a lost connection, and what PostgreSQL's driver has instead."""

AWAY = {1053, 2003}
PG_AWAY = ("08", "57P0")
"""What a server says that goes down or comes up, or its address where it isn't."""

READ_ONLY_OPTION = 1290
"""Any option that forbids a statement."""

FULL = (
    "Too many connections",
    "max_user_connections",
    "too many clients already",
    "too many connections for",
    "remaining connection slots",
)
"""What MySQL and PostgreSQL say when they take no more connections; PostgreSQL's driver adds no code."""

UNKNOWN_ROLE = re.compile(r'role ".*" does not exist')
REFUSED_LOGIN = (
    "password authentication failed",
    "no pg_hba.conf entry",
    "is not permitted to log in",
    "(using password:",
)
"""What servers say to those whom they don't let in; PostgreSQL's driver adds no code."""

PG_DEADLOCK_OR_LOST = ("08", "25006", "40", "53", "55P03", "57P0")
"""PostgreSQL's classes for connection, rollback, resources; read only, lock not available, shutdown."""

LIMITS: dict[object, str] = {
    "57014": "statement_timeout",
    "55P03": "lock_timeout",
    1969: "max_statement_time",
    3024: "max_execution_time",
    4031: "wait_timeout",
}
"""The settings by which servers end statements, and MySQL sessions, by what they say then."""

LOCK_WAIT = 1205

NO_LIMITS = ("user request", "could not obtain lock")
"""What PostgreSQL says with the same codes where a statement was cancelled by somebody, or not to wait."""


def is_lost(error: BaseException) -> bool:
    """Return whether the connection is gone, of which PostgreSQL's driver gives no code."""
    if not is_infrastructure(error):
        return False
    return _is_of_datajoint(error, "LostConnectionError") or _code(error) in LOST


def is_away(error: BaseException) -> bool:
    """Return whether the database can't be reached, or is about to stop or to start."""
    code = _code(error)
    return is_lost(error) or code in AWAY or (isinstance(code, str) and code.startswith(PG_AWAY))


def is_lock_wait(error: BaseException) -> bool:
    """Return whether MySQL has waited for a lock for as long as it does."""
    return _code(error) == LOCK_WAIT


def is_being_declared(error: BaseException) -> bool:
    """Return whether MariaDB says nothing of a table, because somebody declares it."""
    return _code(error) == BEING_DECLARED


def limit_of(error: BaseException | None) -> str:
    """Return the server's setting by which a statement or its session was ended, if it was one.

    Where the session was ended, what DataJoint met afterwards may stand before it.
    """
    while error is not None:
        limit = LIMITS.get(_code(error))
        if limit and not any(phrase in str(error) for phrase in NO_LIMITS):
            return limit
        error = error.__context__ if is_infrastructure(error) else None
    return ""


def _code(error: BaseException) -> object:
    """Return the server's number or code, if the error is one of its driver."""
    if _library(error) == "pymysql":
        return next(iter(error.args), None)
    return getattr(error, "pgcode", None)


def is_infrastructure(error: BaseException) -> bool:
    """Return whether an error is a lost connection, a deadlock or a full server, not one of ``make()``."""
    if _is_of_datajoint(error, "LostConnectionError"):
        return bool(error.args)  # DataJoint's own say what happened, only one that make() raised may not
    pgcode = getattr(error, "pgcode", None)
    if isinstance(pgcode, str):
        return pgcode.startswith(PG_DEADLOCK_OR_LOST)
    match _library(error):
        case "pymysql":
            return type(error).__name__ == "InterfaceError" or _is_deadlock_or_lost(*error.args[:2])
        case "psycopg2":
            return type(error).__name__ in ("OperationalError", "InterfaceError")
        case _:
            return False


def _is_deadlock_or_lost(code: object = None, message: object = "") -> bool:
    return code in DEADLOCK_OR_LOST or (code == READ_ONLY_OPTION and "read-only" in str(message))


def is_duplicate(error: BaseException) -> bool:
    """Return whether somebody else has inserted the same row, as DataJoint says it."""
    return _is_of_datajoint(error, "DuplicateError")


def is_full(error: BaseException) -> bool:
    """Return whether the server is there, but takes no more connections now."""
    return any(phrase in str(error) for phrase in FULL)


def is_refused_login(error: BaseException) -> bool:
    """Return whether the server is there, but doesn't let the user in."""
    text = str(error)
    return any(phrase in text for phrase in REFUSED_LOGIN) or bool(UNKNOWN_ROLE.search(text))


def is_unreachable(error: BaseException) -> bool:
    """Return whether the database may be reached later, where it doesn't refuse the user."""
    return is_infrastructure(error) and not is_refused_login(error)


def is_denial(error: BaseException) -> bool:
    """Return whether the account lacks a right."""
    said = {getattr(error, "pgcode", None), *error.args[:1]}
    return _is_of_datajoint(error, "AccessError") or not DENIED.isdisjoint(said)


def _is_of_datajoint(error: BaseException, name: str) -> bool:
    errors = sys.modules.get("datajoint.errors")  # who hasn't imported it has none of its errors
    return errors is not None and isinstance(error, getattr(errors, name))


def _library(error: BaseException) -> str:
    return type(error).__module__.split(".")[0]
