"""Speed and size of bundles: ratios, measured side by side in one run (A B A B, medians).

    python benchmarks/edge.py decoder [--layers 12] [--experts 8] [--threads 1]
    python benchmarks/edge.py encoder [--threads 1]
    python benchmarks/edge.py device --bundle bundles/demo --expert experts/e3.expert.safetensors

`device` opens an exported bundle (one with an empty slot) in a process of its own, as a device does.

"x faster" is the time of the same graph in float32 over this one's, "x base" this one's over the base alone in
as many bits.

The decoder is a Llama of 768 x 12 with random weights and a vocabulary of 16384 (102 million parameters); the encoder
is the MiniLM of the demo. MoLoRA: rank 8, top-2, one router per layer, on all linears.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common  # noqa: F401 - finds the packages

# isort: split

import numpy as np
import onnxruntime as ort
import torch
import transformers
from tokenizers import Tokenizer, models

from molehill import config
from molehill.molora.build import wrap
from molehill.molora.head import Head
from molehill.molora.targets import find_sites
from molehill.tasks.base_model import load_base
from molehill.tasks.weights import look_up
from molehill_edge import tensors
from molehill_export.base import classifier, decoder
from molehill_export.base_quantise import quantise_base
from molehill_export.graph import External, Graph, write_weights
from molehill_export.molora import choose_slots, gate_values, insert

CONTEXT, PROMPT = 128, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decoder", "encoder", "device"])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--expert", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, nargs="*", default=[8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--llama", action="store_true", help="llama.cpp beside it: needs llama-cpp-python and gguf")
    parser.add_argument("--schemes", nargs="*", default=["fp32", "int8", "int4"])
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        {"decoder": decoders, "encoder": encoders, "device": device}[options.what](options, Path(scratch))


def decoders(options: argparse.Namespace, work: Path) -> None:
    shape = transformers.LlamaConfig(
        hidden_size=768, num_hidden_layers=options.layers, num_attention_heads=12, num_key_value_heads=4,
        intermediate_size=2560, vocab_size=16384, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(shape)
    base.save_pretrained(work / "base")
    _tokenizer().save_pretrained(work / "base")
    names = [site.name for site in find_sites(base, "all-linear")]
    plain = decoder(base, look_up(work / "base", "base"), names)
    size16 = sum(p.numel() for p in base.parameters()) * 2
    cases: dict[str, Any] = {}
    for scheme in options.schemes:
        cases[scheme] = _write(plain.copy(), work / scheme, scheme, "logits")
        for experts in options.experts:
            model = _adapted(base, experts)
            cases[f"{scheme} E={experts}"] = _write(plain.copy(), work / f"{scheme}-{experts}", scheme, "logits", model)
            base = transformers.LlamaForCausalLM(shape)
    sessions = {name: _session(folder, options.threads) for name, (folder, _) in cases.items()}
    runs = {name: _decoding(session, shape) for name, session in sessions.items()}
    if options.llama:
        _gguf(base, shape, work / "base.gguf")
        runs["llama.cpp q4_0"] = _llama(work / "base.gguf", shape, options.threads)
    decode = _interleaved({name: run[0] for name, run in runs.items()}, options.rounds)
    prefill = _interleaved({name: run[1] for name, run in runs.items()}, max(3, options.rounds // 3))
    print(f"{options.threads} threads; one token after {CONTEXT}; prefill of {PROMPT}; fp16: {size16 / 1e6:.1f} MB")
    heads = ("decode ms", "x faster", "x base", "prefill ms", "x faster", "x base", "MB", "x fp16", "experts")
    widths = (10, 9, 8, 12, 9, 8, 8, 8, 9)
    print(f"{'':14}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)))
    for name, (_, sizes) in cases.items():
        scheme = name.partition(" ")[0]
        total = sum(sizes.values())
        rivals = [(times[name], times[name.replace(scheme, "fp32")], times[scheme]) for times in (decode, prefill)]
        (d, d32, d0), (p, p32, p0) = rivals
        speed = f"{d * 1e3:10.2f}{d32 / d:9.2f}{d / d0:8.2f}{p * 1e3:12.1f}{p32 / p:9.2f}{p / p0:8.2f}"
        part = sizes.get("experts.safetensors", 0) / total
        print(f"{name:14}{speed}{total / 1e6:8.1f}{total / size16:8.3f}{part:9.1%}")
    if options.llama:
        name = "llama.cpp q4_0"
        times = f"{decode[name] * 1e3:10.2f}{'':17}{prefill[name] * 1e3:12.1f}{'':17}"
        print(f"{name:14}{times}{(work / 'base.gguf').stat().st_size / 1e6:8.1f}   no experts, no repacked weights")
        for case in (each for each in cases if each.startswith("int4")):
            print(f"{case}: one token {decode[name] / decode[case]:.2f} x as fast as {name}")


def encoders(options: argparse.Namespace, work: Path) -> None:
    settings, task = config.Base(precision="fp32"), config.Task(labels=("a", "b", "c"))
    base = load_base(settings, task).model
    head = Head(int(base.config.hidden_size), 3, "mean", anchored=False)
    names = [site.name for site in find_sites(base, "all-linear")]
    plain = classifier(base, head, names)
    cases: dict[str, Any] = {}
    for scheme in options.schemes:
        cases[scheme] = _write(plain.copy(), work / scheme, scheme)
        for experts in options.experts:
            model = _adapted(load_base(settings, task).model, experts, head)
            cases[f"{scheme} E={experts}"] = _write(plain.copy(), work / f"{scheme}-{experts}", scheme, "", model)
    sessions = {name: _session(folder, options.threads) for name, (folder, _) in cases.items()}
    shapes = [(1, 32), (1, 128), (8, 128)]
    found = [
        _interleaved({name: _classifying(session, *shape) for name, session in sessions.items()}, options.rounds)
        for shape in shapes
    ]
    print(f"{options.threads} threads; times over the float32 base without experts")
    print(f"{'':14}" + "".join(f"{shape!s:>12}" for shape in shapes) + f"{'MB':>8}")
    for name, (_, sizes) in cases.items():
        print(
            f"{name:14}" + "".join(f"{f[name] / f['fp32']:12.2f}" for f in found) + f"{sum(sizes.values()) / 1e6:8.1f}"
        )


_DEVICE = """
import time
begin = time.perf_counter()
import resource, sys
from pathlib import Path
from molehill_edge import Bundle, InsecureLocal
folder, expert, threads, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with Bundle.open(folder, trust=InsecureLocal(lambda _: None), threads=threads) as bundle:
    opened = time.perf_counter() - begin
    bundle.classify(["a text of a few words"] * 8)
    status = Path("/proc/self/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) * 1024
    gate, swaps, adds = bundle.read_gate("default"), [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        bundle.swap_gate(gate)
        swaps.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        name = bundle.add_expert(expert)
        adds.append(time.perf_counter() - begin)
        bundle.remove_expert(name)
print(opened, resident, sorted(swaps)[rounds // 2], sorted(adds)[rounds // 2])
"""


def device(options: argparse.Namespace, _: Path) -> None:
    command = [sys.executable, "-c", _DEVICE, str(options.bundle), str(options.expert), str(options.threads), "9"]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(5)]
    opened, resident, swap, add = (statistics.median(map(float, column)) for column in zip(*runs, strict=True))
    files = sum(path.stat().st_size for path in options.bundle.rglob("*") if path.is_file())
    print(f"open, with imports  {opened:7.2f} s")
    print(f"resident memory     {resident / 1e6:7.0f} MB, {resident / (2 * files + 1e8):.2f} of 2 x files + 100 MB")
    print(f"swap a gate         {swap * 1e3:7.3f} ms")
    print(f"add an expert       {add:7.3f} s")


def _adapted(base: Any, experts: int, head: Any = None) -> Any:
    section = config.parse(
        {"molora": {"targets": "all-linear", "experts": experts, "rank": 8, "alpha": 16.0, "scope": "layer",
                    "selector": {"name": "top_k", "k": 2}}}
    ).molora  # fmt: skip
    model = wrap(base, section, head=head)
    model.flat.data.normal_(std=0.02)
    model.scorer = section.scorer
    return model


def _write(graph: Graph, folder: Path, scheme: Any, head: str = "", model: Any = None) -> tuple[Path, dict[str, int]]:
    folder.mkdir()
    quantise_base(graph, scheme, head)
    external: dict[str, External] = {}
    if model is not None:
        inserted = insert(graph, model, model.scorer, choose_slots(model, None, 0), scheme)
        graph.tensors.update(gate_values(model, inserted))
        offsets = tensors.write(folder / "experts.safetensors", inserted.experts, {})
        external = {k: External("experts.safetensors", at, inserted.experts[k].nbytes) for k, at in offsets.items()}
    for value in graph.inputs:
        if value.name.startswith("head/"):
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            graph.tensors[value.name] = np.zeros(shape, np.float32)
    graph.drop_unused()
    external |= write_weights({k: v for k, v in graph.tensors.items() if k not in external}, folder / "base.bin")
    (folder / "model.onnx").write_bytes(graph.model(external).SerializeToString())
    return folder, {path.name: path.stat().st_size for path in folder.iterdir()}


def _session(folder: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return ort.InferenceSession(folder / "model.onnx", options)


def _decoding(session: ort.InferenceSession, shape: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    rng = np.random.default_rng(0)
    size = shape.hidden_size // shape.num_attention_heads
    caches = [
        np.zeros((1, shape.num_key_value_heads, 512, size), np.float32) for _ in range(2 * shape.num_hidden_layers)
    ]
    values = [ort.OrtValue.ortvalue_from_numpy(cache) for cache in caches]

    def run(tokens: int, past: int) -> Callable[[], None]:
        binding = session.io_binding()
        ids = rng.integers(0, shape.vocab_size, (1, tokens))
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, tokens + past), np.int64))
        for i, value in enumerate(values):
            name = f"{i // 2}.{('key', 'value')[i % 2]}"
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits")
        return lambda: session.run_with_iobinding(binding)

    return run(1, CONTEXT), run(PROMPT, 0)


def _gguf(base: Any, shape: Any, path: Path) -> None:
    """The base alone for llama.cpp: linears in q4_0, table and tied output head in q8_0."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_dimension_count(shape.hidden_size // shape.num_attention_heads)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, value in base.state_dict().items():
        array = value.float().numpy()
        if name == "model.embed_tokens.weight":
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor("token_embd.weight", gguf.quants.quantize(array, kind), raw_dtype=kind)
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", array)
        elif name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            short = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
            if array.ndim == 1:
                writer.add_tensor(short, array)
            else:
                kind = gguf.GGMLQuantizationType.Q4_0
                writer.add_tensor(short, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama(path: Path, shape: Any, threads: int) -> tuple[Callable[[], None], Callable[[], None]]:
    import llama_cpp

    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    context = llama_cpp.llama_context_default_params()
    context.n_ctx, context.n_batch, context.n_threads, context.n_threads_batch = 512, 512, threads, threads
    opened = llama_cpp.llama_init_from_model(model, context)
    memory = llama_cpp.llama_get_memory(opened)
    ids = [int(i) for i in np.random.default_rng(0).integers(0, shape.vocab_size, PROMPT)]

    def run(tokens: list[int], past: int) -> None:
        llama_cpp.llama_memory_seq_rm(memory, 0, past, -1)
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert llama_cpp.llama_decode(opened, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0

    def decode() -> None:
        run(ids[:1], CONTEXT)

    def prefill() -> None:
        run(ids, 0)

    prefill()
    return decode, prefill


def _classifying(session: ort.InferenceSession, rows: int, tokens: int) -> Callable[[], None]:
    ids = np.random.default_rng(0).integers(1000, 20000, (rows, tokens))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return lambda: session.run(["logits"], feed)


def _interleaved(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            run()
            if round_ > 1:
                times[name].append((time.perf_counter() - start) / 2)
    return {name: statistics.median(each) for name, each in times.items()}


def _tokenizer() -> Any:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w3"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w1", pad_token="w0", unk_token="w3")


if __name__ == "__main__":
    with contextlib.redirect_stderr(io.StringIO() if "-q" in sys.argv else sys.stderr):
        main()
