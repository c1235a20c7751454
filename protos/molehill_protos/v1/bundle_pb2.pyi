from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Form(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FORM_UNSPECIFIED: _ClassVar[Form]
    GEMM_FP32: _ClassVar[Form]
    GEMM_INT8: _ClassVar[Form]
    GEMM_INT4: _ClassVar[Form]
    ROWS_FP32: _ClassVar[Form]
    ROWS_INT8: _ClassVar[Form]
    VECTORS: _ClassVar[Form]
    TENSORS: _ClassVar[Form]
FORM_UNSPECIFIED: Form
GEMM_FP32: Form
GEMM_INT8: Form
GEMM_INT4: Form
ROWS_FP32: Form
ROWS_INT8: Form
VECTORS: Form
TENSORS: Form

class Manifest(_message.Message):
    __slots__ = ("format", "id", "version", "base", "task", "quantisation", "slots", "sites", "routers", "gate", "layout", "parity", "golden", "runtime", "provenance", "files", "created", "expires")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    QUANTISATION_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    GOLDEN_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    format: int
    id: str
    version: int
    base: Base
    task: Task
    quantisation: Quantisation
    slots: _containers.RepeatedCompositeFieldContainer[Slot]
    sites: _containers.RepeatedCompositeFieldContainer[Site]
    routers: _containers.RepeatedCompositeFieldContainer[Router]
    gate: _containers.RepeatedCompositeFieldContainer[GateTensor]
    layout: bytes
    parity: Parity
    golden: _containers.RepeatedCompositeFieldContainer[Golden]
    runtime: Runtime
    provenance: Provenance
    files: _containers.RepeatedCompositeFieldContainer[File]
    created: int
    expires: int
    def __init__(self, format: _Optional[int] = ..., id: _Optional[str] = ..., version: _Optional[int] = ..., base: _Optional[_Union[Base, _Mapping]] = ..., task: _Optional[_Union[Task, _Mapping]] = ..., quantisation: _Optional[_Union[Quantisation, _Mapping]] = ..., slots: _Optional[_Iterable[_Union[Slot, _Mapping]]] = ..., sites: _Optional[_Iterable[_Union[Site, _Mapping]]] = ..., routers: _Optional[_Iterable[_Union[Router, _Mapping]]] = ..., gate: _Optional[_Iterable[_Union[GateTensor, _Mapping]]] = ..., layout: _Optional[bytes] = ..., parity: _Optional[_Union[Parity, _Mapping]] = ..., golden: _Optional[_Iterable[_Union[Golden, _Mapping]]] = ..., runtime: _Optional[_Union[Runtime, _Mapping]] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ..., files: _Optional[_Iterable[_Union[File, _Mapping]]] = ..., created: _Optional[int] = ..., expires: _Optional[int] = ...) -> None: ...

class Base(_message.Message):
    __slots__ = ("id", "revision", "digest")
    ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    id: str
    revision: str
    digest: str
    def __init__(self, id: _Optional[str] = ..., revision: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("kind", "labels", "pooling", "max_length", "generation", "range")
    KIND_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    pooling: str
    max_length: int
    generation: Generation
    range: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, kind: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., pooling: _Optional[str] = ..., max_length: _Optional[int] = ..., generation: _Optional[_Union[Generation, _Mapping]] = ..., range: _Optional[_Iterable[float]] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("eos", "pad", "template", "chat_template", "bos_token", "eos_token", "layers", "heads", "head_dim", "vocabulary", "shared_buffer")
    EOS_FIELD_NUMBER: _ClassVar[int]
    PAD_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    BOS_TOKEN_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    SHARED_BUFFER_FIELD_NUMBER: _ClassVar[int]
    eos: _containers.RepeatedScalarFieldContainer[int]
    pad: int
    template: bool
    chat_template: str
    bos_token: str
    eos_token: str
    layers: int
    heads: int
    head_dim: int
    vocabulary: int
    shared_buffer: bool
    def __init__(self, eos: _Optional[_Iterable[int]] = ..., pad: _Optional[int] = ..., template: _Optional[bool] = ..., chat_template: _Optional[str] = ..., bos_token: _Optional[str] = ..., eos_token: _Optional[str] = ..., layers: _Optional[int] = ..., heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., vocabulary: _Optional[int] = ..., shared_buffer: _Optional[bool] = ...) -> None: ...

class Quantisation(_message.Message):
    __slots__ = ("base", "head", "experts", "block")
    BASE_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    base: str
    head: str
    experts: str
    block: int
    def __init__(self, base: _Optional[str] = ..., head: _Optional[str] = ..., experts: _Optional[str] = ..., block: _Optional[int] = ...) -> None: ...

class Slot(_message.Message):
    __slots__ = ("id", "shared")
    ID_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    id: str
    shared: bool
    def __init__(self, id: _Optional[str] = ..., shared: _Optional[bool] = ...) -> None: ...

class SiteTensor(_message.Message):
    __slots__ = ("role", "name", "by_rank", "shape")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    BY_RANK_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    role: str
    name: str
    by_rank: bool
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, role: _Optional[str] = ..., name: _Optional[str] = ..., by_rank: _Optional[bool] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Site(_message.Message):
    __slots__ = ("name", "d_in", "d_out", "slots", "ranks", "form", "a", "a_start", "b", "a_block", "b_block", "tensors")
    NAME_FIELD_NUMBER: _ClassVar[int]
    D_IN_FIELD_NUMBER: _ClassVar[int]
    D_OUT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    A_FIELD_NUMBER: _ClassVar[int]
    A_START_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    A_BLOCK_FIELD_NUMBER: _ClassVar[int]
    B_BLOCK_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    name: str
    d_in: int
    d_out: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    form: Form
    a: str
    a_start: int
    b: str
    a_block: int
    b_block: int
    tensors: _containers.RepeatedCompositeFieldContainer[SiteTensor]
    def __init__(self, name: _Optional[str] = ..., d_in: _Optional[int] = ..., d_out: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., ranks: _Optional[_Iterable[int]] = ..., form: _Optional[_Union[Form, str]] = ..., a: _Optional[str] = ..., a_start: _Optional[int] = ..., b: _Optional[str] = ..., a_block: _Optional[int] = ..., b_block: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[SiteTensor, _Mapping]]] = ...) -> None: ...

class Router(_message.Message):
    __slots__ = ("name", "slots")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    slots: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., slots: _Optional[_Iterable[int]] = ...) -> None: ...

class GateTensor(_message.Message):
    __slots__ = ("name", "shape", "router", "expert_axis")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_AXIS_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    router: int
    expert_axis: int
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., router: _Optional[int] = ..., expert_axis: _Optional[int] = ...) -> None: ...

class Parity(_message.Message):
    __slots__ = ("texts", "logit_error", "agreement", "rows", "accuracy_original", "accuracy_bundle", "router_agreement", "figure", "figure_original", "figure_bundle")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_ERROR_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_ORIGINAL_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    ROUTER_AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    FIGURE_FIELD_NUMBER: _ClassVar[int]
    FIGURE_ORIGINAL_FIELD_NUMBER: _ClassVar[int]
    FIGURE_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    texts: int
    logit_error: float
    agreement: float
    rows: int
    accuracy_original: float
    accuracy_bundle: float
    router_agreement: float
    figure: str
    figure_original: float
    figure_bundle: float
    def __init__(self, texts: _Optional[int] = ..., logit_error: _Optional[float] = ..., agreement: _Optional[float] = ..., rows: _Optional[int] = ..., accuracy_original: _Optional[float] = ..., accuracy_bundle: _Optional[float] = ..., router_agreement: _Optional[float] = ..., figure: _Optional[str] = ..., figure_original: _Optional[float] = ..., figure_bundle: _Optional[float] = ...) -> None: ...

class Golden(_message.Message):
    __slots__ = ("input_ids", "logits", "best")
    INPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    input_ids: _containers.RepeatedScalarFieldContainer[int]
    logits: _containers.RepeatedScalarFieldContainer[float]
    best: int
    def __init__(self, input_ids: _Optional[_Iterable[int]] = ..., logits: _Optional[_Iterable[float]] = ..., best: _Optional[int] = ...) -> None: ...

class Runtime(_message.Message):
    __slots__ = ("onnxruntime", "opset", "domains")
    ONNXRUNTIME_FIELD_NUMBER: _ClassVar[int]
    OPSET_FIELD_NUMBER: _ClassVar[int]
    DOMAINS_FIELD_NUMBER: _ClassVar[int]
    onnxruntime: str
    opset: int
    domains: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, onnxruntime: _Optional[str] = ..., opset: _Optional[int] = ..., domains: _Optional[_Iterable[str]] = ...) -> None: ...

class Provenance(_message.Message):
    __slots__ = ("run", "rounds", "config_digest", "federation", "epsilon", "gate", "exporter")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    EXPORTER_FIELD_NUMBER: _ClassVar[int]
    run: str
    rounds: int
    config_digest: str
    federation: str
    epsilon: float
    gate: str
    exporter: str
    def __init__(self, run: _Optional[str] = ..., rounds: _Optional[int] = ..., config_digest: _Optional[str] = ..., federation: _Optional[str] = ..., epsilon: _Optional[float] = ..., gate: _Optional[str] = ..., exporter: _Optional[str] = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("path", "length", "sha256")
    PATH_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    path: str
    length: int
    sha256: bytes
    def __init__(self, path: _Optional[str] = ..., length: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...
