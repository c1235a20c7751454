"""Write constraints.txt: the exact versions, in this environment, of everything the `dev` extra needs.

    python -m pip install -e ".[dev]" && python scripts/pins.py

Local version labels (`+cpu`) are dropped, so one file serves every build of a package.
"""

from __future__ import annotations

from importlib.metadata import distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
HEADER = """\
# Exact versions of everything `molehill[dev]` needs, by scripts/pins.py. pip install -c constraints.txt -e ".[demo]"
"""


def needed(name: str, extras: frozenset[str], seen: dict[str, frozenset[str]]) -> None:
    """Add the installed distributions that `name[extras]` depends on, itself included, to `seen`."""
    name = canonicalize_name(name)
    new = extras | {""}
    if new <= seen.get(name, frozenset()):
        return
    seen[name] = seen.get(name, frozenset()) | new
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in seen[name]):
            needed(requirement.name, frozenset(requirement.extras), seen)


def main() -> None:
    """Write the file."""
    seen: dict[str, frozenset[str]] = {}
    needed("molehill", frozenset({"dev"}), seen)
    pins = (f"{name}=={Version(version(name)).public}\n" for name in sorted(seen) if name != "molehill")
    (ROOT / "constraints.txt").write_text(HEADER + "".join(pins), encoding="utf-8")


if __name__ == "__main__":
    main()
