"""Does an old tokenizer still fit today's items? Today's items against the items it was fitted on, like with like.

Collision, CUR, perplexity and the usage of codes depend on how many items there are, so today's items are compared with random samples
of as many training items, whose spread says what chance alone does. Errors and distances need the training embeddings, or else the
moments and quantiles that were stored with the tokenizer at its fit. How the report is shown is drift_page.py's.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pydantic import Field
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.errors import TokenizerError
from gpr_dist.html import Alarm
from gpr_dist.tokenizer.metrics import code_usage, entropy_bits, group_items, pack, pairwise_similarity
from gpr_dist.tokenizer.report import rows_of
from gpr_dist.tokenizer.residuals import QUANTILES, Residuals, check_codes, measure_residuals
from gpr_dist.tokenizer.semantic_ids import SemanticIds

# N training items  n today's items  m items of a sample  S samples  L levels  V codes per level  G semantic IDs of the training items

_PAS_ITEMS = 100_000  # per sample, see pairwise_similarity


class DriftConfig(Config):
    """When a drift report raises an alarm: a value is beyond its limit, and chance does not explain it."""

    max_z: float = Field(4.0, gt=0)
    """standard deviations of equally large random samples of training items that chance is allowed"""
    max_collision_rise: float = Field(0.05, ge=0)
    """collision above that of the samples"""
    max_error_rise: float = Field(0.15, ge=0)
    """reconstruction error of a level above that of the training items, as a share of it"""
    max_cur_drop: float = Field(0.2, ge=0, le=1)
    """codes used by today's items below the samples', as a share of theirs"""
    max_perplexity_drop: float = Field(0.25, ge=0, le=1)
    """perplexity of a level below the samples', as a share of theirs"""
    max_usage_shift: float = Field(0.25, ge=0, le=1)
    """share of today's items whose code would have to change for the level to be used as before, beyond the samples'"""
    max_pas_drop: float = Field(0.02, ge=0)
    """PAS below that of the training items"""
    max_far_frac: float = Field(0.05, ge=0, le=1)
    """share of today's items that are farther from their code than 99 % of the training items are"""
    max_on_old_rise: float = Field(0.1, ge=0)
    """share of today's items on the semantic ID of a training item, above the share of sampled training items on that of another"""
    num_samples: int = Field(20, ge=5)
    """random samples of training items"""
    max_sample: int = Field(1_000_000, ge=1)
    """most items of a sample; with more of today's items, samples are drawn from them too"""
    num_examples: int = Field(20, ge=0)
    """items listed that are farthest from their codes, and codes listed whose share grew most"""
    seed: int = 0
    """of the samples"""


class Measure(Config):
    """One number of today's items beside the training items'."""

    name: str
    level: int | None
    """1-based; none = of the whole semantic ID"""
    new: float | None
    """of today's items; none = not defined, e.g. PAS without a collision"""
    training: float | None
    """of the training items: the mean over the samples, or the value of all of them"""
    spread: float | None
    """standard deviation of the value by chance, for as many training items; none = not known"""
    z: float | None
    """(new - training) / spread; none without a spread"""
    limit: float | None
    """what `new` must not pass; none = for information"""
    alarm: bool
    """beyond the limit, and |z| above max_z where z is known"""


class CodeShare(Config):
    """A code of level 1 that gained."""

    code: int
    new: float
    """share of today's items"""
    training: float


class FarItem(Config):
    """An item badly served by the codebooks."""

    row: int
    """in the file of today's embeddings"""
    item_id: str
    text: str
    distance: float
    """to its code of the last level"""


class DriftReport(Config):
    """`drift.json`."""

    alarms: tuple[Alarm, ...]
    fingerprint: str
    codebook_fingerprint: str
    num_new: int
    num_training: int
    sample_size: int
    """items of each random sample"""
    source: str
    """where errors, distances and PAS of the training items are from: embeddings (measured now) | stored (at the fit)"""
    measures: tuple[Measure, ...]
    quantiles: tuple[float, ...] = QUANTILES
    new_distance: tuple[tuple[float, ...], ...]
    """per level, these quantiles of the distances to the nearest code"""
    training_distance: tuple[tuple[float, ...], ...]
    usage: tuple[tuple[float, float], ...]
    """codes of level 1, those most frequent in training first: shares of the training items and of today's"""
    gained: tuple[CodeShare, ...]
    farthest: tuple[FarItem, ...]
    thresholds: DriftConfig


@dataclass(frozen=True)
class _Training:
    """What is known of the training items' embeddings."""

    source: str
    variance: float
    error_L: np.ndarray
    error_std_L: np.ndarray
    distance_LQ: np.ndarray
    pas: float | None
    pas_spread: float | None


def measure_drift(bundle: SemanticIds, embeddings_nD: np.ndarray, config: DriftConfig, training_embeddings_ND: np.ndarray | None = None,
                  items: pa.Table | None = None) -> DriftReport:
    """Compare today's items with the training items.

    Args:
        embeddings_nD: of today's items, made like those of the fit; a memory map of any length.
        training_embeddings_ND: of the items of the fit; none = use what was stored with the bundle.
        items: columns item_id and text, a row per embedding, for the list of badly served items.
    Raises: TokenizerError for no items, embeddings of another dimension, not finite or (training) not the bundle's, and a bundle that
        was not measured at its fit.
    """
    if bundle.report is None:
        raise TokenizerError(f"tokenizer {bundle.folder} was not measured at its fit; fit it again with launch/fit_tokenizer.py")
    if not len(embeddings_nD):
        raise TokenizerError("there are no items to compare with the training items; give at least one embedding")
    num_training = bundle.report.num_items
    codes_nL, training_NL = bundle.quantizer.encode(embeddings_nD), bundle.codes_NL[:num_training]
    sample_size = max(1, min(len(codes_nL), num_training // 2, config.max_sample))
    samples = list(_draw(num_training, len(codes_nL), sample_size, config))
    training = _know_training(bundle, training_NL, training_embeddings_ND, samples)
    residuals = measure_residuals(embeddings_nD, codes_nL, bundle.quantizer, variance=training.variance)
    usage_2V = np.stack([code_usage(codes[:, :1], bundle.codebook_size)[0] / len(codes) for codes in (training_NL, codes_nL)])
    measures = [*_compare_codes(codes_nL, training_NL, bundle.codebook_size, samples, config)]
    far_L = (residuals.sampled_distance_nL > training.distance_LQ[:, -1]).mean(0)
    num_seen = len(residuals.sampled_distance_nL)
    for level in range(bundle.num_levels):
        error = training.error_L[level]
        measures.append(_judge("error left", level + 1, residuals.error_L[level], error, training.error_std_L[level] / len(codes_nL) ** 0.5,
                               error * (1 + config.max_error_rise), config))
    for level in range(bundle.num_levels):
        measures.append(_judge("far from its code", level + 1, far_L[level], 1 - QUANTILES[-1],
                               (QUANTILES[-1] * (1 - QUANTILES[-1]) / num_seen) ** 0.5, config.max_far_frac, config))
    pas = pairwise_similarity(embeddings_nD, group_items(codes_nL, bundle.codebook_size))
    measures.append(_judge("PAS", None, pas, training.pas, training.pas_spread,
                           None if training.pas is None else training.pas - config.max_pas_drop, config))
    order = np.argsort(-usage_2V[0], kind="stable")
    gain = np.argsort(usage_2V[0] - usage_2V[1], kind="stable")[:config.num_examples]
    return DriftReport(
        alarms=tuple(_alarms(measures)),
        fingerprint=bundle.fingerprint, codebook_fingerprint=bundle.codebook_fingerprint, num_new=len(codes_nL), num_training=num_training,
        sample_size=sample_size, source=training.source, measures=tuple(measures),
        new_distance=_tuples(residuals.distance_LQ), training_distance=_tuples(training.distance_LQ),
        usage=_tuples(usage_2V.T[order]),
        gained=tuple(CodeShare(code=int(code), training=float(usage_2V[0, code]), new=float(usage_2V[1, code])) for code in gain
                     if usage_2V[1, code] > usage_2V[0, code]),
        farthest=_farthest(residuals, items, config.num_examples), thresholds=config,
    )


def _draw(num_training: int, num_new: int, size: int, config: DriftConfig) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Rows of each sample of the training items, and of today's items where these are too many to be compared whole."""
    random = np.random.default_rng(config.seed)
    return [(random.choice(num_training, size, replace=False, shuffle=False),
             random.choice(num_new, size, replace=False, shuffle=False) if size < num_new else None) for _ in range(config.num_samples)]


def _know_training(bundle: SemanticIds, training_NL: np.ndarray, embeddings_ND: np.ndarray | None,
                   samples: list[tuple[np.ndarray, np.ndarray | None]]) -> _Training:
    if embeddings_ND is None:
        report = bundle.report
        return _Training("stored", report.variance, np.array(report.reconstruction_error), np.array(report.error_std),
                         np.array(report.distance_quantiles), report.pas, None)
    if len(embeddings_ND) != len(training_NL):
        raise TokenizerError(f"there are {len(embeddings_ND):,} training embeddings, tokenizer {bundle.folder} was fitted on "
                             f"{len(training_NL):,} items; give those, or none to compare with what was stored at the fit")
    check_codes(embeddings_ND, training_NL, bundle.quantizer, "the training embeddings")
    residuals = measure_residuals(embeddings_ND, training_NL, bundle.quantizer)
    of_samples = []
    for rows, _ in tqdm(samples, desc="PAS of samples", unit="sample", mininterval=0.5):
        groups = group_items(training_NL[rows], bundle.codebook_size)
        of_samples.append(pairwise_similarity(embeddings_ND, groups._replace(items_N=rows[groups.items_N]), _PAS_ITEMS))
    defined = [pas for pas in of_samples if pas is not None]
    return _Training("embeddings", residuals.variance, residuals.error_L, residuals.error_std_L, residuals.distance_LQ,
                     pairwise_similarity(embeddings_ND, group_items(training_NL, bundle.codebook_size)),
                     float(np.std(defined, ddof=1)) if len(defined) > 1 else None)


def _compare_codes(codes_nL: np.ndarray, training_NL: np.ndarray, codebook_size: int, samples: list[tuple[np.ndarray, np.ndarray | None]],
                   config: DriftConfig) -> list[Measure]:
    """What depends on codes only. Sample and today's items are each compared with the training items outside the sample."""
    groups = group_items(training_NL, codebook_size)
    counts_G = np.diff(groups.offsets_G1)
    group_N = np.empty(len(training_NL), np.int64)
    group_N[groups.items_N] = np.repeat(np.arange(len(counts_G)), counts_G)
    keys_n = pack(codes_nL, codebook_size)
    group_n = np.searchsorted(groups.keys_G, keys_n).clip(max=len(groups.keys_G) - 1)
    group_n[groups.keys_G[group_n] != keys_n] = len(counts_G)  # one more group: of no training item
    usage_LV = code_usage(training_NL, codebook_size)
    new, training = [], []
    for rows, new_rows in tqdm(samples, desc="samples of training items", unit="sample", mininterval=0.5):
        rest_G = np.r_[counts_G - np.bincount(group_N[rows], minlength=len(counts_G)), 0]
        rest_LV = usage_LV - code_usage(training_NL[rows], codebook_size)
        chosen = slice(None) if new_rows is None else new_rows
        training.append(_describe(training_NL[rows], rest_G[group_N[rows]] > 0, rest_LV))
        new.append(_describe(codes_nL[chosen], rest_G[group_n[chosen]] > 0, rest_LV))
    names, new_SM, training_SM = list(new[0]), np.array([list(x.values()) for x in new]), np.array([list(x.values()) for x in training])
    limits = {"collision": lambda x: x + config.max_collision_rise, "on an old semantic ID": lambda x: x + config.max_on_old_rise,
              "CUR": lambda x: x * (1 - config.max_cur_drop), "perplexity": lambda x: x * (1 - config.max_perplexity_drop),
              "usage shift": lambda x: x + config.max_usage_shift}
    return [_judge(name, level, new_SM[:, column].mean(), training_SM[:, column].mean(), training_SM[:, column].std(ddof=1),
                   limits[name](training_SM[:, column].mean()), config) for column, (name, level) in enumerate(names)]


def _describe(codes_mL: np.ndarray, on_old_m: np.ndarray, rest_LV: np.ndarray) -> dict[tuple[str, int | None], float]:
    """Args: on_old_m: whether the item's semantic ID is that of a training item outside the sample. rest_LV: code usage of those."""
    codebook_size = rest_LV.shape[1]
    usage_LV = code_usage(codes_mL, codebook_size)
    shift_L = np.abs(usage_LV / len(codes_mL) - rest_LV / rest_LV[0].sum()).sum(1) / 2
    out = {("collision", None): 1 - len(np.unique(pack(codes_mL, codebook_size))) / len(codes_mL),
           ("on an old semantic ID", None): float(on_old_m.mean())}
    for name, values_L in (("CUR", (usage_LV > 0).mean(1)), ("perplexity", 2 ** entropy_bits(usage_LV)), ("usage shift", shift_L)):
        out |= {(name, level): float(value) for level, value in enumerate(values_L, 1)}
    return out


_SHARES = {"collision", "on an old semantic ID", "CUR", "usage shift", "far from its code"}
_FALLING_IS_BAD = {"CUR", "perplexity", "PAS"}


def _judge(name: str, level: int | None, new: float | None, training: float | None, spread: float | None, limit: float | None,
           config: DriftConfig) -> Measure:
    z = alarm = None
    if new is not None and training is not None:
        z = float((new - training) / spread) if spread else None
        beyond = new < limit if name in _FALLING_IS_BAD else new > limit
        alarm = bool(beyond and (z is None or abs(z) > config.max_z))
    numbers = {key: None if value is None else float(value) for key, value in
               {"new": new, "training": training, "spread": spread, "limit": limit}.items()}
    return Measure(name=name, level=level, z=z, alarm=bool(alarm), **numbers)


_ACTIONS = {
    "collision": "The model cannot tell more of the new items apart: refit, with a larger tokenizer.codebook_size if the catalogue grew.",
    "on an old semantic ID": "New items are squeezed onto old ones: check their embeddings or refit. (Training items among them count.)",
    "CUR": "New items use few of the codes: check that their embeddings are made like the old ones'; else refit.",
    "perplexity": "New items crowd on few codes: check for missing or default texts and embeddings; else refit.",
    "usage shift": "New items are of other kinds than the training items: the model knows their codes less; plan a refit.",
    "error left": "The codebooks describe the new items badly: check that their embeddings are made like the old ones'; else refit.",
    "far from its code": "Many new items are far from every code: check that their embeddings are made like the old ones'; else refit.",
    "PAS": "Items that now share a semantic ID are less alike than before: refit.",
}


def show(measure: Measure, value: float | None) -> str:
    """A value of a measure as text."""
    if value is None:
        return "-"
    return f"{value:.2%}" if measure.name in _SHARES else f"{value:,.1f}" if measure.name == "perplexity" else f"{value:.4f}"


def _alarms(measures: list[Measure]) -> list[Alarm]:
    """One alarm per name, over all its levels."""
    alarms = []
    for name, action in _ACTIONS.items():
        raised = [measure for measure in measures if measure.alarm and measure.name == name]
        if raised:
            found = ", ".join(f"{f'level {m.level} ' if m.level else ''}{show(m, m.new)} (training {show(m, m.training)}, "
                              f"limit {show(m, m.limit)})" for m in raised)
            alarms.append(Alarm(f"{name[0].upper()}{name[1:]}: {found}", action))
    return alarms


def _farthest(residuals: Residuals, items: pa.Table | None, count: int) -> tuple[FarItem, ...]:
    distance_n = residuals.sampled_distance_nL[:, -1]
    places = np.argsort(-distance_n, kind="stable")[:count]
    rows = places * residuals.stride
    known = rows_of(items, rows) if items is not None else [{}] * len(rows)
    return tuple(FarItem(row=row, item_id=item.get("item_id", ""), text=item.get("text") or "", distance=distance)
                 for row, distance, item in zip(rows.tolist(), distance_n[places].tolist(), known, strict=True))


def _tuples(values: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, values.tolist()))
