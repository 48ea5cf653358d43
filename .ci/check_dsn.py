"""Delivery status notifications (RFC 3461 to 3464) between minimail and a real Postfix, in both directions.

    python3 .ci/check_dsn.py [-v] [Class[.test]]

Every NOTIFY with every RET goes from each of the two to all that can become of a message: kept here or by the other one,
refused at once or later, put off, expanded, passed to servers with and without DSN. Who must tell the sender what is computed
from the RFC alone; and as both are asked the same, what one tells must be what the other tells, but for differences that are
named.
"""
# time limit: 240
import collections
import contextlib
import itertools
import smtplib
import time
import typing
import unittest

import lab
import netlab
from check_network import Report, accounts

WARN = 2                            # seconds after which both tell of a delay
NOTIFY = ["", "NEVER"] + [",".join(words) for count in (1, 2, 3)
                          for words in itertools.combinations(("SUCCESS", "FAILURE", "DELAY"), count)]
RET = ["", "FULL", "HDRS"]          # without one, the message has no ENVID and no ORCPT either
# Scripted peers: one refuses, two take all and only the second of them knows DSN, one puts off.
PEERS = dict(zip(("fail", "old", "new", "later"), netlab.HOSTS["peer"]))
MEMBERS = "member@%(here)s, member@%(there)s, lost@%(there)s"

# What is told of mail from one of the two and not of the same mail from the other: (who tells, Action, about whom).
DIFFERENT = {
    "from us": {("there", "delayed", "late@later.there"),       # Postfix tells strangers who did not ask of delays
                ("there", "delivered", "single@there"),         # an alias for one: we leave it to who delivers,
                ("there", "expanded", "back@there")},           # Postfix tells of an expansion
    "from Postfix": {("here", "expanded", "one@here")}}


class Side(typing.NamedTuple):
    """One of the two servers: what is sent from it, as its own users do."""
    title: str
    host: str
    domain: str
    sender: str

    @property
    def name(self):
        return "mx." + self.domain


OURS, THEIRS = Side("ours", "a", "a.test", "ann@a.test"), Side("theirs", "mx", "postfix.test", "carol@postfix.test")
SIDES = [OURS, THEIRS]


def other(side):
    return SIDES[side is OURS]


class Letter(typing.NamedTuple):
    """A message to one recipient for each outcome; it asks for the same of all."""
    side: Side
    notify: str
    ret: str
    sender: str

    @property
    def name(self):
        """What is in all that is told about it."""
        return "%s.%s.%s.%s" % (self.side.title, self.notify.replace(",", "-") or "none", self.ret or "bare",
                                "user" if self.sender else "null")

    @property
    def content(self):
        return ("From: <%s>\r\nTo: all@all.test\r\nDate: Tue, 01 Sep 2026 10:00:00 +0000\r\n"
                "Message-ID: <%s@letter.test>\r\n\r\nthe body of it\r\n" % (self.side.sender, self.name)).encode()

    def wants(self, what, otherwise):
        return what in self.notify.split(",") if self.notify else otherwise

    def outcomes(self):
        """Return {recipient: [(who tells, Action, Final-Recipient)]}: what its sender must be told, and nothing else."""
        here, there, at, name = self.side, other(self.side), self.side.domain, self.name.lower()
        far = there.domain
        success, failure = self.wants("SUCCESS", False), self.wants("FAILURE", True)
        # Who says nothing is told of delays by its own server, and by a Postfix that it never heard of, but not by us.
        delay_here, delay_there = self.wants("DELAY", True), self.wants("DELAY", there is THEIRS)
        # An alias for one address is for Postfix an expansion like any other; we leave the report to who delivers it.
        one = (there, "delivered", "single@" + far) if here is OURS else (here, "expanded")
        late = "%s@later.%s"
        table = {
            "own@" + at: [success and (here, "delivered")],
            "own@" + far: [success and (there, "delivered")],
            "own@plain." + far: [success and (here, "relayed")],            # the same server, where it hides that it knows DSN
            "nobody@" + far: [failure and (here, "failed")],
            "x@fail." + far: [failure and (there, "failed")],
            "x@old." + far: [success and (there, "relayed")],
            name + "@new." + far: [],                                       # who is asked for a report is the last server
            late % (name, at): [delay_here and (here, "delayed"), success and (here, "relayed")],
            late % (name, far): [delay_there and (there, "delayed"), success and (there, "relayed")],
            "team@" + at: [success and (here, "expanded"), failure and (here, "failed", "lost@" + far)],
            "team@" + far: [success and (there, "expanded"), failure and (there, "failed", "lost@" + at)],
            "one@" + at: [success and one],
            "back@" + far: [success and there is THEIRS and (there, "expanded"),
                            failure and (here, "failed", "x@fail." + at)],  # a forward that leads back
        }
        return {recipient: [(told + (recipient,))[:3] for told in reports if told and self.sender]
                for recipient, reports in table.items()}

    def expected(self):
        """Return {(name, who tells, Action, Final-Recipient, Original-Recipient)}."""
        return {(self.name, who.name, action, final, original_recipient(recipient) if self.ret else None)
                for recipient, reports in self.outcomes().items() for who, action, final in reports}

    def mail_options(self):
        return ["RET=" + self.ret, "ENVID=%s+2B1" % self.name] if self.ret else []

    def rcpt_options(self, recipient):
        orcpt = original_recipient(recipient).replace("+", "+2B")
        return (["NOTIFY=" + self.notify] if self.notify else []) + (["ORCPT=" + orcpt] if self.ret else [])


def original_recipient(recipient):
    """Return the name by which the sender knows a recipient: one that has to be written in xtext."""
    return "rfc822;orig+" + recipient


LETTERS = [Letter(side, notify, ret, sender) for side in SIDES for notify in NOTIFY for ret in RET
           for sender in ([side.sender, ""] if ret == "FULL" else [side.sender])]


class Postfix(netlab.Postfix):
    """Tells of delays soon; has a port where it does not say that it knows DSN, and a client that does not hear it."""

    def settings(self, certificate, key):
        hops = {"a.test": "smtp:[%s]" % netlab.HOSTS["a"][0], "plain.a.test": "deaf:[%s]" % netlab.HOSTS["a"][0]}
        for kind, address in PEERS.items():
            hops["%s.a.test" % kind] = hops["a.test"]
            hops["%s.postfix.test" % kind] = "smtp:[%s]" % address
        aliases = {"team@postfix.test": MEMBERS % {"here": THEIRS.domain, "there": OURS.domain},
                   "one@postfix.test": "single@a.test", "back@postfix.test": "x@fail.a.test"}
        return super().settings(certificate, key) + """
delay_warning_time = {0}s
smtpd_peername_lookup = no
max_idle = 100s
mynetworks = 127.0.0.0/8, {1}
transport_maps = inline:{{ {2} }}
virtual_alias_maps = inline:{{ {3} }}
""".format(WARN, netlab.HOSTS["a"][0], self.table(hops), self.table(aliases))

    @staticmethod
    def table(rows):
        return ", ".join("{%s=%s}" % row for row in rows.items())

    def services(self):
        return super().services() + ("2525 inet n - n - - smtpd -o smtpd_discard_ehlo_keywords=dsn,silent-discard\n"
                                     "deaf unix - - n - - smtp -o smtp_discard_ehlo_keywords=dsn\n")

    def is_empty(self):
        return not any(lab.files(self.folder / "queue" / name) for name in ("maildrop", "incoming", "active", "deferred"))


class Later:
    """The `answer` of a peer that puts each recipient off until its sender must have heard of it, and two attempts more."""

    def __init__(self):
        self.patient_at, self.seen = float("inf"), {}

    def __call__(self, line):
        if not line.startswith("RCPT"):
            return None
        times = self.seen.setdefault(line, [])
        times.append(time.monotonic())
        return None if len([moment for moment in times if moment > self.patient_at]) > 2 else "451 4.2.0 come back later"


def setUpModule():
    """Send all letters, and wait until nothing is left in any queue."""
    global node, postfix, peers
    domains, users = ["postfix.test", "plain.postfix.test"], ["carol", "own", "member", "single"]
    users = [user + "@postfix.test" for user in users] + ["own@plain.postfix.test"]
    stack = contextlib.ExitStack()
    unittest.addModuleCleanup(stack.close)
    network = stack.enter_context(netlab.Network())
    later = Later()
    scripts = {"fail": lambda line: "550 5.1.1 no such user" if line.startswith("RCPT") else None, "later": later}
    peers = {}
    for kind, address in PEERS.items():
        extensions = netlab.Peer.EXTENSIONS + (("DSN",) if kind == "new" else ())
        peers[kind] = stack.enter_context(netlab.Peer(network, address, scripts.get(kind, lambda line: None), extensions))
    postfix = Postfix(network, domains, users, netlab.make_certificate(network.folder, THEIRS.name))
    node = stack.enter_context(start_node(network))
    for side in SIDES:
        with network.inside(side.host), smtplib.SMTP("127.0.0.1", 25, "mailer.test", 150) as client:
            client.ehlo()
            for letter in LETTERS:
                if letter.side is side:
                    submit(client, letter)
    later.patient_at = time.monotonic() + WARN + 1
    lab.until(is_over, 150, "empty queues")


def start_node(network):
    to_postfix = "smtp://%s:" % netlab.POSTFIX
    routes = {"postfix.test": to_postfix + "25", "plain.postfix.test": to_postfix + "2525"}
    for kind, address in PEERS.items():
        routes["%s.postfix.test" % kind] = to_postfix + "25"
        routes["%s.a.test" % kind] = "smtp://" + address
    words = [word for route in routes.items() for word in ("--route", "%s=%s" % route)]
    return netlab.Node(
        network, "a", "--domain", "a.test", "--domain", "plain.a.test", "--hostname", OURS.name, "--trust", "127.0.0.0/8",
        "--trust", netlab.POSTFIX, "--retry", "1", "--warn", str(WARN), "--quiet", *words,
        before=accounts("ann@a.test", "own@a.test", "member@a.test", "single@a.test", "own@plain.a.test", aliases=[
            "team@a.test: " + MEMBERS % {"here": OURS.domain, "there": THEIRS.domain},
            "one@a.test: single@postfix.test", "back@a.test: x@fail.postfix.test"]))


def submit(client, letter):
    """Send a letter to all its recipients; AssertionError when one is not taken."""
    replies = [client.mail(letter.sender, letter.mail_options())]
    replies += [client.rcpt(recipient, letter.rcpt_options(recipient)) for recipient in letter.outcomes()]
    replies.append(client.data(letter.content))
    assert all(code == 250 for code, _ in replies), replies


def is_over():
    """Return whether no server has anything left; looked at again and again, as mail may be on its way between two looks."""
    return all(postfix.is_empty() and not lab.files(node.data / "queue") for _ in range(5))


class Notices(unittest.TestCase):

    maxDiff = None

    @classmethod
    def setUpClass(cls):
        case = cls()
        texts = {OURS: [path.read_bytes() for path in node.stored(OURS.sender)], THEIRS: postfix.stored(THEIRS.sender)}
        cls.reports = [(side, Report(case, text)) for side in SIDES for text in texts[side]]
        cls.letters = {letter.name: letter for letter in LETTERS}

    def about(self, report):
        """Return the letter that a report is about, by the header that it encloses."""
        name = report.original.as_string().partition("Message-ID: <")[2].partition("@letter.test>")[0]
        return self.letters[name]

    def told(self, side):
        """Return [(report, letter, fields of a recipient)] for all that the sender at one side was told."""
        return [(report, self.about(report), fields)
                for at, report in self.reports if at is side for fields in report.recipients]

    @staticmethod
    def read(report, letter, fields):
        """Return what expected() says, as a report has it."""
        original = fields["Original-Recipient"].replace(" ", "") if letter.ret else None
        return (letter.name, report.about["Reporting-MTA"].replace("dns;", "").strip(), fields["Action"],
                fields["Final-Recipient"].replace("rfc822;", "").strip(), original)

    def check(self, side):
        """What must be told is told, once, and no more."""
        told = collections.Counter(self.read(*one) for one in self.told(side))
        expected = collections.Counter(one for letter in LETTERS if letter.side is side for one in letter.expected())
        self.assertGreater(len(expected), 100)
        self.assertEqual((told - expected, expected - told), ({}, {}), "too much, and too little")

    def test_from_us_to_postfix(self):
        self.check(OURS)

    def test_from_postfix_to_us(self):
        self.check(THEIRS)

    def test_the_envelope_is_named(self):
        for side in SIDES:
            for report, letter, _ in self.told(side):
                self.assertEqual(report.about["Original-Envelope-Id"], "%s+1" % letter.name if letter.ret else None)

    def test_how_much_comes_back(self):
        """RET is about what failed; of all else there is the header. Without it we return the header, Postfix the whole."""
        for side in SIDES:
            for report, letter, fields in self.told(side):
                whole = letter.ret == "FULL" or not letter.ret and report.about["Reporting-MTA"].endswith(THEIRS.name)
                whole = whole and fields["Action"] == "failed"
                with self.subTest(letter=letter.name, action=fields["Action"], by=report.about["Reporting-MTA"]):
                    self.assertEqual(report.original.get_content_type(), "message/rfc822" if whole else "text/rfc822-headers")
                    self.assertEqual("the body of it" in report.original.as_string(), whole)

    def test_what_others_are_asked(self):
        """A server with DSN hears all of it, one without nothing, whoever sends; without a sender it does not matter."""
        heard = peers["new"].lines
        for letter in LETTERS:
            recipient = "%s@new.%s" % (letter.name.lower(), other(letter.side).domain)
            line, = [line for line in heard if line.startswith("RCPT TO:<%s>" % recipient)]
            given = dict(word.split("=", 1) for word in line.split()[2:])
            with self.subTest(letter=letter.name, line=line):
                if letter.sender:
                    self.assertEqual(set(given.get("NOTIFY", "").split(",")), set(letter.notify.split(",")))
                if letter.ret and letter.sender:
                    self.assertIn("ORCPT=" + given["ORCPT"], letter.rcpt_options(recipient))
                    mail, = [line for line in heard if letter.mail_options()[1] in line.split()]
                    self.assertIn(letter.mail_options()[0], mail.split())
        for kind in "old", "fail", "later":
            for line in peers[kind].lines:
                self.assertNotRegex(line, "NOTIFY|ORCPT|ENVID|RET=")

    def test_same_as_postfix(self):
        """Asked the same, both tell the same, with statuses of the same class, but for what is named in DIFFERENT."""
        ours, theirs = self.seen(OURS), self.seen(THEIRS)
        self.assertGreater(len(ours & theirs), 150)
        self.assertEqual({self.in_short(one) for one in ours - theirs}, DIFFERENT["from us"])
        self.assertEqual({self.in_short(one) for one in theirs - ours}, DIFFERENT["from Postfix"])

    def seen(self, side):
        """Return what a side's sender was told, in words that are the same for both sides."""
        names = [(side.name, "here"), (other(side).name, "there"), (side.domain, "here"), (other(side).domain, "there"),
                 (side.title + ".", "")]
        found = set()
        for report, letter, fields in self.told(side):
            text = " ".join(str(word) for word in (*self.read(report, letter, fields), fields["Status"][0]))
            for name, common in names:
                text = text.replace(name, common)
            found.add(tuple(text.split()))
        return found

    @staticmethod
    def in_short(told):
        """Return (who told it, Action, about whom) of one of seen(); "late" for any of those."""
        name, who, action, recipient = told[:4]
        return who, action, recipient.replace(name.lower(), "late")


if __name__ == "__main__":
    unittest.main()
