"""`vit-edge repository`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from vit_edge.cli.options import load_options, option_group
from vit_edge.cli.output import Result, command, file_argument, make_table, progress_bar
from vit_edge.errors import printable
from vit_edge.machine.cpu import MOST_THREADS

# How to start each server on what was written, from the folder of the repository.
_START = {
    "triton": "tritonserver --model-repository=models",
    "openvino-model-server": "ovms --config_path config.json --rest_port 8000",
    "kserve": "kubectl apply -f inferenceservice.yaml",
    "ray-serve": "serve run serve_config.yaml",
}


@command("repository")
@file_argument("model")
@click.option("--for", "server", type=click.Choice(list(_START)), required=True, help="Server to write for.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace files of the same names.")
@option_group(
    "Serving",
    click.option("--instances", type=click.IntRange(1, 256), help="Instances of the model  [default: CPUs / threads]."),
    click.option(
        "--threads",
        type=click.IntRange(1, MOST_THREADS),
        help="Threads for each instance  [default: what `vit-edge tune` saved, else 1].",
    ),
    click.option("--storage-uri", help="KServe: where the folder models will be  [default: pvc://models/NAME]."),
)
@load_options
def repository(model: Path, server: Any, out: Path, **values: Any) -> Result:
    """Write a model repository for an inference server: model, configuration, labels and a client.

    The client prepares images exactly as the model file says; `client.py URL --check` compares a running server with
    the golden vectors.

    \b
    Examples:
      vit-edge repository model.int8.onnx --for triton --out repository
      python repository/client/client.py http://localhost:8000 --check
    """
    from vit_edge.runtime.repository.builder import write_repository

    with progress_bar(f"checking {printable(model)}"):
        made = write_repository(model, server=server, out=out, **values)
    path = printable(made.path)
    rows = [
        ("model", made.name),
        ("engine", made.engine),
        ("instances x threads", f"{made.instances} x {made.threads}"),
        ("tuned", "yes" if made.is_tuned else "no: run `vit-edge tune` on a machine like the server's first"),
        ("start", f"cd {path} && {_START[server]}"),
        ("check", f"python {path}/client/client.py http://localhost:8000 --check"),
    ]
    data = {**asdict(made), "path": path, "server": server}
    return Result(data=data, shown=[f"Wrote {len(made.files)} files to {path}.", make_table("", ("", ""), rows)])
