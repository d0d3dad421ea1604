"""Savers and the process around them: its umask, other savers, and file systems whose locks are not Linux' own."""

import errno
import fcntl
import os
import stat
import time

import pytest
from test_save_faults import faulty, in_child, plain, state

from adaptlora import adapter_folder, files


def mode(path):
    return oct(stat.S_IMODE(path.stat().st_mode))


def test_modes_are_the_umasks_which_nobody_touches(tmp_path, monkeypatch):
    def work():
        os.umask(0o027)

        def refuse(mask):
            raise AssertionError("the umask is the whole process's")

        os.umask = refuse
        plain(0).save(tmp_path / "adapter")
        with files.atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "file").touch()
        found = {mode(file) for file in (tmp_path / "adapter").iterdir()}
        assert found == {"0o640"} and mode(tmp_path / "folder") == "0o750"

    assert in_child(work) == 0


def test_without_locks_leftovers_go_by_age(tmp_path, monkeypatch):
    with files.temporary_file(tmp_path / "file") as temporary:
        names = [temporary.with_name(f".file.{letter * 16}.adaptlora-tmp") for letter in "ab"]
    for name in names:
        name.touch()
    monkeypatch.setattr(files, "_lock", lambda handle: None)
    os.utime(names[0], (time.time() - 90_000,) * 2)
    files.remove_leftovers(tmp_path / "file")
    assert list(tmp_path.iterdir()) == names[1:]


def test_bytes_are_on_disk_before_they_get_their_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append((os.stat(old).st_ino, new)), replace(old, new)))
    with files.atomic_file(tmp_path / "single") as temporary:
        temporary.write_text("x")
    plain(0).save(tmp_path / "adapter")
    renames = [call for call in calls if isinstance(call, tuple)]
    assert {new.name for _, new in renames} >= {"single", "adapter_config.json", "adapter_model.safetensors"}
    for rename in renames:
        assert rename[0] in calls[: calls.index(rename)], rename
    folder = (tmp_path / "adapter").stat().st_ino
    weights = next(n for n, call in enumerate(calls) if call in renames and call[1].name == "adapter_model.safetensors")
    waits = next(n for n, call in enumerate(calls) if call in renames and call[1].name.startswith(".adapter_config"))
    assert folder in calls[waits:weights]  # the names, too: of what waits before the weights are renamed


@pytest.mark.parametrize("times", [1, 99])
def test_a_save_that_another_mixed_with_is_made_again(times, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_lock", lambda handle: None)
    monkeypatch.setattr(adapter_folder, "_PAUSES", (0.0, 0.0, 0.0))
    real, calls = adapter_folder._write, []

    def mixed(*arguments):
        real(*arguments)
        calls.append(arguments)
        if len(calls) <= times:
            (tmp_path / "adapter_config.json").write_text("{}")

    monkeypatch.setattr(adapter_folder, "_write", mixed)
    if times == 1:
        plain(1).save(tmp_path)
        assert len(calls) == 2 and set(state(tmp_path)[2].values()) == {7 / 4}
    else:
        with pytest.raises(OSError, match="must hold the files of one save") as caught:
            plain(1).save(tmp_path)
        assert caught.value.errno == errno.EBUSY and len(calls) == 3


def test_without_locks_what_waits_may_be_a_living_savers(tmp_path, monkeypatch):
    plain(0).save(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        assert in_child(lambda: (faulty(patch, 3, only="replace"), plain(1).save(tmp_path))) == 9
    monkeypatch.setattr(files, "_lock", lambda handle: None)
    (waits,) = tmp_path.glob(".adapter_config.json.*[0-9a-f]")
    assert set(state(tmp_path)[2].values()) == {7 / 4} and waits.exists()  # read, and left where it is
    others = [tmp_path / f".adapter_config.json.{digit * 64}" for digit in "01"]
    for file in others:
        file.write_text("{}")
    os.utime(others[0], (time.time() - 90_000,) * 2)
    plain(0).save(tmp_path)
    assert not others[0].exists() and others[1].exists()


def test_a_folder_is_locked_where_only_files_open_for_writing_can_be(tmp_path, monkeypatch):
    """As NFS does it."""
    real = fcntl.flock

    def flock(handle, operation):
        if operation & fcntl.LOCK_EX and fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    with files.locked(tmp_path) as alone:
        assert alone
        with pytest.raises(TimeoutError, match="locked by another process"), files.locked(tmp_path):
            pass
    plain(0).save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
