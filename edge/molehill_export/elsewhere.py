"""One expert, or a gate as a fixed mixture, as a folder that peft or Transformers opens by itself.

For Transformers it is a whole model, with the experts in its weights.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from molehill import files
from molehill.errors import ConfigError, DeployError
from molehill.molora.adapter import Manifest
from molehill.molora.head import Head
from molehill.molora.model import MoLoRAModel
from molehill.molora.peft_folder import write_peft
from molehill.molora.unwrap import unwrapped
from molehill.tasks.base_model import quiet
from molehill.tensors import write as write_tensors
from molehill_export.as_one import as_chosen, as_peft, by_routes, fold
from molehill_export.static import Fixed, fix_gate
from molehill_simulation.source import GLOBAL, Source

_TYPES = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TEXTS = {".json", ".txt", ".model", ".jinja"}  # of a tokenizer
_SMALL = 4 << 20  # bytes: configurations and headers
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Wanted:
    """What is to be written.

    Attributes:
        expert: Its id; None for the mixture of a gate.
        gate: Whose gate and head, as for `Source.client`; None for those that all share.
        merged: A whole model, in place of an adapter.
        float32: Its numbers in float32, whatever those of the base are.
        rows: Labelled rows to take a mixture's mean over; None for those of a simulation, or the public texts.
        force: Also a mixture that differs much from the routed model.
    """

    expert: str | None = None
    gate: str | None = None
    merged: bool = False
    float32: bool = False
    rows: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        opens: Name of the class that opens it.
        base: Where it looks for its base, a hub id or a folder; empty for a whole model.
        dtype: Type of its numbers.
        rank: The largest of a LoRA, which servers must be told; None for what has none.
        fixed: How the experts are weighed; None for one expert.
        size: Bytes of the folder.
    """

    opens: str
    base: str
    dtype: str
    rank: int | None
    fixed: Fixed | None
    size: int


def write_elsewhere(
    source: Source, out: Path, wanted: Wanted, *, progress: Callable[[str], None] = lambda _: None
) -> Written:
    """Write a folder, whole or not at all.

    Args:
        source: The run or adapter. After a whole model was written, or was begun, it is of no further use.
        out: A folder, which must not exist, or be empty.
        wanted: What is to be in it.
        progress: Told what is done next.

    Raises:
        BundleError: A fixed mixture differs too much from the routed model.
        ConfigError: What is wanted makes no sense for the run.
        DeployError: There is no room for it.
        ModelError: The other library has no such experts, or the base cannot have them in its weights.
        OSError: The disk is full all the same, or fails.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("there is something already", where=str(out), mend="Choose another --out.")
    model = source.model
    if wanted.expert is None and wanted.gate is None and len(model.experts) > 1:
        names = ", ".join(each for each in model.experts if not each.startswith("shared"))
        mend = f"Name one ({names}), or give --as CLIENT|global for the mean weights of a gate."
        raise ConfigError("which experts is not said", mend=mend)
    if wanted.expert is not None and wanted.expert not in model.experts:
        raise ConfigError(f"there is no expert {wanted.expert!r}", mend=f"There are {', '.join(model.experts)}.")
    gate = wanted.gate or _any_gate(source)
    fixed = None
    if wanted.expert is not None or len(model.experts) == 1:
        weights = as_chosen(model, wanted.expert or model.experts[0])
    else:
        progress("Weighing the experts")
        fixed = fix_gate(source, gate, wanted.rows)
        if not wanted.force:
            fixed.require(gate, "Take one expert, export a bundle, which routes, or insist with --force.")
        weights = by_routes(model, fixed.weights)
    files.make_folder(out.parent)
    with files.placed(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        progress("Writing")
        with source.gate(gate) if wanted.gate else contextlib.nullcontext():  # it may have experts of its own
            if wanted.merged:
                base, dtype, rank = "", _dtype(source, wanted), None
                _require_room(out, _size(model, dtype) + _beside(source))
                fold(model, weights)
                _write_model(source, folder, dtype)
            else:
                base, dtype = _place(source), torch.float32
                rank = _write_adapter(source, folder, weights, out)
        source.tokenizer.save_pretrained(folder)
        opens = _opens(source, merged=wanted.merged)
        with source.gate(gate):
            if model.head is not None:
                _write_head(folder, model.head, source.adapter)
        files.write(folder / "README.md", _readme(source, wanted, opens, fixed).encode())
        size = sum(path.stat().st_size for path in folder.iterdir())
        if out.exists():
            out.rmdir()
        folder.rename(out)
    return Written(opens, base, str(dtype).removeprefix("torch."), rank, fixed, size)


def _any_gate(source: Source) -> str:
    """A gate to be with where an expert answers alone: the shared one, or a client's where no head goes with it.

    Raises:
        ConfigError: There is none, or a head of one client's has to be chosen.
    """
    try:
        with source.gate(GLOBAL):
            return GLOBAL
    except ConfigError:
        names = source.clients()
        if source.model.head is not None or not names:
            raise
        return names[0]


def _place(source: Source) -> str:
    """Where other libraries find the base."""
    named = source.base.id.startswith(("local:", "sample:"))
    return str(source.stored.folder.resolve()) if named else source.base.id


def _opens(source: Source, *, merged: bool) -> str:
    if source.model.head is None:
        return "AutoModelForCausalLM" if merged else "AutoPeftModelForCausalLM"
    return "AutoModel" if merged else "AutoPeftModelForFeatureExtraction"


def _write_adapter(source: Source, folder: Path, weights: Mapping[str, Tensor], out: Path) -> int | None:
    """Write the adapter; returns its rank, if it has one."""
    model = source.model
    method, tensors = as_peft(model, weights)
    size = sum(value.nbytes for site in tensors.values() for value in site.values())
    _require_room(out, size + _beside(source))
    place = _place(source)
    write_peft(
        folder, method, tensors, (place, source.base.revision if place == source.base.id else None),
        task="CAUSAL_LM" if model.head is None else "FEATURE_EXTRACTION",
        conv=any(isinstance(model.sites[name].base, Conv1D) for name in tensors),
    )  # fmt: skip
    return max((len(site["A"]) for site in tensors.values() if "A" in site), default=None)


def _write_model(source: Source, folder: Path, dtype: torch.dtype) -> None:
    """Save the base as it is now, as its own files say it: our training switched its cache off, and pads."""
    with quiet(), unwrapped(source.model) as base:
        base.to(dtype)
        said: Any = transformers.AutoConfig.from_pretrained(source.stored.folder, trust_remote_code=False)
        if type(said) is not type(base.config):
            said = said.get_text_config()
        for part, before in ((base.config, said), (base.config.get_text_config(), said.get_text_config())):
            part.use_cache, part.pad_token_id = getattr(before, "use_cache", None), before.pad_token_id
        base.save_pretrained(folder)
    if source.model.head is None:
        theirs = source.stored.folder / _GENERATION
        path = theirs if theirs.is_file() else folder / _GENERATION
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        settings |= {"eos_token_id": source.ends()}  # an answer ends as it was trained to
        files.write(folder / _GENERATION, (json.dumps(settings, indent=2) + "\n").encode())


def _write_head(folder: Path, head: Head, adapter: Manifest) -> None:
    """The head, which Transformers has no class for: one layer over pooled states."""
    values = {"weight": head.weight, "bias": head.bias}
    if head.residual and head.personal:
        values = {name: value + head.residual[name] for name, value in values.items()}
    arrays = {name: np.ascontiguousarray(value.detach().numpy()) for name, value in values.items()}
    write_tensors(folder / "head.safetensors", arrays, {})
    said: dict[str, Any] = {"labels": list(adapter.labels), "pooling": head.pooling}
    if adapter.range is not None:
        said["range"] = list(adapter.range)
    files.write(folder / "head.json", (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode())


def _dtype(source: Source, wanted: Wanted) -> torch.dtype:
    """The type that all of the base's own numbers have, or float32."""
    found = {_TYPES[place.dtype] for place in source.stored.places().values() if place.dtype in _TYPES}
    return found.pop() if len(found) == 1 and not wanted.float32 else torch.float32


def _size(model: MoLoRAModel, dtype: torch.dtype) -> int:
    with unwrapped(model) as base:
        return int(sum(math.prod(each.shape) for each in base.parameters()) * dtype.itemsize)


def _beside(source: Source) -> int:
    """Bytes of tokenizer and configuration, about."""
    texts = (path for path in source.stored.folder.iterdir() if path.suffix in _TEXTS and path.is_file())
    return _SMALL + sum(path.stat().st_size for path in texts)


def _require_room(out: Path, size: int) -> None:
    files.require_room("the folder", (out.parent, size), kind=DeployError, mend="Make room, or write to another disk.")


_WRITES = """\
```python
import torch
from {library} import {opens}
from transformers import AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {opens}.from_pretrained(folder).eval()
batch = tokenizer("is it good", return_tensors="pt")
with torch.no_grad():
    logits = model(**batch).logits
```
"""
_CLASSIFIES = """\
```python
import torch
from {library} import {opens}
from safetensors.torch import load_file
from transformers import AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {opens}.from_pretrained(folder).eval()
head = load_file(f"{{folder}}/head.safetensors")  # head.json says what its numbers are: of labels, or where in a range
texts = ["It was good."]
batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length={longest})
with torch.no_grad():
    states = model(**batch).last_hidden_state.float()
{pooled}
logits = pooled @ head["weight"].T + head["bias"]
```
"""
_POOLED = {
    "mean": 'mask = batch["attention_mask"].unsqueeze(-1)\npooled = (states * mask).sum(1) / mask.sum(1)',
    "cls": "pooled = states[:, 0]",
    "last": 'last = batch["attention_mask"].cumsum(1).argmax(1)\npooled = states[range(len(states)), last]',
    "token": "pooled = states  # the first token of a word speaks for it",
}


def _readme(source: Source, wanted: Wanted, opens: str, fixed: Fixed | None) -> str:
    """What it is, and how to open it."""
    head, library = source.model.head, "transformers" if wanted.merged else "peft"
    front = ["---", f"library_name: {library}", "tags: [molehill]"]
    if _place(source) == source.base.id:
        front.append(f"base_model: {source.base.id}")
    who = f"Expert {wanted.expert or source.model.experts[0]} of the run {source.name}"
    if fixed is not None:
        who = f"All experts of the run {source.name} at the mean weights of gate {wanted.gate}"
    said = [f"{who}, on the base {source.base.id} (SHA-256 {source.base.digest})."]
    if fixed is not None and not fixed.exact:
        said.append(
            f"The run chooses experts token by token; here all tokens get the mean weights of {fixed.texts} texts. "
            f"The likeliest answer is that of the run in {fixed.agreement:.1%}, the relative logit error "
            f"{fixed.error:.1e}."
        )
    if head is None:
        code = _WRITES.format(library=library, opens=opens)
    else:
        pooled, longest = _POOLED[head.pooling], source.task.max_length
        code = _CLASSIFIES.format(library=library, opens=opens, pooled=pooled, longest=longest)
    return "\n".join([*front, "---", "", f"# {source.name}", "", *said, "", code])
