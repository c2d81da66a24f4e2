"""KServe: the repository of Triton, and an InferenceService that serves it over the Open Inference Protocol v2."""

from __future__ import annotations

import json

from vit_edge.runtime.repository.served_model import ServedModel
from vit_edge.runtime.repository.triton import triton_files

__all__ = ["kserve_files"]

# Of the server itself; the model and its buffers come on top.
_SERVER_BYTES = 1_000_000_000


def kserve_files(served: ServedModel, *, storage_uri: str) -> dict[str, bytes]:
    """Return the files of the repository below its folder; `storage_uri` is where the folder `models` will be."""
    return {**triton_files(served), "inferenceservice.yaml": _inference_service(served, storage_uri).encode()}


def _inference_service(served: ServedModel, storage_uri: str) -> str:
    """Return the manifest for `kubectl apply`; texts are JSON strings, which YAML reads."""
    size_bytes = sum(map(len, served.model_files.values()))
    memory = f"{-(-(_SERVER_BYTES + (1 + served.instances) * size_bytes) // 2**20)}Mi"
    return f"""\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {json.dumps(served.name)}
spec:
  predictor:
    model:
      modelFormat:
        name: triton
      protocolVersion: v2
      runtime: kserve-tritonserver
      storageUri: {json.dumps(storage_uri)}
      resources:
        requests:
          cpu: "{served.num_cpus}"
          memory: {memory}
        limits:
          cpu: "{served.num_cpus}"
          memory: {memory}
"""
