"""A bundle in memory that answers requests: prompts → beam search over the trie → ads with scores and values.

Loads with torch only: no deepspeed, no wandb, no training code (a test holds it to that). The search is that of launch/evaluate.py, so
the answers are the checkpoint's.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from gpr_dist.bundle import WEIGHTS, BundleManifest, check_name, read_manifest, verify
from gpr_dist.config import build_config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.past import PastItems
from gpr_dist.decoding.legality import Eligible, LegalCache
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.decoding.ranking import rank_items
from gpr_dist.decoding.search import search
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import CheckpointError
from gpr_dist.hashing import hash_strings
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.schema import EVERY_AD, NO_ITEM, Batch
from gpr_dist.serving.export import CALIBRATION, ITEM_WEIGHT
from gpr_dist.serving.prompts import Prompts, build_prompts, ranges
from gpr_dist.serving.requests import Parsed, flat, parse_lines, parse_table
from gpr_dist.serving.settings import BundleSettings
from gpr_dist.tokenizer.semantic_ids import BUNDLE_FILE, SemanticIds

# R requests  B of them decoded together  K ads  L levels  I catalogue items

NO_ELIGIBLE_AD = "no eligible ad"
NO_TOKEN = "nothing is known of the request: the model reads neither user nor environment features, and the history is empty"


@dataclass
class Answer:
    """What one request gets."""

    items: list[int]  # catalogue indices, best first
    item_ids: list[str]
    scores: list[float]  # log-probability, nats
    values: list[float] | None  # expected value in the units of the log, as calibrated; None = the bundle has no calibration
    reason: str | None  # why there is no ad
    skipped: dict[str, int]  # events of the history that were left out
    unknown_ads: int  # ids of eligible or exclude that the catalogue does not have
    seconds: float  # of the micro-batch it was decoded in


@dataclass(frozen=True)
class Wishes:
    """What R requests may be shown."""

    group_R: np.ndarray  # int64: EVERY_AD, a row of eligibility.arrow, or, below EVERY_AD, a key of `lists`
    lists: dict[int, np.ndarray]  # sorted catalogue indices
    request_X: np.ndarray  # int64, ascending: who excludes ...
    item_X: np.ndarray  # ... which item
    unknown_R: np.ndarray  # int64, ids that the catalogue does not have

    def excluded(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """(place in `rows`, item) pairs."""
        first = np.searchsorted(self.request_X, rows)
        count = np.searchsorted(self.request_X, rows, side="right") - first
        pairs = ranges(first, count)
        return torch.from_numpy(np.repeat(np.arange(len(rows)), count)), torch.from_numpy(self.item_X[pairs])


@dataclass
class Recommender:
    """An opened bundle."""

    folder: Path
    manifest: BundleManifest
    settings: BundleSettings
    model: GPR
    semantic_ids: SemanticIds
    trie: Trie
    eligibility: Eligibility
    item_weight_M: Tensor
    calibration: list[tuple[np.ndarray, np.ndarray]]
    ids: pa.ChunkedArray
    device: torch.device
    micro_batch_tokens: int = 16384
    micro_batch_requests: int = 64
    _lookup: tuple[np.ndarray, np.ndarray] = field(default=(np.zeros(0, np.uint64), np.zeros(0, np.int32)), repr=False)
    _lists: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._legal = LegalCache(self.trie, self._items)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", check: bool = True) -> "Recommender":
        """Open a bundle. Args: check: compare every checksum first.

        Raises: CheckpointError when it is incomplete or altered, TokenizerError or DataError for damage inside a part of it.
        """
        folder, device = Path(folder), torch.device(device)
        manifest = read_manifest(folder)
        if check and (problem := verify(folder, manifest)):
            raise CheckpointError(f"bundle {folder}: {problem}; export it again with launch/export.py")
        settings = build_config(BundleSettings, manifest.settings, f"{folder}/bundle.json")
        semantic_ids = _open_tokenizer(folder, manifest)
        semantic_ids.check_catalogue(settings.catalogue_fingerprint, str(folder))
        eligibility = Eligibility.load(folder)
        trie = Trie.load(folder).to(device)
        weight_I = np.load(folder / ITEM_WEIGHT, allow_pickle=False)
        with pa.memory_map(str(folder / "catalogue" / "catalogue.arrow")) as file:
            ids = pa.ipc.open_file(file).read_all()["item_id"]
        curves = [(np.array(c["predicted"]), np.array(c["value"])) for c in json.loads((folder / CALIBRATION).read_text())]
        lookup = tuple(np.load(folder / "catalogue" / f"{name}.npy", mmap_mode="r" if len(ids) else None, allow_pickle=False)
                       for name in ("hashes", "indices"))
        model = _open_model(folder, manifest, device)
        return cls(folder, manifest, settings, model, semantic_ids, trie, eligibility, trie.slot_weights(torch.from_numpy(weight_I)),
                   curves, ids, device, _lookup=lookup)

    @property
    def num_groups(self) -> int:
        return self.eligibility.num_groups

    @property
    def max_k(self) -> int:
        """Most ads a request may ask for."""
        return self.settings.max_k

    def parse(self, lines: Sequence[bytes]) -> Parsed:
        """Requests of JSON lines (requests.py), for `recommend`."""
        return parse_lines(lines, self.settings, self.num_groups)

    def parse_table(self, table: pa.Table) -> Parsed:
        """Requests of an Arrow table. Raises: DataError when its columns are not those of a request."""
        return parse_table(table, self.settings, self.num_groups)

    def index_of(self, hashes: np.ndarray) -> np.ndarray:
        """Catalogue index int32 of each item id's hash; NO_ITEM where unknown."""
        known, indices = self._lookup
        if not len(known):
            return np.full(len(hashes), NO_ITEM, np.int32)
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        return np.where(known[at] == hashes, indices[at], np.int32(NO_ITEM)).astype(np.int32)

    def recommend(self, parsed: Parsed, default_k: int = 10) -> list[Answer]:
        """Answers to the good requests of a chunk, in their order; decoded in micro-batches of similar length."""
        requests = parsed.requests
        prompts = build_prompts(requests, self.settings.requests, self.index_of)
        wishes = self._wishes(requests)
        k_R = requests["k"].fill_null(default_k).to_numpy(zero_copy_only=False)
        answers: list[Answer | None] = [None] * requests.num_rows
        skipped = [{reason: int(counts[row]) for reason, counts in prompts.skipped.items() if counts[row]}
                   for row in range(requests.num_rows)]
        for row in np.flatnonzero(prompts.lengths == 0).tolist():
            answers[row] = Answer([], [], [], None, NO_TOKEN, skipped[row], int(wishes.unknown_R[row]), 0.0)
        for rows in self._micro_batches(prompts.lengths, np.flatnonzero(prompts.lengths)):
            started = time.perf_counter()
            found = self._decode(prompts, rows, wishes, k_R[rows])
            seconds = time.perf_counter() - started
            for row, (items, scores, values) in zip(rows.tolist(), found, strict=True):
                names = self.ids.take(pa.array(items, pa.int64())).to_pylist()
                reason = None if items else NO_ELIGIBLE_AD
                answers[row] = Answer(items, names, scores, values, reason, skipped[row], int(wishes.unknown_R[row]), seconds)
        return answers

    def _wishes(self, requests: pa.RecordBatch) -> "Wishes":
        """Look up the ads that requests name. Distinct lists of eligible ads are known by a hash of their content, below EVERY_AD."""
        ids, owner = flat(requests["eligible"])
        items, num = self.index_of(hash_strings(ids)), requests.num_rows
        out_ids, out_owner = flat(requests["exclude"])
        out_items = self.index_of(hash_strings(out_ids))
        unknown_R = np.bincount(owner[items == NO_ITEM], minlength=num) + np.bincount(out_owner[out_items == NO_ITEM], minlength=num)
        group_R = requests["group"].fill_null(EVERY_AD).to_numpy(zero_copy_only=False).astype(np.int64)
        place_R = pc.index_in(requests["placement"], pa.array(list(self.settings.placements), pa.string())).fill_null(-1)
        group_R = np.where(place_R.to_numpy() >= 0, np.array([*self.settings.placements.values(), 0])[place_R.to_numpy()], group_R)
        bounds, lists = np.searchsorted(owner, np.arange(num + 1)), {}
        for row in np.flatnonzero(requests["eligible"].is_valid().to_numpy(zero_copy_only=False)).tolist():
            own = np.unique(items[bounds[row]:bounds[row + 1]])
            own = own[own != NO_ITEM]
            group_R[row] = EVERY_AD - 1 - (xxhash.xxh3_64_intdigest(own.tobytes()) >> 2)
            lists[int(group_R[row])] = own
        known = out_items != NO_ITEM
        return Wishes(group_R, lists, out_owner[known], out_items[known].astype(np.int64), unknown_R)

    def _micro_batches(self, lengths: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Requests of similar length together, at most `micro_batch_tokens` and `micro_batch_requests` (one at least)."""
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        while len(rows):
            room = int(np.searchsorted(np.cumsum(lengths[rows]), self.micro_batch_tokens, side="right"))
            take = max(1, min(room, self.micro_batch_requests))
            yield rows[:take]
            rows = rows[take:]

    @torch.no_grad()
    def _decode(self, prompts: Prompts, rows: np.ndarray, wishes: "Wishes",
                k_B: np.ndarray) -> list[tuple[list[int], list[float], list[float] | None]]:
        search_config = self.settings.search
        self._lists = wishes.lists
        batch = prompts.batch(rows, self.semantic_ids.codes_NL)
        if self.model.config.pointer.width:
            batch = self._with_past(batch, wishes.group_R[rows])
        decode = ModelDecoder(self.model, self.device, heads=search_config.heads)
        opening = decode.start(batch)
        legal, group_B = self._legal(torch.from_numpy(wishes.group_R[rows]))
        eligible = Eligible.of(self.trie, legal, group_B, wishes.excluded(rows))
        result = search(decode.searcher(opening), eligible, search_config, self.item_weight_M, request_id_B=batch.row_ids_B)
        ranked = rank_items(result, eligible, self.item_weight_M, int(k_B.max()), search_config.softmax, order=self.settings.order)
        item_BK, score_BK = ranked.item_BK, ranked.score_BK
        request_N, place_N = (item_BK >= 0).nonzero(as_tuple=True)
        values = self._values(opening, request_N, item_BK[request_N, place_N].cpu().numpy()) if self.calibration else None
        items, scores = item_BK[request_N, place_N].tolist(), score_BK[request_N, place_N].tolist()
        first = torch.searchsorted(request_N, torch.arange(len(rows) + 1, device=request_N.device)).tolist()
        answers = []
        for number, k in enumerate(k_B.tolist()):
            cut = slice(first[number], min(first[number] + k, first[number + 1]))
            answers.append((items[cut], scores[cut], None if values is None else values[cut]))
        return answers

    def _with_past(self, batch: Batch, group_B: np.ndarray) -> Batch:
        """What each request may repeat. Groups are numbered within the micro-batch, as keys of lists are too large to be multiplied."""
        groups, place_B = np.unique(group_B, return_inverse=True)
        past = PastItems(self.semantic_ids.codes_NL, self.semantic_ids.codebook_size, _Groups([self._items(g) for g in groups.tolist()]))
        return past.add_to(replace(batch, request_eligibility_R=torch.from_numpy(place_B)))

    def _items(self, group: int) -> np.ndarray:
        """Sorted catalogue indices of an eligibility group, or of a request's own list."""
        return self._lists[group] if group < EVERY_AD else self.eligibility.items(group)

    def _values(self, opening: Any, request_N: Tensor, items_N: np.ndarray) -> list[float]:
        """Calibrated V_L of each (request, ad): the value head reads the ad's codes."""
        codes_NLD = self.model.codes(torch.from_numpy(self.semantic_ids.codes_NL[items_N].astype(np.int64)).to(self.device))
        head_N = torch.full_like(request_N, self.settings.search.heads[0])
        state_NLD = self.model.ptd(opening, task="generate", request_N=request_N, head_N=head_N, prefix_NlD=codes_NLD[:, :-1])
        predicted = self.model.hte(state_NLD, codes_NLD)[:, -1].double().cpu().numpy()
        return np.interp(predicted, *self.calibration[-1]).tolist()


@dataclass(frozen=True)
class _Groups:
    """The groups of a micro-batch, as `PastItems` asks for them."""

    lists: list[np.ndarray]

    def items(self, group: int) -> np.ndarray:
        return self.lists[group]


def _open_tokenizer(folder: Path, manifest: BundleManifest) -> SemanticIds:
    listed = json.loads((folder / "tokenizer" / BUNDLE_FILE).read_bytes())
    for name in (*listed["checksums"], listed["quantizer"], listed["codes"]):
        check_name(folder / "tokenizer", name, folder / "tokenizer" / BUNDLE_FILE)
    semantic_ids = SemanticIds.load(folder / "tokenizer")
    semantic_ids.check_codebooks(manifest.fingerprints["tokenizer"], str(folder))
    return semantic_ids


def _open_model(folder: Path, manifest: BundleManifest, device: torch.device) -> GPR:
    """The weights as float32, one at a time. Raises: CheckpointError when they are not those of the model's config."""
    model = GPR(build_config(GPRConfig, manifest.model, f"{folder}/bundle.json")).eval()
    wanted = dict(model.named_parameters())
    with safe_open(folder / WEIGHTS, "pt") as file, torch.no_grad():
        found = set(file.keys())
        if found != wanted.keys():
            odd = sorted(found ^ wanted.keys())[0]
            raise CheckpointError(f"{folder / WEIGHTS} and the model of bundle.json differ by {odd}; export the bundle again")
        for name, parameter in wanted.items():
            parameter.copy_(file.get_tensor(name))
    return model.requires_grad_(False).to(device)
