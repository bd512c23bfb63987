"""Counts of shown ads against a walk over the rows, and over any number of ranks."""

import numpy as np
from journeys_fixture import NUM_ITEMS, random_journeys, write_split

from data_pipeline.shards import ShardConfig
from gpr_dist.data.counts import count_ads
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.schema import TokenType


def test_counts_equal_a_walk_and_ranks_add_up(tmp_path):
    journeys = random_journeys(57, seed=4)
    write_split(tmp_path, journeys, ShardConfig(rows_per_batch=5))
    expected = np.zeros(NUM_ITEMS)
    for row in journeys.to_pylist():
        end = len(row["item"]) - row["num_lookahead"]
        for kind, item in list(zip(row["token_type"], row["item"], strict=True))[row["num_context"] : end]:
            if kind == TokenType.I:
                expected[item] += 1
    reader = ShardReader(tmp_path)
    for size in (1, 3, 20):
        assert np.array_equal(sum(count_ads(reader, World(rank, size), NUM_ITEMS) for rank in range(size)), expected)
