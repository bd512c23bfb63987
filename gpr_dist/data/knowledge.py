"""External knowledge at batch time: which vectors the users of these journeys had when the journeys began.

Two memory maps: `rows` (of the split: which text a row has) and `vectors`. A batch costs one gather of each. The folder is made by
launch/build_knowledge.py; journeys need not be rebuilt for it, and are found by their fingerprint.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from gpr_dist.data.arrays import open_array
from gpr_dist.errors import DataError
from gpr_dist.schema import KnowledgeManifest, ShardManifest

# B rows  m vectors  E their width

_REMAKE = "make it again with launch/build_knowledge.py"


class KnowledgeVectors:
    """The vectors of one split's rows."""

    def __init__(self, folder: str | Path, split: ShardManifest, verify: Literal["first_read", "never"] = "first_read") -> None:
        """Args: split: manifest of the shards whose rows are asked for.

        Raises: DataError when a file is missing, cut or altered, or the folder was made for other shards.
        """
        self.folder, self.manifest = Path(folder), KnowledgeManifest.load(folder)
        rows = self.manifest.splits.get(split.fingerprint)
        if rows is None:
            known = ", ".join(f"{entry.split} {fingerprint}" for fingerprint, entry in self.manifest.splits.items())
            raise DataError(f"{folder} was made for the shards {known}, not for {split.split} {split.fingerprint}; {_REMAKE}")
        shape = (self.manifest.num_texts, self.manifest.num_vectors, self.manifest.width)
        check = verify != "never"
        num_blocks = -(-shape[0] // self.manifest.block_rows)
        self._rows = open_array(self.folder / rows.file, (split.num_rows,), ("i8",), _REMAKE, rows.checksum if check else None)
        self._vectors = open_array(self.folder / self.manifest.vectors, shape, ("f",), _REMAKE)
        self._blocks = open_array(self.folder / self.manifest.blocks, (num_blocks,), ("u8",), _REMAKE,
                                  self.manifest.blocks_checksum if check else None)
        self._unverified = np.full(num_blocks, check)

    def gather(self, rows: np.ndarray) -> Tensor:
        """float32 [B, m, E] of these rows of the split (int64 [B], global row numbers); 0 where the user has no text.

        Raises: DataError for vectors that were altered, at their first read.
        """
        text_B = np.asarray(self._rows[rows])
        known = text_B >= 0
        self._check(text_B[known])
        vectors_BmE = np.zeros((len(rows), *self._vectors.shape[1:]), np.float32)
        vectors_BmE[known] = self._vectors[text_B[known]]
        return torch.from_numpy(vectors_BmE)

    def _check(self, texts: np.ndarray) -> None:
        size = self.manifest.block_rows
        if len(texts) and texts.max() >= len(self._vectors):
            raise DataError(f"{self.folder}: a journey names text {texts.max()}, there are {len(self._vectors)}; {_REMAKE}")
        blocks = np.unique(texts // size)
        for block in blocks[self._unverified[blocks]].tolist():  # each once in the life of the process
            content = np.ascontiguousarray(self._vectors[block * size:(block + 1) * size])
            if xxhash.xxh3_64_intdigest(content) != int(self._blocks[block]):
                raise DataError(f"{self.folder / self.manifest.vectors}: texts {block * size} to {block * size + len(content) - 1} are "
                                f"damaged; {_REMAKE}")
            self._unverified[block] = False
