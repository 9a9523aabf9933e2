"""`python -m offramp_common` is `offramp`: how one offramp process starts another."""

from offramp_common.cli import console_main

console_main()
