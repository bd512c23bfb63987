"""Which parameters have a row per code: what must move when a refit of the tokenizer renumbers the codes (training/migrate.py).

The list is by hand, like the modules it describes; tests/unit/model/test_code_tables.py holds it against the real model, so that a
table added there and forgotten here fails.
"""

from dataclasses import dataclass

from gpr_dist.model.embedding import CODE_STD
from gpr_dist.model.gpr import GPRConfig

# L levels  V codes per level  W numbers per code


@dataclass(frozen=True)
class CodeTable:
    """A parameter whose flat content is [L, V, W]: levels, then codes, then the numbers that belong to one code."""

    num_levels: int
    codebook_size: int
    width: int
    shape: tuple[int, ...]
    """of the parameter in the model"""
    std: float
    """standard deviation of the initialiser, whose mean is 0"""

    @property
    def flat_shape(self) -> tuple[int, int, int]:
        return self.num_levels, self.codebook_size, self.width


def code_tables(config: GPRConfig) -> dict[str, CodeTable]:
    """Every parameter of `GPR(config)` that is indexed by codes, by its name.

    The value heads read the code embeddings, the decoder's positions are per level: neither has a row per code.
    """
    levels, codes, width = config.num_levels, config.codebook_size, config.width
    return {"codes.table.weight": CodeTable(levels, codes, width, (levels * codes, width), CODE_STD),
            "codes.bias_LV": CodeTable(levels, codes, 1, (levels, codes), 0.0)}
