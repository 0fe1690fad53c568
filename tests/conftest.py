"""What must be in the environment before a test imports anything."""

import os
import secrets

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton interprets its kernels; it decides so at import

# A new Ray writes a token to the home folder and asks for it from then on; processes that start one at the
# same time, or that imported Ray before, would hold another. Ours all have this one from the start.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
