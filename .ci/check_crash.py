"""What a 250 is worth: kill -9 under load, the order of the flushes, several processes, full and broken disks, clocks.

    python3 .ci/check_crash.py [-v] [Class[.test]]        # CRASH_SEED=N repeats the moments of an earlier run

Every message has a name in its body; a ledger knows which of them got their 250. Loopback only. Needs root for the mounts.
"""
# time limit: 300
import collections
import concurrent.futures
import contextlib
import functools
import http.client
import imaplib
import itertools
import json
import os
import poplib
import random
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
import threading
import time
import unittest
import urllib.request
from pathlib import Path

import check_clients
import lab
import netlab

SEED = int(os.environ.get("CRASH_SEED") or random.SystemRandom().randrange(1 << 30))
PASSWORD = "secret of the lab"
LOCAL = ["anna@example.com", "bert@example.com", "cora@example.com"]
TEAM = "team@example.com"                           # an alias: all of them, and somebody elsewhere
FAR = "far@elsewhere.test"
FARTHER = "farther@other.test"
NAME = re.compile(rb"^ledger: (\S+)\r?$", re.MULTILINE)


# Letters and the ledger

STAMPS = {"mail", "queue", "flush"}     # files in run/ by which processes tell each other that something came


class Letter:
    """A message with a name: who is to have it, and whether its 250 came."""

    def __init__(self, name, recipients, size=0):
        self.name, self.recipients, self.size = name, recipients, size
        self.answered = False
        self.reply = b""

    def content(self):
        """Return the message; its last line says that it is the last."""
        filler = b"".join(b"%06d %s\r\n" % (n, b"x" * 60) for n in range(self.size // 69))
        return b"From: load@sender.test\r\nSubject: %s\r\n\r\nledger: %s\r\n%send of %s\r\n" % (
            self.name.encode(), self.name.encode(), filler, self.name.encode())

    def local(self):
        """Return the mailboxes that get it."""
        return sorted(set(LOCAL if TEAM in self.recipients else []) | {r for r in self.recipients if r in LOCAL})

    def remote(self):
        """Return the addresses elsewhere that get it."""
        return sorted({FAR for r in self.recipients if r in (TEAM, FAR)} | {r for r in self.recipients if r == FARTHER})


KINDS = [[LOCAL[0]], [FAR], [FAR, FARTHER], [TEAM], [LOCAL[1], FARTHER], LOCAL]


class Load:
    """Clients that send letters as fast as they are taken, through restarts; `letters` is the ledger."""

    def __init__(self, address, clients=8, kinds=KINDS, sizes=(0, 0, 0, 3000, 200_000), limit=None):
        self.addresses = itertools.cycle(address if isinstance(address, list) else [address])
        self.kinds, self.sizes, self.limit = kinds, sizes, limit
        self.letters = []
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.run, args=(number,), daemon=True) for number in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Let every client finish its letter."""
        self.over.set()
        self.join()

    def join(self, seconds=60):
        """Return when all clients are done."""
        deadline = time.monotonic() + lab.SLOWER * seconds
        for thread in self.threads:
            thread.join(max(0, deadline - time.monotonic()))
            assert not thread.is_alive(), "a client hangs"

    def next_letter(self):
        """Return a new letter in the ledger; None when there have been enough."""
        with self.lock:
            number = len(self.letters)
            if self.over.is_set() or (self.limit is not None and number >= self.limit):
                return None
            letter = Letter("L%05d" % number, self.kinds[number % len(self.kinds)], self.sizes[number % len(self.sizes)])
            self.letters.append(letter)
            return letter

    def run(self, number):
        """Be one client: a new connection whenever the old one is lost, and now and then for no reason."""
        chance = random.Random("%d %d" % (SEED, number))
        client = None
        while not self.over.is_set():
            if client is None:
                try:
                    client = connect(next(self.addresses))
                except (OSError, smtplib.SMTPException):
                    self.over.wait(0.02)            # nobody is there now
                    continue
            letter = self.next_letter()
            if letter is None:
                break
            try:
                send(client, letter)
            except (OSError, smtplib.SMTPException):
                client.close()
                client = None
            if client and chance.random() < 0.1:
                client.close()
                client = None
        if client:
            client.close()

    @property
    def answered(self):
        """The letters that have their 250."""
        return [letter for letter in self.letters if letter.answered]


def connect(address, timeout=150):
    """Return an smtplib client that has said EHLO."""
    client = smtplib.SMTP(*address, local_hostname="load.test", timeout=timeout)
    client.ehlo()
    return client


def send(client, letter):
    """Send a letter and note the answer; return the final (code, text)."""
    code, text = client.mail("load@sender.test")
    for recipient in letter.recipients:
        if code == 250:
            code, text = client.rcpt(recipient)
    if code == 250:
        code, text = client.data(letter.content())
    letter.answered, letter.reply = code == 250, text
    if code == 421:
        raise smtplib.SMTPServerDisconnected(text)
    if code != 250:
        client.rset()
    return code, text


# The other end

class Arrival:
    """A message at the sink: `answered` unless its 250 could not be written, `followed` once its client went on after that."""

    def __init__(self, name, recipients, helo):
        self.name, self.recipients, self.helo = name, recipients, helo
        self.answered = self.followed = False


class Sink:
    """An SMTP server for all domains. `script(verb, line, helo)` may return another reply, wait, or raise OSError to hang up;
    the end of a message is the verb "."."""

    def __init__(self):
        self.script = lambda verb, line, helo: None
        self.arrivals = []
        self.connections = 0
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port = self.socket.getsockname()[1]
        self.over = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def accept(self):
        while True:
            try:
                connection = self.socket.accept()[0]
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.talk, args=(connection,), daemon=True).start()

    def talk(self, connection):
        with connection, connection.makefile("rb") as lines, contextlib.suppress(OSError):
            connection.settimeout(60)
            connection.sendall(b"220 sink.test\r\n")
            last, helo, recipients = None, "", []
            while True:
                line = lines.readline()
                if not line:
                    return
                if last:
                    last.followed = True
                verb = line[:4].upper().decode("latin-1").strip()
                helo = line[4:].strip().decode() if verb in ("EHLO", "HELO") else helo
                reply = self.script(verb, line, helo) or {
                    "EHLO": b"250-sink.test\r\n250 8BITMIME", "DATA": b"354 go on", "QUIT": b"221 bye"}.get(verb, b"250 ok")
                if verb == "MAIL":
                    recipients = []
                elif verb == "RCPT" and reply.startswith(b"2"):
                    recipients.append(line.partition(b"<")[2].partition(b">")[0].decode().lower())
                connection.sendall(reply + b"\r\n")
                if reply.startswith(b"354"):
                    content = b""
                    while not content.endswith(b"\r\n.\r\n"):
                        block = lines.readline()
                        if not block:
                            return
                        content = content[-4:] + block if len(content) > 1 << 20 else content + block
                    found = NAME.search(content)
                    last = Arrival(found.group(1).decode() if found else "?", recipients, helo)
                    self.arrivals.append(last)
                    reply = self.script(".", content, helo) or b"250 taken"
                    last.answered = reply.startswith(b"250")    # before the node knows it, and whoever watches the node
                    try:
                        connection.sendall(reply + b"\r\n")
                    except OSError:
                        last.answered = False
                        return
                elif verb == "QUIT":
                    return

    def count(self, answered=True):
        """Return how often each (name, recipient) was taken."""
        return collections.Counter((arrival.name, recipient) for arrival in list(self.arrivals)
                                   if arrival.answered or not answered for recipient in arrival.recipients)

    def unexcused(self):
        """Return the (name, recipient) that came again although their client had gone on: not in flight at any kill."""
        seen, wrong = set(), []
        for arrival in self.arrivals:
            for recipient in arrival.recipients:
                if (arrival.name, recipient) in seen:
                    wrong.append((arrival.name, recipient))
                if arrival.answered and arrival.followed:
                    seen.add((arrival.name, recipient))
        return wrong


# The node

@functools.lru_cache(maxsize=None)
def accounts():
    """Return a folder with a users and an aliases file for all nodes here."""
    place = Path(lab_folder.enter_context(lab.folder()))
    place.chmod(0o755)
    for name in LOCAL:
        lab.run([sys.executable, lab.MINIMAIL, "--data", place, "user", "add", name, "--password-stdin"],
                PASSWORD.encode() + b"\n")
    (place / "aliases").write_text("%s: %s\n" % (TEAM, ", ".join([*LOCAL, FAR])))
    return place


lab_folder = contextlib.ExitStack()


class Node(lab.Node):
    """A node whose ports stay over restarts, and whose log may show tracebacks only where a test broke the disk."""

    wrapper = ()

    def __init__(self, *options, data=None, **more):
        super().__init__("--smtp", "127.0.0.1:%d" % lab.free_port(), "--pop3", "127.0.0.1:%d" % lab.free_port(),
                         *map(str, options), **more)
        self.elsewhere = data

    def __enter__(self):
        super().__enter__()
        return self

    def command(self, *words):
        if self.elsewhere:
            self.data = self.elsewhere
        return [*self.wrapper, *super().command(*words)]

    def kill(self):
        """kill -9, to it and all its children."""
        lab.end_group(self.process)

    def restart(self):
        """Stop in good order, start again."""
        self.stop()
        self.start()

    def queue(self):
        """Return every file in the queue."""
        return lab.files(self.data / "queue")

    def drafts(self):
        """Return every file in a tmp/."""
        return [path for path in lab.files(self.data / "mail") if path.parent.name == "tmp"]

    def say(self, *words):
        """Run one of the other commands on the data and return what it prints."""
        return lab.run([sys.executable, lab.MINIMAIL, "--data", self.data, *words]).decode()

    def fetch(self, address, password=PASSWORD):
        """Return a POP3 client that is logged in."""
        client = poplib.POP3(*self.pop3, timeout=150)
        try:
            client.user(address)
            client.pass_(password)
        except BaseException:
            client.close()
            raise
        return client


def node_mode(*sinks):
    """Return the options of a node that keeps example.com and has a sink for elsewhere.test, another for other.test."""
    options = ["--domain", "example.com", "--hostname", "node.test", "--users", accounts() / "users",
               "--aliases", accounts() / "aliases", "--retry", "1", "--quiet"]
    for domain, sink in zip(("elsewhere.test", "other.test"), sinks):
        options += ["--route", "%s=smtp://127.0.0.1:%d" % (domain, sink.port)]
    return options


def stored(node, addresses=LOCAL):
    """Return how often each (name, mailbox) is stored; AssertionError for a file that is not whole."""
    found = collections.Counter()
    for address in addresses:
        for path in node.stored(address):
            content = path.read_bytes()
            size = int(re.search(r",S=(\d+)", path.name).group(1))
            name = NAME.search(content)
            assert len(content) == size, "%s has %d bytes" % (path, len(content))
            assert name and content.endswith(b"end of %s\r\n" % name.group(1)), "%s is not whole" % path
            assert content.startswith(b"Return-Path: <load@sender.test>\r\n"), content[:200]
            found[name.group(1).decode(), address] += 1
    return found


def said(node):
    """Return what processes have left in run/ beside the stamps: the locks by which others see that they live, and trials."""
    return sorted(set(os.listdir(str(node.data / "run"))) - STAMPS)


def cpu_seconds(pid):
    """Return the processor time a process has used."""
    fields = Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid):
    """Return the pids of a process's children that live."""
    found = Path("/proc/%d/task/%d/children" % (pid, pid)).read_text().split()
    return sorted(int(child) for child in found if is_alive(int(child)))


def is_alive(pid):
    """Return whether a process runs; a zombie does not."""
    try:
        return Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Case(unittest.TestCase):
    """Starts nodes and sinks that end with the test."""

    maxDiff = 2000

    def enter(self, context):
        """Enter a context that ends with the test."""
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def node(self, *options, **more):
        """Start a node; at the end of the test it must still stop well."""
        node = Node(*options, **more)
        node.__enter__()

        def finish():
            if node.process.poll() is None:
                node.__exit__(None, None, None)
            else:
                node.resources.close()              # the test killed it
        self.addCleanup(finish)
        return node

    def send_all(self, address, letters):
        """Send letters over one connection; each must get its 250."""
        client = connect(address)
        for letter in letters:
            self.assertEqual(send(client, letter)[0], 250, letter.reply)
        client.quit()
        return letters

    def check_ledger(self, node, letters, sinks=(), copies=1):
        """Everything answered is where it belongs and once; what got no answer may be there, but once."""
        here, there = stored(node), collections.Counter()
        for sink in sinks:
            there.update(sink.count())
        lost, twice = [], []
        for letter in letters:
            for box in letter.local():
                if letter.answered and not here[letter.name, box]:
                    lost.append((letter.name, box))
                if here[letter.name, box] > copies:
                    twice.append((letter.name, box))
            if sinks:
                lost += [(letter.name, far) for far in letter.remote() if letter.answered and not there[letter.name, far]]
        self.assertEqual(lost, [], "answered with 250, and gone (seed %d)" % SEED)
        self.assertEqual(twice, [], "more than one copy in a mailbox (seed %d)" % SEED)
        for sink in sinks:
            self.assertEqual(sink.unexcused(), [], "sent again though it was not in flight at a kill (seed %d)" % SEED)

    def check_clean(self, node):
        """Soon after a start nothing is left of those who were killed; after a stop nothing at all."""
        lab.until(lambda: not node.queue(), 60, "an empty queue, not %s" % node.queue()[:5])
        lab.until(lambda: not node.drafts(), 10, "empty tmp/, not %s" % node.drafts()[:5])
        lab.until(lambda: len(said(node)) <= 1, 10, "one process's lock in run/, not %s" % said(node))
        node.stop()
        self.assertEqual(said(node), [])
        self.assertEqual(node.queue() + node.drafts(), [])
        node.start()


# kill -9

class KilledUnderLoad(Case):
    """Clients send local and relayed mail, and the node dies again and again."""

    KILLS = 24

    def test_what_has_its_250_survives(self):
        chance = random.Random(SEED)
        sinks = [self.enter(Sink()), self.enter(Sink())]
        node = self.node(*node_mode(*sinks))
        with Load(node.smtp) as load:
            for number in range(self.KILLS):
                self.kill_at_some_moment(node, sinks, chance, number % 3)
                node.start()
            done = len(load.answered)
            lab.until(lambda: len(load.answered) > done + 20, 30, "answers at the end")
        node.restart()
        self.check_clean(node)
        self.check_ledger(node, load.letters, sinks)
        again = sum((sink.count() - collections.Counter(set(sink.count()))).total() if sys.version_info >= (3, 10) else 0
                    for sink in sinks)
        print("%d kills: %d letters, %d with 250, %d sent again as in flight at a kill" % (
            self.KILLS, len(load.letters), len(load.answered), again))
        self.assertGreater(len(load.answered), 5 * self.KILLS)

    def kill_at_some_moment(self, node, sinks, chance, way):
        """kill -9: at a random time, when the sink has a whole message and not answered, or when it has just answered."""
        if way == 0:
            time.sleep(chance.uniform(0, 0.6))      # not a wait: the moment itself is what is drawn
            return node.kill()
        countdown, process = itertools.count(chance.randrange(1, 25), -1), node.process
        killed = threading.Event()

        def script(verb, line, helo):
            if verb == ("." if way == 1 else "MAIL") and next(countdown) == 0:
                lab.end_group(process)              # with "MAIL": the message before it was recorded, others were not
                killed.set()
        for sink in sinks:
            sink.script = script
        if not killed.wait(3):
            node.kill()
        for sink in sinks:
            sink.script = lambda verb, line, helo: None

    def test_killed_within_a_system_call(self):
        """strace kills the process as it enters its n-th call of a kind (in one of its threads), for many n."""
        sinks = [self.enter(Sink()), self.enter(Sink())]
        node = self.node(*node_mode(*sinks))
        with Load(node.smtp, clients=4) as load:
            lab.until(lambda: len(load.answered) > 30, 20, "30 letters")
            by_hand = 0
            for call, most in (("rename", 4), ("link", 3), ("unlink", 4), ("fsync", 5), ("write", 4)):
                for number in range(1, most + 1):
                    node.kill()
                    node.wrapper = ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", "trace=" + call,
                                    "-e", "inject=%s:signal=KILL:when=%d" % (call, number)]
                    try:
                        node.start()
                    except AssertionError as problem:   # it may as well die while it cleans up at its start
                        self.assertIn("ended with status -9", str(problem))
                        continue
                    enough = len(load.letters) + 60    # some threads make few such calls
                    lab.until(lambda: node.process.poll() is not None or len(load.letters) > enough, 20,  # noqa: B023
                              "its death, or many letters")
                    by_hand += node.process.poll() is None
            node.kill()
            node.wrapper = ()
            node.start()
            done = len(load.answered)
            lab.until(lambda: len(load.answered) > done + 20, 30, "answers at the end")
        node.restart()
        self.check_clean(node)
        self.check_ledger(node, load.letters, sinks)
        self.assertLess(by_hand, 8, "strace did not do what it should")
        print("killed within %d system calls: %d letters, %d with 250" % (20 - by_hand, len(load.letters), len(load.answered)))

    def test_dele_needs_quit(self):
        """A message is gone only if QUIT was answered, or on its way."""
        chance = random.Random(SEED + 1)
        node = self.node("--quiet", "--transcripts", "off")
        box = LOCAL[0]
        names = itertools.count()
        for number in range(12):
            letters = [Letter("P%d" % next(names), [box]) for _ in range(60 - len(node.stored(box)))]
            self.send_all(node.smtp, letters)
            before = stored(node, [box])
            client = node.fetch(box)
            chosen = chance.sample(range(1, 61), 30)
            uids = [line.split()[1].decode() for line in client.uidl()[1]]
            for index in chosen:
                client.dele(index)
            way, answered = number % 4, False
            if way:
                client._putcmd("QUIT")
            if way == 3:
                answered = client._getresp().startswith(b"+OK")
            elif way == 2:
                time.sleep(chance.uniform(0, 0.004))    # the moment itself
            node.kill()
            client.close()
            node.start()
            left = {path.name.partition(",")[0] for path in node.stored(box)}
            gone = set(uids) - left
            self.assertLessEqual(gone, {uids[index - 1] for index in chosen}, "more gone than was named by DELE")
            if not way:
                self.assertEqual(gone, set(), "gone without QUIT")
            if answered:
                self.assertEqual(len(gone), 30, "QUIT was answered, and some are still there")
            self.assertEqual(sum(before.values()) - len(gone), sum(stored(node, [box]).values()))
            node.fetch(box).quit()                  # the lock died with the process


class OwnLetter(Letter):
    """A letter that the node signs: it comes from one of its domain."""

    def content(self):
        return super().content().replace(b"From: load@sender.test", b"From: " + LOCAL[0].encode(), 1)


class KilledInBetween(Case):
    """kill -9 where something beside the message has to outlive the process, and where mail comes in by other doors."""

    def test_signature_and_srs_address_are_kept(self):
        """What was refused for now goes out, after kill -9, with the signature and the reverse-path that it had."""
        sink = self.enter(Sink())
        place, later = self.enter(lab.folder()), threading.Event()
        lab.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", place / "key.pem"])
        signatures, senders = collections.defaultdict(set), set()

        def script(verb, line, helo):
            if verb == "MAIL":
                senders.add(line.partition(b"<")[2].partition(b">")[0])
            elif verb == ".":
                name = NAME.search(line).group(1).decode()
                signatures[name].update(re.findall(rb"^DKIM-Signature:.*?(?=\r\n[^ \t])", line, re.DOTALL | re.MULTILINE))
                return None if later.is_set() else b"451 4.2.0 later"
        sink.script = script
        node = self.node(*node_mode(sink), "--dkim", "example.com=mail:%s" % (place / "key.pem"))
        letters = self.send_all(node.smtp, [OwnLetter("S%d" % n, [FAR]) for n in range(5)] + [Letter("forward", [TEAM])])
        due = node.data / "queue" / "due"
        for _ in range(3):
            lab.until(lambda: len(lab.files(due)) == len(letters), 10, "letters that wait for another attempt")
            node.kill()
            node.start()
        later.set()
        lab.until(lambda: len(sink.count()) == len(letters) and not node.queue(), 15, "all letters")
        self.assertEqual(set(sink.count().values()), {1})
        self.assertEqual({name: len(found) for name, found in signatures.items()}, {letter.name: 1 for letter in letters})
        self.assertEqual(len(senders), 2, senders)
        back = next(sender.decode() for sender in senders if sender.startswith(b"SRS0="))
        client = connect(node.smtp)
        client.mail("")
        self.assertEqual(client.rcpt(back)[0], 250, "the node knows its own address again")
        client.close()

    def test_reports_are_sent(self):
        """NOTIFY=SUCCESS: whoever got the 250 hears of it; once, but where the letter itself was under way at a kill."""
        sink = self.enter(Sink())
        node = self.node(*node_mode(sink))
        chance, kills, names = random.Random(SEED + 3), 6, []
        for number in range(kills):
            client = connect(node.smtp)
            try:
                for n in range(5):
                    client.mail(LOCAL[2])
                    client.rcpt(FAR, ["NOTIFY=SUCCESS"])
                    letter = OwnLetter("N%d-%d" % (number, n), [FAR])
                    names += [letter.name] * (client.data(letter.content())[0] == 250)
            finally:
                client.close()
            time.sleep(chance.uniform(0, 0.02))     # the moment itself
            node.kill()
            node.start()
        node.restart()
        lab.until(lambda: not node.queue(), 30, "an empty queue")
        reports = [path.read_bytes() for path in node.stored(LOCAL[2])]
        about = collections.Counter(b"".join(re.findall(rb"Subject: (N\d-\d)\r", report)).decode() for report in reports)
        self.assertEqual(set(about), set(names))
        for name in names:
            self.assertLessEqual(about[name], sink.count()[name, FAR], "a report for each time it was sent, at most")
        self.assertEqual(sink.unexcused(), [])

    def test_sendmail(self):
        """Killed at any step while it takes a message: status 0 means sent, once; else it is not, or whole, and once."""
        sink = self.enter(Sink())
        node = self.node(*node_mode(sink))
        letters = []
        for call, numbers in (("write", (1, 5, 50)), ("flock", (1, 2)), ("link", (1, 2)), ("fsync", (1, 2, 3, 4)),
                              ("rename", (1, 2)), ("utimensat", (1,)), ("none", (1,))):
            for number in numbers:
                letter = Letter("M%s%d" % (call, number), [FAR, LOCAL[0]], size=500_000)
                words = [sys.executable, lab.MINIMAIL, *node_mode(sink), "--data", node.data, "sendmail", "-i", "-f",
                         "load@sender.test", *letter.recipients]
                inject = ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", "trace=" + call,
                          "-e", "inject=%s:signal=KILL:when=%d" % (call, number)] if call != "none" else []
                ended = subprocess.run([*inject, *map(str, words)], input=letter.content(), capture_output=True,
                                       timeout=lab.SLOWER * 30)
                self.assertIn(ended.returncode, (0, -signal.SIGKILL), ended.stderr)
                letter.answered = ended.returncode == 0
                letters.append(letter)
        killed = sum(not letter.answered for letter in letters)
        print("sendmail killed at %d of %d steps" % (killed, len(letters)))
        self.assertGreater(killed, 6, "strace did not do what it should")
        node.restart()
        self.check_clean(node)
        self.check_ledger(node, letters, [sink])
        self.assertEqual(set(sink.count().values()), {1})

    def test_release(self):
        """A captured message that is released: "ok" means that it is sent, and once, whatever happens to the node."""
        sink = self.enter(Sink())
        node = self.node("--quiet", "--release", "smtp://127.0.0.1:%d" % sink.port, "--retry", "1",
                         "--web", "127.0.0.1:%d" % lab.free_port())
        letters = self.send_all(node.smtp, [Letter("R%d" % n, [LOCAL[0]]) for n in range(12)])
        chance = random.Random(SEED + 4)
        with urllib.request.urlopen(self.api(node) + "messages") as answer:
            ids = {found["Subject"]: found["ID"] for found in json.load(answer)["messages"]}
        for number, letter in enumerate(letters):
            letter.recipients, letter.answered = [FAR], False
            request = urllib.request.Request("%smessage/%s/release" % (self.api(node), ids[letter.name]),
                                             json.dumps({"To": [FAR]}).encode())
            killer = threading.Timer(chance.uniform(0, 0.05), node.kill)
            if number % 4:                          # else it dies as soon as it has answered
                killer.start()
            with contextlib.suppress(OSError, http.client.HTTPException):
                with urllib.request.urlopen(request, timeout=150) as answer:
                    letter.answered = answer.status == 200
            if number % 4:
                killer.join()
            else:
                node.kill()
            node.start()
        lab.until(lambda: not node.queue(), 30, "an empty queue")
        lab.until(lambda: not [letter for letter in letters if letter.answered and not sink.count()[letter.name, FAR]], 5,
                  "what was released")
        self.assertEqual(sink.unexcused(), [])
        self.assertEqual(len(stored(node, LOCAL[:1])), len(letters), "they stay where they were captured")
        answered = sum(letter.answered for letter in letters)
        print("%d of %d releases answered" % (answered, len(letters)))
        self.assertGreaterEqual(answered, len(letters) // 4)

    @staticmethod
    def api(node):
        return "http://127.0.0.1:%d/api/v1/" % node.listening["web"][0][1]


# The order of things

class Call:
    """A system call: when it began and ended, as positions in the trace."""

    def __init__(self, thread, text, began, ended):
        self.thread, self.text, self.began, self.ended = thread, text, began, ended
        self.name = text.partition("(")[0]


def read_trace(path):
    """Return the calls of a strace -f -y file, parts that were interleaved put together again."""
    calls, open_ones = [], {}
    for at, line in enumerate(path.read_text(errors="backslashreplace").splitlines()):
        match = re.match(r"(\d+) +(.*)", line)
        if not match or match.group(2)[:1] in "+-":
            continue
        thread, text = match.groups()
        resumed = re.match(r"<\.\.\. \w+ resumed>(.*)", text)
        if resumed:
            if thread in open_ones:
                call = open_ones.pop(thread)
                call.text += resumed.group(1)
                call.ended = at
        elif text.endswith("<unfinished ...>"):
            open_ones[thread] = Call(thread, text[:-len("<unfinished ...>")], at, float("inf"))
            calls.append(open_ones[thread])
        else:
            calls.append(Call(thread, text, at, at))
    return calls


class Order(Case):
    """strace sees: the content flushed, then the name, then the directory flushed, then the 250."""

    def trace(self, clients, each, kinds, *, mode=None):
        """Run a load on a node under strace; return the calls and the letters."""
        sink = self.enter(Sink())
        node = Node(*(mode or node_mode(sink, sink)))
        with lab.folder() as place:
            node.wrapper = ["strace", "-D", "-f", "-y", "-qq", "-s", "120", "-o", str(place / "trace")]
            with node:
                self.warm_up(node, kinds)
                with Load(node.smtp, clients=clients, kinds=kinds, sizes=(0, 100_000), limit=clients * each) as load:
                    load.join()
                self.assertEqual(len(load.answered), clients * each)
                lab.until(lambda: not [path for path in node.queue() if path.suffix == ".msg"], 30, "an empty queue")
                trace = place / "trace"
            lab.until(lambda: not is_traced(place), 5, "the end of strace")
            return read_trace(trace), load.letters

    def warm_up(self, node, kinds):
        """Make the mailboxes, so that the count is of the usual case."""
        self.send_all(node.smtp, [Letter("warm%d" % number, kind) for number, kind in enumerate(kinds)])

    def check_order(self, calls, letters):
        """Check every letter; return the calls per letter by name."""
        syncs = [call for call in calls if call.name in ("fsync", "fdatasync") and call.text.rstrip().endswith("= 0")]
        replies = {}
        for call in calls:
            for id in re.findall(r"250 2\.0\.0 accepted as ([\w-]+)", call.text) if call.name.startswith("send") else ():
                replies[id] = call
        for letter in letters:
            id = letter.reply.decode().rpartition(" ")[2]
            self.assertIn(id, replies, letter.reply)
            names = [call for call in calls if re.match(r"(rename|link)(at2?|at)?\(", call.text) and id in call.text
                     and call.began < replies[id].began]
            visible = [call for call in names if self.target(call)]
            wanted = len(letter.local()) + bool(letter.remote())
            self.assertEqual(len(visible), wanted, [call.text for call in names])
            for call in visible:
                self.check_one(id, call, syncs, replies[id], bool(letter.remote()))

    @staticmethod
    def target(call):
        """Return the directory in which a call makes a name that counts; "" for others: ID.msg, hints, what the relay does."""
        source, target = re.findall(r'"([^"]*)"', call.text)[:2]
        if target.endswith(".msg") or re.search(r"/new/|/due/|/busy/", target.partition("/queue/")[2]) or \
                re.search(r"/queue/.*\.env\..+\.tmp$", source):
            return ""
        return os.path.dirname(target)

    def check_one(self, id, call, syncs, reply, remote):
        content = [sync for sync in syncs if re.search(r"<[^>]*/(tmp|queue)/[^>]*%s[^>]*>" % id, sync.text)
                   and not sync.text.rstrip(" =0)").endswith(".tmp>")]
        self.assertTrue(any(sync.ended < call.began for sync in content), "content not flushed before " + call.text)
        if self.target(call).endswith("/queue"):
            envelope = [sync for sync in syncs if "/queue/%s.env.tmp>" % id in sync.text]
            self.assertTrue(any(sync.ended < call.began for sync in envelope), "envelope not flushed before " + call.text)
        for directory in [self.target(call)]:
            flushed = [sync for sync in syncs if "<%s>" % directory in sync.text and sync.began > call.ended]
            self.assertTrue(flushed, "%s never flushed after %s" % (directory, call.text))
            self.assertLess(min(sync.ended for sync in flushed), reply.began, "250 before %s was flushed" % directory)

    def report(self, title, calls, letters):
        """Print and return the calls per letter."""
        count = collections.Counter(call.name for call in calls)
        often = ", ".join("%s %.1f" % (name, number / len(letters)) for name, number in count.most_common(12))
        print("%s: %.1f calls, %.2f fsync per letter (%s)" % (
            title, len(calls) / len(letters), count["fsync"] / len(letters), often))
        return {name: number / len(letters) for name, number in count.items()}

    def test_one_at_a_time(self):
        calls, letters = self.trace(1, 40, KINDS)
        self.check_order(calls, letters)
        self.report("one client, all kinds", calls, letters)

    def test_many_at_a_time(self):
        calls, letters = self.trace(12, 12, KINDS)
        self.check_order(calls, letters)
        self.report("12 clients, all kinds", calls, letters)

    def test_group_commit(self):
        """Many clients, one mailbox: the flushes of its directory are shared."""
        calls, letters = self.trace(16, 12, [[LOCAL[0]]])
        self.check_order(calls, letters)
        self.report("16 clients, one mailbox", calls, letters)
        directory = [call for call in calls if call.name == "fsync" and "/anna/new>" in call.text]
        self.assertLess(len(directory), len(letters) * 0.7, "each message had a directory flush of its own")
        idle = [call for call in calls if call.name == "epoll_wait" and re.search(r", 0\) += 0$", call.text)]
        self.assertLess(len(idle), len(letters) * 5, "a thread looks again and again for something to do")


def is_traced(place):
    """Return whether a strace still writes into a folder."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if words[0].endswith(b"strace") and str(place / "trace").encode() in words:
                return True
    return False


# Several processes

class Workers(Case):
    """--workers 3: one node in several processes."""

    def workers(self, node, count=3):
        """Return the pids of the workers, once there are as many as wanted."""
        def look():
            found = children(node.process.pid)
            return found if len(found) == count else None
        return lab.until(look, 10, "%d workers" % count)

    def kill_one(self, node, victim):
        """kill -9 of a worker; return when it is gone, with all that it had open, and another one is there."""
        os.kill(victim, signal.SIGKILL)
        lab.until(lambda: victim not in self.workers(node), 10, "a new worker in place of %d" % victim)

    def test_all_work_and_one_that_dies_is_replaced(self):
        sinks = [self.enter(Sink()), self.enter(Sink())]
        node = self.node("--workers", 3, *node_mode(*sinks))
        before = self.workers(node)
        chance = random.Random(SEED + 2)
        with Load(node.smtp, clients=12) as load:
            lab.until(lambda: len(self.tokens(load)) == 3, 20, "messages taken by all three workers")
            for _ in range(4):
                self.kill_one(node, chance.choice(self.workers(node)))
            done = len(load.answered)
            lab.until(lambda: len(load.answered) > done + 100, 30, "100 more letters")
        self.assertNotEqual(before, self.workers(node))
        node.restart()
        lab.until(lambda: not node.queue(), 60, "an empty queue")
        lab.until(lambda: not node.drafts(), 10, "empty tmp/")
        self.check_ledger(node, load.letters, sinks)
        node.stop()
        self.assertEqual(said(node), [])
        self.assertEqual(node.queue() + node.drafts(), [])
        node.start()

    @staticmethod
    def tokens(load):
        """Return the tokens of the processes that gave the answers."""
        ids = [letter.reply.decode().rpartition(" ")[2] for letter in load.answered]
        return {id.split("-")[2][:8] for id in ids}

    def greetings(self, address, count, keep):
        """Open connections into `keep` and return the codes of their first lines."""
        codes = []
        for _ in range(count):
            connection = socket.create_connection(address, 10)
            connection.settimeout(10)
            keep.append(connection)
            codes.append(connection.recv(200)[:9])
        return codes

    def test_limits_hold_over_all_workers(self):
        node = self.node("--workers", 3, "--max-connections", 20, "--quiet")
        with contextlib.ExitStack() as stack:
            held = []
            stack.callback(lambda: [connection.close() for connection in held])
            codes = self.greetings(node.smtp, 26, held)
            self.assertEqual([code[:3] for code in codes], [b"220"] * 20 + [b"421"] * 6)
            self.assertEqual(codes[-1], b"421 4.3.2")
            self.assertEqual(self.greetings(node.pop3, 1, held), [b"-ERR [SYS"])
            for connection in held:
                connection.close()
            held.clear()
            lab.until(lambda: self.can_open(node, 20), 10, "room for 20 again")
            # What a dead worker had open does not count any more, and no more than that.
            self.greetings(node.smtp, 20, held)
            self.kill_one(node, max(self.workers(node), key=lambda pid: len(os.listdir("/proc/%d/fd" % pid))))
            lost = sum(map(is_closed, held))
            self.assertGreater(lost, 0, "connections lost with the worker that has most of them")
            kept = [connection for connection in held if not is_closed(connection)]
            self.assertEqual(lost + len(kept), 20)
            lab.until(lambda: self.room(node, lost + 3) == lost, 10, "room for %d, as many as died" % lost)

    def can_open(self, node, count):
        """Return whether so many connections fit, and one more does not."""
        return self.room(node, count + 1) == count

    def room(self, node, tries):
        """Return how many of some connections are taken; all are closed again."""
        held = []
        try:
            return sum(code[:3] == b"220" for code in self.greetings(node.smtp, tries, held))
        finally:
            for connection in held:
                connection.close()

    def test_limit_per_client(self):
        """One address that is not loopback, in a network of its own that has nothing else."""
        node = Node()
        node.options = ["--workers", "3", "--max-per-client", "5", "--quiet", "--smtp", "192.0.2.1:2525", "--pop3", "off"]
        node.wrapper = ["unshare", "-n", "sh", "-c", 'ip link set lo up && ip addr add 192.0.2.1/32 dev lo && exec "$@"', "sh"]
        with node, contextlib.ExitStack() as stack:
            held = []
            stack.callback(lambda: [connection.close() for connection in held])
            with open("/proc/self/ns/net") as home, open("/proc/%d/ns/net" % node.process.pid) as there:
                netlab.enter_namespace(there)
                try:
                    codes = self.greetings(("192.0.2.1", 2525), 9, held)
                finally:
                    netlab.enter_namespace(home)
            self.assertEqual(codes, [b"220 " + codes[0][4:]] * 5 + [b"421 4.3.2"] * 4)

    def test_sigterm_ends_all(self):
        node = self.node("--workers", 3, "--quiet")
        workers = self.workers(node)
        held = []
        self.addCleanup(lambda: [connection.close() for connection in held])
        self.greetings(node.smtp, 12, held)
        self.greetings(node.pop3, 4, held)
        client = connect(node.smtp)                 # in the middle of a message
        client.mail("a@b.test"), client.rcpt("c@d.test"), client.putcmd("data"), client.getreply()
        began = time.monotonic()
        node.process.terminate()
        self.assertEqual(node.process.wait(10), 0)
        self.assertLess(time.monotonic() - began, 10)
        self.assertEqual([pid for pid in workers if is_alive(pid)], [])
        self.assertIn(b"421 ", held[0].recv(200))
        client.close()
        self.assertEqual(said(node), [])
        self.assertEqual(node.drafts(), [])
        node.start()

    def test_workers_end_with_their_parent(self):
        node = self.node("--workers", 3, "--quiet")
        workers = self.workers(node)
        os.kill(node.process.pid, signal.SIGKILL)
        node.process.wait(5)
        lab.within(lambda: not any(map(is_alive, workers)), 12, "the end of all workers")
        self.assertEqual(said(node), [], "the workers left in good order")
        node.start()

    def test_one_pop3_session_per_mailbox(self):
        node = self.node("--workers", 3, "--quiet", "--transcripts", "off")
        self.send_all(node.smtp, [Letter("W1", [LOCAL[0]])])
        holder = node.fetch(LOCAL[0])
        for _ in range(9):                          # some of them at other workers than the holder's
            with self.assertRaisesRegex(poplib.error_proto, "IN-USE"):
                node.fetch(LOCAL[0])
        for pid in self.workers(node):
            os.kill(pid, signal.SIGKILL)
        with self.assertRaises((poplib.error_proto, OSError)):
            holder.stat()
        holder.close()
        self.workers(node)
        lab.until(lambda: self.can_log_in(node), 10, "the lock's end")

    @staticmethod
    def can_log_in(node):
        try:
            node.fetch(LOCAL[0]).quit()
        except (poplib.error_proto, OSError):
            return False
        return True


def is_closed(connection):
    """Return whether the other end hung up."""
    connection.settimeout(0)
    try:
        return connection.recv(100) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def stall_first_node(case, sink, seconds):
    """Let a sink hang at the final dots of the node one.test, and lose the connection; return an event for when it does."""
    stalled, release = threading.Event(), threading.Event()
    case.addCleanup(release.set)

    def script(verb, line, helo):
        if verb == "." and helo == "one.test":
            stalled.set()
            release.wait(seconds)
            raise OSError
    sink.script = script
    return stalled


class TwoNodes(Case):
    """Two nodes started on their own, on one data directory."""

    def pair(self, *sinks):
        """Start two nodes on one data directory."""
        first = self.node(*node_mode(*sinks), "--hostname", "one.test")
        second = self.node(*node_mode(*sinks), "--hostname", "two.test", data=first.data)
        return first, second

    def test_both_under_load(self):
        sinks = [self.enter(Sink()), self.enter(Sink())]
        first, second = self.pair(*sinks)
        with Load([first.smtp, second.smtp]) as load:
            lab.until(lambda: len(load.answered) > 150, 60, "150 letters")
            first.kill()
            first.start()
            lab.until(lambda: len(load.answered) > 300, 60, "300 letters")
        lab.until(lambda: not [path for path in first.queue() if path.suffix != ".msg"], 60, "an empty queue")
        second.stop()
        first.restart()
        self.check_clean(first)
        self.check_ledger(first, load.letters, sinks)
        second.start()
        holder = first.fetch(LOCAL[0])
        with self.assertRaisesRegex(poplib.error_proto, "IN-USE"):
            second.fetch(LOCAL[0])
        holder.quit()
        second.fetch(LOCAL[0]).quit()

    def test_take_over(self):
        """One dies in the middle of sending: the other sends what it had in its memory, and nothing again but what it sent."""
        sink = self.enter(Sink())
        stalled = stall_first_node(self, sink, 30)
        first, second = self.pair(sink)
        letters = self.send_all(first.smtp, [Letter("T%02d" % n, [FAR]) for n in range(20)])
        self.assertTrue(stalled.wait(10))
        used, looked = cpu_seconds(second.process.pid), time.monotonic()
        threading.Event().wait(1.5)                 # in which nothing is to do for the second node
        self.assertEqual(sink.count(), {}, "the first node lives")
        share = (cpu_seconds(second.process.pid) - used) / (time.monotonic() - looked)
        self.assertLess(share, 0.15, "the second node spins while the first one has entries")
        killed = time.monotonic()
        first.kill()
        lab.until(lambda: sum(sink.count().values()) == 20, 10, "the second node takes over")
        took = time.monotonic() - killed
        print("taken over after %.1f seconds; the waiting node used %.0f%% of a processor" % (took, share * 100))
        self.assertLess(took, 4)
        self.assertEqual(set(sink.count().values()), {1})
        again = {name for (name, _), count in sink.count(answered=False).items() if count > 1}
        self.assertEqual(again, self.held(sink), "only what was in flight was sent again")
        self.assertEqual({letter.name for letter in letters}, {name for name, _ in sink.count()})
        lab.until(lambda: not second.queue(), 10, "an empty queue")

    @staticmethod
    def held(sink):
        """Return the names of the letters that the first node sent and got no answer to."""
        return {arrival.name for arrival in sink.arrivals if arrival.helo == "one.test"}

    def test_a_start_beside_a_sweep(self):
        """A node that starts while another one cleans up is not taken for dead."""
        first = self.node("--quiet")
        slow = self.enter(Node("--quiet", data=first.data))
        slow.stop()
        slow.wrapper = ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", "trace=flock",
                        "-e", "inject=flock:delay_enter=1500000"]
        slow.start()
        letter = Letter("slow", [LOCAL[0]])
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            sent = pool.submit(self.send_all, slow.smtp, [letter])
            lab.until(slow.drafts, 10, "the second node's draft")
            first.restart()                         # sweeps while the other one is between open() and flock()
            sent.result(30)
        self.assertEqual(stored(slow)["slow", LOCAL[0]], 1, "what a living process writes was swept away")


# Disks

def mount(*words):
    """Mount something; unittest.SkipTest when this machine does not let us."""
    made = subprocess.run(["mount", *map(str, words)], stderr=subprocess.PIPE)
    if made.returncode:
        raise unittest.SkipTest("cannot mount here: " + made.stderr.decode().strip())


def remove(path):
    """Remove a folder at a stroke, whatever is being written into it."""
    aside = path.with_name("removed")
    path.rename(aside)
    shutil.rmtree(str(aside))


class Disks(Case):
    """Disks that are full, read-only, or gone."""

    def disk(self, options):
        """Return a small disk of its own, with an empty folder for data."""
        place = self.enter(lab.folder())
        mount("-t", "tmpfs", "-o", options, "minimail-ci", place)
        self.addCleanup(lambda: subprocess.run(["umount", "--lazy", str(place)], check=True))
        return place

    def fill(self, place):
        """Write until the disk is full; return the file to remove."""
        filler = place / "filler"
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            for size in (65536, 4096, 1):
                with contextlib.suppress(OSError):
                    while file.write(b"x" * size):
                        pass
        return filler

    def reply(self, client, recipients, size=0, name="D"):
        """Send a letter and return the final reply, as text."""
        letter = Letter(name, recipients, size)
        code, text = send(client, letter)
        return "%d %s" % (code, text.decode())

    def test_full(self):
        """452 4.3.1, POP3 still works, nothing half-written; after that all is as before."""
        sink = self.enter(Sink())
        for options in (["--quiet"], node_mode(sink)):      # capture mode with transcripts, node mode with a queue
            with self.subTest(options[0]):
                place = self.disk("size=2m")
                node = self.node(*options, data=place / "data")
                client = connect(node.smtp)
                self.assertIn("250 2.0.0", self.reply(client, [LOCAL[0]], name="before"))
                filler = self.fill(place)
                for recipients in ([LOCAL[0]], LOCAL, [FAR], [TEAM], ["new@example.com"] if len(options) == 1 else [LOCAL[2]]):
                    for size in (0, 100_000):
                        self.assertRegex(self.reply(client, recipients, size), "^452 4.3.1 ")
                self.assertEqual(node.drafts(), [])
                self.assertEqual(node.queue(), [])
                reader = node.fetch(LOCAL[0])
                self.assertEqual(len(reader.list()[1]), 1)
                self.assertIn(b"ledger: before", reader.retr(1)[1])
                filler.unlink()
                self.assertIn("250 2.0.0", self.reply(client, [LOCAL[0]], 100_000, name="after"))
                reader.dele(1)
                self.assertTrue(reader.quit().startswith(b"+OK"))
                self.assertEqual(set(stored(node, LOCAL[:1])), {("after", LOCAL[0])})
                client.quit()

    def test_message_larger_than_what_is_left(self):
        """The disk fills up in the middle of DATA: 452, and the space is free again."""
        place = self.disk("size=2m")
        node = self.node("--quiet", data=place / "data")
        client = connect(node.smtp)
        for _ in range(3):
            self.assertRegex(self.reply(client, [LOCAL[0]], 3_000_000), "^452 4.3.1 ")
            self.assertEqual(node.drafts(), [])
            self.assertIn("250 2.0.0", self.reply(client, [LOCAL[0]], 1000))
        client.quit()

    def test_no_inodes_left(self):
        """No file can be made: 452 4.3.1; the mailbox can still be read, or is refused for now."""
        place = self.disk("size=4m,nr_inodes=60")
        node = self.node("--quiet", "--transcripts", "off", data=place / "data")
        client = connect(node.smtp)
        self.assertIn("250 2.0.0", self.reply(client, [LOCAL[0]], name="before"))
        made = []
        with contextlib.suppress(OSError):
            for number in itertools.count():
                made.append(place / str(number))
                made[-1].touch()
        self.assertRegex(self.reply(client, [LOCAL[0]]), "^452 4.3.1 ")
        try:
            reader = node.fetch(LOCAL[0])
            self.assertIn(b"ledger: before", reader.retr(1)[1])
            reader.quit()
        except poplib.error_proto as error:
            self.assertRegex(str(error), r"-ERR \[SYS/TEMP\]")
        made[0].unlink()
        made[1].unlink()
        self.assertIn("250 2.0.0", self.reply(client, [LOCAL[0]], name="after"))
        reader = node.fetch(LOCAL[0])
        self.assertEqual(len(reader.list()[1]), 2)
        reader.quit()
        client.quit()

    def test_queue_on_a_full_disk(self):
        """A peer says 'later' to one of two, and it cannot be recorded: the other one does not get it again and again."""
        place = self.disk("size=2m")
        sink = self.enter(Sink())
        gate, full = threading.Event(), threading.Event()
        self.addCleanup(gate.set)

        def script(verb, line, helo):
            if verb == "MAIL" and not gate.is_set():
                full.set()
                gate.wait(20)
            if verb == "RCPT" and b"later" in line:
                return b"450 4.2.0 later"
        sink.script = script
        node = self.node(*node_mode(sink), data=place / "data")
        letter = Letter("Q1", [FAR, "later@elsewhere.test"])
        other = Letter("Q2", [FAR])
        self.send_all(node.smtp, [letter, other])
        self.assertTrue(full.wait(10))
        filler = self.fill(place)
        gate.set()
        lab.until(lambda: sink.count()["Q1", FAR] and sink.count()["Q2", FAR], 10, "both letters at the sink")
        threading.Event().wait(3)                   # time in which it must not come again: retries are a second apart
        self.assertLessEqual(sink.connections, 8, "hammers the peer")
        filler.unlink()
        count = sink.count()["Q1", FAR]
        self.assertLessEqual(count, 2, "sent %d times while the disk was full" % count)
        sink.script = lambda verb, line, helo: None
        lab.until(lambda: not node.queue(), 15, "an empty queue once there is room")
        self.assertEqual(sink.count()["Q1", "later@elsewhere.test"], 1)
        self.assertEqual(sink.count()["Q2", FAR], 1)

    def test_two_destinations_on_a_full_disk(self):
        """What cannot be recorded for one destination does not stop the others, or later letters."""
        place = self.disk("size=2m")
        sinks = [self.enter(Sink()), self.enter(Sink())]
        gate, full = threading.Event(), threading.Event()
        self.addCleanup(gate.set)

        def wait(verb, line, helo):
            if verb == "MAIL" and not gate.is_set():
                full.set()
                gate.wait(20)
        sinks[0].script = wait
        hold = threading.Event()
        self.addCleanup(hold.set)
        sinks[1].script = lambda verb, line, helo: hold.wait(20) and None if verb == "MAIL" else None
        node = self.node(*node_mode(*sinks), data=place / "data")
        self.send_all(node.smtp, [Letter("S%d" % n, [FAR, FARTHER]) for n in range(5)])
        self.assertTrue(full.wait(10))
        filler = self.fill(place)
        gate.set()
        threading.Event().wait(1.5)                 # let it try to record on the full disk
        filler.unlink()
        hold.set()
        lab.until(lambda: not node.queue(), 20, "an empty queue once there is room")
        for number in range(5):
            self.assertEqual(sinks[1].count()["S%d" % number, FARTHER], 1)
            self.assertIn(sinks[0].count()["S%d" % number, FAR], (1, 2))

    @contextlib.contextmanager
    def read_only(self, data):
        """The data directory is read-only meanwhile for whoever looks a name up in it, as after a remount."""
        mount("--bind", data, data)
        try:
            mount("-o", "remount,bind,ro", data)
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(data)], check=True)

    def test_read_only(self):
        """451 4.3.0 and -ERR; mail that waits in the queue goes out afterwards, once."""
        place = self.disk("size=8m")
        sink = self.enter(Sink())
        later = threading.Event()
        sink.script = lambda verb, line, helo: b"450 4.2.0 later" if verb == "RCPT" and not later.is_set() else None
        node = self.node(*node_mode(sink), data=place / "data")
        self.send_all(node.smtp, [Letter("before", [LOCAL[0]]), Letter("waits", [FAR])])
        client = connect(node.smtp)
        node.fetch(LOCAL[0]).quit()
        reader = node.fetch(LOCAL[0])
        reader.dele(1)
        with self.read_only(place / "data"):
            for recipients in ([LOCAL[0]], LOCAL, [FAR], [TEAM]):
                self.assertRegex(self.reply(client, recipients), "^451 4.3.0 ")
            with self.assertRaisesRegex(poplib.error_proto, "-ERR"), contextlib.closing(reader):
                reader.quit()
            lab.until(lambda: (node.data / "mail").exists(), 1)
            try:
                other = node.fetch(LOCAL[0])
                self.assertIn(b"ledger: before", other.retr(1)[1])
                other.quit()
            except poplib.error_proto as error:
                self.assertRegex(str(error), r"-ERR \[SYS/")
            later.set()
            threading.Event().wait(2.5)             # retries are due now, and cannot be recorded
        self.assertIn("250 2.0.0", self.reply(client, [LOCAL[0]], name="after"))
        lab.until(lambda: not node.queue(), 20, "an empty queue after the disk can be written again")
        self.assertLessEqual(sink.count()["waits", FAR], 2)
        self.assertGreaterEqual(sink.count()["waits", FAR], 1)
        self.assertEqual(set(stored(node, LOCAL[:1])), {("before", LOCAL[0]), ("after", LOCAL[0])})
        again = node.fetch(LOCAL[0])
        again.dele(1)
        self.assertTrue(again.quit().startswith(b"+OK"))
        client.quit()

    def test_sent_on_a_read_only_disk(self):
        """The peer took it, and that cannot be recorded: it does not get it for ever."""
        place = self.disk("size=8m")
        sink = self.enter(Sink())
        reached, gate = threading.Event(), threading.Event()
        self.addCleanup(gate.set)

        def script(verb, line, helo):
            if verb == "." and not gate.is_set():
                reached.set()
                gate.wait(20)
        sink.script = script
        node = self.node(*node_mode(sink), data=place / "data")
        self.send_all(node.smtp, [Letter("R1", [FAR])])
        self.assertTrue(reached.wait(10))
        with self.read_only(place / "data"):
            gate.set()
            lab.until(lambda: sink.count()["R1", FAR], 5, "the letter at the sink")
            threading.Event().wait(3)               # time in which it must not come again
            self.assertLessEqual(sink.count()["R1", FAR], 2)
        lab.until(lambda: not node.queue(), 20, "an empty queue after the disk can be written again")
        self.assertLessEqual(sink.count()["R1", FAR], 2)

    def test_data_directory_deleted(self):
        """It comes back with the next message: mailboxes, queue, and what processes say to each other."""
        sink = self.enter(Sink())
        node = self.node(*node_mode(sink))
        self.send_all(node.smtp, [Letter("before", [LOCAL[0]])])
        reader = node.fetch(LOCAL[0])
        reader.dele(1)
        client = connect(node.smtp)
        client.mail("load@sender.test"), client.rcpt(LOCAL[1])
        remove(node.data)
        with contextlib.suppress(poplib.error_proto), contextlib.closing(reader):
            reader.quit()                           # the message is gone, which is what was asked for
        code, text = client.data(Letter("during", [LOCAL[1]]).content())
        self.assertEqual(code, 250, text)
        empty = node.fetch(LOCAL[0])
        self.assertEqual(empty.stat(), (0, 0))
        empty.quit()
        self.send_all(node.smtp, [Letter("after", [TEAM]), Letter("after2", LOCAL)])
        lab.until(lambda: sink.count()["after", FAR], 10, "the letter at the sink")
        lab.until(lambda: not node.queue(), 10, "an empty queue")
        self.assertEqual(set(stored(node)), {("during", LOCAL[1]), *itertools.product(("after", "after2"), LOCAL)})
        for path in (node.data, node.data / "mail", node.data / "queue", node.mailbox(LOCAL[0]) / "new"):
            self.assertEqual(path.stat().st_mode & 0o777, 0o700, path)
        # Another process can still wake it.
        lab.run([sys.executable, lab.MINIMAIL, *node_mode(sink), "--data", node.data,
                 "sendmail", "-i", "-f", "load@sender.test", FAR], Letter("woken", [FAR]).content())
        lab.within(lambda: sink.count()["woken", FAR], 10, "a letter that another process queued")
        client.quit()
        self.check_clean(node)

    def test_queue_deleted(self):
        """Entries that are in memory and not on disk any more are forgotten, and nothing stumbles."""
        sink = self.enter(Sink())
        later = threading.Event()
        sink.script = lambda verb, line, helo: b"450 4.2.0 later" if verb == "RCPT" and not later.is_set() else None
        node = self.node(*node_mode(sink))
        self.send_all(node.smtp, [Letter("X%d" % n, [FAR]) for n in range(5)])
        lab.until(lambda: lab.files(node.data / "queue" / "due"), 10, "a letter that waits")
        remove(node.data / "queue")
        later.set()
        self.send_all(node.smtp, [Letter("Y%d" % n, [FAR]) for n in range(5)])
        lab.until(lambda: all(sink.count()["Y%d" % n, FAR] for n in range(5)), 10, "the new letters")
        self.check_clean(node)


# Clocks

FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


@unittest.skipUnless(FAKETIME, "libfaketime is not installed: run .ci/install.sh first")
class Clocks(Case):
    """The machine's clock jumps while mail waits in the queue."""

    def setUp(self):
        self.place = self.enter(lab.folder())
        self.stamp = self.place / "clock"
        self.jump(0)
        self.sink = self.enter(Sink())
        self.later = threading.Event()
        self.sink.script = lambda verb, line, helo: (
            b"450 4.2.0 later" if verb == "RCPT" and not self.later.is_set() else None)
        environment = dict(os.environ, LD_PRELOAD=str(FAKETIME), FAKETIME_TIMESTAMP_FILE=str(self.stamp),
                           FAKETIME_NO_CACHE="1", FAKETIME_DONT_FAKE_MONOTONIC="1", NO_FAKE_STAT="1")
        self.served = self.node(*node_mode(self.sink), environment=environment)

    def jump(self, seconds):
        """Let the clock be so far from the truth from now on."""
        draft = self.place / "draft"
        draft.write_text("%+d\n" % seconds)
        draft.rename(self.stamp)

    def waiting(self, count):
        """Return once so many letters wait for another attempt."""
        due = self.served.data / "queue" / "due"
        lab.until(lambda: len(lab.files(due)) == count, 10, "%d letters that wait" % count)

    def check_jump(self, seconds):
        """Letters wait, the clock jumps, letters come: all are sent, names stay unique."""
        node = self.served
        self.send_all(node.smtp, [Letter("A%d" % n, [FAR]) for n in range(5)])
        self.waiting(5)
        self.jump(seconds)
        self.send_all(node.smtp, [Letter("B%d" % n, [FAR, LOCAL[0]]) for n in range(5)])
        self.later.set()
        lab.until(lambda: len(self.sink.count()) == 10 and not node.queue(), 15, "all ten letters at the sink")
        self.assertEqual(set(self.sink.count().values()), {1})
        self.assertEqual(len(stored(node)), 5)
        client = node.fetch(LOCAL[0])
        self.assertEqual(len({line.split()[1] for line in client.uidl()[1]}), 5)
        client.quit()

    def test_forward(self):
        self.check_jump(86400)

    def test_backward(self):
        self.check_jump(-86400)

    def test_backward_while_stopped(self):
        """The node comes up with a clock that is behind the times noted in the queue."""
        node = self.served
        self.send_all(node.smtp, [Letter("A%d" % n, [FAR, LOCAL[0]]) for n in range(5)])
        self.waiting(5)
        node.stop()
        self.jump(-7 * 86400)
        self.later.set()
        node.start()
        lab.until(lambda: len(self.sink.count()) == 5 and not node.queue(), 15, "all letters at the sink")
        self.send_all(node.smtp, [Letter("B%d" % n, [LOCAL[0]]) for n in range(5)])
        self.assertEqual(len(stored(node)), 10)

    def test_to_and_fro(self):
        """Names and UIDs stay unique while the clock goes back again and again."""
        node = self.served
        self.later.set()
        with Load(node.smtp, clients=4, kinds=[[LOCAL[0]], [FAR]], sizes=(0,), limit=200) as load:
            for number in range(12):
                done = len(load.answered)
                self.jump(-3600 * (number % 3))
                lab.until(lambda: len(load.answered) >= min(200, done + 15), 20, "letters")  # noqa: B023
            load.join()
        lab.until(lambda: not node.queue(), 15, "an empty queue")
        self.assertEqual(len(load.answered), 200)
        self.check_ledger(node, load.letters, [self.sink])
        client = node.fetch(LOCAL[0])
        uids = [line.split()[1] for line in client.uidl()[1]]
        client.quit()
        self.assertEqual(len(uids), len(set(uids)))
        self.assertEqual(len(uids), 100)


# Others on the same mailboxes

class DovecotMeanwhile(Case):
    """Dovecot serves the Maildirs while minimail delivers into them."""

    def test_everything_seen_once(self):
        node = self.node("--quiet", "--transcripts", "off", user=check_clients.ORDINARY_USER)
        self.send_all(node.smtp, [Letter("first", LOCAL)])
        dovecot = self.enter(check_clients.Dovecot(node.data / "mail", check_clients.ORDINARY_USER))
        seen = {box: collections.Counter() for box in LOCAL[:2]}
        load = Load(node.smtp, clients=6, kinds=[[LOCAL[0]], [LOCAL[1]], LOCAL], sizes=(0, 5000), limit=900)
        wanted = {box: 1 + sum(box in load.kinds[n % 3] for n in range(900)) for box in seen}
        with load:
            readers = [threading.Thread(target=self.read_imap, args=(dovecot, LOCAL[0], seen, wanted), daemon=True),
                       threading.Thread(target=self.read_pop3, args=(dovecot, LOCAL[1], seen, wanted), daemon=True)]
            for reader in readers:
                reader.start()
            load.join()
            for reader in readers:
                reader.join(lab.SLOWER * 60)
        self.assertEqual(len(load.answered), 900)
        for box in seen:
            self.assertEqual(len(seen[box]), wanted[box], "%s: not all were seen" % box)
            self.assertEqual(set(seen[box].values()), {1}, "%s: some were seen more than once" % box)
        self.assertEqual(len(stored(node, LOCAL[:1])), wanted[LOCAL[0]])
        self.assertEqual(stored(node, LOCAL[1:2]), {})
        client = node.fetch(LOCAL[0], "any")
        self.assertEqual(client.stat()[0], wanted[LOCAL[0]])
        client.quit()
        self.assertEqual(dovecot.complaints(), [])

    def read_imap(self, dovecot, box, seen, wanted):
        """Fetch what is new, again and again, until all have been seen."""
        client = imaplib.IMAP4("127.0.0.1", dovecot.imap)
        client.login(box, "any")
        client.select("INBOX")
        highest, deadline = 0, time.monotonic() + lab.SLOWER * 60
        while len(seen[box]) < wanted[box] and time.monotonic() < deadline:
            client.noop()
            for uid in client.uid("search", "UID %d:*" % (highest + 1))[1][0].split():
                if int(uid) > highest:
                    content = client.uid("fetch", uid, "(BODY[])")[1][0][1]
                    seen[box][NAME.search(content).group(1)] += 1
                    highest = int(uid)
        client.logout()

    def read_pop3(self, dovecot, box, seen, wanted):
        """Fetch and delete, session after session, until all have been seen."""
        deadline = time.monotonic() + lab.SLOWER * 60
        while len(seen[box]) < wanted[box] and time.monotonic() < deadline:
            client = poplib.POP3("127.0.0.1", dovecot.pop3, timeout=150)
            client.user(box)
            client.pass_("any")
            names = []
            for number in range(1, client.stat()[0] + 1):
                names.append(NAME.search(b"\n".join(client.retr(number)[1])).group(1))
                client.dele(number)
            client.quit()
            seen[box].update(names)


if __name__ == "__main__":
    for program in ("strace", "dovecot", "ip", "mount"):
        if not shutil.which(program):
            sys.exit("%s is not installed: run .ci/install.sh first" % program)
    if os.getuid():
        sys.exit("run this as root: it mounts small disks")
    print("seed %d" % SEED)
    with lab_folder:
        unittest.main()
