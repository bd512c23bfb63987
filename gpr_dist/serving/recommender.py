"""A bundle in memory that answers requests: prompts → beam search over the trie → ads with scores and values.

Loads with torch only: no deepspeed, no wandb, no training code (a test holds it to that). The search is that of launch/evaluate.py, so
the answers are the checkpoint's.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from gpr_dist.bundle import WEIGHTS, BundleManifest, read_manifest, verify
from gpr_dist.config import build_config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.past import PastItems
from gpr_dist.decoding.item_ranking import ItemRanking
from gpr_dist.decoding.mixture import mix_lists
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.decoding.ranking import RankedItems, rank_items
from gpr_dist.decoding.search import SearchModel, search
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import CheckpointError
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.safety import open_tensors
from gpr_dist.schema import EVERY_AD, Batch
from gpr_dist.serving.export import CALIBRATION, ITEM_WEIGHT, catalogue_lookup
from gpr_dist.serving.prompts import Prompts, build_prompts
from gpr_dist.serving.requests import Parsed, parse_lines, parse_table
from gpr_dist.serving.rules import Rules
from gpr_dist.serving.settings import RANKERS, BundleSettings, Ranker, check_ranker
from gpr_dist.serving.wishes import Audiences, Shown, Wishes, read_wishes
from gpr_dist.tokenizer.semantic_ids import SemanticIds

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
    _lookup: Callable[[np.ndarray], np.ndarray] = field(repr=False)
    micro_batch_tokens: int = 16384
    micro_batch_requests: int = 64
    rules: InitVar[Rules | None] = None

    def __post_init__(self, rules: Rules | None) -> None:
        self.use_rules(rules)
        if self.model.config.items.has_head:
            self._item_ranking = ItemRanking(self.model, self.device, self.semantic_ids.codes_NL, self.eligibility.items(EVERY_AD),
                                             frozen=True)

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
        rules = Rules.load(folder, trie)
        weight_I = np.load(folder / ITEM_WEIGHT, allow_pickle=False)
        with pa.memory_map(str(folder / "catalogue" / "catalogue.arrow")) as file:
            ids = pa.ipc.open_file(file).read_all()["item_id"]
        curves = [(np.array(c["predicted"]), np.array(c["value"])) for c in json.loads((folder / CALIBRATION).read_text())]
        model = _open_model(folder, manifest, device)
        return cls(folder, manifest, settings, model, semantic_ids, trie, eligibility, trie.slot_weights(torch.from_numpy(weight_I)),
                   curves, ids, device, _lookup=catalogue_lookup(folder), rules=rules)

    @property
    def num_groups(self) -> int:
        return self.eligibility.num_groups

    @property
    def max_k(self) -> int:
        """Most ads a request may ask for."""
        return self.settings.max_k

    def use_rules(self, rules: Rules | None) -> None:
        """Take other rules from now on, e.g. after budgets ran out: `recommender.audiences.rules.switched("funded", ads, False)`."""
        self.audiences = Audiences(self.trie, self.eligibility, rules)
        asked = self.settings.requests.model_copy(update={"audience_fields": rules.fields if rules is not None else ()})
        self.settings = self.settings.model_copy(update={"requests": asked})

    def use_ranker(self, ranker: Ranker) -> None:
        """Rank by another of the model's rankers than the bundle says. Raises: ConfigError when the bundle does not have it."""
        settings = self.settings.model_dump() | {"ranker": ranker}
        check_ranker(ranker, self.model.config)
        self.settings = build_config(BundleSettings, settings, f"ranker={ranker}")

    def parse(self, lines: Sequence[bytes]) -> Parsed:
        """Requests of JSON lines (requests.py), for `recommend`."""
        return parse_lines(lines, self.settings, self.num_groups)

    def parse_table(self, table: pa.Table) -> Parsed:
        """Requests of an Arrow table. Raises: DataError when its columns are not those of a request."""
        return parse_table(table, self.settings, self.num_groups)

    def index_of(self, hashes: np.ndarray) -> np.ndarray:
        """Catalogue index int32 of each item id's hash; NO_ITEM where unknown."""
        return self._lookup(hashes)

    def recommend(self, parsed: Parsed, default_k: int = 10) -> list[Answer]:
        """Answers to the good requests of a chunk, in their order; decoded in micro-batches of similar length."""
        requests = parsed.requests
        prompts = build_prompts(requests, self.settings.requests, self.index_of)
        wishes = read_wishes(requests, prompts, self.settings.placements, self.index_of, self.trie, self.audiences.rules)
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

    def _micro_batches(self, lengths: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Requests of similar length together, at most `micro_batch_tokens` and `micro_batch_requests` (one at least)."""
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        while len(rows):
            room = int(np.searchsorted(np.cumsum(lengths[rows]), self.micro_batch_tokens, side="right"))
            take = max(1, min(room, self.micro_batch_requests))
            yield rows[:take]
            rows = rows[take:]

    @torch.no_grad()
    def _decode(self, prompts: Prompts, rows: np.ndarray, wishes: Wishes,
                k_B: np.ndarray) -> list[tuple[list[int], list[float], list[float] | None]]:
        batch, shown, k = prompts.batch(rows, self.semantic_ids.codes_NL), self.audiences(wishes, rows), int(k_B.max())
        if self.model.config.pointer.width:
            batch = self._with_past(batch, shown)
        ranker = self.settings.ranker
        length = k if ranker != "mix" else self.settings.list_length
        lists, decode = [], ModelDecoder(self.model, self.device, heads=self.settings.search.heads)
        opening = decode.start(batch)
        if ranker != "item head":
            found = self._generate(decode.searcher(opening), batch, shown, length)
            lists.append((found.item_BK, found.score_BK))
        if ranker != "generative":
            lists.append(self._item_ranking(batch, shown.lists, shown.audience_B, length, shown.exclude, opening))
        item_BK, score_BK = lists[0]
        if ranker == "mix":
            weights = [self.settings.mix_weights.get(name, 0.0) / sum(self.settings.mix_weights.values()) for name in RANKERS]
            mixed = mix_lists([(items.cpu().numpy(), scores.float().cpu().numpy()) for items, scores in lists], weights, k)
            item_BK, score_BK = torch.from_numpy(mixed[0]).long(), torch.from_numpy(mixed[1])
        request_N, place_N = (item_BK >= 0).nonzero(as_tuple=True)
        found_N = item_BK[request_N, place_N].cpu().numpy()
        values = self._values(opening, request_N.to(self.device), found_N) if self.calibration else None
        items, scores = found_N.tolist(), score_BK[request_N, place_N].tolist()
        first = torch.searchsorted(request_N, torch.arange(len(rows) + 1, device=request_N.device)).tolist()
        answers = []
        for number, wanted in enumerate(k_B.tolist()):
            cut = slice(first[number], min(first[number] + wanted, first[number + 1]))
            answers.append((items[cut], scores[cut], None if values is None else values[cut]))
        return answers

    def _generate(self, searcher: SearchModel, batch: Batch, shown: Shown, k: int) -> RankedItems:
        """The search of launch/evaluate.py."""
        config = self.settings.search
        result = search(searcher, shown.eligible, config, self.item_weight_M, request_id_B=batch.row_ids_B)
        return rank_items(result, shown.eligible, self.item_weight_M, k, config.softmax, order=self.settings.order)

    def _with_past(self, batch: Batch, shown: Shown) -> Batch:
        """What each request may repeat. Audiences are numbered within the micro-batch."""
        past = PastItems(self.semantic_ids.codes_NL, self.semantic_ids.codebook_size, _Groups(shown.lists))
        return past.add_to(replace(batch, request_eligibility_R=torch.from_numpy(shown.audience_B)))

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
    semantic_ids = SemanticIds.load(folder / "tokenizer")
    semantic_ids.check_codebooks(manifest.fingerprints["tokenizer"], str(folder))
    return semantic_ids


def _open_model(folder: Path, manifest: BundleManifest, device: torch.device) -> GPR:
    """The weights as float32, one at a time. Raises: CheckpointError when they are not those of the model's config."""
    model = GPR(build_config(GPRConfig, manifest.model, f"{folder}/bundle.json")).eval()
    wanted = dict(model.named_parameters())
    with open_tensors(folder / WEIGHTS, CheckpointError) as file, torch.no_grad():
        found = set(file.keys())
        if found != wanted.keys():
            odd = sorted(found ^ wanted.keys())[0]
            raise CheckpointError(f"{folder / WEIGHTS} and the model of bundle.json differ by {odd}; export the bundle again")
        for name, parameter in wanted.items():
            parameter.copy_(file.get_tensor(name))
    return model.requires_grad_(False).to(device)
