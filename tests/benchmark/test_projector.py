"""A projector learns names from public pictures and keeps what they do not say."""

import pytest
import torch

from lightning_pfl.benchmark.features import FeatureStore
from lightning_pfl.benchmark.images import split_of
from lightning_pfl.benchmark.projector import Caption, load_projector, pretrain_projector, public_captions
from lightning_pfl.benchmark.tiny import PixelTokens, shape_tasks, tiny_gemma, tiny_llama, tiny_tokenizer


@pytest.fixture
def store(tmp_path):
    return FeatureStore(PixelTokens(), folder=tmp_path / "features")


@pytest.fixture
def captions(tmp_path):
    task = shape_tasks(tmp_path / "pictures", backgrounds=(255,), num_examples=48)[0]
    return [Caption(example.images[0], example.answer) for example in task.train]


def _nearest(projector, model, store, captions):
    """Share of pictures whose mean token points to their own name."""
    names = sorted({caption.name for caption in captions})
    embed = model.get_input_embeddings()
    words = torch.stack([embed(torch.tensor(tiny_tokenizer()(name)["input_ids"])).mean(0) for name in names])
    words = torch.nn.functional.normalize(words - words.mean(0), dim=1)
    tokens = projector(store.tokens([caption.view for caption in captions])).mean(1)
    found = (torch.nn.functional.normalize(tokens, dim=1) @ words.T).argmax(1)
    return sum(names[index] == caption.name for index, caption in zip(found, captions, strict=True)) / len(captions)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
def test_pictures_come_to_point_to_their_names(make, store, captions):
    model = make()

    projector = pretrain_projector(model, tiny_tokenizer(), store, captions, num_steps=120)

    assert _nearest(projector, model, store, captions) > 0.9  # chance is .25
    assert not any(parameter.requires_grad for parameter in projector.parameters())


def test_keeping_the_features_keeps_them(store, captions):
    """A linear map reads the features better from a projector that was trained with `keep` than from one without."""
    features = store.tokens([caption.view for caption in captions]).double().flatten(0, 1)
    errors = []
    for keep in (0.0, 10.0):
        projector = pretrain_projector(tiny_llama(), tiny_tokenizer(), store, captions, num_steps=200, keep=keep)
        tokens = torch.cat([projector(features).double(), torch.ones(len(features), 1)], dim=1)
        solution = torch.linalg.lstsq(tokens, features).solution
        errors.append(float((tokens @ solution - features).pow(2).mean()))

    assert errors[1] < 0.8 * errors[0]


def test_the_same_seed_gives_the_same_projector_and_leaves_the_global_generator_alone(store, captions):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)

    one, two = (pretrain_projector(tiny_llama(), tiny_tokenizer(), store, captions, num_steps=3) for _ in range(2))

    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_a_projector_is_trained_once_for_all_depths_and_read_afterwards(store, captions, monkeypatch, tmp_path):
    monkeypatch.setattr("lightning_pfl.benchmark.projector.public_captions", lambda cache: captions)
    steps = []

    def load(num_layers):
        return load_projector(
            tiny_llama(num_layers=num_layers),
            tiny_tokenizer(),
            store,
            name="some/model",
            cache=tmp_path,
            report=lambda step, loss: steps.append(step),
        )

    first, again = load(2), load(3)

    assert len(steps) == 400
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert [path.suffix for path in (tmp_path / "projectors").glob("model-*")] == [".safetensors"]


def test_no_captions_are_refused(store):
    with pytest.raises(ValueError, match="at least one picture with a name"):
        pretrain_projector(tiny_llama(), tiny_tokenizer(), store, [])


@pytest.mark.assets
def test_public_captions_are_many_and_of_no_task():
    captions = public_captions()

    assert len(captions) > 1000
    assert {split_of(caption.name) for caption in captions} == {"public"}
