"""How a launcher or tool ends: one line and exit status 2 for what the user can fix, no traceback."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from megavtp.errors import UserError


def print_any_name() -> None:
    """Let stdout escape what it cannot encode, as stderr does: a file's name need not be UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main`` and exit: its result or 0; 2 on ``UserError``, 130 on Ctrl-C, 141 if the pipe's reader left."""
    print_any_name()
    try:
        status = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would raise again: give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)
