"""Samples kept on disk until the cloud is back, and their final answers, each written once.

A folder with `spool.sqlite` and `answers.jsonl`. A sample is durable when `keep` returns, gone from the
spool when its answer is in the file, and never in the file twice, whenever the process is killed or the
power fails:

    answered   one transaction moves the sample out of `waiting` and its line into `outbox`
    delivered  the line is written at the offset that the database knows and synchronised; a second
               transaction empties the outbox and moves the offset

A process that dies between the two finds the outbox full: what is behind the offset is cut off and written
again, the same bytes at the same place. The file belongs to the spool: take it away whole (it starts anew),
and do not append to it. Beyond its size the spool drops the oldest samples: what has waited longest is worth
least. SQLite is in WAL mode and synchronises every commit.
"""

from __future__ import annotations

import json
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp_common.errors import ConfigError
from offramp_edge.answers import Sample

_SCHEMA = """
CREATE TABLE IF NOT EXISTS waiting (number INTEGER PRIMARY KEY AUTOINCREMENT, nbytes INTEGER, sample TEXT);
CREATE TABLE IF NOT EXISTS outbox (number INTEGER PRIMARY KEY, line TEXT);
CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, value INTEGER);
INSERT OR IGNORE INTO counts VALUES ('written', 0), ('answered', 0), ('dropped', 0);
"""
_OVERHEAD = 64
"""What a sample takes beside its text, about, in bytes."""


@dataclass(frozen=True, slots=True)
class Kept:
    number: int
    sample: Sample


class Spool:
    """Used by one thread at a time, and by one process: a second one that opens the folder is refused. Its
    numbers may be read by any.

    waiting, nbytes   samples that wait for the cloud, and their size
    final, dropped    final answers written, and samples given up for want of room, over the folder's life
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Go on from what the folder holds. ConfigError where that cannot be."""
        self._max_bytes = max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = _opened(folder / "spool.sqlite")
            self._file = os.open(folder / "answers.jsonl", os.O_RDWR | os.O_CREAT, 0o600)
            self._restore()
            _synchronise(folder)
        except sqlite3.OperationalError as error:
            raise ConfigError(
                f"spool {folder}: {error}; another process may use it: give each its own folder"
            ) from error
        except (OSError, sqlite3.DatabaseError) as error:
            raise ConfigError(f"spool {folder}: cannot be used ({error})") from error

    def close(self) -> None:
        self._db.close()
        os.close(self._file)

    def keep(self, sample: Sample) -> None:
        """Durable when this returns. Raises sqlite3.Error when the disk does not take it."""
        text = json.dumps(_to_json(sample))
        nbytes = len(text.encode()) + _OVERHEAD
        with self._db:
            self._db.execute("INSERT INTO waiting (nbytes, sample) VALUES (?, ?)", (nbytes, text))
            dropped, freed = self._make_room(nbytes)
        self.waiting += 1 - dropped
        self.nbytes += nbytes - freed
        self.dropped += dropped

    def oldest(self) -> Kept | None:
        """The sample that has waited longest."""
        row = self._db.execute(
            "SELECT number, sample FROM waiting ORDER BY number LIMIT 1"
        ).fetchone()
        return None if row is None else Kept(row[0], _from_json(json.loads(row[1])))

    def answered(self, kept: Kept, record: dict[str, Any]) -> bool:
        """Write the final answer, once; False where the sample was dropped meanwhile. `record` gets the
        sample's own id and its number in the spool, by which a reader tells lines apart."""
        sample = kept.sample
        ident = sample.id if sample.ref is None else sample.ref
        line = json.dumps({**record, "id": ident, "spooled": kept.number}) + "\n"
        with self._db:
            row = self._db.execute(
                "DELETE FROM waiting WHERE number = ? RETURNING nbytes", (kept.number,)
            ).fetchone()
            if row is None:
                return False
            self._db.execute("INSERT INTO outbox VALUES (?, ?)", (kept.number, line))
        self.waiting -= 1
        self.nbytes -= row[0]
        self._deliver()
        return True

    def _make_room(self, nbytes: int) -> tuple[int, int]:
        """(samples, bytes) dropped, the oldest first, inside a transaction."""
        excess, dropped, freed = self.nbytes + nbytes - self._max_bytes, 0, 0
        if excess > 0:
            for number, size in self._db.execute(
                "SELECT number, nbytes FROM waiting ORDER BY number"
            ):
                if freed >= excess:
                    break
                dropped, freed, last = dropped + 1, freed + size, number
            self._db.execute("DELETE FROM waiting WHERE number <= ?", (last,))
            self._db.execute(
                "UPDATE counts SET value = value + ? WHERE name = 'dropped'", (dropped,)
            )
        return dropped, freed

    def _restore(self) -> None:
        with self._db:
            self._db.execute("DELETE FROM waiting WHERE number IN (SELECT number FROM outbox)")
        row = self._db.execute("SELECT COUNT(*), COALESCE(SUM(nbytes), 0) FROM waiting").fetchone()
        self.waiting, self.nbytes = row
        self.final, self.dropped = self._count("answered"), self._count("dropped")
        written = min(self._count("written"), os.fstat(self._file).st_size)
        os.ftruncate(self._file, written)
        with self._db:
            self._db.execute("UPDATE counts SET value = ? WHERE name = 'written'", (written,))
        self._deliver()

    def _deliver(self) -> None:
        lines = [line for (line,) in self._db.execute("SELECT line FROM outbox ORDER BY number")]
        if not lines:
            return
        data, at = "".join(lines).encode(), self._count("written")
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], at + done)
        os.fsync(self._file)
        with self._db:
            self._db.execute("DELETE FROM outbox")
            self._db.execute(
                "UPDATE counts SET value = value + CASE name WHEN 'written' THEN ? ELSE ? END "
                "WHERE name IN ('written', 'answered')",
                (len(data), len(lines)),
            )
        self.final += len(lines)

    def _count(self, name: str) -> int:
        (value,) = self._db.execute("SELECT value FROM counts WHERE name = ?", (name,)).fetchone()
        return int(value)


def _opened(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=0.2, check_same_thread=False)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA journal_size_limit = 1048576")
        db.executescript(_SCHEMA)
    except BaseException:
        db.close()
        raise
    return db


def _synchronise(folder: Path) -> None:
    """New names in a folder are durable once the folder is."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _to_json(sample: Sample) -> dict[str, Any]:
    # A deadline is of no use to what is answered afterwards.
    value: dict[str, Any] = {"text": sample.text, "id": sample.id, "ref": sample.ref}
    return value | ({"traceparent": sample.traceparent} if sample.traceparent else {})


def _from_json(value: dict[str, Any]) -> Sample:
    text = value["text"]
    return Sample(
        tuple(text) if isinstance(text, list) else text,
        value["id"],
        traceparent=value.get("traceparent", ""),
        ref=value["ref"],
    )
