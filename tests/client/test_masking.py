"""A client's part in secure aggregation: what it does, and what it refuses a server that asks for more."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from toy_federation import MemoryVault, config

from molehill.config import Data
from molehill.errors import IdentityError, MessageError, ResumeError
from molehill.secure import keys
from molehill.secure.messages import (
    Advert,
    AskAgree,
    AskKeys,
    AskShares,
    AskUnmask,
    Company,
    survivors,
    threshold,
)
from molehill_client.masking import Masker

NAMES = ("a", "b", "c", "d")
SECURE = config(privacy={"secure_aggregation": True})
VALUES = np.array([0.5, -3.0, 0.0])


class Group:
    """Clients, and a server that passes on what it should, unless a test has it do otherwise."""

    def __init__(self, names=NAMES, signers=None, config=SECURE):
        self.config = config
        self.vaults = {name: MemoryVault() for name in names}
        self.signers = signers or {}
        self.adverts, self.said = {}, {}

    def masker(self, name) -> Masker:
        """As new after every message: what it knows lies in its vault."""
        return Masker(name, self.config, self.vaults[name], self.signers.get(name))

    def to(self, name, **values):
        return {"run": "molehill", "round": 3, "attempt": 0, "client": name, **values}

    def keys(self, **values):
        self.adverts = {n: self.masker(n).keys(AskKeys(**self.to(n, **values))) for n in self.vaults}

    def ask_shares(self, name, **values):
        return AskShares(**self.to(name, **{"adverts": tuple(self.adverts.values()), **values}))

    def shares(self):
        self.said = {n: self.masker(n).shares(self.ask_shares(n)) for n in self.vaults}

    def company(self, name, sharers=None, attempt=0):
        owners = [owner for owner in sharers or self.said if owner != name]
        return Company(attempt=attempt, cap=10, inbox={owner: self.said[owner].sealed[name] for owner in owners})

    def mask(self, name):
        return self.masker(name).mask(3, self.company(name), VALUES)

    def agree(self, name, arrived=("a", "b", "c"), lost=("d",), **values):
        return self.masker(name).agree(AskAgree(**self.to(name, **values), arrived=arrived, lost=lost)).signature

    def ask(self, name, arrived=("a", "b", "c"), lost=("d",), signatures=None, **values):
        signed = {one: self.agree(one) for one in "abc"} if signatures is None else signatures
        ask = AskUnmask(**self.to(name, **values), arrived=arrived, lost=lost, signatures=signed)
        return self.masker(name).unmask(ask)


@pytest.fixture
def group():
    return Group()


@pytest.fixture
def masked(group):
    group.keys()
    group.shares()
    for name in "abc":
        group.mask(name)
    return group


def test_a_client_gives_away_one_share_of_everybody(masked):
    answer = masked.ask("a")
    assert answer.own.keys() == {"a", "b", "c"}
    assert answer.keys.keys() == {"d"}


def test_the_same_question_has_the_same_answer_and_another_one_none(masked):
    signed = {name: masked.agree(name) for name in "abc"}
    assert {name: masked.agree(name) for name in "abc"} == signed
    first = masked.ask("a", signatures=signed)
    assert masked.ask("a", signatures=signed) == first
    for again in ({"signatures": signed}, {"signatures": {}}):
        with pytest.raises(MessageError, match="has signed another list of who is in the sum, and two of them"):
            masked.ask("a", arrived=("a", "b", "d"), lost=("c",), **again)
    with pytest.raises(MessageError, match="has signed another list"):
        masked.agree("b", arrived=("a", "b", "d"), lost=("c",))
    with pytest.raises(MessageError, match="are 'done'"):
        masked.agree("a")


def test_no_share_is_given_away_before_enough_have_signed_the_same(masked):
    signed = {name: masked.agree(name) for name in "ab"}
    before = masked.vaults["a"].data
    with pytest.raises(MessageError, match="2 clients have signed who is in the sum, fewer than the threshold of 3"):
        masked.ask("a", signatures=signed)
    for wrong in (signed["a"], "0" * 128):
        with pytest.raises(MessageError, match="a signature is not for this list of clients"):
            masked.ask("a", signatures={**signed, "c": wrong})
    with pytest.raises(MessageError, match="a signature of 'd', who is not in the sum"):
        masked.ask("a", signatures={**signed, "d": signed["b"]})
    with pytest.raises(MessageError, match="a signature is not for this list"):  # nor by one that has signed nothing
        masked.ask("c", signatures={**signed, "c": signed["a"]})
    assert masked.vaults["a"].data == before
    assert masked.ask("a", signatures={**signed, "c": masked.agree("c")})


def test_who_was_away_when_enough_signed_helps_with_their_list_and_no_other():
    group = Group()
    group.keys()
    group.shares()
    for name in NAMES:
        group.mask(name)
    signed = {name: group.agree(name, arrived=NAMES, lost=()) for name in "abc"}
    answer = group.ask("d", arrived=NAMES, lost=(), signatures=signed)
    assert answer.own.keys() == set(NAMES)
    assert group.ask("d", arrived=NAMES, lost=(), signatures=signed) == answer
    with pytest.raises(MessageError, match="are 'done'"):
        group.agree("d", arrived=("a", "b", "d"), lost=("c",))
    with pytest.raises(MessageError, match="it has signed another list"):
        group.ask("d", arrived=("a", "b", "d"), lost=("c",), signatures=signed)


def test_a_signature_is_for_one_attempt_and_one_set_of_keys(group):
    """The attempt has other keys, so what was signed in it counts for nothing in the next one."""
    signed = []
    for attempt in range(2):
        group.keys(attempt=attempt)
        group.said = {n: group.masker(n).shares(group.ask_shares(n, attempt=attempt)) for n in NAMES}
        for name in "abc":
            group.masker(name).mask(3, group.company(name, attempt=attempt), VALUES)
        signed.append({name: group.agree(name, attempt=attempt) for name in "abc"})
    with pytest.raises(MessageError, match="a signature is not for this list of clients"):
        group.ask("a", signatures={**signed[1], "b": signed[0]["b"]}, attempt=1)
    with pytest.raises(MessageError, match="no keys for attempt 0"):
        group.ask("a", signatures=signed[0])
    assert group.ask("a", signatures=signed[1], attempt=1)


@pytest.mark.parametrize(
    ("arrived", "lost"),
    [(("a", "b", "c", "d"), ("d",)), (("a", "b", "b", "c"), ("d",)), (("a", "b", "c"), ("c", "d"))],
)
def test_both_secrets_of_a_client_are_refused(masked, arrived, lost):
    with pytest.raises(MessageError, match="asked for both secrets of"):
        masked.agree("a", arrived=arrived, lost=lost)
    with pytest.raises(MessageError, match="asked for both secrets of"):
        masked.ask("a", arrived=arrived, lost=lost)


@pytest.mark.parametrize(
    ("arrived", "lost", "why"),
    [
        (("a", "b"), ("c", "d"), "2 of 4 clients are left, fewer than the threshold of 3"),
        (("a", "b", "c"), (), "other clients than those it masked with"),
        (("a", "b", "c", "x"), ("d",), "other clients than those it masked with"),
        (("b", "c", "d"), ("a",), "other clients than those it masked with"),
    ],
)
def test_other_sums_are_refused(masked, arrived, lost, why):
    with pytest.raises(MessageError, match=why):
        masked.agree("a", arrived=arrived, lost=lost)
    with pytest.raises(MessageError, match=why):
        masked.ask("a", arrived=arrived, lost=lost)


def test_shares_are_given_away_once_a_round(masked):
    masked.ask("a")
    for values in ({}, {"attempt": 1}, {"round": 2}):
        with pytest.raises(MessageError, match="already helped to unmask round 3"):
            masked.masker("a").keys(AskKeys(**masked.to("a", **values)))
    masked.masker("a").keys(AskKeys(**masked.to("a", round=4)))
    masked.masker("b").keys(AskKeys(**masked.to("b", attempt=1)))  # it has given nothing away


def test_secrets_are_gone_once_they_are_given_away_or_made_anew(masked):
    seeds = {name: masked.vaults[name].data for name in "ab"}
    assert all(b'"seed":"' in data and b'"seed":""' not in data for data in seeds.values())
    masked.ask("a")
    assert b'"seed":""' in masked.vaults["a"].data
    assert b'"shares_key":""' in masked.vaults["a"].data
    assert b'"signing_key":""' in masked.vaults["a"].data
    masked.masker("b").keys(AskKeys(**masked.to("b", attempt=1)))
    with pytest.raises(MessageError, match="no keys for attempt 0 at round 3"):
        masked.agree("b")


def test_nothing_is_masked_twice(masked):
    with pytest.raises(MessageError, match="it is past that: its secrets of round 3 are 'masked'"):
        masked.mask("a")


def test_every_step_needs_the_one_before(group):
    with pytest.raises(MessageError, match="no keys for attempt 0"):
        group.masker("a").shares(AskShares(**group.to("a", adverts=())))
    group.keys()
    with pytest.raises(MessageError, match="no keys for attempt 1"):
        group.masker("a").shares(group.ask_shares("a", attempt=1))
    with pytest.raises(MessageError, match="are 'keys'"):
        group.masker("a").ready(3, Company(attempt=0, cap=1, inbox={}))
    group.shares()
    with pytest.raises(MessageError, match="are 'shares'"):
        group.agree("a")
    with pytest.raises(MessageError, match="are 'shares'"):
        group.ask("a", signatures={})
    with pytest.raises(MessageError, match="are 'shares'"):
        group.shares()
    for name in NAMES:
        group.mask(name)
    with pytest.raises(MessageError, match="0 clients have signed"):
        group.ask("a", arrived=NAMES, lost=(), signatures={})


def test_a_plan_that_asks_for_a_delta_in_the_open_is_refused(group):
    with pytest.raises(MessageError, match="asks for a delta in the open"):
        group.masker("a").ready(3, None)


def test_a_run_without_secure_aggregation_answers_nothing(group):
    with pytest.raises(MessageError, match="which this run does not have"):
        Masker("a", config(), group.vaults["a"]).keys(AskKeys(**group.to("a")))


@pytest.mark.parametrize("values", [{"client": "b"}, {"run": "other"}])
def test_messages_for_others_are_refused(group, values):
    with pytest.raises(MessageError, match="a request to"):
        group.masker("a").keys(AskKeys(**group.to("a") | values))


def test_too_small_a_company_is_refused(group):
    group.keys()
    few = tuple(group.adverts[name] for name in "ab")
    with pytest.raises(MessageError, match=r"2 clients take part, and by .* it masks among 3 or more"):
        group.masker("a").shares(group.ask_shares("a", adverts=few))
    group.shares()
    with pytest.raises(MessageError, match="2 of 4 clients are left, fewer than the threshold of 3"):
        group.masker("a").ready(3, group.company("a", sharers="ab"))


def test_a_victim_among_two_accomplices_cannot_be_unmasked():
    """The server takes part itself and calls the third one lost: the sum would be the victim's and its own."""
    group = Group(("other", "server", "victim"), config=SECURE.model_copy(update={"data": Data(clients=3)}))
    group.keys()
    group.shares()
    with pytest.raises(MessageError, match="2 of 3 clients are left, fewer than the threshold of 3"):
        group.masker("victim").ready(3, group.company("victim", sharers=("server", "victim")))
    for name in ("server", "victim"):
        group.mask(name)
    before = group.vaults["victim"].data
    with pytest.raises(MessageError, match="2 of 3 clients are left, fewer than the threshold of 3"):
        group.agree("victim", arrived=("server", "victim"), lost=("other",))
    assert group.vaults["victim"].data == before


@pytest.mark.parametrize(
    ("clients", "select", "least"),
    [(100, "all", 67), (100, {"name": "random", "fraction": 0.1}, 7), (8, {"name": "round_robin", "count": 6}, 5)],
)
def test_three_of_many_are_too_small_a_company(clients, select, least):
    """How many it may expect it knows of its own copy of the configuration, whatever the server sends."""
    sections = {"privacy": {"secure_aggregation": True}, "data": {"clients": clients}}
    group = Group(tuple(f"c{n:03}" for n in range(least)), config=config(**sections, federation={"select": select}))
    group.keys()
    few = tuple(group.adverts.values())[: least - 1]
    with pytest.raises(MessageError, match=f"{least - 1} clients take part, .* it masks among {least} or more"):
        group.masker("c000").shares(group.ask_shares("c000", adverts=few))
    group.shares()


@pytest.mark.parametrize(
    ("privacy", "cap"), [({"max_examples": 20}, 20), ({"clip": 1.0, "noise": 4.0, "epsilon": 8.0, "delta": 1e-5}, 1)]
)
def test_another_weight_than_that_of_its_own_configuration_is_refused(privacy, cap):
    group = Group(config=config(privacy={"secure_aggregation": True, **privacy}))
    group.keys()
    group.shares()
    company = group.company("a")
    with pytest.raises(MessageError, match=f"count for 10 examples at most, by privacy it is {cap}"):
        group.masker("a").ready(3, company)
    own = company.model_copy(update={"cap": cap})
    group.masker("a").ready(3, own)
    assert [group.masker("a").weight(rows, own) for rows in (1, 100)] == [1, cap]
    with pytest.raises(MessageError, match=f"has a client count for 1 examples, by privacy only .* most of {cap}"):
        group.masker("a").ready(3, own.model_copy(update={"counts": 1}))  # so that the sum is nearly another one's


def test_a_client_counts_for_no_more_than_it_has_and_the_configuration_lets_it():
    group = Group(config=config(privacy={"secure_aggregation": True, "max_examples": 20}, round={"max_rows": 12}))
    company = Company(attempt=0, cap=20, inbox={})
    assert [group.masker("a").weight(rows, company) for rows in (5, 15, 30)] == [5, 12, 12]
    with pytest.raises(MessageError, match="count for 9 examples, and it has 8"):
        group.masker("a").weight(8, company.model_copy(update={"counts": 9}))


def test_changed_and_doubled_keys_are_refused(group):
    group.keys()
    adverts = group.adverts
    foreign = adverts["a"].model_copy(update={"masks": "1" * 64})
    resigned = adverts["a"].model_copy(update={"signs": "1" * 64})
    twin = adverts["b"].model_copy(update={"client": "c"})
    reverse = tuple(adverts[name] for name in reversed(NAMES))
    for wrong, why in (
        (tuple({**adverts, "a": foreign}.values()), "its own keys are not among those"),
        (tuple({**adverts, "a": resigned}.values()), "its own keys are not among those"),
        (tuple(adverts[name] for name in "bcd"), "its own keys are not among those"),
        (tuple({**adverts, "c": twin}.values()), "two clients have the same key"),
        (reverse, "not in order, or one is there twice"),
    ):
        with pytest.raises(MessageError, match=why):
            group.masker("a").shares(group.ask_shares("a", adverts=wrong))


def test_tampered_shares_are_refused(group):
    group.keys()
    group.shares()
    company = group.company("a")
    inbox = {**company.inbox, "b": company.inbox["c"]}
    with pytest.raises(MessageError, match="cannot be opened"):
        group.masker("a").mask(3, company.model_copy(update={"inbox": inbox}), VALUES)
    with pytest.raises(MessageError, match="shares from 'x', who did not advertise"):
        group.masker("a").ready(3, Company(attempt=0, cap=1, inbox={**company.inbox, "x": company.inbox["b"]}))


class Word:
    """A signer for tests: vouches with a word that only members of its house know."""

    def __init__(self, name, house="ours"):
        self.name, self.house = name, house

    def sign(self, data):
        return f"{self.house}/{self.name}/{data.hex()}"

    def verify(self, name, data, proof):
        if proof != f"{self.house}/{name}/{data.hex()}":
            raise IdentityError(f"not signed by {name}")


def test_keys_that_nobody_vouches_for_are_refused():
    group = Group(signers={name: Word(name) for name in NAMES})
    group.keys()
    group.shares()
    group.keys()
    honest = group.adverts["b"]
    swapped = Advert(client="b", shares="1" * 64, masks="2" * 64, signs=honest.signs, proof=honest.proof)
    resigned = honest.model_copy(update={"signs": "1" * 64})
    others = Group(signers={name: Word(name, "theirs") for name in NAMES})
    others.keys()
    later = Group(signers={name: Word(name) for name in NAMES})
    later.keys(attempt=1)
    bare = honest.model_copy(update={"proof": ""})
    for wrong in (swapped, resigned, others.adverts["b"], later.adverts["b"], bare):
        adverts = tuple({**group.adverts, "b": wrong}.values())
        with pytest.raises(IdentityError, match="not signed by b"):
            group.masker("a").shares(group.ask_shares("a", adverts=adverts))
    group.shares()


def test_what_another_version_kept_is_not_ignored(group):
    group.vaults["a"].save_secret(b'{"round": 3, "attempt": 0, "kept_since": 1}')
    with pytest.raises(ResumeError, match="another version of Molehill"):
        group.masker("a").keys(AskKeys(**group.to("a")))


def lists(names, need, clients):
    """What a server that wants the sum of few tells each client: as many of the others lost as it will believe."""
    left = dict.fromkeys(names[-clients:], need) if clients else {}
    told = {}
    for name in names:
        lost = sorted((o for o in left if o != name and left[o] > 0), key=lambda o: -left[o])[: len(names) - need]
        for other in lost:
            left[other] -= 1
        told[name] = tuple(sorted(lost))
    return told, not any(count > 0 for count in left.values())


@pytest.mark.parametrize("clients", [10, 20])
def test_a_server_that_tells_clients_different_stories_gets_no_sum_at_all(clients):
    """With n clients, t of whom must agree, sums of n (2 t - n) / t could be had if clients did not compare lists."""
    names = tuple(f"c{number:03}" for number in range(clients))
    group = Group(names, config=config(privacy={"secure_aggregation": True}, data={"clients": clients}))
    need = threshold(clients, 2 / 3)
    group.keys()
    group.shares()
    for name in names:
        group.mask(name)
    outside = max(k for k in range(clients) if lists(names, need, k)[1])
    told, _ = lists(names, need, outside)
    assert outside > 0
    signed, rest = {}, {}
    for name in names:
        rest[name] = tuple(other for other in names if other not in told[name])
        signed.setdefault(told[name], {})[name] = group.agree(name, rest[name], told[name])
    assert max(map(len, signed.values())) < need
    everything = {name: one for part in signed.values() for name, one in part.items()}
    for name in names:
        mine = {other: one for other, one in everything.items() if other in rest[name]}
        for signatures in (signed[told[name]], mine, dict.fromkeys(rest[name], everything[name])):
            with pytest.raises(MessageError, match=r"fewer than the threshold|not for this list|who is not in the sum"):
                group.ask(name, rest[name], told[name], signatures=signatures)
    for name in names:  # and having signed, they help with no other sum of the round either
        if told[name]:
            with pytest.raises(MessageError, match="has signed another list"):
                group.agree(name, names, ())


def test_clients_that_were_told_of_different_companies_do_not_agree():
    """Of a smaller company fewer have to sign, so the keys that are signed for must be those of the same company."""
    names = tuple("abcde")
    group = Group(names)
    group.keys()
    for name in names:
        told = tuple(group.adverts[one] for one in (names if name in "ae" else names[:4]))
        group.said[name] = group.masker(name).shares(group.ask_shares(name, adverts=told))
    for name in names[:4]:
        group.masker(name).mask(3, group.company(name, sharers="abcd"), VALUES)
    signed = {name: group.agree(name, tuple("abcd"), ()) for name in "abcd"}
    with pytest.raises(MessageError, match="a signature is not for this list of clients"):
        group.ask("a", tuple("abcd"), (), signatures=signed)
    with pytest.raises(MessageError, match="a signature is not for this list of clients"):
        group.ask("b", tuple("abcd"), (), signatures=signed)
    assert group.ask("b", tuple("abcd"), (), signatures={name: signed[name] for name in "bcd"})


@pytest.mark.parametrize("seed", range(8))
def test_with_accomplices_that_sign_everything_one_list_at_most_is_unmasked(seed):
    """Two of seven, which are fewer than 2 t - n = 3."""
    rng = np.random.default_rng(seed)
    names = tuple("abcdefg")
    group = Group(names, config=config(privacy={"secure_aggregation": True}, data={"clients": 7}))
    group.keys()
    group.shares()
    for name in names:
        group.mask(name)
    bad, honest = names[:2], names[2:]
    stories = [(names, ()), (names[:6], names[6:]), ((*names[:5], "g"), ("f",))]
    told = {name: next(stories[i] for i in rng.permutation(3) if name in stories[i][0]) for name in honest}
    signed = {story: {} for story in stories}
    for name in honest:
        signed[told[name]][name] = group.agree(name, *told[name])
    for arrived, lost in stories:
        text = survivors(keys.Occasion("molehill", 3, 0), tuple(group.adverts.values()), arrived, lost)
        for name in bad:
            private = bytes.fromhex(group.masker(name)._load().signing_key)
            signed[arrived, lost][name] = keys.sign(text, private).hex()
    helped = set()
    for story in stories:
        for name in honest:
            with suppress(MessageError):
                group.ask(name, *story, signatures=signed[story])
                helped.add(story)
    assert helped <= {story for story in stories if len(signed[story]) >= 5}
    assert len(helped) <= 1
