"""The model card: README.md of a bundle, with the YAML header that model hubs read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from offramp_common.manifest import Manifest
from offramp_model.methods import METHODS
from offramp_train.config import Card
from offramp_train.conformal import sentences_of
from offramp_train.metrics import metric_of
from offramp_train.recipes import RECIPES


def card_text(manifest: Manifest) -> str:
    """Markdown, all of it from the manifest. What the user has not said in [card] is marked, not guessed.

    Raises KeyError for a manifest that `offramp train` has not written.
    """
    card, command = Card(**manifest.training["card"]), manifest.training["command"]
    parts = [
        _header(manifest, card),
        f"# {card.title or manifest.name}",
        card.description or _what(manifest),
        _method(manifest),
        "## Data and licences\n\n" + _data(manifest, card),
        "## Numbers\n\n" + _numbers(manifest),
        "## How it was made\n\n" + _made(manifest, command),
        "## How to use it\n\n" + _use(manifest),
        "## Limits\n\n" + (card.limits or "Not stated."),
    ]
    return "\n\n".join(parts) + "\n"


def _header(manifest: Manifest, card: Card) -> str:
    fields: dict[str, Any] = {
        "library_name": "offramp",
        "pipeline_tag": "text-classification",
        "tags": ["early-exit", "edge", manifest.method, manifest.family],
        "metrics": [metric_of(manifest.task)[0]],
    }
    if card.license:
        fields["license"] = card.license
    if card.language:
        fields["language"] = card.language
    if card.base_model:
        fields["base_model"] = card.base_model
    # JSON values are YAML values.
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    return "---\n" + "\n".join(lines) + "\n---"


def _what(m: Manifest) -> str:
    what = f"{len(m.task.labels)} classes" if m.task.labels else "one number"
    given = "a pair of sentences" if m.task.pair else "one sentence"
    return f"Takes {given} (at most {m.max_tokens} tokens) and gives {what}."


def _method(m: Manifest) -> str:
    method = METHODS[m.method]
    exits = ", ".join(map(str, m.exits))
    return (
        f"A {m.family} encoder of {m.n_layers} layers with an exit head after layer {exits}. "
        f"Exit method: **{m.method}** ([{method.paper.title}]({method.paper.link}), "
        f"{method.paper.venue}). {method.rule}\n\n"
        "Weights are stored as int8 with float32 scales; the numbers below are of the stored weights."
    )


def _data(m: Manifest, card: Card) -> str:
    rows = ", ".join(f"{count} {split}" for split, count in m.training.get("rows", {}).items())
    unknown = "not stated"
    base = card.base_model or m.training.get("backbone", unknown)
    lines = [
        f"- Data: {card.dataset or unknown} ({rows} rows); licence: {card.dataset_license or unknown}.",
        f"- Backbone: {base}; licence: {card.base_model_license or unknown}.",
        f"- This bundle: {card.license or 'licence not stated'}.",
    ]
    return "\n".join(lines)


def _numbers(m: Manifest) -> str:
    name, _ = metric_of(m.task)
    operating = [p for p in m.curve if p["kind"] == "operating point"]
    if not operating:
        return "None measured."
    out = [
        "At the calibrated operating point:\n",
        f"| runtime | split | mean depth of {m.n_layers} | {name} | {name} at full depth | "
        + " | ".join(f"leave at {d}" for d in m.exits)
        + " |",
        "|" + " --- |" * (5 + len(m.exits)),
    ]
    for point in operating:
        leaving = " | ".join(f"{100 * point['leaving'][str(d)]:.1f} %" for d in m.exits)
        out.append(
            f"| {point['precision']} | {point['split']} | {point['mean_depth']:.3f} | "
            f"{100 * point[name]:.2f} | {100 * point['full_depth']:.2f} | {leaving} |"
        )
    out.append("\nEach exit's answers on every row:\n")
    out.append(f"| runtime | {' | '.join(f'exit {d}' for d in m.exits)} |")
    out.append("|" + " --- |" * (1 + len(m.exits)))
    for precision in dict.fromkeys(p["precision"] for p in m.curve):
        exits: list[Mapping[str, Any]] = [
            p for p in m.curve if p["kind"] == "exit" and p["precision"] == precision
        ]
        out.append(f"| {precision} | {' | '.join(f'{100 * p[name]:.2f}' for p in exits)} |")
    promised = sentences_of(m.training, _what_agrees(m))
    if promised:
        out.append("\nGuaranteed:\n\n" + promised)
    out.append("\n![quality against mean depth](curve.svg)")
    out.append(
        "\nMeasured by the command below; `offramp evaluate BUNDLE --data FILE` measures again."
    )
    return "\n".join(out)


def _what_agrees(m: Manifest) -> str:
    if m.task.labels:
        return "the same class"
    return f"at most {m.settings.get('tolerance', 0):g} apart"


def _made(m: Manifest, command: str) -> str:
    recipe = m.training["settings"]["recipe"]
    software = ", ".join(f"{name} {v}" for name, v in m.training["software"].items())
    settings = json.dumps(m.training["settings"]["training"])
    minutes = m.training["seconds"] / 60
    shifts = [
        f" After training the logit of `{h['label']}` was shifted by {h['by']:.3f} at every exit "
        "(chosen on dev)."
        for h in m.training["history"]
        if h["stage"] == "shift"
    ]
    return (
        f"Recipe `{recipe}` ({RECIPES[recipe].summary}), seed {m.training['settings']['seed']}, "
        f"{minutes:.0f} minutes on {m.training['threads']} CPU threads (of its last start, if it was "
        f"stopped); {software}.{''.join(shifts)}\n\n```\n{command}\n```\n\n"
        f"Optimisation: `{settings}`. The whole of the settings and every epoch's numbers are in "
        "`bundle.json` under `training`."
    )


def _use(m: Manifest) -> str:
    return (
        "```\nofframp edge run --bundle . --cloud HOST:PORT --input sentences.jsonl\n"
        "offramp cloud serve --bundle . --listen HOST:PORT --tls-dir CERTS\n```\n\n"
        f"The device runs the first {m.split} of {m.n_layers} layers unless told otherwise, in {m.precision}."
    )
