"""Promises of `lightning_pfl.adapters.gates`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lightning_pfl.adapters import Additive, Combine, Convex, GatePolicy, InputGate, StaticGate


def test_convex_halves_both_branches_at_the_start_and_additive_keeps_the_local_one_whole():
    beta = StaticGate().beta(torch.tensor(0.0), None)

    assert [w.item() for w in Convex().weights(beta)] == [0.5, 0.5]
    assert [w.item() for w in Additive().weights(beta)] == [0.5, 1.0]


def test_an_input_gate_is_a_sigmoid_of_the_weighted_summary():
    summary = torch.tensor([[1.0, 2.0], [0.0, -1.0]])

    beta = InputGate().beta(torch.tensor([2.0, -1.0]), summary)

    # 1 * 2 + 2 * -1 = 0 and 0 * 2 + -1 * -1 = 1
    torch.testing.assert_close(beta, torch.tensor([0.0, 1.0]).sigmoid())


def test_a_policy_of_the_users_own_is_written_and_read_like_the_built_in_ones():
    @dataclass(frozen=True)
    class Half(Combine):
        share: float = 0.5

        def weights(self, beta):
            return self.share * beta, torch.ones_like(beta)

    written = StaticGate(combine=Half(share=0.25)).to_dict()

    assert GatePolicy.from_dict(written).combine.share == 0.25


def test_an_unknown_policy_in_a_file_is_refused_and_never_imported():
    with pytest.raises(ValueError, match=r"`os.system`, which is not among the imported ones"):
        GatePolicy.from_dict({"class": "os.system", "combine": "rm"})
    with pytest.raises(ValueError, match="Expected a gate policy"):
        GatePolicy.from_dict({"class": "lightning_pfl.adapters.gates.Convex"})
