"""The stand-ins are deterministic, of two shapes, and honest tasks."""

import torch
from PIL import Image

from lightning_pfl.benchmark.tasks import check_disjoint, option_ids
from lightning_pfl.benchmark.tiny import PixelTokens, shape_tasks, tiny_gemma, tiny_llama, tiny_tokenizer


def test_the_two_families_differ_in_width_depth_and_class():
    llama, gemma = tiny_llama(), tiny_gemma()

    assert (llama.config.hidden_size, len(llama.model.layers)) == (32, 2)
    assert (gemma.config.hidden_size, len(gemma.model.layers)) == (48, 3)
    assert type(llama) is not type(gemma)
    for model in (llama, gemma):
        layer = model.model.layers[0]
        for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
            assert isinstance(linear, torch.nn.Linear)
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_seed_makes_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)

    one, same, other = (tiny_llama(seed=seed).model.layers[0].mlp.up_proj.weight for seed in (1, 1, 2))

    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_shape_tasks_are_balanced_disjoint_and_repeatable(tmp_path):
    tasks = shape_tasks(tmp_path / "a", num_examples=8)
    again = shape_tasks(tmp_path / "b", num_examples=8)

    assert [task.name for task in tasks] == [
        "colour-255",
        "colour-170",
        "colour-90",
        "shape-255",
        "shape-170",
        "shape-90",
    ]
    for task, other in zip(tasks, again, strict=True):
        check_disjoint(task)
        assert task.chance == 0.25
        assert len(set(option_ids(tiny_tokenizer(), task.choices))) == 4
        for one, two in zip(task.train, other.train, strict=True):
            assert one.images[0].path.read_bytes() == two.images[0].path.read_bytes()


def test_pictures_show_what_the_answer_says(tmp_path):
    task = shape_tasks(tmp_path, backgrounds=(255,), num_examples=8)[0]
    strongest = {"red": 0, "green": 1, "blue": 2}

    for example in task.train:
        centre = Image.open(example.images[0].path).getpixel((16, 16))
        if example.answer in strongest:
            assert centre.index(max(centre)) == strongest[example.answer]
        else:
            assert min(centre[:2]) > 150 > centre[2]


def test_the_pixel_encoder_is_fixed_by_its_name():
    pixels = torch.rand(2, 3, 32, 32)

    assert torch.equal(PixelTokens().encode(pixels), PixelTokens().encode(pixels))
    assert PixelTokens(seed=1).name != PixelTokens().name
    assert PixelTokens(width=6).encode(pixels).shape == (2, 5, 6)
