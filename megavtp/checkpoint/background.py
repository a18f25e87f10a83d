"""One background task at a time, with its error kept for whoever waits."""

from __future__ import annotations

import threading
from collections.abc import Callable

from megavtp.launch import phase


class BackgroundTask:
    """Run functions in a thread, one after the other; an error surfaces in the next ``wait`` or ``start``.

    The thread is a daemon: a process that dies for another reason must not hang on a write that waits for ranks which
    are gone. Whoever ends normally calls ``wait`` first.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, function: Callable[[], None], name: str) -> None:
        """Wait for the running function, raise its error if it failed, else start ``function``."""
        self.wait()

        def run() -> None:
            try:
                function()
            except BaseException as error:  # kept for the waiter, which is the one who can stop the run
                self._error = error

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing runs; raises the last function's error, once."""
        if self._thread is not None:
            with phase.handed_to(self._thread):
                self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
