"""Laws of the fit rows: in memory as out of core, exact normalisation, any rows, Arrow as npy, bad input."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer import points as points_module
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.points import ArrowRows, Points, open_embeddings
from gpr_dist.tokenizer.quantizer import Quantizer

CPU = torch.device("cpu")
OUT_OF_CORE = 1e-9  # GiB


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(points_module, "BLOCK_ROWS", 64)


def embeddings(num_items: int = 500, dim: int = 6, offset: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=(num_items, dim)) * [1, 2, 3, 4, 5, 6] + offset).astype(np.float32)


def write_arrow(path, rows: np.ndarray, batch_rows: int, column: str = "embedding") -> None:
    parts = [pa.FixedSizeListArray.from_arrays(pa.array(rows[lo:lo + batch_rows].reshape(-1)), rows.shape[1])
             for lo in range(0, len(rows), batch_rows)]
    batches = [pa.record_batch([part], names=[column]) for part in parts]
    with pa.ipc.new_file(str(path), batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


@pytest.mark.parametrize("max_fit_items", [10_000, 200])
def test_out_of_core_is_as_in_memory_bit_by_bit(max_fit_items):
    held, read = (Points(embeddings(), TokenizerConfig(max_fit_items=max_fit_items, fit_memory_gb=gb), CPU) for gb in (1, OUT_OF_CORE))
    assert held.held and not read.held and held.num_rows == min(500, max_fit_items)
    assert torch.equal(held.mean_D, read.mean_D) and torch.equal(held.scale, read.scale)
    for (lo, one), (other_lo, other) in zip(held.blocks(), read.blocks(), strict=True):
        assert lo == other_lo and torch.equal(one, other) and len(one) <= 64
    rows = torch.tensor([199, 0, 64, 7, 7])
    assert torch.equal(held.take(rows), read.take(rows))
    assert torch.equal(held.take(rows), torch.cat([block for _, block in held.blocks()])[rows])
    assert torch.equal(read.take(np.arange(10, 100)), held.take(np.arange(10, 100)))


@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_points_have_mean_0_and_variance_1_as_the_quantizer_makes_them(offset):
    stored = embeddings(offset=offset)
    points = Points(stored, TokenizerConfig(), CPU)
    np.testing.assert_allclose(points.mean_D, stored.mean(0, dtype=np.float64), rtol=1e-6, atol=1e-6)
    expected = np.sqrt(np.square(stored - stored.mean(0, dtype=np.float64)).mean())
    assert float(points.scale) == pytest.approx(expected, rel=1e-5)
    quantizer = Quantizer(TokenizerConfig(), 6)
    quantizer.mean_D.copy_(points.mean_D)
    quantizer.scale.copy_(points.scale)
    assert torch.equal(quantizer.normalise(torch.from_numpy(stored)), points.take(np.arange(500)))


def test_constant_embeddings_are_not_blown_up():
    points = Points(np.full((300, 4), 0.1, np.float32), TokenizerConfig(), CPU)
    assert float(points.scale) == 1 and float(points.take(np.arange(300)).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrow_rows_are_the_npy_rows(tmp_path, dtype):
    stored = embeddings().astype(dtype)
    np.save(tmp_path / "e.npy", stored)
    write_arrow(tmp_path / "e.arrow", stored, 130)
    npy, arrow = open_embeddings(tmp_path / "e.npy"), open_embeddings(tmp_path / "e.arrow")
    assert isinstance(arrow, ArrowRows) and arrow.shape == npy.shape and arrow.dtype == npy.dtype and len(arrow) == 500
    for rows in (slice(0, 64), slice(100, 300), slice(490, 600), slice(0, 500, 7), slice(5, 5), np.array([499, 0, 130, 129, 130])):
        np.testing.assert_array_equal(arrow[rows], npy[rows])
    one, other = (Points(rows, TokenizerConfig(fit_memory_gb=OUT_OF_CORE), CPU) for rows in (npy, arrow))
    assert torch.equal(one.take(np.arange(500)), other.take(np.arange(500)))


def test_unusable_files_are_one_readable_error(tmp_path):
    write_arrow(tmp_path / "e.arrow", embeddings(), 130)
    with pytest.raises(TokenizerError, match="column 'vector' cannot be read"):
        open_embeddings(tmp_path / "e.arrow", "vector")
    with pytest.raises(TokenizerError, match=r"missing\.arrow"):
        open_embeddings(tmp_path / "missing.arrow")
    with pytest.raises(TokenizerError, match=r"missing\.npy cannot be read"):
        open_embeddings(tmp_path / "missing.npy")
    (tmp_path / "text.npy").write_text("not an array")
    with pytest.raises(TokenizerError, match=r"text\.npy cannot be read"):
        open_embeddings(tmp_path / "text.npy")
    column = pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32(), 2))
    with pa.ipc.new_file(str(tmp_path / "null.arrow"), pa.schema({"embedding": column.type})) as writer:
        writer.write_batch(pa.record_batch([column], names=["embedding"]))
    with pytest.raises(TokenizerError, match="rows without a vector"):
        open_embeddings(tmp_path / "null.arrow")
    ragged = pa.array([[1.0], [1.0, 2.0]], pa.list_(pa.float32()))
    with pa.ipc.new_file(str(tmp_path / "ragged.arrow"), pa.schema({"embedding": ragged.type})) as writer:
        writer.write_batch(pa.record_batch([ragged], names=["embedding"]))
    with pytest.raises(TokenizerError, match="expected a fixed_size_list"):
        open_embeddings(tmp_path / "ragged.arrow")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("item", [0, 333])
def test_a_value_that_is_not_finite_names_its_item(value, item):
    stored = embeddings()
    stored[item, 2] = value
    with pytest.raises(TokenizerError, match=f"embedding of item {item} is not finite"):
        Points(stored, TokenizerConfig(), CPU)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,)])
def test_shapes_that_hold_no_vectors_are_refused(shape):
    with pytest.raises(TokenizerError, match="expected"):
        Points(np.zeros(shape, np.float32), TokenizerConfig(), CPU)
