"""The adapted layers of a model, and the weight W' that base and adapter make together.

The arithmetic of `AdaptedLayer.weight` is elementwise IEEE float64, with multiply and add apart and sums in a fixed
order. So W', rounded to float32, has the same bits on every processor, which a matrix product has not: a merge can be
computed by every member and signed, instead of being believed (`hivetrain.training.merge`).

Shapes: W and W' [out, in], A [r, in], B [out, r], m [out].
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hivetrain.model.draws import uniform
from hivetrain.model.linear import LinearDora, frozen_a
from hivetrain.model.vector import little_endian, plain_name

BLOCK_ROWS = 16
"""Rows that are worked on at once: they stay in the processor's cache over all ranks."""


class Form(enum.Enum):
    """How a layer's adapter makes its weight."""

    LORA = "lora"  # W + sBA
    DORA = "dora"  # diag(m / ||W + sBA||) (W + sBA)
    LINEAR = "dora_linear"  # diag(m / ||W||) W + BA, A frozen


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdaptedLayer:
    """One linear layer with an adapter.

    Attributes:
        name: in the base model, such as ``model.layers.0.mlp.up_proj``; its parameters' names begin with it.
        form: what its parameters mean.
        scaling: s, alpha over rank.
        rank: r.
        transposed: whether the base stores W as [in, out], as GPT-2 does.
        module: the live layer.
    """

    name: str
    form: Form
    scaling: float
    rank: int
    transposed: bool
    module: nn.Module

    @property
    def weight_name(self) -> str:
        """The name of W among the base's tensors."""
        return f"{self.name}.weight"

    @property
    def magnitude_name(self) -> str | None:
        """The name of m in the trainable vector; LoRA has none."""
        names = {Form.DORA: "lora_magnitude_vector.weight", Form.LINEAR: "lora_magnitude"}
        return f"{self.name}.{names[self.form]}" if self.form in names else None

    @property
    def b_name(self) -> str:
        """The name of B in the trainable vector."""
        return f"{self.name}.lora_B" if self.form is Form.LINEAR else f"{self.name}.lora_B.weight"

    @property
    def a_name(self) -> str | None:
        """The name of A in the trainable vector; the linear form's is frozen."""
        return None if self.form is Form.LINEAR else f"{self.name}.lora_A.weight"

    def trained_names(self) -> tuple[str, ...]:
        """All of its parameters in the trainable vector."""
        return tuple(name for name in (self.a_name, self.b_name, self.magnitude_name) if name is not None)

    def oriented(self, stored: Tensor) -> Tensor:
        """A stored weight as [out, in], and the other way round."""
        return stored.T if self.transposed else stored

    def a(self, trained: Mapping[str, Tensor]) -> Tensor:
        """A [r, in] of one member's vector, or the frozen one, on the CPU."""
        if self.a_name is not None:
            return trained[self.a_name]
        assert isinstance(self.module, LinearDora)
        return self.module.lora_A.cpu()

    def direction(self, base: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
        """``W + sBA`` of a plain adapter, float64 [out, in]."""
        return _plus_product(base.double(), trained[self.b_name], self.a(trained), self.scaling)

    def weight(self, base: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
        """W' in float64 [out, in], on the CPU.

        Args:
            base: W [out, in].
            trained: one member's parameters by name, as `FlatVector.to_named` gives them.
        """
        if self.form is Form.LINEAR:
            assert self.magnitude_name is not None
            gain = _ratio(trained[self.magnitude_name].double(), row_norms(base))
            return _plus_product(base.double() * gain.unsqueeze(1), trained[self.b_name], self.a(trained), 1.0)
        direction = self.direction(base, trained)
        if self.magnitude_name is None:
            return direction
        return direction * _ratio(trained[self.magnitude_name].double(), row_norms(direction)).unsqueeze(1)

    def fresh(self, weight: Tensor, seed: int, epoch: int) -> dict[str, Tensor]:
        """Parameters of an adapter that starts on ``weight`` [out, in] after a merge: ``W' = W``.

        A is drawn as peft draws it, uniform on ``+-1 / sqrt(in)``, but alike on every machine.

        Args:
            seed: the recipe's `model.seed`.
            epoch: the one whose state the merge makes; another epoch, another A.
        """
        out_features, in_features = weight.shape
        made = {self.b_name: torch.zeros(out_features, self.rank)}
        if self.a_name is not None:
            label = f"merge-a\n{seed}\n{epoch}\n{self.name}"
            made[self.a_name] = uniform(label, (self.rank, in_features), 1 / math.sqrt(in_features))
        if self.magnitude_name is not None:
            made[self.magnitude_name] = row_norms(weight).float()
        return made

    @torch.no_grad()
    def rebase_(self, weight: Tensor, seed: int, epoch: int) -> None:
        """Put another base weight [out, in] into the live layer, with what the layer keeps of it."""
        stored: Tensor = self.module.base_layer.weight  # type: ignore[union-attr, assignment]
        stored.copy_(self.oriented(weight))
        if isinstance(self.module, LinearDora):
            rank, in_features = self.module.lora_A.shape
            self.module.reset_(frozen_a(seed, epoch, self.name, rank, in_features, self.scaling))
        elif self.form is Form.DORA:
            magnitudes: Any = self.module.lora_magnitude_vector
            magnitudes["default"].rebase_(weight)


def row_norms(matrix: Tensor) -> Tensor:
    """The norm of every row [out] in float64, summed in a fixed order: halves onto halves."""
    squares = matrix.double().square()
    while squares.shape[1] > 1:
        half = (squares.shape[1] + 1) // 2
        rest = squares[:, half:]
        squares = squares[:, :half].clone()
        squares[:, : rest.shape[1]] += rest
    # torch's own sqrt is MKL's, which misses the nearest float64 in one of a hundred; numpy's is the processor's.
    return torch.from_numpy(np.sqrt(squares[:, 0].numpy()))


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """``over / under``, and 0 where a row of zeros has no direction."""
    return torch.where(under > 0, over / torch.where(under > 0, under, 1.0), 0.0)


def _plus_product(matrix: Tensor, b: Tensor, a: Tensor, scaling: float) -> Tensor:
    """``matrix + scaling * b @ a`` in float64, one rank after the other."""
    total, scaled, a = matrix.double().clone(), b.double() * scaling, a.double()
    for rows, factors in zip(torch.split(total, BLOCK_ROWS), torch.split(scaled, BLOCK_ROWS), strict=True):
        for column, row in zip(factors.T, a, strict=True):
            rows += column.unsqueeze(1) * row
    return total


def adapted_layers(model: nn.Module) -> tuple[AdaptedLayer, ...]:
    """The adapted layers of what `attach_adapter` returned, sorted by name; none for full training."""
    return tuple(sorted(_find_layers(model), key=lambda layer: layer.name))


def _find_layers(model: nn.Module) -> Iterator[AdaptedLayer]:
    module: Any
    for name, module in model.named_modules():
        if isinstance(module, LinearDora):
            yield AdaptedLayer(
                name=plain_name(name),
                form=Form.LINEAR,
                scaling=module.scaling,
                rank=len(module.lora_A),
                transposed=module.transposed,
                module=module,
            )
        elif hasattr(module, "lora_A") and hasattr(module, "base_layer"):  # peft's
            yield AdaptedLayer(
                name=plain_name(name),
                form=Form.DORA if "default" in module.lora_magnitude_vector else Form.LORA,
                scaling=module.scaling["default"],
                rank=module.r["default"],
                transposed=module.fan_in_fan_out,
                module=module,
            )


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every stored tensor under the adapter by its name in the base model, tied ones once; views, not copies.

    ``model`` may have an adapter: embeddings and norms that train beside it hold what they hold now.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if ".lora_" in name or (tensor.data_ptr() in seen and tensor.numel()):
            continue
        seen.add(tensor.data_ptr())
        found[plain_name(name).replace(".base_layer.", ".")] = tensor
    return found


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 over name, dtype, shape and bytes of every tensor, by sorted name: the base's hash."""
    digest = hashlib.sha256(b"hivetrain-base/1\n")
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\n{tensor.dtype}\n{list(tensor.shape)}\n".encode())
        digest.update(little_endian(tensor))
    return digest.hexdigest()
