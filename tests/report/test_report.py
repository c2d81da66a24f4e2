"""A report is one page with everything; a model card is what Hugging Face reads."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import vit_edge
from tests.support.deployments import make_deployment
from tests.support.networks import FAMILIES, PREPROCESSING, SIZE, random_network, small_config
from vit_edge.checkpoint import Checkpoint
from vit_edge.errors import InputError, NotTrusted, UsageError
from vit_edge.export import ExportOptions, export_onnx
from vit_edge.export.explanation.attention_maps import attention_maps
from vit_edge.export.tracing.fused_vit import DeployedViT
from vit_edge.model_file.artifact import open_model
from vit_edge.report import write_model_card, write_report
from vit_edge.report.flipped import flips_of
from vit_edge.report.sources import read_sources
from vit_edge.report.tables import Table
from vit_edge.runtime.checks.golden import golden_images

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What is in a page: its text, images and links; raises where tags are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.texts, self.images, self.links = list[str](), list[str](), list[bytes](), list[str]()
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            kind, data = str(values["src"]).split(",", 1)
            assert re.fullmatch(r"data:image/(png|jpeg);base64", kind)
            assert values["alt"]
            self.images.append(base64.b64decode(data))
        self.links += [str(values[name]) for name in ("href", "src", "srcset") if name in values and tag != "img"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_deployment(tmp_path_factory.mktemp("deployment"))


@pytest.fixture(scope="module")
def results(deployed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with what verify, benchmark and quantize printed of a small network, and its files."""
    folder = tmp_path_factory.mktemp("results")
    for name in ("model.onnx", "model.int8.onnx"):
        shutil.copy(deployed / "out" / name, folder / name)
    images = ("--data", deployed / "data")
    asked = ("--reference", "model.onnx", *images, "--max-drop", "40", "--json")
    runs = {
        "verified": ("verify", "model.int8.onnx", *asked),
        "speed": ("benchmark", "model.onnx", "model.int8.onnx", "--min-seconds", "0.1", "--min-queries", "5",
                  "--engine", "onnxruntime", "--json"),
        "quantized": ("quantize", "model.onnx", "--calibration", deployed / "calibration", "-o", "again.onnx",
                      "--effort", "fast", "--json"),
    }  # fmt: skip
    for name, arguments in runs.items():
        done = vit_edge(*arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
        (folder / f"{name}.json").write_text(done.stdout, encoding="utf-8")
    return folder


def everything(results: Path) -> list[Path]:
    return [
        results / name for name in ("verified.json", "speed.json", "quantized.json", "model.onnx", "model.int8.onnx")
    ]


def test_one_page_has_headline_tables_images_flips_and_manifests(results: Path, tmp_path: Path) -> None:
    page = Page(write_report(everything(results), out=tmp_path / "report.html", title="<b>Ours & theirs</b>"))
    assert "<b>Ours & theirs</b>" in page.text  # as text, not as a tag
    judged = json.loads((results / "verified.json").read_text())
    changed = {c["pixels_sha256"]: c for engine in judged["results"] for c in engine["changed"]}
    assert changed
    for wanted in ("Accuracy: model.int8.onnx", "McNemar p", "images/s", "of constant-weight GMAC", "single-stream"):
        assert wanted in page.text
    for model in ("model.onnx", "model.int8.onnx"):
        assert open_model(results / model).sha256 in page.text
    assert page.text.count("attention, float32") == page.text.count("attention, INT8") == len(changed)
    assert page.text.count("attention overlaps by") == len(changed)
    assert len(page.images) == 3 * len(changed) + 1  # and the latencies
    for data in page.images:
        Image.open(io.BytesIO(data)).load()
    for change in changed.values():
        assert f"label {change['label']}" in page.text
    head = page.text.partition("Accuracy: model.int8.onnx")[0]
    worst = max(judged["results"], key=lambda entry: entry["drop_upper_bound_points"])
    for wanted in (f"no more than {worst['drop_upper_bound_points']:.2f}", "times as fast", " MB", judged["verdict"]):
        assert wanted in head
    assert re.search(r"\d{4}-\d\d-\d\d, vit-edge", head)


def test_the_page_loads_nothing_from_outside(results: Path, tmp_path: Path) -> None:
    written = write_report(everything(results), out=tmp_path / "report.html")
    assert all(re.fullmatch(r"#s\d+", link) for link in Page(written).links)
    text = written.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"<script|@import|url\(|https?:", text)


def test_a_deployment_reports_itself(deployed: Path, tmp_path: Path) -> None:
    shutil.copytree(deployed, tmp_path / "f")
    arguments = ("c.safetensors", "--calibration", "calibration", "--data", "data", "--max-drop", "40")
    done = vit_edge("deploy", *arguments, "--effort", "fast", "-o", "out", "--json", cwd=tmp_path / "f")
    printed = json.loads(done.stdout)
    assert done.returncode == (0 if printed["verdict"] == "pass" else 6), done.stderr
    page = Page(tmp_path / "f" / printed["report"])
    for claim in printed["claims"]:
        assert f"{claim['subject']}: {claim['verdict']}, {claim['text']}" in page.text
    assert "attention, INT8" in page.text
    assert "not shown" not in page.text


def test_a_check_from_another_folder_updates_record_and_report(deployed: Path, tmp_path: Path) -> None:
    shutil.copytree(deployed, tmp_path / "f")
    (tmp_path / "elsewhere").mkdir()
    done = vit_edge("deploy", "--check", "../f/out/record.json", "--no-speed", "--json", cwd=tmp_path / "elsewhere")
    printed = json.loads(done.stdout)
    assert done.returncode == (0 if printed["verdict"] == "pass" else 6), done.stderr
    record = json.loads((tmp_path / "f" / "out" / "record.json").read_text())
    assert record["verdict"] == printed["verdict"]
    assert [claim["subject"] for claim in record["claims"]] == ["accuracy"]
    page = Page(tmp_path / "f" / "out" / "report.html")
    assert record["claims"][0]["text"] in page.text
    assert "not shown" not in page.text
    (tmp_path / "f" / "data").rename(tmp_path / "moved")
    lost = vit_edge("deploy", "--check", "f/out/record.json", "--no-speed", cwd=tmp_path)
    assert lost.returncode == 3
    assert "--data" in lost.stderr
    found = vit_edge("deploy", "--check", "f/out/record.json", "--no-speed", "--data", "moved", cwd=tmp_path)
    assert found.returncode == done.returncode, found.stderr
    assert "../../moved" in (tmp_path / "f" / "out" / "record.json").read_text()


def test_images_that_moved_are_found_and_others_are_not_taken_for_them(
    results: Path, deployed: Path, tmp_path: Path
) -> None:
    values = json.loads((results / "verified.json").read_text())
    gone = json.dumps(values).replace(str(deployed / "data"), "/nowhere/data")
    (tmp_path / "verified.json").write_text(gone)
    given = [tmp_path / "verified.json", results / "model.onnx", results / "model.int8.onnx"]
    sources = read_sources(given)
    verified = sources.verified[0]

    def flips(data: Path | None) -> list[Any]:
        pair = sources.pair_of(verified)
        return flips_of(verified, pair, most=99, folder=data, progress=lambda *_: None)[0]

    assert {flip.missing for flip in flips(None)} == {
        f"there is no such file: /nowhere/data/{f.path}" for f in flips(None)
    }
    assert all(flip.image and flip.attention for flip in flips(deployed / "data"))
    shutil.copytree(deployed / "data", tmp_path / "others")
    for path in (tmp_path / "others").rglob("*.png"):
        Image.new("RGB", SIZE[::-1]).save(path)
    assert all("another image" in flip.missing and not flip.image for flip in flips(tmp_path / "others"))


def test_without_its_models_a_verification_shows_the_images_alone(results: Path, tmp_path: Path) -> None:
    page = Page(write_report([results / "verified.json"], out=tmp_path / "r.html", most_flips=1))
    assert len(page.images) == 1
    assert "Add both model files" in page.text
    none = Page(write_report([results / "verified.json"], out=tmp_path / "n.html", most_flips=0))
    assert not none.images
    assert "Predictions that changed" in none.text  # by name, in view


def test_accuracy_of_a_verification_is_drawn_beside_the_speed(results: Path) -> None:
    sources = read_sources(everything(results))
    found = sources.accuracies()
    names = {open_model(results / name).sha256 for name in ("model.onnx", "model.int8.onnx")}
    assert found.keys() == {(digest, engine) for digest in names for engine in ("onnxruntime", "openvino")}
    assert all(0 <= top1 <= 100 for top1 in found.values())


@pytest.mark.parametrize(
    ("family", "fuse"),
    [("class_token", True), ("mean_without_class_token", True), ("dinov2_linear", True), ("registers", False)],
)
def test_attention_is_that_of_the_export(family: str, fuse: bool, tmp_path: Path) -> None:
    import torch

    network = random_network(small_config(**FAMILIES[family]))
    checkpoint = Checkpoint(name="n", model=network, preprocessing=PREPROCESSING, labels=tuple("abcdefg"))
    images = golden_images(range(3), height=SIZE[0], width=SIZE[1])
    with torch.inference_mode():
        expected = DeployedViT(network, PREPROCESSING, extras=["attention"])(torch.from_numpy(images))[1].mean(dim=1)
    # With a softmax over the classes after those of the blocks.
    options = ExportOptions(fuse=fuse, outputs=("logits", "probabilities"))
    export_onnx(checkpoint, out=tmp_path / "m.onnx", options=options)
    found = attention_maps(open_model(tmp_path / "m.onnx"), images)
    assert found is not None
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)


def test_a_network_that_is_no_transformer_has_no_attention(results: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    model = open_model(results / "model.onnx")
    for architecture in (
        {"family": "onnx"},
        {"family": "vit", "depth": "many"},
        {**model.manifest.architecture, "num_heads": 3},
    ):
        other = replace(model, manifest=replace(model.manifest, architecture=architecture))
        assert attention_maps(other, golden_images([0], height=SIZE[0], width=SIZE[1])) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "results"),
        ("[]", "not a JSON object"),
        ('{"schema": 1}', "command"),
        ('{"schema": 2, "command": "verify"}', "schema 2"),
        ('{"schema": 1, "command": "classify"}', "cannot show"),
        ('{"schema": 1, "command": "verify", "error": {"reason": "it broke"}}', "it broke"),
        ('{"schema": 1, "command": "verify", "results": [{}], "verdict": "pass"}', "results"),
        ('{"schema": 1, "command": "verify", "results": [], "verdict": "pass"}', "no result of an engine"),
        ('{"schema": 1, "command": "benchmark", "results": [{}]}', "not what this vit-edge"),
    ],
)  # fmt: skip
def test_what_cannot_be_reported_is_named_and_nothing_is_lost(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    (tmp_path / "report.html").write_text("before")
    with pytest.raises(InputError, match=said):
        write_report([tmp_path / "x.json"], out=tmp_path / "report.html", force=True)
    assert (tmp_path / "report.html").read_text() == "before"


def test_a_page_looks_at_each_cell_of_a_table_a_few_times_whatever_its_length(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    numeric = Table.numeric.fget
    assert numeric is not None
    monkeypatch.setattr(Table, "numeric", property(lambda table: asked.append(table) or numeric(table)))
    data = json.loads((results / "speed.json").read_text())
    data["results"] *= 50
    (tmp_path / "speed.json").write_text(json.dumps(data))
    write_report([tmp_path / "speed.json"], out=tmp_path / "page.html")
    assert max(len(table.rows) for table in asked) >= 50
    assert len(asked) == len({id(table) for table in asked})


def test_files_that_were_changed_or_would_be_overwritten_are_refused(results: Path, tmp_path: Path) -> None:
    damaged = bytearray((results / "model.onnx").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "m.onnx").write_bytes(damaged)
    with pytest.raises(NotTrusted):
        write_report([tmp_path / "m.onnx"], out=tmp_path / "r.html")
    (tmp_path / "r.html").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        write_report(everything(results), out=tmp_path / "r.html")
    before = (results / "verified.json").read_bytes()
    with pytest.raises(UsageError, match="the path is the input"):
        write_report(everything(results), out=results / "verified.json", force=True)
    assert (results / "verified.json").read_bytes() == before
    with pytest.raises(InputError, match="no record"):
        write_report([tmp_path], out=tmp_path / "s.html")


def test_a_model_card_is_read_by_hugging_face(results: Path, tmp_path: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    path = write_model_card(everything(results), out=tmp_path / "README.md", license="Apache-2.0")
    card = huggingface_hub.ModelCard.load(path)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "onnx"
    assert card.data.pipeline_tag == "image-classification"
    assert "int8" in card.data.tags
    judged = json.loads((results / "verified.json").read_text())
    values = {round(found["candidate"]["top1"] / 100, 6) for found in judged["results"]}
    assert values <= {result.metric_value for result in card.data.eval_results}
    assert {result.task_type for result in card.data.eval_results} == {"image-classification"}
    assert open_model(results / "model.int8.onnx").sha256 in card.text


def test_a_model_card_needs_a_model_and_says_what_it_does_not_know(results: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model file"):
        write_model_card([results / "verified.json"], out=tmp_path / "README.md")
    done = vit_edge("report", results / "model.onnx", "--model-card", "-o", tmp_path / "README.md")
    assert done.returncode == 0, done.stderr
    assert "the card states no license" in done.stderr
    assert "license:" not in (tmp_path / "README.md").read_text()
    for wrong in (("--title", "x"), ("--data", "x"), ("--max-flips", "3")):
        assert vit_edge("report", results / "model.onnx", "--model-card", *wrong).returncode == 2
    assert vit_edge("report", results / "model.onnx", "--license", "mit").returncode == 2


# Chromium's window is never narrower than 500 pixels: a frame is. Nothing of the page itself is changed.
_FRAME = """<!doctype html><iframe id="f" style="width:{width}px;height:900px;border:0"></iframe><script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const page = frame.contentDocument;
  const small = [...page.querySelectorAll("p, td, dd")].filter(e => parseFloat(getComputedStyle(e).fontSize) < 11);
  document.title = JSON.stringify({{
    width: page.documentElement.scrollWidth, clientWidth: page.documentElement.clientWidth,
    broken: [...page.images].filter(i => !i.complete || !i.naturalWidth).length, images: page.images.length,
    sections: page.querySelectorAll("section").length, small: small.length,
    cut: [...page.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth + 1).length,
    tallest: Math.max(...[...page.querySelectorAll(".flip")].map(e => e.getBoundingClientRect().width)),
  }});
}};
frame.srcdoc = {page};
</script>"""


def _chromium(tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Open the page that is named last; skips the test if no Chromium is installed."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed: Debian's package is called chromium")
    *options, page = arguments
    common = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
              "--disable-component-update", "--disable-sync", "--disable-quic", "--enable-logging=stderr",
              f"--user-data-dir={tmp_path / 'profile'}")  # fmt: skip
    command = [browser, *common, *options, Path(page).as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_print_of_the_page_has_every_table_and_folded_part(results: Path, tmp_path: Path) -> None:
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext is installed: Debian's package is called poppler-utils")
    page = write_report(everything(results), out=tmp_path / "report.html")
    done = _chromium(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}", page)
    assert done.returncode == 0, done.stderr[-2000:]
    read = subprocess.run(["pdftotext", "-raw", tmp_path / "page.pdf", "-"], capture_output=True, text=True, check=True)
    printed = " ".join(read.stdout.split())
    judged = json.loads((results / "verified.json").read_text())
    for wanted in ("SQNR, dB", "verdict", "memory, MB", "margin, candidate", '"preprocessing"'):
        assert wanted in printed
    for entry in judged["results"]:
        assert f"{entry['sqnr_db']:.1f} {entry['verdict']}" in printed


@pytest.mark.parametrize("width", [360, 1200])
def test_chromium_shows_it_on_a_phone_and_on_a_desk(width: int, results: Path, tmp_path: Path) -> None:
    page = write_report(everything(results), out=tmp_path / "report.html").read_text(encoding="utf-8")
    quoted = json.dumps(page).replace("</", "<\\/")
    (tmp_path / "frame.html").write_text(_FRAME.format(width=width, page=quoted), encoding="utf-8")
    done = _chromium(tmp_path, "--virtual-time-budget=5000", "--dump-dom", tmp_path / "frame.html")
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stderr[-2000:]
    seen = json.loads(title[1])
    assert seen["width"] <= seen["clientWidth"] <= width  # nothing sticks out: no scrolling sideways
    assert seen["broken"] == 0
    assert seen["images"] == len(Page(tmp_path / "report.html").images)
    assert seen["sections"] >= 6
    assert seen["small"] == 0
    assert seen["cut"] == 0  # no table has to be scrolled
    assert seen["tallest"] <= width
    assert "Content Security Policy" not in done.stderr
