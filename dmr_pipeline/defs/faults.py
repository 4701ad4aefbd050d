"""Which faults of a stage are worth another try, and how Dagster is told."""

import errno
import logging
import socket
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import dagster as dg

from dmr_pipeline.errors import FULL, UserError, causes

log = logging.getLogger(__name__)

RETRIES = dg.RetryPolicy(max_retries=3, delay=30, backoff=dg.Backoff.EXPONENTIAL)
"""Every asset's: tried again after 30, 90 and 210 s, resuming from its scratch. Only a policy makes Dagster try a step again
whose worker was killed; by itself it would try programming errors and bad input again too: see `as_dagster_failures`."""

NETWORK_ERRNOS = frozenset(
    {
        errno.EIO,
        errno.ESTALE,  # a file of NFS whose server forgot it
        errno.ENOTCONN,  # a FUSE file system that died
        errno.ETIMEDOUT,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
    }
)


def is_transient(error: BaseException) -> bool:
    """Whether another try may succeed: lost connections, timeouts, network file systems, GPU faults, killed children.

    Of an error and what it came from, the outermost that says anything decides: a `UserError` made of a lost connection is
    for the user to mend.
    """
    verdicts = (_verdict(seen) for seen in causes(error))
    return next((verdict for verdict in verdicts if verdict is not None), False)


def _verdict(error: BaseException) -> bool | None:
    """None where the error itself does not say."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, socket.gaierror):  # its errno is none of the system's
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, OSError) and error.errno in FULL:
        return False
    if isinstance(error, ConnectionError | TimeoutError | BrokenProcessPool):
        return True
    if isinstance(error, OSError) and error.errno in NETWORK_ERRNOS:
        return True
    torch = sys.modules.get("torch")  # an error of torch's comes with torch loaded
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return False  # another try has the same batches (agent/memory.py halves those that may be)
    if torch is not None and isinstance(error, torch.AcceleratorError):
        return True
    return None


@contextmanager
def as_dagster_failures(context: dg.AssetExecutionContext) -> Iterator[None]:
    """Around the body of an asset with the policy `RETRIES`: lets it act on transient faults alone.

    Raises:
        dagster.Failure: anything else, also an interrupt and a transient fault of the last try; its `__cause__` is the
            error itself.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, dg.DagsterExecutionInterruptedError) as error:
        # An interrupt too: the policy would start the stage that a user has just stopped again.
        if is_transient(error) and context.retry_number < RETRIES.max_retries:
            log.warning(
                "%s: %s: %s; it is tried again",
                context.op_execution_context.op.name,
                type(error).__name__,
                error,
            )
            raise
        description = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise dg.Failure(description, allow_retries=False) from error
