"""Generated code of the first version of the messages."""
