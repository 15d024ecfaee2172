"""superlora_tn: every low-rank and tensor adapter as one declared tensor network, on any torch model.

import superlora_tn as sl
tuned = sl.attach(model, sl.lokr(rank=8), targets=["q_proj", "v_proj"])
"""

from superlora_tn import geometry
from superlora_tn.attach import Tuned, attach, load, tuned
from superlora_tn.budget import Budget, Choice, fit, within
from superlora_tn.checkpoint import CheckpointError
from superlora_tn.execute import BackendError, backend, backends
from superlora_tn.fold import FlatFold, PhysicalFold
from superlora_tn.graph import lower
from superlora_tn.layers import LayerError
from superlora_tn.maps import Compose, Fastfood, Shuffle
from superlora_tn.measure import calibrate
from superlora_tn.nodes import CP, Dense, Hadamard, Kronecker, Network, Node, SpecError, TensorTrain, Tucker
from superlora_tn.plan import PlanError, choose, make_plan
from superlora_tn.spec import AdapterSpec
from superlora_tn.steps import Device
from superlora_tn.targets import AttachError, match
from superlora_tn.variants import dense, loha, lokr, lonkr, lora, lorta, lotr, superlora, vera
from superlora_tn.verification import Certificate, VerifyError, verify, verify_reductions

__version__ = "0.1.0"
__all__ = [
    "CP",
    "AdapterSpec",
    "AttachError",
    "BackendError",
    "Budget",
    "Certificate",
    "CheckpointError",
    "Choice",
    "Compose",
    "Dense",
    "Device",
    "Fastfood",
    "FlatFold",
    "Hadamard",
    "Kronecker",
    "LayerError",
    "Network",
    "Node",
    "PhysicalFold",
    "PlanError",
    "Shuffle",
    "SpecError",
    "TensorTrain",
    "Tucker",
    "Tuned",
    "VerifyError",
    "attach",
    "backend",
    "backends",
    "calibrate",
    "choose",
    "dense",
    "fit",
    "geometry",
    "load",
    "loha",
    "lokr",
    "lonkr",
    "lora",
    "lorta",
    "lotr",
    "lower",
    "make_plan",
    "match",
    "superlora",
    "tuned",
    "vera",
    "verify",
    "verify_reductions",
    "within",
]
