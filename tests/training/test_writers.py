"""The optional writers beside `metrics.jsonl`."""

import math
import struct
import sys
import types
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import pytest

from imaml_jax import Batch, MetaLearner, Task
from imaml_jax.training import train, writers


class Info(NamedTuple):
    query_loss: jax.Array


ROWS = [
    {"step": 2, "loss": 1.5, "validation": None, "seconds": 0.1},
    {"step": 4, "loss": math.inf, "validation": 0.5, "seconds": 0.2, "note": "text"},
]
NUMBERS = [{"loss": 1.5, "seconds": 0.1}, {"validation": 0.5, "seconds": 0.2}]


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with (
        pytest.raises(ValueError, match=rf"log_to={name} needs .*pip install {package}"),
        writers.open_writers((name,), tmp_path, {}),
    ):
        pass


def test_an_unknown_writer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="log_to='tensorbord' must be one of tensorboard, wandb"):
        with writers.open_writers(("tensorbord",), tmp_path, {}):
            pass


def stub(monkeypatch, package, **members):
    module = types.ModuleType(package)
    module.__spec__ = mock.Mock(origin="here")
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, package, module)
    return module


def test_wandb(tmp_path, monkeypatch):
    run = mock.Mock(id="abc")
    errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    wandb = stub(monkeypatch, "wandb", init=mock.Mock(return_value=run), errors=errors)
    for number, row in zip(NUMBERS, ROWS, strict=True):
        with writers.open_writers(("wandb",), tmp_path, {"seed": 1}) as log:
            assert not run.log.called
            log(row)
        run.log.assert_called_once_with(number, step=row["step"])
        run.finish.assert_called_once_with()
        run.reset_mock()
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert first["id"] is None and second["id"] == "abc"  # a resumed run goes on
    assert first["dir"] == str(tmp_path) and first["config"] == {"seed": 1}
    wandb.init.side_effect = errors.Error("No API key configured.")
    with writers.open_writers(("wandb",), tmp_path, {}) as log:
        with pytest.raises(ValueError, match=r"No API key configured\. .*WANDB_MODE=offline"):
            log(ROWS[0])


def events(folder):
    """`(step, tag, value)` of every scalar of TensorBoard's files."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(folder.iterdir()):
        content, start = path.read_bytes(), 0
        while start < len(content):  # length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", content, start)
            event = event_pb2.Event.FromString(content[start + 12 : start + 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            start += 16 + length
    return found


def test_tensorboard_gets_the_rows_of_a_training(tmp_path):
    pytest.importorskip("tensorboardX")

    def meta_grad(params, task, key, step):
        return params, Info(params + step)

    learner = MetaLearner(lambda key, inputs: jnp.ones(()), None, None, meta_grad)
    ones = Batch(jnp.ones((1, 1)), jnp.ones((1, 1)))
    with writers.open_writers(("tensorboard",), tmp_path, {}) as log:
        result = train(
            learner,
            optax.sgd(0.01),
            lambda key: Task(ones, ones),
            key=jax.random.key(0),
            num_steps=2,
            log_every=1,
            example_inputs=jnp.zeros((1, 1)),
            progress=False,
            log=log,
        )
    written = [e for e in events(tmp_path / "tensorboard") if e[1] == "query_loss"]
    expected = [
        (row["step"], "query_loss", pytest.approx(row["query_loss"])) for row in result.history
    ]
    assert written == expected


def test_nothing_is_written_without_rows(tmp_path, monkeypatch):
    stub(monkeypatch, "tensorboardX")
    with writers.open_writers(("tensorboard",), tmp_path, {}):
        pass
    with writers.open_writers((), tmp_path, {}) as log:
        log(ROWS[0])
    assert list(tmp_path.iterdir()) == []
