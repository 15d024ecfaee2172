"""One command to fine-tune: a YAML file says model, data, task and adapter; needs the extra ``finetune``."""
