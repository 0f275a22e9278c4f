"""The sweep file: composed by Hydra from `conf/` and the user's YAML, then checked whole before anything starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from orchestrator import durable
from orchestrator.errors import UserError
from orchestrator.experiment_config.experiment import ExperimentConfig, experiment
from orchestrator.schema import ConfigError, Count, WholeNumber, did_you_mean, join, parse, unknown_key
from orchestrator.search_space import CategoricalDomain, Domain, flatten, parse_domain
from orchestrator.settings import difference, leaves, merge, nest, plain_mapping
from orchestrator.study import Suggestion
from orchestrator.trial import RunSpec, Scalar, TrialSpec

CONF = Path(__file__).parent / "conf"
EXPERIMENT_KEYS = tuple(item.name for item in fields(ExperimentConfig))
VARIANT = "variant"  # the one parameter of a trial in a sweep of named variants
DEFAULT_TRIALS = 12
# What may change between two starts of one sweep; everything else defines it.
CHANGEABLE = ("trials", "workers", "tracking", "storage", "output", "checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    metric: str = "judge"
    direction: Literal["maximize", "minimize"] = "maximize"


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    sampler: Literal["tpe", "random", "qmc"] = "tpe"
    seed: WholeNumber = 0
    startup_trials: WholeNumber = 6
    start: tuple[dict[str, Any], ...] = ()
    space: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("space", "start"):
            if self.variants and getattr(self, key):
                raise ConfigError("variants", f"cannot be combined with search.{key}: each variant is one trial")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    kind: Literal["wandb", "none"] = "wandb"
    project: str = "psd-sweeps"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A checked sweep. ``experiment`` holds plain values with every default filled in; ``space`` its searched keys."""

    name: str
    objective: ObjectiveConfig = ObjectiveConfig()
    search: SearchConfig = SearchConfig()
    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    trials: Count | None = None
    workers: Count | None = None
    output: str
    storage: str | None = None
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(name, "must list at least one")
            if len(set(values)) < len(values):
                raise ConfigError(name, f"must list each once; got {list(values)}")
        if not all(self.prompts):
            raise ConfigError("prompts", "must not be empty text")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep and the experiment it varies, both checked, with where they came from."""

    config: SweepConfig
    experiment: Mapping[str, Any]  # plain YAML values, every default filled in
    space: Mapping[str, Domain]
    source: str

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def metric(self) -> str:
        """The objective's name in a run's metrics."""
        return experiment(self.experiment).metrics[self.config.objective.metric]

    @property
    def sampler(self) -> Literal["tpe", "random", "qmc", "grid"]:
        """What chooses the points; variants are taken in their order."""
        return "grid" if self.config.search.variants else self.config.search.sampler

    @property
    def is_asset(self) -> bool:
        """Whether it is one run and no search: what `psd run` makes."""
        return not self.space and self.num_trials == len(self.config.prompts) == len(self.config.seeds) == 1

    @property
    def num_trials(self) -> int:
        """How many there are to be, failed ones included."""
        return self.config.trials or len(self.config.search.variants) or DEFAULT_TRIALS

    def changes(self, params: Mapping[str, Scalar]) -> dict[str, Any]:
        """What a trial changes in the experiment, as a tree."""
        return nest(self.config.search.variants[str(params[VARIANT])] if self.config.search.variants else params)

    @property
    def storage_url(self) -> str:
        return self.config.storage or f"sqlite:///{self.output.resolve() / 'study.db'}"

    def to_plain(self) -> dict[str, Any]:
        """The resolved sweep as a sweep file would say it."""
        return plain_mapping({**asdict(self.config), **self.experiment})

    def definition(self) -> dict[str, Any]:
        """What makes two sweeps the same one."""
        return {key: value for key, value in self.to_plain().items() if key not in CHANGEABLE}

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.definition(), sort_keys=True).encode()).hexdigest()[:16]


def load(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of a YAML file, with overrides in Hydra's syntax.

    Raises:
        UserError: with the file (or the command line), the key, and what would be right.
    """
    if not path.is_file():
        near = did_you_mean(path.name, [item.name for item in path.parent.glob("*.yaml")])
        raise UserError(f"no such file{near}", file=str(path))
    if path.suffix != ".yaml":
        raise UserError("a sweep file's name must end in .yaml", file=str(path))
    plain = compose(path.parent, path.stem, overrides, str(path), title=path.stem)
    return _checked(plain, overrides, str(path))


def load_asset(prompt: str, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of one trial that `psd run` executes."""
    source = "psd run"
    slug = "-".join("".join(c if c.isalnum() else " " for c in prompt.lower()).split())[:60] or "asset"
    plain = compose(CONF, "asset", overrides, source, title=slug)
    if plain["prompts"] != "???":
        raise UserError("is what stands after `psd run`; leave the override out", file="command line", key="prompts")
    sweep = _checked({**plain, "prompts": [prompt]}, overrides, source)
    if not sweep.is_asset:
        raise UserError(
            "makes one object, with one seed and without a search", file=source, remedy="for more: psd sweep FILE"
        )
    return sweep


def load_output(output: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep that an output folder holds, with changes to what may change."""
    file = output / "sweep.json"
    if not file.is_file():
        raise UserError("holds no sweep (no sweep.json); give the folder that `psd sweep` wrote", file=str(output))
    plain = _read_record(file)
    changes = _parse_overrides(overrides)
    for key, value in changes.items():
        root = key.split(".")[0]
        if root not in CHANGEABLE or root == "output":
            allowed = ", ".join(name for name in CHANGEABLE if name != "output")
            raise UserError(f"cannot change on resume; only {allowed} can", file="command line", key=key)
        _assign(plain, key, value)
    return _checked({**plain, "output": str(output)}, overrides, str(file))


def compose(folder: Path, name: str, overrides: Sequence[str], source: str, *, title: str) -> dict[str, Any]:
    """Hydra's composition of one file with `conf/` behind it on the search path; plain values, unchecked.

    ``title`` is the sweep's name if nothing gives it one.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    _parse_overrides(overrides)  # so that a slip in one is told as such
    searchpath = f'hydra.searchpath=["file://{CONF.resolve()}"]'
    try:
        with initialize_config_dir(config_dir=str(folder.resolve()), version_base="1.3"):
            config = hydra_compose(name, overrides=[searchpath, *map(_forced, overrides)])
        if OmegaConf.is_missing(config, "name") or "name" not in config:
            OmegaConf.update(config, "name", title, force_add=True)
        plain = OmegaConf.to_container(config, resolve=True)
    except MissingConfigException as error:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        options = ", ".join(error.options or [])
        raise UserError(f"there is no {choice!r}; choose one of {options}", file=source, key=group) from None
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(_one_line(error), file=source) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def resolve(sweep: Sweep, params: Mapping[str, Scalar]) -> dict[str, Any]:
    """The experiment with a trial's parameters applied, checked again as a whole."""
    return _filled(merge(sweep.experiment, sweep.changes(params)))


def _filled(plain: Mapping[str, Any]) -> dict[str, Any]:
    return plain_mapping(asdict(experiment(plain)))


def plan_trial(sweep: Sweep, suggestion: Suggestion) -> TrialSpec:
    """A trial's runs: every prompt with every seed."""
    config = resolve(sweep, suggestion.params)
    runs = tuple(
        RunSpec(
            run_id=f"t{suggestion.number:04d}-p{i:02d}-s{seed}",
            trial=suggestion.number,
            prompt=prompt,
            seed=seed,
            config=config,
        )
        for i, prompt in enumerate(sweep.config.prompts)
        for seed in sweep.config.seeds
    )
    return TrialSpec(number=suggestion.number, params=suggestion.params, runs=runs)


def experiments(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """What will be run, by the key under which a fault of it stands in the sweep file; searched values aside."""
    variants = sweep.config.search.variants
    named = {join("search.variants", name): resolve(sweep, {VARIANT: name}) for name in variants}
    return named or {"": dict(sweep.experiment)}


def as_asset_settings(sweep: Sweep, params: Mapping[str, Scalar]) -> dict[str, Any]:
    """What `psd run` has to be told, by dotted key, to make one of a trial's runs."""
    return difference(load_asset(sweep.config.prompts[0]).experiment, resolve(sweep, params))


def own_settings(sweep: Sweep, params: Mapping[str, Scalar]) -> dict[str, Any]:
    """What a trial changes in the sweep's experiment, by dotted key."""
    return difference(sweep.experiment, resolve(sweep, params)) if sweep.config.search.variants else dict(params)


def claim_output(sweep: Sweep) -> bool:
    """Make the output folder this sweep's own, or find that it is already: then the sweep goes on where it stopped.

    Raises:
        UserError: the folder belongs to another sweep, or to something else.
    """
    file = sweep.output / "sweep.json"
    record = {"fingerprint": sweep.fingerprint(), "sweep": sweep.to_plain()}
    known = file.is_file()
    if known:
        check_output(sweep)
    sweep.output.mkdir(parents=True, exist_ok=True)
    durable.write_text(file, json.dumps(record, indent=2) + "\n")
    return known


def holds(sweep: Sweep) -> bool:
    """Whether the output folder is this sweep's already."""
    return (sweep.output / "sweep.json").is_file() and _difference(sweep) is None


def check_output(sweep: Sweep) -> None:
    """Raises:
    UserError: the output folder is another sweep's, or something else's.
    """
    output = sweep.output
    if output.exists() and not output.is_dir():
        raise UserError(f"must be a folder; {output} is a file", file=sweep.source, key="output")
    if not (output / "sweep.json").is_file():
        if output.is_dir() and any(path.name != ".lock" for path in output.iterdir()):
            raise UserError(f"{output} holds other files; choose another", file=sweep.source, key="output")
        return
    difference = _difference(sweep)
    if difference is not None:
        raise UserError(
            f"{output} holds another sweep ({difference})",
            file=sweep.source,
            key="output",
            remedy=f"choose another `name` or `output`, or continue that one: psd resume {output}",
        )


def _difference(sweep: Sweep) -> str | None:
    """In what this sweep and the one in its output folder differ first."""
    file = sweep.output / "sweep.json"
    other = _read_record(file)
    theirs = dict(leaves({key: value for key, value in other.items() if key not in CHANGEABLE}))
    ours = dict(leaves(sweep.definition()))
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            return f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} here"
    return None


def _read_record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())["sweep"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"is damaged ({error}); choose another output folder", file=str(file)) from None
    assert isinstance(record, dict)
    return record


def _checked(plain: dict[str, Any], overrides: Sequence[str], source: str) -> Sweep:
    try:
        return _check(plain, source)
    except ConfigError as error:
        if any(error.key == key or error.key.startswith(key + ".") for key in _parse_overrides(overrides)):
            source = "command line"
        raise UserError(error.message, file=source, key=error.key) from None


def _check(plain: dict[str, Any], source: str) -> Sweep:
    sweep_keys = [item.name for item in fields(SweepConfig)]
    for key in plain:
        if key not in sweep_keys and key not in EXPERIMENT_KEYS:
            raise unknown_key(key, key, [*sweep_keys, *EXPERIMENT_KEYS])
    config = parse(SweepConfig, {key: value for key, value in plain.items() if key in sweep_keys})
    parsed = parse(ExperimentConfig, {key: value for key, value in plain.items() if key in EXPERIMENT_KEYS})
    _check_metric(config.objective.metric, parsed)
    filled = plain_mapping(asdict(parsed))
    if config.search.variants:
        _check_variants(config, filled)
        space: dict[str, Domain] = {VARIANT: CategoricalDomain(choices=tuple(config.search.variants))}
    else:
        space = _check_space(config.search.space, filled)
        _check_start(config.search.start, space)
    return Sweep(config=config, experiment=filled, space=space, source=source)


def _check_metric(metric: str, parsed: ExperimentConfig) -> None:
    if metric not in parsed.metrics:
        allowed, guess = ", ".join(parsed.metrics), did_you_mean(metric, parsed.metrics)
        raise ConfigError("objective.metric", f"must be one of {allowed}; got {metric!r}{guess}")


def _check_variants(config: SweepConfig, filled: Mapping[str, Any]) -> None:
    """Each variant must be an experiment of its own, with the sweep's metric, and mean all that it says."""
    variants = config.search.variants
    if config.trials is not None and config.trials > len(variants):
        raise ConfigError("trials", f"must be <= {len(variants)}, the number of variants, or null; got {config.trials}")
    for name, settings in variants.items():
        try:
            if not name.strip() or not name.isprintable() or len(name) > 60:
                raise ConfigError("", "a variant's name must be 1 to 60 printable characters")
            changes = nest(settings)
            parsed = experiment(merge(filled, changes))
            _check_metric(config.objective.metric, parsed)
            known = dict(leaves(asdict(parsed)))
            for key, _ in leaves(changes):
                if not any(other == key or other.startswith(key + ".") for other in known):
                    raise ConfigError(key, "belongs to another kind than the variant has; drop it or change the kind")
        except ConfigError as error:
            raise ConfigError(join("search.variants", name), str(error)) from None


def _check_space(space: Mapping[str, Any], filled: dict[str, Any]) -> dict[str, Domain]:
    """The domains, each of whose ends must be a value that the experiment accepts at that key."""
    settings = dict(leaves(filled))
    domains: dict[str, Domain] = {}
    for name, node in flatten(space).items():
        key = join("search.space", name)
        if name not in settings:
            guess = did_you_mean(name, settings)
            raise ConfigError(key, f"is not a setting of the experiment{guess or '; see `psd sweep FILE --dry-run`'}")
        domains[name] = parse_domain(node, settings[name], key)
        for value in domains[name].ends():
            try:
                experiment(merge(filled, nest({name: value})))
            except ConfigError as error:
                raise ConfigError(key, f"{value!r} is not allowed there: {error}") from None
    return domains


def _check_start(points: Sequence[Mapping[str, Any]], space: Mapping[str, Domain]) -> None:
    for i, point in enumerate(points):
        for name, value in point.items():
            key = f"search.start[{i}].{name}"
            if name not in space:
                raise ConfigError(key, f"is not in search.space{did_you_mean(name, space)}")
            if value not in space[name]:
                raise ConfigError(key, f"must lie in its domain ({space[name]}); got {value!r}")


def _assign(node: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        node = node[name]
    node[last] = value


def _forced(override: str) -> str:
    """``key=value`` sets a key whether or not a file names it; that it exists is checked later, with better words."""
    head = override.split("=", 1)[0]
    is_group = (CONF / head.split("@")[0]).is_dir()
    return override if override[:1] in "+~" or is_group or "=" not in override or "@" in head else f"++{override}"


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides by key; on the command line they are Hydra's, so this is Hydra's own grammar."""
    if not overrides:
        return {}
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(_one_line(error), file="command line") from None
    return {item.key_or_group: None if item.is_delete() else item.value() for item in parsed}


def _one_line(error: Exception) -> str:
    """The first lines of a message that Hydra, OmegaConf or YAML spread over a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [
        line
        for line in lines
        if not line.startswith(("See https", "Config search path", "provider=", "full_key", "object_type"))
    ]
    return "; ".join(kept[:4])
