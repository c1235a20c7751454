"""Named methods: every published method is one small registered object.

A method belongs to an *axis* (selector, codec, space, ...). The packages that hold an axis are declared as entry
points (group ``molehill.methods``, name ``<axis>``, value ``<package>``), so another distribution can add methods
without touching this one and the order of imports never matters: asking for an axis imports its packages. Methods that
are classes derive from the one that our package of their axis names as ``INTERFACE``. What of ours cannot be imported
is an error; a plug-in that fails is named and left out.

    @register("selector", "top_k", params=TopKParams, paper="Shazeer et al. 2017", url="https://arxiv.org/abs/1701.06538")
    class TopK(nn.Module): ...

What is needed to know methods is here, and devices have it; `molehill.registry` builds them from a configuration.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar

from molehill import plugins
from molehill.errors import ConfigError
from molehill.extras import needs

_GROUP = "molehill.methods"
T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class NoParams:
    """Parameters of a method that has none."""


@dataclass(frozen=True)
class Method:
    """One registered method.

    Attributes:
        axis: The interface it implements, for example ``selector``.
        name: The name used in configurations.
        target: The class or function.
        params: Frozen dataclass of its parameters.
        paper: Authors, year and short title; ``house`` for a convention of ours.
        url: Where the paper (or its code) is; empty for ``house``.
        seeds: Codes of the systems in the project's list that this method stands for, for example ``("S20",)``.
        summary: First line of the target's docstring.
    """

    axis: str
    name: str
    target: Callable[..., Any]
    params: type[Any]
    paper: str
    url: str
    seeds: tuple[str, ...]
    summary: str


@dataclass
class _Registry:
    methods: dict[tuple[str, str], Method] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)
    left_out: dict[str, list[ConfigError]] = field(default_factory=dict)  # by axis


_registry = _Registry()


def register(
    axis: str,
    name: str,
    *,
    paper: str,
    url: str = "",
    seeds: tuple[str, ...] = (),
    params: type[Any] = NoParams,
) -> Callable[[T], T]:
    """Register the decorated class or function as ``axis``/``name``.

    Args:
        axis: Interface implemented.
        name: Name used in configurations; unique within the axis.
        paper: Authors, year and short title, or ``house``.
        url: Address of the paper or its code.
        seeds: Codes in the project's list of systems.
        params: Frozen dataclass that holds the parameters with defaults; the target takes one instance of it.

    Returns:
        The decorator; it returns its argument unchanged.

    Raises:
        ValueError: The name is taken by another object, or ``params`` is not a frozen dataclass.
        TypeError: The target is not what its axis needs; names the class to derive from.
    """
    if not (dataclasses.is_dataclass(params) and params.__dataclass_params__.frozen):  # type: ignore[attr-defined]  # dataclasses have it
        raise ValueError(f"{axis}/{name}: params must be a frozen dataclass")

    def decorate(target: T) -> T:
        known = _registry.methods.get((axis, name))
        origin = (target.__module__, target.__qualname__)
        if known is not None and (known.target.__module__, known.target.__qualname__) != origin:
            raise ValueError(f"{axis}/{name} is already registered by {known.target.__module__}")
        _fits(axis, name, target)
        summary = (target.__doc__ or "").strip().partition("\n")[0]
        _registry.methods[axis, name] = Method(axis, name, target, params, paper, url, seeds, summary)
        return target

    return decorate


def _fits(axis: str, name: str, target: object) -> None:
    package = _package(axis)
    wanted: type[Any] | None = getattr(package, "INTERFACE", None)
    if wanted is None:
        return  # its methods are functions, or it is an axis of others
    if not (isinstance(target, type) and issubclass(target, wanted)):
        raise TypeError(f"{axis}/{name} must be a class derived from {wanted.__module__}.{wanted.__qualname__}")
    if lacks := sorted(getattr(target, "__abstractmethods__", ())):
        raise TypeError(f"{axis}/{name} lacks {', '.join(lacks)}, see {wanted.__module__}.{wanted.__qualname__}")


def axes() -> list[str]:
    """Return the names of all declared axes, sorted."""
    return sorted({point.name for point in plugins.points(_GROUP)})


def meaning(axis: str) -> str:
    """What an axis is: the first line that its package says of itself."""
    return (getattr(_package(axis), "__doc__", None) or "").strip().partition("\n")[0]


def words(axis: str) -> tuple[str, ...]:
    """What else the field calls the methods of an axis (``WORDS`` of its package), so that a word of it leads there."""
    return getattr(_package(axis), "WORDS", ())


def _package(axis: str) -> ModuleType | None:
    """The package that says what an axis is: ours, else the first of others that could be imported."""
    for point in plugins.points(_GROUP):
        if point.name == axis:
            if plugins.ours(point):
                with needs("simulation"):
                    return importlib.import_module(point.value)
            if point.value in sys.modules:
                return sys.modules[point.value]
    return None


def load(axis: str) -> None:
    """Import every module of the packages that hold ``axis`` (once); a plug-in that fails is left out with a warning.

    Raises:
        ConfigError: A third-party module that ours need is not installed; names it, and the extra that brings it.
    """
    if axis in _registry.loaded:
        return
    for point in plugins.points(_GROUP):
        if point.name != axis:
            continue
        if plugins.ours(point):
            with needs("simulation"):
                _import(point.value)
            continue
        known = set(_registry.methods)
        try:
            _import(point.value)
        except plugins.FAILURES as error:
            _withdraw(point.value, known)
            told = plugins.broken(point, error)
            plugins.leave_out(told)
            _registry.left_out.setdefault(axis, []).append(told)
    _registry.loaded.add(axis)


def _import(name: str) -> None:
    """Import a package and every module in it."""
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), f"{package.__name__}."):
        importlib.import_module(module.name)


def _withdraw(package: str, known: set[tuple[str, str]]) -> None:
    """Take back what a plug-in registered before it failed: half of it may not be what its author meant."""
    top = package.partition(".")[0]
    for key, method in list(_registry.methods.items()):
        if key not in known and method.target.__module__.partition(".")[0] == top:
            del _registry.methods[key]


def methods(axis: str | None = None) -> Iterator[Method]:
    """Yield the registered methods of one axis, or of all that are declared, sorted by axis and name.

    Raises:
        ConfigError: There is no such axis.
    """
    wanted = [axis] if axis else axes()
    for each in wanted:
        load(each)
    keys = [key for key in sorted(_registry.methods) if key[0] in wanted]
    if axis and not keys and axis not in axes():
        raise ConfigError(f"there is no axis {axis!r}", mend=f"There are {', '.join(axes())}.")
    for key in keys:
        yield _registry.methods[key]


def get(axis: str, name: str) -> Method:
    """Return the method ``axis``/``name``.

    Raises:
        ConfigError: No such method; the message lists the nearest names.
    """
    load(axis)
    try:
        return _registry.methods[axis, name]
    except KeyError:
        names = sorted(each for of, each in _registry.methods if of == axis)
        near = difflib.get_close_matches(name, names, n=3) or names
        mend = f"Did you mean {', '.join(near)}? `molehill methods {axis}` lists all."
        if not near:
            mend = f"No {axis} is installed at all: install Molehill anew."
        for broken in _registry.left_out.get(axis, ()):
            mend += f" It may be of a plug-in that was left out: {broken}"
        raise ConfigError(f"unknown {axis} {name!r}", mend=mend) from None


def declared(method: Method, name: str) -> Any:
    """What a method says of itself, where no parameter decides it: an attribute of its class.

    Args:
        method: The method.
        name: The attribute; the interface has its default.
    """
    return getattr(method.target, name)


def those(axis: str, **declares: Any) -> str:
    """The methods that would do, as an advice names them: ``'a', 'b' or 'c'``.

    Args:
        axis: Their axis.
        **declares: What they say of themselves; see `declared`.
    """
    return either(
        method.name
        for method in methods(axis)
        if all(declared(method, name) == value for name, value in declares.items())
    )


def either(names: Iterable[str]) -> str:
    """Names in a sentence: ``'a', 'b' or 'c'``."""
    *most, last = [*map(repr, names)] or ["another that is registered"]
    return f"{', '.join(most)} or {last}" if most else last
