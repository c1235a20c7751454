"""The device runtime: verify, load, route, generate. Needs onnxruntime, tokenizers, numpy and tuf, never torch."""
