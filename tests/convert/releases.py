"""Write small HF checkpoints with random weights by the safetensors library, and read them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv3.checkpoint.load import parameter_shapes
from dsv3.config.model import ModelConfig
from dsv3.fp8.quantize import quantize_reference
from dsv3.hf.config_writer import config_json
from dsv3.hf.names import hf_layout, is_fp8_weight, mtp_duplicates
from tests.harness.tiny import model_config

SMALL = [
    "model.vocab_size=96",
    "model.dim=64",
    "model.num_layers=3",
    "model.dense_hidden_dim=176",  # partial blocks of 32
    "model.attention.q_lora_rank=24",
    "model.attention.kv_lora_rank=40",
    "model.attention.qk_nope_head_dim=16",
    "model.attention.v_head_dim=16",
    "model.moe.hidden_dim=48",
]
"""Changes to the tiny model: sizes that are no multiples of a block."""


def small_model(*overrides: str) -> ModelConfig:
    """Return a small release's config; MTP, selection bias and shared expert included."""
    return model_config(*SMALL, *overrides)


def random_weights(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Return HF tensors by name in fp32, duplicates included; magnitudes differ by block."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for tensor in hf_layout(model, parameter_shapes(model)):
        value = torch.randn(tensor.shape, generator=generator) * 0.1
        weights[tensor.name] = value + 1 if value.ndim == 1 and "bias" not in tensor.name else value
    return weights | {copy: weights[name].clone() for copy, name in mtp_duplicates(model).items()}


def write_release(
    directory: Path,
    model: ModelConfig,
    dtype: str = "bf16",
    files: int = 3,
    block: tuple[int, int] = (32, 32),
    power_of_two: bool = False,
    weights: dict[str, Tensor] | None = None,
    scales_apart: bool = False,
) -> dict[str, Tensor]:
    """Write a checkpoint in bf16, fp16, fp32 or fp8 in several files; return the tensors as stored."""
    directory.mkdir(parents=True, exist_ok=True)
    numbers = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}[
        dtype
    ]
    stored: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, value in (weights or random_weights(model)).items():
        if dtype == "fp8" and is_fp8_weight(name):
            stored[name], scales[name + "_scale_inv"] = quantize_reference(
                value, block, power_of_two=power_of_two
            )
        else:
            stored[name] = value if name.endswith("e_score_correction_bias") else value.to(numbers)
    config: dict[str, Any] = config_json(model, str(numbers).removeprefix("torch."))
    if scales:
        style = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        config["quantization_config"] = style | {"weight_block_size": list(block)}
        if power_of_two:
            config["quantization_config"]["scale_fmt"] = "ue8m0"
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text('{"do_sample": true}')
    _save(directory, stored, scales, files, scales_apart)
    return stored | scales


def _save(
    directory: Path, stored: dict[str, Tensor], scales: dict[str, Tensor], files: int, scales_apart: bool
) -> None:
    """Write tensors spread over files by number; scales beside their weight, or in the next file."""
    groups: list[dict[str, Tensor]] = [{} for _ in range(files)]
    where: dict[str, str] = {}
    for number, (name, value) in enumerate(stored.items()):
        place = number * files // len(stored)
        entries = {name: (value, place)}
        if name + "_scale_inv" in scales:
            entries[name + "_scale_inv"] = (scales[name + "_scale_inv"], (place + scales_apart) % files)
        for key, (tensor, group) in entries.items():
            groups[group][key] = tensor.contiguous()
            where[key] = f"model-{group + 1:05d}-of-{files:05d}.safetensors"
    for number, tensors in enumerate(groups, 1):
        save_file(
            tensors, directory / f"model-{number:05d}-of-{files:05d}.safetensors", metadata={"format": "pt"}
        )
    total = sum(t.nbytes for t in (stored | scales).values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def read_release(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of an HF checkpoint, read by the safetensors library."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def rewrite_release(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a release and write them as one file without an index."""
    tensors = read_release(directory)
    change(tensors)
    for file in (*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"):
        file.unlink(missing_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors"
    )


def stack_experts(tensors: dict[str, Tensor], layer: int, suffix: str = "weight") -> None:
    """Stack the experts of a layer as transformers 5 does."""
    prefix = f"model.layers.{layer}.mlp.experts."
    experts = range(sum(name.startswith(prefix) and name.endswith(f"down_proj.{suffix}") for name in tensors))
    tail = suffix.removeprefix("weight")

    def pop(expert: int, kind: str) -> Tensor:
        return tensors.pop(f"{prefix}{expert}.{kind}.{suffix}").view(torch.uint8)

    dtype = tensors[f"{prefix}0.down_proj.{suffix}"].dtype
    halves = [torch.cat([pop(expert, "gate_proj"), pop(expert, "up_proj")]) for expert in experts]
    downs = [pop(expert, "down_proj") for expert in experts]
    tensors[f"{prefix}gate_up_proj{tail}"] = torch.stack(halves).view(dtype)
    tensors[f"{prefix}down_proj{tail}"] = torch.stack(downs).view(dtype)
