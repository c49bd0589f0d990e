"""What a generated text names, on the cases where substrings and stray capitals go wrong."""

import pytest

from lightning_pfl.metrics.answers import named_choice, token_f1


@pytest.mark.parametrize(
    ("text", "choices", "index"),
    [
        ("red", ["red", "red circle"], 0),
        ("Red circle.", ["red", "red circle"], 1),
        ("It shows a red circle", ["red", "red circle"], 1),  # the shorter one lies inside
        ("not sure", ["no", "not sure"], 1),  # no substring of a word counts
        ("nothing", ["no", "yes"], None),
        ("The answer is: Yes!", ["yes", "no"], 0),
        ("Yes, there is no doubt", ["yes", "no"], 0),  # the first clause is a choice
        ("red or blue", ["red", "blue"], None),
        ("blue blue blue", ["red", "blue"], 1),
        ("", ["red", "blue"], None),
        ("dark_blue", ["dark blue", "blue"], 0),
        ("(b)", ["dog", "cat"], 1),
        ("B: a cat", ["dog", "cat", "cow"], 1),
        ("A dog", ["cat", "dog"], 1),  # an article is no letter
        ("A big surprise", ["cat", "dog"], None),
        ("C.", ["dog", "cat"], None),  # no third choice
        ("A dog, so B", ["A", "B"], 1),
        ("a", ["A", "B"], 0),
        ("A or B.", ["A", "B"], 1),  # only the one that stands before a mark or the end
        ("I think so", ["A", "I"], None),
        ("Image 2", ["Image 1", "Image 2"], 1),
        ("yes", ["Positive", "Negative"], 0),
        ("Negative", ["Positive", "Negative"], 1),
        ("yes", ["true", "false"], None),
        ("12", ["1", "2", "12"], 2),
        ("-5", ["5", "-5"], 1),
        ("at 3:30", ["3", "3:30"], 1),
        ("+", ["+", "-"], 0),
        ("ça va", ["ça", "va bien"], 0),
    ],
)
def test_a_text_names_the_choice_that_a_reader_would_see(text, choices, index):
    assert named_choice(text, choices) == index


def test_choices_that_no_text_can_tell_apart_are_refused():
    with pytest.raises(ValueError, match="'red' and 'Red!' do not"):
        named_choice("red", ["red", "Red!"])
    with pytest.raises(ValueError, match="choice 1 of"):
        named_choice("red", ["red", " "])


@pytest.mark.parametrize(
    ("prediction", "target", "score"),
    [
        ("a red hat", "The red hat!", 1.0),
        ("red hat", "hat", 2 / 3),  # precision 1/2, recall 1
        ("cat cat", "cat", 2 / 3),  # bags, not sets
        ("7", "8", 0.0),
        ("<s> 8 </s>", "8", 1.0),
        ("", "8", 0.0),
        ("", "", 1.0),
        ("A", "a", 1.0),
        ("A", "the", 0.0),  # an article that is the whole answer stays
        ("3:30", "330", 0.0),
        ("1.5 m", "1.5 cm", 0.5),
    ],
)
def test_overlap_of_words(prediction, target, score):
    assert token_f1(prediction, target, special_tokens=["<s>", "</s>"]) == pytest.approx(score)


def test_special_tokens_alone_never_score():
    """A wrong one-token answer behind the same beginning-of-text token: the reference gives .5."""
    assert token_f1("<s>7", "<s>8", special_tokens=["<s>"]) == 0.0
