"""Presets: published recipes as keys of the ``[molora]`` section, with what differs from the paper.

Keys given in a configuration win over its preset. A recipe for a whole feed-forward expert is rendered here as LoRAs on
the block's linears that share one route (``scope = "block"``), unless it mixes whole blocks (MixLoRA): when the weights
do not sum to 1, mixing whole blocks would scale the frozen block as well.
"""

WORDS = ("recipe", "architecture")
