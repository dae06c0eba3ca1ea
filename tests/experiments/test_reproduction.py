"""The experiments that reproduce the paper's figures: their claims, at a small size."""

import json
import pathlib

import numpy as np
import pytest

from experiments import compute_and_memory, meta_gradient_accuracy


def test_meta_gradients_of_regression_tasks(x64):
    problem = meta_gradient_accuracy.regression(condition=50.0, num_tasks=2, seed=0)
    curves = meta_gradient_accuracy.measure(problem, (512, 1024))
    errors = {name: curve["high"] for name, curve in curves.items()}
    floors = {k: errors[f"iMAML, {k} CG"][1] for k in meta_gradient_accuracy.CG_STEPS}
    assert floors[1] > floors[2] > 2 * floors[5] and floors[5] > 2 * floors[10]
    assert floors[20] < 1e-2 and floors[50] < 1e-8
    assert all(floor < meta_gradient_accuracy.cg_bound(50.0, k) for k, floor in floors.items())
    exact = ("dense solve", "Nesterov", "Hessian-free")
    assert all(errors[f"iMAML, {name}"][1] < 1e-12 for name in exact)
    assert errors["MAML, regularised"][1] < 1e-12
    assert errors["MAML, plain"][1] > 0.1


@pytest.mark.slow
def test_meta_gradient_accuracy(tmp_path, capsys):
    output = tmp_path / "out" / "figure"
    steps = (64, 128, 256, 1024)
    config = meta_gradient_accuracy.Config(num_steps=steps, output=output)
    results = meta_gradient_accuracy.main(config)
    assert json.loads(output.with_name("figure.json").read_text())["curves"] == results["curves"]
    assert output.with_name("figure.png").stat().st_size > 10_000
    assert "iMAML, Nesterov" in capsys.readouterr().out
    for curves in results["curves"].values():
        for way in ("iMAML, dense solve", "iMAML, Nesterov", "iMAML, Hessian-free"):
            assert curves[way]["high"][-1] < 1e-8
        assert curves["MAML, regularised"]["high"][-1] < 1e-8
        assert curves["iMAML, 5 CG"]["median"][-1] < 0.5 * curves["iMAML, 2 CG"]["median"][-1]
        assert curves["MAML, plain"]["median"][-1] > 0.1
    curve = results["curves"]["regression"]["iMAML, dense solve"]["median"]
    rate = (curve[2] / curve[1]) ** (1 / (steps[2] - steps[1]))
    np.testing.assert_allclose(rate, results["descent_rate"]["regression"], rtol=1e-3)
    curve = results["curves"]["regression"]["iMAML, Nesterov"]["median"]
    rate = (curve[1] / curve[0]) ** (1 / (steps[1] - steps[0]))
    np.testing.assert_allclose(rate, results["nesterov_rate"]["regression"], rtol=0.03)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"condition": 1.0}, "condition=1.0 must be a finite number, above 1"),
        ({"condition": 1e20}, "at most 1000000000000"),
        ({"condition": float("nan")}, "condition=nan"),
        ({"num_steps": ()}, "num_steps"),
        ({"num_steps": (4, 0)}, "num_steps"),
        ({"num_tasks": 0}, "num_tasks=0"),
        ({"seed": -1}, "seed=-1"),
        ({"output": pathlib.Path("")}, "must name a file"),
    ],
)
def test_meta_gradient_accuracy_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        meta_gradient_accuracy.main(meta_gradient_accuracy.Config(**changes))


@pytest.mark.slow
def test_memory_against_inner_steps(tmp_path, capsys):
    output = tmp_path / "out" / "figure"
    config = compute_and_memory.Config(
        values=(2, 4, 8, 16), ways=2, shots=1, filters=8, rounds=1, output=output
    )
    results = compute_and_memory.main(config)
    rows = json.loads(output.with_name("figure.json").read_text())["algorithms"]
    assert rows == results["algorithms"]
    assert output.with_name("figure.png").stat().st_size > 10_000
    assert "iMAML, 5 CG, MiB" in capsys.readouterr().out
    for flat in ("iMAML, 5 CG", "first-order MAML"):
        used = rows[flat]["temp_bytes"]
        assert max(used) < 1.01 * min(used)
    unrolled, recomputed = rows["MAML"]["bytes_line"], rows["MAML, steps recomputed"]["bytes_line"]
    assert unrolled["r_squared"] > 0.99
    assert unrolled["slope"] > 3 * recomputed["slope"] > 0
    assert all(len(row["seconds"]) == 4 for row in rows.values())


def test_a_line_is_fitted_by_least_squares():
    line = compute_and_memory.fit((2, 4, 8), (5.0, 9.0, 17.0))
    np.testing.assert_allclose(line[:3], (2.0, 1.0, 1.0), atol=1e-12)
    np.testing.assert_allclose(compute_and_memory.fit((1, 2, 4), (3, 12, 48)).exponent, 2.0)
    assert compute_and_memory.fit((2, 4), (3.0, 3.0)).r_squared == 1.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"values": (4,)}, "two different"),
        ({"values": (4, 4)}, "two different"),
        ({"values": (1, 2)}, "num_steps=1"),
        ({"axis": "num_tasks", "values": (0, 2)}, "num_tasks=0"),
        ({"axis": "filters", "num_steps": 1}, "num_steps=1"),
        ({"ways": 1}, "ways=1"),
        ({"rounds": -1}, "rounds=-1"),
        ({"filters": 0}, "filters=0"),
    ],
)
def test_compute_and_memory_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        compute_and_memory.main(compute_and_memory.Config(**changes))
