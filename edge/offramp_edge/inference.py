"""The Open Inference Protocol's JSON: a request read, an output written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offramp_common.errors import RequestError
from offramp_common.spec import TaskSpec
from offramp_common.text import Text
from offramp_edge.answers import Answer, Sample

MAX_TEXTS = 256
"""Most texts in one request."""
_LOGITS = "logits"


@dataclass(frozen=True, slots=True)
class Inference:
    """What one request asks for."""

    id: str
    samples: tuple[Sample, ...]
    outputs: tuple[str, ...]
    provisional: bool = False


@dataclass(frozen=True, slots=True)
class _Output:
    datatype: str
    read: Callable[[Answer], Any]


_OUTPUTS: Mapping[str, _Output] = {
    "label": _Output("BYTES", lambda answer: answer.label),
    "probability": _Output("FP32", lambda answer: answer.probability),
    "exit_depth": _Output("INT32", lambda answer: answer.exit_depth),
    "where": _Output("BYTES", lambda answer: answer.where),
    "reason": _Output("BYTES", lambda answer: answer.reason),
    _LOGITS: _Output("FP32", lambda answer: answer.logits),
}


def outputs_of(task: TaskSpec) -> list[dict[str, Any]]:
    """The outputs of a model, as its metadata lists them. Regression has a number for a label and
    no probability."""
    return [
        {
            "name": name,
            "datatype": _datatype(name, task),
            "shape": [-1, task.answer_width] if name == _LOGITS else [-1],
        }
        for name in _names(task)
    ]


def output(name: str, answers: Sequence[Answer], task: TaskSpec) -> dict[str, Any]:
    """One output tensor of a reply; data is flat, row after row."""
    rows = [_OUTPUTS[name].read(answer) for answer in answers]
    shape = [len(rows)]
    if name == _LOGITS:
        shape.append(task.answer_width)
        rows = [value for row in rows for value in row]
    return {"name": name, "datatype": _datatype(name, task), "shape": shape, "data": rows}


def parse(body: bytes, task: TaskSpec, traceparent: str = "") -> Inference:
    """Raises RequestError, naming what is wrong and what must stand there."""
    try:
        request = json.loads(body)
    except ValueError as error:
        raise RequestError(f"the body is not JSON ({error})") from None
    if not isinstance(request, dict):
        raise RequestError("the body must be a JSON object with inputs")
    parameters = request.get("parameters", {})
    parameters = parameters if isinstance(parameters, dict) else {}
    deadline_ms, provisional = parameters.get("deadline_ms"), parameters.get("provisional", False)
    if deadline_ms is not None and not _is_positive(deadline_ms):
        raise RequestError(f"deadline_ms {deadline_ms!r:.80}: must be a number above 0")
    if not isinstance(provisional, bool):
        raise RequestError(f"provisional {provisional!r:.80}: must be true or false")
    texts = _texts(request.get("inputs"), task.pair)
    samples = (Sample(text, deadline_ms=deadline_ms, traceparent=traceparent) for text in texts)
    ident = str(request.get("id", ""))
    return Inference(ident, tuple(samples), _wanted(request, task), provisional)


def _texts(inputs: Any, pair: bool) -> list[Text]:
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RequestError('"inputs" must be a list of one tensor, called "text"')
    tensor = inputs[0]
    name, datatype, shape = (tensor.get(key) for key in ("name", "datatype", "shape"))
    if name != "text" or datatype != "BYTES":
        raise RequestError(f'input {name!r:.80} of {datatype!r:.80}: must be "text" of BYTES')
    width = 2 if pair else 1
    wanted = "[n, 2]" if pair else "[n]"
    sizes = shape if isinstance(shape, list) else []
    good = len(sizes) == width and all(type(size) is int and size > 0 for size in sizes)
    if not good or sizes[1:] not in ([], [2]):
        raise RequestError(f"shape {shape!r:.80}: must be {wanted} for this model")
    if sizes[0] > MAX_TEXTS:
        raise RequestError(f"{sizes[0]} texts: at most {MAX_TEXTS} a request; send several")
    data = _flat(tensor.get("data"))
    if len(data) != sizes[0] * width or not all(isinstance(text, str) for text in data):
        raise RequestError(f"data of {len(data)} values: shape {shape} needs so many texts")
    return list(zip(data[::2], data[1::2], strict=True)) if pair else data


def _flat(data: Any) -> list[Any]:
    """Both of the protocol's forms: nested by shape, or flat."""
    if not isinstance(data, list):
        raise RequestError('"data" must be a list of texts')
    rows = (row if isinstance(row, list) else [row] for row in data)
    return [value for row in rows for value in row]


def _wanted(request: dict[str, Any], task: TaskSpec) -> tuple[str, ...]:
    have = _names(task)
    asked = request.get("outputs")
    if asked is None:
        return tuple(name for name in have if name != _LOGITS)
    if not isinstance(asked, list) or not all(isinstance(entry, dict) for entry in asked):
        raise RequestError('"outputs" must be a list of {"name": ...}')
    names = tuple(entry.get("name") for entry in asked)
    unknown = [name for name in names if name not in have]
    if unknown:
        raise RequestError(f"output {unknown[0]!r:.80}: this model has {', '.join(have)}")
    return names


def _names(task: TaskSpec) -> list[str]:
    return [name for name in _OUTPUTS if task.labels or name != "probability"]


def _datatype(name: str, task: TaskSpec) -> str:
    return "FP32" if name == "label" and not task.labels else _OUTPUTS[name].datatype


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
