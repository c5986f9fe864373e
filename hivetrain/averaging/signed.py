"""What reducers signed, and what is proved against them.

A result against which there is evidence is void on every node that has seen the evidence; whoever finds it passes it
on to all others (`peers.Peers.warn`), and each checks it alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from hivetrain.averaging.group import Member
from hivetrain.averaging.means import Mean
from hivetrain.averaging.messages import Result
from hivetrain.averaging.proofs import pack_two_averages, proves_two_averages, proves_wrong_average, said
from hivetrain.averaging.results import is_signed, require_sound
from hivetrain.averaging.state import GaveUp, RoundState, Stale
from hivetrain.errors import Fault, PeerFault

logger = logging.getLogger(__name__)

Key = tuple[int, int]
"""(part, rank): one reducer's turn at one part."""


class Signed:
    """Results by part and rank, and evidence against them. ``on_proof`` is called with each new one."""

    def __init__(self, state: RoundState) -> None:
        self._state = state
        self._known: dict[Key, Result] = {}
        self.proofs: dict[Key, bytes] = {}
        self.on_proof: Callable[[Key], None] = lambda key: None

    def is_void(self, result: Result) -> bool:
        """Whether there is evidence against its reducer."""
        return (result.part, result.rank) in self.proofs

    def note(self, result: Result) -> bool:
        """Remember a result; False where nobody signed it. A second one that differs is a proof."""
        state, key = self._state, (result.part, result.rank)
        known = self._known.get(key)
        if known == result:
            return True
        if result.part not in state.holdings or not is_signed(result, state.plan, state.group_id, state.verify):
            return False
        if known is None:
            self._known[key] = result
        elif said(known) != said(result):
            self.convict(key, pack_two_averages(known, result), f"signed two means of part {result.part}")
        return True

    def is_sound(self, result: Result) -> bool:
        """Whether a signed result can be a mean of its part at all; blames who signed one that cannot."""
        state = self._state
        try:
            require_sound(result, state.plan, state.holdings[result.part].part)
        except PeerFault as fault:
            state.blame(state.plan.reducer(result.part, result.rank).hotkey, fault.fault, fault.detail, result.part)
            return False
        return True

    def certify(self, mean: Mean, result: Result, bearer: Member) -> None:
        """Check that ``result`` is signed over a mean that came whole, and that it can be one.

        Raises:
            GaveUp: it is not, after whoever is at fault is blamed: who brought it, or who signed it.
        """
        state, part = self._state, mean.part
        wrong, passed_on = "", state.plan.reducer(part.index, result.rank) != bearer
        if result.part != part.index or result.rank != mean.rank or not self.note(result):
            fault, wrong = Fault.BAD_SIGNATURE, "not a result that the part's reducer signed"
        elif not mean.fits(result):
            fault, wrong = Fault.NOT_COMMITTED, "the mean's bytes are not those that were signed"
        if wrong and fault is Fault.NOT_COMMITTED and passed_on:
            raise Stale(f"{bearer.hotkey} passed on what is not whole", None)
        if wrong:
            state.blame(bearer.hotkey, fault, wrong, part.index)
            raise GaveUp(f"{bearer.hotkey} brought what is {wrong}", None)
        try:
            require_sound(result, state.plan, part)
            if mean.unfit is not None:
                raise PeerFault(Fault.WRONG_AVERAGE, f"no mean: {mean.unfit.detail}")
        except PeerFault as fault_found:
            reducer = state.plan.reducer(part.index, result.rank).hotkey
            state.blame(reducer, fault_found.fault, fault_found.detail, part.index)
            raise GaveUp(fault_found.detail, None) from fault_found
        if self.is_void(result):
            raise Stale("there is evidence against it", None)

    def consider(self, key: Key, evidence: bytes) -> bool:
        """Take evidence from a member; False where it proves nothing of that part and rank."""
        state = self._state
        if key[0] not in state.holdings or key[1] >= state.plan.num_ranks:
            return False
        if key in self.proofs:
            return True
        guilty = state.plan.reducer(*key).hotkey
        if proves_two_averages(evidence, state.plan, state.verify, key) == guilty:
            self.convict(key, evidence, f"signed two means of part {key[0]}")
        elif proves_wrong_average(evidence, state.plan, state.verify, key) == guilty:
            self.convict(key, evidence, f"the mean of part {key[0]} is not that of what its senders committed to")
        else:
            return False
        return True

    def convict(self, key: Key, evidence: bytes, detail: str) -> None:
        """A result is void: blame its reducer, and obtain the part from the next."""
        if key in self.proofs:
            return
        state, (part, rank) = self._state, key
        self.proofs[key] = evidence
        state.blame(state.plan.reducer(part, rank).hotkey, Fault.WRONG_AVERAGE, detail, part, evidence)
        holding = state.holdings[part]
        held = holding.mean
        if held is not None and held.rank == rank:
            state.reopen(holding, rank + 1)
        elif held is None and holding.rank == rank:
            holding.abandon(Stale("there is evidence against it", None))
        self.on_proof(key)
