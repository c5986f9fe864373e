"""DoRA in its linear form: a plain mean of the members' vectors is the mean of their weights.

DoRA's weight is ``W' = diag(m / ||W + sBA||) (W + sBA)``. With the gain ``g = m / ||W + sBA||`` per output row and
``B~ = s diag(g) B`` it is ``W' = diag(g) W + B~ A``, which is linear in ``(g, B~)`` as long as everybody has the same
A. So A is frozen, drawn from the recipe's seed by `hivetrain.model.draws`, and never sent; g and B~ train freely.

What trains in g's place is ``lora_magnitude = g ||W||``: it starts where DoRA's m does and AdamW moves it on the same
scale (on the embedded default that is 0.04 nats better after 200 steps than training g itself).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hivetrain.model.draws import signs


def frozen_a(seed: int, epoch: int, name: str, rank: int, in_features: int, scaling: float) -> Tensor:
    """The A [rank, in] that all members share until the next merge; the same bits on every machine.

    Its entries are ``+-s / sqrt(3 in)``: random signs of the variance that ``s A`` has in plain DoRA, so that alpha,
    rank and learning rate mean the same in both forms.

    Args:
        seed: the recipe's `model.seed`.
        epoch: of the newest merge, 0 before the first.
        name: of the layer in the base model.
        scaling: s, alpha over rank.
    """
    drawn = signs(f"linear-a\n{seed}\n{epoch}\n{name}", (rank, in_features))
    return drawn * (scaling / math.sqrt(3 * in_features))


class LinearDora(nn.Module):
    """A linear layer with the linear form of DoRA: [..., in] -> [..., out].

    Attributes:
        base_layer: the frozen layer, `nn.Linear` or GPT-2's `Conv1D`.
        lora_B: B~ [out, rank], trained; 0 at first.
        lora_magnitude: g ||W|| [out], trained; ||W|| at first, so that a fresh layer is the base layer.
        lora_A: A [rank, in], frozen, and not part of the model's state.

    Args:
        base_layer: what it takes the place of.
        a: [rank, in], as `frozen_a` draws it.
        scaling: s, which is in A.
        transposed: whether the base stores its weight as [in, out].
    """

    lora_A: Tensor
    inverse_norm: Tensor

    def __init__(self, base_layer: nn.Module, a: Tensor, *, scaling: float, transposed: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling = scaling
        self.transposed = transposed
        norm = torch.linalg.vector_norm(self.base_weight().detach(), dim=1)
        self.lora_B = nn.Parameter(norm.new_zeros(len(norm), len(a)))
        self.lora_magnitude = nn.Parameter(norm.clone())
        self.register_buffer("lora_A", a, persistent=False)
        self.register_buffer("inverse_norm", _inverse(norm), persistent=False)

    def base_weight(self) -> Tensor:
        """W as [out, in]."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    @torch.no_grad()
    def reset_(self, a: Tensor) -> None:
        """Take another A, and the row norms of the base as it is now; what trains is not touched."""
        self.lora_A.copy_(a)
        self.inverse_norm.copy_(_inverse(torch.linalg.vector_norm(self.base_weight(), dim=1)))

    def forward(self, x: Tensor) -> Tensor:
        """``W' x + bias``."""
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        update = F.linear(F.linear(x, self.lora_A), self.lora_B, bias)
        return torch.addcmul(update, F.linear(x, self.base_weight()), self.lora_magnitude * self.inverse_norm)


def _inverse(norm: Tensor) -> Tensor:
    """1 / norm, and 0 for a row of zeros, which has no direction to scale."""
    return torch.where(norm > 0, 1 / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.zeros_like(norm))
