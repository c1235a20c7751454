"""Clients per second: one base with adapters swapped in place, against a copy of the model for every client.

    python benchmarks/simulation.py [--dtype bf16] [--reps 5] [--quick] [--json]

16 clients make 4 steps of MiniLM each, on 4 rows of 128 tokens; 4 experts of rank 8, top-2, on every linear of the
layers; AdamW and a gradient norm of at most 1. Start values in, delta out; no wire on either side.

* ``clone + loop``: the model is copied for every client and runs a loop over the experts (MoLA's of `moe_peft.py`),
  with the kernels that are fastest here, as all ways.
* ``swap``: one model; a client is its flat vector, copied in and out.
* ``k together``: k clients in the same passes.

A way runs in one process with a thread per core, or in one process per core with one thread each, as
``engine.workers`` does; seconds are wall times of all 16 clients on the whole machine, to be taken when nothing else
runs (threads that wait for each other are slow on a busy machine). Ways take turns. The deltas of one pass over all
clients are compared with those of the clones, as the norm of the difference over the norm.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a server process gets its own number

import argparse
import copy
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from common import show
from moe_peft import MolaLinear, put
from torch import nn

from molehill import config
from molehill.molora.attention import use_fast_attention
from molehill.molora.build import wrap
from molehill.molora.head import Head
from molehill.tasks.base_model import load_base
from molehill.tasks.batches import Batch
from molehill.tasks.kernels import fast_attention, multiplies_bf16
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_client.goals import Goal
from molehill_client.objectives.sft import SFT
from molehill_client.trainer import Rates, Settings, train
from molehill_simulation.engine import cores
from molehill_simulation.workers import MALLOC

EXPERTS, RANK, ALPHA, TOP_K, CLASSES, LR, CLIP = 4, 8, 16.0, 2, 4, 1e-3, 1.0
SIZES = {False: (16, 4, 4, 128), True: (4, 2, 4, 32)}  # clients, steps, rows, tokens; by --quick
TOGETHER = {False: (2, 4, 8), True: (2,)}


class Ours:
    """One model for all clients, as the simulation has it."""

    def __init__(self, dtype: str, *, quick: bool) -> None:
        self.clients, self.steps, rows, tokens = SIZES[quick]
        loaded = load_base(config.Base(precision=dtype), config.Task())
        section = {"experts": EXPERTS, "rank": RANK, "alpha": ALPHA, "selector": {"name": "top_k", "k": TOP_K}}
        head = Head(loaded.model.config.hidden_size, CLASSES, "mean", anchored=False)
        self.model = wrap(loaded.model, config.MoLoRA.model_validate(section), head=head)
        use_fast_attention(loaded.model, tokens, partial(fast_attention, loaded.kernels, tokens))
        generator = torch.Generator().manual_seed(0)
        self.start = torch.randn(self.model.n_parameters, generator=generator) * 0.02
        self.batches = [
            [
                Batch(
                    torch.randint(1000, 20000, (rows, tokens), generator=generator),
                    torch.ones(rows, tokens, dtype=torch.bool),
                    torch.randint(0, CLASSES, (rows,), generator=generator),
                )
                for _ in range(self.steps)
            ]
            for _ in range(self.clients)
        ]

    def run(self, clients: Sequence[int], together: int) -> Iterator[Tree]:
        """Train clients; yields the delta of each."""
        model, settings = self.model, Settings(Rates(LR, LR, LR), clip=CLIP)
        for first in range(0, len(clients), together):
            company = clients[first : first + together]
            model.flat.copy_(self.start)
            model.stack(len(company))
            streams = [iter(self.batches[client]) for client in company]
            train(model, streams, [Goal(SFT())] * len(streams), (), settings, lambda _: "shared", steps=self.steps)
            for number in range(len(company)):
                model.select(number)
                model.flat.sub_(self.start)
                yield model.tree()
            model.stack(1)


class Clones:
    """A copy of the model for every client, with the loop over experts."""

    def __init__(self, ours: Ours, dtype: str) -> None:
        self.steps, self.batches = ours.steps, ours.batches
        base = load_base(config.Base(precision=dtype), config.Task()).model
        put(MolaLinear, base, ["query", "key", "value", "dense"], EXPERTS, RANK, ALPHA, TOP_K)
        self.template = nn.ModuleDict({"base": base, "head": nn.Linear(base.config.hidden_size, CLASSES)})
        ours.model.flat.copy_(ours.start)
        values = ours.model.tree()
        with torch.no_grad():
            for key, (parameter, scale) in self._parameters(self.template).items():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(values[key])) / scale)

    @staticmethod
    def _parameters(model: nn.ModuleDict) -> dict[Key, tuple[nn.Parameter, float]]:
        """Every trained parameter by its name on the wire, with the scale that the wire absorbs."""
        found = {Key("head", "-", f"head.{name}"): (p, 1.0) for name, p in model["head"].named_parameters()}
        for site, module in model["base"].named_modules():
            if isinstance(module, MolaLinear):
                found[Key(site, "-", "gate.weight")] = (module.gate.weight, 1.0)
                for number, expert in enumerate(module.experts):
                    found[Key(site, f"e{number}", "A")] = (expert.a.weight, 1.0)
                    found[Key(site, f"e{number}", "B")] = (expert.b.weight, expert.scale)
        return found

    def run(self, clients: Sequence[int], together: int) -> Iterator[Tree]:
        """Train clients, each in a model of its own; yields the delta of each."""
        assert together == 1
        for client in clients:
            model = copy.deepcopy(self.template)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimiser = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
            for batch in self.batches[client]:
                pooled = model["base"](input_ids=batch.input_ids).last_hidden_state.float().mean(1)
                F.cross_entropy(model["head"](pooled), batch.labels).backward()
                nn.utils.clip_grad_norm_(trained, CLIP)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            start, end = self._parameters(self.template), self._parameters(model)
            yield Tree.of({key: ((p - start[key][0]) * scale).detach().numpy() for key, (p, scale) in end.items()})


def serve(dtype: str, *, quick: bool) -> None:
    """Run what the standard input asks for: a way, how many together, which clients, where deltas go."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ours = Ours(dtype, quick=quick)
    ways = {"ours": ours, "clones": Clones(ours, dtype)}
    print("ready", flush=True)
    for line in sys.stdin:
        way, together, clients, path = json.loads(line)
        began = time.process_time()
        deltas = ways[way].run(clients, together)
        if path:
            np.save(path, np.stack([delta.flat for delta in deltas]))
        else:
            for _ in deltas:
                pass
        print(time.process_time() - began, flush=True)


class Server:
    """A process that runs `serve`."""

    def __init__(self, dtype: str, threads: int, *, quick: bool, tuned: bool) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), **(MALLOC if tuned else {})}
        command = [sys.executable, __file__, "--serve", dtype, *(["--quick"] if quick else [])]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, text=True)

    def ask(self, *request: Any) -> None:
        """Start something."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def wait(self) -> str:
        """Wait until it is done; returns what it says."""
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        if not said:
            raise SystemExit("a server process has ended")
        return said


def measure(dtype: str, reps: int, *, quick: bool) -> dict[str, Any]:
    """Wall seconds of every way, and how far its deltas are from the clones'."""
    count = cores()
    one = [Server(dtype, count, quick=quick, tuned=False)]
    many = [Server(dtype, 1, quick=quick, tuned=True) for _ in range(count)]
    for server in one + many:
        server.wait()
    clients = list(range(SIZES[quick][0]))
    ways = {
        (way, together, len(servers)): servers
        for (way, together), servers in itertools.product(
            [("clones", 1), *(("ours", k) for k in (1, *TOGETHER[quick]))], (one, many)
        )
    }

    def run(way: str, together: int, servers: list[Server], path: str = "") -> tuple[float, float]:
        """Wall time, and processor time of all processes."""
        began = time.perf_counter()
        share = len(clients) // len(servers)
        for number, server in enumerate(servers):
            mine = clients[number * share : (number + 1) * share]
            server.ask(way, together, mine, f"{path}{number}.npy" if path else "")
        busy = sum(float(server.wait()) for server in servers)
        return time.perf_counter() - began, busy

    times: dict[tuple[str, int, int], list[tuple[float, float]]] = {key: [] for key in ways}
    for _ in range(reps):
        for (way, together, processes), servers in ways.items():
            times[way, together, processes].append(run(way, together, servers))
    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        reference = None
        for (way, together, processes), servers in ways.items():
            run(way, together, servers, f"{folder}/")
            deltas = np.concatenate([np.load(Path(folder) / f"{n}.npy") for n in range(processes)])
            reference = deltas if reference is None else reference
            errors[way, together, processes] = float(np.linalg.norm(deltas - reference) / np.linalg.norm(reference))
    for server in one + many:
        server.process.communicate()
    seconds = {key: statistics.median(wall for wall, _ in values) for key, values in times.items()}
    busy = {key: statistics.median(cpu for _, cpu in values) for key, values in times.items()}
    baseline = seconds["clones", 1, 1]
    return {
        "dtype": dtype,
        "cores": count,
        "clients": len(clients),
        "ways": [
            {
                "way": "clone + loop" if way == "clones" else "swap" if together == 1 else f"{together} together",
                "processes": processes,
                "threads": count // processes,
                "seconds": seconds[way, together, processes],
                "processor_seconds": busy[way, together, processes],
                "clients_per_second": len(clients) / seconds[way, together, processes],
                "faster": baseline / seconds[way, together, processes],
                "delta_error": errors[way, together, processes],
                "all_seconds": [wall for wall, _ in times[way, together, processes]],
            }
            for way, together, processes in ways
        ],
    }


def types() -> list[str]:
    """The types that this processor multiplies."""
    return ["bf16", "fp32"] if multiplies_bf16() else ["fp32"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reps", type=int, default=5, help="turns of every way")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="one of the types")
    parser.add_argument("--quick", action="store_true", help="few clients and short inputs: seconds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--serve", metavar="DTYPE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, quick=options.quick)
        return
    reps = 1 if options.quick else options.reps
    results = [measure(dtype, reps, quick=options.quick) for dtype in ([options.dtype] if options.dtype else types())]
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        show(
            f"{result['clients']} clients, {result['dtype']}, {result['cores']} cores; wall time, medians of {reps}",
            ["", "processes x threads", "seconds", "cpu s", "clients / s", "x clone + loop", "delta off by"],
            [
                [
                    way["way"],
                    f"{way['processes']} x {way['threads']}",
                    f"{way['seconds']:.2f}",
                    f"{way['processor_seconds']:.2f}",
                    f"{way['clients_per_second']:.2f}",
                    f"{way['faster']:.2f}",
                    f"{way['delta_error']:.1e}",
                ]
                for way in result["ways"]
            ],
        )


if __name__ == "__main__":
    main()
