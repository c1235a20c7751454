"""What a data owner answers to the messages of a run."""

from __future__ import annotations

from molehill import __version__
from molehill.plan import ClientPlan, ClientReply, EvaluationReply, Hello
from molehill_client.baselines import baseline_together
from molehill_client.participant import Participant
from molehill_client.scoring import evaluate_together
from molehill_client.together import train_together


class Client(Participant):
    """A data owner that answers; for the work of several at once see `together`."""

    def hello(self) -> Hello:
        """Say who this is."""
        return Hello(
            client=self.name,
            n_train=len(self.round_rows),
            aside=len(self.aside_rows),
            n_test=len(self.test_rows),
            version=__version__,
            cut=self.lengths.cut,
            lost=self.lengths.lost,
            unlearnt=self.lengths.unlearnt,
        )

    def train(self, plan: ClientPlan) -> ClientReply:
        """Train one round and put the delta of the shared tensors into the exchange.

        Raises:
            MessageError: The plan or its blobs do not fit this client.
            TrainingError: The loss is not finite.
        """
        return train_together([self], [plan])[0]

    def evaluate(self, plan: ClientPlan) -> EvaluationReply:
        """Fit the residuals to the model as received, keep them, and score the global and the personalised model.

        Only this client's held-out rows are scored, and only its training rows are fitted to.
        """
        return evaluate_together([self], [plan])[0]

    def baseline(self, plan: ClientPlan) -> EvaluationReply:
        """Train and score what this client could do alone.

        ``base`` is the frozen base with only a head; ``local`` is the same MoLoRA trained on this client's rows
        for as many steps as the federation gives it.
        """
        return baseline_together([self], [plan])[0]
