"""What two models of the same weights make of the same tokens, layer by layer.

task=verify: a released checkpoint, loaded here and by HF transformers, compared layer by layer.
"""

import importlib.util
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dsv3.checkpoint.load import load_weights
from dsv3.config.overrides import override_key
from dsv3.config.precision import ComputeType, PrecisionConfig
from dsv3.config.root import Config
from dsv3.convert.live_export import has_layer, released_norms
from dsv3.distributed.process_group import join_process_group
from dsv3.errors import RunFailed, UserError
from dsv3.launch.job import Job
from dsv3.metrics.console import Console
from dsv3.model.generation import inference
from dsv3.model.layers import cross_entropy_sum
from dsv3.model.transformer import Transformer
from dsv3.parallel.parallelize import build_model
from dsv3.planning import parameters


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


FLOAT = 4  # bytes; both models are compared in fp32

GIB = 2**30


class Verify:
    """Loads `path` and prints a table and a verdict; exit code 1 where the two models depart.

    With transformers installed and memory for both models: hidden states after every layer, logits and
    loss. Else every weight's shape and norm; where not even one model fits, they are read one by one.
    """

    def __init__(self, path: str, sequences: int, tokens: int, tolerance: float) -> None:
        self.path = Path(path)
        self.shape = (sequences, tokens)
        self.tolerance = tolerance

    def run(self, job: Job) -> None:
        """Load, compare, tell; the table goes to stderr, the verdict to stdout."""
        with join_process_group(job.config.launch.timeout) as ranks:
            if ranks.world > 1:
                raise UserError(f"task=verify compares in one process: launch.nproc=1, not {ranks.world}")
            rows, reason = self._rows(job, ranks.device)
        _show(str(self.path), rows, reason)
        wrong = [row for row in rows if not row.error <= self.tolerance]
        if wrong and reason:
            raise RunFailed(f"{self.path}: '{wrong[0].name}' holds numbers that are not finite")
        if wrong:
            raise RunFailed(f"departs from transformers first at {wrong[0].name}: {wrong[0].error:.1e}")
        print(f"{self.path}: {'loads; ' + reason if reason else 'equals transformers'}", flush=True)

    def _rows(self, job: Job, device: torch.device) -> "tuple[list[Row], str]":
        """The table, and why there is nothing to compare with; an empty text where there is."""
        exact = self._config(job)
        needed, free = FLOAT * parameters.total(exact.model), _free(device)
        room = min(free, job.hardware.memory_bytes or free)
        if needed > room:
            reason = f"names, shapes and norms only: {_numbers('the model', needed, room)}"
            return _norms(released_norms(exact.model, self.path)), reason
        model = build_model(exact, None, device)
        load_weights([model], self.path)
        theirs = _load_theirs(self.path, needed, device)
        if isinstance(theirs, str):
            norms = {name: value.float().norm().item() for name, value in model.state_dict().items()}
            return _norms(norms), theirs
        return self._compare(model, theirs, device), ""

    def _config(self, job: Job) -> Config:
        """fp32, and without MTP layers that the files leave out: transformers counts but never saves them."""
        model, typed = job.config.model, "model.mtp_depths" in map(override_key, job.overrides)
        if model.mtp_depths and not typed and not has_layer(self.path, model.num_layers):
            counted = f"{model.mtp_depths} MTP layer{'s' if model.mtp_depths > 1 else ''}"
            print(
                f"config.json counts {counted}, the files hold none: verified with model.mtp_depths=0",
                file=sys.stderr,
            )
            model = replace(model, mtp_depths=0)
        if any(key.partition(".")[0] == "precision" for key in map(override_key, job.overrides)):
            print("verified in fp32, as transformers computes: precision is not used", file=sys.stderr)
        return replace(job.config, model=model, precision=PrecisionConfig(compute=ComputeType.fp32))

    def _compare(self, model: Transformer, other: Any, device: torch.device) -> "list[Row]":
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.config.vocab_size, self.shape, generator=generator).to(device)
        theirs = hidden_states(other, other.model.embed_tokens, other.model.layers, tokens)
        ours = hidden_states(model, model.embedding, model.layers.values(), tokens)
        return [Row(name, difference(ours[name], theirs[name])) for name in ours]


class Row:
    """One line of the table: what was compared and how far apart it is (or, alone, whether it is finite)."""

    def __init__(self, name: str, error: float, norm: float | None = None) -> None:
        self.name = name
        self.error = error
        self.norm = norm


def _load_theirs(path: Path, needed: int, device: torch.device) -> Any:
    """HF's model of the checkpoint in fp32, or a text that says why there is none to compare with."""
    alone, free = "shapes and norms only: ", _free(device)
    if importlib.util.find_spec("transformers") is None:
        return alone + "transformers is not installed"
    if needed > free:
        return alone + _numbers("transformers' model beside ours", needed, free)
    import transformers

    # By class, for kimi_k2 is a DeepSeek-V3 with a name that AutoModel does not know.
    v2 = json.loads((path / "config.json").read_text())["model_type"] == "deepseek_v2"
    kind = transformers.DeepseekV2ForCausalLM if v2 else transformers.DeepseekV3ForCausalLM
    try:
        return kind.from_pretrained(path, dtype=torch.float32, local_files_only=True).to(device).eval()
    except Exception as error:
        return f"{alone}transformers cannot load it ({str(error).splitlines()[0][:120]})"


def _free(device: torch.device) -> int:
    """Bytes of memory that can be taken now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _numbers(what: str, needed: int, room: int) -> str:
    return f"{what} needs {needed / GIB:,.2f} GiB, there are {room / GIB:,.2f}"


def _norms(norms: dict[str, float]) -> list[Row]:
    return [Row(name, 0.0 if math.isfinite(norm) else math.inf, norm) for name, norm in norms.items()]


def _show(path: str, rows: list[Row], reason: str) -> None:
    console = Console(stderr=True)
    if reason:
        console.table(f"Norms of {path}", [(row.name, f"{row.norm:.6g}") for row in rows])
    else:
        console.table(f"Relative difference, {path}", [(row.name, f"{row.error:.1e}") for row in rows])
    console.close()
