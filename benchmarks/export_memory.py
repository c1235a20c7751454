"""What memory an export takes: the peak of its process, stage by stage, over the size of the base.

    python benchmarks/export_memory.py [--sizes 0.1B 0.45B 1B] [--schemes int4] [--experts 8]

The bases are Llamas of random weights in bfloat16, written file by file; the adapter is MoLoRA of rank 8, top-2, one
router per layer, on all linears. Each export is a process of its own. "peak" is resident memory, mapped files among it;
"bound" is 1.5 x the bundle + 2 GB; bytes a parameter are counted over what the packages take once they are imported.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

# isort: split

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from molehill import config
from molehill.molora.adapter import Manifest, save_adapter
from molehill.molora.build import wrap
from molehill.tasks.base_model import load_base
from molehill_export.base import is_built
from molehill_export.export import Options, export
from molehill_simulation.source import open_source

# layers, hidden size, heads, heads of keys and values, intermediate size, vocabulary
SIZES = {
    "tiny": (2, 256, 4, 2, 512, 1000),
    "0.1B": (12, 768, 12, 4, 2560, 16384),
    "0.45B": (16, 1536, 24, 8, 4096, 32000),
    "1B": (22, 2048, 32, 4, 5632, 32000),
}


def main() -> None:
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[2]), SIZES[sys.argv[3]], int(sys.argv[4]))
        return
    if sys.argv[1:2] == ["export"]:
        measure(Path(sys.argv[2]), sys.argv[3])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES), default=["0.1B", "0.45B", "1B"])
    parser.add_argument("--schemes", nargs="*", default=["int4"])
    parser.add_argument("--experts", type=int, default=8)
    options = parser.parse_args()
    rows, stages = [], []
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="export-memory-") as work:
            common.in_own_process("make", work, size, str(options.experts))
            for scheme in options.schemes:
                told = json.loads(common.in_own_process("export", work, scheme, returning=False).splitlines()[-1])
                rows.append([f"{size}, {scheme}", *summary(told)])
                stages += [[f"{size}, {scheme}", *row] for row in told["stages"]]
    common.show("An export", ["base", "parameters", "adapter", "bundle", "peak", "bound", "bytes a parameter"], rows)
    common.show("Its stages", ["base", "stage", "peak, GB", "s of processor time"], stages)


def summary(told: dict[str, Any]) -> list[str]:
    peak = max(float(stage[1]) for stage in told["stages"])
    billions = [told[name] / 1e9 for name in ("parameters", "adapter", "bundle", "before")]
    parameters, adapter, bundle, before = billions
    over = (peak - before) / parameters
    return [
        f"{parameters:.3f}B", f"{adapter:.3f}B", f"{bundle:.2f} GB", f"{peak:.2f} GB", f"{1.5 * bundle + 2:.2f} GB",
        f"{over:.2f} over {before:.2f} GB",
    ]  # fmt: skip


def measure(work: Path, scheme: Any) -> None:
    stages: list[tuple[str, str, str]] = []
    stage = ["Opening", time.process_time()]
    before = common.resident("VmRSS")

    def enter(name: str) -> None:
        title, begin = stage
        stages.append((title, f"{common.resident('VmHWM') / 1e9:.2f}", f"{time.process_time() - begin:.0f}"))
        common.reset_peak()
        stage[:] = name.partition(" to /")[0], time.process_time()

    common.reset_peak()
    source = open_source(work / "adapter", str(work / "base"), streamed=is_built)
    out = work / "bundle"
    export(source, out, Options(scheme=scheme, force=True, id="big"), progress=enter)
    enter("")
    bundle = sum(path.stat().st_size for path in out.iterdir())
    shutil.rmtree(out)
    parameters, adapter = source.model.base_parameters, source.model.n_parameters
    told = {"stages": stages, "before": before, "parameters": parameters, "adapter": adapter, "bundle": bundle}
    print(json.dumps(told))


def make(work: Path, size: tuple[int, ...], experts: int) -> None:
    """A base, and an adapter of it, never more than a layer of it in memory."""
    layers, hidden, heads, kv, inner, vocabulary = size
    base = work / "base"
    settings = LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=inner, vocab_size=vocabulary, max_position_embeddings=2048, bos_token_id=256,
        eos_token_id=257, pad_token_id=258, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    settings.save_pretrained(base)
    rng = torch.Generator().manual_seed(0)
    index = {}

    def put(number: int, tensors: dict[str, tuple[int, ...]]) -> None:
        name = f"model-{number:05d}.safetensors"
        values = {key: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=rng) * 0.02
                  for key, shape in tensors.items()}  # fmt: skip
        save_file({key: value.bfloat16() for key, value in values.items()}, base / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    narrow = hidden // heads * kv
    put(0, {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)})
    put(1, {"lm_head.weight": (vocabulary, hidden)})
    for layer in range(layers):
        parts = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        put(2 + layer, {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()})
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inside = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    inside.pre_tokenizer, inside.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    inside.add_special_tokens(list(special.values()))
    PreTrainedTokenizerFast(tokenizer_object=inside, **special).save_pretrained(base)
    task = config.Task(kind="causal-lm", max_length=512)
    loaded = load_base(config.Base(model=str(base), precision="fp32", device="cpu"), task, streamed=is_built)
    section = config.parse(
        {"molora": {"targets": "all-linear", "experts": experts, "rank": 8, "alpha": 16.0, "scope": "layer",
                    "selector": {"name": "top_k", "k": 2}}}
    ).molora  # fmt: skip
    model = wrap(loaded.model, section)
    model.flat.data.normal_(std=0.02)
    about = {"id": str(base), "digest": loaded.info.digest}
    save_adapter(work / "adapter", model, Manifest(base=about, task=task.kind, molora=section, ranks={}))


if __name__ == "__main__":
    main()
