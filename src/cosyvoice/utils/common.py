"""`set_all_random_seed`, where the reference's scripts look for it."""

import random

import numpy as np
import torch


def set_all_random_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators; requests without a seed follow them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
