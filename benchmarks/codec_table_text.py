"""The page's tables from the results of codec_table.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def tables(results: Mapping[str, Any]) -> str:
    parts = [costs_table(name, cell) for name, cell in results["costs"].items()]
    for name, sets in results["quality"].items():
        parts += [quality_table(name, data, cell) for data, cell in sets.items()]
    return "\n\n".join(parts)


def costs_table(name: str, cell: Mapping[str, Any]) -> str:
    shape = " x ".join(map(str, cell["shape"]))
    lines = [f"| {name}, {shape} after {cell['depth']} layers | bytes | encode ms | decode ms |"]
    lines.append("| --- | --- | --- | --- |")
    for row in cell["rows"]:
        if row["error"]:
            lines.append(f"| {row['codec']} | {row['error'].replace('|', '/')} | | |")
            continue
        ms = [f"{row[step]['median']:.2f}" for step in ("encode_ms", "decode_ms")]
        lines.append(f"| {row['codec']} | {row['bytes']:,} | {' | '.join(ms)} |")
    return "\n".join(lines)


def quality_table(name: str, data: str, cell: Mapping[str, Any]) -> str:
    """Points below the uncut model (bytes of a row) for each codec and split."""
    rows = {(row["codec"], row["depth"]): row for row in cell["rows"]}
    depths = sorted({depth for _, depth in rows})
    count = cell["rows"][0]["rows"]
    head = f"{name} on {data}, {count} rows, uncut {100 * cell['uncut']:.2f}"
    lines = [f"| {head} | " + " | ".join(f"after {depth}" for depth in depths) + " |"]
    lines.append("| --- |" + " --- |" * len(depths))
    for codec in dict.fromkeys(codec for codec, _ in rows):
        cells = []
        for depth in depths:
            row = rows.get((codec, depth))
            shown = f"{row['points']:+.2f} ({row['nbytes']:,.0f} B)" if row else "-"
            cells.append(shown)
        lines.append(f"| {codec} | {' | '.join(cells)} |")
    return "\n".join(lines)
