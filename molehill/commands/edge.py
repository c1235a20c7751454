"""``molehill edge``: bundles on a device."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from molehill.characters import harmless, recovered
from molehill.commands import edge_experts, edge_trust
from molehill.commands.common import INTERRUPTED, Json, explained, print_json, say
from molehill.commands.edge_trust import StoreFolder
from molehill.errors import BundleError, DataError
from molehill.extras import needs
from molehill.rowfiles import label_of, read_texts, require_text
from molehill.words import counted

if TYPE_CHECKING:
    from molehill_edge.bundle import Bundle
    from molehill_edge.generate import Answer
    from molehill_edge.personalise import Outcome
    from molehill_edge.routes import RouterReport
    from molehill_edge.trust import Trust

app = typer.Typer(
    help="Bundles on a device: get them, run them, make them yours. Needs no torch.", no_args_is_help=True
)

Name = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="Id of a bundle in the store; with --insecure-local, a folder or file.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure-local", help="Open an unsigned folder or archive. Anybody could have written it.")
]
GateOption = Annotated[
    str | None, typer.Option("--gate", metavar="NAME|FILE", help="Instead of the bundle's default.", show_default=False)
]
Experts = Annotated[
    str | None,
    typer.Option("--experts", metavar="A,B,...", help="Choose from these experts only.", show_default=False),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Processor threads.", show_default="all")]
Memory = Annotated[int | None, typer.Option(min=1, help="Refuse what needs more MiB.", show_default="no limit")]


@contextlib.contextmanager
def _opened(
    name: str,
    *,
    insecure: bool,
    store: Path | None,
    threads: int | None = None,
    memory_mb: int | None = None,
    gate: str | None = None,
    experts: str | None = None,
) -> Iterator[Bundle]:
    """A bundle with a gate and a choice of experts."""
    with needs("edge"):
        from molehill_edge.bundle import Bundle

    with Bundle.open(name, trust=_trust(insecure, store), threads=threads, memory_mb=memory_mb) as bundle:
        if gate is not None:
            bundle.swap_gate(gate)
        if experts is not None:
            bundle.choose_experts([each.strip() for each in experts.split(",") if each.strip()])
        yield bundle


def _trust(insecure: bool, store: Path | None) -> Trust:
    with needs("edge"):
        if insecure:
            from molehill_edge.trust import InsecureLocal

            return InsecureLocal(lambda warning: say(Text(warning, "bold red")))
        from molehill_edge.store import Store

        return Store(store)


@app.command()
def run(
    name: Name,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="A text or a question; may be repeated.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help='JSON lines, JSON, CSV or TSV with "text", or one text a line; - reads standard input.',
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Hold a conversation; /new begins another, Ctrl-D ends it.")
    ] = False,
    gate: GateOption = None,
    experts: Experts = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Let texts that are too long lose their end.")] = False,
    route: Annotated[bool, typer.Option("--route", help="Show which experts each text used.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Go on with the text as it is, not as an instruction.")] = False,
    system: Annotated[str, typer.Option(help="What a conversation begins with.", show_default=False)] = "",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens.", show_default="256, or what fits")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from this many likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from tokens of this probability together.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End an answer before this string; may be repeated.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draws.", show_default="a new one")] = None,
    threads: Threads = None,
    memory_mb: Memory = None,
    insecure_local: Insecure = False,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Classify texts, or answer them, or hold a conversation."""
    with explained(as_json):
        try:
            texts = [] if chat else _texts(text, file)
            if chat and (text or file or as_json):
                raise BundleError("--chat goes without --text, --file and --json")
            with _opened(
                name, insecure=insecure_local, store=store, threads=threads, memory_mb=memory_mb, gate=gate,
                experts=experts,
            ) as bundle:  # fmt: skip
                sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
                if chat:
                    _converse(bundle, system, sampling, max_new_tokens, stop or ())
                elif bundle.manifest.task.kind == "classification":
                    _classify(bundle, texts, truncate=truncate, route=route, as_json=as_json)
                else:
                    options = {**sampling, "max_new_tokens": max_new_tokens, "stop": stop or (), "raw": raw}
                    _answer(bundle, texts, options, route=route, as_json=as_json)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def _texts(given: Sequence[str] | None, file: Path | None) -> list[str]:
    """All texts of the command line and the file, in this order."""
    texts = [recovered(text) for text in given or ()]
    for text in texts:
        require_text(text, "text", "--text")
    if file is not None:
        texts += [row["text"] for _, row in read_texts(file)]
    if not texts:
        raise BundleError("no text", mend="Give --text, --file or --chat.")
    return texts


def _classify(bundle: Bundle, texts: list[str], *, truncate: bool, route: bool, as_json: bool) -> None:
    found = bundle.classify(texts, truncate=truncate)
    routes = [bundle.route_report(text, truncate=truncate) for text in texts] if route else None
    if as_json:
        labels = bundle.manifest.task.labels
        rows = [
            {
                "text": text,
                "label": each.label,
                "probability": each.probability,
                "probabilities": dict(zip(labels, each.probabilities, strict=True)),
            }
            for text, each in zip(texts, found, strict=True)
        ]
        print_json({"bundle": _who(bundle), "predictions": _with_routes(rows, routes)})
        return
    width = max(len(each.label) for each in found)
    for number, (text, each) in enumerate(zip(texts, found, strict=True)):
        typer.echo(f"{harmless(each.label):<{width}}  {each.probability:6.1%}  {_short(text)}")
        if routes is not None:
            _show_routes(routes[number])


def _answer(bundle: Bundle, texts: list[str], options: dict[str, Any], *, route: bool, as_json: bool) -> None:
    rows = []
    routes: list[list[RouterReport]] | None = [] if route else None
    for number, text in enumerate(texts):
        if not as_json and len(texts) > 1:
            typer.echo(f"{'' if number == 0 else chr(10)}> {_short(text)}")
        answer: Answer = bundle.generate(text, on_text=None if as_json else _show, **options)
        rows.append({"text": text, "answer": answer.text, "tokens": answer.tokens, "reason": answer.reason})
        if not as_json:
            typer.echo("")
        if routes is not None:
            routes.append(bundle.route_report(text))
            if not as_json:
                _show_routes(routes[-1])
    if as_json:
        print_json({"bundle": _who(bundle), "answers": _with_routes(rows, routes)})


def _converse(
    bundle: Bundle, system: str, sampling: dict[str, Any], max_new_tokens: int | None, stop: Sequence[str]
) -> None:
    """Read a line, answer it, until the end of input; Ctrl-C ends an answer, and at the prompt the conversation."""
    chat = bundle.chat(system=system, **sampling)
    people = sys.stdin.isatty()
    for line in _lines(people):
        if line == "/new":
            chat = bundle.chat(system=system, **sampling)
            continue
        try:
            chat.say(line, max_new_tokens=max_new_tokens, stop=stop, on_text=_show)
        except KeyboardInterrupt:
            if not people:
                raise
        except BundleError as error:
            if not people:
                raise
            say(Text(f"{error} /new begins a new conversation."))
            continue
        typer.echo("")


def _lines(people: bool) -> Iterator[str]:
    """Lines of standard input that are not empty; people get a prompt, and may edit them."""
    if people:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - it edits what is typed
    while True:
        try:
            line = recovered(input("> " if people else "").strip())
        except EOFError:
            break
        if line:
            yield line
    if people:
        typer.echo("")


def _show(piece: str) -> None:
    sys.stdout.write(harmless(piece, lines=True))
    sys.stdout.flush()


def _show_routes(reports: Sequence[RouterReport]) -> None:
    """One line per router: the shares of its experts, in columns."""
    experts = list(dict.fromkeys(name for report in reports for name in report.experts))
    table = Table(box=SIMPLE_HEAD)
    table.add_column("router", overflow="fold")
    for name in experts:
        table.add_column(Text(harmless(name)), justify="right")
    for report in reports:
        shares = dict(zip(report.experts, report.shares, strict=True))
        table.add_row(
            Text(harmless(report.router)), *(f"{shares[name]:.1%}" if name in shares else "" for name in experts)
        )
    _print(table)


def _with_routes(rows: list[dict[str, Any]], routes: list[list[RouterReport]] | None) -> list[dict[str, Any]]:
    if routes is not None:
        for row, reports in zip(rows, routes, strict=True):
            row["routes"] = [
                {"router": each.router, "shares": dict(zip(each.experts, each.shares, strict=True))} for each in reports
            ]
    return rows


@app.command()
def info(
    name: Name,
    check: Annotated[bool, typer.Option("--check", help="Compute the golden inputs and compare.")] = False,
    insecure_local: Insecure = False,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Say what a bundle is: task, experts, gates, sizes, and how it compares with the original."""
    with explained(as_json):
        with _opened(name, insecure=insecure_local, store=store) as bundle:
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
    quantisation = manifest.quantisation
    return {
        "id": manifest.id,
        "version": manifest.version,
        "base": {"id": manifest.base.id, "revision": manifest.base.revision, "digest": manifest.base.digest},
        "task": task,
        "quantisation": {key: getattr(quantisation, key) for key in ("base", "head", "experts", "block")},
        "experts": [slot.id for slot in manifest.slots if slot.id and not slot.shared],
        "shared": [slot.id for slot in manifest.slots if slot.shared],
        "added": [edge_experts.told(added) for added in bundle.added],
        "empty_slots": sum(not slot.id for slot in manifest.slots),
        "sites": len(manifest.sites),
        "routers": len(manifest.routers),
        "gates": {"default": manifest.provenance.gate, "further": bundle.gates()},
        "parity": {
            "texts": parity.texts,
            "logit_error": parity.logit_error,
            "agreement": parity.agreement,
            "rows": parity.rows,
            "accuracy_original": parity.accuracy_original,
            "accuracy_bundle": parity.accuracy_bundle,
        },
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
    rows = {
        "bundle": f"{told['id']}, version {told['version']}",
        "base": " ".join(part for part in (base["id"], base["revision"], base["digest"][:16]) if part),
        "task": f"{task['kind']}, at most {task['max_length']} tokens",
        "labels": ", ".join(task.get("labels", ())),
        "weights": ", ".join(f"{key} {value}" for key, value in told["quantisation"].items() if value),
        "experts": ", ".join(told["experts"]) + (f" and {told['empty_slots']} empty" if told["empty_slots"] else ""),
        "shared": ", ".join(told["shared"]),
        "added": ", ".join(
            f"{each['id']} (signed, version {each['version']})" if each["signed"] else f"{each['id']} (NOT SIGNED)"
            for each in told["added"]
        ),
        "routers": f"{told['routers']} for {told['sites']} linears",
        "gate": told["gates"]["default"] or "default",
        "further gates": ", ".join(told["gates"]["further"]),
        "parity": f"{parity['agreement']:.1%} of {parity['texts']} texts alike, logit error {parity['logit_error']:.1e}"
        if parity["texts"]
        else "",
        "accuracy": f"{parity['accuracy_bundle']:.1%}, originally {parity['accuracy_original']:.1%}"
        if parity["rows"]
        else "",
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
    _print(table)


@app.command()
def bench(
    name: Name,
    gate: GateOption = None,
    rounds: Annotated[int, typer.Option(min=1, max=10000, help="How often each thing is done.")] = 10,
    threads: Threads = None,
    memory_mb: Memory = None,
    insecure_local: Insecure = False,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Measure a bundle on this device: opening, memory, texts or tokens, and swapping a gate."""
    with explained(as_json):
        begin = time.perf_counter()
        with _opened(
            name, insecure=insecure_local, store=store, threads=threads, memory_mb=memory_mb, gate=gate
        ) as bundle:
            opened = time.perf_counter() - begin
            from molehill_edge import bench as benches

            after_open = benches.memory()
            figures = benches.measure(bundle, rounds=rounds)
            used = benches.memory()
            files = sum(file.length for file in bundle.manifest.files) / (1 << 20)
            who = _who(bundle)
        if as_json:
            print_json(
                {
                    "bundle": who,
                    "open_seconds": opened,
                    "files_mib": files,
                    "memory_mib_after_open": after_open,
                    "memory_mib": used,
                    "rounds": rounds,
                    "figures": [dataclasses.asdict(figure) for figure in figures],
                }
            )
            return
        table = Table(box=SIMPLE_HEAD)
        for column in ("", "median", "quartiles", "unit"):
            table.add_column(column, justify="right" if column in {"median", "quartiles"} else "left")
        table.add_row("open, with imports", f"{1e3 * opened:.0f}", "", "ms")
        table.add_row("files", f"{files:.1f}", "", "MiB")
        for key, value in used.items():
            table.add_row(f"memory, {key}", f"{value:.0f}", "", "MiB")
        for figure in figures:
            table.add_row(figure.name, f"{figure.median:.4g}", f"{figure.low:.4g} - {figure.high:.4g}", figure.unit)
        _print(table)


@app.command()
def personalise(
    name: Name,
    rows: Annotated[
        Path,
        typer.Option(
            "--rows",
            metavar="FILE",
            help='JSON lines, JSON, CSV or TSV with "text" and, for a classifier, perhaps "label"; or one text a line.',
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The gate file to write, for --gate.", show_default=False)
    ],
    gate: GateOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and the search.")] = 0,
    budget: Annotated[int, typer.Option(min=1, help="How many times the texts may be read.")] = 80,
    threads: Threads = None,
    memory_mb: Memory = None,
    insecure_local: Insecure = False,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Fit which experts are chosen to a few texts of yours; nothing leaves this device.

    About a third of the texts is held out, and says whether the result is kept.
    """
    with explained(as_json):
        read = list(read_texts(rows))
        found_labels = [label_of(row["label"], where) for where, row in read if row.get("label") is not None]
        if found_labels and len(found_labels) != len(read):
            bare = next(where for where, row in read if row.get("label") is None)
            raise DataError("some rows have a label, and this one has none", where=bare, mend="Give all of them one.")
        with _opened(
            name, insecure=insecure_local, store=store, threads=threads, memory_mb=memory_mb, gate=gate
        ) as bundle:
            labels = found_labels if found_labels and bundle.manifest.task.kind == "classification" else None
            found = bundle.personalise([row["text"] for _, row in read], labels, seed=seed, budget=budget)
            from molehill_edge import gates

            gates.write(out, found.gate, bundle.manifest)
            who = _who(bundle)
        if as_json:
            told = {key: value for key, value in dataclasses.asdict(found).items() if key != "gate"}
            print_json({"bundle": who, "gate": str(out), **told})
        else:
            _show_outcome(found, out)


def _show_outcome(found: Outcome, out: Path) -> None:
    typer.echo(f"fitted to {found.fitted} texts, judged on {found.held_out} others, {found.evaluations} readings")
    typer.echo(f"loss      {found.before.loss:8.4f} -> {found.after.loss:8.4f}")
    if found.before.accuracy is not None and found.after.accuracy is not None:
        typer.echo(f"accuracy  {found.before.accuracy:8.1%} -> {found.after.accuracy:8.1%}")
    if found.dropped:
        typer.echo(f"never chosen: {', '.join(found.dropped)}")
    what = "the fitted gate" if found.kept else "no gain on the texts held out: the gate as it was"
    typer.echo(f"{out}: {what}")


edge_trust.register(app)
edge_experts.register(app)


def _who(bundle: Bundle) -> dict[str, Any]:
    return {"id": bundle.manifest.id, "version": bundle.manifest.version, "gate": bundle.gate.name}


def _when(seconds: int) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat() if seconds else None


def _size(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB" if size >= 1 << 20 else f"{size / (1 << 10):.1f} KiB"


def _short(text: str) -> str:
    line = harmless(" ".join(text.split()))
    return line if len(line) <= 100 else f"{line[:99]}…"


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 190).print(table)
