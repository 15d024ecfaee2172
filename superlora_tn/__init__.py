"""superlora_tn: every low-rank and tensor adapter as one declared tensor network, on any torch model.

import superlora_tn as sl
tuned = sl.attach(model, sl.lokr(rank=8), targets=["q_proj", "v_proj"])
"""

from superlora_tn.contraction.backend import BackendError, backend, backends
from superlora_tn.contraction.plan import choose, make_plan
from superlora_tn.contraction.profile import Device
from superlora_tn.contraction.search import PlanError
from superlora_tn.declare.fold import FlatFold, PhysicalFold
from superlora_tn.declare.joins import Magnitude, Multiply
from superlora_tn.declare.maps import Compose, Fastfood, Shuffle
from superlora_tn.declare.node_maps import (
    Cayley,
    Circulant,
    Exponential,
    Fourier,
    Haar,
    Householder,
    Identity,
    Normalised,
    Same,
    Selected,
    Softmax,
    Spread,
)
from superlora_tn.declare.parts import (
    CP,
    Base,
    Dense,
    Frozen,
    Hadamard,
    Kronecker,
    Network,
    Node,
    SpecError,
    Sum,
    TensorTrain,
    Tucker,
)
from superlora_tn.declare.rows import Rows
from superlora_tn.files.own import CheckpointError
from superlora_tn.files.read import read
from superlora_tn.model.attach import attach, load, tuned
from superlora_tn.model.kinds import Kind, LayerError
from superlora_tn.model.recognise import register_layer
from superlora_tn.model.several import rows, use
from superlora_tn.model.targets import AttachError, match
from superlora_tn.model.tuned import Tuned
from superlora_tn.network.budget import Budget, Choice, fit, within
from superlora_tn.network.convolved import conv_lokr, conv_lora
from superlora_tn.network.expand import lower
from superlora_tn.network.joined import dora
from superlora_tn.network.mapped import (
    boft,
    c3a,
    delora,
    fourier_ft,
    goft,
    hra,
    moka,
    oft,
    psoft,
    shira,
    tiny_lora,
    uni_lora,
    vb_lora,
    waveft,
)
from superlora_tn.network.relatives import (
    abba,
    adalora,
    cara,
    compacter,
    fact_tk,
    fact_tt,
    gralora,
    hira,
    kradapter,
    krona,
    lora_fa,
    lora_xs,
    loretta,
    lorta_cp,
    metatt,
    miss,
    quan_ta,
    randlora,
    share_lora,
    svft,
    tenslora,
    tera,
    tied_lora,
    tt_lora,
)
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import dense, loha, lokr, lonkr, lora, lorta, lotr, superlora, vera
from superlora_tn.tools import geometry
from superlora_tn.tools.allocate import RankAllocator
from superlora_tn.tools.combine import Combined, combine
from superlora_tn.tools.decompose import Decomposition, FitError, decompose
from superlora_tn.tools.extract import Extracted, convert, extract
from superlora_tn.tools.measure import calibrate
from superlora_tn.tools.origins import corda, eva, lora_ga, olora, orthogonal, pissa, start
from superlora_tn.tools.probe import Probe, probe
from superlora_tn.tools.suggest import Suggestions, suggest
from superlora_tn.verification import Certificate, VerifyError, verify, verify_reductions

__version__ = "0.1.0"
__all__ = [
    "CP",
    "AdapterSpec",
    "AttachError",
    "BackendError",
    "Base",
    "Budget",
    "Cayley",
    "Certificate",
    "CheckpointError",
    "Choice",
    "Circulant",
    "Combined",
    "Compose",
    "Decomposition",
    "Dense",
    "Device",
    "Exponential",
    "Extracted",
    "Fastfood",
    "FitError",
    "FlatFold",
    "Fourier",
    "Frozen",
    "Haar",
    "Hadamard",
    "Householder",
    "Identity",
    "Kind",
    "Kronecker",
    "LayerError",
    "Magnitude",
    "Multiply",
    "Network",
    "Node",
    "Normalised",
    "PhysicalFold",
    "PlanError",
    "Probe",
    "RankAllocator",
    "Rows",
    "Same",
    "Selected",
    "Shuffle",
    "Softmax",
    "SpecError",
    "Spread",
    "Suggestions",
    "Sum",
    "TensorTrain",
    "Tucker",
    "Tuned",
    "VerifyError",
    "abba",
    "adalora",
    "attach",
    "backend",
    "backends",
    "boft",
    "c3a",
    "calibrate",
    "cara",
    "choose",
    "combine",
    "compacter",
    "conv_lokr",
    "conv_lora",
    "convert",
    "corda",
    "decompose",
    "delora",
    "dense",
    "dora",
    "eva",
    "extract",
    "fact_tk",
    "fact_tt",
    "fit",
    "fourier_ft",
    "geometry",
    "goft",
    "gralora",
    "hira",
    "hra",
    "kradapter",
    "krona",
    "load",
    "loha",
    "lokr",
    "lonkr",
    "lora",
    "lora_fa",
    "lora_ga",
    "lora_xs",
    "loretta",
    "lorta",
    "lorta_cp",
    "lotr",
    "lower",
    "make_plan",
    "match",
    "metatt",
    "miss",
    "moka",
    "oft",
    "olora",
    "orthogonal",
    "pissa",
    "probe",
    "psoft",
    "quan_ta",
    "randlora",
    "read",
    "register_layer",
    "rows",
    "share_lora",
    "shira",
    "start",
    "suggest",
    "superlora",
    "svft",
    "tenslora",
    "tera",
    "tied_lora",
    "tiny_lora",
    "tt_lora",
    "tuned",
    "uni_lora",
    "use",
    "vb_lora",
    "vera",
    "verify",
    "verify_reductions",
    "waveft",
    "within",
]
