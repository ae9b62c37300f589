"""Activation checkpointing changes memory and nothing else."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from dsv3.config.parallel import CompileBackend, RecomputeMode, SavedOp
from dsv3.model.attention import LatentAttention
from dsv3.model.transformer import Transformer
from dsv3.parallel.activation_checkpoint import SAC_SAVE_LIST, ActivationCheckpointing, ops_to_save
from dsv3.parallel.compile import Compile
from tests.harness.operators import Operators
from tests.reference import MODEL, tiny_model, tokens

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, -1, -1, -1]])


def record_attention_runs(model: Transformer) -> list[str]:
    """Return a list that gets the name of each attention every time it runs."""
    ran: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, LatentAttention):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    return ran


def train(model: Transformer, documents: Tensor | None) -> list[Tensor]:
    """Pass forward and backward; return logits, balance loss and all gradients."""
    output = model(tokens(2, 9), documents)
    loss = output.logits.square().mean() + output.balance_loss
    for logits in output.mtp_logits:
        loss = loss + logits.square().mean()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return [output.logits, *output.mtp_logits, output.balance_loss, *gradients]


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_full_recomputation_gives_the_same_bits_and_counts_the_load_once(documents: Tensor | None) -> None:
    config = replace(MODEL, mtp_depths=2)
    plain, recomputed = tiny_model(config), tiny_model(config)
    ActivationCheckpointing(RecomputeMode.full)(recomputed)
    ran = record_attention_runs(recomputed)
    for mine, right in zip(train(recomputed, documents), train(plain, documents), strict=True):
        assert torch.equal(mine, right)
    for router, other in zip(recomputed.routers(), plain.routers(), strict=True):
        assert other.load.sum() == 2 * 9 * 3
        assert torch.equal(router.load, other.load)
    # Each layer ran twice, the MTP depths' too.
    names = [name for name, m in recomputed.named_modules() if isinstance(m, LatentAttention)]
    assert sorted(ran) == sorted(2 * names)
    assert len(names) == 4


@pytest.mark.parametrize(
    ("keep", "kept", "repeated"),
    [
        ([SavedOp.attention], "blocked_attention", "_grouped_mm"),
        ([SavedOp.experts], "_grouped_mm", "blocked_attention"),
        ([SavedOp.matmuls], "mm", "blocked_attention"),
    ],
)
def test_selective_recomputation_repeats_all_but_what_it_keeps(
    keep: list[SavedOp], kept: str, repeated: str
) -> None:
    counts = {}
    for mode in (RecomputeMode.none, RecomputeMode.selective, RecomputeMode.full):
        model = tiny_model()
        ActivationCheckpointing(mode, keep)(model)
        with Operators() as calls:
            results = train(model, DOCUMENTS)
        counts[mode] = (calls.names, results)
    none, selective, full = (counts[mode][0] for mode in counts)
    assert none[kept] == selective[kept] < full[kept]
    assert none[repeated] < selective[repeated] == full[repeated]
    assert all(map(torch.equal, counts[RecomputeMode.none][1], counts[RecomputeMode.selective][1]))


def test_every_fused_attention_of_pytorch_is_an_op_that_is_kept() -> None:
    """A new kernel of a new release fails here until it stands in the list."""
    names = {schema.name.replace("::", ".") for schema in torch._C._jit_get_all_schemas()}
    attention = re.compile(
        r"aten\._(scaled_dot_product_\w*attention\w*|(flash|efficient|cudnn)_attention_forward)"
    )
    # The math path is made of other ops; its variants for MPS and for tests are no kernels of a GPU.
    other = re.compile(r"backward|_math|quantized|_no_dropout_inplace")
    fused = {name for name in names if attention.fullmatch(name) and not other.search(name)}
    assert len(fused) >= 8
    assert fused <= set(SAC_SAVE_LIST[SavedOp.attention])
    assert torch.ops.torch_attn._varlen_attn.default in ops_to_save([SavedOp.attention])


def test_without_recomputation_each_layer_runs_once() -> None:
    model = tiny_model()
    ActivationCheckpointing(RecomputeMode.none)(model)
    ran = record_attention_runs(model)
    train(model, None)
    assert len(ran) == len(set(ran)) == 3


def test_names_of_parameters_stay_as_they_are() -> None:
    model = tiny_model()
    before = list(model.state_dict())
    ActivationCheckpointing(RecomputeMode.full)(model)
    assert list(model.state_dict()) == before


@pytest.mark.slow
def test_compiled_layers_run_compiled_and_what_is_kept_is_not_run_again() -> None:
    compiled = torch._dynamo.utils.counters["frames"]
    with Operators() as calls:
        plain = train(tiny_model(), DOCUMENTS)
    once = calls.names["blocked_attention"]
    assert once >= 3
    for mode, runs in ((RecomputeMode.selective, 1), (RecomputeMode.full, 2)):
        model = tiny_model()
        torch._dynamo.reset()
        before = compiled["ok"]
        Compile(True, CompileBackend.aot_eager)(model, torch.device("cpu"))
        ActivationCheckpointing(mode, [SavedOp.attention])(model)
        with Operators() as calls:
            results = train(model, DOCUMENTS)
        assert compiled["ok"] > before
        assert calls.names["blocked_attention"] == runs * once
        for mine, right in zip(results, plain, strict=True):
            assert torch.allclose(mine, right, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_compiled_layers_are_compiled_once_more_for_padding_and_not_for_every_length() -> None:
    model = tiny_model(replace(MODEL, mtp_depths=0)).eval()
    torch._dynamo.reset()
    Compile(True, CompileBackend.aot_eager)(model, torch.device("cpu"))
    plain = tiny_model(replace(MODEL, mtp_depths=0)).eval()
    with torch.no_grad():
        model(tokens(2, 9))
        before = torch._dynamo.utils.counters["frames"]["ok"]
        model(tokens(2, 9), lengths=[4, 9])
        assert torch._dynamo.utils.counters["frames"]["ok"] > before
        with torch._dynamo.config.patch(error_on_recompile=True):
            for lengths in ([9, 2], [0, 1], [0, 0], None):
                found, expected = (each(tokens(2, 9), lengths=lengths).logits for each in (model, plain))
                assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
