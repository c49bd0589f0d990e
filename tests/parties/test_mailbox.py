"""Whoever can write to the shared folder can withhold messages, and nothing else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save

from lightning_pfl import FederationError
from lightning_pfl.parties import Mailbox, Mixture, Signer, Update, WrongMessageError, WrongSignatureError, make_key
from lightning_pfl.parties.mailbox import Sealed
from lightning_pfl.types import ClientUpdate, FlatTensors, Personalized, SharedTensors
from tests.federation.runs import assert_equal_states
from tests.parties.wards import Run

P, A = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0]])
SHARED = SharedTensors(FlatTensors.pack({"main/0/fc/P": P}), FlatTensors.pack({"blocks.0.fc.A": A}))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, parties=("a", "b"))


def update(run, *, round=0, previous=None, party="a", sketch=None, of="wards-1"):
    content = ClientUpdate(party, round, 12, "tiny", SHARED, sketch)
    return Update(of, previous or run.roster.digest, content)


def mixture(run, *, round=0, previous=None, party="a"):
    return Mixture("wards-1", party, round, previous or run.roster.digest, None, Personalized(SHARED), ("hello",))


def post(run, message, signer, *, party="a", round=0):
    sealed = Sealed.of(message, run.signer(signer))
    run.mailbox.write(sealed, "update" if isinstance(message, Update) else "mixture", party, round)
    return sealed


def folder(run, kind="update", party="a", round=0):
    return run.folder / "box" / party / f"round-{round:05d}" / kind


def test_messages_come_back_as_they_were(run):
    post(run, update(run, sketch=torch.tensor([1.0, 2.0])), "a")
    post(run, mixture(run), "server")

    sent = run.mailbox.read_update(run.mailbox.update("a", 0)).content
    got = run.mailbox.read_mixture(run.mailbox.mixture("a", 0))

    assert_equal_states(sent.shared.common.unpack(), {"main/0/fc/P": P})
    assert_equal_states(sent.shared.same_architecture.unpack(), {"blocks.0.fc.A": A})
    assert torch.equal(sent.sketch, torch.tensor([1.0, 2.0]))
    assert (sent.client_id, sent.round, sent.num_examples, sent.architecture) == ("a", 0, 12, "tiny")
    assert_equal_states(got.content.frozen.common.unpack(), {"main/0/fc/P": P})
    assert got.content.start is None
    assert (got.run, got.party, got.round, got.notes) == ("wards-1", "a", 0, ("hello",))


def test_an_empty_part_is_not_a_missing_part(run):
    nothing = Personalized(start=SharedTensors())
    post(run, Mixture("wards-1", "a", 0, run.roster.digest, None, nothing), "server")
    got = run.mailbox.read_mixture(run.mailbox.mixture("a", 0)).content
    assert got.frozen is None
    assert got.start.nbytes == 0


def test_what_has_not_come_is_none(run):
    assert run.mailbox.update("a", 0) is None
    assert run.mailbox.last_mixture("a", since=0, previous=run.roster.digest) is None
    with pytest.raises(ValueError, match=r"knows no party `\.\./b`"):
        run.mailbox.update("../b", 0)


def test_a_changed_manifest_is_refused(run):
    post(run, update(run), "a")
    path = folder(run) / "manifest.json"
    path.write_text(path.read_text().replace('"num_examples": 12', '"num_examples": 99'))
    with pytest.raises(WrongSignatureError, match="must be signed by `a`"):
        run.mailbox.update("a", 0)


@pytest.mark.parametrize("signature", [None, b"", b"not base64!", b"AAAA\n"])
def test_a_manifest_without_a_good_signature_is_refused(run, signature):
    post(run, update(run), "a")
    path = folder(run) / "manifest.sig"
    path.unlink() if signature is None else path.write_bytes(signature)
    with pytest.raises(FederationError, match=r"signature|signed"):
        run.mailbox.update("a", 0)


def test_another_partys_key_does_not_count(run):
    post(run, update(run), "b")
    with pytest.raises(WrongSignatureError, match="must be signed by `a`"):
        run.mailbox.update("a", 0)


def test_a_party_cannot_speak_as_the_server(run):
    post(run, mixture(run), "a")
    with pytest.raises(WrongSignatureError, match="must be signed by `the server`"):
        run.mailbox.mixture("a", 0)


def test_an_update_is_no_mixture(run):
    """The server's own key is no excuse: kinds of messages are not exchanged."""
    sealed = Sealed.of(update(run), run.signer("server"))
    run.mailbox.write(sealed, "mixture", "a", 0)
    with pytest.raises(ValueError, match="A mixture's manifest is wrong"):
        run.mailbox.mixture("a", 0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"of": "wards-0"}, "of run"), ({"party": "b"}, "of party"), ({"round": 4}, "of round")],
)
def test_what_was_signed_for_another_place_is_refused(run, changes, told):
    post(run, update(run, **changes), "a")
    with pytest.raises(WrongMessageError, match=f"must be {told}"):
        run.mailbox.update("a", 0)


def test_exchanged_tensors_are_refused(run):
    post(run, update(run), "a")
    path = folder(run) / "tensors.safetensors"
    path.write_bytes(save({"common/main/0/fc/P": 9 * P, "same_architecture/blocks.0.fc.A": A}))
    letter = run.mailbox.update("a", 0)
    with pytest.raises(WrongMessageError, match="damaged or exchanged"):
        run.mailbox.read_update(letter)
    path.unlink()
    with pytest.raises(WrongMessageError, match="is not there"):
        run.mailbox.read_update(letter)


def test_tensors_that_are_too_large_are_not_read(run):
    post(run, update(run), "a")
    small = Mailbox(run.folder / "box", run.roster, max_nbytes=10)
    with pytest.raises(WrongMessageError, match="10 are the most"):
        small.read_update(small.update("a", 0))


def test_mixtures_follow_each_other(run):
    first = post(run, mixture(run), "server")
    post(run, mixture(run, round=1, previous=first.digest), "server", round=1)
    letter = run.mailbox.last_mixture("a", since=0, previous=run.roster.digest)
    assert letter.manifest["round"] == 1

    post(run, mixture(run, round=2, previous=first.digest), "server", round=2)  # leaves one out
    with pytest.raises(WrongMessageError, match="must follow"):
        run.mailbox.last_mixture("a", since=0, previous=run.roster.digest)


def test_an_older_mixture_put_in_a_newer_place_is_refused(run):
    post(run, mixture(run), "server")
    shutil.copytree(folder(run, "mixture"), folder(run, "mixture", round=1))
    with pytest.raises(WrongMessageError, match="must be of round `1`"):
        run.mailbox.last_mixture("a", since=0, previous=run.roster.digest)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"common/P": P.double()}, "must be float32"),
        ({"elsewhere/P": P}, "belong to no part"),
    ],
)
def test_signed_tensors_must_still_be_an_updates(run, tensors, told):
    """A signature says who, not that it is right."""
    manifest, _ = update(run).to_files()
    with pytest.raises(ValueError, match=told):
        Update.of(manifest, save(tensors), "x")
    with pytest.raises(ValueError, match="safetensors format"):
        Update.of(manifest, b"\xff" * 20, "x")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_examples": 0}, r"\['num_examples'\]"),
        ({"num_examples": True}, r"\['num_examples'\]"),
        ({"round": 1.5}, r"\['round'\]"),
        ({"previous": "0" * 63}, r"\['previous'\]"),
        ({"extra": 1}, "the whole document"),
        ({"party": "a\n"}, r"\['party'\]"),
    ],
)
def test_a_signed_manifest_must_still_be_one(run, change, told):
    sealed = Sealed.of(update(run), run.signer("a"))
    text = json.dumps({**json.loads(sealed.manifest), **change}).encode()
    run.mailbox.write(Sealed(text, run.signer("a").sign(text), sealed.tensors), "update", "a", 0)
    with pytest.raises(ValueError, match=told):
        run.mailbox.update("a", 0)


def test_keys_are_made_once_and_read_by_nobody_else(tmp_path):
    path = tmp_path / "ward-3.key"
    public = make_key(path)
    assert path.stat().st_mode & 0o077 == 0
    assert Signer(path).public_key == public
    with pytest.raises(FileExistsError, match="not overwritten"):
        make_key(path)


def test_a_file_that_is_no_key_is_refused(tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    (tmp_path / "x.key").write_text("nothing")
    with pytest.raises(ValueError, match="cannot be read as one"):
        Signer(tmp_path / "x.key")
    other = X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "x.key").write_bytes(other)
    with pytest.raises(ValueError, match="holds a X25519PrivateKey"):
        Signer(tmp_path / "x.key")
