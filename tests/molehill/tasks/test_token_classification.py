"""Tags of words: rows are checked, a word's first token has its tag, and entities are counted as CoNLL counts them."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from molehill import config
from molehill.entities import Tagging, begins
from molehill.errors import DataError, ModelError
from molehill.molora.forward import Forward
from molehill.tasks.batches import IGNORE
from molehill.tasks.kind import kind_of, make_task
from molehill.tasks.schema import class_counts, load_rows
from molehill.tasks.token_classification import EntitySum, first_tokens

TASK = config.Task(kind="token-classification", max_length=8)
TAGS = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")


def load(write, rows, task=TASK):
    return load_rows(config.Data(source=str(write("rows.jsonl", rows))), task)


def wordpiece():
    vocab = {word: i for i, word in enumerate(["<pad>", "[UNK]", "[CLS]", "[SEP]", "par", "##is", "an", "##na", "in"])}
    inner = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="[UNK]")


def test_the_first_token_of_a_word_has_its_tag(write):
    rows, task = load(
        write,
        [
            {"tokens": ["anna", "in", "paris"], "tags": ["B-PER", "O", "B-LOC"]},
            {"tokens": ["anna", "anna", "anna", "paris"], "tags": ["B-PER", "I-PER", "I-PER", "O"]},
        ],
    )
    assert task.labels == ("B-LOC", "B-PER", "I-PER", "O")
    made = make_task(task, wordpiece())
    short, long = made.encode(rows)
    assert short.input_ids == [2, 6, 7, 8, 4, 5, 3]
    assert short.labels == [IGNORE, 1, IGNORE, 3, 0, IGNORE, IGNORE]
    assert long.input_ids == [2, 6, 7, 6, 7, 6, 7, 3]
    assert long.labels == [IGNORE, 1, IGNORE, 2, IGNORE, 2, IGNORE, IGNORE]
    lengths = made.encode(rows).lengths
    assert (lengths.cut, lengths.words) == (1, 1)
    assert lengths.loss.endswith("1 word has no token left, so that its tag is neither learnt nor scored")
    batch = made.collate([short, long])
    assert (batch.of, batch.predictions) == ("token", 6)
    assert made.counts([short, long]) == [1, 2, 2, 1]


def test_words_of_byte_level_tokenizers_begin_at_their_space():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    words = ["Ana", "à", "🙂"]
    found = inner.encode(" ".join(words))
    # à has two tokens, 🙂 four; a space that is a token of its own says nothing
    assert first_tokens(words, found.offsets) == begins("Ana à 🙂", found.offsets, found.word_ids) == [0, 4, 7]


@pytest.mark.parametrize(
    ("words", "places", "wanted"),
    [
        (["a", "b"], [(0, 0), (0, 1), (2, 3), (0, 0)], [1, 2]),
        (["a", "b"], [(0, 3)], [0, None]),  # a token of both speaks for the first
        (["a", "b", "c"], [(0, 1), (4, 5)], [0, None, 1]),  # a word that the tokenizer leaves out
        (["ab", "c"], [(0, 1), (1, 2)], [0, None]),  # cut off
    ],
)
def test_a_word_without_a_token_of_its_own_has_none(words, places, wanted):
    assert first_tokens(words, places) == wanted


def test_plain_text_is_split_as_the_tokenizer_does():
    text = "anna, in paris"
    found = wordpiece().backend_tokenizer.encode(text)
    assert [text[slice(*found.offsets[at])] for at in begins(text, found.offsets, found.word_ids)] == [
        *("an", ",", "in", "par"),
    ]


def test_words_are_found_without_a_pre_tokenizer():
    text = "one two"
    assert begins(text, [(0, 2), (2, 3), (3, 5), (5, 7)], [0, 0, 0, 0]) == [0, 2]


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O B-PER I-PER O B-LOC", [(1, 3, "PER"), (4, 5, "LOC")]),
        ("B-PER B-PER I-PER", [(0, 1, "PER"), (1, 3, "PER")]),
        ("B-PER I-LOC I-LOC", [(0, 1, "PER"), (1, 3, "LOC")]),
        ("O I-PER I-PER O I-PER", [(1, 3, "PER"), (4, 5, "PER")]),
        ("I-LOC I-LOC | I-LOC O", [(0, 2, "LOC"), (2, 3, "LOC")]),
        ("O O", []),
    ],
)  # fmt: skip
def test_entities_are_those_of_conll(tags, spans):
    tagging = Tagging.of(TAGS)
    assert tagging.types == ("LOC", "PER")
    rows = [row.split() for row in tags.split(" | ")]
    firsts = np.array([not at for row in rows for at in range(len(row))])
    found = tagging.spans(np.array([TAGS.index(tag) for row in rows for tag in row]), firsts)
    assert [(start, stop, tagging.types[kind]) for start, stop, kind in found] == spans


def test_tags_without_b_and_i_are_of_single_words():
    tagging = Tagging.of(("NOUN", "O", "VERB", "I-NOUN"))
    assert tagging.types == ("NOUN", "VERB")
    spans = tagging.spans(np.array([0, 0, 1, 2, 3]), np.array([True, False, False, False, False]))
    assert spans.tolist() == [[0, 1, 0], [1, 2, 0], [3, 4, 1], [4, 5, 0]]


def passed(said, right, rows):
    scores = torch.nn.functional.one_hot(torch.tensor([TAGS.index(tag) for tag in said]), len(TAGS)).float()
    labels = torch.tensor([TAGS.index(tag) for tag in right])
    return Forward(scores, labels, torch.tensor(rows), [], lambda: scores)


# right, said, row; seqeval 1.2.2 says of the whole: precision 3/6, recall 3/5, F1 6/11.
TEXTS = [
    (["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "I-PER", "O", "B-PER"]),
    (["O", "O", "B-LOC", "I-LOC"], ["O", "B-LOC", "I-LOC", "I-LOC"]),
    (["B-PER", "B-LOC"], ["B-PER", "I-LOC"]),
    (["O", "O"], ["I-PER", "O"]),
]


def test_figures_are_those_of_seqeval_however_the_rows_come():
    found = []
    for batches in ([[0, 1, 2, 3]], [[2], [3, 1], [0]]):
        total = EntitySum(Tagging.of(TAGS), len(TAGS))
        for batch in batches:
            right, said = (functools.reduce(operator.iadd, (TEXTS[row][side] for row in batch), []) for side in (0, 1))
            rows = [at for at, row in enumerate(batch) for _ in TEXTS[row][0]]
            total.add(passed(said, right, rows))
        found.append((total.scores(), total.confusion))
    assert found[0][1] == found[1][1]
    (scores, _), (other, _) = found
    assert {name: each.value for name, each in scores.figures.items()} == {
        "entity_f1": pytest.approx(6 / 11), "entity_precision": 0.5, "entity_recall": 0.6,
    }  # fmt: skip
    assert other.figures == scores.figures
    assert (scores.n, scores.macro_f1) == (12, None)
    assert scores.accuracy == pytest.approx(7 / 12)
    for figure in scores.figures.values():
        assert figure.interval[0] < figure.value < figure.interval[1]


def test_it_is_told_from_a_classifier_of_words_by_where_entities_end():
    """One word too many costs one of twelve words, and one of three entities."""
    right = ["B-PER", "O", "O", "O", "B-LOC", "O", "O", "O", "B-PER", "O", "O", "O"]
    said = ["B-PER", "I-PER", "O", "O", "B-LOC", "O", "O", "O", "B-PER", "O", "O", "O"]
    total = EntitySum(Tagging.of(TAGS), len(TAGS))
    total.add(passed(said, right, [0] * 12))
    scores = total.scores()
    assert scores.accuracy == pytest.approx(11 / 12)
    assert scores.figures["entity_f1"].value == pytest.approx(2 / 3)


def test_the_interval_is_wider_where_words_of_a_row_fail_together():
    alone, together = (EntitySum(Tagging.of(TAGS), len(TAGS)) for _ in range(2))
    right = ["B-PER", "B-LOC"] * 20
    said = ["B-PER", "B-LOC"] * 10 + ["O", "O"] * 10
    alone.add(passed(said, right, range(40)))
    together.add(passed(said, right, [at // 10 for at in range(40)]))
    one, other = (each.scores().figures["entity_recall"] for each in (alone, together))
    assert one.value == other.value == 0.5
    assert other.interval[1] - other.interval[0] > one.interval[1] - one.interval[0]


def test_rows_without_entities_have_no_f1_and_none_found_is_zero():
    total = EntitySum(Tagging.of(TAGS), len(TAGS))
    total.add(passed(["O", "B-PER"], ["O", "O"], [0, 0]))
    assert total.scores().figures == {}
    total.add(passed(["O"], ["B-PER"], [0]))
    assert [each.value for each in total.scores().figures.values()] == [0.0, 0.0, 0.0]
    assert EntitySum(Tagging.of(TAGS), len(TAGS)).confusion == [[0] * 5] * 5


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, r":2: the row has 2 tokens and 1 tags"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "word 2 of 'tokens' is empty"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, "word 2 of 'tokens' is 3, no text"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "'tokens' must be a list, but is str 'a b'"),
        ({"tokens": ["a"], "tags": "O"}, "'tags' must be a list"),
        ({"tokens": ["a"], "tags": [["O"]]}, "'label' must be text, but is list"),
        ({"tokens": ["a"], "tags": [None]}, "the row has no 'label'"),
        ({"tokens": ["a"]}, "the row has no 'tags'"),
        ({"tokens": [], "tags": []}, "'tags' is empty"),
        ({"tokens": ["a"], "tags": ["S-PER"]}, "'S-PER' is of BIOES or BILOU. Write it as B-PER"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(write, row, says):
    with pytest.raises(DataError, match=says):
        load(write, [{"tokens": ["a", "b"], "tags": ["B-PER", "O"]}, row])


def test_tags_that_are_not_listed_are_refused(write):
    listed = TASK.model_copy(update={"labels": ("B-PER", "I-PER", "O")})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: label 'B-Per' is not in task\.labels.*Did you mean 'B-PER'"):
        load(write, [{"tokens": ["a"], "tags": ["B-Per"]}], listed)


def test_entities_are_counted_and_rows_held_out_by_what_they_have(write):
    rows, task = load(
        write,
        [
            {"tokens": ["a", "b", "c"], "tags": ["B-PER", "I-PER", "B-LOC"]},
            {"tokens": ["a", "b"], "tags": ["I-PER", "B-PER"]},
            {"tokens": ["a"], "tags": ["O"]},
        ],
    )
    assert class_counts(rows, task) == {"LOC": 1, "PER": 3}
    assert rows["molehill.stratum"] == ("LOC PER", "PER", "")
    assert class_counts(rows.take([]), task) == {"LOC": 0, "PER": 0}


def test_numbers_are_tags_too(write):
    rows, task = load(write, [{"tokens": ["a", "b"], "tags": [0, 10]}, {"tokens": ["c"], "tags": [2]}])
    assert task.labels == ("0", "2", "10")
    assert rows["tags"] == (["0", "10"], ["2"])


def test_a_slow_tokenizer_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="cannot say where its tokens start"):
        kind_of(TASK).make(Slow(), TASK)
