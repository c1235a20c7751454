"""What the first version wrote, adapters and bundles of format 1: it must be read, and compute the same, for good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from molehill.errors import AdapterError, ConfigError
from molehill_edge.bundle import Bundle
from molehill_edge.trust import InsecureLocal
from molehill_simulation.source import GLOBAL, open_source

SAMPLES = Path(__file__).parents[1] / "samples" / "format_1"
SAID = json.loads((SAMPLES / "logits.json").read_text(encoding="utf-8"))
BASE = str(SAMPLES / "base")
NAMES = ("mixture", "vectors")  # a router with parts that stay with a client; experts that are no low-rank pairs


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_computes_what_it_did(name):
    assert json.loads((SAMPLES / name / "adapter" / "molora.json").read_text(encoding="utf-8"))["format"] == 1
    source = open_source(SAMPLES / name / "adapter", BASE)
    with source.gate(GLOBAL) as model, torch.no_grad():
        for row, wanted in zip(SAID["ids"], SAID[name]["original"], strict=True):
            ids = torch.tensor([row])
            found = model(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)).logits[0]
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_computes_what_it_did(name):
    with Bundle.open(SAMPLES / name / "bundle", trust=InsecureLocal(), threads=1) as bundle:
        for row, wanted in zip(SAID["ids"], SAID[name]["bundle"], strict=True):
            ids = np.array([row], np.int64)
            np.testing.assert_allclose(bundle.forward(ids, np.ones_like(ids), ["logits"])[0][0], wanted, rtol=1e-5)


def test_the_sample_has_the_names_of_then():
    assert not any(".own." in name for name in load_file(SAMPLES / "mixture" / "adapter" / "router.safetensors"))


def test_its_base_is_known_by_its_weights(tmp_path):
    """Settings that shape a model were not in its digest; other weights are another base all the same."""
    other = tmp_path / "base"
    other.mkdir()
    for path in Path(BASE).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    weights = other / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-4] + np.float32(1.5).tobytes())
    with pytest.raises(AdapterError, match="weight digest"):
        open_source(SAMPLES / "mixture" / "adapter", str(other))


def test_a_run_of_then_is_exported_and_what_its_clients_kept_is_not(tmp_path):
    """Its configuration says what no run may say now where it counts; states of clients had another form."""
    shutil.copytree(SAMPLES / "mixture" / "adapter", tmp_path / "adapter")
    shutil.copy(SAMPLES / "config.toml", tmp_path)
    (tmp_path / "clients" / "client-1" / "round-000001").mkdir(parents=True)
    source = open_source(tmp_path, BASE)
    assert source.run is not None
    assert source.run.privacy.threshold == 0.66
    with source.gate(GLOBAL):
        pass
    with pytest.raises(ConfigError, match=r"no personal gate of 'client-1'"), source.gate("client-1"):
        pass
