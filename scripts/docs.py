"""Write the generated pages of docs/reference, or check that they are what the code says.

python scripts/docs.py            write
python scripts/docs.py --check    exit 1 when a page is out of date, or a configuration key is not described
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import api_pages
import commands_page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from molehill import errors, evidence, registry, toml_file
from molehill.config import Config, MethodRef
from molehill_client.policy import Policy

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "<!-- Written by scripts/docs.py; change the code, then run `make docs`. -->\n"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def methods_page() -> str:
    """Every registered method, axis by axis."""
    lines = [
        "# Methods\n",
        NOTE,
        "Named in a configuration as a string, or as a table of `name` and parameters; `molehill methods` lists them.",
        "`seed`: code of the system that the method stands for, in the project's list of systems to cover.\n",
    ]
    for axis in registry.axes():
        lines += [
            f"## {axis}\n",
            f"{registry.meaning(axis)}\n",
            "| name | what it does | parameters | paper | seed |",
            "|---|---|---|---|---|",
        ]
        for method in registry.methods(axis):
            source = f"[{method.paper}]({method.url})" if method.url else method.paper
            row = (
                f"`{method.name}`",
                method.summary.replace("``", "`"),
                _parameters(method.params),
                source,
                " ".join(method.seeds),
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        lines.append("")
    return "\n".join(lines)


def _parameters(params: type[Any]) -> str:
    shown = []
    for field in dataclasses.fields(params):
        value = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        shown.append(f"`{field.name}`" if required else f"`{field.name}={value!r}`")
    return ", ".join(shown)


def config_page() -> str:
    """Every key of a configuration."""
    lines = [
        "# Configuration\n",
        NOTE,
        "One TOML file per run, checked before anything starts; an unknown key is an error. Every key has a default:",
        "without a file, `molehill simulate` runs `configs/demo.toml`. `molehill check FILE` prints what a file comes",
        "to, and `molehill simulate --set section.key=value` overrides one key.\n",
    ]
    return "\n".join(lines + sections(Config))


def policy_page() -> str:
    """Every key of an owner's policy, and every kind of evidence."""
    lines = [
        "# Policy\n",
        NOTE,
        "What the owner of rows lets a coordinator ask of a machine: a TOML file for `molehill client join --policy",
        "FILE`. `molehill client policy --init` writes it with these defaults, which are careful ones; `molehill",
        "client policy` checks it. An unknown key is an error, and a key that is left out has its default. A run, a",
        "plan or a request that asks for more is refused with the reason and the line of the file, and the other",
        "owners go on without this one. The file is read again for every run, and nothing that a server sends changes",
        "it.\n",
        *sections(Policy),
        "## Kinds of evidence\n",
        "What a run has every client tell beside the changes themselves. Under secure aggregation what only enters",
        "the masked sum is not told. A run that asks for a kind that is missing from `share.tell` is refused;",
        "`baselines` and `scores` are refused when they are asked for, so that a machine can take part without",
        "telling them.\n",
        "| kind | what it is |",
        "|---|---|",
        *(f"| `{kind.name}` | {kind.meaning} |" for kind in evidence.KINDS),
        "",
    ]
    return "\n".join(lines)


def sections(root: type[BaseModel]) -> list[str]:
    """A table of keys for every section."""
    lines = []
    for name, info in root.model_fields.items():
        section: Any = info.annotation
        doc = (section.__doc__ or "").strip()
        meanings = attributes(section)
        lines += [
            f"## [{name}]\n",
            f"{doc.partition(chr(10))[0]}\n",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for key, field in section.model_fields.items():
            row = (
                f"`{key}`",
                _type(section, key, field),
                f"`{_default(field.get_default(call_default_factory=True))}`",
                meanings[key],
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        lines.append("")
    return lines


def attributes(section: type[BaseModel]) -> dict[str, str]:
    """The descriptions in the ``Attributes`` part of a class docstring, by name.

    Raises:
        SystemExit: A field is not described.
    """
    found = toml_file.meanings(section)
    missing = [name for name in section.model_fields if name not in found]
    if missing:
        raise SystemExit(f"{section.__module__}.{section.__name__}: describe {', '.join(missing)} under Attributes")
    return found


def _type(section: type[BaseModel], key: str, field: FieldInfo) -> str:
    annotation = str(section.__annotations__[key])
    axes = re.findall(r"""Axis\(["'](\w+)["']\)""", annotation)
    if axes:
        link = f"[{axes[0]}](methods.md#{axes[0]})"
        return f"list of {link}" if annotation.startswith("tuple") else link
    annotation = re.sub(r"Annotated\[((?:\w+)(?:\[\w+, \.\.\.\])?), .*?\)\]", r"\1", annotation)
    annotation = re.sub(r"\btuple\[(\w+), \.\.\.\]", r"list of \1", annotation)
    annotation = annotation.replace("Fraction", "float").replace("FiniteFloat", "float")
    annotation = re.sub(r"Literal\[([^]]*)\]", lambda match: match[1].replace(", ", " or "), annotation)
    annotation = annotation.replace(" | None", " (optional)").replace(" | ", " or ")
    annotation = re.sub("[\"']", "`", annotation)
    bounds = [
        f"{words} {getattr(m, bound):g}" for m in field.metadata for bound, words in BOUNDS.items() if hasattr(m, bound)
    ]
    return ", ".join([annotation, *bounds])


def _default(value: Any) -> str:
    if isinstance(value, MethodRef):
        params = "".join(f", {key} = {_default(item)}" for key, item in value.params.items())
        return f'{{ name = "{value.name}"{params} }}' if params else f'"{value.name}"'
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_default(item) for item in value) + "]"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def errors_page() -> str:
    """Every exit code."""
    rows = [
        ("0", "", "The command did what it was asked to do."),
        ("1", "", "Something unforeseen: a bug, please report it with the traceback."),
        ("2", "", "The command line itself cannot be read; the message says which option."),
    ]
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__base__ is errors.MolehillError]
    rows += [
        (str(kind.exit_code), f"`{kind.__name__}`", (kind.__doc__ or "").strip().partition("\n")[0])
        for kind in sorted(kinds, key=lambda kind: kind.exit_code)
    ]
    rows.append(
        ("130", "", "Stopped with Ctrl-C; once the run has begun, the message holds the command that goes on with it.")
    )
    lines = [
        "# Errors and exit codes\n",
        NOTE,
        "A mistake ends in one paragraph on standard error: what is wrong, where (file, line, key, client), the cure.",
        'With `--json` it is `{"error": {"kind", "code", "what", "where", "mend"}}` on standard output.\n',
        "| code | kind | meaning |",
        "|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "A client that sends a bad update does not end a run: the update is quarantined, the round goes on, and the",
        "reason stands in the progress output, in `metrics.jsonl` and in the report.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write or check the pages."""
    pages = {
        "methods.md": methods_page(),
        "config.md": config_page(),
        "policy.md": policy_page(),
        "errors.md": errors_page(),
        "api.md": api_pages.host_page(NOTE),
        "api-device.md": api_pages.device_page(NOTE),
        "commands.md": commands_page.page(NOTE),
    }
    check = sys.argv[1:] == ["--check"]
    stale = []
    for name, text in pages.items():
        path = REFERENCE / name
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(name)
        elif not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        raise SystemExit(f"docs/reference is out of date ({', '.join(stale)}): run `make docs`")


if __name__ == "__main__":
    main()
