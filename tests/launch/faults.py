"""Optimizers that fail in a step, their second one, to be reported by a run."""

import os
import time
from pathlib import Path
from typing import Any

import torch

FOREVER = 600.0


class Hanging(torch.optim.AdamW):
    """Rank 1 does not come back."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        """One step, or none."""
        self.steps += 1
        if self.steps == 2:
            self.go_wrong()
        return super().step(closure)

    def go_wrong(self) -> None:
        """What happens in the second step."""
        if os.environ["RANK"] == "1":
            oversleep()


class HangingOnce(Hanging):
    """Rank 1 does not come back, but for the next attempt of the run; a file `hung` says so."""

    def go_wrong(self) -> None:
        """What happens in the second step."""
        if os.environ["RANK"] == "1" and not Path("hung").exists():
            Path("hung").touch()
            oversleep()


class Raising(Hanging):
    """Rank 1 raises while rank 0 does not come back."""

    def go_wrong(self) -> None:
        """What happens in the second step."""
        if os.environ["RANK"] == "1":
            raise ValueError("rank 1 has had enough")
        oversleep()


class Asleep(Hanging):
    """Rank 1 does not come back from its first step, and leaves a file `asleep` to say so."""

    def step(self, closure: Any = None) -> Any:
        """Begin the step that never ends."""
        if os.environ["RANK"] == "1":
            Path("asleep").touch()
            oversleep()
        return super().step(closure)


def oversleep() -> None:
    """Long enough for any test."""
    time.sleep(FOREVER)
