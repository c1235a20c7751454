"""The run folder, before a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molehill.config import Config, load
from molehill.errors import ResumeError


def write_config(config: Config, out: Path) -> Path:
    """Write the resolved configuration into the run folder, once; both apps read it from there.

    Returns:
        The absolute path of the file.

    Raises:
        ResumeError: The folder holds a run with another configuration.
    """
    path = out.resolve() / "config.toml"
    if path.exists():
        differ = _differences(load(path).substance, config.substance)
        if differ:
            raise ResumeError(
                f"the run was started with another configuration, {', '.join(differ[:5])} differ",
                where=str(out),
                mend="Resume with the configuration it was started with, or start a new run in another folder.",
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(".config.toml.new")
    scratch.write_text(config.to_toml(), encoding="utf-8")
    return scratch.replace(path)


def _differences(before: Any, now: Any, at: str = "") -> list[str]:
    """Dotted keys under which two nested configurations differ."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [at]
    keys = sorted({*before, *now})
    return [path for key in keys for path in _differences(before.get(key), now.get(key), f"{at}.{key}" if at else key)]
