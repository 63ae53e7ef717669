"""The kernel's calls that a program in the box may make, as a seccomp filter that bubblewrap installs.

What is not listed does not exist for the program: sockets, new processes, namespaces, mounts, tracing, `bpf`,
`io_uring`, keys, `memfd_create`, shared memory. Threads are allowed, processes are not; so one process's limit of
memory is the limit of all, and nothing can outlive it.
"""

from __future__ import annotations

import errno
import platform
import struct

from transom.errors import RewardError

# fmt: off
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "fcntl": (72, 25),
    "ioctl": (16, 29), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19), "open": (2, None), "openat": (257, 56), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "mkdir": (83, None), "mkdirat": (258, 34),
    "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "truncate": (76, 45), "ftruncate": (77, 46), "fsync": (74, 82), "fdatasync": (75, 83),
    "flock": (73, 32), "umask": (95, 166), "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226),
    "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "tgkill": (234, 131),
    "setitimer": (38, 103), "getitimer": (36, 102), "alarm": (37, None), "pause": (34, None), "execve": (59, 221),
    "exit": (60, 93), "exit_group": (231, 94), "wait4": (61, 260), "waitid": (247, 95), "futex": (202, 98),
    "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293), "restart_syscall": (219, 128),
    "arch_prctl": (158, None), "prlimit64": (302, 261), "getrlimit": (97, 163), "getrusage": (98, 165),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getpgrp": (111, None), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160), "sysinfo": (99, 179),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169),
    "time": (201, None), "times": (100, 153), "getrandom": (318, 278),}
# fmt: on
"""Numbers on x86_64 and aarch64; None where the machine has no such call."""

CLONE = (56, 220)
"""Allowed for threads only. `clone3` hides its flags from a filter, so it is not listed; C libraries then use this."""

MACHINES = ("x86_64", "aarch64")
_AUDIT = (0xC000003E, 0xC00000B7)
_CLONE_THREAD = 0x10000
_X32 = 0x40000000

_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_ERROR = 0x00050000

_LOAD = 0x20
_JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_BITS = 0x15, 0x35, 0x45
_RETURN = 0x06


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One `struct sock_filter`."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def program(machine: str | None = None) -> bytes:
    """The filter, as `bwrap --seccomp` reads it.

    Args:
        machine: As `platform.machine()` says it; None for this one.

    Raises:
        RewardError: If the machine is none of `MACHINES`.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise RewardError(
            f"no filter of kernel calls is known for {machine}: run code rewards on {' or '.join(MACHINES)}"
        )
    index = MACHINES.index(machine)
    # Offsets into `struct seccomp_data`: the number at 0, the architecture at 4, the first argument at 16.
    steps = [_step(_LOAD, 4), _step(_JUMP_EQUAL, _AUDIT[index], 1, 0), _step(_RETURN, _KILL), _step(_LOAD, 0)]
    if machine == "x86_64":
        # A second set of numbers for the same calls.
        steps += [_step(_JUMP_AT_LEAST, _X32, 0, 1), _step(_RETURN, _ERROR | errno.ENOSYS)]
    for numbers in ALLOWED.values():
        if (number := numbers[index]) is not None:
            steps += [_step(_JUMP_EQUAL, number, 0, 1), _step(_RETURN, _ALLOW)]
    steps += [
        _step(_JUMP_EQUAL, CLONE[index], 1, 0),
        _step(_RETURN, _ERROR | errno.ENOSYS),
        _step(_LOAD, 16),
        _step(_JUMP_BITS, _CLONE_THREAD, 0, 1),
        _step(_RETURN, _ALLOW),
        _step(_RETURN, _ERROR | errno.EPERM),
    ]
    return b"".join(steps)
