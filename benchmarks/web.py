"""A bundle in a browser, beside Python on the same processor: A B A B, medians, one thread.

    python benchmarks/web.py [--size 102M] [--experts 8] [--weights int8 int4] [--rounds 5]
    python benchmarks/web.py --bundle bundles/demo [--bundle ...]

Without bundles Llamas of random weights are exported, of 102 million parameters (768 x 12, vocabulary 16384), or 37
million ("4 layers") or 452 million (1536 x 16, vocabulary 32000). MoLoRA: rank 8, top-2, one router per layer, on all
linears. A call is one token after 64 others for a causal LM, or one text of 32 tokens for a classifier, in processor
time. Opening is wall time, checks of all files among it; memory is the most that the process had resident after
opening and a call: the page's whole process, and one of Python.
"""

from __future__ import annotations

import common

# isort: split

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import chromium
import edge_graphs
import numpy as np
import transformers

from molehill import config
from molehill.molora.adapter import Manifest, save_adapter
from molehill.molora.build import wrap
from molehill.tasks.base_model import load_base
from molehill_edge import Bundle
from molehill_edge.trust import InsecureLocal
from molehill_export.base import is_built
from molehill_export.export import Options, export
from molehill_simulation.source import open_source
from molehill_web import site

TRUST = InsecureLocal(lambda _: None)
CONTEXT, TEXT, CALLS, OPENINGS = 64, 32, 4, 3
# layers, hidden size, heads, heads of keys and values, intermediate size, vocabulary
SIZES = {
    "4 layers": (4, 768, 12, 4, 2560, 16384),
    "102M": (12, 768, 12, 4, 2560, 16384),
    "452M": (16, 1536, 24, 8, 4096, 32000),
}
_CALL = """(async (ids) => {
  const { engine } = molehill;
  const { Cache } = await import(new URL('js/generate.js', location.href));
  const cache = engine.causal ? (globalThis.read ??= new Cache(engine)) : null;
  if (cache) await cache.read(ids.slice(0, -1));
  globalThis.once = () => (cache ? (cache.cut(ids.length - 1), cache.read(ids)) : engine.logits(ids));
  await once();
})"""
_OPEN = """(async () => {
  const parts = ['js/engine.js', 'vendor/tokenizers/tokenizers.min.js'];
  const [{ Engine }, { Tokenizer }] = await Promise.all(parts.map((path) => import(new URL(path, location.href))));
  const { runtime } = molehill.engine, begin = performance.now();
  const engine = await Engine.open(runtime, await molehill.source.open(), { providers: ['wasm'], Tokenizer });
  const took = performance.now() - begin;
  await engine.close();
  return took;
})()"""

_PYTHON = """
import json, sys
from pathlib import Path
from molehill_edge import Bundle, InsecureLocal
with Bundle.open(sys.argv[1], trust=InsecureLocal(lambda _: None), threads=1) as bundle:
    ids = json.loads(sys.argv[2])
    bundle.read(bundle.cache(), ids) if bundle.manifest.task.kind == "causal-lm" else bundle.logits([ids])
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024)
"""


@dataclass(frozen=True)
class Found:
    """What one bundle takes, in the browser and in Python.

    Attributes:
        name: Of its folder.
        weights: Their kind.
        size: Bytes of its files.
        call: Ms of a call.
        opening: Seconds.
        memory: Bytes.
    """

    name: str
    weights: str
    size: int
    call: tuple[float, float]
    opening: tuple[float, float]
    memory: tuple[int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, action="append")
    parser.add_argument("--size", choices=list(SIZES), default="102M")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--weights", nargs="*", choices=["fp32", "int8", "int4"], default=["int8", "int4"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="molehill-web-") as work:
        bundles = options.bundle or decoders(Path(work), options)
        found = [measure(bundle, Path(work), options.rounds) for bundle in bundles]
    first = found[0].call[0]
    rows = [
        [
            each.name, each.weights, f"{each.size / 1e6:.0f}", f"{each.call[0]:.1f}", f"{each.call[1]:.1f}",
            f"{each.call[0] / each.call[1]:.2f}", f"{each.call[0] / first:.2f}",
            f"{each.opening[0]:.2f}", f"{each.opening[1]:.2f}", *(f"{size / 1e6:.0f}" for size in each.memory),
        ]
        for each in found
    ]  # fmt: skip
    head = ["bundle", "weights", "MB", "call ms", "Python", "ratio", f"over {found[0].name}'s", "opening s", "Python"]
    common.show("In a browser", [*head, "memory MB", "Python"], rows)


def decoders(work: Path, options: argparse.Namespace) -> list[Path]:
    """A random Llama with an adapter, in several kinds of weights."""
    layers, hidden, heads, kv, inner, vocabulary = SIZES[options.size]
    shape = transformers.LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=inner, vocab_size=vocabulary, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).save_pretrained(work / "base")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=edge_graphs.bytes_tokenizer(), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(work / "base")
    task = config.Task(kind="causal-lm", max_length=512)
    where = config.Base(model=str(work / "base"), precision="fp32", device="cpu")
    loaded = load_base(where, task, streamed=is_built)
    section = config.parse(
        {"molora": {"targets": "all-linear", "experts": options.experts, "rank": 8, "alpha": 16.0, "scope": "layer",
                    "selector": {"name": "top_k", "k": 2}}}
    ).molora  # fmt: skip
    model = wrap(loaded.model, section)
    model.flat.data.normal_(std=0.02)
    about = {"id": where.model, "digest": loaded.info.digest}
    save_adapter(work / "adapter", model, Manifest(base=about, task=task.kind, molora=section, ranks={}))
    for weights in options.weights:
        source = open_source(work / "adapter", streamed=is_built)
        export(source, work / weights, Options(scheme=weights, id="web", force=True))
    return [work / weights for weights in options.weights]


def measure(folder: Path, work: Path, rounds: int) -> Found:
    """What a bundle takes in a browser of its own, and in Python."""
    with contextlib.ExitStack() as stack:
        browser = stack.enter_context(chromium.browser())
        bundle = stack.enter_context(Bundle.open(folder, trust=TRUST, threads=1))
        with TRUST.admit(folder) as admitted:
            out = work / f"site-{folder.name}"
            written = site.of_bundle(admitted, out)
        server = chromium.Server(out)
        stack.callback(server.stop)
        page = browser.page()
        assert page.open(server.url) == "ready", page.text("#status")
        ids = tokens(bundle)
        page.call("Performance.enable", timeDomain="threadTicks")
        page.do(f"{_CALL}({ids})")
        command = [sys.executable, "-c", _PYTHON, str(folder), json.dumps(ids)]
        memory = renderer(browser), int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        python = caller(bundle, ids)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            begin = spent(page)
            page.do(f"(async () => {{ for (let i = 0; i < {CALLS}; i++) await once(); }})()")
            times[0].append(spent(page) - begin)
            begin = time.thread_time()
            for _ in range(CALLS):
                python()
            times[1].append(time.thread_time() - begin)
        openings: tuple[list[float], list[float]] = ([], [])
        for _ in range(OPENINGS):
            openings[0].append(page.do(_OPEN) / 1000)
            begin = time.perf_counter()
            Bundle.open(folder, trust=TRUST, threads=1).close()
            openings[1].append(time.perf_counter() - begin)
        size = sum(file.length for file in written.manifest.files)
        both = [1000 * statistics.median(each) / CALLS for each in times]
        weights = bundle.manifest.quantisation.base
        opening = statistics.median(openings[0]), statistics.median(openings[1])
        return Found(folder.name, weights, size, (both[0], both[1]), opening, memory)


def tokens(bundle: Bundle) -> list[int]:
    """Those of a call."""
    count = CONTEXT + 1 if bundle.manifest.task.kind == "causal-lm" else TEXT
    return np.random.default_rng(0).integers(5, 250, count).tolist()


def caller(bundle: Bundle, ids: list[int]) -> Callable[[], None]:
    """A call, after one to warm up."""
    cache = bundle.cache() if bundle.manifest.task.kind == "causal-lm" else None

    def call() -> None:
        if cache is None:
            bundle.logits([ids])
        else:
            cache.cut(CONTEXT)
            bundle.read(cache, ids)

    call()
    return call


def spent(page: chromium.Page) -> float:
    """Seconds of processor time of the page's thread."""
    metrics = page.call("Performance.getMetrics")["metrics"]
    return next(each["value"] for each in metrics if each["name"] == "ThreadTime")


def renderer(browser: chromium.Chromium) -> int:
    """Bytes that the largest process of the browser's pages had at most (Linux)."""
    about = browser.call("SystemInfo.getProcessInfo")["processInfo"]
    return max(common.resident("VmHWM", each["id"]) for each in about if each["type"] == "renderer")


if __name__ == "__main__":
    main()
