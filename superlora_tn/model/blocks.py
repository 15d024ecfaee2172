"""The blocks of the fused layers that models are known to have: which rows are q, k and v, gate and up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from superlora_tn.declare.rows import Rows

QKV = ("q", "k", "v")


def _thirds(parent: Any, layer: str) -> Rows:
    return Rows(layer, QKV)


def _halves(parent: Any, layer: str) -> Rows:
    return Rows(layer, ("gate", "up"))


def _by_head(name: str) -> Callable[[Any, str], Rows]:
    """Rows (head, qkv, rest), with the number of heads as the parent says it."""
    return lambda parent, layer: Rows(layer, QKV, heads=int(getattr(parent, name)))


def _grouped(parent: Any, layer: str) -> Rows:
    """All heads of q, then the fewer ones of k and of v."""
    config = parent.config
    return Rows(layer, QKV, sizes=(config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads))


def _sized(parent: Any, layer: str) -> Rows:
    return Rows(layer, QKV, sizes=(parent.q_dim, parent.kv_dim, parent.kv_dim))


def _dbrx(parent: Any, layer: str) -> Rows:
    return Rows(layer, QKV, sizes=(parent.num_heads, parent.num_key_value_heads, parent.num_key_value_heads))


def _crossed(parent: Any, layer: str) -> Rows:
    """GPT-2's: k and v alone where q comes from elsewhere."""
    return Rows(layer, QKV[1:] if getattr(parent, "is_cross_attention", False) else QKV)


def _bigcode(parent: Any, layer: str) -> Rows:
    if parent.is_cross_attention:
        return Rows(layer, QKV[1:])
    if parent.multi_query:
        return Rows(layer, QKV, sizes=(parent.embed_dim, parent.kv_dim, parent.kv_dim))
    return Rows(layer, QKV, heads=parent.num_heads)


def _falcon(parent: Any, layer: str) -> Rows:
    if parent.new_decoder_architecture:
        return Rows(layer, QKV, sizes=(parent.num_heads // parent.num_kv_heads, 1, 1), heads=parent.num_kv_heads)
    return Rows(layer, QKV, sizes=(parent.num_heads, 1, 1)) if parent.multi_query else Rows(layer, QKV, heads=parent.num_heads)


def _codegen(parent: Any, layer: str) -> Rows:
    """Four runs, laid out for four processors, each of q, v and k."""
    return Rows(layer, ("q", "v", "k"), heads=4)


Layout = Callable[[Any, str], Rows]
# By library, class and layer; a star stands for any class of the library's.
LAYOUTS: dict[tuple[str, str, str], Layout] = {
    ("transformers", "Phi3Attention", "qkv_proj"): _grouped,
    ("transformers", "Phi4MultimodalAttention", "qkv_proj"): _grouped,
    ("transformers", "GPT2Attention", "c_attn"): _crossed,
    ("transformers", "DecisionTransformerGPT2Attention", "c_attn"): _crossed,
    ("transformers", "ImageGPTAttention", "c_attn"): _crossed,
    ("transformers", "Attention", "c_attn"): _thirds,  # OpenAI's first GPT
    ("transformers", "GPTBigCodeAttention", "c_attn"): _bigcode,
    ("transformers", "GPTNeoXAttention", "query_key_value"): lambda p, n: Rows(n, QKV, heads=p.config.num_attention_heads),
    ("transformers", "GPTNeoXJapaneseAttention", "query_key_value"): _by_head("num_attention_heads"),
    ("transformers", "PersimmonAttention", "query_key_value"): _by_head("num_heads"),
    ("transformers", "BloomAttention", "query_key_value"): _by_head("num_heads"),
    ("transformers", "FalconAttention", "query_key_value"): _falcon,
    ("transformers", "CodeGenAttention", "qkv_proj"): _codegen,
    ("transformers", "MiniMaxLightningAttention", "qkv_proj"): _by_head("num_attention_heads"),
    ("transformers", "DbrxAttention", "Wqkv"): _dbrx,
    ("transformers", "MptAttention", "Wqkv"): _thirds,
    ("transformers", "ModernBertAttention", "Wqkv"): _thirds,
    ("transformers", "Exaone4_5_VisionAttention", "qkv"): _sized,
    ("transformers", "*", "qkv"): _thirds,
    ("transformers", "*", "gate_up_proj"): _halves,
    ("torchvision", "ShiftedWindowAttention", "qkv"): _thirds,
    ("torchvision", "RelativePositionalMultiHeadAttention", "to_qkv"): _thirds,
    ("timm", "Attention", "qkv"): _thirds,
    ("timm", "RelPosAttention", "qkv"): _thirds,
    ("timm", "WindowAttention", "qkv"): _thirds,
    ("timm", "WindowMultiHeadAttention", "qkv"): _thirds,
    ("timm", "EvaAttention", "qkv"): _thirds,
    ("timm", "XCA", "qkv"): _thirds,
    ("timm", "LocallyGroupedAttn", "qkv"): _thirds,
    ("timm", "ChannelAttention", "qkv"): _thirds,
    ("timm", "MaskUnitAttention", "qkv"): _thirds,
}


def blocks_in(parent: nn.Module | None, layer: str) -> Rows | None:
    """The blocks of a module's layer, where its model is known."""
    if parent is None:
        return None
    for kind in type(parent).__mro__:
        library = kind.__module__.partition(".")[0]
        found = LAYOUTS.get((library, kind.__name__, layer)) or LAYOUTS.get((library, "*", layer))
        if found is not None:
            return found(parent, layer)
    return None
