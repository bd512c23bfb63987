"""`bench.py recommend`: requests per second and latency of a bundle, from JSON lines to answers, by batch size and catalogue size.

A bundle is made up in memory (random weights, half of the items ads, their popularity Zipf's) unless `bundle=` gives one; so are the
requests unless `requests=` does. What is timed is what launch/recommend.py does with every chunk: parse, build prompts, encode, search,
rank, values, text. Latency is that of a call of so many requests; requests/s are those of all its calls.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from recommend import format_answer
from tqdm import tqdm

from gpr_dist.bundle import BundleManifest
from gpr_dist.config import Config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.decoding.search import SearchConfig
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import DataError
from gpr_dist.hashing import hash_strings
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.serving.recommender import Recommender
from gpr_dist.serving.settings import BundleSettings, Ranker, RequestSettings

NOW = 1_512_120_000


class RecommendBenchConfig(Config):
    """What is measured."""

    bundle: Path | None = None
    """a bundle of launch/export.py; none = one is made up for each of `items`"""
    requests: Path | None = None
    """JSON lines to ask the bundle; none = made up"""
    items: tuple[int, ...] = Field((10_000, 1_000_000), min_length=1)
    """catalogue sizes"""
    batches: tuple[int, ...] = Field((1, 16, 256), min_length=1)
    """requests of a call"""
    rankers: tuple[Ranker, ...] = ("generative",)
    """who ranks; item head and mix need a model with one: model.items.buckets"""
    beam: int = Field(128, ge=1)
    """prefixes kept"""
    k: int = Field(10, ge=1)
    """ads of an answer"""
    history: int = Field(200, ge=0)
    """events of a request's history"""
    model: GPRConfig = GPRConfig(width=96, hsd={"num_layers": 2, "ffn_multiple": 2}, ptd={"num_layers": 1, "ffn_multiple": 2},
                                 pointer={"width": 32}, num_user_features=4, num_env_features=4)
    """as the quickstart's, unless a bundle is given"""
    max_tokens: int = Field(512, ge=8)
    """tokens of a journey that the model reads"""
    micro_batch_requests: int = Field(64, ge=1)
    """requests decoded at once"""
    device: Literal["cpu", "cuda"] = "cpu"
    """of the model"""
    threads: int = Field(1, ge=1)
    """CPU threads"""
    seconds: float = Field(3.0, gt=0)
    """of `clock`, of calls, per case and round; at least three calls"""
    rounds: int = Field(2, ge=1)
    """through all cases"""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu = seconds of processor time: for crowded machines, with threads=1"""
    seed: int = 0
    """of catalogue, weights and requests"""
    out: Path | None = None
    """JSON file for the results"""


def run_bench(config: RecommendBenchConfig) -> list[dict[str, Any]]:
    """Measure, print a table."""
    torch.set_num_threads(config.threads)
    print(f"{config.threads} threads on {config.device}, {config.clock} time, beam {config.beam}, {config.k} ads an answer, load average "
          f"{os.getloadavg()[0]:.1f}")
    print(f"{'items':>10} {'ranker':>10} {'batch':>5} {'requests/s':>10} {'p50 ms':>9} {'p99 ms':>9} {'calls':>6}")
    results = []
    for num_items in config.items if config.bundle is None else (None,):
        recommender = made_up(num_items, config) if config.bundle is None else Recommender.load(config.bundle, config.device)
        recommender.micro_batch_requests = config.micro_batch_requests
        lines = read_requests(config) if config.requests else made_up_requests(recommender, max(2 * max(config.batches), 64), config)
        for ranker in config.rankers:
            recommender.use_ranker(ranker)
            for batch in config.batches:
                found = measure(recommender, lines, batch, config)
                found |= {"items": recommender.settings.num_items, "ranker": ranker, "batch": batch}
                print(f"{found['items']:10,} {ranker:>10} {batch:5} {found['requests_per_s']:10.1f} {found['p50_ms']:9.1f} "
                      f"{found['p99_ms']:9.1f} {found['calls']:6}", flush=True)
                results.append(found)
        del recommender
        gc.collect()
    if config.out:
        config.out.write_text(json.dumps({"config": config.model_dump(mode="json"), "results": results}, indent=1))
    return results


def measure(recommender: Recommender, lines: list[bytes], batch: int, config: RecommendBenchConfig) -> dict[str, Any]:
    """Calls of `batch` requests, the first one not counted. Raises: DataError when a request gets no answer."""
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    seconds = []
    for turn in range(config.rounds + 1):
        spent, number = 0.0, 0
        while spent < config.seconds or number < 3:
            first = batch * number % max(1, len(lines) - batch + 1)
            started = clock()
            parsed = recommender.parse(lines[first:first + batch])
            answers = recommender.recommend(parsed, config.k)
            text = [json.dumps({"id": name} | format_answer(answer))
                    for name, answer in zip(parsed.requests["id"].to_pylist(), answers, strict=True)]
            taken = clock() - started
            if parsed.errors or len(text) != min(batch, len(lines)) or any(not answer.item_ids for answer in answers):
                raise DataError(f"requests {first} to {first + batch}: {list(parsed.errors.values()) or 'no eligible ad'}")
            spent, number = spent + taken, number + 1
            if turn:
                seconds.append(taken)
            elif number == 1:
                break
    p50, p99 = np.percentile(seconds, [50, 99])
    return {"requests_per_s": min(batch, len(lines)) * len(seconds) / sum(seconds), "p50_ms": 1e3 * p50, "p99_ms": 1e3 * p99,
            "calls": len(seconds)}


def made_up(num_items: int, config: RecommendBenchConfig) -> Recommender:
    """A bundle in memory: every second item is an ad."""
    rng = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    items = config.model.items
    settings = config.model.model_copy(update={"items": items.model_copy(update={"num_items": num_items})})
    model = GPR(settings).eval().requires_grad_(False).to(config.device)
    codes_NL = rng.integers(0, settings.codebook_size, (num_items, settings.num_levels)).astype(np.int32)
    ads = np.arange(1, num_items, 2, dtype=np.int32)
    trie = Trie.from_codes(codes_NL[ads], settings.codebook_size, ads).to(config.device)
    ids = pa.array([f"item-{number}" for number in range(num_items)])
    hashes = hash_strings(ids)
    order = np.argsort(hashes)
    known = hashes[order]

    def index_of(asked: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(known, asked), num_items - 1)
        return np.where(known[at] == asked, order[at], -1).astype(np.int32)

    requests = RequestSettings(user_features=tuple(f"user_{n}" for n in range(settings.num_user_features)),
                               env_features=tuple(f"env_{n}" for n in range(settings.num_env_features)), user_tokens="row", env_tokens=True,
                               max_tokens=config.max_tokens, context_tokens=config.max_tokens, max_organic_per_block=128,
                               history_events=2048 if settings.pointer.width else 0, num_knowledge_vectors=settings.knowledge.num_vectors,
                               knowledge_width=settings.knowledge.width)
    bundle = BundleSettings(requests=requests, search=SearchConfig(width=config.beam, softmax="prior"), num_items=num_items,
                            mix_weights={"generative": 1, "item head": 1}, catalogue_fingerprint="made up")
    weight_M = trie.slot_weights(torch.from_numpy(1e6 / rng.permutation(np.arange(1, num_items + 1))))
    curves = [(np.array([0.0, 1.0]), np.array([0.0, 2.0]))] * (settings.num_levels + 1)
    manifest = BundleManifest(fingerprints={}, source={}, model={}, settings={}, files={})
    tokenizer = SimpleNamespace(codes_NL=codes_NL, codebook_size=settings.codebook_size)
    return Recommender(Path("made up"), manifest, bundle, model, tokenizer, trie, Eligibility([], ads, num_items), weight_M, curves,
                       pa.chunked_array([ids]), torch.device(config.device), index_of)


def made_up_requests(recommender: Recommender, num: int, config: RecommendBenchConfig) -> list[bytes]:
    """Lines with `history` events each, two thirds of them ads, over the last year."""
    rng = np.random.default_rng(config.seed)
    asked, names = recommender.settings.requests, recommender.ids
    user = {name: f"{name}-{n}" for n, name in enumerate(asked.user_features)}
    lines = []
    for number in tqdm(range(num), desc="requests", mininterval=0.5, file=sys.stderr):
        items = names.take(pa.array(rng.integers(0, len(names), config.history))).to_pylist()
        times = np.sort(rng.integers(NOW - 31_536_000, NOW, config.history)).tolist()
        env = {name: f"{name}-{rng.integers(20)}" for name in asked.env_features}
        history = [{"item_id": item, "time": when, "value": 1.0} | ({"type": "organic"} if at % 3 == 2 else
                                                                    {"type": "ad", "action": "click", **({"env": env} if env else {})})
                   for at, (item, when) in enumerate(zip(items, times, strict=True))]
        request = {"id": f"r-{number}", "user": f"u-{number}", "time": NOW, "history": history} | ({"env": env} if env else {})
        lines.append(json.dumps(request | ({"user_features": user} if user else {})).encode())
    return lines


def read_requests(config: RecommendBenchConfig) -> list[bytes]:
    """Lines of the file, repeated until the largest batch is full. Raises: DataError when it has none."""
    try:
        lines = [line for line in config.requests.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"requests {config.requests} cannot be read ({error})") from None
    if not lines:
        raise DataError(f"requests {config.requests} has no line")
    return lines * -(-2 * max(config.batches) // len(lines))
