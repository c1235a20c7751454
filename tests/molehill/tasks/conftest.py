from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    *("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"),
    *"abcdefgh",
    *("one", "two", "three", "four", "user", "assistant", "system", "Instruction", "Response"),
]

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|> {{ m.content }}"
    "{% if m.role == 'assistant' %} {{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def _tokenizer(chat_template=None, **special):
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=512, **{k: v for k, v in names.items() if v}
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]})
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture
def make_tokenizer():
    """Make a tokenizer of a few words: `make_tokenizer(chat_template, eos_token=None, ...)`."""
    return _tokenizer


@pytest.fixture
def tokenizer():
    return _tokenizer()


@pytest.fixture
def chat_tokenizer():
    return _tokenizer(CHAT)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


@pytest.fixture
def llama_folder(tmp_path, tokenizer):
    torch.manual_seed(0)
    folder = tmp_path / "tiny-llama"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bert_folder(tmp_path, tokenizer):
    torch.manual_seed(0)
    folder = tmp_path / "tiny-bert"
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path):
    """Write a file: text, bytes, or rows as JSON lines."""

    def write(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write
