"""Every key of convert.py in every direction: it acts on what is written or told, or it is refused."""

import json
from pathlib import Path

import pytest

from dsv3.config.convert import READS, ConvertConfig, Direction
from dsv3.convert import convert as convert_module
from dsv3.convert.engine import ConversionEngine
from tests.convert.hub_server import Hub, serve
from tests.harness.commands import ConvertCommand
from tests.harness.outcome import succeeded
from tests.harness.runs import contents

pytestmark = pytest.mark.slow

KEYS = [name for name in ConvertConfig.__dataclass_fields__ if name != "direction"]

VALUES = {
    "input": "x",
    "output": "y",
    "dtype": "fp32",
    "scale_fmt": "ue8m0",
    "fp8": "{unaligned:bf16}",
    "max_shard_size": "20KB",
    "workers": "1",
    "verify": "false",
    "plan": "false",
    "speeds": "[2]",
    "repo": "a/b",
    "revision": "v1",
    "assets": "weights",
    "model": "debug",
}
"""A value of each key; `verify` and `plan` equal to their defaults, which is refused as well."""


def test_every_key_is_read_by_some_direction_and_has_a_value() -> None:
    assert set(KEYS) == set(VALUES) == set.union(*map(set, READS.values())) - {"direction"}


@pytest.mark.parametrize("direction", [each.name for each in Direction])
def test_a_key_that_the_direction_does_not_read_is_refused(convert: ConvertCommand, direction: str) -> None:
    for key in KEYS:
        if key not in READS[Direction[direction]]:
            nested = {"model": ["model.mtp_depths=0"], "fp8": ["fp8.unaligned=bf16"]}.get(key, [])
            for override in (f"{key}={VALUES[key]}", *nested):
                outcome = convert.run(f"direction={direction}", override)
                told = f"error: {override} does nothing with direction={direction}: leave it out"
                assert (outcome.code, outcome.err.splitlines()[-1]) == (2, told)
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [("speeds=[2]", "plan=true"), ("scale_fmt=ue8m0", "dtype=fp8"), ("fp8.unaligned=fp8", "dtype=fp8")],
)
def test_a_key_that_needs_another_one_names_it_and_it_works(
    convert: ConvertCommand, bf16_release: Path, typed: str, remedy: str
) -> None:
    command = ["direction=hf_to_hf", f"input={bf16_release}", "output=out", typed]
    outcome = convert.run(*command)
    assert (outcome.code, f"add {remedy}, or leave it out" in outcome.err) == (2, True)
    succeeded(convert.run(*command, remedy))


def _described(output: Path) -> object:
    """Return names and bytes of the files, without the journal's time."""
    return {name: content for name, content in contents(output).items() if name != "manifest.json"}


@pytest.mark.parametrize("direction", ["hf_to_dcp", "hf_to_hf", "dcp_to_hf"])
def test_another_value_of_a_key_is_seen_in_the_output_or_in_what_is_told(
    convert: ConvertCommand,
    fp8_release: Path,
    tmp_path: Path,
    direction: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = fp8_release
    if direction == "dcp_to_hf":
        source = tmp_path / "dcp"
        convert.must("hf_to_dcp", fp8_release, source)
    threads: list[int] = []
    engine = ConversionEngine

    def counted(*arguments: object) -> object:
        threads.append(int(arguments[2]))  # type: ignore[call-overload]
        return engine(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(convert_module, "ConversionEngine", counted)
    number = 0

    def converted(*more: str) -> tuple[object, str]:
        nonlocal number
        number += 1
        output = tmp_path / f"out{number}"
        outcome = convert.must(direction, source, output, *more)
        return (_described(output) if output.exists() else None), outcome.out.replace(str(output), "")

    plain, _ = converted()
    assert converted()[0] == plain
    changes = {"dtype=fp32", "model.rope.theta=5000"}
    if direction != "hf_to_dcp":
        changes |= {"max_shard_size=20KB"}
        in_fp8 = converted("dtype=fp8")[0]
        assert in_fp8 != plain
        for more in ("scale_fmt=ue8m0", "fp8.unaligned=bf16"):
            assert converted("dtype=fp8", more)[0] != in_fp8
    for change in sorted(changes):
        assert converted(change)[0] != plain, change
    converted("workers=1")
    converted("workers=3")
    assert threads[-2:] == [1, 3]
    assert "every file is as" in converted("verify=true")[1]
    files, told = converted("plan=true")
    assert files is None
    assert converted("plan=true", "speeds=[2]")[1] != told


def test_the_keys_of_a_download_reach_the_hub(
    convert: ConvertCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    changes = [[], ["repo=c/d"], ["revision=v1"], ["assets=weights"], ["assets=all"], ["assets=config"]]
    with serve(Hub({"config.json": b"{}", "a.safetensors": b"", "README.md": b""}, ("a/b", "c/d"))) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        for number, more in enumerate(changes):
            typed = {"repo": "repo=a/b"} | {each.partition("=")[0]: each for each in more}
            hub.asked = []
            succeeded(convert.run("direction=download", f"output={tmp_path / str(number)}", *typed.values()))
            asked.append(json.dumps(sorted(set(hub.asked))))
    plain, *changed, default = asked
    assert len({plain, *changed}) == 5
    assert default == plain


def test_a_finished_output_is_read_again_and_what_is_not_used_is_told(
    convert: ConvertCommand, bf16_release: Path, tmp_path: Path
) -> None:
    command = ["hf_to_dcp", bf16_release, tmp_path / "out", "verify=true", "dtype=fp32"]
    convert.must(*command)  # type: ignore[arg-type]
    again = convert.must(*command)  # type: ignore[arg-type]
    assert "is complete and only read again" in again.err
    assert "dtype=fp32" in again.err
