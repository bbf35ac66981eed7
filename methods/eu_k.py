"""EU-k: draw the last k layers anew and train only these on the retain set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from letheon.engine.checkpoints.method_state import State
from letheon.engine.memory.shards import own_parts
from letheon.engine.method import Definition, Run
from letheon.engine.models.initial import fresh_seed, initial_copy, require_resets
from letheon.methods.cf_k import CfK
from letheon.methods.layers import choose_layers


@dataclass(frozen=True)
class EuK(CfK):
    """EU-k, exact unlearning of k layers: CF-k, from new weights in the last k layers.

    Goel et al. 2022. The new weights are those an untrained network of the same architecture has at
    retraining's seed (at the run's own they would be the original's start), with its batch-norm
    statistics. Epochs and rate are fine-tuning's; k = 2 is ours, never run beyond the digits.
    """

    name: ClassVar[str] = "eu-k"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="EU-k",
        reads="retain",
        formula="CE(R), all but the last k layers frozen, these from new weights",
        cost="1/3 to 1",
        source="Goel et al. 2022",
    )

    def check(self, run: Run) -> None:
        """Refuse layers that the network does not have, or whose weights cannot be drawn anew."""
        super().check(run)
        require_resets(run.model)

    def prepare(self, run: Run) -> State:
        """Draw the layers anew and freeze the others."""
        whole = run.model if run.shards is None else run.shards.host_copy()
        fresh = initial_copy(whole, fresh_seed(run.seed)).net.state_dict()
        own = own_parts(run.model.net.state_dict())
        names = choose_layers(run, self.layers, self.k)
        homes = {name.rpartition(".")[0] for name in names}
        buffers = [
            key
            for key in own
            if key not in run.named_parameters and key.rpartition(".")[0] in homes
        ]
        with torch.no_grad():
            for key in names:
                own[key].copy_(run.own_part(fresh[key]))
            for key in buffers:
                own[key].copy_(fresh[key])
        return super().prepare(run)
