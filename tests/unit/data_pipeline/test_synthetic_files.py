"""The market's files as others read them: build_data by configs/data/market.yaml, the launch script, the comparison with iPinYou."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from documents import launch_module
from small_market import ROOT, ad_log, small_market

from data_pipeline.build import BuildConfig, build_data
from data_pipeline.market.ipinyou import compare, market_auctions, real_auctions, relative_quantiles
from data_pipeline.synthetic import make_market
from data_pipeline.users import open_users
from gpr_dist.config import build_config, load_config
from gpr_dist.errors import DataError
from gpr_dist.schema import Action, ShardManifest, TokenType

SHARED = Path(os.environ.get("GPR_SHARED_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    config = small_market(tmp_path_factory.mktemp("market") / "raw")
    make_market(config)
    return config


@pytest.fixture(scope="module")
def built(raw):
    """The data set that configs/data/market.yaml makes of the market."""
    values = load_config(BuildConfig, ROOT / "configs/data/market.yaml").model_dump(mode="json")
    values["source"] = json.loads(json.dumps(values["source"]).replace("data/market/raw", str(raw.out)))
    values["out"] = str(raw.out.parent / "data")
    values["journeys"]["split"] |= {"validation_from": "2026-01-05", "test_from": "2026-01-06"}
    return build_data(build_config(BuildConfig, values, "test"))


def read_rows(folder):
    tables = [pa.ipc.open_file(path).read_all() for path in sorted(folder.glob("part-*.arrow"))]
    return pa.concat_tables(tables).to_pylist()


def test_build_data_reads_the_logs_end_to_end(raw, built):
    log = ad_log(raw.out)
    texts = {split: (built / "shards" / split / "manifest.json").read_text() for split in ("train", "validation", "test")}
    splits = {split: ShardManifest.parse(text, split) for split, text in texts.items()}
    targets = [manifest.num_targets for manifest in splits.values()]
    assert sum(targets) == len(log) and min(targets) > 1000
    assert splits["train"].user_features == ("segment", "age")
    assert splits["train"].env_features == ("slot", "placement", "hour", "day_of_week")
    table = pl.DataFrame(pa.ipc.open_file(built / "catalogue/catalogue.arrow").read_all())
    assert len(table) == raw.num_ads + raw.num_organic
    items = pl.read_parquet(raw.out / "items.parquet")
    both = table.join(items, on="item_id", suffix="_raw")
    assert len(both) == len(table) and (both["text"] == both["text_raw"]).all() and both["text"].n_unique() > 0.9 * raw.num_ads
    ads = both.filter(pl.col("kind_raw") == "ad")
    assert (ads["price"] == ads["bid_raw"]).all()
    assert all((ads[name] == ads[f"{name}_raw"]).all() for name in ("bid", "advertiser", "category"))
    groups = pa.ipc.open_file(built / "eligibility.arrow").read_all()["items"].to_pylist()
    assert sum(map(len, groups)) == len(pl.read_parquet(raw.out / "targeting.parquet"))
    item_ids, seen = table["item_id"].to_list(), []
    for split in splits:
        for row in read_rows(built / "shards" / split):
            for position in range(row["num_context"], len(row["item"]) - row["num_lookahead"]):
                if row["token_type"][position] == TokenType.I:
                    item, group = row["item"][position], row["eligibility"][row["block"][position]]
                    assert item in groups[group]
                    seen.append((row["user_id"], row["timestamp"][position], item_ids[item], row["action"][position],
                                 *(row[name][position] for name in ("value", "pctr", "pcvr"))))
    action = pl.lit(int(Action.IMPRESSION)) + pl.col("clicked").cast(pl.Int32) + pl.col("converted").cast(pl.Int32)
    logged = log.select("user_id", "time", "ad_id", action, "ecpm", "pctr", "pcvr")
    stored = open_users(built).stored(logged["user_id"].to_arrow()).to_pylist()
    assert sorted(seen) == sorted((user, *rest) for user, (_, *rest) in zip(stored, logged.iter_rows(), strict=True))


def test_the_launch_script(tmp_path, capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["make_market.py", "--config", str(ROOT / "configs/market/test.yaml"), f"out={tmp_path}/raw",
                                          "num_users=100", "num_days=2", *arguments])
        launch_module("make_market").main()
        return capsys.readouterr().out
    assert "GB of memory" in run("--dry-run") and not (tmp_path / "raw").exists()
    assert "events per CPU second" in run() and (tmp_path / "raw/truth/market.json").exists()
    assert "up to date" in run()
    with pytest.raises(DataError, match=r"validation\.txt"):
        run(f"ipinyou={tmp_path}")


def test_reading_real_auctions(raw, tmp_path):
    (tmp_path / "7.validation.txt").write_text("560870\t1000\n1\n0\t51\t0.001\n1\t87\t0.003\n12\t3\n0\t60\t0.002\n")
    (tmp_path / "8.validation.txt").write_text("0\t10\t0.5\n")
    tables = real_auctions(tmp_path)
    assert tables["7"].rows() == [(0, 51, 0.001), (1, 87, 0.003), (0, 60, 0.002)] and tables["8"].height == 1
    lines = compare(raw.out, tmp_path).splitlines()
    assert len(lines) == 5 and lines[3].startswith("iPinYou 7") and "0.33333" in lines[3]
    (tmp_path / "9.validation.txt").write_text("1 2\n")
    with pytest.raises(DataError, match=r"9\.validation\.txt"):
        real_auctions(tmp_path)


def test_prices_and_rates_lie_where_real_auctions_have_them(raw, tmp_path):
    """Quantiles relative to the mean: within the range of the real campaigns, widened by half on either side. CTR: a setting."""
    if not list((SHARED / "ipinyou").glob("*.validation.txt")):
        pytest.skip("needs ipinyou under GPR_SHARED_DATA or ../shared/data")
    real = real_auctions(SHARED / "ipinyou").values()
    display = raw.model_copy(update={"out": tmp_path / "display", "ctr": 0.0004})  # clicks as rare as on banners
    make_market(display)
    for out in (raw.out, display.out):
        ours = market_auctions(out)
        for column in ("price", "pctr"):
            theirs = np.stack([relative_quantiles(table[column].to_numpy()) for table in real])
            found = relative_quantiles(ours[column].to_numpy())
            assert (found > theirs.min(0) / 1.5).all() and (found < 1.5 * theirs.max(0)).all(), (column, found, theirs)
    rates = [table["click"].mean() for table in real]
    assert min(rates) < market_auctions(display.out)["pctr"].mean() < max(rates)
