"""Scores, confidence intervals and the log file."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax import metrics


def test_accuracy_counts_the_largest_logit():
    logits = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0], [5.0, 0.0, 0.0]])
    assert metrics.accuracy(logits, jnp.array([0, 2, 1, 1])) == 0.75


def test_mean_ci95():
    values = np.array([0.2, 0.4, 0.9])
    mean, half_width = metrics.mean_ci95(values)
    np.testing.assert_allclose(mean, 0.5)
    np.testing.assert_allclose(half_width, 1.96 * values.std(ddof=1) / math.sqrt(3))
    mean, half_width = metrics.mean_ci95([0.5])
    assert mean == 0.5 and math.isnan(half_width)
    with pytest.raises(ValueError, match="values"):
        metrics.mean_ci95([])


def test_reduce_scalars_keeps_the_worst_case():
    stacked = {name: jnp.array([1.0, 2.0, 6.0]) for name in ("loss", "min_x", "max_x", "minimum")}
    assert metrics.reduce_scalars(stacked) == {"loss": 3, "min_x": 1, "max_x": 6, "minimum": 3}


def test_rows_are_strict_json(tmp_path):
    path = tmp_path / "log.jsonl"
    row = {"step": np.int32(1), "loss": jnp.float32(jnp.nan), "low": -math.inf, "name": "a"}
    metrics.append_json_line(path, row)
    text = path.read_text()
    assert text.endswith("\n") and "NaN" not in text and "Infinity" not in text
    assert metrics.read_json_lines(path) == [{"step": 1, "loss": None, "low": None, "name": "a"}]


@pytest.mark.parametrize("torn", [b"", b'{"step": 40, "lo', b'{"step": 40}', b"\xff\x00"])
def test_rewinding_drops_later_steps_and_a_torn_line(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    for step in (10, 20, 30):
        metrics.append_json_line(path, {"step": step})
    path.write_bytes(path.read_bytes() + torn)
    assert metrics.rewind_json_lines(path, 20) == [{"step": 10}, {"step": 20}]
    metrics.append_json_line(path, {"step": 30})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


def test_a_damaged_line_in_the_middle_is_left_out_with_a_warning(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"st\n[2]\n{"step": 3}\n')
    with pytest.warns(UserWarning, match="line [23] is") as caught:
        assert metrics.read_json_lines(path) == [{"step": 1}, {"step": 3}]
    assert len(caught) == 2
    assert metrics.read_json_lines(tmp_path / "missing.jsonl") == []
