"""Tasks about flags: K4 (how it is divided), K6 (of which part of the world). Both are split by country."""

from __future__ import annotations

import random
import re

from lightning_pfl.benchmark.images import Picture
from lightning_pfl.benchmark.suite.library import Shelf
from lightning_pfl.benchmark.suite.picking import framed
from lightning_pfl.benchmark.suite.recipes import Draft

_CONTINENTS = {
    "Africa": "DZ AO BJ BW BF BI CM CV CF KM CD CG CI DJ EG GQ ER SZ ET GA GM GH GN GW KE LS LR LY MG MW ML MR MU MA"
    " MZ NA NE NG RW ST SN SC SL SO ZA SS SD TZ TG TN UG ZM ZW",
    "America": "AG AR BS BB BZ BO BR CA CL CO CR CU DM DO EC SV GD GT GY HT HN JM MX NI PA PY PE KN LC VC SR TT UY VE"
    " PR",
    "Asia": "AF AM AZ BH BD BT BN KH CN GE IN IR IQ IL JP JO KZ KW KG LA LB MY MV MN MM NP KP OM PK PH QA SA SG KR"
    " LK SY TJ TH TL TM AE UZ VN YE TR",
    "Europe": "AL AD AT BY BE BA BG HR CZ DK EE FI FR DE GR HU IS IE IT LV LI LT MT MD ME NL MK NO PL PT RO RU RS SK"
    " SI ES SE CH UA GB",
    "Oceania": "AU FJ KI MH FM NR NZ PW PG WS SB TO TV VU CK NU",
}
CONTINENTS = tuple(_CONTINENTS)
_LAYOUTS = {
    "horizontal": "AT BG EE DE HU LV LT LU NL RU GA GM SL LS MW EG IR IQ IN NE TJ YE SY UZ CO EC VE BO PY HN NI SV AR"
    " ID PL MC UA MU RW KE BW TH CR KH LA AM AZ GH ET MM LY HR RS SI SK ES EH UG",
    "vertical": "FR IT IE BE RO MD AD PT MT CI GN ML NG SN CM TD DZ MX PE GT CA BB VC MN AF QA BH",
    "cross": "DK NO SE FI IS CH GR GE GB JM DO TO MQ AX FO GG JE BI",
}
LAYOUTS = ("horizontal", "vertical", "cross", "other")


def code_of(picture: Picture) -> str | None:
    """Two-letter country code of an emoji flag's file, such as "FR" of `1f1eb-1f1f7.png`; None for anything else.

    Example:
        >>> from pathlib import Path
        >>> code_of(Picture(Path("1f1eb-1f1f7.png"), "france", "flag", "google", "france", "Apache-2.0"))
        'FR'
    """
    match = re.fullmatch(r"1f1([ef][0-9a-f])-1f1([ef][0-9a-f])", picture.path.stem.lower())
    if match is None:
        return None
    return "".join(chr(int(f"1f1{part}", 16) - 0x1F1E6 + ord("A")) for part in match.groups())


_CONTINENT = {code: place for place, codes in _CONTINENTS.items() for code in codes.split()}
_LAYOUT = {code: layout for layout, codes in _LAYOUTS.items() for code in codes.split()}


def continent(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K6: in which part of the world is the country of the flag?"""
    flags = shelf.where(f"flags of {goal}", lambda picture: _CONTINENT.get(code_of(picture) or "") == goal)
    question = "In which part of the world is the country with this flag?"
    return Draft((framed(rng, flags, mirror=False),), question, CONTINENTS, goal)


def layout(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K4: is the flag divided by horizontal stripes, by vertical ones, by a cross, or otherwise?"""
    flags = shelf.where(f"{goal} flags", lambda picture: _layout_of(picture) == goal)
    return Draft((framed(rng, flags),), "How is the flag divided?", LAYOUTS, goal)


def _layout_of(picture: Picture) -> str | None:
    code = code_of(picture)
    return _LAYOUT.get(code, "other") if code in _CONTINENT else None
