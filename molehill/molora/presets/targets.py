"""Module names that presets share: Llama-like decoders, BERT-like encoders and GPT-2."""

from __future__ import annotations

FFN = (r"(?:gate_proj|up_proj|down_proj|mlp\.c_fc|mlp\.c_proj|intermediate\.dense|(?<!attention\.)output\.dense)",)
"""Every linear of the feed-forward block."""

OUTPUTS = (r"(?:o_proj|down_proj|attn\.c_proj|mlp\.c_proj|output\.dense)",)
"""The last linears of attention and feed-forward block."""

KEY_VALUE_FFN_IN = (r"(?:k_proj|v_proj|up_proj|key|value|intermediate\.dense|c_attn|mlp\.c_fc)",)
"""Keys, values and the feed-forward block's hidden layer; GPT-2's ``c_attn`` makes queries too."""

QUERY_VALUE = (r"(?:q_proj|v_proj|query|value|c_attn)",)
"""Queries and values; GPT-2's ``c_attn`` makes keys too."""
