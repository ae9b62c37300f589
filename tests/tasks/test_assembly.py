"""What a resumed run is put together of."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv3.errors import UserError
from dsv3.tasks.assembly import own_tokenizer
from dsv3.tokens.tokenizer import Tokenizer, TrainedTokenizer
from tests.data.texts import sentence


def tokenizer_of(size: int) -> Tokenizer:
    return TrainedTokenizer(size).prepare(sentence(number) for number in range(20))


def test_a_run_whose_tokenizer_has_changed_is_not_trained_on(tmp_path: Path) -> None:
    """It went on without a word on ids that the weights do not know."""
    run = tmp_path / "a run, it's"
    job: Any = SimpleNamespace(config=SimpleNamespace(run=SimpleNamespace(resume=True)), run_dir=run)
    first, other = tokenizer_of(290), tokenizer_of(291)
    assert first.fingerprint() != other.fingerprint()
    other.save(run / "tokenizer")
    assert own_tokenizer(job) is not None  # nothing is trained yet
    for step, kept in ((1, other), (2, first)):
        kept.save(run / "checkpoints" / f"step-{step}" / "tokenizer")
        (run / "checkpoints" / f"step-{step}" / ".metadata").touch()
        (run / "checkpoints" / f"step-{step}" / "state.json").write_text("{}")
        if step == 1:
            assert own_tokenizer(job) is not None
    with pytest.raises(
        UserError, match=r"tokenizer has changed: the weights know the ids of .*step-2"
    ) as caught:
        own_tokenizer(job)
    remedy = str(caught.value).partition("put that back: ")[2]
    subprocess.run(remedy, shell=True, check=True)
    found = own_tokenizer(job)
    assert found is not None
    assert found.fingerprint() == first.fingerprint()
