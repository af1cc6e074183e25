"""`pytest bench`: times every op, size, pass and provider with pytest-benchmark; --long adds slow sizes."""

import functools

import pytest

from .harness.measure import rounds_of
from .harness.problem import Instance, label
from .harness.session import Session

SECONDS = 0.5  # per benchmark


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="benchmarks: include the sizes whose calls take seconds")


def pytest_generate_tests(metafunc):
    if "timed" in metafunc.fixturenames:
        name, long = metafunc.module.__name__.rpartition(".")[2], metafunc.config.getoption("--long")
        session = Session([name], quick=not long)
        cases = [(session, group, p) for group in session.groups() for p in session.chosen(group.problem)]
        ids = [f"{label(group.size)}-{group.what}-{p.name}" for _, group, p in cases]
        metafunc.parametrize(("session", "group", "provider"), cases, ids=ids)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore"))  # the peers' own


instance = functools.lru_cache(maxsize=1)(Instance)


@pytest.fixture
def timed(benchmark, session, group, provider):
    """Checks the provider and times it."""

    def time():
        reason = group.problem.missing(provider, "cpu") or session.refused(group, provider)
        if reason:
            pytest.skip(f"{provider.name}: {reason}")
        drawn = instance(group.problem, group.size, group.dtype, "cpu")
        call, seconds, error = session.checked(group, provider, drawn)
        assert error <= drawn.allowed(provider)
        benchmark.group = str(group)
        rounds, calls = rounds_of(seconds, SECONDS)
        with provider.forced():
            benchmark.pedantic(call, rounds=rounds, iterations=calls)

    return time


def pytest_terminal_summary(terminalreporter):
    reasons = {report.longrepr[2] for report in terminalreporter.getreports("skipped")}
    for reason in sorted(reasons):
        terminalreporter.write_line(f"missing: {reason.removeprefix('Skipped: ')}")
