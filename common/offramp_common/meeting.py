"""Whether rows that wait below are worth fetching before those above go on: the rule of the cloud's engine,
and of the simulator's."""

from __future__ import annotations

from typing import NamedTuple


class Meeting(NamedTuple):
    """What fetching would come to. So many rows from `below` come up to where `upper` others wait, and all go
    on together; or else the upper ones finish first.

    climb_s       of those below, up to the others
    below_s, upper_s, together_s   from there on: either alone, and both at once
    """

    below: int
    upper: int
    climb_s: float
    below_s: float
    upper_s: float
    together_s: float

    @property
    def worth(self) -> bool:
        """Whether the sum of all waits falls.

        Gained: those below finish earlier by what sharing saves. Lost: the others finish later by the
        climb, and by the longer layers above. Both are weighed by rows.
        """
        saved_s = self.upper_s + self.below_s - self.together_s
        later_s = self.climb_s + self.together_s - self.upper_s
        return self.below * saved_s > self.upper * later_s

    def rescues(self, slack_below_s: float, slack_upper_s: float) -> bool | None:
        """True where somebody below meets a deadline only if fetched, False where somebody above would
        miss one for it, None where deadlines say nothing; given the shortest time left on each side."""
        fetched_s = self.climb_s + self.together_s
        if self.upper_s <= slack_upper_s < fetched_s:
            return False
        if fetched_s <= slack_below_s < self.upper_s + self.climb_s + self.below_s:
            return True
        return None

    def fetched(self, slack_below_s: float, slack_upper_s: float) -> bool:
        """Whether those below come first: deadlines decide, then the sum of all waits."""
        rescued = self.rescues(slack_below_s, slack_upper_s)
        return self.worth if rescued is None else rescued
