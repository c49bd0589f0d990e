"""Models that transformers' auto classes load are trained and asked; a tiny LLaVA on disk stands for the hub's."""

import math
from dataclasses import replace

import lightning as L
import pytest
import torch
from PIL import Image

from lightning_pfl import CoLoRA, InputGate
from lightning_pfl.adapters import CoLoraConfig, inject
from lightning_pfl.benchmark.image_text import ImageTextModule, ModelUnavailableError, load_image_text
from lightning_pfl.benchmark.image_text_data import ImageTextCollator, ImageTextData
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.records import RecordError
from lightning_pfl.benchmark.tasks import Example
from lightning_pfl.benchmark.tiny import shape_tasks
from tests.benchmark import tiny_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava.save(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (30, 20), (200, 30, 30)).save(tmp_path / "red.png")
    return View(tmp_path / "red.png")


def example(picture, *, images=1, choices=("red", "red circle", "blue"), answer="red circle"):
    return Example("Set-0/test/4", (picture,) * images, "<image>" * images + " What colour ?", answer, choices)


def trainer_of(tmp_path, **settings):
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path), **settings,
    )  # fmt: skip


def test_a_saved_model_is_loaded_frozen_with_its_processor(folder):
    model, processor = load_image_text(folder, dtype=torch.bfloat16)

    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert processor.chat_template == tiny_llava.PARTS


def test_a_model_that_cannot_be_had_is_an_error_that_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelUnavailableError, match=r"(?s)nobody/no-such-model cannot be loaded .* or a folder with the mo"
    ):
        load_image_text("nobody/no-such-model")
    tiny_llava.processor().tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelUnavailableError):
        load_image_text(str(tmp_path))


@pytest.mark.parametrize("template", [tiny_llava.PARTS, tiny_llava.TEXT])
def test_a_prompt_is_one_turn_with_its_pictures_and_the_answer_ends_the_next(picture, template):
    """Templates that know parts and those that only know text give the same."""
    collate = ImageTextCollator(tiny_llava.processor(template))
    words = collate.tokenizer.convert_ids_to_tokens

    two = example(picture, images=2)
    assert collate.prompt(two) == "user : <image><image> What colour ?\nassistant : "
    assert words(collate.continuation(two, "red circle")) == ["red", "circle", "<end>"]


def test_without_a_template_the_prompt_is_the_question_and_answer(picture):
    collate = ImageTextCollator(tiny_llava.processor(None))

    assert collate.prompt(example(picture)) == "<image> What colour ?\nAnswer:"
    assert collate.tokenizer.convert_ids_to_tokens(collate.continuation(example(picture), "red")) == ["red", "<end>"]


def test_a_template_that_loses_pictures_is_refused(picture):
    collate = ImageTextCollator(tiny_llava.processor("{{ 'hello' }}"))
    with pytest.raises(ValueError, match=r"Set-0/test/4 must show its 1 pictures"):
        collate.prompt(example(picture))


def test_a_batch_is_padded_left_with_every_candidate(picture):
    collate = ImageTextCollator(tiny_llava.processor())
    batch = collate([example(picture), example(picture, images=2, choices=(), answer="two")])

    ids = batch["inputs"]["input_ids"]
    image = collate.tokenizer.convert_tokens_to_ids("<image>")
    assert (ids == image).sum(dim=1).tolist() == [4, 8]
    assert batch["inputs"]["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["inputs"]["attention_mask"][:, -1].tolist() == [1, 1]
    assert batch["candidate_ids"].shape == (2, 3, 3)
    assert (batch["candidate_ids"][0] >= 0).sum(dim=1).tolist() == [2, 3, 2]
    assert (batch["candidate_ids"][1] == -1).all()
    assert batch["answer"].tolist() == [1, -1]


def test_pictures_are_padded_to_squares_with_the_mean_colour(tmp_path):
    Image.new("RGB", (40, 20), (255, 255, 255)).save(tmp_path / "wide.png")
    collate = ImageTextCollator(tiny_llava.processor())
    square = collate._picture(View(tmp_path / "wide.png"), example(View(tmp_path / "wide.png")))

    assert square.size == (40, 40)
    assert square.getpixel((20, 20)) == (255, 255, 255)
    mean = collate.processor.image_processor.image_mean
    assert square.getpixel((20, 2)) == tuple(round(255 * channel) for channel in mean)


def test_a_truncated_picture_names_the_example(tmp_path):
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:600])
    collate = ImageTextCollator(tiny_llava.processor())

    with pytest.raises(RecordError, match=r"Set-0/test/4 shows .*cut\.png"):
        collate([example(View(path))])


def test_the_score_of_a_choice_is_the_likelihood_of_all_its_tokens(folder, picture):
    """Against one pass per candidate without padding: log p(red) + log p(circle | red) + log p(end | red circle)."""
    module = ImageTextModule(*load_image_text(folder))
    collate = ImageTextCollator(module.processor)
    short = example(picture)
    long = replace(example(picture, images=2), choices=("blue", "red"), answer="red")
    scores = module.score_choices(collate([short, long]))

    for row, one in enumerate((short, long)):
        prompt = dict(collate([one])["inputs"])
        for column, choice in enumerate(one.choices):
            answer = torch.tensor([collate.continuation(one, choice)])
            ids = torch.cat([prompt["input_ids"], answer], dim=1)
            with torch.no_grad():
                logits = (
                    module.model(
                        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompt["pixel_values"]
                    )
                    .logits[0]
                    .log_softmax(dim=1)
                )
            start = prompt["input_ids"].shape[1]
            expected = sum(logits[start + i - 1, token] for i, token in enumerate(answer[0]))
            assert scores[row, column].item() == pytest.approx(expected.item(), abs=1e-4)
    assert scores[1, 2] == -math.inf


def test_answers_with_a_common_beginning_are_told_apart(folder, picture):
    """After training on "red circle", "red" is not the likelier answer although it is shorter."""
    module = ImageTextModule(*load_image_text(folder), lr=2e-2)
    inject(module.model, CoLoraConfig(r=4, alpha=8, num_blocks=1))
    batch = ImageTextCollator(module.processor)([example(picture)])
    optimizer = module.configure_optimizers()
    for _ in range(30):
        optimizer.zero_grad()
        loss = -module.log_likelihood(batch["inputs"], batch["answer_ids"]).mean()
        loss.backward()
        optimizer.step()

    assert module.score_choices(batch).argmax(dim=1).tolist() == [1]
    assert module.generate(batch) == ["red circle"]


def test_an_input_gate_reads_the_prompt_only(folder, picture):
    """What follows the prompt must not move the gate: "red" is as likely whatever word comes after it."""
    module = ImageTextModule(*load_image_text(folder))
    inject(
        module.model,
        CoLoraConfig(
            r=4, alpha=8, num_blocks=1, gate=InputGate(), global_branch=True, exclude_modules=["multi_modal_projector"]
        ),
    )
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    batch = ImageTextCollator(module.processor)([example(picture)])
    red = batch["candidate_ids"][0, 1, 0]
    image = module.processor.tokenizer.convert_tokens_to_ids("<image>")
    module.model.get_output_embeddings().register_forward_hook(  # a picture cannot be part of an answer
        lambda head, arguments, logits: logits.index_fill(-1, torch.tensor([image]), -math.inf)
    )
    words = torch.tensor([word for word in range(len(module.processor.tokenizer)) if word != image])
    pairs = torch.stack([red.expand_as(words), words], dim=1)
    many = {name: value.expand(len(words), *value.shape[1:]) for name, value in batch["inputs"].items()}

    with torch.no_grad():
        alone = module.log_likelihood(batch["inputs"], red.view(1, 1)).exp()
        with_any_next = module.log_likelihood(many, pairs).exp().sum()
    # p(red) = sum over all next words of p(red, word)
    torch.testing.assert_close(with_any_next[None], alone, rtol=1e-4, atol=1e-6)


def test_a_trainer_fits_and_scores_both_kinds_of_questions(folder, tmp_path):
    """Adapters learn, nothing else moves; closed questions give accuracy, open ones F1, in one batch."""
    task = shape_tasks(tmp_path / "shapes", num_examples=4)[0]
    task = replace(task, test=(task.test[0], replace(task.test[1], choices=())))
    module = ImageTextModule(*load_image_text(folder), lr=1e-2, max_new_tokens=3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    data = ImageTextData(task, module.processor, batch_size=2)
    trainer = trainer_of(tmp_path, max_epochs=1, callbacks=[CoLoRA(rank=2, num_blocks=1)])
    trainer.fit(module, data)

    assert {"train_loss", "val_loss", "val_acc"} == set(trainer.callback_metrics)
    adapters = {name: value for name, value in module.state_dict().items() if "colora_" in name}
    assert any("language_model" in name and value.abs().sum() > 0 for name, value in adapters.items())
    after = {name.replace(".base_layer", ""): value for name, value in module.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    result = trainer.test(module, data, verbose=False)[0]
    assert result["test_acc"] in (0.0, 1.0)
    assert 0 <= result["test_f1"] <= 1
    assert math.isfinite(result["test_loss"])


def test_a_frozen_model_without_adapters_says_so(folder):
    with pytest.raises(ValueError, match="nothing to train"):
        ImageTextModule(*load_image_text(folder)).configure_optimizers()
