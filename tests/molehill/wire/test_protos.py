from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_generated_code_imports_without_a_warning() -> None:
    code = "import molehill_protos.v1.delta_pb2"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


def test_generated_code_is_what_the_sources_give() -> None:
    pytest.importorskip("grpc_tools")
    command = [ROOT / "scripts" / "protos.sh", "--check"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}
    )
    assert done.returncode == 0, done.stdout + done.stderr
