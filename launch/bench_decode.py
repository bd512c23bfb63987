"""`bench.py decode`: requests per second and latency of constrained decoding, ours beside other people's, calls interleaved.

Every contender reads histories of as many tokens with a network of the same width, heads, FFN and depth, and answers each request with
its K best semantic IDs among those of a catalogue (L codes of V, drawn at random): ours by `decoding/beam_search.py`, T5 and GPT-2 by
Hugging Face `generate` with `prefix_allowed_tokens_fn` (needs transformers, perhaps in another Python: `transformers_python=PATH`),
fay85/gpr-recsys by its value-guided trie beam search (`gpr_recsys=PATH`). Inputs and tries are made before the clock starts. Every
contender is a process of its own, with the same threads and the same allocator settings. Checked in the same run: no result outside the
catalogue, none missing, and our search against all items of a small catalogue scored one by one.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
from bench_contender import ALLOCATOR, Contender, PeerError
from bench_step import merged
from pydantic import Field, model_validator
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.errors import GPRError
from gpr_dist.model.gpr import GPRConfig

PEERS = {"t5": "T5, Hugging Face generate", "gpt2": "GPT-2, Hugging Face generate", "gpr_recsys": "gpr-recsys, trie search"}
OURS = "ours"
BARS = {"t5": 5, "gpt2": 10, "gpr_recsys": 30}
"""how many times as many requests per second as these we aim for"""
TOLERANCE = 1e-3
"""nats by which the beam search may differ from scoring every item: sums of float32 in another order"""


class DecodeBenchConfig(Config):
    """What is measured."""

    items: tuple[int, ...] = Field((10_000, 1_000_000), min_length=1)
    """catalogue sizes"""
    beams: tuple[int, ...] = Field((10, 50, 200), min_length=1)
    """prefixes kept, and results per request"""
    batches: tuple[int, ...] = Field((1, 16), min_length=1)
    """requests decoded in one call"""
    tokens: int = Field(50, ge=4)
    """of every history"""
    organic: int = Field(10, ge=1)
    """of them, where a contender tells token types apart"""
    width: int = Field(128, ge=2)
    """model width"""
    num_heads: int = Field(4, ge=1)
    """attention heads"""
    encoder_layers: int = Field(4, ge=1)
    """of HSD, T5's and gpr-recsys's encoder, and all of GPT-2"""
    decoder_layers: int = Field(4, ge=1)
    """of PTD, T5's and gpr-recsys's decoder"""
    ffn_multiple: int = Field(4, ge=1)
    """inner width of the FFNs over the model width"""
    num_levels: int = Field(3, ge=2)
    """codes of an item"""
    codebook_size: int = Field(256, ge=2)
    """codes per level"""
    switches: dict[str, Any] = Field({})
    """settings laid over our model, e.g. switches.ptd.num_thinking=3"""
    contenders: tuple[Literal["t5", "gpt2", "gpr_recsys"], ...] = tuple(PEERS)
    """whom to run beside ours"""
    gpr_recsys: Path | None = None
    """a checkout of fay85/gpr-recsys"""
    transformers_python: Path = Path(sys.executable)
    """the Python that has transformers; torch is all else it needs"""
    device: Literal["cpu", "cuda"] = "cpu"
    """of all contenders"""
    threads: int = Field(1, ge=1)
    """of every contender"""
    keep_memory: bool = True
    """whether glibc keeps large temporaries (bench_contender.ALLOCATOR) in every contender, or works as it does without settings"""
    seconds: float = Field(1.0, gt=0)
    """of `clock`, of calls, per contender, case and round; at least one call"""
    rounds: int = Field(3, ge=1)
    """through all contenders, after a first one that warms up"""
    most_seconds: float = Field(20.0, gt=0)
    """of `clock`: a case is left out where the cases before it say that one call would take longer"""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu = seconds of processor time: for crowded machines, with threads=1"""
    seed: int = 0
    """of catalogue, histories and weights"""
    out: Path | None = None
    """JSON file for the results"""

    @model_validator(mode="after")
    def _check(self) -> "DecodeBenchConfig":
        if self.codebook_size**self.num_levels < max(self.items):
            raise ValueError(f"{self.num_levels} codes of {self.codebook_size} cannot tell {max(self.items):,} items apart")
        return self


def run_bench(config: DecodeBenchConfig) -> dict[str, Any]:
    """Check, measure, print a table per case. Raises: GPRError where our search disagrees with brute force."""
    model = GPRConfig(**merged({
        "width": config.width, "num_levels": config.num_levels, "codebook_size": config.codebook_size, "num_user_features": 4,
        "num_env_features": 4, "hsd": {"num_layers": config.encoder_layers, "num_heads": config.num_heads,
                                       "ffn_multiple": config.ffn_multiple},
        "ptd": {"num_layers": config.decoder_layers, "num_heads": config.num_heads, "ffn_multiple": config.ffn_multiple}}, config.switches))
    found, absent = start(config, model)
    try:
        about = {name: contender.run("describe") for name, contender in found.items()}
        exact = found[OURS].run("brute force")
        print(f"{config.threads} threads on {config.device}, {config.clock} time, {config.tokens} history tokens, {config.num_levels} "
              f"codes of {config.codebook_size}, {config.rounds} interleaved rounds, load average {os.getloadavg()[0]:.1f}")
        print(f"brute force over {exact['items']} items: {exact['same_order']:.1%} of the ranks are the same, scores differ by at most "
              f"{exact['largest_difference']:.1e} nats")
        if exact["largest_difference"] > TOLERANCE:
            raise GPRError(f"our beam search differs from scoring every item by {exact['largest_difference']:.3g} nats, more than float32 "
                           "can explain: the search or the decoder is broken")
        runs = measure(config, found)
    finally:
        for contender in found.values():
            contender.close()
    results = [summary(config, *case, {name: answers[case] for name, answers in runs.items()}) for case in cases(config)]
    report(config, results, about, absent)
    if config.out:
        config.out.write_text(json.dumps({"config": config.model_dump(mode="json"), "brute_force": exact, "absent": absent, "models": about,
                                          "results": results}, indent=1))
    return {"results": results, "absent": absent}


def start(config: DecodeBenchConfig, model: GPRConfig) -> tuple[dict[str, Contender], dict[str, str]]:
    """Returns: the processes by name, ours first; name -> why it does not run here."""
    settings = {**config.model_dump(mode="json", exclude={"out", "switches", "contenders"}), "requests": requests(config)}
    allocator = ALLOCATOR if config.keep_memory else {}
    found = {OURS: Contender("bench_decode_ours.py", "ours", {**settings, "model": model.model_dump(mode="json")}, ours=True,
                             allocator=allocator)}
    absent = {}
    for name in config.contenders:
        if name == "gpr_recsys" and config.gpr_recsys is None:
            absent[name] = "no path given"
            continue
        python = sys.executable if name == "gpr_recsys" else config.transformers_python
        try:
            found[name] = Contender("bench_decode_peers.py", name, {**settings, "path": settings["gpr_recsys"]}, python=python,
                                    allocator=allocator)
        except PeerError as error:
            absent[name] = str(error)
    return found, absent


def requests(config: DecodeBenchConfig) -> int:
    """Different requests that a contender goes through, a multiple of every batch."""
    return max(2, -(-16 // max(config.batches))) * int(np.lcm.reduce(config.batches))


def cases(config: DecodeBenchConfig) -> list[tuple[int, int, int]]:
    """(items, beams, requests of a call), in the order in which they run."""
    return [(items, beams, batch) for items in config.items for beams in config.beams for batch in sorted(config.batches)]


def measure(config: DecodeBenchConfig, contenders: dict[str, Contender]) -> dict[str, dict[tuple[int, int, int], list[dict]]]:
    """Every case of every contender in turn. Returns: name -> case -> answers of the rounds; [] where a call would take too long."""
    runs: dict[str, dict[tuple[int, int, int], list[dict]]] = {name: {case: [] for case in cases(config)} for name in contenders}
    too_long: set[tuple[str, tuple[int, int, int]]] = set()
    turns = [(turn, case, name) for turn in range(config.rounds + 1) for case in cases(config) for name in contenders]
    clock = ("wall", "cpu").index(config.clock)
    slowest: dict[str, dict[tuple[int, int, int], float]] = {name: {} for name in contenders}
    for turn, case, name in tqdm(turns, desc="calls", file=sys.stderr, mininterval=0.5):
        if (name, case) in too_long:
            continue
        if turn == 0 and expected_seconds(case, slowest[name]) > config.most_seconds:
            too_long.add((name, case))
            continue
        answer = contenders[name].run(" ".join(map(str, case)))
        slowest[name][case] = min(call[clock] for call in answer["calls"])
        if turn > 0:
            runs[name][case].append(answer)
    return runs


def expected_seconds(case: tuple[int, int, int], known: dict[tuple[int, int, int], float]) -> float:
    """Of a call, in proportion to its requests and beams, from the largest measured case that it exceeds; 0 without one."""
    items, beams, batch = case
    smaller = [(beams * batch / (b * n) * seconds) for (i, b, n), seconds in known.items() if i == items and b <= beams and n <= batch]
    return min(smaller, default=0.0)


def summary(config: DecodeBenchConfig, items: int, beams: int, batch: int, runs: dict[str, list[dict]]) -> dict[str, Any]:
    """Rates and latencies of a case: requests/s from the sum of all calls, by the configured clock; percentiles of a call, wall and CPU."""
    out: dict[str, Any] = {"items": items, "beams": beams, "batch": batch, "contenders": {}}
    for name, answers in runs.items():
        if not answers:
            continue
        wall, cpu = np.array([call for answer in answers for call in answer["calls"]]).T
        clocks = {"wall": wall, "cpu": cpu}
        rates = {clock: batch * len(seconds) / seconds.sum() for clock, seconds in clocks.items()}
        out["contenders"][name] = {
            "requests_per_s": rates[config.clock], **{f"requests_per_s_{clock}": rate for clock, rate in rates.items()}, "calls": len(wall),
            **{f"{clock}_p{q}_s": float(np.percentile(seconds, q)) for clock, seconds in clocks.items() for q in (50, 99)},
            "illegal": sum(answer["illegal"] for answer in answers), "missing": sum(answer["missing"] for answer in answers)}
    ours = out["contenders"][OURS]["requests_per_s"]
    out["times"] = {name: ours / found["requests_per_s"] for name, found in out["contenders"].items() if name != OURS}
    return out


def report(config: DecodeBenchConfig, results: list[dict[str, Any]], about: dict[str, dict], absent: dict[str, str]) -> None:
    """A table, and whether the aims are met."""
    for name, answer in about.items():
        print(f"  {PEERS.get(name, name):30} {answer['parameters'] / 1e6:.1f} M parameters")
    for name, reason in absent.items():
        print(f"  {PEERS[name]:30} does not run here: {reason}")
    other = "cpu" if config.clock == "wall" else "wall"
    print(f"\n{'items':>9} {'beams':>5} {'batch':>5}  {'':30} {'requests/s':>10} {f'({other})':>8} {'p50 ms':>8} {'p99 ms':>8} "
          f"{'calls':>6} {'illegal':>7} {'missing':>7}  ours is")
    for result in results:
        case = f"{result['items']:9,} {result['beams']:5} {result['batch']:5}"
        for name in (OURS, *(peer for peer in config.contenders if peer in about)):
            found = result["contenders"].get(name)
            if found is None:
                print(f"{case}  {PEERS[name]:30} left out: a call would take more than {config.most_seconds:.0f} s")
                continue
            ratio = "" if name == OURS else f"{result['times'][name]:.1f} x"
            print(f"{case}  {PEERS.get(name, name):30} {found['requests_per_s']:10.1f} {found[f'requests_per_s_{other}']:8.1f} "
                  f"{1e3 * found[f'{config.clock}_p50_s']:8.1f} {1e3 * found[f'{config.clock}_p99_s']:8.1f} {found['calls']:6} "
                  f"{found['illegal']:7} {found['missing']:7}  {ratio}")
    for name, bar in BARS.items():
        times = [result["times"][name] for result in results if name in result["times"]]
        if times:
            print(f"{PEERS[name]}: ours is {min(times):.1f} to {max(times):.1f} times as fast, {bar} times or more in "
                  f"{sum(ratio >= bar for ratio in times)} of {len(times)} cases; each at its best batch: "
                  + ", ".join(f"{ratio:.1f} ({items:,} items, {beams} beams)"
                              for (items, beams), ratio in best_times(results, name).items()))


def best_times(results: list[dict[str, Any]], name: str) -> dict[tuple[int, int], float]:
    """(items, beams) -> requests/s of ours over those of a peer, each with the batch that suits it best."""
    rates: dict[tuple[int, int], dict[str, float]] = {}
    for result in results:
        best = rates.setdefault((result["items"], result["beams"]), {})
        for who in (OURS, name):
            if who in result["contenders"]:
                best[who] = max(best.get(who, 0.0), result["contenders"][who]["requests_per_s"])
    return {case: best[OURS] / best[name] for case, best in rates.items() if name in best}
