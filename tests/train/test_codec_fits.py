"""Fitting codecs: what is learned helps, stops leave no trace, and the bundle holds codec and costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoint import TOPICS, make_checkpoint, write_topics
from trainers import StopAfter

from offramp_common.activations import Activations
from offramp_common.bundle import Bundle
from offramp_common.cli import INTERRUPTED, OK, main
from offramp_common.codecs import CODECS
from offramp_common.codecs.fitted import Fitted
from offramp_common.codecs.kept import Keep
from offramp_common.errors import BundleError, ConfigError
from offramp_common.spec import never_exit
from offramp_model.split_model import to_torch
from offramp_train.build import Request, resolve_config, train_bundle
from offramp_train.checkpoint import Checkpoints, Stopped, StopSignal
from offramp_train.codec_fits.bottleneck import Learning, Shape, fit_bottleneck, start
from offramp_train.codec_fits.coded import coded
from offramp_train.codec_fits.cost import measure_codecs
from offramp_train.codec_fits.cut_rows import CutBatch, cut_batches, torch_layers
from offramp_train.codec_fits.fit import (
    Wanted,
    fit_codec,
    hidden_states,
    put_codec,
    put_costs,
    sized,
)
from offramp_train.codec_fits.saliency import fit_scores
from offramp_train.codec_fits.tail import Tail
from offramp_train.measure import Subject, subject
from offramp_train.progress import Report
from offramp_train.tables import read_rows

WIDTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("codecs")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Bundle:
    """Knows an animal, a food and a tool among filler words, nearly always."""
    data, checkpoint = write_topics(folder / "topics"), make_checkpoint(folder / "checkpoint")
    table = {
        "backbone": str(checkpoint),
        "method": "pabee",
        "max_tokens": 16,
        "settings": {"pooling": "mean"},
        "training": {"epochs": 8, "lr": 3e-3, "head_lr": 1e-2, "batch": 16},
    }
    config = resolve_config(table, where="test")
    request = Request(config, data, folder / "trained", "test", finish=False)
    return train_bundle(request, Report())


@pytest.fixture
def bundle(trained: Bundle, tmp_path: Path) -> Bundle:
    """A copy that may be written to."""
    copy = tmp_path / "bundle"
    copy.mkdir()
    for file in trained.path.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    return Bundle.read(copy)


def subject_of(bundle: Bundle, folder: Path, split: str = "train") -> Subject:
    found = subject(bundle, "torch", read_rows(folder / "topics" / f"{split}.tsv"))
    torch_layers(found).model.requires_grad_(False)
    return found


def batches_of(subject: Subject, depth: int = 1, rows: int = 128) -> list[CutBatch]:
    return list(cut_batches(subject, [depth], 16, range(rows)))


def test_the_tail_gives_the_uncut_models_answers(trained: Bundle, folder: Path) -> None:
    here = subject_of(trained, folder)
    tail = Tail(torch_layers(here).model)
    for depth in (1, 2):
        for batch in batches_of(here, depth):
            answer_BC = tail.answer(to_torch(batch.acts[depth]))
            # Attention with a mask where no row is padded: another kernel.
            np.testing.assert_allclose(answer_BC, batch.answer_BC, rtol=0, atol=1e-4)


def test_every_row_is_cut_once(trained: Bundle, folder: Path) -> None:
    here = subject_of(trained, folder, "test")
    found = list(cut_batches(here, [1, 2], 16))
    rows = np.concatenate([batch.rows for batch in found])
    assert sorted(rows.tolist()) == list(range(60))
    for batch in found:
        assert batch.acts[2].depth == 2
        assert batch.acts[1].lengths_B.tolist() == [here.lengths[row] for row in batch.rows]


def test_scores_keep_the_word_that_decides(trained: Bundle, folder: Path) -> None:
    here = subject_of(trained, folder)
    model = torch_layers(here).model
    weight_D, correlation = fit_scores(Tail(model), batches_of(here), 1, Report())
    assert correlation > 0.3
    test = subject_of(trained, folder, "test")
    keep = Keep(weight_D, most=2)
    kept, rows = 0, 0
    for batch in cut_batches(test, [1], 1):
        acts = batch.acts[1]
        chosen_N = keep.chosen(acts.hidden_BTD[0], acts.lengths_B)
        words = str(test.rows.texts[int(batch.rows[0])]).split()
        decides = next(i for i, word in enumerate(words) if any(word in w for w in TOPICS.values()))
        kept += bool(chosen_N[1 + decides])
        rows += 1
    # By chance one of the 3 to 8 tokens behind the first: about a quarter.
    assert kept / rows > 0.6


def shape_of(tokens: int = 3, channels: int = 6) -> Shape:
    return Shape(1, WIDTH, tokens, channels, CODECS["int8"])


def test_the_trained_module_and_the_codec_are_the_same_function(
    trained: Bundle, folder: Path
) -> None:
    batches = batches_of(subject_of(trained, folder))
    bottleneck = start(shape_of(), batches)
    with torch.no_grad():
        bottleneck.weight_D.copy_(torch.linspace(-1, 1, WIDTH))
    codec = bottleneck.codec("bottleneck")
    for batch in batches[:: len(batches) // 3]:
        ours, theirs = bottleneck(batch.acts[1]), coded(codec, batch.acts[1]).acts
        assert ours.lengths_B.tolist() == theirs.lengths_B.tolist()
        # Products in another order may round a value to the next of 127 steps.
        np.testing.assert_allclose(ours.hidden_BTD.detach(), theirs.hidden_BTD, atol=0.05)
        if theirs.positions_BT is not None:
            assert ours.positions_BT is not None
            assert np.array_equal(ours.positions_BT, theirs.positions_BT)


def train_one(
    here: Subject, work: Path, stop: StopSignal | None = None, epochs: int = 3
) -> tuple[Fitted, dict[str, float]]:
    batches = batches_of(here)
    bottleneck, learning = start(shape_of(), batches), Learning(epochs, 3e-3, 0)
    tail, checkpoints = Tail(torch_layers(here).model), Checkpoints(work, {})
    lost = fit_bottleneck(
        bottleneck, tail, batches, learning, checkpoints, stop or StopSignal(), Report()
    )
    return bottleneck.codec("bottleneck"), lost


def test_training_brings_the_answers_nearer_to_the_uncut_models(
    trained: Bundle, folder: Path, tmp_path: Path
) -> None:
    _, lost = train_one(subject_of(trained, folder), tmp_path / "work")
    assert lost["after"] < 0.7 * lost["before"]


def test_a_fit_that_was_stopped_ends_with_the_same_codec(
    trained: Bundle, folder: Path, tmp_path: Path
) -> None:
    here = subject_of(trained, folder)
    whole, _ = train_one(here, tmp_path / "whole", epochs=2)
    for looks in (3, 10):
        with pytest.raises(Stopped):
            train_one(here, tmp_path / "parts", StopAfter(looks), epochs=2)
    parts, _ = train_one(here, tmp_path / "parts", epochs=2)
    assert parts.name == whole.name


def test_costs_are_those_of_running_on_what_was_decoded(trained: Bundle, folder: Path) -> None:
    here = subject_of(trained, folder, "test")
    nothing = Fitted("first", 1, WIDTH, CODECS["fp32"], Keep(np.zeros(WIDTH, np.float32), 1))
    codecs = {1: {"fp32": CODECS["fp32"], "int8": CODECS["int8"], "first": nothing}}
    measured, quality = measure_codecs(here, codecs, Report())
    by = {one.codec: one for one in measured}
    assert quality > 0.8
    assert (by["fp32"].points, by["fp32"].same, by["fp32"].error) == (0.0, 1.0, 0.0)
    assert by["int8"].same is not None
    assert by["int8"].same > 0.95
    assert 0 < (by["int8"].error or 0) < 0.02
    mean_tokens = np.mean(here.lengths)
    assert by["int8"].nbytes == pytest.approx(mean_tokens * (WIDTH + 4), abs=0.1)
    assert by["first"].tokens == 1
    assert by["first"].nbytes == pytest.approx(4 * WIDTH + 1.5, abs=0.5)
    assert by["first"].error is None


def test_sizes_follow_from_the_bytes() -> None:
    wanted = Wanted("pruned", 4, 20_000, 128)
    assert sized(wanted, 768).tokens == 48
    assert sized(Wanted("bottleneck", 4, 2_000, 128), 768).channels == 121
    assert sized(Wanted("pooled", 4, 20_000, 128), 768).tokens == 25
    assert sized(Wanted("pruned", 4, 10**6, 128), 768).tokens == 128
    for wrong in (Wanted("pruned", 4, 700, 128), Wanted("bottleneck", 4, 50, 128)):
        with pytest.raises(ConfigError, match="--bytes"):
            sized(wrong, 768)


def test_a_fitted_codec_is_in_the_bundle_with_its_costs_and_replaces_its_like(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    here = subject_of(bundle, folder)
    wanted = Wanted("pruned", 1, 80, 16, rows=64)
    batches = hidden_states(here, [1], 64, 0, Report())
    codec, on_record = fit_codec(here, wanted, batches, tmp_path / "work", StopSignal(), Report())
    bundle = put_codec(bundle, codec, on_record)
    assert bundle.codecs(1)["pruned-int4"].name == codec.name
    assert "pruned-int4" not in bundle.codecs(2)
    assert list(bundle.codecs(0)) == ["tokens"]
    assert bundle.codec_cost("pruned-int4", 1) is None
    assert bundle.codec_cost("fp32", 1) == 0.0
    measured, _ = measure_codecs(
        subject_of(bundle, folder, "test"), {1: bundle.codecs(1)}, Report()
    )
    bundle = put_costs(bundle, measured)
    cost = bundle.codec_cost("pruned-int4", 1)
    assert cost is not None
    assert bundle.codec_cost("int8", 1) is not None
    smaller = Wanted("pruned", 1, 60, 16, rows=64)
    other, on_record = fit_codec(here, smaller, batches, tmp_path / "work", StopSignal(), Report())
    bundle = put_codec(bundle, other, on_record)
    assert list(bundle.fitted) == [other.name]
    assert bundle.codec_cost("pruned-int4", 1) is None, "costs of the one before"
    assert bundle.codec_cost("int8", 1) is not None
    bundle.verify()


def test_parameters_that_do_not_fit_the_manifest_are_an_error_that_names_the_files(
    bundle: Bundle,
) -> None:
    codec = Fitted("x", 1, WIDTH, CODECS["int8"], Keep(np.zeros(WIDTH, np.float32), 4))
    put_codec(bundle, codec, {})
    manifest = json.loads((bundle.path / "bundle.json").read_text())
    manifest["fitted"][0]["width"] = 7
    (bundle.path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"codecs\.safetensors"):
        _ = Bundle.read(bundle.path).fitted
    (bundle.path / "codecs.safetensors").unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        _ = Bundle.read(bundle.path).fitted


def test_fits_that_make_no_sense_are_refused(bundle: Bundle, folder: Path) -> None:
    here = subject_of(bundle, folder)
    for split in (0, 3):
        with pytest.raises(ConfigError, match="after 1 to 2 layers"):
            hidden_states(here, [1, split], 64, 0, Report())
    for wrong in ({"inner": "tokens"}, {"label": "int8"}, {"rows": 5}, {"kind": "none"}):
        with pytest.raises(ConfigError):
            Wanted(**{"kind": "pruned", "depth": 1, "nbytes": 80, "tokens": 16, **wrong})  # type: ignore[arg-type]


def test_the_commands_fit_and_measure(
    bundle: Bundle, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder / "topics"
    fit = ["codecs", "fit", str(bundle.path), "--data", str(data / "train.tsv"), "--rows", "96"]
    fit += ["--split", "1", "--codec", "bottleneck", "--bytes", "60", "--slots", "4", "--json", "-"]
    assert main([*fit, "--epochs", "2", "--max-minutes", "0"]) == INTERRUPTED
    assert Bundle.read(bundle.path).fitted == {}
    assert main([*fit, "--epochs", "2"]) == OK
    told = json.loads(capsys.readouterr().out)
    assert (told["nbytes"], told["tokens_left"], told["channels"]) == (60, 4, 11)
    assert not list(bundle.path.parent.glob("bundle.codecs/*"))
    measure = ["codecs", "measure", str(bundle.path), "--data", str(data / "test.tsv")]
    assert main([*measure, "--codec", "bottleneck", "--split", "1", "--json", "-"]) == OK
    told = json.loads(capsys.readouterr().out)
    (cost,) = told["costs"]
    assert (cost["codec"], cost["depth"], cost["data"]) == ("bottleneck", 1, "topics/test.tsv")
    assert Bundle.read(bundle.path).codec_cost("bottleneck", 1) == cost["points"]
    assert main(["bundle", "show", str(bundle.path)]) == OK
    shown = capsys.readouterr().err
    assert "bottleneck@1." in shown
    assert "costs      bottleneck after 1 layers" in shown
    assert main(["bundle", "verify", str(bundle.path)]) == OK
    assert main([*measure, "--split", "3"]) == 2
    assert main([*measure, "--codec", "nonsense"]) == 2


def test_rows_of_never_leaving_runs_carry_the_methods_state(trained: Bundle, folder: Path) -> None:
    """PABEE counts; the tail goes on counting from what crossed."""
    here = subject_of(trained, folder)
    assert never_exit(trained.manifest.knobs, 3)
    acts: Activations[np.ndarray] = batches_of(here, 2)[0].acts[2]
    assert set(acts.state) == set(trained.cuts[2].state)
    assert coded(CODECS["int8"], acts).acts.state.keys() == acts.state.keys()
