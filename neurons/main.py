"""How a neuron's process starts and ends: flags in, one exit code out."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from hivetrain.errors import ConfigError, HivetrainError, ServiceError
from template.config import Role, logging_setup, parse_config, read_secrets
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
    neuron = factory(config, secrets)

    def stop(*_: object) -> None:
        neuron.stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        neuron.start()
        neuron.run()
    except ConfigError as exc:
        logger.error("%s", exc)
        return 2
    except ServiceError as exc:
        logger.error("gave up: %s", exc)
        return 1
    except HivetrainError as exc:
        logger.error("%s", exc)
        return 1
    finally:
        neuron.close()
    return 0
