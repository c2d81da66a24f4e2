"""SOURCE of `export` and `deploy` as one network: plain ViTs exactly, any other traced as it is."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from vit_edge.checkpoint import Checkpoint
from vit_edge.conversion.config import library_of
from vit_edge.conversion.hub import HUBS, fetch_folder
from vit_edge.conversion.label_names import read_labels
from vit_edge.conversion.timm_networks import timm_name_in
from vit_edge.conversion.weights_file import read_weights
from vit_edge.convert import open_source
from vit_edge.errors import CheckpointRejected, NotPlainViT, UsageError
from vit_edge.export.sources.factory import is_factory, open_factory
from vit_edge.export.sources.program import is_program, open_program
from vit_edge.export.sources.timm_network import open_timm_folder, open_timm_name
from vit_edge.export.sources.torch_network import Given, TorchNetwork
from vit_edge.export.sources.transformers_network import open_transformers_folder
from vit_edge.model_file.tasks import Activation
from vit_edge.progress import Progress, silent

__all__ = ["open_network"]


def open_network(
    source: str | os.PathLike[str],
    *,
    like: str | None = None,
    preprocessing: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    image_size: tuple[int, int] | None = None,
    weights: str | os.PathLike[str] | None = None,
    activation: Activation | None = None,
    progress: Progress = silent,
) -> Checkpoint | TorchNetwork:
    """Return SOURCE as a checkpoint if it is a plain ViT, which `convert` reads, else as the network of its library.

    SOURCE is also `timm:NAME`, `hf:REPO`, a folder of either, a program of torch.export, or
    `package.module:factory`; the code of the last two runs. Raises VitEdgeError.
    """
    text = os.fspath(source)
    given = Given(
        preprocessing=preprocessing,
        labels=read_labels(labels) if labels is not None else None,
        image_size=image_size,
        activation=activation,
        weights=weights,
    )
    if is_factory(text) or is_program(text):
        _refuse(text, "like", like, "is for weights, not for a network with its own code")
        if is_factory(text):
            return open_factory(text, given)
        _refuse(text, "weights", weights, "is for a network that has none; a program has its own")
        return open_program(text, given)
    if weights is not None:
        return _with_weights(text, given)
    try:
        checkpoint = open_source(
            source, like=like, preprocessing=preprocessing, labels=labels, image_size=image_size, progress=progress
        )
    except NotPlainViT as error:
        network = _of_library(text, given)
        if network is None:
            raise
        _refuse(text, "like", like, f"is for a plain ViT, and {error.reason}")
        return network
    _refuse(text, "activation", activation, "is for networks that are traced, and for third-party ONNX models")
    return checkpoint


def _with_weights(text: str, given: Given) -> TorchNetwork:
    """Return the network of a library with the user's weights in it."""
    network = _of_library(text, given)
    if network is None:
        reason = "--weights is for package.module:factory, timm:NAME, hf:REPO or a folder of either"
        raise UsageError("cannot export", file=text, reason=reason, remedy="leave --weights out")
    return network


def _of_library(text: str, given: Given) -> TorchNetwork | None:
    """Return the network that the library of a source makes; None if no library is known for it."""
    hub, _, name = text.partition(":")
    path = Path(text)
    if hub == "timm" and not path.exists():
        return open_timm_name(name, given)
    if hub == "hf" and not path.exists():
        opened = _of_folder(fetch_folder(name), given)
        if opened is None or Path(name).is_dir():  # a path of this machine is no name
            return opened
        repository = name.partition("@")[0]
        return dataclasses.replace(opened, name=repository.split("/")[-1], base_model=repository)
    if hub in HUBS and not path.exists():
        return None
    if path.is_dir():
        return _of_folder(path, given)
    try:
        named = timm_name_in(read_weights(path).settings)
    except CheckpointRejected:
        return None
    return None if named is None else open_timm_name(named, dataclasses.replace(given, weights=path))


def _of_folder(folder: Path, given: Given) -> TorchNetwork | None:
    library = library_of(folder)
    if library == "timm":
        return open_timm_folder(folder, given)
    return open_transformers_folder(folder, given) if library == "transformers" else None


def _refuse(source: str, name: str, value: object, why: str) -> None:
    if value is not None:
        raise UsageError("cannot export", file=source, reason=f"--{name} {why}", remedy=f"leave --{name} out")
