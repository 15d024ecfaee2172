"""An adapter's parameters by their names, and among them the magnitudes of the rows of its weights (DoRA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from superlora_tn.declare.fold import Group
from superlora_tn.declare.joins import Magnitude
from superlora_tn.declare.parts import SpecError
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.based import Read, row_norms
from superlora_tn.update.placed import Placed


class Magnitudes(Placed):
    """The parameter ``magnitude`` where the declaration's join has numbers for rows: one a row, one weight behind the other.

    Attributes:
        spec, group: of the adapter.
    """

    spec: AdapterSpec
    group: Group

    def _add_magnitudes(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make the parameter; its values are W's, see `_measure`."""
        if count := self.spec.magnitudes(self.group):
            self.register_parameter("magnitude", nn.Parameter(torch.ones(count, dtype=dtype, device=device)))
        first = 0
        self._rows: dict[str, slice] = {}
        for name in self.group.members:
            last = first + self.group.rows_of(name)
            self._rows[name], first = slice(first, last), last

    def magnitude_of(self, name: str) -> Tensor:
        """The magnitudes of a weight's rows, (out,), a view."""
        return self._viewed("magnitude")[self._rows[name]]

    def beside(self) -> list[Tensor]:
        """The magnitudes of all weights, where there are any."""
        return [self._viewed("magnitude")] if self.spec.join is not None and self.spec.join.has_rows else []

    def _measure(self, read: Read) -> None:
        """Write the norms of W's rows into the magnitudes, and ones where they scale what is multiplied."""
        normed = isinstance(self.spec.join, Magnitude)
        for name in self._rows if self.beside() else ():
            own = self.magnitude_of(name)
            own.copy_(row_norms(read(name)) if normed else torch.ones_like(own))

    def _viewed(self, name: str) -> Tensor:
        """A parameter or buffer, also where FSDP1 has put a view of its flat parameter in its place, as it does in backward."""
        node = self._parameters.get(name, self._buffers.get(name, self.__dict__.get(name)))
        if node is not None and (name not in self.__dict__ or (type(node) is Tensor and node._is_view())):
            return node
        raise SpecError(
            f"the adapter's node {name.removeprefix('node_')!r} is no parameter any more (pruned, parametrized or deleted); "
            "adapters keep their nodes as plain parameters. Undo that, or train the network you want from the start."
        )
