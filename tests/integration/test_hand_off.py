"""The hand-off: a checkpoint of three ranks → bundle → the same ads for requests made from the raw logs; and further jobs start from it."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checkpoint_files import write_checkpoint
from journeys_fixture import stored_rows
from ranks import ROOT, run_ranks

from data_pipeline.history import build_history
from data_pipeline.users import open_users
from gpr_dist.bundle import MANIFEST, WEIGHTS, read_manifest
from gpr_dist.data.collate import collate
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.past import PastItems
from gpr_dist.data.reader import ShardReader
from gpr_dist.decoding.legality import Eligible, LegalCache
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.decoding.ranking import rank_items
from gpr_dist.decoding.search import SearchConfig, search
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import GPRError
from gpr_dist.job import DataConfig, PretrainConfig, resolve
from gpr_dist.model.gpr import GPR
from gpr_dist.schema import EVERY_AD, TokenType
from gpr_dist.serving.prompts import build_prompts
from gpr_dist.serving.recommender import NO_ELIGIBLE_AD, Recommender
from gpr_dist.tokenizer.semantic_ids import SemanticIds

MODEL = {"width": 16, "num_mtp_heads": 2, "hsd": {"num_heads": 2}, "ptd": {"num_heads": 2},
         "embedding": {"feature_buckets": 64, "scene_buckets": 8}, "pointer": {"width": 8}}
WIDTH, K, CONTEXT = 12, 5, 16


def call(script, *arguments):
    """The script's main with these arguments, in this process. Returns: its exit code."""
    sys.path.insert(0, str(ROOT / "launch"))
    found, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        return importlib.import_module(script).main()
    finally:
        sys.argv = found
        sys.path.remove(str(ROOT / "launch"))


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """(step folder of a checkpoint of 3 ranks, its model, folder of the users' history)."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    history = folder.parent / "history"
    build_history(tiny / "data", history)
    data = DataConfig(folder=tiny / "data", build=tiny / "build.yaml", history=history, history_events=20)
    job, _, fingerprints = resolve(PretrainConfig(data=data, model=MODEL))
    torch.manual_seed(3)
    model = GPR(job.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    step = write_checkpoint(folder / "step-000012", dict(model.named_parameters()), 3, job.model_dump(mode="json"), fingerprints)
    return step, model, history


@pytest.fixture(scope="module")
def bundle(tiny, trained, tmp_path_factory):
    """With two eligibility groups, of every second and every tenth ad, that the shards do not use."""
    out = tmp_path_factory.mktemp("hand-off") / "bundle"
    data = out.parent / "data"
    shutil.copytree(tiny / "data", data)
    ads = Eligibility.load(data).items(EVERY_AD)
    groups = pa.record_batch([pa.array([ads[::2], ads[::10]], pa.list_(pa.int32()))], names=["items"])
    with pa.ipc.new_file(str(data / "eligibility.arrow"), groups.schema) as writer:
        writer.write_batch(groups)
    (out.parent / "placements.json").write_text('{"feed": 0, "banner": 1}')
    assert call("export", f"checkpoint={trained[0].parent}", f"out={out}", f"search.width={WIDTH}", "license=CC0", f"data={data}",
                f"placements={out.parent}/placements.json") == 0
    return out


@pytest.fixture(scope="module")
def recommender(bundle):
    opened = Recommender.load(bundle)
    limits = opened.settings.requests.model_copy(update={"context_tokens": CONTEXT})  # as the shards of the tiny data are cut
    opened.settings = opened.settings.model_copy(update={"requests": limits})
    return opened


@pytest.fixture(scope="module")
def asked(tiny):
    """Requests made from the raw logs: the first request of every test row, with all events of its user, also later ones."""
    logs = {name: pl.read_parquet(tiny / "logs" / f"{name}.parquet") for name in ("ads", "reads")}
    events = {}
    for name, kind in (("ads", "ad"), ("reads", "organic")):
        for row in logs[name].iter_rows(named=True):
            event = {"item_id": row["item"], "type": kind, "time": row["ts"]}
            if kind == "ad":
                event |= {"action": "click", "value": row["ecpm"], "env": {"slot": row["slot"]}}
            events.setdefault(row["uid"], []).append(event)
    raw = dict(zip(open_users(tiny / "data").stored(pa.array(list(events))).to_pylist(), events, strict=True))  # stored id -> of the logs
    reader = ShardReader(tiny / "data" / "shards" / "test")
    requests, sites = [], []
    for number in range(reader.num_batches):
        for row in reader.read_batch(number).to_pylist():
            kind = np.array(row["token_type"])
            first_ad = row["num_context"] + int(np.flatnonzero(kind[row["num_context"]:] == TokenType.I)[0])
            now = row["timestamp"][first_ad]
            slot = next(e["env"]["slot"] for e in events[raw[row["user_id"]]] if e["type"] == "ad" and e["time"] == now)
            user = raw[row["user_id"]]
            requests.append({"user": user, "time": now, "env": {"slot": slot}, "history": events[user], "k": K})
            sites.append((len(requests) - 1, first_ad))
    return requests, sites


def lines_of(requests):
    return [json.dumps(request).encode() for request in requests]


def checkpoint_answers(tiny, model, history, weight_I):
    """The best items and scores of every test row's first request, by the search of launch/evaluate.py on the shards' own batches."""
    semantic_ids = SemanticIds.load(tiny / "data" / "tokenizer")
    eligibility = Eligibility.load(tiny / "data")
    ads = eligibility.items(EVERY_AD)
    trie = Trie.from_codes(semantic_ids.codes_NL[ads], semantic_ids.codebook_size, ads)
    weight_M, cache = trie.slot_weights(torch.from_numpy(weight_I)), LegalCache(trie, eligibility.items)
    reader, answers = ShardReader(tiny / "data" / "shards" / "test"), []
    past = PastItems(semantic_ids.codes_NL, semantic_ids.codebook_size, eligibility, history, 20)
    older = past.open_history(reader.manifest)
    for number in range(reader.num_batches):
        columns = stored_rows(reader.read_batch(number))
        rows = np.arange(reader.num_rows[number])
        batch = collate(columns.take(rows), rows + reader.first_row[number], semantic_ids.codes_NL, 1, len(reader.manifest.user_features),
                        len(reader.manifest.env_features))
        batch = past.add_to(batch, older)
        assert len(batch.past_item_X) and len(batch.copy_request_M)
        decode = ModelDecoder(model, "cpu")
        legal, group = cache(batch.request_eligibility_R)
        eligible, config = Eligible.of(trie, legal, group), SearchConfig(width=WIDTH, softmax="prior")
        result = search(decode.searcher(decode.start(batch)), eligible, config, weight_M)
        ranked = rank_items(result, eligible, weight_M, K, "prior")
        first = torch.searchsorted(batch.request_row_R, torch.from_numpy(rows))
        answers += [(ranked.item_BK[r], ranked.score_BK[r]) for r in first.tolist()]
    return answers


def test_the_prompts_are_those_of_the_shards(tiny, recommender, asked):
    requests, sites = asked
    prompts = build_prompts(recommender.parse(lines_of(requests)).requests, recommender.settings.requests, recommender.index_of)
    reader = ShardReader(tiny / "data" / "shards" / "test")
    columns = stored_rows(pa.Table.from_batches([reader.read_batch(n) for n in range(reader.num_batches)]).combine_chunks()
                                .to_batches()[0])
    assert recommender.settings.requests.time_features == ("hour",) and len(sites) > 50
    for number, first_ad in sites:
        row = columns.take(np.array([number]))
        tokens = {name: values[:first_ad] for name, values in row.tokens.items()}
        found = prompts.batch(np.array([number]), recommender.semantic_ids.codes_NL)
        for name in ("token_type", "block", "item", "action", "scene", "timestamp", "value"):
            np.testing.assert_array_equal(getattr(found, f"{name}_T").numpy(), tokens[name], f"{name} of row {number}")
        num_e = int((tokens["token_type"] == TokenType.E).sum())
        np.testing.assert_array_equal(found.env_features_EF.numpy().ravel(), row.sides["env_features"][1][:2 * num_e])


def test_answers_are_the_checkpoints(tiny, trained, bundle, recommender, asked):
    requests, _ = asked
    expected = checkpoint_answers(tiny, *trained[1:], np.load(bundle / "item_weight.npy"))
    answers = recommender.recommend(recommender.parse(lines_of(requests)))
    assert len(answers) == len(expected)
    for answer, (items, scores) in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer.scores, scores.numpy(), rtol=0, atol=2e-5)
        swapped = np.flatnonzero(np.array(answer.items) != items.numpy())  # rounding may swap items of equal score only
        assert all(np.abs(scores[at] - np.array(answer.scores)).min() < 2e-5 for at in swapped) and len(swapped) <= 2
        assert len(answer.values) == K and np.isfinite(answer.values).all()


def test_an_answer_does_not_depend_on_its_company(recommender, asked):
    requests = asked[0][:20]
    together = recommender.recommend(recommender.parse(lines_of(requests)))
    for request, answer in zip(requests[::4], together[::4], strict=True):
        alone = recommender.recommend(recommender.parse(lines_of([request])))[0]
        assert alone.items == answer.items and alone.skipped == answer.skipped
        np.testing.assert_allclose(alone.scores, answer.scores, rtol=0, atol=2e-5)
        np.testing.assert_allclose(alone.values, answer.values, rtol=1e-4)


def test_only_the_ads_asked_for(recommender, asked):
    base = asked[0][0] | {"k": 12}
    best = recommender.recommend(recommender.parse(lines_of([base])))[0].item_ids
    ads = [str(name) for name in recommender.ids.take(pa.array(recommender.eligibility.items(EVERY_AD))).to_pylist()]
    few = [best[3], ads[0], ads[1], "no such ad"]
    cases = [base | {"eligible": few}, base | {"exclude": best[:4]}, base | {"eligible": few, "exclude": [best[3]]},
             base | {"eligible": []}, base | {"eligible": ["no such ad"]}, base | {"exclude": ads}, base | {"eligible": ["article-1"]},
             base | {"k": 2}]
    answers = recommender.recommend(recommender.parse(lines_of(cases)))
    assert set(answers[0].item_ids) == set(few) - {"no such ad"} and answers[0].unknown_ads == 1
    assert not set(answers[1].item_ids) & set(best[:4]) and len(answers[1].item_ids) == 12
    assert set(answers[2].item_ids) == {ads[0], ads[1]} - {best[3]}
    assert all(answer.item_ids == [] and answer.reason == NO_ELIGIBLE_AD for answer in answers[3:7])
    assert answers[7].item_ids == best[:2]


def test_a_placement_is_a_group_is_a_list(recommender, asked):
    base = asked[0][0] | {"k": 12}
    items = recommender.eligibility.items(1)
    names = recommender.ids.take(pa.array(items)).to_pylist()
    cases = [base | {"placement": "banner"}, base | {"group": 1}, base | {"eligible": names[::-1] + names[:3]}, base | {"group": 0},
             base | {"group": 1, "exclude": names[1:]}]
    one, two, three, other, single = recommender.recommend(recommender.parse(lines_of(cases)))
    assert one.items == two.items == three.items and set(one.items) <= set(items.tolist()) and len(one.items) == 12
    assert one.scores == two.scores == three.scores
    assert set(other.items) <= set(recommender.eligibility.items(0).tolist()) and other.items != one.items
    assert single.item_ids == names[:1] and abs(single.scores[0]) < 1e-5  # the only ad there is has probability 1


def test_cold_start(recommender, asked):
    base = {"time": 8_000_000, "env": {"slot": "slot-1"}}
    unknown = {"item_id": "never seen", "type": "organic", "time": 7_000_000}
    answers = recommender.recommend(recommender.parse(lines_of([base, base | {"user": "nobody", "history": [unknown] * 3},
                                                                base | {"env": {"slot": "a new slot"}}])))
    assert all(len(answer.items) == 10 for answer in answers)
    assert answers[0].items == answers[1].items and answers[1].skipped == {"unknown_items": 3} and answers[0].skipped == {}


def test_the_command_answers_every_line(bundle, asked, tmp_path, capsys):
    requests, _ = asked
    good = [json.dumps(request) for request in requests[:3]]
    later = {**requests[0], "history": [{"item_id": "ad-1", "type": "organic", "time": requests[0]["time"]}]}
    text = "\n".join([good[0], "nonsense", "", good[1], json.dumps({"tiem": 3}), json.dumps(requests[2] | {"eligible": []}),
                      json.dumps(later)])

    def ask(name, *arguments):
        capsys.readouterr()
        code = call("recommend", f"bundle={bundle}", f"requests={tmp_path / name}", *arguments)
        return code, *capsys.readouterr()

    (tmp_path / "requests.jsonl").write_text(text)
    code, out, err = ask("requests.jsonl", "--bench", "bench_requests=2")
    found = {answer["line"]: answer for answer in map(json.loads, out.splitlines())}
    assert code == 0 and sorted(found) == [1, 2, 4, 5, 6, 7]
    assert "one JSON object" in found[2]["error"] and "did you mean time" in found[5]["error"]
    assert len(found[1]["ads"]) == K and {"item_id", "score", "value"} == found[1]["ads"][0].keys()
    assert found[6]["ads"] == [] and found[6]["reason"] == NO_ELIGIBLE_AD and found[7]["skipped"] == {"not_before_the_request": 1}
    assert "6 requests: 4 answered (1 without ads), 2 malformed" in err and "one by one: 2 requests, p50" in err

    piped = subprocess.run([sys.executable, ROOT / "launch" / "recommend.py", f"bundle={bundle}"], input=text, capture_output=True,
                           text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert piped.returncode == 0, piped.stderr
    assert [answer["line"] for answer in map(json.loads, piped.stdout.splitlines())] == sorted(found)

    (tmp_path / "bad.jsonl").write_text("nonsense\n{")
    (tmp_path / "empty.jsonl").write_text("")
    assert ask("bad.jsonl")[0] == 1 and ask("empty.jsonl")[0] == 0
    table = pa.Table.from_pylist([json.loads(line) for line in good])
    pq.write_table(table, tmp_path / "requests.parquet")
    with pa.ipc.new_file(str(tmp_path / "requests.arrow"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    expected = ask("good.jsonl", "chunk_requests=2")[1]
    assert ask("requests.parquet", "chunk_requests=2")[1] == ask("requests.arrow", "chunk_requests=2")[1] == expected != ""


def test_bad_input_is_refused(bundle, trained, tmp_path):
    def refused(message, script, *arguments):
        with pytest.raises(GPRError, match=message):
            call(script, *arguments)

    out = f"out={tmp_path / 'b'}"
    refused("already exists", "export", f"checkpoint={trained[0]}", f"out={bundle}")
    (tmp_path / "p.json").write_text('{"feed": 7}')
    refused("feed is no row", "export", f"checkpoint={trained[0]}", out, f"placements={tmp_path}/p.json")
    refused("at most 12 ads", "recommend", f"bundle={bundle}", "k=13")
    refused("does not exist", "recommend", f"bundle={bundle}", "requests=nowhere.jsonl")
    (tmp_path / "no.parquet").write_text("no")
    refused("cannot be read", "recommend", f"bundle={bundle}", f"requests={tmp_path}/no.parquet")
    altered = altered_copy(bundle, tmp_path)
    refused(f"{WEIGHTS} was altered", "recommend", f"bundle={altered}")
    (altered / MANIFEST).unlink()
    refused("no complete bundle", "recommend", f"bundle={altered}")

    torn = tmp_path / "torn" / "step-000012"
    shutil.copytree(trained[0], torn)
    (torn / "rank-00002.safetensors").unlink()
    refused("rank-00002.safetensors is missing", "export", f"checkpoint={torn}", out)
    state = json.loads((trained[0] / "state.json").read_text())
    write_checkpoint(tmp_path / "third" / "step-000001", dict(trained[1].named_parameters()), 1, state["config"],
                     state["fingerprints"] | {"tokenizer": "0" * 16})
    refused("codebooks 0000000000000000", "export", f"checkpoint={tmp_path}/third", out)
    assert not (tmp_path / "b").exists() and not list(tmp_path.glob(".b*"))


def altered_copy(bundle, folder):
    altered = folder / "altered"
    shutil.copytree(bundle, altered)
    content = bytearray((altered / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (altered / WEIGHTS).write_bytes(content)
    return altered


def test_the_bundle_is_described(bundle):
    card = (bundle / "README.md").read_text()
    for text in ("step 12", "CC0", "slot, hour", "max", "Fingerprints", "init_from"):
        assert text in card
    manifest = read_manifest(bundle)
    assert manifest.source["world_size"] == 3 and manifest.fingerprints.keys() == {"tokenizer", "data", "catalogue"}
    assert {"README.md", "model.safetensors", "trie.safetensors", "item_weight.npy", "calibration.json",
            "tokenizer/tokenizer.json", "catalogue/catalogue.arrow"} <= manifest.files.keys()


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "wandb", "polars", "duckdb", "sklearn", "data_pipeline", "launch") \\
                or name.startswith(("gpr_dist.training", "gpr_dist.evaluation", "gpr_dist.objectives")):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from gpr_dist.serving.recommender import Recommender
recommender = Recommender.load(sys.argv[1])
answer = recommender.recommend(recommender.parse([b'{"time": 8000000}']), 3)[0]
assert len(answer.item_ids) == 3, answer
assert not {"deepspeed", "wandb", "polars", "sklearn"} & {name.split(".")[0] for name in sys.modules}
"""


def test_it_loads_without_training_code(bundle, tmp_path):
    (tmp_path / "load.py").write_text(BLOCKED)
    done = subprocess.run([sys.executable, tmp_path / "load.py", bundle], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def test_jobs_start_from_checkpoint_and_bundle(trained, bundle, tmp_path):
    """On 2 ranks, from a checkpoint of 3: weights bit by bit, no moments; another model, tokenizer or damage is refused on every rank."""
    step, model, _ = trained
    prints, config = json.loads((step / "state.json").read_text())["fingerprints"], model.config.model_dump(mode="json")
    base = {"source": str(step.parent), "model": config, "fingerprints": prints, "stage": 3, "save": str(tmp_path / "run")}
    good = {"run": base, "step": base | {"source": str(step), "stage": 0, "save": str(tmp_path / "step")},
            "bundle": base | {"source": str(bundle), "save": str(tmp_path / "bundle")}}
    bad = {"model.width=16, this job has model.width=32": base | {"model": {**config, "width": 32}},
           "model.hsd.num_heads=2": base | {"model": {**config, "hsd": {**config["hsd"], "num_heads": 4}}},
           f"tokenizer {prints['tokenizer']}, this job uses tokenizer 0000": base | {"fingerprints": {**prints, "tokenizer": "0" * 16}},
           "no complete checkpoint and no bundle": base | {"source": str(tmp_path / "nowhere")},
           "altered|damaged": base | {"source": str(altered_copy(bundle, tmp_path))}}
    ranks = run_ranks("bundle_workers:start_from", 2, tmp_path / "job", cases=[*good.values(), *bad.values()])
    for results in ranks:
        for message, result in zip(bad, results[len(good):], strict=True):
            assert any(text in result for text in message.split("|")), (message, result)
    wanted = {name: parameter.detach().reshape(-1) for name, parameter in model.named_parameters()}
    for name in good:
        covered = dict.fromkeys(wanted, 0)
        for rank in range(2):
            for weight, lo, hi, tensors in torch.load(tmp_path / f"{name}-{rank}.pt"):
                assert torch.equal(tensors["param"], wanted[weight][lo:hi]), (name, weight)
                assert not tensors["exp_avg"].any() and not tensors["exp_avg_sq"].any()
                covered[weight] += hi - lo
        assert covered == {weight: len(flat) for weight, flat in wanted.items()}
