"""Caption tokenizers, which turn text into ids."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import sentencepiece
from torch import Tensor

from megavtp.arithmetic import ceil_div
from megavtp.data.clip_bpe import ClipTokenizer, framed
from megavtp.data.files import refuse_remote, write_atomic
from megavtp.data.sample_text import encodable
from megavtp.errors import UserError

_RESERVED = 3  # padding (0), start and end of text (the two largest ids)
_MULTIPLE = 8  # of the vocabulary size: the embedding is cut over tensor-parallel ranks
TRAINING_CAPTIONS = 1_000_000  # the most that a tokenizer is trained on
_MAX_CHARS = 100_000  # of one caption; the context holds far fewer


class CaptionTokenizer(Protocol):
    """What the loader and the evaluation need of a tokenizer. The end of text has the largest id, ``vocab_size - 1``,
    because the text encoder pools at the position of the largest id."""

    vocab_size: int
    context_length: int

    def encode(self, captions: list[str]) -> Tensor:
        """Return (n, context_length) int64; see ``framed``."""


class SentencePieceTokenizer:
    """A sentencepiece model whose ids are shifted by one. ``vocab_size`` is rounded up to a multiple of 8; the ids
    between the last piece and the start are never used."""

    def __init__(self, path: str | Path, context_length: int = 77):
        self.context_length = context_length
        self._path = path = Path(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self._path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"caption tokenizer {path} does not exist; make it with tools/prepare_data.py") from None
        except (OSError, RuntimeError) as error:
            remedy = "set data.captions to one, or to clip"
            raise UserError(f"{path} is no sentencepiece model ({error}); {remedy}") from None
        self.vocab_size = ceil_div(self._model.get_piece_size() + _RESERVED, _MULTIPLE) * _MULTIPLE

    def __reduce__(self):
        return SentencePieceTokenizer, (self._path, self.context_length)

    def encode(self, captions: list[str]) -> Tensor:
        texts = self._model.encode([encodable(caption[:_MAX_CHARS]) for caption in captions])
        ids = [[piece + 1 for piece in pieces] for pieces in texts]
        return framed(ids, self.context_length, self.vocab_size)


def train_sentencepiece(captions: Iterable[str], out: str | Path, vocab_size: int = 8192) -> SentencePieceTokenizer:
    """Train a unigram model with at most ``vocab_size`` ids, fewer for a small corpus, and write it to ``out``.

    The same captions in the same order give the same file. Characters that are not in the captions fall back to bytes.
    ``UserError`` if all captions are blank, or if ``vocab_size`` is too small for their characters.
    """
    lines = list(filter(None, (" ".join(encodable(caption).split()) for caption in captions)))
    if not lines:
        raise UserError("no caption to train the caption tokenizer on; give the images captions")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="unigram",
            vocab_size=vocab_size // _MULTIPLE * _MULTIPLE - _RESERVED, hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc_cf", byte_fallback=True, character_coverage=1.0,
            bos_id=-1, eos_id=-1, pad_id=-1, num_threads=1, minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"no caption tokenizer of {vocab_size} ids: {error}; change --vocab-size") from None
    write_atomic(Path(out), model.getvalue())
    return SentencePieceTokenizer(out)


def load_tokenizer(spec: str, root: str | Path, context_length: int) -> CaptionTokenizer:
    """Open the tokenizer that ``data.captions`` names: "auto" (ROOT/captions.model), "clip", a sentencepiece ``.model``
    file, or a CLIP merges file ``.txt.gz``."""
    if spec == "auto":
        path = refuse_remote(root) / "captions.model"
        if not path.exists():
            raise UserError(
                f"{path} does not exist; make it with: python tools/prepare_data.py index {root} --vocab-size 8192, "
                "or set data.captions=clip"
            )
        return SentencePieceTokenizer(path, context_length)
    if spec == "clip":
        return ClipTokenizer(context_length)
    path = refuse_remote(spec)
    if path.name.endswith(".txt.gz"):
        return ClipTokenizer(context_length, path)
    return SentencePieceTokenizer(path, context_length)
