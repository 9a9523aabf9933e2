"""What a link's bandwidth and latency do: the link emulator and the simulator.

`links` is arithmetic on a clock that the caller owns, so that the emulator (real time) and the
simulator (virtual time) shape bytes with the same code.
"""
