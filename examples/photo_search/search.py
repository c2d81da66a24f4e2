"""Find similar photographs in a folder, with nothing but an encoder file and numpy.

    pip install "vit-edge[onnxruntime]"
    python examples/photo_search/search.py index photos/ --model encoder.int8.onnx
    python examples/photo_search/search.py find query.jpg --model encoder.int8.onnx --top 5

`index.npz` holds one vector of length 1 for each photograph, its path, and the hash of the encoder. A search is one
matrix product.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vit_edge.data import find_images
from vit_edge.errors import ImageRejected, InputError, VitEdgeError, printable
from vit_edge.files import write_atomic
from vit_edge.runtime import Encoder, load_encoder

Vectors = npt.NDArray[np.float32]


class PhotoIndex:
    """The vectors of photographs [photographs, width], their paths, and the SHA-256 of the encoder."""

    def __init__(self, vectors_BD: Vectors, names: Sequence[str], *, encoder: str) -> None:
        self.vectors_BD, self.names, self.encoder = vectors_BD, list(names), encoder

    @classmethod
    def of_folder(cls, encoder: Encoder, folder: Path) -> PhotoIndex:
        """Return the index of every photograph below a folder; one that cannot be read is named on stderr."""
        names, vectors = list[str](), list[Vectors]()
        for path in find_images(folder):
            try:
                vectors.append(encoder.embed(path))
            except ImageRejected as error:
                sys.stderr.write(f"{error}\n")
                continue
            names.append(printable(path))
        if not names:
            raise InputError("cannot index", file=folder, reason="no image can be read", remedy="give photographs")
        return cls(_unit(np.stack(vectors)), names, encoder=encoder.describe()["sha256"])

    def find(self, vector_D: Vectors, *, top: int) -> list[tuple[str, float]]:
        """Return the most similar photographs and their cosine similarities, the most similar first."""
        similarity_B = self.vectors_BD @ _unit(vector_D[None])[0]
        best = np.argsort(-similarity_B, kind="stable")[:top]
        return [(self.names[i], float(similarity_B[i])) for i in best]

    def save(self, path: Path) -> None:
        """Write the index; a reader sees the old file or the new one."""
        buffer = io.BytesIO()
        np.savez(buffer, vectors=self.vectors_BD, names=np.array(self.names), encoder=np.array(self.encoder))
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, *, encoder: Encoder) -> PhotoIndex:
        """Return the index in a file; raises InputError if it is none, or that of another encoder."""
        remedy = "make one with `search.py index FOLDER --model ENCODER`"
        try:
            with np.load(path, allow_pickle=False) as found:
                index = cls(found["vectors"], found["names"].tolist(), encoder=str(found["encoder"]))
        except (KeyError, OSError, ValueError) as error:
            raise InputError("cannot read the index", file=path, reason=str(error), remedy=remedy) from error
        if index.encoder != encoder.describe()["sha256"]:
            reason = "the index is from another encoder file; their vectors cannot be compared"
            raise InputError("cannot search", file=path, reason=reason, remedy=remedy)
        return index


def _unit(vectors_BD: Vectors) -> Vectors:
    """Return the vectors in length 1: their products are cosine similarities, whether the file normalises or not."""
    return np.asarray(vectors_BD / np.linalg.norm(vectors_BD, axis=1, keepdims=True), dtype=np.float32)


def main() -> int:
    """Index a folder, or print the most similar photographs: a line of JSON each."""
    arguments = _parser().parse_args()
    try:
        with load_encoder(arguments.model, threads=arguments.threads) as encoder:
            if arguments.command == "index":
                index = PhotoIndex.of_folder(encoder, arguments.folder)
                index.save(arguments.index)
                print(json.dumps({"index": str(arguments.index), "photographs": len(index.names)}))
                return 0
            index = PhotoIndex.load(arguments.index, encoder=encoder)
            for name, similarity in index.find(encoder.embed(arguments.image), top=arguments.top):
                print(json.dumps({"file": name, "similarity": round(similarity, 4)}))
    except VitEdgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Find similar photographs in a folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="index the photographs below a folder")
    index.add_argument("folder", type=Path)
    find = commands.add_parser("find", help="print the photographs most similar to one")
    find.add_argument("image", type=Path)
    find.add_argument("--top", type=int, default=5)
    for command in (index, find):
        command.add_argument(
            "--model", type=Path, required=True, help="encoder of `vit-edge export --outputs embedding`"
        )
        command.add_argument("--index", type=Path, default=Path("index.npz"))
        command.add_argument("--threads", type=int)
    return parser


if __name__ == "__main__":
    sys.exit(main())
