"""Every kind of model hands off: a bundle ranks as the rankers of launch/evaluate.py, by search, item head and mix; its rules hold."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checkpoint_files import write_checkpoint
from ranks import ROOT
from test_hand_off import CONTEXT, call, lines_of

from data_pipeline.history import build_history
from data_pipeline.knowledge import BuildKnowledgeConfig, build_knowledge
from data_pipeline.users import open_users
from gpr_dist.config import build_config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.knowledge import KnowledgeVectors
from gpr_dist.data.loader import LoaderConfig, iter_once
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.errors import GPRError
from gpr_dist.evaluation.baselines import Ranking
from gpr_dist.evaluation.evaluate import GenerativeRanker
from gpr_dist.evaluation.item_ranker import ItemRanker
from gpr_dist.evaluation.mix import mix
from gpr_dist.evaluation.validate import open_catalogue
from gpr_dist.hashing import hash_strings
from gpr_dist.job import DataConfig, PretrainConfig, open_past, resolve
from gpr_dist.model.gpr import GPR
from gpr_dist.schema import TokenType
from gpr_dist.serving.prompts import build_prompts
from gpr_dist.serving.recommender import Recommender
from gpr_dist.tokenizer.semantic_ids import SemanticIds

SMALL = {"width": 16, "num_mtp_heads": 2, "embedding": {"feature_buckets": 64, "scene_buckets": 8}}
WIDTH, K, LIST = 10, 5, 8
ITEMS = {"buckets": 256, "head": "untied"}
KINDS = {
    "item head": {"items": ITEMS},
    "tied head with codes, hashed": {"items": {"buckets": 40, "head": "tied", "head_codes": True}},
    "pointer and item head": {"pointer": {"width": 8}, "items": ITEMS},
    "knowledge": {"knowledge": True},
    "thinking and refining": {"ptd": {"num_heads": 2, "num_thinking": 2, "refining": True}},
    "recursion, silu, relative": {"hsd": {"num_heads": 2, "num_layers": 3, "recursions": 2, "score": "silu", "position": "relative"}},
    "all": {"pointer": {"width": 8}, "items": ITEMS, "knowledge": True, "ptd": {"num_heads": 2, "num_thinking": 2, "refining": True},
            "hsd": {"num_heads": 2, "num_layers": 3, "recursions": 2}},
}


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Folder with history/ and knowledge/ of the tiny data."""
    folder = tmp_path_factory.mktemp("made")
    build_history(tiny / "data", folder / "history")
    build_knowledge(build_config(BuildKnowledgeConfig, {
        "data": str(tiny / "data"), "out": str(folder / "knowledge"), "template": {"every_days": 7, "words": 1}, "max_missing_frac": 1.0,
        "embedding": {"dim": 6}}, "test"))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def opened(request, tiny, made, tmp_path_factory):
    """(kind, step folder, job, model, its bundle)."""
    settings = {**SMALL, "hsd": {"num_heads": 2}, "ptd": {"num_heads": 2}, **KINDS[request.param]}
    knowledge = made / "knowledge" if settings.pop("knowledge", False) else None
    data = DataConfig(folder=tiny / "data", build=tiny / "build.yaml", knowledge=knowledge, history=made / "history", history_events=20)
    job, _, fingerprints = resolve(PretrainConfig(data=data, model=settings))
    torch.manual_seed(5)
    model = GPR(job.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    root = tmp_path_factory.mktemp("run")
    step = write_checkpoint(root / "run" / "step-000003", dict(model.named_parameters()), 2, job.model_dump(mode="json"), fingerprints)
    weights = ["mix_weights={generative: 0.6, item head: 1.4}"] if job.model.items.has_head else []
    assert call("export", f"checkpoint={step}", f"out={root}/bundle", f"search.width={WIDTH}", f"list_length={LIST}", *weights) == 0
    recommender = Recommender.load(root / "bundle")
    limits = recommender.settings.requests.model_copy(update={"context_tokens": CONTEXT})  # as the shards of the tiny data are cut
    recommender.settings = recommender.settings.model_copy(update={"requests": limits})
    return request.param, step, job, model, recommender


def asked(tiny, job):
    """Requests made from the raw logs: the first request of every test row, with what is known about its user."""
    events: dict[str, list] = {}
    for name, kind in (("ads", "ad"), ("reads", "organic")):
        for row in pl.read_parquet(tiny / "logs" / f"{name}.parquet").iter_rows(named=True):
            event = {"item_id": row["item"], "type": kind, "time": row["ts"]}
            if kind == "ad":
                event |= {"action": "click", "value": row["ecpm"], "env": {"slot": row["slot"]}}
            events.setdefault(row["uid"], []).append(event)
    raw = dict(zip(open_users(tiny / "data").stored(pa.array(list(events))).to_pylist(), events, strict=True))  # stored id -> of the logs
    reader = ShardReader(tiny / "data" / "shards" / "test")
    vectors = KnowledgeVectors(job.data.knowledge, reader.manifest) if job.data.knowledge else None
    requests = []
    for number in range(reader.num_batches):
        for row in reader.read_batch(number).to_pylist():
            kind = np.array(row["token_type"])
            first_ad = row["num_context"] + int(np.flatnonzero(kind[row["num_context"]:] == TokenType.I)[0])
            now = row["timestamp"][first_ad]
            slot = next(e["env"]["slot"] for e in events[raw[row["user_id"]]] if e["type"] == "ad" and e["time"] == now)
            request = {"user": raw[row["user_id"]], "time": now, "env": {"slot": slot}, "history": events[raw[row["user_id"]]], "k": K}
            if vectors is not None:
                request["knowledge"] = vectors.gather(np.array([len(requests)]))[0].tolist()
            requests.append(request)
    return requests


def evaluated(tiny, job, model, weight_I, key_R):
    """(ranker -> ranking of every test row's first request), by the rankers of launch/evaluate.py on the shards.

    Args: key_R: of the requests, in the place of row numbers: refining draws its noise by them.
    """
    semantic_ids, eligibility = SemanticIds.load(tiny / "data" / "tokenizer"), Eligibility.load(tiny / "data")
    catalogue = open_catalogue(semantic_ids, eligibility, weight_I, "cpu")
    rankers = {"generative": GenerativeRanker(ModelDecoder(model, "cpu"), catalogue.trie, eligibility, catalogue.item_weight, LIST, WIDTH,
                                              job.data.softmax)}
    if job.model.items.has_head:
        rankers["item head"] = ItemRanker(model, "cpu", semantic_ids.codes_NL, eligibility, LIST)
    past = open_past(job.model, job.data, semantic_ids, eligibility)
    found = {name: {} for name in rankers}
    for batch in iter_once(tiny / "data" / "shards" / "test", LoaderConfig(micro_batch_tokens=500), World(0, 1), semantic_ids.codes_NL, 2,
                           knowledge=job.data.knowledge, past=past):
        rows = batch.row_ids_B
        first = torch.searchsorted(batch.request_row_R, torch.arange(len(rows)))
        batch = replace(batch, row_ids_B=torch.from_numpy(key_R)[rows])
        for name, ranker in rankers.items():
            item_RK, score_RK = ranker(batch)
            found[name] |= {row: (item_RK[at].numpy(), score_RK[at].numpy()) for row, at in zip(rows.tolist(), first.tolist(), strict=True)}
    rankings = {name: Ranking(*(np.stack(part) for part in zip(*(answers[row] for row in range(len(answers))), strict=True)))
                for name, answers in found.items()}
    if "item head" in rankings:
        rankings["mix"] = mix(list(rankings.values()), (0.3, 0.7), LIST)
    return rankings


def test_answers_are_those_of_the_evaluation(tiny, opened):
    _, _, job, model, recommender = opened
    parsed = recommender.parse(lines_of(asked(tiny, job)))
    assert not parsed.errors and parsed.requests.num_rows > 50
    key_R = build_prompts(parsed.requests, recommender.settings.requests, recommender.index_of).key
    rankings = evaluated(tiny, job, model, np.load(recommender.folder / "item_weight.npy"), key_R)
    for name, ranking in rankings.items():
        recommender.use_ranker(name)
        answers = recommender.recommend(parsed)
        assert len(answers) == len(ranking.item_RK)
        for answer, items, scores in zip(answers, ranking.item_RK, ranking.score_RK, strict=True):
            np.testing.assert_allclose(answer.scores, scores[:K], rtol=0, atol=5e-5, err_msg=name)
            swapped = np.flatnonzero(np.array(answer.items) != items[:K])  # rounding may swap items of equal score only
            assert all(np.abs(scores - answer.scores[at]).min() < 5e-5 for at in swapped) and len(swapped) <= 2, name
            assert len(answer.values) == K and np.isfinite(answer.values).all()


def test_a_ranker_that_the_model_lacks_is_refused(opened, tmp_path):
    _, step, job, _, recommender = opened
    if job.model.items.has_head:
        with pytest.raises(GPRError, match="at most 10 ads"):
            call("recommend", f"bundle={recommender.folder}", "ranker=mix", "k=11")
        with pytest.raises(GPRError, match="needs mix_weights"):
            call("export", f"checkpoint={step}", f"out={tmp_path}/b", "ranker=mix")
        with pytest.raises(GPRError, match="it needs ranker=generative"):
            call("export", f"checkpoint={step}", f"out={tmp_path}/b", "ranker=item head", "search.strategy=value", "order=value")
    else:
        with pytest.raises(GPRError, match="needs a model with an item head"):
            call("recommend", f"bundle={recommender.folder}", "ranker=mix")
        with pytest.raises(GPRError, match="needs a model with an item head"):
            call("export", f"checkpoint={step}", f"out={tmp_path}/b", "ranker=item head")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("opened", ["pointer and item head"], indirect=True)
def test_rules_decide_who_sees_what(tiny, opened, tmp_path):
    """The bundle's rules, other ones at serving, and a budget that runs out meanwhile; groups and lists hold beside them."""
    _, step, job, _, _ = opened
    names = [f"ad-{n}" for n in range(60)]
    ads = pa.table({"item_id": names, "slots": [["slot-0"] if n % 2 else [] for n in range(60)], "funded": [n % 3 > 0 for n in range(60)],
                    "cap": [1] * 60})
    pq.write_table(ads, tmp_path / "ads.parquet")
    rules = [{"kind": "targeting", "column": "slots", "field": "slot"}, {"kind": "flag", "column": "funded"}]
    (tmp_path / "rules.yaml").write_text(json.dumps({"ads": "ads.parquet", "rules": rules}))
    rules = [{"kind": "cap", "column": "cap", "within_hours": 1e6}]
    (tmp_path / "capped.yaml").write_text(json.dumps({"ads": "ads.parquet", "rules": rules}))
    assert call("export", f"checkpoint={step}", f"out={tmp_path}/bundle", f"search.width={WIDTH}", "calibration_rows=0",
                f"rules={tmp_path}/rules.yaml") == 0
    recommender = Recommender.load(tmp_path / "bundle")
    base = [request | {"k": WIDTH} for request in asked(tiny, job)[:8]]
    ask = lambda requests: recommender.recommend(recommender.parse(lines_of(requests)))  # noqa: E731

    recommender.use_ranker("item head")
    by_item_head = ask([request | {"audience": {"slot": "slot-1"}} for request in base])
    recommender.use_ranker("generative")
    allowed = {slot: {n for at, n in enumerate(names) if at % 3 and (at % 2 == 0 or slot == "slot-0")} for slot in ("slot-0", "slot-1")}
    for slot, wanted in allowed.items():
        for answer in ask([request | {"audience": {"slot": slot}} for request in base]):
            assert len(answer.item_ids) == WIDTH and set(answer.item_ids) <= wanted
        few = [*sorted(wanted)[:3], "ad-3", "ad-9"]
        narrow, = ask([base[0] | {"audience": {"slot": slot}, "eligible": few}])
        listed, = ask([base[0] | {"audience": {"slot": slot}, "eligible": few, "exclude": few[:1]}])
        assert set(narrow.item_ids) == set(few[:3]) and set(listed.item_ids) == set(few[1:3])
        assert sum(np.exp(narrow.scores)) == pytest.approx(1, abs=1e-4)  # of those who may be shown
    assert all(len(answer.item_ids) == WIDTH and set(answer.item_ids) <= allowed["slot-1"] for answer in by_item_head)
    assert recommender.parse(lines_of([base[0] | {"audience": {"place": "x"}}])).errors == {0: "unknown field audience.place"}
    index = recommender.index_of(hash_strings(pa.array(["ad-4", "ad-10"])))
    recommender.use_rules(recommender.audiences.rules.switched("funded", torch.from_numpy(index), False))
    assert not any({"ad-4", "ad-10"} & set(answer.item_ids) for answer in ask(base))

    (tmp_path / "requests.jsonl").write_text("\n".join(json.dumps(request) for request in base))
    done = subprocess.run([sys.executable, ROOT / "launch" / "recommend.py", f"bundle={tmp_path}/bundle", f"rules={tmp_path}/capped.yaml",
                           f"requests={tmp_path}/requests.jsonl"], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for request, answer in zip(base, map(json.loads, done.stdout.splitlines()), strict=True):
        seen = {event["item_id"] for event in request["history"] if event["type"] == "ad" and event["time"] < request["time"]}
        found = {ad["item_id"] for ad in answer["ads"]}
        assert seen and len(found) == WIDTH and found <= set(names) and not found & seen
