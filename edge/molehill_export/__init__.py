"""After training: a MoLoRA becomes an ONNX bundle, bundles a signed repository, and adapters are looked at."""
