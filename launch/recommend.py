"""Ask a bundle for ads: `python launch/recommend.py bundle=bundle requests=requests.jsonl > answers.jsonl`, or requests from stdin.

A request is a JSON line, or a row of an .arrow/.feather/.ipc or .parquet file (format: gpr_dist/serving/requests.py, and README.md of
the bundle). Each gets one line of JSON on stdout, in order:
    {"line": 1, "id": "r-1", "ads": [{"item_id": "883404", "score": -3.2, "value": 1.8}, ...], "skipped": {"unknown_items": 2}}
`score` is a log-probability in nats, `value` the expected value in the units of the log. "reason" says why "ads" is empty. A request that
cannot be understood gets {"line": 7, "error": "..."} and the others are answered; the exit code is 1 only when none could be.
Throughput and latency are printed on stderr; --bench also measures every request on its own.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from tqdm import tqdm

from gpr_dist.config import Config, load_config, parse_cli
from gpr_dist.errors import ConfigError, DataError, run_cli
from gpr_dist.serving.recommender import Answer, Recommender
from gpr_dist.serving.requests import Parsed
from gpr_dist.serving.rules import RulesConfig, compile_rules
from gpr_dist.serving.settings import Ranker

ARROW, PARQUET = (".arrow", ".feather", ".ipc"), (".parquet",)


class RecommendConfig(Config):
    """What is asked of which bundle."""

    bundle: Path
    """folder made by launch/export.py"""
    requests: Path | None = None
    """.jsonl, .arrow/.feather/.ipc or .parquet; none = JSON lines from stdin"""
    rules: Path | None = None
    """a rules file used instead of the bundle's, e.g. with today's budgets (gpr_dist/serving/rules.py)"""
    ranker: Ranker | None = None
    """generative, item head or mix; none = as the bundle was exported"""
    k: int = Field(10, ge=1)
    """ads of an answer whose request does not say"""
    chunk_requests: int = Field(1024, ge=1)
    """requests read, and sorted by length, together; 1 answers each line as it comes"""
    micro_batch_tokens: int = Field(16384, ge=1)
    """journey tokens encoded at once"""
    micro_batch_requests: int = Field(64, ge=1)
    """requests decoded at once"""
    threads: int = Field(0, ge=0)
    """CPU threads; 0 = OMP_NUM_THREADS, else all cores"""
    check: bool = True
    """compare every checksum of the bundle before it is used"""
    bench_requests: int = Field(200, ge=1)
    """requests of the first chunk that --bench answers one by one"""


@dataclass
class Tally:
    """What happened to the requests."""

    answered: int = 0
    without_ads: int = 0
    errors: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    latency_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> str:
        requests = self.answered + self.errors
        parts = [f"{requests:,} requests: {self.answered:,} answered ({self.without_ads:,} without ads), {self.errors:,} malformed"]
        parts += [f"history events skipped: {count:,} ({reason.replace('_', ' ')})" for reason, count in sorted(self.skipped.items())]
        if self.latency_ms:
            p50, p99 = np.percentile(self.latency_ms, [50, 99])
            parts.append(f"{self.answered / max(self.seconds, 1e-9):,.1f} requests/s, micro-batch p50 {p50:.1f} ms, p99 {p99:.1f} ms")
        return "; ".join(parts)


def main() -> int:
    config, args = parse_cli(RecommendConfig, __doc__, flags={"--bench": "also answer requests one by one and print their p50 and p99"})
    if config.threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recommender = Recommender.load(config.bundle, device, config.check)
    recommender.micro_batch_tokens, recommender.micro_batch_requests = config.micro_batch_tokens, config.micro_batch_requests
    if config.ranker is not None:
        recommender.use_ranker(config.ranker)
    if config.rules is not None:
        rules, unknown = compile_rules(load_config(RulesConfig, config.rules), config.rules.parent, recommender.trie, recommender.index_of,
                                       recommender.settings.num_items)
        recommender.use_rules(rules)
        if unknown:
            print(f"{config.rules}: {unknown:,} rows of its table are of ads that the bundle does not have; left out", file=sys.stderr)
    if config.k > recommender.max_k:
        raise ConfigError(f"k={config.k}: the bundle answers with at most {recommender.max_k} ads, its beam width; export it with more")
    if args.dry_run:
        print(f"{config.bundle}: {recommender.settings.num_items:,} items, {recommender.trie.num_items:,} of them ads, fingerprints "
              f"{recommender.manifest.fingerprints}")
        return 0
    tally, last = Tally(), None
    with tqdm(desc="requests", unit="request", mininterval=0.5) as bar:
        for first, num, parsed in iter_chunks(config, recommender):
            answer_chunk(recommender, parsed, first, num, config.k, tally, sys.stdout)
            last = last or parsed
            bar.update(num)
    print(tally.summary(), file=sys.stderr, flush=True)
    if args.bench and last is not None:
        print(bench(recommender, last, config), file=sys.stderr, flush=True)
    return 1 if tally.errors and not tally.answered else 0


def iter_chunks(config: RecommendConfig, recommender: Recommender) -> Iterator[tuple[int, int, Parsed]]:
    """Yields (line or row number of the first request, counted from 1; requests, good and bad; what was read)."""
    path = config.requests
    if path is not None and not path.is_file():
        raise DataError(f"requests {path} does not exist")
    if path is not None and path.suffix in ARROW + PARQUET:
        first = 1
        for table in iter_tables(path, config.chunk_requests):
            yield first, table.num_rows, recommender.parse_table(table)
            first += table.num_rows
        return
    if path is None and sys.stdin.isatty():
        print("reading requests from stdin, one JSON object a line; end with Ctrl-D", file=sys.stderr, flush=True)
    with open(path, "rb") if path is not None else os.fdopen(os.dup(sys.stdin.fileno()), "rb") as file:
        yield from iter_line_chunks(file, config.chunk_requests, recommender)


def iter_line_chunks(file: IO[bytes], size: int, recommender: Recommender) -> Iterator[tuple[int, int, Parsed]]:
    """Empty lines are passed over and keep their number."""
    lines, numbers = [], []

    def chunk() -> tuple[int, int, Parsed]:
        parsed = recommender.parse(lines)
        places = np.array(numbers)
        moved = Parsed(parsed.requests, places[parsed.number] - numbers[0], {numbers[at] - numbers[0]: text
                                                                               for at, text in parsed.errors.items()})
        return numbers[0], len(lines), moved

    for number, line in enumerate(file, 1):
        if line.strip():
            lines.append(line.rstrip(b"\r\n"))
            numbers.append(number)
        if len(lines) == size:
            yield chunk()
            lines, numbers = [], []
    if lines:
        yield chunk()


def iter_tables(path: Path, size: int) -> Iterator[pa.Table]:
    """Pieces of at most `size` rows of an Arrow or Parquet file. Raises: DataError."""
    try:
        if path.suffix in PARQUET:
            for batch in pq.ParquetFile(path).iter_batches(size):
                yield pa.Table.from_batches([batch])
            return
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            for batch in (reader.get_batch(number) for number in range(reader.num_record_batches)) if is_file else reader:
                for first in range(0, batch.num_rows, size):
                    yield pa.Table.from_batches([batch.slice(first, size)])
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"requests {path} cannot be read ({error})") from None


def answer_chunk(recommender: Recommender, parsed: Parsed, first: int, num: int, k: int, tally: Tally, out: IO[str]) -> None:
    """Write one line for every request of a chunk, in order."""
    started = time.perf_counter()
    answers = recommender.recommend(parsed, k)
    tally.seconds += time.perf_counter() - started
    ids = parsed.requests["id"].to_pylist()
    lines = {at: {"line": first + at, "error": text} for at, text in parsed.errors.items()}
    lines |= {at: {"line": first + at, "id": name} | format_answer(answer)
              for at, name, answer in zip(parsed.number.tolist(), ids, answers, strict=True)}
    for at in sorted(lines):
        out.write(json.dumps(lines[at]) + "\n")
    out.flush()
    tally.answered += len(answers)
    tally.errors += len(parsed.errors)
    tally.without_ads += sum(not answer.item_ids for answer in answers)
    tally.latency_ms += [answer.seconds * 1000 for answer in answers if answer.seconds]
    for answer in answers:
        for reason, count in answer.skipped.items():
            tally.skipped[reason] = tally.skipped.get(reason, 0) + count


def format_answer(answer: Answer) -> dict[str, Any]:
    values = answer.values or [None] * len(answer.scores)
    ads = [{"item_id": item, "score": round(score, 6)} | ({} if value is None else {"value": round(value, 6)})
           for item, score, value in zip(answer.item_ids, answer.scores, values, strict=True)]
    extra = {"reason": answer.reason, "skipped": answer.skipped, "unknown_ads": answer.unknown_ads}
    return {"ads": ads} | {name: value for name, value in extra.items() if value}


def bench(recommender: Recommender, parsed: Parsed, config: RecommendConfig) -> str:
    """Latency of requests answered one by one."""
    latency_ms = []
    for row in tqdm(range(min(config.bench_requests, parsed.requests.num_rows)), desc="one by one", unit="request", mininterval=0.5):
        started = time.perf_counter()
        recommender.recommend(Parsed(parsed.requests.slice(row, 1), np.zeros(1, np.int64), {}), config.k)
        latency_ms.append((time.perf_counter() - started) * 1000)
    if not latency_ms:
        return "no request to measure"
    p50, p99 = np.percentile(latency_ms, [50, 99])
    return f"one by one: {len(latency_ms)} requests, p50 {p50:.1f} ms, p99 {p99:.1f} ms, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    run_cli(main)
