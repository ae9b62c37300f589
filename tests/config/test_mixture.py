"""The schema of data=mixture: what can be typed, what is stored, and what is refused, by its key."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from dsv3.cli.arguments import prepare
from dsv3.config.convergence import Kind, kind
from dsv3.config.mixture import MixtureDataConfig, read_sources, weight_at
from dsv3.config.overrides import absolute_paths, compose
from dsv3.config.root import Config
from dsv3.config.strict import strict, to_absolute_yaml, validate
from dsv3.errors import UserError

TYPED = "data.sources={web:{path:/a,weight:0.7},code:{source:text,path:b,weight:[[0,0.3],[1e12,0.5]]}}"


def composed(*typed: str) -> Config:
    config: Config = strict(compose(prepare(["data=mixture", *typed])))
    return config


def sources(config: Config) -> MixtureDataConfig:
    assert isinstance(config.data, MixtureDataConfig)
    return config.data


def test_sources_are_typed_in_one_word_or_key_by_key() -> None:
    one = sources(composed(TYPED))
    assert one.sources["web"] == {"path": "/a", "weight": 0.7}
    parts = (
        "web.path=/a",
        "web.weight=0.7",
        "code.source=text",
        "code.path=b",
        "code.weight=[[0,0.3],[1e12,0.5]]",
    )
    assert sources(composed(*(f"data.sources.{part}" for part in parts))).sources == one.sources
    code, web = read_sources(one)
    assert (code.name, type(code.config).__name__) == ("code", "TextDataConfig")
    assert (web.name, type(web.config).__name__) == ("web", "ShardsDataConfig")
    assert [str(weight_at(code.weights, tokens)) for tokens in (0, 10**12 - 1, 10**12)] == [
        "3/10",
        "3/10",
        "1/2",
    ]


def test_a_study_lists_sources_and_what_is_typed_wins_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    study = {
        "defaults": [{"override /data": "mixture"}],
        "data": {
            "sources": {
                "web": {"path": "/a", "weight": 1},
                "code": {"path": "/b", "weight": [[0, 1], [9, 2]]},
            }
        },
    }
    text = f"# @package _global_\n{yaml.dump(study)}"
    (tmp_path / "experiments" / "mix.yaml").write_text(text)
    typed = prepare(
        ["experiments=mix", "data.sources.code.weight=0.5", "data.sources={more:{path:/c,weight:2}}"]
    )
    config = sources(strict(compose(typed, [f"file://{tmp_path}"])))
    assert config.sources == {
        "web": {"path": "/a", "weight": 1},
        "code": {"path": "/b", "weight": 0.5},
        "more": {"path": "/c", "weight": 2},
    }


def test_a_source_has_the_keys_of_the_mixture_where_it_does_not_set_them() -> None:
    config = composed(TYPED, "data.fim_rate=0.1", "data.sources.code.fim_rate=0.5", "data.packing=best_fit")
    code, web = read_sources(sources(config))
    assert (code.config.fim_rate, web.config.fim_rate) == (0.5, 0.1)
    assert code.config.packing.name == web.config.packing.name == "best_fit"


def test_paths_are_filled_in_stored_absolute_and_do_not_count_as_learnt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    typed = TYPED.replace("/a", "~/it's=here")
    config = sources(composed(typed))
    assert config.sources["web"]["path"] == "/home/me/it's=here"
    stored = yaml.safe_load(yaml.dump(to_absolute_yaml(config)))
    assert stored["sources"]["code"]["path"] == str(Path("b").absolute())
    assert stored["sources"]["code"]["weight"] == [[0, 0.3], [1e12, 0.5]]
    (override,) = absolute_paths(["+data.sources={code:{path:'b',weight:1}}"])
    assert override == f"+data.sources={{code:{{path:'{Path('b').absolute()}',weight:1}}}}"
    assert kind("data.sources.web.path") is Kind.computed
    assert kind("data.sources.web.weight") is kind("data.sources.web.fim_rate") is Kind.learnt


def to_plain(node: Any) -> Any:
    """Return what OmegaConf makes of a parsed override."""
    return OmegaConf.to_container(OmegaConf.create(node)) if node else {}


WRONG = [
    ("", ["data.sources=0", "{web:{path:DIR,weight:0.7}"]),
    ("web:3", ["data.sources.web=3"]),
    ("a b:{path:/a,weight:1}", ["data.sources.a b", "letters"]),
    ("web:{pth:/a,weight:1}", ["'data.sources.web.pth'", "Did you mean 'data.sources.web.path'?"]),
    ("web:{source:txt,weight:1}", ["data.sources.web.source=txt", "Did you mean 'text'?"]),
    ("web:{source:mixture,weight:1}", ["data.sources.web.source=mixture", "Possible:"]),
    ("web:{source:input,weight:1}", ["data.sources.web.source=input", "Possible:"]),
    ("web:{source:stdlib,separator:x,weight:1}", ["'data.sources.web.separator'", "source: text has it"]),
    ("web:{source:text,weight:1}", ["data.sources.web.path=null"]),
    ("web:{path:/a,weight:1,held_out:0.7}", ["data.sources.web.held_out=0.7", "below 0.5"]),
    ("web:{path:/a,weight:1,held_out:abc}", ["data.sources.web.held_out", "abc"]),
    ("web:{path:/a,weight:1,document_mask:true}", ["data.sources.web.document_mask", "data.document_mask="]),
    ("web:{path:/a}", ["data.sources.web.weight is missing"]),
    ("web:{path:/a,weight:-1}", ["data.sources.web.weight=-1"]),
    ("web:{path:/a,weight:heavy}", ["data.sources.web.weight=heavy"]),
    ("web:{path:/a,weight:nan}", ["data.sources.web.weight=nan"]),
    ("web:{path:/a,weight:[]}", ["data.sources.web.weight=[]"]),
    ("web:{path:/a,weight:[[5,1]]}", ["data.sources.web.weight=[[5, 1]]", "token 0"]),
    ("web:{path:/a,weight:[[0,1],[9,1],[9,2]]}", ["data.sources.web.weight", "grow"]),
    ("web:{path:/a,weight:[[0,1],[7,0]]},code:{path:/b,weight:0}", ["data.sources", "from token 7 on"]),
]


@pytest.mark.parametrize(("typed", "words"), WRONG)
def test_a_mistake_is_told_with_its_key_and_the_way_on(typed: str, words: list[str]) -> None:
    named = OverridesParser.create().parse_override(f"sources={{{typed}}}").value()
    with pytest.raises(UserError) as caught:  # as strict() checks what is composed
        validate(MixtureDataConfig(sources=to_plain(named)), path="data.")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_sources_than_a_block_can_count_exactly_are_refused() -> None:
    many = MixtureDataConfig(sources={str(n): {"path": "/a", "weight": 1} for n in range(257)})
    with pytest.raises(UserError, match="1 to 256"):
        many.validate()
