"""Rotary numbers of a config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""

from dsv3.checkpoint.released.values import HFValues
from dsv3.model.config import RopeConfig, RopeScaling

_KNOWN = {
    "rope_theta",
    "rope_type",
    "type",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
}
# Keys of HF's yarn that the released code does not have, with the values that change nothing.
_NEUTRAL = {"attention_factor": (None,), "truncate": (True,)}


def rope_from_hf(hf: HFValues) -> RopeConfig:
    """The rotary embedding; UserError for what is missing, unknown or said twice and differently."""
    length = hf.get("max_position_embeddings", int)
    nodes = [node for key in ("rope_parameters", "rope_scaling") if (node := hf.node(key)) is not None]
    found = [_rope(hf, node, length) for node in nodes]
    if len(found) == 2 and found[0] != found[1]:
        raise hf.error("rope_scaling", nodes[1].values, "is not what rope_parameters says")
    return found[0] if found else RopeConfig(theta=_theta(hf, None), original_sequence_length=length)


def _rope(hf: HFValues, node: HFValues, length: int) -> RopeConfig:
    theta, kind = _theta(hf, node), _kind(node)
    for key, value in node.values.items():
        if key not in _KNOWN and value not in _NEUTRAL.get(key, ()):
            raise node.error(key, value, f"is not supported; known keys: {', '.join(sorted(_KNOWN))}")
    if kind == "default":
        return RopeConfig(theta=theta, original_sequence_length=length)
    return RopeConfig(
        theta=theta,
        scaling=RopeScaling.yarn,
        factor=node.get("factor", float),
        original_sequence_length=node.get("original_max_position_embeddings", int),
        beta_fast=node.get("beta_fast", float, 32.0),
        beta_slow=node.get("beta_slow", float, 1.0),
        # The defaults of the released code, which HF's come to as well.
        mscale=node.get("mscale", float, 1.0),
        mscale_all_dim=node.get("mscale_all_dim", float, 0.0),
    )


def _theta(hf: HFValues, node: HFValues | None) -> float:
    """`rope_theta`, which stands beside the scaling or in it; the two must agree."""
    outside: float | None = hf.get("rope_theta", float, None)
    inside: float | None = None if node is None else node.get("rope_theta", float, None)
    if node is not None and None not in (outside, inside) and outside != inside:
        raise hf.error("rope_theta", outside, f"but {node.inside}rope_theta={inside}: which one is right?")
    theta = outside if inside is None else inside
    if theta is None:
        raise hf.missing("rope_theta", "nor does rope_parameters: every rotary model needs it")
    return theta


def _kind(node: HFValues) -> str:
    kinds = {
        key: node.require(key, ("default", "yarn"), None)
        for key in ("rope_type", "type")
        if node.values.get(key) is not None
    }
    if len(set(kinds.values())) > 1:
        raise node.error("rope_type", kinds["rope_type"], f"but {node.inside}type={kinds['type']!r}")
    if not kinds and set(node.values) - {"rope_theta"}:
        raise node.missing("rope_type", "which says how it scales")
    return next(iter(kinds.values()), "default")
