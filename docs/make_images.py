"""Make the three images of docs/vit.md: patches, similarity of the positions, attention of the class token.

    make demo                                         # leaves demo/run/best.safetensors
    python docs/make_images.py                      # images/{patches,positions,attention}.png of that network
    python docs/make_images.py CHECKPOINT IMAGE   # the same of your network and your image

The committed images are those of the demo's network, made with `--out docs/images`. The same checkpoint, image
and versions of matplotlib and Pillow give the same bytes. matplotlib comes with the extra `train`, scikit-learn (asked
for a photograph where no IMAGE is given) with `demo`.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vit_edge.checkpoint import Checkpoint, load_checkpoint
from vit_edge.errors import VitEdgeError
from vit_edge.files import write_atomic
from vit_edge.image import Pixels, Preprocessing
from vit_edge.vit import Attention, VisionTransformer

Floats = npt.NDArray[np.float32]

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = Path("demo") / "run" / "best.safetensors"
DIGITS = ("0/0010.png", "2/1234.png", "5/0681.png")
# Author and licence as datasets/images/README.txt of scikit-learn gives them.
PHOTOGRAPH, CREDIT = "china.jpg", "photograph: danielbuechele, CC BY 2.0; cropped, scaled and cut into patches"
WIDTH_INCHES, DPI = 9.6, 100
NUM_PATCHES_SHOWN = 13
MOST_BLOCKS = 4
MOST_BYTES = 150_000
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "savefig.facecolor": "white",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=CHECKPOINT, metavar="CHECKPOINT")
    parser.add_argument("image", nargs="?", type=Path, metavar="IMAGE")
    parser.add_argument("--out", type=Path, default=Path("images"), help="folder for the images [images]")
    arguments = parser.parse_args()
    try:
        for path in make_images(arguments.checkpoint, arguments.image, out=arguments.out):
            print(path)
    except VitEdgeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def make_images(checkpoint_path: Path, drawing: Path | None, *, out: Path) -> list[Path]:
    """Write patches.png, positions.png and attention.png into `out` and return their paths."""
    checkpoint = load_checkpoint(checkpoint_path)
    with mpl.rc_context(STYLE):
        figures = {
            "patches": draw_patches_of(checkpoint, drawing),
            "positions": draw_positions(checkpoint),
            "attention": draw_attention(checkpoint, images_for(checkpoint, drawing)),
        }
        out.mkdir(parents=True, exist_ok=True)
        return [save(figure, out / f"{name}.png") for name, figure in figures.items()]


def photograph() -> Pixels:
    """Return scikit-learn's photograph of a temple, uint8 RGB [427, 640, 3]."""
    from sklearn.datasets import load_sample_image

    pixels: Pixels = load_sample_image(PHOTOGRAPH)
    return pixels


def images_for(checkpoint: Checkpoint, drawing: Path | None) -> Pixels:
    """Return uint8 [B, height, width, 3] as the network sees them: `image`, else digits or the photograph."""
    pixels = checkpoint.preprocessing.pixels
    if drawing is not None:
        return pixels(drawing)[None]
    if checkpoint.labels != tuple("0123456789"):
        return pixels(photograph())[None]
    return np.stack([pixels(ROOT / "calibration_data" / "digits" / name) for name in DIGITS])


# Figure 1 of the paper: an image cut into patches, and the sequence they become.


def draw_patches_of(checkpoint: Checkpoint, drawing: Path | None) -> Figure:
    """Show `image` as the network cuts it, else the photograph as ViT-B/16 does."""
    if drawing is not None:
        config = checkpoint.model.config
        prefix = ["class"] * config.class_token + ["dist."] * config.distilled + ["reg."] * config.num_registers
        return draw_patches(checkpoint.preprocessing.pixels(drawing), config.patch_size, prefix=prefix)
    whole = Preprocessing(resize=224, crop=(224, 224))
    return draw_patches(whole.pixels(photograph()), (16, 16), prefix=["class"], credit=CREDIT)


def draw_patches(pixels: Pixels, patch_size: tuple[int, int], *, prefix: list[str], credit: str = "") -> Figure:
    patches_RSYXC = cut(pixels, patch_size)
    figure = Figure(figsize=(WIDTH_INCHES, 6.1), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(4.4, 1))
    draw_grid(figure.add_subplot(grid[0, 0]), pixels, patch_size)
    apart = figure.add_subplot(grid[0, 1])
    show_tiles(apart, patches_RSYXC, gap=max(1, patch_size[1] // 4), fill=255)
    apart.set_title(f"{' x '.join(map(str, patches_RSYXC.shape[:2]))} patches of {' x '.join(map(str, patch_size))}")
    draw_sequence(figure.add_subplot(grid[1, :]), patches_RSYXC, prefix)
    if credit:
        figure.supxlabel(credit, x=0.99, ha="right", fontsize=8, color="0.35")
    return figure


def cut(pixels: Pixels, patch_size: tuple[int, int]) -> Pixels:
    """Return [R, S, patch height, patch width, 3], the patches in the order of the sequence."""
    (height, width, channels), (y, x) = pixels.shape, patch_size
    return pixels.reshape(height // y, y, width // x, x, channels).swapaxes(1, 2)


def draw_grid(axes: Axes, pixels: Pixels, patch_size: tuple[int, int]) -> None:
    height, width, _ = pixels.shape
    rows, columns = (np.arange(0, side + 1, patch) for side, patch in zip((height, width), patch_size, strict=True))
    axes.imshow(pixels, interpolation="nearest", extent=(0, width, height, 0))
    axes.hlines(rows, 0, width, color="white", linewidth=0.8)
    axes.vlines(columns, 0, height, color="white", linewidth=0.8)
    axes.set(title=f"an image of {height} x {width} pixels", xlabel="pixel column", ylabel="pixel row")
    every_x, every_y = -(-len(columns[1:]) // 7), -(-len(rows[1:]) // 7)
    axes.set(xticks=columns[::every_x], yticks=rows[::every_y])


def draw_sequence(axes: Axes, patches_RSYXC: Pixels, prefix: list[str]) -> None:
    """Show the tokens before the patches, and some of the patches as they follow each other."""
    rows, columns = patches_RSYXC.shape[:2]
    patches_TYXC = patches_RSYXC.reshape(rows * columns, *patches_RSYXC.shape[2:])
    shown: list[int | None] = list(range(rows * columns))
    if len(shown) > NUM_PATCHES_SHOWN:
        middle = columns * (rows // 2)
        shown = [0, 1, 2, None, *range(middle, middle + 5), None, *shown[-2:]]
    slots: dict[int, int] = {}  # of each slot that holds a token, its position in the sequence
    for slot, name in enumerate(prefix):
        axes.add_patch(Rectangle((slot + 0.06, 0.06), 0.88, 0.88, fill=False, edgecolor="0.3"))
        axes.text(slot + 0.5, 0.5, f"{name}\ntoken", ha="center", va="center", fontsize=9)
        slots[slot] = slot
    for slot, patch in enumerate(shown, start=len(prefix)):
        if patch is None:
            axes.text(slot + 0.5, 0.5, "...", ha="center", va="center", fontsize=14)
            continue
        axes.imshow(patches_TYXC[patch], interpolation="nearest", extent=(slot + 0.06, slot + 0.94, 0.06, 0.94))
        slots[slot] = patch + len(prefix)
    axes.set(xlim=(0, len(prefix) + len(shown)), ylim=(0, 1), aspect="equal", yticks=[])
    axes.set_xticks([slot + 0.5 for slot in slots], [str(position) for position in slots.values()])
    axes.set_xlabel(f"the sequence of {len(prefix) + rows * columns} tokens, by position")
    bare(axes)


# Figure 7 of the paper, centre.


def draw_positions(checkpoint: Checkpoint) -> Figure:
    """Show, for each patch, the cosine similarity of its position embedding with that of every patch."""
    model = checkpoint.model
    panels = {"position embeddings": similarity(model)}
    if checkpoint.training:  # trained by vit-edge, so it is known where it started
        panels = {"before training": similarity(VisionTransformer(model.config)), "after training": similarity(model)}
    # The paper's scale is -1 to 1; positions that start as slow waves are all alike on it.
    lowest = min(float(maps_RSRS.min()) for maps_RSRS in panels.values())
    lowest = -1.0 if lowest < 0 else math.floor(10 * lowest) / 10
    height = 5.2 if len(panels) == 2 else 8.2
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, layout="constrained")
    images = []
    for axes, (title, maps_RSRS) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        gap = max(1, maps_RSRS.shape[1] // 6)
        images.append(show_tiles(axes, maps_RSRS, gap=gap, fill=np.nan, lowest=lowest))
        axes.set_title(title)
    figure.colorbar(images[0], ax=figure.axes, label="cosine similarity", location="bottom", shrink=0.5, aspect=30)
    return figure


def similarity(model: VisionTransformer) -> Floats:
    """Return [R, S, R, S]: the cosine between the position embeddings of any two patches."""
    config = model.config
    positions_TD = functional.normalize(model.pos_embed[0, -config.num_patches :].detach(), dim=1)
    similarity_TT: Floats = (positions_TD @ positions_TD.T).numpy()
    return similarity_TT.reshape(*config.grid, *config.grid)


# Figure 6 of the paper.


def draw_attention(checkpoint: Checkpoint, images_BYXC: Pixels) -> Figure:
    """Show each image, the attention that the patches get in some blocks, and attention rollout."""
    maps = attention_maps(checkpoint, images_BYXC)
    num_rows, num_columns = len(images_BYXC), 1 + len(maps)
    figure = Figure(figsize=(WIDTH_INCHES, 0.8 + 1.75 * num_rows), dpi=DPI, layout="constrained")
    all_axes = figure.subplots(num_rows, num_columns, squeeze=False)
    highest = max(float(shares_BRS.max()) for shares_BRS in maps.values())
    for axes_row, pixels, i in zip(all_axes, images_BYXC, range(num_rows), strict=True):
        axes_row[0].imshow(pixels, interpolation="nearest")
        for axes, shares_BRS in zip(axes_row[1:], maps.values(), strict=True):
            heat = show_over(axes, pixels, shares_BRS[i], highest=highest)
    for axes, title in zip(all_axes[0], ("the image", *maps), strict=True):
        axes.set_title(title)
    for axes in all_axes.flat:
        axes.set(xticks=[], yticks=[])
    label = "attention of the class token, 1 = an equal share for every patch"
    if not checkpoint.model.config.class_token:
        label = "mean attention of the patches, 1 = an equal share for every patch"
    figure.colorbar(heat, ax=all_axes, label=label, location="bottom", shrink=0.5, aspect=30)
    return figure


def attention_maps(checkpoint: Checkpoint, images_BYXC: Pixels) -> dict[str, Floats]:
    """Return [B, R, S] for some blocks (mean over heads) and for rollout: what falls on each patch, mean 1."""
    weights_BTT = [w.mean(dim=1) for w in attention_weights(checkpoint, images_BYXC)]
    shown = sorted({round(i) for i in np.linspace(0, len(weights_BTT) - 1, MOST_BLOCKS)})
    maps = {f"block {i + 1}": weights_BTT[i] for i in shown}
    maps["rollout"] = rollout(weights_BTT)
    return {title: shares(weights, checkpoint.model) for title, weights in maps.items()}


@torch.no_grad()
def attention_weights(checkpoint: Checkpoint, images_BYXC: Pixels) -> list[Tensor]:
    """Return the attention weights [B, N, T, T] of every block."""
    model, weights_BNTT = checkpoint.model, []
    hooks = [
        module.register_forward_pre_hook(lambda attention, inputs: weights_BNTT.append(attention.weights(*inputs)))
        for module in model.modules()
        if isinstance(module, Attention)
    ]
    model(torch.from_numpy(checkpoint.preprocessing.normalise(images_BYXC)))
    for hook in hooks:
        hook.remove()
    return weights_BNTT


def rollout(weights_BTT: list[Tensor]) -> Tensor:
    """Return attention rollout [B, T, T] (arXiv:2005.00928): half attention, half residual, through all blocks."""
    identity = torch.eye(weights_BTT[0].shape[-1])
    total_BTT = identity.expand_as(weights_BTT[0])
    for block_BTT in weights_BTT:
        total_BTT = (0.5 * block_BTT + 0.5 * identity) @ total_BTT
    return total_BTT


def shares(weights_BTT: Tensor, model: VisionTransformer) -> Floats:
    """Return [B, R, S], mean 1: what the class token (without one: the patches on average) takes from each patch."""
    config = model.config
    row_BT = weights_BTT[:, 0] if config.class_token else weights_BTT.mean(dim=1)
    patches_BT = row_BT[:, config.num_prefix_tokens :]
    found: Floats = (patches_BT / patches_BT.mean(dim=1, keepdim=True)).numpy()
    return found.reshape(-1, *config.grid)


def show_over(axes: Axes, pixels: Pixels, shares_RS: Floats, *, highest: float) -> ScalarMappable:
    """Show the shares as colour, and the image in dark grey where they are low."""
    height, width, _ = pixels.shape
    rows, columns = shares_RS.shape
    scale = ScalarMappable(PowerNorm(0.5, vmin=0, vmax=highest), "inferno")
    colour = scale.to_rgba(shares_RS)[..., :3].repeat(height // rows, axis=0).repeat(width // columns, axis=1)
    grey = pixels.mean(axis=2, keepdims=True) / 255
    axes.imshow(1 - (1 - colour) * (1 - 0.3 * grey), interpolation="nearest")
    return scale


# What the images share.


def show_tiles(axes: Axes, tiles_RSYX: Pixels | Floats, *, gap: int, fill: float, lowest: float = 0.0) -> AxesImage:
    """Show tiles, [R, S, Y, X] from `lowest` to 1 or [R, S, Y, X, 3], with gaps between them, numbered."""
    rows, columns, height, width = tiles_RSYX.shape[:4]
    step_y, step_x = height + gap, width + gap
    canvas = np.full((rows * step_y - gap, columns * step_x - gap, *tiles_RSYX.shape[4:]), fill, tiles_RSYX.dtype)
    for row in range(rows):
        for column in range(columns):
            canvas[row * step_y :, column * step_x :][:height, :width] = tiles_RSYX[row, column]
    image = axes.imshow(canvas, interpolation="nearest", cmap="viridis", vmin=lowest, vmax=1)
    axes.set(xlabel="patch column", ylabel="patch row")
    every_y, every_x = -(-rows // 14), -(-columns // 14)
    axes.set_yticks(
        np.arange(0, rows, every_y) * step_y + (height - 1) / 2, [str(i) for i in range(1, rows + 1, every_y)]
    )
    axes.set_xticks(
        np.arange(0, columns, every_x) * step_x + (width - 1) / 2, [str(i) for i in range(1, columns + 1, every_x)]
    )
    bare(axes)
    return image


def bare(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG without date or program name in it, in 256 colours where more would make it large."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as image:
        drawing = image.convert("RGB")
    data = png(drawing)
    write_atomic(path, data if len(data) <= MOST_BYTES else png(drawing.quantize(256, dither=Image.Dither.NONE)))
    return path


def png(drawing: Image.Image) -> bytes:
    buffer = io.BytesIO()
    drawing.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
