from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Method(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    METHOD_UNSPECIFIED: _ClassVar[Method]
    METHOD_COMPLETE: _ClassVar[Method]
    METHOD_HELLO: _ClassVar[Method]
    METHOD_PROBE: _ClassVar[Method]
    METHOD_CANCEL: _ClassVar[Method]
METHOD_UNSPECIFIED: Method
METHOD_COMPLETE: Method
METHOD_HELLO: Method
METHOD_PROBE: Method
METHOD_CANCEL: Method

class Call(_message.Message):
    __slots__ = ("id", "method", "budget_ms", "payload")
    ID_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    BUDGET_MS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    id: int
    method: Method
    budget_ms: float
    payload: bytes
    def __init__(self, id: _Optional[int] = ..., method: _Optional[_Union[Method, str]] = ..., budget_ms: _Optional[float] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Calls(_message.Message):
    __slots__ = ("calls",)
    CALLS_FIELD_NUMBER: _ClassVar[int]
    calls: _containers.RepeatedCompositeFieldContainer[Call]
    def __init__(self, calls: _Optional[_Iterable[_Union[Call, _Mapping]]] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("id", "code", "message", "retry_after_ms", "payload")
    ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    id: int
    code: int
    message: str
    retry_after_ms: float
    payload: bytes
    def __init__(self, id: _Optional[int] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[float] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Results(_message.Message):
    __slots__ = ("results", "work_left", "calls", "capacity", "seen_id", "draining")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    WORK_LEFT_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    SEEN_ID_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Result]
    work_left: int
    calls: int
    capacity: float
    seen_id: int
    draining: bool
    def __init__(self, results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ..., work_left: _Optional[int] = ..., calls: _Optional[int] = ..., capacity: _Optional[float] = ..., seen_id: _Optional[int] = ..., draining: _Optional[bool] = ...) -> None: ...
