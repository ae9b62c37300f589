"""train.deterministic: the same seed gives the same bits."""

import os

import torch


def make_deterministic(enabled: bool, seed: int) -> None:
    """Seed the global generators; when `enabled`, let PyTorch refuse what is not deterministic."""
    torch.manual_seed(seed)
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
