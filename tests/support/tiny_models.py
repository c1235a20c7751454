"""Base models of random weights, small enough to be built anew for every test, and ways to adapt them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from molehill import config, registry
from molehill.molora.build import wrap
from molehill.molora.head import Head
from molehill.molora.model import MoLoRAModel

VOCAB, WIDTH, FFN, CLASSES = 40, 32, 64, 3  # whole vector registers: torch rounds the rest of a tensor differently
ARCHITECTURES = ("llama", "bert", "gpt2")
MIXTURES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe")


def presets() -> list[str]:
    """Those that any base can have."""
    names = [method.name for method in registry.methods("preset")]
    scorers = {name: config.parse({"molora": {"preset": name}}).molora.scorer for name in names}
    return [name for name in names if "base_route" not in scorers[name].declared("scorer", "reads")]


def mixture(family: str) -> nn.Module:
    """A causal LM that is a mixture of experts itself, in eval mode."""
    shape: dict[str, Any] = {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 24, "vocab_size": VOCAB, "max_position_embeddings": 64, "use_cache": False,
        "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 1, "num_experts_per_tok": 2,
    }  # fmt: skip
    made = {
        "olmoe": lambda: transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**shape, num_experts=8)),
        "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape, num_local_experts=4)),
        "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(
            transformers.Qwen2MoeConfig(
                **shape, num_experts=6, moe_intermediate_size=16, shared_expert_intermediate_size=24
            )
        ),
        "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(**shape, num_experts=6, moe_intermediate_size=16, head_dim=8)
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = made[family]()
    return model.eval().requires_grad_(requires_grad=False)


def base(architecture: str, *, seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal LM (``llama``: grouped-query attention; ``gpt2``: `Conv1D`) or an encoder (``bert``), in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module
        if architecture == "llama":
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
                    intermediate_size=FFN, vocab_size=VOCAB, max_position_embeddings=64, use_cache=False,
                    initializer_range=0.2, pad_token_id=0,
                )
            )  # fmt: skip
        elif architecture == "gpt2":
            model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    n_embd=WIDTH, n_layer=layers, n_head=4, n_inner=FFN, vocab_size=VOCAB, n_positions=64,
                    use_cache=False, initializer_range=0.2, bos_token_id=1, eos_token_id=1,
                )
            )  # fmt: skip
        else:
            model = transformers.BertModel(
                transformers.BertConfig(
                    hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=FFN,
                    vocab_size=VOCAB, max_position_embeddings=64, initializer_range=0.2,
                ),
                add_pooling_layer=False,
            )  # fmt: skip
    return model.to(dtype).eval().requires_grad_(requires_grad=False)


def head(*, anchored: bool = False) -> Head:
    """A classification head for an encoder."""
    return Head(WIDTH, CLASSES, "mean", anchored=anchored)


def adapted(
    architecture: str = "llama", *, seed: int = 0, gate: Any = "global", dtype: torch.dtype = torch.float32, **keys: Any
) -> MoLoRAModel:
    """A base with the adapter that ``keys`` of the ``[molora]`` section ask for, in eval mode."""
    section = config.parse({"molora": keys}).molora
    return wrap(
        base(architecture, dtype=dtype), section, gate=gate, seed=seed,
        head=head(anchored=gate == "anchored") if architecture == "bert" else None,
    ).eval()  # fmt: skip


def shake(model: MoLoRAModel, *, scale: float = 0.3, seed: int = 1) -> MoLoRAModel:
    """Replace every trainable number by noise, so that all experts, routers and residuals count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.flat.copy_(scale * torch.randn(model.flat.shape, generator=generator))
    return model


def separate(model: MoLoRAModel, factor: float = 8.0) -> MoLoRAModel:
    """Move the routers' logits apart, so that rounding does not change which experts are chosen."""
    with torch.no_grad():
        for group in model.routers.values():
            for parameter in group.router.scorer.parameters():
                parameter.mul_(factor)
    return model


def training(model: MoLoRAModel) -> MoLoRAModel:
    """Training mode as a client has it: dropout of the frozen base stays off."""
    model.train()
    model.base.eval()
    for site in model.sites.values():
        site.dropout.train()
    return model


def batch(architecture: str = "llama", *, rows: int = 3, tokens: int = 7, seed: int = 2) -> dict[str, Tensor]:
    """Arguments of a forward pass; the last row is padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    mask[-1, tokens - 3 :] = False
    if architecture == "bert":
        labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    else:
        labels = ids.masked_fill(~mask, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
