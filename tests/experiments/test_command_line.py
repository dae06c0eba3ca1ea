"""What all command lines share: help, files of settings, flags, statuses, completion, the list."""

import ast
import dataclasses
import importlib
import inspect
import io
import itertools
import os
import re
import subprocess
import sys
import textwrap
import typing
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from imaml_jax.data import images
from imaml_jax.training import plots

# Importing the experiments must not change the devices of the other tests.
with mock.patch.dict(os.environ, XLA_FLAGS=os.environ.get("XLA_FLAGS", "")):
    from experiments import __main__ as listing
    from experiments import features, glyphs, sinusoid
    from experiments.shared import cli, common, config_file

    NAMES = tuple(listing.listing())
    CONFIGS = {}
    for name in NAMES:
        path = f"experiments.{name}"
        folder = Path(*path.split("."))
        is_package = (Path(__file__).parents[2] / folder).is_dir()
        CONFIGS[name] = importlib.import_module(path + ".__main__" * is_package).Config

ROOT = Path(__file__).resolve().parents[2]
RANGE = re.compile(r"at least|above|below|between \d|multiple of|positive")


def field_docs(config):
    """The docstring of each field, by the class nearest to `config`."""
    found = {}
    for base in config.__mro__[:-1]:
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, doc in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
                found.setdefault(field.target.id, " ".join(ast.literal_eval(doc.value).split()))
    return found


def numeric(hint):
    """Whether a number that is not one of a few may be given."""
    return bool({int, float} & set(config_file._options(hint)))


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_explained_and_every_number_has_its_range(name):
    hints, docs = typing.get_type_hints(CONFIGS[name]), field_docs(CONFIGS[name])
    for field in dataclasses.fields(CONFIGS[name]):
        assert docs.get(field.name, "").endswith("."), f"{name}: {field.name} has no docstring"
        if numeric(hints[field.name]):
            assert RANGE.search(docs[field.name]), f"{name}: the range of {field.name} is not told"


def default_of(config):
    required = [f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING]
    return config(**dict.fromkeys(required, Path("somewhere")))


@pytest.mark.parametrize("name", NAMES)
def test_settings_come_back_from_their_file(name, tmp_path):
    config = default_of(CONFIGS[name])
    path = tmp_path / "config.yaml"
    path.write_text(config_file.text(config), encoding="utf-8")
    assert CONFIGS[name](**config_file.read(path, CONFIGS[name])) == config


def filled(hint):
    """A value of the hint: that of the last of several, and two or as many as a tuple takes."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (*config_file._UNIONS, typing.Literal):
        return filled(next(part for part in reversed(parts) if part is not type(None)))
    if origin is tuple:
        return tuple(map(filled, parts[:1] * 2 if parts[-1] is ... else parts))
    values = {bool: True, int: 7, float: 0.5, str: "some", Path: Path("there")}
    return values[hint] if isinstance(hint, type) else hint


@pytest.mark.parametrize("name", NAMES)
# Whatever goes together: settings such as sizes=("5x1",) have a form of their own.
@mock.patch("imaml_jax.learners.settings.Record.__post_init__", lambda self: None)
def test_settings_that_are_all_given_come_back_from_their_file(name, tmp_path):
    given = {name: filled(hint) for name, hint in typing.get_type_hints(CONFIGS[name]).items()}
    path = tmp_path / "config.yaml"
    path.write_text(config_file.text(CONFIGS[name](**given)), encoding="utf-8")
    assert config_file.read(path, CONFIGS[name]) == given


@pytest.mark.parametrize("shares", ["0.5", "[0.5]", "[0.5, 0.25, 0.15, 0.1]", "[a, 0, 1]", "{}"])
def test_a_tuple_of_another_length_is_refused(tmp_path, shares):
    path = tmp_path / "config.yaml"
    path.write_text(f"shares: {shares}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"must be a list of 3 \(each a number\) or null"):
        config_file.read(path, CONFIGS["folder"])


def settings(tmp_path, text, *args, config=glyphs.Config):
    """What the experiment gets from a file of that text and a command line."""
    path = tmp_path / "some.yaml"
    path.write_text(text, encoding="utf-8")
    got = []
    cli.run_cli(got.append, config, "", ["--config", str(path), *args])
    return got[0]


def test_the_command_line_overrides_the_file(tmp_path):
    text = "algorithm: mamlpp\ninner_rate: 1e-3\nlearn_rates: false\nmap_tasks: 4\nworkdir: a b\n"
    text += "log_to: [tensorboard]\n"
    found = settings(tmp_path, text, "--learn-rates", "--map-tasks", "vmap")
    assert found == glyphs.Config(
        algorithm="mamlpp",
        inner_rate=1e-3,
        learn_rates=True,
        map_tasks="vmap",
        workdir=Path("a b"),
        log_to=("tensorboard",),
    )
    assert settings(tmp_path, "") == glyphs.Config()
    found = settings(tmp_path, "epochs: 3", "--output", "x", config=features.Config)
    assert found == features.Config(output=Path("x"), epochs=3)


def test_flags_that_may_be_left_out():
    got = []
    for line in ("--learn-rates --no-per-step-norm", ""):
        cli.run_cli(got.append, glyphs.Config, "", line.split())
    assert [(c.learn_rates, c.per_step_norm) for c in got] == [(True, False), (None, None)]


def refusal(capsys, main, config, line):
    """Status and standard error of a command."""
    with pytest.raises(SystemExit) as stopped:
        cli.run_cli(main, config, "", line)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("learn_rate: true", ("learn_rate is no setting", "did you mean learn_rates?")),
        ("inner_rate: abc", ("inner_rate='abc' must be a number or null",)),
        ("ways: 5.5", ("ways=5.5 must be a whole number",)),
        ("ways: true", ("ways=True must be a whole number",)),
        ("algorithm: imamal", ("algorithm='imamal'", "'anil', ", "did you mean imaml?")),
        ("map_tasks: vmop", ("map_tasks='vmop'", "a whole number or null", "did you mean vmap?")),
        ("workdir: 3", ("workdir=3 must be a path or null",)),
        ("learn_rates: perhaps", ("learn_rates='perhaps' must be true or false or null",)),
        ("log_to: wandb", ("log_to='wandb' must be a list (each 'tensorboard' or 'wandb')",)),
        ("3: 4", ("3 is no setting",)),
        ("- 1", ("must map names of settings to values",)),
        ("ways: [", ("cannot be read as YAML", "line 1")),
        ("ways: !!python/object/apply:os.getcwd []", ("cannot be read as YAML", "python/object")),
        ("seed: 2026-13-45", ("cannot be read as YAML", "month must be in 1..12")),
        ("seed: !!int abc", ("cannot be read as YAML", "invalid literal")),
        ("seed: !!int ''", ("cannot be read as YAML",)),
        ("seed: !!bool abc", ("cannot be read as YAML",)),
        ("seed: !!timestamp abc", ("cannot be read as YAML",)),
        ("[" * 5000, ("cannot be read as YAML", "recursion")),
        (f"inner_rate: 1{'0' * 400}", ("must be a number or null",)),
        ("seed: 1\nways: 5\n'seed': 2", ("cannot be read as YAML", "seed is there twice")),
        ("ways: 1", ("ways=1 must be at least 2",)),
        ("outer_rate: .nan", ("outer_rate=nan must be positive",)),
    ],
)
def test_a_wrong_file_is_refused_by_key(tmp_path, capsys, text, fragments):
    path = tmp_path / "some.yaml"
    path.write_text(text, encoding="utf-8")
    with mock.patch.object(glyphs.glyphs, "load", side_effect=AssertionError("read the data")):
        status, said = refusal(capsys, glyphs.main, glyphs.Config, [f"--config={path}"])
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert all(fragment in said for fragment in fragments), said


@pytest.mark.parametrize("name", ["folder", "glyphs", "mini_imagenet", "omniglot"])
def test_leo_is_pointed_to_its_own_commands(capsys, name):
    status, said = refusal(capsys, print, CONFIGS[name], ["--algorithm", "leo"])
    assert (status, said.count("\n")) == (2, 1) and said.startswith("error: algorithm=leo ")
    assert "python -m experiments.features" in said and "python -m experiments.leo" in said


def test_statuses(tmp_path, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    with mock.patch("os._exit", side_effect=sys.exit) as left:
        stopped = refusal(capsys, interrupted, sinusoid.Config, [])
    assert stopped == (130, "error: stopped by SIGINT\n")
    left.assert_called_once_with(130)
    status, said = refusal(capsys, print, sinusoid.Config, ["--config", str(tmp_path / "none")])
    assert status == 2 and "No such file" in said
    assert refusal(capsys, print, sinusoid.Config, ["--shotz", "3"])[0] == 2
    assert refusal(capsys, print, sinusoid.Config, ["--config"])[0] == 2
    assert refusal(capsys, print, sinusoid.Config, ["--help"])[0] == 0


def test_log_to_needs_a_workdir():
    config = sinusoid.Config(log_to=("tensorboard",))
    with pytest.raises(ValueError, match=r"log_to=\('tensorboard',\) needs workdir"):
        common.run_training(config, *[mock.Mock()] * 3)


def test_settings_are_kept_as_the_run_began(tmp_path):
    config = sinusoid.Config(shots=3, workdir=tmp_path, max_seconds=2.0, accept_changes=False)
    with mock.patch.object(common, "train") as train:
        common.run_training(config, *[mock.Mock()] * 3)
        (tmp_path / "config.json").touch()  # as `train` leaves it
        common.run_training(dataclasses.replace(config, shots=4), *[mock.Mock()] * 3)
        kept = config_file.read(tmp_path / "config.yaml", sinusoid.Config)
        assert sinusoid.Config(**kept) == dataclasses.replace(config, workdir=None)
        changed = dataclasses.replace(config, shots=5, accept_changes=True)
        common.run_training(changed, *[mock.Mock()] * 3)
    assert config_file.read(tmp_path / "config.yaml", sinusoid.Config)["shots"] == 5
    assert train.call_count == 3


def test_a_run_that_is_repeated_elsewhere_keeps_off_the_model_of_the_first(tmp_path):
    config = glyphs.Config(workdir=tmp_path, model=tmp_path / "model")
    with mock.patch.object(common, "train"):
        common.run_training(config, *[mock.Mock()] * 3)
    kept = config_file.read(tmp_path / "config.yaml", glyphs.Config)
    assert not {"workdir", "model"} & kept.keys() and "seed" in kept


def test_the_list_needs_no_jax():
    code = (
        "import runpy, sys\nsys.argv = ['-']\ntry:\n    runpy.run_module('experiments', run_name="
    )
    code += "'__main__')\nfinally:\n    print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    *lines, has_jax = done.stdout.splitlines()
    assert has_jax == "False"
    for name in NAMES:
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(".") or line.endswith("`."), f"{name} has no first line"


def test_the_list_points_to_the_experiment(capsys):
    assert listing.main(["omniglot"]) == 2
    assert "try python -m experiments.omniglot" in capsys.readouterr().err
    assert listing.main(["--help"]) == 0


def test_completion_in_bash(tmp_path, capsys):
    with mock.patch.object(cli, "program", lambda: "experiments.glyphs"):
        script = tmp_path / "completion.bash"
        status, _ = refusal(
            capsys, print, glyphs.Config, ["--tyro-write-completion", "bash", str(script)]
        )
    assert not status
    ask = f"""source {script}
complete -p experiments.glyphs
COMP_WORDS=(experiments.glyphs --proto) COMP_CWORD=1
"$(complete -p experiments.glyphs | sed 's/.*-F \\([^ ]*\\) .*/\\1/')" && echo "${{COMPREPLY[@]}}"
"""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1].split() == ["--protocol"], done.stderr


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_in_a_log_file_has_no_carriage_returns(monkeypatch, is_terminal):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    with plots.reporter(True, 0, 4) as show:
        show({"step": 2, "seconds": 1.0, "query_loss": 0.5})
    assert ("\r" in stream.getvalue()) == is_terminal
    stream.truncate(0)
    images.decode_all([], np.zeros((0, 4, 4, 3), np.uint8), progress=True, title="none")
    assert ("\r" in stream.getvalue()) == is_terminal
