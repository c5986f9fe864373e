"""The model: its base, what of it trains, and that as one flat vector."""

from hivetrain.model.assemble import Assembled, assemble
from hivetrain.model.dora import attach_adapter
from hivetrain.model.load import base_files, base_sha256, load_base
from hivetrain.model.residual import fold_residuals
from hivetrain.model.vector import Entry, FlatVector, schema_hash
from hivetrain.model.weights import AdaptedLayer, adapted_layers, base_tensors, tensors_sha256

__all__ = [
    "AdaptedLayer",
    "Assembled",
    "Entry",
    "FlatVector",
    "adapted_layers",
    "assemble",
    "attach_adapter",
    "base_files",
    "base_sha256",
    "base_tensors",
    "fold_residuals",
    "load_base",
    "schema_hash",
    "tensors_sha256",
]
