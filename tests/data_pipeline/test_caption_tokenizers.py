import gzip
import importlib.util
import json
import pickle
from pathlib import Path

import pytest
import torch

from megavtp.data.captions import SentencePieceTokenizer, load_tokenizer, train_sentencepiece
from megavtp.data.clip_bpe import ClipTokenizer
from megavtp.errors import UserError

ORACLE = Path(__file__).parent.parent / "data" / "clip_tokenizer.json"
needs_merges = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("open_clip", "ftfy", "regex")),
    reason="open_clip_torch, ftfy and regex are not installed",
)
CAPTIONS = ["grinning face", "an icon of a grinning face", "a red apple", "flag: Chad", "naïve café"] * 3


def text_of(tokenizer, ids):
    """The inverse of encode."""
    pieces = [int(i) - 1 for i in ids if 0 < i < tokenizer.vocab_size - 2]
    return tokenizer._model.decode(pieces)


def test_sentencepiece_layout(tmp_path):
    tokenizer = train_sentencepiece(CAPTIONS, tmp_path / "captions.model", 512)
    assert tokenizer.vocab_size % 8 == 0 and tokenizer.vocab_size <= 512
    tokenizer = load_tokenizer("auto", tmp_path, 16)
    ids = tokenizer.encode(["A grinning FACE", "", "你好 🦊", "a red apple " * 40])
    start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    assert ids.shape == (4, 16) and ids.dtype == torch.long
    assert (ids[:, 0] == start).all() and (ids == end).sum(1).tolist() == [1, 1, 1, 1]
    assert (ids.max(1).values == end).all()  # the text encoder pools at the largest id
    for row in ids:
        at = int(row.argmax())
        assert (row[at + 1 :] == 0).all() and (row[1:at] > 0).all() and (row[1:at] < start).all()
    assert ids[1].tolist() == [start, end] + [0] * 14 and ids[3, -1] == end
    assert text_of(tokenizer, ids[0]) == "a grinning face" and text_of(tokenizer, ids[2]) == "你好 🦊"


def test_sentencepiece_is_deterministic_and_sized_exactly(tmp_path):
    words = [f"{a}{b} {b}{a}" for a in ("ba", "ko", "mi", "tu", "re") for b in ("lan", "dor", "vix", "sem", "gua")] * 4
    sizes = {size: train_sentencepiece(words, tmp_path / f"{size}.model", size).vocab_size for size in (296, 304)}
    assert sizes == {296: 296, 304: 304}
    train_sentencepiece(words, tmp_path / "again.model", 296)
    assert (tmp_path / "again.model").read_bytes() == (tmp_path / "296.model").read_bytes()
    copy = pickle.loads(pickle.dumps(SentencePieceTokenizer(tmp_path / "296.model", 9)))
    assert copy.encode(["balan"]).shape == (1, 9) and copy.vocab_size == 296


def test_tiny_corpora(tmp_path, capfd):
    for captions in (["a"], ["cat"], ["x y", "\n", "y z"]):
        tokenizer = train_sentencepiece(captions, tmp_path / "tiny.model", 8192)
        assert tokenizer.vocab_size < 400 and text_of(tokenizer, tokenizer.encode(["dog"])[0]) == "dog"
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match="no caption"):
        train_sentencepiece(["", "  \n"], tmp_path / "x.model")
    with pytest.raises(UserError, match="--vocab-size"):
        train_sentencepiece(CAPTIONS, tmp_path / "x.model", 64)
    assert not (tmp_path / "x.model").exists()


@needs_merges
def test_clip_ids_equal_the_reference():
    oracle = json.loads(ORACLE.read_text())
    for context in (77, 16):
        tokenizer = load_tokenizer("clip", "unused", context)
        assert tokenizer.encode(oracle["texts"]).tolist() == oracle[f"ids{context}"]
    assert (tokenizer.vocab_size, tokenizer.vocab_size - 1) == (oracle["vocab_size"], oracle["eot"])
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(["a dog"])[0, :4].tolist() == [49406, 320, 1929, 49407]
    assert copy.encode(["a dog \ud83d"])[0, :3].tolist() == [49406, 320, 1929]  # half an emoji is a question mark


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="prepare_data.py index"):
        load_tokenizer("auto", tmp_path, 8)
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(str(tmp_path / "no.model"), tmp_path, 8)
    (tmp_path / "bad.model").write_bytes(b"garbage")
    with pytest.raises(UserError, match="no sentencepiece model"):
        load_tokenizer(str(tmp_path / "bad.model"), tmp_path, 8)
    with pytest.raises(UserError, match="not a local path"):
        load_tokenizer("https://example.org/x.model", tmp_path, 8)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pytest.importorskip("ftfy"), pytest.importorskip("regex")
    with pytest.raises(UserError, match="open_clip_torch"):
        load_tokenizer("clip", tmp_path, 8)
    for content in (b"not gzip", gzip.compress(b"head\na b\nc d\n")):
        (tmp_path / "merges.txt.gz").write_bytes(content)
        with pytest.raises(UserError, match="merges"):
            ClipTokenizer(8, tmp_path / "merges.txt.gz")
