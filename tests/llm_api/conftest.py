"""Go's decoder as a judge, compiled once for the suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.llm_api.go_oracle import GoOracle, compile_oracle


@pytest.fixture(scope="session")
def go(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GoOracle]:
    with GoOracle(compile_oracle(tmp_path_factory.mktemp("oracle"))) as oracle:
        yield oracle
