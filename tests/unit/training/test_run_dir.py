"""A folder that no run can write: one error of ``run_dir``, from `train` as from `check`, before anything slow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.training.run_lock import LOCK_FILE, check_run_dir, lock_run_dir
from tests.unit.check.tiny_run import TinyRun, only, save_model
from tests.unit.full_disk import full_disk

NOBODY = 65534


@pytest.fixture
def tiny(tmp_path: Path) -> TinyRun:
    return TinyRun(tmp_path, save_model(tmp_path / "saved"))


@contextmanager
def without_privileges() -> Iterator[None]:
    """Run as a user without rights for a moment: root may write everywhere."""
    user = os.geteuid()
    if user == 0:
        os.setresuid(NOBODY, NOBODY, 0)  # 0 is kept as the saved id, which allows the way back
    try:
        yield
    finally:
        if user == 0:
            os.setresuid(0, 0, 0)


def refusal(run_dir: Path) -> ConfigError:
    """As a run meets it; what can be known without writing is the same."""
    with pytest.raises(ConfigError) as caught, lock_run_dir(run_dir):
        pytest.fail("it holds a folder that cannot be written")
    with pytest.raises(ConfigError) as foreseen:
        check_run_dir(run_dir)
    assert str(foreseen.value) == str(caught.value)
    assert caught.value.field == "run_dir"
    return caught.value


@pytest.mark.parametrize("below", ["", "run", "more/run"])
def test_a_file_is_no_folder_nor_is_anything_below_it(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert f"{file} is not a folder; set" in str(refusal(file / below))
    assert file.read_text() == "mine"


def test_a_link_to_nothing_is_no_folder(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    assert f"{link} is a broken link" in str(refusal(link))
    (tmp_path / "gone").mkdir()
    with lock_run_dir(link):
        assert (tmp_path / "gone" / LOCK_FILE).is_file()


def test_the_kernel_s_own_file_system_takes_no_folder() -> None:
    assert "/proc does not allow new folders" in str(refusal(Path("/proc/nowhere/run")))


def test_a_folder_of_others_is_refused() -> None:
    with TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        os.chmod(folder, 0o555)
        with without_privileges():
            assert f"{folder} is not writable for this user" in str(refusal(Path(folder) / "run"))


def test_a_read_only_file_system_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = os.statvfs(tmp_path)
    flagged = os.statvfs_result((*tuple(flags)[:8], flags.f_flag | os.ST_RDONLY, flags.f_namemax))
    monkeypatch.setattr(os, "statvfs", lambda path: flagged)  # mounting one takes root
    assert f"{tmp_path} is on a read-only file system" in str(refusal(tmp_path / "run"))


def test_what_cannot_be_foreseen_is_the_same_error(tmp_path: Path) -> None:
    run_dir = tmp_path / ("x" * 300)
    check_run_dir(run_dir)
    with (
        pytest.raises(ConfigError, match=r"run_dir: .* cannot be written \(File name too long\)"),
        lock_run_dir(run_dir),
    ):
        pytest.fail("no folder has such a name")


def test_a_full_disk_is_said_and_the_lock_given_back(tmp_path: Path) -> None:
    with full_disk(0), pytest.raises(ConfigError, match=r"run\.lock cannot be written \(File too large\)"):
        lock_run_dir(tmp_path).__enter__()
    with lock_run_dir(tmp_path):
        pass


@pytest.mark.parametrize("run_dir", ["{file}", "{file}/run", "/proc/x"])
def test_check_says_what_train_says(tiny: TinyRun, run_dir: str) -> None:
    run_dir = run_dir.format(file=tiny.config)
    finding = only(tiny.found(f"run_dir={run_dir}"))
    assert f"{finding.field}: {finding.problem}; {finding.fix}" == str(refusal(Path(run_dir)))
    assert finding.severity == "error"
