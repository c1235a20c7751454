"""A folder of adapters: what it was written by, and what was in it before."""

from __future__ import annotations

import json

import pytest
from tiny_models import adapted

from molehill import config
from molehill.errors import AdapterError
from molehill.molora.adapter import Manifest, read_manifest, save_adapter


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
