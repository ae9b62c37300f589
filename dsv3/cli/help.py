"""The text of --help, made from conf/ and from the descriptions in the schemas."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dsv3.cli.flags import user_config_dir
from dsv3.config.convert import ConvertConfig
from dsv3.config.keys import descriptions, schema_keys, summary, value_text
from dsv3.config.overrides import compose, quote_texts, split_override
from dsv3.config.registry import CONF, config_groups, default_choices
from dsv3.config.root import EXPERIMENTS, Config
from dsv3.errors import UserError, did_you_mean

_TRY = """\
Try:
  {program}                                          the debug model on the embedded corpus
  {program} train.steps=1000 optimizer.lr=1e-3       change any number
  {program} parallel=fsdp launch.nproc=2             two workers on this machine
  {program} -m optimizer.lr=1e-3,3e-3                a sweep
  {program} task=plan model=671b parallel=fsdp launch.world_size=2048
  {program} task=search model=671b launch.world_size=2048 hardware=h800
  {program} task=generate checkpoint.load=RUN_DIR task.prompt="import "
  {program} resume=RUN_DIR                           continue where a run stopped
  {program} task=replay task.run=RUN_DIR task.step=N compute a step again: does a bad number repeat?
  {program} --cfg job                                print the composed config
  {program} task=generate --help                     what a choice is, and its keys with their values
"""

_WIDTH = 110

_CONVERT = """\
usage: {program} direction=DIRECTION [KEY=VALUE ...]

  direction=hf_to_dcp input=HF_DIR output=DCP_DIR [dtype=bf16|fp32]
      A HuggingFace checkpoint (bf16, fp16, fp32 or block-fp8) becomes one that training starts from.
  direction=dcp_to_hf input=DIR output=HF_DIR [dtype=bf16|fp32|fp8]
      And back; DIR is a run, a step of one or a DCP directory. fp8 is in blocks with a scale each.
  direction=hf_to_hf input=HF_DIR output=HF_DIR [dtype=bf16|fp32|fp8]
      From one stored type to another.
  direction=download repo=OWNER/NAME output=DIR [assets=tokenizer|config|weights|all] [revision=TAG]
      Files from the HuggingFace hub. Credentials and HF_HUB_OFFLINE come from the environment.

Keys (* is the default):
  dtype           bf16* fp32 fp8: what weights are stored as; a DCP takes no fp8
  scale_fmt       float32 ue8m0: what new fp8 scales are; as in the input unless given
  fp8.unaligned   fp8* bf16: of weights that do not fill whole blocks; transformers misreads them in fp8
  max_shard_size  5GB*: of a safetensors file; 5GB, 500MiB or bytes
  workers         auto* (one a core) or a number of threads
  verify          false* true: compare a DCP that is read with its manifest, read the output again and
                  compare its checksums; one that is complete already is only read
  plan            false* true: only tell bytes, time and memory; with model=671b it needs no input
  speeds          [0.5,1,3,7]*: of the disk in GB/s, for plan
  model           hf* (from the input) {models}
  model.path      where config.json is read instead of the input

The output appears once it is complete. What is unfinished waits in .NAME.partial beside it: the same
command continues it, after a kill too. An output that holds anything is refused.

Exit codes: 0 done, 1 failed (a full disk), 2 a mistake in the command or its files, 75 stopped by a
signal (Ctrl-C, SIGTERM, ...), where the same command continues; a second one: 130.

Try:
  {program} direction=hf_to_dcp input=DeepSeek-V3.1-Base output=dcp verify=true
  {program} direction=dcp_to_hf input=outputs/RUN output=release
  {program} direction=hf_to_dcp model=671b plan=true
"""


def train_help(program: str, argv: Sequence[str] = ()) -> str:
    """Return the text of train.py --help: usage, groups with their choices and defaults, a few commands.

    With GROUP=CHOICE among `argv` the text explains these choices and their keys instead.
    """
    own = user_config_dir(argv)
    groups = config_groups(*([own] if own and own.is_dir() else []))
    told = {**descriptions(Config), "experiments": EXPERIMENTS}
    _refuse_unknown(argv, [*told, *groups, "resume", "hydra"])
    chosen = {pair[0]: pair[1] for pair in map(split_override, argv) if pair and pair[0] in groups}
    if chosen:
        return _choice_help(chosen, argv, own)
    defaults = default_choices()
    lines = [
        f"usage: {program} [-m] [GROUP=CHOICE ...] [KEY=VALUE ...]",
        "",
        "Trains models of the DeepSeek-V3 family. Groups and their choices (* is the default):",
    ]
    for group, choices in groups.items():
        marked = [f"{choice}*" if choice == defaults.get(group) else choice for choice in choices]
        lines += [
            f"  {group:<12} {told.get(group, 'A group of your own.')}",
            f"  {'':<12} {' '.join(marked)}",
        ]
    lines += ["", "Nodes without choices:"]
    lines += [f"  {node:<12} {text}" for node, text in told.items() if node not in groups]
    return "\n".join([*lines, "", _TRY.format(program=program), "Every key: docs/configuration.md"])


def _refuse_unknown(argv: Sequence[str], known: Sequence[str]) -> None:
    """Raise UserError for a typed key that is of no group and of no node, of which no help could tell."""
    known = list(dict.fromkeys(known))
    for key, _ in filter(None, map(split_override, argv)):
        first = re.split(r"[./@]", key)[0]
        if first not in known:
            raise UserError(f"there is no '{first}'.{did_you_mean(first, known)} Known: {', '.join(known)}")


def _choice_help(chosen: dict[str, str], argv: Sequence[str], own: Path | None) -> str:
    """Return what each choice is, and its keys with the values that it gives them."""
    composed = compose(
        [argument for argument in quote_texts(argv) if split_override(argument)],
        [] if own is None else [f"file://{own}"],
    )
    folders = [CONF, *([own] if own else [])]
    lines = []
    for group, choice in chosen.items():
        files = [folder / group / f"{choice}.yaml" for folder in folders]
        text = next((file.read_text() for file in files if file.is_file()), "")
        comment = " ".join(
            line[2:] for line in text.splitlines() if line.startswith("# ") and "@" not in line
        )
        if group not in composed:  # experiments are no node: they set values of the other groups
            lines += [f"{group}={choice}: {comment}", "", textwrap.indent(text, "  ")]
            continue
        schema: Any = OmegaConf.get_type(composed, group)
        lines += [*textwrap.wrap(f"{group}={choice}: {comment or summary(schema)}", _WIDTH), ""]
        values = _values(OmegaConf.to_container(composed[group], enum_to_str=True), group)
        keys = [key for key in schema_keys(schema, group) if key.name in values]
        name_width = max((len(key.name) for key in keys), default=0)
        value_width = max((len(values[key.name]) for key in keys if len(values[key.name]) <= 16), default=0)
        for key in keys:
            choices = f" ({key.kind})" if " or " in key.kind and "null" not in key.kind else ""
            start = f"  {key.name:<{name_width}}  {values[key.name]:<{value_width}}  "
            lines += textwrap.wrap(
                f"{start}{key.description}{choices}",
                _WIDTH,
                subsequent_indent=" " * (name_width + value_width + 6),
            )
        lines += [] if keys else ["  no keys"]
        lines.append("")
    return "\n".join(lines).rstrip()


def _values(node: Any, path: str) -> dict[str, str]:
    """Return a composed node's values by dotted key: `on` for a nested node, `required` if it is missing."""
    values = {}
    for key, value in node.items():
        name = f"{path}.{key}"
        values[name] = (
            "required" if value == "???" else "on" if isinstance(value, dict) else value_text(value)
        )
        values |= _values(value, name) if isinstance(value, dict) else {}
    return values


def convert_help(program: str, argv: Sequence[str] = ()) -> str:
    """Return the text of convert.py --help."""
    _refuse_unknown(argv, [*descriptions(ConvertConfig), "hydra"])
    models = " ".join(choice for choice in config_groups()["model"] if choice != "hf")
    return _CONVERT.format(program=program, models=models)
