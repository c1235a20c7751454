"""Shared code asks methods what they are, never what they are called."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from molehill import registry

ROOT = Path(__file__).parents[2]
PARTS = ("molehill", "server", "client", "simulation", "edge")
METHODS = list(registry.methods())
NAMES = {method.name for method in METHODS} | {method.target.__name__ for method in METHODS}
MODULES = {method.target.__module__ for method in METHODS}

# Words that are the name of a method and something else too: what else they are, where, and how many times.
REASONS = {
    "what a configuration says where it says nothing": {
        "molehill/config/sections.py": "classification by_column lora*2 linear top_k output parallel uniform full sft "
        "fedit all factor mean none*3 int4 fp16",
    },
    "what another key stands for": {"molehill/config/sections.py": "fedprox"},
    "a number format of bases, graphs and bundles": {
        "molehill/config/sections.py": "fp32 bf16",
        "molehill/molora/trial.py": "fp32*2",
        "molehill/tasks/base_model.py": "bf16",
        "molehill/tasks/kernels.py": "fp32*3 bf16*10",
        "molehill/tensors.py": "int8",
        "edge/molehill_edge/golden.py": "fp32*2",
        "edge/molehill_edge/manifest.py": "fp32 int8 int4*2",
        "edge/molehill_export/base.py": "fp32",
        "edge/molehill_export/base_quantise.py": "fp32*2 int8 int4*2",
        "edge/molehill_export/beside.py": "fp32*2",
        "edge/molehill_export/commands/export.py": "fp32 int8*2 int4",
        "edge/molehill_export/export.py": "fp32*3 int8*2 int4",
        "edge/molehill_export/static.py": "int4",
        "edge/molehill_export/parity.py": "fp32 int8 int4",
        "edge/molehill_export/products.py": "fp32*4 int8*4 int4*2",
        "simulation/molehill_simulation/beside.py": "fp32",
        "simulation/molehill_simulation/source.py": "fp32",
        "edge/molehill_web/commands/site.py": "int4",
    },
    "a word of OpenAI's API, of llama.cpp's files or of a web server": {
        "edge/molehill_edge/commands/serve.py": "none",
        "edge/molehill_edge/serving/replies.py": "param",
        "edge/molehill_edge/serving/requests.py": "none*2 temperature*2 top_p*2 top_k*2",
        "edge/molehill_export/gguf_lora.py": "lora",
    },
    "a kind of bundle": {
        "molehill/outputs.py": "classification causal-lm regression multi-label token-classification",
        "edge/molehill_edge/serving/replies.py": "classification",
    },
    "what a LoRA of peft, and a model to ask beside another, is for": {
        "molehill/molora/adapter.py": "causal-lm",
        "simulation/molehill_simulation/beside.py": "causal-lm",
    },
    "what rows look like at first sight": {
        "simulation/molehill_simulation/started.py": "classification causal-lm preference multi-label regression "
        "token-classification",
    },
    "what summaries of older versions left out": {"simulation/molehill_simulation/summary.py": "classification*2"},
    "a measure of numbers": {"molehill/tasks/regression.py": "mae*2"},
    "a word of torch": {"molehill/molora/likelihoods.py": "none"},
    "where clients run": {
        "simulation/molehill_simulation/commands/simulate.py": "local*3",
        "simulation/molehill_simulation/simulate.py": "local*6",
    },
    "a stage of a client's scores": {
        "server/molehill_server/validation.py": "local",
        "client/molehill_client/baselines.py": "local",
        "client/molehill_client/remembered.py": "local",
        "client/molehill_client/scoring.py": "local",
        "client/molehill_client/commands/client.py": "local",
        "simulation/molehill_simulation/figures.py": "local",
    },
    "a course of the learning rate": {
        "molehill/config/sections.py": "linear",
        "client/molehill_client/trainer.py": "linear*2",
        "client/molehill_client/workbench.py": "linear",
    },
    "how classes count": {"molehill/config/sections.py": "none*2"},
    "a way to pool": {
        "molehill/config/sections.py": "mean",
        "molehill/molora/head.py": "mean",
        "molehill/tasks/base_model.py": "mean",
        "edge/molehill_edge/manifest.py": "mean",
        "edge/molehill_export/elsewhere.py": "mean",
    },
    "an operator of a graph": {"edge/molehill_export/routers.py": "Mean"},
    "a column of rows or of a table": {
        "molehill/tasks/causal_lm.py": "output*2",
        "molehill/rowfiles/readings.py": "output*2",
        "simulation/molehill_simulation/summary.py": "median",
        "simulation/molehill_simulation/report.py": "mean",
        "simulation/molehill_simulation/ui.py": "mean*2",
        "edge/molehill_edge/commands/bench.py": "median*2",
        "edge/molehill_edge/examples.py": "output",
        "edge/molehill_export/commands/probe.py": "mean",
    },
    "a section of the configuration": {
        "molehill/config/whole.py": "molora*3",
        "simulation/molehill_simulation/report.py": "molora*4",
    },
    "a part of a transformer layer": {
        "molehill/molora/build.py": "attention",
        "molehill/tasks/kernels.py": "attention",
    },
    "a word of people": {"molehill/tasks/measures.py": "ppl"},
    "what a first configuration begins with": {
        "simulation/molehill_simulation/started.py": "output*2 iid linear fedit int8 by_column dense top_k leaning "
        "alike clusters",
    },
    "how the rows of one owner are dealt": {"simulation/molehill_simulation/newcomer.py": "iid"},
    "what answers when nobody chooses": {"molehill/decoding/__init__.py": "own_logits"},
    "a function or an option of a verb": {
        "molehill/config/__init__.py": "load",
        "molehill/__init__.py": "load",
        "molehill/registry.py": "load",
        "edge/molehill_edge/commands/run.py": "temperature top_k top_p",
        "edge/molehill_export/commands/export.py": "all",
    },
    "said, or read, where there is nothing": {
        "molehill/characters.py": "none",
        "molehill/molora/feed_forward.py": "none",
        "molehill/molora/targets.py": "none",
        "molehill/registry.py": "none",
        "molehill/tasks/labels.py": "none",
        "client/molehill_client/commands/client.py": "none",
        "client/molehill_client/deploy/join.py": "none",
        "simulation/molehill_simulation/describe.py": "none",
        "simulation/molehill_simulation/shards.py": "none",
        "edge/molehill_edge/fetch.py": "none",
        "edge/molehill_edge/fetch_experts.py": "none",
        "edge/molehill_edge/store.py": "none",
        "edge/molehill_export/expert_targets.py": "none",
    },
    "a word of another library": {
        "molehill/gateway.py": "none",
        "molehill/tasks/kernels.py": "none",
        "molehill/molora/peft_folder.py": "gaussian none*3",
    },
    "what a PEFT folder of a LoRA is": {
        "molehill/molora/adapter.py": "lora",
        "molehill/molora/peft_folder.py": "lora",
    },
    "a word of the field that leads to an axis": {"molehill/molora/experts/__init__.py": "lora"},
    "a kind of tensor, or a part of its name": {
        "molehill/molora/adapter.py": "dense",
        "molehill/wire/keys.py": "dense residual",
        "server/molehill_server/check/assignments.py": "dense",
        "server/molehill_server/check/model.py": "dense",
    },
    "a kind of sampling, as the field calls it": {"molehill/draws.py": "poisson*4"},
    "a field of a message": {"molehill/evidence.py": "tree"},
    "a figure of a round": {"server/molehill_server/aggregate.py": "residual"},
    "an older name of a gate policy": {
        "molehill/config/sections.py": "mixture",
        "simulation/molehill_simulation/source.py": "mixture",
    },
}


def allowed() -> Counter[tuple[str, str]]:
    """Uses with a reason, by word and file."""
    found: Counter[tuple[str, str]] = Counter()
    for files in REASONS.values():
        for name, words in files.items():
            for each in words.split():
                word, _, count = each.partition("*")
                found[word, name] += int(count or 1)
    return found


def registers(tree: ast.Module) -> bool:
    """Whether a module holds a method."""
    decorators = [
        each
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        for each in node.decorator_list
    ]
    return any(
        isinstance(each, ast.Call) and ast.unparse(each.func).split(".")[-1] == "register" for each in decorators
    )


def shared():
    """All modules that register no method."""
    for part in PARTS:
        for path in sorted((ROOT / part).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if not registers(tree):
                yield path.relative_to(ROOT).as_posix(), tree


def said(text: str) -> list[str]:
    """The names of methods that a string is, alone or in a row, or has in quotes."""
    words = re.split(r"[\s,]+", text.strip())
    if all(word in NAMES for word in words):
        return words
    return [word for word in re.findall(r"['\"](\w+)['\"]", text) if word in NAMES]


def named(tree):
    """Every name of a method in a string that is no docstring, and every import of a method's module, with its line."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield from ((word, node.lineno) for word in said(node.value))
        elif isinstance(node, ast.ImportFrom):
            paths = [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
            yield from ((path, node.lineno) for path in paths if path in MODULES)
        elif isinstance(node, ast.Import):
            yield from ((each.name, node.lineno) for each in node.names if each.name in MODULES)


def test_shared_code_asks_no_names():
    found: dict[tuple[str, str], list[int]] = {}
    for name, tree in shared():
        for word, line in named(tree):
            found.setdefault((word, name), []).append(line)
    counts = allowed()
    strange = [
        f"{name}:{','.join(map(str, lines))}: {word!r} {len(lines)} times, with a reason {counts[word, name]}"
        for (word, name), lines in found.items()
        if len(lines) > counts[word, name]
    ]
    assert not strange, "declare an attribute on the method instead, or give a reason here:\n" + "\n".join(strange)
    gone = [key for key, count in counts.items() if len(found.get(key, ())) < count]
    assert not gone, "reasons for what is not there any more"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("if config.rule.name == 'krum': pass", ["krum"]),
        ("if name in ('krum', 'other'): pass", ["krum"]),
        ("match name:\n case 'krum': pass", ["krum"]),
        ("registry.build('rule', 'krum')", ["krum"]),
        ("registry.build('rule', name='krum')", ["krum"]),
        ("MethodRef(name='fp32')", ["fp32"]),
        ("TABLE['krum']", ["krum"]),
        ("table.get('krum')", ["krum"]),
        ("{'krum': 1}.get(name)", ["krum"]),
        ("frozenset({'krum', 'other'})", ["krum"]),
        ("ROBUST = ('krum', 'other')\nif name in ROBUST: pass", ["krum"]),
        ("'krum multi_krum'.split()", ["krum", "multi_krum"]),
        ("name.startswith('krum')", ["krum"]),
        ("type(rule).__name__ == 'Krum'", ["Krum"]),
        ("from molehill_server.aggregation.rules.krum import Krum", ["molehill_server.aggregation.rules.krum"]),
        ("from molehill_server.aggregation.rules import krum", ["molehill_server.aggregation.rules.krum"]),
        ("import molehill_server.aggregation.rules.krum as k", ["molehill_server.aggregation.rules.krum"]),
        ("raise ValueError(f\"{why}; use rule 'krum'\")", ["krum"]),
        ("'''What krum does: 'krum'.'''\nprint('as krum does')", []),
    ],
)
def test_what_counts_as_naming(code, found):
    assert [word for word, _ in named(ast.parse(code))] == found


def test_a_module_is_left_out_for_what_it_registers_and_not_for_what_it_says():
    assert registers(ast.parse("@registry.register('rule', 'a', paper='')\nclass A: ..."))
    assert not registers(ast.parse("'''@register('rule', 'a')'''"))
    assert "molehill/registry.py" in dict(shared())
