from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from hivetrain.errors import ConfigError
from template.config import flag_names, parse_config, read_secrets, sources, values
from template.logs import logging_setup


def test_the_flags_that_operators_know_are_there() -> None:
    known = set(flag_names())
    expected = """netuid wallet.name wallet.hotkey wallet.path subtensor.network subtensor.chain_endpoint axon.port
        axon.ip axon.external_ip axon.external_port neuron.name neuron.device neuron.timeout neuron.moving_average_alpha
        neuron.disable_set_weights neuron.axon_off neuron.epoch_length neuron.sample_size neuron.vpermit_tao_limit
        blacklist.force_validator_permit blacklist.allow_non_registered logging.debug logging.trace
        logging.logging_dir wandb.off wandb.offline wandb.project_name wandb.entity"""
    assert {f"--{name}" for name in expected.split()} <= known


def test_command_line_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "miner.toml"
    file.write_text('netuid = 7\n[wallet]\nname = "file"\nhotkey = "file"\n[axon]\nport = 9000\n')
    environ = {"HIVETRAIN_WALLET__NAME": "env", "HIVETRAIN_WALLET__HOTKEY": "env"}
    config = parse_config(["--config", str(file), "--wallet.name", "cli"], "miner", environ)
    assert (config.wallet.name, config.wallet.hotkey, config.axon.port) == ("cli", "env", 9000)
    assert config.netuid == 7
    assert config.neuron.device == "auto"
    where = sources(config)
    assert where["wallet.name"] == "--wallet.name"
    assert where["wallet.hotkey"] == "HIVETRAIN_WALLET__HOTKEY"
    assert where["axon.port"] == str(file)
    assert where["neuron.device"] == "default"
    assert set(where) == set(values(config))


def test_btcli_variables_and_short_flags_are_aliases() -> None:
    environ = {"BT_NETWORK": "test", "BT_WALLET": "w", "BT_WALLET_HOTKEY": "h"}
    config = parse_config([], "miner", environ)
    assert (config.subtensor.network, config.wallet.name, config.wallet.hotkey) == ("test", "w", "h")
    config = parse_config(["-n", "local", "-w", "x", "--wallet-hotkey=y"], "miner", environ)
    assert (config.subtensor.network, config.wallet.name, config.wallet.hotkey) == ("local", "x", "y")


def test_our_own_variable_wins_over_the_alias() -> None:
    config = parse_config([], "miner", {"BT_WALLET": "alias", "HIVETRAIN_WALLET__NAME": "ours"})
    assert config.wallet.name == "ours"


@pytest.mark.parametrize(
    ("argv", "kind", "mode"),
    [
        (["--wandb.off"], "none", "online"),
        (["--wandb.offline"], "wandb", "offline"),
        (["--tracker.kind", "wandb"], "wandb", "online"),
        ([], "trackio", "online"),
    ],
)
def test_wandb_switches_choose_the_tracker(argv: list[str], kind: str, mode: str) -> None:
    tracker = parse_config(argv, "miner", {}).tracker
    assert (tracker.kind, tracker.wandb_mode) == (kind, mode)


def test_lists_come_repeated_or_with_commas_from_flag_and_environment() -> None:
    argv = ["--dht.initial_peers", "/ip4/1.2.3.4/tcp/1,/ip4/1.2.3.4/tcp/2", "--dht.initial_peers", "/dns/x/tcp/3"]
    assert len(parse_config(argv, "miner", {}).dht.initial_peers) == 3
    environ = {"HIVETRAIN_DHT__INITIAL_PEERS": "/ip4/1.2.3.4/tcp/1,/ip4/1.2.3.4/tcp/2"}
    assert len(parse_config([], "miner", environ).dht.initial_peers) == 2


def test_the_path_of_the_bytes_can_be_set() -> None:
    dht = parse_config([], "miner", {}).dht
    assert (dht.bulk, dht.bulk_port, dht.announce_bulk) == (True, None, ())
    flags = ["--no-dht.bulk", "--dht.bulk_port", "9", "--dht.announce_bulk", "203.0.113.5:7,2001:db8::1:8"]
    dht = parse_config(flags, "miner", {}).dht
    assert (dht.bulk, dht.bulk_port, dht.announce_bulk) == (False, 9, ("203.0.113.5:7", "2001:db8::1:8"))
    announced = parse_config([], "miner", {"HIVETRAIN_DHT__ANNOUNCE_BULK": "203.0.113.5:7,203.0.113.6:7"}).dht
    assert announced.announce_bulk == ("203.0.113.5:7", "203.0.113.6:7")


def test_switches_can_be_turned_off() -> None:
    config = parse_config(["--no-blacklist.force_validator_permit", "--neuron.axon_off"], "validator", {})
    assert not config.blacklist.force_validator_permit
    assert config.neuron.axon_off


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--neuron.nmae", "x"], ["unknown flag --neuron.nmae", "did you mean --neuron.name?"]),
        (["--axon.por", "1"], ["unknown flag --axon.por", "--axon.port"]),
        (["stray"], ["unknown argument stray"]),
        (["--axon.port"], ["--axon.port", "expected one argument"]),
        (["--axon.port", "x"], ["--axon.port", "valid integer", "'x'"]),
        (["--axon.port", "99999"], ["--axon.port", "65535", "'99999'"]),
        (["--neuron.device", "tpu"], ["--neuron.device", "'tpu'"]),
        (["--tracker.kind", "paper"], ["--tracker.kind", "'trackio', 'wandb' or 'none'"]),
        (["--neuron.moving_average_alpha", "2"], ["--neuron.moving_average_alpha", "less than or equal to 1"]),
        (["--neuron.timeout", "nan"], ["--neuron.timeout", "'nan'"]),
        (["--dht.host_maddrs", "1.2.3.4:5"], ["--dht.host_maddrs", "multiaddress"]),
        (["--dht.announce_bulk", "example.org:80"], ["--dht.announce_bulk", "203.0.113.5:32337", "example.org"]),
        (["--dht.announce_bulk", "[2001:db8::1]:80"], ["without brackets"]),
        (["--dht.bulk_port", "70000"], ["--dht.bulk_port", "65535"]),
        (["--hub.endpoint", "localhost:80"], ["--hub.endpoint", "localhost:80"]),
        (["--hub.repo", "noslash"], ["--hub.repo", "noslash"]),
        (["--config", "/nowhere/x.toml"], ["--config", "/nowhere/x.toml", "No such file"]),
    ],
)
def test_a_bad_flag_or_value_gives_one_line_that_names_it(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(argv, "miner", {})
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_bad_value_names_the_variable_or_file_that_it_came_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--axon\.port: .*'0' \(from HIVETRAIN_AXON__PORT\)"):
        parse_config([], "miner", {"HIVETRAIN_AXON__PORT": "0"})
    file = tmp_path / "bad.toml"
    file.write_text("[axon]\nport = 'x'\n")
    with pytest.raises(ConfigError, match=r"--axon\.port: .*bad\.toml"):
        parse_config(["--config", str(file)], "miner", {})


@pytest.mark.parametrize(
    ("text", "word"),
    [("[axon]\nprot = 1\n", "did you mean axon.port"), ("netuid = = 1", "not valid TOML"), ("wallet = 3", "wallet")],
)
def test_an_unreadable_file_or_unknown_key_is_refused(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=word):
        parse_config(["--config", str(file)], "miner", {})


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"HIVETRAIN_WALET__NAME.*HIVETRAIN_WALLET__NAME"):
        parse_config([], "miner", {"HIVETRAIN_WALET__NAME": "x"})


def test_the_configuration_is_frozen() -> None:
    config = parse_config([], "miner", {})
    with pytest.raises(ValueError, match="frozen"):
        config.netuid = 2
    with pytest.raises(ValueError, match="frozen"):
        config.axon.port = 2


def test_folders_follow_the_neuron_s_unless_they_are_set(tmp_path: Path) -> None:
    config = parse_config(["--neuron.dir", str(tmp_path)], "validator", {})
    assert (config.state_dir, config.run_dir, config.cache_dir) == (tmp_path, tmp_path, tmp_path / "cache")
    assert config.name == "validator"
    config = parse_config(["-w", "alice", "-H", "hot", "--netuid", "3"], "miner", {})
    assert config.state_dir.parts[-5:] == (".hivetrain", "alice", "hot", "netuid3", "miner")


def test_secrets_are_read_from_the_environment_and_never_shown() -> None:
    secrets = read_secrets({"HF_TOKEN": "hf_secret", "WANDB_API_KEY": "wb_secret"})
    assert secrets.hub_token == "hf_secret"
    assert "secret" not in repr(secrets)
    assert read_secrets({"HF_TOKEN": "a", "HIVETRAIN_HUB_TOKEN": "b"}).hub_token == "b"
    assert read_secrets({}).hub_token is None
    environ = {"HF_TOKEN": "hf_secret", "HIVETRAIN_HUB_TOKEN": "hf_secret"}
    assert "hf_secret" not in str(values(parse_config([], "miner", environ)))


@pytest.fixture
def _own_logging() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    root.handlers[:] = before
    root.setLevel(level)
    for name in ("hivetrain", "template", "neurons", "__main__"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.mark.usefixtures("_own_logging")
def test_logs_are_plain_lines_off_a_terminal_and_go_to_a_file_too(tmp_path: Path) -> None:
    stream = io.StringIO()
    logging_setup(parse_config(["--neuron.dir", str(tmp_path)], "miner", {}), stream)
    logging.getLogger("hivetrain.x").info("hello")
    logging.getLogger("hivetrain.x").debug("quiet")
    logging.getLogger("somebody.else").info("quiet")
    assert stream.getvalue().endswith("INFO    hivetrain.x: hello\n")
    assert (tmp_path / "logs" / "miner.log").read_text() == stream.getvalue()
    assert "quiet" not in stream.getvalue()


@pytest.mark.usefixtures("_own_logging")
def test_a_log_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = parse_config(["--logging.logging_dir", str(tmp_path / "file")], "miner", {})
    with pytest.raises(ConfigError, match=r"--logging\.logging_dir"):
        logging_setup(config, io.StringIO())
