"""One flipped bit, in every file of a checkpoint in turn."""

from __future__ import annotations

import logging
import random
import shutil

import jax
import numpy as np
import pytest

from jaxheads import parallel
from jaxheads.checkpoints import checksums, orbax
from tests.checkpoints.test_orbax import CFG, assert_same, build, like, make_training, save


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Checkpoints of step 1 and step 2, of other parameters."""
    directory = tmp_path_factory.mktemp("checkpoints")
    with orbax.Checkpoints(directory) as checkpoints:
        save(checkpoints, 1, build(seed=1))
        save(checkpoints, 2, build(seed=2))
    return directory


def files(directory):
    return sorted(p.relative_to(directory) for p in directory.rglob("*") if p.is_file())


def flip(path, seed=0):
    content = bytearray(path.read_bytes())
    bit = random.Random(f"{path.name} {seed}").randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def restored(directory):
    with orbax.Checkpoints(directory) as checkpoints:
        return checkpoints.restore(*like(parallel.make_mesh("")))


def test_every_file_has_a_checksum(two_steps):
    content = (two_steps / "2/checksums-0-of-1.json").read_text()
    for name in files(two_steps / "2"):
        assert name.name.startswith("checksums-") or f'"{name.as_posix()}"' in content
    assert checksums.is_complete(two_steps / "2") and checksums.problems(two_steps / "2") == []


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_is_noticed(two_steps, tmp_path, caplog):
    names = files(two_steps / "2")
    assert len(names) > 15
    damaged = []
    for number, name in enumerate(names):
        directory = tmp_path / str(number)
        shutil.copytree(two_steps, directory)
        flip(directory / "2" / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            read = restored(directory)
        if read.step == 1:
            assert "is damaged" in caplog.text and (directory / "damaged-2").is_dir()
            damaged.append(name)
        assert_same(read.model, build(seed=read.step))
        assert_same(read.training, make_training(build(seed=read.step)))
        shutil.rmtree(directory)
    # A bit of the checksums' own white space may be nothing; every other file counts.
    assert len(damaged) >= len(names) - 1


@pytest.mark.parametrize("what", ["missing", "shorter", "empty", "longer"])
def test_files_that_are_not_as_long_as_they_were(two_steps, tmp_path, what):
    directory = tmp_path / "copy"
    shutil.copytree(two_steps, directory)
    path = max((directory / "2").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = path.read_bytes()
    if what == "missing":
        path.unlink()
    else:
        path.write_bytes({"shorter": content[:-1], "empty": b"", "longer": content + b"\0"}[what])
    assert restored(directory).step == 1


def test_reading_skips_what_is_damaged_and_changes_nothing(two_steps, tmp_path, caplog):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_steps, directory)
    flip(directory / "2/model/manifest.ocdbt")
    before = files(directory)
    with caplog.at_level(logging.WARNING):
        assert_same(orbax.load_model(tmp_path), build(seed=1))
    assert "checkpoint" in caplog.text and "2 is damaged (model/manifest.ocdbt" in caplog.text
    assert files(directory) == before
    with pytest.raises(ValueError, match=r"2 is damaged \(model/manifest.ocdbt has other bytes"):
        orbax.load_model(directory / "2")
    flip(directory / "1/training/manifest.ocdbt")  # not needed for a model
    assert_same(orbax.load_model(directory), build(seed=1))


def test_when_all_are_damaged_nothing_starts_over(two_steps, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_steps, directory)
    for step in "12":
        flip(directory / step / "config/metadata")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged; the newest, 2: conf"):
        orbax.Checkpoints(directory)
    assert (directory / "1").is_dir() and (directory / "2").is_dir()


def test_checkpoints_without_checksums_are_taken_as_they_are(two_steps, tmp_path):
    """Killed between the end of a save and its checksums, or saved by an earlier version."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_steps, directory)
    (directory / "2/checksums-0-of-1.json").unlink()
    assert not checksums.is_complete(directory / "2")
    assert restored(directory).step == 2


def test_shares_of_processes_cover_every_file_once(two_steps, tmp_path):
    directory = tmp_path / "step"
    shutil.copytree(two_steps / "2", directory)
    (directory / "checksums-0-of-1.json").unlink()
    for part in range(3):
        assert not checksums.is_complete(directory)
        checksums.write(directory, part, 3)
    assert checksums.is_complete(directory)
    for path in [p for p in directory.rglob("*") if p.is_file()]:
        original = path.read_bytes()
        flip(path)
        # Another number of processes may read what three wrote.
        found = [checksums.problems(directory, part, 2) for part in range(2)]
        assert sum(map(bool, found)) == 1 or path.name.startswith("checksums-"), path
        path.write_bytes(original)
    assert checksums.problems(directory) == []


def test_a_save_that_fails_says_why_and_leaves_the_others(tmp_path, monkeypatch):
    directory = tmp_path / "checkpoints"
    with orbax.Checkpoints(directory) as checkpoints:
        save(checkpoints, 1, build(seed=1))
        checkpoints.wait()

        def refuse(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checksums, "write", refuse)
        save(checkpoints, 2, build(seed=2))
        with pytest.raises(OSError, match=r"step 2 could not .*No space left.*step 1 is complete"):
            checkpoints.wait()
        monkeypatch.undo()
        checkpoints._writing = None
    model = orbax.load_model(directory / "1")
    np.testing.assert_array_equal(
        np.asarray(model.embed.table[...]), np.asarray(build(seed=1).embed.table[...])
    )
    assert jax.tree.structure(model) == jax.tree.structure(build()) and model.cfg == CFG
