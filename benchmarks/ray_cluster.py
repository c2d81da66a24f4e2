"""Run jobs on a Ray cluster of two nodes on this machine, kill what can be killed, and check every row.

    python benchmarks/ray_cluster.py CLASSIFIER.onnx --encoder ENCODER.onnx --photographs DIR
        [--slow CLASSIFIER.onnx] [--images 20000] [--killed-images 20000] [--slow-images 4000]
        [--parts killed,hostile,embed,rates] [--folder DIR]

The images are crops of the photographs. CLASSIFIER and ENCODER should be small: they run on all images several times.
Two processes with a Pool each run before and after a job on the same images, to compare the rates; with --slow this is
done with another classifier too. All parts together write a section of docs/scale.md; every line appears on stderr as
soon as it is known. Linux only, with `vit-edge[ray]` installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from pyarrow import parquet
from support.many_images import image_path, spoil, write_images
from support.ray_nodes import Job, Node, environment, two_nodes, wait_for_nodes, wait_for_shards
from support.results import find_section, machine, versions, write_section
from support.timing import count

from vit_edge.data import find_images
from vit_edge.runtime import load, load_encoder

SECTION = "ray-cluster"
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
POOL = Path(__file__).with_name("support") / "pool_process.py"
SHARD_SIZE = 500
# So many shards are finished when something is killed.
MANY = 5
PARTS = ["killed", "hostile", "embed", "rates"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classifier", type=Path, metavar="CLASSIFIER.onnx")
    parser.add_argument("--encoder", type=Path, required=True, metavar="ENCODER.onnx")
    parser.add_argument("--photographs", type=Path, required=True, metavar="DIR")
    parser.add_argument("--slow", type=Path, metavar="CLASSIFIER.onnx", help="another one, to compare the rates")
    parser.add_argument("--images", type=count, default=20_000)
    parser.add_argument("--killed-images", type=count, default=20_000)
    parser.add_argument("--slow-images", type=count, default=4_000)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS, help="what to run")
    parser.add_argument("--folder", type=Path, help="where the images are made, or were made by an earlier run")
    arguments = parser.parse_args()
    find_section(SECTION, DOCUMENT)
    with tempfile.TemporaryDirectory() as made:
        lines = list(run(arguments, arguments.folder or Path(made), Path(made)))
    if {*PARTS} <= {*arguments.parts}:
        write_section(SECTION, "\n".join(lines), DOCUMENT)


def run(arguments: argparse.Namespace, folder: Path, work: Path) -> Iterator[str]:
    images = make_images(arguments, folder)
    load_before, fast = os.getloadavg()[0], arguments.classifier
    with two_nodes(work) as nodes:
        killed = first_images(work / "killed", images, arguments.killed_images)
        parts: dict[str, Callable[[], Iterable[str]]] = {
            "killed": lambda: (*lost_node(work, fast, killed, nodes), *lost_driver(work, fast, killed)),
            "hostile": lambda: hostile(work, fast, folder / "hostile", arguments.images // 2),
            "embed": lambda: embeddings(work, arguments.encoder, images, arguments.images),
            "rates": lambda: rates(work, fast, images, arguments.images),
            "slow": lambda: rates(work, arguments.slow, images, arguments.slow_images),
        }
        for name in [*arguments.parts, *(["slow"] if arguments.slow else [])]:
            for line in parts[name]():
                say(line)
                yield line
    loads = f"load {load_before:.0f} before and {os.getloadavg()[0]:.0f} after"
    yield f"\n{machine()}; {versions()}, Ray {ray.__version__}; {loads}."


def make_images(arguments: argparse.Namespace, folder: Path) -> Path:
    """Return the folder of the images; half as many are in `hostile`, a tenth of these spoiled."""
    photographs, half = find_images(arguments.photographs), arguments.images // 2
    if not (folder / "done").exists():
        write_images(photographs, folder / "images", range(arguments.images))
        shutil.copytree(
            folder / "images", folder / "hostile", ignore=lambda _, names: [n for n in names if is_from(n, half)]
        )
        spoil(folder / "hostile", range(0, half, 10))
        (folder / "done").touch()
    say(f"{arguments.images:,} images of {len(photographs)} photographs")
    return folder / "images"


def first_images(folder: Path, images: Path, num_images: int) -> Path:
    """Return a folder with links to the first so many images, in thousands."""
    folder.mkdir()
    for part in sorted(images.iterdir())[: max(1, num_images // 1000)]:
        (folder / part.name).symlink_to(part)
    return folder


def is_from(name: str, first: int) -> bool:
    """Return whether this is the image, or the folder, of a number from `first` on."""
    number = name.removesuffix(".jpg")
    return int(number) * (1000 if len(number) == 3 else 1) >= first


def embeddings(work: Path, encoder: Path, images: Path, whole: int) -> Iterator[str]:
    """Embed a tenth of the images and all of them: every vector against one process, and memory against memory."""
    tenth, found = first_images(work / "tenth", images, whole // 10), list[Job]()
    for name, source in (("few", tenth), ("all", images)):
        job = Job(folder=work, arguments=["embed", source, "--model", encoder, *out(work / f"embed-{name}")])
        printed = job.run()
        say(f"embedded {printed['images']:,}: {printed['images_per_s']:.0f} images/s, {job.memory}")
        found.append(job)
    rows, equal = rows_of(work / "embed-all"), 0
    with load_encoder(encoder, threads=1) as alone:
        equal = sum(np.array_equal(np.float32(row["embedding"]), alone.embed(row["path"])) for row in rows)
    yield (
        f"- `embed`, {whole:,} images: {len(rows):,} rows, {inputs_once(rows, images)}; "
        f"{equal:,} vectors are bitwise those of one process."
    )
    few, many = (job.memory for job in found)
    for name, before, after in (("command", few.driver, many.driver), ("actor", few.actor, many.actor)):
        change = f"{after / before - 1:+.1%}"
        yield f"- Memory of the {name}: {before:.0f} MB with a tenth of the images, {after:.0f} MB with all, {change}."


def rates(work: Path, model: Path, images: Path, num_images: int) -> Iterator[str]:
    """Compare a job with two processes that have a Pool each, before and after it, on the same images."""
    listed = work / f"{model.stem}.txt"
    listed.write_text("".join(f"{image_path(images, number)}\n" for number in range(num_images)))
    before = in_two_processes(work, model, listed)
    folder = work / f"classify-{model.stem}"
    printed = Job(folder=work, arguments=["classify", model, listed, *out(folder)]).run()
    after = in_two_processes(work, model, listed)
    rows = rows_of(folder)
    expected = {**before["labels"], **after["labels"]}
    equal = sum(expected[row["path"]] == (row["label"], row["probability"]) for row in rows)
    pools = (before["seconds"] + after["seconds"]) / 2
    yield (
        f"- `classify` with `{model.name}`, {num_images:,} images: {len(rows):,} rows, "
        f"{equal:,} bitwise as in one process. "
        f"{printed['seconds']:.0f} s from the first actor's start to the last shard; two processes of `Pool` took "
        f"{before['seconds']:.0f} s before and {after['seconds']:.0f} s after: {printed['seconds'] / pools - 1:+.0%}."
    )


def in_two_processes(work: Path, model: Path, listed: Path) -> dict[str, Any]:
    """Return the labels, and the seconds from the start of the processes to the end of the last one."""
    started = time.perf_counter()
    processes = [
        subprocess.Popen(
            [sys.executable, str(POOL), str(model), str(listed), str(rank), "2", str(work / f"pool-{rank}.parquet")],
            env=environment(work),
        )
        for rank in range(2)
    ]
    codes = [process.wait() for process in processes]
    seconds = time.perf_counter() - started
    if any(codes):
        raise SystemExit(f"a Pool ended with {codes}")
    rows = [row for rank in range(2) for row in parquet.read_table(work / f"pool-{rank}.parquet").to_pylist()]
    return {"seconds": seconds, "labels": {row["path"]: (row["label"], row["probability"]) for row in rows}}


def lost_node(work: Path, model: Path, images: Path, nodes: list[Node]) -> Iterator[str]:
    """Kill one of the two raylets in the middle of a job; check a twentieth of the labels against one process."""
    job = Job(folder=work, arguments=["classify", model, images, *out(work / "lost-node")])
    process = job.start()
    begun = wait_for_shards(work / "lost-node", MANY, process)
    nodes[1].kill()
    printed = job.finish(process)
    rows = rows_of(work / "lost-node")
    yield (
        f"- One raylet killed with SIGKILL after {begun} of {printed['shards']} shards: the job ended, "
        f"{len(rows):,} rows, {inputs_once(rows, images)}; {as_alone(rows[::20], model)}."
    )
    nodes[1].end()
    nodes[1] = Node(work)
    wait_for_nodes(work, 2)


def lost_driver(work: Path, model: Path, images: Path) -> Iterator[str]:
    """Kill the command in the middle of a job, and run it again with --resume."""
    folder = work / "lost-driver"
    job = Job(folder=work, arguments=["classify", model, images, *out(folder)])
    process = job.start()
    wait_for_shards(folder, MANY, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = states(folder)
    printed = Job(folder=work, arguments=[*job.arguments, "--resume"]).run()
    untouched = sum(states(folder)[name] == state for name, state in finished.items())
    rows = rows_of(folder)
    yield (
        f"- The command killed with SIGKILL after {len(finished)} shards and run again with --resume: "
        f"{untouched} of these are unchanged (modification time and hash), {printed['kept_shards']} kept; "
        f"{len(rows):,} rows, {inputs_once(rows, images)}, {same(rows, rows_of(work / 'lost-node'))}."
    )


def hostile(work: Path, model: Path, images: Path, num_images: int) -> Iterator[str]:
    """Classify images of which every tenth cannot be used."""
    printed = Job(folder=work, arguments=["classify", model, images, *out(work / "hostile")]).run()
    rows = rows_of(work / "hostile")
    wrong = {Path(row["path"]).name for row in rows if row["error"] is not None}
    expected = {image_path(images, number).name for number in range(0, num_images, 10)}
    good = [row for row in rows if row["error"] is None]
    yield (
        f"- {num_images:,} files, {len(expected):,} of them damaged, huge or hostile: {len(rows):,} rows, "
        f"{printed['errors']:,} with an error, {'exactly these' if wrong == expected else 'NOT exactly these'}; "
        f"the others: {same(good, rows_of(work / 'lost-node'))}."
    )


def out(folder: Path) -> list[object]:
    """Return the options of a job that writes to `folder`."""
    return ["--out", folder, "--shard-size", SHARD_SIZE]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]


def inputs_once(rows: Sequence[dict[str, Any]], images: Path) -> str:
    """Say whether every image is there once."""
    expected = sorted(map(str, find_images(images)))
    return "each input once" if sorted(row["path"] for row in rows) == expected else "NOT each input once"


def as_alone(rows: Sequence[dict[str, Any]], model: Path) -> str:
    """Say how many labels are those of one process."""
    with load(model, threads=1) as classifier:
        found = [classifier(row["path"]) for row in rows]
    pairs = zip(found, rows, strict=True)
    num_same = sum((one.label, one.probability) == (row["label"], row["probability"]) for one, row in pairs)
    return f"of {len(rows):,} that were classified again in one process {num_same:,} are bitwise the same"


def same(rows: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> str:
    """Say whether images of the same number have the same labels, probabilities and hashes."""
    known = {Path(row["path"]).name: row for row in expected}
    columns = ("sha256", "label", "probability")
    num_same = sum(all(row[c] == known[Path(row["path"]).name][c] for c in columns) for row in rows)
    return f"{num_same:,} of {len(rows):,} labels and probabilities as without a kill"


def states(folder: Path) -> dict[str, tuple[int, str]]:
    """Return the modification time and the hash of each shard."""
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.glob("part-*.parquet")
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
