"""Promises of `lightning_pfl.relevance.gradient`."""

import pickle

import lightning as L
import pytest
import torch
from torch import nn

from lightning_pfl.relevance.gradient import GradientProbe, examples_of
from lightning_pfl.relevance.sketches import ColumnSketch, CountSketch


def network():
    """Dropout and batch statistics that a probe must not touch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))


def loss(module, batch):
    return nn.functional.cross_entropy(module(batch["x"]), batch["y"])


def batch(n=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(n, 4, generator=generator), "y": torch.randint(3, (n,), generator=generator)}


def test_the_sketch_is_the_projected_mean_of_per_example_gradients():
    """Against autograd, example by example, in evaluation mode."""
    module = network()
    data = batch()
    sketch = GradientProbe(module, loss, parameters=["4.*", "0.weight"], size=64, seed=2).sketch(data)

    module.requires_grad_(True)
    names = ["0.weight", "4.weight", "4.bias"]
    project = CountSketch(64, seed=2)
    expected = torch.zeros(64)
    for index in range(5):
        example = {"x": data["x"][index : index + 1], "y": data["y"][index : index + 1]}
        gradients = torch.autograd.grad(loss(module, example), [module.get_parameter(name) for name in names])
        expected += project(torch.cat([gradient.flatten() for gradient in gradients])) / 5
    torch.testing.assert_close(sketch, expected)


def test_an_examples_sketch_is_cut_to_the_norm_that_is_allowed():
    """One example, so the mean has that norm."""
    probe = GradientProbe(network(), loss, parameters=["4.weight"], size=64, max_norm=0.01)

    torch.testing.assert_close(probe.sketch(batch(1)).norm(), torch.tensor(0.01))


class Classifier(L.LightningModule):
    """Logs in its step, returns its loss in a mapping."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def training_step(self, batch, batch_idx):
        value = loss(self.network, batch)
        self.log("train_loss", value)
        return {"loss": value, "more": 1}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_lightning_modules_own_step_is_the_loss(recwarn):
    """To the bit what the same loss gives when it is named; nobody is told that there is no Trainer to log to."""
    proxy = Classifier()
    named = GradientProbe(proxy.network, loss, parameters=["4.*"], size=64).sketch(batch())

    assert torch.equal(GradientProbe(proxy, parameters=["network.4.*"], size=64).sketch(batch()), named)
    assert not [warning for warning in recwarn if "self.log" in str(warning.message)]


def test_a_proxy_that_was_trained_before_does_not_bring_its_trainer_along(tmp_path):
    """It could not be sent to clients, and its step would log to that Trainer."""
    proxy = Classifier()
    data = [batch()]
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **dict.fromkeys(quiet, False))
    trainer.fit(proxy, torch.utils.data.DataLoader(data, batch_size=None))
    probe = GradientProbe(proxy, parameters=["network.4.*"], size=64)
    first = probe.sketch(batch())

    assert torch.equal(pickle.loads(pickle.dumps(probe)).sketch(batch()), first)


def test_a_module_without_a_loss_asks_for_one():
    """Also one whose step returns something else."""

    class Odd(Classifier):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(TypeError, match=r"Sequential has no loss.*loss\(module, batch\)"):
        GradientProbe(network(), parameters=["4.*"]).prepare()
    with pytest.raises(TypeError, match="training_step` of Odd must return its loss"):
        GradientProbe(Odd(), parameters=["network.4.*"], size=8).sketch(batch())


def test_one_matrix_keeps_its_shape_for_a_projection_by_columns():
    """8 inputs of the last layer."""
    probe = GradientProbe(network(), loss, parameters=["4.weight"], projection=ColumnSketch(2, 8))

    assert probe.sketch(batch()).shape == (16,)


def test_a_probe_leaves_its_module_the_random_numbers_and_grad_mode_alone():
    """No gradient is stored, no batch statistic moves, no dropout mask is drawn; it works under no_grad."""
    module = network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    probe = GradientProbe(module, loss, parameters=["0.*"], size=16)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    with torch.no_grad():
        sketch = probe.sketch(batch())
        assert not torch.is_grad_enabled()

    assert sketch.any()
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in module.parameters())


def test_a_function_makes_the_module_when_it_is_needed_and_does_not_travel():
    """A function that cannot be pickled is no obstacle once the module is there."""
    probe = GradientProbe(lambda: network(), loss, parameters=["4.weight"], size=16)
    first = probe.sketch(batch())

    assert torch.equal(pickle.loads(pickle.dumps(probe)).sketch(batch()), first)


def test_a_pattern_that_matches_nothing_is_named():
    """With parameters that are there."""
    with pytest.raises(ValueError, match=r"'layer9\.\*' matches none.*4\.weight"):
        GradientProbe(network(), loss, parameters=["4.weight", "layer9.*"]).prepare()


def test_batches_are_cut_inside_mappings_lists_and_tuples():
    """Tensors lose their other examples; texts and numbers stay."""
    data = {"pair": (torch.tensor([1, 2]), [torch.tensor([[3], [4]])]), "name": "flags"}

    first, second = examples_of(data)

    assert second["pair"][0].tolist() == [2]
    assert second["pair"][1][0].tolist() == [[4]]
    assert first["name"] == "flags"


@pytest.mark.parametrize("data", [{"x": torch.ones(2), "y": torch.ones(3)}, {"name": "flags"}])
def test_a_batch_without_a_common_first_dimension_is_refused(data):
    """The message says where to bring it into form."""
    with pytest.raises(ValueError, match="to_probe"):
        examples_of(data)
