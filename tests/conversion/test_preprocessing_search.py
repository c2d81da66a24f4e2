"""The preprocessing search infers how a network was fed, says how sure it is, and keeps what was specified."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.third_party_weights import labelled_images, random_images
from vit_edge.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vit_edge.conversion.preprocessing.knowledge import HALF, IMAGENET
from vit_edge.conversion.preprocessing.search import MOST_IMAGES, sample
from vit_edge.convert import Conversion, convert, read_source
from vit_edge.errors import DataRejected
from vit_edge.image import Preprocessing
from vit_edge.vit import VisionTransformer, ViTConfig

UNTOLD = ("preprocessing.mean", "preprocessing.std", "preprocessing.resize", "preprocessing.interpolation", "labels")
NAMES = ("img1", "img2", "img10", "Img3")
SIZE = 16


def images(count: int, seed: int = 0) -> list[np.ndarray]:
    """Return images of 40x24 with large soft forms and noise, of every colour."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        coarse = random.integers(0, 256, (5, 3, 3)).astype(np.float64)
        fine = random.normal(0, 40, (40, 24, 3))
        made.append((np.kron(coarse, np.ones((8, 8, 1))) + fine).clip(0, 255).astype(np.uint8))
    return made


def fed(preprocessing: Preprocessing, image: np.ndarray, *, bgr: bool) -> torch.Tensor:
    pixels = preprocessing.pixels(image)[None]
    return torch.from_numpy(preprocessing.normalise(pixels[..., ::-1] if bgr else pixels))


@pytest.fixture(scope="module")
def network() -> VisionTransformer:
    """Return a network whose answers depend on everything about how it is fed, sharply."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(SIZE, SIZE), patch_size=(4, 4), width=24, depth=2, num_heads=2, mlp_width=48, num_classes=4
    )
    model = VisionTransformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("pos_embed", "cls_token"):  # beside them, the size of what comes from the image matters
                nn.init.normal_(parameter, std=1.0)
            elif parameter.ndim >= 2:
                nn.init.normal_(parameter, std=(3.0 if name == "head.weight" else 1.5) * parameter[0].numel() ** -0.5)
    return model


def case(
    folder: Path,
    network: VisionTransformer,
    truth: Preprocessing,
    *,
    bgr: bool = False,
    assumed: tuple[str, ...] = UNTOLD,
    guess: Preprocessing | None = None,
    names: tuple[str, ...] = NAMES,
) -> tuple[Path, Path]:
    """Save the network under a wrong guess, and images that it gets right only when it is fed as in `truth`.

    `names` are those of its outputs, in order.
    """
    shown = images(60)
    with torch.no_grad():
        answers = [int(network(fed(truth, image, bgr=bgr)).argmax()) for image in shown]
    labelled_images(folder / "images", shown, [names[answer] for answer in answers])
    save_checkpoint(
        folder / "network",
        Checkpoint(
            name="n",
            model=network,
            preprocessing=guess or Preprocessing(resize=18, crop=(SIZE, SIZE)),
            labels=("0", "1", "2", "3") if "labels" in assumed else names,
            assumed=assumed,
        ),
    )
    return folder / "network", folder / "images"


def candidate(made: Conversion) -> dict[str, str]:
    finding = made.report.finding
    assert finding is not None
    return {name: getattr(finding.proposed.candidate, name) for name in ("normalisation", "geometry", "interpolation")}


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        (
            Preprocessing(resize=(SIZE, SIZE), crop=(SIZE, SIZE), interpolation="bilinear", mean=HALF[0], std=HALF[1]),
            {"normalisation": "0.5", "geometry": "squash", "interpolation": "bilinear"},
        ),
        (
            Preprocessing(resize=SIZE, crop=(SIZE, SIZE)),
            {"normalisation": "ImageNet", "geometry": "crop 1.0", "interpolation": "bicubic"},
        ),
    ],
)
def test_how_a_network_was_fed_is_found(
    tmp_path: Path, network: VisionTransformer, truth: Preprocessing, expected: dict[str, str]
) -> None:
    source, data = case(tmp_path, network, truth, names=tuple(sorted(NAMES)))
    made = read_source(source, data=data)
    assert candidate(made) == expected
    assert made.checkpoint.preprocessing == truth
    assert made.checkpoint.labels == tuple(sorted(NAMES))
    assert {"preprocessing.mean", "preprocessing.std", "preprocessing.resize", "labels"} <= set(made.report.found)
    assert {*made.report.found, *made.report.assumed} == set(UNTOLD)
    assert made.report.finding is not None
    assert made.report.finding.scores[0].top1 == 100.0
    assert "found on 60 images" in " ".join(made.report.notes)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (("Img3", "img1", "img10", "img2"), "sorted"),
        (("img1", "img10", "img2", "Img3"), "case-insensitive"),
        (("img1", "img2", "Img3", "img10"), "natural"),
    ],
)
def test_the_order_of_the_labels_is_found(
    tmp_path: Path, network: VisionTransformer, order: tuple[str, ...], expected: str
) -> None:
    source, data = case(tmp_path, network, Preprocessing(resize=SIZE, crop=(SIZE, SIZE)), names=order)
    made = read_source(source, data=data)
    assert made.report.finding is not None
    assert made.report.finding.proposed.candidate.label_order == expected
    assert made.checkpoint.labels == order
    assert "labels" in made.report.found


def test_a_network_for_bgr_becomes_the_same_function_of_rgb(tmp_path: Path, network: VisionTransformer) -> None:
    truth = Preprocessing(resize=SIZE, crop=(SIZE, SIZE))
    source, data = case(tmp_path, network, truth, bgr=True, names=tuple(sorted(NAMES)))
    convert(source, out=tmp_path / "out", data=data)
    made = load_checkpoint(tmp_path / "out")
    assert made.preprocessing.mean == IMAGENET[0][::-1]
    for image in images(5, seed=1):
        with torch.no_grad():
            expected = network(fed(truth, image, bgr=True))
            found = made.model(fed(made.preprocessing, image, bgr=False))
        assert torch.allclose(found, expected, atol=1e-5)


def test_what_was_told_is_kept_and_its_contradiction_is_said(
    tmp_path: Path, network: VisionTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    truth = Preprocessing(resize=SIZE, crop=(SIZE, SIZE), mean=HALF[0], std=HALF[1])
    specified = Preprocessing(resize=SIZE, crop=(SIZE, SIZE))
    source, data = case(tmp_path, network, truth, assumed=(), guess=specified, names=tuple(sorted(NAMES)))
    with caplog.at_level(logging.WARNING, logger="vit_edge"):
        made = read_source(source, data=data)
    assert made.checkpoint.preprocessing == specified
    assert made.report.found == ()
    assert "the images contradict what was specified: with normalisation 0.5 instead of ImageNet" in caplog.text


def test_what_was_told_and_is_right_is_not_contradicted(
    tmp_path: Path, network: VisionTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    truth = Preprocessing(resize=20, crop=(SIZE, SIZE), interpolation="nearest", mean=(0.3, 0.4, 0.5))
    source, data = case(tmp_path, network, truth, assumed=(), guess=truth)
    with caplog.at_level(logging.WARNING, logger="vit_edge"):
        made = read_source(source, data=data)
    assert made.checkpoint.preprocessing == truth
    assert not caplog.text
    assert made.report.finding is not None
    assert made.report.finding.proposed.top1 == 100.0


def test_candidates_that_images_cannot_tell_apart_stay_assumed(tmp_path: Path, network: VisionTransformer) -> None:
    truth = Preprocessing(resize=SIZE, crop=(SIZE, SIZE))
    source, _ = case(tmp_path, network, truth)
    # Squares of one colour look the same however they are resized and cropped.
    plain = [np.full((32, 32, 3), colour, np.uint8) for colour in np.random.default_rng(0).integers(0, 256, (40, 3))]
    with torch.no_grad():
        names = [sorted(NAMES)[int(network(fed(truth, image, bgr=False)).argmax())] for image in plain]
    data = labelled_images(tmp_path / "plain", plain, names)
    for name in NAMES:  # every class has an image, or its place among the labels would not be known
        (data / name).mkdir(exist_ok=True)
    made = read_source(source, data=data) if len(set(names)) == len(NAMES) else read_labelled_by(source, data, tmp_path)
    assert {"preprocessing.resize", "preprocessing.interpolation"} <= set(made.report.assumed)
    assert "cannot distinguish geometry" in " ".join(made.report.notes)


def read_labelled_by(source: Path, data: Path, folder: Path) -> Conversion:
    (folder / "names").write_text("\n".join(sorted(NAMES)))
    return read_source(source, data=data, labels=folder / "names")


def test_nothing_is_found_where_no_way_beats_chance(
    tmp_path: Path, network: VisionTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    source, _ = case(tmp_path, network, Preprocessing(resize=SIZE, crop=(SIZE, SIZE)))
    drawn = np.random.default_rng(3).integers(0, 4, 60)
    data = labelled_images(tmp_path / "other", images(60, seed=9), [NAMES[label] for label in drawn])
    with caplog.at_level(logging.WARNING, logger="vit_edge"):
        made = read_source(source, data=data)
    assert made.report.found == ()
    assert set(made.report.assumed) == set(UNTOLD)
    assert "better than chance" in caplog.text


def test_classes_that_cannot_be_matched_are_refused(tmp_path: Path, network: VisionTransformer) -> None:
    source, _ = case(tmp_path, network, Preprocessing(resize=SIZE, crop=(SIZE, SIZE)))
    data = labelled_images(tmp_path / "other", images(4), ["a", "b", "a", "b"])
    with pytest.raises(DataRejected, match=r"(?s)2 classes do not match the 4.*--labels"):
        read_source(source, data=data)


def test_labels_that_are_numbers_are_indices(tmp_path: Path, network: VisionTransformer) -> None:
    source, data = case(tmp_path, network, Preprocessing(resize=SIZE, crop=(SIZE, SIZE)), names=("0", "1", "2", "3"))
    made = read_source(source, data=data)
    assert made.report.finding is not None
    assert made.report.finding.proposed.top1 == 100.0
    assert made.report.assumed == ("labels",)  # numbers are places, no names


def test_the_sample_is_seeded_and_has_every_class() -> None:
    labels = [0] * 500 + [1] * 20 + [2] * 3
    drawn = sample(labels)
    assert len(drawn) == MOST_IMAGES
    assert drawn == sample(labels) != sample(labels, seed=1)
    assert sorted({labels[position] for position in drawn}) == [0, 1, 2]
    assert sum(labels[position] == 2 for position in drawn) == 3
    assert sample([0, 1]) == (0, 1)


def test_the_finding_travels_in_the_checkpoint(tmp_path: Path, network: VisionTransformer) -> None:
    truth = Preprocessing(resize=SIZE, crop=(SIZE, SIZE))
    source, data = case(tmp_path, network, truth, names=tuple(sorted(NAMES)))
    convert(source, out=tmp_path / "out", data=data)
    converted = load_checkpoint(tmp_path / "out").training["converted"]
    assert converted["found"]["num_images"] == 60
    assert set(converted["found"]["fields"]) == set(UNTOLD)
    json.dumps(converted)


def test_deit_tiny_is_fed_imagenets_mean_and_deviation(shared_data: Path, tmp_path: Path) -> None:
    report = convert(
        shared_data / "deit_tiny" / "deit_tiny_patch16_224.safetensors",
        out=tmp_path / "out",
        labels=shared_data / "deit_tiny" / "imagenet_classes.txt",
        data=shared_data / "photos" / "calibration",
    )
    assert report.finding is not None
    best = report.finding.proposed.candidate
    assert (best.normalisation, best.interpolation, best.colours) == ("ImageNet", "bicubic", "RGB")
    assert report.finding.proposed.top1 > 75
    assert {"preprocessing.mean", "preprocessing.std"} <= set(report.found)
    assert torch.isfinite(load_checkpoint(tmp_path / "out").model(random_images((224, 224)))).all()
