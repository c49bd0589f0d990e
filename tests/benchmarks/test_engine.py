"""The harness of `benchmarks/engine`: what it says of process trees, lines and tables; W1 in its smallest form."""

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks.engine.__main__ import main
from benchmarks.engine.lines import Line, read
from benchmarks.engine.table import table
from benchmarks.engine.tree import Watch, cpu_seconds, descendants, pss_mib

BURN = "import time\nwhile time.process_time() < {seconds}: pass\n"
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", {burn!r}])
{then}
time.sleep(60)
"""


def python(code):
    return subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def burning():
    """A parent that sleeps beside a child that has used half a second of CPU and goes on sleeping."""
    code = BURN.format(seconds=0.5) + "print('done', flush=True)\ntime.sleep(60)\n"
    parent = python(PARENT.format(burn=code, then=""))
    assert parent.stdout.readline() == "done\n"
    yield parent
    for pid in reversed(descendants(parent.pid)):
        os.kill(pid, 9)
    parent.wait()


def test_the_cpu_time_of_a_tree_holds_that_of_children(burning):
    assert len(descendants(burning.pid)) == 2
    assert 0.45 < cpu_seconds(burning.pid) < 1.0  # the kernel counts in ticks


def test_the_memory_of_a_process_is_that_of_a_python(burning):
    assert 1 < pss_mib(burning.pid) < 50
    assert pss_mib(2**22 + 1) == 0  # no such process


def test_a_child_that_nobody_waits_for_is_counted_until_the_last_reading():
    """As Ray's workers: their parent's counters never hold their times."""
    ignoring = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nchild.wait()\nprint('over', flush=True)"
    parent = python(PARENT.format(burn=BURN.format(seconds=0.5), then=ignoring))
    with Watch(parent.pid, interval=0.05) as watch:
        assert parent.stdout.readline() == "over\n"
        lost = cpu_seconds(parent.pid)
    parent.kill()
    parent.wait()

    assert lost < 0.3
    assert watch.cpu > 0.4
    assert watch.processes == 2


def test_the_callers_own_cpu_time_is_exact():
    before = cpu_seconds(os.getpid())
    start = time.process_time()
    while time.process_time() - start < 0.004:  # less than a tick of the kernel's counters
        pass
    assert 0.003 < cpu_seconds(os.getpid()) - before < 0.5


def test_lines_come_back_as_they_were(tmp_path):
    line = Line("W1", "loop", repeat=1, cpu_total=3.5, cpu_round=0.025, results={"accuracy": 0.18})
    line.append_to(tmp_path / "new" / "lines.jsonl")
    line.append_to(tmp_path / "new" / "lines.jsonl")

    assert read((tmp_path / "new" / "lines.jsonl").read_text().splitlines()) == [line, line]


def test_a_line_that_is_no_run_is_named():
    good = Line("W1", "loop").dump()
    for bad in ("{", json.dumps({"workload": "W1", "system": "loop", "speed": 1}), json.dumps({"system": "loop"})):
        with pytest.raises(ValueError, match=r"Line 2 is no run of `benchmarks\.engine`"):
            read([good, bad])


def test_the_table_compares_medians_with_the_loop():
    lines = [
        *(Line("W1", "loop", repeat, cpu_total=3.0, cpu_round=one) for repeat, one in enumerate((0.02, 0.03, 0.10))),
        *(
            Line("W1", "LocalPool", repeat, cpu_total=9.0, cpu_round=0.13, results={"accuracy": 0.5})
            for repeat in (0, 1)
        ),
        Line("W1", "pfl", error="cannot be installed:\n no network"),
    ]

    found = table(lines)

    # by hand: 0.13 against the middle 0.03 is 4.33 times as much, and (0.13 - 0.03) / 20 clients are 5 ms
    assert "| LocalPool | 2 | 9.0 | 0.0 | 0.130 | 4.33 | 5.0 |" in found
    assert "| loop | 3 | 3.0 | 0.0 | 0.030 | 1.00 |" in found
    assert "- pfl: no result: cannot be installed: no network" in found
    assert "s to round 1" not in found, "a column that nobody fills is left out"


def test_w1_in_its_smallest_form_ends_where_the_bare_loop_ends(tmp_path, monkeypatch, capsys):
    lines = tmp_path / "lines.jsonl"
    command = ["engine", "W1-tiny", "--systems", "loop", "LocalPool", "--repeats", "1", "--lines", str(lines)]
    monkeypatch.setattr(sys, "argv", command)
    main()

    loop, local = read(lines.read_text().splitlines())
    assert not loop.error
    assert not local.error
    assert loop.results["accuracy"] == pytest.approx(local.results["accuracy"], abs=1e-4)
    for line in (loop, local):
        assert line.cpu_total >= line.cpu_imports + line.cpu_start > line.cpu_imports > 0
        assert line.cpu_round > 0
        assert line.wall_total > line.wall_start > 0
        assert line.pss_mib > 50

    monkeypatch.setattr(sys, "argv", ["engine", "--table", str(lines)])
    capsys.readouterr()
    main()
    assert capsys.readouterr().out.startswith("### W1-tiny\n\n| system | runs | CPU-s | imports |")
