"""Files of a quantized model. Add a format: a file here and a line in ``EXPORTERS``."""

from lightning_qat.core.protocols import Exporter
from lightning_qat.exporters.dequantized import Dequantized
from lightning_qat.exporters.packed import Packed

EXPORTERS: dict[str, type[Exporter]] = {"safetensors": Packed, "dequantized": Dequantized}

__all__ = ["EXPORTERS", "Dequantized", "Packed"]
