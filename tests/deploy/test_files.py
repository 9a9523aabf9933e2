"""Images, compose file, unit and dashboard name commands, ports and files that the code knows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from deployed import DEPLOY, command, dockerfile, entry_point, parsed

from offramp_common.certs import pair_of


@pytest.mark.parametrize("tier", ["cloud", "edge"])
def test_an_images_own_command_is_taken_and_listens_where_it_says(tier: str) -> None:
    args = parsed([*entry_point(tier), *command(tier)])
    exposed = re.search(r"^EXPOSE (\d+)", dockerfile(tier), re.MULTILINE)
    assert exposed is not None
    assert args.listen == f"0.0.0.0:{exposed[1]}"


@pytest.mark.parametrize("tier", ["cloud", "edge"])
def test_an_image_runs_as_the_user_that_it_makes(tier: str) -> None:
    text = dockerfile(tier)
    made = re.search(r"useradd --uid (\d+)", text)
    used = re.search(r"^USER (\d+)", text, re.MULTILINE)
    assert made is not None
    assert used is not None
    assert made[1] == used[1] != "0"


def test_composes_commands_are_taken_and_its_files_are_mounted() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        tier = Path(service["build"]["dockerfile"]).suffix.removeprefix(".")
        args = parsed([*entry_point(tier), *service.get("command", command(tier))])
        mounted = [volume.split(":")[1] for volume in service["volumes"]]
        files = [value for key, value in vars(args).items() if key in ("ca", "cert", "key")]
        if tier == "cloud":
            pairs = (pair_of(args.tls_dir, "ca").cert, *pair_of(args.tls_dir, "server"))
            files += map(str, pairs)
            assert str(pair_of(args.tls_dir, "ca").key) not in mounted, "it can make devices"
        files += [str(path) for path in ([args.bundle] if tier == "edge" else args.bundle)]
        for path in files:
            assert any(Path(path).is_relative_to(mount) for mount in mounted), (name, path)
        published = [port.rpartition(":")[2] for port in service.get("ports", [])]
        assert all(args.listen.endswith(f":{port}") for port in published)


def test_the_units_command_is_taken() -> None:
    unit = (DEPLOY / "offramp-edge.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    args = parsed(shlex.split(line))
    assert args.listen.startswith("127.0.0.1:"), "without TLS, for this machine's programs alone"
    assert args.ca
    loaded = re.findall(r"^LoadCredential=(\S+):", unit, re.MULTILINE)
    assert [Path(args.key).name] == loaded
