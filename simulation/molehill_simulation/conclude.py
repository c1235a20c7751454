"""The last step of every run, simulated or deployed: adapter, summary and report in the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from molehill import files
from molehill.config import Config
from molehill.molora import probes
from molehill.molora.adapter import Manifest, save_adapter
from molehill.molora.model import MoLoRAModel
from molehill.tasks.base_model import BaseInfo, place
from molehill.tasks.kind import kind_of
from molehill.wire.store import load_tree
from molehill_client.state import Findings
from molehill_server.broadcast import tree_patches
from molehill_server.events import read
from molehill_simulation.figures import Confusion, Found
from molehill_simulation.report import write_report
from molehill_simulation.summary import BaseModelInfo, Machine, Summary, evaluations_of, summarise

SAMPLES = 5  # of a client, at most


def conclude(
    config: Config,
    model: MoLoRAModel,
    base: BaseInfo,
    out: Path,
    classes: Mapping[str, Mapping[str, tuple[int, int]]] | None = None,
    lengths: str = "",
    machine: Machine | None = None,
    findings: Mapping[str, Findings] | None = None,
) -> Summary:
    """Write what a run that has ended came to.

    Args:
        config: The run, with the task's labels known.
        model: Base and adapter; it is given the final shared values.
        base: Which base.
        out: Run folder with ``final.safetensors`` and ``metrics.jsonl``; receives ``adapter/``, ``summary.json`` and
            ``report.html``.
        classes: Rows of every class to train on and held out, by client, where the rows are on this machine.
        lengths: How many tokens the rows have, where they are on this machine.
        machine: How this machine computed the clients, where it did.
        findings: What clients keep of their evaluation, where the rows are on this machine.
    """
    with files.private(), files.told("the run", out):
        return _conclude(config, model, base, out, classes or {}, lengths, machine, findings or {})


def _conclude(
    config: Config,
    model: MoLoRAModel,
    base: BaseInfo,
    out: Path,
    classes: Mapping[str, Mapping[str, tuple[int, int]]],
    lengths: str,
    machine: Machine | None,
    findings: Mapping[str, Findings],
) -> Summary:
    final, _ = load_tree(out / "final.safetensors")
    patches = tree_patches(final.select(lambda key: key.role.startswith("patch.")))
    model.load(final.select(lambda key: not key.role.startswith("patch.")))
    model.set_patches({pair: (patch.A, patch.B) for pair, patch in patches.items()})
    pooling = model.head.pooling if model.head is not None else ""
    origin = {"id": base.id, "revision": base.revision or "", "digest": base.digest}
    manifest = Manifest(
        base=origin,
        task=config.task.kind,
        labels=config.task.labels,
        range=config.task.range,
        pooling=pooling,
        molora=config.molora,
        ranks={},
        personal={"gate": config.personal.gate, "head": config.personal.head},
    )
    save_adapter(out / "adapter", model, manifest, place(config.base))
    info = BaseModelInfo(id=base.id, revision=base.revision, digest=base.digest, remarks=model.remarks)
    events = read(out / "metrics.jsonl")
    clients = [evaluation["probes"] for evaluation in evaluations_of(events).values()]
    looked = probes.merged(config.evaluate.probes, clients, model.layout)
    exclusive = kind_of(config.task).predicts != "flags"
    confusions = {
        name: Confusion.of(config.task.labels, each.confusion, exclusive=exclusive)
        for name, each in findings.items()
        if each.confusion
    }
    found = {name: Found.model_validate({"counts": each.found}) for name, each in findings.items()}
    summary = summarise(events, info, config.digest, config.task.kind, classes, lengths, looked, confusions, found)
    summary = summary.model_copy(update={"machine": machine, "split": config.evaluate.split})
    files.write(out / "summary.json", summary.to_json().encode())
    some = [{"client": name, **asdict(each)} for name, them in findings.items() for each in them.samples[:SAMPLES]]
    if some:
        files.write(out / "samples.json", json.dumps(some, ensure_ascii=False, indent=1).encode(), mode=files.PRIVATE)
    write_report(out)
    return summary
