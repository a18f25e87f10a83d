"""How a launcher or tool ends or is interrupted: one line says what the user can fix or did, without a traceback.

Nothing heavy is imported here: the scripts call ``guard`` before the imports that take seconds.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TextIO

from megavtp.errors import UserError

INTERRUPTED = 130  # exit status after Ctrl-C (128 + SIGINT)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main`` and exit: its result or 0; 2 on ``UserError``, 130 on Ctrl-C, 141 if the pipe's reader left."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name need not be UTF-8: it is escaped, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    guard()
    try:
        status = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        tell_interrupted()
        status = INTERRUPTED
    except BrokenPipeError:
        _lead_nowhere(sys.stdout.fileno())  # Python flushes stdout once more at exit, which would raise again
        status = 141
    sys.exit(status)


def guard() -> None:
    """Make Ctrl-C end the process with one line, also during imports. Point closed standard streams at the null device,
    as else their output would go into the files that are opened next."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            _lead_nowhere(descriptor)
            setattr(sys, name, open(descriptor, "w", closefd=False))  # noqa: SIM115
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # it is ignored in the background of a script
        signal.signal(signal.SIGINT, _on_interrupt)


def go_on_unread() -> None:
    """Drop output that nobody reads any more: it is no reason to stop a long run. What cannot be encoded is escaped."""
    guard()
    sys.stdout, sys.stderr = _forgiving(sys.stdout), _forgiving(sys.stderr)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals, besides Ctrl-C, that ask a run to save its state and stop: SIGTERM, and SIGHUP (the terminal
    was closed) unless it was ignored at the start, as by nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGHUP)


def tell_interrupted() -> None:
    """Print that the run was interrupted, in the first of several processes."""
    if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0":
        print("interrupted", file=sys.stderr, flush=True)


def _on_interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but end at once during an import: modules in C turn it into other errors, or abort."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            try:
                tell_interrupted()
            finally:
                os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


class _Forgiving(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.ENOSPC:  # room may come back, a reader does not
                _lead_nowhere(self.fileno())
            return memoryview(data).nbytes


def _forgiving(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    raw = _Forgiving(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw), stream.encoding, "backslashreplace",
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )


def _lead_nowhere(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
