"""Journey rows to packed micro-batches: adds semantic IDs, and lays out requests and MTP targets.

Pure functions over Arrow buffers; a row costs no Python of its own. Which rows belong together is `sampler.py`, reading them is
`reader.py`, bringing them together `rows.py`. Look-ahead ads are labels and never become input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from gpr_dist.errors import DataError
from gpr_dist.schema import JOURNEY_SCHEMA, Batch, TokenType

# B rows  T packed model tokens  A ads (with look-ahead)  R requests  N targets  L levels  M catalogue items

TOKEN_COLUMNS = ("token_type", "block", "item", "action", "scene", "timestamp", "value", "pctr", "pcvr")
_INPUT_COLUMNS = TOKEN_COLUMNS[:7]
_AD_COLUMNS = ("block", "item", "action", "timestamp", "value", "pctr", "pcvr")
SIDE_COLUMNS = ("user_features", "env_features", "eligibility")
STORED = {name: np.dtype(JOURNEY_SCHEMA.field(name).type.value_type.to_pandas_dtype()) for name in TOKEN_COLUMNS + SIDE_COLUMNS}


@dataclass(frozen=True)
class JourneyColumns:
    """Numpy views of journeys laid end to end. All per-token columns share `token_offsets`; side columns have their own."""

    num_context: np.ndarray
    num_lookahead: np.ndarray
    token_offsets: np.ndarray
    tokens: dict[str, np.ndarray]
    sides: dict[str, tuple[np.ndarray, np.ndarray]]

    @property
    def num_rows(self) -> int:
        return len(self.num_context)

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "JourneyColumns":
        """Views of `batch`, which may be a slice and lack columns other than token_type.

        Raises: DataError when the per-token lists of a row differ in length.
        """
        offsets, values = {}, {}
        for name in set(batch.schema.names) & STORED.keys():
            column = batch.column(name)
            offset = column.offsets.to_numpy()  # of the slice; `flatten` cuts the values to the same slice, `values` would not
            offsets[name] = offset if offset[0] == 0 else offset - offset[0]
            values[name] = column.flatten().to_numpy(zero_copy_only=True)
        tokens = {name: values[name] for name in TOKEN_COLUMNS if name in values}
        for name in tokens:
            if not np.array_equal(offsets[name], offsets["token_type"]):
                row = int(np.flatnonzero(offsets[name] != offsets["token_type"])[0]) - 1
                raise DataError(f"row {row} of a record batch: {name} and token_type differ in length; rebuild the shards")
        return cls(batch.column("num_context").to_numpy(), batch.column("num_lookahead").to_numpy(), offsets["token_type"], tokens,
                   {name: (offsets[name], values[name]) for name in SIDE_COLUMNS if name in values})

    def slice(self, begin: int, end: int) -> "JourneyColumns":
        """Views of rows begin .. end - 1."""
        def cut(offsets: np.ndarray) -> tuple[np.ndarray, slice]:
            first, last = offsets.item(begin), offsets.item(end)
            return offsets[begin:end + 1] - first, slice(first, last)

        token_offsets, tokens = cut(self.token_offsets)
        sides = {name: (cut(offsets), values) for name, (offsets, values) in self.sides.items()}
        return JourneyColumns(self.num_context[begin:end], self.num_lookahead[begin:end], token_offsets,
                              {name: values[tokens] for name, values in self.tokens.items()},
                              {name: (offsets, values[where]) for name, ((offsets, where), values) in sides.items()})


def collate(journeys: JourneyColumns, row_ids_B: np.ndarray, codes_ML: np.ndarray, num_heads: int, num_user_features: int,
            num_env_features: int, locate: Callable[[int], str] | None = None) -> Batch:
    """Pack rows end to end.

    Args:
        journeys: the rows of the micro-batch, perhaps none, in the types they are stored in or wider; the micro-batch keeps their memory.
        row_ids_B: global row number of each row, int64, in the same order; only carried along.
        codes_ML: semantic ID of each catalogue item, any integer type.
        num_heads: MTP heads P. Head 0 has every ad of a request as a target; head j ≥ 1 the j-th ad after the request's first
            one, in the row's order with look-ahead, where there is one (GPR Eq. 3, Fig. 4a).
        num_user_features, num_env_features: Fu, Fe of the manifest.
        locate: global row number -> "file, batch, row" for error messages.
    Returns: Batch with int64 and float32 tensors; targets sorted by head, then by request.
    Raises: DataError naming row and item for an item outside the catalogue, or a row whose lists do not fit its tokens.
    """
    g = _split(journeys)
    where = locate or (lambda row: f"row {row}")

    num_rows = len(g["length"])
    offsets_B1 = np.zeros(num_rows + 1, np.int64)
    np.cumsum(g["length"], out=offsets_B1[1:])
    row_of = lambda token: int(row_ids_B[np.searchsorted(offsets_B1, token, side="right") - 1])  # noqa: E731
    _check_items(g["item"], g["token_type"], len(codes_ML), lambda token: where(row_of(token)))
    _check_items(g["ad_item"], None, len(codes_ML), lambda ad: where(int(row_ids_B[g["ad_row"][ad]])))
    _check_side(g["user_features_length"], g["token_type"], offsets_B1, TokenType.U, num_user_features, row_ids_B, where)
    _check_side(g["env_features_length"], g["token_type"], offsets_B1, TokenType.E, num_env_features, row_ids_B, where)

    # A request's first ad decides: its site is the token before it, so a row that opens with an ad predicts nothing there.
    ad_row, ad_block, ad_position = g["ad_row"], g["ad_block"], g["ad_position"]
    num_ads = len(ad_row)
    is_first_A = np.ones(num_ads, bool)
    is_first_A[1:] = (ad_row[1:] != ad_row[:-1]) | (ad_block[1:] != ad_block[:-1])
    first_ad = np.flatnonzero(is_first_A)
    ads_in_block = np.diff(first_ad, append=num_ads)
    first_row, first_position = _take(ad_row, first_ad), _take(ad_position, first_ad)
    predicted = (first_position >= _take(np.maximum(g["num_context"], 1), first_row)) & (first_position < _take(g["length"], first_row))
    first_ad, request_row_R, first_position = first_ad[predicted], first_row[predicted], first_position[predicted]

    # Head 0 has all ads of the request's block that are model input, head j ≥ 1 the ad j places after the first if the row has it.
    ads_in_block = ads_in_block[predicted]
    head_0_ad, head_0_request = _ranges(first_ad, ads_in_block), np.repeat(np.arange(len(first_ad)), ads_in_block)
    if g["num_lookahead"].any():
        is_input = _take(ad_position, head_0_ad) < _take(g["length"], _take(ad_row, head_0_ad))
        head_0_ad, head_0_request = head_0_ad[is_input], head_0_request[is_input]
    ads_left_R = np.cumsum(g["num_ads"])[request_row_R] - first_ad
    requests = [head_0_request, *(np.flatnonzero(ads_left_R > head) for head in range(1, num_heads))]
    target_request, target_head = np.concatenate(requests), np.repeat(np.arange(num_heads), [len(of_head) for of_head in requests])
    target_ad = np.concatenate([head_0_ad, *(_take(first_ad, requests[head]) + head for head in range(1, num_heads))])

    request_block_R = _take(ad_block, first_ad)
    short = np.flatnonzero(request_block_R >= _take(g["eligibility_length"], request_row_R))
    if len(short):
        row = request_row_R[short[0]]
        raise DataError(f"{where(int(row_ids_B[row]))}: {g['eligibility_length'][row]} eligibility groups, but an ad in block "
                        f"{request_block_R[short[0]]}; rebuild the shards")
    eligibility_start = np.cumsum(g["eligibility_length"]) - g["eligibility_length"]
    tensor = lambda values: torch.from_numpy(values if values.dtype.kind == "f" else values.astype(np.int64, copy=False))  # noqa: E731
    return Batch(
        offsets_B1=tensor(offsets_B1), row_ids_B=tensor(row_ids_B), token_type_T=tensor(g["token_type"]),
        block_T=tensor(g["block"]), item_T=tensor(g["item"]), codes_TL=tensor(_codes(g["item"], codes_ML)), action_T=tensor(g["action"]),
        scene_T=tensor(g["scene"]), timestamp_T=tensor(g["timestamp"]), value_T=tensor(g["value"]),
        user_features_UF=tensor(g["user_features"].reshape(-1, num_user_features) if num_user_features else np.zeros((0, 0), np.int64)),
        env_features_EF=tensor(g["env_features"].reshape(-1, num_env_features) if num_env_features else np.zeros((0, 0), np.int64)),
        request_token_R=tensor(_take(offsets_B1, request_row_R) + first_position - 1), request_row_R=tensor(request_row_R),
        request_eligibility_R=tensor(_take(g["eligibility"], _take(eligibility_start, request_row_R) + request_block_R)),
        request_time_R=tensor(_take(g["ad_timestamp"], first_ad)), target_request_N=tensor(target_request),
        target_head_N=tensor(target_head), target_item_N=tensor(_take(g["ad_item"], target_ad)),
        target_codes_NL=tensor(_take(_take(codes_ML, g["ad_item"].astype(np.int64, copy=False)).astype(np.int64), target_ad)),
        target_action_N=tensor(_take(g["ad_action"], target_ad)), target_value_N=tensor(_take(g["ad_value"], target_ad)),
        target_pctr_N=tensor(_take(g["ad_pctr"], target_ad)), target_pcvr_N=tensor(_take(g["ad_pcvr"], target_ad)),
        target_time_N=tensor(_take(g["ad_timestamp"], target_ad)))


def _split(journeys: JourneyColumns) -> dict[str, np.ndarray]:
    """Model tokens, ads and side lists, as flat arrays with lengths."""
    full, full_start, full_end = journeys.tokens, journeys.token_offsets[:-1], journeys.token_offsets[1:]
    num_lookahead = journeys.num_lookahead
    length = full_end - full_start - num_lookahead
    ads = np.flatnonzero(full["token_type"] == TokenType.I)
    num_ads = np.diff(np.searchsorted(ads, full_end), prepend=0)
    out = {"num_context": journeys.num_context, "num_lookahead": num_lookahead, "length": length, "num_ads": num_ads,
           "ad_row": np.repeat(np.arange(len(length)), num_ads), "ad_position": ads - np.repeat(full_start, num_ads)}
    out |= {f"ad_{name}": _take(full[name], ads) for name in _AD_COLUMNS}
    if num_lookahead.any():
        index = _ranges(full_start, length)
        out |= {name: _take(full[name], index) for name in _INPUT_COLUMNS}
    else:
        out |= {name: full[name] for name in _INPUT_COLUMNS}
    out["item"] = out["item"].astype(np.int64, copy=False)  # as an index
    for name, (offsets, values) in journeys.sides.items():
        out[name], out[f"{name}_length"] = values, np.diff(offsets)
    return out


def _take(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """values[index] without the check that an index is in range, a quarter of the time; one outside takes the nearest value."""
    return values.take(index, axis=0, mode="clip") if len(values) else values


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers starts[b] .. starts[b] + lengths[b] - 1 of every b, one after another."""
    ends = np.cumsum(lengths)
    index = np.repeat(starts - (ends - lengths), lengths)
    index += np.arange(len(index))
    return index


def _codes(item: np.ndarray, codes_ML: np.ndarray) -> np.ndarray:
    if len(codes_ML) == 0:
        return np.full((len(item), codes_ML.shape[1]), -1)
    codes_TL = _take(codes_ML, item).astype(np.int64, copy=False)
    no_item = item >> 63  # the sign bit spread out: -1 where there is no item, else 0
    for codes_T in codes_TL.T:
        codes_T |= no_item
    return codes_TL


def _check_items(item: np.ndarray, token_type: np.ndarray | None, num_items: int, where: Callable[[int], str]) -> None:
    """O and I tokens (odd types) have an item of the catalogue, U and E tokens none."""
    wants_item = np.ones(len(item), bool) if token_type is None else (token_type & 1) == 1
    if item.max(initial=-1) >= num_items or not np.array_equal(item >= 0, wants_item):
        wrong = ((item >= 0) != wants_item) | (item >= num_items)
        at = int(np.flatnonzero(wrong)[0])
        kind = "I" if token_type is None else TokenType(int(token_type[at])).name
        raise DataError(f"{where(at)}: item {item[at]} at a token of type {kind}, but the catalogue has {num_items} items; "
                        f"these shards belong to another catalogue or tokenizer")


def _check_side(lengths: np.ndarray, token_type: np.ndarray, offsets_B1: np.ndarray, kind: TokenType, width: int, row_ids_B: np.ndarray,
                where: Callable[[int], str]) -> None:
    if lengths.sum() != np.count_nonzero(token_type == kind) * width:
        counts = np.diff(np.searchsorted(np.flatnonzero(token_type == kind), offsets_B1))
        row = np.flatnonzero(lengths != counts * width)[0]
        raise DataError(f"{where(int(row_ids_B[row]))}: {lengths[row]} features at {counts[row]} {kind.name} tokens, the manifest "
                        f"names {width} for each; rebuild the shards")
