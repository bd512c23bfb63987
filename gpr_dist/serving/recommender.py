"""A bundle in memory that answers requests: prompts → beam search over the trie → ads with scores and values.

Loads with torch only: no deepspeed, no wandb, no training code (a test holds it to that). The search is that of launch/evaluate.py, so
the answers are the checkpoint's.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from torch import Tensor

from gpr_dist.bundle import WEIGHTS, BundleManifest, check_name, read_manifest, verify
from gpr_dist.config import build_config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.decoding.beam_search import beam_search, expand_items
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import CheckpointError
from gpr_dist.hashing import hash_strings
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.schema import EVERY_AD, NO_ITEM
from gpr_dist.serving.export import CALIBRATION, ITEM_WEIGHT
from gpr_dist.serving.prompts import Prompts, build_prompts
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
        ads = eligibility.items(EVERY_AD)
        trie = Trie.from_codes(semantic_ids.codes_NL[ads], semantic_ids.codebook_size, ads).to(device)
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
        return self.settings.search.beam_width

    def parse(self, lines: Sequence[bytes]) -> Parsed:
        """Requests of JSON lines (requests.py), for `recommend`."""
        return parse_lines(lines, self.settings.requests, self.num_groups, self.max_k)

    def parse_table(self, table: pa.Table) -> Parsed:
        """Requests of an Arrow table. Raises: DataError when its columns are not those of a request."""
        return parse_table(table, self.settings.requests, self.num_groups, self.max_k)

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
        allowed, unknown_R = self._allowed(requests)
        k_R = requests["k"].fill_null(default_k).to_numpy(zero_copy_only=False)
        answers: list[Answer | None] = [None] * requests.num_rows
        skipped = [{reason: int(counts[row]) for reason, counts in prompts.skipped.items() if counts[row]}
                   for row in range(requests.num_rows)]
        open_R = np.ones(requests.num_rows, bool)
        for row in range(requests.num_rows):
            reason = NO_TOKEN if not prompts.lengths[row] else None if self._any_ad(allowed[row]) else NO_ELIGIBLE_AD
            if reason:
                answers[row] = Answer([], [], [], None, reason, skipped[row], int(unknown_R[row]), 0.0)
                open_R[row] = False
        for rows in self._micro_batches(prompts.lengths, np.flatnonzero(open_R)):
            started = time.perf_counter()
            found = self._decode(prompts, rows, [allowed[row] for row in rows], k_R[rows])
            seconds = time.perf_counter() - started
            for row, (items, scores, values) in zip(rows.tolist(), found, strict=True):
                names = self.ids.take(pa.array(items)).to_pylist()
                reason = None if items else NO_ELIGIBLE_AD
                answers[row] = Answer(items, names, scores, values, reason, skipped[row], int(unknown_R[row]), seconds)
        return answers

    def _allowed(self, requests: pa.RecordBatch) -> tuple[list[int | np.ndarray], np.ndarray]:
        """For each request the eligibility group, or its own ads (sorted indices); and how many ids are unknown, int64 [R]."""
        ids, owner = flat(requests["eligible"])
        own = self.index_of(hash_strings(ids))
        out_ids, out_owner = flat(requests["exclude"])
        excluded = self.index_of(hash_strings(out_ids))
        num = requests.num_rows
        unknown_R = (np.bincount(owner[own == NO_ITEM], minlength=num) + np.bincount(out_owner[excluded == NO_ITEM], minlength=num))
        groups = requests["group"].fill_null(EVERY_AD).to_numpy(zero_copy_only=False)
        listed = requests["eligible"].is_valid().to_numpy(zero_copy_only=False)
        takes_out = np.bincount(out_owner, minlength=num) > 0
        allowed: list[int | np.ndarray] = groups.tolist()
        bounds, out_bounds = (np.searchsorted(of, np.arange(num + 1)) for of in (owner, out_owner))
        for row in np.flatnonzero(listed | takes_out).tolist():
            items = own[bounds[row]:bounds[row + 1]] if listed[row] else self.eligibility.items(int(groups[row]))
            items = np.unique(items[items != NO_ITEM]) if listed[row] else items
            allowed[row] = np.setdiff1d(items, excluded[out_bounds[row]:out_bounds[row + 1]], assume_unique=False)
        return allowed, unknown_R

    def _any_ad(self, allowed: int | np.ndarray) -> bool:
        items = self.eligibility.items(allowed) if isinstance(allowed, int) else allowed
        return bool(len(items)) and bool(self.trie.contains(torch.from_numpy(np.array(items))).any())

    def _micro_batches(self, lengths: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Requests of similar length together, at most `micro_batch_tokens` and `micro_batch_requests` (one at least)."""
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        while len(rows):
            room = int(np.searchsorted(np.cumsum(lengths[rows]), self.micro_batch_tokens, side="right"))
            take = max(1, min(room, self.micro_batch_requests))
            yield rows[:take]
            rows = rows[take:]

    @torch.no_grad()
    def _decode(self, prompts: Prompts, rows: np.ndarray, allowed: list[int | np.ndarray],
                k_B: np.ndarray) -> list[tuple[list[int], list[float], list[float] | None]]:
        search = self.settings.search
        batch = prompts.batch(rows, self.semantic_ids.codes_NL)
        decode = ModelDecoder(self.model, self.device, search.head)
        opening = decode.start(batch)
        legal, group_B = self._legal(allowed)
        step = partial(decode.step_log_probs, opening)
        result = beam_search(step, self.trie, legal, group_B, search.beam_width, search.softmax, self.item_weight_M)
        item_BK, score_BK = expand_items(result, self.trie, legal[-1], group_B, self.item_weight_M, int(k_B.max()), search.softmax)
        request_N, place_N = (item_BK >= 0).nonzero(as_tuple=True)
        values = self._values(opening, request_N, item_BK[request_N, place_N].cpu().numpy()) if self.calibration else None
        items, scores = item_BK[request_N, place_N].tolist(), score_BK[request_N, place_N].tolist()
        first = torch.searchsorted(request_N, torch.arange(len(rows) + 1, device=request_N.device)).tolist()
        answers = []
        for number, k in enumerate(k_B.tolist()):
            cut = slice(first[number], min(first[number] + k, first[number + 1]))
            answers.append((items[cut], scores[cut], None if values is None else values[cut]))
        return answers

    def _legal(self, allowed: list[int | np.ndarray]) -> tuple[list[Tensor], Tensor]:
        """Bitmaps of the distinct sets of ads of a micro-batch, and the set of each request."""
        sets: dict[Any, int] = {}
        group_B = [sets.setdefault(one if isinstance(one, int) else one.tobytes(), len(sets)) for one in allowed]
        first = {group: number for number, group in reversed(list(enumerate(group_B)))}
        lists = [allowed[first[group]] for group in range(len(sets))]
        lists = [self.eligibility.items(one) if isinstance(one, int) else one for one in lists]
        return self.trie.legal_nodes(lists), torch.tensor(group_B, device=self.device)

    def _values(self, opening: Any, request_N: Tensor, items_N: np.ndarray) -> list[float]:
        """Calibrated V_L of each (request, ad): the value head reads the ad's codes."""
        codes_NLD = self.model.codes(torch.from_numpy(self.semantic_ids.codes_NL[items_N].astype(np.int64)).to(self.device))
        head_N = torch.full_like(request_N, self.settings.search.head)
        state_NLD = self.model.ptd(opening, task="generate", request_N=request_N, head_N=head_N, prefix_NlD=codes_NLD[:, :-1])
        predicted = self.model.hte(state_NLD, codes_NLD)[:, -1].double().cpu().numpy()
        return np.interp(predicted, *self.calibration[-1]).tolist()


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
