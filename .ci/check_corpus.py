"""minimail's reader with the message files that mail parsers are tested with, against two parsers that we did not write.

    python3 .ci/check_corpus.py [-v] [PATTERN of file names]

The files are those that packages of Debian and PyPI ship (PACKAGES); the parsers are `mailparser` of npm and `mail-parser` of
PyPI. Where both agree on a subject, date, address, file name, size or text, we have to agree, but for EXCEPTIONS; where both
show no text or file, we may show some. Packages and parsers are kept in a folder of the cache. The last lines say what the
largest message needed of our limits.
"""
# time limit: 300
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import minimail  # noqa: E402

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minimail-ci" / "corpus"
DEBIAN = ["golang-github-jhillyerd-enmime-dev", "libpython3.11-testsuite", "libpython3.13-testsuite"]  # those there are
PYPI = "mail-parser==4.8.0"
NPM = "mailparser@3.7.2"
FILES = re.compile(r"\.(eml|raw|mbox)$|testdata/.*(mail|attach|parts)/|test_email/data/msg_|tests/mails/")
NO_MAIL = re.compile(r"\.(py|go|golden|png|gif|jpg|json|html|bz2|gz|au|pgm|msg)$|outlook")

# Where both others agree and we do not: (file, field, why).
EXCEPTIONS = [
    ("chardet-success-iso-8859-1.raw", "text", "says us-ascii and is Latin-1: we show its umlauts, they replace them"),
]

NODE = """
const fs = require("fs"), {simpleParser} = require("mailparser");
const people = field => [].concat(field || []).flatMap(one => one.value).flatMap(one => one.group || [one])
  .map(one => one.address);
(async () => {
  for (const path of fs.readFileSync(0, "utf-8").split("\\n").filter(Boolean)) {
    let found = null;
    try {
      const options = {skipImageLinks: true, skipTextToHtml: true, skipHtmlToText: true};
      const mail = await simpleParser(fs.readFileSync(path), options);
      found = {subject: mail.subject || "", from: people(mail.from), to: people(mail.to),
        date: mail.date ? mail.date.toJSON() : "", text: mail.text || "",
        names: mail.attachments.map(one => one.filename || ""), sizes: mail.attachments.map(one => one.size)};
    } catch (error) {}
    console.log(JSON.stringify(found));
  }
})();
"""

PYTHON = """
import json, logging, sys
import mailparser
logging.disable(logging.CRITICAL)
for path in sys.stdin.read().splitlines():
    try:
        mail = mailparser.parse_from_file(path)
        import base64
        def size(one):
            payload = one["payload"]
            return len(base64.b64decode(payload)) if one["binary"] else len(payload.encode("utf-8", "surrogateescape"))
        found = {"subject": mail.subject or "", "from": [one[1] for one in mail.from_], "to": [one[1] for one in mail.to],
                 "date": mail.date.isoformat() + "Z" if mail.date else "", "text": "\\n".join(mail.text_plain),
                 "names": [one["filename"] for one in mail.attachments], "sizes": [size(one) for one in mail.attachments]}
        print(json.dumps(found))
    except Exception:
        print("null")
"""


def run(*words, **more):
    done = subprocess.run([str(word) for word in words], capture_output=True, **more)
    if done.returncode:
        raise SystemExit("%s failed: %s" % (" ".join(map(str, words[:4])), done.stderr.decode("utf-8", "replace")[-500:]))
    return done.stdout


def install():
    """Fetch packages and parsers into the cache, once."""
    if (CACHE / "complete").exists():
        return
    shutil.rmtree(CACHE, ignore_errors=True)
    (CACHE / "files").mkdir(parents=True)
    run("apt-get", "update", "-qq")
    for package in DEBIAN:
        there = subprocess.run(["apt-get", "download", "-qq", package], cwd=CACHE, capture_output=True).returncode == 0
        for archive in CACHE.glob(package + "_*.deb") if there else ():
            run("dpkg-deb", "-x", archive, CACHE / "files" / package)
            archive.unlink()
    run(sys.executable, "-m", "venv", CACHE / "venv")
    run(CACHE / "venv/bin/pip", "install", "-q", PYPI)
    run(CACHE / "venv/bin/pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", CACHE, PYPI)
    for archive in CACHE.glob("*.tar.gz"):
        shutil.unpack_archive(archive, CACHE / "files" / "mail-parser")
    (CACHE / "package.json").write_text("{}")
    run("npm", "install", "--silent", "--no-audit", "--no-fund", NPM, cwd=CACHE)
    (CACHE / "complete").touch()


def corpus(pattern):
    """Return the message files, each content once."""
    found = {}
    for path in sorted((CACHE / "files").rglob("*")):
        name = str(path.relative_to(CACHE / "files"))
        if path.is_file() and not path.is_symlink() and FILES.search(name) and not NO_MAIL.search(name.lower()) \
                and fnmatch.fnmatch(name, pattern):
            found.setdefault(path.read_bytes(), path)
    return sorted(found.values())


def others(paths):
    """Yield what the two parsers say of each message."""
    listing = "".join("%s\n" % path for path in paths).encode()
    node = run("node", "-e", NODE, input=listing, cwd=CACHE).decode("utf-8").splitlines()
    python = run(CACHE / "venv/bin/python", "-c", PYTHON, input=listing).decode("utf-8").splitlines()
    return zip(map(json.loads, node), map(json.loads, python))


def ours(raw):
    view = minimail.View(raw)
    files = view.inlines + view.attachments
    return {"subject": view.header("subject"), "from": [who["Address"] for who in view.addresses("from")],
            "to": [who["Address"] for who in view.addresses("to")], "date": view.date(""), "text": view.plain,
            "names": [part.name for part in files], "sizes": [len(part.data()) for part in files]}


def normal(field, value):
    """Return a value as it is compared: without the freedom that parsers have."""
    if field == "date":
        try:
            return datetime.fromisoformat(value.replace("Z", "+00:00")).astimezone(timezone.utc).isoformat()[:19]
        except ValueError:
            return value
    if field in ("from", "to"):
        return [address.lower() for address in value if "@" in address]
    if field in ("subject", "text"):
        return " ".join(value.split())
    if field == "names":
        return sorted(re.sub(r"\s+", " ", name or "") for name in value if name)
    return sorted(value)


def compare(path, node, python, told):
    """Return the fields of a message in which both others agree and we do not."""
    mine, wrong = ours(path.read_bytes()), []
    for field in mine:
        if node is None or python is None:
            continue
        values = [normal(field, found[field]) for found in (node, python, mine)]
        if values[0] == values[1] and (values[0] or field not in ("text", "names", "sizes")):
            told[0] += 1
            if values[2] != values[0]:
                wrong.append((field, values[0], values[2]))
    return wrong


def needed(paths):
    """Return the largest needs of a message of the corpus, by limit."""
    most = {}

    def note(limit, value, path):
        most[limit] = max(most.get(limit, (0, "")), (value, path.name))
    for path in paths:
        raw = path.read_bytes()
        view = minimail.View(raw)
        if view.cut:
            print("cut: %s: %s" % (path.name, "; ".join(view.cut)))
        note("MAX_HEAD", view.root.start, path)
        note("MAX_FIELDS", len(view.fields), path)
        note("MAX_FIELD", max((len(field) for _, field in view.fields), default=0), path)
        note("MAX_ADDRESSES", max(len(view.addresses(name)) for name in ("to", "cc", "from")), path)
        note("MAX_PARTS", len(view.parts), path)
        note("MAX_DEPTH", max(part.id.count(".") + 1 for part in view.parts), path)
        note("MAX_TEXT", max(len(view.plain), len(view.html)), path)
        note("MAX_LINKS", len(view.links()), path)
        note("MAX_LINK", max(map(len, view.links()), default=0), path)
        note("MAX_NAME_SHOWN", max(len(part.name) for part in view.parts), path)
    return most


def main():
    words = [word for word in sys.argv[1:] if word != "-v"]
    install()
    began = time.monotonic()
    paths = corpus(words[0] if words else "*")
    told, failed, used = [0], 0, set()
    for path, (node, python) in zip(paths, others(paths)):
        for field, wanted, came in compare(path, node, python, told):
            excused = [entry for entry in EXCEPTIONS if fnmatch.fnmatch(path.name, entry[0]) and entry[1] == field]
            used.update(excused)
            if not excused or "-v" in sys.argv:
                failed += not excused
                print("%s %s %s:\n    they: %.300r\n    we:   %.300r" % (
                    "known" if excused else "FAILS", path.relative_to(CACHE / "files"), field, wanted, came))
    for entry in set(EXCEPTIONS) - used if not words else ():
        print("no longer an exception: %s" % (entry,))
    for limit, (value, name) in needed(paths).items():
        print("%-15s %8d of %8d  %s" % (limit, value, getattr(minimail, limit), name))
    print("%d messages, %d fields on which both others agree, %d of them read otherwise by us (%.0f s)" % (
        len(paths), told[0], failed, time.monotonic() - began))
    return 1 if failed or not told[0] else 0


if __name__ == "__main__":
    sys.exit(main())
