"""An object store that fails for a while delays a read; one that fails for longer ends it with one line. Never a wrong or missing row."""

import importlib.util
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from journeys_fixture import random_journeys, write_split
from object_store import object_store

from data_pipeline.shards import ShardConfig
from gpr_dist.config import build_config
from gpr_dist.data.loader import LoaderConfig, build_loader
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.data.storage import Storage, StorageConfig, StorageError, shown
from gpr_dist.errors import DataError

needs_moto = pytest.mark.skipif(not importlib.util.find_spec("moto") or not importlib.util.find_spec("flask"),
                                reason='needs the extra [dev]: pip install "moto[server]" boto3')
JOURNEYS = random_journeys(100)
PATIENT = StorageConfig(max_attempts=6)
SECONDS = StorageConfig(attempt_s=6, stall_s=1)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "split"
    write_split(folder, JOURNEYS, ShardConfig(rows_per_batch=8, rows_per_shard=40), num_parts=2)
    return folder


@pytest.fixture(scope="module")
def store(split):
    with pytest.MonkeyPatch.context() as patch, object_store() as (store, options):
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        store.put("bucket", split)
        store.uri = f"s3://someone:secret@bucket/split?{options}"
        yield store


@pytest.fixture()
def remote(store, tmp_path):
    store.fail()
    reader = ShardReader(store.uri, cache_dir=tmp_path / "cache", storage=PATIENT)
    store.fail()
    return reader


def same(batch, other):
    return batch.serialize().equals(other.serialize())


@needs_moto
def test_a_clean_store_reads_the_same_and_is_asked_once(split, remote, store, caplog):
    local = ShardReader(split)
    assert all(same(remote.read_batch(number), local.read_batch(number)) for number in range(remote.num_batches))
    assert len(store.asked) == remote.num_batches == 14 and remote.storage.num_retries == remote.num_reread_batches == 0
    assert not caplog.records and not any("secret" in text for text in (remote.folder, remote.locate(3)))


@needs_moto
@pytest.mark.parametrize("faults", [(500, 500), (503, 503), ("cut", "cut"), ("reset", "reset", "reset")])
def test_an_error_that_passes_costs_a_moment_and_no_row(split, remote, store, caplog, faults):
    store.fail(*faults)
    with caplog.at_level(logging.WARNING):
        batch = remote.read_batch(6)
    assert same(batch, ShardReader(split).read_batch(6))
    failed = remote.storage.num_retries
    assert len(store.asked) == len(faults) + 1 and 0 < remote.storage.lost_s < 30
    assert failed == 2 or (faults[0] == "reset" and 1 <= failed <= 3)  # curl itself asks again after a reset of a connection that was open
    where = "s3://bucket/split/part-00000-0001.arrow batch 1: "
    beginnings = [*(f"{where}attempt {number} of 6 failed (AWS Error" for number in range(1, failed + 1)),
                  f"{where}read at attempt {failed + 1}, "]
    assert [record.getMessage()[:len(begin)] for record, begin in zip(caplog.records, beginnings, strict=True)] == beginnings


@needs_moto
def test_silence_and_crawling_are_given_up_and_hold_up_nobody_else(split, store, tmp_path):
    """One read meets a connection without an answer, one half of an answer, one an answer that would take minutes; a fourth is as fast
    as ever, and so is another folder that is opened meanwhile."""
    reader = ShardReader(store.uri, cache_dir=tmp_path, storage=SECONDS)
    local = ShardReader(split)
    with ThreadPoolExecutor(3) as pool:
        store.fail("hang", "stall", "crawl", of="part-00000-0001.arrow")
        slow = [pool.submit(reader.read_batch, number) for number in (5, 6, 5)]
        while store.faults:
            time.sleep(0.01)
        assert same(reader.read_batch(0), local.read_batch(0))
        ShardReader(store.uri, cache_dir=tmp_path, storage=SECONDS)
        assert not all(read.done() for read in slow)
        for read, number in zip(slow, (5, 6, 5), strict=True):
            assert same(read.result(timeout=60), local.read_batch(number))
    assert 3 <= reader.storage.num_retries <= 12 and 6 < reader.storage.lost_s < 100


@needs_moto
@pytest.mark.parametrize("fault", ["short", "garbled"])
def test_a_transfer_with_wrong_bytes_is_read_once_more(split, remote, store, fault):
    clean = ShardReader(split).read_batch(6)
    assert same(remote.read_batch(6), clean)
    store.fail(fault)  # also of a batch whose checksum was compared before: each read is another transfer
    assert same(remote.read_batch(6), clean)
    if fault == "short":  # pyarrow says nothing and leaves the rest of the buffer as it was, sometimes with the right bytes: those of a
        return  # read before
    assert remote.num_reread_batches == 1
    store.fail(fault, fault)
    with pytest.raises(DataError, match=r"part-00000-0001.arrow batch 1 is damaged: checksum .*; rebuild it"):
        remote.read_batch(6)
    assert len(store.asked) == 2


@needs_moto
@pytest.mark.parametrize("name,fault", [("manifest.json", 503), ("manifest.json", "garbled"), ("index.arrow", "cut"),
                                        ("index.arrow", "garbled"), ("rows.npy", 500), ("rows.npy", "short")])
def test_opening_a_folder_is_as_patient(store, tmp_path, name, fault):
    store.fail(fault, of=name)
    reader = ShardReader(store.uri, cache_dir=tmp_path, storage=PATIENT)
    assert reader.manifest.num_rows == 100 and int(np.sum(reader.num_rows)) == 100
    assert len(store.asked) == 2 and reader.storage.num_retries == (fault not in ("garbled", "short"))


@needs_moto
def test_what_retrying_cannot_help_is_not_retried(remote, store, tmp_path):
    store.fail(403)
    with pytest.raises(StorageError, match=r"^s3://bucket/split/part-00000-0001.arrow batch 1 cannot be .*ACCESS_DENIED.*credentials"):
        remote.read_batch(6)
    assert len(store.asked) == 1
    store.fail(404)
    with pytest.raises(DataError, match=r"batch 1 cannot be read .*; rebuild it"):
        remote.read_batch(6)
    assert len(store.asked) == 1 and remote.storage.num_retries == 0
    with pytest.raises(DataError, match=r"^s3://bucket/none/manifest.json does not exist"):
        ShardReader(store.uri.replace("/split", "/none"), cache_dir=tmp_path, storage=PATIENT)


@needs_moto
@pytest.mark.parametrize("limits", [{"max_attempts": 3}, {"max_read_s": 0.3}])
@pytest.mark.parametrize("on_corrupt", ["stop", "skip"])
def test_patience_ends_with_one_line_and_an_outage_is_no_damage(store, tmp_path, limits, on_corrupt):
    store.fail()
    reader = ShardReader(store.uri, on_corrupt=on_corrupt, cache_dir=tmp_path, storage=PATIENT)
    reader.storage.config = PATIENT.model_copy(update=limits)
    store.fail(*[503] * 10)
    with pytest.raises(StorageError, match=r"^s3://bucket/split/part-00001-0001.arrow batch 0 cannot be read: [123] attempts in .* s "
                       r"failed, the last one: (AWS Error S|no complete answer).*data.loader.storage.max_attempts") as error:
        reader.read_batch_or_skip(12)
    assert "\n" not in str(error.value) and len(store.asked) <= 3 and reader.num_skipped_batches == 0


def test_nobody_listens(tmp_path):
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"^s3://bucket/split/manifest.json cannot be read: 2 attempts .*onnect"):
        ShardReader("s3://u:p@bucket/split?scheme=http&endpoint_override=127.0.0.1:9&region=us-east-1", cache_dir=tmp_path,
                    storage=StorageConfig(max_attempts=2))
    assert time.monotonic() - started < 30


@needs_moto
def test_the_loader_goes_on_while_one_read_waits(split, store, tmp_path):
    values = {"global_batch_size": 4, "num_streams": 2, "shuffle_rows": 8, "micro_batch_tokens": 4096, "cache_dir": str(tmp_path),
              "storage": PATIENT.model_dump()}
    config, codes = build_config(LoaderConfig, values, "test"), np.zeros((50, 2), np.int32)

    def steps(folder):
        return build_loader(folder, config, World(0, 1), codes, num_heads=1)

    expected = [[batch.row_ids_B.tolist() for batch in step.micro_batches]
                for step, _ in zip(steps(split), range(25), strict=False)]
    store.fail()
    loader, found = steps(store.uri), []
    iterator = iter(loader)

    def take(count):
        found.extend([batch.row_ids_B.tolist() for batch in next(iterator).micro_batches] for _ in range(count))

    take(1)
    store.fail("stall")  # one of the reads for a later window of 4 steps gets half an answer ...
    consumer = threading.Thread(target=take, args=(24,))
    consumer.start()
    deadline = time.monotonic() + 60
    while store.faults or len(found) % 4:  # ... all steps before it are handed out ...
        assert time.monotonic() < deadline, (store.faults, len(found))
        time.sleep(0.05)
    before = len(found)
    store.over.set()  # ... and then, when the connection breaks and is made again, the others
    consumer.join(60)
    iterator.close()
    assert found == expected and 4 <= before <= 24 and loader.reader.storage.num_retries == 1


def test_a_uri_is_shown_without_what_opens_it():
    assert shown("s3://key:secret@bucket/a/b/?endpoint_override=x&scheme=http") == "s3://bucket/a/b"
    assert shown("/data/what?/a@b/") == "/data/what?/a@b"


def test_a_local_folder_is_read_once(tmp_path):
    storage = Storage(tmp_path)
    with pytest.raises(FileNotFoundError):
        storage.read_all("none")
    (tmp_path / "a").write_bytes(b"abc")
    assert storage.read_all("a") == b"abc" and storage.sizes() == {"a": 3} and storage.is_local
    assert storage.read_range("a", 1, 5).to_pybytes() == b"bc"
