"""Small logs of ads, articles and users, and the config that builds a data set of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.build import BuildConfig, build_data
from gpr_dist.config import build_config
from gpr_dist.schema import ShardManifest

DAY, NUM_USERS = 86_400, 40
SPLITS = ("train", "validation", "test")
USERS = [f"person-{n}@example.org" for n in range(NUM_USERS)]


def write_user_logs(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """Ads and articles of `USERS` over 60 days, those of some users left out."""
    rng = np.random.default_rng(3)
    folder.mkdir(parents=True, exist_ok=True)
    for name, num_events in (("ads", 900), ("reads", 900)):
        users = np.array(USERS)[rng.integers(0, NUM_USERS, num_events)]
        table = pa.table({"uid": users, "item": [f"{name}-{n}" for n in rng.integers(0, 60, num_events)],
                          "ts": rng.integers(0, 60 * DAY, num_events), "ecpm": rng.random(num_events)})
        pq.write_table(table.filter(pa.array(~np.isin(users, without))), folder / f"{name}.parquet")
    pq.write_table(pa.table({"uid": USERS, "age": [str(n % 5) for n in range(NUM_USERS)]}), folder / "users.parquet")
    return folder


def build_settings(logs: Path, out: Path, **changes: Any) -> dict[str, Any]:
    columns = {"user_id": "uid", "item_id": "item", "timestamp": "ts", "time_format": "s"}
    return {"source": {"format": "files", "logs": [
        {"path": str(logs / "ads.parquet"), **columns, "kind": "ad", "action": "click", "value": "ecpm"},
        {"path": str(logs / "reads.parquet"), **columns, "kind": "organic"}],
        "users": {"path": str(logs / "users.parquet"), "user_id": "uid", "features": {"age": "age"}}},
        "out": str(out), "min_buckets": 4, "shards": {"rows_per_batch": 4, "rows_per_shard": 8},
        "journeys": {"max_tokens": 24, "context_tokens": 8, "max_organic_per_block": 8,
                     "split": {"validation_from": "1970-02-10", "test_from": "1970-02-20"}}} | changes


def build_users(logs: Path, out: Path, **changes: Any) -> Path:
    return build_data(build_config(BuildConfig, build_settings(logs, out, **changes), "test"))


def manifests_of(data: Path) -> dict[str, ShardManifest]:
    return {split: ShardManifest.parse((data / "shards" / split / "manifest.json").read_bytes(), split) for split in SPLITS}


def files_with(folder: Path, *words: str) -> list[str]:
    """Files that hold one of the words, by content or by name."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
                  and any(word.encode() in path.read_bytes() or word in path.name for word in words))
