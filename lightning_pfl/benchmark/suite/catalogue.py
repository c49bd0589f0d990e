"""All tasks: forty in the published scenario's places, and six that no client trains on.

The published scenario has ten clients with four tasks each, one after another, in three groups: clients 0 to 2 compare
(A), clients 3 to 5 find concepts and figures of speech (B), clients 6 to 9 answer questions about single pictures (C).
Each task of ours takes the place of one of the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_pfl.benchmark.suite import (
    actions,
    counting,
    faces,
    flags,
    food,
    icons,
    likeness,
    phrases,
    quality,
    scenes,
    surfaces,
    unseen,
    wardrobe,
)
from lightning_pfl.benchmark.suite.named import SIMILES
from lightning_pfl.benchmark.suite.rarities import KINDS, SUITS
from lightning_pfl.benchmark.suite.recipes import TaskSpec

_YES_NO = ("yes", "no")
_POSITIVE = ("positive", "negative")
_FIRST = ("first", "second")

TASKS: tuple[TaskSpec, ...] = (
    TaskSpec(
        "A1-wear-count", "Fashion200K-0", 0, 0, "How many pieces of clothing?", counting.CLOTHES, counting.clothes
    ),
    TaskSpec("A2-edit-made", "MagicBrush-0", 0, 1, "What happened between two scenes?", scenes.EDITS, scenes.edit_made),
    TaskSpec("A3-defect-of-two", "VISION-0", 0, 2, "Is one of two surfaces damaged?", _YES_NO, surfaces.two),
    TaskSpec("A4-wear-caption", "FashionIQ-0", 0, 3, "What is shown instead of it?", wardrobe.SORTS, wardrobe.caption),
    TaskSpec("A5-spatial", "VSR-0", 1, 0, "Where is the animal?", scenes.RELATIONS, scenes.relation),
    TaskSpec("A6-defect-of-four", "VISION-1", 1, 1, "Is one of four surfaces damaged?", _YES_NO, surfaces.four),
    TaskSpec(
        "A7-wear-colour", "Fashion200K-2", 1, 2, "Which colour have most clothes?", wardrobe.HUES, wardrobe.main_colour
    ),
    TaskSpec("A8-pair-number", "NLVR2-0", 1, 3, "Which picture shows more?", _FIRST, counting.more),
    TaskSpec("A9-motion", "SEED-Bench-2-2", 2, 0, "How does the thing move or change?", scenes.MOVES, scenes.motion),
    TaskSpec(
        "A10-style", "Fashion200K-1", 2, 1, "In which style are most drawn?", tuple(likeness.STYLES), likeness.style
    ),
    TaskSpec("A11-pair-kind", "NLVR2-1", 2, 2, "Do both pictures show an animal?", _YES_NO, likeness.both_animals),
    TaskSpec("A12-transition", "CIRR-0", 2, 3, "What was done to the thing?", scenes.CHANGES, scenes.transition),
    TaskSpec("B1-photo-problem", "VizWiz-0", 3, 0, "What is wrong with the photo?", quality.PROBLEMS, quality.problem),
    TaskSpec("B2-simile-select", "IRFL-2", 3, 1, "Which picture stands for a quality?", phrases.PLACES, phrases.simile),
    TaskSpec("B3-common-action", "Bongard-HOI-1", 3, 2, "What do all three people do?", actions.VERBS, actions.common),
    TaskSpec("B4-state", "MIT-States-0", 3, 3, "In which state is the thing?", scenes.STATES, scenes.state),
    TaskSpec("B5-idiom-select", "IRFL-1", 4, 0, "Which picture ends an idiom?", phrases.PLACES, phrases.idiom),
    TaskSpec(
        "B6-common-concept",
        "Bongard-OpenWorld-1",
        4,
        1,
        "What have three in common?",
        likeness.CONCEPTS,
        likeness.common,
    ),
    TaskSpec("B7-dialogue", "COMICS_Dialogue-0", 4, 2, "What does this face say?", faces.MOODS, faces.line),
    TaskSpec("B8-simile-true", "IRFL-0", 4, 3, "Does the picture stand for a quality?", _YES_NO, phrases.stands_for),
    TaskSpec("B9-action-all", "Bongard-HOI-2", 5, 0, "Do all three do it?", _YES_NO, actions.all_do),
    TaskSpec(
        "B10-concept-query", "Bongard-OpenWorld-0", 5, 1, "Is the fourth of this kind?", _POSITIVE, likeness.query
    ),
    TaskSpec("B11-quality-select", "IRFL-3", 5, 2, "Which quality is pictured?", tuple(SIMILES), phrases.quality),
    TaskSpec("B12-action-query", "Bongard-HOI-0", 5, 3, "Does the fourth do the same?", _POSITIVE, actions.query),
    TaskSpec("K1-food", "WCVQA-0", 6, 0, "What sort of food is it?", food.SORTS, food.plain),
    TaskSpec("K2-count", "iconqa-2", 6, 1, "How many things?", counting.SHAPES, counting.things, open_ended=True),
    TaskSpec("K3-quality-of-two", "Co-Instruct-DB-2", 6, 2, "Which picture is better?", _FIRST, quality.better),
    TaskSpec("K4-flag-layout", "SEED-Bench-2-1", 6, 3, "How is the flag divided?", flags.LAYOUTS, flags.layout),
    TaskSpec("K5-animal-class", "TQA-0", 7, 0, "Which class of animals?", tuple(icons.CLASSES), icons.animal_class),
    TaskSpec("K6-flag-continent", "WCVQA-3", 7, 1, "Which part of the world?", flags.CONTINENTS, flags.continent),
    TaskSpec("K7-clock", "iconqa-1", 7, 2, "Which hour is it?", icons.HOURS, icons.clock),
    TaskSpec("K8-blurred", "Co-Instruct-DB-1", 7, 3, "Is the photo blurred?", _YES_NO, quality.blurred),
    TaskSpec(
        "K9-quality-what", "Co-Instruct-DB-0", 8, 0, "What is the quality problem?", quality.DEFECTS, quality.defect
    ),
    TaskSpec("K10-bar-chart", "dvqa-0", 8, 1, "Which bar is the highest?", icons.BARS, icons.highest_bar),
    TaskSpec("K11-food-hinted", "WCVQA-1", 8, 2, "What food, with a true hint?", food.SORTS, food.hinted),
    TaskSpec("K12-sum", "iconqa-3", 8, 3, "How many in both pictures?", counting.SUMS, counting.sums, open_ended=True),
    TaskSpec("K13-shape", "iconqa-0", 9, 0, "Which shape, or which colour?", icons.SHAPES_AND_TINTS, icons.shape),
    TaskSpec(
        "K14-quality-of-three",
        "Co-Instruct-DB-3",
        9,
        1,
        "Which of three is best?",
        quality.VERSIONS,
        quality.best,
    ),
    TaskSpec("K15-instance", "SEED-Bench-2-0", 9, 2, "What is in the corner?", scenes.KINDS, scenes.instance),
    TaskSpec("K16-food-misled", "WCVQA-2", 9, 3, "What food, with a wrong hint?", food.SORTS, food.misled),
)
"""The tasks of the scenario, client by client and in each client's order."""

UNSEEN: tuple[TaskSpec, ...] = (
    TaskSpec("U1-silhouette", "DreamSim-0", None, None, "What kind of black shape?", KINDS, unseen.silhouette),
    TaskSpec("U2-line-drawing", "imagecode-0", None, None, "What kind of line drawing?", KINDS, unseen.line_drawing),
    TaskSpec(
        "U3-card-suit", "Mantis_contrastive_caption-0", None, None, "Which suit?", tuple(SUITS.values()), unseen.suit
    ),
    TaskSpec(
        "U4-card-duel", "Mantis_contrastive_caption-1", None, None, "Which card is higher?", _FIRST, unseen.card_duel
    ),
    TaskSpec(
        "U5-halves",
        "RecipeQA_ImageCoherence-0",
        None,
        None,
        "In order or swapped?",
        ("ordered", "swapped"),
        unseen.halves,
    ),
    TaskSpec("U6-cloze", "RecipeQA_VisualCloze-0", None, None, "Which piece is missing?", unseen.PATCHES, unseen.cloze),
)
"""Tasks that no client trains on: the first three show new kinds of pictures, the others ask new kinds of questions."""


class UnknownTaskError(LookupError):
    """A name that no task of the suite has."""


def find_task(name: str) -> TaskSpec:
    """The task with a name such as "A1-wear-count" or "A1".

    Raises:
        UnknownTaskError: there is none; the message lists what there is.
    """
    for spec in (*TASKS, *UNSEEN):
        if name in {spec.name, spec.id}:
            return spec
    known = ", ".join(spec.id for spec in (*TASKS, *UNSEEN))
    raise UnknownTaskError(f"`name` must be a task of the suite ({known}), but is {name!r}.")


def find_tasks(names: Sequence[str]) -> tuple[TaskSpec, ...]:
    """Several tasks; a single letter stands for a whole group ("A", "B", "K" or "U"), no name for all.

    Raises:
        UnknownTaskError: see `find_task`.
    """
    everything = (*TASKS, *UNSEEN)
    if not names:
        return everything
    found: list[TaskSpec] = []
    for name in names:
        group = [spec for spec in everything if spec.id.rstrip("0123456789") == name]
        found += group or [find_task(name)]
    return tuple(dict.fromkeys(found))
