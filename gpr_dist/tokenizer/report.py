"""The evidence for or against a tokenizer: measured on its catalogue and judged by alarms.

Owns what a person needs to know of a bundle; the measures themselves are metrics.py's and residuals.py's, how the report is shown and
written is report_page.py's.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from gpr_dist.config import Config
from gpr_dist.errors import DataError, TokenizerError
from gpr_dist.html import Alarm
from gpr_dist.tokenizer.metrics import Groups, code_usage, entropy_bits, group_items, pairwise_similarity
from gpr_dist.tokenizer.points import ArrowRows, open_embeddings
from gpr_dist.tokenizer.residuals import Residuals, check_codes, measure_residuals
from gpr_dist.tokenizer.semantic_ids import SemanticIds

# N items  L levels  V codes per level  G groups: distinct semantic IDs, ascending

AD = 1  # column `kind` of the catalogue


class ReportConfig(Config):
    """When a report of the tokenizer raises an alarm, and how many groups of colliding items it shows."""

    min_cur: float = Field(0.8, ge=0, le=1)
    """alarm when a level uses less than this share of its codes"""
    min_perplexity_frac: float = Field(0.2, ge=0, le=1)
    """alarm when a level's perplexity (2 ** entropy) is below this share of codebook_size: few codes do most of the work"""
    max_code_share: float = Field(0.2, gt=0, le=1)
    """alarm when one code of a level holds more than this share of the items"""
    max_collision: float = Field(0.3, ge=0, le=1)
    """alarm above this collision, of all items or of the ads; the paper reports 0.206 to 0.232"""
    min_error_drop: float = Field(0.02, ge=0, le=1)
    """alarm when a level lowers the reconstruction error it starts from by less than this share"""
    max_group: int = Field(256, ge=1)
    """alarm when more items than this share one semantic ID"""
    num_groups: int = Field(20, ge=0)
    """largest groups listed; then half as many of those whose items were shown most, and as many drawn at random"""
    num_examples: int = Field(8, ge=1)
    """items listed of each group"""


class Level(Config):
    """One level's codebook as a set of items uses it."""

    cur: float
    """used codes / codebook_size"""
    dead_codes: int
    """codes no item has"""
    entropy_bits: float
    perplexity: float
    """2 ** entropy: the number of equally frequent codes with this entropy"""
    largest_code: int
    """the most frequent code"""
    largest_share: float
    """of the items, on it"""
    error_left: float | None
    """squared error after the level / squared distance of all items to their mean; none = no embeddings"""
    prefixes: int
    """distinct codes 1..level"""
    children: tuple[int, float, float, int]
    """distinct codes of this level below one prefix of the levels before: fewest, median, mean, most"""
    children_sizes: dict[str, int]
    """number of such codes, as a range → prefixes with that many"""
    usage: tuple[int, ...]
    """items per code, most frequent first"""


class ItemSet(Config):
    """The numbers of all items, or of the ads alone."""

    name: str
    num_items: int
    num_distinct: int
    """semantic IDs in use"""
    collision: float
    """1 - distinct semantic IDs / items"""
    duplicate_frac: float | None
    """1 - distinct embeddings / items: the lowest collision any codebook can reach with these embeddings; none = no embeddings"""
    not_alone_frac: float
    """share of the items that share their semantic ID with another one of the set"""
    shown_not_alone_frac: float | None
    """share of the times an item was shown that went to such items; none = not known how often items were shown"""
    largest_group: int
    pas: float | None
    """mean cosine similarity of the pairs that share a semantic ID; none = no such pair, or no embeddings"""
    group_sizes: dict[str, tuple[int, int]]
    """size of the group, as a range → semantic IDs of that size, items on them"""
    levels: tuple[Level, ...]


class Example(Config):
    """One item of a group."""

    index: int
    item_id: str
    ad: bool
    text: str
    shown: int | None


class CollisionGroup(Config):
    """Items that share one semantic ID."""

    semantic_id: tuple[int, ...]
    num_items: int
    num_ads: int
    distinct_embeddings: int | None
    """different embeddings among them; 1 = no codebook of any size can tell them apart"""
    similarity: float | None
    """mean cosine similarity of their pairs"""
    shown: int | None
    examples: tuple[Example, ...]


class Report(Config):
    """Everything measured; `report.json`."""

    alarms: tuple[Alarm, ...]
    fingerprint: str
    codebook_fingerprint: str
    catalogues: tuple[str, ...]
    num_fitted: int | None
    """items at the fit; later ones were appended"""
    num_embedded: int
    """leading items whose embeddings were read; error, PAS and distinct embeddings are theirs"""
    sets: tuple[ItemSet, ...]
    """all items, and the ads where the catalogue has both kinds"""
    largest_groups: tuple[CollisionGroup, ...]
    most_shown_groups: tuple[CollisionGroup, ...]
    """the other groups whose items were shown most; none = not known how often"""
    random_groups: tuple[CollisionGroup, ...]
    """a random choice of what is left"""
    settings: dict[str, Any]
    """of the fit"""
    history: dict[str, tuple[float, ...]]
    """curves of the fit, by name"""
    thresholds: ReportConfig


def measure_bundle(bundle: SemanticIds, embeddings_ND: np.ndarray | None, items: pa.Table, config: ReportConfig,
                   shown_N: np.ndarray | None = None) -> Report:
    """Measure a tokenizer on its catalogue; beside the sorts of one key per item, memory is bounded.

    Args:
        embeddings_ND: of the first rows of the catalogue, as many as there are (appended items may lack them); a memory map of any
            length. None = measure what needs none.
        items: columns item_id, kind and text, a row per item; may be memory-mapped.
        shown_N: times each item was shown, where that is known.
    Raises: TokenizerError when items or embeddings are not the bundle's.
    """
    _check_sizes(bundle, embeddings_ND, items, shown_N)
    ads_N = items["kind"].to_numpy() == AD
    groups = group_items(bundle.codes_NL, bundle.codebook_size)
    residuals, num_embedded = None, 0
    if embeddings_ND is not None:
        num_embedded = len(embeddings_ND)
        check_codes(embeddings_ND, bundle.codes_NL[:num_embedded], bundle.quantizer, "the embeddings")
        residuals = measure_residuals(embeddings_ND, bundle.codes_NL[:num_embedded], bundle.quantizer, ads_N[:num_embedded])
    sets = [_measure_set("all items", bundle, groups, None, embeddings_ND, residuals, shown_N)]
    if 0 < ads_N.sum() < len(ads_N):
        sets.append(_measure_set("ads", bundle, groups, ads_N, embeddings_ND, residuals, shown_N))
    chosen = _choose_groups(groups, shown_N, config)
    shown = {kind: tuple(_show_group(group, groups, bundle, items, ads_N, embeddings_ND, residuals, shown_N, config.num_examples)
                         for group in numbers) for kind, numbers in chosen.items()}
    return Report(
        alarms=tuple(find_alarms(sets, bundle.codebook_size, config)),
        fingerprint=bundle.fingerprint, codebook_fingerprint=bundle.codebook_fingerprint, catalogues=bundle.catalogues,
        num_fitted=bundle.report.num_items if bundle.report else None, num_embedded=num_embedded, sets=tuple(sets),
        largest_groups=shown["largest"], most_shown_groups=shown["most_shown"], random_groups=shown["random"],
        settings=bundle.config.model_dump(mode="json"), history=bundle.report.history if bundle.report else {}, thresholds=config,
    )


def read_items(path: Path) -> pa.Table:
    """Columns item_id, kind and text of a catalogue's table, memory-mapped. Raises: DataError."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all().select(["item_id", "kind", "text"])
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise DataError(f"catalogue {path} cannot be read ({error}); build it with launch/build_data.py") from None


def rows_of(items: pa.Table, rows: np.ndarray) -> list[dict]:
    """A few rows of a table of any size, item_id and text; `take` would copy the whole columns."""
    return [row for index in rows.tolist() for row in items.slice(index, 1).select(["item_id", "text"]).to_pylist()]


def read_embeddings(path: Path) -> np.ndarray | ArrowRows:
    """Embeddings of a .npy or Arrow file, memory-mapped. Raises: TokenizerError."""
    embeddings_ND = open_embeddings(path)
    if embeddings_ND.ndim != 2 or embeddings_ND.dtype.kind != "f":
        raise TokenizerError(f"embeddings {path} are {embeddings_ND.dtype} {embeddings_ND.shape}; give floats of shape [items, dim]")
    return embeddings_ND


def only(groups: Groups, keep_N: np.ndarray) -> Groups:
    """The groups of a part of the items, without those that lose all of theirs."""
    kept_N = keep_N[groups.items_N]
    offsets_G1 = np.r_[0, np.cumsum(kept_N)][groups.offsets_G1]
    left_G = np.diff(offsets_G1) > 0
    return Groups(groups.keys_G[left_G], np.r_[offsets_G1[:-1][left_G], offsets_G1[-1]], groups.items_N[kept_N])


def _check_sizes(bundle: SemanticIds, embeddings_ND: np.ndarray | None, items: pa.Table, shown_N: np.ndarray | None) -> None:
    where = f"tokenizer {bundle.folder}" if bundle.folder else "the tokenizer"
    if len(items) != bundle.num_items:
        raise TokenizerError(f"the catalogue has {len(items):,} items, {where} {bundle.num_items:,}; encode the new ones with "
                             "launch/fit_tokenizer.py --append")
    if embeddings_ND is not None and not 0 < len(embeddings_ND) <= bundle.num_items:
        raise TokenizerError(f"there are {len(embeddings_ND):,} embeddings for the {bundle.num_items:,} items of {where}; give those it "
                             "was fitted on")
    if shown_N is not None and len(shown_N) != bundle.num_items:
        raise TokenizerError(f"how often items were shown is counted for {len(shown_N):,} of {bundle.num_items:,} items; count again")


def _measure_set(name: str, bundle: SemanticIds, groups: Groups, keep_N: np.ndarray | None, embeddings_ND: np.ndarray | None,
                 residuals: Residuals | None, shown_N: np.ndarray | None) -> ItemSet:
    """Args: keep_N: the items of the set; none = all."""
    if keep_N is not None:
        groups = only(groups, keep_N)
    sizes_G = np.diff(groups.offsets_G1)
    num_items = int(sizes_G.sum())
    usage_LV = code_usage(bundle.codes_NL if keep_N is None else bundle.codes_NL[keep_N], bundle.codebook_size)
    pas = duplicates = error_L = None
    if residuals is not None:
        pas = pairwise_similarity(embeddings_ND, only(groups, np.arange(bundle.num_items) < len(embeddings_ND)))
        hash_n = residuals.hash_N if keep_N is None else residuals.hash_N[keep_N[:len(residuals.hash_N)]]
        duplicates = 1 - len(np.unique(hash_n)) / max(1, len(hash_n))
        error_L = residuals.error_L if keep_N is None else residuals.part_error_L
    return ItemSet(
        name=name, num_items=num_items, num_distinct=len(sizes_G), collision=1 - len(sizes_G) / num_items, duplicate_frac=duplicates,
        not_alone_frac=float(sizes_G[sizes_G > 1].sum() / num_items),
        shown_not_alone_frac=_shown_not_alone(groups, sizes_G, shown_N), largest_group=int(sizes_G.max()), pas=pas,
        group_sizes=_size_histogram(sizes_G), levels=_levels(usage_LV, groups.keys_G, error_L),
    )


def _shown_not_alone(groups: Groups, sizes_G: np.ndarray, shown_N: np.ndarray | None) -> float | None:
    if shown_N is None:
        return None
    by_group = shown_N[groups.items_N]
    total = float(by_group.sum())
    return float(by_group[np.repeat(sizes_G > 1, sizes_G)].sum()) / total if total else None


def _size_histogram(sizes_G: np.ndarray) -> dict[str, tuple[int, int]]:
    """Groups and what is in them by their size, in ranges that double: 1, 2, 3-4, 5-8, …"""
    bin_G = np.ceil(np.log2(sizes_G)).astype(np.int64)
    ids, items = np.bincount(bin_G), np.bincount(bin_G, sizes_G)
    names = ["1", "2", *(f"{2**(power - 1) + 1}-{2**power}" for power in range(2, len(ids)))]
    return {name: (int(count), int(on)) for name, count, on in zip(names, ids, items, strict=False)}


def _levels(usage_LV: np.ndarray, keys_G: np.ndarray, error_L: np.ndarray | None) -> tuple[Level, ...]:
    """Args: keys_G: packed semantic IDs in use, ascending, of which a prefix is a quotient."""
    num_levels, codebook_size = usage_LV.shape
    entropy_L = entropy_bits(usage_LV)
    levels, parents = [], np.zeros(1, np.int64)
    for level, usage_V in enumerate(usage_LV):
        keys = keys_G // codebook_size ** (num_levels - level - 1)
        prefixes = keys[np.r_[True, keys[1:] != keys[:-1]]]
        children = np.bincount(np.searchsorted(parents, prefixes // codebook_size), minlength=len(parents))
        levels.append(Level(
            cur=float((usage_V > 0).mean()), dead_codes=int((usage_V == 0).sum()), entropy_bits=float(entropy_L[level]),
            perplexity=float(2 ** entropy_L[level]), largest_code=int(usage_V.argmax()), largest_share=float(usage_V.max() / usage_V.sum()),
            error_left=float(error_L[level]) if error_L is not None else None, prefixes=len(prefixes),
            children=(int(children.min()), float(np.median(children)), float(children.mean()), int(children.max())),
            children_sizes={name: count for name, (count, _) in _size_histogram(children).items()},
            usage=tuple(np.sort(usage_V)[::-1].tolist()),
        ))
        parents = prefixes
    return tuple(levels)


def _choose_groups(groups: Groups, shown_N: np.ndarray | None, config: ReportConfig) -> dict[str, np.ndarray]:
    """Numbers of groups of two items and more, none twice: the largest, those shown most, and some of the others at random."""
    sizes_G = np.diff(groups.offsets_G1)
    left = np.flatnonzero(sizes_G > 1)
    left = left[np.argsort(-sizes_G[left], kind="stable")]
    largest, left = left[:config.num_groups], left[config.num_groups:]
    few, most_shown = config.num_groups // 2, left[:0]
    if shown_N is not None:
        times_G = np.add.reduceat(shown_N[groups.items_N], groups.offsets_G1[:-1])
        order = np.argsort(-times_G[left], kind="stable")
        most_shown, left = left[order[:few]], np.sort(left[order[few:]])
    return {"largest": largest, "most_shown": most_shown, "random": np.random.default_rng(0).permutation(left)[:few]}


def _show_group(group: int, groups: Groups, bundle: SemanticIds, items: pa.Table, ads_N: np.ndarray, embeddings_ND: np.ndarray | None,
                residuals: Residuals | None, shown_N: np.ndarray | None, num_examples: int) -> CollisionGroup:
    members = groups.items_N[groups.offsets_G1[group]:groups.offsets_G1[group + 1]]
    embedded = members[members < (len(embeddings_ND) if embeddings_ND is not None else 0)]
    similarity = None
    if len(embedded) > 1:
        similarity = pairwise_similarity(embeddings_ND, Groups(np.zeros(1, np.int64), np.array([0, len(embedded)]), embedded))
    chosen = members[:num_examples]
    if shown_N is not None:
        chosen = members[np.argsort(-shown_N[members], kind="stable")[:num_examples]]
    rows = rows_of(items, chosen)
    return CollisionGroup(
        semantic_id=tuple(bundle.codes_NL[members[0]].tolist()), num_items=len(members), num_ads=int(ads_N[members].sum()),
        distinct_embeddings=len(np.unique(residuals.hash_N[embedded])) if len(embedded) else None, similarity=similarity,
        shown=int(shown_N[members].sum()) if shown_N is not None else None,
        examples=tuple(Example(index=int(item), item_id=row["item_id"], ad=bool(ads_N[item]), text=row["text"] or "",
                               shown=int(shown_N[item]) if shown_N is not None else None)
                       for item, row in zip(chosen, rows, strict=True)),
    )


def find_alarms(sets: list[ItemSet], codebook_size: int, config: ReportConfig) -> list[Alarm]:
    """What is beyond a threshold, the codebooks' troubles first. Args: sets: all items first."""
    alarms = []
    for number, level in enumerate(sets[0].levels, 1):
        if level.cur < config.min_cur:
            alarms.append(Alarm(
                f"Level {number} uses {level.cur:.1%} of its codes: {level.dead_codes:,} of {codebook_size:,} are dead (alarm below "
                f"{config.min_cur:.0%})",
                "The codebook has collapsed: lower tokenizer.codebook_size, fit on more items, or fit with another method or seed."))
        if level.perplexity < config.min_perplexity_frac * codebook_size:
            alarms.append(Alarm(
                f"Level {number} is used as if it had {level.perplexity:.1f} codes of {codebook_size:,}: perplexity "
                f"{level.perplexity / codebook_size:.1%} (alarm below {config.min_perplexity_frac:.0%})",
                "A few codes hold most items: remove duplicates, look at the embeddings' scale, or lower tokenizer.codebook_size."))
        if level.largest_share > config.max_code_share:
            alarms.append(Alarm(
                f"Code {level.largest_code} of level {number} holds {level.largest_share:.1%} of the items (alarm above "
                f"{config.max_code_share:.0%})",
                "So many items look alike to the tokenizer: check for missing, constant or default embeddings and texts."))
    for number, (before, level) in enumerate(pairwise([None, *sets[0].levels]), 1):
        started = 1.0 if before is None else before.error_left
        if level.error_left is not None and started > 0 and level.error_left > started * (1 - config.min_error_drop):
            alarms.append(Alarm(
                f"Level {number} lowers the reconstruction error only from {started:.4f} to {level.error_left:.4f} (alarm below "
                f"{config.min_error_drop:.0%} of it)",
                "The level says next to nothing about an item: lower tokenizer.num_levels, or look for a failed fit."))
    if max(each.collision for each in sets) > config.max_collision:
        found = ", ".join(f"{each.collision:.1%} of {each.name}" for each in sets)
        alarms.append(Alarm(f"Collision is {found} (alarm above {config.max_collision:.0%})", _collision_cure(sets, config)))
    if max(each.largest_group for each in sets) > config.max_group:
        found = ", ".join(f"{each.largest_group:,} {each.name.removeprefix('all ')}" for each in sets)
        alarms.append(Alarm(
            f"The largest group on one semantic ID has {found} (alarm above {config.max_group:,})",
            "The model cannot tell them apart, only the ranking at the leaf can: see the largest groups; default texts are a usual cause."))
    return alarms


def _collision_cure(sets: list[ItemSet], config: ReportConfig) -> str:
    floors = [(each.name, each.duplicate_frac) for each in sets if each.duplicate_frac is not None]
    stated = " and ".join(f"{floor:.1%} of {name}" for name, floor in floors)
    if any(floor > config.max_collision / 2 for _, floor in floors):
        return f"Identical embeddings alone make {stated} collide, whatever the codebook: give embeddings that tell items apart."
    because = f"; identical embeddings make only {stated} collide" if stated else ""
    return f"Raise tokenizer.codebook_size or tokenizer.num_levels{because}."
