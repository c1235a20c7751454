"""How experts are stored in a bundle: rounded, padded to its ranks, and as files."""

from __future__ import annotations

import numpy as np
import pytest

from molehill.errors import BundleError
from molehill_edge import experts, tensors
from molehill_edge.quantise import output_scale, pack4, quantise, unpack4
from molehill_protos.v1 import bundle_pb2 as pb

RANKS, D_IN, D_OUT = [2, 3, 2], 40, 24


def _stored(form, rng):
    """Two sites that share a tensor of A, in a form, and their file."""
    total = sum(RANKS)
    a = rng.standard_normal((D_IN, 2 * total)).astype(np.float32)
    b = {name: rng.standard_normal((total, D_OUT)).astype(np.float32) for name in ("one", "two")}
    blocks = {"a_block": 32, "b_block": 16} if form == pb.GEMM_INT4 else {}
    manifest = pb.Manifest()
    values = {}
    for i, (name, factor) in enumerate(b.items()):
        manifest.sites.add(
            name=name, d_in=D_IN, d_out=D_OUT, slots=[0, 1, 2], ranks=RANKS, form=form, a="A", a_start=i * total,
            b=f"{name}/B", **blocks,
        )  # fmt: skip
        values[f"{name}/B"] = factor
    if form == pb.GEMM_FP32:
        values["A"] = a
    elif form == pb.ROWS_FP32:
        values["A"] = np.ascontiguousarray(a.T)
    elif form == pb.ROWS_INT8:
        values["A"], values["A.scale"] = experts.rows8(a.T)
        for name, factor in b.items():
            values[f"{name}/B"], values[f"{name}/B.scale"] = experts.rows8(factor)
    else:
        bits, block = (8, None) if form == pb.GEMM_INT8 else (4, 32)
        parts = []
        for i, name in enumerate(b):
            scale = output_scale(b[name])
            parts.append(quantise(a[:, i * total : (i + 1) * total], b[name], scale, bits, block))
            values[f"{name}/B"] = parts[-1].b if bits == 8 else pack4(parts[-1].b, 16)
            values[f"{name}/B.scale"] = scale if bits == 8 else np.repeat(scale[:, None], 1, 1)
        whole = np.concatenate([part.a for part in parts], 1)
        scales = np.concatenate([part.a_scale for part in parts], -1)
        values["A"] = whole if bits == 8 else pack4(whole, 32)
        values["A.scale"] = scales if bits == 8 else np.ascontiguousarray(scales.T)
    for i in range(3):
        manifest.slots.add(id="" if i == 1 else f"e{i}")
    return manifest, tensors.pack(values, {})[0]


def _deltas(form, data):
    """``x -> delta`` of every rank and site as the graph computes it: ``[rank, d_in, d_out]``."""
    values = experts.views(bytearray(data))
    out = {}
    total = sum(RANKS)
    for i, name in enumerate(("one", "two")):
        part = slice(i * total, (i + 1) * total)
        if form == pb.GEMM_FP32:
            a, b = values["A"][:, part], values[f"{name}/B"]
        elif form == pb.ROWS_FP32:
            a, b = values["A"][part].T, values[f"{name}/B"]
        elif form == pb.ROWS_INT8:
            a = (values["A"][part] * values["A.scale"][part, None]).T
            b = values[f"{name}/B"] * values[f"{name}/B.scale"][:, None]
        elif form == pb.GEMM_INT8:
            a = values["A"][:, part] * values["A.scale"][part]
            b = values[f"{name}/B"] * values[f"{name}/B.scale"]
        else:
            whole = unpack4(values["A"], D_IN)[:, part]
            a = whole * np.repeat(values["A.scale"][part].T, 32, 0)[:D_IN]
            b = unpack4(values[f"{name}/B"], total) * values[f"{name}/B.scale"][:, 0]
        out[name] = np.einsum("dr,ro->rdo", a, b)
    return out


@pytest.mark.parametrize(
    ("form", "error"),
    [(pb.GEMM_FP32, 0), (pb.ROWS_FP32, 0), (pb.ROWS_INT8, 0.03), (pb.GEMM_INT8, 0.03), (pb.GEMM_INT4, 0.5)],
)
def test_an_expert_goes_to_its_ranks_and_nowhere_else(form, error):
    rng = np.random.default_rng(0)
    manifest, data = _stored(form, rng)
    shapes = {"A": (3, D_IN), "B": (D_OUT, 3)}
    sites = {
        name: {role: rng.standard_normal(shape).astype(np.float32) for role, shape in shapes.items()}
        for name in ("one", "two")
    }
    expert = experts.Expert("owls", sites, {})
    assert experts.find_slot(expert, manifest, "") == 1
    placed = experts.place(expert, 1, manifest, data)
    assert len(placed) == len(data)
    before, after = _deltas(form, data), _deltas(form, placed)
    for name, factors in sites.items():
        keep = [0, 1, 5, 6]
        assert np.array_equal(after[name][keep], before[name][keep])
        wanted = np.einsum("rd,or->rdo", factors["A"], factors["B"])
        assert np.abs(after[name][2:5] - wanted).max() <= error * np.abs(wanted).max()
    cleared = _deltas(form, experts.clear(1, manifest, placed))
    assert all(
        not cleared[name][2:5].any() and np.array_equal(cleared[name][keep], after[name][keep]) for name in sites
    )


@pytest.mark.parametrize("form", [pb.VECTORS, pb.TENSORS])
def test_vectors_of_older_bundles_and_of_newer_ones(form):
    manifest = pb.Manifest()
    manifest.base.digest = "d"
    site = manifest.sites.add(name="v", d_in=4, d_out=3, slots=[0, 1], ranks=[1, 1], form=form)
    if form == pb.VECTORS:
        site.b = "v/b"
    else:
        site.tensors.add(role="dense.v", name="v/b", by_rank=True, shape=[3])
    manifest.slots.add(id="a")
    manifest.slots.add()
    data = tensors.pack({"v/b": np.ones((2, 3), np.float32)}, {})[0]
    about = {"format": "1", "kind": "expert", "id": "owls", "base": "d"}
    for name in ("v/v", "v/dense.v"):  # as older versions named it, and as it is named now
        file = tensors.pack({name: np.full((1, 3), 5, np.float32)}, about)[0]
        expert = experts.parse(file, manifest, "")
    placed = experts.place(expert, experts.find_slot(expert, manifest, ""), manifest, data)
    assert experts.views(bytearray(placed))["v/b"].tolist() == [[1, 1, 1], [5, 5, 5]]


def test_a_damaged_file_of_experts():
    for data in (b"", b"\xff" * 20, b"\x02" + b"\0" * 7 + b"[]"):
        with pytest.raises(BundleError, match=r"experts.safetensors: damaged"):
            experts.views(bytearray(data))


@pytest.mark.parametrize("form", [pb.GEMM_INT8, pb.GEMM_INT4])
def test_an_expert_too_large_to_be_rounded(form):
    rng = np.random.default_rng(0)
    manifest, data = _stored(form, rng)
    huge = {"A": np.full((3, D_IN), 3e38, np.float32), "B": np.full((D_OUT, 3), 3e38, np.float32)}
    sites = dict.fromkeys(("one", "two"), huge)
    with pytest.raises(BundleError, match=r"expert owls has numbers at one that are too large"):
        experts.place(experts.Expert("owls", sites, {}), 1, manifest, data)
