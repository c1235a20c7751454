"""Runs as their events tell them, for whoever reads those: summary, report and terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random

from molehill.config import Config
from molehill_simulation.summary import BaseModelInfo, summarise

HOSTILE = "<script>alert(1)</script>\x1b[31m&\"'"
BASE = BaseModelInfo(id="sample:minilm", revision=None, digest="3f" * 32)


def make_events(clients: list[str], rounds: int = 6, seed: int = 0) -> list[dict]:
    """Events of a plausible run; the last client is refused once and missing once."""
    rng = Random(seed)
    events: list[dict] = [
        {
            "event": "start",
            "time": 0.0,
            "run": "reviews",
            "rounds": rounds,
            "clients": clients,
            "parameters": 1_327_104,
            "config_digest": "ab" * 32,
        }
    ]
    for number in range(1, rounds + 1):
        out = clients[-1] if len(clients) > 1 else None
        quarantined = {out: f"1024 values of site 3 are NaN {HOSTILE}"} if out and number == 2 else {}
        missing = [out] if out and number == 4 else []
        accepted = [client for client in clients if client not in quarantined and client not in missing]
        loss = {client: 1.1 * math.exp(-0.25 * number) + rng.uniform(0.0, 0.25) for client in accepted}
        events += [
            {"event": "progress", "time": 0.0, "stage": "train", "done": i + 1, "total": len(clients), "client": client}
            for i, client in enumerate(accepted)
        ]
        events.append(
            {
                "event": "round",
                "time": 0.0,
                "round": number,
                "seconds": 11.5 + rng.random(),
                "selected": clients,
                "accepted": accepted,
                "missing": missing,
                "quarantined": quarantined,
                "loss": sum(loss.values()) / len(loss),
                "loss_by_client": loss,
                "bytes_up": 812_345 * len(accepted),
                "bytes_down": 2_654_321 * len(clients),
                "tokens": {client: {"e0": 100.0, "e1": 20.0} for client in accepted},
                "report": {},
            }
        )
    for client in clients:
        base = rng.uniform(0.5, 0.62)
        figures = {
            "base": base,
            "local": base + 0.06,
            "global": base + 0.1,
            "personalised": base + rng.uniform(0.09, 0.2),
        }
        scores = {stage: {"n": 80, "accuracy": v, "macro_f1": v - 0.03, "loss": 1 - v} for stage, v in figures.items()}
        weights = [rng.expovariate(1.0) for _ in range(4)]
        routed = {f"e{i}": 1e4 * weight for i, weight in enumerate(weights)}
        common = {"event": "evaluation", "time": 0.0, "client": client, "n_train": 200, "n_test": 80}
        events.append({**common, "stages": {k: scores[k] for k in ("base", "local")}, "tokens": {}})
        trained = {k: scores[k] for k in ("global", "personalised")}
        events.append({**common, "stages": trained, "tokens": {**routed, "shared0": 2e4}})
    events.append({"event": "end", "time": 0.0, "seconds": 161.2})
    return events


def make_run(folder: Path, events: list[dict], *, finished: bool = True) -> Path:
    """A run folder as the engine leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    (folder / "config.toml").write_text(Config().to_toml(), encoding="utf-8")
    if finished:
        (folder / "summary.json").write_text(summarise(events, BASE, "ab" * 32).to_json(), encoding="utf-8")
    return folder


CLIENTS = [f"{domain}-{i}" for domain in ("amazon", "movie", "nyt", "tweets") for i in (0, 1)]
TROUBLES = [
    {"event": "refused", "time": 0.0, "client": "", "reason": f"node 7: malformed hello {HOSTILE}"},
    {
        "event": "retry",
        "time": 0.0,
        "round": 2,
        "attempt": 0,
        "missing": [CLIENTS[3]],
        "quarantined": {CLIENTS[2]: f"cut short {HOSTILE}"},
    },
    {"event": "failed", "time": 0.0, "stage": "evaluate", "client": CLIENTS[1], "reason": f"the loss is NaN {HOSTILE}"},
]


def without_scores(events: list[dict], *clients: str) -> list[dict]:
    """The same run, in which clients could not be scored with the final model."""
    return [
        {**event, "stages": {k: v for k, v in event["stages"].items() if k in ("base", "local")}}
        if event.get("client") in clients and "stages" in event
        else event
        for event in events
    ]


def causal(events: list[dict]) -> list[dict]:
    """The same run of a causal LM, which has no classes."""
    return [
        {**event, "stages": {k: {**v, "macro_f1": None} for k, v in event["stages"].items()}}
        if "stages" in event
        else event
        for event in events
    ]
