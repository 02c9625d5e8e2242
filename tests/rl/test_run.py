from concurrent.futures import ThreadPoolExecutor

import pytest

from rlbridge.errors import ConfigError
from rlbridge.rl.run import open_run


def test_a_run_without_a_name_gets_the_first_free_one(tmp_path):
    names = [open_run(tmp_path / "runs", None, "grpo").name for _ in range(3)]
    assert names == ["grpo", "grpo-2", "grpo-3"]


def test_runs_that_start_at_once_get_directories_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        directories = list(pool.map(lambda _: open_run(tmp_path, None, "grpo"), range(32)))
    assert len(set(directories)) == 32


def test_a_name_is_used_once(tmp_path):
    directory = open_run(tmp_path, "mine", "grpo")
    assert directory == tmp_path / "mine"
    assert directory.is_dir()
    with pytest.raises(ConfigError, match=r"(?s)exists already.*rlbridge run --resume .*mine"):
        open_run(tmp_path, "mine", "grpo")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a"])
def test_a_name_stays_in_the_directory_for_runs(tmp_path, name):
    with pytest.raises(ConfigError, match="not a name for a run"):
        open_run(tmp_path, name, "grpo")


def test_a_file_in_place_of_the_directory_for_runs_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match="runs"):
        open_run(tmp_path / "runs", None, "grpo")
