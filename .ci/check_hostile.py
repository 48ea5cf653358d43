"""What a stranger's message, query or line costs: no more than it weighs.

    python3 .ci/check_hostile.py [-v] [Class[.test]]
    FUZZ_SEED=7 FUZZ_SHAPES=200 python3 .ci/check_hostile.py Costs.test_made_up

A shape is a function of n that returns about n bytes. Each is sent, listed, searched, viewed, fetched and asked for at n
and at 4n: CPU and memory may grow as the shape does, with a margin, and no other client waits for it. The patterns of
the file and of its page meet strings that are derived from themselves.
"""
# time limit: 300
import ast
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import sys
import time
import unittest
import urllib.parse

import check_fair
import check_web
import lab

try:
    from re import _parser as parser
except ImportError:                     # before Python 3.11
    import sre_parse as parser

SMALL = 48 << 10                        # n, in bytes
TIMES = 4
MARGIN = 2                              # linear is 4 times as much for 4n; quadratic is 16 times
CPU_FLOOR = 0.02                        # seconds: less is noise
MEMORY = 24                             # bytes held for a byte of a message, while it is looked at, and ...
MEMORY_FLOOR = 24 << 20                 # ... what the node may take beside that
SEED = int(os.environ.get("FUZZ_SEED", "11"))
MADE_UP = int(os.environ.get("FUZZ_SHAPES", "24"))


# Shapes: each a function of n

def header(name, unit, before=b"", after=b""):
    """A header field that repeats `unit`."""
    first = b"Subject: shape\r\n" if name != b"Subject" else b""
    return lambda n: first + name + b": " + before + unit * (n // len(unit)) + \
        after + b"\r\n\r\nbody\r\n"


def headers(line):
    """A header of many lines; %d is their number."""
    return lambda n: b"".join(line % i if b"%d" in line else line for i in range(n // len(line))) + b"\r\nbody\r\n"


def body(unit, type=b"text/plain", before=b"", after=b"", more=b""):
    """A body that repeats `unit`."""
    return lambda n: b"Subject: shape\r\nMIME-Version: 1.0\r\nContent-Type: " + type + b"\r\n" + more + b"\r\n" + before + \
        unit * (n // len(unit)) + after + b"\r\n"


def nested(n):
    """Multiparts within multiparts."""
    depth = n // 75
    begin = b"".join(b'Content-Type: multipart/mixed; boundary="b%d"\r\n\r\n--b%d\r\n' % (i, i) for i in range(depth))
    return b"MIME-Version: 1.0\r\n" + begin + b"\r\nx\r\n"


def attached(n):
    """Parts side by side, each with a name of its own."""
    part = b'--b\r\nContent-Type: image/png; name="%06d.png"\r\nContent-ID: <c%06d>\r\n\r\nx\r\n'
    return b"MIME-Version: 1.0\r\nContent-Type: multipart/related; boundary=b\r\n\r\n" + \
        b"".join(part % (i, i) for i in range(n // len(part))) + b"--b--\r\n"


def cids(n):
    """An image that is shown again and again."""
    return b"MIME-Version: 1.0\r\nContent-Type: multipart/related; boundary=b\r\n\r\n--b\r\n" + \
        b"Content-Type: text/html\r\n\r\n" + \
        b'<img src="cid:a">' * (n // 34) + b"\r\n--b\r\nContent-Type: image/png\r\nContent-ID: <a>\r\n\r\n" + \
        b"x" * (n // 2) + b"\r\n--b--\r\n"


def charsets(n):
    """Encoded words, each in a charset that nobody knows."""
    return b"Subject: " + b"\r\n ".join(b"=?x-%06d?q?a?=" % i for i in range(n // 20)) + b"\r\n\r\nx\r\n"


SHAPES = {
    "encoded words that do not end": header(b"Subject", b"=?a?q?x"),
    "encoded words": header(b"Subject", b"=?utf-8?b?YWJj?= "),
    "half an encoded word": header(b"Subject", b"x", b"=?utf-8?q?"),
    "question marks": header(b"Subject", b"?="),
    "blanks": header(b"Subject", b" ", b"x", b"x"),
    "folded lines": header(b"Subject", b"\r\n x"),
    "folded blanks": header(b"Subject", b"\r\n  "),
    "charsets": charsets,
    "addresses": header(b"To", b"a@b.example, "),
    "groups": header(b"To", b"a:b;,"),
    "open groups": header(b"To", b"a:b"),
    "parentheses": header(b"To", b"("),
    "closed parentheses": header(b"To", b"()"),
    "quotes": header(b"To", b'"'),
    "angles": header(b"To", b"<"),
    "routes": header(b"To", b"<@a,@b:c@d>"),
    "backslashes": header(b"To", b'\\"', b'"'),
    "ats": header(b"To", b"@"),
    "dots": header(b"From", b"."),
    "parameters": header(b"Content-Type", b'; a="b"', b"text/plain"),
    "quotes in parameters": header(b"Content-Type", b'";', b'text/plain; name="'),
    "continued parameters": lambda n: b"Content-Disposition: attachment" + b"".join(
        b";\r\n name*%d*=a%%20" % i for i in range(n // 20)) + b"\r\n\r\nx\r\n",
    "a boundary": header(b"Content-Type", b"b", b'multipart/mixed; boundary="', b'"'),
    "names without a colon": headers(b"x\r\n"),
    "many fields": headers(b"X-%d: y\r\n"),
    "many Received": headers(b"Received: x\r\n"),
    "colons": headers(b":\r\n"),
    "references": header(b"References", b"<a@b> "),
    "date": header(b"Date", b"1 "),
    "tags": header(b"X-Tags", b"a,"),
    "unsubscribe": header(b"List-Unsubscribe", b"<mailto:a>,"),
    "multiparts in multiparts": nested,
    "parts": attached,
    "delimiters": body(b"--b\r\n", b"multipart/mixed; boundary=b"),
    "almost delimiters": body(b"--", b"multipart/mixed; boundary=b"),
    "messages in messages": body(b"Content-Type: message/rfc822\r\n\r\n", b"message/rfc822"),
    "an image again and again": cids,
    "line ends": body(b"\r\n"),
    "carriage returns": body(b"\r"),
    "punycode": body(b"a-", b"text/plain; charset=punycode"),
    "UTF-7": body(b"+AG", b"text/plain; charset=utf-7"),
    "escapes": body(b"\x1b$B", b"text/plain; charset=iso-2022-jp"),
    "base64 of nothing": body(b"=", more=b"Content-Transfer-Encoding: base64\r\n"),
    "quoted-printable blanks": body(b" ", more=b"Content-Transfer-Encoding: quoted-printable\r\n"),
    "quoted-printable": body(b"=\r\n", more=b"Content-Transfer-Encoding: quoted-printable\r\n"),
    "format flowed": body(b"> \r\n", b"text/plain; format=flowed; delsp=yes"),
    "quotations": body(b">"),
    "links": body(b"http://a.example "),
    "a long link": body(b"a.", before=b"http://"),
    "ats in text": body(b"a@"),
    "HTML: open tags": body(b"<a", b"text/html"),
    "HTML: nested": body(b"<b>", b"text/html"),
    "HTML: tables": body(b"<table><tr><td>", b"text/html"),
    "HTML: attributes": body(b" a=b", b"text/html", b"<p", b">"),
    "HTML: quotes": body(b"<a b='", b"text/html"),
    "HTML: comments": body(b"<!--", b"text/html"),
    "HTML: almost comments": body(b"<!-- --", b"text/html"),
    "HTML: entities": body(b"&amp;", b"text/html"),
    "HTML: open entities": body(b"&", b"text/html"),
    "HTML: scripts": body(b"<script>", b"text/html"),
    "HTML: styles": body(b"<style>a{", b"text/html"),
    "HTML: urls": body(b"url(", b"text/html", b"<p style='", b"'>"),
    "HTML: sources": body(b"<img src=cid:", b"text/html"),
    "HTML: blanks": body(b" ", b"text/html", b"<a", b">"),
    "HTML: slashes": body(b"</", b"text/html"),
    "HTML: metas": body(b"<meta charset", b"text/html"),
    "HTML: doctypes": body(b"<!doctype ", b"text/html"),
    "calendar": body(b'A;B="c":d\r\n', b"text/calendar; method=REQUEST", b"BEGIN:VCALENDAR\r\n"),
    "calendar folds": body(b"\r\n ", b"text/calendar; method=REQUEST", b"BEGIN:VCALENDAR\r\nSUMMARY:"),
    "uuencoded": body(b"begin 644 a\r\n"),
    "8-bit": body(b"\xff\xfe", b"text/plain; charset=utf-16"),
}

QUERIES = {
    "words": "a ", "phrases": '"a" ', "open quotes": '"', "negations": "-", "colons": "from:", "operators": "subject:x ",
    "texts": "text:zz ", "wildcards": "*", "dates": "before:2020-01-01 ", "headers": "header:X=y ", "parentheses": "(",
    "escapes": "%5C", "wide": "\U0001f600",
}


# Shapes that nobody thought of

WORDS = {
    "header": ["=?", "?=", "?q?", "?b?", "utf-8", "iso-2022-jp", " ", "\t", "\r\n ", '"', "\\", "(", ")", "<", ">", "@", ",",
               ";", ":", ".", "=", "*", "'", "%", "a", "b.example", "a@b.example", "*0*", "name", "boundary", "\x7f",
               "\u00e9", "[", "]",
               "0", "1 Jan"],
    "html": ["<", ">", "/", "=", '"', "'", "<a", "</a>", "<p>", "<!--", "-->", "<![CDATA[", "]]>", "<style>", "</style>",
             "<script", "<svg>", "<math>", "<template>", "<select>", "href=", "src=", "style=", "cid:a", "url(", ")",
             "&", "&#", "&lt;",
             ";", " ", "http://a", "<table>", "<td>", "<form>", "<base ", "<meta ", "<link ", "\n", "\0", "@import"],
    "text": ["http://", "www.", "a.example", "@", ">", "> ", "\r\n", " ", "-- \r\n", "=\r\n", "=3D", "=", "+AG", "\x1b$B",
             "\x1b(B", "--b", "--b\r\n", "--b--", "begin 644 a\r\n", "end\r\n", "From ", ".", "\r", "\t", "(", ")", "<", ">"],
}
FIELDS = ["Subject", "From", "To", "Cc", "Reply-To", "Date", "Message-ID", "References", "Content-Type", "Content-Disposition",
          "Content-ID", "Content-Transfer-Encoding", "List-Unsubscribe", "Received", "X-Tags", "MIME-Version", "Resent-To"]
TYPES = ["text/plain", "text/html", "text/plain; format=flowed", "text/calendar", "multipart/mixed; boundary=b",
         "message/rfc822", "multipart/alternative; boundary=b", "text/html; charset=iso-2022-jp",
         "text/x-unknown; charset=utf-7"]
ENCODINGS = ["7bit", "8bit", "quoted-printable", "base64", "x-uuencode"]


def made_up(chance):
    """Return (what it is, shape): something repeated, somewhere in a message."""
    kind = chance.choice(sorted(WORDS))
    unit = "".join(chance.choice(WORDS[kind]) for _ in range(chance.randint(1, 4)))
    before = "".join(chance.choice(WORDS[kind]) for _ in range(chance.randint(0, 3)))
    after = "".join(chance.choice(WORDS[kind]) for _ in range(chance.randint(0, 2)))
    pieces = [piece.encode() for piece in (unit, before, after)]
    if kind == "header":
        field = chance.choice(FIELDS)
        return "%s: %r + %r... + %r" % (field, before, unit, after), header(field.encode(), *pieces)
    type = "text/html" if kind == "html" else chance.choice(TYPES)
    encoding = chance.choice(ENCODINGS)
    return "%s, %s: %r + %r... + %r" % (type, encoding, before, unit, after), body(
        pieces[0], type.encode(), *pieces[1:], more=b"Content-Transfer-Encoding: %s\r\n" % encoding.encode())


# What they cost

class Costs(unittest.TestCase):

    maxDiff = None

    @classmethod
    def setUpClass(cls):
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        cls.node = stack.enter_context(lab.Node("--web", "127.0.0.1:0", "--no-sync", "--max-size", "20M"))
        cls.web = cls.node.listening["web"][0]
        cls.clock = (~cls.node.process.pid << 3) | 2    # the CPU clock of another process (clock_getcpuclockid(3))
        cls.serial = 0
        cls.worst = {}
        for _ in range(3):                          # what is imported at first use is no shape's fault
            cls("test_shapes").costs(body(b"an ordinary line of text\r\n")(SMALL))

    @classmethod
    def tearDownClass(cls):
        lines = ["%-8s %5.2f s  %s" % (entrance, seconds, name) for entrance, (seconds, name) in cls.worst.items()]
        print("\nthe dearest of %d kB:\n%s" % (TIMES * SMALL >> 10, "\n".join(lines)), file=sys.stderr)

    # The entrances.

    def get(self, path, method="GET", given=None):
        connection = http.client.HTTPConnection(*self.web, timeout=150)
        try:
            connection.request(method, path, given)
            answer = connection.getresponse()
            data = answer.read()
            self.assertIn(answer.status, (200, 400, 404, 413, 414, 431), (path[:80], data[:300]))
            return data
        finally:
            connection.close()

    def deliver(self, content):
        """Send a message to a mailbox of its own; return the address."""
        type(self).serial += 1
        address = "box%d@a.test" % self.serial
        content = re.sub(rb"(?m)^\.", b"..", content)
        with check_fair.Client(self.node.smtp) as client:
            for line in ("EHLO x", "MAIL FROM:<a@b.example>", "RCPT TO:<%s>" % address, "DATA"):
                client.ask(line)
            client.send(content + b"\r\n.\r\n")
            answer = client.reply()
        self.assertRegex(answer, rb"^(250|554 5.4.6)", content[:100])
        return address if answer.startswith(b"250") else None

    def fetch(self, address):
        with check_fair.Client(self.node.pop3) as client:
            client.ask("USER " + address)
            client.ask("PASS x")
            for command in (b"TOP 1 5", b"RETR 1"):
                client.send(command + b"\r\n")
                client.answer()
            client.ask("QUIT")

    def costs(self, content):
        """Return {entrance: (seconds of CPU, bytes of memory at the peak)} for a message; it is gone afterwards."""
        address, found = None, {}

        def ask(name, function):
            nonlocal address
            with open("/proc/%d/clear_refs" % self.node.process.pid, "w") as file:
                file.write("5")                     # the peak begins here
            before, began = self.memory("VmRSS"), time.clock_gettime(self.clock)
            value = function()
            found[name] = time.clock_gettime(self.clock) - began, self.memory("VmHWM") - before
            return value
        address = ask("SMTP", lambda: self.deliver(content))
        if address:
            ask("list", lambda: self.get("/api/v1/messages?limit=50"))
            ask("search", lambda: self.get("/api/v1/search?query=" + urllib.parse.quote("text:zzzz subject:yyy to:box")))
            ask("view", lambda: (self.get("/view/latest.html"), self.get("/view/latest.txt")))
            data = ask("API", lambda: self.get("/api/v1/message/latest"))
            id = json.loads(data)["ID"]
            ask("parts", lambda: [self.get("/api/v1/message/%s/%s" % (id, what)) for what in (
                "headers", "raw", "session", "part/1", "part/2", "html-check", "link-check")])
            ask("POP3", lambda: self.fetch(address))
            self.get("/api/v1/messages", "DELETE")
        return found

    def memory(self, name):
        with open("/proc/%d/status" % self.node.process.pid) as file:
            return int(re.search(name + r":\s*(\d+)", file.read()).group(1)) << 10

    # What is asserted.

    def problems(self, name, shape):
        """Return what grows faster than a shape does."""
        small, large = shape(SMALL), shape(TIMES * SMALL)
        growth = max(1.0, len(large) / max(1, len(small)))
        found = []
        few, many = self.costs(small), self.costs(large)
        for entrance in set(few) & set(many):
            (seconds, _), (more, peak) = few[entrance], many[entrance]
            if more > self.worst.get(entrance, (0.0, ""))[0]:
                self.worst[entrance] = more, name
            if more > MARGIN * growth * max(CPU_FLOOR, seconds):
                found.append("%s: %s: %.3f s of CPU for %d kB, %.3f s for %d kB" % (
                    name, entrance, seconds, len(small) >> 10, more, len(large) >> 10))
            if peak > MEMORY * len(large) + MEMORY_FLOOR:
                found.append("%s: %s: %d MB of memory for a message of %d kB" % (name, entrance, peak >> 20, len(large) >> 10))
        return found

    def check(self, shapes):
        """No shape costs more than it weighs, twice over: what the machine's noise did once it will not do again."""
        found = []
        for name, shape in shapes:
            with contextlib.suppress(IndexError):
                if self.problems(name, shape):
                    found += self.problems(name, shape)
        self.assertEqual(found, [], "\n" + "\n".join(found))
        self.assertNotIn("Traceback", self.node.log())

    def test_shapes(self):
        self.check(SHAPES.items())

    def test_made_up(self):
        """Shapes from the grammar of headers, encoded words, MIME and HTML, by chance."""
        chance = random.Random(SEED)
        self.check([made_up(chance) for _ in range(MADE_UP)])

    def test_queries(self):
        """A search costs what it and the mail weigh, whatever is asked for."""
        for number in range(20):
            self.deliver(body(b"an ordinary line of text\r\n")(5000 + number))
        found = []
        for name, unit in QUERIES.items():
            for path in ("/api/v1/search?query=", "/api/v1/wait?timeout=0.01&query="):
                for _ in range(2):
                    costs = []
                    for size in (3000, 12000):
                        began = time.clock_gettime(self.clock)
                        self.get(path + urllib.parse.quote((unit * (size // len(unit))).rstrip()))
                        costs.append(time.clock_gettime(self.clock) - began)
                    if costs[1] <= MARGIN * TIMES * max(CPU_FLOOR, costs[0]):
                        break
                else:
                    found.append("%s, %s: %.3f s of CPU for a query of 3 kB, %.3f s for 12 kB" % (path[:14], name, *costs))
        self.get("/api/v1/messages", "DELETE")
        self.assertEqual(found, [], "\n" + "\n".join(found))

    def test_nobody_waits(self):
        """The dearest shapes, looked at again and again, hold up nobody."""
        check_fair.node = self.node
        names = {name for _, name in self.worst.values()} & set(SHAPES) or set(sorted(SHAPES)[::9])

        def ordinary():
            return check_fair.waits_beside(lambda: [self.costs(body(b"an ordinary line\r\n")(1 << 20)) for _ in range(3)])
        usual = ordinary()
        for name in sorted(names):
            content = SHAPES[name](1 << 20)
            for _ in range(6):
                waits = check_fair.waits_beside(lambda: self.costs(content))  # noqa: B023
                if max(waits) <= 3 * max(check_fair.FLOOR, *usual):
                    break
                usual = ordinary()                  # the machine may have more to do now than it had
            else:
                self.fail("%s: NOOP waited %s s, beside ordinary mail %s s" % (name, waits, usual))


# The page

class Page(unittest.TestCase):
    """What the page's script does with a message, in a browser."""

    SMALL = 24 << 10
    FLOOR = 0.15                                    # seconds: a browser is never still

    @unittest.skipUnless(shutil.which("chromedriver"), "chromedriver is not installed: run .ci/install.sh first")
    def test_shapes(self):
        Costs.node = self.node = self.enter(lab.Node("--web", "127.0.0.1:0", "--no-sync"))
        Costs.web, Costs.serial = self.node.listening["web"][0], 0
        self.costs = Costs("test_shapes")
        self.browser = check_web.Browser()
        self.addCleanup(self.browser.close)
        self.browser.call("POST", "", cmd="Performance.enable", timeDomain="threadTicks")
        found = []
        for name in ("encoded words", "addresses", "groups", "parts", "many fields", "links", "a long link", "ats in text",
                     "quotations", "HTML: open tags", "HTML: nested", "HTML: quotes", "HTML: entities", "HTML: sources",
                     "line ends", "calendar"):
            for _ in range(2):                      # what the machine's noise did once it will not do again
                few, many = (self.seconds(SHAPES[name](size)) for size in (self.SMALL, TIMES * self.SMALL))
                if many <= MARGIN * TIMES * max(self.FLOOR, few):
                    break
            else:
                found.append("%s: %.2f s in the browser for %d kB, %.2f s for four times as much" % (
                    name, few, self.SMALL >> 10, many))
        self.assertEqual(found, [], "\n" + "\n".join(found))

    def enter(self, context):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        return stack.enter_context(context)

    def busy(self):
        """Return for how many seconds the page has worked."""
        metrics = self.browser.call("POST", "", cmd="Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def at_rest(self):
        """Return whether the page had nothing to do between two looks."""
        before, self.last = self.last, self.busy()
        return self.last - before < 0.005

    def seconds(self, content):
        """Return how long the page works to show a message."""
        self.costs.deliver(content)
        id = json.loads(self.costs.get("/api/v1/message/latest"))["ID"]
        self.browser.open("http://%s:%d/#%s" % (*Costs.web, urllib.parse.quote(id)))
        self.browser.until("document.querySelector('#subject').textContent && "
                           "document.querySelector('#panel').ariaBusy === 'false'", seconds=60)
        self.last = -1.0
        lab.until(self.at_rest, 60, "a page that is done")
        took = self.busy()
        self.costs.get("/api/v1/messages", "DELETE")
        return took


# Patterns

LITERAL = r"(?<=[(,=:!&|?{};])\s*/((?![*/])(?:[^/\\\n\[]|\\.|\[(?:[^\]\\\n]|\\.)*\])+)/([a-z]*)"


class Patterns(unittest.TestCase):
    """Every regular expression of the file, and of the page's script, against its own worst strings."""

    SIZE, FLOOR = 30_000, 0.004                     # characters; seconds: from there on growth is looked at
    METHODS = ("compile", "match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer")

    def of_the_file(self):
        """Yield (line, compiled pattern, method) for all calls of re."""
        sys.path.insert(0, str(lab.REPO))
        import minimail
        for node in ast.walk(ast.parse(lab.MINIMAIL.read_text())):
            function = getattr(node, "func", None)
            later = getattr(function, "id", "") == "expression"
            if isinstance(node, ast.Call) and (later or isinstance(function, ast.Attribute) and function.attr in self.METHODS
                                               and getattr(function.value, "id", "") == "re"):
                call = ast.unparse(node) if hasattr(ast, "unparse") else ""
                flags = 0
                for word in re.findall(r"re\.([A-Z]+)", call.rpartition(")")[0][-60:] if call else ""):
                    flags |= getattr(re, word)
                try:
                    text = eval(compile(ast.Expression(node.args[0]), "", "eval"), dict(vars(minimail)))
                except (NameError, KeyError):       # made from what is known at run time only
                    continue
                if isinstance(text, (str, bytes)):
                    yield node.lineno, re.compile(text, flags), "compile" if later else function.attr

    def of_the_page(self):
        """Yield (what stands there, pattern, method) for the literals of the script; what re cannot read is left out."""
        text = lab.MINIMAIL.read_text()
        script = text[text.index("<script nonce"):]
        script = script[:script.index("</script>")]
        for literal, flags in re.findall(LITERAL, script):
            literal = re.sub(r"\(\?<(?=\w)", "(?P<", literal).replace("\\/", "/")
            literal = re.sub(r"\\u\{?([0-9a-fA-F]{4,5})\}?", lambda match: re.escape(chr(int(match.group(1), 16))), literal)
            with contextlib.suppress(re.error):
                yield literal, re.compile(literal.replace("[[]", r"\["), re.IGNORECASE if "i" in flags else 0), "sub"

    def samples(self, tree, depth=0):
        """Return a string that a parsed pattern matches, as well as can be told from its parts."""
        made = ""
        for op, value in tree:
            name = str(op)
            if name == "LITERAL":
                made += chr(value)
            elif name == "NOT_LITERAL":
                made += "a" if value != ord("a") else "b"
            elif name == "ANY":
                made += "a"
            elif name == "IN":
                made += self.member(value)
            elif name == "BRANCH":
                made += self.samples(value[1][0], depth)
            elif name == "SUBPATTERN":
                made += self.samples(value[-1], depth)
            elif name == "ATOMIC_GROUP":
                made += self.samples(value, depth)
            elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
                made += self.samples(value[2], depth) * max(value[0], 1 if value[1] else 0)
        return made

    @staticmethod
    def member(items):
        """Return a character of a set."""
        inverted = str(items[0][0]) == "NEGATE"
        pattern = "".join(
            "\\x%02x" % value if str(op) == "LITERAL" and value < 256 else chr(value) if str(op) == "LITERAL" else
            "%s-%s" % tuple(re.escape(chr(end)) for end in value) if str(op) == "RANGE" else
            {"CATEGORY_SPACE": r"\s", "CATEGORY_DIGIT": r"\d", "CATEGORY_WORD": r"\w", "CATEGORY_NOT_SPACE": r"\S",
             "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_NOT_WORD": r"\W"}[str(value)] if str(op) == "CATEGORY" else ""
            for op, value in items)
        test = re.compile("[%s%s]" % ("^" if inverted else "", pattern)) if pattern else re.compile(".")
        return next(filter(test.match, "a0 -=.\"'<>&;:,/@?\\\t\n" + "".join(map(chr, range(33, 0x250)))), "a")

    def repeats(self, tree, before=""):
        """Yield (what comes before it, what is repeated) for each repeat that has no small end."""
        for op, value in tree:
            name = str(op)
            if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
                if value[1] > 20:
                    yield before, self.samples(value[2])
                    inner = value[2][0][1][-1] if str(value[2][0][0]) == "SUBPATTERN" else value[2]
                    for branch in inner[0][1][1] if str(inner[0][0]) == "BRANCH" else ():
                        yield before, self.samples(branch)
                yield from self.repeats(value[2], before)
            elif name == "SUBPATTERN":
                yield from self.repeats(value[-1], before)
            elif name == "BRANCH":
                for branch in value[1]:
                    yield from self.repeats(branch, before)
            elif name in ("ASSERT", "ASSERT_NOT"):
                yield from self.repeats(value[1], before)
            before += self.samples([(op, value)])

    def worst_strings(self, pattern):
        """Yield functions of n: what comes before a repeat, the repeated, and an end that fits nowhere."""
        text = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
        tree = parser.parse(text, pattern.flags & ~re.UNICODE)
        whole = self.samples(tree)
        found = list(self.repeats(tree))
        units = {(before, unit) for before, unit in found if unit}
        units |= {("", before + unit) for before, unit in found if before + unit}      # the start again and again, ...
        units |= {("", before) for before, unit in found if before}                     # ... and what never gets there
        units |= {("", whole)} if whole else set()
        for before, unit in sorted(units):
            for end in ("\0", "", "\n", "!"):
                yield lambda n, before=before, unit=unit, end=end: before + unit * (n // len(unit)) + end

    def seconds(self, pattern, method, text):
        """Return what the pattern takes for a text, the better of two."""
        given = text.encode("utf-8", "replace") if isinstance(pattern.pattern, bytes) else text
        best = float("inf")
        for _ in range(2):
            began = time.process_time()
            if method in ("match", "fullmatch"):
                getattr(pattern, method)(given)
            else:
                pattern.sub(given[:0], given)
            best = min(best, time.process_time() - began)
        return best

    def grows(self, pattern, method, shape, size, few):
        """Return whether a pattern's time grows faster than the text, from `size` on and from there on."""
        many = self.seconds(pattern, method, shape(TIMES * size))
        return many > 2 * TIMES * few and self.seconds(pattern, method, shape(TIMES * TIMES * size)) > 2 * TIMES * many

    def problem(self, pattern, method):
        """Return a string for which the pattern takes more than its share, "" when there is none."""
        for shape in self.worst_strings(pattern):
            size, few = 16, 0.0
            while few < self.FLOOR and size < self.SIZE:
                size += size // 4                   # step by step: an exponential one would not come back
                few = self.seconds(pattern, method, shape(size))
            if few >= self.FLOOR and (size < self.SIZE // 100 or self.grows(pattern, method, shape, size, few)):
                return "%r... (%d characters: %.3f s)" % (shape(40), size, few)
        return ""

    def test_bad_ones_are_found(self):
        """What is known to be quadratic, or worse, does not pass."""
        for text in (r"\s+$", r"a*b", r"(?:a|a)*b", r"\(.*?\)", r"(\w+\s?)*!", r"<a[^>]+href=", r" *\n *"):
            with self.subTest(text):
                self.assertTrue(self.problem(re.compile(text), "sub"))
        for text in (r"[a-z]", r"(?<!a)a+b", r"a{1,40}b", r"\r\n|\r|\n"):
            with self.subTest(text):
                self.assertEqual(self.problem(re.compile(text), "sub"), "")

    def test_of_the_file(self):
        source = lab.MINIMAIL.read_text()
        used = {name: re.findall(r"\b%s\.(match|fullmatch|search|sub|subn|split|findall|finditer)\(" % name, source)
                for name in re.findall(r"(?m)^([A-Z_]+) = expression", source)}
        lines, found = source.splitlines(), []
        for line, pattern, method in self.of_the_file():
            name = lines[line - 1].partition(" ")[0]
            methods = set(used.get(name, ["sub"])) if method == "compile" else {method}
            for method in methods or {"sub"}:
                problem = self.problem(pattern, method)
                if problem:
                    found.append("line %d, %s %r: %s" % (line, method, pattern.pattern, problem))
        self.assertEqual(found, [], "\n" + "\n".join(found))

    def test_of_the_page(self):
        patterns = list(self.of_the_page())
        self.assertGreater(len(patterns), 2, "the script's patterns were not found")
        found = ["/%s/: %s" % (literal, problem) for literal, pattern, method in patterns
                 for problem in [self.problem(pattern, method)] if problem]
        self.assertEqual(found, [], "\n" + "\n".join(found))


if __name__ == "__main__":
    unittest.main()
