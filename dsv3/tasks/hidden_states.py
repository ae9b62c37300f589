"""What two models of the same weights make of the same tokens, layer by layer."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from dsv3.model.generation import inference
from dsv3.model.loss import cross_entropy_sum


def hidden_states(
    model: nn.Module, embedding: nn.Module, layers: Iterable[nn.Module], tokens: Tensor
) -> dict[str, Tensor]:
    """Hidden states after embedding and every layer, logits and loss, for `tokens` [batch, sequence]."""
    states: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        states[name] = (output[0] if isinstance(output, tuple) else output).detach()

    modules = {"embedding": embedding, **{f"layer {number}": layer for number, layer in enumerate(layers)}}
    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
    with inference(model):
        logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    loss = cross_entropy_sum(logits[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    return states | {"logits": logits, "loss": loss}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, by norms in fp32."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-30))
