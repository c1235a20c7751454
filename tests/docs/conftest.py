from __future__ import annotations

import json

import pytest


@pytest.fixture
def tiny_settings(tmp_path):
    """Options that shrink a `molehill simulate` of a page to a second: a tiny encoder, 48 rows, one step."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *"abcdefgh"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"text": " ".join(words[2 + i % 7 :]), "label": "np"[i % 2], "domain": "xy"[i % 4 // 2]} for i in range(48)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "base.model": tmp_path / "base",
        "data.source": tmp_path / "rows.jsonl",
        "data.clients": 2,
        "task.labels": '["n", "p"]',
        "run.rounds": 1,
        "train.steps": 1,
    }
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
