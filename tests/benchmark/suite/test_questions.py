"""Each task shows what it asks about: read off the recipes, by hand rules that know nothing of how they were drawn."""

from __future__ import annotations

import random

import pytest

from lightning_pfl.benchmark.composition import Paste
from lightning_pfl.benchmark.edits import Blur, Brightness, Crop, Jpeg, Noise, Place, Repeat, Turn
from lightning_pfl.benchmark.marks import Bars, Break, Colourise, Cover, Dial, Scratch, Silhouette, Spots
from lightning_pfl.benchmark.suite.actions import query
from lightning_pfl.benchmark.suite.catalogue import find_task
from lightning_pfl.benchmark.suite.counting import NUMBERS
from lightning_pfl.benchmark.suite.faces import LINES
from lightning_pfl.benchmark.suite.library import Shelf
from lightning_pfl.benchmark.suite.named import ACTIONS, IDIOMS, SIMILES, subject_of
from lightning_pfl.benchmark.suite.picking import COLOURS
from lightning_pfl.benchmark.suite.recipes import Sizes, build_task

SIZES = Sizes(48, 24, 24)


@pytest.fixture(scope="module")
def examples(library):
    def of(name):
        task = build_task(find_task(name), library, SIZES)
        return (*task.train, *task.test)

    return of


def _first(view, kind):
    return next((edit for edit in view.edits if isinstance(edit, kind)), None)


def _last(example):
    return example.images[0].edits[-1]


def _copies(view):
    return len(_first(view, Repeat).places)


@pytest.mark.parametrize("name", ["A1", "K2", "K12"])
def test_counts_are_the_copies_in_all_pictures(examples, name):
    for example in examples(name):
        assert sum(_copies(view) for view in example.images) == NUMBERS.index(example.answer) + 1


def test_a8_more_is_more(examples):
    for example in examples("A8"):
        first, second = map(_copies, example.images)
        assert (first > second) == (example.answer == "first")
        assert abs(first - second) >= 2


def _things(view):
    """What lies where in a scene: place -> file."""
    placed = next(edit for edit in view.edits if isinstance(edit, Place))
    return {(placed.x, placed.y): view.path} | {(e.x, e.y): e.view.path for e in view.edits if isinstance(e, Paste)}


def test_a2_says_what_happened_to_one_thing(examples):
    for example in examples("A2"):
        before, after = map(_things, example.images)
        if example.answer == "replaced":
            assert before.keys() == after.keys()
            assert sum(before[place] != after[place] for place in before) == 1
        else:
            small, large = (before, after) if example.answer == "added" else (after, before)
            assert small.items() < large.items()
            assert len(large) == len(small) + 1


def test_a4_says_what_replaced_what(examples, library):
    sorts = {"hat": "hat", "shoe": "shoe", "shirt": "garment"}
    for example in examples("A4"):
        before, after = (sorts[library.picture(view.path).concept.split()[-1]] for view in example.images)
        assert f"Instead of a {before}," in example.question
        assert before != after == example.answer


def test_a5_the_animal_is_where_it_says(examples, library):
    for example in examples("A5"):
        places = {library.picture(path).kind: place for place, path in _things(example.images[0]).items()}
        across, down = (places["animal"][i] - places["vehicle"][i] for i in (0, 1))
        gap = {"left": -across, "right": across, "above": -down, "below": down}[example.answer]
        assert gap >= 0.3


@pytest.mark.parametrize("name", ["A3", "A6"])
def test_surfaces_are_damaged_if_and_only_if_it_says_so(examples, name):
    for example in examples(name):
        damaged = sum(any(isinstance(e, Scratch | Spots) for e in view.edits) for view in example.images)
        assert damaged == (example.answer == "yes")
        assert all(isinstance(view.edits[0], Crop) for view in example.images)


def test_a7_three_of_four_have_the_colour(examples):
    for example in examples("A7"):
        colours = [_first(view, Colourise).colour for view in example.images]
        assert colours.count(COLOURS[example.answer]) == 3


def test_a9_motion(examples):
    for example in examples("A9"):
        first, *_, last = (view.edits[-1] for view in example.images)
        change = {
            "left": first.x - last.x,
            "right": last.x - first.x,
            "up": first.y - last.y,
            "down": last.y - first.y,
            "larger": last.scale - first.scale,
            "smaller": first.scale - last.scale,
        }
        assert change[example.answer] > 0.4


def test_a10_two_of_three_are_of_the_artist(examples, library):
    artists = {"outlined": "openmoji", "shaded": "fluent", "flat": "twitter"}
    for example in examples("A10"):
        shown = [library.picture(view.path).domain for view in example.images]
        assert shown.count(artists[example.answer]) == 2


def test_a11_animals(examples, library):
    for example in examples("A11"):
        animals = [library.picture(view.path).kind == "animal" for view in example.images]
        assert all(animals) == (example.answer == "yes")


def test_a12_what_was_done(examples, library):
    for example in examples("A12"):
        before, after = example.images
        kinds = {"turned": Turn, "smaller": Place, "coloured": Colourise}
        if example.answer == "redrawn":
            one, two = (library.picture(view.path) for view in example.images)
            assert one.concept == two.concept
            assert one.domain != two.domain
        else:
            assert before.path == after.path
            assert isinstance(after.edits[-1], kinds[example.answer])


def test_b1_and_k9_have_the_defect_that_they_name_and_no_other(examples):
    """A photograph without a defect ends with where it is placed."""
    problems = {Place: "fine", Blur: "blurry", Brightness: "dark", Crop: "cropped", Turn: "upside"}
    defects = {Place: "clean", Blur: "blurry", Noise: "noisy", Brightness: "dark", Jpeg: "compressed"}
    for name, known in (("B1", problems), ("K9", defects)):
        for example in examples(name):
            *framing, last = example.images[0].edits
            assert known[type(last)] == example.answer
            assert all(isinstance(edit, Place) or edit == Turn(0, mirror=True) for edit in framing)
    turned = [_last(example) for example in examples("B1") if example.answer == "upside"]
    assert set(turned) == {Turn(2)}


def test_b4_states(examples):
    for example in examples("B4"):
        broken = _first(example.images[0], Break) is not None
        assert broken == (example.answer == "broken")


@pytest.mark.parametrize(("name", "phrases"), [("B2", SIMILES), ("B5", IDIOMS)])
def test_the_phrase_names_the_chosen_picture_and_no_other(examples, library, name, phrases):
    for example in examples(name):
        phrase = next(p for p in phrases if f" {p}?" in example.question or f'"{p} ...' in example.question)
        subjects = [subject_of(library.picture(view.path).concept) for view in example.images]
        assert [subject == phrases[phrase] for subject in subjects] == [
            choice == example.answer for choice in example.choices
        ]


def test_b7_the_line_is_of_the_mood_of_the_face_and_the_others_of_other_moods(examples, library):
    mood_of = {line: mood for mood, lines in LINES.items() for line in lines}
    for example in examples("B7"):
        face = library.picture(example.images[0].path)
        assert (face.kind, face.sort) == ("face", mood_of[example.answer])
        assert {mood_of[line] for line in example.choices} == {"happy", "sad", "ill", "calm"}


def test_b8_and_b11_stand_for_the_quality(examples, library):
    for example in examples("B8"):
        quality = next(q for q in SIMILES if example.question.split("?")[0].endswith(f" {q}"))
        shown = subject_of(library.picture(example.images[0].path).concept)
        assert (shown == SIMILES[quality]) == (example.answer == "yes")
    for example in examples("B11"):
        shown = subject_of(library.picture(example.images[0].path).concept)
        assert [SIMILES[q] == shown for q in example.choices] == [q == example.answer for q in example.choices]


def test_actions_are_shared_or_not_as_it_says(examples, library):
    def verbs(example):
        return [subject_of(library.picture(view.path).concept) for view in example.images]

    for example in examples("B3"):
        assert set(verbs(example)) == {example.answer}
    for example in examples("B9"):
        asked = next(verb for verb in ACTIONS if f" {verb}?" in example.question)
        assert verbs(example).count(asked) == (3 if example.answer == "yes" else 2)
    for example in examples("B12"):
        *shown, asked = verbs(example)
        assert len(set(shown)) == 1
        assert (asked == shown[0]) == (example.answer == "positive")


def test_b12_neither_file_nor_artist_gives_the_answer_away(examples, library):
    """Little libraries have two artists per action in training and one in the test."""
    styles = set()
    for example in examples("B12"):
        *shown, asked = (library.picture(view.path) for view in example.images)
        assert asked.path not in {picture.path for picture in shown}
        by_another = asked.domain not in {picture.domain for picture in shown}
        styles.add((example.id.split("/")[1], by_another))
    assert styles == {("train", True), ("test", False)}


def test_an_action_that_is_drawn_once_cannot_be_asked_about(library):
    once = Shelf("val", tuple({subject_of(p.concept): p for p in library.shelf("val").pictures}.values()))
    with pytest.raises(ValueError, match="The val side holds no two pictures of any action"):
        query(random.Random(0), "positive", once)


def test_kinds_are_shared_or_not_as_it_says(examples, library):
    for example in examples("B6"):
        assert {library.picture(view.path).kind for view in example.images} == {example.answer}
        assert len({library.picture(view.path).concept for view in example.images}) == 3
    for example in examples("B10"):
        *shown, asked = (library.picture(view.path).kind for view in example.images)
        assert len(set(shown)) == 1
        assert (asked == shown[0]) == (example.answer == "positive")


@pytest.mark.parametrize("name", ["K1", "K11", "K16"])
def test_food_is_of_the_sort_and_hints_are_as_promised(examples, library, name):
    from lightning_pfl.benchmark.suite.food import _PLACES, _WRONG

    for example in examples(name):
        assert library.picture(example.images[0].path).sort == example.answer
        if name == "K11":
            pair = next(pair for pair, place in _PLACES.items() if place in example.question)
            assert example.answer in pair
        if name == "K16":
            assert _WRONG[example.answer] not in example.question


def _severity(view):
    """How bad a photograph's one defect is, on the defect's own scale."""
    last = view.edits[-1]
    return {
        Blur: lambda: last.radius,
        Noise: lambda: last.sd,
        Brightness: lambda: -last.factor,
        Jpeg: lambda: -last.quality,
    }[type(last)]()


@pytest.mark.parametrize(("name", "photographs"), [("K3", 2), ("K14", 1)])
def test_the_better_photograph_has_less_of_the_same_defect(examples, name, photographs):
    shown = []
    for example in examples(name):
        assert len({type(view.edits[-1]) for view in example.images}) == 1
        severities = [_severity(view) for view in example.images]
        assert example.choices[severities.index(min(severities))] == example.answer
        assert severities.count(min(severities)) == 1
        shown.append(len({view.path for view in example.images}))
    assert max(shown) == photographs


def test_k5_the_animal_is_of_the_class(examples, library):
    for example in examples("K5"):
        animal = library.picture(example.images[0].path)
        assert (animal.kind, animal.sort) == ("animal", example.answer)


def test_k8_says_whether_it_is_blurred(examples):
    for example in examples("K8"):
        assert (_first(example.images[0], Blur) is not None) == (example.answer == "yes")


def test_k7_k10_dials_and_bars(examples):
    for example in examples("K7"):
        hours = {0: "twelve", 180: "three", 360: "six", 540: "nine"}
        assert hours[_first(example.images[0], Dial).minutes] == example.answer
    for example in examples("K10"):
        heights = _first(example.images[0], Bars).heights
        assert example.choices[heights.index(max(heights))] == example.answer


def test_k13_asks_for_the_shape_or_the_colour_of_one_outline(examples):
    shapes = {0: "circle", 3: "triangle", 4: "square"}
    for example in examples("K13"):
        mark = _last(example)
        if "Which shape" in example.question:
            assert (shapes[mark.corners], set(example.choices)) == (example.answer, set(shapes.values()))
        else:
            assert "Which colour" in example.question
            assert (mark.colour, set(example.choices)) == (COLOURS[example.answer], {"red", "green", "blue"})


def test_k15_the_corner_holds_the_kind(examples, library):
    corners = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
    for example in examples("K15"):
        where = next(where for name, where in corners.items() if f"at the {name}?" in example.question)
        kinds = {
            (int(x > 0.4), int(y > 0.4)): library.picture(p).kind for (x, y), p in _things(example.images[0]).items()
        }
        assert kinds[where] == example.answer
        assert len(set(kinds.values())) == 4


def test_flags_lie_where_their_country_does(examples, library):
    from lightning_pfl.benchmark.suite.flags import code_of

    continents = {code_of(library.picture(e.images[0].path)): e.answer for e in examples("K6")}
    known = {
        "FR": "Europe",
        "JP": "Asia",
        "KE": "Africa",
        "PE": "America",
        "FJ": "Oceania",
        "DE": "Europe",
        "IN": "Asia",
    }
    assert all(continents.get(code, place) == place for code, place in known.items())
    layouts = {code_of(library.picture(e.images[0].path)): e.answer for e in examples("K4")}
    known = {"FR": "vertical", "DE": "horizontal", "SE": "cross", "JP": "other", "IT": "vertical", "BR": "other"}
    assert all(layouts.get(code, layout) == layout for code, layout in known.items())


def test_u4_the_higher_card_wins_by_three(examples, library):
    ranks = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for example in examples("U4"):
        first, second = (ranks.index(library.picture(view.path).caption.split()[0]) for view in example.images)
        assert (first - second >= 3) if example.answer == "first" else (second - first >= 3)


def test_u1_and_u2_show_the_kind_as_a_shape_or_in_lines(examples, library):
    for example in examples("U1"):
        assert library.picture(example.images[0].path).kind == example.answer
        assert _last(example) == Silhouette((0, 0, 0))
    for example in examples("U2"):
        drawing = library.picture(example.images[0].path)
        assert (drawing.domain, drawing.kind) == ("line", f"{example.answer} in lines")


def test_u3_the_card_has_the_suit(examples, library):
    for example in examples("U3"):
        assert library.picture(example.images[0].path).concept.split()[:2] == ["card", example.answer]


def test_u5_upper_before_lower_is_in_order(examples):
    for example in examples("U5"):
        one, two = example.images
        assert (one.path, one.edits[:-1]) == (two.path, two.edits[:-1])
        halves = [(0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)]
        shown = [one.edits[-1].box, two.edits[-1].box]
        assert shown == (halves if example.answer == "ordered" else halves[::-1])


def test_u6_only_the_right_piece_is_of_the_picture_with_the_hole(examples):
    for example in examples("U6"):
        whole, *pieces = example.images
        hole = _first(whole, Cover).box
        assert [piece.path == whole.path for piece in pieces] == [
            choice == example.answer for choice in example.choices
        ]
        assert all(_first(piece, Crop).box == hole for piece in pieces)
