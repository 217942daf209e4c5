"""Techniques of training, each switched on by an argument of QATCallback. Add one: a file here and a line below."""

from lightning_qat.callbacks.techniques.technique import Technique, read_technique

TECHNIQUES: dict[str, type[Technique]] = {}

__all__ = ["TECHNIQUES", "Technique", "read_technique"]
