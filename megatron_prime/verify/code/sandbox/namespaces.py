"""A file tree of its own with nothing in it but Python, and no network, for the programs of one fork server.

Needs root with CAP_SYS_ADMIN, or a kernel that lets ordinary users make user namespaces.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import sysconfig
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


def leave_the_host(readable: Sequence[str], spare_user: int) -> int:
    """Moves the calling process into namespaces of its own; its next child is their process 1.

    Args:
        readable: folders and files that stay visible, read-only, at the same paths.
        spare_user: first of two user ids for programs, where this process is root; 0 where it is not.

    Returns:
        First of the two ids that programs shall have; 0 for an ordinary user, whose namespace has no other.

    Raises:
        OSError: the machine refuses, or programs would be this machine's root.
    """
    sources = {path: os.path.realpath(path) for path in readable}
    shared = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET | NEWCGROUP
    if os.geteuid() != 0:
        user, group = os.geteuid(), os.getegid()
        call(unshare, NEWUSER | shared)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    else:
        if spare_user == 0:
            raise PermissionError("programs would run as root: this user namespace has no other users")
        try:
            call(unshare, shared)
        except PermissionError:
            _leave_with_users(shared, spare_user)
    _build_tree(sources)
    return spare_user


def _leave_with_users(shared: int, spare_user: int) -> None:
    """Leaves for a user namespace in which there are root and two other users of this machine.

    Only a process that stays outside, and may change its user, can map more than one.
    """
    mapped_reader, mapped_writer = os.pipe()
    left_reader, left_writer = os.pipe()
    helper = os.fork()
    if helper == 0:
        status = 1
        try:
            os.close(left_writer)
            if os.read(left_reader, 1):
                for name in ("uid_map", "gid_map"):
                    Path(f"/proc/{os.getppid()}/{name}").write_text(f"0 0 1\n{spare_user} {spare_user} 2\n")
                os.write(mapped_writer, b"1")
                status = 0
        finally:
            os._exit(status)
    os.close(mapped_writer)
    os.close(left_reader)
    try:
        call(unshare, NEWUSER | shared)
        os.write(left_writer, b"1")
        is_mapped = os.read(mapped_reader, 1) == b"1"
    finally:
        os.close(left_writer)
        os.close(mapped_reader)
        os.waitpid(helper, 0)
    if not is_mapped:
        raise PermissionError(
            "programs would run as root: this process may not change its user (CAP_SETUID, CAP_SETGID)"
        )


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


def library_folders() -> list[str]:
    """The folders of this interpreter's own module path: its library and what is installed beside it.

    What a path file adds to it, a project that is installed editable for instance, is the user's and not among them.
    """
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    keys = ("stdlib", "platstdlib", "purelib", "platlib")
    own = [paths[key] for paths in (sysconfig.get_paths(), sysconfig.get_paths(vars=base)) for key in keys]
    # Debian's installs have a folder of their own; compiled modules of the library stand in one below it.
    own += [f"{prefix}/lib/python3/dist-packages" for prefix in ("/usr", sys.base_prefix)]
    own += [f"{path}/lib-dynload" for path in own]
    known = set(map(os.path.realpath, own))
    return list(dict.fromkeys(path for path in sys.path if path and os.path.realpath(path) in known))


def python_files() -> list[str]:
    """What a running Python may still want to open: its library, shared libraries, and the null device."""
    folders = [Path(path) for path in library_folders()]
    folders += [Path(path) for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")]
    chosen: list[Path] = []
    for folder in sorted(folder for folder in folders if folder.is_dir()):
        if not any(folder.is_relative_to(outer) for outer in chosen):
            chosen.append(folder)
    return [*map(str, chosen), "/dev/null"]
