"""How much memory a run takes at least: what lies there is measured, and so is what a small step of training adds.

The sum is of tensors, libraries and rows. An allocator keeps more for batches of other lengths, which is not counted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from molehill.config import Config
from molehill.errors import TrainingError
from molehill.molora.model import MoLoRAModel
from molehill.tasks.adapted import Adapted
from molehill.tasks.batches import Example
from molehill.words import counted
from molehill_server.planning.planner import trained
from molehill_simulation.rehearsal import Owner, Rehearsal, rehearsal
from molehill_simulation.summary import Machine
from molehill_simulation.text import storage

_FLOAT = 4  # bytes
_MOMENTS = 2  # numbers that the optimiser keeps for each that is trained
_WORK = 5e11  # multiply-adds of a measurement: some seconds of a processor
_PASSES = 6.0  # rows of all passes of a measurement: two steps with one row and two with two
_BACKWARD = 3.0  # passes that a step costs

_STATUS, _FREE = Path("/proc/self/status"), Path("/proc/meminfo")
_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped torch
    """Counts the bytes of tensors that are made while it is active and live at once.

    What kernels need inside one operation is no tensor, and not counted.

    Args:
        known: Tensors that are there already.

    Attributes:
        live: Bytes now.
        most: Bytes at once at most.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped torch
        self.live = self.most = 0
        self._counted = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation and count what it made."""
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._counted or not size:
            return
        self._counted.add(place)
        finalize(storage, self._forget, place, size)
        self.live += size
        self.most = max(self.most, self.live)

    def _forget(self, place: int, size: int) -> None:
        self._counted.discard(place)
        self.live -= size


class Activations(NamedTuple):
    """What a step keeps for the way back, by what was measured.

    Attributes:
        fixed: Bytes however many rows there are.
        row: Bytes of a row of the longest.
        tokens: Of a row that was measured.
        longest: Of the longest.
    """

    fixed: int
    row: int
    tokens: int
    longest: int

    def of(self, rows: int) -> int:
        """Bytes of a pass over so many of the longest rows."""
        return self.fixed + rows * self.row


@dataclass(frozen=True)
class Memory:
    """Memory of a run, in bytes.

    Attributes:
        device: Whose memory it is: ``cpu``, or a GPU.
        processes: That train.
        lead: Processes beside them, which hold the base too.
        base: Frozen weights.
        adapter: Values and gradients of the clients that are in one process at once.
        optimiser: What it keeps of them.
        activations: Of a step of the largest batch; None where it was not measured.
        rest: Libraries and rows of one process; None where the system does not tell.
        shared: Of base and rest, what processes have in common.
        step: What a step was measured on, in words.
        total: Memory of the machine.
        free: Of it, what nobody uses now.
    """

    device: str
    processes: int
    lead: int
    base: int
    adapter: int
    optimiser: int
    activations: int | None
    rest: int | None
    shared: int
    step: str
    total: int | None
    free: int | None

    @property
    def needed(self) -> int:
        """All processes together; what allocators keep beside it is not counted."""
        still = self.base + (self.rest or 0) - self.shared
        each = self.adapter + self.optimiser + (self.activations or 0)
        return self.shared + (self.processes + self.lead) * still + self.processes * each

    @property
    def short(self) -> bool:
        """Whether the machine has less."""
        return self.total is not None and self.needed > self.total

    @property
    def words(self) -> Iterator[tuple[str, str]]:
        """Labelled facts."""
        has = ""
        if self.total is not None:
            free = "" if self.free is None else f", {storage(self.free)} of them free now"
            has = f"; {'this machine' if self.device == 'cpu' else 'the GPU'} has {storage(self.total)}{free}"
        trains = f"{counted(self.processes, 'process')} that {'trains' if self.processes == 1 else 'train'}"
        lead = f" and {self.lead} that leads" if self.lead else ""
        yield (
            "memory",
            f"at least {storage(self.needed)} for {trains}{lead}{has}",
        )
        parts = [f"base {storage(self.base)}", f"adapter {storage(self.adapter)}"]
        parts += [f"optimiser {storage(self.optimiser)}"]
        parts += [
            "activations not measured" if self.activations is None else f"activations {storage(self.activations)}"
        ]
        parts += [] if self.rest is None else [f"libraries and rows {storage(self.rest)} (as in this process)"]
        left = "what the allocator keeps for other batches is not counted"
        yield "of each", "; ".join(filter(None, (", ".join(parts), self.step, left)))

    def as_dict(self) -> dict[str, Any]:
        """For a JSON document."""
        return {**asdict(self), "needed": self.needed}


def memory(config: Config, adapted: Adapted, machine: Machine, owners: Sequence[Owner]) -> Memory:
    """How much memory a run takes.

    Args:
        config: The run, with the task's labels known.
        adapted: Base and adapter; its values are others afterwards.
        machine: How this machine computes it.
        owners: Names of the clients with their encoded training rows.
    """
    model, own = adapted.model, config.train
    values = _size(model.values) + _size(model.grads)
    base = sum(map(_size, _tensors(model))) - values
    learnt = trained(config, model.layout).size
    gpu = model.flat.is_cuda
    anon, common = (None, 0) if gpu else _process()
    rest = None if anon is None else max(0, anon + common - base - values)
    company = machine.together
    adapter, optimiser = (company * count * _FLOAT for count in (2 * model.n_parameters, _MOMENTS * learnt))
    if own.all_rules:  # they are told what was received
        adapter += company * model.n_parameters * _FLOAT
    found, activations = _measured(config, adapted, owners), None
    step = found if isinstance(found, str) else ""
    if isinstance(found, Activations):
        rows = company * min(own.batch_size, max(len(each) for _, each in owners))
        activations = found.of(rows)
        step = f"activations are of {rows} rows of {found.longest} tokens, grown from steps of one and two"
        if found.tokens < found.longest:
            step += f" of {found.tokens} tokens in proportion, and long attention may take more"
    total, free = torch.cuda.mem_get_info()[::-1] if gpu else _machine()
    return Memory(
        device=str(model.flat.device),
        processes=machine.workers,
        lead=int(machine.workers > 1),
        base=base,
        adapter=adapter,
        optimiser=optimiser,
        activations=activations,
        rest=rest,
        shared=min(common, base + (rest or 0)),
        step=step,
        total=total,
        free=free,
    )


def _measured(config: Config, adapted: Adapted, owners: Sequence[Owner]) -> Activations | str:
    """What steps with one row and with two add, or why that is not known."""
    model = adapted.model
    most = _WORK / (_PASSES * _BACKWARD * model.base_parameters)
    every = [(example, name, rows) for name, rows in owners for example in rows]
    if not every:
        return "activations: there are no rows to measure with"
    longest = max(len(example.input_ids) for example, _, _ in every)
    fits = [row for row in every if len(row[0].input_ids) <= most]
    example, name, rows = (
        max(fits, key=lambda row: len(row[0].input_ids)) if fits else min(every, key=lambda row: len(row[0].input_ids))
    )
    tokens = len(example.input_ids)
    single = config.model_copy(update={"train": config.train.model_copy(update={"accumulation": 1})})
    learnt = _MOMENTS * _FLOAT * trained(config, model.layout).size
    try:
        with rehearsal(single, adapted) as stage:
            one, two = (_peak(stage, model, (name, rows), [example] * count) - learnt for count in (1, 2))
    except TrainingError as error:
        return f"activations: {error.what}"
    row = max(0, two - one)
    return Activations(max(0, one - row), round(row * longest / tokens), tokens, longest)


def _peak(stage: Rehearsal, model: MoLoRAModel, owner: Owner, rows: Sequence[Example]) -> int:
    """Bytes that two steps on these rows add at once; the second has what the optimiser keeps of the first."""
    (actor,) = stage.actors([owner])
    actor.rows = rows
    peak = Peak(_tensors(model))
    with peak:
        stage.train([actor], 2)
    return peak.most


def _tensors(model: MoLoRAModel) -> list[Tensor]:
    """Whatever the model holds, each storage once."""
    every = [model.values, model.grads, *model.parameters(), *model.buffers()]
    every += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in every}.values())


def _size(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().nbytes())


def _process() -> tuple[int | None, int]:
    """Bytes that this process alone has in memory, and those of files, which others may have in common with it."""
    found = _table(_STATUS)
    if "RssAnon" not in found:
        return None, 0
    return found["RssAnon"], found.get("RssFile", 0) + found.get("RssShmem", 0)


def _machine() -> tuple[int | None, int | None]:
    """Bytes of memory that this machine, or the container, has, and that are free."""
    found = _table(_FREE)
    total, free = found.get("MemTotal"), found.get("MemAvailable")
    if total is None and hasattr(os, "sysconf"):
        with contextlib.suppress(ValueError, OSError):
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # there is no limit, or it says "max"
        limit = int(_LIMIT.read_text())
        if total is None or limit < total:
            return limit, max(0, limit - int(_USED.read_text()))
    return total, free


def _table(path: Path) -> dict[str, int]:
    """Bytes by name of a file with lines such as ``RssAnon: 12 kB``."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            words = value.split()
            if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
                found[name] = 1024 * int(words[0])
    return found
