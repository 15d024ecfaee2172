"""The frozen base of the demo: a small ViT pre-trained from scratch on printed digits."""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from superlora_tn.demo.digits import printed_digits
from superlora_tn.demo.progress import OnStep
from superlora_tn.demo.whole_file import whole_file

_REVISION = 1  # raise it when the drawing or the training code changes, so that older cached bases expire
_CLIP = 1.0  # largest gradient norm: adapters that multiply several factors meet sudden slopes


@dataclass(frozen=True)
class DigitsRecipe:
    """Every hyper-parameter of the demo: the base and its pre-training, then one adaptation run."""

    # The base, and its pre-training on printed digits.
    size: int = 16  # pixels along an edge
    patch: int = 4
    dim: int = 64  # 4 layers x (q, v) x 64 x 64 = 2**15 weights: they fold into many shapes, 32 x 32 x 32 too
    layers: int = 4
    heads: int = 4
    pool: int = 40_000  # distinct training images, drawn once
    base_steps: int = 1200
    base_batch: int = 128
    base_lr: float = 2e-3
    base_seed: int = 0
    # One adaptation to scans.
    steps: int = 200
    batch: int = 64
    lr: float = 1e-2
    seeds: tuple[int, ...] = (0, 1, 2)

    def base_record(self) -> str:
        """Return, as JSON, all that the base's weights and their names depend on; no adaptation setting."""
        about_adapting = {"steps", "batch", "lr", "seeds"}
        facts = {name: value for name, value in asdict(self).items() if name not in about_adapting}
        return json.dumps(facts | {"revision": _REVISION, "transformers": transformers.__version__}, sort_keys=True)


FULL = DigitsRecipe()
QUICK = DigitsRecipe(pool=10_000, base_steps=500, base_batch=64, steps=60, seeds=(0,))


def build_vit(recipe: DigitsRecipe) -> ViTForImageClassification:
    """Build the untrained ViT: takes (batch, 1, size, size), gives ``.logits`` (batch, 10).

    The caller's random state is left as it was.
    """
    config = ViTConfig(
        image_size=recipe.size,
        patch_size=recipe.patch,
        num_channels=1,
        hidden_size=recipe.dim,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=2 * recipe.dim,
        num_labels=10,
        # ViTConfig's 0.02 is meant for 768 dimensions; this keeps the layers' gain at this width.
        initializer_range=1 / math.sqrt(recipe.dim),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.base_seed)
        return ViTForImageClassification(config)


def pretrain(model: nn.Module, recipe: DigitsRecipe, on_step: OnStep | None = None) -> None:
    """Train every parameter of ``model`` in place on printed digits; leaves it in eval mode."""
    images, labels = printed_digits(recipe.pool, recipe.base_seed, "train", recipe.size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.base_lr, weight_decay=0.05)
    train(model, optimizer, images, labels, recipe.base_steps, recipe.base_batch, recipe.base_seed, on_step)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread meanwhile, then in as many as before.

    These layers are so small that a second thread saves a third of the time at best, and while another
    program holds its core, each operator waits for it: a run of 2 s was seen to take 50 s.  It also
    makes the base's weights independent of the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    steps: int,
    batch: int,
    seed: int,
    on_step: OnStep | None = None,
) -> list[float]:
    """Minimise cross-entropy under a one-cycle schedule that peaks at the optimiser's learning rate.

    ``images`` (count, 1, size, size) and ``labels`` (count,) are sampled with replacement, in an order
    that ``seed`` fixes.  The model is left in eval mode.  Returns the seconds that each step took,
    ``on_step`` not included.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(seed)
    seconds: list[float] = []
    model.train()
    for step in range(1, steps + 1):
        start = time.perf_counter()
        rows = torch.randint(len(labels), (batch,), generator=generator)
        loss = F.cross_entropy(model(pixel_values=images[rows]).logits, labels[rows])
        _step_down(optimizer, loss)
        schedule.step()
        seconds.append(time.perf_counter() - start)
        if on_step is not None:
            on_step(step, steps, loss.item())
    model.eval()
    return seconds


def _step_down(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one optimiser step down the clipped gradient of a scalar loss."""
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), _CLIP)
    optimizer.step()


@torch.no_grad()
@_one_thread()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images (count, 1, size, size) whose largest logit is the label, in [0, 1]."""
    was_training = model.training
    model.eval()
    guesses = [model(pixel_values=part).logits.argmax(-1) for part in torch.split(images, 512)]
    model.train(was_training)
    return int((torch.cat(guesses) == labels).sum()) / len(labels)


def pretrained(recipe: DigitsRecipe, cache_dir: Path | None = None, on_step: OnStep | None = None) -> ViTForImageClassification:
    """Return the pre-trained base, in eval mode, from ``cache_dir`` if it holds this recipe's.

    Otherwise it is trained, and kept in ``cache_dir`` (made if missing) unless that is None; ``on_step``
    is called only while training.
    """
    model = build_vit(recipe)
    record = recipe.base_record()
    # Named by the recipe, so that a quick run does not throw away the full run's base.
    name = f"printed-digits-vit-{hashlib.sha256(record.encode()).hexdigest()[:8]}.safetensors"
    path = None if cache_dir is None else cache_dir / name
    if path is not None and _recorded_in(path) == record:
        model.load_state_dict(load_file(path))
        return model.eval()
    pretrain(model, recipe, on_step)
    if path is not None:
        _save(model, path, record)
    return model


def _recorded_in(path: Path) -> str | None:
    """Return the recipe written in a cached base's header, or None if there is no readable file."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("recipe")
    except (OSError, SafetensorError):
        return None


def _save(model: nn.Module, path: Path, record: str) -> None:
    """Write the weights with their recipe; a run that is stopped halfway leaves no broken file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        save_file(model.state_dict(), partial, metadata={"recipe": record})
