"""Experts elsewhere: what peft and Transformers open by themselves answers as the run does."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from types import SimpleNamespace

import peft
import pytest
import tiny_models
import tiny_world
import torch
import transformers
from typer.testing import CliRunner

from molehill import config
from molehill.cli import app
from molehill.errors import BundleError, ModelError
from molehill.molora.adapter import Manifest, save_adapter
from molehill.molora.build import wrap
from molehill.tasks.base_model import load_base
from molehill_export.elsewhere import Wanted, write_elsewhere
from molehill_simulation.loaded import Loaded
from molehill_simulation.simulate import simulate
from molehill_simulation.source import open_source

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning"),
]
PROMPTS = [[1, 20, 21, 22, 23, 2], [1, 9, 14]]
LLAMA = {"targets": ["q_proj", "down_proj"], "experts": 3, "rank": 2, "selector": "dense"}


def adapter(folder, family, section, gate=0.0, scale=0.3):
    """An adapter of noise for a tiny base, with routers as sharp as said; returns where both are."""
    base = tiny_world.save_base(folder / "base", family, initializer_range=0.2)
    loaded = load_base(
        config.Base(model=str(base), precision="fp32", device="cpu"), config.Task(kind="causal-lm", max_length=32)
    )
    molora = config.parse({"molora": section}).molora
    model = tiny_models.shake(wrap(loaded.model, molora), scale=scale)
    with torch.no_grad():
        for group in model.routers.values():
            for parameter in group.router.parameters():
                parameter.mul_(gate)
    origin = {"id": loaded.info.id, "revision": "", "digest": loaded.info.digest}
    save_adapter(folder / "adapter", model, Manifest(base=origin, task="causal-lm", molora=molora, ranks={}))
    return folder / "adapter", str(base)


def asked(place, who):
    """Logits after the last token of each prompt, as somebody."""
    with Loaded(open_source(*place), who) as model:
        return [torch.from_numpy(model.passes.logits(ids)) for ids in PROMPTS]


def opened(folder, made):
    """What the class says that was named, after each prompt."""
    library = peft if "Peft" in made.opens else transformers
    model = getattr(library, made.opens).from_pretrained(folder).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0, -1].float() for ids in PROMPTS]


@pytest.mark.parametrize("merged", [False, True], ids=["peft", "merged"])
@pytest.mark.parametrize(
    ("family", "section"),
    [
        ("llama", {**LLAMA, "shared": 1}),
        ("gpt2", {**LLAMA, "targets": ["c_attn", "mlp.c_proj"]}),
        ("llama", {**LLAMA, "expert": "ia3"}),
        ("llama", {"preset": "mixlora", "experts": 2, "rank": 2, "targets": ["q_proj", "gate_proj", "up_proj",
                                                                             "down_proj"]}),
        ("llama", {"preset": "lora", "targets": ["q_proj"], "rank": 2}),
    ],
    ids=["llama with an expert that is always on", "gpt2", "vectors", "blocks", "one lora"],
)  # fmt: skip
def test_an_expert_answers_as_it_does_here(tmp_path, family, section, merged):
    place = adapter(tmp_path, family, section, gate=1.0)
    one = section.get("preset") == "lora"
    source = open_source(*place)
    made = write_elsewhere(source, tmp_path / "out", Wanted(None if one else "e1", merged=merged))
    assert made.opens == ("AutoModelForCausalLM" if merged else "AutoPeftModelForCausalLM")
    assert made.base == ("" if merged else place[1])
    assert (tmp_path / "out/adapter_config.json").exists() is not merged
    assert made.rank == (None if merged else json.loads((tmp_path / "out/adapter_config.json").read_text()).get("r"))
    want, plain = asked(place, "global" if one else "e1"), asked(place, "base")
    for ours, theirs, base in zip(want, opened(tmp_path / "out", made), plain, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
        assert (ours - base).abs().max() > 0.01
    if not one:
        assert (want[0] - asked(place, "e0")[0]).abs().max() > 0.01
    ours, theirs = source.tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("was it good").input_ids == ours("was it good").input_ids
    assert theirs.chat_template == ours.chat_template
    run = re.search(r"^```python\n(.*?)^```", (tmp_path / "out/README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    said = {}
    exec(run.replace('folder = "."', f"folder = {str(tmp_path / 'out')!r}"), said)
    assert said["logits"].shape[-1] == 64


@pytest.mark.parametrize("merged", [False, True], ids=["peft", "merged"])
@pytest.mark.parametrize(
    "section",
    [{**LLAMA, "shared": 1}, {**LLAMA, "expert": "ia3"},
     {**LLAMA, "mixer": "param", "scorer": {"name": "task_table", "tasks": 1}}],
    ids=["outputs", "vectors", "parameters"],
)  # fmt: skip
def test_a_gate_that_always_says_the_same_is_folded_exactly(tmp_path, section, merged):
    place = adapter(tmp_path, "llama", section)
    made = write_elsewhere(open_source(*place), tmp_path / "out", Wanted(gate="global", merged=merged))
    assert made.fixed.exact
    for ours, theirs in zip(asked(place, "global"), opened(tmp_path / "out", made), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert "token by token" not in (tmp_path / "out/README.md").read_text()


def test_a_mean_that_is_another_model_is_refused_unless_somebody_insists(tmp_path):
    place = adapter(tmp_path, "llama", LLAMA, gate=60.0, scale=1.0)
    with pytest.raises(BundleError, match=r"a fixed mixture would not be this model.*or insist with --force"):
        write_elsewhere(open_source(*place), tmp_path / "out", Wanted(gate="global", merged=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    wanted = Wanted(gate="global", merged=True, force=True)
    made = write_elsewhere(open_source(*place), tmp_path / "out", wanted)
    assert not made.fixed.exact
    assert "The run chooses experts token by token" in (tmp_path / "out/README.md").read_text()


def test_what_neither_library_has_is_refused_by_name(tmp_path):
    place = adapter(tmp_path, "llama", {**LLAMA, "expert": "bottleneck"})
    with pytest.raises(ModelError, match=r"peft has no bottleneck experts like these. Try --merged"):
        write_elsewhere(open_source(*place), tmp_path / "out", Wanted("e0"))
    with pytest.raises(ModelError, match="a bottleneck expert is no change of a weight here"):
        write_elsewhere(open_source(*place), tmp_path / "out", Wanted("e0", merged=True))
    shutil.rmtree(place[0].parent / "base")
    place = adapter(
        tmp_path, "llama", {**LLAMA, "expert": {"name": "bottleneck", "activation": "none", "source": "input"}}
    )
    with pytest.raises(ModelError, match="a bottleneck expert adds a bias, and the base has none here"):
        write_elsewhere(open_source(*place), tmp_path / "out", Wanted("e0", merged=True))
    assert not (tmp_path / "out").exists()


def test_a_whole_model_is_as_its_base_was_but_for_the_weights(tmp_path, monkeypatch):
    place = adapter(tmp_path, "llama", LLAMA)
    base = tmp_path / "base"
    model = transformers.AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16)
    model.generation_config.top_k = 7
    model.generation_config.do_sample = True
    model.save_pretrained(base)
    info = load_base(
        config.Base(model=str(base), precision="fp32", device="cpu"), config.Task(kind="causal-lm", max_length=32)
    ).info
    said = json.loads((place[0] / "molora.json").read_text())
    said["base"]["digest"] = info.digest
    said["files"] = {}
    (place[0] / "molora.json").write_text(json.dumps(said))
    words = ["expert", str(place[0]), "e1", "--base", place[1], "--merged", "--json"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "small")])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["opens"], told["base"], told["dtype"]) == ("AutoModelForCausalLM", None, "bfloat16")
    assert told["bytes"] == sum(path.stat().st_size for path in (tmp_path / "small").iterdir())
    done = CliRunner().invoke(app, [*words, "--float32", "--out", str(tmp_path / "exact")])
    assert json.loads(done.stdout)["dtype"] == "float32"
    want = asked(place, "e1")
    for name, near in (("small", 0.1), ("exact", 1e-4)):
        for ours, theirs in zip(want, opened(tmp_path / name, SimpleNamespace(**told)), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=near, atol=near)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert made.dtype == torch.bfloat16
    assert made.config.use_cache
    assert (made.generation_config.top_k, made.generation_config.do_sample) == (7, True)
    assert made.generation_config.eos_token_id == [2]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "small")])
    assert (done.exit_code, json.loads(done.stdout)["error"]["what"]) == (2, "there is something already")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1, free=1000))
    done = CliRunner().invoke(app, [*words[:-1], "--out", str(tmp_path / "new")])
    assert done.exit_code == 11
    assert re.search(r"the folder needs [\d,]+ bytes, and 1,000 are free\. Make room", done.stderr)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "nothing to write. Give --out DIR."),
        (["--out", "x"], "which experts is not said. Name one (e0, e1, e2), or give --as CLIENT|global"),
        (["e9", "--out", "x"], "there is no expert 'e9'. There are e0, e1, e2."),
        (["--as", "nobody", "--out", "x"], "there is no personal gate of 'nobody'"),
        (["e0", "--out", "x", "--float32"], "--float32: an adapter is in float32 as it is. It goes with --merged."),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, monkeypatch, words, why):
    place = adapter(tmp_path, "llama", LLAMA)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["expert", str(place[0]), "--base", place[1], *words])
    assert done.exit_code == 2, done.output
    assert why in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A finished run of a classifier, every client with a gate and a head of its own."""
    folder = tmp_path_factory.mktemp("run")
    base = tiny_world.save_base(folder / "bert", "bert", initializer_range=0.2)
    source = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(30))
    settings = tiny_world.config(
        base, source, run={"rounds": 1}, train={"lr": 0.2}, molora={"selector": "dense"},
        personal={"gate": "anchored", "head": "anchored", "gate_lr": 0.2, "head_lr": 0.2},
    )  # fmt: skip
    simulate(settings, folder / "out")
    return folder / "out"


@pytest.mark.parametrize("merged", [[], ["--merged"]], ids=["peft", "merged"])
@pytest.mark.parametrize("who", [None, "client-1"])
def test_a_classifier_comes_with_its_head(classifier, tmp_path, who, merged):
    words = ["expert", str(classifier), "e0", "--out", str(tmp_path / "out"), *merged]
    done = CliRunner().invoke(app, words + (["--as", who] if who else []))
    assert done.exit_code == 0, done.output
    readme = (tmp_path / "out/README.md").read_text()
    run = re.search(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)[1]
    said = {}
    with warnings.catch_warnings():
        exec(run.replace('folder = "."', f"folder = {str(tmp_path / 'out')!r}"), said)
    source = open_source(classifier)
    with Loaded(source, "e0") as alone:
        setting = alone._within
    with source.gate(who or "global") as model, torch.no_grad():
        with Loaded(source, who or "global") as gate:
            ids = source.tokenizer("It was good.")["input_ids"]
            want = gate.passes.logits(ids, setting)
        assert model is source.model
    torch.testing.assert_close(said["logits"][0], torch.from_numpy(want), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "out/head.json").read_text())["labels"] == sorted(tiny_world.LABELS)
