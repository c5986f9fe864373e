"""The base under a live model's adapters: which one it is, when a merge replaces it, and putting another there."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from hivetrain.errors import IntegrityError
from hivetrain.model.vector import FlatVector
from hivetrain.model.weights import AdaptedLayer, adapted_layers, base_tensors
from hivetrain.run import Recipe
from hivetrain.training.merge import merge_into_base
from hivetrain.training.state import State


class LiveBase:
    """The base of one live model. Not thread-safe: one thread owns the model.

    Attributes:
        sha256: of the base that is in the model now.
        epoch: the one that published it.

    Args:
        model: what `attach_adapter` returned.
        flat: its trainable vector.
        recipe: the run's.
        sha256: of the base that it was built on, that of epoch 0.
    """

    def __init__(self, model: nn.Module, flat: FlatVector, recipe: Recipe, sha256: str) -> None:
        self.sha256 = sha256
        self.epoch = 0
        self._model = model
        self._flat = flat
        self._adapter = recipe.adapter
        self._seed = recipe.model.seed
        self._layers = adapted_layers(model)

    def tensors(self) -> dict[str, Tensor]:
        """The base's tensors by name, where they lie; those that train hold what the live vector holds."""
        return base_tensors(self._model)

    def size_bytes(self) -> int:
        """Of all tensors of the base."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def advance(self, state: State) -> State:
        """What an outer step gave, merged where its epoch is one at which a merge is due; the model stays as it is."""
        if state.epoch == 0 or self._adapter.base_epoch(state.epoch) != state.epoch:
            return state
        return merge_into_base(state, self.tensors(), self._layers, self._flat.entries, self._seed)

    def adopt_(self, state: State) -> State:
        """Put the state's base into the model, unless it is there; returns the state without the tensors.

        Raises:
            ValueError: it is not there, and the state does not carry it.
        """
        if state.base_sha256 != self.sha256:
            if state.base is None:
                raise ValueError(f"the state belongs to base {state.base_sha256}, the model is on {self.sha256}")
            self._install_(state.base, self._adapter.base_epoch(state.epoch))
            self.sha256 = state.base_sha256
        return dataclasses.replace(state, base=None)

    @contextlib.contextmanager
    def holding(self, state: State) -> Iterator[None]:
        """The model with the state's base, and with its own again afterwards."""
        if state.base_sha256 == self.sha256:
            yield
            return
        live, sha256, epoch = self.tensors(), self.sha256, self.epoch
        before = {layer.weight_name: live[layer.weight_name].clone() for layer in self._layers}
        try:
            self.adopt_(state)
            yield
        finally:
            self._install_(before, epoch)
            self.sha256 = sha256

    def check(self, found: Mapping[str, Tensor]) -> None:
        """Refuse downloaded tensors that are not of this model; their hash is for the caller to check.

        Raises:
            IntegrityError: names the first difference.
        """
        live = self.tensors()
        for name, tensor in live.items():
            theirs = found.get(name)
            if theirs is None or theirs.shape != tensor.shape or theirs.dtype != tensor.dtype:
                got = "nothing" if theirs is None else f"{theirs.dtype} {list(theirs.shape)}"
                raise IntegrityError(f"the base's {name} must be {tensor.dtype} {list(tensor.shape)}, got {got}")
        unknown = sorted(set(found) - set(live))
        if unknown:
            raise IntegrityError(f"the base holds {unknown[0]}, which this model does not have")

    def _install_(self, base: Mapping[str, Tensor], epoch: int) -> None:
        install_base_(self._layers, base, self._seed, epoch)
        self.epoch = epoch


def install_base_(layers: Sequence[AdaptedLayer], base: Mapping[str, Tensor], seed: int, epoch: int) -> None:
    """Put ``base`` under the adapters of the live model; load the state's vector afterwards.

    Args:
        base: the tensors by name, as `base_tensors` gives them.
        epoch: the one whose merge made it, 0 for the genesis base.
    """
    for layer in layers:
        layer.rebase_(layer.oriented(base[layer.weight_name]), seed, epoch)
