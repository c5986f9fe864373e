"""Where a neuron's log lines go."""

from __future__ import annotations

import logging
import logging.handlers
import sys
import typing

from hivetrain.errors import ConfigError
from template.settings import NeuronConfig


def logging_setup(config: NeuronConfig, stream: typing.TextIO | None = None) -> None:
    """Send logs to a terminal in colour, to anything else in plain lines, and to a rotating file.

    Raises:
        ConfigError: the log folder cannot be written.
    """
    stream = sys.stderr if stream is None else stream
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")
    console: logging.Handler = logging.StreamHandler(stream)
    console.setFormatter(plain)
    if stream.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        console = RichHandler(console=Console(file=stream), show_path=False, log_time_format="%H:%M:%S")
    try:
        config.logging_dir.mkdir(parents=True, exist_ok=True)
        file = logging.handlers.RotatingFileHandler(
            config.logging_dir / f"{config.name}.log", maxBytes=10 << 20, backupCount=3, encoding="utf-8"
        )
    except OSError as exc:
        raise ConfigError(f"--logging.logging_dir: cannot write {config.logging_dir}: {exc.strerror}") from exc
    file.setFormatter(plain)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(console)
    root.addHandler(file)
    root.setLevel(logging.DEBUG if config.logging.trace else logging.WARNING)
    ours = logging.DEBUG if config.logging.debug or config.logging.trace else logging.INFO
    for name in ("hivetrain", "template", "neurons", "__main__"):
        logging.getLogger(name).setLevel(ours)
