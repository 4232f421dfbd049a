"""Memory settings of glibc on a Linux CPU: XLA's temporary buffer is large and made anew at every step.

glibc hands a block of that size back to the kernel, and each step then pays for its page faults again. Two settings avoid that:

    huge    the kernel backs large blocks with huge pages: 512 times fewer page faults, and memory is given back after each step.
            glibc reads this setting at the start of a process only, so the `conan` command starts itself again with it.
    keep    freed memory stays in the process. It can be set at any time, and resident memory grows to several times what is in use.
    system  glibc as it is.

`CONAN_MALLOC` chooses one. Without it the command takes `huge` where glibc and the kernel can, and Python programs that import
conan_jax take `keep`, unless they were started with `huge` (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`). docs/BENCHMARKS.md has both figures.
"""

import ctypes
import importlib.util
import os
import signal
import sys
import warnings
from pathlib import Path

VARIABLE, SETTINGS = "CONAN_MALLOC", ("huge", "keep", "system")
TUNABLES, HUGE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # from glibc's malloc.h
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def configure() -> bool:
    """Take the setting of this process; returns True when it is other than glibc's own. Must run before jax allocates.

    Does nothing off Linux, off glibc, where an accelerator is present, or with `CONAN_MALLOC=system` in the environment.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice and choice not in SETTINGS:
        warnings.warn(f"{VARIABLE}={choice!r} is not one of {', '.join(SETTINGS)}; the default is used", stacklevel=3)
    if not _applies():
        return False
    if _started_with_huge_pages():
        return True
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another libc, such as musl
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    return all([mallopt(name, value) == 1 for name, value in settings])


def start_with_huge_pages() -> None:
    """Replace this process with the same one under `huge`, where that setting is chosen or nothing is and the system can.

    For the start of a command: what ran before this call runs again. Returns where nothing has to be done. A process so started
    has the setting in its environment and does not start itself again; its children have it too.
    """
    if not _applies() or os.environ.get(VARIABLE) == "keep" or _started_with_huge_pages() or not _system_has_huge_pages():
        return
    tunables = os.environ.get(TUNABLES, "")
    os.environ[TUNABLES] = f"{tunables}:{HUGE}=1" if tunables else f"{HUGE}=1"
    # A signal waits until the new start listens (`cli.exits`), instead of ending it while Python starts.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _applies() -> bool:
    return sys.platform.startswith("linux") and os.environ.get(VARIABLE) != "system" and _runs_on_cpu()


def _runs_on_cpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    accelerators = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    return not accelerators and importlib.util.find_spec("libtpu") is None


def _started_with_huge_pages() -> bool:
    """True when the environment sets the tunable to anything but 0: glibc has read it then, or does not know it."""
    given = dict(pair.partition("=")[::2] for pair in os.environ.get(TUNABLES, "").split(":"))
    return given.get(HUGE, "0") != "0"


def _system_has_huge_pages() -> bool:
    """True when glibc knows the tunable (2.35) and the kernel gives huge pages to who asks."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        known = name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= (2, 35)
        return known and "[never]" not in _HUGE_PAGES.read_text()
    except (OSError, ValueError):
        return False
