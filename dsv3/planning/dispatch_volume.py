"""Token dispatch volume: rows per token that expert parallelism sends, on average under uniform routing.

With moe.forced_balance a token's experts are neighbours (model/router.py deals them round-robin), so that its
row goes to fewer ranks and nodes than a real token's.
"""

from dataclasses import dataclass
from math import comb, gcd

from dsv3.config.model import MoEConfig


@dataclass(frozen=True)
class DispatchLevel:
    """One exchange of parallel/expert_parallel.py: all ranks, nodes only, or the ranks within a node."""

    ranks: int
    """Ranks of the exchange, this one among them."""
    rows: float
    """Rows per token: the ranks that have one of its experts, this rank included."""
    experts: int
    """Experts behind each rank."""

    @property
    def sent(self) -> float:
        """Rows per token that leave the rank."""
        return self.rows * (self.ranks - 1) / self.ranks


def dispatch_levels(moe: MoEConfig, ep: int, ranks_per_node: int | None) -> list[DispatchLevel]:
    """Return the exchanges of an MoE layer: none, one, or one between nodes and then one within a node."""
    if ep == 1:
        return []
    node = ranks_per_node or ep
    per_rank = moe.num_experts // ep
    flat = DispatchLevel(ep, ep * dispatch_probability(moe, per_rank), per_rank)
    if ep <= node or ep % node:
        return [flat]
    nodes, per_node = ep // node, moe.num_experts * node // ep
    return [
        DispatchLevel(nodes, nodes * dispatch_probability(moe, per_node), per_node),
        DispatchLevel(node, flat.rows, flat.experts),
    ]


def dispatch_probability(moe: MoEConfig, experts: int) -> float:
    """Return the probability that a token chooses one of `experts` consecutive experts.

    With a group limit top_k_groups groups are chosen first and then top_k experts among theirs. The result is
    exact if the experts are part of a group or several whole groups, as on ranks; else it ignores the limit.
    """
    if moe.forced_balance:
        return _round_robin(moe, experts)
    size = moe.num_experts // moe.num_groups
    limited = moe.top_k_groups < moe.num_groups and (size % experts == 0 or experts % size == 0)
    if not limited:
        return _at_least_one(moe.num_experts, experts, moe.top_k)
    # Sum over the number n of chosen groups among those that the experts span.
    spanned, open_to = max(1, experts // size), moe.top_k_groups * size
    ways = comb(moe.num_groups, moe.top_k_groups)
    return sum(
        comb(spanned, n)
        * comb(moe.num_groups - spanned, moe.top_k_groups - n)
        / ways
        * _at_least_one(open_to, n * min(experts, size), moe.top_k)
        for n in range(1, min(spanned, moe.top_k_groups) + 1)
    )


def _round_robin(moe: MoEConfig, experts: int) -> float:
    """Return the same where token t has the experts t x top_k, t x top_k + 1, ... modulo their number."""
    every, top_k = moe.num_experts, moe.top_k
    starts = range(0, every, gcd(top_k, every))
    runs = every // experts
    met = sum(len({(start + n) % every // experts for n in range(top_k)}) for start in starts)
    return met / len(starts) / runs


def _at_least_one(of: int, marked: int, drawn: int) -> float:
    """Return the probability that `drawn` of `of` items contain at least one of `marked` items."""
    return 1 - comb(of - marked, drawn) / comb(of, drawn)
