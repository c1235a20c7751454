"""``molehill edge info``: what a bundle is."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from molehill.characters import harmless
from molehill.errors import BundleError
from molehill.terminal import Json, explained, print_json, show_table
from molehill.words import counted
from molehill_edge import likeness
from molehill_edge.commands.experts import told as told_expert
from molehill_edge.commands.opening import Insecure, Name, StoreFolder, opened

if TYPE_CHECKING:
    from molehill_edge.bundle import Bundle


def info(
    name: Name,
    check: Annotated[bool, typer.Option("--check", help="Compute the golden inputs and compare.")] = False,
    insecure_local: Insecure = False,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Say what a bundle is: task, experts, gates, sizes, and how it compares with the original."""
    with explained(as_json):
        with opened(name, insecure=insecure_local, store=store) as bundle:
            told = _tell(bundle)
            if check:
                from molehill_edge import golden

                if bundle.added:  # they had no part in the golden outputs
                    own = set(told["experts"]) - {each["id"] for each in told["added"]}
                    bundle.choose_experts(sorted(own))
                found = golden.check(bundle)
                told["check"] = {**dataclasses.asdict(found), "passed": found.passed}
        if as_json:
            print_json(told)
        else:
            _show_told(told)
        if check and not told["check"]["passed"]:
            raise BundleError(
                "the bundle answers otherwise than where it was made",
                where=name,
                mend="Update onnxruntime, or export it in another quantisation.",
            )


def _tell(bundle: Bundle) -> dict[str, Any]:
    """What a manifest says, for people and programs."""
    manifest = bundle.manifest
    sizes: dict[str, int] = {}
    for file in manifest.files:
        role = file.path.partition("/")[0] if "/" in file.path else Path(file.path).stem
        sizes[role] = sizes.get(role, 0) + file.length
    parity = manifest.parity
    task: dict[str, Any] = {"kind": manifest.task.kind, "max_length": manifest.task.max_length}
    if manifest.task.labels:
        task["labels"] = list(manifest.task.labels)
    if manifest.task.range:
        task["range"] = list(manifest.task.range)
    quantisation = manifest.quantisation
    return {
        "id": manifest.id,
        "version": manifest.version,
        "base": {"id": manifest.base.id, "revision": manifest.base.revision, "digest": manifest.base.digest},
        "task": task,
        "quantisation": {key: getattr(quantisation, key) for key in ("base", "head", "experts", "block")},
        "experts": [slot.id for slot in manifest.slots if slot.id and not slot.shared],
        "shared": [slot.id for slot in manifest.slots if slot.shared],
        "added": [told_expert(added) for added in bundle.added],
        "empty_slots": sum(not slot.id for slot in manifest.slots),
        "sites": len(manifest.sites),
        "routers": len(manifest.routers),
        "router_ranks": bundle.by_places,
        "gates": {"default": manifest.provenance.gate, "further": bundle.gates()},
        "parity": likeness.told(parity),
        "provenance": {
            "run": manifest.provenance.run,
            "rounds": manifest.provenance.rounds,
            "federation": manifest.provenance.federation,
            "epsilon": manifest.provenance.epsilon,
            "exporter": manifest.provenance.exporter,
        },
        "runtime": {"onnxruntime": manifest.runtime.onnxruntime, "opset": manifest.runtime.opset},
        "bytes": {"total": sum(sizes.values()), **sizes},
        "created": _when(manifest.created),
        "expires": _when(manifest.expires),
    }


def _show_told(told: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    base, task, parity, came = told["base"], told["task"], told["parity"], told["provenance"]
    figure, figures = likeness.figure_row(parity)
    rows = {
        "bundle": f"{told['id']}, version {told['version']}",
        "base": " ".join(part for part in (base["id"], base["revision"], base["digest"][:16]) if part),
        "task": f"{task['kind']}, at most {task['max_length']} tokens",
        "labels": ", ".join(task.get("labels", ())),
        "range": " to ".join(f"{end:g}" for end in task.get("range", ())),
        "weights": ", ".join(f"{key} {value}" for key, value in told["quantisation"].items() if value),
        "experts": ", ".join(told["experts"]) + (f" and {told['empty_slots']} empty" if told["empty_slots"] else ""),
        "shared": ", ".join(told["shared"]),
        "added": ", ".join(
            f"{each['id']} (signed, version {each['version']})" if each["signed"] else f"{each['id']} (NOT SIGNED)"
            for each in told["added"]
        ),
        "routers": f"{told['routers']} for {told['sites']} linears"
        + (", which can choose experts by their places (router_ranks)" if told["router_ranks"] else ""),
        "gate": told["gates"]["default"] or "default",
        "further gates": ", ".join(told["gates"]["further"]),
        "parity": f"{parity['agreement']:.1%} of {parity['texts']} texts alike, logit error {parity['logit_error']:.1e}"
        if parity["texts"]
        else "",
        figure: figures,
        "from": ", ".join(
            part
            for part in (
                came["run"], counted(came["rounds"], "round") if came["rounds"] else "", came["federation"],
                f"epsilon {came['epsilon']:g}" if came["epsilon"] else "", came["exporter"],
            )
            if part
        ),
        "needs": f"onnxruntime {told['runtime']['onnxruntime']} or newer" if told["runtime"]["onnxruntime"] else "",
        "created": told["created"] or "",
        "expires": told["expires"] or "never",
    }  # fmt: skip
    for label, value in rows.items():
        if value:
            table.add_row(label, Text(harmless(value)))
    sizes = told["bytes"]
    for role, size in sorted(sizes.items(), key=lambda item: -item[1]):
        table.add_row("size" if role == "total" else f"  {role}", f"{_size(size):>10}")
    if "check" in told:
        found = told["check"]
        verdict = "passed" if found["passed"] else "FAILED"
        table.add_row(
            "check", f"{verdict}: {found['agreement']:.1%} of {found['inputs']} alike, error {found['error']:.1e}"
        )
    show_table(table)


def _when(seconds: int) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat() if seconds else None


def _size(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB" if size >= 1 << 20 else f"{size / (1 << 10):.1f} KiB"
