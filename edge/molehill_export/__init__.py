"""Build time: a trained MoLoRA becomes a quantised ONNX bundle, and bundles become a signed repository."""
