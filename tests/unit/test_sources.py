"""Where `explain`, `audit` and `mirror` read from, and what they say where nothing answers."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hivetrain.errors import ConfigError
from neurons import sources
from neurons.sources import open_source, whose


class Genesis:
    hub_repo, wallets = "hivetrain/model", ()

    def __init__(self, port: int) -> None:
        self.hub_endpoint = f"http://127.0.0.1:{port}"


def test_a_network_that_does_not_run_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "genesis.json").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(sources, "read_genesis", lambda _: Genesis(port))
        assert open_source(dir=tmp_path).endpoint == f"http://127.0.0.1:{port}"
    with pytest.raises(ConfigError, match=rf"hub http://127.0.0.1:{port} does not answer. Start it again with"):
        open_source(dir=tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    assert open_source(dir=tmp_path, copy=copy).label == str(copy)  # needs no hub


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("5Abc", "is the beginning of several miners of epoch 3; its miners: 5AbcX, 5AbcY, 5Z"),
        ("5Ab", "is no miner's hotkey in"),  # too short to mean anybody
        ("", "is no miner's hotkey in"),
        ("5Nobody", "is no miner's hotkey in"),
    ],
)
def test_the_beginning_of_no_or_several_hotkeys_is_refused(asked: str, says: str) -> None:
    miners = ("5AbcY", "5AbcX", "5Z")
    assert whose("5AbcX", miners, 3) == "5AbcX"
    assert whose("5Z", miners, 3) == "5Z"
    with pytest.raises(ConfigError, match=says):
        whose(asked, miners, 3)
