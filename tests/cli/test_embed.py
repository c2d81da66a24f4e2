"""`vit-edge embed` and the Encoder that it runs: vectors of any number of images, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import vit_edge
from tests.support.encoders import NUM_IMAGES
from vit_edge.data import find_images
from vit_edge.errors import Closed, UsageError
from vit_edge.runtime import Encoder, Pool, load, load_encoder
from vit_edge.runtime.bundle.builder import bundle
from vit_edge.runtime.vectors_file import open_vectors


def test_load_gives_an_encoder_whose_vectors_do_not_depend_on_the_batch(small_encoder: Path) -> None:
    paths = find_images(small_encoder / "images")[:70]  # more than run at once
    with load(small_encoder / "e.int8.onnx") as loaded:
        assert isinstance(loaded, Encoder)
        together = loaded.embed_batch(paths)
        alone = np.stack([loaded.embed(path) for path in paths])
        assert together.shape == (70, loaded.width) == (70, 24)
        np.testing.assert_allclose(together, alone, atol=1e-5)
        assert loaded.is_normalized
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
        assert loaded.tokens(np.zeros((2, 24, 16, 3), np.uint8)).shape == (2, 7, 24)
        assert loaded.embed_batch([]).shape == (0, 24)
        assert "24 values" in repr(loaded)
        with pytest.raises(TypeError, match="list of images"):
            loaded.embed_batch(str(paths[0]))
    with pytest.raises(Closed, match="cannot embed"):
        loaded.embed(paths[0])


def test_what_classifies_refuses_an_encoder_and_the_other_way_round(small_encoder: Path, small_model: Path) -> None:
    with pytest.raises(UsageError, match="classifier, not an encoder"):
        load_encoder(small_model / "m.onnx")
    with pytest.raises(UsageError, match="encoder and has no classes"):
        Pool(small_encoder / "e.onnx")
    with pytest.raises(UsageError, match="the file is an encoder"):
        bundle(small_encoder / "e.onnx", out=small_encoder / "never.pyz")


def test_embed_writes_a_row_for_each_image_and_one_bad_image_does_not_end_it(
    small_encoder: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_encoder / "images", tmp_path / "images")
    (tmp_path / "images" / "even" / "bad.png").write_bytes(b"no image")
    arguments = ["embed", "images", "--model", small_encoder / "e.int8.onnx", "--json"]
    done = vit_edge(*arguments, cwd=tmp_path)
    assert done.returncode == 3
    printed = json.loads(done.stdout)
    assert (printed["images"], printed["width"]) == (NUM_IMAGES, 24)
    assert [entry["file"] for entry in printed["rejected"]] == ["images/even/bad.png"]
    vectors = np.load(tmp_path / "vectors.npy")
    names = (tmp_path / "vectors.txt").read_text().splitlines()
    assert vectors.shape == (NUM_IMAGES, 24)
    assert vectors.dtype == np.float32
    with load_encoder(small_encoder / "e.int8.onnx") as encoder:
        np.testing.assert_allclose(vectors[17], encoder.embed(tmp_path / names[17]), atol=1e-5)
    again = vit_edge(*arguments, cwd=tmp_path)
    assert again.returncode == 2
    assert "--force" in again.stderr


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with open_vectors(tmp_path / "v.npy", width=3) as vectors:
        vectors.add(["a", "b"], np.ones((2, 3), np.float32))
        assert not (tmp_path / "v.npy").exists()
        assert vectors.finish() == 2
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["v.npy", "v.txt"]
    with open_vectors(tmp_path / "w.npy", width=3) as vectors:  # as if an error had ended it
        vectors.add(["a"], np.ones((1, 3), np.float32))
    assert not (tmp_path / "w.npy").exists()
    with pytest.raises(UsageError, match=r"\.csv"), open_vectors(tmp_path / "v.csv", width=3):
        pass


def test_parquet_has_a_name_and_a_vector_in_each_row(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    with open_vectors(tmp_path / "v.parquet", width=3) as vectors:
        for number in range(3):
            vectors.add([f"{number}.png"], np.full((1, 3), number, np.float32))
        assert vectors.finish() == 3
    table = parquet.read_table(tmp_path / "v.parquet")
    assert table["file"].to_pylist() == ["0.png", "1.png", "2.png"]
    assert table["vector"].to_pylist()[2] == [2.0, 2.0, 2.0]


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_edge.errors import MissingExtra

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match="parquet"), open_vectors(tmp_path / "v.parquet", width=3):
        pass
