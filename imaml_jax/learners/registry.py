"""The only list of the algorithms that commands, protocols and saved models know by name.

Apart from it stand `leo`, which learns from features, `imaml_dev`, which is a protocol of `imaml`,
and the baseline `nearest_centroid`; policies have a list of their own in `policies/settings.py`.
"""

from imaml_jax.learners.algorithm import LearnerSettings
from imaml_jax.learners.bmaml import BmamlSettings
from imaml_jax.learners.imaml import ImamlSettings
from imaml_jax.learners.imaml_variants import HessianFreeSettings, ImplicitAnilSettings
from imaml_jax.learners.implicit_bmaml import ImplicitBmamlSettings
from imaml_jax.learners.implicit_platipus import ImplicitPlatipusSettings
from imaml_jax.learners.maml import AnilSettings, FomamlSettings, MamlSettings
from imaml_jax.learners.mamlpp import MamlppSettings
from imaml_jax.learners.platipus import PlatipusSettings
from imaml_jax.learners.reptile import ReptileSettings, TransductiveReptileSettings
from imaml_jax.learners.settings import check_choice

ALGORITHMS: dict[str, type[LearnerSettings]] = {}
"""The settings of each algorithm by its name, in the order of tables."""


def register(settings: type[LearnerSettings]) -> type[LearnerSettings]:
    """Makes an algorithm known by its name to protocols, command lines, reports and saved models.

    Args:
      settings: its settings, which have a default for every field; `algorithm` is the name.

    Returns:
      `settings`, so that this serves as a decorator.

    Raises:
      ValueError: a name that another algorithm has.
    """
    earlier = ALGORITHMS.get(settings.algorithm, settings)
    same_source = ("__module__", "__qualname__")  # a cell of a notebook that ran again
    if any(getattr(earlier, name) != getattr(settings, name) for name in same_source):
        raise ValueError(f"algorithm={settings.algorithm!r} is registered already; choose another")
    ALGORITHMS[settings.algorithm] = settings
    return settings


def settings_class(algorithm: str) -> type[LearnerSettings]:
    """The settings of an algorithm.

    Raises:
      ValueError: an unknown name.
    """
    check_choice("algorithm", algorithm, ALGORITHMS)
    return ALGORITHMS[algorithm]


for _settings in (
    MamlSettings,
    FomamlSettings,
    ReptileSettings,
    TransductiveReptileSettings,
    ImamlSettings,
    HessianFreeSettings,
    MamlppSettings,
    AnilSettings,
    ImplicitAnilSettings,
    PlatipusSettings,
    ImplicitPlatipusSettings,
    BmamlSettings,
    ImplicitBmamlSettings,
):
    register(_settings)
