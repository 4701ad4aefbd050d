"""The one error that a user can mend, how text from outside is shown, and what of other errors is for a user to mend."""

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""A full disk, or a user's share of it."""

REMEDIES = {
    errno.EACCES: "give this user the right to read and write it",
    errno.EPERM: "give this user the right to read and write it",
    errno.EROFS: "make its file system writable",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ENOTDIR: "a folder is needed where a file is: move the file away",
    errno.EISDIR: "a file is needed where a folder is: move the folder away",
    errno.ELOOP: "its links go round in a circle: remove them",
}
"""What to do about the refusals of an operating system that are a user's to mend."""


class RaisedElsewhere(Exception):
    """The cause of an error that comes from another process.

    Args:
        places: file and line of each frame there, the innermost last.
    """

    def __init__(self, places: Sequence[tuple[str, int]]) -> None:
        super().__init__(f"in another process, {places[-1][0]}, line {places[-1][1]}")
        self.places = places


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what to do. The command line exits with code 2."""


def printable(text: object) -> str:
    """One line that is safe to log and to show: whatever a terminal would act on, or no encoding can hold, is escaped.

    File names and keys come from outside. They may hold control characters, marks that turn the direction of writing, and
    bytes that are not UTF-8 (which Python keeps as lone surrogates, and no log can store). Markup is not touched: print with
    `markup=False`, or through `rich.markup.escape`.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def problems_of(error: "ValidationError") -> list[str]:
    """What pydantic found, a line each: the field, as `steps.0.command`, and what is wrong with it."""
    return [
        printable(f"{'.'.join(map(str, found['loc']))}: " if found["loc"] else "") + " ".join(found["msg"].split())
        for found in error.errors(include_url=False)
    ]


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, as a traceback shows them, each once: an error that is raised again from its own
    wrapper closes a circle."""
    walked: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and not any(seen is earlier for earlier in walked):
        yield seen
        walked.append(seen)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def refusal(error: BaseException) -> str | None:
    """A line on a file that the operating system refused to read or write, and what to do; None where the error is, and came
    from, nothing of that kind."""
    for seen in causes(error):
        if isinstance(seen, OSError) and seen.errno in REMEDIES and (seen.filename or seen.errno in FULL):
            where = f"{seen.filename}: " if seen.filename else ""
            return f"{where}{seen.strerror}: {REMEDIES[seen.errno]}, then run the same command again; nothing is lost"
    return None
