"""Random but lawful micro-batches for model and engine tests."""

import dataclasses

import torch

from gpr_dist.schema import Batch, TokenType


def random_batch(seed: int, num_rows: int = 3, num_heads: int = 4, num_levels: int = 3, codebook_size: int = 16, num_fields: int = 2,
                 max_blocks: int = 5) -> Batch:
    """Rows of U O* E I+ blocks with targets at every block, built token by token: slow and obvious on purpose."""
    g = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=g))

    offsets, tokens, requests, targets, user, env = [0], [], [], [], [], []
    for row in range(num_rows):
        time, ads, sites = 1_500_000_000 + draw(10_000), [], []
        for block in range(1 + draw(max_blocks)):
            kinds = [TokenType.U] * (block == 0) + [TokenType.O] * draw(4) + [TokenType.E] + [TokenType.I] * (1 + draw(2))
            first_ad = len(ads)
            for kind in kinds:
                time += draw(5000)
                if kind == TokenType.I:
                    ads.append(len(tokens))
                if kind == TokenType.U:
                    user.append([draw(1000) for _ in range(num_fields)])
                if kind == TokenType.E:
                    env.append([draw(1000) for _ in range(num_fields)])
                    sites.append((len(tokens), first_ad, time))
                is_item = kind in (TokenType.O, TokenType.I)
                tokens.append({"token_type": int(kind), "block": block, "item": draw(100) if is_item else -1,
                               "codes": [draw(codebook_size) if is_item else -1 for _ in range(num_levels)],
                               "action": draw(4) + 1 if is_item else 0, "scene": draw(500), "timestamp": time,
                               "value": float(draw(100)) if is_item and draw(4) else float("nan")})
        offsets.append(len(tokens))
        ends = [first for _, first, _ in sites[1:]] + [len(ads)]
        for (site, first, when), end in zip(sites, ends, strict=True):
            request = len(requests)
            requests.append((site, row, when))
            targets += [(request, 0, ads[k]) for k in range(first, end)]
            targets += [(request, j, ads[first + j]) for j in range(1, num_heads) if first + j < len(ads)]

    targets.sort(key=lambda target: (target[1], target[0]))  # by head, then by request, as collate lays them out

    def column(name: str, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor([t[name] for t in tokens], dtype=dtype)

    site, row, when = (torch.tensor(c, dtype=torch.int64) for c in zip(*requests, strict=True))
    request, head, token = (torch.tensor(c, dtype=torch.int64) for c in zip(*targets, strict=True))
    value = column("value", torch.float32)
    return Batch(torch.tensor(offsets), torch.arange(num_rows), column("token_type"), column("block"), column("item"),
                 column("codes").view(-1, num_levels), column("action"), column("scene"), column("timestamp"), value,
                 torch.tensor(user, dtype=torch.int64), torch.tensor(env, dtype=torch.int64), site, row,
                 torch.full_like(site, -1), when, request, head, column("item")[token], column("codes")[token], column("action")[token],
                 value[token], torch.full_like(value[token], float("nan")), torch.full_like(value[token], float("nan")))


def empty_batch(num_levels: int = 3, num_fields: int = 2) -> Batch:
    """What a rank gets when a step has no rows for it."""
    full = random_batch(0, num_levels=num_levels, num_fields=num_fields)
    parts = {f.name: getattr(full, f.name)[:0] for f in dataclasses.fields(Batch) if getattr(full, f.name) is not None}
    return Batch(**{**parts, "offsets_B1": torch.zeros(1, dtype=torch.int64)})


def concat_batches(batches: list[Batch]) -> Batch:
    """The rows of several batches in one."""
    names = [f.name for f in dataclasses.fields(Batch) if getattr(batches[0], f.name) is not None]
    parts = {name: torch.cat([getattr(b, name) for b in batches]) for name in names}
    tokens = rows = requests = 0
    offsets, sites, site_rows, target_requests = [torch.zeros(1, dtype=torch.int64)], [], [], []
    for b in batches:
        offsets.append(b.offsets_B1[1:] + tokens)
        sites.append(b.request_token_R + tokens)
        site_rows.append(b.request_row_R + rows)
        target_requests.append(b.target_request_N + requests)
        tokens, rows, requests = tokens + b.num_tokens, rows + b.num_rows, requests + len(b.request_token_R)
    parts.update(offsets_B1=torch.cat(offsets), request_token_R=torch.cat(sites), request_row_R=torch.cat(site_rows),
                 target_request_N=torch.cat(target_requests))
    return Batch(**parts)
