"""The device's layers: a bundle's graphs, run by ONNX Runtime.

Rows run one by one, each trimmed to its own length. So a batch gives bit for bit what its rows give
alone, in int8 too, and no padding is computed. A device has one sample at a time; on one core a full
batch of equal lengths would gain about a fifth (docs/decisions/0002-device-graphs.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from offramp_common.activations import Activations, NumpyArray, join
from offramp_common.bundle import GRAPHS, Bundle
from offramp_common.errors import BundleError
from offramp_common.runner import Knobs, Look, Step
from offramp_common.spec import never_exit

_STATE_IN, _KNOB, _STATE, _OUT = "in.state.", "knob.", "state.", "out."
_HEAD = [
    "hidden",
    "leave",
    "answer",
    "confidence",
]  # a graph's first outputs; without head the first


def precisions(bundle: Bundle) -> tuple[str, ...]:
    """The precisions that a bundle has graphs of, sorted."""
    return tuple(sorted(p.name for p in (bundle.path / GRAPHS).glob("*") if p.is_dir()))


class OnnxLayers:
    """A bundle's layers on the device, as the runner's Layers over numpy arrays.

    Graphs are loaded when they are first needed, or by `load`; one thread may use them at a time.
    """

    def __init__(self, bundle: Bundle, precision: str = "fp32", threads: int = 1) -> None:
        """Raises BundleError where a graph of `precision` is missing."""
        self.bundle, self.precision, self._threads = bundle, precision, threads
        folder = bundle.path / GRAPHS / precision
        self._files = [folder / f"layer_{index:02d}.onnx" for index in range(bundle.n_layers)]
        missing = [file for file in self._files if not file.is_file()]
        if missing:
            have = ", ".join(precisions(bundle)) or "none"
            raise BundleError(
                f"{missing[0]}: missing; the bundle's graphs: {have}. Copy the whole directory again, "
                "or let offramp_model.export.add_graphs make them, as `offramp train` does"
            )
        self._graphs: dict[int, _Graph] = {}

    @property
    def n_layers(self) -> int:
        return self.bundle.n_layers

    def load(self, start: int = 0, stop: int | None = None) -> float:
        """Load layers [start, stop) (all by default) ahead of use; the milliseconds it took.

        Raises BundleError, as the first `step` of a layer does, where its graph is damaged."""
        began = perf_counter()
        for index in range(start, self.n_layers if stop is None else stop):
            self._graph(index)
        return (perf_counter() - began) * 1e3

    def step(self, acts: Activations[NumpyArray], knobs: Knobs) -> Step[NumpyArray]:
        graph = self._graph(acts.depth)
        settings = graph.settings(knobs, acts.depth)
        if acts.batch_size == 1:  # its only row fills T
            return graph.step(acts, settings)
        rows = [acts.take(np.array([row])) for row in range(acts.batch_size)]
        steps = [graph.step(row, settings) for row in rows]
        looks = [step.look for step in steps if step.look is not None]
        return Step(join([step.acts for step in steps]), _join_looks(looks) if looks else None)

    def measure(
        self, n_tokens: int = 32, repeats: int = 20, clock: Callable[[], float] = perf_counter
    ) -> tuple[float, ...]:
        """Milliseconds of each layer, its exit head included, for one row of `n_tokens`: medians of
        `repeats` runs after one that warms up. `clock` gives seconds."""
        ids = np.ones((1, n_tokens, self.bundle.cuts[0].width), np.int64)
        start = Activations(ids, np.array([n_tokens]), depth=0)
        knobs = never_exit(self.bundle.manifest.knobs, self.n_layers)
        runs = []
        for _ in range(repeats + 1):
            acts, times = start, []
            for _ in range(self.n_layers):
                began = clock()
                acts = self.step(acts, knobs).acts
                times.append((clock() - began) * 1e3)
            runs.append(times)
        return tuple(median(layer) for layer in zip(*runs[1:], strict=True))

    def _graph(self, index: int) -> _Graph:
        graph = self._graphs.get(index)
        if graph is None:
            cut = self.bundle.cuts.get(index + 1)
            per_token = {n for n, field in cut.state.items() if field.per_token} if cut else set()
            graph = self._graphs[index] = _Graph.of(self._session(index), per_token)
        return graph

    def _session(self, index: int) -> Any:
        import onnxruntime

        file = self._files[index]
        try:
            return onnxruntime.InferenceSession(
                file.read_bytes(), self._options(index), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime's errors have no base class of their own
            raise BundleError(
                f"{file}: cannot be loaded ({error}); `offramp bundle verify` says what differs: "
                "copy the whole directory again"
            ) from error

    def _options(self, index: int) -> Any:
        """ONNX Runtime's, of one layer's session."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors, which are raised besides
        for name, value in {
            # Idle threads of one session would spin, and take the cores from the next one's.
            "session.intra_op.allow_spinning": "0",
            # Else fp32 graphs would keep their int8 matrices, and quantise activations to match.
            "session.disable_quant_qdq": "1",
            # Weights lie outside the graph's folder: refused, unless the graph comes as bytes and
            # the folder is named.
            "session.model_external_initializers_file_folder_path": str(self.bundle.path.resolve()),
        }.items():
            options.add_session_config_entry(name, value)
        return options


@dataclass(frozen=True, slots=True)
class _Graph:
    """One layer's session, with all names looked up once: at 16 tokens a layer takes a third of a
    millisecond.

    states, knobs       (name, the graph's input) of what it reads
    names               its outputs in order;  exit: whether a row may leave behind it
    state, token_state, outputs   (name, place among the outputs) of what it writes
    """

    run: Any
    states: tuple[tuple[str, str], ...]
    knobs: tuple[tuple[str, str], ...]
    names: list[str]
    exit: bool
    state: tuple[tuple[str, int], ...]
    token_state: tuple[tuple[str, int], ...]
    outputs: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, session: Any, per_token: set[str]) -> _Graph:
        inputs = [node.name for node in session.get_inputs()]
        names = [node.name for node in session.get_outputs()]
        assert names[0] == _HEAD[0], f"outputs {names}"
        places = {name: place for place, name in enumerate(names)}
        same = json.loads(session.get_modelmeta().custom_metadata_map["same"])
        places |= {name: places[source] for name, source in same.items()}
        state = _named(places, _STATE)
        return cls(
            session.run,
            tuple((n.removeprefix(_STATE_IN), n) for n in inputs if n.startswith(_STATE_IN)),
            tuple((n.removeprefix(_KNOB), n) for n in inputs if n.startswith(_KNOB)),
            names,
            names[:4] == _HEAD,
            tuple(entry for entry in state if entry[0] not in per_token),
            tuple(entry for entry in state if entry[0] in per_token),
            _named(places, _OUT),
        )

    def settings(self, knobs: Knobs, index: int) -> dict[str, NumpyArray]:
        return {key: np.array(knobs[name][index], np.float32) for name, key in self.knobs}

    def step(
        self, row: Activations[NumpyArray], settings: dict[str, NumpyArray]
    ) -> Step[NumpyArray]:
        """One row without padding."""
        inputs = {"in.hidden": row.hidden_BTD, **settings}
        for name, key in self.states:
            inputs[key] = row.state[name] if name in row.state else row.token_state[name]
        out = self.run(self.names, inputs)
        if len(out) == 1:  # nothing looks here: the state goes on as it is
            return Step(replace(row, hidden_BTD=out[0], depth=row.depth + 1), None)
        acts = Activations(
            out[0],
            row.lengths_B,
            row.depth + 1,
            {name: out[place] for name, place in self.state},
            {name: out[place] for name, place in self.token_state},
        )
        if not self.exit:
            return Step(acts, None)
        outputs = {name: out[place] for name, place in self.outputs}
        return Step(acts, Look(out[1], out[2], out[3], outputs))


def _named(places: dict[str, int], prefix: str) -> tuple[tuple[str, int], ...]:
    found = [(name, place) for name, place in places.items() if name.startswith(prefix)]
    return tuple((name.removeprefix(prefix), place) for name, place in found)


def _join_looks(looks: list[Look[NumpyArray]]) -> Look[NumpyArray]:
    return Look(
        np.concatenate([look.leave_B for look in looks]),
        np.concatenate([look.answer for look in looks]),
        np.concatenate([look.confidence_B for look in looks]),
        {name: np.concatenate([k.outputs[name] for k in looks]) for name in looks[0].outputs},
    )
