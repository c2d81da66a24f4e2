"""Names are fetched by the libraries' own hub code; here they find files made by the tests, and no network."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.converter_table import randomise
from tests.conftest import ROOT
from tests.support.third_party_weights import CLASSES, same_logits, save_timm, state_of, timm_model
from vit_edge.conversion import hub
from vit_edge.convert import open_source, read_source
from vit_edge.errors import CheckpointRejected, InputError, MissingExtra, VitEdgeError


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep every hub's cache in the test's folder, and the network out."""
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def test_timm_loads_a_folder_by_its_own_code(tmp_path: Path) -> None:
    model = timm_model("deit3_small_patch16_224")
    save_timm(tmp_path / "a", model, model_config={"label_names": list(CLASSES)})
    made = read_source(f"timm:local-dir:{tmp_path / 'a'}")
    assert made.report.assumed == ()
    assert made.checkpoint.name == "deit3_small_patch16_224"
    assert same_logits(made.checkpoint.model, model, (64, 64)) < 1e-5


def test_torchvision_loads_weights_with_labels_and_transforms(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    weights = models.ViT_B_32_Weights.DEFAULT
    model = randomise(models.VisionTransformer(224, 32, 1, 12, 768, 96))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(model.state_dict(), tmp_path / "hub" / "checkpoints" / weights.url.rsplit("/", 1)[1])
    made = read_source("torchvision:vit_b_32")
    assert made.report.assumed == ()
    assert made.checkpoint.labels[1] == "goldfish"
    preprocessing = made.checkpoint.preprocessing
    assert (preprocessing.resize, preprocessing.crop, preprocessing.interpolation) == (256, (224, 224), "bilinear")
    assert same_logits(made.checkpoint.model, model, (224, 224)) < 1e-5


def cached_repository(home: Path, repository: str) -> Path:
    """Return an empty snapshot in the cache of Hugging Face, as a download leaves it."""
    folder = home / "hf" / "hub" / f"models--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def test_hugging_face_finds_a_repository_in_its_cache(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    save_timm(cached_repository(tmp_path, "someone/small"), timm_model())
    # The hub's library reads where its cache is when it is imported.
    script = "from vit_edge.convert import read_source; made = read_source('hf:someone/small')\n"
    script += "print(made.checkpoint.base_model, made.report.known['num_heads'], made.report.source)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["someone/small", "config.json", "hf:someone/small"]


def test_hugging_face_takes_a_folder_for_a_name(tmp_path: Path) -> None:
    model = timm_model()
    save_timm(tmp_path / "a", model)
    assert same_logits(open_source(f"hf:{tmp_path / 'a'}").model, model, (64, 64)) < 1e-5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:vit_tiny_patch16_225", "did you mean vit_tiny_patch16_224"),
        ("timm:resnet18", "cannot (use|fetch)"),
        ("hf:someone/absent", "check the name and the network"),
        ("hf:no such name!", "check the name and the network"),
        ("torchvision:vit_b_17", "did you mean vit_b_16"),
        ("torchvision:vit_b_16:IMAGENET9", "did you mean IMAGENET1K_V1"),
        ("timm:local-dir:/absent", "FileNotFoundError"),
    ],
)
def test_names_that_cannot_be_fetched_are_one_error(source: str, message: str) -> None:
    with pytest.raises(VitEdgeError, match=message) as caught:
        open_source(source)
    assert caught.value.exit_code in (2, 3)


@pytest.mark.parametrize(
    ("source", "package", "extra"),
    [("timm:vit_tiny_patch16_224", "timm", "timm"), ("hf:a/b", "huggingface_hub", "huggingface")],
)
def test_a_missing_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, source: str, package: str, extra: str
) -> None:
    real = importlib.import_module

    def without(name: str) -> ModuleType:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name)

    monkeypatch.setattr("vit_edge.errors.importlib.import_module", without)
    with pytest.raises(MissingExtra, match=rf'pip install "vit-edge\[{extra}\]"'):
        open_source(source)


def test_without_timm_a_folder_of_timm_still_tells_its_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm_model()
    save_timm(tmp_path / "a", model)
    monkeypatch.setattr("vit_edge.conversion.timm_networks.require", _no_timm)
    made = read_source(tmp_path / "a")
    assert set(made.report.assumed) == {"num_heads", "activation", "layer_norm_eps", "labels"}
    assert any('pip install "vit-edge[timm]"' in note for note in made.report.notes)
    assert same_logits(made.checkpoint.model, model, (64, 64)) < 1e-5


def _no_timm(module: str, **_: str) -> None:
    raise MissingExtra(module, reason="not installed", remedy='pip install "vit-edge[timm]"')


def test_a_file_whose_name_looks_like_a_hubs_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(state_of(timm_model()), tmp_path / "timm:mine.pt")
    assert open_source("timm:mine.pt").model.config.depth == 2
    with pytest.raises(InputError):
        open_source("hub:mine.pt")


def test_what_a_hub_logs_about_each_attempt_stays_out(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("huggingface_hub.utils._http")

    def fetch() -> None:
        with hub._said_in_one_sentence("timm", "x"):
            logger.warning("Retrying in 4s [Retry 3/5].")
            raise OSError("no network")

    with pytest.raises(CheckpointRejected, match="no network"):
        fetch()
    assert caplog.records == []
    logger.warning("later")
    assert [record.getMessage() for record in caplog.records] == ["later"]
