"""`bench.py table1`: the paper's Table 1 (GPR §2) on your own embeddings: collision, CUR and PAS of items the codebooks have not seen.

For each seed 20 % of the items are held out, every method is fitted on the rest with the same codebook shape, and the held-out items are
encoded and measured, alone. `part=validation` measures on a fifth of the rest instead and never looks at the held-out items: choose
settings there. Differences are of the same seed, so of the same items. PAS weighs every pair alike, so one group of twenty near-copies
counts as much as 190 groups of two; "PAS, groups" is the mean over the colliding groups of each group's own. `floor` is the collision
that no tokenizer can avoid, because items have equal embeddings.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.fit import fit_quantizer
from gpr_dist.tokenizer.metrics import group_items, measure
from gpr_dist.tokenizer.points import open_embeddings

METHODS = {
    "rq_vae_random": {"method": "rq_vae", "init": "random"},
    "rq_vae": {"method": "rq_vae", "init": "kmeans"},
    "rq_kmeans": {"method": "rq_kmeans"},
    "rq_kmeans_plus": {"method": "rq_kmeans_plus"},
}
COLUMNS = {"collision": "collision", "not_alone": "not alone", "largest_group": "largest group", "pas": "PAS", "pas_groups": "PAS, groups",
           "cur": "CUR", "error": "error", "fit_error": "error, fit items", "seconds": "fit s"}


class Table1Config(Config):
    """What is compared."""

    data: tuple[Path, ...] = Field(min_length=1)
    """embeddings [items, dim]: .npy, or an Arrow file with a column `embedding`; e.g. data=[games.npy,beauty.npy]"""
    methods: tuple[Literal["rq_vae_random", "rq_vae", "rq_kmeans", "rq_kmeans_plus"], ...] = ("rq_vae_random", "rq_vae", "rq_kmeans",
                                                                                             "rq_kmeans_plus")
    """rows of the table; rq_vae_random = RQ-VAE from random codebooks, rq_vae = from k-means of its first latents"""
    tokenizer: TokenizerConfig = TokenizerConfig(num_levels=3, codebook_size=64)
    """shape and training of every method; its method, seed and rq_vae.init are set row by row"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """each is one split and one fit of every method"""
    held_out_frac: float = Field(0.2, gt=0, lt=1)
    """share of the items that is held out"""
    part: Literal["test", "validation"] = "test"
    """what is measured: the held-out items, or a validation part of the same size cut from the others"""
    out: Path | None = None
    """JSON file for every number"""


def run_bench(config: Table1Config) -> None:
    """Fit every method on every split, print one table per data set."""
    results = []
    fits = [(path, seed, name) for path in config.data for seed in config.seeds for name in config.methods]
    for path, seed, name in tqdm(fits, desc="fits", file=sys.stderr, mininterval=0.5):
        embeddings_ND = open_embeddings(path)
        fit_rows, held_rows = split(len(embeddings_ND), seed, config)
        results.append({"data": str(path), "method": name, "seed": seed, **_fit_and_measure(
            embeddings_ND[fit_rows], embeddings_ND[held_rows], method_config(config.tokenizer, name, seed))})
    for path in config.data:
        print(format_table(str(path), [result for result in results if result["data"] == str(path)], config))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps({"config": config.model_dump(mode="json"), "results": results}, indent=1))
        print(f"every number: {config.out}")


def split(num_items: int, seed: int, config: Table1Config) -> tuple[np.ndarray, np.ndarray]:
    """Ascending rows that are fitted on and rows that are measured; disjoint. The validation part never has a row of the test part."""
    rows = np.random.default_rng(seed).permutation(num_items)
    num_held = max(1, int(num_items * config.held_out_frac))
    test, rest = rows[:num_held], rows[num_held:]
    held, fit = (test, rest) if config.part == "test" else (rest[:num_held], rest[num_held:])
    return np.sort(fit), np.sort(held)


def method_config(tokenizer: TokenizerConfig, name: str, seed: int) -> TokenizerConfig:
    """The settings of one row of the table."""
    row = METHODS[name]
    rq_vae = tokenizer.rq_vae.model_copy(update={"init": row.get("init", tokenizer.rq_vae.init)})
    return tokenizer.model_copy(update={"method": row["method"], "rq_vae": rq_vae, "seed": seed})


def _fit_and_measure(fit_ND: np.ndarray, held_ND: np.ndarray, tokenizer: TokenizerConfig) -> dict:
    started = time.perf_counter()
    quantizer = fit_quantizer(fit_ND, tokenizer)
    seconds = time.perf_counter() - started
    codes_NL = quantizer.encode(held_ND)
    held, fitted = measure(held_ND, codes_NL, quantizer), measure(fit_ND, quantizer.encode(fit_ND), quantizer)
    return {"collision": held.collision, "not_alone": held.not_alone_frac, "pas": held.pas,
            "pas_groups": similarity_of_groups(held_ND, codes_NL, tokenizer.codebook_size), "cur": statistics.mean(held.cur),
            "cur_levels": held.cur, "entropy_bits": held.entropy_bits, "error": held.reconstruction_error[-1],
            "error_levels": held.reconstruction_error, "fit_error": fitted.reconstruction_error[-1], "largest_group": held.largest_group,
            "fit_collision": fitted.collision, "fit_pas": fitted.pas, "floor": floor(held_ND), "num_fit": len(fit_ND),
            "num_held": len(held_ND), "seconds": seconds}


def similarity_of_groups(embeddings_ND: np.ndarray, codes_NL: np.ndarray, codebook_size: int) -> float | None:
    """Mean over the colliding groups of the mean cosine similarity of the group's pairs; none when no two items collide."""
    groups = group_items(codes_NL, codebook_size)
    unit_ND = np.asarray(embeddings_ND[groups.items_N], np.float64)
    unit_ND /= np.maximum(np.linalg.norm(unit_ND, axis=1, keepdims=True), 1e-30)
    sizes_G = np.diff(groups.offsets_G1)
    summed_G = np.square(np.add.reduceat(unit_ND, groups.offsets_G1[:-1])).sum(1)
    own_G = np.add.reduceat(np.square(unit_ND).sum(1), groups.offsets_G1[:-1])  # the pairs of an item with itself
    shared_G = sizes_G > 1
    pairs_G = sizes_G[shared_G] * (sizes_G[shared_G] - 1)
    return float(((summed_G - own_G)[shared_G] / pairs_G).mean()) if shared_G.any() else None


def floor(embeddings_ND: np.ndarray) -> float:
    """Collision of items whose embeddings are equal: no function of the embedding can tell them apart."""
    return 1 - len(np.unique(embeddings_ND, axis=0)) / len(embeddings_ND)


def format_table(title: str, results: list[dict], config: Table1Config) -> str:
    """Mean ± standard deviation over the seeds, and the differences to RQ-Kmeans+ of the same seed."""
    shape = f"{config.tokenizer.num_levels} × {config.tokenizer.codebook_size}"
    head = results[0]
    floors = _spread([result["floor"] for result in results])
    lines = [f"{title}: {shape} codes, fitted on {head['num_fit']:,} items, measured on {head['num_held']:,} others ({config.part}), "
             f"{len(config.seeds)} seeds; floor of the collision {floors}",
             f"{'':16}" + "".join(f"{text:>20}" for text in COLUMNS.values())]
    by_method = {name: [result for result in results if result["method"] == name] for name in config.methods}
    for name, rows in by_method.items():
        lines.append(f"{name:16}" + "".join(f"{_spread([row[column] for row in rows]):>20}" for column in COLUMNS))
    for name, rows in by_method.items():
        if name == "rq_kmeans_plus" or "rq_kmeans_plus" not in by_method:
            continue
        for column, better in (("collision", -1), ("pas", 1), ("pas_groups", 1)):
            pairs = [(plus[column], row[column]) for plus, row in zip(by_method["rq_kmeans_plus"], rows, strict=True)]
            changes = [plus - other for plus, other in pairs if None not in (plus, other)]
            wins = sum(better * change > 0 for change in changes)
            lines.append(f"rq_kmeans_plus - {name}: {COLUMNS[column]} {_spread(changes)}, better in {wins} of {len(changes)} seeds")
    return "\n".join(lines) + "\n"


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    if len(known) == 1:
        return f"{known[0]:.4f}"
    return f"{statistics.mean(known):.4f} ± {statistics.stdev(known):.4f}"
