"""Equal work for every rank at every step: arithmetic on the work of a window's rows.

Owns how a window is dealt to streams and steps; `sampler.py` says which rows a window has and which streams a rank reads. balance = work:
`cut_by_work`, then `deal_by_work`; row after row goes to the place that lacks most. balance = rows: `deal_by_rows`. The number of ranks
appears nowhere: a rank owns a contiguous range of streams, and every such range gets its part of the work at every step.
"""

import numpy as np

# N rows of a window, in the epoch's order  C streams  S steps  X problems solved at a time  K rows of a problem  P places of a problem


def work(tokens: np.ndarray, quadratic_at: int) -> np.ndarray:
    """Cost of a journey in units of one token's linear layers: T (1 + T / quadratic_at)."""
    return tokens * (1.0 + tokens / quadratic_at)


def cut_by_work(work_N: np.ndarray, edges: np.ndarray, num_streams: int) -> np.ndarray:
    """Stream of each row, int64 [N]: equal shares of the work, each from the record batches that its part of the window falls on.

    A record batch on a border is read for both sides, so any of its rows may go to either: the heaviest first, each to the side that
    lacks most. A share is thus exact to about a light row, and a rank reads at most one record batch more than its share of the bytes.
    Args: edges: where the record batches end, increasing, the last is N.
    """
    begins = np.concatenate([[0], edges[:-1]])
    ends_N = np.cumsum(work_N)
    share = ends_N[-1] / num_streams
    low, high = ends_N[begins] - work_N[begins], ends_N[edges - 1]
    first = np.minimum(low // share, num_streams - 1).astype(np.int64)
    last = np.clip(np.ceil(high / share).astype(np.int64) - 1, first, num_streams - 1)
    stream_N, batch_N = np.repeat(first, edges - begins), np.repeat(np.arange(len(edges)), edges - begins)
    for num_streams_here in np.unique(last - first + 1):
        if num_streams_here == 1:
            continue
        shared = np.flatnonzero(last - first + 1 == num_streams_here)
        stream_XP = first[shared, None] + np.arange(num_streams_here)
        lacks_XP = np.minimum((stream_XP + 1) * share, high[shared, None]) - np.maximum(stream_XP * share, low[shared, None])
        line = np.full(len(edges), -1)
        line[shared] = np.arange(len(shared))
        rows = np.flatnonzero(line[batch_N] >= 0)
        rows_XK, work_XK = _heaviest_first(rows, line[batch_N[rows]], work_N, len(shared))
        place_XK, _ = to_lightest(work_XK, -lacks_XP)
        stream_N[rows_XK[rows_XK >= 0]] = np.take_along_axis(stream_XP, place_XK, 1)[rows_XK >= 0]
    return stream_N


def deal_by_work(work_N: np.ndarray, stream_N: np.ndarray, num_streams: int, num_steps: int, rng: np.random.Generator) -> np.ndarray:
    """Step of each row, int64 [N]: the work of every stream in equal parts, as far as its rows allow.

    What inequality is left (journeys heavier than a stream's part) is lined up: all streams have their heaviest steps at the same time.
    Steps come in random order, and rows of equal work are interchangeable.
    """
    shuffled = rng.permutation(len(work_N))
    rows_XK, work_XK = _heaviest_first(shuffled, stream_N[shuffled], work_N, num_streams)
    place_XK, load_XS = to_lightest(work_XK, np.zeros((len(rows_XK), num_steps)))
    lightest_first_XS = np.argsort(load_XS, axis=1, kind="stable")
    step_XS = np.empty_like(lightest_first_XS)
    np.put_along_axis(step_XS, lightest_first_XS, rng.permutation(num_steps)[None], 1)
    step_N = np.empty(len(work_N), np.int64)
    step_N[rows_XK[rows_XK >= 0]] = np.take_along_axis(step_XS, place_XK, 1)[rows_XK >= 0]
    return step_N


def to_lightest(work_XK: np.ndarray, load_XP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put the rows of each problem, in order, to the place with the least load; returns places [X, K] and the final loads [X, P]."""
    work_KX, load_XP = np.ascontiguousarray(work_XK.T), load_XP.copy()
    place_KX, offset_X = np.empty(work_KX.shape, np.int64), np.arange(len(load_XP)) * load_XP.shape[1]
    flat_load = load_XP.reshape(-1)
    for work_X, place_X in zip(work_KX, place_KX, strict=True):
        np.argmin(load_XP, axis=1, out=place_X)
        flat_load[offset_X + place_X] += work_X
    return place_KX.T, load_XP


def by_step_and_stream(step_N: np.ndarray, stream_N: np.ndarray, num_steps: int, num_streams: int) -> np.ndarray:
    """Positions in the window as int64 [S, C, g], g = the most rows a stream has in a step; -1 is none."""
    return _table(np.arange(len(step_N)), step_N * num_streams + stream_N, num_steps * num_streams).reshape(num_steps, num_streams, -1)


def _heaviest_first(rows: np.ndarray, line: np.ndarray, work_N: np.ndarray, num_lines: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each line and their work, [lines, K]; padded with row -1 of no work."""
    rows_XK = _table(rows, line, num_lines)
    work_XK = np.where(rows_XK >= 0, work_N[rows_XK], 0.0)
    order_XK = np.argsort(-work_XK, axis=1, kind="stable")
    return np.take_along_axis(rows_XK, order_XK, 1), np.take_along_axis(work_XK, order_XK, 1)


def _table(rows: np.ndarray, line: np.ndarray, num_lines: int) -> np.ndarray:
    """Rows of each line, in the given order, padded with -1."""
    by_line = np.argsort(line.astype(np.min_scalar_type(num_lines)), kind="stable")  # up to 16 bits are sorted in linear time
    count = np.bincount(line, minlength=num_lines)
    table_XK = np.full((num_lines, int(count.max())), -1)
    table_XK[np.repeat(np.arange(num_lines), count), np.arange(len(line)) - np.repeat(np.cumsum(count) - count, count)] = rows[by_line]
    return table_XK


def deal_by_rows(work_Cn: np.ndarray, count: np.ndarray, rng: np.random.Generator, step_rows: int) -> np.ndarray:
    """Order each stream's window so that at every step every range of streams has nearly the same work.

    Within a stream, rows are bundled into steps of equal work: heaviest rows first, each to the lightest step so far. Streams with
    few rows a step are then combined in small groups, the heavy steps of one with the light steps of the other. What inequality is
    left (journeys heavier than a fair share) is lined up, so that all groups have their heavy steps at the same time; the order of
    steps is random. Returns: int64 [C, n], positions into the window; the incomplete last step of an epoch comes last.
    """
    num_streams, width = work_Cn.shape
    dealt_Cn = np.tile(np.arange(width), (num_streams, 1))
    num_steps = int(count.min()) // step_rows
    if num_steps == 0:
        return dealt_Cn
    whole = num_steps * step_rows
    shuffled_Cn = rng.permuted(dealt_Cn[:, :whole], axis=1)  # rows of equal work in random order
    heaviest_first = np.argsort(-np.take_along_axis(work_Cn, shuffled_Cn, 1), axis=1, kind="stable")
    ranked_Cgm = np.take_along_axis(shuffled_Cn, heaviest_first, 1).reshape(num_streams, step_rows, num_steps)
    bundles_Cgm = np.empty_like(ranked_Cgm)
    load_Cm = np.zeros((num_streams, num_steps))
    for ranked_Cm, bundle_Cm in zip(ranked_Cgm.swapaxes(0, 1), bundles_Cgm.swapaxes(0, 1), strict=True):
        lightest_first = np.argsort(load_Cm, axis=1, kind="stable")
        np.put_along_axis(bundle_Cm, lightest_first, ranked_Cm, 1)
        load_Cm += np.take_along_axis(work_Cn, bundle_Cm, 1)
    order_Cm = _line_up(load_Cm, _group_size(step_rows))[:, rng.permutation(num_steps)]
    dealt_Cn[:, :whole] = np.take_along_axis(bundles_Cgm, order_Cm[:, None, :], 2).swapaxes(1, 2).reshape(num_streams, whole)
    return dealt_Cn


def _line_up(load_Cm: np.ndarray, group: int) -> np.ndarray:
    """Order of each stream's steps, int64 [C, m]: within a group loads even out, and every group goes from light to heavy."""
    order_Cm = np.argsort(load_Cm, axis=1, kind="stable")
    load_Um = np.take_along_axis(load_Cm, order_Cm, 1)
    unit_C = np.arange(len(load_Cm))
    size = 1
    while size < group and len(load_Um) > 1:
        second_C = unit_C % 2 == 1
        order_Cm[second_C] = order_Cm[second_C, ::-1]
        load_Um[1::2] = load_Um[1::2, ::-1]
        load_Um = np.add.reduceat(load_Um, np.arange(0, len(load_Um), 2), axis=0)
        unit_C = unit_C // 2
        lightest_first = np.argsort(load_Um, axis=1, kind="stable")
        load_Um = np.take_along_axis(load_Um, lightest_first, 1)
        order_Cm = np.take_along_axis(order_Cm, lightest_first[unit_C], 1)
        size *= 2
    return order_Cm


_GROUP_ROWS = 8
"""Rows a group of streams takes per step at least. Fewer would make whole steps of long or of short journeys; more leaves ranks that
own only a part of a group unequal work."""


def _group_size(step_rows: int) -> int:
    return max(1, 2 ** int(np.ceil(np.log2(_GROUP_ROWS / step_rows))))
