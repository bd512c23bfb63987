"""The tokenizer on several processes: the same bits on 1, 2, 3 and 4, errors on all of them, and memory bounded by its setting."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks

REPO = Path(__file__).parents[2]


def clustered(num_items: int, dim: int = 8, num_clusters: int = 40, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(num_clusters, dim))
    return (centres[random.integers(num_clusters, size=num_items)] + 0.2 * random.normal(size=(num_items, dim))).astype(np.float32)


def test_codebooks_and_codes_are_the_same_bits_on_any_number_of_processes(tmp_path):
    np.save(tmp_path / "e.npy", clustered(1000))
    cases = {
        "all rows": {"kmeans_items_per_code": None},
        "out of core": {"kmeans_items_per_code": None, "fit_memory_gb": 1e-9},
        "a sample of a sample": {"kmeans_items_per_code": 30, "max_fit_items": 700},
        "fewer blocks than processes": {"max_fit_items": 200},
        "unused codes": {"max_fit_items": 20},
        "latents": {"method": "rq_vae", "fit_memory_gb": 1e-9},
        "then trained": {"method": "rq_kmeans_plus"},
    }
    by_size = {size: run_ranks("tokenizer_workers:fit_cases", size, tmp_path / str(size), path=str(tmp_path / "e.npy"), cases=cases)
               for size in (1, 2, 3, 4)}
    alone = by_size[1][0]
    assert alone["all rows"] == alone["out of core"]
    for size, results in by_size.items():
        for rank, result in enumerate(results):
            for name, (fingerprint, curves, *codes) in result.items():
                assert [fingerprint, curves] == alone[name][:2], (size, rank, name)
                assert codes == (alone[name][2:] if rank == 0 else [None] * len(codes)), (size, rank, name)


def test_bad_input_is_the_same_error_on_every_process(tmp_path):
    good = clustered(1000)
    bad = good.copy()
    bad[900, 3] = np.nan  # only the last process reads it
    bad[950, 3] = np.inf
    for name, rows in {"good": good, "bad": bad, "constant": np.ones_like(good), "few": good[:10], "wide": clustered(1000, 9)}.items():
        np.save(tmp_path / f"{name}.npy", rows)
    path = {name: str(tmp_path / f"{name}.npy") for name in ("good", "bad", "constant", "few", "wide")}
    cases = {
        "embedding of item 900 is not finite": {"path": path["bad"], "settings": {}},
        "embedding of item 900 is not finite (2 of": {"path": path["good"], "settings": {}, "encode": path["bad"]},
        "1 distinct embeddings among 1000 items": {"path": path["constant"], "settings": {}},
        "10 distinct embeddings among 10 items": {"path": path["few"], "settings": {}},
        "the tokenizer needs [items, 8]": {"path": path["good"], "settings": {}, "encode": path["wide"]},
    }
    results = run_ranks("tokenizer_workers:failures", 3, tmp_path / "ranks", cases=cases)
    for message in cases:
        errors = {result[message] for result in results}
        assert len(errors) == 1 and message in errors.pop(), [result[message] for result in results]


SCRIPT = """
import resource, sys
import numpy as np
import torch
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.fit import fit_quantizer
from gpr_dist.tokenizer.points import open_embeddings

budget_gb, room_mb = float(sys.argv[2]), float(sys.argv[3])
warm = torch.randn(4096, 64) @ torch.randn(64, 256)  # what libraries allocate once
embeddings = open_embeddings(sys.argv[1])
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
limit = used + int(room_mb * 2**20)  # private writable memory; pages of the map are the kernel's to take back
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
config = TokenizerConfig(num_levels=2, codebook_size=32, iterations=2, kmeans_items_per_code=None, fit_memory_gb=budget_gb, device="cpu")
quantizer = fit_quantizer(embeddings, config)
print("CODES", quantizer.encode(embeddings).shape, quantizer.fingerprint)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
def test_memory_is_bounded_by_its_setting_not_by_the_embeddings(tmp_path):
    rows = np.lib.format.open_memmap(tmp_path / "e.npy", mode="w+", dtype=np.float32, shape=(600_000, 64))
    for lo in range(0, len(rows), 100_000):
        rows[lo:lo + 100_000] = clustered(100_000, 64, seed=lo)
    rows.flush()  # 146 MiB

    def fit(budget_gb: float, room_mb: int) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "e.npy"), str(budget_gb), str(room_mb)], capture_output=True,
                              text=True, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"})

    bounded = fit(0.01, 120)
    assert bounded.returncode == 0, bounded.stderr[-2000:]
    unbounded = fit(8, 120)  # the limit does bite
    assert unbounded.returncode != 0 and "allocate" in unbounded.stderr, unbounded.stderr[-2000:]
    held = fit(8, 600)
    assert held.stdout == bounded.stdout
