"""What requests may be shown: their groups, placements, own lists, exclusions, and the bundle's rules, as the search asks for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from torch import Tensor

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.decoding.legality import Eligible, Legal, LegalCache, pack_slots
from gpr_dist.decoding.trie import Trie
from gpr_dist.hashing import hash_strings
from gpr_dist.schema import EVERY_AD, NO_ITEM
from gpr_dist.serving.prompts import Prompts, ranges
from gpr_dist.serving.requests import flat
from gpr_dist.serving.rules import Rules

# R requests  B of them decoded together  Gr audiences  X (request, item) pairs

IndexOf = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Wishes:
    """What R requests ask for."""

    group_R: np.ndarray  # int64: EVERY_AD, a row of eligibility.arrow, or, below EVERY_AD, a key of `lists`
    lists: dict[int, np.ndarray]  # sorted catalogue indices
    request_X: np.ndarray  # int64, ascending: who must not be shown ...
    item_X: np.ndarray  # ... which item
    unknown_R: np.ndarray  # int64, ids that the catalogue does not have
    audience: pa.StructArray | None  # what the rules read, if they read anything
    key_R: np.ndarray  # int64, number of each request

    def excluded(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place in `rows`, item) pairs."""
        first = np.searchsorted(self.request_X, rows)
        count = np.searchsorted(self.request_X, rows, side="right") - first
        return np.repeat(np.arange(len(rows)), count), self.item_X[ranges(first, count)]


@dataclass(frozen=True)
class Shown:
    """What B requests may be shown."""

    eligible: Eligible  # for the search
    audience_B: np.ndarray  # int64 into `lists`
    items_of: Callable[[], list[np.ndarray]]
    exclude: tuple[np.ndarray, np.ndarray]  # (request_X, item_X)

    @cached_property
    def lists(self) -> list[np.ndarray]:
        """Sorted catalogue indices of each audience."""
        return self.items_of()


def read_wishes(requests: pa.RecordBatch, prompts: Prompts, placements: Mapping[str, int], index_of: IndexOf, trie: Trie,
                rules: Rules | None) -> Wishes:
    """Look up the ads that requests name. Distinct lists of eligible ads are known by a hash of their content, below EVERY_AD."""
    ids, owner = flat(requests["eligible"])
    items, num = index_of(hash_strings(ids)), requests.num_rows
    out_ids, out_owner = flat(requests["exclude"])
    out_items = index_of(hash_strings(out_ids))
    unknown_R = np.bincount(owner[items == NO_ITEM], minlength=num) + np.bincount(out_owner[out_items == NO_ITEM], minlength=num)
    group_R = requests["group"].fill_null(EVERY_AD).to_numpy(zero_copy_only=False).astype(np.int64)
    place_R = pc.index_in(requests["placement"], pa.array(list(placements), pa.string())).fill_null(-1).to_numpy()
    group_R = np.where(place_R >= 0, np.array([*placements.values(), 0])[place_R], group_R)
    bounds, lists = np.searchsorted(owner, np.arange(num + 1)), {}
    for row in np.flatnonzero(requests["eligible"].is_valid().to_numpy(zero_copy_only=False)).tolist():
        own = np.unique(items[bounds[row]:bounds[row + 1]])
        own = own[trie.contains(torch.from_numpy(own)).cpu().numpy()]  # ads of the catalogue
        group_R[row] = EVERY_AD - 1 - (xxhash.xxh3_64_intdigest(own.tobytes()) >> 2)
        lists[int(group_R[row])] = own
    known = out_items != NO_ITEM
    request_X, item_X = out_owner[known], out_items[known].astype(np.int64)
    if rules is not None and rules.caps_I:
        capped = rules.capped(*_past_ads(requests, index_of))
        request_X, item_X = np.concatenate([request_X, capped[0]]), np.concatenate([item_X, capped[1]])
        order = np.argsort(request_X, kind="stable")
        request_X, item_X = request_X[order], item_X[order]
    audience = requests["audience"] if rules is not None and rules.fields else None
    return Wishes(group_R, lists, request_X, item_X, unknown_R, audience, prompts.key)


def _past_ads(requests: pa.RecordBatch, index_of: IndexOf) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(request, catalogue index, seconds ago) of the known ads in all histories."""
    events, owner = flat(requests["history"])
    item = index_of(hash_strings(pc.struct_field(events, "item_id"))).astype(np.int64)
    now = requests["time"].to_numpy(zero_copy_only=False).astype(np.int64)
    age_s = now[owner] - pc.struct_field(events, "time").to_numpy(zero_copy_only=False)
    is_ad = pc.equal(pc.struct_field(events, "type"), "ad").to_numpy(zero_copy_only=False)
    kept = np.flatnonzero(np.asarray(is_ad, bool) & (item != NO_ITEM) & (age_s > 0))
    return owner[kept], item[kept], age_s[kept]


class Audiences:
    """Who may be shown what, of one bundle."""

    def __init__(self, trie: Trie, eligibility: Eligibility, rules: Rules | None) -> None:
        self.trie, self.eligibility, self.rules = trie, eligibility, rules
        self._lists: dict[int, np.ndarray] = {}
        self._legal = LegalCache(trie, self._items)

    def __call__(self, wishes: Wishes, rows: np.ndarray) -> Shown:
        """Of the requests of a micro-batch."""
        self._lists, exclude = wishes.lists, wishes.excluded(rows)
        legal, group_B = self._legal(torch.from_numpy(wishes.group_R[rows]))
        groups = np.unique(wishes.group_R[rows]).tolist()
        items_of = lambda: [self._items(group) for group in groups]  # noqa: E731
        if self.rules is not None:
            legal, group_B = self._ruled(legal, group_B, wishes, rows)
            items_of = lambda: self._slot_items(legal)  # noqa: E731
        eligible = Eligible.of(self.trie, legal, group_B, (torch.from_numpy(exclude[0]), torch.from_numpy(exclude[1])))
        return Shown(eligible, group_B.cpu().numpy(), items_of, exclude)

    def _ruled(self, legal: Legal, group_B: Tensor, wishes: Wishes, rows: np.ndarray) -> tuple[Legal, Tensor]:
        """Distinct pairs of a group and an audience of the rules."""
        audience = None if wishes.audience is None else wishes.audience.take(pa.array(rows))
        packed_AY, audience_B = self.rules.audiences(audience, wishes.key_R[rows])
        pair_G, group_B = torch.unique(group_B * len(packed_AY) + audience_B, return_inverse=True)
        slots_GY = pack_slots(legal[-1])[pair_G // len(packed_AY)] & packed_AY[pair_G % len(packed_AY)]
        return Legal.from_slots(self.trie, slots_GY), group_B

    def _slot_items(self, legal: Legal) -> list[np.ndarray]:
        slot_item = self.trie.slot_item.cpu().numpy()
        return [np.sort(slot_item[row]) for row in legal[-1].cpu().numpy()]

    def _items(self, group: int) -> np.ndarray:
        """Sorted catalogue indices of an eligibility group, or of a request's own list."""
        return self._lists[group] if group < EVERY_AD else self.eligibility.items(group)
