"""Giving a hotkey its uid, and taking the uid of the least paid neuron when the subnet is full."""

from __future__ import annotations

from template.chain import epoch
from template.chain.faults import DispatchError
from template.chain.state import NeuronRow, State


def register_neuron(state: State, netuid: int, hotkey: str, coldkey: str) -> int:
    """Append a neuron, or replace the least paid one outside its immunity, and return its uid.

    Args:
        state: the open transaction.
        netuid: the subnet.
        hotkey: who gets the uid.
        coldkey: its owner, the signer.

    Raises:
        DispatchError: no such subnet, already registered, another coldkey's hotkey, or everybody is immune.
    """
    subnet = state.subnet(netuid)
    if subnet is None:
        raise DispatchError("SubnetNotExists", f"subnet {netuid} does not exist")
    if state.neuron(netuid, hotkey) is not None:
        raise DispatchError("HotKeyAlreadyRegisteredInSubNet", f"{hotkey} is already registered on subnet {netuid}")
    owner = state.scalar("SELECT coldkey FROM owners WHERE hotkey = ?", (hotkey,))
    if owner is not None and owner != coldkey:
        raise DispatchError("NonAssociatedColdKey", f"{hotkey} belongs to coldkey {owner}, not to {coldkey}")

    block = state.pending()
    neurons = state.neurons(netuid)
    if len(neurons) < subnet.rules.max_uids:
        uid = len(neurons)
    else:
        mortal = [n for n in neurons if block - n.registered_at >= subnet.rules.immunity_period]
        if not mortal:
            raise DispatchError(
                "NoNeuronIdAvailable", f"all {len(neurons)} neurons of subnet {netuid} are within their immunity period"
            )
        uid = min(mortal, key=_worth).uid
        _vacate(state, netuid, uid)
    state.execute("INSERT OR IGNORE INTO owners VALUES (?, ?)", (hotkey, coldkey))
    state.execute(
        "INSERT INTO neurons (netuid, uid, hotkey, coldkey, registered_at, last_update) VALUES (?, ?, ?, ?, ?, ?)",
        (netuid, uid, hotkey, coldkey, block, block),
    )
    epoch.grant_genesis_permits(state, netuid)
    return uid


def _worth(neuron: NeuronRow) -> tuple[int, float, int, int]:
    """Least emission first (so a validator's dividends count), then the older registration, then the lower uid."""
    return neuron.emission, neuron.incentive + neuron.dividends, neuron.registered_at, neuron.uid


def _vacate(state: State, netuid: int, uid: int) -> None:
    """Remove a neuron with its row and column of the bonds and its row of the weights.

    Weights that others gave to the uid stay, as on chain: an epoch ignores those older than the registration.
    """
    state.execute("DELETE FROM neurons WHERE netuid = ? AND uid = ?", (netuid, uid))
    state.execute("DELETE FROM weights WHERE netuid = ? AND uid = ?", (netuid, uid))
    state.execute("DELETE FROM bonds WHERE netuid = ? AND uid = ?", (netuid, uid))
    for validator, row in state.matrix("bonds", netuid).items():
        if uid in row:
            state.set_row("bonds", netuid, validator, {target: bond for target, bond in row.items() if target != uid})
