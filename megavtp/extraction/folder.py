"""A folder of latents while it is being made: what it will hold, which shards are there, how it is finished.

The format is that of ``latents.folder``, and one more file is there from the start:

    FOLDER/extraction.json    what decides the latents; an extraction that is resumed must have the same

A shard is renamed into place when it is whole, with its sums in its header, so that nothing is read twice; the
tokenizer's facts, without which nobody opens the folder, come last.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megavtp.checkpoint.tensor_file import flush_folder, write_tensors
from megavtp.data.files import refuse_remote, replaced, write_json
from megavtp.data.folder_lock import LOCK_FILE, FolderLock
from megavtp.errors import UserError
from megavtp.extraction.moments import Moments
from megavtp.json_file import read_json
from megavtp.latents.artifact import FILE, STATISTICS_FILE, TokenizerArtifact, check_same_tokenizer
from megavtp.latents.folder import CLASSES_FILE

SETTINGS_FILE = "extraction.json"


class UnfinishedLatents:
    """A folder that is filled with ``shards`` files.

    If ``artifact`` holds statistics, the folder takes those. ``settings`` are JSON values that decide what the files
    hold, ``artifact`` aside.
    """

    def __init__(self, folder: str | Path, artifact: TokenizerArtifact, settings: Mapping[str, Any], shards: int):
        self.folder, self.artifact, self.shards = refuse_remote(folder), artifact, shards
        tokenizer = replace(artifact, statistics=None).to_dict()
        self.settings = json.loads(json.dumps({"tokenizer": tokenizer, **settings}))
        self._lock: FolderLock | None = None

    def claim(self) -> None:
        """Make the folder, unless it was begun already, and lock it until ``release``. UserError if it cannot be
        written or another process fills it; see ``check``."""
        self.check()
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder, "choose another --out")
            self.check()  # again, now that nobody else changes it
            if not (self.folder / SETTINGS_FILE).exists():
                write_json(self.folder / SETTINGS_FILE, self.settings, indent=1)

    def check(self) -> None:
        """Raise UserError if the folder holds something else, was begun with other settings or finished with other
        statistics."""
        path = self.folder / SETTINGS_FILE
        if path.exists():
            remedy = "remove that folder, or choose another --out"
            begun = read_json(path, dict[str, Any], remedy)
            names = begun.keys() | self.settings.keys()
            if differing := sorted(name for name in names if begun.get(name) != self.settings.get(name)):
                raise UserError(
                    f"{self.folder} was begun with another {' and '.join(differing)}; give the same options, {remedy}"
                )
            if (self.folder / FILE).exists():
                done = TokenizerArtifact.read(self.folder)
                check_same_tokenizer(done, str(self.folder), self.artifact, "the given tokenizer")
            return
        # what an extraction leaves that is killed before it has written its settings
        left = {LOCK_FILE, f"{SETTINGS_FILE}.partial"}
        found = {file.name for file in self.folder.iterdir()} if self.folder.is_dir() else set()
        if not found <= left or (self.folder.exists() and not self.folder.is_dir()):
            raise UserError(f"{self.folder} exists and was not made by an extraction; choose another --out")

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are missing or not whole."""
        return [shard for shard in range(self.shards) if self._header(shard) is None]

    def path(self, shard: int) -> Path:
        """Return LightningDiT's name; all names have as many digits, so that they sort by number."""
        digits = max(3, len(str(self.shards - 1)))
        return self.folder / f"latents_rank00_shard{shard:0{digits}d}.safetensors"

    def write(self, shard: int, tensors: Mapping[str, Tensor], moments: Moments | None) -> None:
        """Write a shard's tensors, see ``latents.folder``. A shard of which no image can be read has no tensors, and
        ``moments`` is None; only that is recorded, in a file whose name hides it from readers of latents."""
        path = self.path(shard) if moments else self.path(shard).with_suffix(".empty")
        metadata = {
            "total_size": str(moments.images if moments else 0), "dtype": "torch.float32", "device": "cpu",
            "tokenizer": self.artifact.fingerprint, "moments": moments.dump() if moments else "",
        }
        with self._writing():
            with replaced(path) as partial:
                write_tensors(partial, tensors, metadata)
            flush_folder(self.folder)

    def finish(self, classes: list[str] | None) -> TokenizerArtifact:
        """Write what belongs to all shards, and return the tokenizer's facts with the statistics. UserError: shards are
        missing, none holds an image, or a channel never changes."""
        headers = [self._header(shard) for shard in range(self.shards)]
        if None in headers:
            raise UserError(
                f"{self.path(headers.index(None))} is not to be seen here: --out must be on a file system that all "
                "machines share; start again, what is there is kept"
            )
        parts = [
            Moments.load(text, self.artifact.latent_channels, str(self.path(shard)))
            for shard, text in enumerate(headers) if text
        ]
        if not parts:
            raise UserError(f"{self.folder}: not one image of the data set can be read")
        own = reduce(Moments.joined, parts).statistics()  # a channel that never changes is refused in any case
        statistics = self.artifact.statistics or own
        finished = replace(self.artifact, statistics=statistics)
        with self._writing():
            if classes is not None:
                write_json(self.folder / CLASSES_FILE, classes, indent=1)
            statistics.write(self.folder / STATISTICS_FILE)
            finished.write(self.folder)
        return finished

    def _header(self, shard: int) -> str | None:
        """Return the moments in the header of a whole file, "" if it is empty, None if it is missing."""
        for path in (self.path(shard), self.path(shard).with_suffix(".empty")):
            try:
                with safe_open(path, framework="pt") as file:  # compares the file's length with its header
                    return (file.metadata() or {}).get("moments")
            except (OSError, SafetensorError):
                continue
        return None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror or error}); choose another --out or free some "
                "space; what is there is kept"
            ) from None
