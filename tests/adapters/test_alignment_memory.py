"""What aligning holds at once, counted tensor by tensor: it depends on widths, never on how much data there is."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_pfl.adapters import CoLoraConfig, inject
from lightning_pfl.adapters.alignment import Canonical, CcaB, GradientDescent, LeastSquares, align
from lightning_pfl.adapters.gathering import Seen, Site
from lightning_pfl.adapters.readings import Reading

RANK, TOKENS = 2, 24


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that are alive at once, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._foreign: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and (key := id(tensor.untyped_storage())) not in self._known:
                self._foreign.add(key)  # of the models: views of it are not new
                weakref.finalize(tensor.untyped_storage(), self._foreign.discard, key)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and id(storage) not in self._known | self._foreign:
                self._known.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + torch.tanh(self.fc1(x))


class Square(nn.Module):
    """Two blocks of one square layer each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def peak_of(rule, width, *, records, max_bytes=2**31, anchor_width=8):
    """Peak bytes of aligning a model to another, usually a narrow one."""
    torch.manual_seed(0)
    models = {"anchor": Square(anchor_width), "student": Square(width)}
    for name, model in models.items():  # of one width they would pass for one base model
        inject(model, CoLoraConfig(r=RANK, num_blocks=2, private_layers=False, base_identity=name))
    mixer = torch.randn(anchor_width, width) / anchor_width**0.5

    class Stream:
        def __iter__(self):
            generator = torch.Generator().manual_seed(1)
            for _ in range(records):
                x = torch.randn(1, TOKENS, anchor_width, generator=generator)
                places = torch.arange(TOKENS)[None]
                yield {"anchor": Reading({"x": x}, places), "student": Reading({"x": x @ mixer}, places)}

    def loss(model, inputs):
        return model(inputs["x"]).square().sum()

    with Peak() as peak:
        align(models, Stream(), anchor="anchor", rule=rule, loss=loss, max_bytes=max_bytes)
    return peak.peak


def site(d_in, d_out):
    return Site(nn.Linear(d_in, d_out), torch.zeros(RANK, d_in), torch.zeros(d_out, RANK))


RULES = [Canonical(), LeastSquares(), LeastSquares(CcaB()), GradientDescent(passes=1)]


@pytest.mark.parametrize("rule", RULES, ids=["canonical", "least squares", "cca", "descent"])
def test_memory_does_not_grow_with_the_data(rule):
    few, many = (peak_of(rule, 64, records=records) for records in (10, 30))
    kept = 4 * TOKENS * (64 + 8 + 2) * 8  # so many more held-out records stay, 64 at most, to measure on
    assert many < few + kept


@pytest.mark.parametrize(
    ("rule", "floats_per_square"),
    # sums of inputs and of gradients, fitted and held out, of two layers, are 8 d^2; the solver needs a few more
    [(Canonical(), 16), (LeastSquares(), 16), (LeastSquares(CcaB()), 16)],
    ids=["canonical", "least squares", "cca"],
)
def test_closed_forms_take_O_of_the_width_squared(rule, floats_per_square):
    for width in (128, 256):
        linear = 4000 * width  # activations, bases and records
        assert peak_of(rule, width, records=10) < 8 * floats_per_square * width**2 + 8 * linear


def test_descent_takes_O_of_the_width_times_the_rank():
    """Twice the width takes twice the memory, which is far below one square of the width."""
    one, two = (peak_of(GradientDescent(passes=1), width, records=5) for width in (1024, 2048))
    assert two < 2.2 * one
    assert two < 2048**2 * 4 / 2


def test_fewer_bytes_at_once_take_more_passes_and_less_memory():
    whole = peak_of(Canonical(), 256, records=10)
    halves = peak_of(Canonical(), 256, records=10, max_bytes=1)
    assert halves < whole - 3 * 8 * 256**2


@pytest.mark.parametrize("widths", [(16, 8), (48, 64), (96, 80)], ids=["narrower", "as wide", "wider"])
def test_the_default_rule_counts_its_sums_to_the_byte_whatever_the_anchors_width(widths):
    """`num_bytes` leaves out only the two mean inputs, one vector of each model; records add nothing."""
    anchor, student = site(*widths), site(48, 64)
    vectors = [torch.randn(TOKENS, width) for width in (48, widths[0], 64, widths[1])]
    seen = Seen(*vectors, places=torch.arange(TOKENS))

    with Peak() as held:
        sink = Canonical().sink(anchor, student)
        sink.add(seen, is_held_out=False)
        sink.add(seen, is_held_out=True)

    assert sink.count == TOKENS
    assert held.now == Canonical().num_bytes(anchor, student) + 8 * (48 + widths[0])


@pytest.mark.parametrize("anchor_width", [8, 64, 128], ids=["narrower", "as wide", "wider"])
def test_aligning_to_any_anchor_takes_what_the_default_rule_says(anchor_width):
    """By these numbers `max_bytes` is kept: one of the two layers fewer at once saves them, but for its means."""
    layer = Canonical().num_bytes(site(anchor_width, anchor_width), site(64, 64))
    whole, one = (
        peak_of(Canonical(), 64, records=10, anchor_width=anchor_width, max_bytes=limit) for limit in (2**31, layer)
    )

    assert layer <= whole - one < 1.01 * layer
    assert whole < 2 * (2 * layer)  # the solver takes less than the sums
