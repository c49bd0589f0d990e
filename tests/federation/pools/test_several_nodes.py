"""A cluster of several nodes on one machine, as Ray makes them for tests."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray


@pytest.mark.timeout(600)
def test_a_federation_on_several_nodes_gives_what_one_process_gives(tmp_path):
    """Code and tensor file are sent; sizes, racks and halves of a logical GPU are kept; a node that joins is used."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.federation.pools.several_nodes", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"equal"')]
    assert lines, done.stdout + done.stderr
    (result,) = map(json.loads, lines)

    assert result["equal"]
    assert result["plan"] == "7 clients, 5 at a time; how long a round takes is known after the first"
    assert "sending" in done.stderr
    assert "of tensors to other machines" in done.stderr
    assert "1 nodes have joined" in done.stderr
    seen = result["seen"]
    assert len(seen) == 2 * 7
    assert sorted(name for name, (node, _, _) in seen.items() if node == result["joined"])[0] in ("a-1", "b-1", "c-1")
    for name, (node, gpus, file) in seen.items():
        assert not file.startswith(str(tmp_path)), "the code that is gone"
        assert (node == result["gpus"]) or not name.startswith(("bound", "half"))
        assert gpus == ("0" if name.startswith("half") else "")
