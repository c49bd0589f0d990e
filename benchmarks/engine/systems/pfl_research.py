"""Apple's pfl-research: one process, one resident model. Runs in an environment of its own."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.engine.marks import Marks
from benchmarks.engine.model import accuracy, network
from benchmarks.engine.workload import WORKLOADS, Workload, client_rows, cohort


class Net(nn.Module):
    """With the two methods that pfl calls; it hands labels over as floats."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.net = network(workload)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.net(features), labels.long())

    def metrics(self, features: Tensor, labels: Tensor) -> dict[str, Weighted]:
        return {"loss": Weighted(0.0, len(labels))}


class RoundMarks(TrainingProcessCallback):
    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        self.marks.round()
        return False, Metrics()


def users(workload: Workload) -> Iterator[int]:
    for round in itertools.count():
        yield from cohort(workload, round)


def main() -> None:
    workload = WORKLOADS[sys.argv[1]]
    marks = Marks(sys.argv[2], rounds=workload.rounds)
    marks.imported()
    torch.set_num_threads(1)
    net, order = Net(workload), users(workload)
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    data = FederatedDataset(lambda user: Dataset(client_rows(workload, user)), lambda: next(order))
    marks.started()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=workload.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=workload.cohort,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=data, val_data=None),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=workload.rate, local_batch_size=workload.batch),
        NNEvalHyperParams(local_batch_size=workload.rows),
        [RoundMarks(marks)],
    )
    marks.write(accuracy=accuracy(workload, net.net.state_dict()))


if __name__ == "__main__":
    main()
