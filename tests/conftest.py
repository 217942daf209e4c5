import logging
import os

import pytest
import torch

# Before lightning is imported: no advertisement between the lines, no network.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Two test workers share two cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
