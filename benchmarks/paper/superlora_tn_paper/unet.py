"""The denoising U-Net of the paper's diffusion runs: attention behind every residual block, q and v as 1x1 convolutions.

Ho et al., arXiv 2006.11239; Nichol and Dhariwal, arXiv 2102.09672.  Images are (batch, colours, size, size) in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = ("q", "v")


@dataclass(frozen=True)
class UNetShape:
    """Sizes of a U-Net.

    Args:
        size: pixels along an edge.
        colours: 3, or 1 for grey images.
        patch: the net sees patch x patch pixels as one point of colours * patch**2 channels.
        channels: width of the first level.
        multipliers: width of each level, in units of `channels`.
        blocks: residual blocks a level on the way down; one more on the way up.
        halvings: how many of the steps from level to level halve the edge; the first ones do.
    """

    size: int = 32
    colours: int = 3
    patch: int = 1
    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    halvings: int = 3

    def __post_init__(self) -> None:
        unit = self.patch << self.halvings
        if self.size % unit or self.halvings >= len(self.multipliers) or self.channels % 4:
            raise ValueError(
                f"{self} does not fit together: size must be a multiple of patch * 2**halvings = {unit}, "
                f"halvings below the {len(self.multipliers)} levels, and channels a multiple of 4."
            )


def _norm(channels: int) -> nn.GroupNorm:
    """At least four channels a group: one alone has too few elements to normalise over on a 2x2 map."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that starts at zero, so that its block starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """``shortcut(x) + conv(silu(norm(conv(silu(norm(x))) + linear(time))))``."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = _norm(inputs), _norm(outputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv_out = _zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.time = nn.Linear(time, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``x`` (batch, inputs, h, w) and the silu of the time's embedding (batch, time) to (batch, outputs, h, w)."""
        hidden = self.conv_in(F.silu(self.norm_in(x))) + self.time(time)[:, :, None, None]
        out: Tensor = self.shortcut(x) + self.conv_out(F.silu(self.norm_out(hidden)))
        return out


class Attention(nn.Module):
    """``x + proj(softmax(q k^T / sqrt(C)) v)`` over all points of the map, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) to the same shape."""
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2).unsqueeze(1) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (batch, 1, h w, channels)
        out: Tensor = x + self.proj(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))
        return out


class Stage(nn.Module):
    """A residual block, then attention."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.block = ResidualBlock(inputs, outputs, time)
        self.attention = Attention(outputs)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """As `ResidualBlock`."""
        out: Tensor = self.attention(self.block(x, time))
        return out


class Resize(nn.Module):
    """Halve or double the edge of a map, or keep it; then a 3x3 convolution."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, stride=2 if scale < 1 else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) to (batch, channels, scale h, scale w)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=self.scale) if self.scale > 1 else x)
        return out


def embedding(times: Tensor, width: int) -> Tensor:
    """Sines and cosines of the times (batch,) at wavelengths from 2 pi to 20000 pi: (batch, width)."""
    rates = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=times.device) / (width // 2))
    angles = times.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class UNet(nn.Module):
    """Predicts the noise in an image.

    With the default shape it has 5 attention modules of width 64 and 16 of width 128, so that its q and v weights are the
    paper's: 10 of 64x64 and 32 of 128x128.
    """

    def __init__(self, shape: UNetShape) -> None:
        super().__init__()
        self.shape = shape
        widths = [shape.channels * m for m in shape.multipliers]
        points, time = shape.colours * shape.patch**2, 4 * shape.channels
        self.time = nn.Sequential(nn.Linear(shape.channels, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.first = nn.Conv2d(points, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        halved = [level < shape.halvings for level in range(len(widths) - 1)]
        kept = [widths[0]]  # widths of the maps that the way up takes back
        for level, width in enumerate(widths):
            for _ in range(shape.blocks):
                self.down.append(Stage(kept[-1], width, time))
                kept.append(width)
            if level < len(halved):
                self.down.append(Resize(width, 0.5 if halved[level] else 1))
                kept.append(width)
        self.middle = Stage(widths[-1], widths[-1], time)
        self.after = ResidualBlock(widths[-1], widths[-1], time)
        last = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(shape.blocks + 1):
                self.up.append(Stage(last + kept.pop(), width, time))
                last = width
            if level:
                self.up.append(Resize(width, 2 if halved[level - 1] else 1))
        self.norm = _norm(last)
        self.last = _zeroed(nn.Conv2d(last, points, 3, padding=1))

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        """Noisy images (batch, colours, size, size) and their times (batch,) to the noise's estimate, same shape."""
        time = self.time(embedding(times, self.shape.channels))
        x = self.first(F.pixel_unshuffle(images, self.shape.patch))
        kept = [x]
        for module in self.down:
            x = module(x, time) if isinstance(module, Stage) else module(x)
            kept.append(x)
        x = self.after(self.middle(x, time), time)
        for module in self.up:
            x = module(torch.cat([x, kept.pop()], dim=1), time) if isinstance(module, Stage) else module(x)
        out: Tensor = F.pixel_shuffle(self.last(F.silu(self.norm(x))), self.shape.patch)
        return out


def build(shape: UNetShape, seed: int, device: str | torch.device = "cpu") -> UNet:
    """An untrained U-Net whose first weights `seed` fixes; the caller's random state is left as it was.

    Its channels lie last, with which a step on a processor takes four fifths of the time.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet(shape).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
    return model


def attention_shapes(model: nn.Module, targets: Sequence[str] = TARGETS) -> dict[str, tuple[int, int]]:
    """(out, in) of the attention modules' projections of the given names, by module name."""
    return {
        f"{name}.{target}": (module.q.out_channels, module.q.in_channels)
        for name, module in model.named_modules()
        if isinstance(module, Attention)
        for target in targets
    }
