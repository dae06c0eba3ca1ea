"""What earlier versions wrote: records of runs, files of settings and saved models."""

import json
from pathlib import Path

import pytest

from experiments import glyphs, leo, navigation, sinusoid
from experiments.shared import cli, common
from imaml_jax import protocols

RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "results"
# Of every protocol that settings were recorded of: those of all algorithms, in one flat record.
OLD_PROTOCOL = {
    "name": "common",
    "algorithm": "imaml",
    "source": "this library, chosen on validation characters",
    "split": "glyphs",
    "invert": True,
    "train_rotations": None,
    "test_rotations": None,
    "network": {},
    "statistics": "batch",
    "adapts_norm": True,
    "meta_batch": 8,
    "train_shots": 1,
    "train_queries": 5,
    "test_queries": 5,
    "test_tasks": 600,
    "inner": "adaptive_gd",
    "inner_rate": 0.05,
    "num_steps": 8,
    "eval_num_steps": 8,
    "outer": "adam",
    "outer_rate": 0.002,
    "outer_epsilon": 1e-08,
    "schedule": "cosine",
    "meta_steps": 1000,
    "activation": "relu",
    "outer_clip": None,
    "final_outer_rate": 0.0,
    "learn_rates": False,
    "per_step_norm": False,
    "multi_step_epochs": 0,
    "first_order_epochs": 0,
    "num_samples": 1,
    "ensemble": 1,
    "batch_size": None,
    "eval_batch_size": None,
    "reg_strength": 0.03,
    "eval_reg_strength": None,
    "learn_reg_strength": None,
    "curvature": "gauss_newton",
    "solve": "cg_steihaug",
    "cg_steps": 8,
    "cg_damping": None,
}
OLD_SINUSOID = {"inner": "sgd", "inner_rate": 0.01, "num_steps": 1, "eval_num_steps": 10}
OLD_SINUSOID |= {"outer_rate": 1e-3, "meta_steps": 70_000, "reg_strength": None, "kernel": None}
OLD_NAVIGATION = {"outer": "trpo", "outer_rate": 1e-2, "num_steps": 1, "inner": "sgd"}
OLD_NAVIGATION |= {"inner_rate": 0.5, "eval_num_steps": 3, "meta_steps": 100, "temperature": None}
OLD_LEO = {"outer_rate": 2.739071e-4, "l2_penalty": 3.623413e-10, "dropout": 0.307651}
OLD_LEO |= {
    "orthogonality_penalty": 0.188103,
    "kl_weight": 0.756143,
    "encoder_penalty": 5.756821e-6,
}


@pytest.mark.parametrize(
    ("config", "dataset", "settings", "top"),
    [
        (glyphs.Config.of(), "glyphs", OLD_PROTOCOL, {"meta_batch": None, "curvature": None}),
        (sinusoid.Config.of(algorithm="maml"), "sinusoid", OLD_SINUSOID, {"num_samples": None}),
        (navigation.Config.of(), "navigation", OLD_NAVIGATION, {"meta_batch": 20, "horizon": 100}),
        (leo.Config.of(), "mini_imagenet", OLD_LEO, {"test_queries": 15, "num_latents": 64}),
    ],
    ids=["glyphs", "sinusoid", "navigation", "leo"],
)
def test_the_record_of_a_run_is_read(config, dataset, settings, top):
    """It is equal to that of the same run now, and differs where the run does."""
    now = json.loads(json.dumps(common.recorded(config, dataset), default=str))
    fields = {name: value for name, value in now.items() if name != "settings"}
    old = {**fields, **top, "meta_steps": None, "inner_rate": None, "root_key": [0, 1]}
    for changes, more, is_equal in (
        ({}, {}, True),
        ({"outer_rate": 0.5, "inner_rate": 0.7}, {}, False),
        ({}, {name: 7 for name, value in top.items() if value}, not any(top.values())),
    ):
        found = common.migrated(config, {**old, **more, "settings": settings | changes})
        found = json.loads(json.dumps(found, default=str))
        assert found.pop("root_key") == [0, 1]
        assert (found == now) == is_equal
        assert common.migrated(config, now) == now


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (glyphs.Config.of(shots=5), "algorithm: imaml\nprotocol: null\nshots: 5\ncurvature: null"),
        (sinusoid.Config.of(algorithm="maml"), "algorithm: maml\nkernel: null\nreg_strength: null"),
        (navigation.Config.of(estimator="lvc"), "outer: null\nestimator: lvc\nhorizon: 100"),
        (leo.Config.of(shots=5), "shots: 5\nnum_latents: 64\ndropout: null\nkl_weight: null"),
        (glyphs.Config.of(algorithm="mamlpp"), "algorithm: mamlpp\ninner: sgd\nsolve: null"),
    ],
    ids=["glyphs", "sinusoid", "navigation", "leo", "mamlpp"],
)
def test_a_file_of_settings_is_read(tmp_path, config, text):
    """It had null for what was not given, whatever the setting."""
    path, got = tmp_path / "config.yaml", []
    nulls = "outer_rate: null\nnum_steps: null\neval_num_steps: null\nmeta_steps: null\n"
    path.write_text(
        nulls + "inner_rate: null\ntemperature: null\nmax_seconds: null\ntest_tasks: null\n" + text
    )
    cli.run_cli(got.append, type(config), "", ["--config", str(path)])
    assert got == [config]


def test_settings_of_committed_results_are_read():
    count = 0
    for path in RESULTS.rglob("*.json"):
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows if isinstance(rows, list) else []:
            settings = row.get("settings") if isinstance(row, dict) else None
            if isinstance(settings, dict) and "split" in settings:
                protocol = protocols.from_settings(settings)
                for name, value in protocol.recorded().items():
                    assert settings.get(name, value) == value, (path, name)
                count += 1
    assert count > 30
