"""A virtual environment with the edge extra and nothing else, made of links to what is installed here."""

from __future__ import annotations

import os
import sys
import tomllib
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def closure(extra: str) -> dict[str, Distribution]:
    """The installed distributions that ``molehill[extra]`` needs, by name, itself not included."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()

    def add(lines: list[str], extras: set[str]) -> None:
        for requirement in map(Requirement, lines):
            if requirement.marker and not any(requirement.marker.evaluate({"extra": each}) for each in extras | {""}):
                continue
            name = canonicalize_name(requirement.name)
            if name not in found:
                found[name] = distribution(name)
            new = {(name, each) for each in requirement.extras | {""}} - seen
            if new:
                seen.update(new)
                add(found[name].requires or [], set(requirement.extras))

    project = PROJECT["project"]
    add([*project["dependencies"], *project["optional-dependencies"][extra]], set())
    found.pop("molehill", None)  # an extra may name others of its own
    return found


def make(folder: Path, extra: str = "edge") -> Path:
    """Make what ``python3 -m venv FOLDER && FOLDER/bin/pip install '.[EXTRA]'`` makes, in a second.

    Every file is linked by itself, so that a folder that several distributions share holds no others.

    Returns:
        Its folder of programs.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    known: set[Path] = set()
    for each in closure(extra).values():
        for file in each.files or []:
            if ".." not in file.parts and file.suffix != ".pth":
                _link(Path(each.locate_file(file)), site / file, known)
    own = distribution("molehill")
    about = site / f"molehill-{own.version}.dist-info"
    about.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (about / name).write_text(own.read_text(name) or "", encoding="utf-8")
    for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        (site / Path(package).name).symlink_to(ROOT / package)
    program = folder / "bin" / "molehill"
    python = folder / "bin" / "python"
    program.write_text(f"#!{python}\nimport sys\nfrom molehill.cli import main\n\nsys.exit(main())\n", encoding="utf-8")
    program.chmod(0o755)
    return folder / "bin"


def environment(home: Path) -> dict[str, str]:
    """Variables of a device: its own home, no path to modules of anybody else."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XDG_", "MOLEHILL_"))}
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1"}


def _link(source: Path, target: Path, known: set[Path]) -> None:
    if target.parent not in known:
        target.parent.mkdir(parents=True, exist_ok=True)
        known.add(target.parent)
    if source.is_file() and not target.exists():
        target.symlink_to(source)
