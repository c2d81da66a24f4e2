"""Build the images of pizza, steak and sushi that the ViT tutorials train on, from torchvision's Food101.

    pip install "vit-edge[train]"
    python examples/pizza_steak_sushi.py --root food101/ --out pizza_steak_sushi/ --percent 10
    vit-edge train pizza_steak_sushi/ --from deit.safetensors --out run/

Food-101 is downloaded into --root where it is not there yet (5 GB). The draw is that of the tutorials: Python's random
with seed 42 over the lines of meta/train.txt and then meta/test.txt; 10 percent are 225 training and 75 test images,
20 percent 450 and 150.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from pathlib import Path

CLASSES = ("pizza", "steak", "sushi")
SEED = 42


def draw(meta: Path, percent: float) -> dict[str, list[str]]:
    """Return, for train and test, names such as "pizza/1008844" drawn from the lists in the folder `meta`."""
    generator = random.Random(SEED)
    drawn = {}
    for split in ("train", "test"):
        names = [line for line in (meta / f"{split}.txt").read_text().splitlines() if line.split("/")[0] in CLASSES]
        drawn[split] = generator.sample(names, k=round(percent / 100 * len(names)))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="where Food-101 is, or is downloaded to")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--percent", type=float, default=10.0, help="share of Food-101's images of the three classes")
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out} exists; choose another --out")
    from torchvision.datasets import Food101

    Food101(arguments.root, download=True)  # downloads only what is not there
    dataset = arguments.root / "food-101"
    for split, names in draw(dataset / "meta", arguments.percent).items():
        for name in names:
            target = arguments.out / split / f"{name}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(dataset / "images" / f"{name}.jpg", target)
        print(f"{split}: {len(names)} images")


if __name__ == "__main__":
    main()
