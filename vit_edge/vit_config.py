"""The shape of a Vision Transformer, and the published shapes by name; no torch.

"Table 1" is that of "An Image is Worth 16x16 Words" (arXiv:2010.11929) unless another paper is named.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

__all__ = ["VARIANTS", "Activation", "Pooling", "ViTConfig", "variant"]

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
Pooling = Literal["class", "mean", "class_mean"]

# The deepest published Vision Transformers have fewer than 100 blocks.
_MOST_BLOCKS, _LARGEST = 256, 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig:
    """The shape of one Vision Transformer; raises ValueError where two fields disagree.

    Sizes are pixels, (height, width); `mlp_width` is the hidden width of each block's MLP. `pooling` takes the class
    token, the mean of the patch tokens, or both side by side (DINOv2's linear classifier); `final_norm` stands before
    or after it. `position_slots` says whether every token has a position or the patches only (DeiT-3, registers).
    `pre_norm` is CLIP's norm before the blocks, `layer_scale` the value that CaiT's scale starts at (arXiv:2103.17239),
    `num_registers` those of arXiv:2309.16588, `distilled` DeiT's second token and head (arXiv:2012.12877).
    `stochastic_depth` is the rate of the last block; it rises from 0 in equal steps (arXiv:1603.09382).
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    num_classes: int
    pooling: Pooling = "class"
    class_token: bool = True
    distilled: bool = False
    num_registers: int = 0
    position_slots: Literal["all", "patches"] = "all"
    patch_bias: bool = True
    qkv_bias: bool = True
    pre_norm: bool = False
    final_norm: Literal["before_pooling", "after_pooling"] = "before_pooling"
    layer_scale: float | None = None
    activation: Activation = "gelu"
    layer_norm_eps: float = 1e-6
    dropout: float = 0.0
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        # JSON has no tuples: a configuration read back from a file equals the one written.
        object.__setattr__(self, "image_size", _pair(self.image_size, "image_size"))
        object.__setattr__(self, "patch_size", _pair(self.patch_size, "patch_size"))
        self._check_numbers()
        self._check_choices()
        for side, patch, axis in zip(self.image_size, self.patch_size, ("height", "width"), strict=True):
            if side % patch:
                raise ValueError(f"image {axis} {side} is not a multiple of the patch {axis} {patch}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if not self.class_token and (self.pooling != "mean" or self.distilled):
            raise ValueError(f"pooling {self.pooling!r} and distilled={self.distilled} need the class token")
        if self.distilled and (self.pooling != "class" or self.num_registers):
            raise ValueError("a distilled network pools by its class token and has no registers")
        if self.final_norm == "after_pooling" and (self.pooling == "class_mean" or self.distilled):
            raise ValueError("only pooling 'class' or 'mean' has its norm after it")

    def _check_numbers(self) -> None:
        for name in ("width", "depth", "num_heads", "mlp_width", "num_classes"):
            value = getattr(self, name)
            if not _is_whole(value) or not 1 <= value <= _LARGEST:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 to {_LARGEST:,}")
        if not _is_whole(self.num_registers) or not 0 <= self.num_registers <= _MOST_BLOCKS:
            raise ValueError(f"num_registers is {self.num_registers!r}; it must lie between 0 and {_MOST_BLOCKS}")
        if max(self.image_size) > _LARGEST:
            raise ValueError(f"image_size is {self.image_size}; at most {_LARGEST:,} pixels a side")
        if self.depth > _MOST_BLOCKS:
            raise ValueError(f"depth is {self.depth}; at most {_MOST_BLOCKS} blocks are built")
        if not isinstance(self.layer_norm_eps, float) or not 0 < self.layer_norm_eps < 1:
            raise ValueError(f"layer_norm_eps is {self.layer_norm_eps!r}; it must lie between 0 and 1")
        for name in ("dropout", "stochastic_depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
                raise ValueError(f"{name} is {value!r}; it must lie in [0, 1)")
        scale = self.layer_scale
        if scale is not None and (not isinstance(scale, float) or not -1e6 < scale < 1e6):
            raise ValueError(f"layer_scale is {scale!r}; it must be a number, or None where there is none")

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(map(repr, choices))}")
        for name in ("class_token", "distilled", "patch_bias", "qkv_bias", "pre_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false")

    @property
    def grid(self) -> tuple[int, int]:
        """Return how many rows and columns of patches one image is cut into."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        """Return how many patches one image is cut into."""
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Return how many tokens stand before the patches: class, distillation, registers."""
        return self.class_token + self.distilled + self.num_registers

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.width // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


_CHOICES: dict[str, tuple[str, ...]] = {
    "pooling": get_args(Pooling),
    "position_slots": ("all", "patches"),
    "final_norm": ("before_pooling", "after_pooling"),
    "activation": get_args(Activation),
}


def _pair(value: object, name: str) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(isinstance(v, int) and v > 0 for v in value):
        raise ValueError(f"{name} is {value!r}; it must be two positive integers, (height, width)")
    return value[0], value[1]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _square(image: int, patch: int, size: str, **fields: Any) -> ViTConfig:
    width, depth, heads = _SIZES[size]
    return ViTConfig(
        image_size=(image, image), patch_size=(patch, patch), width=width, depth=depth, num_heads=heads,
        mlp_width=4 * width, num_classes=1000, **fields,
    )  # fmt: skip


# Width, depth and heads: Table 1 (base, large, huge); Table 1 of DeiT, arXiv:2012.12877 (tiny, small).
# The digits network is ours: over 97 % on the digits in two minutes of training, and faster in INT8.
_SIZES: dict[str, tuple[int, int, int]] = {
    "digits": (192, 2, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}

VARIANTS: dict[str, ViTConfig] = {
    "vit_digits_patch8_32": _square(32, 8, "digits"),
    **{
        f"vit_{size}_patch{patch}_224": _square(224, patch, size)
        for size in ("tiny", "small", "base", "large", "huge")
        for patch in (8, 14, 16, 32)
    },
    # arXiv:2012.12877, with the second token and without.
    **{f"deit_{size}_patch16_224": _square(224, 16, size) for size in ("tiny", "small", "base")},
    **{
        f"deit_{size}_distilled_patch16_224": _square(224, 16, size, distilled=True)
        for size in ("tiny", "small", "base")
    },
    # arXiv:2204.07118: layer scale, and no position for the class token.
    **{
        f"deit3_{size}_patch16_224": _square(224, 16, size, layer_scale=1e-6, position_slots="patches")
        for size in ("small", "base", "large")
    },
    # arXiv:2304.07193, and with four registers arXiv:2309.16588; trained last at 518 pixels.
    **{f"vit_{size}_patch14_dinov2": _square(518, 14, size, layer_scale=1e-5) for size in ("small", "base", "large")},
    **{
        f"vit_{size}_patch14_reg4_dinov2": _square(
            518, 14, size, layer_scale=1e-5, num_registers=4, position_slots="patches"
        )
        for size in ("small", "base", "large")
    },
}


def variant(name: str, *, num_classes: int) -> ViTConfig:
    """Return the named configuration with `num_classes` outputs; raises ValueError on an unknown name."""
    if name not in VARIANTS:
        close = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.5)
        known = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(VARIANTS)}"
        raise ValueError(f"no architecture is named {name!r}; {known}")
    return replace(VARIANTS[name], num_classes=num_classes)
