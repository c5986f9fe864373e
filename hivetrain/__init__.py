"""Hivetrain: one language model, trained together over the internet by people who own GPUs."""

__version__ = "0.1.0"
