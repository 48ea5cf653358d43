"""minimail among those who mean it no good, and with the real programs of those who may come in.

    python3 .ci/check_machine.py [-v] [Class[.test]]
    FUZZ_SECONDS=60 FUZZ_SEED=7 python3 .ci/check_machine.py Fuzz

After every attack: no traceback in the log, no control character either; threads, descriptors and drafts are as before; and
an ordinary message goes through. All traffic stays on this machine's loopback and in namespaces that netlab.py makes.
"""
# time limit: 300
import base64
import concurrent.futures
import contextlib
import os
import pwd
import random
import re
import resource
import select
import shutil
import signal
import smtplib
import socket
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time
import unittest
from pathlib import Path

import lab
import netlab
from check_clients import message
from check_network import accounts

ANN, BOB = "ann@a.test", "bob@a.test"
PASSWORD = "open sesame"                # check_network.accounts() gives it to all
TEAM = "team@a.test"                    # an alias to ann
NAMES = ("mx.a.test", "localhost")      # in the certificate
ORDINARY_USER = "nobody"
SERVER, STRANGER = netlab.HOSTS["a"][0], netlab.HOSTS["stranger"][0]
IDLE_THREADS = 8                        # what the pool may keep for the next clients
SEED = int(os.environ.get("FUZZ_SEED", "4"))
FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", "20"))


def setUpModule():
    """A certificate for all nodes, and room for many sockets in this process."""
    global certificate, tls_options, trusting, home
    stack = contextlib.ExitStack()
    unittest.addModuleCleanup(stack.close)
    home = stack.enter_context(lab.folder())
    certificate = netlab.make_certificate(home, *NAMES)
    tls_options = ("--tls-cert", certificate[0], "--tls-key", certificate[1], "--smtps", "127.0.0.1:0",
                   "--pop3s", "127.0.0.1:0")
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if hard == resource.RLIM_INFINITY else min(4096, hard), hard))


# A node, and what it costs

class Node(lab.Node):
    """A minimail whose data folder `before(node)` prepares, started through `wrapper`, its place belonging to `owner`."""

    def __init__(self, *options, before=None, wrapper=(), owner=None, **more):
        super().__init__(*options, **more)
        self.before, self.wrapper, self.owner = before, list(wrapper), owner

    def command(self, *words):
        return [*self.wrapper, *super().command(*words)]

    def start(self):
        if self.before and not self.data.exists():
            self.data.mkdir(0o700)
            self.before(self)
        if self.owner:
            for path in (self.place, *self.place.rglob("*")):
                shutil.chown(path, self.owner)
        super().start()
        for name in ("smtps", "pop3s"):
            setattr(self, name, self.listening.get(name, [None])[0])

    def stop(self, seconds=12):
        super().stop(seconds)
        check_log(self)

    def run(self, *words, stdin=b"", expect=0):
        """Run a command of minimail on this node's data."""
        return lab.run(super().command(*words), stdin, environment=self.environment, expect=expect)


def with_accounts(*addresses, aliases=(TEAM + ": " + ANN,)):
    """Return a preparation of a node: these accounts and aliases."""
    return lambda node: accounts(*addresses, aliases=aliases)(node.data)


def check_log(node):
    """No traceback and no raw control character in what a node has logged since the last look."""
    content = (node.place / "stderr").read_bytes()
    node.log_seen, begin = len(content), getattr(node, "log_seen", 0)
    text = content[begin:].decode("utf-8")          # a log that is no UTF-8 fails here
    assert "Traceback" not in text, "minimail met what it did not expect:\n%s" % text[-6000:]
    found = re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", text)
    assert not found, "a raw control character in the log: %r" % text[max(0, found.start() - 200):found.end() + 20]


def threads(node):
    return int(status(node.process.pid)["Threads"])


def descriptors(node):
    return len(os.listdir("/proc/%d/fd" % node.process.pid))


def drafts(node):
    """Return the files of messages that are not whole, and of writes that did not end."""
    return [path for path in lab.files(node.data) if path.parent.name == "tmp" or path.name.endswith(".tmp")]


def held(node):
    """Return what a node has open, and its drafts, for a failure's text."""
    folder, found = Path("/proc/%d/fd" % node.process.pid), [str(path) for path in drafts(node)[:5]]
    for descriptor in sorted(folder.iterdir()):
        with contextlib.suppress(OSError):
            found.append("%s %s" % (descriptor.name, os.readlink(descriptor)))
    sockets = re.findall(r"socket:\[(\d+)\]", "\n".join(found))
    table = Path("/proc/%d/net/tcp" % node.process.pid).read_text().splitlines()
    return found + [line for line in table if line.split()[9] in sockets]


def memory(node):
    """Return the resident memory in bytes."""
    return int(status(node.process.pid)["VmRSS"].split()[0]) * 1024


def status(pid):
    """Return the fields of /proc/PID/status."""
    lines = Path("/proc/%s/status" % pid).read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


# Clients

class Raw:
    """A client that says exactly what it is told, and reads one reply at a time."""

    def __init__(self, address, tls=False, seconds=15, greeted=True, source=""):
        self.sock = socket.create_connection(address, seconds, (source, 0))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""
        try:
            if tls:
                self.start_tls()
            self.greeting = self.reply() if greeted else ""
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def start_tls(self):
        assert not self.buffer, "said before the handshake: %r" % self.buffer
        self.sock = trusting.wrap_socket(self.sock, server_hostname=NAMES[0])

    def send(self, *pieces):
        self.sock.sendall(b"".join(pieces))

    def line(self):
        """Return the next line with its end, b"" at the end of the connection."""
        while b"\n" not in self.buffer:
            block = self.sock.recv(65536)
            if not block:
                return b""
            self.buffer += block
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line + b"\n"

    def reply(self):
        """Return the next reply as text: all lines of an SMTP reply, one line of POP3; "" at the end of the connection."""
        lines = [self.line()]
        while re.match(rb"\d\d\d-", lines[-1]):
            lines.append(self.line())
        return b"".join(lines).decode("utf-8").replace("\r\n", "\n").rstrip("\n")

    def ask(self, *commands):
        """Send commands one after the other; return the last one's reply."""
        for command in commands:
            self.send(command if isinstance(command, bytes) else command.encode(), b"\r\n")
            answer = self.reply()
        return answer

    def listing(self):
        """Return the lines of a POP3 answer up to its dot."""
        return list(iter(self.line, b".\r\n"))

    def rest(self, seconds=15):
        """Return what comes until the connection ends, a reset taken for an end too; AssertionError when it does not end."""
        deadline = time.monotonic() + seconds
        got, self.buffer = self.buffer, b""
        while True:
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                block = self.sock.recv(65536)
            except (ConnectionError, ssl.SSLError) as error:
                if isinstance(error, socket.timeout) or "timed out" in str(error):
                    raise AssertionError("still connected after %g seconds" % seconds) from None
                return got
            except socket.timeout:
                raise AssertionError("still connected after %g seconds" % seconds) from None
            if not block:
                return got
            got += block

    def reset(self):
        """End the connection as a crash does."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def client_hello():
    """Return the first bytes of a TLS handshake."""
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        trusting.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=NAMES[0]).do_handshake()
    return outgoing.read()


def at_once(functions):
    """Run functions in threads of their own; return their results, or raise the first one's exception."""
    functions = list(functions)
    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(function) for function in functions]]


def plain(text):
    """Return AUTH PLAIN's response in base64; a bar stands for NUL."""
    return base64.b64encode(text.replace("|", "\0").encode())


def name_and_password(name=ANN, password=PASSWORD):
    return plain("|%s|%s" % (name, password))


class Case(unittest.TestCase):

    maxDiff = None

    def enter(self, context):
        """Enter a context manager until the end of the test."""
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        return stack.enter_context(context)

    def deliver(self, node, recipient="bob@a.test", seconds=5.0):
        """Send an ordinary message; it must be answered soon and be there."""
        before, began = set(node.stored(recipient)), time.monotonic()
        with smtplib.SMTP(*node.smtp, "client.example", 150) as client:
            self.assertEqual(client.sendmail("ann@example.org", [recipient], message("ordinary", b"Hello\r\n")), {})
        self.assertLess(time.monotonic() - began, seconds, "an ordinary message waited too long")
        self.assertEqual(len(set(node.stored(recipient)) - before), 1)

    def level(self, node):
        """Return (threads, descriptors, drafts) of a node that has seen some clients."""
        def one():
            with Raw(node.smtp) as client:
                client.ask("NOOP", "QUIT")
        at_once([one] * 8)
        self.deliver(node)
        return lab.until(lambda: self.at_rest(node), 10, "a node at rest")

    def at_rest(self, node):
        with Raw(node.smtp) as client:  # threads that are no longer needed notice so when they have served somebody
            client.ask("QUIT")
            client.rest()
        level = threads(node), descriptors(node), len(drafts(node))
        return level if level == (threads(node), descriptors(node), len(drafts(node))) else None

    def assert_back(self, node, before, seconds=15):
        """A node must come back to where it was before, and serve."""
        now = None

        def is_back():
            nonlocal now
            now = self.at_rest(node) or (1 << 20,) * 3
            return now[0] <= before[0] + IDLE_THREADS and now[1] <= before[1] and now[2] <= before[2]
        try:
            lab.until(is_back, seconds)
        except AssertionError:
            self.fail("(threads, descriptors, drafts) were %s, are %s:\n%s" % (before, now, "\n".join(held(node))))
        self.assertIsNone(node.process.poll())
        self.deliver(node)
        check_log(node)


# Those who may come in

class Accounts(Case):

    def test_changes_reach_a_running_node(self):
        with Node("--domain", "a.test", before=with_accounts(ANN)) as node:
            def may_enter(password, name=ANN):
                with Raw(node.pop3) as client:
                    return client.ask("USER " + name, "PASS " + password).startswith("+OK")
            self.assertTrue(may_enter(PASSWORD))
            node.run("user", "passwd", ANN, "--password-stdin", stdin=b"new one\n")
            lab.until(lambda: may_enter("new one"), 5)
            self.assertFalse(may_enter(PASSWORD), "the old password is known no more, though it was cached")
            node.run("user", "add", BOB, "--password-stdin", stdin=b"third\n")
            lab.until(lambda: may_enter("third", BOB), 5)
            node.run("user", "remove", ANN)
            lab.until(lambda: not may_enter("new one"), 5)


class Programs(Case):
    """Real programs with TLS, on loopback."""

    @classmethod
    def setUpClass(cls):
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        cls.node = stack.enter_context(Node("--domain", "a.test", "--hostname", "mx.a.test", *tls_options,
                                            before=with_accounts(ANN, BOB)))
        cls.place = stack.enter_context(lab.folder())
        cls.environment = lab.clean_environment(cls.place)
        cls.sample = message("over-tls", b"Hello Bob,\r\n.\r\n..\r\nbye\r\n")
        (cls.place / "message").write_bytes(cls.sample)

    def run_client(self, *command, stdin=b"", **more):
        return lab.run(command, stdin, environment=self.environment, cwd=self.place, **more)

    def assert_arrived(self, protocol, act):
        """Do something that must deliver one message to bob, `with` this protocol in Received."""
        before = set(self.node.stored(BOB))
        act()
        (new,) = set(self.node.stored(BOB)) - before
        content = new.read_bytes()
        self.assertRegex(content.partition(b"\r\n\r\n")[0].decode(), r"\r\n\tby mx\.a\.test with %s id " % protocol)
        return content

    def swaks(self, port, *more):
        self.run_client("swaks", "--server", "localhost", "--port", port, "--from", ANN, "--to", BOB, "--helo",
                        "client.example", "--tls-verify", "--tls-ca-path", certificate[0], *more)

    def test_swaks(self):
        self.assert_arrived("ESMTPS", lambda: self.swaks(self.node.smtp[1], "--tls"))
        self.assert_arrived("ESMTPS", lambda: self.swaks(self.node.smtps[1], "--tls-on-connect"))
        for kind in ("PLAIN", "LOGIN"):
            words = ("--auth", kind, "--auth-user", ANN, "--auth-password", PASSWORD)
            self.assert_arrived("ESMTPSA", lambda words=words: self.swaks(self.node.smtp[1], "--tls", *words))
            self.assert_arrived("ESMTPSA", lambda words=words: self.swaks(self.node.smtps[1], "--tls-on-connect", *words))

    def curl(self, scheme, port, path="", *more):
        return self.run_client("curl", "-sS", "--ssl-reqd", "--cacert", certificate[0], "--resolve",
                               "mx.a.test:%d:127.0.0.1" % port, "%s://mx.a.test:%d/%s" % (scheme, port, path), *more)

    def test_curl(self):
        words = ("--mail-from", ANN, "--mail-rcpt", BOB, "--upload-file", "message")
        for scheme, port in (("smtp", self.node.smtp[1]), ("smtps", self.node.smtps[1])):
            got = self.assert_arrived("ESMTPS", lambda scheme=scheme, port=port: self.curl(
                scheme, port, "client.example", *words))
            self.assertTrue(got.endswith(self.sample), got)
            for kind in ("PLAIN", "LOGIN"):
                log_in = ("--user", "%s:%s" % (ANN, PASSWORD), "--login-options", "AUTH=" + kind)
                self.assert_arrived("ESMTPSA", lambda scheme=scheme, port=port, log_in=log_in: self.curl(
                    scheme, port, "client.example", *log_in, *words))
        stored = len(self.node.stored(BOB))
        for scheme, port in (("pop3", self.node.pop3[1]), ("pop3s", self.node.pop3s[1])):
            log_in = ("--user", "%s:%s" % (BOB, PASSWORD))
            self.assertEqual(len(self.curl(scheme, port, "", *log_in).splitlines()), stored)
            self.assertIn(b"Hello Bob,\r\n.\r\n", self.curl(scheme, port, str(stored), *log_in))

    def test_openssl_versions(self):
        """TLS 1.2 and 1.3; what is older is refused, and not only because the client would not."""
        weakest = ("-cipher", "DEFAULT@SECLEVEL=0")
        roads = (("smtps",), ("pop3s",), ("smtp", "-starttls", "smtp"), ("pop3", "-starttls", "pop3"))
        with self.old_server() as port:
            self.assertRegex(self.s_client(port, "-tls1_1", *weakest), r"Protocol *: TLSv1\.1|New, TLSv1")
        for name, *starttls in roads:
            port = getattr(self.node, name)[1]
            with self.subTest(name):
                for version, words in (("TLSv1.2", ("-tls1_2",)), ("TLSv1.3", ("-tls1_3",))):
                    told = self.s_client(port, *words, *starttls)
                    self.assertRegex(told, r"New, %s, Cipher is [A-Z]" % version)
                    self.assertIn("Verify return code: 0 (ok)", told)
                for words in (("-tls1_1",), ("-tls1",)):
                    told = self.s_client(port, *words, *weakest, *starttls, expect=1)
                    self.assertRegex(told, r"alert protocol version|unsupported protocol|no protocols available")

    @contextlib.contextmanager
    def old_server(self):
        """A server that takes TLS 1.1, to see that s_client would."""
        port = lab.free_port()
        process = lab.start(["openssl", "s_server", "-accept", port, "-cert", certificate[0], "-key", certificate[1],
                             "-cipher", "DEFAULT@SECLEVEL=0", "-tls1_1", "-quiet"],
                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            lab.until(lambda: lab.accepts(port), 10, "openssl s_server")
            yield port
        finally:
            lab.end_group(process)

    def s_client(self, port, *words, expect=0):
        """Return what openssl's client says about a connection that ends with its standard input."""
        process = subprocess.run(["openssl", "s_client", "-connect", "127.0.0.1:%d" % port, "-servername", NAMES[0],
                                  "-CAfile", str(certificate[0]), "-verify_return_error", *words],
                                 input=b"", capture_output=True, timeout=30, env=self.environment)
        told = (process.stdout + process.stderr).decode(errors="replace")
        self.assertEqual(process.returncode, expect, told)
        return told

    def test_fetchmail_stls(self):
        before = len(self.node.stored(ANN))
        with smtplib.SMTP(*self.node.smtp) as client:
            client.sendmail(BOB, [ANN], self.sample)
        self.assertEqual(len(self.node.stored(ANN)), before + 1)
        into = self.place / "fetched"
        into.mkdir()
        settings = self.place / ".fetchmailrc"
        settings.write_text("""poll localhost protocol pop3 port %d
            user "%s" password "%s" sslproto "TLS1.2+" sslcertck sslcertfile "%s"
            mda "cat >$(mktemp %s/XXXXXXXX)" fetchall norewrite nokeep
            """ % (self.node.pop3[1], ANN, PASSWORD, certificate[0], into))
        settings.chmod(0o600)
        told = self.run_client("fetchmail", "-v", "-v", "--nosyslog", "--invisible", "--nodetach", "--pidfile",
                               self.place / "fetchmail.pid").decode(errors="replace")
        self.assertRegex(told, r"POP3> STLS")
        self.assertEqual(self.node.stored(ANN), [])
        contents = [path.read_bytes() for path in into.iterdir()]
        self.assertEqual(len(contents), before + 1)
        self.assertTrue(any(c.endswith(self.sample.replace(b"\r\n", b"\n")) for c in contents), contents)

    def test_msmtp(self):
        for kind in ("plain", "login"):
            for port, starttls in ((self.node.smtp[1], "on"), (self.node.smtps[1], "off")):
                words = ("msmtp", "--host=localhost", "--port=%d" % port, "--from=" + ANN, "--tls=on",
                         "--tls-starttls=" + starttls, "--tls-trust-file=%s" % certificate[0], "--auth=" + kind,
                         "--user=" + ANN, "--passwordeval=echo '%s'" % PASSWORD, "--domain=client.example", "--", BOB)
                self.assert_arrived("ESMTPSA", lambda words=words: self.run_client(
                    *words, stdin=self.sample.replace(b"\r\n", b"\n")))

    def test_s_nail(self):
        for kind in ("plain", "login"):
            url = "smtp://%s:%s@localhost:%d" % (ANN.replace("@", "%40"), PASSWORD.replace(" ", "%20"), self.node.smtp[1])
            words = ["v15-compat=yes", "mta=" + url, "smtp-auth=" + kind, "smtp-use-starttls", "tls-verify=strict",
                     "tls-ca-file=%s" % certificate[0], "hostname=client.example", "sendwait", "DEAD=/dev/null"]
            options = [part for word in words for part in ("-S", word)]
            self.assert_arrived("ESMTPSA", lambda options=options: self.run_client(
                "s-nail", "-n", *options, "-r", ANN, "-s", "From s-nail", BOB, stdin=b"Hello\n"))


class Elsewhere(Case):
    """Clients that come over a network: nothing of loopback's privileges holds for them."""

    @classmethod
    def setUpClass(cls):
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        cls.network = stack.enter_context(netlab.Network())
        cls.peer = stack.enter_context(netlab.Peer(cls.network, "192.0.2.46"))
        words = ("--domain", "a.test", "--hostname", "mx.a.test", "--route", "far.test=smtp://192.0.2.46:25")
        cls.node = stack.enter_context(netlab.Node(
            cls.network, "a", *words, "--tls-cert", certificate[0], "--tls-key", certificate[1], "--smtps", "0.0.0.0:465",
            "--pop3s", "0.0.0.0:995", before=accounts(ANN, BOB, aliases=[TEAM + ": " + ANN])))
        cls.bare = stack.enter_context(netlab.Node(cls.network, "b", *words, before=accounts(ANN)))
        cls.addClassCleanup(lambda: check_log(cls.node))

    def client(self, port=25, host="sender", address=SERVER, **more):
        with self.network.inside(host):
            return self.enter(Raw((address, port), **more))

    def encrypted(self, host="sender"):
        client = self.client(host=host)
        client.ask("EHLO client.example", "STARTTLS")
        client.start_tls()
        return client

    def test_no_log_in_without_tls(self):
        for address in (SERVER, netlab.HOSTS["b"][0]):
            client = self.client(address=address)
            answer = client.ask("EHLO client.example")
            self.assertNotIn("AUTH", answer)
            self.assertEqual("STARTTLS" in answer, address == SERVER)
            self.assertRegex(client.ask(b"AUTH PLAIN " + name_and_password()), "^538 5.7.11 ")
            self.assertRegex(client.ask("AUTH LOGIN"), "^538 ")
            client = self.client(110, address=address)
            client.ask("CAPA")
            words = [line.split()[0] for line in client.listing()]
            self.assertNotIn(b"USER", words)
            self.assertNotIn(b"SASL", words)
            self.assertEqual(b"STLS" in words, address == SERVER)
            self.assertRegex(client.ask("USER " + ANN), r"^-ERR \[AUTH\]")
            self.assertRegex(client.ask("PASS " + PASSWORD), r"^-ERR ")
            self.assertRegex(client.ask(b"AUTH PLAIN " + name_and_password()), r"^-ERR \[AUTH\]")
            self.assertRegex(client.ask("STAT"), r"^-ERR ")

    def test_log_in_with_tls(self):
        client = self.encrypted()
        answer = client.ask("EHLO client.example")
        self.assertRegex(answer, r"(?m)^250.AUTH PLAIN LOGIN$")
        self.assertNotIn("STARTTLS", answer)
        self.assertRegex(client.ask(b"AUTH PLAIN " + name_and_password()), "^235 ")
        client = self.client(995, tls=True)
        self.assertRegex(client.ask(b"AUTH PLAIN " + name_and_password(BOB)), r"^\+OK")

    def test_real_programs(self):
        """swaks over STARTTLS sends to elsewhere once it has logged in; curl fetches by POP3 with TLS."""
        swaks = self.network.command("sender", "swaks", "--server", SERVER, "--from", ANN, "--helo", "client.example",
                                     "--to", "swaks@far.test", "--header", "Message-ID: <swaks@a.test>")
        lab.run([*swaks, "--tls"], expect=24)       # no recipient accepted
        lab.run([*swaks, "--auth", "PLAIN", "--auth-user", ANN, "--auth-password", PASSWORD], expect=28)
        lab.run([*swaks, "--tls", "--auth", "LOGIN", "--auth-user", ANN, "--auth-password", PASSWORD])
        lab.until(lambda: [m for m in self.peer.messages if m[1] == ["swaks@far.test"]], 20, "the message at its destination")
        (sent,) = [m for m in self.peer.messages if m[1] == ["swaks@far.test"]]
        self.assertEqual(sent[0], ANN)
        self.assertRegex(sent[2].decode(), r"with ESMTPSA id ")
        with smtplib_on(self.network, "sender") as client:
            client.sendmail("x@y.test", [BOB], message("by-curl", b"Hello\r\n"))
        number = 1 + [b"Subject: by-curl" in path.read_bytes() for path in self.node.stored(BOB)].index(True)
        curl = self.network.command("sender", "curl", "-sS", "--cacert", certificate[0], "--resolve",
                                    "mx.a.test:995:" + SERVER, "--resolve", "mx.a.test:110:" + SERVER,
                                    "--user", "%s:%s" % (BOB, PASSWORD))
        self.assertIn(b"Subject: by-curl", lab.run([*curl, "pop3s://mx.a.test/%d" % number]))
        self.assertIn(b"Subject: by-curl", lab.run([*curl, "--ssl-reqd", "pop3://mx.a.test/%d" % number]))
        lab.run([*curl, "pop3://mx.a.test/%d" % number], expect=67)   # refused to log in

    def test_relay(self):
        """Nobody sends to elsewhere but who logged in, and that under their own name only."""
        client = self.encrypted()
        client.ask("EHLO client.example", "MAIL FROM:<%s>" % ANN)
        self.assertRegex(client.ask("RCPT TO:<x@far.test>"), "^550 5.7.1 ")
        for trick in ("x%far.test@a.test", '"x@far.test"@a.test', "x%far.test", "@a.test:x@far.test",
                      "far.test!x@a.test", "x@far.test@a.test", "x@[192.0.2.46]"):
            self.assertRegex(client.ask("RCPT TO:<%s>" % trick), "^5", trick)
        self.assertRegex(client.ask("RCPT TO:<%s>" % BOB), "^250 ")
        self.assertRegex(client.ask("RSET", b"AUTH PLAIN " + name_and_password()), "^235 ")
        for sender in (ANN, "Ann@A.TEST", "ann+list@a.test", TEAM, ""):
            self.assertRegex(client.ask("MAIL FROM:<%s>" % sender), "^250 ", sender)
            self.assertRegex(client.ask("RCPT TO:<x@far.test>"), "^250 ")
            client.ask("RSET")
        for sender in (BOB, "ann@far.test", "nobody@a.test", "postmaster@a.test", "ann@b.test"):
            self.assertRegex(client.ask("MAIL FROM:<%s>" % sender), "^553 5.7.1 ", sender)

    def test_postfix_relays_in(self):
        """A real Postfix that insists on TLS and verifies the certificate hands mail over."""
        postfix = Postfix(self.network, ["other.test"], [], certificate)
        with self.network.inside("mx"), smtplib.SMTP("127.0.0.1", 25, "mx.test", 150) as client:
            client.sendmail("carol@other.test", [ANN, BOB], message("postfix", b"Hello\r\n.\r\n"))
        for address in (ANN, BOB):
            stored = lab.until(lambda address=address: [
                p for p in self.node.stored(address) if b"Subject: postfix" in p.read_bytes()], 30, "mail from Postfix")
            head = stored[0].read_bytes().partition(b"\r\n\r\n")[0].decode()
            self.assertRegex(head, r"Received: from mx\.postfix\.test \(\[192\.0\.2\.30\]\)\r\n\tby mx\.a\.test with ESMTPS ")
        lab.until(lambda: postfix.log().count("status=sent (250 2.0.0") == 2, 10, "Postfix's word that it was taken")
        self.assertRegex(postfix.log(), r"(?i)verified TLS connection established to 192\.0\.2\.11")

    def test_guessing_is_slow_and_ends(self):
        """Wrong passwords: each answer slower, the address cut off after ten; others are served meanwhile."""
        def guess(port, tls=True):
            with self.network.inside("stranger"):
                client = Raw((SERVER, port), tls=tls)
            with client:
                began = time.monotonic()
                if port == 465:
                    answer = client.ask("EHLO x", b"AUTH PLAIN " + name_and_password(password="wrong"))
                else:
                    answer = client.ask("USER " + ANN, "PASS wrong")
                return answer, time.monotonic() - began
        answer, took = guess(465)
        self.assertRegex(answer, "^535 5.7.8 ")
        self.assertGreater(took, 0.2)
        answer, took = guess(995)
        self.assertRegex(answer, r"^-ERR \[AUTH\]")
        self.assertGreater(took, 0.45)              # 0.25 s more than at first, whatever the machine added then
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(guess, port) for port in (465, 995) * 4]
            with self.network.inside("sender"):
                began = time.monotonic()
                with Raw((SERVER, 465), tls=True) as good:
                    self.assertRegex(good.ask("EHLO x", b"AUTH PLAIN " + name_and_password()), "^235 ")
                self.assertLess(time.monotonic() - began, 5, "the good one waits for the bad ones")
            answers = [future.result()[0] for future in futures]
        for answer in answers:
            self.assertRegex(answer, r"^(535 |-ERR \[AUTH\]|421 )")
        with self.network.inside("stranger"):
            with Raw((SERVER, 465), tls=True) as client:
                answer = client.ask("EHLO x", b"AUTH PLAIN " + name_and_password())
                self.assertRegex(answer, "^421 4.7.0 ", "the right password helps no more")
                self.assertEqual(client.rest(), b"")
            with Raw((SERVER, 995), tls=True) as client:
                self.assertRegex(client.ask("USER " + ANN), r"^-ERR \[AUTH\]")
                self.assertEqual(client.rest(), b"")
            with Raw((SERVER, 25)) as client:       # but it may still bring mail
                self.assertRegex(client.ask("EHLO x", "MAIL FROM:<x@y.test>", "RCPT TO:<%s>" % BOB), "^250 ")
        self.assertRegex(self.client(995, tls=True).ask(b"AUTH PLAIN " + name_and_password(BOB)), r"^\+OK")

    def test_connections_per_client(self):
        """One address gets 50 connections; another one, and loopback, are not concerned."""
        with self.network.inside("stranger"):
            clients = [self.enter(Raw((SERVER, port))) for port in (25, 110) * 30]
        refused = [client for client in clients if client.greeting[:3] not in ("220", "+OK")]
        self.assertEqual(len(clients) - len(refused), 50)
        for client in refused:
            self.assertRegex(client.greeting, r"^(421 4\.3\.2|-ERR \[SYS/TEMP\]) ")
        self.assertRegex(self.client().greeting, "^220 ")
        for client in clients:
            client.sock.close()

        def is_served():
            with self.network.inside("stranger"), Raw((SERVER, 25)) as client:
                return client.greeting.startswith("220")
        lab.until(is_served, 10, "an address that is served again")

    def test_smuggling_out(self):
        """What a lenient server further on might take for the end of a message does not leave this node."""
        client = self.encrypted()
        client.ask("EHLO client.example", b"AUTH PLAIN " + name_and_password())
        for number, ending in enumerate(SMUGGLED_ENDS):
            address = "smuggled%d@far.test" % number
            client.ask("MAIL FROM:<%s>" % ANN, "RCPT TO:<%s>" % address, "DATA")
            client.send(b"Subject: outer\r\n\r\nbody", ending, SMUGGLED, b"\r\n.\r\n")
            self.assertRegex(client.reply(), "^250 ")

            def sent(address=address):
                return [m for m in self.peer.messages if address in m[1]]
            (found,) = lab.until(sent, 20, "the message for " + address)
            self.assertNotRegex(found[2].replace(b"\r\n", b""), rb"[\r\n]", "no bare CR or LF leaves")
            self.assertIn(b"smuggled", found[2])
        self.assertEqual([m for m in self.peer.messages if "victim@far.test" in m[1]], [])


class Postfix(netlab.Postfix):
    """A Postfix that hands all mail to the node, and only over TLS with the certificate that it knows."""

    def settings(self, certificate, key):
        return super().settings(certificate, key) + """
relayhost = [%s]
smtp_tls_security_level = secure
smtp_tls_secure_cert_match = mx.a.test
smtp_tls_CAfile = %s
smtp_tls_loglevel = 1
""" % (SERVER, certificate)


@contextlib.contextmanager
def smtplib_on(network, host):
    with network.inside(host), smtplib.SMTP(SERVER, 25, "client.example", 150) as client:
        yield client


# What the command line promises

class Exposure(Case):
    """Privileges, files, warnings, certificates."""

    def refused(self, *options, expect=1, environment=None, wrapper=(), python=sys.executable):
        """Return the one line with which minimail refuses to start."""
        with lab.folder() as place:
            shutil.copy(lab.MINIMAIL, place)
            place.chmod(0o755)
            process = subprocess.run([*wrapper, python, str(place / "minimail.py"), "--data", str(place / "data"),
                                      "--smtp", "127.0.0.1:0", "--pop3", "off", "--web", "off", *map(str, options)],
                                     stdin=subprocess.DEVNULL, capture_output=True, timeout=30, env=environment,
                                     cwd=str(place))
        told = process.stderr.decode()
        self.assertEqual((process.returncode, process.stdout), (expect, b""), told)
        self.assertEqual(len(told.splitlines()), 1, told)
        self.assertNotIn("Traceback", told)
        return told

    def test_run_as(self):
        user = pwd.getpwnam(ORDINARY_USER)
        with socket.socket() as probe:
            for port in range(700, 1000):
                with contextlib.suppress(OSError):
                    probe.bind(("127.0.0.1", port))
                    break
        for more in ((), ("--workers", "2")):
            with self.subTest(more), Node("--smtp", "127.0.0.1:%d" % port, "--run-as", ORDINARY_USER, *more,
                                          *tls_options, owner=ORDINARY_USER, python="/usr/bin/python3") as node:
                self.deliver(node)
                self.assertIn("root", pwd.getpwuid(os.getuid()).pw_name)
                children = Path("/proc/%d/task/%d/children" % ((node.process.pid,) * 2)).read_text().split()
                self.assertEqual(len(children), 2 if more else 0)
                for pid in [str(node.process.pid), *children]:
                    for task in Path("/proc", pid, "task").iterdir():
                        try:
                            fields = status("%s/task/%s" % (pid, task.name))
                        except OSError:             # one that has ended, which the process itself has not
                            self.assertNotEqual(task.name, pid)
                            continue
                        self.assertEqual(fields["Uid"].split(), [str(user.pw_uid)] * 4)
                        self.assertEqual(fields["Gid"].split(), [str(user.pw_gid)] * 4)
                        self.assertEqual(fields["Groups"].split(), [str(user.pw_gid)])
                        self.assertEqual(int(fields["CapEff"], 16), 0)
                        self.assertEqual(int(fields["CapPrm"], 16), 0)
                for path in lab.files(node.data, folders=True):
                    with contextlib.suppress(FileNotFoundError):    # the end of the session is noted meanwhile
                        self.assertEqual(path.stat().st_uid, user.pw_uid, path)
                with Raw(node.smtps, tls=True) as client:
                    self.assertRegex(client.ask("EHLO x"), "^250")

    def test_run_as_refused(self):
        self.assertIn("no-such-user", self.refused("--run-as", "no-such-user"))
        group = lab.primary_group(ORDINARY_USER)
        told = self.refused("--run-as", "daemon", python="/usr/bin/python3",
                            wrapper=("setpriv", "--reuid", ORDINARY_USER, "--regid", group, "--clear-groups"))
        self.assertIn("--run-as daemon", told)
        with lab.folder() as place:                 # a folder of root's own, which the user may not write
            told = self.refused("--run-as", ORDINARY_USER, "--data", place / "data", python="/usr/bin/python3")
            self.assertIn(str(place), told)

    def test_modes(self):
        """Nobody else on the machine reads the mail, whatever the umask."""
        for umask in ("000", "022", "777"):
            wrapper = ("sh", "-c", 'umask %s && exec "$@"' % umask, "sh")
            with self.subTest(umask), Node(
                    "--domain", "a.test", "--transcripts", "on", "--route", "far.test=smtp://127.0.0.1:1", wrapper=wrapper,
                    before=with_accounts(BOB)) as node:
                lab.run([*wrapper, *lab.Node.command(node, "user", "add", ANN, "--password-stdin")], b"secret\n")
                self.deliver(node)
                with Raw(node.pop3) as client:
                    self.assertRegex(client.ask("USER " + BOB, "PASS " + PASSWORD), r"^\+OK")
                    with smtplib.SMTP(*node.smtp) as sender:
                        sender.sendmail(ANN, [BOB, "x@far.test"], message("both", b"Hello\r\n"))
                        found = [node.data, *(path for path in lab.files(node.data, folders=True) if path.name != "aliases")]
                    for path in found:
                        with contextlib.suppress(FileNotFoundError):    # the relay is at work meanwhile
                            mode = path.lstat().st_mode
                        if stat.S_ISDIR(mode):
                            self.assertEqual(oct(stat.S_IMODE(mode)), "0o700", path)
                        elif stat.S_ISREG(mode):
                            self.assertEqual(oct(stat.S_IMODE(mode)), "0o600", path)
                        else:
                            self.assertEqual(stat.S_IMODE(mode) & 0o077, 0, path)
                self.assertIn("x@far.test", node.run("queue").decode())

    def test_warning(self):
        """Capture mode within everybody's reach: one clear warning, and none where there is no reason."""
        for options, wanted in ((("--smtp", "0.0.0.0:0", "--pop3", "0.0.0.0:0"), 1), (("--smtp", "[::]:0"), 1), ((), 0),
                                (("--smtp", "0.0.0.0:0", "--domain", "a.test"), 0)):
            if "[::]:0" in options and not netlab.IPV6:
                continue
            with self.subTest(options), Node(*options, before=with_accounts(BOB)) as node:
                port = node.smtp[1]
                node.smtp = ("127.0.0.1" if "[::]:0" not in options else "::1", port)
                self.deliver(node)
                warnings = [line for line in node.log().splitlines() if "warning" in line.lower()]
                self.assertEqual(len(warnings), wanted, warnings)

# Hostile clients

SMUGGLED_ENDS = (b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r\n.\r", b"\r.\r\n", b"\r\n.\r\r\n", b"\r\n\0.\r\n",
                 b"\r\n.\0\r\n", b"\r\n..\r\n", b"\r\n. \r\n", b"\r\r.\r\r", b"\n\n.\n\n", b"\r\n.\r.\r\n", b"\n.\r")
SMUGGLED = b"MAIL FROM:<evil@far.test>\r\nRCPT TO:<victim@far.test>\r\nDATA\r\nSubject: smuggled\r\n\r\nsmuggled"


class Hostile(Case):
    """Attacks on one node in capture mode, where everybody gets far: any recipient, any password."""

    @classmethod
    def setUpClass(cls):
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        cls.node = stack.enter_context(Node(*tls_options, "--timeout", "2", "--max-size", "100K"))
        with smtplib.SMTP(*cls.node.smtp) as client:
            for number in range(5):
                client.sendmail("ann@example.org", ["big@a.test"], message("big%d" % number, (b"x" * 70 + b"\r\n") * 1200))

    def setUp(self):
        self.before = self.level(self.node)
        self.addCleanup(self.check_afterwards)

    def check_afterwards(self):
        self.assert_back(self.node, self.before)

    def flood(self, address, beginning, block, tls=False, seconds=12, most=1 << 40):
        """Send `block` again and again until the node hangs up; return the seconds, the bytes and what it said.

        What it says is not read before the end, as it would not be by one who only wants to do harm.
        """
        with Raw(address, tls=tls) as client:
            for command in beginning:
                client.ask(command)
            began, count = time.monotonic(), 0
            client.sock.settimeout(seconds)
            try:
                while time.monotonic() - began < seconds and count < most:
                    client.send(block)
                    count += len(block)
            except (OSError, ssl.SSLError) as error:
                self.assertNotIn("timed out", str(error), "neither read nor hung up")
            else:
                self.fail("%s, after %s: %d bytes of %r in %g seconds, and still connected" % (
                    address, beginning, count, block[:20], seconds))
            took = time.monotonic() - began
            client.buffer = b""
            return took, count, client.rest(3)

    def test_endless_lines(self):
        """A line without an end is no way around the deadline, however fast it comes; others are served meanwhile."""
        node, block = self.node, b"x" * 65536
        attacks = [(node.smtp, (), block), (node.smtp, ("EHLO x", "AUTH LOGIN"), block), (node.pop3, (), block),
                   (node.pop3, ("AUTH PLAIN",), block), (node.smtps, (), block), (node.pop3s, ("USER big@a.test",), block)]
        used = memory(node)
        with concurrent.futures.ThreadPoolExecutor(len(attacks)) as pool:
            running = [pool.submit(self.flood, address, beginning, block, tls=address in (node.smtps, node.pop3s))
                       for address, beginning, block in attacks]
            lab.until(lambda: all(future.running() or future.done() for future in running), 5)
            for _ in range(5):
                self.deliver(node)
            for future in running:
                future.result()
        self.assertLess(memory(node) - used, 30 << 20, "memory grew")

    def test_endless_content(self):
        """Content beyond --max-size is read past for a while, so that the sender hears 552, but not for ever."""
        node = self.node
        envelope = ("EHLO x", "MAIL FROM:<a@b.test>", "RCPT TO:<bob@a.test>")
        lines = (b"x" * 70 + b"\r\n") * 900
        used = memory(node)
        chunk = b"BDAT 500000000000\r\n" + lines
        attacks = [((*envelope, "DATA"), lines), (envelope, chunk), (("EHLO x",), chunk)]
        results = at_once([lambda words=words, block=block: self.flood(node.smtp, words, block, seconds=60, most=200 << 20)
                           for words, block in attacks] + [lambda: self.deliver(node)])
        for took, count, _ in results[:-1]:
            self.assertGreater(count, 32 << 20, "hung up before there was any need: %g s" % took)
        self.assertLess(memory(node) - used, 30 << 20, "memory grew")
        with Raw(node.smtp) as client:              # a little too large: told so, and life goes on
            client.ask("EHLO x")
            self.assertRegex(client.ask("MAIL FROM:<a@b.test> SIZE=102401"), "^552 5.3.4 ")
            for content in (b"DATA\r\n" + lines * 3 + b".\r\n", b"BDAT 200000\r\n" + b"x" * 200000):
                self.assertRegex(client.ask(*envelope[1:]), "^250 ")
                client.send(content)
                self.assertRegex(client.reply() if content.startswith(b"B") else client.reply() and client.reply(),
                                 "^552 5.3.4 ")
            self.assertRegex(client.ask("NOOP"), "^250 ")

    def test_resets(self):
        """Connections that break at every stage."""
        node, hello = self.node, client_hello()
        envelope = ("EHLO x", "MAIL FROM:<a@b.test>", "RCPT TO:<reset@a.test>")
        log_in = ("USER big@a.test", "PASS x")
        smtp = [[], ["EHLO x"], ["EHLO x", b"MAIL FR"], envelope[:2], envelope, (*envelope, "DATA"),
                (*envelope, "DATA", b"Subject: x\r\n\r\nhalf"), (*envelope, "DATA", b"x" * 90000),
                (*envelope, "DATA", b"x\r\n.\r\n"), (*envelope, "DATA", b"x\r\n.\r\nQUIT\r\n"),
                (*envelope, b"BDAT 4\r\nhalf"), (*envelope, b"BDAT 1000\r\nhalf"), (*envelope, b"BDAT 4 LAST\r\nhalf"),
                ["EHLO x", "AUTH LOGIN"], ["EHLO x", "AUTH PLAIN"], ["EHLO x", b"AUTH PLAIN " + name_and_password()],
                ["EHLO x", b"STARTTLS\r\n"], ["EHLO x", "STARTTLS"], ["EHLO x", "STARTTLS", hello[:50]],
                ["EHLO x", "STARTTLS", hello], [b"QUIT\r\n"], [b"EHLO x\r\n" * 500]]
        pop3 = [[], [b"USE"], log_in[:1], log_in, (*log_in, b"RETR 1\r\n"), (*log_in, b"RETR 1\r\nRETR 2\r\nRETR 3\r\n"),
                (*log_in, "DELE 1"), (*log_in, "DELE 1", "DELE 2", b"QU"), (*log_in, b"TOP 1 99999\r\n"),
                (*log_in, b"UIDL\r\n"),
                ["AUTH PLAIN"], [b"STLS\r\n"], ["STLS", hello[:50]], ["STLS", hello], [b"QUIT\r\n"]]

        def attack(address, steps, tls=False):
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                with Raw(address, tls=tls) as client:
                    for step in steps:
                        if isinstance(step, bytes):
                            client.send(step)
                        else:
                            lab.until(lambda step=step: not client.ask(step).startswith("-ERR [IN-USE]"), 10)
                    client.reset()
        for _ in range(4):
            at_once([lambda steps=steps: attack(node.smtp, steps) for steps in smtp])
            at_once([lambda steps=steps: attack(node.smtps, steps, True) for steps in smtp if "STARTTLS" not in steps])
            for steps in pop3:                      # one session per mailbox
                attack(node.pop3, steps)
            for steps in pop3:
                if "STLS" not in steps:
                    attack(node.pop3s, steps, True)
            at_once([lambda part=part, address=address: raw_reset(address, part) for address in (node.smtps, node.pop3s)
                     for part in (b"", hello[:1], hello[:50], hello, b"EHLO x\r\n", b"\0" * 100)])

        def untouched():
            with Raw(node.pop3) as client:
                return client.ask(*log_in).startswith("+OK 5 ")
        lab.until(untouched, 10, "a mailbox with all its messages")

    def test_starttls_injection(self):
        """What was said before the handshake counts for nothing after it (CVE-2011-0411)."""
        node = self.enter(Node("--domain", "a.test", "--trust", "off", *tls_options,
                               before=with_accounts(ANN, BOB, "injected@a.test")))
        evil = b"EHLO evil\r\nMAIL FROM:<evil@x.test>\r\nRCPT TO:<injected@a.test>\r\nDATA\r\nevil\r\n.\r\n"
        for injected in (evil, b"NOOP", b"RSET\r\n", b"x" * 8000, b"AUTH LOGIN\r\n"):
            with Raw(node.smtp) as client:
                client.ask("EHLO x", "MAIL FROM:<before@x.test>")
                client.send(b"STARTTLS\r\n", injected)
                self.assertRegex(client.reply(), "^220 ")
                client.start_tls()
                self.assertRegex(client.ask("RCPT TO:<%s>" % BOB), "^503 ", "all is forgotten")
                self.assertRegex(client.ask("MAIL FROM:<after@x.test>"), "^503 ", "EHLO, too")
                self.assertRegex(client.ask("EHLO x"), "^250")
                self.assertRegex(client.ask("RCPT TO:<%s>" % BOB), "^503 ")
                self.assertRegex(client.ask("MAIL FROM:<after@x.test>"), "^250 ")
        for injected in (b"NOOP\r\n", b"USER ann@a.test\r\nPASS %s\r\n" % PASSWORD.encode(), b"US"):
            with Raw(node.pop3) as client:
                client.ask("USER " + ANN)
                client.send(b"STLS\r\n", injected)
                self.assertRegex(client.reply(), r"^\+OK")
                client.start_tls()
                self.assertRegex(client.ask("PASS " + PASSWORD), "^-ERR", "the name is forgotten")
                self.assertRegex(client.ask("USER " + ANN, "PASS " + PASSWORD), r"^\+OK 0 ")
                client.ask("QUIT")
        self.assertEqual(node.stored("injected@a.test"), [])
        for address, command in ((node.smtp, b"EHLO x\r\nSTARTTLS\r\n"), (node.pop3, b"STLS\r\n")):
            with Raw(address) as client:            # plain text where the handshake should be
                client.send(command)
                while not re.match(r"220 |\+OK", client.reply()):
                    pass
                client.send(evil)
                self.assertNotRegex(client.rest(), rb"(?m)^(250|\+OK)")

    def test_header_injection(self):
        """No client writes lines into our headers, replies or log."""
        node = self.enter(Node("--verbose", "--domain", "a.test", "--catch-all", "headers@a.test", "--trust", "off",
                               before=with_accounts("headers@a.test")))
        ugly = [b"\r", b"\0", b"\r\r", b"\x1b[31m", b"\x7f", b"\t", b"\v", b"\f", b"\xc2\x85", b"\xe2\x80\xa8", b"\xff",
                b"\xe2\x80\xae", b"\xed\xa0\x80", b"\r\0"]
        for text in ugly:
            for utf8 in (b"", b" SMTPUTF8"):
                with Raw(node.smtp) as client:
                    answers = [client.ask(b"EHLO x%sX-Injected: yes" % text)]
                    client.ask("EHLO client.example")
                    answers += [client.ask(b"MAIL FROM:<a%sX-Injected@b.test>%s" % (text, utf8)),
                                client.ask(b"RSET %sx" % text)]
                    client.ask("RSET")
                    client.ask(b"MAIL FROM:<a@b.test>" + utf8)
                    answers += [client.ask(b"RCPT TO:<headers%sX-Injected@a.test>" % text),
                                client.ask(b'RCPT TO:<"headers%sX-Injected"@a.test>' % text),
                                client.ask(b'RCPT TO:<"headers\\%sX-Injected"@a.test>' % text),
                                client.ask(b"RCPT TO:<headers@a%sX-Injected.test>" % text)]
                    answers.append(client.ask(b"%sX" % text))
                    accepted = any(answer.startswith("250") for answer in answers[3:7])
                    for number, answer in enumerate(answers):
                        self.assertNotRegex(answer.replace("\n", ""), "[\0-\x1f\x7f-\x9f\u2028\u2029\u202e]")
                        if b"\r" in text or b"\0" in text or text[0] in b"\x1b\x7f\xff" or not utf8:
                            self.assertRegex(answer, "^5", (text, number))
                    client.ask("RCPT TO:<headers@a.test>", "DATA")
                    self.assertRegex(client.ask(b"Subject: x\r\n\r\nx\r\n."), "^250 ")
                newest = node.stored("headers@a.test")[-1].read_bytes()
                head = newest.partition(b"\r\nSubject: x\r\n")[0]
                self.assertNotRegex(head, rb"(?im)^[ \t]*X-Injected")
                self.assertEqual(re.findall(rb"(?m)^[^\s:]+(?=:)", head)[:1] if accepted else
                                 re.findall(rb"(?m)^[^\s:]+(?=:)", head),
                                 [b"Return-Path"] if accepted else [b"Return-Path", b"Delivered-To", b"Received"])
                self.assertNotRegex(head.replace(b"\r\n", b""), rb"[\r\n\0]")
        for line in (b"MAIL FROM:<a@b.test>\nX-Injected: yes", b"NOOP \n\rX-Injected: yes"):     # a line end is a line end
            with Raw(node.smtp) as client:
                client.ask("EHLO x")
                client.ask(line)
                self.assertRegex(client.reply(), "^500 ")
        for text in ugly:
            with Raw(self.node.pop3) as client:    # where any password is right
                for line in (b"USER a%sb@a.test" % text, b"PASS x%sy" % text, b"%sSTAT" % text, b"RETR %s1" % text):
                    answer = client.ask(line)
                    self.assertNotRegex(answer, "[\0-\x1f\x7f-\x9f\u2028\u2029\u202e]", line)

def raw_reset(address, data):
    with contextlib.suppress(ConnectionError):
        with Raw(address, greeted=False) as client:
            client.send(data)
            client.reset()


class Guessing(Case):
    """Log-in, in node mode."""

    def test_garbage(self):
        """AUTH with rubbish: nothing of it logs in, all of it is answered."""
        good = name_and_password()
        rubbish = [b"", b"=", b"====", b"!!!!", b"A", b"AA", b"AAA=", b"AAAA", good[:-1], good + b"A", b"  " + good,
                   good + b" x", b"\xff\xfe", b"\0", b"AAAA\0", plain("||"), plain("|||"), plain("ann|bob|" + PASSWORD),
                   plain("%s|%s|%s" % (BOB, ANN, PASSWORD)), plain("|%s|" % ANN), plain("||%s" % PASSWORD), plain(ANN),
                   base64.b64encode(b"\0\xff\xfe\0\xfd"), b"A" * 3000, base64.b64encode(b"\0" * 900), b"*"]
        known = "$scrypt$16384,8,1$c2FsdA==$"
        with Node("--domain", "a.test", *tls_options, before=with_accounts(ANN, BOB, "good@a.test")) as node:
            before = self.level(node)
            with open(node.data / "users", "a") as users:      # records that nobody's password fits
                users.write("c@a.test:%sAAAA\nd@a.test:$pbkdf2$1$AA==$AA==\n" % known)
            at_once([lambda number=number, text=text: self.attack(node, text, "127.1.%d." % number)
                     for number, text in enumerate(rubbish)])
            with Raw(node.smtp) as client:
                self.assertRegex(client.ask("EHLO x", b"AUTH PLAIN " + name_and_password("good@a.test")), "^235 ")
            self.assert_back(node, before)

    def attack(self, node, text, network):
        """Try one response in all places where one may stand, each from another address: wrong passwords are counted."""
        smtp = (b"AUTH PLAIN " + text, b"AUTH PLAIN\r\n" + text, b"AUTH LOGIN " + text + b"\r\n" + text,
                b"AUTH LOGIN\r\n" + text + b"\r\n" + text, b"AUTH " + text, b"AUTH PLAIN" + text)
        pop3 = (b"AUTH PLAIN " + text, b"AUTH PLAIN\r\n" + text, b"USER " + text + b"\r\nPASS " + text,
                b"USER ann@a.test\r\nPASS " + text)
        for number, command in enumerate(smtp):
            with Raw(node.smtp, source="%s%d" % (network, 1 + number)) as client:
                client.send(b"EHLO x\r\n", command, b"\r\n*\r\nQUIT\r\n")
                said = client.rest()
                self.assertNotRegex(said, rb"(?m)^(235|451|[^2345])", command[:60])
                self.assertRegex(said, rb"(?m)^221 ", command[:60])
        for number, command in enumerate(pop3):
            with Raw(node.pop3, source="%s%d" % (network, 101 + number)) as client:
                client.send(command, b"\r\nSTAT\r\nQUIT\r\n")
                self.assertNotRegex(client.rest(), rb"(?m)^(\+OK \d|-ERR \[SYS)", command[:60])


class Exhaustion(Case):
    """Connections, descriptors, disk: what can be answered is answered, and all is well once the cause is gone."""

    def test_idle_connections(self):
        """600 connections: 500 are served, 100 are told; when some leave, others come in. They cost no threads."""
        with Node(*tls_options) as node:
            before = self.level(node)
            clients = [self.enter(Raw(address)) for address in (node.smtp, node.pop3) * 300]
            refused = [client for client in clients if client.greeting[:3] not in ("220", "+OK")]
            self.assertEqual(len(refused), 100)
            for client in refused:
                self.assertRegex(client.greeting, r"^(421 4\.3\.2|-ERR \[SYS/TEMP\]) ")
                self.assertEqual(client.rest(), b"")
            self.assertLess(threads(node), 20)
            with self.assertRaises((OSError, ssl.SSLError)):
                Raw(node.smtps, tls=True)
            for client in clients[:2]:
                self.assertRegex(client.ask("NOOP"), r"^(250|\+OK)", "those who are in are served")
            for client in clients[:20]:
                client.sock.close()

            def is_served():
                with Raw(node.smtp) as client:
                    return client.greeting.startswith("220")
            lab.until(is_served, 10, "a connection that is served")
            self.deliver(node)
            for client in clients:
                client.sock.close()
            self.assert_back(node, before)

    def test_descriptors(self):
        """The system's limit instead of ours: those who are in get 4xx at worst, those who wait are taken when it is over."""
        with Node("--max-connections", "2000", *tls_options, wrapper=("sh", "-c", 'ulimit -n 64 && exec "$@"', "sh")) as node:
            before = self.level(node)
            first = self.enter(Raw(node.smtp))
            reader = self.enter(Raw(node.pop3))
            second = self.enter(Raw(node.smtp))
            clients = [self.enter(Raw(address, greeted=False)) for address in (node.smtp, node.pop3, node.smtps) * 40]
            lab.until(lambda: descriptors(node) >= 63, 10, "a node without descriptors")
            for recipient in ("bob@a.test", "never.seen@new.test"):
                answer = first.ask("EHLO x", "MAIL FROM:<a@b.test>", "RCPT TO:<%s>" % recipient, "DATA")
                if answer.startswith("354"):
                    answer = first.ask(b"Subject: x\r\n\r\nx\r\n.")
                self.assertRegex(answer, "^(250|4[0-9][0-9]) ")
            answer = reader.ask("USER bob@a.test", "PASS x")
            self.assertRegex(answer, r"^(\+OK|-ERR \[SYS/TEMP\])")
            if answer.startswith("+OK"):
                self.assertRegex(reader.ask("RETR 1"), r"^(\+OK|-ERR \[SYS/TEMP\])")
            second.ask("EHLO x", "STARTTLS")
            second.start_tls()
            self.assertRegex(second.ask("EHLO x"), "^250")
            self.assertLess(node.log().count("cannot take a connection"), 100, "no end of warnings")
            for client in [reader, *clients]:
                client.reset()
            lab.until(lambda: descriptors(node) < 30, 10, "descriptors that are free again")
            answer = first.ask("EHLO x", "MAIL FROM:<a@b.test>", "RCPT TO:<bob@a.test>", "DATA")
            self.assertRegex(answer, "^354 ")
            self.assertRegex(first.ask(b"Subject: x\r\n\r\nx\r\n."), "^250 ", "a session from before goes on")
            for client in (first, second):
                client.sock.close()
            self.assert_back(node, before)

# Rubbish, at random but the same each time

class Fuzz(Case):
    """Several clients at once, on a node in capture mode and one in node mode, plain and with TLS."""

    CLIENTS = 8

    def test_fuzz(self):
        words = ("--timeout", "2", "--max-size", "100K", "--keep", "30", "--no-sync", *tls_options)
        with Node(*words) as capture, Node(
                "--domain", "a.test", "--retry", "3600", "--route", "far.test=smtp://127.0.0.1:1", *words,
                before=with_accounts(ANN, BOB)) as node:
            nodes = capture, node
            before = [self.level(one) for one in nodes]
            used = [memory(one) for one in nodes]
            deadline = time.monotonic() + FUZZ_SECONDS
            counts = at_once([lambda number=number: fuzz(nodes[number % 4 == 3], number, deadline)
                              for number in range(self.CLIENTS)])
            sys.stderr.write("%d fuzzed sessions, %.0f a second; " % (sum(counts), sum(counts) / FUZZ_SECONDS))
            for one, level, memory_before in zip(nodes, before, used):
                try:
                    self.assert_back(one, level, 30)
                except AssertionError as problem:
                    raise AssertionError("FUZZ_SEED=%d: %s" % (SEED, problem)) from None
                self.assertLess(memory(one) - memory_before, 60 << 20, "memory grew")
                self.assertNotIn("a task failed", one.log())


def fuzz(node, number, deadline):
    """Hold strange conversations until the time is over; return how many."""
    count = 0
    while time.monotonic() < deadline and node.process.poll() is None:
        count += 1
        with contextlib.suppress(OSError):          # ssl.SSLError is one
            Conversation(node, random.Random("%d/%d/%d" % (SEED, number, count))).hold()
    return count


ADDRESSES = (b"<ann@a.test>", b"<bob@a.test>", b"<x@far.test>", b"<>", b"<postmaster>", b'<"q \\" q"@a.test>', b"<a@b@c>",
             b"<@x,@y:ann@a.test>", "<jörg@bücher.test>".encode(), b"<" + b"l" * 300 + b"@a.test>", b"<ann@[127.0.0.1]>",
             b"ann@a.test", b"<../../x@a.test>", b"<ann@a.test", b"<ann+" + b"x" * 250 + b"@a.test>")
PARAMETERS = (b"", b"", b"", b" SIZE=100", b" SIZE=99999999999999999999999", b" BODY=8BITMIME", b" BODY=7BIT SMTPUTF8",
              b" SMTPUTF8", b" AUTH=<>", b" SIZE=", b" SIZE=-1", b" X=Y", b" RET=FULL", b" =", b" SIZE=1 SIZE=2")
LOGIN = (b"", b" PLAIN", b" LOGIN", b" PLAIN " + name_and_password(), b" PLAIN " + name_and_password(BOB, "no"),
         b" LOGIN " + base64.b64encode(ANN.encode()), b" CRAM-MD5", b" PLAIN =", b" PLAIN *")
SPICE = (b"\r", b"\n", b"\0", b"\r\n", b"\r\n.\r\n", b".", b"\xff", b"\x80", b"\t", b"<", b">", b":", b"\"", b"\\", b"@",
         b"x" * 5000, b"\x1b[2J", b"\xe2\x80\xa8", b"%s%n", b"\x16\x03\x01\x02\0", b"9" * 30, b"{}", b"\r\r\n", b"-1")


class Conversation:
    """One client's script, spoiled here and there, sent in pieces, and ended in some way."""

    def __init__(self, node, dice):
        self.node, self.dice = node, dice
        self.name = dice.choice(("smtp", "smtp", "smtp", "pop3", "pop3", "smtps", "pop3s"))

    def hold(self):
        dice = self.dice
        greeted = dice.random() < 0.7
        client = Raw(getattr(self.node, self.name), tls=self.name.endswith("s"), seconds=3, greeted=greeted)
        with client:
            if greeted and not self.name.endswith("s") and dice.random() < 0.1:
                client.ask(*(("EHLO x", "STARTTLS") if self.name == "smtp" else ("STLS",)))
                client.start_tls()
            self.send(client, self.script())
            ending = dice.random()
            if ending < 0.15:
                return client.reset()
            if ending < 0.3:
                return None
            client.sock.settimeout(0.5)
            with contextlib.suppress(OSError):
                if not isinstance(client.sock, ssl.SSLSocket):
                    client.sock.shutdown(socket.SHUT_WR)
                while client.sock.recv(65536):
                    pass
            return None

    def send(self, client, data):
        """Send in pieces of any size, now and then looking whether something was said."""
        dice, position = self.dice, 0
        pieces = dice.choice((1, 1, 2, 5, 20))
        while position < len(data):
            size = len(data) if pieces == 1 else dice.randint(1, max(1, 2 * len(data) // pieces))
            client.send(data[position:position + size])
            position += size
            if dice.random() < 0.5 and select.select([client.sock], [], [], 0.02 * dice.random())[0]:
                client.sock.recv(65536)

    def script(self):
        dice = self.dice
        verbs = self.smtp_line if self.name.startswith("smtp") else self.pop3_line
        if dice.random() < 0.05:
            return dice.getrandbits(8 * 2000).to_bytes(2000, "big")
        lines = self.opening() if dice.random() < 0.7 else []
        lines += [verbs() for _ in range(dice.randint(0, 12))]
        if dice.random() < 0.3:
            dice.shuffle(lines)
        end = dice.choice((b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b""))
        return self.spoil(b"".join(line + (b"\r\n" if dice.random() < 0.95 else end) for line in lines))

    def opening(self):
        """Return lines that lead somewhere: a whole transaction, or a log-in."""
        dice = self.dice
        if self.name.startswith("smtp"):
            recipients = [b"RCPT TO:" + dice.choice(ADDRESSES) for _ in range(dice.randint(1, 4))]
            content = b"DATA\r\n" + self.content() + b"\r\n." if dice.random() < 0.6 else self.chunks()
            return [b"EHLO x", b"MAIL FROM:" + dice.choice(ADDRESSES) + dice.choice(PARAMETERS), *recipients, content]
        name = dice.choice((ANN, BOB, "x@far.test"))
        password = PASSWORD if dice.random() < 0.8 else "wrong"
        return [b"USER " + name.encode(), b"PASS " + password.encode()]

    def content(self):
        dice = self.dice
        lines = [dice.choice((b"Subject: fuzz", b"", b".", b"..", b".x", b"\xff\xfe", b"x" * dice.randint(0, 3000),
                              b"Received: by x", b"\0", b"MIME-Version: 1.0", b"Content-Type: multipart/mixed; boundary=\"",
                              b"=?utf-8?q?=ff?=", b" folded")) for _ in range(dice.randint(0, 40))]
        return dice.choice((b"\r\n", b"\r\n", b"\n", b"\r")).join(lines) * dice.choice((1, 1, 1, 20))

    def chunks(self):
        dice, parts = self.dice, []
        for last in (False,) * dice.randint(0, 3) + (True,):
            content = self.content()
            size = len(content) if dice.random() < 0.8 else dice.choice((0, 1, len(content) + 50, 10 ** 12, 10 ** 20))
            parts.append(b"BDAT %d%s\r\n%s" % (size, b" LAST" if last else b"", content))
        return b"".join(parts)

    def smtp_line(self):
        dice = self.dice
        return dice.choice((
            lambda: b"EHLO " + dice.choice((b"x", b"[127.0.0.1]", b"", b"a b", b"\xff", b"x" * 300)), lambda: b"HELO x",
            lambda: b"MAIL FROM:" + dice.choice(ADDRESSES) + dice.choice(PARAMETERS),
            lambda: b"RCPT TO:" + dice.choice(ADDRESSES) + dice.choice(PARAMETERS),
            lambda: b"DATA", lambda: b"DATA\r\n" + self.content() + b"\r\n.", self.chunks, lambda: b"RSET", lambda: b"NOOP",
            lambda: b"AUTH" + dice.choice(LOGIN), lambda: b"STARTTLS", lambda: b"VRFY ann", lambda: b"EXPN x",
            lambda: b"HELP", lambda: b"QUIT", lambda: b"", lambda: b"*", lambda: b"."))()

    def pop3_line(self):
        dice = self.dice
        number = b"%d" % dice.choice((0, 1, 2, 3, 30, -1, 10 ** 9, 10 ** 12))
        return dice.choice((
            lambda: b"USER ann@a.test", lambda: b"PASS " + PASSWORD.encode(), lambda: b"AUTH" + dice.choice(LOGIN),
            lambda: b"CAPA", lambda: b"STLS", lambda: b"STAT", lambda: b"LIST", lambda: b"LIST " + number,
            lambda: b"UIDL", lambda: b"UIDL " + number, lambda: b"RETR " + number, lambda: b"TOP " + number + b" 3",
            lambda: b"TOP " + number + b" " + number, lambda: b"DELE " + number, lambda: b"RSET", lambda: b"NOOP",
            lambda: b"UTF8", lambda: b"LANG", lambda: b"QUIT", lambda: b"APOP x y", lambda: b"*"))()

    def spoil(self, data):
        """Change bytes, cut pieces out, double them, put spice in; half of the scripts stay as they are."""
        dice, data = self.dice, bytearray(data)
        for _ in range(dice.choice((0, 0, 0, 1, 2, 5))):
            if not data:
                break
            place, size = dice.randrange(len(data)), dice.choice((1, 1, 2, 10))
            kind = dice.randrange(4)
            if kind == 0:
                data[place] = dice.randrange(256)
            elif kind == 1:
                del data[place:place + size]
            elif kind == 2:
                data[place:place] = data[place:place + 20 * size]
            else:
                data[place:place] = dice.choice(SPICE)
        return bytes(data)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    threading.stack_size(256 * 1024)
    unittest.main()
