"""Bad input by the thousand: an accepted value or a clear error of ours; no hang, no traceback from inside a library.

500 cases of each kind in CI, always the same ones; `make fuzz` runs 10,000 that are new every time. See `mutations`.
"""

import io
import json
import math
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from safetensors.torch import save

from lightning_pfl import CoLoRA, FederatedStrategy, load_from_checkpoint
from lightning_pfl.adapters import CoLoraConfig, export_adapter, inject, load_adapter
from lightning_pfl.adapters.aligned import Alignment, LayerFit
from lightning_pfl.adapters.fidelity import Errors
from lightning_pfl.adapters.saved_config import config_from
from lightning_pfl.adapters.tensors import bases_of
from lightning_pfl.benchmark.archives import unpack as unpack_archive
from lightning_pfl.benchmark.rcc import read_rcc
from lightning_pfl.benchmark.records import read_records
from lightning_pfl.benchmark.scenarios import read_scenario, write_scenario
from lightning_pfl.federation.letters import layouts_of, read_shared, read_sketch, write_shared, write_sketch
from lightning_pfl.federation.state_bytes import pack, unpack
from lightning_pfl.functional.wire import Bfloat16, Int8, LargestChanges
from lightning_pfl.parties import Mailbox, PartyCheckpoint, Roster, Signer, Update, make_key
from lightning_pfl.parties.mailbox import Sealed
from lightning_pfl.parties.messages import Mixture
from lightning_pfl.types import ClientUpdate, FlatTensors, Letter, Personalized, SharedTensors
from tests.adapters.tiny import mlp
from tests.benchmark.conftest import _ar_member, _tar
from tests.benchmark.test_rcc import _rcc
from tests.federation.tiny import Blocks
from tests.fuzz.mutations import blobs, documents, fuzz, judged, little_memory
from tests.parties.wards import checkpoint_of

HERE = Path(tempfile.mkdtemp(prefix="lightning-pfl-fuzz-"))


@pytest.fixture(scope="module", autouse=True)
def _clean():
    with little_memory():
        yield
    shutil.rmtree(HERE, ignore_errors=True)


def as_json(document):
    return json.dumps(document).encode()


# -- manifests and rosters -------------------------------------------------------------------------------------------


def _run():
    keys = {name: make_key(HERE / f"{name}.key") for name in ("server", "a")}
    return Roster("wards-1", keys["server"], {"a": keys["a"]})


ROSTER = _run()
SHARED = SharedTensors(FlatTensors.pack({"main/0/fc/P": torch.eye(2)}), FlatTensors.pack({"x.A": torch.ones(1, 2)}))
UPDATE = Update("wards-1", ROSTER.digest, ClientUpdate("a", 0, 12, "tiny", SHARED, torch.ones(3)))
MIXTURE = Mixture("wards-1", "a", 0, ROSTER.digest, None, Personalized(SHARED, SHARED))
SEALED = {
    "update": Sealed.of(UPDATE, Signer(HERE / "a.key")),
    "mixture": Sealed.of(MIXTURE, Signer(HERE / "server.key")),
}
SIGNERS = {"update": Signer(HERE / "a.key"), "mixture": Signer(HERE / "server.key")}


def receive(kind, manifest, tensors):
    """Put a message there, signed, and read it."""
    box = Mailbox("memory://fuzz", ROSTER)
    box.write(Sealed(manifest, SIGNERS[kind].sign(manifest), tensors), kind, "a", 0)
    letter = getattr(box, kind)("a", 0)
    return getattr(box, f"read_{kind}")(letter)


@pytest.mark.parametrize("kind", ["update", "mixture"])
@fuzz(0.2)
@given(document=documents([json.loads(sealed.manifest) for sealed in SEALED.values()]))
def test_signed_manifests(kind, document):
    judged(lambda: receive(kind, as_json(document), SEALED[kind].tensors))


@fuzz(0.2)
@given(text=blobs([sealed.manifest for sealed in SEALED.values()]))
def test_manifests_as_bytes(text):
    judged(lambda: receive("update", text, SEALED["update"].tensors))


@fuzz(0.3)
@given(tensors=blobs([sealed.tensors for sealed in SEALED.values()]))
def test_signed_tensors(tensors):
    """Whoever signs may still write nonsense."""
    manifest, _ = UPDATE.to_files()
    judged(lambda: Update.of(manifest, tensors, "x"))
    manifest, _ = MIXTURE.to_files()
    judged(lambda: Mixture.of(manifest, tensors, "x"))


@fuzz(0.1)
@given(document=documents([json.loads(json.dumps(ROSTER._document()))]))
def test_rosters(document):
    (HERE / "roster.json").write_bytes(as_json(document))
    judged(lambda: Roster.read(str(HERE / "roster.json")))


# -- adapter folders -------------------------------------------------------------------------------------------------


def _folder():
    model = mlp()
    inject(model, CoLoraConfig(r=2, num_blocks=1))
    export_adapter(model, HERE / "adapter", client="a", round=1)
    return {path.name: path.read_bytes() for path in (HERE / "adapter").iterdir()}


FOLDER = _folder()


def load_folder(changed):
    files = {**FOLDER, **changed}
    if "adapter_manifest.json" not in changed:  # damage that the digests do not tell
        import hashlib

        manifest = json.loads(files["adapter_manifest.json"])
        manifest["files"] = {name: hashlib.sha256(files[name]).hexdigest() for name in manifest["files"]}
        files["adapter_manifest.json"] = as_json(manifest)
    for name, content in files.items():
        (HERE / "adapter" / name).write_bytes(content)
    return load_adapter(mlp(), HERE / "adapter")


@fuzz(0.4)
@given(document=documents([json.loads(FOLDER["adapter_config.json"])]))
def test_adapter_configs(document):
    judged(lambda: load_folder({"adapter_config.json": as_json(document)}))


@fuzz(0.3)
@given(document=documents([json.loads(FOLDER["adapter_manifest.json"])]))
def test_adapter_manifests(document):
    judged(lambda: load_folder({"adapter_manifest.json": as_json(document)}))


@fuzz(0.3)
@given(content=blobs([FOLDER["adapter_model.safetensors"]]))
def test_adapter_tensors(content):
    judged(lambda: load_folder({"adapter_model.safetensors": content}))


# -- alignment folders -----------------------------------------------------------------------------------------------


def _adapted():
    module = mlp()
    inject(module, CoLoraConfig(r=2, num_blocks=1, base_identity="small"))
    return module


ALIGNED = _adapted()


def _alignment():
    bases = {"small": bases_of(ALIGNED), "big": {"vision/1/q": (torch.ones(2, 7), torch.ones(5, 2))}}
    fit = LayerFit("big", "vision/1/q", 90, Errors(2.0, 1.0, 1.5, 0.0), Errors(0.25, 0.5, math.inf, 0.875))
    Alignment("small", bases, (fit,), {"big": ["main/0/k"]}).save(HERE / "alignment")
    return {path.name: path.read_bytes() for path in (HERE / "alignment").glob("alignment.*")}


ALIGNMENT = _alignment()


def load_alignment(changed):
    for name, content in {**ALIGNMENT, **changed}.items():
        (HERE / "alignment" / name).write_bytes(content)
    loaded = Alignment.load(HERE / "alignment")
    loaded.table()
    loaded.apply(ALIGNED)
    return loaded


@fuzz(0.6)
@given(document=documents([json.loads(ALIGNMENT["alignment.json"])]))
def test_alignments(document):
    judged(lambda: load_alignment({"alignment.json": as_json(document)}))


@fuzz(0.1)
@given(content=blobs([ALIGNMENT["alignment.json"]]))
def test_alignments_as_bytes(content):
    judged(lambda: load_alignment({"alignment.json": content}))


@fuzz(0.3)
@given(content=blobs([ALIGNMENT["alignment.safetensors"]]))
def test_aligned_bases(content):
    judged(lambda: load_alignment({"alignment.safetensors": content}))


# -- checkpoints and wire messages -----------------------------------------------------------------------------------

CHECKPOINT = checkpoint_of(Blocks, sketch=torch.ones(3))
PLAIN = {name: value for name, value in CHECKPOINT.items() if name != "state_dict"}


def saved(checkpoint):
    stream = io.BytesIO()
    torch.save(checkpoint, stream)
    return stream.getvalue()


FILE = saved(CHECKPOINT)


def as_party(path):
    read = PartyCheckpoint.read(path)
    return read.place(ROSTER, "a"), read.shared(), read.sketch(), read.base, read.architecture, read.step


def without_tensors(document):
    """What a document can hold, and back."""
    return {name: value for name, value in document.items() if not isinstance(value, torch.Tensor)}


ABOUT = json.loads(json.dumps(PLAIN, default=lambda value: None))


@fuzz(0.5)
@given(document=documents([ABOUT]))
def test_what_checkpoints_say(document):
    """Everything but the tensors themselves, in a file that torch itself accepts."""
    content = document if not isinstance(document, dict) else {"state_dict": CHECKPOINT["state_dict"], **document}
    path = HERE / "x.ckpt"
    path.write_bytes(saved(content))
    judged(lambda: as_party(path))
    judged(lambda: load_from_checkpoint(Blocks, path))


@fuzz(0.2)
@given(content=blobs([FILE]))
def test_checkpoints_as_bytes(content):
    path = HERE / "x.ckpt"
    path.write_bytes(content)
    judged(lambda: as_party(path))


STATE = pack({"epoch": 1, "weights": torch.ones(3), "states": [{"step": torch.tensor(2.0), "lr": 0.1, "nan": None}]})


@fuzz()
@given(content=blobs([STATE]))
def test_client_states(content):
    judged(lambda: unpack(content))


# -- what travels in a wire format -----------------------------------------------------------------------------------

CHANGES = LargestChanges(0.5, values=Int8(block=2))
LETTERS = [
    write_shared(SHARED, CHANGES, known=()).common,
    write_shared(SHARED, CHANGES, known=layouts_of(SHARED)).common,
    write_shared(SHARED, CHANGES, known=(), copy=SHARED).common,
]


@fuzz(0.8)
@given(content=blobs(LETTERS))
def test_letters(content):
    shared = judged(lambda: read_shared(Letter(content), CHANGES, layouts=layouts_of(SHARED), copy=SHARED))
    assert shared is None or len(content) >= shared.common.layout.numel / 2


@fuzz(0.2)
@given(content=blobs([write_sketch(torch.ones(300), Bfloat16())]))
def test_sketches(content):
    judged(lambda: read_sketch(content, Bfloat16()))


# -- configs and records ---------------------------------------------------------------------------------------------


@fuzz(0.3)
@given(document=documents([CoLoraConfig(r=2, num_blocks=1).to_dict()]))
def test_configs_in_checkpoints(document):
    judged(lambda: config_from(document, "x"))


def _parser():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=FederatedStrategy)
    parser.add_argument("--callback", type=CoLoRA)
    return parser


PARSER = _parser()
YAML = {
    "strategy": {
        "class_path": "lightning_pfl.FederatedStrategy",
        "init_args": {
            "clients": [{"class_path": "lightning_pfl.Client", "init_args": {"id": "ward-3", "num_gpus": 0.5}}],
            "share": ["encoder"],
            "fraction": 0.5,
            "local_epochs": 2,
            "pool": {"class_path": "lightning_pfl.LocalPool"},
            "aggregator": {"class_path": "lightning_pfl.RelevanceAggregator", "init_args": {"ema": 0.5}},
        },
    },
    "callback": {"class_path": "lightning_pfl.CoLoRA", "init_args": {"rank": 4, "alpha": 8.0, "train_also": ["head"]}},
}


@fuzz()
@given(document=documents([YAML]))
def test_config_files(document):
    """What LightningCLI does with a file: jsonargparse's errors are shown as a message, so they count as answers."""
    text = yaml.safe_dump(document, allow_unicode=True)

    def act():
        return PARSER.instantiate(PARSER.parse_string(text))

    judged(act, libraries=("jsonargparse", "argparse.py"))


SCENARIO = [
    {
        "client_id": 0,
        "model_id": "org/small",
        "datasets": [
            {"dataset": "iconqa", "subset_id": 2, "type": "open-ended", "metric": "F1"},
            {"dataset": "dummy", "subset_id": 0, "type": ""},
        ],
    },
    {"client_id": 3, "model_id": "/models/big", "datasets": [{"dataset": "pvqa", "subset_id": 0}]},
]


def read_and_use_scenario(text):
    (HERE / "scenario.json").write_bytes(text)
    scenario = read_scenario(HERE / "scenario.json")
    assert scenario.models.keys() == scenario.tasks.keys()
    write_scenario(scenario, HERE / "again.json")
    assert read_scenario(HERE / "again.json") == scenario


@fuzz(0.8)
@given(document=documents([SCENARIO]))
def test_scenarios(document):
    judged(lambda: read_and_use_scenario(as_json(document)))


@fuzz(0.2)
@given(content=blobs([as_json(SCENARIO), b"[" * 100_000, b"[" + b"9" * 5000 + b"]"]))
def test_scenarios_as_bytes(content):
    judged(lambda: read_and_use_scenario(content))


RECORD = {
    "id": "x",
    "image": [],
    "conversations": [
        {"from": "human", "value": "Which? Choice list: [a, b]"},
        {"from": "gpt", "value": "a"},
    ],
}


def read_and_count(text):
    path = HERE / "data" / "set" / "train" / "dataset-0.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return len(read_records(path))


@fuzz(0.8)
@given(document=documents([[RECORD, RECORD]]))
def test_records(document):
    judged(lambda: read_and_count(as_json(document)))


@fuzz(0.2)
@given(content=blobs([as_json([RECORD]), b"[" * 100_000, b"[" + b"9" * 5000 + b"]"]))
def test_records_as_bytes(content):
    judged(lambda: read_and_count(content))


# -- archives --------------------------------------------------------------------------------------------------------

DEB = (
    b"!<arch>\n"
    + _ar_member("debian-binary", b"2.0\n")
    + _ar_member("data.tar.xz", _tar({"./a": b"1", "./b/c": b"22"}, mode="w:xz"))
)


def _zip():
    import zipfile

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"1" * 100)
        archive.writestr("b/c", b"2")
    return stream.getvalue()


ARCHIVES = {"x.deb": DEB, "x.tgz": _tar({"a": b"1", "b/c": b"2"}, mode="w:gz"), "x.tar": _tar({"a": b"1"}, mode="w")}
ARCHIVES["x.whl"] = _zip()


@pytest.mark.parametrize("name", list(ARCHIVES))
@fuzz(0.2)
@given(content=blobs(list(ARCHIVES.values())))
def test_archives(name, content):
    (HERE / name).write_bytes(content)
    inside = HERE / "inside"
    shutil.rmtree(inside, ignore_errors=True)
    before = {path for path in HERE.rglob("*") if inside not in path.parents}
    judged(lambda: unpack_archive(HERE / name, inside / "out"))
    assert {path for path in HERE.rglob("*") if inside not in path.parents} - {inside} == before
    assert not inside.exists() or {path.name for path in inside.iterdir()} <= {"out"}


@fuzz(0.2)
@given(content=blobs([_rcc(1), _rcc(2)]))
def test_resource_files(content):
    (HERE / "x.rcc").write_bytes(content)
    judged(lambda: list(read_rcc(HERE / "x.rcc")))


def test_tensors_of_a_dtype_that_is_not_shared_are_refused():
    """The last resort of `_loaded`, which a mutation meets too seldom."""
    judged(lambda: Update.of(UPDATE.to_files()[0], save({"common/P": torch.ones(2, dtype=torch.int8)}), "x"))
