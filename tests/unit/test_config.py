"""Configs: defaults < YAML < overrides; every problem at once, with the nearest name; `--help` explains every setting."""

import re
from pathlib import Path
from typing import Literal

import pytest
from documents import launch_module
from pydantic import Field, ValidationError, model_validator

from data_pipeline.build import BuildConfig
from data_pipeline.knowledge import BuildKnowledgeConfig
from data_pipeline.tokenize_items import FitTokenizerConfig
from gpr_dist.config import Config, _nested_configs, build_config, describe, load_config, parse_cli, to_yaml
from gpr_dist.errors import ConfigError
from gpr_dist.job import FinetuneConfig, PretrainConfig

ROOT = Path(__file__).resolve().parents[2]


class InnerConfig(Config):
    """Inner."""

    lr: float = Field(default=1e-3, gt=0)
    """peak learning rate, per step"""
    widths: tuple[int, ...] = (10, 100)
    """cut-offs"""


class OuterConfig(Config):
    """Outer."""

    inner: InnerConfig = InnerConfig()
    """nested"""
    others: tuple[InnerConfig, ...] = ()
    """a list of parts"""
    name: str = "run"
    """name
    of the run"""
    mode: Literal["a", "b"] = "a"
    """a | b"""
    folder: Path | None = None
    """optional"""
    steps: int = 10
    """steps"""

    @model_validator(mode="after")
    def _check(self):
        if self.steps == 13:
            raise ValueError("steps=13 is unlucky")
        return self


class RequiredConfig(Config):
    """Required."""

    needed: int
    """must be given"""


def load(*overrides, text=None, tmp_path=None):
    path = None
    if text is not None:
        path = tmp_path / "c.yaml"
        path.write_text(text)
    return load_config(OuterConfig, path, overrides)


@pytest.mark.parametrize(("override", "read"), [
    ("inner.lr=3e-4", lambda c: c.inner.lr == 3e-4), ("inner.lr=0.5", lambda c: c.inner.lr == 0.5),
    ("inner.widths=[1, 2, 3]", lambda c: c.inner.widths == (1, 2, 3)), ("folder=null", lambda c: c.folder is None),
    ("folder=a/b=c", lambda c: c.folder == Path("a/b=c")), ("inner={lr: 2, widths: []}", lambda c: c.inner == InnerConfig(lr=2, widths=())),
    ("name=", lambda c: c.name == ""), ("name='7'", lambda c: c.name == "7"), ("mode=b", lambda c: c.mode == "b"),
    ("steps=1e3", lambda c: c.steps == 1000), ("others=[{lr: 1e-2}]", lambda c: c.others[0].lr == 0.01)])
def test_overrides_are_read_as_yaml_values(override, read):
    assert read(load(override))


def test_overrides_beat_the_file_and_the_file_beats_defaults(tmp_path):
    config = load("inner.lr=0.2", text="inner:\n  lr: 0.1\n  widths: [5]\nname: file\n", tmp_path=tmp_path)
    assert config.inner == InnerConfig(lr=0.2, widths=(5,)) and config.name == "file" and config.steps == 10
    assert load("steps=1", "steps=2").steps == 2


@pytest.mark.parametrize(("override", "message"), [
    ("steps", "not of the form key=value"), ("=3", "not of the form key=value"), ("name.x=1", "unknown|valid string"),
    ("inner.lr=[1", "not valid YAML"), ("name=@x", "not valid YAML"), ("name={a", "not valid YAML")])
def test_overrides_that_cannot_be_read(override, message):
    with pytest.raises(ConfigError, match=message):
        load(override)


def test_the_example_shown_for_an_override_is_a_real_key(capsys):
    with pytest.raises(ConfigError) as caught:
        load("steps")
    with pytest.raises(SystemExit):
        parse_cli(OuterConfig, "doc", None, ["--help"])
    for text in (str(caught.value), capsys.readouterr().out):
        example = re.search(r"e\.g\. (\S+=\S+)", " ".join(text.split()))[1]
        assert load_config(PretrainConfig, None, [example]) != PretrainConfig()


def test_an_override_below_a_single_value(tmp_path):
    with pytest.raises(ConfigError, match="name is a single value"):
        load("name.x=1", text="name: me\n", tmp_path=tmp_path)


@pytest.mark.parametrize(("override", "nearest"), [("inner.Lr=1", "inner.lr"), ("inner.witdhs=[1]", "inner.widths"), ("stepz=1", "steps"),
                                                   ("iner.lr=1", "inner"), ("others=[{rl: 1}]", "others.0.lr")])
def test_an_unknown_key_names_the_nearest(override, nearest):
    with pytest.raises(ConfigError, match=rf"unknown key \S+; did you mean {nearest}\?"):
        load(override)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        load("inner.lr=-1", "inner.widhts=3", "mode=c", "steps=many")
    message = str(caught.value)
    for part in ("inner.lr", "found -1", "did you mean inner.widths?", "mode", "'c'", "steps", "'many'"):
        assert part in message
    with pytest.raises(ConfigError, match="here: OuterConfig: steps=13 is unlucky"):
        build_config(OuterConfig, {"steps": 13}, "here")
    with pytest.raises(ConfigError, match="needed: Field required"):
        load_config(RequiredConfig)


@pytest.mark.parametrize(("text", "message"), [("- a\n- b\n", "found a list"), ("a: [1", "not valid YAML"), ("inner:\n", "inner")])
def test_files_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text=text, tmp_path=tmp_path)


def test_a_missing_file_and_an_empty_one(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read config .*none\.yaml: No such file"):
        load_config(OuterConfig, tmp_path / "none.yaml")
    assert load(text="# nothing\n", tmp_path=tmp_path) == OuterConfig()


def test_the_resolved_config_reads_back_equal(tmp_path):
    config = load("inner.lr=3e-7", "others=[{lr: 5.0}]", "folder=a/b", "name='1e5'", "inner.widths=[]")
    assert load(text=to_yaml(config), tmp_path=tmp_path) == config


def test_configs_are_frozen_and_check_their_own_defaults():
    with pytest.raises(ValidationError):
        OuterConfig().steps = 3

    class WrongDefault(Config):
        x: int = "text"

    with pytest.raises(ValidationError):
        WrongDefault()


def test_describe_has_one_line_per_leaf():
    assert describe(OuterConfig) == ["  inner.lr=0.001  peak learning rate, per step", "  inner.widths=(10, 100)  cut-offs",
                                     "  others=()  a list of parts", "  name=run  name of the run", "  mode=a  a | b",
                                     "  folder=None  optional", "  steps=10  steps"]
    assert describe(RequiredConfig) == ["  needed=(required)  must be given"]


def test_command_line(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("steps: 5\n")
    config, args = parse_cli(OuterConfig, "doc", path, ["--dry-run", "inner.lr=2", "--append", "name=x", "--local_rank=1"],
                             {"--append": "add"})
    assert (config.steps, config.inner.lr, config.name) == (5, 2, "x") and args.dry_run and args.append
    assert parse_cli(OuterConfig, "doc", None, [])[0] == OuterConfig()
    with pytest.raises(SystemExit) as ended:
        parse_cli(OuterConfig, "What 100% of it does.", path, ["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "What 100% of it does." in shown and all(line in shown for line in describe(OuterConfig))


YAML_OF = {"data": BuildConfig, "tokenizer": FitTokenizerConfig, "knowledge": BuildKnowledgeConfig,
           "compare": launch_module("compare").CompareConfig, "market": launch_module("make_market").MakeMarketConfig,
           "simulator": launch_module("fit_simulator").FitSimulatorConfig, "table3": launch_module("table3").Table3Config}


def reachable(cls):
    """A job's config and every config inside it."""
    inner = [part for field in cls.model_fields.values() for part in _nested_configs(field.annotation)]
    return {cls}.union(*(reachable(part) for part in inner))


@pytest.mark.parametrize("job", [PretrainConfig, FinetuneConfig, BuildConfig, FitTokenizerConfig, BuildKnowledgeConfig,
                                 YAML_OF["compare"], YAML_OF["market"], YAML_OF["simulator"], YAML_OF["table3"]])
def test_every_setting_of_every_job_is_explained(job):
    configs = reachable(job)
    assert len(configs) > 1 and all(c.__doc__ and c.__doc__ != Config.__doc__ for c in configs)
    names = [(c.__name__, name, field) for c in configs for name, field in c.model_fields.items() if name != "format"]  # names its class
    assert [f"{c}.{name}" for c, name, field in names if not field.description] == []


JOB_OF = {"pretrain": "pretrain", "finetune": "finetune", "hepo": "hepo"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_yaml_is_accepted(path, tmp_path, monkeypatch, capsys):
    """Data and tokenizer configs by their class, jobs by `--dry-run` in an empty folder, where there is no data yet."""
    kind = path.parent.name if path.parent.name in YAML_OF else path.stem  # configs/public/ has a folder for each data set
    if kind in YAML_OF:
        config = load_config(YAML_OF[kind], path)
        (tmp_path / "again.yaml").write_text(to_yaml(config))
        assert load_config(type(config), tmp_path / "again.yaml") == config
        return
    job = next(script for prefix, script in JOB_OF.items() if path.stem.startswith(prefix))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{job}.py", "--config", str(path), "--dry-run"])
    assert launch_module(job).main() == 0
    printed = capsys.readouterr().out
    assert "schedule:" in printed and "parameters" in printed and list(tmp_path.iterdir()) == []


def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file_alone(tmp_path):
    class Job(Config):
        steps: int = 1

    path = tmp_path / "job.yaml"
    path.write_text("steps: 2\n")
    for overrides, origin in (([], str(path)), (["stepps=3"], f"{path} with command line")):
        if not overrides:
            path.write_text("stepps: 2\n")
        with pytest.raises(ConfigError, match="did you mean steps") as caught:
            load_config(Job, path, overrides)
        assert str(caught.value).startswith(f"{origin}: ")
        path.write_text("steps: 2\n")
