"""What `bench.py decode` measures ours against: Hugging Face `generate` with a prefix function (T5, GPT-2) and gpr-recsys's trie search.

Each in a process of its own that answers calls of one case when asked. Only torch and the peer itself are needed, so that a peer can
have its own Python. Calls of the peers' public functions, nothing of their code. Weights are as initialised: the time does not depend
on them. Inputs, tries and prefix tables are made before the clock starts; a call ends with K semantic IDs per request.
"""

import sys
import time
from collections.abc import Callable

import torch
from bench_step_peers import Steps, serve, wait
from torch import Tensor

# B requests  K beams  T history tokens  N items of the catalogue  L levels  V codes per level

Call = Callable[[int], Tensor]
"""Number of the call -> codes [B, K, L]; -1 where a request has fewer results."""
Decoder = Callable[[Tensor, int, int], Call]
"""(catalogue codes [N, L], beams K, requests B of a call) -> the call."""

SPECIAL_TOKENS = 1  # 0: padding, and the start of T5's decoder


def catalogue(num_items: int, settings: dict) -> Tensor:
    """Codes [N, L] of distinct semantic IDs, the same for all contenders: drawn at random, so that no level is crowded."""
    generator = torch.Generator().manual_seed(settings["seed"])
    levels, codes = settings["num_levels"], settings["codebook_size"]
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < num_items:
        drawn = torch.cat((drawn, torch.randint(codes**levels, (num_items,), generator=generator))).unique()
    kept = drawn[torch.randperm(len(drawn), generator=generator)[:num_items]]
    return torch.stack([kept // codes ** (levels - 1 - level) % codes for level in range(levels)], 1)


def decode_steps(decoder: Decoder, settings: dict, device: torch.device) -> Steps:
    """One step per (items, beams, requests of a call), "10000 50 16": calls for `seconds` of `clock`, at least one, and what they found."""
    clock = ("wall", "cpu").index(settings["clock"])
    catalogues = {num_items: catalogue(num_items, settings) for num_items in settings["items"]}

    def run(num_items: int, beams: int, batch: int) -> dict:
        codes_NL = catalogues[num_items]
        call = decoder(codes_NL, beams, batch)
        calls, found = [], []
        while not calls or sum(call[clock] for call in calls) < settings["seconds"]:
            wait(device)
            wall, cpu = time.perf_counter(), time.process_time()
            result = call(len(calls))
            wait(device)
            calls.append((time.perf_counter() - wall, time.process_time() - cpu))
            found.append(result.cpu())
        return {"calls": calls, **check(torch.cat(found), codes_NL, settings["codebook_size"])}

    return {f"{num_items} {beams} {batch}": lambda case=(num_items, beams, batch): run(*case)
            for num_items in settings["items"] for beams in settings["beams"] for batch in settings["batches"]}


def check(found_BKL: Tensor, codes_NL: Tensor, codebook_size: int) -> dict[str, int]:
    """illegal: results that are no item. missing: results that a request should have had, or that it has twice."""
    def keys(codes: Tensor) -> Tensor:
        return (codes * codebook_size ** torch.arange(codes.shape[-1] - 1, -1, -1)).sum(-1)

    is_result_BK = (found_BKL >= 0).all(-1)
    key_BK = torch.where(is_result_BK, keys(found_BKL), -1)
    legal_BK = torch.isin(key_BK, keys(codes_NL)) & is_result_BK
    distinct = sum(len(row.unique()) for row in (key[legal] for key, legal in zip(key_BK, legal_BK, strict=True)))
    wanted = min(found_BKL.shape[1], len(codes_NL)) * len(found_BKL)
    return {"illegal": int((is_result_BK & ~legal_BK).sum()), "missing": wanted - distinct}


def prefix_table(codes_NL: Tensor, codebook_size: int) -> dict[tuple[int, ...], list[int]]:
    """Tokens that may follow each prefix of tokens; code c of level l is the token 1 + l·V + c."""
    token_NL = codes_NL + SPECIAL_TOKENS + codebook_size * torch.arange(codes_NL.shape[1])
    table = {}
    for level in range(codes_NL.shape[1]):
        distinct = token_NL[:, :level + 1].unique(dim=0)  # sorted: a prefix's children are next to each other
        prefixes, counts = distinct[:, :-1].unique_consecutive(dim=0, return_counts=True) if level else ([[]], [len(distinct)])
        children = distinct[:, -1].split(counts.tolist() if level else counts)
        table.update({tuple(prefix.tolist() if level else []): child.tolist() for prefix, child in zip(prefixes, children, strict=True)})
    return table


def hugging_face(settings: dict, encoder_decoder: bool) -> Steps:
    """T5 or GPT-2 of our width and depth, its `generate` with `prefix_allowed_tokens_fn`."""
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    width, heads, levels, codes = (settings[name] for name in ("width", "num_heads", "num_levels", "codebook_size"))
    inner, vocabulary, device = settings["ffn_multiple"] * width, SPECIAL_TOKENS + levels * codes, torch.device(settings["device"])
    tokens = settings["tokens"]
    torch.manual_seed(settings["seed"])
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if encoder_decoder:
        model = T5ForConditionalGeneration(T5Config(
            vocab_size=vocabulary, d_model=width, d_kv=width // heads, d_ff=inner, num_layers=settings["encoder_layers"],
            num_decoder_layers=settings["decoder_layers"], num_heads=heads, decoder_start_token_id=0, **special))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=tokens + levels, n_embd=width, n_inner=inner,
                                           n_layer=settings["encoder_layers"], n_head=heads, **special))
    model = model.to(device).eval()
    prompt = 1 if encoder_decoder else tokens  # tokens before the first code
    input_ST = torch.randint(SPECIAL_TOKENS, vocabulary, (settings["requests"], tokens), device=device)
    tables: dict[int, dict[tuple[int, ...], list[int]]] = {}

    def decoder(codes_NL: Tensor, beams: int, batch: int) -> Call:
        if len(codes_NL) not in tables:
            tables[len(codes_NL)] = prefix_table(codes_NL, codes)
        allowed = tables[len(codes_NL)]
        inputs = input_ST.split(batch)

        def call(number: int) -> Tensor:
            input_BT = inputs[number % len(inputs)]
            token_NT = model.generate(
                input_BT, attention_mask=torch.ones_like(input_BT), num_beams=beams, num_return_sequences=beams, do_sample=False,
                max_new_tokens=levels, prefix_allowed_tokens_fn=lambda _, token_T: allowed[tuple(token_T[prompt:].tolist())])
            code_NL = token_NT[:, prompt:] - SPECIAL_TOKENS - codes * torch.arange(levels, device=device)
            return code_NL.view(-1, beams, levels)

        return call

    return decode_steps(decoder, settings, device) | {"describe": lambda: described(model)}


def gpr_recsys(settings: dict) -> Steps:
    """fay85/gpr-recsys: its value-guided trie beam search, which takes the requests of a batch one after another."""
    sys.path.insert(0, settings["path"])
    from config import ModelConfig
    from model import GPR, SemanticTrie

    width, levels, codes, tokens = (settings[name] for name in ("width", "num_levels", "codebook_size", "tokens"))
    device = torch.device(settings["device"])
    torch.manual_seed(settings["seed"])
    model = GPR(ModelConfig(
        d_model=width, n_heads=settings["num_heads"], d_ff=settings["ffn_multiple"] * width, n_layers_hsd=settings["encoder_layers"],
        n_layers_ptd=settings["decoder_layers"], n_thinking_tokens=4, n_refining_steps=5, n_semantic_levels=levels, codebook_size=codes,
        max_seq_len=tokens, d_user=16, d_env=8, n_mtp_heads=4, n_mor_recursions=2, n_llm_thought_tokens=4)).to(device).eval()
    requests, organic = settings["requests"], settings["organic"]
    token_type_T = torch.tensor([0] + [1] * organic + [2] + [3] * (tokens - organic - 2))
    inputs = {name: values.to(device) for name, values in {
        "token_types": token_type_T.expand(requests, -1).contiguous(), "semantic_ids": torch.randint(codes, (requests, tokens, levels)),
        "user_features": torch.randn(requests, 16), "env_features": torch.randn(requests, 8),
        "seq_len": torch.full((requests,), tokens)}.items()}
    tries: dict[int, SemanticTrie] = {}

    def decoder(codes_NL: Tensor, beams: int, batch: int) -> Call:
        if len(codes_NL) not in tries:
            tries[len(codes_NL)] = SemanticTrie.build_from_items(dict(enumerate(codes_NL.tolist())))
        trie = tries[len(codes_NL)]
        batches = [dict(zip(inputs, values, strict=True)) for values in zip(*(x.split(batch) for x in inputs.values()), strict=True)]
        return lambda number: model.trie_beam_search(batches[number % len(batches)], trie, beam_width=beams, n_results=beams)["codes"]

    return decode_steps(decoder, settings, device) | {"describe": lambda: described(model)}


def described(model: torch.nn.Module) -> dict[str, int]:
    return {"parameters": sum(p.numel() for p in model.parameters())}


if __name__ == "__main__":
    serve({"t5": lambda settings: hugging_face(settings, encoder_decoder=True),
           "gpt2": lambda settings: hugging_face(settings, encoder_decoder=False), "gpr_recsys": gpr_recsys}, sys.argv[1:])
