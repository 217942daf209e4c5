"""The Lightning side: callbacks."""

from lightning_qat.callbacks.ptq import PTQCallback
from lightning_qat.callbacks.qat import QATCallback

__all__ = ["PTQCallback", "QATCallback"]
