"""A backbone of a second's work, with weights that let every part of it matter."""

import torch
from torch import nn

from sparsevit import SparseSwin, SwinConfig

TINY = SwinConfig(embed_dim=16, depths=(2, 4, 2), num_heads=(1, 2, 2), window_size=4)


def random_backbone() -> SparseSwin:
    torch.manual_seed(3)
    backbone = SparseSwin(TINY).eval()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone
