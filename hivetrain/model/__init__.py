"""The model: its base, what of it trains, and that as one flat vector."""

from hivetrain.model.assemble import Assembled, assemble
from hivetrain.model.dora import attach_adapter
from hivetrain.model.load import base_files, base_sha256, load_base
from hivetrain.model.vector import Entry, FlatVector, schema_hash

__all__ = [
    "Assembled",
    "Entry",
    "FlatVector",
    "assemble",
    "attach_adapter",
    "base_files",
    "base_sha256",
    "load_base",
    "schema_hash",
]
