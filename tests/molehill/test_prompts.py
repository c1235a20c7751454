"""Prompts on a device are what training tokenised."""

from __future__ import annotations

import edge_graphs
import pytest

from molehill.decoding.prompts import Prompts
from molehill.errors import AnswerError
from molehill_edge import generate
from molehill_protos.v1.bundle_pb2 import Generation


def test_alpaca_is_as_in_training():
    from molehill.tasks.causal_lm import _alpaca

    prompts = Prompts(Generation(), "bundle")
    for context in ("", "some text"):
        row = {"instruction": "Say it. ", "input": context, "output": ""}
        text, ((begin, _),) = _alpaca(row, "")
        assert prompts.single("Say it. ", context) == text[:begin]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hello\n"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and?"},
    ]
    text, spans = _alpaca({"messages": [*messages, {"role": "assistant", "content": "no"}]}, "")
    assert prompts.before_answer(messages) == text[: spans[-1][0]]
    with pytest.raises(AnswerError, match="unknown role 'cat'"):
        prompts.before_answer([{"role": "cat", "content": "x"}])


THINKING = (
    "{%- for message in messages %}{%- set text = message.content %}"
    "{%- if message.role == 'assistant' and not loop.last %}{%- set text = text | upper %}{%- endif %}"
    "[{{ message.role }}]{%- if message.role == 'assistant' and loop.last %}<think></think>{%- endif %}{{ text }}\n"
    "{%- endfor %}{%- if add_generation_prompt %}[assistant]{%- endif %}"
)


@pytest.mark.parametrize("template", ["", edge_graphs.CHATML, THINKING])
def test_prompts_are_what_training_tokenised_before_an_answer(template):
    from transformers import PreTrainedTokenizerFast

    from molehill.tasks.causal_lm import CausalLM

    tokenizer = edge_graphs.bytes_tokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = template or None
    task = CausalLM(fast, 4096)
    prompts = Prompts(Generation(template=bool(template), chat_template=template, eos_token="<|im_end|>"), "bundle")
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " hi\n"},
        {"role": "assistant", "content": "yes "},
        {"role": "user", "content": "and <b>now</b>?"},
    ]
    for said in (turns, turns[1:], turns[1:2]):
        row = {"messages": [*said, {"role": "assistant", "content": "no, never"}]}
        text, spans, _ = task._render(row, "")
        ids, labels = task._tokenise(text, spans)
        prompt = prompts.before_answer(said)
        assert prompt == text[: spans[-1][0]]
        first = len(labels) - next(i for i, label in enumerate(reversed(labels)) if label == -100)
        assert generate.encode(tokenizer, prompt, special=prompts.special) == ids[:first]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (edge_graphs.CHATML, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ("{% for m in messages %}{% generation %}{{ m.content }};{% endgeneration %}{% endfor %}", "hi;"),
        (THINKING, "[user]hi[assistant]<think></think>"),
    ],
)
def test_templates_show_what_training_saw_before_an_answer(template, wanted):
    prompts = Prompts(Generation(template=True, chat_template=template), "bundle")
    assert prompts.single(" hi ") == wanted


def test_a_template_that_edits_earlier_turns_is_asked_for_its_own_prompt():
    prompts = Prompts(Generation(template=True, chat_template=THINKING), "bundle")
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and?"},
    ]
    assert prompts.before_answer(turns) == "[user]hi[assistant]YES[user]and?[assistant]"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for %}", "its chat template cannot be read"),
        ("{{ raise_exception('no system please') }}", "no system please"),
        ("{{ messages.nothing.more }}", "its chat template refuses"),
        ("{{ ''.__class__.__mro__ }}", "its chat template refuses"),  # a sandbox
        ("{{ 1 // 0 }}", "its chat template refuses"),
    ],
)
def test_templates_that_fail(template, what):
    with pytest.raises(AnswerError, match=what):
        Prompts(Generation(template=True, chat_template=template), "bundle").single("hi")


def test_a_chat_template_that_writes_too_much():
    endless = "{% for i in range(90000) %}{% for m in messages %}{{ m.content * 9 }}{% endfor %}{% endfor %}"
    prompts = Prompts(Generation(template=True, chat_template=endless), "tiny")
    with pytest.raises(AnswerError, match="tiny: its chat template writes more than 4194304 characters"):
        prompts.single("hello")
