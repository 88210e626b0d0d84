"""The images, built from the Dockerfile and started: what a pod would run, on the file system that it would see.

No container engine is needed: buildah builds with chroot isolation, and the service is started in a chroot whose file
system is mounted read-only, as the user of the image. `CONNITO_IMAGES_DIR` keeps the build between sessions.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from connito.platform.servers import NatsServer, ObjectStore, free_ports
from connito.wire.identity import Identity
from connito.wire.roster import Roster

pytestmark = [pytest.mark.images, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
CONTROL, MODEL = ("coordinator", "committer", "library", "console", "tools"), ("trainer",)
# A sixth of it are compiled modules.
CONTROL_LIMIT_BYTES = 300_000_000
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "cpp", "as", "ld", "make", "rustc", "go", "nvcc")
# A file system of its own for the process: read-only, with the two folders of the image that may be written.
ENTER = """
mount --make-rprivate /
mount --bind "$1" "$1"
mount --bind "$2" "$1/mnt"
mount -t proc proc "$1/proc"
mount -t tmpfs -o mode=1777 tmpfs "$1/tmp"
mount -t tmpfs -o uid=10001,gid=10001 tmpfs "$1/var/cache/connito"
mount -t tmpfs -o uid=10001,gid=10001 tmpfs "$1/var/lib/connito"
mount -t tmpfs tmpfs "$1/dev"
for device in null zero urandom random; do touch "$1/dev/$device"; mount --bind "/dev/$device" "$1/dev/$device"; done
mount -o remount,ro,bind "$1"
root=$1
shift 2
exec chroot --userspec=10001:10001 "$root" "$@"
"""


class Images:
    """A buildah store of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mounted: dict[str, Path] = {}

    def buildah(self, *arguments: str) -> str:
        command = ["buildah", "--root", str(self.folder / "storage"), "--runroot", str(self.folder / "run")]
        command += ["--storage-driver", os.environ.get("STORAGE_DRIVER", "overlay")]
        done = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def build(self, *targets: str) -> None:
        done = subprocess.run(
            ["scripts/build-images", self.folder, *targets], cwd=ROOT, check=False, capture_output=True, text=True
        )
        if done.returncode == 75:
            pytest.skip(f"NO IMAGES WERE BUILT: {done.stderr[-500:]}")
        assert done.returncode == 0, done.stderr[-4000:]

    def filesystem(self, target: str) -> Path:
        """Where the image's file system is mounted."""
        if target not in self._mounted:
            container = self.buildah("from", "--pull-never", f"localhost/connito-{target}:check")
            self._mounted[target] = Path(self.buildah("mount", container))
        return self._mounted[target]

    def config(self, target: str) -> dict[str, Any]:
        """What a container engine would read: user, environment, command."""
        inspected = json.loads(self.buildah("inspect", "--type", "image", f"localhost/connito-{target}:check"))
        config: dict[str, Any] = inspected["OCIv1"]["config"]
        return config

    def close(self) -> None:
        self.buildah("umount", "--all")
        self.buildah("rm", "--all")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    """The tools, and an empty store or the one of `CONNITO_IMAGES_DIR`."""
    tools = subprocess.run([ROOT / "scripts/install-image-tools"], check=False, capture_output=True, text=True)
    if tools.returncode == 75:
        pytest.skip(f"NO IMAGES WERE BUILT: {tools.stderr.strip()}")
    assert tools.returncode == 0, tools.stderr
    if os.geteuid() != 0:
        pytest.skip("NO IMAGES WERE BUILT: mounting their file systems needs root")
    kept = os.environ.get("CONNITO_IMAGES_DIR")
    store = Images(Path(kept) if kept else tmp_path_factory.mktemp("images"))
    yield store
    store.close()
    if not kept:
        shutil.rmtree(store.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def control(images: Images) -> Images:
    """The control-plane images."""
    images.build(*CONTROL)
    return images


@pytest.fixture(scope="session")
def model(images: Images) -> Images:
    """One image with torch: the others differ in their command alone."""
    images.build(*MODEL)
    return images


def size(folder: Path) -> int:
    """Bytes of the files below, each counted once."""
    done = subprocess.run(
        ["du", "--summarize", "--bytes", "--one-file-system", folder], check=True, capture_output=True
    )
    return int(done.stdout.split()[0])


def inside(root: Path, shared: Path, config: dict[str, Any], command: list[str], **variables: str) -> list[str]:
    """The command line that runs `command` in an image; `shared` is seen at /mnt."""
    environment = [*config["Env"], *(f"{name}={value}" for name, value in variables.items())]
    script = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "sh",
        "-euc",
        ENTER,
        "enter",
        str(root),
        str(shared),
    ]
    return [*script, "env", "-i", *environment, *command]


def check_contents(root: Path, config: dict[str, Any]) -> None:
    assert config["User"] == "10001:10001"
    folders = [root / part.lstrip("/") for part in ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/opt/app/bin")]
    found = [name for folder in folders for name in COMPILERS if (folder / name).exists()]
    assert found == []
    assert not (root / "opt/build").exists(), "pip and build tools must not be shipped"
    assert not list((root / "opt/packages").glob("pip*"))
    # On a read-only root, what is not compiled in the image is compiled again at every start.
    for folder in ("opt/app/connito", "opt/packages/grpc"):
        modules = {path.stem for path in (root / folder).glob("*.py")}
        assert {path.stem.partition(".")[0] for path in (root / folder / "__pycache__").glob("*.pyc")} >= modules
    secrets = [path for path in (root / "opt/app").rglob("*") if path.suffix in {".nk", ".pem", ".env"}]
    assert secrets == []


@pytest.mark.parametrize("target", CONTROL)
def test_a_control_plane_image_is_small_and_has_no_torch(control: Images, target: str) -> None:
    root = control.filesystem(target)
    check_contents(root, control.config(target))
    assert size(root) < CONTROL_LIMIT_BYTES
    assert not list((root / "opt/packages").glob("torch*"))


def test_the_trainer_s_image_has_torch_and_what_it_needs_to_start(model: Images) -> None:
    root = model.filesystem("trainer")
    check_contents(root, model.config("trainer"))
    packages = root / "opt/packages"
    assert list(packages.glob("torch-*.dist-info"))
    # The build for processors only needs nothing of CUDA; the public index has the other one alone.
    assert bool(list(packages.glob("nvidia*"))) != bool(list(packages.glob("torch-*+cpu.dist-info")))


def test_the_tools_image_is_the_command_line(control: Images, tmp_path: Path) -> None:
    config = control.config("tools")
    assert config["Entrypoint"] == ["connito"]
    command = inside(control.filesystem("tools"), tmp_path, config, [*config["Entrypoint"], "streams", "--help"])
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "ensure" in done.stdout


def test_the_root_file_system_cannot_be_written(control: Images, tmp_path: Path) -> None:
    script = "touch /opt/app/x /usr/bin/x /etc/x 2>/dev/null && exit 9; touch /tmp/x /var/cache/connito/x && id -u"
    command = inside(control.filesystem("tools"), tmp_path, control.config("tools"), ["sh", "-c", script])
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "10001\n"), done.stderr


@pytest.mark.parametrize("target", ["coordinator", "committer", "library", "console"])
def test_a_control_plane_service_starts_from_its_image(
    control: Images, target: str, tmp_path: Path, nats_server: NatsServer, object_store: ObjectStore
) -> None:
    start_and_stop(control, target, tmp_path, nats_server, object_store)


def test_the_trainer_starts_from_its_image(
    model: Images, tmp_path: Path, nats_server: NatsServer, object_store: ObjectStore
) -> None:
    start_and_stop(model, "trainer", tmp_path, nats_server, object_store)


def start_and_stop(images: Images, target: str, shared: Path, nats: NatsServer, objects: ObjectStore) -> None:
    """Start the image's own command, wait until it is ready, look at its metrics, stop it as a supervisor would."""
    identity = Identity.generate()
    identity.save(shared / "key.nk")
    role = {"console": "customer"}.get(target, target)
    Roster({role: frozenset({identity.public})} if target != "trainer" else {}).save(shared / "roster.json")
    for path in (shared, shared / "key.nk"):
        shutil.chown(path, 10001, 10001)
    http, grpc = free_ports(2)
    config = images.config(target)
    settings = {
        "CONNITO_NATS_URL": nats.url,
        "CONNITO_KEY_FILE": "/mnt/key.nk",
        "CONNITO_ROSTER": "/mnt/roster.json",
        "CONNITO_HTTP_PORT": str(http),
        "CONNITO_GRPC_PORT": str(grpc),
    }
    if target != "trainer":
        settings |= {
            "CONNITO_S3_ENDPOINT": objects.url,
            "CONNITO_S3_ACCESS_KEY": objects.access_key,
            "CONNITO_S3_SECRET_KEY": objects.secret_key,
        }
    command = inside(images.filesystem(target), shared, config, config["Cmd"], **settings)
    with (shared / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{http}/readyz", process, shared / "log")
        with urllib.request.urlopen(f"http://127.0.0.1:{http}/metrics", timeout=5) as answer:
            assert b"connito_bus_connected 1.0" in answer.read()
        # The service is the first process of its own PID namespace, as in a container.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        assert process.wait(30) == 0, (shared / "log").read_text()[-2000:]
    finally:
        process.kill()
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> None:
    """Until the address answers 200."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        assert process.poll() is None, f"the service ended:\n{log.read_text()[-3000:]}"
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} did not answer in {seconds} s:\n{log.read_text()[-3000:]}")
