"""The owner's word: what a policy refuses, of a run before anything is loaded, of a model, and of every plan."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
import tiny_world
from tiny_pki import Authority
from typer.testing import CliRunner

from molehill import __version__, evidence
from molehill.cli import app
from molehill.config import parse
from molehill.errors import ConfigError, ConsentError, MolehillError
from molehill.plan import ClientReply, EvaluationReply, Hello
from molehill.wire.message import Delta
from molehill_client import policy
from molehill_client.consent import Consent, agreement, digest_of, in_words
from molehill_client.deploy.line import Request
from molehill_client.deploy.post import Post
from molehill_client.deploy.trainer import Introduction, Trainer

OPEN = """\
[protection]
needs = "nothing"

[base]
models = ["*"]

[share]
tell = ["rows", "time", "loss", "routing", "tokens", "scores", "baselines"]
"""


@pytest.fixture
def word(tmp_path):
    """A policy of these lines, after those of ``start``."""

    def make(text="", start=OPEN):
        path = tmp_path / "policy.toml"
        path.write_text(start + text, encoding="utf-8")
        return policy.read(path)

    return make


# ---- the file ----------------------------------------------------------------------------------------------------


def test_what_init_writes_is_the_careful_default_with_every_key_and_its_meaning(tmp_path):
    path = tmp_path / "policy.toml"
    done = CliRunner().invoke(app, ["client", "policy", str(path), "--init"])
    assert done.exit_code == 0, done.output
    assert policy.read(path).policy == policy.Policy()
    values = tomllib.loads(path.read_text())
    assert values == policy.Policy().model_dump(mode="json")
    assert max(map(len, path.read_text().splitlines())) <= 120
    again = CliRunner().invoke(app, ["client", "policy", str(path), "--init"])
    assert (again.exit_code, "there is a file already" in again.output) == (2, True)
    shown = CliRunner().invoke(app, ["client", "policy", str(path), "--json"])
    assert json.loads(shown.stdout)["digest"] == policy.read(path).digest
    assert "limits.rounds" in CliRunner().invoke(app, ["client", "policy", str(path)]).stdout


@pytest.mark.parametrize(
    ("text", "where", "why"),
    [
        ("[limits]\nround = 3\n", ":2", "unknown key 'limits.round'. Did you mean 'rounds'?"),
        ("[limit]\nrounds = 3\n", ":1", "unknown key 'limit'. Did you mean 'limits'?"),
        ('[share]\ntell = ["rows", "everything"]\n', ":2", "there is no kind of evidence 'everything'; known are rows"),
        ('[share]\ncodecs = ["int3"]\n', ":2", "there is no codec 'int3'"),
        ('[share]\ntensors = ["C"]\n', ":2", "there is no kind of tensor 'C'; known are A, B"),
        ('[protection]\nneeds = "much"\n', ":2", "protection.needs: Input should be"),
        ('[base]\ndigests = ["12"]\n', ":2", "base.digests.0"),
        ("[limits\n", "", "not valid TOML"),
    ],
)
def test_a_policy_that_is_wrong_says_where(tmp_path, text, where, why):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        policy.read(path)
    assert caught.value.where == f"{path}{where}"
    assert why in str(caught.value)
    words = ["client", "join", "--server", "localhost:1", "--identity", str(tmp_path), "--data", str(path)]
    done = CliRunner().invoke(app, [*words, "--state", str(tmp_path / "state"), "--policy", str(path)])
    assert (done.exit_code, "policy.toml" in done.output) == (2, True)  # before anything is asked of anybody


def test_every_field_that_a_client_sends_belongs_to_a_kind_of_evidence():
    named = {field for kind in evidence.KINDS for field in kind.fields}
    for message in (Hello, ClientReply, EvaluationReply, Delta):
        fields = set(getattr(message, "model_fields", None) or message.__dataclass_fields__)
        told = {name.partition(".")[2] for name in named if name.startswith(f"{message.__name__}.")}
        assert told | evidence.ADDRESS[message.__name__] == fields, message.__name__
        assert not told & evidence.ADDRESS[message.__name__]
    assert len({kind.name for kind in evidence.KINDS}) == len(evidence.KINDS)


# ---- a run -------------------------------------------------------------------------------------------------------

SECURE = {"privacy": {"secure_aggregation": True}, "wire": {"up": "fp32"}, "data": {"clients": 4}}
DP = {"privacy": {"clip": 0.5, "noise": 1.0, "epsilon": 8.0, "delta": 1e-5}}


def config(**sections):
    return parse({"base": {"model": "lab/base"}, "task": {"labels": ["a", "b"]}, **sections})


@pytest.mark.parametrize("run", [{}, {"molora": {"rank": 32}}, SECURE, DP])
def test_an_open_policy_allows_what_runs_ask_for(word, run):
    Consent(word()).require_run(config(**run), own_base=False)


CAREFUL = '[base]\nmodels = ["lab/base"]\n'


def test_a_careful_policy_allows_secure_aggregation_and_nothing_in_the_open(word):
    consent = Consent(word(CAREFUL, start=""))
    consent.require_run(config(**SECURE), own_base=False)
    with pytest.raises(ConsentError, match=r"no secure aggregation and no clip, protection\.needs is either") as caught:
        consent.require_run(config(), own_base=False)
    assert "it is told loss (the mean training loss of every round), share.tell is rows, time" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "run", "key", "why"),
    [
        ('[protection]\nneeds = "secure-aggregation"\n', DP, 2, "no secure aggregation, protection.needs is"),
        ('[protection]\nneeds = "both"\n', SECURE, 2, "it has no clip, protection.needs is both (line 2)"),
        ('[protection]\nneeds = "clip"\nclip = 0.1\n', DP, 3, "a clip of 0.5, protection.clip is 0.1 (line 3)"),
        ('[protection]\nclip = 0.1\n[base]\nmodels = ["*"]\n', DP, 2, "a clip of 0.5, protection.clip is 0.1 (line 2)"),
        ('[base]\nmodels = ["lab/other", "x/*"]\n', SECURE, 2, "is 'lab/base', base.models is lab/other, x/*"),
        ("", SECURE, 0, "base.model is 'lab/base', base.models is nothing unless the policy says otherwise"),
        (f"{CAREFUL}[limits]\nrounds = 3\n", {**SECURE, "run": {"rounds": 4}}, 4, "run.rounds is 4, limits.rounds is"),
        (f"{CAREFUL}[limits]\nsteps = 3\n", {**SECURE, "train": {"steps": 4}}, 4, "train.steps is 4, limits.steps is"),
        (f"limits = {{ rank = 4 }}\n{CAREFUL}", SECURE, 1, "molora.rank is 8, limits.rank is 4 (line 1)"),
        (f'{CAREFUL}[share]\ncodecs = ["int4"]\n', SECURE, 4, "wire.up is fp32, share.codecs is int4 (line 4)"),
        (
            f'{CAREFUL}[data]\ncolumns = ["text"]\n',
            {**SECURE, "data": {"clients": 4, "columns": {"text": "letter", "group": "author"}}},
            4,
            "it reads the column 'author', 'label', 'letter', data.columns is text (line 4)",
        ),
    ],
)  # fmt: skip
def test_a_run_that_asks_for_more_is_refused_with_the_line(word, text, run, key, why):
    given = word(text, start="")
    with pytest.raises(ConsentError) as caught:
        Consent(given).require_run(config(**run), own_base=False)
    assert caught.value.where.endswith(f"policy.toml:{key}" if key else "policy.toml")
    assert why in caught.value.what
    assert caught.value.exit_code == 15


def test_a_base_of_the_owners_own_choice_needs_no_name(word):
    Consent(word("[base]\n", start="")).require_run(config(**SECURE), own_base=True)


def test_weights_ranks_and_kinds_of_tensors_are_those_of_the_model(house, word):
    h = house()
    model = h.bench.model
    digest = h.bench.base_digest
    Consent(word(f'[limits]\nrank = 2\n[base]\ndigests = ["{digest}"]\n', start="")).require_model(
        h.config, digest, model
    )
    with pytest.raises(ConsentError, match=rf"weight digest {digest}, base.digests is 0+ \(line 2\)"):
        Consent(word(f'[base]\ndigests = ["{"0" * 64}"]\n', start="")).require_model(h.config, digest, model)
    with pytest.raises(ConsentError, match=r"an expert has rank 2, limits.rank is 1"):
        Consent(word("[limits]\nrank = 1\n", start="")).require_model(h.config, digest, model)
    with pytest.raises(ConsentError, match=r"round 1 shares A, head, share.tensors is B, gate \(line 2\)"):
        Consent(word('[share]\ntensors = ["B", "gate"]\n', start="")).require_model(h.config, digest, model)
    kept = parse({**h.config.model_dump(mode="json", exclude_none=True), "personal": {"head": "personal"},
                  "federation": {"policy": "ffa"}})  # fmt: skip
    Consent(word('[share]\ntensors = ["B", "gate"]\n', start="")).require_model(kept, digest, model)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_a_limit_of_rank_holds_for_every_kind_of_experts(house, word, kind):
    """The limit is of what an expert has, not of what ``molora.rank`` says before experts are dealt."""
    dealt = {"name": "hetero_rank", "kind": "explicit", "ranks": [2, 300]}
    h = house(molora={"expert": kind, "allocation": dealt})
    assert h.config.molora.rank < 32
    given = word("", start=OPEN)
    Consent(given).require_run(h.config, own_base=True)
    with pytest.raises(ConsentError, match=r"an expert has rank 300, limits.rank is 32"):
        Consent(given).require_model(h.config, h.bench.base_digest, h.bench.model)
    agreed = agreement(h.config, h.bench.base_digest, h.bench.model, ["text"], given)
    assert agreed["rank"] == 300
    assert ", rank 300; it reads" in in_words(agreed)


def test_experts_without_a_rank_are_as_small_as_an_expert_can_be(house, word):
    h = house(molora={"expert": "ia3"})
    Consent(word("[limits]\nrank = 1\n", start="")).require_model(h.config, h.bench.base_digest, h.bench.model)


# ---- a plan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "round_", "why"),
    [
        ('[share]\ntensors = ["A", "B", "gate"]\n', 1, r"this plan: round 1 shares head, share.tensors is A, B, gate"),
        ('[share]\ncodecs = ["int4"]\n', 1, r"encoded as fp32, share.codecs is int4 \(line 2\)"),
        ("[limits]\nsteps = 1\n", 1, r"it has 2 steps, limits.steps is 1 \(line 2\)"),
        ("[limits]\nrounds = 1\n", 2, r"it is of round 2, limits.rounds is 1 \(line 2\)"),
    ],
)
def test_a_later_plan_that_asks_for_more_is_refused_whatever_the_configuration_says(house, word, text, round_, why):
    h = house()
    client = h.client(0)
    client.consent = Consent(word(text, start=""))
    with pytest.raises(ConsentError, match=why):
        client.train(h.plan(0, round_))
    assert not h.folder.exists()
    client.consent = Consent(word("", start=""))
    assert client.train(h.plan(0, round_)).bytes_up


# ---- a machine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(sources, tmp_path):
    """A lab machine's trainer, which is introduced to runs; nothing of it is replaced."""
    base, _ = sources
    rows = tiny_world.rows(24)
    identity = Authority(tmp_path).issue("lab-1", server=False)
    (tmp_path / "state").mkdir()
    post = Post(
        name="lab-1",
        server="127.0.0.1",
        data=str(tiny_world.write_rows(tmp_path / "train.jsonl", rows[:18])),
        test=str(tiny_world.write_rows(tmp_path / "test.jsonl", rows[18:])),
        identity=str(identity),
        passphrase_file=None,
        state=str(tmp_path / "state"),
        socket=str(tmp_path / "socket"),
        base=str(base),
        policy=str(tmp_path / "policy.toml"),
    )
    trainer = Trainer(post)

    def hello(**sections):
        run = {"task": {"max_length": 16, "labels": list(tiny_world.LABELS)}}
        made = tiny_world.config(*sources, **{**run, **sections})
        met = Introduction(config=made.to_toml(), exchange_port=1, version=__version__, instance=made.digest[:8])
        return Hello.model_validate_json(trainer.answer(Request("query.hello", met.model_dump_json())))

    hello.trainer, hello.state = trainer, tmp_path / "state"
    return hello


def test_a_machine_reads_its_policy_again_for_every_run_and_notes_what_it_agreed_to(machine, word):
    word()
    assert machine().n_train == 18
    (first,) = [json.loads(line) for line in (machine.state / "agreed.jsonl").read_text().splitlines()]
    assert (first["rounds"], first["columns"], first["codec"]) == (2, ["label", "text"], "int4")
    status = json.loads(machine.trainer.status(Request("status")))
    assert status["agreed"].startswith("agreed to run 'tiny': at most 2 rounds of 2 steps")
    assert first["digest"][:12] in status["agreed"]
    assert re.search(r"Tokens of the \d+ rows: half have up to \d+ tokens", status["lengths"])
    word("[limits]\nrounds = 2\n")
    with pytest.raises(MolehillError) as caught:  # in the words that go to the coordinator
        machine(run={"name": "tiny", "rounds": 3})
    assert str(caught.value) == (
        "lab-1: its owner's policy refuses this run: run.rounds is 3, limits.rounds is 2 (line 10). "
        "Ask for less, or ask the owner."
    )
    with pytest.raises(MolehillError, match="refuses this run"):  # and no plan is looked at
        machine.trainer.answer(Request("train", "{}"))
    assert machine(run={"name": "tiny", "rounds": 2}).n_train == 18
    entries = [json.loads(line) for line in (machine.state / "agreed.jsonl").read_text().splitlines()]
    assert len(entries) == 2
    assert entries[0]["policy"] != entries[1]["policy"]
    (machine.state.parent / "policy.toml").write_text("[limits]\nrounds = 'many'\n")
    with pytest.raises(MolehillError, match=r"^lab-1: its owner's policy cannot be read\. Ask the owner\.$"):
        machine()


def test_columns_that_no_policy_names_are_not_read(machine, word):
    word('[data]\ncolumns = ["text", "label"]\n')
    machine()
    assert set(machine.trainer._read(machine.trainer._client.bench.config, machine.trainer._post.data).columns) == {
        *("text", "label"),
    }
    with pytest.raises(MolehillError, match=r"reads the column 'domain', data\.columns is text, label \(line 10\)"):
        machine(data={"columns": {"label": "domain"}})


def test_what_no_policy_lists_is_not_told(machine, word):
    word("", start=OPEN.replace(', "scores", "baselines"', ""))
    machine(evaluate={"baselines": True})
    client = machine.trainer._client
    with pytest.raises(ConsentError, match=r"refuses this request: it is told baselines .*share\.tell is rows, time"):
        client.consent.require_told(client.bench.config, "train.baseline")
    with pytest.raises(ConsentError, match=r"it is told scores \(how good the models are on the held-out rows"):
        client.consent.require_told(client.bench.config, "evaluate")
    agreed = agreement(client.bench.config, "0" * 64, client.bench.model, ["text"], machine.trainer._word)
    assert agreed["tells"] == ["rows", "time", "loss", "tokens"]
    assert "it tells rows, time, loss, tokens. Under policy" in in_words(agreed)
    assert digest_of(agreed) != digest_of({**agreed, "rounds": 3})
