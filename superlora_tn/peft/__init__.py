"""Declared adapters as a method of PEFT: import this, and `get_peft_model` and `PeftModel.from_pretrained` know it.

from peft import get_peft_model
from superlora_tn.peft import SuperLoraConfig

model = get_peft_model(model, SuperLoraConfig(spec="lokr", settings={"rank": 8}, target_modules=["q_proj", "v_proj"]))
"""

from peft.utils import register_peft_method

from superlora_tn.peft.config import NAME, SuperLoraConfig
from superlora_tn.peft.layer import SuperLoraLayer
from superlora_tn.peft.model import SuperLoraModel

register_peft_method(name=NAME, config_cls=SuperLoraConfig, model_cls=SuperLoraModel)

__all__ = ["SuperLoraConfig", "SuperLoraLayer", "SuperLoraModel"]
