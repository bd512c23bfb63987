"""The template: what it writes of a small example, and that no text knows anything later than the journeys it is for."""

import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_pipeline import user_texts
from data_pipeline.build import BuildConfig, build_data
from data_pipeline.knowledge import TEXTS, BuildKnowledgeConfig, KnowledgeEncoderConfig, build_knowledge
from data_pipeline.shards import iter_record_batches
from data_pipeline.user_texts import TemplateConfig, first_ad_times, write_texts
from gpr_dist.config import load_config
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.schema import KnowledgeManifest, TokenType

DAY = 86_400
ITEMS = {"milk": "DAIRY milk whole litre", "skim": "DAIRY milk skimmed litre", "bread": "BAKERY bread rye", "cake": "BAKERY cake", 
         "soap": "", "tea": "DRINKS tea green", "cola": "DRINKS cola"}
ALL_ASPECTS = ("profile", "habits", "interests", "promotions")


def build(folder, events, split=("1970-03-01", "1970-04-01"), users=None):
    """Shards of (user, item, time, kind, action) events. Returns: the build's config file."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"user_id": "user", "item_id": "item", "timestamp": "time", "time_format": "s"}
    logs = []
    for kind in ("ad", "organic"):
        user, item, time, _, action = zip(*(e for e in events if e[3] == kind), strict=True)
        table = {"user": user, "item": item, "time": time}
        if kind == "ad":
            table |= {"action": action, "value": [2.0] * len(user)}
        pq.write_table(pa.table({name: list(values) for name, values in table.items()}), folder / f"{kind}.parquet")
        extra = {"action_column": "action", "action_values": {"click": "click", "buy": "conversion", "none": "impression"},
                 "value": "value"} if kind == "ad" else {}
        logs.append({"path": str(folder / f"{kind}.parquet"), **columns, "kind": kind, **extra})
    pq.write_table(pa.table({"id": list(ITEMS), "text": list(ITEMS.values())}), folder / "items.parquet")
    users = users or {"ann": ("30-39", "2"), "bob": ("60+", None)}
    pq.write_table(pa.table({"id": list(users), "age": [v[0] for v in users.values()], "size": [v[1] for v in users.values()]}),
                   folder / "users.parquet")
    items_table = {"path": str(folder / "items.parquet"), "item_id": "id", "text": ["text"]}
    users_table = {"path": str(folder / "users.parquet"), "user_id": "id", "features": {"age": "age", "household": "size"}}
    config = {"source": {"format": "files", "logs": logs, "items": items_table, "users": users_table},
              "out": str(folder / "data"), "users": {"ids": "plain"}, "shards": {"rows_per_batch": 3}, "min_buckets": 2,
              "journeys": {"max_tokens": 16, "context_tokens": 8, "max_organic_per_block": 6,
                           "split": {"validation_from": split[0], "test_from": split[1]}}}
    (folder / "build.yaml").write_text(yaml.safe_dump(config))
    build_data(load_config(BuildConfig, folder / "build.yaml"))
    return folder / "build.yaml"


def texts(folder):
    return {(row.pop("user_id"), row.pop("as_of")): row for row in pa.ipc.open_file(folder / TEXTS).read_all().to_pylist()}


def random_events(seed=0, num=400, num_users=9, days=110):
    rng = random.Random(seed)
    events = {(f"u{rng.randrange(num_users)}", rng.choice(list(ITEMS)), rng.randrange(days * DAY), rng.choice(["ad", "organic"]),
               rng.choice(["click", "buy", "none"])) for _ in range(num)}
    return [e for e in sorted(events) if e[3] != "ad" or e[1] != "soap"]


def test_texts_of_a_small_example(tmp_path):
    monday = 4 * DAY
    events = [
        ("ann", "milk", monday + 8 * 3600, "organic", ""), ("ann", "skim", monday + 8 * 3600 + 1, "organic", ""),
        ("ann", "bread", monday + 8 * 3600 + 2, "organic", ""), ("ann", "soap", monday + 8 * 3600 + 3, "organic", ""),
        ("ann", "cola", monday + 9 * 3600, "ad", "click"), ("ann", "tea", monday + 9 * 3600, "ad", "none"),
        ("ann", "cake", monday + 7 * DAY + 19 * 3600, "organic", ""), ("ann", "tea", monday + 7 * DAY + 20 * 3600, "ad", "buy"),
        ("ann", "cola", 70 * DAY, "ad", "click"), ("ann", "cola", 100 * DAY, "ad", "click"),
        ("bob", "cola", 40 * DAY + 13 * 3600, "ad", "none"), ("bob", "milk", 40 * DAY + 12 * 3600, "organic", ""),
        ("bob", "tea", 71 * DAY, "ad", "buy")]
    path = build(tmp_path, events)
    first = monday + 8 * 3600
    config = TemplateConfig(aspects=ALL_ASPECTS, every_days=7, words=2, build=path)
    write_texts(tmp_path / "data", config, tmp_path / TEXTS)
    assert texts(tmp_path) == {
        ("ann", first + 7 * DAY): {
            "profile": "age 30-39, household 2", "habits": "about 1 requests, 0 days apart, each 7 items worth 5, mostly monday morning",
            "interests": "mostly DAIRY milk; BAKERY bread. lately DAIRY milk; BAKERY bread.", "promotions": "clicks ads of DRINKS cola."},
        ("ann", first + 14 * DAY): {
            "profile": "age 30-39, household 2", "habits": "about 2 requests, 7 days apart, each 5 items worth 3, mostly monday morning",
            "interests": "mostly DAIRY milk; BAKERY bread; BAKERY cake. lately BAKERY cake.",
            "promotions": "clicks ads of DRINKS cola. converts on DRINKS tea."},
        ("bob", 40 * DAY + 13 * 3600 + 1): {  # the end of the training split, before the end of the period
            "profile": "age 60+", "habits": "about 1 requests, 0 days apart, each 2 items worth 2, mostly tuesday afternoon",
            "interests": "mostly DAIRY milk. lately DAIRY milk.", "promotions": ""}}


def test_a_text_lists_what_the_user_consumed_before_it(tmp_path, monkeypatch):
    """Against a count in plain Python; and however many users are worked on at a time."""
    build(tmp_path, random_events(), users={"u0": ("1", "1")})
    config = TemplateConfig(every_days=10, top=3, words=1)
    write_texts(tmp_path / "data", config, tmp_path / TEXTS)
    consumed = []
    for batch in iter_record_batches(tmp_path / "data/shards/train"):
        for row in batch.to_pylist():
            own = range(row["num_context"], len(row["item"]) - row["num_lookahead"])
            consumed += [(row["user_id"], row["timestamp"][t], row["item"][t]) for t in own if row["token_type"][t] == TokenType.O]
    names = [text.split(" ")[0] for text in pa.ipc.open_file(tmp_path / "data/catalogue/catalogue.arrow").read_all()["text"].to_pylist()]
    found = texts(tmp_path)
    assert len(found) > 30
    for (user, as_of), text in found.items():
        counts = Counter(names[item] for who, time, item in consumed if who == user and time < as_of and names[item])
        top = sorted(counts, key=lambda name: (-counts[name], name))[:3]
        assert text["interests"].split(" lately")[0] == (f"mostly {'; '.join(top)}." if top else "")
    content = (tmp_path / TEXTS).read_bytes()
    monkeypatch.setattr(user_texts, "_CHUNK_TOKENS", 1)
    write_texts(tmp_path / "data", config, tmp_path / "small_chunks.arrow")
    assert pa.ipc.open_file(tmp_path / "small_chunks.arrow").read_all() == pa.ipc.open_file(pa.BufferReader(content)).read_all()


def knowledge(folder, build_file, **embedding):
    template = TemplateConfig(aspects=ALL_ASPECTS, every_days=10, words=2, build=build_file)
    return build_knowledge(BuildKnowledgeConfig(
        data=folder / "data", out=folder / "knowledge", template=template, max_missing_frac=1.0,
        embedding=KnowledgeEncoderConfig(dim=4, min_df=1, **embedding)))


def rows_of(folder, manifest, split):
    return next(np.load(folder / "knowledge" / entry.file) for entry in manifest.splits.values() if entry.split == split)


def test_every_journey_has_the_newest_text_of_its_user_that_is_older_than_what_it_predicts(tmp_path):
    path = build(tmp_path, random_events())
    manifest = knowledge(tmp_path, path)
    known = pa.ipc.open_file(tmp_path / "knowledge" / TEXTS).read_all().select(["user_id", "as_of"]).to_pylist()
    for split in ("train", "validation", "test"):
        found, number = rows_of(tmp_path, manifest, split), 0
        for batch in iter_record_batches(tmp_path / "data/shards" / split):
            for row, time in zip(batch.to_pylist(), first_ad_times(batch).tolist(), strict=True):
                own = range(row["num_context"], len(row["item"]) - row["num_lookahead"])
                assert time == next(row["timestamp"][t] for t in own if row["token_type"][t] == TokenType.I)
                older = [(text["as_of"], i) for i, text in enumerate(known) if text["user_id"] == row["user_id"] and text["as_of"] <= time]
                assert found[number] == max(older, default=(0, -1))[1]
                number += 1
        assert number == len(found) and (found >= 0).any() and (split != "train" or (found < 0).any())


def test_a_text_knows_nothing_of_validation_and_test(tmp_path):
    """Everything after the training cut-off is replaced: the same texts, vectors and encoder, bit for bit."""
    cut_off = 59 * DAY
    past = [e for e in random_events(1) if e[2] < cut_off]
    results = []
    for name, seed in (("a", 2), ("b", 3)):
        path = build(tmp_path / name, past + [e for e in random_events(seed) if e[2] >= cut_off])
        manifest = knowledge(tmp_path / name, path)
        results.append((manifest.vectors, manifest.blocks_checksum, manifest.encoder, (tmp_path / name / "knowledge" / TEXTS).read_bytes(),
                        rows_of(tmp_path / name, manifest, "train").tolist()))
        validation = next(iter_record_batches(tmp_path / name / "data/shards/validation"))
        results[-1] = (*results[-1], validation["item"].to_pylist())
    assert results[0][:3] == results[1][:3] and results[0][5] != results[1][5]
    # The organic events that wait for a first request after the cut-off belong to validation; those before it may differ in nothing.
    assert results[0][3:5] == results[1][3:5]


def test_training_texts_know_nothing_later_than_their_time(tmp_path):
    """Everything from a moment in the middle of the training split is replaced: the texts written before it are the same."""
    middle = 35 * DAY
    before = [e for e in random_events(4) if e[2] < middle]
    found = []
    for name, seed in (("a", 5), ("b", 6)):
        path = build(tmp_path / name, before + [e for e in random_events(seed) if middle <= e[2] < 59 * DAY])
        write_texts(tmp_path / name / "data", TemplateConfig(aspects=ALL_ASPECTS, every_days=5, build=path), tmp_path / name / TEXTS)
        found.append(texts(tmp_path / name))
    first, second = ({key: text for key, text in of.items() if key[1] <= middle - DAY} for of in found)
    assert len(first) > 10 and first == second and found[0] != found[1]


def test_what_the_template_cannot_do_is_said_in_one_line(tmp_path):
    path = build(tmp_path, random_events(7))
    with pytest.raises(ConfigError, match="build is needed by the aspect profile"):
        load_config(TemplateConfig, None, ["aspects=[profile]"])
    other = yaml.safe_load(path.read_text())
    other["source"]["users"]["features"] = {"town": "age"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(ConfigError, match="has the user features town in its users table, the shards have age, household"):
        write_texts(tmp_path / "data", TemplateConfig(aspects=("profile",), build=tmp_path / "other.yaml"), tmp_path / TEXTS)
    with pytest.raises(DataError, match=r"run launch/build_data.py first"):
        write_texts(tmp_path / "nowhere", TemplateConfig(), tmp_path / TEXTS)
    assert not (tmp_path / TEXTS).exists()
    with pytest.raises(DataError, match=r"knowledge.json cannot be read .* launch/build_knowledge.py"):
        KnowledgeManifest.load(tmp_path)
