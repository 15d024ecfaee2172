"""docs/recipes.md: each recipe runs as it stands behind the first block, and does what its words say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from optional import library
from shown import ROOT

import superlora_tn as sl

PAGE = (ROOT / "docs" / "recipes.md").read_text()
SECTIONS = dict(zip(*[iter(re.split(r"(?m)^## (.*)$", PAGE)[1:])] * 2, strict=True))
NEEDS = {
    "transformers' Trainer": ["accelerate"],
    "PEFT": ["peft"],
    "TRL": ["peft", "accelerate", "datasets", "trl"],
    "accelerate": ["accelerate"],
    "Lightning": ["lightning.pytorch"],
    "diffusers": ["diffusers"],
}


def blocks(text: str) -> list[str]:
    return re.findall(r"```py\n(.*?)```", text, re.DOTALL)


def ran(name: str, **given: Any) -> dict[str, Any]:
    """What a recipe leaves, in the folder that is current."""
    library("transformers")
    for module in NEEDS[name]:
        library(module)
    scope: dict[str, Any] = {"__name__": "recipe", **given}
    for text in (blocks(PAGE)[0], *blocks(SECTIONS[name])):
        exec(compile(text, f"recipe {name}", "exec", dont_inherit=True), scope)
    return scope


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def same(model: Any, place: str, tuned: sl.Tuned) -> None:
    """What lies in a folder is the adapter, and not where it started."""
    again = sl.load(model, place)
    assert all(torch.equal(again.delta(name), tuned.delta(name)) for name in tuned.targets)
    assert max(float(tuned.delta(name).detach().abs().max()) for name in tuned.targets) > 0


def test_every_recipe_with_code_is_run() -> None:
    assert [name for name, text in SECTIONS.items() if blocks(text)] == list(NEEDS)


def test_the_trainers() -> None:
    scope = ran("transformers' Trainer")
    same(scope["base"](), "trainer/adapter", scope["tuned"])
    same(scope["base"](), "trainer/checkpoint-4", scope["tuned"])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers so
def test_pefts() -> None:
    scope = ran("PEFT")
    first, second = (scope[name].eval()(input_ids=scope["rows"][:2]).logits for name in ("model", "again"))
    assert torch.equal(first, second)


def test_accelerates() -> None:
    scope = ran("accelerate")
    tuned = sl.tuned(scope["model"])
    same(scope["base"](), "state", tuned)
    assert not list(Path("state").glob("model*"))
    before = {name: tuned.delta(name).detach().clone() for name in tuned.targets}
    with torch.no_grad():
        for node in tuned.parameters():
            node.add_(1.0)
    scope["accelerator"].load_state("state")
    assert all(torch.equal(tuned.delta(name), before[name]) for name in before)


@pytest.mark.filterwarnings("ignore")  # Lightning warns of its own calls of torch, and of few workers
def test_lightnings() -> None:
    scope = ran("Lightning")
    saved = torch.load("lightning/last.ckpt", weights_only=False)["state_dict"]
    assert saved
    assert all(".superlora." in name for name in saved)
    assert scope["trainer"].global_step == 16
    kept, again = scope["trainer"].lightning_module.state_dict(), scope["again"].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in kept.items())
    with pytest.raises(RuntimeError, match="Missing key"):  # else the recipe need not say strict=False
        scope["Module"].load_from_checkpoint("lightning/last.ckpt")


def test_diffusers() -> None:
    """The pipeline draws with the adapter what it draws with the merged model.

    Tolerance: dW added to the weight in place of the output, in float32, through two steps; images in [0, 1].
    """
    scope = ran("diffusers")
    assert [picture.size for picture in scope["pictures"]] == [(8, 8), (8, 8)]
    assert [file.name for file in Path("diffusers").iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe, tuned = scope["pipe"], scope["tuned"]
    with torch.no_grad():
        for node in tuned.parameters():
            node.add_(torch.linspace(-0.3, 0.3, node.numel()).reshape(node.shape))

    def drawn() -> torch.Tensor:
        options = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
        return torch.from_numpy(pipe(batch_size=2, **options).images)

    adapted = drawn()
    with tuned.disabled():
        assert (drawn() - adapted).abs().max() > 1e-2
    tuned.merge()
    torch.testing.assert_close(drawn(), adapted, rtol=0, atol=1e-4)


def tokenizer() -> Any:
    transformers, tokenizers = library("transformers"), library("tokenizers")
    words = {"[PAD]": 0, "[BOS]": 1, "[END]": 2} | {f"w{k}": k for k in range(3, 64)}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", bos_token="[BOS]", eos_token="[END]")


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_trls() -> None:
    scope = ran("TRL", tokenizer=tokenizer())
    peft, rows = library("peft"), scope["rows"]
    again = peft.PeftModel.from_pretrained(scope["base"](), "trl/adapter").eval()
    trained = scope["trainer"].model.eval()
    assert torch.equal(again(input_ids=rows[:2]).logits, trained(input_ids=rows[:2]).logits)
    assert not torch.equal(again(input_ids=rows[:2]).logits, scope["base"]().eval()(input_ids=rows[:2]).logits)
    base = dict(scope["base"]().named_parameters())
    kept = {name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in trained.named_parameters()}
    assert all(torch.equal(kept[name], p) for name, p in base.items())


def test_a_pipeline_of_transformers_generates_as_the_merged_model() -> None:
    transformers = library("transformers")
    scope: dict[str, Any] = {}
    exec(blocks(PAGE)[0], scope)
    model = scope["base"]()
    tuned = sl.attach(model, sl.lotr(4), ["q_proj", "v_proj"], seed=0)
    with torch.no_grad():
        for node in tuned.parameters():
            node.add_(torch.linspace(-0.3, 0.3, node.numel()).reshape(node.shape))
    made = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    options = {"max_new_tokens": 8, "do_sample": False}
    with tuned.disabled():
        plain = made("w5 w6 w7", **options)
    adapted = made("w5 w6 w7", **options)
    tuned.merge()
    assert made("w5 w6 w7", **options) == adapted != plain
