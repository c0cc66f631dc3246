"""What images consist of: every name of every file, open to all, or a refusal before the start."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tandem_local.components.images import check_images, default_images, image_files
from tandem_local.errors import RequirementError
from tandem_local.progress import ProgressEvent, silent
from tandem_local.spec import ImageEntry


def environment_at(folder: Path) -> Path:
    """A virtual environment with an editable install of `folder`/source; returns its bin folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    (folder / "source").mkdir()
    [site] = (folder / "env").glob("lib/python*/site-packages")
    (site / "editable.pth").write_text(f"{folder / 'source'}\n")
    return folder / "env" / "bin"


def covers(files: tuple[str, ...], path: Path) -> bool:
    return any(Path(name) in (path, *path.parents) for name in files)


def test_an_image_consists_of_environment_interpreter_and_sources(tmp_path: Path) -> None:
    real = tmp_path / "with a blank"
    real.mkdir()
    environment_at(real)
    (tmp_path / "link").symlink_to(real)
    bin_dir = tmp_path / "link" / "env" / "bin"
    files = image_files(bin_dir)
    for needed in (bin_dir / "python3", real / "env" / "bin", real / "source"):
        assert covers(files, needed)
    for module in (os, subprocess):
        assert module.__file__ is not None
        assert covers(files, Path(module.__file__).resolve())
    assert covers(files, (bin_dir / "python3").resolve())
    assert not covers(files, Path.home() / "anything")
    assert len(files) == len(set(files))


def test_images_take_nothing_of_the_users_home_or_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    for name in ("HOME", "HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "XDG_CACHE_HOME", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("TANDEM_STATE_DIR", str(tmp_path / "state"))
    for image in default_images(Path(sys.executable).parent):
        assert covers(image.files, Path(sys.executable).parent)
        assert not covers(image.files, home / ".cache" / "huggingface" / "hub")
        assert str(home) not in image.env.values()
        assert not {"HF_TOKEN", "HF_ENDPOINT", "OMP_NUM_THREADS"} & set(image.env)


def test_what_every_image_can_write_is_like_tmp() -> None:
    for image in default_images(Path(sys.executable).parent):
        [folder] = image.shared
        assert image.env["PYTHONPYCACHEPREFIX"] == folder
        assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o1777


def test_only_the_engines_image_has_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("gcc", "x86_64-linux-gnu-gcc-12", "clang-19", "cat", "gcc-ar"):
        (tmp_path / name).touch()
    (tmp_path / "cc").symlink_to("gcc")
    monkeypatch.setattr("tandem_local.components.images.SEARCH_PATH", f"{tmp_path}:/none")
    hidden = {
        image.name.rpartition("/")[2]: {Path(name).name for name in image.hidden}
        for image in default_images(Path(sys.executable).parent)
    }
    compilers = {"gcc", "x86_64-linux-gnu-gcc-12", "clang-19", "cc"}
    assert hidden["tandem-operator:*"] == hidden["tandem-router:*"] == compilers
    assert hidden["tandem-engine:*"] == set()


def test_files_for_their_owner_alone_are_opened_and_the_folders_above_stay_closed(
    tmp_path: Path,
) -> None:
    home, app = tmp_path / "home", tmp_path / "home" / "app"
    app.mkdir(parents=True)
    for name, mode in (("module.py", 0o600), ("tool", 0o700), ("open", 0o644)):
        (app / name).touch()
        (app / name).chmod(mode)
    secret = home / "secret"
    secret.touch(0o600)
    (app / "outside").symlink_to(secret)
    for folder in (app, home):
        folder.chmod(0o700)
    told: list[ProgressEvent] = []
    image = ImageEntry("x:1", (str(app / "tool"),), files=(str(app), str(home / "gone")))
    check_images([image], told.append)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (home, app, app / "module.py", app / "tool", secret)
    }
    assert modes == {
        **{"home": 0o700, "app": 0o755, "module.py": 0o644, "tool": 0o755},
        "secret": 0o600,
    }
    assert [event.message for event in told] == ["made 3 files of the images readable"]
    check_images([image], told.append)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            ImageEntry("x:1", ("/var/lib/kubelet/t/.venv/bin/x",)),
            r"folder of their own at /var/lib/kubelet: move the checkout, its interpreter or",
        ),
        (ImageEntry("x:1", files=("/sys/opt",)), "folder of their own at /sys: move"),
        (ImageEntry("x:1", files=("/opt/a:b",)), "':' can't stand in PATH: rename it"),
        (
            ImageEntry("x:1", ("/opt/none/bin/x",), files=("/opt/none",)),
            "/opt/none/bin/x, which image x:1 runs, is missing: install Tandem again with",
        ),
    ],
)
def test_what_pods_could_never_see_is_refused(image: ImageEntry, message: str) -> None:
    with pytest.raises(RequirementError, match=message):
        check_images([image], silent)


def test_files_that_cannot_be_opened_are_named_with_the_command_that_opens_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module.py").touch(0o600)

    def chmod(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tandem_local.components.images.os.chmod", chmod)
    with pytest.raises(RequirementError, match=r"can't read .*: run `chmod -R go\+rX "):
        check_images([ImageEntry("x:1", files=(str(tmp_path),))], silent)
