"""Savers and the process around them: its umask, other savers, and file systems whose locks are not Linux' own."""

import os
import stat
import time

from test_save_faults import in_child, plain

from adaptlora import files


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
