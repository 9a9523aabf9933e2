"""The first answer of each text of one request, provisional or final."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from offramp_edge.answers import Answer


class FirstAnswers:
    """`all` is done once every row has an answer; `answers` then are the first ones, in order."""

    def __init__(self, rows: int) -> None:
        self.all: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answers: dict[int, Answer] = {}
        self._rows = rows

    @property
    def answers(self) -> list[Answer]:
        return [self._answers[row] for row in sorted(self._answers)]

    def note(self, row: int) -> Callable[[Answer], None]:
        """What is to be called with the row's answer."""

        def noted(answer: Answer) -> None:
            self._answers.setdefault(row, answer)
            if len(self._answers) == self._rows and not self.all.done():
                self.all.set_result(None)

        return noted

    async def followed(self, row: int, final: Awaitable[Answer]) -> Answer:
        """The row's final answer, which may be its first too."""
        answer = await final
        self.note(row)(answer)
        return answer
