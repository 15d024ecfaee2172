"""PEFT, LyCORIS and GGUF for `tried_formats`: how each adapts a small model and saves that, and how it loads a file of ours."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

LINEAR = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.0", "ff.2"]
CONVOLUTIONS = ["conv_in", "down.0", "down.1"]


class Net(nn.Module):
    """Convolutions of 3x3 and 1x1, attention's projections and a feed-forward pair, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 12, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(12, 24, 1), nn.Conv2d(24, 24, 3, padding=1)])
        self.attn = nn.ModuleDict({n: nn.Linear(24, 24) for n in ("to_q", "to_k", "to_v")})
        self.attn["to_out"] = nn.ModuleList([nn.Linear(24, 24)])
        self.ff = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 4, 6, 6) to (n, 24)."""
        y = self.conv_in(x)
        for block in self.down:
            y = torch.tanh(block(y))
        y = y.flatten(2).transpose(1, 2)
        gate = torch.softmax(self.attn["to_q"](y) * self.attn["to_k"](y), -1)
        y = y + self.attn["to_out"][0](gate * self.attn["to_v"](y))
        out: Tensor = self.ff(y).mean(1)
        return out


@dataclass(frozen=True)
class Given:
    """What another library wrote, and what it computes with that.

    Attributes:
        path: the file or folder.
        wanted: gives the adapted model's output, in float64.
        model: makes the base again, in float64.
        call: gives a model's output.
    """

    path: Path
    wanted: Callable[[], Tensor]
    model: Callable[[], nn.Module]
    call: Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Library:
    """A library with a format of its own.

    Attributes:
        name: of the format.
        format: what `save` calls it.
        package: to be imported.
        writes: method -> adapts, saves and calls.
        read: loads a file of ours on a base, and calls it.
        model, call: the base in float64, and its output.
        linear, convolutions: names of its layers.
        options: of `save`.
    """

    name: str
    format: Any
    package: str
    writes: Mapping[str, Callable[[Path], Given]]
    read: Callable[[Path, nn.Module], Tensor]
    model: Callable[[], nn.Module]
    call: Callable[[nn.Module], Tensor]
    linear: list[str] = field(default_factory=lambda: LINEAR)
    convolutions: list[str] = field(default_factory=lambda: CONVOLUTIONS)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        """Whether it can be tried here."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        """Of the package."""
        return metadata.version({"lycoris": "lycoris-lora"}.get(self.package, self.package))


def net() -> nn.Module:
    """The base of most formats."""
    torch.manual_seed(0)
    return Net().eval().double()


def call(model: nn.Module) -> Tensor:
    """Its output for one input."""
    with torch.no_grad():
        out: Tensor = model(torch.linspace(-1, 1, 3 * 4 * 36, dtype=torch.float64).mul(40).sin().reshape(3, 4, 6, 6))
    return out


@contextmanager
def quietly() -> Any:
    """Without the library's warnings and log lines, which are not ours to answer."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def shuffle(parameters: Any) -> None:
    """Random values; what is not small at the start (DoRA's norms, OFT's and HRA's directions) is moved a little."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in parameters:
            drawn = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.copy_(p * (1 + 0.1 * drawn) if "magnitude" in name or "dora" in name else 0.3 * drawn)


# --- PEFT -----------------------------------------------------------------------------------------------------------


def _peft(kind: str, convolutions: bool = False, **settings: Any) -> Callable[[Path], Given]:
    def write(folder: Path) -> Given:
        import peft

        targets = LINEAR + (CONVOLUTIONS if convolutions else [])
        with quietly():
            config = getattr(peft, f"{kind}Config")(target_modules=targets, **settings)
            tuned = peft.get_peft_model(net().float(), config)
            shuffle([(n, p) for n, p in tuned.named_parameters() if p.requires_grad])
            tuned.save_pretrained(str(folder))
            return Given(folder, lambda: call(tuned.eval().double()), net, call)

    return write


def _peft_reads(folder: Path, model: nn.Module) -> Tensor:
    import peft

    with quietly():
        return call(peft.PeftModel.from_pretrained(model.float(), str(folder)).eval().double())


LORA = {"r": 4, "lora_alpha": 12}
PEFT = {
    "LoRA": _peft("Lora", True, **LORA),
    "rsLoRA": _peft("Lora", True, use_rslora=True, **LORA),
    "DoRA": _peft("Lora", True, use_dora=True, **LORA),
    "LoHa": _peft("LoHa", True, r=3, alpha=6),
    "LoHa with hada_t": _peft("LoHa", True, r=3, alpha=6, use_effective_conv2d=True),
    "LoKr": _peft("LoKr", True, r=2, alpha=5),
    "LoKr with lokr_t2": _peft("LoKr", True, r=1, alpha=5, use_effective_conv2d=True),
    "LoKr, both factors of low rank": _peft("LoKr", True, r=1, alpha=5, decompose_both=True),
    "LoKr, both factors dense": _peft("LoKr", True, r=32, alpha=16),
    "VeRA": _peft("Vera", r=6),
    "VeRA, projections not saved": _peft("Vera", r=6, save_projection=False),
    "AdaLoRA": _peft("AdaLora", init_r=4, target_r=2, lora_alpha=12, total_step=10),
    "GraLoRA": _peft("Gralora", r=4, alpha=6, gralora_k=2),
    "GraLoRA, hybrid": _peft("Gralora", r=4, alpha=6, gralora_k=2, hybrid_r=2),
    "RandLoRA": _peft("RandLora", r=6, randlora_alpha=9),
    "MiSS": _peft("Miss", r=4),
    "C3A": _peft("C3A", block_size=8),
    "FourierFT": _peft("FourierFT", n_frequency=30, scaling=30.0),
    "VB-LoRA": _peft("VBLoRA", r=2, num_vectors=6, vector_length=4, topk=2),
    "SHiRA": _peft("Shira", r=2),
    "DeLoRA": _peft("Delora", r=4, delora_lambda=5),
    "HiRA": _peft("Hira", r=4),
    "LoRA started by PiSSA": _peft("Lora", init_lora_weights="pissa", **LORA),
    "OFT": _peft("OFT", oft_block_size=4, r=0),
    "BOFT": _peft("BOFT", boft_block_size=4),
    "HRA": _peft("HRA", r=4),
    "IA3": _peft("IA3", feedforward_modules=[]),
    "RoAd": _peft("Road", group_size=4),
    "GLoRA": _peft("Glora", r=4),
    "WaveFT": _peft("WaveFT", n_frequency=30),
    "TinyLoRA": _peft("TinyLora", r=2, u=4),
    "PVeRA": _peft("Pvera", r=6),
    "Lily": _peft("Lily", r=4, stride_A=1, num_B=2),
    "PSOFT": _peft("Psoft", r=4),
    "UniLoRA": _peft("UniLora", r=4, theta_d_length=64),
    "DEFT": _peft("Deft", r=4),
}

# --- LyCORIS, also under kohya's names --------------------------------------------------------------------------------


# What LyCORIS cannot do on these convolutions: split 12 channels, save what it reads again.
LINEAR_ONLY = ("boft", "tlora", "dylora")


@contextmanager
def _named(prefix: str, kinds: tuple[str, ...] = ("Linear", "Conv2d")) -> Any:
    import lycoris

    with quietly():
        lycoris.LycorisNetwork.apply_preset({"target_module": list(kinds), "lora_prefix": prefix})
        try:
            yield lycoris
        finally:
            lycoris.LycorisNetwork.apply_preset({"lora_prefix": "lycoris"})


def _lycoris(prefix: str, algo: str, rank: int = 3, **more: Any) -> Callable[[Path], Given]:
    def write(folder: Path) -> Given:
        with _named(prefix, ("Linear",) if algo in LINEAR_ONLY else ("Linear", "Conv2d")) as lycoris:
            model, ranks = net().float(), {"linear_dim": rank, "linear_alpha": 2, "conv_dim": rank, "conv_alpha": 2}
            made = lycoris.create_lycoris(model, 1.0, algo=algo, **ranks, **more)
            made.apply_to()
            shuffle(made.named_parameters())
            state = {k: t.detach().clone().contiguous() for k, t in made.state_dict().items()}
            save_file(state, folder / "x.safetensors")

        def wanted() -> Tensor:
            # A DyLoRA draws its rank at each call; what its file is, LyCORIS says by loading it.
            if algo == "dylora":
                return _lycoris_reads(prefix)(folder, net())
            made.double()
            return call(model.double())

        return Given(folder / "x.safetensors", wanted, net, call)

    return write


def _lycoris_reads(prefix: str) -> Callable[[Path, nn.Module], Tensor]:
    def read(folder: Path, model: nn.Module) -> Tensor:
        file = next(folder.glob("*.safetensors"))
        with _named(prefix) as lycoris:
            network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), model.float())
            network.apply_to()
            network.double()
            return call(model.double())

    return read


def _lycoris_writes(prefix: str) -> dict[str, Callable[[Path], Given]]:
    return {
        "LoRA": _lycoris(prefix, "lora"),
        "rsLoRA": _lycoris(prefix, "lora", rs_lora=True),
        "DoRA": _lycoris(prefix, "lora", dora_wd=True),
        "DoRA of columns": _lycoris(prefix, "lora", dora_wd=True, wd_on_output=False),
        "LoRA with lora_mid": _lycoris(prefix, "lora", use_tucker=True),
        "LoHa": _lycoris(prefix, "loha"),
        "LoHa with DoRA": _lycoris(prefix, "loha", dora_wd=True),
        "LoHa with hada_t": _lycoris(prefix, "loha", use_tucker=True),
        "LoKr": _lycoris(prefix, "lokr"),
        "LoKr with DoRA": _lycoris(prefix, "lokr", dora_wd=True),
        "LoKr with lokr_t2": _lycoris(prefix, "lokr", 1, use_tucker=True),
        "LoKr, both factors of low rank": _lycoris(prefix, "lokr", 1, decompose_both=True),
        "LoKr, both factors dense": _lycoris(prefix, "lokr", full_matrix=True),
        "full": _lycoris(prefix, "full"),
        "DyLoRA": _lycoris(prefix, "dylora", 4, block_size=1),
        "OFT": _lycoris(prefix, "diag-oft"),
        "BOFT": _lycoris(prefix, "boft", 12),
        "IA3": _lycoris(prefix, "ia3"),
        "GLoRA": _lycoris(prefix, "glora"),
        "T-LoRA": _lycoris(prefix, "tlora"),
    }


# --- GGUF -------------------------------------------------------------------------------------------------------------


def _gguf(folder: Path) -> Given:
    """As llama.cpp's conversion writes: (r, in) and (out, r), one alpha; dW is alpha / r B A (`llama_lora_weight`)."""
    import gguf

    base, rank, alpha = net(), 3, 6.0
    writer = gguf.GGUFWriter(str(folder / "x.gguf"), "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    with torch.no_grad():
        for k, name in enumerate(LINEAR):
            weight = base.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            generator = torch.Generator().manual_seed(k)
            a, b = (0.3 * torch.randn(s, generator=generator) for s in ((rank, weight.shape[1]), (weight.shape[0], rank)))
            writer.add_tensor(f"{name}.weight.lora_a", a.numpy())
            writer.add_tensor(f"{name}.weight.lora_b", b.numpy())
            weight += alpha / rank * b.double() @ a.double()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Given(folder / "x.gguf", lambda: call(base), net, call)


def _gguf_reads(folder: Path, model: nn.Module) -> Tensor:
    import gguf

    reader = gguf.GGUFReader(str(next(folder.glob("*.gguf"))))
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found = {t.name: torch.from_numpy(t.data.copy()).double() for t in reader.tensors}
    with torch.no_grad():
        for key, a in found.items():
            if key.endswith(".lora_a"):
                weight = model.get_parameter(key.removesuffix(".lora_a"))
                weight += (alpha / a.shape[0] if alpha else 1.0) * found[f"{key[:-1]}b"] @ a
    return call(model)


LIBRARIES = (
    Library("PEFT", "peft", "peft", PEFT, _peft_reads, net, call),
    Library("LyCORIS", "lycoris", "lycoris", _lycoris_writes("lycoris"), _lycoris_reads("lycoris"), net, call),
    Library("kohya", "kohya", "lycoris", _lycoris_writes("lora_unet"), _lycoris_reads("lora_unet"), net, call),
    Library("GGUF", "gguf", "gguf", {"LoRA": _gguf}, _gguf_reads, net, call, convolutions=[]),
)
