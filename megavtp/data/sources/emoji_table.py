"""The emoji of Unicode: names, groups, and which of them show the same thing.

The table beside this file is Unicode's emoji-test data, version 17 (notice in its head).
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

_TABLE = Path(__file__).with_name("emoji_table.txt")
_SELECTOR, _JOINER = "FE0F", "200D"
_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
# These follow a joiner: man and woman sign; red, curly, white and no hair; facing right.
_VARIANTS = {"2640", "2642", "1F9B0", "1F9B1", "1F9B3", "1F9B2", "27A1"}
_NEUTRAL = {
    "1F468": "1F9D1", "1F469": "1F9D1",  # man, woman: person
    "1F466": "1F9D2", "1F467": "1F9D2",  # boy, girl: child
    "1F474": "1F9D3", "1F475": "1F9D3",  # old man, old woman: older person
    "1F478": "1F934",  # princess: prince
    "1F57A": "1F483",  # man dancing: woman dancing
    "1F936": "1F385",  # Mrs. Claus: Santa Claus
    "1F930": "1FAC4", "1FAC3": "1FAC4",  # pregnant woman, man: person
    "1F46C": "1F46B", "1F46D": "1F46B",  # men, women holding hands: woman and man holding hands
}
# Sequences that name each person, for skin tones or genders, and the single emoji that shows the same.
_SPELLED_OUT = {
    ("1F9D1", "1F384"): "1F385",  # Mx Claus
    ("1F9D1", "1F91D", "1F9D1"): "1F46B",  # people holding hands
    ("1F9D1", "2764", "1F48B", "1F9D1"): "1F48F",  # kiss
    ("1F9D1", "2764", "1F9D1"): "1F491",  # couple with heart
    ("1F9D1", "1F430", "1F9D1"): "1F46F",  # people with bunny ears
    ("1F9D1", "1FAEF", "1F9D1"): "1F93C",  # people wrestling
    ("1FAF1", "1FAF2"): "1F91D",  # handshake
}
_FAMILY = "1F46A"
_STOP_WORDS = {"a", "and", "in", "of", "on", "over", "s", "the", "with"}


@dataclass(frozen=True)
class Emoji:
    """An emoji. Its ``code`` joins hexadecimal code points by "-", without the presentation selector (U+FE0F)."""

    code: str
    name: str
    group: str
    subgroup: str

    @property
    def base(self) -> bool:
        """Whether the emoji has no skin tone."""
        return not _TONES & set(self.code.split("-"))

    @cached_property
    def concept(self) -> str:
        """Return the code of what is shown, whatever its skin tone, gender, hair or direction."""
        points = [p for p in self.code.split("-") if p not in _TONES | _VARIANTS | {_JOINER}]
        points = [_NEUTRAL.get(p, p) for p in points]
        if tuple(points) in _SPELLED_OUT:
            return _SPELLED_OUT[tuple(points)]
        if len(points) > 1 and points[-1] == "1F9D2" and set(points) == {"1F9D1", "1F9D2"}:
            return _FAMILY
        return "-".join(points) or self.code  # a component on its own (a skin tone, a sign)

    @property
    def words(self) -> frozenset[str]:
        """Return the meaningful words of the name in lower case."""
        return frozenset(re.findall(r"[^\W_]+", self.name.lower())) - _STOP_WORDS


@lru_cache(maxsize=1)
def emoji_table() -> tuple[Emoji, ...]:
    """Return all 3,944 fully-qualified emoji, in Unicode's order."""
    rows = []
    group = subgroup = ""
    for line in _TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("@@"):
            subgroup = line[2:]
        elif line.startswith("@"):
            group = line[1:]
        elif line and not line.startswith("#"):
            code, name = line.split("\t")
            rows.append(Emoji(code, name, group, subgroup))
    return tuple(rows)


def held_out_concepts(fraction: float, seed: int = 0) -> frozenset[str]:
    """Choose about ``fraction`` of all concepts for testing; the same arguments give the same concepts everywhere.

    Only a concept whose every word also names a concept that stays can be held out: then "grinning cat" is a fair
    question to a model that has seen "cat" and "grinning face". Flags and keycaps are never held out (a country cannot
    be told from the flags of others), and at most a quarter of a subgroup is. So a large ``fraction`` yields fewer.
    """
    members: dict[str, list[Emoji]] = {}
    for emoji in emoji_table():
        if emoji.base:
            members.setdefault(emoji.concept, []).append(emoji)
    words = {concept: frozenset().union(*(e.words for e in group)) for concept, group in members.items()}
    left = Counter(word for names in words.values() for word in names)
    sizes = Counter(group[0].subgroup for group in members.values())
    room = {subgroup: count / 4 for subgroup, count in sizes.items()}
    wanted = round(fraction * len(members))
    held: set[str] = set()
    for concept in sorted(members, key=lambda c: hashlib.sha256(f"{seed}/{c}".encode()).digest()):
        first = members[concept][0]
        if len(held) == wanted:
            break
        guessable = first.group != "Flags" and first.subgroup != "keycap"
        if not guessable or room[first.subgroup] < 1 or any(left[word] < 2 for word in words[concept]):
            continue
        held.add(concept)
        room[first.subgroup] -= 1
        left.subtract(words[concept])
    return frozenset(held)
