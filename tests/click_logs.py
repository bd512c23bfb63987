"""A tiny data set whose clicks follow a rule, for tests of the simulator: users click ads of their own topic, and some ads convert."""

import json
import random

import numpy as np
import pyarrow as pa

from data_pipeline.shards import ShardConfig, ShardWriter, write_manifest
from gpr_dist.schema import EVERY_AD, JOURNEY_SCHEMA, NO_ITEM, Action, TokenType
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.fit import fit_tokenizer
from gpr_dist.tokenizer.semantic_ids import SemanticIds

NUM_ITEMS, NUM_ADS, NUM_TOPICS = 60, 40, 4  # items 0..39 are ads; an item's topic is its number modulo 4
EVEN_ADS = list(range(0, NUM_ADS, 2))
CATALOGUE = "c0ffee"
ROWS = {"train": 240, "validation": 160, "test": 80}
DAY_S = 86_400


def write_click_logs(folder, rows=ROWS, action_of=None, values=True) -> SemanticIds:
    """A data folder: catalogue, one eligibility group beside EVERY_AD, shards, tokenizer.

    Args: action_of: draws an ad's action instead of the rule. values: whether value and pctr are logged.
    """
    kind = np.array([1] * NUM_ADS + [0] * (NUM_ITEMS - NUM_ADS), np.uint8)
    table = pa.table({"item_id": [f"item-{item}" for item in range(NUM_ITEMS)], "kind": kind, "bid": np.arange(NUM_ITEMS) / 10 + 1,
                      "advertiser": [f"a{item % 3}" for item in range(NUM_ITEMS)]})
    (folder / "catalogue").mkdir(parents=True)
    write_table(table, folder / "catalogue" / "catalogue.arrow")
    (folder / "catalogue" / "catalogue.json").write_text(json.dumps({"num_items": NUM_ITEMS, "fingerprint": CATALOGUE}))
    write_table(pa.table({"items": pa.array([EVEN_ADS], pa.list_(pa.int32()))}), folder / "eligibility.arrow")
    rng = random.Random(0)
    for number, (split, num_rows) in enumerate(rows.items()):
        journeys = [journey(rng, f"{split}-{row}", (20_000 + 30 * number) * DAY_S, action_of, values) for row in range(num_rows)]
        with ShardWriter(folder / "shards" / split, 0, ShardConfig(rows_per_batch=32, rows_per_shard=200)) as writer:
            writer.write(pa.RecordBatch.from_pylist(journeys, JOURNEY_SCHEMA))
        write_manifest(folder / "shards" / split, split, ("age",), ("slot",), CATALOGUE, NUM_ITEMS)
    return tokenizer().save(folder / "tokenizer")


def tokenizer(seed=0, catalogue=CATALOGUE) -> SemanticIds:
    """Semantic IDs whose first code is nearly the topic."""
    rng = np.random.default_rng(seed)
    content = 3 * np.eye(NUM_TOPICS)[np.arange(NUM_ITEMS) % NUM_TOPICS] + rng.normal(0, 0.5, (NUM_ITEMS, NUM_TOPICS))
    return fit_tokenizer(content.astype(np.float32), TokenizerConfig(num_levels=2, codebook_size=8, device="cpu"), catalogue)


def click_rate(topic, ad) -> float:
    return 0.6 if ad % NUM_TOPICS == topic else 0.1


def conversion_rate(ad) -> float:
    return 0.6 if ad < NUM_ADS // 2 else 0.1


def journey(rng, user_id, start, action_of, values) -> dict:
    topic, time, tokens, groups = rng.randrange(NUM_TOPICS), start + rng.randrange(DAY_S), [], []
    tokens.append((TokenType.U, 0, NO_ITEM, Action.NONE, time))
    for block in range(rng.randint(6, 10)):
        for _ in range(rng.randint(1, 3)):
            time += rng.randrange(1, 4000)
            wanted = topic if rng.random() < 0.8 else rng.randrange(NUM_TOPICS)
            tokens.append((TokenType.O, block, NUM_ADS + rng.randrange(5) * NUM_TOPICS + wanted, Action.CONSUME, time))
        time += rng.randrange(1, 4000)
        tokens.append((TokenType.E, block, NO_ITEM, Action.NONE, time))
        groups.append(rng.choice([EVERY_AD, 0]))
        ad = rng.choice(range(NUM_ADS) if groups[-1] == EVERY_AD else EVEN_ADS)
        clicked = rng.random() < click_rate(topic, ad)
        converted = clicked and rng.random() < conversion_rate(ad)
        action = Action.CONVERSION if converted else Action.CLICK if clicked else Action.IMPRESSION
        tokens.append((TokenType.I, block, ad, action_of(rng) if action_of else action, time))
    kinds, blocks, items, actions, times = (list(column) for column in zip(*tokens, strict=True))
    is_ad = [kind == TokenType.I for kind in kinds]
    return {"user_id": user_id, "num_context": 1, "num_lookahead": 0, "token_type": kinds, "block": blocks, "item": items,
            "action": actions, "scene": [0] * len(tokens), "timestamp": times, "eligibility": groups, "user_features": [7],
            "env_features": [rng.randrange(1, 4) for kind in kinds if kind == TokenType.E],
            "value": [200.0 * (item / 10 + 1) if ad and values else np.nan for item, ad in zip(items, is_ad, strict=True)],
            "pctr": [0.2 if ad and values else np.nan for ad in is_ad],
            "pcvr": [float("nan")] * len(tokens)}


def write_table(table, path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
