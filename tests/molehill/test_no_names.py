"""Shared code asks methods what they are, never what they are called."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from molehill import registry

ROOT = Path(__file__).parents[2]
PARTS = ("molehill", "server", "client", "simulation", "edge")
NAMES = {method.name for method in registry.methods()}

# Words that are the name of a method and something else too: what else they are, and where.
REASONS = {
    "a number format of bases, graphs and bundles": {
        "molehill/tasks/base_model.py": "bf16",
        "edge/molehill_edge/golden.py": "fp32",
        "edge/molehill_edge/manifest.py": "int4",
        "edge/molehill_export/base_quantise.py": "fp32 int4",
        "edge/molehill_export/export.py": "fp32 int4",
        "edge/molehill_export/beside.py": "fp32",
        "edge/molehill_export/products.py": "fp32 int4 int8",
    },
    "where clients run": {
        "simulation/molehill_simulation/commands/simulate.py": "local",
        "simulation/molehill_simulation/simulate.py": "local",
    },
    "a course of the learning rate": {"client/molehill_client/trainer.py": "linear"},
    "a way to pool": {"edge/molehill_edge/manifest.py": "mean"},
    "a column": {"molehill/tasks/schema.py": "output", "edge/molehill_edge/commands/bench.py": "median"},
    "a section of the configuration": {"simulation/molehill_simulation/report.py": "molora"},
    "peft's word for no biases": {"molehill/molora/peft_folder.py": "none"},
    "what a PEFT folder of a LoRA is": {"molehill/molora/adapter.py": "lora"},
    "what selectors declare that a draw is counted as": {
        "molehill/secure/company.py": "poisson",
        "server/molehill_server/check/draw.py": "poisson",
        "server/molehill_server/privacy/draw.py": "poisson",
    },
    "an older name of a gate policy": {
        "molehill/config/sections.py": "mixture",
        "edge/molehill_export/source.py": "mixture",
    },
}
ALLOWED = {(word, name) for files in REASONS.values() for name, words in files.items() for word in words.split()}


def shared():
    """All modules that register no method."""
    for part in PARTS:
        for path in sorted((ROOT / part).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if "@register(" not in text:
                yield path.relative_to(ROOT).as_posix(), ast.parse(text)


def asked(tree):
    """String literals that something is compared with, matched against or looked up by; with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("registry.build", "registry.get")):
            parts = node.args[1:2]
        else:
            continue
        for part in parts:
            for each in part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part]:
                if isinstance(each, ast.Constant) and each.value in NAMES:
                    yield each.value, each.lineno


def test_shared_code_asks_no_names():
    found = [(word, name, line) for name, tree in shared() for word, line in asked(tree)]
    strange = [f"{name}:{line}: {word!r}" for word, name, line in found if (word, name) not in ALLOWED]
    assert not strange, "declare an attribute on the method instead, or give a reason here"
    assert {(word, name) for word, name, _ in found} >= ALLOWED, "reasons for what is not there any more"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("if config.rule.name == 'krum': pass", ["krum"]),
        ("if name in ('krum', 'other'): pass", ["krum"]),
        ("match name:\n case 'krum': pass", ["krum"]),
        ("registry.build('rule', 'krum')", ["krum"]),
        ("print('krum')", []),
    ],
)
def test_what_counts_as_asking(code, found):
    assert [word for word, _ in asked(ast.parse(code))] == found
