"""Errors, named by what the caller must do about them. All survive pickling."""

from __future__ import annotations


class UserError(Exception):
    """The input is at fault: show this one line and exit with status 2.

    ``file`` and ``key`` say where the fault stands, ``remedy`` what would be accepted.
    """

    def __init__(self, problem: str, *, file: str | None = None, key: str | None = None, remedy: str | None = None):
        where = "".join(f"{part}: " for part in (file, key) if part)
        super().__init__(f"{where}{problem}" + (f"; {remedy}" if remedy else ""))
        self.problem = problem
        self.file = file
        self.key = key
        self.remedy = remedy

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_user_error, (self.problem, self.file, self.key, self.remedy))


def _rebuild_user_error(problem: str, file: str | None, key: str | None, remedy: str | None) -> UserError:
    return UserError(problem, file=file, key=key, remedy=remedy)


class SweepAbortedError(Exception):
    """The sweep cannot succeed as it stands: show the reason, mend it, start again. Exit with status 1."""


class StudyUnavailableError(Exception):
    """The study's storage does not answer just now: nothing was changed; ask again later."""


class RunStorageError(Exception):
    """Where a run keeps its files is full or does not answer: neither the run nor its worker is at fault, try again."""


class StudyMissingError(Exception):
    """There are runs, but not the study that they are of: find it; a new one would begin again beside them."""


class SupersededError(Exception):
    """A newer lease of the run is at work, or this one was executed before: leave the run alone."""
