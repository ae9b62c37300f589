"""Logits, loss and every gradient equal HF transformers' on small random models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dsv3.checkpoint.load import load_weights
from dsv3.config.strict import build
from dsv3.hf.safetensors_reader import read_headers
from tests.hf.pairs import our_name, pair

transformers = pytest.importorskip("transformers")


def yarn(**changes: Any) -> dict[str, Any]:
    scaling = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    return {"rope_parameters": {**scaling, **changes}}


V3 = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
ONE_GROUP = {**V3, "n_group": 1, "topk_group": 1}
BOTH_707 = {"mscale": 0.707, "mscale_all_dim": 0.707}
V2 = {"norm_topk_prob": False, "scoring_func": "softmax"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("deepseek_v3", {**V3, **yarn()}),
    "v3 without yarn": ("deepseek_v3", V3),
    "moonlight": ("deepseek_v3", {**ONE_GROUP, "q_lora_rank": None, "rms_norm_eps": 1e-5}),
    "kimi k2": (
        "deepseek_v3",
        {
            **ONE_GROUP,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            **yarn(rope_theta=50000.0, factor=32.0, beta_fast=1.0, beta_slow=1.0),
        },
    ),
    "v3 with two mscales": ("deepseek_v3", {**V3, **yarn(mscale=0.707, mscale_all_dim=1.0)}),
    "v2 lite": ("deepseek_v2", {**V2, "q_lora_rank": None, "topk_method": "greedy", **yarn(**BOTH_707)}),
    "v2": (
        "deepseek_v2",
        {
            **V2,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            **yarn(),
        },
    ),
}


@pytest.mark.parametrize("length", [24, 80])
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_transformers(tmp_path: Path, case: str, length: int) -> None:
    architecture, changes = CASES[case]
    theirs, ours = pair(architecture, tmp_path, **changes)
    tokens = torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(2))
    expected, found = theirs(tokens).logits, ours(tokens).logits
    assert 0.3 < expected.std() < 10
    assert (found - expected).abs().max() / expected.std() < 1e-5
    for logits in (expected, found):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        gradient = gradients.pop(our_name(name))
        assert parameter.grad is not None
        assert gradient is not None, name
        error = (gradient - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4, f"{name}: {error:.1e}"
    assert not gradients


@pytest.mark.parametrize("stacked", [True, False])
def test_weights_that_transformers_saves_are_read_as_the_same(tmp_path: Path, stacked: bool) -> None:
    """Experts are saved one by one, or as the stacks that transformers 5 computes with."""
    theirs, ours = pair("deepseek_v3", tmp_path, **V3)
    theirs.save_pretrained(tmp_path, save_original_format=not stacked)  # type: ignore[operator]
    names = read_headers(tmp_path)
    assert ("model.layers.1.mlp.experts.gate_up_proj" in names) is stacked
    assert ("model.layers.1.mlp.experts.0.gate_proj.weight" in names) is not stacked
    read = build(replace(ours.config, mtp_depths=0))
    load_weights([read], tmp_path)
    expected = ours.state_dict()
    assert not [name for name, tensor in read.state_dict().items() if not torch.equal(tensor, expected[name])]
