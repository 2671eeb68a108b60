"""What a sentence of `demo.locale_pairs` is made of: one thing, written in English and in German.

Each ``draw_`` function draws an item; `draw_item` chooses the kind and sees to it that everything
the item combines belongs to one part of the corpus.
"""

from __future__ import annotations

import calendar
import datetime
import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from babel import Locale
from babel.dates import (
    UTC,
    format_date,
    format_datetime,
    format_interval,
    format_time,
    format_timedelta,
)
from babel.numbers import format_currency, get_currency_precision
from babel.units import format_unit

LOCALES = {"en": Locale("en"), "de": Locale("de")}
SPLITS = ("train", "valid", "test")
HELD_OUT_PERCENT = 5  # of all combinations, for valid and for test each
YEARS = range(1990, 2036)
SOME_DAY = (2000, 1, 1)  # under times that show no date: Babel would otherwise take today

WIDTHS = ("short", "medium", "long", "full")
LENGTHS = ("short", "long")  # German has no narrow patterns of its own for most units
SKELETONS = {"date": ("yMMMd", "yMMMEd", "MMMd", "yMd"), "time": ("Hm", "hm")}  # of intervals
# Numbers stay below the next larger unit, which Babel would round to.
RELATIVE = {
    "second": (1, 59),
    "minute": (60, 59),
    "hour": (3600, 23),
    "day": (86400, 6),
    "week": (7 * 86400, 4),
    "month": (30 * 86400, 11),
    "year": (365 * 86400, 99),
}
_UNITS = """
    acceleration g-force | angle degree | area acre hectare square-centimeter square-foot
    square-kilometer square-meter square-mile | consumption liter-per-100-kilometer mile-per-gallon
    | digital bit byte gigabyte kilobyte megabyte terabyte | duration century day decade hour
    millisecond minute month second week year | electric ampere ohm volt | energy calorie joule
    kilocalorie kilojoule kilowatt-hour | force newton | frequency gigahertz hertz kilohertz
    megahertz | graphics megapixel pixel | length centimeter fathom foot furlong inch kilometer
    light-year meter micrometer mile millimeter nanometer nautical-mile yard | light lumen lux |
    mass carat gram kilogram milligram ounce pound stone tonne | power horsepower kilowatt megawatt
    watt | pressure bar hectopascal pascal | speed kilometer-per-hour knot meter-per-second
    mile-per-hour | temperature celsius fahrenheit kelvin | volume barrel centiliter
    cubic-centimeter cubic-foot cubic-kilometer cubic-meter cup drop fluid-ounce gallon hectoliter
    liter milliliter pint quart tablespoon teaspoon
"""
UNITS = [f"{kind}-{unit}" for kind, *units in map(str.split, _UNITS.split("|")) for unit in units]
CURRENCIES = """
    AED ARS AUD BGN BRL CAD CHF CLP CNY COP CZK DKK EGP EUR GBP HKD HUF IDR ILS INR ISK JPY KES KRW
    MAD MXN MYR NGN NOK NZD PEN PHP PLN RON RSD RUB SAR SEK SGD THB TRY TWD UAH USD VND ZAR
""".split()
# Codes of CLDR that stand for no country and no language of their own.
NOT_COUNTRIES = frozenset({"EU", "EZ", "QO", "UN", "XA", "XB", "ZZ"})
NOT_LANGUAGES = frozenset({"mis", "mul", "root", "und", "zxx"})

Combination = tuple[str | int, ...]
Write = Callable[[Locale], Sequence[str]]


class Item(NamedTuple):
    """Content of one or two list entries: what it combines, and how to write it in a locale."""

    combinations: tuple[Combination, ...]
    write: Write


@functools.cache
def split_of(combination: Combination) -> str:
    """Return the part of the corpus in which a combination, such as ("date", 7, 29), may occur."""
    # One has word forms of its own, which held-out text must not be the first to show.
    if combination[0] in ("relative", "quantity", "money") and str(combination[-1]) in ("1", "-1"):
        return "train"
    digest = hashlib.sha256("|".join(map(str, combination)).encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % 100
    return SPLITS[1 + bucket // HELD_OUT_PERCENT] if bucket < 2 * HELD_OUT_PERCENT else "train"


def shared_names(table: str, unwanted: frozenset[str]) -> list[str]:
    """Return the sorted codes of a table that both locales name; numbers are world regions."""
    codes = set(getattr(LOCALES["en"], table)) & set(getattr(LOCALES["de"], table)) - unwanted
    return sorted(code for code in codes if not code.isdigit())


COUNTRIES = shared_names("territories", NOT_COUNTRIES)
LANGUAGES = shared_names("languages", NOT_LANGUAGES)


@functools.cache
def parts_of(kind: str, split: str) -> list[tuple[int, int]]:
    """Return a part's combinations: (month, day) of ``date``, (hour, minute) of ``time``."""
    if kind == "time":
        all_of = [divmod(minute, 60) for minute in range(24 * 60)]
    else:
        days = (datetime.date(2000, 1, 1) + datetime.timedelta(days=n) for n in range(366))
        all_of = [(day.month, day.day) for day in days]
    return [part for part in all_of if split_of((kind, *part)) == split]


def draw_year(rng: random.Random, *days: tuple[int, int]) -> int:
    """A year that has all these (month, day) combinations."""
    return rng.choice([year for year in YEARS if calendar.isleap(year) or (2, 29) not in days])


def draw_moment(rng: random.Random, split: str, kinds: Sequence[str]) -> Item:
    """A date, a time of day or both, in a CLDR width; the long ones name the time zone, UTC."""
    parts = {kind: rng.choice(parts_of(kind, split)) for kind in kinds}
    day = (draw_year(rng, parts["date"]), *parts["date"]) if "date" in parts else SOME_DAY
    time = (*parts["time"], rng.randrange(60)) if "time" in parts else ()
    moment, width = datetime.datetime(*day, *time), rng.choice(WIDTHS)

    def write(locale: Locale) -> list[str]:
        if "time" not in parts:
            return [format_date(moment.date(), width, locale)]
        form = format_datetime if "date" in parts else format_time
        return [form(moment, width, UTC, locale)]

    return Item(tuple((kind, *part) for kind, part in parts.items()), write)


def draw_interval(rng: random.Random, split: str, kind: str) -> Item:
    """From one day to a later one of the same year, or from one time of a day to a later one."""
    parts = sorted(rng.sample(parts_of(kind, split), 2))
    if kind == "date":
        year = draw_year(rng, *parts)
        ends = [datetime.date(year, *day) for day in parts]
    else:
        ends = [datetime.datetime(*SOME_DAY, *minute) for minute in parts]
    skeleton = rng.choice(SKELETONS[kind])
    return Item(
        tuple((kind, *part) for part in parts),
        lambda locale: [format_interval(*ends, skeleton, UTC, locale=locale)],
    )


def draw_relative(rng: random.Random, split: str) -> Item:
    """A time from now or ago."""
    unit = rng.choice(tuple(RELATIVE))
    seconds, most = RELATIVE[unit]
    number = rng.randint(1, most) * rng.choice((1, -1))
    # CLDR's short German for coming months is incomplete, and Babel fails on it.
    length = "long" if unit == "month" else rng.choice(LENGTHS)
    write = partial(
        format_timedelta, number * seconds, unit, threshold=1, add_direction=True, format=length
    )
    return Item((("relative", unit, number),), lambda locale: [write(locale=locale)])


def draw_number(rng: random.Random, decimals: int) -> float:
    """A number, mostly small and whole; at most so many decimals."""
    whole = rng.randint(1, rng.choice((20, 100, 1000, 10_000, 1_000_000)))
    if decimals and rng.random() < 0.3:
        return round(whole + rng.randrange(1, 10**decimals) / 10**decimals, decimals)
    return whole


def draw_quantity(rng: random.Random, split: str) -> Item:
    """A number of units."""
    unit, length = rng.choice(UNITS), rng.choice(LENGTHS)
    number = draw_number(rng, decimals=1)
    return Item(
        (("quantity", unit, str(number)),),
        lambda locale: [format_unit(number, unit, length, locale=locale)],
    )


def draw_money(rng: random.Random, split: str) -> Item:
    """An amount of a currency, with its symbol or its name."""
    currency = rng.choice(CURRENCIES)
    style = rng.choice(("standard", "name"))
    # Decimals that the currency does not have would be rounded away, and combinations with them.
    amount = draw_number(rng, decimals=get_currency_precision(currency))
    return Item(
        (("money", currency, str(amount)),),
        lambda locale: [format_currency(amount, currency, locale=locale, format_type=style)],
    )


def draw_names(rng: random.Random, split: str) -> Item:
    """A country and a language, as two neighbouring entries."""
    country, language = rng.choice(COUNTRIES), rng.choice(LANGUAGES)
    return Item(
        (("names", country, language),),
        lambda locale: [locale.territories[country], locale.languages[language]],
    )


#: What is drawn, and how often.
DRAWS: list[tuple[Callable[[random.Random, str], Item], int]] = [
    (partial(draw_moment, kinds=("date",)), 3),
    (partial(draw_moment, kinds=("time",)), 1),
    (partial(draw_moment, kinds=("date", "time")), 2),
    (partial(draw_interval, kind="date"), 2),
    (partial(draw_interval, kind="time"), 1),
    (draw_relative, 2),
    (draw_quantity, 4),
    (draw_money, 3),
    (draw_names, 4),
]


def draw_item(rng: random.Random, split: str, room: int) -> Item:
    """Draw an item whose combinations all belong to one part; ``room``: list entries left."""
    draws = [(draw, often) for draw, often in DRAWS if room > 1 or draw is not draw_names]
    draw = rng.choices(*zip(*draws, strict=True))[0]
    while True:
        item = draw(rng, split)
        if all(split_of(combination) == split for combination in item.combinations):
            return item
