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
import functools
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
            replies.append(talk.send(stuff_slowly(content) + b"\r\n.\r\n").reply())
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
                     ["--catch-all", "a@b.example"], ["user", "frob"], ["user", "add", "bob"], ["user", "add"], ["mail", "a b"],
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
                           (["--run-as", "no-such-user"], "no-such-user"), (["--smtp", "203.0.113.77:0"], "203.0.113.77")):
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
                "<bob@example.com>": "bob@example.com", " <b@x>": "b@x", "<b.o-b+tag_1@x-1.example>": "b.o-b+tag_1@x-1.example",
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
                     "<b@x@y>", "<b@-x>", "<b@x..y>", "<b@x-.y>", "<b@[1.2.3]>", "<b@[300.1.1.1]>", "<b@[IPv6:1::2::3]>", "<b@[x]>",
                     '<"a@x>', '<"a"b@x>', '<"a\rb"@x>', "<a\nb@x>", "<a\0b@x>", '<"a\0"@x>', "<a\x85b@x>", "<\udcff@x>", "<b@x y>",
                     "<b@%s.example>" % ("a" * 64), "<b@%s>" % ".".join(["abcdefgh"] * 30), "<<b@x>>", "<b(c)@x>", "<b@x/../y>"):
            with self.subTest(text):
                self.refused("501 5.1.3", minimail.parse_path, text)
        self.refused("553 5.1.3", minimail.parse_path, "<bob>")

    def test_parameters(self):
        self.assertEqual(minimail.parse_parameters("size=1 SMTPUTF8"), {"SIZE": "1", "SMTPUTF8": ""})
        for text in ("SIZE=", "=1", "-x", "SIZE=1 size=2", "a_b"):
            self.refused("501 5.5.4", minimail.parse_parameters, text)

    def test_look_alikes_keep_their_own_mailbox(self):
        keys = [minimail.parse_address(text + "@x").key for text in ("k", "\u212a", "i", "\u0130", "\u0131", "s", "\u017f", "\xe9",
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
    NASTY = ["a", "A", "..", ".", ".a", "a.", "../../etc/passwd", "/", "a/b", "a\\b", "\0", "a\0b", "%", "%2E", "%2e", "%25", ".%2e",
             "a b", " a", "a ", "con", "con.x", "CON", "com1", "lpt9", "nul.", "aux", "prn", "conx", "~", "~root", "-rf", "a:b", "a;2,b",
             "\xe9", "e\u0301", "\u212a", "k", "\uff0e\uff0e", "\u2024", "\u202e", "a\n", "*", "?", "<", "|", '"', "'", "new", "cur",
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
    """Return (content, rest) of a DATA stream, or None while its end is not there, as the RFC says it, byte by byte."""
    data = b"\r\n" + stream
    end = data.find(b"\r\n.\r\n")
    if end < 0:
        return None
    return normalize_slowly(b"\r\n".join(line[1:] if line.startswith(b".") else line
                                         for line in data[2:end + 2].split(b"\r\n"))), data[end + 5:]


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
             (b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r\n.\r", b"\r.\r\n", b"\n.\r", b"\r\n.\r\r\n", b"\r\n\0.\r\n", b"\r\n.\0\r\n",
              b"\r\n..\r\n", b"\r\n.\r.\r\n", b"\r\r\n.", b"\n\r\n.\n", b"\r\n. \r\n")]
STREAMS = [b".\r\n", b"\r\n.\r\n", b"..\r\n.\r\n", b"...\r\n..\r\n....\r\n.\r\n", b"a\r\n.\r\nNOOP\r\n", b"\r.\r\n.\r\n", b"\n.\r\n.\r\n",
           b"a\rb\nc\r\n.\r\n", b"\r\r\n\n\n\r\r\r\n.\r\n", b".a\r\n.b\r\n.\r\n", b"\0\xff\x80\r\n.\r\n", b"x\r\n.\r\n.\r\nQUIT\r\n",
           b"\x1b$B%F%9%H\x1b(B\r\n.\r\n"] + [attempt + b"\r\n.\r\nrest" for attempt in SMUGGLING]


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
                self.assertEqual(feed_all(Content(), [stream[:i], stream[i:j], stream[j:]]), decode_slowly(stream), (stream, i, j))

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
            sender = threading.Thread(target=lambda: [peer.sendall(data[i:i + size]) for i in range(0, len(data), size)])
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



if __name__ == "__main__":
    unittest.main()
