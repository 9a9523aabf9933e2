"""What a device's connection says beside requests and replies, in bytes: the one table, and where from.

Read off TLS records with `python benchmarks/beside_bytes.py` (grpcio 1.85, TLS 1.3, a client certificate):

    TLS      22 bytes a record: header 5, kind 1, tag 16
    HTTP/2   9 bytes a frame; a PING holds 8 bytes more, a WINDOW_UPDATE 4
    gRPC     5 bytes before a message

A message is one record with one DATA frame: 36 bytes, a reply 3 more for the stream's wrapper. With it travel
two WINDOW_UPDATEs (26 bytes) for what was received since the last: 62 to 65, in `LinkChoice.beside_nbytes`.
"""

from __future__ import annotations

GREETING = ((287, 284),)
"""Legs, each (up, down), of a greeting over a connection that stands."""
CONNECTING = ((0, 0), (1445, 3372), (1255, 400))
"""TCP, TLS with both certificates, HTTP/2's settings with the greeting."""
STREAM_NBYTES = 94 + 37
"""The headers of the call that all work goes through: once a connection, both ways together."""
CANCEL_NBYTES = 55
"""Tells the cloud that nobody waits for a request any more."""
_PING_NBYTES = 4 * 39
"""Each side pings, the other acknowledges; 39 bytes a record."""
_FIRST_S, _LONGER_S, _LONGEST_S, _SOON = 0.1, 0.15, 10.0, 2


class Pings:
    """gRPC's measuring of a connection (bdp_estimator.cc): where data came since the last ping, another one
    after 0.1 s, later after 0.1 to 0.2 s more each time (here: 0.15), up to 10 s. The first data of a device
    opens its stream of work."""

    def __init__(self) -> None:
        self.nbytes = 0  # so far, of the streams' beginnings too
        # device -> (when the latest ping is sent, the pause after it, how many so far)
        self._latest: dict[int, tuple[float, float, int]] = {}

    def connected(self, device: int) -> None:
        """Its work goes over a new connection from now on, which is measured from the start."""
        self._latest.pop(device, None)

    def replied(self, device: int, now_s: float) -> None:
        """A reply reaches the device; the times of one device rise."""
        last = self._latest.get(device)
        if last is None:
            self.nbytes += STREAM_NBYTES + _PING_NBYTES
            self._latest[device] = now_s, _FIRST_S, 1
        elif now_s >= last[0]:  # else the ping that is to come tells of this too
            sent_s, pause_s, count = last
            sent_s = max(now_s, sent_s + pause_s)
            if count >= _SOON:
                pause_s = min(pause_s + _LONGER_S, _LONGEST_S)
            self._latest[device] = sent_s, pause_s, count + 1
            self.nbytes += _PING_NBYTES
