"""A client's state leaves out what every turn brings along, and nothing else."""

import torch
from torch import nn

from lightning_pfl.federation.frozen import checksums
from lightning_pfl.federation.turn import unpack_state
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.tiny import Blocks, ClientsOwnData


class WithTeacher(Blocks):
    """A frozen table that nobody changes, and a frozen teacher that follows, past autograd, through `.data`."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(200, 100), requires_grad=False)
        self.teacher = nn.Parameter(torch.ones(200, 100), requires_grad=False)
        self.register_buffer("seen", torch.zeros(20_000))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.teacher.data.mul_(0.5)
        self.seen[0] += 1


def test_a_frozen_tensor_stays_out_of_the_state_unless_somebody_changes_it(tmp_path):
    strategy = strategy_of(["a", "b"], share=["head"])

    trainer_of(tmp_path, strategy, max_epochs=2).fit(WithTeacher(), datamodule=ClientsOwnData())

    state = unpack_state(strategy.store.get("a"))["state_dict"]
    assert "table" not in state
    assert torch.equal(state["teacher"], torch.full((200, 100), 0.5**6))  # two rounds of three batches
    assert state["seen"][0] == 6
    assert torch.equal(strategy.personalize(WithTeacher(), "a").table, torch.ones(200, 100))


def test_checksums_see_every_element_and_pass_over_what_is_trained_or_small():
    module = nn.Module()
    module.frozen = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16), requires_grad=False)
    module.trained = nn.Parameter(torch.zeros(100_000))
    module.small = nn.Parameter(torch.zeros(100), requires_grad=False)
    before = checksums(module)

    module.frozen.data[99_999] = 1e-3

    assert before.keys() == {"frozen"}
    assert checksums(module) != before
    assert checksums(module, known=before) == {}
