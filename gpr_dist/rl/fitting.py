"""Fits the simulator to journey shards: one pass over training rows, calibration on held-out rows, a report beside a popularity baseline.

Rankers are learned from the train split; the validation split's rows are halved by their number, one half calibrates, the other and the
test split measure. One process: a simulator needs far fewer examples than the policy (`max_steps` bounds them), whatever the log's size.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy.special import expit, logit
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from gpr_dist.config import Config, public
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.loader import LoaderConfig, build_loader, iter_once
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.errors import DataError
from gpr_dist.rl.bids import PER_MILLE, BidConfig, ValueSums, check_column, find_bids
from gpr_dist.rl.calibration import CalibrationConfig, calibrate, measure
from gpr_dist.rl.examples import Examples, LabelConfig, Labeller, group_sizes
from gpr_dist.rl.rankers import RankerConfig, Rankers
from gpr_dist.rl.simulator import FinalValue, FinalValueConfig, Simulator, SimulatorFacts, raw_logits
from gpr_dist.schema import Batch, ShardManifest
from gpr_dist.tokenizer.semantic_ids import SemanticIds

# N examples  M catalogue items

log = logging.getLogger(__name__)
WORLD = World(0, 1)
ENOUGH_TO_TELL = 200_000  # examples of one class only after which the log is given up


class TrainingConfig(Config):
    """How the rankers are trained."""

    epochs: int = Field(3, ge=1)
    """passes over the rows"""
    max_steps: int = Field(2000, ge=1)
    """most updates; a larger log is read in part (rows come shuffled)"""
    rows_per_step: int = Field(16, ge=1)
    """journeys of one update"""
    lr: float = Field(5e-3, gt=0)
    """Adam's learning rate at the start; falls to 0 along a cosine"""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's, decoupled"""
    held_out_rows: int = Field(20_000, ge=2)
    """most rows of the validation and of the test split"""


class SimulatorConfig(Config):
    """Everything a simulator depends on beside the data."""

    labels: LabelConfig = LabelConfig()
    """what is predicted"""
    rankers: RankerConfig = RankerConfig()
    """network"""
    training: TrainingConfig = TrainingConfig()
    """steps"""
    calibration: CalibrationConfig = CalibrationConfig()
    """logits to probabilities"""
    bids: BidConfig = BidConfig()
    """value of a click"""
    final_value: FinalValueConfig = FinalValueConfig()
    """reward"""
    seed: int = 0
    """of weights, order of rows and negatives"""


class HeldOut(NamedTuple):
    """Examples of a held-out split with the rankers' logits; numpy arrays [N]."""

    row: np.ndarray  # int64, row in the split
    item: np.ndarray
    raw: np.ndarray  # float64 [N, 2], before calibration
    click: np.ndarray
    convert: np.ndarray  # NaN = unknown
    weight: np.ndarray
    logged: np.ndarray  # bool, the log shows this ad at this request (false: a drawn negative)


@dataclass
class ClickCounts:
    """Clicks and examples of every item in the training stream: the popularity-CTR baseline."""

    clicks_M: np.ndarray
    shown_M: np.ndarray

    def add(self, item_N: Tensor, click_N: Tensor, weight_N: Tensor) -> None:
        size = len(self.shown_M)
        self.clicks_M += np.bincount(item_N.numpy(), (click_N * weight_N).numpy(), size)
        self.shown_M += np.bincount(item_N.numpy(), weight_N.numpy(), size)

    def logit(self, item_N: np.ndarray) -> np.ndarray:
        """Of each item's CTR with one click, at the mean rate, added."""
        rate = self.clicks_M.sum() / self.shown_M.sum()
        return logit((self.clicks_M[item_N] + 1) / (self.shown_M[item_N] + 1 / rate))


def fit_simulator(data: Path, shards: dict[str, str], semantic_ids: SemanticIds, config: SimulatorConfig,
                  device: torch.device | str = "cpu") -> tuple[Simulator, dict[str, Any]]:
    """Learn a simulator. Returns: (simulator, report as plain values).

    Args: data: folder with catalogue/ and eligibility.arrow. shards: folder or URI of the train, validation and test split.
    Raises: DataError for logs that cannot teach it: no ads, one class only, no values; TokenizerError for another catalogue.
    """
    manifest = check_inputs(data, shards, semantic_ids, config)
    torch.manual_seed(config.seed)
    sizes = config.rankers.model_copy(update={"item_buckets": min(config.rankers.item_buckets, max(semantic_ids.num_items, 1))})
    rankers = Rankers(sizes, semantic_ids.num_levels, semantic_ids.codebook_size, len(manifest.user_features),
                      len(manifest.env_features)).to(device)
    rankers.set_content(semantic_ids.quantizer.codebooks_LVK.detach())
    eligibility = Eligibility.load(data)
    sums, counts = ValueSums(semantic_ids.num_items), ClickCounts(np.zeros(semantic_ids.num_items), np.zeros(semantic_ids.num_items))
    labeller = Labeller(config.labels, eligibility, manifest.last_timestamp, config.seed)
    seen = _train(rankers, shards["train"], semantic_ids, labeller, config, sums, counts, device)
    bids = find_bids(data / "catalogue" / "catalogue.arrow", sums, config.bids)

    group_size_G1 = group_sizes(eligibility)
    validation, test = (_predict(rankers, shards[split], semantic_ids, eligibility, config, group_size_G1, device)
                        for split in ("validation", "test"))
    fitting = validation.row % 2 == 0
    half, other = HeldOut(*(x[fitting] for x in validation)), HeldOut(*(x[~fitting] for x in validation))
    _check_classes(int(half.click.sum()), len(half.click), "clicked", "held-out ad")
    click = calibrate(half.raw[:, 0], half.click, half.weight, config.calibration)
    baseline = calibrate(counts.logit(half.item), half.click, half.weight, config.calibration)
    conversion = None
    if config.labels.conversions:
        known = np.isfinite(half.convert)
        _check_classes(int(half.convert[known].sum()), int(known.sum()), "converted", "held-out click")
        conversion = calibrate(half.raw[known, 1], half.convert[known], half.weight[known], config.calibration)
    facts = SimulatorFacts(
        rankers=sizes, labels=config.labels, num_levels=semantic_ids.num_levels, codebook_size=semantic_ids.codebook_size,
        num_user_features=len(manifest.user_features), num_env_features=len(manifest.env_features), tokenizer=semantic_ids.fingerprint,
        catalogue=semantic_ids.catalogue_fingerprint, shards=manifest.fingerprint, click_curve=click.curve,
        conversion_curve=conversion.curve if conversion else None, bids=bids.origin,
        final_value=FinalValue(config=config.final_value, mean_ecpm=1.0, mean_click=1.0, mean_conversion=0.0))
    codes_ML = torch.from_numpy(np.array(semantic_ids.codes_NL))
    simulator = Simulator(facts, rankers, codes_ML, torch.from_numpy(bids.bid_M), group_size_G1).to("cpu")
    simulator.facts = facts.model_copy(update={"final_value": _value_means(simulator, half, config.final_value)})
    warnings = [f"{name}: {each.warning}" for name, each in (("pCTR", click), ("pCVR", conversion)) if each and each.warning]
    for warning in warnings:
        log.warning("%s", warning)
    report = {"data": str(data), "shards": manifest.fingerprint, "tokenizer": semantic_ids.fingerprint, **seen, "warnings": warnings,
              "bids": bids.origin, "mean_bid": float(bids.bid_M.mean()), "final_value": simulator.final_value.model_dump(mode="json"),
              "settings": public(config), "results": {}}
    for name, held_out in (("validation (other half)", other), ("test", test)):
        report["results"][name] = _measure_all(simulator, held_out, baseline.curve(torch.from_numpy(counts.logit(held_out.item))).numpy())
    return simulator.to(device), report


def check_inputs(data: Path, shards: dict[str, str], semantic_ids: SemanticIds, config: SimulatorConfig) -> ShardManifest:
    """What can be refused before anything is read. Returns: manifest of the train split."""
    manifests = {split: ShardReader(shards[split]).manifest for split in ("train", "validation", "test")}
    for split, manifest in manifests.items():
        semantic_ids.check_catalogue(manifest.catalogue_fingerprint, shards[split])
        if split != "test" and not manifest.num_targets:
            raise DataError(f"{shards[split]} has no ads; a simulator is learned from the ads of train and calibrated on those of "
                            "validation")
    check_column(data / "catalogue" / "catalogue.arrow", config.bids)
    return manifests["train"]


def _train(rankers: Rankers, shards: str, semantic_ids: SemanticIds, labeller: Labeller, config: SimulatorConfig, sums: ValueSums,
           counts: ClickCounts, device: torch.device | str) -> dict[str, int]:
    """Update the rankers in place, and sum up values and clicks on the way. Returns: how many examples, clicks, ... were seen."""
    settings = config.training
    loader = build_loader(shards, LoaderConfig(seed=config.seed, global_batch_size=settings.rows_per_step), WORLD, semantic_ids.codes_NL, 1)
    num_steps = min(loader.steps_per_epoch * settings.epochs, settings.max_steps)
    optimizer = torch.optim.AdamW(rankers.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    seen = dict.fromkeys(("examples", "clicks", "clicks of known outcome", "conversions"), 0)
    with tqdm(total=num_steps, desc="rankers", unit="step", mininterval=0.5) as bar:
        for number, step in enumerate(loader, 1):
            for batch in step.micro_batches:
                examples = labeller(batch)
                if step.epoch == 0:
                    sums.add(batch)
                    counts.add(examples.item_N, examples.click_N, examples.weight_N)
                known_N = examples.convert_N.isfinite()
                found = (examples.weight_N > 0).sum(), examples.click_N.sum(), known_N.sum(), examples.convert_N.nansum()
                seen = {name: total + int(more) for (name, total), more in zip(seen.items(), found, strict=True)}
                if len(batch.target_item_N):
                    loss = _loss(rankers, batch, examples, semantic_ids.codes_NL, config.labels, device)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            schedule.step()
            bar.update()
            if number == num_steps or seen["examples"] > ENOUGH_TO_TELL:
                _check_classes(seen["clicks"], seen["examples"], "clicked", "ad")
            if number == num_steps:
                break
    if config.labels.conversions:
        _check_classes(seen["conversions"], seen["clicks of known outcome"], "converted", "click")
    return seen


def _loss(rankers: Rankers, batch: Batch, examples: Examples, codes_ML: np.ndarray, labels: LabelConfig,
          device: torch.device | str) -> Tensor:
    """Cross-entropy of clicks, of conversions among clicks and, weighted, of being shown; nats per example of the click task."""
    codes_NL = torch.from_numpy(codes_ML[examples.item_N.numpy()].astype(np.int64)).to(device)
    request_N, item_N, click_N, convert_N, weight_N, logged_N = (x.to(device) for x in examples)
    logits_N3 = rankers(batch.to(device), request_N, item_N, codes_NL)
    of_click_N, of_convert_N = weight_N > 0, convert_N.isfinite()
    loss = _cross_entropy(logits_N3[:, 0], click_N, of_click_N) + _cross_entropy(logits_N3[:, 1], convert_N.nan_to_num(0.0), of_convert_N)
    if labels.kind == "actions":
        loss = loss + labels.shown_weight * _cross_entropy(logits_N3[:, 2], logged_N.float(), torch.ones_like(logged_N))
    return loss / of_click_N.sum()


def _cross_entropy(logit_N: Tensor, label_N: Tensor, counted_N: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logit_N, label_N, counted_N.float(), reduction="sum")


@torch.no_grad()
def _predict(rankers: Rankers, shards: str, semantic_ids: SemanticIds, eligibility: Eligibility, config: SimulatorConfig,
             group_size_G1: Tensor, device: torch.device | str) -> HeldOut:
    """Examples and logits of one split's first rows."""
    batches = iter_once(shards, LoaderConfig(), WORLD, semantic_ids.codes_NL, 1, config.training.held_out_rows)
    labeller = Labeller(config.labels, eligibility, batches.reader.manifest.last_timestamp, config.seed, training=False)
    parts = []
    for batch in tqdm(batches, desc=batches.reader.manifest.split, unit="batch", mininterval=0.5):
        examples = labeller(batch)
        request_N, item_N = examples.request_N.to(device), examples.item_N.to(device)
        codes_NL = torch.from_numpy(semantic_ids.codes_NL[examples.item_N.numpy()].astype(np.int64)).to(device)
        raw_N2 = raw_logits(rankers, config.labels, group_size_G1.to(device), batch.to(device), request_N, item_N, codes_NL)
        row_N = batch.row_ids_B[batch.request_row_R[examples.request_N]]
        labels = (x.double() for x in (examples.click_N, examples.convert_N, examples.weight_N))
        parts.append(HeldOut(*(x.numpy() for x in (row_N, examples.item_N, raw_N2.double().cpu(), *labels, examples.logged_N))))
    nothing = HeldOut(*(np.zeros((0, 2) if name == "raw" else 0, np.int64 if name in ("row", "item") else np.float64)
                        for name in HeldOut._fields))
    return HeldOut(*(np.concatenate(columns) for columns in zip(*parts, strict=True))) if parts else nothing


def _value_means(simulator: Simulator, held_out: HeldOut, config: FinalValueConfig) -> FinalValue:
    """Means of eCPM, pCTR and pCTR x pCVR of the logged ads. Raises: DataError when no ad is worth anything."""
    pctr_N, pcvr_N = simulator.calibrated(torch.from_numpy(held_out.raw[held_out.logged]).float())
    ecpm_N = PER_MILLE * pctr_N * simulator.bid_M[torch.from_numpy(held_out.item[held_out.logged])]
    if not ecpm_N.sum() > 0:
        raise DataError(f"every logged ad has a bid of 0 ({simulator.facts.bids}); choose another column by bids.column")
    return FinalValue(config=config, mean_ecpm=float(ecpm_N.mean()), mean_click=float(pctr_N.mean()),
                      mean_conversion=float((pctr_N * pcvr_N).mean()))


def _measure_all(simulator: Simulator, held_out: HeldOut, baseline_logit_N: np.ndarray) -> dict[str, Any]:
    """Measures of pCTR, of the popularity baseline, and of pCVR among clicks."""
    pctr_N, pcvr_N = (x.double().numpy() for x in simulator.calibrated(torch.from_numpy(held_out.raw).float()))
    known = np.isfinite(held_out.convert)
    return {"pCTR": measure(pctr_N, held_out.click, held_out.weight),
            "popularity CTR": measure(expit(baseline_logit_N), held_out.click, held_out.weight),
            "pCVR": measure(pcvr_N[known], held_out.convert[known], held_out.weight[known]) if simulator.facts.conversion_curve else {}}


def format_report(report: dict[str, Any]) -> str:
    """A table of the measures, the deciles of pCTR, and what was found."""
    lines = [f"{'':46}{'AUC':>8}{'log loss':>10}{'skill':>8}{'calibration':>13}{'positives':>11}{'examples':>11}"]
    for split, rankers in report["results"].items():
        for name, found in rankers.items():
            label = f"{split}, {name}"
            lines.append(f"{label:46}{found['auc']:8.4f}{found['log_loss']:10.5f}{found['skill']:8.4f}{found['calibration']:13.3f}"
                         f"{found['positives']:11,}{found['examples']:11,}" if found else f"{label:46}   not measured: one class or none")
    for split, rankers in report["results"].items():
        deciles = rankers["pCTR"].get("deciles", [])
        lines.append(f"deciles of pCTR, {split}: " + "  ".join(f"{predicted:.4f}/{found:.4f}" for predicted, found, _ in deciles))
    lines += [f"bids: {report['bids']}; mean {report['mean_bid']:.4g}", *(f"warning: {warning}" for warning in report["warnings"])]
    return "\n".join(lines)


def _check_classes(positives: int, examples: int, happened: str, what: str) -> None:
    """Raises: DataError when nothing or everything happened."""
    if 0 < positives < examples:
        return
    if happened == "clicked":
        advice = "logs without unclicked ads need labels.kind=sampled_negatives"
    else:
        advice = "set labels.conversions=false, or check that the logs' actions tell conversions"
    raise DataError(f"{positives:,} of {examples:,} {what}s were {happened}: nothing to tell them apart by; {advice}")
