"""task=verify: a released checkpoint, loaded here and by HF transformers, compared layer by layer."""

import importlib.util
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dsv3.checkpoint.hf import load_released
from dsv3.metrics.console import Console
from dsv3.model.generation import inference
from dsv3.model.transformer import Transformer
from dsv3.parallel.parallelizer import build_model
from dsv3.precision.config import ComputeType, PrecisionConfig
from dsv3.runtime.distributed import worker
from dsv3.runtime.errors import RunFailed, UserError
from dsv3.runtime.job import Job
from dsv3.training.loss import cross_entropy_sum

FLOAT = 4  # bytes; both models are compared in fp32


class Verify:
    """Loads `path` and prints a table and a verdict; exit code 1 where the two models depart.

    With transformers installed and memory for both models: hidden states after every layer, logits and
    loss. Else every weight's shape (by loading it) and norm.
    """

    def __init__(self, path: str, sequences: int, tokens: int, tolerance: float) -> None:
        self.path = Path(path)
        self.shape = (sequences, tokens)
        self.tolerance = tolerance

    def run(self, job: Job) -> None:
        """Load, compare, tell; the table goes to stderr, the verdict to stdout."""
        with worker(job.config.launch.timeout) as me:
            if me.world > 1:
                raise UserError(f"task=verify compares in one process: launch.nproc=1, not {me.world}")
            exact = replace(job.config, precision=PrecisionConfig(compute=ComputeType.fp32))
            model = build_model(exact, None, me.device)
            load_released(model, self.path)
            theirs = _load_theirs(self.path, model, me.device)
            reason = theirs if isinstance(theirs, str) else ""
            rows = _norms(model) if isinstance(theirs, str) else self._compare(model, theirs, me.device)
        _show(str(self.path), rows, reason)
        wrong = [row for row in rows if not row.error <= self.tolerance]
        if wrong and reason:
            raise RunFailed(f"{self.path}: '{wrong[0].name}' holds numbers that are not finite")
        if wrong:
            raise RunFailed(f"departs from transformers first at {wrong[0].name}: {wrong[0].error:.1e}")
        print(f"{self.path}: {'loads; ' + reason if reason else 'equals transformers'}", flush=True)

    def _compare(self, model: Transformer, other: Any, device: torch.device) -> "list[Row]":
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.config.vocab_size, self.shape, generator=generator).to(device)
        theirs = _states(other, other.model.embed_tokens, other.model.layers, tokens)
        ours = _states(model, model.embedding, model.layers, tokens)
        return [Row(name, _difference(ours[name], theirs[name])) for name in ours]


class Row:
    """One line of the table: what was compared and how far apart it is (or, alone, whether it is finite)."""

    def __init__(self, name: str, error: float, norm: float | None = None) -> None:
        self.name = name
        self.error = error
        self.norm = norm


def _load_theirs(path: Path, model: Transformer, device: torch.device) -> Any:
    """HF's model of the checkpoint in fp32, or a text that says why there is none to compare with."""
    alone = "shapes and norms only: "
    if importlib.util.find_spec("transformers") is None:
        return alone + "transformers is not installed"
    needed = FLOAT * sum(parameter.numel() for parameter in model.parameters())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        return f"{alone}transformers needs {needed / 2**30:.1f} GiB more, {free / 2**30:.1f} are free"
    import transformers

    # By class, for kimi_k2 is a DeepSeek-V3 with a name that AutoModel does not know.
    v2 = json.loads((path / "config.json").read_text())["model_type"] == "deepseek_v2"
    kind = transformers.DeepseekV2ForCausalLM if v2 else transformers.DeepseekV3ForCausalLM
    try:
        return kind.from_pretrained(path, dtype=torch.float32, local_files_only=True).to(device).eval()
    except Exception as error:
        return f"{alone}transformers cannot load it ({str(error).splitlines()[0][:120]})"


def _norms(model: Transformer) -> list[Row]:
    norms = {name: value.float().norm().item() for name, value in model.state_dict().items()}
    return [Row(name, 0.0 if math.isfinite(norm) else math.inf, norm) for name, norm in norms.items()]


def _states(
    model: nn.Module, embedding: nn.Module, layers: nn.ModuleList, tokens: Tensor
) -> dict[str, Tensor]:
    """Hidden states after embedding and every layer, logits and loss, of either model."""
    states: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        states[name] = (output[0] if isinstance(output, tuple) else output).detach()

    modules = {"embedding": embedding, **{f"layer {number}": layer for number, layer in enumerate(layers)}}
    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
    with inference(model):
        logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return states | _ends(logits, tokens)


def _ends(logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    loss = cross_entropy_sum(logits[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    return {"logits": logits, "loss": loss}


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, by norms in fp32."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-30))


def _show(path: str, rows: list[Row], reason: str) -> None:
    console = Console(stderr=True)
    if reason:
        console.table(f"Norms of {path}", [(row.name, f"{row.norm:.6g}") for row in rows])
    else:
        console.table(f"Relative difference, {path}", [(row.name, f"{row.error:.1e}") for row in rows])
    console.close()
