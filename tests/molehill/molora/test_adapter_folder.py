"""A folder of adapters: what it was written by, and what was in it before."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_models import adapted, shake

from molehill import config
from molehill.errors import AdapterError
from molehill.molora.adapter import Manifest, load_adapter, read_manifest, save_adapter


def save(folder, experts):
    molora = config.parse({"molora": {"experts": experts, "rank": 2}}).molora
    manifest = Manifest(base={"id": "tiny", "digest": "d"}, task="classification", molora=molora, ranks={})
    save_adapter(folder, adapted("bert", experts=experts, rank=2), manifest)


def test_experts_of_the_adapter_before_do_not_stay(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "experts").iterdir()) == ["e0", "e1"]


@pytest.mark.parametrize("version", [3, 0, "new"])
def test_a_folder_of_another_format_is_refused(tmp_path, version):
    save(tmp_path, 2)
    path = tmp_path / "molora.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": version}))
    with pytest.raises(AdapterError, match=f"its format is {version!r}, not 1 or 2"):
        read_manifest(tmp_path)


def test_an_expert_that_peft_does_not_have_lies_in_a_file_of_its_own(tmp_path):
    keys = {"preset": "houlsby", "experts": 2, "rank": 3}
    section = config.parse({"molora": keys}).molora
    written = shake(adapted("bert", **keys))
    manifest = Manifest(base={"id": "tiny", "digest": "d"}, task="classification", molora=section, ranks={})
    save(tmp_path, 2)  # what was there before goes
    save_adapter(tmp_path, written, manifest)
    assert [path.name for path in (tmp_path / "experts" / "e1").iterdir()] == ["expert.safetensors"]
    read = adapted("bert", **keys)
    load_adapter(tmp_path, read, base_digest="d")
    np.testing.assert_array_equal(read.tree().flat, written.tree().flat)
    (tmp_path / "experts" / "e0").rename(tmp_path / "experts" / "old")
    (tmp_path / "experts" / "e1").rename(tmp_path / "experts" / "e0")
    with pytest.raises(AdapterError, match=r"/e1/dense.* is of another expert than e0"):
        load_adapter(tmp_path, read, base_digest="d")


def test_an_expert_of_another_kind_is_refused(tmp_path):
    save(tmp_path, 2)
    text = tmp_path / "molora.json"
    other = adapted("bert", experts=2, rank=2, expert="bottleneck")
    assert text.exists()
    with pytest.raises(AdapterError, match=r"expert e0 at .* has A, B, its kind has dense\.bias, dense\.down"):
        load_adapter(tmp_path, other, base_digest="d")
