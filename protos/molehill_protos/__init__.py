"""Generated protocol buffers of the data plane."""
