"""docs/vit.md quotes the source as it is, says what can be counted, and is the same document in both languages."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from vit_edge.checkpoint import Checkpoint, save_checkpoint
from vit_edge.image import Preprocessing
from vit_edge.vit import VisionTransformer, ViTConfig, variant

DOCS = ROOT / "docs"
PAGES = {"en": DOCS / "vit.md", "pt-BR": DOCS / "vit.pt-BR.md"}
TEXTS = {language: path.read_text(encoding="utf-8") for language, path in PAGES.items()}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
# [`Symbol.name`](../vit_edge/module.py)
SYMBOL = re.compile(r"\[`([\w.]+)`\]\(\.\./vit_edge/(\w+)\.py\)")
LINK = re.compile(r"\[[^\]]*\]\((?!https://)([^)#]+)\)")


_spec = importlib.util.spec_from_file_location("make_images", DOCS / "make_images.py")
assert _spec is not None
assert _spec.loader is not None
SCRIPT = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(SCRIPT)


def fences(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if not languages or language in languages]


def source_of(symbol: str, module_name: str) -> str:
    """Return the source of a class or function, or of the whole module for a constant or a field."""
    module = importlib.import_module(f"vit_edge.{module_name}")
    found: object = module
    for name in symbol.split("."):
        found = getattr(found, name)
    return inspect.getsource(found if inspect.isclass(found) or inspect.isfunction(found) else module)


def parameters(config: ViTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in VisionTransformer(config).parameters())


def number(text: str) -> int:
    return int(re.sub(r"[.,]", "", text))


@pytest.mark.parametrize("language", PAGES)
def test_every_quoted_line_stands_in_the_symbol_named_before_it(language: str) -> None:
    text = TEXTS[language]
    blocks = [m for m in FENCE.finditer(text) if m[1] == "python"]
    assert len(blocks) >= 15
    for block in blocks:
        *_, (symbol, module_name) = SYMBOL.findall(text[: block.start()])
        wanted = block[2].splitlines()
        lines = source_of(symbol, module_name).splitlines()
        places = [textwrap.dedent("\n".join(lines[i : i + len(wanted)])) for i in range(len(lines))]
        assert "\n".join(wanted) in places, f"{PAGES[language].name} quotes {symbol}, which no longer has:\n{block[2]}"


@pytest.mark.parametrize("language", PAGES)
def test_every_symbol_and_every_linked_file_exists(language: str) -> None:
    text = TEXTS[language]
    symbols = SYMBOL.findall(text)
    assert len(symbols) >= 15
    for symbol, module_name in symbols:
        assert source_of(symbol, module_name)
    links = LINK.findall(FENCE.sub("", text))
    assert [link for link in links if not (DOCS / link).is_file()] == []


def test_both_languages_have_the_same_parts_and_link_to_each_other() -> None:
    english, portuguese = TEXTS["en"], TEXTS["pt-BR"]
    # Code, formulas, sizes and commands are the same to the letter; the rest is counted.
    assert fences(english) == fences(portuguese)
    for pattern in (r"^#+ ", r"^\|", r"^\n\*\*"):
        found = [re.findall(pattern, text, flags=re.MULTILINE) for text in (english, portuguese)]
        assert found[0] == found[1], pattern
    for pattern in (r"!\[[^\]]+\]\(([^)]+)\)", SYMBOL.pattern, r"https://[^)\s>]+"):
        found = [re.findall(pattern, text) for text in (english, portuguese)]
        assert found[0] == found[1], pattern
    assert "(vit.pt-BR.md)" in english
    assert "(vit.md)" in portuguese


@pytest.mark.parametrize("language", PAGES)
def test_the_parameter_counts_are_right(language: str) -> None:
    text = TEXTS[language]
    rows = re.findall(r"^\| ViT-\S+ \| `(\w+)` \| \d+ M \| ([\d.,]+) \|$", text, flags=re.MULTILINE)
    assert [name for name, _ in rows] == [
        "vit_base_patch16_224", "vit_large_patch16_224", "vit_large_patch32_224", "vit_huge_patch14_224",
    ]  # fmt: skip
    for name, count in rows:
        assert number(count) == parameters(variant(name, num_classes=1000)), name
    parts = re.findall(r"^\| [^|]+ \| [^|]*\b[DLK]\b[^|]* \| ([\d.,]+) \|$", text, flags=re.MULTILINE)
    assert len(parts) == 6
    assert sum(map(number, parts)) == number(rows[0][1])
    with torch.device("meta"):
        model = VisionTransformer(variant("vit_base_patch16_224", num_classes=1000))
    modules = (model.patch_embed, model.blocks, model.norm, model.head)
    counted = {sum(p.numel() for p in module.parameters()) for module in modules}
    assert {number(part) for part in parts} == counted | {model.pos_embed.numel(), model.cls_token.numel()}


@pytest.mark.parametrize("language", PAGES)
def test_the_reading_that_gives_table_1_gives_it(language: str) -> None:
    for name, paper in (("base_patch16", 86), ("large_patch32", 307), ("huge_patch14", 632)):
        config = variant(f"vit_{name}_224", num_classes=1000)
        count = parameters(config) - 1000 * (config.width + 1) + config.width * (config.width + 1)
        assert round(count / 1e6) == paper
        assert count in [number(text) for text in re.findall(r"\d{1,3}(?:[.,]\d{3}){2}", TEXTS[language])]


def test_the_shapes_of_figure_1_are_those_of_the_network() -> None:
    with torch.device("meta"):
        model = VisionTransformer(variant("vit_base_patch16_224", num_classes=1000)).eval()
        images = torch.empty(2, 3, 224, 224)
        features = model.forward_features(images)
        shapes = [images, model.patch_embed(images), model.embed(images), model.embed(images), features]
        shapes += [model.pool(features), model(images)]
    (figure,) = fences(TEXTS["en"], "text")
    assert [list(t.shape[1:]) for t in shapes] == [
        [int(side) for side in sides.split(", ")] for sides in re.findall(r"\[B, ([\d, ]+)\]", figure)
    ]


def test_the_committed_images_are_small_and_all_shown() -> None:
    images = sorted((DOCS / "images").glob("*.png"))
    pages = TEXTS["en"] + (DOCS / "results.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", pages)
    assert [f"images/{path.name}" for path in images] == sorted(shown)
    for path in images:
        assert path.stat().st_size <= 150_000
        with Image.open(path) as image:
            assert image.width <= 1000
            assert image.info.keys() <= {"dpi"}  # no date, no program
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_the_position_similarity_quoted_is_that_of_the_start() -> None:
    similarity = SCRIPT.similarity(VisionTransformer(variant("vit_digits_patch8_32", num_classes=10)))
    assert f"({similarity.min():.2f})" in TEXTS["en"]


@pytest.mark.parametrize("with_class_token", [True, False])
def test_anyone_can_make_the_images_of_their_network(tmp_path: Path, with_class_token: bool) -> None:
    path, image = small_checkpoint(tmp_path, with_class_token=with_class_token), tmp_path / "image.png"
    Image.linear_gradient("L").convert("RGB").save(image)
    made = {}
    for out, given in (("without", None), ("with", image), ("again", image)):
        paths = SCRIPT.make_images(path, given, out=tmp_path / out)
        assert sorted(p.name for p in paths) == ["attention.png", "patches.png", "positions.png"]
        made[out] = {p.name: p.read_bytes() for p in paths}
    assert made["with"] == made["again"]
    assert made["without"]["positions.png"] == made["with"]["positions.png"]
    assert made["without"]["attention.png"] != made["with"]["attention.png"]
    assert all(data.startswith(b"\x89PNG") for data in made["with"].values())


def test_the_script_runs_as_the_page_says(tmp_path: Path) -> None:
    small_checkpoint(tmp_path, with_class_token=True)
    done = run_script("c.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
    done = run_script("nothing.safetensors", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr == "cannot read the checkpoint nothing.safetensors: there is no such file\ntry: check the path\n"


def small_checkpoint(folder: Path, *, with_class_token: bool) -> Path:
    """Write a checkpoint with registers and a grid that is not square, and return its path."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(16, 24), patch_size=(4, 4), width=12, depth=5, num_heads=2, mlp_width=24, num_classes=2,
        class_token=with_class_token, pooling="class" if with_class_token else "mean", num_registers=2,
    )  # fmt: skip
    checkpoint = Checkpoint(
        name="small",
        model=VisionTransformer(config),
        preprocessing=Preprocessing(resize=24, crop=(16, 24)),
        labels=("a", "b"),
        training={"step": 0} if with_class_token else {},
    )
    save_checkpoint(folder / "c.safetensors", checkpoint)
    return folder / "c.safetensors"


def run_script(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", DOCS / "make_images.py", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
