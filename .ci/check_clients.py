"""minimail in capture mode with programs we did not write: senders, fetchers, and readers of the store.

    python3 .ci/check_clients.py [-v] [Class[.test]]

Contents are compared byte for byte, below the trace headers that minimail (and some fetchers) put on top.
"""
# time limit: 300
import contextlib
import email
import email.policy
import imaplib
import mailbox
import poplib
import random
import re
import shutil
import smtplib
import subprocess
import sys
import textwrap
import time
import unittest
from base64 import encodebytes
from pathlib import Path

import lab

poplib._MAXLINE = 1 << 20  # poplib refuses lines over 2,048 bytes; mail has longer ones

SENDER = "ann@example.org"
ORDINARY_USER = "nobody"  # Dovecot refuses to open mail that belongs to root


# The messages

def message(name, body, *fields):
    """Return a message with CRLF line ends whose subject is its name."""
    head = ["From: Ann <%s>" % SENDER, "To: Bob <bob@example.com>", "Subject: " + name,
            "Date: Tue, 01 Sep 2026 10:00:00 +0000", "Message-ID: <%s@example.org>" % name, *fields]
    return "".join(line + "\r\n" for line in head).encode() + b"\r\n" + body


def attachment_message(size=3 << 20):
    """Return a message with `size` random bytes attached, always the same."""
    content = random.Random(1).getrandbits(8 * size).to_bytes(size, "big")
    parts = (b"--=_\r\nContent-Type: text/plain\r\n\r\nSee attached.\r\n"
             b"--=_\r\nContent-Type: application/octet-stream\r\nContent-Transfer-Encoding: base64\r\n"
             b"Content-Disposition: attachment; filename=\"random.bin\"\r\n\r\n"
             + encodebytes(content).replace(b"\n", b"\r\n") + b"--=_--\r\n")
    return message("attachment", parts, "MIME-Version: 1.0", 'Content-Type: multipart/mixed; boundary="=_"')


def text_message(name, charset, transfer, text):
    """Return a message with one part in the given character set."""
    return message(name, text.encode(charset), "MIME-Version: 1.0", "Content-Type: text/plain; charset=" + charset,
                   "Content-Transfer-Encoding: " + transfer)


SAMPLES = {
    "plain": message("plain", b"Hello Bob,\r\n\r\n\tindented, trailing blank \r\nFrom here it goes on.\r\n\r\n\r\n"),
    "dots": message("dots", b".\r\n..\r\n...\r\n.hidden\r\n. \r\n\r\n.\r\n"),
    "no-text": message("no-text", b""),
    "latin-1": text_message("latin-1", "iso-8859-1", "8bit", "".join(map(chr, range(0xA0, 0x100))) + "\r\n"),
    "utf-8": text_message("utf-8", "utf-8", "8bit", "Grüße, 日本 и всем \U0001F4EC\r\n.\r\nÄ\r\n"),
    "iso-2022-jp": text_message("iso-2022-jp", "iso-2022-jp", "7bit", "日本語のメール\r\n.ドットの行\r\n.\r\n終\r\n"),
    "long-line": message("long-line", b"short\r\n" + b"0123456789" * 10000 + b"\r\nshort\r\n"),
    "attachment": attachment_message(),
}

TRACE = re.compile(rb"(?:(?:Return-Path|Delivered-To|Received):[^\n]*\n(?:[ \t][^\n]*\n)*)*", re.IGNORECASE)


def below_trace(content):
    """Return a message without the trace headers on its top."""
    return content[TRACE.match(content).end():]


def trace_names(content):
    """Return the names of the trace headers on a message's top."""
    return re.findall(rb"(?m)^[\w-]+(?=:)", TRACE.match(content).group())


def local_lines(content):
    """Return what a program that keeps mail with the line ends of Unix makes of a message."""
    return content.replace(b"\r\n", b"\n")


class NodeCase(unittest.TestCase):
    """A minimail in capture mode and a home folder for its clients, for all tests of a class."""

    user = None

    @classmethod
    def setUpClass(cls):
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        cls.node = stack.enter_context(lab.Node(user=cls.user))
        cls.home = stack.enter_context(lab.folder())
        cls.environment = lab.clean_environment(cls.home)

    def run_client(self, *command, stdin=b"", **more):
        return lab.run(command, stdin, environment=self.environment, cwd=self.home, **more)

    def write(self, name, text):
        """Write a client's configuration, as strict about permissions as those clients are."""
        path = self.home / name
        path.write_text(textwrap.dedent(text))
        path.chmod(0o600)
        return path

    def deliver(self, recipients, contents):
        """Send messages over one SMTP session, each to all recipients."""
        with smtplib.SMTP(*self.node.smtp) as client:
            for content in contents:
                client.sendmail(SENDER, recipients, content)

    def assert_same(self, got, wanted, what):
        """Compare bytes; a failure shows where they part, not megabytes."""
        if got != wanted:
            pairs = enumerate(zip(got, wanted))
            place = next((i for i, (a, b) in pairs if a != b), min(len(got), len(wanted)))
            around = slice(max(0, place - 40), place + 40)
            self.fail("%s: %d bytes, not %d; they part at %d:\n  got    %r\n  wanted %r"
                      % (what, len(got), len(wanted), place, got[around], wanted[around]))

    def assert_samples(self, contents, convert=bytes, spoiled=()):
        """Compare a mailbox with all samples, in any order; those named in `spoiled` must only be there."""
        got = {email.message_from_bytes(content)["Subject"]: content for content in contents}
        self.assertEqual(sorted(got), sorted(SAMPLES))
        self.assertEqual(len(contents), len(SAMPLES))
        for name in set(SAMPLES).difference(spoiled):
            self.assert_same(below_trace(got[name]), convert(SAMPLES[name]), name)

    def pop3(self, address):
        """Return a POP3 session with an address's mailbox."""
        client = poplib.POP3(*self.node.pop3, timeout=150)
        self.addCleanup(client.close)
        client.user(address)
        client.pass_("any")
        return client

    def uids(self, address):
        """Return the UIDs that POP3 gives, in the order of the messages."""
        client = self.pop3(address)
        uids = [line.split()[1] for line in client.uidl()[1]]
        client.quit()
        return uids


# Programs that send

class Senders(NodeCase):
    """When a program ends well, minimail has said 250: the message must be there at once, without waiting."""

    def check(self, program, send, samples=SAMPLES):
        for name, content in samples.items():
            with self.subTest(name):
                address = "%s.%s@example.com" % (program, name)
                path = self.home / "message"
                path.write_bytes(content)
                send(address, path, content)
                self.assert_same(below_trace(self.only_stored(address)), content, name)

    def only_stored(self, address):
        """Return the one message of a mailbox, with its trace headers looked at."""
        files = self.node.stored(address)
        self.assertEqual(len(files), 1, files)
        content = files[0].read_bytes()
        self.assertEqual(trace_names(content), [b"Return-Path", b"Delivered-To", b"Received"])
        lines = content.split(b"\r\n")
        self.assertEqual(lines[0], b"Return-Path: <%s>" % SENDER.encode())
        self.assertEqual(lines[1], b"Delivered-To: %s" % address.encode())
        return content

    def test_smtplib(self):
        def send(address, path, content):
            with smtplib.SMTP(*self.node.smtp) as client:
                self.assertEqual(client.sendmail(SENDER, [address], content, ["BODY=8BITMIME"]), {})
        self.check("smtplib", send)

    def test_swaks(self):
        self.check("swaks", self.send_by_swaks)

    def test_swaks_pipelined(self):
        self.check("swaks-pipelined", lambda *given: self.send_by_swaks(*given, "--pipeline"))

    def send_by_swaks(self, address, path, content, *more):
        """swaks would take a last line "." for the end of the data; told not to touch them, it sends what it is given."""
        host, port = self.node.smtp
        path.write_bytes(re.sub(rb"(?m)^\.", b"..", content) + b".")  # swaks ends the line
        self.run_client("swaks", "--server", host, "--port", port, "--from", SENDER, "--to", address,
                        "--helo", "client.example", "--suppress-data", "--no-data-fixup", "--data", "@%s" % path, *more)

    def test_curl(self):
        def send(address, path, content):
            self.run_client("curl", "-sS", "smtp://%s:%d/client.example" % self.node.smtp, "--mail-from", SENDER,
                            "--mail-rcpt", address, "--upload-file", path)
        self.check("curl", send)

    def test_msmtp(self):
        host, port = self.node.smtp

        def send(address, path, content):
            self.run_client("msmtp", "--host=%s" % host, "--port=%d" % port, "--from=%s" % SENDER, "--auth=off",
                            "--tls=off", "--set-from-header=off", "--set-date-header=off", "--domain=client.example",
                            "--timeout=30", "--", address, stdin=local_lines(content))
        self.check("msmtp", send)

    def test_s_nail(self):
        """s-nail builds the message itself, so its text and attachment are compared after decoding."""
        text = "Grüße\n.\n..\n.hidden\n"
        content = random.Random(2).getrandbits(8 << 20).to_bytes(1 << 20, "big")
        (self.home / "random.bin").write_bytes(content)
        self.run_client("s-nail", "-n", "-S", "v15-compat=yes", "-S", "mta=smtp://%s:%d" % self.node.smtp,
                        "-S", "smtp-auth=none", "-S", "hostname=client.example", "-S", "sendwait", "-S", "DEAD=/dev/null",
                        "-S", "ttycharset=utf-8", "-r", SENDER, "-s", "From s-nail", "-a", "random.bin",
                        "s-nail@example.com", stdin=text.encode())
        got = email.message_from_bytes(self.only_stored("s-nail@example.com"), policy=email.policy.default)
        self.assertEqual(got["Subject"], "From s-nail")
        self.assertEqual(got.get_body().get_content().splitlines(), text.splitlines())
        self.assertEqual([part.get_content() for part in got.iter_attachments()], [content])

    def test_any_log_in(self):
        """A program set up to log in works unchanged: capture mode takes any name and password."""
        host, port = self.node.smtp
        message = self.home / "message"
        message.write_bytes(SAMPLES["plain"])
        for kind in ("PLAIN", "LOGIN"):
            self.run_client("swaks", "--server", host, "--port", port, "--from", SENDER, "--helo", "client.example",
                            "--to", "log-in@example.com", "--auth", kind, "--auth-user", "ann", "--auth-password", "any")
            self.run_client("curl", "-sS", "smtp://%s:%d/client.example" % self.node.smtp, "--user", "ann:any",
                            "--login-options", "AUTH=" + kind, "--mail-from", SENDER, "--mail-rcpt",
                            "log-in@example.com", "--upload-file", message)
            self.run_client("msmtp", "--host=%s" % host, "--port=%d" % port, "--from=%s" % SENDER, "--user=ann",
                            "--auth=" + kind.lower(), "--passwordeval=echo any", "--tls=off", "--",
                            "log-in@example.com", stdin=local_lines(SAMPLES["plain"]))
        with smtplib.SMTP(*self.node.smtp) as client:
            client.login("ann", "any")
            client.sendmail(SENDER, ["log-in@example.com"], SAMPLES["plain"])
        self.assertEqual(len(self.node.stored("log-in@example.com")), 7)

    def test_many_recipients(self):
        """Each recipient gets a copy; what others got it stays untold, as for Bcc."""
        addresses = ["many%d@example.com" % number for number in range(100)]
        path = self.home / "message"
        path.write_bytes(SAMPLES["plain"])
        recipients = [word for address in addresses for word in ("--mail-rcpt", address)]
        self.run_client("curl", "-sS", "smtp://%s:%d/client.example" % self.node.smtp, "--mail-from", SENDER,
                        *recipients, "--upload-file", path)
        for address in addresses:
            (stored,) = self.node.stored(address)
            content = stored.read_bytes()
            self.assert_same(below_trace(content), SAMPLES["plain"], address)
            named = set(re.findall(rb"many\d+@example.com", content))
            self.assertLessEqual(named, {address.encode()})


# Programs that fetch

class Fetchers(NodeCase):
    """Each fetches a mailbox of its own twice: first leaving the messages there, then removing them."""

    names = ("poplib", "curl", "fetchmail", "mpop", "getmail", "mutt")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.deliver(cls, ["%s@example.com" % name for name in cls.names], SAMPLES.values())

    def check(self, name, fetch, convert=local_lines, spoiled=()):
        """`fetch(address, keep, into)` fetches a mailbox and returns the messages; `into` is a new empty folder."""
        address = "%s@example.com" % name
        before = self.uids(address)
        self.assertEqual(len(set(before)), len(SAMPLES))
        self.assert_samples(fetch(address, True, self.new_folder(name + "-keep")), convert, spoiled)
        self.assertEqual(self.uids(address), before, "fetched without removing")
        self.assert_samples(fetch(address, False, self.new_folder(name + "-remove")), convert, spoiled)
        self.assertEqual(self.uids(address), [], "fetched and removed")
        self.assertEqual(self.node.stored(address), [])

    def new_folder(self, name):
        path = self.home / name
        path.mkdir()
        return path

    def maildir(self, path):
        """Make a Maildir for a fetcher that delivers into one."""
        for sub in ("", "tmp", "new", "cur"):
            (path / sub).mkdir(0o700)
        return path

    def test_poplib(self):
        def fetch(address, keep, into):
            client = self.pop3(address)
            listed = [int(line.split()[1]) for line in client.list()[1]]
            contents = []
            for number, size in enumerate(listed, 1):
                lines = client.retr(number)[1]
                contents.append(b"".join(line + b"\r\n" for line in lines))
                self.assertEqual(size, len(contents[-1]), "LIST and RETR of message %d" % number)
                self.assertEqual(client.top(number, 0)[1], lines[:lines.index(b"") + 1])
                if not keep:
                    client.dele(number)
            self.assertEqual(client.stat(), (len(listed), sum(listed)) if keep else (0, 0))
            client.quit()
            return contents
        self.check("poplib", fetch, bytes)

    def test_curl(self):
        def fetch(address, keep, into):
            base = "pop3://%s:%d/" % self.node.pop3
            curl = ["curl", "-sS", "--user", address + ":any"]
            count = len(self.run_client(*curl, base).splitlines())
            # highest first: with each removal the later ones move up, since every curl is a session of its own
            contents = []
            for number in range(count, 0, -1):
                contents.append(self.run_client(*curl, base + str(number)))
                if not keep:
                    self.run_client(*curl, "--head", "--request", "DELE", base + str(number))
            return contents
        self.check("curl", fetch, bytes)

    def test_fetchmail(self):
        def fetch(address, keep, into):
            host, port = self.node.pop3
            self.write(".fetchmailrc", """
                poll %s protocol pop3 port %d
                user "%s" password "any" sslproto ""
                mda "cat >$(mktemp %s/XXXXXXXX)"
                fetchall norewrite %s
                """ % (host, port, address, into, "keep" if keep else "nokeep"))
            self.run_client("fetchmail", "--nosyslog", "--invisible", "--pidfile", self.home / "fetchmail.pid")
            return [path.read_bytes() for path in into.iterdir()]
        # whatever the server, fetchmail puts bytes of its own into a line every 8,192 bytes
        self.check("fetchmail", fetch, spoiled=["long-line"])

    def test_mpop(self):
        def fetch(address, keep, into):
            host, port = self.node.pop3
            self.write(".mpoprc", """
                account default
                host %s
                port %d
                user %s
                password any
                auth user
                tls off
                tls_starttls off
                received_header off
                keep %s
                uidls_file %s
                delivery maildir %s
                """ % (host, port, address, "on" if keep else "off", into / "uidls", self.maildir(into / "box")))
            self.run_client("mpop", "--quiet")
            return [path.read_bytes() for path in into.glob("box/new/*")]
        self.check("mpop", fetch)

    def test_getmail(self):
        def fetch(address, keep, into):
            host, port = self.node.pop3
            settings = self.write("getmailrc", """
                [retriever]
                type = SimplePOP3Retriever
                server = %s
                port = %d
                username = %s
                password = any
                [destination]
                type = MDA_external
                path = /bin/sh
                arguments = ("-c", "cat >$(mktemp %s/XXXXXXXX)")
                allow_root_commands = true
                [options]
                read_all = true
                delete = %s
                received = false
                delivered_to = false
                """ % (host, port, address, into, "false" if keep else "true"))
            self.run_client("getmail", "--quiet", "--getmaildir", into, "--rcfile", settings)
            return [path.read_bytes() for path in into.iterdir() if not path.name.startswith("oldmail")]
        self.check("getmail", fetch)

    def test_mutt(self):
        def fetch(address, keep, into):
            settings = ('set pop_user="%s" pop_pass="any" pop_authenticators="user"' % address,
                        "set pop_delete=yes pop_last=no ssl_starttls=no ssl_force_tls=no")
            save = "<copy-message>" if keep else "<save-message>"
            return mutt_copies(self, "pop://%s:%d/" % self.node.pop3, into / "box", save, *settings)
        self.check("mutt", fetch)


def run_mutt(case, folder, keys, *settings):
    """Have mutt open a folder, type keys, and end."""
    (case.home / "Mail").mkdir(exist_ok=True)  # else mutt first asks whether to make it, and takes a key for the answer
    script = case.write("muttrc", "\n".join([
        "set confirmcreate=no confirmappend=no delete=yes quit=yes move=no mark_old=no wait_key=no sleep_time=0 beep=no",
        "set mbox_type=Maildir sort=mailbox-order", *settings, 'push "%s<quit>"' % keys]))
    lab.run_in_terminal(["mutt", "-n", "-F", script, "-f", folder], environment=case.environment, cwd=case.home)


def mutt_copies(case, folder, into, command, *settings):
    """Have mutt copy (or save, which removes) every message of a folder into a new Maildir; return the contents.

    mutt notes in a copy what it knows of it, in header fields of its own; those are taken out again.
    """
    keys = "<tag-pattern>~A<enter><tag-prefix>%s<kill-line>%s<enter>" % (command, into)
    run_mutt(case, folder, keys, *settings)
    notes = re.compile(rb"(?m)^(?:Status|X-Status|Content-Length|Lines): [^\n]*\n")
    contents = []
    for path in [*into.glob("new/*"), *into.glob("cur/*")]:
        head, blank, body = path.read_bytes().partition(b"\n\n")
        contents.append(notes.sub(b"", head + b"\n") + blank[1:] + body)
    return contents


# Programs that read the store

class Dovecot(lab.Resourceful):
    """A Dovecot of our own, with POP3 and IMAP on free ports, whose mailboxes are minimail's; any password is right."""

    settings = """
        protocols = imap pop3
        listen = 127.0.0.1
        base_dir = {place}/run
        state_dir = {place}/state
        log_path = {place}/log
        ssl = no
        disable_plaintext_auth = no
        mail_location = maildir:{mail}/%d/%n
        first_valid_uid = 1
        passdb {{
          driver = static
          args = nopassword=y
        }}
        userdb {{
          driver = static
          args = uid={user} gid={group} home={place}/home
        }}
        namespace inbox {{
          inbox = yes
        }}
        service imap-login {{
          inet_listener imap {{
            port = {imap}
          }}
          inet_listener imaps {{
            port = 0
          }}
        }}
        service pop3-login {{
          inet_listener pop3 {{
            port = {pop3}
          }}
          inet_listener pop3s {{
            port = 0
          }}
        }}
        """

    def __init__(self, mail, user):
        self.mail, self.user = mail, user

    def enter(self):
        self.place = self.resources.enter_context(lab.folder(self.user))
        self.pop3, self.imap = lab.free_port(), lab.free_port()
        settings = self.place / "dovecot.conf"
        settings.write_text(self.settings.format(place=self.place, mail=self.mail, user=self.user, pop3=self.pop3,
                                                 group=lab.primary_group(self.user), imap=self.imap))
        self.process = lab.start(["dovecot", "-F", "-c", settings])
        self.resources.callback(self.stop)
        try:
            lab.until(lambda: lab.accepts(self.imap) and lab.accepts(self.pop3), 20, "Dovecot's ports")
        except AssertionError:
            sys.stderr.write(self.log())
            raise

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            lab.end_group(self.process)

    def log(self):
        path = self.place / "log"
        return path.read_text() if path.exists() else ""

    def complaints(self):
        """Return what Dovecot did not like, such as a wrong size in a file name."""
        return [line for line in self.log().splitlines() if re.search("Error|Warning|Fatal|Panic", line)]

    @contextlib.contextmanager
    def session(self, address):
        """An IMAP session with an address's INBOX."""
        client = imaplib.IMAP4("127.0.0.1", self.imap)
        client.login(address, "any")
        client.select("INBOX")
        yield client
        client.logout()


class DovecotReads(NodeCase):
    """Dovecot and minimail work on the same mailboxes at the same time."""

    user = ORDINARY_USER

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.dovecot = Dovecot(cls.node.data / "mail", cls.user)
        cls.dovecot.__enter__()
        cls.addClassCleanup(cls.dovecot.stop)
        cls.addClassCleanup(cls.dovecot.resources.close)

    def tearDown(self):
        self.assertEqual(self.dovecot.complaints(), [])

    def minimail_contents(self, address):
        """Return all messages as minimail's POP3 gives them, each of the size that LIST told."""
        client = self.pop3(address)
        contents = []
        for line in client.list()[1]:
            number, size = line.split()
            contents.append(b"".join(line + b"\r\n" for line in client.retr(int(number))[1]))
            self.assertEqual(len(contents[-1]), int(size), "LIST and RETR of message %s" % number)
        client.quit()
        return contents

    def test_pop3_gives_the_same(self):
        self.deliver(["dovecot-pop3@example.com"], SAMPLES.values())
        ours = self.minimail_contents("dovecot-pop3@example.com")
        client = poplib.POP3("127.0.0.1", self.dovecot.pop3, timeout=150)
        self.addCleanup(client.close)
        client.user("dovecot-pop3@example.com")
        client.pass_("any")
        sizes = [int(line.split()[1]) for line in client.list()[1]]
        theirs = [b"".join(line + b"\r\n" for line in client.retr(number)[1]) for number in range(1, len(sizes) + 1)]
        client.quit()
        self.assert_samples(theirs)
        self.assertEqual(sizes, [len(content) for content in theirs])
        self.assertEqual(sorted(theirs), sorted(ours))

    def test_imap_gives_the_same_and_uids_stay(self):
        address = "dovecot-imap@example.com"
        self.deliver([address], SAMPLES.values())
        before, contents = self.uids(address), self.minimail_contents(address)
        with self.dovecot.session(address) as client:
            theirs = [part[1] for part in client.fetch("1:*", "(BODY.PEEK[])")[1] if isinstance(part, tuple)]
            client.store("1", "+FLAGS", r"(\Seen \Answered)")
            client.store("2", "+FLAGS", r"(\Flagged)")
        self.assert_samples(theirs)
        self.assertEqual(list((self.node.mailbox(address) / "new").iterdir()), [], "Dovecot has moved them to cur")
        self.assertTrue([path for path in self.node.stored(address) if path.name.endswith(":2,RS")])
        self.assertEqual(self.uids(address), before)
        self.assertEqual(self.minimail_contents(address), contents)

    def test_uids_stay_over_a_restart(self):
        address = "restart@example.com"
        self.deliver([address], [SAMPLES["plain"], SAMPLES["dots"]])
        before = self.uids(address)
        with self.dovecot.session(address) as client:
            client.store("1:*", "+FLAGS", r"(\Seen)")
        self.node.stop()
        self.node.start()
        self.assertEqual(self.uids(address), before)
        self.deliver([address], [SAMPLES["utf-8"]])
        self.assertEqual(self.uids(address)[:2], before, "new messages come after the old ones")

    def test_flags_set_in_the_middle_of_a_pop3_session(self):
        """A flag renames the file; the open POP3 session must still give and remove the message."""
        address = "renamed@example.com"
        self.deliver([address], [SAMPLES["plain"], SAMPLES["dots"], SAMPLES["utf-8"]])
        client = self.pop3(address)
        self.assertEqual(client.stat()[0], 3)
        with self.dovecot.session(address) as other:
            other.store("1:*", "+FLAGS", r"(\Seen)")
        content = b"".join(line + b"\r\n" for line in client.retr(2)[1])
        self.assert_same(below_trace(content), SAMPLES["dots"], "RETR after the rename")
        client.dele(1)
        client.quit()
        self.assertEqual(len(self.node.stored(address)), 2)
        with self.dovecot.session(address) as other:
            self.assertEqual(other.search(None, "ALL"), ("OK", [b"1 2"]))

    def test_expunged_in_the_middle_of_a_pop3_session(self):
        """A message that another program removed is reported, and the session goes on."""
        address = "expunged@example.com"
        self.deliver([address], [SAMPLES["plain"], SAMPLES["dots"]])
        client = self.pop3(address)
        with self.dovecot.session(address) as other:
            other.store("1", "+FLAGS", r"(\Deleted)")
            other.expunge()
        with self.assertRaisesRegex(poplib.error_proto, "-ERR"):
            client.retr(1)
        content = b"".join(line + b"\r\n" for line in client.retr(2)[1])
        self.assert_same(below_trace(content), SAMPLES["dots"], "the other message")
        client.quit()
        self.assertEqual(len(self.uids(address)), 1)

    def test_removed_by_pop3_is_gone_in_imap(self):
        address = "removed@example.com"
        self.deliver([address], [SAMPLES["plain"], SAMPLES["dots"]])
        with self.dovecot.session(address) as other:
            client = self.pop3(address)
            client.dele(1)
            client.quit()
            other.noop()
            (content,) = [part[1] for part in other.fetch("1:*", "(BODY.PEEK[])")[1] if isinstance(part, tuple)]
        self.assert_same(below_trace(content), SAMPLES["dots"], "the message left")

    def test_delivery_into_an_open_imap_session(self):
        address = "open@example.com"
        self.deliver([address], [SAMPLES["plain"]])
        with self.dovecot.session(address) as client:
            self.deliver([address], [SAMPLES["dots"]])
            client.noop()
            self.assertEqual(client.search(None, "ALL"), ("OK", [b"1 2"]))

    def test_appended_by_imap(self):
        """Dovecot stores what it is given with LF, and says so in the file name (S= and W=); POP3 still gives CRLF."""
        address = "appended@example.com"
        self.deliver([address], [SAMPLES["plain"]])
        with self.dovecot.session(address) as client:
            for name in ("dots", "utf-8", "long-line", "no-text"):
                client.append("INBOX", None, imaplib.Time2Internaldate(time.time()), SAMPLES[name])
        got = {email.message_from_bytes(c)["Subject"]: below_trace(c) for c in self.minimail_contents(address)}
        self.assertEqual(sorted(got), ["dots", "long-line", "no-text", "plain", "utf-8"])
        for name, content in got.items():
            self.assert_same(content, SAMPLES[name], name)

    def test_folders_beside_the_inbox(self):
        """Dovecot keeps subfolders and indexes inside the Maildir; they are not mail for POP3."""
        address = "folders@example.com"
        self.deliver([address], [SAMPLES["plain"]])
        with self.dovecot.session(address) as client:
            client.create("Archive")
            client.append("Archive", None, imaplib.Time2Internaldate(time.time()), SAMPLES["dots"])
        self.assertEqual(len(self.minimail_contents(address)), 1)
        listed = lab.run(self.node.command("mail"))
        self.assertIn(address.encode(), listed)
        self.assertNotIn(b"Archive", listed)


class MuttReads(NodeCase):
    """mutt opens the Maildir itself."""

    def test_content_and_uids(self):
        address = "mutt-store@example.com"
        self.deliver([address], SAMPLES.values())
        before = self.uids(address)
        # mutt shows and copies what is in the file, here with CRLF, so neither side converts anything
        contents = mutt_copies(self, self.node.mailbox(address), self.home / "copies", "<copy-message>")
        self.assert_samples([local_lines(content) for content in contents], local_lines)
        self.assertEqual(self.uids(address), before)

    def test_reading_moves_to_cur(self):
        address = "mutt-flags@example.com"
        self.deliver([address], [SAMPLES["plain"], SAMPLES["dots"]])
        before = self.uids(address)
        keys = "<tag-pattern>~A<enter><tag-prefix><set-flag>!<tag-prefix><clear-flag>N"
        run_mutt(self, self.node.mailbox(address), keys)
        names = [path.name for path in (self.node.mailbox(address) / "cur").iterdir()]
        self.assertEqual([name.rpartition(":")[2] for name in names], ["2,FS", "2,FS"])
        self.assertEqual(self.uids(address), before)
        client = self.pop3(address)
        client.dele(1)
        client.quit()
        self.assertEqual(self.uids(address), before[1:])


class MailboxReads(NodeCase):
    """Python's `mailbox` opens the Maildir itself."""

    def test_content(self):
        address = "mailbox@example.com"
        self.deliver([address], SAMPLES.values())
        store = mailbox.Maildir(str(self.node.mailbox(address)), create=False)
        self.assert_samples([store.get_bytes(key) for key in store.keys()])
        self.assert_samples([path.read_bytes() for path in self.node.stored(address)])

    def test_flags_added_and_removed_messages(self):
        address = "mailbox-changes@example.com"
        self.deliver([address], [SAMPLES["plain"], SAMPLES["dots"]])
        before = self.uids(address)
        store = mailbox.Maildir(str(self.node.mailbox(address)), create=False)
        for key in store.keys():
            item = store[key]
            item.set_subdir("cur")
            item.set_flags("S")
            store[key] = item
        self.assertEqual(self.uids(address), before)
        store.add(local_lines(SAMPLES["utf-8"]))
        client = self.pop3(address)
        sizes = [int(line.split()[1]) for line in client.list()[1]]
        contents = [b"".join(line + b"\r\n" for line in client.retr(n + 1)[1]) for n in range(len(sizes))]
        client.quit()
        self.assertEqual(len(contents), 3)
        self.assertEqual(sizes, [len(content) for content in contents])
        self.assertIn(SAMPLES["utf-8"], contents)
        store.clear()
        self.assertEqual(self.uids(address), [])


# What a 250 promises

class Strace(lab.Resourceful):
    """The system calls that matter to durability, of a running process, as (name, arguments, first line, last line)."""

    calls = "fsync,fdatasync,rename,renameat,renameat2,link,linkat,mkdir,mkdirat,sendto,sendmsg,write,writev"

    def __init__(self, process):
        self.process = process

    def enter(self):
        self.output = self.resources.enter_context(lab.folder()) / "trace"
        errors = self.resources.enter_context(open(self.output.with_suffix(".errors"), "w+b"))
        self.strace = lab.start(["strace", "-f", "-y", "-s", "300", "-e", "trace=" + self.calls, "-e", "signal=none",
                                 "-o", self.output, "-p", self.process.pid], stderr=errors)
        self.resources.callback(self.end)
        lab.until(lambda: b"attached" in self.output.with_suffix(".errors").read_bytes(), 10, "strace attached")

    def end(self):
        if self.strace.poll() is None:
            self.strace.terminate()
            self.strace.wait(10)

    def events(self):
        """Return the calls in the order of their begin; a call that was interrupted in the output is put together."""
        self.end()
        events, open_calls = [], {}
        for number, line in enumerate(self.output.read_text(errors="backslashreplace").splitlines()):
            thread, _, text = line.partition(" ")
            text = text.strip()
            if text.startswith("<... "):
                event = open_calls.pop(thread)
                event[1] += text.partition(" resumed>")[2]
                event[3] = number
            elif "(" in text:
                name, _, arguments = text.partition("(")
                event = [name, arguments, number, number]
                events.append(event)
                if arguments.endswith("<unfinished ...>"):
                    event[1] = arguments[:-len("<unfinished ...>")]
                    open_calls[thread] = event
        return [tuple(event) for event in events]


class Durability(NodeCase):
    """The order of system calls: message synced, moved into new/, directory synced, and only then 250."""

    def send_data(self, recipients):
        with smtplib.SMTP(*self.node.smtp) as client:
            client.sendmail(SENDER, recipients, SAMPLES["plain"])

    def send_bdat(self, recipients):
        content = SAMPLES["plain"]
        with smtplib.SMTP(*self.node.smtp) as client:
            client.ehlo()
            client.mail(SENDER)
            for recipient in recipients:
                client.rcpt(recipient)
            client.send(b"BDAT %d\r\n%s" % (20, content[:20]))
            self.assertEqual(client.getreply()[0], 250)
            client.send(b"BDAT %d LAST\r\n%s" % (len(content) - 20, content[20:]))
            self.assertEqual(client.getreply()[0], 250)

    def check(self, send, recipients):
        """Trace a delivery, and hold what happened against the promise; return the calls."""
        with Strace(self.node.process) as trace:
            send(recipients)
            events = trace.events()
        shown = "\n".join("%s(%s" % event[:2] for event in events)
        moves = [self.move(event) for event in events
                 if event[0].startswith(("rename", "link")) and event[1].endswith("= 0")]
        moves = [move for move in moves if "/new/" in move[1]]
        self.assertEqual(len(moves), len(recipients), shown)
        end_of_moves = max(move[3] for move in moves)
        promise = next(first for name, arguments, first, last in events
                       if first > end_of_moves and name in ("sendto", "sendmsg", "write", "writev")
                       and re.match(r'\d+<(?:socket|TCP):[^>]*>, "250', arguments))
        for source, target, first, last in moves:
            new = str(Path(target).parent)
            self.assertTrue(self.synced(events, source, 0, first),
                            "%s not synced before it moved:\n%s" % (source, shown))
            self.assertTrue(self.synced(events, new, last, promise), "%s not synced before 250:\n%s" % (new, shown))
        for name, arguments, _, last in events:
            if name.startswith("mkdir") and arguments.endswith("= 0"):
                parent = str(Path(self.paths(arguments)[0]).parent)
                self.assertTrue(self.synced(events, parent, last, promise),
                                "%s has a new folder and is not synced before 250:\n%s" % (parent, shown))
        return events

    def paths(self, arguments):
        """Return the absolute paths among a call's arguments; relative ones belong to the descriptor before them."""
        base, paths = "", []
        for folder, text in re.findall(r'(?:\d+|AT_FDCWD)<([^>]*)>|"([^"]*)"', arguments):
            if folder:
                base = folder
            else:
                paths.append(str(Path(self.node.place, base, text)))
        return paths

    def move(self, event):
        """Return (source, target, first line, last line) of a rename or link."""
        source, target = self.paths(event[1])
        return source, target, event[2], event[3]

    def synced(self, events, path, after, before):
        """Return whether a path was synced after one line and before another, without error."""
        return any(name in ("fsync", "fdatasync") and "<%s>" % path in arguments and arguments.endswith("= 0")
                   and after <= first and last < before for name, arguments, first, last in events)

    def test_new_mailbox(self):
        self.check(self.send_data, ["first@example.com"])

    def test_known_mailbox(self):
        self.send_data(["known@example.com"])
        self.check(self.send_data, ["known@example.com"])

    def test_several_recipients(self):
        """Each copy is safe before the one 250; the message itself is written to disk once, whatever their number."""
        recipients = ["several%d@example.com" % number for number in range(3)]
        events = self.check(self.send_data, recipients)
        files = [event for event in events if "sync" in event[0] and re.search(r"/tmp/[^/>]+>", event[1])]
        self.assertEqual(len(files), 1, files)

    def test_bdat(self):
        self.check(self.send_bdat, ["bdat@example.com"])


if __name__ == "__main__":
    for program in ("swaks", "curl", "msmtp", "s-nail", "fetchmail", "mpop", "getmail", "mutt", "dovecot", "strace"):
        if not shutil.which(program):
            sys.exit("%s is not installed: run .ci/install.sh first" % program)
    unittest.main()
