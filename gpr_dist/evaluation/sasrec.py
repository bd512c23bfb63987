"""SASRec (Kang & McAuley 2018, arXiv 1808.09781) as a baseline: a small causal transformer over item ids, trained on the training split.

Trained to give the ads of a request from what came strictly before it, with a softmax over all items or over sampled ones (log-q
corrected), because the paper's binary loss is a weaker baseline (Klenitskiy & Vasilev 2023, arXiv 2309.07602). The epoch is the one with
the best NDCG@10 on validation. Small on purpose: it must train within minutes on 2 cores; it is kept in a file and trained once.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.errors import DataError
from gpr_dist.evaluation.baselines import ScoreRequests, rank_requests
from gpr_dist.evaluation.journey_log import SPLITS, JourneyLog, ranges
from gpr_dist.evaluation.metrics import ranking_metrics, ranking_sums
from gpr_dist.evaluation.rankings import Requests
from gpr_dist.schema import write_atomic

# b windows of a batch  t events of the longest  d width  I catalogue items  n targets of a batch  S sampled items  R requests  E eligible

_ENCODED_TOKENS = 1 << 16  # of a forward without gradients


class SASRecConfig(Config):
    """Network and training. Width, dropout and learning rate are usual values, not tuned; the epoch is chosen on validation."""

    width: int = 64
    """of embeddings and blocks"""
    num_blocks: int = 2
    """attention and feed-forward"""
    num_heads: int = 2
    """of attention"""
    max_events: int = Field(64, ge=2)
    """events of the history that are seen, the last ones"""
    dropout: float = 0.4
    """of embeddings and blocks"""
    lr: float = 3e-3
    """of Adam, falling to a tenth along a cosine"""
    batch_events: int = 2048
    """events of a training batch, padding included"""
    epochs: int = Field(20, ge=1)
    """at most"""
    patience: int = Field(2, ge=1)
    """epochs without a better validation NDCG@10 after which training stops"""
    full_softmax_items: int = 4_000
    """larger catalogues are trained with sampled items"""
    num_sampled: int = 1024
    """items sampled for a batch, by popularity"""
    validation_requests: int = 2000
    """validation requests by which the epoch is chosen, the first ones"""
    seed: int = 0
    """of weights, order, dropout and samples"""


class SASRec(nn.Module):
    """Item ids in, one state per event out; an item's logit is the product with its embedding plus its bias."""

    def __init__(self, num_items: int, config: SASRecConfig, count_I: np.ndarray) -> None:
        super().__init__()
        self.config, d = config, config.width
        self.items = nn.Embedding(num_items + 1, d, padding_idx=num_items)
        self.positions = nn.Parameter(torch.randn(config.max_events, d) * 0.02)
        nn.init.normal_(self.items.weight, std=0.02)
        self.bias = nn.Parameter(torch.from_numpy(np.log(count_I + 0.1) - math.log(count_I.sum() + 0.1 * num_items)).float())
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(d)

    def forward(self, item_bt: Tensor) -> Tensor:
        """[b, t] item indices, num_items = padding at the end -> states [b, t, d]."""
        x = self.items(item_bt) * math.sqrt(self.config.width) + self.positions[: item_bt.shape[1]]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Block(nn.Module):
    """Pre-norm causal attention, then a feed-forward part."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        d = config.width
        self.config, self.norm_1, self.norm_2 = config, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.feed_forward = nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(b, t, 3, self.config.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + F.dropout(self.out(attended), self.config.dropout, self.training)
        return x + F.dropout(self.feed_forward(self.norm_2(x)), self.config.dropout, self.training)


def sasrec_scorer(model: SASRec, log: JourneyLog) -> ScoreRequests:
    """Softmax over the eligible items from the last events strictly before each request; from nothing, by the biases."""
    state_Rd = encode_requests(model, log)
    table, bias = model.items.weight.detach(), model.bias.detach()

    def score(rows: np.ndarray, items_E: np.ndarray, _: np.ndarray) -> np.ndarray:
        items = torch.from_numpy(items_E.astype(np.int64))
        logits = torch.addmm(bias[items], state_Rd[torch.from_numpy(rows)], table[items].T)
        return logits.double().softmax(dim=1).numpy()

    return score


@torch.no_grad()
def encode_requests(model: SASRec, log: JourneyLog) -> Tensor:
    """State before each request, [R, d]; 0 where there is no history."""
    model.eval()
    first_R, end_R = log.histories
    start_R = np.maximum(first_R, end_R - model.config.max_events)
    state_Rd = torch.zeros(log.num_requests, model.config.width)
    order = np.argsort(end_R - start_R, kind="stable")
    order = order[end_R[order] > start_R[order]]
    rows = max(1, _ENCODED_TOKENS // model.config.max_events)
    for begin in range(0, len(order), rows):
        chosen = order[begin : begin + rows]
        item_bt = _windows(log.item_X, start_R[chosen], end_R[chosen], model.items.padding_idx)
        last = torch.from_numpy(end_R[chosen] - start_R[chosen] - 1)
        state_Rd[torch.from_numpy(chosen)] = model(item_bt)[torch.arange(len(chosen)), last]
    return state_Rd


def load_or_train(folder: Path, data: str, validation: Requests, eligibility: Eligibility, num_items: int, config: SASRecConfig,
                  progress: bool = True) -> SASRec:
    """The trained baseline, from `<folder>/sasrec-<key>.safetensors` if it is there, else trained and written.

    Args: data: identifies training and validation data and protocol; with the settings it makes the key.
    Raises: DataError for a damaged file.
    """
    key = hashlib.sha256(json.dumps([data, config.model_dump(mode="json"), num_items]).encode()).hexdigest()[:12]
    path = folder / f"sasrec-{key}.safetensors"
    if not path.exists():
        model, ndcg_by_epoch = train(validation, eligibility, num_items, config, progress)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(model.state_dict(), metadata={"validation_ndcg@10": json.dumps(ndcg_by_epoch)}))
    model = SASRec(num_items, config, np.zeros(num_items))
    try:
        with safe_open(path, "pt") as file:
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, RuntimeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it, it will be trained again") from None
    return model.eval()


def train(validation: Requests, eligibility: Eligibility, num_items: int, config: SASRecConfig,
          progress: bool = True) -> tuple[SASRec, list[float]]:
    """Train on the training split of the validation log; the weights of the best epoch and the NDCG@10 of all.

    Raises: DataError when no ad of the training split has an event before it.
    """
    log = validation.log
    site_n, target_n = _sites(log)
    if not len(site_n):
        raise DataError("SASRec has nothing to learn: no ad of the training split comes after another event of its user; leave it out of "
                        "baselines")
    random = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    count_I = np.bincount(target_n, minlength=num_items).astype(np.float64)
    model = SASRec(num_items, config, count_I)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.9, 0.98))
    batches_per_epoch = sum(1 for _ in _batches(log, site_n, target_n, config, np.random.default_rng(0), num_items))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 + 0.45 * (
        1 + math.cos(math.pi * min(1.0, step / (config.epochs * batches_per_epoch)))))
    draw = _sampler(count_I, num_items, config, random)
    best, ndcg_by_epoch = {}, []
    with tqdm(total=config.epochs * batches_per_epoch, desc="SASRec", unit="step", mininterval=0.5, disable=not progress) as bar:
        for _ in range(config.epochs):
            model.train()
            for item_bt, row_n, place_n, target in _batches(log, site_n, target_n, config, random, num_items):
                loss = _loss(model, model(item_bt)[row_n, place_n], target, draw())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            ndcg_by_epoch.append(_validation_ndcg(model, validation, eligibility, config.validation_requests))
            bar.set_postfix({"validation NDCG@10": f"{ndcg_by_epoch[-1]:.4f}"})
            best_epoch = int(np.argmax(ndcg_by_epoch))
            if best_epoch == len(ndcg_by_epoch) - 1:
                best = {name: value.clone() for name, value in model.state_dict().items()}
            elif len(ndcg_by_epoch) - 1 - best_epoch >= config.patience:
                break
    model.load_state_dict(best)
    return model.eval(), ndcg_by_epoch


def _loss(model: SASRec, state_nd: Tensor, target_n: Tensor, sampled: tuple[Tensor, Tensor] | None) -> Tensor:
    """Cross-entropy over all items, or over the target and sampled ones (items [S], log expected count of every item [I]).

    Only the sampled ones are corrected for how often they are drawn: the target is always there, so that exp(its logit) + the corrected
    others is an unbiased estimate of the sum over all items.
    """
    table, bias = model.items.weight, model.bias
    if sampled is None:
        return F.cross_entropy(torch.addmm(bias, state_nd, table[:-1].T), target_n)
    items_S, log_count_I = sampled
    wrong_nS = torch.addmm(bias[items_S] - log_count_I[items_S], state_nd, table[items_S].T)
    wrong_nS = wrong_nS.masked_fill(items_S == target_n[:, None], -torch.inf)
    right_n = (state_nd * table[target_n]).sum(1) + bias[target_n]
    return (torch.logaddexp(right_n, wrong_nS.logsumexp(1)) - right_n).mean()


def _sampler(count_I: np.ndarray, num_items: int, config: SASRecConfig, random: np.random.Generator):
    """A function that draws the items a batch is trained against; None means all."""
    if num_items <= config.full_softmax_items:
        return lambda: None
    mass = np.cumsum(count_I + 0.1)
    log_count_I = torch.from_numpy(np.log((count_I + 0.1) / mass[-1] * config.num_sampled)).float()
    return lambda: (torch.from_numpy(np.searchsorted(mass, random.random(config.num_sampled) * mass[-1])), log_count_I)


def _sites(log: JourneyLog) -> tuple[np.ndarray, np.ndarray]:
    """Of every ad of the training split with an event of its user strictly before it: the last such event (into X), and the ad's item."""
    ad_X = np.flatnonzero(log.is_ad_X & (log.split_X == SPLITS.index("train")))
    moment_X, _ = log.moments
    site = np.searchsorted(moment_X, moment_X[ad_X]) - 1
    known = site >= np.searchsorted(log.user_X, log.user_X[ad_X])
    order = np.argsort(site[known], kind="stable")
    return site[known][order], log.item_X[ad_X][known][order].astype(np.int64)


def _batches(log: JourneyLog, site_n: np.ndarray, target_n: np.ndarray, config: SASRecConfig, random: np.random.Generator,
             padding: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """An epoch: (items [b, t], row and place of every site, its target). Long histories are cut at random places."""
    event = np.flatnonzero(log.split_X == SPLITS.index("train"))
    user, item, site_n = log.user_X[event], log.item_X[event], np.searchsorted(event, site_n)  # from here on counted in training events
    users, first, count = np.unique(user, return_index=True, return_counts=True)
    shift = np.where(count > config.max_events, random.integers(0, config.max_events, len(users)), 0)
    user = np.repeat(np.arange(len(users)), count)
    window = (np.arange(len(event)) - first[user] + shift[user]) // config.max_events
    starts = np.flatnonzero(np.r_[True, (user[1:] != user[:-1]) | (window[1:] != window[:-1])])
    begin, end = starts, np.append(starts[1:], len(event))
    first_site, last_site = np.searchsorted(site_n, begin), np.searchsorted(site_n, end)
    useful = np.flatnonzero(last_site > first_site)
    useful = useful[np.lexsort((random.random(len(useful)), end[useful] - begin[useful]))]
    length = (end - begin)[useful]
    parts, at = [], 0
    while at < len(useful):  # shortest first, so that a batch's padding is small
        size = max(1, int(np.searchsorted(length[at:] * np.arange(1, len(length) - at + 1), config.batch_events, side="right")))
        parts.append(useful[at : at + size])
        at += size
    for number in random.permutation(len(parts)).tolist():
        chosen = parts[number]
        row, site = ranges(first_site[chosen], last_site[chosen])
        yield (_windows(item, begin[chosen], end[chosen], padding), torch.from_numpy(row),
               torch.from_numpy(site_n[site] - begin[chosen][row]), torch.from_numpy(target_n[site]))


def _windows(item_X: np.ndarray, begin: np.ndarray, end: np.ndarray, padding: int) -> Tensor:
    """Events begin:end of each row, padded at the end, int64 [b, t]."""
    place = begin[:, None] + np.arange(int((end - begin).max()))
    items = item_X[np.minimum(place, len(item_X) - 1)].astype(np.int64)
    return torch.from_numpy(np.where(place < end[:, None], items, padding))


def _validation_ndcg(model: SASRec, validation: Requests, eligibility: Eligibility, max_requests: int) -> float:
    log = validation.log.head(max_requests)
    ranked = rank_requests(log, eligibility, validation.popularity_I, sasrec_scorer(model, log), 10,
                           None if validation.seen is None else validation.seen.of(0, log.num_requests))
    targets = torch.from_numpy(log.target_request_N), torch.from_numpy(log.target_item_N)
    sums = ranking_sums(torch.from_numpy(ranked.item_RK), *targets, (10,))
    return ranking_metrics(sums)["ndcg@10"]
