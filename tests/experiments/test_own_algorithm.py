"""An algorithm from outside the package: one registration, and every command knows it."""

import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from experiments import family, glyphs, sinusoid
from experiments.report import __main__ as report
from experiments.shared import common, family_runs
from imaml_jax.bilevel.inner import minimize
from imaml_jax.data.episodes import Splits, from_class_arrays
from imaml_jax.learners import registry
from imaml_jax.learners.algorithm import StepSettings
from imaml_jax.learners.base import combine, inner_report, make_adapt
from imaml_jax.learners.settings import Positive
from imaml_jax.learners.supervised import supervised
from imaml_jax.protocols import model_file
from imaml_jax.types import MetaLearner


def sign_maml(network, loss_fn, *, step_length, num_steps, fast, statistics):
    """First-order MAML with the signs of the inner gradients."""
    problem = supervised(network, loss_fn, fast=fast, statistics=statistics)
    inner = optax.sign_sgd(step_length)

    def run(params, slow, support, key=None):
        return minimize(problem.support_loss, params, slow, support, tx=inner, num_steps=num_steps)

    def meta_grad(meta_params, task, key, step):
        params, slow = problem.split(meta_params)
        adapted, info = lax.stop_gradient(run(params, slow, task.support))
        (loss, accuracy), grads = jax.value_and_grad(
            problem.query_loss, argnums=(0, 1), has_aux=True
        )(adapted, slow, task)
        return combine(*grads), inner_report(info, query_loss=loss, query_accuracy=accuracy)

    return MetaLearner(problem.init, make_adapt(problem, run), problem.predict, meta_grad)


@dataclasses.dataclass(frozen=True)
class SignSettings(StepSettings):
    """Settings of `sign_maml`."""

    algorithm: ClassVar[str] = "sign_maml"
    title: ClassVar[str] = "sign MAML"
    factory: ClassVar = staticmethod(sign_maml)

    step_length: Positive = 0.01
    """Length of an inner step in each parameter."""


@pytest.fixture(autouse=True)
def registered():
    registry.register(SignSettings)
    yield
    del registry.ALGORITHMS["sign_maml"]


@pytest.fixture
def noise(monkeypatch):
    """Images of noise in the place of the glyphs, and one device as elsewhere in the tests."""
    images = np.random.default_rng(0).integers(0, 256, (8, 20, 28, 28, 1), np.uint8)
    monkeypatch.setattr(glyphs.glyphs, "load", lambda: Splits(*[from_class_arrays(images)] * 3))
    monkeypatch.setattr(common, "cache_compilations", lambda: None)


def run(module, line):
    got = []

    def main(config):
        got.append((config, module.main(config)))

    common.run_cli(main, module.Config, "", line)
    return got[0]


def test_it_trains_on_glyphs_is_saved_loaded_and_reported(noise, tmp_path, capsys):
    tiny = "--algorithm sign_maml --step-length 0.02 --num-steps 2 --filters 2 --num-blocks 2"
    tiny += " --meta-steps 2 --log-every 1 --validate-every 1 --validation-tasks 2 --test-tasks 2"
    tiny += " --meta-batch 2 --devices 1"
    places = ["--workdir", str(tmp_path / "run"), "--model", str(tmp_path / "model")]
    config, results = run(glyphs, [*tiny.split(), *places])
    assert "sign_maml" in capsys.readouterr().out
    assert results["settings"]["step_length"] == 0.02 and results["trained_meta_steps"] == 2

    learner, meta_params, description = model_file.load_model(tmp_path / "model")
    assert description.protocol.learner == SignSettings(step_length=0.02, num_steps=2)
    assert description.protocol.recorded() == config.settings.recorded()
    assert learner.predict is not None and jax.tree.leaves(meta_params)
    del registry.ALGORITHMS["sign_maml"]
    with pytest.raises(ValueError, match="algorithm='sign_maml' must be one of"):
        model_file.load_model(tmp_path / "model")
    registry.register(SignSettings)

    page = tmp_path / "report.html"
    (group,) = report.main(report.Config(runs=(tmp_path / "run",), output=page))
    assert group.name == "sign MAML (common)" and "sign MAML" in page.read_text(encoding="utf-8")
    written = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "step_length: 0.02" in written


@pytest.mark.slow
def test_it_trains_on_sinusoids(noise, tmp_path):
    tiny = "--algorithm sign_maml --num-steps 2 --meta-steps 2 --log-every 1 --validation-tasks 2"
    tiny += f" --test-tasks 3 --workdir {tmp_path}"
    _, results = run(sinusoid, tiny.split())
    assert results["test_mse"] > 0 and results["settings"]["algorithm"] == "sign_maml"
    stored = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert stored["settings"]["step_length"] == 0.01


@pytest.mark.parametrize("module", [glyphs, sinusoid])
def test_help_shows_it(module, capsys):
    with pytest.raises(SystemExit):
        common.run_cli(print, module.Config, "", ["--algorithm", "sign_maml", "--help"])
    shown = capsys.readouterr().out
    assert "--step-length" in shown and "--inner-rate" not in shown
    with pytest.raises(SystemExit):
        common.run_cli(print, module.Config, "", ["--help"])
    assert "sign_maml" in capsys.readouterr().out


def test_it_has_a_row_in_the_tables():
    config = family.Config(algorithms=("sign_maml",), ways=3)
    runs = [run for run in family_runs.of_images(config, "glyphs") if run.algorithm == "sign_maml"]
    assert len(runs) == 1 and jnp.isfinite(runs[0].full_meta_steps)
