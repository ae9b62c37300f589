"""The config groups as they lie in conf/, and the text of --help."""

from pathlib import Path

import yaml

from dsv3.config.root import CONF, LAYOUTS

_TRY = """\
Try:
  python {program}                                          the debug model on the embedded corpus
  python {program} train.steps=1000 optimizer.lr=1e-3       change any number
  python {program} parallel=fsdp launch.nproc=2             two workers on this machine
  python {program} -m optimizer.lr=1e-3,3e-3                a sweep
  python {program} task=plan model=671b parallel=fsdp launch.world_size=2048
  python {program} task=generate checkpoint.load=RUN_DIR task.prompt="import "
  python {program} resume=RUN_DIR                           go on where a run stopped
  python {program} --cfg job                                print the composed config
"""

_CONVERT = """\
usage: python {program} direction=DIRECTION [KEY=VALUE ...]

  direction=hf_to_dcp input=HF_DIR output=DCP_DIR [dtype=bf16|fp32]
      A HuggingFace checkpoint (bf16, fp16, fp32 or block-fp8) becomes one that training starts from.
  direction=dcp_to_hf input=DIR output=HF_DIR [dtype=bf16|fp32|fp8]
      And back; DIR is a run, a step of one or a DCP directory. fp8 is in blocks with a scale each.
  direction=hf_to_hf input=HF_DIR output=HF_DIR [dtype=bf16|fp32|fp8]
      From one stored type to another.
  direction=download repo=OWNER/NAME output=DIR [assets=tokenizer|config|weights] [revision=TAG]
      Files from the HuggingFace hub. Credentials and HF_HUB_OFFLINE come from the environment.

Keys (* is the default):
  dtype           bf16* fp32 fp8: what weights are stored as; a DCP takes no fp8
  scale_fmt       float32 ue8m0: what new fp8 scales are; as in the input unless given
  max_shard_size  5GB*: of a safetensors file; 5GB, 500MiB or bytes
  workers         auto* (one a core) or a number of threads
  verify          false* true: compare a DCP that is read with its manifest, read the output again and
                  compare its checksums; one that is complete already is only read
  plan            false* true: only tell bytes, time and memory; with model=671b it needs no input
  speeds          [0.5,1,3,7]*: of the disk in GB/s, for plan
  model           hf* (from the input) {models}
  model.path      where config.json is read instead of the input

The output appears once it is complete. What is unfinished waits in .NAME.partial beside it: the same
command goes on with it, after a kill too. An output that holds anything is refused.

Exit codes: 0 done, 1 failed (a full disk), 2 a mistake in the command or its files, 75 stopped by Ctrl-C
or SIGTERM, where the same command goes on; a second one: 130.

Try:
  python {program} direction=hf_to_dcp input=DeepSeek-V3.1-Base output=dcp verify=true
  python {program} direction=dcp_to_hf input=outputs/RUN output=release
  python {program} direction=hf_to_dcp model=671b plan=true
"""


def config_groups(conf: Path = CONF) -> dict[str, list[str]]:
    """The choices of every config group, by the files of conf/."""
    groups = {}
    for folder in sorted(path for path in conf.iterdir() if path.is_dir() and path.name != LAYOUTS):
        groups[folder.name] = sorted(path.stem for path in folder.glob("*.yaml"))
    return groups


def train_help(program: str) -> str:
    """What train.py --help prints: usage, groups with their choices and defaults, a few commands."""
    root = yaml.safe_load((CONF / "config.yaml").read_text())
    defaults = {
        key: value for entry in root["defaults"] if isinstance(entry, dict) for key, value in entry.items()
    }
    lines = [
        f"usage: python {program} [-m] [GROUP=CHOICE ...] [KEY=VALUE ...]",
        "",
        "Trains models of the DeepSeek-V3 family. Groups and their choices (* is the default):",
    ]
    for group, choices in config_groups().items():
        marked = [f"{choice}*" if choice == defaults.get(group) else choice for choice in choices]
        lines.append(f"  {group:<12} {' '.join(marked) or '(none yet)'}")
    return "\n".join([*lines, "", _TRY.format(program=program), "Every key: docs/configuration.md"])


def convert_help(program: str) -> str:
    """What convert.py --help prints."""
    models = " ".join(choice for choice in config_groups()["model"] if choice != "hf")
    return _CONVERT.format(program=program, models=models)
