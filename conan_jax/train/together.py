"""What one process found out, known to all: a failure, a number.

All processes must call these functions in the same order, from their main threads and at about the same time (a collective gives
up after a while); with one process nothing is sent.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

_MESSAGE_BYTES = 2048


def first_complaint(text: str) -> str:
    """The `text` of the first process that has any, in every process; "" when none has."""
    if jax.process_count() == 1:
        return text
    buffer = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:_MESSAGE_BYTES], np.uint8)
    buffer[: len(encoded)] = encoded
    rows = np.asarray(multihost_utils.process_allgather(buffer)).reshape(-1, _MESSAGE_BYTES)
    return next((row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows if row.any()), "")


def from_process_0(number: int) -> int:
    """Process 0's number, which must fit int32."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))
