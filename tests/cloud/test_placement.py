"""What Serve is asked for, by `cloud serve` and `cloud deploy` alike."""

from __future__ import annotations

import pytest

from offramp_cloud.backends import Replica
from offramp_cloud.placement import placement_of
from offramp_common.cli import build_parser


@pytest.mark.parametrize(
    "words", [["serve", "--insecure", "--bundle", "b"], ["deploy", "b", "--address", "ray:6379"]]
)
def test_every_setting_of_a_replica_is_one_of_both_commands(words: list[str]) -> None:
    settings = (
        "--device cuda --precision bf16 --max-batch 8 --max-waiting 99 --max-rows 7 --threads 3"
    )
    settings += " --max-frame-bytes 5000 --replicas 2 --max-replicas 4 --scale-down-s 5 --cpus 0.5"
    settings += " --drain-s 6 --trace t.jsonl"
    placement = placement_of(build_parser().parse_args(["cloud", *words, *settings.split()]))
    assert (placement.device, placement.precision) == ("cuda", "bf16")
    assert (placement.load.max_batch, placement.load.max_waiting_rows) == (8, 99)
    assert (placement.limits.max_rows, placement.limits.max_frame_bytes) == (7, 5000)
    assert (placement.replicas, placement.max_replicas, placement.scale_down_s) == (2, 4, 5.0)
    assert (placement.threads, placement.num_cpus, placement.drain_s) == (3, 0.5, 6.0)
    assert placement.trace == "t.jsonl"


def test_replicas_of_two_pods_with_the_same_process_id_are_two() -> None:
    here, there = Replica(7, "10.0.0.1", {}), Replica(7, "10.0.0.2", {})
    assert here.name != there.name
    assert Replica(7, "", {}).name == "7"
