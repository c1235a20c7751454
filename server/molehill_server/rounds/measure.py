"""Measuring: every client is asked for its scores, trained alone and with the final model."""

from __future__ import annotations

from collections.abc import Mapping

from molehill.config import Config
from molehill.errors import FederationError, MessageError
from molehill.plan import ClientPlan, EvaluationReply
from molehill_server.records import Global
from molehill_server.rounds.crew import Crew
from molehill_server.rounds.post import Post, text_of
from molehill_server.rounds.record import Record
from molehill_server.validation import parse_scores


class Measuring:
    """Collects scores.

    Args:
        config: The run's configuration.
        post: Reaches the clients.
        crew: Says who is there.
        record: Told what they say.
    """

    def __init__(self, config: Config, post: Post, crew: Crew, record: Record) -> None:
        self._config = config
        self._post = post
        self._crew = crew
        self._record = record

    def __call__(self, final: Global) -> None:
        """Ask every client for its scores: trained alone from the start (if configured), and with the final model.

        Raises:
            FederationError: Nobody's scores with the final model came.
        """
        nodes = self._crew.gathered()
        absent = {client: "it is not connected" for client in self._record.saved.clients if client not in nodes}
        for client, reason in absent.items():
            self._record.log.emit("failed", stage="evaluate", client=client, reason=reason)
        replies: dict[str, list[EvaluationReply]] = {client: [] for client in nodes}
        if self._config.evaluate.baselines:
            self._ask("train.baseline", "baseline", self._post.plans(nodes, 0, final), nodes, replies)
        failed = self._ask(
            "evaluate", "evaluate", self._post.plans(nodes, final.round, final, trains=False), nodes, replies
        )
        for client, parts in replies.items():
            hello = self._crew.roster.hello(nodes[client])
            self._record.log.emit(
                "evaluation",
                client=client,
                n_train=hello.n_train,
                n_test=hello.n_test,
                cut=hello.cut,
                lost=hello.lost,
                unlearnt=hello.unlearnt,
                aside=hello.aside,
                stages={stage: scores.model_dump() for part in parts for stage, scores in part.stages.items()},
                gains={name: gain.model_dump() for part in parts for name, gain in part.gains.items()},
                answers={stage: sums.model_dump() for part in parts for stage, sums in part.answers.items()},
                tokens=parts[-1].tokens if parts else {},
                probes=parts[-1].probes if parts else {},
                chosen=parts[-1].chosen if parts else "",
                remembered=any(part.remembered for part in parts),
            )
        if len(failed) == len(nodes):
            reasons = "; ".join(f"{client}: {reason}" for client, reason in {**absent, **failed}.items())
            raise FederationError(f"no client could be scored with the final model: {reasons or 'there is none'}")

    def _ask(
        self,
        kind: str,
        stage: str,
        plans: Mapping[str, ClientPlan],
        nodes: Mapping[str, int],
        replies: Mapping[str, list[EvaluationReply]],
    ) -> dict[str, str]:
        """Add the answers to ``replies``, asking again who fails; returns why the others did not answer."""
        self._record.log.emit("stage", stage=stage, total=len(plans))
        self._post.grant(plans)
        failed = dict.fromkeys(plans, "")
        for attempt in range(self._config.round.retries + 1):
            there = nodes if attempt == 0 else {**nodes, **self._crew.gathered()}
            left = {client: plans[client] for client in failed}
            failed = self._ask_once(kind, stage, left, there, f"{kind}.{attempt}", replies)
            if not failed:
                break
        for client, reason in failed.items():
            self._record.log.emit("failed", stage=stage, client=client, reason=reason)
        return failed

    def _ask_once(
        self,
        kind: str,
        stage: str,
        plans: Mapping[str, ClientPlan],
        nodes: Mapping[str, int],
        group: str,
        replies: Mapping[str, list[EvaluationReply]],
    ) -> dict[str, str]:
        failed = {}
        collection = self._post.send(kind, plans, nodes, group, self._post.patience(len(plans)))
        for done, (client, reply) in enumerate(collection, start=1):
            try:
                answer = parse_scores(text_of(reply), client, kind, self._record.layout, self._config)
            except MessageError as error:
                failed[client] = error.what
            else:
                self._post.note_start(plans[client], answer)
                replies[client].append(answer)
                collection.accept()
            self._record.log.emit("progress", stage=stage, done=done, total=len(plans), client=client)
        for client in collection.missing:
            failed[client] = "no answer before the deadline"
        self._post.forget(collection)
        return failed
