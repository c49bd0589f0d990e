"""Which cluster a program joins that names none."""

import socket
import subprocess
import sys
import textwrap

import pytest

from lightning_pfl.federation.pools import cluster

pytestmark = pytest.mark.ray


def closed_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_cluster_is_dead_if_its_file_names_an_address_where_nobody_answers(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not cluster._last_cluster_is_dead(str(tmp_path))  # no file

    file = tmp_path / "ray_current_cluster"
    file.write_text(f"127.0.0.1:{closed_port()}")
    assert cluster._last_cluster_is_dead(str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:
        file.write_text(f"127.0.0.1:{server.getsockname()[1]}")
        assert not cluster._last_cluster_is_dead(str(tmp_path))
    file.write_text("no address")
    assert not cluster._last_cluster_is_dead(str(tmp_path))

    file.write_text(f"127.0.0.1:{closed_port()}")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # the user's word counts
    assert not cluster._last_cluster_is_dead(str(tmp_path))


def test_ray_starts_at_once_though_the_last_cluster_of_the_machine_was_killed(tmp_path_factory):
    """Ray alone would try the dead address for minutes."""
    folder = tmp_path_factory.mktemp("r")
    (folder / "ray_current_cluster").write_text(f"127.0.0.1:{closed_port()}")
    program = textwrap.dedent(
        f"""
        from lightning_pfl.federation.pools import cluster

        cluster.connect({{"num_cpus": 1, "include_dashboard": False, "_temp_dir": {str(folder)!r}}})
        print(len(cluster.nodes()))
        cluster.disconnect()
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == "1", done.stderr
