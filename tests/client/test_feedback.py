"""Error feedback: what the server could not use of a delta is sent again, whatever became of it."""

from __future__ import annotations

import numpy as np
import pytest

from molehill.config import MethodRef
from molehill.errors import MessageError
from molehill.wire.clipping import norm

COMPEFT = MethodRef.model_validate({"name": "compeft", "density": 0.1})


def change_of(house, number: int, round_: int):
    """What a client learns in a round, sent in full."""
    return house.delta(house.client(number).train(house.plan(number, round_))).tree.flat


@pytest.fixture
def two(house):
    """Two houses of the same clients: one that sends in full, and one with error feedback."""
    return house("plain"), house("feedback")


def send(house, round_: int, accepted: int):
    """One round of client 0; returns what it sent, and what it still has to send."""
    reply = house.client(0).train(house.plan(0, round_, codec=COMPEFT, accepted=accepted))
    return house.delta(reply).tree.flat, house.client(0).store.before(round_ + 1).memory.flat


def test_a_delta_that_was_not_used_is_sent_again(two):
    plain, feedback = two
    changes = [change_of(plain, 0, number) for number in (1, 2, 3)]
    lost, _ = send(feedback, 1, accepted=0)  # late, quarantined or refused: the client cannot tell
    sent, left = send(feedback, 2, accepted=0)
    np.testing.assert_allclose(sent + left, changes[0] + changes[1], atol=1e-7)
    used = sent
    sent, left = send(feedback, 3, accepted=2)
    np.testing.assert_allclose(used + sent + left, sum(changes), atol=1e-7)
    assert np.linalg.norm(lost) > 1e-3  # the gap that there would be


def test_two_in_a_row_are_sent_again_and_one_that_was_used_is_not(two):
    plain, feedback = two
    changes = [change_of(plain, 0, number) for number in (1, 2, 3)]
    used, _ = send(feedback, 1, accepted=0)
    send(feedback, 2, accepted=1)
    sent, left = send(feedback, 3, accepted=1)
    np.testing.assert_allclose(used + sent + left, sum(changes), atol=1e-7)


def test_a_round_that_is_tried_again_counts_once(two):
    plain, feedback = two
    changes = [change_of(plain, 0, number) for number in (1, 2)]
    used, _ = send(feedback, 1, accepted=0)
    first, _ = send(feedback, 2, accepted=1)
    again, left = send(feedback, 2, accepted=1)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(used + again + left, sum(changes), atol=1e-7)


def test_a_delta_that_could_not_be_put_is_sent_again(two):
    plain, feedback = two
    changes = [change_of(plain, 0, number) for number in (1, 2)]

    def broken(*_):
        raise MessageError("the exchange is away")

    client, put = feedback.client(0), feedback.exchange.put
    feedback.exchange.put = lambda blob, at=None: broken() if at else put(blob)
    with pytest.raises(MessageError, match="away"):
        client.train(feedback.plan(0, 1, codec=COMPEFT))
    feedback.exchange.put = put
    sent, left = send(feedback, 2, accepted=0)
    np.testing.assert_allclose(sent + left, sum(changes), atol=1e-7)


def test_what_has_gathered_is_sent_in_parts_that_are_let_through(two):
    """A client whose deltas do not count for long owes more than a bound that follows the others lets through."""
    plain, feedback = two
    changes = [change_of(plain, 0, number) for number in range(1, 9)]
    norms = [float(np.linalg.norm(send(feedback, number, accepted=0)[0])) for number in range(1, 7)]
    bound = norms[0]
    assert norms[-1] > 2 * bound  # so it would be refused, and the next one all the more
    used = 0
    for number, accepted in ((7, 0), (8, 7)):
        plan = feedback.plan(0, number, codec=COMPEFT, accepted=accepted, norm_bound=bound)
        sent = feedback.delta(feedback.client(0).train(plan)).tree.flat
        assert 0.999 * bound < norm(sent) <= bound
        used = used + sent
        left = feedback.client(0).store.before(number + 1).memory.flat
        np.testing.assert_allclose(used + left, sum(changes[:number]), atol=1e-6)


@pytest.mark.parametrize("codec", [COMPEFT, MethodRef(name="fp32")])
def test_a_bound_changes_nothing_below_it_and_nothing_without_feedback(two, codec):
    blobs = []
    for house, bound in zip(two, (None, 1e-3 if codec.name == "fp32" else 1e3), strict=True):
        for number in (1, 2):
            reply = house.client(0).train(house.plan(0, number, codec=codec, accepted=number - 1, norm_bound=bound))
        blobs.append(house.delta(reply).tree.flat)
    np.testing.assert_array_equal(*blobs)


def test_evaluation_adds_back_once(two):
    """It writes the state anew, under the number of the last round."""
    plain, feedback = two
    changes = [change_of(plain, 0, number) for number in (1, 2)]
    send(feedback, 1, accepted=0)
    for _ in range(2):
        feedback.client(0).evaluate(feedback.plan(0, 1, codec=COMPEFT, accepted=0))
    sent, left = send(feedback, 2, accepted=0)
    np.testing.assert_allclose(sent + left, sum(changes), atol=1e-7)


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4"])
def test_codecs_without_feedback_send_what_was_learnt_and_keep_nothing(two, codec):
    plain, other = two
    ref = MethodRef(name=codec)
    sent = [
        house.delta(house.client(0).train(house.plan(0, 2, codec=ref, accepted=accepted))).tree.flat
        for house, accepted in ((plain, 1), (other, 0))
        for _ in [house.client(0).train(house.plan(0, 1, codec=ref))]
    ]
    np.testing.assert_array_equal(*sent)
    state = other.client(0).store.before(3)
    assert (len(state.memory), len(state.owed), state.round) == (0, 0, 2)


def test_a_client_tells_from_which_round_it_went_on(two):
    house, _ = two
    assert house.client(0).train(house.plan(0, 1)).started == 0
    assert house.client(0).train(house.plan(0, 3)).started == 1
    assert house.client(0).evaluate(house.plan(0, 3)).started == 3
