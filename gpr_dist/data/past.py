"""What a request may repeat: the user's own earlier events whose items are eligible at it, as pairs (request, event) of a batch.

Events are the O and I tokens of the request's row up to its prediction site, and those older than the row (`gpr_dist/data/history.py`,
where a data set has them). Eligibility is asked once per row and group for the row's distinct items; the rest is vectorised over the
batch. A logged ad that was not eligible at its own request is no pair, so that what can be copied never depends on the answer.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.history import UserHistory
from gpr_dist.errors import ConfigError
from gpr_dist.schema import Batch, ShardManifest

# B rows  T packed tokens  X older events  S events of both kinds, sorted  G runs of equal items in S  R requests  M pairs  N targets
# L levels  V codes per level


class PastItems:
    """Finds the pairs of a batch."""

    def __init__(self, codes_ML: np.ndarray, codebook_size: int, eligibility: Eligibility, folder: Path | None = None,
                 most: int = 0) -> None:
        """Args: folder: history of the data set, of which `most` events are read for a row; none = only the rows themselves."""
        num_levels = codes_ML.shape[1]
        if num_levels * np.log2(codebook_size) > 46:  # the rest of an int64 numbers the requests of a batch
            raise ConfigError(f"{num_levels} levels of {codebook_size} codes do not fit the packed keys of the pointer; set "
                              "model.pointer.width=0 or use a smaller codebook")
        self.codebook_size, self.num_levels = codebook_size, num_levels
        self._codes_ML, self._eligibility, self._folder, self._most = codes_ML, eligibility, folder, most

    def open_history(self, split: ShardManifest) -> UserHistory | None:
        return UserHistory(self._folder, split, self._most) if self._folder and self._most else None

    def add_to(self, batch: Batch, history: UserHistory | None = None) -> Batch:
        """The batch with `copy_request_M`, `copy_source_M` (sorted by request, then by semantic ID) and `target_copy_NL2`; and with the
        events older than its rows if there is a history of its split."""
        if history is not None:
            offsets, events = history.gather(batch.row_ids_B.numpy())
            item, time, action = (torch.from_numpy(events[name]) for name in ("item", "time", "action"))
            codes = torch.from_numpy(self._codes_ML[events["item"]].astype(np.int64))
            batch = replace(batch, past_offsets_B1=torch.from_numpy(offsets), past_item_X=item, past_codes_XL=codes, past_time_X=time,
                            past_action_X=action)
        events = self._sorted_events(batch)
        request_M, event_M = self._pairs(batch, events)
        span = self.codebook_size**self.num_levels
        pair_key_M = request_M * span + events["key"][event_M]
        target_NL2 = np.empty((len(batch.target_request_N), self.num_levels, 2), np.int64)
        prefix_N = batch.target_request_N.numpy()
        for level, codes_N in enumerate(batch.target_codes_NL.numpy().T):
            prefix_N = prefix_N * self.codebook_size + codes_N
            below = self.codebook_size ** (self.num_levels - level - 1)
            target_NL2[:, level, 0] = np.searchsorted(pair_key_M, prefix_N * below)
            target_NL2[:, level, 1] = np.searchsorted(pair_key_M, (prefix_N + 1) * below)
        return replace(batch, copy_request_M=torch.from_numpy(request_M), copy_source_M=torch.from_numpy(events["source"][event_M]),
                       target_copy_NL2=torch.from_numpy(target_NL2))

    def _sorted_events(self, batch: Batch) -> dict[str, np.ndarray]:
        """All events of the batch, sorted by row and semantic ID."""
        token = np.flatnonzero(batch.item_T.numpy() >= 0)
        row = np.searchsorted(batch.offsets_B1.numpy(), token, side="right") - 1
        item, codes = batch.item_T.numpy()[token], batch.codes_TL.numpy()[token]
        source, last_seen = token, token  # requests whose site comes before this position do not see the event
        if batch.past_item_X is not None:
            offsets = batch.past_offsets_B1.numpy()
            row = np.concatenate([row, np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))])
            item, codes = np.concatenate([item, batch.past_item_X.numpy()]), np.concatenate([codes, batch.past_codes_XL.numpy()])
            older = np.arange(len(batch.past_item_X))
            source, last_seen = np.concatenate([source, batch.num_tokens + older]), np.concatenate([last_seen, np.full(len(older), -1)])
        key = np.zeros(len(item), np.int64)
        for codes_S in codes.T:
            key = key * self.codebook_size + codes_S
        order = np.argsort(row * self.codebook_size**self.num_levels + key, kind="stable")
        return {name: values[order] for name, values in
                {"row": row, "key": key, "item": item, "source": source, "last_seen": last_seen}.items()}

    def _pairs(self, batch: Batch, events: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns: requests [M] ascending, and places in `events` [M], ascending within a request."""
        row, item = events["row"], events["item"]
        starts = np.ones(len(row), bool)
        starts[1:] = (row[1:] != row[:-1]) | (item[1:] != item[:-1])
        run_start = np.flatnonzero(starts)
        run_length = np.diff(run_start, append=len(row))
        run_item = item[run_start].astype(np.int32)  # as the groups store them: searchsorted would convert the longer one
        first_run = np.searchsorted(row[run_start], np.arange(batch.num_rows + 1))

        # Distinct (row, group) pairs, and which runs of the row are eligible in the group
        request_row, group = batch.request_row_R.numpy(), batch.request_eligibility_R.numpy()
        low = group.min(initial=0)
        asked, asked_R = np.unique(request_row * (group.max(initial=0) - low + 1) + group - low, return_index=True, return_inverse=True)[1:]
        eligible_runs = []
        for at_row, at_group in zip(request_row[asked].tolist(), group[asked].tolist(), strict=True):
            items, first = self._eligibility.items(at_group), first_run[at_row]
            wanted = run_item[first:first_run[at_row + 1]]
            if len(items):
                found = items.take(items.searchsorted(wanted), mode="clip") == wanted
                eligible_runs.append(np.flatnonzero(found) + first)
            else:
                eligible_runs.append(np.empty(0, np.int64))
        num_runs = np.array([len(runs) for runs in eligible_runs], np.int64)
        runs = np.concatenate([*eligible_runs, np.empty(0, np.int64)])

        request, place = _expand((np.cumsum(num_runs) - num_runs)[asked_R], num_runs[asked_R])
        run = runs[place]
        at_run, event = _expand(run_start[run], run_length[run])
        request = request[at_run]
        seen = np.flatnonzero(events["last_seen"][event] <= batch.request_token_R.numpy()[request])
        return request[seen], event[seen]


def _expand(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(which range, number) of all numbers starts[i] .. starts[i] + lengths[i] - 1."""
    owner = np.repeat(np.arange(len(starts)), lengths)
    return owner, np.arange(len(owner)) + (starts - np.cumsum(lengths) + lengths)[owner]
