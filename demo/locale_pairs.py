"""A parallel corpus without a download: the Unicode CLDR locale data, as Babel writes it out.

Every sentence is a list of one to four entries (dates, times, date-times, intervals, relative
times, quantities, sums of money, country and language names), the same content and CLDR width in
English and in German. The connecting words come from CLDR too ("A, B, and C" is "A, B und C").
What CLDR writes as no-break, narrow or thin space is a plain space here, and the dash of an
interval stands between two of them ("3–5" is "3 – 5"), on both sides: a tokeniser splits there
anyway, and a detokeniser could not tell the one from the other.

Held out are combinations, not sentences: (month, day), (hour, minute), (relative unit, number,
direction), (unit, number), (currency, amount) and (country, language) in neighbouring entries. Each
belongs to train, valid or test by a hash of its own, whatever the seed, so test text is made
only of combinations that training text never shows, in formats that it does show. The number one
is never held out: its word forms are seen with nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from babel.lists import format_list

from demo.locale_items import LOCALES, SPLITS, Combination, Item, draw_item
from demo.noise import write_lines

MAX_ENTRIES = 4
MAX_TRIES = 20_000  # in a row without a new sentence: the corpus asked for is too large


class Pair(NamedTuple):
    """One sentence in both languages, and the combinations that it shows."""

    en: str
    de: str
    combinations: tuple[Combination, ...]


def plain_spaces(text: str) -> str:
    """The text with plain single spaces for white space of any width, and around en dashes."""
    return " ".join(text.replace("–", " – ").split())


def draw_pair(rng: random.Random, split: str) -> Pair:
    """A sentence of one to four list entries in both languages."""
    room = rng.randint(1, MAX_ENTRIES)
    items: list[Item] = []
    while room > 0:
        items.append(draw_item(rng, split, room))
        room -= 2 if items[-1].combinations[0][0] == "names" else 1
    style = rng.choice(("standard", "standard", "or"))
    texts = {
        language: plain_spaces(
            format_list([entry for item in items for entry in item.write(locale)], style, locale)
        )
        for language, locale in LOCALES.items()
    }
    return Pair(**texts, combinations=sum((item.combinations for item in items), ()))


def draw_pairs(split: str, number: int, seed: int = 1) -> Iterator[Pair]:
    """Yield distinct sentences of one part of the corpus; no two agree in English or in German.

    The held-out combinations do not depend on the seed.

    Raises:
        ValueError: if there are fewer than ``number``.
    """
    rng = random.Random(f"{split} {seed}")
    seen: dict[str, set[str]] = {language: set() for language in LOCALES}
    for count in range(number):
        for _ in range(MAX_TRIES):
            pair = draw_pair(rng, split)
            if pair.en not in seen["en"] and pair.de not in seen["de"]:
                break
        else:
            raise ValueError(f"cannot find {number} distinct {split} pairs, only {count}")
        seen["en"].add(pair.en)
        seen["de"].add(pair.de)
        yield pair


def write_pairs(out: Path, *, num_train: int, num_valid: int, num_test: int, seed: int = 1) -> None:
    """Write `{train,valid,test}.{en,de}`: UTF-8, one sentence a line, line n translates line n.

    The same seed and Babel version give the same bytes. Files of these names are replaced.

    Raises:
        ValueError: as `draw_pairs`.
        OSError: if the folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    for split, size in zip(SPLITS, (num_train, num_valid, num_test), strict=True):
        pairs = list(draw_pairs(split, size, seed))
        for language in LOCALES:
            write_lines(out / f"{split}.{language}", [getattr(pair, language) for pair in pairs])
