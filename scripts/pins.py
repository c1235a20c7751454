"""Write constraints.txt, the exact versions here of everything the `dev` extra needs, and its hashed twins.

    python -m pip install -e ".[dev]" && python scripts/pins.py

Local version labels (`+cpu`) are dropped, so one file serves every build of a package. requirements/EXTRA.txt has the
same versions for one extra, on every system, with the SHA-256 of every file that PyPI has of them, and
requirements/build.txt what builds Molehill itself. torch, of which there are builds elsewhere, and what only its builds
for GPUs need, are in a file of their own. Writing them needs `uv` on the PATH.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import tomllib
from importlib.metadata import distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
HASHED = ROOT / "requirements"
EXTRAS = ("client", "simulation", "edge", "edge,parquet", "serve", "export,gguf", "demo,privacy")
HEADER = """\
# Exact versions of everything `molehill[dev]` needs, by scripts/pins.py. pip install -c constraints.txt -e ".[demo]"
"""
_TORCH = re.compile(r"(torch|triton|(nvidia|cuda)-.*)==")


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


def hashed(*given: str) -> list[str]:
    """What something needs on any system, one entry (version, marker, hashes) each.

    Args:
        given: What, for `uv pip compile`.

    Raises:
        SystemExit: There is no uv, or it finds no versions that fit.
    """
    uv = shutil.which("uv")
    if uv is None:
        raise SystemExit("the hashed twins need uv: pipx install uv")
    words = [uv, "pip", "compile", *given, "-c", "constraints.txt", "--universal", "--python-version", "3.11"]
    words += ["--generate-hashes", "--no-annotate", "--no-header", "--quiet"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return re.findall(r"^\S.*\n(?: .*\n)*", done.stdout, flags=re.MULTILINE)


def main() -> None:
    """Write the files."""
    seen: dict[str, frozenset[str]] = {}
    needed("molehill", frozenset({"dev"}), seen)
    pins = (f"{name}=={Version(version(name)).public}\n" for name in sorted(seen) if name != "molehill")
    (ROOT / "constraints.txt").write_text(HEADER + "".join(pins), encoding="utf-8")
    HASHED.mkdir(exist_ok=True)
    torch: dict[str, None] = {}
    for extras in EXTRAS:
        entries = hashed("pyproject.toml", *(part for extra in extras.split(",") for part in ("--extra", extra)))
        torch |= dict.fromkeys(entry for entry in entries if _TORCH.match(entry))
        _write(extras.replace(",", "-"), [entry for entry in entries if not _TORCH.match(entry)])
    _write("torch", sorted(torch))
    with tempfile.NamedTemporaryFile("w", suffix=".in") as build:
        build.write("\n".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]))
        build.flush()
        _write("build", hashed(build.name))


def _write(name: str, entries: list[str]) -> None:
    note = "# By scripts/pins.py: pip install --require-hashes --no-deps -r FILE\n"
    (HASHED / f"{name}.txt").write_text(note + "".join(entries), encoding="utf-8")


if __name__ == "__main__":
    main()
