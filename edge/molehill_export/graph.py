"""An ONNX graph under construction: nodes, weights as numpy arrays, and a few ways to change it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from molehill_export.deferred import Weight

MICROSOFT = "com.microsoft"
PAGE = 4096  # external tensors begin on a page, so that the runtime can map them
_INLINE = 1024  # bytes; smaller tensors stay in the graph


class Place(NamedTuple):
    """Where an adapted linear is in a graph.

    Attributes:
        x: Name of its input tensor.
        y: Name of its output tensor, bias included.
        flat: Whether its tokens come one after another, ``[B * T, d]``, and not in rows.
    """

    x: str
    y: str
    flat: bool = False


class External(NamedTuple):
    """Where the bytes of a weight lie beside the graph.

    Attributes:
        file: Name of the file.
        offset: First byte.
        length: Number of bytes.
    """

    file: str
    offset: int
    length: int


@dataclass
class Graph:
    """A graph whose nodes may be in any order until `model` sorts them.

    Attributes:
        nodes: Its nodes.
        tensors: Its weights by name.
        inputs: Its inputs; one that is among the weights as well has them as default.
        outputs: Its outputs.
        places: Its linears that can be adapted, by the name of the module; one place for every time that it runs.
        opsets: Version of every operator domain.
        genai: The configuration of onnxruntime-genai for it, by what built it; None where it was traced.
    """

    nodes: list[onnx.NodeProto]
    tensors: dict[str, Weight]
    inputs: list[onnx.ValueInfoProto]
    outputs: list[onnx.ValueInfoProto]
    opsets: dict[str, int]
    places: dict[str, tuple[Place, ...]] = field(default_factory=dict)
    genai: dict[str, Any] | None = None
    _names: int = 0

    @classmethod
    def of(cls, model: ir.Model, weights: Mapping[str, Weight] | None = None) -> Graph:
        """Take a model apart.

        Args:
            model: The model; it is used up. Tensors share the memory of what it was made from.
            weights: Tensors to take in place of the model's.
        """
        constants = {name: value.const_value for name, value in model.graph.initializers.items()}
        given = weights or {}
        tensors = {name: given[name] if name in given else constant.numpy()
                   for name, constant in constants.items() if constant is not None}  # fmt: skip
        model.graph.initializers.clear()  # so that they are not copied
        proto = ir.serde.serialize_model(model)
        for node in proto.graph.node:  # where it came from: paths of this machine
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
        for value in [*proto.graph.input, *proto.graph.output]:
            value.ClearField("metadata_props")
        opsets = {entry.domain: entry.version for entry in proto.opset_import}
        return cls(list(proto.graph.node), tensors, list(proto.graph.input), list(proto.graph.output), opsets)

    def copy(self) -> Graph:
        """The same graph, to be changed; weights are shared."""
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        tensors, places, opsets = dict(self.tensors), dict(self.places), dict(self.opsets)
        return Graph(nodes, tensors, list(self.inputs), list(self.outputs), opsets, places, self.genai, self._names)

    # ---- building --------------------------------------------------------------------------------------------

    def node(self, op: str, inputs: Sequence[str], *, domain: str = "", out: str = "", **attributes: Any) -> str:
        """Add a node with one output and return its name (``out``, or a new one)."""
        return self.split(op, inputs, 1, domain=domain, out=out, **attributes)[0]

    def split(
        self, op: str, inputs: Sequence[str], n: int, *, domain: str = "", out: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with ``n`` outputs and return their names."""
        name = self.fresh(op)
        outputs = [out] if out else [f"{name}/{i}" for i in range(n)]
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=name, domain=domain, **attributes))
        if domain:
            self.opsets.setdefault(domain, 1)
        return outputs

    def fresh(self, stem: str) -> str:
        """A name that nothing has yet."""
        self._names += 1
        return f"molora/{self._names}/{stem}"

    def const(self, value: Any, dtype: Any = None) -> str:
        """Add a small constant; equal ones are shared."""
        array = np.asarray(value, dtype)
        name = f"molora/const/{array.dtype}{list(array.shape)}/{hash_of(array)}"
        self.tensors.setdefault(name, array)
        return name

    def weight(self, name: str, value: Weight) -> str:
        """Add a weight by name and return the name."""
        self.tensors[name] = value
        return name

    def default_input(self, name: str, value: NDArray[Any]) -> str:
        """Add an input that need not be given, and return its name."""
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        self.inputs.append(helper.make_tensor_value_info(name, kind, value.shape))
        self.tensors[name] = value
        return name

    # ---- changing --------------------------------------------------------------------------------------------

    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node behind every tensor."""
        return {name: node for node in self.nodes for name in node.output if name}

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read a tensor."""
        found = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                found[name].append(node)
        return found

    def between(self, first: str, last: str) -> tuple[Place, ...]:
        """The places of what reads the input of one marked module and adds to the output of another, run by run."""
        pairs = zip(self.places.get(first, ()), self.places.get(last, ()), strict=True)
        return tuple(Place(one.x, other.y, other.flat) for one, other in pairs)

    def rewire(self, old: str, new: str, nodes: Iterable[onnx.NodeProto]) -> None:
        """Have nodes read ``new`` where they read ``old``."""
        for node in nodes:
            for i, name in enumerate(node.input):
                if name == old:
                    node.input[i] = new

    def move(self, name: str) -> str:
        """Let the tensor ``name`` be written under a new name, which is returned, so that another node can write it."""
        hidden = self.fresh("base")
        for node in self.nodes:
            for i, output in enumerate(node.output):
                if output == name:
                    node.output[i] = hidden
        return hidden

    def rename(self, old: str, new: str) -> bool:
        """Let what a node writes as ``old`` be called ``new``; false where no node writes it."""
        writers = [node for node in self.nodes if old in node.output]
        for node in writers:
            node.output[list(node.output).index(old)] = new
            self.rewire(old, new, self.nodes)
        return bool(writers)

    def drop_unused(self) -> None:
        """Remove nodes that no output needs, and weights that no node reads."""
        needed = {value.name for value in self.outputs}
        producers = self.producers()
        todo, keep = list(needed), set()
        while todo:
            node = producers.get(todo.pop())
            if node is not None and id(node) not in keep:
                keep.add(id(node))
                todo.extend(node.input)
        self.nodes = [node for node in self.nodes if id(node) in keep]
        read = {name for node in self.nodes for name in node.input} | {value.name for value in self.inputs}
        self.tensors = {name: value for name, value in self.tensors.items() if name in read}

    # ---- writing ---------------------------------------------------------------------------------------------

    def model(self, external: Mapping[str, External]) -> onnx.ModelProto:
        """The finished model.

        Args:
            external: The weights whose bytes are not in the graph.
        """
        weights = []
        for name, value in sorted(self.tensors.items()):
            if name not in external:
                weights.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
                continue
            where = external[name]
            tensor = onnx.TensorProto(name=name, dims=value.shape, data_location=onnx.TensorProto.EXTERNAL)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
            entries = {"location": where.file, "offset": str(where.offset), "length": str(where.length)}
            tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in entries.items())
            weights.append(tensor)
        graph = helper.make_graph(self._sorted(), "molehill", self.inputs, self.outputs, weights)
        opsets = [helper.make_opsetid(domain, version) for domain, version in sorted(self.opsets.items())]
        # 10 is the newest version that every runtime in use can read
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="molehill")

    def _sorted(self) -> list[onnx.NodeProto]:
        """The nodes in an order in which every input is there before it is read; stable."""
        ready = set(self.tensors) | {value.name for value in self.inputs} | {""}
        waiting: dict[str, list[int]] = defaultdict(list)
        missing = []
        order: list[int] = []
        for index, node in enumerate(self.nodes):
            lacks = {name for name in node.input if name not in ready}
            missing.append(len(lacks))
            for name in lacks:
                waiting[name].append(index)
        todo = [index for index, count in enumerate(missing) if not count]
        while todo:
            index = todo.pop(0)
            order.append(index)
            new = []
            for name in self.nodes[index].output:
                for other in waiting.pop(name, ()):
                    missing[other] -= 1
                    if not missing[other]:
                        new.append(other)
            todo = sorted([*new, *todo]) if new else todo
        assert len(order) == len(self.nodes), "the graph has a cycle or reads what nobody writes"
        return [self.nodes[index] for index in order]


def hash_of(array: NDArray[Any]) -> str:
    """A short name of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def write_weights(tensors: Mapping[str, Weight], path: Path) -> dict[str, External]:
    """Write weights one after the other, each from a page on; equal ones lie there once.

    Args:
        tensors: What to write; small ones are left out and stay in the graph.
        path: The file.

    Returns:
        Where each one is.
    """
    places: dict[str, External] = {}
    known: dict[str, External] = {}
    with path.open("wb") as file:
        for name, value in sorted(tensors.items()):
            if value.nbytes < _INLINE:
                continue
            data = np.ascontiguousarray(value)
            view = data.reshape(-1).view(np.uint8).data  # no copy
            key = hashlib.sha256(view).hexdigest()
            if key not in known:
                file.write(b"\0" * (-file.tell() % PAGE))
                known[key] = External(path.name, file.tell(), data.nbytes)
                file.write(view)
            places[name] = known[key]
    return places
