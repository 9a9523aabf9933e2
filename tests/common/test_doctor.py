from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from offramp_common.doctor_cli import examine
from offramp_common.errors import ConfigError

# A Python in which torch, transformers and ray cannot be imported, as on a device.
_BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "ray", "onnx", "onnxscript"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None
sys.meta_path.insert(0, Absent())
from offramp_common.cli import main
sys.exit(main(sys.argv[1:]))
"""


def _states(bundle: str | None = None, cloud: str | None = None) -> dict[str, str]:
    return {check.name: check.state for check in examine(bundle, cloud)}


def test_this_installation_is_whole() -> None:
    broken = [check for check in examine() if check.state == "broken"]
    assert not broken, broken


def test_a_device_without_torch_and_ray_is_in_order_and_is_told_what_it_lacks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BARE, "doctor", "--json", "-"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert report["ok"] is True
    assert states["torch"] == states["ray"] == "missing"
    assert states["wire code"] == "ok"
    torch = next(check for check in report["checks"] if check["name"] == "torch")
    assert "pip install 'offramp[torch]'" in torch["why"]
    assert "train" in torch["why"]


def test_a_damaged_bundle_is_broken(tmp_path: Path) -> None:
    assert _states(str(tmp_path))["bundle"] == "broken"


def test_the_clouds_port_is_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert _states(cloud=f"127.0.0.1:{port}")["cloud"] == "ok"
    assert _states(cloud=f"127.0.0.1:{port}")["cloud"] == "broken"


@pytest.mark.parametrize("text", ["nohost", ":1", "host:port", "host:0", "host:70000"])
def test_a_malformed_address_is_a_usage_error(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        list(examine(cloud=text))


def test_a_broken_check_gives_exit_code_1(tmp_path: Path) -> None:
    from offramp_common.cli import CHECK_FAILED, main

    assert main(["doctor", "--bundle", str(tmp_path)]) == CHECK_FAILED
