"""Broken inputs, made of good ones: values exchanged in a document, bytes exchanged in a file.

What every case must satisfy stands in `judged`: an accepted value, or an error that our own code raised on purpose.
"""

import copy
import os
import resource
import traceback
from argparse import ArgumentError
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import lightning_pfl
from lightning_pfl import FederationError

CASES = int(os.environ.get("LIGHTNING_PFL_FUZZ", "500"))
"""How many cases each kind of input gets, all its targets together; `make fuzz` asks for more."""

SEEN: dict[str, Counter[str]] = defaultdict(Counter)
"""By test, how many cases were accepted and how many refused so far."""

_OURS = str(Path(lightning_pfl.__file__).parent)


def fuzz(share=1.0):
    """Settings of a target that gets this share of its kind's cases."""
    return settings(
        max_examples=max(1, round(CASES * share)),
        derandomize=CASES <= 500,  # CI is the same every time, `make fuzz` is not
        database=None,
        deadline=20_000,  # milliseconds per case, on the slowest of machines: a hang is a failure
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # cases are small already, and shrinking them takes longer than finding them
        report_multiple_bugs=False,
    )


_KEYS = st.sampled_from(["", "a", "class_path", "__class__", "../x", "r", "0", "\x00", "é", "x" * 300])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 0.5, -0.0, 1e308, 1e-320])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["os.system", "main/0/fc", "../../etc/passwd", "(a+)+$", "ed25519:" + "0" * 64, "f" * 64, "a\n"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=6,
)


def places(document, path=()):
    """Every place in a document."""
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def documents(draw, good):
    """One of the good documents with up to three of its values exchanged, removed or added to."""
    document = copy.deepcopy(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(document))))
        how = draw(st.sampled_from(["exchange", "exchange", "remove", "add"]))
        value = draw(VALUES)
        if not path:
            if how == "exchange" and draw(st.integers(0, 9)) == 0:
                return value
            if isinstance(document, dict):
                document[draw(_KEYS)] = value
            continue
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        if how == "exchange":
            parent[path[-1]] = value
        elif how == "remove":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[draw(_KEYS)] = value
        else:
            parent.append(value)
    return document


@st.composite
def blobs(draw, good):
    """One of the good files, cut, with bytes exchanged, put in or taken out; now and then no file at all."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=200))
    content = bytearray(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        at = draw(st.integers(0, len(content) - 1))
        if draw(st.booleans()):  # most of what decides lies at the ends
            at = min(at % 512, len(content) - 1) if draw(st.booleans()) else max(0, len(content) - 1 - at % 128)
        how = draw(st.sampled_from(["exchange", "cut", "put in", "take out", "number"]))
        if how == "exchange":
            content[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del content[at:]
        elif how == "put in":
            content[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif how == "take out":
            del content[at : at + draw(st.integers(1, 16))]
        else:
            size = draw(st.sampled_from([2, 4, 8]))
            content[at : at + size] = draw(st.sampled_from([b"\x00", b"\xff", b"\x7f", b"\x80"])) * size
    return bytes(content)


def judged(act, *, libraries=()):
    """Run one case: what it gives, or None if it was refused in words of ours.

    Args:
        act: the case.
        libraries: parts of file names whose errors are answers too: of a parser that a user talks to directly.
    """
    seen = SEEN[os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0].split("[")[0]]
    try:
        value = act()
    except (ValueError, TypeError, FederationError, OSError, ArgumentError) as error:
        refusal = error
    else:
        seen["accepted"] += 1
        return value
    frames = traceback.extract_tb(refusal.__traceback__)
    trace = "".join(frames.format())
    if not any(name in frames[-1].filename for name in libraries):
        assert frames[-1].filename.startswith(_OURS), f"from inside a library: {refusal!r}\n{trace}"
        assert _raises(frames[-1]), f"an error that nobody meant: {refusal!r}\n{trace}"
    assert len(str(refusal)) > 20, f"an error that says nothing: {refusal!r}"
    seen["refused"] += 1
    return None


def _raises(frame):
    """Whether the statement at a frame is a `raise`."""
    line = Path(frame.filename).read_text(encoding="utf-8").splitlines()[frame.lineno - 1]
    return line.lstrip().startswith("raise ")


@contextmanager
def little_memory(more=3 * 2**30):
    """Make an allocation of absurd size fail at once, as it would on a machine that does not overcommit."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
