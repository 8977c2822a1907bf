"""Folders whose files are damaged, lie, or lead elsewhere are refused by one message that names the file."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from assay.data.settings import MAX_BYTES
from assay.hub.files import INDEX, SINGLE, open_folder
from assay.hub.load import import_folder
from tests.hub import tiny

Edit = Callable[[Path], object]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny.save("llama", tmp_path / "model")
    return tmp_path / "model"


def header(path: Path, size: int | None, values: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(values) if size is None else size) + values + bytes(64))


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}).encode()


CUT = r"model\.safetensors: not a safetensors file, or one that was cut short"
WEIGHTS: dict[str, tuple[Edit, str]] = {
    "empty": (lambda p: p.write_bytes(b""), CUT),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:100]), CUT),
    "cut in the data": (lambda p: p.write_bytes(p.read_bytes()[:-1]), CUT),
    "more than it says": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), CUT),
    "a header of 2^62 bytes": (lambda p: header(p, 1 << 62, b"{}"), CUT),
    "a header that is not JSON": (lambda p: header(p, None, b"{"), CUT),
    "a nested header": (lambda p: header(p, None, b'{"a":' * 9999), CUT),
    "a size that overflows": (lambda p: header(p, None, entry([1 << 62, 1 << 62], 0, 64)), CUT),
    "a shape of other bytes": (lambda p: header(p, None, entry([17], 0, 64)), CUT),
    "bytes outside": (lambda p: header(p, None, entry([16], 1 << 40, (1 << 40) + 64)), CUT),
    "an end before its beginning": (lambda p: header(p, None, entry([16], 64, 0)), CUT),
    "a type nobody knows": (lambda p: header(p, None, entry([16], 0, 64, "Q4")), CUT),
    "a pickle by another name": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), CUT),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_damaged_or_lie_are_refused(name: str, llama: Path) -> None:
    edit, message = WEIGHTS[name]
    edit(llama / SINGLE)
    with pytest.raises(ValueError, match=message):
        import_folder(llama)


def shards(folder: Path, weight_map: object) -> None:
    """The model cut in two files, with an index."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    for i, part in enumerate((names[:9], names[9:])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{i}.safetensors")
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_shards_give_what_the_whole_file_gives(llama: Path) -> None:
    whole = dict(import_folder(llama).model.named_parameters())
    shards(llama, {"x": "part-0.safetensors", "y": "part-1.safetensors"})
    for name, value in import_folder(llama).model.named_parameters():
        assert torch.equal(value, whole[name])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "../elsewhere.safetensors"}, r"'\.\./elsewhere\.safetensors': not a plain file name"),
        ({"x": "/etc/passwd"}, "'/etc/passwd': not a plain file name"),
        ({"x": ".."}, r"'\.\.': not a plain file name"),
        ({"x": "a\\b"}, "not a plain file name"),
        ({"x": 3}, "weight_map: a mapping from tensors to files is expected"),
        ({}, "weight_map: a mapping"),
        (["part-0.safetensors"], "weight_map: a mapping"),
        ({"x": "part-0.safetensors"}, "tensors are missing: "),
        ({"x": "part-2.safetensors"}, r"part-2\.safetensors: named by model\.safetensors\.index\.json, and not there"),
        ({"x": "outside.safetensors"}, "a link out of its folder"),
        ({"x": "part-0.safetensors", "y": "part-0-again.safetensors"}, "stands in another file too"),
    ],
)
def test_an_index_leads_to_plain_files_of_its_own_folder(weight_map: object, message: str, llama: Path) -> None:
    shards(llama, weight_map)
    (llama / "part-0-again.safetensors").write_bytes((llama / "part-0.safetensors").read_bytes())
    (llama.parent / "elsewhere.safetensors").write_bytes(b"")
    (llama / "outside.safetensors").symlink_to(llama.parent / "elsewhere.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        import_folder(llama)


def test_a_link_into_the_blobs_of_a_hub_cache_is_followed(llama: Path) -> None:
    snapshot, blobs = llama.parent / "snapshots" / "abc", llama.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (llama / SINGLE).rename(blobs / "1")
    (snapshot / SINGLE).symlink_to(blobs / "1")
    with open_folder(snapshot) as tensors:
        assert "model.norm.weight" in tensors.names


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def test_a_pickle_is_refused_unread(llama: Path) -> None:
    (llama / SINGLE).unlink()
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(llama / "ran")))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: a pickle, which can run code"):
        import_folder(llama)
    assert not (llama / "ran").exists()
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        import_folder(llama)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[1]", "a JSON object is expected, not list"),
        ('{"a":' * 100_000, "not JSON"),
        (" " * (MAX_BYTES + 1), f"at most {MAX_BYTES} are accepted"),
        ("{}", "model_type: missing"),
        ('{"model_type": ["llama"]}', "model_type: .*a string is expected"),
        ('{"model_type": "llama", "num_attention_heads": 1e999}', "num_attention_heads: inf; an integer"),
        ('{"model_type": "llama", "num_attention_heads": true}', "num_attention_heads: True; an integer"),
    ],
)
def test_a_configuration_that_is_none_is_refused(text: str, message: str, llama: Path) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        import_folder(llama)
