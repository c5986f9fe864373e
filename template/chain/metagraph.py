"""A subnet's neurons as plain records, independent of the SDK's types."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RAO_PER_TOKEN = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronInfo:
    """One neuron. Scores in [0, 1]; stake and emission in tokens; ``ip`` is empty while nothing is served."""

    uid: int
    hotkey: str
    coldkey: str
    stake: float
    validator_permit: bool
    ip: str
    port: int
    incentive: float
    dividends: float
    emission: float
    last_update: int
    registered_at: int
    active: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Metagraph:
    """A subnet's neurons at one block, by uid."""

    netuid: int
    block: int
    neurons: tuple[NeuronInfo, ...]
    _index: dict[str, NeuronInfo] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {neuron.hotkey: neuron for neuron in self.neurons})

    def by_hotkey(self, hotkey: str) -> NeuronInfo | None:
        """The neuron of ``hotkey``, or None."""
        return self._index.get(hotkey)

    def registered_by(self, block: int) -> tuple[NeuronInfo, ...]:
        """Neurons registered at or before ``block``, by uid."""
        return tuple(neuron for neuron in self.neurons if neuron.registered_at <= block)


def from_sdk(graph: Any) -> Metagraph:
    """Our record of a `bittensor.Metagraph`."""
    return Metagraph(netuid=int(graph.netuid), block=int(graph.block), neurons=tuple(map(_neuron, graph.neurons)))


def _neuron(neuron: Any) -> NeuronInfo:
    host, _, port = (neuron.axon or ":0").rpartition(":")
    return NeuronInfo(
        uid=int(neuron.uid),
        hotkey=str(neuron.hotkey),
        coldkey=str(neuron.coldkey),
        stake=float(neuron.total_stake.rao) / RAO_PER_TOKEN,
        validator_permit=bool(neuron.validator_permit),
        ip=host.strip("[]"),
        port=int(port),
        incentive=float(neuron.incentive),
        dividends=float(neuron.dividends),
        emission=float(neuron.emission.rao) / RAO_PER_TOKEN,
        last_update=int(neuron.last_update),
        registered_at=int(neuron.block_at_registration),
        active=bool(neuron.active),
    )
