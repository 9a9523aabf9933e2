"""What a run of many answers comes to, in memory that does not grow with them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from offramp_edge.answers import Answer

_STEP = math.log(1.02)


class Percentiles:
    """Percentiles of positive numbers, exact to 1 %: counts in buckets that are 2 % wide."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, value: float) -> None:
        self._counts[round(math.log(max(value, 1e-6)) / _STEP)] += 1

    def at(self, share: float) -> float | None:
        """The value that `share` of all stay below or at; None without any."""
        wanted = share * self._counts.total()
        seen = 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= wanted:
                return math.exp(bucket * _STEP)
        return None


@dataclass
class Tally:
    """Add answers, then read `to_json`."""

    answered: int = 0
    failed: int = 0
    right: int = 0
    classes: int = 0  # answers that are classes, with a label to compare with
    squared_error: float = 0.0
    values: int = 0  # answers that are numbers, with one
    bytes_up: int = 0
    bytes_down: int = 0
    where: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    depths: Counter[int] = field(default_factory=Counter)
    ms: Percentiles = field(default_factory=Percentiles)

    def add(self, answer: Answer, expected: str | float | None) -> None:
        """`expected` is the input's label, where it has one."""
        self.answered += 1
        self.where[answer.where] += 1
        self.depths[answer.exit_depth] += 1
        self.ms.add(answer.ms)
        self.bytes_up += answer.bytes_up
        self.bytes_down += answer.bytes_down
        if answer.reason:
            self.reasons[answer.reason] += 1
        if expected is None:
            return
        if isinstance(answer.label, str):
            self.classes += 1
            self.right += str(expected) == answer.label
        elif isinstance(expected, float | int):
            self.values += 1
            self.squared_error += (expected - answer.label) ** 2

    def to_json(self, seconds: float) -> dict[str, Any]:
        n = self.answered
        total = sum(depth * count for depth, count in self.depths.items())
        return {
            "n": n,
            "failed": self.failed,
            "labelled": self.classes + self.values,
            "accuracy": self.right / self.classes if self.classes else None,
            "mean_squared_error": self.squared_error / self.values if self.values else None,
            "where": dict(self.where),
            "reasons": dict(self.reasons),
            "exit_depths": {str(depth): self.depths[depth] for depth in sorted(self.depths)},
            "mean_depth": total / n if n else None,
            "p50_ms": self.ms.at(0.50),
            "p95_ms": self.ms.at(0.95),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": seconds,
        }

    def words(self, seconds: float) -> str:
        """The same for people."""
        n = self.answered
        if not n:
            return f"nothing answered, {self.failed} bad lines" if self.failed else "no input"
        lines = [f"{n} answered in {seconds:.1f} s ({n / seconds:.0f} a second)"]
        if self.failed:
            lines[0] += f", {self.failed} bad lines"
        if self.classes:
            share = self.right / self.classes
            lines.append(f"accuracy    {share:.1%} of {self.classes} labelled")
        if self.values:
            error = self.squared_error / self.values
            lines.append(f"mean squared error {error:.4g} of {self.values} labelled")
        places = (f"{where} {count / n:.1%}" for where, count in self.where.most_common())
        lines.append(f"answered    {', '.join(places)}")
        if self.reasons:
            whys = (f"{reason} {count}" for reason, count in self.reasons.most_common())
            lines.append(f"fallbacks   {', '.join(whys)}")
        depths = (f"{depth}: {self.depths[depth] / n:.1%}" for depth in sorted(self.depths))
        lines.append(f"exit depth  {', '.join(depths)}")
        lines.append(f"latency     p50 {self.ms.at(0.5):.1f} ms, p95 {self.ms.at(0.95):.1f} ms")
        lines.append(f"bytes up    {self.bytes_up} ({self.bytes_up / n:.0f} a sample)")
        return "\n".join(lines)
