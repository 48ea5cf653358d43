"""What the checks in this folder share: minimail as a process, other programs run to their end, waiting for something.

Standard library only. Nothing here sleeps a guessed time: waiting is always for a condition, until a deadline.
"""
import atexit
import contextlib
import os
import pty
import pwd
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
MINIMAIL = REPO / "minimail.py"


# Waiting

SLOWER = 5                  # times: what a machine may need that has much else to do


def until(predicate, seconds=10.0, what="the condition"):
    """Return the first true value of predicate(), for which an idle machine needs less than the time; see within()."""
    return within(predicate, SLOWER * seconds, what)


def within(predicate, seconds, what):
    """Return the first true value of predicate(); AssertionError when there was none within the time, nor right after it."""
    deadline = time.monotonic() + seconds
    while True:
        late = time.monotonic() > deadline
        value = predicate()
        if value:
            return value
        if late:
            raise AssertionError("%s: not within %g seconds" % (what, seconds))
        time.sleep(0.01)  # the pause between two looks, not a guess how long it takes


def accepts(port, host="127.0.0.1"):
    """Return whether someone listens there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
        return True
    return False


reserved = []


def free_port():
    """Return a TCP port for servers that cannot pick one themselves, or come back to it.

    It is not among those that the kernel gives to whoever asks for any, and as long as this process lives it has a UDP socket
    of that number, so that no other check takes it.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        address = "127.0.0.1", random.SystemRandom().randrange(10000, first)
        reserved.append(socket.socket(type=socket.SOCK_DGRAM))
        with contextlib.suppress(OSError), socket.socket() as probe:
            reserved[-1].bind(address)
            probe.bind(address)
            return address[1]


# Folders

@contextlib.contextmanager
def folder(owner=None):
    """A temporary folder, for `owner` if given, removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="minimail-ci-"))
    try:
        if owner:
            shutil.chown(path, owner)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def files(place, folders=False):
    """Return every file below a folder (and every folder, too) that somebody else is at work in.

    There pathlib's glob() fails once a folder vanishes between the look at its name and the look into it; os.walk() goes on.
    """
    return [Path(above, name) for above, inner, names in os.walk(str(place)) for name in names + inner * folders]


# Other programs

def clean_environment(home, **extra):
    """Return an environment in which no setting of this machine's user changes what a program does."""
    fixed = {"PATH": os.environ["PATH"], "HOME": str(home), "USER": "tester", "LC_ALL": "C.UTF-8", "TERM": "xterm"}
    return {**fixed, **extra}


started = []


def start(command, **more):
    """Start a program in a session of its own, so that it can be ended with all its children; return its Popen."""
    process = subprocess.Popen([str(word) for word in command], start_new_session=True, **more)
    started.append(process)
    return process


@atexit.register
def end_what_is_left():
    """A check that is interrupted leaves no process behind."""
    for process in started:
        if process.poll() is None:
            end_group(process)


# Out of time is for a check what Ctrl-C is, so that the above happens.
signal.signal(signal.SIGTERM, signal.default_int_handler)


def end_group(process):
    """End a process that was started in its own session, with all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(command, stdin=b"", seconds=60, environment=None, expect=0, cwd=None):
    """Run a program to its end and return its standard output; on any other status than `expect` show all it said."""
    process = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    env=environment, cwd=cwd)
    try:
        output, errors = process.communicate(stdin, timeout=SLOWER * seconds)
    except subprocess.TimeoutExpired:
        end_group(process)
        output, errors = process.communicate()
        raise AssertionError("not done after %g seconds: %s" % (SLOWER * seconds, told(command, output, errors))) from None
    if process.returncode != expect:
        raise AssertionError("status %d: %s" % (process.returncode, told(command, output, errors)))
    return output


def told(command, output, errors=b"", most=4000):
    """Return a command and the end of what it printed, for a failure's text."""
    parts = [" ".join(map(str, command))]
    for name, text in (("stdout", output), ("stderr", errors)):
        if text:
            parts.append("--- %s\n%s" % (name, text[-most:].decode("utf-8", "backslashreplace")))
    return "\n".join(parts)


def run_in_terminal(command, seconds=60, environment=None, cwd=None):
    """Run a full-screen program on a terminal of its own, to a good end; return what it painted."""
    ours, theirs = pty.openpty()
    process = start(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=cwd)
    os.close(theirs)
    painted = bytearray()
    try:
        read_until_closed(ours, painted, time.monotonic() + SLOWER * seconds)
        status = process.wait(SLOWER * 5)
    except (AssertionError, subprocess.TimeoutExpired):
        end_group(process)
        raise AssertionError("not done after %g seconds: %s" % (SLOWER * seconds, told(command, painted))) from None
    finally:
        os.close(ours)
    if status != 0:
        raise AssertionError("status %d: %s" % (status, told(command, painted)))
    return bytes(painted)


def read_until_closed(descriptor, into, deadline):
    """Collect what comes from a terminal until its last user is gone."""
    while time.monotonic() < deadline:
        if not select.select([descriptor], [], [], 0.2)[0]:
            continue
        try:
            block = os.read(descriptor, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            return
        if not block:
            return
        into += block
    raise AssertionError


# minimail

class Resourceful:
    """For `with`: enter() puts into `resources` what is to be undone at the end, or when it fails half-way."""

    def __enter__(self):
        self.resources = contextlib.ExitStack()
        try:
            self.enter()
        except BaseException:
            self.resources.close()
            raise
        return self

    def __exit__(self, *_):
        self.resources.close()


class Node(Resourceful):
    """A minimail process with SMTP and POP3 on free ports: `smtp` and `pop3` are (host, port), `data` its folder.

    With `user` it runs as that ordinary user, from a copy, since a clone may lie where only root can look.
    Use it with `with`: at the end the process is stopped and must have ended as the contract says.
    """

    def __init__(self, *options, user=None, python=sys.executable, environment=None):
        self.options, self.user, self.python, self.environment = options, user, python, environment
        self.listening = {}

    def enter(self):
        self.place = self.resources.enter_context(folder(self.user))
        self.data = self.place / "data"
        self.start()

    def __exit__(self, kind, value, trace):
        try:
            if kind is None:
                self.stop()
            else:
                sys.stderr.write("minimail's log:\n%s\n" % self.log()[-6000:])
                end_group(self.process)
        finally:
            self.resources.close()

    def command(self, *words):
        """Return the command line that runs minimail with these words on this node's data."""
        if not self.user:
            return [self.python, str(MINIMAIL), "--data", str(self.data), *words]
        copy = self.place / "minimail.py"
        if not copy.exists():
            shutil.copy(MINIMAIL, copy)
        return ["setpriv", "--reuid", self.user, "--regid", primary_group(self.user), "--clear-groups",
                "/usr/bin/python3", str(copy), "--data", str(self.data), *words]

    def start(self):
        """Start the process and return when it is ready; the data folder may hold what an earlier start left."""
        words = list(self.options)
        for option, value in (("--smtp", "127.0.0.1:0"), ("--pop3", "127.0.0.1:0"), ("--web", "off")):
            if option not in words:
                words += [option, value]
        with open(self.place / "stdout", "wb") as output, open(self.place / "stderr", "ab") as errors:
            self.process = start(self.command(*words), stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
                                 cwd=str(self.place), env=self.environment)
        try:
            until(self.is_ready, 20, "minimail's line 'ready'")
        except AssertionError as problem:
            end_group(self.process)
            raise AssertionError("%s\nstdout: %s\nstderr: %s" % (problem, self.printed(), self.log())) from None
        self.listening = {}
        for line in self.printed().splitlines()[:-1]:
            word, name, address = line.split(" ")
            assert word == "listening", line
            host, _, port = address.rpartition(":")
            self.listening.setdefault(name, []).append((host.strip("[]"), int(port)))
        self.smtp = self.listening.get("smtp", [None])[0]
        self.pop3 = self.listening.get("pop3", [None])[0]

    def is_ready(self):
        """Return whether all listeners are bound; AssertionError when the process has ended instead."""
        assert self.process.poll() is None, "minimail ended with status %s" % self.process.returncode
        return self.printed().endswith("ready\n")

    def printed(self):
        """Return the standard output so far."""
        return (self.place / "stdout").read_text()

    def log(self):
        """Return the standard error so far, over all starts."""
        return (self.place / "stderr").read_text(errors="backslashreplace")

    def stop(self, seconds=12):
        """SIGTERM; the process must end by itself, with status 0 and no word on standard output beside those agreed."""
        self.process.terminate()
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            end_group(self.process)
            raise AssertionError("SIGTERM, and still there after %g seconds:\n%s" % (seconds, self.log())) from None
        assert status == 0, "status %d after SIGTERM:\n%s" % (status, self.log())
        assert "Traceback" not in self.log(), "minimail met what it did not expect:\n%s" % self.log()
        assert self.printed().endswith("ready\n"), "more than agreed on standard output: %s" % self.printed()

    def mailbox(self, address):
        """Return the Maildir of a plain lower-case address (one that needs no encoding in a path)."""
        local, _, domain = address.rpartition("@")
        return self.data / "mail" / domain / local

    def stored(self, address):
        """Return the files of an address's messages, oldest name first."""
        found = [*files(self.mailbox(address) / "new"), *files(self.mailbox(address) / "cur")]
        return sorted(path for path in found if not path.name.startswith("."))


def primary_group(user):
    """Return the group id of a user, as text."""
    return str(pwd.getpwnam(user).pw_gid)
