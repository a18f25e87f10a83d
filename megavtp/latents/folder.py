"""A folder of latents, which a tokenizer made of a data set: LightningDiT's shards and the tokenizer's facts.

    FOLDER/
      visual_tokenizer.json                  the tokenizer's facts: fingerprint, statistics (``latents.artifact``)
      classes.json                           optional: a list of class names, in the order of their labels
      latents_rank00_shard000.safetensors    any names; they are read in sorted order
          latents        (n, C, h, w)  float   of the images, not normalised
          latents_flip   (n, C, h, w)  float   of the mirrored images (not the mirrored latents); may be left out
          labels         (n,)          int64   class of each image, from 0; without classes all 0
          captions       (n, E)        float   unit caption features of the tokenizer's text encoder; may be left out
          metadata       "tokenizer": the tokenizer's fingerprint; may be left out, as LightningDiT's shards do

Letters: n images of a shard, C channels, h = w positions, E caption features.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megavtp.data.decode import BadSample
from megavtp.data.files import refuse_remote
from megavtp.errors import UserError
from megavtp.json_file import read_json
from megavtp.latents.artifact import FILE, LatentStatistics, TokenizerArtifact

CLASSES_FILE = "classes.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MAX_CLASSES = 1_000_000  # the DiT has a row for each class up to the highest label
_REMEDY = "extract the latents again with tools/extract_latents.py"


@dataclass(frozen=True)
class LatentSample:
    """An image's latents (C, h, w) as extracted, its label, and its caption feature (E,) or None."""

    id: str
    latents: Tensor
    label: int
    caption: Tensor | None


class LatentFolder:
    """An opened and checked folder of latents.

    Attributes:
        artifact: the facts of the tokenizer that made them; statistics: of the latents.
        shard_counts: images of each shard. shape: (C, h, w). has_flips: whether the mirrored images' latents are there.
        num_classes: of the labels. classes: their names, if known. caption_width: E, or None without captions.

    Raises ``UserError``: no shards, no statistics, shards of different shapes, tensors or tokenizers, bad labels.
    """

    def __init__(self, folder: str | Path):
        self.folder = refuse_remote(folder)
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder}: no such folder of latents; make one with tools/extract_latents.py, or set data.root"
            )
        self.artifact = TokenizerArtifact.read(self.folder)
        self.statistics: LatentStatistics = self.artifact.needed_statistics(str(self.folder))
        self._paths = sorted(self.folder.glob("*.safetensors"))
        if not self._paths:
            raise UserError(f"{self.folder} holds no *.safetensors; {_REMEDY}")
        self._open: dict[int, Any] = {}
        shapes = [self._shapes(shard) for shard in range(len(self._paths))]
        first = shapes[0]
        for path, found in zip(self._paths, shapes):
            expected = {name: (*found["latents"][:1], *shape[1:]) for name, shape in first.items()}
            if found != expected:
                raise UserError(f"{path} holds {found}, which are not those of the first shard ({expected}); {_REMEDY}")
        self.shard_counts = [found["latents"][0] for found in shapes]
        self.shape = first["latents"][1:]
        self.has_flips = "latents_flip" in first
        self.caption_width = first["captions"][1] if "captions" in first else None
        if self.shape[0] != len(self.statistics.mean):
            raise UserError(
                f"{self.folder}: the latents have {self.shape[0]} channels, their statistics "
                f"{len(self.statistics.mean)}; {_REMEDY}"
            )
        self._labels = [self._read_labels(shard) for shard in range(len(self._paths))]
        names = self.folder / CLASSES_FILE
        self.classes = read_json(names, list[str], _REMEDY) if names.exists() else None
        highest = max(int(labels.max()) for labels in self._labels)
        self.num_classes = highest + 1 if self.classes is None else len(self.classes)
        if highest >= self.num_classes:
            raise UserError(
                f"{self.folder}: a label is {highest}, but {CLASSES_FILE} names {self.num_classes} classes; {_REMEDY}"
            )
        self._open.clear()  # other processes open their own

    @property
    def landmark(self) -> Path:
        """The file of the tokenizer's facts, which each extraction writes anew."""
        return self.folder / FILE

    @property
    def digest(self) -> str:
        """The SHA-256 of the tokenizer's facts, the shards' names and kind, the classes and the labels."""
        names = [path.name for path in self._paths]
        facts = (self.artifact, names, self.shape, self.has_flips, self.caption_width, self.classes)
        found = hashlib.sha256(repr(facts).encode())
        for labels in self._labels:
            found.update(labels.numpy().tobytes())
        return found.hexdigest()

    def read(self, shard: int, row: int, flip: bool) -> LatentSample:
        """Read an image's latents; ``flip`` reads its mirror image's. ``BadSample`` if a number is not finite."""
        try:
            file = self._handle(shard)
            latents = file.get_slice("latents_flip" if flip else "latents")[row].float()
            caption = None if self.caption_width is None else file.get_slice("captions")[row].float()
        except SafetensorError as error:
            raise self._unreadable(shard, error) from None
        if not latents.isfinite().all() or (caption is not None and not caption.isfinite().all()):
            raise BadSample("a number in it is not finite")
        return LatentSample(self.name(shard, row), latents, int(self._labels[shard][row]), caption)

    def name(self, shard: int, row: int) -> str:
        return f"{self._paths[shard].name}/{row}"

    def _handle(self, shard: int) -> Any:
        if shard not in self._open:
            try:
                self._open[shard] = safe_open(self._paths[shard], framework="pt")
            except (OSError, SafetensorError) as error:
                raise self._unreadable(shard, error) from None
        return self._open[shard]

    def _unreadable(self, shard: int, error: Exception) -> UserError:
        return UserError(f"{self._paths[shard]}: cannot be read ({error}); {_REMEDY}")

    def _shapes(self, shard: int) -> dict[str, tuple[int, ...]]:
        """Read the shapes of all tensors from the header, and check that they fit one another."""
        file, path = self._handle(shard), self._paths[shard]
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        if missing := {"latents", "labels"} - shapes.keys():
            raise UserError(f"{path} has no tensor {' and '.join(sorted(missing))}; {_REMEDY}")
        maker = (file.metadata() or {}).get("tokenizer", self.artifact.fingerprint)
        if maker != self.artifact.fingerprint:
            raise UserError(
                f"{path} was made by the tokenizer {maker[:12]}, {self.folder}/visual_tokenizer.json is of "
                f"{self.artifact.fingerprint[:12]}; {_REMEDY}"
            )
        size = shapes["latents"]
        fitting = {"latents_flip": size, "labels": size[:1], "captions": size[:1] + shapes.get("captions", ())[1:2]}
        apart = any(shapes.get(name, shape) != shape for name, shape in fitting.items())
        if apart or len(size) != 4 or size[2] != size[3] or 0 in size:
            raise UserError(f"{path} holds {shapes}, which are no square latents of as many images; {_REMEDY}")
        for name in shapes.keys() & {"latents", "latents_flip", "captions"}:
            if (dtype := file.get_slice(name).get_dtype()) not in _FLOATS:
                raise UserError(f"{path}: {name} is of {dtype}, not of floating point numbers; {_REMEDY}")
        return shapes

    def _read_labels(self, shard: int) -> Tensor:
        labels = self._handle(shard).get_tensor("labels")
        if labels.dtype not in _INTEGERS or int(labels.min()) < 0 or int(labels.max()) >= _MAX_CLASSES:
            raise UserError(f"{self._paths[shard]}: labels must be integers from 0 below {_MAX_CLASSES}; {_REMEDY}")
        return labels.to(torch.int32)  # kept for the whole data set
