"""Any image classifier of transformers, from a folder with config.json and weights, made by the library's own code."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vit_edge.conversion.config import processor_facts
from vit_edge.conversion.label_names import labels_of
from vit_edge.conversion.pickled_weights import unusable
from vit_edge.conversion.preprocessing.knowledge import Facts, size_of
from vit_edge.conversion.preprocessing.settings import read_settings
from vit_edge.conversion.weights_file import find_weights
from vit_edge.errors import UsageError, VitEdgeError, printable, require
from vit_edge.export.sources.torch_network import Given, TorchNetwork, in_rgb, settled_preprocessing
from vit_edge.export.sources.weights import load_weights
from vit_edge.model_file.tasks import Activation

__all__ = ["open_transformers_folder"]

_NUM_NAMED = 5
_ACTIVATIONS: dict[Any, Activation | None] = {
    None: None,
    "single_label_classification": None,
    "multi_label_classification": "sigmoid",
    "regression": "none",
}


def open_transformers_folder(folder: Path, given: Given) -> TorchNetwork:
    """Return the classifier in a folder; its outputs are unwrapped when it is exported.

    Raises MissingExtra, CheckpointRejected if a weight is missing or the folder holds no classifier.
    """
    values, origin = read_settings(folder / "config.json"), printable(folder / "config.json")
    activation = _activation(values, origin)
    facts = (*processor_facts(folder, values), Facts(origin="config.json", image_size=_image_size(values)))
    preprocessing, assumed = settled_preprocessing(given.preprocessing, image_size=given.image_size, facts=facts)
    transformers, network = _loaded(folder, origin, given)
    name = str(values.get("_name_or_path") or "")
    return TorchNetwork(
        module=in_rgb(network, facts),
        name=f"{values.get('model_type')}_{max(preprocessing.crop)}",
        preprocessing=preprocessing,
        labels=given.labels or (labels_of(values["id2label"]) if values.get("id2label") else None),
        activation=given.activation or activation,
        assumed=assumed,
        # A path of the machine that saved it is no name.
        base_model=name if name.count("/") == 1 and not name.startswith((".", "/", "~")) else None,
        source={"library": f"transformers {transformers.__version__}", "network": type(network).__name__},
    )


def _activation(values: Mapping[str, Any], origin: str) -> Activation | None:
    problem = values.get("problem_type")
    if problem not in _ACTIVATIONS:
        known = ", ".join(str(name) for name in _ACTIVATIONS if name)
        raise unusable(origin, f"problem_type is {problem!r}; those known are {known}", "correct the config")
    if problem is None and len(values.get("id2label") or ()) == 1:
        return "none"  # the library's own rule for one value: it trains a regression
    return _ACTIVATIONS[problem]


def _image_size(values: Mapping[str, Any]) -> tuple[int, int] | None:
    inner = values.get("vision_config") or {}
    size = values.get("image_size", inner.get("image_size") if isinstance(inner, Mapping) else None)
    try:
        return None if size is None else size_of(size)
    except ValueError:
        return None


def _loaded(folder: Path, origin: str, given: Given) -> tuple[Any, Any]:
    """Return transformers and the network with its weights, every one of them from the folder."""
    transformers = require("transformers", extra="huggingface", what="make a network of transformers")
    with _quiet(transformers, origin):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = _class(transformers, config)
        if given.weights is not None:
            network = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
        else:
            find_weights(folder)
            network, found = kind.from_pretrained(
                folder,
                config=config,
                output_loading_info=True,
                trust_remote_code=False,
                local_files_only=True,
            )
            _refuse_missing(found, network, origin)
    if given.weights is not None:
        load_weights(network, given.weights)
    return transformers, network.float().eval()


def _class(transformers: Any, config: Any) -> Any:
    """Return the class that the config names if it is an image classifier, else the one for this kind of network."""
    auto = transformers.AutoModelForImageClassification
    named = (getattr(config, "architectures", None) or [None])[0]
    if isinstance(named, str) and "ForImageClassification" in named and hasattr(transformers, named):
        return getattr(transformers, named)
    if type(config) not in auto._model_mapping:
        reason = f"transformers has no image classifier of model_type {config.model_type!r}"
        raise UsageError("cannot use the network", reason=reason, remedy="export an image classifier")
    return auto


def _refuse_missing(found: Mapping[str, Any], network: Any, origin: str) -> None:
    missing = sorted(found.get("missing_keys") or ())
    missing += sorted(str(entry[0]) for entry in found.get("mismatched_keys") or ())
    if missing:
        names = ", ".join(missing[:_NUM_NAMED])
        reason = f"weights of {type(network).__name__} are not in the folder, or have another shape: {names}"
        raise unusable(origin, reason, "give a fine-tuned classifier; a backbone alone does not classify")


@contextmanager
def _quiet(transformers: Any, origin: str) -> Iterator[None]:
    """Keep progress bars and warnings of the library to itself, and give its failures one form."""
    logging_of_library = transformers.utils.logging
    level = logging_of_library.get_verbosity()
    logging_of_library.set_verbosity(logging.CRITICAL)
    logging_of_library.disable_progress_bar()
    try:
        yield
    except VitEdgeError:
        raise
    # Unknown types, broken configs and files: the library has a dozen of exceptions for them.
    except Exception as error:
        reason = f"transformers cannot load it ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        raise unusable(origin, reason, "update transformers, or download the folder again") from error
    finally:
        logging_of_library.set_verbosity(level)
        logging_of_library.enable_progress_bar()
