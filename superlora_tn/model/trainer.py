"""transformers' Trainer and quantised models: it refuses them unless something trainable is attached, and asks their quantizer.

The public questions `is_trainable` and `is_qat_trainable` of the model's quantizer are answered with yes while an adapter is on
the model. transformers' own mark of a PEFT adapter would do, too, but makes `save_pretrained` look for PEFT's layers.
"""

from __future__ import annotations

import copyreg
from functools import lru_cache
from typing import Any

from torch import nn

COUNT = "_superlora_adapters"


class Admission:
    """Says yes for one adapter, until it is removed."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer
        own = quantizer.__dict__
        own[COUNT] = own.get(COUNT, 0) + 1
        if own[COUNT] == 1:
            quantizer.__class__ = _admitting(type(quantizer))  # type: ignore[arg-type]

    def remove(self) -> None:
        """With the last adapter the quantizer answers for itself again."""
        own = self.quantizer.__dict__
        own[COUNT] -= 1
        if own[COUNT] == 0:
            del own[COUNT]
            self.quantizer.__class__ = type(self.quantizer)._superlora_plain


def admissions(model: nn.Module) -> list[Admission]:
    """One for each quantizer in a model."""
    found = {id(q): q for m in model.modules() if (q := m.__dict__.get("hf_quantizer")) is not None}
    return [Admission(quantizer) for quantizer in found.values()]


@lru_cache(maxsize=64)
def _admitting(plain: type[Any]) -> type:
    body: dict[str, Any] = {
        "is_trainable": property(lambda self: True),
        "is_qat_trainable": property(lambda self: True),
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__reduce_ex__": _reduced,
        "_superlora_plain": plain,
    }
    return type(plain.__name__, (plain,), body)


def _reduced(self: Any, protocol: Any) -> Any:
    return _made, (type(self)._superlora_plain,), self.__dict__.copy()


def _made(plain: type) -> Any:
    return copyreg.__newobj__(_admitting(plain))  # type: ignore[attr-defined]
