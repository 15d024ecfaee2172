"""PEFT's method comparison in little, on the CPU: its steps, settings and result files, a tiny Llama and sums of digits.

What its ``run.py`` does with an experiment's folder is done here in the same order: read the configuration,
``get_peft_model`` on a bfloat16 base, AdamW over all parameters under a cosine with warm-up, clipped gradients, validation
and test by ``generate`` with padding on the left, loss on other text before and after, the checkpoint's size, and a JSON
file of its layout. The model is random and small, so accuracies mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftConfig, get_peft_model
from results import write
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import superlora_tn.peft  # noqa: F401  registers the method

HERE = Path(__file__).parent
CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class TrainConfig:
    """The harness's settings under its names; the values are its defaults but for those that make a run small here."""

    model_id: str = "tiny-random-llama"
    dtype: str = "bfloat16"
    max_seq_length: int = 768
    batch_size: int = 4
    batch_size_eval: int = 8  # 50 there
    max_steps: int = 6  # 5000 there
    eval_steps: int = 3  # 250 there
    compile: bool = False
    use_gc: bool = False
    query_template: str = "Question: {query} Think step by step.\nAnswer:"
    seed: int = 0
    grad_norm_clip: float = 1.0
    optimizer_type: str = "AdamW"
    optimizer_kwargs: dict[str, Any] = field(default_factory=lambda: {"lr": 1e-4, "weight_decay": 0.1})
    lr_scheduler: str | None = "cosine"
    use_amp: bool = False
    autocast_adapter_dtype: bool = True
    generation_kwargs: dict[str, Any] = field(default_factory=lambda: {"max_length": 800, "max_new_tokens": 8})  # 300 there
    attn_implementation: str | None = None
    init_kv_cache_prefix: str | None = None


def settings(folder: Path, **small: Any) -> TrainConfig:
    """The defaults, then what the experiment's ``training_params.json`` changes, then `small`."""
    place = folder / "training_params.json"
    own = json.loads(place.read_text()) if place.is_file() else {}
    return TrainConfig(**{**own, **small})


def tokenizer(longest: int) -> PreTrainedTokenizerFast:
    """One token a character, and an end, which also pads."""
    words = {letter: k for k, letter in enumerate(CHARACTERS)} | {"<unk>": len(CHARACTERS), "<eos>": len(CHARACTERS) + 1}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    made.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>", model_max_length=longest)
    wrapped.pad_token = wrapped.eos_token
    return wrapped


def base_model(config: TrainConfig) -> nn.Module:
    """A random Llama of 2 layers with the big one's proportions: three heads share a key and value."""
    torch.manual_seed(config.seed)
    sizes = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 6}
    small = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(CHARACTERS) + 2, tie_word_embeddings=True)
    model: nn.Module = LlamaForCausalLM(small).to(getattr(torch, config.dtype))
    return model


def sums(count: int, seed: int) -> Rows:
    """Questions and worked answers, ending as MetaMathQA's do."""
    pairs = torch.randint(0, 10, (count, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"query": f"What is {a} + {b}?", "response": f"{a} and {b} make {a + b}. The answer is: {a + b}"} for a, b in pairs]


def answer(text: str) -> str | None:
    """What stands behind the last "The answer is:", to the end of its line, without a closing stop."""
    _, found, behind = text.rpartition("The answer is:")
    return behind.strip().split("\n", 1)[0].strip(" .!?$%") if found else None


def accuracy(predictions: Sequence[str], responses: Sequence[str]) -> float:
    """The share of predictions whose answer is the response's."""
    pairs = [(answer(p), answer(r)) for p, r in zip(predictions, responses, strict=True)]
    return statistics.fmean(mine is not None and mine == right for mine, right in pairs)


def evaluate(model: nn.Module, words: PreTrainedTokenizerFast, rows: Rows, config: TrainConfig) -> float:
    """Accuracy of what the model generates."""
    found: list[str] = []
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), config.batch_size_eval):
            texts = [config.query_template.format(query=row["query"]) for row in rows[start : start + config.batch_size_eval]]
            batch = words.pad(words(texts, return_token_type_ids=False), return_tensors="pt", padding_side="left")
            kwargs, length = dict(config.generation_kwargs), batch["input_ids"].shape[1]
            # transformers takes one of the two; the smaller counts.
            longest = min(kwargs.pop("max_new_tokens") + length, kwargs.pop("max_length"))
            settings = GenerationConfig(max_length=longest, pad_token_id=words.eos_token_id, **kwargs)
            found += words.batch_decode(model.generate(**batch, generation_config=settings), skip_special_tokens=True)
    model.train()
    return accuracy(found, [row["response"] for row in rows])


def loss_per_token(model: nn.Module, words: PreTrainedTokenizerFast, text: str) -> float:
    """How well the model still does on other text."""
    with torch.inference_mode():
        ids = words(text, return_tensors="pt")["input_ids"]
        return float(model(input_ids=ids, labels=ids).loss)


def batches(words: PreTrainedTokenizerFast, rows: Rows, config: TrainConfig) -> Iterator[dict[str, Tensor]]:
    """Padded batches with labels: all padding but the first end of text is left out of the loss."""
    for start in range(0, len(rows), config.batch_size):
        part = rows[start : start + config.batch_size]
        texts = [config.query_template.format(query=row["query"]) + row["response"] for row in part]
        ids = words(texts, truncation=True, return_token_type_ids=False)
        batch = dict(words.pad(ids, return_tensors="pt"))
        labels = batch["input_ids"].clone()
        for k, own in enumerate(ids["input_ids"]):
            labels[k, len(own) + 1 :] = -100
        yield {**batch, "labels": labels}


def train(model: nn.Module, words: PreTrainedTokenizerFast, config: TrainConfig) -> list[dict[str, Any]]:
    """Train, validate every so many steps, test at the end: the metrics of the result file."""
    optimizer = getattr(torch.optim, config.optimizer_type)(model.parameters(), **config.optimizer_kwargs)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, config.max_steps // 10, config.max_steps)
    other = "Llamas are kept for their wool, and carry loads in the Andes."
    before, losses, tokens, start = loss_per_token(model, words, other), [], 0, time.perf_counter()
    metrics: list[dict[str, Any]] = []
    model.train()
    for step, batch in enumerate(batches(words, sums(config.max_steps * config.batch_size, config.seed), config), 1):
        optimizer.zero_grad()
        loss = model(**batch, num_items_in_batch=int(batch["attention_mask"].sum())).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_norm_clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        tokens += int(batch["attention_mask"].sum())
        if step % config.eval_steps == 0:
            took = time.perf_counter() - start
            metrics.append(
                {
                    "step": step,
                    "valid accuracy": evaluate(model, words, sums(8, config.seed + 1), config),
                    "train loss": statistics.fmean(losses[-config.eval_steps :]),
                    "train samples": step * config.batch_size,
                    "train time": took,
                    "tokens / sec": tokens / took,
                    "elapsed time": time.perf_counter() - start,
                }
            )
    tested = evaluate(model, words, sums(8, config.seed + 2), config)
    model.eval()
    metrics.append(
        {
            "step": config.max_steps,
            "test accuracy": tested,
            "train loss": statistics.fmean(losses[-config.eval_steps :]),
            "train samples": config.max_steps * config.batch_size,
            "train total tokens": tokens,
            "forgetting": loss_per_token(model, words, other) - before,
        }
    )
    return metrics


def run(folder: Path, out: Path, **small: Any) -> Path:
    """One experiment from its folder to its result file.

    Args:
        folder: ``experiments/METHOD/NAME`` with its ``adapter_config.json``.
        out: where the result is written.
        **small: settings that replace the experiment's.

    Returns:
        The result's path.
    """
    began, start = datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat(), time.perf_counter()
    declared, config = PeftConfig.from_pretrained(folder), settings(folder, **small)
    transformers.set_seed(config.seed)
    words = tokenizer(config.max_seq_length)
    model = get_peft_model(base_model(config), declared, autocast_adapter_dtype=config.autocast_adapter_dtype)
    trainable, total = model.get_nb_trainable_parameters()
    trained = time.perf_counter()
    metrics = train(model, words, config)
    trained = time.perf_counter() - trained
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        size = (Path(place) / "adapter_model.safetensors").stat().st_size
    kept = {key: sorted(value) if isinstance(value, set) else value for key, value in declared.to_dict().items()}
    result: Mapping[str, Any] = {
        "run_info": {
            "created_at": began,
            "total_time": time.perf_counter() - start,
            "experiment_name": "/".join(folder.parts[-2:]),
            "peft_branch": "driver",  # of no branch of PEFT: its own table takes those of main alone
            "train_config": asdict(config),
            "peft_config": kept,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": 0,
            "accelerator_memory_max": 0,
            "accelerator_memory_reserved_99th": 0,
            "train_time": trained,
            "file_size": size,
            "num_trainable_params": trainable,
            "num_total_params": total,
            "status": "success",
            "metrics": metrics,
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {},
            "package_info": {f"{module.__name__}-version": module.__version__ for module in (transformers, peft, torch)},
            "system_info": {"system": platform.system(), "machine": platform.machine(), "accelerator": None},
            "pytorch_info": torch.__config__.show(),
        },
    }
    return write(out, result)


def main() -> None:
    """Run all experiments, or those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="experiments; all where none is named")
    parser.add_argument("--out", type=Path, default=Path("out/method_comparison"), help="where the results go")
    given = parser.parse_args()
    for folder in given.folders or sorted((HERE / "experiments" / "superlora").iterdir()):
        print(run(folder, given.out))


if __name__ == "__main__":
    main()
