"""The two worlds of the demo: digits printed in matplotlib's fonts, and scikit-learn's handwritten scans.

Both come as ``images`` (count, 1, size, size) float32 in [0, 1], where 1 is full ink and 0 is paper,
and ``labels`` (count,) int64 in 0..9.  Nothing is downloaded: the fonts ship with matplotlib, the
scans with scikit-learn.
"""

import math
from pathlib import Path
from typing import Literal

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

Split = Literal["train", "test"]

# The files in matplotlib's fonts/ttf whose digits are digits: LastResort draws placeholders, cmsy10 and
# cmex10 draw symbols, the STIXSiz*, STIXNonUni* and *Display files have no digits.
TRAIN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
    "cmb10",
    "cmmi10",
    "cmti10",
    "cmtt10",
)
# Never seen in pre-training: a face of each family, and Computer Modern's sans, a design on its own.
TEST_FONTS = ("DejaVuSans-BoldOblique", "DejaVuSerif-Italic", "STIXGeneralBol", "cmr10", "cmss10")

_POINT_SIZE = 96  # the glyphs are drawn this large once, then shrunk, so that their edges are smooth
_GLYPH_HEIGHT = 0.8  # of the canvas: leaves room to tilt a digit without cutting its corners
_OVERSAMPLE = 2  # the warped glyph is sampled on a grid this much finer than the image, then averaged
_CHUNK = 4096  # images rendered at once; bounds the memory of the sampling grids


def printed_digits(count: int, seed: int, split: Split = "train", size: int = 16, worn: bool = True) -> tuple[Tensor, Tensor]:
    """Draw ``count`` (at least 1) randomly distorted printed digits; ``split`` picks the fonts, which are disjoint.

    Worn ones are printed badly: ink and paper of random tones, and noise.

    Returns images (count, 1, size, size) float32 in [0, 1] and labels (count,) int64.
    """
    fonts = TRAIN_FONTS if split == "train" else TEST_FONTS
    canvas = size * _OVERSAMPLE
    atlas = torch.stack([_glyphs(name, canvas) for name in fonts])
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    font = torch.randint(len(fonts), (count,), generator=generator)
    chunks = []
    for f, d in zip(torch.split(font, _CHUNK), torch.split(labels, _CHUNK), strict=True):
        clean = F.avg_pool2d(_warp(atlas[f, d], generator), _OVERSAMPLE)
        chunks.append(_degrade(clean, generator) if worn else clean)
    return torch.cat(chunks), labels


def scanned_digits(split: Split, seed: int = 0, size: int = 16) -> tuple[Tensor, Tensor]:
    """Return one side of a stratified split of scikit-learn's 1797 scans: 900 to train on, 897 to test.

    The 8x8 scans are enlarged bilinearly.  ``seed`` fixes the split: use one seed for both sides.
    Returns images (count, 1, size, size) float32 in [0, 1] and labels (count,) int64.
    """
    scans = load_digits()
    train, test = train_test_split(range(len(scans.target)), train_size=900, stratify=scans.target, random_state=seed)
    rows = train if split == "train" else test
    images = torch.tensor(scans.images[rows], dtype=torch.float32).unsqueeze(1) / 16
    enlarged = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return enlarged, torch.tensor(scans.target[rows], dtype=torch.int64)


def _glyphs(font: str, canvas: int) -> Tensor:
    """Draw the ten digits of a bundled font: (10, 1, canvas, canvas) float32 in [0, 1]."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    face = ImageFont.truetype(str(path), _POINT_SIZE)
    return torch.stack([_glyph(face, digit, canvas) for digit in "0123456789"])


def _glyph(face: ImageFont.FreeTypeFont, digit: str, canvas: int) -> Tensor:
    """Draw one digit centred and scaled to a common height: (1, canvas, canvas) float32 in [0, 1]."""
    left, top, right, bottom = face.getbbox(digit)
    drawn = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)), 0)
    ImageDraw.Draw(drawn).text((-left, -top), digit, font=face, fill=255)
    height = round(canvas * _GLYPH_HEIGHT)
    width = min(canvas, max(1, round(drawn.width * height / drawn.height)))
    placed = Image.new("L", (canvas, canvas), 0)
    shrunk = drawn.resize((width, height), Image.Resampling.BOX)
    placed.paste(shrunk, ((canvas - width) // 2, (canvas - height) // 2))
    pixels = torch.frombuffer(bytearray(placed.tobytes()), dtype=torch.uint8)
    return pixels.view(1, canvas, canvas).float() / 255


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Draw ``count`` numbers uniformly from [low, high]."""
    return low + (high - low) * torch.rand(count, generator=generator)


def _warp(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """Stretch, slant, turn and shift each glyph at random: (n, 1, canvas, canvas) to the same shape."""
    n = len(glyphs)
    angle = uniform(n, -15, 15, generator) * (math.pi / 180)
    slant = uniform(n, -0.2, 0.2, generator)
    # grid_sample maps the image back to the glyph, hence one over the enlargement.
    across = 1 / uniform(n, 0.7, 1.2, generator)
    down = 1 / uniform(n, 0.8, 1.2, generator)
    cos, sin = angle.cos(), angle.sin()
    shift = uniform(2 * n, -0.12, 0.12, generator).view(n, 2)
    top = torch.stack([across * (cos + slant * sin), across * (slant * cos - sin), shift[:, 0]], dim=1)
    low = torch.stack([down * sin, down * cos, shift[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([top, low], dim=1), list(glyphs.shape), align_corners=False)
    return F.grid_sample(glyphs, grid, align_corners=False)


def _degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Print badly: random ink strength and paper tone per image, noise per pixel; the shape is kept."""
    n = len(images)
    ink = uniform(n, 0.6, 1.0, generator).view(n, 1, 1, 1)
    paper = uniform(n, 0.0, 0.2, generator).view(n, 1, 1, 1)
    noise = uniform(n, 0.0, 0.1, generator).view(n, 1, 1, 1)
    speckle = noise * torch.randn(images.shape, generator=generator)
    return (paper + (ink - paper) * images + speckle).clamp(0, 1)
