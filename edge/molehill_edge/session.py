"""Opening a checked graph in ONNX Runtime, within the device's threads and memory."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from molehill.errors import BundleError
from molehill_edge import manifest as manifests
from molehill_edge.pool import Pool
from molehill_protos.v1.bundle_pb2 import Manifest

Array = np.ndarray[Any, Any]

_MEGABYTE = 1 << 20
_BEYOND_FILES = 100 * _MEGABYTE  # Python, ONNX Runtime and one text
_FATAL_ONLY = 4  # errors come back as exceptions


def estimate(folder: Path, manifest: Manifest) -> int:
    """Bytes of memory that a bundle may take.

    Twice its graph and tensors, since kernels keep copies; the cache of one conversation; and 100 MB.
    """
    names = {manifests.TOKENIZER, manifests.NAME}
    sizes = [(folder / file.path).stat().st_size for file in manifest.files if file.path not in names]
    shape = manifest.task.generation
    cache = 2 * 4 * shape.layers * shape.heads * shape.head_dim * manifest.task.max_length
    return 2 * sum(sizes) + cache + _BEYOND_FILES


def value(array: Array) -> ort.OrtValue:
    """An array as ONNX Runtime sees it, without a copy: the array must live as long."""
    return ort.OrtValue.ortvalue_from_numpy(array)


class Session:
    """One graph, opened once, closed, and opened again with other experts.

    Calls may come from several threads; while the graph is exchanged they wait.

    Args:
        folder: A folder whose files were all checked.
        manifest: Of that folder.
        pool: Threads within one operator.
        memory_mb: Memory that the bundle may take; no limit when None.

    Raises:
        BundleError: The bundle needs more memory than that, or ONNX Runtime refuses the graph.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, pool: Pool, memory_mb: int | None) -> None:
        self.folder = folder
        self.pool = pool
        self._limit = None if memory_mb is None else memory_mb * _MEGABYTE
        self._running = 0
        self._waiting = 0  # changes; calls that begin give way to them
        self._free = threading.Condition()
        self._graph: ort.InferenceSession | None = None
        self._bindings: weakref.WeakKeyDictionary[object, ort.IOBinding] = weakref.WeakKeyDictionary()
        needed = estimate(folder, manifest)
        if self._limit is not None and needed > self._limit:
            raise BundleError(
                f"the bundle may take {needed // _MEGABYTE} MB, more than the {memory_mb} MB allowed",
                where=str(folder),
                mend="Allow more memory, or export it with fewer experts or as int4.",
            )
        self._spare = None if self._limit is None else self._limit - needed + _BEYOND_FILES // 2
        self._graph = self._open(folder)
        self.inputs = {item.name: item.shape for item in self._graph.get_inputs()}
        self.outputs = [item.name for item in self._graph.get_outputs()]
        self.overridable = {item.name for item in self._graph.get_overridable_initializers()}

    def _open(self, folder: Path) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        self.pool.apply(options)
        if self._spare is not None:
            _share_arena(self._spare)
            options.add_session_config_entry("session.use_env_allocators", "1")
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        try:
            return ort.InferenceSession(folder / manifests.GRAPH, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  # ONNX Runtime raises a class of its own for each of its codes
            raise BundleError(f"ONNX Runtime cannot open the graph: {_first(error)}", where=str(folder)) from None

    @contextmanager
    def use(self) -> Iterator[ort.InferenceSession]:
        """Hold the graph for one call, during which neither it nor the experts change; not from within another call.

        Raises:
            BundleError: The session was closed, or ONNX Runtime cannot compute it (for example for lack of memory).
        """
        with self._free:
            self._free.wait_for(lambda: self._waiting == 0)
            if self._graph is None:
                raise BundleError("the bundle was closed", where=str(self.folder))
            self._running += 1
            graph = self._graph
        try:
            yield graph
        except (BundleError, KeyboardInterrupt, GeneratorExit):
            raise
        except MemoryError:
            raise BundleError("not enough memory for this input", mend="Give a shorter text.") from None
        except Exception as error:  # as above
            if not type(error).__module__.startswith("onnxruntime") and not isinstance(error, RuntimeError):
                raise
            text = str(error)
            if "memory" in text.lower() or "alloc" in text.lower():
                mend = "Give a shorter text, or allow more memory."
                raise BundleError("not enough memory for this input", where=str(self.folder), mend=mend) from None
            raise BundleError(f"ONNX Runtime cannot compute it: {_first(error)}", where=str(self.folder)) from None
        finally:
            del graph
            with self._free:
                self._running -= 1
                self._free.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no call runs, and keep others waiting: for changes of what they compute with. May be nested."""
        with self._free:
            self._waiting += 1
            try:
                self._free.wait_for(lambda: self._running == 0)
                yield
            finally:
                self._waiting -= 1
                self._free.notify_all()

    def binding(self, owner: object, graph: ort.InferenceSession) -> tuple[ort.IOBinding, bool]:
        """The owner's lasting inputs and outputs of the graph, and whether they are new: none are bound yet."""
        found = self._bindings.get(owner)
        if found is not None:
            return found, False
        made = graph.io_binding()
        self._bindings[owner] = made
        return made, True

    def unbind(self, owner: object) -> None:
        """Drop an owner's binding."""
        self._bindings.pop(owner, None)

    def exchange(self, folder: Path) -> None:
        """Open the graph of another folder in place of this one; two at once would take twice the memory.

        Args:
            folder: Like this one, with other experts.

        Raises:
            BundleError: It cannot be opened; this one is open again.
        """
        with self.alone():
            if self._graph is None:
                raise BundleError("the bundle was closed", where=str(self.folder))
            self._graph = None
            self._bindings.clear()  # they would keep the graph in memory
            gc.collect()
            try:
                self._graph = self._open(folder)
            except BaseException:
                self._graph = self._open(self.folder)
                raise
            self.folder = folder

    def close(self) -> None:
        """Free the graph once no call uses it."""
        with self.alone():
            self._graph = None
            self._bindings.clear()


def _share_arena(size: int) -> None:
    """Let all sessions of this process that ask for it draw their working memory from one limited arena."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    configuration = ort.OrtArenaCfg({"max_mem": size, "arena_extend_strategy": 1})
    ort.create_and_register_allocator(memory, configuration)


def _first(error: Exception) -> str:
    """The first line of what ONNX Runtime says, without its prefix."""
    lines = str(error).strip().splitlines()
    return lines[0].rpartition(" : ")[2][:300] if lines else type(error).__name__
