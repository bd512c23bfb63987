"""The worked example of external knowledge: what can be said about a user in words, written from the training journeys by a template.

A text is written at the end of every period in which the user was active and uses only what happened before, so that a journey can be
given one older than everything it is asked to predict; validation and test are never opened. A team that has better texts gives its
own (knowledge.py). Read and written user by user: memory is bounded by a chunk of users.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator
from tqdm import tqdm

from data_pipeline.build import BuildConfig
from data_pipeline.catalogue import Catalogue
from data_pipeline.embeddings import read_catalogue
from data_pipeline.shards import iter_record_batches
from data_pipeline.sources import open_source
from gpr_dist.config import Config, load_config
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.hashing import feature_id
from gpr_dist.schema import Action, ShardManifest, TokenType

_COLUMNS = ["user_id", "num_context", "num_lookahead", "token_type", "block", "item", "action", "timestamp", "value", "user_features"]
_CHUNK_TOKENS = 1 << 21
_DAY = 86_400
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_PARTS = ("night", "morning", "afternoon", "evening")  # six hours each, UTC
_ROUND = np.array([10.0**power * digit for power in range(-2, 9) for digit in (1, 1.5, 2, 3, 5, 7)])

Aspect = Literal["profile", "habits", "interests", "promotions"]


class TemplateConfig(Config):
    """What is written about a user; one text, and one vector, per aspect."""

    aspects: tuple[Aspect, ...] = ("habits", "interests", "promotions")
    """profile: words of the user's features; habits: how much and when; interests: organic items; promotions: ads clicked and converted"""
    every_days: float = Field(30, ge=0.01)
    """length of a period; a text is as old as that at most when a user stays active. More texts, and more disk, the shorter it is"""
    top: int = Field(8, ge=1)
    """groups of items named in a list"""
    words: int = Field(4, ge=1)
    """leading words of an item's catalogue text, which are its group; more = finer groups"""
    build: Path | None = None
    """config of launch/build_data.py, whose users table has the words of the user features; needed by the aspect profile alone"""

    @model_validator(mode="after")
    def _check(self) -> "TemplateConfig":
        if not self.aspects or len(set(self.aspects)) < len(self.aspects):
            raise ValueError(f"aspects={list(self.aspects)} must be one or more different ones")
        if ("profile" in self.aspects) != (self.build is not None):
            raise ValueError("build is needed by the aspect profile and by nothing else")
        return self


def write_texts(data: Path, config: TemplateConfig, out: Path) -> None:
    """Write `out`, an Arrow file of user_id string, as_of int64 (s: the text uses events before it only) and a string per aspect.

    Args: data: data set folder; reads shards/train and catalogue/.
    Raises: DataError when they cannot be read.
    """
    shards = data / "shards" / "train"
    manifest = ShardManifest.parse(_read(shards / "manifest.json"), str(shards / "manifest.json"))
    names = _feature_names(config.build, manifest) if config.build else {}
    group_I, groups = _item_groups(Catalogue(data / "catalogue"), config.words)
    schema = pa.schema([("user_id", pa.string()), ("as_of", pa.int64()), *((aspect, pa.string()) for aspect in config.aspects)])
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    periods = 1 + (manifest.last_timestamp - manifest.first_timestamp) / (config.every_days * _DAY)
    with tqdm(total=manifest.num_rows, desc="write texts", unit="journey", mininterval=0.5) as bar, \
            pa.ipc.new_file(temporary, schema) as writer:
        for journeys in _user_chunks(shards, int(_CHUNK_TOKENS / max(1, periods / 4))):
            texts = _Chunk(journeys, manifest, config, group_I).texts(groups, names)
            writer.write_table(texts.to_arrow().cast(schema), max_chunksize=65_536)
            bar.update(journeys.num_rows)
    temporary.replace(out)


def describe_template(data: Path, config: TemplateConfig) -> list[str]:
    """What would be written, for --dry-run. Raises: as `write_texts`."""
    manifest_path = data / "shards" / "train" / "manifest.json"
    manifest = ShardManifest.parse(_read(manifest_path), str(manifest_path))
    days = (manifest.last_timestamp - manifest.first_timestamp) / _DAY
    names = _feature_names(config.build, manifest) if config.build else {}
    words = [f"{name}: {len(table)} words" for name, table in names.items()]
    return [f"texts {', '.join(config.aspects)} at the end of each of {math.ceil(days / config.every_days)} periods", *words]


def own_tokens(journeys: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """Row and whether a token is fresh in its row, neither history nor a look-ahead label, for each token of the batch, [T]."""
    lengths = pc.list_value_length(journeys["token_type"]).to_numpy()
    row_T = np.repeat(np.arange(len(lengths)), lengths)
    position_T = np.arange(len(row_T)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    end = lengths - journeys["num_lookahead"].to_numpy()
    return row_T, (position_T >= journeys["num_context"].to_numpy()[row_T]) & (position_T < end[row_T])


def first_ad_times(journeys: pa.RecordBatch) -> np.ndarray:
    """Time of the first ad that each row is asked to predict, int64 [rows]; of the row's first token if there is none."""
    row_T, fresh_T = own_tokens(journeys)
    time_T = journeys["timestamp"].flatten().to_numpy()
    first = np.minimum(np.searchsorted(row_T, np.arange(journeys.num_rows)), max(0, len(time_T) - 1))
    times = time_T[first] if len(time_T) else np.zeros(journeys.num_rows, np.int64)
    ads = np.flatnonzero(fresh_T & (journeys["token_type"].flatten().to_numpy() == TokenType.I))
    rows, at = np.unique(row_T[ads], return_index=True)
    times = times.copy()
    times[rows] = time_T[ads[at]]
    return times


class _Chunk:
    """Whole users, as tables: what they consumed, and their rows. A snapshot is a user and a period in which something happened."""

    def __init__(self, journeys: pa.RecordBatch, manifest: ShardManifest, config: TemplateConfig, group_I: np.ndarray) -> None:
        self.config = config
        ids = journeys["user_id"]
        starts = np.append(True, pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy(zero_copy_only=False))
        self.user_ids = ids.filter(pa.array(starts))
        user_R = (np.cumsum(starts) - 1).astype(np.int32)
        row_T, fresh_T = own_tokens(journeys)
        item_T = journeys["item"].flatten().to_numpy()
        mine = np.flatnonzero(fresh_T & (item_T >= 0))
        row = row_T[mine]
        column = lambda name: journeys[name].flatten().to_numpy()[mine]  # noqa: E731
        step = int(config.every_days * _DAY)
        period = (column("timestamp") - manifest.first_timestamp) // step
        self.events = pl.DataFrame({
            "user": user_R[row], "period": period, "time": column("timestamp"), "is_ad": column("token_type") == TokenType.I,
            "action": column("action"), "value": column("value"), "group": group_I[item_T[mine]],
            "block": row.astype(np.int64) << 32 | column("block"),
        })
        # The last text of all is dated by the split's end, so that the next split finds it.
        self.snapshots = self.events.select("user", "period").unique().sort("user", "period").with_columns(
            as_of=pl.min_horizontal(manifest.first_timestamp + (pl.col("period") + 1) * step, manifest.last_timestamp + 1))
        width = len(manifest.user_features)
        is_user_T = journeys["token_type"].flatten().to_numpy() == TokenType.U
        rows, first = np.unique(row_T[is_user_T], return_index=True)
        features = journeys["user_features"].flatten().to_numpy().reshape(-1, max(width, 1))[first] if width else np.zeros((len(rows), 0))
        self.profiles = pl.DataFrame({"user": user_R[rows], "time": first_ad_times(journeys)[rows],
                                      **{name: features[:, i].astype(np.int32) for i, name in enumerate(manifest.user_features)}})

    def texts(self, groups: pl.DataFrame, names: dict[str, pl.DataFrame]) -> pl.DataFrame:
        """user_id, as_of and the aspects, a row per snapshot, by user and time."""
        table = self.snapshots
        for aspect in self.config.aspects:
            match aspect:
                case "profile":
                    column = self._profile(names)
                case "habits":
                    column = self._habits()
                case "interests":
                    column = self._interests(groups)
                case "promotions":
                    column = self._promotions(groups)
            table = table.join(column.select("user", "period", pl.col("text").alias(aspect)), on=["user", "period"], how="left",
                               maintain_order="left")
        ids = pl.Series("user_id", self.user_ids.cast(pa.string())).gather(table["user"])
        return table.select(ids, "as_of", *(pl.col(aspect).fill_null("") for aspect in self.config.aspects))

    def _profile(self, names: dict[str, pl.DataFrame]) -> pl.DataFrame:
        """What the newest journey that began before the snapshot knew."""
        known = self.snapshots.with_columns(time=pl.col("as_of") - 1).sort("time").join_asof(
            self.profiles.sort("time"), on="time", by="user", strategy="backward", check_sortedness=False)
        words = []
        for name, table in names.items():
            known = known.join(table, left_on=name, right_on="id", how="left")
            words.append(pl.when(pl.col(f"word:{name}").is_not_null()).then(pl.format("{} {}", pl.lit(name), pl.col(f"word:{name}"))))
        return known.with_columns(text=pl.concat_str(words, separator=", ", ignore_nulls=True))

    def _habits(self) -> pl.DataFrame:
        """Sums up to the end of each period; blocks are requests."""
        time = pl.col("time")
        weekday, part = (time // _DAY + 3) % 7, time % _DAY // 21_600
        sums = self.events.group_by("user", "period").agg(
            pl.len().alias("items"), pl.col("block").n_unique().alias("requests"), pl.col("value").fill_nan(0).sum(),
            *((weekday == i).sum().alias(name) for i, name in enumerate(_WEEKDAYS)),
            *((part == i).sum().alias(name) for i, name in enumerate(_PARTS)),
            time.min().alias("first"), time.max().alias("last")).sort("user", "period")
        sums = sums.with_columns(pl.col("items", "requests", "value", *_WEEKDAYS, *_PARTS).cum_sum().over("user"),
                                 pl.col("first").cum_min().over("user"))
        apart = (pl.col("last") - pl.col("first")) / _DAY / (pl.col("requests") - 1)
        return sums.with_columns(text=pl.format(
            "about {} requests, {} days apart, each {} items worth {}, mostly {} {}", _about(pl.col("requests")),
            _about(pl.when(pl.col("requests") > 1).then(apart).otherwise(0)), _about(pl.col("items") / pl.col("requests")),
            _about(pl.col("value") / pl.col("requests")), _largest(_WEEKDAYS), _largest(_PARTS)))

    def _interests(self, groups: pl.DataFrame) -> pl.DataFrame:
        organic = self.events.filter(~pl.col("is_ad"))
        return self._join_lists(mostly=self._top(organic, groups), lately=self._top(organic, groups, only_this_period=True))

    def _promotions(self, groups: pl.DataFrame) -> pl.DataFrame:
        ads = self.events.filter("is_ad")
        clicked = self._top(ads.filter(pl.col("action") == Action.CLICK), groups)
        converted = self._top(ads.filter(pl.col("action") == Action.CONVERSION), groups)
        return self._join_lists(**{"clicks ads of": clicked, "converts on": converted})

    def _top(self, events: pl.DataFrame, groups: pl.DataFrame, only_this_period: bool = False) -> pl.DataFrame:
        """The most frequent groups of each snapshot, `text` = their names; ties by name."""
        counts = events.filter(pl.col("group") >= 0).group_by("user", "period", "group").agg(pl.len().alias("count"))
        if not only_this_period:
            snapshots = self.snapshots.select("user", "period")
            counts = snapshots.join(counts, on="user", suffix="_of").filter(pl.col("period_of") <= pl.col("period"))
        counts = counts.group_by("user", "period", "group").agg(pl.col("count").sum()).join(groups, on="group")
        ordered = counts.sort(["user", "period", "count", "name"], descending=[False, False, True, False])
        names = pl.col("name").head(self.config.top).str.join("; ")
        return ordered.group_by("user", "period", maintain_order=True).agg(text=names)

    def _join_lists(self, **lists: pl.DataFrame) -> pl.DataFrame:
        """"title list. title list": the lists a snapshot has."""
        table = self.snapshots.select("user", "period")
        for title, column in lists.items():
            table = table.join(column.select("user", "period", pl.col("text").alias(title)), on=["user", "period"], how="left")
        return table.with_columns(text=pl.concat_str(
            [pl.format("{} {}.", pl.lit(title), pl.col(title)) for title in lists], separator=" ", ignore_nulls=True))


def _about(number: pl.Expr) -> pl.Expr:
    """Rounded to 1, 1.5, 2, 3, 5 or 7 of its power of ten, so that like users share words: "0", "1.5", "20", "7000"."""
    bounds = np.sqrt(_ROUND[1:] * _ROUND[:-1])
    labels = [f"{value:g}" for value in _ROUND]
    return pl.when(number > 0).then(number.cut(bounds.tolist(), labels=labels).cast(pl.String)).otherwise(pl.lit("0"))


def _largest(columns: tuple[str, ...]) -> pl.Expr:
    """Name of the column with the largest value, the first of equals."""
    largest = pl.max_horizontal(columns)
    return pl.coalesce(*(pl.when(pl.col(name) == largest).then(pl.lit(name)) for name in columns))


def _user_chunks(shards: Path, num_tokens: int) -> Iterator[pa.RecordBatch]:
    """Journeys of whole users, about `num_tokens` at a time: a user's journeys stand one after another in the shards."""
    held, size = [], 0
    for batch in iter_record_batches(shards):
        held.append(batch.select(_COLUMNS))
        size += len(batch["token_type"].flatten())
        if size >= num_tokens:
            whole = pa.concat_batches(held)
            ids = whole["user_id"]
            same = pc.equal(ids, ids[-1]).to_numpy(zero_copy_only=False)
            last = len(ids) - int(np.argmin(same[::-1])) if not same.all() else 0
            if last:
                yield whole.slice(0, last)
            held, size = [whole.slice(last)], len(whole.slice(last)["token_type"].flatten())
    if held:
        yield pa.concat_batches(held)


def _item_groups(catalogue: Catalogue, words: int) -> tuple[np.ndarray, pl.DataFrame]:
    """Group of each item, int32 [items], -1 = no text; and the groups' names (columns group, name)."""
    text = pl.Series("text", read_catalogue(catalogue.folder / "catalogue.arrow")["text"])
    name = text.fill_null("").str.split(" ").list.eval(pl.element().filter(pl.element() != "")).list.head(words).list.join(" ")
    frame = pl.DataFrame({"name": name})
    names = frame.unique().filter(pl.col("name") != "").sort("name").with_row_index("group").with_columns(pl.col("group").cast(pl.Int32))
    group = frame.join(names, on="name", how="left", maintain_order="left")["group"].fill_null(-1)
    return group.to_numpy().astype(np.int32), names


def _feature_names(path: Path, manifest: ShardManifest) -> dict[str, pl.DataFrame]:
    """For each feature of the users table: id of a category (hashing.feature_id, as in the shards) and its word.

    Memory: the distinct words, not the users.
    """
    source = open_source(load_config(BuildConfig, path).source)
    names = source.profile_features
    if not names or manifest.user_features[:len(names)] != names:
        raise ConfigError(f"template.build={path} has the user features {', '.join(names) or 'none'} in its users table, the shards have "
                          f"{', '.join(manifest.user_features) or 'none'}; give the config the shards were built with")
    words = {name: pa.array([], pa.string()) for name in names}
    for users in source.read_users():
        for name in names:
            words[name] = pc.unique(pa.concat_arrays([words[name], pc.unique(users[name]).cast(pa.string()).drop_null()]))
    return {name: pl.DataFrame({"id": feature_id(values, name), f"word:{name}": pl.Series(values)}) for name, values in words.items()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); run launch/build_data.py first") from None
