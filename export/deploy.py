"""The deploy form: the same function as a checkpoint's network, rewritten so that the device does less.

Everything here is exact re-parameterisation, computed in float64 and rounded once: pixel normalisation goes into the
patch embedding, which becomes one matrix product over flattened uint8 patches; LayerNorm's scale and shift go into the
next product; the attention scale into the query weights; class token, positions and patch bias into one constant; and
the last block computes only the token that the head reads. Shape suffixes are those of `vit_edge.vit`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vit_edge.image import Preprocessing
from vit_edge.vit import Attention, Block, VisionTransformer, ViTConfig

__all__ = ["DeployedViT"]


class Product(nn.Module):
    """x W + b with W stored [in, out], as ONNX's MatMul takes it."""

    def __init__(self, weight_IO: Tensor, bias_O: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_IO.float().contiguous(), requires_grad=False)
        self.bias = nn.Parameter(bias_O.float().contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight) + self.bias


class Normalisation(nn.Module):
    """LayerNorm whose scale and shift moved into the product after it; ONNX Runtime 1.17 still needs both inputs."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.eps = config.layer_norm_eps
        self.register_buffer("ones", torch.ones(config.width))
        self.register_buffer("zeros", torch.zeros(config.width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        ones, zeros = self.get_buffer("ones"), self.get_buffer("zeros")
        return functional.layer_norm(x_BTD, ones.shape, ones, zeros, self.eps)


class PatchProduct(nn.Module):
    """Map uint8 pixels [batch, height, width, 3] to tokens with their positions: one product, one addition."""

    def __init__(self, model: VisionTransformer, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.config = model.config
        weight_DCYX = model.patch_embed.proj.weight.double()
        bias_D = _bias(model.patch_embed.proj)
        mean_C, std_C = (torch.tensor(v, dtype=torch.float64) for v in (preprocessing.mean, preprocessing.std))
        # (x/255 - mean)/std convolved with W is x convolved with W/(255 std), less W summed against mean/std.
        folded_DCYX = weight_DCYX / (255 * std_C).view(1, 3, 1, 1)
        bias_D = bias_D - (weight_DCYX * (mean_C / std_C).view(1, 3, 1, 1)).sum(dim=(1, 2, 3))
        weight_ID = folded_DCYX.permute(2, 3, 1, 0).reshape(-1, model.config.width)
        self.weight = nn.Parameter(weight_ID.float().contiguous(), requires_grad=False)
        positions_TD = model.pos_embed[0].double().clone()
        positions_TD[-model.config.num_patches :] += bias_D
        if model.config.pooling == "class":
            positions_TD[0] += model.cls_token[0, 0].double()
        self.positions = nn.Parameter(positions_TD.float(), requires_grad=False)

    def forward(self, images_BYXC: Tensor) -> Tensor:
        (height, width), (patch_y, patch_x) = self.config.image_size, self.config.patch_size
        columns, values = width // patch_x, patch_x * 3
        # Rows of patches join the batch: rank 4 is what the strictest accelerators take.
        rows = images_BYXC.reshape(-1, patch_y, columns, values).transpose(1, 2)
        patches_BTI = rows.reshape(-1, (height // patch_y) * columns, patch_y * values)
        x_BTD = torch.matmul(patches_BTI.float(), self.weight)
        if self.config.pooling == "class":
            # An empty row for the class token, by padding: no shape arithmetic, whatever the batch.
            x_BTD = functional.pad(x_BTD, (0, 0, 1, 0))
        return x_BTD + self.positions


class DeployedAttention(nn.Module):
    """Self-attention with queries, keys and values from one product; for one token, queries from their own."""

    def __init__(self, attention: Attention, norm: nn.LayerNorm, config: ViTConfig, *, first_token_only: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.width = config.num_heads, config.head_dim, config.width
        weight_ID, bias_D = _after_norm(attention.qkv, norm)
        scale = torch.ones(3 * config.width, dtype=torch.float64)
        scale[: config.width] = config.head_dim**-0.5
        weight_ID, bias_D = weight_ID * scale, bias_D * scale
        self.first_token_only = first_token_only
        if first_token_only:
            self.query = Product(weight_ID[:, : config.width], bias_D[: config.width])
            self.key_value = Product(weight_ID[:, config.width :], bias_D[config.width :])
        else:
            self.qkv = Product(weight_ID, bias_D)
        self.proj = Product(attention.proj.weight.double().T, _bias(attention.proj))

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.first_token_only:
            q_BNTH = self._heads(self.query(x_BTD[:, :1]))
            k_BNTH, v_BNTH = torch.split(self._heads(self.key_value(x_BTD)), self.num_heads, dim=1)
        else:
            q_BNTH, k_BNTH, v_BNTH = torch.split(self._heads(self.qkv(x_BTD)), self.num_heads, dim=1)
        weights_BNTT = torch.softmax(torch.matmul(q_BNTH, k_BNTH.transpose(2, 3)), dim=-1)
        mixed_BTNH = torch.matmul(weights_BNTT, v_BNTH).transpose(1, 2)
        tokens = 1 if self.first_token_only else x_BTD.shape[1]
        out_BTD: Tensor = self.proj(mixed_BTNH.reshape(-1, tokens, self.width))
        return out_BTD

    def _heads(self, x_BTD: Tensor) -> Tensor:
        """Return [batch, groups x heads, tokens, head dim]: one transpose for queries, keys and values together."""
        groups = x_BTD.shape[2] // self.head_dim
        return x_BTD.reshape(-1, x_BTD.shape[1], groups, self.head_dim).transpose(1, 2)


class DeployedBlock(nn.Module):
    """One encoder block; the last one of a class-token network computes only that token after its attention."""

    def __init__(self, block: nn.Module, config: ViTConfig, *, first_token_only: bool) -> None:
        super().__init__()
        assert isinstance(block, Block)
        self.first_token_only = first_token_only
        self.norm1, self.norm2 = Normalisation(config), Normalisation(config)
        self.attention = DeployedAttention(block.attn, block.norm1, config, first_token_only=first_token_only)
        self.fc1 = Product(*_after_norm(block.mlp.fc1, block.norm2))
        self.fc2 = Product(block.mlp.fc2.weight.double().T, _bias(block.mlp.fc2))

    def forward(self, x_BTD: Tensor) -> Tensor:
        residual_BTD = x_BTD[:, :1] if self.first_token_only else x_BTD
        x_BTD = residual_BTD + self.attention(self.norm1(x_BTD))
        out_BTD: Tensor = x_BTD + self.fc2(functional.gelu(self.fc1(self.norm2(x_BTD))))
        return out_BTD


class DeployedViT(nn.Module):
    """Map uint8 images [batch, height, width, 3], RGB, to float32 logits [batch, classes]."""

    def __init__(self, model: VisionTransformer, preprocessing: Preprocessing) -> None:
        super().__init__()
        config = model.config
        self.pooling = config.pooling
        self.patches = PatchProduct(model, preprocessing)
        last = config.depth - 1 if config.pooling == "class" else config.depth
        self.block = nn.ModuleList(
            DeployedBlock(block, config, first_token_only=number == last) for number, block in enumerate(model.blocks)
        )
        self.norm = Normalisation(config)
        self.head = Product(*_after_norm(model.head, model.norm))

    def forward(self, images_BYXC: Tensor) -> Tensor:
        x_BTD = self.patches(images_BYXC)
        for block in self.block:
            x_BTD = block(x_BTD)
        x_BTD = self.norm(x_BTD)
        pooled_BD = x_BTD.flatten(1) if self.pooling == "class" else x_BTD.mean(dim=1)
        logits_BK: Tensor = self.head(pooled_BD)
        return logits_BK


def _after_norm(linear: nn.Linear, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return weight [in, out] and bias, float64, of `linear` with the norm's scale and shift folded in."""
    weight_OI = linear.weight.double()
    return (weight_OI * norm.weight.double()).T, _bias(linear) + weight_OI @ norm.bias.double()


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias.double()
