"""minimail as a mail node among others: real name servers, a real Postfix, scripted peers, several minimails.

    python3 .ci/check_network.py [-v] [Class[.test]]

netlab.py says what is where. Contents are compared byte for byte, below the trace headers that each server puts on top.
"""
# time limit: 240
import contextlib
import email
import email.policy
import json
import poplib
import random
import re
import smtplib
import ssl
import subprocess
import sys
import threading
import time
import unittest

import lab
import netlab
from check_clients import SAMPLES, local_lines, message

ANN = "ann@a.test"
PASSWORD = "open sesame"
TEST_DOMAINS = ["postfix.test", "implicit.test", "second.test", "closed.test", "silent.test", "noaddress.test",
                "cname.test", "xn--bcher-kva.test", "big.test", "six.test", "both.test", "backup.test"]
POSTFIX_USERS = ["carol", "swaks", "first", "second", "all", "relayed", "aliased", "stopped", "running", "bcc", "tls",
                 "verified", "chain", "flushed", "sieved", "captured", "patient", "bounced", "j\u00f6rg"]


def setUpModule():
    """The network with its servers, and two minimail nodes, for all tests."""
    global network, postfix, a, b, certificate
    stack = contextlib.ExitStack()
    unittest.addModuleCleanup(stack.close)
    network = stack.enter_context(netlab.Network())
    netlab.NameServers(network)
    certificate = netlab.make_certificate(network.folder, "mx.postfix.test", "mx.a.test", "mx.b.test")
    users = [user + "@postfix.test" for user in POSTFIX_USERS] + ["carol@" + domain for domain in TEST_DOMAINS[1:]]
    postfix = netlab.Postfix(network, TEST_DOMAINS, users, certificate)
    tls = ("--tls-cert", certificate[0], "--tls-key", certificate[1])
    a = stack.enter_context(netlab.Node(
        network, "a", "--domain", "a.test", "--hostname", "mx.a.test", "--smtp", "0.0.0.0:25", "--smtp", "[::]:25",
        "--trust", "127.0.0.0/8", "--trust", netlab.HOSTS["sender"][0], "--retry", "1,2,4", "--timeout", "10", *tls,
        before=accounts(ANN, "amy@a.test", "alf@a.test", "abe@a.test", "ada@a.test", "art@a.test", aliases=[
            "team@a.test: ann@a.test, aliased@postfix.test, bernd@b.test",
            "everyone@a.test: team@a.test, art@a.test, ann@a.test"])))
    b = stack.enter_context(netlab.Node(
        network, "b", "--domain", "b.test", "--hostname", "mx.b.test", "--trust", "127.0.0.0/8", "--retry", "1,2,4",
        "--timeout", "10", *tls, before=accounts("bob@b.test", "ben@b.test", "bea@b.test", "bill@b.test", "bert@b.test",
                        "bernd@b.test")))


def accounts(*addresses, aliases=()):
    """Return a preparation of a node's data folder: these accounts, all with the same password, and aliases."""
    def prepare(data):
        lab.run([sys.executable, lab.MINIMAIL, "--data", data, "user", "add", "one@one.test", "--password-stdin"],
                PASSWORD.encode() + b"\n")
        hashed = (data / "users").read_text().strip().partition(":")[2]
        (data / "users").write_text("".join("%s:%s\n" % (address, hashed) for address in addresses))
        (data / "aliases").write_text("".join(line + "\n" for line in aliases))
    return prepare


# Looking at mail

TRACE = re.compile(rb"(?:(?:Return-Path|Delivered-To|X-Original-To|Received):[^\n]*\n(?:[ \t][^\n]*\n)*)*", re.IGNORECASE)


def below_trace(content):
    """Return a message without the trace headers on its top."""
    return content[TRACE.match(content).end():]


def received(content):
    """Return the Received headers of a message, each on one line, newest first."""
    head = TRACE.match(content).group().replace(b"\r\n", b"\n").decode()
    return re.findall(r"(?m)^Received: (.*)$", re.sub(r"\n[ \t]+", " ", head))


def message_id(content):
    return re.search(rb"(?im)^Message-ID: (<[^>]*>)", content).group(1)


class Report:
    """A bounce, parsed: RFC 3464."""

    def __init__(self, case, content):
        self.message = email.message_from_bytes(content, policy=email.policy.default)
        case.assertEqual(self.message["Return-Path"], "<>", "a bounce has the null reverse-path")
        case.assertEqual(self.message.get_content_type(), "multipart/report")
        case.assertEqual(self.message.get_param("report-type"), "delivery-status")
        self.text, status, self.original = self.message.get_payload()
        case.assertEqual(self.text.get_content_type(), "text/plain")
        case.assertEqual(status.get_content_type(), "message/delivery-status")
        self.about, *self.recipients = status.get_payload()

    def check(self, case, recipient, status, diagnostic, node, sender, sent):
        """Check all that RFC 3464 asks for about one failed recipient."""
        (fields,) = self.recipients
        case.assertEqual(self.about["Reporting-MTA"].replace(" ", ""), "dns;" + node)
        case.assertEqual(fields["Final-Recipient"].replace(" ", "").lower(), "rfc822;" + recipient)
        case.assertEqual(fields["Action"].lower(), "failed")
        case.assertRegex(fields["Status"], "^%s$" % status)
        case.assertRegex(" ".join(fields["Diagnostic-Code"].split()), "(?i)" + diagnostic)
        case.assertIn(recipient, self.text.get_content(), "the words for people name the recipient")
        case.assertIn(sender, self.message["To"])
        case.assertRegex(self.message["Auto-Submitted"], "^auto-replied")
        case.assertIn(self.original.get_content_type(), ("message/rfc822", "text/rfc822-headers"))
        original = self.original.as_bytes()
        case.assertIn(message_id(sent), original, "what came back is what was sent")


class Case(unittest.TestCase):

    maxDiff = None

    def send(self, recipients, content, sender=ANN, to=None, host="sender", options=()):
        """Send a message from a host to a node (`a`, if no address is given), as a mailer does."""
        recipients = [recipients] if isinstance(recipients, str) else recipients
        with network.inside(host), smtplib.SMTP(to or a.address, 25, "mailer.test", 150) as client:
            self.assertEqual(client.sendmail(sender, recipients, content, options), {})

    def at_postfix(self, address, sent, seconds=30):
        """Wait for a message in a mailbox of Postfix, and return it as it lies there."""
        identity = message_id(sent)
        return lab.until(lambda: [c for c in postfix.stored(address) if identity in c], seconds,
                         "%s for %s in Postfix" % (identity.decode(), address))[0]

    def at_node(self, node, address, sent, seconds=30):
        """Wait for a message in a node's mailbox, and return it as POP3 gives it."""
        identity = sent if sent.startswith(b"<") else message_id(sent)
        lab.until(lambda: [p for p in node.stored(address) if identity in p.read_bytes()], seconds,
                  "%s for %s on node %s" % (identity.decode(), address, node.host))
        return [content for content in self.fetch(node, address) if identity in content][0]

    def fetch(self, node, address):
        """Return the messages of a mailbox, as POP3 on the node's own machine gives them."""
        with network.inside(node.host):
            client = poplib.POP3("127.0.0.1", 110, timeout=150)
        try:
            client.user(address)
            client.pass_(PASSWORD)
            return [b"".join(line + b"\r\n" for line in client.retr(number + 1)[1]) for number in range(client.stat()[0])]
        finally:
            client.quit()

    def node(self, *options, host="q", **more):
        """Return a node for one test, which ends with it; with "off" for --smtp it only sends."""
        return self.enter(netlab.Node(network, host, *options, **more))

    def enter(self, context):
        """Enter a context manager until the end of the test."""
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        return stack.enter_context(context)

    def assert_same(self, got, wanted, what=""):
        """Compare bytes; a failure shows where they part."""
        if got != wanted:
            pairs = enumerate(zip(got, wanted))
            place = next((i for i, (one, two) in pairs if one != two), min(len(got), len(wanted)))
            around = slice(max(0, place - 60), place + 60)
            self.fail("%s: %d bytes, not %d; they part at %d:\n  got    %r\n  wanted %r"
                      % (what, len(got), len(wanted), place, got[around], wanted[around]))

    def queue(self, node):
        """Return what `queue list --json` prints."""
        return json.loads(node.run("queue", "list", "--json"))

    def assert_queue_empty(self, node, seconds=15):
        lab.until(lambda: self.queue(node) == [], seconds, "an empty queue on node " + node.host)

    def assert_nothing_left(self, node, address, seconds=15):
        """Wait until nothing in a node's queue is for an address (or domain) any more; others may use the queue, too."""
        lab.until(lambda: address not in json.dumps([entry["recipients"] for entry in self.queue(node)]), seconds,
                  "no more for %s in the queue on node %s" % (address, node.host))


# The journey

class Journey(Case):
    """mailer, node, DNS, another server, mailbox, POP3; and back."""

    def test_mailer_node_postfix(self):
        for content in SAMPLES.values():
            self.send("carol@postfix.test", content, options=["BODY=8BITMIME"])
        for name, content in SAMPLES.items():
            with self.subTest(name):
                got = self.at_postfix("carol@postfix.test", content)
                self.assert_same(below_trace(got), local_lines(content), name)
                self.assertRegex(received(got)[0], r"^from mx\.a\.test .*\[192\.0\.2\.11\].* by mx\.postfix\.test ")
                self.assertRegex(received(got)[1], r"^from mailer\.test .*\[192\.0\.2\.20\].* by mx\.a\.test ")
                self.assertEqual(len(received(got)), 2)
                self.assertIn(b"Return-Path: <ann@a.test>\n", got)

    def test_swaks_node_postfix(self):
        lab.run(network.command("sender", "swaks", "--server", a.address, "--from", ANN, "--to", "swaks@postfix.test",
                                "--helo", "mailer.test", "--header", "Message-ID: <swaks@a.test>", "--tls"))
        got = self.at_postfix("swaks@postfix.test", b"Message-ID: <swaks@a.test>")
        self.assertIn(b"This is a test mailing\n", got)
        self.assertRegex(received(got)[1], " with ESMTPS ")

    def test_postfix_node_pop3(self):
        for content in SAMPLES.values():
            self.send("bob@b.test", content, "carol@postfix.test", "127.0.0.1", "mx", ["BODY=8BITMIME"])
        for name, content in SAMPLES.items():
            with self.subTest(name):
                got = self.at_node(b, "bob@b.test", content)
                self.assertRegex(received(got)[0], r"^from mx\.postfix\.test .*\[192\.0\.2\.30\].* by mx\.b\.test ")
                if name != "long-line":  # Postfix breaks what is over the limit of RFC 5321 section 4.5.3.1.6
                    self.assert_same(below_trace(got), content, name)
        head = self.fetch(b, "bob@b.test")[0].split(b"\r\n")[:2]
        self.assertEqual(head, [b"Return-Path: <carol@postfix.test>", b"Delivered-To: bob@b.test"])

    def test_node_node_pop3(self):
        for content in SAMPLES.values():
            self.send("ben@b.test", content, options=["BODY=8BITMIME"])
        for name, content in SAMPLES.items():
            with self.subTest(name):
                got = self.at_node(b, "ben@b.test", content)
                self.assert_same(below_trace(got), content, name)
                self.assertEqual([line.split(" by ")[1].split()[0] for line in received(got)], ["mx.b.test", "mx.a.test"])

    def test_the_whole_way_round(self):
        """A letter to Postfix, an answer to our node, fetched over POP3 with STLS from another machine."""
        letter, answer = message("letter", b"How are you?\r\n"), message("answer", b"Fine.\r\n.\r\n")
        self.send("first@postfix.test", letter, "amy@a.test")
        self.assert_same(below_trace(self.at_postfix("first@postfix.test", letter)), local_lines(letter))
        self.send("amy@a.test", answer, "first@postfix.test", "127.0.0.1", "mx")
        lab.until(lambda: a.stored("amy@a.test"), 30, "the answer")
        with network.inside("sender"):
            client = poplib.POP3(a.address, 110, timeout=150)
            self.addCleanup(client.close)
            client.stls(ssl._create_unverified_context())
        client.user("amy@a.test")
        client.pass_(PASSWORD)
        (got,) = [b"\r\n".join(client.retr(n + 1)[1]) + b"\r\n" for n in range(client.stat()[0])]
        self.assert_same(below_trace(got), answer)

    def test_one_message_for_many(self):
        """Local, next door, and far; a destination that does not answer holds nobody back."""
        content = message("many", b"To all of you.\r\n")
        began = time.monotonic()
        self.send(["all@postfix.test", "abe@a.test", "bea@b.test", "x@hole.test"], content)
        for got in (self.at_node(a, "abe@a.test", content, 8), self.at_node(b, "bea@b.test", content, 8)):
            self.assert_same(below_trace(got), content)
        self.assert_same(below_trace(self.at_postfix("all@postfix.test", content, 8)), local_lines(content))
        self.assertLess(time.monotonic() - began, 8)

    def test_aliases(self):
        """An alias with targets here and elsewhere; each gets one copy, whatever the ways to it."""
        content = message("aliases", b"Dear team\r\n")
        self.send("everyone@a.test", content, "mallory@postfix.test", host="stranger")
        self.at_postfix("aliased@postfix.test", content)
        self.at_node(b, "bernd@b.test", content)
        for address in (ANN, "art@a.test"):
            self.at_node(a, address, content)
        self.assert_nothing_left(a, "aliased@postfix.test")
        copies = [c for c in self.fetch(a, ANN) if message_id(content) in c]
        self.assertEqual(len(copies), 1)
        self.assertEqual(len([c for c in postfix.stored("aliased@postfix.test") if message_id(content) in c]), 1)

    def test_smtputf8(self):
        """An address that needs SMTPUTF8, to a server that has it (Postfix) and one that has not (5.6.7)."""
        content = message("utf8", "Grüße\r\n".encode())
        self.send("j\u00f6rg@postfix.test", content, options=["SMTPUTF8", "BODY=8BITMIME"])
        self.assert_same(below_trace(self.at_postfix("j\u00f6rg@postfix.test", content)), local_lines(content))
        with netlab.Peer(network, "192.0.2.44", extensions=None) as peer:
            content = message("utf8-old", b"Gr\r\n")
            self.send("j\u00f6rg@old.test", content, "ada@a.test", options=["SMTPUTF8"])
            bounce = self.at_node(a, "ada@a.test", content)
            self.assertIn(b"5.6.7", bounce)
            self.assertEqual(peer.messages, [])


class Encryption(Case):
    """STARTTLS between servers: used when offered; with --relay-tls require verified, and never done without."""

    def test_node_to_postfix(self):
        content = message("tls-out", b"secret\r\n")
        self.send("tls@postfix.test", content)
        self.assertRegex(received(self.at_postfix("tls@postfix.test", content))[0], r"using TLSv1\.[23]")

    def test_postfix_to_node(self):
        content = message("tls-in", b"secret\r\n")
        self.send("bert@b.test", content, "carol@postfix.test", "127.0.0.1", "mx")
        self.assertRegex(received(self.at_node(b, "bert@b.test", content))[0], " with ESMTPS ")

    def test_node_to_node(self):
        content = message("tls-both", b"secret\r\n")
        self.send("bert@b.test", content)
        self.assertRegex(received(self.at_node(b, "bert@b.test", content))[0], " with ESMTPS ")

    def test_required_and_verified(self):
        node = self.node("--domain", "q.test", "--relay-tls", "require", SSL_CERT_FILE=str(certificate[0]))
        content = message("verified", b"secret\r\n")
        self.send("verified@postfix.test", content, to="127.0.0.1", host="q")
        self.assertRegex(received(self.at_postfix("verified@postfix.test", content))[0], r"using TLSv1\.[23]")
        self.assert_queue_empty(node)

    def test_required_but_not_to_be_had(self):
        """No certificate that we trust, or no STARTTLS at all: the message waits, and is not sent in clear."""
        node = self.node("--domain", "q.test", "--relay-tls", "require", "--retry", "3600")
        peer = self.enter(netlab.Peer(network, "192.0.2.46"))
        self.send(["verified@postfix.test", "x@plain.test"], message("unverified", b"secret\r\n"), to="127.0.0.1", host="q")

        def replies():
            return {r["address"]: r["last_reply"] for entry in self.queue(node) for r in entry["recipients"]}
        lab.until(lambda: len(replies()) == 2 and all(replies().values()), 20, "both attempts")
        self.assertRegex(replies()["verified@postfix.test"], "(?i)certificate")
        self.assertRegex(replies()["x@plain.test"], "(?i)tls")
        self.assertEqual([line for line in peer.lines if line.upper().startswith(("MAIL", "RCPT"))], [])
        self.assertEqual([c for c in postfix.stored("verified@postfix.test") if b"<unverified@" in c], [])


# Ways through the DNS

class Exchangers(Case):
    """Where mail for a domain goes: RFC 5321 section 5.1, with Postfix behind many names."""

    def check(self, domain, seconds=30):
        content = message("to-" + domain.replace("\u00fc", "ue"), b"Hello\r\n")
        self.send("carol@" + domain, content, "alf@a.test")
        ascii_domain = domain.encode("idna").decode()
        got = self.at_postfix("carol@" + ascii_domain, content, seconds)
        self.assert_same(below_trace(got), local_lines(content))

    def test_implicit(self):
        self.check("implicit.test")

    def test_first_unreachable(self):
        self.check("second.test")

    def test_first_closed(self):
        self.check("closed.test")

    def test_first_silent(self):
        """Found out by --timeout only."""
        self.check("silent.test", 40)

    def test_first_without_address(self):
        self.check("noaddress.test")

    def test_cname(self):
        """The exchangers are those of the canonical name; the address stays as it was written."""
        self.check("cname.test")

    def test_a_labels(self):
        self.check("xn--bcher-kva.test")

    def test_truncated_answer(self):
        self.check("big.test")

    def test_both_families(self):
        self.check("both.test")

    @unittest.skipUnless(netlab.IPV6, "no IPv6 here")
    def test_ipv6_only(self):
        self.check("six.test")

    @unittest.skipUnless(netlab.IPV6, "no IPv6 here")
    def test_ipv6_listener(self):
        content = message("ipv6", b"Hello\r\n")
        self.send("alf@a.test", content, to="2001:db8::11", host="mx")
        self.assertIn("[IPv6:2001:db8::30]", received(self.at_node(a, "alf@a.test", content))[0])

    def test_we_are_the_backup(self):
        """From our own preference on, the exchangers are none for us: the better one gets it."""
        self.check("backup.test")

    def test_address_literal(self):
        with netlab.Peer(network, "192.0.2.46") as peer:
            content = message("literal", b"Hello\r\n")
            self.send("x@[192.0.2.46]", content)
            lab.until(lambda: peer.messages, 20, "the message")
            self.assertEqual(peer.messages[0][:2], (ANN, ["x@[192.0.2.46]"]))
            self.assert_same(below_trace(peer.messages[0][2]), content)

    def test_mx_command(self):
        """`mx` says where mail would go, and why, in the first line; then a line for each destination."""
        both = ["192.0.2.30"] + ["2001:db8::30"] * netlab.IPV6
        postfix_line = ["10 mx.postfix.test 192.0.2.30"]
        expected = {
            "postfix.test": postfix_line, "carol@Postfix.TEST": postfix_line, "cname.test": postfix_line,
            "b\u00fccher.test": postfix_line, "backup.test": postfix_line,
            "implicit.test": ["0 implicit.test 192.0.2.30"],
            "second.test": ["10 gone.second.test 192.0.2.90", "20 mx.postfix.test 192.0.2.30"],
            "noaddress.test": ["20 mx.postfix.test 192.0.2.30"],
        }
        for target, lines in expected.items():
            with self.subTest(target):
                self.assertEqual(self.mx(target)[1:], lines)
        with self.subTest("both.test"):
            ((preference, host, *addresses),) = [line.split() for line in self.mx("both.test")[1:]]
            self.assertEqual((preference, host, sorted(addresses)), ("10", "mx.both.test", both))
        with self.subTest("six.test"):
            self.assertEqual(self.mx("six.test")[1:], ["10 mx.six.test 2001:db8::30"])
        with self.subTest("pair.test"):
            self.assertEqual(sorted(self.mx("pair.test")[1:]), ["10 mx1.pair.test 192.0.2.13", "10 mx2.pair.test 192.0.2.14"])
        with self.subTest("big.test"):
            self.assertEqual(self.mx("big.test")[1:2], postfix_line)
        for target in ("a.test", ANN):
            with self.subTest(target):
                self.assertRegex(self.mx(target)[0], "(?i)local")
        for target in ("null.test", "nosuch.test", "no.such.tld", "x@nosuch.test"):
            with self.subTest(target):
                lines = self.mx(target, status=1)
                self.assertEqual([line for line in lines if re.match(r"\d+ \S+ [\d.:a-f]+", line)], [])

    def test_mx_shuffles_equals(self):
        """Equal preferences share the load: both orders show up (in 20 tries by chance only with 1 - 2**-19)."""
        firsts = set()
        for _ in range(20):
            firsts.add(self.mx("pair.test")[1])
            if len(firsts) == 2:
                return
        self.fail("always the same first: %s" % firsts)

    def test_mx_dead_name_server(self):
        """The first server is not there; without --dns those of /etc/resolv.conf are asked."""
        line = "10 mx.postfix.test 192.0.2.30"
        self.assertEqual(self.mx("postfix.test", "--dns", netlab.CLOSED, "--dns", netlab.RESOLVER, dns=False)[1:], [line])
        self.assertEqual(self.mx("postfix.test", dns=False)[1:], [line])

    def mx(self, target, *options, status=0, dns=True):
        """Return the lines that `minimail.py mx` prints on node a's machine."""
        words = ["mx", target, "--domain", "a.test", "--hostname", "mx.a.test", *options]
        return a.run(*words, *(["--dns", netlab.RESOLVER] if dns else []), expect=status).decode().splitlines()


# Name servers that make it hard

ODD_SERVER, GOOD_SERVER, BEHIND = "192.0.2.56", "192.0.2.57", "192.0.2.47"


def good(query):
    """Every domain below odd.test has one exchanger, and that one is there."""
    if query.name == "mx.odd.test":
        return [query.reply([query.record("A", BEHIND)] if query.type == 1 else [], [query.record("SOA", name="odd.test")])]
    if query.type == 15:
        return [query.reply([query.record("MX", "mx.odd.test")])]
    return [query.reply((), [query.record("SOA", name="odd.test")])]


def without_edns(odd):
    """A server that does something odd when a question comes with EDNS."""
    return lambda query, tcp: odd(query) if query.edns else good(query)


def nothing(*authority, **more):
    """A server that answers with no records, whatever it is asked."""
    return lambda query, tcp: [query.reply((), [query.record(kind, "ns.odd.test") for kind in authority], **more)]


def implicit(query, tcp):
    """No MX, said with a SOA and an NS beside it, but an address."""
    return [query.reply([query.record("A", BEHIND)] if query.type == 1 else [],
                        [query.record("NS", "ns.odd.test"), query.record("SOA")])]


def in_front(query, tcp):
    """OPT where nobody looks for it."""
    (packet,) = good(query)
    return [packet[:7] + bytes([packet[7] + 1]) + packet[8:12] + query.question + query.record("OPT")
            + packet[12 + len(query.question):]]


def lies(query, tcp):
    """Answers to other questions, and of others, come first."""
    other = query.reply([query.record("MX", "mx.evil.test")], question=query.question.replace(b"odd", b"bad"))
    wrong = query.reply([query.record("MX", "mx.evil.test")])
    return [other, bytes([wrong[0] ^ 1]) + wrong[1:], b"\xff" * 40, *good(query)]


def cut_short(query, tcp):
    """A packet that ends within a record comes first, as from somebody who guesses."""
    return [query.reply([query.record("MX", "mx.evil.test")])[:-1], *good(query)]


# What a name server does; what comes of the mail with us, and with Postfix. In the first table all servers do it.
# Where the two differ: the resolver of Postfix (glibc's) looks at the flags and the number of records only, and Postfix puts
# off what it cannot read. We ask the next server for an answer that no authority backs, whatever OPT is in it; believe a SOA
# without flags; and let mail wait when names lead in a circle, which somebody will mend.
ODD_SERVERS = {
    "edns-dropped": (without_edns(lambda query: []), "sent", "sent"),
    "edns-formerr": (without_edns(lambda query: [query.reply(rcode=1)]), "sent", "sent"),
    "edns-formerr-bare": (without_edns(lambda query: [query.id + b"\x81\x81" + bytes(8)]), "sent", "sent"),
    "edns-servfail": (without_edns(lambda query: [query.reply(rcode=2)]), "sent", "sent"),
    "edns-notimp": (without_edns(lambda query: [query.reply(rcode=4)]), "sent", "sent"),
    "edns-refused": (without_edns(lambda query: [query.reply(rcode=5)]), "sent", "sent"),
    "edns-badvers": (without_edns(lambda query: [query.reply(additional=[query.record("OPT", "BADVERS")])]), "sent", "sent"),
    "implicit": (implicit, "sent", "sent"),
    "truncated": (lambda query, tcp: good(query) if tcp else [query.reply(flags=0x8380)], "sent", "sent"),
    "opt-in-front": (in_front, "sent", "deferred"),
    "lies": (lies, "sent", "sent"),
    "cut-short": (cut_short, "sent", "deferred"),
    "all-servfail": (nothing(rcode=2), "deferred", "deferred"),
    "all-empty": (nothing(flags=0x8100), "deferred", "deferred"),
    "all-referrals": (nothing("NS", flags=0x8100), "deferred", "deferred"),
    "cname-to-itself": (lambda query, tcp: [query.reply([query.record("CNAME", query.name)])], "deferred", "bounced"),
}
FIRST_ODD_SERVERS = {                               # the second one is well
    "silent": (lambda query, tcp: [], "sent", "sent"),
    "servfail": (nothing(rcode=2), "sent", "sent"),
    "refused": (nothing(rcode=5), "sent", "sent"),
    "referral": (nothing("NS", flags=0x8100), "sent", "sent"),
    "empty": (nothing(flags=0x8100), "sent", "sent"),
    "empty-with-opt": (lambda query, tcp: [query.reply((), (), [query.record("OPT")], flags=0x8100)], "sent", "bounced"),
    "empty-recursive": (nothing(), "bounced", "bounced"),
    "empty-authoritative": (nothing(flags=0x8500), "bounced", "bounced"),
    "nothing": (nothing("SOA"), "bounced", "bounced"),
    "nothing-soa-and-ns": (nothing("NS", "SOA"), "bounced", "bounced"),
    "nothing-soa-no-flags": (nothing("NS", "SOA", flags=0x8100), "bounced", "sent"),
    "nothing-soa-first": (nothing("SOA", "NS", flags=0x8500), "bounced", "bounced"),
    "nxdomain": (nothing("SOA", rcode=3), "bounced", "bounced"),
    "other-names": (lambda query, tcp: [query.reply([query.record("MX", "mx.evil.test", "evil.test")])], "bounced", "bounced"),
}


def odd(query, tcp, table):
    row = table.get(query.name.split(".")[0])
    return row[0](query, tcp) if row else good(query)


class OddNameServers(Case):
    """The same odd servers for us and for Postfix, so that the comparison stays true."""

    def resolv_conf(self, host, text):
        path = netlab.Path("/etc/netns", network.name(host), "resolv.conf")
        self.addCleanup(path.write_text, path.read_text())          # the same file: running servers see it
        path.write_text(text)

    def test_outcomes(self):
        rows = {**ODD_SERVERS, **FIRST_ODD_SERVERS}
        self.enter(netlab.OddNameServer(network, ODD_SERVER, lambda query, tcp: odd(query, tcp, rows)))
        self.enter(netlab.OddNameServer(network, GOOD_SERVER, lambda query, tcp: odd(query, tcp, ODD_SERVERS)))
        self.enter(netlab.Peer(network, BEHIND))
        for host in ("a", "mx"):
            self.resolv_conf(host, "nameserver %s\nnameserver %s\noptions timeout:1\n" % (ODD_SERVER, GOOD_SERVER))
        lab.until(lambda: not postfix.senders(), 30, "the end of what knows the old name servers")
        recipients = ["x@%s.odd.test" % label for label in rows]
        self.send(recipients, message("odd", b"Hello\r\n"), "carol@postfix.test", "127.0.0.1", "mx")
        for label, (_, ours, _) in rows.items():
            with self.subTest(label, who="minimail"):
                self.assertEqual(*self.ours(label, ours))
        for label, (_, _, theirs) in rows.items():
            with self.subTest(label, who="Postfix"):
                line = re.compile(r"to=<x@%s\.odd\.test>.* status=(\w+) (.*)" % label)
                said = lab.until(lambda line=line: line.search(postfix.log()), 30, label)
                self.assertEqual(said.group(1), theirs, said.group(2))

    @unittest.skipUnless(netlab.IPV6, "no IPv6 here")
    def test_link_local_server(self):
        """As routers announce themselves: an address that means something on one interface only."""
        netlab.ip(["-n", network.name("peer")], ["addr add fe80::53/64 dev eth0 nodad"])
        self.enter(netlab.OddNameServer(network, "fe80::53%eth0", lambda query, tcp: odd(query, tcp, ODD_SERVERS)))
        self.resolv_conf("a", "nameserver fe80::53%eth0\n")
        for label in "fine", "truncated":
            self.assertEqual(*self.ours(label, "sent"))

    def ours(self, label, wanted):
        """Return (what would become of the mail, what is wanted, why)."""
        words = [sys.executable, lab.MINIMAIL, "mx", label + ".odd.test", "--data", network.folder / "no-node-was-here"]
        ran = subprocess.run(network.command("a", *words), env=a.environment, capture_output=True, text=True, timeout=60)
        outcome = {0: "sent", 1: "bounced" if re.search(": 5[0-9][0-9] ", ran.stdout) else "deferred"}[ran.returncode]
        if outcome == "sent" and BEHIND not in ran.stdout:
            outcome = "sent elsewhere"
        return outcome, wanted, ran.stdout + ran.stderr


# Peers whose replies are odd

ODD_PEERS = {                                       # what it says instead of good replies; what comes of it with us, Postfix
    "fine": ({}, "sent", "sent"),
    "greets-554": ({"CONNECT": "554 no service here"}, "deferred", "deferred"),
    "greets-554-lines": ({"CONNECT": "554-peer.test\r\n554 no service here"}, "deferred", "deferred"),
    "greets-421": ({"CONNECT": "421 busy"}, "deferred", "deferred"),
    "greets-after-empty-line": ({"CONNECT": "\r\n220 peer.test"}, "sent", "sent"),
    "greets-after-noise": ({"CONNECT": "*** hello\r\n220 peer.test"}, "sent", "sent"),
    "greets-without-text": ({"CONNECT": "220"}, "sent", "sent"),
    "hello-refused": ({"EHLO": "550 no", "HELO": "550 no"}, "deferred", "bounced"),     # speaks for one host only, we say
    "hello-of-300-lines": ({"EHLO": "250-x\r\n" * 300 + "250 y"}, "sent", "sent"),
    "long-250": ({".": "250 " + "x" * 3000}, "sent", "sent"),
    "long-550": ({"RCPT": "550 5.1.1 " + "x" * 3000}, "bounced", "bounced"),
    "many-550": ({"RCPT": "550-no\r\n" * 149 + "550 5.1.1 no"}, "bounced", "bounced"),
    "last-code-550": ({"RCPT": "250-yes\r\n550 5.1.1 no"}, "bounced", "bounced"),
    "last-code-250": ({".": "550-no\r\n250 yes"}, "sent", "sent"),
    "bare-250": ({".": "250"}, "sent", "sent"),
    "bare-550": ({"RCPT": "550"}, "bounced", "bounced"),
    "mail-550": ({"MAIL": "550 5.7.1 not you"}, "bounced", "bounced"),
    "mail-421": ({"MAIL": "421 4.7.0 too much"}, "deferred", "deferred"),
    "rcpt-421": ({"RCPT": "421 4.7.0 too much"}, "deferred", "deferred"),
    "data-552": ({"DATA": "552 5.3.4 too large"}, "bounced", "bounced"),
    "data-452": ({"DATA": "452 4.3.1 full"}, "deferred", "deferred"),
    "end-drop": ({".": netlab.DROP}, "deferred", "deferred"),
    "end-554": ({".": "554 5.7.1 spam"}, "bounced", "bounced"),
}


class OddPeers(Case):
    """The same peers for us and for Postfix, so that the comparison stays true."""

    def test_outcomes(self):
        addresses = {label: "192.0.2.%d" % (100 + number) for number, label in enumerate(ODD_PEERS)}
        netlab.ip(["-n", network.name("peer")], ["addr add %s/24 dev eth0" % address for address in addresses.values()])
        for label, (replies, _, _) in ODD_PEERS.items():
            def answer(line, replies=replies):
                return replies.get(line if len(line) == 1 or line == "CONNECT" else line[:4].upper())
            self.enter(netlab.Peer(network, addresses[label], answer))
        recipients = ["%s@[%s]" % pair for pair in addresses.items()]
        self.send(recipients, message("odd", b"Hello\r\n"))
        self.send(recipients, message("odd", b"Hello\r\n"), "carol@postfix.test", "127.0.0.1", "mx")
        words = {"sent": "sent", "failed": "bounced", "deferred": "deferred"}
        for (label, (_, ours, theirs)), recipient in zip(ODD_PEERS.items(), recipients):
            with self.subTest(label, who="minimail"):
                line = re.compile(r" (sent|failed|deferred) .*recipient=%s (.*)" % re.escape(recipient))
                said = lab.until(lambda line=line: line.search(a.log()), 30, label)
                self.assertEqual(words[said.group(1)], ours, said.group(2))
            with self.subTest(label, who="Postfix"):
                line = re.compile(r"to=<%s>.* status=(\w+) (.*)" % re.escape(recipient))
                said = lab.until(lambda line=line: line.search(postfix.log()), 30, label)
                self.assertEqual(said.group(1), theirs, said.group(2))


# Peers that make it hard

class Peers(Case):
    """Scripted peers that put us off, hang up or know little; every message arrives once, or comes back."""

    def test_greylisting(self):
        with netlab.Peer(network, "192.0.2.40", netlab.greylist()) as peer:
            content = message("grey", SAMPLES["dots"])
            self.send("x@grey.test", content)
            lab.until(lambda: peer.messages, 30, "the second attempt")
            self.assertEqual(peer.messages[0][:2], (ANN, ["x@grey.test"]))
            self.assert_same(below_trace(peer.messages[0][2]), content)
            self.assertEqual(len([line for line in peer.lines if line.upper().startswith("RCPT")]), 2)
            self.assertRegex(peer.lines[0], "^EHLO mx.a.test$")

    def test_lost_after_the_dot(self):
        """No reply to the end of the message means: not sent. So it is sent again."""
        drops = ["."]
        with netlab.Peer(network, "192.0.2.42", lambda line: drops.pop() and netlab.DROP if line in drops else None) as peer:
            content = message("lost", b"Hello\r\n")
            self.send("x@lost.test", content)
            lab.until(lambda: peer.messages, 30, "the second attempt")
            self.assert_same(below_trace(peer.messages[0][2]), content)
            self.assertEqual(drops, [])

    def test_knows_no_ehlo(self):
        with netlab.Peer(network, "192.0.2.44", extensions=None) as peer:
            content = message("old", b"Hello\r\n")
            self.send("x@old.test", content)
            lab.until(lambda: peer.messages, 30, "the message")
            self.assert_same(below_trace(peer.messages[0][2]), content)
            (command,) = {line for line in peer.lines if line.upper().startswith("MAIL")}
            self.assertEqual(command, "MAIL FROM:<ann@a.test>", "no parameter that it did not offer")

    def test_eight_bit_to_seven(self):
        """8-bit content is not sent to a peer that did not offer 8BITMIME, nor rewritten: it comes back."""
        with netlab.Peer(network, "192.0.2.44", extensions=["PIPELINING"]) as peer:
            content = message("eight", "Grüße\r\n".encode())
            self.send("x@old.test", content, "ada@a.test", options=["BODY=8BITMIME"])
            Report(self, self.at_node(a, "ada@a.test", content)).check(
                self, "x@old.test", r"5\.6\.3", ".", "mx.a.test", "ada@a.test", content)
            self.assertEqual(peer.messages, [])

    def test_too_large(self):
        with netlab.Peer(network, "192.0.2.43", extensions=["SIZE 1000"]) as peer:
            content = message("large", b"x" * 70 + b"\r\n" + b"y" * 1000 + b"\r\n")
            self.send("x@small.test", content, "ada@a.test")
            Report(self, self.at_node(a, "ada@a.test", content)).check(
                self, "x@small.test", r"5\.3\.4", ".", "mx.a.test", "ada@a.test", content)
            self.assertEqual([line for line in peer.lines if line.upper() == "DATA"], [])

    def test_one_transaction(self):
        """All recipients of a destination go in one transaction, and each keeps its own reply."""
        def answer(line):
            return {"RCPT TO:<BAD": "550 5.2.1 closed", "RCPT TO:<LAT": "452 4.2.2 full"}.get(line[:12].upper())
        with netlab.Peer(network, "192.0.2.46", answer) as peer:
            content = message("three", b"Hello\r\n")
            self.send(["one@plain.test", "bad@plain.test", "two@plain.test", "later@plain.test"], content, "ada@a.test")
            Report(self, self.at_node(a, "ada@a.test", content)).check(
                self, "bad@plain.test", r"5\.2\.1", "^smtp; ?550 5.2.1 closed", "mx.a.test", "ada@a.test", content)
            self.assertEqual([given[1] for given in peer.messages], [["one@plain.test", "two@plain.test"]])

            def left():     # the report comes first, then the queue has less
                (found,) = [entry["recipients"] for entry in self.queue(a) if "@plain.test" in str(entry["recipients"])]
                return found if len(found) == 1 else None
            (waiting,) = lab.until(left, 10, "no more than one that waits")
            self.assertEqual(waiting["address"], "later@plain.test")
            self.assertIn("452 4.2.2 full", waiting["last_reply"])
            peer.answer = lambda line: None
            self.assert_nothing_left(a, "later@plain.test")
            self.assertEqual(peer.messages[-1][1], ["later@plain.test"])


# What cannot be delivered

class Bounces(Case):

    def check(self, recipient, status, diagnostic, name, reader=(lambda: a, "abe@a.test"), seconds=30):
        """Send from an address to one that fails: the report is in the sender's mailbox, and nothing else happens."""
        node, sender = reader[0](), reader[1]
        content = message(name, b"Hello\r\n", "X-Mark: " + name)
        self.send(recipient, content, sender)
        bounce = self.at_node(node, sender, content, seconds)
        Report(self, bounce).check(self, recipient, status, diagnostic, "mx.a.test", sender, content)
        return bounce

    def test_unknown_at_postfix(self):
        """The full round on one node: Postfix says no, the report is made and delivered here."""
        bounce = self.check("nosuch@postfix.test", r"5\.1\.1", "^smtp; ?550 5.1.1 .*User unknown", "unknown")
        (fields,) = Report(self, bounce).recipients
        self.assertEqual(fields["Remote-MTA"].replace(" ", ""), "dns;mx.postfix.test")

    def test_unknown_and_the_sender_elsewhere(self):
        """The full round over two nodes: the report finds its way by DNS to the sender's node."""
        bounce = self.check("nosuch@postfix.test", r"5\.1\.1", "^smtp; ?550 5.1.1 ", "unknown-far",
                            (lambda: b, "bill@b.test"))
        self.assertRegex(received(bounce)[0], r"^from mx\.a\.test .* by mx\.b\.test ")

    def test_null_mx(self):
        self.check("x@null.test", r"5\.1\.10", ".", "null")

    def test_no_such_domain(self):
        self.check("x@nosuch.test", r"5\.1\.2", ".", "nxdomain")

    def test_no_exchanger_has_an_address(self):
        self.check("x@nohost.test", r"5\.[14]\.\d+", ".", "nohost")

    def test_loop_by_name(self):
        self.check("x@loop.test", r"5\.4\.6", ".", "loop")

    def test_loop_by_address(self):
        self.check("x@loop-by-address.test", r"5\.4\.6", ".", "loop-by-address")

    def test_too_many_hops(self):
        hops = ["Received: from h%d.test by h%d.test; Tue, 01 Sep 2026 10:00:00 +0000" % (n, n + 1) for n in range(60)]
        with self.assertRaises(smtplib.SMTPDataError) as refused:
            self.send("carol@postfix.test", "\r\n".join(hops).encode() + b"\r\n" + message("hops", b"Hello\r\n"))
        self.assertEqual(refused.exception.smtp_code, 554)
        self.assertIn(b"5.4.6", refused.exception.smtp_error)

    def test_given_up(self):
        """After --give-up the last temporary reply goes back, as a failure."""
        node = self.node("--domain", "q.test", "--hostname", "mx.q.test", "--retry", "1", "--give-up", "3",
                         before=accounts("quin@q.test"))
        content = message("given-up", b"Hello\r\n")
        self.send("x@dead.test", content, "quin@q.test", "127.0.0.1", "q")
        Report(self, self.at_node(node, "quin@q.test", content)).check(
            self, "x@dead.test", r"[45]\.4\.\d+", ".", "mx.q.test", "quin@q.test", content)
        self.assert_queue_empty(node)

    def test_never_bounced(self):
        """What came with the null reverse-path comes back to nobody."""
        content = message("null-sender", b"Hello\r\n")
        self.send("nosuch@postfix.test", content, "")
        self.assert_nothing_left(a, "nosuch@postfix.test", 30)
        everywhere = [p.read_bytes() for p in lab.files(a.data / "mail") if p.parent.name == "new"]
        self.assertEqual([c for c in everywhere if message_id(content) in c], [])

    def test_temporary_trouble_is_no_bounce(self):
        """SERVFAIL says nothing about the domain: the message waits."""
        node = self.node("--domain", "q.test", "--retry", "3600", before=accounts("quin@q.test"))
        self.send("x@servfail.test", message("servfail", b"Hello\r\n"), "quin@q.test", "127.0.0.1", "q")
        lab.until(lambda: any(entry["recipients"][0]["last_reply"] for entry in self.queue(node)), 30, "an attempt")
        (entry,) = self.queue(node)
        self.assertEqual(entry["recipients"][0]["address"], "x@servfail.test")
        self.assertGreater(entry["next_attempt"], entry["queued_at"])
        self.assertEqual(node.stored("quin@q.test"), [])
        node.run("queue", "drop", entry["id"])


# The queue's commands

class Queue(Case):
    """`queue` and `sendmail`, beside a running node and without one."""

    def test_list_flush_drop(self):
        peer = self.enter(netlab.Peer(network, "192.0.2.41", lambda line: "450 4.2.0 later" if line[:4] == "RCPT" else None))
        node = self.node("--domain", "q.test", "--retry", "3600", before=accounts("quin@q.test"))
        contents = [message("queue-%d" % number, b"Hello\r\n") for number in range(3)]
        for number, content in enumerate(contents):
            self.send("x%d@later.test" % number, content, "quin@q.test", "127.0.0.1", "q")
        lab.until(lambda: all(entry["attempts"] for entry in self.queue(node)), 20, "an attempt for each")
        entries = {entry["recipients"][0]["address"]: entry for entry in self.queue(node)}
        self.assertEqual(sorted(entries), ["x0@later.test", "x1@later.test", "x2@later.test"])
        for entry in entries.values():
            self.assertLessEqual({"id", "sender", "size", "queued_at", "next_attempt", "attempts", "recipients"}, set(entry))
            self.assertEqual((entry["sender"], entry["attempts"]), ("quin@q.test", 1))
            self.assertGreaterEqual(entry["size"], len(contents[0]))
            self.assertRegex(entry["recipients"][0]["last_reply"], "450 4.2.0 later")
        listed = node.run("queue").decode()
        for address, entry in entries.items():
            self.assertIn(address, listed)
            self.assertIn(entry["id"], listed)
        self.assertEqual(node.run("queue", "list").decode().count("@later.test"), 3)

        node.run("queue", "drop", entries["x0@later.test"]["id"])
        self.assertNotIn("x0@later.test", str(self.queue(node)))
        for command in ("drop", "retry"):
            node.run("queue", command, entries["x0@later.test"]["id"], expect=1)
            node.run("queue", command, "no-such-id", expect=1)

        peer.answer = lambda line: None
        node.run("queue", "retry", entries["x1@later.test"]["id"])
        lab.until(lambda: peer.messages, 20, "the one retried")
        node.run("queue", "flush")
        lab.until(lambda: len(peer.messages) == 2, 20, "the others")
        self.assert_queue_empty(node)
        self.assertEqual([given[1] for given in peer.messages], [["x1@later.test"], ["x2@later.test"]])
        lab.until(lambda: not [path for path in lab.files(node.data / "queue") if path.suffix == ".msg"], what="no content")
        self.assertEqual(node.stored("quin@q.test"), [], "dropped means without a bounce")

    def test_claimed_once(self):
        """While a message is on its way, neither flush nor a second node on the same data sends it again."""
        go_on = threading.Event()

        def answer(line):
            return None if line != "." or go_on.wait(30) else netlab.DROP
        with netlab.Peer(network, "192.0.2.45", answer) as peer:
            self.addCleanup(go_on.set)
            node = self.node("--domain", "q.test", "--retry", "1")
            content = message("slow", b"Hello\r\n")
            self.send("x@slow.test", content, to="127.0.0.1", host="q")
            lab.until(lambda: "DATA" in peer.lines, 20, "the message on its way")
            other = self.node("--domain", "q.test", "--retry", "1", "--smtp", "127.0.0.1:0", "--pop3", "off",
                              "--data", node.data)
            for _ in range(3):
                node.run("queue", "flush")
            go_on.set()
            self.assert_queue_empty(node)
            self.assertEqual(len(peer.messages), 1)
            self.assertEqual(peer.lines.count("DATA"), 1)
            self.assertIsNone(other.process.poll())

    def test_taken_over(self):
        """A node is killed while it sends; another on the same data sends the message."""
        stuck = threading.Event()
        self.addCleanup(stuck.set)
        first = [True]

        def answer(line):
            if line == "." and first:
                first.clear()
                stuck.wait(60)
                return netlab.DROP
            return None
        with netlab.Peer(network, "192.0.2.45", answer) as peer:
            node = self.node("--domain", "q.test", "--retry", "1")
            content = message("taken-over", b"Hello\r\n")
            self.send("x@slow.test", content, to="127.0.0.1", host="q")
            lab.until(lambda: not first, 20, "the message sent, and no reply to it")
            other = self.node("--domain", "q.test", "--retry", "1", "--smtp", "127.0.0.1:0", "--pop3", "off",
                              "--data", node.data)
            node.cut()
            lab.until(lambda: peer.messages, 10, "the other node's attempt")
            self.assert_same(below_trace(peer.messages[0][2]), content)
            self.assert_queue_empty(other)
            node.start()

    def test_sendmail_beside_the_node(self):
        """Queued durably, and sent without delay: long before the next look at the queue."""
        content = message("running", b"Hello\r\n.\r\nthe dot above is text\r\n")
        a.run("sendmail", "-i", "-f", ANN, "running@postfix.test", stdin=local_lines(content))
        queued = time.monotonic()
        got = self.at_postfix("running@postfix.test", content)
        self.assertLess(time.monotonic() - queued, 10)
        self.assert_same(below_trace(got), local_lines(content))
        self.assertIn(b"Return-Path: <ann@a.test>\n", got)

    def test_sendmail_without_the_node(self):
        node = self.node("--domain", "q.test", before=accounts("quin@q.test"))
        node.stop()
        content = message("stopped", b"Hello\r\n")
        node.run("sendmail", "-f", "quin@q.test", "stopped@postfix.test", "quin@q.test", stdin=local_lines(content))
        self.assertIn("stopped@postfix.test", str(self.queue(node)))
        node.start()
        self.assert_same(below_trace(self.at_postfix("stopped@postfix.test", content, 15)), local_lines(content))
        self.assert_same(below_trace(self.at_node(node, "quin@q.test", content, 15)), content)
        self.assert_queue_empty(node)

    def test_sendmail_takes_recipients_from_the_message(self):
        text = message("bcc", b"Hello\r\n", "Bcc: bcc@postfix.test,\r\n running@postfix.test")
        text = text.replace(b"bob@example.com", b"aliased@postfix.test").replace(b"ann@example.org", b"ann@a.test")
        a.run("sendmail", "-t", "-oi", stdin=local_lines(text))
        for user in ("bcc", "running", "aliased"):
            got = self.at_postfix(user + "@postfix.test", text, 15)
            self.assertNotRegex(got, rb"(?im)^bcc:")
            self.assertNotIn(b"running@postfix.test", below_trace(got))
            self.assertIn(b"\nTo: Bob <aliased@postfix.test>\n", got)

    def test_done_is_done(self):
        """Killed while one recipient is still being tried: those who have the message do not get it again."""
        node = self.node("--domain", "q.test", "--retry", "1", "--timeout", "30")
        content = message("done", b"Hello\r\n")
        self.send(["flushed@postfix.test", "x@hole.test"], content, to="127.0.0.1", host="q")
        self.at_postfix("flushed@postfix.test", content)

        def recorded():
            (entry,) = self.queue(node)
            return all(r["last_reply"] for r in entry["recipients"] if r["address"] == "flushed@postfix.test")
        lab.until(recorded, 10, "the record of what is done")
        self.assertIn("x@hole.test", str(self.queue(node)))
        self.assertNotIn("recipient=x@hole.test", node.log(), "the other attempt still goes on")
        node.cut()
        node.options = [*node.options, "--timeout", "2"]
        node.start()
        lab.until(lambda: "recipient=x@hole.test" in node.log(), 40, "an attempt after the kill")
        self.assertEqual(len([c for c in postfix.stored("flushed@postfix.test") if message_id(content) in c]), 1)

    def test_survives_a_kill(self):
        """Accepted for elsewhere, then killed: the next start sends it."""
        node = self.node("--domain", "q.test", "--retry", "1")
        contents = [message("killed-%d" % number, b"Hello\r\n") for number in range(10)]
        for content in contents:
            self.send("x@later.test", content, "quin@q.test", "127.0.0.1", "q")
        node.cut()
        with netlab.Peer(network, "192.0.2.41") as peer:
            node.start()
            lab.until(lambda: len(peer.messages) >= 10, 30, "all ten")
            self.assert_queue_empty(node)
            self.assertEqual(sorted(below_trace(given[2]) for given in peer.messages), sorted(contents))
            connections = len([line for line in peer.lines if line.startswith("EHLO")])
            self.assertLessEqual(connections, 10, "few connections, reused")


# Who may relay

class Strangers(Case):
    """A client that is not trusted gets mail into the node's mailboxes and nowhere else, whatever it tries."""

    def open(self):
        with network.inside("stranger"):
            client = smtplib.SMTP(b.address, 25, "stranger.test", 150)
        self.addCleanup(client.close)
        return client

    def test_no_relay(self):
        """Exact replies where the contract gives them; everywhere a permanent no."""
        tricks = [
            ("carol@postfix.test", "550", "5.7.1"),
            ("CAROL@POSTFIX.TEST", "550", "5.7.1"),
            ("carol@postfix.test.", "550", "5.7.1"),
            ("@b.test:carol@postfix.test", "550", "5.7.1"),
            ("@b.test,@mx.b.test:carol@postfix.test", "550", "5.7.1"),
            ("carol@[192.0.2.30]", "550", "5.7.1"),
            ("carol@[IPv6:2001:db8::30]", "550", "5.7.1"),
            ("bob@sub.b.test", "550", "5.7.1"),
            ("bob@xb.test", "550", "5.7.1"),
            ("bob@test", "550", "5.7.1"),
            ("bob@mx.b.test", "550", "5.7.1"),
            ("postmaster@postfix.test", "550", "5.7.1"),
            ('"carol"@postfix.test', "550", "5.7.1"),
            ("carol%postfix.test@b.test", "550", "5.1.1"),
            ('"carol@postfix.test"@b.test', "550", "5.1.1"),
            ('"carol%postfix.test"@b.test', "550", "5.1.1"),
            ("postfix.test!carol@b.test", "550", "5.1.1"),
            ("nosuch@b.test", "550", "5.1.1"),
            ("carol@postfix.test@b.test", "5", ""),
            ("bob@b.test@postfix.test", "5", ""),
            ("postfix.test!carol", "5", ""),
            ("carol%postfix.test", "5", ""),
            ("bob", "5", ""),
            ("bob@b.test>,<carol@postfix.test", "5", ""),
            ("bob@b.test carol@postfix.test", "5", ""),
            ("bob@b.test\0@postfix.test", "5", ""),
            ("bob@b.test\t@postfix.test", "5", ""),
            ("carol@[127.0.0.1]", "5", ""),
            ("carol@[::1]", "5", ""),
            ("carol@192.0.2.30", "5", ""),
            ("@postfix.test", "5", ""),
            ("carol@", "5", ""),
            ("", "5", ""),
        ]
        senders = ["mallory@evil.test", "", "bob@b.test", "postmaster@b.test", "x@[127.0.0.1]"]
        number = 0
        for sender in senders:
            for trick, code, enhanced in tricks:
                number += 1
                if number % 5 == 1:  # before the node has enough of us
                    client = self.open()
                    client.ehlo("localhost")
                with self.subTest(trick, sender=sender):
                    self.assertEqual(client.docmd("MAIL FROM:<%s>" % sender)[0], 250)
                    reply = client.docmd("RCPT TO:<%s>" % trick)
                    self.assertRegex(str(reply[0]), "^" + code)
                    self.assertTrue(reply[1].decode().startswith(enhanced or "5."), reply)
                    client.rset()
        self.assertEqual(self.queue(b), [])

    def test_refused_among_others(self):
        """One transaction to a local address and one elsewhere: only the first counts."""
        content = message("half", b"Hello\r\n")
        client = self.open()
        refused = client.sendmail("mallory@evil.test", ["bea@b.test", "carol@postfix.test"], content)
        self.assertEqual(list(refused), ["carol@postfix.test"])
        self.assertEqual(refused["carol@postfix.test"][0], 550)
        self.assertTrue(refused["carol@postfix.test"][1].startswith(b"5.7.1"))
        self.assert_same(below_trace(self.at_node(b, "bea@b.test", content)), content)
        self.assertEqual([c for c in postfix.stored("carol@postfix.test") if message_id(content) in c], [])

    def test_words_of_trust(self):
        """Neither a HELO name nor a proxy's command makes a stranger trusted."""
        for words in ("EHLO localhost", "HELO mx.b.test", "EHLO [127.0.0.1]", "HELO 127.0.0.1"):
            client = self.open()
            client.docmd(words)
            client.docmd("XCLIENT ADDR=127.0.0.1 NAME=localhost")
            client.docmd("XFORWARD ADDR=127.0.0.1 NAME=localhost")
            client.docmd("MAIL FROM:<bob@b.test>")
            code, text = client.docmd("RCPT TO:<carol@postfix.test>")
            self.assertEqual((code, text[:5]), (550, b"5.7.1"), words)
        with network.inside("stranger"), lab.socket.create_connection((b.address, 25), 10) as raw:
            raw.sendall(b"PROXY TCP4 127.0.0.1 127.0.0.1 1 25\r\n")
            stream = raw.makefile("rb")
            for command in (b"EHLO x", b"MAIL FROM:<bob@b.test>", b"RCPT TO:<carol@postfix.test>", b"QUIT"):
                raw.sendall(command + b"\r\n")
            self.assertIn(b"\r\n550 5.7.1", stream.read())

    def test_local_addresses_in_any_spelling(self):
        client = self.open()
        client.ehlo()
        for address in ("bob@b.test", "BOB@B.TEST", '"bob"@b.test', "bob@b.test.", "postmaster", "Postmaster@b.test",
                        "@elsewhere.test:bob@b.test"):
            with self.subTest(address):
                client.docmd("MAIL FROM:<mallory@evil.test>")
                self.assertEqual(client.docmd("RCPT TO:<%s>" % address)[0], 250)
                client.rset()

    def test_passwords_not_in_clear(self):
        client = self.open()
        client.ehlo()
        self.assertFalse(client.has_extn("auth"))
        self.assertTrue(client.has_extn("starttls"))
        with network.inside("stranger"):
            reader = poplib.POP3(b.address, 110, timeout=150)
        self.addCleanup(reader.close)
        with self.assertRaises(poplib.error_proto):
            reader.user("bob@b.test")
            reader.pass_(PASSWORD)

    def test_relay_to_some_only(self):
        """--relay-to: even who is trusted gets no further than the domains named."""
        self.node("--domain", "q.test", "--relay-to", "postfix.test", "--relay-to", ".a.test")
        with network.inside("q"):
            client = smtplib.SMTP("127.0.0.1", 25, "q.test", 30)
        self.addCleanup(client.close)
        client.ehlo()
        expected = {"x@postfix.test": 250, "x@sub.a.test": 250, "x@a.test": 250, "x@b.test": 550, "x@sub.postfix.test": 550}
        for address, wanted in expected.items():
            client.docmd("MAIL FROM:<quin@q.test>")
            code, text = client.docmd("RCPT TO:<%s>" % address)
            self.assertEqual(code, wanted, (address, text))
            client.rset()


class Routes(Case):
    """--route and --smarthost instead of the DNS."""

    def test_smarthost(self):
        """Everything for elsewhere goes to one host, whose transaction has all recipients; no DNS is asked."""
        peer = self.enter(netlab.Peer(network, "192.0.2.46"))
        self.node("--domain", "q.test", "--smarthost", "smtp://192.0.2.46", "--dns", netlab.CLOSED)
        content = message("smarthost", b"Hello\r\n")
        self.send(["x@postfix.test", "y@nosuch.test"], content, to="127.0.0.1", host="q")
        lab.until(lambda: sum(len(given[1]) for given in peer.messages) == 2, 20, "both recipients")
        self.assertEqual([given[1] for given in peer.messages], [["x@postfix.test", "y@nosuch.test"]])

    def test_route(self):
        """A route is for exactly its domain, or with a dot for what lies under it; the rest asks the DNS."""
        peer = self.enter(netlab.Peer(network, "192.0.2.46"))
        self.node("--domain", "q.test", "--route", "nosuch.test=smtp://192.0.2.46:25", "--route",
                  ".under.test=smtp://mx.plain.test")
        content = message("route", b"Hello\r\n")
        self.send(["x@nosuch.test", "y@deep.under.test", "chain@postfix.test"], content, to="127.0.0.1", host="q")
        self.at_postfix("chain@postfix.test", content)
        lab.until(lambda: sum(len(given[1]) for given in peer.messages) == 2, 20, "both recipients")
        self.assertEqual(sorted(r for given in peer.messages for r in given[1]), ["x@nosuch.test", "y@deep.under.test"])

    def test_mx_port(self):
        """Node q sends by MX to another port, as a test bed does."""
        receiver = self.node("--domain", "pair.test", "--catch-all", "box@pair.test", "--smtp", "0.0.0.0:2525", host="x")
        other = self.node("--domain", "pair.test", "--catch-all", "box@pair.test", "--smtp", "0.0.0.0:2525", host="y")
        self.node("--domain", "q.test", "--mx-port", "2525")
        content = message("mx-port", b"Hello\r\n")
        self.send("x@pair.test", content, to="127.0.0.1", host="q")
        lab.until(lambda: receiver.stored("box@pair.test") + other.stored("box@pair.test"), 20, "the message")


# Capture mode

class Capture(Case):

    def test_nothing_ever_leaves(self):
        """Not one connection, though a name server and an exchanger are there for the asking."""
        trace = network.folder / "capture.strace"
        node = self.node("--smtp", "127.0.0.1:25", "--pop3", "127.0.0.1:110", wrapper=[
            "strace", "-D", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-e", "signal=none", "-o", trace])
        content = message("captured", b"Hello\r\n")
        self.send(["captured@postfix.test", "x@nosuch.test", "y@[192.0.2.46]"], content, to="127.0.0.1", host="q")
        node.run("sendmail", "-f", ANN, "captured@postfix.test", stdin=local_lines(content))
        for address in ("captured@postfix.test", "x@nosuch.test"):
            self.assert_same(below_trace(self.at_node(node, address, content)), content)
        lab.until(lambda: len(node.stored("captured@postfix.test")) == 2, 20, "what sendmail was given")
        node.stop()
        calls = trace.read_text()
        self.assertEqual(re.findall(r".*connect\(.*AF_INET.*", calls), [])
        self.assertEqual(re.findall(r".*(?:sendto|sendmsg|sendmmsg)\(.*sin6?_port=htons\(53\).*", calls), [])
        self.assertEqual(postfix.stored("captured@postfix.test"), [])
        node.start()


# Two exchangers, one of them cut off

class TwoExchangers(Case):
    """Two nodes behind MX records of equal preference, and one is cut off under load: nothing is lost.

    A duplicate is right only for a message that was in flight at the cut: taken, but the 250 did not get through.
    """

    COUNT = 300
    IN_FLIGHT = 20  # sessions that either sender holds with one destination

    def pair(self):
        options = ("--domain", "pair.test", "--catch-all", "box@pair.test", "--timeout", "10")
        return [self.node("--hostname", "mx1.pair.test", *options, host="x"),
                self.node("--hostname", "mx2.pair.test", *options, host="y")]

    def check(self, sender_host, cut, restore):
        """Send COUNT messages, cut one exchanger off after a third, and look for them all on both."""
        nodes = self.pair()
        random_source = random.Random(sender_host + cut.__name__)
        contents = {}
        for number in range(self.COUNT):
            body = b"%0100x\r\n" % random_source.getrandbits(400) * random_source.randrange(1, 100)
            content = message("load-%d" % number, body)
            contents[message_id(content)] = content
        with network.inside(sender_host), smtplib.SMTP("127.0.0.1", 25, "load.test", 150) as client:
            for number, content in enumerate(contents.values()):
                if number == self.COUNT // 3:
                    lab.until(lambda: nodes[0].stored("box@pair.test"), 20, "the first message at the first exchanger")
                    cut(nodes[0])
                client.sendmail("load@a.test", ["any@pair.test"], content)
        survivor = nodes[1]
        lab.until(lambda: len({*self.identities(nodes)}) == self.COUNT, 60, "all messages at one of the exchangers")
        self.assertGreater(len(survivor.stored("box@pair.test")), self.COUNT // 3)
        restore(nodes[0])
        stored = [path.read_bytes() for node in nodes for path in node.stored("box@pair.test")]
        for content in stored:
            self.assert_same(below_trace(content), contents[message_id(content)])
        self.assertLessEqual(len(stored) - self.COUNT, self.IN_FLIGHT, "more duplicates than messages in flight")

        def left():     # what was on its way to a host when its cable was pulled is there until the host notices
            return [path for node in nodes for path in lab.files(node.data) if path.parent.name == "tmp"]
        lab.until(lambda: not left(), 15, "nothing half-written")

    def identities(self, nodes):
        """Return the Message-IDs of all that the nodes hold, each file read once."""
        for node in nodes:
            for path in node.stored("box@pair.test"):
                if path not in self.read:
                    self.read[path] = message_id(path.read_bytes())
        return list(self.read.values())

    def setUp(self):
        self.read = {}
        self.addCleanup(network.plug, "x", True)

    def pull_the_cable(self, node):
        network.plug(node.host, False)

    def plug_it_in(self, node):
        network.plug(node.host, True)

    def kill(self, node):
        node.cut()

    def start_again(self, node):
        node.start()

    def test_postfix_sends_and_the_cable_is_pulled(self):
        self.check("mx", self.pull_the_cable, self.plug_it_in)

    def test_postfix_sends_and_a_node_is_killed(self):
        self.check("mx", self.kill, self.start_again)

    def test_minimail_sends_and_the_cable_is_pulled(self):
        self.check("a", self.pull_the_cable, self.plug_it_in)
        self.assert_nothing_left(a, "@pair.test")

    def test_minimail_sends_and_a_node_is_killed(self):
        self.check("a", self.kill, self.start_again)
        self.assert_nothing_left(a, "@pair.test")


if __name__ == "__main__":
    unittest.main()
