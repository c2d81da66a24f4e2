"""From a checkpoint to a verified INT8 model file: `export_onnx`, `quantize`, `verify`.

Each name is imported when it is first used: verification needs no torch, and torch takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_edge.export.onnx_import.importer import ImportResult, import_onnx
    from vit_edge.export.quantization.options import QuantizationOptions
    from vit_edge.export.quantization.quantizer import QuantizationResult, quantize
    from vit_edge.export.tracing.exporter import ExportResult, export_onnx
    from vit_edge.export.tracing.options import ExportOptions
    from vit_edge.export.verification.results import Verification
    from vit_edge.export.verification.verifier import verify

__all__ = [
    "ExportOptions",
    "ExportResult",
    "ImportResult",
    "QuantizationOptions",
    "QuantizationResult",
    "Verification",
    "export_onnx",
    "import_onnx",
    "quantize",
    "verify",
]

_MODULES = {
    "ExportOptions": "tracing.options",
    "ExportResult": "tracing.exporter",
    "ImportResult": "onnx_import.importer",
    "QuantizationOptions": "quantization.options",
    "QuantizationResult": "quantization.quantizer",
    "Verification": "verification.results",
    "export_onnx": "tracing.exporter",
    "import_onnx": "onnx_import.importer",
    "quantize": "quantization.quantizer",
    "verify": "verification.verifier",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
