"""OpenVINO Model Server: `config.json`, and the model in version 1 of its folder."""

from __future__ import annotations

import json

from vit_edge.runtime.repository.served_model import MODELS, ServedModel

__all__ = ["openvino_model_server_files"]


def openvino_model_server_files(served: ServedModel) -> dict[str, bytes]:
    """Return the files of the repository below its folder.

    The precision hint is pinned: OpenVINO's own default is bfloat16 on some CPUs, and no golden vectors are for that.
    """
    config = {
        "name": served.name,
        "base_path": f"{MODELS}/{served.name}",  # relative to config.json
        "target_device": "CPU",
        "nireq": 2 * served.instances,
        "plugin_config": {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": served.num_cpus,
            "NUM_STREAMS": str(served.instances),
        },
    }
    folder = f"{MODELS}/{served.name}"
    text = json.dumps({"model_config_list": [{"config": config}]}, indent=2)
    return {
        **{f"{folder}/1/{name}": data for name, data in served.model_files.items()},
        "config.json": f"{text}\n".encode(),
    }
