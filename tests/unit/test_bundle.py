"""A bundle folder is there whole or not at all, notices every change, and names no file outside itself."""

import json

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from gpr_dist import bundle
from gpr_dist.errors import CheckpointError

CONTENT = {"fingerprints": {"tokenizer": "abc"}, "source": {"step": 3}, "model": {"width": 16}, "settings": {}}


def make(out):
    with bundle.new_bundle(out) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "a.bin").write_bytes(b"12345")
        save_file({"w": torch.arange(60.0).view(5, 4, 3), "s": torch.tensor(7.0), "v": torch.arange(4.0)}, staging / bundle.WEIGHTS)
        bundle.seal(staging, **CONTENT)
    return out


def rename_file(folder, old, new):
    """A manifest that names another file and has its own checksum all the same, as an attacker would write it."""
    values = json.loads((folder / bundle.MANIFEST).read_text())
    values.pop("xxh3_128")
    values["files"][new] = values["files"].pop(old)
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())
    (folder / bundle.MANIFEST).write_text(json.dumps({**values, "xxh3_128": checksum}))


def test_a_sealed_bundle_is_intact_and_is_never_overwritten(tmp_path):
    out = make(tmp_path / "b")
    manifest = bundle.read_manifest(out)
    assert set(manifest.files) == {"sub/a.bin", bundle.WEIGHTS} and manifest.fingerprints == {"tokenizer": "abc"}
    assert bundle.verify(out, manifest) is None and bundle.is_bundle(out)
    with pytest.raises(CheckpointError, match="already exists"):
        make(out)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyError), bundle.new_bundle(tmp_path / "b") as staging:
        (staging / "half").write_bytes(b"1")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("change", "problem"), [
    (lambda f: (f / "sub/a.bin").write_bytes(b"12346"), "a.bin was altered"),
    (lambda f: (f / "sub/a.bin").write_bytes(b"123"), "a.bin has 3 bytes"),
    (lambda f: (f / "sub/a.bin").unlink(), "a.bin is missing"),
])
def test_a_changed_file_is_named(tmp_path, change, problem):
    out = make(tmp_path / "b")
    change(out)
    assert problem in bundle.verify(out, bundle.read_manifest(out))


@pytest.mark.parametrize(("change", "message"), [
    (lambda text: text.replace('"abc"', '"abd"'), "altered"), (lambda text: text[:50], "damaged"), (lambda text: "[]", "damaged"),
    (lambda text: text.replace('"bundle_version": 1', '"bundle_version": 9'), "version 9"),
])
def test_a_changed_manifest_is_refused(tmp_path, change, message):
    out = make(tmp_path / "b")
    path = out / bundle.MANIFEST
    path.write_text(change(path.read_text()))
    with pytest.raises(CheckpointError, match=message):
        bundle.read_manifest(out)


@pytest.mark.parametrize("name", ["../secret", "sub/../../secret", "/etc/passwd", "..\\secret", "C:secret", ""])
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    (tmp_path / "secret").write_bytes(b"12345")
    out = make(tmp_path / "b")
    rename_file(out, "sub/a.bin", name)
    with pytest.raises(CheckpointError, match="not a path inside"):
        bundle.read_manifest(out)


def test_a_link_that_leads_out_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(b"12345")
    out = make(tmp_path / "b")
    (out / "sub" / "a.bin").unlink()
    (out / "sub" / "a.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="a link that leads out"):
        bundle.read_manifest(out)


def test_every_range_of_a_weight_is_read(tmp_path):
    out = make(tmp_path / "b")
    flat = torch.arange(60.0)
    for lo in range(0, 60, 7):
        for hi in range(lo + 1, 61, 5):
            target = torch.empty(hi - lo)
            bundle.read_weight_range(target, lo, hi, out, "w")
            assert torch.equal(target, flat[lo:hi])
    for name, hi, expected in (("s", 1, torch.tensor([7.0])), ("v", 4, torch.arange(4.0))):
        target = torch.empty(hi)
        bundle.read_weight_range(target, 0, hi, out, name)
        assert torch.equal(target, expected)
    with pytest.raises(CheckpointError, match="no weight other"):
        bundle.read_weight_range(torch.empty(1), 0, 1, out, "other")
    with pytest.raises(CheckpointError, match="were asked for"):
        bundle.read_weight_range(torch.empty(2), 59, 61, out, "w")
    assert bundle.weight_shapes(out) == {"w": (5, 4, 3), "s": (), "v": (4,)}
