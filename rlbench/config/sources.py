"""Where each value of a config comes from: the schema, a file of conf/, the command line, or a derivation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.config_source import ConfigSource
from hydra.types import RunMode
from omegaconf import MISSING, OmegaConf

from rlbench.config.compose import config_folder, group_choices, leaves, register_schema
from rlbench.config.derive import Derivation
from rlbench.config.schema import ChainStageConfig, RewardConfig, RunConfig

_ROOT, _SCHEMA = "config", "schema"  # names in conf/config.yaml's composition
UNDECLARED = object()  # default of what must be given, and of a key that the schema does not list


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One source of a composition; later layers win."""

    name: str  # "conf/data/gsm8k.yaml", or "command line: optim.lr=1e-3"
    keys: frozenset[str] = frozenset()  # dotted, of the values that it sets or removes
    reset: str = ""  # section that it puts back to the schema's defaults first
    chosen_by: str = ""  # of a group's file: what chose it, if not conf/config.yaml

    def sets(self, key: str) -> bool:
        """True for what lies inside a value too: `chain.2.overrides` sets `chain`."""
        return key in self.keys or any(mine.startswith(f"{key}.") for mine in self.keys)

    def resets(self, key: str) -> bool:
        return bool(self.reset) and (key == self.reset or key.startswith(f"{self.reset}."))


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One value of a run.

    Example:
        Setting(key="optim.lr", value=3e-4, default=None, layers=("conf/exp/grpo_gsm8k.yaml",))
    """

    key: str
    value: Any
    default: Any  # of the schema, or UNDECLARED
    layers: tuple[str, ...] = ()  # names of the layers that set it, the winner last; none: the schema
    reason: str = ""  # why it was derived; "" if it was not

    @property
    def is_changed(self) -> bool:
        return self.value != self.default


def compose_with_layers(overrides: Sequence[str]) -> tuple[Any, list[Layer]]:
    """Compose as a run does, and list what it was composed of.

    Args:
        overrides: of the command line.

    Returns:
        The composed config, and its layers in the order of Hydra's defaults list; the schema itself is none.

    Raises:
        HydraException, OmegaConfBaseException: as composing does.
    """
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        composed = compose(_ROOT, overrides=list(overrides))
        found = loader.compute_defaults_list(_ROOT, list(overrides), RunMode.RUN)
        chosen_by = {group: _chooser(meta) for group, meta in found.overrides.override_metadata.items()}
        layers = [
            _file_layer(loader.get_sources(), item.config_path, item.package, chosen_by)
            for item in found.defaults
            if item.config_path != _SCHEMA and not item.config_path.startswith("hydra/")
        ]
    return composed, layers + [_override_layer(override) for override in found.config_overrides]


def _chooser(metadata: Any) -> str:
    return "the command line" if metadata.external_override else f"conf/{metadata.containing_config_path}.yaml"


def _file_layer(sources: Sequence[ConfigSource], path: str, package: str | None, chosen_by: Mapping[str, str]) -> Layer:
    source = next(source for source in sources if source.is_config(path))  # as Hydra looks for it
    folder = "conf" if source.path == str(config_folder()) else source.path
    values: Any = OmegaConf.to_container(source.load_config(path).config)
    values = {name: value for name, value in values.items() if name not in ("defaults", "hydra")}
    prefix = "" if package in (None, "_global_") else package
    keys = frozenset(key for key, _ in leaves(values, prefix or "") if key != prefix)
    return Layer(name=f"{folder}/{path}.yaml", keys=keys, chosen_by=chosen_by.get(path.rpartition("/")[0], ""))


def _override_layer(override: Any) -> Layer:
    key, value = override.key_or_group, None if override.is_delete() else override.value()
    return Layer(name=f"command line: {override.input_line}", keys=frozenset(key for key, _ in leaves(value, key)))


def stage_layers(stage: ChainStageConfig, index: int, left_out: Sequence[str]) -> list[Layer]:
    """What a stage of a chain puts on top of the shared layers, as `rlbench.config.chain` applies it.

    Args:
        index: of the stage in `chain`.
        left_out: sections that it starts with their defaults.
    """
    resets = [Layer(name="the chain", reset=section) for section in (*left_out, "chain", "resume")]
    if index > 0:
        resets.append(Layer(name="the chain", reset="lora.init_from"))
    return resets + [_stage_override_layer(override, index) for override in stage.overrides]


def _stage_override_layer(override: str, index: int) -> Layer:
    name = f"chain.{index}.overrides: {override}"
    key, _, value = override.lstrip("~+").partition("=")
    if "." in key or value not in group_choices(key):
        return Layer(name=name, keys=frozenset([key]))
    file = config_folder() / key / f"{value}.yaml"
    keys = frozenset(leaf for leaf, _ in leaves(OmegaConf.to_container(OmegaConf.load(file)), key))
    return Layer(name=f"conf/{key}/{value}.yaml, by {name}", keys=keys, reset=key)


def settings(config: RunConfig, layers: Sequence[Layer], derived: Sequence[Derivation] = ()) -> list[Setting]:
    """Every value of a run with its origin, in the order of the schema.

    Args:
        config: derived values filled in; of a chain's stage, that stage's.
        layers: what it was composed of.
        derived: what was filled in.
    """
    defaults = dict(leaves(asdict(RunConfig())))
    reasons = {d.key: d.reason for d in derived}
    return [
        Setting(
            key=key,
            value=value,
            default=_default(key, defaults),
            layers=_layers_of(key, layers),
            reason=reasons.get(key, ""),
        )
        for key, value in leaves(asdict(config))
    ]


def _default(key: str, defaults: Mapping[str, Any]) -> Any:
    parts = key.split(".")
    if parts[:2] == ["rewards", "components"] and len(parts) == 4:
        own = {field.name: field for field in fields(RewardConfig)}[parts[3]]
        default = {} if own.name == "kwargs" else own.default
        return UNDECLARED if default == MISSING else default
    return defaults.get(key, UNDECLARED)


def _layers_of(key: str, layers: Sequence[Layer]) -> tuple[str, ...]:
    names: list[str] = []
    for layer in layers:
        if layer.resets(key):
            names.clear()
        if layer.sets(key):
            names.append(layer.name)
    return tuple(names)
