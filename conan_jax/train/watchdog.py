"""A run that hangs says where, and ends so that it can be started again."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

import jax

from conan_jax.errors import EXIT_RESUMABLE


class Watchdog:
    """Ends the process with 42 when no `beat` came for `seconds`, after printing the Python stack of every thread. A context.

    A daemon thread watches, so that a main thread stuck in a collective or a system call is seen too. One that hangs without
    releasing the interpreter stops this thread as well: then faulthandler's own one, which needs no interpreter, prints the
    stacks a little later and ends the process with 1.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._poll = seconds, min(seconds / 4, 5.0)
        self._process = jax.process_index()  # asked now: jax itself may be what hangs later
        self._where, self._last = "the start", time.monotonic()
        self._ended = threading.Event()

    def beat(self, where: str) -> None:
        """Something was done; `where` ("step 7", "saving step 7") says what begins now."""
        self._where, self._last = where, time.monotonic()

    def __enter__(self) -> Watchdog:
        self.beat(self._where)
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._ended.is_set():
            faulthandler.dump_traceback_later(self._seconds + 4 * self._poll, exit=True, file=sys.__stderr__)
            self._ended.wait(self._poll)
            silent = time.monotonic() - self._last
            if silent > self._seconds and not self._ended.is_set():
                print(f"conan: process {self._process} hangs: nothing for {silent:.0f} s since {self._where} (watchdog_seconds "
                      f"{self._seconds:g}). The same command goes on from the last checkpoint. Where its threads stand:",
                      file=sys.__stderr__, flush=True)
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                os._exit(EXIT_RESUMABLE)
        faulthandler.cancel_dump_traceback_later()
