"""What a training step costs over the number of experts, beside peft and the forms of MoE-PEFT.

    python benchmarks/experts.py [--counts 4 8 16 32] [--reps 5] [--threads 1] [--json]

MiniLM on 8 rows of 64 tokens, experts of rank 8 on every linear, fp32; see `train_step` for the ways. ``peft`` has as
many ranks as all experts together. ``mola`` and ``molehill`` choose two experts of a token, ``loramoe`` and ``molehill
dense`` weigh all. Peak memory is left to `train_step`.
"""

from __future__ import annotations

from common import alternate, clock_for, tell

# Above torch, since common sets the number of threads.
# isort: split

import argparse
import warnings

import torch
import transformers
from train_step import STEPS, setting

WAYS = ("base", "peft", "mola", "loramoe", "molehill", "molehill dense")


def measure(experts: int, reps: int, threads: int) -> dict[str, float]:
    """Milliseconds of a step of every way."""
    steps = {way: STEPS[way](setting("minilm", "fp32", quick=True, experts=experts)) for way in WAYS}
    return {way: 1e3 * seconds for way, seconds in alternate(steps, reps, clock_for(threads)).items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    found = {count: measure(count, options.reps, options.threads) for count in options.counts}
    title = "One step of MiniLM in fp32, ms, over the number of experts"
    tell(found, title, "experts", as_json=options.json, shared=False)


if __name__ == "__main__":
    main()
