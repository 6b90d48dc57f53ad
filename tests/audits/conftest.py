"""Contexts of runs on toy data."""

import types

import pytest

from tests.toy import make_context


@pytest.fixture
def make_run(tmp_path):
    """Makes the context of a run and the list of its warnings."""

    def make(problem, data):
        warnings: list[str] = []
        ctx = make_context(problem, data, tmp_path)
        reporter = types.SimpleNamespace(warn=warnings.append)
        return ctx._replace(reporter=reporter), warnings

    return make
