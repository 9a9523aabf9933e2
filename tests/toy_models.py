"""A small random model as a bundle: real files, real tokenizer, milliseconds a layer.

Its weights are large enough that samples differ: at `mixed_knobs` some leave at each exit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp_common.activations import Activations, NumpyArray, unpack
from offramp_common.bundle import Bundle
from offramp_common.runner import Knobs, run
from offramp_common.spec import KnobSpec, TaskSpec, never_exit
from offramp_model.backbones import backbone_from_config
from offramp_model.exits import HeadSpec, State
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel, TorchLayers, to_numpy, to_torch
from offramp_model.store import About, load_model, save_model

WORDS = 96
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
LABELS = ("red", "green", "blue", "grey", "none")


def toy_tokenizer() -> str:
    """tokenizer.json of a word-level tokenizer: "w0 w1 w2" -> [CLS] w0 w1 w2 [SEP]."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    words = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    text: str = tokenizer.to_str()
    return text


def toy_model(
    method: str = "deebert",
    *,
    n_layers: int = 3,
    width: int = 32,
    exits: Sequence[int] | None = None,
    task: TaskSpec | None = None,
    max_tokens: int = 64,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> MultiExitModel:
    """A random BERT with an exit head at each of `exits` (after every layer by default).

    `width` is a multiple of 4. The global torch generator is left as it was.
    """
    config = {
        "model_type": "bert",
        "vocab_size": len(SPECIAL) + WORDS,
        "hidden_size": width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "max_position_embeddings": max_tokens,
        "initializer_range": 0.4,
        "pad_token_id": 0,
    }
    record = METHODS[method]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = backbone_from_config(config)
        spec = HeadSpec(
            task or TaskSpec("classification", LABELS),
            width,
            n_layers,
            tuple(exits or range(1, n_layers + 1)),
            {**record.settings, **(settings or {})},
        )
        model = MultiExitModel(backbone, record, spec)
        _sharpen(model)
    return model.eval()


@torch.no_grad()
def _sharpen(model: MultiExitModel) -> None:
    """Make the heads surer, and let each mostly agree with the first, as trained ones do."""
    first = dict(model.exits[str(model.spec.exits[0])].named_parameters())
    for depth in model.spec.exits:
        for name, parameter in model.exits[str(depth)].named_parameters():
            other = first.get(name)
            if other is not None and other is not parameter and other.shape == parameter.shape:
                parameter.copy_(0.8 * other + 0.2 * parameter)
    for name, parameter in model.exits.named_parameters():
        if name.endswith("weight"):
            parameter.mul_(3.0)


def toy_bundle(
    path: Path, method: str = "deebert", *, name: str = "toy", split: int = 1, **model: Any
) -> Bundle:
    """Write a toy_model(method, **model) as a bundle into the directory `path` (made if missing),
    calibrated to `mixed_knobs`."""
    made = toy_model(method, **model)
    points = {"fp32": mixed_knobs(made)}
    about = About(name, made.backbone.max_tokens, split, operating_points=points)
    return save_model(Path(path), made, toy_tokenizer(), about)


def toy_layers(bundle: Bundle) -> TorchLayers:
    """The reference runtime of a bundle."""
    return TorchLayers(load_model(bundle))


def eager(model: MultiExitModel) -> Knobs:
    """The operating point at which rows leave as soon as the method can let them."""
    return {knob.name: (_eager(knob),) * model.n_layers for knob in model.knobs}


def _eager(knob: KnobSpec) -> float:
    low_is_never = abs(knob.never - knob.low) <= abs(knob.never - knob.high)
    return knob.high if low_is_never else knob.low


@torch.inference_mode()
def mixed_knobs(model: MultiExitModel) -> Knobs:
    """An operating point of the toy model at which about half of some random rows leave early, at as many
    depths as it can be.

    Each knob is tried alone, the others being eager. The first that does best is taken. Where one exit is
    chosen for all rows, it is one in the middle.
    """
    if model.method.online:
        return {knob.name: (model.n_layers // 2 + 1.0,) * model.n_layers for knob in model.knobs}
    rng = np.random.default_rng(0)
    ids_BTF = torch.from_numpy(rng.integers(len(SPECIAL), len(SPECIAL) + WORDS, (64, 12, 1)))
    mask_BT = torch.ones(64, 12, dtype=torch.bool)
    outputs = model(ids_BTF, mask_BT)
    best, best_rank = eager(model), (2.0, 0)
    for knob in model.knobs:
        for value in _candidates(knob):
            knobs = {**eager(model), knob.name: (value,) * model.n_layers}
            depth_B = _depths(model, outputs, mask_BT, knobs)
            unbalanced = round(abs(float((depth_B < model.n_layers).mean()) - 0.5), 1)
            rank = (unbalanced, -len(set(depth_B.tolist())))
            if rank < best_rank:
                best, best_rank = knobs, rank
    return best


def _candidates(knob: KnobSpec) -> list[float]:
    """Values between eager and never: evenly, and closer and closer to the range's ends."""
    if knob.integer:
        return [float(value) for value in range(int(knob.low), int(knob.high) + 1)]
    shares = [i / 32 for i in range(1, 32)] + [2.0**-i for i in range(6, 40)]
    shares += [1 - 2.0**-i for i in range(6, 14)]
    # Rounded: a threshold must not lie on some row's confidence to the last bit.
    return [float(f"{knob.low + share * (knob.high - knob.low):.3g}") for share in shares]


def _depths(
    model: MultiExitModel, outputs: Mapping[int, State], mask_BT: Tensor, knobs: Knobs
) -> np.ndarray:
    """Where each row leaves, given what the branches put out."""
    state: State = model.policy.start(mask_BT)
    depth_B = np.full(len(mask_BT), model.n_layers)
    for depth in model.looks:
        here = {name: torch.tensor(values[depth - 1]) for name, values in knobs.items()}
        decision = model.policy.decide(outputs[depth], state, here, depth)
        state = decision.state
        if depth in model.spec.exits:
            depth_B[decision.leave_B.numpy() & (depth_B > depth)] = depth
    return depth_B


def toy_inputs(bundle: Bundle, lengths: Sequence[int], *, seed: int = 0) -> Activations[NumpyArray]:
    """Random rows of these lengths at depth 0."""
    cut = bundle.cuts[0]
    rng = np.random.default_rng(seed)
    lengths_B = np.array(lengths, dtype=np.int64)
    channels = [rng.integers(0, size, int(lengths_B.sum())) for size in cut.vocabulary]
    ids_NF = np.stack(channels, axis=1).astype(np.int64)
    return Activations(unpack(ids_NF, lengths_B), lengths_B, depth=0)


def toy_activations(
    bundle: Bundle,
    lengths: Sequence[int],
    depth: int,
    *,
    seed: int = 0,
    layers: TorchLayers | None = None,
) -> Activations[NumpyArray]:
    """The same rows after `depth` layers, none of them having left."""
    inputs = toy_inputs(bundle, lengths, seed=seed)
    never = never_exit(bundle.manifest.knobs, bundle.n_layers)
    rest: Activations[Tensor] | None
    rest = run(layers or toy_layers(bundle), to_torch(inputs), depth, never).rest
    assert rest is not None, "no row leaves at the never point"
    return to_numpy(rest)
