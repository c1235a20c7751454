"""The files that a base model is: its config.json and its safetensors weights, and nothing that lies beside them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from molehill.errors import ModelError, first_line

CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_TEXTS = frozenset({".json", ".txt", ".model", ".jinja"})  # configuration and tokenizer
_BESIDE = frozenset({_ADAPTER})
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Keys of config.json that make transformers read other files, or compute something else than the model.
_ELSEWHERE = ("configuration_files", "transformers_weights", "fusion_config")
# Keys of config.json that change nothing that the model computes from tokens, as it runs here.
_COSMETIC = frozenset({
    "_attn_implementation", "_name_or_path", "architectures", "attn_implementation", "auto_map",
    "chunk_size_feed_forward", "dtype", "finetuning_task", "id2label", "label2id", "name_or_path", "num_labels",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict", "task_specific_params",
    "torch_dtype", "torchscript", "transformers_version", "use_cache",
})  # fmt: skip
_QUANTISED = ("quantization_config", "compression_config")
# Last parts of the names that quantisers give to their tensors.
_PACKED = frozenset({
    "SCB", "absmax", "nested_absmax", "quant_map", "qweight", "qzeros", "weight_packed", "weight_scale",
    "weight_scale_inv", "weight_zero_point",
})  # fmt: skip
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_NUMBERS = _FLOATS | {"I64", "I32", "I16", "I8", "U8", "BOOL"}


class Place(NamedTuple):
    """Where a stored tensor lies.

    Attributes:
        path: Its file.
        start: First byte.
        stop: One past the last byte.
        dtype: Type of its numbers, as safetensors call it.
        shape: Its shape.
    """

    path: Path
    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A base model on this disk.

    Attributes:
        folder: Where it is.
        origin: What the user called it.
        settings: The content of its config.json.
        files: Its weights, in the order of their names.
    """

    folder: Path
    origin: str
    settings: Mapping[str, Any]
    files: tuple[Path, ...]

    def tensors(self) -> dict[str, Any]:
        """Every stored tensor by name, to be read when it is sliced.

        Raises:
            ModelError: A file is damaged, or two hold a tensor of the same name.
        """
        found: dict[str, Any] = {}
        for path in self.files:
            try:
                stream: Any = safe_open(path, framework="pt")
                held = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118  (no dictionary)
            except (OSError, SafetensorError) as error:
                raise cannot_load("model", error, self.origin) from None
            twice = found.keys() & held.keys()
            if twice:
                raise ModelError(
                    f"{min(twice)} is in {path.name} and in another file: the weights of two models lie here",
                    where=self.origin,
                    mend="Save or download the model into an empty folder.",
                )
            found |= held
        return found

    def whole_numbers(self) -> dict[str, str]:
        """The types of the tensors that are stored as whole numbers, such as masks and quantised weights, by name."""
        kinds = {name: stretch.get_dtype() for name, stretch in self.tensors().items()}
        return {name: kind for name, kind in kinds.items() if kind not in _FLOATS}

    @contextmanager
    def alone(self) -> Iterator[Path]:
        """A folder that holds nothing but the base and its tokenizer, for libraries that look around in folders."""
        with tempfile.TemporaryDirectory(prefix="molehill-base-") as name:
            kept = [path for path in self.folder.iterdir() if path.suffix in _TEXTS and path.name not in _BESIDE]
            for path in (*kept, *self.files):
                (Path(name) / path.name).symlink_to(path.resolve())
            if {path.name for path in self.files} == {_WEIGHTS}:
                (Path(name) / _INDEX).unlink(missing_ok=True)
            yield Path(name)

    def places(self) -> dict[str, Place]:
        """Where every stored tensor lies, by name."""
        found: dict[str, Place] = {}
        for path in self.files:
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = Place(path, begin, end, entry["dtype"], tuple(entry["shape"]))
        return found

    def digest(self, *, settings: bool = True) -> str:
        """SHA-256 (hex) over the settings that shape the model and the tensors, in the order of their names.

        Args:
            settings: False leaves them out, as adapters of format 1 do.
        """
        total = hashlib.sha256(json.dumps(_shaping(self.settings), sort_keys=True).encode() if settings else b"")
        for name, place in sorted(self.places().items()):
            total.update(json.dumps([name, place.dtype, place.shape]).encode())
            with place.path.open("rb") as stream:
                stream.seek(place.start)
                left = place.stop - place.start
                while left:
                    chunk = stream.read(min(left, 1 << 20))
                    total.update(chunk)
                    left -= len(chunk)
        return total.hexdigest()


def look_up(folder: Path, origin: str) -> Stored:
    """Find the files of a base in a folder.

    Args:
        folder: A saved model.
        origin: What to call it in errors.

    Raises:
        ModelError: There is no configuration, there are no safetensors weights, or they are quantised.
    """
    settings = _settings(folder, origin)
    stored = Stored(folder, origin, settings, tuple(_weight_files(folder, origin)))
    _refuse_quantised(stored)
    return stored


def is_whole(folder: Path) -> bool:
    """Whether a folder has a configuration and all files of its weights."""
    try:
        return bool(_weight_files(folder, "")) and (folder / CONFIG).is_file()
    except ModelError:
        return False


def cannot_load(part: str, error: Exception, origin: str) -> ModelError:
    """What to tell about an error of a library."""
    return ModelError(
        f"the {part} cannot be loaded: {first_line(error)}",
        where=origin,
        mend="Check that the model is complete and supported.",
    )


def end_tokens(folder: Path, origin: str) -> list[int]:
    """The tokens that end a text according to generation_config.json; nothing else there concerns a base.

    Raises:
        ModelError: The file is damaged.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    found = _json(path, origin).get("eos_token_id")
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) for token in tokens):
        raise ModelError("eos_token_id is no token id", where=f"{origin}, {path.name}", mend="Mend or remove the file.")
    return tokens


def _shaping(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _shaping(part) for key, part in value.items() if key not in _COSMETIC}
    return [_shaping(part) for part in value] if isinstance(value, list) else value


def _json(path: Path, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is damaged", where=origin, mend="Save or download the model anew.")
    return value


def _settings(folder: Path, origin: str) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        if (folder / _ADAPTER).is_file():
            raise ModelError(
                f"the folder holds an adapter ({_ADAPTER}) and no model",
                where=origin,
                mend="Give the model that the adapter was made for, or one with the adapter merged into its weights.",
            )
        raise ModelError("the folder has no config.json", where=origin, mend="Give the folder of a saved model.")
    settings = _json(folder / CONFIG, origin)
    for key in _ELSEWHERE:
        if settings.get(key) is not None:
            raise ModelError(
                f"{CONFIG} says {key}, so the model would be another than its configuration and weights",
                where=origin,
                mend=f"Remove {key}, if the model is right without it.",
            )
    return settings


def _weight_files(folder: Path, origin: str) -> list[Path]:
    names = {_WEIGHTS}
    if not (folder / _WEIGHTS).is_file() and (folder / _INDEX).is_file():
        try:
            names = {Path(name).name for name in _json(folder / _INDEX, origin)["weight_map"].values()}
        except (KeyError, TypeError, AttributeError):
            raise ModelError(f"{_INDEX} is damaged", where=origin, mend="Save or download the model anew.") from None
    lacking = sorted(name for name in names if not (folder / name).is_file())
    if not lacking:
        return [folder / name for name in sorted(names)]
    if lacking == [_WEIGHTS] and any(any(folder.glob(pattern)) for pattern in _PICKLES):
        raise ModelError(
            "the weights are pickles, which can run code when they are opened",
            where=origin,
            mend="Convert them: load the model where you trust it and call save_pretrained.",
        )
    raise ModelError(f"{lacking[0]} is missing", where=origin, mend="Save or download the model anew.")


def _refuse_quantised(stored: Stored) -> None:
    parts = [stored.settings, *(part for part in stored.settings.values() if isinstance(part, dict))]
    told = [part[key] for part in parts for key in _QUANTISED if part.get(key) is not None]
    methods = [str(said.get("quant_method") or "") if isinstance(said, dict) else "" for said in told]
    if not told:
        for name, stretch in stored.tensors().items():
            kind = stretch.get_dtype()
            if kind not in _NUMBERS or name.rpartition(".")[2] in _PACKED:
                told, methods = [name], [f"{name} is stored as {kind}"]
                break
    if told:
        how = f" ({methods[0]})" if methods[0] else ""
        raise ModelError(
            f"the base is quantised{how}; experts are trained on weights in full precision",
            where=stored.origin,
            mend="Give the full-precision checkpoint it was made of.",
        )
