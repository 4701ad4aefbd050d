"""How long a case of a campaign may take."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Hang(BaseException):
    """No Exception, least of all TimeoutError, which is an OSError: what is tried would take it for a fault of its own."""


@contextmanager
def at_most_seconds(seconds: int) -> Iterator[None]:
    """Raises: Hang: it takes longer. For the main thread."""

    def stop(*_: object) -> None:
        raise Hang(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
