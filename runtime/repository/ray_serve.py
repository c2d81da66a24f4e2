"""Ray Serve: an application over `vit_edge.runtime.Pool`, and its configuration for `serve run` and `serve deploy`."""

from __future__ import annotations

from vit_edge.runtime.repository.served_model import MODELS, ServedModel
from vit_edge.runtime.repository.sources import source_of

__all__ = ["ray_serve_files"]

_APPLICATION = "vit_edge.runtime.repository.ray_serve_app"


def ray_serve_files(served: ServedModel) -> dict[str, bytes]:
    """Return the files of the repository below its folder."""
    return {
        **{f"{MODELS}/{served.name}/{name}": data for name, data in served.model_files.items()},
        "app.py": source_of(_APPLICATION),
        "serve_config.yaml": _config(served).encode(),
    }


def _config(served: ServedModel) -> str:
    """Return the configuration: one replica with a pool of `instances` workers, and its CPUs."""
    file = next(name for name in ("model.xml", "model.onnx") if name in served.model_files)
    return f"""\
applications:
  - name: {served.name}
    route_prefix: /
    import_path: app:build
    args:
      model: {MODELS}/{served.name}/{file}
      engine: {served.engine}
      workers: {served.instances}
      threads: {served.threads}
    deployments:
      - name: Service
        num_replicas: 1
        max_ongoing_requests: {4 * served.instances}
        ray_actor_options:
          num_cpus: {served.num_cpus}
"""
