"""The watchdog ends every rank, with a reason, when one of them has failed, is lost or hangs; also a single process.

Each rank has a thread that says once a second where the rank is. Rank 0's thread reads what all say and passes the
verdict (``verdict.judge``), which all others read. Reports and verdict go through the store of the rendezvous, over
connections of their own, so a rank that is stuck in a collective or on a device still sends and receives them. A second
thread ends the process, also when the first waits in vain for a store whose machine is lost. No thread touches the
device.
"""

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from megavtp.launch import phase
from megavtp.launch.verdict import REPORTS, Report, Verdict, judge, limit_of, lost, own_report, silence_of

_BEAT = 1.0  # seconds between two reports
_GRACE = 3.0  # seconds for the main thread to end by itself; it can say more than the watchdog knows
# Seconds after which a rank ends if its main thread lets no other thread run, because C code holds the interpreter lock
# and none of our Python can run. The others take it for lost before that.
STUCK = 2 * silence_of(0, slow=True)
_LAST_WORDS = 20.0  # seconds the main thread may take to end, once it has begun to
_VERDICT = "verdict"


class Watchdog:
    """Watches over one run from one rank.

    Args:
        store: the store of the rendezvous, at which all ranks have arrived; the watchdog opens a connection of its own.
        timeout: seconds that a phase may take on any rank, three times that in a slow one; 0 = no limit.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, host: str, timeout: float):
        self._store = dist.PrefixStore(REPORTS, store).clone()  # type: ignore[attr-defined]  # torch's stubs leave it out
        self._rank, self._world, self._host, self._timeout = rank, world, host, timeout
        self._broken = False
        self._closed = threading.Event()
        self._ending = threading.Event()  # the main thread ends, and reports for this rank
        self._verdict: Verdict | None = None
        self._known = threading.Event()  # whether there is a verdict
        self._heard: dict[int, tuple[bytes, float]] = {}  # rank -> (its last report as text, when that arrived)
        self._talk = threading.Lock()  # held while the store is used
        self._looking = threading.Lock()
        self._last_beat = self._last_look = time.monotonic()
        self._talker = threading.Thread(target=self._beats, name="watchdog-store", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._talker.start()
        self._watcher.start()

    def tell(self, text: str) -> None:
        """Say, from the main thread, why this rank ends, as in "was interrupted", so that all ranks end."""
        self._ending.set()
        with suppress(RuntimeError):  # rank 0 has gone already, so the others know
            self._propose(self._own_verdict(text))
            self._let_others_hear()

    def reason(self, patience: float) -> str | None:
        """Wait, in the main thread, for the verdict after a connection to another rank broke, and return it."""
        self._ending.set()
        self._broken = True
        self._known.wait(patience if self._world > 1 else 0)
        if self._verdict is None:
            return None
        self._let_others_hear()
        return self._verdict.text

    def close(self) -> None:
        """Stop watching, once all ranks have done their work."""
        self._closed.set()
        self._known.set()  # wakes the watcher
        self._watcher.join()
        self._talker.join(_GRACE)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.is_set():
            if self._world > 1:  # a single process may be suspended (Ctrl-Z) for longer than that
                faulthandler.dump_traceback_later(STUCK, exit=True)
            now = self._look()
            current = phase.current()
            silent = now - self._last_beat
            if self._world > 1 and silent > silence_of(self._timeout, current.slow, self._broken):
                self._decide(self._store_verdict(f"no answer for {silent:.0f} s"))
            # Nobody is there to judge: a rank that waits for others may rightly be older than its own phase's limit.
            if current.age > limit_of(self._timeout, slow=True) + 30:
                self._decide(
                    self._own_verdict(f"made no progress for {current.age:.0f} s, and no verdict came from rank 0")
                )
            if self._known.wait(_BEAT) and not self._closed.is_set() and self._verdict is not None:
                self._end(self._verdict)

    def _look(self) -> float:
        """Return the time. After a suspension of this process, restart the silences; the phase does not age by it."""
        with self._looking:
            now = time.monotonic()
            if (gap := now - self._last_look) > 5 * _BEAT:
                self._last_beat = now
                self._heard = {rank: (text, now) for rank, (text, _) in self._heard.items()}
                phase.current().since += gap
            self._last_look = now
        return now

    def _beats(self) -> None:
        while not (self._closed.wait(_BEAT) or self._known.is_set()):
            try:
                self._beat()
            except RuntimeError as error:
                # The store is rank 0's, or torchrun's: when the run ends well, it ends last.
                if not self._closed.wait(2 * _BEAT):
                    self._decide(self._store_verdict(str(error).splitlines()[0]))
                return

    def _beat(self) -> None:
        self._look()
        with self._talk:
            self._store.set(str(self._rank), own_report(self._host, self._broken).dump())
            if self._store.check([_VERDICT]):
                self._hear(Verdict.load(self._store.get(_VERDICT)))
                return
            watched = range(self._world) if self._rank == 0 else [0]
            texts = self._store.multi_get([str(rank) for rank in watched])
        now = self._last_beat = self._look()
        for rank, text in zip(watched, texts):
            if self._heard.get(rank, (None,))[0] != text:
                self._heard[rank] = (text, now)
        reports = {rank: Report.load(text) for rank, (text, _) in self._heard.items()}
        silent = {rank: now - since for rank, (_, since) in self._heard.items()}
        # The others judge rank 0 alone, and only whether it lives.
        found = judge(reports, silent, self._timeout if self._rank == 0 else 0, self._broken)
        if found is not None:
            self._propose(found)

    def _propose(self, verdict: Verdict) -> None:
        """Put the verdict into the store, unless there is one: the first one counts."""
        with self._talk:
            self._hear(Verdict.load(self._store.compare_set(_VERDICT, "", verdict.dump())))

    def _hear(self, verdict: Verdict) -> None:
        if self._decide(verdict):
            self._store.add("heard", 1)

    def _decide(self, verdict: Verdict) -> bool:
        """Take the verdict if it is the first one; return whether it is."""
        if self._known.is_set():
            return False
        self._verdict = verdict
        self._known.set()
        return True

    def _own_verdict(self, text: str) -> Verdict:
        return Verdict(f"rank {self._rank} ({self._host}) in {phase.current().name} {text}", [self._rank])

    def _store_verdict(self, reason: str) -> Verdict:
        text = "the store of the rendezvous cannot be reached"
        if self._rank > 0 and 0 in self._heard:
            text = lost([0], {0: Report.load(self._heard[0][0])}).text
        return Verdict(f"{text} [{reason}]", [0])

    def _end(self, verdict: Verdict) -> None:
        """End this process; the main thread may be stuck for good."""
        if self._rank in verdict.ranks and not self._ending.is_set():  # it hangs
            print(f"[rank {self._rank}] {verdict.text}; the stack:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        elif self._ending.wait(_GRACE):
            time.sleep(_LAST_WORDS)  # the main thread says why and exits
        else:
            print(f"[rank {self._rank}] ended because other ranks did: {verdict.text}", file=sys.stderr)
        sys.stderr.flush()
        self._let_others_hear()
        os._exit(1)

    def _let_others_hear(self) -> None:
        """Rank 0 serves the store: the others read the verdict before it goes. They take a second or two."""
        if self._rank > 0:
            return
        deadline = time.monotonic() + _GRACE
        with suppress(RuntimeError):  # torchrun's store, whose agent has gone
            while time.monotonic() < deadline:
                with self._talk:
                    if self._store.add("heard", 0) >= self._world:
                        return
                time.sleep(0.1)
