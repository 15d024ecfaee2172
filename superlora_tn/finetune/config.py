"""What ``superlora-tn finetune`` is asked for: a YAML file and flags, checked whole before anything is loaded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from superlora_tn.commands import UsageError, read_spec
from superlora_tn.declare.checks import near
from superlora_tn.declare.fold import Shape
from superlora_tn.declare.parts import SpecError
from superlora_tn.files.writes import FORMATS
from superlora_tn.finetune.declared import NOTATION, network, value
from superlora_tn.finetune.named import ConfigError, check_there, digest
from superlora_tn.network.budget import Budget, fit
from superlora_tn.network.catalogue import VARIANTS, size_setting
from superlora_tn.network.joined import JOIN_NAMES, joined
from superlora_tn.network.kernels import Kernels
from superlora_tn.network.spec import AdapterSpec

TASKS = ("image-classification", "text-classification", "causal-lm", "diffusion")
SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("float32", "bfloat16", "float16")
READ = ("data", "eval_data", "spec", "model")  # keys that name what is read anew when a run goes on
RANK = 8
MOST_SHOWN = 8  # choices of a key that its words list


def facts(words: str, choices: Sequence[str] = (), least: float | None = None, most: float = math.inf) -> dict[str, Any]:
    """What a key is for, and which values are allowed."""
    return {"words": words, "choices": tuple(choices), "least": least, "most": most}


def key(
    words: str, default: Any = MISSING, choices: Sequence[str] = (), least: float | None = None, most: float = math.inf
) -> Any:
    """A key of the configuration, with its default where it has one."""
    return field(default=default, metadata=facts(words, choices, least, most))


@dataclass(frozen=True)
class Config:
    """One run. Each key is a line of the YAML file, or a flag: ``--rate 1e-3``."""

    model: str = key("a folder as save_pretrained writes it, or a hub name")
    task: str = key("what is learnt", choices=TASKS)
    data: str = key(
        "a folder of images by class or with captions, a .jsonl, .csv or .txt file, a folder of datasets, or a hub name"
    )
    output: str = key("folder for checkpoints, report and adapter", "out/finetune")
    eval_data: str = key("the same, for evaluation; without it eval_share is held apart", "")
    eval_share: float = key("share of the data that is held apart", 0.1, least=0)
    text: str = key("the column of the text or caption", "text")
    label: str = key("the column of the label", "label")
    image: str = key("the column of the image, in a datasets folder", "image")
    length: int = key("tokens of a row, at most", 128, least=2)
    size: int = key("of diffusion's images, a side in pixels; 0 is the model's own", 0, least=0)
    samples: int = key("images that a diffusion model draws at the end", 4, least=0)
    sample_steps: int = key("steps of drawing one", 25, least=1)
    guidance: float = key("of drawn images by caption or class, where the model was trained for it; 1 is none", 4.0, least=1)
    variant: str = key("a variant's name", "lora", choices=tuple(VARIANTS))
    settings: dict[str, Any] = field(default_factory=dict, metadata=facts("the variant's settings"))
    network: dict[str, Any] = field(default_factory=dict, metadata=facts(f"in place of a variant: {', '.join(NOTATION)}"))
    spec: str = key("a JSON file of AdapterSpec.to_dict(), in place of a variant", "")
    join: str = key("how dW joins the weight (dora scales its rows, left and right multiply)", "add", choices=tuple(JOIN_NAMES))
    budget: int = key("the most trainable parameters, in place of a rank; 0 is none", 0, least=0)
    targets: list[str] = field(default_factory=lambda: ["all-linear"], metadata=facts("layers or their endings"))
    exclude: list[str] = field(default_factory=list, metadata=facts("layers to leave out"))
    also: list[str] = field(default_factory=list, metadata=facts("what trains beside the adapter, as a new head does"))
    steps: int = key("optimizer steps; 0 counts by epochs", 0, least=0)
    epochs: float = key("passes over the data, where steps is 0", 3.0, least=0)
    batch: int = key("rows a process and step", 8, least=1)
    accumulate: int = key("batches a step", 1, least=1)
    rate: float = key("learning rate", 1e-3, least=0)
    schedule: str = key("of the learning rate", "linear", choices=SCHEDULES)
    warmup: int = key("steps of warm-up", 0, least=0)
    decay: float = key("weight decay", 0.0, least=0)
    clip: float = key("largest norm of the gradient", 1.0, least=0)
    every: int = key("steps between evaluations, and between checkpoints", 50, least=1)
    log: int = key("steps between lines of progress", 10, least=1)
    keep: int = key("how many checkpoints stay", 2, least=2)
    patience: int = key("stop after so many evaluations that are not better; 0 never", 0, least=0)
    seed: int = key("of everything that is drawn", 0, least=0, most=2**32 - 1)
    precision: str = key("of the computation", "float32", choices=PRECISIONS)
    cpu: bool = key("compute on the processor, whatever is there", False)
    format: str = key("of the adapter (merged writes the model W + dW)", "superlora", choices=(*FORMATS, "merged"))

    def identity(self) -> dict[str, Any]:
        """What a run that goes on has to share: all but the names of places and the format of the result."""
        left_out = ("output", "format", "keep", "log", *(["join"] if self.join == "add" else []))  # earlier runs had no join
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def contents(self) -> dict[str, str]:
        """A digest of each file and folder that the run learns from, starts at or is declared by, by its key.

        None of a folder that is the output as well: what the run writes lies among what it reads.
        """
        out, places = Path(self.output).resolve(), {name: Path(getattr(self, name)) for name in READ if getattr(self, name)}
        apart = {name: place for name, place in places.items() if place.exists() and place.resolve() != out}
        return {name: digest(place, out, sampled=name == "model") for name, place in apart.items()}

    def declared(self, shapes: Mapping[str, Shape], kernels: Kernels | None = None) -> AdapterSpec:
        """The declaration, for a model's targets: name -> (out, in), and name -> the sizes of its kernel.

        Raises:
            SpecError: it does not fit them, or nothing fits the budget.
        """
        if self.spec:
            return joined(read_spec(self.spec), self.join)
        if self.network:
            return joined(network(self.network), self.join)
        if self.budget and self.variant != "superlora":
            bought = size_setting(self.variant)
            return fit(lambda size: self._variant({f"{bought}": size}, shapes), self.budget, shapes, kernels).spec
        return self._variant({"budget": self.budget} if self.budget else {}, shapes)

    def _variant(self, more: Mapping[str, Any], shapes: Mapping[str, Shape]) -> AdapterSpec:
        known = inspect.signature(VARIANTS[self.variant]).parameters
        usual = {"rank": RANK} if "rank" in known and "budget" not in {*more, *self.settings} else {}
        given = {**usual, **self.settings, **more}
        made = VARIANTS[self.variant](**{name: value(one) for name, one in given.items()})
        return joined(made.choose(shapes).spec if isinstance(made, Budget) else made, self.join)


def keys() -> list[tuple[str, str, str]]:
    """Each key, its default as YAML says it, and what it is for."""
    found = []
    for own in fields(Config):
        usual = own.default if own.default_factory is MISSING else own.default_factory()
        words, choices = own.metadata["words"], own.metadata["choices"]
        if 0 < len(choices) <= MOST_SHOWN:
            words = f"{words}: {', '.join(choices)}"
        default = "" if usual is MISSING or usual == "" else str(usual).lower() if isinstance(usual, bool) else f"{usual}"
        found.append((own.name, default.replace("'", ""), words))
    return found


def read_config(path: str | None, flags: Mapping[str, str]) -> Config:
    """A configuration from a YAML file and flags, which go before it.

    Args:
        path: the file; None takes the flags alone.
        flags: key -> its value as YAML.

    Raises:
        ConfigError: a key or value that cannot be meant; the message has the file's line, and near names.
        OSError: the file cannot be read.
    """
    import yaml  # type: ignore[import-untyped]

    found = {} if path is None else dict(_lines(path))
    for flag, text in flags.items():
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        name, dot, inner = flag.partition(".")
        before = found[name][1] if name in found else {}
        if dot and not isinstance(before, dict):
            raise ConfigError(f"--{flag}: {name} is no mapping.")
        found[name] = (f"--{flag}", {**before, inner: value} if dot else value)
    own = {f.name: f for f in fields(Config)}
    for name, (where, _) in found.items():
        if name not in own:
            raise ConfigError(f"{where}: there is no key '{name}'; {near(name, own)}")
    for name, one in own.items():
        if name not in found and one.default is MISSING and one.default_factory is MISSING:
            raise ConfigError(f"{path or 'the flags'}: '{name}' is missing: {one.metadata['words']}.")
    config = Config(**{name: _checked(where, own[name], value) for name, (where, value) in found.items()})
    beside = Path(path).parent if path else Path()
    _check(config, lambda name: found[name][0] if name in found else path or "the flags", "variant" in found, beside)
    return config


def _lines(path: str) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Key -> its place in the file, and its value."""
    import yaml

    seen = set[str]()
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise ConfigError(f"{path}: this is no YAML in UTF-8: {error.reason}; save the file in that encoding.") from error
    try:
        top = loader.get_single_node()
        if not isinstance(top, yaml.MappingNode):
            raise ConfigError(f"{path}: a configuration is lines of 'key: value', such as 'task: causal-lm'.")
        for name, value in top.value:
            where = f"{path}:{name.start_mark.line + 1}"
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError(f"{where}: a key is a word, such as 'task'; here it is a list or a mapping.")
            if name.value in seen:
                raise ConfigError(f"{where}: '{name.value}' is given twice; give it once.")
            seen.add(name.value)
            yield name.value, (where, loader.construct_object(value, deep=True))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: this is no YAML: {error.problem}.") from error
    finally:
        loader.dispose()


def _checked(where: str, own: Field[Any], value: Any) -> Any:
    """A value of its key's type, or a refusal."""
    kind, allowed = str(own.type).partition("[")[0], own.metadata
    if kind == "float" and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError):
            value = float(value)  # YAML takes 1e-3 for a word
    if kind == "list" and isinstance(value, str):
        value = [value]
    if kind == "str" and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    types = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
    wanted = {"str": "a word", "int": "a whole number", "float": "a number", "bool": "true or false"} | {
        "list": "a list of words",
        "dict": "lines of 'name: value'",
    }
    fits = isinstance(value, types[kind]) and (kind == "bool" or not isinstance(value, bool))
    if not fits or (kind == "list" and not all(isinstance(entry, str) for entry in value)):
        raise ConfigError(f"{where}: {own.name} is {value!r}, and has to be {wanted[kind]}.")
    if allowed["choices"] and value not in allowed["choices"]:
        raise ConfigError(f"{where}: {own.name} is '{value}'; {near(value, allowed['choices'])}")
    if allowed["least"] is not None and not value >= allowed["least"]:
        raise ConfigError(f"{where}: {own.name} is {value}, and has to be at least {allowed['least']}.")
    if kind in ("int", "float") and (value > allowed["most"] or value == math.inf):
        wanted_most = "finite" if math.isinf(allowed["most"]) else f"at most {allowed['most']:,}"
        raise ConfigError(f"{where}: {own.name} is {value}, and has to be {wanted_most}.")
    return value


def _check(config: Config, where: Callable[[str], str], chosen: bool, beside: Path) -> None:
    """What keys mean together, and the files that they name.

    Args:
        where: a key's place.
        chosen: whether a variant is named, and not the usual one taken.
        beside: the folder of the configuration.
    """
    ways = ["variant"] * chosen + [name for name in ("network", "spec", "settings", "budget") if getattr(config, name)]
    for name in ("network", "spec"):
        others = [other for other in ways if other != name]
        if name in ways and others:
            raise ConfigError(f"{where(name)}: {name} is in place of a variant; leave out {' and '.join(others)}.")
    bought = size_setting(config.variant)
    if config.budget and {bought, "budget"} & set(config.settings):
        raise ConfigError(f"{where('budget')}: budget is in place of a {bought}; leave one of them out.")
    known = list(inspect.signature(VARIANTS[config.variant]).parameters)
    for name in config.settings:
        if name not in known:
            raise ConfigError(f"{where('settings')}: {config.variant} has no setting '{name}'; {near(name, known)}")
    if config.budget and bought is None:
        raise ConfigError(
            f"{where('budget')}: {config.variant} has no rank or count that a budget could buy; choose another variant."
        )
    for name in config.network:
        if name not in NOTATION:
            raise ConfigError(f"{where('network')}: a network has no '{name}'; {near(name, NOTATION)}")
    if config.network and not {"result", "nodes"} <= set(config.network):
        raise ConfigError(f"{where('network')}: a network needs result, such as 'out in', and nodes, such as {{w1: out r}}.")
    if config.patience and not (config.eval_data or config.eval_share):
        raise ConfigError(f"{where('patience')}: stopping early needs evaluations; give eval_data, or an eval_share.")
    if not config.eval_share < 1:
        raise ConfigError(f"{where('eval_share')}: eval_share is {config.eval_share:g}, and has to be below 1.")
    if not (config.steps or config.epochs):
        raise ConfigError(f"{where('epochs')}: steps and epochs are both 0, so nothing would be learnt; give one.")
    for name in ("model", "data", "eval_data", "spec"):
        check_there(name, getattr(config, name), where(name), beside)
    files = ["config.json", *(["model_index.json"] if config.task == "diffusion" else [])]
    if Path(config.model).is_dir() and not any(Path(config.model, name).is_file() for name in files):
        raise ConfigError(
            f"{where('model')}: {config.model} holds no {' or '.join(files)}; give a folder that save_pretrained wrote."
        )
    _check_declared(config, where)


def _check_declared(config: Config, where: Callable[[str], str]) -> None:
    """Raise for what no weights are needed to refuse."""
    if config.budget or config.settings.get("budget"):
        if config.variant == "superlora" and config.join != "add":
            raise ConfigError(
                f"{where('join')}: what a budget of superlora buys is counted as added; give its settings instead."
            )
        return
    try:
        config.declared({"a": (64, 64), "b": (64, 64)} if config.variant == "superlora" else {})
    except (UsageError, SpecError, TypeError, ValueError, KeyError) as error:
        if config.network or config.spec or config.variant != "superlora":
            named = next((name for name in ("network", "spec", "settings") if getattr(config, name)), "variant")
            at = where("join" if str(error).startswith("join ") else named)
            raise ConfigError(f"{at}: {error}") from error
