"""How threads wait: for a bounded time, unless the user says something else."""

import os

import pytest

from ssd_fast.openmp import wait_briefly

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({}, ("ACTIVE", "20000")),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, ("PASSIVE", None)),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
        ({"GOMP_SPINCOUNT": "7"}, ("ACTIVE", "7")),
    ],
)
def test_the_users_own_choice_stays(
    monkeypatch: pytest.MonkeyPatch, theirs: dict[str, str], expected: tuple[str, str | None]
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    wait_briefly()
    assert tuple(map(os.environ.get, NAMES)) == expected
