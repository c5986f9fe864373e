"""The command `hivetrain`. Heavy imports stay inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hivetrain.errors import ConfigError, HivetrainError

DEFAULT_DIR = Path(".hivetrain")
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    name="hivetrain",
    help="People who own GPUs, but no datacentre, train one language model together.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Settings of a neuron.", rich_markup_mode=None)
app.add_typer(config_app, name="config")

DirOption = Annotated[Path, typer.Option("--dir", help="folder of the network that `up` runs")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]


class TrackerName(StrEnum):
    """Where metrics go besides the JSON lines."""

    trackio = "trackio"
    wandb = "wandb"
    none = "none"


@app.command()
def up(
    miners: Annotated[int, typer.Option(help="miners to start")] = 3,
    validators: Annotated[int, typer.Option(help="validators to start")] = 1,
    epochs: Annotated[int | None, typer.Option(help="stop after this many new epochs, and say if they hold")] = None,
    dir: DirOption = DEFAULT_DIR,
    fresh: Annotated[bool, typer.Option("--fresh", help="delete what an earlier run left in --dir")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the outcome to this file")] = None,
    port_base: Annotated[int | None, typer.Option(help="first of the ports to use; default: free ones")] = None,
    dashboard: Annotated[bool, typer.Option(help="serve the local dashboard")] = True,
    tracker: Annotated[TrackerName, typer.Option(help="where metrics go")] = TrackerName.trackio,
    block_time: Annotated[float | None, typer.Option(help="seconds per block; default: fitted to the machine")] = None,
    recipe: Annotated[Path | None, typer.Option(help="run.toml of a new run; default: the embedded one")] = None,
    device: Annotated[str, typer.Option(help="device of the neurons: auto, cpu, cuda")] = "auto",
    min_loss_drop: Annotated[float, typer.Option(help="nats by which the val loss must fall over --epochs")] = 0.0,
    timeout: Annotated[
        float | None, typer.Option(help="seconds after which to stop; default: none or generous")
    ] = None,
    attack: Annotated[
        str, typer.Option(help="let the last miner cheat: a name of bench/attacks; an unknown one lists them")
    ] = "",
) -> None:
    """Run a whole network on this machine: chain, hub, dashboard, miners and validators."""
    from neurons.plan import UpOptions, check_attack, local_recipe
    from neurons.up import run_up

    if recipe is not None:
        local_recipe(recipe)
    if attack:
        check_attack(attack)
    options = UpOptions(
        dir=dir.expanduser().absolute(),
        num_miners=miners,
        num_validators=validators,
        num_epochs=epochs,
        fresh=fresh,
        json_path=json_file,
        port_base=port_base,
        dashboard=dashboard,
        tracker=tracker.value,
        block_time_s=block_time,
        recipe=recipe,
        device=device,
        min_loss_drop=min_loss_drop,
        timeout_s=timeout,
        attack=attack,
    )
    raise typer.Exit(run_up(options))


@app.command()
def status(dir: DirOption = DEFAULT_DIR, as_json: JsonOption = False) -> None:
    """Show the neurons of a network, from any terminal."""
    from dataclasses import asdict

    from rich.console import Console

    from hivetrain.tracking.status import read_statuses
    from neurons.plan import holder_pid
    from neurons.report import with_scores
    from neurons.screen import print_status

    pid = holder_pid(dir)
    if as_json:
        neurons = [asdict(row) for row in with_scores(dir, read_statuses(dir / "status"))]
        _print_json({"running": pid is not None, "pid": pid, "dir": str(dir), "neurons": neurons})
    else:
        print_status(dir, is_running=pid is not None, console=Console())


@app.command()
def logs(
    name: Annotated[str | None, typer.Argument(help="whose log; default: all")] = None,
    dir: DirOption = DEFAULT_DIR,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on as lines are written")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="last lines to show first")] = 20,
) -> None:
    """Show the logs of a network's processes."""
    from hivetrain.supervisor import log_tail

    folder = dir / "logs"
    paths = sorted(folder.glob("*.log"))
    if name is not None:
        known = ", ".join(path.stem for path in paths) or "none"
        paths = [path for path in paths if path.stem == name]
        if not paths:
            raise ConfigError(f"no log of {name} in {folder}; there: {known}")
    if not paths:
        raise ConfigError(f"no logs in {folder}; start a network with `hivetrain up --dir {dir}`")
    offsets = {path: path.stat().st_size for path in paths}
    for path in paths:
        for line in log_tail(path, lines):
            typer.echo(_log_line(path, line, alone=len(paths) == 1))
    while follow:
        time.sleep(0.3)
        for path in paths:
            offsets[path] = _echo_new(path, offsets[path], alone=len(paths) == 1)


def _echo_new(path: Path, offset: int, *, alone: bool) -> int:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(offset if size >= offset else 0)  # shorter than before: set aside and begun anew
            content = file.read()
    except OSError:
        return 0
    end = content.rfind(b"\n") + 1
    for line in content[:end].decode(errors="replace").splitlines():
        typer.echo(_log_line(path, line, alone=alone))
    return (offset if size >= offset else 0) + end


def _log_line(path: Path, line: str, *, alone: bool) -> str:
    return line if alone else f"{path.stem:12} | {line}"


@app.command()
def down(
    dir: DirOption = DEFAULT_DIR, timeout: Annotated[float, typer.Option(help="seconds to wait for the end")] = 60.0
) -> None:
    """Stop the `up` that runs in --dir; its state is kept."""
    from neurons.plan import holder_pid

    pid = holder_pid(dir)
    if pid is None:
        raise ConfigError(f"no `hivetrain up` runs in {dir}")
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while holder_pid(dir) == pid:
        if time.monotonic() > deadline:
            raise HivetrainError(
                f"pid {pid} has not stopped within {timeout:.0f} s; run this again to kill its children"
            )
        time.sleep(0.1)
    typer.echo(f"stopped (pid {pid}); state kept in {dir}")


@app.command()
def doctor(
    dir: DirOption = DEFAULT_DIR,
    axon_port: Annotated[int, typer.Option("--axon.port", help="check that this port is free")] = 8091,
    hub_endpoint: Annotated[
        str, typer.Option("--hub.endpoint", help="compare clocks with this hub; default: that of the network in --dir")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Check Python, PyTorch, packages, ports, disk, memory, clock, and which tokens are set."""
    from neurons.doctor import Verdict, examine
    from neurons.doctor import as_json as to_json

    if not hub_endpoint and (dir / "genesis.json").is_file():
        from neurons.report import read_genesis

        hub_endpoint = read_genesis(dir).hub_endpoint
    checks = examine(dir, environ=os.environ, axon_port=axon_port, hub_endpoint=hub_endpoint)
    if as_json:
        _print_json(to_json(checks))
    else:
        for check in checks:
            typer.echo(f"{check.verdict.value:4}  {check.name:10} {check.detail}")
            if check.fix:
                typer.echo(f"      {'':10} -> {check.fix}")
    raise typer.Exit(1 if any(check.verdict is Verdict.FAIL for check in checks) else 0)


@config_app.command("show", context_settings=PASS_THROUGH)
def config_show(ctx: typer.Context) -> None:
    """Show every setting and where its value comes from. Takes a neuron's flags, and --json."""
    from template.config import parse_config, sources, values

    arguments = [argument for argument in ctx.args if argument != "--json"]
    config = parse_config(arguments, "miner")
    table, where = values(config), sources(config)
    if "--json" in ctx.args:
        _print_json({path: {"value": table[path], "source": where[path]} for path in table})
        return
    for path, value in table.items():
        shown = ",".join(value) if isinstance(value, list) else "-" if value in (None, "") else value
        typer.echo(f"{path:34} {shown!s:34} {where[path]}")


@app.command()
def register(
    name: Annotated[str, typer.Argument(help="name of the new miner, such as miner-4")],
    dir: DirOption = DEFAULT_DIR,
) -> None:
    """Make keys for one more miner, register it on the local network, and print the command that runs it."""
    from neurons.register import register_miner

    uid, command = register_miner(name, dir=dir.expanduser().absolute())
    typer.echo(f"{name} is registered as uid {uid}; run it with:", err=True)
    typer.echo(command)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="text to go on from")],
    dir: DirOption = DEFAULT_DIR,
    max_tokens: Annotated[int, typer.Option(help="tokens to write")] = 64,
) -> None:
    """Let the newest published model go on from a prompt."""
    from neurons.generate import generate as run

    typer.echo(run(prompt, dir=dir.expanduser().absolute(), max_tokens=max_tokens))


EpochArgument = Annotated[int, typer.Argument(help="a published epoch", min=0)]
HotkeyArgument = Annotated[str, typer.Argument(help="the miner's hotkey (ss58), or how it begins")]
EndpointOption = Annotated[str, typer.Option("--hub.endpoint", help="another hub than that of the network in --dir")]
RepoOption = Annotated[str, typer.Option("--hub.repo", help="the run's repository on it, OWNER/NAME")]
CopyOption = Annotated[Path | None, typer.Option("--from", help="read a copy that `mirror` wrote, instead of a hub")]


@app.command()
def explain(
    epoch: EpochArgument,
    hotkey: HotkeyArgument,
    dir: DirOption = DEFAULT_DIR,
    hub_endpoint: EndpointOption = "",
    hub_repo: RepoOption = "",
    copy: CopyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compute a miner's score again from what is public, and say why; exits 1 where a validator says otherwise.

    What nobody can tell any more from what is public is called UNDETERMINED, and contradicts nobody.
    """
    from neurons.explain import explain as run
    from neurons.sources import open_source

    found = run(open_source(dir=dir, endpoint=hub_endpoint, repo=hub_repo, copy=copy), epoch, hotkey)
    if as_json:
        _print_json(found.to_json())
    else:
        typer.echo("\n".join(found.lines()))
    raise typer.Exit(0 if found.holds else 1)


@app.command()
def audit(
    epoch: EpochArgument,
    hotkey: HotkeyArgument,
    dir: DirOption = DEFAULT_DIR,
    hub_endpoint: EndpointOption = "",
    hub_repo: RepoOption = "",
    copy: CopyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replay a miner's whole epoch on this machine; exits 1 where it was not honest, and names the first wrong step."""
    import tempfile

    from neurons.audit import run_audit
    from neurons.sources import open_source

    def show(done: int, total: int) -> None:
        if not as_json and (done % 10 == 0 or done == total):
            typer.echo(f"replayed {done} of {total} steps", err=True)

    source = open_source(dir=dir, endpoint=hub_endpoint, repo=hub_repo, copy=copy)
    with tempfile.TemporaryDirectory(prefix="hivetrain-audit-") as cache:
        found = run_audit(source, epoch, hotkey, cache=Path(cache), on_step=show)
    if as_json:
        _print_json(found.to_json())
    else:
        typer.echo("\n".join(found.lines()))
    raise typer.Exit(0 if found.verdict.honest else 1)


@app.command()
def mirror(
    folder: Annotated[Path, typer.Argument(help="where to write the copy")],
    dir: DirOption = DEFAULT_DIR,
    hub_endpoint: EndpointOption = "",
    hub_repo: RepoOption = "",
) -> None:
    """Copy what the run's hub holds, epochs and published checks, into a folder."""
    from hivetrain.hub.client import HubStore
    from hivetrain.hub.folder import mirror as run
    from hivetrain.scoring.record import CHECKS_BRANCH
    from neurons.sources import open_source

    source = open_source(dir=dir, endpoint=hub_endpoint, repo=hub_repo)
    assert isinstance(source.store, HubStore)
    num_epochs = run(source.store, source.repo, CHECKS_BRANCH, folder)
    typer.echo(f"{num_epochs} epochs and the checks of {source.label} are in {folder}")


@app.command(context_settings=PASS_THROUGH)
def miner(ctx: typer.Context) -> None:
    """Run a miner: the same as `python neurons/miner.py`, flags included (--help lists them)."""
    from neurons.main import run_neuron
    from neurons.miner import Miner

    raise typer.Exit(run_neuron("miner", Miner, ctx.args))


@app.command(context_settings=PASS_THROUGH)
def validator(ctx: typer.Context) -> None:
    """Run a validator: the same as `python neurons/validator.py`, flags included (--help lists them)."""
    from neurons.main import run_neuron
    from neurons.validator import Validator

    raise typer.Exit(run_neuron("validator", Validator, ctx.args))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its exit status: 2 for what the user can mend, in one line that says how."""
    from typer.main import get_command

    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        status = get_command(app).main(arguments, prog_name="hivetrain", standalone_mode=False)
    except ConfigError as exc:
        return _complain(exc, 2)
    except HivetrainError as exc:
        return _complain(exc, 1)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # `hivetrain logs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as exc:
        # Typer's usage errors share no public base class; they are the ones that know how to show themselves.
        if not hasattr(exc, "format_message"):
            raise
        where = getattr(getattr(exc, "ctx", None), "command_path", "hivetrain")
        return _complain(f"{exc.format_message().rstrip('.')}; see `{where} --help`", 2)
    return status if isinstance(status, int) else 0


def _complain(what: object, status: int) -> int:
    typer.echo(f"error: {what}", err=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
