"""What can be imported, for docs/reference: the public names of a package, and every type of ours that they name."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from types import ModuleType
from typing import Any

import molehill
import molehill_edge

WIDTH = 100
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
# What a model, a strategy, a repository or a run is inside: one line each, for those who read on in the code.
INNER = (
    "molehill.decoding.interfaces:Passes",
    "molehill.decoding.stream:Reader",
    "molehill.molora.decode:TorchPasses",
    "molehill_edge.generate:Cache",
    "molehill_edge.manifest:Manifest",
    "molehill_edge.passes:EdgePasses",
    "molehill_edge.pool:Pool",
    "molehill_edge.store:Store",
    "molehill_edge.trust:Known",
    "molehill_simulation.beside:Beside",
    "molehill_simulation.source:Source",
)
# Described on a page of their own.
ELSEWHERE = {"Config": ("Its keys", "config.md"), "MolehillError": ("Its kinds, and exit codes", "errors.md")}


@dataclass
class Doc:
    """A docstring in the form of Google.

    Attributes:
        text: Its first line, and the paragraphs after it.
        named: Entries of ``Args``, ``Attributes`` and ``Raises``, by section.
        said: What ``Returns`` and ``Yields`` say.
    """

    text: list[str]
    named: dict[str, dict[str, str]] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)


def host_page(note: str) -> str:
    """What ``import molehill`` gives.

    Args:
        note: That it is generated.
    """
    return _page(
        molehill,
        [
            "# The Python API\n",
            note,
            "`import molehill` gives what trains, and what asks a finished run;",
            "[ask what you trained](../how-to/after-training.md#from-python) shows it at work.",
            "Devices have [a package of their own](api-device.md). All of it is typed.\n",
        ],
    )


def device_page(note: str) -> str:
    """What ``import molehill_edge`` gives.

    Args:
        note: That it is generated.
    """
    return _page(
        molehill_edge,
        [
            "# The Python API on devices\n",
            note,
            "`import molehill_edge` gives what opens a bundle, with the extra `edge` and without torch;",
            "[ship a run to devices](../how-to/edge.md#in-python) shows it at work. All of it is typed.\n",
        ],
    )


def _page(home: ModuleType, lines: list[str]) -> str:
    roots = [getattr(home, name) for name in home.__all__]
    others = [each for each in closure(roots) if each not in roots]
    known = {each.__name__ for each in (*roots, *others)}
    for title, part in ((f"## {home.__name__}\n", roots), ("## Types that they name\n", others)):
        lines.append(title)
        for each in part:
            lines += entry(each, known)
    return "\n".join(lines)


def closure(roots: Sequence[Any]) -> list[Any]:
    """All that is reached from the public names by what signatures, fields and bases name, nearest first."""
    found, left = [], list(roots)
    while left:
        each = left.pop(0)
        if each in found:
            continue
        found.append(each)
        if not _inner(each) and each.__name__ not in ELSEWHERE:
            left += [kind for part in _parts(each) for kind in kinds(part)]
            left += [base for base in getattr(each, "__bases__", ()) if _ours(base)]
    return found


def _inner(found: Any) -> bool:
    return f"{found.__module__}:{found.__name__}" in INNER


def _parts(found: Any) -> Iterator[Any]:
    """What of it has types: itself, and the members of a class."""
    yield found
    if inspect.isclass(found):
        yield from (_function(member) for member in members(found).values())


def members(kind: type) -> dict[str, Any]:
    """Public methods and properties that a class adds to the classes it comes from, in the order of the code."""
    values = inspect.get_annotations(kind)  # whose defaults may be functions
    return {
        name: member
        for name, member in vars(kind).items()
        if name[0] != "_" and name not in values and inspect.isfunction(_function(member))
        if not any(hasattr(base, name) for base in kind.__bases__)
    }


def _function(member: Any) -> Any:
    if isinstance(member, property):
        return member.fget
    if isinstance(member, (classmethod, staticmethod)):
        return member.__func__
    return inspect.unwrap(member) if inspect.isfunction(member) else getattr(member, "func", member)


def _called(member: Any) -> bool:
    return inspect.isfunction(member) or isinstance(member, (classmethod, staticmethod))


def kinds(part: Any) -> Iterator[type]:
    """Classes of ours that its types name."""
    for name in dict.fromkeys(
        re.findall(r"\b[A-Za-z_]\w*", " ".join(map(str, inspect.get_annotations(part).values())))
    ):
        found = _named(name, part.__module__)
        if inspect.isclass(found) and _ours(found):
            yield found


def _named(name: str, module: str) -> Any:
    """What a name of an annotation is; some are imported for those who check types alone."""
    found = getattr(sys.modules[module], name, None)
    if found is None and (home := _imports(module).get(name)):
        found = getattr(importlib.import_module(home), name)
    return found


@cache
def _imports(module: str) -> dict[str, str]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def _ours(kind: type) -> bool:
    return (
        kind.__module__.startswith("molehill") and not kind.__name__.startswith("_") and "_pb2" not in kind.__module__
    )


def entry(found: Any, known: set[str]) -> list[str]:
    """The part of a page on one name."""
    lines = [f"### {found.__name__}\n"]
    if not inspect.isclass(found):
        return lines + function(found, found.__name__, known)
    doc = read(found)
    if found.__name__ in ELSEWHERE:
        what, where = ELSEWHERE[found.__name__]
        doc.text.append(f"[{what}]({where}).")
    if _inner(found):
        return [*lines, f"{doc.text[0]} See `{found.__module__}`.\n"]
    lines += [f"{text}\n" for text in doc.text]
    if bases := [f"[{base.__name__}](#{base.__name__.lower()})" for base in found.__bases__ if base.__name__ in known]:
        lines.append(f"It has all that {', '.join(bases)} has.\n")
    lines += _table(("attribute", "type", "meaning"), _attributes(found, doc))
    for name, member in members(found).items():
        if _called(member):
            title = f"{found.__name__}.{name}"
            bound = not isinstance(member, staticmethod)
            lines += [f"#### {title}\n", *function(_function(member), title, known, bound=bound)]
    return lines


def _attributes(kind: type, doc: Doc) -> list[tuple[str, ...]]:
    """Its fields and properties."""
    told = doc.named.get("Attributes", {})
    types = {} if kind.__name__ in ELSEWHERE else inspect.get_annotations(kind)
    types = {name: str(hint) for name, hint in types.items() if name[0] != "_"}
    defaults = {
        each.name: f" = `{each.default!r}`"
        for each in (fields(kind) if is_dataclass(kind) else ())
        if each.default is not MISSING and not callable(each.default)
    }
    rows = [
        (f"`{name}`", _type(types.get(name, "")) + defaults.get(name, ""), told.get(name, ""))
        for name in {**types, **told}
    ]
    for name, member in members(kind).items():
        if not _called(member):
            getter = _function(member)
            said = _type(inspect.get_annotations(getter).get("return", ""))
            rows.append((f"`{name}`", said, " ".join(read(getter).text)))
    return rows


def function(found: Any, name: str, known: set[str], *, bound: bool = False) -> list[str]:
    """A signature and what its docstring says."""
    doc = read(found)
    lines = ["```python signature", signature(found, name, bound=bound), "```\n", *(f"{text}\n" for text in doc.text)]
    lines += _table(("argument", "meaning"), [(f"`{each}`", text) for each, text in doc.named.get("Args", {}).items()])
    lines += [f"{section}: {text}\n" for section, text in doc.said.items()]
    if errors := doc.named.get("Raises"):
        lines += ["Raises:\n", *(f"- `{kind}`: {text}" for kind, text in errors.items()), ""]
    if named := [kind.__name__ for kind in kinds(found) if kind.__name__ in known]:
        lines.append(f"Types: {', '.join(f'[{each}](#{each.lower()})' for each in dict.fromkeys(named))}\n")
    return lines


def signature(found: Any, name: str, *, bound: bool) -> str:
    """How it is called, on one line or with a line for each argument."""
    said = inspect.signature(found)
    words: list[str] = []
    for each in list(said.parameters.values())[bound:]:
        if each.kind is each.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        default = "" if each.default is each.empty else f" = {'...' if callable(each.default) else repr(each.default)}"
        words.append(f"{each.name}: {each.annotation}{default}")
    line = f"{name}({', '.join(words)}) -> {said.return_annotation}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {word}," for word in words), f") -> {said.return_annotation}"])


def read(found: Any) -> Doc:
    """The docstring of something.

    Raises:
        SystemExit: There is none.
    """
    if not found.__doc__:
        raise SystemExit(f"{found.__module__}.{found.__qualname__} is public: write a docstring")
    pieces = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.cleandoc(found.__doc__), flags=re.MULTILINE)
    doc = Doc([_words(part) for part in pieces[0].strip().split("\n\n")])
    for section, block in zip(pieces[1::2], pieces[2::2], strict=True):
        if section in {"Returns", "Yields"}:
            doc.said[section] = _words(block)
        else:
            entries = re.findall(r"^ {4}([\w.]+): (.*(?:\n {5,}.*)*)", block, flags=re.MULTILINE)
            doc.named[section] = {name: _words(meaning) for name, meaning in entries}
    return doc


def _words(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")


def _type(said: str) -> str:
    return f"`{said}`" if said else ""


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    cells = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return [*(f"| {' | '.join(row)} |" for row in cells), ""]
