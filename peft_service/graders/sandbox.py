"""A process of its own for somebody else's script, with both ends of the pipe between.

What shuts the script in is the kernel, not Python (a language that looks into itself has no inside):

- seccomp: system calls that are not on a short list do not exist. No sockets, no processes, no threads, no
  signals to others, no change of limits, owners or modes.
- Landlock: files are read below the standard library and the system's shared libraries only, and nothing is
  written. So neither keys in files nor, by way of /proc, the variables of the service can be read.
- limits of memory, open files and processor time; an empty environment; `python -I -S`, so there is the
  standard library and nothing else.

The script is run anew for every call, in a namespace of its own and with `random` at the same seed: a score
is a function of the sample and the item, whatever the process has graded before, on any number of workers.

This file is also the program of the process, so it imports the standard library alone.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import selectors
import struct
import subprocess
import sys
import time
from functools import cache
from typing import Any, NamedTuple, Self

CALL_SECONDS = 10.0
START_SECONDS = 30.0
MEMORY_BYTES = 1 << 30
CPU_SECONDS = 3600
"""Of one process; then it is ended, and the next call has a new one."""
REPLY_BYTES = 1 << 16


class Reply(NamedTuple):
    score: float
    problem: str = ""
    """Why there is no score."""


class NoSandbox(Exception):
    """The kernel of this machine cannot shut a script in. The message says what is missing."""


class Sandbox:
    """A script in a process that is started when it is first needed, and again after it has died."""

    def __init__(self, source: str, trusted: bool = False, seconds: float = CALL_SECONDS) -> None:
        """`trusted`: run also where the kernel shuts nothing in; limits hold all the same."""
        self.source = source
        self.trusted = trusted
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def problem(self) -> str:
        """Run the script without a call: what is wrong with it, or nothing.

        Raises:
            NoSandbox
        """
        return self._asked({"check": True}).problem

    def grade(self, sample: dict[str, Any], item: Any) -> Reply:
        """What the script's `grade(sample, item)` returns.

        Raises:
            NoSandbox
        """
        return self._asked({"sample": sample, "item": item})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def _asked(self, question: dict[str, Any]) -> Reply:
        if self._process is None:
            self._start()
        told = self._exchange(question, self.seconds)
        if told is None:
            return Reply(0.0, f"no answer within {self.seconds:g} seconds")
        if "score" not in told:
            return Reply(
                0.0, str(told.get("problem", "the process sent something else than an answer"))[:2000]
            )
        score = told["score"]
        return Reply(float(score)) if isinstance(score, (int, float)) else Reply(0.0, "no number")

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            start_new_session=True,
        )
        told = self._exchange({"source": self.source, "trusted": self.trusted}, START_SECONDS)
        if told is None or "ready" not in told:
            self._end()
            raise NoSandbox(str((told or {}).get("problem", "the process did not start")))

    def _exchange(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The process's answer; None: there was none in time, and the process is ended. A process that died
        has answered with a problem."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        sent, received = json.dumps(question).encode() + b"\n", b""
        os.set_blocking(process.stdin.fileno(), False)
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdin, selectors.EVENT_WRITE)
            ready.register(process.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                events = ready.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    self._end()
                    return None
                for key, _ in events:
                    if key.fileobj is process.stdin:
                        with contextlib.suppress(BrokenPipeError):
                            sent = sent[os.write(key.fd, sent) :]
                        if not sent or process.poll() is not None:
                            ready.unregister(process.stdin)
                        continue
                    piece = os.read(key.fd, REPLY_BYTES)
                    received += piece
                    if not piece or len(received) > REPLY_BYTES:
                        code = process.poll() if piece else process.wait()
                        self._end()
                        how = "its answer is too long" if piece else f"the process ended, exit status {code}"
                        return {"problem": how}
        try:
            told = json.loads(received)
        except ValueError:
            told = None
        return told if isinstance(told, dict) else {}

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._process.wait()
            self._process = None


@cache
def missing() -> str:
    """What this machine lacks to shut a script in; empty: nothing."""
    try:
        with Sandbox("def grade(sample, item): return 0") as sandbox:
            sandbox.problem()
    except NoSandbox as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------- inside the process

READABLE = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")

CALLS = {
    "x86_64": (
        0xC000003E,
        # read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction
        # rt_sigprocmask rt_sigreturn ioctl pread64 pwrite64 readv writev access
        *range(22),
        # select sched_yield mremap msync madvise dup dup2 nanosleep getpid exit uname
        23, 24, 25, 26, 28, 32, 33, 35, 39, 60, 63,
        # fcntl flock fsync ftruncate getdents getcwd chdir rename mkdir rmdir creat unlink readlink umask
        72, 73, 74, 77, 78, 79, 80, 82, 83, 84, 85, 87, 89, 95,
        # gettimeofday getrlimit getrusage sysinfo times getuid getgid geteuid getegid getppid sigaltstack
        96, 97, 98, 99, 100, 102, 104, 107, 108, 110, 131,
        # gettid time futex sched_getaffinity getdents64 restart_syscall fadvise64 clock_gettime clock_getres
        # clock_nanosleep exit_group
        186, 201, 202, 204, 217, 219, 221, 228, 229, 230, 231,
        # openat mkdirat newfstatat unlinkat renameat readlinkat faccessat pselect6 ppoll set_robust_list
        # dup3 renameat2 getrandom statx rseq close_range faccessat2
        257, 258, 262, 263, 264, 267, 269, 270, 271, 273, 292, 316, 318, 332, 334, 436, 439,
    ),
    "aarch64": (
        0xC00000B7,
        # read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn ioctl
        63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 29,
        # pread64 pwrite64 readv writev sched_yield mremap msync madvise dup dup3 nanosleep getpid exit uname
        67, 68, 65, 66, 124, 216, 227, 233, 23, 24, 101, 172, 93, 160,
        # fcntl flock fsync ftruncate getcwd chdir umask gettimeofday getrlimit getrusage sysinfo times
        25, 32, 82, 46, 17, 49, 166, 169, 163, 165, 179, 153,
        # getuid getgid geteuid getegid getppid sigaltstack gettid futex sched_getaffinity getdents64
        174, 176, 175, 177, 173, 132, 178, 98, 123, 61,
        # restart_syscall fadvise64 clock_gettime clock_getres clock_nanosleep exit_group openat mkdirat
        128, 223, 113, 114, 115, 94, 56, 34,
        # newfstatat unlinkat renameat readlinkat faccessat pselect6 ppoll set_robust_list renameat2 getrandom
        79, 35, 38, 78, 48, 72, 73, 99, 276, 278,
        # statx rseq close_range faccessat2
        291, 293, 436, 439,
    ),
}  # fmt: skip
"""By machine: the kernel's number for it (AUDIT_ARCH), and the numbers of the calls a script may make."""

NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ_FILE, READ_DIR = 1 << 2, 1 << 3
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
"""All rights of files that Landlock of this version (or the nearest before it) knows."""


def shut_in() -> str:
    """Give up everything but computing, for ever. What is missing for it, or nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return "no_new_privs"
    return _only_these_files(libc) or _only_these_calls(libc)


def _only_these_files(libc: Any) -> str:
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return "Landlock (Linux 5.13 or newer, with landlock among the security modules)"
    rights = RIGHTS[min(version, max(RIGHTS))]
    attributes = struct.pack("=Q", rights)
    rules = libc.syscall(LANDLOCK_CREATE, attributes, len(attributes), 0)
    library = os.path.dirname(os.path.realpath(os.__file__))
    shared = os.path.join(os.path.realpath(sys.base_prefix), "lib")
    for path in (*READABLE, library, shared):
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        allowed = READ_FILE | (READ_DIR if os.path.isdir(path) else 0)
        rule = struct.pack("=Qi", allowed, place)
        if libc.syscall(LANDLOCK_ADD, rules, 1, rule, 0):
            return f"Landlock, for {path}"
        os.close(place)
    return "" if libc.syscall(LANDLOCK_RESTRICT, rules, 0) == 0 else "Landlock"


def _only_these_calls(libc: Any) -> str:
    if platform.machine() not in CALLS:
        return f"a list of system calls for {platform.machine()}"
    machine, *calls = CALLS[platform.machine()]
    # Classic BPF: (code, where to if true, where to if false, operand).
    load, equal, give = 0x20, 0x15, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000  # refuse: the call fails with EPERM
    program = [(load, 0, 0, 4), (equal, 1, 0, machine), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(equal, len(calls) - place, 0, call) for place, call in enumerate(calls)]
    program += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    return "" if libc.prctl(SET_SECCOMP, FILTER, head, 0, 0) == 0 else "seccomp filters"


def serve() -> None:
    """Answer questions until there are no more."""
    questions = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # what the script prints is not read by anybody
        os.dup2(nothing, standard)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value).encode() + b"\n")
        answers.flush()

    told = json.loads(questions.readline())
    for what, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    import random

    lacking = shut_in()
    if lacking and not told["trusted"]:
        answer({"problem": lacking})
        return
    answer({"ready": True})

    code = None
    for line in questions:
        question = json.loads(line)
        random.seed(0)
        try:
            code = code or compile(told["source"], "grader.py", "exec")
            names: dict[str, Any] = {"__name__": "grader"}
            exec(code, names)
            if not callable(names.get("grade")):
                raise NameError("the script defines no function grade(sample, item)")
            if "check" in question:
                reply: dict[str, Any] = {"score": 0.0}
            else:
                reply = {"score": float(names["grade"](question["sample"], question["item"]))}
            answer(reply)
        except BaseException as error:  # sys.exit() in a script is its failure as any other
            answer({"problem": _told(error)})


def _told(error: BaseException) -> str:
    """The error and the line of the script it came from."""
    import traceback

    try:
        places = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "grader.py"]
        line = getattr(error, "lineno", None) or (places[-1] if places else None)
        where = f", line {line}" if line else ""
        return f"{type(error).__name__}: {str(error)[:1000]}{where}"
    except Exception:  # an error whose own text fails
        return type(error).__name__


if __name__ == "__main__":
    serve()
