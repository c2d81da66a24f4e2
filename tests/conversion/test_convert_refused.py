"""What cannot be used is refused by name, whole, and nothing in a file is ever run."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from benchmarks.converter_table import google_arrays
from tests.support.third_party_weights import bare, same_logits, state_of, timm_model
from vit_edge.convert import convert, open_source, read_source
from vit_edge.errors import CheckpointRejected, UsageError, VitEdgeError


class _Opens:
    """What runs `open` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return state_of(timm_model())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_pickle_that_would_run_code_is_refused_by_what_it_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, switch: str
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", switch)
    torch.save({"model": _Opens(tmp_path / "ran")}, tmp_path / "a.pt", pickle_protocol=protocol)
    with pytest.raises(
        CheckpointRejected, match=r"needs unpickling of `(io|__builtin__|builtins|_io)\.open`"
    ) as caught:
        open_source(tmp_path / "a.pt")
    assert "save_file" in caught.value.remedy
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(_Opens(tmp_path / "ran"), protocol=protocol))
    with pytest.raises(CheckpointRejected, match=r"`\w+\.open`"):
        open_source(tmp_path / "b.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [0x2280, 0x280 + 0x10000])
def test_safetensors_whose_header_has_a_pickles_first_bytes_are_read(
    tmp_path: Path, state: dict[str, Tensor], length: int
) -> None:
    whole = save({name: tensor.contiguous() for name, tensor in state.items()})
    end = 8 + int.from_bytes(whole[:8], "little")
    assert end <= length
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + whole[8:end].ljust(length) + whole[end:])
    assert (tmp_path / "a.safetensors").read_bytes()[0] == 0x80
    found = open_source(tmp_path / "a.safetensors")
    assert torch.equal(found.model.head.weight, state["head.weight"])


def test_a_whole_module_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(CheckpointRejected, match=r"torch\.nn\.modules\.linear\.Linear"):
        open_source(tmp_path / "a.pt")


def test_the_unsafe_switch_changes_nothing_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor]
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    report = read_source(bare(tmp_path / "a.pt", state)).report
    assert any("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set" in note for note in report.notes)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def test_arguments_beside_the_weights_are_inert_data(tmp_path: Path, state: dict[str, Tensor]) -> None:
    saved = {"epoch": 3, "arch": "vit", "state_dict": state, "args": argparse.Namespace(lr=0.1), "metric": 81.2}
    torch.save(saved, tmp_path / "model_best.pth.tar")
    report = read_source(tmp_path / "model_best.pth.tar").report
    assert "weights found under state_dict" in report.notes


@pytest.mark.parametrize("legacy", [False, True])
def test_both_formats_of_torch_are_read(tmp_path: Path, state: dict[str, Tensor], legacy: bool) -> None:
    torch.save(state, tmp_path / "a", _use_new_zipfile_serialization=not legacy)
    assert read_source(tmp_path / "a").report.library == "timm"


def test_cut_short_files_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    for name in ("a.pt", "a.safetensors"):
        data = bare(tmp_path / name, state).read_bytes()
        for size in (4, 60, len(data) // 2, len(data) - 1):
            (tmp_path / "cut").write_bytes(data[:size])
            with pytest.raises(CheckpointRejected, match=r"cut short|damaged|pickle|TorchScript|zip"):
                open_source(tmp_path / "cut")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"no weights at all, only text", "neither safetensors"),
    ],
)
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(CheckpointRejected, match=message):
        open_source(tmp_path / "a.pth")


def test_folders_and_missing_files_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointRejected, match="no such file"):
        open_source(tmp_path / "absent.pt")
    with pytest.raises(CheckpointRejected, match="holds no file of weights"):
        open_source(tmp_path)
    for name in ("a.pt", "b.pt"):
        bare(tmp_path / name, state)
    with pytest.raises(CheckpointRejected, match=r"several files of weights: a\.pt, b\.pt"):
        open_source(tmp_path)


def test_a_view_that_claims_more_than_is_stored_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    bomb = torch.zeros(1).expand(2**30, 2**10)
    torch.save({**state, "blocks.0.attn.proj.weight": bomb}, tmp_path / "a.pt")
    with pytest.raises(CheckpointRejected, match=r"blocks\.0\.attn\.proj\.weight claims 4,398,046,511,104 bytes"):
        open_source(tmp_path / "a.pt")


def test_a_compressed_archive_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    stored = bare(tmp_path / "a.pt", state)
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointRejected, match="compressed"):
        open_source(tmp_path / "b.pt")
    np.savez_compressed(tmp_path / "c.npz", a=np.zeros(2**26, np.float32))
    with pytest.raises(CheckpointRejected, match="would unpack to"):
        open_source(tmp_path / "c.npz")


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.array([_Opens(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointRejected, match="arrays cannot be read"):
        open_source(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


def _drop(*names: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: [state.pop(name) for name in names] and None


def _put(**tensors: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("blocks.1.norm2.weight"), r"1 missing: blocks\.1\.norm2\.weight \(width\)"),
        (_drop("norm.weight", "norm.bias"), r"2 missing: norm\.weight \(final_norm\), norm\.bias"),
        (_drop("pos_embed"), "no learned position embeddings"),
        (_drop("head.weight"), "no head: it does not classify"),
        (_put(extra=torch.zeros(1)), "1 unexpected: extra"),
        (_put(a=torch.zeros(1), b=torch.zeros(1), norm__bias=torch.zeros(7)), "2 unexpected: a, b; 1 of another shape"),
        (_put(blocks__1__mlp__fc1__weight=torch.zeros(5, 192)), r"mlp\.fc1\.weight is \(5, 192\), .*\(mlp_width\)"),
        (_put(head__bias=torch.zeros(9)), r"head\.bias is \(9,\), not \(3,\) \(num_classes\)"),
        (_put(pos_embed=torch.zeros(1, 12, 192)), "12 positions are for no square"),
        (_put(patch_embed__proj__weight=torch.zeros(192, 4, 16, 16)), "three colours"),
        (_put(norm__bias=torch.tensor(1.0)), r"norm\.bias is \(\)"),
        (_put(blocks__0__mlp__fc1__weight=torch.tensor(1.0)), "shapes of no Vision Transformer"),
        (_put(norm__bias=torch.full((192,), float("nan"))), r"not every weight is finite: norm\.bias"),
        (_put(norm__bias=torch.full((192,), 1e300, dtype=torch.float64)), "not every weight is finite"),
        (_put(norm__bias=torch.zeros(192, dtype=torch.int8)), r"norm\.bias is int8"),
        (_put(blocks__999999999__norm1__bias=torch.zeros(192)), "depth is 1000000000"),
        (_put(blocks__0__mlp__w12__weight=torch.zeros(1)), r"gated \(SwiGLU\): blocks\.0\.mlp\.w12"),
        (_put(blocks__0__mlp__fc2__weight=torch.zeros(192, 384)), r"gated \(SwiGLU\): mlp\.fc1 gives 768"),
        (_put(attn_pool__latent=torch.zeros(1)), r"pools by attention.*attn_pool\.latent"),
        (_put(blocks__0__attn__q_norm__weight=torch.zeros(1)), "normalises queries and keys"),
        (_put(rope__periods=torch.zeros(1)), "rotary"),
        (_put(blocks__0__attn__rel_pos__bias=torch.zeros(1)), "relative"),
        (_put(pre_logits__fc__weight=torch.zeros(1)), "add --num-classes N"),
    ],
)
def test_tensors_of_another_network_are_listed_and_nothing_is_loaded(
    tmp_path: Path, state: dict[str, Tensor], change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    changed = dict(state)
    change(changed)
    with pytest.raises(CheckpointRejected, match=message):
        convert(bare(tmp_path / "a.pt", changed), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_than_five_of_a_kind_are_counted(tmp_path: Path, state: dict[str, Tensor]) -> None:
    few = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.1.") or "fc1.bias" in name}
    with pytest.raises(CheckpointRejected, match=r"11 missing: (blocks\.1\.\S+ \(\w+\), ){4}blocks\S+ \(\w+\) \.\.\."):
        open_source(bare(tmp_path / "a.pt", few))


def test_keys_of_no_known_library_are_shown(tmp_path: Path) -> None:
    with pytest.raises(CheckpointRejected, match=r"no Vision Transformer that is known: layer1\.bias, layer1\.weight"):
        open_source(bare(tmp_path / "a.pt", {"layer1.weight": torch.zeros(1), "layer1.bias": torch.zeros(1)}))
    clip = {f"visual.transformer.resblocks.{i}.ln_1.weight": torch.zeros(1) for i in range(3)}
    with pytest.raises(CheckpointRejected, match="OpenAI"):
        open_source(bare(tmp_path / "a.pt", clip))


def test_a_layer_before_the_head_of_googles_is_refused_or_goes_with_the_head(tmp_path: Path) -> None:
    arrays = google_arrays(width=64, heads=2, patch=8, size=32, depth=1)
    arrays["pre_logits/kernel"], arrays["pre_logits/bias"] = np.zeros((64, 64), np.float32), np.zeros(64, np.float32)
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CheckpointRejected, match=r"(?s)layer before its head.*pre_logits/kernel.*--num-classes"):
        open_source(tmp_path / "a.npz")
    made = read_source(tmp_path / "a.npz", num_classes=10)
    assert made.report.unused["pre_logits/kernel"] == "it belongs to the head that was replaced"
    assert made.checkpoint.model.config.num_heads == 2
    assert not made.checkpoint.model.head.weight.any()


def test_a_checkpoint_of_ours_that_is_damaged_is_not_converted(tmp_path: Path, state: dict[str, Tensor]) -> None:
    convert(bare(tmp_path / "a.pt", state), out=tmp_path / "out")
    data = bytearray((tmp_path / "out").read_bytes())
    data[-3] ^= 1
    (tmp_path / "out").write_bytes(data)
    with pytest.raises(CheckpointRejected, match="changed or damaged"):
        open_source(tmp_path / "out")


def test_the_source_and_other_files_are_never_overwritten(tmp_path: Path, state: dict[str, Tensor]) -> None:
    source = bare(tmp_path / "a.pt", state)
    with pytest.raises(UsageError, match="the path is the input"):
        convert(source, out=source, force=True)
    (tmp_path / "out").write_bytes(b"precious")
    with pytest.raises(UsageError, match="--force"):
        convert(source, out=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"precious"


def test_damaged_files_of_every_kind_raise_our_errors_only(tmp_path: Path, state: dict[str, Tensor]) -> None:
    random = np.random.default_rng(0)
    small = {name: tensor for name, tensor in state.items() if tensor.numel() < 1000}
    arrays = io.BytesIO()
    np.savez(arrays, **google_arrays(width=8, heads=2, patch=2, size=4, depth=1))
    sources = [bare(tmp_path / name, small).read_bytes() for name in ("a.pt", "a.safetensors")] + [arrays.getvalue()]
    for data in sources:
        for _ in range(40):
            broken = bytearray(data)
            for position in random.integers(0, min(len(data), 4000), 3):
                broken[position] = random.integers(256)
            (tmp_path / "broken").write_bytes(broken)
            try:
                open_source(tmp_path / "broken")
            except VitEdgeError as error:
                assert error.exit_code == 3  # noqa: PT017 - some changes do no harm, and then nothing is raised


def test_json_that_lies_beside_the_weights_is_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    bare(tmp_path / "model.safetensors", state)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(VitEdgeError, match=r"config\.json.*neither JSON nor TOML"):
        open_source(tmp_path)
    huge = {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 10**9}, "pretrained_cfg": {"mean": [0] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(huge))
    with pytest.raises(CheckpointRejected, match="depth 1000000000"):
        open_source(tmp_path / "model.safetensors")


def test_a_downcast_network_is_read_as_float32(tmp_path: Path, state: dict[str, Tensor]) -> None:
    model = timm_model()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        made = read_source(bare(tmp_path / "a.pt", {name: tensor.to(dtype) for name, tensor in state.items()}))
        assert f"{len(state)} tensors cast from {str(dtype)[6:]} to float32" in made.report.notes
        model.load_state_dict({name: tensor.to(dtype).float() for name, tensor in state.items()})
        assert same_logits(made.checkpoint.model, model, (64, 64)) < 1e-5
