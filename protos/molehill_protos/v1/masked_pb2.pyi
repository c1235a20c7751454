from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Masked(_message.Message):
    __slots__ = ("format", "run", "round", "attempt", "client", "base", "layout", "numbers")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    format: int
    run: str
    round: int
    attempt: int
    client: str
    base: str
    layout: str
    numbers: bytes
    def __init__(self, format: _Optional[int] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., client: _Optional[str] = ..., base: _Optional[str] = ..., layout: _Optional[str] = ..., numbers: _Optional[bytes] = ...) -> None: ...
