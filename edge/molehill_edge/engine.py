"""What all views of an open bundle share, and how a gate is bound to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from molehill.decoding.prompts import Prompts
from molehill.errors import BundleError
from molehill_edge import experts, gates
from molehill_edge.gates import Gate
from molehill_edge.session import Session, value
from molehill_protos.v1.bundle_pb2 import Manifest

if TYPE_CHECKING:
    from molehill_edge.added import Added
    from molehill_edge.trust import Admitted

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Numbers:
    """What ``router_bias`` and ``expert_mask`` are about, drawn from a manifest once, since that takes time.

    Attributes:
        usable: Which numbers stand for an expert rather than an empty slot, bool ``[S]``.
        begins: Where each router begins.
        routers: Their names.
    """

    usable: Array
    begins: Array
    routers: tuple[str, ...]

    @classmethod
    def of(cls, manifest: Manifest) -> Numbers:
        """Those of a bundle."""
        names = tuple(router.name for router in manifest.routers)
        return cls(gates.usable(manifest), np.array(gates.starts(manifest)[:-1], np.intp), names)


@dataclass
class Engine:
    """What all views of one bundle share."""

    admitted: Admitted  # keeps the folder there
    manifest: Manifest  # with the experts that are there now
    session: Session
    tokenizer: Tokenizer
    prompts: Prompts | None  # of a causal LM
    rows: dict[tuple[str, int], Array] = field(default_factory=dict)  # of added experts, by gate tensor and slot
    changes: int = 0  # of the experts
    run: experts.RunFolder | None = None
    kept: tuple[Added, ...] = ()  # experts that the store adds at every opening
    numbers: Numbers = field(init=False)

    def __post_init__(self) -> None:
        self.numbers = Numbers.of(self.manifest)

    @property
    def added(self) -> set[int]:
        """Slots whose experts did not come with the bundle."""
        pairs = zip(self.manifest.slots, self.admitted.manifest.slots, strict=True)
        return {i for i, (now, then) in enumerate(pairs) if now.id and now.id != then.id}

    def change(self, manifest: Manifest, rows: dict[tuple[str, int], Array]) -> None:
        """Go on with other experts in the slots; while no call runs (`Session.alone`)."""
        self.manifest, self.numbers, self.rows = manifest, Numbers.of(manifest), rows
        self.changes += 1

    @property
    def folder(self) -> Path:
        """As it was admitted; never written to."""
        return self.admitted.folder


@dataclass(frozen=True)
class Bound:
    """A gate as the graph takes it, for the experts that are there."""

    changes: int
    arrays: Mapping[str, Array]  # kept: the values below only point at them
    inputs: Mapping[str, ort.OrtValue]


def bind(engine: Engine, gate: Gate) -> Bound:
    """Make a gate's inputs, with the rows of added experts and without the experts that are not there.

    Raises:
        BundleError: A router is left without experts.
    """
    changes, manifest, rows = engine.changes, engine.manifest, engine.rows
    changed = {}
    for tensor in manifest.gate if rows else ():
        added = [(slot, row) for (name, slot), row in rows.items() if name == tensor.name]
        if added:
            changed[tensor.name] = gate.tensors[tensor.name].copy()
            members = list(manifest.routers[tensor.router].slots)
            for slot, row in added:
                np.moveaxis(changed[tensor.name], tensor.expert_axis, 0)[members.index(slot)] = row
    if engine.numbers.routers:
        changed[gates.BIAS] = np.ascontiguousarray(gate.bias)
        changed[gates.MASK] = check_mask(engine.numbers, gate)
    both = {**gate.values, **{name: (value(array), array) for name, array in changed.items()}}
    inputs, arrays = ({name: pair[i] for name, pair in both.items()} for i in (0, 1))
    return Bound(changes, arrays, inputs)


class Binding:
    """A gate in use: bound anew when experts come or go.

    Args:
        engine: Of the bundle.
        gate: The gate.

    Raises:
        BundleError: It leaves a router without experts.
    """

    def __init__(self, engine: Engine, gate: Gate) -> None:
        self.gate = gate
        self._engine = engine
        self._bound = bind(engine, gate)

    def now(self) -> Bound:
        """It, for the experts that are there now: while the graph is held (`Session.use`), those it computes with.

        Raises:
            BundleError: It leaves a router without experts.
        """
        bound = self._bound
        if bound.changes != self._engine.changes:
            self._bound = bound = bind(self._engine, self.gate)
        return bound

    def inputs(self) -> Mapping[str, ort.OrtValue]:
        """What `now` feeds to the graph.

        Raises:
            BundleError: It leaves a router without experts.
        """
        return self.now().inputs


def check_mask(numbers: Numbers, gate: Gate) -> Array:
    """The experts that may be chosen, bool ``[S]``, at least one for each router.

    Raises:
        BundleError: A router is left without experts.
    """
    mask: Array = gate.mask & numbers.usable
    left = np.add.reduceat(mask, numbers.begins)
    if not left.all():
        router = numbers.routers[int(left.argmin())]
        raise BundleError(f"gate {gate.name} leaves router {router} without experts", mend="Choose from more experts.")
    return mask


def find_expert(manifest: Manifest, name: str) -> int:
    """The slot of an expert.

    Raises:
        BundleError: No slot has one of this name.
    """
    found = [i for i, slot in enumerate(manifest.slots) if slot.id == name]
    if not found or not name:
        known = ", ".join(slot.id for slot in manifest.slots if slot.id)
        raise BundleError(f"no expert {name!r}", where=manifest.id, mend=f"There are: {known}.")
    return found[0]
