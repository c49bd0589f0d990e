"""A party's checkpoint is its memory; what does not belong to it is refused."""

import os
import pickle

import pytest
import torch

from lightning_pfl import CheckpointMismatchError, CoLoRA, FederationError, UniformAggregator
from lightning_pfl.adapters import config_of, inject, load_global, load_local, shared_tensors
from lightning_pfl.adapters.saved import shared_in, with_global, with_local
from lightning_pfl.parties import Mailbox, PartyCheckpoint, RemoteServer, Roster, apply, export
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors
from tests.federation.runs import assert_equal_states
from tests.federation.tiny import Blocks, WideBlocks
from tests.parties.wards import Run, checkpoint_of, colora, train_on


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path, aggregator=UniformAggregator(), parties=("a", "b"))
    for party, model in (("a", Blocks), ("b", WideBlocks)):
        torch.save(checkpoint_of(model, values=1.0), run.checkpoint(party))
    return run


def test_a_saved_state_gives_what_the_module_gives():
    """Read and written without the module, and with it: the same tensors."""
    module = Blocks()
    inject(module, colora(global_branch=True).config)
    for index, parameter in enumerate(module.parameters()):
        torch.nn.init.constant_(parameter, index)
    config = config_of(module)
    config.global_branch = True
    from lightning_pfl.adapters import add_global_branch

    add_global_branch(module)
    shared = shared_tensors(module)
    assert_equal_states(shared_in(module.state_dict(), config).common.unpack(), shared.common.unpack())
    bound = shared_in(module.state_dict(), config).same_architecture.unpack()
    assert_equal_states(bound, shared.same_architecture.unpack())

    other = SharedTensors(
        FlatTensors.pack({name: value + 0.5 for name, value in shared.common.unpack().items()}),
        FlatTensors.pack({name: value - 0.5 for name, value in shared.same_architecture.unpack().items()}),
    )
    state = with_local(with_global(module.state_dict(), config, other), config, other)
    load_global(module, other)
    load_local(module, other)
    assert_equal_states(state, dict(module.state_dict()))


@pytest.mark.parametrize("change", [with_global, with_local])
def test_a_mixture_that_does_not_fit_is_refused_whole(change):
    checkpoint = checkpoint_of(Blocks)
    from lightning_pfl.callbacks.checkpoints import saved_config

    config = saved_config(checkpoint["colora"])
    with pytest.raises(ValueError, match="which these adapters do not have"):
        change(checkpoint["state_dict"], config, SharedTensors(FlatTensors.pack({"main/9/fc/P": torch.zeros(2, 2)})))
    with pytest.raises(ValueError, match="must have the shape"):
        change(checkpoint["state_dict"], config, SharedTensors(FlatTensors.pack({"main/0/fc/P": torch.zeros(3, 3)})))


def test_export_says_on_what_the_adapters_stand(run):
    base = run.export("a").base
    assert base.ranks == {"main/0/fc": 2, "main/1/fc": 2}
    assert base.aligned is False
    assert base.identity.startswith("ModuleDict-")


def test_exporting_twice_is_once_and_another_update_needs_a_word(run):
    first = (run.export("a"), run.export("a"))
    assert torch.equal(first[0].content.shared.common.vector, first[1].content.shared.common.vector)
    train_on(run.checkpoint("a"), step=5, values=2.0)
    with pytest.raises(FederationError, match=r"lies in .* already"):
        run.export("a")
    assert run.export("a", overwrite=True).content.shared.common.vector.max() == 2.0


def test_nothing_new_is_not_exported(run):
    run.export("a"), run.export("b")
    run.server().round()
    run.apply("a")
    with pytest.raises(FederationError, match="trained nothing since round 0"):
        run.export("a")
    assert run.apply("a") is None


def test_apply_leaves_everything_else_alone(run):
    run.export("a"), run.export("b")
    run.server().round()
    before = torch.load(run.checkpoint("a"), weights_only=True)
    run.apply("a", output=run.folder / "a-next.ckpt")
    assert_equal_states(torch.load(run.checkpoint("a"), weights_only=True), before)
    after = torch.load(run.folder / "a-next.ckpt", weights_only=True)
    changed = {
        name for name in before["state_dict"] if not torch.equal(before["state_dict"][name], after["state_dict"][name])
    }
    assert changed == {f"blocks.{block}.fc.colora_global_P.default" for block in (0, 1)}
    assert {name for name in before if name != "callbacks" and name != "state_dict"} <= after.keys()


def test_adapters_trained_alone_are_told_from_the_start(run):
    torch.save(checkpoint_of(Blocks, global_branch=False), run.checkpoint("a"))
    with pytest.raises(ValueError, match=r"CoLoRA\(..., global_branch=True\)"):
        run.export("a")
    run.export("b")
    run.server().round(quorum=1)
    with pytest.raises(ValueError, match=r"CoLoRA\(..., global_branch=True\)"):
        run.apply("a")


def test_a_checkpoint_of_another_party_or_run_is_refused(run):
    run.export("a"), run.export("b")
    run.server().round()
    run.apply("a")
    with pytest.raises(CheckpointMismatchError, match="is of party `a`"):
        apply(run.checkpoint("a"), run.mailbox, "b")
    roster = Roster("wards-2", run.roster.server, run.roster.parties)
    with pytest.raises(CheckpointMismatchError, match="is of run `wards-1`"):
        apply(run.checkpoint("a"), Mailbox(run.folder / "box", roster), "a")


def test_another_roster_does_not_begin(run):
    """Same names and keys, but one party more: what was signed under the one does not follow from the other."""
    run.export("a"), run.export("b")
    roster = Roster("wards-1", run.roster.server, {**run.roster.parties, "c": run.roster.server})
    mine, run.roster = run.roster, roster
    with pytest.raises(FederationError, match="or has another roster"):
        run.server(mailbox=Mailbox(run.folder / "box", roster)).round(quorum=1)
    run.roster = mine


def test_a_key_of_somebody_else_is_told_before_anything_is_sent(run):
    with pytest.raises(ValueError, match="knows `a` by"):
        export(run.checkpoint("a"), run.mailbox, "a", run.signer("b"), num_examples=1)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_would_run_code_does_not(run, tmp_path):
    """The pickle makes a folder if anybody loads it as a pickle."""
    trap = str(tmp_path / "trap")
    torch.save({**checkpoint_of(Blocks), "hyper_parameters": Touch(trap)}, run.checkpoint("a"))
    for act in (run.export, run.apply):
        with pytest.raises(ValueError, match="would run code"):
            act("a")
    run.checkpoint("a").write_bytes(pickle.dumps(Touch(trap)))
    with pytest.raises(ValueError, match=r"would run code|cannot be read"):
        run.export("a")
    assert not os.path.exists(trap)


def test_a_checkpoint_without_adapters_is_refused(run):
    torch.save({"state_dict": {}}, run.checkpoint("a"))
    with pytest.raises(ValueError, match="says of no Co-LoRA adapters"):
        run.export("a")
    run.checkpoint("a").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be"):
        run.export("a")


def test_a_federation_without_a_global_branch_refuses_the_partys_argument():
    with pytest.raises(ValueError, match="but the aggregator of this federation sends none"):
        CoLoRA(rank=2, num_blocks=2, global_branch=True).prepare_server(Blocks(), global_branch=False)


def test_a_remote_server_speaks_for_one_party(run):
    remote = RemoteServer(run.mailbox, "a", run.signer("a"), timeout=0)
    update = ClientUpdate("b", 0, 1, "tiny", SharedTensors())
    with pytest.raises(ValueError, match=r"Client\('a'\)"):
        remote.aggregate([update], {})
    with pytest.raises(ValueError, match="knows `b` by"):
        RemoteServer(run.mailbox, "b", run.signer("a"))
    with pytest.raises(ValueError, match="`poll` must be positive"):
        RemoteServer(run.mailbox, "a", run.signer("a"), poll=0)


def test_a_remote_server_that_the_others_did_not_wait_for_goes_on(run):
    """Round 0 was mixed without `a`; its update counts in round 1, and it says so."""
    run.export("b")
    run.server().round(quorum=1)
    run.apply("b")
    train_on(run.checkpoint("b"), step=9, values=3.0)
    run.export("b")
    remote = RemoteServer(run.mailbox, "a", run.signer("a"), timeout=0)
    shared = PartyCheckpoint.read(run.checkpoint("a")).shared()
    update = ClientUpdate("a", 0, 12, "tiny", shared)
    with pytest.raises(FederationError, match="not mixed round 1"):
        remote.aggregate([update], {})
    run.server().round()

    answer = remote.aggregate([update], {})

    assert answer.state["round"] == 2
    assert answer.personalized["a"].frozen.common.vector.max() == 3.0
