"""Raw logs → catalogue, eligibility lists and shards: `build_data`, in passes whose memory is bounded by a setting.

Pass 1 reads the logs once: good rows become fixed-width records, partitioned by hash(user) on disk, and sightings of items,
partitioned by hash(item). Then the catalogue is numbered. Pass 2 takes one bucket of users at a time and writes their journeys; the
manifests come last. Every step leaves a marker, so that a killed build goes on where it stopped; the bytes written depend on the
logs and the config, never on the number of workers, on their timing or on restarts. What is in a log, a journey or a shard is
decided elsewhere (sources/, journeys.py, shards.py).
"""

import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from tqdm import tqdm

from data_pipeline.catalogue import Catalogue, ItemCollector, ItemTableCollector, build_catalogue
from data_pipeline.events import AD, ITEM_SCHEMA, ORGANIC, BadRows, encode_events, event_dtype, validate_events
from data_pipeline.journeys import SPLITS, JourneyConfig, Users, build_journeys
from data_pipeline.runner import Run, RunnerKind, open_runner
from data_pipeline.shards import ShardConfig, ShardWriter, finished_parts, write_manifest
from data_pipeline.sources import SourceConfig, open_source
from data_pipeline.sources.base import Source, Task
from data_pipeline.spill import Spill, batch_to_records, read_columns, read_partition, records_to_table
from data_pipeline.users import UsersConfig, choose_users, open_users, record_users
from data_pipeline.value_names import NAMES_FILE, ValueNames, add_names, count_names, write_names
from gpr_dist.config import Config, public
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.hashing import bucket_of, check_collisions, feature_id, hash_strings
from gpr_dist.schema import NO_ITEM, SCHEMA_VERSION, ShardManifest, write_atomic

BUILD_VERSION = 2  # raise it when the same logs and config give other bytes
_BYTES_PER_EVENT = 600  # memory of pass 2 per event of a bucket: record, sort keys, tokens, rows (measured, see the tests)
_BYTES_PER_ITEM = 300  # likewise per item of a partition while the catalogue is merged
_USER_IDS = pa.schema([("user", pa.uint64()), ("user_id", pa.string())])


class CatalogueConfig(Config):
    """The item catalogue."""

    base: Path | None = None
    """folder of an earlier catalogue (`<data>/catalogue`) whose item indices are kept; new items are appended"""


class BuildConfig(Config):
    """From raw logs to shards."""

    source: SourceConfig
    """where the logs are and what they mean; source.format chooses one of complete_journey, files, movielens, amazon, llmrank"""
    out: Path
    """folder of the data set: catalogue/, eligibility.arrow, shards/"""
    journeys: JourneyConfig = JourneyConfig()
    """how events become rows"""
    shards: ShardConfig = ShardConfig()
    """how rows are stored"""
    users: UsersConfig = UsersConfig()
    """what is stored of user ids"""
    catalogue: CatalogueConfig = CatalogueConfig()
    """how items are numbered"""
    max_bad_frac: float = Field(default=0.001, ge=0, le=1)
    """stop when more than this fraction (0..1) of the log rows is bad"""
    memory_limit_bytes: int = Field(default=2 << 30, ge=1 << 20)
    """memory for data per worker process, beside about 300 MB for the program itself; more data means more buckets, not more memory"""
    min_buckets: int = Field(default=8, ge=1)
    """buckets of users at least; one is the unit of work and of restart in pass 2, and the smallest number of shard files"""
    runner: RunnerKind = "local"
    """where both passes over the logs run: local = processes of this machine; ray = a Ray cluster whose nodes share the folders"""
    num_workers: int = Field(default=1, ge=1)
    """pieces worked on at a time, each by one process; the output depends neither on it nor on the runner"""


class _Plan(Config):
    """What every worker needs to know, fixed before pass 1."""

    key: str
    users: str
    """fingerprint of the user salt, or plain"""
    num_buckets: int
    num_partitions: int
    user_features: tuple[str, ...]
    env_features: tuple[str, ...]


def build_data(config: BuildConfig) -> Path:
    """Build the data set of `config` at `config.out`, or finish it, or find it finished. Returns: its folder.

    Raises: ConfigError for a mapping that does not fit the files, DataError for missing or bad logs; nothing that looks like a
    finished data set is left behind then.
    """
    started = time.monotonic()
    out = config.out
    source = open_source(config.source)
    if config.catalogue.base and config.catalogue.base.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"catalogue.base={config.catalogue.base} lies in out={out}, which is rewritten; build into another folder")
    users = choose_users(config.users, out)
    key = _build_key(config, source, users)
    if (summary := _read_json(out / "build.json")) and summary.get("key") == key:
        print(f"{out} is up to date ({summary['rows']} log rows)")
        return out
    _opened.clear()
    _opened[key] = source
    open_users(out, config.users.salt, users)  # asks for a missing salt before anything is removed
    plan = _start(config, source, key, users)
    with open_runner(config.runner, config.num_workers, config.memory_limit_bytes) as run:
        bad_rows, counts, names = _read_logs(config, plan, source, run)
        bad_rows.check(config.max_bad_frac)
        if bad_rows.total == bad_rows.bad:
            raise DataError(f"the logs of {config.source.format} hold no usable row ({bad_rows.total:,} read); nothing to build")
        catalogue = _build_catalogue(config, plan, source)
        _build_eligibility(config, source, catalogue)
        counts.update(_write_shards(config, plan, run))
    manifests = {split: write_manifest(out / "shards" / split, split, plan.user_features, plan.env_features, catalogue.fingerprint,
                                       catalogue.num_items) for split in reversed(SPLITS)}  # training starts when it sees the first split
    add_names(_read_json(out / ".build" / NAMES_FILE) or {}, names)
    write_names(names, out)
    _report(bad_rows, counts, catalogue, manifests, time.monotonic() - started)
    summary = {"key": key, "rows": bad_rows.total, "bad_rows": dict(bad_rows.reasons), "counts": dict(counts),
               "journeys": config.journeys.model_dump(mode="json"), "num_profile_features": len(source.profile_features),
               "num_buckets": plan.num_buckets}
    write_atomic(out / "build.json", json.dumps(summary, indent=1).encode())
    shutil.rmtree(out / ".build")
    return out


def describe_build(config: BuildConfig) -> list[str]:
    """What a build would read and write, having opened every file and checked every column; for --dry-run."""
    source = open_source(config.source)
    lines = source.describe()
    rows = sum(task.num_rows for task in source.tasks())
    return [*lines, f"about {_num_buckets(config, rows)} buckets of users, {config.num_workers} {config.runner} workers, "
            f"{config.memory_limit_bytes / 2**30:.1f} GiB each; output: {config.out}"]


def _build_key(config: BuildConfig, source: Source, users: str) -> str:
    """Changes with anything that changes the output: config, user salt, input files, base catalogue, version."""
    settings = {name: value for name, value in public(config).items() if name not in ("runner", "num_workers", "out", "users")}
    base = Catalogue(config.catalogue.base).fingerprint if config.catalogue.base else None
    content = [BUILD_VERSION, SCHEMA_VERSION, settings, users, source.inputs(), base]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _start(config: BuildConfig, source: Source, key: str, users: str) -> _Plan:
    """Go on with an interrupted build of the same key, or clear what an older one left (manifests first) and make a new plan."""
    out, work = config.out, config.out / ".build"
    found = _read_json(work / "plan.json")
    if found and found.get("key") == key:
        return _Plan(**found)
    for split in SPLITS:
        (out / "shards" / split / "manifest.json").unlink(missing_ok=True)
    (out / "build.json").unlink(missing_ok=True)
    (out / "eligibility.arrow").unlink(missing_ok=True)
    for folder in (out / "shards", out / "catalogue", work):
        shutil.rmtree(folder, ignore_errors=True)
    rows = sum(task.num_rows for task in source.tasks())
    plan = _Plan(key=key, users=users, num_buckets=_num_buckets(config, rows),
                 num_partitions=max(1, math.ceil(rows * _BYTES_PER_ITEM / config.memory_limit_bytes)),
                 user_features=source.profile_features + source.user_features, env_features=source.env_features)
    work.mkdir(parents=True)
    record_users(out, users)
    write_atomic(work / "plan.json", plan.model_dump_json().encode())
    return plan


def _num_buckets(config: BuildConfig, rows: int) -> int:
    """Enough that a bucket fits into memory if users were spread evenly; a fuller one is read in parts (see `_bucket_parts`)."""
    return max(config.min_buckets, math.ceil(rows * _BYTES_PER_EVENT / config.memory_limit_bytes))


# ---------------------------------------------------------------------------------------------------------------- pass 1

def _read_logs(config: BuildConfig, plan: _Plan, source: Source, run: Run) -> tuple[BadRows, Counter, ValueNames]:
    tasks = source.tasks()
    done = config.out / ".build" / "tasks"
    done.mkdir(exist_ok=True)
    left = [task for task in tasks if not (done / f"{task.order:06d}.json").exists()]
    with tqdm(total=sum(task.num_rows for task in tasks), desc="read logs", unit="row", unit_scale=True, mininterval=0.5) as bar:
        bar.update(sum(task.num_rows for task in tasks) - sum(task.num_rows for task in left))
        for task in run(_read_task, [(config, plan, task) for task in left]):
            bar.update(task.num_rows)
    bad_rows, counts, names = BadRows(), Counter(), {}
    for task in tasks:
        result = _read_json(done / f"{task.order:06d}.json")
        add_names(result.get("names", {}), names)
        bad_rows.add(BadRows(result["total"], Counter(result["reasons"]), result["shown"]))
        counts.update(result["counts"])
    return bad_rows, counts, names


def _read_task(config: BuildConfig, plan: _Plan, task: Task) -> Task:
    """One piece of the log → records by bucket of the user, ids of users, sightings of items; the marker comes last."""
    source, work = _open_once(config, plan), config.out / ".build"
    name = f"task-{task.order:06d}"
    for path in work.glob(f"*/{name}-*.arrow"):  # left by a killed run of this task
        path.unlink()
    events = Spill(work / "events", name, plan.num_buckets, config.memory_limit_bytes // 4)
    users = Spill(work / "users", name, plan.num_buckets, config.memory_limit_bytes // 16)
    items = ItemCollector(work / "sightings", name, plan.num_partitions, config.memory_limit_bytes // 16)
    ids = open_users(config.out, config.users.salt, plan.users)
    bad_rows, counts, names, seen = BadRows(), Counter(), {}, _Distinct(config.memory_limit_bytes // 16)
    features = [(f"user.{name}", name) for name in source.user_features] + [(f"env.{name}", name) for name in source.env_features]
    for batch in source.read_events(task):
        rows = validate_events(batch, bad_rows)
        if not rows.num_rows:
            continue
        records = encode_events(rows, source.user_features, source.env_features)
        count_names(rows, {"scene": "scene", **dict(features)}, names)
        bucket = bucket_of(records["user"], plan.num_buckets)
        events.add(bucket, records_to_table(records))
        items.add(rows["item_id"], records["item"], records["kind"], records["timestamp"])
        check_collisions(rows["user_id"], records["user"], "user")
        new = seen.first_sightings(records["user"], rows["user_id"])
        stored = ids.stored(rows["user_id"].take(pa.array(new)))  # no raw id goes to disk
        users.add(bucket[new], pa.table([records["user"][new], stored], schema=_USER_IDS))
        counts["ad events"] += int((records["kind"] == AD).sum())
        counts["organic events"] += int((records["kind"] == ORGANIC).sum())
    for part in (events, users, items):
        part.close()
    result = {"total": bad_rows.total, "reasons": dict(bad_rows.reasons), "shown": bad_rows.shown, "counts": dict(counts), "names": names}
    write_atomic(work / "tasks" / f"{task.order:06d}.json", json.dumps(result).encode())
    return task


class _Distinct:
    """Remembers which ids it has met, within a memory limit: past it, it forgets and repeats itself, which costs space only.

    It knows an id by a second hash, so that another id with the same first hash still comes out and is found by `_users`.
    """

    def __init__(self, limit_bytes: int):
        self._limit, self._known = max(1, limit_bytes // 8), np.zeros(0, np.uint64)

    def first_sightings(self, hashes: np.ndarray, ids: pa.ChunkedArray) -> np.ndarray:
        """Positions of ids not met before, each once."""
        _, first = np.unique(hashes, return_index=True)
        distinct = hash_strings(ids.take(pa.array(first)), salt="check")
        if len(self._known):
            at = np.minimum(np.searchsorted(self._known, distinct), len(self._known) - 1)
            new = self._known[at] != distinct
            distinct, first = distinct[new], first[new]
        if len(self._known) + len(distinct) > self._limit:
            self._known = np.zeros(0, np.uint64)
        self._known = np.sort(np.concatenate([self._known, distinct]), kind="stable")
        return first


# ------------------------------------------------------------------------------------------- catalogue, users, eligibility

def _build_catalogue(config: BuildConfig, plan: _Plan, source: Source) -> Catalogue:
    """Items of the events (collected in pass 1), of the items table and of the eligibility lists; and the users' profiles."""
    folder, work = config.out / "catalogue", config.out / ".build"
    if (folder / "catalogue.json").exists():
        return Catalogue(folder)
    for path in (*work.glob("sightings/extra-*"), *work.glob("items/*"), *work.glob("profiles/*")):
        path.unlink()
    limit = config.memory_limit_bytes // 8
    sightings = ItemCollector(work / "sightings", "extra", plan.num_partitions, limit)
    table = ItemTableCollector(work / "items", plan.num_partitions, limit)
    features = source.item_features
    for items in tqdm(source.read_items(), desc="items table", unit="batch", mininterval=0.5):
        items = items.select([*ITEM_SCHEMA.names, *features.names]).cast(pa.schema([*ITEM_SCHEMA, *features]))
        table.add(items)
        sightings.add(items["item_id"], hash_strings(items["item_id"]), np.full(items.num_rows, ORGANIC), None)
    for batch in tqdm(source.read_eligibility() if source.num_groups else (), desc="eligible items", unit="batch", mininterval=0.5):
        ids = batch["item_id"]
        ids = pc.unique(ids.combine_chunks())
        sightings.add(ids, hash_strings(ids), np.full(len(ids), AD), None)
    sightings.close()
    table.close()
    _collect_profiles(config, plan, source)
    base = Catalogue(config.catalogue.base) if config.catalogue.base else None
    return build_catalogue(folder, work / "sightings", work / "items", plan.num_partitions, features, base)


def _collect_profiles(config: BuildConfig, plan: _Plan, source: Source) -> None:
    names, counted = source.profile_features, {}
    spill = Spill(config.out / ".build" / "profiles", "users", plan.num_buckets, config.memory_limit_bytes // 8)
    for users in tqdm(source.read_users() if names else (), desc="users table", unit="batch", mininterval=0.5):
        hashes = hash_strings(users["user_id"])
        count_names(users, {name: name for name in names}, counted)
        records = np.zeros(users.num_rows, _profile_dtype(len(names)))
        records["user"] = hashes
        for column, name in enumerate(names):
            records["features"][:, column] = feature_id(users[name], name)
        records = records[hashes != 0]
        spill.add(bucket_of(records["user"], plan.num_buckets), records_to_table(records))
    spill.close()
    write_atomic(config.out / ".build" / NAMES_FILE, json.dumps(counted).encode())


def _build_eligibility(config: BuildConfig, source: Source, catalogue: Catalogue) -> None:
    """eligibility.arrow: per group the sorted distinct catalogue indices. Memory: a range of groups at a time."""
    path, pairs = config.out / "eligibility.arrow", config.out / ".build" / "pairs"
    if not source.num_groups or path.exists():
        return
    shutil.rmtree(pairs, ignore_errors=True)
    groups_per_range = max(1, min(source.num_groups, config.memory_limit_bytes // (1 << 16)))  # 4,000 items of 16 bytes per group
    num_ranges = math.ceil(source.num_groups / groups_per_range)
    spill = Spill(pairs, "pairs", num_ranges, config.memory_limit_bytes // 4)
    for batch in tqdm(source.read_eligibility(), desc="eligibility", unit="batch", mininterval=0.5):
        group = batch["group"].to_numpy().astype(np.int64)
        index = _indices(catalogue, batch["item_id"])
        spill.add(group // groups_per_range, pa.table({"pair": group << 32 | index}))
    spill.close()
    temporary = path.with_suffix(".tmp")
    schema = pa.schema([("items", pa.list_(pa.int32()))])
    with pa.ipc.new_file(temporary, schema) as writer:
        for number in range(num_ranges):
            first, last = number * groups_per_range, min((number + 1) * groups_per_range, source.num_groups)
            pair = [np.zeros(0, np.int64), *(batch.column(0).to_numpy() for batch in read_partition(pairs, number))]
            pair = np.concatenate(pair)
            pair.sort()
            pair = pair[np.append(True, pair[1:] != pair[:-1])] if len(pair) else pair
            offsets = np.searchsorted(pair, np.arange(first, last + 1, dtype=np.int64) << 32).astype(np.int32)
            lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array((pair & 0xFFFFFFFF).astype(np.int32)))
            writer.write_batch(pa.record_batch([lists], schema=schema))
    temporary.replace(path)


def _indices(catalogue: Catalogue, item_ids: pa.ChunkedArray) -> np.ndarray:
    """Catalogue indices int64 of known items; each distinct dictionary value is looked up once."""
    parts = [np.zeros(0, np.int64)]
    for chunk in item_ids.chunks:
        if pa.types.is_dictionary(chunk.type):
            parts.append(catalogue.index_of_ids(chunk.dictionary)[chunk.indices.to_numpy()].astype(np.int64))
        else:
            parts.append(catalogue.index_of_ids(chunk).astype(np.int64))
    index = np.concatenate(parts)
    if len(index) and index.min() == NO_ITEM:
        raise DataError(f"eligibility: {int((index == NO_ITEM).sum()):,} rows have no item id; every row needs one")
    return index


# ---------------------------------------------------------------------------------------------------------------- pass 2

def _write_shards(config: BuildConfig, plan: _Plan, run: Run) -> Counter:
    folders = [config.out / "shards" / split for split in SPLITS]
    done = config.out / ".build" / "buckets"
    done.mkdir(exist_ok=True)
    written = set.intersection(*(finished_parts(folder) if not (folder / "manifest.json").exists() else set(range(plan.num_buckets))
                                 for folder in folders))
    left = [bucket for bucket in range(plan.num_buckets) if bucket not in written or not (done / f"{bucket:06d}.json").exists()]
    with tqdm(total=plan.num_buckets, initial=plan.num_buckets - len(left), desc="journeys", unit="bucket", mininterval=0.5) as bar:
        for _ in run(_write_bucket, [(config, plan, bucket) for bucket in left]):
            bar.update()
    counts = Counter()
    for bucket in range(plan.num_buckets):
        counts.update(_read_json(done / f"{bucket:06d}.json"))
    return counts


def _write_bucket(config: BuildConfig, plan: _Plan, bucket: int) -> int:
    """All journeys of one bucket of users → part `bucket` of every split."""
    source, work = _open_once(config, plan), config.out / ".build"
    catalogue = Catalogue(config.out / "catalogue")
    dtype = event_dtype(len(source.user_features), len(source.env_features))
    counts = Counter()
    with ExitStack() as stack:
        writers = {split: stack.enter_context(ShardWriter(config.out / "shards" / split, bucket, config.shards)) for split in SPLITS}
        for part, num_parts in _bucket_parts(work / "events", bucket, dtype, config.memory_limit_bytes):
            events = _records(work / "events", bucket, part, num_parts, plan.num_buckets, dtype)
            users = _users(work, bucket, part, num_parts, plan.num_buckets, len(source.profile_features), events)
            items = catalogue.index_of(events["item"])
            assert not len(items) or items.min() >= 0, "an item of pass 1 is not in the catalogue"
            for split, rows in build_journeys(events, items, users, len(plan.user_features), config.journeys, counts):
                writers[split].write(rows)
    write_atomic(work / "buckets" / f"{bucket:06d}.json", json.dumps(counts).encode())
    return bucket


def _bucket_parts(folder: Path, bucket: int, dtype: np.dtype, memory_limit_bytes: int) -> list[tuple[int, int]]:
    """(part, number of parts): one part, or more when a bucket turned out larger than memory allows; each then reads the bucket again."""
    num_events = sum(batch.num_rows for batch in read_partition(folder, bucket))
    num_parts = max(1, math.ceil(num_events * (_BYTES_PER_EVENT + dtype.itemsize) / memory_limit_bytes))
    return [(part, num_parts) for part in range(num_parts)]


def _in_part(hashes: np.ndarray, part: int, num_parts: int, num_buckets: int) -> np.ndarray:
    """Whether a user of a bucket belongs to its part, an equal range of the hash as the buckets are."""
    return bucket_of(hashes, num_buckets * num_parts) % num_parts == part


def _records(folder: Path, bucket: int, part: int, num_parts: int, num_buckets: int, dtype: np.dtype) -> np.ndarray:
    pieces = [np.zeros(0, dtype)]
    for batch in read_partition(folder, bucket):
        records = batch_to_records(batch, dtype)
        pieces.append(records.copy() if num_parts == 1 else records[_in_part(records["user"], part, num_parts, num_buckets)])
    return np.concatenate(pieces)


def _users(work: Path, bucket: int, part: int, num_parts: int, num_buckets: int, num_features: int, events: np.ndarray) -> Users:
    """The users that have events, sorted by hash. Raises: DataError when two ids share a hash or a user has two profiles."""
    table = read_columns(read_partition(work / "users", bucket), _USER_IDS)
    hashes, ids = table["user"].to_numpy(), table["user_id"].combine_chunks()
    if num_parts > 1:
        mine = np.flatnonzero(_in_part(hashes, part, num_parts, num_buckets))
        hashes, ids = hashes[mine], ids.take(pa.array(mine))
    check_collisions(ids, hashes, "stored user")
    distinct, first = np.unique(hashes, return_index=True)
    profiles = np.zeros((len(distinct), num_features), np.int32)
    if num_features and len(distinct):
        dtype = _profile_dtype(num_features)
        pieces = [batch_to_records(batch, dtype).copy() for batch in read_partition(work / "profiles", bucket)]
        records = np.concatenate([np.zeros(0, dtype), *pieces])
        at = np.minimum(np.searchsorted(distinct, records["user"]), len(distinct) - 1)
        records, at = records[distinct[at] == records["user"]], at[distinct[at] == records["user"]]
        if len(np.unique(at)) < len(at):
            twice = int(np.argmax(np.bincount(at) > 1))
            user = ids[int(first[twice])].as_py()
            raise DataError(f"users table: user {user!r} (as stored) is listed {np.bincount(at)[twice]} times; keep one row per "
                            "user (users.ids=plain names it as the logs do)")
        profiles[at] = records["features"]
    return Users(distinct, ids.take(pa.array(first)), profiles)


def _profile_dtype(num_features: int) -> np.dtype:
    return np.dtype([("user", "<u8"), ("features", "<i4", (num_features,))])


# ----------------------------------------------------------------------------------------------------------------- tools

_opened: dict[str, Source] = {}


def _open_once(config: BuildConfig, plan: _Plan) -> Source:
    """The source of this process: what it caches (sorted promotions, group keys) is made once per process and state of the logs."""
    if plan.key not in _opened:
        _opened.clear()
        _opened[plan.key] = open_source(config.source)
    return _opened[plan.key]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        raise DataError(f"{path} is damaged; remove it and build again") from None


def _report(bad_rows: BadRows, counts: Counter, catalogue: Catalogue, manifests: dict[str, ShardManifest], seconds: float) -> None:
    good = bad_rows.total - bad_rows.bad
    print(f"{good:,} events ({counts['ad events']:,} ads, {counts['organic events']:,} organic), {bad_rows.bad:,} bad rows"
          + (f" ({bad_rows.summary()}; first: {'; '.join(bad_rows.shown)})" if bad_rows.bad else ""))
    print(f"{counts['users']:,} users, {counts['requests']:,} requests, {catalogue.num_items:,} items (catalogue {catalogue.fingerprint})")
    for name, count in sorted(counts.items()):
        if count and name not in ("users", "requests", "ad events", "organic events"):
            print(f"  left out: {count:,} {name}")
    for line in _split_table(manifests[split] for split in SPLITS):
        print(line)
    print(f"{seconds:.1f} s, {good / max(seconds, 1e-9):,.0f} events/s")


def _split_table(manifests: Iterable[ShardManifest]) -> Iterator[str]:
    yield f"{'split':<12}{'rows':>14}{'tokens':>18}{'targets':>16}"
    for manifest in manifests:
        yield f"{manifest.split:<12}{manifest.num_rows:>14,}{manifest.num_tokens:>18,}{manifest.num_targets:>16,}"
