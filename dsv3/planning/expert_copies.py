"""How many copies of a token travel to experts, on average, when every choice of experts is as likely."""

from dataclasses import dataclass
from math import comb

from dsv3.config.model import MoEConfig


@dataclass(frozen=True)
class Level:
    """One exchange of parallel/expert.py: a token's copies among `ranks` ranks, its own among them.

    `copies` is what the level makes of one token of the rank's own, `experts` lie behind each rank.
    """

    ranks: int
    copies: float
    experts: int

    @property
    def sent(self) -> float:
        """Copies of a token that leave the rank."""
        return self.copies * (self.ranks - 1) / self.ranks


def levels(moe: MoEConfig, ep: int, ranks_per_node: int | None) -> list[Level]:
    """The exchanges of an MoE layer: none, one, or between nodes and then within one."""
    if ep == 1:
        return []
    node = ranks_per_node or ep
    flat = Level(ep, ep * hit(moe, moe.num_experts // ep), moe.num_experts // ep)
    if ep <= node or ep % node:
        return [flat]
    nodes, behind = ep // node, moe.num_experts * node // ep
    return [Level(nodes, nodes * hit(moe, behind), behind), Level(node, flat.copies, flat.experts)]


def hit(moe: MoEConfig, experts: int) -> float:
    """The probability that a token chooses one of `experts` consecutive ones.

    With a group limit top_k_groups groups are chosen first and top_k experts among theirs. Exact where
    the experts are a part of a group or several whole ones, as on ranks; else the limit is left out.
    """
    size = moe.num_experts // moe.num_groups
    limited = moe.top_k_groups < moe.num_groups and (size % experts == 0 or experts % size == 0)
    if not limited:
        return _drawn(moe.num_experts, experts, moe.top_k)
    spanned, open_to = max(1, experts // size), moe.top_k_groups * size
    ways = comb(moe.num_groups, moe.top_k_groups)
    return sum(
        comb(spanned, n)
        * comb(moe.num_groups - spanned, moe.top_k_groups - n)
        / ways
        * _drawn(open_to, n * min(experts, size), moe.top_k)
        for n in range(1, min(spanned, moe.top_k_groups) + 1)
    )


def _drawn(all_of: int, some: int, drawn: int) -> float:
    """The probability that `drawn` of `all_of` hold one of `some`."""
    return 1 - comb(all_of - some, drawn) / comb(all_of, drawn)
