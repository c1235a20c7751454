"""Check docstrings against signatures with pydoclint, as far as the house style asks for it.

A docstring may be short: a summary that says what is returned, and the errors. What it does list must be right.
"""

from __future__ import annotations

import re
import subprocess

PARTS = ("molehill", "server", "client", "simulation", "edge")
ALLOWED = {
    "DOC101": "arguments need no section when the summary says enough; ruff's D417 refuses a section with gaps",
    "DOC103": "the same; arguments that do not exist are DOC102, a wrong order is DOC104",
    "DOC201": "the summary may say what is returned",
    "DOC402": "the summary may say what is yielded",
    "DOC502": "errors that come from a call below are documented too",
    "DOC503": "the same",
}


def main() -> None:
    """Print what is wrong and exit with 1, or print nothing."""
    command = ["pydoclint", "--quiet", "--show-filenames-in-every-violation-message", "true", *PARTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    found = [(line, match[0]) for line in lines if (match := re.search(r"\bDOC\d{3}\b", line))]
    if done.returncode not in (0, 1) or (done.returncode == 1 and not found):
        raise SystemExit("\n".join(lines))
    wrong = [line for line, code in found if code not in ALLOWED]
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
