"""Everything that trains as one contiguous float32 vector, without ever gathering or scattering it.

Parameters and their gradients become views into two buffers. AdamW, clipping, averaging and hashing are then a
few operations on one vector instead of thousands on small tensors, and a state is a copy of one buffer.

Shapes: P = trainable parameters.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hivetrain.errors import SchemaMismatch
from hivetrain.run import Recipe

Entry = tuple[str, tuple[int, ...]]
"""Name and shape of one trainable parameter."""


class FlatVector:
    """The trainable parameters of ``model``, sorted by name, as views into one buffer.

    The model must be on its device already: moving it afterwards would give its parameters storage of their own.

    Attributes:
        entries: name and shape of every trainable parameter, in the vector's order.
        values: [P] float32; writing here changes the model.
        grad: [P] float32; `backward` adds into it. Clear it with ``grad.zero_()``, never by setting a
            parameter's ``grad`` to None, which would detach that parameter from the buffer.

    Raises:
        ValueError: nothing trains, or a trainable parameter is not float32, or they lie on several devices.
    """

    def __init__(self, model: nn.Module) -> None:
        trainable = sorted((plain_name(name), p) for name, p in model.named_parameters() if p.requires_grad)
        if not trainable:
            raise ValueError("the model has no trainable parameter; attach an adapter first")
        for name, parameter in trainable:
            if parameter.dtype is not torch.float32 or parameter.device != trainable[0][1].device:
                raise ValueError(
                    f"trainable parameters must be float32 on {trainable[0][1].device}, "
                    f"{name} is {parameter.dtype} on {parameter.device}"
                )
        self.entries: tuple[Entry, ...] = tuple((name, tuple(p.shape)) for name, p in trainable)
        self.values = torch.cat([p.detach().reshape(-1) for _, p in trainable])
        self.grad = torch.zeros_like(self.values)
        start = 0
        for _, parameter in trainable:
            stop = start + parameter.numel()
            parameter.data = self.values[start:stop].view(parameter.shape)
            parameter.grad = self.grad[start:stop].view(parameter.shape)
            start = stop

    @property
    def size(self) -> int:
        """P, in elements."""
        return self.values.numel()

    def load_(self, vector: Tensor) -> None:
        """Write ``vector`` [P] into the model.

        Raises:
            SchemaMismatch: another length or dtype.
        """
        if vector.shape != self.values.shape or vector.dtype is not torch.float32:
            raise SchemaMismatch(
                f"the trainable vector must be float32 [{self.size}], got {vector.dtype} {list(vector.shape)}"
            )
        self.values.copy_(vector)

    def to_named(self, vector: Tensor) -> dict[str, Tensor]:
        """Views into ``vector`` [P] by parameter name."""
        return split(vector, self.entries)

    def from_named(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The vector [P] on the CPU that ``tensors`` hold.

        Raises:
            SchemaMismatch: another set of names, another shape or dtype; names the first difference.
        """
        return join(tensors, self.entries)


def split(vector: Tensor, entries: tuple[Entry, ...]) -> dict[str, Tensor]:
    """Views into ``vector`` [P] by name.

    Raises:
        SchemaMismatch: ``vector`` does not have the entries' number of elements.
    """
    sizes = [_num_elements(shape) for _, shape in entries]
    if vector.shape != (sum(sizes),):
        raise SchemaMismatch(f"the trainable vector must have shape [{sum(sizes)}], got {list(vector.shape)}")
    pieces = torch.split(vector, sizes)
    return {name: piece.view(shape) for (name, shape), piece in zip(entries, pieces, strict=True)}


def join(tensors: Mapping[str, Tensor], entries: tuple[Entry, ...]) -> Tensor:
    """The inverse of `split`, for tensors that are not ours.

    Raises:
        SchemaMismatch: names the first parameter that is missing, unknown, or of another shape or dtype.
    """
    for name, shape in entries:
        if name not in tensors:
            raise SchemaMismatch(f"parameter {name} {list(shape)} is missing")
        theirs = tensors[name]
        if tuple(theirs.shape) != shape or theirs.dtype is not torch.float32:
            raise SchemaMismatch(
                f"parameter {name} must be float32 {list(shape)}, got {theirs.dtype} {list(theirs.shape)}"
            )
    unknown = sorted(set(tensors) - {name for name, _ in entries})
    if unknown:
        raise SchemaMismatch(f"parameter {unknown[0]} {list(tensors[unknown[0]].shape)} is not in this model")
    return torch.cat([tensors[name].detach().cpu().reshape(-1) for name, _ in entries])


def schema_hash(entries: tuple[Entry, ...], recipe: Recipe) -> str:
    """Hex sha256 over names, shapes and dtypes of the vector, and the recipe: who differs cannot average."""
    digest = hashlib.sha256(f"hivetrain-schema/1\n{recipe.sha256()}\n".encode())
    for name, shape in entries:
        digest.update(f"{name}\nfloat32\n{list(shape)}\n".encode())
    return digest.hexdigest()


def little_endian(tensor: Tensor) -> bytes | memoryview:
    """The tensor's bytes in row-major order, little endian, without a copy where the machine allows."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        return b""
    if sys.byteorder == "big":  # pragma: no cover - no such machine in CI
        return flat.numpy().byteswap().tobytes()
    return flat.view(torch.uint8).numpy().data


def plain_name(name: str) -> str:
    """``name`` without peft's wrapping, which differs between its versions and says nothing about the parameter."""
    return name.removeprefix("base_model.model.").replace(".default", "")


def _num_elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
