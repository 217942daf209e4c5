"""Quantization-aware fine-tuning for PyTorch Lightning.

``from lightning_qat import QATCallback`` is all that most users need. Nothing is imported until it is asked
for, so that the core can be used without Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "PTQCallback": "lightning_qat.callbacks",
    "QATCallback": "lightning_qat.callbacks",
    "QuantScheme": "lightning_qat.core",
    "export": "lightning_qat.exporting",
    "load_exported": "lightning_qat.exporting",
    "load_qat": "lightning_qat.api",
    "prepare": "lightning_qat.nn",
    "quantize_model": "lightning_qat.api",
    "quantized_weights": "lightning_qat.nn",
    "restore_float": "lightning_qat.nn",
}

if TYPE_CHECKING:
    from lightning_qat.api import load_qat as load_qat
    from lightning_qat.api import quantize_model as quantize_model
    from lightning_qat.callbacks import PTQCallback as PTQCallback
    from lightning_qat.callbacks import QATCallback as QATCallback
    from lightning_qat.core import QuantScheme as QuantScheme
    from lightning_qat.exporting import export as export
    from lightning_qat.exporting import load_exported as load_exported
    from lightning_qat.nn import prepare as prepare
    from lightning_qat.nn import quantized_weights as quantized_weights
    from lightning_qat.nn import restore_float as restore_float

__all__ = [
    "PTQCallback",
    "QATCallback",
    "QuantScheme",
    "export",
    "load_exported",
    "load_qat",
    "prepare",
    "quantize_model",
    "quantized_weights",
    "restore_float",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lightning_qat' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
