"""`offramp certs`: what it writes, prints and returns."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from offramp_common.certs_cli import add_certs_command
from offramp_common.errors import ConfigError


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    add_certs_command(parser.add_subparsers())
    args = parser.parse_args(["certs", *argv])
    return int(args.run(args))


def test_init_and_issue_write_the_files_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "certs")
    assert run("init", folder, "--host", "cloud", "--host", "10.0.0.1", "--json", "-") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["server"] == {
        "cert": f"{folder}/server.pem",
        "key": f"{folder}/server.key",
    }
    assert f"wrote {folder}/ca.pem and {folder}/ca.key" in printed.err
    assert run("issue", folder, "--name", "cam-1", "--days", "3") == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"wrote {folder}/cam-1.pem and {folder}/cam-1.key\n"


def test_a_new_authority_names_the_devices_to_issue_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("init", str(tmp_path))
    run("issue", str(tmp_path), "--name", "cam-2")
    run("issue", str(tmp_path), "--name", "cam-1")
    with pytest.raises(ConfigError, match="exist already"):
        run("init", str(tmp_path))
    capsys.readouterr()
    run("init", str(tmp_path), "--force")
    assert "issue again, the old authority is gone: cam-1, cam-2" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["init"], ["issue", "d"], ["init", "d", "--days", "x"]])
def test_wrong_arguments_end_with_code_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*argv)
    assert ended.value.code == 2
