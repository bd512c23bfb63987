"""Migrating the files of a checkpoint: what moves, what stays bit for bit, what is refused. No engine: the files are written by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gpr_dist.errors import CheckpointError
from gpr_dist.model.code_tables import code_tables
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.tokenizer.matching import Matching, match_codes
from gpr_dist.training import checkpoint, migrate
from gpr_dist.training.engine import STATES

L, V, STEP = 3, 12, 40
MODEL = {"width": 8, "num_levels": L, "codebook_size": V, "hsd": {"num_heads": 2}, "ptd": {"num_heads": 2},
         "embedding": {"feature_buckets": 16, "scene_buckets": 4}}


def shapes(model: dict) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPR(GPRConfig(**model)).named_parameters()}


def write_checkpoint(run: Path, world_size: int) -> Path:
    """As a Saver leaves it: equal parts of every parameter, the last one shorter, none for a rank that has no element."""
    folder = checkpoint.step_folder(run, STEP)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(world_size)
    whole = {name: {state: torch.randn(int(np.prod(shape)), generator=generator) for state in STATES}
             for name, shape in shapes(MODEL).items()}
    for rank in range(world_size):
        tensors, ranges = {"rng": torch.arange(5000 + rank, dtype=torch.int64).to(torch.uint8)}, []
        for name, states in whole.items():
            part = -(-states["param"].numel() // world_size)
            lo, hi = (min(states["param"].numel(), part * r) for r in (rank, rank + 1))
            if lo < hi:
                ranges.append((name, lo, hi))
                tensors |= {f"{name}|{state}|{lo}|{hi}": values[lo:hi].clone() for state, values in states.items()}
        path = folder / checkpoint.rank_file(rank)
        save_file(tensors, path)
        checkpoint.write_note(path, ranges)
    state = {"format_version": checkpoint.FORMAT_VERSION, "step": STEP, "world_size": world_size, "states": STATES, "optimizer_step": STEP,
             "shapes": shapes(MODEL), "fingerprints": {"tokenizer": "old", "data": "d"}, "config": {"model": MODEL, "train": {"lr": 1}},
             "progress": {"step": STEP, "best_step": 20, "best_loss": 1.5, "metrics": {"validation/loss": 1.5}}, "loader": {"epoch": 1}}
    (folder / "state.json").write_text(json.dumps(state))
    checkpoint.commit(folder, world_size)
    return folder


def read(folder: Path, name: str, state: str) -> torch.Tensor:
    document = checkpoint.read_state(folder)
    whole = torch.empty(int(np.prod(document["shapes"][name])))
    checkpoint.read_range(whole, 0, whole.numel(), checkpoint.read_manifest(folder)["ranges"][name], {}, folder, name, state)
    return whole


def changes(**model) -> dict:
    return {"config": {"model": MODEL | model, "train": {"lr": 1}}, "fingerprints": {"tokenizer": "new", "data": "d"}}


def a_matching(new_size: int = V, min_jaccard: float = 0.6) -> Matching:
    """Codes permuted, two of them mixed at every level; sizes may differ."""
    rng = np.random.default_rng(0)
    old = rng.integers(0, V, (4000, L))
    new = np.stack([rng.permutation(max(V, new_size))[:V][old[:, level]] for level in range(L)], axis=1) % new_size
    if new_size >= V:
        mixed = np.isin(old, [3, 7])
        for level in range(L):
            new[mixed[:, level], level] = rng.permutation(new[mixed[:, level], level])
    return match_codes(old, new, V, new_size, min_jaccard)


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("new_size", [V, V + 5, V - 5])
def test_rows_follow_their_code_and_the_rest_is_copied(tmp_path, world_size, new_size):
    source, matching = write_checkpoint(tmp_path / "a", world_size), a_matching(new_size)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    folder = migrate.migrate(source, tmp_path / "b", matching, changes(codebook_size=new_size))
    assert folder == tmp_path / "b" / f"step-{STEP:06d}" and checkpoint.verify(folder) is None
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert {path.name for path in folder.iterdir()} == set(before)

    tables = code_tables(GPRConfig(**MODEL | {"codebook_size": new_size}))
    num_kept = num_changed = 0
    for name, shape in shapes(MODEL | {"codebook_size": new_size}).items():
        for state in STATES:
            old, new = read(source, name, state), read(folder, name, state)
            if name not in tables:
                assert torch.equal(old, new), (name, state)
                continue
            assert new.numel() == np.prod(shape)
            old, new = old.view(L, V, -1).numpy(), new.view(L, new_size, -1).numpy()
            for level, match in enumerate(matching.levels):
                kept = match.kept_V
                np.testing.assert_array_equal(new[level][kept], old[level][match.source_V[kept]])
                if state != "param":
                    assert (new[level][~kept] == 0).all()
                else:
                    changed = ~kept & match.used_V
                    np.testing.assert_allclose(new[level][changed], (match.origin_VW @ old[level])[changed], rtol=1e-5, atol=1e-6)
                num_kept, num_changed = num_kept + kept.sum(), num_changed + (~kept).sum()
    assert num_kept > 0 and num_changed > 0
    for rank in range(world_size):
        with safe_open(source / checkpoint.rank_file(rank), "pt") as a, safe_open(folder / checkpoint.rank_file(rank), "pt") as b:
            assert torch.equal(a.get_tensor("rng"), b.get_tensor("rng"))


@pytest.mark.parametrize("world_size", [1, 3])
def test_nothing_changed_changes_nothing(tmp_path, world_size):
    """Every tensor of every file, and safetensors' own reader agrees with the header that is written here."""
    source = write_checkpoint(tmp_path / "a", world_size)
    codes = np.random.default_rng(0).integers(0, V - 1, (500, L))  # the last code is not used
    folder = migrate.migrate(source, tmp_path / "b", match_codes(codes, codes, V, V, 1.0), changes())
    for rank in range(world_size):
        name = checkpoint.rank_file(rank)
        with safe_open(source / name, "pt") as a, safe_open(folder / name, "pt") as b:
            assert sorted(a.keys()) == sorted(b.keys())
            assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())  # noqa: SIM118  not a dictionary
    assert checkpoint.read_manifest(source)["ranges"] == checkpoint.read_manifest(folder)["ranges"]


def test_the_state_is_of_the_new_tokenizer(tmp_path):
    source = write_checkpoint(tmp_path / "a", 2)
    folder = migrate.migrate(source, tmp_path / "b", a_matching(V + 5), changes(codebook_size=V + 5) | {"migrated_from": "x"})
    old, new = checkpoint.read_state(source), checkpoint.read_state(folder)
    assert new["fingerprints"]["tokenizer"] == "new" and new["config"]["model"]["codebook_size"] == V + 5
    assert new["shapes"]["codes.bias_LV"] == [L, V + 5] and new["migrated_from"] == "x"
    assert new["progress"] == {"step": STEP, "best_step": None, "best_loss": None, "metrics": {}}
    assert all(new[key] == old[key] for key in ("step", "world_size", "optimizer_step", "loader", "states", "format_version"))


def test_fresh_rows_are_drawn_like_the_models_own(tmp_path):
    source, matching = write_checkpoint(tmp_path / "a", 2), a_matching()
    seeds = enumerate((7, 7, 8))
    first, again, other = (migrate.migrate(source, tmp_path / f"b{number}", matching, changes(), "fresh", seed) for number, seed in seeds)
    changed = torch.from_numpy(np.stack([~match.kept_V for match in matching.levels]))
    rows = [read(folder, "codes.table.weight", "param").view(L, V, -1)[changed] for folder in (first, again, other)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert float(rows[0].std()) == pytest.approx(code_tables(GPRConfig(**MODEL))["codes.table.weight"].std, rel=0.25)
    assert (read(first, "codes.bias_LV", "param").view(L, V)[changed] == 0).all()


def test_refusals_leave_nothing_behind(tmp_path, monkeypatch):
    source, matching = write_checkpoint(tmp_path / "a", 2), a_matching()
    with pytest.raises(CheckpointError, match=r"already has step-000040; .* run folder of its own"):
        migrate.migrate(source, source.parent, matching, changes())
    with pytest.raises(CheckpointError, match=r"hte\.levels\.2\.0\.bias of shape \(8,\), a model that .* has None"):
        migrate.migrate(source, tmp_path / "b", matching, changes(num_levels=2))
    with pytest.raises(CheckpointError, match="only codes per level may change"):
        migrate.migrate(source, tmp_path / "b", matching, changes(num_user_features=3))
    assert not (tmp_path / "b").exists()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(migrate, "_write_table", full_disk)
    with pytest.raises(OSError, match="No space left"):
        migrate.migrate(source, tmp_path / "b", matching, changes())
    assert checkpoint.list_steps(tmp_path / "b") == []
    monkeypatch.undo()
    (checkpoint.step_folder(tmp_path / "b", STEP) / "remains").mkdir(parents=True)  # of a migration that was killed
    assert checkpoint.verify(migrate.migrate(source, tmp_path / "b", matching, changes())) is None
    (source / "rank-00001.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="rank-00001"):
        migrate.migrate(source, tmp_path / "b", matching, changes())
