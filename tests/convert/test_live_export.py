"""A run that exports while it trains: transformers and dsv3 load the export, with the run's own losses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsv3.checkpoint.dcp_metadata import load_tensors
from dsv3.checkpoint.directory import step_directory
from dsv3.checkpoint.manifest import verify
from dsv3.config.strict import build
from dsv3.hf.names import hf_layout
from tests.harness.commands import TrainCommand
from tests.harness.composing import compose
from tests.harness.tiny import MODEL

transformers = pytest.importorskip("transformers")


def test_a_run_exports_what_its_checkpoint_holds(commands: TrainCommand, tmp_path: Path) -> None:
    from dsv3.config.strict import strict

    run = tmp_path / "run"
    every = ["train.steps=4", "train.export_hf_every=2", "train.checkpoint_every=2", "checkpoint.keep_last=9"]
    commands.train(run, *every)
    assert sorted(path.name for path in (run / "hf").iterdir()) == ["step-2", "step-4"]
    config = strict(compose(list(MODEL))).model
    for step in (2, 4):
        directory = run / "hf" / f"step-{step}"
        assert verify(directory)
        exported = load_file(directory / "model.safetensors")
        model = build(config)
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        load_tensors(step_directory(run, step), state)
        weights = model.state_dict()
        for tensor in hf_layout(config, {name: tuple(value.shape) for name, value in weights.items()}):
            box = tuple(slice(o, o + n) for o, n in zip(tensor.offset, tensor.sizes, strict=True))
            own = weights[tensor.parameter][box].view(tensor.shape)
            wanted = own if tensor.parameter.endswith("selection_bias") else own.bfloat16()
            assert torch.equal(exported[tensor.name], wanted), tensor.name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "hf" / "step-4", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "hf" / "step-4")
    ids = tokenizer("some words", return_tensors="pt")["input_ids"]
    assert ids.numel() > 0
    assert torch.isfinite(theirs(ids).logits).all()
    evaluated = commands.must("task=evaluate", f"checkpoint.load=hf:{run}/hf/step-4", *_data(commands))
    trained = commands.must("task=evaluate", f"checkpoint.load={run}", *_data(commands))
    one, other = (float(found.out.split('"loss": ')[1].split(",")[0]) for found in (evaluated, trained))
    assert one == pytest.approx(other, rel=2e-3)


def _data(commands: TrainCommand) -> list[str]:
    return ["data=text", f"data.path={commands.text}", "train.sequence_length=32", "data.held_out=0.1"]


def test_a_model_that_nobody_released_is_refused_before_it_trains(
    commands: TrainCommand, tmp_path: Path
) -> None:
    settings = [
        *MODEL,
        "model.moe.selection_bias=false",
        "train.export_hf_every=2",
        f"run.dir={tmp_path}/run",
    ]
    outcome = commands.run(*settings, "data=text", f"data.path={commands.text}")
    assert outcome.code == 2
    assert "model.moe.selection_bias=false cannot be written to a config.json" in outcome.err
    assert not (tmp_path / "run").exists()
