"""Labels of the flips alone give what labels of all images would give, and no label is lost or misread."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.networks import PREPROCESSING, random_network, small_config
from vit_edge.checkpoint import Checkpoint, save_checkpoint
from vit_edge.cli import main
from vit_edge.data.near_duplicates import fingerprint
from vit_edge.errors import DataRejected, UsageError
from vit_edge.export import export_onnx, verify
from vit_edge.export.verification.flips import COLUMNS, class_titles, read_flips
from vit_edge.export.verification.results import EngineResult, Verification
from vit_edge.export.verification.verifier import write_flips
from vit_edge.image import Pixels
from vit_edge.metrics import Comparison
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime import load

NAMES = ("pizza, cheese", "=steak", "crane", "crane", "café", "sushi", "none of it")
ODD = ("=a.png", "käse.png", "a, b;c.png", "new\nline.png", os.fsdecode(b"\xff.png"), "-1.png")
NUM = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two networks that differ on some images, and a labelled folder: class folders named by index."""

    folder: Path

    @property
    def reference(self) -> Path:
        return self.folder / "reference.onnx"

    @property
    def candidate(self) -> Path:
        return self.folder / "candidate.onnx"

    @property
    def labelled(self) -> Path:
        return self.folder / "images"

    def verify(self, **options: Any) -> Verification:
        return verify(self.candidate, reference=self.reference, data=self.labelled, **options)

    def label_of(self, digest: str, found: Verification) -> int:
        path = next(c.path for r in found.results for c in r.changed if c.pixels_sha256 == digest)
        return int(Path(path).parent.name)


def _images() -> list[Pixels]:
    rng = np.random.default_rng(0)
    return [np.kron(rng.integers(0, 256, (3, 2, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(NUM)]


def _export(path: Path, images: Pixels, *, noise: float) -> None:
    network = random_network(small_config())
    with torch.no_grad():
        logits_BK = network(torch.from_numpy(PREPROCESSING.normalise(images)))
        network.head.bias -= logits_BK.mean(dim=0)  # else nearly every answer is one class
        generator = torch.Generator().manual_seed(1)
        for parameter in network.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    checkpoint = Checkpoint(name="small", model=network, preprocessing=PREPROCESSING, labels=NAMES)
    save_checkpoint(path.with_suffix(".safetensors"), checkpoint)
    export_onnx(path.with_suffix(".safetensors"), out=path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    made = Pair(folder=tmp_path_factory.mktemp("pair"))
    images = np.stack(_images())
    _export(made.reference, images, noise=0)
    _export(made.candidate, images, noise=0.004)
    answers = load(made.reference).logits(images).argmax(axis=1), load(made.candidate).logits(images).argmax(axis=1)
    rng = np.random.default_rng(1)
    for i in range(NUM):
        drawn = rng.random()
        label = answers[0][i] if drawn < 0.5 else answers[1][i] if drawn < 0.7 else rng.integers(7)
        target = made.labelled / str(int(label)) / (ODD[i] if i < len(ODD) else f"{i:03}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(target)
    return made


@pytest.fixture(scope="module")
def full(pair: Pair) -> Verification:
    """Return what labels of all the images say."""
    return pair.verify(max_drop_points=10)


@pytest.fixture(scope="module")
def unlabelled(pair: Pair) -> Verification:
    return pair.verify(max_drop_points=10, unlabelled=True)


@pytest.fixture
def rows(unlabelled: Verification, tmp_path: Path) -> list[dict[str, str]]:
    """Return the rows of the flips file that a person gets."""
    write_flips(unlabelled, tmp_path / "blank.csv")
    with (tmp_path / "blank.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _saved(rows: list[dict[str, str]], *, delimiter: str = ",", ending: str = "\r\n", encoding: str = "utf-8") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=COLUMNS, delimiter=delimiter, lineterminator=ending)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(encoding)


def _figures(result: EngineResult) -> dict[str, Any]:
    """Return what labels of the flips must give: everything but top-1 and top-5."""
    names = {field.name for field in fields(Comparison)} | {"verdict", "images_needed", "changed"}
    unknown = {"reference_top1", "candidate_top1", "reference_top5", "candidate_top5"}
    return {name: getattr(result, name) for name in sorted(names - unknown)}


_SPREADSHEETS: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
    "as written": _saved,
    "semicolons and a byte order mark": lambda rows: _saved(rows, delimiter=";", encoding="utf-8-sig"),
    "tabs in UTF-16, Unix lines": lambda rows: _saved(rows, delimiter="\t", ending="\n", encoding="utf-16"),
    "Windows letters": lambda rows: _saved(
        [{**row, "file": row["file"].encode("ascii", "replace").decode()} for row in rows], encoding="cp1252"
    ),
    "empty rows and cells at the end": lambda rows: _saved(rows, ending=",,\r\n") + b",,,,,,,,,,\r\n\r\n",
}


@pytest.mark.parametrize("how", _SPREADSHEETS)
def test_labels_of_the_flips_give_what_labels_of_all_give(
    pair: Pair, full: Verification, unlabelled: Verification, rows: list[dict[str, str]], tmp_path: Path, how: str
) -> None:
    assert {change.effect for change in full.results[0].changed} == {"worse", "better", "neither"}
    for position, row in enumerate(rows):
        label = pair.label_of(row["pixels_sha256"], unlabelled)
        named = NAMES.count(NAMES[label]) == 1 and position % 2
        row["label"] = NAMES[label].upper() if named else str(label)
    (tmp_path / "flips.csv").write_bytes(_SPREADSHEETS[how](rows))
    engines = [result.engine for result in full.results if how == "as written" or result.engine == "onnxruntime"]
    found = pair.verify(max_drop_points=10, flips=tmp_path / "flips.csv", engines=engines)
    assert found.data_sha256 == full.data_sha256
    for result, expected in zip(found.results, full.results[: len(engines)], strict=True):
        assert _figures(result) == _figures(expected)
        assert result.reference_top1 is result.candidate_top1 is None
        assert {(c.label, c.lost) for c in result.worst_classes} == {(c.label, c.lost) for c in expected.worst_classes}


def test_without_labels_each_changed_prediction_counts_as_lost(
    full: Verification, unlabelled: Verification, rows: list[dict[str, str]], pair: Pair, tmp_path: Path
) -> None:
    assert unlabelled.labels == "none"
    for result, expected in zip(unlabelled.results, full.results, strict=True):
        assert (result.worse, result.better, result.unlabelled) == (expected.num_changed, 0, expected.num_changed)
        assert result.drop_upper_bound_points > expected.drop_upper_bound_points
        assert result.mcnemar_p is None
        assert (result.agreement, result.sqnr_db) == (expected.agreement, expected.sqnr_db)
    rows[0]["label"], rows[1]["label"] = str(pair.label_of(rows[0]["pixels_sha256"], unlabelled)), "none"
    (tmp_path / "two.csv").write_bytes(_saved(rows))
    some = pair.verify(max_drop_points=10, flips=tmp_path / "two.csv")
    assert some.num_unlabelled == len(rows) - 2
    assert some.results[0].unlabelled >= len(unlabelled.results[0].changed) - 2
    assert "neither" in {change.effect for change in some.results[0].changed}


def test_the_command_line_asks_for_the_labels_and_finishes_from_them(
    pair: Pair, rows: list[dict[str, str]], unlabelled: Verification, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("blank.csv").unlink()
    before = sorted(pair.labelled.rglob("*"))
    arguments = ["verify", str(pair.candidate), "--reference", str(pair.reference), "--data", str(pair.labelled)]
    arguments += ["--max-drop", "10", "--unlabelled", "--json"]
    assert main(arguments) == 6
    printed = capsys.readouterr()
    shown = json.loads(printed.out)
    assert (shown["verdict"], shown["labels"], shown["flips_file"]) == ("inconclusive", "none", "flips.csv")
    assert shown["reference"]["top1"] is None
    assert f"fill in the {len(rows)} labels in flips.csv" in printed.err
    assert os.listdir() == ["flips.csv"]  # no image was copied
    assert sorted(pair.labelled.rglob("*")) == before

    assert main(arguments) == 2
    assert "flips.csv: the file exists\ntry: fill in the labels and add --flips" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 6
    for row in rows:
        row["label"] = str(pair.label_of(row["pixels_sha256"], unlabelled))
    Path("flips.csv").write_bytes(_saved(rows))
    capsys.readouterr()
    assert main([*arguments, "--force"]) == 2
    assert f"{len(rows)} labels are filled in" in capsys.readouterr().err
    assert Path("flips.csv").read_bytes() == _saved(rows)
    code = main([*arguments, "--flips", "flips.csv"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["labels"], code) == ("flips", 0 if shown["verdict"] == "pass" else 6)
    assert main([*arguments[:-2], "--flips-out", "x.csv"]) == 2
    assert "every image has a label already" in capsys.readouterr().err


def test_the_file_is_safe_for_spreadsheets_and_names_each_image_once(
    rows: list[dict[str, str]], unlabelled: Verification
) -> None:
    changed = [change for result in unlabelled.results for change in result.changed]
    assert [row["pixels_sha256"] for row in rows] == list(dict.fromkeys(row["pixels_sha256"] for row in rows))
    assert {row["pixels_sha256"] for row in rows} == {change.pixels_sha256 for change in changed}
    for row in rows:
        assert row["engines"].split(" | ")[0] in {"onnxruntime", "openvino"}
        assert row["label"] == ""
        assert row["file"].split("/")[0].isdigit()  # relative to the folder of the images
        assert not any(cell.startswith(("=", "+", "-", "@")) or "\n" in cell for cell in row.values())
    assert {change.reference for change in changed} <= set(class_titles(NAMES))
    assert class_titles(NAMES)[2:4] == ("crane [2]", "crane [3]")


def _without_column(rows: list[dict[str, str]]) -> bytes:
    return b"\r\n".join(line.rpartition(b",")[0] for line in _saved(rows).splitlines())


def _with(**changes: str) -> Callable[[list[dict[str, str]]], bytes]:
    return lambda rows: _saved([{**rows[0], **changes}, *rows[1:]])


_BROKEN: dict[str, tuple[Callable[[list[dict[str, str]]], bytes], str]] = {
    "a row is missing": (lambda rows: _saved(rows[1:]), "predictions that change in .* are missing"),
    "a column is missing": (_without_column, "the columns models_sha256 are missing"),
    "no class": (_with(label="zebra"), "1 labels match no class of the model, or two: 'zebra'"),
    "an index too high": (_with(label="7"), "'7'"),
    "a name of two classes": (_with(label="crane"), "'crane'"),
    "other models": (_with(models_sha256="0" * 64), "made with other models"),
    "other images": (_with(pixels_sha256="0" * 64), "are not among the evaluation images"),
    "a damaged hash": (_with(pixels_sha256="1,23E+45"), "row 2 is damaged"),
    "an edited prediction": (_with(candidate="tench"), "the file says the candidate predicts 'tench'"),
    "no table": (lambda rows: b"\x89PNG\r\n\x1a\n\x00\x81", "the file is not text"),
    "other text": (lambda rows: b"hello", "the columns .* are missing"),
    "nothing": (lambda rows: b"", "the columns .* are missing"),
}


@pytest.mark.parametrize("how", _BROKEN)
def test_flips_that_do_not_fit_are_refused_with_the_reason(
    pair: Pair, rows: list[dict[str, str]], tmp_path: Path, how: str
) -> None:
    make, reason = _BROKEN[how]
    (tmp_path / "flips.csv").write_bytes(make(rows))
    with pytest.raises(DataRejected, match=reason) as caught:
        pair.verify(flips=tmp_path / "flips.csv", engines=["onnxruntime"])
    assert str(tmp_path / "flips.csv") in str(caught.value)


def test_labels_are_carried_into_a_new_file(
    pair: Pair, rows: list[dict[str, str]], unlabelled: Verification, tmp_path: Path
) -> None:
    for row in rows:
        row |= {"label": str(pair.label_of(row["pixels_sha256"], unlabelled)), "models_sha256": "0" * 64}
    (tmp_path / "old.csv").write_bytes(_saved(rows[1:]))
    carried = pair.verify(max_drop_points=10, flips=tmp_path / "old.csv", carry_labels=True)
    assert carried.num_unlabelled == 1
    assert write_flips(carried, tmp_path / "new.csv") == len(rows)
    labels = read_flips(tmp_path / "new.csv", NAMES, models_sha256=carried.models_sha256).labels
    assert sum(label < 0 for label in labels.values()) == 1
    with pytest.raises(UsageError, match="labels are filled in"):
        write_flips(carried, tmp_path / "new.csv", force=True)
    (tmp_path / "notes.csv").write_text("mine")
    with pytest.raises(UsageError, match="the file is not a flips file"):
        write_flips(carried, tmp_path / "notes.csv", force=True)


def test_the_verdict_comes_at_once_if_labels_cannot_change_it(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--reference", str(pair.reference), "--data", str(pair.labelled), "--unlabelled"]
    assert main(["verify", str(pair.reference), *common, "--max-drop", "2"]) == 0
    assert "no prediction changed: no label is needed" in capsys.readouterr().out
    assert main(["verify", str(pair.reference), *common, "--max-drop", "1"]) == 6
    assert "use at least 299 images" in capsys.readouterr().err
    assert os.listdir() == []
    assert main(["verify", str(pair.candidate), *common, "--max-drop", "60"]) == 0
    assert "within the budget even if all" in capsys.readouterr().out


def test_agreement_alone_decides_on_loose_images(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loose").mkdir()
    for position, pixels in enumerate(_images()):
        Image.fromarray(pixels).save(f"loose/{position}.png")
    verdicts = {}
    for asked in ("50", "99", "98.2"):
        arguments = ["--reference", str(pair.reference), "--data", "loose", "--min-agreement", asked, "--json"]
        code = main(["verify", str(pair.candidate if asked != "98.2" else pair.reference), *arguments])
        printed = capsys.readouterr()
        shown = json.loads(printed.out)
        assert shown["max_drop_points"] is None
        assert code == (0 if shown["verdict"] == "pass" else 6)
        assert "160 unlabelled images: the maximum certifiable agreement is 98.15 %" in printed.err
        verdicts[asked] = shown["verdict"], shown["too_few_images"], shown["images_needed_at_best"]
    assert verdicts == {"50": ("pass", False, 5), "99": ("fail", True, 299), "98.2": ("inconclusive", True, 165)}
    assert os.listdir() == ["loose"]


def test_images_in_folders_that_are_no_classes_can_be_used_without_labels(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "2024").mkdir()
    Image.fromarray(_images()[0]).save(tmp_path / "2024" / "a.png")
    with pytest.raises(DataRejected, match="or use the images without labels"):
        verify(pair.candidate, reference=pair.reference, data=tmp_path)
    assert verify(pair.candidate, reference=pair.reference, data=tmp_path, unlabelled=True).results[0].images == 1


def test_copies_of_calibration_images_are_warned_of_by_name(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = open_model(pair.candidate)
    seen = _images()[7]
    quantization = {"images": ["0" * 64], "fingerprints": [fingerprint(seen)]}
    (tmp_path / "m.onnx").write_bytes(model.with_manifest(replace(model.manifest, quantization=quantization)))
    (tmp_path / "data").mkdir()
    for position, pixels in enumerate(_images()[:20]):
        Image.fromarray(pixels).save(tmp_path / "data" / f"{position}.jpg", quality=70)
    found = verify(tmp_path / "m.onnx", reference=pair.reference, data=tmp_path / "data", min_agreement=50)
    assert found.near_copies == (str(tmp_path / "data" / "7.jpg"),)
    assert "look like re-encoded calibration images" in caplog.text
    damaged = {**quantization, "fingerprints": ["zz"]}
    (tmp_path / "m.onnx").write_bytes(model.with_manifest(replace(model.manifest, quantization=damaged)))
    found = verify(tmp_path / "m.onnx", reference=pair.reference, data=tmp_path / "data", min_agreement=50)
    assert found.near_copies == ()
    assert "the fingerprints of the calibration images cannot be used" in caplog.text
