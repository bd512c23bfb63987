"""Errors are also standard types, survive pickling between processes, and end a script with one line and a code."""

import pickle

import pytest

from gpr_dist import errors
from gpr_dist.errors import CheckpointError, ConfigError, DataError, GPRError, TokenizerError, TrainingError, run_cli


@pytest.mark.parametrize(("kind", "standard"), [(ConfigError, ValueError), (DataError, ValueError), (TokenizerError, ValueError),
                                                (CheckpointError, RuntimeError), (TrainingError, RuntimeError)])
def test_each_is_a_standard_type_and_survives_pickling(kind, standard):
    error = pickle.loads(pickle.dumps(kind("shard 3: row 7 is cut")))
    assert type(error) is kind and str(error) == "shard 3: row 7 is cut" and isinstance(error, standard) and isinstance(error, GPRError)


def exit_code(main):
    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    return ended.value.code


def fail_with(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_script_ends_with_what_it_returns(returned, code):
    assert exit_code(lambda: returned) == code


def test_a_problem_of_the_user_is_one_line_on_stderr(capsys):
    assert exit_code(fail_with(DataError("two\n  lines"))) == 2
    shown = capsys.readouterr()
    assert shown.err == "DataError: two lines\n" and shown.out == ""


def test_an_interrupt_ends_with_130(capsys):
    assert exit_code(fail_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_our_own_mistake_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 // 0)


@pytest.mark.parametrize(("rank", "waits"), [("0", 0), ("3", 1)])
def test_other_ranks_let_rank_0_speak_first(monkeypatch, capsys, rank, waits):
    slept = []
    monkeypatch.setattr(errors.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", rank)
    assert exit_code(fail_with(ConfigError("x"))) == 2
    assert len(slept) == waits and capsys.readouterr().err == "ConfigError: x\n"
