"""Methods side by side that leave by the same kind of rule: six groups, so that plots can be read."""

from __future__ import annotations

from dataclasses import dataclass

from reading import lines_of

from offramp_model.methods import METHODS


@dataclass(frozen=True, slots=True)
class Family:
    """lines: names of methods, and of a method's other rule, as in the results."""

    title: str
    lines: tuple[str, ...]


FAMILIES = (
    Family(
        "entropy of one exit",
        ("deebert", "fastbert", "romebert", "berxit (entropy)", "elasticbert"),
    ),
    Family("probability from several layers", ("right_tool", "past_future", "class_means")),
    Family(
        "patience: exits in a row agree",
        ("pabee", "leebert", "elasticbert (patience)", "gaml_bert"),
    ),
    Family("votes, windows, patient confidence", ("ensemble_ic", "elbert", "pcee_bert")),
    Family("learned when to leave", ("berxit", "cats", "dact_bert", "palbert", "be3r")),
    Family("exit chosen beforehand", ("uee_ucb", "uee_ucb (online)")),
)


def all_lines() -> list[str]:
    """Every line of the comparison, in the table's order."""
    return [line for method in METHODS for line in lines_of(method)]


_listed = [line for family in FAMILIES for line in family.lines]
if sorted(_listed) != sorted(all_lines()):
    raise RuntimeError(
        "families.py: every line must be in one family: "
        f"{sorted(set(_listed) ^ set(all_lines())) or 'one is in two'}"
    )
