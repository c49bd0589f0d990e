"""A roster is the same for all, or the run does not begin."""

import json

import pytest

from lightning_pfl.parties import Roster

KEYS = [f"ed25519:{digit * 64}" for digit in "0123"]


def test_a_roster_comes_back_as_it_was(tmp_path):
    roster = Roster("wards-1", KEYS[0], {"ward-3": KEYS[1], "ward-7": KEYS[2]}, global_branch=False)
    roster.write(str(tmp_path / "roster.json"))
    again = Roster.read(str(tmp_path / "roster.json"))
    assert (again, again.digest) == (roster, roster.digest)


def test_any_difference_shows_in_the_digest():
    digests = {
        Roster("wards-1", KEYS[0], {"ward-3": KEYS[1]}).digest,
        Roster("wards-2", KEYS[0], {"ward-3": KEYS[1]}).digest,
        Roster("wards-1", KEYS[3], {"ward-3": KEYS[1]}).digest,
        Roster("wards-1", KEYS[0], {"ward-3": KEYS[2]}).digest,
        Roster("wards-1", KEYS[0], {"ward-3": KEYS[1]}, global_branch=False).digest,
    }
    assert len(digests) == 5


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "a\\b", ".a", "a.", "a\n", "a" * 129, "../a", "ä"])
def test_names_are_fit_for_folders(name):
    with pytest.raises(ValueError, match="A roster is wrong"):
        Roster("wards-1", KEYS[0], {name: KEYS[1]})
    with pytest.raises(ValueError, match="A roster is wrong"):
        Roster(name, KEYS[0], {"a": KEYS[1]})


def test_names_that_differ_only_in_case_are_one_folder_somewhere():
    with pytest.raises(ValueError, match="`ward` and `Ward`"):
        Roster("wards-1", KEYS[0], {"ward": KEYS[1], "Ward": KEYS[2]})


def test_a_file_that_is_no_roster_says_where(tmp_path):
    path = tmp_path / "roster.json"
    document = {"format": 1, "run": "r", "server": KEYS[0], "parties": {"a": "ed25519:xyz"}, "global_branch": True}
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"roster.json` at \['parties'\]\['a'\]"):
        Roster.read(str(path))
    path.write_text('{"format": 1, "format": 1}')
    with pytest.raises(ValueError, match="occurs twice"):
        Roster.read(str(path))
