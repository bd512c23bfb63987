"""How often each item occurs in a split: the weights of the training softmax's prior, and popularity.

Memory is that of the counts, whatever the size of the log; each rank counts a share of the record batches, and the ranks' sums add up.
"""

from collections.abc import Iterator

import numpy as np

from gpr_dist.data.collate import JourneyColumns
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.schema import TokenType


def count_ads(reader: ShardReader, world: World, num_items: int) -> np.ndarray:
    """Ads of this rank's share of the split (every world.size-th record batch), float64 [num_items].

    A journey's ads count where they are targets, so overlapping segments count nothing twice.
    """
    counts = np.zeros(num_items)
    for tokens in _fresh_tokens(reader, world):
        counts += np.bincount(tokens["item"][tokens["token_type"] == TokenType.I], minlength=num_items)
    return counts


def count_events(reader: ShardReader, world: World, num_items: int, recent_from: float) -> np.ndarray:
    """Events, ads, and ads later than `recent_from` (seconds) of each item, in this rank's share, float64 [3, num_items]."""
    counts = np.zeros((3, num_items))
    for tokens in _fresh_tokens(reader, world):
        item, is_ad = tokens["item"], tokens["token_type"] == TokenType.I
        is_recent = tokens["timestamp"] > recent_from
        for place, counted in enumerate((is_ad | (tokens["token_type"] == TokenType.O), is_ad, is_ad & is_recent)):
            counts[place] += np.bincount(item[counted], minlength=num_items)
    return counts


def _fresh_tokens(reader: ShardReader, world: World) -> Iterator[dict[str, np.ndarray]]:
    """Columns of the tokens that each row has as the only one: neither history nor look-ahead."""
    for number in range(world.rank, reader.num_batches, world.size):
        batch = reader.read_batch_or_skip(number)
        if batch is None:
            continue
        journeys = JourneyColumns.of(batch)
        lengths = np.diff(journeys.token_offsets)
        place = np.arange(lengths.sum()) - np.repeat(journeys.token_offsets[:-1], lengths)
        fresh = (place >= np.repeat(journeys.num_context, lengths)) & (place < np.repeat(lengths - journeys.num_lookahead, lengths))
        yield {name: journeys.tokens[name][fresh] for name in ("token_type", "item", "timestamp")}
