"""From a checkpoint to a verified INT8 model file: `export_onnx`, `quantize`, `verify`, `explain`, `deploy`.

Each name is imported when it is first used: verification needs no torch, and torch takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_edge.export.deployment.deployer import Deployment, DeploymentOptions, deploy
    from vit_edge.export.explanation.explainer import Explanation, explain
    from vit_edge.export.explanation.inputs import ExplanationOptions
    from vit_edge.export.onnx_import.importer import ImportResult, import_onnx
    from vit_edge.export.quantization.options import QuantizationOptions
    from vit_edge.export.quantization.quantizer import QuantizationResult, quantize
    from vit_edge.export.tracing.exporter import ExportResult, export_onnx
    from vit_edge.export.tracing.options import ExportOptions
    from vit_edge.export.verification.encoder_results import EncoderVerification
    from vit_edge.export.verification.encoder_verifier import verify_encoder
    from vit_edge.export.verification.results import Verification
    from vit_edge.export.verification.verifier import verify

__all__ = [
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
]

_MODULES = {
    "Deployment": "deployment.deployer",
    "DeploymentOptions": "deployment.deployer",
    "EncoderVerification": "verification.encoder_results",
    "Explanation": "explanation.explainer",
    "ExplanationOptions": "explanation.inputs",
    "ExportOptions": "tracing.options",
    "ExportResult": "tracing.exporter",
    "ImportResult": "onnx_import.importer",
    "QuantizationOptions": "quantization.options",
    "QuantizationResult": "quantization.quantizer",
    "Verification": "verification.results",
    "deploy": "deployment.deployer",
    "explain": "explanation.explainer",
    "export_onnx": "tracing.exporter",
    "import_onnx": "onnx_import.importer",
    "quantize": "quantization.quantizer",
    "verify": "verification.verifier",
    "verify_encoder": "verification.encoder_verifier",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
