"""The simulator that HEPO trains against: learned pCTR and pCVR, bids, eCPM and final_value of any (request, ad) (GPR section 4.3, Eq. 5).

Owns rewards and the simulator's folder. It is learned from logs alone (fitting.py) and knows nothing of a market's truth. Which ads are
eligible is the shards' business: callers ask for eligible ads only.
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from gpr_dist.config import Config, build_config
from gpr_dist.errors import ConfigError, DataError, TokenizerError
from gpr_dist.rl.bids import PER_MILLE
from gpr_dist.rl.calibration import Curve
from gpr_dist.rl.examples import LabelConfig, log_doubt, log_sampling_rate
from gpr_dist.rl.rankers import RankerConfig, Rankers
from gpr_dist.safety import inside, load_tensors
from gpr_dist.schema import Batch, file_checksum, write_atomic
from gpr_dist.tokenizer.semantic_ids import SemanticIds

# R requests  N (request, ad) pairs  M catalogue items  L levels  G eligibility groups

SIMULATOR_VERSION = 1
FILE = "simulator.json"
REFIT = "fit it again with launch/fit_simulator.py"


class FinalValueConfig(Config):
    """final_value = eCPM combined with a weighted mean of targets (Eq. 5), every part in units of its mean over the logged ads."""

    combine: Literal["sum", "prod"] = "sum"
    """sum: eCPM + target_weight x targets. prod: eCPM x targets"""
    target_weight: float = Field(0.2, ge=0)
    """sum: weight of the mean of the targets beside eCPM, dimensionless"""
    click_alpha: float = Field(1.0, ge=0)
    """weight of pCTR in the mean of the targets"""
    conversion_alpha: float = Field(1.0, ge=0)
    """weight of pCTR x pCVR in it"""


class FinalValue(Config):
    """The formula with the means that make its parts comparable; also for true values, beside the simulator's."""

    config: FinalValueConfig
    mean_ecpm: float
    """of the logged ads of held-out rows, currency per 1000 impressions"""
    mean_click: float
    """mean pCTR of those"""
    mean_conversion: float
    """mean pCTR x pCVR of those; 0 = conversions are not known, and left out"""

    def __call__(self, ecpm_N: Tensor, pctr_N: Tensor, pcvr_N: Tensor) -> Tensor:
        """Dimensionless; 1 (prod) or 1 + target_weight (sum) is the average logged ad's."""
        c = self.config
        conversion_alpha = c.conversion_alpha if self.mean_conversion > 0 else 0.0
        alphas = c.click_alpha + conversion_alpha
        target_N = c.click_alpha * pctr_N / self.mean_click
        if conversion_alpha:
            target_N = target_N + conversion_alpha * pctr_N * pcvr_N / self.mean_conversion
        target_N = target_N / alphas if alphas else torch.ones_like(target_N)
        value_N = ecpm_N / self.mean_ecpm
        return value_N + c.target_weight * target_N if c.combine == "sum" else value_N * target_N


class Rewards(NamedTuple):
    """What showing an ad at a request is worth, float32 [N] each."""

    pctr_N: Tensor
    pcvr_N: Tensor  # given a click; 0 where the logs know no conversions
    ecpm_N: Tensor  # 1000 pCTR bid, currency
    final_value_N: Tensor


class SimulatorFacts(Config):
    """`simulator.json`, written last."""

    version: int = SIMULATOR_VERSION
    rankers: RankerConfig
    labels: LabelConfig
    num_levels: int
    codebook_size: int
    num_user_features: int
    num_env_features: int
    tokenizer: str
    """fingerprint of the semantic IDs"""
    catalogue: str
    """fingerprint of the catalogue"""
    shards: str
    """fingerprint of the shards it was fitted on"""
    click_curve: Curve
    conversion_curve: Curve | None
    """None = conversions are not known"""
    final_value: FinalValue
    bids: str
    """where they come from, in words"""
    files: dict[str, str] = Field(default_factory=dict)
    """checksums"""


class Simulator:
    """Rewards of (request, ad) pairs. Deterministic; one request's rewards depend on nothing but its own row and the ad."""

    def __init__(self, facts: SimulatorFacts, rankers: Rankers, codes_ML: Tensor, bid_M: Tensor, group_size_G1: Tensor) -> None:
        """Args: codes_ML: any integer type. bid_M: value of a click. group_size_G1: eligible ads of each group, last: of EVERY_AD."""
        self.facts, self.rankers = facts, rankers.eval().requires_grad_(False)
        self.codes_ML, self.bid_M, self.group_size_G1 = codes_ML, bid_M, group_size_G1

    @property
    def num_items(self) -> int:
        return len(self.bid_M)

    @property
    def final_value(self) -> FinalValue:
        return self.facts.final_value

    @torch.no_grad()
    def rewards(self, batch: Batch, request_N: Tensor, item_N: Tensor, remaining_budget_N: Tensor | None = None) -> Rewards:
        """Expected value of showing each ad at its request.

        Args:
            batch: on the simulator's device; tokens after a request's site, targets and look-ahead are not read.
            request_N: int64 requests of the batch, in any order and number. item_N: int64 catalogue indices of ads.
            remaining_budget_N: what each ad's advertiser can still spend, currency: an impression is worth at most that; none = no limit.
        Raises: DataError for an item outside the catalogue or shards of another one.
        """
        if len(item_N) and not 0 <= int(item_N.min()) <= int(item_N.max()) < self.num_items:
            raise DataError(f"items {int(item_N.min())}..{int(item_N.max())} are asked for, the simulator knows 0..{self.num_items - 1}; "
                            f"{REFIT} on this catalogue")
        pctr_N, pcvr_N = self.predict(batch, request_N, item_N)
        worth_N = pctr_N * self.bid_M[item_N]
        final_value_N = self.final_value(PER_MILLE * worth_N, pctr_N, pcvr_N)
        if remaining_budget_N is not None:
            share_N = torch.where(worth_N > remaining_budget_N, remaining_budget_N.clamp_min(0) / worth_N, 1.0)
            worth_N, final_value_N = worth_N * share_N, final_value_N * share_N
        return Rewards(pctr_N, pcvr_N, PER_MILLE * worth_N, final_value_N)

    @torch.no_grad()
    def predict(self, batch: Batch, request_N: Tensor, item_N: Tensor) -> tuple[Tensor, Tensor]:
        """Calibrated (pCTR, pCVR given a click), float32 [N] each."""
        raw_N2 = raw_logits(self.rankers, self.facts.labels, self.group_size_G1, batch, request_N, item_N, self.codes_ML[item_N].long())
        return self.calibrated(raw_N2)

    def calibrated(self, raw_N2: Tensor) -> tuple[Tensor, Tensor]:
        """(pCTR, pCVR) of `raw_logits`."""
        pctr_N = self.facts.click_curve(raw_N2[:, 0]).sigmoid()
        if self.facts.conversion_curve is None:
            return pctr_N, torch.zeros_like(pctr_N)
        return pctr_N, self.facts.conversion_curve(raw_N2[:, 1]).sigmoid()

    def check(self, semantic_ids: SemanticIds, where: str = "the simulator") -> None:
        """Refuse another tokenizer or catalogue. Raises: TokenizerError naming both fingerprints."""
        for what, mine, theirs in (("catalogue", self.facts.catalogue, semantic_ids.catalogue_fingerprint),
                                   ("tokenizer", self.facts.tokenizer, semantic_ids.fingerprint)):
            if mine != theirs:
                raise TokenizerError(f"{where} was fitted with {what} {mine}, but {semantic_ids.folder or 'this job'} has {what} {theirs}; "
                                     f"{REFIT}")

    def to(self, device: torch.device | str) -> "Simulator":
        """On another device; the network moves in place."""
        return Simulator(self.facts, self.rankers.to(device), *(x.to(device) for x in (self.codes_ML, self.bid_M, self.group_size_G1)))

    def save(self, folder: str | Path) -> None:
        """Write the folder; `simulator.json` last, so that an interrupted save leaves the old simulator or none."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tables = {"codes_ML": self.codes_ML.to(torch.int32), "bid_M": self.bid_M, "group_size_G1": self.group_size_G1}
        (folder / FILE).unlink(missing_ok=True)
        for name, tensors in (("rankers.safetensors", self.rankers.state_dict()), ("items.safetensors", tables)):
            write_atomic(folder / name, save({key: value.cpu().contiguous() for key, value in tensors.items()}))
        files = {name: file_checksum(folder / name) for name in ("rankers.safetensors", "items.safetensors")}
        write_atomic(folder / FILE, self.facts.model_copy(update={"files": files}).model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu", semantic_ids: SemanticIds | None = None) -> "Simulator":
        """Args: semantic_ids: those of the job, refused when the simulator has others.

        Raises: DataError when there is no simulator or it is damaged; TokenizerError for another tokenizer or catalogue.
        """
        folder = Path(folder)
        facts = _read_facts(folder)
        for name, expected in facts.files.items():
            if not (folder / name).is_file() or file_checksum(folder / name) != expected:
                raise DataError(f"{folder / name} is missing or damaged; {REFIT}")
        rankers = Rankers(facts.rankers, facts.num_levels, facts.codebook_size, facts.num_user_features, facts.num_env_features)
        rankers.load_state_dict(load_tensors(folder / "rankers.safetensors", DataError))
        simulator = cls(facts, rankers, **load_tensors(folder / "items.safetensors", DataError))
        if semantic_ids is not None:
            simulator.check(semantic_ids, str(folder))
        return simulator.to(device)


def raw_logits(rankers: Rankers, labels: LabelConfig, group_size_G1: Tensor, batch: Batch, request_N: Tensor, item_N: Tensor,
               codes_NL: Tensor) -> Tensor:
    """Logits of click and conversion before calibration [N, 2]; doubt about ads that are not shown and the sampling of negatives included.

    Raises: DataError for data with other features or eligibility groups.
    """
    found = batch.user_features_UF.shape[1], batch.env_features_EF.shape[1]
    wanted = rankers.num_user_features, rankers.num_env_features
    if found != wanted and all(len(x) for x in (batch.user_features_UF, batch.env_features_EF)):
        raise DataError(f"the batch has {found[0]} user and {found[1]} environment features, the simulator was fitted with {wanted[0]} and "
                        f"{wanted[1]}; {REFIT} on these shards")
    click_N, convert_N, shown_N = rankers(batch, request_N, item_N, codes_NL).T
    if labels.kind == "actions":
        return torch.stack([click_N + log_doubt(labels, shown_N), convert_N], 1)
    group_R = batch.request_eligibility_R
    if len(group_R) and int(group_R.max()) >= len(group_size_G1) - 1:
        raise DataError(f"eligibility group {int(group_R.max())} is asked for, the simulator knows {len(group_size_G1) - 1} groups; "
                        f"{REFIT}")
    shift_R = log_sampling_rate(labels, group_size_G1[group_R])
    return torch.stack([click_N + shift_R[request_N], convert_N], 1)


def _read_facts(folder: Path) -> SimulatorFacts:
    path = folder / FILE
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        version = values["version"]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: no simulator there, or its fitting was interrupted; run launch/fit_simulator.py") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); {REFIT}") from None
    if version != SIMULATOR_VERSION:
        raise DataError(f"{path}: version {version}, this code reads {SIMULATOR_VERSION}; {REFIT}")
    try:
        facts = build_config(SimulatorFacts, values, str(path))
    except ConfigError as error:
        raise DataError(f"{error}; {REFIT}") from None
    for name in facts.files:
        inside(folder, name, path, DataError)
    return facts
