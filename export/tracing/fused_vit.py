"""The fused inference graph: the same function as a checkpoint's network, rewritten so that the device does less.

Everything here is exact re-parameterisation, computed in float64 and rounded once: pixel normalisation goes into the
patch embedding, which becomes one matrix product over flattened uint8 patches; LayerNorm's scale and shift go into the
next product; layer scale into the product before it; the attention scale into the query weights; prefix tokens,
positions and patch bias into one constant; both heads of a distilled network into one; and the last block computes only
the tokens that pooling reads. Shape suffixes are those of `vit_edge.vit`, and I values into a product, O out of it.

Registers stand first here: attention does not know the order of its tokens, and so what any pooling reads is one slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from vit_edge.image import Preprocessing
from vit_edge.vit import Block, LayerScale, VisionTransformer, ViTConfig

__all__ = ["DeployedViT", "Embedding", "unit_length"]

# How an encoder gives its vector.
Embedding: TypeAlias = Literal["plain", "normalized"]

# quick_gelu(x) = x sigmoid(1.702 x) is silu(1.702 x) / 1.702: both factors go into the products around it.
_QUICK_GELU = 1.702


# float32 still squares it; vectors of networks are far longer.
_SHORTEST = 1e-12


def unit_length(vectors_BD: Tensor) -> Tensor:
    """Return the vectors divided by their length, as `torch.nn.functional.normalize` does."""
    length_B1: Tensor = torch.linalg.vector_norm(vectors_BD, dim=-1, keepdim=True)
    return vectors_BD / length_B1.clamp_min(_SHORTEST)


class QuantizableOp(nn.Module):
    """x W + b with W stored [in, out], as ONNX's MatMul takes it."""

    def __init__(self, weight_IO: Tensor, bias_O: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_IO.float().contiguous(), requires_grad=False)
        self.bias = nn.Parameter(bias_O.float().contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight) + self.bias


class Normalisation(nn.Module):
    """LayerNorm whose scale and shift moved into the next linear layer; ONNX Runtime 1.17 still needs both inputs."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.eps = config.layer_norm_eps
        self.register_buffer("ones", torch.ones(config.width))
        self.register_buffer("zeros", torch.zeros(config.width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        ones, zeros = self.get_buffer("ones"), self.get_buffer("zeros")
        return functional.layer_norm(x_BTD, ones.shape, ones, zeros, self.eps)


class PatchMatMul(nn.Module):
    """Map images to tokens with their positions: one MatMul, one Add.

    Images are uint8 pixels [batch, height, width, 3], or, without `pixels`, normalised float32 [batch, 3, height,
    width].
    """

    def __init__(self, model: VisionTransformer, preprocessing: Preprocessing, *, pixels: bool) -> None:
        super().__init__()
        self.config, self.pixels = model.config, pixels
        weight_DCYX, bias_D = model.patch_embed.proj.weight.double(), _bias(model.patch_embed.proj)
        if pixels:
            # (x/255 - mean)/std convolved with W is x convolved with W/(255 std), less W summed against mean/std.
            mean_C, std_C = (torch.tensor(v, dtype=torch.float64) for v in (preprocessing.mean, preprocessing.std))
            bias_D = bias_D - (weight_DCYX * (mean_C / std_C).view(1, 3, 1, 1)).sum(dim=(1, 2, 3))
            weight_DCYX = weight_DCYX / (255 * std_C).view(1, 3, 1, 1)
        weight_ID = weight_DCYX.permute(2, 3, 1, 0).reshape(-1, model.config.width)
        self.weight = nn.Parameter(weight_ID.float().contiguous(), requires_grad=False)
        self.positions = nn.Parameter(_constant_tokens(model, bias_D).float(), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        (height, width), (patch_y, patch_x) = self.config.image_size, self.config.patch_size
        columns, values = width // patch_x, patch_x * 3
        images_BYXC = images if self.pixels else images.permute(0, 2, 3, 1)
        # Rows of patches join the batch: rank 4 is what the strictest accelerators take.
        rows = images_BYXC.reshape(-1, patch_y, columns, values).transpose(1, 2)
        patches_BTI = rows.reshape(-1, (height // patch_y) * columns, patch_y * values)
        x_BTD = torch.matmul(patches_BTI.float(), self.weight)
        if self.config.num_prefix_tokens:
            # Empty rows for the prefix tokens, by padding: no shape arithmetic, whatever the batch.
            x_BTD = functional.pad(x_BTD, (0, 0, self.config.num_prefix_tokens, 0))
        return x_BTD + self.positions


class DeployedAttention(nn.Module):
    """Self-attention from the tokens `asking` to all tokens; queries, keys and values from one MatMul.

    Where fewer than half of the tokens ask, queries have a product of their own: else one product for all is cheaper
    than a second one and a copy of the tokens.
    """

    def __init__(self, block: Block, config: ViTConfig, *, asking: slice) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.width, self.asking = config.num_heads, config.head_dim, config.width, asking
        weight_ID, bias_D = _after_norm(block.attn.qkv, block.norm1)
        scale = torch.ones(3 * config.width, dtype=torch.float64)
        scale[: config.width] = config.head_dim**-0.5
        weight_ID, bias_D = weight_ID * scale, bias_D * scale
        self.num_asking = asking.stop - asking.start
        self.all_ask = self.num_asking == _num_tokens(config)
        self.own_query = 2 * self.num_asking < _num_tokens(config)
        if self.own_query:
            self.query = QuantizableOp(weight_ID[:, : config.width], bias_D[: config.width])
            self.key_value = QuantizableOp(weight_ID[:, config.width :], bias_D[config.width :])
        else:
            self.qkv = QuantizableOp(weight_ID, bias_D)
        self.proj = QuantizableOp(*_scaled(block.attn.proj, block.ls1))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens asking, and the weights [B, N, asking, T] that mixed the values."""
        q_BNTH, k_BNTH, v_BNTH = self._queries_keys_values(x_BTD)
        weights_BNTT = torch.softmax(torch.matmul(q_BNTH, k_BNTH.transpose(2, 3)), dim=-1)
        mixed_BTNH = torch.matmul(weights_BNTT, v_BNTH).transpose(1, 2)
        return self.proj(mixed_BTNH.reshape(-1, self.num_asking, self.width)), weights_BNTT

    def _queries_keys_values(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.own_query:
            k_BNTH, v_BNTH = torch.split(self._heads(self.key_value(x_BTD)), self.num_heads, dim=1)
            return self._heads(self.query(x_BTD[:, self.asking])), k_BNTH, v_BNTH
        q_BNTH, k_BNTH, v_BNTH = torch.split(self._heads(self.qkv(x_BTD)), self.num_heads, dim=1)
        return (q_BNTH if self.all_ask else q_BNTH[:, :, self.asking]), k_BNTH, v_BNTH

    def _heads(self, x_BTD: Tensor) -> Tensor:
        """Return [batch, groups x heads, tokens, head dim]: one transpose for queries, keys and values together."""
        groups = x_BTD.shape[2] // self.head_dim
        return x_BTD.reshape(-1, x_BTD.shape[1], groups, self.head_dim).transpose(1, 2)


class DeployedBlock(nn.Module):
    """One encoder block; after its attention only the tokens `asking` go on."""

    def __init__(self, block: nn.Module, config: ViTConfig, *, asking: slice) -> None:
        super().__init__()
        assert isinstance(block, Block)
        self.norm1, self.norm2 = Normalisation(config), Normalisation(config)
        self.attention = DeployedAttention(block, config, asking=asking)
        quick = _QUICK_GELU if config.activation == "quick_gelu" else 1.0
        self.activation = functional.silu if config.activation == "quick_gelu" else block.mlp.activation
        self.fc1 = QuantizableOp(*(quick * values for values in _after_norm(block.mlp.fc1, block.norm2)))
        weight_ID, bias_D = _scaled(block.mlp.fc2, block.ls2)
        self.fc2 = QuantizableOp(weight_ID / quick, bias_D)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens asking, and how they attended to all tokens."""
        residual_BTD = x_BTD if self.attention.all_ask else x_BTD[:, self.attention.asking]
        mixed_BTD, weights_BNTT = self.attention(self.norm1(x_BTD))
        x_BTD = residual_BTD + mixed_BTD
        return x_BTD + self.fc2(self.activation(self.fc1(self.norm2(x_BTD)))), weights_BNTT


class DeployedViT(nn.Module):
    """Map uint8 images [batch, height, width, 3], RGB, to float32 logits [batch, classes], and `extras` after them.

    With `embedding` the network has no head and gives what the head reads, [batch, width] (of a distilled network the
    mean of both tokens), in length 1 if that is "normalized". Extras are "features", what the head reads, "tokens"
    [batch, tokens, width] in the order of `VisionTransformer.forward_features`, and "attention" [batch, heads, rows,
    columns]: that of the last block to each patch, from the class token, or the mean over the patches where they are
    what is pooled. Without `pixels` the images are normalised float32 [batch, 3, height, width].
    """

    def __init__(
        self,
        model: VisionTransformer,
        preprocessing: Preprocessing,
        *,
        pixels: bool = True,
        extras: Sequence[str] = (),
        embedding: Embedding | None = None,
    ) -> None:
        super().__init__()
        self.config, self.extras, self.embedding = model.config, tuple(extras), embedding
        self.patches = PatchMatMul(model, preprocessing, pixels=pixels)
        # CLIP's norm is read by the residual sum too: its scale and shift have no product to go into.
        self.norm_pre = model.norm_pre
        every, self.pooled = slice(0, _num_tokens(model.config)), _pooled(model.config)
        asking = [every] * (model.config.depth - 1) + [every if "tokens" in self.extras else self.pooled]
        blocks = zip(model.blocks, asking, strict=True)
        self.block = nn.ModuleList(DeployedBlock(block, model.config, asking=tokens) for block, tokens in blocks)
        # Features are for others to read: their norm keeps its scale and shift.
        is_read = embedding is not None or "features" in self.extras
        self.norm = model.norm if is_read else Normalisation(model.config)
        if embedding is None:
            self.head = QuantizableOp(*_heads(model, after_norm=not is_read))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        x_BTD = self.norm_pre(self.patches(images))
        for block in self.block:
            x_BTD, weights_BNTT = block(x_BTD)
        if self.config.final_norm == "before_pooling":
            x_BTD = self.norm(x_BTD)
        pooled_BD = self._pool(x_BTD[:, self.pooled] if "tokens" in self.extras else x_BTD)
        if self.config.final_norm == "after_pooling":
            pooled_BD = self.norm(pooled_BD)
        first_BK: Tensor = self._embedding(pooled_BD) if self.embedding is not None else self.head(pooled_BD)
        extras = {
            "features": lambda: pooled_BD,
            "attention": lambda: self._attention(weights_BNTT),
            "tokens": lambda: self._in_order(x_BTD),
        }
        return (first_BK, *(extras[name]() for name in self.extras)) if self.extras else first_BK

    def _embedding(self, pooled_BD: Tensor) -> Tensor:
        if self.config.distilled:
            pooled_BD = pooled_BD.reshape(-1, 2, self.config.width).mean(dim=1)
        return unit_length(pooled_BD) if self.embedding == "normalized" else pooled_BD

    def _in_order(self, x_BTD: Tensor) -> Tensor:
        """Return the tokens as the network has them: its registers stand behind the class token."""
        num_registers, num_prefix = self.config.num_registers, self.config.num_prefix_tokens
        if not num_registers:
            return x_BTD
        first = (x_BTD[:, num_registers:num_prefix], x_BTD[:, :num_registers], x_BTD[:, num_prefix:])
        return torch.cat(first, dim=1)

    def _attention(self, weights_BNTT: Tensor) -> Tensor:
        rows, columns = self.config.grid
        if "tokens" in self.extras:  # every token asked
            weights_BNTT = weights_BNTT[:, :, self.pooled]
        to_patches_BNTT = weights_BNTT[..., self.config.num_prefix_tokens :]
        from_one_BNT = to_patches_BNTT.mean(dim=2) if self.config.pooling == "mean" else to_patches_BNTT[:, :, :1]
        return from_one_BNT.reshape(-1, self.config.num_heads, rows, columns)

    def _pool(self, x_BTD: Tensor) -> Tensor:
        """Return what the head reads from the tokens that the last block gave, [batch, width] or twice that wide."""
        if self.config.pooling == "class":
            return x_BTD.flatten(1)
        if self.config.pooling == "mean":
            return x_BTD.mean(dim=1)
        return torch.cat([x_BTD[:, :1].flatten(1), x_BTD[:, 1:].mean(dim=1)], dim=1)


def _pooled(config: ViTConfig) -> slice:
    """Return which tokens pooling reads, in this form's order: registers, class, distillation, patches."""
    if config.pooling == "class":
        return slice(config.num_registers, config.num_prefix_tokens)
    first = config.num_prefix_tokens if config.pooling == "mean" else config.num_registers
    return slice(first, _num_tokens(config))


def _num_tokens(config: ViTConfig) -> int:
    return config.num_prefix_tokens + config.num_patches


def _constant_tokens(model: VisionTransformer, patch_bias_D: Tensor) -> Tensor:
    """Return what is added to every token, [T, D] float64: positions, the prefix tokens, the bias of the patches."""
    config = model.config
    positions_TD = model.pos_embed[0].double()
    patches_TD = positions_TD[-config.num_patches :] + patch_bias_D
    names = ("cls_token", "dist_token", "reg_token")
    prefix = [getattr(model, name)[0].double() for name in names if hasattr(model, name)]
    if not prefix:
        return patches_TD
    prefix_TD = torch.cat(prefix)
    if config.position_slots == "all":
        prefix_TD = prefix_TD + positions_TD[: config.num_prefix_tokens]
    first_register = config.num_prefix_tokens - config.num_registers
    return torch.cat([prefix_TD[first_register:], prefix_TD[:first_register], patches_TD])


def _heads(model: VisionTransformer, *, after_norm: bool) -> tuple[Tensor, Tensor]:
    """Return weight [in, out] and bias of the head, the final norm folded in; two heads become one."""
    heads = (model.head, model.head_dist) if model.config.distilled else (model.head,)
    folded = [_after_norm(head, model.norm) if after_norm else (head.weight.double().T, _bias(head)) for head in heads]
    weight_IO, bias_O = torch.cat([weight for weight, _ in folded]), torch.stack([bias for _, bias in folded])
    return weight_IO / len(heads), bias_O.mean(dim=0)


def _after_norm(linear: nn.Linear, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return weight [in, out] and bias, float64, of `linear` with the norm's scale and shift folded in.

    The head of "class_mean" reads two normalised vectors side by side.
    """
    weight_OI = linear.weight.double()
    repeats = weight_OI.shape[1] // len(norm.weight)
    scale_I, shift_I = norm.weight.double().repeat(repeats), norm.bias.double().repeat(repeats)
    return (weight_OI * scale_I).T, _bias(linear) + weight_OI @ shift_I


def _scaled(linear: nn.Linear, layer_scale: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight [in, out] and bias, float64, of `linear` with the layer scale after it folded in."""
    scale_O = layer_scale.gamma.double() if isinstance(layer_scale, LayerScale) else torch.ones(1, dtype=torch.float64)
    return linear.weight.double().T * scale_O, _bias(linear) * scale_O


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    return torch.zeros(len(layer.weight), dtype=torch.float64) if layer.bias is None else layer.bias.double()
