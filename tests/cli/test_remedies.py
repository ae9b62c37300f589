"""What an error message tells to type is typed, and the error is gone."""

import re

import pytest

from tests.cli.test_error_messages import MISTAKES
from tests.harness.commands import PlannedCommand

pytestmark = pytest.mark.slow

REMEDY = re.compile(
    r"(?:\b(?:use|take|give|with|in|by|or|try|add|type|that work|having|has it|works|:|;) )"
    r"(?P<remedy>(?:[a-z_]+/)?[a-z_]+(?:\.[a-z_0-9]+)*=[a-z0-9_]+)(?=[\s,;:)]|$)"
)
"""KEY=VALUE behind a word that recommends it, with a value that can be typed as it stands."""

MORE = [
    "precision=fp8 hardware=a100 task=plan parallel=fsdp launch.world_size=8",
    "parallel=tp_ep parallel.expert.backend=deepep hardware=cpu task=plan",
    "precision=fp8 precision.fp8.granularity=tensor precision.fp8.engine=scaled_mm hardware=h100 task=plan",
]
"""More mistakes of planning, whose messages name a remedy."""


def remedies(message: str, typed: list[str]) -> list[str]:
    """Return what a message recommends to type, without what was typed already."""
    # The mistake itself comes first, and may be written in another way than it was typed.
    found = REMEDY.finditer(message.removeprefix("error: "))
    return [each["remedy"] for each in found if each["remedy"] not in typed]


def test_every_remedy_that_a_mistake_of_the_command_line_is_told_works(planned: PlannedCommand) -> None:
    tried, kept = 0, []
    for mistake in [*MISTAKES, *MORE]:
        typed = mistake.split(" ")
        message = planned.run("logger=none", *typed).err.splitlines()[-1:]
        for remedy in remedies(" ".join(message), typed):
            key = remedy.partition("=")[0]
            others = [each for each in typed if re.split("[=@]", each.lstrip("+"))[0] != key]
            after = planned.run("logger=none", *others, remedy).err.splitlines()[-1:]
            tried += 1
            if after == message:
                kept.append((mistake, remedy, message))
    assert not kept
    assert tried > 10
