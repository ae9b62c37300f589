"""A typed `_target_` is the choice that has it, in every group, and a typed dict adds its entries."""

from collections import Counter

import pytest

from dsv3.cli.chosen_targets import choose_by_target
from dsv3.config.registry import SCHEMAS
from dsv3.config.root import Config
from dsv3.errors import UserError

PAIRS = [
    (*name.split("/"), node._target_)
    for name, node in SCHEMAS.items()
    if "/" in name and name.partition("/")[0] in Config.__dataclass_fields__ and hasattr(node, "_target_")
]
COUNTS = Counter((group, target) for group, _, target in PAIRS)


@pytest.mark.parametrize(("group", "choice", "target"), PAIRS)
def test_a_target_that_one_schema_has_is_its_choice(group: str, choice: str, target: str) -> None:
    typed = [f"{group}._target_={target}"]
    alone = COUNTS[group, target] == 1
    assert choose_by_target(typed) == ([f"{group}={choice}"] if alone else typed)
    # A choice that is typed too stays, and so does the target, which then has to take the choice's keys.
    assert choose_by_target([f"{group}=other", *typed]) == [f"{group}=other", *typed]


def test_a_sweep_over_targets_is_one_over_choices() -> None:
    targets = "optimizer._target_=torch.optim.SGD,torch.optim.RAdam"
    assert choose_by_target(["-m", targets]) == ["-m", "optimizer=sgd,radam"]
    own = "schedule._target_=mine.Schedule"
    assert choose_by_target([own]) == [own]
    with pytest.raises(
        UserError, match=r"torch\.optim\.SparseAdam is not possible: it takes sparse gradients"
    ):
        choose_by_target(["-m", "optimizer._target_=torch.optim.SGD,torch.optim.SparseAdam"])


def test_a_dict_adds_its_entries_and_other_keys_stay() -> None:
    typed = ["optimizer.lr_scale={head.*:2}", "+optimizer.lr_scale={a:1}", "optimizer.lr=1", "--help"]
    assert choose_by_target(typed) == [f"+{typed[0]}", *typed[1:]]
    with pytest.raises(
        UserError, match=r"callbacks=\{\} adds nothing: name its entries, train.callbacks=\{NAME:"
    ):
        choose_by_target(["train.callbacks={}"])
