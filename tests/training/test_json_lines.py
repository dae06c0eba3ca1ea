"""The log file."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax.training import json_lines


def test_rows_are_strict_json(tmp_path):
    path = tmp_path / "log.jsonl"
    row = {"step": np.int32(1), "loss": jnp.float32(jnp.nan), "low": -math.inf, "name": "a"}
    json_lines.append(path, row)
    text = path.read_text()
    assert text.endswith("\n") and "NaN" not in text and "Infinity" not in text
    assert json_lines.read(path) == [{"step": 1, "loss": None, "low": None, "name": "a"}]


@pytest.mark.parametrize("torn", [b"", b'{"step": 40, "lo', b'{"step": 40}', b"\xff\x00"])
def test_rewinding_drops_later_steps_and_a_torn_line(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    for step in (10, 20, 30):
        json_lines.append(path, {"step": step})
    path.write_bytes(path.read_bytes() + torn)
    assert json_lines.rewind(path, 20) == [{"step": 10}, {"step": 20}]
    json_lines.append(path, {"step": 30})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


def test_a_damaged_line_in_the_middle_is_left_out_with_a_warning(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"st\n[2]\n' + "[" * 10**5 + '\n{"step": 3}\n')
    with pytest.warns(UserWarning, match="line [234] is") as caught:
        assert json_lines.read(path) == [{"step": 1}, {"step": 3}]
    assert len(caught) == 3
    assert json_lines.read(tmp_path / "missing.jsonl") == []
