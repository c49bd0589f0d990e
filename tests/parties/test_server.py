"""A server mixes what is signed, for this round and by whom it should be, and nothing else."""

import shutil

import pytest
import torch

from lightning_pfl import (
    CheckpointMismatchError,
    FedAvg,
    FederationError,
    RejectedUpdateError,
    RelevanceAggregator,
    Uniform,
    UniformAggregator,
    UpdateGuard,
)
from lightning_pfl.cli import main
from lightning_pfl.parties import Mailbox, PartyCheckpoint, Roster, Server, apply, export, make_key
from tests.federation.tiny import Blocks
from tests.parties.wards import MODELS, Run, checkpoint_of, train_on


@pytest.fixture
def run(tmp_path):
    """Three parties that have trained and not exported yet; P is 1, 2 and 3 everywhere."""
    run = Run(tmp_path, aggregator=UniformAggregator())
    for value, (party, model) in enumerate(MODELS.items(), start=1):
        torch.save(checkpoint_of(model, values=float(value)), run.checkpoint(party))
    return run


def frozen_P(run, party):
    state = PartyCheckpoint.read(run.checkpoint(party)).content["state_dict"]
    return {value.unique().item() for name, value in state.items() if "colora_global_P" in name}


def one_round(run, *, step=None, values=(1.0, 2.0, 3.0)):
    for party, value in zip(MODELS, values, strict=True):
        if step is not None:
            train_on(run.checkpoint(party), step=step, values=value)
        run.export(party)
    outcome = run.server().round()
    for party in MODELS:
        run.apply(party)
    return outcome


def test_each_party_gets_the_mean_of_the_others(run):
    outcome = one_round(run)

    assert (outcome.round, outcome.counted, outcome.absent) == (0, ("a", "b", "c"), ())
    assert [frozen_P(run, party) for party in MODELS] == [{2.5}, {2.0}, {1.5}]


def test_any_url_will_do(tmp_path):
    """fsspec's memory file system stands for any object store."""
    run = Run(tmp_path, aggregator=UniformAggregator(), parties=("a", "c"), url="memory://box")
    for party in ("a", "c"):
        torch.save(checkpoint_of(Blocks, values=1.0), run.checkpoint(party))
        run.export(party)
    server = Server(run.roster, run.mailbox, "memory://server", run.signer("server"))
    assert server.round().counted == ("a", "c")
    assert run.apply("a").round == 0


def test_below_quorum_nothing_happens_and_the_message_says_who_is_missing(run):
    run.export("a")
    with pytest.raises(FederationError, match="`b` has sent nothing; `c` has sent nothing"):
        run.server().round()
    assert run.apply("a") is None

    outcome = run.server().round(quorum=1)
    assert (outcome.counted, outcome.absent) == (("a",), ("b", "c"))


def test_a_party_that_sent_nothing_gets_a_mixture_too_and_joins_the_next_round(run):
    run.export("a"), run.export("b")
    run.server().round(quorum=2)
    with pytest.raises(FederationError, match="gone on without"):
        run.export("c")
    assert run.apply("c").update is None
    assert frozen_P(run, "c") == {1.5}  # the mean of those that are known

    for party in MODELS:
        run.apply(party)
        train_on(run.checkpoint(party), step=9, values=4.0)
        assert run.export(party).content.round == 1
    assert run.server().round().counted == ("a", "b", "c")


def test_the_same_update_does_not_count_in_the_next_round(run):
    """A replay: the signed files of round 0 are put where those of round 1 are looked for."""
    one_round(run)
    for party in MODELS:
        folder = run.folder / "box" / party
        shutil.copytree(folder / "round-00000" / "update", folder / "round-00001" / "update")

    with pytest.raises(FederationError, match=r"must be of round `1`, but says `0`"):
        run.server().round()


def test_an_update_that_knows_not_the_last_mixture_does_not_count(run):
    """Two runs of one name: the update is signed and of the right round, but follows another server's message."""
    other = Run.__new__(Run)
    other.__dict__ |= vars(run) | {"mailbox": Mailbox(run.folder / "other", run.roster)}
    shutil.copy(run.checkpoint("a"), run.folder / "kept.ckpt")
    one_round(run)
    one_round(other_with_fresh(run, other), values=(5.0, 6.0, 7.0))
    train_on(run.checkpoint("a"), step=9, values=1.0)
    other.export("a")
    shutil.copytree(
        run.folder / "other" / "a" / "round-00001", run.folder / "box" / "a" / "round-00001", dirs_exist_ok=True
    )

    with pytest.raises(FederationError, match="has not taken in the last mixture"):
        run.server().round(quorum=1)


def other_with_fresh(run, other):
    for value, (party, model) in enumerate(MODELS.items(), start=5):
        torch.save(checkpoint_of(model, values=float(value)), run.checkpoint(party))
    other.server = lambda: Server(
        run.roster, other.mailbox, run.folder / "other-server", run.signer("server"), aggregator=UniformAggregator()
    )
    return other


def test_one_bad_message_stops_nobody_else(run):
    for party in MODELS:
        run.export(party)
    tensors = run.folder / "box" / "b" / "round-00000" / "update" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x01")

    outcome = run.server().round(quorum=2)

    assert outcome.counted == ("a", "c")
    assert "damaged or exchanged" in outcome.rejected["b"]
    assert "did not count" in run.apply("b").notes[0]


def test_the_guard_looks_at_every_update(run):
    """A diverged party: finite, but a million times what the others did. NaN does not even leave its party."""
    train_on(run.checkpoint("b"), step=4, values=1e6)
    for party in MODELS:
        run.export(party)
    outcome = run.server().round(quorum=2)
    assert "root mean square" in outcome.rejected["b"]
    run.apply("c")
    assert frozen_P(run, "c") == {1.0}

    train_on(run.checkpoint("a"), step=5, values=float("nan"))
    run.apply("a")
    train_on(run.checkpoint("a"), step=9, values=float("nan"))
    with pytest.raises(RejectedUpdateError, match="must be finite"):
        run.export("a")


def test_a_rejected_update_is_no_start_to_measure_the_next_step_from(run):
    """Sending the same absurd values again is no small step."""
    for step in (4, 8):
        train_on(run.checkpoint("b"), step=step, values=1e6)
        for party in ("a", "c"):
            train_on(run.checkpoint(party), step=step, values=float(step))
        for party in MODELS:
            run.export(party)
        assert set(run.server().round(quorum=2).rejected) == {"b"}
        for party in MODELS:
            run.apply(party)


def test_a_strict_guard_ends_the_round(run):
    run.aggregator = UniformAggregator(guard=UpdateGuard(strict=True))
    train_on(run.checkpoint("b"), step=4, values=1e6)
    for party in MODELS:
        run.export(party)
    with pytest.raises(RejectedUpdateError, match="`b`"):
        run.server().round(quorum=2)


def test_a_rejected_update_is_in_the_exit_code_of_the_command_if_the_guard_is_strict(run, capsys):
    """Else it is in what the command prints."""
    train_on(run.checkpoint("b"), step=4, values=1e6)
    for party in MODELS:
        run.export(party)
    run.roster.write(str(run.folder / "roster.json"))
    places = {"key": "server.key", "roster": "roster.json", "exchange": "box", "state": "server"}
    command = ["round", "aggregate", *(f"--{name}={run.folder / place}" for name, place in places.items())]
    command += ["--quorum=2", "--aggregator=lightning_pfl.UniformAggregator"]

    with pytest.raises(SystemExit, match=r"lightning-pfl round aggregate: These updates .*`b`"):
        main([*command, "--aggregator.guard=lightning_pfl.UpdateGuard", "--aggregator.guard.strict=true"])
    main(command)
    assert "did not count: b: " in capsys.readouterr().out


def test_a_server_that_died_before_publishing_publishes_the_same(run):
    for party in MODELS:
        run.export(party)
    run.server().round()
    files = {path.relative_to(run.folder): path.read_bytes() for path in run.folder.glob("box/*/round-00000/mixture/*")}
    assert len(files) == 9
    for party in ("b", "c"):
        shutil.rmtree(run.folder / "box" / party / "round-00000" / "mixture")

    with pytest.raises(FederationError, match="Round 1 has 0 updates"):
        run.server().round()

    assert {name: (run.folder / name).read_bytes() for name in files} == files


def test_rounds_go_on_from_the_servers_folder_alone(run):
    one_round(run)
    assert one_round(run, step=9, values=(4.0, 5.0, 6.0)).round == 1
    assert [frozen_P(run, party) for party in MODELS] == [{5.5}, {5.0}, {4.5}]


def test_a_damaged_or_foreign_server_state_is_refused(run):
    one_round(run)
    state = run.folder / "server" / "round-00001.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[:-1])
    with pytest.raises(CheckpointMismatchError, match="damaged"):
        run.server().round()
    state.write_bytes(whole)

    roster = Roster("wards-2", run.roster.server, run.roster.parties)
    server = Server(roster, Mailbox(run.folder / "box", roster), run.folder / "server", run.signer("server"))
    with pytest.raises(CheckpointMismatchError, match="of run `wards-1`"):
        server.round()


def test_the_rule_cannot_change_between_rounds(run):
    one_round(run)
    with pytest.raises(CheckpointMismatchError, match="were mixed with `UniformAggregator`"):
        run.server(aggregator=RelevanceAggregator.paper()).round(quorum=1)


def test_without_a_rule_sketches_decide(tmp_path):
    run = Run(tmp_path, parties=("a", "c"))
    for party, sketch in (("a", torch.tensor([1.0, 0.0])), ("c", torch.tensor([0.0, 1.0]))):
        torch.save(checkpoint_of(Blocks, values=1.0, sketch=sketch), run.checkpoint(party))
        assert torch.equal(run.export(party).content.sketch, sketch)
    run.server().round()
    assert torch.load(run.folder / "server" / "round-00001.pt", weights_only=True)["rule"] == "RelevanceAggregator"
    run.apply("a")
    assert PartyCheckpoint.read(run.checkpoint("a")).sketch() is None  # sent once


def test_a_roster_that_disagrees_with_the_rule_is_refused(run):
    with pytest.raises(ValueError, match="sends no frozen global adapter, but the roster says"):
        run.server(aggregator=FedAvg())


def test_parties_must_agree_on_alignment(run):
    checkpoint = torch.load(run.checkpoint("b"), weights_only=True)
    for name, value in checkpoint["state_dict"].items():
        if "colora_aligned" in name:
            value.fill_(True)
    torch.save(checkpoint, run.checkpoint("b"))
    for party in MODELS:
        run.export(party)
    with pytest.raises(FederationError, match="all or none have aligned bases"):
        run.server().round()


def test_another_architecture_in_a_later_round_is_refused(run):
    one_round(run)
    train_on(run.checkpoint("a"), step=9, values=1.0)
    checkpoint = torch.load(run.checkpoint("a"), weights_only=True)
    checkpoint["colora"]["architecture"] = "another"
    torch.save(checkpoint, run.checkpoint("a"))
    run.export("a")
    for party in ("b", "c"):
        train_on(run.checkpoint(party), step=9, values=1.0)
        run.export(party)
    assert "architecture or base model" in run.server().round(quorum=2).rejected["a"]


def test_only_the_rosters_server_can_sign_mixtures(run):
    with pytest.raises(ValueError, match=r"names .* as the server's"):
        Server(run.roster, run.mailbox, run.folder / "server", run.signer("a"))
    assert apply(run.checkpoint("a"), run.mailbox, "a") is None


def test_a_newcomer_may_get_one_mixture_for_both_branches(run):
    run.aggregator = UniformAggregator(warm_start=Uniform(include_self=True))
    run.export("a"), run.export("b")
    run.server().round(quorum=2)
    run.apply("c")
    assert frozen_P(run, "c") == {1.5}
    assert PartyCheckpoint.read(run.checkpoint("c")).shared().common.vector.max() == 1.5


def test_a_party_can_join_later(run):
    """The roster grows; those who are there go on, the new one finds its first mixture wherever the run is."""
    one_round(run)
    key = make_key(run.folder / "d.key")
    run.roster = Roster("wards-1", run.roster.server, {**run.roster.parties, "d": key})
    run.mailbox = Mailbox(run.folder / "box", run.roster)
    torch.save(checkpoint_of(Blocks, values=9.0), run.checkpoint("d"))
    for value, party in enumerate(MODELS, start=4):
        train_on(run.checkpoint(party), step=9, values=float(value))
        run.export(party)
    export(run.checkpoint("d"), run.mailbox, "d", run.signer("d"), num_examples=4)  # too early: of a round gone by
    assert run.server().round(quorum=3).absent == ("d",)

    assert run.apply("d").round == 1
    assert frozen_P(run, "d") == {5.0}
    train_on(run.checkpoint("d"), step=9, values=1.0)
    assert export(run.checkpoint("d"), run.mailbox, "d", run.signer("d"), num_examples=4).content.round == 2
    for party in MODELS:
        run.apply(party)
        train_on(run.checkpoint(party), step=12, values=2.0)
        run.export(party)
    assert run.server().round().counted == ("a", "b", "c", "d")
