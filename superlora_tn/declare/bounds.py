"""Bounds on work, far above any use: a declaration may come from a stranger's file, and is priced before it is believed.

What is below them costs less than a second and 200 MB beside the weights that are adapted; what is above is refused in
words, or planned by a heuristic. They stand here together, so that one can be weighed against another.
"""

from __future__ import annotations

# --- what a declaration may say --------------------------------------------------------------------------------------

MAX_RANK = 1 << 20
MAX_PARTS = 64
"""Parts of one product."""
MAX_DEPTH = 16
"""Levels of products in products."""
MAX_TERMS = 64
"""Terms that the sums of a declaration multiply out to: each has plans of its own."""
MAX_NODES = 256
"""Nodes of a `Network`."""
MAX_LEAVES = 1024
"""Parts of a whole declaration that are not products."""
MAX_AXES = 64
"""Indices of one node: torch has no tensor of more axes."""
MAX_PLACES = 4096
"""Indices of all nodes of a `Network`, each counted as often as it stands there."""
MAX_ORDER = 32
"""Modes of a flat fold, and its splits."""
MAX_SCALE = 1e30
"""The largest alpha. float32 ends at 3e38, and the scale multiplies numbers that are not all below 1."""

# --- what the weights may be ----------------------------------------------------------------------------------------

MAX_SIDE = 1 << 48
MAX_SHAPES = 4096
"""Different shapes among the weights: each is lowered and planned by itself, in about 0.1 ms at the least."""
MAX_SPLITTING = 1 << 20
"""Steps to find divisors of all modes' sizes, the fourth root of each: about 0.5 s."""

# --- what is built --------------------------------------------------------------------------------------------------

MAX_GRAPH_NODES = 1024
"""Nodes of one graph. Each is a tensor, a step of its plan and a line of its program."""
CROPPED_TIMES, CROPPED_SPARE = 2, 64
"""A mode that is cropped lies in one of at most so many times its size and the spare positions."""
PADDED_TIMES, PADDED_SPARE = 8, 1 << 21
"""Elements of a flat fold's tensors, surplus included: at most so many times the weights' elements and the spare ones.

Equal sides of order M hold up to 2**M times the elements, which small weights may (the spare ones make 64 MB in float32).
"""
NODES_TIMES, NODES_SPARE = 64, 1 << 24
"""Numbers of all nodes: at most so many times the weights' elements, and the spare ones (64 MB in float32)."""
TABLES_TIMES, TABLES_SPARE = 16, 1 << 12
"""Numbers of all tables of fixed maps: at most so many times the weights' elements and the spare ones."""
PEAK_TIMES, PEAK_SPARE = 64, 1 << 32
"""Numbers of an intermediate on the way to dW: at most so many times all nodes' and dW's, and the spare ones (16 GB)."""

# --- what a plan is searched for ------------------------------------------------------------------------------------

OUTER_UP_TO = 8
"""Operands up to which outer products are searched too: 3**n / 2 meetings of two sets, 3,025 of 8."""
MAX_MEETINGS = 3500
"""Meetings of two sets that the exact search looks at, about 20 us each."""
MAX_ROW = 33
"""Operands that are searched in rows (n**3 / 6 meetings each) where the exact search has too many; above, greedily."""
TRIED_TIMES = 64
"""Pairs of sets that are looked at for each meeting there may be: most share a tensor, or no index."""
MAX_GROWN = 8
"""Sets of nodes that are tried as what x meets once for all siblings, each set the last one and what hangs on it."""

# --- what is kept ---------------------------------------------------------------------------------------------------

KEPT_NODES = 1 << 16
"""Nodes of all graphs that are kept: about 0.5 kB each."""
KEPT_STEPS = 1 << 15
"""Steps of all plans that are kept: about 2 kB each."""
KEPT_LINES = 1 << 14
"""Steps of all programs that are kept, each with some lines of source and their code: about 4 kB."""
