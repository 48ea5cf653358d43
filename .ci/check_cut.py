"""minimail cut: every sensible copy without some sections is clean, starts, and passes the tests of the sections it has.

    python3 .ci/check_cut.py [--all] [-v] [Class[.test]]

Two copies at a time. All are looked at by ruff, started, and cut again; the whole tests are run, and mypy, on those of WHOLE,
or with --all on every copy.
"""
# time limit: 600
import collections
import contextlib
import os
import re
import smtplib
import subprocess
import sys
import time
import unittest
from concurrent.futures import ThreadPoolExecutor

import lab

WHOLE = ("--with=", "--with=relay,pop3", "--with=wait,faults,transcripts")
OTHERS = ("--with=relay", "--without=web", "--with=web,pop3,faults,transcripts", "--with=pop3", "--with=relay,standing",
          "--with=faults", "--with=web", "--without=standing", "--without=pop3", "--without=selftest")
COPIES = WHOLE + OTHERS
TESTS = lab.REPO / "test_minimail.py"
TOOLS = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "minimail-ci", "bin")
BANNER = re.compile(r"^# ={100,}\n# (\d+)  ", re.MULTILINE)
AT_ONCE = 2
whole = WHOLE
AGAIN = """if True:
    import sys
    sys.path.insert(0, sys.argv[1])
    import minimail
    source = open(minimail.__file__, encoding="utf-8").read()
    needs = minimail.needed_by(minimail.read_sections(source))
    with open(sys.argv[2], encoding="utf-8") as file:
        text = file.read()
    map = text[:text.index("Legend")]
    keep = {name for name in needs if "[%s]" % name in map or "[%s," % name in map}
    assert minimail.cut(text, keep) == text, "cut again it is another"
    assert minimail.cut(text, set()) == minimail.cut(source, set()), "cut further it is not what one cut leaves"
    """


def setUpModule():
    """Write all copies, each in a folder of its own under the name that its user gives it."""
    global copies
    stack = contextlib.ExitStack()
    unittest.addModuleCleanup(stack.close)
    place = stack.enter_context(lab.folder())
    copies = {}
    for number, words in enumerate(COPIES):
        (place / str(number)).mkdir()
        copies[words] = place / str(number) / "minimail.py"
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda words: lab.run([sys.executable, lab.MINIMAIL, "cut", words, copies[words]]), COPIES))


def sections_of(copy):
    """Return {number: name} of its sections, as its map has them."""
    head = copy.read_text(encoding="utf-8").split("\nLegend")[0]
    return {number: name for number, name in re.findall(r"(?m)^ {4,5}(\d+)  .*?(?:\[(\w+).*)?$", head)}


def classes_of(text):
    """Return {class: number of the section whose tests it has}, "" of those of no section."""
    starts = [0] + [match.start() for match in BANNER.finditer(text)] + [len(text)]
    found = {}
    for start, end in zip(starts, starts[1:]):
        number = BANNER.match(text, start)
        for name in re.findall(r"(?m)^class (\w+)", text[start:end]):
            found[name] = number.group(1) if number else ""
    return found


class Copies(unittest.TestCase):
    def each(self, function, some):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            pending = {words: pool.submit(function, copies[words]) for words in some}
            for words, result in pending.items():
                with self.subTest(words):
                    result.result()

    def test_style(self):
        ruff = [os.path.join(TOOLS, "ruff"), "check", "--no-cache", "--config", lab.REPO / ".ruff.toml"]
        self.each(lambda copy: lab.run([*ruff, copy]), COPIES)

    def test_types(self):
        self.each(self.look_at, whole)

    def look_at(self, copy):
        lab.run([os.path.join(TOOLS, "mypy"), "--strict", "--cache-dir", copy.parent / "mypy", copy], seconds=180)

    def test_they_start_and_take_mail(self):
        self.each(self.start, COPIES)

    def start(self, copy):
        named = sections_of(copy).values()
        listeners = ["smtp"] + [name for name in ("pop3", "web") if name in named]
        place = copy.parent / "home"
        place.mkdir()
        process = lab.start([sys.executable, "-W", "error", copy, "--data", place / "data", "--quiet",
                             *(word for name in listeners for word in ("--" + name, "127.0.0.1:0"))],
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=lab.clean_environment(place), cwd=place)
        lines = []
        while not lines or lines[-1] not in ("ready", ""):
            lines.append(process.stdout.readline().decode().rstrip("\n"))
        self.assertEqual([line.split()[1] for line in lines[:-1]], listeners, lines)
        with smtplib.SMTP("127.0.0.1", int(lines[0].rpartition(":")[2]), timeout=150) as client:
            client.sendmail("a@x", ["bob@x"], "Subject: hi\r\n\r\nhello\r\n")
        self.assertEqual(len(os.listdir(place / "data/mail/x/bob/new")), 1)
        process.terminate()
        output, errors = process.communicate(timeout=lab.SLOWER * 30)
        self.assertEqual((process.returncode, output, errors), (0, b"", b""))

    def test_cut_again(self):
        self.each(lambda copy: lab.run([sys.executable, "-c", AGAIN, lab.REPO, copy]), COPIES)

    def test_all_tests_of_its_sections(self):
        """They pass, and are not skipped: of each section that is there, at least half of them run."""
        self.each(self.run_tests, whole)

    def run_tests(self, copy):
        environment = dict(lab.clean_environment(copy.parent), PYTHONDONTWRITEBYTECODE="1")
        began = time.monotonic()
        process = lab.start([sys.executable, TESTS, "--module", copy, "-v"], stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        output = process.communicate(timeout=500)[0].decode("utf-8", "replace")
        self.assertEqual(process.returncode, 0, output[-6000:])
        ran, skipped = collections.Counter(), collections.Counter()
        home = classes_of(TESTS.read_text(encoding="utf-8"))
        for case, result in re.findall(r"(?ms)^test_\w+ \(__main__\.(\w+).*?\.\.\. (?:.*?\n)??(ok|skipped)\b", output):
            (ran if result == "ok" else skipped)[home[case]] += 1
        for number in [number for number in sections_of(copy) if number != "1"]:
            self.assertGreaterEqual(ran[number], skipped[number], "section %s: that many run, and are skipped" % number)
        figures[copy] = "%4d tests run, %3d skipped, %3d s" % (
            sum(ran.values()), sum(skipped.values()), time.monotonic() - began)


figures = {}


def tearDownModule():
    for words, copy in copies.items():
        lines = copy.read_text(encoding="utf-8").count("\n")
        print("%-40s %6d lines  %s" % (words, lines, figures.get(copy, "")), file=sys.stderr)


if __name__ == "__main__":
    if "--all" in sys.argv:
        sys.argv.remove("--all")
        whole = COPIES
    unittest.main()
