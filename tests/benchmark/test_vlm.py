"""The vision-language module on tiny models of two families."""

import math
import pickle

import lightning as L
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from lightning_pfl.benchmark.batches import IMAGE_ID
from lightning_pfl.benchmark.tiny import shape_tasks, tiny_data, tiny_gemma, tiny_llama, tiny_vlm
from lightning_pfl.benchmark.vlm import Projector, VisionLanguageModule, embedding_rms

FAMILIES = pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])


def _batch(ids, mask=None, options=((20, 21, 22), (20, 21, -1)), width=64):
    ids = torch.tensor(ids)
    features = torch.randn(len(ids), 5, width, generator=torch.Generator().manual_seed(3)).half()
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    return {
        "features": features,
        "input_ids": ids,
        "attention_mask": mask,
        "option_ids": torch.tensor(options)[: len(ids)],
        "answer": torch.tensor([1, 0])[: len(ids)],
    }


@FAMILIES
def test_the_answer_scores_are_the_rows_of_the_full_logits(make):
    module = tiny_vlm(make())
    batch = _batch([[IMAGE_ID] * 5 + [4, 5, 6]] * 2)

    scores = module(batch)

    embedded = module.embed(batch["features"], batch["input_ids"])
    full = module.language_model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits[:, -1]
    torch.testing.assert_close(scores[0], full[0, [20, 21, 22]], atol=1e-4, rtol=1e-4)
    assert scores[1, 2] == -math.inf


@FAMILIES
def test_padding_on_the_left_changes_no_score(make):
    module = tiny_vlm(make())
    ids = [IMAGE_ID] * 5 + [4, 5, 6]

    plain = module(_batch([ids]))
    padded = module(_batch([[0, 0, 0, *ids]], [[0] * 3 + [1] * 8]))

    torch.testing.assert_close(padded, plain, atol=1e-4, rtol=1e-4)


def test_pictures_go_where_their_mark_is_in_order():
    module = tiny_vlm(tiny_llama())
    features = torch.randn(1, 10, 64)

    embedded = module.embed(features, torch.tensor([[4, *[IMAGE_ID] * 5, 5, *[IMAGE_ID] * 5]]))

    projected = module.projector(features)
    words = module.language_model.get_input_embeddings()
    torch.testing.assert_close(embedded[0, 1:6], projected[0, :5])
    torch.testing.assert_close(embedded[0, 7:], projected[0, 5:])
    torch.testing.assert_close(embedded[0, [0, 6]], words(torch.tensor([4, 5])))


@FAMILIES
def test_the_projector_speaks_as_loud_as_the_words_do(make):
    model = make()
    words = model.get_input_embeddings()(torch.arange(model.config.vocab_size)).float()

    projected = tiny_vlm(model).projector(torch.randn(50, 64) * 7)

    assert embedding_rms(model) == pytest.approx(float(words.pow(2).mean().sqrt()), rel=0.25)
    assert float(projected.pow(2).mean().sqrt()) == pytest.approx(embedding_rms(model), rel=0.01)


def test_scores_name_the_likeliest_answer_and_its_likelihood():
    module = tiny_vlm(tiny_llama())
    batch = _batch([[IMAGE_ID] * 5 + [4, 5, 6]] * 2)

    scores = module.score(batch)

    probabilities = module(batch).softmax(dim=1)
    assert scores.predicted.tolist() == probabilities.argmax(dim=1).tolist()
    assert scores.correct.tolist() == [int(p) == a for p, a in zip(scores.predicted, [1, 0], strict=True)]
    torch.testing.assert_close(scores.log_likelihood.exp(), torch.stack([probabilities[0, 1], probabilities[1, 0]]))


def _trainer(**kwargs):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", **quiet, **kwargs)


@FAMILIES
def test_adapters_in_the_language_model_learn_a_task_and_nothing_else_moves(make, tmp_path):
    task = shape_tasks(tmp_path / "pictures", num_examples=48)[0]
    data = tiny_data(task, tmp_path / "features")
    torch.manual_seed(0)
    module = pickle.loads(pickle.dumps(tiny_vlm(make(), lr=1e-2)))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=targets), module.language_model)
    before = {name: value.clone() for name, value in module.state_dict().items() if "lora_" not in name}
    trainer = _trainer(max_epochs=16)

    trainer.fit(module, data)
    result = trainer.test(module, data, verbose=False)[0]

    assert result["test_acc"] >= 0.75  # chance is .25
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_metrics_are_logged_under_their_names(tmp_path):
    task = shape_tasks(tmp_path / "pictures", num_examples=8)[0]
    projector = Projector(64, 32, 1.0)
    module = VisionLanguageModule(tiny_llama(), projector, train_projector=True, warmup_steps=2)
    trainer = _trainer(max_epochs=1)

    trainer.fit(module, tiny_data(task, tmp_path / "features"))

    assert {"train_loss", "val_loss", "val_acc"} == set(trainer.callback_metrics)


def test_warm_up_rises_to_the_learning_rate_and_stays():
    module = VisionLanguageModule(tiny_llama(), Projector(64, 32, 1.0), lr=0.8, warmup_steps=3, train_projector=True)
    chosen = module.configure_optimizers()
    optimizer, schedule = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()

    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_a_module_with_nothing_to_train_says_so():
    with pytest.raises(ValueError, match=r"nothing to train: its language model is frozen\. Add adapters"):
        tiny_vlm(tiny_llama()).configure_optimizers()


def test_a_projector_of_another_width_is_refused():
    with pytest.raises(ValueError, match="language model's width, 32, but maps to 48"):
        VisionLanguageModule(tiny_llama(), Projector(64, 48, 1.0))


def test_soft_capped_logits_are_capped():
    model = tiny_gemma()
    model.config.final_logit_softcapping = 0.5

    scores = tiny_vlm(model)(_batch([[IMAGE_ID] * 5 + [4, 5, 6]]))

    assert float(scores.abs().max()) <= 0.5
