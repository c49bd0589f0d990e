"""A federation from the command line and from YAML, through LightningCLI."""

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("jsonargparse")

SCRIPT = """
    import sys
    from lightning.pytorch.cli import LightningCLI
    from tests.federation.tiny import ClientsOwnData, Tiny

    if __name__ == "__main__":
        cli = LightningCLI(Tiny, ClientsOwnData, save_config_kwargs={"overwrite": True})
        print("ROUNDS", cli.trainer.current_epoch, cli.trainer.strategy.num_clients, cli.trainer.strategy.store.ids())
"""

CONFIG = """
    trainer:
      max_epochs: 2
      accelerator: cpu
      enable_progress_bar: false
      default_root_dir: {folder}
      strategy:
        class_path: lightning_pfl.federation.FederatedStrategy
        init_args:
          clients:
            - class_path: lightning_pfl.federation.Client
              init_args: {{id: ward-3}}
            - class_path: lightning_pfl.federation.Client
              init_args: {{id: ward-7, num_threads: 1}}
          share: [encoder]
          aggregator: lightning_pfl.aggregation.FedAvg
          pool: lightning_pfl.federation.LocalPool
    model:
      lr: 0.02
"""


def test_lightning_cli_runs_a_federation_from_yaml(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    (tmp_path / "config.yaml").write_text(textwrap.dedent(CONFIG).format(folder=tmp_path))

    ended = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), "fit", "--config", str(tmp_path / "config.yaml")],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=200,
    )

    assert "ROUNDS 2 2 ['ward-3', 'ward-7']" in ended.stdout, ended.stdout + ended.stderr
    saved = list(tmp_path.glob("lightning_logs/version_0/config.yaml"))
    assert len(saved) == 1
    assert "ward-7" in saved[0].read_text()
