"""Clients per second of the in-process grid against a plain Python loop, `pfl` and the whole round loop.

    python benchmarks/grid.py            # the table, some minutes; installs nothing, and says so when pfl is not there
    python benchmarks/grid.py memory     # growth of this process with the number of clients

One client is a logistic regression of 1,000 weights: 5 steps of SGD on batches of 32. All ways do the same training;
deltas are summed as they come. "messages" are Flower's own, made and answered without a grid, which no grid can do
without. pfl (pip install pfl, Python below 3.13) brings its own training loop.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import alternate, clock_for, grown_by, in_own_process, show
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from molehill import __version__
from molehill.config import parse
from molehill.plan import ClientPlan, ClientReply, EvaluationReply, Scores
from molehill.wire.keys import Key
from molehill.wire.local import MemoryExchange
from molehill.wire.message import Delta, decode_tree, encode_delta
from molehill.wire.store import save_tree
from molehill.wire.tree import Tree
from molehill_server.coordinator import Coordinator
from molehill_server.flower import GridTransport
from molehill_simulation.flower import Context, context_of, set_identity
from molehill_simulation.grid import LocalGrid
from molehill_simulation.stage import FIRST_NODE

FEATURES, CLASSES, STEPS, BATCH, LR = 100, 10, 5, 32, 0.1
OWNERS = 50  # distinct data sets, reused by turns
WEIGHT = Key("linear", "e0", "A")


def rows(owner: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(owner)
    x = torch.randn(STEPS * BATCH, FEATURES, generator=generator)
    return x, torch.randint(0, CLASSES, (STEPS * BATCH,), generator=generator)


DATA = [rows(owner) for owner in range(OWNERS)]
model = torch.nn.Linear(FEATURES, CLASSES, bias=False)
optimiser = torch.optim.SGD(model.parameters(), LR)


def local_training(start: np.ndarray, number: int) -> np.ndarray:
    """Train one client from ``start``; returns its delta."""
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(start))
    x, y = DATA[number % OWNERS]
    for step in range(STEPS):
        part = slice(step * BATCH, (step + 1) * BATCH)
        optimiser.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimiser.step()
    return model.weight.detach().numpy() - start


def plain(clients: int) -> np.ndarray:
    start = np.zeros((CLASSES, FEATURES), np.float32)
    total = np.zeros_like(start)
    for number in range(clients):
        total += local_training(start, number)
    return total / clients


def answered(message: Message, context: Context, start: np.ndarray, deltas: dict[str, np.ndarray]) -> Message:
    """Train the client of a context; its delta lies beside the reply, which names it."""
    assert message.content["plan"]["json"]
    name = str(context.node_config["partition-id"])
    deltas[name] = local_training(start, context.node_config["partition-id"])
    return Message(RecordDict({"reply": ConfigRecord({"json": name})}), reply_to=message)


def on_grid(clients: int) -> Callable[[], np.ndarray]:
    """A round of the same through messages: a plan in, a name out, the delta beside them."""
    start, app = np.zeros((CLASSES, FEATURES), np.float32), ClientApp()
    deltas: dict[str, np.ndarray] = {}

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answered(message, context, start, deltas)

    grid = LocalGrid(app, clients, {})

    def run() -> np.ndarray:
        content = RecordDict({"plan": ConfigRecord({"json": '{"round": 1}'})})  # for all, as in Flower's FedAvg
        pending = set(
            grid.push_messages(
                Message(content, node, "train", group_id="1") for node in range(FIRST_NODE, FIRST_NODE + clients)
            )
        )
        total = np.zeros_like(start)
        while pending:
            for reply in grid.pull_messages(pending):
                pending.discard(reply.metadata.reply_to_message_id)
                total += deltas.pop(reply.content["reply"]["json"])
        return total / clients

    return run


def by_hand(clients: int) -> Callable[[], np.ndarray]:
    """The same plans and answers in Flower's messages, made here and handed over one by one: no grid is faster."""
    start, app = np.zeros((CLASSES, FEATURES), np.float32), ClientApp()
    deltas: dict[str, np.ndarray] = {}
    set_identity(1)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answered(message, context, start, deltas)

    def run() -> np.ndarray:
        content = RecordDict({"plan": ConfigRecord({"json": '{"round": 1}'})})
        total = np.zeros_like(start)
        for number in range(clients):
            message = Message(content, FIRST_NODE + number, "train", group_id="1")
            place = {"partition-id": number, "num-partitions": clients}
            reply = app(message, context_of(1, FIRST_NODE + number, place, {}))
            total += deltas.pop(reply.content["reply"]["json"])
        return total / clients

    return run


def whole_loop(clients: int, out: Path) -> Coordinator:
    """Our round loop with plans, codec, validation, aggregation and checkpoint; ready to run one round."""
    settings = parse(
        {
            "run": {"rounds": 1, "name": f"n{clients}"},
            "data": {"clients": clients},
            "evaluate": {"baselines": False},
            "wire": {"up": "fp32", "down": "fp32"},
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    save_tree(out / "initial.safetensors", Tree.of({WEIGHT: np.zeros((CLASSES, FEATURES), np.float32)}), {"base": "b"})
    exchange, app = MemoryExchange(), ClientApp()

    def answer(message: Message, text: str) -> Message:
        return Message(RecordDict({"reply": ConfigRecord({"json": text})}), reply_to=message)

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        number = context.node_config["partition-id"]
        return answer(message, f'{{"client": "c{number:05d}", "n_train": 1, "n_test": 1, "version": "{__version__}"}}')

    @app.train()
    def train(message: Message, context: Context) -> Message:
        plan = ClientPlan.model_validate_json(message.content["plan"]["json"])
        (digest,) = plan.blobs.values()
        start = decode_tree(exchange.get(digest), 2**20)[WEIGHT]
        change = Tree.of({WEIGHT: local_training(start, context.node_config["partition-id"])})
        blob = encode_delta(Delta(plan.run, plan.round, plan.client, plan.base, change, 1), plan.codec)
        reply = ClientReply(
            client=plan.client,
            round=plan.round,
            delta=exchange.put(blob),
            bytes_up=len(blob),
            bytes_down=0,
            examples=1,
            loss=1.0,
            seconds=0.0,
        )
        return answer(message, reply.model_dump_json())

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        scores = Scores(n=1, accuracy=0.5, loss=1.0)
        reply = EvaluationReply(
            client=f"c{context.node_config['partition-id']:05d}",
            n_train=1,
            n_test=1,
            stages={"global": scores, "personalised": scores},
            seconds=0.0,
        )
        return answer(message, reply.model_dump_json())

    return Coordinator(settings, out, exchange, GridTransport(LocalGrid(app, clients, {})))


def one_round(clients: int, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        whole_loop(clients, Path(out)).run()


def with_pfl(clients: int) -> Callable[[], None] | None:
    """One central iteration of pfl's FederatedAveraging on its simulated backend; None when pfl is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pfl.aggregate.simulate import SimulatedBackend
            from pfl.algorithm.base import NNAlgorithmParams
            from pfl.algorithm.federated_averaging import FederatedAveraging
            from pfl.data.federated_dataset import FederatedDataset
            from pfl.data.pytorch import PyTorchTensorDataset
            from pfl.data.sampling import MinimizeReuseUserSampler
            from pfl.hyperparam import NNTrainHyperParams
            from pfl.model.pytorch import PyTorchModel
    except ImportError as error:
        print(f"pfl is left out: {error}")
        return None

    class Net(torch.nn.Linear):
        def loss(self, x: torch.Tensor, y: torch.Tensor, **_: bool) -> torch.Tensor:
            return F.cross_entropy(self(x), y)

        def metrics(self, _x: torch.Tensor, _y: torch.Tensor, **_: bool) -> dict[str, float]:
            return {}

    net = Net(FEATURES, CLASSES, bias=False)
    wrapped = PyTorchModel(
        net, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(net.parameters(), 1.0)
    )
    users = FederatedDataset(
        lambda user: PyTorchTensorDataset(DATA[user % OWNERS], user_id=str(user)),
        MinimizeReuseUserSampler(list(range(clients))),
    )
    training = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=LR, local_batch_size=BATCH, local_max_grad_norm=None
    )
    rounds = NNAlgorithmParams(
        central_num_iterations=2, evaluation_frequency=10**9, train_cohort_size=clients, val_cohort_size=0
    )
    backend = SimulatedBackend(training_data=users, val_data=None)

    def run() -> None:
        algorithm = FederatedAveraging()
        algorithm._current_central_iteration = 1  # noqa: SLF001 - pfl evaluates before iteration 0, which nobody else here does
        algorithm.run(rounds, backend, wrapped, training, send_metrics_to_platform=False)

    return run


def speed(counts: Sequence[int] = (10, 100, 1000), turns: int = 15) -> None:
    for way in (by_hand, on_grid):
        np.testing.assert_allclose(way(7)(), plain(7), atol=1e-6)
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for clients in counts:
            calls = {
                "plain": lambda n=clients: plain(n),
                "messages": by_hand(clients),
                "grid": on_grid(clients),
                "pfl": with_pfl(clients),
                "loop": lambda n=clients, where=Path(folder): one_round(n, where),
            }
            medians = alternate({name: call for name, call in calls.items() if call}, turns, clock_for(1))
            rates = {name: clients / seconds for name, seconds in medians.items()}
            table.append(
                [str(clients)]
                + [f"{rates[way]:.0f}" if way in rates else "-" for way in calls]
                + [f"{rates['grid'] / rates['plain']:.2f}", f"{rates['grid'] / rates['messages']:.2f}"]
                + [f"{rates['grid'] / rates['pfl']:.2f}" if "pfl" in rates else "-"]
            )
    columns = ["clients", "plain", "messages", "LocalGrid", "pfl", "whole loop", "grid / plain", "/ messages", "/ pfl"]
    show("Clients per second", columns, table)


def memory(counts: Sequence[int] = (10, 100, 1000, 10000)) -> None:
    table = [[str(n), in_own_process("grown", str(n)).strip()] for n in counts]
    show("Growth of the process while one round runs on LocalGrid (MiB)", ["clients", "MiB"], table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["grown"]:
        plain(10)
        on_grid(10)()
        print(f"{grown_by(on_grid(int(sys.argv[2]))):.1f}")
    elif sys.argv[1:] == ["memory"]:
        memory()
    else:
        speed()
