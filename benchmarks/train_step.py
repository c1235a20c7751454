"""One training step of a mixture against peft's LoRA of the same total rank, and against published code for mixtures.

    python benchmarks/train_step.py [--reps 7] [--threads 1] [--model llama] [--dtype bf16] [--quick] [--json]
    python benchmarks/train_step.py --preset all --model llama       # or names: what presets cost

MoLoRA with 8 experts of rank 8, top-2, on every linear. A step is forward, backward and AdamW.

* ``peft``: LoRA of rank 64 as users run it, adapters in the base's type (``autocast_adapter_dtype=False``), the
  fastest setting of peft.
* ``peft onednn``: the same with fp32 products through oneDNN, one line that peft's users could write as well: what
  it saves is the switch, and not ours. As the others where this machine's choice is MKL, and in bf16.
* ``mola``: the mixture as MoE-PEFT's MoLA computes it, see `moe_peft`. Same function and as many parameters as ours.
* ``base``: the frozen base alone, forward and backward through its activations: what no adapter goes below.
* ``molehill``: as the client builds it: `wrap`, `use_fast_attention`, and the kernels that were measured to be fastest.

With ``--parts`` ours is measured without each of its parts as well: the time without over the time with it. ``blocks``
are those of the attention, which is used where it was measured to be faster.

With ``--preset`` a preset is measured beside plain top-2 of as many experts of the same ranks on the same linears (of
blocks: on the feed-forward linears), so that the ratio is what its own routing, experts and wiring cost.

Models: a Llama of random weights (hidden 512, 8 layers, FFN 1408, vocabulary 8192; 8 rows of 256 tokens) and the
sample MiniLM (16 rows of 128 tokens). One thread is measured in processor time, several in wall time. The limits in
brackets are the aims for any processor; in bf16 much depends on it: with tiles (AMX) a product takes an eighth of the
time of one in fp32, with AVX-512 alone it takes half, and what is gained around the products weighs less.

Peak memory is that of a process of its own, above what it held with the base loaded, whose allocator gives blocks back
at once.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import peft
import torch
import torch.nn.functional as F
import transformers
from common import alternate, clock_for, grown_by, in_own_process, show
from moe_peft import Form, LoraMoeLinear, MolaLinear, put
from torch import Tensor, nn

from molehill import config, registry
from molehill.errors import ConfigError, ModelError
from molehill.molora import attention, build, recompute
from molehill.molora import model as molora_model
from molehill.molora.attention import use_fast_attention
from molehill.molora.build import wrap
from molehill.molora.head import Head
from molehill.molora.layer import Fan
from molehill.molora.presets.targets import FFN
from molehill.molora.steps import BlockTopology
from molehill.tasks import kernels
from molehill.tasks.base_model import load_base
from molehill_client.objectives.sft import SFT

EXPERTS, RANK, TOP_K, ALPHA = 8, 8, 2, 16.0
CLASSES = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = ("base", "peft", "peft onednn", "mola", "molehill")
REPLACED: dict[str, tuple[Any, str, Any]] = {  # parts of ours, and what stands in for them
    "blocks": (attention, "_BLOCK", attention.MAX_TOKENS),
    "recompute": (build, "keep_less", lambda _: None),
    "norms": (recompute, "form_of", lambda _: None),
    "loss": (
        molora_model,
        "of_class",
        lambda logits, labels: F.cross_entropy(logits.float(), labels, reduction="none"),
    ),
}
PARTS = ("products", "fans", "attention", *REPLACED)  # what ours can be measured without
TIME_LIMITS = {  # ours over peft, at most
    ("llama", "fp32"): 0.55,
    ("minilm", "fp32"): 0.60,
    ("llama", "bf16"): 0.72,
    ("minilm", "bf16"): 0.62,
}
MOLA_LIMITS = {"fp32": 2.0, "bf16": 4.0}  # MoLA's form over ours, at least
MEMORY_LIMIT = 0.75  # ours over peft, at most
Step = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """A base model and its batch."""

    base: nn.Module
    ids: Tensor
    mask: Tensor
    labels: Tensor
    targets: list[str]
    width: int
    experts: int = EXPERTS


def setting(model: str, dtype: str, *, quick: bool, experts: int = EXPERTS) -> Setting:
    """Build a base model with frozen weights and a batch for it."""
    torch.manual_seed(0)
    if model == "llama":
        rows, tokens = (4, 64) if quick else (8, 256)
        shape = transformers.LlamaConfig(
            hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
            intermediate_size=1408, vocab_size=8192, max_position_embeddings=512, use_cache=False,
        )  # fmt: skip
        base: nn.Module = transformers.LlamaForCausalLM(shape)
        ids = torch.randint(0, 8192, (rows, tokens))
        labels, targets, width = ids, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 512
    else:
        rows, tokens = (8, 64) if quick else (16, 128)
        base = load_base(config.Base(precision="fp32"), config.Task()).model
        ids = torch.randint(1000, 20000, (rows, tokens))
        labels, targets, width = torch.randint(0, CLASSES, (rows,)), ["query", "key", "value", "dense"], 384
    base = base.to(DTYPES[dtype]).eval().requires_grad_(requires_grad=False)
    return Setting(base, ids, torch.ones_like(ids, dtype=torch.bool), labels, targets, width, experts)


class MeanHead(nn.Module):
    """The classifier that the other ways put on an encoder."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base, self.head = base, nn.Linear(width, CLASSES)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        pooled = self.base(input_ids=ids).last_hidden_state.float().mean(1)
        return F.cross_entropy(self.head(pooled), labels)


def step_of(module: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Forward, backward, AdamW."""
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def huggingface_step(at: Setting, base: nn.Module) -> Step:
    """A step of an adapted Hugging Face model with its own loss."""
    if at.labels.dim() == 1:
        model = MeanHead(base, at.width)
        return step_of(model, lambda: model(at.ids, at.labels))
    return step_of(base, lambda: base(input_ids=at.ids, labels=at.labels).loss)


def peft_step(at: Setting) -> Step:
    """LoRA by peft, of as many ranks as all experts have."""
    shape = peft.LoraConfig(r=at.experts * RANK, lora_alpha=ALPHA, target_modules=at.targets)
    return huggingface_step(at, peft.get_peft_model(at.base, shape, autocast_adapter_dtype=False))


def moe_peft_step(at: Setting, form: Form) -> Step:
    """A mixture in one of MoE-PEFT's forms."""
    put(form, at.base, at.targets, at.experts, RANK, ALPHA, TOP_K)
    return huggingface_step(at, at.base)


def base_step(at: Setting) -> Step:
    """The frozen base: its own products and the gradient of its activations."""
    model: Any = at.base
    embeddings = model.get_input_embeddings()(at.ids).detach()

    def step() -> None:
        x = embeddings.clone().requires_grad_()
        if at.labels.dim() == 1:
            model(inputs_embeds=x).last_hidden_state.float().mean().backward()
        else:
            model(inputs_embeds=x, labels=at.labels).loss.backward()

    return step


def through_onednn(step: Step, chosen: kernels.Kernels) -> Step:
    """A step with the kernels of the process changed for as long as it takes."""

    def run() -> None:
        kernels.use(chosen)
        try:
            step()
        finally:
            kernels.use(chosen._replace(products="mkl"))

    return run


def chosen_kernels(at: Setting) -> kernels.Kernels:
    """What is fastest on this machine for the products of a base."""
    half = next(at.base.parameters()).dtype == torch.bfloat16
    return kernels.choose("bf16" if half else "fp32", torch.device("cpu"), at.width)


def peft_onednn_step(at: Setting) -> Step:
    """The same with the kernels that we choose."""
    return through_onednn(peft_step(at), chosen_kernels(at))


def molehill_step(at: Setting, without: str = "", selector: str = "top_k") -> Step:
    """Ours, or ours without one of its parts."""
    replaced = partial(patch.object, *REPLACED[without]) if without in REPLACED else nullcontext
    with replaced():
        step = _molehill_step(at, without, selector)

    def run() -> None:
        with replaced():
            step()

    return run if without == "products" else through_onednn(run, chosen_kernels(at))


def _molehill_step(at: Setting, without: str, selector: str) -> Step:
    chooses = {"name": selector, **({"k": TOP_K} if selector == "top_k" else {})}
    section = {"experts": at.experts, "rank": RANK, "alpha": ALPHA, "selector": chooses}
    return _step_of_section(at, config.MoLoRA.model_validate(section), without)


def preset_step(at: Setting, name: str, *, plain: bool) -> Step:
    """A step with a preset, or with plain top-2 of its experts on its linears."""
    section = config.parse({"molora": {"preset": name}}).molora
    if plain:
        blocks = isinstance(section.topology.build("topology"), BlockTopology)
        kept = {"experts": max(TOP_K, section.experts), "shared": section.shared, "rank": section.rank}
        kept |= {
            "targets": FFN if blocks else section.targets,
            "allocation": section.allocation,
            "scope": section.scope,
        }
        section = config.MoLoRA.model_validate(kept | {"selector": {"name": "top_k", "k": TOP_K}})
    return through_onednn(_step_of_section(at, section, ""), chosen_kernels(at))


def _step_of_section(at: Setting, section: config.MoLoRA, without: str) -> Step:
    classes = at.labels.dim() == 1
    model = wrap(at.base, section, head=Head(at.width, CLASSES, "mean", anchored=False) if classes else None)
    if without != "attention":
        tokens = at.ids.shape[1]
        use_fast_attention(at.base, tokens, partial(kernels.fast_attention, chosen_kernels(at), tokens))
    if without == "fans":
        for site in model.sites.values():
            site.fan = Fan([site])
    flat = nn.Parameter(model.flat)
    flat.grad = model.grad
    optimiser = torch.optim.AdamW([flat], lr=1e-4, fused=True)
    objective = SFT()
    losses = [(each.coef, each.build("routing_loss")) for each in section.losses]
    model.train()
    model.base.eval()
    model.state.collect = bool(losses)

    def step() -> None:
        model.grad.zero_()
        forward = model(at.ids, at.mask, at.labels)
        sum((coef * loss(forward.records) for coef, loss in losses), start=objective(forward)).backward()
        optimiser.step()

    return step


STEPS: dict[str, Callable[[Setting], Step]] = {
    "peft": peft_step,
    "peft onednn": peft_onednn_step,
    "base": base_step,
    "mola": partial(moe_peft_step, form=MolaLinear),
    "loramoe": partial(moe_peft_step, form=LoraMoeLinear),
    "molehill": molehill_step,
    "molehill dense": partial(molehill_step, selector="dense"),
    **{f"without {part}": partial(molehill_step, without=part) for part in PARTS},
}


def peak(way: str, model: str, dtype: str, *, quick: bool) -> None:
    """Print by how many MiB a process with the base loaded grows over three steps."""
    at = setting(model, dtype, quick=quick)
    with torch.no_grad():  # what a first pass loads is not the adapter's
        at.base(input_ids=at.ids[:1, :8])

    def run() -> None:
        step = STEPS[way](at)
        for _ in range(3):
            step()

    print(grown_by(run))


def measure_parts(model: str, dtype: str, reps: int, threads: int, *, quick: bool) -> dict[str, Any]:
    """What a step takes without each part over what it takes."""
    ways = ("molehill", *(f"without {part}" for part in PARTS))
    seconds = alternate({way: STEPS[way](setting(model, dtype, quick=quick)) for way in ways}, reps, clock_for(threads))
    gains = {part: seconds[f"without {part}"] / seconds["molehill"] for part in PARTS}
    return {"model": model, "dtype": dtype, "threads": threads, "without_over_with": gains}


def measure_presets(names: Sequence[str], model: str, dtype: str, reps: int, threads: int, *, quick: bool) -> list[Any]:
    """Name, whether its experts are computed with the frozen products, and its step over that of plain top-2."""
    rows = []
    for name in names:
        try:
            ways = {way: preset_step(setting(model, dtype, quick=quick), name, plain=way == "plain")
                    for way in ("plain", name)}  # fmt: skip
        except (ConfigError, ModelError) as error:
            print(f"{name} is left out: {error.what}")
            continue
        seconds = alternate(ways, reps, clock_for(threads))
        section = config.parse({"molora": {"preset": name}}).molora
        fused = section.expert.declared("expert", "kind") == "pairs" and section.mixer.declared("mixer", "fused")
        fused &= section.topology.declared("topology", "scope") is None
        fused &= not isinstance(section.topology.build("topology"), BlockTopology)
        rows.append([name, fused, seconds[name] / seconds["plain"]])
    return sorted(rows, key=lambda row: (not row[1], row[2]))


def measure(model: str, dtype: str, reps: int, threads: int, *, quick: bool) -> dict[str, Any]:
    """Milliseconds and peak memory of every way."""
    steps = {way: STEPS[way](setting(model, dtype, quick=quick)) for way in WAYS}
    seconds = alternate(steps, reps, clock_for(threads))
    flags = ["--quick"] if quick else []
    grown = {way: float(in_own_process("--peak", way, model, dtype, *flags)) for way in WAYS}
    return {
        "model": model,
        "dtype": dtype,
        "threads": threads,
        "milliseconds": {way: 1e3 * value for way, value in seconds.items()},
        "peak_mib": grown,
        "over_peft": seconds["molehill"] / seconds["peft"],
        "over_peft_onednn": seconds["molehill"] / seconds["peft onednn"],
        "faster_than_mola": seconds["mola"] / seconds["molehill"],
        "memory_over_peft": grown["molehill"] / grown["peft"],
        "limits": {
            "over_peft": TIME_LIMITS[model, dtype],
            "faster_than_mola": MOLA_LIMITS[dtype],
            "memory_over_peft": MEMORY_LIMIT,
        },
    }


def types() -> list[str]:
    """The types that this processor multiplies."""
    return [name for name in DTYPES if name != "bf16" or kernels.multiplies_bf16()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reps", type=int, default=7, help="turns of every way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", choices=("llama", "minilm"), help="one of the models")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="one of the types")
    parser.add_argument("--parts", action="store_true", help="measure ours without each of its parts")
    parser.add_argument(
        "--preset", nargs="+", metavar="NAME", help="measure presets beside plain top-2; all for every one"
    )
    parser.add_argument("--quick", action="store_true", help="short inputs and few turns: seconds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--peak", nargs=3, metavar=("WAY", "MODEL", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if options.peak:
        way, model, dtype = options.peak
        peak(way, model, dtype, quick=options.quick)
        return
    if options.preset:
        every = [method.name for method in registry.methods("preset")]
        names = every if options.preset == ["all"] else options.preset
        at = (options.model or "llama", options.dtype or "fp32", 3 if options.quick else options.reps, options.threads)
        rows = measure_presets(names, *at, quick=options.quick)
        if options.json:
            print(json.dumps(rows, indent=2))
            return
        show(
            f"A step of {at[0]} {at[1]} on {at[3]} thread(s) over one of plain top-2",
            ["preset", "with the frozen products", "times the step"],
            [[name, "yes" if fused else "no", f"{ratio:.2f}"] for name, fused, ratio in rows],
        )
        return
    measured = measure_parts if options.parts else measure
    results = [
        measured(model, dtype, 3 if options.quick else options.reps, options.threads, quick=options.quick)
        for model in ([options.model] if options.model else ["llama", "minilm"])
        for dtype in ([options.dtype] if options.dtype else types())
    ]
    if options.json:
        print(json.dumps(results, indent=2))
        return
    if options.parts:
        show(
            f"One step of ours on {options.threads} thread(s): time without a part over time with it",
            ["", *PARTS],
            [
                [f"{r['model']} {r['dtype']}", *(f"{r['without_over_with'][part]:.2f}" for part in PARTS)]
                for r in results
            ],
        )
        return
    show(
        f"One step on {options.threads} thread(s): ms, and peak MiB over the base; E={EXPERTS}, r={RANK}, top-{TOP_K}",
        ["", *(f"{way} {unit}" for unit in ("ms", "MiB") for way in WAYS)],
        [
            [
                f"{r['model']} {r['dtype']}",
                *(f"{r[figure][way]:.0f}" for figure in ("milliseconds", "peak_mib") for way in WAYS),
            ]
            for r in results
        ],
    )
    for name in set(DTYPES) - {r["dtype"] for r in results}:
        print(f"{name} is left out: this processor has no products in it (--dtype {name} measures it all the same).")
    show(
        "molehill against the others, and in brackets what is aimed at",
        ["", "ms / peft's (at most)", "ms / peft onednn's", "mola ms / ours (at least)", "MiB / peft's (at most)"],
        [
            [
                f"{r['model']} {r['dtype']}",
                *(
                    f"{r[ratio]:.2f}" + (f" ({r['limits'][ratio]:.2f})" if ratio in r["limits"] else "")
                    for ratio in ("over_peft", "over_peft_onednn", "faster_than_mola", "memory_over_peft")
                ),
            ]
            for r in results
        ],
    )


if __name__ == "__main__":
    main()
