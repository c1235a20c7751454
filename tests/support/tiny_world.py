"""A whole federation in seconds: random checkpoints of two layers, and rows that a model can learn from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)

from molehill.config import Config, parse
from molehill.wire import connect
from molehill.wire.store import load_tree
from molehill_client.state import PersonalState, StateStore
from molehill_simulation import world
from molehill_simulation.simulate import simulate

LABELS = {
    "negative": ("bad", "poor", "dull"),
    "neutral": ("plain", "usual", "fair"),
    "positive": ("good", "fine", "fun"),
}
DOMAINS = {"books": ("page", "plot", "author"), "films": ("scene", "actor", "screen")}
FILLERS = ("the", "was", "very", "it", "and", "so", "then", "we", "saw", "all")
WORDS = (
    *("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "Instruction", "Input", "Response"),
    *(word for group in (*LABELS.values(), *DOMAINS.values(), FILLERS) for word in group),
    *LABELS,
)
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}"
    "{% if m.role == 'assistant' %} {{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}


def save_base(folder: Path, kind: str, seed: int = 0, **sizes: Any) -> Path:
    """Save a random checkpoint (``bert``, ``llama``, ``gpt2``, ``olmoe``) with its tokenizer; ``sizes`` change it."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "bert":
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=64,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
    )
    if kind in {"llama", "olmoe"}:
        tokenizer.chat_template = CHAT
    torch.manual_seed(seed)
    make = {
        "bert": lambda shape: BertForMaskedLM(BertConfig(**shape)),
        "llama": lambda shape: LlamaForCausalLM(LlamaConfig(**shape)),
        "olmoe": lambda shape: OlmoeForCausalLM(
            OlmoeConfig(**shape, num_experts=4, num_experts_per_tok=2, eos_token_id=2)
        ),
        "gpt2": lambda shape: GPT2LMHeadModel(GPT2Config(**shape, n_inner=shape["intermediate_size"])),
    }
    make[kind](SIZES | sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int, kind: str = "bert") -> list[dict[str, str]]:
    """Distinct rows, sorted into two domains; the label follows from one word of the text."""
    rng = random.Random(0)
    seen: dict[str, dict[str, str]] = {}
    while len(seen) < count:
        label, domain = rng.choice(list(LABELS)), rng.choice(list(DOMAINS))
        words = [rng.choice(DOMAINS[domain]), rng.choice(LABELS[label]), *rng.choices(FILLERS, k=rng.randint(2, 9))]
        text = " ".join(rng.sample(words, len(words)))
        seen[text] = {"text": text, "label": label, "domain": domain}
    if kind == "bert":
        return list(seen.values())
    return [{"instruction": row["text"], "output": f"{row['label']} {row['domain'][:-1]}"} for row in seen.values()]


def tagged(count: int) -> list[dict[str, list[str]]]:
    """Words with tags: which are of a domain, and which of a feeling."""
    kinds = {word: "DOMAIN" for group in DOMAINS.values() for word in group}
    kinds |= {word: "FEELING" for group in LABELS.values() for word in group}
    found = []
    for words in (row["text"].split() for row in rows(count)):
        types = [kinds.get(word, "") for word in words]
        pairs = zip(types, ["", *types[:-1]], strict=True)
        tags = [f"{'I' if kind == last else 'B'}-{kind}" if kind else "O" for kind, last in pairs]
        found.append({"tokens": words, "tags": tags})
    return found


def write_rows(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf-8")
    return path


def config(base: Path, source: Path, /, **sections: dict[str, Any]) -> Config:
    """Three clients, two experts at two sites a layer, two rounds of two steps, no baselines, unless said otherwise."""
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "rounds": 2},
        "base": {"model": str(base), "precision": "fp32", "device": "cpu"},
        "task": {"max_length": 16},
        "data": {"source": str(source), "clients": 3, "partition": "iid"},
        "molora": {"targets": ["query", "intermediate.dense"], "experts": 2, "rank": 2, "alpha": 4.0},
        "train": {"steps": 2, "batch_size": 8, "lr": 1e-2},
        "personal": {"steps": 4},
        "evaluate": {"baselines": False},
        "engine": {"workers": 1, "together": 1},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    if values["evaluate"]["baselines"] is True:  # what another test has trained is no test of this one
        values["evaluate"]["baselines"] = "anew"
    return parse(values)


def forget() -> None:
    """Lose what lives in the memory of a process only, as a new process would."""
    world._clients.cache_clear()
    world.world_of.cache_clear()
    connect._memories.clear()


def stopped_after(number: int, config: Config, out: Path) -> None:
    """Run until a round of this number is committed, and break off in the next."""

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and (out / "checkpoints" / f"round-{number:05d}").is_dir():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, out, observer=stop)
    forget()


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run folder."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def states(out: Path, run: str = "tiny") -> dict[str, PersonalState]:
    """Every personal state in a run folder, by ``client/round``."""
    _, meta = load_tree(out / "initial.safetensors")
    found = {}
    for folder in sorted(path for path in (out / "clients").iterdir() if path.is_dir()):
        store = StateStore(folder, run, meta["base"])
        found |= {f"{folder.name}/{number}": store.before(number + 1) for number in store.rounds()}
    return found
