"""Build docker/Dockerfile.cpu without a container engine or a registry, run it, and ask it something.

Run by `make image`, as root on Debian. The base image is made by mmdebstrap in place of `python:slim`;
buildah runs the steps of the Dockerfile in a chroot. The image's own command is then started as the image's
own user, on a read-only root file system, and has to answer with a compacted cache, pass its health check,
and end on SIGTERM with status 0. The base and the image are kept in .cache/image.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile.cpu"
WORK = ROOT / ".cache" / "image"
STORE = ("--storage-driver", "vfs", "--root", str(WORK / "store"), "--runroot", str(WORK / "run"))
BUILDAH = ("buildah", *STORE)
TAG = "localhost/rkv-vllm:cpu"
TOOLS = ("buildah", "mmdebstrap")  # commands, and the packages they come in
SUITE = "bookworm"
URL = "http://127.0.0.1:8000"
START_SECONDS = 300
STOP_SECONDS = 60
TOKENS = 128
#: What pip may be told that names files of this machine, and pages on its disk, which link to their siblings.
PIP_PATHS = ("cert", "constraint", "find-links")
PIP_INDEXES = ("index-url", "extra-index-url")


class ImageError(Exception):
    """The image cannot be built here, or does not do what it should."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.parse_args()
    try:
        check()
    except ImageError as error:
        print(f"check_image: {error}", file=sys.stderr)
        return 1
    return 0


def check() -> None:
    if os.geteuid() != 0:
        raise ImageError("needs root, for chroot and mounts")
    install_tools()
    WORK.mkdir(parents=True, exist_ok=True)
    base = base_name(DOCKERFILE.read_text())
    started = time.monotonic()
    make_base(base)
    say(f"{base} made of Debian {SUITE} in {time.monotonic() - started:.0f} s")
    started = time.monotonic()
    build()
    say(f"built in {time.monotonic() - started:.0f} s")
    container = buildah("from", "--pull-never", TAG).strip()
    try:
        root = Path(buildah("mount", container).strip())
        say(f"{TAG}: {disk_mib(root)} MiB unpacked, of which the base {disk_mib_of(base)} MiB")
        serve(root, image_config())
    finally:
        buildah("rm", container)


def install_tools() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        say(f"installing {', '.join(missing)}")
        run("apt-get", "update")
        run("apt-get", "install", "--yes", "--no-install-recommends", *missing)


def base_name(dockerfile: str) -> str:
    """The image that every stage of `dockerfile` begins with, its arguments at their defaults."""
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", dockerfile, re.MULTILINE))
    references = set(re.findall(r"^FROM (\S+/\S+)", dockerfile, re.MULTILINE))
    names = {re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], reference) for reference in references}
    if len(names) != 1:
        raise ImageError(f"{DOCKERFILE}: one base image was expected, not {sorted(names)}")
    return names.pop()


def make_base(name: str) -> None:
    """Debian's own Python under the name of the base image, unless it is there from the last time."""
    if name in buildah("images", "--format", "{{.Name}}:{{.Tag}}").split():
        return
    archive = WORK / "base.tar"
    if not archive.exists():
        partial = archive.with_suffix(".partial.tar")
        include = "--include=python3,python3-venv,ca-certificates"
        run("mmdebstrap", "--quiet", "--variant=minbase", include, SUITE, str(partial))
        partial.rename(archive)
    container = buildah("from", "scratch").strip()
    buildah("add", "--quiet", container, str(archive), "/")
    buildah("commit", "--quiet", container, name)
    buildah("rm", container)


def build() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        volumes = pip_volumes(Path(scratch))
        command = [*BUILDAH, "build", "--isolation", "chroot", "--pull-never", "--format", "docker"]
        command += [f"--volume={volume}" for volume in volumes]
        command += ["--tag", TAG, "--file", str(DOCKERFILE), str(ROOT)]
        if subprocess.run(command).returncode != 0:
            raise ImageError(f"{DOCKERFILE} does not build")


def pip_volumes(scratch: Path) -> list[str]:
    """Mounts that let pip in the build find what pip finds here: its configuration, and what that names."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    settings: dict[str, list[str]] = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        words = value.strip("'").replace("\\n", " ").split()
        settings.setdefault(name.rpartition(".")[2], []).extend(words)
    settings.pop("disable-pip-version-check", None)
    file = scratch / "pip.conf"
    lines = [f"{name} = {' '.join(dict.fromkeys(words))}" for name, words in settings.items()]
    file.write_text("\n".join(["[global]", *lines, ""]))
    paths = [Path(word) for name in PIP_PATHS for word in settings.get(name, [])]
    indexes = [word for name in PIP_INDEXES for word in settings.get(name, []) if word.startswith("file://")]
    paths += [Path(index.removeprefix("file://")).parent for index in indexes]
    local = [path for path in dict.fromkeys(paths) if path.is_absolute() and path.exists()]
    return [f"{file}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in local)]


def image_config() -> dict[str, Any]:
    inspected = json.loads(buildah("inspect", "--type", "image", TAG))
    config: dict[str, Any] = inspected["Docker"]["config"]
    return config


def serve(root: Path, config: dict[str, Any]) -> None:
    """Starts what the image starts, as the image's user on a read-only root, and holds it to its promises."""
    log = WORK / "server.log"
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            in_image(root, config, [*config["Entrypoint"], *config["Cmd"]]),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        wait_until_healthy(process, log)
        say(f"healthy after {time.monotonic() - started:.0f} s")
        _, *health = config["Healthcheck"]["Test"]
        mounts = Path("/proc", str(process.pid), "root")
        run("chroot", f"--userspec={config['User']}", str(mounts), *with_environment(config, health))
        say(f"the image's health check passes; {answer()}")
        process.send_signal(signal.SIGTERM)
        status = process.wait(STOP_SECONDS)
        if status != 0:
            raise ImageError(f"ended with status {status}\n{tail(log)}")
        say("SIGTERM: ended with status 0")
    except subprocess.TimeoutExpired:
        raise ImageError(f"still runs {STOP_SECONDS} s after SIGTERM\n{tail(log)}") from None
    finally:
        process.kill()
        process.wait()


def in_image(root: Path, config: dict[str, Any], command: list[str]) -> list[str]:
    """`command` with `root` as its read-only root, volumes and /tmp being fresh and writable.

    All is mounted in a namespace of mounts that ends with the command. `exec` all along: signals reach it.
    """
    user, _, group = config["User"].partition(":")
    steps = [f"mount --bind {root} {root}", f"mount -o remount,bind,ro {root}"]
    steps += [f"mount --rbind /{folder} {root}/{folder}" for folder in ("dev", "proc", "sys")]
    for folder in ("/tmp", *config["Volumes"]):
        steps.append(f"mount -t tmpfs -o mode=0770,uid={user},gid={group} tmpfs {root}{folder}")
    inside = f'cd {config["WorkingDir"]} && exec "$@"'
    steps.append(f'exec chroot --userspec={config["User"]} {root} "$@"')
    words = with_environment(config, ["/bin/sh", "-c", inside, "sh", *command])
    return ["unshare", "--mount", "/bin/sh", "-e", "-c", "\n".join(steps), "sh", *words]


def with_environment(config: dict[str, Any], command: list[str]) -> list[str]:
    return ["/usr/bin/env", "-i", *config["Env"], *command]


def wait_until_healthy(process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ImageError(f"ended with status {process.returncode} at start\n{tail(log)}")
        try:
            with urllib.request.urlopen(f"{URL}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise ImageError(f"not healthy after {START_SECONDS} s\n{tail(log)}")


def answer() -> str:
    """Asks for an answer with a small budget, and for one of two words; returns what the first reports."""
    story = ask(content="Tell a long story about the sea.", kv_cache={"budget": 64, "buffer": 32})
    report = story["kv_cache"]
    if story["usage"]["completion_tokens"] != TOKENS or report["compactions"] == 0:
        raise ImageError(f"the answer is not what was asked for: {story}")
    words = ["yes", "no"]  # decoded by a grammar, which the image does without Triton
    verdict = ask(content="Is the sea wet?", structured_outputs={"choice": words}, ignore_eos=False)
    if verdict["choices"][0]["message"]["content"] not in words:
        raise ImageError(f"the answer is none of {words}: {verdict}")
    evicted = report["evicted_tokens"]
    return f"{TOKENS} tokens answered, {report['compactions']} compactions, {evicted} tokens evicted"


def ask(content: str, **fields: Any) -> dict[str, Any]:
    body = {
        "model": "SmolLM2-135M-Instruct",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        **fields,
    }
    request = urllib.request.Request(
        f"{URL}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        found: dict[str, Any] = json.load(response)
    return found


def disk_mib(folder: Path) -> int:
    return int(run("du", "--summarize", "--block-size=1M", str(folder)).split()[0])


def disk_mib_of(image: str) -> int:
    container = buildah("from", "--pull-never", image).strip()
    try:
        return disk_mib(Path(buildah("mount", container).strip()))
    finally:
        buildah("rm", container)


def buildah(*arguments: str) -> str:
    return run(*BUILDAH, *arguments)


def run(*command: str) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode != 0:
        raise ImageError(f"this failed: {' '.join(command)}\n{result.stdout}")
    return result.stdout


def tail(log: Path, lines: int = 25) -> str:
    return "\n".join([f"(the end of {log})", *log.read_text(errors="replace").splitlines()[-lines:]])


def say(message: str) -> None:
    print(f"check_image: {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
