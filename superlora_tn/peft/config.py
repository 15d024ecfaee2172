"""The configuration of an adapter for PEFT: the declaration as plain data, and which modules it adapts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType

from superlora_tn.declare.checks import checked_seed
from superlora_tn.declare.parts import SpecError
from superlora_tn.files.record import saved_spec
from superlora_tn.network.budget import Budget
from superlora_tn.network.catalogue import VARIANTS
from superlora_tn.network.spec import AdapterSpec

NAME = "superlora"
SCHEMA = 1


def _extend() -> Any:
    """PEFT's enum of methods has no public way to get a member; this adds ours to it."""
    name = NAME.upper()
    if name in PeftType.__members__:
        raise ImportError(
            f"PEFT has a method named {name} already (another plug-in, or a newer PEFT); superlora_tn.peft cannot register "
            "beside it. Import only one of them."
        )
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    return member


SUPERLORA: Any = _extend()


@dataclass
class SuperLoraConfig(PeftConfig):  # type: ignore[misc]
    """A declared adapter for PEFT: ``get_peft_model(model, SuperLoraConfig(spec=sl.lokr(8), target_modules=[...]))``.

    Args:
        spec: the declaration: an `AdapterSpec`, its `to_dict()`, or the name of a variant such as ``"lora"``. It is kept as
            the dict, so that what is saved does not depend on a variant's later defaults.
        settings: of the variant, where `spec` is a name: ``{"rank": 8, "alpha": 16}``.
        target_modules: which modules, by PEFT's rules: a regular expression for the whole name, ``"all-linear"``, or a list
            of names and endings; None takes PEFT's choice for the model's architecture.
        exclude_modules: the same, to leave out.
        layers_to_transform: keep modules of these layers only.
        layers_pattern: the name of the list of layers, where the first number of a module's name is not the layer's.
        modules_to_save: modules of the base that train and are saved whole.
        init_weights: True starts with dW = 0; False gives nodes that would start at zero random values, for tests.
        seed: of the first values; None draws from torch's generator.
        schema: the version of this layout; another one is refused.

    Raises:
        SpecError: `spec` or `settings` declare no adapter.
        ValueError: a field that is not known, or of a newer schema.
    """

    spec: dict[str, Any] | str | AdapterSpec | None = field(default=None, metadata={"help": "The declaration of the adapter."})
    settings: dict[str, Any] | None = field(default=None, metadata={"help": "Settings of the variant that spec names."})
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of the layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules of the base that train too."})
    init_weights: bool = field(default=True, metadata={"help": "Whether dW is zero at the start."})
    seed: int | None = field(default=None, metadata={"help": "Seed of the first values."})
    schema: int = field(default=SCHEMA, metadata={"help": "Version of this layout."})

    def __new__(cls, *_: Any, **given: Any) -> SuperLoraConfig:
        """PEFT drops fields it does not know with a warning, and would build other shapes than were saved."""
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                close = get_close_matches(name, known, n=3, cutoff=0.4) or known
                raise ValueError(
                    f"SuperLoraConfig was given '{name}', which it does not know; near names are {', '.join(close)}. If a "
                    "newer release saved it, update superlora_tn."
                )
        return super().__new__(cls)  # type: ignore[no-any-return]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SUPERLORA
        if self.schema != SCHEMA:
            raise ValueError(
                f"this SuperLoraConfig has schema {self.schema!r}, and this release reads {SCHEMA}; update superlora_tn."
            )
        self.spec = _declared(self.spec, self.settings).to_dict()
        self.settings = None
        self.seed = None if self.seed is None else checked_seed("SuperLoraConfig", self.seed)
        self.target_modules, self.exclude_modules = _unordered(self.target_modules), _unordered(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None and self._is_pattern:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} has no effect where target_modules="
                f"{self.target_modules!r} is a regular expression; write the layers into it, or give a list."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern was given without layers_to_transform; give both or neither.")

    @property
    def _is_pattern(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"

    @property
    def adapter_spec(self) -> AdapterSpec:
        """The declaration."""
        return _declared(self.spec, None)


def _unordered(names: Any) -> Any:
    """Lists of names as PEFT keeps them, so that a config that was saved equals the one that is read."""
    return set(names) if isinstance(names, list | tuple) else names


def _declared(spec: Any, settings: Mapping[str, Any] | None) -> AdapterSpec:
    """The declaration that a config's fields mean."""
    if isinstance(spec, str):
        if spec not in VARIANTS:
            raise SpecError(
                f"SuperLoraConfig was given spec={spec!r}; give an AdapterSpec, its to_dict(), or one of "
                f"{', '.join(sorted(VARIANTS))}."
            )
        wanted = inspect.signature(VARIANTS[spec])
        try:
            wanted.bind(**(settings or {}))
        except TypeError as error:
            raise SpecError(f"SuperLoraConfig was given settings={settings!r} for {spec}{wanted}: {error}.") from error
        made = VARIANTS[spec](**(settings or {}))
        if isinstance(made, Budget):
            raise SpecError(
                f"SuperLoraConfig was given settings={settings!r}, a budget, which needs the weights' shapes; give the spec "
                "that it buys: superlora_tn.superlora(...).choose(shapes).spec."
            )
        return made
    if settings:
        raise SpecError(f"SuperLoraConfig was given settings={settings!r}, which go with the name of a variant alone.")
    if isinstance(spec, AdapterSpec):
        return spec
    if isinstance(spec, Mapping):
        return saved_spec(spec)
    raise SpecError(
        f"SuperLoraConfig was given spec={spec!r}; give an AdapterSpec, its to_dict(), or the name of a variant such as 'lora' "
        "with settings={'rank': 8}."
    )
