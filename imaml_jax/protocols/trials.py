"""The settings that were tried for the `common` protocol, as many for each algorithm."""

from typing import Any

_MAML = (
    {"inner_rate": 0.1},
    {"inner_rate": 0.1, "outer_rate": 1e-3},
    {"inner_rate": 0.4},
    {"inner_rate": 0.03},
)
# Reptile trains alike with and without transduction, so that one set of trials serves both. They
# have the published 5 tasks a meta-step; `common` has 8, which two devices can share.
_REPTILE = (
    {"meta_batch": 5, "inner_rate": 1e-3},
    {"meta_batch": 5, "inner_rate": 3e-3},
    {"meta_batch": 5, "inner_rate": 1e-3, "num_steps": 10},
    {"meta_batch": 5, "inner_rate": 3e-3, "num_steps": 10},
)
_FEWER = {"num_steps": 2, "eval_num_steps": 2, "cg_steps": 5}
TRIALS: dict[str, tuple[dict[str, Any], ...]] = {
    "imaml": (
        {"reg_strength": 0.1},
        {"reg_strength": 0.1, "outer_rate": 1e-3},
        {"reg_strength": 0.03},
        {"reg_strength": 0.1, "curvature": "hessian"},
    ),
    "implicit_anil": (
        {"reg_strength": 0.03},
        {"reg_strength": 0.003},
        {"reg_strength": 0.3},
        {"reg_strength": 0.03, "outer_rate": 1e-3},
    ),
    "anil": (*_MAML[:2], {"inner_rate": 0.4}, {"inner_rate": 1.0}),
    "mamlpp": _MAML,
    "platipus": _MAML,
    "bmaml": ({"inner_rate": 0.03}, {"inner_rate": 0.1}, {"inner_rate": 0.3}, {"inner_rate": 0.01}),
    "imaml_hf": (
        {"reg_strength": 0.1, "num_steps": 3, "eval_num_steps": 3, "cg_steps": 8},
        {"reg_strength": 0.1, **_FEWER},
        {"reg_strength": 0.1, **_FEWER, "num_steps": 1, "eval_num_steps": 1},
        {"reg_strength": 0.5, **_FEWER},
    ),
    "maml": _MAML,
    "fomaml": _MAML,
    "reptile": _REPTILE,
    "reptile_transductive": _REPTILE,
}
