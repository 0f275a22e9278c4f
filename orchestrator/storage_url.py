"""URLs of storages, of studies and of checkpoints, may hold a password: it is used, and neither shown nor stored."""

from __future__ import annotations

import re
from pathlib import Path

_FILES = ("journal:", "sqlite:")
# Where a password ends. A database's may hold any @ and slash but the last @; of files the path may hold one, too.
OF_DATABASE = re.compile(r"(?P<before>://[^:@/]*):(?P<password>.*)@")
OF_FILES = re.compile(r"(?P<before>://[^:@/]*):(?P<password>[^/]*)@")
_IN_QUERY = re.compile(r"(?P<before>[?&;]password=)(?P<password>[^&;]*)", re.IGNORECASE)


def check(url: str) -> None:
    """Raises:
    ValueError: it is no URL of a storage that could be kept; the message does not repeat it.
    """
    wanted = "must be a URL, as journal:///study.journal, sqlite:///study.db or postgresql://USER@HOST/DATABASE"
    if url.startswith(_FILES):
        if not url.partition(":///")[2].split("?")[0]:
            raise ValueError(f"{wanted}; three slashes and the path of a file")
        return
    from sqlalchemy import make_url
    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

    try:
        make_url(url).get_dialect()
    except NoSuchModuleError:
        raise ValueError(f"{wanted}; there is no kind of database {url.partition(':')[0]!r}") from None
    except (SQLAlchemyError, ValueError):
        raise ValueError(wanted) from None


def anchored(url: str) -> str:
    """The same from whichever folder it is used: a file's by its absolute path."""
    scheme, slashes, place = url.partition(":///")
    path, mark, query = place.partition("?")
    if not url.startswith(_FILES) or path == ":memory:":
        return url
    return f"{scheme}{slashes}{Path(path).resolve()}{mark}{query}"


def without_password(url: str, in_user: re.Pattern[str] = OF_DATABASE) -> str:
    """The URL as it may be shown and stored. PostgreSQL then asks PGPASSWORD or ~/.pgpass for the password."""
    return _IN_QUERY.sub(r"\g<before>", in_user.sub(r"\g<before>@", url))


def scrub(text: str, url: str, in_user: re.Pattern[str] = OF_DATABASE) -> str:
    """A message of the library that opens the URL, without the password that it holds."""
    passwords = [match["password"] for pattern in (in_user, _IN_QUERY) for match in pattern.finditer(url)]
    text = text.replace(url, without_password(url, in_user))
    for password in passwords:
        text = text.replace(password, "***") if len(password) > 2 else text
    return text
