"""The methods of other libraries, as tables: which endings of keys belong to which tensor, and which network they are.

A *form* names the tensors of one weight and their indices: ``o`` out, ``i`` in, ``k`` the axes of a convolution's kernel (one
index each), the others bonds. Trailing axes of a tensor whose last index is an ``i`` belong to it; other trailing axes have
size 1 and are dropped. So one row serves linear layers and convolutions.

| form | dW |
|---|---|
| lora | up down (Hu et al. 2021), with ``mid``: LyCORIS' Tucker convolution |
| adalora | up diag(E) down (Zhang et al. 2023) |
| loha | (w1_a w1_b) * (w2_a w2_b), with ``t``: a Tucker kernel for each (Yeh et al. 2023) |
| lokr | w1 (x) w2, each dense or a product; w2 with ``t2`` a Tucker kernel (Yeh et al. 2023) |
| vera | diag(b) B diag(d) A, B and A shared (Kopiczko et al. 2023) |
| gralora | a LoRA for each block (m, n): B[m n r o] A[n i m r] (Jung et al. 2025) |
| randlora | the sum of fixed LoRAs, each with scales: B[o r n] lambda[r n] gamma[n i] A[r i] (Albert et al. 2025) |
| miss | one block of columns, repeated along in: D[x o] (Kang and Yin 2025) |
| fourierft | the inverse Fourier transform of few numbers: U[o l p] c[l] V[l p i] (Gao et al. 2024) |
| hira | W * (B A), number by number, W the base's weight (Huang et al. 2025) |
| full | dW itself |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# field -> endings of keys behind the weight's name, PEFT's and diffusers' first, then kohya's and LyCORIS', then others'.
ENDINGS: dict[str, tuple[str, ...]] = {
    "up": ("lora_B.weight", "lora_B", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight"),
    "down": ("lora_A.weight", "lora_A", "lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight"),
    "mid": ("lora_mid.weight",),
    "embedding_up": ("lora_embedding_B",),
    "embedding_down": ("lora_embedding_A",),
    "up_bias": ("lora_B.bias", "lora_up.bias"),
    "E": ("lora_E",),
    "alpha": ("alpha",),
    "magnitude": ("lora_magnitude_vector", "lora_magnitude_vector.weight"),
    "dora_scale": ("dora_scale",),
    **{name: (name,) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: (name,) for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
    "vera_b": ("vera_lambda_b",),
    "vera_d": ("vera_lambda_d",),
    "gralora_A": ("gralora_A",),
    "gralora_B": ("gralora_B",),
    "gralora_A_general": ("gralora_A_general.weight",),
    "gralora_B_general": ("gralora_B_general.weight",),
    "randlora_lambda": ("randlora_lambda",),
    "randlora_gamma": ("randlora_gamma",),
    "miss_block": ("miss_block",),
    "c3a_kernel": ("c3a_kernel",),
    "fourierft_spectrum": ("fourierft_spectrum",),
    **{name: (name,) for name in ("delora_A", "delora_B", "delora_lambda", "delora_w_norm", "hira_A", "hira_B")},
    **{name: (name,) for name in ("vblora_logits_A", "vblora_logits_B")},
    "diff": ("diff",),
    "diff_b": ("diff_b",),
    "w_norm": ("w_norm",),
    "b_norm": ("b_norm",),
}
# Values that stand for themselves: PEFT's modules_to_save and biases, diffusers' norms, what a batch norm has counted.
VALUES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Endings of methods that are no networks of this library, each with what they do.
FOREIGN = {
    "oft_blocks": "OFT turns the weight's rows",
    "oft_R.weight": "OFT turns the weight's rows",
    "oft_R": "OFT turns the weight's rows",
    "on_input": "IA3 scales the layer's input or output",
    "ia3_l": "IA3 scales the layer's input or output",
    "a1.weight": "GLoRA multiplies the weight",
    "a2.weight": "GLoRA multiplies the weight",
    "lambda_layer": "T-LoRA changes with the time step",
    "reshape_weight": "it makes the layer another size",
    "set_weight": "it replaces the weight",
    "trainable_tokens_delta": "it replaces rows of an embedding",
    "prompt_embeddings": "prompt tuning adapts no weight",
}
PLAIN = {ending: name for name, endings in ENDINGS.items() for ending in endings}
_LONGEST = max(ending.count(".") for ending in PLAIN) + 1
# PEFT puts the adapter's own name in between when a whole model's state is saved: lora_A.default.weight.
_WRAPPED = (
    r"lora_(?:[ABE]|embedding_[AB]|magnitude_vector)|vera_lambda_[bd]|randlora_(?:lambda|gamma)|miss_block|c3a_kernel|hira_[AB]"
    r"|delora_(?:[AB]|lambda|w_norm)|vblora_logits_[AB]|fourierft_spectrum"
)
_NAMED = re.compile(rf"(.+\.(?:{_WRAPPED}))\.([^.]+)(\.weight)?")
# diffusers' old attention processors: to_q_lora.down.weight of ...attn1.processor, XLabs: processor.qkv_lora1.down.weight.
_PROCESSOR = re.compile(r"(.+)\.processor\.(\w+?)_lora(\d?)\.(up|down)\.weight")


@dataclass(frozen=True)
class Form:
    """The network of one weight, as a table.

    Attributes:
        kind: the method.
        nodes: field -> its indices.
        modes: of dW, in the network's notation.
        rank: the index whose size alpha is divided by; the first that is there.
        frozen: fields that are not trained.
        flipped: whether it is of an embedding, whose table is (in, out).
    """

    kind: str
    nodes: Mapping[str, str]
    modes: str = "o i"
    rank: tuple[str, ...] = ("r",)
    frozen: frozenset[str] = frozenset()
    flipped: bool = False


def _lokr() -> list[Form]:
    firsts = [{"lokr_w1": "o1 i1"}, {"lokr_w1_a": "o1 p", "lokr_w1_b": "p i1"}]
    seconds = [
        ({"lokr_w2": "o2 i2"}, "i2"),
        ({"lokr_w2_a": "o2 r", "lokr_w2_b": "r i2"}, "i2"),
        ({"lokr_t2": "r s k", "lokr_w2_a": "r o2", "lokr_w2_b": "s i2"}, "i2 k"),
    ]
    return [Form("lokr", first | second, f"(o1 o2) (i1 {i})", ("p", "r")) for first in firsts for second, i in seconds]


FORMS: tuple[Form, ...] = (
    Form("lora", {"up": "o r", "down": "r i"}),
    Form("lora", {"up": "o r", "mid": "r s k", "down": "s i"}, "o (i k)", ("s",)),
    Form("lora", {"embedding_up": "o r", "embedding_down": "r i"}, flipped=True),
    Form("adalora", {"up": "o r", "E": "r", "down": "r i"}),
    Form("loha", {"hada_w1_a": "o r", "hada_w1_b": "r i", "hada_w2_a": "o s", "hada_w2_b": "s i"}),
    Form(
        "loha",
        {
            "hada_t1": "p r k",
            "hada_w1_a": "p o",
            "hada_w1_b": "r i",
            "hada_t2": "q s k",
            "hada_w2_a": "q o",
            "hada_w2_b": "s i",
        },
        "o (i k)",
    ),
    *_lokr(),
    Form("vera", {"vera_b": "o", "vera_B": "o r", "vera_d": "r", "vera_A": "r i"}, frozen=frozenset({"vera_B", "vera_A"})),
    Form("gralora", {"gralora_B": "m n r o", "gralora_A": "n i m r"}, "(m o) (n i)", ()),
    # What these need besides follows from the model's sizes, see `structured`.
    Form("randlora", {"randlora_lambda": "r n", "randlora_gamma": "n s"}),
    Form("miss", {"miss_block": "x o"}, rank=()),
    Form("hira", {"hira_B": "o r", "hira_A": "r i"}),
    Form("fourierft", {"fourierft_spectrum": "l"}, rank=()),
    Form("full", {"diff": "o i"}, rank=()),
)
# Methods of PEFT's that only its settings and the model's sizes make whole.
PARTIAL = ("randlora", "miss", "vera", "fourierft", "hira")
# Tensors that change a weight's network or its scale, and such that adapt something else at the same place.
ASIDE = ("alpha", "magnitude", "dora_scale", "up_bias", "diff_b", "w_norm", "b_norm")


def split_key(key: str) -> tuple[str, str] | None:
    """A key as (the weight's name, the field), None where the key is of no method.

    >>> split_key("base_model.model.layers.0.q.lora_A.weight"), split_key("lora_unet_conv_in.lokr_w2_b")
    (('base_model.model.layers.0.q', 'down'), ('lora_unet_conv_in', 'lokr_w2_b'))
    """
    if processor := _PROCESSOR.fullmatch(key):
        home, part, number, side = processor.groups()
        name = f"{home}.{part}" if not number and part.startswith("to_") else f"{home}.processor.{part}_lora{number}"
        return (f"{name}.0" if part == "to_out" else name), side
    if named := _NAMED.fullmatch(key):
        plain = named[1] + (named[3] or "")
        if named[2] not in ("weight", "bias") and split_key(plain):
            return split_key(plain)
    words = key.split(".")
    for count in range(min(_LONGEST, len(words) - 1), 0, -1):
        ending = ".".join(words[-count:])
        if ending in PLAIN:
            return ".".join(words[:-count]), PLAIN[ending]
    return None


def foreign_method(key: str) -> str | None:
    """What the method of this key does, where it is one that this library has no network for."""
    return next((words for ending, words in FOREIGN.items() if key == ending or key.endswith(f".{ending}")), None)
