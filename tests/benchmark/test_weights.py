"""Language models load from folders, cut to a depth; packaged ones are converted once."""

import pytest
import torch

from lightning_pfl.benchmark import weights
from lightning_pfl.benchmark.tiny import tiny_gemma, tiny_llama, tiny_tokenizer
from lightning_pfl.benchmark.weights import load_image_encoder, load_language_model


@pytest.fixture(params=[tiny_llama, tiny_gemma])
def folder(request, tmp_path):
    request.param(num_layers=3).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_loads_frozen_with_its_tokenizer(folder):
    model, tokenizer = load_language_model(str(folder), dtype=torch.float32)

    assert len(model.model.layers) == 3
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert tokenizer("red circle")["input_ids"] == tiny_tokenizer()("red circle")["input_ids"]
    assert load_language_model(str(folder))[0].dtype == torch.bfloat16


def test_the_first_layers_are_kept_and_give_the_same_states(folder):
    whole, _ = load_language_model(str(folder), dtype=torch.float32)
    cut, _ = load_language_model(str(folder), 2, dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5]])

    # the states after two layers, before the final norm, are those of the whole model
    expected = whole.model(ids, output_hidden_states=True).hidden_states[2]
    assert len(cut.model.layers) == cut.config.num_hidden_layers == 2
    torch.testing.assert_close(cut.model(ids).last_hidden_state, whole.model.norm(expected))


@pytest.mark.parametrize("num_layers", [0, 4])
def test_a_depth_that_the_model_does_not_have_is_refused(folder, num_layers):
    with pytest.raises(ValueError, match=f"between 1 and 3, the depth of .*, but is {num_layers}"):
        load_language_model(str(folder), num_layers)


def test_an_unknown_encoder_is_refused():
    with pytest.raises(ValueError, match=r"must be one of .*efficientnet-lite0.*, but is 'resnet'"):
        load_image_encoder("resnet")


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "prompt", "expected"),
    [
        (weights.SMOLLM2_135M, "The capital of France is", " Paris"),
        (weights.GEMMA3_270M, "One, two, three, four, five, six, seven, eight,", " nine"),
    ],
)
def test_a_packaged_model_speaks(name, prompt, expected):
    model, tokenizer = load_language_model(name)

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]

    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == expected


@pytest.mark.assets
@pytest.mark.parametrize("name", [weights.EFFICIENTNET_LITE0, weights.EFFICIENTNET_LITE1])
def test_a_packaged_encoder_knows_a_panda(name):
    from lightning_pfl.benchmark.features import EfficientNetTokens, _pixels
    from lightning_pfl.benchmark.images import View
    from lightning_pfl.benchmark.photographs import scenes

    (panda,) = (picture for picture in scenes() if picture.path.name == "panda.webp")
    encoder = EfficientNetTokens(name, size=224, model=load_image_encoder(name))
    tokens = encoder.encode(_pixels(View(panda.path).render(224)).unsqueeze(0))

    logits = load_image_encoder(name)._fc(tokens[:, 0])
    assert int(logits.argmax()) == 388  # the giant panda of ImageNet
