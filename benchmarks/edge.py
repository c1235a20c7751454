"""Speed and size of bundles: ratios, measured side by side in one run (A B A B, medians).

    python benchmarks/edge.py decoder [--size 102M] [--experts 8] [--threads 1 2] [--llama]
    python benchmarks/edge.py encoder [--threads 1 2]
    python benchmarks/edge.py device --bundle bundles/demo --expert experts/e3.expert.safetensors

`device` opens an exported bundle (one with an empty slot) in a process of its own, as a device does.

"x faster" is the time of the same graph in float32 over this one's, "x base" this one's over the base alone in
as many bits.

The decoder is a Llama with random weights: 102 million parameters (768 x 12, vocabulary 16384) or 452 million (1536 x
16, vocabulary 32000); the encoder is the MiniLM of the demo. MoLoRA: rank 8, top-2, one router per layer, on all
linears. One thread is measured in processor time, several in wall time. A prompt is read for its last logits, as
generation does.

llama.cpp runs the base alone, twice: as it comes, which packs weights anew for the processor when it loads them, and
with that switched off (``use_extra_bufts``), which some processors or builds need. Which is which is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

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
from molehill_edge.manifest import LOGITS_FROM
from molehill_edge.pool import Pool
from molehill_export.base import classifier, decoder
from molehill_export.base_quantise import quantise_base
from molehill_export.graph import External, Graph, write_weights
from molehill_export.head import cut_head
from molehill_export.joined import pack_attention
from molehill_export.molora import choose_slots, gate_values, insert

CONTEXT, PROMPT = 128, 128
SIZES: dict[str, dict[str, int]] = {
    "102M": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
             "intermediate_size": 2560, "vocab_size": 16384},
    "452M": {"hidden_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 24, "num_key_value_heads": 8,
             "intermediate_size": 4096, "vocab_size": 32000},
}  # fmt: skip
LLAMA = {"llama.cpp, as it comes": True, "llama.cpp, not repacked": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decoder", "encoder", "device"])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--expert", type=Path)
    parser.add_argument("--size", choices=list(SIZES), default="102M")
    parser.add_argument("--experts", type=int, nargs="*", default=[8])
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--llama", action="store_true", help="llama.cpp beside it: needs llama-cpp-python and gguf")
    parser.add_argument("--block", type=int, choices=[128, 256], default=128, help="of the base in int4")
    parser.add_argument("--schemes", nargs="*", default=["fp32", "int8", "int4"])
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        {"decoder": decoders, "encoder": encoders, "device": device}[options.what](options, Path(scratch))


def decoders(options: argparse.Namespace, work: Path) -> None:
    base, cases = decoder_graphs(work, options.size, options.schemes, options.experts, options.block)
    shape, size16 = base.config, sum(p.numel() for p in base.parameters()) * 2
    if options.llama:
        _gguf(base, shape, work / "base.gguf")
    for threads in options.threads:
        runs = {name: decoding(open_graph(folder, threads), shape) for name, (folder, _) in cases.items()}
        if options.llama:
            runs |= {name: _llama(work / "base.gguf", shape, threads, repack=on) for name, on in LLAMA.items()}
        clock = common.clock_for(threads)
        decode = common.alternate({name: run[0] for name, run in runs.items()}, 4 * options.rounds, clock)
        prefill = common.alternate({name: run[1] for name, run in runs.items()}, max(3, options.rounds // 2), clock)
        title = f"{options.size}; {threads} threads; one token after {CONTEXT}; a prompt of {PROMPT}"
        _tell(title, cases, decode, prefill, size16)


def decoder_graphs(
    work: Path, size: str, schemes: list[str], experts: list[int], block: int = 128
) -> tuple[Any, dict[str, Any]]:
    """A Llama of random weights, and its graphs: the base's and with so many experts, by scheme."""
    shape = transformers.LlamaConfig(**SIZES[size], max_position_embeddings=1024, tie_word_embeddings=True)
    base = transformers.LlamaForCausalLM(shape)
    base.save_pretrained(work / "base")
    _tokenizer().save_pretrained(work / "base")
    names = [site.name for site in find_sites(base, "all-linear")]
    plain = decoder(base, look_up(work / "base", "base"), names)
    cases: dict[str, Any] = {}
    for scheme in schemes:
        cases[scheme] = _write(plain.copy(), work / scheme, scheme, "logits", block=block)
        for count in experts:
            model = _adapted(transformers.LlamaForCausalLM(shape), count)
            folder = work / f"{scheme}-{count}"
            cases[f"{scheme} E={count}"] = _write(plain.copy(), folder, scheme, "logits", model, block)
    return base, cases


def _tell(title: str, cases: dict[str, Any], decode: dict[str, float], prefill: dict[str, float], size16: int) -> None:
    """Print a table of bundles, and how they stand to llama.cpp."""
    rows = []
    for name, (_, sizes) in cases.items():
        scheme, total = name.partition(" ")[0], sum(sizes.values())
        row = [name]
        for times in (decode, prefill):
            full = times.get(name.replace(scheme, "fp32"))
            faster = f"{full / times[name]:.2f}" if full else "-"
            row += [f"{times[name] * 1e3:.2f}", faster, f"{times[name] / times[scheme]:.2f}"]
        rows.append([*row, f"{total / 1e6:.1f}", f"{total / size16:.3f}"])
    common.show(title, ["", "token ms", "x faster", "x base", "prompt ms", "x faster", "x base", "MB", "x fp16"], rows)
    rows = [
        [case, name, f"{decode[name] / decode[case]:.2f}", f"{prefill[name] / prefill[case]:.2f}"]
        for case in cases if case.startswith("int4") for name in LLAMA if name in decode
    ]  # fmt: skip
    if rows:
        common.show("times as fast as q4_0 of the base alone", ["", "", "token", "prompt"], rows)


def encoders(options: argparse.Namespace, work: Path) -> None:
    cases = encoder_graphs(work, options.schemes, options.experts)
    shapes = [(1, 32), (1, 128), (8, 128)]
    for threads in options.threads:
        sessions = {name: open_graph(folder, threads) for name, (folder, _) in cases.items()}
        clock = common.clock_for(threads)
        found = [
            common.alternate({n: classifying(each, *shape) for n, each in sessions.items()}, options.rounds, clock)
            for shape in shapes
        ]
        rows = [
            [name, *(f"{times[name] / times['fp32']:.2f}" for times in found), f"{sum(sizes.values()) / 1e6:.1f}"]
            for name, (_, sizes) in cases.items()
        ]
        title = f"{threads} threads; times over the float32 base without experts, by texts and their tokens"
        common.show(title, ["", *map(str, shapes), "MB"], rows)


def encoder_graphs(work: Path, schemes: list[str], experts: list[int]) -> dict[str, Any]:
    """The demo's MiniLM: its graphs alone and with so many experts, by scheme."""
    settings, task = config.Base(precision="fp32"), config.Task(labels=("a", "b", "c"))
    base = load_base(settings, task).model
    head = Head(int(base.config.hidden_size), 3, "mean", anchored=False)
    names = [site.name for site in find_sites(base, "all-linear")]
    plain = classifier(base, head, names)
    cases: dict[str, Any] = {}
    for scheme in schemes:
        cases[scheme] = _write(plain.copy(), work / f"encoder-{scheme}", scheme)
        for count in experts:
            model = _adapted(load_base(settings, task).model, count, head)
            folder = work / f"encoder-{scheme}-{count}"
            cases[f"{scheme} E={count}"] = _write(plain.copy(), folder, scheme, "", model)
    return cases


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
    command = [sys.executable, "-c", _DEVICE, str(options.bundle), str(options.expert), str(options.threads[0]), "9"]
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


def _write(
    graph: Graph, folder: Path, scheme: Any, head: str = "", model: Any = None, block: int = 128
) -> tuple[Path, dict[str, int]]:
    folder.mkdir()
    quantise_base(graph, scheme, head, block)
    external: dict[str, External] = {}
    if model is not None:
        inserted = insert(graph, model, model.scorer, choose_slots(model, None, 0), scheme)
        graph.tensors.update(gate_values(model, inserted))
        offsets = tensors.write(folder / "experts.safetensors", inserted.experts, {})
        external = {k: External("experts.safetensors", at, inserted.experts[k].nbytes) for k, at in offsets.items()}
    else:
        pack_attention(graph)  # as where there are experts
    if head:
        cut_head(graph)
    for value in graph.inputs:
        if value.name.startswith("head/"):
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            graph.tensors[value.name] = np.zeros(shape, np.float32)
    graph.drop_unused()
    external |= write_weights({k: v for k, v in graph.tensors.items() if k not in external}, folder / "base.bin")
    (folder / "model.onnx").write_bytes(graph.model(external).SerializeToString())
    return folder, {path.name: path.stat().st_size for path in folder.iterdir()}


def open_graph(folder: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    Pool(threads, spin=threads > 1).apply(options)
    return ort.InferenceSession(folder / "model.onnx", options)


def decoding(session: ort.InferenceSession, shape: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    rng = np.random.default_rng(0)
    size = shape.hidden_size // shape.num_attention_heads
    caches = [
        np.zeros((1, shape.num_key_value_heads, 512, size), np.float32) for _ in range(2 * shape.num_hidden_layers)
    ]
    values = [ort.OrtValue.ortvalue_from_numpy(cache) for cache in caches]

    def run(tokens: int, past: int) -> Callable[[], None]:
        binding = session.io_binding()
        given = {  # kept: a binding only points at them
            "input_ids": rng.integers(0, shape.vocab_size, (1, tokens)),
            "attention_mask": np.ones((1, tokens + past), np.int64),
            LOGITS_FROM: np.array([-1]),
        }
        for name, array in given.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for i, value in enumerate(values):
            name = f"{i // 2}.{('key', 'value')[i % 2]}"
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits")

        def call(_: object = given) -> None:
            session.run_with_iobinding(binding)

        return call

    return run(1, CONTEXT), run(PROMPT, 0)


def _gguf(base: Any, shape: Any, path: Path) -> None:
    """The base alone for llama.cpp: linears in q4_0, table and tied output head in q8_0."""
    import gguf
    import llama_gguf

    writer = llama_gguf.begin(path, shape)
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
    llama_gguf.end(writer)


def _llama(path: Path, shape: Any, threads: int, *, repack: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    import llama_cpp

    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.use_extra_bufts = repack
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


def classifying(session: ort.InferenceSession, rows: int, tokens: int) -> Callable[[], None]:
    ids = np.random.default_rng(0).integers(1000, 20000, (rows, tokens))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return lambda: session.run(["logits"], feed)


def _tokenizer() -> Any:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w3"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w1", pad_token="w0", unk_token="w3")


if __name__ == "__main__":
    with contextlib.redirect_stderr(io.StringIO() if "-q" in sys.argv else sys.stderr):
        main()
