"""From small torch modules to pieces of a graph, so that a bundle computes what training computed."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset21 as op
from torch import nn

from molehill.errors import ModelError
from molehill_export.graph import Graph

OPSET = 21
DYNAMIC = torch.export.Dim.DYNAMIC
_cache: dict[Hashable, Piece] = {}


@dataclass(frozen=True)
class Piece:
    """A traced module.

    Attributes:
        model: Its graph.
    """

    model: onnx.ModelProto

    def insert(self, into: Graph, inputs: Sequence[str]) -> list[str]:
        """Copy the nodes into a graph.

        Args:
            into: The graph.
            inputs: Names there of the module's inputs.

        Returns:
            Names there of its outputs.
        """
        graph = self.model.graph
        prefix = into.fresh("piece")
        names = {"": "", **dict(zip((value.name for value in graph.input), inputs, strict=True))}
        for tensor in graph.initializer:
            value = onnx.numpy_helper.to_array(tensor)
            names[tensor.name] = into.const(value)
        for node in graph.node:
            new = copy.deepcopy(node)
            new.ClearField("metadata_props")
            new.ClearField("doc_string")
            new.name = f"{prefix}/{node.name}"
            for i, name in enumerate(node.input):
                new.input[i] = names[name]
            for i, name in enumerate(node.output):
                names[name] = f"{prefix}/{name}" if name else ""
                new.output[i] = names[name]
            into.nodes.append(new)
        return [names[value.name] for value in graph.output]


def piece(key: Hashable, module: nn.Module, args: tuple[Any, ...], dynamic: Sequence[Any]) -> Piece:
    """Trace a module, once per key.

    Args:
        key: Says all that the nodes depend on.
        module: The module.
        args: An example of its inputs; axes of the examples that are dynamic must be longer than 1.
        dynamic: The axes of every input that vary, nested as the inputs are.
    """
    if key not in _cache:
        _cache[key] = Piece(_with_short_zeros(ir.serde.serialize_model(export(module, args, dynamic))))
    return _cache[key]


def _with_short_zeros(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write float32 zeros in the shape of a tensor as that tensor times zero: one small node in place of two."""
    graph = model.graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    floats = {v.name for v in graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    shapes = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Shape" and not any(a.name == "end" or (a.name == "start" and a.i) for a in node.attribute)
    }
    for node in graph.node:
        zero = values.get(node.input[0]) if node.op_type == "Expand" else None
        if zero is not None and zero.dtype == np.float32 and zero.size == 1 and not zero.any():
            like = shapes.get(node.input[1], "")
            if like in floats:
                node.op_type = "Mul"
                node.input[1] = like
    return model


def export(
    module: nn.Module,
    args: tuple[Any, ...],
    dynamic: Sequence[Any],
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> ir.Model:
    """Trace a module with torch's exporter.

    Args:
        module: In eval mode.
        args: An example of its inputs.
        dynamic: The axes of every input that vary.
        inputs: Names for the inputs.
        outputs: Names for the outputs.

    Raises:
        ModelError: Torch cannot trace it.
    """
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(), args, dynamo=True, dynamic_shapes=tuple(dynamic), opset_version=OPSET, verbose=False,
                input_names=inputs, output_names=outputs,
                custom_translation_table={torch.ops.aten.sort.stable: _sort},
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        said = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
        reason = " ".join(said[: 2 if said and said[0].endswith(":") else 1])
        raise ModelError(
            f"this kind of model cannot be written as a graph for devices; the tracer says of the "
            f"{type(module).__name__.lstrip('_').lower()}: {reason}",
            mend="`molehill check` says beforehand which bases are known to go to devices.",
        ) from error
    assert program is not None
    return program.model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the exporter says of itself from the user."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _sort(self: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:  # noqa: ARG001  (the parameters of what it stands for)
    """A stable sort, which torch's exporter lacks: equal values keep their order in TopK too."""
    size = cast("Any", op).Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)
