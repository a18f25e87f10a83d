"""This runs one task at a time in the background and keeps its error for the next caller that waits."""

import threading
from collections.abc import Callable

from megavtp.launch import phase


class BackgroundTask:
    """Runs functions in a thread, one after the other; the next ``wait`` or ``start`` raises a failed one's error.

    The thread is a daemon: a process that dies for another reason must not hang on a write that waits for ranks which
    are gone. A process that ends normally calls ``wait`` first.
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
            except BaseException as error:  # the caller that waits raises it: only that one can stop the run
                self._error = error

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing runs any more; raise the last function's error, once."""
        if self._thread is not None:
            with phase.handed_to(self._thread):
                self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
