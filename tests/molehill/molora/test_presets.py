from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from molehill import config, registry
from molehill.molora.presets.targets import FFN, KEY_VALUE_FFN_IN

PRESETS = [method.name for method in registry.methods("preset")]
FILES = Path(__file__).parents[3] / "configs" / "methods"

LLAMA = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
BERT = (
    "attention.self.query attention.self.key attention.self.value attention.output.dense "
    "intermediate.dense output.dense"
)
GPT2 = "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_valid_section(name):
    keys = registry.build("preset", name)
    section = config.parse({"molora": {"preset": name}}).molora
    assert section == config.parse({"molora": {"preset": name, **keys}}).molora
    assert set(keys) <= set(config.MoLoRA.model_fields) - {"preset"}
    assert section.preset == name


def test_keys_beside_a_preset_win():
    section = config.parse(
        {"molora": {"preset": "loramoe", "experts": 3, "selector": {"name": "top_k", "k": 1}}}
    ).molora
    assert (section.experts, section.rank, section.selector.params) == (3, 4, {"k": 1})


def test_no_two_presets_are_the_same_recipe():
    recipes = [
        config.parse({"molora": {"preset": name}}).molora.model_dump_json(exclude={"preset"}) for name in PRESETS
    ]
    assert len(set(recipes)) == len(PRESETS)


def test_a_preset_is_fresh_every_time():
    registry.build("preset", "mola")["experts"] = 99
    assert registry.build("preset", "mola")["experts"] == 5


@pytest.mark.parametrize(
    ("pattern", "family", "expected"),
    [
        (FFN, LLAMA, "mlp.gate_proj mlp.up_proj mlp.down_proj"),
        (FFN, BERT, "intermediate.dense output.dense"),
        (FFN, GPT2, "mlp.c_fc mlp.c_proj"),
        (KEY_VALUE_FFN_IN, LLAMA, "self_attn.k_proj self_attn.v_proj mlp.up_proj"),
        (KEY_VALUE_FFN_IN, BERT, "attention.self.key attention.self.value intermediate.dense"),
        (KEY_VALUE_FFN_IN, GPT2, "attn.c_attn mlp.c_fc"),
    ],
)
def test_shared_patterns_match_an_end_of_the_path(pattern, family, expected):
    hits = [n for n in family.split() if re.search(rf"(?:^|\.)(?:{pattern[0]})$", f"model.layers.3.{n}")]
    assert hits == expected.split()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_configuration_that_cites_its_paper(name):
    path = FILES / f"{name}.toml"
    text = path.read_text(encoding="utf-8")
    assert registry.get("preset", name).url in text
    assert tomllib.loads(text)["molora"]["preset"] == name
    assert config.load(path).molora == config.parse({"molora": {"preset": name}}).molora


def test_no_configuration_without_a_preset():
    assert sorted(path.stem for path in FILES.glob("*.toml")) == sorted(PRESETS)
