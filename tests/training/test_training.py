"""The training loop: what it computes, when it stops, and that nothing is lost by a kill."""

import functools
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imaml_jax import training
from imaml_jax.training import checkpoint, evaluation, json_lines, loop, mapping, metrics, workdir
from imaml_jax.training import step as train_step
from imaml_jax.training.non_finite import NonFiniteError, replay
from imaml_jax.training.workdir import InterruptedRunError
from imaml_jax.types import Batch, MetaLearner, Task

ROOT = Path(__file__).resolve().parents[2]
CENTERS = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


class Info(NamedTuple):
    query_loss: Any
    query_accuracy: Any
    max_weight: Any
    residual: Any = None


def predict(params, inputs):
    return inputs @ params["w"] + params["b"][None]


def loss(params, batch):
    logits = predict(params, batch.inputs)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.targets).mean()


def adapt(params, support, key):
    grads = jax.grad(loss)(params, support)
    adapted = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    return adapted, Info(loss(adapted, support), None, jnp.max(params["w"]))


def meta_grad(params, task, key, step):
    adapted, _ = adapt(params, task.support, key)
    value, grads = jax.value_and_grad(loss)(adapted, task.query)
    correct = metrics.accuracy(predict(adapted, task.query.inputs), task.query.targets)
    return grads, Info(value, correct, jnp.max(params["w"]))


def init(key, inputs):
    return {"w": 0.1 * jax.random.normal(key, (inputs.shape[-1], 3)), "b": jnp.zeros(3)}


LEARNER = MetaLearner(init, adapt, predict, meta_grad)
TX = optax.adam(optax.cosine_decay_schedule(0.05, 40))


def sample(key):
    """4 tasks of 6 + 6 examples: which of three blobs?"""
    targets = jnp.broadcast_to(jnp.arange(6) % 3, (4, 2, 6))
    inputs = jnp.asarray(CENTERS)[targets] + jax.random.normal(key, (4, 2, 6, 4))
    return Task(
        Batch(inputs[:, 0], targets[:, 0]),
        Batch(inputs[:, 1], targets[:, 1]),
    )


def run(**changes):
    arguments = dict(
        key=jax.random.key(0),
        example_inputs=jnp.zeros((1, 4)),
        num_steps=40,
        log_every=10,
        progress=False,
    )
    learner, tx = changes.pop("learner", LEARNER), changes.pop("tx", TX)
    return training.train(learner, tx, sample, **(arguments | changes))


@pytest.fixture(autouse=True, scope="module")
def compile_once():
    """Runs that differ in nothing else share their program; the subprocesses compile their own."""
    make_step = functools.cache(train_step.make_train_step)

    def make_train_step(*args, devices=None, **kwargs):
        make = make_step if devices is None else uncached
        return make(*args, devices=devices, **kwargs)

    uncached = train_step.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", make_train_step)
        patch.setattr(loop, "_make_chunk", functools.cache(loop._make_chunk))
        yield


@functools.cache
def make_validate():
    score = evaluation.make_evaluate(LEARNER, sample, num_tasks=20)
    return lambda params: score(params, jax.random.key(1))


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def without_seconds(history):
    return [{name: row[name] for name in row if name != "seconds"} for row in history]


def diverging_at(step):
    def bad_grad(params, task, key, now):
        grads, info = meta_grad(params, task, key, now)
        return jax.tree.map(lambda g: jnp.where(now >= step, jnp.nan, g), grads), info

    return LEARNER._replace(meta_grad=bad_grad)


# One meta-step


def test_a_step_is_the_mean_over_tasks_fed_to_optax(key):
    step = jax.jit(train_step.make_train_step(LEARNER, TX, sample))
    params = init(key, jnp.zeros((1, 4)))
    state, scalars = step(train_step.init_state(TX, params), key)
    tasks, keys = jax.jit(partial(mapping.draw_tasks, sample))(key, 0)
    grads, infos = jax.jit(jax.vmap(meta_grad, (None, 0, 0, None)))(params, tasks, keys, 0)
    grads = jax.tree.map(lambda g: g.mean(axis=0), grads)
    updates, _ = TX.update(grads, TX.init(params), params)
    expected = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state[1], expected)
    assert (state.step, state.failed_step) == (1, -1)
    assert set(scalars) == {"query_loss", "query_accuracy", "max_weight", "gradient_norm"}
    np.testing.assert_allclose(scalars["query_loss"], infos.query_loss.mean(), rtol=1e-6)
    np.testing.assert_allclose(scalars["max_weight"], params["w"].max(), rtol=1e-6)
    np.testing.assert_allclose(scalars["gradient_norm"], optax.tree.norm(grads), rtol=1e-5)


def bad_info(params, task, key, step):
    grads, info = meta_grad(params, task, key, step)
    return grads, info._replace(query_loss=info.query_loss / jnp.where(step >= 2, 0, 1))


@pytest.mark.parametrize("learner", [diverging_at(2), LEARNER._replace(meta_grad=bad_info)])
def test_a_non_finite_step_freezes_the_state(key, learner):
    step = jax.jit(train_step.make_train_step(learner, TX, sample))
    state = train_step.init_state(TX, init(key, jnp.zeros((1, 4))))
    states = [state := step(state, key)[0] for _ in range(5)]
    assert [int(s.failed_step) for s in states] == [-1, -1, 2, 2, 2]
    assert [int(s.step) for s in states] == [1, 2, 2, 2, 2]
    assert_same_bits(states[1][:3], states[-1][:3])


def test_parameters_that_the_optimiser_spoils_freeze_the_state(key):
    spoil = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u * jnp.nan, updates))
    state = train_step.init_state(spoil, init(key, sample(key).support.inputs[0]))
    new, _ = train_step.make_train_step(LEARNER, spoil, sample)(state, key)
    assert (int(new.step), int(new.failed_step)) == (0, 0)
    assert_same_bits(new.meta_params, state.meta_params)


def test_bad_arguments_of_a_step():
    with pytest.raises(ValueError, match=r"map_tasks.*'tasks'"):
        train_step.make_train_step(LEARNER, TX, sample, map_tasks="tasks")


# The loop


def test_training_learns_and_logs(tmp_path, capsys):
    result = run(workdir=tmp_path / "run", validate=make_validate(), progress=True)
    assert [row["step"] for row in result.history] == [10, 20, 30, 40]
    assert result.history[-1]["query_loss"] < result.history[0]["query_loss"]
    scores = [row["validation"] for row in result.history]
    assert result.best_step == 10 * (1 + scores.index(max(scores)))
    assert make_validate()(result.best_meta_params).mean == max(scores)
    assert result.state.step == 40
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {".lock", "config.json", "metrics.jsonl", "checkpoints", "learning_curve.png"}
    assert json_lines.read(tmp_path / "run" / "metrics.jsonl") == result.history
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and not any("\r" in line for line in lines)
    assert all(word in lines[-1] for word in ("40/40", "query_accuracy", "steps/s", "validation"))


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(progress=True)
    shown = capsys.readouterr().err
    assert "\r" in shown and "40/40" in shown and "query_accuracy" in shown


def test_the_last_is_best_without_validation_whatever_the_chunks():
    long, short = run(log_every=40), run()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        long.meta_params,
        short.meta_params,
    )
    assert_same_bits(long.best_meta_params, long.meta_params)
    assert long.best_step == 40


def test_the_best_validations_are_kept_and_survive_a_stop(tmp_path):
    arguments = dict(validate=make_validate(), keep_best=3)
    whole = run(**arguments)
    scores = {row["step"]: row["validation"] for row in whole.history}
    ranked = sorted(scores, key=lambda step: (-scores[step], step))
    assert [each.step for each in whole.best] == ranked[:3]
    for each in whole.best:
        assert make_validate()(each.meta_params).mean == each.score == scores[each.step]
    run(**arguments, workdir=tmp_path, max_seconds=1e-9)
    resumed = run(**arguments, workdir=tmp_path)
    assert [each[1:] for each in resumed.best] == [each[1:] for each in whole.best]
    assert_same_bits(resumed.best, whole.best)
    with pytest.raises(ValueError, match="keep_best: was 3, now 'absent'"):
        run(validate=make_validate(), workdir=tmp_path)
    with pytest.raises(ValueError, match="keep_best cannot change within a run"):
        run(validate=make_validate(), workdir=tmp_path, accept_changes=True)
    with pytest.raises(ValueError, match="keep_best=0 must be an integer >= 1"):
        run(keep_best=0)


def test_starting_parameters_survive_the_donation(key):
    params = init(key, jnp.zeros((1, 4)))
    result = run(example_inputs=None, meta_params=params)
    assert np.isfinite(params["w"]).all() and not np.array_equal(params["w"], result[0]["w"])


def test_nothing_compiles_after_the_first_chunks(tmp_path):
    """The first two, since validation compiles after the first one."""
    compiled, at_validation = [], []
    validate = make_validate.__wrapped__()

    def listen(event, *args, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def count_and_validate(params):
        score = validate(params)
        at_validation.append(len(compiled))
        return score

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(validate=count_and_validate, workdir=tmp_path, tx=optax.adam(0.1))
    finally:
        jax.monitoring.clear_event_listeners()
    assert len(at_validation) == 4 and at_validation[0] > 0
    assert len(set(at_validation[1:])) == 1


def test_a_non_finite_run_says_where_and_what_is_left(tmp_path):
    with pytest.raises(training.NonFiniteError, match="meta-step 23") as error:
        run(learner=diverging_at(23), workdir=tmp_path)
    assert error.value.step == 23
    assert error.value.checkpoint.name == "step_00000020"
    for part in ("step_00000020", "draw_tasks(sample, key, 23)", "fold_in"):
        assert part in str(error.value)
    assert [row["step"] for row in json_lines.read(tmp_path / "metrics.jsonl")] == [10, 20]
    with pytest.raises(FloatingPointError, match="checkpoint: None"):
        run(learner=diverging_at(0))


def diverging_in_task(number, step):
    """One task of one meta-step gives a NaN, whose operation is a logarithm."""

    def bad_grad(params, task, key, now):
        _, keys = mapping.draw_tasks(sample, jax.random.key(0), step)
        hit = jnp.all(jax.random.key_data(key) == jax.random.key_data(keys[number]))
        grads, info = meta_grad(params, task, key, now)
        return jax.tree.map(lambda g: g + jnp.log(jnp.where(hit, -1.0, 1.0)), grads), info

    return LEARNER._replace(meta_grad=bad_grad)


def test_the_failing_task_is_named_and_can_be_replayed(tmp_path):
    learner = diverging_in_task(2, 13)
    with pytest.raises(NonFiniteError, match="in task 2 of meta-step 13") as error:
        run(learner=learner, workdir=tmp_path)
    assert (error.value.step, error.value.task) == (13, 2)
    with pytest.raises(FloatingPointError, match="log"):
        replay(learner, sample, key=jax.random.key(0), workdir=tmp_path)
    with pytest.raises(ValueError, match="no failed run"):
        replay(learner, sample, key=jax.random.key(0), workdir=tmp_path / "other")
    with pytest.raises(ValueError, match=r"key=\[0, 1\] is not \[0, 0\]"):
        replay(learner, sample, key=jax.random.key(1), workdir=tmp_path)
    run(workdir=tmp_path, learner=learner, non_finite="skip")
    assert not (tmp_path / "failure").exists()


def test_an_update_that_is_not_finite_blames_no_task(tmp_path):
    spoiled = optax.chain(TX, optax.stateless(lambda u, _: jax.tree.map(lambda x: x / 0.0, u)))
    with pytest.raises(NonFiniteError, match="the optimiser's update of meta-step 0") as error:
        run(tx=spoiled, workdir=tmp_path)
    assert error.value.task is None


def test_skipping_leaves_the_mean_of_the_other_tasks(key):
    skip = partial(train_step.make_train_step, tx=TX, sample=sample, non_finite="skip")
    state = train_step.init_state(TX, LEARNER.init(key, jnp.zeros((1, 4))))._replace(step=13)
    tasks, keys = jax.jit(partial(mapping.draw_tasks, sample))(jax.random.key(0), 13)
    good = jnp.array([0, 1, 3])
    grads, _ = jax.jit(jax.vmap(meta_grad, (None, 0, 0, None)))(
        state.meta_params, jax.tree.map(lambda x: x[good], tasks), keys[good], 13
    )
    expected = optax.tree.norm(jax.tree.map(lambda g: g.mean(0), grads))
    after, scalars = jax.jit(skip(diverging_in_task(2, 13)))(state, jax.random.key(0))
    assert scalars["skipped_tasks"] == 1 and after.failed_step == -1 and after.step == 14
    np.testing.assert_allclose(scalars["gradient_norm"], expected, rtol=1e-6)
    _, scalars = jax.jit(skip(LEARNER))(state, jax.random.key(0))
    assert scalars["skipped_tasks"] == 0
    after, _ = jax.jit(skip(diverging_at(0)))(state, jax.random.key(0))
    assert after.failed_step == 13


def test_a_skipping_run_counts(tmp_path):
    result = run(learner=diverging_in_task(2, 13), workdir=tmp_path, non_finite="skip")
    assert [row["skipped_tasks"] for row in result.history] == pytest.approx([0, 0.1, 0, 0])
    with pytest.raises(ValueError, match="non_finite='drop'"):
        run(non_finite="drop")


# Interruptions and who writes
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_is_served_after_the_chunk(tmp_path, name):
    score = make_validate()

    def signalling(params):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.Signals[name]))
        return score(params)

    sent, before = [], signal.getsignal(signal.Signals[name])
    arguments = dict(workdir=tmp_path, validate=signalling, checkpoint_every=40)
    with pytest.raises(InterruptedRunError, match=f"{name} after meta-step 10") as error:
        run(**arguments)
    assert (error.value.signal_name, error.value.step) == (name, 10)
    assert signal.getsignal(signal.Signals[name]) is before
    assert checkpoint.steps(tmp_path / "checkpoints") == [10]
    whole, resumed = run(validate=score), run(**arguments)
    assert_same_bits(resumed.state, whole.state)
    assert without_seconds(resumed.history) == without_seconds(whole.history)


def test_a_signal_in_the_last_chunk_is_told_too(tmp_path):
    score, calls = make_validate(), []

    def signalling(params):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(params)

    with pytest.raises(InterruptedRunError, match="SIGTERM after meta-step 40"):
        run(workdir=tmp_path, validate=signalling)
    assert_same_bits(run(workdir=tmp_path, validate=signalling).state, run().state)


def test_an_ignored_signal_stays_ignored(tmp_path):
    def signalling(params):
        os.kill(os.getpid(), signal.SIGINT)
        return score(params)

    score, before = make_validate(), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(workdir=tmp_path, validate=signalling).state.step == 40
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_report_that_nobody_reads_costs_nothing(tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            tried.append(text)
            raise BrokenPipeError

    tried = []
    monkeypatch.setattr(sys, "stderr", Gone())
    assert run(workdir=tmp_path, progress=True).state.step == 40
    assert checkpoint.steps(tmp_path / "checkpoints") == [20, 30, 40] and len(tried) == 4


def test_where_a_run_was_stopped_does_not_decide_which_is_best(tmp_path):
    arguments = dict(validate=make_validate(), validate_every=40, workdir=tmp_path)
    first = run(max_seconds=1e-9, **arguments)
    assert first.history[-1]["validation"] is not None
    assert run(**arguments).best_step == 40


def test_a_full_disk_does_not_hide_the_failure(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("imaml_jax.training.non_finite.checkpoint.save", full)
    with pytest.raises(NonFiniteError) as error:
        run(learner=diverging_at(3), workdir=tmp_path)
    assert "No space left" in error.value.__notes__[0]


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(workdir.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="has no locks"), workdir.lock(tmp_path):
        pass


def test_a_refused_change_leaves_the_config(tmp_path):
    run(workdir=tmp_path, config={"width": 8}, num_steps=20)
    with (
        pytest.warns(UserWarning, match="width: was 8, now 16"),
        pytest.raises(ValueError, match="of another model"),
    ):
        run(workdir=tmp_path, config={"width": 16}, tx=optax.sgd(0.1), accept_changes=True)
    run(workdir=tmp_path, config={"width": 8})


def test_the_second_signal_acts_at_once(tmp_path):
    def impatient(params):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(workdir=tmp_path, validate=impatient)


def test_a_workdir_has_one_writer(tmp_path):
    with workdir.lock(tmp_path):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
            run(workdir=tmp_path)
    run(workdir=tmp_path)


def test_changes_are_accepted_on_request(tmp_path):
    run(workdir=tmp_path, config={"rate": 0.1}, num_steps=20)
    with pytest.warns(UserWarning, match=r"rate: was 0.1, now 0.2"):
        result = run(workdir=tmp_path, config={"rate": 0.2}, accept_changes=True)
    assert result.state.step == 40
    run(workdir=tmp_path, config={"rate": 0.2})
    with pytest.raises(ValueError, match=r"rate: was 0.2, now 0.1"):
        run(workdir=tmp_path, config={"rate": 0.1})


def test_other_versions_are_told(tmp_path, monkeypatch):
    run(workdir=tmp_path, num_steps=20)
    monkeypatch.setattr(training.run, "_versions", lambda: {"jax": "9.9"})
    with pytest.warns(UserWarning, match=r"jax .* -> 9.9"):
        run(workdir=tmp_path)


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_meta_steps(tmp_path):
    """And nothing is compiled after the first chunks, and the log stays one line a chunk."""

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def measure(params):
        memory.append(resident())
        return score(params)

    score, memory = make_validate(), []
    result = run(
        workdir=tmp_path,
        num_steps=10_000,
        log_every=50,
        validate=measure,
        tx=optax.adam(1e-3),
    )
    assert result.state.step == 10_000 and len(memory) == 200
    assert memory[-1] - memory[20] < 8  # MiB
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(50, 10_001, 50))
    assert len(checkpoint.steps(tmp_path / "checkpoints")) == 3


def test_max_seconds_counts_earlier_parts(tmp_path):
    first = run(workdir=tmp_path, max_seconds=1e-9)
    assert [row["step"] for row in first.history] == [10]  # a fresh run always makes one chunk
    again = run(workdir=tmp_path, max_seconds=1e-9)
    assert_same_bits(again.state, first.state)
    longer = run(workdir=tmp_path, max_seconds=first.history[-1]["seconds"] + 600)
    assert longer.state.step == 40


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_steps=0), ["num_steps", "0"]),
        (dict(num_steps=45), ["num_steps", "multiple of log_every, 10", "45"]),
        (dict(log_every=2.5), ["log_every", "2.5"]),
        (dict(log_every=-1), ["log_every", "-1"]),
        (dict(validate_every=15), ["validate_every", "15"]),
        (dict(checkpoint_every=0), ["checkpoint_every", "0"]),
        (dict(max_seconds=0), ["max_seconds", "0"]),
        (dict(map_tasks="all"), ["map_tasks", "all"]),
        (dict(devices=[]), ["devices"]),
        (dict(example_inputs=None), ["exactly one", "example_inputs", "meta_params"]),
        (dict(meta_params={"w": 1.0}), ["exactly one"]),
    ],
)
def test_nonsense_is_refused(changes, words):
    with pytest.raises(ValueError) as error:
        run(**changes)
    assert all(word in str(error.value) for word in words)


def test_settings_that_are_unknown_or_missing_are_refused():
    with pytest.raises(TypeError, match="log_evry"):
        run(log_evry=10)
    with pytest.raises(TypeError, match="num_steps"):
        training.train(LEARNER, TX, sample, key=jax.random.key(0), example_inputs=jnp.zeros((1, 4)))


# Resuming


class StopHereError(Exception):
    pass


def stopping_at(step, validate):
    def stop(params):
        if len(calls) == step // 10:
            raise StopHereError
        calls.append(1)
        return validate(params)

    calls = []
    return stop


@pytest.mark.parametrize(("stop_after", "checkpoint_every"), [(0, 10), (20, 10), (30, 20)])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, stop_after, checkpoint_every):
    validate = make_validate()
    whole = run(validate=validate)
    arguments = dict(workdir=tmp_path, checkpoint_every=checkpoint_every, config={"a": [1, 2]})
    with pytest.raises(StopHereError):
        run(validate=stopping_at(stop_after, validate), **arguments)
    resumed = run(validate=validate, **arguments)
    assert_same_bits(resumed.state, whole.state)
    assert_same_bits(resumed.best_meta_params, whole.best_meta_params)
    assert resumed.best_step == whole.best_step
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    assert json_lines.read(tmp_path / "metrics.jsonl") == resumed.history


def test_a_corrupt_newest_checkpoint_costs_one_interval(tmp_path):
    whole = run(workdir=tmp_path)
    newest = tmp_path / "checkpoints" / "step_00000040" / "metadata.json"
    newest.write_text(newest.read_text()[:40])
    (tmp_path / "learning_curve.png").unlink()
    with pytest.warns(UserWarning, match="step_00000040"):
        again = run(workdir=tmp_path)
    assert_same_bits(again.state, whole.state)
    assert [row["step"] for row in again.history] == [10, 20, 30, 40]
    assert checkpoint.restore(tmp_path / "checkpoints", (again.state, (again.meta_params,)))


def test_another_run_is_not_resumed(tmp_path):
    run(workdir=tmp_path, config={"inner": {"rate": 0.1}, "ways": 5})
    with pytest.raises(ValueError, match=r"inner.rate: was 0.1, now 0.2"):
        run(workdir=tmp_path, config={"inner": {"rate": 0.2}, "ways": 5})
    with pytest.raises(ValueError, match="root_key") as error:
        run(workdir=tmp_path, config={"inner": {"rate": 0.1}, "ways": 5}, key=jax.random.key(3))
    assert "ways" not in str(error.value)
    with pytest.raises(ValueError, match="of another model or optimiser"):
        run(workdir=tmp_path, config={"inner": {"rate": 0.1}, "ways": 5}, tx=optax.sgd(0.1))


def in_subprocess(what, workdir, **env):
    return subprocess.Popen(
        [sys.executable, "-W", "error", __file__, what, str(workdir)],
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_NUMPY_RANK_PROMOTION": "raise",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        | env,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    process = in_subprocess("train", tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.steps(tmp_path / "checkpoints"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1.0))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    resumed, whole = train_in_small_steps(tmp_path), train_in_small_steps(None)
    assert_same_bits(resumed.state, whole.state)
    assert_same_bits(resumed.best_meta_params, whole.best_meta_params)
    assert without_seconds(resumed.history) == without_seconds(whole.history)


@pytest.mark.slow
def test_two_devices_agree_with_one():
    process = in_subprocess("devices", "", XLA_FLAGS="--xla_force_host_platform_device_count=2")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert json.loads(output) == {"same": True, "refused": True}


def train_in_small_steps(workdir):
    return run(workdir=workdir, log_every=2, validate=make_validate(), validate_every=10)


def compare_devices():
    devices = jax.devices()
    one, two = run(), run(devices=devices)
    same = len(devices) == 2
    for a, b in zip(jax.tree.leaves(one.state), jax.tree.leaves(two.state), strict=True):
        same = same and np.allclose(a, b, rtol=1e-4, atol=1e-6)
    score = [
        evaluation.evaluate(LEARNER, params, sample, jax.random.key(1), num_tasks=7, devices=where)
        for params, where in ((one.meta_params, devices), (two.meta_params, devices))
    ]
    same = same and np.allclose(score[0].per_task, score[1].per_task)
    try:
        step = train_step.make_train_step(
            LEARNER, TX, lambda key: jax.tree.map(lambda x: x[:3], sample(key)), devices=devices
        )
        step(train_step.init_state(TX, one.meta_params), jax.random.key(0))
        refused = False
    except ValueError as error:
        refused = "2 devices and 3 tasks" in str(error)
    print(json.dumps({"same": bool(same), "refused": refused}))


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train_in_small_steps(sys.argv[2])
    else:
        compare_devices()
