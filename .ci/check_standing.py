"""Standing: our signatures, rewritten addresses, reports and readings, judged by programs we did not write.

    python3 .ci/check_standing.py [-v] [Class[.test]]

dkimpy and OpenDKIM verify what we sign, with keys that OpenSSL made; postsrsd undoes our addresses and we its; flufl.bounce
(PyPI), baunsu and email-bounce-parser (npm) read our reports; pyspf reads the same records as we do; an HTTPS server with an
authority of its own offers policies. What goes through a node's queue and through Postfix does so in netlab's network. What is
missing is installed: Debian packages, a venv and npm packages in the cache.
"""
# time limit: 360
# ruff: noqa: E501  the tables are wide
import base64
import contextlib
import functools
import hashlib
import http.server
import json
import os
import random
import re
import smtplib
import socket
import ssl
import subprocess
import sys
import threading
import time
import unittest
import unittest.mock
from pathlib import Path

import lab
import netlab
from check_crash import FAKETIME

sys.path.insert(0, str(lab.REPO))
import minimail  # noqa: E402

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minimail-ci" / "standing"
DEBIAN = {"opendkim": "/usr/sbin/opendkim", "postsrsd": "/usr/sbin/postsrsd", "openssl": "/usr/bin/openssl"}
PYPI = ["dkimpy", "pynacl", "pyspf", "dnspython", "flufl.bounce"]
NPM = ["baunsu", "email-bounce-parser"]


def setUpModule():
    """Install what is missing, and make the keys that all tests sign with."""
    global folder, keys, stack
    install()
    stack = contextlib.ExitStack()
    unittest.addModuleCleanup(stack.close)
    folder = stack.enter_context(lab.folder())
    keys = make_keys()


class Postfix(netlab.Postfix):
    """Keeps mail for good.test and bad.test, passes all other on to the peer SINK. Its certificate is for mx.good.test."""

    def settings(self, certificate, key):
        return super().settings(certificate, key) + """
relayhost = [%s]
smtpd_peername_lookup = no
# else it breaks lines that are longer than what RFC 5321 section 4.5.3.1.6 allows, and with them any signature
smtp_line_length_limit = 0
""" % SINK


SINK, POLICIES = netlab.HOSTS["peer"][:2]           # who keeps what Postfix and nodes send; the HTTPS server


@functools.lru_cache(maxsize=None)
def network():
    """Return (network, Postfix, authority's certificate), made for the first who asks."""
    made = stack.enter_context(netlab.Network())
    for domain in "good.test", "bad.test":
        netlab.ZONES[domain] = "@ MX 10 mx\nmx A %s\nmta-sts A %s\n_mta-sts TXT \"v=STSv1; id=1\"" % (netlab.POSTFIX, POLICIES)
    netlab.NameServers(made)
    authority = certify("network", None)
    postfix = Postfix(made, ["good.test", "bad.test"], ["x@good.test", "x@bad.test"], certify("mx.good.test", authority))
    return made, postfix, authority


def certify(name, authority, file=None, days=30, more=()):
    """Return (certificate file, key file) for names, signed by an authority, else by itself."""
    base = str(folder / (file or name))
    openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", base + ".key", "-out", base + ".csr", "-subj", "/CN=" + name)
    extensions = Path(base + ".ext")
    names = ",".join("DNS:" + each for each in (name, *more))
    extensions.write_text("subjectAltName=%s\nbasicConstraints=CA:%s\n" % (names, "TRUE" if authority is None else "FALSE"))
    signer = ["-CA", authority[0], "-CAkey", authority[1], "-CAcreateserial"] if authority else ["-signkey", base + ".key"]
    openssl("x509", "-req", "-in", base + ".csr", "-out", base + ".crt", "-days", days, "-extfile", extensions, *signer)
    return base + ".crt", base + ".key"


def install():
    CACHE.mkdir(parents=True, exist_ok=True)
    missing = [name for name, program in DEBIAN.items() if not os.path.exists(program)]
    if missing:
        policy = Path("/usr/sbin/policy-rc.d")      # their servers must not start
        own = not policy.exists()
        if own:
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
        try:
            environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
            wait = ["-o", "DPkg::Lock::Timeout=300"]
            subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
            subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *wait, *missing], check=True,
                           env=environment)
        finally:
            if own:
                policy.unlink()
    if not (CACHE / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", CACHE], check=True)
        subprocess.run([CACHE / "bin/pip", "-q", "install", "--disable-pip-version-check", *PYPI], check=True)
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", CACHE, *NPM], check=True)
        (CACHE / "done").touch()


def judge(program, question):
    """Return the JSON that a Python program in the venv prints when it reads a question as JSON."""
    done = subprocess.run([CACHE / "bin/python", "-W", "ignore", "-c", program], input=json.dumps(question).encode(),
                          stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def openssl(*words, **more):
    return subprocess.run(["openssl", *map(str, words)], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **more).stdout


def make_keys():
    """Return {selector: key}: of all sizes and kinds of file, written by OpenSSL and by us."""
    for bits in 1024, 2048, 4096:
        openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:%d" % bits, "-out", folder / ("rsa%d.pem" % bits))
    openssl("genpkey", "-algorithm", "ed25519", "-out", folder / "ed25519.pem")
    openssl("rsa", "-traditional", "-in", folder / "rsa2048.pem", "-out", folder / "pkcs1.pem")
    (folder / "ours.pem").write_bytes(minimail.pem("PRIVATE KEY", minimail.RSAKey.generate(2048).encode()))
    return {name: minimail.read_key((folder / (name + ".pem")).read_bytes())
            for name in ("rsa1024", "rsa2048", "rsa4096", "ed25519", "pkcs1", "ours")}


# The corpus: every odd header with an ordinary body, every odd body with ordinary headers.

HEAD = b"From: Ann <ann@here.test>\r\nTo: Bob <bob@far.test>\r\nDate: Tue, 01 Sep 2026 10:00:00 +0000\r\n" \
       b"Message-ID: <1@here.test>\r\n"
SUBJECT = b"Subject: hello\r\n"
BODIES = {
    "empty": b"", "one line end": b"\r\n", "blank lines only": b"\r\n\r\n\r\n", "blanks only": b" \t \r\n  \r\n",
    "no final line end": b"hello", "no final line end, blank": b"hello \t", "trailing blanks": b"a \r\nb\t\r\n \t\r\nc  \r\n",
    "trailing blank lines": b"a\r\n\r\n \r\n\r\n", "inner blanks": b" a  b\t\tc \t d\r\n", "leading blank lines": b"\r\n\r\na\r\n",
    "8-bit": "Gr\u00fc\u00dfe, \u4f60\u597d\r\n".encode(), "latin-1": b"Gr\xfc\xdfe\r\n", "NUL": b"a\0b\r\n", "dots": b".\r\n..\r\n.a\r\n",
    "a long line": b"x" * 5000 + b"  " * 5000 + b"y\r\n", "From_": b"From here\r\n>From there\r\n",
    "large": b"0123456789 abcdef  ghij\t\r\n" * 20000 + b"\r\n" * 3000, "like a header": b"From: x\r\nDKIM-Signature: y\r\n\r\nz\r\n",
}
HEADERS = {
    "ordinary": SUBJECT, "folded": b"Subject: a\r\n b\r\n\tc\r\n  d\r\n", "folded at once": b"Subject:\r\n a\r\n",
    "blanks": b"Subject:   a  \t b   \r\n", "blank before the colon": b"Subject : a\r\n", "no blank": b"Subject:a\r\n",
    "empty": b"Subject:\r\n", "empty with blanks": b"Subject: \t \r\n", "upper case": b"SUBJECT: a\r\nCC: x@y.test\r\n",
    "twice": b"Subject: a\r\nSubject: b\r\nSubject: c\r\n", "two of many": b"To: more@far.test\r\nCc: a@b.test\r\nCc: c@d.test\r\n",
    "long": b"Subject: " + b"x" * 900 + b"\r\nReferences: " + b"\r\n ".join(b"<%d@here.test>" % n for n in range(300)) + b"\r\n",
    "8-bit": "Subject: Gr\u00fc\u00dfe\r\n".encode(), "latin-1": b"Subject: Gr\xfc\xdfe\r\n", "encoded": b"Subject: =?utf-8?q?=C3=BC?=\r\n",
    "colons": b"Subject: a: b:: c\r\n", "semicolons": b"Subject: v=1; a=b; h=from\r\n", "blank lines folded in": b"Subject: a\r\n \r\n b\r\n",
    "list": b"List-Id: <l.here.test>\r\nList-Unsubscribe: <mailto:a@here.test>\r\nList-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n",
    "mime": b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed;\r\n\tboundary=\"=_x;y\"\r\nContent-Transfer-Encoding: 8bit\r\n",
    "resent": b"Resent-From: x@y.test\r\nResent-To: z@y.test\r\nResent-Date: Tue, 01 Sep 2026 10:00:00 +0000\r\n",
    "signed already": b"DKIM-Signature: v=1; a=rsa-sha256; d=other.test; s=x; h=from; bh=AA==; b=AA==\r\n",
    "received": b"Received: from a\r\n\tby b; Tue, 01 Sep 2026 10:00:00 +0000\r\n", "unknown": b"X-Odd: \x01\x7f\r\nX_Y: 1\r\n1: 2\r\n",
}
CORPUS = {**{"body, " + name: HEAD + SUBJECT + b"\r\n" + body for name, body in BODIES.items()},
          **{"header, " + name: fields + HEAD + b"\r\nbody\r\n" for name, fields in HEADERS.items()}}


def sign(content, *selectors):
    """Return a message with a signature by each of these keys; the blocks it comes in are as odd as can be."""
    blocks = [content[start:start + 4093] for start in range(0, len(content), 4093)]
    signatures = minimail.sign_content(blocks, lambda fields: [("here.test", name, keys[name]) for name in selectors], time.time())
    return signatures + content + (b"" if content.endswith(b"\r\n") else b"\r\n")       # as it goes over the wire


class Judges(unittest.TestCase):
    """dkimpy and OpenDKIM, asked what they make of signed messages."""

    DKIMPY = """if True:
        import base64, dkim, json, sys
        messages, records = json.load(sys.stdin)
        verdicts = []
        for text in messages:
            message = base64.b64decode(text)
            try:
                verifier = dkim.DKIM(message)
            except Exception as error:
                verdicts.append([repr(error)])
                continue
            count = sum(1 for name, _ in verifier.headers if name.lower() == b"dkim-signature")
            found = []
            for index in range(count):
                try:
                    ok = dkim.DKIM(message).verify(index, dnsfunc=lambda name, timeout=5: records.get(
                        name.decode().rstrip("."), "").encode())
                except Exception as error:
                    ok = repr(error)
                found.append(ok)
            verdicts.append(found)
        print(json.dumps(verdicts))
        """

    def records(self):
        return {"%s._domainkey.here.test" % name: minimail.key_record(key) for name, key in keys.items()}

    def dkimpy(self, messages):
        """Return what dkimpy says to each signature of each message."""
        return judge(self.DKIMPY, [[base64.b64encode(message).decode() for message in messages], self.records()])

    def opendkim(self, messages):
        """Return [(result, selector)] of each message by OpenDKIM."""
        public = folder / "public"
        public.write_text("".join("%s %s\n" % item for item in self.records().items()))
        (folder / "conf").write_text("Mode v\nTestPublicKeys %s\nAlwaysAddARHeader yes\nMaximumHeaders 0\n"
                                     "MaximumSignaturesToVerify 9\n" % public)
        names = []
        for number, message in enumerate(messages):
            names.append(str(folder / ("%d.eml" % number)))
            Path(names[-1]).write_bytes(message)
        done = subprocess.run(["opendkim", "-x", folder / "conf", "-v", "-v", "-t", ",".join(names)], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)
        answers = {}
        for block in done.stdout.decode("utf-8", "replace").split("### INSHEADER")[1:]:
            for number in re.findall(r"opendkim: \S*/(\d+)\.eml: verification", block):
                answers[int(number)] = block
        return [re.findall(r"dkim=(\w+)[^;]*? header\.d=here\.test [^;]*?header\.s=(\w+)", answers.get(number, ""))
                for number in range(len(messages))]

    def verify(self, messages, selectors):
        """Both find in {name of the corpus: message} the signatures by these keys good, and no other of ours there."""
        for (name, message), found in zip(messages.items(), self.dkimpy(messages.values())):
            with self.subTest("dkimpy", name=name):
                if name == "header, blank before the colon":
                    continue                        # RFC 6376 section 3.4.2 has it deleted, dkimpy does not take it
                self.assertEqual(found[:len(selectors)], [True] * len(selectors), message[-300:])
        for name, found in zip(messages, self.opendkim(messages.values())):
            with self.subTest("OpenDKIM", name=name):
                if name == "body, NUL":
                    continue                        # where OpenDKIM's reader of test files ends
                self.assertEqual(found, [("pass", selector) for selector in selectors])


class Signatures(Judges):
    """Every message of the corpus with every key, in two sweeps; spoilt ones do not verify."""

    def both(self, selectors, names=tuple(CORPUS)):
        self.verify({name: sign(CORPUS[name], *selectors) for name in names}, selectors)

    def test_rsa_and_ed25519(self):
        """Two signatures on every message of the corpus."""
        self.both(["rsa2048", "ed25519"])

    def test_other_sizes_and_files(self):
        self.both(["rsa1024", "rsa4096", "pkcs1", "ours"], ["body, empty", "body, 8-bit", "header, long", "header, twice"])

    def test_what_was_changed_fails(self):
        message = sign(CORPUS["header, list"], "rsa2048", "ed25519")
        spoilt = [message.replace(b"body", b"bodies"), message.replace(b"Ann", b"Eve"), b"Subject: added\r\n" + message,
                  b"From: eve@evil.test\r\n" + message, message.replace(b"One-Click", b"Two-Click"), message + b"more\r\n",
                  message.replace(b"d=here.test", b"d=her.test")]
        for name, found in zip(spoilt, self.dkimpy(spoilt)):
            with self.subTest("dkimpy", name=name[:30]):
                self.assertNotIn(True, found)
        for name, found in zip(spoilt, self.opendkim(spoilt)):
            with self.subTest("OpenDKIM", name=name[:30]):
                self.assertNotIn("pass", [result for result, _ in found])

    def test_time_and_memory(self):
        """A signature by 2,048 bits costs no more than 15 ms of CPU; 64 MiB are signed in as much memory as nothing."""
        digest = hashlib.sha256(b"x").digest()
        times = []
        while len(times) < 5 or min(times) >= 0.015 and len(times) < 50:        # the machine's noise only ever adds
            began = time.process_time()
            for _ in range(4):
                keys["rsa2048"].sign(digest)
            times.append((time.process_time() - began) / 4)
        self.assertLess(min(times), 0.015)
        print("RSA 2048: %.1f ms" % (min(times) * 1000), file=sys.stderr)
        program = """if True:
            import resource, sys
            sys.path.insert(0, %r)
            import minimail
            key = minimail.read_key(open(%r, "rb").read())
            def blocks():
                yield b"From: a@here.test\\r\\n\\r\\n"
                for _ in range(int(sys.argv[1])):
                    yield b"0123456789 abcdef  ghij\\r\\n" * 2731
            minimail.sign_content(blocks(), lambda fields: [("here.test", "x", key)], 1e9)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            """ % (str(lab.REPO), str(folder / "rsa2048.pem"))
        small, large = [int(subprocess.run([sys.executable, "-c", program, count], stdout=subprocess.PIPE, check=True).stdout)
                        for count in ("1", "1024")]
        self.assertLess(large - small, 4096, "KiB more for 64 MiB")


class Trips(Judges):
    """The corpus as a node signs and sends it: every message with every key, at the end of its way."""

    KEYS = ["rsa1024", "rsa2048", "rsa4096", "ed25519"]

    @staticmethod
    def signing(*selectors):
        return [word for name in selectors for word in ("--dkim", "here.test=%s:%s" % (name, folder / (name + ".pem")))]

    def node(self, host, *options):
        """Return a node that keeps here.test, of which its clients are."""
        node = netlab.Node(network()[0], host, "--domain", "here.test", "--hostname", "mx.here.test", "--retry", "1", "--quiet", *options)
        self.addCleanup(node.__exit__, None, None, None)
        return node.__enter__()

    def peer(self, answer=lambda line: None):
        """Return the peer who keeps what comes."""
        peer = netlab.Peer(network()[0], SINK, answer)
        self.addCleanup(peer.close)
        return peer

    def send(self, node, port):
        """Send each message of the corpus to a recipient of its own."""
        with network()[0].inside(node.host), smtplib.SMTP("127.0.0.1", port, "mailer.here.test", 150) as client:
            for number, content in enumerate(CORPUS.values()):
                client.sendmail("ann@here.test", ["c%d@far.test" % number], content, ["BODY=8BITMIME"])

    def arrived(self, peer):
        """Return {name: message} for the whole corpus, as the peer got it."""
        lab.until(lambda: len(peer.messages) >= len(CORPUS), 90, "the whole corpus")
        by_recipient = {recipients[0]: content for _, recipients, content in peer.messages}
        self.assertEqual(len(peer.messages), len(by_recipient), "nothing comes twice")
        return {name: by_recipient["c%d@far.test" % number] for number, name in enumerate(CORPUS)}

    def test_through_the_queue(self):
        """Put off at first, killed, and sent by a node that has another key now: with the signatures that are in the queue."""
        later = threading.Event()
        peer = self.peer(lambda line: "451 4.2.0 come back later" if line == "." and not later.is_set() else None)
        node = self.node("a", "--route", "far.test=smtp://" + SINK, *self.signing(*self.KEYS))
        self.send(node, 25)
        lab.until(lambda: len(lab.files(node.data / "queue" / "due")) == len(CORPUS), 60, "the first attempts")
        node.cut()
        node.options = [word for word in node.options if word not in self.signing(*self.KEYS)] + self.signing("ours")
        node.start()
        later.set()
        self.verify(self.arrived(peer), self.KEYS)

    def test_through_postfix(self):
        """A Postfix on the same machine, which may rewrite headers of local mail, as smarthost."""
        peer = self.peer()
        node = self.node("mx", "--smtp", "127.0.0.1:2525", "--smarthost", "smtp://127.0.0.1", *self.signing(*self.KEYS))
        self.send(node, 2525)
        messages = self.arrived(peer)
        for message in messages.values():
            self.assertIn(b"by mx.postfix.test (Postfix)", message)
        self.verify(messages, self.KEYS)


class Keys(unittest.TestCase):
    def test_openssl_reads_ours(self):
        for key in minimail.RSAKey.generate(2048), minimail.Ed25519Key.generate(0):
            file = folder / "generated.pem"
            file.write_bytes(minimail.pem("PRIVATE KEY", key.encode()))
            openssl("pkey", "-in", file, "-check", "-noout")
            public = openssl("pkey", "-in", file, "-pubout", "-outform", "DER")
            self.assertEqual(public[-len(key.public()):], key.public())

    def test_openssl_verifies_ours(self):
        digest = hashlib.sha256(b"x").digest()
        (folder / "digest").write_bytes(digest)
        for name in "rsa1024", "rsa4096", "ours", "ed25519":
            (folder / "signature").write_bytes(keys[name].sign(digest))
            options = ["-rawin"] if name == "ed25519" else ["-pkeyopt", "digest:sha256"]
            openssl("pkeyutl", "-verify", "-inkey", folder / (name + ".pem"), "-in", folder / "digest", "-sigfile",
                    folder / "signature", *options)

    def test_files_of_all_kinds(self):
        whole = openssl("rsa", "-in", folder / "pkcs1.pem", "-text", "-traditional")     # with the numbers in words before
        self.assertEqual(minimail.read_key(whole).public(), keys["pkcs1"].public())
        for name, words in (("encrypted", ["pkcs8", "-topk8", "-in", folder / "ours.pem", "-passout", "pass:secret"]),
                            ("old", ["rsa", "-traditional", "-aes128", "-in", folder / "ours.pem", "-passout", "pass:secret"])):
            with self.subTest(name), self.assertRaisesRegex(ValueError, "passphrase"):
                minimail.read_key(openssl(*words))
        for words in (["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"], ["genpkey", "-algorithm", "X25519"],
                      ["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:512"],
                      ["genpkey", "-algorithm", "RSA-PSS", "-pkeyopt", "rsa_keygen_bits:1024"]):
            with self.subTest(words=words), self.assertRaises(ValueError):
                minimail.read_key(openssl(*words))

    def test_fuzzed(self):
        """Any change to the files of OpenSSL: a key or ValueError, and soon."""
        chance = random.Random(20261126)
        files = [(folder / (name + ".pem")).read_bytes() for name in ("rsa1024", "pkcs1", "ed25519")]
        began = time.process_time()
        for number in range(2000):
            text = chance.choice(files)
            if chance.random() < 0.5:               # in the binary form, so that it gets past base64
                data = bytearray(base64.b64decode(b"".join(text.split(b"\n")[1:-2])))
            else:
                data = bytearray(text)
            for _ in range(chance.choice([1, 2, 8])):
                at = chance.randrange(len(data)) if chance.random() < 0.5 else chance.randrange(min(40, len(data)))
                data[at:at + chance.choice([0, 1, 1, 30])] = bytes(chance.randrange(256) for _ in range(chance.choice([0, 1, 1, 5])))
            text = bytes(data) if data.startswith(b"--") else minimail.pem(chance.choice(["PRIVATE KEY", "RSA PRIVATE KEY"]), bytes(data))
            with self.subTest(number=number), contextlib.suppress(ValueError):
                minimail.read_key(text)
        self.assertLess(time.process_time() - began, 60)


class SenderRewriting(unittest.TestCase):
    """postsrsd with our secret: what one rewrites the other undoes."""

    @classmethod
    def setUpClass(cls):
        cls.srs = minimail.SRS(minimail.Config(data=str(folder), domain=("here.test",)), minimail.Storage(str(folder), False))
        cls.srs.secrets()
        cls.forward, cls.reverse = lab.free_port(), lab.free_port()
        cls.process = lab.start(["postsrsd", "-s", cls.srs.path, "-d", "here.test", "-f", str(cls.forward), "-r", str(cls.reverse), "-4"],
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lab.until(lambda: lab.accepts(cls.forward) and lab.accepts(cls.reverse), what="postsrsd")

    @classmethod
    def tearDownClass(cls):
        cls.process.kill()
        cls.process.wait()

    def ask(self, port, address):
        """Return what postsrsd makes of an address; None when it refuses."""
        with socket.create_connection(("127.0.0.1", port), 10) as sock:
            sock.sendall(b"get %s\n" % address.encode())
            code, _, text = sock.makefile("rb").readline().decode().strip().partition(" ")
        return text if code == "200" else None

    SENDERS = ["ann@far.test", "Ann.Bee@Far.Test", "a=b@far.test", "a+b@far.test", "x-y=z@sub.far.test", "o'neil@far.test",
               "SRS0=abcd=QX=other.test=eve@first.test", "SRS0+abcd=QX=other.test=eve@first.test",
               "SRS1=abcd=first.test==abcd=QX=other.test=eve@second.test"]

    def test_same_addresses(self):
        for sender in self.SENDERS:
            self.assertEqual(self.srs.forward(sender), self.ask(self.forward, sender), sender)

    def test_they_undo_ours(self):
        for sender in self.SENDERS:
            ours = self.srs.forward(sender)
            back = str(self.srs.reverse(minimail.parse_address(ours)))
            self.assertEqual(self.ask(self.reverse, ours), back)
            if not sender.upper().startswith("SRS1") and "+abcd" not in sender:
                self.assertEqual(back.lower(), sender.lower())

    def test_we_undo_theirs(self):
        for sender in self.SENDERS:
            theirs = self.ask(self.forward, sender)
            self.assertEqual(str(self.srs.reverse(minimail.parse_address(theirs))), self.ask(self.reverse, theirs))

    def test_both_refuse(self):
        good = self.srs.forward("ann@far.test")
        old = minimail.srs_forward(minimail.parse_address("ann@far.test"), "here.test", self.srs.secrets()[0], time.time() - 30 * 86400)
        for wrong in good.replace("ann", "eve"), good.replace("far", "fur"), str(old), "SRS0=aaaa=aa=far.test=ann@here.test":
            self.assertIsNone(self.ask(self.reverse, wrong))
            with self.assertRaises(minimail.Refused):
                self.srs.reverse(minimail.parse_address(wrong))


class SPF(unittest.TestCase):
    """The same records, read by pyspf and by us, for several senders."""

    ZONE = {
        "mx.t.test": {"A": ["192.0.2.1"], "AAAA": ["2001:db8::1"]}, "www.t.test": {"A": ["192.0.2.7", "192.0.2.8"]},
        "1.2.0.192.in-addr.arpa": {"PTR": ["mx.t.test", "fake.t.test"]}, "fake.t.test": {"A": ["192.0.2.99"]},
        "t.test": {"A": ["192.0.2.5"], "MX": ["mx.t.test"]}, "nomail.t.test": {"TXT": ["v=spf1 -all"]}, "text.t.test": {"TXT": ["hello"]},
        "good.t.test": {"TXT": ["v=spf1 ip4:192.0.2.1 -all"]}, "soft.t.test": {"TXT": ["v=spf1 ip4:203.0.113.0/24 ~all"]},
        "temp.t.test": "temperror", "bad.t.test": {"TXT": ["v=spf1 a:%x -all"]}, "loop.t.test": {"TXT": ["v=spf1 include:loop.t.test -all"]},
        "deep.t.test": {"TXT": ["v=spf1 " + " ".join("include:nomail.t.test" for _ in range(9)) + " include:good.t.test -all"]},
        "deeper.t.test": {"TXT": ["v=spf1 " + " ".join("include:nomail.t.test" for _ in range(10)) + " include:good.t.test -all"]},
        "ann.x.t.test": {"A": ["127.0.0.2"]}, "1.2.0.192.ip.t.test": {"A": ["127.0.0.2"]}, "many.t.test": {"MX": ["m%d.t.test" % n for n in range(11)]},
    }
    RECORDS = [
        "v=spf1", "v=spf1 -all", "v=spf1 +all", "v=spf1 ~all", "v=spf1 ?all", "v=spf1 all", "v=spf10 -all", "V=sPf1 mx -ALL", "v=spf1  mx  -all ",
        "v=spf1 ip4:192.0.2.1 -all", "v=spf1 ip4:192.0.2.0/24 -all", "v=spf1 ip4:192.0.2.0/33 -all", "v=spf1 ip4:192.0.2 -all",
        "v=spf1 ip4 -all", "v=spf1 ip6:2001:db8::/32 -all", "v=spf1 ip6:2001:db8::1 -all", "v=spf1 ip6:2001:db8::/129 -all",
        "v=spf1 ip4:192.0.2.0/00 -all", "v=spf1 -ip4:192.0.2.1 +all", "v=spf1 ?ip4:192.0.2.1 -all", "v=spf1 a:t.test -all",
        "v=spf1 a:mx.t.test -all", "v=spf1 a:www.t.test/24 -all", "v=spf1 a:mx.t.test//64 -all", "v=spf1 a:www.t.test/24//64 -all",
        "v=spf1 a:www.t.test/40 -all", "v=spf1 mx:t.test -all", "v=spf1 mx:t.test/24 -all", "v=spf1 mx:many.t.test -all", "v=spf1 mx:www.t.test -all",
        "v=spf1 a mx -all", "v=spf1 include:good.t.test -all", "v=spf1 include:nomail.t.test ~all", "v=spf1 include:soft.t.test -all",
        "v=spf1 include:text.t.test -all", "v=spf1 include:none.t.test -all", "v=spf1 include:temp.t.test -all", "v=spf1 include:bad.t.test -all",
        "v=spf1 include:loop.t.test -all", "v=spf1 include:deep.t.test -all", "v=spf1 include:deeper.t.test -all", "v=spf1 include -all",
        "v=spf1 redirect=good.t.test", "v=spf1 redirect=nomail.t.test", "v=spf1 redirect=none.t.test", "v=spf1 redirect=good.t.test -all",
        "v=spf1 redirect=good.t.test redirect=good.t.test", "v=spf1 redirect=temp.t.test", "v=spf1 exists:t.test -all", "v=spf1 exists:none.t.test -all",
        "v=spf1 exists:%{l}.x.t.test -all", "v=spf1 exists:%{ir}.ip.t.test -all", "v=spf1 a:%{d2}.t.test -all", "v=spf1 exists:%{l1r-}.x.%{d1r}.test -all",
        "v=spf1 exists:%%.t.test -all", "v=spf1 ptr -all", "v=spf1 ptr:t.test -all", "v=spf1 ptr:fake.t.test -all", "v=spf1 exp=e.t.test a:mx.t.test -all",
        "v=spf1 unknown=x a:mx.t.test -all", "v=spf1 foo -all", "v=spf1 foo:bar -all", "v=spf1 -all ip4:192.0.2.1", "v=spf1 a: -all", "v=spf1 mx/ -all",
        "v=spf1 a:none1.t.test a:none2.t.test a:mx.t.test -all", "v=spf1 a:none1.t.test a:none2.t.test a:none3.t.test a:mx.t.test -all",
        "v=spf1 include:temp.t.test", "v=spf1 a:mx.t.test/0 -all", "v=spf1 ip4:0.0.0.0/0 -all", "v=spf1 all:x", "v=spf1 all/8", "v=spf1 a:%{q}.t.test -all",
        "v=spf1 =x -all", "v=spf1 -exp=x a:mx.t.test", "v=spf1 ip6:::1/0 -all", "v=spf1 a:mx.t.test-all", "v=spf1 " + "a:mx.t.test " * 11 + "-all",
    ]
    HOSTS = ["192.0.2.1", "192.0.2.99", "2001:db8::1", "203.0.113.5"]
    PYSPF = """if True:
        import json, spf, sys
        zone, questions = json.load(sys.stdin)
        def lookup(name, type, strict=True, timeout=20):
            name = name.lower().rstrip(".")
            found = zone.get(name, {})
            if found == "temperror":
                raise spf.TempError("DNS")
            return [((name, type), (10, text) if type == "MX" else (text.encode(),) if type == "TXT" else
                     __import__("ipaddress").ip_address(text).packed if type in ("A", "AAAA") and False else text)
                    for text in found.get(type, [])]
        spf.DNSLookup = lookup
        print(json.dumps([spf.query(i=host, s="ann@" + domain, h="helo.t.test", strict=True, timeout=0).check()[0]
                          for host, domain in questions]))
        """

    def test_table(self):
        zone = dict(self.ZONE, **{"q%d.t.test" % number: {"TXT": [record]} for number, record in enumerate(self.RECORDS)})
        zone.update({"m%d.t.test" % n: {"A": ["192.0.2.%d" % (100 + n)]} for n in range(12)})

        def lookup(name, type):
            found = zone.get(name.lower().rstrip("."), {})
            if found == "temperror":
                raise minimail.DNSFailure("no answer")
            if not found:
                raise minimail.NoSuchDomain(name)
            return found.get(type, [])
        questions = [(host, domain) for host in self.HOSTS for domain in
                     ["q%d.t.test" % number for number in range(len(self.RECORDS))] + ["none.t.test", "temp.t.test", "t.test"]]
        theirs = judge(self.PYSPF, [zone, questions])
        different = []
        for (host, domain), their in zip(questions, theirs):
            spf = minimail.SPF(lookup, host, "ann@" + domain, "helo.t.test")
            ours = spf.check(domain)
            if ours != their:
                different.append((host, zone.get(domain), "ours", ours, spf.reason, "pyspf", their))
        self.assertEqual(different, [], "\n".join(map(str, different)))


class Reports(unittest.TestCase):
    """Reports about mail that failed, read by three programs that look for bounces."""

    FAILED = [{"address": "bob@far.test", "last_reply": "mx.far.test[192.0.2.25]:25 said: 550 5.1.1 no such user here", "remote": "mx.far.test",
               "orcpt": "rfc822;robert@far.test"},
              {"address": "eve@gone.test", "last_reply": "550 5.1.2 no such domain: gone.test"}]
    FLUFL = """if True:
        import base64, email, json, sys
        from flufl.bounce import all_failures
        print(json.dumps([[sorted(address.decode() for address in group) for group in all_failures(
            email.message_from_bytes(base64.b64decode(text)))] for text in json.load(sys.stdin)]))
        """
    NODE = """
        const fs = require("fs");
        const texts = JSON.parse(fs.readFileSync(0)).map(text => Buffer.from(text, "base64"));
        (async () => { const found = []; for (const text of texts) found.push(await read(text)); console.log(JSON.stringify(found)); })();
        """

    def report(self, recipients, full=False, sender="ann@here.test"):
        original = b"From: ann@here.test\r\nTo: bob@far.test\r\nSubject: hello\r\nMessage-ID: <1@here.test>\r\n"
        report = minimail.Report("mx.here.test", sender, "1-2-3", time.time() - 60, time.time(), "QQ314159", time.time() + 1e5, full)
        return b"".join(minimail.report_message(report, recipients, original + (b"\r\nbody\r\n" if full else b"")))

    def node(self, read, messages):
        done = subprocess.run(["node", "-e", read + self.NODE], stdout=subprocess.PIPE, check=True, cwd=CACHE,
                              input=json.dumps([base64.b64encode(message).decode() for message in messages]).encode())
        return json.loads(done.stdout)

    def messages(self):
        delayed = [dict(recipient, action="delayed", last_reply="451 4.4.1 cannot connect") for recipient in self.FAILED]
        return [self.report(self.FAILED), self.report(self.FAILED, True), self.report(self.FAILED[1:]), self.report(delayed)]

    def test_flufl_bounce(self):
        whole, full, one, delayed = judge(self.FLUFL, [base64.b64encode(message).decode() for message in self.messages()])
        self.assertEqual(whole, [[], ["eve@gone.test", "robert@far.test"]])     # as the sender knew them
        self.assertEqual(full, whole)
        self.assertEqual(one, [[], ["eve@gone.test"]])
        self.assertEqual(delayed, [["eve@gone.test", "robert@far.test"], []])

    def test_baunsu(self):
        read = 'const Baunsu = require("baunsu"); const read = text => new Baunsu().detectSync(text);'
        whole, full, one, delayed = self.node(read, self.messages())
        for found in whole, full:
            self.assertEqual((found["bounced"], found["action"], found["finalRecipient"], found["status"]["code"]),
                             (True, "failed", "bob@far.test", "5.1.1"))
        self.assertEqual((one["finalRecipient"], one["status"]["code"]), ("eve@gone.test", "5.1.2"))
        self.assertEqual((delayed["action"], delayed["status"]["class"]["code"]), ("delayed", 4))

    def test_email_bounce_parser(self):
        read = 'const Parser = require("email-bounce-parser"); const read = text => new Parser().read(text.toString());'
        whole, full, one, _ = self.node(read, self.messages())
        for found in whole, full:
            self.assertEqual((found["bounce"], found["data"]["recipient"]), (True, "bob@far.test"))
            self.assertEqual(found["data"]["error"]["code"], {"basic": "550", "enhanced": "5.1.1"})
        self.assertEqual((one["bounce"], one["data"]["recipient"]), (True, "eve@gone.test"))


class PolicyServer:
    """An HTTPS server on the loopback device that answers every request with what `answer` says."""

    def __init__(self, certificate, address="127.0.0.1", port=0):
        self.answer = b""
        self.asked = []
        self.slow = False
        self.polite = True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append((self.headers["Host"], self.path))
                self.close_connection = True
                with contextlib.suppress(OSError):
                    if outer.slow:
                        for byte in outer.answer:
                            self.wfile.write(bytes([byte]))
                            time.sleep(0.05)
                    self.wfile.write(outer.answer)
                    if outer.polite:
                        self.connection.unwrap()    # says that this is all, as RFC 8446 section 6.1 wants it

            def log_message(self, *_):
                pass
        self.server = http.server.ThreadingHTTPServer((address, port), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # clients that do not trust us hang up
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Policies(unittest.TestCase):
    """MTA-STS from an HTTPS server whose authority is made here, and from servers that nobody should trust."""

    POLICY = b"version: STSv1\r\nmode: enforce\r\nmx: mx.far.test\r\nmax_age: 86400\r\n"
    OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"

    @classmethod
    def setUpClass(cls):
        cls.authority = certify("authority", None)
        cls.good = certify("mta-sts.far.test", cls.authority)
        cls.other = certify("mta-sts.other.test", cls.authority)
        cls.selfmade = certify("mta-sts.far.test", None, "selfmade")
        cls.late = certify("mta-sts.far.test", cls.authority, "late", days=-1)
        before = os.environ.get("SSL_CERT_FILE")
        os.environ["SSL_CERT_FILE"] = cls.authority[0]
        cls.addClassCleanup(lambda: os.environ.update(SSL_CERT_FILE=before) if before else os.environ.pop("SSL_CERT_FILE"))

    def fetch(self, answer, certificate=None, slow=False, polite=True):
        """Return (policy or the error, server) for what an HTTPS server answers."""
        server = PolicyServer(certificate or self.good)
        self.addCleanup(server.close)
        server.answer, server.slow, server.polite = answer, slow, polite
        resolver = minimail.Zone({"mta-sts.far.test": ["A 127.0.0.1"], "_mta-sts.far.test": ["TXT v=STSv1; id=1"]}).resolver()
        sts = minimail.STS(str(folder), resolver, lambda path, data: None, port=server.port)
        try:
            return sts.fetch("far.test", "1"), server
        except (OSError, ValueError) as error:
            return error, server

    def test_fetched(self):
        for answer in (self.OK + b"\r\n" + self.POLICY, self.OK + b"Content-Length: %d\r\n\r\n" % len(self.POLICY) + self.POLICY,
                       self.OK + b"Content-Length: %d\r\nConnection: keep-alive\r\n\r\n" % len(self.POLICY) + self.POLICY):
            policy, server = self.fetch(answer)
            self.assertEqual((policy.mode, policy.mx, policy.max_age), ("enforce", ["mx.far.test"], 86400))
            self.assertEqual(server.asked, [("mta-sts.far.test", "/.well-known/mta-sts.txt")])

    def test_who_is_not_trusted(self):
        for certificate in self.other, self.selfmade, self.late:
            found, server = self.fetch(self.OK + b"\r\n" + self.POLICY, certificate)
            self.assertIsInstance(found, ssl.SSLError)
            self.assertEqual(server.asked, [])

    def test_answers_that_are_no_policy(self):
        for answer in (b"HTTP/1.1 301 Moved\r\nLocation: https://mta-sts.far.test/\r\n\r\n" + self.POLICY, b"HTTP/1.1 404 No\r\n\r\n", b"",
                       self.POLICY, self.OK + b"\r\n", self.OK + b"\r\n" + self.POLICY + b"x" * (1 << 20), self.OK + b"A: b\r\n" * 100_000,
                       self.OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nvers\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"x" * 300_000,
                       self.OK + b"Content-Length: 5\r\n\r\n" + self.POLICY):
            found, _ = self.fetch(answer)
            self.assertIsInstance(found, (OSError, ValueError), answer[:50])

    def test_an_answer_that_is_cut(self):
        """Without a length, only the end of TLS tells that nobody cut it."""
        found, _ = self.fetch(self.OK + b"\r\n" + self.POLICY, polite=False)
        self.assertIsInstance(found, OSError)
        found, _ = self.fetch(self.OK + b"Content-Length: 1000\r\n\r\n" + self.POLICY)
        self.assertIsInstance(found, ValueError)
        policy, _ = self.fetch(self.OK + b"Content-Length: %d\r\n\r\n" % len(self.POLICY) + self.POLICY, polite=False)
        self.assertEqual(policy.mode, "enforce")

    def test_who_takes_his_time(self):
        """Byte by byte: each comes in time, all together do not."""
        began = time.monotonic()
        with unittest.mock.patch.object(minimail, "STS_TIMEOUT", 1.0):
            found, _ = self.fetch(self.OK + b"\r\n" + self.POLICY * 5, slow=True)
        self.assertIsInstance(found, OSError)
        self.assertLess(time.monotonic() - began, 8)


class PoliciesOfANode(unittest.TestCase):
    """What a node does with MTA-STS: good.test and bad.test have the same policy and, under two names, the same Postfix, whose
    certificate is for the first name only."""

    POLICY = b"version: STSv1\r\nmode: enforce\r\nmx: mx.good.test\r\nmx: mx.bad.test\r\nmax_age: 86400\r\n"
    OLD = json.dumps({"id": "0", "mode": "testing", "mx": ["mx.bad.test"], "max_age": 604800, "fetched_at": time.time() - 3600}).encode()

    @classmethod
    def setUpClass(cls):
        cls.network, cls.postfix, cls.authority = network()
        cls.certificate = certify("mta-sts.good.test", cls.authority, more=["mta-sts.bad.test"])

    def setUp(self):
        self.before = self.postfix.stored("x@bad.test")

    def server(self):
        """Return the HTTPS server of both domains."""
        with self.network.inside("peer"):
            server = PolicyServer(self.certificate, POLICIES, 443)
        self.addCleanup(server.close)
        server.answer = Policies.OK + b"\r\n" + self.POLICY
        return server

    def node(self, **more):
        """Return a node, not started yet, that has all the time in the world for its next attempt."""
        return netlab.Node(self.network, "q", "--domain", "q.test", "--hostname", "mx.q.test", "--retry", "3600",
                           SSL_CERT_FILE=self.authority[0], **more)

    def send(self, subject, *recipients):
        with self.network.inside("q"), smtplib.SMTP("127.0.0.1", 25, "mailer.q.test", 150) as client:
            client.sendmail("ann@q.test", recipients, "From: ann@q.test\r\nSubject: %s\r\n\r\nx\r\n" % subject)

    def has(self, recipient, subject):
        """Return whether Postfix has a message."""
        return any(b"Subject: %s\n" % subject.encode() in content for content in self.postfix.stored(recipient))

    def assert_refused(self, node, times):
        """Wait until so many attempts were made for bad.test, over all starts: the policy has forbidden each of them."""
        attempts = lab.until(lambda: re.findall(r"deferred .* recipient=x@bad\.test .*", node.log())[times - 1:], 30, "an attempt")
        for attempt in attempts:
            self.assertRegex(attempt, 'reply="451 4.7.5 .*the MTA-STS policy of bad.test asks for TLS that is verified')
        self.assertEqual(self.postfix.stored("x@bad.test"), self.before)

    def start_later(self, node, days):
        """Start a node on a machine whose clock is so many days ahead."""
        node.environment = dict(node.environment, LD_PRELOAD=str(FAKETIME), FAKETIME="+%dd" % days, NO_FAKE_STAT="1",
                                FAKETIME_DONT_FAKE_MONOTONIC="1")
        node.start()

    @unittest.skipUnless(FAKETIME, "libfaketime is not installed: run .ci/install.sh first")
    def test_kept_until_it_is_too_old(self):
        """enforce with a wrong certificate: not sent; nor after a restart, when the HTTPS server is gone; until max_age."""
        server = self.server()
        with self.node() as node:
            self.send("first", "x@good.test", "x@bad.test")
            lab.until(lambda: self.has("x@good.test", "first"), 30, "what may be sent")
            self.assert_refused(node, 1)
            self.assertEqual(sorted(host for host, _ in server.asked), ["mta-sts.bad.test", "mta-sts.good.test"])
            node.stop()
            server.close()
            node.start()
            self.send("second", "x@good.test", "x@bad.test")
            lab.until(lambda: self.has("x@good.test", "second"), 30, "what may be sent after a restart")
            self.assert_refused(node, 2)
            node.stop()
            server = self.server()
            self.start_later(node, 2)
            self.send("third", "x@bad.test")
            self.assert_refused(node, 3)
            self.assertEqual(set(server.asked), {("mta-sts.bad.test", "/.well-known/mta-sts.txt")}, "asked again")
            node.stop()
            server.close()
            self.start_later(node, 4)
            self.send("fourth", "x@bad.test")
            lab.until(lambda: self.has("x@bad.test", "fourth"), 30, "what no policy holds for any more")

    # A node that dies just before its n-th step of keeping a policy (0: never); what it writes takes more than one.
    KILLER = """if True:
        import os, signal, sys, threading
        number, sys.argv = int(sys.argv[1]), sys.argv[3:]
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        import minimail
        here, steps = threading.local(), []

        def counted(name, function):
            def call(*arguments, **more):
                if getattr(here, "keeping", False):
                    steps.append(name)
                    if len(steps) == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if name == "write" and len(arguments[1]) > 100:
                        arguments = arguments[0], arguments[1][:len(arguments[1]) // 2]
                return function(*arguments, **more)
            return call
        for name in "open", "write", "fsync", "fdatasync", "replace", "rename", "link", "unlink", "close", "mkdir":
            setattr(os, name, counted(name, getattr(os, name)))
        keep = minimail.STS.keep

        def kept(*arguments):
            here.keeping = True
            keep(*arguments)
            here.keeping = False
            print("kept by", *steps, file=sys.stderr)
        minimail.STS.keep = kept
        sys.exit(minimail.main(sys.argv[1:]))
        """

    def killed_at(self, step, old):
        """Let a node be killed at a step and start it again; return whether there is such a step."""
        def before(data):
            if old:
                (data / "mta-sts").mkdir(0o700)
                (data / "mta-sts" / "bad.test").write_bytes(old)
        def wrapper(number):
            return [sys.executable, "-X", "pycache_prefix=%s" % folder, "-c", self.KILLER, str(number)]
        with self.node(before=before, wrapper=wrapper(step)) as node:
            file = node.data / "mta-sts" / "bad.test"
            self.send("killed", "x@bad.test")
            lab.until(lambda: node.process.poll() is not None or "kept by" in node.log(), 30, "its death")
            killed = node.process.poll() is not None
            if killed:
                content = file.read_bytes() if file.exists() else None
                self.assertTrue(content == old or self.is_whole(content), content)
                node.cut()
                node.wrapper = wrapper(0)
                node.start()
            self.assert_refused(node, 1)
            self.assertTrue(self.is_whole(file.read_bytes()))
            self.assertEqual(os.listdir(str(file.parent)), ["bad.test"], "nothing half written is left")
        return killed

    @staticmethod
    def is_whole(content):
        """Return whether a file is what the HTTPS server told."""
        try:
            found = json.loads(content)
        except ValueError:
            return False
        return [found[name] for name in ("id", "mode", "mx", "max_age")] == ["1", "enforce", ["mx.good.test", "mx.bad.test"], 86400]

    def test_killed_at_every_step(self):
        """kill -9 while a policy is written, the first one or a newer one: the file is whole or as before, and soon obeyed."""
        self.server()
        for old in None, self.OLD:
            steps = 0
            while self.killed_at(steps + 1, old):
                steps += 1
            print("%d steps of keeping a policy" % steps, file=sys.stderr)
            self.assertGreater(steps, 6, "fewer steps than a durable write has")



if __name__ == "__main__":
    unittest.main()
