"""A short slice of `make fuzz`, the same inputs in every run."""

from __future__ import annotations

import random
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.fuzz.fuzz import fuzz, in_process
from tests.fuzz.targets import Target

COUNTS = {"heads": 6000, "bodies": 4000, "keys": 3000, "key_files": 1000, "reloads": 150}


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Generator[dict[str, Target]]:
    with in_process(tmp_path_factory.mktemp("fuzz")) as made:
        yield {target.name: target for target in made}


@pytest.mark.parametrize("name", COUNTS)
def test_a_slice_has_no_finding_and_reaches_both_sides(targets: dict[str, Target], name: str) -> None:
    target = targets[name]
    assert fuzz(target, 1, range(COUNTS[name])) == []
    assert len(target.verdicts) >= 2


class _Broken:
    """A target that mistakes every tenth input."""

    name = "broken"

    def __init__(self) -> None:
        self.verdicts: dict[str, int] = {}

    def make(self, rng: random.Random) -> bytes:
        return b"%d" % rng.randrange(10)

    async def check(self, data: bytes, rng: random.Random) -> None:
        assert data != b"7"

    def problem_of_log(self) -> str:
        return ""


def test_a_finding_names_the_input_that_repeats_it() -> None:
    first, *_ = fuzz(_Broken(), 1, range(200))  # type: ignore[arg-type]
    (again,) = fuzz(_Broken(), 1, range(first.number, first.number + 1))  # type: ignore[arg-type]
    assert (again.data, again.problem) == (b"7", first.problem)


def test_inputs_are_the_same_in_every_run(tmp_path: Path) -> None:
    with in_process(tmp_path) as made:
        for target in made:
            one, two = (target.make(random.Random("x")) for _ in range(2))
            assert one == two
