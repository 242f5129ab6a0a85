"""The file of a profile: what was saved before can be read, and has the same findings."""

import json
from pathlib import Path

import pytest
from made_up_profiles import FORMS, make_profile
from repository import REPOSITORY

from ssd_fast.profiling.bottleneck import find_bottlenecks
from ssd_fast.profiling.profile import Profile, ProfileError, read_profile

SAVED = REPOSITORY / "tests" / "profiling" / "saved_profile.json"


def test_a_profile_saved_by_an_earlier_version_is_read_with_the_same_findings() -> None:
    saved = read_profile(SAVED)
    assert json.loads(saved.model_dump_json()) == json.loads(SAVED.read_text())
    found = [(finding.name, finding.lost) for finding in find_bottlenecks(saved)]
    assert found == [(finding.name, finding.lost) for finding in saved.findings]


@pytest.mark.parametrize("form", FORMS)
def test_a_profile_is_read_as_it_was_saved(form: str, tmp_path: Path) -> None:
    profile = make_profile(**FORMS[form])
    (tmp_path / "profile.json").write_text(profile.model_dump_json())
    assert read_profile(tmp_path) == profile


def test_a_file_that_is_no_profile_is_refused_with_the_key(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ProfileError, match=r"other\.json: expected a profile of `ssd-fast profile`: machine"):
        read_profile(path)
    values = json.loads(SAVED.read_text()) | {"new": 1}
    with pytest.raises(ValueError, match="new"):
        Profile.model_validate(values)
