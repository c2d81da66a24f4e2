"""Position embeddings for another grid of patches, resampled as the library that they come from does it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Resampling", "resample_positions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Resampling:
    """How a library interpolates, always bicubic: timm antialiases, torchvision aligns corners, transformers neither.

    Sources: timm.layers.resample_abs_pos_embed; torchvision.models.vision_transformer.interpolate_embeddings;
    interpolate_pos_encoding of the models in transformers.
    """

    antialias: bool = False
    align_corners: bool = False


def resample_positions(
    positions_1TD: Tensor, *, old: tuple[int, int], new: tuple[int, int], resampling: Resampling
) -> Tensor:
    """Return [1, T', D] for the grid `new` (rows, columns); what stands before the patches stays as it is."""
    rows, columns = old
    num_prefix = positions_1TD.shape[1] - rows * columns
    prefix_1PD, patches_1TD = positions_1TD[:, :num_prefix], positions_1TD[:, num_prefix:]
    grid_1DRS = patches_1TD.float().reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    resized_1DRS = functional.interpolate(
        grid_1DRS, size=new, mode="bicubic", antialias=resampling.antialias, align_corners=resampling.align_corners
    )
    return torch.cat([prefix_1PD.float(), resized_1DRS.flatten(2).transpose(1, 2)], dim=1).contiguous()
