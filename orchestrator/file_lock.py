"""The kernel's locks on files, which end with their process; and file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import tempfile
from pathlib import Path

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class NoFileLocksError(OSError):
    """The file system has no locks, as Lustre without ``-o flock``: exclude others by what stands in files."""


def flock(descriptor: int, operation: int) -> bool:
    """Whether the lock is granted; False only where ``operation`` does not wait.

    Raises:
        NoFileLocksError: see there.
    """
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            raise NoFileLocksError(str(error)) from None
        raise
    return True


def has_locks(folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder, prefix=".lock-") as file:
        try:
            return flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except NoFileLocksError:
            return False
