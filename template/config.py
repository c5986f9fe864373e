"""A neuron's settings (`template.settings`), merged from where operators write them.

A value comes from the command line, else from the environment (``HIVETRAIN_WALLET__NAME``, and the ``BT_*``
names that btcli reads), else from the TOML file of ``--config``, else from the default; `sources` says from
which. It is parsed once in `main`, is frozen, and is passed down. Secrets are no settings: they come from the
environment only, through `read_secrets`, and no representation shows them.
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_settings import CliSettingsSource, SettingsError

from hivetrain.errors import ConfigError
from template.settings import NeuronConfig, Role, Secrets, read_secrets

ENV_PREFIX = "HIVETRAIN_"
ENV_ALIASES = {"BT_NETWORK": "subtensor.network", "BT_WALLET": "wallet.name", "BT_WALLET_HOTKEY": "wallet.hotkey"}
FLAG_ALIASES = {  # btcli's short flags and wandb's names in the subnet template
    "-n": "--subtensor.network",
    "--network": "--subtensor.network",
    "-w": "--wallet.name",
    "--wallet": "--wallet.name",
    "-H": "--wallet.hotkey",
    "--wallet-hotkey": "--wallet.hotkey",
    "--wandb.project_name": "--tracker.project",
    "--wandb.entity": "--tracker.entity",
}
SWITCH_ALIASES = {
    "--wandb.off": ("--tracker.kind", "none"),
    "--wandb.on": ("--tracker.kind", "wandb"),
    "--wandb.offline": ("--tracker.kind", "wandb", "--tracker.wandb_mode", "offline"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        flag = message.partition("unrecognized arguments: ")[2].split(" ")[0].split("=")[0]
        if not flag:
            raise ConfigError(f"{message}; --help lists every flag")
        near = difflib.get_close_matches(flag, flag_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists every flag"
        raise ConfigError(f"unknown {'flag' if flag.startswith('-') else 'argument'} {flag}; {hint}")


def parse_config(argv: Sequence[str], role: Role, environ: Mapping[str, str] | None = None) -> NeuronConfig:
    """Merge command line, environment and file into one frozen configuration.

    Args:
        argv: the arguments after the program's name. ``--help`` prints every flag and exits 0.
        environ: instead of ``os.environ``.

    Raises:
        ConfigError: an unknown flag, variable or key, or an impossible value; names it and its source.
    """
    epilog = (
        "Each flag is also a variable (--wallet.name: HIVETRAIN_WALLET__NAME) and a key of the --config file.\n"
        f"Aliases: {', '.join(f'{alias} = {flag}' for alias, flag in FLAG_ALIASES.items())},\n"
        f"{', '.join(f'{alias} = {chr(32).join(flags)}' for alias, flags in SWITCH_ALIASES.items())}."
    )
    parser = _Parser(
        prog=f"neurons/{role}.py",
        description=f"Run a Hivetrain {role}.",
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    try:
        from_cli = _flatten(CliSettingsSource(NeuronConfig, cli_parse_args=_expand(argv), root_parser=parser)())
    except SettingsError as exc:  # a bracket begins JSON
        raise ConfigError(f"a list is written with commas and without brackets: {exc.__cause__ or exc}") from exc
    from_env = dict(_from_environ(os.environ if environ is None else environ))
    file_name = from_cli.get("config", from_env.get("config", (None, "")))[0]
    layers = [
        _from_file(Path(file_name)) if file_name else {},
        from_env,
        {path: (value, _cli_name(path, value)) for path, (value, _) in from_cli.items()},
    ]
    merged: dict[str, tuple[Any, str]] = {}
    for layer in layers:
        merged.update(layer)
    try:
        config = NeuronConfig(**_nest({path: value for path, (value, _) in merged.items()}))
    except ValidationError as exc:
        raise ConfigError(_explain(exc, merged)) from exc
    config._role = role
    config._sources.update({path: merged[path][1] if path in merged else "default" for path in _leaves(NeuronConfig)})
    return config


def sources(config: NeuronConfig) -> dict[str, str]:
    """Where each dotted setting came from: a flag, a variable, a file, or "default"."""
    return dict(config._sources)


def values(config: NeuronConfig) -> dict[str, Any]:
    """Each dotted setting's value, as plain JSON types."""
    return {path: value for path, (value, _) in _flatten(config.model_dump(mode="json")).items()}


def flag_names() -> list[str]:
    """Every flag, aliases included."""
    return [f"--{path}" for path in _leaves(NeuronConfig)] + [*FLAG_ALIASES, *SWITCH_ALIASES]


def _expand(argv: Sequence[str]) -> list[str]:
    expanded: list[str] = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if argument in SWITCH_ALIASES:
            expanded.extend(SWITCH_ALIASES[argument])
        else:
            expanded.append(FLAG_ALIASES.get(flag, flag) + equals + value)
    return expanded


def _cli_name(path: str, value: Any) -> str:
    return f"--no-{path}" if value is False else f"--{path}"


def _from_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, tuple[Any, str]]]:
    names = {ENV_PREFIX + path.upper().replace(".", "__"): path for path in _leaves(NeuronConfig)}
    for name in environ:
        if name.startswith(ENV_PREFIX) and "__" in name and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(f"unknown variable {name}" + (f"; did you mean {near[0]}?" if near else ""))
    for name, path in (ENV_ALIASES | names).items():  # ours last, so that they win over btcli's
        if environ.get(name):
            is_list = path.endswith(("_maddrs", "_peers", "_bulk"))
            yield path, (environ[name].split(",") if is_list else environ[name], name)


def _from_file(path: Path) -> dict[str, tuple[Any, str]]:
    try:
        table = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"--config: cannot read {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"--config: {path} is not valid TOML: {exc}") from exc
    known = _leaves(NeuronConfig)
    found = {key: (value, str(path)) for key, (value, _) in _flatten(table).items()}
    for key in found:
        if key not in known or key == "config":
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"{path}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
    return found


def _explain(exc: ValidationError, merged: Mapping[str, tuple[Any, str]]) -> str:
    first = exc.errors()[0]
    parts = [str(part) for part in first["loc"]]
    path = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in merged), "")
    value, source = merged.get(path, (first["input"], "default"))
    message = first["msg"].removeprefix("Value error, ")
    where = "" if source.startswith("--") else f" (from {source})"
    return f"--{path or '.'.join(parts)}: {message[0].lower()}{message[1:]}, got {value!r}{where}"


def _leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    paths: list[str] = []
    for name, info in model.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            paths.extend(_leaves(section, f"{prefix}{name}."))
        else:
            paths.append(f"{prefix}{name}")
    return paths


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, str]]:
    flat: dict[str, tuple[Any, str]] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = (value, "")
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, name = path.split(".")
        target = table
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
    return table


__all__ = ["NeuronConfig", "Role", "Secrets", "flag_names", "parse_config", "read_secrets", "sources", "values"]
