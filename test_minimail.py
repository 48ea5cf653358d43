#!/usr/bin/env python3
"""Tests of minimail.py, section by section under the same banners: python3 test_minimail.py [-v] [CLASS[.test]].

With `--module FILE` before that, of another minimail.py: one that `minimail.py cut` wrote has some sections only.

Plain unittest: no network but loopback, no fixed ports, no root, no sleeping instead of waiting. Our own client, Talk,
sends and compares bytes; smtplib, poplib, mailbox and email stand by as witnesses that were not written here.
"""
from __future__ import annotations

import ast
import atexit
import base64
import builtins
import collections
import concurrent.futures
import contextlib
import datetime
import email
import email.message
import email.policy
import email.utils
import errno
import functools
import gc
import hashlib
import hmac
import http.client
import http.server
import io
import itertools
import json
import logging
import mailbox
import os
import poplib
import py_compile
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import smtplib
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest
import warnings
from unittest import mock
from urllib.parse import quote

HERE = os.path.dirname(os.path.abspath(__file__))
BANNER = re.compile(r"^# ={100,}\n# (\d+)  ", re.M)


def try_module(path, arguments):
    """Run the tests of the sections that another minimail.py has, as `cut` leaves it; return the status to exit with."""
    with tempfile.TemporaryDirectory(prefix="test-minimail-") as place:
        shutil.copy(path, os.path.join(place, "minimail.py"))
        with open(path, encoding="utf-8") as module, open(__file__, encoding="utf-8") as tests:
            there, text = set(BANNER.findall(module.read())), tests.read()
        starts = [match.start() for match in BANNER.finditer(text)] + [len(text)]
        parts = [text[:starts[0]]] + [text[i:j] for i, j in zip(starts, starts[1:]) if BANNER.match(text, i).group(1) in there]
        program = os.path.join(place, os.path.basename(__file__))
        with open(program, "w", encoding="utf-8") as file:
            file.write("".join(parts))
        return subprocess.call([sys.executable, *("-W" + option for option in sys.warnoptions), program, *arguments])


if __name__ == "__main__" and sys.argv[1:2] == ["--module"]:
    sys.exit(try_module(sys.argv[2], sys.argv[3:]))

import minimail
from minimail import Address, Config, Content, Refused, main

try:
    import ssl
except ImportError:
    ssl = None

SOURCE = os.path.join(HERE, "minimail.py")
PATIENCE = 120.0                                    # seconds until something that does not come is missed
RAM_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) and "TMPDIR" not in os.environ and shutil.disk_usage(
    "/dev/shm").free > 1 << 30 else None            # a container's has 64 MB, less than some tests need
tempfile.tempdir = RAM_DISK                         # thousands of small files are made and removed
COMPILED = tempfile.TemporaryDirectory(prefix="test-minimail-")     # a copy that is compiled once, not by each child
atexit.register(COMPILED.cleanup)
shutil.copy(SOURCE, COMPILED.name)
PROGRAM = py_compile.compile(os.path.join(COMPILED.name, "minimail.py"))
poplib._MAXLINE = 1 << 20                           # poplib takes no lines above 2048; servers may send them
for name in [name for name in os.environ if name.startswith("MINIMAIL_")]:
    del os.environ[name]

CERTIFICATE = b"""\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgB7kpQOoDAUXQPmjE
/jcQpMjVdn83HjHD5DL2VV0Iu2ihRANCAASoDVC5d7Ej+03yKehKTeZB7bri5ENh
+3ixdNHzOHHP2LtCE9cKHzQsdMyKWmzNEdFmQ/JB+AHca5KhRVqsZq5k
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBcjCCARigAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAltYWlsLnRl
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CW1haWwudGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKgNULl3sSP7TfIp
6EpN5kHtuuLkQ2H7eLF00fM4cc/Yu0IT1wofNCx0zIpabM0R0WZD8kH4AdxrkqFF
WqxmrmSjWTBXMCUGA1UdEQQeMByCCW1haWwudGVzdIIJbG9jYWxob3N0hwR/AAAB
MA8GA1UdEwEB/wQFMAMBAf8wHQYDVR0OBBYEFKF9cDoG+OOqfFjNa/Hluis7s/ph
MAoGCCqGSM49BAMCA0gAMEUCIQCvl5ls6FGqgXHN0pZ79YW1gvLs3We+C5hD5+QV
aWw6zwIgG/36pt/NarlZrk4FUJItBZr1X5jIYExhGaAHGl7Y08Y=
-----END CERTIFICATE-----
"""


# ======================================================================================================================
# Harness: a client that speaks in dialogs, nodes and directories that are gone after the test.
# ======================================================================================================================

SECTIONS = list(dict.fromkeys(re.findall(r"(?m)^ {4,5}\d+  .*\[(\w+).*\]$", minimail.__doc__)))     # the optional ones that are there


def needs(*names):
    """Skip a test, or a class, where the module was cut and lacks one of these sections."""
    missing = [name for name in names if name not in SECTIONS]

    def mark(test):
        test.needs = {*names, *getattr(test, "needs", ())}
        return unittest.skipIf(missing, "this minimail.py has no section " + " ".join(missing))(test)
    return mark


def missing(name):
    """Stand for a name that a cut minimail.py lacks: what is about it is not tried."""
    if name.startswith("__"):
        raise AttributeError(name)
    raise unittest.SkipTest("this minimail.py has no " + name)


HAS_POP3, HAS_WEB = "pop3" in SECTIONS, "web" in SECTIONS
if "cut" not in SECTIONS:
    minimail.__getattr__ = missing
if not HAS_POP3:
    minimail.Node.pop3_address = property(lambda node: missing("section pop3"))
if not HAS_WEB:
    minimail.Node.web_address = property(lambda node: missing("section web"))
GONE = {"check", "cut", "dkim", "mail", "mx", "queue", "selftest", "sendmail", "wait"} - set(minimail.COMMANDS)


def skip_if_gone(argv, errors=""):
    """Skip a test that calls a command which a cut minimail.py lacks, or gives an option that is nothing there."""
    for word in GONE.intersection(argv):
        raise unittest.SkipTest("this minimail.py has no command " + word)
    if "this copy of minimail has no" in errors:
        raise unittest.SkipTest(errors)


def blocking(wire, coroutine):
    """Return the result of a coroutine that talks over one wire, driven in this thread."""
    if "run_blocking" in vars(minimail):
        return minimail.run_blocking(wire, coroutine)
    error = None                                    # in a copy in which nothing needs that: the same
    while True:
        try:
            what = coroutine.throw(error) if error else coroutine.send(None)
        except StopIteration as end:
            return end.value
        if what is minimail.SPEAK:
            error = None
            continue
        left = wire.deadline - wire.clock()
        ways = [[wire.sock] * bool(what & way) for way in (selectors.EVENT_READ, selectors.EVENT_WRITE)]
        error = None if left > 0 and any(select.select(*ways, [], left)) else minimail.TimedOut()


class Talk:
    """A client's end of a connection."""

    def __init__(self, address, source=None):
        self.sock = socket.create_connection(address, PATIENCE, source_address=source)
        self.file = self.sock.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.file.close()
        self.sock.close()

    def send(self, data):
        self.sock.sendall(data.encode("utf-8") if isinstance(data, str) else data)
        return self

    def line(self):
        """Return the next line; "closed" at the end."""
        try:
            line = self.file.readline()
        except ConnectionResetError:
            line = b""
        return line.decode("utf-8", "replace").rstrip("\r\n") if line else "closed"

    def reply(self):
        """Return the next reply: an SMTP one with all its lines, or a line."""
        lines = [self.line()]
        while re.match(r"\d\d\d-", lines[-1]):
            lines.append(self.line())
        return "\n".join(lines)

    def ask(self, command):
        return self.send(command + "\r\n").reply()

    def listing(self, command=None):
        """Return the bytes of a multi-line POP3 answer as they were before dots were stuffed."""
        if command:
            answer = self.ask(command)
            if not answer.startswith("+OK"):
                raise AssertionError("%s: %s" % (command, answer))
        lines = []
        for line in iter(self.file.readline, b".\r\n"):
            if not line:
                raise AssertionError("no end of the answer")
            lines.append(line[1:] if line.startswith(b".") else line)
        return b"".join(lines)

    def start_tls(self):
        self.file.close()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.sock = context.wrap_socket(self.sock)
        self.file = self.sock.makefile("rb")
        return self


class Case(unittest.TestCase):
    """A test with nodes, connections and directories that go with it."""

    maxDiff = 2000
    longMessage = True

    def directory(self):
        """Return a new empty directory."""
        directory = tempfile.TemporaryDirectory(prefix="test-minimail-")
        self.addCleanup(directory.cleanup)
        return directory.name

    def file(self, name, content):
        """Return the path of a new file."""
        path = os.path.join(self.directory(), name)
        with open(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return path

    OPTIONS = dict(smtp="127.0.0.1:0", pop3="127.0.0.1:0" if HAS_POP3 else "off", hostname="mail.test", no_sync=True)

    def node(self, accounts=None, aliases="", **options):
        """Return a running node, in capture mode unless told otherwise; `accounts` are {address: password}."""
        options = dict(self.OPTIONS, **options)
        if accounts is not None:
            options.setdefault("data", self.directory())
            with open(os.path.join(options["data"], "users"), "w") as file:
                for name, password in accounts.items():
                    file.write("%s:%s\n" % (name, cheap_hash(password)))
            with open(os.path.join(options["data"], "aliases"), "w") as file:
                file.write(aliases)
        try:
            node = minimail.Node(**options)
        except minimail.UsageError as error:
            skip_if_gone((), str(error))
            raise
        node.start()
        self.addCleanup(node.stop)
        return node

    def stores(self, **options):
        """Return the stores of section 7 over a new data directory."""
        stores = minimail.open_stores(Config(**dict(dict(data=self.directory(), hostname="mail.test", no_sync=True),
                                                    **options)))
        return stores

    def talk(self, address, hello=True):
        """Return a connection, greeted and in SMTP introduced."""
        talk = Talk(address)
        self.addCleanup(talk.close)
        if hello and talk.reply().startswith("220"):
            self.assertRegex(talk.ask("EHLO client.test"), r"(?m)^250 ")
        return talk

    def dialog(self, where, script):
        """Hold a dialog: `C:` we send, `S:` how the reply begins, or `closed`. Adjacent C lines go in one piece."""
        talk = where if isinstance(where, Talk) else self.talk(where, hello=False)
        batch = ""
        for line in textwrap.dedent(script).strip().split("\n"):
            side, text = line.strip()[:2], line.strip()[3:]
            if side == "C:":
                batch += text + "\r\n"
                continue
            if batch:
                talk.send(batch)
                batch = ""
            reply = talk.reply()
            self.assertTrue(reply.split("\n")[-1].startswith(text), "expected %r, got %r in\n%s" % (text, reply, script))
        return talk

    def deliver(self, node, content, *recipients, sender="alice@example.net"):
        """Hand a message to a node, byte for byte; return the id that it was accepted as."""
        with Talk(node.smtp_address) as talk:
            replies = [talk.reply(), talk.ask("EHLO client.test")]
            replies.append(talk.ask("MAIL FROM:<%s> SMTPUTF8" % sender))
            replies += [talk.ask("RCPT TO:<%s>" % recipient) for recipient in recipients]
            replies.append(talk.ask("DATA"))
            end = b".\r\n" if content[-2:] in (b"", b"\r\n") else b"\r\n.\r\n"
            replies.append(talk.send(stuff_slowly(content) + end).reply())
        match = re.fullmatch(r"250 2\.0\.0 .* (\S+)", replies[-1])
        self.assertTrue(match, replies)
        return match.group(1)

    def fetch(self, node, address, password="secret"):
        """Return all messages in a mailbox, by POP3."""
        with contextlib.closing(poplib.POP3(*node.pop3_address, timeout=PATIENCE)) as pop:
            pop.user(address)
            pop.pass_(password)
            count = pop.stat()[0]
            messages = [b"".join(line + b"\r\n" for line in pop.retr(number + 1)[1]) for number in range(count)]
            pop.quit()
        return messages

    def eventually(self, condition, what="it"):
        """Return the first true value of condition()."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.01)
        self.fail("%s did not come true" % what)

    def in_background(self, function, *arguments, **keywords):
        """Run a function in a thread; return a function that waits for its result, or raises its error."""
        results = []

        def run():
            try:
                results.append((function(*arguments, **keywords), None))
            except BaseException as error:
                results.append((None, error))
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.addCleanup(thread.join, PATIENCE)

        def result():
            thread.join(PATIENCE)
            self.assertFalse(thread.is_alive(), "%r does not end" % function)
            value, error = results[0]
            if error:
                raise error
            return value
        return result

    def refused(self, code, function, *arguments):
        """Assert that function(*arguments) is refused with a reply that begins with `code`."""
        with self.assertRaises(Refused) as caught:
            function(*arguments)
        self.assertTrue(str(caught.exception.reply).startswith(code), str(caught.exception.reply))

    def assertNoMoreOpen(self, before):
        """No more files are open than before; what threads of other tests had may be closed meanwhile, ours in a moment."""
        self.eventually(lambda: open_files() <= before, "all that was opened closed")

    def assertNothingLeft(self, data):
        """No message file, in place or half-written, is in a data directory."""
        self.assertEqual([], [os.path.join(place, name) for place, _, names in os.walk(data) for name in names
                              if "/run" not in place and "users" not in name and "aliases" not in name])


@contextlib.contextmanager
def of_somebody_else(*paths):
    """Let nobody into a file or directory, as if another user had put it there and we were not root."""
    stat_it = os.stat

    def guarded(function):
        def guard(path=".", *arguments, **named):
            if isinstance(path, str) and any(path.startswith(closed + "/") or path == closed and function is not stat_it
                                             for closed in paths):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return function(path, *arguments, **named)
        return guard
    with contextlib.ExitStack() as stack:
        for name in ("open", "stat", "listdir", "scandir"):
            stack.enter_context(mock.patch.object(os, name, guarded(getattr(os, name))))
        yield


def cheap_hash(password):
    """Return the record of a password that takes no time to check."""
    with mock.patch.object(minimail, "SCRYPT", dict(n=16, r=1, p=1)):
        return minimail.hash_password(password)


def plain(name, password):
    """Return the response of AUTH PLAIN."""
    return base64.b64encode(("\0%s\0%s" % (name, password)).encode()).decode()


def our_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("minimail")]


def open_and_read(path):
    with open(path, "rb") as file:
        return file.read()


def node_threads():
    """Return how many passwords are hashed at once."""
    return max(1, (os.cpu_count() or 2) // 2)


def minimail_line(record):
    """Return a log record as the text that main() would write."""
    return minimail.Lines("text").format(record)


def stuff_slowly(content):
    return b"\r\n".join(b"." + line if line.startswith(b".") else line for line in content.split(b"\r\n"))


def end_line(content):
    """Return content with what its last line lacks of a CRLF."""
    return content if content[-1:] in (b"", b"\n") else content + b"\r\n"[content.endswith(b"\r"):]


def body_of(message):
    """Return what came after our trace headers, which are all there is before the first line of content."""
    match = re.match(rb"(?:Return-Path|Delivered-To|Received): .*\r\n(?:[ \t].*\r\n)*"
                     rb"(?:(?:Delivered-To|Received): .*\r\n(?:[ \t].*\r\n)*)*", message)
    return message[match.end():]


class Faulty:
    """Stands in for functions of `os` and fails the n-th call of any of them."""

    NAMES = ("open", "write", "fsync", "rename", "replace", "link", "mkdir")

    def __init__(self, nth, error):
        self.left, self.error, self.failed = nth, error, ""

    def __enter__(self):
        self.patches = [mock.patch.object(os, name, self.wrap(name, getattr(os, name))) for name in self.NAMES]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()

    def wrap(self, name, function):
        def call(*arguments, **keywords):
            self.left -= 1
            if self.left == 0:
                self.failed = name
                raise OSError(self.error, os.strerror(self.error))
            return function(*arguments, **keywords)
        return call


def open_files():
    """Return how many files this process has open; 0 where that cannot be told."""
    gc.collect()                                    # PyPy closes what is dropped only now
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def run_main(*argv, environ=None, stdin=""):
    """Return (status, standard output, standard error) of main() in this process."""
    skip_if_gone(argv)
    log, out, err = minimail.log, io.StringIO(), io.StringIO()
    before = log.handlers, log.propagate, log.level, minimail.logging.raiseExceptions
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        with mock.patch.dict(os.environ, environ or {}), mock.patch.object(sys, "stdin", io.StringIO(stdin)), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = minimail.main(list(argv))
    finally:
        log.handlers, log.propagate, level, minimail.logging.raiseExceptions = before
        log.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)    # or programs that tests start would inherit it
    skip_if_gone((), err.getvalue())
    return status, out.getvalue(), err.getvalue()


def run_main_forked(*argv):
    """Return (status, standard output, standard error) of the program in a process of its own."""
    skip_if_gone(argv)
    ran = subprocess.run([sys.executable, PROGRAM, *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         timeout=PATIENCE)
    return ran.returncode, ran.stdout.decode(), ran.stderr.decode()


def run_python(*arguments, timeout=PATIENCE, **keywords):
    """Return the ended process of another Python."""
    return subprocess.run([sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=timeout, **keywords)


def cpu_of(function):
    """Return the seconds of CPU that a call takes: the fewest of three, as a collection of garbage may come in one."""
    spent = []
    for _ in range(3):
        began = time.process_time()
        function()
        spent.append(time.process_time() - began)
    return min(spent)


def in_child(function):
    """Return the text of what function() returns in a forked process, None when that ended before."""
    readable, writable = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")             # Python 3.12: other threads; the child uses none of them
        child = os.fork()
    if not child:
        try:
            os.write(writable, str(function()).encode())
        finally:
            os._exit(0)
    os.close(writable)
    with open(readable, "rb") as file:
        text = file.read().decode()
    os.waitpid(child, 0)
    return text or None


class Program:
    """minimail.py in a process of its own."""

    def __init__(self, *argv):
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen([sys.executable, PROGRAM, *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=self.errors)
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line.decode().rstrip("\n"))
            if self.lines[-1] == "ready":
                break
        else:
            self.errors.seek(0)
            skip_if_gone((), self.errors.read().decode())

    def address(self, name):
        """Return (host, port) of a listener."""
        host, _, port = next(line.split()[2] for line in self.lines if line.startswith("listening %s " % name)).rpartition(":")
        return host.strip("[]"), int(port)

    def end(self, number=signal.SIGTERM):
        """Send a signal, if it still runs; return its exit status and what it wrote to standard error."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=PATIENCE)
        if rest:
            self.lines += rest.decode().splitlines()
        if not self.errors.closed:
            self.errors.seek(0)
            self.log = self.errors.read().decode()
            self.errors.close()
        return self.process.returncode, self.log


def envelope(recipient="b@x"):
    """Return the dialog up to the content of a message, pipelined."""
    return "C: MAIL FROM:<a@x>\nC: RCPT TO:<%s>\nC: DATA\nS: 250\nS: 250\nS: 354\n" % recipient


def letter(content="x", answer="250 2.0.0", recipient="b@x"):
    """Return the dialog of a message in one piece."""
    return "C: MAIL FROM:<a@x>\nC: RCPT TO:<%s>\nC: DATA\nC: %s\nC: .\nS: 250\nS: 250\nS: 354\nS: %s\n" % (
        recipient, content, answer)


UNRAISABLE = []                                     # what went wrong where nobody could catch it
ELSEWHERE = tempfile.TemporaryDirectory(prefix="test-minimail-")


def unraisable(what):
    """Note what went wrong. What is left open CPython says at once, at the fault; PyPy some time later, and not each time."""
    if not (sys.implementation.name == "pypy" and isinstance(what.exc_value, ResourceWarning)):
        UNRAISABLE.append("%r in %r" % (what.exc_value, what.object))


def setUpModule():
    os.chdir(ELSEWHERE.name)                        # where no test shall leave anything
    os.umask(0o022)                                 # a data directory that a test makes is one that others cannot write to
    sys.unraisablehook = unraisable
    threading.excepthook = lambda what: UNRAISABLE.append("%r in %r" % (what.exc_value, what.thread))


def tearDownModule():
    gc.collect()
    left = os.listdir()
    os.chdir(HERE)
    ELSEWHERE.cleanup()
    assert not UNRAISABLE and not left, (UNRAISABLE, left)


CLEAN = (b"From: Alice <alice@example.net>\r\nTo: bob@x\r\nDate: Mon, 01 Jan 2024 10:00:00 +0000\r\n"
         b"Message-ID: <1@example.net>\r\nSubject: hi\r\n\r\nhello\r\n")


class WebAnswer:
    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def text(self):
        return self.body.decode("utf-8")


class WebCase(Case):
    """A test that speaks HTTP with a node; or would, if it could, of sections that also do without."""

    def web_node(self, **options):
        return self.node(**dict(dict(pop3="off", web="127.0.0.1:0" if HAS_WEB else "off"), **options))

    def ask(self, node, target, method="GET", body=None, status=200, headers=None):
        """Return the answer to a request on a connection of its own; what is no bytes goes as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        with contextlib.closing(http.client.HTTPConnection(*node.web_address, timeout=PATIENCE)) as connection:
            connection.request(method, target, body, headers or {})
            answer = WebAnswer(connection.getresponse())
        if status is not None:
            self.assertEqual(answer.status, status, "%s %s: %r" % (method, target, answer.body[:300]))
        return answer

    def session(self, node, id="latest"):
        """Return how a message came."""
        if HAS_WEB:
            return self.ask(node, "/api/v1/message/%s/session" % id).json
        recorder = node.site.recorder
        record = recorder.load(node.messages()[-1].id if id == "latest" else id)
        return dict(record, lint=recorder.explain(record["lint"]))

    def found(self, node, query=""):
        """Return the subjects in the list or of a search, newest first."""
        target = "/api/v1/search?query=" + quote(query) if query else "/api/v1/messages"
        return [message["Subject"] for message in self.ask(node, target).json["messages"]]

    def assertSoon(self, function, seconds):
        """Call a function that takes at most so many seconds of CPU, twice that on slow machines."""
        started = time.process_time()
        result = function()
        self.assertLess(time.process_time() - started, 2 * seconds)
        return result


# ======================================================================================================================
# 2  Limits, replies, options
# ======================================================================================================================

class Replies(unittest.TestCase):
    def test_lines(self):
        self.assertEqual(minimail.Reply(250, "2.0.0", "ok").encode(), b"250 2.0.0 ok\r\n")
        self.assertEqual(minimail.Reply(250, "", "a\nb\nc").encode(), b"250-a\r\n250-b\r\n250 c\r\n")
        self.assertEqual(minimail.Reply(550, "5.1.1", "a\nb").encode(), b"550-5.1.1 a\r\n550 5.1.1 b\r\n")

    def test_untrusted_text_is_printable(self):
        self.assertEqual(minimail.printable("a\r\nb\0\x1b[2J\u2028\x85"), "a\\r\\nb\\x00\\x1b[2J\\u2028\\x85")
        self.assertEqual(minimail.printable(b"\xff\xc3\xa9"), "\\xff\xe9")
        self.assertEqual(minimail.printable("\udcff"), "\\udcff")
        self.assertEqual(len(minimail.printable("x" * 10000, 100)), 103)


LOCAL = minimail.parse_network("127.0.0.0/8")
PEER = minimail.Server("relay.example", 2525, False, "me@x", "p:w")
OPTIONS = {                                         # option: (as text, its value, a text that is none)
    "smtp": ("127.0.0.1:2525", (("127.0.0.1", 2525),), "25"), "smtps": ("[::1]:465", (("::1", 465),), "::1:465"),
    "pop3": ("localhost:0", (("localhost", 0),), "x:70000"), "pop3s": (":995", (("0.0.0.0", 995),), "x:-1"),
    "web": ("off", (), "x:"), "data": ("/x/y", "/x/y", "x\0y"), "hostname": ("Mail.Example", "mail.example", "a b"),
    "domain": ("Example.ORG", ("example.org",), "-x-"), "users": ("/u", "/u", ""), "aliases": ("/a", "/a", ""),
    "catch_all": ("Box@Example.org", "box@example.org", "box"), "trust": ("127.0.0.0/8", (LOCAL,), "127.0.0.0/40"),
    "route": ("A.example=smtp://me%40x:p%3Aw@relay.example:2525", (("a.example", PEER),), "a.example"),
    "smarthost": ("smtps://relay.example", minimail.Server("relay.example", 465, True), "http://relay.example"),
    "dns": ("192.0.2.1", (("192.0.2.1", 53),), "dns.example"), "mx_port": ("2500", 2500, "0"),
    "retry": ("1,2.5", (1.0, 2.5), "1,x"), "give_up": ("60", 60.0, "0"), "tls_cert": ("/c", "/c", ""),
    "tls_key": ("/k", "/k", ""), "relay_tls": ("require", "require", "maybe"), "max_size": ("10M", 10 << 20, "10X"),
    "max_connections": ("7", 7, "0"), "max_per_client": ("8", 8, "-1"), "timeout": ("1.5", 1.5, "nan"),
    "no_sync": ("on", True, "perhaps"), "workers": ("2", 2, "two"), "run_as": ("nobody", "nobody", ""),
    "relay_to": (".Example.com", (".example.com",), "."), "keep": ("3", 3, "0"), "transcripts": ("off", False, "perhaps"),
    "fault": ("rcpt=bob@* 451 x2", "rcpt=bob@* 451 x2", "sneeze"), "log": ("json", "json", "xml"), "quiet": ("on", True, "x"),
    "verbose": ("on", True, "x"), "webs": ("127.0.0.1:8443", (("127.0.0.1", 8443),), "x"),
    "web_allow": ("https://Mail.example:8080", ("https://mail.example:8080",), "a b"),
    "web_admin": ("Boss@Example.org", ("boss@example.org",), "boss"),
    "release": ("smtp://relay.example", minimail.Server("relay.example", 25), "relay.example"),
    "webhook": ("http://hook.example/x", "http://hook.example/x", "hook.example"), "max_age": ("60", 60.0, "-1"),
    "limit": ("a.example=connections=2,rate=5/60", (minimail.Limit("a.example", 2, None, None, (5, 60.0)),), "connections"),
    "rewrite": ("*@*.Local=alerts@example.org", (("*@*.local", "alerts@example.org"),), "a=b"),
    "dkim": ("example.org=s1:/key", (("example.org", "s1", "/key"),), "s1"), "warn": ("14400", 14400.0, "soon"),
}
NEEDED = {"smtps": "tls_cert", "pop3s": "tls_cert", "webs": "tls_cert", "tls_key": "tls_cert", "catch_all": "domain", "web_admin": "domain"}
SECRET = ("smarthost", "route", "release", "webhook")
FLAGS = ("no_sync", "quiet", "verbose")


def flag(name):
    return "--" + name.replace("_", "-")


def lacks_section(option):
    """Return whether an option is about sections that this minimail.py lacks."""
    return any(option in options and section not in SECTIONS for section, options in minimail.OPTIONS_OF.items())


class Options(Case):
    def config(self, argv, environ=None):
        return minimail.read_config(minimail.parse_command_line(argv)[2], environ or {})

    def check(self, config, name, value):
        found = getattr(config, name)
        self.assertEqual(found[0].text if name == "fault" else found, value)

    def test_every_option_through_three_doors(self):
        self.assertEqual(set(OPTIONS), set(minimail.option_fields()))
        for name, (text, value, _) in OPTIONS.items():
            needed = NEEDED.get(name)
            if lacks_section(name):
                continue
            with self.subTest(name):
                argv = [flag(name)] + ([] if name in FLAGS else [text])
                argv += [flag(needed), OPTIONS[needed][0]] if needed else []
                self.check(self.config(argv), name, value)
                environ = {"MINIMAIL_" + key.upper(): OPTIONS[key][0] for key in (name, needed) if key}
                self.check(self.config([], environ), name, value)
                if name != "workers":
                    self.check(minimail.Node(**{key: OPTIONS[key][0] for key in (name, needed) if key}).config, name, value)

    def test_wrong_values_are_named(self):
        for name, (_, _, bad) in OPTIONS.items():
            if lacks_section(name):
                continue
            with self.subTest(name):
                if name not in FLAGS:
                    status, out, err = run_main(flag(name), bad)
                    self.assertEqual((status, out, err.count("\n")), (2, "", 1), err)
                    self.assertIn(flag(name), err)
                if bad and "\0" not in bad:
                    status, out, err = run_main(environ={"MINIMAIL_" + name.upper(): bad})
                    self.assertEqual((status, out, err.count("\n")), (2, "", 1), err)
                    self.assertIn("MINIMAIL_" + name.upper(), err)
                with self.assertRaises(ValueError) as caught:
                    minimail.Node(**{name: bad})
                self.assertIn(name, str(caught.exception))

    def test_command_line_wins_and_lists_have_commas(self):
        environ = {"MINIMAIL_DATA": "/env", "MINIMAIL_DOMAIN": "a.example, b.example", "MINIMAIL_SMTP": "off",
                   "MINIMAIL_NO_SYNC": "1"}
        config = self.config(["--data", "/line"], environ)
        self.assertEqual((config.data, config.domain, config.smtp), ("/line", ("a.example", "b.example"), ()))
        self.assertTrue(config.no_sync)
        config = self.config(["--smtp", "x:1", "--smtp=[::]:2", "--domain", "c.example"], environ)
        self.assertEqual((config.smtp, config.domain), ((("x", 1), ("::", 2)), ("c.example",)))

    def test_data_stands_anywhere(self):
        for argv in (["--data", "/d", "user", "list"], ["user", "--data", "/d", "list"], ["user", "list", "--data=/d"]):
            command, rest, given = minimail.parse_command_line(argv)
            self.assertEqual((command, rest, given), ("user", ["list"], {"data": "/d"}))
        self.assertEqual(minimail.parse_command_line(["serve"])[:2], ("serve", []))

    def test_wrong_usage(self):
        for argv in (["--frobnicate"], ["frobnicate"], ["--smtp"], ["--tls-key", "k"], ["--smtps", "x:1"], ["serve", "more"],
                     ["--catch-all", "a@b.example"], ["user", "frob"], ["user", "add", "bob"], ["user", "add"],
                     ["mail", "a b"],
                     ["--dat", "/x"], ["--log", "xml"], ["mail", "a@b.example", "too many"]):
            with self.subTest(argv=argv):
                status, out, err = run_main(*argv)
                self.assertEqual((status, out, err.count("\n")), (2, "", 1), err)
        self.assertIn("--frobnicate", run_main("--frobnicate")[2])
        status, out, err = run_main("--log", "json", "--max-size", "10\u2028X\n")
        self.assertEqual((status, out, err.count("\n")), (2, "", 1))
        self.assertIn("--max-size", json.loads(err)["event"])

    def test_a_secret_never_enters_a_text(self):
        url = "smtp://me:hunter2@h.example/inbox"
        for name in SECRET:
            value = "a.example=" + url if name == "route" else url
            for argv, environ in (([flag(name), value], {}), ([flag(name) + "=" + value], {}), ([], {"MINIMAIL_" + name.upper(): value}),
                                  ([], {"MINIMAIL_%s_FILE" % name.upper(): self.file("secret", value)})):
                status, out, err = run_main(*argv, environ=environ)
                self.assertEqual((status, out, err.count("\n"), "hunter2" in err), (2, "", 1, False), err)
                self.assertIn(name.upper() if environ else flag(name), err)
            with self.assertRaises(ValueError) as caught:
                minimail.Node(**{name: value})
            self.assertNotIn("hunter2", str(caught.exception))
        for argv in ([url], ["--smarthots", url], ["--smarthots=" + url], ["--pasword", "hunter2"], ["user", "add", "b@x", "hunter2"],
                     ["user", "add", "b@x", "--password=hunter2"], ["--dns", url], ["--trust", url], ["--mx-port", url]):
            status, out, err = run_main(*argv)
            self.assertEqual((status, out, err.count("\n"), "hunter2" in err), (2, "", 1, False), err)

    def test_a_secret_in_an_address_that_cannot_be_read(self):
        for url in ("http://me:hunter2@[::1/x", "http://me:hunter2@h\u2100.example/x", "https://h.example/hunter2 x",
                    "https://h.example:hunter2/x", "https://h.example/hunter2\x00", "smtp://me:hunter2@h\u2100.example"):
            for name in SECRET:
                with self.assertRaises(ValueError) as caught:
                    minimail.Node(**{name: "a.example=" + url if name == "route" else url})
                self.assertNotIn("hunter2", str(caught.exception))

    @needs("relay")
    def test_options_from_files(self):
        path = self.file("smarthost", "# by the provider\nsmtp://a.example\n")
        environ = {"MINIMAIL_SMARTHOST_FILE": path, "MINIMAIL_ROUTE_FILE": self.file("r", "a.example=smtp://b\nc.example=smtp://d\n"),
                   "MINIMAIL_NO_SYNC_FILE": self.file("n", "on\n")}
        config = self.config([], environ)
        self.assertEqual((str(config.smarthost), len(config.route), config.no_sync), ("smtp://a.example:25", 2, True))
        config = minimail.dataclasses.replace(config, quiet=True)
        self.assertEqual(str(config.current("smarthost")), "smtp://a.example:25")
        with open(path, "w") as file:
            file.write("smtps://me:secret@new.example\n")
        self.eventually(lambda: config.current("smarthost").host == "new.example")
        with open(path, "w") as file:
            file.write("nonsense with secret\n")
        with self.assertLogs("minimail") as logs:
            self.eventually(lambda: (config.current("smarthost"), logs.output)[1])
        self.assertNotIn("secret", logs.output[0])
        self.assertIn(path, logs.output[0])
        os.unlink(path)
        self.assertEqual(config.current("smarthost").host, "new.example", "the last that was good")
        self.assertEqual(config.current("max_size"), config.max_size)
        config = self.config(["--route", "x.example=smtp://y"], {"MINIMAIL_ROUTE_FILE": environ["MINIMAIL_ROUTE_FILE"]})
        self.assertEqual([pattern for pattern, _ in config.current("route")], ["x.example"], "the command line wins")
        for variables, status in (({"MINIMAIL_SMARTHOST_FILE": path}, 1), ({"MINIMAIL_SMARTHOST_FILE": self.file("e", "\n")}, 1),
                                  ({"MINIMAIL_NO_SYNC_FILE": environ["MINIMAIL_NO_SYNC_FILE"], "MINIMAIL_NO_SYNC": "on"}, 2)):
            got, out, err = run_main(environ=variables)
            self.assertEqual((got, out, err.count("\n")), (status, "", 1), err)
            self.assertIn(min(variables), err)

    @needs("relay")
    def test_limits_in_one_variable(self):
        config = self.config([], {"MINIMAIL_LIMIT": "connections=5,messages=7, a.example=connections=1,rate=1/2,b.example=recipients=3"})
        self.assertEqual([(limit.domain, limit.connections, limit.messages, limit.recipients) for limit in config.limit],
                         [("", 5, 7, None), ("a.example", 1, None, None), ("b.example", None, None, 3)])

    def test_strange_variables(self):
        environ = {"MINIMAIL_SMARTHOTS": "x", "MINIMAIL_MX_PORT": "tcp://10.0.0.1:25", "MINIMAIL_PORT_25_TCP": "tcp://10.0.0.1:25",
                   "MINIMAIL_DATA": "/d", "MINIMAIL_USERS_FILE": "/x", "OTHER": "x", "MINIMAIL": "x"}
        said = minimail.strange_variables(environ)
        for word in ("MINIMAIL_SMARTHOTS is no option", "MINIMAIL_SMARTHOST ", "MINIMAIL_MX_PORT"):
            self.assertIn(word, said)
        for word in ("10.0.0.1", "OTHER", "USERS", "PORT_25"):
            self.assertNotIn(word, said)
        self.assertEqual(minimail.strange_variables({"MINIMAIL_DATA": "x"}), "")
        self.assertLess(len(minimail.strange_variables({"MINIMAIL_X%d" % i: "x" for i in range(300)})), 1000)
        self.assertEqual(self.config([], {"MINIMAIL_MX_PORT": "tcp://10.0.0.1:25"}).mx_port, 25)
        status, out, err = run_main("user", "list", "--data", self.directory(), environ={"MINIMAIL_SMARTHOTS": "x"})
        self.assertEqual((status, out, err.count("\n")), (0, "", 1), err)

    def test_the_library_checks_what_the_command_line_checks(self):
        for given in ({"tls_key": "k"}, {"catch_all": "a@b.example"}, {"smtps": "x:1"}, {"release": "smtp://x", "domain": "b.example"}):
            config = Config(**minimail.read_options(given, str))
            with self.assertRaises(minimail.UsageError) as caught:
                minimail.check_together(config, str)
            self.assertIn(min(set(given) - {"domain"}), str(caught.exception))
            self.assertRaises(ValueError, minimail.Node, **given)
        for given in ({"policy": object()}, {"policy": minimail.Policy}, {"clock": 5}, {"on_message": "print"}):
            with self.assertRaises(TypeError) as caught:
                minimail.check_library(given)
            self.assertIn(min(given), str(caught.exception))
            self.assertRaises(TypeError, minimail.Node, **given)
        minimail.check_library({"policy": minimail.Policy(), "clock": time.time, "on_message": None})

    def test_help_is_narrow(self):
        pages = [run_main("--help")[1]] + [run_main(command, "--help")[1] for command in minimail.COMMANDS]
        self.assertEqual([line for page in pages for line in page.splitlines() if len(line) > 100], [])
        for section, defaults in (("", ("127.0.0.1:1025", "minimail-data", "127.0.0.0/8", "52428800", "500", "default 50)", "300",
                                        "default 1)", "default text")),
                                  ("pop3", ["127.0.0.1:1110"]), ("web", ["127.0.0.1:8025"]),
                                  ("relay", ("60,300,900,3600", "432000", "default may"))):
            for default in defaults:
                self.assertEqual(default in " ".join(pages[0].split()), section in ["", *SECTIONS], default)

    def test_a_machine_name_that_is_not_ascii(self):
        for name, wanted in (("b\xfcro", "xn--bro-hoa"), ("B\xfcro.example", "xn--bro-hoa.example"), ("a b", "localhost"), ("", "localhost"),
                             ("x" * 64, "localhost"), ("\udcff", "localhost")):
            with mock.patch.object(minimail.socket, "gethostname", return_value=name):
                self.assertEqual(minimail.machine_name(), wanted)
        self.assertEqual(self.config(["--hostname", "b\xfcro.example"]).hostname, "xn--bro-hoa.example")

    def test_version_and_help(self):
        self.assertEqual(run_main("--version"), (0, "minimail %s\n" % minimail.__version__, ""))
        status, out, err = run_main("--help")
        self.assertEqual((status, err), (0, ""))
        for name in OPTIONS:
            self.assertEqual(bool(re.search(flag(name) + r"\b(?!-)", out)), not lacks_section(name), name)
        for command in minimail.COMMANDS:
            status, out, err = run_main(command, "--help")
            self.assertEqual((status, err, "minimail.py %s" % command in out), (0, "", True), command)

    def test_cannot_run(self):
        file = self.file("file", b"")
        taken = self.node().smtp_address
        for argv, word in ((["--data", file + "/x"], file), (["--smtp", "%s:%d" % taken], str(taken[1])),
                           (["--tls-cert", "/no/such.pem"], "/no/such.pem"), (["--tls-cert", file], file),
                           (["--run-as", "no-such-user"], "no-such-user")):
            with self.subTest(argv=argv):
                data = ["--data", self.directory()] if "--data" not in argv else []
                rest = ["--smtp", "off"] if "--smtp" not in argv else []
                status, out, err = run_main("--pop3", "off", "--web", "off", *argv, *data, *rest)
                self.assertEqual((status, out, err.count("\n")), (1, "", 1), err)
                self.assertIn(word, err)
                status, out, err = run_main("--log=json", "--pop3", "off", "--web", "off", *argv, *data, *rest)
                self.assertIn(word, json.loads(err)["event"])


# ======================================================================================================================
# 3  Addresses, envelopes, headers
# ======================================================================================================================

class Addresses(Case):
    def test_paths(self):
        for text, address in {
                "<bob@example.com>": "bob@example.com", " <b@x>": "b@x",
                "<b.o-b+tag_1@x-1.example>": "b.o-b+tag_1@x-1.example",
                "<!#$%&'*+-/=?^_`{|}~@x>": "!#$%&'*+-/=?^_`{|}~@x", '<"a b"@x>': '"a b"@x', '<"bob"@x>': "bob@x",
                '<"a\\"b\\\\c"@x>': '"a\\"b\\\\c"@x', '<"a>b"@x>': '"a>b"@x', '<"a@b"@x>': '"a@b"@x', '<""@x>': '""@x',
                '<"\\a"@x>': "a@x", "<b@[192.0.2.1]>": "b@[192.0.2.1]", "<b@[IPv6:2001:db8::1]>": "b@[IPv6:2001:db8::1]",
                "<@a.example,@b.example:bob@c.example>": "bob@c.example", "<Postmaster>": "postmaster",
                "<j\xf6rg@b\xfccher.example>": "j\xf6rg@b\xfccher.example", "<b@example.com.>": "b@example.com",
                "<b@a_b.example>": "b@a_b.example", "<\u7528\u6237@\u4f8b\u5b50.\u5e7f\u544a>":
                "\u7528\u6237@\u4f8b\u5b50.\u5e7f\u544a"}.items():
            with self.subTest(text):
                found, rest = minimail.parse_path(text + " SIZE=1")
                self.assertEqual((str(found), rest), (address, "SIZE=1"))
                if found.domain:
                    self.assertEqual(minimail.parse_address(str(found)), found, "what is printed is read as the same")
        self.assertEqual(minimail.parse_path("<> BODY=7BIT"), (None, "BODY=7BIT"))
        self.assertEqual(minimail.parse_path("<Bob.X@Example.COM>")[0].key, "bob.x@example.com")

    def test_no_paths(self):
        for text in ("", "bob@x", "<bob@x", "<bob@x>y", "< bob@x>", "<bob @x>", "<.b@x>", "<b.@x>", "<a..b@x>", "<b@>", "<@x>",
                     "<b@x@y>", "<b@-x>", "<b@x..y>", "<b@x-.y>", "<b@[1.2.3]>", "<b@[300.1.1.1]>", "<b@[IPv6:1::2::3]>",
                     "<b@[x]>",
                     '<"a@x>', '<"a"b@x>', '<"a\rb"@x>', "<a\nb@x>", "<a\0b@x>", '<"a\0"@x>', "<a\x85b@x>", "<\udcff@x>",
                     "<b@x y>",
                     "<b@%s.example>" % ("a" * 64), "<b@%s>" % ".".join(["abcdefgh"] * 30), "<<b@x>>", "<b(c)@x>",
                     "<b@x/../y>", "<%s@x>" % ("a" * minimail.MAX_PATH), '<"%s"@x>' % ("\\a" * 600)):
            with self.subTest(text):
                self.refused("501 5.1.3", minimail.parse_path, text)
        self.refused("553 5.1.3", minimail.parse_path, "<bob>")

    def test_lenient_paths(self):
        """What devices and old programs say; see the table of modes in the README."""
        for text, address, rest in (
                ("me@x SIZE=1", "me@x", "SIZE=1"), ("  me@x", "me@x", ""), ("< me@x > A=b", "me@x", "A=b"), ("Joe B <joe@x>", "joe@x", ""),
                ("<root>", "root", ""), ("root BODY=7BIT", "root", "BODY=7BIT"), ("<a..b.@docomo.example>", '"a..b."@docomo.example', ""),
                (".a@x", '".a"@x', ""), ('"a <b"@x Y', '"a <b"@x', "Y"), ("<u@[127.0.0.1]>", "u@[127.0.0.1]", ""), ("<b@x>", "b@x", ""),
                ('<"a>b"@x>', '"a>b"@x', ""), ("<@a.example:b@x>", "b@x", "")):
            with self.subTest(text):
                found, after = minimail.parse_path(text, lenient=True)
                self.assertEqual((str(found), after), (address, rest))
                if "@" in address:
                    self.assertEqual(minimail.parse_address(str(found)), found, "strict readers know what is printed")
        self.assertEqual(minimail.parse_path("<> X=1", lenient=True), (None, "X=1"))
        for text in ("", "<b@x", "b@x>", "a@b@c", "<a b@x>", "<a\nb@x>", "<\udcff@x>", "@x", "<b@>", "<b@x..y>", '"a@x', "a\0b", "<a<b@x>>"):
            with self.subTest(text):
                self.refused("501 5.1.3", minimail.parse_path, text, True)
        for text in ("me@x", "Joe <joe@x>", "<a..b@x>", "<.a@x>"):
            self.refused("501 5.1.3", minimail.parse_path, text)

    def test_parameters(self):
        self.assertEqual(minimail.parse_parameters("size=1 SMTPUTF8"), {"SIZE": "1", "SMTPUTF8": ""})
        for text in ("SIZE=", "=1", "-x", "SIZE=1 size=2", "a_b"):
            self.refused("501 5.5.4", minimail.parse_parameters, text)

    def test_look_alikes_keep_their_own_mailbox(self):
        keys = [minimail.parse_address(text + "@x").key for text in ("k", "\u212a", "i", "\u0130", "\u0131", "s", "\u017f",
                                                                     "\xe9",
                                                                      "e\u0301")]
        self.assertEqual(len(set(keys)), len(keys), keys)
        self.assertEqual(minimail.parse_address("J\xd6RG@X").key, "j\xf6rg@x")

    def test_domains(self):
        self.assertEqual(minimail.ascii_domain("B\xfccher.Example."), "xn--bcher-kva.example")
        self.assertEqual(minimail.domain_literal("[IPv6:2001:DB8::1]"), "2001:db8::1")
        self.assertIsNone(minimail.domain_literal("[2001:db8::1]"))
        self.assertEqual(minimail.clients_address("::ffff:192.0.2.1"), "192.0.2.1")
        self.assertEqual(minimail.clients_address("fe80::1%eth0"), "fe80::1")
        self.assertEqual([minimail.is_loopback(host) for host in ("127.9.9.9", "::1", "::ffff:127.0.0.1", "192.0.2.1", "")],
                         [True, True, True, False, True])

    def test_with_keywords(self):
        for arguments, word in {(0, 0, 0, 0): "SMTP", (1, 0, 0, 0): "ESMTP", (1, 1, 0, 0): "ESMTPS", (1, 0, 1, 0): "ESMTPA",
                                (1, 1, 1, 0): "ESMTPSA", (1, 0, 0, 1): "UTF8SMTP", (1, 1, 1, 1): "UTF8SMTPSA"}.items():
            self.assertEqual(minimail.with_keyword(*map(bool, arguments)), word)

    def test_received(self):
        one, two = Address("bob", "x.example"), Address("eve", "x.example")
        envelope = minimail.Envelope("a@y", [one], id="i-1", helo="client.test", client="2001:db8::1", protocol="ESMTP")
        header = minimail.received_header(envelope, "mail.test", 1e9)
        self.assertRegex(header, r"\AReceived: from client.test \(\[IPv6:2001:db8::1\]\)\r\n\tby mail.test with ESMTP id i-1"
                                 r"\r\n\tfor <bob@x.example>; (Sun|Sat), 0?[89] Sep 2001 [\d:]+ [+-]\d{4}\r\n\Z")
        envelope.recipients.append(two)
        self.assertNotIn("for <", minimail.received_header(envelope, "mail.test", 1e9), "a Bcc must not be told")
        header, own = minimail.trace_headers(envelope, ["bob@x.example", "eve@x.example"], "mail.test", 1e9)
        self.assertEqual(header[:own], b"Return-Path: <a@y>\r\n")
        self.assertTrue(header[own:].startswith(b"Received: "))
        header, own = minimail.trace_headers(envelope, ["a b@x.example"], "mail.test", 1e9)
        self.assertEqual(header[:own], b'Return-Path: <a@y>\r\nDelivered-To: "a b"@x.example\r\n')
        self.assertEqual(minimail.trace_headers(envelope, [], "mail.test", 1e9)[1], 0)

    def test_split_headers(self):
        content = b"A: 1\r\nB: 2\r\n\t3\r\nnonsense\r\n\r\nbody\r\n\r\nmore"
        self.assertEqual(minimail.split_headers(content), ([("a", b"A: 1\r\n"), ("b", b"B: 2\r\n\t3\r\n"),
                                                            ("nonsense", b"nonsense\r\n")], b"body\r\n\r\nmore"))
        self.assertEqual(minimail.split_headers(content, 1), ([("a", b"A: 1\r\n")], b"body\r\n\r\nmore"))
        self.assertEqual(minimail.split_headers(b"\r\nbody"), ([], b"body"))
        self.assertEqual(minimail.split_headers(b""), ([], b""))


class FileNames(Case):
    NASTY = ["a", "A", "..", ".", ".a", "a.", "../../etc/passwd", "/", "a/b", "a\\b", "\0", "a\0b", "%", "%2E", "%2e", "%25",
             ".%2e",
             "a b", " a", "a ", "con", "con.x", "CON", "com1", "lpt9", "nul.", "aux", "prn", "conx", "~", "~root", "-rf",
             "a:b", "a;2,b",
             "\xe9", "e\u0301", "\u212a", "k", "\uff0e\uff0e", "\u2024", "\u202e", "a\n", "*", "?", "<", "|", '"', "'", "new",
             "cur",
             "tmp", "minimail.lock", "com\xb9", "%63on", "a=b", "a+b", "a_b", "a,b"]

    def check(self, texts, windows=False):
        names = {}
        for text in set(texts):
            try:
                name = minimail.encode_name(text, windows)
            except Refused as refused:
                self.assertEqual(refused.reply.code, 553)
                continue
            self.assertRegex(name, r"\A[a-z0-9_+=%A-F-][a-z0-9._+=%A-F-]*\Z")
            self.assertLessEqual(len(name), 255)
            clash = names.setdefault(name.lower(), text)    # .lower(): also where file names have no case
            self.assertEqual(clash, text, "both are called %s" % name)
            if not windows:
                self.assertEqual(minimail.decode_name(name), text)
            else:
                self.assertNotRegex(name, r"\.\Z|\A(con|prn|aux|nul|com\d|lpt\d)(\.|\Z)")
        return names

    def test_nasty_names(self):
        for windows in (False, True):
            self.assertEqual(len(self.check(self.NASTY, windows)), len(self.NASTY))

    def test_random_names(self):
        chance = random.Random(5)
        alphabet = "aA.%2eE/\\\0\xe9+-con1:"
        texts = ["".join(chance.choices(alphabet, k=chance.randint(1, 6))) for _ in range(20000)]
        for windows in (False, True):
            self.assertGreater(len(self.check(texts, windows)), 10000)

    def test_length(self):
        self.assertEqual(minimail.encode_name("a" * 255), "a" * 255)
        for text in ("", "a" * 256, "\xe9" * 43):
            self.refused("553 5.1.3", minimail.encode_name, text)

    def test_what_is_no_mailbox_name(self):
        for name in ("A", "%61", "%2e", "%2E%2E", ".a", "%FF", "%", "a%2", "a b"):
            self.assertRaises((ValueError, Refused), minimail.decode_name, name)


# ======================================================================================================================
# 4  Wire
# ======================================================================================================================

def decode_slowly(stream):
    """Return (content, rest) of a DATA stream as the RFC says it, line by line; None while its end is not there.

    A line after a bare LF is not one that the RFC knows: only a dot that was doubled is taken off it.
    """
    data = b"\r\n" + stream
    end = data.find(b"\r\n.\r\n")
    if end < 0:
        return None
    parts = re.split(rb"(\r\n|\n)", data[:end + 2])
    for i in range(2, len(parts), 2):
        if parts[i].startswith(b"." if parts[i - 1] == b"\r\n" else b".."):
            parts[i] = parts[i][1:]
    return normalize_slowly(b"".join(parts)[2:]), data[end + 5:]


def normalize_slowly(content):
    """Return content with each bare CR and LF as a CRLF."""
    result, i = b"", 0
    while i < len(content):
        if content[i:i + 2] == b"\r\n":
            i += 1
        result += b"\r\n" if content[i:i + 1] in (b"\r", b"\n") else content[i:i + 1]
        i += 1
    return result


SMUGGLING = [b"a" + end + b"MAIL FROM:<evil>\r\n" for end in
             (b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r\n.\r", b"\r.\r\n", b"\n.\r", b"\r\n.\r\r\n", b"\r\n\0.\r\n",
              b"\r\n.\0\r\n",
              b"\r\n..\r\n", b"\r\n.\r.\r\n", b"\r\r\n.", b"\n\r\n.\n", b"\r\n. \r\n")]
STREAMS = [b".\r\n", b"\r\n.\r\n", b"..\r\n.\r\n", b"...\r\n..\r\n....\r\n.\r\n", b"a\r\n.\r\nNOOP\r\n", b"\r.\r\n.\r\n",
           b"\n.\r\n.\r\n",
           b"a\rb\nc\r\n.\r\n", b"\r\r\n\n\n\r\r\r\n.\r\n", b".a\r\n.b\r\n.\r\n", b"\0\xff\x80\r\n.\r\n",
           b"x\r\n.\r\n.\r\nQUIT\r\n",
           b"\x1b$B%F%9%H\x1b(B\r\n.\r\n", b"a\n..b\n.c\n...\n..\r\n\r..\r\n.\r\n"]
STREAMS += [attempt + b"\r\n.\r\nrest" for attempt in SMUGGLING]


def feed_all(content, blocks):
    """Return (content, what came after its end) of a stream in blocks."""
    out, rest = [], b""
    for block in blocks:
        if content.finished:
            rest += block
            continue
        out.append(content.feed(block))
        if content.finished:
            rest = content.rest
    return b"".join(out), rest


class ContentAnywayCut(Case):
    """Only CRLF.CRLF ends DATA, wherever TCP cuts the stream; nothing else in the content changes."""

    def test_every_cut(self):
        for stream in STREAMS:
            expected = decode_slowly(stream)
            for i in range(len(stream) + 1):
                content = Content()
                self.assertEqual(feed_all(content, [stream[:i], stream[i:]]), expected, (stream, i))
                self.assertTrue(content.finished)
            content = Content()
            self.assertEqual(feed_all(content, [bytes([c]) for c in stream]), expected, stream)

    def test_every_pair_of_cuts_at_the_end(self):
        for stream in (b"a\r\n..b\r\n.\r\nrest", b"\r.\r\r\n..\r\n.\r\n", b"..\r\n.\r\n"):
            for i, j in itertools.combinations(range(len(stream) + 1), 2):
                self.assertEqual(feed_all(Content(), [stream[:i], stream[i:j], stream[j:]]), decode_slowly(stream),
                                 (stream, i, j))

    def test_random_streams(self):
        chance = random.Random(4)
        for _ in range(3000):
            stream = b"".join(chance.choices([b"\r\n", b".", b"\r", b"\n", b"a", b"\r\n."], k=12)) + b"\r\n.\r\nX"
            cuts = sorted(chance.choices(range(len(stream)), k=3))
            blocks = [stream[i:j] for i, j in zip([0] + cuts, cuts + [len(stream)])]
            self.assertEqual(feed_all(Content(), blocks), decode_slowly(stream), blocks)

    def test_no_end_no_content_lost(self):
        for attempt in SMUGGLING:
            content = Content()
            content.feed(attempt)
            self.assertFalse(content.finished, attempt)
            self.assertEqual(decode_slowly(attempt), None)

    def test_bdat_every_cut(self):
        for stream in STREAMS + SMUGGLING:
            for i in range(len(stream) + 1):
                content = Content(dots=False)
                self.assertEqual(content.feed(stream[:i]) + content.feed(stream[i:]) + content.end(), normalize_slowly(stream))

    def test_long_line_and_bare_ends_are_noticed(self):
        content = Content()
        long = b"x" * 100_000
        self.assertEqual(feed_all(content, [long[:40_000], long[40_000:] + b"\r\n.\r\n"]), (long + b"\r\n", b""))
        self.assertFalse(content.bare)
        for data in (b"a\nb", b"a\rb", b"\r", b"\n", b"a\r\n\n"):
            self.assertTrue(minimail.has_bare_newline(data), data)
        for data in (b"", b"a", b"a\r\nb\r\n", b"\r\n\r\n", b"\x85\x0b"):
            self.assertFalse(minimail.has_bare_newline(data), data)

    def test_stuffing(self):
        for content in [b"", b".", b"..", b"a.b", b"\r\n.", b".\r\n.\r\n..a\r\n", b"a\r\n\r\n.b"]:
            self.assertEqual(minimail.stuff_dots(content, True), stuff_slowly(content))
            self.assertEqual(minimail.stuff_dots(content, False), stuff_slowly(b"x" + content)[1:])


class Clock:
    """A clock that stands still unless told, or moves on by `step` whenever it is read."""

    def __init__(self, step=0.0):
        self.now, self.step = 1000.0, step

    def __call__(self):
        self.now += self.step
        return self.now


class RunningClock:
    """A clock that can be put ahead."""

    ahead = 0.0

    def __call__(self):
        return time.monotonic() + self.ahead


class Wires(Case):
    def pair(self, timeout=PATIENCE, clock=time.monotonic):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        theirs.settimeout(PATIENCE)
        return minimail.Wire(ours, timeout, clock), theirs

    @staticmethod
    def line(wire, limit):
        return blocking(wire, wire.line(limit))

    def test_lines(self):
        wire, peer = self.pair()
        peer.sendall(b"one\r\ntwo\n\r\n" + b"x" * 10 + b"\r\nA\rB\r\n")
        self.assertEqual([self.line(wire, 11) for _ in range(5)], [b"one", b"two", b"", b"x" * 10, b"A\rB"])

    def test_line_limit(self):
        for size in (1000, 7):
            wire, peer = self.pair()
            data = b"x" * 500 + b"\r\nshort\r\n" + b"y" * 101 + b"\r\nend\r\n"
            pieces = [data[i:i + size] for i in range(0, len(data), size)]
            sender = threading.Thread(target=lambda peer, pieces: list(map(peer.sendall, pieces)), args=(peer, pieces))
            sender.start()
            self.assertRaises(minimail.LineTooLong, self.line, wire, 100)
            self.assertEqual(self.line(wire, 100), b"short")
            self.assertRaises(minimail.LineTooLong, self.line, wire, 100)
            self.assertEqual(self.line(wire, 100), b"end")
            sender.join()

    def test_an_endless_line_is_not_kept(self):
        wire, peer = self.pair()
        sender = threading.Thread(target=lambda: (peer.sendall(b"x" * 5_000_000), peer.close()))
        sender.start()
        self.assertRaises(minimail.Disconnected, self.line, wire, 100)
        sender.join()
        self.assertLess(len(wire.input), 200)

    def test_output_waits_for_input_or_size(self):
        wire, peer = self.pair()
        peer.sendall(b"A\r\nB\r\n")
        self.line(wire, 100)
        wire.send(b"1")
        self.line(wire, 100)
        wire.send(b"2")
        self.assertEqual(select.select([peer], [], [], 0)[0], [], "nothing goes out while a command is there")
        peer.sendall(b"C\r\n")
        self.line(wire, 100)
        self.assertEqual(peer.recv(100), b"12")

    def test_deadline(self):
        wire, peer = self.pair(timeout=0.01)
        self.assertRaises(minimail.TimedOut, self.line, wire, 100)

    def test_who_drips_bytes_runs_into_the_deadline(self):
        wire, peer = self.pair(timeout=10, clock=Clock(step=1.0))
        peer.sendall(b"x")
        with mock.patch.object(minimail, "is_ready", lambda sock, events, seconds: (peer.sendall(b"x"), True)[1]):
            self.assertRaises(minimail.TimedOut, self.line, wire, 100)
        self.assertLess(len(wire.input), 20)

    def test_a_slow_message_gets_time_for_what_it_brings(self):
        clock = Clock()
        session = minimail.SMTPSession.__new__(minimail.SMTPSession)
        session.wire, peer = self.pair(timeout=10, clock=clock)
        session.site = types.SimpleNamespace(config=minimail.Config())
        content = session.receive(None, Content(), None)
        self.addCleanup(content.close)
        self.assertIs(content.send(None), minimail.READ)
        for _ in range(100):
            peer.sendall(b"x" * 2 * minimail.MIN_RATE)
            content.send(None)
            clock.now += 1.5                        # faster than MIN_RATE: it may take as long as it likes
            self.assertGreater(session.wire.deadline, clock.now)
        self.assertTrue(session.in_flight())
        for _ in range(1000):
            peer.sendall(b"x")
            content.send(None)
            clock.now += 1.5                        # drips of a byte move it by next to nothing
            if clock.now > session.wire.deadline:
                break
        self.assertGreater(clock.now, session.wire.deadline)
        self.assertLess(clock.now, 1000 + 200 + 10 + 5, "when it began, 200 s at MIN_RATE, the timeout, some drips")

    def test_send_file(self):
        content = bytes(range(256)) * 2000
        path = self.file("f", content)
        wire, peer = self.pair()
        received = []
        reader = threading.Thread(target=lambda: received.extend(iter(lambda: peer.recv(1 << 16), b"")))
        reader.start()
        fd = os.open(path, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        wire.send(b"head")
        blocking(wire, wire.send_file(fd, 5, len(content) - 5))
        wire.send(b"tail")
        blocking(wire, wire.flush())
        wire.close()
        reader.join(PATIENCE)
        self.assertEqual(b"".join(received), b"head" + content[5:] + b"tail")

    def test_the_other_side_is_gone(self):
        wire, peer = self.pair()
        peer.sendall(b"half a line")
        peer.close()
        self.assertRaises(minimail.Disconnected, self.line, wire, 100)
        wire.send(b"x" * 70000)
        with self.assertRaises(minimail.Disconnected):
            for _ in range(3):
                wire.send(b"x")
                blocking(wire, wire.flush())
        wire.close()


SELECTORS = [getattr(selectors, name) for name in ("DefaultSelector", "SelectSelector", "PollSelector") if hasattr(selectors, name)]


class Job(minimail.Task):
    """A task of a test: a coroutine, and what the loop asks a task about."""

    sock, deadline, flying = None, float("inf"), False      # in the place of the properties

    def __init__(self, coroutine, **attributes):
        self.coroutine = coroutine
        vars(self).update(attributes)

    def in_flight(self):
        return self.flying


class Loops(Case):
    def test_a_socket_that_cannot_be_watched(self):
        """Its task is told, and nobody else: not the listener that took the connection."""
        for error in (OSError(errno.ENOSPC, "no more"), ValueError("closed")):
            seen, over = [], threading.Event()
            ours, theirs = self.pair()

            class Full(selectors.DefaultSelector):
                def register(self, fileobj, events, data=None, error=error, ours=ours):
                    if fileobj is ours:
                        raise error
                    return super().register(fileobj, events, data)

            async def talk(seen=seen, over=over):
                try:
                    await minimail.wait(minimail.READ)
                except (OSError, ValueError) as error:
                    seen.append(error)
                over.set()

            async def take(ours=ours, seen=seen):
                loop.spawn(Job(talk(), sock=ours))
                await minimail.wait(minimail.TURN)
                seen.append("went on")
            loop = self.loop(selector=Full)
            loop.spawn(Job(take(), sock=theirs))
            loop.start()
            self.told(over)
            self.eventually(lambda seen=seen: len(seen) == 2)
            self.assertCountEqual(seen, [error, "went on"])

    def loop(self, commit=None, is_heavy=lambda parcel: False, **options):
        loop = minimail.Loop(commit or (lambda parcels: [None] * len(parcels)), is_heavy, **options)
        self.addCleanup(loop.stop, 0.0)
        return loop

    def pair(self):
        pair = socket.socketpair()
        for sock in pair:
            self.addCleanup(sock.close)
            sock.setblocking(False)
        return pair

    def told(self, *events):
        for event in events:
            self.assertTrue(event.wait(PATIENCE))

    def test_what_can_be_waited_for(self):
        for selector in SELECTORS:
            refused, seen, over = Refused(451, "4.3.0", "no"), [], threading.Event()
            loop = self.loop(lambda parcels, refused=refused: [refused if parcel == "bad" else None for parcel in parcels],
                             selector=selector)
            ours, theirs = self.pair()

            async def talk(seen=seen, over=over, ours=ours, theirs=theirs):
                seen.append(threading.current_thread().name)
                await minimail.wait(minimail.WRITE)
                ours.send(b"x")
                theirs.send(b"y")
                await minimail.wait(minimail.READ)
                seen.append(ours.recv(10))
                seen.append(await minimail.wait(minimail.TURN))
                seen.append(await minimail.wait(0.001))
                seen.append(await minimail.wait("good"))
                seen.append(await minimail.wait("bad"))
                seen.append(await minimail.wait(lambda: threading.current_thread().name))
                try:
                    await minimail.wait(lambda: [][0])
                except IndexError:
                    seen.append("its error")
                over.set()
            job = Job(talk(), sock=ours)
            ours.send(b"")
            loop.spawn(job)
            loop.start()
            self.told(over)
            self.assertEqual(seen[1:], [b"y", None, None, None, refused, "minimail-helper", "its error"], selector)
            self.eventually(lambda loop=loop: not (loop.tasks or loop.talking))

    def test_others_have_their_turn(self):
        loop, order, over = self.loop(), [], threading.Event()

        async def count(name):
            for _ in range(3):
                order.append(name)
                await minimail.wait(minimail.TURN)
            if name == "c":
                over.set()
        for name in "abc":
            loop.spawn(Job(count(name)))
        loop.start()
        self.told(over)
        self.assertEqual("".join(order), "abcabcabc")

    def test_all_who_are_ready_are_heard_before_one_is_answered(self):
        """... and all are answered before anything else is done, as a commit."""
        order, over = [], threading.Event()
        loop = self.loop(lambda parcels: order.append("committed") or [None] * len(parcels))

        async def talk(wire, name):
            order.append(name + " heard " + (await wire.line(100)).decode())
            wire.send(b"hello\r\n")
            if name == "a":                         # its answer waits for the disk
                await minimail.wait("parcel")
            with contextlib.suppress(minimail.Disconnected):
                await wire.line(100)
            over.set()

        class Told(socket.socket):
            def send(self, data):
                order.append("answered")
                return super().send(data)
        for name in "abc":
            ours, theirs = self.pair()
            theirs.send(name.encode() + b"\r\n")
            if name != "a":
                theirs.shutdown(socket.SHUT_WR)
            wire = minimail.Wire(Told(fileno=os.dup(ours.fileno())), 1e6)
            self.addCleanup(wire.close)
            loop.spawn(Job(talk(wire, name), sock=ours))
        loop.start()
        self.told(over)
        self.eventually(lambda: len(order) == 7)
        self.assertEqual(order, ["a heard a", "b heard b", "c heard c", "answered", "answered", "committed", "answered"])

    def test_who_waits_longer_goes_on_later(self):
        clock, order, over = RunningClock(), [], threading.Event()
        loop = self.loop(clock=clock)

        async def pause(name, seconds):
            await minimail.wait(seconds)
            order.append(name)
            clock.ahead += 1000
            if len(order) == 2:
                over.set()
        loop.spawn(Job(pause("long", 1000.0)))
        loop.spawn(Job(pause("short", 0.001)))
        loop.start()
        self.told(over)
        self.assertEqual(order, ["short", "long"])

    def test_deadlines(self):
        """... hold for what the other side makes us wait for, not for what we do ourselves."""
        clock, ends, may_go_on = RunningClock(), collections.Counter(), threading.Event()
        loop = self.loop(clock=clock)

        async def hold(what, name):
            try:
                await minimail.wait(what)
                ends[name] += 1
            except minimail.TimedOut:
                ends[name + " timed out"] += 1
        full = self.pair()
        with contextlib.suppress(BlockingIOError):
            while True:
                full[0].send(b"x" * 65536)
        loop.spawn(Job(hold(minimail.READ, "read"), sock=self.pair()[0], deadline=clock() + 1000))
        loop.spawn(Job(hold(minimail.WRITE, "write"), sock=full[0], deadline=clock() + 1000))
        loop.spawn(Job(hold(5000.0, "pause"), deadline=clock() + 1000))
        loop.spawn(Job(hold(minimail.READ, "patient"), sock=self.pair()[0]))
        loop.spawn(Job(hold(lambda: may_go_on.wait(PATIENCE), "work"), deadline=clock() + 1000))
        loop.start()
        clock.ahead += 1001
        self.eventually(lambda: len(ends) == 3)
        may_go_on.set()
        self.eventually(lambda: len(ends) == 4)
        self.assertEqual(set(ends), {"read timed out", "write timed out", "pause timed out", "work"})

    def test_messages_that_come_together_are_committed_together(self):
        batches, told = [], []
        loop = self.loop(lambda parcels: batches.append(list(parcels)) or [None] * len(parcels))

        async def send(number):
            await minimail.wait(number)
            told.append(number)
        for number in "abcde":
            loop.spawn(Job(send(number)))
        with mock.patch.object(minimail.Loop, "BATCH", 3):
            loop.start()
            self.eventually(lambda: len(told) == 5)
        self.assertEqual(batches, [["a", "b", "c"], ["d", "e"]])
        self.assertEqual(told, list("abcde"))

    def test_who_talks_without_end_does_not_keep_messages_waiting(self):
        for selector in SELECTORS:
            loop, told = self.loop(selector=selector), threading.Event()
            ours, theirs = self.pair()
            theirs.send(b"x")

            async def talk(told=told):
                while not told.is_set():
                    await minimail.wait(minimail.READ)      # what is there is never read: it is ready every time

            async def send(told=told):
                await minimail.wait("parcel")
                told.set()
            loop.spawn(Job(talk(), sock=ours))
            loop.spawn(Job(send()))
            loop.start()
            self.told(told)

    def test_who_talks_while_the_disk_is_slow_is_heard(self):
        heard, committed = threading.Event(), threading.Event()
        loop = self.loop(lambda parcels: [None if heard.wait(PATIENCE) else "never heard"], lambda parcel: True)
        ours, theirs = self.pair()

        async def send():
            if await minimail.wait("heavy") is None:
                committed.set()

        async def listen():
            await minimail.wait(minimail.READ)
            heard.set()
        loop.spawn(Job(send()))
        loop.spawn(Job(listen(), sock=ours))
        loop.start()
        theirs.send(b"x")
        self.told(committed)

    def test_after_a_slow_batch_others_do_not_wait_for_the_next(self):
        threads, told = [], threading.Event()
        loop = self.loop(lambda parcels: threads.append(threading.current_thread().name) or [None])

        async def send():
            for _ in range(3):
                await minimail.wait("light")
            told.set()
        with mock.patch.object(minimail.Loop, "SLOW", -1.0):
            loop.spawn(Job(send()))
            loop.start()
            self.told(told)
        self.assertEqual(threads, ["minimail-loop", "minimail-helper", "minimail-helper"])

    def test_what_comes_while_it_commits_is_committed_next(self):
        batches, told, first, may_go_on = [], [], threading.Event(), threading.Event()

        def commit(parcels):
            batches.append(list(parcels))
            first.set()
            self.assertTrue(may_go_on.wait(PATIENCE))
            return [None] * len(parcels)
        loop = self.loop(commit, lambda parcel: True, clock=Clock())     # which stands still: no batch is stuck
        ours, theirs = self.pair()

        async def send(name, *before):
            for what in before:
                await minimail.wait(what)
            await minimail.wait(name)
            told.append(name)
        loop.spawn(Job(send("one")))
        loop.spawn(Job(send("two", minimail.READ), sock=ours))
        loop.start()
        self.told(first)
        theirs.send(b"x")
        self.eventually(lambda: loop._parcels)
        self.assertEqual((batches, told), ([["one"]], []))
        may_go_on.set()
        self.eventually(lambda: told == ["one", "two"])
        self.assertEqual(batches, [["one"], ["two"]])

    def test_a_batch_that_is_stuck_does_not_hold_up_the_next(self):
        """As when a network file system holds up one flush for minutes; when many are, the rest waits."""
        told, begun, may_go_on = [], [], threading.Event()

        def commit(parcels):
            begun.append(list(parcels))
            if "stuck" in parcels:
                self.assertTrue(may_go_on.wait(PATIENCE))
            return [None] * len(parcels)
        loop = self.loop(commit, lambda parcel: parcel == "stuck")
        pairs = [self.pair() for _ in range(4)]

        async def send(name):
            await minimail.wait(minimail.READ)
            await minimail.wait(name)
            told.append(name)
        for name, (ours, _) in zip(("stuck", "light", "stuck", "last"), pairs):
            loop.spawn(Job(send(name), sock=ours))
        with mock.patch.object(minimail.Loop, "STUCK", 0.0), mock.patch.object(minimail.Loop, "MOST_STUCK", 2):
            loop.start()
            for count, (_, theirs) in enumerate(pairs[:3], 1):
                theirs.send(b"x")
                self.eventually(lambda count=count: len(begun) == count)
            self.eventually(lambda: told == ["light"])
            pairs[3][1].send(b"x")
            self.eventually(lambda: loop._parcels)
            self.assertEqual((begun, told), ([["stuck"], ["light"], ["stuck"]], ["light"]))
            may_go_on.set()
            self.eventually(lambda: len(told) == 4)

    def test_a_failure_nobody_thought_of_is_told_to_all(self):
        def commit(parcels):
            raise RuntimeError("nobody thought of this")
        loop, told = self.loop(commit), []

        async def send():
            told.append(await minimail.wait("parcel"))
        for _ in range(2):
            loop.spawn(Job(send()))
        with self.assertLogs("minimail", "ERROR"):
            loop.start()
            self.eventually(lambda: len(told) == 2)
        self.assertEqual([type(error) for error in told], [RuntimeError] * 2)

    def test_a_task_that_fails_ends_alone(self):
        loop, over = self.loop(), threading.Event()

        async def fail():
            await minimail.wait(minimail.TURN)
            raise ZeroDivisionError

        async def go_on():
            await minimail.wait(0.001)
            over.set()
        loop.spawn(Job(fail()))
        loop.spawn(Job(go_on()))
        with self.assertLogs("minimail", "ERROR"):
            loop.start()
            self.told(over)

    def test_without_more_threads_the_loop_waits_for_the_disk_itself(self):
        threads, errors, over = [], [], threading.Event()
        loop = self.loop(lambda parcels: threads.append(threading.current_thread().name) or [None], lambda parcel: True)

        async def send():
            await minimail.wait("heavy")
            try:
                await minimail.wait(lambda: "done")
            except RuntimeError as error:
                errors.append(error)
            over.set()
        loop.spawn(Job(send()))
        with mock.patch.object(minimail.Crew, "do", side_effect=RuntimeError("can't start new thread")):
            loop.start()
            self.told(over)
        self.assertEqual((threads, len(errors)), (["minimail-loop"], 1))

    def test_what_nobody_wants_any_more_is_not_done(self):
        loop, done, over = self.loop(), [], threading.Event()
        crew = minimail.Crew(1)
        self.addCleanup(crew.close)

        async def ask():
            for wanted in (True, False):
                try:
                    await minimail.wait(minimail.Work(lambda: done.append(1), crew, lambda wanted=wanted: wanted))
                except minimail.Disconnected:
                    over.set()
        loop.spawn(Job(ask()))
        loop.start()
        self.told(over)
        self.assertEqual(done, [1])

    def test_the_end(self):
        """Each task ends when it is not in flight; who does not listen is ended after the grace."""
        clock, ends = RunningClock(), []
        loop = self.loop(clock=clock)

        async def talk(name, what=minimail.READ, stubborn=False):
            try:
                while True:
                    try:
                        await minimail.wait(what)
                    except minimail.TimedOut:
                        ends.append(name)
                        if not stubborn:
                            return
            except minimail.Disconnected:
                ends.append(name + " at last")
        flying = Job(talk("flying"), sock=self.pair()[0], flying=True)
        jobs = [Job(talk("idle"), sock=self.pair()[0]), Job(talk("pausing", 1000.0)), flying,
                Job(talk("late"), sock=self.pair()[0], flying=True)]
        for job in jobs:
            loop.spawn(job)
        loop.start()
        stopped = self.in_background(loop.stop, 1000.0)
        self.eventually(lambda: len(ends) >= 2)
        flying.flying = False
        self.eventually(lambda: len(ends) >= 3)
        clock.ahead += 1001                         # the grace is over
        stopped()
        self.assertEqual(sorted(ends[:2]) + ends[2:], ["idle", "pausing", "flying", "late"])
        self.assertFalse(loop.tasks)
        loop = self.loop()
        loop.spawn(Job(talk("stubborn", stubborn=True), sock=self.pair()[0]))
        loop.start()
        with mock.patch.object(minimail.Loop, "TICK", 0.01):
            loop.stop(0.0)
        self.assertEqual(ends[-1], "stubborn at last")
        self.assertFalse([thread for thread in our_threads() if thread.name == "minimail-loop"])


class Crews(Case):
    def crew(self, size):
        crew = minimail.Crew(size, "minimail-test")
        self.addCleanup(self.eventually, lambda: not self.threads())    # or the next test would count them
        self.addCleanup(crew.close)
        return crew

    @staticmethod
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "minimail-test"]

    def test_so_many_at_a_time(self):
        crew, running, most, done, lock = self.crew(3), [], [], [], threading.Lock()
        release = threading.Event()

        def job():
            with lock:
                running.append(1)
                most.append(len(running))
            release.wait(PATIENCE)
            with lock:
                running.pop()
                done.append(1)
        for _ in range(10):
            crew.do(job)
        self.eventually(lambda: len(running) == 3)
        self.assertEqual(len(self.threads()), 3)
        release.set()
        self.eventually(lambda: len(done) == 10)
        self.assertEqual(max(most), 3)

    def test_one_that_stumbles_goes_on(self):
        crew, done = self.crew(1), threading.Event()
        with self.assertLogs("minimail", "ERROR"):
            crew.do(lambda: [][0])
            crew.do(done.set)
            self.assertTrue(done.wait(PATIENCE))

    def test_who_has_nothing_to_do_ends(self):
        crew, done = self.crew(2), []
        with mock.patch.object(minimail.Crew, "IDLE", 0.01):
            for _ in range(4):
                crew.do(lambda: done.append(1))
            self.eventually(lambda: len(done) == 4 and not self.threads())
            crew.do(lambda: done.append(1))
            self.eventually(lambda: len(done) == 5 and not self.threads())

    def test_without_threads(self):
        crew, done, release = self.crew(2), threading.Event(), threading.Event()
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            self.assertRaises(RuntimeError, crew.do, self.fail)
        crew.do(lambda: release.wait(PATIENCE))     # what was refused is not done later
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            crew.do(done.set)                       # one thread is there: it will
        release.set()
        self.assertTrue(done.wait(PATIENCE))

    def test_the_end(self):
        crew, begun, release = self.crew(1), threading.Event(), threading.Event()
        crew.do(lambda: begun.set() or release.wait(PATIENCE))
        crew.do(self.fail)
        self.assertTrue(begun.wait(PATIENCE))
        crew.close()
        release.set()
        self.eventually(lambda: not self.threads())


class Readiness(Case):
    """The wire of section 4 with TLS, and what goes out in blocks."""

    @unittest.skipUnless(ssl, "this Python has no ssl")
    def test_tls_from_both_sides(self):
        pem = self.file("cert.pem", CERTIFICATE)
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(pem)
        client = ssl.create_default_context(cafile=pem)
        ours, theirs = (minimail.Wire(sock, PATIENCE) for sock in socket.socketpair())
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        big = b"z" * 3_000_000

        async def serve():
            self.assertEqual(await ours.line(100), b"STARTTLS")
            ours.send(b"go\r\n")
            await ours.start_tls(server, server_side=True)
            self.assertEqual(ours.input, b"", "what came before the handshake is thrown away")
            ours.send(b"")
            await ours.flush()
            ours.send(big + b"\r\n")
            return await ours.line(100)
        theirs.send(b"STARTTLS\r\nevil\r\n")

        async def ask():
            self.assertEqual(await theirs.line(100), b"go")
            await theirs.start_tls(client, server_hostname="mail.test")
            size = 0
            while size < len(big) + 2:
                size += len(await theirs.take(minimail.BLOCK))
            theirs.send(b"thanks\r\n")
            await theirs.flush()
            return theirs.sock.getpeercert()["subject"]
        served = self.in_background(lambda: blocking(ours, serve()))
        self.assertIn((("commonName", "mail.test"),), blocking(theirs, ask()))
        self.assertEqual(served(), b"thanks")

    @unittest.skipUnless(ssl, "this Python has no ssl")
    def test_a_handshake_that_fails_says_why(self):
        sock, peer = socket.socketpair()
        self.addCleanup(peer.close)
        wire = minimail.Wire(sock, PATIENCE)
        self.addCleanup(wire.close)
        peer.sendall(b"this is not TLS at all\r\n" * 10)
        with self.assertRaisesRegex(minimail.Disconnected, "^TLS: ."):
            blocking(wire, wire.start_tls(ssl.create_default_context(), server_hostname="x"))

    def test_who_does_not_read_is_waited_for(self):
        sock, peer = socket.socketpair()
        self.addCleanup(peer.close)
        wire = minimail.Wire(sock, PATIENCE)
        self.addCleanup(wire.close)
        with contextlib.suppress(BlockingIOError):
            while True:
                sent = sock.send(b"x" * 65536)
        wire.send(b"last")
        flush = wire.flush()
        self.assertIs(flush.send(None), minimail.SPEAK)
        self.assertIs(flush.send(None), minimail.WRITE, sent)     # not READ, for which it would wait in vain
        reader = self.in_background(lambda: b"".join(iter(lambda: peer.recv(1 << 16), b"")))
        minimail.is_ready(sock, minimail.WRITE, PATIENCE)
        with contextlib.suppress(StopIteration):
            while True:
                flush.send(None)
                minimail.is_ready(sock, minimail.WRITE, PATIENCE)
        wire.close()
        self.assertTrue(reader().endswith(b"last"))


FOREIGN = [b"", b"\n", b"\r", b"\r\n", b".", b".\n", b"a", b"a\r", b"a\n.b\r\n..\n\r\n.", b"\r\r\n", b"\r\r\r", b"\r\r\r\n.\r", b"\n\n\n",
           b"A: b\n\n.c\n\nd", b"A: b\r\n\r\n.c\r\n..\r\n\r\nx", b"A: b\r\r\n\r\n", b"\n.body\n", b"A: b\n", b"A: b\n\n", b"\r\n\r\nx\n.\ny\n"]


def lines_slowly(content):
    """Return content with CRLF line ends, a bare CR let alone."""
    return end_line(re.sub(rb"(?<!\r)\n", b"\r\n", content))


def top_slowly(content, count):
    """Return a message's header and so many lines of its body (RFC 1939 section 7)."""
    end = (b"\r\n" + content).find(b"\r\n\r\n")
    if end < 0:
        return content
    lines = content[end + 2:].split(b"\r\n")
    body = [line + b"\r\n" for line in lines[:-1]] + lines[-1:]
    return content[:end + 2] + b"".join(body[:count])


class OutgoingAnywayCut(Case):
    """What RETR and TOP send does not depend on where the blocks of a file are cut."""

    @staticmethod
    def send(blocks, count=None):
        """Return what goes over the wire for a message in blocks, as send_converted() makes it."""
        text, top, out = minimail.Stuffed(), None if count is None else minimail.Top(count), []
        for block in list(blocks) + [b""]:
            if top and top.is_done:
                break
            data = text.lines(block) if block else text.last_end()
            out.append(text.stuff(top.cut(data) if top else data))
        return b"".join(out)

    @staticmethod
    def cuts(content):
        for i in range(len(content) + 1):
            for j in range(i, len(content) + 1):
                yield [block for block in (content[:i], content[i:j], content[j:]) if block]
        yield [bytes([c]) for c in content]

    def test_every_pair_of_cuts(self):
        for content in FOREIGN:
            expected = lines_slowly(content)
            for blocks in self.cuts(content):
                self.assertEqual(self.send(blocks), stuff_slowly(expected), blocks)
                for count in range(4):
                    self.assertEqual(self.send(blocks, count), stuff_slowly(top_slowly(expected, count)), (blocks, count))

    def test_random_content(self):
        chance = random.Random(7)
        for _ in range(1500):
            content = b"".join(chance.choices([b"\r\n", b".", b"\r", b"\n", b"a", b"\n\n", b"\r\n\r\n"], k=12))
            cuts = sorted(chance.choices(range(len(content)), k=3))
            blocks = [block for block in (content[i:j] for i, j in zip([0] + cuts, cuts + [len(content)])) if block]
            expected, count = lines_slowly(content), chance.randint(0, 6)
            self.assertEqual(self.send(blocks), stuff_slowly(expected), blocks)
            self.assertEqual(self.send(blocks, count), stuff_slowly(top_slowly(expected, count)), (blocks, count))
            self.assertEqual(self.send(blocks, 10**9), stuff_slowly(expected), "TOP of everything is RETR")

    def test_where_a_line_ends(self):
        head, data = b"A: b\r\n\r\n", b"".join(b"x" * n + b"\n" for n in range(300))
        for count in (0, 1, 2, 150, 299, 300):
            self.assertEqual(minimail.Top(count).cut(head + data), head + data[:sum(range(1, count + 1))])


# ======================================================================================================================
# 5  Durable files
# ======================================================================================================================

class DurableFiles(Case):
    def storage(self, root=None, sync=True):
        storage = minimail.Storage(root or self.directory(), sync)
        storage.open()
        return storage

    def test_a_write_happens_whole_or_not_at_all(self):
        storage = self.storage()
        path = os.path.join(storage.root, "f")
        storage.write(path, b"old")
        for n in itertools.count(1):
            with Faulty(n, errno.EIO) as faulty:
                try:
                    storage.write(path, b"new" * 100)
                except OSError as error:
                    self.assertEqual(error.errno, errno.EIO)
            with open(path, "rb") as file:
                content = file.read()
            self.assertIn(content, (b"old", b"new" * 100))
            self.assertEqual([name for name in os.listdir(storage.root) if name != "run"], ["f"], faulty.failed)
            if not faulty.failed:
                break
            storage.write(path, b"old")
        self.assertGreater(n, 4)
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)

    def test_order_of_a_durable_write(self):
        calls = []
        storage = self.storage()

        def note(name, function):
            return lambda *a, **k: (calls.append(name), function(*a, **k))[1]
        with contextlib.ExitStack() as stack:
            for name in ("write", "fsync", "replace"):
                stack.enter_context(mock.patch.object(os, name, note(name, getattr(os, name))))
            storage.write(os.path.join(storage.root, "f"), b"x")
        self.assertEqual(calls, ["write", "fsync", "replace", "fsync"])

    def test_flushes_are_shared_and_errors_told_apart(self):
        storage = self.storage()
        path = self.file("f", b"x")
        fd = os.open(path, os.O_RDWR)
        self.addCleanup(os.close, fd)
        with mock.patch.object(os, "fsync", wraps=os.fsync) as fsync:
            self.assertEqual(storage.flush([fd, storage.root, fd, storage.root]), {})
        self.assertEqual(fsync.call_count, 2)
        self.assertEqual(set(storage.flush([fd, storage.root + "/no"])), {storage.root + "/no"})
        with mock.patch.object(os, "fsync") as fsync:
            self.storage(sync=False).flush([fd, storage.root])
        fsync.assert_not_called()

    def test_locks(self):
        path = self.file("lock", b"")
        first, second = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
        self.addCleanup(os.close, second)
        self.assertTrue(minimail.lock_file(first))
        self.assertFalse(minimail.lock_file(second))
        os.close(first)
        self.assertTrue(minimail.lock_file(second))

    def test_whose_writer_is_dead(self):
        root = self.directory()
        here, other = self.storage(root), self.storage(root)
        path = os.path.join(root, "draft")
        fd = other.create(path)
        here.remove_abandoned(path)
        self.assertTrue(os.path.exists(path), "its writer is at it")
        self.assertRaises(FileExistsError, here.create, path)
        os.close(fd)                                # as when it is killed: the lock ends with its process
        here.remove_abandoned(path)
        self.assertFalse(os.path.exists(path))
        here.remove_abandoned(path)                 # what is not there
        os.symlink(self.file("target", b""), path)
        here.remove_abandoned(path)
        self.assertTrue(os.path.islink(path), "what we never make is let alone")
        self.assertEqual(len({here.new_id(1e9) for _ in range(1000)} | {other.new_id(1e9)}), 1001)

    def test_a_draft_that_is_swept_before_it_is_locked_is_made_again(self):
        storage, real = self.storage(), minimail.lock_file
        path = os.path.join(storage.root, "draft")
        swept = []

        def sweep():
            storage.remove_abandoned(path)

        def half_swept():                           # the other one has the lock, and removes the file only then
            other = os.open(path, os.O_RDWR)
            real(other)
            self.in_background(lambda: (os.unlink(path), os.close(other)))
        for way in (sweep, half_swept):
            def lock(fd, wait=False, way=way):
                if way not in swept:
                    swept.append(way)
                    way()
                return real(fd, wait)
            with mock.patch.object(minimail, "lock_file", lock):
                fd = storage.create(path)
            self.assertTrue(minimail.is_same_file(fd, path), way)
            storage.remove_abandoned(path)
            self.assertTrue(os.path.exists(path), way)
            os.close(fd)
            os.unlink(path)

    @unittest.skipUnless(minimail.fcntl, "other locks here")
    def test_what_was_half_written_is_swept_at_the_next_start(self):
        """Files beside the mail (accounts, keys, policies): what was killed leaves nothing, who still writes is not disturbed."""
        storage = self.storage()
        living = storage.create(os.path.join(storage.root, "users.0123456789.tmp"))
        kept = ["users.0123456789.tmp", "users.tmp", "aliases.new.tmp", "options.json", "0123456789.tmp"]
        for name in ("users.0123456788.tmp", "run/01234567.try", *kept[1:]):
            open(os.path.join(storage.root, name), "w").close()
        storage.open()
        self.assertEqual((sorted(os.listdir(storage.root)), os.listdir(storage.run)), (sorted(kept + ["run"]), []))
        os.close(living)

    @unittest.skipUnless(minimail.fcntl, "other locks here")
    def test_without_locks_mail_is_taken_and_nothing_swept(self):
        storage = self.storage()
        paths = [os.path.join(storage.root, name) for name in "ab"]
        with mock.patch.object(minimail.fcntl, "flock", side_effect=OSError(errno.ENOLCK, "no locks")), \
                self.assertLogs("minimail") as logs:
            for path in paths:
                os.close(storage.create(path))
                storage.remove_abandoned(path)
        self.assertEqual(len(logs.records), 1, "said once")
        self.assertTrue(all(map(os.path.exists, paths)))

    @unittest.skipUnless(minimail.fcntl, "other locks here")
    def test_a_lock_that_fails_is_not_one_that_cannot_be(self):
        """The file system is going away, and others may have the lock: nothing is written, nothing taken for ours."""
        storage, before = self.storage(), open_files()
        path = os.path.join(storage.root, "draft")
        with open(path, "w") as file:
            for number in errno.ECONNABORTED, errno.ENOTCONN, errno.EIO:
                with mock.patch.object(minimail.fcntl, "flock", side_effect=OSError(number, "gone")):
                    self.assertRaises(OSError, storage.create, path + ".tmp")
                    self.assertRaises(OSError, storage.lock, file.fileno())
        self.assertEqual(storage._complained, set())
        self.assertNotIn("draft.tmp", os.listdir(storage.root))
        self.assertNoMoreOpen(before)

    def test_stamps(self):
        root = os.path.join(self.directory(), "long" * 20, "path" * 20)
        here, other = self.storage(root), self.storage(root)
        self.assertEqual(here.stamp("mail"), 0)
        seen = {0}
        for storage in (here, other, here):
            storage.wake("mail")
            self.assertNotIn(here.stamp("mail"), seen)
            self.assertEqual(here.stamp("mail"), other.stamp("mail"))
            seen.add(here.stamp("mail"))
        self.assertEqual(here.stamp("queue"), 0, "who waits for one thing is not told of others")
        shutil.rmtree(root)
        here.wake("mail")                           # somebody removed all of it underneath us
        self.assertTrue(other.stamp("mail"))
        with mock.patch.object(os, "utime", side_effect=OSError(errno.EMFILE, "too many open files")), \
                mock.patch.object(os, "open", side_effect=OSError(errno.EMFILE, "too many open files")):
            here.wake("mail")                       # a hint after the fact: what it follows is done all the same

    def test_stamps_where_times_are_whole_seconds(self):
        """Two wakes within one second differ, on FAT even within two."""
        storage, now = self.storage(), 1_800_000_000_123_456_789
        with mock.patch.object(minimail.time, "time_ns", lambda: now):
            stamps = []
            for _ in range(6):
                storage.wake("mail")
                stamps.append(storage.stamp("mail"))
        stamps = stamps[1:]                         # the first one has made the file
        self.assertEqual(len({stamp // (2 * 10**9) for stamp in stamps}), 5)
        self.assertLessEqual(max(stamps), now)
        self.assertGreater(min(stamps), now - 400 * 86400 * 10**9)

    def test_a_mount_that_is_gone(self):
        """Nothing is written to the disk beneath; it is said in one line that it is gone, and in one that it is back."""
        for name in ("", "data"):                   # the mount point itself, or a directory in it
            above = self.directory()
            root = os.path.join(above, name).rstrip("/")
            with self.assertLogs("minimail") as logs:
                storage = self.storage(root)
                os.rmdir(storage.run)
                storage._beneath = os.stat(root).st_dev     # as it is where the disk beneath shows
                if root != above:
                    os.rmdir(root)
                for _ in range(3):
                    self.assertTrue(storage.is_away())
                    with self.assertRaises(OSError) as caught:
                        storage.make_directory(os.path.join(root, "mail", "example.com"))
                    self.assertEqual(caught.exception.errno, errno.ENODEV)
                    storage.wake("mail")
                    self.assertEqual(storage.stamp("mail"), 0)
                with self.assertRaises(OSError):
                    minimail.Mailboxes(storage, "node.test").lock("bob@example.com")    # no empty mailbox
                self.assertRaises(OSError, list, minimail.Mailboxes(storage, "node.test").names())
                self.assertEqual(os.listdir(above), [])
                storage._beneath = 0                # another device: it is mounted again
                self.assertFalse(storage.is_away())
                storage.make_directory(os.path.join(root, "mail", "example.com"))
            lines = [record.getMessage() for record in logs.records]
            self.assertEqual(len(lines), 2, lines)
            self.assertIn("is out of reach: its file system is not mounted", lines[0])
            self.assertIn("is back after", lines[1])

    @unittest.skipUnless(os.path.ismount("/proc"), "needs a mount to look at")
    def test_the_device_beneath_a_mount(self):
        self.assertEqual(minimail.device_beneath("/proc/self"), os.stat("/").st_dev)
        self.assertIsNone(minimail.device_beneath("/"))

    def test_a_file_system_that_fails_or_does_not_answer(self):
        storage = self.storage()
        storage.wake("queue")
        with self.assertLogs("minimail") as logs:
            storage.watch()
            storage.watch()
            with mock.patch.object(os, "stat", side_effect=OSError(errno.ENOTCONN, "not connected")):
                for _ in range(3):
                    self.assertEqual(storage.stamp("queue"), 0)
                    self.assertTrue(storage.away)
            self.assertTrue(storage.stamp("queue"))
            self.assertFalse(storage.away)
            answer, real = threading.Event(), os.stat
            with mock.patch.object(storage, "SILENCE", 0.01), \
                    mock.patch.object(os, "stat", lambda path: answer.wait(PATIENCE) and real(path)):
                asking = self.in_background(lambda: storage.stamp("queue"))
                self.eventually(lambda: storage.watch() or storage.away)
                storage.watch()
                answer.set()
                self.eventually(lambda: not storage.away)
                del asking
        texts = [record.getMessage().partition(" is ")[2].partition(" after")[0].partition(";")[0] for record in logs.records]
        self.assertEqual(texts, ["out of reach: not connected", "back", "out of reach: it does not answer", "back"])

    @unittest.skipUnless(hasattr(os, "statvfs"), "there is no such call")
    @mock.patch.object(time, "monotonic", Clock())  # which stands still: the nine questions come within one second
    def test_a_client_that_answers_for_servers_it_does_not_reach(self):
        """As that of CephFS does: what only the servers know is asked for once a second; that some do not know it is no fault."""
        storage = self.storage()
        storage.wake("mail")
        with mock.patch.object(os, "statvfs") as asked:
            for _ in range(9):
                storage.stamp("mail")
            self.assertEqual(asked.call_count, 1)
        for error, away in ((errno.ENOTCONN, True), (errno.ENOSYS, False)):
            with mock.patch.object(os, "statvfs", side_effect=OSError(error, "no")), mock.patch.object(storage, "REACH", 0.0), \
                    self.assertLogs("minimail") if away else contextlib.nullcontext():
                self.assertEqual((storage.stamp("mail") == 0, storage.away > 0), (away, away))
                self.assertEqual(storage.is_away(), away)
            with self.assertLogs("minimail") if away else contextlib.nullcontext():
                self.assertTrue(storage.stamp("mail"))
                self.assertFalse(storage.away)

    @mock.patch.object(minimail.Reloaded, "PAUSE", 0.0)
    def test_reloaded(self):
        path = self.file("f", "# comment\none\n\ntwo\n  more of two\n")
        reloaded = minimail.Reloaded(path, lambda lines, complain: lines)
        self.assertEqual(reloaded.get(), [(2, "one"), (4, "two more of two")])
        with open(path, "a") as file:
            file.write("three")
        self.assertEqual(reloaded.get()[-1], (6, "three"))
        os.utime(path, (1, 1))
        with mock.patch.object(builtins, "open", side_effect=OSError(errno.EIO, "broken")), self.assertLogs("minimail"):
            self.assertEqual(reloaded.get()[-1], (6, "three"), "what was read last holds while the file cannot be read")
        os.unlink(path)
        with self.assertLogs("minimail") as logs:
            self.assertEqual([reloaded.get(), reloaded.get()], [[], []])
        self.assertEqual(len(logs.records), 1, "it is said once that it is gone")

    def test_who_asked_whether_it_is_stale_gets_it_loaded(self):
        """The loop asks, a helper loads: whoever comes next gets what is in the file now."""
        path = self.file("f", "one\n")
        reloaded = minimail.Reloaded(path, lambda lines, complain: [text for _, text in lines])
        with mock.patch.object(minimail.Watched, "PAUSE", 1000.0):
            reloaded.get()
            self.assertFalse(reloaded.is_stale())
        with mock.patch.object(minimail.Watched, "PAUSE", 0.0):
            with open(path, "a") as file:
                file.write("two\n")
            self.assertTrue(reloaded.is_stale())
        with mock.patch.object(minimail.Watched, "PAUSE", 1000.0):
            reloaded._checked -= 2000.0
            self.assertTrue(reloaded.is_stale())
            self.assertTrue(reloaded.is_stale(), "until it is loaded")
            self.assertEqual(reloaded.get(), ["one", "two"])
            self.assertFalse(reloaded.is_stale())

    def test_who_comes_while_somebody_loads_waits_for_that(self):
        loading, may_go_on, loads = threading.Event(), threading.Event(), []

        def load():
            loads.append(1)
            loading.set()
            self.assertTrue(may_go_on.wait(PATIENCE))
            return len(loads)
        watched = minimail.Watched([self.file("f", b"x")], load)
        first = self.in_background(watched.get)
        self.assertTrue(loading.wait(PATIENCE))
        others = [self.in_background(watched.get) for _ in range(5)]
        may_go_on.set()
        self.assertEqual([result() for result in [first] + others], [1] * 6)

    @mock.patch.object(minimail.Watched, "PAUSE", 0.0)
    def test_what_cannot_be_loaded(self):
        path = self.file("f", b"x")
        outcomes = [OSError("first"), "good", ValueError("bad"), ValueError("bad"), "better"]

        def load():
            outcome = outcomes.pop(0)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        watched = minimail.Watched([path, ""], load)
        self.assertRaises(OSError, watched.get)     # better "later" than "no such user"
        self.assertEqual(watched.get(), "good")
        os.utime(path, (1, 1))
        with self.assertLogs("minimail") as logs:
            self.assertEqual([watched.get(), watched.get()], ["good", "good"], "the last good one serves on")
        self.assertEqual(len(logs.records), 1, "said once")
        self.assertEqual(watched.get(), "better")
        self.assertEqual(outcomes, [])

    def test_a_file_of_20_000_users_is_read_once(self):
        path = self.file("users", "".join("user%d@example.org:$pbkdf2$1$YQ==$YQ==\n" % i for i in range(20_000)))
        accounts = minimail.Accounts(path)
        with mock.patch.object(minimail.Reloaded, "lines", autospec=True, side_effect=minimail.Reloaded.lines) as lines:
            results = [self.in_background(accounts.names) for _ in range(8)]
            self.assertEqual({len(result()) for result in results}, {20_000})
        self.assertEqual(lines.call_count, 1)

    def test_directories_are_private(self):
        storage = self.storage(os.path.join(self.directory(), "data"))
        storage.make_directory(os.path.join(storage.root, "a", "b"))
        for path in ("", "run", "a", "a/b"):
            self.assertEqual(stat.S_IMODE(os.stat(os.path.join(storage.root, path)).st_mode), 0o700, path)


# ======================================================================================================================
# 6  Mailboxes and accounts
# ======================================================================================================================

class Maildirs(Case):
    def setUp(self):
        self.data = self.stores()
        self.boxes = self.data.mailboxes
        self.box = "bob@example.com"
        self.path = self.boxes.path(self.box)

    def put(self, content=b"Subject: x\r\n\r\nbody\r\n", *recipients):
        """Deliver a message; return its id."""
        addresses = [minimail.parse_address(recipient) for recipient in recipients or [self.box]]
        return self.data.door.send(minimail.Envelope("a@example.net"), addresses, content).draft.id

    def put_foreign(self, name, content, place="new"):
        os.makedirs(os.path.join(self.path, place), exist_ok=True)
        with open(os.path.join(self.path, place, name), "wb") as file:
            file.write(content)

    ages = itertools.count(10**9)

    def age(self):
        """Make the directories look as if nothing had happened for a while, so that listings may be kept."""
        for place in ("new", "cur"):
            os.utime(os.path.join(self.path, place), (next(self.ages),) * 2)

    def test_layout(self):
        id = self.put()
        for place in ("", "new", "cur", "tmp"):
            self.assertEqual(stat.S_IMODE(os.stat(os.path.join(self.path, place)).st_mode), 0o700, place)
        self.assertTrue(self.path.endswith("/mail/example.com/bob"))
        name, = os.listdir(self.path + "/new")
        self.assertEqual([os.listdir(self.path + "/cur"), os.listdir(self.path + "/tmp")], [[], []])
        info = os.stat(os.path.join(self.path, "new", name))
        self.assertEqual(stat.S_IMODE(info.st_mode), 0o600)
        self.assertRegex(name, r"\A\d+\.%s\.mail\.test,S=%d,W=%d\Z" % (id, info.st_size, info.st_size))

    def test_the_mailbox_module_reads_it(self):
        content = b"Subject: hello\r\n\r\n.dot\r\n"
        self.put(content)
        witness = mailbox.Maildir(self.path, create=False)
        message, = witness
        self.assertEqual((message["Subject"], message["Delivered-To"]), ("hello", self.box))
        self.assertTrue(witness.get_bytes(witness.keys()[0]).replace(b"\r\n", b"\n").endswith(content.replace(b"\r\n", b"\n")))

    def test_every_address_is_a_mailbox_name_again(self):
        names = ["bob@example.com", '"a/../b"@x', '"..".a@x', "j\xf6rg@b\xfccher.example", "x+y@z", "b@[192.0.2.1]", '" "@x',
                 ".@x"]
        keys = []
        for name in names:
            with contextlib.suppress(Refused):
                self.put(b"x\r\n", name)
                keys.append(minimail.parse_address(name).key)
        self.assertEqual(sorted(self.boxes.names()), sorted(keys))
        for place, directories, files in os.walk(self.data.storage.root):
            for name in directories + files:
                self.assertTrue(os.path.realpath(os.path.join(place,
                                                              name)).startswith(os.path.realpath(self.data.storage.root)))

    def test_order_and_uids(self):
        ids = [self.put(b"%d\r\n" % i) for i in range(20)]
        listing = list(self.boxes.listing(self.box))
        self.assertEqual([minimail.message_id(item) for item in listing], ids, "oldest first")
        uids = [item.uid for item in listing]
        self.assertEqual(len(set(uids)), 20)
        chance = random.Random(1)
        for item in chance.sample(listing, 10):     # as a mail client does; Dovecot adds flags of its own
            os.rename(os.path.join(self.path, "new", item.name), os.path.join(self.path, "cur", item.name + ":2,RSab"))
        self.assertEqual([item.uid for item in self.boxes.listing(self.box)], uids)
        self.assertEqual([item.size for item in self.boxes.listing(self.box)], [item.size for item in listing])
        for item in listing:                        # who had listed before still finds them
            os.close(self.boxes.open(self.box, item))
        self.boxes.set_seen(self.box, listing[0])
        self.boxes.set_seen(self.box, listing[1], False)
        self.assertRegex(self.boxes.find(self.box, listing[0]), r"/cur/[^:]+:2,(S|RSab)\Z")
        self.assertRegex(self.boxes.find(self.box, listing[1]), r"/cur/[^:]+:2,(|Rab)\Z")
        with mock.patch.object(minimail, "list_directory", side_effect=minimail.list_directory) as looks:
            self.assertCountEqual(self.boxes.delete(self.box, listing[5:15]), [(item, None) for item in listing[5:15]])
            self.assertEqual(looks.call_count, 2, "what was moved is looked for once, in new/ and cur/")
        self.assertEqual(list(self.boxes.delete(self.box, listing[5:15])), [], "gone already is no error")
        self.assertEqual([item.uid for item in self.boxes.listing(self.box)], uids[:5] + uids[15:])
        with mock.patch.object(os, "supports_dir_fd", set()):       # as on Windows
            self.assertCountEqual(self.boxes.delete(self.box, listing[15:]), [(item, None) for item in listing[15:]])

    def test_a_mailbox_of_which_one_place_is_left(self):
        """As a power cut leaves it, which keeps what was flushed, or a backup without empty directories."""
        for lost in "cur", "new":
            self.put()
            self.boxes.set_seen(self.box, self.boxes.listing(self.box)[0], lost == "new")
            item, = self.boxes.listing(self.box)
            if lost == "cur":                       # where set_seen() has put it
                os.rename(self.boxes.find(self.box, item), os.path.join(self.path, "new", item.name))
            os.rmdir(os.path.join(self.path, lost))
            os.rmdir(os.path.join(self.path, "tmp"))
            os.utime(self.path + ("/new" if lost == "cur" else "/cur"), (next(self.ages),) * 2)
            self.assertEqual([found.uid for found in self.boxes.listing(self.box)], [item.uid], lost)
            self.assertEqual([found.uid for found in self.boxes.remembered(self.box)], [item.uid], lost)
            self.assertEqual(list(self.boxes.names()), [self.box])
            os.close(self.boxes.lock(self.box))
            self.boxes.set_seen(self.box, item)
            self.assertTrue(self.boxes.find(self.box, item).endswith("/cur/" + item.name.partition(":")[0] + ":2,S"))
            self.put()
            self.assertEqual([error for _, error in self.boxes.delete(self.box, self.boxes.listing(self.box))], [None, None])
        shutil.rmtree(self.path + "/new")
        shutil.rmtree(self.path + "/cur")
        self.assertEqual((list(self.boxes.names()), self.boxes.lock(self.box)), ([], -1), "a mailbox has one of them")

    def test_a_mailbox_of_somebody_else(self):
        """As root leaves it who restores a part of the mail: it is not empty."""
        self.put()
        os.unlink(os.path.join(self.path, "new", self.boxes.listing(self.box)[0].name))
        self.put(b"x\r\n", "zoe@example.com")
        draft = os.path.join(self.boxes.path("zoe@example.com"), "tmp", "1.00000000-00000-0123456789.x")
        with open(draft, "w"):
            pass
        for place in "", "/new":
            with of_somebody_else(self.path + place):
                for function in self.boxes.listing, self.boxes.listing, self.boxes.remembered:
                    with self.assertRaises(PermissionError):
                        if function(self.box) is None:      # of remembered()
                            self.boxes.listing(self.box)
                self.assertEqual(list(self.boxes.names()), [self.box, "zoe@example.com"])
        with of_somebody_else(self.path), self.assertLogs("minimail"):
            self.assertRaises(PermissionError, self.boxes.lock, self.box)
            self.boxes.sweep()
        self.assertFalse(os.path.exists(draft), "the others are swept")
        lost = os.path.join(self.boxes.root, "lost+found")      # of a file system of its own
        os.mkdir(lost)
        with of_somebody_else(lost), self.assertLogs("minimail") as logs:
            for _ in range(2):
                self.boxes.sweep()
                self.assertEqual(list(self.boxes.names()), [self.box, "zoe@example.com"])
        self.assertEqual(len(logs.records), 1)
        os.close(self.boxes.lock(self.box))

    def test_a_listing_is_made_of_blocks(self):
        """Many messages, with odd names and others' flags; some moved from new/ to cur/ while we looked are there twice."""
        chance, names = random.Random(2), []
        for number in range(2503):
            base = "%d.M%dP7.%s" % (1e9 + number // 7, number, chance.choice(["host", "h" * 80, "caf\xe9", "a b"]))
            names.append(base + chance.choice([",S=7,W=%d" % (number + 2), ",S=7,W=%d:2," % (number + 2), "", ":2,RS"]))
        for name in names:
            self.put_foreign(name, b"x\n", "cur" if ":" in name else "new")
        for name in names[::50]:
            self.put_foreign(name.partition(":")[0] + ":2,T", b"x\n", "cur")
            self.put_foreign(name.partition(":")[0], b"x\n", "new")
        listing = self.boxes.listing(self.box)
        items = list(listing)
        self.assertEqual((len(items), len({item.uid for item in items}), len(listing)), (2503,) * 3)
        self.assertEqual([item.name.partition(":")[0] for item in items], sorted(name.partition(":")[0] for name in names))
        for item in items:
            self.assertTrue(os.path.exists(os.path.join(self.path, item.place, item.name)), item)
            width = re.search(r"W=(\d+)", item.name)
            self.assertEqual(item.size, int(width.group(1)) if width else 3)
        self.assertEqual([listing[index] for index in range(-2503, 2503)], items * 2)
        self.assertRaises(IndexError, lambda: listing[2503])
        self.assertEqual(list(reversed(listing)), items[::-1])
        self.assertEqual(listing.total, sum(item.size for item in items))
        for start, end in [(0, 0), (0, 2503), (0, 3000), (7, 8), (19, 41), (20, 40), (2500, 2600), (2503, 2600)]:
            self.assertEqual(listing.uids(start, end), [item.uid for item in items[start:end]])
        self.assertEqual(listing, self.boxes.listing(self.box))
        list(self.boxes.delete(self.box, [items[1000]]))
        self.assertNotEqual(listing, self.boxes.listing(self.box))

    def test_kept_listings_are_never_stale(self):
        self.put()
        changes = {
            "delivered": lambda: self.put(), "foreign": lambda: self.put_foreign("1.x.y", b"x\n"),
            "seen": lambda: self.boxes.set_seen(self.box, self.boxes.listing(self.box)[-1]),
            "deleted": lambda: list(self.boxes.delete(self.box, [self.boxes.listing(self.box)[0]])),
            "unlinked": lambda: os.unlink(self.boxes.find(self.box, self.boxes.listing(self.box)[0]))}
        for what, change in changes.items():
            self.age()
            before = self.boxes.listing(self.box)
            self.assertIs(self.boxes.listing(self.box), before, "kept while nothing changes")
            change()
            after = self.boxes.listing(self.box)
            self.assertNotEqual(after, before, what)
            self.assertEqual(sorted(item.name for item in after),
                             sorted(os.listdir(self.path + "/new") + os.listdir(self.path + "/cur")))
        first = self.boxes.listing(self.box)
        self.put()                                  # in the same tick of the clock
        self.assertEqual(len(self.boxes.listing(self.box)), len(first) + 1)

    def test_foreign_files(self):
        contents = {"1.lf.host": b"Subject: x\n\na\n", "2.crlf.host": b"A: b\r\n\r\nx\r\n", "3.open.host": b"A: b\n\nno end",
                    "4.mixed.host:2,S": b"a\r\nb\nc\rd\r\n", "5.cr.host": b"a\r", "6.empty.host": b"", "7.caf\xe9 x": b"x\n",
                    "8.sized,S=5,W=8:2,": b"a\nb\n\n"[:5], "9." + "l" * 100: b"x\n", "9.vast,W=" + "9" * 20: b"x\n", "big": b"line\n" * 200_000,
                    "edge": b"x" * (minimail.BIG_BLOCK - 1) + b"\r\nx\n"}
        for name, content in contents.items():
            self.put_foreign(name, content, "cur" if ":" in name else "new")
        self.put_foreign(".hidden", b"x")
        os.mkdir(self.path + "/cur/directory")
        listing = self.boxes.listing(self.box)
        self.assertEqual(len(listing), len(contents))
        self.assertEqual(len({item.uid for item in listing}), len(contents))
        for item in listing:
            self.assertRegex(item.uid, r"\A[!-~]{1,70}\Z")
            content = contents[item.name]
            crlf = re.sub(rb"(?<!\r)\n", b"\r\n", content)
            self.assertEqual(item.size, len(end_line(crlf)), item.name)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no FIFOs here")
    def test_only_regular_files_are_opened(self):
        """Whoever may write to a Maildir puts a link or a pipe there: neither followed nor waited for."""
        self.put()
        secret = self.file("secret", b"a secret of another\n")
        os.symlink(secret, self.path + "/new/1.link,S=5,W=5")
        os.symlink(secret, self.path + "/new/2.link")
        os.mkfifo(self.path + "/new/3.pipe,S=5,W=5")
        os.mkfifo(self.path + "/cur/4.pipe:2,S")
        opened = []
        for item in self.boxes.listing(self.box):
            for read in (minimail.Message(self.boxes, self.box, item).read, lambda: self.boxes.start_of(self.box, item)):
                with contextlib.suppress(OSError):
                    opened.append(read())
        self.assertEqual([content[-6:] for content in opened], [b"body\r\n"] * 2)
        self.boxes.prune(self.box, 1)

    def test_tmp_is_swept(self):
        self.put()
        tmp = os.path.join(self.path, "tmp")
        alive, dead = ("1.%s.h" % self.data.storage.new_id(1e9) for _ in range(2))
        names = {alive: True, dead: False, "foreign-young": True, "foreign-old": False}
        for name in names:
            fd = self.data.storage.create(os.path.join(tmp, name))
            self.addCleanup(os.close, fd) if name == alive else os.close(fd)    # the lock ends with its writer
        old = time.time() - 37 * 3600
        os.utime(os.path.join(tmp, "foreign-old"), (old, old))
        for place in ("new", "cur"):                # a power cut may leave nothing else, as the draft was flushed
            shutil.rmtree(os.path.join(self.path, place))
        self.boxes.sweep()
        self.assertEqual(sorted(os.listdir(tmp)), sorted(name for name, stays in names.items() if stays))

    def test_one_holder_at_a_time(self):
        self.assertEqual(self.boxes.lock(self.box), -1)
        self.assertFalse(os.path.exists(self.path))
        self.put()
        fd = self.boxes.lock(self.box)
        self.assertRaises(BlockingIOError, self.boxes.lock, self.box)
        os.close(fd)
        os.close(self.boxes.lock(self.box))

    def test_prune(self):
        ids = [self.put() for _ in range(5)]
        self.boxes.prune(self.box, 2)
        self.assertEqual([minimail.message_id(item) for item in self.boxes.listing(self.box)], ids[3:])
        old = "1000000000.%s.h,S=3,W=3" % self.data.storage.new_id(1e9)
        self.put_foreign(old, b"x\r\n")
        self.put_foreign("odd", b"x\r\n")           # nobody knows when it came
        with self.assertLogs("minimail", "INFO") as logs:
            self.boxes.prune(self.box, None, max_age=24 * 3600)
        self.assertEqual([record.getMessage() for record in logs.records], ["pruned"])
        self.assertEqual(sorted(os.listdir(self.path + "/new"))[-1], "odd")
        self.assertEqual(len(self.boxes.listing(self.box)), 3)

    def test_links_where_there_are_none(self):
        with mock.patch.object(os, "link", side_effect=OSError(errno.EPERM, "no links here")):
            self.put(b"x\r\n", "a@x", "b@x")
        for name in ("a@x", "b@x"):
            item, = self.boxes.listing(name)
            self.assertEqual(os.stat(self.boxes.find(name, item)).st_nlink, 1)
            self.assertEqual(os.listdir(os.path.join(self.boxes.path(name), "tmp")), [])


class UserAccounts(Case):
    def test_records(self):
        for hide in ((), ("scrypt",), ("scrypt", "pbkdf2_hmac")):
            with contextlib.ExitStack() as stack:
                stack.enter_context(mock.patch.object(minimail, "PBKDF2_ROUNDS", 500))
                there = {name: value for name, value in vars(hashlib).items() if name not in hide}
                stack.enter_context(mock.patch.object(minimail, "hashlib", types.SimpleNamespace(**there)))
                record = minimail.hash_password("s\xe9cret")
                if "scrypt" in hide:
                    self.assertTrue(record.startswith("$pbkdf2$500$"), record)
                self.assertNotEqual(record, minimail.hash_password("s\xe9cret"), "salted")
                self.assertTrue(minimail.check_password("s\xe9cret", record))
                self.assertFalse(minimail.check_password("secret", record))
            if hide:
                self.assertTrue(minimail.check_password("s\xe9cret", record), "a record holds elsewhere")

    def test_accounts_whose_names_are_quoted(self):
        path, storage = self.file("users", ""), minimail.Storage(self.directory(), sync=False)
        accounts, old, new = minimail.Accounts(path), cheap_hash("old"), cheap_hash("new")
        for name in ("#a@example.org", '"a b"@example.org', '"a:b"@example.org', r'"a\"b"@example.org', "d\xfc@example.org"):
            key = minimail.parse_address(name).key
            for edit, expected in ((lambda users: users.update({key: old}), {key: old}),
                                   (lambda users: users.update({key: new}), {key: new}), (lambda users: users.pop(key), {})):
                accounts.change(storage, edit)
                self.assertEqual(accounts.names(fresh=True), expected, name)

    def test_pbkdf2_is_the_standard_one(self):
        vectors = [(b"passwd", b"salt", 1), (b"", b"", 3), (b"x" * 200, b"y" * 100, 7)]
        known = "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"     # RFC 7914 section 11
        expected = [minimail.pbkdf2(*vector) for vector in vectors]
        self.assertEqual(expected[0].hex(), known)
        with mock.patch.object(minimail.hashlib, "pbkdf2_hmac", create=True):
            del minimail.hashlib.pbkdf2_hmac
            self.assertEqual([minimail.pbkdf2(*vector) for vector in vectors], expected)

    def test_bad_records(self):
        for record in ("", "secret", "$scrypt$1$x$y", "$md5$1$YQ==$YQ==", "$pbkdf2$99999999999$YQ==$YQ==",
                       "$scrypt$16,8$YQ==$YQ==",
                       "$pbkdf2$-1$YQ==$YQ=="):
            self.assertRaises(ValueError, minimail.check_password, "secret", record)

    @mock.patch.object(minimail.Reloaded, "PAUSE", 0.0)
    def test_users_file(self):
        with mock.patch.object(minimail, "SCRYPT", dict(n=16, r=1, p=1)):
            bob, eve = minimail.hash_password("bobs"), minimail.hash_password("eves")
            path = self.file("users", "# people\nBob@Example.org:%s\nbroken line\neve@example.org:%s\nx@y:plain\n" % (bob,
                                                                                                                      eve))
            accounts = minimail.Accounts(path)
            with self.assertLogs("minimail") as logs:
                self.assertEqual(accounts.verify("bob@EXAMPLE.org", "bobs"), "bob@example.org")
            self.assertEqual([re.search(r"line (\d)", line).group(1) for line in logs.output], ["3", "5"])
            self.assertEqual(accounts.verify("eve@example.org", "eves"), "eve@example.org")
            for name, password in (("bob@example.org", "eves"), ("bob@example.org", ""), ("nobody@example.org", "x"),
                                   ("bob", "bobs"),
                                   ("x@y", "plain"), ("", ""), ("bob@example.org", "bobs\udcff")):
                self.assertIsNone(accounts.verify(name, password), (name, password))
            self.assertEqual(accounts.verify("bob@example.org", "bobs"), "bob@example.org")
            with mock.patch.object(minimail, "check_password", wraps=minimail.check_password) as check:
                accounts.verify("nobody@example.org", "x")
            self.assertEqual(check.call_count, 1, "an unknown name takes as long")
            with open(path, "w") as file:           # a changed password ends what was remembered of the old one
                file.write("bob@example.org:%s\n" % minimail.hash_password("new"))
            self.assertIsNone(accounts.verify("bob@example.org", "bobs"))
            self.assertEqual(accounts.verify("bob@example.org", "new"), "bob@example.org")

    @mock.patch.object(minimail.Reloaded, "PAUSE", 0.0)
    def test_changing_the_file_keeps_what_else_is_in_it(self):
        record = "$pbkdf2$1$YQ==$YQ=="
        path = self.file("users", "# mine\nbob@x:%s\nbroken \xff\n" % record)
        accounts = minimail.Accounts(path)
        storage = minimail.Storage(os.path.dirname(path))
        with self.assertLogs("minimail"):
            accounts.change(storage, lambda users: users.update({"eve@x": record}))
            accounts.change(storage, lambda users: users.pop("bob@x"))
        with open(path, encoding="utf-8") as file:
            self.assertEqual(file.read(), "# mine\nbroken \xff\neve@x:%s\n" % record)
        self.assertEqual(os.listdir(os.path.dirname(path)), ["users"])
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)


class AddressBooks(Case):
    RECORD = "$pbkdf2$1$YQ==$YQ=="

    def book(self, aliases="", domains=("example.org", "second.example"), catch_all=""):
        users = self.file("users", "".join("%s@example.org:%s\n" % (name, self.RECORD) for name in ("bob", "eve", "x+y")))
        return minimail.AddressBook(domains, minimail.Accounts(users), self.file("aliases", aliases), catch_all)

    def check(self, book, text, mailboxes, remote=()):
        found = book.resolve(minimail.parse_address(text))
        self.assertEqual((found.mailboxes, [str(address) for address in found.remote]), (list(mailboxes), list(remote)), text)

    def test_users_and_sub_addresses(self):
        book = self.book()
        for text, box in {"bob@example.org": "bob", "BOB@Example.ORG": "bob", "bob+list@example.org": "bob",
                          "x+y@example.org": "x+y",
                              "postmaster": "postmaster", "Postmaster@second.example": "postmaster"}.items():
            self.check(book, text, [box + "@example.org"])
        for text in ("nobody@example.org", "bob@second.example", "+bob@example.org", "nobody+bob@example.org"):
            self.refused("550 5.1.1", book.resolve, minimail.parse_address(text))
        self.check(book, "someone@elsewhere.example", [], ["someone@elsewhere.example"])

    def test_aliases(self):
        book = self.book("""\
            # comment
            all@example.org: bob@example.org,
                eve@example.org, Friend@Elsewhere.example
            nested@second.example: all@example.org, bob@example.org
            bob@example.org: bob@example.org, archive@elsewhere.example
            one@example.org: two@example.org
            two@example.org: one@example.org
            broken@example.org: nobody@example.org
            nonsense
            "odd: one"@example.org: eve@example.org
            """.replace("            ", "", 1).replace("\n            ", "\n"))
        with self.assertLogs("minimail") as logs:
            self.check(book, "all@example.org", ["bob@example.org", "eve@example.org"],
                       ["archive@elsewhere.example", "Friend@Elsewhere.example"])
        self.assertIn("line 9", logs.output[0])
        self.check(book, "nested@second.example", ["bob@example.org", "eve@example.org"],
                   ["archive@elsewhere.example", "Friend@Elsewhere.example"])
        self.check(book, "bob+x@example.org", ["bob@example.org"], ["archive@elsewhere.example"])
        self.check(book, '"odd: one"@example.org', ["eve@example.org"])
        self.refused("550 5.4.6", book.resolve, minimail.parse_address("one@example.org"))
        with self.assertLogs("minimail"):
            self.refused("550 5.1.1", book.resolve, minimail.parse_address("broken@example.org"))

    def test_too_many_targets(self):
        targets = ", ".join("u%d@elsewhere.example" % i for i in range(minimail.MAX_EXPANSION + 1))
        self.refused("550 5.4.6", self.book("all@example.org: " + targets).resolve, Address("all", "example.org"))

    def test_lists_in_lists_cost_what_they_weigh(self):
        """Twenty levels that each name the next one twice, or all others: each is looked at once."""
        levels = "".join("l%d@example.org: l%d@example.org, l%d@example.org\n" % (i, i + 1, i + 1) for i in range(20))
        self.check(self.book(levels + "l20@example.org: bob@example.org\n"), "l0@example.org", ["bob@example.org"])
        names = ["n%d@example.org" % i for i in range(40)]
        book = self.book("".join("%s: %s\n" % (name, ", ".join(names[i + 1:] + ["bob@example.org"])) for i, name in enumerate(names)))
        self.check(book, names[0], ["bob@example.org"])
        deep = "".join("d%d: d%d\n" % (i, i + 1) for i in range(minimail.MAX_ALIAS_DEPTH + 5)) + "d%d: bob\n" % (minimail.MAX_ALIAS_DEPTH + 5)
        self.refused("550 5.4.6", self.book(deep).resolve, Address("d0", "example.org"))
        wide = "".join("w%d: %s\n" % (i, ", ".join("w%d" % j for j in range(i + 1, 160))) for i in range(159)) + "w159: bob\n"
        self.refused("550 5.4.6", self.book(wide).resolve, Address("w0", "example.org"))

    def test_what_an_alias_became_is_remembered_until_the_files_change(self):
        book = self.book("all: a@x.example, b@x.example\nloop: loop2\nloop2: loop\nlist: nobody-here, bob\n")
        first = book.resolve(Address("all", "example.org"))
        self.assertIs(book.resolve(Address("ALL", "Example.org")), first)
        for _ in range(2):
            self.refused("550 5.4.6", book.resolve, Address("loop", "example.org"))
        with self.assertLogs("minimail") as logs:
            for _ in range(3):
                self.check(book, "list@example.org", ["bob@example.org"])
        self.assertEqual(len(logs.output), 1, "said once")
        with open(book.aliases.path, "a") as file:
            file.write("all: c@x.example\n")
        self.eventually(lambda: len(book.resolve(Address("all", "example.org")).remote) == 3)
        with mock.patch.object(minimail, "MAX_REMEMBERED", 10):
            book = self.book("".join("l%d: a@x.example, b@x.example\n" % i for i in range(50)))
            for i in range(50):
                book.resolve(Address("l%d" % i, "example.org"))
            self.assertLess(len(book._remembered.found), 10)

    def test_own_names(self):
        book = self.book("root: admin@elsewhere.example\nabuse: \\eve\npostmaster: bob@example.org\n")
        for name, wanted in (("root", "root@example.org"), ("Bob@LocalHost", "Bob@example.org"), ("x@localhost.localdomain", "x@example.org"),
                             ("x@127.0.0.1", "x@127.0.0.1"), ("x@[127.0.0.1]", "x@example.org"), ("x@[192.0.2.1]", "x@[192.0.2.1]"),
                             ("x@[IPv6:::1]", "x@example.org"), ("x@[0.0.0.0]", "x@example.org"), ("x@second.example", "x@second.example"),
                             ("x@elsewhere.example", "x@elsewhere.example"), ("x@" + minimail.machine_name(), "x@example.org"),
                             ("x@localhost.example.org", "x@example.org"), ("x@LocalHost.second.example", "x@example.org"),
                             ("x@localhost.elsewhere.example", "x@localhost.elsewhere.example")):
            self.assertEqual(str(book.qualified(minimail.parse_address(name, lenient=True))), wanted)
        self.check(book, "root@example.org", [], ["admin@elsewhere.example"])
        self.check(book, "abuse@example.org", ["eve@example.org"])
        self.assertTrue(book.is_local(book.qualified(Address("root", "localhost.example.org"))))
        for name in ("hostmaster@example.org", "mailer-daemon@example.org", "root@second.example", "Abuse@second.example"):
            self.check(book, name, ["bob@example.org"])
        self.check(self.book(), "root@second.example", ["postmaster@example.org"])
        self.check(self.book(catch_all="box@example.org"), "root@example.org", ["box@example.org"])
        self.refused("550 5.1.1", self.book().resolve, Address("webmaster", "example.org"))
        book = self.book(domains=())
        for name in ("x@localhost", "x@[127.0.0.1]", "x@" + minimail.machine_name()):
            self.assertEqual(str(book.qualified(minimail.parse_address(name))), name, "in capture mode each name is its own")
        self.assertEqual(str(book.qualified(Address("root", ""))), "root@localhost")

    def test_aliases_as_in_etc_aliases(self):
        with self.assertLogs("minimail") as logs:
            book = self.book('root: bob, "|/bin/vacation bob", /dev/null, :include:/x, eve\nbin:root\nnone: |x\n"a, b": "c d"@x.example, "e,f"@x.example\n')
            self.check(book, "bin@example.org", ["bob@example.org", "eve@example.org"])
        self.assertEqual(len(logs.output), 5)
        self.check(book, '"a, b"@example.org', [], ['"c d"@x.example', '"e,f"@x.example'])
        self.refused("550 5.1.1", book.resolve, Address("none", "example.org"))

    def test_catch_all_and_postmaster(self):
        book = self.book(catch_all="box@example.org")
        for text in ("nobody@second.example", "postmaster", "postmaster@example.org", "box@example.org"):
            self.check(book, text, ["box@example.org"])
        self.check(self.book("postmaster@example.org: eve@example.org"), "postmaster@second.example", ["eve@example.org"])

    def test_local_domains_in_any_spelling(self):
        book = self.book(domains=["b\xfccher.example"], catch_all="box@x")
        for text in ("a@b\xfccher.example", "a@xn--bcher-kva.example", "a@B\xdcCHER.example"):
            self.assertTrue(book.is_local(minimail.parse_address(text)), text)
            self.assertEqual(book.key(minimail.parse_address(text)), "a@b\xfccher.example")

    def test_capture_mode(self):
        book = self.book("bob@example.org: eve@example.org", domains=())
        self.check(book, "bob@example.org", ["bob@example.org"])
        self.check(book, "Any.One@Anywhere.example", ["any.one@anywhere.example"])
        self.refused("553 5.1.3", book.resolve, Address("\xe9" * 100, "x"))

    def test_whose_address_it_is(self):
        book = self.book("sales@example.org: bob@example.org\n", catch_all="box@example.org")
        self.assertEqual([text for text in ("bob@example.org", "bob+x@example.org", "sales@example.org", "eve@example.org",
                                            "nobody@example.org", "bob@elsewhere.example")
                          if book.owns("bob@example.org", minimail.parse_address(text))],
                         ["bob@example.org", "bob+x@example.org", "sales@example.org"])
        self.assertFalse(book.owns("box@example.org", minimail.parse_address("nobody@example.org")))


# ======================================================================================================================
# 7  Delivery
# ======================================================================================================================

class AllOrNothing(Case):
    RECIPIENTS = ["a@x.example", "b@y.example", "c@x.example"]

    def begin(self, stores, content=b"Subject: x\r\n\r\nbody\r\n"):
        envelope = minimail.Envelope("s@example.net", [minimail.parse_address(r) for r in self.RECIPIENTS])
        parcel = stores.post.begin(envelope, [stores.book.resolve(r) for r in envelope.recipients])
        parcel.draft.write(content)
        return parcel

    def test_one_file_for_all(self):
        stores = self.stores()
        stores.post.commit(self.begin(stores))
        stores.storage.sync = True
        with mock.patch.object(os, "fsync", wraps=os.fsync) as fsync:
            stores.post.commit(self.begin(stores))
        self.assertEqual(fsync.call_count, 4, "one file and three directories")
        info = [os.stat(stores.mailboxes.find(box, stores.mailboxes.listing(box)[1])) for box in self.RECIPIENTS]
        self.assertEqual({(i.st_ino, i.st_nlink) for i in info}, {(info[0].st_ino, 3)})

    def test_the_same_mailbox_twice_is_one_copy(self):
        stores = self.stores()
        stores.door.send(minimail.Envelope(""), [Address("A", "x"), Address("a", "X"), Address("a", "x")], b"x\r\n")
        self.assertEqual(len(stores.mailboxes.listing("a@x")), 1)

    @mock.patch.object(os, "fsync", lambda fd: None)     # Faulty counts them; waiting for the disk shows nothing more
    def test_every_operation_of_the_disk_fails_once(self):
        for error, code in ((errno.ENOSPC, "452 4.3.1"), (errno.EDQUOT, "452 4.2.2"), (errno.EROFS, "451 4.3.0")):
            for n in itertools.count(1):
                stores = self.stores(no_sync=False)
                parcel = self.begin(stores)
                with Faulty(n, error) as faulty:
                    try:
                        with self.assertLogs("minimail") as logs:
                            minimail.log.warning("or assertLogs would miss one")
                            stores.post.commit(parcel)
                    except Refused as refused:
                        self.assertTrue(faulty.failed)
                        self.assertTrue(str(refused.reply).startswith(code), refused.reply)
                        self.assertTrue(any(parcel.draft.id in line for line in logs.output), "the log says why")
                        self.assertNothingLeft(stores.storage.root)
                        self.assertEqual(parcel.draft.fd, -1)
                    else:
                        self.assertEqual([len(stores.mailboxes.listing(box)) for box in self.RECIPIENTS], [1, 1, 1],
                                         faulty.failed)
                if not faulty.failed:
                    break
            self.assertGreater(n, 15)

    def test_a_batch_refuses_only_what_failed(self):
        stores = self.stores()
        parcels = [self.begin(stores) for _ in range(4)]
        parcels[1].draft.error = OSError(errno.ENOSPC, "full")
        parcels[2].draft.size = stores.post.max_size + 1
        with self.assertLogs("minimail"):
            results = stores.post.commit_all(parcels)
        self.assertEqual([refused and refused.reply.code for refused in results], [None, 452, 552, None])
        self.assertEqual(len(stores.mailboxes.listing("a@x.example")), 2)

    @mock.patch.object(os, "fsync", lambda fd: None)
    def test_in_a_batch_every_operation_of_the_disk_fails_once(self):
        """... of the message that it hits nothing is left, and the others are there."""
        hit = set()
        for n in itertools.count(1):
            stores = self.stores(no_sync=False)
            parcels = [self.begin(stores) for _ in range(3)]
            with Faulty(n, errno.EIO) as faulty, self.assertLogs("minimail"):
                minimail.log.warning("or assertLogs would miss one")
                results = stores.post.commit_all(parcels)
            stored = {minimail.message_id(item) for item in stores.mailboxes.listing("a@x.example")}
            for parcel, refused in zip(parcels, results):
                there = [os.path.join(place, name) for place, _, names in os.walk(stores.storage.root) for name in names
                         if parcel.draft.id in name]
                self.assertEqual(len(there), 0 if refused else 3, (n, faulty.failed, refused))
                self.assertEqual(parcel.draft.id in stored, not refused)
                self.assertEqual(parcel.draft.fd, -1)
            if not faulty.failed:
                break
            hit.add((faulty.failed, sum(map(bool, results))))
        self.assertGreater(n, 25)
        self.assertEqual({count for what, count in hit if what in ("link", "replace")}, {1})

    def test_a_flush_that_fails_hits_those_that_wanted_it(self):
        stores, real = self.stores(no_sync=False), os.fsync
        for wrong in ("file", "directory"):
            parcels = [self.begin(stores) for _ in range(3)]

            def fsync(fd, wrong=wrong, parcels=parcels):
                if fd == parcels[1].draft.fd if wrong == "file" else stat.S_ISDIR(os.fstat(fd).st_mode):
                    raise OSError(errno.EIO, "broken")
                real(fd)
            with mock.patch.object(os, "fsync", fsync), self.assertLogs("minimail"):
                results = stores.post.commit_all(parcels)
            self.assertEqual([bool(refused) for refused in results],
                             [False, True, False] if wrong == "file" else [True] * 3)
        self.assertEqual([minimail.message_id(item) for item in stores.mailboxes.listing("b@y.example")] and
                         len(stores.mailboxes.listing("b@y.example")), 2)

    def test_loops_and_size(self):
        stores = self.stores(max_size=1000)
        self.refused("552 5.3.4", stores.post.commit, self.begin(stores, b"x" * 1001))
        self.assertNothingLeft(stores.storage.root)
        stores.post.commit(self.begin(stores, b"x" * 1000))

    def test_large_content_is_not_kept_in_memory(self):
        stores = self.stores()
        parcel = self.begin(stores, b"")
        for _ in range(100):
            parcel.draft.write(b"x" * 10_000)
            self.assertLess(parcel.draft._buffered, 100_000)
        stores.post.commit(parcel)
        self.assertGreater(stores.mailboxes.listing("a@x.example")[0].size, 1_000_000)


class Doors(Case):
    """Whether mail may go, asked at the one place where all of it passes."""

    USERS = {"bob@example.org": "x", "eve@example.org": "y"}

    def door(self, policy=None, **options):
        users = self.file("users", "".join("%s:%s\n" % (name, cheap_hash(word)) for name, word in self.USERS.items()))
        aliases = self.file("aliases", "sales@example.org: bob@example.org, archive@friend.example\n")
        self.data = minimail.open_stores(Config(**dict(dict(
            data=self.directory(), hostname="mail.test", no_sync=True, domain=("example.org",), users=users, aliases=aliases),
            **options)), policy=policy)
        return self.data.door

    def drafts(self):
        return [name for _, _, names in os.walk(self.data.mailboxes.root) for name in names]

    def test_content_that_ends_in_an_error_leaves_nothing(self):
        def content():
            yield b"x" * 100_000
            raise OSError(errno.EIO, "the source is gone")
        door, before = self.door(), open_files()
        with self.assertRaises(OSError):
            door.send(minimail.Envelope("bob@example.org"), [Address("eve", "example.org")], content())
        self.assertEqual(self.drafts(), [])
        self.assertNoMoreOpen(before)

    @mock.patch.object(minimail.Watched, "PAUSE", 0.0)
    def test_who_lives_here_while_the_disk_is_away(self):
        """Those who did: that the files are not there says nothing where the disk beneath shows."""
        door = self.door(users="", aliases="")
        storage, envelope = self.data.storage, minimail.Envelope("ann@far.test")
        users, aliases = (os.path.join(storage.root, name) for name in ("users", "aliases"))
        for path, text in (users, "bob@example.org:%s\n" % cheap_hash("x")), (aliases, "sales@example.org: bob@example.org\n"):
            with open(path, "w") as file:
                file.write(text)

        def found():
            return [door.destinations(envelope, Address(name, "example.org"), False).mailboxes for name in ("bob", "sales")]
        self.assertEqual(found(), [["bob@example.org"]] * 2)
        os.unlink(users)
        os.unlink(aliases)
        beneath, storage._beneath = storage._beneath, os.stat(storage.root).st_dev      # as it is then
        with self.assertLogs("minimail") as logs:
            self.assertEqual(found() + found(), [["bob@example.org"]] * 4)
            self.assertEqual(self.data.accounts.verify("bob@example.org", "x"), "bob@example.org")
        self.assertEqual(len(logs.records), 3, "out of reach, and each file once")
        storage._beneath = beneath
        with self.assertLogs("minimail"):
            self.assertRaises(Refused, found)       # it is there, and they are gone

    def test_no_policy_is_asked_about_what_is_too_large(self):
        asked = []

        class Asked(minimail.Policy):
            def on_message(self, envelope, path):
                asked.append(path)
        door = self.door(Asked(), max_size=1000)
        for size, answer in (1000, ""), (1001, "552 5.3.4"), (200_000, "552 5.3.4"):
            self.assertEqual(self.answer(door.send, minimail.Envelope("bob@example.org"), [Address("eve", "example.org")],
                                         b"x" * (size - 2) + b"\r\n"), answer)
        self.assertEqual((len(asked), len(self.drafts())), (1, 1))

    def answer(self, function, *arguments):
        """Return how a refusal begins, "" when there is none."""
        try:
            function(*arguments)
        except Refused as refused:
            return str(refused.reply)[:9]
        return ""

    def test_whose_address(self):
        for user, sender, answer in (
                ("bob@example.org", "bob@example.org", ""), ("bob@example.org", "bob+x@example.org", ""),
                ("bob@example.org", "sales@example.org", ""), ("bob@example.org", "eve@example.org", "553 5.7.1"),
                ("bob@example.org", "bob@elsewhere.example", "553 5.7.1"), ("bob@example.org", "", ""),
                (None, "eve@example.org", "")):
            door, address = self.door(), minimail.parse_address(sender) if sender else None
            self.assertEqual(self.answer(door.check_sender, address, user), answer, (user, sender))
            self.assertEqual(self.answer(door.send, minimail.Envelope(sender), [Address("eve", "example.org")], b"x\r\n", user),
                             answer, (user, sender))
            self.assertEqual(len(self.data.mailboxes.listing("eve@example.org")), not answer)
        self.assertEqual(self.answer(self.door(domain=()).check_sender, Address("a", "x"), "b@x"), "",
                         "in capture mode everybody may be everybody")

    def test_where_to(self):
        for recipient, trusted, answer in (
                ("bob@example.org", False, ""), ("nobody@example.org", True, "550 5.1.1"),
                ("u@friend.example", False, "550 5.7.1"), ("u@friend.example", True, ""), ("u@x.friend.example", True, "550 5.7.1"),
                ("u@x.below.example", True, ""), ("u@elsewhere.example", True, "550 5.7.1"),
                ("sales@example.org", False, "")):  # an alias leads out for everybody: it is ours
            if "relay" not in SECTIONS and not answer and recipient != "bob@example.org":
                answer = "550 5.7.1"                # nothing passes mail on
            door = self.door(relay_to=("friend.example", ".below.example"))
            envelope = minimail.Envelope("a@x")
            self.assertEqual(self.answer(door.recipient, envelope, minimail.parse_address(recipient), trusted), answer, recipient)
            self.assertEqual(list(map(str, envelope.recipients)), [] if answer else [recipient])
        self.assertEqual(self.answer(self.door(relay_to=("other.example",)).recipient, minimail.Envelope(),
                                     Address("sales", "example.org"), True), "550 5.7.1", "--relay-to holds for aliases, too")

    def test_who_lives_here_cannot_be_read(self):
        """Nothing is known yet: later, not "no such user", and no error of ours."""
        def ask():
            return self.answer(door.recipient, minimail.Envelope(), Address("bob", "example.org"), True)
        for name, content in ("users", "bob@example.org:%s\n" % cheap_hash("x")), ("aliases", ""):
            path = os.path.join(self.directory(), name)
            os.mkdir(path)
            door = self.door(**{name: path})
            with self.assertLogs("minimail"):
                self.assertEqual(ask(), "451 4.3.0")
            os.rmdir(path)
            with open(path, "w") as file:
                file.write(content)
            self.assertEqual(ask(), "")

    def test_how_much(self):
        door, envelope = self.door(), minimail.Envelope("a@x", [Address("u%d" % i, "x") for i in range(minimail.MAX_RECIPIENTS)])
        self.assertEqual(self.answer(door.recipient, envelope, Address("bob", "example.org"), True), "452 4.5.3")
        if "relay" in SECTIONS:
            with mock.patch.object(self.data.post.queue, "is_full", lambda: True):
                self.assertEqual(self.answer(door.recipient, minimail.Envelope(), Address("u", "friend.example"), True), "452 4.3.1")
                self.assertEqual(self.answer(door.recipient, minimail.Envelope(), Address("bob", "example.org"), True), "")
        self.data.post.queue = None
        self.assertEqual(self.answer(door.recipient, minimail.Envelope(), Address("u", "friend.example"), True), "550 5.7.1")
        door = self.door(max_size=10)
        self.assertEqual(self.answer(door.send, minimail.Envelope(), [Address("bob", "example.org")], b"x" * 11), "552 5.3.4")
        self.assertNothingLeft(self.data.storage.root)

    def test_the_policy_is_asked_for_every_message(self):
        asked = []

        class Policy(minimail.Policy):
            def on_mail(self, client, sender, user):
                asked.append(("mail", client, sender, user))

            def on_rcpt(self, envelope, recipient):
                asked.append(("rcpt", recipient))

            def on_message(self, envelope, path):
                asked.append(("message", open_and_read(path).endswith(b"\r\n\r\nx\r\n"), envelope.eightbit))
                raise self.wrong
        for wrong, answer in ((Refused(554, "5.7.0", "no"), "554 5.7.0"), (RuntimeError("a bug"), "451 4.3.0")):
            asked.clear()
            Policy.wrong = wrong
            door = self.door(Policy())
            with self.assertLogs("minimail"):
                minimail.log.warning("or assertLogs would miss one")
                self.assertEqual(self.answer(door.send, minimail.Envelope("bob@example.org", client="192.0.2.1"),
                                             [Address("eve", "example.org")], b"A: \xff\r\n\r\nx", "bob@example.org"), answer)
            self.assertEqual(asked, [("mail", "192.0.2.1", "bob@example.org", "bob@example.org"), ("rcpt", "eve@example.org"),
                                     ("message", True, True)])
            self.assertNothingLeft(self.data.storage.root)


class AwaitingMail(Case):
    def setUp(self):
        self.storage = minimail.Storage(self.directory())
        self.storage.open()
        self.clock = Clock()
        patch = mock.patch.object(minimail, "time", types.SimpleNamespace(monotonic=self.clock, time_ns=time.time_ns))
        patch.start()
        self.addCleanup(patch.stop)

    def wait(self, look, seconds=10.0, on_sleep=lambda: None):
        def sleep(duration):
            self.clock.now += duration
            return on_sleep()
        return minimail.await_mail(self.storage, look, self.clock.now + seconds, sleep)

    def test_what_is_there_is_returned_at_once(self):
        self.assertEqual(self.wait(lambda: "it", 0.0, on_sleep=self.fail), "it")

    def test_it_is_looked_for_again_when_mail_came(self):
        looks, sleeps = [], itertools.count()

        def on_sleep():
            if next(sleeps) == 2:
                self.storage.wake("mail")
        self.assertEqual(self.wait(lambda: looks.append(self.clock.now) or len(looks) == 2, on_sleep=on_sleep), True)
        self.assertLess(looks[1] - looks[0], 0.5)

    def test_a_stamp_that_did_not_change_is_not_trusted_for_ever(self):
        looks = []
        self.assertIsNone(self.wait(lambda: looks.append(self.clock.now), 10.0))
        self.assertIn(len(looks), range(5, 8))
        self.assertLessEqual(self.clock.now - looks[0], 10.1)

    def test_the_end_of_the_node_ends_it(self):
        self.assertIsNone(self.wait(lambda: None, on_sleep=lambda: False))
        self.assertLess(self.clock.now, 1001)

    def test_what_comes_between_look_and_sleep_is_not_missed(self):
        looks = []

        def look():
            looks.append(1)
            if len(looks) == 1:
                self.storage.wake("mail")           # just after it looked
                return None
            return "found"
        self.assertEqual(self.wait(look, on_sleep=self.fail), "found")



LETTER = b"From: me@here.test\r\nSubject: hi\r\n\r\nbody\r\n"


# ======================================================================================================================
# 8  Harness of sections 8 to 12: a clock, names, peers, a world around a relay, a disk; all of them keep to a script.
# ======================================================================================================================

class ScriptedCase(Case):
    """A test with a temporary data directory and the log lines of the node in `self.logged`."""

    def setUp(self):
        self.data = os.path.join(self.directory(), "data")
        self.logged = []
        handler = logging.Handler()
        handler.emit = lambda record: self.logged.append("%s %s%s" % (
            record.getMessage(), getattr(record, "fields", ""), logging.Formatter().formatException(record.exc_info)
            if record.exc_info else ""))
        log = logging.getLogger("minimail")
        for name, value in ("handlers", [handler]), ("propagate", False), ("level", logging.INFO):
            self.addCleanup(setattr, log, name, getattr(log, name))
            setattr(log, name, value)
        log.setLevel(logging.INFO)


class ScriptedClock:
    """Shows the time it is set to."""

    def __init__(self, now=1_700_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


class ScriptedNames(minimail.Resolver):
    """Knows what is in a Zone, and asks nobody."""

    def __init__(self, names):
        super().__init__()
        self.zone = minimail.Zone(names)

    def query(self, name, type):
        records, rcode = self.zone.records(name.lower(), type)
        if rcode == minimail.NXDOMAIN:
            raise minimail.NoSuchDomain("no such domain: " + name)
        if rcode:
            raise minimail.DNSFailure("answered with error %d" % rcode)
        return [record for record in records if record.type == type]


class ScriptedDNS:
    """A name server that answers each UDP packet with what `udp(query)` returns, and each TCP query with `tcp(query)`.

    That is bytes, a list of them (several packets), or None; ("elsewhere", bytes) comes from another port.
    """

    def __init__(self, udp, tcp=None):
        self.udp, self.tcp = udp, tcp
        self.queries = []
        while True:
            self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._udp.bind(("127.0.0.1", 0))
            self.address = self._udp.getsockname()
            try:
                self._tcp = socket.create_server(self.address)
                break
            except OSError:                         # taken for TCP
                self._udp.close()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._serve_udp, self._serve_tcp)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"stop", self.address)
        with contextlib.suppress(OSError):
            self._tcp.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        self._udp.close()
        self._tcp.close()

    def _serve_udp(self):
        while True:
            query, client = self._udp.recvfrom(4096)
            if query == b"stop":
                return
            self.queries.append(query)
            answers = self.udp(query)
            for answer in answers if isinstance(answers, list) else [answers]:
                if isinstance(answer, tuple):
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                        other.sendto(answer[1], client)
                elif answer is not None:
                    self._udp.sendto(answer, client)

    def _serve_tcp(self):
        while True:
            try:
                sock, _ = self._tcp.accept()
            except OSError:
                return
            with sock, sock.makefile("rb") as file:
                query = file.read(struct.unpack(">H", file.read(2))[0])
                sock.sendall(self.tcp(query))


def scripted_answer(query, *records, rcode=0, truncated=False, id=None, authority=b""):
    """Return a response packet; each record is (name, TYPE, data) or (name, TYPE, data, ttl)."""
    made = [minimail.Record(record[0], minimail.TYPES[record[1]], record[3] if len(record) > 3 else 60, record[2])
            for record in records]
    packet = minimail.encode_answer(query, made, rcode, truncated)
    if authority:
        packet = packet[:8] + b"\0\1" + packet[10:] + authority
    return packet if id is None else struct.pack(">H", id) + packet[2:]


class ScriptedPeer:
    """An SMTP server that keeps to its script: {stage: reply, or a list of replies of which the last repeats}.

    A stage is connect, a verb, end (the final dot), or a whole command line, which goes first. A reply is a text whose
    lines get their CRLF (the line DROP closes the connection, SILENT says nothing more), bytes, or a function that
    returns such. `messages` has (sender, recipients, content as on the wire) of all that was answered 2xx at the end,
    `lines` every command, `batches` every block as it came.
    """

    def __init__(self, script=None, extensions=("PIPELINING", "8BITMIME", "SMTPUTF8", "SIZE 10000000"), tls=None,
                 implicit=False):
        self.script = {"connect": "220 peer.test ESMTP", "HELO": "250 peer.test", "DATA": "354 go ahead",
                       "QUIT": "221 bye\nDROP", "AUTH": "235 welcome",
                       "EHLO": "\n".join(["250-peer.test"] + ["250-" + name for name in extensions] + ["250 HELP"])}
        self.script.update({"early": "503 5.5.1 not now"}, **(script or {}))
        self.eager = "DATA" in (script or {})       # answers DATA as the script says even without recipients
        self.tls, self.implicit = tls, implicit
        self.connections = 0
        self.lines, self.messages, self.contents, self.batches = [], [], [], []
        self.secured = 0                            # TLS handshakes done
        self.port = 0
        self._listener = self._accepting = None
        self._threads = []

    def connect(self):
        """Return the client's end of a new connection."""
        ours, theirs = socket.socketpair()
        self._start(ours)
        return theirs

    def listen(self):
        """Take connections on a free port of 127.0.0.1, and return it."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    sock = self._listener.accept()[0]
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)      # replies go out one by one
                    self._start(sock)
        self._accepting = threading.Thread(target=accept, daemon=True)
        self._threads.append(self._accepting)
        self._accepting.start()
        return self.port

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._listener:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _start(self, sock):
        self.connections += 1
        self._threads.append(threading.Thread(target=self._serve, args=(sock,), daemon=True))
        self._threads[-1].start()

    def _serve(self, sock):
        self_sock = [sock]
        try:
            sock.settimeout(PATIENCE)
            self._converse(self_sock)
        except (OSError, EOFError):
            pass
        finally:
            self_sock[0].close()

    def _converse(self, box):
        """`box` has the socket: STARTTLS replaces it."""
        if self.implicit:
            self._secure(box)
        sender, recipients, buffer = "", [], bytearray()
        self._say(box[0], "connect")
        while True:
            line = self._until(box[0], buffer, b"\r\n").decode("utf-8")
            self.lines.append(line)
            verb = line.partition(" ")[0].upper()
            early = (verb == "RCPT" and not sender) or (verb == "DATA" and not recipients and not self.eager)
            reply = self._say(box[0], "early" if early else verb, "" if early else line)
            if verb == "STARTTLS" and reply.startswith("220"):
                self._secure(box)
                buffer.clear()
            elif verb in ("MAIL", "RSET", "EHLO"):
                sender, recipients = line[len("MAIL FROM:"):] if reply.startswith("250") else "", []
            elif verb == "RCPT" and reply.startswith("250"):
                recipients.append(line[len("RCPT TO:"):])
            elif verb == "DATA" and reply.startswith("3"):
                buffer[:0] = b"\r\n"
                content = self._until(box[0], buffer, b"\r\n.\r\n")[2:] + b"\r\n"
                self.contents.append(content)
                reply = self._choose("end")
                if reply[:1] in ("2", b"2") and recipients:
                    self.messages.append((sender, recipients, content))     # before the client can know of it
                self._tell(box[0], reply)

    def _secure(self, box):
        box[0] = self.tls.wrap_socket(box[0], server_side=True)
        self.secured += 1

    def _until(self, sock, buffer, end):
        while end not in buffer:
            block = sock.recv(65536)
            if not block:
                raise EOFError
            self.batches.append(block)
            buffer += block
        found, _, rest = bytes(buffer).partition(end)
        buffer[:] = rest
        return found

    def _say(self, sock, stage, line=""):
        return self._tell(sock, self._choose(stage, line))

    def _choose(self, stage, line=""):
        reply = self.script.get(line or stage, self.script.get(stage, "220 go" if stage == "STARTTLS" else "250 ok"))
        if isinstance(reply, list):
            reply = reply.pop(0) if len(reply) > 1 else reply[0]
        return reply() if callable(reply) else reply

    def _tell(self, sock, reply):
        if isinstance(reply, bytes):
            sock.sendall(reply)
            return ""
        for part in reply.split("\n"):
            if part == "DROP":
                raise EOFError
            if part == "SILENT":
                while sock.recv(65536):
                    pass
                raise EOFError
            sock.sendall(part.encode("utf-8") + b"\r\n")
        return reply

    def settle(self):
        """Wait until all connections that their clients closed are done with."""
        for thread in self._threads:
            if thread is not self._accepting:
                thread.join(PATIENCE)

    def verbs(self):
        """The verbs of all commands, as one text."""
        return " ".join(line.partition(" ")[0] for line in self.lines)


class ScriptedWorld:
    """A relay without threads, network and waiting: names, {IP address: ScriptedPeer}, a clock.

    An address without a peer refuses connections; one whose peer is an OSError fails with that.
    """

    def __init__(self, case, names=None, hosts=None, clock=None, **options):
        given = dict({"domain": "here.test", "hostname": "mx.here.test", "catch_all": "all@here.test", "no_sync": True,
                      "timeout": PATIENCE, "data": case.data}, **options)
        self.clock = clock or ScriptedClock()
        given = {name: value for name, value in given.items() if value is not None}
        stint = mock.patch.object(minimail, "STINT", PATIENCE)      # or a step would end before all that is due is taken up
        stint.start()
        case.addCleanup(stint.stop)
        self.config = minimail.Config(**minimail.read_options(given, str))
        self.stores = minimail.open_stores(self.config, self.clock)
        self.queue = self.stores.post.queue
        self.hosts = hosts or {}
        self.connected = []
        self.relay = minimail.Relay(self.config, self.stores, clock=self.clock, resolver=ScriptedNames(names or {}),
                                    own=[("192.0.2.1", self.config.mx_port)], connect=self.connect)

    def connect(self, address, timeout=None):
        self.connected.append(address[0])
        peer = self.hosts.get(address[0])
        if isinstance(peer, OSError):
            raise peer
        if peer is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        return peer.connect()

    def submit(self, *recipients, sender="me@here.test", content=LETTER, utf8=False):
        """Accept a message as a session does, and return its id; Refused."""
        addresses = [minimail.parse_address(recipient) for recipient in recipients]
        envelope = minimail.Envelope(sender=sender, smtputf8=utf8)
        return self.stores.door.send(envelope, addresses, content).draft.id

    def step(self):
        """Do all that is due now, in this thread; return when the next is due, None when the queue is empty."""
        relay = self.relay
        relay._tick()
        relay._guarded(relay.scan)
        for destination in list(relay._destinations.values()):
            destination.workers += 1
            relay._workers += 1
            minimail.tally(relay._working, "", 1)
            relay._work(destination, "")
        while not relay._inbox.empty():
            function, arguments = relay._inbox.get_nowait()
            relay._guarded(function, *arguments)
        return self.queue.next_due(self.clock())

    def entries(self):
        return list(self.queue.entries())

    def files(self):
        """Every file below queue/, relative."""
        return sorted(os.path.relpath(os.path.join(above, name), self.queue.root)
                      for above, _, names in os.walk(self.queue.root) for name in names)

    def mail(self, mailbox="all@here.test"):
        """The messages in a mailbox, parsed."""
        return [minimail.Message(self.stores.mailboxes, mailbox, item).email()
                for item in self.stores.mailboxes.listing(mailbox)]


class ScriptedDisk:
    """Counts the file operations below `root`; the n-th fails with `error`, or ends the process where that is None.

    A write that fails has written half. fsync() is counted, but not done: this is about order, not about the disk.
    `trace` has (operation, path relative to root) of all.
    """

    CALLS = ("open", "write", "fsync", "rename", "replace", "link", "unlink", "close", "mkdir", "rmdir")

    def __init__(self, root, n=0, error=None):
        self.root, self.n, self.error = root + os.sep, n, error
        self.trace, self.tripped = [], False
        self._fds = {}
        self._real = {name: getattr(os, name) for name in self.CALLS}

    def __enter__(self):
        self._patches = [mock.patch.object(os, name, self._wrap(name)) for name in self.CALLS]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self._patches:
            patch.stop()

    def _wrap(self, name):
        real = self._real[name]

        def call(thing, *arguments, **keywords):
            path = self._fds.get(thing) if isinstance(thing, int) else thing if str(thing).startswith(self.root) else None
            if path is None:
                return real(thing, *arguments, **keywords)
            shown = arguments[0] if name in ("rename", "replace", "link") else path
            self.trace.append((name, os.path.relpath(shown, self.root)))
            if name == "close":
                del self._fds[thing]
            if len(self.trace) == self.n:
                self.tripped = True
                if name == "write":
                    real(thing, arguments[0][:len(arguments[0]) // 2])
                elif name == "close":
                    real(thing)
                if self.error is None:
                    os._exit(99)
                raise OSError(self.error, os.strerror(self.error), path)
            if name == "fsync":
                return None
            result = real(thing, *arguments, **keywords)
            if name == "open":
                self._fds[result] = path
            return result
        return call


FAR = {"far.test": ["MX 10 mx.far.test"], "mx.far.test": ["A 192.0.2.25"]}
NEAR = {"near.test": ["MX 10 mx.near.test"], "mx.near.test": ["A 192.0.2.26"]}


def run_peer(client, coroutine):
    """Run a coroutine of a Peer to its end."""
    return blocking(client.wire, coroutine)


def scripted_dialog(address, *lines):
    """Send lines to an SMTP server one by one; return the last line of each reply, the greeting first."""
    replies = []
    with contextlib.closing(socket.socket()) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(address)
        with sock.makefile("rb") as file:
            for line in ("",) + lines:
                if line:
                    sock.sendall((line + "\r\n").encode("utf-8"))
                text = file.readline().decode("utf-8").rstrip("\r\n")
                while text[3:4] == "-":
                    text = file.readline().decode("utf-8").rstrip("\r\n")
                replies.append(text)
    return replies


def scripted_command(*arguments, stdin=b""):
    """Run main() and return (status, standard output, standard error); the logger is as before afterwards."""
    log = logging.getLogger("minimail")
    before = log.handlers, log.propagate, log.level
    out, err = io.StringIO(), io.StringIO()
    try:
        with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(list(arguments))
    finally:
        log.handlers, log.propagate = before[:2]
        log.setLevel(before[2])
    return status, out.getvalue(), err.getvalue()


# ======================================================================================================================
# 8  DNS.  Packets, pure; the resolver against servers that lie, lag and drop; the fixture name server.
# ======================================================================================================================

class DNSPacketTest(unittest.TestCase):

    QUERY = minimail.encode_query(0x1234, "example.com", minimail.MX)

    def test_query_as_on_the_wire(self):
        self.assertEqual(minimail.encode_query(0x1234, "a.bc.", minimail.A, edns=False),
                         b"\x12\x34\1\0\0\1\0\0\0\0\0\0" b"\1a\2bc\0" b"\0\1\0\1")
        self.assertEqual(self.QUERY[10:12] + self.QUERY[-11:], b"\0\1" b"\0\0\x29\4\xd0\0\0\0\0\0\0")     # EDNS0, 1232 bytes

    def test_names_that_are_none(self):
        for name in ("a..b", ".a", "x" * 64 + ".test", ".".join(["x" * 60] * 5), "b\u00fccher.test"):
            with self.subTest(name), self.assertRaises(ValueError):
                minimail.encode_query(1, name, minimail.A)
        minimail.encode_query(1, "x" * 63 + ".test", minimail.A)
        minimail.encode_query(1, ".".join(["x" * 62] * 4)[:253], minimail.A)

    def test_round_trip(self):
        records = [("example.com", "CNAME", "www.example.net"), ("www.example.net", "MX", (10, "mx.example.net")),
                   ("mx.example.net", "A", "192.0.2.7"), ("mx.example.net", "AAAA", "2001:db8::7")]
        answer = minimail.decode_answer(scripted_answer(self.QUERY, *records))
        self.assertEqual((answer.id, answer.rcode, answer.truncated, answer.question),
                         (0x1234, 0, False, ("example.com", minimail.MX)))
        self.assertEqual([(r.name, r.type, r.data) for r in answer.records],
                         [(name, minimail.TYPES[type], data) for name, type, data in records])

    def test_compression(self):
        """Written by hand: the name in the MX points into the question, which begins at byte 12."""
        packet = (b"\x12\x34\x81\x80\0\1\0\1\0\0\0\0" b"\7eXample\3com\0\0\x0f\0\1"
                  b"\xc0\x0c\0\x0f\0\1\0\0\0\x3c\0\x07" b"\0\x0a\2Mx\xc0\x0c")
        self.assertEqual(minimail.decode_answer(packet).records,
                         [minimail.Record("example.com", minimail.MX, 60, (10, "mx.example.com"))])

    def test_pointers_lead_backwards(self):
        for pointer in (b"\xc0\x1d", b"\xc0\x1e", b"\xc0\xff", b"\xc0\x21\1a\xc0\x1d", b"\1a\xc0\x1d", b"\xc0"):
            packet = (b"\x12\x34\x81\x80\0\1\0\1\0\0\0\0" b"\7example\3com\0\0\x0f\0\1" + pointer
                      + b"\0\1\0\1\0\0\0\1\0\4\1\2\3\4")
            with self.subTest(pointer), self.assertRaises(ValueError):
                minimail.decode_answer(packet)

    def test_odd_bytes_in_labels(self):
        """A dot or a control character within a label separates nothing and reaches no log."""
        packet = b"\3a.b\4\r\nx\\\0"
        self.assertEqual(minimail.decode_domain(packet, 0), ("a\\046b.\\013\\010x\\092", len(packet)))

    def test_every_truncation_is_an_error(self):
        packet = scripted_answer(self.QUERY, ("example.com", "CNAME", "b.test"), ("b.test", "MX", (5, "mx.b.test")),
                                 ("mx.b.test", "AAAA", "::1"))
        for size in range(len(packet)):
            with self.subTest(size), self.assertRaises(ValueError):
                minimail.decode_answer(packet[:size])

    def test_packets_that_are_no_answers(self):
        packet = bytearray(scripted_answer(self.QUERY, ("example.com", "A", "192.0.2.1")))
        for offset, value in (2, 0x01), (2, 0xA8), (5, 0), (5, 2), (7, 2), (6, 0xFF):
            changed = bytearray(packet)
            changed[offset] = value                 # a query, another opcode, no question, two, more answers than there are
            with self.subTest(offset=offset, value=value), self.assertRaises(ValueError):
                minimail.decode_answer(bytes(changed))

    def test_fuzz(self):
        """20,000 packets with a few bytes changed: decoded or ValueError, and no waiting."""
        chance = random.Random(8)
        base = [scripted_answer(self.QUERY, ("example.com", "CNAME", "b.test"), ("b.test", "MX", (5, "mx.b.test")),
                                ("mx.b.test", "AAAA", "::1"), ("mx.b.test", "A", "192.0.2.1")),
                b"\x12\x34\x81\x80\0\1\0\1\0\1\0\0" b"\7example\3com\0\0\x0f\0\1"
                b"\xc0\x0c\0\x0f\0\1\0\0\0\x3c\0\x07" b"\0\x0a\2mx\xc0\x0c"
                b"\xc0\x0c\0\6\0\1\0\0\1\0\0\x18\xc0\x0c\xc0\x0c" + b"\0\0\0\1" * 5]
        decoded = 0
        for number in range(20_000):
            packet = bytearray(base[number % 2])
            for _ in range(chance.randrange(1, 5)):
                packet[chance.randrange(len(packet))] = chance.choice((0, 1, 0xC0, 0xFF, chance.randrange(256)))
            try:
                minimail.decode_answer(bytes(packet[:chance.randrange(len(packet))] if number % 5 == 0 else packet))
                decoded += 1
            except ValueError:
                pass
        self.assertTrue(1000 < decoded < 19_000, decoded)


class ResolverTest(unittest.TestCase):
    """Each test's server is asked for example.com, whose true answer is 192.0.2.1."""

    def resolver(self, *servers, timeout=PATIENCE, attempts=1, clock=time.monotonic):
        return minimail.Resolver([server.address for server in servers], timeout=timeout, attempts=attempts, clock=clock)

    def ask(self, *servers, type=minimail.A, **options):
        return [record.data for record in self.resolver(*servers, **options).query("example.com", type)]

    @staticmethod
    def truth(query):
        return scripted_answer(query, ("example.com", "A", "192.0.2.1"))

    LIE = ("example.com", "A", "203.0.113.66")

    def test_only_the_answer_to_the_question_is_believed(self):
        def other_question(query):
            return scripted_answer(minimail.encode_query(query[0] << 8 | query[1], "example.org", minimail.A), self.LIE)

        def other_type(query):
            return scripted_answer(minimail.encode_query(query[0] << 8 | query[1], "example.com", minimail.AAAA), self.LIE)
        lies = {"wrong id": lambda query: scripted_answer(query, self.LIE, id=(query[0] << 8 | query[1]) ^ 1),
                "wrong question": other_question, "wrong type": other_type,
                "other port": lambda query: ("elsewhere", scripted_answer(query, self.LIE)),
                "garbage": lambda query: b"\xff" * 40, "empty": lambda query: b"", "the query itself": lambda query: query,
                "cut": lambda query: scripted_answer(query, self.LIE)[:-1]}
        for name, lie in lies.items():
            with self.subTest(name), ScriptedDNS(lambda query, lie=lie: [lie(query), self.truth(query)]) as server:
                self.assertEqual(self.ask(server), ["192.0.2.1"])
                self.assertEqual(len(server.queries), 1)

    def test_ids_and_ports_are_random(self):
        with ScriptedDNS(self.truth) as server:
            for _ in range(8):
                self.ask(server)
            self.assertGreater(len({query[:2] for query in server.queries}), 5)

    def test_silence_then_the_next_server(self):
        with ScriptedDNS(lambda query: None) as silent, ScriptedDNS(self.truth) as server:
            self.assertEqual(self.ask(silent, server, timeout=0.1, attempts=99), ["192.0.2.1"])     # the other may be slow

    def test_a_stream_of_lies_does_not_move_the_deadline(self):
        with ScriptedDNS(lambda query: [b"\xff" * 40] * 50) as liar:
            started = time.monotonic()
            with self.assertRaises(minimail.DNSFailure):
                self.ask(liar, timeout=0.1)
            self.assertLess(time.monotonic() - started, PATIENCE)

    def test_server_that_is_not_there(self):
        with ScriptedDNS(self.truth) as server:
            gone = mock.Mock(address=server.address)
        with self.assertRaises(minimail.DNSFailure):
            self.ask(gone)

    def test_refusals_go_to_the_next_server(self):
        for rcode in (minimail.SERVFAIL, 5, minimail.NOTIMP):
            with self.subTest(rcode), ScriptedDNS(lambda query, rcode=rcode: scripted_answer(query, rcode=rcode)) as broken, \
                    ScriptedDNS(self.truth) as server:
                self.assertEqual(self.ask(broken, server), ["192.0.2.1"])
                with self.assertRaises(minimail.DNSFailure):
                    self.ask(broken)

    def test_formerr_is_asked_again_without_edns(self):
        for bare in False, True:                    # some send no more than a header
            def old(query, bare=bare):
                if query[11] == 0:
                    return self.truth(query)
                answer = scripted_answer(query, rcode=minimail.FORMERR)
                return answer[:4] + bytes(8) if bare else answer
            with self.subTest(bare=bare), ScriptedDNS(old) as server:
                self.assertEqual(self.ask(server), ["192.0.2.1"])
                self.assertEqual([query[11] for query in server.queries], [1, 0])

    def test_truncated_answer_is_asked_over_tcp(self):
        addresses = ["192.0.2.%d" % n for n in range(200)]

        def whole(query):
            packet = scripted_answer(query, *[("example.com", "A", address) for address in addresses])
            return struct.pack(">H", len(packet)) + packet
        with ScriptedDNS(lambda query: scripted_answer(query, self.LIE, truncated=True)[:-3], whole) as server:
            self.assertEqual(self.ask(server), addresses)

    def test_tcp_that_ends_early_or_answers_something_else(self):
        def framed(packet):
            return struct.pack(">H", len(packet)) + packet

        def other_id(query):
            return scripted_answer(query, self.LIE, id=(query[0] << 8 | query[1]) ^ 1)
        for name, tcp in {"nothing": lambda query: b"", "half a length": lambda query: b"\0",
                          "half": lambda query: framed(self.truth(query))[:20],
                          "wrong id": lambda query: framed(other_id(query)),
                          "truncated again": lambda query: framed(scripted_answer(query, truncated=True))}.items():
            with self.subTest(name), ScriptedDNS(lambda query: scripted_answer(query, truncated=True), tcp) as broken, \
                    ScriptedDNS(self.truth) as server:
                self.assertEqual(self.ask(broken, server), ["192.0.2.1"])

    def test_unrelated_records_are_not_believed(self):
        with ScriptedDNS(lambda query: scripted_answer(query, ("victim.test", "A", "203.0.113.66"), self.LIE)
                         if b"other" in query else self.truth(query)) as server:
            resolver = self.resolver(server)
            self.assertEqual(resolver.query("other.test", minimail.A), [])
            self.assertEqual([record.data for record in resolver.query("example.com", minimail.A)], ["192.0.2.1"])

    def test_cnames_are_followed_in_the_answer_and_by_asking(self):
        with ScriptedDNS(lambda query: scripted_answer(query, ("example.com", "CNAME", "a.test"), ("b.test", "A", "192.0.2.9"),
                                                       ("a.test", "CNAME", "b.test"))) as server:
            self.assertEqual(self.ask(server), ["192.0.2.9"])

        def step_by_step(query):
            name = minimail.decode_domain(query, 12)[0]
            return scripted_answer(query, (name, "CNAME", "a.test")) if name == "example.com" else \
                scripted_answer(query, (name, "A", "192.0.2.8"))
        with ScriptedDNS(step_by_step) as server:
            self.assertEqual(self.ask(server), ["192.0.2.8"])

    def test_cname_chains_are_bounded(self):
        def endless(query):
            name = minimail.decode_domain(query, 12)[0]
            return scripted_answer(query, (name, "CNAME", "x" + name[:40]))
        with ScriptedDNS(endless) as server, self.assertRaises(minimail.DNSFailure):
            self.ask(server)
        self.assertLess(len(server.queries), 20)
        with ScriptedDNS(lambda query: scripted_answer(query, ("example.com", "CNAME", "example.com"))) as server:
            with self.assertRaises(minimail.DNSFailure):
                self.ask(server)

    def test_answers_are_cached_as_long_as_they_say(self):
        for ttl, held, gone in (60, 59, 61), (1, 0.9, 1.1), (1 << 30, minimail.TTL_CAP - 1, minimail.TTL_CAP + 1):
            clock = ScriptedClock()
            with self.subTest(ttl=ttl), ScriptedDNS(lambda query, ttl=ttl: scripted_answer(
                    query, ("example.com", "A", "192.0.2.1", ttl))) as server:
                resolver = self.resolver(server, clock=clock)
                for seconds, count in (0, 1), (held, 1), (gone, 2):
                    clock.now = 1_700_000_000.0 + seconds
                    resolver.query("EXAMPLE.com.", minimail.A)
                    self.assertEqual(len(server.queries), count, seconds)

    def test_nothing_is_cached_too(self):
        soa = b"\4test\0\0\6\0\1\0\0\x0e\x10\0\x16\0\0" + b"\0\0\0\1" * 4       # its last field: the negative TTL
        for rcode, seconds, authority in (3, 30, soa + b"\0\0\0\x1e"), (0, 30, soa + b"\0\0\0\x1e"), \
                (3, minimail.NEGATIVE_CAP, soa + b"\xff\xff\0\0"), (3, 5, b""), (2, 5, b""):
            clock = ScriptedClock()
            with self.subTest(rcode=rcode, seconds=seconds), ScriptedDNS(
                    lambda query, r=rcode, a=authority: scripted_answer(query, rcode=r, authority=a)) as server:
                resolver = self.resolver(server, clock=clock)
                each = 2 if rcode == 2 else 1       # once more without EDNS
                for later, count in (0, each), (seconds - 1, each), (seconds + 1, 2 * each):
                    clock.now = 1_700_000_000.0 + later
                    with contextlib.suppress(minimail.DNSError) if rcode else contextlib.nullcontext():
                        self.assertEqual(resolver.query("example.com", minimail.A), [])
                        self.assertEqual(rcode, 0)
                    self.assertEqual(len(server.queries), count, later)

    def test_what_does_not_exist_is_told_from_what_cannot_be_asked(self):
        with ScriptedDNS(lambda query: scripted_answer(query, rcode=minimail.NXDOMAIN)) as server:
            with self.assertRaises(minimail.NoSuchDomain):
                self.ask(server)
        with ScriptedDNS(lambda query: scripted_answer(query)) as server:
            self.assertEqual(self.ask(server), [])
        with self.assertRaises(minimail.NoSuchDomain):     # nobody needs to be asked about what cannot be a name
            minimail.Resolver([("127.0.0.1", 9)]).query("a..b", minimail.A)


class ScriptedServers:
    """Stands for exchange(): {host: answer(query, tcp)}, which returns a packet, or None for silence; knows who was asked what."""

    def __init__(self, **hosts):
        self.hosts = {name.replace("_", "."): answer for name, answer in hosts.items()}
        self.asked = []                             # (host, name, edns, tcp, seconds)

    def __call__(self, server, query, tcp, seconds):
        (name, _), _ = minimail.decode_question(query)
        self.asked.append((server[0], name, query[11] > 0, tcp, seconds))
        packet = self.hosts[server[0]](query, tcp)
        answer = minimail.answer_to(query, packet) if packet else None
        if answer is None:
            raise socket.timeout("timed out")
        return answer

    def resolver(self, clock=None, **options):
        return minimail.Resolver([(host, 53) for host in self.hosts], exchange=self, clock=clock or ScriptedClock(),
                                 etc="/nonexistent", **options)


OPT_RECORD = b"\0\0\x29\x04\xd0\0\0\0\0\0\0"
BAD_VERSION = b"\0\0\x29\x04\xd0\x01\0\0\0\0\0"
SOA_RECORD = b"\4test\0\0\6\0\1\0\0\x0e\x10\0\x16\0\0" + b"\0\0\0\1" * 4 + b"\0\0\0\5"      # remember it for 5 seconds
NS_RECORD = b"\4test\0\0\2\0\1\0\0\x0e\x10\0\4\2ns\0"


def scripted_packet(query, rcode=0, flags=0x8180, answer=(), authority=(), additional=()):
    """Return a response made of encoded records."""
    _, end = minimail.decode_question(query)
    counts = len(answer), len(authority), len(additional)
    return query[:2] + struct.pack(">5H", flags | rcode, 1, *counts) + query[12:end] + b"".join([*answer, *authority, *additional])


def address_record(query, address="192.0.2.1", ttl=60):
    (name, _), _ = minimail.decode_question(query)
    return minimail.encode_domain(name) + struct.pack(">HHIH", minimail.A, 1, ttl, 4) + socket.inet_aton(address)


def truth(query, tcp=False):
    return scripted_packet(query, answer=[address_record(query)])


class NameServersTest(unittest.TestCase):
    """Servers that cannot do what they should; no sockets."""

    ODD = {"no answer": lambda query: None,
           "FORMERR": lambda query: scripted_packet(query, 1), "SERVFAIL": lambda query: scripted_packet(query, 2),
           "NOTIMP": lambda query: scripted_packet(query, 4), "REFUSED": lambda query: scripted_packet(query, 5),
           "NOTAUTH": lambda query: scripted_packet(query, 9), "nothing": lambda query: scripted_packet(query, flags=0x8100),
           "BADVERS": lambda query: scripted_packet(query, additional=[BAD_VERSION]),
           "a bare header, FORMERR": lambda query: query[:2] + b"\x81\x81" + bytes(8),
           "a bare header, NOTIMP": lambda query: query[:2] + b"\x81\x84\0\1" + bytes(6),
           "garbage": lambda query: query[:2] + b"\x81\x80" + b"\xff" * 20}

    def test_the_plain_question_decides_and_that_is_remembered(self):
        for name, odd in self.ODD.items():
            clock = ScriptedClock()
            servers = ScriptedServers(one=lambda query, tcp, odd=odd: odd(query) if query[11] else truth(query))
            resolver = servers.resolver(clock)
            with self.subTest(name):
                self.assertEqual(resolver.lookup("a.test", minimail.A), ["192.0.2.1"])
                self.assertEqual(resolver.lookup("b.test", minimail.A), ["192.0.2.1"])
                clock.now += minimail.EDNS_PAUSE + 1
                resolver.lookup("c.test", minimail.A)
                self.assertEqual([asked[1:3] for asked in servers.asked],
                                 [("a.test", True), ("a.test", False), ("b.test", False), ("c.test", True), ("c.test", False)])

    def test_what_the_plain_question_does_not_mend_is_no_matter_of_edns(self):
        for name, odd in self.ODD.items():
            servers = ScriptedServers(one=lambda query, tcp, odd=odd: odd(query))
            resolver = servers.resolver(attempts=1)
            for domain in "a.test", "b.test":
                with self.subTest(name, domain=domain), self.assertRaises(minimail.DNSFailure):
                    resolver.query(domain, minimail.A)
            self.assertEqual([asked[2] for asked in servers.asked], [True, False, True, False])

    def test_no_such_domain_needs_no_second_question(self):
        servers = ScriptedServers(one=lambda query, tcp: scripted_packet(query, 3))
        with self.assertRaises(minimail.NoSuchDomain):
            servers.resolver().query("a.test", minimail.A)
        self.assertEqual(len(servers.asked), 1)

    def test_opt_stands_anywhere(self):
        for place in range(6):
            def opt(query, tcp, place=place):
                sections = [[address_record(query)], [NS_RECORD], []]
                sections[place // 2].insert(0 if place % 2 else len(sections[place // 2]), OPT_RECORD)
                return scripted_packet(query, 0, 0x8180, *sections)
            with self.subTest(place):
                servers = ScriptedServers(one=opt)
                self.assertEqual(servers.resolver().lookup("a.test", minimail.A), ["192.0.2.1"])
                self.assertEqual(len(servers.asked), 1)

    def test_nothing_behind_the_authority_section_matters_but_opt(self):
        for rubbish in b"\xff\xff", b"\0\0\1\0\1\0\0\0\0\xff\xff", b"":
            servers = ScriptedServers(one=lambda query, tcp, r=rubbish: scripted_packet(query, answer=[address_record(query)],
                                                                                        additional=[r]))
            with self.subTest(rubbish):
                self.assertEqual(servers.resolver().lookup("a.test", minimail.A), ["192.0.2.1"])

    def test_empty_answers(self):
        """(flags, authority, additional) of an empty NOERROR answer -> whether it says that there is nothing."""
        plain, recursive, authoritative = 0x8100, 0x8180, 0x8500
        for flags, authority, additional, says in (
                (plain, [], [], False), (plain, [], [OPT_RECORD], False), (plain, [OPT_RECORD], [], False),
                (recursive, [], [], True), (authoritative, [], [], True), (plain, [SOA_RECORD], [], True),
                (plain, [NS_RECORD], [], False), (recursive, [NS_RECORD], [], False), (authoritative, [NS_RECORD], [], True),
                (plain, [NS_RECORD, SOA_RECORD], [], True), (recursive, [SOA_RECORD, NS_RECORD], [], True)):
            servers = ScriptedServers(odd=lambda query, tcp, f=flags, n=authority, m=additional: scripted_packet(query, 0, f, (), n, m),
                                      good=truth)
            with self.subTest(flags=hex(flags), authority=authority, additional=additional):
                self.assertEqual(servers.resolver().lookup("a.test", minimail.A), [] if says else ["192.0.2.1"])
        servers = ScriptedServers(odd=lambda query, tcp: scripted_packet(query, flags=plain))
        for ask in (lambda resolver: resolver.mx("a.test")), (lambda resolver: resolver.addresses("a.test")):
            with self.assertRaisesRegex(minimail.DNSFailure, "says nothing"):
                ask(servers.resolver())

    def test_nothing_is_remembered_as_long_as_the_soa_says(self):
        clock = ScriptedClock()
        servers = ScriptedServers(one=lambda query, tcp: scripted_packet(query, authority=[SOA_RECORD, NS_RECORD]))
        resolver = servers.resolver(clock)
        for later, count in (0, 1), (4.9, 1), (5.1, 2):
            clock.now = 1_700_000_000.0 + later
            self.assertEqual(resolver.query("a.test", minimail.A), [])
            self.assertEqual(len(servers.asked), count)

    def test_a_ttl_of_0_is_for_those_who_asked_already(self):
        servers = ScriptedServers(one=lambda query, tcp: scripted_packet(query, answer=[address_record(query, ttl=0)]))
        resolver = servers.resolver()
        for count in 1, 2, 3:
            resolver.query("a.test", minimail.A)
            self.assertEqual(len(servers.asked), count)

    def test_a_dead_server_is_asked_last_for_a_while(self):
        clock = ScriptedClock()
        servers = ScriptedServers(dead=lambda query, tcp: None, good=truth)
        resolver = servers.resolver(clock)
        for name in "a.test", "b.test":
            resolver.query(name, minimail.A)
        clock.now += minimail.SERVER_PAUSE + 1
        servers.hosts["dead"] = truth               # it lives again
        resolver.query("c.test", minimail.A)
        resolver.query("d.test", minimail.A)
        self.assertEqual([asked[:2] for asked in servers.asked], [
            ("dead", "a.test"), ("dead", "a.test"), ("good", "a.test"), ("good", "b.test"), ("dead", "c.test"), ("dead", "d.test")])

    def test_all_are_dead(self):
        servers = ScriptedServers(one=lambda query, tcp: None, two=lambda query, tcp: None)
        resolver = servers.resolver(attempts=3, timeout=7.0)
        with self.assertRaisesRegex(minimail.DNSFailure, "two:53: timed out"):
            resolver.query("a.test", minimail.A)
        self.assertEqual([(asked[0], asked[4]) for asked in servers.asked],
                         [("one", 3.5), ("one", 7.0), ("two", 3.5), ("two", 7.0)] * 3)
        servers.hosts["one"] = truth                # a second later, nobody counts as alive: all are asked
        self.assertEqual(resolver.lookup("b.test", minimail.A), ["192.0.2.1"])

    def test_identical_questions_at_the_same_moment_are_asked_once(self):
        release, entered = threading.Event(), threading.Event()

        def slow(query, tcp):
            entered.set()
            release.wait(PATIENCE)
            return truth(query)
        servers = ScriptedServers(one=slow)
        resolver, came = servers.resolver(), []
        threads = [threading.Thread(target=lambda: came.append(resolver.lookup("a.test", minimail.A))) for _ in range(20)]
        for thread in threads:
            thread.start()
        entered.wait(PATIENCE)
        release.set()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual((came, len(servers.asked)), ([["192.0.2.1"]] * 20, 1))

    def test_an_error_of_ours_leaves_nobody_waiting(self):
        servers = ScriptedServers(one=lambda query, tcp: 1 // 0)
        resolver = servers.resolver()
        for count in 1, 2:
            with self.assertRaises(ZeroDivisionError):
                resolver.query("a.test", minimail.A)
            self.assertEqual(len(servers.asked), count)

    def test_the_cache_is_bounded_in_bytes(self):
        long = "TXT " + "x" * 20_000
        zone = minimail.Zone({"n%d.test" % number: long for number in range(200)})
        with mock.patch.object(minimail, "CACHE_BYTES", 1 << 20):
            resolver = zone.resolver()
            for number in range(200):
                self.assertEqual(resolver.lookup("n%d.test" % number, minimail.TXT), ["x" * 20_000])
            for known, number in (True, 199), (False, 0):
                zone.queries.clear()
                resolver.query("n%d.test" % number, minimail.TXT)
                self.assertEqual(zone.queries == [], known)
        self.assertLess(sum(len(str(lookup.value)) for lookup in resolver._cache.values()), 1 << 20)
        self.assertEqual(resolver._weight, sum(lookup.weight for lookup in resolver._cache.values()))

    def test_texts_and_pointers(self):
        long = "v=DKIM1; p=" + "A" * 600
        zone = minimail.Zone({"a.test": ["TXT v=spf1 -all", "TXT " + long], "1.2.0.192.in-addr.arpa": ["PTR mx.a.test."]})
        resolver = zone.resolver()
        self.assertEqual(resolver.lookup("a.test", minimail.TXT), ["v=spf1 -all", long])
        self.assertEqual(resolver.lookup("1.2.0.192.in-addr.arpa", minimail.PTR), ["mx.a.test"])
        for data in b"", b"\0", b"\1a\2bc", b"\1\xff":
            self.assertEqual(minimail.decode_strings(data), {b"": "", b"\0": "", b"\1a\2bc": "abc"}.get(data, "\ufffd"))
        with self.assertRaises(ValueError):
            minimail.decode_strings(b"\3ab")


class SystemNamesTest(ScriptedCase):
    """resolv.conf, hosts, nsswitch.conf: read anew when they change."""

    def setUp(self):
        super().setUp()
        self.etc = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.etc)

    def write(self, name, text):
        with open(os.path.join(self.etc, name + ".new"), "w") as file:
            file.write(text)
        os.replace(os.path.join(self.etc, name + ".new"), os.path.join(self.etc, name))

    def resolver(self, names=None):
        zone = minimail.Zone(names or {})
        return minimail.Resolver(exchange=zone.exchange, etc=self.etc)

    def parsed(self, text):
        self.write("resolv.conf", text)
        return minimail.Reloaded(os.path.join(self.etc, "resolv.conf"), minimail.parse_resolv_conf).get()

    def test_resolv_conf(self):
        for text, hosts, timeout, attempts, rotate, tcp in (
                ("", ["127.0.0.1"], 4.0, 2, False, False),
                ("nameserver 10.9.0.1\nnameserver  ::1 # c\n;nameserver 10.9.0.2\n#nameserver 10.9.0.3\nsearch a b\nnameserver\n",
                 ["10.9.0.1", "::1"], 4.0, 2, False, False),
                ("nameserver fe80::53%eth0\nnameserver nowhere.test\nnameserver 10.9.0.1%eth0", ["fe80::53%eth0"], 4.0, 2, False, False),
                ("options timeout:1 attempts:3\noptions rotate use-vc edns0 trust-ad\n", ["127.0.0.1"], 1, 3, True, True),
                ("options timeout:0 attempts:0", ["127.0.0.1"], 1, 1, False, False),
                ("options timeout:99999 attempts:99", ["127.0.0.1"], 30, 5, False, False),
                ("options timeout:\u00b2 attempts:x ndots:2 timeout attempts: timeout:123456789 :", ["127.0.0.1"], 4.0, 2, False, False),
                ("nameserver 10.9.0.1\n" * 9, ["10.9.0.1"] * 3, 4.0, 2, False, False)):
            with self.subTest(text):
                found = self.parsed(text)
                self.assertEqual([server.endpoint for server in found.servers], [(host, 53) for host in hosts])
                self.assertEqual((found.timeout, found.attempts, found.rotate, found.tcp), (timeout, attempts, rotate, tcp))
        self.assertIn("nowhere.test", "".join(self.logged))

    def test_rotate_begins_anywhere_and_use_vc_is_tcp(self):
        self.write("resolv.conf", "nameserver 10.9.0.1\nnameserver 10.9.0.2\nnameserver 10.9.0.3\noptions rotate use-vc\n")
        servers = ScriptedServers(**{"10_9_0_%d" % number: truth for number in (1, 2, 3)})
        resolver = minimail.Resolver(exchange=servers, etc=self.etc)
        for number in range(100):                   # by chance only one or two of them with 3 * (2/3)**100
            resolver.query("n%d.test" % number, minimail.A)
        self.assertEqual({asked[0] for asked in servers.asked}, set(servers.hosts))
        self.assertEqual({asked[3] for asked in servers.asked}, {True})

    def test_resolv_conf_that_cannot_be_read(self):
        self.write("resolv.conf", "nameserver 10.9.0.1\n")
        with mock.patch.object(minimail.Reloaded, "lines", side_effect=PermissionError(13, "Permission denied")):
            with self.assertRaisesRegex(minimail.DNSFailure, "^cannot read .*resolv.conf: Permission denied$"):
                self.resolver().query("a.test", minimail.A)

    def test_options_of_servers_given(self):
        for text, endpoint in (("fe80::53%eth0", ("fe80::53%eth0", 53)), ("[fe80::53%eth0.10]:5353", ("fe80::53%eth0.10", 5353)),
                               ("[fe80::53%br-lan]", ("fe80::53%br-lan", 53)), ("::ffff:10.9.0.1", ("10.9.0.1", 53)),
                               ("10.9.0.1:5353", ("10.9.0.1", 5353)), ("[::1]:5353", ("::1", 5353))):
            with self.subTest(text):
                self.assertEqual(minimail.parse_server(text), endpoint)
        for text in "10.9.0.1%eth0", "fe80::53%", "fe80::53%e h", "fe80::53%eth0%eth1", "fe80::53%\u00e9", "fe80::53%" + "x" * 65, "%eth0":
            with self.subTest(text), self.assertRaises(ValueError):
                minimail.parse_server(text)

    def test_hosts_come_where_the_system_says(self):
        self.write("hosts", "127.0.0.1 localhost\n10.9.0.10\tRelay.lan relay # 10.9.0.99 not.this\n#10.9.0.11 not.that\n"
                            "fe80::1%lo0 localhost\n   10.9.0.12 indented.lan\n2001:db8::7 both.lan\n10.9.0.7 both.lan\nbad bad.lan\n")
        names = {"relay.lan": ["A 192.0.2.1"], "dns.lan": ["A 192.0.2.2"], "empty.lan": [], "broken.lan": "SERVFAIL"}
        files_first = ["hosts: files dns\n", None, "passwd: files\n", "hosts:files mdns4_minimal [NOTFOUND=return] dns\n",
                       "hosts: mymachines resolve [!UNAVAIL=return] files myhostname dns\n", "hosts: files # only\n"]
        for text in files_first + ["hosts: dns files\n", "hosts: dns\n"]:
            if text is not None:
                self.write("nsswitch.conf", text)
            elif os.path.exists(os.path.join(self.etc, "nsswitch.conf")):
                os.unlink(os.path.join(self.etc, "nsswitch.conf"))
            resolver = self.resolver(names)
            with self.subTest(text):
                self.assertEqual(resolver.addresses("RELAY.lan.")[0][0], "10.9.0.10" if text in files_first else "192.0.2.1")
                self.assertEqual(resolver.addresses("dns.lan"), [("192.0.2.2", 60)])
                if text == "hosts: dns\n":
                    with self.assertRaises(minimail.NoSuchDomain):
                        resolver.addresses("relay")
                    continue
                self.assertEqual(resolver.addresses("relay"), [("10.9.0.10", 0)])
                self.assertEqual(resolver.addresses("indented.lan"), [("10.9.0.12", 0)])
                self.assertEqual(resolver.addresses("both.lan"), [("10.9.0.7", 0), ("2001:db8::7", 0)])
                for name in "not.this", "not.that", "bad.lan":
                    with self.assertRaises(minimail.NoSuchDomain):
                        resolver.addresses(name)
                with self.assertRaises(minimail.DNSFailure):
                    resolver.addresses("broken.lan")
                self.assertEqual(resolver.addresses("empty.lan"), [])

    def test_ipv4_in_ipv6_is_ipv4(self):
        resolver = self.resolver({"a.test": ["AAAA ::ffff:127.0.0.1"], "b.test": ["AAAA 2001:db8::1"]})
        self.assertEqual([resolver.addresses(host)[0][0] for host in ("a.test", "b.test", "::ffff:192.0.2.1", "2001:DB8::1")],
                         ["127.0.0.1", "2001:db8::1", "192.0.2.1", "2001:db8::1"])


class ZoneTest(unittest.TestCase):

    def test_fixture(self):
        names = {"a.test": ["MX 20 mx2.a.test", "MX 10 mx.a.test."], "mx.a.test": ["A 192.0.2.1", "AAAA 2001:db8::1"],
                 "null.test": "MX 0 .", "alias.test": ["CNAME a.test"], "fail.test": "SERVFAIL", "refused.test": "REFUSED",
                 "big.test": ["TRUNCATED"] + ["A 192.0.2.%d" % n for n in range(100)], "empty.test": [],
                 "slow.test": ["SLOW 0.05", "A 192.0.2.2"], "too-slow.test": ["SLOW 60"], "silent.test": ["SILENT"]}
        zone = minimail.Zone(names)
        resolver = zone.resolver()
        self.assertEqual(sorted(resolver.mx("a.test")), [(10, "mx.a.test", 60), (20, "mx2.a.test", 60)])
        self.assertEqual(resolver.mx("alias.test"), resolver.mx("a.test"))
        self.assertEqual(resolver.mx("null.test"), [(0, "", 60)])
        self.assertEqual([address for address, _ in resolver.addresses("mx.a.test")], ["192.0.2.1", "2001:db8::1"])
        self.assertEqual(len(resolver.addresses("big.test")), 100)
        self.assertEqual([resolver.addresses("empty.test"), resolver.mx("empty.test")], [[], []])
        started = time.monotonic()
        self.assertEqual(resolver.addresses("slow.test"), [("192.0.2.2", 60)])
        self.assertGreaterEqual(time.monotonic() - started, 0.05)
        with mock.patch.object(time, "sleep"):
            for name in "fail.test", "refused.test", "silent.test", "too-slow.test":
                with self.subTest(name), self.assertRaises(minimail.DNSFailure):
                    resolver.mx(name)
        with self.assertRaises(minimail.NoSuchDomain):
            resolver.mx("none.test")
        self.assertIn(("null.test", minimail.MX), zone.queries)


# ======================================================================================================================
# 9  Queue.  What lies where in each state, what a crash leaves, who may work on it; the command beside a running node.
# ======================================================================================================================

class QueueTest(ScriptedCase):

    def world(self, **options):
        """A world where far.test is looked up in vain."""
        return ScriptedWorld(self, {"far.test": "SERVFAIL"}, **options)

    def entry(self, world):
        entry, = world.entries()
        return entry

    def claimed(self, world, hint="new"):
        """The only entry, claimed as a worker does."""
        id = self.entry(world).id
        dispatch = minimail.Dispatch(self.entry(world), os.path.join(world.queue.root, hint, id))
        self.assertTrue(world.queue.claim(dispatch))
        self.addCleanup(world.queue.release, dispatch)
        return dispatch

    def test_states_on_disk(self):
        """The table in the section's comment, line by line, as far as no crash comes."""
        world = self.world()
        id = world.submit("bob@far.test")
        both = [id + ".env", id + ".msg"]
        self.assertEqual(world.files(), both + ["new/" + id])
        entry = self.entry(world)
        self.assertEqual((entry.id, entry.sender, entry.attempts, entry.queued_at, entry.next_attempt),
                         (id, "me@here.test", 0, world.clock.now, world.clock.now))
        dispatch = self.claimed(world)
        self.assertEqual(world.files(), both + ["new/" + id])
        self.assertFalse(world.queue.claim(minimail.Dispatch(entry)), "claimed twice")
        world.queue.postpone(dispatch, world.clock.now + 90)
        world.queue.release(dispatch)
        due = "due/%012d" % (world.clock.now + 90)
        self.assertEqual(world.files(), both + [due + "/" + id])
        self.assertEqual(world.queue.next_due(world.clock.now), world.clock.now + 90)
        self.assertEqual(self.entry(world).next_attempt, world.clock.now + 90)
        dispatch = self.claimed(world, due)
        world.queue.finish(dispatch)
        self.assertEqual(world.files(), [])

    def test_message_and_envelope(self):
        """Content byte for byte after our Received, without what is for mailboxes only; the envelope for human eyes."""
        world = self.world()
        content = "Subject: hi\r\n\r\n.dot\r\n..\r\nb\u00fccher\r\n".encode("latin-1")
        id = world.submit("bob@far.test", "here@here.test", content=content, utf8=True)
        entry = self.entry(world)
        with open(world.queue.path(id), "rb") as file:
            file.seek(entry.offset)
            sent = file.read()
        self.assertEqual(len(sent), entry.size)
        self.assertRegex(sent[:-len(content)], rb"\AReceived: [^\0]*\Z")
        self.assertTrue(sent.endswith(b"\r\n" + content))
        self.assertTrue(entry.eightbit)
        self.assertFalse(entry.smtputf8, "no UTF-8 in the headers")
        with open(world.queue.path(id, "env"), encoding="utf-8") as file:
            fields = json.load(file)
        self.assertEqual(fields["recipients"], [{"address": "bob@far.test", "state": "waiting", "last_reply": ""}])

    def test_files_are_private(self):
        """Whatever the umask of the program that uses the library."""
        self.addCleanup(os.umask, os.umask(0o022))
        world = ScriptedWorld(self, dict(FAR, **NEAR))
        id = world.submit("bob@far.test", "me@here.test")
        world.submit("eve@near.test")
        world.relay._destination(minimail.Target("far.test", "far.test")).fail(minimail.Reply(451, "4.4.1", "no"), world.clock(), [60])
        world.step()
        self.assertTrue({"busy/far.test/" + id} < set(world.files()), world.files())
        for above, directories, names in os.walk(world.queue.root):
            for name in directories + names:
                path = os.path.join(above, name)
                self.assertEqual(os.stat(path).st_mode & 0o077, 0, path)

    def test_a_message_that_is_refused_leaves_nothing(self):
        world = self.world(max_size=100)
        with self.assertRaises(Refused):
            world.submit("bob@far.test", content=LETTER * 10)
        with self.assertRaises(Refused):
            world.submit("bob@far.test", "me@here.test", content=LETTER * 10)
        self.assertEqual((world.files(), world.mail()), ([], []))

    def test_without_hard_links(self):
        """A file system that has none, in whatever words: a copy, whole and safe, and nothing of it left over when refused."""
        for name in "EPERM", "EACCES", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EMLINK":
            error = OSError(getattr(errno, name), name)
            with self.subTest(name), mock.patch.object(os, "link", side_effect=error):
                world = self.world(data=os.path.join(self.data, name))
                id = world.submit("here@here.test", "bob@far.test", content=LETTER * 999)
                with open(world.queue.path(id), "rb") as file:
                    self.assertTrue(file.read().endswith(LETTER * 999))
                self.assertEqual((len(world.mail()), world.files()), (1, [id + ".env", id + ".msg", "new/" + id]))
                world.queue.sweep()
                self.assertEqual(len(world.entries()), 1)
                with mock.patch.object(world.queue, "publish", side_effect=OSError(errno.EIO, "no")), self.assertRaises(Refused):
                    world.submit("here@here.test", "bob@far.test")
                self.assertEqual((len(world.mail()), len(world.files())), (1, 3))

    def test_calls_that_a_network_makes_twice(self):
        """The answer is lost, the file system asks its server anew, and that has done it already."""
        def twice(call):
            def wrapped(*arguments, **options):
                result = call(*arguments, **options)
                if call is not os.open:
                    return call(*arguments, **options)
                os.close(result)
                return call(*arguments, **options)
            return wrapped

        world = self.world()
        world.submit("here@here.test")              # makes the directories
        with contextlib.ExitStack() as stack:
            for call in os.open, os.link, os.replace:
                stack.enter_context(mock.patch.object(os, call.__name__, twice(call)))
            id = world.submit("here@here.test", "there@here.test", "bob@far.test", content=LETTER)
        self.assertEqual(len(world.mail()), 2)
        self.assertTrue({id + ".env", id + ".msg"} <= set(world.files()), world.files())
        with open(world.queue.path(id), "rb") as file:
            self.assertTrue(file.read().endswith(LETTER))

    def test_sweep_removes_what_the_dead_left_and_nothing_else(self):
        """Who is dead is told by the lock on ID.msg: nothing of a living one's is touched."""
        world = self.world()
        world.submit("bob@far.test")                # published: stays
        parcels = []
        for _ in range(4):
            envelope = minimail.Envelope(sender="me@here.test", recipients=[minimail.parse_address("bob@far.test")])
            parcel = world.stores.post.begin(envelope, [minimail.Destinations([], envelope.recipients)])
            parcel.draft.write(LETTER)
            parcel.draft.complete()
            parcels.append(parcel)
        for parcel in parcels[2:]:                  # the envelope is written, but not in place
            os.close(world.queue.add(parcel).draft)
        rewritten = [world.queue.path(parcels[0].draft.id, "env.0011223344.tmp"), world.queue.path("1-2-3", "env.0011223344.tmp")]
        for path in rewritten:
            with open(path, "w"):
                pass
        before = world.files()
        for parcel in parcels[1::2]:
            parcel.draft.close()                    # as its process's end does
        world.queue.sweep()
        gone = {parcels[1].draft.id + ".msg", parcels[3].draft.id + ".msg", parcels[3].draft.id + ".env.tmp", "1-2-3.env.0011223344.tmp"}
        self.assertEqual(set(before) - set(world.files()), gone)
        for parcel in parcels:
            parcel.draft.close()
        world.queue.sweep()
        self.assertEqual([len(world.files()), len(world.entries())], [3, 1])

    def test_an_entry_without_hint_is_found_at_the_next_start(self):
        """As after a power cut, or when its process was killed while the entry was in its memory only."""
        world = self.world()
        id = world.submit("bob@far.test")
        os.unlink(os.path.join(world.queue.new, id))
        self.assertEqual((list(world.queue.hints()), len(world.entries())), ([], 1))
        self.world().queue.sweep()
        self.assertEqual(list(world.queue.hints()), [os.path.join(world.queue.new, id)])

    def test_two_who_sweep_do_not_take_each_other_for_a_writer(self):
        """A draft may lie in a mailbox and in the queue: one file, and one lock."""
        world = self.world()
        here = os.path.join(self.data, "draft")
        path = world.queue.path("1-2-3")
        os.makedirs(world.queue.root, exist_ok=True)
        open(here, "w").close()
        os.link(here, path)
        locked, real = threading.Event(), minimail.lock_file

        def lock(fd, wait=False):
            got = real(fd, wait)
            locked.set()
            together.wait(0.1)                      # so that the other one comes meanwhile, if it can
            return got
        together = threading.Event()
        with mock.patch.object(minimail, "lock_file", lock):
            self.in_background(world.queue.sweep)
            self.assertTrue(locked.wait(PATIENCE))
            world.stores.storage.remove_abandoned(here)
            self.eventually(lambda: not os.path.exists(path))
        self.assertFalse(os.path.exists(here))

    def test_what_a_living_process_took_is_left_to_it(self):
        """Until it dies, which its lock tells; and what nobody knows of is found after a while, whoever lives."""
        world, other = self.world(), self.world()
        storage = world.stores.storage
        here = other.stores.storage.appear()
        self.addCleanup(storage.vanish, storage.appear())
        other.queue.submitted = lambda dispatch: True       # it is in its memory
        hint = os.path.join(world.queue.new, other.submit("bob@far.test"))

        def swept(age):
            world.queue.sweep((), age, storage.living())
            return os.path.exists(hint)
        self.assertEqual(storage.living(), {storage.token, other.stores.storage.token})
        self.assertFalse(swept(60.0))
        self.assertTrue(swept(-60.0))
        os.unlink(hint)
        os.close(here)                              # as its end does
        self.assertTrue(swept(60.0))
        self.assertEqual(storage.living(), {storage.token})

    def test_hints_at_nothing_are_removed(self):
        world = self.world()
        for directory in "new", "due/000000000100", "busy/far.test":
            os.makedirs(os.path.join(world.queue.root, directory))
            with open(os.path.join(world.queue.root, directory, "1-2-3"), "w"):
                pass
        world.step()
        self.assertEqual(world.files(), [])

    def test_a_queue_of_version_1_0(self):
        """There the envelope itself lay in new/, due/ or busy/."""
        world = ScriptedWorld(self, FAR, {"192.0.2.25": ScriptedPeer()})
        places = ["new", "due/000000000100", "busy/far.test"]
        for number, place in enumerate(places):
            id = world.submit("bob%d@far.test" % number)
            os.makedirs(os.path.join(world.queue.root, place), exist_ok=True)
            with open(world.queue.path(id, "env")) as file:
                fields = {name: value for name, value in json.load(file).items() if name not in ("age", "noted", "extra")}
            os.unlink(world.queue.path(id, "env"))
            os.unlink(os.path.join(world.queue.new, id))
            with open(os.path.join(world.queue.root, place, id), "w") as file:
                json.dump(fields, file)
        world.queue.sweep()
        self.assertEqual(len(world.entries()), len(places))
        world.step()
        self.assertEqual((sorted(message[1] for message in world.hosts["192.0.2.25"].messages), world.files()),
                         ([["<bob%d@far.test>" % number] for number in range(3)], []))

    def test_crash_between_recording_and_hinting(self):
        """The envelope says when it is due, wherever it is hinted at: it is tried again then, neither lost nor doubled."""
        world = self.world()
        world.submit("bob@far.test")
        dispatch = self.claimed(world)
        dispatch.entry.next_attempt, dispatch.entry.attempts = world.clock.now + 50, 1
        world.queue.save(dispatch)
        world.queue.release(dispatch)
        world.step()
        self.assertEqual(self.entry(world).attempts, 1)
        self.assertTrue(world.files()[2].startswith("due/"))
        world.clock.now += 5000
        world.step()
        self.assertEqual(self.entry(world).attempts, 2)

    def test_envelope_without_message(self):
        """Somebody removed ID.msg by hand: the entry is dropped, and the others go on."""
        world = ScriptedWorld(self, FAR, {"192.0.2.25": ScriptedPeer()})
        ids = [world.submit("bob@far.test") for _ in range(3)]
        os.unlink(world.queue.path(ids[1]))
        world.step()
        self.assertEqual((world.files(), len(world.hosts["192.0.2.25"].messages)), ([], 2))
        self.assertIn("no message file", " ".join(self.logged))

    def test_envelopes_that_cannot_be_read_stop_nothing(self):
        peer = ScriptedPeer()
        world = ScriptedWorld(self, FAR, {"192.0.2.25": peer})
        world.submit("bob@far.test")
        good = json.loads(self.entry(world).encode())
        bad = [b"", b"{", b"[]", b"null", b"\xff", b'{"id": 1}', b"[" * 100_000, json.dumps(dict(good, unknown=1)).encode(),
               json.dumps(dict(good, recipients=[{}])).encode(), json.dumps(dict(good, recipients=5)).encode(),
               json.dumps(dict(good, recipients=[{"address": "nonsense", "state": "waiting", "last_reply": ""}])).encode(),
               json.dumps(dict(good, recipients=[{"address": "a@b.c", "state": "waiting", "last_reply": 5}])).encode(),
               json.dumps(dict(good, next_attempt="soon")).encode(), json.dumps(dict(good, extra=1)).encode()]
        for number, text in enumerate(bad):
            for name in "0-0-%x.msg" % number, "0-0-%x.env" % number, "new/0-0-%x" % number:
                with open(os.path.join(world.queue.root, name), "wb") as file:
                    file.write(text if name.endswith("env") else b"")
        world.step()
        self.assertEqual(len(peer.messages), 1)
        self.assertEqual(len([name for name in world.files() if name.endswith(".env")]), len(bad), "left alone")
        self.assertEqual(scripted_command("queue", "--json", "--data", self.data)[0], 0)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "needs pipes with names")
    def test_a_pipe_is_no_envelope(self):
        peer = ScriptedPeer()
        world = ScriptedWorld(self, FAR, {"192.0.2.25": peer})
        world.submit("bob@far.test")
        for name in "0-0-1.msg", "new/0-0-1":
            with open(os.path.join(world.queue.root, name), "w"):
                pass
        os.mkfifo(os.path.join(world.queue.root, "0-0-1.env"))
        self.in_background(world.step)()
        self.assertEqual((len(peer.messages), "0-0-1.env" in world.files()), (1, True))

    def test_odd_names_stop_nothing(self):
        """What a file manager, a backup or a slip of the hand put there: files for directories, directories for files."""
        peer = ScriptedPeer({"connect": ["421 busy", "220 hi"]})
        world = ScriptedWorld(self, FAR, {"192.0.2.25": peer})
        world.submit("bob@far.test")
        root = world.queue.root
        for name in ("new/.DS_Store", "new/x.tmp", "new/\u00b2", "due/notes", "due/\u00b2\u00b2", "due/000000000001", "due/12", "busy/file",
                     "busy/x y/1-2-3", "due/000000000002/lost+found/x", "new/1-2-4/x", "\u00b2.msg", "x.env", "1-2-5.env/x", ".msg"):
            os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
            with open(os.path.join(root, name), "w"):
                pass
        os.symlink("nowhere", os.path.join(root, "new", "1-2-6"))
        for _ in range(3):
            world.relay._guarded(world.queue.sweep)
            world.step()
            world.clock.now += 5000
        self.assertEqual((len(peer.messages), world.entries()), (1, []))

    def test_an_error_in_a_scan_is_not_the_end(self):
        """No descriptors, say: whatever cannot be read now is looked for again, and nothing else waits for it."""
        for what in "listdir", "scandir", "open":
            peer = ScriptedPeer()
            world = ScriptedWorld(self, FAR, {"192.0.2.25": peer}, data=os.path.join(self.data, what))
            world.submit("bob@far.test")
            with self.subTest(what), mock.patch.object(os, what, side_effect=OSError(errno.EMFILE, "Too many open files")):
                with contextlib.suppress(OSError):
                    world.step()
            world.clock.now += 60
            world.step()
            self.assertEqual((len(peer.messages), world.files()), (1, []))

    def test_claim_ends_with_the_process_that_holds_it(self):
        """Another process works on an entry: nobody else does, until it is killed."""
        peer = ScriptedPeer()
        world = ScriptedWorld(self, FAR, {"192.0.2.25": peer})
        id = world.submit("bob@far.test")
        program = ("import sys; sys.path.insert(0, %r); import minimail\n"
                   "queue = minimail.Queue(minimail.Storage(%r), minimail.Config())\n"
                   "work = minimail.Dispatch(queue.read(%r)); print(queue.claim(work), flush=True); sys.stdin.read()"
                   % (COMPILED.name, self.data, id))
        with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            try:
                self.assertEqual(other.stdout.readline().strip(), b"True")
                world.step()
                self.assertEqual((peer.connections, world.files()), (0, [id + ".env", id + ".msg", "new/" + id]))
                self.assertEqual(scripted_command("queue", "drop", id, "--data", self.data)[0], 1, "it is being sent")
            finally:
                other.kill()
            other.wait()
        world.step()
        self.assertEqual((len(peer.messages), world.files()), (1, []))

    def test_relays_on_one_directory_send_everything_once(self):
        """Three at once, more messages than fit for one destination, hints moved while others look at them."""
        peer = ScriptedPeer()
        worlds = [ScriptedWorld(self, FAR, {"192.0.2.25": peer}, limit="connections=10,messages=1000") for _ in range(3)]
        with mock.patch.object(minimail, "MAX_WAITING", 5), mock.patch.object(minimail, "MAX_ACTIVE", 20):
            for number in range(90):
                worlds[number % 3].submit("bob%d@far.test" % number)

            def run(world):
                for _ in range(30):
                    world.step()
            threads = [threading.Thread(target=run, args=(world,)) for world in worlds]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
            for _ in range(90):                     # what one of them left to another that had it in hand
                if worlds[0].files():
                    worlds[0].step()
        self.assertEqual(collections.Counter(message[1][0] for message in peer.messages),
                         collections.Counter("<bob%d@far.test>" % number for number in range(90)))
        self.assertEqual(worlds[0].files(), [])

    def test_what_another_process_just_tried_is_not_tried_again(self):
        """Its hint was read before that: the envelope says that it is not due any more."""
        peer = ScriptedPeer({"RCPT": "451 later"})
        one, two = (ScriptedWorld(self, FAR, {"192.0.2.25": peer}) for _ in range(2))
        id = one.submit("bob@far.test")
        two.relay._take_up(os.path.join(two.queue.new, id), two.clock())
        one.step()
        two.step()
        self.assertEqual((peer.verbs().count("RCPT"), self.entry(one).attempts), (1, 1))

    def test_waiting_entries_are_not_in_memory(self):
        """5,000 wait for a dead destination: a bounded number is read at once, and every one stays queued."""
        world = self.world()
        id = world.submit("bob@far.test")
        text, = [entry.encode().decode() for entry in world.entries()]
        os.makedirs(os.path.join(world.queue.root, "due", "000000000001"))
        for number in range(4999):
            other = "%s%04x" % (id, number)
            os.link(world.queue.path(id), world.queue.path(other))
            with open(world.queue.path(other, "env"), "w") as file:
                file.write(text.replace(id, other))
            with open(os.path.join(world.queue.root, "due", "000000000001", other), "w"):
                pass
        most = []
        failing = world.relay.routes.resolver

        def count(name, type, query=failing.query):
            gc.collect()
            most.append(sum(isinstance(thing, minimail.Entry) for thing in gc.get_objects()))
            return query(name, type)
        failing.query = count
        with mock.patch.object(minimail, "MAX_ACTIVE", 50):
            for _ in range(3):
                world.step()
                world.clock.now += minimail.MAX_PAUSE
        self.assertEqual(len(most), 3)
        self.assertLessEqual(max(most), 110)        # as found, and as claimed
        self.assertEqual(len(world.queue.ids()), 5000)


class QueueAgeTest(ScriptedCase):
    """How old a message is: what has passed, not what the clock says."""

    def world(self, peer=None):
        world = ScriptedWorld(self, FAR, {"192.0.2.25": peer} if peer else {})
        self.steady = ScriptedClock(5000.0)
        world.queue.steady = self.steady
        return world

    def pass_time(self, world, seconds):
        world.clock.now += seconds
        self.steady.now += seconds

    def test_the_clock_is_set_by_years(self):
        """Taken in 2019, as a machine without battery believes, then NTP sets the clock: before, between or after attempts."""
        for attempts_before in range(3):
            self.logged.clear()
            shutil.rmtree(self.data, ignore_errors=True)
            world = self.world()
            world.clock.now = 1_546_300_800.0
            world.submit("bob@far.test")
            for _ in range(attempts_before):
                world.step()
                self.pass_time(world, 5000)
            world.clock.now += 7 * 365 * 86400
            for _ in range(3):
                world.step()
                self.pass_time(world, 5000)
            entry, = world.entries()
            self.assertEqual((entry.attempts, world.mail()), (attempts_before + 3, []), attempts_before)

    def test_time_that_did_pass_counts_whatever_the_clock_shows(self):
        world = self.world()
        world.submit("bob@far.test")
        for _ in range(300):
            world.step()
            self.steady.now += 3600
            world.clock.now = world.queue.next_due(world.clock()) or world.clock.now     # it goes too slowly
            if not world.entries():
                break
        self.assertEqual(len(world.mail()), 1)
        self.assertLess(self.steady.now, 5000 + 432_000 + 2 * 3600)

    def test_over_a_restart_of_the_machine(self):
        """The steady clock begins anew: then the time of day is all there is."""
        world = self.world()
        world.submit("bob@far.test")
        self.pass_time(world, 100)
        world.step()
        again = self.world()
        again.queue.boot, again.clock.now = "another", world.clock.now + 1000
        entry, = again.entries()
        self.assertEqual(again.queue.age(entry), 1100)
        again.clock.now = 0
        self.assertEqual(again.queue.age(entry), 100, "a clock that was set back makes nothing younger")

    def test_nothing_is_given_up_untried(self):
        """A machine that was off for a month tries once more before it bounces; then it bounces at once."""
        world = self.world(ScriptedPeer({"connect": "421 busy"}))
        world.submit("bob@far.test")
        self.pass_time(world, 30 * 86400)
        world.step()
        self.assertEqual((len(world.mail()), world.entries(), world.connected), (1, [], ["192.0.2.25"]))


class QueueCommandTest(ScriptedCase):
    """`minimail.py queue` beside a running node."""

    def queue(self, *arguments):
        return scripted_command("queue", *arguments, "--data", self.data)

    def listed(self):
        status, out, err = self.queue("list", "--json")
        self.assertEqual((status, err), (0, ""))
        return json.loads(out)

    def test_empty(self):
        self.assertEqual(self.queue(), (0, "", ""))
        self.assertEqual(self.listed(), [])
        status, out, err = self.queue("drop", "1-1-1")
        self.assertEqual((status, out, err.count("\n")), (1, "", 1))
        self.assertIn("1-1-1", err)
        for wrong in ("drop",), ("list", "1-1-1"), ("retry",), ("explode",):
            with self.subTest(wrong):
                status, out, err = self.queue(*wrong)
                self.assertEqual((status, out, err.count("\n")), (2, "", 1))

    def test_an_entry_that_cannot_be_read(self):
        """It is listed in a line of its own, and only `drop` can do something about it."""
        queue = self.stores(data=self.data, domain=("here.test",)).post.queue
        os.makedirs(queue.root)
        id = "00000001-00000-00000000a"
        for kind in "env", "msg":
            with open(queue.path(id, kind), "w"):
                pass
        status, out, err = self.queue()
        self.assertEqual((status, out, err.count("\n")), (0, "", 1))
        self.assertIn(id, err)
        with of_somebody_else(queue.path(id, "env")):
            status, out, err = self.queue("list", "--json")
        self.assertEqual((status, out, err.count("\n")), (0, "[]\n", 1))
        self.assertIn("Permission denied", err)
        status, out, err = self.queue("retry", id)
        self.assertEqual((status, out), (1, ""))
        self.assertIn("queue drop " + id, err)
        with open(queue.path(id, "msg"), "rb") as file:
            minimail.lock_file(file.fileno())
            status, out, err = self.queue("drop", id)
            self.assertIn("right now", err)
            self.assertEqual((status, out, sorted(os.listdir(queue.root))), (1, "", [id + ".env", id + ".msg"]))
        self.assertEqual(self.queue("drop", id)[:2], (0, ""))
        self.assertEqual(os.listdir(queue.root), [])

    def test_list_retry_flush_drop(self):
        with ScriptedPeer({"connect": ["421 busy", "421 busy", "421 busy", "220 now then"]}) as peer:
            node = minimail.Node(data=self.data, smtp="127.0.0.1:0", pop3="off", domain="here.test", hostname="mx.here.test",
                                 catch_all="all@here.test", no_sync=True, mx_port=peer.listen(), retry=[3600.0],
                                 resolver=ScriptedNames({"far.test": ["MX 1 mx.far.test"], "mx.far.test": ["A 127.0.0.1"],
                                                         "slow.test": "SERVFAIL"}))
            with node:
                scripted_dialog(node.smtp_address, "EHLO c.test", "MAIL FROM:<me@here.test>", "RCPT TO:<bob@far.test>", "DATA",
                                LETTER.decode() + ".", "MAIL FROM:<me@here.test>", "RCPT TO:<eve@slow.test>",
                                "RCPT TO:<\u00e9@slow.test>", "DATA", LETTER.decode() + ".", "QUIT")
                entries = self.eventually(lambda: [e for e in self.listed() if e["attempts"] == 1][1:] and self.listed())
                self.assertEqual(set(entries[0]), {"id", "sender", "size", "queued_at", "next_attempt", "attempts",
                                                   "recipients"})
                far = next(e for e in entries if e["recipients"][0]["address"] == "bob@far.test")
                slow = next(e for e in entries if e["recipients"][0]["address"] == "eve@slow.test")
                self.assertEqual((far["sender"], far["attempts"]), ("me@here.test", 1))
                self.assertIn("421 busy", far["recipients"][0]["last_reply"])
                self.assertAlmostEqual(far["next_attempt"] - far["queued_at"], 3600, delta=400)
                human = self.queue()[1]
                for text in far["id"], slow["id"], "<me@here.test>", "bob@far.test: ", "421 busy":
                    self.assertIn(text, human)

                self.assertEqual(self.queue("retry", far["id"]), (0, "", ""))

                def tried(id, attempts):
                    return [e for e in self.listed() if e["id"] == id and e["attempts"] == attempts]
                def at_rest():
                    """Whether the attempts have come to their ends: `flush` passes over what is being sent."""
                    with contextlib.ExitStack() as files:
                        return all(minimail.lock_file(files.enter_context(open(os.path.join(self.data, "queue", entry["id"] + ".msg"))).fileno())
                                   for entry in (far, slow))
                self.eventually(lambda: tried(far["id"], 2) and at_rest())
                self.assertEqual(tried(slow["id"], 1)[0]["next_attempt"], slow["next_attempt"], "the other was left alone")

                self.assertEqual(self.queue("flush"), (0, "", ""))
                self.eventually(lambda: tried(far["id"], 3) and tried(slow["id"], 2) and at_rest())
                self.assertEqual(self.queue("flush"), (0, "", ""))
                self.eventually(lambda: peer.messages)
                self.eventually(lambda: len(self.listed()) == 1)

                def dropped():
                    return self.queue("drop", slow["id"]) == (0, "", "")
                self.eventually(dropped)            # unless it is being tried right now
                self.assertEqual(self.listed(), [])
            self.assertEqual(node.stores, None)

    def test_a_node_sends_at_once_what_another_process_queued(self):
        """sendmail works without a node; a node that runs takes it up without delay, one that starts does so too."""
        arguments = ["sendmail", "-f", "me@here.test", "bob@far.test", "--domain", "here.test", "--data", self.data,
                     "--no-sync"]
        os.makedirs(os.path.join(self.data, "run"))     # a node was here before
        self.assertEqual(scripted_command(*arguments, stdin=b"Subject: one\n\nbody\n"), (0, "", mock.ANY))
        with ScriptedPeer() as peer:
            with minimail.Node(data=self.data, smtp="off", pop3="off", domain="here.test", no_sync=True, mx_port=peer.listen(),
                               resolver=ScriptedNames({"far.test": ["A 127.0.0.1"]})):
                self.eventually(lambda: len(peer.messages) == 1)
                self.assertEqual(scripted_command(*arguments, stdin=b"Subject: two\n\nbody\n")[0], 0)
                self.eventually(lambda: len(peer.messages) == 2)
            self.assertIn(b"Subject: two", peer.messages[1][2])


# ======================================================================================================================
# 10  Bounces.  Read by the standard library's parser.
# ======================================================================================================================

class BounceTest(ScriptedCase):

    FAILED = [{"address": "bob@far.test", "state": "failed", "remote": "mx.far.test",
               "last_reply": "mx.far.test[192.0.2.25]:25 said: 550 5.1.1 no such user"},
              {"address": "eve@gone.test", "state": "failed", "last_reply": "550 5.1.2 no such domain: gone.test"}]

    def bounce(self, failed, headers=b"Subject: hi\r\nX-Folded: a\r\n b\r\n", sender="me@here.test"):
        report = minimail.Report("mx.here.test", sender, "1-2-3", 1e9, 1e9 + 60)
        content = b"".join(minimail.report_message(report, failed, headers))
        return content, email.message_from_bytes(content, policy=email.policy.default)

    def test_reports_of_one_message_have_their_own_ids(self):
        """One recipient fails now, another later: who sees the same Message-ID again keeps the first only."""
        ids = [str(self.bounce([recipient])[1]["Message-ID"]) for recipient in self.FAILED]
        self.assertNotEqual(*ids)

    def test_report(self):
        content, report = self.bounce(self.FAILED)
        self.assertTrue(content.isascii())
        self.assertNotRegex(content, rb"(?<!\r)\n")
        self.assertEqual(report.defects, [])
        self.assertEqual((report.get_content_type(), report.get_param("report-type")), ("multipart/report", "delivery-status"))
        self.assertEqual((report["To"], report["Auto-Submitted"]), ("me@here.test", "auto-replied"))
        self.assertIn("@mx.here.test", report["From"])
        self.assertEqual(email.utils.parsedate_to_datetime(str(report["Date"])).timestamp(), 1e9 + 60)
        self.assertTrue(report["Message-ID"] and report["Subject"] and report["MIME-Version"] == "1.0")
        text, status, headers = report.iter_parts()
        for words in "bob@far.test", "550 5.1.1 no such user", "eve@gone.test", "no such domain: gone.test":
            self.assertIn(words, text.get_content())
        self.assertEqual(status.get_content_type(), "message/delivery-status")
        whole, bob, eve = status.get_payload()
        self.assertEqual(whole["Reporting-MTA"], "dns; mx.here.test")
        self.assertEqual(email.utils.parsedate_to_datetime(whole["Arrival-Date"]).timestamp(), 1e9)
        self.assertEqual(bob.items(), [("Final-Recipient", "rfc822; bob@far.test"), ("Action", "failed"), ("Status", "5.1.1"),
                                       ("Remote-MTA", "dns; mx.far.test"),
                                       ("Diagnostic-Code", "smtp; 550 5.1.1 no such user")])
        self.assertEqual((eve["Status"], eve["Remote-MTA"]), ("5.1.2", None))
        self.assertEqual(headers.get_content_type(), "text/rfc822-headers")
        original = email.message_from_string(headers.get_content(), policy=email.policy.default)
        self.assertEqual((original["Subject"], original["X-Folded"]), ("hi", "a b"))

    def test_utf8_variant(self):
        """RFC 6533, when an address or a header needs it."""
        content, report = self.bounce([dict(self.FAILED[0], address="b\u00f6b@far.test")])
        text, status, original = report.iter_parts()
        self.assertEqual((status.get_content_type(), original.get_content_type()),
                         ("message/global-delivery-status", "message/global-headers"))
        self.assertIn("Final-Recipient: utf-8; b\u00f6b@far.test".encode(), content)
        self.assertIn("<b\u00f6b@far.test>", text.get_content())
        for part in report, text, status:
            self.assertEqual(part["Content-Transfer-Encoding"], "8bit", part.get_content_type())

    def test_8bit_headers_are_returned_as_they_were(self):
        for raw in "Subject: B\u00fccher\r\n".encode(), b"Subject: B\xfccher\r\n":
            content, report = self.bounce(self.FAILED, raw)
            self.assertIn(raw.strip(), content)
            self.assertEqual((report["Content-Transfer-Encoding"], list(report.iter_parts())[2]["Content-Transfer-Encoding"]),
                             ("8bit", "8bit"))

    def test_what_is_said_in_utf8_is_declared(self):
        """A peer's reply may hold anything printable; an ASCII sender must still get the bounce through any server."""
        content, report = self.bounce([dict(self.FAILED[0], last_reply="mx said: 550 5.1.1 Empf\u00e4nger unbekannt")])
        if not content.isascii():
            self.assertEqual(report["Content-Transfer-Encoding"], "8bit")
            self.assertEqual(next(report.iter_parts()).get_content_charset(), "utf-8")
        world = ScriptedWorld(self, FAR, {"192.0.2.25": ScriptedPeer({"RCPT": "550 5.1.1 Empf\u00e4nger unbekannt"}),
                                          "192.0.2.26": ScriptedPeer(extensions=["8BITMIME"])})
        world.relay.routes.resolver.zone.names.update({"near.test": ["A 192.0.2.26"]})
        world.submit("bob@far.test", sender="me@near.test")
        world.step()
        world.step()
        self.assertEqual(len(world.hosts["192.0.2.26"].messages), 1, "the bounce was lost")

    def test_lines_are_short_enough(self):
        content, _ = self.bounce([dict(self.FAILED[0], last_reply="mx.far.test said: 550 5.1.1 " + "no " * 330)])
        self.assertLessEqual(max(map(len, content.split(b"\r\n"))), 998)

    def test_status_when_time_is_up(self):
        for reply, expired, status in ("451 4.4.1 cannot connect", True, "[45].4.1"), ("", True, "[45].[0-9].[0-9]"), \
                ("x said: 550 no", None, "5.0.0"):
            failed = dict(self.FAILED[1], last_reply=reply)
            failed.update({"expired": True} if expired else {})
            part = list(self.bounce([failed])[1].iter_parts())[1].get_payload()[1]
            self.assertRegex(part["Status"], status)
            self.assertTrue(part["Diagnostic-Code"])

    def test_boundary_cannot_be_guessed_from_the_message(self):
        first = re.search(rb'boundary="(.*?)"', self.bounce(self.FAILED)[0]).group(1)
        _, report = self.bounce(self.FAILED, b"Subject: hi\r\nX: --" + first + b"--\r\n")
        self.assertEqual(len(list(report.iter_parts())), 3)

    def bounced(self, *recipients, sender="me@here.test", utf8=False, **script):
        world = ScriptedWorld(self, FAR, {"192.0.2.25": ScriptedPeer(dict({"RCPT": "550 5.1.1 no such user"}, **script))})
        world.submit(*recipients, sender=sender, content=LETTER + b"secret\r\n", utf8=utf8)
        world.step()
        return world

    def test_goes_to_the_sender(self):
        world = self.bounced("bob@far.test", "eve@far.test")
        report, = world.mail()
        self.assertEqual(report["Return-Path"], "<>")
        self.assertEqual([part["Final-Recipient"] for part in list(report.iter_parts())[1].get_payload()[1:]],
                         ["rfc822; bob@far.test", "rfc822; eve@far.test"])
        self.assertIn("Subject: hi", list(report.iter_parts())[2].get_content())
        self.assertNotIn("Return-Path", list(report.iter_parts())[2].get_content())
        self.assertNotIn("secret", report.as_string())
        self.assertEqual(world.files(), [])

    def test_only_about_what_failed(self):
        world = ScriptedWorld(self, FAR, {"192.0.2.25": ScriptedPeer({"RCPT TO:<eve@far.test>": "550 5.1.1 no such user",
                                                                      "RCPT TO:<sam@far.test>": "451 4.2.0 later"})})
        world.submit("bob@far.test", "eve@far.test", "sam@far.test")
        world.step()
        report, = world.mail()
        self.assertEqual([part["Final-Recipient"] for part in list(report.iter_parts())[1].get_payload()[1:]],
                         ["rfc822; eve@far.test"])
        self.assertEqual([r["address"] for entry in world.entries() for r in entry.recipients], ["sam@far.test"])

    def test_a_bounce_is_never_bounced(self):
        world = self.bounced("bob@far.test", sender="")
        self.assertEqual((world.mail(), world.files()), ([], []))

    def test_a_bounce_to_nobody_we_know_goes_to_postmaster(self):
        world = ScriptedWorld(self, FAR, {"192.0.2.25": ScriptedPeer({"RCPT": "550 no"})}, catch_all=None)
        world.submit("bob@far.test", sender="cron@here.test")
        world.step()
        report, = world.mail("postmaster@here.test")
        self.assertEqual((report["To"], world.files()), ("cron@here.test", []))
        self.assertIn("postmaster", " ".join(self.logged))

    def test_no_mail_ends_without_a_line_in_the_log(self):
        for sender, options in ("", {}), ("x@elsewhere.test", {"relay_to": ["far.test"]}):
            self.logged.clear()
            world = ScriptedWorld(self, FAR, {"192.0.2.25": ScriptedPeer({"RCPT": "550 no"})}, data=os.path.join(self.data, "x" + sender), **options)
            world.submit("bob@far.test", sender=sender)
            world.step()
            self.assertTrue([line for line in self.logged if line.startswith("dropped") and "bob@far.test" in line], self.logged)

    def test_status_is_the_replys_not_an_addresss(self):
        for reply, status in {"550 no": "5.0.0", "550 5.1.1 no 4.2.2": "5.1.1", "554 rejected, see 5.7.26": "5.0.0", "550 your address 127.5.9.9": "5.0.0",
                              "553 192.5.1.1": "5.0.0"}.items():
            world = ScriptedWorld(self, {"far.test": ["MX 1 mx.far.test"], "mx.far.test": ["A 127.5.9.9"]},
                                  {"127.5.9.9": ScriptedPeer({"RCPT": reply})}, data=os.path.join(self.data, reply))
            world.submit("bob@far.test")
            world.step()
            report, = world.mail()
            self.assertEqual(list(report.iter_parts())[1].get_payload()[1]["Status"], status, reply)
            self.assertEqual(minimail.status_code({"last_reply": "mx[127.5.9.9]:25 said: " + reply}), status)

    def test_nobody_is_bounced_to_where_we_may_not_relay(self):
        world = ScriptedWorld(self, FAR, {"192.0.2.25": ScriptedPeer({"RCPT": "550 no"})}, relay_to=["far.test"])
        world.submit("bob@far.test", sender="victim@elsewhere.test")
        world.step()
        self.assertEqual((world.files(), world.mail()), ([], []))

    def test_the_entry_stays_while_the_bounce_cannot_be_stored(self):
        world = ScriptedWorld(self, FAR, {"192.0.2.25": ScriptedPeer({"RCPT": "550 no"})})
        world.submit("bob@far.test")
        with mock.patch.object(world.stores.mailboxes, "open_draft", side_effect=OSError(errno.ENOSPC, "full")):
            world.step()
        self.assertEqual((len(world.entries()), world.mail()), (1, []))
        world.clock.now += 3600
        world.step()
        self.assertEqual((len(world.entries()), len(world.mail())), (0, 1))

    def test_the_entry_stays_while_nobody_can_tell_who_lives_here(self):
        hosts = {"192.0.2.25": ScriptedPeer({"RCPT": "550 no"})}
        ScriptedWorld(self, FAR).submit("bob@far.test")
        users = os.path.join(self.data, "users")
        os.mkdir(users)
        world = ScriptedWorld(self, FAR, hosts)     # after a restart
        world.step()
        self.assertEqual((len(world.entries()), world.mail()), (1, []))
        os.rmdir(users)
        world.clock.now += 3600
        world.step()
        self.assertEqual((world.files(), len(world.mail())), ([], 1))


# ======================================================================================================================
# 11  SMTP client.  Against a peer that fails at every stage.
# ======================================================================================================================

class ClientTest(ScriptedCase):

    CONTENT = b"Subject: hi\r\n\r\nbody\r\n"

    def greeted(self, script=None, timeout=PATIENCE, hostname="mx.here.test", **options):
        """Return (client, scripted peer) after the greeting; PeerFailed."""
        scripted = ScriptedPeer(script, **options)
        client = minimail.Peer(scripted.connect(), "mx.far.test[192.0.2.25]:25", hostname, timeout)
        self.addCleanup(client.wire.close)
        run_peer(client, client.greet())
        return client, scripted

    def message(self, content=CONTENT, recipients=("bob@far.test",), sender="me@here.test", eightbit=False, smtputf8=False,
                before=b""):
        """Return the Outgoing of a message that stands in its file behind `before`."""
        file = tempfile.TemporaryFile()
        self.addCleanup(file.close)
        file.write(before + content)
        file.flush()
        return minimail.Outgoing(file.fileno(), len(before), len(content), sender, list(recipients), eightbit, smtputf8)

    def send(self, script=None, timeout=PATIENCE, extensions=("PIPELINING", "8BITMIME", "SMTPUTF8", "SIZE 10000000"),
             **message):
        """Return ({recipient: "code enhanced"}, scripted peer); PeerFailed."""
        client, scripted = self.greeted(script, timeout, extensions=extensions)
        replies = run_peer(client, client.send(self.message(**message)))
        run_peer(client, client.quit())
        return {recipient: ("%d %s" % reply[:2]).strip() for recipient, reply in replies.items()}, scripted

    BOTH = {"pipelining": ("PIPELINING", "8BITMIME", "SIZE"), "one by one": ("8BITMIME", "SIZE")}

    def test_a_session(self):
        replies, peer = self.send({"end": "250 2.6.0 queued as 42"}, recipients=("bob@far.test", "eve@far.test"))
        self.assertEqual(replies, {"bob@far.test": "250 2.6.0", "eve@far.test": "250 2.6.0"})
        self.assertEqual(peer.lines, ["EHLO mx.here.test", "MAIL FROM:<me@here.test> SIZE=%d" % len(self.CONTENT),
                                      "RCPT TO:<bob@far.test>", "RCPT TO:<eve@far.test>", "DATA", "QUIT"])
        self.assertEqual(peer.messages, [("<me@here.test> SIZE=%d" % len(self.CONTENT), ["<bob@far.test>", "<eve@far.test>"],
                                          self.CONTENT)])

    def test_pipelining_only_where_it_is_offered(self):
        for name, extensions in self.BOTH.items():
            with self.subTest(name):
                _, peer = self.send(extensions=extensions, recipients=("bob@far.test", "eve@far.test"))
                together = [block for block in peer.batches if block.startswith(b"MAIL") and block.endswith(b"DATA\r\n")]
                self.assertEqual(len(together), 1 if "PIPELINING" in extensions else 0)
                if not together:
                    self.assertIn(b"RCPT TO:<eve@far.test>\r\n", peer.batches)

    def test_name_without_a_dot_is_told_as_a_literal(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = socket.create_connection(listener.getsockname())
            scripted = ScriptedPeer()
            scripted._start(listener.accept()[0])
            client = minimail.Peer(theirs, "x", "localhost", PATIENCE)
            run_peer(client, client.greet())
            run_peer(client, client.quit())
        self.assertEqual(scripted.lines[0], "EHLO [127.0.0.1]")

    def test_helo_where_ehlo_is_refused(self):
        client, peer = self.greeted({"EHLO": "502 5.5.1 what?"})
        self.assertEqual((peer.lines, client.extensions), (["EHLO mx.here.test", "HELO mx.here.test"], {}))
        self.assertEqual(run_peer(client, client.send(self.message()))["bob@far.test"].code, 250)
        self.assertEqual(peer.lines[2], "MAIL FROM:<me@here.test>")

    def fails(self, script, timeout=PATIENCE, **message):
        """Return the reply of the PeerFailed that the conversation ends in."""
        with self.assertRaises(minimail.PeerFailed) as caught:
            self.send(script, timeout, **message)
        return caught.exception.reply

    def test_greetings(self):
        """A host that does not want to talk speaks for itself, and for now: never 5xx."""
        for greeting, code in ("421 4.3.2 busy\nDROP", 421), ("554 no service", 450), ("554-a\n554 5.3.2 b", 450), ("450 later", 450), \
                ("DROP", 451), ("hello there\nDROP", 451), ("354 what", 450), (b"\0" * 100 + b"\r\n", 451), ("999 what", 451), \
                ("SSH-2.0-OpenSSH\nDROP", 451), ("\nDROP", 451):
            with self.subTest(greeting):
                self.assertEqual(self.fails({"connect": greeting}, 0.2 if isinstance(greeting, bytes) else PATIENCE).code, code)
        reply = self.fails({"connect": "554 no service"})
        self.assertEqual((reply.enhanced, reply.text), ("4.3.2", "mx.far.test[192.0.2.25]:25 said: 554 no service"))
        self.assertEqual(self.fails({"connect": "554 5.7.1 no service"}).enhanced, "4.7.1")

    def test_both_ehlo_and_helo_refused(self):
        self.assertEqual(self.fails({"EHLO": "550 5.7.1 go away", "HELO": "550 5.7.1 go away"}).code, 450)
        self.assertEqual(self.fails({"EHLO": "DROP"}).code, 451)

    def test_connection_lost_at_each_verb(self):
        for name, extensions in self.BOTH.items():
            for stage in "MAIL", "RCPT", "DATA", "end":
                with self.subTest(name + " " + stage):
                    reply = self.fails({stage: "DROP"}, extensions=extensions)
                    self.assertEqual(reply.code, 451)
                    self.assertIn("connection lost", reply.text)

    def test_silence_at_each_verb(self):
        with mock.patch.object(minimail, "FINAL_WAIT", 0.05):
            for stage in "connect", "EHLO", "MAIL", "RCPT", "DATA", "end":
                with self.subTest(stage):
                    reply = self.fails({stage: "SILENT"}, timeout=0.05)
                    self.assertEqual((reply.code, reply.enhanced), (451, "4.4.2"))
                    self.assertIn("timeout", reply.text)

    def test_the_final_dot_may_be_thought_about_for_ten_minutes(self):
        """Whatever --timeout says below that (RFC 5321 section 4.5.3.2.6)."""
        client, peer = self.greeted(timeout=50.0)
        with mock.patch.object(client.wire, "renew") as renew:
            run_peer(client, client.send(self.message()))
        self.assertEqual(renew.call_args[0], (550.0,))

    def test_dripping_does_not_move_the_deadline(self):
        ours, theirs = socket.socketpair()
        client = minimail.Peer(theirs, "x", "mx.here.test", 0.1)
        stop = threading.Event()

        def drip():
            with contextlib.suppress(OSError):
                while not stop.wait(0.02):
                    ours.sendall(b"2")
        dripping = threading.Thread(target=drip)
        dripping.start()
        started = time.monotonic()
        with self.assertRaises(minimail.PeerFailed):
            run_peer(client, client.greet())
        self.assertLess(time.monotonic() - started, PATIENCE)
        stop.set()
        dripping.join(PATIENCE)
        for sock in ours, client.wire:
            sock.close()

    def test_replies_that_are_none(self):
        garbage = {"not a reply": b"hello\r\n", "three digits only in part": b"25 ok\r\n", "code out of range": b"999 ok\r\n",
                   "no end": b"250 " + b"x" * 90_000, "no last line": b"250-x\r\n" * 1000, "too long": b"250-x\r\n" * 20_000,
                   "binary": bytes(range(256)) + b"\r\n", "a superscript": "\u00b2\u00b2\u00b2 ok\r\n".encode(), "digits only": b"2500\r\n"}
        with mock.patch.object(minimail, "FINAL_WAIT", 0.1), mock.patch.object(minimail, "MAX_REPLY", 100_000):
            for stage in "EHLO", "MAIL", "end":
                for name, raw in garbage.items():
                    with self.subTest(name, stage=stage):
                        reply = self.fails({stage: raw}, timeout=0.1 if name not in ("too long", "code out of range") else PATIENCE,
                                           extensions=["SIZE"])
                        self.assertEqual(reply.code, 451)
                        self.assertLess(len(reply.text), 1000)
                        self.assertTrue(reply.text.isprintable())

    REPLIES = {                                     # what a peer says at the final dot, what comes of it, and how much is kept
        "3,000 bytes": (b"250 " + b"x" * 3000, "250 2.0.0"), "100,000 bytes": (b"550 5.7.1 " + b"x" * 100_000, "550 5.7.1"),
        "150 lines": (b"550-no\r\n" * 149 + b"550 5.7.1 no", "550 5.7.1"), "a line longer than any": (b"250-" + b"x" * 9000 + b"\r\n250 ok", "250 2.0.0"),
        "different codes": (b"250-a\r\n550-b\r\n451 4.3.0 c", "451 4.3.0"), "the last counts": (b"550-a\r\n250 b", "250 2.0.0"),
        "no text": (b"250", "250 2.0.0"), "a blank only": (b"250 ", "250 2.0.0"), "no text in several": (b"550-\r\n550", "550 5.0.0"),
        "an empty line before": (b"\r\n250 ok", "250 2.0.0"), "noise between": (b"550-a\r\nwhat?\r\n\r\n550 5.1.0 b", "550 5.1.0"),
        "bare LF": (b"250-a\n250 b", "250 2.0.0"), "Latin-1": (b"550 5.1.1 Empf\xe4nger", "550 5.1.1"), "a NUL": (b"550 5.1.1 a\0b", "550 5.1.1"),
        "CR CR LF": (b"250 ok\r", "250 2.0.0"), "a tab": (b"250\tok\r\n250 ok", "250 2.0.0"), "code of another class": (b"550 4.7.1 no", "550 5.0.0")}

    def test_replies_of_any_shape(self):
        """As Postfix reads them."""
        for name, (raw, expected) in self.REPLIES.items():
            for stage in "end", "RCPT":
                with self.subTest(name, stage=stage):
                    client, peer = self.greeted({stage: raw + b"\r\n", "DATA": "354 go"})
                    reply = run_peer(client, client.send(self.message()))["bob@far.test"]
                    if expected[0] == "2" and stage == "RCPT":
                        self.assertEqual(reply.code, 250)
                    else:
                        self.assertEqual("%d %s" % reply[:2], expected)
                    self.assertLess(len(reply.text), 100 * 520)
                    self.assertTrue(reply.text.isprintable())

    def test_greeting_and_hello_of_any_shape(self):
        for script in {"connect": b"\r\n220 hi\r\n"}, {"connect": b"*** noise\r\n220-a\r\n220\r\n"}, {"EHLO": b"250\r\n"}, \
                {"EHLO": b"250-x\r\n" * 300 + b"250 y\r\n"}, {"connect": b"220 " + b"x" * 5000 + b"\r\n"}, {"HELO": b"250\n", "EHLO": "502 no"}:
            with self.subTest(script):
                self.assertEqual(self.send(script)[0], {"bob@far.test": "250 2.0.0"})

    def test_what_is_said_before_the_connection_is_closed_in_mid_content(self):
        """A 552 is a refusal, not a lost connection that is tried again for five days."""
        content = b"Subject: big\r\n\r\n" + (b"x" * 68 + b"\r\n") * 200_000
        for said, expected in (b"552 5.3.4 too large\r\n", 552), (b"452 4.3.1 full\r\n", 452), (b"", 451), (b"250 what\r\n", 451), (b"421 bye\r\n", 421):
            with self.subTest(said), socket.create_server(("127.0.0.1", 0)) as listener:
                client = minimail.Peer(socket.create_connection(listener.getsockname()), "x", "mx.here.test", PATIENCE)
                self.addCleanup(client.wire.close)
                peer, _ = listener.accept()
                with peer, peer.makefile("rb") as file:
                    def serve(said=said, peer=peer, file=file):
                        for answer in b"220 hi", b"250 x", b"250 ok", b"250 ok", b"354 go":
                            peer.sendall(answer + b"\r\n")
                            file.readline()
                        file.read(200_000)
                        peer.sendall(said)
                        file.close()
                        peer.close()
                    serving = threading.Thread(target=serve)
                    serving.start()
                    try:
                        run_peer(client, client.greet())
                        reply = run_peer(client, client.send(self.message(content)))["bob@far.test"]
                        self.assertTrue(client.broken)
                    except minimail.PeerFailed as failed:
                        reply = failed.reply
                    serving.join(PATIENCE)
                self.assertEqual(reply.code, expected)

    def test_pipelining_never_fills_both_windows(self):
        """RFC 2920 section 3.1: a peer that answers each command before it reads the next, over the smallest buffers there are."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            ours = socket.socket()
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            ours.connect(listener.getsockname())
            theirs, _ = listener.accept()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        peer = ScriptedPeer({"RCPT": "250-%s\n250 ok" % ("x" * 50)})       # a kernel may take 0.2 s for each window that was full
        peer._start(theirs)
        client = minimail.Peer(ours, "x", "mx.here.test", PATIENCE)
        self.addCleanup(client.wire.close)
        run_peer(client, client.greet())
        people = ["somebody-with-a-rather-long-name-%d@far.test" % number for number in range(300)]
        replies = run_peer(client, client.send(self.message(recipients=people), 1000))
        self.assertEqual({reply.code for reply in replies.values()}, {250})
        self.assertLessEqual(max(map(len, peer.batches)), 65536)

    def test_421_ends_it_anywhere(self):
        for stage in "EHLO", "MAIL", "RCPT", "DATA", "end":
            with self.subTest(stage):
                self.assertEqual(self.fails({stage: "421 4.3.2 shutting down\nDROP"}).code, 421)

    def test_what_is_said_to_one_recipient_is_about_that_one(self):
        """421 may be, too; who means all of them closes, and then its words are the reason."""
        people = "bob@far.test", "eve@far.test", "sam@far.test"
        for name, extensions in self.BOTH.items():
            for words, expected in ("421 4.7.0 slow down", "421 4.7.0"), ("600 what", "451 4.5.0"), ("150 what", "451 4.5.0"):
                with self.subTest(name, words=words):
                    replies, peer = self.send({"RCPT TO:<eve@far.test>": words}, extensions=extensions, recipients=people)
                    self.assertEqual(replies, {people[0]: "250 2.0.0", people[1]: expected, people[2]: "250 2.0.0"})
                    self.assertEqual([message[1] for message in peer.messages], [["<bob@far.test>", "<sam@far.test>"]])
            for last in people:
                with self.subTest(name, last=last):
                    reply = self.fails({"RCPT TO:<%s>" % last: "421 4.7.0 slow down\nDROP"}, extensions=extensions,
                                       recipients=people)
                    self.assertEqual((reply.code, reply.text), (421, "mx.far.test[192.0.2.25]:25 said: 421 4.7.0 slow down"))

    def test_refusals_at_each_verb(self):
        for name, extensions in self.BOTH.items():
            for stage in "MAIL", "RCPT", "DATA", "end":
                for code, enhanced in ("451", "4.3.0"), ("550", "5.7.1"):
                    with self.subTest(name, stage=stage, code=code):
                        replies, peer = self.send({stage: "%s %s no" % (code, enhanced)}, extensions=extensions,
                                                  recipients=("bob@far.test", "eve@far.test"))
                        self.assertEqual(set(replies.values()), {"%s %s" % (code, enhanced)})
                        self.assertEqual((peer.messages, len(peer.contents)), ([], stage == "end"))

    def test_a_reply_keeps_its_words_and_says_whose_they_are(self):
        client, _ = self.greeted({"end": "550-5.7.1 first line\n550 5.7.1 second"})
        reply = run_peer(client, client.send(self.message()))["bob@far.test"]
        self.assertEqual(reply, (550, "5.7.1", "mx.far.test[192.0.2.25]:25 said: 550 5.7.1 first line / second", False))

    def test_a_reply_for_each_recipient(self):
        for name, extensions in self.BOTH.items():
            with self.subTest(name):
                script = {"RCPT TO:<eve@far.test>": "550 5.1.1 who?", "RCPT TO:<sam@far.test>": "450 4.2.1 later"}
                replies, peer = self.send(script, extensions=extensions,
                                          recipients=("bob@far.test", "eve@far.test", "sam@far.test"))
                self.assertEqual(replies, {"bob@far.test": "250 2.0.0", "eve@far.test": "550 5.1.1",
                                           "sam@far.test": "450 4.2.1"})
                self.assertEqual([message[1] for message in peer.messages], [["<bob@far.test>"]])

    def test_354_after_all_recipients_were_refused(self):
        """RFC 2920 section 3.1: then the content is empty, and nothing of the message is sent."""
        client, peer = self.greeted({"RCPT TO:<eve@far.test>": "550 5.1.1 who?", "DATA": "354 go", "end": "554 nobody"})
        self.assertEqual(run_peer(client, client.send(self.message(recipients=["eve@far.test"])))["eve@far.test"].code, 550)
        self.assertEqual(peer.contents, [b"\r\n"])  # the line before the dot is DATA's
        peer.script["end"] = "250 ok"
        self.assertEqual(run_peer(client, client.send(self.message()))["bob@far.test"].code, 250, "the connection is out of step")
        self.assertEqual([message[2] for message in peer.messages], [self.CONTENT])

    def test_a_2xx_to_data_is_no_delivery(self):
        """Only a 354, then a 2xx after the content, takes the message over."""
        for name, extensions in self.BOTH.items():
            for answer in "250 ok", "220 what":
                with self.subTest(name, answer=answer):
                    try:
                        replies, peer = self.send({"DATA": answer}, extensions=extensions)
                    except minimail.PeerFailed as failed:
                        self.assertEqual(failed.reply.code // 100, 4)
                    else:
                        self.assertEqual(replies["bob@far.test"][0], "4")
                        self.assertEqual(peer.messages, [])

    def test_any_3xx_to_data_asks_for_the_content(self):
        """RFC 5321 section 4.2.1: the first digit decides."""
        for name, extensions in self.BOTH.items():
            with self.subTest(name):
                replies, peer = self.send({"DATA": "350 go"}, extensions=extensions)
                self.assertEqual(replies, {"bob@far.test": "250 2.0.0"})
                self.assertEqual([message[2] for message in peer.messages], [self.CONTENT])

    def test_a_3xx_after_the_content_is_no_delivery(self):
        self.assertEqual(self.send({"end": "354 more"})[0]["bob@far.test"][0], "4")

    def test_refused_then_closed_is_refused(self):
        """Many servers hang up after a 5xx: what they said counts, and is not forgotten for a lost connection."""
        for name, extensions in self.BOTH.items():
            for stage in "MAIL", "RCPT", "DATA", "end":
                with self.subTest(name, stage=stage):
                    replies, _ = self.send({stage: "550 5.7.1 blocked\nDROP"}, extensions=extensions)
                    self.assertEqual(replies, {"bob@far.test": "550 5.7.1"})

    def test_452_on_some_recipients_takes_another_transaction(self):
        for name, extensions in self.BOTH.items():
            with self.subTest(name):
                replies, peer = self.send({"RCPT TO:<eve@far.test>": ["452 4.5.3 too many", "250 ok"]}, extensions=extensions,
                                          recipients=("bob@far.test", "eve@far.test"))
                self.assertEqual(set(replies.values()), {"250 2.0.0"})
                self.assertEqual([message[1] for message in peer.messages], [["<bob@far.test>"], ["<eve@far.test>"]])
        for refusal in "452 4.5.3", "550 5.5.3":
            replies, peer = self.send({"RCPT": refusal + " too many"})
            self.assertEqual((replies, peer.verbs().count("MAIL")), ({"bob@far.test": refusal}, 1))

    def test_what_one_transaction_delivered_is_not_forgotten_in_the_next(self):
        """The connection is lost in the second transaction: the first one's recipients have the message."""
        client, peer = self.greeted({"RCPT TO:<eve@far.test>": "452 4.5.3 too many", "MAIL": ["250 ok", "DROP"]})
        replies = run_peer(client, client.send(self.message(recipients=("bob@far.test", "eve@far.test"))))
        self.assertEqual((replies["bob@far.test"].code, replies["eve@far.test"].code // 100), (250, 4))

    def test_too_large_for_the_peer(self):
        replies, peer = self.send(extensions=["SIZE 20"])
        self.assertEqual((replies, peer.verbs()), ({"bob@far.test": "552 5.3.4"}, "EHLO QUIT"))
        for size in "SIZE 0", "SIZE", "SIZE x", "SIZE %d" % len(self.CONTENT):
            with self.subTest(size):
                self.assertEqual(self.send(extensions=[size])[0], {"bob@far.test": "250 2.0.0"})

    def test_8bit_content(self):
        replies, peer = self.send(extensions=["SIZE"], content=b"\r\n\xff\r\n", eightbit=True)
        self.assertEqual((replies, peer.verbs()), ({"bob@far.test": "554 5.6.3"}, "EHLO QUIT"))
        replies, peer = self.send(extensions=["8BITMIME"], content=b"\r\n\xff\r\n", eightbit=True)
        self.assertEqual(peer.messages, [("<me@here.test> BODY=8BITMIME", ["<bob@far.test>"], b"\r\n\xff\r\n")])
        self.assertNotIn("BODY", " ".join(self.send(extensions=["8BITMIME"])[1].lines))

    def test_utf8_addresses(self):
        """An address with UTF-8 left of the @ needs SMTPUTF8; right of it, A-labels do for everybody."""
        people = ("b\u00f6b@far.test", "bob@b\u00fccher.test")
        replies, peer = self.send(extensions=["8BITMIME"], recipients=people, sender="me@b\u00fccher.test")
        self.assertEqual(replies, {people[0]: "553 5.6.7", people[1]: "250 2.0.0"})
        self.assertEqual(peer.messages[0][:2], ("<me@xn--bcher-kva.test>", ["<bob@xn--bcher-kva.test>"]))
        replies, peer = self.send(extensions=["8BITMIME", "SMTPUTF8"], recipients=people)
        self.assertEqual(set(replies.values()), {"250 2.0.0"})
        self.assertEqual(peer.messages[0][:2], ("<me@here.test> SMTPUTF8", ["<%s>" % person for person in people]))
        replies, peer = self.send(extensions=["8BITMIME", "SMTPUTF8"], recipients=["bob@b\u00fccher.test"])
        self.assertEqual(peer.messages[0][:2], ("<me@here.test>", ["<bob@xn--bcher-kva.test>"]))
        for refused in dict(sender="m\u00e9@here.test"), dict(smtputf8=True):
            replies, peer = self.send(extensions=["8BITMIME"], **refused)
            self.assertEqual((replies, peer.verbs()), ({"bob@far.test": "550 5.6.7"}, "EHLO QUIT"))
        self.assertIn(" SMTPUTF8", self.send(extensions=["SMTPUTF8"], smtputf8=True)[1].lines[1])

    def test_content_arrives_byte_for_byte(self):
        """Dots stuffed at line starts only, wherever blocks are cut; the end added where there is none."""
        for content in (b".\r\n", b"..\r\n.x\r\n\r\n.\r\n", b"a.\r\n.b.\r\n", b"\r\n", b"x" * 5000 + b"\r\n", b".\r\n" * 200,
                        b"a\r\n" * 99 + b".\r\n", b"ab\r\n.c\r\n" * 50):
            for size in 1 << 18, 7, 2, 1:
                with self.subTest(content[:20], size=size), mock.patch.object(minimail, "BIG_BLOCK", size):
                    if size < 7 and len(content) > 700:
                        continue
                    _, peer = self.send(content=content, before=b"Return-Path: <>\r\n")
                    (_, _, wire), = peer.messages
                    self.assertEqual(wire, re.sub(rb"(?m)^\.", b"..", content))
        _, peer = self.send(content=b"no end")
        self.assertEqual(peer.messages[0][2], b"no end\r\n")

    def test_many_messages_over_one_connection(self):
        client, peer = self.greeted()
        for _ in range(3):
            self.assertEqual(run_peer(client, client.send(self.message()))["bob@far.test"].code, 250)
        run_peer(client, client.quit())
        self.assertEqual((peer.connections, len(peer.messages), peer.verbs().count("EHLO")), (1, 3, 1))

    SERVER = minimail.Server("far.test", 25, False, "us\u00e9r", "pa ss")
    USER, PASSWORD = (base64.b64encode(word).decode() for word in (b"us\xc3\xa9r", b"pa ss"))

    def logged_in(self, offered, script, **server):
        """Return (code of the PeerFailed or 235, the lines said after EHLO)."""
        client, peer = self.greeted(script, extensions=offered)
        try:
            run_peer(client, client.log_in(self.SERVER._replace(**server)))
            return 235, peer.lines[1:]
        except minimail.PeerFailed as failed:
            for secret in "pa ss", self.PASSWORD, base64.b64encode(b"\0us\xc3\xa9r\0pa ss").decode():
                self.assertNotIn(secret, str(failed))
            return failed.reply.code, peer.lines[1:]

    def test_log_in(self):
        plain = "AUTH PLAIN " + base64.b64encode(b"\0us\xc3\xa9r\0pa ss").decode()
        cram = base64.b64encode("us\u00e9r ".encode() + hmac.new(b"pa ss", b"<1@x>", "md5").hexdigest().encode()).decode()
        xoauth2 = "AUTH XOAUTH2 " + base64.b64encode(b"user=us\xc3\xa9r\1auth=Bearer pa ss\1\1").decode()
        bearer = "AUTH OAUTHBEARER " + base64.b64encode(b"n,a=us\xc3\xa9r,\1host=far.test\1port=25\1auth=Bearer pa ss\1\1").decode()
        login = {"AUTH": "334 VXNlcm5hbWU6", self.USER: "334 UGFzc3dvcmQ6", self.PASSWORD: "235 ok"}
        table = [
            (["AUTH PLAIN LOGIN"], {}, {}, [plain]), (["AUTH LOGIN"], login, {}, ["AUTH LOGIN", self.USER, self.PASSWORD]),
            (["AUTH=LOGIN PLAIN"], {}, {}, [plain]), (["AUTH=LOGIN"], login, {}, ["AUTH LOGIN", self.USER, self.PASSWORD]),
            (["AUTH LOGIN", "AUTH=PLAIN"], {}, {}, [plain]), (["AUTH PLAIN", "AUTH LOGIN"], {}, {}, [plain]), (["auth plain"], {}, {}, [plain]),
            (["AUTH PLAIN CRAM-MD5"], {"AUTH": "334 " + base64.b64encode(b"<1@x>").decode(), cram: "235 ok"}, {}, ["AUTH CRAM-MD5", cram]),
            (["AUTH PLAIN CRAM-MD5"], {}, {"mechanism": "plain"}, [plain]), (["AUTH XOAUTH2 PLAIN"], {}, {}, [plain]),
            (["AUTH XOAUTH2 PLAIN"], {}, {"mechanism": "xoauth2"}, [xoauth2]), (["AUTH XOAUTH2"], {}, {}, [xoauth2]),
            (["AUTH OAUTHBEARER"], {}, {"mechanism": "oauthbearer"}, [bearer])]
        for offered, script, server, lines in table:
            with self.subTest(offered, **server):
                self.assertEqual(self.logged_in(offered, script, **server), (235, lines))

    def test_log_in_that_fails(self):
        """Always 4xx: wrong settings here are no reason to bounce. Nothing secret in the words, whatever the peer repeats."""
        for offered, script, server in (
                ("AUTH PLAIN", {"AUTH": "535 5.7.8 wrong"}, {}), ("AUTH GSSAPI", {}, {}), ("SIZE", {}, {}), ("AUTH LOGIN", {"AUTH": "535 wrong"}, {}),
                ("AUTH LOGIN", {"AUTH": "334 x", self.USER: "501 5.5.2 what"}, {}), ("AUTH PLAIN", {}, {"mechanism": "xoauth2"}),
                ("AUTH LOGIN", {"AUTH": "334 x", self.USER: "334 x", self.PASSWORD: "DROP"}, {}),
                ("AUTH LOGIN", {"AUTH": "334 x", self.USER: "334 x", self.PASSWORD: "535 you said pa ss, or " + self.PASSWORD}, {}),
                ("AUTH LOGIN", {"AUTH": "334 x", self.USER: "334 x", self.PASSWORD: "421 %s is wrong" % self.PASSWORD}, {}),
                ("AUTH PLAIN", {"AUTH": "535 AUTH PLAIN " + base64.b64encode(b"\0us\xc3\xa9r\0pa ss").decode()}, {}),
                ("AUTH XOAUTH2", {"AUTH": "334 eyJzdGF0dXMiOiI0MDAifQ==", "": "535 5.7.8 token expired"}, {}),
                ("AUTH CRAM-MD5", {"AUTH": "334 no base64!"}, {}), ("AUTH LOGIN", {"AUTH": "334"}, {})):
            with self.subTest(offered, script=script):
                self.assertEqual(self.logged_in([offered], script, **server)[0] // 100, 4)

    def test_an_expired_token_ends_the_exchange_in_order(self):
        """The error is a challenge, and wants an answer before the 535."""
        for mechanism, answer in ("XOAUTH2", ""), ("OAUTHBEARER", "AQ=="):
            code, lines = self.logged_in(["AUTH " + mechanism], {"AUTH": "334 e30=", answer: "535 5.7.8 expired"})
            self.assertEqual((code, lines[1:]), (451, [answer]))


def scripted_certificate(case):
    """Return (server context, certificate file) for mx.far.test; skips where ssl or openssl is missing."""
    try:
        import ssl
    except ImportError:
        case.skipTest("no ssl")
    if not shutil.which("openssl"):
        case.skipTest("no openssl command")
    directory = tempfile.TemporaryDirectory(prefix="minimail-test-")
    case.addCleanup(directory.cleanup)
    cert, key = os.path.join(directory.name, "cert.pem"), os.path.join(directory.name, "key.pem")
    command = ("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=mx.far.test "
               "-addext subjectAltName=DNS:mx.far.test").split() + ["-keyout", key, "-out", cert]
    made = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if made.returncode:
        case.skipTest("openssl makes no certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context, cert


class ClientTLSTest(ScriptedCase):
    """STARTTLS, smtps and passwords, seen from the relay, which decides."""

    def world(self, peer, **options):
        world = ScriptedWorld(self, FAR, {"192.0.2.25": peer, "127.0.0.1": peer}, **options)
        world.submit("bob@far.test")
        world.step()
        return world

    def trusting(self, cert):
        """Trust a certificate as if it were one of the system's."""
        return mock.patch.dict(os.environ, {"SSL_CERT_FILE": cert, "SSL_CERT_DIR": os.path.dirname(cert)})

    def test_may_uses_what_is_offered(self):
        context, _ = scripted_certificate(self)
        peer = ScriptedPeer(extensions=["STARTTLS"], tls=context)
        self.world(peer)
        self.assertEqual((peer.secured, len(peer.messages), peer.connections), (1, 1, 1))
        self.assertEqual(peer.verbs(), "EHLO STARTTLS EHLO MAIL RCPT DATA QUIT")

    def test_may_goes_on_without(self):
        scripted_certificate(self)
        for script in {"STARTTLS": "454 4.7.0 not now"}, {"STARTTLS": "220 go\nDROP"}:
            peer = ScriptedPeer(script, extensions=["STARTTLS"])
            with self.subTest(script):
                self.world(peer)
                self.assertEqual((peer.secured, len(peer.messages)), (0, 1))
        peer = ScriptedPeer()
        self.world(peer)
        self.assertEqual((peer.connections, len(peer.messages)), (1, 1))

    def test_who_takes_nothing_without_tls_is_tried_again_with_it(self):
        """Its STARTTLS failed for once: that 530 speaks of this conversation, not of the message."""
        context, _ = scripted_certificate(self)
        for name, starttls in ("refused", "454 4.7.0 not now"), ("lost", "220 go\nDROP"):
            with self.subTest(name):
                peer = ScriptedPeer({"STARTTLS": [starttls, "220 go"], "MAIL": ["530 5.7.0 Must issue STARTTLS first", "250 ok"]},
                                    extensions=["STARTTLS", "PIPELINING"], tls=context)
                world = self.world(peer, data=os.path.join(self.data, name))
                entry, = world.entries()
                self.assertIn("said: 530 5.7.0 Must issue STARTTLS first", entry.recipients[0]["last_reply"])
                self.assertEqual((entry.recipients[0]["status"], peer.messages), ("4.7.0", []))
                world.clock.now = entry.next_attempt + 60
                world.step()
                self.assertEqual((peer.secured, len(peer.messages), world.files(), world.mail()), (1, 1, [], []))

    def test_require_verifies_and_never_falls_back(self):
        context, cert = scripted_certificate(self)
        for name, offered, trusted, host in ("not offered", [], cert, "mx.far.test"), \
                ("not trusted", ["STARTTLS"], "", "mx.far.test"), ("another name", ["STARTTLS"], cert, "other.far.test"), \
                ("good", ["STARTTLS"], cert, "mx.far.test"):
            peer = ScriptedPeer(extensions=offered, tls=context)
            with self.subTest(name), self.trusting(trusted) if trusted else contextlib.nullcontext():
                world = ScriptedWorld(self, {"far.test": ["MX 1 " + host], host: ["A 192.0.2.25"]}, {"192.0.2.25": peer},
                                      relay_tls="require", data=os.path.join(self.data, name))
                world.submit("bob@far.test")
                world.step()
                self.assertEqual((len(peer.messages), len(world.entries())), (1, 0) if name == "good" else (0, 1))
                self.assertEqual("MAIL" in peer.verbs(), name == "good")

    def test_text_before_the_handshake_is_not_believed(self):
        """RFC 3207 section 4.2: what somebody in the middle slipped in behind the 220 counts for nothing."""
        context, _ = scripted_certificate(self)
        peer = ScriptedPeer({"STARTTLS": "220 go\n250-peer.test\n250 SIZE 1"}, extensions=["STARTTLS"], tls=context)
        self.world(peer)
        self.assertNotIn("SIZE=", " ".join(peer.lines))

    def test_smtps(self):
        context, _ = scripted_certificate(self)
        peer = ScriptedPeer(tls=context, implicit=True, extensions=["AUTH PLAIN"])
        self.world(peer, smarthost="smtps://user:secret@192.0.2.25?verify=no")
        self.assertEqual((peer.secured, len(peer.messages)), (1, 1))
        self.assertEqual(peer.verbs(), "EHLO AUTH MAIL RCPT DATA QUIT")

    def test_a_password_is_never_sent_in_clear(self):
        """Nor with ?verify=no: that is about certificates."""
        for number, (extensions, options) in enumerate((([["AUTH PLAIN LOGIN"], ""]), (["STARTTLS", "AUTH PLAIN LOGIN"], ""), (
                ["AUTH PLAIN LOGIN"], "?verify=no"), (["STARTTLS", "AUTH PLAIN LOGIN"], "?verify=no&auth=login"))):
            peer = ScriptedPeer({"STARTTLS": "454 not now"}, extensions=extensions)
            with self.subTest(extensions, options=options):
                world = self.world(peer, smarthost="smtp://user:secret@192.0.2.25" + options, data=os.path.join(self.data, str(number)))
                self.assertNotIn("AUTH", peer.verbs())
                self.assertEqual((peer.messages, len(world.entries())), ([], 1))
                self.assertRegex(world.entries()[0].recipients[0]["last_reply"], "4.7.0|454 not now")

    def test_a_password_is_shown_to_no_stranger(self):
        """smtp:// and smtps://: its certificate is looked at, be --relay-tls what it may, and the name in it."""
        context, cert = scripted_certificate(self)
        names = {"mx.far.test": ["A 192.0.2.25"], "other.test": ["A 192.0.2.25"], "local.test": ["A 127.0.0.1"]}
        for number, (url, trusted, good) in enumerate((
                ("smtps://u:secret@mx.far.test", True, True), ("smtp://u:secret@mx.far.test", True, True),
                ("smtps://u:secret@mx.far.test.", True, True), ("smtp://u:secret@mx.far.test.", True, True),
                ("smtps://u:secret@mx.far.test", False, False), ("smtp://u:secret@mx.far.test", False, False),
                ("smtps://u:secret@other.test", True, False), ("smtp://u:secret@other.test", True, False),
                ("smtps://u:secret@local.test", True, False), ("smtps://u:secret@mx.far.test?verify=no", False, True),
                ("smtp://u:secret@other.test?verify=no", False, True), ("smtps://other.test", False, True))):
            for relay_tls in ("may", "require") if "u:" in url and "verify" not in url else ("may",):
                peer = ScriptedPeer(tls=context, implicit=url.startswith("smtps"), extensions=["STARTTLS", "AUTH PLAIN"])
                with self.subTest(url, trusted=trusted, relay_tls=relay_tls), self.trusting(cert) if trusted else contextlib.nullcontext():
                    world = ScriptedWorld(self, names, {"192.0.2.25": peer, "127.0.0.1": peer}, smarthost=url, relay_tls=relay_tls,
                                          data=os.path.join(self.data, "%d%s" % (number, relay_tls)))
                    world.submit("bob@far.test")
                    world.step()
                    self.assertEqual((len(peer.messages), "AUTH" in peer.verbs()), (good, good and "u:" in url), self.logged[-1:])

    def test_a_password_goes_to_loopback_and_over_tls(self):
        peer = ScriptedPeer(extensions=["AUTH PLAIN"])
        self.world(peer, smarthost="smtp://user:secret@127.0.0.1")
        self.assertEqual(peer.verbs(), "EHLO AUTH MAIL RCPT DATA QUIT")
        context, _ = scripted_certificate(self)
        peer = ScriptedPeer(extensions=["STARTTLS", "AUTH PLAIN"], tls=context)
        self.world(peer, smarthost="smtp://user:secret@192.0.2.25?verify=no")
        self.assertEqual(peer.verbs(), "EHLO STARTTLS EHLO AUTH MAIL RCPT DATA QUIT")

    def test_what_is_announced_before_tls_counts_for_nothing_after_it(self):
        context, _ = scripted_certificate(self)
        peer = ScriptedPeer({"EHLO": ["250-x\n250-STARTTLS\n250 AUTH PLAIN", "250 x"]}, tls=context)
        world = self.world(peer, smarthost="smtp://user:secret@192.0.2.25?verify=no")
        self.assertEqual((peer.verbs(), len(world.entries())), ("EHLO STARTTLS EHLO", 1))

    def test_a_token_that_was_renewed(self):
        """The options are asked at each connection: what waits goes with the password as it is then."""
        peer = ScriptedPeer({"AUTH": ["535 5.7.8 expired", "235 ok"]}, extensions=["AUTH XOAUTH2"])
        world = ScriptedWorld(self, {}, {"127.0.0.1": peer}, smarthost="smtp://u:old@127.0.0.1")
        world.submit("bob@far.test")
        world.step()
        world.relay.routes.options = lambda: world.config.__class__(smarthost=minimail.parse_url("smtp://u:new@127.0.0.1"))
        world.clock.now += 5000
        world.step()
        said = [base64.b64decode(line.split()[2]) for line in peer.lines if line.startswith("AUTH")]
        self.assertEqual(([b"Bearer old" in said[0], b"Bearer new" in said[1]], world.files()), ([True, True], []))
        self.assertNotIn("old", " ".join(self.logged))

    def test_without_ssl(self):
        """A Python without ssl: what insists on TLS waits, everything else goes."""
        with mock.patch.dict(sys.modules, {"ssl": None}):
            peer = ScriptedPeer(extensions=["STARTTLS"])
            self.assertEqual((len(self.world(peer).entries()), len(peer.messages)), (0, 1))
            for number, options in enumerate([dict(relay_tls="require"), dict(smarthost="smtps://192.0.2.25")]):
                with self.subTest(options):
                    peer = ScriptedPeer(extensions=["STARTTLS"])
                    world = self.world(peer, data=os.path.join(self.data, str(number)), **options)
                    self.assertEqual((len(world.entries()), peer.messages), (1, []))
                    self.assertEqual(world.entries()[0].attempts, 1)


# ======================================================================================================================
# 12  Relay.  Where mail goes, when, and what comes of it; who may send; the commands; what a crash leaves.
# ======================================================================================================================

class RoutesTest(ScriptedCase):
    """RFC 5321 section 5.1, line by line."""

    def hosts(self, names, address="x@far.test", **options):
        """Return [(preference, host, addresses)], or "code enhanced" of the Undeliverable."""
        given = dict({"domain": ["here.test"], "hostname": "mx.here.test"}, **options)
        config = minimail.Config(**minimail.read_options(given, str))
        routes = minimail.Routes(config, "mx.here.test", ScriptedNames(names), [("192.0.2.1", 25), ("127.0.0.1", 2525)])
        try:
            return [host[:3] for host in routes.exchangers(routes.target(minimail.parse_address(address)))]
        except minimail.Undeliverable as error:
            return "%d %s" % error.reply[:2]

    def test_table(self):
        a, b, c = (["A 192.0.2.%d" % n] for n in (10, 11, 12))
        table = [
            ("by preference", {"far.test": ["MX 20 b.test", "MX 10 a.test"], "a.test": a, "b.test": b}, "a b"),
            ("implicit MX", {"far.test": a}, "far"),
            ("implicit MX, IPv6", {"far.test": ["AAAA 2001:db8::1"]}, "far"),
            ("no implicit one beside MX", {"far.test": a + ["MX 10 b.test"], "b.test": b}, "b"),
            ("CNAME to a domain with MX", {"far.test": ["CNAME x.test"], "x.test": ["MX 1 a.test"], "a.test": a}, "a"),
            ("CNAME to a host", {"far.test": ["CNAME a.test"], "a.test": a}, "far"),
            ("null MX", {"far.test": ["MX 0 ."]}, "556 5.1.10"),
            ("null MX has no address as fallback", {"far.test": ["MX 0 ."] + a}, "556 5.1.10"),
            ("null MX among others counts for nothing", {"far.test": ["MX 0 .", "MX 10 a.test"], "a.test": a}, "a"),
            ("no such domain", {}, "550 5.1.2"),
            ("neither MX nor address", {"far.test": []}, "550 5.1.2"),
            ("lookup fails", {"far.test": "SERVFAIL"}, "451 4.4.3"),
            ("an MX that does not exist", {"far.test": ["MX 10 gone.test", "MX 20 b.test"], "b.test": b}, "b"),
            ("an MX without address", {"far.test": ["MX 10 a.test", "MX 20 b.test"], "a.test": [], "b.test": b}, "b"),
            ("no MX has an address", {"far.test": ["MX 10 a.test", "MX 20 gone.test"], "a.test": []}, "550 5.1.2"),
            ("an MX whose lookup fails", {"far.test": ["MX 10 a.test", "MX 20 b.test"], "a.test": "SERVFAIL",
                                          "b.test": b}, "b"),
            ("the only MX's lookup fails", {"far.test": ["MX 10 a.test"], "a.test": "SERVFAIL"}, "451 4.4.3"),
            ("we are second", {"far.test": ["MX 10 a.test", "MX 20 mx.here.test", "MX 30 c.test"], "a.test": a, "c.test": c,
                               "mx.here.test": ["A 192.0.2.1"]}, "a"),
            ("we are second, by address", {"far.test": ["MX 10 a.test", "MX 20 alias.test", "MX 30 c.test"], "a.test": a,
                                           "alias.test": ["A 192.0.2.1"], "c.test": c}, "a"),
            ("others of our preference", {"far.test": ["MX 10 a.test", "MX 20 mx.here.test", "MX 20 b.test"], "a.test": a,
                                          "b.test": b, "mx.here.test": ["A 192.0.2.1"]}, "a"),
            ("we are the best", {"far.test": ["MX 10 mx.here.test", "MX 20 a.test"], "a.test": a,
                                 "mx.here.test": ["A 192.0.2.1"]}, "554 5.4.6"),
            ("we are the only one, by address", {"far.test": ["A 192.0.2.1"]}, "554 5.4.6"),
            ("our name without address", {"far.test": ["MX 10 MX.here.test"]}, "554 5.4.6"),
            ("another port of this machine is not us", {"far.test": ["A 127.0.0.1"]}, "far"),
            ("backup while the best cannot be looked up", {
                "far.test": ["MX 10 a.test", "MX 20 mx.here.test"], "a.test": "SERVFAIL", "mx.here.test": ["A 192.0.2.1"]},
             "451 4.4.3"),
        ]
        for name, names, expected in table:
            with self.subTest(name):
                found = self.hosts(names)
                self.assertEqual(found if isinstance(found, str) else " ".join(host.partition(".")[0] for _, host, _ in found),
                                 expected)

    def test_equal_preferences_are_shuffled(self):
        names = {"far.test": ["MX 10 a.test", "MX 10 b.test", "MX 10 c.test", "MX 5 first.test", "MX 20 last.test"]}
        names.update({name + ".test": ["A 192.0.2.9"] for name in ("a", "b", "c", "first", "last")})
        orders = {tuple(host[0] for _, host, _ in self.hosts(names)) for _ in range(200)}
        self.assertEqual(orders, {("f",) + order + ("l",) for order in
                                  [tuple("abc"), tuple("acb"), tuple("bac"), tuple("bca"), tuple("cab"), tuple("cba")]})

    def test_many_exchangers_are_capped(self):
        names = {"far.test": ["MX %d mx%d.test" % (n, n) for n in range(50)]}
        names.update({"mx%d.test" % n: ["A 192.0.2.9"] for n in range(50)})
        self.assertEqual([preference for preference, _, _ in self.hosts(names)], list(range(minimail.MAX_EXCHANGERS)))

    def test_all_addresses_of_a_host(self):
        self.assertEqual(self.hosts({"far.test": ["MX 7 a.test"],
                                     "a.test": ["AAAA 2001:db8::1", "A 192.0.2.9", "A 192.0.2.8"]}),
                         [(7, "a.test", ["192.0.2.9", "192.0.2.8", "2001:db8::1"])])

    def test_our_addresses_in_other_spellings(self):
        """Addresses are compared as addresses."""
        config = minimail.Config()
        for bound, addresses in (("127.0.0.1", ["127.0.0.1", "0.0.0.0", "::ffff:127.0.0.1", "::ffff:7f00:1", "0:0:0:0:0:FFFF:7F00:0001"]),
                                 ("0.0.0.0", ["127.0.0.1", "127.9.9.9", "0.0.0.0", "::ffff:0.0.0.0", "::ffff:127.0.0.1"]),
                                 ("::1", ["::1", "::", "0:0:0:0:0:0:0:1", "::1%lo"]), ("192.0.2.1", ["192.0.2.1", "::ffff:192.0.2.1"])):
            routes = minimail.Routes(config, "mx.here.test", ScriptedNames({}), [(bound, 25), ("192.0.2.77", 26)])
            for address in addresses:
                with self.subTest(bound, address=address):
                    self.assertTrue(routes.leads_here([address], 25))
                    self.assertFalse(routes.leads_here([address], 26))
            self.assertFalse(routes.leads_here(["192.0.2.78", "2001:db8::1", "nonsense"], 25))

    def test_ourselves_are_refused_at_once(self):
        for names, address, options in (
                ({"far.test": ["A 0.0.0.0"]}, "x@far.test", {}), ({"far.test": ["AAAA ::ffff:127.0.0.1"]}, "x@far.test", {}),
                ({}, "x@[0.0.0.0]", {}), ({}, "x@[IPv6:::ffff:127.0.0.1]", {}), ({}, "x@[127.0.0.1]", {}),
                ({}, "x@far.test", {"smarthost": "smtp://127.0.0.1:2525"}), ({"me.test": ["A 127.0.0.1"]}, "x@far.test", {"smarthost": "smtp://me.test:2525"}),
                ({}, "x@far.test", {"route": "far.test=smtp://[::ffff:127.0.0.1]:2525"})):
            with self.subTest(names, address=address, **options):
                self.assertEqual(self.hosts(names, address, mx_port=2525, **options), "554 5.4.6")
        self.assertEqual(self.hosts({}, smarthost="smtp://127.0.0.1:2526")[0][2], ["127.0.0.1"], "another program of this machine")

    def test_routes_by_sender(self):
        """A route for the recipient's domain, one for the sender's, the smarthost: in this order."""
        routes = ["from:a.test=smtp://192.0.2.1", "from:.a.test=smtp://192.0.2.2", "far.test=smtp://192.0.2.3", "from:b\u00fccher.test=smtp://192.0.2.4"]
        config = minimail.Config(**minimail.read_options({"domain": "here.test", "route": routes, "smarthost": "smtp://192.0.2.9"}, str))
        chosen = minimail.Routes(config, "mx.here.test", ScriptedNames({}))
        for sender, recipient, last in (("x@a.test", "y@z.test", 1), ("x@A.TEST", "y@z.test", 1), ("x@b.a.test", "y@z.test", 2), ("x@a.test", "y@far.test", 3),
                                        ("x@xn--bcher-kva.test", "y@z.test", 4), ("", "y@z.test", 9), ("x@other.test", "y@z.test", 9),
                                        ("x@[192.0.2.77]", "y@z.test", 9), ("x@a.test", "y@[192.0.2.78]", 1)):
            with self.subTest(sender, recipient=recipient):
                self.assertEqual(chosen.target(minimail.parse_address(recipient), sender).server.host, "192.0.2.%d" % last)

    def test_idn(self):
        names = {"xn--bcher-kva.test": ["MX 1 a.test"], "a.test": ["A 192.0.2.9"]}
        for address in "x@b\u00fccher.test", "x@B\u00dcCHER.test", "x@xn--bcher-kva.test":
            self.assertEqual(self.hosts(names, address), [(1, "a.test", ["192.0.2.9"])])

    def test_our_idn_domain_is_us(self):
        names = {"far.test": ["MX 10 xn--bcher-kva.test"], "xn--bcher-kva.test": ["A 192.0.2.9"]}
        self.assertEqual(self.hosts(names, domain=["b\u00fccher.test"]), "554 5.4.6")

    def test_literals(self):
        self.assertEqual(self.hosts({}, "x@[192.0.2.9]"), [(0, "", ["192.0.2.9"])])
        self.assertEqual(self.hosts({}, "x@[IPv6:2001:DB8::1]"), [(0, "", ["2001:db8::1"])])
        self.assertEqual(self.hosts({}, "x@[192.0.2.1]"), "554 5.4.6")

    def test_routes_and_smarthost(self):
        names = {"far.test": ["A 192.0.2.10"], "relay.test": ["A 192.0.2.11"]}
        options = dict(route=["far.test=smtp://192.0.2.20", ".far.test=smtp://192.0.2.21:2525",
                              "b\u00fccher.test=smtp://192.0.2.22"], smarthost="smtps://relay.test")
        for address, expected in ("x@far.test", "192.0.2.20"), ("x@FAR.test", "192.0.2.20"), ("x@a.far.test", "192.0.2.21"), \
                ("x@b.a.far.test", "192.0.2.21"), ("x@notfar.test", "192.0.2.11"), ("x@other.test", "192.0.2.11"), \
                ("x@[192.0.2.99]", "192.0.2.11"), ("x@xn--bcher-kva.test", "192.0.2.22"):
            with self.subTest(address):
                self.assertEqual(self.hosts(names, address, **options)[0][2], [expected])
        self.assertEqual(self.hosts(names, "x@other.test", route="far.test=smtp://192.0.2.20"), "550 5.1.2")
        self.assertEqual(self.hosts({}, smarthost="smtp://localhost")[0][1], "localhost", "the machine's own tables")
        self.assertEqual(self.hosts({"relay.test": "SERVFAIL"}, smarthost="smtp://relay.test"), "451 4.4.3")
        self.assertEqual(self.hosts({}, smarthost="smtp://gone.invalid")[0], "4", "a mistyped smarthost bounces nothing")

    def test_a_smarthost_in_the_machines_own_tables(self):
        for records, failure in ([], "451 4.4.4"), (None, "451 4.4.4"), ("SERVFAIL", "451 4.4.3"), (["TXT x"], "451 4.4.4"):
            names = {} if records is None else {"relay.test": records}
            for known in [], ["192.0.2.30"]:
                tables = mock.patch.object(minimail, "local_addresses", lambda host, known=known: known)
                with self.subTest(records, known=known), tables:
                    self.assertEqual(self.hosts(names, smarthost="smtp://relay.test"),
                                     [(0, "relay.test", known)] if known else failure)


class RelayTest(ScriptedCase):

    def test_five_days_of_retries(self):
        """Waits as --retry says, with jitter, and a bounce at the end; in no time."""
        started = time.monotonic()
        world = ScriptedWorld(self, FAR, no_sync=True)
        begun = world.clock.now
        world.submit("bob@far.test")
        moments = []
        while world.entries():
            moments.append(world.clock.now - begun)
            due = world.step()
            self.assertTrue(due is None or due > world.clock.now)
            world.clock.now = due or world.clock.now
            self.assertLess(len(moments), 200)
        waits = [after - before for before, after in zip(moments, moments[1:])]
        for wait, wanted in zip(waits, [60, 300, 900] + [3600] * (len(waits) - 4)):
            self.assertTrue(wanted * 0.88 <= wait <= wanted * 1.13 + 1, (wait, wanted))
        self.assertGreater(len(set(waits)), 10, "no jitter")
        self.assertIn(len(moments) - len(world.connected), (0, 1), "the last one may come while the destination pauses")
        self.assertTrue(432_000 <= moments[-1] <= 432_000 + 120, moments[-1])
        report, = world.mail()
        status = list(report.iter_parts())[1].get_payload()[1]
        self.assertEqual((status["Final-Recipient"], status["Action"]), ("rfc822; bob@far.test", "failed"))
        self.assertIn("Connection refused", status["Diagnostic-Code"])
        self.assertEqual(world.files(), [])
        self.assertLess(time.monotonic() - started, PATIENCE)

    def test_a_file_system_that_goes_while_a_message_is_sent(self):
        """Is said once, and not again for each message that cannot be read."""
        world = ScriptedWorld(self, FAR, {"192.0.2.25": ScriptedPeer()})
        storage = world.stores.storage

        def gone(*_):
            storage._beneath = os.stat(storage.root).st_dev
            raise OSError(errno.ENOTCONN, "not connected")
        world.submit("bob@far.test")
        with mock.patch.object(minimail, "pread", gone), self.assertLogs("minimail", "WARNING") as logs:
            world.step()
        self.assertEqual(["out of reach" in line for line in logs.output], [True], logs.output)

    def test_nothing_is_tried_before_it_is_due(self):
        world = ScriptedWorld(self, FAR)
        world.submit("bob@far.test")
        due = world.step()
        world.clock.now = due - 1
        world.step()
        self.assertEqual(len(world.connected), 1)
        world.clock.now = due
        world.step()
        self.assertEqual(len(world.connected), 2)

    def test_clock_that_jumps(self):
        """Back by a year: what waits is not lost; forward again: it is sent, not bounced unseen."""
        peer = ScriptedPeer({"connect": ["421 busy", "220 hi"]})
        world = ScriptedWorld(self, FAR, {"192.0.2.25": peer})
        world.submit("bob@far.test")
        world.step()
        world.clock.now -= 365 * 86400
        world.step()
        self.assertEqual(len(world.entries()) + len(peer.messages), 1)
        world.clock.now += 2 * 365 * 86400
        world.step()
        self.assertEqual((len(peer.messages), world.entries(), world.mail()), (1, [], []))

    TWO = {"far.test": ["MX 10 a.test", "MX 20 b.test"], "a.test": ["A 192.0.2.10"], "b.test": ["A 192.0.2.11"]}

    def two(self, first, *recipients, second=None, names=None, **options):
        """Send to far.test with two exchangers; return (world, first, second)."""
        first = ScriptedPeer(first) if isinstance(first, dict) else first
        second = ScriptedPeer(second)
        world = ScriptedWorld(self, names or self.TWO, {"192.0.2.10": first, "192.0.2.11": second}, **options)
        world.submit(*(recipients or ["bob@far.test"]))
        world.step()
        return world, first, second

    def test_the_next_exchanger_is_tried(self):
        cases = {"refused": None, "timeout": socket.timeout("timed out"), "unreachable": OSError(errno.EHOSTUNREACH, "none"),
                 "421 greeting": {"connect": "421 busy"}, "hangs up": {"connect": "DROP"},
                 "hello refused": {"EHLO": "451 no", "HELO": "451 no"},
                 "451 mail": {"MAIL": "451 no"}, "450 rcpt": {"RCPT": "450 no"}, "421 rcpt": {"RCPT": "421 no\nDROP"},
                 "451 data": {"DATA": "451 no"}, "452 end": {"end": "452 full"}, "lost after the dot": {"end": "DROP"},
                 "garbage": {"EHLO": "what?\nDROP"}}
        for name, first in cases.items():
            with self.subTest(name):
                world, first, second = self.two(first, data=os.path.join(self.data, name))
                self.assertEqual((len(second.messages), world.entries(), world.mail()), (1, [], []))

    def test_the_next_exchanger_is_not_asked_about_a_5xx(self):
        for name, first in {"rcpt": {"RCPT": "550 5.1.1 no"}, "mail": {"MAIL": "550 no"}, "end": {"end": "554 spam"}}.items():
            with self.subTest(name):
                world, _, second = self.two(first, data=os.path.join(self.data, name))
                self.assertEqual((second.connections, world.entries(), len(world.mail())), (0, [], 1))

    def test_only_who_is_left_is_tried_at_the_next_exchanger(self):
        world, first, second = self.two({"RCPT TO:<eve@far.test>": "451 later", "RCPT TO:<sam@far.test>": "550 no"},
                                        "bob@far.test", "eve@far.test", "sam@far.test")
        self.assertEqual([message[1] for message in first.messages + second.messages],
                         [["<bob@far.test>"], ["<eve@far.test>"]])
        self.assertEqual((world.entries(), len(world.mail())), ([], 1))

    def test_each_recipient_is_told_of_by_what_its_own_exchanger_said(self):
        """Who refused it, and whether who took it reports that itself (RFC 3461 section 5.2.2)."""
        people = "bob@far.test", "eve@far.test", "sam@far.test"
        for knows, wanted in ("a.test", "eve@far.test"), ("b.test", "bob@far.test"):
            with self.subTest(knows):
                asked = " NOTIFY=SUCCESS,FAILURE" if knows == "a.test" else ""
                first = ScriptedPeer({"RCPT TO:<eve@far.test>" + asked: "451 later", "RCPT TO:<sam@far.test>" + asked: "550 no"},
                                     extensions=["DSN"] if knows == "a.test" else [])
                second = ScriptedPeer(extensions=["DSN"] if knows == "b.test" else [])
                world = ScriptedWorld(self, self.TWO, {"192.0.2.10": first, "192.0.2.11": second},
                                      data=os.path.join(self.data, knows))
                addresses = list(map(minimail.parse_address, people))
                wishes = {address.key: minimail.Wish("SUCCESS,FAILURE", "") for address in addresses}
                world.stores.door.send(minimail.Envelope(sender="me@here.test", wishes=wishes), addresses, LETTER)
                world.step()
                told = [list(report.iter_parts())[1].get_payload()[1:] for report in world.mail()]
                self.assertEqual([(status["Final-Recipient"], status["Action"], status["Remote-MTA"])
                                  for part in told for status in part if status["Final-Recipient"]], [
                    ("rfc822; sam@far.test", "failed", "dns; a.test"),
                    ("rfc822; " + wanted, "relayed", "dns; " + ("b.test" if knows == "a.test" else "a.test"))])

    def test_all_addresses_of_an_exchanger_are_tried(self):
        peer = ScriptedPeer()
        world = ScriptedWorld(self, {"far.test": ["A 192.0.2.10", "A 192.0.2.11", "AAAA 2001:db8::1"]}, {"2001:db8::1": peer})
        world.submit("bob@far.test")
        world.step()
        self.assertEqual((world.connected, len(peer.messages)), (["192.0.2.10", "192.0.2.11", "2001:db8::1"], 1))

    def test_4xx_everywhere_waits_for_who_is_left(self):
        world, first, second = self.two({"RCPT TO:<eve@far.test>": "451 4.7.1 greylisted"}, "bob@far.test", "eve@far.test",
                                        second={"RCPT": "450 4.2.0 b says later"})
        entry, = world.entries()
        self.assertEqual([(r["address"], r["state"]) for r in entry.recipients], [("eve@far.test", "waiting")])
        self.assertIn("b says later", entry.recipients[0]["last_reply"])
        first.script["RCPT TO:<eve@far.test>"] = "250 ok"
        world.clock.now = entry.next_attempt + 60
        world.step()
        self.assertEqual([message[1] for message in first.messages], [["<bob@far.test>"], ["<eve@far.test>"]])
        self.assertEqual(world.files(), [])

    def test_who_ends_the_conversation_stands_in_nobodys_way_for_ever(self):
        people = ["u%d@far.test" % number for number in range(12)]

        def too_many(reply):
            """Return a function that answers 5 recipients of a transaction with 250, or DATA with 354, else with `reply`."""
            def answer():
                named = "\n".join(peer.lines).rpartition("MAIL")[2].count("RCPT")
                return reply if named > 5 else "354 go" if peer.lines[-1] == "DATA" else "250 ok"
            return answer
        for name, stage, reply, bad in (
                ("421 to one", "RCPT TO:<u5@far.test>", "421 4.7.0 not that one\nDROP", 1),
                ("hangs up at one", "RCPT TO:<u5@far.test>", "DROP", 1),
                ("421 past the fifth", "RCPT", too_many("421 4.7.0 enough\nDROP"), 0),
                ("hangs up past the fifth", "RCPT", too_many("DROP"), 0),
                ("DATA", "DATA", too_many("452 4.5.3 too many recipients"), 0)):
            with self.subTest(name):
                peer = ScriptedPeer({stage: reply})
                world = ScriptedWorld(self, FAR, {"192.0.2.25": peer}, retry="60", data=os.path.join(self.data, name))
                world.submit(*people)
                attempts, got = 0, []
                while len(got) < 12 - bad and attempts < 60:    # shuffled: one in 2 ** 56 goes on longer
                    world.step()
                    world.clock.now += 120
                    attempts += 1
                    got = [recipient.strip("<>") for message in peer.messages for recipient in message[1]]
                self.assertEqual(sorted(got), sorted(set(people) - ({"u5@far.test"} if bad else set())))
                self.assertLessEqual(attempts, 60 if bad else 3, "half as many at once each time")
                self.assertEqual([r["address"] for entry in world.entries() for r in entry.recipients], ["u5@far.test"] * bad)
                world.clock.now += 6 * 86400
                world.step()
                self.assertEqual((len(world.mail()), world.files()), (bad, []), "and that one bounces")

    def test_who_was_away_gets_all_at_once(self):
        people, peer = ["u%d@far.test" % number for number in range(12)], ScriptedPeer({"RCPT": "451 4.7.1 greylisted"})
        world = ScriptedWorld(self, FAR, {})
        world.submit(*people)
        for hosts in {}, {"192.0.2.25": peer}, {"192.0.2.25": peer}:
            world.hosts.update(hosts)
            world.step()
            world.clock.now = max(entry.next_attempt for entry in world.entries()) + 400
        peer.script["RCPT"] = "250 ok"
        world.step()
        self.assertEqual([len(message[1]) for message in peer.messages], [12])

    def test_one_transaction_and_one_connection_for_many(self):
        """All recipients of a message at one destination in one transaction; many messages over one connection."""
        peer = ScriptedPeer()
        world = ScriptedWorld(self, FAR, {"192.0.2.25": peer})
        for _ in range(30):
            world.submit("bob@far.test", "eve@far.test")
        world.step()
        self.assertEqual((len(peer.messages), peer.connections, len(world.connected)), (30, 1, 1))

    def test_one_transaction_for_all_domains_through_a_smarthost(self):
        peer = ScriptedPeer()
        world = ScriptedWorld(self, {}, {"192.0.2.9": peer}, smarthost="smtp://192.0.2.9")
        world.submit("bob@far.test", "eve@near.test", "sam@b\u00fccher.test")
        world.step()
        (_, recipients, _), = peer.messages
        self.assertEqual(recipients, ["<bob@far.test>", "<eve@near.test>", "<sam@xn--bcher-kva.test>"])

    def test_routes_to_one_server_keep_their_own_log_in(self):
        peer = ScriptedPeer(extensions=["AUTH PLAIN"])
        world = ScriptedWorld(self, {}, {"127.0.0.1": peer}, route=["far.test=smtp://one:1@127.0.0.1",
                                                                    "near.test=smtp://two:2@127.0.0.1"])
        world.submit("bob@far.test", "eve@near.test")
        world.step()
        names = [base64.b64decode(line.split()[2]).split(b"\0")[1] for line in peer.lines if line.startswith("AUTH")]
        self.assertEqual((sorted(names), len(peer.messages)), ([b"one", b"two"], 2))

    def test_a_connection_that_was_closed_while_idle(self):
        peer = ScriptedPeer({"MAIL": ["250 ok", "DROP", "250 ok"]})
        world = ScriptedWorld(self, FAR, {"192.0.2.25": peer})
        world.submit("bob@far.test")
        world.submit("bob@far.test")
        world.step()
        self.assertEqual((len(peer.messages), peer.connections, world.entries()), (2, 2, []))

    def test_4xx_on_a_reused_connection_tries_the_next_exchanger_too(self):
        first, second = ScriptedPeer({"RCPT": ["250 ok", "451 enough"]}), ScriptedPeer()
        world = ScriptedWorld(self, self.TWO, {"192.0.2.10": first, "192.0.2.11": second})
        for _ in range(2):
            world.submit("bob@far.test")
        world.step()
        self.assertEqual((len(first.messages), len(second.messages), world.entries()), (1, 1, []))

    def test_the_reply_is_logged(self):
        world = ScriptedWorld(self, FAR, {"192.0.2.25": ScriptedPeer({"end": "250 2.0.0 queued as 4711"})})
        id = world.submit("bob@far.test")
        world.step()
        sent, = [line for line in self.logged if line.startswith("sent")]
        for words in id, "bob@far.test", "queued as 4711", "mx.far.test[192.0.2.25]":
            self.assertIn(words, sent)

    def test_addresses_that_cannot_be_written_bounce_or_wait_but_stop_nothing(self):
        """A sender whose domain has no ASCII form is no reason for the relay to stumble."""
        peer = ScriptedPeer(extensions=[])
        world = ScriptedWorld(self, FAR, {"192.0.2.25": peer})
        for sender in "x@%s.test" % ("\u00fc" * 60), "me@here.test":
            id = world.submit("bob@far.test")
            with open(world.queue.path(id, "env"), "r+", encoding="utf-8") as file:
                text = file.read().replace("me@here.test", sender)
                file.seek(0)
                file.write(text)
        world.step()
        self.assertEqual((len(peer.messages), world.entries()), (1, []))

    def test_more_than_fits_for_one_destination_holds_back_nobody(self):
        """Entries for a slow destination wait on disk (busy/), others go, and none is forgotten."""
        slow, fast = ScriptedPeer(), ScriptedPeer()
        world = ScriptedWorld(self, dict(FAR, **NEAR), {"192.0.2.25": slow, "192.0.2.26": fast})
        with mock.patch.object(minimail, "MAX_WAITING", 3), mock.patch.object(minimail, "MAX_ACTIVE", 6):
            for number in range(12):
                world.submit("bob%d@far.test" % number)
            world.submit("eve@near.test")
            world.step()
            self.assertEqual(len(fast.messages), 1)
            self.assertTrue(any(name.startswith("busy/") for name in world.files()))
            for _ in range(12):
                world.step()
        self.assertEqual(sorted(message[1][0] for message in slow.messages), sorted("<bob%d@far.test>" % n for n in range(12)))
        self.assertEqual(world.files(), [])

    def test_an_error_of_the_disk_leaves_the_entry_for_later(self):
        """Too many open files, say, when an entry is taken up: it is not lost from sight until the next start."""
        peer = ScriptedPeer()
        world = ScriptedWorld(self, FAR, {"192.0.2.25": peer})
        world.submit("bob@far.test")
        with mock.patch.object(world.queue, "claim", side_effect=OSError(errno.EMFILE, "Too many open files")):
            with contextlib.suppress(OSError):
                world.step()
        world.clock.now += 3600
        world.step()
        self.assertEqual((len(peer.messages), world.files()), (1, []))


    def test_what_cannot_be_read_waits(self):
        """A part of a message is not sent for the whole; what was wrong is said in a line, and may be mended."""
        peer = ScriptedPeer()
        world = ScriptedWorld(self, {"far.test": ["A 192.0.2.25"]}, {"192.0.2.25": peer})
        message = world.queue.path(world.submit("bob@far.test"))
        with open(message, "rb") as file:
            whole = file.read()
        for size in 0, len(whole) - 1:
            os.truncate(message, size)
            with self.assertLogs("minimail", "WARNING") as logs:
                world.step()
            self.assertEqual([(peer.messages, record.exc_info) for record in logs.records], [([], None)])
            self.assertIn("is cut off: '%s'" % message, logs.output[0])
            world.clock.now += 4000
        with open(message, "wb") as file:
            file.write(whole)
        world.step()
        self.assertEqual((len(peer.messages), world.entries()), (1, []))


class PressureTest(ScriptedCase):
    """Hosts that do not want to talk, that limit, that are away: what that means for one message, and for the others."""

    def world(self, script=None, names=FAR, **options):
        self.peer = ScriptedPeer(script)
        return ScriptedWorld(self, names, {"192.0.2.25": self.peer}, **options)

    def test_a_long_look_into_the_queue_is_interrupted(self):
        """What comes meanwhile does not wait until all that is due was looked at."""
        world = self.world()
        ids = {world.submit("bob@far.test") for _ in range(5)}
        relay = world.relay
        with mock.patch.object(minimail, "STINT", -1.0):
            relay.scan()
            self.assertEqual((len(relay._active), relay._wants_scan()), (1, True))
        relay.scan()
        self.assertEqual((set(relay._active), relay._wants_scan()), (ids, False))

    def test_a_refusal_to_talk_is_for_now_and_for_one_host(self):
        """Whatever its code, at the greeting or at EHLO; also when another exchanger is only away."""
        names = {"far.test": ["MX 10 a.test", "MX 20 b.test"], "a.test": ["A 192.0.2.10"], "b.test": ["A 192.0.2.11"]}
        refusals = {"greeting": {"connect": "554 no service"}, "hello": {"EHLO": "550 no", "HELO": "554 no"}, "521": {"connect": "521 no mail here\nDROP"}}
        first = {"away": None, "greets 554": ScriptedPeer({"connect": "554 no"}), "451 rcpt": ScriptedPeer({"RCPT": "451 4.2.0 my own reply"}),
                 "421 data": ScriptedPeer({"DATA": "421 my own reply\nDROP"})}
        for name, script in refusals.items():
            for primary, peer in first.items():
                with self.subTest(name, primary=primary):
                    world = ScriptedWorld(self, names, {"192.0.2.10": peer, "192.0.2.11": ScriptedPeer(script)}, data=os.path.join(self.data, name + primary))
                    world.submit("bob@far.test")
                    world.step()
                    entry, = world.entries()
                    self.assertEqual((entry.attempts, world.mail()), (1, []))
                    if "rcpt" in primary or "data" in primary:
                        self.assertIn("my own reply", entry.recipients[0]["last_reply"])
                    world.hosts["192.0.2.11"] = good = ScriptedPeer()
                    world.clock.now += 5000
                    world.step()
                    self.assertEqual((len(good.messages), world.files()), (1, []))

    def test_what_one_message_meets_holds_up_no_other(self):
        for name, script in {"421": "421 4.7.0 too much for that one\nDROP", "reset": "DROP"}.items():
            for stage in "RCPT TO:<slow@far.test>", "MAIL FROM:<slow@here.test> SIZE=%d":
                with self.subTest(name, stage=stage):
                    world = self.world(data=os.path.join(self.data, name + stage[:4]))
                    world.submit("slow@far.test", sender="slow@here.test")
                    self.peer.script[stage % world.entries()[0].size if "%" in stage else stage] = script
                    for number in range(8):
                        world.submit("bob%d@far.test" % number)
                    world.step()
                    self.assertEqual(len(self.peer.messages), 8)
                    entry, = world.entries()
                    self.assertIn("too much for that one" if name == "421" else "connection lost", entry.recipients[0]["last_reply"])

    def test_a_destination_that_cannot_be_reached_pauses(self):
        """One attempt finds that out: the others are not tried, not counted, and not told what was told to another."""
        world = ScriptedWorld(self, FAR)
        for number in range(5):
            world.submit("bob%d@far.test" % number)
        world.step()
        self.assertEqual((len(world.connected), sorted(entry.attempts for entry in world.entries())), (1, [0, 0, 0, 0, 1]))
        self.assertEqual(sorted(entry.recipients[0]["last_reply"] != "" for entry in world.entries()), [False] * 4 + [True])
        world.step()
        self.assertEqual(len(world.connected), 1, "it still pauses")
        world.clock.now += 31
        world.step()
        self.assertEqual(len(world.connected), 2)
        world.hosts["192.0.2.25"] = peer = ScriptedPeer()
        world.clock.now += 5000
        world.step()
        self.assertEqual((len(peer.messages), world.files()), (5, []))

    def test_the_pause_of_one_destination_is_not_the_others(self):
        """Not for the other recipients of the same message either."""
        world = ScriptedWorld(self, dict(FAR, **NEAR), {"192.0.2.26": ScriptedPeer()})
        world.submit("bob@far.test")
        world.step()
        world.submit("bob@far.test", "eve@near.test")
        world.step()
        self.assertEqual((len(world.hosts["192.0.2.26"].messages), len(world.connected)), (1, 2))
        self.assertEqual(sorted((entry.attempts, [r["address"] for r in entry.recipients]) for entry in world.entries()),
                         [(0, ["bob@far.test"]), (1, ["bob@far.test"])])

    def test_flush_ends_a_pause(self):
        world = ScriptedWorld(self, FAR)
        for _ in range(2):
            world.submit("bob@far.test")
        world.step()
        self.assertEqual(scripted_command("queue", "flush", "--data", self.data), (0, "", ""))
        world.hosts["192.0.2.25"] = peer = ScriptedPeer()
        world.clock.now = time.time() + 1
        world.step()
        self.assertEqual(len(peer.messages), 2)

    def test_all_that_wait_are_given_up_in_time(self):
        """Also those that were never the one that tries, when a destination is dead for five days."""
        world = ScriptedWorld(self, FAR, retry="3600")
        for number in range(6):
            world.submit("bob%d@far.test" % number)
        for _ in range(200):
            world.step()
            world.clock.now += 3600
            if not world.entries():
                break
        self.assertEqual((world.files(), len(world.mail())), ([], 6))
        self.assertLess(world.clock.now - 1_700_000_000, 432_000 + 10 * 3600)

    def test_destinations_are_forgotten(self):
        world = ScriptedWorld(self, {"d%d.test" % number: ["A 192.0.2.25"] for number in range(50)})
        for number in range(50):
            world.submit("bob@d%d.test" % number)
        world.step()
        world.clock.now += 31
        world.relay._tick()
        self.assertEqual(world.relay._destinations, {})

    def test_a_connection_that_carries_no_more_messages(self):
        """Whatever words a host has for that, a new connection is tried before they are believed."""
        for refusal in "550 5.7.0 too many messages in this connection", "452 4.5.3 enough", "421 4.7.0 enough\nDROP":
            count = []
            world = self.world({"MAIL": lambda: count.append(1) or ("250 ok" if len(count) % 4 else refusal)}, data=os.path.join(self.data, refusal[:3]))
            for number in range(10):
                world.submit("bob%d@far.test" % number)
            with self.subTest(refusal):
                world.step()
                self.assertEqual((len(self.peer.messages), self.peer.connections, world.mail()), (10, 4, []))
        world = self.world({"MAIL": "550 5.7.1 not you"}, data=os.path.join(self.data, "always"))
        world.submit("bob@far.test")
        world.step()
        self.assertEqual((len(world.mail()), self.peer.connections), (1, 1))

    def test_limits_of_a_destination(self):
        for limit, connections, transactions in (
                ("messages=3", 4, [1] * 10), ("far.test=messages=3", 4, [1] * 10), ("near.test=messages=3", 1, [1] * 10),
                ("messages=1,far.test=messages=5", None, None), ("recipients=1", 1, [1] * 10)):
            if connections:
                world = self.world(limit=[limit], data=os.path.join(self.data, limit))
                for number in range(10):
                    world.submit("bob%d@far.test" % number)
                with self.subTest(limit):
                    world.step()
                    self.assertEqual((self.peer.connections, [len(message[1]) for message in self.peer.messages]), (connections, transactions))
        world = self.world(limit="recipients=4", data=os.path.join(self.data, "recipients"))
        world.submit(*["bob%d@far.test" % number for number in range(10)])
        world.step()
        self.assertEqual(([len(message[1]) for message in self.peer.messages], world.files()), ([4, 4, 2], []))

    def test_surplus_recipients_take_another_transaction(self):
        """452; what RFC 5321 section 4.5.3.1.10 has for it from older times, 552; and x.5.3 (RFC 3463 section 3.6).

        But a full mailbox is a full mailbox.
        """
        for code in "452 4.5.3", "552 5.5.3", "550 5.5.3", "554 5.5.3", "451 4.5.3":
            count = []

            def rcpt(code=code, count=count):
                count.append(1)
                return code + " too many" if self.peer.lines[-6:-5] and all(line.startswith("RCPT") for line in self.peer.lines[-6:]) else "250 ok"
            world = self.world({"RCPT": rcpt}, data=os.path.join(self.data, code))
            world.submit(*["bob%d@far.test" % number for number in range(12)])
            world.step()
            self.assertEqual(([len(message[1]) for message in self.peer.messages], world.files(), world.mail()), ([5, 5, 2], [], []))
        world = self.world({"RCPT TO:<full@far.test>": "552 5.2.2 mailbox full"}, data=os.path.join(self.data, "full"))
        world.submit("bob@far.test", "full@far.test")
        world.step()
        self.assertEqual((len(self.peer.messages), len(world.mail()), world.files()), (1, 1, []))

    def test_rate(self):
        world = self.world(limit="far.test=rate=2/60")
        for number in range(5):
            world.submit("bob%d@far.test" % number)
        sent = []
        for _ in range(6):
            world.step()
            sent.append(len(self.peer.messages))
            world.clock.now += 30
        self.assertEqual(sent, [2, 2, 4, 4, 5, 5])

    def test_which_limit_counts(self):
        limits = [minimail.parse_limit(text) for text in (
            "connections=5", ".far.test=connections=4,messages=7", "a.far.test=messages=3", ".b.far.test=connections=2", "rate=9/10")]
        for domain, expected in {"x.test": (5, 100, 100, (9, 10.0)), "far.test": (5, 100, 100, (9, 10.0)), "a.far.test": (4, 3, 100, (9, 10.0)),
                                 "x.b.far.test": (2, 7, 100, (9, 10.0)), "[192.0.2.1]": (5, 100, 100, (9, 10.0))}.items():
            self.assertEqual(minimail.limit_for(minimail.Target(domain, domain), limits)[1:], expected, domain)
        server = minimail.parse_url("smtp://a.far.test")
        self.assertEqual(minimail.limit_for(minimail.Target("smarthost", "", server), limits).messages, 3)
        self.assertEqual(minimail.limit_for(minimail.Target("x.test", "x.test"), limits, 4)[1:], (1, 100, 100, (2, 10.0)), "processes share it")
        self.assertEqual(minimail.limit_for(minimail.Target("x", "x"), [minimail.parse_limit("rate=1/10")], 4).rate, (1, 40.0))


class RewriteTest(ScriptedCase):
    """--rewrite: the reverse-path and From of mail that leaves."""

    RULES = [minimail.parse_rewrite(rule) for rule in ("bob@here.test=robert@provider.test", "*@*.local=alerts@example.org")]

    def test_addresses(self):
        for address, expected in {"bob@here.test": "robert@provider.test", "BOB@Here.Test": "robert@provider.test", "eve@here.test": "eve@here.test",
                                  "root@nas.local": "alerts@example.org", "root@local": "root@local", "bob@here.test.local": "alerts@example.org"}.items():
            self.assertEqual(minimail.rewrite_address(address, self.RULES), expected)

    def test_from_headers(self):
        """Only addresses, only in From, whatever stands around them; byte for byte the same elsewhere."""
        for before, after in {
                b"From: bob@here.test\r\n": b"From: robert@provider.test\r\n", b"from:\r\n <Bob@here.test>\r\n": b"from:\r\n <robert@provider.test>\r\n",
                b'From: "bob@here.test" <bob@here.test> (bob@here.test)\r\n': b'From: "bob@here.test" <robert@provider.test> (bob@here.test)\r\n',
                b"From: root (Cron) <root@nas.local>,\r\n\tbob@here.test\r\n": b"From: root (Cron) <alerts@example.org>,\r\n\trobert@provider.test\r\n",
                b"To: bob@here.test\r\nX-From: bob@here.test\r\n": None, b"Subject: x\r\n From: bob@here.test\r\n": None,
                b"From: eve@here.test\r\n": None, b"From: b\xfcb@here.test\r\n": None, b"From: bob@here.test@x\r\n": None, b"From:\r\n": None,
                b'From: "unended <bob@here.test>\r\n': None, b"": None}.items():
            with self.subTest(before):
                self.assertEqual(minimail.rewrite_from(before, self.RULES), before if after is None else after)

    def test_cost_is_linear(self):
        for shape in b'"', b"(", b"\\", b"a@", b"<", b"a@b.local,", b"\r\n ", b'"\\', b"(\\)", b"\r\nFrom:":
            heads = [b"From: " + shape * (size // len(shape)) for size in (30_000, 120_000)]
            small, large = (cpu_of(functools.partial(minimail.rewrite_from, head, self.RULES)) for head in heads)
            self.assertLess(large, 8 * small + 0.05, shape)

    def test_what_leaves(self):
        """As the peer gets it, SIZE= included; the bounce goes to who sent it."""
        content = b"Subject: x\r\nFrom: Root <root@nas.local>\r\nTo: bob@far.test\r\n\r\nFrom: root@nas.local\r\n.\r\n"
        world = ScriptedWorld(self, FAR, {"192.0.2.25": ScriptedPeer({"RCPT TO:<eve@far.test>": "550 no"})}, rewrite=["*@*.local=alerts@example.org"])
        world.submit("bob@far.test", "eve@far.test", "me@here.test", sender="all@nas.local", content=content)
        world.submit("bob@far.test", sender="", content=content)
        world.step()
        (two, _, _), (one, _, wire) = sorted(world.hosts["192.0.2.25"].messages)
        self.assertEqual(two.partition(" ")[0], "<>")
        size = len(re.sub(rb"(?m)^\.\.", b".", wire))
        self.assertEqual(one, "<alerts@example.org> SIZE=%d" % size)
        self.assertEqual(wire[wire.index(b"Subject"):], content.replace(b"<root@nas.local>", b"<alerts@example.org>").replace(b"\n.", b"\n.."))
        self.assertEqual(str(world.mail()[0]["From"]), "Root <root@nas.local>", "what stays is as it came")
        self.assertEqual([r["address"] for entry in world.entries() for r in entry.recipients], ["all@nas.local"], "the bounce")


class RunningRelayTest(ScriptedCase):
    """The relay with its threads."""

    def test_a_host_that_takes_two_connections(self):
        """421 to a third: fewer of them, and no message is the worse for it."""
        live, lock = [], threading.Lock()

        def connect():
            with lock:
                if len(live) >= 2:
                    return "421 4.7.0 too many concurrent connections\nDROP"
                live.append(1)
            return "220 hi"

        def quit():
            with lock:
                live.pop()
            return "221 bye\nDROP"
        peer = ScriptedPeer({"connect": connect, "QUIT": quit})
        world = self.running(FAR, {"192.0.2.25": peer}, retry="3600")
        world.relay.start()
        for number in range(60):
            world.submit("bob%d@far.test" % number)
        self.eventually(lambda: not world.files())
        self.assertEqual(len(peer.messages), 60)
        self.assertFalse([line for line in self.logged if line.startswith(("deferred", "paused"))])

    def test_connections_of_one_destination(self):
        lock, live, most = threading.Lock(), [], []

        def connect():
            with lock:
                live.append(1)
                most.append(len(live))
            return "220 hi"
        peer = ScriptedPeer({"connect": connect, "QUIT": lambda: live.pop() and "221 bye\nDROP"})
        world = self.running(FAR, {"192.0.2.25": peer}, limit="far.test=connections=2")
        world.relay.start()
        for number in range(40):
            world.submit("bob%d@far.test" % number)
        self.eventually(lambda: not world.files())
        self.assertLessEqual(max(most), 2)

    def test_what_another_process_had_in_memory_when_it_died_is_sent(self):
        """The envelope is on disk without a hint; a process that goes on living finds it, not only one that starts."""
        peer = ScriptedPeer()
        living, dead = (self.running(FAR, {"192.0.2.25": peer}) for _ in range(2))
        with mock.patch.object(minimail, "SWEEP", 0.1):
            living.relay.start()
            self.eventually(lambda: living.queue.submitted == living.relay.submitted)    # its sweep at the start is over
            dead.queue.submitted = lambda dispatch: True
            dead.submit("bob@far.test")
            self.eventually(lambda: peer.messages)
            self.eventually(lambda: not living.files())
        self.assertEqual(len(peer.messages), 1)

    def test_who_was_taken_for_dead_says_that_it_lives(self):
        """A network file system lets go of a host's locks when it is cut off; others remove the file by which it is known."""
        world = self.running(FAR, {"192.0.2.25": ScriptedPeer()})
        with mock.patch.object(minimail, "LOOK_AROUND", 0.05):
            world.relay.start()
            path = os.path.join(world.stores.storage.run, world.stores.storage.token + ".here")
            self.eventually(lambda: os.path.exists(path))
            os.unlink(path)
            self.eventually(lambda: os.path.exists(path))

    def test_a_file_system_that_goes_and_comes_back(self):
        """It is said once; what was in nobody's memory any more is sent when it is back."""
        peer = ScriptedPeer()
        world = self.running(FAR, {"192.0.2.25": peer})
        storage = world.stores.storage
        with mock.patch.object(minimail, "LOOK_AROUND", 0.05), mock.patch.object(minimail, "AGAIN", 0.05):
            world.relay.start()
            self.eventually(lambda: world.queue.submitted == world.relay.submitted)
            before = len(self.logged)
            world.queue.submitted = lambda dispatch: True       # taken up, and then forgotten
            world.submit("bob@far.test")
            beneath, storage._beneath = storage._beneath, os.stat(storage.root).st_dev
            self.eventually(lambda: storage.away)
            threading.Event().wait(0.5)             # in which nothing more is said
            self.assertEqual(peer.messages, [])
            storage._beneath = beneath
            self.eventually(lambda: peer.messages and not world.files())
        self.assertEqual(len(peer.messages), 1)
        said = [line for line in self.logged[before:] if "out of reach" in line or " is back " in line or "later" in line]
        self.assertEqual(len(said), 2, said)

    def test_without_threads_it_is_sent_later(self):
        peer = ScriptedPeer()
        world = self.running(FAR, {"192.0.2.25": peer})
        start, refused = threading.Thread.start, []

        def scarce(thread):
            if len(refused) < 5:
                refused.append(1)
                raise RuntimeError("can't start new thread")
            start(thread)
        world.relay.start()
        with mock.patch.object(threading.Thread, "start", scarce):
            for _ in range(3):
                world.submit("bob@far.test")
            self.eventually(lambda: not world.files())
        self.assertEqual((len(peer.messages), len([line for line in self.logged if "no thread" in line])), (3, 1))

    def test_only_threads_that_have_begun_are_joined(self):
        threads, began, may_go_on = minimail.Threads("x"), threading.Event(), threading.Event()
        start = threading.Thread.start

        def slow(thread):
            if thread.name == "x":
                began.set()
                self.assertTrue(may_go_on.wait(PATIENCE))
            start(thread)
        with mock.patch.object(threading.Thread, "start", slow):
            started = self.in_background(threads.start, lambda: None)
            self.assertTrue(began.wait(PATIENCE))
            joined = self.in_background(threads.join, PATIENCE)
            may_go_on.set()
            started(), joined()
        self.eventually(lambda: not len(threads))

    def test_an_error_in_the_runner_is_not_its_end(self):
        """Whatever happens in one look into the queue, the next one comes."""
        peer = ScriptedPeer()
        world = self.running(FAR, {"192.0.2.25": peer})
        real, errors = world.queue.due_directories, [OSError(errno.EMFILE, "no"), ValueError("what?"), RuntimeError("oh")]

        def failing(now):
            if errors:
                world.relay._rescan = True
                raise errors.pop()
            return real(now)
        world.submit("bob@far.test")
        with mock.patch.object(world.queue, "due_directories", failing):
            world.relay.start()
            self.eventually(lambda: peer.messages and not world.files())
        self.assertEqual(errors, [])

    def running(self, names, hosts, **options):
        world = ScriptedWorld(self, names, hosts, clock=time.time, **options)
        self.addCleanup(world.relay.join, PATIENCE)
        self.addCleanup(world.relay.stop)
        return world

    def test_what_a_process_had_in_memory_is_sent_when_it_has_died(self):
        peer = ScriptedPeer()
        world = self.running(FAR, {"192.0.2.25": peer})
        other = ScriptedWorld(self, FAR, clock=time.time)
        here = other.stores.storage.appear()
        other.queue.submitted = lambda dispatch: True       # it is in its memory
        world.relay.start()
        self.eventually(lambda: other.stores.storage.token in world.relay._living)
        other.submit("bob@far.test")
        os.close(here)
        self.eventually(lambda: peer.messages and not world.files())

    def test_what_somebody_removed_while_it_was_tried_is_forgotten(self):
        """`rm -r queue` under a running node: it must not come back as an envelope without a message, or a hint at nothing."""
        reached, release = threading.Event(), threading.Event()
        peer = ScriptedPeer({"RCPT": lambda: reached.set() or release.wait(PATIENCE) and "451 4.2.0 later"})
        world = self.running(FAR, {"192.0.2.25": peer})
        world.relay.start()
        world.submit("bob@far.test")
        self.assertTrue(reached.wait(PATIENCE))
        shutil.rmtree(world.queue.root)
        release.set()
        self.eventually(lambda: not world.relay._active)
        world.relay.stop()
        world.relay.join(PATIENCE)
        self.assertEqual((world.files(), [line for line in self.logged if "removed meanwhile" in line][1:]), ([], []))

    def test_a_hint_at_what_is_in_memory_does_not_outlive_it(self):
        """A sweep may come between the moment a message is taken and the moment the relay has it."""
        reached, release = threading.Event(), threading.Event()
        peer = ScriptedPeer({"RCPT": lambda: reached.set() or release.wait(PATIENCE) and "250 ok"})
        world = self.running(FAR, {"192.0.2.25": peer})
        world.relay.start()
        self.eventually(lambda: world.queue.submitted == world.relay.submitted)
        id = world.submit("bob@far.test")
        self.assertTrue(reached.wait(PATIENCE))
        world.queue.place_hint(minimail.Dispatch(mock.Mock(id=id)), world.queue.new)
        world.relay.wake()
        self.eventually(lambda: world.relay._next < time.time() + 5)
        release.set()
        self.eventually(lambda: not world.files())
        self.assertEqual(len(peer.messages), 1)

    @unittest.skipUnless(hasattr(socket, "TCP_USER_TIMEOUT"), "not on this system")
    def test_a_host_that_is_gone_is_not_waited_for_like_one_that_thinks(self):
        """Ten minutes for the reply to the final dot, but not to a cable that was pulled: that ends by --timeout."""
        world = self.running(FAR, {}, timeout="20")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            world.relay.connect = lambda address, timeout: socket.create_connection(listener.getsockname(), timeout)
            sock = world.relay._connect("mx.far.test", "192.0.2.25", None).wire.sock
        with sock:
            self.assertEqual(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT), 20_000)
            self.assertTrue(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            times = [sock.getsockopt(socket.IPPROTO_TCP, option) for option in (
                socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)]
            self.assertLessEqual(times[0] + times[1] * times[2], 20)

    def test_a_dead_destination_does_not_hold_back_another(self):
        slow, fast, release = ScriptedPeer(), ScriptedPeer(), threading.Event()
        stuck = mock.Mock(connect=lambda: release.wait(PATIENCE) and slow.connect())
        world = self.running(dict(FAR, **NEAR), {"192.0.2.25": stuck, "192.0.2.26": fast})
        world.relay.start()
        try:
            for _ in range(20):
                world.submit("bob@far.test")
            world.submit("bob@far.test", "eve@near.test")

            def others():
                """mail for the live destination"""
                return len(fast.messages) == 1
            self.eventually(others)
            self.assertEqual(slow.messages, [])
        finally:
            release.set()

        def everything():
            """the rest"""
            return len(slow.messages) == 21 and not world.files()
        self.eventually(everything)
        self.assertLess(slow.connections, 21, "connections are reused")

    def test_a_message_that_hangs_holds_up_no_other_for_that_host(self):
        for stage in "end", "RCPT TO:<slow@far.test>":
            with self.subTest(stage):
                release, stuck = threading.Event(), threading.Event()

                def think(release=release, stuck=stuck):
                    first = not stuck.is_set()
                    stuck.set()
                    return "250 ok" if not first or release.wait(PATIENCE) else "DROP"
                peer = ScriptedPeer({stage: think})
                world = self.running(FAR, {"192.0.2.25": peer}, data=os.path.join(self.data, stage[:4]))
                world.relay.start()
                try:
                    world.submit("slow@far.test")
                    self.assertTrue(stuck.wait(PATIENCE))
                    for number in range(4):
                        world.submit("bob%d@far.test" % number)
                    self.eventually(lambda peer=peer: len(peer.messages) == 4, "the others")
                finally:
                    release.set()
                self.eventually(lambda world=world: not world.files())
                self.assertEqual(len(peer.messages), 5)

    def test_a_bounded_number_of_connections(self):
        """30 destinations with two messages each: three connections at a time, and all is sent in the end."""
        lock, now, most = threading.Lock(), [], []
        peers = [ScriptedPeer() for _ in range(30)]

        def connect(peer):
            with lock:
                now.append(peer)
                most.append(len(now))
            together.wait(0.02)                     # so that there would be more, were there no bound
            return peer.connect()
        together = threading.Event()
        for peer in peers:
            peer.script["QUIT"] = lambda peer=peer: now.remove(peer) or "221 bye\nDROP"
        world = self.running({"d%d.test" % n: ["A 192.0.2.%d" % (n + 100)] for n in range(30)},
                             {"192.0.2.%d" % (n + 100): mock.Mock(connect=lambda peer=peer: connect(peer))
                              for n, peer in enumerate(peers)})
        with mock.patch.object(minimail, "MAX_SENDERS", 3):
            for _ in range(2):
                for n in range(30):
                    world.submit("bob@d%d.test" % n)
            world.relay.start()

            def everything():
                """an empty queue"""
                return not world.files()
            self.eventually(everything)
        self.assertEqual([len(peer.messages) for peer in peers], [2] * 30)
        self.assertEqual(max(most), 3)
        self.eventually(lambda: not (world.relay._working or world.relay._held or world.relay._hungry))

    def test_many_destinations_are_recorded_together(self):
        """A message for ten domains: who has it is on disk before the next step, but not in ten envelopes of ten recipients."""
        peers, saves = [ScriptedPeer() for _ in range(10)], []
        world = self.running({"d%d.test" % n: ["A 192.0.2.%d" % (n + 100)] for n in range(10)},
                             {"192.0.2.%d" % (n + 100): peer for n, peer in enumerate(peers)})
        save = world.queue.save

        def late(dispatch):
            saves.append(dispatch)
            if len(saves) == 1:                     # the first is slow: all others come meanwhile
                self.eventually(lambda: all(peer.contents for peer in peers) and dispatch.served == 10)
            save(dispatch)
        with mock.patch.object(world.queue, "save", late):
            world.submit(*("bob@d%d.test" % n for n in range(10)))
            world.relay.start()
            self.eventually(lambda: not world.files())
        self.assertEqual(([len(peer.messages) for peer in peers], len(saves)), ([1] * 10, 2))

    def test_hosts_that_say_nothing_hold_up_only_who_sends_to_them(self):
        """A stranger's notices go to many domains of his, whose hosts greet after hours: our users' mail goes out at once."""
        for limit in "MAX_SENDERS", "MAX_ACTIVE":
            with self.subTest(limit), mock.patch.object(minimail, limit, 5):
                release, held = threading.Event(), []

                def greet(release=release, held=held):
                    held.append(1)
                    release.wait(PATIENCE)
                    return "220 at last"
                slow, fast = ScriptedPeer({"connect": greet}), ScriptedPeer()
                names = dict({"d%d.test" % n: ["A 192.0.2.25"] for n in range(10)}, **NEAR)
                world = self.running(names, {"192.0.2.25": slow, "192.0.2.26": fast}, data=os.path.join(self.data, limit))
                world.relay.start()
                try:
                    self.eventually(lambda world=world: world.queue.submitted == world.relay.submitted)
                    for n in range(10):             # one by one: what else is in the relay's inbox is reckoned as theirs
                        world.submit("x@d%d.test" % n, sender="")
                        self.eventually(lambda held=held, n=n: len(held) == min(n + 1, 5))
                    world.submit("bob@near.test")
                    self.eventually(lambda fast=fast: len(fast.messages) == 1, "the other's")
                    self.assertEqual(len(held), 5)
                finally:
                    release.set()
                self.eventually(lambda world=world: not world.files())

    def test_what_is_being_sent_goes_to_its_end(self):
        """Told to stop while a peer thinks about the final dot: its 250 is waited for, recorded, and nothing new begins."""
        release = threading.Event()
        peer = ScriptedPeer({"end": lambda: release.wait(PATIENCE) and "250 ok"})
        world = self.running(FAR, {"192.0.2.25": peer})
        world.submit("bob@far.test")
        world.relay.start()
        self.eventually(lambda: peer.contents)
        world.submit("bob@far.test")
        world.relay.stop()
        release.set()
        world.relay.join(PATIENCE)
        self.assertEqual((len(peer.messages), len(world.entries())), (1, 1))

    def test_entries_that_wait_are_sent_when_they_are_due(self):
        peer = ScriptedPeer({"connect": ["421 busy", "220 hi"]})
        world = self.running(FAR, {"192.0.2.25": peer}, retry="0.1")
        world.relay.start()
        world.submit("bob@far.test")
        self.eventually(lambda: peer.messages and not world.files())

    def test_two_destinations_of_one_message_are_both_tried(self):
        """Two threads take up the same entry at the same moment: neither drops its part."""
        peers = {"192.0.2.25": ScriptedPeer(), "192.0.2.26": ScriptedPeer()}
        world = self.running(dict(FAR, **NEAR), peers, retry="3600")
        claim, both = world.queue.claim, threading.Event()
        callers = []

        def slow_claim(entry):
            callers.append(entry)
            both.set() if len(callers) > 1 else both.wait(0.2)      # the second comes while the first is at it
            return claim(entry)
        with mock.patch.object(world.queue, "claim", slow_claim):
            world.relay.start()
            world.submit("bob@far.test", "eve@near.test")
            self.eventually(lambda: all(peer.messages for peer in peers.values()))
            self.eventually(lambda: not world.files())
        self.assertEqual([len(peer.messages) for peer in peers.values()], [1, 1])

    def test_what_two_destinations_record_at_once_does_not_cross(self):
        """One thread records a delivery while another one postpones the rest: one envelope, and nobody gets it twice."""
        peers = {"192.0.2.25": ScriptedPeer(), "192.0.2.26": ScriptedPeer({"RCPT": "451 4.2.0 later"})}
        world = self.running(dict(FAR, **NEAR), peers, retry="3600")
        save, postpone, settled = world.queue.save, world.queue.postpone, threading.Event()
        first = []

        def slow_save(entry):
            if not first:
                first.append(1)
                settled.wait(0.3)                   # let the other thread settle the entry meanwhile, if it may
            save(entry)

        def telling_postpone(entry, until):
            first.append(1)
            postpone(entry, until)
            settled.set()
        with mock.patch.object(world.queue, "save", slow_save), mock.patch.object(world.queue, "postpone", telling_postpone):
            world.relay.start()
            self.eventually(lambda: world.queue.submitted == world.relay.submitted)     # its sweep is over, which leaves hints
            world.submit("bob@far.test", "eve@near.test")
            self.eventually(settled.is_set)
            world.relay.stop()
            world.relay.join(PATIENCE)
        self.assertEqual(len(world.files()), 3, world.files())
        self.assertEqual([r["address"] for r in world.entries()[0].recipients], ["eve@near.test"])
        self.assertEqual(len(peers["192.0.2.25"].messages), 1)

    def test_node_cleans_up_at_its_start(self):
        """What killed processes left in tmp/ and queue/ is gone soon after a node's start."""
        world = ScriptedWorld(self, FAR, clock=time.time)
        world.submit("me@here.test", "bob@far.test")
        dead = "00000001-00001-011223344"
        left = [os.path.join(self.data, *parts) for parts in (
            ("queue", dead + ".msg"), ("queue", dead + ".env.tmp"), ("queue", "new", dead),
            ("mail", "here.test", "all", "tmp", "1.%s.mx.here.test" % dead))]
        for path in left:
            with open(path, "w"):
                pass
        with minimail.Node(data=self.data, smtp="off", pop3="off", domain="here.test", catch_all="all@here.test", no_sync=True,
                           resolver=ScriptedNames({"far.test": "SERVFAIL"})) as node:
            self.eventually(lambda: not any(map(os.path.exists, left)))
            self.assertEqual(len(node.messages("all@here.test")), 1)
        self.assertEqual(len(world.entries()), 1)


class DestinationsTest(ScriptedCase):
    """Local, elsewhere and both; aliases."""

    USERS = "\n".join("%s@here.test:$pbkdf2$1$AAAA$AAAA" % name for name in ("one", "two", "three"))

    def world(self, aliases="", **options):
        os.makedirs(self.data, exist_ok=True)
        for name, text in ("users", self.USERS), ("aliases", aliases):
            with open(os.path.join(self.data, name), "w", encoding="utf-8") as file:
                file.write(text + "\n")
        return ScriptedWorld(self, FAR, {"192.0.2.25": ScriptedPeer()}, **dict({"catch_all": None}, **options))

    def where(self, world):
        """Return all mailboxes with mail, and all recipients in the queue."""
        return {name: len(world.mail(name)) for name in world.stores.mailboxes.names() if world.mail(name)}, sorted(
            recipient["address"] for entry in world.entries() for recipient in entry.recipients)

    def test_aliases(self):
        world = self.world("team@here.test: one@here.test, Bob@far.test, more@here.test, bob@far.test\n"
                           "more@here.test: two@here.test, one@here.test,\n  eve@far.test\n"
                           "one@here.test: one@here.test, copy@far.test\nabuse@here.test: abuse@far.test\n")
        for address, expected in {"team@here.test": ({"one@here.test": 1, "two@here.test": 1}, 3),
                                  "TEAM+x@here.test": ({"one@here.test": 1, "two@here.test": 1}, 3),
                                  "abuse@here.test": ({}, 1), "one@here.test": ({"one@here.test": 1}, 1)}.items():
            with self.subTest(address):
                world = ScriptedWorld(self, FAR, {}, catch_all=None, data=os.path.join(self.data, address),
                                      users=os.path.join(self.data, "users"), aliases=os.path.join(self.data, "aliases"))
                world.submit(address)
                mailboxes, remote = self.where(world)
                self.assertEqual((mailboxes, len(remote)), expected)
                self.assertEqual(len(world.entries()), 1)

    def test_alias_and_recipient_are_one(self):
        world = self.world("team@here.test: one@here.test, bob@far.test")
        world.submit("team@here.test", "one@here.test", "bob@far.test", "BOB@far.test")
        mailboxes, remote = self.where(world)
        self.assertEqual((mailboxes, [address.lower() for address in remote]), ({"one@here.test": 1}, ["bob@far.test"]))

    def refusal(self, world, *recipients, **options):
        with self.assertRaises(Refused) as caught:
            world.submit(*recipients, **options)
        self.assertEqual(self.where(world), ({}, []))
        return "%d %s" % caught.exception.reply[:2]

    def test_aliases_that_lead_nowhere(self):
        many = "".join("l%d@here.test: l%d@here.test, m%d@here.test\nm%d@here.test: l%d@here.test, x%d@far.test\n" % (
            n, n + 1, n, n, n + 1, n) for n in range(60))
        wide = ", ".join("u%d@far.test" % n for n in range(1500))
        world = self.world("a@here.test: b@here.test\nb@here.test: c@here.test\nc@here.test: a@here.test\n"
                           "self@here.test: self@here.test\ndead@here.test: nobody@here.test\n"
                           "wide@here.test: %s\n%s" % (wide, many))
        for address, expected in ("a@here.test", "550 5.4.6"), ("self@here.test", "550 5.4.6"), \
                ("wide@here.test", "550 5.4.6"), ("dead@here.test", "550 5.1.1"), ("nobody@here.test", "550 5.1.1"):
            with self.subTest(address):
                self.assertEqual(self.refusal(world, address), expected)
        world.submit("l20@here.test")               # lists that name each other double at each level; each is gone through once
        self.assertEqual({address for address in self.where(world)[1]}, {"x%d@far.test" % n for n in range(20, 60)})

    def test_alias_target_without_ascii_form_locks_nobody_out(self):
        world = self.world("team@here.test: one@here.test, x@%s.test" % ("\u00fc" * 60))
        try:
            world.submit("team@here.test")
            self.assertEqual(self.where(world)[0], {"one@here.test": 1})
        except Refused as refused:
            self.assertEqual(refused.reply.code, 550)

    def test_local_and_remote_are_safe_together_or_refused(self):
        for blocked in "queue", "mail":
            with self.subTest(blocked):
                shutil.rmtree(self.data, ignore_errors=True)
                world = self.world()
                os.makedirs(os.path.dirname(os.path.join(self.data, blocked)), exist_ok=True)
                with open(os.path.join(self.data, blocked), "w"):      # a file where a directory should be
                    pass
                self.assertEqual(self.refusal(world, "one@here.test", "bob@far.test"), "451 4.3.0")
                self.assertEqual([name for name in world.files() if name != "new"], [])
                os.unlink(os.path.join(self.data, blocked))
                world.submit("one@here.test", "two@here.test", "bob@far.test")
                self.assertEqual(self.where(world), ({"one@here.test": 1, "two@here.test": 1}, ["bob@far.test"]))
                world.step()
                (_, _, wire), = world.hosts["192.0.2.25"].messages
                self.assertNotIn(b"Return-Path", wire)
                self.assertTrue(wire.endswith(LETTER) and wire.startswith(b"Received: "))

    def test_loops_end(self):
        world = self.world()
        self.assertEqual(self.refusal(world, "bob@far.test", content=b"Received: x\r\n" * 51 + LETTER), "554 5.4.6")
        self.assertEqual(self.refusal(world, "one@here.test", content=b"received: x\r\n y\r\n" * 51 + LETTER), "554 5.4.6")
        world.submit("bob@far.test", content=b"Received: x\r\n" * 50 + LETTER + b"Received: x\r\n" * 9)
        world.submit("bob@far.test", content=b"\r\n" + b"Received: x\r\n" * 60)      # no header at all

    def test_two_nodes_that_believe_the_other_keeps_the_mail(self):
        """A message between two relays that point at each other comes to an end, as a bounce to its sender."""
        content, hops = LETTER, 0
        while hops < 200:
            shutil.rmtree(self.data, ignore_errors=True)
            world = self.world()
            try:
                world.submit("bob@far.test", content=content)
            except Refused as refused:
                self.assertEqual(refused.reply[:2], (554, "5.4.6"))
                break
            world.step()
            content, hops = world.hosts["192.0.2.25"].messages[0][2], hops + 1
        self.assertEqual(hops, minimail.MAX_RECEIVED + 1)


class WhoMayRelayTest(ScriptedCase):
    """From 127.0.0.1, which is trusted or not."""

    def node(self, **options):
        os.makedirs(self.data, exist_ok=True)
        with open(os.path.join(self.data, "users"), "w") as file:
            file.write("bob@here.test:$pbkdf2$1$AAAA$AAAA\n")
        with open(os.path.join(self.data, "aliases"), "w") as file:
            file.write("away@here.test: bob@far.test\nelsewhere@here.test: bob@elsewhere.test\n")
        names = ScriptedNames({"far.test": "SERVFAIL", "sub.far.test": "SERVFAIL", "near.test": "SERVFAIL"})
        return minimail.Node(data=self.data, smtp="127.0.0.1:0", pop3="off", domain=["here.test", "also.test"], no_sync=True,
                             resolver=names, **options)

    def rcpt(self, node, path, sender="spam@elsewhere.test"):
        return scripted_dialog(node.smtp_address, "EHLO c.test", "MAIL FROM:<%s> SMTPUTF8" % sender, "RCPT TO:" + path)[-1]

    def queued(self):
        return os.listdir(os.path.join(self.data, "queue")) if os.path.exists(os.path.join(self.data, "queue")) else []

    def test_open_relay_tricks(self):
        with self.node(trust=["192.0.2.0/24"]) as node:
            for path in ("victim@far.test", "VICTIM@FAR.TEST", "victim@far.test.", "@here.test:victim@far.test",
                         "@here.test,@also.test:victim@far.test", "victim@[192.0.2.25]", "victim@[IPv6:2001:db8::1]",
                         '"victim"@far.test', "victim@here.test.far.test", "victim@nothere.test", "victim@b\u00fccher.test",
                         "postmaster@far.test", "victim@localhost", "victim@test", "bob@here.test@far.test"):
                for sender in "spam@elsewhere.test", "", "bob@here.test", "postmaster", "bob@[127.0.0.1]":
                    with self.subTest(path, sender=sender):
                        self.assertRegex(self.rcpt(node, "<%s>" % path, sender), r"\A(550 5\.7\.1|501 5\.1\.3|553 5\.1\.3)")
            for path in ("victim%far.test@here.test", "far.test!victim@here.test", "victim%far.test", "far.test!victim",
                         '"victim@far.test"@here.test', '"victim@far.test"', "victim@far.test@here.test",
                         "victim%far.test@[127.0.0.1]", "victim@here.test%far.test", "victim@far.test,bob@here.test",
                         "bob@here.test> <victim@far.test",
                         "victim@far.test\0@here.test", ":victim@far.test", "@:victim@far.test", "@here.test@far.test:victim"):
                with self.subTest(path):
                    self.assertRegex(self.rcpt(node, "<%s>" % path), r"\A(550|501|553|555) ")
            self.assertEqual(self.queued(), [])

    def test_who_is_at_home_is_reached_by_everybody(self):
        with self.node(trust=["192.0.2.0/24"]) as node:
            for path in ("bob@here.test", "BOB@HERE.TEST", "bob@here.test.", '"bob"@here.test', "@far.test:bob@here.test",
                         "bob+x@here.test", "bob@[127.0.0.1]", "postmaster", "Postmaster", "postmaster@here.test",
                         "POSTMASTER@ALSO.test",
                         "postmaster@[127.0.0.1]", "away@here.test"):
                for sender in "spam@elsewhere.test", "":
                    with self.subTest(path):
                        self.assertEqual(self.rcpt(node, "<%s>" % path, sender)[:9], "250 2.1.5")
            self.assertEqual(self.rcpt(node, "<eve@here.test>")[:9], "550 5.1.1")

    def test_trusted(self):
        with self.node() as node:
            for path in "victim@far.test", "victim@[192.0.2.25]", "@here.test:victim@far.test":
                self.assertEqual(self.rcpt(node, "<%s>" % path)[:9], "250 2.1.5", path)
            self.assertEqual(scripted_dialog(node.smtp_address, "EHLO c", "MAIL FROM:<bob@here.test>", "RCPT TO:<x@far.test>",
                                             "DATA", LETTER.decode() + ".")[-1][:3], "250")
            self.assertNotEqual(self.queued(), [])

    def test_relay_to(self):
        with self.node(relay_to=[".far.test", "near.test"]) as node:
            for path, code in ("x@near.test", "250 2.1.5"), ("x@NEAR.test", "250 2.1.5"), ("x@sub.far.test", "250 2.1.5"), \
                    ("x@far.test", "250 2.1.5"), ("x@sub.near.test", "550 5.7.1"), ("x@notnear.test", "550 5.7.1"), \
                    ("x@notfar.test", "550 5.7.1"), ("away@here.test", "250 2.1.5"), \
                    ("elsewhere@here.test", "550 5.7.1"), ("bob@here.test", "250 2.1.5"), ("postmaster", "250 2.1.5"), \
                    ("x@[192.0.2.25]", "550 5.7.1"):
                with self.subTest(path):
                    self.assertEqual(self.rcpt(node, "<%s>" % path)[:9], code)

    def test_relay_to_an_idn(self):
        """However it is spelled, here and there."""
        for given in "b\u00fccher.test", "xn--bcher-kva.test", ".b\u00fccher.test":
            with self.node(relay_to=given) as node:
                for path in "x@b\u00fccher.test", "x@xn--bcher-kva.test", "x@B\u00dcCHER.test":
                    with self.subTest(path, given=given):
                        self.assertEqual(self.rcpt(node, "<%s>" % path)[:9], "250 2.1.5")
                self.assertEqual(self.rcpt(node, "<x@near.test>")[:9], "550 5.7.1")

    def test_a_domain_without_ascii_form_is_refused_for_good(self):
        with self.node() as node:
            self.assertRegex(self.rcpt(node, "<x@%s.test>" % ("\u00fc" * 60)), r"\A(501|550|553) 5")
        self.assertEqual([line for line in self.logged if "failed" in line], [])

    def test_capture_mode_connects_to_nobody(self):
        """Whatever the recipient: kept here, looked up nowhere, and no socket of ours goes out."""
        def never(*_, **__):
            raise AssertionError("capture mode went out")
        with mock.patch.object(socket, "create_connection", never), mock.patch.object(minimail.Resolver, "query", never), \
                mock.patch.object(minimail.Relay, "start", never), \
                minimail.Node(smtp="127.0.0.1:0", pop3="off", smarthost="smtp://192.0.2.1", route="far.test=smtp://192.0.2.2",
                              no_sync=True) as node:
            people = ["bob@far.test", "x@[192.0.2.25]", "y@nowhere.invalid", "z@sub.far.test", "away@here.test"]
            with open(os.path.join(node.data, "aliases"), "w") as file:
                file.write("away@here.test: bob@far.test\n")
            replies = scripted_dialog(node.smtp_address, "EHLO c.test", "MAIL FROM:<me@here.test>",
                                      *["RCPT TO:<%s>" % person for person in people], "DATA", LETTER.decode() + ".")
            self.assertEqual(replies[-1][:3], "250")
            self.assertEqual(sorted(message.recipient for message in node.messages()), sorted(people))
            self.assertFalse(os.path.exists(os.path.join(node.data, "queue")))


class SendmailTest(ScriptedCase):
    """`minimail.py sendmail`, as programs call /usr/sbin/sendmail."""

    def setUp(self):
        super().setUp()
        os.makedirs(os.path.join(self.data, "run"))     # a node was here

    def sendmail(self, *arguments, stdin=b"Subject: hi\n\nbody\n",
                 options=("--domain", "here.test", "--catch-all", "all@here.test")):
        """Run it and return (status, error text)."""
        status, out, err = scripted_command("sendmail", *arguments, *options, "--data", self.data, "--hostname",
                                            "mx.here.test", "--no-sync", "--quiet", stdin=stdin)
        self.assertEqual(out, "")
        return status, err

    def sent(self, *arguments, **options):
        """Run it and return (sender, [recipient elsewhere], content without our Received) of what is in the queue."""
        self.assertEqual(self.sendmail(*arguments, **options), (0, ""))
        queue = minimail.Queue(minimail.Storage(self.data), minimail.Config())
        entry = max(queue.entries(), key=lambda entry: entry.id)
        with open(queue.path(entry.id), "rb") as file:
            content = file.read()[entry.offset:]
        fields, body = minimail.split_headers(content)
        content = b"".join(value for _, value in fields[1:]) + b"\r\n" + body
        return entry.sender, [recipient["address"] for recipient in entry.recipients], content

    def test_plain(self):
        sender, recipients, content = self.sent("-i", "-f", "me@here.test", "bob@far.test", "eve@far.test")
        self.assertEqual((sender, recipients), ("me@here.test", ["bob@far.test", "eve@far.test"]))
        message = email.message_from_bytes(content, policy=email.policy.default)
        self.assertEqual((message["Subject"], message.get_content(), message["From"]), ("hi", "body\r\n", "me@here.test"))
        self.assertTrue(message["Date"] and message["Message-ID"])
        self.assertNotRegex(content, rb"(?<!\r)\n")

    def test_headers_that_are_there_stay(self):
        head = b"Date: Thu, 01 Jan 1970 00:00:00 +0000\nMessage-ID: <1@x>\nFrom: Me <me@x.test>\nX-A: b\n c\n"
        content = self.sent("-f", "me@here.test", "-F", "My Name", "bob@far.test", stdin=head + b"\nbody\n")[2]
        self.assertEqual(content, head.replace(b"\n", b"\r\n") + b"\r\nbody\r\n")
        content = self.sent("-f", "me@here.test", "-F", "M\u00ff Name", "bob@far.test")[2]
        message = email.message_from_bytes(content, policy=email.policy.default)
        self.assertEqual(message["From"].addresses[0].display_name, "M\u00ff Name")

    def test_a_body_alone(self):
        """`echo hello | sendmail bob`: what is no header is the body."""
        content = self.sent("-f", "me@here.test", "bob@far.test", stdin=b"hello there: you\nbye\n")[2]
        message = email.message_from_bytes(content, policy=email.policy.default)
        self.assertEqual((message.get_content(), message["From"]), ("hello there: you\r\nbye\r\n", "me@here.test"))

    def test_recipients_from_headers(self):
        text = (b"To: Bob <bob@far.test>, \"Doe, Jane\" <jane@far.test>\nCc: eve@far.test,\n sam@far.test\n"
                b"Bcc: secret@far.test\nbcc: more@far.test,\n folded@far.test\nSubject: hi\n\nBcc: this stays\n")
        _, recipients, content = self.sent("-t", "-f", "me@here.test", "extra@far.test", stdin=text)
        self.assertEqual(sorted(recipients), sorted(name + "@far.test" for name in (
            "bob jane eve sam secret more folded extra".split())))
        for word in b"secret", b"more@", b"folded":
            self.assertNotIn(word, content)
        self.assertIn(b"Bcc: this stays", content)
        self.assertNotIn(b"secret", self.sent("-f", "me@here.test", "bob@far.test", stdin=text)[2], "Bcc goes without -t too")

    def test_lone_dot(self):
        text = b"Subject: hi\n\none\n.\ntwo\n"
        self.assertTrue(self.sent("-f", "me@here.test", "bob@far.test", stdin=text)[2].endswith(b"\r\none\r\n"))
        for option in "-i", "-oi":
            content = self.sent(option, "-f", "me@here.test", "bob@far.test", stdin=text)[2]
            self.assertTrue(content.endswith(b"one\r\n.\r\ntwo\r\n"), option)
        content = self.sent("-f", "me@here.test", "bob@far.test", stdin=text.replace(b"\n", b"\r\n"))[2]
        self.assertTrue(content.endswith(b"\r\none\r\n"))

    def test_options_of_the_original_are_taken(self):
        for options in ["-oi", "-oem", "-om"], ["-bm"], ["-B8BITMIME"], ["-N", "never"], ["-R", "hdrs"], ["-v"], \
                ["-r", "x@here.test"], ["-odb"], ["-G"], ["-U"], ["-n"], ["-ti"]:
            with self.subTest(options):
                self.assertEqual(self.sendmail(*options, "bob@far.test"), (0, ""))
        self.assertEqual(self.sent("-fme@here.test", "bob@far.test")[0], "me@here.test")

    def test_senders(self):
        for given, sender in ("me@here.test", "me@here.test"), ("me", "me@here.test"), ("<>", ""), ("", ""), \
                ("<me@here.test>", "me@here.test"):
            self.assertEqual(self.sent("-f", given, "bob@far.test")[0], sender, given)
        self.assertRegex(self.sent("bob@far.test")[0], r"\A[^@]+@here\.test\Z")

    def test_local_recipients(self):
        self.assertEqual(self.sendmail("-f", "me@here.test", "root", "all@here.test"), (0, ""))
        mailboxes = minimail.Mailboxes(minimail.Storage(self.data))
        item, = mailboxes.listing("all@here.test")
        self.assertEqual(minimail.Message(mailboxes, "all@here.test", item).email()["Subject"], "hi")

    def test_capture_mode(self):
        self.assertEqual(self.sendmail("-f", "me@here.test", "bob@far.test", options=()), (0, ""))
        self.assertEqual(list(minimail.Mailboxes(minimail.Storage(self.data)).names()), ["bob@far.test"])

    def test_refusals(self):
        """A line each with a status of sysexits(3), and nothing is sent to anybody."""
        for status, arguments, words, options in (
                (64, (), "recipient", ()), (64, ("-t",), "recipient", ()), (64, ("-bz", "x"), "-bz", ()), (64, ("--frob",), "--frob", ()),
                (64, ("bob@far.test", "-f"), "-f", ()),
                (65, ("a@b@c",), "a@b@c", ()),
                (67, ("nobody@here.test", "no@here.test"), "nobody@here.test", ()),
                (69, ("bob@far.test",), "5.3.4", ("--max-size", "10")),
                (65, ("x@%s.test" % ("\u00fc" * 60),), "x@", ()),
                (77, ("bob@far.test",), "bob@far.test", ("--relay-to", "near.test"))):
            with self.subTest(arguments):
                got, err = self.sendmail(*arguments, options=("--domain", "here.test") + options)
                self.assertEqual((got, err.count("\n")), (status, 1), err)
                self.assertIn(words, err)
        queue = minimail.Queue(minimail.Storage(self.data), minimail.Config())
        self.assertEqual(queue.ids(), [])
        with mock.patch.object(minimail, "open_stores", side_effect=OSError(errno.EACCES, "no", "/x")):
            self.assertEqual(self.sendmail("bob@far.test")[0], 75)
        with mock.patch.object(minimail, "open_stores", side_effect=ZeroDivisionError):
            self.assertEqual(self.sendmail("bob@far.test")[0], 70)

    def test_no_node_was_ever_here(self):
        """Mail is not swallowed by a directory that nobody reads."""
        for data in os.path.join(self.data, "typo"), self.data + "/run":
            status, out, err = scripted_command("sendmail", "bob@far.test", "--data", data, stdin=b"hi\n")
            self.assertEqual((status, out, err.count("\n"), data in err), (75, "", 1, True), err)
            self.assertFalse(os.path.exists(os.path.join(data, "queue")))

    def test_a_bad_address_among_good_ones_comes_back(self):
        for sender, box in ("all@here.test", "all@here.test"), ("nobody@here.test", "postmaster@here.test"):
            options = ("--domain", "here.test", "--relay-to", "far.test")
            record = minimail.hash_password("x")
            with open(os.path.join(self.data, "users"), "w") as file:
                file.write("all@here.test:%s\n" % record)
            bad = ["no@here.test", "a@b@c", "eve@elsewhere.test"]
            sent = self.sent("-f", sender, *bad, "bob@far.test", options=options)
            self.assertEqual(sent[1], ["bob@far.test"])
            mailboxes = minimail.Mailboxes(minimail.Storage(self.data))
            item, = mailboxes.listing(box)
            message = minimail.Message(mailboxes, box, item)
            self.assertEqual(message.sender, "")
            for word in bad + ["5.1.1", "5.1.3", "5.7.1", "Subject: hi"]:
                self.assertIn(word.encode(), message.read())
        status, err = self.sendmail("-f", "<>", "no@here.test", "bob@far.test", options=("--domain", "here.test"))
        self.assertEqual((status, err.count("\n")), (67, 1), err)
        self.assertIn("no@here.test", err)

    def test_what_may_go_later_is_left_to_the_caller(self):
        """A queue that is full refuses for now: nothing is sent, not even to those who are here, or they would get it twice."""
        with mock.patch.object(minimail, "MAX_QUEUE", 0):
            status, err = self.sendmail("all@here.test", "no@here.test", "bob@far.test")
        self.assertEqual((status, err.count("\n"), "bob@far.test" in err), (75, 1, True), err)
        self.assertEqual(list(minimail.Mailboxes(minimail.Storage(self.data)).names()), [])

    def test_own_names(self):
        """What cron and daemons write to."""
        names = ["root", "root@localhost", "root@localhost.localdomain", "root@mx.here.test", "root@" + minimail.machine_name(),
                 "root@[127.0.0.1]", "root@[IPv6:::ffff:127.0.0.1]", "ROOT@LocalHost", "abuse", "hostmaster@here.test", "mailer-daemon"]
        with open(os.path.join(self.data, "aliases"), "w") as file:
            file.write("postmaster: all@here.test\nall: admin@far.test\n")
        for name in names:
            self.assertEqual(self.sent("-f", "root@localhost", name, options=("--domain", "here.test"))[:2],
                             ("root@here.test", ["admin@far.test"]), name)

    def test_recipients_in_odd_forms(self):
        for arguments, wanted in (
                (["bob@far.test,amy@far.test"], ["amy", "bob"]), (["Bob B <bob@far.test>"], ["bob"]),
                (["bob@far.test", "BOB@far.test"], ["bob"]), (["bob@far.test", "-i"], ["bob"]),
                (['"Bob, B" <bob@far.test>, <amy@far.test>'], ["amy", "bob"]), (["a..b.@far.test"], ['"a..b."'])):
            recipients = self.sent("-f", "me", *arguments)[1]
            self.assertEqual(sorted(map(str.lower, recipients)), ["%s@far.test" % name for name in wanted], arguments)
        for head, wanted in (
                (b"To: bob@far.test (Smith, B.)", ["bob"]), (b"To: bob@far.test <bob@far.test>", ["bob"]),
                (b"To: bob@far.test; amy@far.test", ["amy", "bob"]), (b"To: Bob [IT] <bob@far.test>,", ["bob"]),
                (b"To: staff: amy@far.test, bob@far.test;\nCc:\n eve@far.test", ["amy", "bob", "eve"]),
                (b"To: old@far.test\nResent-To: bob@far.test\nResent-Bcc: amy@far.test\nResent-From: me@x.test", ["amy", "bob"])):
            _, recipients, content = self.sent("-t", "-f", "me", stdin=head + b"\nSubject: x\n\nx\n")
            self.assertEqual(sorted(recipients), ["%s@far.test" % name for name in wanted], head)
            self.assertNotIn(b"Resent-Bcc", content)

    def test_odd_input(self):
        """What Postfix's sendmail makes of it."""
        for given, wanted in (
                (b"From root Mon Nov 14 23:42:01 2016\nSubject: x\n\nhi\n", b"Subject: x\r\n|hi\r\n"),
                (b">From root Mon\nSubject: x\n\nFrom here\n", b"Subject: x\r\n|From here\r\n"),
                (b"Subject: x\nZFS has\n\nx\n", b"Subject: x\r\n|ZFS has\r\n\r\nx\r\n"),
                (b"Subject: x\r\r\n\r\r\nhi\r\r\nyou\r\n", b"Subject: x\r\n|hi\r\nyou\r\n"),
                (b"\nSubject: x\n", b"|Subject: x\r\n"), (b" x\n", b"| x\r\n"), (b"", b"|"), (b"\n\n", b"|\r\n"),
                (b"Subject: x\n y\n\tz", b"Subject: x\r\n y\r\n\tz\r\n|"),
                (b"Return-Path: <x@y.test>\nContent-Length: 5\nSubject: x\n\nhi", b"Subject: x\r\n|hi\r\n"),
                (b"From: root (Cron Daemon)\n\nx\n", b"From: root@here.test (Cron Daemon)\r\n|x\r\n"),
                (b"To: a, b@x, C D <e>, \"f, g\" <h@x>; (i) j (k)\n\nx\n",
                 b"To: a@here.test, b@x, C D <e@here.test>, \"f, g\" <h@x>; (i) j@here.test (k)\r\n|x\r\n"),
                (b"To: undisclosed-recipients:;\nCc: no such list\n\nx\n", b"To: undisclosed-recipients:;\r\nCc: no such list\r\n|x\r\n"),
                (b"X: 1\n\na\rb\n" + b"\r" * 3, b"X: 1\r\n|a\r\nb\r\n\r\n")):
            with self.subTest(given):
                head, _, body = self.sent("-i", "-f", "me", "bob@far.test", stdin=given)[2].partition(b"\r\n\r\n")
                kept = [line for line in (head + b"\r\n").splitlines(True)
                        if not re.match(rb"(Date|Message-ID): |From: me@", line)]
                self.assertEqual(b"".join(kept) + b"|" + body, wanted)

    def test_blocks_cut_anywhere(self):
        class Dripping(io.BytesIO):
            def read1(self, size=-1):
                return super().read1(1)
        for text in (b"A: b\r\r\nC: d\n\none\n.\ntwo\n", b"x\n.", b".\nx", b"a\r\n.\r\nb", b"a\n..\n.b\n.c.\n.\n\nd", b"\r\r", b"A:\n.\n"):
            for dots in False, True:
                came = []
                for file in io.BytesIO(text), Dripping(text):
                    message = minimail.Submission(file, dots)
                    came.append((message.fields, b"".join(message.body())))
                self.assertEqual(came[0], came[1], text)

    def test_passed_on(self):
        content = self.sent("-t", "-f", "me", stdin=b"From: x@far.test\nTo: old@far.test\nResent-To: bob@far.test\n\nx\n")[2]
        message = email.message_from_bytes(content)
        self.assertEqual((message["From"], message["Date"], message["Resent-From"]), ("x@far.test", None, "me@here.test"))
        self.assertTrue(message["Resent-Date"] and message["Resent-Message-ID"])

    def test_a_name_is_no_header(self):
        for name, wanted in (("x\nBcc: eve@far.test\n\nbody", "x Bcc: eve@far.test  body"), (os.fsdecode(b"Ren\xe9"), "Ren\u00e9"),
                             ('a "b" \\', 'a "b" \\'), ("\u0416" * 150, "\u0416" * 150), ("<x@y>, z", "<x@y>, z")):
            content = self.sent("-F", name, "-f", "me", "bob@far.test")[2]
            message = email.message_from_bytes(content, policy=email.policy.default)
            raw = email.message_from_bytes(content)["From"]
            shown = email.utils.parseaddr(str(email.header.make_header(email.header.decode_header(raw))))[0] if "=?" in raw \
                else message["From"].addresses[0].display_name
            self.assertEqual(shown, wanted)
            self.assertIsNone(message["Bcc"])

    def test_a_header_without_end(self):
        status, err = self.sendmail("-f", "me", "bob@far.test", stdin=b"X: " + b"y" * (minimail.MAX_SUBMITTED_HEADER + 1))
        self.assertEqual((status, err.count("\n")), (65, 1), err)
        content = self.sent("-f", "me", "bob@far.test", stdin=b"y" * (minimail.MAX_SUBMITTED_HEADER + 100))[2]
        self.assertEqual(len(content.partition(b"\r\n\r\n")[2]), minimail.MAX_SUBMITTED_HEADER + 102)

    def test_modes(self):
        self.assertEqual(self.sendmail("-bi"), (0, ""))
        self.assertEqual(self.sendmail("-I"), (0, ""))
        self.assertEqual(self.sendmail("-q"), (0, ""))
        self.assertEqual(self.sendmail("-q30m"), (0, ""))
        self.assertEqual(self.sendmail("-f", "me", "bob@far.test"), (0, ""))
        status, out, err = scripted_command(*minimail.program_words(["/usr/bin/mailq", "--data", self.data]))
        self.assertEqual((status, err), (0, ""))
        self.assertIn("bob@far.test", out)
        self.assertEqual(scripted_command(*minimail.program_words(["newaliases"])), (0, "", ""))
        status, out, err = scripted_command("sendmail", "-bv", "bob@far.test", "no@here.test", "--domain", "here.test", "--data", self.data)
        self.assertEqual((status, err), (67, ""))
        self.assertRegex(out, r"bob@far.test: deliverable\nno@here.test: 550 5.1.1 .*\n\Z")

    def test_smtp_on_standard_input(self):
        """What Symfony, Laravel and nmh start unasked; nothing is sent by this process, and input may end without QUIT.

        Lines of a local program may end in LF, but then all of them.
        """
        said = (b"EHLO x\r\nMAIL FROM:<me@here.test>\r\nRCPT TO:<bob@far.test>\r\nDATA\r\n"
                b"Subject: x\r\n\r\n.x\r\n.\r\n")
        for end, newline in (b"QUIT\r\n", b"\r\n"), (b"", b"\r\n"), (b"QUIT\r\n", b"\n"):
            ran = subprocess.run([sys.executable, PROGRAM, "sendmail", "-bs", "--data", self.data, "--domain", "here.test", "--trust", "192.0.2.1"],
                                 input=(said + end).replace(b"\r\n", newline),
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PATIENCE)
            self.assertEqual((ran.returncode, ran.stderr), (0, b""))
            self.assertRegex(ran.stdout, rb"(?s)\A220 .*\r\n354 .*\r\n250 2.0.0 .*")
        queue = minimail.Queue(minimail.Storage(self.data), minimail.Config())
        self.assertEqual([entry.attempts for entry in queue.entries()], [0, 0, 0])

    def test_line_ends_on_standard_input(self):
        """Blocks as they come in, what goes on."""
        for blocks, wanted in (([b"EHLO x\n", b"DATA\n\n", b".\n"], b"EHLO x\r\nDATA\r\n\r\n.\r\n"),
                               ([b"EHLO x\nNO", b"OP\n"], b"EHLO x\r\nNOOP\r\n"),
                               ([b"EHLO x\r\na\nb", b"\nc\r\n"], b"EHLO x\r\na\nb\nc\r\n"),
                               ([b"EHLO x\r\n", b"a\n"], b"EHLO x\r\na\n"),
                               ([b"EHLO x", b"\r\nNOOP\r\n"], b"EHLO x\r\nNOOP\r\n"),
                               ([b"EHLO x\r", b"\nNOOP\r\n"], b"EHLO x\r\nNOOP\r\n")):
            sock, left = mock.Mock(), iter(blocks + [b""])
            with self.subTest(blocks), mock.patch.object(minimail, "os", mock.Mock(read=lambda *_, left=left: next(left))):
                minimail.copy_input(sock)
                self.assertEqual(b"".join(call[0][0] for call in sock.sendall.call_args_list), wanted)

    @unittest.skipUnless(os.path.exists("/proc/self/status"), "no /proc here")
    def test_memory_does_not_grow_with_the_message(self):
        code = ("import minimail, sys; minimail.main(sys.argv[1:]); "
                "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])")
        used = []
        for size in 1, 24 << 20:
            with tempfile.TemporaryFile() as file:
                file.write(b"Subject: x\n\n" + b"line\n" * (size // 5))
                file.seek(0)
                ran = subprocess.run([sys.executable, "-c", code, "sendmail", "bob@far.test", "--data", self.data, "--domain", "here.test"],
                                     stdin=file, stdout=subprocess.PIPE, cwd=COMPILED.name, timeout=PATIENCE)
            used.append(int(ran.stdout))
        self.assertLess(used[1], used[0] + (12 << 10), "kB")      # PyPy lets garbage lie a while

    def test_standard_input_closed(self):
        ran = subprocess.run(["sh", "-c", '"$@" <&-', "sh", sys.executable, PROGRAM, "sendmail", "bob@far.test", "--data", self.data,
                              "--domain", "here.test"], stderr=subprocess.PIPE, timeout=PATIENCE)
        self.assertEqual((ran.returncode, ran.stderr), (0, b""))

    def test_work_is_linear(self):
        """Header, body and addresses made to be hard: four times as much costs at most some eight times as much."""
        shapes = (lambda n: b"x\n\n" + b"\r" * n, lambda n: b"To: " + b"(" * n, lambda n: b"To: " + b'"\\' * n, lambda n: b"X:\n y" * (n // 5),
                  lambda n: b"To: " + b"a," * (n // 2), lambda n: b"To: " + b"<" * n + b"\n\nx", lambda n: b"x\n" + b".\r" * (n // 2))

        def read(text):
            message = minimail.Submission(io.BytesIO(text), False)
            for _, field in message.fields:
                minimail.qualify_field(field, "here.test")
            for _ in message.body():
                pass
        for shape in shapes:
            small, large = (cpu_of(functools.partial(read, shape(size))) for size in (20_000, 80_000))
            self.assertLess(large, 8 * small + 0.1)

    def test_8bit_and_utf8(self):
        _, recipients, _ = self.sent("-f", "me@here.test", "b\u00f6b@far.test",
                                     stdin="Subject: B\u00fccher\n\n\u00fc\n".encode())
        self.assertEqual(recipients, ["b\u00f6b@far.test"])
        queue = minimail.Queue(minimail.Storage(self.data), minimail.Config())
        entry, = queue.entries()
        self.assertTrue(entry.eightbit and entry.smtputf8)


class MXCommandTest(ScriptedCase):

    NAMES = {"far.test": ["MX 20 b.test", "MX 10 a.test"], "a.test": ["A 192.0.2.10", "AAAA 2001:db8::10"],
             "b.test": ["A 192.0.2.11"],
             "implicit.test": ["A 192.0.2.12"], "null.test": ["MX 0 ."], "empty.test": [], "broken.test": "SERVFAIL",
             "loop.test": ["MX 1 mx.here.test"], "xn--bcher-kva.test": ["A 192.0.2.13"], "relay.test": ["A 192.0.2.14"]}

    def setUp(self):
        super().setUp()
        zone = minimail.Zone(self.NAMES)
        self.server = ScriptedDNS(lambda query: zone.reply(query, tcp=False)).__enter__()
        self.addCleanup(self.server.__exit__)

    def mx(self, where, *options):
        """Return (status, first line, other lines)."""
        status, out, err = scripted_command("mx", where, "--dns", "%s:%d" % self.server.address, "--data", self.data,
                                            "--hostname", "mx.here.test", *options)
        self.assertEqual(err, "")
        first, *rest = out.splitlines()
        return status, first, rest

    def test_each_kind(self):
        node = ("--domain", "here.test", "--domain", "also.test")
        for where, options, status, words, lines in (
                ("far.test", (), 0, "exchangers", ["10 a.test 192.0.2.10 2001:db8::10", "20 b.test 192.0.2.11"]),
                ("x@FAR.test.", node, 0, "exchangers", ["10 a.test 192.0.2.10 2001:db8::10", "20 b.test 192.0.2.11"]),
                ("far.test", (), 0, "TTL 60", mock.ANY),
                ("implicit.test", (), 0, "no MX", ["0 implicit.test 192.0.2.12"]),
                ("b\u00fccher.test", (), 0, "no MX", ["0 xn--bcher-kva.test 192.0.2.13"]),
                ("x@[192.0.2.9]", (), 0, "literal", ["0 [192.0.2.9] 192.0.2.9"]),
                ("null.test", (), 1, "5.1.10", []), ("none.test", (), 1, "5.1.2", []), ("empty.test", (), 1, "5.1.2", []),
                ("broken.test", (), 1, "4.4.3", []), ("loop.test", node, 1, "5.4.6", []),
                ("far.test", ("--route", "far.test=smtp://user:secret@192.0.2.20:26"), 0, "--route to smtp://192.0.2.20:26",
                 ["0 192.0.2.20 192.0.2.20"]),
                ("x@sub.far.test", ("--route", ".far.test=smtp://relay.test"), 0, "--route", ["0 relay.test 192.0.2.14"]),
                ("far.test", ("--smarthost", "smtps://user:secret@relay.test"), 0, "--smarthost smtps://relay.test:465",
                 ["0 relay.test 192.0.2.14"])):
            with self.subTest(where, options=options):
                found = self.mx(where, *options)
                self.assertEqual((found[0], found[2]), (status, lines), found)
                self.assertIn(words, found[1])
                self.assertNotIn("secret", found[1])
        self.assertFalse(os.path.exists(self.data), "it only looks")

    def test_local(self):
        os.makedirs(self.data)
        with open(os.path.join(self.data, "users"), "w") as file:
            file.write("bob@here.test:$pbkdf2$1$AAAA$AAAA\n")
        with open(os.path.join(self.data, "aliases"), "w") as file:
            file.write("team@here.test: bob@here.test, eve@far.test\n")
        for where, status, words, lines in (
                ("here.test", 0, "local", []), ("HERE.test", 0, "local", []),
                ("bob@here.test", 0, "local mailbox", ["0 mailbox bob@here.test"]),
                ("team@here.test", 0, "alias", ["0 mailbox bob@here.test", "0 remote eve@far.test"]),
                ("localhost", 0, "local", []), ("mx.here.test", 0, "local", []), ("localhost.here.test", 0, "local", []),
                ("root@localhost", 0, "alias", ["0 mailbox postmaster@here.test"]),
                ("bob@mx.here.test", 0, "local mailbox", ["0 mailbox bob@here.test"]),
                ("nobody@here.test", 1, "5.1.1", []), ("nobody@localhost", 1, "5.1.1", [])):
            with self.subTest(where):
                found = self.mx(where, "--domain", "here.test")
                self.assertEqual((found[0], found[2]), (status, lines))
                self.assertIn(words, found[1])

    def test_wrong_usage(self):
        for arguments in [], ["a..b"], ["x@"], ["@"], ["a", "b"], ["x" * 64 + ".test"], ["\u00fc" * 60 + ".test"]:
            with self.subTest(arguments):
                status, out, err = scripted_command("mx", *arguments, "--data", self.data)
                self.assertEqual((status, out, err.count("\n")), (2, "", 1))


class CrashTest(ScriptedCase):
    """Every file operation on the way to a 250, to a delivery and to a deletion fails once, or is the process's last."""

    FAULTS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "crash": None}
    PEOPLE = "one@here.test", "two@here.test"

    def world(self, hosts=None):
        os.makedirs(self.root, exist_ok=True)
        with open(os.path.join(self.root, "users"), "w") as file:
            file.write("".join(name + ":$pbkdf2$1$AAAA$AAAA\n" for name in self.PEOPLE))
        return ScriptedWorld(self, FAR, hosts, data=self.root, no_sync=False, catch_all="one@here.test")

    def every_step(self, act, check, prepare=lambda: None):
        """For each fault and each n: prepare(), act(disk) with the n-th file operation failing, check(outcome, fault).

        A first run without fault tells how many operations there are.
        """
        if not hasattr(os, "fork"):
            self.skipTest("no fork")
        self.root = os.path.join(self.data, "untouched")
        prepare()
        untouched = ScriptedDisk(self.root)
        check(act(untouched), "none")
        self.assertGreaterEqual(len(untouched.trace), 3)
        for fault, error in self.FAULTS.items():
            for n, where in enumerate(untouched.trace, 1):
                self.root = os.path.join(self.data, "%s-%d" % (fault, n))
                disk = ScriptedDisk(self.root, n, error)
                with self.subTest(fault, n=n, where="%s %s" % where):
                    prepare()
                    outcome = in_child(lambda disk=disk: act(disk)) if error is None else act(disk)
                    self.assertTrue(disk.tripped or (error is None and outcome is None))
                    check(outcome or "crashed", fault)
                shutil.rmtree(self.root)

    def restarted(self, hosts=None):
        """Return the world after a restart's clean-up, having checked that it left nothing over."""
        world = self.world(hosts)
        world.stores.mailboxes.sweep()
        world.queue.sweep()
        self.nothing_is_left_over(world)
        return world

    def nothing_is_left_over(self, world):
        """No drafts, no message without envelope or the reverse; what mailboxes show is whole."""
        messages = {name[:-4] for name in world.files() if name.endswith(".msg")}
        envelopes = {name[:-4] for name in world.files() if name.endswith(".env")}
        hints = {os.path.basename(name) for name in world.files() if os.sep in name}
        self.assertEqual((messages, len(world.files())), (envelopes, 2 * len(envelopes) + len(list(world.queue.hints()))))
        self.assertLessEqual(envelopes, hints)
        for above, _, names in os.walk(os.path.join(self.root, "mail")):
            for name in names:
                if os.path.basename(above) != "new":
                    self.assertEqual(name, "minimail.lock", above)
                    continue
                with open(os.path.join(above, name), "rb") as file:
                    content = file.read()
                self.assertTrue(content.startswith(b"Return-Path: ") and content.endswith(b"\r\n"), "half-written")
                self.assertEqual(len(content), int(re.search(r"S=(\d+)", name).group(1)))

    def accept(self, *recipients):
        def act(disk):
            world = self.world()
            try:
                with disk:
                    world.submit(*recipients, content=LETTER * 10)
                outcome = "250"
            except Refused as refused:
                outcome = str(refused.reply.code)
                if disk.error is not None:
                    self.nothing_is_left_over(world)
                    self.assertEqual(world.files(), [], "refused, but there")
                    self.assertEqual([world.mail(name) for name in self.PEOPLE], [[], []], "refused, but there")
            return outcome
        return act

    def test_from_data_to_250(self):
        """Two mailboxes: both have it after a 250, none after a refusal."""
        def check(outcome, fault):
            world = self.restarted()
            counts = [len(world.mail(name)) for name in self.PEOPLE]
            self.assertIn(outcome, {"none": ("250",), "EIO": ("250", "451"), "ENOSPC": ("250", "451", "452"),
                                    "crash": ("crashed",)}[fault])
            if outcome == "crashed":
                self.assertLessEqual(max(counts), 1)
            else:
                self.assertEqual(counts, [1, 1] if outcome == "250" else [0, 0])
        self.every_step(self.accept(*self.PEOPLE), check)

    def test_from_data_to_250_over_smtp_with_transcripts(self):
        """Capture mode as it comes: a real session, and a transcript beside the message."""
        def act(disk):
            no_sweep = mock.patch.object(minimail.Node, "_sweep")       # it might look at a transcript meanwhile
            with no_sweep, minimail.Node(data=self.root, smtp="127.0.0.1:0", pop3="off") as node:
                with disk:
                    reply = scripted_dialog(node.smtp_address, "EHLO c.test", "MAIL FROM:<me@x.test>",
                                            "RCPT TO:<one@here.test>", "DATA", LETTER.decode() + ".", "QUIT")[-2]
                self.assertEqual(len(node.messages()), reply.startswith("250"))
            return reply[:9]

        def check(outcome, fault):
            self.assertIn(outcome, {"none": ("250 2.0.0",), "EIO": ("250 2.0.0", "451 4.3.0"),
                                    "ENOSPC": ("250 2.0.0", "452 4.3.1"), "crash": ("crashed",)}[fault])
            count = len(self.restarted().mail("one@here.test"))
            self.assertIn(count, (0, 1) if fault == "crash" else (outcome.startswith("250"),))
        self.every_step(act, check)

    def test_from_data_to_250_local_and_elsewhere(self):
        def check(outcome, fault):
            peer = ScriptedPeer()
            world = self.restarted({"192.0.2.25": peer})
            world.step()
            peer.settle()
            counts = [len(world.mail("one@here.test")), len(peer.messages)]
            if outcome == "crashed":
                self.assertLessEqual(max(counts), 1)
            else:
                self.assertEqual(counts, [1, 1] if outcome == "250" else [0, 0])
            self.assertTrue(all(message[2].endswith(LETTER * 10) for message in peer.messages))
            self.assertEqual(world.files(), [])
        self.every_step(self.accept("one@here.test", "bob@far.test"), check)

    @staticmethod
    def finish(world):
        """Let the relay try all that waits, twice."""
        for _ in range(2):
            world.clock.now += 7200
            world.step()

    def test_from_queue_to_sent(self):
        """One recipient is delivered, one bounced, one deferred: at the end each came to its due, once if at all possible."""
        script = {"RCPT TO:<eve@far.test>": "550 5.1.1 no", "RCPT TO:<sam@far.test>": ["451 4.2.0 later", "250 ok"]}
        with ScriptedPeer() as peer:
            port = peer.listen()
            hosts = {"192.0.2.25": mock.Mock(connect=lambda: socket.create_connection(("127.0.0.1", port)))}

            def prepare():
                peer.messages.clear()
                peer.script.update({key: list(value) if isinstance(value, list) else value for key, value in script.items()})
                world = self.world()
                world.submit("bob@far.test", "eve@far.test", "sam@far.test", sender="two@here.test")

            def act(disk):
                world = self.world(hosts)
                with disk, contextlib.suppress(OSError):
                    world.step()
                taken = len(peer.messages)
                if disk.error is not None:          # the process goes on
                    self.finish(world)
                    self.assertEqual(world.entries(), [], "stuck until the next start")
                return str(taken)

            def check(outcome, fault):
                world = self.restarted(hosts)
                self.finish(world)
                peer.settle()
                got = collections.Counter(recipient for message in peer.messages for recipient in message[1])
                self.assertEqual(set(got), {"<bob@far.test>", "<sam@far.test>"})
                self.assertLessEqual(max(got.values()), 2)
                self.assertLessEqual(got["<sam@far.test>"], 1 if outcome == "1" else 2)
                self.assertIn(len(world.mail("two@here.test")), (1, 2))
                self.assertEqual(world.files(), [])
                self.assertTrue(all(message[2].endswith(LETTER) for message in peer.messages))
            self.every_step(act, check, prepare)

    @needs("pop3")
    def test_from_dele_to_quit(self):
        """What was not deleted stays; +OK means that all of it is gone."""
        def prepare():
            world = self.world()
            for number in range(4):
                world.submit("one@here.test", content=b"Subject: %d\r\n\r\n" % number)

        def act(disk):
            with minimail.Node(data=self.root, smtp="off", pop3="127.0.0.1:0") as node, socket.socket() as sock:
                sock.settimeout(PATIENCE)
                sock.connect(node.pop3_address)
                with sock.makefile("rb") as file:
                    def say(line):
                        sock.sendall(line + b"\r\n")
                        return file.readline().decode()
                    file.readline()
                    for line in b"USER one@here.test", b"PASS x", b"DELE 1", b"DELE 2", b"DELE 4":
                        self.assertEqual(say(line)[:3], "+OK")
                    with disk:
                        return say(b"QUIT").split()[0]

        def check(outcome, fault):
            left = [message["Subject"] for message in self.restarted().mail("one@here.test")]
            self.assertIn("2", left)
            if outcome == "+OK":
                self.assertEqual(left, ["2"])
            elif outcome == "-ERR":
                self.assertEqual(len(left), 2, "one could not be removed, the others were")
        self.every_step(act, check, prepare)

    def test_order_of_a_promise(self):
        """Data is flushed before it gets its name, and the name before the 250: what a power cut needs."""
        self.root = os.path.join(self.data, "order")
        world = self.world()
        with ScriptedDisk(self.root) as disk:
            world.submit("one@here.test", "two@here.test", "bob@far.test")
        names = [(number, operation, path) for number, (operation, path) in enumerate(disk.trace)]
        last_write = max(number for number, operation, _ in names if operation == "write")
        first_name = min(number for number, operation, path in names
                         if operation in ("rename", "replace") or (operation == "link" and os.sep + "new" + os.sep in path))
        flushed = [path for number, operation, path in names if operation == "fsync" and last_write < number < first_name]
        self.assertEqual(len(flushed), 2, "message and envelope")
        for number, operation, path in names:
            if operation in ("rename", "replace", "link") and not path.endswith(".tmp"):
                later = [other for at, what, other in names if what == "fsync" and at > number]
                self.assertIn(os.path.dirname(path), later, path)


class TriedOnce(ScriptedCase):
    def test_a_second_hint_is_no_second_attempt(self):
        """Not even where the next attempt is less than a second off."""
        world = ScriptedWorld(self, {}, {}, smarthost="smtp://192.0.2.25", retry="0.9")
        id = world.submit("bob@far.test")
        world.step()
        world.queue.place_hint(minimail.Dispatch(world.queue.read(id)), world.queue.new)
        for _ in range(3):
            world.stores.storage.wake("flush")
            world.step()
        self.assertEqual(len(world.connected), 1)
        world.clock.now += 3
        world.step()
        self.assertEqual(len(world.connected), 2)


# ======================================================================================================================
# 13  Standing: DKIM, SRS, MTA-STS, SPF, the doctor.  A second verifier, slow and simple; the examples of the RFCs.
# ======================================================================================================================

RSA_PKCS1 = b"""\
-----BEGIN RSA PRIVATE KEY-----
MIICXQIBAAKBgQDwIRP/UC3SBsEmGqZ9ZJW3/DkMoGeLnQg1fWn7/zYtIxN2SnFC
jxOCKG9v3b4jYfcTNh5ijSsq631uBItLa7od+v/RtdC2UzJ1lWT947qR+Rcac2gb
to/NMqJ0fzfVjH4OuKhitdY9tf6mcwGjaNBcWToIMmPSPDdQPNUYckcQ2QIDAQAB
AoGBALmn+XwWk7akvkUlqb+dOxyLB9i5VBVfje89Teolwc9YJT36BGN/l4e0l6QX
/1//6DWUTB3KI6wFcm7TWJcxbS0tcKZX7FsJvUz1SbQnkS54DJck1EZO/BLa5ckJ
gAYIaqlA9C0ZwM6i58lLlPadX/rtHb7pWzeNcZHjKrjM461ZAkEA+itss2nRlmyO
n1/5yDyCluST4dQfO8kAB3toSEVc7DeFeDhnC1mZdjASZNvdHS4gbLIA1hUGEF9m
3hKsGUMMPwJBAPW5v/U+AWTADFCS22t72NUurgzeAbzb1HWMqO4y4+9Hpjk5wvL/
eVYizyuce3/fGke7aRYw/ADKygMJdW8H/OcCQQDz5OQb4j2QDpPZc0Nc4QlbvMsj
7p7otWRO5xRa6SzXqqV3+F0VpqvDmshEBkoCydaYwc2o6WQ5EBmExeV8124XAkEA
qZzGsIxVP+sEVRWZmW6KNFSdVUpk3qzK0Tz/WjQMe5z0UunY9Ax9/4PVhp/j61bf
eAYXunajbBSOLlx4D+TunwJBANkPI5S9iylsbLs6NkaMHV6k5ioHBBmgCak95JGX
GMot/L2x0IYyMLAz6oLWh2hm7zwtb0CgOrPo1ke44hFYnfc=
-----END RSA PRIVATE KEY-----
"""                                                 # of RFC 6376 appendix C
ED25519_SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")     # of RFC 8463 appendix A, as is all of:
ED25519_PUBLIC = "11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
EVERY_KIND_OF_FIELD = b"""\
From: =?utf-8?q?B=C3=B6b?= (comment) <ann@here.test>\r
FROM : second@here.test\r
To:bob@far.test\r
Subject:    many\t\t blanks   \r
\tand folds  \r
X-Odd-But-Not-Signed: \xff\xfe\r
Cc: B\xc3\xb6b <boeb@far.test>\r
Empty:\r
Reply-To:\r
\r
"""
ODD_BODIES = [b"", b"\r\n", b"\r\n\r\n\r\n", b"hello\r\n", b"hello", b" \t \r\n \r\n", b"  a  b\t\tc \r\n\r\n \r\n", b" \r\n x\r\n\r\n",
              b"a\r\n\r\nb \r\n\r\n\r\n", b"\xff\x00 \xe4\r\n", b".\r\n..\r\n", b" ", b"\t\r\n\t", b"a " * 5000 + b"\r\n" * 500,
              b"\r\n" * 300 + b"x"]


def canonical_slowly(body):
    """RFC 6376 section 3.4.4, line by line."""
    lines = [re.sub(rb"[ \t]+", b" ", line).rstrip(b" ") for line in body.split(b"\r\n")]
    while lines and not lines[-1]:
        lines.pop()
    return b"".join(line + b"\r\n" for line in lines)


def verified(message, records):
    """Return the (domain, algorithm) of each signature on a message that holds, by the published records."""
    head, _, body = message.partition(b"\r\n\r\n")
    lines = []
    for line in head.split(b"\r\n"):
        if line[:1] in b" \t" and lines and line:
            lines[-1] += b"\r\n" + line
        else:
            lines.append(line)

    def relaxed(line):
        name, _, value = line.partition(b":")
        return name.strip().lower() + b":" + b" ".join(value.replace(b"\r\n", b"").replace(b"\t", b" ").split(b" ")).strip()

    def squeeze(line):
        while b"  " in line:
            line = line.replace(b"  ", b" ")
        return line
    good = []
    for line in lines:
        if not line.lower().startswith(b"dkim-signature:"):
            continue
        tags = dict((part.partition(b"=")[0].strip().decode(), b"".join(part.partition(b"=")[2].split()).decode())
                    for part in line.partition(b":")[2].split(b";"))
        left = list(reversed([other for other in lines if other is not line]))
        data = b""
        for name in tags["h"].lower().split(":"):
            match = next((other for other in left if other.partition(b":")[0].strip().lower().decode("latin-1") == name), None)
            if match is not None:
                left.remove(match)
                data += squeeze(relaxed(match)) + b"\r\n"
        data += squeeze(relaxed(re.sub(rb"(\bb=)[^;]*$", rb"\1", line, flags=re.S)))
        public = base64.b64decode(minimail.parse_tags(records["%s._domainkey.%s" % (tags["s"], tags["d"])])["p"])
        holds = minimail.rsa_verifies if tags["a"] == "rsa-sha256" else minimail.ed25519_verifies
        if tags["bh"] == base64.b64encode(hashlib.sha256(canonical_slowly(body)).digest()).decode() and \
                holds(public, base64.b64decode(tags["b"]), hashlib.sha256(data).digest()):
            good.append((tags["d"], tags["a"]))
    return good


class DKIMKeys(Case):
    @classmethod
    def setUpClass(cls):
        cls.rsa = minimail.read_key(RSA_PKCS1)
        cls.ed25519 = minimail.Ed25519Key(ED25519_SEED)

    def test_pem_of_all_kinds(self):
        for key in self.rsa, self.ed25519:
            text = minimail.pem("PRIVATE KEY", key.encode())
            for spelled in text, text.replace(b"\n", b"\r\n"), b"Private-Key: (1024 bit)\n" + text + b"\nmore", text * 2:
                self.assertEqual(minimail.read_key(spelled).public(), key.public())
        self.assertEqual(base64.b64encode(self.ed25519.public()).decode(), ED25519_PUBLIC)

    def test_what_is_no_key(self):
        other = minimail.der(0x30, minimail.der_integer(0), minimail.der(0x30, minimail.der(6, b"\x2b\x65\x71")),
                             minimail.der(4, b""))
        for text, words in ((b"", "no private key"), (CERTIFICATE.partition(b"-----BEGIN CERT")[0], "neither an RSA"),
                            (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no private key"),
                            (RSA_PKCS1.replace(b"-----\nMII", b"-----\nProc-Type: 4,ENCRYPTED\n\nMII"), "passphrase"),
                            (b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END", "passphrase"),
                            (minimail.pem("PRIVATE KEY", other), "neither an RSA"), (b"x" * 100_000, "larger than"),
                            (RSA_PKCS1.replace(b"MIIC", b"M!IC"), ""), (RSA_PKCS1.replace(b"MIIC", b"MIID"), "DER"),
                            (minimail.pem("RSA PRIVATE KEY", minimail.der(0x30, b"")), "DER")):
            with self.subTest(text[:60]), self.assertRaisesRegex(ValueError, words):
                minimail.read_key(text)

    def test_numbers_that_are_no_key(self):
        p, q = self.rsa.p, self.rsa.q
        for wrong in (p, p), (p, q + 2), (p, q, 65536), (p, q, 1), (p, 3), (p * q, q), (p, q, p), (p, 0), (-p, -q):
            with self.subTest(wrong), self.assertRaises(ValueError):
                minimail.RSAKey(*wrong)

    def test_fuzzed(self):
        """Whatever bytes are changed, cut or put in: a key, or ValueError."""
        chance = random.Random(14)
        for number in range(600):
            data = bytearray(chance.choice([self.ed25519.encode(), self.rsa.encode(), base64.b64decode(
                b"".join(RSA_PKCS1.split(b"\n")[1:-2]))]))
            for _ in range(chance.choice([1, 1, 2, 5])):
                at = chance.randrange(min(len(data), chance.choice([30, len(data)])))
                data[at:at + chance.choice([0, 1, 1, 9])] = bytes(chance.choice([
                    [chance.randrange(256)], [0x84, 255, 255, 255, 255], [0x80], [], [2, 0], [0x30, 0x30]]))
            label = chance.choice(["PRIVATE KEY", "RSA PRIVATE KEY"])
            with self.subTest(number=number), contextlib.suppress(ValueError):
                minimail.read_key(minimail.pem(label, bytes(data)))
            for function in minimail.rsa_verifies, minimail.ed25519_verifies:
                with self.subTest(number=number), contextlib.suppress(ValueError):
                    self.assertFalse(function(bytes(data), bytes(64), bytes(32)))
            with self.subTest(number=number), contextlib.suppress(ValueError):
                minimail.read_certificate(minimail.pem("CERTIFICATE", bytes(data)))

    def test_rfc_8032(self):
        """Its first two examples: the empty message, and one of a byte."""
        for seed, message, signature in (
                (ED25519_SEED, b"", "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701c"
                                    "f9b46bd25bf5f0595bbe24655141438e7a100b"),
                (bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"), b"\x72",
                 "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302ae"
                 "eb00d291612bb0c00")):
            key = minimail.Ed25519Key(seed)
            self.assertEqual(key.sign(message).hex(), signature)
            self.assertTrue(minimail.ed25519_verifies(key.public(), bytes.fromhex(signature), message))

    def test_wrong_signatures(self):
        digest = hashlib.sha256(b"x").digest()
        for key, holds in (self.rsa, minimail.rsa_verifies), (self.ed25519, minimail.ed25519_verifies):
            good = key.sign(digest)
            self.assertTrue(holds(key.public(), good, digest))
            self.assertFalse(holds(key.public(), good, hashlib.sha256(b"y").digest()))
            with contextlib.suppress(ValueError):
                self.assertFalse(holds(key.public(), good[:-1] + bytes([good[-1] ^ 1]), digest))
        with self.assertRaises(ValueError):
            minimail.ed25519_verifies(bytes([2]) + bytes(31), bytes(64), digest)

    def test_a_fault_while_signing_gives_nothing_away(self):
        key = minimail.read_key(RSA_PKCS1)
        key.dp ^= 4
        with self.assertRaises(ValueError):
            key.sign(bytes(32))

    def test_generation(self):
        key = minimail.RSAKey.generate(1024)
        self.assertEqual(key.bits, 1024)
        self.assertEqual(minimail.read_key(minimail.pem("PRIVATE KEY", key.encode())).n, key.n)
        for n in 9, 561, 341550071728321, key.p * key.q, 3215031751:       # Carmichael numbers among them
            self.assertFalse(minimail.is_prime(n))
        self.assertTrue(all(map(minimail.is_prime, (5, 7, 104729, 2 ** 127 - 1))))

    def command(self, *arguments):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = main(list(arguments))
        return status, printed.getvalue()

    def test_command(self):
        data = os.path.join(self.directory(), "data")
        status, printed = self.command("--data", data, "dkim", "Here.test")
        file = os.path.join(data, "dkim", "here.test", "mail.pem")
        self.assertEqual((status, stat.S_IMODE(os.stat(file).st_mode)), (0, 0o600))
        with open(file, "rb") as opened:
            key = minimail.read_key(opened.read())
        self.assertEqual((key.kind, key.bits), ("rsa", 2048))
        self.assertRegex(printed, r"(?m)^mail\._domainkey\.here\.test\. IN TXT \(\n\t\"v=DKIM1; k=rsa; p=")
        strings = re.findall(r'"([^"]*)"', printed)
        self.assertLessEqual(max(map(len, strings)), 255)
        self.assertEqual(minimail.record_misfit("".join(strings), key), "")
        again = self.command("--data", data, "dkim", "here.test")
        self.assertIn("".join(strings), again[1])
        self.assertEqual(self.command("--data", data, "dkim", "here.test", "second", "--type", "ed25519")[0], 0)
        both = self.command("--data", data, "dkim", "here.test")[1]
        self.assertIn("k=ed25519", both)
        self.assertIn("".join(strings), both)
        for arguments in (["not a domain"], [], ["here.test", "a/b"], ["here.test", "x", "--bits", "1"]):
            self.assertEqual(self.command("--data", data, "dkim", *arguments)[0], 2, arguments)

    def test_record(self):
        record = minimail.key_record(self.rsa)
        for text in record, record.replace("v=DKIM1; ", ""), record.replace("; ", ";\t"), record + "; t=y; s=email; h=sha256:x":
            self.assertEqual(minimail.record_misfit(text, self.rsa), "", text)
        for text, words in ((record.replace("DKIM1", "DKIM2"), "v="), ("v=DKIM1; p=", "revoked"), ("v=DKIM1", "no key"),
                            (minimail.key_record(self.ed25519), "another kind"), (record + "; h=sha1", "sha256"),
                            (record + "; s=tlsrpt", "e-mail"), (record.replace("p=MI", "p=AA"), "broken"),
                            (record.replace("p=MI", "p=M"), "broken"),
                            (minimail.key_record(minimail.RSAKey.generate(1024)), "another key")):
            self.assertIn(words, minimail.record_misfit(text, self.rsa))

    def test_zone_file(self):
        self.assertEqual(minimail.zone_record("a.test", 'say "x\\"'), 'a.test. IN TXT "say \\"x\\\\\\""')
        long = minimail.zone_record("a.test", "x" * 700)
        self.assertEqual("".join(re.findall(r'"(x+)"', long)), "x" * 700)
        self.assertLessEqual(max(map(len, re.findall(r'"(x+)"', long))), 255)

    def test_certificate(self):
        found = minimail.read_certificate(CERTIFICATE)
        self.assertEqual(found.names, ["mail.test", "localhost"])
        self.assertEqual(found.not_after, datetime.datetime(2120, 1, 1, tzinfo=datetime.timezone.utc).timestamp())


class DKIMSignatures(Case):
    KEYS = [("here.test", "one", minimail.read_key(RSA_PKCS1)), ("here.test", "two", minimail.Ed25519Key(ED25519_SEED))]
    RECORDS = {"%s._domainkey.%s" % (selector, domain): minimail.key_record(key) for domain, selector, key in KEYS}
    BOTH = [("here.test", "rsa-sha256"), ("here.test", "ed25519-sha256")]

    def sign(self, message, size=7):
        blocks = [message[start:start + size] for start in range(0, len(message), size)]
        return minimail.sign_content(blocks, lambda fields: self.KEYS, 1e9)

    def test_every_kind(self):
        for size in 1, 7, 100000:
            for body in ODD_BODIES[:-2] if size == 1 else ODD_BODIES:
                message = EVERY_KIND_OF_FIELD + body
                self.assertEqual(verified(self.sign(message, size) + message, self.RECORDS), self.BOTH, body[:50])

    def test_body_hash_is_the_same_however_it_comes(self):
        chance = random.Random(6376)
        for number in range(2000):
            body = b"".join(chance.choice([b" ", b"\t", b"\r\n", b"\r", b"\n", b"a", b".", b"\r\n\r\n"])
                            for _ in range(chance.randrange(20)))
            hashed = minimail.BodyHash()
            at = 0
            while at < len(body):
                size = chance.choice([1, 1, 2, 3, 10])
                hashed.update(body[at:at + size])
                at += size
            self.assertEqual(hashed.digest(), hashlib.sha256(canonical_slowly(body)).digest(), (number, body))

    def test_whoever_adds_or_changes_a_field_breaks_it(self):
        message = b"From: a@here.test\r\nTo: b@far.test\r\nSubject: x\r\nList-Id: <l.here.test>\r\nX: y\r\n\r\nbody\r\n"
        signed = self.sign(message) + message
        for name in (b"From", b"To", b"Subject", b"Date", b"Reply-To", b"Cc", b"Message-ID", b"Content-Type", b"List-Id"):
            self.assertEqual(verified(name + b": more\r\n" + signed, self.RECORDS), [], name)
        for old, new in (b"Subject: x", b"Subject: z"), (b"body", b"body!"), (b"X: y", b"Cc: y"):
            self.assertEqual(verified(signed.replace(old, new), self.RECORDS), [], new)
        for prefix in b"Received: by x\r\n", b"Return-Path: <a@b>\r\n", b"List-Unsubscribe: <mailto:x@y>\r\n", b"Resent-To: c@d\r\n":
            self.assertEqual(verified(prefix + signed, self.RECORDS), self.BOTH, prefix)     # mail hosts and lists may
        self.assertEqual(verified(signed.replace(b"X: y", b"X: z").replace(b"Subject: x", b"SUBJECT:  \r\n x "), self.RECORDS),
                         self.BOTH)

    def test_the_field_is_well_formed(self):
        text = self.sign(EVERY_KIND_OF_FIELD + b"x\r\n").decode()
        self.assertLessEqual(max(map(len, text.split("\r\n"))), 78)
        self.assertEqual(text.count("DKIM-Signature: v=1; a="), 2)
        self.assertIn("c=relaxed/relaxed; d=here.test;\r\n\ts=one; t=1000000000;", text)
        self.assertNotIn("\n", text.replace("\r\n", ""))

    def test_headers_that_are_hostile(self):
        """Too long or with too many fields: no signature rather than memory or time without end."""
        started = time.process_time()
        for message in (b"To: x\r\n" * 10_000 + b"\r\nbody", b"Subject: " + b"x" * (3 << 20), b"A: b\r\n" + b" x\r\n" * 500_000,
                        b"X" * (2 << 20) + b"\r\n\r\n"):
            self.assertEqual(self.sign(message, 1 << 16), b"")
        for message in b"", b"\r\n", b"no header at all\r\n", b":\r\n\r\n", b" folded first\r\nFrom: a@here.test\r\n\r\nx":
            self.assertTrue(self.sign(message))
        self.assertLess(time.process_time() - started, 20)

    def test_from(self):
        for field, domains in ((b"a@Here.test", ["here.test"]), (b"Ann <a@here.test>", ["here.test"]),
                               (b'"x@evil.test" <a@here.test>', ["here.test"]), (b"(x@evil.test) a@here.test", ["here.test"]),
                               (b"x@evil.test <a@here.test>", ["here.test"]), (b"a@here.test, b@far.test", ["here.test", "far.test"]),
                               (b'"a@here.test"', []), (b"", []), (b"undisclosed:;", []), (b'"\\"<x@y>" <a@here.test>', ["here.test"]),
                               (b"((nested) x@evil.test) <a@here.test>", ["here.test"]), (b"@", []),
                               (b"Eve <eve@evil.test>, bob@here.test", ["evil.test", "here.test"]), (b"a @ here.test", ["here.test"]),
                               (b"<a@here.test(comment)>", ["here.test"]), (b"<@relay.test:a@here.test>", ["here.test"]),
                               ("a@b\u00fccher.test".encode(), ["xn--bcher-kva.test"]), (b"a@here.test\r\n (x)", ["here.test"])):
            self.assertEqual(minimail.author_domains([("from", b"From: " + field), ("to", b"To: x@y.test")]), domains, field)
        for hostile in b"(" * 100_000, b"<@" * 50_000, b'"' * 100_001, b"\\" * 100_000, b"@" * 100_000:
            minimail.author_domains([("from", b"From: " + hostile)])

    def keyring(self, **options):
        config = Config(**dict(dict(data=self.directory(), domain=("here.test", "there.test"), hostname="mx.here.test"), **options))
        return minimail.Keyring(config, "mx.here.test")

    def test_whose_mail_is_signed(self):
        """From's domain, else the reverse-path's; of strangers' mail nothing that could pass for ours."""
        ring = self.keyring()
        for authors, sender, trusted, domain in (
                (["here.test"], "x.test", True, "here.test"), (["there.test"], "here.test", True, "there.test"),
                (["x.test"], "there.test", True, "there.test"), (["x.test"], "y.test", True, ""), ([], "here.test", True, "here.test"),
                (["mx.here.test"], "", True, "here.test"), (["x.test", "there.test"], "", True, "there.test"),
                (["x.example"], "here.test", False, "here.test"), (["here.test"], "here.test", False, ""),
                (["sub.here.test"], "here.test", False, ""), ([], "here.test", False, ""),
                (["x.example", "mx.there.test"], "here.test", False, ""), (["x.example"], "y.test", False, "")):
            self.assertEqual(ring.signing_domain(authors, sender, trusted), domain, (authors, sender, trusted))

    def test_a_from_that_is_too_long_is_not_ours(self):
        """Who stands at its end is shown, and was not read: our reverse-path, as a forward has, vouches for none of it."""
        ring = self.keyring(dkim=(("", "o", self.file("o.pem", minimail.pem("PRIVATE KEY", self.KEYS[1][2].encode()))),))
        for authors, trusted, signed in (
                (b'a@evil.example,\r\n "%s" <ceo@here.test>' % (b"A" * minimail.MAX_COMMAND), False, False),
                (b"a@evil.example,\r\n" + (b" " * 70 + b"\r\n") * 60 + b" ceo@here.test", False, False),
                (b"a@evil.example", False, True), (b'"%s" <ceo@here.test>' % (b"A" * 1000), True, True)):
            message = b"From: " + authors + b"\r\nSubject: x\r\n\r\nx\r\n"
            found = ring.sign([message], "SRS0=aaaa=bb=evil.example=a@here.test", trusted, 1e9)
            self.assertEqual(b"d=here.test;" in found, signed, authors[:50])

    def test_keys_of_the_data_directory_and_of_options(self):
        data = self.directory()
        pem = minimail.pem("PRIVATE KEY", self.KEYS[1][2].encode())
        message = [b"From: a@here.test\r\n\r\n", b"x\r\n"]
        ring = self.keyring(data=data)
        self.assertEqual(ring.sign(message, "a@here.test", True, 1e9), b"")
        os.makedirs(os.path.dirname(ring.file("here.test", "k1")))
        with open(ring.file("here.test", "k1"), "wb") as file:
            file.write(RSA_PKCS1)
        self.assertIn(b"d=here.test;\r\n\ts=k1;", ring.sign(message, "a@here.test", True, 1e9))
        self.assertEqual(ring.sign(message, "a@here.test", False, 1e9), b"")
        self.assertEqual(ring.sign([b"From: a@there.test\r\n\r\n"], "a@there.test", True, 1e9), b"")
        with open(ring.file("here.test", "k2"), "wb") as file:
            file.write(pem)
        for stray in "._k1.pem", "k1 (copy).pem", ".pem", "K\xfc.pem":     # as other systems and file managers leave
            with open(os.path.join(os.path.dirname(ring.file("here.test", "k1")), stray), "wb"):
                pass
        self.assertEqual(ring.sign(message, "a@here.test", True, 1e9).count(b"DKIM-Signature"), 2)
        given = self.keyring(data=data, dkim=(("", "o", self.file("o.pem", pem)), ("there.test", "t", self.file("t.pem", pem))))
        given.check()
        signed = given.sign(message, "a@here.test", True, 1e9)
        self.assertEqual((signed.count(b"DKIM-Signature"), b"s=o;" in signed), (1, True))
        self.assertEqual(given.sign([b"From: a@there.test\r\n\r\n"], "", True, 1e9).count(b"DKIM-Signature"), 2)
        with self.assertRaisesRegex(OSError, "--dkim: cannot use /nonexistent/x"):
            self.keyring(dkim=(("", "o", "/nonexistent/x"),)).check()

    def test_a_key_that_breaks_is_complained_of_once_and_the_old_one_stays(self):
        file = self.file("k.pem", RSA_PKCS1)
        ring = self.keyring(dkim=(("", "k", file),))
        message = [b"From: a@here.test\r\n\r\n"]
        self.assertTrue(ring.sign(message, "", True, 1e9))
        with open(file, "wb") as broken:
            broken.write(b"no key")
        with self.assertLogs("minimail", "WARNING") as logged:
            for _ in range(3):
                self.assertTrue(ring.sign(message, "", True, 1e9))
        self.assertEqual(len(logged.output), 1)
        with open(file, "wb") as better:
            better.write(minimail.pem("PRIVATE KEY", self.KEYS[1][2].encode()))
        self.assertIn(b"a=ed25519-sha256", ring.sign(message, "", True, 1e9))


class SRSRewriting(Case):
    def test_what_is_released_in_capture_mode_goes_as_it_came(self):
        directory = self.directory()
        srs = minimail.SRS(Config(data=directory), minimail.Storage(directory, False))
        self.assertEqual(srs.forward("ann@far.test"), "ann@far.test")

    def test_a_file_system_without_links(self):
        directory = self.directory()
        srs = minimail.SRS(Config(data=directory, domain=("here.test",)), minimail.Storage(directory, False), lambda: self.NOW)
        with mock.patch.object(os, "link", side_effect=PermissionError(errno.EPERM, "no links")):
            sender = srs.forward("ann@far.test")
        self.assertEqual(srs.reverse(minimail.parse_address(sender)), Address("ann", "far.test"))
        self.assertEqual(os.listdir(directory), ["srs"])

    @mock.patch.object(minimail.Watched, "PAUSE", 0.0)
    def test_a_file_without_a_secret(self):
        """As a restore that ran out of room leaves it."""
        srs = self.srs()
        ours = srs.forward("ann@far.test")
        os.truncate(srs.path, 0)
        with self.assertLogs("minimail") as logs:
            self.assertRaises(Refused, srs.reverse, minimail.parse_address(ours))
        self.assertIn("had no secret left", logs.output[0])
        self.assertEqual(str(srs.reverse(minimail.parse_address(srs.forward("ann@far.test")))), "ann@far.test")
        self.assertEqual(os.listdir(srs.storage.root), ["srs"])

    def test_a_secret_is_not_made_on_the_disk_beneath(self):
        srs = self.srs()
        ours = srs.forward("ann@far.test")
        os.unlink(srs.path)
        srs.storage._beneath = os.stat(srs.storage.root).st_dev     # as it is where the file system is not mounted any more
        with mock.patch.object(minimail.Watched, "PAUSE", 0.0), self.assertLogs("minimail"):
            self.assertEqual(str(srs.reverse(minimail.parse_address(ours))), "ann@far.test")
        self.assertEqual(os.listdir(srs.storage.root), [])

    NOW = 1_700_000_000.0

    def srs(self, **options):
        config = Config(**dict(dict(data=self.directory(), domain=("here.test",)), **options))
        return minimail.SRS(config, minimail.Storage(config.data, False), lambda: self.NOW)

    def test_there_and_back(self):
        srs = self.srs()
        for sender in "ann@far.test", "Ann.B=c@far.test", "a+b-c@xn--bcher-kva.test", "o'hara@far.test":
            ours = srs.forward(sender)
            self.assertRegex(ours, r"^SRS0=[A-Za-z0-9+/]{4}=[A-Z2-7]{2}=[^=]+=.*@here\.test$")
            for spelled in ours, ours.lower(), ours.upper():
                back = srs.reverse(minimail.parse_address(spelled))
                self.assertEqual(str(back).lower(), sender.lower())
            self.assertEqual(str(srs.reverse(minimail.parse_address(ours))), sender)
        self.assertEqual(stat.S_IMODE(os.stat(srs.path).st_mode), 0o600)
        again = minimail.SRS(Config(data=os.path.dirname(srs.path), domain=("here.test",)), srs.storage, lambda: self.NOW)
        self.assertEqual(again.forward("ann@far.test"), srs.forward("ann@far.test"), "the secret does not last")

    def test_what_stays(self):
        srs = self.srs()
        for sender in "", "ann@here.test", "ann@HERE.test", "ann@[192.0.2.1]":
            self.assertEqual(srs.forward(sender), sender)
        for address in "ann@here.test", "srs0x=a@here.test", "srs@here.test", "SRS0=aaaa=bb=far.test=x@other.test", "SRS2=x@here.test":
            self.assertIsNone(srs.reverse(minimail.parse_address(address)))

    def test_twice(self):
        """What is SRS already, of others or of ours at another node, becomes SRS1, which does not grow any more."""
        first, second, third = (self.srs(domain=(name,)) for name in ("one.test", "two.test", "three.test"))
        once = first.forward("ann@far.test")
        twice = second.forward(once)
        thrice = third.forward(twice)
        self.assertRegex(twice, r"^SRS1=....=one\.test==....=..=far\.test=ann@two\.test$")
        self.assertRegex(thrice, r"^SRS1=....=one\.test==....=..=far\.test=ann@three\.test$")
        self.assertEqual(str(third.reverse(minimail.parse_address(thrice))), once)
        self.assertEqual(str(second.reverse(minimail.parse_address(twice))), once)
        self.assertEqual(srs_of(first, once), "ann@far.test")
        for separator in "+-":
            odd = "SRS0%sabcd=QX=far.test=ann@one.test" % separator
            self.assertEqual(srs_of(second, second.forward(odd)), odd)

    def test_forged(self):
        srs = self.srs()
        good = srs.forward("ann@far.test")
        for wrong in (good.replace("far.test", "evil.test"), good.replace("ann", "eve"), "SRS0@here.test", "SRS0=@here.test",
                      "SRS0====@here.test", "SRS0=====x@here.test", "SRS1=abcd=far.test==x@here.test", "SRS1=@here.test",
                      "SRS0=" + good[10:], "SRS0=" + good[6:], re.sub("=(....)=", lambda m: "=" + m.group(1) * 2 + "=", good, count=1)):
            with self.subTest(wrong):
                try:
                    address = minimail.parse_address(wrong)
                except Refused:
                    continue
                if wrong == "SRS0@here.test":
                    self.assertIsNone(srs.reverse(address))
                else:
                    self.refused("550", srs.reverse, address)

    def test_its_time(self):
        good = self.srs().forward
        srs = self.srs()
        address = minimail.parse_address(srs.forward("ann@far.test"))
        start = self.NOW
        for days, taken in (0, True), (20, True), (21, True), (22, False), (500, False), (1024, True), (-1, False):
            self.NOW = start + days * 86400
            if taken:
                self.assertEqual(str(srs.reverse(address)), "ann@far.test", days)
            else:
                self.refused("550", srs.reverse, address)
        self.assertTrue(good)

    def test_several_secrets(self):
        """As postsrsd has it: the first line signs, all are good."""
        srs = self.srs()
        old = srs.forward("ann@far.test")
        with open(srs.path, "r+") as file:
            secret = file.read()
            file.seek(0)
            file.write("new secret\n" + secret)
        srs._secrets.get(fresh=True)
        self.assertNotEqual(srs.forward("ann@far.test"), old)
        self.assertEqual(srs_of(srs, old), "ann@far.test")

    def test_two_that_make_the_secret_at_once(self):
        directory = self.directory()
        rings = [minimail.SRS(Config(data=directory, domain=("here.test",)), minimail.Storage(directory, False), lambda: self.NOW)
                 for _ in range(8)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            made = set(pool.map(lambda srs: srs.forward("ann@far.test"), rings))
        self.assertEqual(len(made), 1)
        self.assertEqual(os.listdir(directory), ["srs"])


def srs_of(srs, address):
    return str(srs.reverse(minimail.parse_address(address)))


class STSPolicies(Case):
    POLICY = b"version: STSv1\r\nmode: enforce\r\nmx: mx.far.test\r\nmx: *.backup.test\r\nmax_age: 604800\r\n"

    def test_a_node_starts_without_what_was_kept(self):
        storage = minimail.Storage(self.directory(), False)
        kept = os.path.join(storage.root, "mta-sts")
        os.mkdir(kept)
        with of_somebody_else(kept):
            sts = minimail.Standing(Config(data=storage.root), "here.test", storage, None).sts
            self.assertIsNone(sts.kept("far.test"))

    def test_record(self):
        for texts, id in ((["v=STSv1; id=20160831085700Z;"], "20160831085700Z"), (["v=STSv1;id=1"], "1"), (["x", "v=STSv1; id=a"], "a"),
                          ([], ""), (["v=STSv1"], ""), (["v=STSv1; id=a", "v=STSv1; id=b"], ""), (["v=STSv10; id=a"], ""),
                          (["v=STSv1; id=a-b"], ""), (["v=STSv1; id=" + "a" * 33], ""), (["id=a; v=STSv1"], ""), (["v=STSv1 ;id=a; x=y"], "a")):
            self.assertEqual(minimail.parse_sts_record(texts), id, texts)

    def test_policy(self):
        policy = minimail.parse_sts_policy(self.POLICY, "1", 1e9)
        self.assertEqual((policy.mode, policy.mx, policy.max_age), ("enforce", ["mx.far.test", "*.backup.test"], 604800))
        for host, allowed in (("mx.far.test", True), ("MX.far.test.", True), ("a.backup.test", True), ("backup.test", False),
                              ("a.b.backup.test", False), ("far.test", False), ("xmx.far.test", False), ("", False)):
            self.assertEqual(policy.allows(host), allowed, host)
        same = minimail.parse_sts_policy(self.POLICY.replace(b"\r\n", b"\n") + b"new: value\n", "1", 1e9)
        self.assertEqual(same, policy)
        for old, new in ((b"STSv1", b"STSv2"), (b"enforce", b"strict"), (b"604800", b"soon"), (b"604800", b"-1"), (b"mx:", b"nx:"),
                         (b"mx.far.test", b"mx far"), (b"*.backup", b"*backup"), (b"604800", "\u0661".encode()), (self.POLICY, b""),
                         (b"mx.far.test", b"\xff"), (b"604800", b"9" * 11)):
            with self.subTest(new), self.assertRaises(ValueError):
                minimail.parse_sts_policy(self.POLICY.replace(old, new), "1", 1e9)
        self.assertEqual(minimail.parse_sts_policy(b"version: STSv1\nmode: none\nmax_age: 9999999999\n", "", 0).max_age, 31557600)

    def sts(self, directory=None, answers=()):
        """Return an STS whose fetches give `answers` in turn: a policy's bytes, or an exception."""
        self.now = 1e9
        zone = minimail.Zone({"_mta-sts.far.test": ["TXT v=STSv1; id=1"]})
        self.names = zone.names
        resolver = minimail.Resolver([("127.0.0.1", 53)], exchange=zone.exchange, etc="/nonexistent", clock=lambda: self.now)
        directory = directory or self.directory()
        sts = minimail.STS(directory, resolver, minimail.Storage(directory, False).write, lambda: self.now)
        answers = list(answers)
        self.fetched = []

        def fetch(domain, id):
            self.fetched.append((domain, id))
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return minimail.parse_sts_policy(answer, id, self.now)
        sts.fetch = fetch
        return sts

    def test_kept_over_a_restart_until_it_is_too_old(self):
        directory = self.directory()
        sts = self.sts(directory, [self.POLICY])
        self.assertEqual(sts.policy("far.test").mode, "enforce")
        self.assertEqual(sts.policy("far.test").mx[0], "mx.far.test")
        self.assertEqual(self.fetched, [("far.test", "1")])
        self.assertIsNone(sts.policy("other.test"))
        later = self.sts(directory, [OSError("no")] * 99)
        del self.names["_mta-sts.far.test"]         # whoever takes the record away does not win
        self.now += 604000
        self.assertEqual(later.policy("far.test").mode, "enforce")
        self.now += 1000
        self.assertIsNone(later.policy("far.test"))
        self.assertEqual(self.fetched, [])

    def test_what_is_too_old_is_removed(self):
        sts = self.sts()
        os.mkdir(sts.root)
        for domain, days in (("old.test", 9), ("asked.test", 9), ("new.test", 6)):
            sts.keep(domain, minimail.parse_sts_policy(self.POLICY, "1", self.now - days * 86400))
        self.assertIsNone(sts.kept("asked.test"))
        self.assertEqual(sorted(os.listdir(sts.root)), ["new.test", "old.test"])
        sts.sweep()
        self.now -= 365 * 86400                     # a clock that was set back takes no policy away
        sts.sweep()
        self.now += 365 * 86400
        self.assertEqual(os.listdir(sts.root), ["new.test"])
        self.assertEqual(sts.kept("new.test").mode, "enforce")

    def test_fetched_anew(self):
        weaker = self.POLICY.replace(b"enforce", b"testing")
        sts = self.sts(None, [self.POLICY, OSError("down"), weaker, self.POLICY, weaker.replace(b"testing", b"none")])
        self.assertEqual(sts.policy("far.test").mode, "enforce")
        self.names["_mta-sts.far.test"] = ["TXT v=STSv1; id=2"]
        self.now += 90                              # its TTL has run out
        self.assertEqual(sts.policy("far.test").mode, "enforce")    # it cannot be fetched: the old one holds
        self.assertEqual(sts.policy("far.test").mode, "enforce")
        self.assertEqual(len(self.fetched), 2, "a fetch that failed is not tried for each message")
        self.now += 301
        self.assertEqual(sts.policy("far.test").mode, "testing")
        self.assertEqual(sts.policy("far.test").id, "2")
        self.now += 86500                           # the same id: refreshed now and then, so that it does not run out
        self.assertEqual(sts.policy("far.test").mode, "enforce")
        self.names["_mta-sts.far.test"] = ["TXT v=STSv1; id=3"]
        self.now += 90
        self.assertIsNone(sts.policy("far.test"), "mode none")

    def test_a_file_that_is_broken(self):
        sts = self.sts(None, [OSError("no")] * 9)
        os.mkdir(sts.root)
        for content in b"", b"[1]", b"{}", b"\xff", b'{"id": 1}', b'{"id":"1","mode":"enforce","mx":[],"max_age":"x","fetched_at":1e9}':
            with open(os.path.join(sts.root, "far.test"), "wb") as file:
                file.write(content)
            self.assertIsNone(sts.policy("far.test"), content)

    def test_when_nothing_can_be_fetched(self):
        sts = self.sts(None, [OSError("no"), ValueError("a redirect")])
        with self.assertLogs("minimail", "INFO") as logged:
            self.assertIsNone(sts.policy("far.test"))
            self.assertIsNone(sts.policy("far.test"))
        self.assertEqual(len(logged.output), 1)

    def test_http_answers(self):
        parse = minimail.parse_http_answer
        self.assertEqual(parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", 9), (200, {"content-length": "2"}, b"hi"))
        for wrong in b"", b"HTTP/1.1 200 OK\r\n", b"SSH-2.0\r\n\r\n", b"HTTP/1.1 20\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 10, \
                b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 9999 + b"\r\n":
            with self.assertRaises(ValueError):
                parse(wrong, 9)


class SPFReading(Case):
    ZONE = {
        "here.test": ["TXT v=spf1 mx -all", "TXT unrelated", "MX 10 mx.here.test"], "mx.here.test": ["A 192.0.2.1", "AAAA 2001:db8::1"],
        "none.test": ["TXT hello"], "two.test": ["TXT v=spf1 -all", "TXT v=spf1 +all"], "soft.test": ["TXT v=spf1 a:mx.here.test/24 ~all"],
        "inc.test": ["TXT v=spf1 include:here.test ?all"], "gone.test": ["TXT v=spf1 include:nobody.test -all"],
        "redirect.test": ["TXT v=spf1 redirect=here.test"], "loop.test": ["TXT v=spf1 include:loop.test -all"],
        "ip.test": ["TXT v=spf1 ip4:192.0.2.0/28 ip6:2001:db8::/32 -all"], "bad.test": ["TXT v=spf1 a -al"],
        "many.test": ["TXT v=spf1 " + " ".join("a:h%d.test" % n for n in range(11)) + " -all"],
        "void.test": ["TXT v=spf1 a:n1.test a:n2.test a:n3.test -all"], "upper.test": ["TXT V=SPF1 A:MX.HERE.TEST -ALL"],
        "macro.test": ["TXT v=spf1 exists:%{ir}.%{l1r-}.%{d2}.x.test -all"], "1.2.0.192.ann.macro.test.x.test": ["A 127.0.0.2"],
        "ptr.test": ["TXT v=spf1 ptr:here.test -all"], "1.2.0.192.in-addr.arpa": ["PTR mx.here.test"], "fail.test": ["SERVFAIL"],
        "mod.test": ["TXT v=spf1 new=x exp=e.%{d} a:mx.here.test -all"], "empty.test": ["TXT v=spf1"], "neutral.test": ["TXT v=spf1 ?ip4:192.0.2.1"],
    }
    ZONE.update({"h%d.test" % n: ["A 203.0.113.1"] for n in range(12)})

    def spf(self, host, domain, sender="ann-x@macro.test"):
        resolver = minimail.Zone(self.ZONE).resolver()

        def lookup(name, type):
            found = resolver.lookup(name, minimail.TYPES[type])
            return [host for _, host in sorted(found)] if type == "MX" else found
        spf = minimail.SPF(lookup, host, sender)
        return spf.check(domain), spf

    def test_results(self):
        for host, domain, result in (
                ("192.0.2.1", "here.test", "pass"), ("192.0.2.2", "here.test", "fail"), ("2001:db8::1", "here.test", "pass"),
                ("2001:db8::2", "here.test", "fail"), ("192.0.2.1", "none.test", "none"), ("192.0.2.1", "nobody.test", "none"),
                ("192.0.2.1", "two.test", "permerror"), ("192.0.2.99", "soft.test", "pass"), ("203.0.113.1", "soft.test", "softfail"),
                ("192.0.2.1", "inc.test", "pass"), ("192.0.2.2", "inc.test", "neutral"), ("192.0.2.1", "gone.test", "permerror"),
                ("192.0.2.1", "redirect.test", "pass"), ("192.0.2.2", "redirect.test", "fail"), ("192.0.2.1", "loop.test", "permerror"),
                ("192.0.2.15", "ip.test", "pass"), ("192.0.2.16", "ip.test", "fail"), ("2001:db8:1::", "ip.test", "pass"),
                ("192.0.2.1", "bad.test", "permerror"), ("192.0.2.1", "many.test", "permerror"), ("192.0.2.1", "void.test", "permerror"),
                ("192.0.2.1", "upper.test", "pass"), ("192.0.2.1", "macro.test", "pass"), ("192.0.2.2", "macro.test", "fail"),
                ("192.0.2.1", "ptr.test", "pass"), ("192.0.2.2", "ptr.test", "fail"), ("192.0.2.1", "fail.test", "temperror"),
                ("192.0.2.1", "mod.test", "pass"), ("192.0.2.1", "empty.test", "neutral"), ("192.0.2.1", "neutral.test", "neutral"),
                ("192.0.2.1", "test", "none"), ("192.0.2.1", "a..b", "none"), ("192.0.2.1", "x" * 64 + ".test", "none")):
            self.assertEqual(self.spf(host, domain)[0], result, (host, domain))

    def test_look_ups_are_counted(self):
        self.assertEqual(self.spf("203.0.113.9", "inc.test")[1].lookups, 2)
        self.assertEqual(self.spf("203.0.113.9", "ip.test")[1].lookups, 0)
        self.assertIn("more than 10", self.spf("192.0.2.1", "many.test")[1].reason)

    def test_long_names_lose_labels_on_the_left(self):
        """RFC 7208 section 7.3, in one step: a record may name the domain a thousand times."""
        spf = minimail.SPF(None, "192.0.2.1", "ann@x.test")
        for text in ("%{d}." * 40 + "x.test", "a" * 63 + "." + "b.c." * 48 + "x", "aa." * 84 + "b",
                     "z." + "aa." * 84 + "b"):
            whole = text.replace("%{d}", "d.example").split(".")
            while len(".".join(whole)) > 253:
                del whole[0]
            self.assertEqual(spf._expand(text, "d.example").split("."), whole)
        small, large = (cpu_of(functools.partial(spf._expand, "%{d}." * size, "a." * 100 + "test")) for size in (500, 2000))
        self.assertLess(large, 8 * small + 0.05)

    def test_wrong_terms(self):
        for term in ("all:x", "ip4:1.2.3", "ip4:1.2.3.4/33", "ip4:1.2.3.4/", "ip4", "ip6:1.2.3.4", "include", "include:", "exists", "a:",
                     "a/33", "mx/01", "foo", "a:%{z}", "a:%x", "-redirect=x", "redirect=", "a//129", "\u00e4", "include:a/24x%"):
            with self.subTest(term), self.assertRaises(minimail.SPFError):
                minimail.parse_spf("v=spf1 " + term)
        with self.assertRaises(minimail.SPFError):
            minimail.parse_spf("v=spf1 redirect=a redirect=b")


class Checkup(Case):
    GOOD = {
        "here.test": ["MX 10 mx.here.test", "TXT v=spf1 mx -all"], "mx.here.test": ["A 8.8.4.4"],
        "4.4.8.8.in-addr.arpa": ["PTR mx.here.test"], "_dmarc.here.test": ["TXT v=DMARC1; p=none"],
        "k._domainkey.here.test": ["TXT " + minimail.key_record(minimail.Ed25519Key(ED25519_SEED))],
    }

    HASH = minimail.hash_password("secret")

    def examine(self, changes=(), **options):
        """Return {check: [finding]} of a domain whose names are those of GOOD, changed."""
        names = dict(self.GOOD, **dict(changes))
        key = self.file("k.pem", minimail.pem("PRIVATE KEY", minimail.Ed25519Key(ED25519_SEED).encode()))
        os.chmod(key, 0o600)
        data = self.directory()
        options = dict(dict(data=data, domain=("here.test",), dkim=(("", "k", key),), tls_cert=self.file("c.pem", CERTIFICATE),
                            users=self.file("users", "postmaster@here.test:%s\n" % self.HASH),
                            aliases=self.file("aliases", "abuse@here.test: ann@far.test\n")), **options)
        hostname = options.pop("hostname", "mx.here.test")
        zone = minimail.Zone({name: items for name, items in names.items() if items})
        doctor = minimail.Doctor(Config(**options), hostname, zone.resolver())
        found = {}
        for finding in doctor.examine(["here.test"]):
            found.setdefault(finding.check, []).append(finding)
        return found

    def test_nothing_is_wrong(self):
        found = self.examine()
        wrong = [f for fs in found.values() for f in fs if f.status == "wrong" and f.check not in ("certificate", "data")]
        self.assertEqual(wrong, [])
        for check in "hostname", "mx", "ptr", "spf", "dkim", "dmarc":
            self.assertEqual(found[check][0].status, "ok", found[check])
        self.assertIn("1 of 10 look-ups", found["spf"][0].text)

    def wrong(self, check, words, record="", **options):
        changes = options.pop("changes", {})
        found = [f for f in self.examine(changes, **options)[check] if f.status == "wrong"]
        self.assertTrue(found, (check, changes))
        self.assertIn(words, found[0].text)
        self.assertTrue(found[0].advice)
        self.assertIn(record, "\n".join(found[0].records))

    def test_what_is_wrong(self):
        for check, words, record, changes in (
                ("hostname", "no address", "IN A", {"mx.here.test": []}), ("mx", "does not exist", "IN MX 10 mx.here.test.", {"here.test": []}),
                ("mx", "no MX", "IN MX 10", {"here.test": ["TXT x"]}), ("mx", "not here", "IN MX", {"here.test": ["MX 5 mx.far.test"]}),
                ("mx", "not here", "IN MX", {"here.test": ["MX 0 ."]}),
                ("ptr", "nobody", "4.4.8.8.in-addr.arpa. IN PTR mx.here.test.", {"4.4.8.8.in-addr.arpa": []}),
                ("ptr", "vps-1.far.test", "IN PTR", {"4.4.8.8.in-addr.arpa": ["PTR vps-1.far.test"]}),
                ("spf", "no SPF", 'here.test. IN TXT "v=spf1 mx -all"', {"here.test": ["MX 10 mx.here.test"]}),
                ("spf", "fail", "v=spf1", {"here.test": ["MX 10 mx.here.test", "TXT v=spf1 ip4:192.0.2.9 -all"]}),
                ("spf", "anybody", "v=spf1", {"here.test": ["MX 10 mx.here.test", "TXT v=spf1 +all"]}),
                ("spf", "cannot be used", "v=spf1", {"here.test": ["MX 10 mx.here.test", "TXT v=spf1 mxx -all"]}),
                ("dkim", "not published", "k._domainkey.here.test. IN TXT", {"k._domainkey.here.test": []}),
                ("dkim", "another key", "", {"k._domainkey.here.test": ["TXT v=DKIM1; k=ed25519; p=" + base64.b64encode(
                    minimail.Ed25519Key(bytes(32)).public()).decode()]}),
                ("dkim", "revoked", "", {"k._domainkey.here.test": ["TXT v=DKIM1; k=ed25519; p="]}),
                ("dmarc", "no DMARC", "_dmarc.here.test. IN TXT", {"_dmarc.here.test": []}),
                ("dmarc", "p=", "_dmarc", {"_dmarc.here.test": ["TXT v=DMARC1; p=maybe"]}),
                ("mta-sts", "wrong", "_mta-sts.here.test. IN TXT", {"_mta-sts.here.test": ["TXT v=STSv1"]}),
                ("mta-sts", "reporting", "_smtp._tls", {"_smtp._tls.here.test": ["TXT v=TLSRPTv1; rua=x"]}),
                ("spf", "no answer", "", {"here.test": ["SERVFAIL"]})):
            with self.subTest(check=check, changes=changes):
                self.wrong(check, words, record, changes=changes)
        self.wrong("hostname", "not a full name", hostname="localhost")
        self.wrong("certificate", "no certificate", tls_cert="")
        self.wrong("certificate", "mail.test", changes={})
        self.wrong("certificate", "/nonexistent", tls_cert="/nonexistent")
        self.wrong("dkim", "unsigned", dkim=())
        self.wrong("dkim", "/nonexistent", dkim=(("", "k", "/nonexistent"),))
        self.wrong("data", "No such file", data="/nonexistent/data")

    def test_postmaster_and_abuse(self):
        found = self.examine()["addresses"]
        self.assertEqual([f.text for f in found], ["postmaster@here.test arrives at postmaster@here.test",
                                                   "abuse@here.test arrives at ann@far.test"])
        found = self.examine(users=self.file("users", "ann@here.test:%s\n" % self.HASH))["addresses"]
        self.assertEqual(found[0].status, "note", found)

    def test_the_machine(self):
        directory = self.directory()
        self.assertEqual(minimail.broken_promises(directory), [])
        self.assertEqual(os.listdir(directory), [])
        self.assertIsInstance(minimail.file_system(directory), str)
        with mock.patch("os.link", side_effect=OSError(errno.EPERM, "no")), mock.patch.object(minimail, "lock_file", return_value=False):
            self.assertEqual(minimail.broken_promises(directory)[:2], ["locks", "links"])
        self.assertIn(minimail.clock_is_synchronized(), (None, True, False))

    def test_command(self):
        with minimail_dns({"here.test": []}) as where:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                status = main(["--data", self.directory(), "--dns", where, "--hostname", "mx.here.test", "check", "here.test", "--json"])
            self.assertEqual(status, 1)
            found = json.loads(printed.getvalue())
            self.assertEqual({"domain", "check", "status", "text", "advice", "records"}, set(found[0]))
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                self.assertEqual(main(["--data", self.directory(), "--dns", where, "check", "here.test"]), 1)
            self.assertRegex(printed.getvalue(), r"(?s)wrong +mx: .*; to publish:\nhere\.test\. IN MX .*things are wrong\n$")
        for arguments in ["check"], ["check", "no domain"]:
            with contextlib.redirect_stderr(io.StringIO()):
                self.assertEqual(main(["--data", self.directory()] + arguments), 2)


class Asked(Case):
    """What MAIL and RCPT say about notices (RFC 3461, RFC 6533), as values."""

    def test_xtext(self):
        for text, coded in ("a+b=c", "a+2Bb+3Dc"), ("x y", "x+20y"), ("", ""), ("!~", "!~"), ("\u00fc", "+C3+BC"):
            self.assertEqual(minimail.xtext_encode(text), coded)
        self.assertEqual(minimail.xtext_decode("a+2Bb+3Dc"), "a+b=c")
        for wrong in "a b", "a=b", "a+", "a+2", "a+2b", "\u00fc", "a+GG":
            with self.assertRaises(ValueError):
                minimail.xtext_decode(wrong)

    def test_utf8_addresses(self):
        for text, coded in ("b\u00f6b@x.test", "b\\x{F6}b@x.test"), ("a+b\\=", "a\\x{2B}b\\x{5C}\\x{3D}"), ("\U0001f600", "\\x{1F600}"):
            self.assertEqual(minimail.utf8_xtext_encode(text), coded)
            self.assertEqual(minimail.utf8_xtext_decode(coded), text)
        self.assertEqual(minimail.utf8_xtext_decode("b\u00f6b"), "b\u00f6b")
        for wrong in "a+b", "a=b", "a b", "\\x{}", "\\x{F6", "\\y", "\\x{110000}", "\\x{1234567}":
            with self.assertRaises(ValueError):
                minimail.utf8_xtext_decode(wrong)

    def test_of_mail(self):
        for given, ret, envid in (({}, "", ""), ({"RET": "full", "ENVID": "a+2Bb"}, "FULL", "a+2Bb"), ({"RET": "HDRS"}, "HDRS", "")):
            self.assertEqual(minimail.parse_dsn_of_mail(dict(given, SIZE="1")), (ret, envid))
        for wrong in {"RET": "ALL"}, {"ENVID": "a b"}, {"ENVID": "a" * 101}, {"ENVID": "a+0"}:
            self.refused("501 5.5.4", minimail.parse_dsn_of_mail, wrong)

    def test_of_rcpt(self):
        for notify in "NEVER", "success", "FAILURE,DELAY", "SUCCESS,FAILURE,DELAY", "DELAY":
            self.assertEqual(minimail.parse_dsn_of_rcpt({"NOTIFY": notify}).notify, notify.upper())
        for orcpt, kept in (("rfc822;a+2Bb@x.test", ""), ("x-other;what+20ever", ""), ("utf-8;b\\x{F6}b@x.test", ""),
                            ("utf-8;b\u00f6b@x.test", "utf-8;b\\x{F6}b@x.test")):
            self.assertEqual(minimail.parse_dsn_of_rcpt({"ORCPT": orcpt}, True).orcpt, kept or orcpt)
        for wrong in ({"NOTIFY": "NEVER,SUCCESS"}, {"NOTIFY": "ALWAYS"}, {"NOTIFY": "SUCCESS,SUCCESS"}, {"NOTIFY": ","}, {"ORCPT": "a@b"},
                      {"ORCPT": "rfc822;"}, {"ORCPT": ";a@b"}, {"ORCPT": "rfc822;a=b"}, {"ORCPT": "rfc822;" + "a" * 500},
                      {"ORCPT": "rfc 822;a"}, {"ORCPT": "utf-8;b\u00f6b@x.test"}, {"ORCPT": "utf-8;a+2Bb"}):
            self.refused("501 5.5.4", minimail.parse_dsn_of_rcpt, wrong)
        self.refused("501 5.5.4", minimail.parse_dsn_of_rcpt, {"ORCPT": "utf-8;\\x{110000}\u00f6"}, True)

    def test_in_a_session(self):
        node = self.node(domain=["here.test"], catch_all="all@here.test")
        talk = self.talk(node.smtp_address)
        self.assertIn("250-DSN", talk.ask("EHLO x"))
        self.dialog(talk, """
            C: MAIL FROM:<a@here.test> RET=SOME
            S: 501 5.5.4
            C: MAIL FROM:<a@here.test> RET=HDRS ENVID=a=b
            S: 501 5.5.4
            C: MAIL FROM:<a@here.test> RET=HDRS ENVID=QQ314159 SIZE=100
            S: 250 2.1.0
            C: RCPT TO:<b@here.test> NOTIFY=NEVER,DELAY
            S: 501 5.5.4
            C: RCPT TO:<b@here.test> NOTIFY=SUCCESS ORCPT=nothing
            S: 501 5.5.4
            C: RCPT TO:<b@here.test> NOTIFY=SUCCESS OTHER=x
            S: 555 5.5.4
            C: RCPT TO:<b@here.test> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;b@here.test
            S: 250 2.1.5
            """)


class OneByOne(ScriptedCase):
    """A world with one far host and two aliases, in which messages are accepted as a session does it, and sent."""

    PLAIN = ("PIPELINING", "8BITMIME", "SIZE 10000000")
    ALL = ("", "NEVER", "SUCCESS", "FAILURE", "DELAY", "SUCCESS,FAILURE", "FAILURE,DELAY", "SUCCESS,FAILURE,DELAY")

    def world(self, script=None, extensions=PLAIN, **options):
        self.peer = ScriptedPeer(script, extensions)
        self.case = tempfile.TemporaryDirectory(prefix="minimail-test-", dir=RAM_DISK)
        self.addCleanup(self.case.cleanup)
        os.mkdir(os.path.join(self.case.name, "d"), 0o700)
        aliases = os.path.join(self.case.name, "aliases")
        with open(aliases, "w") as file:
            file.write("one@here.test: bob@far.test\ntwo@here.test: bob@far.test, all@here.test\n")
        return ScriptedWorld(self, FAR, {"192.0.2.25": self.peer}, data=os.path.join(self.case.name, "d"), aliases=aliases, **options)

    def submit(self, world, recipient, notify="", orcpt="", ret="", envid="", sender="me@here.test", trusted=True, content=LETTER):
        """Accept a message as a session does."""
        address = minimail.parse_address(recipient)
        envelope = minimail.Envelope(sender=sender, trusted=trusted, ret=ret, envid=envid)
        if notify or orcpt:
            envelope.wishes[address.key] = minimail.Wish(notify, orcpt)
        destinations = [world.stores.door.recipient(envelope, address, trusted)]
        parcel = world.stores.post.begin(envelope, destinations)
        parcel.draft.write(content)
        world.stores.door.finish(parcel)
        world.stores.post.commit(parcel)
        world.step()
        return parcel

    def reports(self, world):
        """Return [(action, status, final recipient)] of all reports to the sender."""
        found = []
        for message in world.mail():
            if message.get_content_type() == "multipart/report":
                for part in list(message.iter_parts())[1].get_payload()[1:]:
                    found.append((part["Action"], part["Status"], part["Final-Recipient"].partition("; ")[2]))
        return found


class Notices(OneByOne):
    """Every NOTIFY with everything that can become of a message (RFC 3461 section 5.2)."""

    def test_every_notify_with_everything_that_can_happen(self):
        for notify in self.ALL:
            words = notify.split(",")
            told_success, told_failure, told_delay = "SUCCESS" in words, "FAILURE" in words or not notify, "DELAY" in words or not notify
            with self.subTest(notify=notify, what="delivered"):
                world = self.world()
                self.submit(world, "x@here.test", notify)
                self.assertEqual(self.reports(world), [("delivered", "2.0.0", "x@here.test")] if told_success else [])
                self.assertEqual((len(world.mail()), world.files()), (2 if told_success else 1, []))
            with self.subTest(notify=notify, what="relayed to a peer without DSN"):
                world = self.world()
                self.submit(world, "bob@far.test", notify)
                self.assertEqual(self.reports(world), [("relayed", "2.0.0", "bob@far.test")] if told_success else [])
                self.assertEqual(len(self.peer.messages), 1)
                self.assertNotIn("NOTIFY", "".join(self.peer.lines))
            with self.subTest(notify=notify, what="relayed to a peer with DSN"):
                world = self.world(extensions=self.PLAIN + ("DSN",))
                self.submit(world, "bob@far.test", notify, "rfc822;Bob@far.test" if notify else "", "FULL", "QQ1")
                self.assertEqual(self.reports(world), [])
                self.assertIn(" RET=FULL ENVID=QQ1", [line for line in self.peer.lines if line.startswith("MAIL")][0])
                rcpt, = [line for line in self.peer.lines if line.startswith("RCPT")]
                self.assertEqual(rcpt, "RCPT TO:<bob@far.test>" + (" NOTIFY=%s ORCPT=rfc822;Bob@far.test" % notify if notify else ""))
            with self.subTest(notify=notify, what="failed"):
                world = self.world({"RCPT": "550 5.1.1 no such user"})
                self.submit(world, "bob@far.test", notify)
                self.assertEqual(self.reports(world), [("failed", "5.1.1", "bob@far.test")] if told_failure else [])
                self.assertEqual(world.files(), [])
            with self.subTest(notify=notify, what="delayed"):
                world = self.world({"RCPT": "451 4.2.0 later"}, warn=100)
                self.submit(world, "bob@far.test", notify)
                self.assertEqual(self.reports(world), [], "too early")
                for _ in range(3):
                    world.clock.now += 4000
                    world.step()
                self.assertEqual(self.reports(world), [("delayed", "4.2.0", "bob@far.test")] if told_delay else [], "once")
                self.assertEqual(len(world.entries()), 1)
            with self.subTest(notify=notify, what="expanded"):
                world = self.world(extensions=self.PLAIN + ("DSN",))
                self.submit(world, "two@here.test", notify)
                self.assertEqual(self.reports(world), [("expanded", "2.0.0", "two@here.test")] if told_success else [])
                rcpt, = [line for line in self.peer.lines if line.startswith("RCPT")]
                passed = ",".join(word for word in words if word != "SUCCESS") or ("NEVER" if notify else "")
                self.assertEqual(rcpt, "RCPT TO:<bob@far.test>" + (" NOTIFY=" + passed if passed else ""))
            with self.subTest(notify=notify, what="an alias for one"):
                world = self.world()
                self.submit(world, "one@here.test", notify)
                self.assertEqual(self.reports(world), [("relayed", "2.0.0", "bob@far.test")] if told_success else [])

    def test_nobody_is_told_of_a_notice(self):
        world = self.world({"RCPT": "550 no"})
        for recipient in "bob@far.test", "x@here.test":
            self.submit(world, recipient, "SUCCESS,FAILURE", sender="")
        self.assertEqual((self.reports(world), world.files()), ([], []))

    def test_who_is_warned(self):
        """Own users by --warn alone; strangers when they asked; nobody without it."""
        for options, sender, notify, told in (({}, "me@here.test", "DELAY", 0), ({"warn": 10}, "me@here.test", "", 1),
                                              ({"warn": 10}, "ann@far.test", "", 0), ({"warn": 10}, "ann@far.test", "DELAY", 1)):
            world = self.world({"RCPT": "451 later"}, **options)
            self.submit(world, "one@here.test", notify, sender=sender)
            world.clock.now += 4000
            world.step()
            warned = self.reports(world) if "here" in sender else [e for e in world.entries() if not e.sender]
            self.assertEqual(len(warned), told, (options, sender, notify))

    def test_who_waits_for_a_destination_that_pauses_is_warned_once(self):
        """Also of a message that was never the one that tries: what it was told is recorded without an attempt."""
        world = ScriptedWorld(self, FAR, warn=1000, retry="60,300")
        for number in range(5):
            world.submit("bob%d@far.test" % number)
        for _ in range(20):
            world.step()
            world.clock.now += 151
        told = [list(report.iter_parts())[1].get_payload()[1] for report in world.mail()]
        self.assertEqual(sorted((status["Action"], status["Final-Recipient"]) for status in told),
                         [("delayed", "rfc822; bob%d@far.test" % number) for number in range(5)])

    def test_the_whole_message_when_it_is_asked_for(self):
        body = b"From: me@here.test\r\n\r\n" + b"0123456789\r\n" * 50_000
        for ret, whole in ("FULL", True), ("HDRS", False), ("", False):
            world = self.world({"RCPT": "550 5.1.1 no"})
            self.submit(world, "bob@far.test", "FAILURE", "rfc822;robert@far.test", ret, "a+2Bb", content=body)
            report, = world.mail()
            text, status, original = report.iter_parts()
            self.assertEqual(original.get_content_type(), "message/rfc822" if whole else "text/rfc822-headers")
            self.assertEqual("0123456789\n" * 50_000 in report.as_string(), whole)
            whole_status, bob = status.get_payload()
            self.assertEqual(whole_status["Original-Envelope-Id"], "a+b")
            self.assertEqual(bob["Original-Recipient"], "rfc822;robert@far.test")

    def test_what_is_hostile_stays_in_its_line(self):
        world = self.world({"RCPT": "550 5.1.1 no"})
        self.submit(world, "bob@far.test", "FAILURE", "rfc822;a+0D+0AX-Evil:+20yes", "", "b+0D+0AX-Evil:+20yes")
        self.assertNotIn("\nX-Evil", world.mail()[0].as_string())

    def test_a_crash_before_the_report(self):
        """The entry says who is to be told: whoever finds it later does so."""
        world = self.world()
        with mock.patch.object(world.relay, "_settle", side_effect=KeyboardInterrupt), self.assertRaises(KeyboardInterrupt):
            self.submit(world, "x@here.test", "SUCCESS")
        entry, = world.entries()
        self.assertEqual(entry.recipients[0]["action"], "delivered")


class SendmailNotices(ScriptedCase):
    def setUp(self):
        super().setUp()
        os.makedirs(os.path.join(self.data, "run"))     # a node was here

    def sendmail(self, *arguments):
        return scripted_command("sendmail", *arguments, "-f", "me@here.test", "bob@far.test", "--data", self.data, "--domain",
                                "here.test", "--hostname", "mx.here.test", "--no-sync", "--quiet", stdin=b"Subject: x\n\ny\n")

    def test_flags(self):
        self.assertEqual(self.sendmail("-N", "failure,delay", "-R", "full", "-V", "a+b"), (0, "", ""))
        entry, = minimail.Queue(minimail.Storage(self.data), Config()).entries()
        self.assertEqual((entry.extra["ret"], entry.extra["envid"], entry.extra["trusted"]), ("FULL", "a+2Bb", True))
        self.assertEqual(entry.recipients[0]["notify"], "FAILURE,DELAY")
        for wrong in ("-N", "always"), ("-R", "some"), ("-V", "x" * 101):
            self.assertNotEqual(self.sendmail(*wrong)[0], 0, wrong)


class Leaving(OneByOne):
    """What standing does to mail on its way out: signatures, rewritten reverse-paths, what policies demand."""

    KEYS = DKIMSignatures.KEYS
    RECORDS = DKIMSignatures.RECORDS

    def keys(self):
        return {"dkim": [(("", selector, self.key_file(key))) for _, selector, key in self.KEYS]}

    def key_file(self, key):
        with tempfile.NamedTemporaryFile(dir=self.folder(), delete=False, suffix=".pem") as file:
            file.write(minimail.pem("PRIVATE KEY", key.encode()))
        return file.name

    def folder(self):
        directory = tempfile.TemporaryDirectory(prefix="minimail-test-")
        self.addCleanup(directory.cleanup)
        return directory.name

    def test_signed(self):
        world = self.world(**self.keys())
        self.submit(world, "bob@far.test")
        content = self.peer.messages[0][2]
        self.assertEqual(verified(content, self.RECORDS), DKIMSignatures.BOTH)
        mail = [line for line in self.peer.lines if line.startswith("MAIL")][0]
        self.assertEqual(int(re.search(r"SIZE=(\d+)", mail).group(1)), len(content))
        self.assertTrue(content.startswith(b"DKIM-Signature: "))

    def test_computed_once(self):
        world = self.world({"end": ["451 later", "250 ok"]}, **self.keys())
        self.submit(world, "bob@far.test")
        entry, = world.entries()
        world.clock.now += 4000
        with mock.patch.object(minimail.RSAKey, "sign", side_effect=AssertionError("again")):
            world.step()
        self.assertIn(entry.extra["signature"][1].encode(), self.peer.messages[0][2])
        self.assertEqual(self.peer.contents[0], self.peer.contents[1])

    def test_without_a_key_nothing_changes(self):
        world = self.world()
        self.submit(world, "bob@far.test")
        self.assertTrue(self.peer.messages[0][2].startswith(b"Received: "))

    def test_signed_after_rewriting(self):
        world = self.world(rewrite=["*@other.test=me@here.test"], **self.keys())
        self.submit(world, "bob@far.test", sender="x@other.test", content=LETTER.replace(b"me@here", b"y@other"))
        self.assertIn(b"From: me@here.test", self.peer.messages[0][2])
        self.assertEqual(verified(self.peer.messages[0][2], self.RECORDS), DKIMSignatures.BOTH)

    def test_bounces_are_signed(self):
        world = self.world(**self.keys())
        world.stores.door.send(minimail.Envelope(sender="", protocol="bounce"), [minimail.parse_address("bob@far.test")],
                               b"From: <mailer-daemon@mx.here.test>\r\n\r\nx\r\n")
        world.step()
        self.assertEqual(verified(self.peer.messages[0][2], self.RECORDS), DKIMSignatures.BOTH)

    def test_forwards(self):
        """An alias that leads elsewhere: a reverse-path of ours, a signature of ours unless From could pass for ours."""
        world = self.world(**self.keys())
        world.stores.door.origin = minimail.SRS(world.config, world.stores.storage).reverse
        self.submit(world, "one@here.test", sender="ann@origin.example", trusted=False, content=b"From: ann@origin.example\r\n\r\nx\r\n")
        sender, _, content = self.peer.messages[0]
        self.assertRegex(sender, r"^<SRS0=....=..=origin\.example=ann@here\.test>")
        self.assertEqual(verified(content, self.RECORDS), DKIMSignatures.BOTH)
        found = world.stores.door.destinations(minimail.Envelope(), minimail.parse_path(sender)[0], False)
        self.assertEqual([str(address) for address in found.remote], ["ann@origin.example"])
        with self.assertRaises(Refused):
            world.stores.door.destinations(minimail.Envelope(), minimail.parse_path(sender.replace("ann", "eve"))[0], False)
        self.submit(world, "one@here.test", sender="ann@origin.example", trusted=False)     # its From says me@here.test
        self.assertEqual(verified(self.peer.messages[1][2], self.RECORDS), [])
        for sender in "me@here.test", "":
            self.submit(world, "one@here.test", sender=sender)
            self.assertIn("<%s>" % sender, self.peer.messages[-1][0])

    def test_what_is_not_a_forward_keeps_its_reverse_path(self):
        world = self.world()
        self.submit(world, "bob@far.test", sender="ann@origin.example")
        self.assertIn("<ann@origin.example>", self.peer.messages[0][0])

    def policy(self, world, mode, mx="mx.far.test"):
        directory = os.path.join(world.config.data, "mta-sts")
        os.mkdir(directory, 0o700)
        with open(os.path.join(directory, "far.test"), "w") as file:
            json.dump({"id": "1", "mode": mode, "mx": [mx], "max_age": 86400, "fetched_at": time.time() - 60}, file)

    @unittest.skipUnless(ssl, "no ssl")
    def test_policies(self):
        """enforce: verified or not sent; testing: sent, and logged; a host that the policy does not name gets nothing."""
        for mode, mx, tls, trusted, sent, reason in (
                ("enforce", "mx.far.test", True, False, False, "4.7.5"), ("enforce", "mx.far.test", False, False, False, "4.7.5"),
                ("enforce", "mx.other.test", True, True, False, "4.7.5"), ("enforce", "mx.far.test", True, True, True, ""),
                ("testing", "mx.far.test", True, False, True, "tls-unverified"), ("testing", "mx.other.test", True, False, True, "sts-testing"),
                ("testing", "mx.far.test", False, False, True, ""), ("none", "mx.far.test", False, False, True, "")):
            with self.subTest(mode=mode, mx=mx, tls=tls, trusted=trusted):
                world = self.world(extensions=self.PLAIN + (("STARTTLS",) if tls else ()))
                server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                server.load_cert_chain(self.certificate())
                self.peer.tls = server
                self.policy(world, mode, mx)
                self.logged.clear()
                real = minimail.tls_context

                def context(verify, trusted=trusted, real=real):
                    made = real(verify)
                    if trusted and verify:
                        made.load_verify_locations(cadata=CERTIFICATE.decode().partition("-----END PRIVATE KEY-----\n")[2])
                        made.check_hostname = False     # of mail.test, which is all this certificate knows
                    return made
                with mock.patch.object(minimail, "tls_context", context):
                    self.submit(world, "bob@far.test")
                self.assertEqual(len(self.peer.messages), sent)
                if sent:
                    self.assertIn(reason, "\n".join(self.logged))
                    self.assertEqual(self.peer.secured > 0, tls)
                else:
                    self.assertIn(reason, world.entries()[0].recipients[0]["last_reply"])
                    self.assertIn("MTA-STS policy of far.test", world.entries()[0].recipients[0]["last_reply"])

    def certificate(self):
        with tempfile.NamedTemporaryFile(dir=self.folder(), delete=False) as file:
            file.write(CERTIFICATE)
        return file.name


@contextlib.contextmanager
def minimail_dns(names):
    """Yield HOST:PORT of a name server over UDP that knows these names."""
    zone = minimail.Zone(names)
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.bind(("127.0.0.1", 0))

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    query, client = sock.recvfrom(4096)
                    if not query:
                        return
                    with contextlib.suppress(ValueError):
                        sock.sendto(zone.reply(query, False), client)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield "127.0.0.1:%d" % sock.getsockname()[1]
        finally:
            with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as last:
                last.sendto(b"", sock.getsockname())
            thread.join()


class SeenFromHere(Case):
    """What `check` says of the machine itself."""

    def test_own_addresses(self):
        doctor = minimail.Doctor(Config(domain=("here.test",)), "mx.here.test", minimail.Zone({"here.test": ["TXT x"]}).resolver())
        for own, records in ([], ["; mx.here.test. IN A ADDRESS (this machine cannot tell which)"]), (
                ["8.8.4.4", "2a00::1"], ["mx.here.test. IN A 8.8.4.4", "mx.here.test. IN AAAA 2a00::1"]):
            with mock.patch.object(minimail, "public_addresses", return_value=own):
                self.assertEqual([list(finding.records) for finding in doctor.check_hostname()], [records])

    def test_only_what_the_internet_sees(self):
        for host, shown in ("10.1.2.3", []), ("192.168.0.1", []), ("127.0.0.1", []), ("8.8.4.4", ["8.8.4.4"] * 2):
            with mock.patch.object(socket.socket, "connect"), mock.patch.object(socket.socket, "getsockname", return_value=(host, 9)):
                self.assertEqual(minimail.public_addresses(), shown)

    def test_a_laboratory_is_not_anybody(self):
        zone = minimail.Zone({"here.test": ["MX 1 mx.here.test", "TXT v=spf1 ip4:192.0.2.1 -all"], "mx.here.test": ["A 192.0.2.1"]})
        doctor = minimail.Doctor(Config(domain=("here.test",)), "mx.here.test", zone.resolver())
        spf = [finding for finding in doctor.examine(["here.test"]) if finding.check == "spf"]
        self.assertEqual([finding.status for finding in spf], ["ok"], spf)

    def test_errors_have_no_numbers(self):
        error = OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        self.assertEqual([minimail.reason_of(e) for e in (error, socket.timeout("timed out"), ValueError("odd"))],
                         [os.strerror(errno.ENETUNREACH), "timed out", "odd"])
        resolver = minimail.Resolver([("192.0.2.1", 53)])
        with mock.patch.object(minimail.Resolver, "_ask", side_effect=error):
            with self.assertRaises(minimail.DNSFailure) as caught:
                resolver.lookup("far.test", minimail.TYPES["A"])
        self.assertNotIn("Errno", str(caught.exception))


# ======================================================================================================================
# 14  Sessions, policy, listeners
# ======================================================================================================================

class Counting(Case):
    """Connections and wrong passwords are counted in tables that processes share."""

    def test_connections_from_one_address(self):
        connections = minimail.Connections(10, 2)
        self.assertEqual([bool(connections.enter("192.0.2.1")) for _ in range(3)], [False, False, True])
        self.assertEqual([bool(connections.enter("127.0.0.1")) for _ in range(3)], [False] * 3, "loopback is exempt")
        self.assertFalse(connections.enter("192.0.2.2"))
        connections.leave("192.0.2.1")
        self.assertFalse(connections.enter("192.0.2.1"))
        for _ in range(2):
            connections.leave("192.0.2.1")
        self.assertNotIn("192.0.2.1", connections._clients)
        self.assertEqual(connections.served, 7)

    def test_an_ipv6_network_is_one_client(self):
        connections = minimail.Connections(10, 2)
        self.assertEqual([bool(connections.enter("2001:db8::%x" % i)) for i in range(3)], [False, False, True])
        self.assertFalse(connections.enter("2001:db8:0:1::1"), "another /64")
        self.assertFalse(connections.enter("::ffff:192.0.2.1") or connections.enter("192.0.2.1"))
        self.assertTrue(connections.enter("192.0.2.1"), "IPv4 in IPv6 is IPv4")
        self.assertEqual([bool(connections.enter("::1")) for _ in range(3)], [False] * 3)

    def test_connections_in_all(self):
        connections = minimail.Connections(3, 100)
        for client in ("192.0.2.1", "192.0.2.2", "127.0.0.1"):
            self.assertEqual(connections.enter(client), "")
        self.assertIn("too many connections", connections.enter("127.0.0.1"))
        connections.leave("192.0.2.2")
        self.assertEqual(connections.enter("192.0.2.3"), "")

    @unittest.skipUnless(hasattr(os, "fork"), "no processes to share with")
    def test_processes_count_together(self):
        connections = minimail.Connections(3, 2, processes=2)
        connections.enter("192.0.2.1")

        def child():
            connections.owner = 1
            return [bool(connections.enter(client)) for client in ("192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.3")]
        self.assertEqual(in_child(child), "[False, True, False, True]")
        self.assertTrue(connections.enter("192.0.2.4"), "what the other has counts")
        connections.free_all(1)                     # it is dead
        self.assertFalse(connections.enter("192.0.2.1"))
        self.assertTrue(connections.enter("192.0.2.1"), "our own are still there")

    def test_tries_are_counted_before_they_are_verified(self):
        throttle = minimail.Throttle(Clock())
        self.assertEqual([throttle.charge("192.0.2.1", "bob") for _ in range(minimail.LOGIN_FAILURES + 2)],
                         [True] * minimail.LOGIN_FAILURES + [False] * 2)
        self.assertTrue(throttle.shut_out("192.0.2.1"))
        self.assertFalse(throttle.shut_out("192.0.2.2"))
        self.assertTrue(throttle.charge("192.0.2.2", "bob"))

    def test_who_was_right_gets_its_own_try_back(self):
        throttle = minimail.Throttle(Clock())
        for _ in range(100):
            self.assertTrue(throttle.charge("192.0.2.1", "bob"))
            throttle.refund("192.0.2.1", "bob")
        for _ in range(minimail.LOGIN_FAILURES - 1):
            throttle.charge("192.0.2.1", "eve")
        throttle.charge("192.0.2.1", "bob")
        throttle.refund("192.0.2.1", "bob")
        self.assertFalse(throttle.shut_out("192.0.2.1"))
        throttle.charge("192.0.2.1", "eve")
        self.assertTrue(throttle.shut_out("192.0.2.1"), "one who guesses does not start anew by a log-in of its own")

    def test_tries_are_forgotten_slowly(self):
        clock = Clock()
        throttle = minimail.Throttle(clock)
        for _ in range(minimail.LOGIN_FAILURES):
            throttle.charge("c", "bob")
        self.assertTrue(throttle.shut_out("c"))
        clock.now += 1.1 * minimail.LOGIN_WINDOW / minimail.LOGIN_FAILURES
        self.assertEqual([throttle.charge("c", "bob"), throttle.charge("c", "bob")], [True, False], "one is forgotten")
        clock.now += minimail.LOGIN_WINDOW
        self.assertEqual(sum(throttle.charge("c", "bob") for _ in range(20)), minimail.LOGIN_FAILURES)

    def test_an_account_that_many_guess_at(self):
        throttle = minimail.Throttle(Clock())
        tries = [throttle.charge("192.0.2.%d" % i, "bob") for i in range(minimail.ACCOUNT_FAILURES + 5)]
        self.assertEqual(tries, [True] * minimail.ACCOUNT_FAILURES + [False] * 5)
        self.assertTrue(throttle.charge("198.51.100.1", "eve"))

    def test_answers_to_wrong_passwords_take_longer_and_longer(self):
        throttle = minimail.Throttle(Clock())
        delays = [(throttle.charge("c", "bob"), throttle.delay("c"))[1] for _ in range(20)]
        self.assertEqual(delays, sorted(delays))
        self.assertLess(delays[0], delays[-1])
        self.assertLessEqual(delays[-1], 3.0)

    def test_no_memory_can_be_filled_from_outside(self):
        throttle = minimail.Throttle(Clock())
        size = len(throttle._table)
        for client in range(3000):
            throttle.charge("2001:db8:%x::1" % client, "user%d" % client)
        self.assertEqual(len(throttle._table), size)
        strangers = sum(throttle.shut_out("2001:db9:%x::1" % client) for client in range(3000))
        self.assertEqual(strangers, 0, "a stranger is not taken for somebody else")

    @mock.patch.object(minimail.Throttle, "BUCKETS", 2)
    def test_a_try_counts_once(self):
        for _ in range(20):                         # each has a key of its own
            throttle = minimail.Throttle(Clock())
            self.assertEqual([throttle._count("client", "192.0.2.1", 1.0) for _ in range(3)], [1.0, 2.0, 3.0])

    @unittest.skipUnless(hasattr(os, "fork"), "no processes to share with")
    def test_processes_share_what_they_know(self):
        throttle = minimail.Throttle()
        self.assertEqual(in_child(lambda: [throttle.charge("192.0.2.1", "bob") for _ in range(10)].count(True)), "10")
        self.assertTrue(throttle.shut_out("192.0.2.1"))


class Sessions(Case):
    def test_idle_sessions_cost_no_threads(self):
        node = self.node()
        talks = [self.talk(node.pop3_address if i % 2 and HAS_POP3 else node.smtp_address, hello=False) for i in range(200)]
        for talk in talks:
            self.assertRegex(talk.reply(), r"^(220|\+OK)")
        self.eventually(lambda: len(our_threads()) < 5, "few threads, once those of the test before have ended")
        for talk in talks:
            talk.send("NOOP\r\n")
        for talk in talks:
            self.assertRegex(talk.reply(), r"^(250|\+OK)")
        self.deliver(node, b"x\r\n", "bob@x")

    def test_waiting_inside_a_command_blocks_nobody_else(self):
        node = self.node()
        for i in range(40):
            talk = self.talk(node.smtp_address)
            if i % 2:
                self.dialog(talk, "C: AUTH LOGIN\nS: 334")
            else:
                self.dialog(talk, envelope())
        self.deliver(node, b"x\r\n", "bob@x")
        self.assertEqual(len(self.fetch(node, "bob@x")), 1)

    def test_hooks_that_take_long_block_nobody_else(self):
        entered, may_go_on = threading.Semaphore(0), threading.Event()

        class Slow(minimail.Policy):
            def on_mail(self, client, sender, user):
                if sender.startswith("slow"):
                    entered.release()
                    may_go_on.wait(PATIENCE)
        node = self.node(policy=Slow())
        talks = [self.talk(node.smtp_address).send("MAIL FROM:<slow@x>\r\n") for _ in range(5)]
        for _ in talks:
            self.assertTrue(entered.acquire(timeout=PATIENCE))
        self.deliver(node, b"x\r\n", "bob@x")
        may_go_on.set()
        for talk in talks:
            self.assertTrue(talk.reply().startswith("250"))

    def test_connections_are_limited(self):
        node = self.node(max_connections=2)
        first, second = self.talk(node.smtp_address), self.talk(node.pop3_address if HAS_POP3 else node.smtp_address)
        self.dialog(node.smtp_address, "S: 421 4.3.2\nS: closed")
        if HAS_POP3:
            self.dialog(node.pop3_address, "S: -ERR [SYS/TEMP]\nS: closed")
        first.close()

        def free():
            with Talk(node.smtp_address) as talk:
                return talk.reply().startswith("220")
        self.eventually(free, "a connection is free again")
        self.assertRegex(second.ask("QUIT"), r"^(\+OK|221 )")
        self.eventually(lambda: not node.site.sessions and not node.connections._clients)
        self.assertEqual(node.connections._slots[:].count(0), len(node.connections._slots[:]))

    def test_deadline(self):
        node = self.node(timeout=1)
        talks = []
        for address, ours, theirs in (
                (node.smtp_address, "", ["220"]), *[(node.pop3_address, "", ["+OK"])] * HAS_POP3,
                (node.smtp_address, "EHLO x\r\nAUTH LOGIN\r\n", ["220", "250", "334"]),
                (node.smtp_address, "EHLO x\r\nMAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\nhalf\r\n",
                 ["220", "250", "250", "250", "354"])):
            talks.append((self.talk(address, hello=False).send(ours), theirs))
        for talk, theirs in talks:
            end = ["closed"] if theirs == ["+OK"] else ["421 4.4.2", "closed"]      # POP3 has no word for it
            self.dialog(talk, "\n".join("S: " + line for line in theirs + end))
        self.assertNothingLeft(node.data)

    def test_who_drips_bytes_is_closed(self):
        node = self.node(timeout=0.3)
        for address in (node.smtp_address, node.pop3_address):
            talk = self.talk(address, hello=False)
            talk.reply()
            deadline = time.monotonic() + PATIENCE
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while not select.select([talk.sock], [], [], 0.02)[0] and time.monotonic() < deadline:
                    talk.send("x")
            self.assertLess(time.monotonic(), deadline)
            self.assertRegex(talk.reply(), "421 4.4.2|closed")

    def test_strangers(self):
        """Who speaks something else is told so and let go, before it has cost anything."""
        node = self.node()
        for sent, replies in (("\x16\x03\x01 hello\r\nNOOP\r\n", ["421 4.7.0"]), ("x" * 5000 + "\r\nNOOP\r\n", ["500 5.5.2"]),
                              ("\r\nNOOP\r\n", ["421 4.7.0"]), ("FOO\r\nBAR\r\nBAZ\r\nNOOP\r\n", ["500 5.5.2", "500 5.5.2", "421 4.7.0"]),
                              ("GET / HTTP/1.1\r\nNOOP\r\n", ["421 4.7.0"])):
            talk = self.talk(node.smtp_address, hello=False).send(sent)
            self.assertEqual([talk.reply()[:9] for _ in range(len(replies) + 2)],
                             ["220 mail."] + replies + ["closed"], sent[:20])
        self.dialog(node.smtp_address, "S: 220\nC: EHLO x\nS: 250\n" + "C: FOO\nS: 500\n" * 5 + "C:\nS: 500\nC: NOOP\nS: 250")
        if not HAS_POP3:
            return
        for sent, count in (("\x16\x03\x01 hello\r\nNOOP\r\n", 1), ("x" * 5000 + "\r\nNOOP\r\n", 1), ("\r\nNOOP\r\n", 1),
                            ("FOO\r\nBAR\r\nBAZ\r\nNOOP\r\n", 3)):
            talk = self.talk(node.pop3_address, hello=False).send(sent)
            self.assertEqual([talk.reply()[:4] for _ in range(count + 2)], ["+OK "] + ["-ERR"] * count + ["clos"], sent[:20])
        self.dialog(node.pop3_address, "S: +OK\nC: NOOP\nS: +OK\n" + "C: FOO\nS: -ERR\n" * 5 + "C: NOOP\nS: +OK")

    def test_commands_that_lead_nowhere_have_an_end(self):
        with mock.patch.object(minimail, "MAX_IDLE_COMMANDS", 10):
            node = self.node()
            for verb in ("NOOP", "RSET", "VRFY bob", "EHLO x"):
                talk = self.talk(node.smtp_address)             # its EHLO is the first of ten
                self.dialog(talk, "C: %s\nS: 25\n" % verb * 9 + "C: %s\nS: 421 4.7.0\nS: closed" % verb)
            talk = self.talk(node.smtp_address)
            self.dialog(talk, "C: NOOP\nS: 250\n" * 9 + letter() + "C: NOOP\nS: 250\n" * 10 + "C: NOOP\nS: 421\nS: closed")
            if not HAS_POP3:
                return
            for verb in ("NOOP", "CAPA", "USER x"):
                talk = self.dialog(node.pop3_address, "S: +OK")
                for _ in range(10):
                    self.assertTrue(talk.ask(verb).startswith("+OK"))
                    if verb == "CAPA":
                        talk.listing()
                self.dialog(talk, "C: %s\nS: -ERR\nS: closed" % verb)
            pop = self.dialog(node.pop3_address, "S: +OK\nC: USER b@x\nS: +OK\nC: PASS x\nS: +OK")
            for _ in range(3):
                self.dialog(pop, "C: NOOP\nS: +OK\n" * 6 + "C: RETR 1\nS: +OK")
                pop.listing()
            self.dialog(pop, "C: NOOP\nS: +OK\nC: RETR 7\nS: -ERR\n" * 5 + "C: STAT\nS: -ERR\nS: closed")

    def test_refused_mail_leads_nowhere_either(self):
        with mock.patch.object(minimail, "MAX_IDLE_COMMANDS", 10), mock.patch.object(minimail, "MAX_RECIPIENTS", 1):
            node = self.node()
            talk = self.talk(node.smtp_address)                 # its EHLO is the first of ten
            self.dialog(talk, "C: MAIL FROM:<a@x> SIZE=99999999999\nS: 552\n" * 9 + "C: NOOP\nS: 421 4.7.0\nS: closed")
            begun = "C: MAIL FROM:<a@x>\nS: 250\nC: RCPT TO:<b@x>\nS: 250\n"
            for again in ("C: RCPT TO:<c@x>\nS: 452\n", "C: BDAT 0\nS: 250\n"):
                talk = self.talk(node.smtp_address)
                self.dialog(talk, begun + again * 10 + "C: RSET\nS: 421 4.7.0\nS: closed")

    def test_secrets_are_written_nowhere(self):
        node = self.node(accounts={"bob@example.org": "HUSHbob"}, domain="example.org", transcripts="transcripts" in SECTIONS)
        node.throttle.delay = lambda client: 0.0
        right, wrong = plain("bob@example.org", "HUSHbob"), plain("bob@example.org", "HUSHwrong")
        with self.assertLogs("minimail", "DEBUG") as logs:
            talk = self.talk(node.smtp_address)
            for line in ("AUTH\tPLAIN " + right, "AUTH  PLAIN " + right, "AUTH FOO " + right, right, "AUTH PLAIN !" + right,
                         "PASS HUSHbob", "auth plain " + wrong, "AUTH PLAIN"):
                talk.ask(line)
            talk.ask(right)
            self.dialog(talk, "C: MAIL FROM:<bob@example.org>\nC: RCPT TO:<bob@example.org>\nC: DATA\nC: x\nC: .\n"
                              "S: 250\nS: 250\nS: 354\nS: 250\nC: QUIT\nS: 221")
            for lines in (["PASS HUSHbob", "PASS\tHUSHbob", "AUTH\tPLAIN " + right], ["NOOP", "AUTH PLAIN " + wrong, right],
                          ["USER bob@example.org", "pass HUSHwrong", "HUSHbob", "AUTH FOO", right],
                          ["USER bob@example.org", "PASS HUSHbob", "PASS HUSHbob", "QUIT"]):
                with Talk(node.pop3_address if HAS_POP3 else node.smtp_address) as pop:
                    pop.send("\r\n".join(lines) + "\r\n")
                    replies = [pop.reply() for _ in range(len(lines) + 1)]
                    self.assertNotIn("HUSH", "".join(replies))
            self.eventually(lambda: not node.site.sessions)
        texts = [minimail_line(record) for record in logs.records]
        self.assertTrue(any("AUTH ***" in text for text in texts), "commands are logged at all")
        for place, _, names in os.walk(node.data):
            texts += [open_and_read(os.path.join(place, name)).decode("latin-1") for name in names]
        for text in texts:
            for secret in ("HUSH", right, wrong):
                self.assertNotIn(secret, text)

    def test_a_message_whose_client_is_gone_is_followed_up(self):
        seen, committing, may_go_on = [], threading.Event(), threading.Event()
        node = self.node(on_message=lambda message: seen.append(message.id), keep=1)
        commit = node.site.loop.commit

        def wait_first(parcels):
            committing.set()
            self.assertTrue(may_go_on.wait(PATIENCE))
            return commit(parcels)
        node.site.loop.commit = wait_first
        talk = self.talk(node.smtp_address)
        self.dialog(talk, envelope())
        talk.send("x\r\n.\r\n")
        self.assertTrue(committing.wait(PATIENCE))
        talk.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        talk.close()                                # by a reset: it will never have its 250
        may_go_on.set()
        self.eventually(lambda: seen)
        self.assertEqual([message.id for message in node.messages("b@x")], seen)
        self.assertEqual(node.accepted, 1)

    def test_nothing_leaks(self):
        temporary, data = self.directory(), self.directory()

        def run(i):
            with minimail.Node(smtp=["127.0.0.1:0", "127.0.0.1:0"], pop3=self.OPTIONS["pop3"], no_sync=True,
                               data=None if i % 2 else data) as node:
                if i % 10 == 0:
                    self.deliver(node, b"x\r\n", "bob@x")
                    with Talk(node.pop3_address if HAS_POP3 else node.smtp_address) as talk:
                        talk.ask("USER bob@x")
                        node.wait_for("bob@x")

        with mock.patch.object(tempfile, "tempdir", temporary):
            run(0)
            self.eventually(lambda: not our_threads())
            threads, descriptors = threading.active_count(), open_files()
            for i in range(60):
                run(i)
            self.assertEqual(os.listdir(temporary), [])
        self.eventually(lambda: threading.active_count() <= threads, "all threads ended")
        self.assertNoMoreOpen(descriptors)
        self.assertLessEqual(set(os.listdir(os.path.join(data, "run"))), {"mail"})

    def test_out_of_descriptors(self):
        node = self.node()
        talk = self.talk(node.smtp_address)
        real = minimail.Listener.get_request
        with mock.patch.object(minimail.Listener, "get_request", autospec=True,
                               side_effect=OSError(errno.EMFILE,
                                                   "too many open files")) as broken, self.assertLogs("minimail"):
            late = Talk(node.smtp_address)
            self.addCleanup(late.close)
            self.eventually(lambda: broken.call_count)
            self.assertTrue(talk.ask("NOOP").startswith("250"), "who is in is served")
            broken.side_effect = real
            self.assertTrue(late.reply().startswith("220"), "it goes on once there are some")


class Policies(Case):
    class Picky(minimail.Policy):
        def __init__(self):
            self.seen = []

        def on_connect(self, client):
            self.seen.append(("connect", client))
            if "locked" in self.seen:
                raise Refused(421, "4.7.0", "not today")

        def on_mail(self, client, sender, user):
            self.seen.append(("mail", client, sender, user))
            if sender.startswith("evil"):
                raise Refused(550, "5.7.1", "not you")

        def on_rcpt(self, envelope, recipient):
            self.seen.append(("rcpt", envelope.sender, list(map(str, envelope.recipients)), recipient))
            if recipient.startswith("bug"):
                raise RuntimeError("a bug in the policy")

        def on_message(self, envelope, path):
            with open(path, "rb") as file:
                content = file.read()
            self.seen.append(("message", os.listdir(os.path.dirname(os.path.dirname(path)) + "/new")))
            if b"virus" in content:
                raise Refused(554, "5.7.0", "ill")

    def test_hooks(self):
        policy = self.Picky()
        node = self.node(policy=policy)
        talk = self.talk(node.smtp_address)
        with self.assertLogs("minimail", "ERROR"):
            self.dialog(talk, """\
                C: MAIL FROM:<evil@x>
                S: 550 5.7.1
                C: MAIL FROM:<a@x>
                S: 250
                C: RCPT TO:<bug@x>
                S: 451 4.3.0
                C: RCPT TO:<b@x>
                S: 250
                C: DATA
                S: 354
                C: virus
                C: .
                S: 554 5.7.0
                """)
        self.assertNothingLeft(os.path.join(node.data, "mail"))
        self.dialog(talk, letter("fine"))
        self.assertEqual(policy.seen, [
            ("connect", "127.0.0.1"), ("mail", "127.0.0.1", "evil@x", None), ("mail", "127.0.0.1", "a@x", None),
            ("rcpt", "a@x", [], "bug@x"), ("rcpt", "a@x", [], "b@x"), ("message", []),
            ("mail", "127.0.0.1", "a@x", None), ("rcpt", "a@x", [], "b@x"), ("message", [])])
        policy.seen.append("locked")
        self.dialog(node.smtp_address, "S: 421\nS: closed")


# ======================================================================================================================
# 15  SMTP
# ======================================================================================================================

class Dialogs(Case):
    """RFC 5321 as sessions. The node is shared; each test has its own connection."""

    @classmethod
    def setUpClass(cls):
        cls.shared = minimail.Node(max_size=200_000, **cls.OPTIONS)
        cls.shared.start()

    @classmethod
    def tearDownClass(cls):
        cls.shared.stop()

    def session(self, script, hello=True):
        return self.dialog(self.talk(self.shared.smtp_address, hello), script)

    def test_a_session(self):
        self.session("""\
            S: 220 mail.test ESMTP
            C: HELO client.test
            S: 250 mail.test
            C: mail from:<Alice@Example.net>
            S: 250 2.1.0
            C: Rcpt To:<session@example.com>
            S: 250 2.1.5
            C: DATA
            S: 354
            C: Subject: hi
            C:
            C: ..a dot
            C: .
            S: 250 2.0.0
            C: NOOP whatever
            S: 250 2.0.0
            C: QUIT
            S: 221 2.0.0
            S: closed
            """, hello=False)
        message = self.shared.wait_for("session@example.com")
        self.assertRegex(message.read(), rb"\AReturn-Path: <Alice@Example.net>\r\nDelivered-To: session@example.com\r\n"
                                         rb"Received: from client.test \(\[127.0.0.1\]\)\r\n\tby mail.test with SMTP id \S+"
                                         rb"\r\n\tfor <session@example.com>; .*\r\nSubject: hi\r\n\r\n.a dot\r\n\Z")

    def test_ehlo(self):
        talk = self.talk(self.shared.smtp_address, hello=False)
        talk.reply()
        words = [line[4:] for line in talk.ask("EHLO [127.0.0.1]").split("\n")]
        self.assertEqual(words[0], "mail.test")
        self.assertEqual(set(words[1:]), {"PIPELINING", "SIZE 200000", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES",
                                          "CHUNKING", "DSN",
                                          "AUTH PLAIN LOGIN", "HELP"})
        self.assertEqual(talk.ask("HELO x"), "250 mail.test")

    def test_order(self):
        self.session("""\
            S: 220
            C: RCPT TO:<a@x>
            S: 503 5.5.1
            C: DATA
            S: 503 5.5.1
            C: RSET
            S: 250
            C: EHLO x
            S: 250
            C: DATA
            S: 503 5.5.1
            C: MAIL FROM:<a@x>
            S: 250
            C: DATA
            S: 554 5.5.1
            C: MAIL FROM:<a@x>
            S: 503 5.5.1
            C: RCPT TO:<a@x>
            S: 250
            C: AUTH PLAIN AGEAYg==
            S: 503
            C: RSET
            S: 250
            C: RCPT TO:<a@x>
            S: 503 5.5.1
            """, hello=False)
        self.session("C: MAIL FROM:<a@x>\nS: 250\nC: EHLO x\nS: 250\nC: RCPT TO:<b@x>\nS: 503")

    def test_syntax(self):
        for command, reply in {
                "EHLO": "501", "FOO": "500 5.5.2", "": "500", "MAIL": "501", "MAIL FROM <a@x>": "501",
                "MAIL TO:<a@x>": "501", "MAIL FROM:<a@x> SIZE=x": "501 5.5.4",
                "MAIL FROM:<a@x> BODY=9BIT": "501 5.5.4", "MAIL FROM:<a@x> NOSUCH=1": "555 5.5.4",
                "MAIL FROM:<a@x> SMTPUTF8=1": "555",
                "MAIL FROM:<a@x> SIZE=1 SIZE=1": "501", "MAIL FROM:<a@x> SIZE=200001": "552 5.3.4",
                "MAIL FROM:<a\x00@x>": "501", "MAIL FROM:<a\x1b@x>": "501", "MAIL FROM:<j\xf6rg@x>": "553 5.6.7",
                "EXPN x": "502 5.5.1",
                "TURN": "502", "VRFY": "501", "VRFY bob": "252", "NOOP": "250", "DATA x": "501", "RSET x": "501",
                "QUIT x": "501",
                "STARTTLS": "503", "AUTH FOO": "504 5.5.4", "AUTH PLAIN !": "501", "BDAT": "501",
                "BDAT -1": "501", "BDAT 1 FIRST": "501", "X" * 4097: "500 5.5.2", "greet": "500", "command x": "500",
                "HELP": "214 2.0.0",
                "HELP MAIL": "214", "MAIL FROM:<a@x> AUTH=<>": "250", "mail FROM: <a@x>": "250", "MAIL FROM:<>": "250",
                "MAIL FROM:<a@x> size=200000 BODY=8bitmime SMTPUTF8": "250", "MAIL FROM:<@r.example:a@x>": "250"}.items():
            with self.subTest(command[:50]):
                self.session("C: %s\nS: %s" % (command, reply))
        for command, reply in {
                "RCPT": "501", "RCPT FROM:<a@x>": "501", "RCPT TO:<>": "501 5.1.3", "RCPT TO:<a@x> NOTIFY=EVER": "501", "RCPT TO:<a@x> X=Y": "555",
                "RCPT TO:<j\xf6rg@x>": "553 5.6.7", "RCPT TO:<%s@x>" % ("a" * 256): "553 5.1.3", "RCPT TO:<postmaster>": "250",
                "RCPT TO:<@r.example,@s.example:a@x>": "250", "RCPT TO:<a@[127.0.0.1]>": "250", 'RCPT TO:<"a b"@x>': "250",
                "RCPT TO: <a@x>": "250"}.items():
            with self.subTest(command[:50]):
                self.session("C: MAIL FROM:<a@x>\nS: 250\nC: %s\nS: %s" % (command, reply))
        talk = self.talk(self.shared.smtp_address)
        self.assertTrue(talk.send(b"MAIL FROM:<\xff@x>\r\n").reply().startswith("553 5.6.7"), "Latin-1")
        self.assertTrue(talk.send(b"NOOP\n").reply().startswith("250"), "people type into nc")

    def test_help_lists_all_verbs(self):
        verbs = set(self.talk(self.shared.smtp_address).ask("HELP").split()[-14:])
        self.assertLessEqual({"EHLO", "HELO", "MAIL", "RCPT", "DATA", "BDAT", "RSET", "NOOP", "VRFY", "HELP", "QUIT", "AUTH",
                              "STARTTLS"}, verbs)

    def test_patience_has_an_end(self):
        self.session("C: FOO\nS: 500\n" * 9 + "C: FOO\nS: 421 4.7.0\nS: closed")
        self.session("C: %s\nS: 500\n" % ("x" * 5000) * 9 + "C: %s\nS: 421 4.7.0\nS: closed" % ("x" * 5000))
        node = self.node(domain="example.org")
        guess = "C: RCPT TO:<guess@example.org>\nS: "
        self.dialog(self.talk(node.smtp_address), "C: MAIL FROM:<a@x>\nS: 250\n" + (guess + "550 5.1.1\n") * 99
                    + guess + "421\nS: closed")

    def test_web_browsers(self):
        for line in ("GET / HTTP/1.1", "POST /x HTTP/1.0"):
            talk = self.session("S: 220\nC: %s\nC: Host: x\nC:\nC: MAIL FROM:<a@x>" % line, hello=False)
            talk.send("%s\r\nHost: x\r\n\r\n" % line)
            reply = talk.reply()
            self.assertRegex(reply, r"^421 4\.7\.0 .*HTTP")
            self.assertEqual(talk.reply(), "closed")
        self.session("C: GET / HTTP/1.1\nS: 500")   # later it is only a wrong command

    def test_size(self):
        line = b"x" * 998 + b"\r\n"
        talk = self.talk(self.shared.smtp_address)
        self.dialog(talk, envelope("size@x"))
        self.assertTrue(talk.send(line * 201 + b".\r\n").reply().startswith("552 5.3.4"))
        self.assertFalse(self.shared.messages("size@x"))
        self.dialog(talk, envelope("size@x"))
        self.assertTrue(talk.send(line * 200 + b".\r\n").reply().startswith("250 2.0.0"))
        self.dialog(talk, "C: MAIL FROM:<a@x>\nC: RCPT TO:<size@x>\nS: 250\nS: 250")
        talk.send(b"BDAT 150000\r\n" + b"y" * 150_000 + b"BDAT 150000\r\n" + b"y" * 150_000 + b"BDAT 3 LAST\r\nzzzNOOP\r\n")
        self.assertEqual([talk.reply()[:9] for _ in range(4)], ["250 2.0.0", "552 5.3.4", "503 5.5.1", "250 2.0.0"])
        self.assertEqual(len(self.shared.messages("size@x")), 1)

    def test_endless_content_is_cut_off(self):
        node = self.node(max_size=1)
        talk = self.talk(node.smtp_address)
        self.dialog(talk, envelope())
        block = b"x" * (1 << 20)
        with self.assertRaises((BrokenPipeError, ConnectionResetError)):
            for _ in range(200):
                talk.send(block)
        self.eventually(lambda: not node.site.sessions)
        self.assertNothingLeft(node.data)

    def test_pipelining_is_answered_in_one_piece(self):
        sent = []
        flush = minimail.Wire.flush

        async def note(wire):
            sent.append(b"".join(wire.output))
            await flush(wire)
        talk = self.talk(self.shared.smtp_address)
        with mock.patch.object(minimail.Wire, "flush", note):
            self.dialog(talk, """\
                C: MAIL FROM:<a@x>
                C: RCPT TO:<pipe1@x>
                C: RCPT TO:<pipe2@x>
                C: RCPT TO:<>
                C: DATA
                S: 250 2.1.0
                S: 250 2.1.5
                S: 250 2.1.5
                S: 501
                S: 354
                """)
        self.assertEqual([piece.count(b"\r\n") for piece in sent if piece], [5])
        self.dialog(talk, """\
            C: one
            C: .
            C: MAIL FROM:<a@x>
            C: RCPT TO:<pipe1@x>
            C: DATA
            C: two
            C: .
            C: RSET
            C: QUIT
            S: 250 2.0.0
            S: 250 2.1.0
            S: 250 2.1.5
            S: 354
            S: 250 2.0.0
            S: 250 2.0.0
            S: 221
            S: closed
            """)
        self.assertEqual([body_of(message.read()) for message in self.shared.wait_for("pipe1@x", count=2)],
                         [b"one\r\n", b"two\r\n"])

    def test_bdat(self):
        talk = self.talk(self.shared.smtp_address)
        self.dialog(talk, "C: MAIL FROM:<a@x> BODY=8BITMIME\nC: RCPT TO:<bdat@x>\nS: 250\nS: 250")
        talk.send(b"BDAT 8\r\n.\r\n.\r\n\xff\rBDAT 4\r\n\n..aBDAT 0\r\nBDAT 6 LAST\r\n\r\n.\r\nxQUIT\r\n")
        self.assertEqual([talk.reply()[:9] for _ in range(5)], ["250 2.0.0"] * 4 + ["221 2.0.0"])
        self.assertEqual(body_of(self.shared.wait_for("bdat@x").read()), b".\r\n.\r\n\xff\r\n..a\r\n.\r\nx\r\n")
        talk = self.talk(self.shared.smtp_address)
        self.dialog(talk, "C: MAIL FROM:<a@x>\nC: RCPT TO:<bdat@x>\nS: 250\nS: 250")
        talk.send(b"BDAT 0 LAST\r\n")
        self.assertTrue(talk.reply().startswith("250 2.0.0"), "an empty message")

    def test_refused_chunks_are_read_past(self):
        talk = self.talk(self.shared.smtp_address)
        talk.send(b"BDAT 6\r\nRSET\r\nNOOP\r\n")
        self.assertEqual([talk.reply()[:3] for _ in range(2)], ["503", "250"])
        talk.send(b"MAIL FROM:<a@x>\r\nRCPT TO:<>\r\nBDAT 6 LAST\r\nQUIT\r\nNOOP\r\n")
        self.assertEqual([talk.reply()[:3] for _ in range(4)], ["250", "501", "554", "250"])
        talk.send(b"RCPT TO:<bdat2@x>\r\nBDAT 2\r\nhiDATA\r\nMAIL FROM:<b@x>\r\nRCPT TO:<b@x>\r\nBDAT 3 LAST\r\n...")
        self.assertEqual([talk.reply()[:3] for _ in range(6)], ["250", "250", "503", "503", "503", "250"])
        self.assertEqual(body_of(self.shared.wait_for("bdat2@x").read()), b"hi...\r\n")

    def test_a_transaction_given_up_leaves_nothing(self):
        node = self.node()
        for end in ("RSET", "EHLO again.test", "HELO again.test", "QUIT", None):
            talk = self.talk(node.smtp_address)
            self.dialog(talk, "C: MAIL FROM:<a@x>\nC: RCPT TO:<b@x>\nS: 250\nS: 250")
            talk.send(b"BDAT 200000\r\n" + b"x" * 200_000)
            self.assertTrue(talk.reply().startswith("250"))
            self.assertEqual(len(os.listdir(os.path.join(node.data, "mail/x/b/tmp"))), 1)
            if end:
                self.assertRegex(talk.ask(end), "2[25][01]")
            if end in (None, "QUIT"):
                talk.close()
            with self.subTest(end):
                self.eventually(lambda: not os.listdir(os.path.join(node.data, "mail/x/b/tmp")), "the draft of BDAT removed")

    def test_a_lost_connection_delivers_nothing(self):
        for content in (b"", b"half", b"a\r\n.", b"a\r\n.\r", b"a\n.\n", b"x" * 150_000):
            node = self.node()
            talk = self.talk(node.smtp_address)
            self.dialog(talk, envelope())
            talk.send(content)
            talk.close()
            self.eventually(lambda node=node: not node.site.loop.talking)
            self.assertNothingLeft(node.data)

    def test_recipients(self):
        node = self.node(domain="example.org", catch_all="box@example.org")
        talk = self.talk(node.smtp_address)
        talk.send(b"MAIL FROM:<a@x>\r\n" + b"".join(b"RCPT TO:<u%d@example.org>\r\n" % i for i in range(1002)) + b"DATA\r\n")
        replies = [talk.reply() for _ in range(1004)]
        self.assertEqual({reply[:9] for reply in replies[:1001]}, {"250 2.1.0", "250 2.1.5"})
        self.assertEqual([reply[:9] for reply in replies[1001:]], ["452 4.5.3", "452 4.5.3", "354 go ah"])
        self.assertTrue(talk.send("x\r\n.\r\n").reply().startswith("250 2.0.0"))
        self.assertEqual(len(node.messages()), 1)

    def test_utf8_addresses(self):
        node = self.node()
        self.deliver(node, "Subject: gr\xfc\xdfe\r\n\r\n".encode(), "j\xf6rg@b\xfccher.example",
                     sender="\u5c0f@\u4f8b.example")
        message = node.wait_for("j\xf6rg@b\xfccher.example")
        self.assertEqual(message.sender, "\u5c0f@\u4f8b.example")
        self.assertIn(b" with UTF8SMTP id ", message.read())
        self.assertEqual(message.email()["Delivered-To"], "j\xf6rg@b\xfccher.example")

    def test_nothing_can_be_injected_into_our_headers(self):
        self.session("""\
            C: EHLO x\x0bReceived:y
            S: 501
            C: EHLO (a)<b>"c";x
            S: 250
            C: MAIL FROM:<"a\\\\\\"> Return-Path: <b"@x>
            S: 250
            C: RCPT TO:<inject@x>
            S: 250
            C: DATA
            S: 354
            C: .
            S: 250
            """)
        head = self.shared.wait_for("inject@x").read()
        self.assertEqual([name for name, _ in minimail.split_headers(head)[0]], ["return-path", "delivered-to", "received"])
        self.assertIn(b"from ?a??b??c??x (", head)

    def test_auth_in_capture_mode(self):
        for script in ("C: AUTH PLAIN AGJvYkB4AHB3\nS: 235 2.7.0\nC: AUTH PLAIN AGJvYkB4AHB3\nS: 503",
                       "C: auth plain\nS: 334\nC: AGJvYkB4AHB3\nS: 235", "C: AUTH LOGIN\nS: 334 VXNlcm5hbWU6\nC: Ym9iQHg=\n"
                       "S: 334 UGFzc3dvcmQ6\nC: cHc=\nS: 235", "C: AUTH LOGIN Ym9iQHg=\nS: 334\nC: cHc=\nS: 235",
                       "C: AUTH PLAIN\nS: 334\nC: *\nS: 501", "C: AUTH LOGIN\nS: 334\nC: Ym9i\nS: 334\nC: *\nS: 501",
                       "C: AUTH LOGIN\nS: 334\nC: !!\nS: 501", "C: AUTH PLAIN\nS: 334\nC: %s\nS: 500" % ("A" * 13_000),
                       "C: HELO x\nS: 250\nC: AUTH PLAIN AGEAYg==\nS: 235", "C: AUTH PLAIN YQ==\nS: 235"):
            with self.subTest(script):
                self.session(script)
        self.session("C: AUTH PLAIN AGJvYkB4AHB3\nS: 235\n" + letter(recipient="auth@x"))
        self.assertIn(b" with ESMTPA id ", self.shared.wait_for("auth@x").read())

    def test_replies_carry_enhanced_codes_and_the_id(self):
        id = self.deliver(self.shared, b"x\r\n", "id@x")
        self.assertIn(b"with UTF8SMTP id %s\r\n" % id.encode(), self.shared.wait_for("id@x").read())
        self.assertEqual(self.shared.wait_for("id@x").id, id)

    def test_a_real_error_of_the_disk(self):
        node = self.node()
        os.makedirs(os.path.join(node.data, "mail", "x"))
        blocker = os.path.join(node.data, "mail", "x", "b")
        open(blocker, "w").close()                  # a file where the mailbox should be
        talk = self.talk(node.smtp_address)
        script = ("C: MAIL FROM:<a@x>\nC: RCPT TO:<c@x>\nC: RCPT TO:<b@x>\nC: DATA\nC: body\nC: .\n"
                  "S: 250\nS: 250\nS: 250\nS: 354\nS: %s")
        with self.assertLogs("minimail"):
            self.dialog(talk, script % "451 4.3.0")
        os.unlink(blocker)
        self.assertNothingLeft(node.data)
        self.dialog(talk, script % "250 2.0.0")

    def test_a_full_disk(self):
        node = self.node()
        talk = self.talk(node.smtp_address)
        with mock.patch.object(minimail, "write_all", side_effect=OSError(errno.ENOSPC, "full")), self.assertLogs("minimail"):
            for content in ("body", "x" * 300_000):
                self.dialog(talk, letter(content, "452 4.3.1"))
                self.assertNothingLeft(os.path.join(node.data, "mail"))
        self.dialog(talk, letter())

    def test_smtplib_agrees(self):
        with smtplib.SMTP(*self.shared.smtp_address, timeout=PATIENCE) as client:
            self.assertEqual(client.sendmail("a@x", ["lib@x", "lib2@x"], "Subject: y\n\n.\n..\nend"), {})
            self.assertEqual(client.verify("bob")[0], 252)
            with self.assertRaises(smtplib.SMTPSenderRefused):
                client.sendmail("a@x", ["lib@x"], b"", mail_options=["NOSUCH=1"])
            self.assertEqual(client.rset()[0], 250)
        self.assertEqual(body_of(self.shared.wait_for("lib@x").read()), b"Subject: y\r\n\r\n.\r\n..\r\nend\r\n")


SAMPLES = {
    "empty": b"", "empty line": b"\r\n", "no headers": b"\r\nbody\r\n", "no body": b"Subject: x\r\n\r\n", "one dot": b".\r\n",
    "dots": b".\r\n..\r\n...\r\n. \r\n.a\r\n", "no final newline": b"Subject: x\r\n\r\nend", "NUL": b"A: \0\r\n\r\n\0\0\r\n",
    "8-bit": bytes(range(128, 256)) + b"\r\n", "ISO-2022-JP": "Subject: x\r\n\r\n\u30c6\u30b9\u30c8\r\n".encode("iso2022_jp"),
    "long line": b"x" * 100_000 + b"\r\n", "long line, no end": b"." + b"y" * 300_000,
    "many dots": b"." * 70_000 + b"\r\n.\r\n",
    "only newlines": b"\r\n" * 1000, "looks like the end": b"a\r\n.\r\n.\r\nQUIT\r\n",
    "block edges": b"".join(b"x" * (n - 4) + b"\r\n.a\r\n" for n in (1 << 16, 1 << 16, 1 << 17, (1 << 18) - 1, 1 << 18)),
    "lines of dots across blocks": (b".\r\n" + b"z" * 60 + b"\r\n") * 10_000,
}


class EveryByte(Case):
    """What POP3 hands out, and what is stored, is byte for byte what was sent, below the trace headers."""

    def check(self, node, name):
        content = SAMPLES[name]
        expected = content if content.endswith(b"\r\n") or not content else content + b"\r\n"
        address = "%s@x" % name.replace(" ", "_").replace(",", "")
        message = self.fetch_and_delete(node, address) if HAS_POP3 else node.messages(address)[0].read()
        self.assertTrue(message.startswith(b"Return-Path: <"))
        trace = re.match(rb"(?:.*\r\n)*?Received: .*\r\n(?:\t.*\r\n)*", message).group()
        self.assertTrue(message[len(trace):] == expected, "%s: %r..." % (name, message[len(trace):][:100]))

    def fetch_and_delete(self, node, address):
        """Return the one message in a mailbox, of which LIST and TOP say the same as RETR."""
        with Talk(node.pop3_address) as talk:
            for command in ("", "USER " + address, "PASS x"):
                answer = talk.ask(command) if command else talk.reply()
                self.assertTrue(answer.startswith("+OK"), answer)
            size = int(talk.ask("LIST 1").split()[2])
            message = talk.listing("RETR 1")
            self.assertEqual(size, len(message))
            self.assertEqual(talk.listing("TOP 1 1000000"), message)
            self.assertTrue(talk.ask("DELE 1").startswith("+OK"))
            talk.ask("QUIT")
        return message

    def run_all(self, send):
        node = self.node()
        for name, content in SAMPLES.items():
            with self.subTest(name):
                talk = self.talk(node.smtp_address)
                self.dialog(talk, "C: MAIL FROM:<a@x> BODY=8BITMIME\nC: RCPT TO:<%s@x>\nS: 250\nS: 250"
                            % name.replace(" ", "_").replace(",", ""))
                send(talk, content)
                self.check(node, name)
                talk.close()

    def test_data(self):
        def send(talk, content):
            self.dialog(talk, "C: DATA\nS: 354")
            end = b".\r\n" if content.endswith(b"\r\n") or not content else b"\r\n.\r\n"
            self.assertTrue(talk.send(stuff_slowly(content) + end).reply().startswith("250 2.0.0"))
        self.run_all(send)

    def test_bdat(self):
        chance = random.Random(3)

        def send(talk, content):
            while content:
                size = chance.randint(1, 100_000)
                talk.send(b"BDAT %d\r\n" % len(content[:size]) + content[:size])
                content = content[size:]
                self.assertTrue(talk.reply().startswith("250 2.0.0"))
            self.assertTrue(talk.ask("BDAT 0 LAST").startswith("250 2.0.0"))
        self.run_all(send)

    def test_smuggling(self):
        """Whatever looks like an end to other servers is content here, and what follows it no command."""
        node = self.node()
        for i, attempt in enumerate(SMUGGLING):
            talk = self.talk(node.smtp_address)
            self.dialog(talk, envelope("s%d@x" % i))
            talk.send(attempt)
            talk.send(b"\r\n.\r\nQUIT\r\n")
            self.assertEqual([talk.reply()[:3] for _ in range(3)], ["250", "221", "clo"])
            self.assertEqual(body_of(node.wait_for("s%d@x" % i).read()), decode_slowly(attempt + b"\r\n.\r\n")[0])
        self.assertEqual(len(node.messages()), len(SMUGGLING))


class OwnNames(Case):
    """What clients write that we serve; strangers get RFC 5321."""

    def test_capture_mode(self):
        node = self.node()
        for path, box in (("a..b.@docomo.example", "a..b.@docomo.example"), ("<x@[127.0.0.1]>", "x@[127.0.0.1]"), ("root", "root@mail.test"),
                          ("<root@localhost>", "root@localhost"), ("Joe <joe@x>", "joe@x")):
            self.dialog(self.talk(node.smtp_address), "C: MAIL FROM: root\nC: RCPT TO: %s\nC: DATA\nC: .\nS: 250\nS: 250\nS: 354\nS: 250" % path)
            message = node.wait_for(box, timeout=PATIENCE)
            self.assertEqual((message.recipient, message.sender), (box, "root@mail.test"))
            self.assertEqual(len(self.fetch(node, box)), 1)
            self.assertEqual(run_main("mail", box, "--data", node.data)[1].count("\n"), 1)

    def test_node_mode(self):
        for trust, rcpt in ("127.0.0.0/8", "250"), ("192.0.2.1", "5"):
            node = self.node(domain="example.org", catch_all="all@example.org", trust=trust)
            for path in ("root", "<root@localhost>", "<root@mail.test>", "a..b@example.org", "<root>"):
                self.dialog(self.talk(node.smtp_address), "C: MAIL FROM:<me@example.org>\nC: RCPT TO:%s\nS: 250\nS: %s" % (path, rcpt))
            self.dialog(self.talk(node.smtp_address), "C: MAIL FROM:<me@x.example>\nC: RCPT TO:<abuse@example.org>\nS: 250\nS: 250")

class AsOthersTakeIt(Case):
    """In capture mode, what Postfix and aiosmtpd take is taken; strangers to a node speak as RFC 5321 has it."""

    LINES = (                                       # command; in capture mode; from a stranger
        ("MAIL FROM:<a@x>", "250", "503 5.5.1"), ("EHLO a b", "250", "501"), ("EHLO gr\xfc\xdfe", "250", "501"),
        ("EHLO " + "x" * 300, "250", "501"), ("HELO a b", "250", "501"), ("EHLO", "501", "501"), ("HELO", "501", "501"),
        ("EHLO x\ty", "501", "501"), ("AUTH PLAIN AGEAYg==", "235", "503"), ("AUTH PLAIN YQ==", "235", "503"),
        ("AUTH FOO", "504 5.5.4", "503"))
    AFTER_EHLO = (
        ("MAIL FROM:a@x", "250", "501"), ("MAIL FROM: a@x", "250", "501"), ("MAIL FROM:a..b@x", "250", "501"),
        ("MAIL FROM:<.a.@x>", "250", "501"), ("MAIL FROM:<a@x>\r\nRCPT TO:<bob>\r\nRCPT TO:eve", "250", "250"), ("MAIL FROM:<bob>", "250", "553"), ("MAIL FROM:<a@x", "501", "501"),
        ("MAIL FROM:\t<a@x>\r\nRCPT TO:\t<bob>", "250", "501"), ("MAIL FROM:\t\t a@x", "250", "501"),
        ("MAIL FROM:<a\tb@x>", "501", "501"), ("AUTH PLAIN !", "501", "501"), ("AUTH PLAIN =", "235", "501"))

    def check(self, address, lines, column):
        for line, *replies in lines:
            with self.subTest(line[:30]):
                talk = self.talk(address, hello=lines is not self.LINES)
                if lines is self.LINES:
                    talk.reply()
                self.assertRegex(talk.ask(line).split("\n")[-1], "^" + replies[column], line)

    def test_capture_mode(self):
        node = self.node()
        self.check(node.smtp_address, self.LINES, 0)
        self.check(node.smtp_address, self.AFTER_EHLO, 0)
        self.dialog(node.smtp_address, "S: 220\n" + letter(recipient="plain@x"))     # without a hello at all
        self.assertRegex(node.wait_for("plain@x").read(), rb"(?m)^Received: from ")
        talk = self.talk(node.smtp_address, hello=False)
        talk.reply()
        self.assertTrue(talk.send(b"EHLO gr\xfc\xdfe\r\n").reply().startswith("250"), "Latin-1, too")

    def test_strangers(self):
        node = self.node(accounts={"bob@example.org": "x"}, domain="example.org", trust="off")
        node.throttle.delay = lambda client: 0.0
        self.check(node.smtp_address, self.LINES, 1)
        self.check(node.smtp_address, self.AFTER_EHLO, 1)


class NodeMode(Case):
    """Who may send what to whom where mail is kept for some domains only."""

    def start(self, **options):
        node = self.node({"bob@example.org": "bobs", "eve@example.org": "eves"}, "sales@example.org: bob@example.org\n",
                         domain="example.org", **options)
        node.throttle.delay = lambda client: 0.0
        return node

    def test_recipients(self):
        node = self.start(trust="off")
        self.dialog(self.talk(node.smtp_address), """\
            C: MAIL FROM:<>
            S: 250
            C: RCPT TO:<bob@example.org>
            S: 250 2.1.5
            C: RCPT TO:<Bob+list@Example.ORG>
            S: 250 2.1.5
            C: RCPT TO:<bob@[127.0.0.1]>
            S: 250
            C: RCPT TO:<nobody@example.org>
            S: 550 5.1.1
            C: RCPT TO:<postmaster>
            S: 250
            C: RCPT TO:<bob@elsewhere.example>
            S: 550 5.7.1
            C: RCPT TO:<@example.org:bob@elsewhere.example>
            S: 550 5.7.1
            C: RCPT TO:<"bob@elsewhere.example"@example.org>
            S: 550 5.1.1
            C: RCPT TO:<bob%elsewhere.example@example.org>
            S: 550 5.1.1
            C: DATA
            S: 354
            C: hello
            C: .
            S: 250 2.0.0
            """)
        self.assertEqual([message.recipient for message in node.messages()], ["bob@example.org", "postmaster@example.org"])

    @needs("relay")
    def test_log_in_to_relay(self):
        node = self.start(trust="off")
        self.dialog(self.talk(node.smtp_address), """\
            C: AUTH PLAIN %s
            S: 535 5.7.8
            C: AUTH PLAIN %s
            S: 535 5.7.8
            C: AUTH PLAIN %s
            S: 501
            C: MAIL FROM:<bob@example.org>
            S: 250
            C: RCPT TO:<you@elsewhere.example>
            S: 550 5.7.1
            C: RSET
            S: 250
            C: AUTH PLAIN %s
            S: 235 2.7.0
            C: MAIL FROM:<eve@example.org>
            S: 553 5.7.1
            C: MAIL FROM:<bob@elsewhere.example>
            S: 553 5.7.1
            C: MAIL FROM:<sales@example.org>
            S: 250
            C: RCPT TO:<you@elsewhere.example>
            S: 250
            C: RSET
            S: 250
            C: MAIL FROM:<BOB+x@example.org>
            S: 250
            """ % (plain("bob@example.org", "eves"), plain("bob", "bobs"),
                   base64.b64encode(b"eve@example.org\0bob@example.org\0bobs").decode(),
                   plain("Bob@example.org", "bobs")))

    def test_trust_and_relay_to(self):
        node = self.start(relay_to=["friend.example", ".below.example"])
        self.dialog(self.talk(node.smtp_address), "C: MAIL FROM:<a@x>\nS: 250\n" + "".join(
            "C: RCPT TO:<u@%s>\nS: %s\n" % pair for pair in (("friend.example", "250"), ("x.Below.example", "250"), (
                "below.example", "250"), ("x.friend.example", "550 5.7.1"), ("elsewhere.example", "550 5.7.1"))))
        self.dialog(self.talk(self.start(trust="192.0.2.0/24").smtp_address),
                    "C: MAIL FROM:<a@x>\nS: 250\nC: RCPT TO:<u@friend.example>\nS: 550 5.7.1")

    def test_wrong_passwords_cut_off(self):
        node = self.start()
        for _ in range(2):
            talk = self.talk(node.smtp_address)
            for _ in range(5):
                self.assertTrue(talk.ask("AUTH PLAIN " + plain("bob@example.org", "guess")).startswith("535"))
        self.dialog(self.talk(node.smtp_address), "C: AUTH PLAIN %s\nS: 421 4.7.0\nS: closed" % plain("bob@example.org",
                                                                                                           "bobs"))
        if HAS_POP3:
            self.dialog(node.pop3_address, "S: +OK\nC: USER bob@example.org\nS: -ERR [AUTH]\nS: closed")

    def test_spellings_of_an_account_count_together(self):
        site = self.start().site
        with mock.patch.object(minimail, "check_password", lambda password, record: False):
            for number in range(minimail.ACCOUNT_FAILURES):
                name = ('"\\bob"@example.org', '"b\\ob"@example.org', "bob@EXAMPLE.org.", "bob@example.org")[number % 4]
                self.assertIsNone(site.verify("192.0.2.%d" % number, name, "guess"))
            for name in ('"bo\\b"@example.org', "bob@example.org"):
                self.assertRaises(minimail.TooManyGuesses, site.verify, "198.51.100.1", name, "guess")
            self.assertIsNone(site.verify("198.51.100.1", "eve@example.org", "guess"))

    def test_no_password_in_clear_from_afar(self):
        node = self.start()
        with mock.patch.object(minimail, "is_loopback", lambda host: False):
            talk = self.talk(node.smtp_address, hello=False)
            talk.reply()
            self.assertNotIn("AUTH", talk.ask("EHLO x"))
            self.dialog(talk, "C: AUTH PLAIN %s\nS: 538 5.7.11" % plain("bob@example.org", "bobs"))
            if not HAS_POP3:
                return
            pop = self.dialog(node.pop3_address,
                              "S: +OK\nC: USER bob@example.org\nS: -ERR [AUTH]\nC: AUTH PLAIN %s\nS: -ERR [AUTH]"
                              % plain("bob@example.org", "bobs"))
            capabilities = pop.listing("CAPA")
            self.assertFalse(b"USER" in capabilities or b"SASL" in capabilities)

    @needs("pop3")
    def test_pop3_log_in(self):
        node = self.start()
        self.deliver(node, b"x\r\n", "bob+x@example.org", "eve@example.org")
        self.dialog(node.pop3_address, """\
            S: +OK
            C: USER bob@example.org
            S: +OK
            C: PASS eves
            S: -ERR [AUTH]
            C: USER nobody@example.org
            S: +OK
            C: PASS x
            S: -ERR [AUTH]
            C: AUTH PLAIN %s
            S: +OK
            C: STAT
            S: +OK 1
            """ % plain("bob@example.org", "bobs"))

    def test_a_new_account_may_log_in_at_once(self):
        node = self.start()
        self.assertEqual(run_main("--data", node.data, "user", "add", "New@example.org", "--password-stdin", stdin="pw\n")[0],
                         0)
        self.eventually(lambda: node.stores.accounts.names().get("new@example.org"))
        self.dialog(self.talk(node.smtp_address), "C: AUTH PLAIN %s\nS: 235 2.7.0" % plain("new@example.org", "pw"))
        if HAS_POP3:
            self.dialog(node.pop3_address, "S: +OK\nC: USER new@example.org\nS: +OK\nC: PASS pw\nS: +OK 0")


@unittest.skipUnless(ssl, "this Python has no ssl")
class TLS(Case):
    def start(self, **options):
        self.pem = self.file("cert.pem", CERTIFICATE)
        return self.node(tls_cert=self.pem, smtps="127.0.0.1:0", pop3s=self.OPTIONS["pop3"], **options)

    def tls_talk(self, address):
        talk = Talk(address)
        self.addCleanup(talk.close)
        return talk.start_tls()

    def test_starttls(self):
        node = self.start()
        talk = self.talk(node.smtp_address, hello=False)
        talk.reply()
        self.assertIn("250-STARTTLS", talk.ask("EHLO x").split("\n"))
        self.dialog(talk, "C: STARTTLS now\nS: 501\nC: MAIL FROM:<a@x>\nS: 250\nC: STARTTLS\nS: 220")
        talk.start_tls()
        self.dialog(talk, "C: RCPT TO:<b@x>\nS: 503\nC: DATA\nS: 503")     # all is forgotten
        words = talk.ask("EHLO x")
        self.assertNotIn("STARTTLS", words)
        self.assertIn("AUTH PLAIN LOGIN", words)
        self.dialog(talk, "C: STARTTLS\nS: 503\n" + letter())
        self.assertIn(b" with ESMTPS id ", node.wait_for("b@x").read())
        self.dialog(talk, "C: AUTH PLAIN AGJvYkB4AHB3\nS: 235\nC: QUIT\nS: 221\nS: closed")

    def test_what_comes_before_the_handshake_is_thrown_away(self):
        node = self.start()
        talk = self.talk(node.smtp_address)
        talk.send(b"STARTTLS\r\nEHLO evil\r\nMAIL FROM:<evil@x>\r\nRCPT TO:<evil@x>\r\n")
        self.assertTrue(talk.reply().startswith("220"))
        talk.start_tls()
        self.dialog(talk, "C: NOOP\nS: 250 2.0.0 ok\nC: RCPT TO:<b@x>\nS: 503\nC: EHLO x\nS: 250\nC: RCPT TO:<b@x>\nS: 503")
        if not HAS_POP3:
            return
        pop = self.talk(node.pop3_address, hello=False)
        pop.reply()
        pop.send(b"STLS\r\nUSER evil@x\r\nPASS x\r\n")
        self.assertEqual(pop.reply(), "+OK go ahead")
        pop.start_tls()
        self.dialog(pop, "C: STAT\nS: -ERR\nC: PASS x\nS: -ERR")

    def test_who_does_not_read_holds_up_nobody_else(self):
        node = self.start()
        for talk in (self.tls_talk(node.smtps_address), self.talk(node.smtp_address, hello=False)):
            talk.sock.settimeout(0.5)
            with contextlib.suppress(socket.timeout), mock.patch.object(minimail, "MAX_IDLE_COMMANDS", 10**9):
                for _ in range(200):                # 200,000 answers of 100 bytes are more than any buffer takes
                    talk.sock.sendall(b"HELP\r\n" * 1000)
            self.deliver(node, b"x\r\n", "b@x")

    def test_tls_from_the_first_byte_and_witnesses(self):
        node = self.start()
        context = ssl._create_unverified_context()
        with smtplib.SMTP_SSL(*node.smtps_address, timeout=PATIENCE, context=context) as client:
            client.login("bob@x", "pw")
            client.sendmail("a@x", ["b@x"], b"Subject: x\r\n\r\n" + b"y" * 300_000)
        with smtplib.SMTP(*node.smtp_address, timeout=PATIENCE) as client:
            client.starttls(context=context)
            client.sendmail("a@x", ["b@x"], b"Subject: z\r\n\r\n")
        self.assertIn(b" with ESMTPSA id ", node.wait_for("b@x").read())
        if not HAS_POP3:
            return
        for pop in (poplib.POP3_SSL(*node.pop3s_address, timeout=PATIENCE, context=context),
                    poplib.POP3(*node.pop3_address, timeout=PATIENCE)):
            with contextlib.closing(pop):
                if not isinstance(pop, poplib.POP3_SSL):
                    pop.stls(context=context)
                pop.user("b@x")
                pop.pass_("x")
                self.assertEqual(pop.stat()[0], 2)
                self.assertEqual(len(b"\r\n".join(pop.retr(1)[1])) + 2, node.messages("b@x")[0].size)
                pop.quit()

    def test_pipelining_inside_tls(self):
        """What the TLS layer holds decrypted must not wait for more bytes on the socket."""
        node = self.start()
        talk = self.tls_talk(node.smtps_address)
        self.dialog(talk, "S: 220\nC: EHLO x\nS: 250\n" + "C: NOOP\n" * 900 + "S: 250 2.0.0 ok\n" * 900)

    def test_handshakes_that_do_not_come(self):
        node = self.start()
        clock = node.site.loop.clock = RunningClock()
        silent = [self.talk(node.smtps_address, hello=False) for _ in range(10)]
        noise = self.talk(node.smtps_address, hello=False)
        noise.send("EHLO not tls\r\n")
        self.dialog(self.tls_talk(node.smtps_address), "S: 220\nC: QUIT\nS: 221\nS: closed")
        clock.ahead += 1000
        for talk in silent + [noise]:
            while talk.line() != "closed":
                pass
        self.eventually(lambda: not node.site.sessions)

    def test_old_versions(self):
        node = self.start()
        context = node.site.certificates.context()
        self.assertGreaterEqual(context.minimum_version, ssl.TLSVersion.TLSv1_2)

    @mock.patch.object(minimail.Watched, "PAUSE", 0.0)
    def test_certificates_are_read_again(self):
        node = self.start()
        certificates = node.site.certificates
        first = certificates.context()
        self.assertIs(certificates.context(), first)
        with open(self.pem, "wb") as file:
            file.write(b"rubbish")
        with self.assertLogs("minimail"):
            self.assertIs(certificates.context(), first, "the last good one")
        with open(self.pem, "wb") as file:
            file.write(CERTIFICATE + b"\n")
        self.assertIsNot(certificates.context(), first)
        self.dialog(self.tls_talk(node.smtps_address), "S: 220")

    def test_needed(self):
        for name in filter(lambda name: not lacks_section(name), ("smtps", "pop3s", "webs")):
            with self.assertRaisesRegex(ValueError, name + ".*tls_cert"):
                minimail.Node(**{name: "127.0.0.1:0"})
        with self.assertRaisesRegex(OSError, "/no/such.pem"):
            minimail.Node(smtp="127.0.0.1:0", tls_cert="/no/such.pem").start()


# ======================================================================================================================
# 16  POP3
# ======================================================================================================================

class POP3(Case):
    def setUp(self):
        self.node_ = self.node()
        self.deliver(self.node_, b"Subject: one\r\n\r\n1\r\n.2\r\n3\r\n", "bob@x")
        self.deliver(self.node_, b"Subject: two\r\n\r\n", "bob@x")
        self.deliver(self.node_, b"\r\nthree\r\n", "bob@x")
        self.sizes = [message.size for message in self.node_.messages("bob@x")]
        self.uids = [message.uid for message in self.node_.messages("bob@x")]

    def session(self, script, log_in=True, user="bob@x"):
        hello = "S: +OK\n" + ("C: USER %s\nS: +OK\nC: PASS p w\nS: +OK\n" % user if log_in else "")
        return self.dialog(self.node_.pop3_address, hello + textwrap.dedent(script))

    def test_a_log_in_that_fails_for_a_reason_of_ours_keeps_no_lock(self):
        with mock.patch.object(self.node_.stores.mailboxes, "remembered", side_effect=PermissionError(errno.EACCES, "no")):
            talk = self.session("C: USER bob@x\nS: +OK\nC: PASS x\nS: -ERR [SYS/TEMP]", log_in=False)
        self.dialog(talk, "C: USER bob@x\nS: +OK\nC: PASS x\nS: +OK 3")
        self.dialog(talk, "C: QUIT\nS: +OK")
        self.session("C: QUIT\nS: +OK")

    def test_a_size_in_a_name_that_lies(self):
        """The end is found all the same."""
        new = os.path.join(self.node_.stores.mailboxes.path("eve@x"), "new")
        os.makedirs(new)
        os.makedirs(new[:-3] + "cur")
        for number, content in enumerate((b"a\r\nb", b"", b"x" * 70_000)):
            with open(os.path.join(new, "%d.M1.host,S=%d,W=%d" % (number, len(content), len(content))), "wb") as file:
                file.write(content)
        talk = self.session("", user="eve@x")
        for number in 1, 2, 3:
            self.assertTrue(talk.ask("RETR %d" % number).startswith("+OK"))
            while talk.reply() != ".":
                pass
        self.dialog(talk, "C: NOOP\nS: +OK")

    def test_no_locks_on_this_file_system(self):
        mailboxes, before = self.node_.stores.mailboxes, open_files()
        with mock.patch.object(minimail, "lock_file", side_effect=OSError(errno.ENOLCK, "no locks")):
            self.assertRaises(OSError, mailboxes.lock, "bob@x")
        self.assertNoMoreOpen(before)

    def test_authorization(self):
        self.session("""\
            C: NOOP
            S: +OK
            C: STAT
            S: -ERR
            C: RETR 1
            S: -ERR
            C: PASS x
            S: -ERR
            C: FOO
            S: -ERR
            C: USER
            S: -ERR
            C: user bob@x
            S: +OK
            C: pass
            S: +OK
            C: USER bob@x
            S: -ERR
            C: STAT
            S: +OK 3
            C: QUIT
            S: +OK
            S: closed
            """, log_in=False)
        self.session("C: QUIT\nS: +OK\nS: closed", log_in=False)
        self.session("C: NOOP\nS: +OK\n" + "C: FOO\nS: -ERR\n" * 10 + "S: closed", log_in=False)
        self.session("C: %s\nS: -ERR\nC: NOOP\nS: +OK" % ("x" * 3000))

    def test_capabilities(self):
        talk = self.session("", log_in=False)
        words = talk.listing("CAPA").decode().splitlines()
        self.assertLessEqual({"TOP", "UIDL", "USER", "RESP-CODES", "AUTH-RESP-CODE", "PIPELINING", "EXPIRE NEVER",
                              "SASL PLAIN"}, set(words))
        self.assertTrue(any(word.startswith("IMPLEMENTATION ") for word in words))
        self.assertNotIn("STLS", words)
        self.assertEqual(talk.ask("STLS")[:4], "-ERR")
        self.assertEqual(talk.listing("AUTH"), b"PLAIN\r\n")

    def test_auth_plain(self):
        for script in ("C: AUTH PLAIN AGJvYkB4AHB3\nS: +OK", "C: auth plain\nS: +\nC: AGJvYkB4AHB3\nS: +OK",
                       "C: AUTH PLAIN\nS: +\nC: *\nS: -ERR",
                       "C: AUTH PLAIN !\nS: -ERR", "C: AUTH CRAM-MD5\nS: -ERR"):
            talk = self.session(script, log_in=False)
            self.assertEqual(talk.ask("STAT")[:4], "+OK " if script.endswith("+OK") else "-ERR", script)
            talk.close()
            self.eventually(lambda: not self.node_.site.sessions)

    def test_listings(self):
        talk = self.session("C: STAT\nS: +OK 3 %d\nC: LIST 2\nS: +OK 2 %d\nC: UIDL 3\nS: +OK 3 %s" % (
            sum(self.sizes), self.sizes[1], self.uids[2]))
        self.assertEqual(talk.listing("LIST").decode(), "".join("%d %d\r\n" % pair for pair in enumerate(self.sizes, 1)))
        self.assertEqual(talk.listing("UIDL").decode(), "".join("%d %s\r\n" % pair for pair in enumerate(self.uids, 1)))
        self.dialog(talk, "C: DELE 2\nS: +OK\nC: STAT\nS: +OK 2 %d" % (self.sizes[0] + self.sizes[2]))
        self.assertEqual(talk.listing("LIST").decode(), "1 %d\r\n3 %d\r\n" % (self.sizes[0], self.sizes[2]))
        self.assertEqual(talk.listing("UIDL").decode(), "1 %s\r\n3 %s\r\n" % (self.uids[0], self.uids[2]))
        for verb in ("LIST", "UIDL", "RETR", "DELE", "TOP"):
            for argument in ("0", "2", "4", "-1", "x", "1 x", "99999999999", "\u0661"):
                self.assertEqual(talk.ask("%s %s%s" % (verb, argument, " 0" if verb == "TOP" else ""))[:4], "-ERR",
                                 (verb, argument))
        for command in ("RETR", "DELE", "TOP 1", "TOP 1 -1", "TOP"):
            self.assertEqual(talk.ask(command)[:4], "-ERR", command)
        self.assertEqual(talk.ask("NOOP"), "+OK")

    def test_retrieval(self):
        talk = self.session("")
        stored = [message.read() for message in self.node_.messages("bob@x")]
        for number, content in enumerate(stored, 1):
            self.assertEqual(talk.listing("RETR %d" % number), content)
            self.assertEqual(len(content), self.sizes[number - 1])
        head = stored[0][:stored[0].index(b"\r\n\r\n") + 4]
        self.assertEqual(talk.listing("TOP 1 0"), head)
        self.assertEqual(talk.listing("TOP 1 2"), head + b"1\r\n.2\r\n")
        self.assertEqual(talk.listing("TOP 1 100"), stored[0])
        self.assertEqual(talk.listing("TOP 2 5"), stored[1])

    def test_deletion_happens_at_quit_only(self):
        talk = self.session("C: DELE 1\nS: +OK\nC: DELE 1\nS: -ERR\nC: DELE 3\nS: +OK")
        self.assertEqual(len(self.node_.messages("bob@x")), 3)
        talk.close()                                # lost: nothing is deleted
        self.eventually(lambda: not self.node_.site.sessions)
        self.assertEqual(len(self.node_.messages("bob@x")), 3)
        self.session("C: DELE 1\nS: +OK\nC: RSET\nS: +OK\nC: STAT\nS: +OK 3\nC: DELE 2\nS: +OK\nC: QUIT\nS: +OK\nS: closed")
        self.assertEqual([message.uid for message in self.node_.messages("bob@x")], [self.uids[0], self.uids[2]])
        talk = self.session("C: STAT\nS: +OK 2")
        self.assertEqual(talk.listing("UIDL").decode(), "1 %s\r\n2 %s\r\n" % (self.uids[0], self.uids[2]), "UIDs stay")

    def test_deletion_that_fails_is_told(self):
        talk = self.session("C: DELE 1\nS: +OK\nC: DELE 2\nS: +OK")
        real = os.unlink

        def unlink(path, *arguments, **keywords):
            if self.uids[0] in str(path):
                raise OSError(errno.EROFS, "read-only")
            return real(path, *arguments, **keywords)
        with mock.patch.object(os, "unlink", unlink), self.assertLogs("minimail"):
            self.dialog(talk, "C: QUIT\nS: -ERR\nS: closed")
        self.assertEqual([message.uid for message in self.node_.messages("bob@x")], [self.uids[0], self.uids[2]])

    def test_files_that_vanish_or_move(self):
        talk = self.session("")
        first, second, third = self.node_.messages("bob@x")
        os.unlink(first.path)
        os.rename(second.path, second.path.replace("/new/", "/cur/") + ":2,S")
        with open(third.path, "wb"):
            pass                                    # truncated by somebody
        threads, moved = [], minimail.Mailboxes.moved
        with mock.patch.object(minimail.Mailboxes, "moved", lambda *arguments: threads.append(
                threading.current_thread().name) or moved(*arguments)):
            self.dialog(talk, "C: RETR 1\nS: -ERR\nC: TOP 1 0\nS: -ERR")
            self.assertEqual(len(talk.listing("RETR 2")), self.sizes[1])
            self.assertTrue(talk.listing("TOP 2 0"))
        self.assertEqual((len(threads), "minimail-loop" in threads), (4, False), "others go on while it is looked for")
        talk.send("RETR 3\r\nNOOP\r\n")
        talk.line()
        talk.listing()
        self.dialog(talk, "S: +OK\nC: DELE 1\nS: +OK\nC: DELE 2\nS: +OK\nC: QUIT\nS: +OK\nS: closed")
        self.assertEqual(len(self.node_.messages("bob@x")), 1)

    def test_a_listing_is_fixed_at_log_in(self):
        talk = self.session("C: STAT\nS: +OK 3")
        self.deliver(self.node_, b"x\r\n", "bob@x")
        self.dialog(talk, "C: STAT\nS: +OK 3\nC: RETR 4\nS: -ERR\nC: QUIT\nS: +OK")
        self.session("C: STAT\nS: +OK 4")

    def test_in_use(self):
        talk = self.session("")
        login = "C: USER %s\nS: +OK\nC: PASS x\nS: %s"
        self.session(login % ("bob@x", "-ERR [IN-USE]"), log_in=False)
        self.session(login % ("BOB@X", "-ERR [IN-USE]"), log_in=False)
        self.deliver(self.node_, b"x\r\n", "other@x")
        self.session(login % ("other@x", "+OK"), log_in=False)
        self.dialog(talk, "C: QUIT\nS: +OK\nS: closed")
        self.session(login % ("bob@x", "+OK"), log_in=False).close()
        self.eventually(lambda: len(self.node_.site.sessions) <= 4)

    def test_in_use_by_another_process(self):
        program = Program("--data", self.node_.data, "--smtp", "off", "--pop3", "127.0.0.1:0", "--web", "off")
        self.addCleanup(program.end)
        talk = self.dialog(program.address("pop3"), "S: +OK\nC: USER bob@x\nS: +OK\nC: PASS x\nS: +OK 3")
        script = "C: USER bob@x\nS: +OK\nC: PASS x\nS: %s"
        other = self.session(script % "-ERR [IN-USE]", log_in=False)
        program.end(signal.SIGKILL)                 # the lock ends with who held it
        talk.close()
        self.dialog(other, script % "+OK 3")

    def test_an_unknown_mailbox_is_empty_and_leaves_no_trace(self):
        before = sorted(os.walk(self.node_.data))
        for user in ("nobody@x", "nobody", "../../etc@x", "a" * 300 + "@x", "\xe9@x", "@", "bob@x/"):
            self.session("C: STAT\nS: +OK 0 0\nC: LIST\nS: +OK\nS: .\nC: QUIT\nS: +OK\nS: closed", user=user)
        self.assertEqual(sorted(os.walk(self.node_.data)), before)

    def test_pipelining(self):
        talk = self.talk(self.node_.pop3_address, hello=False)
        talk.send("USER bob@x\r\nPASS x\r\nSTAT\r\n" + "RETR 1\r\n" * 500 + "DELE 1\r\nQUIT\r\n")
        self.assertEqual([talk.reply()[:5] for _ in range(4)], ["+OK m", "+OK n", "+OK 3", "+OK 3"])
        for _ in range(500):
            self.assertTrue(talk.line().startswith("+OK"))
            self.assertEqual(len(talk.listing()), self.sizes[0])
        self.assertEqual([talk.reply() for _ in range(3)], ["+OK gone at QUIT", "+OK", "closed"])

    def test_mail_of_other_programs(self):
        """Line ends are made CRLF, sizes are what is sent, flags do not matter."""
        path = self.node_.stores.mailboxes.path("bob@x")
        contents = {"1.a.h": b"Subject: lf\n\n.dot\n\nend", "2.b.h:2,S": b"A: b\r\n\r\n.\r\nx\r\n", "3.c.h": b".\n" * 200_000,
                    "4.d.h": b"x" * (minimail.BIG_BLOCK - 1) + b"\r\n.y\nz\r", "5.e.h": b""}
        for name, content in contents.items():
            with open(os.path.join(path, "cur" if ":" in name else "new", name), "wb") as file:
                file.write(content)
        talk = self.session("C: STAT\nS: +OK 8")
        for line in talk.listing("UIDL").decode().splitlines():
            number, uid = line.split()
            name = next((name for name in contents if name.startswith(uid)), None)
            if name:
                expected = end_line(re.sub(rb"(?<!\r)\n", b"\r\n", contents[name]))
                size = int(talk.ask("LIST " + number).split()[2])
                self.assertTrue(talk.listing("RETR " + number) == expected, name)
                self.assertEqual(size, len(expected), name)

    def test_poplib_agrees(self):
        with contextlib.closing(poplib.POP3(*self.node_.pop3_address, timeout=PATIENCE)) as pop:
            self.assertIn("UIDL", pop.capa())
            pop.user("bob@x")
            pop.pass_("x")
            self.assertEqual(pop.stat(), (3, sum(self.sizes)))
            self.assertEqual(pop.uidl()[1], [b"%d %s" % (n, uid.encode()) for n, uid in enumerate(self.uids, 1)])
            message = email.message_from_bytes(b"\r\n".join(pop.retr(1)[1] + [b""]))
            self.assertEqual((message["Subject"], message.get_payload()), ("one", "1\r\n.2\r\n3\r\n"))
            pop.dele(1)
            pop.quit()
        self.assertEqual(len(self.fetch(self.node_, "bob@x")), 2)

    def test_opening_a_mailbox_opens_no_message(self):
        new = os.path.join(self.node_.stores.mailboxes.path("many@x"), "new")
        os.makedirs(new)
        os.mkdir(os.path.join(os.path.dirname(new), "cur"))
        names = ["%d.6b05e7a7-15e4c-c921a5cf%x.h,S=100,W=103" % (1e9 + i, i) for i in range(10_000)]
        opened = []

        def note(function):
            return lambda path, *a, **k: (opened.append(str(path)), function(path, *a, **k))[1]
        real = os.scandir                           # the files are not even there: to look at one of them would fail
        entries = contextlib.nullcontext([types.SimpleNamespace(name=name) for name in names])
        with mock.patch.object(os, "scandir", lambda path=".": entries if path == new else real(path)), \
                mock.patch.object(os, "open", note(os.open)), mock.patch.object(builtins, "open", note(open)):
            talk = self.session("C: STAT\nS: +OK 10000 1030000", user="many@x")
            self.assertEqual(len(talk.listing("LIST").splitlines()), 10_000)
            self.assertEqual(len(talk.listing("UIDL").splitlines()), 10_000)
        self.assertEqual([path for path in opened if "/new/" in path or "/cur/" in path], [])


# ======================================================================================================================
# 17  Node
# ======================================================================================================================

class Nodes(Case):
    def test_the_example_of_the_documentation(self):
        with minimail.Node(smtp="127.0.0.1:0", pop3=self.OPTIONS["pop3"]) as node:
            host, port = node.smtp_address
            with smtplib.SMTP(host, port, timeout=PATIENCE) as client:
                client.sendmail("a@example.net", ["bob@example.com", "eve@example.com"], "Subject: hi\n\nhello\n")
            message = node.wait_for("bob@example.com", timeout=PATIENCE)
            self.assertEqual(message.email()["Subject"], "hi")
            self.assertEqual(message.email().get_content().strip(), "hello")
            self.assertEqual((message.recipient, message.sender), ("bob@example.com", "a@example.net"))
            self.assertEqual(sorted(message.recipients), ["bob@example.com", "eve@example.com"][:1 + ("transcripts" in SECTIONS)])
            self.assertEqual(message.read(), open_and_read(message.path))
            self.assertEqual(message.size, len(message.read()))
            self.assertLess(abs(datetime.datetime.now(datetime.timezone.utc) - message.received_at),
                            datetime.timedelta(seconds=PATIENCE))
            if HAS_POP3:
                self.dialog(node.pop3_address, "S: +OK\nC: USER bob@example.com\nS: +OK\nC: PASS x\nS: +OK\nC: UIDL 1\nS: +OK 1 "
                            + message.uid)
            self.assertEqual([m.recipient for m in node.messages()], ["eve@example.com", "bob@example.com"][::-1])
            message.delete()
            self.assertEqual([m.recipient for m in node.messages()], ["eve@example.com"])
            node.clear()
            self.assertEqual(node.messages(), [])
            data = node.data
            self.assertTrue(os.path.isdir(data))
        self.assertFalse(os.path.exists(data), "a temporary directory is gone at the end")

    def test_what_goes_wrong_after_the_250_is_no_answer(self):
        node = self.node(keep=1)
        with mock.patch.object(node.stores.mailboxes, "prune", side_effect=PermissionError(1, "no")), \
                self.assertLogs("minimail", "WARNING") as logs:
            self.dialog(node.smtp_address, """\
                S: 220
                C: HELO client.test
                C: MAIL FROM:<a@x.example>
                C: RCPT TO:<bob@x.example>
                C: DATA
                S: 250
                S: 250
                S: 250
                S: 354
                C: .
                C: NOOP
                C: QUIT
                S: 250 2.0.0 accepted
                S: 250 2.0.0 ok
                S: 221
                S: closed
                """)
        self.assertIn("keeps too much", logs.output[0])
        self.assertEqual(len(node.messages()), 1)

    def test_no_thread_for_the_loop(self):
        temporary, before = self.directory(), open_files()
        real = threading.Thread.start

        def start(thread):
            if thread.name == "minimail-loop":
                raise RuntimeError("can't start new thread")
            real(thread)
        node = minimail.Node(**self.OPTIONS)
        with mock.patch.object(threading.Thread, "start", start), mock.patch.object(tempfile, "tempdir", temporary), \
                self.assertRaisesRegex(RuntimeError, "can't start new thread"):
            node.start()
        self.assertEqual((node.endpoints(), os.listdir(temporary)), ([], []))
        del node
        self.assertNoMoreOpen(before)

    def test_what_the_api_takes_is_followed_up_too(self):
        seen = []
        node = self.node(on_message=lambda message: seen.append(message.id), keep=1, web="127.0.0.1:0")
        ids = []
        for _ in range(2):
            body = json.dumps({"From": {"Email": "a@x.example"}, "To": [{"Email": "bob@x.example"}]}).encode()
            with contextlib.closing(http.client.HTTPConnection(*node.web_address, timeout=PATIENCE)) as connection:
                connection.request("POST", "/api/v1/send", body)
                ids.append(json.loads(connection.getresponse().read())["ID"])
        self.assertEqual(seen, ids)
        self.assertEqual([message.id for message in node.messages()], ids[1:])

    def test_addresses(self):
        node = self.node(pop3="off")
        self.assertEqual(node.smtps_address, None)
        self.assertEqual([getattr(node, name + "_address") for name in ("pop3", "pop3s") * HAS_POP3 + ("web",) * HAS_WEB if name],
                         [None] * (2 * HAS_POP3 + HAS_WEB))
        self.assertGreater(node.smtp_address[1], 0)
        node = self.node(smtp=["127.0.0.1:0", "127.0.0.1:0"])
        self.assertEqual([name for name, _ in node.endpoints()], ["smtp", "smtp", "pop3"][:2 + HAS_POP3])
        if socket.has_ipv6:
            try:
                node = self.node(smtp="[::1]:0")
            except OSError:
                self.skipTest("no IPv6 here")
            self.assertEqual(node.smtp_address[0], "::1")
            self.deliver(node, b"x\r\n", "bob@x")
            self.assertIn(b"([IPv6:::1])", node.wait_for("bob@x").read())

    def test_start_and_stop_twice(self):
        node = self.node(data=self.directory())
        address = node.smtp_address
        node.start()
        self.assertEqual(node.smtp_address, address)
        self.deliver(node, b"x\r\n", "bob@x")
        node.stop()
        node.stop()
        self.assertIsNone(node.smtp_address)
        self.assertRaises(RuntimeError, node.messages)
        node.start()
        self.assertEqual(len(node.messages("bob@x")), 1, "what was stored is there after a restart")

    def test_wrong_arguments(self):
        with self.assertRaises(TypeError) as caught:
            minimail.Node(smpt="127.0.0.1:0")
        self.assertIn("smpt", str(caught.exception))
        for name, value in (("smtp", 25), ("max_size", "x"), ("domain", 7), ("workers", 2), ("timeout", -1), ("data", ""),
                            ("retry", [])):
            with self.assertRaises((TypeError, ValueError)) as caught:
                minimail.Node(**{name: value})
            self.assertIn(name, str(caught.exception))
        node = self.node()
        self.assertEqual(node.site.loop.crew.size, minimail.MAX_HELPERS)
        with self.assertRaises(OSError) as caught:
            minimail.Node(smtp=["127.0.0.1:0", "%s:%d" % node.smtp_address]).start()
        self.assertIn(str(node.smtp_address[1]), str(caught.exception))
        self.eventually(lambda: {thread.name for thread in our_threads()} <= {"minimail-loop", "minimail-helper"})
        self.assertEqual([thread.name for thread in our_threads()].count("minimail-loop"), 1)
        with self.assertRaises(OSError) as caught:
            minimail.Node(smtp="127.0.0.1:0", pop3="off", data=self.file("f", b"")).start()
        self.assertRaises(ValueError, node.messages, "no address")
        self.assertRaises(ValueError, node.wait_for, "no address")

    def test_wait_for(self):
        node = self.node()
        with self.assertRaises(TimeoutError) as caught:
            node.wait_for("bob@x", timeout=0.01)
        self.assertIn("bob@x", str(caught.exception))
        first = self.in_background(node.wait_for, "bob@x", timeout=PATIENCE)
        two = self.in_background(node.wait_for, "BOB@X", timeout=PATIENCE, count=2)
        any_one = self.in_background(node.wait_for, timeout=PATIENCE)
        match = self.in_background(node.wait_for, None, timeout=PATIENCE, match=lambda message: message.email()["Subject"] == "2")
        self.deliver(node, b"Subject: 0\r\n", "other@x")
        self.assertEqual(any_one().recipient, "other@x")
        self.deliver(node, b"Subject: 1\r\n", "bob@x")
        self.assertEqual(first().email()["Subject"], "1")
        self.deliver(node, b"Subject: 2\r\n", "bob@x")
        self.assertEqual([message.email()["Subject"] for message in two()], ["1", "2"])
        self.assertEqual(match().uid, node.messages("bob@x")[1].uid)
        self.assertEqual(node.wait_for("bob@x", timeout=0).email()["Subject"], "1", "also what came before; the oldest")
        with self.assertRaises(TimeoutError):
            node.wait_for("bob@x", timeout=0.01, count=3)

    def test_wait_for_mail_that_another_node_delivers(self):
        here = self.node(data=self.directory())
        there = self.node(data=here.data)
        waiting = self.in_background(here.wait_for, "bob@x", timeout=PATIENCE)
        self.deliver(there, b"x\r\n", "bob@x")
        self.assertEqual(waiting().size, there.messages("bob@x")[0].size)

    def test_on_message(self):
        seen, may_go_on = [], threading.Event()

        def on_message(message):
            self.assertTrue(may_go_on.wait(PATIENCE), "the client has its 250 before this is over")
            seen.append((message.sender, message.recipients, message.email()["Subject"], len(node.messages())))
            if len(seen) == 1:
                raise RuntimeError("a bug of the user's")
        node = self.node(on_message=on_message)
        with self.assertLogs("minimail", "ERROR"):
            self.deliver(node, b"Subject: x\r\n", "a@x", "b@x", "c@y")
            may_go_on.set()
            self.eventually(lambda: seen)
            self.deliver(node, b"Subject: y\r\n", "a@x")
            self.eventually(lambda: len(seen) == 2)
        self.assertEqual(seen, [("alice@example.net", ["a@x", "b@x", "c@y"], "x", 3), ("alice@example.net", ["a@x"], "y", 4)])

    def test_keep(self):
        node = self.node(keep=2)
        for i in range(5):
            self.deliver(node, b"Subject: %d\r\n" % i, "bob@x")
        self.eventually(lambda: len(node.messages("bob@x")) == 2)
        self.assertEqual([message.email()["Subject"] for message in node.messages("bob@x")], ["3", "4"])

    def test_stop_says_goodbye(self):
        node = self.node()
        smtp, pop3 = self.talk(node.smtp_address), self.dialog(node.pop3_address, "S: +OK") if HAS_POP3 else None
        started = time.monotonic()
        node.stop()
        self.assertLess(time.monotonic() - started, 5)
        self.assertTrue(smtp.reply().startswith("421 4.3.2"))
        self.assertEqual([talk.reply() for talk in (smtp, pop3) if talk], ["closed"] * (1 + HAS_POP3))

    def test_a_message_in_flight_is_finished(self):
        node = self.node(data=self.directory())
        talk = self.talk(node.smtp_address)
        self.dialog(talk, envelope())
        stopped = self.in_background(node.stop)
        self.eventually(lambda: node.site is None or node.site.stopping)
        self.dialog(talk, "C: x\nC: .\nS: 250 2.0.0\nS: 421 4.3.2\nS: closed")
        stopped()
        node.start()
        self.assertEqual(len(node.messages("b@x")), 1)

    def test_who_is_stuck_in_a_message_is_told_at_the_end(self):
        with mock.patch.object(minimail, "SHUTDOWN_GRACE", 0.3):
            node = self.node(data=self.directory())
            talks = [self.talk(node.smtp_address) for _ in range(3)]
            for talk, begun in zip(talks, ("C: DATA\nS: 354\nC: half", "C: BDAT 1000", "C: AUTH PLAIN\nS: 334")):
                hello = "" if "AUTH" in begun else "C: MAIL FROM:<a@x>\nS: 250\nC: RCPT TO:<b@x>\nS: 250\n"
                self.dialog(talk, hello + begun)
                talk.send(begun.rpartition("C: ")[2] + "\r\n" if "AUTH" not in begun else "")
            started = time.monotonic()
            node.stop()
            self.assertLess(time.monotonic() - started, 5)
        for talk in talks:
            self.assertTrue(talk.reply().startswith("421 4.3.2"))
            self.assertEqual(talk.reply(), "closed")
        self.assertNothingLeft(node.config.data)

    def test_the_end_while_many_log_in(self):
        """Password hashing that nobody waits for any more is not done."""
        checking, may_go_on = threading.Event(), threading.Event()
        node = self.node({"bob@example.org": "right"}, domain="example.org")

        def check(password, record):
            checking.set()
            return may_go_on.wait(PATIENCE) and False
        with mock.patch.object(minimail, "check_password", side_effect=check) as checks:
            talks = [self.talk(node.smtp_address) for _ in range(30)]
            for talk in talks:
                talk.send("AUTH PLAIN %s\r\n" % plain("bob@example.org", "wrong"))
            self.assertTrue(checking.wait(PATIENCE))
            begun = checks.call_count
            talks.pop().close()
            with self.assertLogs("minimail", "WARNING") as logs:
                minimail.log.warning("nothing else")
                stopped = self.in_background(node.stop)
                self.eventually(lambda: node.site is None or node.site.stopping)
                may_go_on.set()
                stopped()
        self.assertEqual(len(logs.records), 1, logs.output)
        self.assertLessEqual(checks.call_count, begun + node_threads())
        for talk in talks:
            self.assertRegex(talk.reply(), "421|535|closed")

    def test_more_than_so_many_guesses_at_once_are_not_even_checked(self):
        node = self.node({"bob@example.org": "right"}, domain="example.org")
        node.throttle.delay = lambda client: 0.0
        talks = [self.talk(node.smtp_address) for _ in range(25)]
        with mock.patch.object(minimail, "check_password", side_effect=lambda password, record: False) as checks:
            for talk in talks:
                talk.send("AUTH PLAIN %s\r\n" % plain("bob@example.org", "wrong"))
            answers = [talk.reply()[:3] for talk in talks]
        self.assertEqual(checks.call_count, minimail.LOGIN_FAILURES)
        self.assertEqual((answers.count("535"), answers.count("421")), (10, 15), "who is not looked at is told so")

    def test_several_nodes_and_many_clients(self):
        nodes = [self.node() for _ in range(3)]
        clients = [self.in_background(lambda node: [self.deliver(node, b"x\r\n", "bob@x") for _ in range(10)], node)
                   for node in nodes for _ in range(8)]
        ids = [id for client in clients for id in client()]
        self.assertEqual(len(set(ids)), 240)
        for node in nodes:
            messages = node.messages("bob@x")
            self.assertEqual(len(messages), 80)
            self.assertLessEqual({message.id for message in messages}, set(ids))

    def test_the_library_prints_nothing(self):
        code = """if True:
            import minimail, smtplib
            with minimail.Node(smtp="127.0.0.1:0", pop3="off") as node:
                with smtplib.SMTP(*node.smtp_address) as client:
                    client.sendmail("a@x", ["b@x"], "hi")
                    client.docmd("NONSENSE")
                node.wait_for("b@x")
            """
        self.assertEqual(run_python("-c", code, cwd=COMPILED.name).stdout, b"")

    def test_import_has_no_side_effects(self):
        directory = self.directory()
        code = """if True:
            import sys, threading, logging, signal, os
            sys.path.insert(0, %r)
            state = lambda: (signal.getsignal(signal.SIGTERM), threading.active_count(), list(logging.getLogger().handlers),
                             os.listdir("."))
            before = state()
            import minimail
            assert before == state()
            assert set(minimail.__all__) <= set(dir(minimail))
            slow = {"base64", "dataclasses", "datetime", "email", "hashlib", "hmac", "http.server", "inspect", "random", "shutil",
                    "ssl", "tempfile", "typing", "urllib.parse"}
            assert not slow & set(sys.modules), slow & set(sys.modules)
            """ % COMPILED.name
        self.assertEqual(run_python("-BS", "-c", code, cwd=directory).stdout, b"")


class OtherSelectors(Case):
    """Where the system has no epoll: the same loop on poll and on select."""

    def each(self):
        """Yield, for each selector, with nodes that use it."""
        for selector in SELECTORS[1:]:
            with self.subTest(selector.__name__), \
                    mock.patch.object(minimail, "Loop", functools.partial(minimail.Loop, selector=selector)):
                yield

    def test_send_and_fetch(self):
        content = b"Subject: x\r\n\r\n.\r\n" + b"y" * 300_000 + b"\r\n"
        for _ in self.each():
            node = self.node()
            self.dialog(self.talk(node.smtp_address), "C: MAIL FROM:<a@x>\nC: RCPT TO:<b@x>\nC: DATA\nC: one\nC: .\nC: NOOP\nC: QUIT\n"
                        "S: 250\nS: 250\nS: 354\nS: 250 2.0.0\nS: 250\nS: 221\nS: closed")
            self.deliver(node, content, "b@x")
            self.assertEqual(body_of(node.wait_for("b@x", count=2)[1].read()), content)
            if HAS_POP3:
                self.assertEqual([body_of(message) for message in self.fetch(node, "b@x")], [b"one\r\n", content])
            talks = [self.talk(node.smtp_address) for _ in range(50)]
            for talk in talks:
                self.dialog(talk, letter(recipient="many@x"))
            self.assertEqual(len(node.messages("many@x")), 50)
            node.stop()

    def test_deadline_and_stop(self):
        for _ in self.each():
            node = self.node(timeout=0.3)
            self.dialog(node.smtp_address, "S: 220\nS: 421 4.4.2\nS: closed")
            if HAS_POP3:
                self.dialog(node.pop3_address, "S: +OK\nS: closed")
            self.check_goodbye()

    def check_goodbye(self):
        node = self.node()
        smtp, pop3 = self.talk(node.smtp_address), self.dialog(node.pop3_address, "S: +OK") if HAS_POP3 else None
        node.stop()
        self.assertTrue(smtp.reply().startswith("421 4.3.2"))
        self.assertEqual([talk.reply() for talk in (smtp, pop3) if talk], ["closed"] * (1 + HAS_POP3))

    @unittest.skipUnless(ssl, "this Python has no ssl")
    def test_tls(self):
        for _ in self.each():
            node = self.node(tls_cert=self.file("cert.pem", CERTIFICATE), smtps="127.0.0.1:0")
            talk = self.dialog(self.talk(node.smtp_address), "C: STARTTLS\nS: 220")
            talk.start_tls()
            self.dialog(talk, "C: EHLO x\nS: 250\n" + letter())
            talk = self.talk(node.smtps_address, hello=False).start_tls()
            self.dialog(talk, "S: 220\nC: EHLO x\nS: 250\n" + letter("y" * 100_000))


# ======================================================================================================================
# 18  Reading mail.  Pure, on bytes; tables where the tests differ in data only
# ======================================================================================================================

def mime(*parts, kind=b"mixed", boundary=b"b"):
    """Return a multipart message of parts, each header and body."""
    return (b'Content-Type: multipart/' + kind + b'; boundary="' + boundary + b'"\r\n\r\n'
            + b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n")


TEXT_PART = b"Content-Type: text/plain\r\n\r\nbody"
PNG_START = b"\x89PNG\r\n\x1a\n"


class ReadingAddresses(Case):
    TABLE = (
        ("a@x, b@y", "a@x", "b@y"), ("a@x; b@y;", "a@x", "b@y"), ("a@x,,", "a@x"), ("", ), (", ;", ),
        ("a@x b@y", "a@x", "b@y"), ("<a@x> <b@y>", "a@x", "b@y"), ("root", "root"), ("mailto:a@x", "a@x"),
        ("Bob [IT] <b@x>", "Bob [IT]|b@x"), ("a@x <a@x>", "a@x|a@x"), ("shop@s.example <no@m.example>", "shop@s.example|no@m.example"),
        ('"Doe, J." <j@x>', "Doe, J.|j@x"), (r'"a\"b" <c@d>', 'a"b|c@d'), ('O"Brien <b@x>, c@y', 'O"Brien|b@x', "c@y"),
        ("b@x (Bob (the) S)", "Bob (the) S|b@x"), ("<b@x> (Bob)", "Bob|b@x"), ("Bob (the boss <b@x>", "Bob (the boss|b@x"),
        ("Bob bob@x", "Bob|bob@x"), ("bob @ example.org", "bob@example.org"), ("<<a@x>>", "a@x"), ("<a@x, <b@y>", "a@x", "b@y"),
        ("undisclosed-recipients:;", ), ('G: a@x, "B, C" <b@y>; c@z', "a@x", "B, C|b@y", "c@z"), ("Undisclosed recipients", "Undisclosed recipients|"),
        ('"john doe"@x.org', '"john doe"@x.org'), ('<"a>b"@x>', '"a>b"@x'), ("<@r,@s:u@x>", "u@x"), ("M <>", "M|"),
        ("u@[127.0.0.1], v@[IPv6:::1]", "u@[127.0.0.1]", "v@[IPv6:::1]"), ("=?utf-8?Q?Doe,_J?= <j@x>", "=?utf-8?Q?Doe,_J?=|j@x"),
        ("J\u00fcrgen <j@b\u00fccher.example>", "J\u00fcrgen|j@b\u00fccher.example"), ("a@x\r\n", "a@x"),
        ("jdoe@test   . example", "jdoe@test.example"),
        ("Pete <pete(his account)@silly.test(his host)>", "Pete|pete@silly.test"),
        ("Chris Jones <c@(Chris's host.)public.example>", "Chris Jones|c@public.example"))

    def test_as_people_write_them(self):
        for text, *expected in self.TABLE:
            with self.subTest(text=text):
                found = [name + "|" * bool(name) + address for name, address in minimail.read_addresses(text)]
                self.assertEqual(found, expected)

    def test_a_comma_in_an_author_that_nobody_quoted(self):
        for text, *expected in (
                ("Acme, Inc. <i@x>", ("Acme, Inc.", "i@x")), ("Acme Corp, Inc, U.S. <i@x>", ("Acme Corp, Inc, U.S.", "i@x")),
                ("a@x, Acme, Inc. <i@x>, b@x", ("", "a@x"), ("Acme, Inc.", "i@x"), ("", "b@x")), ("Acme, i@x", ("", "Acme"), ("", "i@x")),
                ("root", ("", "root")), ("root, <i@x>", ("", "root"), ("", "i@x")), ("root, Acme Corp", ("", "root"), ("Acme Corp", "")),
                ("=?utf-8?q?D=C3=B6e?=, =?utf-8?q?J=2E?= <i@x>", ("D\u00f6e, J.", "i@x")),
                ("=?utf-8?q?D=C3=B6e=2C_J=2E_=3Ci=40x=3E?=", ("D\u00f6e, J.", "i@x"))):
            for header in ("From: ", "Reply-To: "):
                found = minimail.View((header + text + "\r\n\r\n").encode()).addresses(header.lower()[:-2])
                self.assertEqual([(person["Name"], person["Address"]) for person in found], expected, text)
        found = minimail.View(b"To: bob, Alice <a@x>\r\n\r\n").addresses("to")
        self.assertEqual([person["Address"] for person in found], ["bob", "a@x"])

    def test_thousands(self):
        text = ", ".join('"Doe, %d" <u%d@x.example>' % (i, i) for i in range(5000))
        found = minimail.View(b"To: " + text.encode() + b"\r\n\r\n").addresses("to")
        self.assertEqual((len(found), found[4999]), (5000, {"Name": "Doe, 4999", "Address": "u4999@x.example"}))

    def test_what_is_cut_says_so(self):
        found = minimail.View(b"To: " + b"a@b," * 20000 + b"\r\n\r\n").addresses("to")
        self.assertEqual((len(found), found[-1]), (minimail.MAX_ADDRESSES + 1, {"Name": "... and 10000 more", "Address": ""}))
        found = minimail.View(b"To: " + b"x" * 5000 + b"@b\r\n\r\n").addresses("to")
        self.assertTrue(found[0]["Address"].endswith("... (cut)"))

    def test_several_headers_of_a_name(self):
        view = minimail.View(b"To: a@x\r\nto : b@y\r\nSubject: s\r\n\r\n")
        self.assertEqual([person["Address"] for person in view.addresses("to")], ["a@x", "b@y"])

    def test_an_address_encoded_along_with_its_name(self):
        found = minimail.View(b"From: =?utf-8?B?w6kgPGFAYi5leGFtcGxlPg==?=\r\n\r\n").addresses("from")
        self.assertEqual(found, [{"Name": "\u00e9", "Address": "a@b.example"}])

    def test_spellings_of_one(self):
        for one, other in (('"bob"@x.example', "bob@X.example"), ("j@b\u00fccher.example", "j@xn--bcher-kva.example"),
                           ("BOB@x.example.", "bob@x.example"), ("u@[127.0.0.1]", "U@[127.0.0.1]"), ("no address", "NO ADDRESS")):
            self.assertEqual(minimail.same_address(one), minimail.same_address(other))
        self.assertNotEqual(minimail.same_address("a@x"), minimail.same_address("a@y"))


class ReadingHeaders(Case):
    def test_encoded_words(self):
        for raw, text in (
                (b"=?utf-8?q?caf=C3=A9?= =?x-bogus?q?abc?=", "caf\u00e9 =?x-bogus?q?abc?="),
                (b"=?utf-8?b?4oI=?= =?UTF-8?b?rA==?=", "\u20ac"), (b"=?utf-8*en?q?=C3=BC?=", "\u00fc"),
                (b"=?utf-8?q?a?= b =?utf-8?q?c?=", "a b c"), (b"=?utf-8?q?a?=\r\n =?koi8-r?q?=C1?=", "a\u0430"),
                (b"=?utf-8?q?what??=", "what?"), (b"=?utf-8?q?a b?=", "a b"),
                (b"a  b", "a  b"), ("a\u00a0\u3000b".encode(), "a\u00a0\u3000b"), (b"a\r\n\t b", "a b"), (b"\xfcber", "\u00fcber"),
                (b"=?iso-8859-1?q?=80?=", "\u20ac"), (b"=?utf-8?q?a=0D=0Ab?=", "a b"), (b"=?punycode?q?a-b?=", "=?punycode?q?a-b?="),
                (b"=?us-ascii?q?x?=", "x"), (b"=?utf-8?x?a?=", "=?utf-8?x?a?="), (b"=?utf-8?b?%%%?=", "=?utf-8?b?%%%?="),
                (b"=?csASCII?q?x?=", "x"), (b"=?ISO646-US?q?x?=", "x"), (b"=?unknown-8bit?q?=C3=BC?=", "\u00fc"),
                (b"=?rot13?q?a?=", "=?rot13?q?a?="), (b"=?zlib?q?a?=", "=?zlib?q?a?="), (b"=?idna?q?a?=", "=?idna?q?a?=")):
            self.assertEqual(minimail.decode_words(raw), text, raw)

    def test_parameters(self):
        for text, value, parameters in (
                ("text/plain; charset=utf-8", "text/plain", {"charset": "utf-8"}),
                ("TEXT/Plain charset=utf-8 format=flowed", "text/plain", {"charset": "utf-8", "format": "flowed"}),
                ("text/plain (a; comment); charset=us-ascii (Plain text); x=y", "text/plain", {"charset": "us-ascii", "x": "y"}),
                ("a; name=my file (2).txt; size=3", "a", {"name": "my file (2).txt", "size": "3"}),
                (r'a; filename="C:\dir\"x\".txt"', "a", {"filename": r'C:\dir"x".txt'}),
                ("a; filename=plain; filename*=utf-8'de'%C3%BC", "a", {"filename": "\u00fc"}),
                ("a; n*0*=utf-8''%C3; n*2=b; n*1*=%BC", "a", {"n": "\u00fcb"}), ("a; n*0=a; n*1=b", "a", {"n": "ab"}),
                ("a; nonsense; b=c", "a", {"b": "c"}), ('a; b="open', "a", {"b": "open"}), ("", "", {}), (";;;", "", {}),
                ("a; n*=x'y", "a", {"n": "x'y"}), ("filename=x.txt", "", {"filename": "x.txt"}), ("a; n*99999999=x", "a", {"n*99999999": "x"}),
                ('a; name=""V047411.rtf".rtf"', "a", {"name": '"V047411.rtf".rtf'}),
                ('a; n="a "b" c.rtf"; x=y', "a", {"n": 'a "b" c.rtf', "x": "y"}),
                ("a; n*0*=euc-kr''%C6%C4; n*1*=euc-kr''%C0%CF", "a", {"n": "\ud30c\uc77c"}),
                ("a; n*0*=utf-8''data%2; n*1*=4.csv", "a", {"n": "data$.csv"})):
            self.assertEqual(minimail.read_parameters(text), (value, parameters), text)

    def test_dates_have_a_zone(self):
        for text, expected in (
                ("Thu, 26 Nov 2026 10:00:00 +0130", "2026-11-26T10:00:00+01:30"), ("Thu, 26 Nov 2026 10:00:00 -0000", "2026-11-26T10:00:00+00:00"),
                ("26 Nov 2026 10:00", "2026-11-26T10:00:00+00:00"), ("Thu, 10 Jul 1997 14:53:31 EST", "1997-07-10T14:53:31-05:00"),
                ("Thu, 10 Jul 1997 14:53:31 EST5EDT", "1997-07-10T14:53:31+00:00"), ("yesterday", "default"), ("", "default"),
                ("Thu, 26 Nov 2026 10:00:00 +9999999999", "default"), ("1 Jan 99999999999 00:00:00 +0000", "default"),
                ("Thu, 26 Nov 2026 10:00:00 +01:00", "2026-11-26T10:00:00+01:00"),
                ("Thu, 26 Nov 2026 10:00:00 GMT+0100", "2026-11-26T10:00:00+01:00"),
                ("Thu, 26 Nov 2026 10:00:00 GMT +0100", "2026-11-26T10:00:00+01:00"),
                ("31 Dec 2016 23:59:60 +0000", "2016-12-31T23:59:59+00:00")):
            self.assertEqual(minimail.View(b"Date: " + text.encode() + b"\r\n\r\n").date("default"), expected, text)

    def test_where_the_body_begins(self):
        for raw, names, text in (
                (b"A: 1\r\nnot a field\r\nB : 2\r\n\r\nbody", ["a", "b"], "body"), (b"hello\r\nworld", [], "hello\r\nworld"),
                (b"A: 1\r\nhello\r\n\r\nworld", ["a"], "hello\r\n\r\nworld"), (b"A: 1\n\nbody", ["a"], "body"), (b"\r\nbody", [], "body"),
                (b"A: 1", ["a"], ""), (b"", [], ""), (b"From x\nA: 1\n b\n\nbody\n", ["a"], "body\n"),
                (b"A: 1\r\n" + b"line\r\n" * 5000, ["a"], "line\r\n" * 5000)):
            view = minimail.View(raw)
            self.assertEqual(([name for name, _ in view.fields], view.text), (names, text), raw[:50])

    def test_long_ones_are_cut_and_say_so(self):
        view = minimail.View(b"X: y\r\n" * 5000 + b"\r\nbody")
        self.assertEqual((len(view.fields), view.text, len(view.cut)), (minimail.MAX_FIELDS, "body", 1))
        view = minimail.View(b"X: " + b"y" * 2 * minimail.MAX_FIELD + b"\r\nSubject: s\r\n\r\nbody")
        self.assertEqual((view.header("subject"), view.header("x")[-5:], view.text), ("s", "(cut)", "body"))

    def test_unsubscribe(self):
        view = minimail.View(b"List-Unsubscribe: (a) <https://x.example/u?a=1>,\r\n <mailto:u@x.example>\r\n"
                             b"List-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n\r\n")
        self.assertEqual(view.unsubscribe(), {"Header": "(a) <https://x.example/u?a=1>, <mailto:u@x.example>", "Errors": "",
                                              "Links": ["https://x.example/u?a=1", "mailto:u@x.example"],
                                              "HeaderPost": "List-Unsubscribe=One-Click"})
        self.assertTrue(minimail.View(b"List-Unsubscribe: nowhere\r\n\r\n").unsubscribe()["Errors"])
        self.assertTrue(minimail.View(b"List-Unsubscribe: <javascript:x>\r\n\r\n").unsubscribe()["Errors"])
        self.assertEqual(minimail.View(b"\r\n").unsubscribe(), {"Header": "", "Links": [], "Errors": "", "HeaderPost": ""})


class ReadingCharsets(Case):
    def test_the_one_that_is_meant(self):
        for charset, data, text in (
                ("iso-8859-1", b"\x80\x93", "\u20ac\u201c"), ("ks_c_5601-1987", "\ub620".encode("cp949"), "\ub620"),
                ("gb2312", "\u9555\u56cd".encode("gb18030"), "\u9555\u56cd"), ("big5", "\u7881".encode("cp950"), "\u7881"),
                ("Shift_JIS", "\u2460\u9ad9".encode("cp932"), "\u2460\u9ad9"), ("x-sjis", "\u65e5".encode("cp932"), "\u65e5"),
                ("iso-2022-jp", b"\x1b$B-!F|K\\\x1b(B ok", "\u2460\u65e5\u672c ok"), ("iso-2022-jp", b"\x1b$B|b\x1b(B", "\u9ad9"),
                ("x-windows-iso2022jp", b"\x1b$B-!F|\x1b(B", "\u2460\u65e5"),
                ("iso-2022-jp", b"\x1b(I1\x1b(B\r\n", "\uff71\r\n"), ("windows-874", "\u0e2a".encode("cp874"), "\u0e2a"),
                ("TIS-620", "\u0e2a".encode("cp874"), "\u0e2a"), ("iso-8859-8-i", "\u05e9".encode("iso8859-8"), "\u05e9"),
                ("ISO_8859-1:1987", b"\xfc", "\u00fc"), ("latin1", b"\xfc", "\u00fc"), ("iso-8859-15", b"\xa4", "\u20ac"),
                ("utf-8", "caf\u00e9".encode() + b"\xe9", "caf\u00e9\ufffd"), ("utf-8", b"caf\xe9", "caf\u00e9"), ("", b"caf\xe9", "caf\u00e9"),
                ("us-ascii", "\u00fc".encode(), "\u00fc"), ("nonsense", "\u00fc".encode(), "\u00fc"), ("utf-8", b"\xef\xbb\xbfx", "x"),
                ("utf-16", "\u00fcx".encode("utf-16"), "\u00fcx"), ("utf-16be", "\u00fc".encode("utf-16-be"), "\u00fc"),
                ("utf-7", b"+2AA-x", "?x"), ("hz-gb-2312", b"~{VPND~}", "\u4e2d\u6587"), ("koi8-r", b"\xc1", "\u0430"),
                ("cp1250", b"\xea", "\u0119"), ("windows-1251", b"\xe0\x98", "\u0430\ufffd"), ("euc-jp", b"\xad\xa1", "\u2460"),
                ("iso-2022-jp-3", b"\x1b$(Q-!\x1b(B", "\u2460"), ("iso-2022-jp-2", b"\x1b$(C0!\x1b(B", "\uac00"),
                ("iso-2022-jp-2", b"\x1b$AVP\x1b(B", "\u4e2d"), ("MS950", "\u7881".encode("cp950"), "\u7881"),
                ("x-windows-949", "\ub620".encode("cp949"), "\ub620"), ("cp819", b"\xc3\xbc", "\u00c3\u00bc"),
                ("iso-ir-100", b"\xc3\xbc", "\u00c3\u00bc"), ("", "Preis: 5 \u20ac".encode()[:-1], "Preis: 5 \ufffd"),
                ("", b"It\x92s", "It\u2019s"), ("iso-2022-jp-2004", b"\x1b$(Q-!\x1b(B", "\u2460")):
            self.assertEqual(minimail.decode_text(data, charset), text, (charset, data))

    def test_only_those_that_mail_uses(self):
        for charset in ("punycode", "idna", "rot13", "hex", "zlib", "base64", "unicode_escape", "undefined", "mbcs", "a\0b", "x" * 10000):
            self.assertEqual(minimail.find_codecs(charset), (), charset)
        for codecs in set(minimail.CODECS.values()):
            for codec in codecs:
                self.assertIsInstance(b"abcd".decode(codec, "replace"), str)

    def test_html_says_it_itself(self):
        for head, data, text in ((b"", b"<meta charset=koi8-r><p>\xc1", "\u0430"), (b"; charset=koi8-r", b"<meta charset=utf-8><p>\xc1", "\u0430"),
                                 (b"; charset=nonsense", b"<META http-equiv=Content-Type content='text/html; charset=koi8-r'><p>\xc1", "\u0430"),
                                 (b"", "<meta charset=utf-16><p>\u00fc".encode(), "\u00fc")):
            self.assertEqual(minimail.View(b"Content-Type: text/html" + head + b"\r\n\r\n" + data).html[-1], text)


class ReadingParts(Case):
    def test_transfer_encodings(self):
        for encoding, data, expected in (
                (b"base64 ", b"aGVsbG8=", b"hello"), (b"base64 (as always)", b"aGVs\r\nbG8=", b"hello"), (b"\r\n BASE64", b"aGVsbG8", b"hello"),
                (b'"base64"', b"aGVsbG8=", b"hello"), (b"base64;", b"aGVsbG8=", b"hello"), (b"base64", b"aGk=aGk=\r\naA==aGVs", b"hihihhel"),
                (b"base64", b"aGVsA", b"hel"), (b"base64", b"a!G%V s", b"hel"), (b"base64", b"", b""), (b"base64", b"====", b""),
                (b"quoted-printable", b"a=3Db=\r\nc= \r\nd =XX=", b"a=bcd =XX"), (b"Quoted-Printable (x)", b"=C3=BC", b"\xc3\xbc"),
                (b"quoted-printable", b"=C3=\r\n=BC =0=\n9=\r\n= \r\n=4=\r\n1", b"\xc3\xbc \tA"),
                (b"x-uuencode", b"begin 644 x\r\n%:&5L;&\\\r\n`\r\nend\r\n", b"hello"), (b"x-uuencode", b"no such thing", b"no such thing"),
                (b"8bit", b"\xff", b"\xff"), (b"nonsense", b"x", b"x"), (b"", b"x", b"x"),
                (b"(c) base64", b"aGVsbG8=", b"hello")):
            view = minimail.View(b"Content-Transfer-Encoding: " + encoding + b"\r\n\r\n" + data)
            self.assertEqual(view.parts[0].data(), expected, (encoding, data))

    def test_every_part_is_listed_somewhere(self):
        parts = [b"Content-Type: " + kind + b"\r\n\r\nx" for kind in (
            b"text/calendar; method=REQUEST", b"image/png", b"application/pgp-signature", b"message/delivery-status", b"text/csv",
            b"application/octet-stream", b"message/rfc822", b"multipart/mixed", b"nonsense")]
        view = minimail.View(mime(TEXT_PART, *parts))
        listed = {part.id for part in view.bodies + view.inlines + view.attachments}
        self.assertEqual(listed, {str(number) for number in range(1, 11)})
        inline, attached = ([part.entry() for part in parts] for parts in (view.inlines, view.attachments))
        self.assertEqual(len(inline) + len(attached), 7)
        self.assertEqual([part["PartID"] for part in view.root.tree()["Children"]], [str(number) for number in range(1, 11)])

    def test_types_with_a_slash_too_many(self):
        for given, kind in ((b"application/pdf/.pdf; name=x.pdf", "application/pdf"), (b"pdf", "text/plain"),
                            (b"multipart/multipart/mixed; boundary=b", "multipart/mixed"), (b"/pdf", "text/plain")):
            self.assertEqual(minimail.View(b"Content-Type: " + given + b"\r\n\r\n").root.kind, kind, given)

    def test_bodies_and_files(self):
        """Of each part after a plain text, whether it is a text, inline or an attachment."""
        for header, expected in (
                (b"text/plain; name=x.txt", "body"), (b"text/html; name=x.html", "body"), (b"text/plain", "body"),
                (b"text/plain\r\nContent-Disposition: attachment", "attachment"), (b"text/html\r\nContent-Disposition: inline", "body"),
                (b"text/plain\r\nContent-Disposition: inline; filename=x", "body"), (b"image/png\r\nContent-ID: <a>", "inline"),
                (b"image/png; name=a.png", "attachment"), (b"image/png\r\nContent-Disposition: inline; filename=a.png", "inline"),
                (b"image/png\r\nContent-ID: <a>\r\nContent-Disposition: attachment", "attachment"), (b"application/zip; name=z", "attachment")):
            view = minimail.View(mime(TEXT_PART, b"Content-Type: " + header + b"\r\n\r\nx"))
            part = view.part("2")
            self.assertEqual("body" if part in view.bodies else "inline" if part in view.inlines else "attachment", expected, header)
            named = part.name and part.kind == "text/plain" and part.is_text
            self.assertIs(part in view.inlines, bool(expected == "inline" or named), "a text with a name can be saved, too")
        for header in (b"text/plain; name=x", b"text/plain\r\nContent-Disposition: inline; filename=x"):
            self.assertEqual(minimail.View(b"Content-Type: " + header + b"\r\n\r\nhello").text, "hello", header)

    def test_broken_multiparts(self):
        inner = b"Content-Type: multipart/mixed; boundary=i\r\n\r\n--i\r\n\r\none\r\n"
        for raw, texts in (
                (mime(inner, b"\r\ntwo"), ["one\r\n", "two"]),                  # the inner one never ends
                (mime(TEXT_PART).partition(b"--b--")[0], ["body\r\n"]), (mime(TEXT_PART).replace(b"\r\n", b"\n"), ["body"]),
                (mime(b"\r\na\r\n--bc\r\nb"), ["a\r\n--bc\r\nb"]), (mime(b"\r\na").replace(b"--b\r\n", b"--b \t\r\n"), ["a"]),
                (mime(b"\r\n"), [""]), (mime(b"no header"), ["no header"]), (mime(TEXT_PART, boundary=b"x y:'()+_,-./=?"), ["body"]),
                (b'Content-Type: multipart/mixed;\r\n boundary="a\r\n b"\r\n\r\n--a b\r\n\r\nx\r\n--a b--', ["x"]),
                (mime(TEXT_PART).replace(b"--b--", b"--b-->junk"), ["body"]),
                (mime(mime(b"\r\none", boundary=b"o"), b"\r\ntwo", boundary=b"o--x"), ["one", "two"]),
                (b"Content-Type: multipart/mixed\r\n\r\n--x\r\n\r\nhello", ["--x\r\n\r\nhello"]),
                (mime(TEXT_PART, boundary=b"b" * 4000), ["body"]),
                (b"Content-Type: multipart/mixed; boundary=x\r\n\r\nhello", ["hello"]),
                (b'Content-Type: multipart/mixed;\r\nboundary="abc"\r\n\r\n--abc\r\n\r\nx\r\n--abc--', ["x"]),
                (mime(b"Content-Transfer-Encoding: base64\r\nContent-Type: text/plain;\r\ncharset=utf-8\r\n\r\naGVsbG8="),
                 ["hello"]),
                (b"Content-Type: multipart/multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nx\r\n--b--", ["x"]),
                (mime(TEXT_PART).replace(b'"b"', b'"b "'), ["body"]), (mime(TEXT_PART, boundary=b"b "), ["body"])):
            self.assertEqual([part.text() for part in minimail.View(raw).parts], texts, raw)

    def test_an_attached_message_is_what_was_sent(self):
        inner = b"Subject:  two  blanks\r\nX:\ty\r\nContent-Type: multipart/mixed; boundary=b2\r\n\r\n--b2\r\n\r\nx \r\n--b2--\r\n"
        for header, body in ((b"", inner), (b"\r\nContent-Transfer-Encoding: base64", base64.encodebytes(inner))):
            view = minimail.View(mime(TEXT_PART, b"Content-Type: message/rfc822" + header + b"\r\n\r\n" + body))
            self.assertEqual((view.part("2").data().rstrip(), view.part("2").shown_name, len(view.parts)), (inner.rstrip(), "message.eml", 2))
        digest = minimail.View(mime(b"\r\n" + inner, kind=b"digest"))
        self.assertEqual((digest.part("1").kind, digest.part("1").data()), ("message/rfc822", inner))

    def test_names(self):
        for header, name in (
                (b"Content-Disposition: attachment; filename=\"ci\xc3\xable.txt\"", "ci\u00eble.txt"), (b"Content-Type: a/b; name=ci\xebl.txt", "ci\u00ebl.txt"),
                (b"Content-Disposition: attachment; filename=\".htaccess\"", ".htaccess"), (b"Content-Disposition: attachment; filename=\"a  b/c:d\"", "a  b/c:d"),
                (b"Content-Type: a/b; name=x\r\nContent-Disposition: attachment; filename=y", "y"),
                (b"Content-Disposition: attachment; filename=" + b"x" * 5000, "x" * minimail.MAX_NAME_SHOWN + "... (cut)"),
                (b"Content-Type: application/zip; x=1;\r\nname=\"a.zip\"", "a.zip"),
                (b'Content-Disposition: attachment; name="a.txt"', "a.txt"), (b"Content-Type: a/b; filename=a.txt", "a.txt")):
            self.assertEqual(minimail.View(header + b"\r\n\r\n").parts[0].name, name, header)
        for name, safe in (("../../etc/passwd", "_.._etc_passwd"), (".htaccess", "htaccess"), ("a\u202egnp.exe", "a_gnp.exe"), ("a\r\n\"b", "a___b"),
                           ("Report 10:30.pdf", "Report 10_30.pdf"), ("...", ""), ("ci\u00eble.txt", "ci\u00eble.txt")):
            self.assertEqual(minimail.download_name(name), safe)
        long = minimail.download_name("\u65e5" * 500 + ".pdf")
        self.assertTrue(long.endswith("\u65e5.pdf") and 150 < len(long.encode()) <= 240, long)

    def test_budgets(self):
        deep = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (i, i) for i in range(500)) + b"\r\nhello"
        many = mime(*[b"\r\nx"] * 5000)
        for raw, count, seen in ((deep, 1, "hello"), (many, minimail.MAX_PARTS, "x"),
                                 (b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nx\r\n" + b"--\r\n" * 200_000, 1, "x")):
            view = minimail.View(raw)
            self.assertEqual((len(view.parts), len(view.cut)), (count, 1), view.cut)
            self.assertIn(seen, view.text)
        view = minimail.View(b"\r\n" + b"x" * (minimail.MAX_TEXT + 10))
        self.assertTrue(view.text.endswith("[cut here: the part has %d bytes]\n" % (minimail.MAX_TEXT + 10)))

    def test_the_tree(self):
        tree = minimail.View(mime(mime(TEXT_PART, TEXT_PART, kind=b"alternative", boundary=b"i"), b"Content-Type: a/b; name=n\r\n\r\nxyz")).root.tree()
        self.assertEqual((tree["PartID"], tree["ContentType"]), ("", "multipart/mixed"))
        self.assertEqual([child["PartID"] for child in tree["Children"][0]["Children"]], ["1.1", "1.2"])
        self.assertEqual(tree["Children"][1], {"PartID": "2", "ContentType": "a/b", "FileName": "n", "Size": 3, "Children": []})

    def test_invitations(self):
        calendar = (b"BEGIN:VCALENDAR\r\nMETHOD:REQUEST\r\nBEGIN:VEVENT\r\nSUMMARY;LANGUAGE=de:Kaffee\\, Kuchen\r\n  und mehr\r\n"
                    b"DTSTART;TZID=\"Europe/Berlin\":20261126T100000\r\nDTEND:20261126T110000Z\r\nLOCATION:Bar\\; hinten\r\n"
                    b"ORGANIZER;CN=\"Ann: A.\":mailto:ann@x\r\nATTENDEE;CN=Bob;RSVP=TRUE:MAILTO:bob@x\r\nATTENDEE:mailto:c@x\r\n"
                    b"BEGIN:VALARM\r\nDESCRIPTION:wake\r\nEND:VALARM\r\nEND:VEVENT\r\nEND:VCALENDAR\r\n")
        view = minimail.View(mime(TEXT_PART, b"Content-Type: text/calendar; method=REQUEST; charset=utf-8\r\n\r\n" + calendar))
        self.assertEqual(view.calendar(), [{
            "Method": "REQUEST", "Summary": "Kaffee, Kuchen und mehr", "Start": "2026-11-26T10:00:00 Europe/Berlin", "End": "2026-11-26T11:00:00Z",
            "Location": "Bar; hinten", "Organizer": "Ann: A. <ann@x>", "Attendees": ["Bob <bob@x>", "c@x"], "Description": ""}])
        for start, duration, end in (
                (b"DTSTART:20261231T230000Z", b"DURATION:PT1H30M", "2027-01-01T00:30:00Z"), (b"DTSTART;VALUE=DATE:20261126", b"DURATION:P1D", "2026-11-27"),
                (b"DTSTART;TZID=Europe/Berlin:20261126T1000", b"DURATION:P1WT5S", "2026-12-03T10:00:05 Europe/Berlin"),
                (b"DTSTART:20261126T100000", b"DURATION:PT1H\r\nDTEND:20261126T120000", "2026-11-26T12:00:00"),
                (b"DTSTART:20261126T100000", b"BEGIN:VALARM\r\nDURATION:PT5M\r\nEND:VALARM", ""), (b"DTSTART:soon", b"DURATION:PT1H", ""),
                (b"DTSTART:99991231T230000Z", b"DURATION:P99999W", ""), (b"DTSTART:20261126T100000Z", b"DURATION:an hour", "")):
            calendar = b"BEGIN:VEVENT\r\n" + duration + b"\r\n" + start + b"\r\nEND:VEVENT\r\nBEGIN:VEVENT\r\n" + start + b"\r\nEND:VEVENT\r\n"
            events = minimail.View(b"Content-Type: text/calendar\r\n\r\n" + calendar).calendar()
            self.assertEqual([event["End"] for event in events], [end, ""], duration)
        crowd = minimail.View(b"Content-Type: text/calendar\r\n\r\nBEGIN:VEVENT\r\n" + b"ATTENDEE:mailto:a@x\r\n" * 500 + b"END:VEVENT\r\n")
        self.assertEqual(crowd.calendar()[0]["Attendees"][-1], "... (cut)")
        self.assertEqual(minimail.View(b"Content-Type: text/calendar\r\n\r\nnonsense").calendar(), [])
        made = itertools.count()
        with mock.patch.object(minimail, "read_calendar", lambda text: ({"Summary": str(next(made))} for _ in range(1000))):
            self.assertEqual(len(crowd.calendar()), minimail.MAX_EVENTS)
        self.assertEqual(next(made), minimail.MAX_EVENTS, "what is not shown is not read")


class ReadingHTML(Case):
    def test_its_text(self):
        for html, text in (
                ("<p>Hello <b>W</b>orld</p><p>two", "Hello World\n\ntwo"), ("a<br>b<br/>c", "a\nb\nc"), ("<td>a</td><td>b</td>", "a b"),
                ("<title>T</title><style>p{}</style><script>x<y</script>a", "a"), ("a<!-- b <i>c</i> -->d", "ad"), ("a<!-- b", "a"),
                ("Caf&eacute;&nbsp;&amp; &#x41;&#66;", "Caf\u00e9\u00a0& AB"), ("&#" + "9" * 10000, "\ufffd" + "9" * 9993), ("1 < 2 && 3 > 2", "1 < 2 && 3 > 2"),
                ('<a title="x > y">z</a>', "z"), ("<p alt=don't>a</p>b'c", "a\nb'c"), ("<scr", ""), ("</p>a<", "a<"), ("<STYLE>x</Style>a", "a")):
            self.assertEqual(minimail.html_text(html), text, html)

    def test_snippets(self):
        for raw, snippet in ((b"Content-Type: text/html\r\n\r\n<p>a &lt;b&gt;\r\n\r\nc", "a <b> c"), (b"\r\n a\r\n\r\n<b> &amp;", "a <b> &amp;"),
                             (b"\r\n" + b"word " * 100, ("word " * 50)[:250] + "...")):
            self.assertEqual(minimail.View(raw).snippet(), snippet)

    def test_links(self):
        html = ("""<a href="https://w.example/F_(bar)">1</a><a class=x href='https://q.example/?x="1"&amp;b=it'>2</a><A HREF = https://u.example/a?b=c>3</A>
            <a href=" https://p.example/a b\n "><a title="href=http://no.example/" href="mailto:x"><!-- <a href="http://no.example/"> -->
            <area href="https://area.example/"><a href="https://w.example/F_(bar)"><p data-href="http://no.example/"><link href="http://no.example">
            <a href="https://a.example/?x=1&copy=3&region=eu&timestamp=4&currency=USD">""")
        view = minimail.View(b"Content-Type: text/html; charset=utf-8\r\n\r\n" + html.encode())
        self.assertEqual(view.links(), ["https://w.example/F_(bar)", 'https://q.example/?x="1"&b=it', "https://u.example/a?b=c",
                                        "https://p.example/a%20b", "https://area.example/",
                                        "https://a.example/?x=1&copy=3&region=eu&timestamp=4&currency=USD"])
        text = "See https://a.example/x. (https://b.example/y_(z)), <https://c.example/>; 'https://d.example/it's'!\nhttps://e.example/?q=[1]]\u3002 xhttp://no.example"
        text += " <https://f.example/long\r\nrest>"
        self.assertEqual(minimail.View(b"Content-Type: text/plain; charset=utf-8\r\n\r\n" + text.encode()).links(), [
            "https://a.example/x", "https://b.example/y_(z)", "https://c.example/", "https://d.example/it's",
            "https://e.example/?q=[1]", "https://f.example/longrest"])
        for mark in ("\x1b]0;", "\x9b2J", "\u202egpj", "&#x202e;"):
            for kind, text in ("html", "<a href='https://a.example/x%sy'>z</a>" % mark), ("plain", "https://a.example/x%sy" % (
                    minimail.unescape(mark))):
                view = minimail.View(("Content-Type: text/%s; charset=utf-8\r\n\r\n%s" % (kind, text)).encode())
                self.assertEqual(view.links(), ["https://a.example/x"], text)
        view = minimail.View(b"Content-Type: text/html\r\n\r\n<a href=https://a.example/&#27;&#155;x>z</a>")
        self.assertTrue(view.links()[0].isprintable(), "as HTML reads these, they are other characters, or none")

    def framed(self, html, *parts):
        return minimail.View(mime(b"Content-Type: text/html; charset=utf-8\r\n\r\n" + html, *parts, kind=b"related")).framed()

    def test_images_that_come_along(self):
        def image(id, kind=b"image/png", more=b"", data=PNG_START):
            return b"Content-Type: " + kind + b"\r\nContent-ID: " + id + b"\r\n" + more + b"\r\n" + data
        for html, part in (
                (b'<img src="cid:a@x">', image(b"<a@x>")), (b'<img src="CID:A%40x">', image(b"<a@X>")), (b"<img src=cid:a@x>", image(b"\r\n <a@x>")),
                (b'<img src="cid&#58;a&#64;x">', image(b"a@x")), (b"<p style='background:url(cid:a@x)'>", image(b"<a@x>", b"image/jpg")),
                (b'<p style="background:url(&quot;cid:a@x&quot;)">', image(b"<a@x>", b"image/gif")), (b'<img src="cid:a(1)">', image(b"<a(1)>", b"image/webp")),
                (b'<img src="cid:a@x">', image(b"<a@x>", b"application/octet-stream")), (b'<img src="cid:a@x">', image(b"<a@x>", b"image/x-png")),
                (b'<img src="cid:a@x">', image(b"<a@x>", more=b"Content-Disposition: attachment; filename=x.png\r\n")),
                (b'<img src="cid:a@x">', image(b"<a@x>", b"application/png")),
                (b'<img src="cid:a@x">', image(b"<a@x>", b"binary/octet-stream")),
                (b'<img src="cid:a%20b@x">', image(b"<a%20b@x>")), (b'<img src="cid:my%20logo">', image(b"<my logo>"))):
            self.assertRegex(self.framed(html, part), r"data:image/\w+;base64,iVBOR", part)
        for html in (b"see cid:a@x in the text", b'<img src="cid:a@x.y">', b'<img src="xcid:a@x">', b"<img src='cid:'>"):
            self.assertNotIn("data:", self.framed(html, image(b"<a@x>")), html)
        for kind in (b"text/html", b"text/plain"):
            self.assertNotIn("data:", self.framed(b'<img src="cid:a">', image(b"<a>", kind)))
        jpeg = image(b"<a>", b"image/x-jpeg", data=b"\xff\xd8\xff\xe0")
        self.assertIn("data:image/jpeg;base64,/9j/", self.framed(b'<img src="cid:a">', jpeg))
        two = self.framed(b'<img src="cid:a"><img src="cid:a1">', image(b"<a>"), image(b"<a1>", b"image/gif"))
        self.assertEqual(re.findall(r"data:image/(\w+)", two), ["png", "gif"])

    def test_one_image_a_thousand_times(self):
        raw = mime(b"Content-Type: text/html\r\n\r\n" + b"<img src=cid:a>" * 10000, b"Content-Type: image/png\r\nContent-ID: <a>\r\n\r\n" + bytes(100_000))
        self.assertLess(len(minimail.View(raw).framed()), 5 * len(raw))

    def test_nothing_connects_by_itself(self):
        shown = self.framed(b"<!DOCTYPE html><LINK rel=preconnect href=//x><meta http-equiv=refresh content=0><base href=//x><a href=//x>y")
        self.assertTrue(shown.startswith('<!DOCTYPE html><base target="_blank">'), shown)
        self.assertEqual(re.findall(r"<(\w[\w-]*)", shown), ["base", "x-LINK", "x-meta", "x-base", "a"])

    def test_whether_it_would_load_something(self):
        for html, expected in ((b"<img src='http://x/'>", True), (b"<img src=//x/>", True), (b"<p style='background:url(https://x)'>", True),
                               (b"<a href='http://x'>", False), (b"<img src=cid:a>", False), (b"http://x", False)):
            self.assertIs(minimail.View(b"Content-Type: text/html\r\n\r\n" + html).has_remote, expected, html)
        for place in range(minimail.BLOCK - 12, minimail.BLOCK + 2):
            html = b"x" * (place - 1) + b" src=" + b" " * 9 + b"//h>"
            self.assertTrue(minimail.View(b"Content-Type: text/html\r\n\r\n" + html).has_remote, place)

    def test_pieces_are_as_the_whole(self):
        numbers = random.Random(7)
        pieces = ["<img src=cid:a>", "<LINK rel=x>", "</link>", "<a href=x>", "<area\n", "<img src='cid:a'", ">", "<", "text ",
                  "&amp;", "\u20ac" * 99, "<iframe ", "<!doctype html>", "src = ",
                  '<p style="background:url(&quot;cid:a&quot;)">']
        part = b"Content-Type: image/png\r\nContent-ID: <a>\r\n\r\n" + PNG_START
        for size in (1000, 40_000):
            html = "".join(numbers.choices(pieces, k=size))
            raw = mime(b"Content-Type: text/html; charset=utf-8\r\n\r\n" + html.encode(), part, kind=b"related")
            found = []
            for block in (minimail.BLOCK if size > 1000 else 200, 1 << 24):
                with mock.patch.object(minimail, "BLOCK", block):
                    view = minimail.View(raw)
                    found.append((view.framed(), view.has_remote, minimail.in_a_frame(view.framed()) if HAS_WEB else ""))
            self.assertIn("data:image/png", found[0][0])
            self.assertTrue(found[0] == found[1], size)


class ReadingAnything(Case):
    """A seeded generator of messages that no mailer would write: all of them are shown, and no part is lost."""

    PIECES = [b"\r\n", b"\n", b"--b", b"--b--", b'"', b"<", b">", b"(", b")", b"=?utf-8?b?", b"=?", b"?=", b"?q?", b"; ", b"*0*=", b"filename=", b"boundary=b",
              b":", b",", b"@", b"cid:", b"&#", b"\xff", b"\x1b$B", b"charset=", b"base64", b"=", b" ", b"<a href=", b"<!--", b"BEGIN:VEVENT\n", b"%", b"\0", b"\\",
              b"Content-Type: multipart/mixed; boundary=b\r\n\r\n", b"Content-Transfer-Encoding: base64\r\n", b"To: ", b"Subject: ", b"List-Unsubscribe: <"]

    def test_it_is_shown(self):
        numbers = random.Random(6)
        start = b"To: a@x\r\n" + mime(TEXT_PART, b"Content-Type: image/png; name=x\r\nContent-ID: <i>\r\n\r\n" + PNG_START)
        for _ in range(500):
            raw = bytearray(start)
            for _ in range(numbers.randint(1, 20)):
                place = numbers.randrange(len(raw) + 1)
                raw[place:place + numbers.choice((0, 0, 9))] = numbers.choice(self.PIECES) * numbers.choice((1, 1, 20))
            view = minimail.View(bytes(raw))
            with self.subTest(raw=bytes(raw)):
                json.dumps([view.header("subject"), view.headers(), view.addresses("to"), view.date(""), [part.entry() for part in view.others], view.links(), view.snippet(),
                            view.unsubscribe(), view.calendar(), view.root.tree(), view.cut])
                (view.text + view.html + view.framed()).encode("utf-8")
                self.assertEqual(set(view.parts), set(view.bodies + view.inlines + view.attachments))
                for part in view.parts:
                    self.assertIs(view.part(part.id), part)


class SearchTerms(Case):
    """Query and what it asks of a message, without a node."""

    class Letter:
        def __init__(self, raw, read=False, tags=(), created=1_700_000_000.0, bcc=()):
            self.view, self.read, self.tags, self.created = minimail.View(raw), read, tags, created
            self.summary = {"From": {"Name": "", "Address": ""}, "Size": len(raw), "Bcc": [{"Name": "", "Address": who} for who in bcc]}

        def searched(self):
            return minimail.searched(self.view, self.summary, self.created)

    RAW = (b"From: Ann Lee <ann@a.test>\r\nTo: bob@b.test\r\nCc: cc@c.test\r\nReply-To: re@r.test\r\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=  now\r\n"
           b"Message-ID: <m1@x>\r\nX-Own: Some Value\r\n" + mime(
               b"Content-Type: text/plain\r\n\r\nyour order number is\r\n12345  and\r\nthanks",
               b"Content-Type: text/html\r\n\r\n<p class=source>Hello <b>W</b>orld<a href='https://x.example/Ticket-77'>",
               b"Content-Type: application/pdf; name=\"Invoice 7.pdf\"\r\n\r\nx", b"Content-Type: image/png\r\nContent-ID: <i>\r\n\r\nx"))

    def test_operators(self):
        letter = self.Letter(self.RAW, read=True, tags=["Blue"], bcc=["secret@s.test"])
        for query, expected in (
                ("from:ann", 1), ('from:"ann lee"', 1), ("from:bob", 0), ("to:bob", 1), ("to:secret", 1), ("cc:cc@", 1), ("bcc:secret", 1), ("reply-to:re@", 1),
                ("addressed:cc@", 1), ("addressed:secret", 1), ("addressed:nobody", 0), ("subject:gr\u00fc\u00dfe", 1), ('subject:"gr\u00fc\u00dfe now"', 1), ("message-id:m1@x", 1),
                ("is:read", 1), ("is:unread", 0), ("is:tagged", 1), ("-is:tagged", 0), ("tag:blue", 1), ("tag:blu", 0), ("!tag:red", 1),
                ("has:attachment", 1), ("has:attachments", 1), ("has:inline", 1), ("-has:inline", 0), ("before:2023-11-14", 0), ("before:2023-12", 1),
                ("after:2023", 1), ("-after:2020-01-01", 0), ("after:2024/01/01", 0), ("after:1600000000", 1), ("before:2023-11-14T22:13:19Z", 0),
                ("after:2023-11-14T22:13:19Z", 1), ("larger:100", 1), ("larger:1m", 0), ("smaller:1.5kb", 1), ("smaller:10", 0), ("!smaller:10", 1),
                ('"number is 12345 and"', 1), ('"hello world"', 1), ("source", 0), ("invoice", 1), ('"invoice 7.pdf"', 1), ("text:order", 1),
                ("text:invoice", 0), ("-text:order", 0), ("header:x-own=some", 1), ("header:x-own", 1), ("header:x-other", 0), ("HEADER:X-Own=VALUE", 1),
                ("order -hello", 0), ("order -goodbye", 1), ("order thanks 12345", 1), ("", 1),
                ("ticket-77", 1), ("-ticket-77", 0)):
            self.assertIs(minimail.Query(query).matches(letter), bool(expected), query)

    def test_what_one_should_not_delete_by(self):
        for query, unknown in (
                ("is:starred", ["is:starred"]), ("-has:link x", ["has:link"]), ("before:soon", ["before:soon"]), ("larger:big", ["larger:big"]), ("subject:", ["subject:"]),
                ('-to:""', ['to:""']), ("older_than:1d", ["older_than:1d"]), ("-filename:x", ["filename:x"]), ("http://x.example", []), ("12:30", []), ('"re: hello"', []),
                ("from:a is:unread", []), ("header:=x", ["header:=x"]), ("larger:\u00b2", ["larger:\u00b2"]),
                ("--", ["-"]), ("-*", ["*"]), ("!!x", ["x"]), ("-is:read", []),
                ("--after:2020-01-01", ["after:2020-01-01"]), ("-!is:read", ["is:read"])):
            wanted = minimail.Query(query)
            self.assertEqual(wanted.unknown, unknown, query)
            if unknown:
                self.assertRaises(ValueError, wanted.certain)
            else:
                self.assertIs(wanted.certain(), wanted)
        self.assertRaises(ValueError, minimail.Query(" ").certain)
        self.assertFalse(minimail.Query("subject: -to:").terms, "still being written: no words of its own")

    def test_bounds(self):
        with self.assertRaises(ValueError):
            minimail.Query(" ".join("w%d" % i for i in range(minimail.MAX_TERMS + 1)))
        with self.assertRaises(ValueError):
            minimail.Query("x" * (minimail.MAX_SEARCH + 1))
        self.assertEqual(len(minimail.Query("same " * 700).terms), 1)

    def test_what_is_cut_may_yet_be_there(self):
        letter = self.Letter(b"\r\n" + b"word " * (minimail.MAX_TEXT // 5 + 10) + b"end")
        self.assertEqual([minimail.Query(query).matches(letter) for query in ("word", "end", "-end", "-word")], [True, False, False, False])

    def test_the_cache(self):
        cache = minimail.Cache(100)
        for key in "abcd":
            cache.put(key, key.upper(), 30)
        self.assertEqual([cache.get(key) for key in "abcd"], [None, "B", "C", "D"])
        cache.get("b")
        cache.put("e", "E", 30)
        self.assertEqual([cache.get(key) for key in "bcde"], ["B", None, "D", "E"])
        cache.put("huge", "H", 60)
        self.assertEqual((cache.get("huge"), cache.get("b"), cache.get("d"), cache.size), (None, "B", "D", 90))
        real, entered = cache._lock, []

        class Lock:                                 # whenever it is let go, another thread comes in with the same key
            def __enter__(self):
                entered.append(real)
                if len(entered) == 2:
                    cache.put("b", "theirs", 30)
                real.acquire()

            def __exit__(self, *_):
                real.release()
        cache._lock = Lock()
        cache.put("b", "ours", 30)
        cache._lock = real
        self.assertEqual((cache.get("b"), cache.size), ("ours", 90))
        for key in "bde":
            cache.forget(key)
        self.assertEqual(cache.size, 0)

    def test_white_space_in_pieces(self):
        for text in ("", " a  b ", "x" * 65535 + "  y", " " * 200_000 + "a" + "\r\n" * 100_000 + "b", "ab\n" * 50_000, "a" * 65536 + "b"):
            self.assertEqual(minimail.squeeze(text), " ".join(text.split()))


class ShownAnywhere(Case):
    def test_an_encoding_that_lacks_it(self):
        for encoding in ("ascii", "latin-1", "cp1252", "utf-8"):
            with mock.patch.object(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding)) as out:
                minimail.escape_output()
                print("\u65e5 \u00fc")
                out.flush()
                self.assertEqual(out.buffer.getvalue().decode(encoding).strip(), "\u65e5 \u00fc".encode(encoding, "backslashreplace").decode(encoding))


class CheapToRead(Case):
    """No shape of a field or a page costs much more than another."""

    def test_address_headers_of_marks(self):
        for shape, tokens in (('"' + '\\"' * 50000, 2), ("," * 50000, 1), (", " * 50000, 1), ("(" + "\\(" * 50000, 3),
                              (":" * 50000, 1), ('"' * 50001, 30000)):
            with self.subTest(shape[:4]):
                self.assertLess(sum(1 for _ in minimail.address_tokens(shape)), tokens + 1)

    def test_addresses_without_commas(self):
        for shape in ("a @%.0s", "%x@b ", " @x%.0s"):
            texts = ["a" + "".join(shape % i for i in range(size)) for size in (2_500, 20_000)]
            small, large = (cpu_of(lambda text=text: list(minimail.read_addresses(text))) for text in texts)
            self.assertLess(large, 16 * small + 0.05, shape)

    def test_quotation_marks_in_parameters(self):
        plain, marked = (cpu_of(lambda text=text: minimail.read_parameters("a; " + text * 10_000))
                         for text in ("n=ab;  ", 'n="a"b;'))
        self.assertLess(marked, 10 * plain + 0.05)

    def test_they_are_read_as_before(self):
        for text, people in (('a@x,, ;b@x', ["a@x", "b@x"]), ('"\\"a@x', ['"\\"a@x']), ("(\\(a@x", ["(\\(a@x"]), ("g:: a@x;", ["a@x"]),
                             ("a@x , , b@x", ["a@x", "b@x"]), ("a: b@x, c@x; d@x", ["b@x", "c@x", "d@x"]), (",", [])):
            self.assertEqual([address for _, address in minimail.read_addresses(text)], people, text)

    def test_parameters_and_boundaries(self):
        head = b"Content-Type: multipart/mixed; boundary="
        for read, shape in ((minimail.read_parameters, lambda n: "x" + (";" + "(" * 2560) * n),
                            (minimail.View, lambda n: head + b"b" * 2500 * n + b"\r\n" + b"\r\n--bb" * 400 * n)):
            small, large = (cpu_of(functools.partial(read, shape(n))) for n in (25, 100))
            self.assertLess(large, 8 * small + 0.05, read)

    def test_references_at_the_edge_of_a_piece(self):
        for size in range(minimail.BLOCK - 45, minimail.BLOCK + 3):
            text = "&" * size + "&amp;x&#233;" * 20
            self.assertEqual(minimail.unescape(text), "&" * size + "&x\xe9" * 20)

    def test_blanks_around_line_ends(self):
        for marks in itertools.product((" ", "<br>", "a"), repeat=6):
            text = "x" + "".join(marks) + "x"
            plain = re.sub(r" ?\n ?", "\n", re.sub(" {2,}", " ", text.replace("<br>", "\n")))
            self.assertEqual(minimail.html_text(text), re.sub("\n{3,}", "\n\n", plain))


# ======================================================================================================================
# 19  Transcripts and lint
# ======================================================================================================================

def glob_sessions(node):
    root = os.path.join(node.data, "sessions")
    return [os.path.join(root, name) for name in os.listdir(root)]


class Records(Case):
    """Two processes that append to files of their own and read both."""

    def setUp(self):
        self.data = self.directory()
        self.one, self.two = (minimail.Recorder(self.stores(data=self.data).mailboxes) for _ in range(2))
        self.root = self.one.root

    def files(self):
        return sorted(os.listdir(self.root))

    def test_each_sees_what_the_other_did(self):
        self.one.replace({"id": "a", "tags": []})
        self.assertEqual(self.two.load("a"), {"id": "a", "tags": []})
        self.two.replace({"id": "a", "tags": ["x"]})
        self.assertEqual([one.load("a")["tags"] for one in (self.one, self.two)], [["x"]] * 2)
        self.one.replace({"id": "b"})
        self.two.forget("b")
        self.assertEqual([one.load("b") for one in (self.one, self.two)], [None, None])
        self.one.forget("a")
        self.assertIsNone(self.two.load("a"))
        text = b"".join(open_and_read(os.path.join(self.root, name)) for name in self.files())
        self.assertEqual(text.strip(), b"", "what is forgotten is gone from the disk")
        self.one.replace({"id": "c"})
        self.assertEqual(self.two.load("c"), {"id": "c"}, "a file that somebody writes to is not removed")

    def test_full_files(self):
        with mock.patch.object(minimail.Recorder, "FULL", 100):
            for number in range(10):
                self.one.replace({"id": "%d" % number, "text": "x" * 60})
        before = self.files()
        self.assertGreater(len(before), 4)
        for number in range(9):
            self.two.forget("%d" % number)
        self.assertEqual(len(self.files()), 1)
        self.assertEqual(self.one.load("9")["text"], "x" * 60)

    def test_the_data_directory_is_emptied(self):
        """What comes later is known all the same."""
        self.one.replace({"id": "a"})
        for remove in lambda: shutil.rmtree(self.root), lambda: os.unlink(os.path.join(self.root, self.files()[0])):
            remove()
            self.assertIsNone(self.one.load("a"))
            self.one.replace({"id": "b"})
            self.assertEqual([one.load("b") for one in (self.one, self.two)], [{"id": "b"}] * 2)

    def test_what_cannot_be_read_is_not_gone(self):
        stores = self.stores(data=self.data)
        parcel = stores.door.send(minimail.Envelope("a@x"), [Address("bob", "x")], b"x\r\n")
        for id in parcel.draft.id, "gone":
            self.one.replace({"id": id})
        for name in self.files():
            os.utime(os.path.join(self.root, name), (1e9, 1e9))
        box = stores.mailboxes.path("bob@x")
        for place in box, box + "/new", os.path.dirname(box):
            with of_somebody_else(place):
                self.assertRaises(PermissionError, self.two.sweep)
        self.two.sweep()
        self.assertEqual([bool(self.two.load(id)) for id in (parcel.draft.id, "gone")], [True, False])
        with of_somebody_else(self.root), self.assertLogs("minimail") as logs:
            self.assertEqual([self.two.load(parcel.draft.id), self.two.load("x")], [None, None])
        self.assertEqual(len(logs.records), 1)
        self.assertTrue(self.two.load(parcel.draft.id))

    def test_a_file_that_others_emptied_goes_when_its_writer_has_ended(self):
        self.one.replace({"id": "a"})
        self.two.forget("a")
        self.assertEqual(len(self.files()), 1, "it may grow")
        self.one.close()
        self.two.load("b")
        self.assertEqual(self.files(), [])
        self.assertIsNone(self.one.load("a"))

    def test_a_sweep_forgets_all_that_is_gone(self):
        for id in "abc":
            self.one.replace({"id": id})
        self.one.close()
        self.two.sweep()
        self.assertIsNotNone(self.two.load("c"), "it may be just coming in")
        os.utime(os.path.join(self.root, *self.files()), (1, 1))
        self.two.sweep()
        self.assertEqual(self.files(), [])

    @unittest.skipUnless(hasattr(os, "mkfifo"), "needs pipes with names")
    def test_only_regular_files_are_read(self):
        os.mkfifo(os.path.join(self.root, "pipe"))
        target = self.file("target", b'{"id": "a"}\n')
        os.symlink(target, os.path.join(self.root, "link"))
        self.assertIsNone(self.one.load("a"))
        self.one.forget("a")
        self.assertEqual(open_and_read(target), b'{"id": "a"}\n')

    def test_what_a_crash_or_a_full_disk_tore(self):
        self.one.replace({"id": "a"})
        with mock.patch.object(minimail, "write_all", self.tear), self.assertRaises(OSError):
            self.one.replace({"id": "b"})
        self.assertEqual((self.two.load("a"), self.two.load("b")), ({"id": "a"}, None))
        self.one.replace({"id": "b", "again": True})
        self.assertEqual((self.two.load("a"), self.two.load("b")), ({"id": "a"}, {"id": "b", "again": True}))

    @staticmethod
    def tear(fd, data):
        os.write(fd, data[:5])
        raise OSError(errno.ENOSPC, "full")

    def test_a_file_for_each_as_once(self):
        for id in ("old", "\u00fc"):
            with open(os.path.join(self.root, minimail.encode_name(id) + ".json"), "w") as file:
                file.write(json.dumps({"id": id, "tags": ["x"]}))
        with open(os.path.join(self.root, "nonsense.json"), "w") as file:
            file.write('{"id": [7], "x"')
        self.assertEqual([self.one.load(id)["tags"] for id in ("old", "\u00fc")], [["x"]] * 2)
        self.one.forget("old")
        self.two.forget("\u00fc")
        self.assertEqual(self.files(), ["nonsense.json"])


class WebTranscripts(WebCase):
    def sessions(self, node):
        """Return the ids of all records, and their text."""
        root = os.path.join(node.data, "sessions")
        text = b"".join(open_and_read(os.path.join(root, name)) for name in sorted(os.listdir(root)))
        return [json.loads(line)["id"] for line in text.splitlines() if line.strip()], text.decode()

    def test_secrets_are_blanked(self):
        node = self.web_node()
        name, password = (base64.b64encode(text).decode() for text in (b"ann@x", b"pass word"))
        plain = base64.b64encode(b"\0ann@x\0pass word").decode()
        for log_in in ("C: AUTH PLAIN %s\nS: 235" % plain, "C: auth plain\nS: 334\nC: %s\nS: 235" % plain,
                       "C: AUTH LOGIN %s\nS: 334\nC: %s\nS: 235" % (name, password),
                       "C: Auth Login\nS: 334\nC: %s\nS: 334\nC: %s\nS: 235" % (name, password),
                       "C: AUTH PLAIN %s=\nS: 501\nC: AUTH CRAM-MD5 %s\nS: 504" % (plain, password)):
            node.clear()
            self.dialog(node.smtp_address, "S: 220\nC: EHLO c\nS: 250\n" + log_in + "\nC: MAIL FROM:<a@x>\nC: RCPT TO:<b@x>\nC: DATA\n"
                        "S: 250\nS: 250\nS: 354\nC: secret text\nC: .\nS: 250")
            record = self.session(node)
            self.assertIn(["C", "AUTH ***"], record["transcript"])
            stored, text = self.sessions(node)
            self.assertEqual(len(stored), 1)
            for secret in (plain, password, name, "pass word", "secret text"):
                self.assertNotIn(secret, text)

    def test_each_message_has_its_own(self):
        node = self.web_node()
        talk = self.dialog(node.smtp_address, "S: 220\nC: EHLO client.test\nS: 250")
        for number in (1, 2):
            self.dialog(talk, "C: MAIL FROM:<a%d@x>\nS: 250\nC: RCPT TO:<b%d@x>\nS: 250\nC: RCPT TO:<nonsense\nS: 5\nC: DATA\nS: 354\nC: x\nC: .\nS: 250"
                        % (number, number))
        for number in (1, 2):
            message, = node.messages("b%d@x" % number)
            record = self.session(node, message.id)
            lines = ["%s: %s" % tuple(line) for line in record["transcript"]]
            self.assertEqual([line for line in lines if line.startswith("C")],
                             ["C: EHLO client.test", "C: MAIL FROM:<a%d@x>" % number, "C: RCPT TO:<b%d@x>" % number, "C: RCPT TO:<nonsense", "C: DATA"])
            self.assertTrue(lines[0].startswith("S: 220 ") and lines[-1].startswith("S: 250 2.0.0 ") and message.id in lines[-1], lines)
            self.assertEqual([record[key] for key in ("id", "sender", "recipients", "helo", "client", "protocol", "tls")],
                             [message.id, "a%d@x" % number, ["b%d@x" % number], "client.test", "127.0.0.1", "ESMTP", False])
            self.assertEqual(record.get("bcc"), ["b%d@x" % number] if HAS_WEB else None, "it takes reading mail to tell")

    def test_a_long_conversation_is_cut(self):
        """What was said before and between messages costs each of them a bounded part of it."""
        node = self.web_node(max_size="1M")
        with mock.patch.object(minimail, "MAX_TRANSCRIPT", 4000):
            talk = self.dialog(node.smtp_address, "S: 220\nC: EHLO client.test\nS: 250")
            for _ in range(2):
                for _ in range(50):
                    self.dialog(talk, "C: NOOP %s\nS: 250" % ("x" * 500))
                self.dialog(talk, "C: MAIL FROM:<a@x>\nS: 250\nC: RCPT TO:<b@x>\nS: 250\nC: DATA\nS: 354\nC: x\nC: .\nS: 250")
        for message in node.messages("b@x"):
            self.assertLess(len(json.dumps(self.session(node, message.id))), 8000 + 20 * 600)

    def test_what_a_line_costs(self):
        """In the file, where a character may have twelve bytes; an introduction is there with each message."""
        tape = minimail.Tape(None, mock.Mock())
        for count in range(200):
            tape.heard(b"NOOP " + b"x" * count, False)
        tape.heard(b"MAIL FROM:<a@x>", False)
        self.assertEqual([len(text) for _, text in tape.introduction], [minimail.MAX_INTRODUCED] * minimail.MAX_INTRODUCTION)
        for character in "x", "\xe9", "\u20ac", "\U0001f4e7":
            tape.restart()
            for _ in range(200):
                tape.heard(("RCPT TO:<%s@x>" % (character * 900)).encode(), False)
                tape.said(b"250 2.1.5 ok\r\n")
            self.assertEqual(tape.lines[-1], ("S", "(the rest was not kept)"))
            self.assertLess(len(json.dumps(tape.lines)), minimail.MAX_TRANSCRIPT, character)

    def test_they_go_with_the_message(self):
        node = self.web_node(pop3=self.OPTIONS["pop3"], data=self.directory())
        for case in ["api"] * HAS_WEB + ["library"] + ["pop3"] * HAS_POP3:
            id = self.deliver(node, b"x\r\n", "a@x", "b@x")
            self.assertEqual(self.sessions(node)[0], [id])
            for path in glob_sessions(node):
                self.assertEqual(os.stat(path).st_mode & 0o177, 0)
            if case == "api":
                self.ask(node, "/api/v1/messages", "DELETE", {"IDs": [id]})
            elif case == "library":
                node.messages("a@x")[0].delete()
                self.assertEqual(self.sessions(node)[0], [id], "there is another copy")
                self.assertEqual(node.messages("b@x")[0].recipients, ["a@x", "b@x"])
                node.clear()
            else:
                for name in ("a@x", "b@x"):
                    self.dialog(node.pop3_address, "S: +OK\nC: USER %s\nS: +OK\nC: PASS x\nS: +OK\nC: DELE 1\nS: +OK\nC: QUIT\nS: +OK\nS: closed" % name)
            self.assertEqual(self.sessions(node), ([], ""), case)
            self.assertEqual(glob_sessions(node), [])

    @needs("faults")
    def test_refused_messages_leave_none(self):
        node = self.web_node(max_size=1000, faults=["end=f@x 552"])
        for recipient, content, answer in (("f@x", "x", "552"), ("b@x", "x" * 2000, "552")):
            self.dialog(node.smtp_address, "S: 220\nC: EHLO c\nS: 250\nC: MAIL FROM:<a@x>\nC: RCPT TO:<%s>\nC: DATA\nS: 250\nS: 250\nS: 354\nC: %s\nC: .\nS: %s"
                        % (recipient, content, answer))
        self.assertEqual((self.sessions(node)[0], node.messages()), ([], []))

    def test_what_was_removed_elsewhere_is_swept(self):
        node = self.web_node(data=self.directory())
        id, kept = self.deliver(node, b"x\r\n", "b@x"), self.deliver(node, b"x\r\n", "b@x")
        os.unlink(node.messages()[0].path)
        node.stop()
        for path in glob_sessions(node):
            os.utime(path, (1, 1))
        node.start()
        self.eventually(lambda: self.sessions(node)[0] == [kept])
        self.assertNotEqual(id, kept)

    def test_on_and_off(self):
        for options, kept in (({}, True), ({"transcripts": "off"}, False), ({"transcripts": False}, False), ({"domain": "x"}, False),
                              ({"domain": "x", "transcripts": "on"}, True)):
            node = self.web_node(catch_all="all@x" if "domain" in options else None, **options)
            id = self.deliver(node, b"Subject: x\r\n\r\nx\r\n", "b@x")
            self.assertEqual(os.path.isdir(os.path.join(node.data, "sessions")), kept, options)
            if HAS_WEB or kept:                         # the web tells what can be told without one
                record = self.session(node, id)
                self.assertEqual((bool(record["transcript"]), record["sender"]), (kept, "alice@example.net"))

    def test_keep(self):
        node = self.web_node(keep=2)
        with self.assertLogs("minimail", "INFO") as logs:
            for number in range(5):
                self.deliver(node, b"Subject: %d\r\n\r\nx\r\n" % number, "b@x")
            self.eventually(lambda: len(node.messages()) == 2)
            self.eventually(lambda: sum(record.getMessage() == "pruned" for record in logs.records) == 3)
        self.assertEqual([message.email()["Subject"] for message in node.messages("b@x")], ["3", "4"])
        self.assertEqual(len(self.sessions(node)), 2)


class LintRules(WebCase):
    def lint(self, node, content=CLEAN, mail="", before="EHLO c\r\n", pipeline=False, bdat=False):
        """Send a message, byte for byte; return the rules it breaks."""
        with Talk(node.smtp_address) as talk:
            if before:
                talk.reply()
                talk.send(before)
            talk.reply() if before else (talk.reply(), talk.reply())
            size = b"BDAT %d LAST\r\n" % len(content) if bdat else b"DATA\r\n"
            head = b"MAIL FROM:<a@x>%s\r\nRCPT TO:<bob@x>\r\n%s" % (mail.encode(), size)
            data = content if bdat else content + b".\r\n"
            if pipeline or bdat:
                talk.send(head + data)
            else:
                talk.send(head)
            replies = [talk.reply(), talk.reply()] + ([] if bdat else [talk.reply()])
            if not (pipeline or bdat):
                talk.send(data)
            replies.append(talk.reply())
            self.assertTrue(replies[-1].startswith("250 2.0.0"), replies)
        found = self.session(node)["lint"]
        for rule in found:
            self.assertRegex(rule["text"], r"^[A-Z].*\.$")
            self.assertRegex(rule["rfc"], r"^RFC \d+")
        return [rule["rule"] for rule in found]

    def test_each_rule_alone(self):
        node = self.web_node()
        eight = CLEAN.replace(b"hello", b"h\xc3\xa9llo")
        raw = CLEAN.replace(b"Subject: hi", "Subject: hé".encode())

        def subject(text):
            return CLEAN.replace(b"hi\r", text + b"\r")
        for rule, content, more in (
                ("", CLEAN, {}), ("", CLEAN, {"bdat": True}), ("bare-newline", CLEAN + b"a\nb\r\n", {}), ("bare-newline", CLEAN + b"a\rb\r\n", {}),
                ("bare-newline", CLEAN + b"a\nb\r\n", {"bdat": True}),
                ("8bit", eight, {}), ("8bit", eight, {"mail": " BODY=7BIT"}), ("", eight, {"mail": " BODY=8BITMIME"}),
                ("no-date", CLEAN.replace(b"Date:", b"X-Date:"), {}), ("no-message-id", CLEAN.replace(b"Message-ID:", b"X-ID:"), {}),
                ("no-from", CLEAN.replace(b"From:", b"X-From:"), {}),
                ("long-line", CLEAN + b"x" * 999 + b"\r\n", {}), ("", CLEAN + b"x" * 998 + b"\r\n", {}),
                ("long-line", CLEAN + b"y\r\n" * 30000 + b"x" * 999 + b"\r\n" + b"y\r\n" * 30000, {}),
                ("", CLEAN + (b"x" * 998 + b"\r\n") * 300, {}),
                ("", CLEAN.replace(b"\r\n\r\n", b"\r\n" + b"a:\r\n" * 20_000 + b"X: =?utf-8?x?abc?=\r\n\r\n"), {}),
                ("", CLEAN, {"mail": " SIZE=%d" % len(CLEAN)}), ("size", CLEAN, {"mail": " SIZE=1000"}), ("size", CLEAN * 9, {"mail": " SIZE=10"}),
                ("header-encoding", raw, {"mail": " BODY=8BITMIME"}), ("", raw, {"mail": " BODY=8BITMIME SMTPUTF8"}),
                ("", subject(b"=?utf-8?q?h=C3=A9?= =?ISO-8859-1*de?B?6Q==?= a=b?c"), {}), ("header-encoding", subject(b"=?utf-8?q?h =C3=A9?="), {}),
                ("header-encoding", subject(b"=?utf-8?x?abc?="), {}), ("header-encoding", subject(b"=?utf-8?b?a*c?="), {}),
                ("dot-stuffing", CLEAN + b".x\r\n", {}), ("", CLEAN + b"..\r\n..x\r\n", {}), ("", CLEAN + b".x\r\n", {"bdat": True}),
                ("pipelining", CLEAN, {"pipeline": True}), ("", CLEAN, {"before": "HELO c\r\n"})):
            with self.subTest(rule=rule, content=content[-40:], **more):
                self.assertEqual(self.lint(node, content, **more), [rule] if rule else [])

    def test_long_lines_however_they_are_cut(self):
        for size, lines in itertools.product((998, 999, 1000, 1001), (b"%s\r\n", b"y\r\n%s\r\nz\r\n", b"%s\ny", b"y\n%s")):
            content = lines % (b"x" * size)
            wanted = max(map(len, content.split(b"\n"))) > 999
            for cut in {0, 1, 3, 4, 500, size, size + 1, size + 2, size + 3}:
                tape = minimail.Tape(None, mock.Mock())
                tape.begin()
                tape.block(content[:cut])
                tape.block(content[cut:])
                self.assertEqual(tape.longest > 999, wanted, (lines, size, cut))

    def test_before_its_turn(self):
        node = self.web_node()
        for text, rules in (("EHLO c\r\nMAIL FROM:<a@x>\r\nRCPT TO:<bob@x>\r\nDATA\r\n", ["pipelining"]),
                            ("EHLO c\r\nNOOP\r\nMAIL FROM:<a@x>\r\nRCPT TO:<bob@x>\r\nDATA\r\n", ["pipelining"])):
            with Talk(node.smtp_address) as talk:
                talk.reply()
                talk.send(text)
                for _ in range(text.count("\n")):
                    talk.reply()
                self.assertTrue(talk.send(CLEAN + b".\r\n").reply().startswith("250"))
            found = self.session(node)["lint"]
            self.assertEqual([rule["rule"] for rule in found], rules)

    def test_early_talkers(self):
        node = self.web_node()
        sent = threading.Event()
        take = minimail.Listener.get_request

        def late(listener):
            if listener.name == "smtp":
                sent.wait(PATIENCE)
            return take(listener)
        with mock.patch.object(minimail.Listener, "get_request", late):
            with Talk(node.smtp_address) as talk:
                talk.send("EHLO c\r\n")
                sent.set()
                self.dialog(talk, "S: 220\nS: 250\nC: MAIL FROM:<a@x>\nC: RCPT TO:<bob@x>\nC: DATA\nS: 250\nS: 250\nS: 354")
                self.assertTrue(talk.send(CLEAN + b".\r\n").reply().startswith("250"))
        found = self.session(node)["lint"]
        self.assertEqual([rule["rule"] for rule in found], ["early-talker"])

    def test_a_message_is_judged_by_itself(self):
        """What a refused or abandoned message did wrong is not held against the next one."""
        bad = "C: Subject: =?bad?=\nC:\nC: " + "x" * 1500 + "\nC: .\n"
        start = "C: MAIL FROM:<a@x>\nC: RCPT TO:<bob@x>\nC: DATA\nS: 250\nS: 250\nS: 354\n"
        for faults, first in (*[(["end 451 x1"], start + bad + "S: 451")] * ("faults" in SECTIONS), ([], start + bad + "S: 250"),
                              ([], "C: MAIL FROM:<a@x>\nC: RCPT TO:<bob@x>\nC: BDAT 12\nC: Subject: x\nS: 250\nS: 250\nS: 250\nC: RSET\nS: 250")):
            node = self.web_node(faults=faults)
            with Talk(node.smtp_address) as talk:
                self.dialog(talk, "S: 220\nC: EHLO c\nS: 250\n" + first + "\n" + start)
                self.assertTrue(talk.send(CLEAN + b".\r\n").reply().startswith("250"))
            found = self.session(node)["lint"]
            self.assertEqual([rule["rule"] for rule in found], [], (faults, first))

    def test_pythons_own_client_does_nothing_wrong(self):
        node = self.web_node()
        message = email.message.EmailMessage()
        message["From"], message["To"], message["Subject"] = "a@x", "b@x", "Grüße " * 30
        message["Date"], message["Message-ID"] = email.utils.formatdate(), "<1@x>"
        message.set_content("hällo\n.dot\n" + "x" * 2000)
        with smtplib.SMTP(*node.smtp_address, timeout=PATIENCE) as client:
            client.login("a", "b")
            client.send_message(message)
        self.assertEqual(self.session(node)["lint"], [])


# ======================================================================================================================
# 20  Faults
# ======================================================================================================================

class FaultRules(WebCase):
    SMTP = (("connect", "", "220"), ("helo", "EHLO client.test", "250"),
            ("auth", "AUTH PLAIN " + base64.b64encode(b"\0ann@x\0pw").decode(), "235"), ("mail", "MAIL FROM:<ann@x.test>", "250"),
            ("rcpt", "RCPT TO:<bob@x.test>", "250"), ("data", "DATA", "354"), ("end", "hello\r\n.", "250"))
    POP3 = (("connect", "", "+OK"), ("pop3-login", "USER bob@x.test\r\nPASS x", "+OK"), ("pop3-retr", "RETR 1", "+OK"),
            ("pop3-quit", "QUIT", "+OK"))
    SUBJECTS = {"connect": "127.0.*", "helo": "CLIENT.*", "auth": "ann@?", "mail": "ann@x.*", "rcpt": "BOB@*", "data": "*", "end": "bob@x.test",
                "pop3-login": "bob@x.test", "pop3-retr": "bob@*", "pop3-quit": "*"}

    def reach(self, node, stage):
        """Lead a session to the command of a stage; return (connection, that command, the right answer)."""
        steps = self.POP3 if stage.startswith("pop3") else self.SMTP
        if stage.startswith("pop3") and not node.messages("bob@x.test"):
            self.deliver(node, b"hello\r\n", "bob@x.test")
        talk = Talk(node.pop3_address if stage.startswith("pop3") else node.smtp_address)
        self.addCleanup(talk.close)
        for name, command, answer in steps:
            if "\r\nPASS" in command:
                self.assertTrue(talk.ask(command.split("\r\n")[0]).startswith("+OK"))
                command = command.split("\r\n")[1]
            if name == stage:
                return talk, command, answer
            if command:
                talk.send(command + "\r\n")
            self.assertTrue(talk.reply().startswith(answer), command)
            if name == "pop3-retr":
                talk.listing()

    def answer(self, node, stage):
        talk, command, right = self.reach(node, stage)
        if command:
            talk.send(command + "\r\n")
        reply = talk.reply()
        talk.close()
        return reply, right

    STAGES = [stage for stage, _, _ in SMTP + POP3[1:] if "pop3" in SECTIONS or not stage.startswith("pop3")]

    def test_every_stage_with_every_action(self):
        for stage in self.STAGES:
            pattern = stage + "=" + self.SUBJECTS[stage]
            pop3 = stage.startswith("pop3")
            for rule, expected in ((pattern + " 451 4.7.1 not now", "-ERR" if pop3 else "451 4.7.1 not now"),
                                   (stage + " 552", "-ERR" if pop3 else "552"), (stage + " drop", "closed"), (pattern + " delay 0.05", None),
                                   (stage + "=nobody* drop", None), (stage + " drop x0", None)):
                with self.subTest(rule=rule):
                    node = self.web_node(faults=[rule], pop3=self.OPTIONS["pop3"], web="off", data=self.directory())
                    started = time.monotonic()
                    answer, right = self.answer(node, stage)
                    elapsed = time.monotonic() - started
                    if stage in ("connect", "helo") and expected and expected.startswith("451"):
                        expected = "451 not now"        # RFC 2034 section 4: no enhanced codes there
                    self.assertTrue(answer.startswith(right if expected is None else expected), answer)
                    if "delay" in rule:
                        self.assertGreaterEqual(elapsed, 0.045)
                    elif expected and stage == "end":
                        self.assertEqual(self.eventually(lambda: node.messages() == [] and not [
                            name for place, _, names in os.walk(os.path.join(node.data, "mail")) for name in names if "tmp" in place]), True)
                    elif expected and pop3:
                        self.assertEqual(len(node.messages("bob@x.test")), 1)
                    node.stop()

    def test_stall(self):
        """Nothing more is said, others are served, and neither holds up the end of the node."""
        for stage in self.STAGES:
            with self.subTest(stage=stage):
                node = self.web_node(faults=[stage + " stall x1"], pop3=self.OPTIONS["pop3"], web="off")
                talk, command, _ = self.reach(node, stage)
                if command:
                    talk.send(command + "\r\nNOOP\r\n")
                self.eventually(lambda: node.site.faults.rules[0].left == 0)
                if stage.startswith("pop3"):
                    self.dialog(node.pop3_address, "S: +OK\nC: USER other@x\nS: +OK\nC: PASS x\nS: +OK")
                else:
                    self.assertTrue(self.answer(node, stage)[0].startswith(("2", "3")))
                self.assertFalse(select.select([talk.sock], [], [], 0.01)[0])
                self.assertSoon(node.stop, 3)

    def test_stall_until_the_deadline(self):
        node = self.web_node(faults=["mail stall"], timeout=0.2)
        talk = self.talk(node.smtp_address)
        self.assertEqual(talk.ask("MAIL FROM:<a@x>"), "closed", "nothing is said, not even goodbye")

    def test_many_stall_and_others_go_on(self):
        node = self.web_node(faults=["mail=stalled@* stall"], web="off")
        for _ in range(40):
            self.talk(node.smtp_address).send("MAIL FROM:<stalled@x>\r\n")
        self.assertSoon(lambda: self.deliver(node, b"x\r\n", "b@x"), 3)
        self.assertSoon(node.stop, 5)

    def test_counts_and_order(self):
        node = self.web_node(faults=["rcpt=a* 451 greylisted x2", "rcpt=a@* 550 5.7.1 never x1", "rcpt=*@full.test 452 4.2.2 mailbox full"])
        for recipient, answer in (("b@x", "250"), ("a@x", "451 4.0.0 greylisted"), ("b@full.test", "452 4.2.2 mailbox full"), ("A@x", "451"),
                                  ("a@x", "550 5.7.1 never"), ("a@x", "250"), ("a@full.test", "452 4.2.2")):
            talk = self.talk(node.smtp_address)
            talk.ask("MAIL FROM:<m@x>")
            self.assertTrue(talk.ask("RCPT TO:<%s>" % recipient).startswith(answer), (recipient, answer))
            talk.close()

    def test_421_ends_the_session(self):
        for stage in ["connect", "mail", "end"] + ["pop3-login"] * HAS_POP3:
            node = self.web_node(faults=[stage + " 421 4.3.2 bye"], pop3=self.OPTIONS["pop3"], web="off")
            talk, command, _ = self.reach(node, stage)
            if command:
                talk.send(command + "\r\n")
            self.assertTrue(talk.reply().startswith(("421", "-ERR")))
            self.assertEqual(talk.reply(), "closed", stage)

    def test_patterns_see_every_recipient(self):
        for rule, answers in (("data=bob@* 451", "451"), ("end=bob@* 451", "354 451")):
            node = self.web_node(faults=[rule], web="off")
            talk = self.talk(node.smtp_address)
            for command in ("MAIL FROM:<a@x>", "RCPT TO:<first@x>", "RCPT TO:<bob@x>"):
                self.assertTrue(talk.ask(command).startswith("250"))
            with self.subTest(rule=rule):
                for command, answer in zip(("DATA", "x\r\n."), answers.split()):
                    self.assertTrue(talk.ask(command).startswith(answer))

    def test_greylisting_is_overcome(self):
        node = self.web_node(faults=["rcpt 451 4.7.1 greylisted x1"], web="off")
        with smtplib.SMTP(*node.smtp_address, timeout=PATIENCE) as client:
            with self.assertRaises(smtplib.SMTPRecipientsRefused):
                client.sendmail("a@x", ["b@x"], "x")
            client.sendmail("a@x", ["b@x"], "x")
        self.assertEqual(len(node.messages()), 1)

    def test_hide(self):
        node = self.web_node(faults=["hide SIZE", "hide auth", "hide UIDL"], pop3=self.OPTIONS["pop3"])
        greeting = self.talk(node.smtp_address).ask("EHLO x")
        self.assertNotRegex(greeting, "SIZE|AUTH")
        self.assertRegex(greeting, "PIPELINING")
        if not HAS_POP3:
            return
        talk = self.talk(node.pop3_address, hello=False)
        talk.reply()
        capabilities = talk.listing("CAPA")
        self.assertNotIn(b"UIDL", capabilities)
        self.assertIn(b"TOP", capabilities)

    BAD = ("", "rcpt", "nonsense 451", "rcpt 250 ok", "rcpt 354", "rcpt 999", "rcpt 45", "rcpt delay", "rcpt delay x", "rcpt delay -1", "rcpt explode",
           "hide", "hide a b", "RCPT=a 451", "rcpt x2", "rcpt= ", "drop")

    def test_rules_that_are_none(self):
        for rule in self.BAD:
            with self.assertRaises(ValueError, msg=rule) as caught:
                minimail.Node(faults=[rule])
            self.assertRegex(str(caught.exception), "fault")
        self.assertRaises(minimail.UsageError, minimail.Node, faults=[7])
        for argv, environ in ((["--fault", "rcpt explode"], {}), ([], {"MINIMAIL_FAULT": "rcpt explode"})):
            status, out, err = run_main(*argv, environ=environ)
            self.assertEqual((status, out, len(err.splitlines())), (2, "", 1))
            self.assertIn("rcpt explode", err)
            self.assertRegex(err, "--fault|MINIMAIL_FAULT")

    def test_as_an_option(self):
        program = Program("--data", os.path.join(self.directory(), "d"), "--smtp", "127.0.0.1:0", "--pop3", "off", "--web", "off", "--no-sync",
                          "--fault", "mail=a@x 451 one x1", "--fault", "mail 452 two")
        self.addCleanup(program.end)
        talk = self.talk(program.address("smtp"))
        for answer in ("451", "452", "452"):
            self.assertTrue(talk.ask("MAIL FROM:<a@x>").startswith(answer))
        self.assertEqual(program.end()[0], 0)
        self.assertIn("fault", program.log)

    @needs("web")
    def test_by_api(self):
        node = self.web_node()
        self.assertEqual(self.ask(node, "/api/v1/faults").json, [])
        rules = ["rcpt 451 x1", "hide SIZE"]
        for body in (rules, {"rules": rules}, [{"rule": rule} for rule in rules]):
            answer = self.ask(node, "/api/v1/faults", "PUT", body).json
            self.assertEqual(answer, [{"rule": "rcpt 451 x1", "left": 1}, {"rule": "hide SIZE", "left": None}])
        self.assertTrue(self.answer(node, "rcpt")[0].startswith("451"))
        self.assertEqual(self.ask(node, "/api/v1/faults").json[0]["left"], 0)
        self.assertTrue(self.answer(node, "rcpt")[0].startswith("250"))
        for wrong in [[rule] for rule in self.BAD] + ["x", 7, {}, {"rules": "rcpt 451"}, [[]], None, [None], [{"x": "rcpt 451"}]]:
            with self.subTest(wrong=wrong):
                self.ask(node, "/api/v1/faults", "PUT", wrong, status=400)
        self.ask(node, "/api/v1/faults", "PUT", b"{", status=400)
        self.assertEqual(len(self.ask(node, "/api/v1/faults").json), 2, "the rules before are still in force")
        self.ask(node, "/api/v1/faults", "DELETE")
        self.assertEqual(self.ask(node, "/api/v1/faults").json, [])
        self.assertIn("SIZE", self.talk(node.smtp_address).ask("EHLO x"))


# ======================================================================================================================
# 21  Letters: searching and waiting for them
# ======================================================================================================================

class WaitForMail(WebCase):
    def asleep(self, node):
        """Return how many wait for mail in this node, in Python or over HTTP."""
        inbox = node.site.inbox
        return len(node._arrived._waiters) + (len(inbox.changed._waiters) if inbox else 0)

    @needs("web")
    def test_by_http(self):
        node = self.web_node()
        self.deliver(node, b"Subject: early\r\n\r\nx\r\n", "b@x")
        self.assertEqual(self.ask(node, "/api/v1/wait?query=subject:early&timeout=9").json["Subject"], "early", "also if it came before")
        self.assertEqual(self.ask(node, "/api/v1/wait").json["Subject"], "early")
        results = [self.in_background(self.ask, node, "/api/v1/wait?query=to:c@x%20subject:late&timeout=120") for _ in range(3)]
        self.eventually(lambda: self.asleep(node) == 3)
        self.deliver(node, b"Subject: late\r\nTo: b@x\r\n\r\nx\r\n", "b@x")
        self.deliver(node, b"Subject: other\r\nTo: c@x\r\n\r\nx\r\n", "c@x")
        id = self.deliver(node, b"Subject: late\r\nTo: c@x\r\n\r\nx\r\n", "c@x")
        self.assertEqual([result().json["ID"] for result in results], [id] * 3)
        started = time.monotonic()
        self.ask(node, "/api/v1/wait?query=subject:never&timeout=0.1", status=404)
        self.assertLess(time.monotonic() - started, 5)
        for wrong in ("soon", "-1", "nan"):
            self.ask(node, "/api/v1/wait?query=x&timeout=" + wrong, status=400)
        self.ask(node, "/api/v1/wait?query=subject:never&timeout=0", status=404)

    @needs("web")
    def test_who_waits_does_not_hold_up_the_end(self):
        node = self.web_node()
        with Talk(node.web_address) as talk:
            talk.send("GET /api/v1/wait?query=subject:never&timeout=30 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.eventually(lambda: self.asleep(node) == 1)
            with self.assertLogs("minimail", "WARNING") as logs:
                minimail.log.warning("nothing else")
                self.assertSoon(node.stop, 4)
        self.assertEqual(len(logs.records), 1, logs.output)

    @needs("relay", "faults")
    def test_days_of_retries_pass_with_a_clock_of_ones_own(self):
        clock = Clock()
        clock.now = time.time()
        far = self.node(faults=["rcpt 451 x2"])
        near = self.node(domain=["near.test"], trust=["127.0.0.0/8"], smarthost="smtp://127.0.0.1:%d" % far.smtp_address[1],
                         retry=[86400, 86400], give_up=7 * 86400, clock=clock)
        self.deliver(near, b"Subject: late\r\n\r\nx\r\n", "bob@far.test")

        queue = near.stores.post.queue

        def attempts():
            return sum(entry.attempts for entry in queue.entries())
        for number in (1, 2):
            self.eventually(lambda number=number: attempts() == number, "it was tried, and waits")
            clock.now += 2 * 86400
            near.send_due()
        self.assertEqual(far.wait_for("bob@far.test", timeout=PATIENCE).email()["Subject"], "late")

    def test_in_python(self):
        node = self.node(web="off")
        result = self.in_background(node.wait_for, match="from:ann subject:\"the order\" -draft", timeout=PATIENCE)
        for subject, sender in ((b"the order", b"bob@x"), (b"an order", b"ann@x"), (b"the order, draft", b"ann@x")):
            self.deliver(node, b"From: %s\r\nSubject: %s\r\n\r\nx\r\n" % (sender, subject), "c@x")
        id = self.deliver(node, b"From: Ann <ann@x>\r\nSubject: The Order\r\n\r\nx\r\n", "c@x", "d@x")
        self.assertEqual(result().id, id)
        self.assertEqual(node.wait_for("d@x", match="from:ann").id, id)
        self.assertEqual(len(node.wait_for("c@x", match="subject:order", count=4)), 4)
        with self.assertRaises(TimeoutError):
            node.wait_for("d@x", match="from:bob", timeout=0)

    def wait(self, data, *arguments):
        process = subprocess.Popen([sys.executable, PROGRAM, "wait", "--data", data, *arguments], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.addCleanup(process.communicate)
        self.addCleanup(lambda: process.poll() is None and process.kill())
        return process

    def test_on_the_command_line(self):
        node = self.web_node(data=self.directory())
        html = (b"From: Shop <shop@x>\r\nSubject: Sign up\r\nContent-Type: multipart/alternative; boundary=b\r\n\r\n--b\r\n"
                b"Content-Type: text/plain; charset=utf-8\r\n\r\nh\xc3\xa4llo http://a.test/1\r\n--b\r\nContent-Type: text/html\r\n\r\n"
                b"<a href='http://a.test/2?a=1&amp;b=2'>x</a>\r\n--b--\r\n")
        processes = [self.wait(node.data, "--subject", "sign", "--print", "raw", "--timeout", "120"),
                     self.wait(node.data, "B@x", "--from", "shop", "--text", "hällo", "--print", "links", "--timeout", "120"),
                     self.wait(node.data, "c@x", "--timeout", "120")]
        self.deliver(node, b"Subject: other\r\n\r\nx\r\n", "b@x")
        self.assertTrue(all(process.poll() is None for process in processes))
        self.deliver(node, html, "b@x")
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes[:2]]
        self.assertEqual([process.returncode for process in processes[:2]], [0, 0])
        self.assertEqual(outputs, [node.messages()[1].read(), b"http://a.test/2?a=1&b=2\nhttp://a.test/1\n".replace(b"\n", os.linesep.encode())])
        self.deliver(node, b"x\r\n", "c@x")
        self.assertEqual((processes[2].communicate(timeout=PATIENCE)[0], processes[2].returncode), (b"", 0))
        for arguments, status, printed in (
                (["b@x", "--subject", "sign", "--print", "text"], 0, "hällo http://a.test/1"),
                (["--text", "HÄLLO", "--print", "links"], 0, "http://a.test/2?a=1&b=2\nhttp://a.test/1"), (["--subject", "sign"], 0, ""),
                (["--subject", "never", "--timeout", "0.01"], 1, ""), (["nobody@x", "--timeout", "0"], 1, ""), (["c@x", "--from", "shop", "--timeout", "0"], 1, "")):
            found, out, err = run_main("wait", "--data", node.data, *arguments)
            self.assertEqual((found, out, len(err.splitlines())), (status, printed + "\n" * bool(printed), status), arguments)
        status, out, _ = run_main("wait", "--data", node.data, "--subject", "sign", "--print", "json")
        self.assertEqual((status, json.loads(out)["Subject"], json.loads(out)["From"]["Address"]), (0, "Sign up", "shop@x"))
        self.assertNotIn("nobody", os.listdir(os.path.join(node.data, "mail", "x")))
        for wrong in (["--timeout", "soon"], ["--print", "nonsense"], ["b@@"], ["--nonsense"], ["b@x", "c@x"]):
            status, out, err = run_main("wait", "--data", node.data, *wrong)
            self.assertEqual((status, out, len(err.splitlines())), (2, "", 1), wrong)

    def test_a_terminal_gets_no_control_characters(self):
        view = minimail.View("Content-Type: text/plain; charset=utf-8\r\n\r\na\x1b[2J\u202e\r\nb\x9bc".encode())
        for terminal, shown in ((True, "a\\x1b[2J\\u202e\nb\\x9bc\n"), (False, "a\x1b[2J\u202e\r\nb\x9bc\n")):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                out.isatty = lambda terminal=terminal: terminal
                minimail.show_letter(mock.Mock(view=lambda: view), "text")
            self.assertEqual(out.getvalue(), shown)

    @needs("relay")
    def test_woken_by_another_process(self):
        node = self.node(data=self.directory())
        result = self.in_background(node.wait_for, match="subject:x", timeout=PATIENCE)
        self.eventually(lambda: self.asleep(node) == 1)
        process = subprocess.run([sys.executable, PROGRAM, "sendmail", "--data", node.data, "b@x"], input=b"Subject: x\n\nx\n", timeout=PATIENCE,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual((process.returncode, process.stdout), (0, b""))
        self.assertEqual(result().recipient, "b@x")

    def send_many(self, node, recipients):
        with smtplib.SMTP(*node.smtp_address, timeout=PATIENCE) as client:
            for recipient, subject in recipients:
                client.sendmail("a@x", [recipient], "Subject: %s\r\n\r\nx\r\n" % subject)

    def test_no_lost_wake_up(self):
        """Each message is sent when the one before was waited for: a wake-up lost would end this one in a timeout."""
        node = self.node(web="off")
        turn = threading.Semaphore(0)

        def wait():
            for number in range(200):
                turn.release()
                if node.wait_for("b@x", timeout=PATIENCE, count=number + 1)[-1].recipient != "b@x":
                    return False
            return True
        done = self.in_background(wait)
        with smtplib.SMTP(*node.smtp_address, timeout=PATIENCE) as client:
            for _ in range(200):
                turn.acquire(timeout=PATIENCE)
                client.sendmail("a@x", ["b@x"], "x")
        self.assertTrue(done())

    def test_many_wait_while_much_comes(self):
        node = self.web_node()
        other = self.node(data=node.data)
        waiting = [self.in_background(node.wait_for, "box%d@x" % box, timeout=PATIENCE, count=10, match=lambda message: message.size > 1) for box in range(20)]
        waiting += [self.in_background(node.wait_for, "box%d@x" % box, timeout=PATIENCE, match="subject:last") for box in range(0, 20, 4)]
        asking = [self.in_background(self.ask, node, "/api/v1/wait?query=to:box%d@x%%20subject:last&timeout=120" % box)
                  for box in range(0, 20, 5) if HAS_WEB]
        letters = [("box%d@x" % box, "last" if number == 9 else "x%d" % number) for number in range(10) for box in range(20)]
        sending = [self.in_background(self.send_many, (node, other)[half], letters[half::2]) for half in (0, 1)]
        self.assertEqual([len(result()) for result in waiting[:20]], [10] * 20)
        self.assertEqual([result().email()["Subject"] for result in waiting[20:]], ["last"] * 5)
        self.assertEqual([result().json["Subject"] for result in asking], ["last"] * 4 * HAS_WEB)
        for result in sending:
            result()
        self.assertEqual(len(node.messages()), 200)
        if HAS_WEB:
            self.assertEqual(self.ask(node, "/api/v1/messages").json["total"], 200)


# ======================================================================================================================
# 22  Web.  The API
# ======================================================================================================================

class WebAPI(WebCase):
    def test_list_and_pages(self):
        node = self.web_node()
        self.assertEqual(self.ask(node, "/api/v1/messages").json, {
            "total": 0, "unread": 0, "count": 0, "messages_count": 0, "messages_unread": 0, "start": 0, "tags": [],
            "messages": []})
        ids = [self.deliver(node, b"Subject: %d\r\n\r\nx\r\n" % i, "bob@x") for i in range(7)]
        answer = self.ask(node, "/api/v1/messages").json
        self.assertEqual([message["ID"] for message in answer["messages"]], ids[::-1], "newest first")
        for target, shown in (("start=0&limit=3", "654"), ("start=3&limit=3", "321"), ("start=6&limit=3", "0"), ("start=7", ""),
                              ("start=99999999999", "6543210"), ("limit=-1&start=x", "6543210"), ("limit=2", "65")):
            answer = self.ask(node, "/api/v1/messages?" + target).json
            self.assertEqual("".join(message["Subject"] for message in answer["messages"]), shown, target)
            self.assertEqual((answer["total"], answer["messages_count"], answer["count"]), (7, 7, len(shown)))
        self.ask(node, "/api/v1/message/" + ids[0])
        answer = self.ask(node, "/api/v1/search?query=is%3Aunread&start=4&limit=9").json
        self.assertEqual([answer[name] for name in ("total", "unread", "count", "messages_count", "messages_unread", "start")],
                         [7, 6, 2, 6, 6, 4])
        self.assertEqual(self.ask(node, "/api/v1/messages").headers["Content-Type"], "application/json")

    def test_an_entry(self):
        node = self.web_node()
        content = (b"From: =?utf-8?q?J=C3=BCrgen?= <j@example.net>\r\nTo: \"Bob, B.\" <bob@x>, eve@x\r\nCc: carl@x\r\n"
                   b"Reply-To: r@x\r\nSubject: a\r\n  folded one\r\nMessage-ID: <m@x>\r\n\r\n  first\r\n\r\nsecond <b>\r\n")
        id = self.deliver(node, content, "bob@x")
        entry, = self.ask(node, "/api/v1/messages").json["messages"]
        message, = node.messages()
        created = entry.pop("Created")
        self.assertRegex(created, r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}(Z|\+00:00)$")
        self.assertTrue(created.startswith(message.received_at.strftime("%Y-%m-%dT%H:%M:%S")))
        self.assertEqual(entry, {
            "ID": id, "MessageID": "m@x", "Read": False, "From": {"Name": "Jürgen", "Address": "j@example.net"},
            "To": [{"Name": "Bob, B.", "Address": "bob@x"}, {"Name": "", "Address": "eve@x"}],
            "Cc": [{"Name": "", "Address": "carl@x"}], "Bcc": [], "ReplyTo": [{"Name": "", "Address": "r@x"}],
            "Subject": "a folded one", "Username": "", "Tags": [], "Size": message.size, "Attachments": 0,
            "Snippet": "first second <b>"})

    def test_a_long_subject_is_cut_in_the_list(self):
        node = self.web_node()
        self.deliver(node, b"Subject: " + (b"x" * 900 + b"\r\n ") * 20 + b"end\r\n\r\nx\r\n", "bob@x")
        entry, = self.ask(node, "/api/v1/messages").json["messages"]
        self.assertEqual((len(entry["Subject"]), entry["Subject"][-10:]), (minimail.MAX_LINK + 9, "x... (cut)"))

    def test_one_entry_however_many_recipients(self):
        for transcripts in (True, False):
            with self.subTest(transcripts=transcripts):
                node = self.web_node(transcripts=transcripts, pop3="127.0.0.1:0")
                id = self.deliver(node, b"To: a@x\r\nCc: C <C@x>\r\nSubject: s\r\n\r\nx\r\n", "a@x", "c@x", "hidden@x", "b@y")
                self.assertEqual(self.ask(node, "/api/v1/wait?query=subject:s").json["ID"], id, "first seen in one mailbox")
                entry, = self.ask(node, "/api/v1/messages").json["messages"]
                self.assertEqual((entry["ID"], sorted(person["Address"] for person in entry["Bcc"])), (id, ["b@y", "hidden@x"]))
                self.assertEqual(self.found(node, "bcc:hidden"), ["s"])
                record = self.ask(node, "/api/v1/message/%s/session" % id).json
                self.assertEqual((sorted(record["recipients"]), record["sender"], sorted(record["bcc"])),
                                 (["a@x", "b@y", "c@x", "hidden@x"], "alice@example.net", ["b@y", "hidden@x"]))
                node.messages("a@x")[0].delete()
                self.assertEqual(self.found(node), ["s"], "the other copies are still there")
                self.ask(node, "/api/v1/messages", "DELETE", {"IDs": [id]})
                self.assertEqual((self.found(node), node.messages()), ([], []))

    def test_search(self):
        node = self.web_node()
        pdf = (b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nthe invoice\r\n--b\r\n"
               b"Content-Type: application/pdf; name=\"x.pdf\"\r\n\r\nx\r\n--b--\r\n")
        for subject, more, recipients in (
                (b"one", b"From: Ann Lee <ann@a.test>\r\nTo: bob@x\r\n\r\nred green\r\n", ["bob@x"]),
                (b"two", b"From: ben@b.test\r\nTo: ann@a.test\r\nCc: cc@x\r\n\r\nGREEN blue\r\n", ["ann@a.test", "cc@x"]),
                (b"three one", b"From: dan@b.test\r\nReply-To: rep@x\r\nTo: bob@x\r\n" + pdf, ["bob@x", "secret@x"]),
                (b"=?utf-8?q?vier_=C3=9C?=", b"From: dan@b.test\r\nMessage-ID: <id4@x>\r\nContent-Type: text/html\r\n\r\n"
                 b"<p>red &amp; <b>bold</b></p>\r\n", ["zoe@x"])):
            self.deliver(node, b"Subject: " + subject + b"\r\n" + more, *recipients)
        first = self.ask(node, "/api/v1/messages").json["messages"][-1]["ID"]
        self.ask(node, "/api/v1/message/" + first)
        names = {"1": "one", "2": "two", "3": "three one", "4": "vier Ü"}
        for query, expected in (
                ("from:ann", "1"), ("from:ANN@A.test", "1"), ('from:"ann lee"', "1"), ("to:ann", "2"), ("to:secret", "3"),
                ("to:cc", ""), ("cc:cc", "2"), ("bcc:secret", "3"), ("bcc:zoe", "4"), ("reply-to:rep", "3"),
                ("addressed:ann", "12"), ("subject:one", "13"), ('subject:"three one"', "3"), ("subject:ü", "4"), ("SUBJECT:TWO", "2"),
                ("message-id:id4", "4"), ("has:attachment", "3"), ("is:read", "1"), ("is:unread", "234"), ("green", "12"),
                ("green blue", "2"), ("-green", "34"), ("!green", "34"), ("-subject:one -from:dan", "2"), ("-from:b.test", "1"),
                ("red -bold", "1"), ('"red green"', "1"), ('-"red green" red', "4"), ("invoice", "3"), ("subject:one from:dan", "3"),
                ("-has:attachment from:dan", "4"), ("nothing", ""), ("bold", "4"), ("-is:read one", "3")):
            self.assertEqual(sorted(self.found(node, query)), sorted(names[number] for number in expected), query)
        for target in ("/api/v1/search", "/api/v1/search?query=", "/api/v1/search?query=%20"):
            self.ask(node, target, status=400)

    def test_a_message(self):
        node = self.web_node()
        content = (b"From: a@x\r\nTo: b@x\r\nSubject: s\r\nDate: Mon, 01 Jan 2024 10:00:00 +0200\r\nMIME-Version: 1.0\r\n"
                   b"X-Twice: 1\r\nX-Twice: 2\r\n"
                   b"Content-Type: multipart/mixed; boundary=o\r\n\r\n"
                   b"--o\r\nContent-Type: multipart/alternative; boundary=i\r\n\r\n"
                   b"--i\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n"
                   b"see http://t.test/a?b=3D1&c=3D2. caf=C3=A9\r\n"
                   b"--i\r\nContent-Type: text/html\r\n\r\n<a href=\"https://h.test/x?y=1&amp;z=2\">x</a> <img src=\"cid:pic\">\r\n--i--\r\n"
                   b"--o\r\nContent-Type: image/png\r\nContent-ID: <pic>\r\nContent-Transfer-Encoding: base64\r\n\r\niVBORw==\r\n"
                   b"--o\r\nContent-Type: application/zip\r\nContent-Disposition: attachment; filename=\"z.zip\"\r\n\r\nPK\r\n"
                   b"--o--\r\n")
        id = self.deliver(node, content, "b@x", sender="bounce@x")
        whole = self.ask(node, "/api/v1/message/" + id).json
        self.assertEqual(whole, self.ask(node, "/api/v1/message/latest").json)
        self.assertEqual((whole["ID"], whole["Subject"], whole["ReturnPath"]), (id, "s", "bounce@x"))
        self.assertEqual(email.utils.parsedate_to_datetime("Mon, 01 Jan 2024 10:00:00 +0200").isoformat(), whole["Date"])
        self.assertEqual(whole["Text"].strip(), "see http://t.test/a?b=1&c=2. café")
        self.assertIn("<img", whole["HTML"])
        self.assertEqual((whole["Links"], whole["Cut"], whole["Calendar"], whole["RemoteImages"], whole["Tree"]["ContentType"]),
                         (["https://h.test/x?y=1&z=2", "http://t.test/a?b=1&c=2"], [], [], False, "multipart/mixed"))
        picture, = whole["Inline"]
        self.assertEqual(picture, {"PartID": picture["PartID"], "FileName": picture["FileName"], "ContentType": "image/png",
                                   "ContentID": "pic", "Size": 4,
                                   "Checksums": {name: hashlib.new(name, b"\x89PNG").hexdigest()
                                                 for name in ("MD5", "SHA1", "SHA256")}})
        archive, = whole["Attachments"]
        self.assertEqual((archive["FileName"], archive["ContentType"], archive["Size"]), ("z.zip", "application/zip", 2))
        self.assertEqual(self.ask(node, "/api/v1/message/%s/part/%s" % (id, picture["PartID"])).body, b"\x89PNG")
        self.assertEqual(self.ask(node, "/api/v1/message/%s/part/%s" % (id, archive["PartID"])).body, b"PK")
        self.assertEqual(self.ask(node, "/api/v1/message/latest/links").json,
                         ["https://h.test/x?y=1&z=2", "http://t.test/a?b=1&c=2"])
        headers = self.ask(node, "/api/v1/message/%s/headers" % id).json
        self.assertEqual((headers["X-Twice"], headers["Subject"], headers["Return-Path"]), (["1", "2"], ["s"], ["<bounce@x>"]))
        view = self.ask(node, "/view/latest.html")
        self.assertIn("data:image/png;base64,iVBORw==", view.text)
        self.assertEqual((view.headers["Content-Type"], self.ask(node, "/view/%s.txt" % id).text.strip()),
                         ("text/html; charset=utf-8", whole["Text"].strip()))

    def test_raw_is_byte_for_byte(self):
        node = self.web_node()
        content = b"Subject: \xff\0\r\n\r\n" + bytes(i for i in range(256) if i not in b"\r\n") + b"\r\n.dot\r\n..\r\n\r\n\r\n"
        id = self.deliver(node, content, "b@x")
        raw = self.ask(node, "/api/v1/message/%s/raw" % id)
        self.assertEqual((raw.body, raw.headers["X-Content-Type-Options"]), (node.messages()[0].read(), "nosniff"))
        self.assertTrue(raw.headers["Content-Type"].startswith("text/plain"))
        self.assertEqual(body_of(raw.body), content)
        self.assertIn("%s.eml" % id, self.ask(node, "/api/v1/message/latest/raw?dl=1").headers["Content-Disposition"])
        self.assertEqual(self.ask(node, "/api/v1/messages").json["messages"][0]["Size"], len(raw.body))

    def test_the_latest(self):
        node = self.web_node()
        for target in ("", "/raw", "/headers", "/session", "/links", "/part/1"):
            self.ask(node, "/api/v1/message/latest" + target, status=404)
        self.ask(node, "/view/latest.html", status=404)
        for subject in (b"one", b"two"):
            self.deliver(node, b"Subject: %s\r\n\r\n%s text\r\n" % (subject, subject), "b@x")
        self.assertEqual(self.ask(node, "/api/v1/message/latest").json["Subject"], "two")
        self.assertEqual(self.ask(node, "/api/v1/message/latest?query=subject:one").json["Subject"], "one")
        self.assertEqual(self.ask(node, "/view/latest.txt").text.strip(), "two text")
        self.ask(node, "/view/latest.html", status=404)

    def test_parts_have_safe_names_and_types(self):
        node = self.web_node()
        for kind, name, shown, expected in (
                ("text/html", "x.html", False, "x.html"), ("image/svg+xml", "x.svg", False, "x.svg"),
                ("application/javascript", "x.js", False, "x.js"), ("text/xml", "x.xml", False, "x.xml"),
                ("image/png", "x.png", True, "x.png"), ("application/pdf", "../../etc/passwd", True, None),
                ("image/png; x", '..\\\\a\\"; b', True, None), ("application/zip", "r\xe9\u202e.zip", False, None),
                ("application/zip", "a:b/c\x01.zip", False, None), ("application/zip", "", False, None)):
            with self.subTest(kind=kind, name=name):
                self.deliver(node, ('Content-Type: %s\r\nContent-Disposition: attachment; filename="%s"\r\n\r\n<script>\r\n' % (
                    kind, name)).encode(), "b@x")
                file, = self.ask(node, "/api/v1/message/latest").json["Attachments"]
                part = self.ask(node, "/api/v1/message/latest/part/" + file["PartID"])
                self.assertEqual(part.headers["Content-Type"], kind.split(";")[0] if shown else "application/octet-stream")
                place = part.headers["Content-Disposition"]
                self.assertRegex(place, r"""^%s; filename="[\w .-]+"(; filename\*=UTF-8''[\w.%%~-]+)?$"""
                                 % ("inline" if shown else "attachment"))
                self.assertEqual(part.headers["X-Content-Type-Options"], "nosniff")
                self.assertRegex(part.headers["Content-Security-Policy"], r"default-src 'none'.*sandbox|sandbox.*default-src 'none'")
                if expected:
                    self.assertEqual(file["FileName"], expected)
                    self.assertIn('filename="%s"' % expected, place)

    def test_delete(self):
        node = self.web_node()
        ids = {}

        def fill():
            self.ask(node, "/api/v1/messages", "DELETE")
            self.assertEqual(self.found(node), [])
            ids.update((name, self.deliver(node, b"Subject: %s\r\n\r\nx\r\n" % name.encode(), "b@x")) for name in "abc")

        def delete(body, left, target="/api/v1/messages", kind="application/json", status=200):
            fill()
            body = body % ids if isinstance(body, str) else body
            self.ask(node, target, "DELETE", body.encode() if body is not None else None, status, {"Content-Type": kind})
            self.assertEqual("".join(sorted(self.found(node))), left, body)
        delete('{"IDs": ["%(a)s", "%(c)s"]}', "b")
        delete('{"IDs": ["%(a)s", "nonsense"]}', "bc")
        delete('{"IDs": ["nonsense"]}', "abc")
        delete('{"ids": ["%(a)s"]}', "bc")          # Mailpit takes keys in any case; it must never mean all
        delete('{"IDs": []}', "")
        delete(None, "")
        delete('{}', "")
        delete("IDs=%(a)s&IDs=%(b)s", "c", kind="application/x-www-form-urlencoded")
        delete("nonsense=1", "abc", kind="application/x-www-form-urlencoded", status=400)
        delete('{"IDs": "%(a)s"}', "abc", status=400)
        delete("[]", "abc", status=400)
        delete("{", "abc", status=400)
        delete("\xff", "abc", status=400)
        delete(None, "bc", target="/api/v1/search?query=subject:a")
        delete(None, "abc", target="/api/v1/search?query=", status=400)
        for query in ("is:starred", "-has:link", "older_than:1d", "before:soon", "subject:", "subject:a%20-to:",
                      "--", "-*", "!!x"):
            delete(None, "abc", target="/api/v1/search?query=" + query, status=400)
        delete(None, "abc", target="/api/v1/search", status=400)
        delete("[" * 100000, "abc", status=400)     # deeper than Python's recursion goes

    def test_read_state(self):
        node = self.web_node(data=self.directory())
        a, b = [self.deliver(node, b"Subject: %s\r\n\r\nx\r\n" % name, "b@x", "c@x") for name in (b"a", b"b")]

        def unread():
            return sorted(self.found(node, "is:unread"))
        self.ask(node, "/api/v1/message/%s/raw" % a)
        self.assertEqual(unread(), ["a", "b"], "only reading it as a message counts")
        self.assertTrue(self.ask(node, "/api/v1/message/" + a).json["Read"])
        self.assertEqual(unread(), ["b"])
        self.ask(node, "/api/v1/messages", "PUT", {"IDs": [a], "Read": False})
        self.assertEqual(unread(), ["a", "b"])
        self.ask(node, "/api/v1/messages", "PUT", b"IDs=%s&Read=true" % b.encode(), headers={
            "Content-Type": "application/x-www-form-urlencoded"})
        self.assertEqual(unread(), ["a"])
        self.ask(node, "/api/v1/messages", "PUT", {"Read": True})
        self.assertEqual(unread(), [])
        self.ask(node, "/api/v1/messages", "PUT", {"Search": "subject:b", "Read": False})
        self.assertEqual(unread(), ["b"])
        self.assertEqual(self.ask(node, "/api/v1/messages").json["unread"], 1)
        self.ask(node, "/api/v1/messages", "PUT", b"nonsense", status=400)
        node.stop()
        node.start()
        self.assertEqual(unread(), ["b"], "it is in the Maildir")

    def test_send(self):
        node = self.web_node()
        given = {"From": {"Email": "ann@x.test", "Name": "Änn, A."}, "To": [{"Email": "bob@x.test", "Name": "Bob"}],
                 "Cc": [{"Email": "cc@x.test"}], "Bcc": ["hidden@x.test"], "ReplyTo": [{"Email": "re@x.test"}],
                 "Subject": "Grüße", "Text": "hällo\n.dot\n", "HTML": "<p>hi</p>", "Headers": {"X-Own": "yes"},
                 "Attachments": [{"Filename": "ä.bin", "ContentType": "image/png", "Content": base64.b64encode(b"\0\xff").decode()},
                                 {"Filename": "c.gif", "ContentType": "image/gif", "ContentID": "c1", "Content": "R0lG"}]}
        id = self.ask(node, "/api/v1/send", "POST", given).json["ID"]
        self.assertEqual([message.recipient for message in node.messages()], ["bob@x.test", "cc@x.test", "hidden@x.test"])
        whole = self.ask(node, "/api/v1/message/" + id).json
        self.assertEqual((whole["From"], whole["Subject"], whole["Bcc"], whole["ReturnPath"]),
                         ({"Name": "Änn, A.", "Address": "ann@x.test"}, "Grüße", [{"Name": "", "Address": "hidden@x.test"}],
                          "ann@x.test"))
        self.assertEqual((whole["Text"].split(), whole["HTML"].strip()), (["hällo", ".dot"], "<p>hi</p>"))
        self.assertEqual(sorted((file["FileName"], file["Size"]) for file in whole["Attachments"] + whole["Inline"]),
                         [("c.gif", 3), ("ä.bin", 2)])
        raw = self.ask(node, "/api/v1/message/%s/raw" % id).body
        self.assertNotIn(b"hidden", body_of(raw))
        self.assertNotRegex(raw, rb"(?<!\r)\n")
        headers = self.ask(node, "/api/v1/message/%s/headers" % id).json
        self.assertEqual(headers["X-Own"], ["yes"])
        self.assertTrue(headers["Date"] and headers["Message-Id"])
        content = bytes(range(256))
        for size, encoding in ((998, b"7bit"), (999, b"quoted-printable"), (1000, b"quoted-printable")):
            given.update(Text="%s\na\n" % ("x" * size), HTML="", Attachments=[{"Filename": "n", "Content": " \r\n\t".join(
                base64.b64encode(content).decode())}])
            id = self.ask(node, "/api/v1/send", "POST", given).json["ID"]
            self.assertEqual(self.ask(node, "/api/v1/message/%s/part/2" % id).body, content)
            raw = self.ask(node, "/api/v1/message/%s/raw" % id).body
            self.assertIn(b"Content-Transfer-Encoding: " + encoding, raw)
            self.assertLessEqual(max(map(len, raw.split(b"\r\n"))), 998)
            self.assertIn("x" * size, self.ask(node, "/api/v1/message/" + id).json["Text"])
        good = {"From": {"Email": "a@x"}, "To": [{"Email": "b@x"}]}
        node.clear()
        for wrong in (
                {}, [], "x", 7, {"From": {"Email": "a@x"}}, {"To": [{"Email": "b@x"}]}, dict(good, From={"Email": "nonsense@@"}),
                dict(good, To=[{"Email": "a b@x y"}]), dict(good, To=7), dict(good, Subject="a\r\nBcc: c@x"),
                dict(good, Headers={"To": "z@x"}), dict(good, Headers={"X": "a\nb: c"}), dict(good, Headers={"X y: z\r\nq": "a"}),
                dict(good, Attachments=[{"Content": "%%%", "Filename": "x"}]), dict(good, Attachments=["x"]),
                dict(good, Headers=["x"]), dict(good, To=[{"Email": "b@x", "Name": "x\r\nX-In: y"}])):
            with self.subTest(wrong=wrong):
                self.assertTrue(self.ask(node, "/api/v1/send", "POST", wrong, status=400).json["Error"])
        self.ask(node, "/api/v1/send", "POST", b"{", status=400)
        self.assertEqual(node.messages(), [])
        self.assertEqual(os.listdir(os.path.join(node.data, "sessions")), [])

    def test_sending_obeys_the_rules_of_smtp(self):
        data = self.directory()
        with open(os.path.join(data, "users"), "w") as file:
            file.write("".join("%s@here.test:%s\n" % (name, minimail.hash_password("secret")) for name in ("ann", "bob")))
        node = self.web_node(domain="here.test", data=data, relay_to="good.test", route=["good.test=smtp://127.0.0.1:9"],
                             retry="3600")
        log_in = {"Authorization": "Basic " + base64.b64encode(b"ann@here.test:secret").decode()}

        def send(sender, recipient, status, headers=log_in):
            self.ask(node, "/api/v1/send", "POST", {"From": {"Email": sender}, "To": [{"Email": recipient}]}, status, headers)
        send("ann@here.test", "bob@here.test", 200)
        send("ann@here.test", "x@good.test", 200)
        send("ann@here.test", "bob@here.test", 400, {})
        send("ann@here.test", "nobody@here.test", 400)
        send("ann@here.test", "x@bad.test", 400)
        send("bob@here.test", "bob@here.test", 400)
        send("boss@elsewhere.test", "bob@here.test", 400)
        self.assertEqual(len(node.messages()), 1)

    def test_about_the_node(self):
        node = self.web_node(data=self.directory())
        self.deliver(node, b"x\r\n", "b@x", "c@x")
        info = self.ask(node, "/api/v1/info").json
        self.assertEqual((info["Messages"], info["Unread"], info["Database"]), (1, 1, node.data))
        self.assertIn(minimail.__version__, info["Version"])
        self.assertEqual(info["RuntimeStats"]["SMTPAccepted"], 1)
        for target in ("/livez", "/readyz"):
            self.assertEqual(self.ask(node, target).status, 200)
        metrics = self.ask(node, "/metrics")
        self.assertTrue(metrics.headers["Content-Type"].startswith("text/plain; version=0.0.4"))
        for line in metrics.text.splitlines():
            self.assertRegex(line, r"^# (TYPE|HELP) minimail_\w+ .*$|^minimail_\w+(\{.*\})? [\d.e+]+$")
        self.assertIn("\nminimail_messages_accepted_total 1\n", metrics.text)
        self.assertIn("\nminimail_messages 1\n", metrics.text)
        with mock.patch.object(os, "access", return_value=False):
            self.ask(node, "/readyz", status=503)
            self.ask(node, "/livez")
        relaying = self.web_node(domain="here.test")
        self.assertEqual("\nminimail_queue_entries 0\n" in self.ask(relaying, "/metrics").text, "relay" in SECTIONS)

    def test_what_is_not_there(self):
        node = self.web_node()
        self.deliver(node, b"x\r\n", "b@x")
        for target in ("/nonsense", "/api/v1/message/nonsense", "/api/v1/message/nonsense/raw", "/api/v1/message/latest/part/9",
                       "/api/v1/message/latest/part/x", "/view/nonsense.html", "/api/v2/messages", "/api/v1/message/", "//x"):
            self.ask(node, target, status=404)
        self.ask(node, "/api/v1/messages", "POST", status=404)
        self.ask(node, "/api/v1/chaos", status=400)
        self.assertIn(self.ask(node, "/api/v1/messages", "PATCH", status=None).status, (404, 405, 501))

    def test_a_mailbox_of_another_program(self):
        node = self.web_node()
        self.deliver(node, b"Subject: ours\r\n\r\nx\r\n", "b@x")
        new = os.path.dirname(node.messages()[0].path)
        with open(os.path.join(new, "1000000000.M1P2.host"), "wb") as file:
            file.write(b"Subject: theirs\n\nbare\n")
        self.assertEqual(self.eventually(lambda: len(self.found(node)) == 2 and self.found(node)), ["ours", "theirs"])
        whole = self.ask(node, "/api/v1/message/1000000000.M1P2.host").json
        self.assertEqual((whole["Subject"], whole["Text"]), ("theirs", "bare\n"))
        self.assertEqual(self.ask(node, "/api/v1/message/1000000000.M1P2.host/raw").body, b"Subject: theirs\n\nbare\n")


# ======================================================================================================================
# What is in a message
# ======================================================================================================================

class WebCharsets(WebCase):
    def test_in_headers_bodies_and_names(self):
        node = self.web_node()
        for charset, codec, text in (
                ("ISO-2022-JP", "iso2022_jp", "日本語のメール"), ("Shift_JIS", "cp932", "ソース表示①"), ("EUC-JP", "euc_jp", "日本語"),
                ("GB18030", "gb18030", "中文㐀邮件"), ("gb2312", "gb18030", "朱镕基囍"), ("Big5", "big5", "許功蓋"), ("KOI8-R", "koi8_r", "Привет"),
                ("windows-1251", "cp1251", "Ёлка"), ("ISO-8859-1", "latin-1", "Grüße"), ("UTF-8", "utf-8", "Ω≈ç√ 👍"), ("euc-kr", "euc_kr", "안녕")):
            with self.subTest(charset=charset):
                raw = text.encode(codec)
                word = b"=?%s?B?%s?=" % (charset.encode(), base64.b64encode(raw))
                plain = b"Content-Type: text/plain; charset=%s\r\n" % charset.encode()
                name = b"filename*=%s''%s.txt" % (charset.encode(), quote(raw).encode())
                self.deliver(node, b"From: %s <a@x>\r\nSubject: Re: %s\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n"
                             % (word, word) + plain + b"\r\n" + raw + b"\r\n--b\r\nContent-Type: text/html; charset=\"%s\"\r\n"
                             b"Content-Transfer-Encoding: base64\r\n\r\n" % charset.encode() + base64.b64encode(b"<p>" + raw)
                             + b"\r\n--b\r\nContent-Disposition: attachment; " + name + b"\r\n\r\nx\r\n--b--\r\n", "b@x")
                whole = self.ask(node, "/api/v1/message/latest").json
                self.assertEqual((whole["Subject"], whole["From"]["Name"], whole["From"]["Address"]), ("Re: " + text, text, "a@x"))
                self.assertEqual((whole["Text"].strip(), whole["HTML"].strip()), (text, "<p>" + text))
                file, = whole["Attachments"]
                self.assertEqual(file["FileName"], text + ".txt")
                self.assertIn("UTF-8''" + quote(text + ".txt"), self.ask(
                    node, "/api/v1/message/latest/part/" + file["PartID"]).headers["Content-Disposition"])
                self.assertIn(text, self.ask(node, "/view/latest.html").text)
                self.assertEqual(self.found(node, "subject:\"%s\"" % text)[:1], ["Re: " + text])

    def test_headers_as_they_come(self):
        node = self.web_node()
        for raw, shown in (
                (b"plain", "plain"), ("roh ü".encode(), "roh ü"), (b"latin \xfc", "latin ü"),
                (b"=?utf-8?q?J=C3=BC?= =?utf-8?q?rgen?=", "Jürgen"), (b"=?utf-8?b?w7w=?=\r\n =?iso-8859-1?q?=E4_x?= y", "üä x y"),
                (b"=?utf-8?b?4oI=?= =?utf-8?b?rA==?=", "€"), (b"=?utf-8*de?q?=C3=BC?=", "ü"), (b"=?nonsense?q?a?=", "=?nonsense?q?a?="),
                (b"=?utf-8?q?open", "=?utf-8?q?open"), (b"<script>alert(1)</script>", "<script>alert(1)</script>"), (b"", "")):
            with self.subTest(raw=raw):
                self.deliver(node, b"Subject: " + raw + b"\r\n\r\nx\r\n", "b@x")
                self.assertEqual(self.ask(node, "/api/v1/message/latest").json["Subject"], shown)
        for raw, name, address in (
                (b"=?utf-8?q?evil=40a.test=2C?= <real@b.test>", "evil@a.test,", "real@b.test"), (b"a@x", "", "a@x"),
                (b"\"Doe, J.\" <j@x>", "Doe, J.", "j@x"), ("Zoë <z@x>".encode(), "Zoë", "z@x"), (b"nonsense", None, None)):
            self.deliver(node, b"From: " + raw + b"\r\n\r\nx\r\n", "b@x")
            sender = self.ask(node, "/api/v1/message/latest").json["From"]
            if name is not None:
                self.assertEqual((sender["Name"], sender["Address"]), (name, address), raw)

    def test_names_of_files(self):
        node = self.web_node()
        for header, name in (
                (b"Content-Disposition: attachment; filename*0*=utf-8''%c3%bc; filename*1=ber; filename*2*=%c3%a4.pdf", "überä.pdf"),
                (b"Content-Disposition: attachment; filename=\"=?utf-8?q?=C3=BC.pdf?=\"", "ü.pdf"),
                (b"Content-Type: application/pdf; name=\"=?iso-2022-jp?B?GyRCRnxLXBsoQi5wZGY=?=\"", "日本.pdf"),
                (b"Content-Disposition: attachment; filename=\"" + "ü.pdf".encode() + b"\"", "ü.pdf"),
                (b"Content-Disposition: attachment; filename*=nonsense''%ff.pdf", "ÿ.pdf"),
                (b"Content-Disposition: attachment; filename=\"=?utf-8?q?..=2F..=2Fetc=2Fpasswd?=\"",
                 "../../etc/passwd")):
            with self.subTest(header=header):
                self.deliver(node, header + b"\r\n\r\nx\r\n", "b@x")
                file, = self.ask(node, "/api/v1/message/latest").json["Attachments"]
                self.ask(node, "/api/v1/message/latest/part/" + file["PartID"])
                self.assertEqual(file["FileName"], name)


class WebBrokenMessages(WebCase):
    MESSAGES = {
        "empty": b"", "no headers": b"hello\r\n", "only a header": b"Subject: x\r\n",
        "no boundary": b"Content-Type: multipart/mixed\r\n\r\n--x\r\n\r\nhello\r\n",
        "never closed": b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nhello\r\n--b\r\nContent-Type: text/html\r\n\r\n<p>",
        "deep": b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (i, i) for i in range(1500)),
        "unknown charset": b"Content-Type: text/plain; charset=nonsense\r\n\r\nhello \xff\r\n",
        "charset with NUL": b"Content-Type: text/plain; charset=\"a\0b\"\r\n\r\nhello\r\n",
        "charset undefined": b"Content-Type: text/plain; charset=undefined\r\n\r\nhello\r\n",
        "charset hex": b"Content-Type: text/plain; charset=hex\r\n\r\nhello\r\n",
        "charset idna": b"Content-Type: text/plain; charset=idna\r\n\r\nhello \xff..\r\n",
        "lone surrogate": b"Subject: =?utf-7?q?+2AA-?=\r\nContent-Type: text/plain; charset=utf-7\r\n\r\nhello +2AA-\r\n",
        "lone surrogate in HTML": b"Content-Type: text/html; charset=utf-7\r\n\r\nhello +2AA-\r\n",
        "lone surrogate in a name": b"Content-Type: application/x; name=\"=?utf-7?q?+2AA-?=\"\r\n\r\nhello\r\n",
        "base64": b"Content-Type: text/plain\r\nContent-Transfer-Encoding: base64\r\n\r\naGVsbG8\r\n%%%\r\n",
        "quoted-printable": b"Content-Type: text/plain\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\nhello =XX=\r\n",
        "uuencode": b"Content-Type: text/plain\r\nContent-Transfer-Encoding: x-uuencode\r\n\r\nbegin 644 x\r\nzzz\r\n",
        "zone of a date": b"Date: Mon, 1 Jan 2024 00:00:00 +99999999999999999\r\n\r\nhello\r\n",
        "year of a date": b"Date: Mon, 1 Jan 99999999999999999999999999 00:00:00 +0000\r\n\r\nhello\r\n",
        "date": b"Date: \xff yesterday\r\n\r\nhello\r\n",
        "8-bit everywhere": b"From: \xff\xfe <a@b>\r\nContent-Type: \xff\r\nContent-ID: \xff\r\nContent-Disposition: \xff; filename=\xff\r\n\r\n\xff\r\n",
        "parentheses": b"From: " + b"(" * 5000 + b"\r\nTo: " + b"<" * 5000 + b"\r\n\r\nhello\r\n",
        "RFC 2231": b"Content-Type: application/x; name*0*=x'y'%ff%zz; name*1=b; name*9999999999=c\r\n\r\nx\r\n",
        "message in a message": b"Content-Type: message/rfc822\r\n\r\nSubject: \xff\r\nContent-Type: text/plain; charset=x\r\n\r\n\xff\r\n",
        "encoded message": b"Content-Type: message/rfc822\r\nContent-Transfer-Encoding: base64\r\n\r\n\xff\xfe\r\n",
        "delivery status": b"Content-Type: message/delivery-status\r\n\r\na: b\r\n\r\nc: d\r\n",
        "many parts": b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\nx\r\n" * 5000,
    }

    def test_they_show_what_they_can_and_break_nothing(self):
        node = self.web_node()
        for name, content in self.MESSAGES.items():
            with self.subTest(name=name):
                node.clear()
                self.deliver(node, b"Subject: good\r\n\r\ngood\r\n", "b@x")
                self.deliver(node, content, "b@x")
                self.assertEqual(len(self.ask(node, "/api/v1/messages").json["messages"]), 2)
                self.assertEqual(self.found(node, "good"), ["good"])
                whole = self.ask(node, "/api/v1/message/latest").json
                shown = (whole["Text"] + whole["HTML"]).encode("utf-8", "replace").decode()
                if b"hello" in content and not whole["Attachments"]:
                    self.assertIn("hello", shown)
                self.ask(node, "/view/latest.txt")
                self.ask(node, "/view/latest.html", status=200 if whole["HTML"] else 404)
                for file in whole["Attachments"][:3] + whole["Inline"][:3]:
                    self.ask(node, "/api/v1/message/latest/part/" + file["PartID"])
                for more in ("headers", "raw", "session", "links"):
                    self.ask(node, "/api/v1/message/latest/" + more)
                self.assertEqual(node.wait_for(match="subject:good", timeout=0).email()["Subject"], "good")

    def test_none_takes_long(self):
        node = self.web_node()
        for name, content in (("word", b"Subject: " + b"=?x" * 20000 + b"\r\n\r\nx\r\n"),
                              ("style", b"Content-Type: text/html\r\n\r\n" + b"<style\r\n" * 8000),
                              ("less", b"Content-Type: text/html\r\n\r\n" + b"<<<<<<<<<<<<<<<<<<\r\n" * 2500),
                              ("parentheses", b"To: " + b"a@x,(" * 10000 + b"\r\n\r\nx\r\n"),
                              ("href", b"Content-Type: text/html\r\n\r\n" + b"href = \r\n" * 8000)):
            with self.subTest(name=name):
                self.assertSoon(lambda: self.deliver(node, content, "b@x"), 0.5)
                self.assertSoon(lambda: self.ask(node, "/api/v1/messages"), 0.5)
                self.assertSoon(lambda: self.ask(node, "/api/v1/message/latest/links"), 0.5)
                node.clear()


# ======================================================================================================================
# The page: what can be told from its text (what it does in a browser is tried by .ci/check_web.py)
# ======================================================================================================================

class ThePage(WebCase):
    """HTML, style and script of the inbox fit together, and the script keeps to what makes hostile mail harmless."""
    html, script = minimail.PAGE.split("<script", 1)
    style = html.partition("<style")[2].partition("</style>")[0]

    def test_ids(self):
        """What script and style name is there, once."""
        ids = re.findall(r'\bid="([\w-]+)"', self.html)
        self.assertEqual(sorted(set(ids)), sorted(ids))
        made = set(re.findall(r'id: "([\w-]+)"', self.script)) | {"tab-Lint"}
        used = set(re.findall(r'\$\("([\w-]+)"\)', self.script)) | set(re.findall(r"#([a-z][\w-]*)(?=[^;{}]*\{)", self.style))
        self.assertEqual(used - set(ids) - made - {"row-"}, set())
        named = set(re.findall(r'(?:for|aria-labelledby)="([\w-]+)"', self.html))
        self.assertLessEqual(named, set(ids))

    def test_classes(self):
        """Every class that the style knows is given by the page or the script."""
        rules = re.sub(r"\{[^{}]*\}", " ", self.style)
        for name in set(re.findall(r"\.([a-zA-Z][\w-]*)", rules)):
            self.assertRegex(self.html.replace(self.style, "") + self.script, r'["\s]%s["\s]' % name)

    def test_questions_are_answered(self):
        """Every path that the script asks is one of the API's."""
        node = self.web_node()
        id = self.deliver(node, b"Subject: s\r\nContent-Type: text/html\r\n\r\n<p>x\r\n", "b@x")
        paths = set(re.findall(r'"(api/v1/[a-z]+)[?"]', self.script))
        self.assertLessEqual({"api/v1/messages", "api/v1/info"}, paths)
        for path in paths - {"api/v1/messages"}:
            self.assertNotEqual(self.ask(node, "/" + path + "?query=x", status=None).status, 404, path)
        for path in set(re.findall(r'path(?:Of\(.*?\))? \+ "(/[a-z]+)["?]', self.script)) - {"/release"}:
            self.assertNotEqual(self.ask(node, "/api/v1/message/" + id + path, status=None).status, 404, path)
        self.ask(node, "/view/%s.html" % id)

    def test_frame(self):
        """HTML mail may open windows, and nothing else: no script, no form, no origin."""
        self.assertEqual(re.findall(r'"sandbox", "(.*?)"', self.script), ["allow-popups allow-popups-to-escape-sandbox"])
        self.assertEqual(self.script.count('"iframe", {'), 1)

    def test_links(self):
        """The one place that makes links to elsewhere opens windows that know nothing of this one; no name is asked for before."""
        self.assertEqual(len(re.findall("_blank", self.script)), 1)
        self.assertIn('target: "_blank", rel: "noreferrer"', self.script)
        self.assertIn('<meta http-equiv="x-dns-prefetch-control" content="off">', self.html)

    def test_one_stream(self):
        """Seven windows of one browser have one connection for events, not one each."""
        self.assertEqual(self.script.count("new EventSource("), 1)
        self.assertLess(self.script.index("navigator.locks.request"), self.script.rindex("listen();"))

    def test_script_is_linear(self):
        """A regular expression of the page has no two quantifiers that could share out the same text (and a browser tries them)."""
        found = re.findall(r"(?<=[(,])/((?:[^/\\\n\[]|\\.|\[[^\]\n]*\])+)/[a-z]*(?=[,).])", self.script)
        self.assertGreater(len(found), 2)
        for pattern in found:
            self.assertNotRegex(pattern, r"[+*]\)[+*{]|[.\]][*+][^$]*[.\]][*+]", pattern)
        self.assertNotIn("new RegExp", self.script)


# ======================================================================================================================
# Mail is hostile, and so are other sites
# ======================================================================================================================

class WebSecurity(WebCase):
    def test_the_page(self):
        node = self.web_node()
        one, two = self.ask(node, "/"), self.ask(node, "/")
        policies = []
        for page in (one, two):
            policy = dict(item.strip().partition(" ")[::2] for item in page.headers["Content-Security-Policy"].split(";"))
            policies.append(policy)
            self.assertEqual([policy[name] for name in ("default-src", "frame-ancestors", "base-uri", "form-action", "connect-src")],
                             ["'none'", "'none'", "'none'", "'none'", "'self'"])
            nonce = re.fullmatch(r"'nonce-([\w-]{20,})'", policy["script-src"]).group(1)
            self.assertIn(nonce, policy["style-src"])
            self.assertNotIn("unsafe", page.headers["Content-Security-Policy"])
            scripts = re.findall(r"<(?:script|style)\b([^>]*)>", page.text)
            self.assertEqual(set(scripts), {' nonce="%s"' % nonce})
            self.assertEqual([page.headers[name] for name in ("X-Content-Type-Options", "X-Frame-Options", "Cache-Control",
                                                              "Referrer-Policy", "Content-Type")],
                             ["nosniff", "DENY", "no-store", "no-referrer", "text/html; charset=utf-8"])
        self.assertNotEqual(policies[0]["script-src"], policies[1]["script-src"], "a nonce is used once")
        text = re.sub(r"http://www\.w3\.org/\S+", "", one.text)
        self.assertNotRegex(text, r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""")
        self.assertNotRegex(text, r"innerHTML|insertAdjacentHTML|document\.write|\son\w+=\"|eval\(")
        self.assertRegex(text, r'<html lang="\w+"')

    def test_html_can_do_nothing(self):
        node = self.web_node()
        self.deliver(node, b"Content-Type: text/html\r\n\r\n<script>alert(1)</script><img src=\"http://t.test/x\">\r\n", "b@x")
        for query, images in (("", "data:"), ("?images=1", "data: http: https:")):
            view = self.ask(node, "/view/latest.html" + query)
            policy = dict(item.strip().partition(" ")[::2] for item in view.headers["Content-Security-Policy"].split(";"))
            self.assertEqual([policy[name] for name in ("sandbox", "default-src", "img-src", "form-action", "frame-ancestors")],
                             ["allow-popups allow-popups-to-escape-sandbox", "'none'", images, "'none'", "'self'"])
            self.assertFalse({"script-src", "connect-src", "frame-src", "object-src"} & set(policy) or "http" in policy["style-src"])
            self.assertEqual((view.headers["X-Content-Type-Options"], view.headers["Cache-Control"]), ("nosniff", "no-store"))
        for target in ("/view/latest.txt", "/api/v1/message/latest/raw", "/api/v1/messages", "/nonsense"):
            answer = self.ask(node, target, status=None)
            self.assertEqual((answer.headers["X-Content-Type-Options"], answer.headers["Cache-Control"]), ("nosniff", "no-store"))
            self.assertNotIn("html", answer.headers["Content-Type"])
            self.assertIsNone(answer.headers["Access-Control-Allow-Origin"])

    def test_only_images_come_along(self):
        node = self.web_node()
        self.deliver(node, b"Content-Type: multipart/related; boundary=b\r\n\r\n--b\r\nContent-Type: text/html\r\n\r\n"
                     b"<iframe src=\"cid:p\"></iframe><img src=\"cid:s\">\r\n--b\r\nContent-Type: text/html; name=x\r\nContent-ID: <p>\r\n\r\n"
                     b"<script>\r\n--b\r\nContent-Type: image/svg+xml\r\nContent-ID: <s>\r\n\r\n<svg/>\r\n--b--\r\n", "b@x")
        shown = self.ask(node, "/view/latest.html").text
        self.assertNotIn("data:text", shown)
        self.assertEqual(re.findall('<(\\w+) src="data:([^;]*)', shown), [("img", "image/svg+xml")])

    def test_host_names(self):
        """DNS rebinding: a page of evil.test, now at 127.0.0.1, may read nothing."""
        node = self.web_node(hostname="mail.example.org")
        port = ":%d" % node.web_address[1]
        for host in ("127.0.0.1" + port, "localhost", "LOCALHOST" + port, "[::1]" + port, "inbox.localhost", "mail" + port,
                     "mail.example.org" + port, "Mail.Example.Org", "192.0.2.7"):
            self.ask(node, "/api/v1/messages", headers={"Host": host})
        for host in ("evil.test", "evil.test" + port, "127.0.0.1.evil.test", "localhost.evil.test", "mail.example.org.evil.test",
                     "example.org", "x.mail.example.org", "evil.test:80:80", "[::1].evil.test", "1.2.3.4x.test"):
            for target in ("/", "/api/v1/messages", "/view/latest.html", "/api/events", "/metrics"):
                self.ask(node, target, status=403, headers={"Host": host})

    def test_other_sites(self):
        node = self.web_node()
        own = "http://%s:%d" % node.web_address
        self.deliver(node, b"x\r\n", "b@x")
        for headers in ({"Origin": "http://evil.test"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}, {"Origin": own + ".evil.test"},
                        {"Origin": ""}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
                        {"Origin": own, "Sec-Fetch-Site": "cross-site"}):
            for method, target in (("DELETE", "/api/v1/messages"), ("PUT", "/api/v1/messages"), ("POST", "/api/v1/send"),
                                   ("PUT", "/api/v1/faults"), ("DELETE", "/api/v1/faults"), ("DELETE", "/api/v1/search?query=x")):
                self.ask(node, target, method, b"", 403, headers)
        self.assertEqual(len(node.messages()), 1)
        for headers in ({"Origin": "http://evil.test"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
                        {"Sec-Fetch-Site": "same-site"}, {"Origin": own, "Sec-Fetch-Site": "cross-site"}):
            for method in ("GET", "HEAD", "OPTIONS"):      # how long an answer takes can be read there
                for target in ("/", "/api/v1/messages", "/api/v1/message/latest", "/api/v1/wait?timeout=0", "/api/events", "/livez"):
                    self.ask(node, target, method, status=403, headers=headers)
        self.assertEqual(self.ask(node, "/api/v1/messages").json["unread"], 1)
        follow = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        for target, status in (("/", 200), ("/view/latest.txt", 200), ("/api/v1/message/latest", 403), ("/api/v1/messages", 403)):
            self.ask(node, target, status=status, headers=follow)
        for wrong in ({"Sec-Fetch-Dest": "iframe"}, {"Sec-Fetch-Mode": "no-cors"}, {"Origin": "http://evil.test"}):
            self.ask(node, "/", status=403, headers=dict(follow, **wrong))
        self.ask(node, "/api/v1/messages", "PUT", {"Read": True}, headers={"Origin": own, "Sec-Fetch-Site": "same-origin"})
        self.ask(node, "/api/v1/messages", "DELETE", headers={"Sec-Fetch-Site": "none"})
        self.assertEqual(node.messages(), [])

    def test_no_path_leads_outside(self):
        node = self.web_node(data=self.directory())
        self.deliver(node, b"x\r\n", "b@x")
        secret = os.path.join(node.data, "secret.json")
        with open(secret, "w") as file:
            file.write('"root:secret"')
        for id in ("..", "../secret", "..%2fsecret", "%2e%2e%2fsecret", "..%5csecret", "%252e%252e%252fsecret", "../../secret%00",
                   "/etc/passwd", "%2fetc%2fpasswd", "..%2f..%2fsecret.json", "secret", "%ff%fe", "%0d%0aX:%20y"):
            for target in ("/api/v1/message/%s", "/api/v1/message/%s/raw", "/api/v1/message/%s/session", "/view/%s.html", "/view/%s.txt",
                           "/%s", "/api/v1/message/latest/part/%s"):
                answer = self.ask(node, target % id, status=404)
                self.assertNotIn(b"root:", answer.body)
            self.ask(node, "/api/v1/messages", "DELETE", {"IDs": [id, "../" + id]})
            self.ask(node, "/api/v1/messages", "PUT", {"IDs": [id], "Read": True})
        self.assertTrue(os.path.exists(secret))
        self.assertEqual(len(node.messages()), 1)

    def raw(self, node, request):
        """Return the status line that answers bytes."""
        with Talk(node.web_address) as talk:
            return talk.send(request).line()

    def test_what_no_client_sends(self):
        node = self.web_node()
        head = b"POST /api/v1/send HTTP/1.1\r\nHost: localhost\r\n"
        with mock.patch.object(minimail, "ROUTES", [route._replace(body=min(route.body, 1000)) for route in minimail.ROUTES]):
            for more, code in ((b"Content-Length: 1001", "413"), (b"Content-Length: " + b"9" * 5000, "4"), (b"Content-Length: -1", "4"),
                               (b"Content-Length: 1e3", "4"), (b"Content-Length: \xb2", "4"),
                               (b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001, "413"), (b"Content-Length: 0", "400"),
                               (b"Transfer-Encoding: chunked\r\n\r\nx", "400"), (b"Transfer-Encoding: chunked\r\n\r\n-1", "400")):
                self.assertRegex(self.raw(node, head + more + b"\r\n\r\n"), "^HTTP/1.1 " + code)
        for request in (b"GET http://[/ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /%zz HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET * HTTP/1.1\r\n\r\n",
                        b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", b"\x16\x03\x01 x\r\n\r\n", b"GET / HTTP/9\r\n\r\n",
                        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"GET /?%ff=%ff&&;=&%00 HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            self.assertRegex(self.raw(node, request), r"^HTTP/1\.[01] (200|4\d\d|505) |^(?!.*HTTP/1).*Error|<!DOCTYPE|400", request[:60])
        self.ask(node, "/livez")

    def test_head_and_keep_alive(self):
        node = self.web_node()
        with contextlib.closing(http.client.HTTPConnection(*node.web_address, timeout=PATIENCE)) as connection:
            connection.connect()
            sock = connection.sock
            for method, target, status in (("GET", "/", 200), ("HEAD", "/", 200), ("GET", "/nonsense", 404), ("HEAD", "/nonsense", 404),
                                           ("DELETE", "/api/v1/messages", 200), ("POST", "/api/v1/send", 400), ("GET", "/livez", 200)):
                connection.request(method, target)
                response = connection.getresponse()
                body = response.read()
                self.assertEqual((response.status, len(body)), (status, 0 if method == "HEAD" else int(response.headers["Content-Length"])))
                self.assertIs(connection.sock, sock, "one connection for all")
            connection.request("GET", "/livez", headers={"Connection": "close"})
            self.assertEqual(connection.getresponse().read(), b"")
        length = {method: self.ask(node, "/api/v1/messages", method).headers["Content-Length"] for method in ("GET", "HEAD")}
        self.assertEqual(length["GET"], length["HEAD"])
        with Talk(node.web_address) as talk:
            talk.send("GET /livez HTTP/1.0\r\n\r\n")
            self.assertIn(" 200 ", talk.line())
            self.assertTrue(talk.file.read() is not None, "closed after one answer")

    def outside(self):
        return mock.patch.object(minimail, "is_loopback", lambda host: False)

    def test_log_in(self):
        data = self.directory()
        with open(os.path.join(data, "users"), "w") as file:
            file.write("bob@x.test:%s\n" % minimail.hash_password("ü:secret"))

        def basic(text):
            return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}
        node = self.web_node(data=data)
        self.ask(node, "/api/v1/messages")      # on loopback nobody is asked
        with self.outside(), mock.patch.object(minimail.Throttle, "delay", return_value=0.0):
            for target in ("/", "/api/v1/messages", "/view/latest.html", "/api/events", "/metrics", "/nonsense"):
                answer = self.ask(node, target, status=401)
                self.assertRegex(answer.headers["WWW-Authenticate"], "^Basic realm=")
            for wrong in (basic("bob@x.test:wrong"), basic("bob@x.test:"), basic("eve@x.test:ü:secret"), basic("nonsense"), basic(""),
                          {"Authorization": "Basic %%%"}, {"Authorization": "Bearer x"}, {"Authorization": "Basic"},
                          {"Authorization": "Basic /w=="}):
                self.ask(node, "/api/v1/messages", status=401, headers=wrong)
            self.ask(node, "/api/v1/messages", "DELETE", status=401)
            for _ in range(10):
                node.site.throttle.refund("127.0.0.1", "bob@x.test")
            self.ask(node, "/api/v1/messages", headers=basic("bob@x.test:ü:secret"))
            self.ask(node, "/", headers=basic("BOB@x.test:ü:secret"))
            for _ in range(minimail.LOGIN_FAILURES):
                node.site.throttle.charge("127.0.0.1", "bob@x.test")
            self.ask(node, "/", status=401, headers=basic("bob@x.test:ü:secret"))      # too many wrong ones
        node.stop()
        node = self.web_node()
        with self.outside():
            self.ask(node, "/api/v1/messages")      # capture mode without accounts: there is nobody to log in as

    def test_probes_need_no_log_in(self):
        node = self.web_node(domain="x.test")
        with self.outside():
            self.ask(node, "/livez")
            self.ask(node, "/readyz")

    def test_what_decides_is_where_the_client_came_in(self):
        node = self.web_node(domain="x.test", web="0.0.0.0:0")
        asked = []

        def is_loopback(host):
            asked.append(host)
            return True
        with mock.patch.object(minimail, "is_loopback", is_loopback):
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", node.web_address[1], timeout=PATIENCE)) as connection:
                connection.request("GET", "/livez")
                self.assertEqual(connection.getresponse().status, 200)
        self.assertNotIn("0.0.0.0", asked)

    def test_off_by_default_with_domains(self):
        for options, there in (([], True), (["--domain", "x.test"], False), (["--domain", "x.test", "--web", "127.0.0.1:0"], True),
                               (["--web", "off"], False)):
            with mock.patch.object(minimail.Node, "from_config", side_effect=minimail.CannotRun(1, "enough")) as from_config:
                self.assertEqual(run_main("--data", "nowhere", *options)[0], 1)
            self.assertEqual(bool(from_config.call_args[0][0].web), there, options)
        self.assertFalse(minimail.Node(domain="x.test").config.web or minimail.Node().config.web)


class WebRequests(WebCase):
    """How requests come in: their framing, their size, their time, their number."""

    def answer(self, node, *pieces):
        """Return (status, body) of the first answer to bytes that come in pieces, and whether the connection then ends."""
        with Talk(node.web_address) as talk:
            for piece in pieces:
                talk.send(piece)
            status = int(talk.line().split()[1])
            headers = dict(line.lower().split(": ", 1) for line in iter(talk.line, ""))
            body = talk.file.read(int(headers.get("content-length", 0)))
            talk.sock.shutdown(socket.SHUT_WR)
            return status, body, headers.get("connection") == "close"

    HEAD = b"PUT /api/v1/messages HTTP/1.1\r\nHost: localhost\r\n"

    def test_a_file_is_closed_where_not_even_the_head_of_its_answer_can_be_sent(self):
        class Gone(minimail.WebSession):
            command, close_connection, allowed_origin = "GET", True, ""

            def __init__(self):
                pass

            def send_head(self, answer):
                raise BrokenPipeError
        with tempfile.TemporaryFile() as file:
            self.assertRaises(BrokenPipeError, Gone().give, minimail.Answered(200, "text/plain", file=file))
            self.assertTrue(file.closed)

    def test_only_one_reading(self):
        """RFC 9112 sections 5 and 6.3: what two parsers could read differently is refused, and nothing after it is done."""
        node = self.web_node()
        self.deliver(node, b"x\r\n", "b@x")
        hidden = b"DELETE /api/v1/messages HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for fields in (b"Content-Length: 2\r\nContent-Length: 2\r\n", b"Content-Length: 2\r\nContent-Length: 90\r\n",
                       b"Content-Length: 2, 2\r\n", b"Content-Length: +2\r\n", b"Content-Length: 0x2\r\n", b"Content-Length: 2 2\r\n",
                       b"Content-Length: \r\n", b"Content-Length : 2\r\n", b" Content-Length: 2\r\n", b"Content-Length\t: 2\r\n",
                       b"Transfer-Encoding : chunked\r\nContent-Length: 2\r\n", b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n",
                       b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n",
                       b"Transfer-Encoding: gzip, chunked\r\n", b"Transfer-Encoding: xchunked\r\n", b"Transfer-Encoding: \x0bchunked\r\n",
                       b"X: y\r\n Transfer-Encoding: chunked\r\n", b"X: y\rContent-Length: 2\r\n", b"X: y\nContent-Length: 2\r\n",
                       b"X: \0\r\n", b"no field\r\n", b": x\r\n", b"X\xc3\xbc: y\r\n", b"Host: other\r\n", b"\rX: y\r\n"):
            status, _, ends = self.answer(node, self.HEAD + fields + b"\r\n{}" + hidden)
            self.assertIn(status, (400, 501), fields)
            self.assertTrue(ends, fields)
        for line in (b"GET /\r\n\r\n", b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", b"get / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\nHost: x\n\n",
                     b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", b"GET /\tHTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
            self.assertEqual(self.answer(node, line)[::2], (400, True), line)
        self.assertEqual(len(node.messages()), 1)
        self.assertEqual(self.answer(node, self.HEAD + b"Content-Length: 2\r\n\r\n{}")[0], 200)
        self.assertEqual(self.answer(node, b"GET http://localhost/api/v1/info HTTP/1.1\r\nHost: localhost\r\n\r\n")[0], 200)
        self.assertEqual(self.answer(node, b"GET http://evil.test/api/v1/info HTTP/1.1\r\nHost: localhost\r\n\r\n")[0], 403)

    def test_chunks(self):
        node = self.web_node()
        given = json.dumps({"From": "a@x", "To": ["b@x"], "Subject": "in pieces", "Text": "x" * 100000}).encode()
        head = b"POST /api/v1/send HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: Chunked\r\n\r\n"
        for size in (7, 1000, len(given)):
            chunks = [b"%x;a=b\r\n%s\r\n" % (len(given[at:at + size]), given[at:at + size]) for at in range(0, len(given), size)]
            status, body, ends = self.answer(node, head, *chunks, b"0\r\nTrailer: x\r\n\r\n")
            self.assertEqual((status, ends), (200, False), body)
        self.assertEqual(self.found(node), ["in pieces"] * 3)
        for wrong in (b"5\r\nhello0\r\n\r\n", b"g\r\n", b"\r\n", b"0x1\r\na\r\n0\r\n\r\n", b"1\na\r\n", b"123456789\r\n", b"1 \x01\r\na\r\n",
                      b"2\r\n{}\r\n0\r\n folded\r\n\r\n", b"1" * 2000):
            self.assertEqual(self.answer(node, head + wrong)[::2], (400, True), wrong)
        with contextlib.closing(http.client.HTTPConnection(*node.web_address, timeout=PATIENCE)) as connection:
            connection.request("POST", "/api/v1/send", iter([given[:10], given[10:]]), encode_chunked=True,
                               headers={"Transfer-Encoding": "chunked"})
            self.assertEqual(connection.getresponse().status, 200)

    def test_who_asks_first_is_told_to_go_on(self):
        node = self.web_node()
        for more, first in ((b"Content-Length: 2\r\n", "100"), (b"Content-Length: 99999999999\r\n", "413"),
                            (b"Origin: http://evil.test\r\nContent-Length: 2\r\n", "403")):
            with Talk(node.web_address) as talk:
                talk.send(b"POST /api/v1/send HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n" + more + b"\r\n")
                self.assertEqual(talk.line().split()[1], first)
                if first == "100":
                    self.assertEqual(talk.line(), "")
                    self.assertEqual(talk.send(b"{}").line().split()[1], "400")

    def test_limits_by_route(self):
        """A body is refused before it is read, and the client that sends it all gets to see why."""
        node = self.web_node()
        for method, target, size, status in (
                ("PUT", "/api/v1/messages", minimail.MAX_SMALL_BODY + 1, 413), ("DELETE", "/api/v1/messages", minimail.MAX_SMALL_BODY + 1, 413),
                ("POST", "/api/v1/send", minimail.MAX_HTTP_BODY + 1, 413), ("POST", "/nonsense", 1 << 24, 404), ("GET", "/", 1 << 24, 200)):
            with contextlib.closing(http.client.HTTPConnection(*node.web_address, timeout=PATIENCE)) as connection:
                connection.putrequest(method, target)
                connection.putheader("Content-Length", str(size))
                connection.endheaders()
                with contextlib.suppress(ConnectionError):
                    connection.send(b" " * min(size, 1 << 20))
                self.assertEqual(connection.getresponse().status, status, target)

    def test_json_bombs(self):
        node = self.web_node()
        self.deliver(node, b"x\r\n", "b@x")
        for body in (b"[" * 100000, b'{"IDs": [' + b"[]," * 300000 + b"[]]}", b'{"IDs": [' + b'"",' * 300000 + b'""]}', b'{"IDs": ' + b"9" * 1000000 + b"}",
                     b'{"IDs": 1.' + b"9" * 1000000 + b"}", b'"' + b"\\" * 999999, b'{"a":' * 50000 + b"1" + b"}" * 50000):
            self.assertSoon(lambda body=body: self.ask(node, "/api/v1/messages", "DELETE", body, 400), 5)
        many = {"IDs": ["id,[{%d" % number for number in range(60000)]}
        self.ask(node, "/api/v1/messages", "DELETE", many)
        self.assertEqual(len(node.messages()), 1)

    def test_who_drips_is_cut_off(self):
        node = self.web_node(timeout=0.2)
        for begin in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", self.HEAD + b"Content-Length: 1000\r\n\r\n{",
                      self.HEAD + b"Transfer-Encoding: chunked\r\n\r\n"):
            with Talk(node.web_address) as talk:
                talk.send(begin)
                talk.sock.settimeout(0.02)
                deadline = time.monotonic() + PATIENCE
                while time.monotonic() < deadline:
                    with contextlib.suppress(socket.timeout):
                        try:
                            talk.sock.send(b"1")
                            if not talk.sock.recv(1000):
                                break
                        except ConnectionError:
                            break
                self.assertLess(time.monotonic(), deadline, begin)
        self.eventually(lambda: not node.site.inbox.visitors)

    def test_who_is_quick_and_then_silent_is_cut_off(self):
        """What came fast is no credit: half a body, or half an answer, does not keep a thread for half an hour."""
        node, half = self.web_node(timeout=1.0), 8 << 20
        self.deliver(node, b"Subject: large\r\n\r\n" + (b"x" * 70 + b"\r\n") * (2 * half // 72), "b@x")
        with Talk(node.web_address) as talk:
            talk.send(self.HEAD.replace(b"PUT /api/v1/messages", b"POST /api/v1/send") +
                      b"Content-Length: %d\r\n\r\n" % (2 * half) + b" " * half)
            self.eventually(lambda: not node.site.inbox.visitors, "the end of who sent half")
        with Talk(node.web_address) as talk:
            talk.send(b"GET /api/v1/message/latest/raw HTTP/1.1\r\nHost: localhost\r\n\r\n")
            taken = 0
            while taken < half:
                taken += len(talk.sock.recv(1 << 16))
            self.eventually(lambda: not node.site.inbox.visitors, "the end of who took half")

    def test_a_share_of_the_connections(self):
        """What the web has is bounded: mail goes on when it is used up, and who left makes room."""
        node = self.web_node(max_connections=8)
        with contextlib.ExitStack() as held:
            talks = [held.enter_context(Talk(node.web_address)) for _ in range(4)]
            self.eventually(lambda: len(node.site.inbox.threads) == 4)
            with Talk(node.web_address) as one_more:
                self.assertIn(" 503 ", one_more.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").line())
            for _ in range(3):
                self.deliver(node, b"x\r\n", "b@x")
            talks[0].close()
            self.eventually(lambda: len(node.site.inbox.threads) == 3)
            self.ask(node, "/livez")

    def test_without_more_threads(self):
        node = self.web_node()
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            with Talk(node.web_address) as talk:
                self.assertIn(" 503 ", talk.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").line())
        self.deliver(node, b"x\r\n", "b@x")
        self.ask(node, "/livez")
        self.eventually(lambda: not node.site.inbox.visitors)

    def test_who_waits_and_goes(self):
        node = self.web_node()
        for target in ("/api/v1/wait?query=subject:never&timeout=60", "/api/events"):
            with Talk(node.web_address) as talk:
                talk.send("GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % target)
                self.eventually(lambda: node.site.inbox.changed._waiters)
            self.eventually(lambda: not node.site.inbox.visitors)

    def test_pipelined(self):
        node = self.web_node()
        self.deliver(node, b"Subject: s\r\n\r\nx\r\n", "b@x")
        with Talk(node.web_address) as talk:
            talk.send("GET /api/v1/wait?query=subject:never&timeout=0.3 HTTP/1.1\r\nHost: localhost\r\n\r\n"
                      "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            for status in ("404", "200"):
                self.assertEqual(talk.line().split()[1], status)
                headers = dict(line.lower().split(": ", 1) for line in iter(talk.line, ""))
                talk.file.read(int(headers["content-length"]))

    def test_a_large_message_is_not_held(self):
        node = self.web_node()
        self.deliver(node, b"Subject: large\r\n\r\n" + b"x" * 998 + (b"\r\n" + b"y" * 998) * 5000 + b"\r\n", "b@x")
        raw = self.ask(node, "/api/v1/message/latest/raw")
        self.assertEqual((raw.body, int(raw.headers["Content-Length"])), (node.messages()[0].read(), len(raw.body)))
        head = self.ask(node, "/api/v1/message/latest/raw", "HEAD")
        self.assertEqual((head.body, head.headers["Content-Length"]), (b"", raw.headers["Content-Length"]))
        with Talk(node.web_address) as talk:        # who does not take it is not waited for when the node stops
            talk.send("GET /api/v1/message/latest/raw HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertIn(" 200 ", talk.line())
            self.assertSoon(node.stop, 9)


class WebAllowed(WebCase):
    def test_names_and_origins(self):
        node = self.web_node(web_allow=["inbox.example.org", "http://app.test:3000", "proxy.test:8080"])
        for host, status in (("inbox.example.org", 200), ("Inbox.Example.org:8025", 200), ("app.test", 403), ("app.test:3000", 200), ("proxy.test:8080", 200),
                             ("proxy.test", 403), ("x.inbox.example.org", 403), ("inbox.example.org.evil.test", 403)):
            answer = self.ask(node, "/api/v1/messages", status=status, headers={"Host": host})
            if status == 403:
                self.assertIn("--web-allow", answer.text)
        for origin, status in (("http://app.test:3000", 200), ("https://inbox.example.org", 200), ("https://proxy.test:8080", 200),
                               ("https://app.test:3000", 403), ("http://app.test", 403), ("http://evil.test", 403), ("null", 403)):
            for method, body in (("GET", None), ("PUT", {"Read": True})):
                answer = self.ask(node, "/api/v1/messages", method, body, status, {"Origin": origin, "Sec-Fetch-Site": "cross-site"})
                allowed = origin if status == 200 else None
                self.assertEqual(answer.headers["Access-Control-Allow-Origin"], allowed)
                self.assertEqual(answer.headers["Vary"], "Origin" if allowed else None)
            answer = self.ask(node, "/api/v1/messages", "OPTIONS", status=status, headers={
                "Origin": origin, "Access-Control-Request-Method": "DELETE"})
            self.assertEqual("DELETE" in (answer.headers["Access-Control-Allow-Methods"] or ""), status == 200)
            if status == 403:
                self.assertIn("--web-allow", answer.text)
        self.assertIsNone(self.ask(node, "/api/v1/messages").headers["Access-Control-Allow-Origin"])


class WebViewers(WebCase):
    """Node mode: who logs in has the own mailbox; --web-admin names who has them all."""

    def setUp(self):
        self.data, self.pem = self.directory(), self.file("cert.pem", CERTIFICATE)
        with open(os.path.join(self.data, "users"), "w") as file:
            file.write("".join("%s@x.test:%s\n" % (name, minimail.hash_password("secret")) for name in ("ann", "bob", "root")))

    def as_(self, name, password="secret"):
        return {"Authorization": "Basic " + base64.b64encode(("%s@x.test:%s" % (name, password)).encode()).decode()}

    def secure_node(self, **options):
        return self.web_node(**dict(dict(domain="x.test", data=self.data, webs="127.0.0.1:0", tls_cert=self.pem, transcripts=True,
                                         web_admin="root@x.test"), **options))

    def tls(self, node):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return http.client.HTTPSConnection(*node.webs_address, timeout=PATIENCE, context=context)

    def ask(self, node, target, method="GET", body=None, status=200, headers=None, name="ann"):
        """Ask over TLS as a person who has logged in."""
        with contextlib.closing(self.tls(node)) as connection:
            connection.request(method, target, None if body is None else json.dumps(body), dict(self.as_(name), **headers or {}))
            answer = WebAnswer(connection.getresponse())
        self.assertEqual(answer.status, status, "%s %s: %r" % (method, target, answer.body[:300]))
        return answer

    def outside(self):
        return mock.patch.object(minimail, "is_loopback", lambda host: False)

    def test_the_own_mailbox_only(self):
        node = self.secure_node()
        with self.outside():
            both = self.deliver(node, b"Subject: both\r\nTo: ann@x.test\r\n\r\nx\r\n", "ann@x.test", "bob@x.test")
            bobs = self.deliver(node, b"Subject: bob's\r\n\r\nx\r\n", "bob@x.test")
            for name, subjects in (("ann", ["both"]), ("bob", ["bob's", "both"]), ("root", ["bob's", "both"])):
                entries = self.ask(node, "/api/v1/messages", name=name).json
                self.assertEqual([entry["Subject"] for entry in entries["messages"]], subjects)
                self.assertEqual((entries["total"], self.ask(node, "/api/v1/info", name=name).json["Messages"]), (len(subjects),) * 2)
            info = self.ask(node, "/api/v1/info").json
            self.assertEqual((info["user"], info["all"], info["Database"]), ("ann@x.test", False, ""))
            self.assertTrue(self.ask(node, "/api/v1/info", name="root").json["all"])
            for target in ("", "/raw", "/headers", "/session", "/links", "/part/1"):
                self.ask(node, "/api/v1/message/%s%s" % (bobs, target), status=404)
            self.ask(node, "/view/%s.txt" % bobs, status=404)
            whole = self.ask(node, "/api/v1/message/" + both).json
            self.assertEqual((whole["Bcc"], whole["Read"]), ([], True))
            record = self.ask(node, "/api/v1/message/%s/session" % both).json
            self.assertEqual((record["recipients"], record["bcc"], record["transcript"]), (["ann@x.test"], [], []))
            self.assertEqual(len(self.ask(node, "/api/v1/message/%s/session" % both, name="root").json["recipients"]), 2)
            self.assertEqual(self.ask(node, "/api/v1/messages", name="bob").json["unread"], 2, "read by another")
            self.ask(node, "/api/v1/search?query=subject:bob%27s", "DELETE")
            self.ask(node, "/api/v1/messages", "DELETE", {"IDs": [bobs]})
            self.ask(node, "/api/v1/messages", "DELETE")
            self.assertEqual([message.recipient for message in node.messages()], ["bob@x.test"] * 2)
            self.ask(node, "/api/v1/wait?query=subject:bob&timeout=0", status=404)
            self.assertEqual(self.ask(node, "/api/v1/wait?query=subject:bob&timeout=0", name="bob").json["ID"], bobs)

    def test_what_only_an_administrator_may(self):
        node = self.secure_node()
        with self.outside():
            for method, target in (("GET", "/metrics"), ("GET", "/api/v1/faults"), ("PUT", "/api/v1/faults"), ("DELETE", "/api/v1/faults")):
                self.ask(node, target, method, [], 403)
                self.ask(node, target, method, [], 200, name="root")

    def test_sending_as_oneself(self):
        node = self.secure_node()
        with self.outside():
            for sender, status in (("ann@x.test", 200), ("bob@x.test", 400), ("boss@elsewhere.test", 400)):
                self.ask(node, "/api/v1/send", "POST", {"From": sender, "To": ["bob@x.test"]}, status)
        self.assertEqual(len(node.messages("bob@x.test")), 1)

    def test_passwords_over_tls_or_from_here_only(self):
        node = self.secure_node()
        plain = functools.partial(WebCase.ask, self, node, "/api/v1/messages")
        with self.outside():
            self.assertIn("--webs", plain(status=403).text)
            plain(status=403, headers=self.as_("ann"))
            with contextlib.closing(self.tls(node)) as connection:
                for headers in ({}, self.as_("ann", "wrong"), self.as_("nobody"), {"Authorization": "Basic x"}):
                    connection.request("GET", "/", headers=headers)
                    answer = connection.getresponse()
                    answer.read()
                    self.assertEqual(answer.status, 401)
                    self.assertTrue(answer.headers["WWW-Authenticate"].startswith("Basic realm="))

    def test_on_this_machine(self):
        """Nobody has to log in; who does has the own mailbox; what some other program left in the browser harms nobody."""
        node = self.secure_node()
        self.deliver(node, b"Subject: bob's\r\n\r\nx\r\n", "bob@x.test")
        plain = functools.partial(WebCase.ask, self, node, "/api/v1/messages")
        for headers, count in (({}, 1), (self.as_("ann"), 0), (self.as_("bob"), 1), (self.as_("root"), 1)):
            self.assertEqual(plain(headers=headers).json["total"], count, headers)
        with mock.patch.object(minimail.Throttle, "charge", side_effect=AssertionError("counted")):
            for stray in (self.as_("admin"), {"Authorization": "Basic x"}, {"Authorization": "Bearer x"}):
                self.assertEqual(plain(headers=stray).json["total"], 1)
        plain(status=401, headers=self.as_("ann", "wrong"))

    def test_events_of_the_own_mailbox(self):
        node = self.secure_node()
        with self.outside(), contextlib.closing(self.tls(node)) as connection:
            connection.request("GET", "/api/events", headers=self.as_("ann"))
            stream = connection.getresponse()
            self.assertEqual(stream.readline(), b": hello\n")
            self.deliver(node, b"x\r\n", "bob@x.test")
            self.eventually(lambda: self.ask(node, "/api/v1/messages", name="bob").json["total"] == 1)
            self.deliver(node, b"x\r\n", "ann@x.test")
            self.assertEqual([line for line in (stream.readline() for _ in range(4)) if line.startswith(b"event")], [b"event: new\n"])
            self.ask(node, "/api/v1/messages", "DELETE", name="ann")
            self.assertEqual(next(line for line in iter(stream.readline, b"") if line.startswith(b"event")), b"event: delete\n")

    def test_webs_needs_a_certificate(self):
        with self.assertRaises(ValueError) as caught:
            minimail.Node(webs="127.0.0.1:0")
        self.assertIn("tls_cert", str(caught.exception))

    def test_a_handshake_that_stalls(self):
        node = self.secure_node(timeout=0.5)
        with socket.create_connection(node.webs_address, PATIENCE) as sock:
            self.assertEqual(sock.recv(1), b"", "cut off")
        with socket.create_connection(node.webs_address, PATIENCE) as sock:
            sock.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while sock.recv(1000):
                    pass
        self.eventually(lambda: not node.site.inbox.visitors)


class WebChanges(WebCase):
    """What deletes or changes does what its words say, or nothing."""

    def test_tags_of_what_other_programs_delivered(self):
        """Each message has its own, also when names differ in what a file name would not show; the sweep leaves them."""
        node = self.web_node()
        self.deliver(node, b"Subject: ours\r\n\r\n", "b@x.example")
        new = os.path.join(node.stores.mailboxes.path("b@x.example"), "new")
        names = ["1700000000.M1P1_V.host", "1700000000.M1P1_W.host"]
        for name in names:
            with open(os.path.join(new, name), "wb") as file:
                file.write(b"Subject: theirs\r\n\r\n")
        for name in names:
            self.ask(node, "/api/v1/tags", "PUT", {"IDs": [name], "Tags": [name[-6]]})
        for path in glob_sessions(node):
            os.utime(path, (0, 0))
        node.site.recorder.sweep()
        again = self.web_node(data=node.data)
        self.assertEqual([self.ask(again, "/api/v1/message/" + name).json["Tags"] for name in names], [["V"], ["W"]])

    def test_words_that_we_do_not_know(self):
        node = self.web_node()
        for name in (b"one", b"two"):
            self.deliver(node, b"Subject: %s\r\n\r\nx\r\n" % name, "b@x")
        for query in ("is:nonsense", "has:nonsense", "before:soon", "larger:x", "-after:nonsense", "-is:nonsense", "nonsense:x -one"):
            self.ask(node, "/api/v1/search?query=" + quote(query), "DELETE", status=400)
            self.ask(node, "/api/v1/messages", "DELETE", {"Search": query}, 400)
            self.ask(node, "/api/v1/messages", "PUT", {"Search": query, "Read": True}, 400)
            self.ask(node, "/api/v1/search?query=" + quote(query))
        ids = [message.id for message in node.messages()]
        for wrong in ({"IDs": ids, "Search": "one"}, {"IDs": ids, "Nonsense": 1}, {"Search": ["one"]}, {"Search": " "}, {"IDs": {"a": 1}}):
            self.ask(node, "/api/v1/messages", "DELETE", wrong, 400)
            self.ask(node, "/api/v1/messages", "PUT", wrong, 400)
        self.assertEqual((len(node.messages()), self.ask(node, "/api/v1/messages").json["unread"]), (2, 2))
        self.ask(node, "/api/v1/search?query=before:2000-01-01", "DELETE")
        self.assertEqual(len(node.messages()), 2)
        self.ask(node, "/api/v1/search?query=after:2000-01-01%20subject:one", "DELETE")
        self.assertEqual(self.found(node), ["two"])

    def test_tags(self):
        node = self.web_node(data=self.directory())
        first = self.deliver(node, b"Subject: one\r\nX-Tags: Shop, two words, b\xc3\xa4d;, \r\n\r\nx\r\n", "bob+plus+more@x")
        second = self.deliver(node, b"Subject: two\r\n\r\nx\r\n", "bob@x")
        self.assertEqual([entry["Tags"] for entry in self.ask(node, "/api/v1/messages").json["messages"]], [[], ["Shop", "more", "plus", "two words"]])
        self.assertEqual((self.found(node, 'tag:"two words"'), self.found(node, "is:tagged"), self.found(node, "-tag:shop")), (["one"], ["one"], ["two"]))
        self.ask(node, "/api/v1/tags", "PUT", {"IDs": [first, second], "Tags": ["new", "a.b_c-d@e", "new "]})
        self.assertEqual(self.ask(node, "/api/v1/tags").json, ["a.b_c-d@e", "new"])
        self.assertEqual(self.ask(node, "/api/v1/message/" + first).json["Tags"], ["a.b_c-d@e", "new"])
        self.assertEqual(self.ask(node, "/api/v1/message/%s/session" % first).json["recipients"], ["bob+plus+more@x"])
        node.stop()
        node.start()
        self.assertEqual(self.found(node, "tag:new"), ["two", "one"])
        self.ask(node, "/api/v1/tags", "PUT", {"IDs": [first], "Tags": []})
        self.assertEqual(self.found(node, "tag:new"), ["two"])
        for wrong in ({"IDs": [first]}, {"Tags": ["x"]}, {"IDs": [], "Tags": ["x"]}, {"IDs": [first], "Tags": "x"}, {"IDs": [first], "Tags": ["<b>"]},
                      {"IDs": [first], "Tags": [""]}, {"IDs": [first], "Tags": ["x" * 101]}, {"IDs": [first], "Tags": [7]}):
            self.ask(node, "/api/v1/tags", "PUT", wrong, 400)
        self.assertEqual(self.found(node, "tag:new"), ["two"])
        self.ask(self.web_node(transcripts=False), "/api/v1/tags", "PUT", {"IDs": ["x"], "Tags": ["x"]}, 400)

    def test_send_on_every_python(self):
        """UTF-8 addresses, long subjects and names: as they were given."""
        node = self.web_node()
        subject, name = "Grüße aus 日本 " * 60, "Jürgen 📬 " * 30
        id = self.ask(node, "/api/v1/send", "POST", {
            "From": {"Email": "jürgen@bücher.example", "Name": name}, "To": ["用户@例え.example", {"Email": "b@x", "Name": 'a "b" \\ c, d'}],
            "Subject": subject, "Text": "x" * 2000 + "\n.\nFrom x", "HTML": "<img src=cid:p1>ü", "Headers": {"X-Long": "ö" * 300, "X-Plain": "y" * 2000},
            "Attachments": [{"Filename": "日本" * 40 + ".txt", "Content": "data:text/plain;base64,aGk=", "ContentType": "text/plain"},
                            {"Filename": "p.png", "Content": "iVBORw0KGgo=", "ContentType": "image/png", "ContentID": "p1"}]}).json["ID"]
        whole = self.ask(node, "/api/v1/message/" + id).json
        self.assertEqual((whole["Subject"], whole["From"]), (subject, {"Name": name, "Address": "jürgen@bücher.example"}))
        self.assertEqual([(person["Name"], person["Address"]) for person in whole["To"]], [("", "用户@例え.example"), ('a "b" \\ c, d', "b@x")])
        self.assertEqual(whole["Bcc"], [])
        self.assertEqual(whole["Text"].split(), ["x" * 2000, ".", "From", "x"])
        raw = self.ask(node, "/api/v1/message/%s/raw" % id).body
        self.assertNotRegex(raw, rb"(?<!\r)\n|\r(?!\n)")
        self.assertLess(max(map(len, raw.split(b"\r\n"))), 999)
        self.assertIn("data:image/png;base64,iVBORw0KGgo=", self.ask(node, "/view/%s.html" % id).text)
        message = email.message_from_bytes(raw, policy=email.policy.default)
        attached, = message.iter_attachments()
        self.assertEqual((attached.get_filename(), attached.get_content()), ("日本" * 40 + ".txt", "hi"))
        for wrong in ({"Attachments": [{"Content": "a", "Filename": "x"}]}, {"Attachments": [{"Content": "aGk=", "ContentType": "text/plain\r\nX: y"}]},
                      {"Attachments": [{"Content": "aGk=", "ContentID": "<x>"}]}, {"Attachments": [{"Content": "aGk=", "Filename": "a\r\nX: y"}]},
                      {"To": ["b%d@x" % number for number in range(minimail.MAX_RECIPIENTS + 1)]}, {"Attachments": 7}):
            self.ask(node, "/api/v1/send", "POST", dict({"From": "a@x", "To": ["b@x"]}, **wrong), 400)
        self.assertEqual(len(node.messages("b@x")), 1)

    def test_the_policy_is_asked(self):
        asked = []

        class No(minimail.Policy):
            def on_message(self, envelope, path):
                with open(path, "rb") as file:
                    asked.append(b"Subject: s" in file.read())
                raise minimail.Refused(550, "5.7.1", "no")
        node = self.web_node(policy=No())
        self.assertIn("5.7.1", self.ask(node, "/api/v1/send", "POST", {"From": "a@x", "To": ["b@x"], "Subject": "s"}, 400).json["Error"])
        self.assertEqual((asked, node.messages()), ([True], []))


class WebReleases(WebCase):
    def test_one_message_goes_out(self):
        far = self.node(transcripts=True)
        node = self.web_node(release="smtp://127.0.0.1:%d" % far.smtp_address[1])
        content = b"Subject: \xfcber\r\nReturn-Path: <kept@x>\r\n\r\n.dot\r\nlong " + b"x" * 5000 + b"\r\n"
        ids = [self.deliver(node, content, *recipients, sender="prog@app.test") for recipients in (["bob@x"], ["bob@x", "c@x"])]
        self.assertEqual(self.ask(node, "/api/v1/info").json["release"], "127.0.0.1:%d" % far.smtp_address[1])
        self.assertTrue(self.ask(node, "/api/v1/webui").json["MessageRelay"]["Enabled"])
        for number, id in enumerate(ids, 1):
            self.ask(node, "/api/v1/message/%s/release" % id, "POST", {"To": ["me@real.test"]})
            message = far.wait_for("me@real.test", timeout=PATIENCE, count=number)[-1]
            self.assertEqual((message.sender, message.recipients), ("prog@app.test", ["me@real.test"]))
            self.assertEqual(body_of(message.read()), content)
            self.assertNotIn(b"bob@x", message.read())
        self.assertEqual(len(far.messages()), 2, "and nothing else")
        self.assertEqual(len(node.messages()), 3)
        for wrong in ({"To": []}, {"To": "me@real.test"}, {}, [], {"To": ["nonsense"]}, {"To": ["a@b@c"]}, {"To": ["x@y.test"] * 101}):
            self.assertTrue(self.ask(node, "/api/v1/message/%s/release" % ids[0], "POST", wrong, 400).json["Error"], wrong)
        self.ask(node, "/api/v1/message/nonsense/release", "POST", {"To": ["me@real.test"]}, 404)

    def test_a_bounce_comes_back_here(self):
        far = self.node(faults=["rcpt 550 5.1.1 nobody"])
        node = self.web_node(release="smtp://127.0.0.1:%d" % far.smtp_address[1])
        id = self.deliver(node, b"Subject: s\r\n\r\nx\r\n", "bob@x", sender="prog@app.test")
        self.ask(node, "/api/v1/message/%s/release" % id, "POST", {"To": ["me@real.test"]})
        self.assertIn(b"me@real.test", node.wait_for("prog@app.test", timeout=PATIENCE).read())

    def test_not_without_the_option(self):
        for options in ({}, {"domain": "x.test", "catch_all": "all@x.test"}):
            node = self.web_node(**options)
            id = self.deliver(node, b"x\r\n", "bob@x.test")
            answer = self.ask(node, "/api/v1/message/%s/release" % id, "POST", {"To": ["me@real.test"]}, 403)
            self.assertIn("--release", answer.text)
            self.assertIsNone(self.ask(node, "/api/v1/info").json["release"])
            self.assertFalse(self.ask(node, "/api/v1/webui").json["MessageRelay"]["Enabled"])


class WebHooks(WebCase):
    def test_it_is_no_connection(self):
        node = self.web_node(webhook="http://127.0.0.1:9/x", max_connections=2)
        self.ask(node, "/api/v1/info")

    def setUp(self):
        self.came, self.answers = [], []
        test = self

        class Taker(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                test.came.append((self.path, self.headers["Authorization"], body))
                self.send_response(test.answers.pop(0) if test.answers else 200)
                self.end_headers()

            def log_message(self, *_):
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Taker)
        threading.Thread(target=self.server.serve_forever, args=(0.01,)).start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.url = "http://me:pass%%20word@127.0.0.1:%d/hook?a=b" % self.server.server_port

    def test_each_message_is_told_of(self):
        node = self.node(pop3="off", webhook=self.url)  # also where there is no web inbox
        with mock.patch.object(minimail.WebHook, "WAITS", (0.0, 0.01, 0.01)):
            self.answers = [500, 200]
            ids = [self.deliver(node, b"Subject: s%d\r\n\r\nx\r\n" % number, "b@x", "c@x") for number in range(3)]
            self.eventually(lambda: len(self.came) == 4)
        self.assertEqual([body["ID"] for _, _, body in self.came], [ids[0], *ids])
        path, authorization, body = self.came[0]
        self.assertEqual((path, base64.b64decode(authorization[6:])), ("/hook?a=b", b"me:pass word"))
        self.assertEqual((body["Subject"], body["Read"], body["Size"] > 10), ("s0", False, True))

    def test_never_in_the_way(self):
        self.server.shutdown()
        self.server.server_close()
        with mock.patch.object(minimail.WebHook, "WAITS", (0.0, 0.01)), self.assertLogs("minimail", "WARNING") as logs:
            node = self.web_node(webhook=self.url)
            for _ in range(20):
                self.deliver(node, b"Subject: s\r\n\r\nx\r\n", "b@x")
            self.eventually(lambda: len(logs.records) >= 20)
            self.assertSoon(node.stop, 5)
        self.assertTrue(all("webhook" in record.getMessage() and "pass" not in record.getMessage() for record in logs.records))


class WebIndex(WebCase):
    """What is known of the mailboxes is brought up to date, not made anew."""

    def old(self, node):
        """Let the directories look as if nothing had happened for a while."""
        for place, _, _ in os.walk(os.path.join(node.data, "mail")):
            os.utime(place, (1e9, 1e9))

    def test_only_what_changed_is_read(self):
        node = self.web_node()
        for number in range(20):
            self.deliver(node, b"Subject: s%d\r\n\r\nx\r\n" % number, "box%d@x" % number, "both@y")
        self.old(node)
        self.assertEqual(self.ask(node, "/api/v1/messages").json["total"], 20)
        listed = []
        listing = node.site.mailboxes.listing
        with mock.patch.object(node.site.mailboxes, "listing", lambda mailbox: listed.append(mailbox) or listing(mailbox)):
            for target in ("/api/v1/messages", "/api/v1/search?query=s7", "/api/v1/wait?query=subject:never&timeout=0", "/api/v1/info"):
                self.ask(node, target, status=None)
            self.assertEqual(listed, [])
            node.messages("box7@x")
            listed.clear()
            os.unlink(node.messages("box7@x")[0].path)
            listed.clear()
            self.assertEqual(self.ask(node, "/api/v1/messages").json["total"], 20, "there is another copy")
            self.assertEqual(set(listed), {"box7@x"})

    def test_what_happens_on_disk(self):
        node = self.web_node()
        ids = [self.deliver(node, b"Subject: s%d\r\n\r\nx\r\n" % number, "a@x", "b@y") for number in range(3)]
        for settled in (False, True):
            if settled:
                self.old(node)
            self.assertEqual(self.found(node), ["s2", "s1", "s0"])
        shutil.rmtree(os.path.join(node.data, "mail", "y"))
        self.assertEqual(self.ask(node, "/api/v1/message/%s/session" % ids[0]).json["recipients"], ["a@x", "b@y"])
        self.assertEqual(self.found(node), ["s2", "s1", "s0"])
        shutil.rmtree(os.path.join(node.data, "mail", "x", "a", "cur"))
        os.mkdir(os.path.join(node.data, "mail", "x", "a", "cur"))
        self.assertEqual(len(self.found(node)), 3)
        shutil.rmtree(os.path.join(node.data, "mail", "x"))
        self.assertEqual(self.found(node), [])
        self.assertIsNone(node.site.inbox.summaries.get(ids[0]), "and is forgotten")
        self.deliver(node, b"Subject: again\r\n\r\nx\r\n", "a@x")
        self.assertEqual(self.found(node), ["again"])

    def test_the_data_directory_is_emptied(self):
        node = self.web_node()
        self.deliver(node, b"Subject: old\r\n\r\nx\r\n", "a@x")
        for name in os.listdir(node.data):
            shutil.rmtree(os.path.join(node.data, name), ignore_errors=True)    # the node may put something into run/ meanwhile
        self.assertEqual(self.found(node), [])
        letter = {"From": {"Email": "a@x"}, "To": [{"Email": "b@x"}], "Subject": "new", "Text": "x" * 2 * minimail.LARGE}
        self.ask(node, "/api/v1/send", "POST", letter)
        self.assertEqual(self.found(node), ["new"])

    def test_while_the_disk_is_away(self):
        """As where the mount is gone: that nothing is seen does not say that there is no mail."""
        node = self.web_node()
        storage = node.stores.storage
        self.deliver(node, b"Subject: s\r\n\r\nx\r\n", "a@x")
        os.rename(node.data + "/mail", node.data + "/elsewhere")
        beneath, storage._beneath = storage._beneath, os.stat(node.data).st_dev
        with self.assertLogs("minimail"):
            self.assertIn("out of reach", self.ask(node, "/api/v1/messages", status=500).text)
            self.ask(node, "/readyz", status=503)
            told = self.ask(node, "/metrics").text
            self.assertIn("minimail_messages_accepted_total 1\n", told)
            self.assertNotIn("minimail_messages ", told)
            storage._beneath = beneath
            os.rename(node.data + "/elsewhere", node.data + "/mail")
            self.ask(node, "/readyz")
        self.assertEqual(self.found(node), ["s"])
        self.assertIn("minimail_messages 1\n", self.ask(node, "/metrics").text)

    def test_directories_that_are_no_mailboxes(self):
        node = self.web_node()
        self.deliver(node, b"Subject: s\r\n\r\nx\r\n", "a@x")
        for name in "A", "B" * 200, "%", "%2e", ".x", "\xfc", "lost+found":
            for path in os.path.join("x", name, "new"), os.path.join(name, "a", "new"):
                os.makedirs(os.path.join(node.data, "mail", path))
        self.assertEqual(self.found(node), ["s"])
        self.assertEqual([message.recipient for message in node.messages()], ["a@x"])

    def test_a_message_that_cannot_be_read_hides_no_other(self):
        """As where the disk has lost a part of it."""
        node = self.web_node()
        for name in ("a@x", "b@x"):
            self.deliver(node, b"Subject: of %s\r\n\r\nx\r\n" % name.encode(), name)
        broken, = node.messages("a@x")
        pread = minimail.pread

        def lossy(fd, *arguments):
            if os.path.samestat(os.fstat(fd), os.stat(broken.path)):
                raise OSError(errno.EIO, "Input/output error")
            return pread(fd, *arguments)
        with mock.patch.object(minimail, "pread", lossy), self.assertLogs("minimail") as logs, \
                mock.patch.object(minimail.Message, "read", lambda message: message.head(message.size)):
            self.assertEqual([self.found(node), self.found(node)], [["of b@x", "(cannot be shown)"]] * 2)
            self.assertEqual(len([record for record in logs.records if "Input/output" in record.getMessage()]), 1)
            if "mail" in minimail.COMMANDS:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    self.assertEqual(minimail.COMMANDS["mail"](Config(data=node.data), ["a@x"]), 0)
                self.assertEqual((out.getvalue(), logs.records[-1].getMessage()), ("", broken.uid + ": [Errno 5] Input/output error"))
        self.assertEqual(self.found(node), ["of b@x", "of a@x"])

    def test_what_is_somebody_elses_hides_nothing_else(self):
        with mock.patch.object(minimail.Node, "_sweep"):        # it would say it, too, at some time
            node = self.web_node()
        for name in ("a@x", "b@x", "c@y"):
            self.deliver(node, b"Subject: of %s\r\n\r\nx\r\n" % name.encode(), name)
        message, = node.messages("a@x")
        self.assertEqual(self.found(node), ["of c@y", "of b@x", "of a@x"])
        node.site.inbox.forget(message.id)
        domain = os.path.join(node.data, "mail", "x")
        for path, shown, found in ((message.path, ["of c@y", "of b@x", "(cannot be shown)"], ["of c@y", "of b@x"]),
                                   (domain + "/a", ["of c@y", "of b@x"], ["of c@y", "of b@x"]),
                                   (domain + "/a/cur", ["of c@y", "of b@x"], ["of c@y", "of b@x"]),
                                   (domain, ["of c@y"], ["of c@y"])):
            os.utime(domain)
            with of_somebody_else(path), self.assertLogs("minimail") as logs:
                self.assertEqual([self.found(node), self.found(node)], [shown] * 2)
                self.assertEqual(self.found(node, "of"), found)
            self.assertEqual(["Permission denied" in record.getMessage() for record in logs.records
                              if record.levelname == "WARNING"], [True], path)
            self.assertEqual(self.found(node), ["of c@y", "of b@x", "of a@x"], "it was given to us")
            node.site.mailboxes.storage._complained.clear()
        with of_somebody_else(os.path.join(node.data, "mail")), self.assertLogs("minimail") as logs:
            self.assertIn("Permission denied", self.ask(node, "/api/v1/messages", status=500).text)
            node._sweep()
        self.assertEqual([(record.levelname, record.exc_info) for record in logs.records], [("WARNING", None)] * 2)

    def test_a_wait_judges_each_message_once(self):
        node = self.web_node()
        for number in range(5):
            self.deliver(node, b"Subject: s%d\r\n\r\nx\r\n" % number, "b@x")
        judged = []
        matches = minimail.Query.matches
        with mock.patch.object(minimail.Query, "matches", lambda query, letter: judged.append(letter.id) or matches(query, letter)):
            result = self.in_background(self.ask, node, "/api/v1/wait?query=subject:last&timeout=120")
            self.eventually(lambda: len(judged) == 5)
            ids = [self.deliver(node, b"Subject: %s\r\n\r\nx\r\n" % subject, "b@x") for subject in (b"other", b"last")]
            self.assertEqual(result().json["ID"], ids[1])
        self.assertEqual(len(judged), len(set(judged)))
        result = self.in_background(self.ask, node, "/api/v1/wait?query=is:read%20subject:s1&timeout=120")
        self.ask(node, "/api/v1/messages", "PUT", {"Search": "subject:s1", "Read": True})
        self.assertEqual(result().json["Subject"], "s1", "another flag is another question")


class OldMail(WebCase):
    def test_max_age(self):
        """What is too old is removed also where nothing new comes, and each one is logged."""
        with self.assertLogs("minimail", "INFO") as logs:
            node = self.web_node(data=self.directory(), max_age=1000)
            for recipient in ("a@x", "b@y"):
                self.deliver(node, b"x\r\n", recipient)
            self.assertEqual(len(node.messages()), 2)
            node.stop()
            node = self.web_node(data=node.data, max_age=0.1)
            self.eventually(lambda: not node.messages())
            self.eventually(lambda: [record.getMessage() for record in logs.records].count("pruned") == 2)


class WebEvents(WebCase):
    def events(self, node):
        """Return a function that returns the next event of a stream."""
        talk = Talk(node.web_address)
        self.addCleanup(talk.close)
        talk.send("GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.assertIn(" 200 ", talk.line())
        headers = [line.lower() for line in iter(talk.line, "")]
        self.assertIn("content-type: text/event-stream", headers)
        self.assertTrue(talk.line().startswith(":"))

        def following():
            for line in iter(talk.line, "closed"):
                if line.startswith("event: "):
                    return line[7:]
            return "closed"
        return following

    def until(self, following, wanted):
        for kind in iter(following, "closed"):
            if kind == wanted:
                return
        self.fail("no " + wanted)

    def test_what_happens_is_told_to_all(self):
        node = self.web_node(data=self.directory())
        pages = [self.events(node) for _ in range(3)]
        id = self.deliver(node, b"x\r\n", "b@x")
        for act, kind in ((lambda: None, "new"), (lambda: self.ask(node, "/api/v1/message/" + id), "read"),
                          (lambda: self.ask(node, "/api/v1/messages", "DELETE", {"IDs": [id]}), "delete"),
                          (lambda: self.ask(node, "/api/v1/send", "POST", {"From": "a@x", "To": ["b@x"]}), "new")):
            act()
            for page in pages:
                self.until(page, kind)
        other = self.node(data=node.data)
        self.deliver(other, b"x\r\n", "c@x")        # another process on the same directory
        for page in pages:
            self.until(page, "new")
        self.assertSoon(node.stop, 5)
        for page in pages:
            last = next(kind for kind in iter(page, None) if kind != "new")     # one more may have been on its way
            self.assertIn(last, ("stop", "closed"))


class WebWhenOff(WebCase):
    def test_it_costs_nothing(self):
        process = run_python("-c", """if True:
            import sys
            sys.path.insert(0, %r)
            import minimail, smtplib
            with minimail.Node(smtp="127.0.0.1:0", pop3="off", web=%s, no_sync=True) as node:
                with smtplib.SMTP(*node.smtp_address) as client:
                    before = set(sys.modules)
                    client.sendmail("a@x", ["b@x"], "x")
                node.wait_for("b@x")
                new = {name for name in sys.modules if name.startswith(("http", "html", "concurrent"))}
                assert not new, new
                assert "email.header" not in set(sys.modules) - before
                print("good")
            """ % (COMPILED.name, '"127.0.0.1:0"'))
        self.assertEqual(process.stdout.decode().split(), ["good"], process.stdout.decode())

    @needs("cut")
    def test_without_the_section(self):
        directory = self.directory()
        path = os.path.join(directory, "minimail.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(cut_copy("relay", "standing", "pop3"))
        program = py_compile.compile(path)
        processes = [(argv, subprocess.Popen([sys.executable, program, "--data", "d", *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                             stderr=subprocess.PIPE, cwd=directory))
                     for argv in (["--web", "127.0.0.1:0", "--smtp", "127.0.0.1:0", "--pop3", "127.0.0.1:0"], ["--fault", "rcpt 451"], ["wait"], ["selftest"])]
        for argv, process in processes:
            out, err = process.communicate(timeout=PATIENCE)
            lines = err.decode().splitlines()
            self.assertIn(process.returncode, (1, 2), argv)
            self.assertEqual((out, len(lines)), (b"", 1), (argv, err))
            self.assertNotIn("Traceback", lines[0])
            if argv[0].startswith("--"):
                self.assertRegex(lines[0], argv[0][2:], argv)


# ======================================================================================================================
# 23  Selftest
# ======================================================================================================================

class SelftestCommand(WebCase):
    def test_all_holds_here(self):
        directory = self.directory()
        process = run_python(PROGRAM, "selftest", "--data", os.path.join(directory, "data"))
        lines = process.stdout.decode().splitlines()
        self.assertEqual((process.returncode, lines[-1]), (0, "all hold"), lines)
        self.assertGreater(len(lines), 8)
        for line in lines[:-1]:
            self.assertRegex(line, r"^(ok|skip) +\w+: \w")
        self.assertEqual(os.listdir(directory), [], "nothing is left behind")

    def test_what_does_not_hold(self):
        class Broken:
            def __init__(self, directory):
                self.directory = directory

            def check_1_good(self):
                return "fine"

            def check_2_bad(self):
                raise AssertionError("it\nbroke")

            def check_3_missing(self):
                return "skipped: no such thing"

            def stop(self):
                pass
        directory = self.directory()
        with mock.patch.object(minimail, "Selftest", Broken):
            status, out, err = run_main("selftest", "--data", os.path.join(directory, "data"))
        lines = out.splitlines()
        self.assertEqual((status, err, len(lines)), (1, "", 4))
        self.assertTrue(lines[0].startswith("ok ") and lines[1].startswith("FAIL") and lines[2].startswith("skip"), lines)
        self.assertIn("broke", lines[1])
        self.assertEqual(os.listdir(directory), [])
        status, out, err = run_main("selftest", "--nonsense")
        self.assertEqual((status, out, len(err.splitlines())), (2, "", 1))


# ======================================================================================================================
# 24  Cutting this file
# ======================================================================================================================

@functools.lru_cache(maxsize=None)
def cut_copy(*keep):
    """Return the text of minimail.py with these of its optional sections, and what they need."""
    source = open_and_read(SOURCE).decode()
    return minimail.cut(source, minimail.chosen(minimail.needed_by(minimail.read_sections(source)), keep, ()))


MADE_UP = '''"""A file.

    somebody --> 2 first --+--> 7 last --> 3 second --> you
                           |
                           +--> 4 third --> 5 fourth --> back to 2

Map.

     1  head
     2  first
     3  second           [b]
     4  third            [c]
     5  fourth           [d, needs c b]
     6  cutting          [cut]
     7  last

Legend.

    word    what counts
    thing   a word elsewhere     [c]

Copyright (C) somebody.
"""
from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Set

if TYPE_CHECKING:
    import socket
    import ssl

__all__ = ["first", "named_in_all"]


# 2  First

def first(n: Any):
    return helper(n, LIMIT)


def helper(n, limit):
    return n


def for_second():
    return again()


def again():
    return for_second()


def named_in_all():
    pass


LIMIT = 7                   # of all
ONE, OTHER = 1, 2
OLD, OLDER = 3, 4           # whatever


# 3  Second

class Second:
    def of(self) -> Set:
        return os.sep, for_second()


print(Second)


# 4  Third

# A comment on what is below, which nothing uses.
def unused():
    return re


def third(context: "ssl.SSLContext"):
    return context


third(None)


# 5  Fourth

def decorator(function):
    return function


@decorator
def fourth() -> "Dict[str, int]":
    return {}


fourth()


# 6  Cutting

print(re)


# 7  Last

found: List[int] = []
found.append(first(OTHER))
'''.replace("\n\n\n# ", "\n\n\n# " + "=" * 110 + "\n# ")


class Cutting(Case):
    """A small file made up for it: pure, text in, text out."""

    sections = property(lambda self: minimail.read_sections(MADE_UP))

    def test_what_the_map_says(self):
        self.assertEqual([(part.number, part.name, part.needs) for part in self.sections],
                         [(1, "", ()), (2, "", ()), (3, "b", ()), (4, "c", ()), (5, "d", ("c", "b")), (6, "cut", ()), (7, "", ())])
        self.assertEqual("".join(part.text for part in self.sections), MADE_UP)

    def test_needs_are_closed_over(self):
        needs = minimail.needed_by(self.sections)
        self.assertEqual(needs, {"b": set(), "c": set(), "d": {"b", "c"}, "cut": set()})
        for wanted, unwanted, kept in ((["d"], [], {"b", "c", "d"}), (["b"], [], {"b"}), ([], [], set()), (None, [], {"b", "c", "d"}),
                                       (None, ["c"], {"b"}), (None, ["d"], {"b", "c"}), (None, ["b", "c"], set())):
            self.assertEqual(minimail.chosen(needs, wanted, unwanted), kept, (wanted, unwanted))
        for wanted, unwanted in ((["x"], []), (None, ["x"]), (["cut"], []), (None, ["B"])):
            with self.assertRaisesRegex(minimail.UsageError, r"no section %s \(one of: b c d\)" % (wanted or unwanted)[0]):
                minimail.chosen(needs, wanted, unwanted)

    def test_the_head(self):
        drawing = "A file.\n\n    somebody --> 2 first --+--> 7 last"     # 7 has no name: what it hangs on stays
        for keep, then, rows, words in (
                ("", "\n\nMap.", "1 head 2 first 7 last", "word"),
                ("b", " --> 3 second --> you\n\nMap.", "1 head 2 first 3 second 7 last", "word"),
                ("c", "\n                           |\n                           +--> 4 third\n\nMap.",
                 "1 head 2 first 4 third 7 last", "word thing"),
                ("bcd", MADE_UP[MADE_UP.index(" --> 3"):][:120], "1 head 2 first 3 second 4 third 5 fourth 7 last", "word thing")):
            with self.subTest(keep):
                head = ast.get_docstring(ast.parse(minimail.cut(MADE_UP, keep)))
                self.assertIn(drawing + then, head)
                self.assertEqual(" ".join(re.findall(r"\w+", re.sub(r"\[.*\]", "", head.split("Map.")[1].split("Legend")[0]))), rows)
                self.assertEqual(" ".join(re.findall(r"(?m)^    (\w+)", head.split("Legend.")[1])), words)
                self.assertTrue(head.endswith("\n\nCopyright (C) somebody."), head)

    def test_what_nothing_uses_goes(self):
        for keep, there, gone in (
                ("", "annotations Any List first helper LIMIT ONE OTHER named_in_all", "OLD OLDER for_second again os re ssl TYPE_CHECKING Set Optional"),
                ("b", "Second Set os for_second again", "ssl Dict re third unused"),
                ("c", "third TYPE_CHECKING ssl", "socket os Set comment unused re"),
                ("bcd", "Second third fourth decorator Dict ssl Set os", "re socket Optional unused cutting Cutting")):
            with self.subTest(keep):
                text = minimail.cut(MADE_UP, keep).split('"""\n')[1]
                words = set(re.findall(r"\w+", text))
                self.assertEqual((set(there.split()) - words, set(gone.split()) & words), (set(), set()))
                self.assertNotRegex(text, r"\n{4}|[^\n]\n\n\n    |\n\n\n\Z")
                exec(compile(text, "cut.py", "exec"), {"print": lambda *_: None})

    def test_cut_again(self):
        for keep, less in itertools.product(["", "b", "c", "bc", "bcd"], repeat=2):
            if set(less) <= set(keep):
                self.assertEqual(minimail.cut(minimail.cut(MADE_UP, keep), less), minimail.cut(MADE_UP, less), (keep, less))

    def unused(self, before, after):
        self.assertEqual(minimail.without_unused(textwrap.dedent(before)), textwrap.dedent(after))

    def test_what_is_named_in_annotations_and_decorators_stays(self):
        for line in ("def f(a: T): pass", "def f(a: 'Dict[T, int]'): pass", "def f() -> 'T': pass", "x: 'T' = 0", "def f(a: Optional['T']): pass",
                     "def f(a: Tuple[int, 'T']): pass", "@T.x\ndef f(): pass", "class f(T): pass", "def f(a=T): pass", "async def f(a, *, b: 'T'): pass"):
            text = "from x import T\n\n%s\n\nprint(%s)\n" % (line, "x" if line[0] == "x" else "f")
            self.assertEqual(minimail.without_unused(text), text)

    def test_decorators_go_with_what_they_decorate(self):
        self.unused("print(1)\n\n\n@first\n@second(3)\ndef gone():\n    pass\n\n\nprint(2)\n", "print(1)\n\n\nprint(2)\n")

    def test_imports_partly_used(self):
        names = ["name_%02d" % number for number in range(20)]
        text = "from x import (%s)\n\nprint(%s)\n"
        kept = minimail.without_unused(text % (", ".join(names), ", ".join(names[::2])))
        self.assertTrue(kept.endswith("\n\nprint(%s)\n" % ", ".join(names[::2])))
        self.assertEqual([alias.name for alias in ast.parse(kept).body[0].names], names[::2])
        self.assertLess(max(map(len, kept.split("\n")[:2])), 121)
        self.unused("import os\nfrom x import (a,\n               b as c, d)\nprint(d)\n", "from x import d\nprint(d)\n")

    def test_imports_for_annotations(self):
        block = "import x\n\nif TYPE_CHECKING:\n    import a\n    from b import (c,\n                   d)\n\nprint(x)\n"
        self.unused(block, "import x\n\nprint(x)\n")
        use = "\n\ndef f(e: d):\n    pass\n\n\nf()\n"
        self.unused("from t import TYPE_CHECKING\n" + block + use,
                    "from t import TYPE_CHECKING\nimport x\n\nif TYPE_CHECKING:\n    from b import d\n\nprint(x)\n" + use)


class CutCommand(Case):
    """The file itself."""

    def setUp(self):
        self.path = os.path.join(self.directory(), "copy.py")

    def test_listing(self):
        status, out, err = run_main("cut")
        self.assertEqual((status, err), (0, ""))
        rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:-1]}
        self.assertEqual(list(rows), [name for name in SECTIONS if name != "cut"])
        self.assertEqual((rows["relay"][1:], rows["standing"][1:], rows["web"][1:]), ([], ["relay"], ["reading", "wait"]))
        last, source = out.splitlines()[-1].split(), open_and_read(SOURCE).decode()
        cutting = next(part for part in minimail.read_sections(source) if part.name == "cut")
        self.assertEqual(sum(int(row[0]) for row in rows.values()) + int(last[-1]) + cutting.text.count("\n"), source.count("\n"))

    def test_wrong_usage(self):
        for words, said in ((["--with", "nonsense"], "no section nonsense"), (["--without", "pop3,cut"], "no section cut"), ([self.path], "--with"),
                            (["--with", "pop3", "--without", "web", self.path], "not allowed"), (["--with", "pop3", "a", "b"], "too many")):
            status, out, err = run_main("cut", *words)
            self.assertEqual((status, out, err.count("\n"), said in err), (2, "", 1, True), err)
        self.assertFalse(os.path.exists(self.path))

    def test_to_a_file_and_to_standard_output(self):
        status, out, err = run_main("cut", "--with", "wait, pop3", self.path)
        self.assertEqual((status, err), (0, ""))
        text = open_and_read(self.path).decode()
        self.assertEqual(text, cut_copy("pop3", "wait"))
        self.assertEqual(out, "%s: left out: relay standing transcripts faults web selftest; %d of %d lines\n" % (
            self.path, text.count("\n"), open_and_read(SOURCE).count(b"\n")))
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), stat.S_IMODE(os.stat(SOURCE).st_mode))
        self.assertEqual(os.listdir(os.path.dirname(self.path)), ["copy.py"])
        status, shown, err = run_main("cut", "--without", "relay,transcripts,faults,web")
        self.assertEqual((status, shown), (0, text))
        self.assertEqual("minimail" + out[len(self.path):], err)

    def test_what_it_writes_over(self):
        with open(self.path, "w", encoding="utf-8") as file:
            file.write(cut_copy())                  # an older copy
        self.assertEqual(run_main("cut", "--with", "pop3", self.path)[0], 0)
        self.assertEqual(open_and_read(self.path).decode(), cut_copy("pop3"))
        others = [self.file("notes", "about minimail"), self.file("empty", ""), self.file("bytes", b"\xff\xfe"),
                  os.path.join(os.path.dirname(self.path), "itself")]
        try:
            os.link(minimail.__file__, others[-1])
        except OSError:                             # another file system, or one without, or another user's file
            os.symlink(minimail.__file__, others[-1])
        for path in others + [minimail.__file__]:
            before = open_and_read(path)
            status, out, err = run_main("cut", "--with", "", path)
            self.assertEqual((status, out, err.count("\n"), "no other copy" in err), (1, "", 1, True), err)
            self.assertEqual(open_and_read(path), before)
        self.assertEqual(run_main("cut", "--with", "", os.path.join(self.path, "x"))[0], 1)

    def test_what_is_left(self):
        """The licence, and of the map, the drawing, the imports and __all__ what belongs to the sections left; nothing of `cut`."""
        licence = re.compile(r"Copyright \(C\) .*\(SPDX: 0BSD\)", re.S)
        for keep in (), ("web", "pop3", "transcripts", "faults"):
            with self.subTest(keep=keep):
                text = cut_copy(*keep)
                tree, head = ast.parse(text), ast.get_docstring(ast.parse(text))
                self.assertEqual(licence.search(head).group(), licence.search(minimail.__doc__).group())
                self.assertEqual(set(re.findall(r"\[(\w+)", head.split("Legend")[0])),
                                 {*keep, *("reading wait".split() if "web" in keep else [])})
                numbers = ["1", *BANNER.findall(text)]
                self.assertEqual(re.findall(r"(?m)^ {4,5}(\d+)  \w", head), numbers)
                self.assertEqual(set(re.findall(r"> (\d+) ", head)) - set(numbers), set())
                self.assertNotRegex(text, r"\bcut_command|without_unused|read_sections|CutExtension|\bast\b|textwrap")
                module = types.ModuleType("left")
                with mock.patch.dict(sys.modules, left=module):
                    exec(compile(text, "left.py", "exec"), module.__dict__)
                self.assertEqual([name for name in module.__all__ if not hasattr(module, name)], [])
                self.assertEqual([node for node in tree.body if isinstance(node, ast.If) and not node.body], [])

    def test_cut_again(self):
        for keep, less in (((), ()), (("relay", "standing"), ())):
            kept = minimail.chosen(minimail.needed_by(minimail.read_sections(open_and_read(SOURCE).decode())), less, ())
            self.assertEqual(minimail.cut(cut_copy(*keep), kept), cut_copy(*less), (keep, less))

    def test_no_section_is_left_untested(self):
        """Of each section most tests need nothing beside it but what it needs itself: they run in whatever copy has it."""
        sections = minimail.read_sections(open_and_read(SOURCE).decode())
        needed = minimail.needed_by(sections)
        banners = {part.number: {part.name, *needed.get(part.name, ())} for part in sections}
        source = open_and_read(os.path.join(HERE, "test_minimail.py")).decode()
        starts = [(int(match.group(1)), match.end()) for match in BANNER.finditer(source)]
        found = {}
        for (number, start), end in zip(starts, [start for _, start in starts[1:]] + [len(source)]):
            cases = [globals().get(name) for name in re.findall(r"(?m)^class (\w+)", source[start:end])]
            for case in [case for case in cases if isinstance(case, type) and issubclass(case, unittest.TestCase)]:
                for name in unittest.defaultTestLoader.getTestCaseNames(case):
                    wanted = {*getattr(case, "needs", ()), *getattr(getattr(case, name), "needs", ())}
                    found.setdefault(number, []).append(wanted <= banners[number])
        self.assertEqual(set(banners) - set(found), {1}, "sections without tests")
        self.assertEqual({number: (sum(tests), len(tests)) for number, tests in found.items() if sum(tests) < len(tests) / 2}, {})


# ======================================================================================================================
# 25  Command line
# ======================================================================================================================

class Logs(Case):
    def test_lines(self):
        record = minimail.log.makeRecord("minimail", 20, "f", 1, "login", (), None,
                                         extra={"fields": {"user": 'b "x\r\n\x1b', "n": 3, "e": ""}})
        line = minimail.Lines("text").format(record)
        self.assertRegex(line, r'\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z login user="b \\"x\\r\\n\\u001b" n=3 e=""\Z')
        loaded = json.loads(minimail.Lines("json").format(record))
        self.assertEqual((loaded["event"], loaded["level"], loaded["user"], loaded["n"]), ("login", "info", 'b "x\r\n\x1b', 3))
        try:
            raise ValueError("two\nlines")
        except ValueError:
            record = minimail.log.makeRecord("minimail", 40, "f", 1, "a\nb %s", ("\x1b",), sys.exc_info())
        for kind in ("text", "json"):
            line = minimail.Lines(kind).format(record)
            self.assertTrue(line.isprintable(), line)
            self.assertIn("ValueError", line)

    def test_events(self):
        node = self.node()
        with self.assertLogs("minimail", "INFO") as logs:
            id = self.deliver(node, b"x" * 10, "a@x", "b@x")
            if HAS_POP3:
                self.fetch(node, "a@x")
            self.eventually(lambda: not node.site.sessions)
            with Talk(node.smtp_address) as talk:
                talk.reply()
                talk.ask("NON\x07SENSE")
            self.eventually(lambda: not node.site.sessions)
        events = [(record.getMessage(), record.fields) for record in logs.records]
        message = dict(events)["message"]
        self.assertEqual((message["id"], message["sender"], message["recipients"], message["size"]),
                         (id, "alice@example.net", 2, 12))
        self.assertLess(message["seconds"], PATIENCE)
        self.assertEqual([name for name, _ in events if name != "refused"],
                         ["connect", "message", *["connect", "login", "fetch"] * HAS_POP3, "connect"])
        if HAS_POP3:
            self.assertEqual(dict(events)["fetch"]["messages"], 1)
        self.assertTrue(dict(events)["refused"]["reason"].startswith("500 5.5.2"))


class CommandLine(Case):
    def script(self):
        """Return a copy of the module in a folder of its own, and an environment in which nothing is said to Python."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return shutil.copy(SOURCE, self.directory()), environ

    @unittest.skipUnless(os.name == "posix" and hasattr(sys, "orig_argv"), "needs execv, and Python's own words")
    def test_a_script_goes_on_as_a_module(self):
        script, environ = self.script()
        folder, elsewhere = os.path.dirname(script), self.directory()
        with open(os.path.join(elsewhere, "json.py"), "w") as file:
            file.write("raise SystemExit('not mine')")

        def run(*words):
            ran = subprocess.run([sys.executable, "-X", "importtime", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, timeout=PATIENCE, cwd=elsewhere, env=environ)
            self.assertEqual(ran.returncode, 0, ran.stderr)
            return ran.stdout, bool(re.search(rb"\| +minimail$", ran.stderr, re.M))
        version = b"minimail %s\n" % minimail.__version__.encode()
        self.assertEqual(run("-B", script, "--version"), (version, False), "no bytecode is to be kept")
        self.assertEqual(run(script, "--version"), (version, True))
        self.assertTrue(os.listdir(os.path.join(folder, "__pycache__")))
        self.assertEqual(run(script, "user", "--help")[1], False, "a command does not")
        self.assertEqual(run("-I", script, "--version"), (version, False), "its folder is not where modules may be")
        renamed = shutil.copy(SOURCE, os.path.join(folder, "sendmail"))
        self.assertEqual(run(renamed, "--version")[1], False)
        shutil.rmtree(os.path.join(folder, "__pycache__"))
        with open(os.path.join(folder, "__pycache__"), "w"):
            pass
        self.assertEqual(run(script, "--version"), (version, False), "no bytecode can be kept")

    @unittest.skipUnless(os.name == "posix" and hasattr(sys, "orig_argv"), "needs execv, and Python's own words")
    def test_a_power_cut_leaves_no_part_of_the_bytecode(self):
        """Of that Python makes a traceback at each start, until somebody removes it."""
        script, environ = self.script()
        watcher, cache = self.directory(), os.path.join(os.path.dirname(script), "__pycache__")
        with open(os.path.join(watcher, "sitecustomize.py"), "w") as file:
            file.write("import os\nfsync = os.fsync\nos.fsync = lambda fd: print(os.fstat(fd).st_ino, flush=True) or fsync(fd)\n")
        ran = subprocess.run([sys.executable, script, "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             timeout=PATIENCE, env=dict(environ, PYTHONPATH=watcher))
        cached, = os.listdir(cache)
        inode = os.stat(os.path.join(cache, cached)).st_ino
        self.assertEqual(ran.stdout.decode(), "%d\nminimail %s\n" % (inode, minimail.__version__))

    def start(self, *argv):
        self.data = self.directory()
        program = Program("--data", self.data, "--pop3", self.OPTIONS["pop3"], "--web", "off", "--no-sync", *argv)
        self.addCleanup(program.end)
        return program

    def test_serve(self):
        program = self.start("--smtp", "127.0.0.1:0", "--smtp", "127.0.0.1:0", "--log", "json", "--hostname", "mail.test")
        self.assertEqual([re.sub(r":\d+$", ":N", line) for line in program.lines],
                         ["listening smtp 127.0.0.1:N"] * 2 + ["listening pop3 127.0.0.1:N"] * HAS_POP3 + ["ready"])
        with smtplib.SMTP(*program.address("smtp"), timeout=PATIENCE) as client:
            client.sendmail("a@x", ["bob@x"], "Subject: =?utf-8?q?gr=C3=BC=C3=9Fe?=\n\nhi")
        idle = self.talk(program.address("smtp"))
        stored, = os.listdir(os.path.join(self.data, "mail/x/bob/new"))
        if "mail" in minimail.COMMANDS:
            size = os.stat(os.path.join(self.data, "mail/x/bob/new", stored)).st_size
            self.assertEqual(run_main("--data", self.data, "mail")[:2], (0, "%6d %12d bob@x\n" % (1, size)))
            status, out, err = run_main("mail", "BOB@x", "--data", self.data)
            self.assertEqual((status, err, out.count("\n")), (0, "", 1))
            self.assertIn("gr\xfc\xdfe", out)
        started = time.monotonic()
        status, errors = program.end()
        self.assertEqual(status, 0, errors)
        self.assertLess(time.monotonic() - started, 8)
        self.assertTrue(idle.reply().startswith("421"))
        self.assertEqual(len(program.lines), 3 + HAS_POP3, "nothing else on standard output")
        events = [json.loads(line)["event"] for line in errors.splitlines()]
        self.assertEqual([name for name in ("connect", "message", "stopping") if name not in events], [])

    @unittest.skipUnless(hasattr(os, "mkfifo"), "needs pipes with names")
    def test_a_pipe_is_no_users_file(self):
        """Nobody writes into it: a start that waited would wait for ever. A link is what its target is."""
        for name in ("users", "aliases"):
            data, real = self.directory(), self.file(name, "")
            os.mkfifo(os.path.join(data, name))
            arguments = ("--data", data, "--smtp", "127.0.0.1:0", "--pop3", "off", "--web", "off", "--domain", "example.org")
            status, out, err = run_main_forked(*arguments)
            self.assertEqual((status, out, err.count("\n")), (1, "", 1), err)
            self.assertIn("not a regular file", err)
            os.symlink(real, os.path.join(data, "link"))
            program = Program(*arguments, "--no-sync", "--" + name, os.path.join(data, "link"), *(
                ("--users", real) if name == "aliases" else ("--aliases", real)))
            self.assertEqual((program.end()[0], program.lines[-1:]), (0, ["ready"]))

    def test_interrupt(self):
        program = self.start("--smtp", "127.0.0.1:0", "--quiet")
        self.assertEqual(program.end(signal.SIGINT), (0, ""))

    def test_environment(self):
        with mock.patch.dict(os.environ, MINIMAIL_SMTP="127.0.0.1:0", MINIMAIL_HOSTNAME="env.test", MINIMAIL_QUIET="on"):
            program = self.start()
        self.dialog(program.address("smtp"), "S: 220 env.test")
        self.assertEqual(program.end(), (0, ""))

    def test_port_taken(self):
        node = self.node()
        program = self.start("--smtp", "%s:%d" % node.smtp_address)
        status, errors = program.end()
        self.assertEqual((status, program.lines, errors.count("\n")), (1, [], 1), errors)
        self.assertIn(str(node.smtp_address[1]), errors)

    def test_a_worker_that_cannot_serve(self):
        data = self.directory()
        with open(os.path.join(data, "run"), "w"):  # where a directory should be
            pass
        program = Program("--data", data, "--smtp", "127.0.0.1:0", "--pop3", "off", "--web", "off", "--workers", "2")
        status, text = program.end()
        self.assertEqual((status, program.lines), (1, []))
        self.assertIn("cannot use the data directory %s: %s/run" % (data, data), text)

    @unittest.skipUnless(os.path.exists("/proc/self/task/%d/children" % os.getpid()), "nobody tells the children of a process")
    def test_workers(self):
        program = self.start("--smtp", "127.0.0.1:0", "--workers", "2")
        parent = program.process.pid
        with open("/proc/%d/task/%d/children" % (parent, parent)) as file:
            children = list(map(int, file.read().split()))
        self.assertEqual(len(children), 2)
        for _ in range(4):
            with smtplib.SMTP(*program.address("smtp"), timeout=PATIENCE) as client:
                client.sendmail("a@x", ["bob@x"], "hi")
        self.assertEqual(len(os.listdir(os.path.join(self.data, "mail/x/bob/new"))), 4)
        self.assertEqual(program.end()[0], 0)
        program = self.start("--smtp", "127.0.0.1:0", "--workers", "2")
        parent = program.process.pid
        with open("/proc/%d/task/%d/children" % (parent, parent)) as file:
            children = list(map(int, file.read().split()))
        program.end(signal.SIGKILL)

        def gone():
            for pid in children:
                try:
                    with open("/proc/%d/stat" % pid) as file:
                        if file.read().rpartition(")")[2].split()[0] != "Z":
                            return False
                except OSError:
                    pass
            return True
        self.eventually(gone, "workers end with their parent")

    def test_a_killed_node_leaves_nothing_to_repair(self):
        program = self.start("--smtp", "127.0.0.1:0")
        with smtplib.SMTP(*program.address("smtp"), timeout=PATIENCE) as client:
            client.sendmail("a@x", ["bob@x"], "hi")
        talk = self.talk(program.address("smtp"))
        self.dialog(talk, "C: MAIL FROM:<a@x>\nC: RCPT TO:<bob@x>\nS: 250\nS: 250")
        talk.send(b"BDAT 100000\r\n" + b"x" * 100_000)
        talk.reply()
        tmp = os.path.join(self.data, "mail/x/bob/tmp")
        self.assertEqual(len(os.listdir(tmp)), 1)
        program.end(signal.SIGKILL)
        node = self.node(data=self.data)
        self.eventually(lambda: not os.listdir(tmp), "the dead one's draft removed")
        self.assertEqual(len(node.messages("bob@x")), 1)

    @mock.patch.object(minimail, "SCRYPT", dict(n=16, r=1, p=1))
    def test_user(self):
        data = self.directory()

        def user(*argv, stdin=""):
            return run_main("user", "--data", data, *argv, stdin=stdin)
        self.assertEqual(user("list"), (0, "", ""))
        self.assertEqual(user("add", "Bob@Example.org", "--password-stdin", stdin="secret\n"), (0, "", ""))
        self.assertEqual(user("add", "eve@example.org", "--password-stdin", stdin="p\xe4ss\n"), (0, "", ""))
        self.assertEqual(user("list"), (0, "bob@example.org\neve@example.org\n", ""))
        self.assertEqual(stat.S_IMODE(os.stat(os.path.join(data, "users")).st_mode), 0o600)
        self.assertNotIn(b"secret", open_and_read(os.path.join(data, "users")))
        accounts = minimail.Accounts(os.path.join(data, "users"))
        self.assertEqual(accounts.verify("bob@example.org", "secret"), "bob@example.org")
        self.assertEqual(accounts.verify("eve@example.org", "p\xe4ss"), "eve@example.org")
        for argv, word in ((("add", "bob@example.org"), "exists"), (("passwd", "nobody@example.org"), "nobody@example.org"),
                           (("remove", "nobody@example.org"), "nobody@example.org")):
            status, out, err = user(*argv, "--password-stdin", stdin="x\n")
            self.assertEqual((status, out, err.count("\n"), word in err), (1, "", 1, True), err)
        self.assertEqual(user("add", "new@example.org", "--password-stdin", stdin="\n")[0], 1, "an empty password")
        self.assertEqual(user("add", "new@example.org")[0], 1, "no terminal")
        self.assertEqual(user("passwd", "bob@example.org", "--password-stdin", stdin="new\n"), (0, "", ""))
        accounts = minimail.Accounts(os.path.join(data, "users"))
        self.assertIsNone(accounts.verify("bob@example.org", "secret"))
        self.assertEqual(accounts.verify("bob@example.org", "new"), "bob@example.org")
        self.assertEqual(user("remove", "bob@example.org"), (0, "", ""))
        self.assertEqual(user("list"), (0, "eve@example.org\n", ""))
        self.assertEqual(sorted(name for name in os.listdir(data) if "lock" in name or "tmp" in name), [])

    def test_ctrl_d_at_the_password_prompt(self):
        terminal = mock.Mock(isatty=lambda: True)
        for answers in ([EOFError], ["x", EOFError], ["x", "y"]):
            with mock.patch("getpass.getpass", side_effect=answers), mock.patch.object(minimail.sys, "stdin", terminal), \
                    contextlib.redirect_stderr(io.StringIO()):
                self.assertRaises(minimail.CannotRun, minimail.ask_password, False)
        for stdin in (None, io.TextIOWrapper(io.BytesIO(b"x" * 5000 + b"\n")), io.TextIOWrapper(io.BytesIO(b""))):
            with mock.patch.object(minimail.sys, "stdin", stdin):
                self.assertRaises(minimail.CannotRun, minimail.ask_password, True)
        with mock.patch.object(minimail.sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\r\n"), encoding="ascii")):
            password = minimail.ask_password(True)
        self.assertTrue(minimail.check_password(password, minimail.hash_password(password)))

    def test_errors_of_commands_are_one_line(self):
        data = self.directory()
        for argv, status, word in ((["wait", "--timeout", "soon"], 2, "soon"), (["wait", "a b@x"], 2, "a b@x"), (["mail", "a@b@c"], 2, "a@b@c"),
                                   (["wait", "--timeout", "0"], 1, "0 seconds"), (["user", "add", "a@b@c"], 2, "a@b@c")):
            got, out, err = run_main(*argv, "--data", data)
            self.assertEqual((got, out, err.count("\n")), (status, "", 1), err)
            self.assertIn(word, err)
            self.assertNotRegex(err, r"\b[45]\d\d \d\.\d")
            got, out, err = run_main(*argv, "--data", data, "--log", "json")
            self.assertEqual((got, out), (status, ""))
            self.assertIn(word, json.loads(err)["event"])

    @needs("wait")
    def test_output_never_fails_for_want_of_utf8(self):
        node = self.node()
        self.deliver(node, "Subject: gr\xfc\xdfe \u4f60\r\n\r\n\u4f60\r\n".encode(), "b\xfcro@x")
        code = """if True:
            import minimail, sys
            for argv in ["mail"], ["mail", "b\\xfcro@x"], ["wait", "b\\xfcro@x", "--print", "text"], ["wait", "--print", "json"]:
                sys.stdout.reconfigure(errors="strict")
                assert minimail.main(["--data", sys.argv[1], *argv]) == 0, argv
            """
        for encoding in "ascii", "latin-1", "cp1252", "utf-8":
            ran = run_python("-c", code, node.data, cwd=COMPILED.name, env=dict(os.environ, PYTHONIOENCODING=encoding, PYTHONUTF8="1"))
            self.assertEqual((ran.returncode, b"Traceback" in ran.stdout), (0, False), ran.stdout)
            self.assertGreaterEqual(len(ran.stdout.splitlines()), 4, ran.stdout)

    def test_a_directory_that_others_can_write_to(self):
        data = self.directory()
        os.chmod(data, 0o777)
        for argv in (["--smtp", "off", "--pop3", "off", "--web", "off"], ["mail"], ["queue"], ["user", "list"], ["wait", "--timeout", "0"]):
            status, out, err = run_main(*argv, "--data", data)
            self.assertEqual((status, out, err.count("\n"), data in err), (1, "", 1, True), err)
        self.assertEqual(run_main("sendmail", "b@x", "--data", data)[0], 75)
        with self.assertRaises(OSError):
            minimail.Node(data=data, smtp="127.0.0.1:0").start()
        self.assertEqual(os.listdir(data), [])
        os.chmod(data, 0o770)
        with mock.patch.object(os, "getgroups", return_value=[]), mock.patch.object(os, "getegid", return_value=-1):
            self.assertEqual(run_main("mail", "--data", data)[0], 1, "a group that is not ours")
            with self.assertRaises(OSError):
                minimail.Node(data=data, smtp="127.0.0.1:0").start()
        os.chmod(data, 0o777)
        with mock.patch.object(minimail, "keeps_no_modes", return_value=True), self.assertLogs("minimail") as logs:
            minimail.refuse_shared(data)            # a file system without modes is used, and says so
        self.assertIn("keeps no permissions", logs.output[0])
        os.chmod(data, 0o755)
        self.assertEqual(run_main("mail", "--data", data)[0], 0)
        new = os.path.join(data, "new")
        node = self.node(data=new)
        self.assertEqual(stat.S_IMODE(os.stat(node.data).st_mode), 0o700)

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "needs root")
    def test_root_becomes_the_owner_first(self):
        """And opens nothing in the directory before: not even what the node left for commands."""
        data = self.directory()
        os.chown(data, 65534, 65534)
        secret = self.file("secret", b'{"domain": ["x.example"]}')
        os.symlink(secret, os.path.join(data, "options.json"))
        status, out, err = run_main_forked("mail", "--data", data)
        self.assertEqual((status, out, err.count("\n")), (1, "", 1), err)
        self.assertNotIn("x.example", err)
        os.unlink(os.path.join(data, "options.json"))
        os.mkfifo(os.path.join(data, "options.json"))
        status, out, err = run_main_forked("mail", "--data", data)
        self.assertEqual((status, out, err.count("\n")), (1, "", 1), err)
        code = ("import minimail, os, sys; minimail.become_owner(sys.argv[1]); "
                "print(os.getuid(), os.getgid(), sorted(os.getgroups()), os.environ['HOME'], os.environ['USER'], 'XDG_RUNTIME_DIR' in os.environ)")
        import pwd
        nobody = pwd.getpwuid(65534)
        groups = sorted(os.getgrouplist(nobody.pw_name, nobody.pw_gid))
        for uid, gid, name, home, taken in ((65534, nobody.pw_gid, nobody.pw_name, nobody.pw_dir, groups),
                                            (3999999, 4000, "3999999", "/", [4000])):
            os.chown(data, uid, 4000)
            ran = run_python("-c", code, data, cwd=COMPILED.name,
                             env=dict(os.environ, HOME="/root", USER="root", XDG_RUNTIME_DIR="/run/root"))
            self.assertEqual(ran.stdout.decode(), "%d %d %s %s %s False\n" % (uid, gid, taken, home, name))
        self.assertNotIn(0, groups)

    def test_what_is_left_for_commands_has_no_password(self):
        program = self.start("--smtp", "127.0.0.1:0", "--domain", "x.example", "--smarthost", "smtp://me:hunter2@127.0.0.1:1",
                             "--route", "a.example=smtp://me:hunter2@127.0.0.1:1", "--relay-to", "a.example")
        with open(os.path.join(self.data, "options.json"), "rb") as file:
            text = file.read()
        self.assertNotIn(b"hunter2", text)
        for word in b"relay_to", b"smtp://127.0.0.1:1", b"x.example":
            self.assertIn(word, text)
        status, out, err = run_main("mx", "b@a.example", "--data", self.data)
        self.assertEqual((status, err), (0, ""), out)
        self.assertEqual(run_main("sendmail", "b@elsewhere.example", "--data", self.data)[0], 77, "--relay-to counts here, too")
        program.end()

    def test_mail_creates_nothing(self):
        data = os.path.join(self.directory(), "none")
        self.assertEqual(run_main("--data", data, "mail"), (0, "", ""))
        self.assertEqual(run_main("--data", data, "mail", "bob@x"), (0, "", ""))
        self.assertFalse(os.path.exists(data))


# ======================================================================================================================
# What a new user meets: one writable directory, groups, root, files that name options
# ======================================================================================================================

class OnlyTheDataDirectory(WebCase):
    """Nothing is written elsewhere, and what does not fit is refused in words."""

    @needs("web")
    def test_large_bodies(self):
        node, body = self.web_node(), json.dumps({"From": {"Email": "a@x"}, "To": [{"Email": "b@x"}], "Subject": "big",
                                                  "Text": "x" * (3 * minimail.LARGE)}).encode()
        with mock.patch.object(tempfile, "tempdir", "/nonexistent"), mock.patch.dict(os.environ, TMPDIR="/nonexistent"):
            self.ask(node, "/api/v1/send", "POST", body)
        self.assertEqual(self.found(node), ["big"])
        self.assertEqual([name for name in os.listdir(os.path.join(node.data, "run")) if name.startswith("tmp")], [])

    @needs("web")
    def test_no_room_for_a_body(self):
        node, body = self.web_node(), b'"' + b"x" * (2 * minimail.LARGE)
        for number, status in (errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EROFS, 503), (errno.EACCES, 503):
            with self.subTest(status=status), self.logs() as logged, mock.patch.object(
                    tempfile, "TemporaryFile", side_effect=OSError(number, os.strerror(number))):
                self.ask(node, "/api/v1/send", "POST", body, status=status)
            self.assertIn(os.strerror(number), " ".join(logged.output))
        self.ask(node, "/api/v1/messages")

    def logs(self):
        return self.assertLogs(minimail.log, "WARNING")

    def test_selftest_stays_inside(self):
        data = os.path.join(self.directory(), "data")
        os.mkdir(data, 0o700)
        seen = []

        class Spy:
            def __init__(self, directory):
                seen.append(directory)

            def check_1(self):
                return "fine"

            def stop(self):
                pass
        with mock.patch.object(minimail, "Selftest", Spy):
            self.assertEqual(run_main("selftest", "--data", data)[0], 0)
        self.assertEqual(os.path.dirname(seen[0]), os.path.join(data, "run"))
        self.assertEqual(os.listdir(os.path.join(data, "run")), [])

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "needs root")
    def test_a_group_may_write_when_it_is_ours(self):
        """As Kubernetes gives volumes to a container: root's, of the group fsGroup, mode 2775."""
        for group, mode, groups, refused in ((4000, 0o2775, [4000], False), (4000, 0o2775, [4001], True), (4000, 0o775, [], True),
                                             (4000, 0o755, [], False), (0, 0o775, [4001], False), (4000, 0o2777, [4000], True)):
            with self.subTest(group=group, mode=oct(mode), groups=groups):
                data = self.directory()
                os.chown(data, -1, group)
                os.chmod(data, mode)
                with mock.patch.object(os, "getgroups", return_value=groups):
                    if refused:
                        self.assertRaisesRegex(minimail.CannotRun, "others can write", minimail.refuse_shared, data)
                    else:
                        self.node(data=data)


class RootGivenUp(Case):
    def test_what_is_imported_late_is_in_the_list(self):
        with open(SOURCE, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        late = set()
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for node in ast.walk(function):
                    if isinstance(node, ast.Import):
                        late.update(alias.name for alias in node.names)
                    elif isinstance(node, ast.ImportFrom):
                        late.add(node.module)
        ours = {"ast", "textwrap"}                  # of `cut`, which opens this file before it reads it, and is no server
        self.assertEqual(late - set(minimail.IMPORTED_LATE) - {"msvcrt", "pkgutil", "encodings"} - ours, set())

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "needs root")
    def test_a_python_that_only_root_can_read(self):
        code = ("import sys, os; sys.path.insert(0, %r); import minimail\n"
                "real = os.stat\n"
                "os.stat = lambda path, **more: os.stat_result([0o40700] + list(real(path, **more))[1:])\n"
                "minimail.import_all()\n"
                "sys.path[:] = []; sys.path_importer_cache.clear(); sys.meta_path[:] = sys.meta_path[:2]\n"
                "for codec in 'ascii', 'idna', 'punycode', 'latin-1', 'utf-16', 'cp1252', 'koi8-r', 'iso-2022-jp', 'big5': ''.encode(codec)\n"
                "import email.policy, http.server, getpass\n" % os.path.dirname(SOURCE))
        ran = run_python("-c", code)
        self.assertEqual((ran.returncode, ran.stdout), (0, b""))

    @unittest.skipUnless(hasattr(signal, "sigtimedwait"), "no sigtimedwait()")
    def test_a_debugger_is_no_signal(self):
        """Where one attaches or leaves, sigtimedwait() may return with what nobody wrote: py-spy ended a node by that."""
        came = [mock.Mock(si_signo=number) for number in (-2000487592, signal.SIGUSR1, signal.SIGTERM)]
        with mock.patch.object(signal, "sigtimedwait", side_effect=came):
            self.assertEqual(minimail.next_signal(mock.Mock(stores=None)), signal.SIGTERM)

    def test_workers_whose_signals_were_blocked(self):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            program = Program("--data", os.path.join(self.directory(), "d"), "--smtp", "127.0.0.1:0", "--pop3", "off", "--web", "off",
                              "--workers", "2")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        program.process.send_signal(signal.SIGTERM)
        try:
            self.assertEqual(program.process.wait(PATIENCE), 0)
        finally:
            program.process.kill()
            program.process.stdout.close()
        program.errors.seek(0)
        self.assertIn(b"stopping", program.errors.read())
        program.errors.close()


class OptionsInFiles(Case):
    """What a file holds counts at the next connection."""

    def setUp(self):
        self.path = os.path.join(self.directory(), "option")
        patch = mock.patch.object(minimail.Watched, "PAUSE", 0.0)       # seconds for which a look counts
        patch.start()
        self.addCleanup(patch.stop)

    def put(self, text):
        with open(self.path + ".new", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(self.path + ".new", self.path)

    def config(self, variable, **options):
        given = dict({"data": os.path.join(self.directory(), "d"), "no_sync": True, "smtp": "127.0.0.1:0", "pop3": "off"}, **options)
        return minimail.read_config(given, {variable: self.path})

    @needs("relay")
    def test_another_smarthost(self):
        first, second = self.node(), self.node()
        self.put("smtp://%s:%d" % first.smtp_address)
        config = self.config("MINIMAIL_SMARTHOST_FILE", domain=["here.test"])
        with minimail.Node.from_config(config) as node:
            for peer in first, second:
                self.put("smtp://%s:%d" % peer.smtp_address)
                node.stores.door.send(minimail.Envelope("me@here.test"), [minimail.parse_address("bob@far.test")], LETTER)
                peer.wait_for("bob@far.test", timeout=PATIENCE)
            self.assertEqual([len(peer.messages("bob@far.test")) for peer in (first, second)], [1, 1])

    @needs("relay")
    def test_a_file_that_only_root_can_read(self):
        """It was read as root, and so counts on; that it cannot be read when it changes is said."""
        self.put("smtp://a.test")
        config = self.config("MINIMAIL_SMARTHOST_FILE", domain=["here.test"])
        with mock.patch.object(builtins, "open", side_effect=PermissionError(errno.EACCES, "Permission denied")):
            self.assertEqual(str(minimail.relay_config(config).smarthost), "smtp://a.test:25")
            os.utime(self.path, (1, 1))
            with self.assertLogs(minimail.log, "WARNING") as logged:
                self.assertEqual(str(minimail.relay_config(config).smarthost), "smtp://a.test:25")
        self.assertIn("Permission denied", logged.output[0])

    def test_a_target_as_it_is_now(self):
        routes = minimail.Routes(Config(), "mx.here.test", None)
        old, new, token = (minimail.parse_url(url) for url in ("smtp://u:1@a.test", "smtp://v:2@b.test", "smtp://u:3@a.test"))
        routes.options = lambda: Config(smarthost=new, route=(("far.test", token),))
        for key, server, renewed in ("smarthost", old, new), ("route", old, token), ("route", new, new), ("far.test", None, None):
            self.assertEqual(routes.renewed(minimail.Target(key, "", server)), minimail.Target(key, "", renewed))

    def test_another_certificate(self):
        first, second = self.file("one.pem", CERTIFICATE), self.file("two.pem", CERTIFICATE)
        self.put(first)
        certificates = minimail.Certificates(self.config("MINIMAIL_TLS_CERT_FILE"))
        before = certificates.context()
        self.assertIs(certificates.context(), before)
        for text, another in ("/nonexistent.pem", False), (second, True):
            self.put(text)
            self.assertIs(certificates.context() is not before, another, text)

    def test_tls_without_ssl(self):
        with mock.patch.dict(sys.modules, {"ssl": None}):
            for option in "--smarthost", "--route", "--release":
                value = ("far.test=" if option == "--route" else "") + "smtps://u:secret@relay.test"
                domain = [] if option == "--release" else ["--domain", "here.test"]
                status, out, err = run_main("--data", os.path.join(self.directory(), "d"), "--smtp", "127.0.0.1:0", "--pop3", "off",
                                            "--web", "off", *domain, option, value)
                self.assertEqual((status, out, err.count("\n")), (1, "", 1), err)
                self.assertIn(option + " smtps://relay.test:465: this Python has no ssl module", err)
                self.assertNotIn("secret", err)


class SentByPrograms(Case):
    def test_sendmail_leaves_a_line_in_the_systems_log(self):
        lines, data = [], os.path.join(self.directory(), "d")
        system = mock.Mock(LOG_INFO=6, LOG_WARNING=4, LOG_ERR=3, syslog=lambda level, text: lines.append((level, text)))
        self.node(data=data, domain=["here.test"], catch_all="all@here.test")
        with mock.patch.dict(sys.modules, syslog=system):
            status, out, err = run_main("sendmail", "-f", "me@here.test", "bob@here.test", "--data", data, "--catch-all", "all@here.test", "--domain", "here.test",
                                        stdin="Subject: x\n\nhello\n")
            self.assertEqual((status, out, err), (0, "", ""))
            run_main("mail", "--data", data)
        self.assertEqual([(level, text.split(" ")[0], "sender=me@here.test" in text) for level, text in lines], [(6, "message", True)])

    @needs("relay")
    def test_one_hint_for_an_entry(self):
        """`queue flush` and `queue retry` move the hint: two of them made two attempts out of one wish."""
        config = Config(data=self.directory(), domain=("here.test",), no_sync=True)
        queue = minimail.open_stores(config).post.queue
        stores = minimail.open_stores(config)
        stores.door.send(minimail.Envelope("me@here.test"), [minimail.parse_address("bob@far.test")], LETTER)
        id = queue.ids()[0]
        dispatch = minimail.Dispatch(queue.read(id), next(queue.hints()))
        self.assertTrue(queue.claim(dispatch))
        queue.postpone(dispatch, time.time() + 600)
        queue.release(dispatch)
        for words in ("flush",), ("retry", id), ("flush",):
            self.assertEqual(run_main("queue", *words, "--data", config.data)[0], 0)
            self.assertEqual([os.path.relpath(hint, queue.root) for hint in queue.hints()], [os.path.join("new", id)])


# ======================================================================================================================
# The file itself
# ======================================================================================================================

def names_used(tree, bound=frozenset()):
    """Yield (name, line) of every name that code uses and does not bind itself; annotations do not count."""
    if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        inside = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.arg):
                inside.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                inside.add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node is not tree:
                inside.add(node.name)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                inside.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                inside |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        bound = bound | inside
    if isinstance(tree, ast.Name) and isinstance(tree.ctx, ast.Load) and tree.id not in bound:
        yield tree.id, tree.lineno
    for field, value in ast.iter_fields(tree):
        if field not in ("annotation", "returns"):
            for node in value if isinstance(value, list) else [value]:
                if isinstance(node, ast.AST):
                    yield from names_used(node, bound)


class TheFile(Case):
    @classmethod
    def setUpClass(cls):
        with open(SOURCE, encoding="utf-8") as file:
            cls.text = file.read()
        cls.tree = ast.parse(cls.text)
        cls.banners = [(cls.text.count("\n", 0, match.start()) + 1,
                        int(match.group(1))) for match in BANNER.finditer(cls.text)]

    def section(self, line):
        return max([1] + [number for start, number in self.banners if start <= line])

    def test_sections_are_numbered(self):
        numbers = [1] + [number for _, number in self.banners]
        if "cut" in SECTIONS:
            self.assertEqual(numbers, list(range(1, len(numbers) + 1)))
        self.assertEqual(list(map(int, re.findall(r"(?m)^ {4,5}(\d+)  \w", ast.get_docstring(self.tree)))), numbers, "the map")

    def test_drawings_name_the_sections_as_they_are_numbered(self):
        titles = {"session": "SMTP.", "delivery": "Delivery.", "mailbox": "Mailboxes", "POP3": "POP3.", "letters": "Letters", "web": "Web",
                  "queue": "Queue.", "relay": "Relay.", "DNS": "DNS.", "client": "SMTP client.", "bounce": "Bounces"}
        banners = {word: re.search(r"(?m)^# (\d+)  " + re.escape(title), self.text) for word, title in titles.items()}
        numbers = {word: banner.group(1) for word, banner in banners.items() if banner}
        self.assertTrue(len(numbers) == len(titles) or "cut" not in SECTIONS, "a title is another")
        texts = [ast.get_docstring(self.tree)]
        if os.path.exists(README):
            texts.append(open_and_read(README).decode())
        for text in texts:
            drawing = text[text.index("How mail travels"):][:1500]
            found = re.findall(r"(?:^|[>\u25ba] | )(\d+) (%s)\b" % "|".join(titles), drawing, re.M)
            self.assertEqual({word for _, word in found}, set(numbers))
            self.assertEqual([number for number, _ in found], [numbers[word] for _, word in found])

    def test_reading_order(self):
        """A section uses only names printed above it, or its own."""
        defined = {}
        for node in self.tree.body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [
                name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]
            for name in names:
                defined.setdefault(name, self.section(node.lineno))
        early = sorted({"section %d uses %s of section %d (line %d)" % (self.section(line), name, defined[name], line)
                        for name, line in names_used(self.tree) if defined.get(name, 0) > self.section(line)})
        self.assertEqual(early, [])

    def test_imports_are_of_the_standard_library(self):
        standard = getattr(sys, "stdlib_module_names", None)
        if standard is None:
            self.skipTest("this Python does not know")
        for node in ast.walk(self.tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
                node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                self.assertIn(name.partition(".")[0], standard)

    def test_licence(self):
        head = text = " ".join(ast.get_docstring(self.tree).split())
        if os.path.exists(os.path.join(HERE, "LICENSE")):
            text = " ".join(open_and_read(os.path.join(HERE, "LICENSE")).decode().split())
        for place in (text, head):                  # the zero-clause BSD licence, word by word
            words = re.search(r"Permission to use, copy.* PERFORMANCE OF THIS SOFTWARE\.", place).group().encode()
            self.assertEqual(hashlib.sha256(words).hexdigest(),
                             "1fc595850815e2afbaf6b3aa49edaa2fb51a99028bc3a78d0ebe834ead586914")
        copyright = re.search(r"Copyright \(C\) \d{4} [\w ]+", text).group().split(" Permission")[0]
        self.assertIn(copyright, head)
        self.assertIn("0BSD", head)

    def test_it_is_executable(self):
        self.assertTrue(os.access(SOURCE, os.X_OK))
        self.assertTrue(self.text.startswith("#!/usr/bin/env python3\n"))

    SMOKE = """if True:
        import socket, sys
        sys.path.insert(0, %r)
        exec(%r)
        import minimail
        pop3 = any(section.name == "pop3" for section in minimail.EXTENSIONS)
        with minimail.Node(smtp="127.0.0.1:0", pop3="127.0.0.1:0" if pop3 else "off", no_sync=True) as node:
            sock = socket.create_connection(node.smtp_address)
            file = sock.makefile("rwb")
            file.write(b"EHLO x\\r\\nMAIL FROM:<a@x>\\r\\nRCPT TO:<b@x>\\r\\nDATA\\r\\nhello\\r\\n.\\r\\nQUIT\\r\\n")
            file.flush()
            assert b"accepted as" in file.read()
            file.close(), sock.close()
            assert node.wait_for("b@x").read().endswith(b"\\r\\nhello\\r\\n")
            if pop3:
                sock = socket.create_connection(node.pop3_address)
                file = sock.makefile("rwb")
                file.write(b"USER b@x\\r\\nPASS x\\r\\nRETR 1\\r\\nQUIT\\r\\n")
                file.flush()
                assert b"hello\\r\\n.\\r\\n+OK" in file.read()
                file.close(), sock.close()
        for argv, status in (["--version"], 0), (["--help"], 0), (["--nonsense"], 2), (["user", "list"], 0), (["mail"], 0):
            if argv[0] in [*minimail.COMMANDS, *argv[:"-" in argv[0]]]:
                assert minimail.main(["--data", "none", *argv]) == status, argv
        exec(%r)
        print(sorted(section.name for section in minimail.EXTENSIONS))
        """

    def smoke(self, *arguments, directory=COMPILED.name, before="", after=""):
        """Send, store and fetch in another Python; return what it printed."""
        process = run_python(*arguments, "-B", "-c", self.SMOKE % (directory, before, after), cwd=self.directory())
        self.assertEqual(process.returncode, 0, process.stdout.decode())
        return process.stdout.decode()

    @needs("cut")
    def test_what_is_left_of_it_works(self):
        """Whatever `cut` leaves out."""
        sections = [name for name in SECTIONS if name != "cut"]
        for keep in [], ["relay", "standing"], [name for name in sections if name not in ("standing", "web")]:
            with self.subTest(keep=keep):
                directory = self.directory()
                with open(os.path.join(directory, "minimail.py"), "w", encoding="utf-8") as file:
                    file.write(cut_copy(*keep))
                printed = self.smoke("-W", "error", directory=directory, after="""if True:
                    minimail.Node(domain="example.org", smtp="127.0.0.1:0", pop3="off", no_sync=True).start()
                    for command in set("check cut dkim mail mx queue selftest wait".split()) - set(minimail.COMMANDS):
                        assert minimail.main([command]) == 2, command
                    """).splitlines()
                self.assertEqual(printed[-1], str(sorted(set(keep) - {"reading"})))

    def test_isolated_and_without_site(self):
        self.smoke("-I", "-S", "-W", "error")
        process = run_python("-I", "-S", "-W", "error", SOURCE, "--version")
        self.assertEqual(process.stdout.decode().strip(), "minimail " + minimail.__version__)

    def test_without_ssl(self):
        hidden = "sys.modules['ssl'] = sys.modules['_ssl'] = None"
        self.smoke(before=hidden, after="assert minimail.main(['--tls-cert', 'x.pem']) == 1")

    def test_without_openssl(self):
        """A Python whose hashlib has no OpenSSL: accounts by PBKDF2 over the built-in SHA-256."""
        self.smoke("-W", "ignore", before="sys.modules['ssl'] = sys.modules['_ssl'] = sys.modules['_hashlib'] = None",
                   after="""if True:
            minimail.PBKDF2_ROUNDS = 1000
            record = minimail.hash_password('secret')
            assert record.startswith('$pbkdf2$'), record
            assert minimail.check_password('secret', record) and not minimail.check_password('other', record)
        """)


# ======================================================================================================================
# The README: what it names is there, what it shows works
# ======================================================================================================================

README = os.path.join(HERE, "README.md")


@unittest.skipUnless(os.path.exists(README), "this copy came without its README")
class TheReadme(Case):
    @classmethod
    def setUpClass(cls):
        with open(README, encoding="utf-8") as file:
            cls.text = file.read()

    def blocks(self, *kinds):
        """Return the contents of its blocks of code of some kinds, list items' indents removed."""
        return [textwrap.dedent(code) for _, kind, code in re.findall(r"(?ms)^( *)```(\w*)\n(.*?)^\1```$", self.text) if kind in kinds]

    def test_every_option_is_in_the_table(self):
        rows = re.findall(r"(?m)^\| (`--.*?) \|", self.text.split("## Options")[1].split("\n## ")[0])
        named = [name for row in rows for name in re.findall(r"`--([a-z0-9-]+)", row)]
        ours = [name.replace("_", "-") for name in minimail.option_fields()] + ["version", "help"]
        self.assertEqual(sorted(named), sorted(ours))
        for row in rows:
            for name in re.findall(r"`--([a-z0-9-]+)", row):
                field = minimail.option_fields().get(name.replace("-", "_"))
                if field:
                    self.assertEqual("(repeatable)" in row, field["many"], row)

    def test_every_command_is_in_the_table(self):
        table = self.text.split("| command | |")[1].split("\n\n")[0]
        self.assertEqual(sorted(re.findall(r"(?m)^\| `([a-z]+)", table)), sorted(minimail.COMMANDS))

    def test_its_command_lines_are_understood(self):
        lines = "\n".join(self.blocks("", "sh", "yaml", "ini")).replace("\\\n", " ").splitlines()
        seen = 0
        for line in lines:
            match = re.search(r"^(?:\$ |ExecStart=|.*command: |[A-Z_]+=\S+ )?"
                              r"(?:python3 (?:minimail\.py|-m minimail)|(?:/opt/minimail/)?minimail)( .*)?$", line)
            if match:
                seen += 1
                words = shlex.split(match.group(1) or "", comments=True)
                with self.subTest(line=line):
                    command, own, given = minimail.parse_command_line(words)
                    minimail.read_options(given, minimail.option_name)
                    if own and command != "serve":
                        self.assertEqual(run_main(command, "--help")[0], 0)
        self.assertGreater(seen, 8)

    def test_its_python(self):
        first, second = [code for code in self.blocks("python") if code.startswith("import minimail") and "with minimail" in code
                         and "pytest" not in code]
        sending = "import smtplib; smtplib.SMTP(host, port).sendmail('a@x', 'bob@example.com', 'Subject: Welcome\\r\\n\\r\\n')\n"
        for code in first.replace("...\n", sending), second:
            ran = run_python("-c", code, cwd=COMPILED.name)
            self.assertEqual(ran.returncode, 0, ran.stdout.decode())
        self.assertRegex(ran.stdout.decode(), r"\Ahi\n.*\S\n\Z")

    def test_the_tests_it_names_exist(self):
        names = {name for name in os.listdir(os.path.join(HERE, ".ci"))} if os.path.isdir(os.path.join(HERE, ".ci")) else set()
        if not names:
            self.skipTest("this copy came without its checks")
        known = {"test_minimail.py": tests_of(os.path.join(HERE, "test_minimail.py"))}
        for name in names:
            if name.startswith("check_"):
                known[name] = tests_of(os.path.join(HERE, ".ci", name))
        threats = self.text.split("## Threats")[1].split("\n## ")[0]
        for row in re.findall(r"(?m)^\| .* \| (.*) \|$", threats)[1:]:
            for part in row.split(";"):
                place = re.search(r"in `(check_\w+\.py)`", part)
                place = place.group(1) if place else "test_minimail.py"
                for test in re.findall(r"`([A-Z]\w+(?:\.test_\w+)?)`", part):
                    self.assertIn(test, known[place] | {"FUZZ_SECONDS", "FUZZ_SEED"}, place)
        promises = self.text.split("## What a 250 promises")[1].split("\n## ")[0]
        for test in re.findall(r"`([A-Z]\w+(?:\.test_\w+)?)`", "".join(re.findall(r"(?m)^\| .* \| (.*) \|$", promises))):
            self.assertIn(test, known["check_crash.py"] | known["test_minimail.py"])

    def test_what_it_links_to_exists(self):
        titles = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"(?m)^#+ (.*)$", self.text)}
        for anchor in re.findall(r"\]\(#([^)]+)\)", self.text):
            self.assertIn(anchor, titles)


def tests_of(path):
    """Return the names of a file's test classes and tests."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
            found.update("%s.%s" % (node.name, item.name) for item in node.body if isinstance(item, ast.FunctionDef))
    return found


# ======================================================================================================================
# All tests at once: in three processes, as many tests wait; each takes the classes that no other has taken yet
# ======================================================================================================================

class Untaken(unittest.TestSuite):
    """The tests of a class, unless another process took them."""

    def __init__(self, case, place):
        super().__init__(unittest.defaultTestLoader.loadTestsFromTestCase(case))
        self.mark = os.path.join(place, case.__name__)

    def run(self, result, debug=False):
        try:
            open(self.mark, "x").close()
        except FileExistsError:
            return result
        return super().run(result, debug)


class OtherTest:
    """A test of another process, as results name it."""

    def __init__(self, name):
        self.name = name

    def __str__(self):
        return self.name

    def shortDescription(self):
        return None


class WholeResult(unittest.TextTestResult):
    """Counts what the other processes ran, too."""

    KINDS = "failures", "errors", "skipped", "expectedFailures"

    def __init__(self, *arguments, others, **keywords):
        super().__init__(*arguments, **keywords)
        self.others = others

    def stopTestRun(self):
        super().stopTestRun()
        for process, report in self.others:
            status = process.wait()
            if status:
                self.errors.append((OtherTest("another process"), "It ended with status %d.\n" % status))
                continue
            with open(report, encoding="utf-8") as file:
                count, *kinds = json.load(file)
            self.testsRun += count
            for kind, found in zip(self.KINDS, kinds):
                getattr(self, kind).extend((OtherTest(name), text) for name, text in found)


PROCESSES = 3


def run_untaken(place, number, **options):
    """Return the result of running all classes that no other process takes first."""
    cases = [thing for thing in globals().values() if isinstance(thing, type) and issubclass(thing, unittest.TestCase)]
    first = number * len(cases) // PROCESSES
    suite = unittest.TestSuite(Untaken(case, place) for case in cases[first:] + cases[:first])
    return unittest.TextTestRunner(warnings=None if sys.warnoptions else "default", **options).run(suite)


def run_other(number, place, report):
    """Be one of the other processes: leave the result in a file."""
    result = run_untaken(place, int(number), stream=io.StringIO())
    kinds = [[(str(test), text) for test, text in getattr(result, kind)] for kind in WholeResult.KINDS]
    with open(report, "w", encoding="utf-8") as file:
        json.dump([result.testsRun, *kinds], file)


def run_all():
    """Run all tests in some processes; return the status to exit with."""
    with tempfile.TemporaryDirectory(prefix="test-minimail-") as place, contextlib.ExitStack() as stack:
        warn = ["-W" + option for option in sys.warnoptions]
        others = []
        for number in range(1, PROCESSES):
            report = os.path.join(place, "report-%d.json" % number)
            words = [sys.executable, *warn, os.path.abspath(__file__), OTHER, str(number), place, report]
            others.append((stack.enter_context(subprocess.Popen(words)), report))
        result = run_untaken(place, 0, resultclass=functools.partial(WholeResult, others=others))
    return not result.wasSuccessful()


OTHER = "--other-process"
if __name__ == "__main__":
    if sys.argv[1:2] == [OTHER]:
        run_other(*sys.argv[2:])
    elif len(sys.argv) > 1 or (os.cpu_count() or 1) < 2:
        unittest.main()
    else:
        sys.exit(run_all())
