"""The feature store for Python callers: the same feature_store.yaml, filled from a URL instead of the environment."""

from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from feature_repo.environment import feast_environment

if TYPE_CHECKING:
    from feast import FeatureStore

CONFIGURATION = Path(__file__).parent / "feature_store.yaml"


def feature_store(url: str) -> "FeatureStore":
    """Feast's store over the migrated database at `url`; the process's environment stays as it is."""
    import yaml  # type: ignore[import-untyped]
    from feast import FeatureStore, RepoConfig

    filled = Template(CONFIGURATION.read_text()).substitute(feast_environment(url))
    return FeatureStore(config=RepoConfig(**yaml.safe_load(filled)))


def apply(store: "FeatureStore") -> list[str]:
    """Writes the definitions to the registry, as `feast apply` does; answers their names. Running it twice is fine."""
    from feast import Entity, FeatureService, FeatureView

    from feature_repo import definitions

    objects = [
        value for value in vars(definitions).values() if isinstance(value, Entity | FeatureService | FeatureView)
    ]
    store.apply(objects)
    return [each.name for each in objects]


def close(store: "FeatureStore") -> None:
    """Gives the store's database connections back: the registry's and the online store's."""
    store.registry.write_engine.dispose()
    store._get_provider().online_store.disconnect()
