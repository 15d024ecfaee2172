"""One name for what several publishers call differently: a weight as *atoms*, the runs of rows that are one weight elsewhere.

``double_blocks.0.img_attn.qkv`` of BFL's Flux is the three atoms that diffusers calls ``transformer_blocks.0.attn.to_q``,
``.to_k`` and ``.to_v``. Atoms of two names are compared with '_' for '.', as kohya's files write them, so the rules read both.

The rules are facts of the published architectures: Flux and HunyuanVideo (BFL's names, XLabs' processors), Stable Diffusion
3 and Wan (their authors' names), each to diffusers' names, and the U-Net of Stable Diffusion (LDM's names). A fused
projection beside split ones is a rule for all models, for the names below.
"""

from __future__ import annotations

import re
from collections.abc import Callable

QKV = ("<q>", "<k>", "<v>")
ADDED = ("<add_q>", "<add_k>", "<add_v>")
# Rows of a fused projection, in order. BLOOM's and GPT-NeoX's query_key_value is interleaved by head and not among them.
FUSED = {
    **dict.fromkeys(("qkv", "qkv_proj", "to_qkv", "in_proj", "wqkv", "Wqkv", "c_attn", "W_pack", "qkv_linear"), QKV),
    **dict.fromkeys(("kv", "kv_proj", "to_kv", "wkv", "Wkv"), QKV[1:]),
    **dict.fromkeys(("add_qkv_proj", "to_added_qkv", "to_qkv_add"), ADDED),
    **dict.fromkeys(("gate_up_proj",), ("<gate>", "<up>")),
}
SINGLE = {
    **{n.format(x): f"<{x}>" for x in "qkv" for n in ("{}", "to_{}", "{}_proj", "w{}", "W{}", "{}_lin", "linear_{}")},
    **{n: f"<{n[0]}>" for n in ("query", "key", "value", "query_proj", "key_proj", "value_proj")},
    **{f"add_{x}_proj": f"<add_{x}>" for x in "qkv"},
    "gate_proj": "<gate>",
    "up_proj": "<up>",
}


def _pattern(text: str) -> re.Pattern[str]:
    """A rule's left side; its dots stand for dots and underscores."""
    return re.compile(text.replace(".", "[._]"))


_LAST = _pattern(rf"(?:(.*?).)?({'|'.join(sorted([*FUSED, *SINGLE], key=len, reverse=True))})".replace(".*", "[^\0]*"))

_DOUBLE, _SINGLE = r"transformer_blocks.\1", r"single_transformer_blocks.\1"
_RULES: list[tuple[str, tuple[str, ...]]] = [
    # Flux and HunyuanVideo
    (r"double_blocks.(\d+).(?:img_attn.qkv|processor.qkv_lora1)", tuple(f"{_DOUBLE}.attn.{x}" for x in QKV)),
    (r"double_blocks.(\d+).(?:txt_attn.qkv|processor.qkv_lora2)", tuple(f"{_DOUBLE}.attn.{x}" for x in ADDED)),
    (r"double_blocks.(\d+).(?:img_attn.proj|processor.proj_lora1)", (f"{_DOUBLE}.attn.to_out.0",)),
    (r"double_blocks.(\d+).(?:txt_attn.proj|processor.proj_lora2)", (f"{_DOUBLE}.attn.to_add_out",)),
    (r"double_blocks.(\d+).img_mlp.(?:0|fc1)", (f"{_DOUBLE}.ff.net.0.proj",)),
    (r"double_blocks.(\d+).img_mlp.(?:2|fc2)", (f"{_DOUBLE}.ff.net.2",)),
    (r"double_blocks.(\d+).txt_mlp.(?:0|fc1)", (f"{_DOUBLE}.ff_context.net.0.proj",)),
    (r"double_blocks.(\d+).txt_mlp.(?:2|fc2)", (f"{_DOUBLE}.ff_context.net.2",)),
    (r"double_blocks.(\d+).img_mod.lin(?:ear)?", (f"{_DOUBLE}.norm1.linear",)),
    (r"double_blocks.(\d+).txt_mod.lin(?:ear)?", (f"{_DOUBLE}.norm1_context.linear",)),
    (r"single_blocks.(\d+).linear1", (*(f"{_SINGLE}.attn.{x}" for x in QKV), f"{_SINGLE}.proj_mlp")),
    (r"single_blocks.(\d+).processor.qkv_lora", tuple(f"{_SINGLE}.attn.{x}" for x in QKV)),
    (r"single_blocks.(\d+).(?:linear2|processor.proj_lora)", (f"{_SINGLE}.proj_out",)),
    (r"single_blocks.(\d+).modulation.lin(?:ear)?", (f"{_SINGLE}.norm.linear",)),
    (r"img_in", ("x_embedder",)),
    (r"txt_in", ("context_embedder",)),
    (r"time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    (r"time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    (r"vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    (r"vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    (r"guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    (r"guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    (r"final_layer.linear", ("proj_out",)),
    # BFL's last layer gives shift, then scale; diffusers' the other way round.
    (r"final_layer.adaLN_modulation.1", ("norm_out.<shift>", "norm_out.<scale>")),
    (r"norm_out.linear", ("norm_out.<scale>", "norm_out.<shift>")),
    # Stable Diffusion 3
    (r"joint_blocks.(\d+).x_block.attn.qkv", tuple(f"{_DOUBLE}.attn.{x}" for x in QKV)),
    (r"joint_blocks.(\d+).context_block.attn.qkv", tuple(f"{_DOUBLE}.attn.{x}" for x in ADDED)),
    (r"joint_blocks.(\d+).x_block.attn.proj", (f"{_DOUBLE}.attn.to_out.0",)),
    (r"joint_blocks.(\d+).context_block.attn.proj", (f"{_DOUBLE}.attn.to_add_out",)),
    (r"joint_blocks.(\d+).x_block.attn2.qkv", tuple(f"{_DOUBLE}.attn2.{x}" for x in QKV)),
    (r"joint_blocks.(\d+).x_block.attn2.proj", (f"{_DOUBLE}.attn2.to_out.0",)),
    (r"joint_blocks.(\d+).x_block.mlp.fc1", (f"{_DOUBLE}.ff.net.0.proj",)),
    (r"joint_blocks.(\d+).x_block.mlp.fc2", (f"{_DOUBLE}.ff.net.2",)),
    (r"joint_blocks.(\d+).context_block.mlp.fc1", (f"{_DOUBLE}.ff_context.net.0.proj",)),
    (r"joint_blocks.(\d+).context_block.mlp.fc2", (f"{_DOUBLE}.ff_context.net.2",)),
    (r"joint_blocks.(\d+).x_block.adaLN_modulation.1", (f"{_DOUBLE}.norm1.linear",)),
    # Wan
    *(
        (rf"blocks.(\d+).{old}.{x}", (rf"blocks.\1.{new}.<{x}>",))
        for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for x in "qkv"
    ),
    (r"blocks.(\d+).self_attn.o", (r"blocks.\1.attn1.to_out.0",)),
    (r"blocks.(\d+).cross_attn.o", (r"blocks.\1.attn2.to_out.0",)),
    (r"blocks.(\d+).cross_attn.k_img", (r"blocks.\1.attn2.<add_k>",)),
    (r"blocks.(\d+).cross_attn.v_img", (r"blocks.\1.attn2.<add_v>",)),
    (r"blocks.(\d+).ffn.0", (r"blocks.\1.ffn.net.0.proj",)),
    (r"blocks.(\d+).ffn.2", (r"blocks.\1.ffn.net.2",)),
]
RULES = [(_pattern(left), right) for left, right in _RULES]

# The U-Net of Stable Diffusion 1, 2 and XL: LDM numbers what diffusers sorts into blocks of two (down) and three (up) layers.
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_BLOCK = _pattern(r"(input|output)_blocks.(\d{1,3}).(\d).(.+)".replace(".+", "[^\0]+"))
_MIDDLE = _pattern(r"middle_block.(\d).(.+)".replace(".+", "[^\0]+"))


def _loose(name: str) -> str:
    return name.replace(".", "_")


_RESNET_LOOSE = {_loose(old): new for old, new in _RESNET.items()}
_ENDS_LOOSE = {_loose(old): new for old, new in _ENDS.items()}


def unet(name: str) -> str | None:
    """diffusers' name of a module of LDM's U-Net, None where it is none.

    >>> unet("input_blocks_4_1_proj_in"), unet("output_blocks.2.1.conv"), unet("middle_block.0.emb_layers.1")
    ('down_blocks.1.attentions.0.proj_in', 'up_blocks.0.upsamplers.0.conv', 'mid_block.resnets.0.time_emb_proj')
    """
    if _loose(name) in _ENDS_LOOSE:
        return _ENDS_LOOSE[_loose(name)]
    if middle := _MIDDLE.fullmatch(name):
        place, rest = int(middle[1]), middle[2]
        return _layer("mid_block", {0: ("resnets", 0), 1: ("attentions", 0), 2: ("resnets", 1)}.get(place), rest)
    found = _BLOCK.fullmatch(name)
    if found is None:
        return None
    number, place, rest = int(found[2]) - (found[1] == "input"), int(found[3]), found[4]
    block, layer = divmod(number, 3)
    if found[1] == "input":
        if rest == "op":
            return f"down_blocks.{block}.downsamplers.0.conv"
        return _layer(f"down_blocks.{block}", {0: ("resnets", layer), 1: ("attentions", layer)}.get(place), rest)
    if rest == "conv":
        return f"up_blocks.{block}.upsamplers.0.conv"
    return _layer(f"up_blocks.{block}", {0: ("resnets", layer), 1: ("attentions", layer)}.get(place), rest)


def _layer(block: str, place: tuple[str, int] | None, rest: str) -> str | None:
    if place is None:
        return None
    kind, number = place
    if kind == "resnets":
        inner = _RESNET_LOOSE.get(_loose(rest))
        return inner and f"{block}.resnets.{number}.{inner}"
    return f"{block}.attentions.{number}.{rest}"


def atoms(name: str) -> tuple[str, ...]:
    """The atoms of a weight's name, written with '_' for '.'.

    >>> atoms("layers.0.self_attn.qkv_proj")
    ('layers_0_self_attn_<q>', 'layers_0_self_attn_<k>', 'layers_0_self_attn_<v>')
    >>> atoms("double_blocks_3_txt_attn_proj") == atoms("transformer_blocks.3.attn.to_add_out")
    True
    """
    for pattern, right in RULES:
        if found := pattern.fullmatch(name):
            return tuple(_loose(_single(found.expand(r))) for r in right)
    return tuple(_loose(_single(one)) for one in _split(unet(name) or name))


def _split(name: str) -> tuple[str, ...]:
    found = _LAST.fullmatch(name)
    if found is None or found[2] not in FUSED:
        return (name,)
    return tuple(f"{found[1] or ''}.{part}" for part in FUSED[found[2]])


def _single(name: str) -> str:
    found = _LAST.fullmatch(name)
    return f"{found[1] or ''}.{SINGLE[found[2]]}" if found is not None and found[2] in SINGLE else name


def classes(names: tuple[str, ...], alike: bool) -> list[str]:
    """Which atoms of a fused projection have equal sizes: k and v always; q, k and v where `alike`; halves of the same."""
    mark: Callable[[str], str] = lambda n: n[n.rfind("<") :] if n.endswith(">") else n  # noqa: E731
    groups = {"<k>": "kv", "<v>": "kv", "<add_k>": "add", "<add_v>": "add", "<gate>": "half", "<up>": "half"}
    groups |= {"<shift>": "half", "<scale>": "half"}
    if alike:
        groups |= {"<q>": "kv", "<add_q>": "add"}
    return [groups.get(mark(name), mark(name)) for name in names]
