"""README.md is true: files, functions, commands and settings it names exist, and no file is missing from its tree."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT, broken_references, launch_module, references

from data_pipeline.build import BuildConfig
from data_pipeline.knowledge import BuildKnowledgeConfig
from data_pipeline.tokenize_items import FitTokenizerConfig
from gpr_dist.config import Config, describe, parse_cli
from gpr_dist.job import FinetuneConfig, PretrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "PAPER.md")}
STRICT = {"--strict": "a switch"}
FLAGS = {"recommend.py": {"--bench": "a switch"}, "table3.py": {"--table": "a switch"},
         "fit_tokenizer.py": {"--append": "a switch"}, "report.py tokenizer": STRICT, "report.py drift": STRICT,
         "report.py run": STRICT}


JOBS: dict[str, tuple[type[Config], str | None]] = {  # script -> its config and the file it reads without --config
    "build_data.py": (BuildConfig, "configs/data/complete_journey.yaml"),
    "make_market.py": (launch_module("make_market").MakeMarketConfig, "configs/market/quickstart.yaml"),
    "fit_tokenizer.py": (FitTokenizerConfig, "configs/tokenizer/complete_journey.yaml"),
    "pretrain.py": (PretrainConfig, "configs/pretrain.yaml"),
    "finetune.py": (FinetuneConfig, "configs/finetune.yaml"),
    "fit_simulator.py": (launch_module("fit_simulator").FitSimulatorConfig, "configs/simulator.yaml"),
    "hepo.py": (launch_module("hepo").HepoConfig, "configs/hepo.yaml"),
    "evaluate.py": (launch_module("evaluate").EvaluateConfig, None),
    "evaluate_policy.py": (launch_module("evaluate_policy").EvaluatePolicyConfig, None),
    "off_policy.py": (launch_module("off_policy").LogsConfig, None),
    "table3.py": (launch_module("table3").Table3Config, "configs/table3.yaml"),
    "bench.py recommend": (launch_module("bench_recommend").RecommendBenchConfig, None),
    "bench.py recursion": (launch_module("bench_recursion").RecursionBenchConfig, None),
    "bench.py hepo": (launch_module("bench_hepo").HepoBenchConfig, None),
    "plan.py": (launch_module("plan").PlanConfig, "configs/pretrain.yaml"),
    "bench.py loader": (launch_module("bench_loader").LoaderBenchConfig, None),
    "bench.py step": (launch_module("bench_step").StepBenchConfig, None),
    "bench.py decode": (launch_module("bench_decode").DecodeBenchConfig, None),
    "export.py": (launch_module("export").ExportConfig, None),
    "recommend.py": (launch_module("recommend").RecommendConfig, None),
    "build_knowledge.py": (BuildKnowledgeConfig, "configs/knowledge/complete_journey.yaml"),
    "bench.py tokenizer": (launch_module("bench_tokenizer").TokenizerBenchConfig, None),
    "bench.py table1": (launch_module("bench_table1").Table1Config, None),
    "report.py tokenizer": (launch_module("report").TokenizerReportConfig, "configs/tokenizer/complete_journey.yaml"),
    "report.py drift": (launch_module("report").DriftReportConfig, None),
    "migrate.py": (launch_module("migrate").MigrateConfig, None),
    "report.py run": (launch_module("report").RunReportConfig, None),
    "doctor.py": (launch_module("doctor").DoctorConfig, "configs/pretrain.yaml"),
    "erase_user.py": (launch_module("erase_user").EraseConfig, None),
    "bench.py balance": (launch_module("bench_balance").BalanceBenchConfig, None),
    "bench.py checkpoint": (launch_module("bench_checkpoint").CheckpointBenchConfig, None),
    "compare.py": (launch_module("compare").CompareConfig, "configs/compare/ablation.yaml"),
}


def code_lines(language: str) -> list[str]:
    """Lines of the README's code blocks of a language, without comments."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0].rstrip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def launches() -> list[tuple[str, list[str]]]:
    """(script, its arguments) of every command that runs something in launch/."""
    found = []
    for words in map(shlex.split, code_lines("bash")):
        at = next((n for n, word in enumerate(words) if word.startswith("launch/")), None)
        if at is not None:
            script, arguments = words[at].removeprefix("launch/"), words[at + 1 :]
            arguments = arguments[: arguments.index(">")] if ">" in arguments else arguments
            found.append((f"{script} {arguments.pop(0)}" if script in ("bench.py", "report.py") else script, arguments))
    return found


def copies() -> dict[str, str]:
    """Files the reader makes with `cp`: name -> where it comes from."""
    return {words[2]: words[1] for words in map(shlex.split, code_lines("bash")) if words[0] == "cp" and words[1].startswith("configs/")}


# --- commands ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "arguments"), launches(), ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_every_command_is_accepted(script, arguments):
    """Parsed as the script would: with its own default file, and with the README's copies in place of the reader's."""
    config_class, default = JOBS[script]
    files = [copies().get(argument, argument) for argument in arguments]
    arguments = [str(ROOT / new) if new != old or old.startswith("configs/") else old for new, old in zip(files, arguments, strict=True)]
    config, _ = parse_cli(config_class, "", default and ROOT / default, arguments, FLAGS.get(script),
                          words="runs" if script == "report.py run" else None)
    assert isinstance(config, config_class)


def test_every_script_and_copied_file_is_there_and_shown():
    shown = {script.split()[0] for script, _ in launches()}
    scripts = {path.name for path in (ROOT / "launch").glob("*.py") if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")}
    children = {f"bench_{name}_{whose}.py" for name in ("step", "decode") for whose in ("ours", "peers")}  # processes of bench.py
    children.add("bench_checkpoint.py")  # calls itself
    assert shown == scripts - children
    assert len(launches()) >= 16 and all((ROOT / source).is_file() for source in copies().values())


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    wanted = {words[1] for words in map(shlex.split, code_lines("bash")) if words[0] == "make"}
    assert {"quickstart", "test"} <= wanted <= targets


@pytest.mark.parametrize("command", [["launch/pretrain.py"], ["launch/bench.py", "loader"]], ids=" ".join)
def test_help_runs(command, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:], "--help"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    config_class, _ = JOBS[" ".join(command).removeprefix("launch/")]
    assert all(line in done.stdout for line in describe(config_class))


# --- settings and names -----------------------------------------------------------------------------------------------------------


def setting_names() -> set[str]:
    """Every key of every job, also the groups above the leaves."""
    leaves = {line.split("=")[0].strip() for config_class, _ in JOBS.values() for line in describe(config_class)}
    return {".".join(leaf.split(".")[:n]) for leaf in leaves for n in range(1, leaf.count(".") + 2)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_settings_named_in_the_text_exist(name):
    quoted = {word for text in re.findall(r"`([^`\n]+)`", DOCUMENTS[name]) for word in text.split()}
    keys = {match[1] for word in quoted if (match := re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)+)(?:=\S*)?", word))}
    keys = {key for key in keys if not (ROOT / key).exists() and Path(key).suffix not in (".py", ".md", ".sh", ".json", ".jsonl", ".png")}
    known = setting_names() | {"source.logs"}  # one of several kinds of source, so not in the list of settings
    assert len(keys) > 5 and sorted(key for key in keys if key not in known) == []


def test_functions_and_tests_named_exist():
    assert len(references(README)) > 40
    assert broken_references(README) == []


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    assert len(links) >= 2 and [link for link in links if not (ROOT / link).exists()] == []


# --- the file tree ----------------------------------------------------------------------------------------------------------------


def tree() -> dict[str, str]:
    """Path -> phrase of the README's file tree; a line that is not indented and ends with a slash is the folder of those below it."""
    block = re.search(r"^## Files\n\n```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[1]
    listed, folder = {}, ""
    for line in block.splitlines():
        path, phrase = re.fullmatch(r"\s*(\S+)\s*(.*)", line).groups()
        if not line.startswith(" "):
            folder = path if path.endswith("/") else ""
            if folder:
                continue
        listed[folder + path] = phrase
    return listed


def test_every_path_in_the_tree_exists_and_has_a_phrase():
    assert [path for path in tree() if not (ROOT / path).exists()] == []
    assert [path for path, phrase in tree().items() if not phrase] == []


def test_every_file_is_in_the_tree():
    files = [path for folder in ("gpr_dist", "data_pipeline", "launch", "configs") for pattern in ("*.py", "*.sh", "*.yaml")
             for path in (ROOT / folder).rglob(pattern) if path.stat().st_size and path.name != "__init__.py"]
    listed = tree()
    assert len(files) > 60 and sorted(str(p.relative_to(ROOT)) for p in files if str(p.relative_to(ROOT)) not in listed) == []
    parts = {f"tests/{path.name}/" for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.rglob("test_*.py"))}
    assert parts <= listed.keys()
