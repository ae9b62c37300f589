"""benchmarks/mutations.py finds the code that it breaks: a mutation that changes nothing proves nothing."""

import ast
import builtins
import keyword
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Placement

from benchmarks.code_patterns import edit
from benchmarks.mutations import ROOT, stored
from benchmarks.rules import MUTATIONS
from benchmarks.rules.mutation import Mutation

KNOWN = {name for owner in (torch, torch.Tensor, F, Placement, math, builtins) for name in dir(owner)}
KNOWN |= {"alpha", "_replace", "first"}  # of add_, of named tuples, and a local that a mutation makes itself


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.rule)
def test_a_mutation_fits_one_place_and_changes_it(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text()
    broken = mutation.apply(source)  # raises unless there is one place
    compile(broken, str(mutation.file), "exec")
    assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(source))
    places, _, keyword_ = mutation.tests.partition(" -k ")
    paths = [ROOT / place.partition("::")[0] for place in places.split()]
    assert all(path.exists() for path in paths)
    named = [each for each in keyword_.split() if each not in ("and", "or", "not")]
    named += [place.partition("::")[2] for place in places.split() if "::" in place]
    text = "".join(path.read_text() for path in paths if path.is_file())
    assert all(name.partition("[")[0] in text for name in named)
    # A name that is gone would raise, and any test would catch that.
    names = set(re.findall(r"(?<![\w$\"])[a-zA-Z_]\w*", mutation.new)) - set(keyword.kwlist)
    assert names - KNOWN <= set(re.findall(r"\w+", source)) | {"x"}


def test_the_stored_results_are_those_of_tests_and_rules_that_exist() -> None:
    found = stored(ROOT / "benchmarks" / "results" / "mutations.json")
    assert set(found) <= {mutation.rule for mutation in MUTATIONS}
    for test in filter(None, found.values()):
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), test


@pytest.mark.parametrize(
    ("source", "old", "new", "expected"),
    [
        (
            "y = torch.mm(a, b, out=c)",
            "torch.mm($l, $r, ...)",
            "torch.mm($r, $l, ...)",
            "y = torch.mm(b, a, out=c)",
        ),
        ("self.head(x).float()", "self.$layer($x).float()", "self.$layer($x)", "self.head(x)"),
        (
            "if a and b:\n    y = 1\n    z = 2",
            "if $a and $b: ...",
            "if True: ...",
            "if True:\n    y = 1\n    z = 2",
        ),
        ("a = f(x)\nb = g(a)\nc = a", "$a = f($x)\n$b = g($a)", "$b = g($x)", "b = g(x)\nc = a"),
        ("a\nlog(a)\nb", "log($x)", "", "a\npass\nb"),
        ("f(load[i].mean() - load[i], k - j)", "$x.mean() - $x", "$x", "f(load[i], k - j)"),
    ],
)
def test_a_pattern_replaces_what_it_fits(source: str, old: str, new: str, expected: str) -> None:
    assert edit(source, "", old, new) == expected + "\n"


@pytest.mark.parametrize(
    ("function", "old", "words"),
    [
        ("g", "a", "there is no g"),
        ("f", "b", "0 times"),
        ("f", "$x - $x", "0 times"),
        ("f", "$x", "times, not once"),
    ],
)
def test_a_pattern_that_does_not_fit_once_is_told(function: str, old: str, words: str) -> None:
    with pytest.raises(LookupError, match=words):
        edit("def f(a, c):\n    return a - c", function, old, "1")


def test_a_function_is_found_by_its_qualified_name() -> None:
    source = "class A:\n    def f(self):\n        return 1\n\nclass B:\n    def f(self):\n        return 1"
    assert edit(source, "B.f", "return $x", "return 2") == ast.unparse(ast.parse(source))[:-1] + "2\n"
