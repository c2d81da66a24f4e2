"""The public surface is small, and changes only on purpose."""

from __future__ import annotations

import importlib
import pickle
import pkgutil

import pytest

import vit_edge
from vit_edge import errors

SURFACE = {
    "vit_edge": ["__version__"],
    "vit_edge.export": [
        "Deployment",
        "DeploymentOptions",
        "EncoderVerification",
        "Explanation",
        "ExplanationOptions",
        "ExportOptions",
        "ExportResult",
        "ImportResult",
        "QuantizationOptions",
        "QuantizationResult",
        "Verification",
        "deploy",
        "explain",
        "export_onnx",
        "import_onnx",
        "quantize",
        "verify",
        "verify_encoder",
    ],
    "vit_edge.runtime": [
        "Answer",
        "Benchmark",
        "BenchmarkOptions",
        "Classifier",
        "Encoder",
        "EngineName",
        "Latency",
        "Limits",
        "Measurement",
        "Pool",
        "Prediction",
        "Scenario",
        "Timings",
        "installed_engines",
        "load",
        "load_encoder",
        "measure",
    ],
    "vit_edge.errors": [
        "CheckpointRejected",
        "Closed",
        "DataRejected",
        "DeadlineExceeded",
        "EngineUnavailable",
        "GoldenMismatch",
        "ImageRejected",
        "InputError",
        "Interrupted",
        "MissingExtra",
        "ModelRejected",
        "NotPlainViT",
        "NotTrusted",
        "Overloaded",
        "ResourceExhausted",
        "UsageError",
        "VerificationFailed",
        "VitEdgeError",
        "escaped",
        "misfit",
        "printable",
        "require",
        "version_of",
    ],
}
MODULES = [
    module.name
    for module in pkgutil.walk_packages(vit_edge.__path__, "vit_edge.")
    if not module.name.startswith("vit_edge.cli.") and not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", SURFACE)
def test_the_public_names_are_these(name: str) -> None:
    assert sorted(importlib.import_module(name).__all__) == sorted(SURFACE[name])


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_is_public_and_has_it(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for public in module.__all__:
        assert hasattr(module, public), f"{name}.{public}"


def test_every_error_has_one_base_and_an_exit_code() -> None:
    from vit_edge import errors

    codes = {"UsageError": 2, "InputError": 3, "NotTrusted": 4, "ResourceExhausted": 5, "VerificationFailed": 6}
    codes |= {"EngineUnavailable": 7, "MissingExtra": 7, "GoldenMismatch": 6, "ImageRejected": 3, "Interrupted": 130}
    for name, code in codes.items():
        kind = getattr(errors, name)
        assert issubclass(kind, errors.VitEdgeError)
        assert kind.exit_code == code


def test_an_error_is_the_same_in_another_process() -> None:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.VitEdgeError):
            error = kind("cannot read", file="a\nb.jpg", reason="it's\x00", remedy="none")
            again = pickle.loads(pickle.dumps(error))
            assert (type(again), str(again), again.file) == (kind, str(error), error.file)


def test_a_message_has_what_file_why_and_what_to_do() -> None:
    from vit_edge.errors import ModelRejected

    error = ModelRejected("cannot load", file="a.onnx", reason="it is empty", remedy="copy it again")
    assert str(error) == "cannot load a.onnx: it is empty\ntry: copy it again"
