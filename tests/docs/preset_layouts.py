"""Compare conf/layouts.yaml with the fastest layouts of its kinds: `python -m tests.docs.preset_layouts`."""

import argparse
from typing import NamedTuple

import yaml

from dsv3.config.registry import CONF
from dsv3.launch.layout_choice import Request
from dsv3.planning.layout_search import Found, LayoutSearch
from tests.harness.composing import strict_config


class Preset(NamedTuple):
    """A row of conf/layouts.yaml, and the fastest layout of its kind on the same world."""

    world: int
    own: Found | None
    """With the row's degrees, and the best of everything else."""
    best: Found | None

    @property
    def share(self) -> float:
        """Return the speed of the row's degrees as a share of the fastest of their kind."""
        return 0.0 if self.own is None or self.best is None else self.own.speed / self.best.speed


def compare(model: str, preset: str, hardware: str = "h800") -> Preset:
    """Search the kind of a preset on the world of its row, and within the row's own degrees, in bf16."""
    world = yaml.safe_load((CONF / "layouts.yaml").read_text())[model][preset]["world"]
    choices = [f"model={model}", f"parallel={preset}", f"hardware={hardware}", "precision=bf16"]
    if preset == "cp" and model in ("671b", "kimi_k2"):
        choices.append("train.sequence_length=32768")  # what the row is made for
    config = strict_config(["task=search", *choices])
    typed = {choice.partition("=")[0]: choice for choice in choices}
    kind = Request(config, typed, model, preset)
    degrees = {
        f"parallel.degrees.{axis}": ""
        for axis, n in vars(config.parallel.degrees).items()
        if n is not None and n != "auto"
    }
    own = Request(config, typed | degrees, model, preset)
    found = [LayoutSearch(each.space(world)).run(1, front=False).best for each in (own, kind)]
    return Preset(world, *(best[0] if best else None for best in found))


def main() -> None:
    """Print a line per row of conf/layouts.yaml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    only = parser.parse_args().model
    for model, presets in yaml.safe_load((CONF / "layouts.yaml").read_text()).items():
        for preset in presets:
            if only in (None, model):
                row = compare(model, preset)
                degrees = [found and found.layout.degrees.to_json() for found in (row.own, row.best)]
                print(
                    f"{model} {preset} on {row.world}: {row.share:.1%} of the fastest", *degrees, flush=True
                )


if __name__ == "__main__":
    main()
