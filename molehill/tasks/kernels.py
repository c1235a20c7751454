"""Which kernels are fastest on this machine: measured once per machine and width of a model, in tenths of a second.

All choices compute the same function; they differ in rounding and in time. fp32 products go through MKL or through
oneDNN, whichever is faster here: MKL is slow on some processors, and oneDNN counts only where its products are as exact
(on processors with bf16 tiles they are not). bf16 halves the time where the processor has instructions for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from molehill import files
from molehill.cache import cache_folder
from molehill.molora.attention import attend
from molehill.molora.fused import Output, down, up

Precision = Literal["fp32", "bf16"]
Products = Literal["mkl", "onednn"]

_ONEDNN: Any = torch.backends.mkldnn  # untyped
_WIDEST, _ROWS = 512, 512  # a larger product takes longer and tells the same
_TRIES = 3
_TURNS, _SECONDS = 5, 0.15  # of measuring, whichever comes first
_GAIN = 0.9  # another kernel than torch's own has to earn this much
_BF16_GAIN = 0.75  # what is computed around the products does not get faster
_FULL = 0.95  # of the best throughput, with which we are content
_SWITCH: dict[Products, str] = {"mkl": "none", "onednn": "bf16"}
_COMPANIES = (1, 2, 4, 8)
_ERROR = 4.0  # times the rounding of MKL that a product in fp32 may have

_log = logging.getLogger(__name__)


class Kernels(NamedTuple):
    """How a model is computed.

    Attributes:
        precision: Type of the frozen weights and of what they compute.
        products: What multiplies float32 matrices on the CPU.
        why: The reason in words, with what was measured.
        attention: Whose it is: ``torch``, or ``products`` of matrices (`molehill.molora.attention`).
    """

    precision: Precision
    products: Products
    why: str
    attention: Literal["torch", "products"] = "torch"


class Company(NamedTuple):
    """How many clients are trained in the same passes.

    Attributes:
        clients: Above this many hardly anything is gained.
        why: What was measured, in words.
    """

    clients: int
    why: str


def choose(precision: Literal["auto"] | Precision, device: torch.device, width: int) -> Kernels:
    """The kernels for a model.

    Args:
        precision: What the configuration says.
        device: Where the model is.
        width: Features of its states.
    """
    asked = f"base.precision is {precision}"
    if device.type != "cpu":
        fast = device.type == "cuda" and bool(torch.cuda.is_bf16_supported(including_emulation=False))
        why = asked if precision != "auto" else f"{device.type} {'has' if fast else 'lacks'} products in bf16"
        return Kernels("bf16" if precision == "bf16" or (precision == "auto" and fast) else "fp32", "mkl", why)
    if precision == "bf16":
        return Kernels("bf16", "mkl", asked)
    times = _remembered(f"products {_class(width)}", lambda: _time_products(_class(width)))
    return decide(times, precision)


def decide(times: Mapping[str, float], precision: Literal["auto"] | Precision) -> Kernels:
    """The kernels, from milliseconds of a product by ``mkl``, ``onednn`` and ``bf16``; a way that is no choice lacks.

    Args:
        times: What was measured.
        precision: What the configuration says.
    """
    other = times.get("onednn")
    products: Products = "onednn" if other is not None and other < _GAIN * times["mkl"] else "mkl"
    half = times.get("bf16")
    fast = half is not None and half < _BF16_GAIN * times[products]
    measured = ", ".join(f"{name} {value:.2f} ms" for name, value in times.items())
    why = f"a product takes {measured}"
    return Kernels("bf16" if precision == "auto" and fast else "fp32", products, why)


def use(kernels: Kernels) -> None:
    """Multiply so in this process."""
    _switch(kernels.products)


def fast_attention(kernels: Kernels, tokens: int, ordered: bool) -> bool:
    """Whether attention by products is faster on this machine's processor than torch's own.

    Args:
        kernels: How the model is computed.
        tokens: Of the longest input.
        ordered: Whether tokens see only those before them.
    """
    key = f"attention {_class(tokens)} {ordered} {kernels[:2]}"
    with _multiplying(kernels.products):
        times = _remembered(key, lambda: _time_attention(kernels.precision, _class(tokens), ordered=ordered))
    return times["products"] < _GAIN * times["torch"]


def company(kernels: Kernels, width: int, tokens: int) -> Company:
    """How many clients are worth training in the same passes on this machine's processor.

    Args:
        kernels: How the model is computed.
        width: Features of its states.
        tokens: Of a client's batch.
    """
    size = _class(width), _class(tokens)
    with _multiplying(kernels.products):
        rates = _remembered(f"company {size} {kernels[:2]}", lambda: _time_companies(kernels.precision, *size))
    best = max(rates.values())
    clients = min(int(count) for count, rate in rates.items() if rate >= _FULL * best)
    gain = rates[str(clients)] / rates["1"]
    return Company(clients, f"{clients} clients in the same passes are {gain:.2f} times as fast as one after another")


def _class(width: int) -> int:
    """Widths that are measured alike: powers of two."""
    return min(_WIDEST, 1 << max(5, (width - 1).bit_length()))


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for products in bf16; elsewhere they are made of fp32, and slow."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@torch.no_grad()
def _time_products(width: int) -> dict[str, float]:
    """Milliseconds of a product and of its gradient for the input."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, width, generator=generator) for n in (_ROWS, width))

    def both(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight) @ weight

    def through(products: Products) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with _multiplying(products):
                return both(x, weight)

        return run

    ways: dict[str, Callable[[], Tensor]] = {"mkl": through("mkl")}
    if _ONEDNN.is_available() and _exact(x, weight):
        ways["onednn"] = through("onednn")
    if multiplies_bf16():
        half, low = x.bfloat16(), weight.bfloat16()
        ways["bf16"] = lambda: both(half, low)
    return {name: 1e3 * seconds for name, seconds in _least(ways).items()}


def _type(precision: Precision) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _time_attention(precision: Precision, tokens: int, *, ordered: bool) -> dict[str, float]:
    """Seconds of an attention's pass forward and backward."""
    shape = (1, 2, tokens, 64)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(_type(precision)).requires_grad_() for _ in range(3))

    def through(form: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            out = form()
            torch.autograd.grad(out, (q, k, v), out.detach())

        return run

    return _least(
        {
            "torch": through(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=ordered)),
            "products": through(lambda: attend(q, k, v, None, 0.125, ordered=ordered)),
        }
    )


def _exact(x: Tensor, weight: Tensor) -> bool:
    """Whether products through oneDNN are as exact as MKL's: wide, thin, and of several clients at once."""
    kinds = [(x, weight), (x, weight[:, :16]), (x.view(4, -1, x.shape[1]), weight.expand(4, -1, -1))]

    def errors(products: Products) -> list[float]:
        with _multiplying(products):
            return [float((a @ b - a.double() @ b.double()).norm()) for a, b in kinds]

    return all(found <= _ERROR * usual for found, usual in zip(errors("onednn"), errors("mkl"), strict=True))


def _time_companies(precision: Precision, width: int, tokens: int) -> dict[str, float]:
    """Clients a second whose step of an adapted linear is computed, by how many are in one."""
    dtype = _type(precision)
    generator = torch.Generator().manual_seed(0)
    W, spread = torch.randn(width, width, generator=generator).to(dtype), torch.eye(4).repeat_interleave(4, 1)

    def step(x: Tensor, A: Tensor, gate: Tensor, Bt: Tensor) -> None:
        projection = down(x, [A], [gate])
        (y,) = up(x, projection, [Output(W, None, projection.logits.softmax(-1), Bt, spread)])
        y.backward(y.detach())  # type: ignore[no-untyped-call]  # untyped torch

    def of(clients: int) -> Callable[[], None]:
        x = torch.randn(clients * tokens, width, generator=generator).to(dtype).requires_grad_()
        lead = (clients,) if clients > 1 else ()
        parts = [torch.randn(*lead, n, width, generator=generator).requires_grad_() for n in (16, 4, 16)]
        return partial(step, x, *parts)

    for _ in range(_TRIES):
        seconds = _least({str(n): of(n) for n in _COMPANIES})
        rates = {count: int(count) / spent for count, spent in seconds.items()}
        if all(rate <= int(count) * rates["1"] for count, rate in rates.items()):  # else something else ran meanwhile
            break
    return {count: min(rate, int(count) * rates["1"]) for count, rate in rates.items()}


def _least(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Least seconds of every call, taken in turns after one to warm up: what else runs here only makes them longer."""
    found = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + _SECONDS
    for turn in range(_TURNS + 1):
        if turn > 1 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                found[name] = min(found[name], time.perf_counter() - start)
    return found


@contextlib.contextmanager
def _multiplying(products: Products) -> Iterator[None]:
    """Multiply so for a while."""
    before = _ONEDNN.matmul.fp32_precision
    _switch(products)
    try:
        yield
    finally:
        _ONEDNN.matmul.fp32_precision = before


def _switch(products: Products) -> None:
    # A processor without bf16 tiles computes in float32 all the same, but through oneDNN.
    _ONEDNN.matmul.fp32_precision = _SWITCH[products]


_KNOWN: dict[str, dict[str, float]] = {}  # by path of the file that keeps it


def measured() -> dict[str, dict[str, float]]:
    """All that this process goes by, for processes that are to choose alike."""
    return dict(_KNOWN)


def learn(found: Mapping[str, dict[str, float]]) -> None:
    """Go by what another process of this machine has measured."""
    _KNOWN.update(found)


def _remembered(what: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What was measured on this machine before, else now, on one thread; all processes of a machine choose alike."""
    machine = [platform.machine(), processor(), torch.__version__, what]
    name = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:24]
    path = cache_folder() / "kernels" / f"{name}.json"
    known = _KNOWN.get(str(path)) or _read(path)
    if known is None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            known = measure()
        finally:
            torch.set_num_threads(threads)
        known = _kept(path, known)
    _KNOWN[str(path)] = known
    return known


def _kept(path: Path, found: dict[str, float]) -> dict[str, float]:
    """Keep what was measured, unless another process was faster: then what that one did."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and _read(path) is None:
            path.unlink()  # it is damaged
        files.write(path, json.dumps(found).encode(), replace=False)
    except OSError as error:
        _log.debug("what was measured is not kept: %s", error)
    return _read(path) or found


def _read(path: Path) -> dict[str, float] | None:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        known = {str(key): float(value) for key, value in json.loads(path.read_bytes()).items()}
        if known and min(known.values()) > 0:
            return known
    return None


def processor() -> str:
    """Name of the processor."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123  (a context of two)
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()
