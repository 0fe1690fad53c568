"""Without a GPU, Triton interprets its kernels. It decides so when it is imported, before any test."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
