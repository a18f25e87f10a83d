"""A process that measures runs under a limit, and every line of its results is handed on when it comes."""

import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TextIO

MARK = "RESULT "  # begins a line of results; all other output is the process's own
_LAST_LINES = 30


@dataclass(frozen=True)
class Ending:
    """How a process ended; ``why`` says in words what went wrong, None if nothing did."""

    seconds: float
    why: str | None
    last_lines: Sequence[str]


def supervise(command: Sequence[str], limit: float, on_result: Callable[[Mapping[str, Any]], None]) -> Ending:
    """Run ``command`` for at most ``limit`` seconds; afterwards neither it nor what it started is left."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=_LAST_LINES)
    reader = threading.Thread(target=_read, args=(process.stdout, on_result, last), daemon=True)
    reader.start()
    over = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        over = True
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(10)  # what the process had printed; only one that left its group could keep the pipe open
    why = f"time limit of {limit:.0f} s" if over else _in_words(process.returncode, last)
    return Ending(time.monotonic() - start, why, tuple(last))


def _read(lines: TextIO, on_result: Callable[[Mapping[str, Any]], None], last: deque[str]) -> None:
    for line in lines:
        with suppress(json.JSONDecodeError):  # two processes of a part may have written into one line
            if line.startswith(MARK):
                on_result(json.loads(line.removeprefix(MARK)))
                continue
        if line.strip():
            last.append(line.rstrip())


def _in_words(status: int, last: Sequence[str]) -> str | None:
    if status == 0:
        return None
    if status < 0:
        name = signal.Signals(-status).name
        return f"ended by {name}" + (", as for lack of memory" if -status == signal.SIGKILL else "")
    return f"ended with status {status}: {last[-1][:200] if last else 'it said nothing'}"
