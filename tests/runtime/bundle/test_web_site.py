"""A site made by `vit-edge bundle --web`, in headless Chromium: the labels and the very pixels of Python."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import vit_edge
from tests.support.chromium import Chromium, chromium_path, serve
from vit_edge.errors import MissingExtra, ModelRejected, UsageError
from vit_edge.image import decode
from vit_edge.runtime import load
from vit_edge.runtime.bundle.decoding_probes import decoding_probes
from vit_edge.runtime.bundle.onnxruntime_web import OPTIONAL, REQUIRED, read_onnxruntime_web
from vit_edge.runtime.bundle.site import bundle_site

# SwiftShader computes WebGPU on the CPU.
WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
LOAD = (
    "import('./vit-edge.mjs').then(({{load}}) => load({options})).then((c) => {{ globalThis.c = c; return about(c); }})"
)
HELPERS = """
globalThis.about = ({backend, golden}) => ({backend, golden});
globalThis.classify = async (data) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  try {
    const {label, probability, pixels} = await c.classify(new Blob([bytes]));
    return {label, probability, pixels: btoa(pixels.reduce((text, value) => text + String.fromCharCode(value), ''))};
  } catch (error) {
    return {code: error.code, message: error.message};
  }
};
globalThis.until = (test) => new Promise((resolve) => {
  const check = () => test() && (watcher.disconnect(), resolve(true));
  const watcher = new MutationObserver(check);
  watcher.observe(document, {subtree: true, childList: true, characterData: true, attributes: true});
  check();
});
true
"""


@pytest.fixture(scope="session")
def onnxruntime_web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as an installed onnxruntime-web has it; skips if it cannot be fetched."""
    if chromium_path() is None:
        pytest.skip("Chromium is not installed")
    try:
        version, files = read_onnxruntime_web()
    except MissingExtra as error:
        pytest.skip(f"onnxruntime-web cannot be fetched: {error.reason}")
    folder = tmp_path_factory.mktemp("onnxruntime-web")
    (folder / "dist").mkdir()
    (folder / "package.json").write_text(json.dumps({"version": version}))
    for name, data in files.items():
        (folder / "dist" / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def site(onnxruntime_web: Path, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "site"
    made = bundle_site(small_model / "m.onnx", out=folder, onnxruntime_web=onnxruntime_web)
    assert made.checked_in == ("onnxruntime",)
    assert made.size_bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return folder


@pytest.fixture(scope="module")
def browser(site: Path) -> Iterator[Chromium]:
    """Return a browser with the site's module loaded in a page that is isolated."""
    with serve(site) as address, Chromium() as chromium:
        chromium.open(f"{address}vit-edge.d.ts")  # an empty page of the site's origin
        chromium.evaluate(HELPERS)
        about = chromium.evaluate(LOAD.format(options='{backend: "wasm"}'))
        assert about["golden"]["inputs"] >= 8
        assert about["golden"]["sqnrDb"] > 80
        assert about["backend"] == {
            "name": "wasm",
            "adapter": None,
            "threads": about["backend"]["threads"],
            "version": "1.30.0",
        }
        yield chromium


def photographs() -> dict[str, bytes]:
    """Return one larger image of each kind that the page reads, and the kinds of the probes."""
    random = np.random.default_rng(8)
    small = Image.fromarray(random.integers(0, 256, (23, 31, 3), np.uint8))
    color = small.resize((217, 161), Image.Resampling.BICUBIC)
    alpha = color.resize((217, 161)).convert("L")
    exif = Image.Exif()
    exif[0x0112] = 7
    rgba = Image.merge("RGBA", (*color.split(), alpha))
    return {
        "JPEG": saved(color, "JPEG", quality=92),
        "turned JPEG": saved(color, "JPEG", quality=70, progressive=True, exif=exif, subsampling=2),
        "gray JPEG": saved(alpha, "JPEG"),
        "tall JPEG": saved(color.resize((60, 400)), "JPEG", subsampling=1),
        "PNG": saved(color, "PNG", exif=exif),
        "palette PNG": saved(color.quantize(200), "PNG"),
        "PNG with alpha": saved(rgba, "PNG"),
        "gray PNG with alpha": saved(Image.merge("LA", (alpha, alpha.rotate(180))), "PNG"),
        "WebP": saved(color, "WEBP", quality=85, exif=exif),
        "WebP with alpha": saved(rgba, "WEBP", lossless=True, exact=True),
    }


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def classified(browser: Chromium, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = browser.evaluate(f"classify('{base64.b64encode(data).decode()}')")
    return found


def test_every_kind_of_image_gives_the_pixels_and_the_label_of_python(browser: Chromium, small_model: Path) -> None:
    refused = set(browser.evaluate("c.refusedKinds"))
    assert refused <= {"CMYK JPEG", "16-bit gray PNG"}
    images = photographs()
    images |= {f"{p['kind']} {n}": base64.b64decode(p["data"]) for n, p in enumerate(decoding_probes())}
    with load(small_model / "m.onnx", engine="onnxruntime", threads=1) as classifier:
        for name, data in images.items():
            found = classified(browser, data)
            if name.rstrip("0123456789 ") in refused:
                assert found["code"] == "image-rejected"
                assert "to other pixels than vit-edge does" in found["message"]
                continue
            expected = classifier(data)
            assert found["pixels"] == base64.b64encode(classifier.prepare(data).pixels.tobytes()).decode(), name
            assert found["label"] == expected.label, name
            assert found["probability"] == pytest.approx(expected.probability, abs=1e-4)


def test_files_that_are_no_images_or_damaged_are_refused_and_the_next_one_is_classified(browser: Chromium) -> None:
    good = photographs()["JPEG"]
    for data in (b"", b"hello", good[:-200], saved(decode(good), "BMP")):
        assert classified(browser, data)["code"] == "image-rejected"
    assert "label" in classified(browser, good)
    assert browser.evaluate("c.classify('text').catch(({code}) => code)") == "usage"


def test_the_page_shows_labels_works_offline_and_fits_a_phone(site: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.jpg"
    image.write_bytes(photographs()["JPEG"])
    ready = "until(() => !document.getElementById('file').disabled)"
    shown = "until(() => document.querySelectorAll('#answers li').length)"
    with Chromium() as chromium:
        # No header allows threads here: the service worker adds them at the next visit.
        with serve(site, headers={}) as address:
            chromium.open(address)
            chromium.evaluate(HELPERS)
            assert chromium.evaluate(ready)
            assert "1 thread," in chromium.evaluate("document.getElementById('backend').textContent")
            assert chromium.evaluate("navigator.serviceWorker.ready.then(({active}) => Boolean(active))")
        chromium.open(address)
        chromium.evaluate(HELPERS)
        assert chromium.evaluate(ready)
        assert chromium.evaluate("crossOriginIsolated") is True
        chromium.choose_files("#file", [image])
        assert chromium.evaluate(shown)
        chromium.screenshot(tmp_path / "page.png", width=360, height=740)
        assert chromium.evaluate("document.documentElement.scrollWidth") == 360


def test_a_damaged_model_is_refused_in_the_page(site: Path, tmp_path: Path) -> None:
    copy = tmp_path / "site"
    shutil.copytree(site, copy)
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(data)
    with serve(copy) as address, Chromium() as chromium:
        chromium.open(address)
        chromium.evaluate(HELPERS)
        assert chromium.evaluate("until(() => document.getElementById('status').className)")
        assert "not those that were sealed" in chromium.evaluate("document.getElementById('status').textContent")
        assert chromium.evaluate("document.getElementById('file').disabled") is True


def test_webgpu_is_what_runs_if_it_is_asked_for(site: Path, small_model: Path) -> None:
    image = photographs()["PNG"]
    with serve(site) as address, Chromium(*WEBGPU) as chromium:
        chromium.open(f"{address}vit-edge.d.ts")
        chromium.evaluate(HELPERS)
        if not chromium.evaluate("navigator.gpu?.requestAdapter().then(Boolean) ?? false"):
            pytest.skip("this Chromium has no WebGPU adapter in software")
        about = chromium.evaluate(LOAD.format(options='{backend: "webgpu"}'))
        assert about["backend"]["name"] == "webgpu"
        assert about["golden"]["sqnrDb"] > 80
        with load(small_model / "m.onnx", engine="onnxruntime", threads=1) as classifier:
            assert classified(chromium, image)["label"] == classifier(image).label


def test_an_existing_folder_is_replaced_only_if_it_is_a_site(site: Path, small_model: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "dist").mkdir(parents=True)
    (package / "package.json").write_text('{"version": "0"}')
    for name in (*REQUIRED, *OPTIONAL):
        (package / "dist" / name).write_bytes(b"")
    copy = tmp_path / "site"
    shutil.copytree(site, copy)
    model = small_model / "m.onnx"
    with pytest.raises(UsageError, match="the folder exists"):
        bundle_site(model, out=copy, onnxruntime_web=package)
    assert bundle_site(model, out=copy, force=True, onnxruntime_web=package).onnxruntime_web == "0"
    (copy / "mine.txt").write_text("")
    with pytest.raises(UsageError, match=r"mine\.txt in it"):
        bundle_site(model, out=copy, force=True, onnxruntime_web=package)


def test_the_command_says_what_is_missing(small_model: Path, tmp_path: Path) -> None:
    model = small_model / "m.onnx"
    for arguments, code, sentence in (
        ((model, "--web"), 2, "--web needs a folder to write"),
        ((model, "--onnxruntime-web", tmp_path), 2, "--onnxruntime-web is for sites only"),
        ((model, "--web", "-o", tmp_path / "site", "--onnxruntime-web", tmp_path), 3, "package.json"),
    ):
        done = vit_edge("bundle", *arguments)
        assert done.returncode == code, done.stderr
        assert sentence in done.stderr
    with pytest.raises(ModelRejected, match="the file is OpenVINO IR"):
        bundle_site(small_model / "m.xml", out=tmp_path / "site")
