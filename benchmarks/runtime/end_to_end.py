"""From a file to an answer: our runtime against torchvision with PyTorch eager and against Hugging Face's pipeline.

    python benchmarks/runtime/end_to_end.py CHECKPOINT --models FLOAT.onnx INT8.onnx --images EVALUATION

Batch 1, one thread everywhere, the same weights, every contestant in turn in one process, for two JPEG files: one of
--images as it is, and the same enlarged to 12 megapixels under fine noise, quality 90, as a camera's would be. Each
query reads the file. Then what `decode="fast"` does to answers: on the images as they are, and enlarged. The pipeline
resizes as its image processor for this network does. Writes a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support.contestants import measure_and_write
from support.results import machine, versions
from support.timing import Watch, count, ratio, take_turns

from vit_edge.checkpoint import Checkpoint, load_checkpoint
from vit_edge.data import find_images
from vit_edge.metrics import sqnr_db
from vit_edge.runtime import Classifier, load

SECTION = "end-to-end"
LARGE = (4000, 3000)
STAGES = ("decode_ms", "resize_ms", "inference_ms", "answer_ms")

Ask = Callable[[Path], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the same weights, for PyTorch")
    parser.add_argument("--models", type=Path, nargs="+", required=True, metavar="MODEL.onnx")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--enlarged-side", type=count, default=3464, help="of the images that judge fast decoding")
    parser.add_argument("--limit", type=count, help="judge fast decoding by so many images only")
    measure_and_write(parser, SECTION, run, table)


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    paths = find_images(arguments.images)
    files = {"299x299": paths[0], "12 megapixels": enlarged(paths[0], LARGE, folder / "large.jpg")}
    checkpoint = load_checkpoint(arguments.checkpoint)
    ours = {
        (path.name, decode): load(path, engine=arguments.engine, threads=1, decode=decode)
        for path in arguments.models
        for decode in ("full", "fast")
    }
    contestants: dict[str, Ask] = {
        f"ours, {name}{', decode fast' if decode == 'fast' else ''}": lambda path, c=classifier: c(path).label  # type: ignore[misc]
        for (name, decode), classifier in ours.items()
    }
    contestants |= {"torchvision + PyTorch eager": eager(checkpoint), "Hugging Face pipeline": pipeline(checkpoint)}
    watch = Watch()
    timed = {
        kind: dict(zip(contestants, timings(contestants, path, arguments), strict=True)) for kind, path in files.items()
    }
    splits = {
        kind: {f"{name} {decode}": split(c, path) for (name, decode), c in ours.items()} for kind, path in files.items()
    }
    load_of_machine = watch.stop()
    sizes = {kind: (Image.open(path).size, path.stat().st_size) for kind, path in files.items()}
    effects = [effect(ours, paths[: arguments.limit], side) for side in (None, arguments.enlarged_side)]
    for classifier in ours.values():
        classifier.close()
    return {
        "timed": timed,
        "splits": splits,
        "sizes": sizes,
        "effects": effects,
        "load": load_of_machine.to_dict(),
        "machine": machine(),
        "versions": f"{versions()}, torch {torch.__version__}",
        "rounds": arguments.rounds,
        "queries": arguments.queries,
    }


def enlarged(path: Path, size: tuple[int, int], out: Path) -> Path:
    """Write the image enlarged, under the fine noise that a sensor leaves, as a JPEG of quality 90."""
    image = Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).normal(0, 4, (size[1], size[0], 1))
    pixels = np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(out, quality=90)
    return out


def timings(contestants: dict[str, Ask], path: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return each contestant's median and minimum, and how many times as fast as the first of the others ours are."""
    samples_CRQ = take_turns(
        [lambda _number, ask=ask: ask(path) for ask in contestants.values()],  # type: ignore[misc]
        rounds=arguments.rounds,
        queries=arguments.queries,
        warm_up=3,
    )
    eager_RQ = samples_CRQ[list(contestants).index("torchvision + PyTorch eager")]
    return [
        {
            "median_ms": float(np.median(each_RQ)),
            "min_ms": float(each_RQ.min()),
            "ratio": asdict(ratio(eager_RQ, each_RQ)),
            "said": ask(path),
        }
        for each_RQ, ask in zip(samples_CRQ, contestants.values(), strict=True)
    ]


def split(classifier: Classifier, path: Path) -> dict[str, float]:
    """Return the median of every stage in milliseconds, of 15 answers."""
    found = [asdict(classifier(path).timings) for _ in range(15)]
    return {stage: float(np.median([each[stage] for each in found])) for stage in STAGES}


def eager(checkpoint: Checkpoint) -> Ask:
    """Return the network in PyTorch behind torchvision's decoder and transforms, as its documentation puts them."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    settings, network = checkpoint.preprocessing, checkpoint.model.eval()
    resize = settings.resize if isinstance(settings.resize, int) else list(settings.resize)
    transform = v2.Compose(
        [
            v2.Resize(resize, interpolation=v2.InterpolationMode(settings.interpolation), antialias=True),
            v2.CenterCrop(list(settings.crop)),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(settings.mean), list(settings.std)),
        ]
    )

    @torch.inference_mode()
    def ask(path: Path) -> str:
        logits = network(transform(decode_image(str(path), mode=ImageReadMode.RGB))[None])
        return checkpoint.labels[int(logits.argmax())]

    return ask


def pipeline(checkpoint: Checkpoint) -> Ask:
    """Return Hugging Face's pipeline over the same weights, whose logits are held against ours first."""
    from transformers import DeiTImageProcessor, ViTConfig, ViTForImageClassification
    from transformers import pipeline as make

    config, settings = checkpoint.model.config, checkpoint.preprocessing
    theirs = ViTForImageClassification(
        ViTConfig(
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_width,
            image_size=list(settings.crop),
            patch_size=config.patch_size[0],
            layer_norm_eps=config.layer_norm_eps,
            id2label=dict(enumerate(checkpoint.labels)),
        )
    ).eval()
    theirs.load_state_dict(their_names(checkpoint.model.state_dict()))
    images = torch.randn(2, 3, *settings.crop, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = (theirs(images).logits - checkpoint.model.eval()(images)).abs().max()
    if difference > 1e-3:
        raise SystemExit(f"the weights are not the same in both: logits differ by {difference:.3g}")
    side = settings.resize if isinstance(settings.resize, int) else settings.resize[0]
    processor = DeiTImageProcessor(
        size={"height": side, "width": side},
        crop_size={"height": settings.crop[0], "width": settings.crop[1]},
        image_mean=list(settings.mean),
        image_std=list(settings.std),
    )
    ask = make("image-classification", model=theirs, image_processor=processor, device="cpu")
    return lambda path: str(ask(str(path), top_k=1)[0]["label"])


def their_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return our tensors under the names of transformers' ViT."""
    plain = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "attn.proj": "attention.o_proj",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "blocks": "layers",
    }
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("head."):
            renamed[f"classifier.{name.removeprefix('head.')}"] = tensor
            continue
        theirs = f"layernorm.{name.removeprefix('norm.')}" if name.startswith("norm.") else name
        for ours, other in plain.items():
            theirs = theirs.replace(ours, other)
        if "attn.qkv" in theirs:
            for kind, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"vit.{theirs.replace('attn.qkv', f'attention.{kind}_proj')}"] = part
        else:
            renamed[f"vit.{theirs}"] = tensor
    return renamed


def effect(ours: dict[tuple[str, str], Classifier], paths: Sequence[Path], side: int | None) -> dict[str, Any]:
    """Return how answers of each model with fast decoding agree with those of full decoding."""
    logits: dict[tuple[str, str], list[Any]] = {key: [] for key in ours}
    with tempfile.TemporaryDirectory() as name:
        for path in paths:
            file = path if side is None else enlarged(path, (side, side), Path(name) / "enlarged.jpg")
            for decode in ("full", "fast"):
                same = [key for key in ours if key[1] == decode]
                pixels = ours[same[0]].prepare(file).pixels[None]  # one preprocessing for all
                for key in same:
                    logits[key].append(ours[key].logits(pixels)[0])
    return {
        "images": len(paths),
        "side": side,
        "models": {name: compared(logits[name, "full"], logits[name, "fast"]) for name, d in ours if d == "full"},
    }


def compared(full: list[Any], fast: list[Any]) -> dict[str, Any]:
    full_BK, fast_BK = np.stack(full), np.stack(fast)
    same = int((full_BK.argmax(axis=1) == fast_BK.argmax(axis=1)).sum())
    level = None if np.array_equal(full_BK, fast_BK) else sqnr_db(full_BK, fast_BK)
    return {"same": same, "sqnr_db": level}


def times_as_fast(rows: dict[str, Any]) -> list[str]:
    """Return a sentence on how many times as fast each model answers with fast decoding."""
    pairs = {name: f"{name}, decode fast" for name in rows if f"{name}, decode fast" in rows}
    ratios = [f"{rows[full]['median_ms'] / rows[fast]['median_ms']:.2f} times ({full.removeprefix('ours, ')})"
            for full, fast in pairs.items()]  # fmt: skip
    return [f'With `decode="fast"` it is {", ".join(ratios)} as fast as without, by medians.', ""] if ratios else []


def table(result: dict[str, Any]) -> str:
    counts = f"{result['rounds']} rounds of {result['queries']} queries of each, in turn in one process"
    where = f"{result['machine']}, {result['versions']}. The machine: {result['load']['said']}."
    lines = [f"Batch 1, 1 thread, {counts}. {where}", ""]
    for kind, rows in result["timed"].items():
        (width, height), size = result["sizes"][kind]
        lines += [
            f"A JPEG of {width}x{height}, {size / 1e6:.2f} MB:",
            "",
            "| from file to answer | median | minimum | as eager, by medians |",
            "|---|---|---|---|",
            *(
                f"| {name} | {row['median_ms']:.2f} ms | {row['min_ms']:.2f} ms | {row['ratio']['by_median']:.2f} |"
                for name, row in rows.items()
            ),
            "",
            *times_as_fast(rows),
            "| stages | decode | resize | inference | answer |",
            "|---|---|---|---|---|",
            *(
                f"| {name} | {' | '.join(f'{stages[stage]:.2f} ms' for stage in STAGES)} |"
                for name, stages in result["splits"][kind].items()
            ),
            "",
        ]
    lines += [
        'What `decode="fast"` does to answers:',
        "",
        "| images | model | same top-1 | SQNR |",
        "|---|---|---|---|",
    ]
    for found in result["effects"]:
        what = "as they are" if found["side"] is None else f"enlarged to {found['side']}x{found['side']}"
        for name, figures in found["models"].items():
            level = "the same bits" if figures["sqnr_db"] is None else f"{figures['sqnr_db']:.1f} dB"
            lines.append(f"| {found['images']} {what} | {name} | {figures['same']} of {found['images']} | {level} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
