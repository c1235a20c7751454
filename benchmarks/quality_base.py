"""A small causal base for the quality study, trained from nothing on rows of `sample:reviews` that the study has not.

It learns the sentences themselves and to call them good, bad or so-so: words that the study's answers do not have.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END, ASK, SAY = "<pad>", "<end>", "<ask>", "<say>"
TEMPLATE = (
    "{% for m in messages %}"
    f"{{% if m.role == 'user' %}}{ASK}{{{{ m.content }}}}{SAY}{{% else %}}{{{{ m.content }}}}{END}{{% endif %}}"
    "{% endfor %}"
)
WORDS = {"positive": "good", "negative": "bad", "neutral": "so-so"}


def lines(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """What the base reads: every sentence as it is, and once more with a verdict."""
    for row in rows:
        yield f"{row['text']}{END}"
        yield f"{ASK}{row['text']}{SAY}{WORDS[row['label']]}{END}"


def tokenizer_of(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4,096 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[PAD, END, ASK, SAY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, additional_special_tokens=[ASK, SAY]
    )
    fast.chat_template = TEMPLATE
    return fast


def batches(ids: list[list[int]], tokens: int, epochs: int, seed: int) -> Iterator[list[list[int]]]:
    """Lines of about one length together, in random order."""
    order = random.Random(seed)
    for _ in range(epochs):
        order.shuffle(ids)
        some: list[list[list[int]]] = [[]]
        for line in sorted(ids, key=len):
            if len(line) * (len(some[-1]) + 1) > tokens:
                some.append([])
            some[-1].append(line)
        order.shuffle(some)
        yield from some


def build(rows: Sequence[dict[str, str]], folder: Path, *, epochs: int = 4, seed: int = 0) -> Path:
    """Train the base and save it as a folder that Transformers opens, unless it is there.

    Args:
        rows: What it reads.
        folder: Where the base is put, under a name that says which program made it of how much.
        epochs: Passes over the rows.
        seed: Of its start values and batches.
    """
    made = zlib.crc32(Path(__file__).read_bytes())
    path = folder / f"base-{made:08x}-{len(rows)}-{epochs}-{seed}"
    if (path / "config.json").exists():
        return path
    torch.manual_seed(seed)
    texts = list(lines(rows))
    tokenizer = tokenizer_of([row["text"] for row in rows])
    ids = [tokenizer(text)["input_ids"][:64] for text in texts]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    steps = list(batches(ids, 2048, epochs, seed))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=len(steps), pct_start=0.05)
    model.train()
    for step in steps:
        width = max(map(len, step))
        inputs = torch.tensor([line + [config.pad_token_id] * (width - len(line)) for line in step])
        mask = inputs != config.pad_token_id
        loss = model(input_ids=inputs, attention_mask=mask, labels=inputs.where(mask, -100)).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()
    scratch = path.with_suffix(".part")
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    scratch.rename(path)
    return path
