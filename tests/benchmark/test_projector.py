"""A projector lets a frozen language model caption public pictures, and keeps what captions do not say."""

import pytest
import torch

from lightning_pfl.benchmark.batches import ANSWER, IMAGE_ID, start_id
from lightning_pfl.benchmark.features import FeatureStore
from lightning_pfl.benchmark.images import split_of
from lightning_pfl.benchmark.projector import load_projector, pretrain_projector
from lightning_pfl.benchmark.public import QUESTIONS, Caption, public_captions
from lightning_pfl.benchmark.tiny import PixelTokens, shape_tasks, tiny_gemma, tiny_llama, tiny_tokenizer
from lightning_pfl.benchmark.vlm import Projector, VisionLanguageModule, embedding_rms


@pytest.fixture
def store(tmp_path):
    return FeatureStore(PixelTokens(), folder=tmp_path / "features")


@pytest.fixture
def captions(tmp_path):
    task = shape_tasks(tmp_path / "pictures", backgrounds=(255,), num_examples=48)[0]
    return [Caption(example.images[0], example.answer) for example in task.train]


def _caption_loss(projector, model, features, captions):
    """Cross entropy of the pictures' names over the whole vocabulary, after the first public question."""
    module, tokenizer = VisionLanguageModule(model, projector), tiny_tokenizer()
    question, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (QUESTIONS[0], ANSWER))
    ids = torch.tensor([start_id(tokenizer), *question, *[IMAGE_ID] * 5, *answer]).expand(len(captions), -1)
    with torch.no_grad():
        states = module.hidden_states({"features": features, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
        scores = states[:, -1] @ model.get_output_embeddings().weight.T
    names = torch.tensor([tokenizer(" " + caption.name)["input_ids"][0] for caption in captions])
    return float(torch.nn.functional.cross_entropy(scores, names))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
def test_the_model_comes_to_name_pictures_by_what_it_sees(make, store, captions):
    """With another picture in its place, the name is unlikely: it is not the names' frequencies that were learned."""
    model, features = make(), store.tokens([caption.view for caption in captions])

    projector = pretrain_projector(model, tiny_tokenizer(), store, captions, num_steps=120, lr=5e-3)

    trained = _caption_loss(projector, model, features, captions)
    untrained = _caption_loss(Projector(64, model.config.hidden_size, embedding_rms(model)), model, features, captions)
    misled = _caption_loss(projector, model, features.roll(1, dims=0), captions)
    assert trained < 0.7 * untrained
    assert trained < misled - 1
    assert not any(parameter.requires_grad for parameter in projector.parameters())


def test_keeping_the_coordinates_keeps_them(store, captions):
    """A linear map reads the coordinates better from a projector that was trained with `keep` than from one without."""
    features = store.tokens([caption.view for caption in captions]).flatten(0, 1)
    errors = []
    for keep in (0.0, 10.0):
        projector = pretrain_projector(
            tiny_llama(hidden=96), tiny_tokenizer(), store, captions, num_steps=150, lr=5e-3, keep=keep
        )
        tokens = torch.cat([projector(features).double(), torch.ones(len(features), 1)], dim=1)
        told = projector.coordinates(features).double()
        solution = torch.linalg.lstsq(tokens, told).solution
        errors.append(float((tokens @ solution - told).pow(2).mean()))

    assert errors[1] < 0.8 * errors[0]


def test_language_models_of_two_families_are_told_the_same_of_a_picture(store, captions):
    features = store.tokens([caption.view for caption in captions])
    one, two = (
        pretrain_projector(make(), tiny_tokenizer(), store, captions, num_steps=2) for make in (tiny_llama, tiny_gemma)
    )

    told = one.coordinates(features)

    assert torch.equal(told, two.coordinates(features))
    # principal coordinates: centred, uncorrelated, of unit variance, the one that varies most first
    flat = told.flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(64), atol=1e-3, rtol=0)
    covariance = flat.T @ flat / len(flat)
    torch.testing.assert_close(covariance[:20, :20], torch.eye(20), atol=1e-2, rtol=0)


def test_the_same_seed_gives_the_same_projector_and_leaves_the_global_generator_alone(store, captions):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)

    one, two = (pretrain_projector(tiny_llama(), tiny_tokenizer(), store, captions, num_steps=3) for _ in range(2))

    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_a_projector_is_trained_once_per_model_and_depth_and_read_afterwards(store, captions, monkeypatch, tmp_path):
    monkeypatch.setattr("lightning_pfl.benchmark.projector.public_captions", lambda cache: captions)
    monkeypatch.setattr("lightning_pfl.benchmark.projector.VERSIONS", 1)
    steps = []

    def load(num_layers):
        return load_projector(
            tiny_llama(num_layers=num_layers),
            tiny_tokenizer(),
            store,
            name="some/model",
            cache=tmp_path,
            report=lambda done, total: steps.append(done),
        )

    first, again, deeper = load(1), load(1), load(2)

    assert len(steps) == 2 * 150
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.linear.weight, deeper.linear.weight)
    assert len(list((tmp_path / "projectors").glob("model-*.safetensors"))) == 2


def test_no_captions_are_refused(store):
    with pytest.raises(ValueError, match="at least one picture with a name"):
        pretrain_projector(tiny_llama(), tiny_tokenizer(), store, [])


@pytest.mark.assets
def test_public_captions_are_many_and_of_no_task():
    captions = public_captions()

    assert len(captions) > 1000
    assert {split_of(caption.name) for caption in captions} == {"public"}
