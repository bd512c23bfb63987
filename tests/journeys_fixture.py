"""Random journeys for tests: every shape the schema allows, as plain Python dictionaries (slow and obvious on purpose)."""

import random
from pathlib import Path

import pyarrow as pa

from data_pipeline.shards import ShardConfig, ShardWriter, write_manifest
from gpr_dist.data.rows import StoredRows
from gpr_dist.schema import EVERY_AD, JOURNEY_SCHEMA, NO_ITEM, Action, ShardManifest, TokenType

NUM_ITEMS = 50
USER_FEATURES, ENV_FEATURES = ("age", "town"), ("store", "slot", "hour")


def random_journeys(num_rows: int, seed: int = 0, max_requests: int = 12) -> pa.RecordBatch:
    """Journeys with and without U, O, E, several ads per request, context and lookahead."""
    rng = random.Random(seed)
    return pa.RecordBatch.from_pylist([_journey(rng, number, max_requests) for number in range(num_rows)], JOURNEY_SCHEMA)


def write_split(folder: Path, journeys: pa.RecordBatch, config: ShardConfig | None = None, num_parts: int = 1) -> ShardManifest:
    """Write journeys to a split folder, cut evenly into parts."""
    bounds = [len(journeys) * part // num_parts for part in range(num_parts + 1)]
    for part in range(num_parts):
        with ShardWriter(folder, part, config or ShardConfig(rows_per_batch=8, rows_per_shard=40)) as writer:
            writer.write(journeys.slice(bounds[part], bounds[part + 1] - bounds[part]))
    return write_manifest(folder, "train", USER_FEATURES, ENV_FEATURES, "c0ffee", NUM_ITEMS)


def stored_rows(batch: pa.RecordBatch) -> StoredRows:
    """The rows as the loader holds them when they were read from a file."""
    return StoredRows.of([pa.ipc.read_record_batch(batch.serialize(), batch.schema)], batch.schema.names)


def _journey(rng: random.Random, number: int, max_requests: int) -> dict:
    shape = {kind: rng.random() < 0.6 for kind in ("row_user", "block_user", "organic", "environment", "many_ads")}
    tokens: list[tuple[int, int]] = [(TokenType.U, 0)] if shape["row_user"] else []
    num_blocks = rng.randint(1, max_requests)
    block_starts = []
    for block in range(num_blocks):
        block_starts.append(len(tokens))
        tokens += [(TokenType.U, block)] * (shape["block_user"] and rng.random() < 0.5)
        tokens += [(TokenType.O, block)] * (rng.randint(0, 3) if shape["organic"] else 0)
        tokens += [(TokenType.E, block)] * (shape["environment"] and rng.random() < 0.8)
        tokens += [(TokenType.I, block)] * (rng.randint(1, 4) if shape["many_ads"] else 1)
    num_lookahead = rng.choice([0, 0, 1, 3, 7])
    for ahead in range(num_lookahead):
        tokens.append((TokenType.I, num_blocks + ahead))
    num_context = rng.choice([0 if not shape["row_user"] else 1, rng.choice(block_starts)])
    types, blocks = [t for t, _ in tokens], [b for _, b in tokens]
    shown = [t in (TokenType.O, TokenType.I) for t in types]
    actions = {TokenType.U: [Action.NONE], TokenType.E: [Action.NONE], TokenType.O: [Action.CONSUME],
               TokenType.I: [Action.IMPRESSION, Action.CLICK, Action.CONVERSION]}
    time = rng.randint(1_500_000_000, 1_600_000_000)
    steps = [rng.randint(0, 5000) for _ in tokens]
    return {
        "user_id": f"user-{number}", "num_context": num_context, "num_lookahead": num_lookahead, "token_type": types, "block": blocks,
        "item": [rng.randrange(NUM_ITEMS) if s else NO_ITEM for s in shown], "action": [rng.choice(actions[t]) for t in types],
        "scene": [rng.randrange(1000) for _ in tokens], "timestamp": [time + sum(steps[:i + 1]) for i in range(len(steps))],
        "value": [rng.random() if s and rng.random() < 0.7 else float("nan") for s in shown],
        "pctr": [rng.random() if t == TokenType.I else float("nan") for t in types],
        "pcvr": [rng.random() if t == TokenType.I else float("nan") for t in types],
        "user_features": [rng.randrange(2**31) for t in types if t == TokenType.U for _ in USER_FEATURES],
        "env_features": [rng.randrange(2**31) for t in types if t == TokenType.E for _ in ENV_FEATURES],
        "eligibility": [rng.choice([EVERY_AD, rng.randrange(5)]) for _ in range(max(blocks) + 1)],
    }
