"""task=verify: load an HF checkpoint here and with HF transformers, and compare the models layer by layer."""

import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dsv3.checkpoint.load import load_weights, stored_weights
from dsv3.config.overrides import override_key
from dsv3.config.precision import ComputeType, PrecisionConfig
from dsv3.config.root import Config
from dsv3.convert.live_export import has_layer, hf_weight_norms
from dsv3.errors import RunFailed, UserError
from dsv3.hf.config_json import family
from dsv3.hf.config_values import read_config
from dsv3.launch.job import Job
from dsv3.metrics.console import Console
from dsv3.metrics.progress import phase
from dsv3.model.generation import inference
from dsv3.model.head import cross_entropy_sum
from dsv3.parallel.parallelize import build_model
from dsv3.planning import parameters
from dsv3.tasks.setup import join_ranks

BYTES_PER_PARAMETER = 4
"""Both models are compared in fp32."""

GIB = 2**30


class VerifyTask:
    """Prints a table and a verdict; exits with code 1 where our model departs from HF's.

    With transformers installed and memory for both models, the table has the relative differences of the
    hidden states after every layer, the logits and the loss. Otherwise it has the norm of every weight, and
    loading checks the shapes. Where not even one model fits into memory, weights are read one by one.
    """

    def __init__(self, path: str, sequences: int, tokens: int, tolerance: float) -> None:
        self.path = Path(path)
        self.shape = (sequences, tokens)
        """Of the random input ids: [batch, sequence]."""
        self.tolerance = tolerance
        """Largest relative difference that counts as equal."""

    def run(self, job: Job) -> None:
        """Print the table to stderr and the verdict to stdout.

        RunFailed names the first layer that departs. A weight with a nonfinite value is refused at loading.
        """
        with join_ranks(job) as ranks:
            if ranks.world > 1:
                raise UserError(f"task=verify compares in one process: launch.nproc=1, not {ranks.world}")
            values, reason = self._measure(job, ranks.device)
        title, form = (
            (f"Norms of {self.path}", ".6g") if reason else (f"Relative difference, {self.path}", ".1e")
        )
        console = Console(stderr=True)
        console.table(title, [(name, format(value, form)) for name, value in values.items()])
        console.close()
        for name, value in values.items():
            if not reason and not value <= self.tolerance:  # NaN departs too
                raise RunFailed(f"departs from transformers first at {name}: {value:.1e}")
        print(f"{self.path}: {'loads; ' + reason if reason else 'equals transformers'}", flush=True)

    def _measure(self, job: Job, device: torch.device) -> tuple[dict[str, float], str]:
        """Return relative differences by layer and an empty reason.

        Without a second model to compare with, return norms by weight and the reason.
        """
        config = self._fp32_config(job)
        needed, free = BYTES_PER_PARAMETER * parameters.total(config.model), _free_memory(device)
        limit = min(free, job.hardware.memory_bytes or free)
        if needed > limit:
            reason = f"names, shapes and norms only: {_describe_need('the model', needed, limit)}"
            return hf_weight_norms(config.model, self.path), reason
        model = build_model(config, None, device, initial=False)
        load_weights([model], self.path)
        hf_model, reason = _load_hf_model(self.path, needed, device)
        if hf_model is None:
            with phase("computing the norm of every weight"):
                norms = {name: value.float().norm().item() for name, value in model.state_dict().items()}
            return norms, f"shapes and norms only: {reason}"
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.config.vocab_size, self.shape, generator=generator).to(device)
        with phase("running the model of transformers"):
            expected = hidden_states(hf_model, hf_model.model.embed_tokens, hf_model.model.layers, tokens)
        with phase("running our model"):
            found = hidden_states(model, model.embedding, model.layers.values(), tokens)
        return {name: relative_difference(found[name], expected[name]) for name in found}, ""

    def _fp32_config(self, job: Job) -> Config:
        """Return the config in fp32, without MTP layers that config.json counts and the files lack.

        transformers keeps their count in config.json and never saves them. A model.mtp_depths that the
        user typed stays.
        """
        keys = [override_key(override) for override in job.overrides]
        model = job.config.model
        if model.mtp_depths and "model.mtp_depths" not in keys and not has_layer(self.path, model.num_layers):
            counted = f"{model.mtp_depths} MTP layer{'s' if model.mtp_depths > 1 else ''}"
            print(
                f"config.json counts {counted}, the files hold none: verified with model.mtp_depths=0",
                file=sys.stderr,
            )
            model = replace(model, mtp_depths=0)
        return replace(job.config, model=model, precision=PrecisionConfig(compute=ComputeType.fp32))


def hidden_states(
    model: nn.Module, embedding: nn.Module, layers: Iterable[nn.Module], tokens: Tensor
) -> dict[str, Tensor]:
    """Return what `model` computes for `tokens` [batch, sequence], in the order of the forward pass.

    `embedding` and `layer 0`, `layer 1`, ... are hidden states [batch, sequence, dim], `logits` is
    [batch, sequence, vocab], and `loss` is the mean next-token cross-entropy in nats, a scalar.
    """
    states: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        states[name] = (output[0] if isinstance(output, tuple) else output).detach()

    modules = {"embedding": embedding, **{f"layer {number}": layer for number, layer in enumerate(layers)}}
    hooks = [module.register_forward_hook(partial(record, name)) for name, module in modules.items()]
    with inference(model):
        logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    loss = cross_entropy_sum(logits[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    return states | {"logits": logits, "loss": loss}


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|, of Euclidean norms in fp32."""
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))


def _load_hf_model(path: Path, needed: int, device: torch.device) -> tuple[Any, str]:
    """Return HF's model of the checkpoint in fp32, or None and the reason why it cannot be loaded.

    `needed` is its size in bytes.
    """
    if importlib.util.find_spec("transformers") is None:
        return None, "transformers is not installed"
    free = _free_memory(device)
    if needed > free:
        return None, _describe_need("transformers' model beside ours", needed, free)
    with phase("importing transformers"):
        import transformers

    # By class, for kimi_k2 is a DeepSeek-V3 with a name that AutoModel does not know.
    is_v2 = family(read_config(path)) == "deepseek_v2"
    model_class = transformers.DeepseekV2ForCausalLM if is_v2 else transformers.DeepseekV3ForCausalLM
    try:
        with phase("loading the model of transformers"):
            config = model_class.config_class.from_pretrained(path, local_files_only=True)
            # Latent attention has as many keys as queries; that of transformers repeats them all the same.
            config.num_key_value_heads = config.num_attention_heads
            if stored_weights(path) != "fp8" and hasattr(config, "quantization_config"):
                del config.quantization_config  # weights recast from fp8 often keep it
            model = model_class.from_pretrained(
                path, config=config, dtype=torch.float32, local_files_only=True
            )
            return model.to(device).eval(), ""
    except Exception as error:
        return None, f"transformers cannot load it ({str(error).splitlines()[0][:120]})"


def _free_memory(device: torch.device) -> int:
    """Return the bytes of memory that a model on `device` can take now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _describe_need(model: str, needed: int, free: int) -> str:
    """Say that `model` needs more bytes than there are."""
    return f"{model} needs {needed / GIB:,.2f} GiB, there are {free / GIB:,.2f}"
