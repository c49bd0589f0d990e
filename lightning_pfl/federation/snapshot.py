"""`Snapshot`: what every turn of a client starts from, taken once, loaded as often as there are turns.

Taken before anything runs, a snapshot holds trainer, module and datamodule in one pickle (they refer to each other).
Big tensors lie in the run's `TensorFile`, so the pickle stays small, loading takes milliseconds, and all processes of
a machine share one copy of a frozen backbone until they write to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lightning_pfl.federation.pickling import Pickled, dump, explain, load
from lightning_pfl.federation.tensor_file import TensorFile, TensorFileRef

__all__ = ["Snapshot"]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A pickled (trainer, module, datamodule), or any other object.

    Attributes:
        pickled: the object without its big tensors.
        file: where these lie; None when there are none.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(300, 300)
        >>> with TensorFile() as file:
        ...     snapshot = Snapshot.take(model, file)
        ...     mine, yours = snapshot.load(), snapshot.load()
        >>> with torch.no_grad():
        ...     _ = mine.weight.zero_()
        >>> torch.equal(yours.weight, model.weight)  # writing in place reaches nobody else
        True
        >>> snapshot.nbytes < 5_000 < model.weight.nbytes
        True
    """

    pickled: Pickled
    file: TensorFileRef | None

    @staticmethod
    def take(objects: Any, file: TensorFile) -> Snapshot:
        """Pickle objects as they are now.

        Args:
            objects: usually the tuple (trainer, module, datamodule).
            file: of the run; several snapshots of a run share one, and tensors that they have in common.

        Raises:
            TypeError: something in them cannot be pickled; the message says what and where.
        """
        try:
            pickled = dump(objects, file)
        except OSError:
            raise
        except Exception as error:
            names = ("trainer", "module", "datamodule")
            parts = zip(names, objects, strict=False) if isinstance(objects, tuple) else [("object", objects)]
            found = (explain(part, name) for name, part in parts)
            blame = next(filter(None, found), str(error))
            raise TypeError(
                "A client's turn starts from a pickled copy of trainer, module and datamodule, but this one cannot be "
                f"pickled: {blame}. Create it in `setup` or at first use, or leave it out in `__getstate__`."
            ) from error
        return Snapshot(pickled, file.ref() if pickled.needs_file else None)

    def load(self) -> Any:
        """Unpickle the objects, with tensors that nobody else sees written to.

        Raises:
            FileNotFoundError: the run is over and its tensor file gone.
        """
        return load(self.pickled, None if self.file is None else self.file.open())

    def at(self, path: str) -> Snapshot:
        """Say where the tensor file lies on this machine."""
        return self if self.file is None else replace(self, file=replace(self.file, path=path))

    @property
    def nbytes(self) -> int:
        """What travels with every copy of the snapshot: all but the big tensors."""
        return self.pickled.nbytes
