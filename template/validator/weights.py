"""From the moving averages to weights on chain."""

from __future__ import annotations

import logging

from hivetrain.errors import ServiceError
from template.chain.client import Chain, Metagraph
from template.handlers import spec_version

logger = logging.getLogger(__name__)


def set_weights(chain: Chain, metagraph: Metagraph, uid: int, shares: dict[str, float]) -> dict[int, float] | None:
    """Set weights on chain when the rate limit allows.

    Args:
        uid: our own.
        shares: by hotkey, summing to 1.

    Returns:
        Weights by uid, or None where they were not set; the reason is in the log.
    """
    weights = {
        neuron.uid: shares[neuron.hotkey]
        for neuron in metagraph.neurons
        if neuron.hotkey in shares and neuron.uid != uid
    }
    if not weights:
        logger.info("no miner has a score yet: no weights to set")
        return None
    try:
        since, limit = chain.blocks_since_last_update(uid), chain.weights_rate_limit()
        if since <= limit:
            logger.info("weights wait: %d blocks since the last, the limit is %d", since, limit)
            return None
        chain.set_weights(weights, spec_version())
    except ServiceError as exc:
        logger.warning("weights could not be set, trying again next round: %s", exc)
        return None
    return weights
