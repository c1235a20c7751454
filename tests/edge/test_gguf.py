"""A LoRA for llama.cpp, read back from its file: every linear's change is that of peft, or of the mixture."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import gguf
import llama_gguf
import numpy as np
import peft
import pytest
import tiny_models
import tiny_world
import torch
import transformers
from typer.testing import CliRunner

from molehill.cli import app
from molehill.errors import BundleError, ConfigError, ModelError
from molehill.outputs import reading_of
from molehill_export.gguf_lora import Wanted, export_lora
from molehill_export.static import fix
from molehill_simulation.simulate import simulate
from molehill_simulation.source import open_source

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning"),
]
WRITES = reading_of("causal-lm")
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
PARTS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}  # fmt: skip
TARGETS = [part.rpartition(".")[2] for part in PARTS]


def read(path):
    """Fields and the change of every linear that a file makes, rows of queries and keys as llama.cpp has them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    names = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    assert len(tensors) == 2 * len(names)
    alpha = fields["adapter.lora.alpha"]
    return fields, {n: alpha / len(tensors[f"{n}.lora_a"]) * tensors[f"{n}.lora_b"] @ tensors[f"{n}.lora_a"]
                    for n in names}  # fmt: skip


def stored(name, change, turned=True):
    """A linear of transformers as llama.cpp stores it: its name, and its weight as its converter turns it."""
    _, _, layer, part = name.split(".", 3)
    heads = {"attn_q": SHAPE["num_attention_heads"], "attn_k": SHAPE["num_key_value_heads"]}
    n = heads.get(PARTS[part])
    if turned and n:
        rows, columns = change.shape
        change = change.reshape(n, 2, rows // n // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return f"blk.{layer}.{PARTS[part]}.weight", change


def of_peft(folder, base):
    """The change of every linear that peft makes of a folder."""
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_world.save_base(tmp_path_factory.mktemp("base") / "llama", "llama", **SHAPE, initializer_range=0.2)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A finished run: three experts and a shared one, routed token by token, every client with a gate of its own."""
    folder = tmp_path_factory.mktemp("run")
    source = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(30, "llama"))
    molora = {"targets": TARGETS, "experts": 3, "shared": 1, "selector": "dense"}
    settings = tiny_world.config(
        base, source, run={"rounds": 1}, task={"kind": "causal-lm", "max_length": 32}, molora=molora,
        personal={"gate": "anchored"},
    )  # fmt: skip
    simulate(settings, folder / "out")
    return folder / "out"


def shaken(folder, scale=0.05, gate=0.0):
    """The run with experts that matter, and with routers that choose as sharply as said."""
    source = open_source(folder)
    tiny_models.shake(source.model, scale=scale)
    with torch.no_grad():
        for group in source.model.routers.values():
            for parameter in group.router.parameters():
                parameter.mul_(gate)
    return source


@pytest.mark.parametrize(
    ("family", "architecture", "turned"),
    [("llama", "llama", True), ("mistral", "llama", True), ("qwen2", "qwen2", False), ("qwen3", "qwen3", False)],
)
def test_an_expert_is_what_peft_makes_of_its_folder(base, tmp_path, family, architecture, turned):
    if family != "llama":
        base = tmp_path / "base"
        tiny_world.save_base(base, "llama", **SHAPE)  # the tokenizer
        torch.manual_seed(0)
        shape = transformers.AutoConfig.for_model(family, **tiny_world.SIZES | SHAPE)
        made = transformers.AutoModelForCausalLM.from_config(shape)
        assert any(name.endswith("q_proj.bias") for name, _ in made.named_parameters()) == (family == "qwen2")
        made.save_pretrained(base)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", use_rslora=True,
                               init_lora_weights=False, rank_pattern={"v_proj": 2})  # fmt: skip
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), settings)
    model.save_pretrained(tmp_path / "lora")
    made = export_lora(open_source(tmp_path / "lora"), tmp_path / "lora.gguf", Wanted())
    assert (made.experts, made.rank, made.linears, made.fixed) == (("e0",), 4, 14, None)
    with pytest.raises(ConfigError, match="there is one expert, and no gate to weigh it"):
        export_lora(open_source(tmp_path / "lora"), tmp_path / "lora.gguf", Wanted(gate="nobody"))
    fields, found = read(tmp_path / "lora.gguf")
    assert (fields["general.architecture"], fields["general.type"]) == (architecture, "adapter")
    assert (fields["adapter.type"], fields["adapter.lora.alpha"]) == ("lora", 4.0)
    want = dict(stored(*item, turned) for item in of_peft(tmp_path / "lora", base).items())
    assert found.keys() == want.keys()
    for name, change in want.items():
        np.testing.assert_allclose(found[name], change, rtol=1e-4, atol=1e-6)
        assert np.abs(change).max() > 0.01


def test_an_expert_of_a_run_is_what_peft_makes_of_its_folder(run, base, tmp_path, monkeypatch):
    words = ["export", str(run), "--gguf", str(tmp_path / "e1.gguf"), "--expert", "e1", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["experts"] == ["e1"]
    size = (tmp_path / "e1.gguf").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["e1.gguf"]
    _, found = read(tmp_path / "e1.gguf")
    want = dict(stored(*item) for item in of_peft(run / "adapter/experts/e1", base).items())
    assert found.keys() == want.keys()
    for name, change in want.items():
        np.testing.assert_allclose(found[name], change, rtol=1e-4, atol=1e-7)
    first = (tmp_path / "e1.gguf").read_bytes()
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, json.loads(done.stdout)["error"]["what"]) == (2, "there is something already")
    words[3] = str(tmp_path / "again.gguf")
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "e1.gguf").read_bytes() == first
    (tmp_path / "e1.gguf").unlink()
    (tmp_path / "again.gguf").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1, free=size - 1))
    done = CliRunner().invoke(app, words[:-1])
    assert done.exit_code == 11
    needs = rf"error: {tmp_path}: the LoRA needs ([\d,]+) bytes, and {size - 1:,} are free\. Make room"
    assert size <= int(re.match(needs, done.stderr)[1].replace(",", "")) < size + 32_000
    assert not list(tmp_path.iterdir())


def test_a_gate_is_the_mean_of_what_its_routers_say(run, tmp_path):
    source = shaken(run, gate=0.5)
    made = export_lora(source, tmp_path / "mean.gguf", Wanted(gate="global", force=True))
    assert made.experts == ("shared0", "e0", "e1", "e2")
    assert made.rank == 4 * 2
    assert not made.fixed.exact
    assert made.fixed.error > 0
    _, found = read(tmp_path / "mean.gguf")
    for name, site in source.model.sites.items():
        weights = [1.0, *made.fixed.weights[site.group.site.name].tolist()]
        change = sum(w * site.bank.weight(e)[0].detach() for e, w in enumerate(weights)).numpy()
        name_there, want = stored(name, change)
        np.testing.assert_allclose(found[name_there], want, rtol=1e-4, atol=1e-6)


def test_weights_are_means_over_tokens_and_what_they_change_is_measured(run):
    source = shaken(run, gate=2.0)
    texts = [[1, 20, 21, 22], [1, 23]]
    found = fix(source.model, texts, WRITES)
    seen = {name: [] for name in found.weights}
    source.model.state.collect = True
    with torch.no_grad():
        for ids in texts:
            source.model.base(input_ids=torch.tensor([ids]))
            for record in source.model.state.records:
                seen[record.site.name].append(record.route.weights[0])
    for name, weights in found.weights.items():
        torch.testing.assert_close(weights, torch.cat(seen[name]).mean(0))
    alike = fix(shaken(run, gate=0.0).model, texts, WRITES)  # all logits are 0
    assert alike.exact
    assert (alike.error, alike.agreement) == (pytest.approx(0, abs=1e-9), 1.0)
    assert found.error > 1e-6
    again = fix(source.model, texts, WRITES)  # the routers are as before
    assert all(torch.equal(again.weights[name], weights) for name, weights in found.weights.items())


def test_a_personal_gate_has_means_of_its_own(run, tmp_path):
    (client, other, *_) = open_source(run).clients()
    made = {}
    for name in (client, other):
        words = ["export", str(run), "--gguf", str(tmp_path / f"{name}.gguf"), "--gate", name, "--json"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        made[name] = json.loads(done.stdout)["static"]
        assert made[name]["agreement"] > 0.8
    assert (tmp_path / f"{client}.gguf").read_bytes() != (tmp_path / f"{other}.gguf").read_bytes()
    told = CliRunner().invoke(app, ["export", str(run), "--gguf", str(tmp_path / "g.gguf"), "--gate", "global"])
    assert "The mixture is static: all tokens get the mean weights" in told.stdout


def test_routing_by_token_without_a_gate_is_refused_and_so_is_a_mean_that_is_another_model(run, tmp_path):
    with pytest.raises(ConfigError, match=r"token by token, and a LoRA of llama.cpp has one weight for all"):
        export_lora(shaken(run, gate=2.0), tmp_path / "x.gguf", Wanted())
    with pytest.raises(BundleError, match=r"a fixed mixture would not be this model.*insist with --force"):
        export_lora(shaken(run, scale=2.0, gate=60.0), tmp_path / "x.gguf", Wanted(gate="global"))
    assert export_lora(shaken(run, gate=0.0), tmp_path / "y.gguf", Wanted()).fixed.exact  # nobody chooses
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        ([], 2, "nothing to write. Give --out for a bundle, or --gguf"),
        (["--gguf", "x", "--out", "y"], 2, "--out and --gguf exclude each other"),
        (["--gguf", "x", "--expert", "e9"], 2, "--expert: there is no expert 'e9'. There are: shared0, e0, e1, e2."),
        (["--gguf", "x", "--expert", "e1", "--gate", "global"], 2, "--expert and --gate exclude each other"),
        (["--gguf", "x", "--gate", "a", "--gate", "b"], 2, "a LoRA has one gate"),
        (["--gguf", "x", "--gate", "nobody"], 2, "there is no personal gate of 'nobody'"),
        (["--out", "x", "--expert", "e1"], 2, "--expert goes with --gguf"),
        (["--gguf", "x", "--experts", "e1"], 2, "--experts: a LoRA for llama.cpp has no such thing"),
        (["--gguf", "x", "--expert", "e1", "--quantize", "int8"], 2, "--quantize: a LoRA for llama.cpp has no such"),
        (["--gguf", "x", "--expert", "e1", "--id", "mine"], 2, "--id: a LoRA for llama.cpp has no such thing"),
        (["--gguf", "nowhere/x", "--expert", "e1"], 11, "the system refuses it: No such file or directory"),
    ],
)
def test_what_makes_no_sense_is_refused(run, tmp_path, monkeypatch, words, code, why):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["export", str(run), *words])
    assert done.exit_code == code, done.output
    assert why in done.stderr
    assert not list(tmp_path.iterdir())


def test_other_bases_and_experts_are_refused_by_name(tmp_path):
    base = tiny_world.save_base(tmp_path / "gpt2", "gpt2")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["c_fc"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(
        tmp_path / "lora"
    )
    with pytest.raises(ModelError, match=r"bases of type 'gpt2' cannot become a GGUF LoRA here.*llama, mistral"):
        export_lora(open_source(tmp_path / "lora", str(base)), tmp_path / "x.gguf", Wanted())


def write_base(path, base):
    """A Llama as llama.cpp reads it, without a tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    shape = model.config
    writer = llama_gguf.begin(path, shape)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    for name, value in model.state_dict().items():
        there, array = names.get_name(name, try_suffixes=(".weight",)), value.numpy()
        if "_proj" in name:
            there, array = stored(name.removesuffix(".weight"), array)
        writer.add_tensor(there, np.ascontiguousarray(array))
    llama_gguf.end(writer)


def test_llama_cpp_computes_what_the_fixed_mixture_is(run, base, tmp_path):
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python takes minutes to build: not part of the gate")
    import ctypes

    source = shaken(run, scale=0.3, gate=0.0)
    made = export_lora(source, tmp_path / "lora.gguf", Wanted(gate="global"))
    assert made.fixed.exact
    write_base(tmp_path / "base.gguf", base)
    ids = [1, 20, 21, 22, 23, 9, 14]
    with torch.no_grad():
        want = source.model.base(input_ids=torch.tensor([ids]))[0][0, -1].numpy()
        source.model.state.enabled = False
        plain = source.model.base(input_ids=torch.tensor([ids]))[0][0, -1].numpy()
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(tmp_path / "base.gguf").encode(), llama.llama_model_default_params())
    parameters = llama.llama_context_default_params()
    parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 64, 1, 1
    parameters.type_k = parameters.type_v = llama.GGML_TYPE_F32  # else keys, values and attention are in float16
    parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama.llama_init_from_model(model, parameters)

    def last():
        llama.llama_memory_clear(llama.llama_get_memory(context), 1)
        tokens = (llama.llama_token * len(ids))(*ids)  # a batch only points at them
        assert llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(ids))) == 0
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (len(plain),)).copy()

    np.testing.assert_allclose(last(), plain, rtol=1e-3, atol=1e-4)
    lora = llama.llama_adapter_lora_init(model, str(tmp_path / "lora.gguf").encode())
    assert lora
    adapters, scales = (type(lora) * 1)(lora), (ctypes.c_float * 1)(1.0)
    put = llama.llama_set_adapters_lora
    assert put(context, ctypes.cast(adapters, put.argtypes[1]), 1, ctypes.cast(scales, put.argtypes[3])) == 0
    np.testing.assert_allclose(last(), want, rtol=1e-3, atol=1e-4)
    assert np.abs(want - plain).max() > 0.05
