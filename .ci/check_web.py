"""The web inbox in a real browser, and client libraries that were written for Mailpit, against minimail in capture mode.

    python3 .ci/check_web.py [-v] [--screenshot] [Class[.test]]

The browser is headless Chromium, driven through chromedriver's WebDriver protocol with the standard library alone. With
--screenshot, .ci/inbox.png and .ci/inbox-dark.png (the README's pictures) are made anew, and the pictures of the other
tests are kept for a look.

install.sh must bring, beside chromium, chromium-driver, nodejs and npm:
    into its venv:   pip install mailpit-api-client==1.0.0 pytest-mailpit==0.4.1
    beside it:       npm install --prefix ~/.cache/minimail-ci/npm mailpit-api@2.1.0
"""
# time limit: 300
import base64
import contextlib
import email.message
import email.policy
import email.utils
import functools
import http.server
import json
import os
import re
import shutil
import smtplib
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import lab

TOOLS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minimail-ci"
PICTURES = Path(tempfile.mkdtemp(prefix="minimail-web-"))
PICTURE_OF_README = Path(__file__).resolve().parent / "inbox%s.png"
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==")
ENTER, ESCAPE, UP, LEFT, DOWN, RIGHT, DELETE = "\ue007", "\ue00c", "\ue013", "\ue012", "\ue015", "\ue014", "\ue017"
PAGE_UP, PAGE_DOWN, CONTROL = "\ue00e", "\ue00f", "\ue009"


# The browser

class Browser:
    """A headless Chromium with one window; `log()` and `requests()` say what happened since they were last asked.

    With `netlog`, what its network did is in the file `place / "net.json"` once it has ended.
    """

    def __init__(self, netlog=False):
        self.place = Path(tempfile.mkdtemp(prefix="minimail-chromium-"))
        port = lab.free_port()
        self.driver = lab.start(["chromedriver", "--port=%d" % port], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL, env=lab.clean_environment(self.place))
        self.url, self.session = "http://127.0.0.1:%d" % port, None
        try:
            lab.until(lambda: lab.accepts(port), 20, "chromedriver")
            flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "disable-smooth-scrolling", "no-first-run",
                     "disable-background-networking", "disable-component-update", "disable-sync", "lang=en-US",
                     "user-data-dir=%s" % (self.place / "profile")]
            flags += ["log-net-log=%s" % (self.place / "net.json")] if netlog else []
            options = {"browserName": "chrome", "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
                       "goog:chromeOptions": {"args": ["--" + flag for flag in flags]}, "unhandledPromptBehavior": "ignore"}
            self.session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": options}})["sessionId"]
            self.call("POST", "", cmd="Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.place / "got"))
            self.look()
        except BaseException:
            self.close()
            raise

    def end(self):
        """End the browser and its driver."""
        with contextlib.suppress(OSError, AssertionError):
            if self.session:
                self.call("DELETE", "")
        self.session = None
        lab.end_group(self.driver)

    def close(self):
        """End them, and remove what they left on disk."""
        self.end()
        shutil.rmtree(self.place, ignore_errors=True)

    def call(self, method, path, body=None, cmd=None, **params):
        """Send a WebDriver command, or with `cmd` one of Chromium's own, and return its value."""
        if self.session:
            path = "/session/" + self.session + ("/goog/cdp/execute" if cmd else path)
        body = {"cmd": cmd, "params": params} if cmd else body
        request = urllib.request.Request(self.url + path, None if method != "POST" else json.dumps(body or {}).encode(),
                                         {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=150) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as problem:
            raise AssertionError("%s %s: %s" % (method, path, json.load(problem)["value"]["message"][:1000])) from None

    def look(self, width=1280, height=800, dark=False):
        """Set the size of the window and the person's taste."""
        self.call("POST", "", cmd="Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=False)
        self.call("POST", "", cmd="Emulation.setEmulatedMedia", media="",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def open(self, url):
        """Go to a page, also when only its part after # differs."""
        self.call("POST", "/url", {"url": "about:blank"})
        self.call("POST", "/url", {"url": url})

    def run(self, script, *arguments):
        """Run JavaScript in the page; without a `return` in it, it is an expression whose value is returned."""
        script = script if re.search(r"\breturn\b", script) else "return " + script
        return self.call("POST", "/execute/sync", {"script": script, "args": arguments})

    def until(self, script, *arguments, seconds=10):
        """Wait until an expression in the page is true and return its value."""
        try:
            return lab.until(lambda: self.run(script, *arguments), seconds, script)
        except AssertionError as problem:
            shown = self.run("document.body.innerText")
            raise AssertionError("%s %r; the page says:\n%s" % (problem, arguments, shown[:3000])) from None

    def elements(self, selector):
        """Return the paths of the commands on the elements that a CSS selector finds."""
        found = self.call("POST", "/elements", {"using": "css selector", "value": selector})
        return ["/element/" + next(iter(element.values())) for element in found]

    def click(self, selector):
        """Click on the one such element as a person does: it must be visible and on top."""
        for attempt in range(5):
            found = self.elements(selector)
            assert len(found) == 1, "%d elements are %s" % (len(found), selector)
            try:
                return self.call("POST", found[0] + "/click")
            except AssertionError as problem:       # drawn anew between finding and clicking: a person would not notice
                if "stale element" not in str(problem) or attempt == 4:
                    raise

    def point(self, x, y):
        """Click at a place in the window."""
        press = [{"type": "pointerMove", "x": int(x), "y": int(y)}, {"type": "pointerDown", "button": 0},
                 {"type": "pointerUp", "button": 0}]
        self.call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": press}]})

    def press(self, *texts):
        """Type on the keyboard, wherever the focus is."""
        strokes = [{"type": kind, "value": key} for key in "".join(texts) for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def chord(self, *keys):
        """Press keys together."""
        strokes = [{"type": "keyDown", "value": key} for key in keys] + [{"type": "keyUp", "value": key} for key in keys[::-1]]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def hover(self, selector):
        """Put the mouse on the one such element, without a click."""
        x, y = self.run("const box = document.querySelector(arguments[0]).getBoundingClientRect(); "
                        "return [box.x + box.width / 2, box.y + box.height / 2]", selector)
        move = [{"type": "pointerMove", "x": int(x), "y": int(y)}]
        self.call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": move}]})

    def windows(self):
        return self.call("GET", "/window/handles")

    def switch(self, window):
        self.call("POST", "/window", {"handle": window})

    def new_window(self, url):
        """Open one beside the others and go on in it; return its handle."""
        window = self.call("POST", "/window/new", {"type": "tab"})["handle"]
        self.switch(window)
        self.open(url)
        return window

    def in_frame(self, script):
        """Evaluate an expression within the message's frame, into which the page itself cannot look."""
        self.call("POST", "/frame", {"id": 0})
        try:
            return self.run(script)
        finally:
            self.call("POST", "/frame", {"id": None})

    def frame(self):
        """Wait until the message's frame is all there: read to its end, and painted, so that a click meets it."""
        self.until("document.querySelector('iframe')?.contentDocument === null")    # no more the empty one that is first
        lab.until(lambda: self.in_frame("document.readyState") == "complete", what="a frame that is read to its end")
        self.call("POST", "/execute/async", {"args": [], "script":
                  "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"})

    def picture(self, name):
        """Save what the window shows as PNG and return the path."""
        path = PICTURES / (name + ".png")
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))
        return path

    def log(self):
        """Return the console's complaints."""
        entries = self.call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self):
        """Return the URLs that were asked for over the network; those that a policy stopped are not among them."""
        asked, stopped = {}, set()
        for entry in self.call("POST", "/se/log", {"type": "performance"}):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                asked[event["params"]["requestId"]] = event["params"]["request"]["url"]
            if event["method"] == "Network.loadingFailed" and event["params"].get("blockedReason"):
                stopped.add(event["params"]["requestId"])
        return [url for key, url in asked.items() if key not in stopped and not url.startswith(("data:", "about:", "chrome"))]


class Trap(http.server.ThreadingHTTPServer):
    """Another host, on this machine: `asked` has the path of every request that reached it, `referrers` where they came from,
    `connections` how many there were, also without a request."""
    daemon_threads = True

    def __init__(self):
        self.asked, self.referrers, self.connections = [], set(), 0
        super().__init__(("127.0.0.2", 0), functools.partial(TrapRequest))
        self.url = "http://127.0.0.2:%d" % self.server_port
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def verify_request(self, request, client_address):
        self.connections += 1
        return True


class TrapRequest(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.referrers.update({self.headers.get("Referer")} if self.path != "/favicon.ico" else ())
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        self.wfile.write(PIXEL)

    do_POST = do_GET

    def log_message(self, *_):
        pass


# Messages

def letter(subject, text="Hello Bob,\n\nhere it is.\n", html=None, sender="Ann Lee <ann@example.org>", **fields):
    """Return a message; fields are further headers, `_` in a name stands for `-`."""
    made = email.message.EmailMessage()
    made["From"], made["To"], made["Subject"] = sender, "Bob <bob@example.com>", subject
    made["Date"], made["Message-ID"] = email.utils.localtime(), email.utils.make_msgid(domain="example.org")
    for name, value in fields.items():
        made[name.replace("_", "-")] = value
    made.set_content(text)
    if html:
        made.add_alternative(html, subtype="html")
    return made


HOSTILE = """<html><head><base href="{0}/base/"><meta http-equiv=refresh content="0;url={0}/refresh">
<link rel=stylesheet href="{0}/style.css"><link rel=prefetch href="{0}/prefetch"><link rel=preload as=image href="{0}/preload">
<link rel=icon href="{0}/icon"><link rel=dns-prefetch href="{0}"><link rel=preconnect href="{0}">
<style>@import url({0}/import.css); @font-face {{ font-family: x; src: url({0}/font) }}
body {{ background: url({0}/background) }}
a, button {{ position: fixed; left: 0; width: 200px; height: 40px; font-family: x }}</style>
<script>parent.document.title = "owned"; fetch("{0}/fetch")</script><script src="{0}/script.js"></script></head>
<body onload="fetch('{0}/onload'); top.location = '{0}/top'"><img src="{0}/image.png" onerror="fetch('{0}/onerror')">
<img src=x onerror="parent.document.title = 'owned'"><svg onload="parent.document.title = 'owned'"></svg>
<img srcset="{0}/srcset 1x"><video src="{0}/video" poster="{0}/poster" autoplay></video>
<audio src="{0}/audio" autoplay></audio><iframe src="{0}/iframe"></iframe>
<iframe srcdoc="<script>parent.parent.document.title='owned'</script>"></iframe>
<object data="{0}/object"></object><embed src="{0}/embed"><input type=image src="{0}/input"><table background="{0}/table">
<a style="top:0" href="{0}/link">link</a><a style="top:50px" href="{0}/blank" target=_blank>new window</a>
<a style="top:100px" href="{0}/topmost" target=_top>top</a><a style="top:150px" ping="{0}/ping" href="#x">ping</a>
<a style="top:200px" href="javascript:parent.document.title='owned'">script</a>
<form action="{0}/form" method=post><button style="top:250px">send</button></form>
<form action="/api/v1/messages" method=get target=_top><button style="top:300px">inside</button></form></body></html>"""


TEXTS = {"iso-2022-jp": "ご注文ありがとうございます", "shift_jis": "日本語メール", "gb18030": "您的订单已发货",
         "koi8-r": "Ваш заказ отправлен", "windows-1252": "Grüße – “quoted”", "utf-8": "नमस्ते 📬"}

BROKEN = [b"Subject: broken\r\nContent-Type: multipart/mixed; boundary=x\r\n\r\n--x\r\n"
          b"Content-Type: text/plain; charset=nonsense\r\nContent-Transfer-Encoding: base64\r\n\r\n!!!!\r\n--y\r\n",
          b"\r\nno header at all \xff\xfe\r\n",
          b"From: =?utf-8?q?=zz?= <\r\nTo: ,,<@>\r\nDate: yesterday\r\nSubject: =?x-unknown?b?////?=\r\n\r\nodd\r\n"]


INVITATION = """BEGIN:VCALENDAR\r
METHOD:REQUEST\r
BEGIN:VEVENT\r
SUMMARY:Planning\\, the winter\r
  release\r
DTSTART:20261201T090000Z\r
DTEND:20261201T103000Z\r
LOCATION:Room 4\\, https://meet.example/abc\r
ORGANIZER;CN=Ann Lee:mailto:ann@example.org\r
ATTENDEE;CN=Bob:mailto:bob@example.com\r
ATTENDEE:mailto:carol@example.com\r
DESCRIPTION:Agenda:\\n1. where we are\\n2. what is left\\nSee https://wiki.example/agenda.\r
END:VEVENT\r
END:VCALENDAR\r
"""


# The inbox

class InboxCase(unittest.TestCase):
    """A node and a browser for all tests of a class; each starts with an empty inbox on the screen."""
    options = ("--web", "127.0.0.1:0", "--no-sync")

    @classmethod
    def setUpClass(cls):
        cls.resources = contextlib.ExitStack()
        cls.addClassCleanup(cls.resources.close)
        cls.node = cls.resources.enter_context(lab.Node(*cls.options))
        cls.url = "http://127.0.0.1:%d/" % cls.node.listening["web"][0][1]
        cls.browser = cls.resources.enter_context(contextlib.closing(Browser()))

    def setUp(self):
        self.browser.look()
        self.api("messages", "DELETE")
        self.expected = []  # patterns of what the console may say
        self.asked_for = [self.url]  # where requests may go
        self.reload()
        self.browser.log()
        self.browser.requests()

    def tearDown(self):
        """Nothing in the console, and no request to anyone else, whatever the test did."""
        foreign = [url for url in self.browser.requests() if not url.startswith(tuple(self.asked_for))]
        self.assertEqual(foreign, [])
        said = [line for line in self.browser.log() if not any(re.search(known, line) for known in self.expected)]
        self.assertEqual(said, [])

    def reload(self, fragment=""):
        self.browser.open(self.url + fragment)
        self.browser.until("document.querySelector('#live').textContent.includes('● live')")

    def api(self, path, method="GET", body=None):
        """Ask the API as a program would; JSON is returned as what it means."""
        request = urllib.request.Request(self.url + "api/v1/" + path, json.dumps(body).encode() if body else None,
                                         {"Content-Type": "application/json"} if body else {}, method=method)
        with urllib.request.urlopen(request, timeout=150) as answer:
            content = answer.read()
            return json.loads(content) if answer.headers["Content-Type"].startswith("application/json") else content

    def send(self, *messages, sender="ann@example.org", to=("bob@example.com",)):
        """Send messages (bytes or EmailMessage) in one SMTP session."""
        with smtplib.SMTP(*self.node.smtp, local_hostname="client.example.org", timeout=150) as client:
            for message in messages:
                content = message if isinstance(message, bytes) else message.as_bytes(policy=email.policy.SMTP)
                client.sendmail(sender, to, content)

    def show(self, *messages, **envelope):
        """Send messages and wait until the list has them and no others; return its subjects."""
        self.send(*messages, **envelope)
        self.until_rows(len(messages))
        return self.subjects()

    def until_rows(self, count):
        self.browser.until("document.querySelectorAll('#list a').length === arguments[0]", count)

    def subjects(self):
        return self.browser.run("[...document.querySelectorAll('#list .subject')].map(b => b.textContent)")

    def pick(self, subject):
        """Open the message with this subject."""
        self.browser.run("[...document.querySelectorAll('#list a')].find(a => a.textContent.includes(arguments[0])).click()",
                         subject)
        self.browser.until("document.querySelector('#subject').textContent === arguments[0]", subject)
        self.browser.until("document.querySelector('#panel').ariaBusy === 'false'")

    def tab(self, name):
        """Choose a tab and return the text on it."""
        self.browser.click("#tab-" + name)
        self.browser.until("document.querySelector('#panel').ariaBusy === 'false' && at.shown.name === arguments[0]", name)
        return self.browser.run("document.querySelector('#panel').textContent")

    def panel_button(self, name):
        self.browser.run("[...document.querySelectorAll('#panel button')].find(b => b.textContent === arguments[0]).click()",
                         name)


TREE = """  // the tree of parts as [kind or name, [what is in it]]
const walk = list => [...list?.children || []].map(li =>
  [li.querySelector(":scope > span bdi, :scope bdi").textContent, walk(li.querySelector(":scope > ul"))]);
return walk(document.querySelector("#panel > ul"));"""


class Looking(InboxCase):
    def test_empty_inbox_says_how_to_send_and_that_works(self):
        said = self.browser.until("document.querySelector('#welcome').innerText.includes('port') && "
                                  "document.querySelector('#welcome').innerText")
        self.assertIn("host %s, port %d" % self.node.smtp, said)
        self.browser.picture("empty")
        self.browser.click("#copy")
        self.browser.until("document.querySelector('#copy').textContent === 'Copied'")
        self.browser.press("/")
        self.browser.chord(CONTROL, "v")
        command = self.browser.until("document.querySelector('#search').value")
        self.browser.press(ESCAPE)
        lab.run(["sh", "-c", command.replace("python3", sys.executable, 1)])
        self.until_rows(1)
        self.assertEqual(self.subjects(), ["Hello"])
        self.assertTrue(self.browser.run("document.querySelector('#welcome').hidden"))

    def test_list(self):
        """Newest first: names, subject, snippet, size and time; unread is bold and counted; a new one comes by itself."""
        self.send(letter("first"), letter("second", "x" * 30000, sender="carl@example.org"))
        self.reload()
        self.until_rows(2)
        self.assertEqual(self.subjects(), ["second", "first"])
        rows = self.browser.run("[...document.querySelectorAll('#list a')].map(a => a.innerText)")
        for row, expected in zip(rows, (("carl@example.org", "xxxxxxx", "to Bob", r"\d\d kB"),
                                       ("Ann Lee", "ann@example.org", "Hello Bob, here it is", "to Bob", r"\b1 kB"))):
            for pattern in expected + (r"\d:\d\d", "unread"):
                self.assertRegex(row, pattern)
        self.assertEqual(self.browser.run("getComputedStyle(document.querySelector('#list b')).fontWeight"), "650")
        self.assertIn("2 unread", self.browser.run("document.querySelector('#status').textContent"))
        self.send(letter("third"))
        self.until_rows(3)
        self.assertEqual(self.subjects()[0], "third")
        self.assertEqual(self.browser.run("document.title"), "(3) minimail")

    def test_one_line_per_message_not_per_recipient(self):
        self.show(letter("to three", Cc="cc@example.net"), to=["bob@example.com", "cc@example.net", "secret@example.net"])
        self.pick("to three")
        self.assertRegex(self.browser.run("document.querySelector('#who').innerText"),
                         r"Cc\s+cc@example.net\s+Bcc\s+secret@example.net")

    def test_burst_and_pages(self):
        """A burst is one or a few questions, not one per message; the page stays; 50 are shown at a time."""
        self.send(*[letter("number %d" % number) for number in range(120)])
        self.browser.until("document.querySelector('#range').textContent === '1 – 50 of 120'")
        asked = [url for url in self.browser.requests() if "/api/v1/messages" in url]
        self.assertLess(len(asked), 60)
        self.browser.click("#older")
        self.browser.until("document.querySelector('#range').textContent === '51 – 100 of 120'")
        self.assertEqual(self.subjects()[0], "number 69")
        self.browser.click("#older")
        self.browser.until("document.querySelector('#range').textContent === '101 – 120 of 120'")
        self.assertTrue(self.browser.run("document.querySelector('#older').disabled"))
        self.browser.click("#newer")
        self.browser.until("document.querySelector('#range').textContent === '51 – 100 of 120'")

    def test_search(self):
        self.show(letter("apples", "green and sour", sender="Carl <carl@example.org>"), letter("pears", "soft and sweet"),
                  letter("plums", "blue and sweet"))
        for query, found in (("sweet", ["plums", "pears"]), ("subject:pears", ["pears"]), ("from:carl", ["apples"]),
                             ("to:bob@example.com sour", ["apples"]), ("nowhere", [])):
            with self.subTest(query=query):
                self.browser.press("/", query)
                lab.until(lambda found=found: self.subjects() == found, what="the list with %s" % found)
                self.browser.press(ESCAPE)
                self.until_rows(3)

    def test_tabs(self):
        """Every view of a message shows what it should."""
        message = letter("all of it", "Text with a link: https://example.com/confirm?a=1&b=2.\n",
                         "<html xmlns='http://www.w3.org/1999/xhtml'><p>HTML part</p><img src='cid:logo'>"
                         "<a href='https://example.com/other?x=1&amp;y=2'>go</a>")
        message.get_payload()[1].add_related(PIXEL, "image", "png", cid="<logo>", filename="logo.png", disposition="inline")
        message.add_attachment(b"%PDF-", "application", "pdf", filename="Rechnung März.pdf")
        del message["Date"]
        self.show(message, to=["bob@example.com", "hidden@example.net"])
        self.pick("all of it")
        self.assertEqual(self.browser.run("document.querySelector('iframe').sandbox.value"),
                         "allow-popups allow-popups-to-escape-sandbox")
        self.assertFalse(self.browser.elements("#panel .bar button:nth-of-type(4)"), "an offer to load images: there are none")
        self.browser.picture("html")
        self.assertIn("Text with a link", self.tab("Text"))
        links = self.tab("Links")
        self.assertIn("https://example.com/confirm?a=1&b=2", links)
        self.assertIn("https://example.com/other?x=1&y=2", links)
        self.assertNotIn("&amp;", links)
        self.assertNotIn("w3.org", links)
        self.assertRegex(self.tab("Files"), "Rechnung März.pdf application/pdf.*logo.png image/png")
        self.tab("Parts")
        self.assertEqual(self.browser.run(TREE), [["multipart/mixed", [
            ["multipart/alternative", [["text/plain", []], ["multipart/related", [["text/html", []], ["logo.png", []]]]]],
            ["Rechnung März.pdf", []]]]])
        self.assertIn(message["Message-ID"], self.tab("Headers"))
        source = self.tab("Source")
        self.assertEqual(source, self.api("message/latest/raw").decode())
        session = self.tab("Session")
        for piece in ("<ann@example.org>", "hidden@example.net", "Bcc", "client.example.org", "C: DATA", "S: 250"):
            self.assertIn(piece.lower(), session.lower())
        self.browser.picture("session")
        self.assertIn("RFC 5322", self.tab("Lint"))
        self.assertRegex(self.browser.run("document.querySelector('#tab-Lint').textContent"), r"Lint \d")
        self.browser.picture("lint")

    def test_character_sets(self):
        """Subjects, names and texts in the encodings that are still sent."""
        for charset, text in TEXTS.items():
            with self.subTest(charset=charset):
                word = "=?%s?b?%s?=" % (charset, base64.b64encode(text.encode(charset)).decode())
                head = ["From: %s <a@example.org>" % word, "To: bob@example.com", "Subject: " + word, "MIME-Version: 1.0",
                        "Content-Type: text/plain; charset=" + charset, "Content-Transfer-Encoding: 8bit"]
                self.send("\r\n".join(head + ["", ""]).encode() + text.encode(charset) + b"\r\n")
                self.browser.until("document.querySelector('#list .subject')?.textContent === arguments[0]", text)
                self.assertEqual(self.browser.run("document.querySelector('#list b').textContent"), text)
                self.pick(text)
                self.assertIn(text, self.tab("Text"))

    def test_broken_mime_shows_what_it_can(self):
        self.show(*BROKEN)
        for row in range(len(BROKEN)):
            self.browser.run("document.querySelectorAll('#list a')[arguments[0]].click()", row)
            self.browser.until("document.querySelectorAll('#list a')[arguments[0]].ariaCurrent === 'true' && "
                               "document.querySelector('#save').href.includes(at.open)", row)
            self.assertTrue(self.browser.run("document.querySelector('#problem').hidden"))
            self.tab("Source")

    def test_calendar(self):
        """What, when (here, and as it is written where nobody says where that is), where and who."""
        message = letter("Invitation", "You are invited.\n", "<p>You are invited.</p>")
        message.add_alternative(INVITATION, subtype="calendar", params={"method": "REQUEST"})
        self.show(message)
        self.pick("Invitation")
        said = self.tab("Calendar")
        here = self.browser.run("new Intl.DateTimeFormat([], {dateStyle: 'full', timeStyle: 'short'}).formatRange("
                                "new Date('2026-12-01T09:00:00Z'), new Date('2026-12-01T10:30:00Z'))")
        for text in ("Invitation: Planning, the winter release", here, "Room 4", "Ann Lee", "Bob", "carol@example.com",
                     "1. where we are\n2. what is left"):
            self.assertIn(text, said)
        self.assertEqual(self.browser.run("[...document.querySelectorAll('#panel a')].map(a => a.href)"),
                         ["https://meet.example/abc", "https://wiki.example/agenda"])
        self.browser.picture("calendar")
        for start, end, expected in (("2026-12-01", "2026-12-02", "Tuesday, December 1, 2026"), ("T", "x", "T – x"),
                                     ("2026-12-01", "2026-12-03", "Tuesday, December 1 – Wednesday, December 2, 2026"),
                                     ("2026-12-01T10:00:00 Asia/Tokyo", "", "2026-12-01 10:00:00 Asia/Tokyo")):
            self.assertEqual(self.browser.run("span(...arguments).replaceAll('\u2009', ' ')", start, end), expected)

    def test_links_in_text(self):
        """They end where a reader would end them, and open a window of their own."""
        self.show(letter("links", "See https://a.example/x?y=1&z=2. Or (http://b.example/a_(b)), <HTTPS://c.example/>, \n"
                         "http://d.example/d!), no link: javascript:alert(1) https:// http:/x ftp://x\n"))
        self.pick("links")
        found = self.browser.run("[...document.querySelectorAll('#panel a')].map(a => [a.textContent, a.target, a.rel])")
        self.assertEqual(found, [[url, "_blank", "noreferrer"] for url in (
            "https://a.example/x?y=1&z=2", "http://b.example/a_(b))", "HTTPS://c.example/", "http://d.example/d")])

    def test_width_of_html(self):
        self.show(letter("wide", html="<p>HTML</p>"))
        self.pick("wide")
        width = "document.querySelector('iframe').clientWidth"
        full = self.browser.run(width)
        for name, expected in (("Phone", 375), ("Tablet", min(768, full)), ("Full", full)):
            self.panel_button(name)
            self.assertEqual(self.browser.run(width), expected)
            pressed = "[...document.querySelectorAll('#panel [aria-pressed=true]')].map(b => b.textContent)"
            self.assertEqual(self.browser.run(pressed), [name])

    def test_tags(self):
        tagged = letter("tagged", X_Tags="invoice, cı")
        self.show(tagged, letter("plain"))
        self.assertIn("invoice", self.browser.run("document.querySelectorAll('#list a')[1].innerText"))
        self.pick("tagged")
        self.browser.run("[...document.querySelectorAll('#who .tag')].find(b => b.textContent === 'invoice').click()")
        lab.until(lambda: self.subjects() == ["tagged"], what="the list of what has the tag")

    def test_deep_link(self):
        self.show(letter("older"), letter("newer"))
        older = self.api("messages?start=1")["messages"][0]["ID"]
        for fragment, subject in (("#" + older, "older"), ("#latest", "newer")):
            self.reload(fragment)
            self.browser.until("document.querySelector('#subject').textContent === arguments[0]", subject)
        self.expected = ["status of 404"]
        self.reload("#nothing-like-that")
        self.browser.until("!document.querySelector('#problem').hidden && location.hash === ''")


class Doing(InboxCase):
    def test_read_and_unread(self):
        self.show(letter("one"), letter("two"))
        self.pick("two")
        self.browser.until("document.querySelectorAll('#list .unread').length === 1")
        self.browser.click("#toggle")
        self.browser.until("document.querySelectorAll('#list .unread').length === 2")
        self.assertEqual(self.browser.run("document.querySelector('#toggle').textContent"), "Mark read")
        self.browser.press("u")
        self.browser.until("document.querySelectorAll('#list .unread').length === 1")
        self.assertEqual([entry["Read"] for entry in self.api("messages")["messages"]], [True, False])
        self.api("messages", "PUT", {"Read": True})  # someone else did it: the page follows
        self.browser.until("document.querySelectorAll('#list .unread').length === 0")

    def test_delete(self):
        self.show(*map(letter, ("one", "two", "three", "four")))
        self.pick("two")
        self.browser.click("#remove")
        self.browser.until("document.querySelector('#subject').textContent === 'one'")
        self.until_rows(3)
        self.assertEqual(self.subjects(), ["four", "three", "one"])
        self.browser.press(UP)
        self.browser.until("document.querySelector('#subject').textContent === 'three'")
        self.browser.press(DELETE)
        self.until_rows(2)
        self.assertEqual([entry["Subject"] for entry in self.api("messages")["messages"]], ["four", "one"])
        self.browser.press("/", "four")
        self.until_rows(1)
        self.browser.click("#clear")
        self.call_on_alert("accept")
        self.browser.until("document.querySelector('#range').textContent === 'Nothing found'")
        self.browser.press(ESCAPE)
        self.until_rows(1)
        self.browser.click("#clear")
        self.call_on_alert("dismiss")
        self.assertEqual(self.api("messages")["total"], 1)
        self.browser.click("#clear")
        self.call_on_alert("accept")
        self.browser.until("!document.querySelector('#welcome').hidden")
        self.assertEqual(self.api("messages")["total"], 0)

    def call_on_alert(self, answer):
        lab.until(lambda: self.answered(answer), what="the question before everything is deleted")

    def answered(self, answer):
        with contextlib.suppress(AssertionError):
            self.browser.call("POST", "/alert/" + answer)
            return True

    def test_deleted_elsewhere(self):
        self.show(letter("one"), letter("two"))
        self.api("messages", "DELETE", {"IDs": [self.api("messages")["messages"][0]["ID"]]})
        self.until_rows(1)
        self.assertEqual(self.subjects(), ["one"])

    def test_attachments(self):
        """They download under a safe name, byte for byte, and never open as a page."""
        message, content = letter("files"), bytes(range(256)) * 300
        message.add_attachment(content, "application", "octet-stream", filename="../../evil\u202e<b>.bin")
        message.add_attachment("<script>alert(1)</script>", subtype="html", filename="page.html")
        message.add_attachment(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "image", "svg+xml",
                               filename="x.svg")
        self.show(message)
        self.pick("files")
        self.tab("Files")
        self.browser.run("document.querySelector('#panel a').click()")
        files = (self.browser.place / "got").glob              # the name is made before the file is there
        got = lab.until(lambda: [path for path in files("*.bin") if path.stat().st_size], what="the file")
        self.assertEqual(got[0].read_bytes(), content)
        self.assertEqual(list(self.browser.place.parent.glob("evil*")), [])
        identity = self.api("messages")["messages"][0]["ID"]
        for part in self.api("message/" + identity)["Attachments"]:
            with urllib.request.urlopen(self.url + "api/v1/message/%s/part/%s" % (identity, part["PartID"])) as answer:
                self.assertTrue(answer.headers["Content-Disposition"].startswith("attachment"), answer.headers)
                self.assertEqual(answer.headers["X-Content-Type-Options"], "nosniff")
                self.assertNotRegex(answer.headers["Content-Type"], "html|xml|svg")
                self.assertNotRegex(answer.headers["Content-Disposition"], r"[/\\<\u202e]")

    def test_keyboard(self):
        """Everything without a mouse, and one sees where one is."""
        self.show(*map(letter, ("one", "two", "three")))
        focused = "document.activeElement.querySelector?.('.subject')?.textContent"
        for keys, subject in (("j", "three"), (DOWN, "two"), ("j", "one"), ("k", "two")):
            self.browser.press(keys)
            self.browser.until(focused + " === arguments[0]", subject)
        self.assertNotEqual(self.browser.run("getComputedStyle(document.activeElement).outlineStyle"), "none")
        self.browser.press(ENTER)
        self.browser.until("document.querySelector('#subject').textContent === 'two'")
        self.browser.press("j")
        self.browser.until("document.querySelector('#subject').textContent === 'one'")
        selected = "document.querySelector('#tabs [aria-selected=true]')?.textContent"
        self.browser.until(selected + " === 'Text'")
        self.browser.press(RIGHT)
        self.browser.until(selected + " !== 'Text'")
        self.browser.press(LEFT)
        self.browser.until(selected + " === 'Text'")
        self.browser.press(ESCAPE)
        self.browser.until("location.hash === '' && document.querySelector('#message').hidden && " + focused + " === 'one'")
        self.browser.press("d")
        self.until_rows(2)
        self.browser.until(focused + " === 'two'")
        self.browser.press("/")
        self.browser.until("document.activeElement.id === 'search'")
        self.browser.press("jkud")
        self.assertEqual(self.browser.run("document.querySelector('#search').value"), "jkud")
        self.assertEqual(self.api("messages")["total"], 2)

    def test_keyboard_scrolls_the_message(self):
        """After Enter, Space and PageDown go through the message, as text and as HTML, and j and k go on to others."""
        lines = ["line %d" % number for number in range(300)]
        self.show(letter("text", "\n".join(lines)), letter("html", html="<p>" + "<p>".join(lines)))
        self.browser.press("j", ENTER)
        self.browser.until("document.querySelector('#subject').textContent === 'html'")
        self.browser.frame()
        place, before = "window.scrollY", 0
        for key, forward in ((" ", True), (PAGE_DOWN, True), (PAGE_UP, False), (" ", True)):
            self.browser.press(key)
            lab.until(lambda forward=forward, before=before: (self.browser.in_frame(place) > before) is forward and
                      self.browser.in_frame(place) != before, what="the HTML scrolled")
            before = self.browser.in_frame(place)
        self.browser.press("j")
        self.browser.until("document.querySelector('#subject').textContent === 'text'")
        self.browser.until("document.querySelector('#panel .text')")
        for key in (" ", PAGE_DOWN):
            before = self.browser.run("document.querySelector('main').scrollTop")
            self.browser.press(key)
            self.browser.until("document.querySelector('main').scrollTop > arguments[0] + 300", before)
        self.browser.press("k")
        self.browser.until("document.querySelector('#subject').textContent === 'html'")

    def test_list_keeps_its_place(self):
        """An arrival moves neither the focus nor the open message."""
        self.show(letter("one"), letter("two"))
        self.pick("one")
        self.browser.press("j")
        self.browser.run("document.querySelectorAll('#list a')[1].focus()")
        self.send(letter("three"))
        self.until_rows(3)
        self.assertIn("one", self.browser.run("document.activeElement.textContent"))
        self.assertEqual(self.browser.run("document.querySelector('#subject').textContent"), "one")


class Windows(InboxCase):
    def setUp(self):
        super().setUp()
        self.first = self.browser.windows()[0]
        self.addCleanup(self.close_others)

    def close_others(self):
        for window in set(self.browser.windows()) - {self.first}:
            self.browser.switch(window)
            self.browser.call("DELETE", "/window")
        self.browser.switch(self.first)

    def test_seven(self):
        """Each shows what comes, over one stream for all; when the window that holds it is closed, another one does."""
        windows = [self.first] + [self.browser.new_window(self.url) for _ in range(7)]
        self.follow(windows, "one")
        leader, = [window for window in windows if self.listens(window)]
        spare = next(window for window in windows if window != leader)
        self.browser.switch(leader)
        self.browser.open("about:blank")
        windows.remove(leader)
        lab.until(lambda: sum(map(self.listens, windows)) == 1, what="another window that listens")
        self.follow(windows, "two")
        self.browser.switch(spare)

    def listens(self, window):
        self.browser.switch(window)
        return self.browser.run("Boolean(at.listens)")

    def follow(self, windows, subject):
        self.send(letter(subject))
        for window in windows:
            self.browser.switch(window)
            self.browser.until("document.querySelector('#live').textContent === '● live' && "
                               "document.querySelector('#list .subject')?.textContent === arguments[0]", subject)

    def test_without_locks(self):
        """A page that came over plain HTTP from elsewhere has none: it asks now and then."""
        script = "Object.defineProperty(Navigator.prototype, 'locks', {get: () => undefined})"
        known = self.browser.call("POST", "", cmd="Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
        try:
            self.reload()
            self.assertTrue(self.browser.run("navigator.locks === undefined"))
            self.send(letter("asked for"))
            self.until_rows(1)
        finally:
            self.browser.call("POST", "", cmd="Page.removeScriptToEvaluateOnNewDocument", identifier=known)

    def test_click_on_a_link(self):
        """It opens a window that knows nothing of this one; the message stays, whatever target it named."""
        trap = Trap()
        self.addCleanup(trap.server_close)
        self.addCleanup(trap.shutdown)
        style = "style='position:fixed;left:0;top:%dpx;width:200px;height:40px'"
        links = "".join("<a href='%s/%s' target=%s rel=opener %s>link</a>" % (trap.url, target, target, style % (50 * place))
                        for place, target in enumerate(("_self", "_top", "_parent", "_blank", "other")))
        self.show(letter("click", "Or here: %s/text\n" % trap.url, links))
        self.asked_for.append(trap.url)
        self.pick("click")
        for place, target in enumerate(("_self", "_top", "_parent", "_blank", "other")):
            with self.subTest(target=target):
                self.browser.frame()
                x, y = self.browser.run("const box = document.querySelector('iframe').getBoundingClientRect(); "
                                        "return [box.x, box.y]")
                self.browser.point(x + 60, y + 20 + 50 * place)
                self.clicked(trap.url + "/" + target)
        self.tab("Text")
        self.browser.click("#panel a")
        self.clicked(trap.url + "/text")
        self.assertEqual(trap.referrers, {None})

    def clicked(self, url):
        new, = lab.until(lambda: set(self.browser.windows()) - {self.first}, what="a new window")
        self.browser.switch(new)
        self.browser.until("location.href === arguments[0]", url)
        self.assertIsNone(self.browser.run("window.opener"))
        self.close_others()
        self.assertEqual(self.browser.run("document.querySelector('#subject').textContent"), "click")


class Releasing(InboxCase):
    @classmethod
    def setUpClass(cls):
        resources = contextlib.ExitStack()
        cls.addClassCleanup(resources.close)
        cls.outside = resources.enter_context(lab.Node("--web", "127.0.0.1:0", "--no-sync"))
        cls.options = InboxCase.options + ("--release", "smtp://127.0.0.1:%d" % cls.outside.smtp[1])
        super().setUpClass()

    def test_release(self):
        """One message goes to the addresses that someone typed, and nowhere without that."""
        self.show(letter("stays"), letter("goes"))
        self.pick("goes")
        self.browser.click("#release")
        self.browser.until("document.activeElement.id === 'release-to'")
        self.assertIn(":%d" % self.outside.smtp[1], self.browser.run("document.querySelector('#releasing').innerText"))
        self.browser.picture("release")
        self.browser.press("not an address", ENTER)
        self.expected = ["status of 400"]
        self.browser.until("document.querySelector('#release-problem').textContent")
        self.browser.run("document.querySelector('#release-to').value = ''")
        self.browser.press("real@example.net, dud@example.net", ENTER)
        self.browser.until("!document.querySelector('#releasing').open")
        self.assertIn("real@example.net", self.browser.run("document.querySelector('#problem').textContent"))
        url = "http://127.0.0.1:%d/api/v1/messages" % self.outside.listening["web"][0][1]

        def arrived():
            with urllib.request.urlopen(url) as answer:
                found = json.load(answer)["messages"]
            return [(entry["Subject"], sorted(person["Address"] for person in entry["Bcc"])) for entry in found]
        wanted = [("goes", ["dud@example.net", "real@example.net"])]    # one mailbox has it before the other
        lab.until(lambda: arrived() == wanted, what="the released message")
        self.browser.click("#release")
        self.browser.press("d", ESCAPE)
        self.browser.until("!document.querySelector('#releasing').open")
        self.assertEqual(self.api("messages")["total"], 2)


class Appearance(InboxCase):
    def fill(self):
        self.show(letter("A subject that goes on and on, since someone put all of the message in it: " + "word" * 60,
                         "a" * 500 + "\n" + "text " * 300, sender='"%s" <%s@example.org>' % ("Long Name " * 12, "x" * 64)),
                  letter("Order shipped", "Hello,\n\nit is on its way.\n", "<h1>Order shipped</h1><p>It is on its way.</p>"))

    def test_narrow(self):
        """320 pixels are enough: no sideways scrolling, first the list, then the message with a way back."""
        self.browser.look(320, 640)
        self.fill()
        sideways = ("[document.documentElement, ...document.querySelectorAll('nav, #list, main, header')]"
                    ".filter(e => e.scrollWidth > e.clientWidth + 1 || e.scrollWidth > 320).map(e => e.tagName)")
        self.assertEqual(self.browser.run(sideways), [])
        self.browser.picture("narrow-list")
        for row in range(2):
            self.browser.run("document.querySelectorAll('#list a')[arguments[0]].click()", row)
            self.browser.until("document.querySelector('main').offsetWidth && !document.querySelector('nav').offsetWidth && "
                               "document.querySelector('#panel').childNodes.length")
            for tab in ("Text", "Headers", "Source", "Session", "Lint"):
                self.tab(tab)
                self.assertEqual(self.browser.run(sideways), [], tab)
            self.browser.picture("narrow-message-%d" % row)
            self.browser.click("#back")
            self.browser.until("document.querySelector('nav').offsetWidth && document.activeElement.id.startsWith('row-')")

    def test_dark_and_light(self):
        """Both are readable: 4.5 to 1 between any text and what is behind it (WCAG AA)."""
        grounds = []
        for dark in (False, True):
            self.browser.look(dark=dark)
            self.reload()
            if not grounds:
                self.fill()
            self.until_rows(2)
            self.pick("Order shipped")
            self.assertEqual([pair for pair in self.browser.run(CONTRAST) if pair[1] < 4.5], [])
            opacity, color, faint = self.browser.run(PLACEHOLDER)
            self.assertEqual((opacity, color), ("1", faint))
            grounds.append(self.browser.run("getComputedStyle(document.body).backgroundColor"))
            self.browser.picture("dark" if dark else "light")
        self.assertNotEqual(*grounds)

    def test_right_to_left(self):
        """A name or subject that turns its letters around turns nothing else; Hebrew stands on its side."""
        self.show(letter("\u202egnp.exe", sender='"\u202eelpoep live" <ann@example.org>'),
                  letter("שלום, הפגישה מחר", "שלום\n", sender='"דוד" <david@example.org>'))
        edges = """const node = [...document.querySelectorAll(arguments[0])][arguments[1]], range = document.createRange();
          const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT), all = [];
          for (let text = walker.nextNode(); text; text = walker.nextNode()) {
            for (let i = 0; i < text.length; i++) {
              range.setStart(text, i); range.setEnd(text, i + 1);
              all.push([text.data[i], range.getBoundingClientRect().x]);
            }
          }
          return all;"""
        for selector, index, shown in (("#list .people", 1, "to Bob"), ("#list .people + span", 1, "unread")):
            letters = self.browser.run(edges, selector, index)
            self.assertEqual([x for _, x in letters], sorted(x for _, x in letters), shown)
        self.pick("שלום, הפגישה מחר")
        direction = "getComputedStyle(document.querySelector(arguments[0])).direction"
        for selector in ("#subject", "#list .subject", "#panel .text"):
            self.assertEqual(self.browser.run(direction, selector), "rtl")
        self.assertEqual(self.browser.run(direction, "#who dl"), "ltr")
        self.browser.press(DOWN)
        self.browser.until("document.querySelector('#subject').textContent.includes('exe')")
        name, address = (self.browser.run("const box = document.querySelectorAll('#who bdi')[arguments[0]]"
                                          ".getBoundingClientRect(); return [box.left, box.right]", place) for place in (0, 1))
        self.assertLess(name[1], address[0], "the address stands after the name")
        who = [(letter, x) for letter, x in self.browser.run(edges, "#who dd", 0) if letter in "<>"]
        self.assertLess(who[0][1], who[1][1])

    def test_much_of_everything(self):
        """800 recipients and a subject of 5,000 characters leave the rest in its place."""
        people = ["Person Number %d <p%d@example.com>" % (number, number) for number in range(800)]
        crowd = letter("x" * 5000 + " end")
        crowd.replace_header("To", ", ".join(people))
        self.show(letter("one"), crowd, to=["p%d@example.com" % number for number in range(800)])
        heights = self.browser.run("[...document.querySelectorAll('#list a')].map(a => a.offsetHeight)")
        self.assertEqual(heights[0], heights[1])
        self.assertIn("and 797 more", self.browser.run("document.querySelector('#list a').innerText"))
        for width, height in ((1280, 800), (320, 640)):
            self.browser.look(width, height)
            self.browser.run("document.querySelector('#list a').click()")
            self.browser.until("document.querySelector('#subject').textContent.endsWith('end')")
            self.assertLess(self.browser.run("document.querySelector('#panel').getBoundingClientRect().top"), height)
            self.assertIn("p799@example.com", self.browser.run("document.querySelector('#who').textContent"))
            self.browser.picture("much-%d" % width)

    def test_open_row_under_the_mouse(self):
        self.show(letter("one"), letter("two"))
        self.pick("two")
        color = "getComputedStyle(document.querySelector('#list a')).backgroundColor"
        self.browser.hover("#list li:last-child a")
        before = self.browser.run(color)
        self.browser.hover("#list li:first-child a")
        self.browser.until("document.querySelector('#list a').matches(':hover')")   # also when the list is drawn anew
        self.assertEqual(self.browser.run(color), before)

    def test_names_for_screen_readers(self):
        self.fill()
        self.pick("Order shipped")
        self.assertEqual(self.browser.run("document.documentElement.lang"), "en")
        self.browser.until("document.querySelectorAll('#list .unread').length === 1 && !at.timer")
        for path in self.browser.elements("button, input, a, iframe, nav, main"):
            if self.browser.call("GET", path + "/displayed"):
                self.assertTrue(self.browser.call("GET", path + "/computedlabel"), path)
        roles = self.browser.run("[...document.querySelectorAll('[role]')].map(e => e.getAttribute('role'))")
        for role in ("status", "alert", "tablist", "tab", "tabpanel"):
            self.assertIn(role, roles)

    def test_picture_for_the_readme(self):
        messages = [letter("Your invoice for November", "It is attached.\n", sender="Billing <billing@shop.example>"),
                    letter("Build 4711 failed", "Step 3 of 9: test_checkout, 2 failures\n", sender="CI <ci@build.example>"),
                    letter("פגישה מחר בעשר", "שלום בוב, נתראה מחר\n", sender="דוד כהן <david@example.org>"),
                    letter("Reset your password", "Someone asked for a new password. If it was you:\n",
                           sender="Accounts <accounts@shop.example>"),
                    letter("Welcome to the shop, Bob", "Welcome! Confirm: https://shop.example/confirm?token=5f2c\n", WELCOME,
                           sender="The Shop <hello@shop.example>")]
        messages[0].add_attachment(b"%PDF-", "application", "pdf", filename="invoice.pdf")
        self.show(*messages, to=["bob@example.com", "archive@shop.example"])
        older = [entry["ID"] for entry in self.api("messages")["messages"][2:]]
        self.api("messages", "PUT", {"Read": True, "IDs": older})
        self.pick("Welcome to the shop, Bob")
        self.browser.until("document.querySelectorAll('#list .unread').length === 1")
        for suffix, dark in (("", False), ("-dark", True)):
            self.browser.look(1280, 720, dark)
            picture = self.browser.picture("inbox" + suffix)
            if keep_pictures:
                shutil.copy(picture, str(PICTURE_OF_README) % suffix)


WELCOME = """<body style="font-family:sans-serif;margin:2em;color:#223"><h1 style="color:#1f686c">Welcome, Bob!</h1>
<p>Thank you for signing up. One click and you are done:</p>
<p><a href="https://shop.example/confirm?token=5f2c" style="background:#1f686c;color:white;padding:.7em 1.2em;
border-radius:6px;text-decoration:none;display:inline-block">Confirm my address</a></p>
<p style="color:#667">The link works for one day.</p></body>"""

CONTRAST = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
const light = color => {
  canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(value => value / 255).map(value =>
    value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = e => {
  const color = getComputedStyle(e).backgroundColor;
  return color === "rgba(0, 0, 0, 0)" ? behind(e.parentElement) : color;
};
return [...document.querySelectorAll("body *")].filter(e => e.offsetWidth && !e.disabled &&
  [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return [e.outerHTML.slice(0, 100), (a + 0.05) / (b + 0.05)];
  });"""

PLACEHOLDER = """  // as readable as other faint text
const style = getComputedStyle($("search"), "::placeholder");
return [style.opacity, style.color, getComputedStyle(document.querySelector("#status")).color];"""


class Hostile(InboxCase):
    def setUp(self):
        super().setUp()
        self.trap = Trap()
        self.addCleanup(self.trap.server_close)
        self.addCleanup(self.trap.shutdown)
        self.expected = ["Content Security Policy", "sandbox", "Blocked", "ERR_BLOCKED", "net::ERR_FAILED"]

    def assert_unharmed(self):
        """The page is where it was, and no script of the message has run."""
        self.assertTrue(self.browser.run("location.href").startswith(self.url + "#"))
        self.assertNotIn("owned", self.browser.run("document.title"))

    def close_new_windows(self):
        """Close what links have opened."""
        first, *others = self.browser.windows()
        for window in others:
            self.browser.switch(window)
            self.browser.call("DELETE", "/window")
        self.browser.switch(first)

    def frame(self):
        """Show the HTML anew and wait until it is there; return where the frame is."""
        self.browser.run("document.querySelector('iframe')?.remove()")
        self.browser.click("#tab-HTML")
        self.browser.frame()
        self.wait_for_frame()
        return self.browser.run("const box = document.querySelector('iframe').getBoundingClientRect(); return [box.x, box.y]")

    def wait_for_frame(self):
        """A frame that has loaded has replaced its first, empty document by one that this page may not look into."""
        self.browser.until("document.querySelector('iframe') && document.querySelector('iframe').contentDocument === null")
        self.browser.call("POST", "/execute/async", {"args": [], "script":  # and had time to do what it must not do
                          "setTimeout(arguments[0], 300)"})

    def test_html(self):
        """No script, no request, no connection, no form, no navigation; links open windows; images come only after the button,
        and then only images."""
        self.show(letter("hostile", "text", HOSTILE.format(self.trap.url)))
        self.pick("hostile")
        self.frame()
        self.browser.picture("hostile")
        self.assert_unharmed()
        self.assertEqual(self.trap.connections, 0)
        for place in range(7):  # its links and buttons
            x, y = self.frame()
            self.browser.point(x + 60, y + 20 + 50 * place)
            self.wait_for_frame()
            if place <= 2:
                lab.until(lambda: len(self.browser.windows()) > 1, what="a new window")
                links = ["/link", "/blank", "/topmost"][:place + 1]
                lab.until(lambda links=links: set(links) <= set(self.trap.asked), what="the page behind the link")
            self.assertLessEqual(len(self.browser.windows()), 2)
            self.close_new_windows()
            self.assert_unharmed()
        self.assertLessEqual(set(self.trap.asked), {"/link", "/blank", "/topmost", "/favicon.ico"})
        self.assertEqual(self.trap.referrers, {None})
        self.trap.asked.clear()
        self.frame()
        self.panel_button("Load images")
        lab.until(lambda: "/image.png" in self.trap.asked, what="the image, once it was asked for")
        self.wait_for_frame()
        self.assert_unharmed()
        images = {"/image.png", "/srcset", "/background", "/poster", "/table", "/input", "/preload", "/icon",
                  "/prefetch"}  # of a prefetch Chromium asks only that some kind of content may come from there
        self.assertEqual(set(self.trap.asked) - images, set())
        self.asked_for.append(self.trap.url)  # images and links, which were compared above

    def test_headers(self):
        """Names, subjects and file names are text, wherever they are shown."""
        bait = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
        message = letter(bait, "<script>document.title='owned'</script>", sender='"%s" <ann@example.org>' % bait)
        message["Reply-To"] = '"%s" <ann@example.org>' % bait
        message["X-Bait"] = bait
        message.add_attachment(b"x", "application", "octet-stream", filename=bait)
        self.show(message, to=["bob@example.com"])
        self.assertEqual(self.subjects(), [bait])
        self.pick(bait)
        for tab in ("Text", "Files", "Headers", "Source", "Session", "Lint"):
            self.tab(tab)
            self.assertEqual(self.browser.run("document.querySelectorAll('img, nav script, main script').length"), 0)
        self.assert_unharmed()

    def test_headers_of_the_answers(self):
        """The policies that keep the above so."""
        self.show(letter("policy", "text", "<p>html</p>"))
        page, view, images = (self.policy(path) for path in ("", "view/latest.html", "view/latest.html?images=1"))
        self.assertIn("default-src 'none'", page)
        self.assertNotRegex(page, "unsafe|https?:|[*]")
        for policy in (view, images):
            self.assertRegex(policy, r"\bsandbox allow-popups allow-popups-to-escape-sandbox;")
            self.assertIn("default-src 'none'", policy)
            self.assertNotIn("script-src", policy)
        self.assertNotRegex(view, "https?:")
        self.assertRegex(images, "img-src[^;]*http")

    def test_no_name_is_asked_for(self):
        """Opening a message in any view of it tells no name server about it."""
        name = "reader-42.evil.test"
        html = """<html><head><meta http-equiv=x-dns-prefetch-control content=on><link rel=dns-prefetch href="//a.{0}">
          <LINK/rel=preconnect href="http://b.{0}"><iframe srcdoc="&lt;link rel=preconnect href='http://c.{0}'>"></iframe>
          <template shadowrootmode=open><link rel=dns-prefetch href="//d.{0}"></template></head>
          <body><a href="http://e.{0}/">link</a><svg><a xlink:href="http://f.{0}/"><text y=20>x</text></a></svg>
          <svg><style>&lt;link rel=preconnect href="http://g.{0}">x</style></svg></body></html>""".format(name)
        with contextlib.closing(Browser(netlog=True)) as browser:
            self.send(letter("names", "http://text.%s/\n" % name, html, List_Unsubscribe="<http://u.%s/>" % name))
            browser.open(self.url + "#latest")
            browser.until("document.querySelector('#subject').textContent === 'names'")
            for tab in browser.run("at.tabs.map(tab => tab.name)"):
                browser.click("#tab-" + tab)
                browser.until("document.querySelector('#panel').ariaBusy === 'false' && at.shown.name === arguments[0]", tab)
                browser.until("(document.querySelector('iframe')?.contentDocument ?? null) === null")
            browser.end()
            said = (browser.place / "net.json").read_text(errors="replace")
        self.assertIn("HOST_RESOLVER", said)
        self.assertNotIn(name, said)

    def test_script_is_linear(self):
        """Eight times as much of what is made to keep the page busy keeps it busy about eight times as long, not 64 times."""
        shapes = ["http://", "http://a", "http://a)", "http://a ", "https:/", ")", "http://((((", "h", "\u202e", "a\n", "<a"]
        shapes += ["word ", "a\u0301", "\u05d0 a "]  # lines without an end are laid out in the square of their length
        self.show(letter("open"))
        self.pick("open")
        script = """const [shape, size] = arguments, text = shape.repeat(size / shape.length);
          const took = [0, 1, 2].map(() => {
            const began = performance.now();
            linked(text.slice(0, 50000)); $("panel").replaceChildren(...written(text)); $("panel").offsetHeight;
            linked("http://" + text); span(text, text); short(text); blocks(text);
            return performance.now() - began;
          });
          return Math.min(...took);"""
        for shape in shapes:
            with self.subTest(shape=shape):
                small, large = (self.browser.run(script, shape, size) for size in (50000, 400000))
                self.assertLess(large, 24 * small + 100)

    def policy(self, path):
        with urllib.request.urlopen(self.url + path) as answer:
            self.assertEqual(answer.headers["X-Content-Type-Options"], "nosniff")
            self.assertEqual(answer.headers["Referrer-Policy"], "no-referrer")
            return answer.headers["Content-Security-Policy"]


class Lasting(unittest.TestCase):
    def test_restart(self):
        """The page says when the server is gone, and goes on by itself when it is back; open pages do not delay the end."""
        port = lab.free_port()
        with lab.Node("--web", "127.0.0.1:%d" % port, "--no-sync") as node, contextlib.closing(Browser()) as browser:
            browser.open("http://127.0.0.1:%d/" % port)
            browser.until("document.querySelector('#live').textContent.includes('● live')")
            node.stop()
            browser.until("document.querySelector('#live').textContent.includes('not connected')")
            node.start()
            browser.until("document.querySelector('#live').textContent.includes('● live')", seconds=20)
            with smtplib.SMTP(*node.smtp, timeout=150) as client:
                client.sendmail("a@example.org", ["b@example.com"], "Subject: back\r\n\r\n")
            browser.until("document.querySelector('#list').textContent.includes('back')")

    def test_ten_thousand(self, count=10000):
        """Lists, pages, opens and follows fluently with many messages."""
        with lab.Node("--web", "127.0.0.1:0", "--no-sync") as node, contextlib.closing(Browser()) as browser:
            fill(node.smtp, count)
            browser.open("http://127.0.0.1:%d/" % node.listening["web"][0][1])
            browser.until("document.querySelector('#range').textContent === arguments[0]", "1 – 50 of %d" % count, seconds=30)
            self.soon(lambda turn: browser.click("#older"), lambda turn: browser.until(
                "document.querySelector('#range').textContent === arguments[0]",
                "%d – %d of %d" % (50 * turn + 51, 50 * turn + 100, count)))
            self.soon(lambda turn: browser.run("document.querySelectorAll('#list a')[arguments[0]].click()", turn),
                      lambda turn: browser.until(
                "document.querySelector('#list [aria-current=true] .subject')?.textContent === "
                "document.querySelector('#subject').textContent && document.querySelectorAll('#list a')[arguments[0]]"
                ".ariaCurrent === 'true'", turn))
            self.soon(lambda turn: fill(node.smtp, 1), lambda turn: browser.until(
                "document.querySelector('#range').textContent.endsWith(arguments[0])", "of %d" % (count + turn + 1)))

    def soon(self, act, wait):
        """What is done has its effect within a second, in two turns of a few: the machine's noise only ever adds."""
        took = []
        while sum(seconds < 1 for seconds in took) < 2:
            self.assertLess(len(took), 9, took)
            began = time.monotonic()
            act(len(took))
            wait(len(took))
            took.append(time.monotonic() - began)


def fill(address, count):
    """Send many small messages fast."""
    with smtplib.SMTP(*address, timeout=150) as client:
        for number in range(count):
            client.sendmail("ann@example.org", ["bob@example.com"], "From: Ann <ann@example.org>\r\nTo: bob@example.com\r\n"
                            "Subject: number %d\r\n\r\nHello\r\n" % number)


# The API beyond the page

class OtherOrigins(unittest.TestCase):
    """What a page of another origin gets, in a real browser; what goes out of capture mode, how requests may come in."""

    ASK = """return fetch(arguments[0], arguments[1]).then(answer => answer.text().then(text => answer.status + " " + text),
                                                          () => "refused")"""

    def test_a_page_elsewhere(self):
        """By --web-allow it may do all, preflighted requests too; without it can neither read nor change anything."""
        with Trap() as trap, contextlib.closing(Browser()) as browser:
            self.addCleanup(trap.shutdown)
            for allowed in (True, False):
                with lab.Node("--web", "127.0.0.1:0", "--no-sync", *["--web-allow", trap.url] * allowed) as node:
                    url = "http://127.0.0.1:%d/api/v1/messages" % node.listening["web"][0][1]
                    fill(node.smtp, 2)
                    browser.open(trap.url)
                    found = browser.run(self.ASK, url, {})
                    self.assertEqual(json.loads(found[4:])["total"] if allowed else found, 2 if allowed else "refused")
                    for method in ("PUT", "DELETE"):
                        options = {"method": method, "body": "{}", "headers": {"Content-Type": "application/json"}}
                        self.assertEqual(browser.run(self.ASK, url, options), "200 ok" if allowed else "refused")
                    browser.run(self.ASK, url, {"mode": "no-cors"})
                    with urllib.request.urlopen(url) as answer:
                        left = json.load(answer)
                    self.assertEqual((left["total"], left["unread"]), (0, 0) if allowed else (2, 2))

    def test_release(self):
        """One message goes to the server that --release names, byte for byte; the others stay."""
        with lab.Node("--web", "127.0.0.1:0", "--no-sync") as far, lab.Node(
                "--web", "127.0.0.1:0", "--no-sync", "--release", "smtp://127.0.0.1:%d" % far.smtp[1]) as near:
            urls = ["http://127.0.0.1:%d/api/v1/" % node.listening["web"][0][1] for node in (far, near)]
            fill(near.smtp, 3)
            with urllib.request.urlopen(urls[1] + "messages") as answer:
                id = json.load(answer)["messages"][1]["ID"]
            body = json.dumps({"To": ["me@example.net"]}).encode()
            urllib.request.urlopen(urls[1] + "message/%s/release" % id, body).close()
            with urllib.request.urlopen(urls[0] + "wait?query=to:me@example.net") as answer:
                self.assertEqual(json.load(answer)["Subject"], "number 1")
            with urllib.request.urlopen(urls[0] + "message/latest/raw") as answer:
                self.assertTrue(answer.read().endswith(b"Subject: number 1\r\n\r\nHello\r\n"))
            with urllib.request.urlopen(urls[0] + "messages") as answer:
                self.assertEqual(json.load(answer)["total"], 1)

    def test_a_body_in_chunks(self):
        """As clients send one whose length they do not know."""
        with lab.Node("--web", "127.0.0.1:0", "--no-sync") as node:
            address = "127.0.0.1", node.listening["web"][0][1]
            text = json.dumps({"From": {"Email": "jürgen@bücher.example"}, "To": [{"Email": "用户@例え.example"}],
                               "Subject": "Grüße " * 100, "Text": "x" * 200000}).encode()
            with contextlib.closing(http.client.HTTPConnection(*address, timeout=150)) as connection:
                pieces = (text[at:at + 999] for at in range(0, len(text), 999))
                connection.request("POST", "/api/v1/send", pieces, {"Transfer-Encoding": "chunked"}, encode_chunked=True)
                self.assertEqual(connection.getresponse().status, 200)
            with urllib.request.urlopen("http://%s:%d/api/v1/message/latest" % address) as answer:
                message = json.load(answer)
            self.assertEqual(message["Subject"].strip(), ("Grüße " * 100).strip())
            self.assertEqual(message["To"][0]["Address"], "用户@例え.example")


# Client libraries that were written for Mailpit

class MailpitClients(unittest.TestCase):
    """Each runs as its makers published it; only its server's address differs."""

    def setUp(self):
        resources = contextlib.ExitStack()
        self.addCleanup(resources.close)
        self.node = resources.enter_context(lab.Node("--web", "127.0.0.1:0", "--no-sync"))
        self.place = resources.enter_context(lab.folder())
        self.url = "http://127.0.0.1:%d" % self.node.listening["web"][0][1]
        self.environment = lab.clean_environment(self.place, URL=self.url, SMTP="%s:%d" % self.node.smtp,
                                                 NODE_PATH=str(TOOLS / "npm" / "node_modules"), PYTHONDONTWRITEBYTECODE="1")

    def run_program(self, name, text, *command):
        (self.place / name).write_text(textwrap.dedent(text))
        return lab.run([*command, name], environment=self.environment, cwd=str(self.place))

    def test_mailpit_api_client(self):
        """PyPI: mailpit-api-client, with its unittest class."""
        self.run_program("use.py", """
            import os, smtplib, unittest
            from email.message import EmailMessage
            from mailpit.client.api import API
            from mailpit.testing.unittest import EMailTestCase

            class Use(EMailTestCase):
                api_url = os.environ["URL"]

                def send(self, subject):
                    message = EmailMessage()
                    message["From"], message["To"] = "Ann <ann@example.org>", "Bob <bob@example.com>"
                    message["Cc"] = "c@example.com"
                    message["Subject"], message["Message-ID"] = subject, "<%s@example.org>" % subject
                    message["Date"] = "Tue, 24 Nov 2026 19:43:17 +0100"
                    message.set_content("text of " + subject)
                    message.add_alternative("<p>html</p>", subtype="html")
                    message.add_attachment("attached", filename="a.txt")
                    host, port = os.environ["SMTP"].split(":")
                    with smtplib.SMTP(host, int(port)) as client:
                        client.send_message(message)

                def test_all(self):
                    for subject in ("one", "two", "three"):
                        self.send(subject)
                        self.assertMessageReceived(subject + "@example.org")
                    api = self.mailpit_api
                    page = api.get_messages(limit=2, start=1)
                    self.assertEqual((page.total, page.unread, page.count, page.start), (3, 3, 2, 1))
                    self.assertEqual([entry.subject for entry in page.messages], ["two", "one"])
                    two = api.get_message(page.messages[0].id)
                    self.assertEqual((two.from_.name, two.to[0].address), ("Ann", "bob@example.com"))
                    self.assertEqual(two.cc[0].address, "c@example.com")
                    self.assertEqual((two.text.strip(), two.html.strip(), two.read), ("text of two", "<p>html</p>", True))
                    self.assertEqual(two.date.isoformat(), "2026-11-24T19:43:17+01:00")
                    self.assertLess(page.messages[1].created, page.messages[0].created)
                    self.assertEqual([part.file_name for part in two.attachments], ["a.txt"])
                    self.assertEqual(api.get_message_attachment(two.id, two.attachments[0].part_id).strip(), "attached")
                    headers = api.get_message_headers(two.id)
                    self.assertEqual((headers.message_id, headers.additional["Subject"]), (["<two@example.org>"], ["two"]))
                    self.assertEqual(api.get_messages().unread, 2)
                    api.put_messages([page.messages[1].id], "Read", True)
                    self.assertEqual([entry.read for entry in api.get_messages().messages], [False, True, True])
                    api.delete_messages([two.id])
                    self.assertEqual([entry.subject for entry in api.get_messages().messages], ["three", "one"])
                    api.delete_messages([])
                    self.assertEqual(api.get_messages().total, 0)

            unittest.main()
            """, str(TOOLS / "bin" / "python"))

    def test_pytest_mailpit(self):
        """PyPI: pytest-mailpit, with its fixtures."""
        self.environment["MAILPIT_URL"] = self.url
        self.environment["MAILPIT_SMTP"] = self.environment["SMTP"]
        output = self.run_program("test_use.py", """
            import smtplib
            from email.message import EmailMessage
            from email.policy import SMTP
            import pytest
            from pytest_mailpit.errors import MailpitAPIError, MailpitAssertionError

            def send(server, to, subject, cc=None, bcc=(), html="<a href='https://shop.example/reset/abc?a=1&amp;b=2'>reset</a>"):
                message = EmailMessage()
                message["From"], message["To"], message["Subject"] = "Shop <shop@example.org>", to, subject
                if cc:
                    message["Cc"] = cc
                message["List-Unsubscribe"] = "<https://shop.example/unsubscribe>"
                message.set_content("Your code is 123456")
                message.add_alternative(html, subtype="html")
                message.add_attachment(b"%PDF-", "application", "pdf", filename="invoice.pdf")
                with smtplib.SMTP(server.host, server.port) as client:
                    client.sendmail("bounce@example.org", [to, *([cc] if cc else []), *bcc], message.as_bytes(policy=SMTP))

            def test_inbox(mailpit_inbox, mailpit_smtp):
                send(mailpit_smtp, mailpit_inbox.address, "Reset your password", cc="other@example.com")
                message = mailpit_inbox.wait_for_message(subject="Reset your password", sender="shop@example.org")
                assert message.link("/reset/") == "https://shop.example/reset/abc?a=1&b=2"
                assert message.code() == "123456"
                assert message.attachment("invoice-*.pdf".replace("-*", "")).content_type.startswith("application/pdf")
                assert message.return_path == "bounce@example.org"

            def test_cc_and_bcc(mailpit_inbox_factory, mailpit_smtp):
                copied, hidden = mailpit_inbox_factory(), mailpit_inbox_factory()
                send(mailpit_smtp, "to@example.com", "copies", cc=copied.address, bcc=[hidden.address])
                assert copied.wait_for_message().id == hidden.wait_for_message().id
                assert hidden.address in [address.address for address in hidden.messages()[0].bcc]

            def test_nobody(mailpit_inbox):
                mailpit_inbox.assert_no_message(within=0.2)

            def test_client(mailpit, mailpit_smtp):
                mailpit.delete_all()
                since = mailpit.server_time()
                for number in range(5):
                    send(mailpit_smtp, "bob@example.com", "number %d" % number)
                info = mailpit.info()
                assert (info.messages, info.unread) == (5, 5) and info.version
                assert mailpit.is_ready()
                found = mailpit.wait_for_messages(5, recipient="bob@example.com", since=since)
                assert [message.subject for message in found] == ["number %d" % number for number in range(5)]
                page = mailpit.search('subject:"number 3"')
                assert (page.messages_count, page.total, page.messages[0].attachments) == (1, 5, 1)
                assert mailpit.search("from:shop -subject:3").messages_count == 4
                assert mailpit.get_raw(found[0].id).endswith(b"--\\r\\n")
                assert mailpit.get_attachment(found[0].attachments[0]) == b"%PDF-"
                assert mailpit.get_headers(found[0].id)["Subject"] == ["number 0"]
                mailpit.mark_read([found[0].id], read=False)
                assert mailpit.search("is:unread").messages_count == 1
                mailpit.delete_messages([found[0].id, found[1].id])
                mailpit.delete_search("subject:4")
                assert [entry.subject for entry in mailpit.search_all("to:bob", page_size=1)] == ["number 3", "number 2"]
                with pytest.raises(MailpitAPIError) as problem:
                    mailpit.get_message("nothing-like-that")
                assert problem.value.status_code == 404
                with pytest.raises(MailpitAssertionError, match="number 3"):
                    mailpit.wait_for_message(subject="number 9", timeout=0)
            """, str(TOOLS / "bin" / "python"), "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider")
        self.assertIn(b"4 passed", output)

    def test_mailpit_api(self):
        """npm: mailpit-api."""
        self.run_program("use.cjs", """
            const assert = require("node:assert/strict");
            const {MailpitClient} = require("mailpit-api");
            const mailpit = new MailpitClient(process.env.URL);
            (async () => {
              const content = Buffer.from("attached Grüße").toString("base64");
              const {ID} = await mailpit.sendMessage({
                From: {Email: "ann@example.org", Name: "Ann"}, To: [{Email: "bob@example.com", Name: "Böb"}],
                Cc: [{Email: "carol@example.com"}], Bcc: ["dan@example.com"], ReplyTo: [{Email: "re@example.org"}],
                Subject: "Grüße", Text: "Text of it", HTML: "<p>HTML of it</p>", Headers: {"X-Key": "value"},
                Attachments: [{Filename: "a.txt", Content: content, ContentType: "text/plain"}]});
              const message = await mailpit.getMessageSummary(ID);
              assert.equal(message.Subject, "Grüße");
              assert.deepEqual(message.From, {Name: "Ann", Address: "ann@example.org"});
              assert.deepEqual(message.To, [{Name: "Böb", Address: "bob@example.com"}]);
              assert.equal(message.Cc[0].Address, "carol@example.com");
              assert.equal(message.Bcc[0].Address, "dan@example.com");
              assert.equal(message.ReplyTo[0].Address, "re@example.org");
              assert.equal(message.Text.trim(), "Text of it");
              assert.equal(message.HTML.trim(), "<p>HTML of it</p>");
              assert.ok(!Number.isNaN(Date.parse(message.Date)));
              assert.ok(Array.isArray(message.Tags) && Array.isArray(message.Inline));
              const blob = await mailpit.getMessageAttachment(ID, message.Attachments[0].PartID);
              assert.match(blob.type, /^text[/]plain/);
              assert.equal(await blob.text(), "attached Grüße");
              assert.deepEqual((await mailpit.getMessageHeaders())["X-Key"], ["value"]);
              assert.match(await mailpit.getMessageSource(), /^X-Key: value/m);
              assert.match(await mailpit.renderMessageHTML(), /HTML of it/);
              assert.match(await mailpit.renderMessageText(), /Text of it/);
              const list = await mailpit.listMessages();
              assert.deepEqual([list.total, list.unread, list.start], [1, 0, 0]);
              assert.deepEqual([list.messages_count, list.messages_unread], [1, 0]);
              assert.deepEqual([list.messages[0].ID, list.messages[0].Attachments, list.messages[0].Read], [ID, 1, true]);
              assert.match(list.messages[0].Snippet, /Text of it|HTML of it/);
              assert.equal(await mailpit.setReadStatus({IDs: [ID], Read: false}), "ok");
              assert.equal((await mailpit.getInfo()).Unread, 1);
              assert.equal(await mailpit.setReadStatus({Search: "from:ann", Read: true}), "ok");
              assert.equal((await mailpit.searchMessages({query: "is:unread"})).messages_count, 0);
              for (const number of [1, 2]) await mailpit.sendMessage({From: {Email: "a@example.org"},
                To: [{Email: "bob@example.com"}], Subject: "number " + number, Text: "x"});
              assert.equal((await mailpit.waitForMessage({query: "subject:Grüße"})).ID, ID);
              assert.equal((await mailpit.waitForMessages({query: "to:bob@example.com", count: 3, exact: true})).count, 3);
              assert.equal((await mailpit.waitForMessages({count: 3, exact: true})).messages[0].Subject, "number 2");
              assert.equal(await mailpit.deleteMessagesBySearch({query: "subject:number"}), "ok");
              await assert.rejects(mailpit.getMessageSummary("nothing-like-that"), /404/);
              const wrong = {From: {Email: "a@example.org"}, To: [{Email: "no address"}]};
              await assert.rejects(mailpit.sendMessage(wrong), /400.*"Error"/s);
              assert.equal(await mailpit.deleteMessages({IDs: [ID]}), "ok");
              assert.equal((await mailpit.listMessages()).total, 0);
              assert.equal(await mailpit.deleteMessages(), "ok");
              await assert.rejects(mailpit.getMessageSummary(), /404/);
            })().catch(error => { console.error(error); process.exit(1); });
            """, "node")


keep_pictures = "--screenshot" in sys.argv

if __name__ == "__main__":
    for program in ("chromium", "chromedriver", "node"):
        if not shutil.which(program):
            sys.exit("%s is not installed: run .ci/install.sh first" % program)
    try:
        unittest.main(argv=[word for word in sys.argv if word != "--screenshot"])
    finally:
        if keep_pictures:
            print("Pictures: %s and %s" % (str(PICTURE_OF_README) % "*", PICTURES))
        else:
            shutil.rmtree(PICTURES)
