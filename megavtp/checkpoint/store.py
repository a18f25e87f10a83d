"""The native checkpoint on disk: safetensors by logical name, written in the background, published by one rename.

    ROOT/
      latest -> step-00000200            relative link to the newest
      step-00000200/
        tensors-00000.safetensors        one file of every writer
        tensors-00001.safetensors
        checkpoint.json                  step, metadata; each tensor's file, shape, dtype; each file's size, SHA-256
      step-00000300.partial-TOKEN-3/     is being written; becomes step-00000300 when all parts are there

There is no pickle and no ``torch.distributed``: writers meet only in the file system, so they must share it.
"""

import errno
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from megavtp.checkpoint import reading
from megavtp.checkpoint.background import BackgroundTask
from megavtp.checkpoint.reading import Checkpoint, find_latest, open_checkpoint
from megavtp.checkpoint.tensor_file import flush_folder, write_tensors
from megavtp.data.files import write_atomic
from megavtp.errors import UserError
from megavtp.json_file import read_json
from megavtp.launch import phase

__all__ = ["Checkpoint", "CheckpointStore", "find_latest", "open_checkpoint"]

log = logging.getLogger(__name__)


class CheckpointStore:
    """Writes the checkpoints of one run.

    Args:
        root: folder of the checkpoints, on a file system that all writers share.
        keep_last: how many of the newest checkpoints to keep; one that another process has open is kept as well.
        run_token: a random text, the same on all writers of this run and new at every start, so that parts of a crashed
            attempt are never mistaken for this one's; None draws one, for a single writer.
        part_timeout: seconds that writer 0 waits for the others' parts once its own is written.
    """

    def __init__(self, root: str | Path, keep_last: int, run_token: str | None = None, part_timeout: float = 1800.0):
        self.root = Path(root)
        self._keep_last = max(1, keep_last)
        self._own_token = run_token is None
        self._token = secrets.token_hex(4) if run_token is None else run_token
        self._part_timeout = part_timeout
        self._attempt = 0  # every writer saves equally often, so this numbers the same attempt on all
        self._task = BackgroundTask()

    def save(
        self, step: int, tensors: Mapping[str, Tensor], meta: dict[str, Any] | None = None, writer: int = 0,
        writers: int = 1, *, copy: bool = True,
    ) -> None:
        """Start to write this writer's part of the checkpoint of ``step``; return once the tensors may be changed.

        It first waits for the previous save, and raises its error. All ``writers`` call it, each with other tensor
        names; writer 0 also gives ``meta`` (anything that JSON holds) and publishes the whole. With copy=False, the
        host tensors belong to the store from now on and are not copied; nobody may change them. Raises UserError.
        """
        assert writers == 1 or not self._own_token, "several writers need a run_token in common"
        assert (meta is not None) == (writer == 0), "writer 0, and only it, gives the metadata"
        self.wait()
        self._attempt += 1
        private = {
            name: tensor.detach().to("cpu", copy=copy and tensor.device.type == "cpu").contiguous()
            for name, tensor in tensors.items()
        }
        meta_text = json.dumps(meta)  # a snapshot, like the tensors
        partial = self.root / f"{reading.step_folder(step)}.partial-{self._token}-{self._attempt}"
        self._task.start(lambda: self._write(partial, step, private, meta_text, writer, writers), "checkpoint-writer")

    def wait(self) -> None:
        """Return when this writer's save is done (for writer 0: published). Raises UserError if it failed."""
        self._task.wait()

    def tidy(self, newest: Path) -> None:
        """Clean up after a run that was killed. Writer 0 of the run that continues from the checkpoint ``newest`` calls
        this before its first save."""
        plain = newest.with_name(newest.name.split(".")[0])
        with self._tidying():
            if newest != plain and plain.exists():
                self._delete(plain)  # it is damaged: ``newest`` was about to be replaced by it
            self._clean(None)  # this gives an interrupted replacement its old name back
            self._prune(plain)
        self._point_latest(plain)

    def _write(
        self, partial: Path, step: int, tensors: dict[str, Tensor], meta_text: str, writer: int, writers: int
    ) -> None:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            if writer == 0:
                self._clean(partial)
            _write_part(partial, writer, tensors)
            tensors.clear()  # the host memory is free while writer 0 waits
            if writer == 0:
                with phase.waiting_for_others():
                    parts = self._wait_for_parts(partial, writers)
                self._publish(partial, step, json.loads(meta_text), parts)
        except OSError as error:
            remedy = "free disk space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder"
            message = f"checkpoint {partial}: could not be written ({error.strerror or error}); {remedy}, then restart"
            _leave_note(partial, writer, message)
            raise UserError(message) from error

    def _wait_for_parts(self, partial: Path, writers: int) -> list[reading.Contribution]:
        deadline = time.monotonic() + self._part_timeout
        pause = 0.01
        while True:
            present = set(os.listdir(partial))
            for note in sorted(name for name in present if name.endswith(".failed")):
                raise UserError((partial / note).read_text(encoding="utf-8"))
            missing = [index for index in range(writers) if _part_name(index) not in present]
            if not missing:
                paths = (partial / _part_name(index) for index in range(writers))
                return [read_json(path, reading.Contribution, "check the file system, then restart") for path in paths]
            if time.monotonic() > deadline:
                raise UserError(
                    f"checkpoint {partial}: no part from writer(s) {', '.join(map(str, missing))} within "
                    f"{self._part_timeout:g} s; check these ranks' logs and that all nodes share {self.root}"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _publish(self, partial: Path, step: int, meta: Any, parts: list[reading.Contribution]) -> None:
        index: dict[str, Any] = {
            "format": reading.FORMAT, "version": reading.VERSION, "step": step, "meta": meta,
            "files": {}, "tensors": {},
        }
        for part in map(asdict, parts):
            twice = index["tensors"].keys() & part["tensors"].keys()
            assert not twice, f"two writers gave the tensors {sorted(twice)}"
            index["tensors"].update(part["tensors"])
            index["files"].update(part["files"])
        index["digest"] = reading.digest_of(index)
        write_atomic(partial / reading.INDEX, json.dumps(index).encode(), flush=True)
        for writer in range(len(parts)):
            (partial / _part_name(writer)).unlink()  # the index now has its content
        flush_folder(partial)
        final = self.root / reading.step_folder(step)
        replaced = None
        if final.exists():  # a damaged one, before which the run resumed, or the same step again
            replaced = final.with_name(f"{final.name}.replaced-{self._token}-{self._attempt}")
            os.rename(final, replaced)
        os.rename(partial, final)
        flush_folder(self.root)
        self._point_latest(final)
        with self._tidying():
            if replaced is not None:
                self._delete(replaced)
            self._set_aside_later(step)
            self._prune(final)

    @contextmanager
    def _tidying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # the newest checkpoint itself is safe
            log.warning("%s: old checkpoints could not be tidied up (%s)", self.root, error)

    def _point_latest(self, newest: Path) -> None:
        latest, link = self.root / reading.LATEST, self.root / f"{reading.LATEST}.tmp"
        try:
            if latest.is_symlink() and os.readlink(latest) == newest.name:
                return
            link.unlink(missing_ok=True)
            os.symlink(newest.name, link)
            os.replace(link, latest)
        except OSError as error:  # it serves people; ``open_checkpoint`` finds the newest without it
            log.warning("%s: the link could not be set (%s)", latest, error.strerror)

    def _set_aside_later(self, step: int) -> None:
        """Rename checkpoints of later steps: the run went back to an earlier step and will reach them another way."""
        for later, folder in self._published():
            if later > step:
                aside = folder.with_name(f"{folder.name}.superseded-{self._token}-{self._attempt}")
                os.rename(folder, aside)
                log.warning("%s is newer than the step %d just written: kept aside as %s", folder, step, aside.name)

    def _prune(self, newest: Path) -> None:
        for _, folder in self._published()[self._keep_last :]:
            if folder != newest:
                self._delete(folder)

    def _published(self) -> list[tuple[int, Path]]:
        """Return step and folder of every checkpoint, the newest first, without those that are being replaced."""
        return [(step, folder) for step, folder in reading.newest_first(self.root) if "." not in folder.name]

    def _delete(self, folder: Path) -> None:
        """Rename a checkpoint, so that nobody finds it half deleted, and delete it, unless somebody reads it."""
        lock = reading.try_exclusive(folder)
        if lock is None:
            return
        try:
            doomed = folder.with_name(f"{folder.name.split('.')[0]}.deleting-{self._token}-{self._attempt}")
            os.rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        finally:
            os.close(lock)

    def _clean(self, partial: Path | None) -> None:
        """Remove what dead runs and failed attempts left; other writers may already be in ``partial``."""
        for folder in list(self.root.iterdir()):
            plain = folder.with_name(folder.name.split(".")[0])
            if match := reading.UNFINISHED.fullmatch(folder.name):
                token, _, attempt = match[3].rpartition("-")
                is_ahead = token == self._token and int(attempt) > self._attempt
                if folder != partial and not is_ahead:
                    shutil.rmtree(folder, ignore_errors=True)
            elif reading.STEP_FOLDER.fullmatch(folder.name) and folder != plain:  # a replacement was interrupted
                if plain.exists():
                    self._delete(folder)
                else:
                    os.rename(folder, plain)


def _part_name(writer: int) -> str:
    return f"part-{writer:05d}.json"


def _write_part(partial: Path, writer: int, tensors: Mapping[str, Tensor]) -> None:
    """Write this writer's tensor file, then the manifest that marks it as complete."""
    file = f"tensors-{writer:05d}.safetensors"
    part: dict[str, Any] = {"files": {}, "tensors": {}}
    if tensors:
        try:
            size, sha256 = write_tensors(partial / file, tensors)
        except OSError:
            (partial / file).unlink(missing_ok=True)  # give the space back
            raise
        part["files"][file] = {"size": size, "sha256": sha256}
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            part["tensors"][name] = {"file": file, "shape": list(tensor.shape), "dtype": dtype}
    write_atomic(partial / _part_name(writer), json.dumps(part).encode(), flush=True)


def _leave_note(partial: Path, writer: int, message: str) -> None:
    """Tell writer 0 at once, so that it does not wait for a part that will not come."""
    if writer != 0:
        try:
            write_atomic(partial / f"part-{writer:05d}.failed", message.encode(), flush=True)
        except OSError:
            log.warning("%s: writer 0 could not be told that writer %d failed", partial, writer)
