"""Journeys of a few users with known events, cut into overlapping rows as in the shards, for the tests of evaluation."""

import numpy as np
import pyarrow as pa

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.evaluation.baselines import DAY_S
from gpr_dist.schema import EVERY_AD, JOURNEY_SCHEMA, NO_ITEM, TokenType

NUM_ITEMS = 25
CUTS = {"train": (0, 60), "validation": (60, 80), "test": (80, 100)}  # days
GROUPS = [[1, 2, 3, 5, 8, 13, 21], [4, 9], [], list(range(0, 25, 2))]
ADS = [*range(0, 20), 21]


def random_users(seed):
    """user -> requests in time order: (time, group, organic (item, time) strictly earlier, ads)."""
    rng, users = np.random.default_rng(seed), {}
    for user in range(12):
        moments = np.sort(rng.choice(100, rng.integers(2, 12), replace=False)) * DAY_S
        requests, previous = [], 0
        for moment in moments.tolist():
            organic = sorted((int(rng.integers(previous, moment)), int(rng.integers(NUM_ITEMS)))
                             for _ in range(rng.integers(0, 4)) if moment > previous)
            ads = rng.choice(ADS, rng.integers(1, 4)).tolist()
            requests.append((moment, int(rng.integers(-1, len(GROUPS))), [(item, time) for time, item in organic], ads))
            previous = moment
        users[f"user-{user}"] = requests
    return users


def tokens_of(request, with_env):
    moment, _, organic, ads = request
    env = [(TokenType.E, NO_ITEM, moment)] if with_env else []
    return [(TokenType.O, item, time) for item, time in organic] + env + [(TokenType.I, item, moment) for item in ads]


def value_of(token):
    return float(token[1] % 5) if token[0] == TokenType.I and token[1] % 4 else float("nan")


def to_batches(users, with_env=True, rows_per_batch=5):
    """Split -> record batches: rows of up to 2 new requests, before them up to 2 requests of history, after them up to 3 ads."""
    batches = {}
    for split, (first, last) in CUTS.items():
        rows = []
        for user, requests in users.items():
            mine = [number for number, request in enumerate(requests) if first * DAY_S <= request[0] < last * DAY_S]
            for start in range(0, len(mine), 2):
                new = mine[start : start + 2]
                context = range(max(0, new[0] - 2), new[0])
                tokens, blocks = [], []
                for number in [*context, *new]:
                    block = tokens_of(requests[number], with_env)
                    tokens, blocks = tokens + block, blocks + [number - context.start] * len(block)
                num_context = sum(len(tokens_of(requests[number], with_env)) for number in context)
                later = [(number, token) for number in mine[start + 2 :] for token in tokens_of(requests[number], with_env)]
                later = [(number, token) for number, token in later if token[0] == TokenType.I][:3]
                tokens, blocks = tokens + [ad for _, ad in later], blocks + [number - context.start for number, _ in later]
                groups = [requests[number][1] for number in range(context.start, context.start + blocks[-1] + 1)]
                rows.append({"user_id": user, "num_context": num_context, "num_lookahead": len(later),
                             "token_type": [token[0] for token in tokens], "item": [token[1] for token in tokens],
                             "timestamp": [token[2] for token in tokens], "block": blocks, "eligibility": groups,
                             "scene": [token[1] % 3 for token in tokens], "value": [value_of(token) for token in tokens],
                             "env_features": [token[2] // DAY_S % 7 for token in tokens if token[0] == TokenType.E]})
        rows = [{field.name: [] for field in JOURNEY_SCHEMA if pa.types.is_list(field.type)}
                | {name: [0] * len(row["item"]) for name in ("action", "pctr", "pcvr")} | row for row in rows]
        batches[split] = pa.Table.from_pylist(rows, schema=JOURNEY_SCHEMA).to_batches(max_chunksize=rows_per_batch)
    return batches


def events_of(users):
    for user, requests in users.items():
        for moment, _, organic, ads in requests:
            yield from ((user, item, time, False, split_of(moment)) for item, time in organic)
            yield from ((user, item, moment, True, split_of(moment)) for item in ads)


def split_of(moment):
    return next(split for split, (first, last) in CUTS.items() if first * DAY_S <= moment < last * DAY_S)


def eligibility():
    return Eligibility([np.array(group, dtype=np.int32) for group in GROUPS], np.array(ADS, dtype=np.int32), NUM_ITEMS)


def eligible_items(group):
    return ADS if group == EVERY_AD else GROUPS[group]
