"""Preprocessing of other libraries is read exactly, or refused: compared with the pixels that they give."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from vit_edge.conversion.preprocessing.knowledge import Facts, Geometry
from vit_edge.conversion.preprocessing.settings import preprocessing_facts
from vit_edge.errors import UsageError
from vit_edge.image import Preprocessing

Array = npt.NDArray[np.float32]

# What image classifiers of transformers are published with: these must be read.
READ = {
    "BeitImageProcessor", "BitImageProcessor", "BlipImageProcessor", "CLIPImageProcessor", "ChineseCLIPImageProcessor",
    "ConvNextImageProcessor", "DINOv3ViTImageProcessor", "DeiTImageProcessor", "EfficientNetImageProcessor",
    "LevitImageProcessor", "MobileNetV1ImageProcessor", "MobileNetV2ImageProcessor", "PoolFormerImageProcessor",
    "PvtImageProcessor", "SegformerImageProcessor", "SiglipImageProcessor", "ViTImageProcessor",
}  # fmt: skip
# Settings beside the defaults: those that change what a class does.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}, "crop_pct": 0.95}),
    ("EfficientNetImageProcessor", {"size": {"height": 96, "width": 96}, "include_top": False}),
    ("EfficientNetImageProcessor", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
    ("EfficientNetImageProcessor", {"do_normalize": False}),
    ("LevitImageProcessor", {"size": {"shortest_edge": 96}, "crop_size": {"height": 96, "width": 96}}),
    ("MobileViTImageProcessor", {"size": {"shortest_edge": 288}}),
    ("MobileViTImageProcessor", {"size": {"shortest_edge": 288}, "do_flip_channel_order": False}),
    ("PoolFormerImageProcessor", {"crop_pct": 0.95}),
    ("ViTImageProcessor", {"do_normalize": False, "size": {"height": 90, "width": 120}, "resample": 3}),
]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Return two images that are no squares, smooth and with edges."""
    generator = np.random.default_rng(0)
    coarse = [generator.integers(0, 256, (13, 17, 3), np.uint8), generator.integers(0, 256, (60, 41, 3), np.uint8)]
    sizes = [(431, 333), (300, 517)]
    return [Image.fromarray(c).resize(s, Image.Resampling.BICUBIC) for c, s in zip(coarse, sizes, strict=True)]


def _preprocessed(facts: Facts, images: list[Image.Image]) -> tuple[Array, Preprocessing]:
    geometry, size = facts.geometry, facts.input_size or facts.image_size
    assert geometry is not None
    assert size is not None
    assert facts.mean is not None
    assert facts.std is not None
    interpolation: Any = facts.interpolation
    settings = geometry.preprocessing(size, interpolation=interpolation, mean=facts.mean, std=facts.std)
    found = settings.normalise(np.stack([settings.pixels(image) for image in images]))
    return (found[:, ::-1] if facts.bgr else found), settings


def _hold_against(processor: Any, facts: Facts, images: list[Image.Image], name: str) -> None:
    """Bit-equal to Pillow's backend; that of torchvision interpolates with other roundings, a level of 255 apart."""
    found, settings = _preprocessed(facts, images)
    expected = np.stack([np.asarray(processor(images=image)["pixel_values"][0], np.float32) for image in images])
    assert found.shape == expected.shape, name
    levels = np.abs(found - expected) * np.asarray(settings.std, np.float32)[:, None, None] * 255
    most = levels.max() if processor.backend == "pil" else np.quantile(levels, 0.99)
    assert most < (0.01 if processor.backend == "pil" else 1.01), (name, most)


def _made(name: str, **settings: Any) -> Any:
    """Return a processor, in Pillow's backend if it has one."""
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"{name}Pil", getattr(transformers, name))(**settings)


def _processors() -> Iterator[tuple[str, Any]]:
    auto = pytest.importorskip("transformers.models.auto.image_processing_auto")
    every = (each or {} for each in auto.IMAGE_PROCESSOR_MAPPING_NAMES.values())
    names = {name.removesuffix("Pil") for each in every for name in each.values()}
    for name in sorted(names):
        with contextlib.suppress(AttributeError, ImportError, TypeError, ValueError):  # needs a package, or arguments
            yield name, _made(name)


def test_every_image_processor_of_transformers_is_read_exactly_or_refused(images: list[Image.Image]) -> None:
    read, tried = set(), 0
    for name, processor in _processors():
        tried += 1
        try:
            facts = preprocessing_facts(json.loads(processor.to_json_string()), origin=name)
            _preprocessed(facts, images[:1])
        except (UsageError, ValueError):  # the second where a crop is larger than the image
            continue
        _hold_against(processor, facts, images, name)
        read.add(name)
    assert tried > 100
    assert read >= READ


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_settings_of_single_classes_are_read(name: str, settings: dict[str, Any], images: list[Image.Image]) -> None:
    processor = _made(name, **settings)
    facts = preprocessing_facts(json.loads(processor.to_json_string()), origin=name)
    _hold_against(processor, facts, images, name)


def test_what_a_file_leaves_out_is_the_default_of_its_class(images: list[Image.Image]) -> None:
    facts = preprocessing_facts({"image_processor_type": "ConvNextImageProcessor", "crop_pct": None}, origin="file")
    _hold_against(_made("ConvNextImageProcessor"), facts, images, "ConvNext")
    facts = preprocessing_facts({"do_resize": True}, origin="file", family="levit")
    _hold_against(_made("LevitImageProcessor"), facts, images, "Levit")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "do_pad"),
        ({"image_processor_type": "ViTImageProcessor", "do_unheard_of": True}, "do_unheard_of"),
        ({"image_processor_type": "ViTImageProcessor", "do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"size": {"height": 8, "width": 8}, "crop_pct": 0.9}, "crop_pct"),
        ({"image_processor_type": "PerceiverImageProcessor"}, "PerceiverImageProcessor is not known"),
        ({"image_processor_type": "MyOwnProcessor", "do_resize": True}, "MyOwnProcessor is not known"),
    ],
)
def test_steps_and_classes_that_are_not_known_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        preprocessing_facts(settings, origin="file")


def test_a_hundred_data_configs_of_timm_are_read_exactly(images: list[Image.Image]) -> None:
    timm = pytest.importorskip("timm")
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    configs: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for name in timm.list_models(pretrained=True):
        config = timm.models.get_pretrained_cfg(name).to_dict()
        configs.setdefault(tuple(config.get(key) for key in keys), config)
    chosen = [config for config in configs.values() if max(config["input_size"]) <= 512][:110]
    assert len(chosen) > 90
    for config in chosen:
        resolved = timm.data.resolve_data_config({}, pretrained_cfg=dict(config))
        if resolved["crop_mode"] == "border":  # refused
            continue
        facts = preprocessing_facts({"pretrained_cfg": config}, origin="timm")
        if facts.geometry is None or facts.interpolation is None:
            continue  # then it is assumed, and every command warns
        expected = timm.data.create_transform(**resolved)(images[0]).numpy()
        found, _ = _preprocessed(facts, images[:1])
        assert found[0].shape == expected.shape
        assert np.abs(found[0] - expected).max() < 1e-5, config


def test_geometry_of_a_processor_is_kept_in_proportion() -> None:
    facts = preprocessing_facts({"image_processor_type": "LevitImageProcessor"}, origin="file")
    assert facts.geometry == Geometry(resize=256, crop=(224, 224), crop_rounding="floor")
    assert facts.input_size == (224, 224)
