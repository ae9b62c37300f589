"""Write the table of public checkpoints into docs/models.md: `python -m tests.docs.public_configs [FOLDER]`.

FOLDER holds config.json files as they are found in public places, one folder each (by default
../shared/configs beside the project); they belong to others and are not part of it. The table itself is made
of the facts below, so that a test can hold it without them. With the files, every row is made from its file
as well and must be the same.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.errors import UserError
from dsv3.hf.config_json import read_hf_model
from dsv3.hf.safetensors_reader import read_headers
from dsv3.planning import parameters
from tests.config.test_released_presets import NAMED, V2, V3

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "models.md"
FOLDER = ROOT.parent / "shared" / "configs"
BEGIN, END = "<!-- checkpoints: made by tests/docs/public_configs.py -->", "<!-- end of checkpoints -->"

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:c2388e6b\nsize 5234139343\n"
BF16 = {**V3, "quantization_config": ...}
K2 = NAMED["Kimi-K2-Instruct"].values
TINY = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": ...,
    "quantization_config": ...,
    "rope_scaling": None,
    "scoring_func": ...,
    "topk_method": ...,
    "vocab_size": 128815,
}


class PublicCheckpoint(NamedTuple):
    """A checkpoint and the facts by which it is read or refused."""

    name: str
    folder: str
    values: dict[str, Any]
    """Keys of config.json; `...` stands for no such key. Of a refused one, those that it is refused for."""
    published: str = ""
    """Parameters by its publisher, without MTP layers."""
    files: tuple[tuple[str, str], ...] = ()
    """Names and contents of files beside config.json."""


def other(class_name: str, model_type: str) -> dict[str, Any]:
    """Return the keys of a config.json that name another architecture."""
    return {"architectures": [class_name], "model_type": model_type}


NVFP4 = json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 16}})
CHECKPOINTS = [
    PublicCheckpoint("DeepSeek-V2", "VeOmni-DeepseekV2_236B", V2, "236B"),
    PublicCheckpoint("DeepSeek-V2.5", "DeepSeek-V2.5", NAMED["DeepSeek-V2.5"].values, "236B"),
    PublicCheckpoint("DeepSeek-V3", "DeepSeek-V3", V3, "671B"),
    PublicCheckpoint("DeepSeek-V3-Base", "DeepSeek-V3-Base", V3, "671B"),
    PublicCheckpoint("DeepSeek-V3 in bf16", "DeepSeek-V3-bf16-like", BF16, "671B"),
    PublicCheckpoint(
        "DeepSeek-R1, cloned without Git LFS",
        "DeepSeek-R1-hub",
        V3,
        "671B",
        (("model-00001-of-000163.safetensors", POINTER),),
    ),
    PublicCheckpoint("DeepSeek-V3.1", "DeepSeek-V3.1", NAMED["DeepSeek-V3.1"].values, "671B"),
    PublicCheckpoint(
        "DeepSeek-V3-0324 in NVFP4", "DeepSeek-V3-0324-NVFP4", BF16, files=(("hf_quant_config.json", NVFP4),)
    ),
    PublicCheckpoint("DeepSeek-V3.2", "DeepSeek-V3.2", other("DeepseekV32ForCausalLM", "deepseek_v32")),
    PublicCheckpoint("DeepSeek-V4-Flash", "DeepSeek-V4-Flash", other("DeepseekV4ForCausalLM", "deepseek_v4")),
    PublicCheckpoint(
        "Moonlight-16B-A3B", "Moonlight-16B-A3B-Instruct", NAMED["Moonlight-16B-A3B-Instruct"].values, "16B"
    ),
    PublicCheckpoint("Kimi-K2", "Kimi-K2-Instruct", K2, "1T"),
    PublicCheckpoint(
        "Kimi-K2-0905", "Kimi-K2-Instruct-0905-DERIVED", NAMED["Kimi-K2-Instruct-0905"].values, "1T"
    ),
    PublicCheckpoint(
        "a copy of Kimi-K2 with a model_type of its own",
        "Kimi-K2-renamed",
        {**K2, "model_type": "Create-Bot-V2_k2"},
        "1T",
    ),
    PublicCheckpoint(
        "Kimi-K2-Thinking, keys cut out", "Kimi-K2-Thinking-trimmed", {**K2, "norm_topk_prob": ...}
    ),
    PublicCheckpoint("Kimi-K2.5", "Kimi-K2.5", other("KimiK25ForConditionalGeneration", "kimi_k25")),
    PublicCheckpoint("Kimi-Linear-48B", "Kimi-Linear-48B", other("KimiLinearForCausalLM", "kimi_linear")),
    PublicCheckpoint(
        "GLM-4.7-Flash", "GLM-4.7-Flash-trimmed", other("Glm4MoeLiteForCausalLM", "glm4_moe_lite")
    ),
    PublicCheckpoint("GLM-5", "GLM-5", other("GlmMoeDsaForCausalLM", "glm_moe_dsa")),
    PublicCheckpoint(
        "Youtu-LLM-2B in 4 bits", "Youtu-LLM-2B-4bit-mlx", other("YoutuForCausalLM", "deepseek_v2")
    ),
    PublicCheckpoint("tiny DeepseekV3 of trl", "trl-tiny-DeepseekV3-RECONSTRUCTED", {**V3, **TINY}),
]


def row(checkpoint: PublicCheckpoint, directory: Path) -> str:
    """Return a checkpoint's row: what reading its config.json, and its weights where they lie, comes to."""
    try:
        model, _ = read_hf_model(directory)
    except UserError as refusal:
        return f"| {checkpoint.name} | no | | | {_reason(refusal, directory)} |"
    total, weights = parameters.total(model), parameters.total(replace(model, mtp_depths=0))
    counts = f"{weights:,} | {total - weights:,}" if total > weights else f"{weights:,} |"
    note = f"{checkpoint.published} by its publisher" if checkpoint.published else ""
    if any(directory.glob("*.safetensors")):
        try:
            read_headers(directory)
        except UserError as refusal:
            note += f"; its weights are refused: {_reason(refusal, directory)}"
    return f"| {checkpoint.name} | yes | {counts} | {note} |"


def table() -> str:
    """Return a row per checkpoint, made from the facts above."""
    lines = ["| checkpoint | read | parameters | of MTP layers | |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for number, checkpoint in enumerate(CHECKPOINTS):
            directory = Path(folder) / str(number)
            directory.mkdir()
            values = {key: value for key, value in checkpoint.values.items() if value is not ...}
            (directory / "config.json").write_text(json.dumps(values))
            for name, text in checkpoint.files:
                (directory / name).write_text(text)
            lines.append(row(checkpoint, directory))
    return "\n".join(lines)


def rows_of_files(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of each checkpoint and its row, made from the files in `folder`."""
    for checkpoint in CHECKPOINTS:
        source = folder / checkpoint.folder
        with tempfile.TemporaryDirectory() as copy:
            for file in source.iterdir():
                (Path(copy) / file.name).write_bytes(file.read_bytes())
            quantized = folder / f"{checkpoint.folder}-hf_quant" / "config.json"
            if quantized.is_file():
                (Path(copy) / "hf_quant_config.json").write_bytes(quantized.read_bytes())
            yield checkpoint.name, row(checkpoint, Path(copy))


def document(text: str) -> str:
    """Return the document with its table made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


def _reason(refusal: UserError, directory: Path) -> str:
    return str(refusal).replace(f"{directory}/", "").replace("|", "\\|")


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
    files = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    if files.is_dir():
        made = table()
        differing = [name for name, found in rows_of_files(files) if found not in made]
        print(f"{files}: {f'other rows for {differing}' if differing else 'the same rows'}")
