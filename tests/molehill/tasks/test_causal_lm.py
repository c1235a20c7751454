"""Only answers are learnt, whatever the template."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from molehill import config
from molehill.errors import DataError, ModelError
from molehill.tasks.batches import IGNORE
from molehill.tasks.causal_lm import CausalLM
from molehill.tasks.kind import make_task
from molehill.tasks.rows import TASK, Rows


def rows(*records):
    return Rows.from_records([(f"f:{i}", record) for i, record in enumerate(records, start=1)], "f")


def talk(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[role], "content": content} for role, content in turns]}


def learnt(tokenizer, example):
    """The words learnt, and the words read."""
    assert [label for label, i in zip(example.labels, example.input_ids, strict=True) if label not in (IGNORE, i)] == []
    words = tokenizer.convert_ids_to_tokens(example.input_ids)
    return [w for w, label in zip(words, example.labels, strict=True) if label != IGNORE], words


def test_chat_template_learns_every_answer(chat_tokenizer):
    conversation = talk(("s", "system"), ("u", "one two"), ("a", "user a"), ("u", "a"), ("a", "b"))
    (example,) = CausalLM(chat_tokenizer, 64).encode(rows(conversation))
    answers, words = learnt(chat_tokenizer, example)
    assert answers == ["user", "a", "</s>", "b", "</s>"]
    assert " ".join(words) == (
        "<s> <|system|> system <|user|> one two <|assistant|> user a </s> <|user|> a <|assistant|> b </s>"
    )


def test_instruction_goes_through_the_template(chat_tokenizer):
    task = CausalLM(chat_tokenizer, 64)
    plain, context = task.encode(
        rows(
            {"instruction": "one", "input": "", "output": " a "},
            {"instruction": "one", "input": "two", "output": "a", "task": "ours"},
        )
    )
    assert learnt(chat_tokenizer, plain) == (["a", "</s>"], ["<s>", "<|user|>", "one", "<|assistant|>", "a", "</s>"])
    assert learnt(chat_tokenizer, context)[1] == ["<s>", "<|user|>", "one", "two", "<|assistant|>", "a", "</s>"]


def test_a_question_is_shown_without_what_the_template_writes_around_it(chat_tokenizer, make_tokenizer):
    plain = chat_tokenizer.chat_template
    for template in (plain, "{% if messages[0].role != 'system' %}<|system|> system\n{% endif %}" + plain):
        task = CausalLM(make_tokenizer(template), 64)
        (example,) = task.encode(rows(talk(("u", "one"), ("a", "c"), ("u", "two user"), ("a", "b"))))
        question, _ = task.last_answer(example)
        assert task.question(question) == "two user"


def test_alpaca_where_there_is_no_template(tokenizer):
    task = make_task(config.Task(kind="causal-lm", max_length=64), tokenizer)
    (example,) = task.encode(rows({"instruction": "one", "input": "two", "output": "a b"}))
    answers, words = learnt(tokenizer, example)
    assert answers == ["a", "b", "</s>"]
    assert words.index("one") < words.index("two") < words.index("a", words.index("two"))
    conversation = talk(("s", "three"), ("u", "one"), ("a", "a"), ("u", "two"), ("a", "b c"))
    (example,) = task.encode(rows(conversation))
    assert learnt(tokenizer, example)[0] == ["a", "b", "c", "</s>"]


def test_begin_and_end_tokens_of_the_tokenizer_itself(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    (example,) = CausalLM(tokenizer, 64).encode(rows({"instruction": "one", "input": "", "output": "a"}))
    answers, words = learnt(tokenizer, example)
    assert answers == ["a", "</s>"]
    assert words[0] == "<s>"
    assert words.count("</s>") == 1


def test_template_that_writes_no_end(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}<|{{ m.role }}|> {{ m.content }} three {% endfor %}")
    (example,) = CausalLM(tokenizer, 64).encode(rows(talk(("u", "one"), ("a", "a"))))
    assert learnt(tokenizer, example)[0] == ["a", "</s>"]


def test_template_that_edits_earlier_answers(make_tokenizer):
    """As reasoning templates do, which drop the thoughts of all answers but the last."""
    edits = (
        "{% for m in messages %}<|{{ m.role }}|> "
        "{{ m.content if loop.last or m.role == 'user' else m.content.split(' ')[-1] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    tokenizer = make_tokenizer(edits)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # keeps line breaks
    examples = CausalLM(tokenizer, 64).encode(rows(talk(("u", "one"), ("a", "a b"), ("u", "two"), ("a", "c d"))))
    (example,) = examples
    assert examples.lengths.loss.endswith("so they are read and not learnt: 1")
    answers, words = learnt(tokenizer, example)
    assert answers == ["c", "d", "</s>"]
    assert words[5:7] == ["b", "</s>"]  # the earlier answer is read, as edited; after </s> comes a line break
    assert words[-3:] == answers


def test_template_that_hides_answers(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} <|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match="f:1: the tokenizer's chat template does not show 'content' of message 2"):
        CausalLM(tokenizer, 64).encode(rows(talk(("u", "one"), ("a", "a"))))


def test_template_that_refuses(make_tokenizer):
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"f:1: .*roles must alternate"):
        CausalLM(tokenizer, 64).encode(rows(talk(("u", "one"), ("a", "a"))))


def test_a_token_that_holds_the_space_before_an_answer_is_learnt(make_tokenizer):
    vocab = {word: i for i, word in enumerate(["<unk>", "</s>", "Q:", "\u0120one", "\u0120A:", "\u0120a"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else ' A: ' }}{{ m.content }}{% endfor %}"
    )
    (example,) = CausalLM(tokenizer, 64).encode(rows(talk(("u", "one"), ("a", "a"))))
    assert learnt(tokenizer, example)[0] == ["\u0120a", "</s>"]


GEMMA = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content | trim }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
PHI = GEMMA + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
TOOLS = (
    "{% for t in tools or [] %}<|system|> {{ t.name }} \n{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}"
    "{% for c in m.tool_calls or [] %} call {{ c.function.name }} {{ c.function.arguments ARGUMENTS }}{% endfor %}"
    " <end>\n{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def with_end(make_tokenizer, template, **names):
    tokenizer = make_tokenizer(template, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>", "<end>"]})
    return tokenizer


@pytest.mark.parametrize("template", [GEMMA, PHI])
def test_every_answer_ends_as_the_template_ends_it(make_tokenizer, template):
    """Where that is no end-of-sequence token; Phi-3 writes one after it, which belongs to no answer."""
    tokenizer = with_end(make_tokenizer, template)
    task = CausalLM(tokenizer, 64)
    (example,) = task.encode(rows(talk(("u", "one"), ("a", "a"), ("u", "two"), ("a", "b c"))))
    answers, words = learnt(tokenizer, example)
    assert answers == ["a", "<end>", "b", "c", "<end>"]
    assert words[-1] == "<end>"
    assert tokenizer.convert_ids_to_tokens(task.end) == "<end>"


def test_an_end_may_be_an_added_token_that_is_not_special(make_tokenizer):
    tokenizer = make_tokenizer(GEMMA)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<end>"])
    task = CausalLM(tokenizer, 64)
    (example,) = task.encode(rows(talk(("u", "one"), ("a", "a"), ("u", "two"), ("a", "b c"))))
    assert learnt(tokenizer, example)[0] == ["a", "<end>", "b", "c", "<end>"]
    assert tokenizer.convert_ids_to_tokens(task.end) == "<end>"


def test_an_end_that_is_no_token_is_the_end_of_the_text(make_tokenizer):
    tokenizer = make_tokenizer(GEMMA)
    task = CausalLM(tokenizer, 64)
    (example,) = task.encode(rows(talk(("u", "one"), ("a", "a"))))
    assert learnt(tokenizer, example)[0] == ["a", "</s>"]
    assert tokenizer.convert_ids_to_tokens(task.end) == "</s>"


CALL = {"type": "function", "function": {"name": "three", "arguments": '{"of": "b"}'}}
CALLING = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "four", "tool_call_id": "1", "name": "three"},
    {"role": "assistant", "content": "a"},
]


@pytest.mark.parametrize("arguments", ["| tojson", ""])
def test_calls_of_tools_are_learnt_as_the_template_writes_them(make_tokenizer, arguments):
    tokenizer = with_end(make_tokenizer, TOOLS.replace("ARGUMENTS", arguments))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    task = CausalLM(tokenizer, 64)
    (example,) = task.encode(rows({"messages": CALLING, "tools": [{"name": "three"}]}))
    spans = task._chat.write(CALLING, [{"name": "three"}], "f:1")
    assert [spans[0][begin:end].strip() for begin, end in spans[1]] == ['call three {"of": "b"} <end>', "a <end>"]
    assert learnt(tokenizer, example)[0][-3:] == ["<end>", "a", "<end>"]


def test_answers_of_weight_0_are_read_and_not_learnt(chat_tokenizer, tokenizer):
    conversation = talk(("u", "one"), ("a", "a"), ("u", "two"), ("a", "b"), ("u", "three"), ("a", "c"))
    for number, weight in ((1, 0), (3, 1), (5, 0)):
        conversation["messages"][number]["weight"] = weight
    (example,) = CausalLM(chat_tokenizer, 64).encode(rows(conversation))
    answers, words = learnt(chat_tokenizer, example)
    assert answers == ["b", "</s>"]
    assert "a" in words
    assert "c" not in words  # nothing is learnt of what comes after
    assert learnt(tokenizer, CausalLM(tokenizer, 64).encode(rows(conversation))[0])[0] == ["b", "</s>"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({1: {"tool_calls": [CALL]}}, "'tool_calls' of message 2"),
        ({0: {"name": "ann"}}, "'name' of message 1"),
        ({1: {"reasoning_content": "because"}}, "'reasoning_content' of message 2"),
        ({"tools": [{"name": "three"}]}, "'tools'"),
    ],
)
def test_what_the_template_does_not_show_is_named(chat_tokenizer, tokenizer, changes, named):
    conversation = talk(("u", "one"), ("a", "a"))
    for number, keys in changes.items():
        if number == "tools":
            conversation["tools"] = keys
        else:
            conversation["messages"][number] |= keys
    with pytest.raises(DataError, match=f"f:1: the tokenizer's chat template does not show {named}"):
        CausalLM(chat_tokenizer, 64).encode(rows(conversation))
    with pytest.raises(DataError, match=f"f:1: the base has no chat template, so nothing shows {named.split()[0]}"):
        CausalLM(tokenizer, 64).encode(rows(conversation))


LATER = {"type": "function", "function": {"name": "four", "arguments": "{}"}}
FIRST_CALL = TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]").replace("ARGUMENTS", "| tojson")
NAMES_ONLY = TOOLS.replace("{{ c.function.arguments ARGUMENTS }}", "")
EITHER = TOOLS.replace("{{ m.content }}", "{{ '' if m.tool_calls else m.content }}").replace("ARGUMENTS", "| tojson")
TWO_ROLES = TOOLS.replace("in messages %}", "in messages if m.role in ('user', 'assistant') %}").replace(
    "ARGUMENTS", ""
)
SHORT = GEMMA.replace("m.content | trim", "(m.content | trim)[:9]")
THOUGHTLESS = GEMMA.replace("m.content | trim", "m.content.split('@')[-1]")


@pytest.mark.parametrize(
    ("template", "turns", "named"),
    [
        (EITHER, [CALLING[0], {**CALLING[1], "content": "a word"}, *CALLING[2:]], "'content' of message 2"),
        (FIRST_CALL, [CALLING[0], {**CALLING[1], "tool_calls": [CALL, LATER]}, CALLING[3]], "call 2 of 'tool_calls'"),
        (NAMES_ONLY, CALLING, "the arguments of call 1 of 'tool_calls' of message 2"),
        (TWO_ROLES, [{"role": "system", "content": "one"}, CALLING[0], CALLING[3]], "'content' of message 1"),
        (TWO_ROLES, [CALLING[0], {"role": "tool", "content": "a"}, CALLING[3]], "'content' of message 2"),
        (SHORT, [{"role": "user", "content": "a long question"}, CALLING[3]], "'content' of message 1 as it is"),
        (THOUGHTLESS, [CALLING[0], {"role": "assistant", "content": "why @ a"}], "'content' of message 2 as it is"),
    ],
)
def test_no_part_of_a_conversation_vanishes(make_tokenizer, template, turns, named):
    task = CausalLM(with_end(make_tokenizer, template), 64)
    with pytest.raises(DataError, match=f"f:1: the tokenizer's chat template does not show {named}"):
        task.encode(rows({"messages": turns}))


def test_contents_may_be_written_as_json_or_with_other_white_space(make_tokenizer):
    tokenizer = with_end(make_tokenizer, GEMMA.replace("m.content | trim", "m.content | tojson"))
    (example,) = CausalLM(tokenizer, 64).encode(rows(talk(("u", 'one "two"\n\u00e9'), ("a", "a"))))
    assert learnt(tokenizer, example)[0][-1] == "<end>"
    tokenizer = with_end(make_tokenizer, GEMMA.replace("m.content | trim", "m.content.split() | join(' ')"))
    conversation = talk(("u", "one"), ("a", "a \n b"), ("u", "two"), ("a", "c  d"))
    examples = CausalLM(tokenizer, 64).encode(rows(conversation))
    assert learnt(tokenizer, examples[0])[0] == ["a", "b", "<end>", "c", "d", "<end>"]
    assert examples.lengths.unlearnt == 0


def test_a_token_that_ends_conversations_costs_no_answer(make_tokenizer):
    closes = "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    task = CausalLM(with_end(make_tokenizer, TOOLS.replace("ARGUMENTS", "| tojson") + closes), 64)
    text, spans, unlearnt = task._chat.write(CALLING, [{"name": "three"}], "f:1")
    assert [text[begin:end].strip() for begin, end in spans] == ['call three {"of": "b"} <end>', "a <end>"]
    assert unlearnt == 0


@pytest.mark.parametrize("fails", ["{{ 1 // 0 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"])
def test_template_that_fails(make_tokenizer, fails):
    task = CausalLM(make_tokenizer(fails), 64)
    with pytest.raises(DataError, match="f:1: the tokenizer's chat template refuses"):
        task.encode(rows(talk(("u", "one"), ("a", "a"))))


def test_tools_beside_an_instruction(make_tokenizer, tokenizer):
    row = {"instruction": "one", "input": "", "output": "a", "tools": [{"name": "three"}]}
    calling = with_end(make_tokenizer, TOOLS.replace("ARGUMENTS", ""))
    (example,) = CausalLM(calling, 64).encode(rows(row))
    assert learnt(calling, example)[1][:2] == ["<|system|>", "three"]
    with pytest.raises(DataError, match="f:1: the base has no chat template, so nothing shows 'tools'"):
        CausalLM(tokenizer, 64).encode(rows(row))


def test_truncation_keeps_part_of_the_answer_or_drops_the_row(chat_tokenizer):
    task = CausalLM(chat_tokenizer, 8)
    short, long = talk(("u", "one"), ("a", "a b c d e f g h")), talk(("u", "one two three four one two"), ("a", "a"))
    examples = task.encode(rows(short, long))
    (example,) = examples
    assert learnt(chat_tokenizer, example)[0] == ["a", "b", "c", "d"]
    assert (examples.lengths.tokens, examples.lengths.cut, examples.lengths.lost) == ((13, 11), 2, 1)
    with pytest.raises(DataError, match=r"no answer begins within task.max_length.*half have up to 11 tokens"):
        task.encode(rows(long))


def test_batch(chat_tokenizer):
    task = CausalLM(chat_tokenizer, 64)
    conversation = talk(("u", "one"), ("a", "a b"))
    batch = task.collate(task.encode(rows({**conversation, TASK: 3}, {**talk(("u", "one"), ("a", "a")), TASK: 0})))
    assert batch.labels.shape == batch.input_ids.shape == (2, 7)
    assert (batch.labels != IGNORE).sum(1).tolist() == [3, 2]
    assert (batch.labels[~batch.attention_mask] == IGNORE).all()
    assert batch.task_ids.tolist() == [3, 0]


def test_tokenizer_must_have_an_end(make_tokenizer):
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        CausalLM(make_tokenizer(eos_token=None), 64)


TALK = talk(("u", "one"), ("a", "a"))
PARTS = [{"type": "text", "text": "o"}, {"type": "text", "text": "ne"}]


@pytest.mark.parametrize(
    ("row", "same"),
    [
        ({"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "a"}]}, TALK),
        ({"messages": [{"role": "user", "content": PARTS}, TALK["messages"][1]]}, TALK),
        ({"prompt": TALK["messages"][:1], "completion": TALK["messages"][1:]}, TALK),
        ({"prompt": "one", "completion": " a"}, {"instruction": "one", "output": "a"}),
    ],
)
def test_every_shape_of_a_question_with_its_answer_is_the_same_text(chat_tokenizer, tokenizer, row, same):
    for each in (chat_tokenizer, tokenizer):
        assert list(CausalLM(each, 64).encode(rows(row))) == list(CausalLM(each, 64).encode(rows(same)))


def test_answers_before_the_completion_are_read(chat_tokenizer):
    asked = talk(("u", "one"), ("a", "a"), ("u", "two"))["messages"]
    (example,) = CausalLM(chat_tokenizer, 64).encode(rows({"prompt": asked, "completion": "b"}))
    assert learnt(chat_tokenizer, example)[0] == ["b", "</s>"]
    assert "a" in learnt(chat_tokenizer, example)[1]


def test_calls_of_sharegpt_are_learnt_as_those_of_openai(make_tokenizer):
    tokenizer = with_end(make_tokenizer, TOOLS.replace("ARGUMENTS", "| tojson"))
    said = [
        {"from": "human", "value": "one"},
        {"from": "function_call", "value": '{"name": "three", "arguments": {"of": "b"}}'},
        {"from": "observation", "value": "four"},
        {"from": "gpt", "value": "a"},
    ]
    task, tools = CausalLM(tokenizer, 64), [{"name": "three"}]
    calling = [CALLING[0], CALLING[1], {"role": "tool", "content": "four"}, CALLING[3]]
    found, wanted = (
        task.encode(rows(row))
        for row in ({"conversations": said, "tools": tools}, {"messages": calling, "tools": tools})
    )
    assert list(found) == list(wanted)


@pytest.mark.parametrize("arguments", ["| tojson", ""])
def test_what_is_asked_with_tools_is_what_was_read_before_the_answer(make_tokenizer, arguments):
    tokenizer = with_end(make_tokenizer, TOOLS.replace("ARGUMENTS", arguments))
    chat, tools = CausalLM(tokenizer, 64)._chat, [{"name": "three"}]
    text, spans, _ = chat.write(CALLING, tools, "f:1")
    assert [chat.before_answer(CALLING[:at], tools, "f:1") for at in (1, 3)] == [text[:begin] for begin, _ in spans]
    with pytest.raises(DataError, match="f:1: the tokenizer's chat template does not show 'name' of message 1"):
        chat.before_answer([{**CALLING[0], "name": "ann"}], tools, "f:1")


def test_a_developer_speaks_as_the_template_has_it(make_tokenizer, tokenizer):
    told = {"messages": [{"role": "developer", "content": "three"}, *talk(("u", "one"), ("a", "a"))["messages"]]}
    for template, role in ((GEMMA, "<|system|>"), (GEMMA + "{# developer #}", "<unk>")):
        made = with_end(make_tokenizer, template)
        (example,) = CausalLM(made, 64).encode(rows(told))
        assert learnt(made, example)[1][:2] == [role, "three"]
    as_system = talk(("s", "three"), ("u", "one"), ("a", "a"))
    assert list(CausalLM(tokenizer, 64).encode(rows(told))) == list(CausalLM(tokenizer, 64).encode(rows(as_system)))


def test_every_token_of_a_text_is_learnt_once(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(GEMMA)  # which a text does not go through
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    examples = CausalLM(tokenizer, 8).encode(
        rows({"text": "a b c d e f g h one two three four a", TASK: 3}, {"text": "b"})
    )
    words = [tokenizer.convert_ids_to_tokens(example.input_ids) for example in examples]
    assert words == [
        ["<s>", *"abcdefg"], ["g", "h", "one", "two", "three", "four", "a", "</s>"], ["<s>", "b", "</s>"]
    ]  # fmt: skip
    assert [example.labels for example in examples] == [example.input_ids for example in examples]
    assert [example.task for example in examples] == [3, 3, None]
    lengths = examples.lengths
    assert (lengths.tokens, lengths.cut, lengths.lost, lengths.split, lengths.pieces) == ((15, 3), 0, 0, 1, 2)
    assert lengths.loss == "1 of 2 rows are longer than task.max_length = 8 and learnt in 2 pieces"
    assert lengths.enough == "task.max_length = 15 keeps all"
    assert CausalLM(tokenizer, 8).last_answer(examples[0]) is None


@pytest.mark.parametrize("words", [7, 8, 15])
def test_the_last_piece_of_a_text_teaches_something(tokenizer, words):
    examples = CausalLM(tokenizer, 8).encode(rows({"text": "a " * words}))
    assert sum(len(example.input_ids) - 1 for example in examples) == words
    assert all(len(example.input_ids) > 1 for example in examples)
    assert tokenizer.convert_ids_to_tokens(examples[-1].input_ids)[-1] == "</s>"


# Qwen2.5's template with fewer words around the tools.
QWEN = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- endif %}
    {{- "\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""


def test_a_conversation_with_tools_of_either_form_through_a_template_of_qwen():
    import edge_graphs

    inner = edge_graphs.bytes_tokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = QWEN
    call = {"name": "weather", "arguments": '{"city": "Ulm"}'}
    shared = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Weather in Ulm?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Ulm"}}'},
        {"from": "observation", "value": "12 C"},
        {"from": "gpt", "value": "12 degrees."},
    ]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Ulm?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "1", "content": "12 C"},
        {"role": "assistant", "content": "12 degrees."},
    ]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    found = [
        CausalLM(tokenizer, 4096).encode(rows({**row, "tools": tools}))[0]
        for row in ({"conversations": shared}, {"messages": messages})
    ]
    assert found[0] == found[1]
    called = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call><|im_end|>'
    example = found[0]
    learnt_ids = [i for i, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORE]
    assert tokenizer.decode(learnt_ids) == f"{called}12 degrees.<|im_end|>"
    assert "<|im_start|>user\n<tool_response>\n12 C\n</tool_response><|im_end|>" in tokenizer.decode(example.input_ids)
