"""What crosses a network: keys, trees, digests, codecs and the delta message (numpy and protobuf only)."""
