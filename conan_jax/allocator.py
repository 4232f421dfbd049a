"""Keep freed memory inside the process on Linux CPU: XLA's temporary buffer is large and made anew every step.

glibc hands blocks of that size back to the kernel, and each step then pays for its page faults again.
Must run before jax allocates.
"""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # from glibc's malloc.h


def _runs_on_cpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    accelerators = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    return not accelerators and importlib.util.find_spec("libtpu") is None


def configure() -> bool:
    """Set the allocator's knobs; returns whether they were set.

    Does nothing off Linux, off glibc, where an accelerator is present, or with `CONAN_MALLOC=system` in the environment.
    """
    if not sys.platform.startswith("linux") or os.environ.get("CONAN_MALLOC") == "system" or not _runs_on_cpu():
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another libc, such as musl
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    return all([mallopt(name, value) == 1 for name, value in settings])
