"""How a neuron's process starts and ends: flags in, one exit code out."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from stamina.instrumentation import RetryDetails, set_on_retry_hooks

from hivetrain.errors import ConfigError, HivetrainError, ServiceError
from neurons.doctor import Verdict, check_clock
from template.config import Role, parse_config, read_secrets
from template.logs import logging_setup
from template.neuron import Neuron

logger = logging.getLogger(__name__)


def run_neuron(role: Role, factory: type[Neuron], argv: Sequence[str] | None = None) -> int:
    """Run one neuron until SIGTERM or Ctrl-C.

    Returns:
        0 when stopped, 2 for a setting that cannot work (one line says how to mend it), 1 when a service did not
        answer within the limit. A bug propagates.
    """
    try:
        config = parse_config(sys.argv[1:] if argv is None else argv, role)
        logging_setup(config)
        secrets = read_secrets(os.environ)
    except ConfigError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    log_retries()
    if config.tracker.entity:
        os.environ["WANDB_ENTITY"] = config.tracker.entity  # wandb's own way to take it
    neuron = factory(config, secrets)

    def stop(*_: object) -> None:
        neuron.stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        neuron.start()
        _compare_clocks(neuron.hub_endpoint)
        neuron.run()
    except ConfigError as exc:
        logger.error("%s", exc)
        return 2
    except ServiceError as exc:
        if neuron.stopping.is_set():  # told to stop while it waited for a service
            return 0
        logger.error("gave up: %s", exc)
        return 1
    except HivetrainError as exc:
        logger.error("%s", exc)
        return 1
    finally:
        neuron.close()
    return 0


def _compare_clocks(hub_endpoint: str) -> None:
    """Say so when our clock is off: peers refuse requests whose time is not theirs."""
    check = check_clock(hub_endpoint)
    if check.verdict is Verdict.FAIL:
        logger.error("check your clock: %s; %s", check.detail, check.fix)


def log_retries() -> None:
    """Log each retry with its cause, for --logging.debug: by default stamina warns without saying why."""

    def log(details: RetryDetails) -> None:
        logger.debug("again in %.1f s: %s", details.wait_for, details.caused_by)

    set_on_retry_hooks([log])
