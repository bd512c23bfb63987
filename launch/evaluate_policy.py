"""What a policy's candidates are worth (GPR Table 3), and what it earns when it serves the market; the cascade and the log beside it.

    python launch/evaluate_policy.py checkpoint=runs/market-hepo                                # simulator, and truth where there is one
    python launch/evaluate_policy.py checkpoint=runs/market-hepo 'policies=[policy, cascade, production]'

Every policy proposes G candidates per held-out request. They are valued by the simulator that was learned from the logs and, in the
synthetic market, by its truth: as they are ordered by the policy, and after an auction that the simulator's final_value decides.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field
from tqdm import tqdm

from data_pipeline.synthetic import Truth
from data_pipeline.users import open_users
from gpr_dist.config import Config, build_config, parse_cli, public
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.loader import LoaderConfig, OnePass, iter_once
from gpr_dist.data.sampler import World
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.errors import DataError, run_cli
from gpr_dist.evaluation.baselines import Ranking
from gpr_dist.evaluation.compare import open_requests
from gpr_dist.evaluation.evaluate import GenerativeRanker
from gpr_dist.evaluation.intervals import BootstrapConfig
from gpr_dist.evaluation.measures import UserSums, item_ranks, user_groups
from gpr_dist.evaluation.policy_value import Ranked, add_candidate_values, as_lists, format_policies, reorder, with_intervals
from gpr_dist.evaluation.rankings import Requests, collect
from gpr_dist.evaluation.trained import check_knowledge, load_model
from gpr_dist.evaluation.validate import ValidationConfig, open_catalogue
from gpr_dist.job import DataConfig, open_past, prepare_history, split_shards
from gpr_dist.rl.cascade import Retriever, cascade_rank
from gpr_dist.rl.simulator import Rewards, Simulator
from gpr_dist.schema import Batch, write_atomic
from gpr_dist.tokenizer.semantic_ids import SemanticIds
from gpr_dist.training import checkpoint

# R requests  K ranked items  N candidates, by request

CASCADE, PRODUCTION = "cascade", "production"


class EvaluatePolicyConfig(Config):
    """Which policies are valued, on what."""

    checkpoint: Path = Path("runs/hepo")
    """run folder (its newest intact checkpoint) or one step folder; also says which data and tokenizer"""
    best: bool = False
    """of a run folder: the checkpoint that validated best"""
    policies: tuple[Literal["policy", "cascade", "production"], ...] = ("policy",)
    """policy = the checkpoint, cascade = retrieval and ranking with the simulator's rankers, production = what the log shows"""
    split: Literal["validation", "test"] = "test"
    """held-out requests"""
    simulator: Path | None = None
    """folder of launch/fit_simulator.py; none = <data.folder>/simulator"""
    market: Path | None = None
    """raw folder of a synthetic market with its truth; none = <data.folder>/raw, where there is one"""
    num_candidates: int = Field(40, ge=2)
    """candidates G per request"""
    num_retrieved: int = Field(200, ge=2)
    """ads that reach the cascade's rankers"""
    max_rows: int | None = 400
    """journeys used, from the front of the split; none = all"""
    beam_width: int = Field(128, ge=1)
    """prefixes kept per level"""
    micro_batch_tokens: int = 16384
    """journey tokens encoded at once"""
    seed: int = 1
    """of the market's responses"""
    bootstrap: BootstrapConfig = BootstrapConfig(replicates=500)
    """intervals over users"""
    out: Path | None = None
    """JSON report; none = <run>/policy-<split>.json"""


def main() -> None:
    config, args = parse_cli(EvaluatePolicyConfig, __doc__)
    folder = checkpoint.find_checkpoint(config.checkpoint, config.best)
    state = checkpoint.read_state(folder)
    data = build_config(DataConfig, state["config"]["data"], str(folder))
    semantic_ids = SemanticIds.load(data.tokenizer or data.folder / "tokenizer")
    semantic_ids.check_codebooks(state["fingerprints"]["tokenizer"], str(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    simulator = Simulator.load(config.simulator or data.folder / "simulator", device, semantic_ids)
    market = config.market or data.folder / "raw"
    truth = Truth.load(market) if config.market or (market / "truth").exists() else None
    out = config.out or folder.parent / f"policy-{config.split}.json"
    if args.dry_run:
        print(f"would value {', '.join(config.policies)} on the {config.split} split of {data.folder}, "
              f"{'with' if truth else 'without'} the market's truth, report in {out}")
        return

    model = load_model(folder, state["config"]["model"]).to(device)
    shards = split_shards(data)
    requests = open_requests(shards, config.split, semantic_ids.num_items, ValidationConfig(), False, config.max_rows)
    catalogue = open_catalogue(semantic_ids, Eligibility.load(data.folder), requests.popularity_I, device)
    prepare_history(model.config, data)
    batches = iter_once(shards[config.split], LoaderConfig(micro_batch_tokens=config.micro_batch_tokens), World(0, 1),
                        semantic_ids.codes_NL, model.config.num_mtp_heads, config.max_rows,
                        knowledge=check_knowledge(data.knowledge, state, folder),
                        past=open_past(model.config, data, semantic_ids, catalogue.eligibility))
    if "policy" in config.policies:
        ranker = GenerativeRanker(ModelDecoder(model, device), catalogue.trie, catalogue.eligibility, catalogue.item_weight,
                                  config.num_candidates, max(config.beam_width, config.num_candidates), data.softmax)
        collect(ranker, batches, requests, config.num_candidates, "policy")
    if CASCADE in config.policies:
        retriever = Retriever.load(config.simulator or data.folder / "simulator")
        collect(open_cascade(simulator, retriever, catalogue.eligibility, config), batches, requests, config.num_candidates, CASCADE)
    served = open_market(truth, requests, data.folder) if truth else None
    results = {name: value_policy(ranking, requests, batches, simulator, served, config) for name, ranking in requests.rankings.items()}
    if served and PRODUCTION in config.policies:
        results[PRODUCTION] = served.production(requests, config)
    report(results, folder, data, requests, served is not None, config, out)


def open_cascade(simulator: Simulator, retriever: Retriever, eligibility: Eligibility, config: EvaluatePolicyConfig):
    """The cascade as a ranker; its scores are places, since it has no probabilities."""

    def rank(batch: Batch, seen=None) -> tuple[torch.Tensor, torch.Tensor]:
        item_RK = cascade_rank(batch, simulator, retriever, eligibility, config.num_candidates, config.num_retrieved)
        return item_RK, torch.where(item_RK >= 0, -torch.arange(item_RK.shape[1]).float(), -torch.inf)

    return rank


class Market:
    """The truth about the evaluated requests."""

    def __init__(self, truth: Truth, logged: Any, row_R: np.ndarray, item_ids: np.ndarray) -> None:
        """Args: logged: the market's requests of the period. row_R: the one of each evaluated request."""
        self.truth, self.item_ids = truth, item_ids
        self.requests = logged.take(row_R)
        self.share = len(np.unique(row_R)) / len(logged)

    def outcomes(self, ranked: Ranked) -> Any:
        """True expected outcomes of every candidate."""
        users, slots = self.requests.user_id.take(pa.array(ranked.request_N)), self.requests.slot[ranked.request_N]
        return self.truth.outcomes(users, self.requests.time[ranked.request_N], self.item_ids[ranked.item_N], slots)

    def serve(self, sums: UserSums, prefix: str, ranked: Ranked, config: EvaluatePolicyConfig, budgets: bool = True) -> dict[str, float]:
        """Serve the requests; adds {prefix}revenue and {prefix}value per 1000 requests. Without budgets the order alone decides what is
        shown; with them, a policy that likes the same advertisers more spends them earlier in the day and gains less."""
        lists_RK = as_lists(ranked, len(self.requests))
        ids_RK = np.where(lists_RK >= 0, self.item_ids[np.maximum(lists_RK, 0)], "")
        return self._counts(sums, prefix, self.truth.serve(self.requests, ids_RK, config.seed, self.share if budgets else np.inf))

    def production(self, requests: Requests, config: EvaluatePolicyConfig) -> dict[str, Any]:
        """What the log's own policy earned."""
        sums = UserSums(*user_groups(requests.log))
        totals = self._counts(sums, "served_", self.truth.serve_logged(self.requests, seed=config.seed))
        return {"metrics": with_intervals(sums.result(), config.bootstrap), "totals": totals}

    def _counts(self, sums: UserSums, prefix: str, served: Any) -> dict[str, float]:
        every = np.arange(len(self.requests))
        sums.add(f"{prefix}revenue", every, 1000 * served.expected_revenue_B)
        sums.add(f"{prefix}value", every, 1000 * served.expected_value_B)
        names = ("num_requests", "num_filled", "num_ineligible", "num_exhausted", "revenue", "clicks", "conversions", "expected_revenue",
                 "expected_clicks", "expected_conversions", "expected_value")
        return {f"{prefix}total_{name}": float(getattr(served, name)) for name in names}


def open_market(truth: Truth, requests: Requests, data: Path) -> Market:
    """Find the evaluated requests among the market's: a user has one request at a time. Raises: DataError for another market."""
    log = requests.log
    logged = truth.requests(int(log.request_time_R.min()), int(log.request_time_R.max()) + 1)
    user_R = pa.array(log.user_ids[log.request_user_R], pa.string())
    stored = open_users(data).stored(logged.user_id)
    users = pc.unique(pa.concat_arrays([stored, user_R]))
    keys = [pc.index_in(user, users).to_numpy().astype(np.int64) * (1 << 40) + time
            for user, time in ((stored, logged.time), (user_R, log.request_time_R))]
    order = np.argsort(keys[0], kind="stable")
    place = order[np.minimum(np.searchsorted(keys[0][order], keys[1]), len(order) - 1)]
    if not np.array_equal(keys[0][place], keys[1]):
        lost = int(np.flatnonzero(keys[0][place] != keys[1])[0])
        raise DataError(f"{truth.folder} has no request of user {user_R[lost].as_py()} at {int(log.request_time_R[lost])}; "
                        f"{data} was not built from its logs: build it again")
    table = pa.ipc.open_file(pa.memory_map(str(data / "catalogue" / "catalogue.arrow"))).read_all()
    return Market(truth, logged, place, table["item_id"].to_numpy())


def value_policy(ranking: Ranking, requests: Requests, batches: OnePass, simulator: Simulator, market: Market | None,
                 config: EvaluatePolicyConfig) -> dict[str, Any]:
    """Every metric of one policy: by the simulator, by the truth (true_...), serving in its own order within budgets (served_...) and
    without them (unlimited_...), and within budgets after an auction among its candidates (auction_...)."""
    log, ranked = requests.log, Ranked.of(ranking)
    sums = UserSums(*user_groups(log))
    sums.add("hitr@10", log.target_request_N, (item_ranks(log, ranking) <= 10).astype(float))
    rewards = simulate(ranked, batches, simulator)
    add_candidate_values(sums, "", ranked, rewards.final_value_N.double().numpy())
    totals: dict[str, float] = {}
    if market:
        true = market.outcomes(ranked)
        value_N = simulator.final_value(*(torch.from_numpy(x) for x in (true.ecpm, true.ctr, true.cvr))).numpy()
        add_candidate_values(sums, "true_", ranked, value_N)
        first = np.flatnonzero(np.diff(ranked.request_N, prepend=-1))
        sums.add("true_ecpm_first", ranked.request_N[first], true.ecpm[first])
        totals = market.serve(sums, "served_", ranked, config)
        totals |= market.serve(sums, "unlimited_", ranked, config, budgets=False)
        totals |= market.serve(sums, "auction_", reorder(ranked, rewards.final_value_N.double().numpy()), config)
    return {"metrics": with_intervals(sums.result(), config.bootstrap), "totals": totals}


@torch.no_grad()
def simulate(ranked: Ranked, batches: OnePass, simulator: Simulator) -> Rewards:
    """The simulator's rewards of every candidate, on the CPU."""
    found, first, device = [], 0, simulator.bid_M.device
    for batch in tqdm(batches, desc="value", unit="batch", mininterval=0.5):
        end = first + len(batch.request_eligibility_R)
        part = slice(*np.searchsorted(ranked.request_N, [first, end]))
        request_N, item_N = (torch.from_numpy(x[part]).to(device) for x in (ranked.request_N - first, ranked.item_N))
        found.append([x.cpu() for x in simulator.rewards(batch.to(device), request_N, item_N)])
        first = end
    return Rewards(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def report(results: dict[str, Any], folder: Path, data: DataConfig, requests: Requests, has_truth: bool, config: EvaluatePolicyConfig,
           out: Path) -> None:
    """Print the tables, write JSON."""
    log = requests.log
    write_atomic(out, json.dumps({"checkpoint": str(folder), "data": str(data.folder), "split": config.split,
                                  "num_requests": log.num_requests, "policies": results, "settings": public(config)},
                                 indent=1).encode())
    metrics = {name: each["metrics"] for name, each in results.items()}
    level = config.bootstrap.level
    print(f"\n{config.split} split of {data.folder}: {log.num_requests:,} requests, {config.num_candidates} candidates each\n")
    print(format_policies(metrics, ("hitr@10", "ndcg", "opr", "average", "maximum", "first"), level))
    if has_truth:
        print("\nby the market's truth; revenue and value per 1000 requests")
        print(format_policies(metrics, ("true_ndcg", "true_opr", "true_average", "true_maximum", "true_first", "true_ecpm_first",
                                        "unlimited_revenue", "unlimited_value", "served_revenue", "served_value", "auction_revenue"),
                              level))
        for name, each in results.items():
            drawn = {what: each["totals"][f"served_total_{what}"] for what in ("revenue", "clicks", "conversions", "num_requests")}
            print(f"{name}: revenue {drawn['revenue']:,.0f}, clicks {drawn['clicks']:,.0f}, conversions {drawn['conversions']:,.0f} in "
                  f"{drawn['num_requests']:,.0f} requests")
    print(f"\nreport: {out}", flush=True)


if __name__ == "__main__":
    run_cli(main)
