"""Where the range of a grid comes from. Add one: a file here and a line in ``OBSERVERS``."""

from lightning_qat.core.protocols import Observer
from lightning_qat.observers.minmax import MinMaxObserver
from lightning_qat.observers.mse import MSEObserver

OBSERVERS: dict[str, type[Observer]] = {"minmax": MinMaxObserver, "mse": MSEObserver}

__all__ = ["OBSERVERS", "MSEObserver", "MinMaxObserver"]
