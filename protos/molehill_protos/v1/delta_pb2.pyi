from molehill_protos.v1 import tree_pb2 as _tree_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExpertTokens(_message.Message):
    __slots__ = ("site", "expert", "tokens")
    SITE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    site: str
    expert: str
    tokens: float
    def __init__(self, site: _Optional[str] = ..., expert: _Optional[str] = ..., tokens: _Optional[float] = ...) -> None: ...

class TokenTable(_message.Message):
    __slots__ = ("experts",)
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[ExpertTokens]
    def __init__(self, experts: _Optional[_Iterable[_Union[ExpertTokens, _Mapping]]] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("format", "run", "round", "client", "base", "layout", "examples", "tokens", "tree")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TREE_FIELD_NUMBER: _ClassVar[int]
    format: int
    run: str
    round: int
    client: str
    base: str
    layout: str
    examples: int
    tokens: bytes
    tree: _tree_pb2.TreeBlob
    def __init__(self, format: _Optional[int] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., client: _Optional[str] = ..., base: _Optional[str] = ..., layout: _Optional[str] = ..., examples: _Optional[int] = ..., tokens: _Optional[bytes] = ..., tree: _Optional[_Union[_tree_pb2.TreeBlob, _Mapping]] = ...) -> None: ...
