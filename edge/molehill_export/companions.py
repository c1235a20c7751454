"""What lies beside the graph of a bundle: its tokenizer and the configuration of onnxruntime-genai."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from molehill.tasks.kind import kind_of
from molehill_edge.manifest import GRAPH, TOKENIZER
from molehill_export.base import GENAI
from molehill_export.graph import Graph
from molehill_protos.v1 import bundle_pb2 as pb
from molehill_simulation.source import Source

_TOKENIZER_CONFIG = "tokenizer_config.json"


def write(source: Source, graph: Graph, manifest: pb.Manifest, folder: Path) -> None:
    """Write the tokenizer and, for a causal LM, what onnxruntime-genai wants beside it.

    Args:
        source: What is exported.
        graph: The bundle's.
        manifest: Of the bundle.
        folder: The bundle.
    """
    tokenizer = Tokenizer.from_str(source.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    (folder / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    if not kind_of(source.task).writes:
        return
    special = {name: getattr(source.tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **{name: token for name, token in special.items() if token}}
    if manifest.task.generation.template:
        about["chat_template"] = manifest.task.generation.chat_template
    _json(folder / _TOKENIZER_CONFIG, about)
    _json(folder / GENAI, _genai(manifest.task, source, graph))


def _genai(task: pb.Task, source: Source, graph: Graph) -> Mapping[str, Any]:
    """Configuration of onnxruntime-genai: the builder's, or one like it for a traced graph."""
    generation = task.generation
    settings = source.text
    found = copy.deepcopy(graph.genai)
    if found is None:
        names = {
            "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"
        }  # fmt: skip
        found = {
            "model": {
                "type": "decoder", "context_length": task.max_length, "vocab_size": generation.vocabulary,
                "bos_token_id": source.tokenizer.bos_token_id or 0,
                "decoder": {
                    "session_options": {"provider_options": []}, "head_size": generation.head_dim,
                    "hidden_size": settings.hidden_size, "num_attention_heads": settings.num_attention_heads,
                    "num_hidden_layers": generation.layers, "num_key_value_heads": generation.heads,
                    "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **names},
                    "outputs": {
                        "logits": "logits", "present_key_names": "present.%d.key",
                        "present_value_names": "present.%d.value",
                    },
                },
            },
            "search": {"max_length": task.max_length, "past_present_share_buffer": False, "do_sample": False},
        }  # fmt: skip
    found["model"]["decoder"]["filename"] = GRAPH
    found["model"]["eos_token_id"] = list(generation.eos)
    found["model"]["pad_token_id"] = generation.pad
    found["search"]["max_length"] = task.max_length
    return found


def _json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
