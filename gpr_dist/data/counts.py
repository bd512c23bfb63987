"""How often each item was shown in a split: the weights of the training softmax's prior."""

import numpy as np

from gpr_dist.data.collate import JourneyColumns
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.schema import TokenType


def count_ads(reader: ShardReader, world: World, num_items: int) -> np.ndarray:
    """Ads of this rank's share of the split (every world.size-th record batch), float64 [num_items]; the ranks' sums add up.

    A journey's ads count where they are targets, so overlapping segments count nothing twice.
    """
    counts = np.zeros(num_items)
    for number in range(world.rank, reader.num_batches, world.size):
        batch = reader.read_batch_or_skip(number)
        if batch is None:
            continue
        journeys = JourneyColumns.of(batch)
        lengths = np.diff(journeys.token_offsets)
        place = np.arange(lengths.sum()) - np.repeat(journeys.token_offsets[:-1], lengths)
        fresh = (place >= np.repeat(journeys.num_context, lengths)) & (place < np.repeat(lengths - journeys.num_lookahead, lengths))
        shown = fresh & (journeys.tokens["token_type"] == TokenType.I)
        counts += np.bincount(journeys.tokens["item"][shown], minlength=num_items)
    return counts
