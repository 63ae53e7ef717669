"""Training in several processes, as `torchrun` starts them: each keeps some rows of every weight, and runs a share
of the parts of a step.

A weight is gathered where it is read and forgotten after that, and its gradient goes back as the mean over the
processes, to each its rows (FSDP, with the tensors of `torch.distributed.tensor`). All processes read the same weights
in the same order, or they would wait for each other. One process needs none of this: `ONE`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from transom.backends.folder import Kind, new_folder
from transom.errors import TrainingError
from transom.graphs.weight import Weight

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for the others. They begin together once the slowest has read its model."""

Tensors = Mapping[str, torch.Tensor]


class Shards:
    """Where tensors are, and who does what: all in one process.

    Attributes:
        rank: Number of this process, from 0.
        count: Of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and tells what happens."""
        return self.rank == 0

    def share(self, places: range) -> range:
        """Which of some places are this process's."""
        return places

    def shard(self, tensor: torch.Tensor) -> torch.Tensor:
        """What this process keeps of a tensor that every process has."""
        return tensor

    def gathered(self, tensors: Tensors) -> Tensors:
        """Tensors that are whole when they are read, with gradients for what is kept of them."""
        return tensors

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of which each process keeps a part, on all of them."""
        return tensor

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics of all processes."""
        return dict(metrics)

    def check_same(self, value: Any, words: str) -> None:
        """Raise `TrainingError` with these words unless all processes have an equal value."""

    def write(self, tensors: Tensors, write: Callable[[Mapping[str, Weight]], None]) -> None:
        """Call a function on the first process with whole tensors; while it reads them, the others help.

        A tensor is gathered when its rows are read, and the one before it is forgotten.
        """
        write({name: Weight.of(tensor.detach().cpu()) for name, tensor in tensors.items()})

    def new_folder(self, path: Path, *, overwrite: bool, kind: Kind) -> contextlib.AbstractContextManager[Path]:
        """As `backends.folder.new_folder`, on the first process; the others get the path, and nothing happens there."""
        return new_folder(path, overwrite=overwrite, kind=kind)

    def wait(self) -> None:
        """Wait for the other processes."""

    def save(self, tensors: Tensors, folder: Path) -> None:
        """Write tensors, each process what it keeps.

        Raises:
            OSError: If a process cannot write.
        """
        raise NotImplementedError("one process writes whole tensors")

    def load(self, folder: Path) -> dict[str, torch.Tensor]:
        """What some processes wrote with `save`, however many they were; only of a folder that is trusted.

        Raises:
            OSError: If it is damaged, or missing.
        """
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        with _as_os_errors(), warnings.catch_warnings():
            # That one process reads alone is what is wanted.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            entries: Mapping[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
            tensors = {name: self._empty(entry.size, entry.properties.dtype) for name, entry in entries.items()}
            load(dict(tensors), checkpoint_id=folder, no_dist=self.count == 1)
        return tensors

    def _empty(self, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)


ONE = Shards()


class Processes(Shards):
    """One of several processes that train together.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._mesh = init_device_mesh(device, (self.count,))

    def share(self, places: range) -> range:
        return places[self.rank :: self.count]

    def shard(self, tensor: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(tensor, DTensor):
            return tensor
        # Every process has read the same, so nothing is sent.
        return distribute_tensor(tensor, self._mesh, [_placement(tensor.dim())], src_data_rank=None)

    def gathered(self, tensors: Tensors) -> Tensors:
        return _Gathered(tensors)

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        values = torch.tensor(list(metrics.values()), dtype=torch.float64)
        dist.all_reduce(values)
        return dict(zip(metrics, (values / self.count).tolist(), strict=True))

    def check_same(self, value: Any, words: str) -> None:
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            raise TrainingError(words)

    def write(self, tensors: Tensors, write: Callable[[Mapping[str, Weight]], None]) -> None:
        if not self.is_first:
            while (name := self._from_first(None)) is not None:
                self.whole(tensors[name].detach())
            return
        last: tuple[str, torch.Tensor] | None = None

        def read_rows(name: str, start: int, stop: int) -> torch.Tensor:
            nonlocal last
            if last is None or last[0] != name:
                last = None
                self._from_first(name)
                last = name, self.whole(tensors[name].detach()).cpu()
            return last[1][start:stop] if last[1].dim() else last[1]

        def weight(name: str, tensor: torch.Tensor) -> Weight:
            return Weight(
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                read_rows=lambda start, stop: read_rows(name, start, stop),
                origin=name,
            )

        write({name: weight(name, tensor) for name, tensor in tensors.items()})
        self._from_first(None)

    def _from_first(self, name: str | None) -> str | None:
        names = [name]
        dist.broadcast_object_list(names)
        return names[0]

    def new_folder(self, path: Path, *, overwrite: bool, kind: Kind) -> contextlib.AbstractContextManager[Path]:
        if self.is_first:
            return super().new_folder(path, overwrite=overwrite, kind=kind)
        return contextlib.nullcontext(path)

    def wait(self) -> None:
        dist.barrier()

    def save(self, tensors: Tensors, folder: Path) -> None:
        from torch.distributed.checkpoint.state_dict_saver import save

        with _as_os_errors():
            save(dict(tensors), checkpoint_id=folder)

    def _empty(self, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        from torch.distributed.tensor import empty

        if not size:
            return torch.empty(size, dtype=dtype)
        return empty(size, dtype=dtype, device_mesh=self._mesh, placements=[_placement(len(size))])


class _Gathered(Mapping[str, torch.Tensor]):
    """Sharded tensors by name; each is gathered whenever it is read."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        from torch.distributed.tensor import Partial, Replicate

        tensor: Any = self._tensors[name]
        whole: torch.Tensor = tensor.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial("avg")])
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _placement(axes: int) -> Any:
    """Rows are spread; a scalar is on all processes."""
    from torch.distributed.tensor import Replicate, Shard

    return Shard(0) if axes else Replicate()


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """What the library raises for a checkpoint is no `Exception`, and names what happened on every process."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise OSError(str(first) or type(first).__name__) from error


def started() -> int:
    """How many processes were started together: those of `torchrun`, or of a group that the caller has set up."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the only process, or the first of those that were started together."""
    return started() == 1 or int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def processes(device: str) -> Iterator[Shards]:
    """The processes that were started together, for the time of a run.

    Args:
        device: Where each of them computes: "cpu", or "cuda" for one GPU each.

    Raises:
        TrainingError: If the device is no such, the others cannot be reached, or one of them ends.
    """
    if started() == 1:
        yield ONE
        return
    if device not in ("cpu", "cuda"):
        raise TrainingError(f"several processes train on the devices cpu and cuda, not {device!r}: start one process")
    own = not dist.is_initialized()
    try:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if own:
            backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise TrainingError(
            f"the other processes cannot be reached ({_line(error)}): start them with torchrun"
        ) from error
    try:
        yield Processes(device)
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise TrainingError("another process of the run has ended, or does not answer: see what it told") from error
    finally:
        if own:
            dist.destroy_process_group()


def _is_lost(error: RuntimeError) -> bool:
    """Whether the library could not reach another process."""
    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(part in words for part in ("gloo", "connection", "nccl"))


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
