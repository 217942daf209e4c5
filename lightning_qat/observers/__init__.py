"""Where the range of a grid comes from. Add one: a file here and a line in a registry.

``OBSERVERS`` look at a weight, ``ACTIVATION_OBSERVERS`` at the input of a layer, batch by batch.
"""

from lightning_qat.core.protocols import ActivationObserver, Observer
from lightning_qat.observers.absmean import AbsMeanObserver
from lightning_qat.observers.ema import EMAObserver
from lightning_qat.observers.histogram_mse import HistogramMSEObserver
from lightning_qat.observers.minmax import MinMaxObserver
from lightning_qat.observers.mse import MSEObserver
from lightning_qat.observers.percentile import PercentileObserver
from lightning_qat.observers.running_minmax import RunningMinMaxObserver

OBSERVERS: dict[str, type[Observer]] = {"minmax": MinMaxObserver, "mse": MSEObserver, "absmean": AbsMeanObserver}

ACTIVATION_OBSERVERS: dict[str, type[ActivationObserver]] = {
    "minmax": RunningMinMaxObserver,
    "ema": EMAObserver,
    "percentile": PercentileObserver,
    "mse": HistogramMSEObserver,
}

__all__ = [
    "ACTIVATION_OBSERVERS",
    "OBSERVERS",
    "EMAObserver",
    "HistogramMSEObserver",
    "MSEObserver",
    "MinMaxObserver",
    "PercentileObserver",
    "RunningMinMaxObserver",
]
