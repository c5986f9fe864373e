from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from hivetrain.errors import ConfigError, ServiceError
from neurons import plan as plan_module
from neurons.plan import UpOptions, check_attack, choose_ports, make_plan, neuron_flags, prepare_dir
from neurons.report import Genesis, Member, read_genesis, read_scores, read_states
from template.config import parse_config


def genesis(*names: str) -> Genesis:
    wallets = [Member(name=name, hotkey_name="default", role=name.split("-")[0], ss58=f"key-{name}") for name in names]
    return Genesis(
        run_id="r",
        netuid=2,
        chain_endpoint="sqlite:///tmp/x/chain.db",
        hub_endpoint="http://127.0.0.1:8800",
        block_time_s=0.5,
        wallets=tuple(wallets),
    )


def test_ports_are_free_distinct_and_remembered(tmp_path: Path) -> None:
    names = ["hub", "dashboard", "miner-1"]
    ports = choose_ports(tmp_path, names, None)
    assert len(set(ports.values())) == 3
    assert choose_ports(tmp_path, names, None) == ports
    more = choose_ports(tmp_path, [*names, "miner-2"], None)
    assert {name: more[name] for name in names} == ports


def test_a_hub_port_taken_meanwhile_is_a_clear_error(tmp_path: Path) -> None:
    port = choose_ports(tmp_path, ["hub"], None)["hub"]
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError, match=f"port {port} .*hub is in use"):
        choose_ports(tmp_path, ["hub"], None)


def test_another_port_taken_meanwhile_is_replaced(tmp_path: Path) -> None:
    port = choose_ports(tmp_path, ["miner-1"], None)["miner-1"]
    with socket.create_server(("127.0.0.1", port)):
        assert choose_ports(tmp_path, ["miner-1"], None)["miner-1"] != port


def test_a_port_base_in_use_is_a_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} \(hub\) is in use; choose another --port-base"):
            choose_ports(tmp_path, ["hub"], port)


def test_an_unreadable_ports_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "ports.json").write_text("{")
    assert set(choose_ports(tmp_path, ["hub"], None)) == {"hub"}
    assert "hub" in json.loads((tmp_path / "ports.json").read_text())


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_somebody_else_is_never_emptied(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds other files \(thesis\.tex\)"):
        prepare_dir(tmp_path, fresh)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_fresh_empties_our_own_folder(tmp_path: Path) -> None:
    prepare_dir(tmp_path, fresh=False)
    (tmp_path / "hub").mkdir()
    (tmp_path / "genesis.json").write_text("{}")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    (tmp_path / "link").symlink_to(outside)
    prepare_dir(tmp_path, fresh=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hivetrain.dir"]
    assert (outside / "file").read_text() == "kept"


def test_what_a_genesis_cut_short_left_is_cleared_and_a_whole_one_is_kept(tmp_path: Path) -> None:
    prepare_dir(tmp_path, fresh=False)
    for name in ("hub", "wallets", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "chain.db").write_text("half")
    prepare_dir(tmp_path, fresh=False)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hivetrain.dir", "logs"]
    (tmp_path / "hub").mkdir()
    (tmp_path / "genesis.json").write_text("{}")
    prepare_dir(tmp_path, fresh=False)
    assert (tmp_path / "hub").exists()


def test_the_flags_of_a_started_neuron_are_those_that_a_neuron_takes(tmp_path: Path) -> None:
    options = UpOptions(dir=tmp_path, num_miners=1)
    network = genesis("miner-1", "validator-1")
    for member in network.wallets:
        flags = neuron_flags(options, member, network, axon_port=9001)
        config = parse_config(flags, "miner" if member.role == "miner" else "validator", {})
        assert config.name == member.name
        assert config.state_dir == tmp_path / member.name
        assert config.run_dir == tmp_path
        assert config.subtensor.chain_endpoint == "sqlite:///tmp/x/chain.db"
        assert (config.axon.port, config.axon.ip) == (9001, "127.0.0.1")


def test_the_plan_starts_what_was_asked_for_in_order(tmp_path: Path) -> None:
    options = UpOptions(dir=tmp_path, num_miners=2, block_time_s=0.25)
    ports = {"hub": 1, "dashboard": 2, "miner-1": 3, "miner-2": 4, "validator-1": 5}
    plan = make_plan(options, ports)
    assert [spec.name for spec in plan.services] == ["hub"]
    assert [spec.name for spec in plan.extras] == ["dashboard"]
    assert plan.genesis is not None
    assert list(plan.genesis.argv[-4:]) == ["--validators", "1", "--block-time", "0.25"]
    network = genesis("miner-1", "miner-2", "miner-3", "validator-1")
    assert [spec.name for spec in plan.neurons(network)] == ["miner-1", "miner-2", "validator-1"]
    assert list(plan.producer(network).argv[-4:]) == ["--db", "/tmp/x/chain.db", "--block-time", "0.5"]
    (tmp_path / "genesis.json").write_text("{}")
    assert make_plan(options, ports).genesis is None


def test_the_last_miner_runs_the_attack_with_a_miners_flags(tmp_path: Path) -> None:
    options = UpOptions(dir=tmp_path, num_miners=2, attack="random")
    plan = make_plan(options, {"hub": 1, "dashboard": 2, "miner-1": 3, "miner-2": 4, "validator-1": 5})
    honest, cheat, validator = plan.neurons(genesis("miner-1", "miner-2", "validator-1"))
    assert Path(cheat.argv[2]) == plan_module.CHEAT_SCRIPT
    assert list(cheat.argv[3:5]) == ["--attack", "random"]
    assert parse_config(list(cheat.argv[5:]), "miner", {}).name == "miner-2"
    assert [Path(spec.argv[2]).name for spec in (honest, validator)] == ["miner.py", "validator.py"]


def test_an_attack_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "CHEAT_SCRIPT", tmp_path / "bench" / "attacks" / "miner.py")
    with pytest.raises(ConfigError, match="only from a checkout of the repository"):
        check_attack("random")


def test_a_cheat_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--attack needs honest miners beside the cheat: .* got 1"):
        UpOptions(dir=tmp_path, num_miners=1, attack="random")


def test_no_token_of_the_user_reaches_the_local_network(tmp_path: Path) -> None:
    plan = make_plan(UpOptions(dir=tmp_path, num_miners=1), {"hub": 1, "dashboard": 2, "miner-1": 3, "validator-1": 4})
    assert plan.services[0].env["HF_TOKEN"] == ""
    assert plan.services[0].env["HIVETRAIN_HUB_TOKEN"] == ""


def test_more_neurons_than_genesis_made_is_a_clear_error(tmp_path: Path) -> None:
    ports = dict.fromkeys(("hub", "dashboard", "miner-1", "miner-2", "validator-1"), 1)
    plan = make_plan(UpOptions(dir=tmp_path, num_miners=2), ports)
    with pytest.raises(ConfigError, match=r"no wallet miner-2.*--fresh"):
        plan.neurons(genesis("miner-1", "validator-1"))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_miners": 0}, "--miners"),
        ({"num_miners": 65}, "--miners"),
        ({"num_validators": 0}, "--validators"),
        ({"num_epochs": 0}, "--epochs"),
        ({"port_base": 80}, "--port-base"),
        ({"block_time_s": 0.0}, "--block-time"),
        ({"block_time_s": float("nan")}, "--block-time"),
        ({"timeout_s": -1.0}, "--timeout"),
        ({"json_path": Path("/nowhere/out.json")}, "--json"),
        ({"recipe": Path("/nowhere/run.toml")}, "--recipe"),
    ],
)
def test_impossible_options_are_refused_by_name(tmp_path: Path, changes: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        UpOptions(dir=tmp_path, **changes)


def test_a_run_with_epochs_has_a_deadline_and_one_without_has_none(tmp_path: Path) -> None:
    assert UpOptions(dir=tmp_path).deadline_s is None
    assert UpOptions(dir=tmp_path, num_epochs=3).deadline_s == 1800.0
    assert UpOptions(dir=tmp_path, num_epochs=3, timeout_s=5.0).deadline_s == 5.0


def test_unreadable_files_of_a_run_are_service_errors(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"cannot read .*genesis\.json"):
        read_genesis(tmp_path)
    (tmp_path / "genesis.json").write_text('{"run_id": 1}')
    with pytest.raises(ServiceError, match=r"not what genesis writes.*--fresh"):
        read_genesis(tmp_path)
    for text in ("{", "[]", '{"scores": {"k": 3}}', '{"scores": []}'):
        (tmp_path / "scores.json").write_text(text)
        with pytest.raises(ServiceError, match="not what a validator writes"):
            read_scores(tmp_path / "scores.json")


def test_a_torn_last_line_of_states_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "states.jsonl"
    assert read_states(path) == []
    path.write_text(
        '{"epoch": 1, "state_hash": "aa", "manifest_state_hash": "aa", "source": "computed"}\n{"epoch": 2, "st'
    )
    assert [line.epoch for line in read_states(path)] == [1]
