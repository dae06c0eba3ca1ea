"""What all command lines share: help, files of settings, flags, statuses, completion, the list."""

import dataclasses
import importlib
import io
import os
import re
import subprocess
import sys
import types
import typing
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml

from experiments import __main__ as listing
from experiments import features, glyphs, sinusoid
from experiments.shared import cli, common, config_file
from imaml_jax.data import images
from imaml_jax.learners.registry import ALGORITHMS
from imaml_jax.learners.settings import plain, range_of, settings_of
from imaml_jax.training import plots

NAMES = tuple(listing.listing())
CONFIGS = {}
for name in NAMES:
    path = f"experiments.{name}"
    folder = Path(*path.split("."))
    is_package = (Path(__file__).parents[2] / folder).is_dir()
    CONFIGS[name] = importlib.import_module(path + ".__main__" * is_package).Config

ROOT = Path(__file__).resolve().parents[2]
_IN_WORDS = re.compile(r"at least|above|below|between \d|multiple of|positive")


def default_of(config):
    """A config with the defaults, and a place for each path that must be named."""
    if issubclass(config, cli.ProtocolConfig):
        return config.of()
    required = [f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING]
    return config(**dict.fromkeys(required, Path("somewhere")))


def read_back(path, config):
    default = default_of(config)
    values = config_file.convert(path, config_file.load(path), settings_of(default, True), {})
    if isinstance(default, cli.ProtocolConfig):
        return config.of(**values)
    return config(**values)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_explained_and_every_number_has_its_range(name):
    for setting, (hint, _, doc) in settings_of(default_of(CONFIGS[name]), True).items():
        assert doc.endswith("."), f"{name}: {setting} has no docstring"
        plain_hint = plain(hint)
        if {int, float} & {plain_hint, *typing.get_args(plain_hint)}:
            bounds = range_of(hint) or _IN_WORDS.search(doc)
            assert bounds, f"{name}: the range of {setting} is not told"


@pytest.mark.parametrize("name", NAMES)
def test_settings_come_back_from_their_file(name, tmp_path):
    config = default_of(CONFIGS[name])
    path = tmp_path / "config.yaml"
    path.write_text(config_file.text(config), encoding="utf-8")
    assert read_back(path, CONFIGS[name]) == config


def filled(hint):
    """A value of the hint: that of the last of several, and two or as many as a tuple takes."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType, typing.Literal):
        return filled(next(part for part in reversed(parts) if part is not type(None)))
    if origin is tuple:
        return tuple(map(filled, parts[:1] * 2 if parts[-1] is ... else parts))
    values = {bool: True, int: 7, float: 0.5, str: "some", Path: Path("there")}
    return values[hint] if isinstance(hint, type) else hint


@pytest.mark.parametrize("name", NAMES)
def test_every_value_comes_back_from_yaml_in_its_type(name):
    for setting, (hint, _, _) in settings_of(default_of(CONFIGS[name]), True).items():
        given = filled(plain(hint))
        text = yaml.safe_dump({setting: config_file._writable(given)})
        assert config_file.typed(yaml.safe_load(text)[setting], hint) == given, setting


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_changed_settings_come_back_from_their_file(algorithm, tmp_path):
    config = glyphs.Config.of(
        algorithm=algorithm,
        num_steps=3,
        outer_clip=None,
        log_to=("wandb",),
        max_seconds=2.5,
        workdir=Path("a b"),
    )
    path = tmp_path / "config.yaml"
    path.write_text(config_file.text(config), encoding="utf-8")
    got = []
    cli.run_cli(got.append, glyphs.Config, "", ["--config", str(path)])
    assert got == [config]


@pytest.mark.parametrize("shares", ["0.5", "[0.5]", "[0.5, 0.25, 0.15, 0.1]", "[a, 0, 1]", "{}"])
def test_a_tuple_of_another_length_is_refused(tmp_path, shares):
    path = tmp_path / "config.yaml"
    path.write_text(f"shares: {shares}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"shares=.* must be a list of 3, each a finite number"):
        read_back(path, CONFIGS["folder"])


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
    assert found == glyphs.Config.of(
        algorithm="mamlpp",
        inner_rate=1e-3,
        learn_rates=True,
        map_tasks="vmap",
        workdir=Path("a b"),
        log_to=("tensorboard",),
    )
    assert settings(tmp_path, "") == glyphs.Config.of()
    found = settings(tmp_path, "epochs: 3", "--output", "x", config=features.Config)
    assert found == features.Config(output=Path("x"), epochs=3)


def test_flags_that_may_be_left_out():
    got = []
    for line in ("--no-learn-rates --no-per-step-norm", ""):
        cli.run_cli(got.append, glyphs.Config, "", ["--algorithm", "mamlpp", *line.split()])
    learners = [config.settings.learner for config in got]
    assert [(each.learn_rates, each.per_step_norm) for each in learners] == [
        (False,) * 2,
        (True,) * 2,
    ]


def test_help_shows_what_applies_with_its_default_and_range(capsys):
    def shown(line):
        with pytest.raises(SystemExit):
            cli.run_cli(print, glyphs.Config, "", [*line.split(), "--help"])
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    maml, hessian_free = shown("--algorithm maml --protocol finn"), shown("--algorithm imaml_hf")
    assert "--reg-strength" not in maml and "--learn-rates" not in maml
    assert "Inner steps in training. Range: at least 1 and at most 1000000. (default: 1)" in maml
    strength = "Lambda, the strength of the proximal term. Range: above 0. (default: 0.1)"
    assert strength in hessian_free


def refusal(capsys, main, config, line):
    """Status and standard error of a command."""
    with pytest.raises(SystemExit) as stopped:
        cli.run_cli(main, config, "", line)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("inner_rat: 1", ("inner_rat is no setting", "did you mean inner_rate?")),
        ("learn_rates: true", ("learn_rates is no setting",)),
        ("inner_rate: abc", ("inner_rate='abc' must be a finite number, above 0",)),
        ("ways: 5.5", ("ways=5.5 must be an integer",)),
        ("ways: true", ("ways=True must be an integer",)),
        ("algorithm: imamal", ("algorithm='imamal'", "anil, ", "did you mean imaml?")),
        ("map_tasks: vmop", ("map_tasks='vmop'", "an integer, at least 1", "did you mean vmap?")),
        ("workdir: 3", ("workdir=3 must be a path or None",)),
        ("conv_bias: perhaps", ("conv_bias='perhaps' must be True or False",)),
        ("log_to: wandb", ("log_to='wandb' must be a list", "one of tensorboard, wandb")),
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
        (f"inner_rate: 1{'0' * 400}", ("must be a finite number",)),
        ("seed: 1\nways: 5\n'seed': 2", ("cannot be read as YAML", "seed is given twice")),
        ("ways: 1", ("ways=1 must be an integer, at least 2",)),
        ("outer_rate: .nan", ("outer_rate=nan must be a finite number, above 0",)),
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
    assert (status, said.count("\n")) == (2, 1) and said.startswith("error: algorithm='leo' ")
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
    config = sinusoid.Config.of(log_to=("tensorboard",))
    with pytest.raises(ValueError, match=r"log_to=\('tensorboard',\) needs workdir"):
        common.run_training(config, *[mock.Mock()] * 3)


def test_settings_are_kept_as_the_run_began(tmp_path):
    config = sinusoid.Config.of(shots=3, workdir=tmp_path, max_seconds=2.0, accept_changes=False)
    with mock.patch.object(common, "train") as train:
        common.run_training(config, *[mock.Mock()] * 3)
        (tmp_path / "config.json").touch()  # as `train` leaves it
        common.run_training(dataclasses.replace(config, shots=4), *[mock.Mock()] * 3)
        kept = read_back(tmp_path / "config.yaml", sinusoid.Config)
        assert kept == dataclasses.replace(config, workdir=None)
        changed = dataclasses.replace(config, shots=5, accept_changes=True)
        common.run_training(changed, *[mock.Mock()] * 3)
    assert config_file.load(tmp_path / "config.yaml")["shots"] == 5
    assert train.call_count == 3


def test_a_run_that_is_repeated_elsewhere_keeps_off_the_model_of_the_first(tmp_path):
    config = glyphs.Config.of(workdir=tmp_path, model=tmp_path / "model")
    with mock.patch.object(common, "train"):
        common.run_training(config, *[mock.Mock()] * 3)
    kept = config_file.load(tmp_path / "config.yaml")
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


def test_an_experiment_has_one_device_a_core():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    code = "import experiments, jax, os; print(jax.device_count() - len(os.sched_getaffinity(0)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout.strip() == "0", done.stderr


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
    with plots.reporter(0, 4) as show:
        show({"step": 2, "seconds": 1.0, "query_loss": 0.5})
    assert ("\r" in stream.getvalue()) == is_terminal
    stream.truncate(0)
    images.decode_all([], np.zeros((0, 4, 4, 3), np.uint8), progress=True, title="none")
    assert ("\r" in stream.getvalue()) == is_terminal
