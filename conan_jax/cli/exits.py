"""The end of every command: an exit code for each error and signal, at whatever moment, and output that any console can show."""

from __future__ import annotations

import codecs
import io
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from conan_jax.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_RESUMABLE, ConanError
from conan_jax.files import unusable, unusable_place

STOPPED = "stopped; start the same command again to go on"
DEAF_SECONDS = 10.0  # that the main thread may stay in compiled code after a signal; Python hears signals between its own instructions
CLEANING_SECONDS = 25.0  # from the signal to the end of the process, cleaning up included; schedulers often allow 30
_AGAIN_SECONDS = 0.5
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it

_ESCAPE = "conan_escape"  # the error handler of the output's encoding

_asked = False  # a signal asked the command to end, and `_stop` heard it
_at_once = False
_ended = threading.Event()


class _Stopped(BaseException):
    """A signal asked the command to end; no `except Exception` on the way may keep it."""


def run(command: Callable[[], Any]) -> NoReturn:
    """Call `command` and end the process with its exit code; what a user can cause is told in one line, without a traceback.

    SIGTERM and SIGINT end any command with 42: files are written whole or not at all, so the same command goes on. While a stage
    trains, its loop listens instead and saves first.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPE)
    _listen()
    code: int | str | None = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # blocked where the command started itself again (`allocator`)
        command()
        code = EXIT_DONE
    except _Stopped:
        code = EXIT_RESUMABLE
    except SystemExit as stop:  # a mistyped flag must not look resumable to a scheduler
        code = EXIT_BAD_INPUT if stop.code == 2 else stop.code
        if isinstance(code, str):
            _say(code)
    except Exception as error:
        code = 1 if _asked else _told(error)  # compiled code may have put an error of its own in the place of `_Stopped`
    _end((1 if isinstance(code, str) else code or EXIT_DONE) if not (_asked and code) else EXIT_RESUMABLE)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Write characters that a console's encoding does not have as JSON does, so that printed JSON stays the same value."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start:error.end])[1:-1], error.end


codecs.register_error(_ESCAPE, _escaped)


def end_at_once() -> None:
    """From now on a signal ends the process without unwinding, also in the middle of a compilation. For commands that write nothing."""
    global _at_once
    _at_once = True


def _told(error: Exception) -> int:
    """Print an error; returns its exit code."""
    if not isinstance(error, ConanError):
        place = unusable_place(error)
        if place is None:
            traceback.print_exception(error)
            return 1
        error = place
    _say(str(error))
    return error.exit_code


def _end(code: int) -> NoReturn:
    """End the process. After a signal the interpreter is not taken down: compiled code may still use it."""
    _ended.set()
    for number in _SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(code))
    signal.setitimer(signal.ITIMER_REAL, 0)
    if _asked and code:
        _say(STOPPED)
    if code and "conan_jax.distributed" in sys.modules:
        sys.modules["conan_jax.distributed"].leave(code)
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it ends
        if not isinstance(error, BrokenPipeError):
            _say(str(unusable("standard output", error)))
            code = code or EXIT_BAD_INPUT
    if _asked and code:
        os._exit(code)
    sys.exit(code)


def _listen() -> None:
    """Hear signals in the main thread, and in a thread of their own when that one does not come back to Python."""
    global _asked, _at_once
    _asked = _at_once = False
    _ended.clear()
    for number in _SIGNALS:
        signal.signal(number, _stop)
    if sys.unraisablehook is _unraisable:
        return
    sys.unraisablehook = _unraisable
    os.register_at_fork(after_in_child=_forget)
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(heard,), daemon=True, name="signals").start()


def _forget() -> None:
    """Give a forked child the system's handlers; it must not write to its parent's pipe."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _stop(number: int, frame: Any) -> None:
    """Raise `_Stopped`, and again by SIGALRM until it is on its way: Python drops what is raised inside a garbage collection."""
    global _asked
    if number == signal.SIGALRM and (not _asked or _is_stopping()):
        return
    _asked = True
    if _at_once:
        _leave()
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
    raise _Stopped


def _is_stopping() -> bool:
    """True when the code that was interrupted runs because of a `_Stopped`: it cleans up, and may finish."""
    handled = sys.exception()
    while handled is not None and not isinstance(handled, _Stopped):
        handled = handled.__context__
    return handled is not None


def _unraisable(unraisable: Any) -> None:
    """Python prints an exception that it must drop; a `_Stopped` comes again and needs no traceback."""
    if not isinstance(unraisable.exc_value, _Stopped):
        sys.__unraisablehook__(unraisable)


def _watch(heard: int) -> None:
    """End the process when the main thread does not: it is in compiled code that runs for minutes, or cleans up for too long."""
    while True:
        number = os.read(heard, 1)[0]
        if number == signal.SIGALRM or signal.getsignal(number) is not _stop:  # a training loop saves first
            continue
        if _at_once or not (_ended.wait(DEAF_SECONDS) or (_asked and _ended.wait(CLEANING_SECONDS - DEAF_SECONDS))):
            _leave()


def _leave() -> NoReturn:
    """End the process now with 42. Writes past Python's buffers: another thread may hold them."""
    shown = _SHOW_CURSOR if os.isatty(2) else ""
    try:
        os.write(2, f"{shown}conan: {STOPPED}\n".encode())
    finally:
        os._exit(EXIT_RESUMABLE)


def _say(message: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    try:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]conan:[/bold red] {escape(message)}")
    except OSError:
        pass  # the disk that standard error goes to is full; the exit code says it
