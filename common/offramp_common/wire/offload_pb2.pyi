from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HelloRequest(_message.Message):
    __slots__ = ("protocol", "bundle", "digests", "codecs", "software")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    bundle: str
    digests: _containers.RepeatedCompositeFieldContainer[RangeDigest]
    codecs: _containers.RepeatedScalarFieldContainer[str]
    software: str
    def __init__(self, protocol: _Optional[int] = ..., bundle: _Optional[str] = ..., digests: _Optional[_Iterable[_Union[RangeDigest, _Mapping]]] = ..., codecs: _Optional[_Iterable[str]] = ..., software: _Optional[str] = ...) -> None: ...

class RangeDigest(_message.Message):
    __slots__ = ("depth", "digest")
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    depth: int
    digest: bytes
    def __init__(self, depth: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("protocol", "codecs", "max_frame_bytes", "max_rows", "max_tokens", "knobs", "software")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KNOBS_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    codecs: _containers.RepeatedScalarFieldContainer[str]
    max_frame_bytes: int
    max_rows: int
    max_tokens: int
    knobs: _containers.RepeatedCompositeFieldContainer[Knob]
    software: str
    def __init__(self, protocol: _Optional[int] = ..., codecs: _Optional[_Iterable[str]] = ..., max_frame_bytes: _Optional[int] = ..., max_rows: _Optional[int] = ..., max_tokens: _Optional[int] = ..., knobs: _Optional[_Iterable[_Union[Knob, _Mapping]]] = ..., software: _Optional[str] = ...) -> None: ...

class Knob(_message.Message):
    __slots__ = ("name", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class OffloadRequest(_message.Message):
    __slots__ = ("request_id", "bundle", "digest", "frame", "knobs", "deadline_ms", "traceparent", "priority", "cancel")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    KNOBS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    bundle: str
    digest: bytes
    frame: bytes
    knobs: _containers.RepeatedCompositeFieldContainer[Knob]
    deadline_ms: float
    traceparent: str
    priority: int
    cancel: bool
    def __init__(self, request_id: _Optional[str] = ..., bundle: _Optional[str] = ..., digest: _Optional[bytes] = ..., frame: _Optional[bytes] = ..., knobs: _Optional[_Iterable[_Union[Knob, _Mapping]]] = ..., deadline_ms: _Optional[float] = ..., traceparent: _Optional[str] = ..., priority: _Optional[int] = ..., cancel: _Optional[bool] = ...) -> None: ...

class OffloadReply(_message.Message):
    __slots__ = ("request_id", "answers", "exit_depths", "confidences", "queue_ms", "compute_ms", "exit_classes")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    EXIT_DEPTHS_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    EXIT_CLASSES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    answers: bytes
    exit_depths: _containers.RepeatedScalarFieldContainer[int]
    confidences: _containers.RepeatedScalarFieldContainer[float]
    queue_ms: float
    compute_ms: float
    exit_classes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., answers: _Optional[bytes] = ..., exit_depths: _Optional[_Iterable[int]] = ..., confidences: _Optional[_Iterable[float]] = ..., queue_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ..., exit_classes: _Optional[_Iterable[int]] = ...) -> None: ...

class StreamReply(_message.Message):
    __slots__ = ("reply", "error")
    REPLY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    reply: OffloadReply
    error: RequestError
    def __init__(self, reply: _Optional[_Union[OffloadReply, _Mapping]] = ..., error: _Optional[_Union[RequestError, _Mapping]] = ...) -> None: ...

class RequestError(_message.Message):
    __slots__ = ("request_id", "code", "message", "retry_after_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    code: int
    message: str
    retry_after_ms: float
    def __init__(self, request_id: _Optional[str] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[float] = ...) -> None: ...
