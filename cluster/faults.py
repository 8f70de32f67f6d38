"""Classes of faults: what went wrong decides whether, when and where a task is tried again."""

from __future__ import annotations

import errno
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

Fault = Literal[
    "transient", "throttled", "expired", "memory", "deadline", "worker", "disk", "fenced", "data", "bug"
]
"""transient : I/O that may work the next time; throttled : a server asks for fewer requests; expired : a signature
memory : the task ran out of it; deadline : it took too long; worker : its worker died; disk : no room left
fenced : another driver holds the workspace; data : input that will be no better; bug : anything else that was raised
"""

PASSING: tuple[Fault, ...] = ("transient", "throttled", "expired")
"""Faults of the network, which pass by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often a task is tried at a fault, and how long it waits in between.

    attempts : in all; first_wait_s : doubles with each attempt, up to longest_wait_s
    """

    attempts: int
    first_wait_s: float = 0.0
    longest_wait_s: float = 0.0

    def wait_s(self, attempt: int) -> float:
        """Seconds to wait after an attempt: between half and all of the doubled wait, so that tasks that failed
        together do not come again together.
        """
        longest = min(self.longest_wait_s, self.first_wait_s * 2.0 ** (attempt - 1))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311  no secret


RETRIES: Mapping[Fault, Retry] = {
    "transient": Retry(attempts=4, first_wait_s=2.0, longest_wait_s=60.0),
    "throttled": Retry(attempts=4, first_wait_s=15.0, longest_wait_s=300.0),
    "expired": Retry(attempts=4, first_wait_s=1.0, longest_wait_s=60.0),
    "memory": Retry(attempts=2, first_wait_s=1.0, longest_wait_s=1.0),
    "deadline": Retry(attempts=2),
    # a preempted node costs its tile one attempt; a tile that ends three workers is the cause
    "worker": Retry(attempts=3),
    "disk": Retry(attempts=1),
    "fenced": Retry(attempts=1),
    "data": Retry(attempts=1),
    "bug": Retry(attempts=1),
}
"""What is tried again; a fault of the network is tried on the same worker, one of a worker on another one."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PASSING_ERRNO = (
    errno.EIO,
    errno.EAGAIN,
    errno.ESTALE,  # a network disk lost a handle
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.EPIPE,
    errno.EMFILE,  # too many files are open now: what others hold they close
    errno.ENFILE,
)
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
"""What PyTorch says, on a GPU and on a CPU: its errors are a RuntimeError, and it is not imported here."""


def fault_of(error: BaseException) -> Fault:
    """Class of an error: what it says of itself (`error.fault`), or what its type and number mean."""
    said = getattr(error, "fault", None)
    if said in get_args(Fault):
        return cast("Fault", said)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "memory"
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY):
        return "memory"
    if isinstance(error, OSError):
        if error.errno in _FULL:
            return "disk"
        if isinstance(error, TimeoutError | ConnectionError) or error.errno in _PASSING_ERRNO:
            return "transient"
    return "bug"
