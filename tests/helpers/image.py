"""The Dockerfile's steps without a container engine: in a folder that is the root of all that they run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


def read_instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """Yield every instruction and its argument."""
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, argument = line.partition(" ")
        yield instruction, argument.strip()


@dataclass
class Image:
    """What a Dockerfile makes of its base.

    Attributes:
        root: folder that holds the base's files; the steps change it.
        context: the checkout that COPY takes files from.
        machine: variables of the machine, as a container engine passes on those of a proxy.
        environment: that the steps set.
        folder: working folder.
        entrypoint: what starts every command.
        command: what runs where nothing is named.
    """

    root: Path
    context: Path
    machine: Mapping[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def build(self) -> None:
        """Take every step."""
        for instruction, argument in read_instructions(self.context / "Dockerfile"):
            self._take(instruction, argument)

    def _take(self, instruction: str, argument: str) -> None:
        if instruction == "ENV":
            self.environment |= dict(word.split("=", 1) for word in shlex.split(argument))
        elif instruction == "WORKDIR":
            self.folder = argument
            (self.root / argument.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY":
            *sources, target = argument.split()
            for source in sources:
                self._copy(source, self.root / self.folder.lstrip("/") / target)
        elif instruction == "RUN":
            done = self._start(["/bin/sh", "-c", argument], self.machine)
            assert done.returncode == 0, f"RUN {argument}\n{done.stdout}"
        elif instruction == "ENTRYPOINT":
            self.entrypoint = json.loads(argument)
        elif instruction == "CMD":
            self.command = json.loads(argument)
        else:
            assert instruction == "FROM", f"no stand-in for {instruction}"

    def _copy(self, source: str, target: Path) -> None:
        if (self.context / source).is_dir():
            shutil.copytree(self.context / source, target, dirs_exist_ok=True)
            return
        file = target / source if target.is_dir() else target
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.context / source, file)

    def run(self, *command: str, user: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a container would, with /proc and without a network."""
        script = f'mount -t proc proc "{self.root}/proc" && exec "$@"'
        apart = ["unshare", "--net", "--mount", "/bin/sh", "-c", script, "sh"]
        return self._start([*self.entrypoint, *(command or self.command)], variables, apart, user)

    def _start(
        self, command: list[str], variables: Mapping[str, str], before: list[str] | None = None, user: int = 0
    ) -> subprocess.CompletedProcess[str]:
        inside = ["chroot", f"--userspec={user}:{user}", str(self.root), "/bin/sh", "-c", 'cd "$0" && exec "$@"']
        return subprocess.run(
            [*(before or []), *inside, self.folder, *command],
            env={"PATH": DEFAULT_PATH, "HOME": "/root", **variables, **self.environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def make_base(root: Path) -> None:
    """Fill a folder with Debian and Python 3.11 with pip, which the base image of the Dockerfile has too."""
    packages = "--include=python3.11,python3-pip,ca-certificates"
    subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", root], check=True, capture_output=True)
    (root / "usr/bin/python").symlink_to("python3.11")
    # Debian's pip refuses to install where the system's packages lie; that of the base image does not.
    (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()
    for name in ("resolv.conf", "hosts", "ssl/certs/ca-certificates.crt"):
        shutil.copy(Path("/etc") / name, root / "etc" / name)
    for device, number in (("null", 3), ("zero", 5), ("random", 8), ("urandom", 9)):
        path = root / "dev" / device
        if not path.exists():
            os.mknod(path, 0o666 | 0o020000, os.makedev(1, number))
