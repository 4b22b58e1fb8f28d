"""A file tree of its own with nothing in it but Python, and no network, for the programs of one fork server.

Needs root with CAP_SYS_ADMIN, or a kernel that lets ordinary users make user namespaces.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_prime.verify.code.sandbox.libc import call, mount, syscall, umount, unshare

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000,
    0x02000000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 0x1, 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_MOUNT_SETATTR = 442
SCRATCH = "/tmp"
"""Where a program may write; the same place serves to build the tree."""


class _MountAttributes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns"))


def leave_the_host(readable: Sequence[str]) -> bool:
    """Moves the calling process into namespaces of its own; its next child is their process 1.

    Args:
        readable: folders and files that stay visible, read-only, at the same paths.

    Returns:
        Whether a user namespace was needed, in which there is one user only.

    Raises:
        OSError: the machine refuses.
    """
    sources = {path: os.path.realpath(path) for path in readable}
    shared = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET | NEWCGROUP
    alone = os.geteuid() != 0
    if not alone:
        try:
            call(unshare, shared)
        except PermissionError:
            alone = True
    if alone:
        user, group = os.geteuid(), os.getegid()
        call(unshare, NEWUSER | shared)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _build_tree(sources)
    return alone


def fresh_scratch(size_bytes: int) -> None:
    """Gives the calling process an empty folder to write to, gone with the process."""
    call(unshare, NEWNS)
    options = f"size={size_bytes},nr_inodes=1024,mode=1777"
    call(mount, b"tmpfs", SCRATCH.encode(), b"tmpfs", _NOSUID | _NODEV | _NOEXEC, options.encode())


def _build_tree(sources: Mapping[str, str]) -> None:
    pivot_root = _SYS_PIVOT_ROOT[platform.machine()]
    call(mount, b"none", b"/", None, _REC | _PRIVATE, None)
    # Two changes of root: in between both trees can be seen, whatever the first one's /tmp held.
    call(mount, b"tmpfs", SCRATCH.encode(), b"tmpfs", _NOSUID | _NODEV, b"mode=755")
    os.mkdir(f"{SCRATCH}/old")
    os.mkdir(f"{SCRATCH}/new")
    call(mount, b"tmpfs", f"{SCRATCH}/new".encode(), b"tmpfs", _NOSUID | _NODEV, b"mode=755,size=1m")
    call(syscall, pivot_root, SCRATCH.encode(), f"{SCRATCH}/old".encode())
    for path, source in sources.items():
        _bind(f"/old{source}", f"/new{path}")
    os.makedirs(f"/new{SCRATCH}", exist_ok=True)
    _make_read_only("/new")
    os.chdir("/new")
    call(syscall, pivot_root, b".", b".")
    call(umount, b".", _MNT_DETACH)
    os.chdir("/")


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    call(mount, source.encode(), target.encode(), None, _BIND | _REC, None)


def _make_read_only(path: str) -> None:
    attributes = _MountAttributes(set=_RDONLY | _NOSUID)
    arguments = (path.encode(), _AT_RECURSIVE, ctypes.byref(attributes), ctypes.c_size_t(ctypes.sizeof(attributes)))
    call(syscall, _SYS_MOUNT_SETATTR, _AT_FDCWD, *arguments)


def python_files() -> list[str]:
    """What a running Python may still want to open: its library, shared libraries, and the null device."""
    own_root = Path(__file__).resolve().parents[4]
    folders = [Path(path) for path in sys.path if path and Path(path) != own_root]
    folders += [Path(path) for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")]
    chosen: list[Path] = []
    for folder in sorted(folder for folder in folders if folder.is_dir()):
        if not any(folder.is_relative_to(outer) for outer in chosen):
            chosen.append(folder)
    return [*map(str, chosen), "/dev/null"]
