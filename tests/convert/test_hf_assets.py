"""What lies beside the weights: unchanged through conversions and runs, complete for a model trained here."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint.directory import step_directory
from dsv3.convert.hf_assets import ExportAssets, asset_warnings, copy_assets, keep_assets
from dsv3.errors import UserError
from dsv3.tokens.tokenizer import Tokenizer, TrainedTokenizer
from tests.convert.releases import small_model, write_release
from tests.harness.checkpoints import seal
from tests.harness.commands import ConvertCommand, TrainCommand
from tests.harness.outcome import refused
from tests.harness.runs import contents
from tests.harness.tiny import model_config

BESIDE = {
    "special_tokens_map.json": b'{"eos_token":  "<|end_of_sentence|>"}',
    "added_tokens.json": b'{"<|end_of_sentence|>": 1}\n',
    "tokenizer.model": b"\x0a\x0esentencepiece\xff\x00",
    "tiktoken.model": b"YQ== 0\n",
    "tokenization_kimi.py": b"raise SystemExit('this code was run')\n",
    "modeling_deepseek.py": b"raise SystemExit('this code was run')\n",
    "chat_template.jinja": "{{ messages }} \u2581\uff5c".encode(),
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
    "generation_config.json": b'{"temperature":0.6,   "eos_token_id":[1, 2]}',
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
    "LICENSE": b"MIT\r\n",
    "README.md": b"# A model\n",
}
"""Files of all kinds, in forms that no writer of ours would give them."""

OWN_TOKENIZER = (
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""Files of a model trained here, beside its config.json."""

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"

WEIGHTS = (".safetensors", ".safetensors.index.json")

OF_THESE_WEIGHTS = ("manifest.json", "training.yaml", "dsv3.json")


def companions(directory: Path) -> dict[str, bytes]:
    """Return the files beside the weights, without those that describe these weights alone."""
    return {
        name: content
        for name, content in contents(directory).items()
        if not name.endswith(WEIGHTS) and name not in OF_THESE_WEIGHTS
    }


def write_beside(directory: Path) -> None:
    for name, content in BESIDE.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    (directory / "manifest.json").unlink(missing_ok=True)  # which knows nothing of them


def test_what_came_in_leaves_every_conversion_byte_for_byte(convert: ConvertCommand, tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_release(source, small_model())
    write_beside(source)
    convert.must("hf_to_hf", source, tmp_path / "hf")
    convert.must("hf_to_dcp", source, tmp_path / "dcp")
    convert.must("dcp_to_hf", tmp_path / "dcp", tmp_path / "back")
    convert.must("hf_to_hf", tmp_path / "back", tmp_path / "fp32", "dtype=fp32")
    for output in ("hf", "dcp/hf", "back"):
        assert companions(tmp_path / output) == companions(source), output
    assert companions(tmp_path / "fp32").items() >= BESIDE.items()


def test_config_json_says_the_model_that_is_written(convert: ConvertCommand, tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_release(source, small_model("model.mtp_depths=0"), "fp8")
    before = json.loads((source / "config.json").read_text())
    before["bos_token_id"] = 7
    (source / "config.json").write_text(json.dumps(before))
    convert.must("hf_to_dcp", source, tmp_path / "dcp")
    typed = ["dtype=fp32", "model.num_layers=2", "model.moe.top_k=1", "model.rope.theta=5000"]
    expected = before | {"num_hidden_layers": 2, "num_experts_per_tok": 1, "rope_theta": 5000.0}
    expected |= {"torch_dtype": "float32"}
    del expected["quantization_config"]
    for direction, place in (("hf_to_hf", source), ("dcp_to_hf", tmp_path / "dcp")):
        convert.must(direction, place, tmp_path / direction, *typed)
        assert json.loads((tmp_path / direction / "config.json").read_text()) == expected


def short(run: TrainCommand, directory: Path, *more: str) -> Path:
    """Train one step in a new run that exports; return the export."""
    every = ["train.steps=1", "train.export_hf_every=1", "train.evaluate_every=0", "train.generate_every=0"]
    run.train(directory, *every, *more)
    return directory / "hf" / "step-1"


def test_a_round_trip_of_training_and_exporting_keeps_every_companion(
    commands: TrainCommand, convert: ConvertCommand, tmp_path: Path
) -> None:
    release = short(commands, tmp_path / "first")
    assert companions(release).keys() == {"config.json", *OWN_TOKENIZER}
    stops_and_pads(release)

    write_beside(release)
    wanted = companions(release)
    second = short(commands, tmp_path / "second", f"checkpoint.load=hf:{release}")
    assert companions(second) == wanted
    shutil.rmtree(release)  # a resumed run has all that it needs
    commands.must(f"resume={tmp_path}/second", "train.steps=2")
    convert.must("dcp_to_hf", tmp_path / "second", tmp_path / "converted")
    step = step_directory(tmp_path / "second", 2)
    keep_assets(tmp_path / "third", step, tokenizer=True)  # as a run that begins from this one
    for place in ("second/hf/step-2", "converted", step / "hf", "third/assets"):
        assert companions(tmp_path / place) == wanted, place


def stops_and_pads(exported: Path) -> None:
    """Assert that transformers knows the ids of an export's tokenizer wherever it looks for them."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    config = transformers.AutoConfig.from_pretrained(exported)
    generation = transformers.GenerationConfig.from_pretrained(exported)
    for ids in (config, generation, tokenizer):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (0, 1, 2)
    one, three = tokenizer(["w1", "w1 w2 w3"], padding=True)["input_ids"]
    # Padding stands on the left: what is generated follows the text.
    assert three[0] == 0
    assert one == [2] * one.count(2) + tokenizer("w1")["input_ids"]
    assert len(one) == len(three) > 3
    assert 2 in one
    text = "a & b\n\n  \u00fc"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_run_with_ids_of_its_own_leaves_the_other_tokenizer_behind(
    commands: TrainCommand, tmp_path: Path
) -> None:
    write_release(tmp_path / "in", model_config())
    write_beside(tmp_path / "in")
    exported = short(commands, tmp_path / "run", f"checkpoint.load=hf:{tmp_path}/in", "tokenizer=trained")
    found = companions(exported)
    assert found.keys() == {"README.md", "LICENSE", "modeling_deepseek.py", "config.json", *OWN_TOKENIZER}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    assert json.loads(found["generation_config.json"]) == {"temperature": 0.6} | ids
    assert json.loads(found["config.json"]).items() >= ids.items()


def test_assets_that_cannot_be_read_are_refused_before_weights_are_written(
    convert: ConvertCommand, tmp_path: Path
) -> None:
    write_release(tmp_path / "in", small_model())
    convert.must("hf_to_dcp", tmp_path / "in", tmp_path / "dcp")
    pointers = [(name, POINTER) for name in BESIDE]
    damaged = [
        (name, content) for name in (*OWN_TOKENIZER, "added_tokens.json") for content in ('{"a"', "[]")
    ]
    for name, content in (*pointers, *damaged):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        before = (tmp_path / "in" / name).read_bytes() if (tmp_path / "in" / name).exists() else None
        (tmp_path / "in" / name).write_text(content)
        told = "is a Git-LFS pointer" if content == POINTER else "(is not JSON|is no JSON object)"
        with pytest.raises(UserError, match=f"{re.escape(f'{tmp_path}/in/{name}')} {told}"):
            keep_assets(tmp_path / "run", tmp_path / "in", tokenizer=True)
        assert not (tmp_path / "run").exists()
        if name in ("generation_config.json", "LICENSE", "tokenizer.json"):
            for direction in ("hf_to_hf", "hf_to_dcp"):
                outcome = convert(direction, tmp_path / "in", tmp_path / "out")
                refused(outcome, f"{tmp_path}/in/{name} {told.split('(')[0]}".strip())
        (tmp_path / "in" / name).unlink()
        if before is not None:
            (tmp_path / "in" / name).write_bytes(before)
    (tmp_path / "dcp" / "tokenizer").mkdir(exist_ok=True)
    trained().save(tmp_path / "dcp" / "tokenizer")
    (tmp_path / "dcp" / "hf" / "chat_template.jinja").write_text("x")
    (tmp_path / "dcp" / "hf" / "generation_config.json").write_text("{")
    seal(tmp_path / "dcp")
    refused(convert("dcp_to_hf", tmp_path / "dcp", tmp_path / "out"), "hf/generation_config.json is not JSON")
    assert not (tmp_path / "out").exists()
    (tmp_path / "dcp" / "hf" / "generation_config.json").write_text('{"top_p": 0.9}')
    seal(tmp_path / "dcp")
    convert.must("dcp_to_hf", tmp_path / "dcp", tmp_path / "out")
    assert companions(tmp_path / "out").keys() == {"config.json", "chat_template.jinja", *OWN_TOKENIZER}
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert stops == {"top_p": 0.9, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def test_flaws_that_travel_with_the_weights_are_told_in_a_line_each(
    convert: ConvertCommand, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    write_release(source, small_model())
    (source / "tokenizer_config.json").write_text("{}")
    (source / "processor.json").write_text('{"a"')
    ids = {"eos_token_id": [1, 99999], "bos_token_id": "<s>", "pad_token_id": -1}
    (source / "generation_config.json").write_text(json.dumps(ids))
    for direction in ("hf_to_hf", "hf_to_dcp"):
        outcome = convert(direction, source, tmp_path / direction)
        assert outcome.code == 0
        told = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
        assert len(told) == 4, told
        assert f"{source}/processor.json is not JSON: " in told[0]
        assert told[0].endswith(", and is copied as it is")
        assert "has a tokenizer_config.json and no vocabulary" in told[1]
        assert "bos_token_id='<s>': the model has no id '<s>', it has 0 to 95" in told[2]
        assert "eos_token_id=[1, 99999]: the model has no id 99999, it has 0 to 95" in told[3]
    (source / "tokenizer.model").write_bytes(b"sentencepiece")
    assert not [line for line in asset_warnings(source, small_model()) if "vocabulary" in line]


def test_the_files_of_a_tokenizer_that_stays_behind_are_not_looked_at(tmp_path: Path) -> None:
    write_release(tmp_path / "in", small_model())
    (tmp_path / "in" / "tokenizer.model").write_text(POINTER)
    keep_assets(tmp_path, tmp_path / "in", tokenizer=False)
    assert contents(tmp_path / "assets").keys() == {"config.json", "generation_config.json"}


def test_a_tokenizer_that_older_code_trained_is_completed(tmp_path: Path) -> None:
    trained().save(tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    whole = json.loads(file.read_text())
    dropped = ("model_input_names", "add_bos_token", "padding_side")
    older = {key: value for key, value in whole.items() if key not in dropped}
    file.write_text(json.dumps(older))
    (tmp_path / "out").mkdir()
    ExportAssets.of(small_model(), "bfloat16", None, tmp_path / "tokenizer").write(tmp_path / "out")
    completed = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert completed == {key: value for key, value in whole.items() if key != "add_bos_token"}


def trained() -> Tokenizer:
    """Return a tokenizer trained here."""
    return TrainedTokenizer(264).prepare(["some words"])


def test_ids_are_null_where_a_run_knows_no_tokenizer(convert: ConvertCommand, tmp_path: Path) -> None:
    write_release(tmp_path / "in", small_model())
    convert.must("hf_to_dcp", tmp_path / "in", tmp_path / "dcp")
    shutil.rmtree(tmp_path / "dcp" / "hf")
    (tmp_path / "dcp" / "manifest.json").unlink()
    convert.must("dcp_to_hf", tmp_path / "dcp", tmp_path / "out")
    config: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_assets_are_copied_from_behind_links_and_weights_are_not(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "in").mkdir()
    for name in ("tokenizer.json", "model.safetensors", "pytorch_model.bin", ".hidden", "x.index.json"):
        (tmp_path / "blobs" / name).write_text(name)
        (tmp_path / "in" / name).symlink_to(tmp_path / "blobs" / name)
    copy_assets(tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "out") == {"tokenizer.json": b"tokenizer.json"}
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
