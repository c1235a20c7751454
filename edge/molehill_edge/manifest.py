"""The manifest of a bundle: reading it, and what it must say before anything else of the bundle is opened."""

from __future__ import annotations

import hashlib

from molehill_protos.v1.bundle_pb2 import Manifest

FORMAT = 1
NAME = "manifest.pb"
GRAPH, EXPERTS, GATE, TOKENIZER = "model.onnx", "experts.safetensors", "gate.safetensors", "tokenizer.json"


def layout_digest(manifest: Manifest) -> bytes:
    """SHA-256 over all that a gate or an expert must fit: base, slots, sites, routers and gate tensors."""
    part = Manifest(base=manifest.base, sites=manifest.sites, routers=manifest.routers, gate=manifest.gate)
    part.slots.extend(manifest.slots)
    for slot in part.slots:
        slot.id = ""  # who sits in a slot may change
    return hashlib.sha256(part.SerializeToString(deterministic=True)).digest()
