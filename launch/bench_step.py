"""`bench.py step`: speed of our training step, where its time goes, and two public models beside it, steps interleaved.

Ours at several sizes: the whole step (forward, losses, backward, clipping, AdamW; no DeepSpeed) on generated journeys, and each part
of it alone. Operations are counted as in gpr_dist/model/flops.py (multiply-add = 2, training = 3 times forward, only pairs that the
mask allows, no embedding, norms or activations) and set against the rate that a large matrix product reaches in the same process, in
turn with the steps: that is our MFU. "Dense" is everything of HSD or PTD but attention itself, norms and activations included; beside
it stands what the bare matrix products of the same shapes reach, which no implementation of this model can pass.

Peers run where their path is given: `gpr_recsys=PATH` (fay85/gpr-recsys) and `generative_recommenders=PATH` (meta-recsys, its PyTorch
path; needs fbgemm-gpu, perhaps in another Python: `hstu_python=PATH`). Against gpr-recsys ours has the same rows, width, depth, heads
and dropout, and trains either the one target a row that the peer trains or every ad of the same rows. Against HSTU ours is set to
plain HSTU (SiLU scores, relative bias, one set of norms and maps, no FFN). Every contender is a process of its own, with the same
threads and the same allocator settings.
"""

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any, Literal

from bench_contender import Contender, PeerError
from pydantic import Field, model_validator
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.errors import ConfigError
from gpr_dist.model.gpr import GPRConfig

FIELDS = {"num_user_features": 4, "num_env_features": 4}
SIZES: dict[str, dict[str, Any]] = {
    "small": {"rows": 16, "tokens": 200, "model": {**FIELDS, "width": 96, "hsd": {"num_layers": 2}, "ptd": {"num_layers": 1}}},
    "medium": {"rows": 8, "tokens": 500, "model": {
        **FIELDS, "width": 256, "codebook_size": 1024, "hsd": {"num_layers": 4}, "ptd": {"num_layers": 2}}},
    "large": {"rows": 4, "tokens": 1000, "model": {
        **FIELDS, "width": 512, "codebook_size": 2048, "hsd": {"num_layers": 8, "num_heads": 8}, "ptd": {"num_layers": 2, "num_heads": 8}}},
}
HSTU_SHAPES: dict[str, dict[str, Any]] = {
    "ml1m": {"width": 50, "num_layers": 8, "num_heads": 2, "length": 200, "rows": 128},
    "d256": {"width": 256, "num_layers": 4, "num_heads": 4, "length": 512, "rows": 8},
    # NVIDIA recsys-examples' benchmark (PERF_ANALYSIS.md), for CUDA
    "nvidia": {"width": 1024, "num_layers": 8, "num_heads": 4, "length": 4099, "rows": 32, "dropout": 0.0},
}


class SizeConfig(Config):
    """A model and the journeys it is trained on."""

    model: GPRConfig = GPRConfig()
    """the network"""
    rows: int = Field(8, ge=1)
    """journeys of the micro-batch"""
    tokens: float = Field(500, ge=4)
    """of a journey, on average"""
    organic: float = Field(4, ge=0)
    """organic tokens before a request, on average (0 to twice as many)"""
    ads: int = Field(3, ge=1)
    """most ads of a request (1 to this)"""
    spread: float = Field(0.4, ge=0)
    """sigma of the log-normal number of requests of a journey"""


class HSTUShape(Config):
    """A plain HSTU and its input."""

    width: int = Field(256, ge=2)
    """embedding width"""
    num_layers: int = Field(4, ge=1)
    """blocks"""
    num_heads: int = Field(4, ge=1)
    """attention heads"""
    length: int = Field(512, ge=2)
    """items of every row"""
    rows: int = Field(8, ge=1)
    """rows of the batch"""
    num_items: int = Field(3883, ge=1)
    """catalogue (MovieLens-1M has as many)"""
    num_negatives: int = Field(128, ge=1)
    """of the sampled softmax"""
    dropout: float = Field(0.2, ge=0, lt=1)
    """of the input and of each block"""


class PeerShape(Config):
    """gpr-recsys's small configuration and batch."""

    rows: int = Field(128, ge=1)
    """journeys of the batch"""
    positions: int = Field(50, ge=4)
    """of every journey, all used"""
    organic: int = Field(10, ge=1)
    """of them"""
    width: int = Field(128, ge=2)
    """model width"""
    num_heads: int = Field(4, ge=1)
    """attention heads"""
    hsd_layers: int = Field(4, ge=3)
    """encoder layers"""
    ptd_layers: int = Field(2, ge=1)
    """decoder layers"""
    num_mtp_heads: int = Field(4, ge=1)
    """MTP heads"""
    num_levels: int = Field(3, ge=2)
    """codes of an item"""
    codebook_size: int = Field(256, ge=2)
    """codes per level"""
    dropout: float = Field(0.1, ge=0, lt=1)
    """of both"""


class StepBenchConfig(Config):
    """What is measured."""

    sizes: dict[str, SizeConfig] = Field({})
    """ours, by name: small, medium and large, and settings over them (sizes.small.rows=4) or further ones"""
    switches: dict[str, Any] = Field({})
    """model settings laid over every size and over ours beside gpr-recsys, e.g. switches.hsd.recursions=2"""
    peer: PeerShape = PeerShape()
    """shape of the comparison with gpr-recsys"""
    hstu: dict[str, HSTUShape] = Field({})
    """shapes of the comparison with HSTU: ml1m and d256, nvidia on CUDA, and settings over them or further ones"""
    gpr_recsys: Path | None = None
    """a checkout of fay85/gpr-recsys"""
    generative_recommenders: Path | None = None
    """a checkout of meta-recsys/generative-recommenders"""
    hstu_python: Path = Path(sys.executable)
    """the Python that has fbgemm-gpu; torch is all else it needs"""
    contenders: tuple[str, ...] = ()
    """sizes, "gpr_recsys" or HSTU shapes to run; empty = all, "nvidia" only on CUDA"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of all contenders"""
    device: Literal["cpu", "cuda"] = "cpu"
    """of ours; peers run on the CPU only"""
    threads: int = Field(1, ge=1)
    """of every contender"""
    repetitions: int = Field(5, ge=1)
    """steps of each contender; the median counts"""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu = seconds of processor time: for crowded machines, with threads=1"""
    seed: int = 0
    """of data and weights"""
    out: Path | None = None
    """JSON file for the results"""

    @model_validator(mode="before")
    @classmethod
    def _presets(cls, values: dict[str, Any]) -> dict[str, Any]:
        plain = {name: {k: v.model_dump() if isinstance(v, Config) else v for k, v in (values.get(name) or {}).items()}
                 for name in ("sizes", "hstu")}
        sizes = {name: merged(size, {"model": values.get("switches") or {}}) for name, size in merged(SIZES, plain["sizes"]).items()}
        return {**values, "sizes": sizes, "hstu": merged(HSTU_SHAPES, plain["hstu"])}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, dictionary by dictionary."""
    out = {**base, **over}
    return out | {k: merged(base[k], over[k]) for k in base.keys() & over.keys() if isinstance(base[k], dict) and isinstance(over[k], dict)}


def run_bench(config: StepBenchConfig) -> None:
    """Measure group by group, print a table each."""
    known = {*config.sizes, "gpr_recsys", *config.hstu}
    if unknown := set(config.contenders) - known:
        raise ConfigError(f"contenders: unknown {', '.join(sorted(unknown))}; there is: {', '.join(sorted(known))}")
    chosen = config.contenders or [name for name in known if name != "nvidia" or config.device == "cuda"]
    print(f"{config.precision}, {config.threads} threads on {config.device}, {config.clock} time, median of {config.repetitions} "
          f"interleaved steps, load average {os.getloadavg()[0]:.1f}")
    results: dict[str, Any] = {}
    for name, size in config.sizes.items():
        if name in chosen:
            results[name] = run_size(config, name, size)
    if "gpr_recsys" in chosen:
        results["gpr_recsys"] = run_peer(config)
    for name, shape in config.hstu.items():
        if name in chosen:
            results[name] = run_hstu(config, name, shape)
    if config.out:
        config.out.write_text(json.dumps({"config": config.model_dump(mode="json"), "results": results}, indent=1))


def run_size(config: StepBenchConfig, name: str, size: SizeConfig) -> dict[str, Any]:
    """One size of ours: whole step and parts."""
    with contender(config, "gpr", {"size": size.model_dump(mode="json")}) as ours:
        about = ours.run("describe")
        memory = [ours.run("step")["memory_bytes"] for _ in range(2)][-1]  # before the parts hold anything; the optimizer has its state
        kept = ours.run("kept")
        runs = measure(config, {name: ours}, skip=("describe", "kept"))[name]
        heads = heads_cost(config, ours, size)
    found = size_metrics(about, {step: seconds(config, answers) for step, answers in runs.items()},
                         runs["matmul"][0]["flops"], memory) | {"kept_bytes": kept, "heads_cost": heads}
    print(f"\n{name}: {about['parameters'] / 1e6:.1f} M parameters, {size.rows} journeys, {about['tokens']:,} tokens, "
          f"{about['targets']:,} target ads ({about['head_targets']:,} with all heads)")
    print(f"  step {found['step_s'] * 1e3:.0f} ms: {found['tokens_per_s']:,.0f} tokens/s, {found['targets_per_s']:,.0f} targets/s, "
          f"{found['flops_per_s'] / 1e9:.1f} GFLOP/s = {found['mfu']:.0%} of the matmul rate ({found['matmul_flops_per_s'] / 1e9:.0f}), "
          f"{found['memory_bytes'] / 2**20:,.0f} MiB")
    print(f"  dense parts reach {found['dense_mfu']:.0%} of the matmul rate: HSD {found['hsd_dense_mfu']:.0%}, "
          f"PTD {found['ptd_dense_mfu']:.0%}")
    print(f"  their bare products reach HSD {found['hsd_products_mfu']:.0%}, PTD {found['ptd_products_mfu']:.0%}; of that the dense parts "
          f"reach {found['hsd_dense_of_products']:.0%}, {found['ptd_dense_of_products']:.0%}")
    if heads:
        print(f"  a step with {size.model.num_mtp_heads} heads takes {heads:.2f} times as long as with one")
    print(f"    {'':24} {'':11} of the step   kept for backward")
    for part, share in found["parts"].items():
        held = f"{kept[part] / 2**20:8.1f} MiB" if part in kept else ""
        print(f"    {part:24} {share['seconds'] * 1e3:8.1f} ms {share['share']:11.1%} {held:>19}")
    print(f"    {'sum':24} {found['parts_s'] * 1e3:8.1f} ms {found['parts_s'] / found['step_s']:7.1%} of the step")
    return found


def heads_cost(config: StepBenchConfig, ours: Contender, size: SizeConfig) -> float | None:
    """Seconds of a step over those of one with a single MTP head, steps alternating; None where there is one only."""
    if size.model.num_mtp_heads == 1:
        return None
    single = size.model_copy(update={"model": size.model.model_copy(update={"num_mtp_heads": 1})})
    with contender(config, "gpr", {"size": single.model_dump(mode="json")}) as one:
        runs = measure(config, {"all": ours, "one": one}, only=("step",))
    return seconds(config, runs["all"]["step"]) / seconds(config, runs["one"]["step"])


def size_metrics(about: dict[str, Any], step_seconds: dict[str, float], matmul_flops: float, memory_bytes: int) -> dict[str, Any]:
    """Rates and shares of one size. Args: about: the worker's description. step_seconds: median of everything the worker ran."""
    step, rate = step_seconds["step"], matmul_flops / step_seconds["matmul"]
    parts = {name.removeprefix("part: "): value for name, value in step_seconds.items() if name.startswith("part: ")}
    total = sum(value for name, value in parts.items() if not name.startswith("of which"))
    flops = about["flops"]
    hsd = parts["HSD without attention"]
    ptd = parts["PTD keys and values"] + parts["PTD opening"] + parts["PTD generation"] - parts["of which PTD attention"]
    return {
        **about, "memory_bytes": memory_bytes, "step_s": step,
        "tokens_per_s": about["tokens"] / step, "targets_per_s": about["targets"] / step,
        "flops_per_s": sum(flops.values()) / step, "matmul_flops_per_s": rate, "mfu": sum(flops.values()) / step / rate,
        "hsd_dense_mfu": flops["hsd.dense"] / hsd / rate, "ptd_dense_mfu": flops["ptd.dense"] / ptd / rate,
        "dense_mfu": (flops["hsd.dense"] + flops["ptd.dense"]) / (hsd + ptd) / rate,
        "hsd_products_mfu": flops["hsd.dense"] / step_seconds["products: HSD"] / rate,
        "ptd_products_mfu": flops["ptd.dense"] / step_seconds["products: PTD"] / rate,
        "hsd_dense_of_products": step_seconds["products: HSD"] / hsd, "ptd_dense_of_products": step_seconds["products: PTD"] / ptd,
        "parts": {name: {"seconds": value, "share": value / step} for name, value in parts.items()}, "parts_s": total}


def run_peer(config: StepBenchConfig) -> dict[str, Any]:
    """Ours and gpr-recsys on the same rows."""
    shape = config.peer
    plain = {"width": shape.width, "num_mtp_heads": shape.num_mtp_heads, "num_levels": shape.num_levels,
             "codebook_size": shape.codebook_size, **FIELDS,
             "hsd": {"num_layers": shape.hsd_layers, "num_heads": shape.num_heads, "ffn_multiple": 4, "dropout": shape.dropout},
             "ptd": {"num_layers": shape.ptd_layers, "num_heads": shape.num_heads, "ffn_multiple": 4}}
    full = merged(plain, {"hsd": {"recursions": 2}, "ptd": {"num_thinking": 4, "refining": True},
                          "knowledge": {"num_vectors": 4, "width": 64}})
    ours = {f"ours, {parts}, {reading}": ("gpr_like_peer", {
        **shape.model_dump(), "model": GPRConfig(**merged(model, config.switches)).model_dump(mode="json"), "every_request": every})
        for parts, model in (("all parts", full), ("no thinking, refining, recursion", plain))
        for reading, every in (("one target a journey", False), ("every ad a target", True))}
    wanted = {**ours, "gpr-recsys": ("gpr_recsys", {**shape.model_dump(), "path": config.gpr_recsys})}
    runs, absent = run_group(config, wanted, ("step",))
    rates = {name: steps["step"][0]["targets"] / seconds(config, steps["step"]) for name, steps in runs.items()}
    print(f"\nbeside gpr-recsys: {shape.rows} journeys of {shape.positions} positions, width {shape.width}, {shape.hsd_layers} + "
          f"{shape.ptd_layers} layers, {shape.num_mtp_heads} heads")
    return report(config, runs, absent, rates, "targets/s", "gpr-recsys")


def run_hstu(config: StepBenchConfig, name: str, shape: HSTUShape) -> dict[str, Any]:
    """Our encoder and Meta's HSTU on the same items."""
    wanted = {"ours": ("hstu", shape.model_dump()), "HSTU": ("meta_hstu", {**shape.model_dump(), "path": config.generative_recommenders})}
    runs, absent = run_group(config, wanted, ("encoder", "full softmax", "sampled softmax"))
    out: dict[str, Any] = {}
    matmul = runs["ours"]["matmul"]
    peak = matmul[0]["flops"] / seconds(config, matmul)
    for step in ("encoder", "full softmax", "sampled softmax"):
        rates = {who: steps[step][0]["tokens"] / seconds(config, steps[step]) for who, steps in runs.items()}
        print(f"\n{name}, {step}: {shape.rows} rows of {shape.length}, width {shape.width}, {shape.num_layers} layers, "
              f"{shape.num_heads} heads")
        out[step] = report(config, {who: {"step": steps[step]} for who, steps in runs.items()}, absent, rates, "tokens/s", "HSTU")
    encoder = runs["ours"]["encoder"]
    for convention, flops in encoder[0]["flops"].items():
        out[f"mfu_{convention}"] = flops / seconds(config, encoder) / peak
    print(f"  encoder: {out['mfu_ours']:.1%} of the matmul rate by our convention, {out['mfu_nvidia']:.1%} by NVIDIA's")
    return out


def run_group(config: StepBenchConfig, wanted: dict[str, tuple[str, dict[str, Any]]],
              peer_steps: tuple[str, ...]) -> tuple[dict[str, dict[str, list[dict]]], dict[str, str]]:
    """All contenders of a group in turn. Returns: name -> step -> answers; name -> why it does not run here."""
    found, absent = {}, {}
    try:
        for name, (kind, settings) in wanted.items():
            if "path" in settings and settings["path"] is None:
                absent[name] = "no path given"
                continue
            try:
                found[name] = contender(config, kind, {**settings, "path": str(settings.get("path"))})
            except PeerError as error:
                absent[name] = str(error)
        return measure(config, found, only=(*peer_steps, "matmul")), absent
    finally:
        for process in found.values():
            process.close()


def measure(config: StepBenchConfig, contenders: dict[str, Contender], skip: tuple[str, ...] = (),
            only: tuple[str, ...] | None = None) -> dict[str, dict[str, list[dict]]]:
    """Every step of every contender in turn; the first round warms up and is left out."""
    runs: dict[str, dict[str, list[dict]]] = {name: {} for name in contenders}
    turns = [(name, step, count > 0) for count in range(config.repetitions + 1) for name, process in contenders.items()
             for step in process.steps if step not in skip and (only is None or step in only)]
    for name, step, counts in tqdm(turns, desc="steps", file=sys.stderr, mininterval=0.5):
        answer = contenders[name].run(step)
        if counts:
            runs[name].setdefault(step, []).append(answer)
    return runs


def seconds(config: StepBenchConfig, answers: list[dict]) -> float:
    """Median of what the configured clock says."""
    return statistics.median(answer[config.clock] for answer in answers)


def report(config: StepBenchConfig, runs: dict[str, dict[str, list[dict]]], absent: dict[str, str], rates: dict[str, float], unit: str,
           peer: str) -> dict[str, Any]:
    """One line per contender."""
    out = {}
    print(f"  {'':58} {'ms/step':>8} {unit:>10} {'MiB':>7}  x {peer}")
    for name, rate in rates.items():
        answers = runs[name]["step"]
        ratio = rate / rates[peer] if peer in rates else float("nan")
        out[name] = {"step_s": seconds(config, answers), unit: rate, "times_peer": ratio, "memory_bytes": answers[-1]["memory_bytes"],
                     "seconds": [answer[config.clock] for answer in answers]}
        print(f"  {name:58} {1e3 * out[name]['step_s']:8.0f} {rate:10,.0f} {out[name]['memory_bytes'] / 2**20:7,.0f}  {ratio:.2f}")
    for name, reason in absent.items():
        print(f"  {name:58} does not run here: {reason}")
    return {"contenders": out, "absent": absent}


def contender(config: StepBenchConfig, kind: str, settings: dict[str, Any]) -> Contender:
    """Ours, or where the settings have a path a peer's."""
    ours = settings.get("path", "None") == "None"
    settings = {**settings, "precision": config.precision, "threads": config.threads, "seed": config.seed}
    if ours:
        settings["device"] = config.device
    return Contender("bench_step_ours.py" if ours else "bench_step_peers.py", kind, settings,
                     python=config.hstu_python if kind == "meta_hstu" else sys.executable, ours=ours)
