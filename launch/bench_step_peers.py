"""The public models that `bench.py step` measures ours against, each in a process of its own that runs one step when asked.

Only torch and the peer itself are needed, so that a peer can have its own Python. Calls of the peers' public functions, nothing of
their code. Speaks JSON lines: the parent names a step, the answer has its seconds.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Steps = dict[str, Callable[[], dict | None]]
"""Name -> runs once; what it returns goes into the answer."""

# B rows  N positions  T = B·N tokens  D width  M items  S sampled negatives

TEMPERATURE = 0.05
LEARNING_RATE = 1e-3


def gpr_recsys(settings: dict) -> Steps:
    """fay85/gpr-recsys: its MTP step on full rows, one target a row, in the small configuration of its README (commit d101838)."""
    sys.path.insert(0, settings["path"])
    from config import ModelConfig
    from model import GPR, mtp_loss

    rows, positions, organic, width = (settings[name] for name in ("rows", "positions", "organic", "width"))
    levels, codes = settings["num_levels"], settings["codebook_size"]
    config = ModelConfig(
        d_model=width, n_heads=settings["num_heads"], d_ff=4 * width, n_layers_hsd=settings["hsd_layers"],
        n_layers_ptd=settings["ptd_layers"], n_thinking_tokens=4, n_refining_steps=5, n_semantic_levels=levels, codebook_size=codes,
        max_seq_len=positions, dropout=settings["dropout"], d_user=16, d_env=8, n_mtp_heads=settings["num_mtp_heads"],
        n_mor_recursions=2, n_llm_thought_tokens=4)
    torch.manual_seed(settings["seed"])
    dtype = dtype_of(settings["precision"])
    model = GPR(config).to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    token_type_N = torch.tensor([0] + [1] * organic + [2] + [3] * (positions - organic - 2))
    batch = {
        "token_types": token_type_N.expand(rows, -1).contiguous(), "semantic_ids": torch.randint(codes, (rows, positions, levels)),
        "user_features": torch.randn(rows, 16, dtype=dtype), "env_features": torch.randn(rows, 8, dtype=dtype),
        "seq_len": torch.full((rows,), positions), "target_ids": torch.randint(codes, (rows, levels))}

    def step() -> dict:
        loss, _ = mtp_loss(model(batch, mode="mtp"), batch["target_ids"], n_heads=config.n_mtp_heads)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {"loss": float(loss), "targets": rows}

    return {"step": step}


def meta_hstu(settings: dict) -> Steps:
    """HSTU of meta-recsys/generative-recommenders, PyTorch path: the encoder alone, and steps with a full and with a sampled softmax."""
    sys.path.insert(0, settings["path"])
    import fbgemm_gpu  # noqa: F401 - registers the operators HSTU calls
    from generative_recommenders.research.modeling.sequential.autoregressive_losses import LocalNegativesSampler
    from generative_recommenders.research.modeling.sequential.embedding_modules import LocalEmbeddingModule
    from generative_recommenders.research.modeling.sequential.hstu import HSTU
    from generative_recommenders.research.modeling.sequential.input_features_preprocessors import (
        LearnablePositionalEmbeddingInputFeaturesPreprocessor,
    )
    from generative_recommenders.research.modeling.sequential.losses.sampled_softmax import SampledSoftmaxLoss
    from generative_recommenders.research.modeling.sequential.output_postprocessors import L2NormEmbeddingPostprocessor
    from generative_recommenders.research.rails.similarities.dot_product_similarity_fn import DotProductSimilarity

    rows, length, width, heads, items = (settings[name] for name in ("rows", "length", "width", "num_heads", "num_items"))
    extra = 11  # positions for generated items: gr_output_length + 1 of its train.py
    torch.manual_seed(settings["seed"])
    model = HSTU(
        max_sequence_len=length, max_output_len=extra, embedding_dim=width, num_blocks=settings["num_layers"], num_heads=heads,
        linear_dim=width // heads, attention_dim=width // heads, normalization="rel_bias", linear_config="uvqk",
        linear_activation="silu", linear_dropout_rate=settings["dropout"], attn_dropout_rate=0.0,
        embedding_module=LocalEmbeddingModule(items, width), similarity_module=DotProductSimilarity(),
        input_features_preproc_module=LearnablePositionalEmbeddingInputFeaturesPreprocessor(length + extra, width, settings["dropout"]),
        output_postproc_module=L2NormEmbeddingPostprocessor(width), verbose=False).to(dtype_of(settings["precision"])).train()
    sampler = LocalNegativesSampler(items, model._embedding_module._item_emb, list(range(1, items + 1)), True, 1e-6)
    sampled_softmax = SampledSoftmaxLoss(settings["num_negatives"], TEMPERATURE, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    ids_BN, seconds_BN, lengths_B = hstu_input(settings, padding=extra)
    weights_BN = (ids_BN[:, 1:] != 0).float()

    def encode(embedded_BND: Tensor) -> Tensor:
        return model(past_lengths=lengths_B, past_ids=ids_BN, past_embeddings=embedded_BND, past_payloads={"timestamps": seconds_BN})

    def encoder() -> dict:
        optimizer.zero_grad()
        embedded_BND = model.get_item_embeddings(ids_BN).detach().requires_grad_()
        encoded_BND = encode(embedded_BND)
        encoded_BND.backward(torch.ones_like(encoded_BND))
        return {"tokens": rows * length}

    def step(full: bool) -> dict:
        optimizer.zero_grad()
        embedded_BND = model.get_item_embeddings(ids_BN)
        encoded_BND = encode(embedded_BND)
        if full:
            loss = full_softmax(encoded_BND[:, :length - 1].flatten(0, 1), model._embedding_module._item_emb.weight,
                                ids_BN[:, 1:length].flatten())
        else:
            loss, _ = sampled_softmax(lengths=lengths_B, output_embeddings=encoded_BND[:, :-1], supervision_ids=ids_BN[:, 1:],
                                      supervision_embeddings=embedded_BND[:, 1:], supervision_weights=weights_BN, negatives_sampler=sampler)
        loss.backward()
        optimizer.step()
        return {"tokens": rows * length, "loss": float(loss)}

    return {"encoder": encoder, "full softmax": lambda: step(full=True), "sampled softmax": lambda: step(full=False)}


def hstu_input(settings: dict, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Items [B, N] from 1, seconds [B, N] and lengths [B] of rows that are full but for `padding` zeros."""
    rows, length = settings["rows"], settings["length"]
    generator = torch.Generator().manual_seed(settings["seed"])
    ids_BN = torch.randint(1, settings["num_items"] + 1, (rows, length), generator=generator)
    seconds_BN = 1_500_000_000 + torch.randint(10_000, (rows, length), generator=generator).cumsum(1)
    return F.pad(ids_BN, (0, padding)), F.pad(seconds_BN, (0, padding)), torch.full((rows,), length)


def full_softmax(state_TD: Tensor, table_MD: Tensor, item_T: Tensor) -> Tensor:
    """Mean cross-entropy over all items, of cosines over a temperature: both sides call this one."""
    return F.cross_entropy((state_TD @ F.normalize(table_MD, dim=1).T).float() / TEMPERATURE, item_T)


def dtype_of(precision: str) -> torch.dtype:
    """fp32 | bf16."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def serve(builders: dict[str, Callable[[dict], Steps]], argv: list[str]) -> None:
    """Build what `argv` asks for (a builder's name, settings as JSON), then run the steps named on stdin, one a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints is no answer

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    settings = json.loads(argv[1])
    torch.set_num_threads(settings["threads"])
    device = torch.device(settings.get("device", "cpu"))
    idle_bytes = resident_bytes()
    try:
        steps = builders[argv[0]](settings)
    except Exception as error:
        answer(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    answer(steps=list(steps))
    for line in sys.stdin:
        wait(device)
        wall, cpu = time.perf_counter(), time.process_time()
        found = steps[line.strip()]() or {}
        wait(device)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        used = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * peak_kib() - idle_bytes
        answer(wall=wall, cpu=cpu, memory_bytes=used, **found)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_kib() -> int:
    """Most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_bytes() -> int:
    """Memory this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    serve({"gpr_recsys": gpr_recsys, "meta_hstu": meta_hstu}, sys.argv[1:])
