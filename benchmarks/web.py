"""A bundle in a browser, beside Python on the same processor: A B A B, medians, processor time of one thread.

    python benchmarks/web.py [--layers 12] [--rounds 5]
    python benchmarks/web.py --bundle bundles/demo [--bundle ...]

Without bundles a Llama of 768 x layers with random weights (12 layers: 102 million parameters) and one LoRA is exported
in int8 and int4. A call is one token after 64 others for a causal LM, or one text of 32 tokens for a classifier.
"""

from __future__ import annotations

import common

# isort: split

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import chromium
import edge_graphs
import numpy as np
import peft
import transformers
from typer.testing import CliRunner

from molehill.cli import app
from molehill_edge import Bundle
from molehill_edge.trust import InsecureLocal
from molehill_web import site

TRUST = InsecureLocal(lambda _: None)
CONTEXT, TEXT, CALLS = 64, 32, 4
_CALL = """(async (ids, calls) => {
  const { engine } = molehill;
  const { Cache } = await import(new URL('js/generate.js', location.href));
  const cache = engine.causal ? (globalThis.read ??= new Cache(engine)) : null;
  if (cache) await cache.read(ids.slice(0, -1));
  globalThis.once = () => (cache ? (cache.cut(ids.length - 1), cache.read(ids)) : engine.logits(ids));
  await once();
})"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, action="append")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="molehill-web-") as work, chromium.browser() as browser:
        bundles = options.bundle or decoders(Path(work), options.layers)
        rows = [measure(bundle, Path(work), browser, options.rounds) for bundle in bundles]
    first = rows[0][2]
    common.show(
        "One call, on one thread: ms of processor time",
        ["bundle", "weights", "browser", "Python", "browser / Python", f"browser / {bundles[0].name}'s"],
        [[name, w, f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}", f"{a / first:.2f}"] for name, w, a, b in rows],
    )


def decoders(work: Path, layers: int) -> list[Path]:
    """A random Llama with one LoRA, in int8 and int4."""
    shape = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 2560}
    config = transformers.LlamaConfig(vocab_size=16384, num_hidden_layers=layers, max_position_embeddings=512, **shape)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(work / "base")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=edge_graphs.bytes_tokenizer(), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(work / "base")
    lora = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights="gaussian", task_type="CAUSAL_LM")
    model.name_or_path = str(work / "base")
    peft.get_peft_model(model, lora).save_pretrained(work / "lora")
    made = []
    for weights in ("int8", "int4"):
        out = work / weights
        words = ["export", str(work / "lora"), "--out", str(out), "--id", "web", "--quantize", weights, "--force"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        made.append(out)
    return made


def measure(folder: Path, work: Path, browser: chromium.Chromium, rounds: int) -> tuple[str, str, float, float]:
    """Name, weights, and ms of a call in the browser and in Python."""
    with contextlib.ExitStack() as stack:
        bundle = stack.enter_context(Bundle.open(folder, trust=TRUST, threads=1))
        with TRUST.admit(folder) as admitted:
            out = work / f"site-{folder.name}"
            site.of_bundle(admitted, out)
        server = chromium.Server(out)
        stack.callback(server.stop)
        page = browser.page()
        assert page.open(server.url) == "ready", page.text("#status")
        causal = bundle.manifest.task.kind == "causal-lm"
        ids = np.random.default_rng(0).integers(5, 250, CONTEXT + 1 if causal else TEXT).tolist()
        page.call("Performance.enable", timeDomain="threadTicks")
        page.do(f"{_CALL}({ids}, {CALLS})")
        cache = bundle.cache() if causal else None

        def python() -> None:
            if cache is None:
                bundle.logits([ids])
            else:
                cache.cut(CONTEXT)
                bundle.read(cache, ids)

        python()
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            begin = spent(page)
            page.do(f"(async () => {{ for (let i = 0; i < {CALLS}; i++) await once(); }})()")
            times[0].append(spent(page) - begin)
            begin = time.thread_time()
            for _ in range(CALLS):
                python()
            times[1].append(time.thread_time() - begin)
        found = [1000 * statistics.median(each) / CALLS for each in times]
        return folder.name, bundle.manifest.quantisation.base, found[0], found[1]


def spent(page: chromium.Page) -> float:
    """Seconds of processor time of the page's thread."""
    metrics = page.call("Performance.getMetrics")["metrics"]
    return next(each["value"] for each in metrics if each["name"] == "ThreadTime")


if __name__ == "__main__":
    main()
