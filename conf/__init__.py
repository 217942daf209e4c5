"""Hydra configuration; the rest of the groups is made from signatures, when Hydra first looks in here."""

from lightning_qat.cli.nodes import store_all

store_all()
