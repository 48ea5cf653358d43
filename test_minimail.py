#!/usr/bin/env python3
"""Tests of minimail.py, section by section under the same banners: python3 test_minimail.py [-v] [CLASS[.test]].

Plain unittest: no network but loopback, no fixed ports, no root, no sleeping instead of waiting. Our own client, Talk,
sends and compares bytes; smtplib, poplib, mailbox and email stand by as witnesses that were not written here.
"""
import ast
import base64
import builtins
import contextlib
import datetime
import email
import errno
import gc
import hashlib
import io
import itertools
import json
import mailbox
import os
import poplib
import random
import re
import select
import signal
import smtplib
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
from unittest import mock

import minimail
from minimail import Address, Config, Content, Refused

try:
    import ssl
except ImportError:
    ssl = None

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.join(HERE, "minimail.py")
PATIENCE = 30.0                                     # seconds until something that does not come is missed
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

    def node(self, **options):
        """Return a running node, in capture mode unless told otherwise."""
        node = minimail.Node(**dict(dict(smtp="127.0.0.1:0", pop3="127.0.0.1:0", hostname="mail.test", no_sync=True),
                                    **options))
        node.start()
        self.addCleanup(node.stop)
        return node

    def stores(self, **options):
        """Return the stores of section 7 over a new data directory."""
        stores = minimail.open_stores(Config(**dict(dict(data=self.directory(), hostname="mail.test", no_sync=True),
                                                    **options)))
        self.addCleanup(stores.storage.close)
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

    def refused(self, code, function, *arguments):
        """Assert that function(*arguments) is refused with a reply that begins with `code`."""
        with self.assertRaises(Refused) as caught:
            function(*arguments)
        self.assertTrue(str(caught.exception.reply).startswith(code), str(caught.exception.reply))

    def assertNothingLeft(self, data):
        """No message file, in place or half-written, is in a data directory."""
        self.assertEqual([], [os.path.join(place, name) for place, _, names in os.walk(data) for name in names
                              if "/run" not in place and "users" not in name and "aliases" not in name])


def stuff_slowly(content):
    return b"\r\n".join(b"." + line if line.startswith(b".") else line for line in content.split(b"\r\n"))


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


def run_main(*argv, environ=None, stdin=""):
    """Return (status, standard output, standard error) of main() in this process."""
    log, out, err = minimail.log, io.StringIO(), io.StringIO()
    before = log.handlers, log.propagate, log.level, minimail.logging.raiseExceptions
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with mock.patch.dict(os.environ, environ or {}), mock.patch.object(sys, "stdin", io.StringIO(stdin)), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = minimail.main(list(argv))
    finally:
        log.handlers, log.propagate, level, minimail.logging.raiseExceptions = before
        log.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler)
    return status, out.getvalue(), err.getvalue()


def run_python(*arguments, timeout=120, **keywords):
    """Return the ended process of another Python."""
    return subprocess.run([sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=timeout, **keywords)


class Program:
    """minimail.py in a process of its own."""

    def __init__(self, *argv):
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen([sys.executable, SOURCE, *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=self.errors)
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line.decode().rstrip("\n"))
            if self.lines[-1] == "ready":
                break

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


def setUpModule():
    sys.unraisablehook = lambda what: UNRAISABLE.append("%r in %r" % (what.exc_value, what.object))
    threading.excepthook = lambda what: UNRAISABLE.append("%r in %r" % (what.exc_value, what.thread))


def tearDownModule():
    gc.collect()
    assert not UNRAISABLE, UNRAISABLE


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
    "verbose": ("on", True, "x"),
}
NEEDED = {"smtps": "tls_cert", "pop3s": "tls_cert", "tls_key": "tls_cert", "catch_all": "domain"}
FLAGS = ("no_sync", "quiet", "verbose")


def flag(name):
    return "--" + name.replace("_", "-")


class Options(Case):
    def config(self, argv, environ=None):
        return minimail.read_config(minimail.parse_command_line(argv)[2], environ or {})

    def check(self, config, name, value):
        found = getattr(config, name)
        self.assertEqual(found[0].text if name == "fault" else found, value)

    def test_every_option_through_three_doors(self):
        self.assertEqual(set(OPTIONS), {field.name for field in minimail.dataclasses.fields(Config)})
        for name, (text, value, _) in OPTIONS.items():
            needed = NEEDED.get(name)
            with self.subTest(name):
                argv = [flag(name)] + ([] if name in FLAGS else [text])
                argv += [flag(needed), OPTIONS[needed][0]] if needed else []
                self.check(self.config(argv), name, value)
                environ = {"MINIMAIL_" + key.upper(): OPTIONS[key][0] for key in (name, needed) if key}
                self.check(self.config([], environ), name, value)
                if name != "workers":
                    self.check(minimail.Node(**{name: text}).config, name, value)

    def test_wrong_values_are_named(self):
        for name, (_, _, bad) in OPTIONS.items():
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

    def test_version_and_help(self):
        self.assertEqual(run_main("--version"), (0, "minimail %s\n" % minimail.__version__, ""))
        status, out, err = run_main("--help")
        self.assertEqual((status, err), (0, ""))
        for name in OPTIONS:
            self.assertIn(flag(name), out)
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
                     "<b@x/../y>"):
            with self.subTest(text):
                self.refused("501 5.1.3", minimail.parse_path, text)
        self.refused("553 5.1.3", minimail.parse_path, "<bob>")

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


class Wires(Case):
    def pair(self, timeout=PATIENCE, clock=time.monotonic):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        theirs.settimeout(PATIENCE)
        return minimail.Wire(ours, timeout, clock), theirs

    def test_lines(self):
        wire, peer = self.pair()
        peer.sendall(b"one\r\ntwo\n\r\n" + b"x" * 10 + b"\r\nA\rB\r\n")
        self.assertEqual([wire.line(11) for _ in range(5)], [b"one", b"two", b"", b"x" * 10, b"A\rB"])

    def test_line_limit(self):
        for size in (1000, 7):
            wire, peer = self.pair()
            data = b"x" * 500 + b"\r\nshort\r\n" + b"y" * 101 + b"\r\nend\r\n"
            pieces = [data[i:i + size] for i in range(0, len(data), size)]
            sender = threading.Thread(target=lambda peer, pieces: list(map(peer.sendall, pieces)), args=(peer, pieces))
            sender.start()
            self.assertRaises(minimail.LineTooLong, wire.line, 100)
            self.assertEqual(wire.line(100), b"short")
            self.assertRaises(minimail.LineTooLong, wire.line, 100)
            self.assertEqual(wire.line(100), b"end")
            sender.join()

    def test_an_endless_line_is_not_kept(self):
        wire, peer = self.pair()
        sender = threading.Thread(target=lambda: (peer.sendall(b"x" * 5_000_000), peer.close()))
        sender.start()
        self.assertRaises(minimail.Disconnected, wire.line, 100)
        sender.join()
        self.assertLess(len(wire.input), 200)

    def test_output_waits_for_input_or_size(self):
        wire, peer = self.pair()
        peer.sendall(b"A\r\nB\r\n")
        wire.line(100)
        wire.send(b"1")
        wire.line(100)
        wire.send(b"2")
        self.assertEqual(select.select([peer], [], [], 0)[0], [], "nothing goes out while a command is there")
        peer.sendall(b"C\r\n")
        wire.line(100)
        self.assertEqual(peer.recv(100), b"12")

    def test_deadline(self):
        wire, peer = self.pair(timeout=0.01)
        self.assertRaises(minimail.TimedOut, wire.line, 100)

    def test_who_drips_bytes_runs_into_the_deadline(self):
        wire, peer = self.pair(timeout=10, clock=Clock(step=1.0))
        peer.sendall(b"x")
        wire.blocked = lambda: (peer.sendall(b"x"), contextlib.nullcontext())[1]
        with mock.patch.object(minimail, "set_kernel_timeout"):
            wire.sock.setblocking(False)
            self.assertRaises(minimail.TimedOut, wire.line, 100)
        self.assertLess(len(wire.input), 20)

    def test_a_slow_message_gets_time_for_what_it_brings(self):
        clock = Clock()
        wire, peer = self.pair(timeout=10, clock=clock)
        blocks = wire.blocks(Content())
        next(blocks)
        for _ in range(100):
            peer.sendall(b"x" * 2 * minimail.MIN_RATE)
            next(blocks)
            clock.now += 1.5                        # faster than MIN_RATE: it may take as long as it likes
        for _ in range(100):
            peer.sendall(b"x")
            clock.now += 1.5
            try:
                next(blocks)
            except minimail.TimedOut:
                break
            if clock.now > wire.deadline + 10:
                break
        self.assertGreater(clock.now, wire.deadline)

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
        wire.send_file(fd, 5, len(content) - 5)
        wire.send(b"tail")
        wire.flush()
        wire.close()
        reader.join(PATIENCE)
        self.assertEqual(b"".join(received), b"head" + content[5:] + b"tail")

    def test_the_other_side_is_gone(self):
        wire, peer = self.pair()
        peer.sendall(b"half a line")
        peer.close()
        self.assertRaises(minimail.Disconnected, wire.line, 100)
        wire.send(b"x")
        self.assertRaises(minimail.Disconnected, lambda: [wire.send(b"x" * 70000) for _ in range(3)])
        wire.close()


# ======================================================================================================================
# 5  Durable files
# ======================================================================================================================

class DurableFiles(Case):
    def storage(self, root=None, sync=True):
        storage = minimail.Storage(root or self.directory(), sync)
        storage.open()
        self.addCleanup(storage.close)
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

    def test_who_is_alive(self):
        root = self.directory()
        here, other = self.storage(root), self.storage(root)
        self.assertTrue(here.is_alive(other.token) and here.is_alive(here.token))
        self.assertFalse(here.is_alive("00000000"))
        os.close(other._lock)                       # as when it is killed: the file stays, the lock does not
        other._lock = -1
        self.assertFalse(here.is_alive(other.token))
        open(os.path.join(here.run, "%s.mail1" % other.token), "w").close()
        here.sweep()
        self.assertEqual(os.listdir(here.run), [here.token + ".lock"])
        self.assertEqual(len({here.new_id(1e9) for _ in range(1000)} | {self.storage(root).new_id(1e9)}), 1001)

    def test_wake(self):
        root = os.path.join(self.directory(), "long" * 20, "path" * 20)
        here, other = self.storage(root), self.storage(root)
        with other.waker("mail") as sock:
            sock.settimeout(PATIENCE)
            here.wake("mail")
            self.assertEqual(sock.recv(10), b"\n")
        here.wake("mail")                           # nobody listens any more

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
        self.assertEqual(reloaded.get(), [])

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
        envelope = minimail.Envelope("a@example.net", [minimail.parse_address(r) for r in recipients or [self.box]])
        return self.data.post.send(envelope, [self.data.book.resolve(r) for r in envelope.recipients], content)

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
        listing = self.boxes.listing(self.box)
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
        self.boxes.delete(self.box, listing[5])
        self.boxes.delete(self.box, listing[5])     # gone already is no error
        self.assertEqual([item.uid for item in self.boxes.listing(self.box)], uids[:5] + uids[6:])

    def test_kept_listings_are_never_stale(self):
        self.put()
        changes = {
            "delivered": lambda: self.put(), "foreign": lambda: self.put_foreign("1.x.y", b"x\n"),
            "seen": lambda: self.boxes.set_seen(self.box, self.boxes.listing(self.box)[-1]),
            "deleted": lambda: self.boxes.delete(self.box, self.boxes.listing(self.box)[0]),
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
                    "8.sized,S=5,W=8:2,": b"a\nb\n\n"[:5], "9." + "l" * 100: b"x\n", "big": b"line\n" * 200_000,
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
            self.assertEqual(item.size, len(crlf if crlf[-1:] in (b"", b"\n") else crlf + b"\r\n"), item.name)

    def test_tmp_is_swept(self):
        self.put()
        tmp = os.path.join(self.path, "tmp")
        names = {"1.%s.h" % self.data.storage.new_id(1e9): True, "1.00000000-00000-deadbeef1.h": False,
                 "foreign-young": True, "foreign-old": False}
        for name in names:
            open(os.path.join(tmp, name), "w").close()
        old = time.time() - 37 * 3600
        os.utime(os.path.join(tmp, "foreign-old"), (old, old))
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
                for name in hide:
                    if hasattr(hashlib, name):
                        stack.enter_context(mock.patch.object(hashlib, name))
                        delattr(hashlib, name)
                record = minimail.hash_password("s\xe9cret")
                if "scrypt" in hide:
                    self.assertTrue(record.startswith("$pbkdf2$500$"), record)
                self.assertNotEqual(record, minimail.hash_password("s\xe9cret"), "salted")
                self.assertTrue(minimail.check_password("s\xe9cret", record))
                self.assertFalse(minimail.check_password("secret", record))
            if hide:
                self.assertTrue(minimail.check_password("s\xe9cret", record), "a record holds elsewhere")

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
        envelope = minimail.Envelope("", [Address("A", "x"), Address("a", "X"), Address("a", "x")])
        stores.post.send(envelope, [stores.book.resolve(r) for r in envelope.recipients], b"x\r\n")
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


# ======================================================================================================================
# 8 to 12  DNS, queue, bounces, SMTP client, relay
# ======================================================================================================================


# ======================================================================================================================
# 13  Sessions, policy, listeners
# ======================================================================================================================

def our_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("minimail")]


class Pools(Case):
    def test_idle_sessions_cost_no_threads(self):
        node = self.node()
        talks = [self.talk(node.smtp_address if i % 2 else node.pop3_address, hello=False) for i in range(200)]
        for talk in talks:
            self.assertRegex(talk.reply(), r"^(220|\+OK)")
        self.assertLess(len(our_threads()), 20)
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

    def test_connections_are_limited(self):
        node = self.node(max_connections=2)
        first, second = self.talk(node.smtp_address), self.talk(node.pop3_address)
        self.dialog(node.smtp_address, "S: 421 4.3.2\nS: closed")
        self.dialog(node.pop3_address, "S: -ERR [SYS/TEMP]\nS: closed")
        first.close()

        def free():
            with Talk(node.smtp_address) as talk:
                return talk.reply().startswith("220")
        self.eventually(free, "a connection is free again")
        self.assertEqual(second.ask("QUIT"), "+OK")
        self.eventually(lambda: not node.site.sessions and not node.site.connections.total)

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

    def test_throttle(self):
        clock, slept = Clock(), []
        throttle = minimail.Throttle(clock, slept.append)
        for _ in range(minimail.LOGIN_FAILURES):
            self.assertFalse(throttle.shut_out("c"))
            throttle.failed("c")
        self.assertTrue(throttle.shut_out("c"))
        self.assertFalse(throttle.shut_out("d"))
        self.assertEqual(slept, sorted(slept))
        self.assertLess(slept[0], slept[-1])
        clock.now += minimail.LOGIN_WINDOW
        self.assertFalse(throttle.shut_out("c"))
        for client in range(11_000):
            throttle.failed(str(client))
        self.assertLessEqual(len(throttle._failures), 10_000, "no memory to be filled from outside")
        throttle.failed("e")
        throttle.succeeded("e")
        self.assertNotIn("e", throttle._failures)

    def test_deadline(self):
        node = self.node(timeout=1)
        talks = []
        for address, ours, theirs in (
                (node.smtp_address, "", ["220"]), (node.pop3_address, "", ["+OK"]),
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

    def test_nothing_leaks(self):
        temporary = self.directory()
        data = self.directory()

        def run(i):
            with minimail.Node(smtp=["127.0.0.1:0", "127.0.0.1:0"], pop3="127.0.0.1:0", no_sync=True,
                               data=None if i % 2 else data) as node:
                if i % 10 == 0:
                    self.deliver(node, b"x\r\n", "bob@x")
                    with Talk(node.pop3_address) as talk:
                        talk.ask("USER bob@x")
                        node.wait_for("bob@x")
        with mock.patch.object(tempfile, "tempdir", temporary):
            run(0)
            threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
            for i in range(100):
                run(i)
            self.assertEqual(os.listdir(temporary), [])
        self.eventually(lambda: threading.active_count() <= threads, "all threads ended")
        self.assertLessEqual(len(os.listdir("/proc/self/fd")), descriptors)
        self.assertEqual(os.listdir(os.path.join(data, "run")), [])

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
# 14  SMTP
# ======================================================================================================================

class Dialogs(Case):
    """RFC 5321 as sessions. The node is shared; each test has its own connection."""

    @classmethod
    def setUpClass(cls):
        cls.shared = minimail.Node(smtp="127.0.0.1:0", pop3="127.0.0.1:0", hostname="mail.test", no_sync=True,
                                   max_size=200_000)
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
                                          "CHUNKING",
                                          "AUTH PLAIN LOGIN", "HELP"})
        self.assertEqual(talk.ask("HELO x"), "250 mail.test")

    def test_order(self):
        self.session("""\
            S: 220
            C: MAIL FROM:<a@x>
            S: 503 5.5.1
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
                "EHLO": "501", "EHLO a b": "501", "FOO": "500 5.5.2", "": "500", "MAIL": "501", "MAIL FROM <a@x>": "501",
                "MAIL TO:<a@x>": "501", "MAIL FROM:a@x": "501", "MAIL FROM:<a@x> SIZE=x": "501 5.5.4",
                "MAIL FROM:<a@x> BODY=9BIT": "501 5.5.4", "MAIL FROM:<a@x> NOSUCH=1": "555 5.5.4",
                "MAIL FROM:<a@x> SMTPUTF8=1": "555",
                "MAIL FROM:<a@x> SIZE=1 SIZE=1": "501", "MAIL FROM:<a@x> SIZE=200001": "552 5.3.4", "MAIL FROM:<bob>": "553",
                "MAIL FROM:<a\x00@x>": "501", "MAIL FROM:<a\x1b@x>": "501", "MAIL FROM:<j\xf6rg@x>": "553 5.6.7",
                "EXPN x": "502 5.5.1",
                "TURN": "502", "VRFY": "501", "VRFY bob": "252", "NOOP": "250", "DATA x": "501", "RSET x": "501",
                "QUIT x": "501",
                "STARTTLS": "503", "AUTH FOO": "504 5.5.4", "AUTH PLAIN !": "501", "AUTH PLAIN YQ==": "501", "BDAT": "501",
                "BDAT -1": "501", "BDAT 1 FIRST": "501", "X" * 4097: "500 5.5.2", "greet": "500", "command x": "500",
                "HELP": "214 2.0.0",
                "HELP MAIL": "214", "MAIL FROM:<a@x> AUTH=<>": "250", "mail FROM: <a@x>": "250", "MAIL FROM:<>": "250",
                "MAIL FROM:<a@x> size=200000 BODY=8bitmime SMTPUTF8": "250", "MAIL FROM:<@r.example:a@x>": "250"}.items():
            with self.subTest(command[:50]):
                self.session("C: %s\nS: %s" % (command, reply))
        for command, reply in {
                "RCPT": "501", "RCPT FROM:<a@x>": "501", "RCPT TO:<>": "501 5.1.3", "RCPT TO:<a@x> NOTIFY=NEVER": "555",
                "RCPT TO:<bob>": "553",
                "RCPT TO:<j\xf6rg@x>": "553 5.6.7", "RCPT TO:<%s@x>" % ("a" * 256): "553 5.1.3", "RCPT TO:<postmaster>": "250",
                "RCPT TO:<@r.example,@s.example:a@x>": "250", "RCPT TO:<a@[127.0.0.1]>": "250", 'RCPT TO:<"a b"@x>': "250",
                "RCPT TO: <a@x>": "250"}.items():
            with self.subTest(command[:50]):
                self.session("C: MAIL FROM:<a@x>\nS: 250\nC: %s\nS: %s" % (command, reply))
        talk = self.talk(self.shared.smtp_address)
        self.assertTrue(talk.send(b"MAIL FROM:<\xff@x>\r\n").reply().startswith("501"))
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

        def note(wire):
            sent.append(b"".join(wire.output))
            flush(wire)
        talk = self.talk(self.shared.smtp_address)
        with mock.patch.object(minimail.Wire, "flush", note):
            self.dialog(talk, """\
                C: MAIL FROM:<a@x>
                C: RCPT TO:<pipe1@x>
                C: RCPT TO:<pipe2@x>
                C: RCPT TO:bad
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
            self.eventually(lambda node=node: not node.site.sessions)
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
                       "C: HELO x\nS: 250\nC: AUTH PLAIN AGEAYg==\nS: 503", "C: AUTH PLAIN =\nS: 501"):
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
                client.sendmail("not an address", ["lib@x"], b"")
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
    """What POP3 hands out is byte for byte what was sent, below the trace headers."""

    def check(self, node, name):
        content = SAMPLES[name]
        expected = content if content.endswith(b"\r\n") or not content else content + b"\r\n"
        with Talk(node.pop3_address) as talk:
            for command in ("", "USER %s@x" % name.replace(" ", "_").replace(",", ""), "PASS x"):
                answer = talk.ask(command) if command else talk.reply()
                self.assertTrue(answer.startswith("+OK"), answer)
            size = int(talk.ask("LIST 1").split()[2])
            message = talk.listing("RETR 1")
            self.assertEqual(size, len(message))
            self.assertEqual(talk.listing("TOP 1 1000000"), message)
            self.assertTrue(talk.ask("DELE 1").startswith("+OK"))
            talk.ask("QUIT")
        self.assertTrue(message.startswith(b"Return-Path: <"))
        trace = re.match(rb"(?:.*\r\n)*?Received: .*\r\n(?:\t.*\r\n)*", message).group()
        self.assertTrue(message[len(trace):] == expected, "%s: %r..." % (name, message[len(trace):][:100]))

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


class NodeMode(Case):
    """Who may send what to whom where mail is kept for some domains only."""

    def start(self, **options):
        data = self.directory()
        with mock.patch.object(minimail, "SCRYPT", dict(n=16, r=1, p=1)):
            with open(os.path.join(data, "users"), "w") as file:
                file.write("bob@example.org:%s\neve@example.org:%s\n" % (minimail.hash_password("bobs"),
                                                                         minimail.hash_password("eves")))
        with open(os.path.join(data, "aliases"), "w") as file:
            file.write("sales@example.org: bob@example.org\n")
        node = self.node(data=data, domain="example.org", **options)
        node.site.throttle.sleep = lambda seconds: None
        return node

    @staticmethod
    def plain(name, password):
        return base64.b64encode(("\0%s\0%s" % (name, password)).encode()).decode()

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
            """ % (self.plain("bob@example.org", "eves"), self.plain("bob", "bobs"),
                   base64.b64encode(b"eve@example.org\0bob@example.org\0bobs").decode(),
                   self.plain("Bob@example.org", "bobs")))

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
                self.assertTrue(talk.ask("AUTH PLAIN " + self.plain("bob@example.org", "guess")).startswith("535"))
        self.dialog(self.talk(node.smtp_address), "C: AUTH PLAIN %s\nS: 421 4.7.0\nS: closed" % self.plain("bob@example.org",
                                                                                                           "bobs"))
        self.dialog(node.pop3_address, "S: +OK\nC: USER bob@example.org\nS: -ERR [AUTH]\nS: closed")

    def test_no_password_in_clear_from_afar(self):
        node = self.start()
        with mock.patch.object(minimail, "is_loopback", lambda host: False):
            talk = self.talk(node.smtp_address, hello=False)
            talk.reply()
            self.assertNotIn("AUTH", talk.ask("EHLO x"))
            self.dialog(talk, "C: AUTH PLAIN %s\nS: 538 5.7.11" % self.plain("bob@example.org", "bobs"))
            pop = self.dialog(node.pop3_address,
                              "S: +OK\nC: USER bob@example.org\nS: -ERR [AUTH]\nC: AUTH PLAIN %s\nS: -ERR [AUTH]"
                              % self.plain("bob@example.org", "bobs"))
            capabilities = pop.listing("CAPA")
            self.assertFalse(b"USER" in capabilities or b"SASL" in capabilities)

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
            """ % self.plain("bob@example.org", "bobs"))

    def test_a_new_account_may_log_in_at_once(self):
        node = self.start()
        self.assertEqual(run_main("--data", node.data, "user", "add", "New@example.org", "--password-stdin", stdin="pw\n")[0],
                         0)
        self.eventually(lambda: node.stores.accounts.names().get("new@example.org"))
        self.dialog(node.pop3_address, "S: +OK\nC: USER new@example.org\nS: +OK\nC: PASS pw\nS: +OK 0")


@unittest.skipUnless(ssl, "this Python has no ssl")
class TLS(Case):
    def start(self, **options):
        self.pem = self.file("cert.pem", CERTIFICATE)
        return self.node(tls_cert=self.pem, smtps="127.0.0.1:0", pop3s="127.0.0.1:0", **options)

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
        self.dialog(talk, "C: RCPT TO:<b@x>\nS: 503\nC: MAIL FROM:<a@x>\nS: 503")    # all is forgotten, the name too
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
        pop = self.talk(node.pop3_address, hello=False)
        pop.reply()
        pop.send(b"STLS\r\nUSER evil@x\r\nPASS x\r\n")
        self.assertEqual(pop.reply(), "+OK go ahead")
        pop.start_tls()
        self.dialog(pop, "C: STAT\nS: -ERR\nC: PASS x\nS: -ERR")

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
        self.dialog(talk, "S: 220\nC: EHLO x\nS: 250\n" + "C: NOOP\n" * 2000 + "S: 250 2.0.0 ok\n" * 2000)

    def test_handshakes_that_do_not_come(self):
        node = self.start(timeout=2)
        silent = [self.talk(node.smtps_address, hello=False) for _ in range(10)]
        noise = self.talk(node.smtps_address, hello=False)
        noise.send("EHLO not tls\r\n")
        self.dialog(self.tls_talk(node.smtps_address), "S: 220\nC: QUIT\nS: 221\nS: closed")
        for talk in silent + [noise]:
            while talk.line() != "closed":
                pass
        self.eventually(lambda: not node.site.sessions)

    def test_old_versions(self):
        node = self.start()
        context = node.site.certificates.context()
        self.assertGreaterEqual(context.minimum_version, ssl.TLSVersion.TLSv1_2)

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
        for options in (dict(smtps="127.0.0.1:0"), dict(pop3s="127.0.0.1:0"), dict(tls_cert="/no/such.pem")):
            self.assertRaises(OSError, minimail.Node(smtp="127.0.0.1:0", pop3="off", **options).start)


# ======================================================================================================================
# 15  POP3
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

    def test_authorization(self):
        self.session("""\
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
        self.session("C: FOO\nS: -ERR\n" * 10 + "S: closed", log_in=False)
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
                       "C: AUTH PLAIN !\nS: -ERR", "C: AUTH PLAIN YQ==\nS: -ERR", "C: AUTH CRAM-MD5\nS: -ERR"):
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
        self.dialog(talk, "C: RETR 1\nS: -ERR\nC: TOP 1 0\nS: -ERR")
        self.assertEqual(len(talk.listing("RETR 2")), self.sizes[1])
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
                expected = re.sub(rb"(?<!\r)\n", b"\r\n", contents[name])
                expected += b"" if expected[-2:] in (b"", b"\r\n") else b"\r\n"
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
        for i in range(10_000):
            os.close(os.open(os.path.join(new, "%d.6b05e7a7-15e4c-c921a5cf%x.h,S=100,W=103" % (1e9 + i, i)), os.O_CREAT,
                             0o600))
        opened = []

        def note(function):
            return lambda path, *a, **k: (opened.append(str(path)), function(path, *a, **k))[1]
        with mock.patch.object(os, "open", note(os.open)), mock.patch.object(builtins, "open", note(open)):
            talk = self.session("C: STAT\nS: +OK 10000 1030000", user="many@x")
            self.assertEqual(len(talk.listing("LIST").splitlines()), 10_000)
            self.assertEqual(len(talk.listing("UIDL").splitlines()), 10_000)
        self.assertEqual([path for path in opened if "/new/" in path or "/cur/" in path], [])


# ======================================================================================================================
# 16  Node
# ======================================================================================================================

class Nodes(Case):
    def background(self, function, *arguments, **keywords):
        """Run a function in a thread; return a function that waits for its result."""
        results = []

        def run():
            try:
                results.append((function(*arguments, **keywords), None))
            except BaseException as error:
                results.append((None, error))
        thread = threading.Thread(target=run)
        thread.start()

        def result():
            thread.join(PATIENCE)
            value, error = results[0]
            if error:
                raise error
            return value
        self.addCleanup(thread.join)
        return result

    def test_the_example_of_the_documentation(self):
        with minimail.Node(smtp="127.0.0.1:0", pop3="127.0.0.1:0") as node:
            host, port = node.smtp_address
            with smtplib.SMTP(host, port, timeout=PATIENCE) as client:
                client.sendmail("a@example.net", ["bob@example.com", "eve@example.com"], "Subject: hi\n\nhello\n")
            message = node.wait_for("bob@example.com", timeout=PATIENCE)
            self.assertEqual(message.email()["Subject"], "hi")
            self.assertEqual(message.email().get_content().strip(), "hello")
            self.assertEqual((message.recipient, message.sender), ("bob@example.com", "a@example.net"))
            self.assertEqual(sorted(message.recipients), ["bob@example.com", "eve@example.com"])
            self.assertEqual(message.read(), open_and_read(message.path))
            self.assertEqual(message.size, len(message.read()))
            self.assertLess(abs(datetime.datetime.now(datetime.timezone.utc) - message.received_at),
                            datetime.timedelta(seconds=PATIENCE))
            with Talk(node.pop3_address) as talk:
                self.dialog(talk, "S: +OK\nC: USER bob@example.com\nS: +OK\nC: PASS x\nS: +OK\nC: UIDL 1\nS: +OK 1 "
                            + message.uid)
            self.assertEqual([m.recipient for m in node.messages()], ["eve@example.com", "bob@example.com"][::-1])
            message.delete()
            self.assertEqual([m.recipient for m in node.messages()], ["eve@example.com"])
            node.clear()
            self.assertEqual(node.messages(), [])
            data = node.data
            self.assertTrue(os.path.isdir(data))
        self.assertFalse(os.path.exists(data), "a temporary directory is gone at the end")

    def test_addresses(self):
        node = self.node(pop3="off")
        self.assertEqual((node.pop3_address, node.smtps_address, node.pop3s_address, node.web_address), (None,) * 4)
        self.assertGreater(node.smtp_address[1], 0)
        node = self.node(smtp=["127.0.0.1:0", "127.0.0.1:0"])
        self.assertEqual([name for name, _ in node.endpoints()], ["smtp", "smtp", "pop3"])
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
        threads = len(our_threads())
        with self.assertRaises(OSError) as caught:
            minimail.Node(smtp="127.0.0.1:0", pop3="%s:%d" % node.smtp_address).start()
        self.assertIn(str(node.smtp_address[1]), str(caught.exception))
        self.assertEqual(len(our_threads()), threads)
        with self.assertRaises(OSError) as caught:
            minimail.Node(smtp="127.0.0.1:0", pop3="off", data=self.file("f", b"")).start()
        self.assertRaises(ValueError, node.messages, "no address")
        self.assertRaises(ValueError, node.wait_for, "no address")

    def test_wait_for(self):
        node = self.node()
        with self.assertRaises(TimeoutError) as caught:
            node.wait_for("bob@x", timeout=0.01)
        self.assertIn("bob@x", str(caught.exception))
        first = self.background(node.wait_for, "bob@x", timeout=PATIENCE)
        two = self.background(node.wait_for, "BOB@X", timeout=PATIENCE, count=2)
        any_one = self.background(node.wait_for, timeout=PATIENCE)
        match = self.background(node.wait_for, None, timeout=PATIENCE, match=lambda message: message.email()["Subject"] == "2")
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
        waiting = self.background(here.wait_for, "bob@x", timeout=PATIENCE)
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
        smtp, pop3 = self.talk(node.smtp_address), self.dialog(node.pop3_address, "S: +OK")
        started = time.monotonic()
        node.stop()
        self.assertLess(time.monotonic() - started, 5)
        self.assertTrue(smtp.reply().startswith("421 4.3.2"))
        self.assertEqual([smtp.reply(), pop3.reply()], ["closed", "closed"])

    def test_a_message_in_flight_is_finished(self):
        node = self.node(data=self.directory())
        talk = self.talk(node.smtp_address)
        self.dialog(talk, envelope())
        stopped = self.background(node.stop)
        self.eventually(lambda: node.site is None or node.site.stopping)
        self.dialog(talk, "C: x\nC: .\nS: 250 2.0.0\nS: 421 4.3.2\nS: closed")
        stopped()
        node.start()
        self.assertEqual(len(node.messages("b@x")), 1)

    def test_several_nodes_and_many_clients(self):
        nodes = [self.node() for _ in range(3)]
        clients = [self.background(lambda node: [self.deliver(node, b"x\r\n", "bob@x") for _ in range(10)], node)
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
        self.assertEqual(run_python("-c", code, cwd=HERE).stdout, b"")

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
            assert "ssl" not in sys.modules and "http.server" not in sys.modules
            """ % HERE
        self.assertEqual(run_python("-B", "-c", code, cwd=directory).stdout, b"")


def open_and_read(path):
    with open(path, "rb") as file:
        return file.read()


class WithoutEpoll(Case):
    """Where the kernel has no epoll, each connection has a thread of its own."""

    def setUp(self):
        patch = mock.patch.object(minimail, "EPOLL", False)
        patch.start()
        self.addCleanup(patch.stop)

    def test_send_and_fetch(self):
        threads = threading.active_count()
        node = self.node()
        content = b"Subject: x\r\n\r\n.\r\n" + b"y" * 300_000 + b"\r\n"
        self.dialog(self.talk(node.smtp_address), """\
            C: MAIL FROM:<a@x>
            C: RCPT TO:<b@x>
            C: DATA
            C: one
            C: .
            C: NOOP
            C: QUIT
            S: 250
            S: 250
            S: 354
            S: 250 2.0.0
            S: 250
            S: 221
            S: closed
            """)
        self.deliver(node, content, "b@x")
        self.assertEqual(body_of(node.wait_for("b@x", count=2)[1].read()), content)
        self.assertEqual([body_of(message) for message in self.fetch(node, "b@x")], [b"one\r\n", content])
        node.stop()
        self.eventually(lambda: threading.active_count() <= threads)

    def test_deadline_and_stop(self):
        node = self.node(timeout=0.3)
        self.dialog(node.smtp_address, "S: 220\nS: 421 4.4.2\nS: closed")
        self.dialog(node.pop3_address, "S: +OK\nS: closed")
        node = self.node()
        smtp, pop3 = self.talk(node.smtp_address), self.dialog(node.pop3_address, "S: +OK")
        started = time.monotonic()
        node.stop()
        self.assertLess(time.monotonic() - started, 5, "idle sessions hold nothing up")
        self.assertTrue(smtp.reply().startswith("421 4.3.2"))
        self.assertEqual([smtp.reply(), pop3.reply()], ["closed", "closed"])

    @unittest.skipUnless(ssl, "this Python has no ssl")
    def test_tls(self):
        node = self.node(tls_cert=self.file("cert.pem", CERTIFICATE))
        talk = self.dialog(self.talk(node.smtp_address), "C: STARTTLS\nS: 220")
        talk.start_tls()
        self.dialog(talk, "C: EHLO x\nS: 250\n" + letter())


# ======================================================================================================================
# 17  Web inbox, JSON API, transcripts and lint, faults, wait, selftest
# ======================================================================================================================


# ======================================================================================================================
# 18  Command line
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
            self.fetch(node, "a@x")
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
                         ["connect", "message", "connect", "login", "fetch", "connect"])
        self.assertEqual(dict(events)["fetch"]["messages"], 1)
        self.assertTrue(dict(events)["refused"]["reason"].startswith("500 5.5.2"))


class CommandLine(Case):
    def start(self, *argv):
        self.data = self.directory()
        program = Program("--data", self.data, "--pop3", "127.0.0.1:0", "--web", "off", "--no-sync", *argv)
        self.addCleanup(program.end)
        return program

    def test_serve(self):
        program = self.start("--smtp", "127.0.0.1:0", "--smtp", "127.0.0.1:0", "--log", "json", "--hostname", "mail.test")
        self.assertEqual([re.sub(r":\d+$", ":N", line) for line in program.lines],
                         ["listening smtp 127.0.0.1:N"] * 2 + ["listening pop3 127.0.0.1:N", "ready"])
        with smtplib.SMTP(*program.address("smtp"), timeout=PATIENCE) as client:
            client.sendmail("a@x", ["bob@x"], "Subject: =?utf-8?q?gr=C3=BC=C3=9Fe?=\n\nhi")
        idle = self.talk(program.address("smtp"))
        self.assertEqual(run_main("--data", self.data, "mail")[:2], (0, "%6d %12d bob@x\n" % (1, os.stat(os.path.join(
            self.data, "mail/x/bob/new", os.listdir(os.path.join(self.data, "mail/x/bob/new"))[0])).st_size)))
        status, out, err = run_main("mail", "BOB@x", "--data", self.data)
        self.assertEqual((status, err, out.count("\n")), (0, "", 1))
        self.assertIn("gr\xfc\xdfe", out)
        started = time.monotonic()
        status, errors = program.end()
        self.assertEqual(status, 0, errors)
        self.assertLess(time.monotonic() - started, 8)
        self.assertTrue(idle.reply().startswith("421"))
        self.assertEqual(len(program.lines), 4, "nothing else on standard output")
        events = [json.loads(line)["event"] for line in errors.splitlines()]
        self.assertEqual([name for name in ("connect", "message", "stopping") if name not in events], [])

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

    def test_workers(self):
        program = self.start("--smtp", "127.0.0.1:0", "--workers", "2")
        parent = program.process.pid
        with open("/proc/%d/task/%d/children" % (parent, parent)) as file:
            children = list(map(int, file.read().split()))
        self.assertEqual(len(children), 2)
        for _ in range(4):
            with smtplib.SMTP(*program.address("smtp"), timeout=PATIENCE) as client:
                client.sendmail("a@x", ["bob@x"], "hi")
        self.assertEqual(run_main("--data", self.data, "mail")[1].split()[0], "4")
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

    def test_mail_creates_nothing(self):
        data = os.path.join(self.directory(), "none")
        self.assertEqual(run_main("--data", data, "mail"), (0, "", ""))
        self.assertEqual(run_main("--data", data, "mail", "bob@x"), (0, "", ""))
        self.assertFalse(os.path.exists(data))


# ======================================================================================================================
# The file itself
# ======================================================================================================================

BANNER = re.compile(r"^# ={100,}\n# (\d+)  ", re.M)


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
        self.assertEqual([number for _, number in self.banners], list(range(2, len(self.banners) + 2)))

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
        with open(os.path.join(HERE, "LICENSE"), encoding="utf-8") as file:
            text = " ".join(file.read().split())
        head = " ".join(ast.get_docstring(self.tree).split())
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
        pop3 = "pop3" in minimail.REGISTRY
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
        assert minimail.main(["--data", node.config.data + "-none", "mail"]) == 0
        exec(%r)
        print(sorted(minimail.REGISTRY))
        """

    def smoke(self, *arguments, directory=HERE, before="", after=""):
        """Send, store and fetch in another Python; return what it printed."""
        process = run_python(*arguments, "-B", "-c", self.SMOKE % (directory, before, after), cwd=self.directory())
        self.assertEqual(process.returncode, 0, process.stdout.decode())
        return process.stdout.decode()

    def without(self, *sections):
        """Return a directory with a copy of the file from which the text of some sections was cut."""
        starts = [match.start() for match in BANNER.finditer(self.text)] + [len(self.text)]
        parts = [self.text[:starts[0]]] + [self.text[i:j] for i, j in zip(starts, starts[1:])]
        directory = self.directory()
        with open(os.path.join(directory, "minimail.py"), "w", encoding="utf-8") as file:
            file.write("".join(part for number, part in enumerate(parts, 1) if number not in sections))
        return directory

    def test_optional_sections_can_be_deleted(self):
        relay, pop3, web = (8, 9, 10, 11, 12), (15,), (17,)
        commands = """if True:
            for argv, status in (["--version"], 0), (["--help"], 0), (["--nonsense"], 2), (["user", "list"], 0):
                assert minimail.main(argv) == status, argv
            minimail.Node(domain="example.org", smtp="127.0.0.1:0", pop3="off", no_sync=True).start()
            """
        for cut, left in ((relay, ["pop3", "web"]), (pop3, ["relay", "web"]), (web, ["pop3", "relay"]),
                          (relay + pop3 + web, [])):
            with self.subTest(cut=cut):
                printed = self.smoke(directory=self.without(*cut), after=commands).splitlines()
                self.assertEqual(printed[-1], str(left))

    def test_isolated_and_without_site(self):
        self.smoke("-I", "-S", "-W", "error")
        process = run_python("-I", "-S", SOURCE, "--version")
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


if __name__ == "__main__":
    unittest.main()
