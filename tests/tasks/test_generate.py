"""task=generate: the ids that begin a prompt and those that end the text, by the files of a release."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiktoken

from dsv3.config.task import SamplingConfig
from dsv3.errors import UserError
from dsv3.launch.trained_on import tokenizer_folder
from dsv3.tasks.generate import sample_text
from dsv3.tasks.setup import load_own_tokenizer, read_tokenizer
from dsv3.tokens.tokenizer import BOS, Tokenizer, TrainedTokenizer
from tests.data.texts import sentence
from tests.harness.commands import PlannedCommand
from tests.hf.test_config_json import RELEASED_V3
from tests.tokens.tiktoken_release import PATTERN, ranks, write_release


class Echo:
    """Stands in for a model: gives the prompt's ids back, and remembers what it was asked."""

    def generate(self, prompts: list[list[int]], *settings: Any) -> list[list[int]]:
        """Return the prompts."""
        self.prompts, self.ends = prompts, settings[4]
        return prompts


def asked(tokenizer: Tokenizer, prompt: str) -> Any:
    """Return the prompt's ids and the ids to stop at."""
    model: Any = Echo()
    sample_text(model, tokenizer, SamplingConfig(), prompt, 0)
    return SimpleNamespace(ids=model.prompts[0], ends=model.ends)


def test_a_release_without_a_tokenizer_json_is_prompted_with_the_ids_of_its_own_rules(
    planned: PlannedCommand, tmp_path: Path
) -> None:
    learnt = ranks(1000)
    release = write_release(tmp_path / "release", learnt, "tokenization_moonshot")
    (release / "config.json").write_text(json.dumps(RELEASED_V3))
    load = [f"checkpoint.load=hf:{release}", "hardware=h100", "hardware.memory_bytes=100000000000000"]
    config = planned.run("task=generate", *load).job.config
    tokenizer = load_own_tokenizer(config, release)
    assert tokenizer is not None
    reference = tiktoken.Encoding("made up", pat_str=PATTERN, mergeable_ranks=learnt, special_tokens={})
    found = asked(tokenizer, "漢字 and it's 12345")
    assert found.ids == reference.encode_ordinary("漢字 and it's 12345")  # the release adds no bos
    assert found.ends == (len(learnt) + 1, len(learnt) + 2)
    assert asked(tokenizer, "").ids == [tokenizer.bos]


@pytest.mark.parametrize(
    ("place", "beside", "ends"),
    [(".", "", (1, 5, 4)), ("hf", "tokenizer_config.json", (1, 5, 4)), ("hf", "", (1,))],
    ids=["of the checkpoint", "of its assets", "of a tokenizer left behind"],
)
def test_a_tokenizer_stops_at_the_ids_that_the_files_of_the_weights_name(
    tmp_path: Path, place: str, beside: str, ends: tuple[int, ...]
) -> None:
    TrainedTokenizer(300).prepare([sentence(1)]).save(tmp_path / "tokenizer")
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "generation_config.json").write_text('{"eos_token_id": [5, 4]}')
    if beside:
        (tmp_path / place / beside).write_text("{}")
    folder = tokenizer_folder(tmp_path)
    assert folder == tmp_path / "tokenizer"
    found = asked(read_tokenizer(folder, tmp_path), "def ")
    assert found.ends == ends
    assert found.ids[0] == 0


def test_a_prompt_begins_with_bos_as_the_file_says(tmp_path: Path) -> None:
    tokenizer = TrainedTokenizer(300).prepare([sentence(1)])
    tokenizer.save(tmp_path)
    assert asked(tokenizer, "def ").ids == [0, *tokenizer.encode("def ")]
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": False}))
    without = Tokenizer.from_file(tmp_path)
    assert asked(without, "def ").ids == tokenizer.encode("def ")
    assert asked(without, "").ids == [0]  # a text has to begin with something
    file.write_text(json.dumps({"bos_token": None, "eos_token": BOS}))
    (tmp_path / "special_tokens_map.json").unlink()
    with pytest.raises(UserError, match=r"task\.prompt is empty"):
        asked(Tokenizer.from_file(tmp_path), "")
