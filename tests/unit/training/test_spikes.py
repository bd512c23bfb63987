"""A spike's rows are those that made it: named by row, file, user digest, item and advertiser, by the ranks concerned only."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from journeys_fixture import NUM_ITEMS, random_journeys, write_split

from gpr_dist.data.loader import LoaderConfig, iter_once
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.training.spikes import MAX_ADS, MAX_RANKS, MAX_ROWS, Tracer, read_traces, row_excess

USUAL = 6.0


def engine(rank=0, worst=(0.0,)):
    """A rank whose reductions return what is given, beside its own."""
    return SimpleNamespace(rank=rank, world_size=len(worst), all_reduce=lambda mine, op: torch.maximum(mine, torch.tensor(worst).double()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A split, its catalogue with advertisers, and its rows as two micro-batches."""
    folder = tmp_path_factory.mktemp("spikes")
    write_split(folder / "train", random_journeys(60), num_parts=2)
    items = range(NUM_ITEMS)
    table = pa.table({"item_id": [f"ad-{item}" for item in items], "advertiser": [f"brand-{item % 3}" for item in items]})
    with pa.OSFile(str(folder / "catalogue.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    codes = np.arange(NUM_ITEMS * 3).reshape(-1, 3) % 16
    batches = list(iter_once(folder / "train", LoaderConfig(micro_batch_tokens=1000), World(0, 1), codes, 4))[:2]
    return Tracer(ShardReader(folder / "train"), folder / "catalogue.arrow"), batches


def row_of_target(batch):
    return batch.request_row_R[batch.target_request_N]


def losses(batches, bad, value=20.0):
    """USUAL everywhere, `value` at the targets of the rows `bad`."""
    return [torch.where(torch.isin(batch.row_ids_B[row_of_target(batch)], torch.tensor(bad)), value, USUAL) for batch in batches]


def test_excess_is_what_a_row_adds_above_the_usual(data):
    batch = data[1][0]
    nll_N = torch.rand(len(batch.target_head_N)) * 10
    slow = [sum(float(x) - USUAL for x, row in zip(nll_N, row_of_target(batch), strict=True) if row == b) for b in range(batch.num_rows)]
    assert row_excess(batch, nll_N, USUAL).tolist() == pytest.approx(slow, abs=1e-4)


def test_the_rows_of_a_planted_spike_are_named(data, tmp_path):
    tracer, batches = data
    with_targets = [int(batch.row_ids_B[row_of_target(batch).mode().values]) for batch in batches]
    tracer.trace(engine(), tmp_path, 7, "loss spike", batches, losses(batches, with_targets), USUAL)
    [trace] = read_traces(tmp_path)
    assert trace["step"] == 7 and trace["reason"] == "loss spike" and {row["row"] for row in trace["rows"]} == set(with_targets)
    for row in trace["rows"]:
        batch = next(batch for batch in batches if row["row"] in batch.row_ids_B)
        items = batch.target_item_N[batch.row_ids_B[row_of_target(batch)] == row["row"]].tolist()
        assert row["targets"] == len(items) and row["mean_nll"] == 20 and row["excess"] == pytest.approx(14 * len(items))
        assert row["where"] == tracer.reader.locate(row["row"]) and "part-0000" in row["where"]
        assert len(row["ads"]) == min(MAX_ADS, len(items)) and {ad["item"] for ad in row["ads"]} <= set(items)
        assert all(ad["item_id"] == f"ad-{ad['item']}" and ad["advertiser"] == f"brand-{ad['item'] % 3}" for ad in row["ads"])


def test_no_user_id_is_written(data, tmp_path):
    tracer, batches = data
    tracer.trace(engine(), tmp_path, 1, "loss spike", batches, [torch.full_like(nll, 9.0) for nll in losses(batches, [])], USUAL)
    text = next(tmp_path.glob("spikes/*")).read_text()
    rows = json.loads(text)["rows"]
    assert "user-" not in text and len(rows) == MAX_ROWS and len({row["user"] for row in rows}) == MAX_ROWS, "one user per row here"


def test_a_loss_that_is_not_finite_comes_first_and_is_written_by_name(data, tmp_path):
    tracer, batches = data
    nll = losses(batches, [], USUAL)
    nll[0] = nll[0] + torch.arange(len(nll[0])) % 3
    nll[1][3] = float("nan")
    tracer.trace(engine(), tmp_path, 2, "not finite", batches, nll, USUAL)
    first = read_traces(tmp_path)[0]["rows"][0]
    assert first["row"] == int(batches[1].row_ids_B[row_of_target(batches[1])[3]]) and first["excess"] == "inf"
    assert first["ads"][0]["nll"] == first["mean_nll"] == "nan"


def test_only_the_ranks_concerned_most_write(data, tmp_path):
    tracer, batches = data
    others = [100.0 * rank for rank in range(MAX_RANKS + 2)]
    nll = losses(batches, [int(batches[0].row_ids_B[row_of_target(batches[0])[0]])], USUAL + 0.01)
    for rank in (0, 1):
        tracer.trace(engine(rank, others), tmp_path, 3, "loss spike", batches, nll, USUAL)
    assert not (tmp_path / "spikes").exists(), "their worst row is nothing beside that of eight others"
    tracer.trace(engine(0, others), tmp_path, 3, "loss spike", batches, losses(batches, batches[0].row_ids_B.tolist(), 1e6), USUAL)
    tracer.trace(engine(9, others), tmp_path, 3, "loss spike", batches, nll, USUAL)
    assert [path.name for path in sorted(tmp_path.glob("spikes/*"))] == ["step-000003-rank-00000.json", "step-000003-rank-00009.json"]
    assert read_traces(tmp_path)[0]["rows"][0]["rank"] == 0


def test_what_cannot_be_described_does_not_stop_the_training(data, tmp_path, capsys):
    tracer, batches = data
    tracer = Tracer(tracer.reader, tmp_path / "gone.arrow")
    tracer.trace(engine(), tmp_path, 1, "loss spike", batches, losses(batches, []), USUAL - 1)
    assert "WARNING" in (said := capsys.readouterr().err) and "gone.arrow" in said and read_traces(tmp_path) == []
