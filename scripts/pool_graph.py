"""Write edge/molehill_edge/pool.onnx: products one after another, on which a device measures its threads.

python scripts/pool_graph.py
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from onnx import TensorProto, helper

PATH = Path(__file__).parents[1] / "edge" / "molehill_edge" / "pool.onnx"
PRODUCTS, WIDTH = 16, 768


def graph() -> bytes:
    """The model: ``y = x w w ...``, ``x [rows, WIDTH]`` and ``w [WIDTH, WIDTH]``."""
    names = ["x", *(f"x{i}" for i in range(1, PRODUCTS)), "y"]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(names)]
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in {"x": ["rows", WIDTH], "w": [WIDTH, WIDTH], "y": ["rows", WIDTH]}.items()
    }
    made = helper.make_graph(nodes, "pool", [values["x"], values["w"]], [values["y"]])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="molehill")
    return model.SerializeToString(deterministic=True)


if __name__ == "__main__":
    PATH.write_bytes(graph())
