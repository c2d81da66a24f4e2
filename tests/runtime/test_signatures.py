"""Signatures: made and verified offline with key files, for files, pairs, folders and applications."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from vit_edge.cli import main
from vit_edge.errors import NotTrusted, UsageError
from vit_edge.runtime import Pool, load
from vit_edge.runtime.checks import sandbox
from vit_edge.runtime.checks.golden import golden_images

IMAGES = golden_images(range(2), height=24, width=16)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """Return a private key and its public key; skips if the library is absent."""
    pytest.importorskip("model_signing", reason='model-signing is absent: pip install "vit-edge[signing]"')
    return make_keys(tmp_path / "key")


def make_keys(stem: Path) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    pem = private.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    stem.with_suffix(".pem").write_bytes(pem)
    public = private.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    stem.with_suffix(".pub").write_bytes(public)
    return stem.with_suffix(".pem"), stem.with_suffix(".pub")


def one_file(small_model: Path, folder: Path) -> tuple[Path, Path]:
    return Path(shutil.copy(small_model / "m.onnx", folder / "m.onnx")), folder / "m.onnx"


def pair(small_model: Path, folder: Path) -> tuple[Path, Path]:
    shutil.copy(small_model / "m.bin", folder)
    return Path(shutil.copy(small_model / "m.xml", folder / "m.xml")), folder / "m.bin"


def external_data(small_model: Path, folder: Path) -> tuple[Path, Path]:
    model = onnx.load(small_model / "m.onnx")
    del model.metadata_props[:]
    model.producer_name = "somebody"
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return folder / "m.onnx", folder / "m.data"


def whole_folder(small_model: Path, folder: Path) -> tuple[Path, Path]:
    (folder / "model" / "inside").mkdir(parents=True)
    shutil.copy(small_model / "m.onnx", folder / "model" / "inside")
    (folder / "model" / ".gitignore").write_text("*.tmp")
    return folder / "model", folder / "model" / ".gitignore"


def application(small_model: Path, folder: Path) -> tuple[Path, Path]:
    shutil.copy(small_model / "m.onnx", folder / "app.pyz")
    return folder / "app.pyz", folder / "app.pyz"


KINDS = (one_file, pair, external_data, whole_folder, application)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_was_signed_is_verified_and_nothing_else(
    small_model: Path,
    tmp_path: Path,
    keys: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    kind: Callable[[Path, Path], tuple[Path, Path]],
) -> None:
    private, public = keys
    _, other = make_keys(tmp_path / "other")
    (tmp_path / "here").mkdir()
    path, part = kind(small_model, tmp_path / "here")
    verify = ["verify-signature", str(path), "--key"]
    assert main([*verify, str(public)]) == 4
    assert "there is no signature in" in capsys.readouterr().err
    assert main(["sign", str(path), "--key", str(private)]) == 0
    assert main([*verify, str(public), "--json"]) == 0
    capsys.readouterr()
    assert main([*verify, str(other)]) == 4
    assert "the signature was not made with this key" in capsys.readouterr().err
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    assert main([*verify, str(public)]) == 4
    errors = capsys.readouterr().err
    assert "Hash mismatch" in errors
    assert errors.count("\n") == 2
    part.unlink()
    assert main([*verify, str(public)]) in (3, 4)  # 3: FILE itself, or its weights, are missing


def test_a_file_that_is_added_to_a_signed_folder_is_found(
    small_model: Path, tmp_path: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = whole_folder(small_model, tmp_path)
    assert main(["sign", str(path), "--key", str(keys[0])]) == 0
    (path / ".gitattributes").touch()
    assert main(["verify-signature", str(path), "--key", str(keys[1])]) == 4
    assert "Extra files found" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [one_file, pair, external_data], ids=lambda kind: kind.__name__)
def test_load_and_pool_require_a_signature(
    small_model: Path,
    tmp_path: Path,
    keys: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: Callable[[Path, Path], tuple[Path, Path]],
) -> None:
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sandbox, "try_in_sandbox", lambda trial: pytest.fail("a signed file is known"))
    private, public = keys
    path, part = kind(small_model, tmp_path)
    manifest = load(small_model / "m.onnx", engine="onnxruntime", sandbox="never").manifest
    more = {"labels": manifest.labels, "preprocessing": manifest.preprocessing} if kind is external_data else {}
    with pytest.raises(NotTrusted, match="there is no signature"):
        load(path, require_signature=public, **more)
    assert main(["sign", str(path), "--key", str(private)]) == 0
    with load(path, require_signature=public, **more) as classifier:
        assert np.isfinite(classifier.logits(IMAGES)).all()
    with Pool(path, workers=1, require_signature=public, **more) as pool:
        part.write_bytes(part.read_bytes() + b"\0")
        with pytest.raises(NotTrusted, match="Hash mismatch"):
            pool.swap(path)
        assert pool.submit(IMAGES[0]).result().label in manifest.labels
    with pytest.raises(UsageError, match="bytes have no signature"):
        load(path.read_bytes(), require_signature=public)


def test_a_file_that_is_exchanged_after_it_was_verified_is_not_loaded(
    small_model: Path, tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vit_edge.model_file.artifact import open_model
    from vit_edge.runtime.checks import signature

    path, _ = one_file(small_model, tmp_path)
    assert main(["sign", str(path), "--key", str(keys[0])]) == 0
    digests = signature.verify_signature(path, key=keys[1])
    other = open_model(path, warn=False)
    path.write_bytes(
        other.with_manifest(other.manifest.__class__.from_json(other.manifest.to_json().replace("vit", "vi")))
    )
    with pytest.raises(NotTrusted, match="exchanged while its signature was verified"):
        signature.check_is_signed(open_model(path, warn=False), digests)


@pytest.mark.parametrize(
    "signature",
    [b"", b"{}", b"[" * 100_000, b"\xff", b'{"verificationMaterial": {}}', b"null", b'{"a": "\\u001b[31m"}'],
)
def test_a_malformed_signature_is_one_clear_error(
    small_model: Path, tmp_path: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str], signature: bytes
) -> None:
    path, _ = one_file(small_model, tmp_path)
    (tmp_path / "m.onnx.sig").write_bytes(signature)
    assert main(["verify-signature", str(path), "--key", str(keys[1])]) == 4
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert errors.count("\n") == 2


def test_a_signature_without_the_name_of_its_key_prints_nothing_on_stdout(
    small_model: Path, tmp_path: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = one_file(small_model, tmp_path)
    assert main(["sign", str(path), "--key", str(keys[0])]) == 0
    bundle = json.loads((tmp_path / "m.onnx.sig").read_text())
    bundle["verificationMaterial"]["publicKey"].pop("hint")
    (tmp_path / "m.onnx.sig").write_text(json.dumps(bundle))
    capsys.readouterr()
    assert main(["verify-signature", str(path), "--key", str(keys[1]), "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_a_key_that_is_none_and_a_signature_in_the_way_are_named(
    small_model: Path, tmp_path: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = one_file(small_model, tmp_path)
    assert main(["sign", str(path), "--key", str(path)]) == 3
    assert main(["sign", str(path), "--key", str(tmp_path / "none.pem")]) == 3
    assert main(["sign", str(path), "--key", str(keys[0]), "--out", str(path), "--force"]) == 2
    assert main(["sign", str(path), "--key", str(keys[0])]) == 0
    assert main(["sign", str(path), "--key", str(keys[0])]) == 2
    assert main(["verify-signature", str(path), "--key", str(keys[0])]) == 3
    assert "cannot use the key" in capsys.readouterr().err


def test_without_the_library_the_error_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "app.pyz").touch()
    blocked = (
        "import sys; sys.modules['model_signing'] = None; from vit_edge.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    for command in ("sign", "verify-signature"):
        arguments = [sys.executable, "-c", blocked, command, tmp_path / "app.pyz", "--key", tmp_path / "key"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 7
        assert 'try: pip install "vit-edge[signing]"' in done.stderr
