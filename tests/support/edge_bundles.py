"""Small bundles with a valid manifest; their graph is no graph, since trust opens no session."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface

from molehill_edge import manifest as manifests
from molehill_protos.v1.bundle_pb2 import (
    Base,
    File,
    Form,
    GateTensor,
    Manifest,
    Quantisation,
    Router,
    Runtime,
    Site,
    Slot,
    Task,
)

FILES = {
    "base.bin": b"base" * 500,
    "experts.safetensors": b"experts",
    "gate.safetensors": b"gate",
    "gates/lab-1.safetensors": b"gate of lab-1",
    "model.onnx": b"graph",
    "tokenizer.json": b"{}",
}


def manifest(files: dict[str, bytes] | None = None, /, **fields) -> Manifest:
    """A valid manifest of these files; fields replace those of the message, and the layout digest follows them."""
    made = Manifest(
        format=1,
        id="reviews",
        version=1,
        base=Base(id="tiny", revision="main", digest="ab" * 32),
        task=Task(kind="classification", labels=["bad", "good"], pooling="mean", max_length=64),
        quantisation=Quantisation(base="int8", experts="int8"),
        slots=[Slot(id="e0"), Slot(id="e1"), Slot(), Slot(id="s0", shared=True)],
        sites=[
            Site(
                name="layer.0.q",
                d_in=8,
                d_out=8,
                slots=[0, 1, 2, 3],
                ranks=[2, 2, 2, 4],
                form=Form.GEMM_INT8,
                a="a0",
                b="b0",
            ),
            Site(name="layer.0.v", d_in=8, d_out=4, slots=[0, 1], ranks=[1, 1], form=Form.VECTORS, b="b1"),
        ],
        routers=[Router(name="layer.0.q", slots=[0, 1, 2])],
        gate=[
            GateTensor(name="layer.0.q/-/gate.weight", shape=[3, 8], router=0, expert_axis=0),
            GateTensor(name="head/-/head.bias", shape=[2], router=-1, expert_axis=-1),
        ],
        runtime=Runtime(onnxruntime="1.20", opset=21),
        created=1_700_000_000,
    )
    for path, data in sorted((FILES if files is None else files).items()):
        made.files.append(File(path=path, length=len(data), sha256=hashlib.sha256(data).digest()))
    for name, value in fields.items():
        if isinstance(value, list | tuple):
            made.ClearField(name)
            getattr(made, name).extend(value)
        elif hasattr(value, "CopyFrom"):
            getattr(made, name).CopyFrom(value)
        else:
            setattr(made, name, value)
    if "layout" not in fields:
        made.layout = manifests.layout_digest(made)
    return made


def make_bundle(folder: Path, files: dict[str, bytes] | None = None, **fields) -> Path:
    """The folder of a bundle: the usual files, with some replaced or added."""
    wanted = FILES | (files or {})
    for path, data in wanted.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    (folder / manifests.NAME).write_bytes(manifest(wanted, **fields).SerializeToString(deterministic=True))
    return folder


class Memory(FetcherInterface):
    """A web server without a network: a dictionary of paths and bytes, which a test may change.

    Args:
        folder: A repository that it begins with.
    """

    address = "https://bundles.example/"

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.cut: dict[str, int] = {}  # paths that break off after so many bytes
        self.load(folder)

    def load(self, folder: Path) -> None:
        """Show what a repository holds now."""
        self.files = {
            str(path.relative_to(folder)): path.read_bytes()
            for part in ("metadata", "targets")
            for path in (folder / part).rglob("*")
            if path.is_file()
        }

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = url.removeprefix(self.address)
        self.asked.append(path)
        if path not in self.files:
            raise DownloadHTTPError("not there", 404)
        return self._chunks(path)

    def _chunks(self, path: str) -> Iterator[bytes]:
        data = self.files[path]
        for at in range(0, len(data), 512):
            if path in self.cut and at >= self.cut[path]:
                raise ConnectionResetError("the line is dead")
            yield data[at : at + 512]
