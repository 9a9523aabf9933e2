"""What the planner decided, as a table: for people, and as plain data."""

from __future__ import annotations

from typing import Any

from offramp_edge.planner import AutoPlanner
from offramp_edge.planning import Planner, Standing
from offramp_edge.solve import FEWEST_TOKENS, Problem, Stage

_TOKENS = 4  # as the planner tells lengths apart


def explained(planner: Planner) -> dict[str, Any]:
    """The decision for a sample of usual length that comes alone, from its start on: what is believed, and
    for each depth the options with their predicted milliseconds and bytes, and the choice for each range of
    confidence. Of a planner that weighs nothing only its name."""
    if not isinstance(planner, AutoPlanner):
        return {"plan": repr(planner)}
    n_tokens = -(-round(planner.usual_tokens) // _TOKENS) * _TOKENS
    standing = Standing(0, n_tokens)
    problem, stages = planner.problem(standing), planner.stages(standing)
    return {
        "n_tokens": n_tokens,
        "believed": _believed(problem),
        "depths": [_depth(planner, problem, stage) for stage in stages],
    }


def _believed(problem: Problem) -> dict[str, float]:
    per_layer = problem.cloud_token_ms * max(problem.n_tokens, FEWEST_TOKENS)
    return {
        "rtt_ms": round(problem.rtt_ms, 2),
        "uplink_mbps": round(8e-3 / problem.ms_per_byte, 3),
        "queue_ms": round(problem.queue_ms, 2),
        "device_layer_ms": round(sum(problem.layer_ms) / len(problem.layer_ms), 3),
        "cloud_layer_ms": round(per_layer, 3),
        "cloud_queue_ms": round(problem.cloud_queue_ms, 3),
    }


def _depth(planner: AutoPlanner, problem: Problem, stage: Stage) -> dict[str, Any]:
    solver = planner.solver
    outlook = solver.outlooks[solver.place[stage.depth]]
    layers = solver.left_at(stage.depth)
    mean_layers = sum(share * n for share, n in zip(outlook.share, layers, strict=True))
    before_ms = sum(problem.layer_ms[: stage.depth])
    options = []
    for option in (
        planner.menu.all_at(stage.depth, problem.n_tokens) if problem.options[stage.depth] else ()
    ):
        link_ms = problem.rtt_ms + option.nbytes * problem.ms_per_byte
        cloud_ms = problem.cloud_token_ms * max(option.tokens, FEWEST_TOKENS) * mean_layers
        cloud_ms += problem.cloud_queue_ms
        options.append(
            {
                "codec": option.label,
                "bytes": option.nbytes,
                "encode_ms": round(option.encode_ms, 3),
                "link_ms": round(link_ms, 2),
                "cloud_ms": round(cloud_ms, 2),
                "total_ms": round(before_ms + option.encode_ms + link_ms + cloud_ms, 2),
            }
        )
    return {
        "depth": stage.depth,
        "device_ms": round(before_ms, 2),
        "exit": stage.depth in solver.exits,
        "options": options,
        "choices": [
            _choice(stage, b, outlook.edges, outlook.share[b]) for b in range(len(stage.go))
        ],
    }


def _choice(stage: Stage, bin_: int, edges: tuple[float, ...], share: float) -> dict[str, Any]:
    option, sends = stage.option[bin_], stage.sends(bin_)
    return {
        "confidence_from": edges[bin_ - 1] if bin_ else 0.0,
        "share": share,
        "send_ms": None if option is None else round(stage.send[bin_], 2),
        "go_on_ms": round(stage.go[bin_], 2),
        "choice": "go on" if not sends or option is None else f"send {option.label}",
    }


def in_words(about: dict[str, Any]) -> str:
    """The table for people."""
    if "plan" in about:
        return f"every sample the same way: {about['plan']}"
    believed = about["believed"]
    lines = [
        f"the plan for a sample of {about['n_tokens']} tokens that comes alone",
        f"link    round trip {believed['rtt_ms']:.1f} ms, uplink {believed['uplink_mbps']:.2f} Mbit/s",
        f"layers  {believed['device_layer_ms']:.2f} ms each here, {believed['cloud_layer_ms']:.2f} ms in the "
        f"cloud after {believed['cloud_queue_ms']:.1f} ms of waiting",
        "depth   here ms  send as                 bytes  in all ms   choice (costs from there in ms)",
    ]
    for row in about["depths"]:
        told = _choices_in_words(row["choices"])
        options = row["options"] or [None]
        for number, option in enumerate(options):
            left = f"{row['depth']:>5}  {row['device_ms']:>8.1f}" if not number else " " * 15
            sent = (
                "not to be sent"
                if option is None
                else (f"{option['codec']:<20} {option['bytes']:>8} {option['total_ms']:>10.1f}")
            )
            lines.append(
                f"{left}  {sent:<40}   {told[number] if number < len(told) else ''}".rstrip()
            )
        lines += [f"{'':<57}   {more}" for more in told[len(options) :]]
    return "\n".join(lines)


def _choices_in_words(choices: list[dict[str, Any]]) -> list[str]:
    """Neighbouring ranges with the same choice in one line."""
    lines, start = [], 0
    for at, choice in enumerate(choices):
        if at + 1 < len(choices) and choices[at + 1]["choice"] == choice["choice"]:
            continue
        upto = choices[at + 1]["confidence_from"] if at + 1 < len(choices) else 1.0
        first = choices[start]
        sent = "" if first["send_ms"] is None else f", send {first['send_ms']:.1f}"
        where = (
            f"confidence {first['confidence_from']:.2f} to {upto:.2f}: " if len(choices) > 1 else ""
        )
        lines.append(f"{where}{choice['choice']} (go on {first['go_on_ms']:.1f}{sent})")
        start = at + 1
    return lines
