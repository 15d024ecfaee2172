"""PEFT's ``adapter_config.json``: what of it changes the numbers. Everything else has to be known as harmless, or be off."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from superlora_tn.files.bounds import shown
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.weight import Weight

METHODS = (
    "LORA",
    "LOHA",
    "LOKR",
    "VERA",
    "ADALORA",
    "GRALORA",
    "RANDLORA",
    "MISS",
    "C3A",
    "FOURIERFT",
    "DELORA",
    "VBLORA",
    "HIRA",
)
# What PEFT's other methods of weights do, where that is no sum of W and a network that a file tells.
OTHERS = {
    **dict.fromkeys(("OFT", "BOFT", "HRA", "ROAD", "PSOFT"), "turns the weight or its outputs, a product and no sum"),
    "IA3": "scales a layer's input or output, a product and no sum",
    **dict.fromkeys(("GLORA", "DEFT", "OSF", "FROD"), "changes the weight itself beside what it adds"),
    **dict.fromkeys(("LILY", "PVERA", "POLY", "XLORA", "PEANUT"), "adds what depends on the input by more than a product"),
    "LN_TUNING": "trains norms alone",
    "TRAINABLE_TOKENS": "replaces rows of an embedding",
}
ALPHAS = {"LOHA": "alpha", "LOKR": "alpha", "GRALORA": "alpha", "RANDLORA": "randlora_alpha", "FOURIERFT": "scaling"}
UNSCALED = ("VERA", "MISS", "C3A", "DELORA", "VBLORA", "HIRA")
# Training, bookkeeping, and which modules are meant (the tensors' names say that too).
HARMLESS = {
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "parent_library"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out"),
    *("lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "vera_dropout", "gralora_dropout"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
    *("bias", "init_weights"),
    *("qalora_group_size", "ensure_weight_tying", "lora_bias", "d_initial", "target_r", "tinit", "tfinal", "deltaT"),
    *("beta1", "beta2", "orth_reg_weight", "total_step", "decompose_both", "decompose_factor", "use_effective_conv2d"),
    *("save_projection", "gralora_k", "ephemeral_gpu_offload", "velora_config", "randlora_dropout", "miss_dropout", "mini_r"),
    *("sparse", "very_sparse", "block_size", "block_size_pattern", "n_frequency", "n_frequency_pattern", "hira_dropout"),
    *("delora_lambda", "lambda_pattern", "num_vectors", "vector_length", "vblora_dropout", "init_vector_bank_bound"),
    *("init_logits_std",),
}
TAKEN = {
    *("peft_type", "r", "init_r", "alpha", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("init_lora_weights", "projection_prng_key", "hybrid_r", "randlora_alpha", "scaling", "random_loc_seed", "topk"),
}
# Starts that change the base weight too, so that the file alone does not say what the adapted weight is.
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PATTERN = re.compile(r"\^?(?:[\w\-.]|\\[.\-_wd]|\.\*|\.\+|\[0-9\]\+?|\\d\+|\(\?:|[()|])+\$?")
_PLAIN = re.compile(r"\^?[\w\-.]+\$?")
MAX_REPEATS, MAX_WILD, MAX_LENGTH = 3, 64, 512
MAX_MODULES = 10_000


class Patterns:
    """Values by PEFT's patterns, regular expressions for the end of a module's name, of which the first that matches counts.

    Almost all are plain names, found at once; of the others only such are taken as cannot take for ever.
    """

    def __init__(self, values: Mapping[str, float], source: str) -> None:
        self._plain: dict[str, tuple[int, float]] = {}
        self._wild: list[tuple[int, re.Pattern[str], float]] = []
        for k, (pattern, value) in enumerate(values.items()):
            if _PLAIN.fullmatch(pattern):
                self._plain.setdefault(pattern.removesuffix("$"), (k, value))
            else:
                self._wild.append((k, _compiled(pattern, source), value))
        if len(self._wild) > MAX_WILD:
            raise CheckpointError(f"{source} has {len(self._wild)} patterns with wildcards; at most {MAX_WILD} are taken.")

    def get(self, name: str, default: float) -> float:
        """The value of the first pattern that matches."""
        words = name.split(".")
        ends = [f"^{name}", *(".".join(words[k:]) for k in range(len(words)))]
        found = [self._plain[end] for end in ends if end in self._plain]
        found += [(k, value) for k, pattern, value in self._wild if pattern.fullmatch(name)]
        return min(found, key=lambda one: one[0])[1] if found else default


@dataclass(frozen=True)
class Settings:
    """What PEFT scales by.

    Attributes:
        method: as PEFT calls it.
        rank, alpha: of all weights, where no pattern says otherwise.
        rslora: scale by alpha / sqrt(rank).
        ranks, alphas: of weights for which patterns say otherwise.
        seed: of VeRA's A and B, and of FourierFT's places.
        top: how many vectors VB-LoRA takes of its bank.
        modules: names, or ends of names, of modules that the file holds whole.
    """

    method: str
    rank: int
    alpha: float
    rslora: bool = False
    ranks: Patterns | None = None
    alphas: Patterns | None = None
    seed: int = 0
    modules: frozenset[str] = frozenset()
    top: int = 2

    @classmethod
    def of(cls, config: Mapping[str, Any], source: str) -> Settings:
        """Read and check a configuration.

        Raises:
            CheckpointError: another method, a setting that changes what the tensors mean, or values of the wrong kind.
        """
        method = str(config.get("peft_type")).upper().rpartition(".")[2]
        if method not in METHODS:
            does = f" {OTHERS[method]}, and" if method in OTHERS else ""
            raise CheckpointError(
                f"{source}: PEFT's {shown(config.get('peft_type'))}{does} is not among the methods that are read; have PEFT "
                f"merge it (merge_and_unload), and extract() a network of the difference. Read are {', '.join(METHODS)}."
            )
        for name, value in config.items():
            if name not in HARMLESS | TAKEN and value not in (None, False, 0, "", "none", [], {}):
                raise CheckpointError(f"{source}: the setting {name}={shown(value)} may change the adapter and is not known.")
        start = str(config.get("init_lora_weights", True)).lower()
        if start.startswith(MOVES_BASE):
            raise CheckpointError(
                f"{source}: init_lora_weights={start!r} changed the base weights as well; have PEFT save it as a plain LoRA "
                "(path_initial_model_for_weight_conversion)."
            )
        if method == "MISS" and config.get("init_weights") in ("bat", "mini"):
            raise CheckpointError(f"{source}: MiSS with init_weights={config['init_weights']!r} is no block repeated along in.")
        if config.get("hybrid_r"):
            raise CheckpointError(f"{source}: GraLoRA with hybrid_r is a sum of two networks; one weight has one here.")
        rank = _count(config, "init_r" if method == "ADALORA" else "r", source)
        alpha = _real(config, ALPHAS.get(method, "lora_alpha"), source)
        # AdaLoRA's rank pattern says which triplets are left, and the file holds just these.
        ranks = {} if method == "ADALORA" else _table(config, "rank_pattern", source)
        alphas = _table(config, "alpha_pattern", source)
        return cls(
            method,
            rank,
            alpha,
            bool(config.get("use_rslora")),
            Patterns({n: _count(ranks, n, source) for n in ranks}, source),
            Patterns({n: _real(alphas, n, source) for n in alphas}, source),
            _seed(config, "random_loc_seed" if method == "FOURIERFT" else "projection_prng_key", source),
            _modules(config, source),
            _count(config, "topk", source) if method == "VBLORA" else 2,
        )

    def scale(self, name: str, weight: Weight) -> float:
        """alpha / rank, always: also where LoKr's factors are both dense.

        Args:
            name: of the weight, in the model.
            weight: its ranks stand above the settings'.
        """
        if self.method in UNSCALED or weight.kind == "full":
            return 1.0
        if self.method == "FOURIERFT":
            return self.alpha
        alpha = self.alphas.get(name, self.alpha) if self.alphas else self.alpha
        rank = self.ranks.get(name, self.rank) if self.ranks else self.rank
        if self.method == "ADALORA":
            return (alpha if alpha > 0 else rank) / (rank + 1e-5)
        if len(set(weight.ranks)) == 1:
            rank = weight.ranks[0]
        return alpha / (math.sqrt(rank) if self.rslora and self.method == "LORA" else rank)


def _count(config: Mapping[str, Any], name: str, source: str) -> int:
    value = config.get(name, 8)
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise CheckpointError(f"{source}: {name}={shown(value)}; a rank is a whole number of at least 1.")
    return value


def _real(config: Mapping[str, Any], name: str, source: str) -> float:
    value = config.get(name, 8)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise CheckpointError(f"{source}: {name}={shown(value)}; alpha is a number.")
    return float(value)


def _table(config: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: {name}={shown(value)}; expected a table of names.")
    return value


def _modules(config: Mapping[str, Any], source: str) -> frozenset[str]:
    value = config.get("modules_to_save") or []
    if not isinstance(value, list) or len(value) > MAX_MODULES or not all(isinstance(v, str) and v for v in value):
        raise CheckpointError(f"{source}: modules_to_save={shown(value)}; expected a list of up to {MAX_MODULES} names.")
    return frozenset(value)


def _seed(config: Mapping[str, Any], name: str, source: str) -> int:
    value = config.get(name, 0)
    if value is not None and (type(value) is not int or not -(1 << 63) <= value < 1 << 63):
        raise CheckpointError(f"{source}: {name}={shown(value)}; expected a whole number.")
    return value or 0


def _compiled(pattern: str, source: str) -> re.Pattern[str]:
    repeats = pattern.count("*") + pattern.count("+")
    nested = re.search(r"\)[*+{?]", pattern)
    if len(pattern) > MAX_LENGTH or not _PATTERN.fullmatch(pattern) or repeats > MAX_REPEATS or nested:
        raise CheckpointError(f"{source}: the pattern {shown(pattern)} is more than a module's name with a few wildcards.")
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})")
    except re.error as error:
        raise CheckpointError(f"{source}: the pattern {shown(pattern)} is no regular expression ({error}).") from error
