"""What is known of a base's way to devices before it is trained; only the export itself is sure."""

from __future__ import annotations

from typing import Any

# Families whose graphs are compared with torch by the tests; any other may work as well.
_WRITES = {
    "bloom", "falcon", "gemma", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmoe", "opt", "phi", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
}  # fmt: skip
_READS = {
    "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "gpt2", "llama", "mpnet", "roberta",
    "xlm-roberta",
}  # fmt: skip


def window(settings: Any) -> int | None:
    """How many tokens back attention reaches; None when it reaches all.

    Args:
        settings: Configuration of the language model.
    """
    size = getattr(settings, "sliding_window", None)
    layers = getattr(settings, "layer_types", None)
    slides = getattr(settings, "use_sliding_window", True) and (layers is None or "sliding_attention" in layers)
    longest = getattr(settings, "max_position_embeddings", None)
    return int(size) if size and slides and (longest is None or size < longest) else None


def slides(settings: Any) -> bool:
    """Whether a causal LM cannot be exported because its attention slides over a window."""
    return window(settings) is not None and settings.model_type != "mistral"


def remark(settings: Any, *, writes: bool) -> str | None:
    """A sentence for who trains a base whose export to devices is impossible or not known to work; else None.

    Args:
        settings: Configuration of the language model.
        writes: Whether it is trained as a causal LM.
    """
    kind = str(settings.model_type)
    if writes and slides(settings):
        return f"{kind} cannot be exported to devices: its attention slides over a window"
    if kind not in (_WRITES if writes else _READS) or getattr(settings, "alibi", False):
        return (
            f"whether {kind} can be exported to devices is not known; before a long run, try `molehill export` on "
            "one of a single round"
        )
    return None
