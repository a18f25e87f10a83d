"""The byte-pair encoding of CLIP (arXiv 2103.00020), which the released VTP models read: 49,408 ids."""

import gzip
import html
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from megavtp.data.files import find_installed
from megavtp.data.sample_text import encodable
from megavtp.errors import UserError

_MERGES = 49152 - 256 - 2  # the file has more; CLIP reads these
_FILE = "bpe_simple_vocab_16e6.txt.gz"
_SPECIALS = ("<start_of_text>", "<end_of_text>")
_INSTALL = 'pip install "megavtp[clip]"'


def framed(texts: list[list[int]], context_length: int, vocab_size: int) -> Tensor:
    """Return (n, context_length) int64: the start id ``vocab_size - 2``, a text's ids, the end id ``vocab_size - 1``,
    zeros. A longer text is cut."""
    out = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, ids in zip(out, texts):
        ids = [vocab_size - 2, *ids[: context_length - 2], vocab_size - 1]
        row[: len(ids)] = torch.tensor(ids)
    return out


def _byte_symbols() -> dict[int, str]:
    """Return a printable character for each byte, in the order of CLIP's vocabulary (GPT-2's table): printable Latin-1
    characters come first and stand for themselves, the other bytes follow from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


class ClipTokenizer:
    """CLIP's tokenizer, whose start and end ids are 49406 and 49407; see ``captions.CaptionTokenizer``."""

    def __init__(self, context_length: int = 77, path: str | Path | None = None):
        try:
            import ftfy
            import regex
        except ImportError as error:
            raise UserError(f"the CLIP tokenizer needs the packages ftfy and regex ({error}); {_INSTALL}") from None
        self._fix = ftfy.fix_text
        self.context_length = context_length
        self._symbol = _byte_symbols()
        found = Path(path) if path else find_installed("open_clip", _FILE)
        if found is None:
            raise UserError(
                f"data.captions=clip needs {_FILE} of the open_clip_torch package; {_INSTALL}, or name the file"
            )
        self._path = found
        merges = _read_merges(found)
        ends = (symbol + "</w>" for symbol in self._symbol.values())
        vocabulary = [*self._symbol.values(), *ends, *map("".join, merges), *_SPECIALS]
        self._ids = {token: i for i, token in enumerate(vocabulary)}
        self._rank = {merge: i for i, merge in enumerate(merges)}
        self.vocab_size = len(vocabulary)
        self._words = regex.compile(
            "|".join(_SPECIALS) + r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
        )
        self._word_ids = lru_cache(maxsize=65536)(self._encode_word)

    def __reduce__(self):
        return ClipTokenizer, (self.context_length, self._path)

    def encode(self, captions: list[str]) -> Tensor:
        texts = (html.unescape(html.unescape(self._fix(encodable(caption)))) for caption in captions)
        words = (self._words.findall(" ".join(text.split()).lower()) for text in texts)
        ids = [[i for word in text for i in self._word_ids(word)] for text in words]
        return framed(ids, self.context_length, self.vocab_size)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word in _SPECIALS:
            return (self._ids[word],)
        parts = [self._symbol[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while known := self._rank.keys() & set(pairwise(parts)):
            parts = _merge(parts, min(known, key=self._rank.__getitem__))
        return tuple(self._ids[part] for part in parts)


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of ``pair``, from the left."""
    out: list[str] = []
    waiting = parts[::-1]
    while waiting:
        part = waiting.pop()
        joins = waiting and (part, waiting[-1]) == pair
        out.append(part + waiting.pop() if joins else part)
    return out


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 1 + _MERGES]
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"cannot read the CLIP merges {path} ({error}); {_INSTALL}") from None
    pairs = [line.split() for line in lines]
    if len(pairs) != _MERGES or any(len(pair) != 2 for pair in pairs):
        raise UserError(f"{path} is not CLIP's {_FILE}; {_INSTALL}")
    return [(first, second) for first, second in pairs]
