"""Distributions of others, made of a few lines and put where Python finds them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent


def add(site: Path, name: str, group: str, points: dict[str, str], modules: dict[str, str]) -> None:
    """Install a distribution.

    Args:
        site: Folder that is on Python's path.
        name: Of the distribution.
        group: Of its entry points.
        points: Its entry points, by name.
        modules: Its files, by path.
    """
    about = site / f"{name.replace('-', '_')}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for path, text in modules.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(dedent(text), encoding="utf-8")


def python(site: Path, code: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program that finds what lies in a folder."""
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": str(site), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
