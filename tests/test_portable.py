"""macOS and Windows: nothing that only Linux or POSIX has is used unless something asks for it first."""

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from training.model import devices
from training.system import files

from .test_imports import FILES, ROOT

# What Python's documentation marks as missing on Windows or macOS.
MODULES = set("crypt curses fcntl grp nis ossaudiodev posix pty pwd readline resource spwd syslog termios tty".split())
NAMES = {
    "os": set(
        "O_DIRECTORY O_DSYNC O_NOFOLLOW O_NONBLOCK O_SYNC O_TMPFILE chown chroot confstr copy_file_range ctermid "
        "eventfd fchdir fchown fdatasync fork forkpty fstatvfs getegid geteuid getgid getgroups getloadavg getpgid "
        "getpgrp getpriority getresuid getsid getuid getxattr initgroups killpg lchown lockf major memfd_create minor "
        "mkfifo mknod nice openpty pipe2 posix_fadvise posix_fallocate posix_openpt posix_spawn pread preadv pwrite "
        "pwritev readv register_at_fork sched_getaffinity sched_setaffinity sched_yield sendfile setgid setpgid "
        "setpriority setsid setuid setxattr splice statvfs sync sysconf tcgetpgrp ttyname uname unshare wait wait3 "
        "wait4 waitid writev".split()
    ),
    "signal": set(
        "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 SIGWINCH SIGXCPU "
        "SIGXFSZ alarm getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt sigtimedwait sigwait".split()
    ),
    "mmap": set("MADV_DONTNEED MADV_RANDOM MADV_SEQUENTIAL MADV_WILLNEED MAP_ANONYMOUS MAP_PRIVATE MAP_SHARED".split()),
    "socket": set("AF_UNIX SO_REUSEPORT".split()),
    "time": {"tzset"},
}
FOLDERS = ("/proc/", "/sys/", "/dev/")
CAUGHT = ("ImportError", "AttributeError", "OSError")
ASKING = ("hasattr", "getattr", "sys.platform", "os.name", "IS_WINDOWS")


def used(node: ast.AST) -> Iterator[str]:
    """What `node` itself, and not what is in it, takes from those lists."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        known = NAMES.get(node.module, set())
        yield from (alias.name for alias in node.names if alias.name in known or node.module in MODULES)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.attr in NAMES.get(node.value.id, ()):
            yield f"{node.value.id}.{node.attr}"
    elif isinstance(node, ast.Call):
        texts = [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        yield from (text for text in texts if text.startswith(FOLDERS))


def is_guard(node: ast.AST) -> bool:
    """Whether what is in `node` is reached only where the system has it."""
    if isinstance(node, ast.If | ast.IfExp):
        return any(word in ast.unparse(node.test) for word in ASKING)
    if isinstance(node, ast.With):
        texts = [ast.unparse(item) for item in node.items]
        return any(text.startswith("suppress(") and any(error in text for error in CAUGHT) for text in texts)
    return isinstance(node, ast.Try) and any(
        handler.type is not None and any(error in ast.unparse(handler.type) for error in CAUGHT)
        for handler in node.handlers
    )


def leaves(node: ast.AST) -> bool:
    """Whether what follows `node` in its block is reached only where the system has it."""
    return isinstance(node, ast.If) and is_guard(node) and isinstance(node.body[-1], ast.Return | ast.Raise)


def unguarded(node: ast.AST) -> list[str]:
    found = list(used(node))
    for child in ast.iter_child_nodes(node):
        if leaves(child):
            break
        found += [] if is_guard(child) else unguarded(child)
    return found


PRODUCT = [path for path in FILES if path.parts[0] != "benchmarks"]


@pytest.mark.parametrize("path", PRODUCT, ids=str)
def test_nothing_needs_one_system(path: Path) -> None:
    assert unguarded(ast.parse((ROOT / path).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import fcntl",
        "def f():\n    import resource",
        "from os import fork",
        "import os\nos.sysconf('SC_PAGE_SIZE')",
        "import signal\nfor number in (signal.SIGINT, signal.SIGHUP):\n    pass",
        "open('/proc/self/status')",
        "import os\nif True:\n    os.register_at_fork()",
        "import os\ndef f():\n    if not hasattr(os, 'fork'):\n        print()\n    os.fork()",
    ],
)
def test_the_rule_catches(code: str) -> None:
    assert unguarded(ast.parse(code)) != []


@pytest.mark.parametrize(
    "code",
    [
        "import os, signal\nos.fsync(0)\nsignal.SIGTERM",
        "try:\n    import resource\nexcept ImportError:\n    resource = None",
        "import os\ncores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1",
        "import os, sys\nif sys.platform == 'linux':\n    os.fork()",
        "import os\ndef f():\n    if not hasattr(os, 'fork'):\n        return\n    os.fork()",
        "try:\n    open('/proc/self/status')\nexcept OSError:\n    pass",
        "import signal\nnumber = getattr(signal, 'SIGHUP', None)",
    ],
)
def test_the_rule_allows(code: str) -> None:
    assert unguarded(ast.parse(code)) == []


@pytest.mark.parametrize(("system", "bytes_held"), [("linux", 5 * 1024), ("darwin", 5)])
def test_peak_memory_is_in_bytes(system, bytes_held, monkeypatch) -> None:
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=5))
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(sys, "platform", system)
    assert devices.peak_memory(torch.device("cpu")) == bytes_held


def test_peak_memory_without_the_module(monkeypatch) -> None:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=7))
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: process))
    assert devices.peak_memory(torch.device("cpu")) == 7


def test_where_directories_cannot_be_opened_only_files_are_flushed(tmp_path, monkeypatch) -> None:
    opened, really_open = [], os.open

    def note(path, flags, *args, **kwargs):
        opened.append((Path(path).name, flags & os.O_RDWR))
        return really_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(files, "IS_WINDOWS", True)
    monkeypatch.setattr(files.os, "open", note)
    files.write_whole(tmp_path / "a.txt", "text")
    with files.new_directory(tmp_path / "new") as building:
        (building / "b.txt").write_text("text")
    flushed = [(name, flags) for name, flags in opened if name == "b.txt" or "a.txt" in name]
    assert len(flushed) >= 2 and all(flags for _, flags in flushed)
    assert not any(name in (tmp_path.name, "new", building.name) for name, _ in opened)
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "new" / "b.txt").read_text() == "text"


def test_an_empty_directory_gives_way(tmp_path) -> None:
    (tmp_path / "new").mkdir()
    with files.new_directory(tmp_path / "new") as building:
        (building / "b.txt").write_text("text")
    assert os.listdir(tmp_path / "new") == ["b.txt"]
