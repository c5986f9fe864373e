"""What a `hivemind_config` may hold, where peers come from, and what is printed for the next one."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path

import pytest

from hivetrain.errors import ConfigError
from hivetrain.trainer.config import DHT_OPTIONS, OPT_OPTIONS, as_dict, read_config
from hivetrain.trainer.peers import join_lines, peers_of

PEER = "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWGDvW7yeufqF9FZiPgvvkZusHwmaZHQR4RrRRHCBoXJPz"


def config(dht: dict[str, object] | None = None, **opt: object) -> dict[str, object]:
    return {"dht": dht or {}, "opt": {"run_id": "spanish", "target_batch_size": 128, **opt}}


def test_a_dict_a_json_object_and_a_file_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "swarm.json"
    file.write_text(json.dumps(config()))
    assert as_dict(config()) == as_dict(json.dumps(config())) == as_dict(str(file)) == config()


def test_the_dht_may_be_left_out() -> None:
    read = read_config({"opt": {"run_id": "spanish", "target_batch_size": 128, "verbose": True}})
    assert (read.run_id, read.target_batch_size, read.initial_peers) == ("spanish", 128, [])
    assert read.opt["verbose"] is True


def test_defaults_are_those_that_keep_peers_equal() -> None:
    opt = read_config(config()).opt
    assert opt["delay_state_averaging"] is False
    assert opt["average_state_every"] == 10


def test_a_request_ends_before_the_matchmaking_does() -> None:
    for seconds in (1.0, 3.0, 60.0):
        options = read_config(config(matchmaking_time=seconds, averaging_timeout=100)).opt["averager_opts"]
        assert isinstance(options, dict)
        assert options["request_timeout"] < seconds


def test_a_peers_two_averagers_listen_on_ports_of_their_own() -> None:
    fixed = read_config(config({"host_maddrs": ["/ip4/0.0.0.0/tcp/4001"]}))
    assert [fixed.reach(place).bulk_port for place in (0, 1)] == [5001, 5002]
    anywhere = read_config(config())
    assert [anywhere.reach(place).bulk_port for place in (0, 1)] == [None, None]
    assert anywhere.reach(0).host_maddrs == ("/ip4/127.0.0.1/tcp/0",)


def test_behind_a_router_the_state_goes_by_the_port_that_is_forwarded() -> None:
    announced = ["/ip4/192.0.2.1/tcp/4001"]
    behind = read_config(config({"host_maddrs": ["/ip4/0.0.0.0/tcp/4001"], "announce_maddrs": announced}))
    assert [behind.reach(place).bulk for place in (0, 1)] == [True, False]
    assert behind.reach(0).announce_maddrs == tuple(announced)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{not json", "not JSON"),
        ("/no/such/file.json", "neither a JSON object nor a readable file"),
        ({"opt": {"target_batch_size": 4}}, "run_id"),
        ({"opt": {"run_id": "a.b", "target_batch_size": 4}}, "without a '.'"),
        ({"opt": {"run_id": "a"}}, "target_batch_size"),
        ({"opt": {"run_id": "a", "target_batch_size": "128"}}, "number of samples"),
        ({"opt": {"run_id": "a", "target_batch_size": True}}, "number of samples"),
        ({"opts": {}}, "did you mean 'opt'"),
        (config(target_batchsize=3), "did you mean 'target_batch_size'"),
        (config({"initial_peer": []}), "did you mean 'initial_peers'"),
        (config({"initial_peers": ["192.0.2.1:4001"]}), "not a multiaddress"),
        (config({"initial_peers": ["/ip4/192.0.2.1/tcp/4001"]}), "must end in /p2p/"),
        (config({"host_maddrs": 4001}), "list of multiaddresses"),
        (config(reuse_grad_buffers=True), "all but the last batch would be lost"),
        (config(auxiliary=True), "no batches"),
        (config(scheduler="linear"), "follows the swarm's epoch"),
        (config(grad_compression="zip"), "must be one of none, float16"),
        (config(grad_compression="blockwise_8bit"), "of hivemind's own all-reduce, which SwarmTrainer does not use"),
        (config(state_averaging_compression="int8"), "must be one of none, float16, got 'int8'"),
        (config(averager_opts={"part_size_bytes": 1, "bandwidth": 2}), "cannot set bandwidth, part_size_bytes"),
        (config(matchmaking_time=0), "seconds above 0"),
        (config(matchmaking_time=10, averaging_timeout=10), "above matchmaking_time"),
        (config(averager_opts={"request_timeout": 30}), "below matchmaking_time"),
        (config(average_state_every=0), "from 1"),
        (config(grad_compression=object()), "JSON values only"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(given: dict[str, object] | str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(given)


def test_the_names_of_options_are_hiveminds_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hivemind
        from hivemind.dht.node import DHTNode
        from hivemind.p2p import P2P
    assert set(inspect.signature(hivemind.Optimizer.__init__).parameters) - {"self"} == OPT_OPTIONS
    known = {
        name
        for called in (hivemind.DHT.__init__, DHTNode.create, P2P.create)
        for name in inspect.signature(called).parameters
    }
    assert known >= DHT_OPTIONS


def test_peers_come_from_the_dict_the_environment_and_a_file_each_once(tmp_path: Path) -> None:
    file = tmp_path / "peers"
    file.write_text(f"# our lab\n{PEER}x  # desk\n\n{PEER}y\n")
    extra = peers_of({"PEERS": f"{PEER},{PEER}z"}, str(file))
    assert read_config(config({"initial_peers": [PEER]}), extra).initial_peers == [
        PEER,
        PEER + "z",
        PEER + "x",
        PEER + "y",
    ]


@pytest.mark.parametrize("wrong", ["192.0.2.1", "/ip4/192.0.2.1/tcp/1"])
def test_a_malformed_peer_names_where_it_was_read(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match="PEERS holds"):
        peers_of({"PEERS": wrong}, None)
    (tmp_path / "peers").write_text(wrong)
    with pytest.raises(ConfigError, match="peers holds"):
        peers_of({}, str(tmp_path / "peers"))


def test_a_missing_peers_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        peers_of({}, str(tmp_path / "none"))


def test_what_is_printed_can_be_copied() -> None:
    line, command, *rest = join_lines([PEER], ["python", "my script.py", "--lr", "1"])
    assert line == f"To join the training, use initial_peers = ['{PEER}']"
    assert f"PEERS={PEER} python 'my script.py' --lr 1" in command
    assert not rest
    assert "this machine only" in join_lines([PEER.replace("192.0.2.1", "127.0.0.1")], [])[-1]
