#!/usr/bin/env python3
"""minimail: a whole mail node in one file.

    python3 minimail.py                          # every mailer may send to 127.0.0.1:1025; nothing leaves the machine
    python3 minimail.py --domain example.org     # a real node: keeps example.org's mail, relays the rest by DNS

    import minimail                              # the same server inside a program or a test
    with minimail.Node(smtp="127.0.0.1:0") as node:
        host, port = node.smtp_address
        message = node.wait_for("bob@example.com", timeout=5)

How mail travels, and the section that does each step:

    a mailer --SMTP--> 15 session --> 7 delivery --+--> 6 mailbox --> 16 POP3 --> the owner's mail client
                                                   |        +------> 21 letters --> 22 web inbox --> your browser, your tests
                                                   |
                                                   +--> 9 queue --> 12 relay --> 8 DNS --> 11 client --SMTP--> elsewhere
                                                                        +------> 10 bounce --> back to 7

Map. A section uses only names printed above it. One with a name on the right is optional: the rest runs without it, except
what needs it.

     1  head
     2  limits, replies, registry
     3  addresses, headers, options
     4  how it waits, the wire
     5  durable files
     6  mailboxes and accounts
     7  delivery
     8  DNS                             [relay]
     9  queue                           [relay]
    10  bounces and other reports       [relay]
    11  SMTP client                     [relay]
    12  relay                           [relay]
    13  standing                        [standing, needs relay]
    14  sessions and listeners
    15  SMTP
    16  POP3                            [pop3]
    17  node
    18  reading mail                    [reading]
    19  transcripts and lint            [transcripts]
    20  faults                          [faults]
    21  letters: searching, waiting     [wait, needs reading]
    22  web inbox and API               [web, needs wait]
    23  selftest                        [selftest, needs relay pop3 faults]
    24  cutting this file               [cut]
    25  command line

Legend, used without exception. Text on the wire and in stores is bytes; parsed addresses are str. Durations are seconds,
sizes bytes. How it waits stands at the head of section 4.

    address    an Address, or its text local@domain
    key        the lower-case text by which addresses are compared
    mailbox    a key that has a Maildir
    sender     the envelope's reverse-path, "" for the null one
    envelope   sender and recipients of one message
    draft      a message file still being written
    parcel     a draft with where it goes, until it is on disk
    item       a message in a mailbox
    entry      one in the queue                                     [relay]
    exchanger  a host named by an MX record                         [relay]
    letter     a message as people see it, in however many mailboxes    [wait]
    stores     what the data directory holds
    site       what all sessions of a node share
    wire       one connection
    task       what the loop carries

Copyright (C) 2026 the minimail founders.  Permission to use, copy, modify, and/or distribute this software for any
purpose with or without fee is hereby granted.  THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES
WITH REGARD TO THIS SOFTWARE INCLUDING ALL IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS.  IN NO EVENT SHALL THE
AUTHOR BE LIABLE FOR ANY SPECIAL, DIRECT, INDIRECT, OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES WHATSOEVER RESULTING FROM
LOSS OF USE, DATA OR PROFITS, WHETHER IN AN ACTION OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF OR IN
CONNECTION WITH THE USE OR PERFORMANCE OF THIS SOFTWARE.  (SPDX: 0BSD)
"""
from __future__ import annotations

import os
import sys

# A script is compiled at each start, and the 40 MiB that this takes stay as long as it runs. So a node goes on as a module,
# whose bytecode is cached; a command has ended before that would pay. Its name in the code is for pgrep -f.
if __name__ == "__main__" and __spec__ is None and type(globals().get("__loader__")).__name__ == "SourceFileLoader" \
        and hasattr(sys, "orig_argv") and sys.executable \
        and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)) \
        and os.path.basename(__file__) == "minimail.py" and os.name == "posix" \
        and all(word.startswith("-") for word in sys.argv[1:2]):
    from importlib.util import cache_from_source
    _folder, _cached = os.path.dirname(os.path.abspath(__file__)), cache_from_source(os.path.abspath(__file__))
    if not os.path.exists(_cached) and not sys.dont_write_bytecode and os.access(sys.pycache_prefix or _folder, os.W_OK):
        globals()["__loader__"].get_code(__name__)  # writes it
        try:                                        # of one that a power cut has cut off, Python would make a traceback
            with open(_cached, "rb") as _file:
                os.fsync(_file.fileno())
        except OSError:
            pass
    if os.path.exists(_cached):
        _code = "import sys; sys.path[0] = %r; import minimail; sys.exit(minimail.main())  # minimail.py" % _folder
        os.execv(sys.executable, [*sys.orig_argv[:-len(sys.argv)], "-c", _code, *sys.argv[1:]])

import array
import binascii
import bisect
import collections
import contextlib
import errno
import functools
import heapq
import io
import ipaddress
import itertools
import json
import logging
import re
import selectors
import socket
import socketserver
import stat
import struct
import threading
import time
import types
from queue import Empty, SimpleQueue

try:
    import fcntl
except ImportError:                                 # Windows
    fcntl = None  # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:                                   # what takes long to import stands in other words below
    import base64
    import dataclasses
    import email.utils
    import fnmatch
    import hashlib
    import hmac
    import secrets
    import shutil
    import ssl
    import tempfile
    from email.message import EmailMessage
    from typing import (Any, AnyStr, BinaryIO, Callable, Container, Coroutine, Deque, Dict, Generator, Iterable, Iterator,
                        List, NamedTuple, NoReturn, Optional, Sequence, Set, Tuple, Type, TypeAlias, Union)

__version__ = "1.0"
__all__ = ["Node", "Message", "Policy", "Refused", "Reply", "main", "__version__"]

log = logging.getLogger("minimail")
log.addHandler(logging.NullHandler())               # the library prints nothing; main() adds a real handler


# A start is short and small because what it does not need is made later, and because of `typing` and `dataclasses` it has
# only what stands here: they take as long as half of the rest.

class Later:
    """A module, or a regular expression, that is made when it is first used."""

    def __init__(self, make: Callable[..., Any], *given: Any) -> None:
        self._make = functools.partial(make, *given)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._make(), name)
        setattr(self, name, value)                  # from now on it is found without coming here
        return value


def expression(text: AnyStr, flags: int = 0) -> re.Pattern[AnyStr]:
    """Return what re.compile() does, a little later."""
    return Later(re.compile, text, flags)  # type: ignore[return-value]


LATER = ("base64", "email.utils", "fnmatch", "hashlib", "hmac", "secrets", "shutil", "tempfile")

if not TYPE_CHECKING:
    base64, email, fnmatch, hashlib, hmac, secrets, shutil, tempfile = (Later(__import__, name) for name in LATER)

    class TupleMaker(type):
        """Makes of a class with annotations a named tuple."""

        def __new__(cls, name, bases, body):
            if not bases:
                return super().__new__(cls, name, bases, body)
            fields = body["__annotations__"]
            made = collections.namedtuple(name, fields, defaults=[body.pop(field) for field in fields if field in body])
            for attribute, value in body.items():
                setattr(made, attribute, value)
            return made

    class NamedTuple(metaclass=TupleMaker):
        """As in typing."""

    class dataclasses:
        """As the module, as far as it is used here."""

        class field:
            def __init__(self, default=NotImplemented, default_factory=None, metadata=None, **_):
                self.default, self.make, self.metadata = default, default_factory, metadata

        @staticmethod
        def dataclass(cls=None, frozen=False):
            """Give a class the constructor that its annotations tell of; `frozen` is for who checks types."""
            if cls is None:
                return dataclasses.dataclass
            fields = cls.__fields__ = []
            for name in cls.__annotations__:
                given = vars(cls).get(name, NotImplemented)
                fields.append(given if isinstance(given, dataclasses.field) else dataclasses.field(given))
                fields[-1].name = name
                setattr(cls, name, fields[-1].default)
            defaults = {field.name: field.default for field in fields}
            made = [(field.name, field.make) for field in fields if field.make]
            needed = len(made) < list(defaults.values()).count(NotImplemented)

            def __init__(self, *given, **named):
                values = vars(self)
                values.update(defaults)
                values.update(zip(defaults, given), **named)
                for name, make in made:
                    if values[name] is NotImplemented:
                        values[name] = make()
                if len(given) > len(defaults) or len(values) > len(defaults) or needed and NotImplemented in values.values():
                    raise TypeError("%s() takes %s" % (cls.__name__, ", ".join(defaults)))
            cls.__init__ = __init__
            return cls

        @staticmethod
        def fields(cls):
            return cls.__fields__

        @staticmethod
        def replace(one, **changes):
            return type(one)(**dict(vars(one), **changes))


# ======================================================================================================================
# 2  Limits, replies, the registry.  Values with names; knows nothing of sockets and files.
# ======================================================================================================================

MAX_RECIPIENTS = 1000               # in one transaction (RFC 5321 section 4.5.3.1.8 asks for at least 100)
MAX_COMMAND = 4096                  # bytes in a command line; the RFC's 512 do not hold for long UTF-8 addresses
MAX_PATH = 1024                     # characters in an address, of which the RFC has 256
MAX_AUTH_LINE = 12288               # RFC 4954 section 4
MAX_ERRORS = 10                     # wrong commands in one session, then 421 (RFC 5321 section 4.3.2)
MAX_REFUSALS = 100                  # refused recipients in one session, then 421: somebody is guessing names
MAX_RECEIVED = 50                   # trace headers, then the message is in a loop (RFC 5321 section 6.3)
MAX_EXPANSION = 1000                # addresses one recipient may become through aliases
MAX_ALIAS_STEPS = 10 * MAX_EXPANSION   # targets looked at for one recipient: lists may name each other many times over
MAX_ALIAS_DEPTH = 50                # lists inside lists
MAX_REMEMBERED = 100_000            # destinations of aliases kept in memory, so that naming one again costs nothing, and ...
MAX_RECENT = 1000                   # ... addresses of any kind
MAX_NAME = 255                      # bytes in a file name: what ext4, NTFS and APFS take
MAX_HTTP_BODY = 1 << 26             # bytes in a request to the JSON API that brings a message, and ...
MAX_SMALL_BODY = 1 << 22            # ... in any other: a hundred thousand IDs
MAX_HTTP_HEAD = 1 << 16             # bytes in a request's header fields, and ...
MAX_HTTP_FIELDS = 100               # ... their number (http.client takes no more)
MAX_JSON_VALUES = 200_000           # in a request: each takes some 100 bytes of memory, whatever it takes on the wire
MAX_DESKS = 4                       # requests that have messages in memory at once
LARGE = 1 << 20                     # bytes from which on a request's body waits on disk
WEB_SHARE = 4                       # of --max-connections, one in so many can be the web's
WEB_TIMEOUT = 60.0                  # seconds within which a request is complete (less with a shorter --timeout), and ...
WEB_RATE = 1 << 14                  # ... bytes/s that it or its answer must have; browsers give up long before
WEB_IDLE = 15.0                     # seconds a connection is kept for its next request
WAIT_STEP = 0.1                     # seconds after which who waits looks around
MAX_TAGGED = 1 << 22                # bytes of memory for messages' tags
MAX_TAGS = 50                       # of one message
MAX_RELEASED = 100                  # addresses that a message is released to at once
MAX_HOOKED = 1000                   # messages that a webhook still has to be told of
MAX_WORKERS = 64                    # processes sharing a data directory
MAX_SUBMITTED_HEADER = 1 << 20      # bytes of header that `sendmail` takes; it is held in memory, the body is not
MAX_SUBMITTED_NAMES = 10_000         # recipients named to it; past MAX_RECIPIENTS of them come back
MAX_PASSWORD = 4096                 # bytes read from standard input
SPARE_DESCRIPTORS = 200             # open files beside those of connections, drafts and the relay: listeners, mailboxes, queue
MIN_RATE = 1024                     # bytes/s below which a message transfer runs into the command's deadline
BLOCK = 1 << 16                     # bytes read from a socket at once, and ...
BIG_BLOCK = 1 << 18                 # ... while content flows
MAX_TURN = 50                       # commands a session may have answered before others have their turn
MAX_HELPERS = 32                    # threads for what conversations wait for and the loop does not do itself
MAX_TRANSCRIPT = 1 << 16            # bytes of a conversation that are kept with a message, and ...
MAX_INTRODUCTION = 20               # ... lines of what was said before the first one, ...
MAX_INTRODUCED = 100                # ... characters in each: they are kept with every message of the connection
MAX_STEP = 1000                     # messages POP3 lists before others have their turn
MAX_LISTED = 1_000_000              # messages in mailboxes whose lists stay in memory, some 85 bytes each
MAX_REMOVED = 50                    # messages a POP3 QUIT removes without a thread of its own
MAX_STRANGE = 3                     # wrong commands before any right one, then the end: that is no mail client
MAX_IDLE_COMMANDS = 10_000          # commands since the last message that lead to none (NOOP, RSET, what is refused), then 421
HEAVY_MESSAGE = 1 << 20             # bytes, and ...
HEAVY_DELIVERY = 16                 # ... mailboxes of one message from which on others do not wait for its commit
STALE_DRAFT = 36 * 3600             # seconds after which a foreign file in tmp/ is rubbish (maildir(5))
LOGIN_FAILURES = 10                 # wrong passwords from one address within ...
LOGIN_WINDOW = 600                  # ... these seconds cut it off, and ...
ACCOUNT_FAILURES = 100              # ... so many for one account, from wherever: its owner may be known already
SHUTDOWN_GRACE = 9.0                # seconds a message in flight has when the node stops
MAX_HEAD = 1 << 20                  # bytes of a header that are shown and searched; the longest real one had ...
MAX_FIELD = 1 << 18                 # bytes of one field that are read: some 8,000 recipients
MAX_FIELDS = 2000                   # fields shown; real mail has up to ...
MAX_ADDRESS = 1000                  # characters of an address or its name that are shown (RFC 5321 has 320)
MAX_ADDRESSES = 10_000              # people of one header that are shown, and ...
MAX_NAMED = 1000                    # ... in the list of messages
MAX_PARAMETERS = 100                # parameters of a Content-Type, RFC 2231 pieces counted singly
MAX_DEPTH = 50                      # multiparts in one another, and ...
MAX_PARTS = 1000                    # ... parts of a message
MAX_DELIMITERS = 100_000            # lines of a message that could end a part and are looked at
MAX_PIECES = 100_000                # padded pieces of base64 that follow one another in a part
MAX_TEXT = 1 << 22                  # bytes of a text or HTML body that are shown, and ...
MAX_RENDERED = 1 << 20              # ... characters of HTML that are made text
MAX_LINKS = 5000                    # links of a message that are listed, ...
MAX_LINK = 8192                     # ... characters in one: what servers take
MAX_NAME_SHOWN = 1000               # characters of a file name
MAX_SNIPPET = 250                   # characters of a message in the list
MAX_EVENTS = 20                     # events of a calendar that are shown, and ...
MAX_ATTENDEES = 200                 # ... who is invited to one
MAX_SUMMARIES = 1 << 26              # bytes of memory for the entries of lists, and ...
MAX_SEARCHED = 1 << 27              # ... for what messages are searched by
MAX_SEARCH = 4096                   # characters of a search, and ...
MAX_TERMS = 50                      # ... what it asks for
UDP_SIZE = 1232                     # bytes of a DNS answer we take over UDP: no fragments (DNS flag day 2020)
MAX_RECORDS = 500                   # looked at in one DNS answer
MAX_CNAMES = 8                      # followed from one name
MAX_NAME_SERVERS = 3                # of resolv.conf that are asked, as glibc does
TTL_CAP, NEGATIVE_CAP = 86400, 3600     # seconds a DNS answer is remembered at most; that there is nothing (RFC 2308)
FAILURE_TTL = 5                     # seconds for no answer, or for nothing without a SOA that says how long
CACHE_BYTES = 16 << 20              # of DNS answers in memory, roughly; then the oldest go
SERVER_PAUSE = 60                   # seconds for which a name server that did not answer is asked last
EDNS_PAUSE = 900                    # seconds for which one that cannot cope with EDNS is asked without

# The queue, and mail that leaves.
MAX_QUEUE = 1_000_000               # messages in the queue, then 452: something is badly wrong
MAX_ACTIVE = 2000                   # entries of one sender held in memory; the others wait on disk
MAX_WAITING = 500                   # of them for one destination, so that a slow one does not fill them all
MAX_SENDERS = 128                   # outbound connections at once for one sender's mail; for all there are ...
SHARES = 2                          # ... so many times as much of both, of which nobody has more than are free for others
MAX_SENDERS_PER_HOST = 10           # to one destination; --limit says otherwise, as it does of the next two
MAX_MESSAGES = 100                  # on one connection: many hosts take no more
MAX_RECIPIENTS_AT_ONCE = 100        # in one transaction: what each host has to take (RFC 5321 section 4.5.3.1.8)
MAX_EXCHANGERS = 10                 # hosts tried for one delivery attempt, and addresses of each
MAX_REPLY_LINE = 2048               # bytes looked at in one line of a peer's reply, ...
MAX_REPLY_LINES = 100               # ... lines kept of it, and ...
MAX_REPLY = 1 << 20                 # ... bytes until it has to end
PIPELINE = 4096                     # bytes of commands under way: what fits into the smallest socket buffer anybody has
FINAL_WAIT = 600.0                  # seconds for the reply to the final dot (RFC 5321 section 4.5.3.2.6)
MAX_PAUSE = 300.0                   # seconds a destination that cannot be reached is left alone
NARROW = 300.0                      # seconds one that refused a connection too many gets no more of them
MAX_REWRITTEN = 1 << 18             # bytes of headers in which --rewrite looks for From
TICK = 0.1                          # seconds between two looks at what other processes did
STINT = 0.5                         # seconds of taking up what is due, then what came meanwhile has its turn
LINGER = 0.2                        # seconds an outbound connection is kept for the next message
AGAIN = 5.0                         # seconds until what the disk refused is done again
LOOK_AROUND = 1.0                   # seconds between two looks for processes that died
SWEEP = 60.0                        # seconds between two looks for entries that nobody knows of, whoever lives

# Standing.
MAX_SIGNED_HEADER = 1 << 20         # bytes of header held to sign it; a longer one goes out unsigned, and ...
MAX_SIGNED_FIELDS = 2000            # ... one with more fields, each of which is named in the signature
MAX_SIGNATURES = 8                  # keys that sign one message
MAX_KEY_FILE = 1 << 16              # bytes in a key or certificate file
MAX_KEY_BITS = 8192                 # of an RSA key: a longer one takes seconds for each message
SRS_DAYS = 21                       # for which mail comes back to a forward's reverse-path, as with postsrsd
MAX_STS_POLICY = 1 << 16            # bytes (RFC 8461 section 3.3)
MAX_STS_HOSTS = 1000                # named in a policy
STS_TIMEOUT = 30.0                  # seconds for fetching one
STS_RETRY = 300.0                   # seconds after which it is tried again (RFC 8461 section 3.3)
STS_REFRESH = 86400.0               # seconds after which an unchanged policy is fetched again, so that it does not run out
MAX_SPF_LOOKUPS = 10                # RFC 7208 section 4.6.4, ...
MAX_SPF_VOIDS = 2                   # ... and those of them without an answer


class Reply(NamedTuple):
    """An SMTP reply (RFC 5321 section 4.2) with its enhanced status code (RFC 3463); `close` ends the session after it."""
    code: int
    enhanced: str
    text: str
    close: bool = False

    @functools.lru_cache(maxsize=100)               # noqa: B019  a value that holds nothing else
    def encode(self) -> bytes:
        """Return the reply as it goes over the wire; a text of several lines becomes a reply of several lines."""
        prefix = self.enhanced + " " if self.enhanced else ""
        if "\n" not in self.text:
            return ("%d %s%s\r\n" % (self.code, prefix, self.text)).encode("utf-8", "replace")
        before, _, last = self.text.rpartition("\n")
        head = ["%d-%s%s\r\n" % (self.code, prefix, line) for line in before.split("\n")]
        return ("%s%d %s%s\r\n" % ("".join(head), self.code, prefix, last)).encode("utf-8", "replace")

    def __str__(self) -> str:
        return " ".join(filter(None, (str(self.code), self.enhanced, self.text)))


class Refused(Exception):
    """Raised where a command, an address or a message is refused; carries the Reply that says so."""

    def __init__(self, reply: Union[Reply, int], enhanced: str = "", text: str = "", close: bool = False) -> None:
        if isinstance(reply, int):
            reply = Reply(reply, enhanced, text, close)
        super().__init__(str(reply))
        self.reply = reply


class UsageError(ValueError):
    """A wrong option, value or variable; the message is the one line that says which (exit status 2)."""


class CannotRun(OSError):
    """What was asked for cannot be done on this machine; the message says what to do (exit status 1, if not another)."""
    status = 0


class Extension:
    """What an optional section adds to the node: it overrides what it has and enters itself into EXTENSIONS."""

    name = ""
    commands: Dict[str, Callable[["Config", List[str]], int]] = {}

    def queue(self, storage: "Storage", config: "Config", clock: Callable[[], float]) -> Any:
        """Return the queue for mail that goes elsewhere, None without one."""

    def listeners(self, config: "Config") -> List[Any]:
        """Return the listeners that the options ask for, their ports taken; OSError."""
        return []

    def outbound(self, config: "Config", stores: Any, resolver: Any) -> Any:
        """Return what has a say in mail that leaves (Outbound), None without one."""

    def equip(self, node: "Node") -> None:
        """Give the site what this section has for its sessions, before the first of them."""

    def start(self, node: "Node") -> None:
        """Begin to work: the node takes connections."""

    def stop(self, node: "Node") -> None:
        """Begin nothing new; also called where start() was not."""

    def join(self, node: "Node", seconds: float) -> None:
        """Return when what was begun has come to its end, or after so many seconds."""

    def recorder(self, mailboxes: Any) -> Any:
        """Return what keeps how messages came."""
        raise NotImplementedError

    def matcher(self, node: "Node", search: str) -> Callable[["Message"], bool]:
        """Return a function that tells whether a message matches a search."""
        raise NotImplementedError

    def parse_fault(self, text: str) -> Any:
        """Return the rule of --fault; ValueError."""
        raise NotImplementedError


EXTENSIONS: List[Extension] = []


def has_extension(name: str) -> bool:
    """Return whether this copy of the file has the section of that name."""
    return any(section.name == name for section in EXTENSIONS)


def extension(name: str) -> Extension:
    """Return the section of that name; CannotRun when this copy of the file lacks it."""
    for section in EXTENSIONS:
        if section.name == name:
            return section
    raise CannotRun("this copy of minimail has no %s section" % name)


def event(_name: str, **fields: Any) -> None:
    """Log one event as one line; the handler that main() sets writes it as text or JSON."""
    if log.isEnabledFor(logging.INFO):
        log.info(_name, extra={"fields": fields})


def reason_of(error: BaseException) -> str:
    """Return what went wrong in words, without the system's number for it."""
    return str(getattr(error, "strerror", None) or error)


def printable(text: Union[str, bytes], limit: int = 500) -> str:
    """Return text from outside with control characters, separators and lone surrogates escaped, for logs and replies."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[:limit] + "..."


# ======================================================================================================================
# 3  Addresses, envelopes, headers, options.  Pure: text in, values out; knows no socket, no file, no clock.
# ======================================================================================================================

class Address(NamedTuple):
    """A parsed address; `local` is without quotes, `domain` "" for the bare postmaster of RFC 5321 section 4.1.1.3, and for
    other bare names where they are taken: AddressBook.qualified() gives them a domain."""
    local: str
    domain: str

    def __str__(self) -> str:
        """Return local@domain, the local part quoted where RFC 5321 section 4.1.2 wants it."""
        local = quote_local(self.local)
        return local + "@" + self.domain if self.domain else local

    @property
    def key(self) -> str:
        """The text by which addresses are compared and mailboxes named."""
        return lower(self.local) + "@" + lower(self.domain) if self.domain else lower(self.local)


NO_ATEXT = r'\x00-\x20"(),:;<>@\[\\\]\x7f'           # a set with all of Unicode would take long to compile
ATOM = "[^.%s]+" % NO_ATEXT
DOT_STRING = expression(r"%s(?:\.%s)*" % (ATOM, ATOM))
ANY_DOTS = expression("[^%s]+" % NO_ATEXT)           # what some mobile networks gave away: a..b.@example.jp
QUOTED = expression(r'"(?:[^"\\\x00-\x1f\x7f]|\\[\x20-\x7e])*"')
NO_LETTER = r"\x00-,./:-@\[-\^`{-\x7f"             # letters, digits, hyphen and underscore apart
LABEL = "[^-{0}](?:[^{0}]*[^-{0}])?".format(NO_LETTER)
DOMAIN = expression(r"%s(?:\.%s)*" % (LABEL, LABEL))
SOURCE_ROUTE = expression(r"@[^,:@<>\s]+(?:,@[^,:@<>\s]+)*:")
NO_CHARACTER = expression("[\ud800-\udfff\x80-\x9f]")     # lone surrogates and C1 controls
BLANK_LINE = expression(rb"\n\r?\n")
FOLD = expression(rb"\r?\n[ \t]+")
FIELD = expression(rb"[^\n]*(?:\n[ \t][^\n]*)*\n?")
TWO_BYTES = expression(rb"[\xc2-\xf4][\x80-\xbf]")     # as characters in UTF-8 begin, and hardly anything else
UNINDENTED = expression(rb"(;[ \t]{0,20}\r?)\n(?=[\w*-]{1,40}=)")      # a parameter that should have begun with a blank
FIELD_START = expression(rb"[!-9;-~]{1,200}[ \t]{0,20}:")
ADDRESS_WORD = expression(r"=\?[^?\s]{1,60}\?[bq]\?[^?\s]*\?=|@\[[^\[\]\s]{1,60}\]|"
                          r"[^\s\"(<>,;:@=\[]+(?:@[^\s\"(<>,;:@=\[]+)?|[@=>\[]|\s+", re.IGNORECASE)
ADDRESS_QUOTED = expression(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
ADDRESS_ANGLE = expression(r'<+("[^"\\]{0,200}"[^<>]*|[^<>]*)>|<+([^<>,;\s]*)')
ADDRESS_STRAY = expression(r'\([(\\]*|"["\\]*|.', re.DOTALL)
ADDRESS_END = expression(r"[,;][,;\s]*|:+")
PARENTHESIS = expression(r"\\.|[()]", re.DOTALL)
BAD_SYNTAX = Reply(501, "5.1.3", "bad address syntax")


@functools.lru_cache(maxsize=1000)
def lower(text: str) -> str:
    """Return text in lower case, but never turn a look-alike (the Kelvin sign) into an ASCII letter."""
    if text.isascii():
        return text.lower()
    return "".join(c.lower() if c.isascii() or not c.lower()[0].isascii() else c for c in text)


@functools.lru_cache(maxsize=1000)
def quote_local(local: str) -> str:
    return local if DOT_STRING.fullmatch(local) else '"%s"' % re.sub(r'([\\"])', r"\\\1", local)


def is_domain(text: str) -> bool:
    return bool(DOMAIN.fullmatch(text)) and len(text) <= 255 and all(len(label) <= 63 for label in text.split("."))


@functools.lru_cache(maxsize=1000)
def ascii_domain(domain: str) -> str:
    """Return a domain in lower case as A-labels, as DNS and peers without SMTPUTF8 take it (RFC 5891); ValueError."""
    domain = domain.rstrip(".")
    return domain.lower() if domain.isascii() else ".".join(map(a_label, domain.split(".")))


def a_label(label: str) -> str:
    """Return one label of a domain in ASCII; ValueError. The letters that IDNA 2003 would turn into others stay themselves."""
    if label.isascii():
        return label.lower()
    try:
        if re.search("[\u00df\u03c2\u200c\u200d]", label):
            import unicodedata
            ascii_label = "xn--" + unicodedata.normalize("NFC", label.lower()).encode("punycode").decode("ascii")
        else:
            ascii_label = label.encode("idna").decode("ascii")
    except UnicodeError as error:
        raise ValueError("%s has no ASCII form: %s" % (printable(label, 70), error)) from None
    if not re.fullmatch(r"[a-z0-9_-]{1,63}", ascii_label):
        raise ValueError("%s has no ASCII form" % printable(label, 70))
    return ascii_label


def domain_literal(domain: str) -> Optional[str]:
    """Return the IP address in `[192.0.2.1]` or `[IPv6:2001:db8::1]`; None for anything else (RFC 5321 section 4.1.3)."""
    if not (domain.startswith("[") and domain.endswith("]")):
        return None
    text = domain[1:-1]
    try:
        if text[:5].lower() == "ipv6:":
            return str(ipaddress.IPv6Address(text[5:]))
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        return None


def parse_address(text: str, lenient: bool = False) -> Address:
    """Return the Address of local@domain (RFC 5321 section 4.1.2, RFC 6531); Refused 501 or 553 when it is none.

    `lenient`, for whom we serve, also takes dots anywhere in the local part, and bare names, whose domain is "".
    """
    if text.startswith('"'):
        match = QUOTED.match(text)
        local = re.sub(r"\\(.)", r"\1", match.group()[1:-1]) if match else ""
    else:
        match = (ANY_DOTS if lenient else DOT_STRING).match(text)
        local = match.group() if match else ""
    if not match or not text.isascii() and NO_CHARACTER.search(text):
        raise Refused(BAD_SYNTAX)
    rest = text[match.end():]
    if not rest:
        if local.lower() == "postmaster":
            return Address("postmaster", "")
        if lenient:
            return Address(local, "")
        raise Refused(553, "5.1.3", "the address needs a domain")
    if not rest.startswith("@"):
        raise Refused(BAD_SYNTAX)
    domain = rest[1:]
    if domain_literal(domain) is None:
        domain = domain[:-1] if domain.endswith(".") else domain
        try:
            if not is_domain(domain) or not is_domain(ascii_domain(domain)):
                raise Refused(BAD_SYNTAX)
        except ValueError:
            raise Refused(BAD_SYNTAX) from None
    return Address(local, domain)


# A path without its brackets: up to a blank outside quotes.
BARE_PATH = expression(r'(?:"(?:[^"\\]|\\.)*"|[^"<>\s])+(?=\s|$)')


@functools.lru_cache(maxsize=1000)
def parse_path(text: str, lenient: bool = False) -> Tuple[Optional[Address], str]:
    """Return (address, parameters) of `<path> parameters`; None for the null reverse-path <>. Refused 501 or 553.

    A source route is ignored, as RFC 5321 appendix C allows. `lenient` also takes a path without brackets, with blanks
    inside them, or after a name, and what parse_address() then takes.
    """
    text = text.strip(" ")
    if lenient:
        text = bracketed(text)
    if not text.startswith("<"):
        raise Refused(501, "5.1.3", "an address stands in angle brackets: <local@domain>")
    match = re.match(r'<((?:"(?:[^"\\]|\\.)*"|[^">])*)>(?= |\Z)', text)
    if not match:
        raise Refused(BAD_SYNTAX)
    path, rest = match.group(1), text[match.end():]
    if not path:
        return None, rest.strip(" ")
    if len(path) > MAX_PATH:
        raise Refused(501, "5.1.3", "an address has at most %d characters" % MAX_PATH)
    route = SOURCE_ROUTE.match(path)
    return parse_address(path[route.end():] if route else path, lenient), rest.strip(" ")


def bracketed(text: str) -> str:
    """Return what devices say in place of `<path> parameters` in that form: `path parameters`, `Name <path>`, `< path >`."""
    bare = BARE_PATH.match(text)
    if bare and "@" in bare.group() or bare and "<" not in text:
        return "<%s>%s" % (bare.group(), text[bare.end():])
    before, bracket, rest = text.partition("<")
    path, end, rest = rest.partition(">")
    return "<%s>%s" % (path.strip(" "), rest) if end and '"' not in before + path else text


def parse_parameters(text: str) -> Dict[str, str]:
    """Return the ESMTP parameters of MAIL or RCPT, keywords in upper case; Refused 501 (RFC 5321 section 4.1.2)."""
    parameters: Dict[str, str] = {}
    for word in text.split():
        keyword, equals, value = word.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", keyword) or (equals and not value):
            raise Refused(501, "5.5.4", "bad parameter " + printable(word, 60))
        if keyword.upper() in parameters:
            raise Refused(501, "5.5.4", "parameter given twice: " + keyword.upper())
        parameters[keyword.upper()] = value
    return parameters


XTEXT = expression(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})*")                               # RFC 3461 section 4
UTF8_XTEXT = expression(r"(?:[^\x00-\x20+=\\\x7f]|\\x\{[0-9A-F]{1,6}\})*")    # RFC 6533 section 3
NOTIFY = ("SUCCESS", "FAILURE", "DELAY")


class Wish(NamedTuple):
    """What a sender wants to be told about one recipient, and by which name it knows it; both as it wrote them."""
    notify: str = ""                                # NEVER, or words of NOTIFY with commas; "" for FAILURE, maybe DELAY
    orcpt: str = ""                                 # TYPE;TEXT, in xtext or utf-8-addr-xtext

    def wants(self, what: str, otherwise: bool = False) -> bool:
        """Return whether the sender is to be told of a SUCCESS, FAILURE or DELAY; `otherwise` when it did not say."""
        return what in self.notify.split(",") if self.notify else otherwise

    def kept(self) -> Dict[str, str]:
        """Return what of it is to be kept with a recipient in the queue."""
        return {name: value for name, value in self._asdict().items() if value}

    def without_success(self) -> "Wish":
        """Return what is left to ask of others once we have reported that the mail was sent on to several."""
        if self.notify in ("", "NEVER"):
            return self
        return self._replace(notify=",".join(w for w in self.notify.split(",") if w != "SUCCESS") or "NEVER")


def xtext_encode(text: str) -> str:
    """Return a text as an xtext (RFC 3461 section 4)."""
    return "".join(chr(byte) if 33 <= byte <= 126 and byte not in b"+=" else "+%02X" % byte for byte in text.encode("utf-8"))


def xtext_decode(text: str) -> str:
    """Return what an xtext stands for; ValueError."""
    if not XTEXT.fullmatch(text):
        raise ValueError("not an xtext")
    return re.sub(r"\+(..)", lambda match: chr(int(match.group(1), 16)), text)


def utf8_xtext_encode(text: str) -> str:
    """Return a UTF-8 address in ASCII (RFC 6533 section 3: utf-8-addr-xtext)."""
    return "".join(c if "!" <= c <= "~" and c not in "+=\\" else "\\x{%02X}" % ord(c) for c in text)


def utf8_xtext_decode(text: str) -> str:
    """Return what a utf-8-addr-xtext or utf-8-addr-unitext stands for; ValueError."""
    if not UTF8_XTEXT.fullmatch(text):
        raise ValueError("not a utf-8-addr-xtext")
    return re.sub(r"\\x\{([0-9A-F]+)\}", lambda match: chr(int(match.group(1), 16)), text)


def parse_dsn_of_mail(parameters: Dict[str, str]) -> Tuple[str, str]:
    """Take RET= and ENVID= out of the parameters of MAIL and return both, "" for what is not there; Refused."""
    ret, envid = parameters.pop("RET", ""), parameters.pop("ENVID", "")
    if ret.upper() not in ("", "FULL", "HDRS"):
        raise Refused(501, "5.5.4", "RET is FULL or HDRS")
    if len(envid) > 100 or not XTEXT.fullmatch(envid):
        raise Refused(501, "5.5.4", "ENVID is an xtext of at most 100 characters")
    return ret.upper(), envid


def parse_dsn_of_rcpt(parameters: Dict[str, str], smtputf8: bool = False) -> Wish:
    """Take NOTIFY= and ORCPT= out of the parameters of RCPT and return the wish; Refused."""
    words = parameters.pop("NOTIFY", "").upper().split(",")
    if words != [""] and words != ["NEVER"] and (set(words) - set(NOTIFY) or len(set(words)) < len(words)):
        raise Refused(501, "5.5.4", "NOTIFY is NEVER, or some of SUCCESS,FAILURE,DELAY")
    orcpt = parameters.pop("ORCPT", "")
    kind, semicolon, text = orcpt.partition(";")
    valid = UTF8_XTEXT if kind.lower() == "utf-8" else XTEXT
    if orcpt and (not re.fullmatch(r"[A-Za-z0-9-]{1,40}", kind) or not text or len(orcpt) > 500 or not valid.fullmatch(text)
                  or not (smtputf8 or orcpt.isascii())):
        raise Refused(501, "5.5.4", "ORCPT is TYPE;ADDRESS, the address in xtext")
    try:
        return Wish(",".join(words), ascii_orcpt(orcpt))
    except ValueError:
        raise Refused(501, "5.5.4", "ORCPT is no address in UTF-8") from None


def ascii_orcpt(orcpt: str) -> str:
    """Return an ORCPT= as every server takes it: a UTF-8 address in ASCII; ValueError."""
    kind, semicolon, text = orcpt.partition(";")
    return kind + semicolon + (text if text.isascii() else utf8_xtext_encode(utf8_xtext_decode(text)))


def covers(pattern: str, domain: str) -> bool:
    """Return whether a domain, in whatever spelling, is the one meant, or for `.example.org` lies under it."""
    pattern, domain = ascii_domain(pattern), ascii_domain(domain)
    return domain.endswith(pattern) if pattern.startswith(".") else domain == pattern


@functools.lru_cache(maxsize=1000)
def clients_address(host: str) -> str:
    """Return a client's IP address in one spelling: without IPv6 scope, IPv4-mapped addresses as IPv4."""
    host = host.partition("%")[0]
    return host[7:] if host.lower().startswith("::ffff:") and "." in host else host


@functools.lru_cache(maxsize=1000)
def client_network(host: str) -> str:
    """Return what stands for one client when connections and tries are counted: the address, for IPv6 its /64."""
    try:
        address = ipaddress.ip_address(clients_address(host))
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64))) if address.version == 6 else str(address)
    except ValueError:
        return host


def is_among(client: str, networks: Sequence[Any]) -> bool:
    """Return whether a client's IP address lies in one of the networks."""
    address = ipaddress.ip_address(client)
    return any(address.version == network.version and address in network for network in networks)


@functools.lru_cache(maxsize=1000)
def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(clients_address(host)).is_loopback
    except ValueError:
        return host in ("", "localhost")


def is_this_host(host: str) -> bool:
    """Return whether an IP address, in whatever spelling, means the machine that it is used on."""
    address = ipaddress.ip_address(host)
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def address_literal(host: str) -> str:
    """Return an IP address as it stands in trace headers: [192.0.2.1] or [IPv6:2001:db8::1] (RFC 5321 section 4.1.3)."""
    return "[IPv6:%s]" % host if ":" in host else "[%s]" % host


@dataclasses.dataclass
class Envelope:
    """Sender and recipients of one message, and what the sending side said about it."""
    sender: str = ""                                    # "" is the null reverse-path
    recipients: List[Address] = dataclasses.field(default_factory=list)
    eightbit: bool = False                              # the content has bytes above 127
    smtputf8: bool = False                              # declared by the client (RFC 6531)
    declared: Optional[int] = None                      # SIZE= of MAIL
    id: str = ""
    helo: str = ""
    client: str = ""                                    # IP address, "" for a local program
    protocol: str = "SMTP"                              # "with" keyword of Received (RFC 3848, 6531)
    body: str = ""                                      # BODY= of MAIL, as declared
    trusted: bool = False                               # it comes from somebody who may have mail passed on
    ret: str = ""                                       # RET= and ENVID= of MAIL (RFC 3461), ...
    envid: str = ""
    wishes: Dict[str, Any] = dataclasses.field(default_factory=dict)    # ... and the Wish of recipients who have one


def with_keyword(esmtp: bool, tls: bool, login: bool, utf8: bool) -> str:
    """Return the protocol keyword of a Received header (RFC 3848, RFC 6531 section 4.3)."""
    if not esmtp:
        return "SMTP"
    return ("UTF8SMTP" if utf8 else "ESMTP") + ("S" if tls else "") + ("A" if login else "")


WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@functools.lru_cache(maxsize=4)
def rfc5322_date(seconds: int) -> str:
    """Return a time as the Date field has it, here and now (RFC 5322 section 3.3)."""
    when = time.localtime(seconds)
    minutes = (when.tm_gmtoff or 0) // 60
    return "%s, %02d %s %04d %02d:%02d:%02d %s%02d%02d" % (
        WEEKDAYS[when.tm_wday], when.tm_mday, MONTHS[when.tm_mon - 1], when.tm_year, *when[3:6],
        "-" if minutes < 0 else "+", *divmod(abs(minutes), 60))


def received_header(envelope: Envelope, hostname: str, now: float) -> str:
    """Return the trace header of RFC 5321 section 4.4; `for` only with one recipient, so that no Bcc is told (section 7.2)."""
    source = "from %s (%s)\r\n\t" % (envelope.helo or "unknown", address_literal(envelope.client)) if envelope.client else ""
    whom = "\r\n\tfor <%s>" % str(envelope.recipients[0]) if len(envelope.recipients) == 1 else ""
    return "Received: %sby %s with %s id %s%s; %s\r\n" % (
        source, hostname, envelope.protocol, envelope.id, whom, rfc5322_date(int(now)))


def trace_headers(envelope: Envelope, mailboxes: Sequence[str], hostname: str, now: float) -> Tuple[bytes, int]:
    """Return (headers put before the content, how many of their bytes are not for other hosts).

    Return-Path is for final delivery only (RFC 5321 section 4.4). One file serves all mailboxes of a message, so
    Delivered-To names the mailbox only where there is one: a list would tell each reader of the others.
    """
    local = ""
    if mailboxes:
        local = "Return-Path: <%s>\r\n" % envelope.sender
        if len(mailboxes) == 1:
            local += "Delivered-To: %s\r\n" % str(parse_key(mailboxes[0]))
    own = local.encode("utf-8")
    return own + received_header(envelope, hostname, now).encode("utf-8"), len(own)


def parse_key(key: str) -> Address:
    """Return the Address of a mailbox key."""
    local, _, domain = key.rpartition("@")
    return Address(local, domain)


def split_headers(content: bytes, most: Optional[int] = None) -> Tuple[List[Tuple[str, bytes]], bytes]:
    """Return ([(lower-case name, raw field with its line ends)], body), at most so many fields; never fails, in one pass."""
    if content.startswith((b"\r\n", b"\n")):
        return [], content[content.index(b"\n") + 1:]
    blank = BLANK_LINE.search(content)
    head, body = (content[:blank.start() + 1], content[blank.end():]) if blank else (content, b"")
    fields = (match.group() for match in itertools.islice(FIELD.finditer(head), most))
    return [(field.partition(b":")[0].strip().decode("ascii", "replace").lower(), field) for field in fields if field], body


def unfold(value: bytes) -> str:
    """Return a header's value as text: each fold a blank (RFC 5322 section 2.2.3), raw 8-bit as decode_unknown() has it."""
    return re.sub(r"[\t\r\n]", " ", decode_unknown(FOLD.sub(b" ", value))).strip(" ")


def decode_unknown(data: bytes) -> str:
    """Return bytes of no known charset as text: UTF-8, in which a bad byte costs one character, else windows-1252."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("utf-8-sig", "replace")
    bad = text.count("\ufffd")
    good = sum(1 for _ in TWO_BYTES.finditer(data))
    return text if good >= bad else data.decode("cp1252", "replace")


# Addresses as people write them into headers (RFC 5322 section 3.4 and beyond): nothing is refused, all is read in one pass.

class Token(NamedTuple):
    """A piece of an address header; `kind` is blank, word, quoted, comment, angle, or the separator itself."""
    kind: str
    text: str


def comment_end(text: str, position: int, stop: int = sys.maxsize) -> int:
    """Return where the comment at position ends, comments in it included; -1 when not before stop (RFC 5322 section 3.2.2)."""
    depth = 0
    for match in PARENTHESIS.finditer(text, position, stop):
        depth += {"(": 1, ")": -1}.get(match.group(), 0)
        if depth == 0:
            return match.end()
    return -1


def address_tokens(text: str) -> Iterator[Token]:
    """Yield the tokens of an address header. A quote or parenthesis that never closes is looked for once, then a character."""
    position, unclosed = 0, ""
    while position < len(text):
        char, match = text[position], ADDRESS_WORD.match(text, position)
        closed = comment_end(text, position) if char == "(" and char not in unclosed else -1
        if match:
            token = Token("blank" if char.isspace() else "word", match.group())
        elif closed > 0:
            token = Token("comment", text[position:closed])
        elif char == "<":
            match = ADDRESS_ANGLE.match(text, position)
            token = Token("angle", (match.group(1) or match.group(2) or "") if match else "")
        elif char in ",;:":
            token = Token(char, ADDRESS_END.match(text, position).group())      # type: ignore[union-attr]
        else:
            match = ADDRESS_QUOTED.match(text, position) if char == '"' and char not in unclosed else None
            stray = match or ADDRESS_STRAY.match(text, position)
            token = Token("quoted" if match else "word", stray.group())         # type: ignore[union-attr]
            unclosed += "" if match else char
        yield token
        position = match.end() if match else position + max(len(token.text), 1)


def phrase(tokens: Sequence[Token]) -> str:
    """Return a display name: words as they stand, quotes and what they quote undone; its encoded words are still encoded."""
    text = "".join(re.sub(r"\\(.)", r"\1", token.text[1:-1]) if token.kind == "quoted" else token.text for token in tokens)
    return re.sub(" {2,}", " ", text).strip(" ")


def clean_address(text: str) -> str:
    """Return what stands in angle brackets without blanks, source route and `mailto:`."""
    if not text.lstrip().startswith('"'):
        text = "".join(re.sub(r"\([^()]*\)", "", text).split())
    route = SOURCE_ROUTE.match(text)
    text = (text[route.end():] if route else text).strip()
    return text[7:] if text[:7].lower() == "mailto:" else text


def bare_addresses(tokens: Sequence[Token], comment: str) -> Iterator[Tuple[str, str]]:
    """Yield the addresses of an entry without angle brackets: `bob`, `bob@x (Bob)`, `Bob bob@x`, `bob @ x`."""
    words: List[List[str]] = [[]]
    blank = False
    for token in tokens:
        if token.kind == "blank":
            blank = True
            continue
        if blank and words[-1] and words[-1][-1] not in ("@", ".") and not token.text.startswith(("@", ".")):
            words.append([])                        # a blank beside an @ or a dot is none
        words[-1].append(token.text)
        blank = False
    texts = ["".join(word) for word in words if word]
    found = [text for text in texts if "@" in text] or (texts if len(texts) == 1 else [])
    name = comment or " ".join(text for text in texts if "@" not in text and len(texts) > 1)[:MAX_ADDRESS]
    for address in found:
        yield name, address.strip(">")
        name = ""
    if texts and not found:
        yield phrase(tokens), ""


def entry_addresses(entry: Sequence[Token]) -> Iterator[Tuple[str, str]]:
    """Yield (display name, address) of what stands between two commas; more than one where a comma is missing."""
    comment = next((token.text[1:-1].strip() for token in entry if token.kind == "comment"), "")
    entry = [token for token in entry if token.kind != "comment"]
    if not any(token.kind == "angle" for token in entry):
        yield from bare_addresses(entry, comment)
        return
    found: List[Tuple[str, str]] = []
    before = 0
    for place, token in enumerate(entry):
        if token.kind == "angle" and (token.text.strip() or not found):
            found.append((phrase(entry[before:place]), clean_address(token.text)))
            before = place + 1
    name, address = found[0]
    found[0] = name or phrase([token for token in entry[before:] if token.kind != "angle"]).strip(">") or comment, address
    yield from (pair for pair in found if any(pair))


def read_addresses(text: str) -> Iterator[Tuple[str, str]]:
    """Yield (display name with its encoded words as they are, address) of an address header, in order; never fails.

    Commas and semicolons separate, also where nothing stands between them; names of groups are left out, their members not.
    """
    entry: List[Token] = []
    addressed = False                               # the entry has an address already: a colon names no group any more
    for token in itertools.chain(address_tokens(text), [Token(",", ",")]):
        if token.kind in (",", ";"):
            if len(entry) == 1 and entry[0].kind == "word":
                yield "", entry[0].text             # by far the most frequent one
            elif entry:
                yield from entry_addresses(entry)
            entry, addressed = [], False
        elif token.kind == ":" and not addressed:
            entry = []
        elif entry or token.kind != "blank":
            entry.append(token)
            addressed = addressed or token.kind == "angle" or (token.kind == "word" and "@" in token.text)


def same_address(text: str) -> str:
    """Return what the spellings of an address have in common: quotes that are not needed, case and the domain's form apart."""
    try:
        address = parse_address(text[:MAX_ADDRESS])
        return lower(address.local) + "@" + (address.domain and (
            address.domain.lower() if domain_literal(address.domain) else ascii_domain(address.domain)))
    except (Refused, ValueError):
        return lower(text[:MAX_ADDRESS])


# Options.

HELP_WIDTH = 100                                    # columns


class Parser:
    """Makes argparse raise UsageError with its one line, rather than print its usage and exit."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
        import argparse

        class OneLine(argparse.ArgumentParser):
            def error(self, message: str) -> NoReturn:
                raise UsageError(message)

            def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
                given, rest = self.parse_known_args(args, namespace)
                if rest:                            # not with its value: a password may have gone astray
                    raise UsageError("%s: %s" % (self.prog.partition(" ")[2], show_word(rest[0])))
                return given
        keywords.setdefault("formatter_class", functools.partial(argparse.HelpFormatter, width=HELP_WIDTH))
        keywords["allow_abbrev"] = False
        return OneLine(*arguments, **keywords)


def show_word(word: str) -> str:
    """Return what is said about a word of the command line that has no place there; nothing that could be a secret."""
    if word.startswith("-"):
        return "unknown option " + printable(word.partition("=")[0], 40)
    return "too many arguments"


Endpoint: TypeAlias = "Tuple[str, int]"


def parse_endpoint(text: str) -> Endpoint:
    """Return (host, port) of `127.0.0.1:25`, `[::1]:25` or `localhost:25`; ValueError."""
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("write an IPv6 address as [::1]:25")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("expected HOST:PORT")
    return host or "0.0.0.0", int(port)


def show_endpoint(endpoint: Endpoint) -> str:
    return ("[%s]:%d" if ":" in endpoint[0] else "%s:%d") % endpoint[:2]


def parse_server(text: str) -> Endpoint:
    """Return (host, port) of a name server: an IP address, port 53 unless one is given; ValueError."""
    try:
        return parse_ip(text.strip().strip("[]")), 53
    except ValueError:
        host, port = parse_endpoint(text)
        return parse_ip(host), port


def parse_ip(text: str) -> str:
    """Return an IP address in one spelling, IPv4 in IPv6 as IPv4, IPv6 with its zone (fe80::1%eth0); ValueError."""
    address, percent, zone = text.partition("%")
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        raise ValueError("expected an IP address") from None
    if percent and (ip.version == 4 or not re.fullmatch(r"[\w.-]{1,64}", zone, re.ASCII)):
        raise ValueError("expected an IP address")
    return str(getattr(ip, "ipv4_mapped", None) or ip) + percent + zone


def parse_size(text: Union[str, int]) -> int:
    """Return bytes: `1048576`, `1024K`, `1M`, `1G` (powers of 1024); ValueError."""
    match = re.fullmatch(r"(\d+)([KMG]?)", str(text).strip().upper(), re.ASCII)
    if not match:
        raise ValueError("expected a number of bytes, as 1048576, 1024K, 1M or 1G")
    size = int(match.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30}[match.group(2)]
    if not size:
        raise ValueError("expected more than no bytes at all")
    return size


def parse_count(text: Union[str, int]) -> int:
    match = re.fullmatch(r"\d{1,9}", str(text).strip(), re.ASCII)
    if not match or int(text) < 1:
        raise ValueError("expected a whole number from 1")
    return int(text)


def parse_port(text: Union[str, int]) -> int:
    if not 1 <= parse_count(text) <= 65535:
        raise ValueError("expected a port from 1 to 65535")
    return int(text)


def parse_seconds(text: Union[str, int, float]) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e10:
        raise ValueError("expected a number of seconds above 0")
    return seconds


def parse_waits(text: Union[str, Sequence[float]]) -> Tuple[float, ...]:
    waits: Sequence[Any] = text.split(",") if isinstance(text, str) else text if isinstance(text, (list, tuple)) else [text]
    if not waits:
        raise ValueError("expected at least one wait")
    return tuple(parse_seconds(wait) for wait in waits)


def parse_network(text: Any) -> Any:
    try:
        return ipaddress.ip_network(text.strip() if isinstance(text, str) else text, strict=False)
    except ValueError:
        raise ValueError("expected a network, as 192.0.2.0/24") from None


def parse_domain(text: str) -> str:
    """Return a domain in lower case; ValueError when it is none."""
    domain = text.strip().lower().rstrip(".")
    if not is_domain(domain) or not ascii_domain(domain):
        raise ValueError("expected a domain name")
    return domain


def parse_pattern_domain(text: str) -> str:
    """Return a domain, or `.domain` for all that lies under it; ValueError."""
    text = text.strip()
    return "." + parse_domain(text[1:]) if text.startswith(".") else parse_domain(text)


def parse_hostname(text: str) -> str:
    """Return a domain as it may stand in a greeting, which has no SMTPUTF8 yet; ValueError."""
    return ascii_domain(parse_domain(text))


def parse_mailbox(text: str) -> str:
    return parse_address(text.strip()).key


MECHANISMS = ("plain", "login", "cram-md5", "xoauth2", "oauthbearer")


class Server(NamedTuple):
    """A mail server to hand mail to: `smtp://[user:password@]host[:port]`, or `smtps://` for TLS from the first byte."""
    host: str
    port: int
    tls: bool = False
    user: str = ""
    password: str = ""
    mechanism: str = ""                                 # one of MECHANISMS; "" for the best that both know
    verify: bool = True                                 # the certificate, where a password would be shown to it

    def __str__(self) -> str:
        return "%s://%s" % ("smtps" if self.tls else "smtp", show_endpoint((self.host, self.port)))

    def __repr__(self) -> str:                          # a password never enters a text
        return str(self)


def parse_url(text: Union[str, Server]) -> Server:
    """Return the Server of an smtp:// or smtps:// URL; user and password may be %-encoded; ValueError without a secret."""
    from urllib.parse import parse_qsl, unquote, urlsplit
    if isinstance(text, Server):
        return text
    wrong = ValueError("expected smtp://[user:password@]host[:port] or smtps://...")
    try:
        url = urlsplit(text.strip())
        port = url.port
        options = dict(parse_qsl(url.query, keep_blank_values=True))
    except ValueError:
        raise wrong from None
    if url.scheme not in ("smtp", "smtps") or not url.hostname or url.path.strip("/") or url.fragment \
            or port == 0 or (url.username and url.password is None):
        raise wrong
    mechanism, verify = options.pop("auth", "").lower(), options.pop("verify", "yes").lower()
    if options or mechanism not in MECHANISMS + ("",) or verify not in ("yes", "no"):
        raise ValueError("after the ? may stand auth=%s and verify=no" % "|".join(MECHANISMS))
    tls = url.scheme == "smtps"
    return Server(url.hostname, port or (465 if tls else 25), tls, unquote(url.username or ""), unquote(url.password or ""),
                  mechanism, verify == "yes")


def parse_route(text: Union[str, Tuple[str, str]]) -> Tuple[str, Server]:
    """Return (pattern, server) of DOMAIN=URL, .DOMAIN=URL or from:DOMAIN=URL; ValueError."""
    domain, equals, url = text.partition("=") if isinstance(text, str) else (text[0], "=", text[1])
    if not equals:
        raise ValueError("expected DOMAIN=URL")
    by_sender = domain.strip().lower().startswith("from:")
    pattern = parse_pattern_domain(domain.strip()[5:] if by_sender else domain)
    return ("from:" if by_sender else "") + pattern, parse_url(url)


class Limit(NamedTuple):
    """What one destination is given at most: --limit."""
    domain: str = ""                                    # "" for all that have none of their own
    connections: Optional[int] = None                   # at once
    messages: Optional[int] = None                      # on one connection
    recipients: Optional[int] = None                    # in one transaction
    rate: Optional[Tuple[int, float]] = None            # messages, in so many seconds


def parse_limit(text: Union[str, Limit]) -> Limit:
    """Return the Limit of [DOMAIN=]connections=N,messages=N,recipients=N,rate=N/SECONDS; ValueError."""
    if isinstance(text, Limit):
        return text
    values: Dict[str, Any] = {}
    for word in text.strip().split(","):
        name, _, value = word.strip().partition("=")
        if not values and name not in Limit._fields[1:] and "=" in value:
            values["domain"] = parse_pattern_domain(name)
            name, _, value = value.partition("=")
        if name not in Limit._fields[1:] or name in values or not value:
            raise ValueError("expected [DOMAIN=]connections=N,messages=N,recipients=N,rate=N/SECONDS")
        if name == "rate":
            count, _, seconds = value.partition("/")
            values[name] = parse_count(count), parse_seconds(seconds)
        else:
            values[name] = parse_count(value)
    return Limit(**values)


def parse_rewrite(text: Union[str, Tuple[str, str]]) -> Tuple[str, str]:
    """Return (lower-case address or shell pattern, address) of FROM=TO; ValueError."""
    pattern, equals, target = text.rpartition("=") if isinstance(text, str) else (text[0], "=", text[1])
    if not equals or "@" not in pattern or pattern != pattern.strip() or not pattern.isprintable() or " " in pattern:
        raise ValueError("expected FROM=TO, as *@*.local=alerts@example.org")
    return lower(pattern), str(parse_address(target.strip()))


def parse_dkim(text: Union[str, Tuple[str, str, str]]) -> Tuple[str, str, str]:
    """Return (domain, selector, file) of [DOMAIN=]SELECTOR:FILE, the domain "" for all of ours; ValueError."""
    if not isinstance(text, str):
        return text
    domain, equals, rest = text.partition("=") if "=" in text.partition(":")[0] else ("", "", text)
    selector, colon, file = rest.partition(":")
    if not colon or not file or not is_domain(selector):
        raise ValueError("expected [DOMAIN=]SELECTOR:FILE")
    return parse_domain(domain) if equals else "", selector.lower(), file


def parse_web_name(text: str) -> str:
    """Return a host name, or an origin as https://host:port, in lower case; ValueError."""
    name = text.strip().lower().rstrip("/")
    if not re.fullmatch(r"(https?://)?([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:\d{1,5})?", name):
        raise ValueError("expected a host name or an origin, as https://example.org:8080")
    return name


def parse_hook(text: str) -> str:
    """Return a URL as http.client takes it; ValueError without it, for it may have a secret."""
    from urllib.parse import urlsplit
    text = text.strip()
    try:
        url = urlsplit(text)
        good = url.scheme in ("http", "https") and url.hostname and url.port != 0 and text.isascii() and text.isprintable()
    except ValueError:
        good = False
    if not good or " " in text:
        raise ValueError("expected http://host/path or https://host/path, %-encoded")
    return text


def parse_flag(text: Union[str, bool]) -> bool:
    word = str(text).strip().lower()
    if word not in ("1", "true", "yes", "on", "0", "false", "no", "off", ""):
        raise ValueError("expected on or off")
    return word in ("1", "true", "yes", "on")


def one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError("expected %s" % " or ".join(words))
        return text
    return parse


def parse_text(text: Union[str, "os.PathLike[str]"]) -> str:
    text = os.fspath(text)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError("expected a text that is not empty")
    return text


def parse_rule(text: str) -> Any:
    return extension("faults").parse_fault(text)


def option(parse: Callable[[Any], Any], default: Any, metavar: str, help: str, many: bool = False, secret: bool = False,
           comma: str = ",") -> Any:
    """Return a Config field: `parse` takes the text of the command line or a Python value; ValueError says what is wrong.

    The value of one that is `secret` never enters a text. `comma` is what separates those of `many` in one variable.
    """
    return dataclasses.field(default=default, metadata={
        "parse": parse, "metavar": metavar, "help": help, "many": many, "secret": secret, "comma": comma})


# A comma between two --limit, not one inside.
LIMIT_COMMA = r",(?=[^,=]*=[a-z]+=)"


@dataclasses.dataclass(frozen=True)
class Config:
    """All options. The command line, the environment and Node(...) are three doors to it, derived from its fields."""
    smtp: Tuple[Endpoint, ...] = option(parse_endpoint, (("127.0.0.1", 1025),), "HOST:PORT",
                                        "SMTP listener; off for none, port 0 picks a free one", many=True)
    smtps: Tuple[Endpoint, ...] = option(parse_endpoint, (), "HOST:PORT", "SMTP with TLS from the first byte", many=True)
    pop3: Tuple[Endpoint, ...] = option(parse_endpoint, (("127.0.0.1", 1110),), "HOST:PORT",
                                        "POP3 listener; off for none", many=True)
    pop3s: Tuple[Endpoint, ...] = option(parse_endpoint, (), "HOST:PORT", "POP3 with TLS from the first byte", many=True)
    web: Optional[Tuple[Endpoint, ...]] = option(parse_endpoint, None, "HOST:PORT", "web inbox and JSON API "
                                                 "(default 127.0.0.1:8025 in capture mode, off in node mode)", many=True)
    webs: Tuple[Endpoint, ...] = option(parse_endpoint, (), "HOST:PORT", "web inbox and API with TLS", many=True)
    web_allow: Tuple[str, ...] = option(parse_web_name, (), "NAME|ORIGIN",
                                        "host name or origin that the web answers to besides its own", many=True)
    web_admin: Tuple[str, ...] = option(parse_mailbox, (), "ADDRESS",
                                        "node mode: account that sees every mailbox", many=True)
    release: Optional[Server] = option(parse_url, None, "URL", "capture mode: server to which single messages "
                                       "may be released", secret=True)
    webhook: str = option(parse_hook, "", "URL", "each message's summary is POSTed there", secret=True)
    data: str = option(parse_text, "minimail-data", "DIR", "the one directory everything lives in")
    hostname: str = option(parse_hostname, "", "NAME", "name in greetings, trace headers, bounces "
                           "(default: the machine's)")
    domain: Tuple[str, ...] = option(parse_domain, (), "NAME",
                                     "a domain whose mail is kept here; turns node mode on", many=True)
    users: str = option(parse_text, "", "FILE", "accounts (default DATA/users)")
    aliases: str = option(parse_text, "", "FILE", "forwarding (default DATA/aliases)")
    catch_all: str = option(parse_mailbox, "", "ADDRESS", "mailbox for unknown local addresses")
    trust: Tuple[Any, ...] = option(parse_network, (parse_network("127.0.0.0/8"), parse_network("::1")), "CIDR",
                                    "clients that may relay without log-in", many=True)
    route: Tuple[Tuple[str, Server], ...] = option(parse_route, (), "DOMAIN=URL",
                                                   "skip MX for DOMAIN (.DOMAIN: what lies under it; from:DOMAIN: by sender)",
                                                   many=True, secret=True)
    limit: Tuple[Limit, ...] = option(parse_limit, (), "[DOMAIN=]LIMITS", "outbound, per destination: connections=N,"
                                      "messages=N,recipients=N,rate=N/SECONDS (default 10, 100, 100, none)", many=True,
                                      comma=LIMIT_COMMA)
    rewrite: Tuple[Tuple[str, str], ...] = option(parse_rewrite, (), "FROM=TO",
                                                  "reverse-path and From of mail that leaves (FROM: a pattern)", many=True)
    dkim: Tuple[Tuple[str, str, str], ...] = option(parse_dkim, (), "[DOMAIN=]SELECTOR:FILE",
                                                    "sign mail of own domains that leaves with this key "
                                                    "(default: those under DATA)", many=True)
    warn: Optional[float] = option(parse_seconds, None, "SECONDS", "a delay notice to own senders after this time")
    smarthost: Optional[Server] = option(parse_url, None, "URL", "all mail for elsewhere goes through this server",
                                         secret=True)
    dns: Tuple[Endpoint, ...] = option(parse_server, (), "HOST[:PORT]",
                                       "name server to ask (default: /etc/resolv.conf)", many=True)
    mx_port: int = option(parse_port, 25, "PORT", "port to reach mail exchangers on (for test beds)")
    retry: Tuple[float, ...] = option(parse_waits, (60.0, 300.0, 900.0, 3600.0), "SECONDS,...",
                                      "waits between attempts; the last repeats")
    give_up: float = option(parse_seconds, 432000.0, "SECONDS", "then a bounce goes to the sender")
    tls_cert: str = option(parse_text, "", "FILE", "certificate chain (PEM): turns STARTTLS and STLS on")
    tls_key: str = option(parse_text, "", "FILE", "its private key (PEM), if not in the same file")
    relay_tls: str = option(one_of("may", "require"), "may", "may|require",
                            "outbound TLS: when offered, unverified; or always, and verified")
    max_size: int = option(parse_size, 52428800, "BYTES", "larger messages: 552 5.3.4 (K, M, G)")
    max_connections: int = option(parse_count, 500, "N", "connections at once, all listeners")
    max_per_client: int = option(parse_count, 50, "N", "connections at once from one address (loopback exempt)")
    timeout: Optional[float] = option(parse_seconds, None, "SECONDS",
                                      "a command must be complete within it (default 300, POP3 600)")
    no_sync: bool = option(parse_flag, False, "", "do not fsync (tests, RAM disks)")
    workers: int = option(parse_count, 1, "N", "processes sharing the listeners and the data directory")
    run_as: str = option(parse_text, "", "USER", "drop root after the ports are bound")
    relay_to: Tuple[str, ...] = option(parse_pattern_domain, (), "DOMAIN",
                                       "node mode: relay to these domains only "
                                       "(.DOMAIN: and below; default everywhere)", many=True)
    keep: Optional[int] = option(parse_count, None, "N", "newest messages kept per mailbox (default: all)")
    max_age: Optional[float] = option(parse_seconds, None, "SECONDS", "older messages are removed (default: none)")
    transcripts: Optional[bool] = option(parse_flag, None, "on|off", "keep envelope and conversation of each message "
                                         "(default: on in capture mode)")
    fault: Tuple[Any, ...] = option(parse_rule, (), "RULE", "misbehave on purpose: STAGE[=PATTERN] ACTION [xCOUNT]",
                                    many=True)
    log: str = option(one_of("text", "json"), "text", "text|json", "log lines, on standard error")
    quiet: bool = option(parse_flag, False, "", "log warnings only")
    verbose: bool = option(parse_flag, False, "", "log every command")

    # Not an option: where those stand that a file of their own holds, see current().
    sources: Dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def current(self, name: str) -> Any:
        """Return an option's value as it is now: one that stands in a file of its own may have changed since the start."""
        source = self.sources.get(name)
        return source() if source else getattr(self, name)

    @property
    def capture(self) -> bool:
        """True when every address is local and nothing ever leaves the machine."""
        return not self.domain

    def seconds(self, default: float) -> float:
        return default if self.timeout is None else self.timeout

    def file(self, name: str) -> str:
        """Return the path of `users` or `aliases`: as given, else inside the data directory."""
        given: str = getattr(self, name)
        return given or os.path.join(self.data, name)


def option_fields() -> Dict[str, Any]:
    """Return {name: metadata} of all options."""
    return {field.name: field.metadata for field in dataclasses.fields(Config) if field.metadata}


def read_options(given: Dict[str, Any], name: Callable[[str], str]) -> Dict[str, Any]:
    """Return Config fields from texts or Python values; `name` turns a field into what the user wrote (UsageError)."""
    fields = option_fields()
    return {key: read_option(raw, fields[key], name(key)) for key, raw in given.items()}


def read_option(raw: Any, meta: Any, name: str) -> Any:
    """Return an option's value; UsageError says what is wrong with which one of several, but shows no secret."""
    if not meta["many"]:
        items = [raw]
    elif raw is None or raw in ("off", ["off"]):
        items = []
    else:
        items = list(raw.items()) if isinstance(raw, dict) else \
            list(raw) if isinstance(raw, (list, tuple, set, frozenset)) else [raw]
    parsed = []
    for item in items:
        try:
            parsed.append(meta["parse"](item))
        except (ValueError, TypeError, AttributeError, Refused) as error:
            reason = "a value of the wrong type" if isinstance(error, (TypeError, AttributeError)) else error
            shown = "" if meta["secret"] or "://" in str(item) else "%r: " % (item,)
            raise UsageError("%s: %s%s" % (name, shown, reason)) from None
    return tuple(parsed) if meta["many"] else parsed[0]


def split_values(text: str, meta: Any) -> Any:
    """Return what a variable says: one text, or the list of texts where an option may be given several times."""
    if not meta["many"]:
        return text
    return [part.strip() for part in re.split(meta["comma"], text) if part.strip()]


NEEDS = {                                           # option: what it needs
    "tls_key": "tls_cert", "smtps": "tls_cert", "pop3s": "tls_cert", "webs": "tls_cert",
    "catch_all": "domain", "web_admin": "domain"}

OPTIONS_OF = {                                      # optional section: what is nothing without it
    "pop3": ("pop3", "pop3s"), "transcripts": ("transcripts",), "faults": ("fault",), "standing": ("dkim",),
    "relay": ("route", "limit", "rewrite", "warn", "smarthost", "dns", "mx_port", "retry", "give_up", "relay_tls", "relay_to",
              "release"), "web": ("web", "webs", "web_allow", "web_admin", "release", "webhook")}


def sections_missing(option: str) -> List[str]:
    """Return the sections that an option needs and this copy of the file lacks."""
    return [section for section, options in OPTIONS_OF.items() if option in options and not has_extension(section)]


def check_together(config: Config, name: Callable[[str], str]) -> None:
    """Raise UsageError where an option lacks another or its section; `name` as in read_options(). The library asks it, too."""
    fields = option_fields()
    for option in fields:
        value = getattr(config, option)
        if value and value != getattr(Config, option):
            for section in sections_missing(option):
                raise UsageError("%s: this copy of minimail has no %s section" % (name(option), section))
    for one, other in NEEDS.items():
        if getattr(config, one) and not getattr(config, other):
            raise UsageError("%s: needs %s %s" % (name(one), name(other), fields[other]["metavar"]))
    if config.release and config.domain:
        raise UsageError("%s: only in capture mode, without %s" % (name("release"), name("domain")))
    if config.workers > MAX_WORKERS:
        raise UsageError("%s: %d is more than %d" % (name("workers"), config.workers, MAX_WORKERS))


LIBRARY_KINDS: Tuple[Tuple[str, Sequence[str], str], ...] = (      # argument, what it must have, its kind in words
    ("on_message", ("__call__",), "a function"), ("clock", ("__call__",), "a function"),
    ("policy", ("on_connect", "on_mail", "on_rcpt", "on_message"), "a Policy"))


def check_library(given: Dict[str, Any]) -> None:
    """Raise TypeError that names the first argument of Node() which is not of its kind; None is none at all."""
    for name, attributes, kind in LIBRARY_KINDS:
        value = given.get(name)
        if value is not None and (isinstance(value, type) or not all(
                callable(getattr(value, attribute, None)) for attribute in attributes)):
            raise TypeError("%s: expected %s, not %.80r" % (name, kind, value))


# ======================================================================================================================
# 4  How it waits, and the wire.  One loop, conversations that are coroutines, sockets that never block: what has to be
#    waited for is awaited with wait(), and nothing else ever waits. Knows bytes, sockets and threads; no protocol, no file.
#
#    await wait(READ), wait(WRITE)    until the task's socket can be read or written; TimedOut when its deadline passes
#    await wait(SPEAK)                until the others that were ready have been heard, too; then what is said to all is sent
#    await wait(TURN), wait(seconds)  until others have had their turn, for so many seconds
#    await wait(parcel)               until a message is on disk, committed together with others'; gives its refusal or None
#    await wait(function)             until another thread has done function(); gives its result
# ======================================================================================================================

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
SPEAK = "speak"
TURN = 0.0


class Disconnected(Exception):
    """The other side is gone."""


class TimedOut(Exception):
    """The deadline passed before what was asked for was there, or the node stops."""


class LineTooLong(Exception):
    """A line is longer than allowed; it was thrown away up to its end."""


@types.coroutine
def wait(what: Any) -> Generator[Any, Any, Any]:
    """Let others go on until `what` has come; return what came of it, or raise its error."""
    return (yield what)


class Task:
    """What the loop carries: a coroutine, the socket it may wait for, and until when."""

    coroutine: Coroutine[Any, Any, None]
    waiting: Any = None                             # what it awaits
    armed = 0                                       # what the poller watches its socket for
    talks = True                                    # it is a conversation: a message may come from it

    @property
    def sock(self) -> socket.socket:
        raise NotImplementedError

    @property
    def deadline(self) -> float:
        return float("inf")

    def in_flight(self) -> bool:
        """True while it is to be let alone although the node stops."""
        return False


class Crew:
    """At most `size` threads that do what takes long, one thing after another; one with nothing to do ends after a while."""

    IDLE = 5.0                                      # seconds

    def __init__(self, size: int, name: str = "minimail-helper") -> None:
        self.size, self.name = size, name
        self._jobs: Deque[Callable[[], None]] = collections.deque()
        self._threads: Set[threading.Thread] = set()
        self._idle = 0
        self._closed = False
        self._changed = threading.Condition()

    def do(self, job: Callable[[], None]) -> None:
        """Let a thread run job(), which does not raise; RuntimeError when there is no thread and none can be had."""
        with self._changed:
            self._jobs.append(job)
            if self._idle < len(self._jobs) and len(self._threads) < self.size:
                thread = threading.Thread(target=self._work, name=self.name, daemon=True)
                try:
                    thread.start()
                    self._threads.add(thread)
                except RuntimeError:
                    if not self._threads:
                        self._jobs.pop()
                        raise
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._jobs:
                    if self._closed or (not self._changed.wait(self.IDLE) and not self._jobs):
                        self._threads.discard(threading.current_thread())
                        self._idle -= 1
                        return
                self._idle -= 1
                job = self._jobs.popleft()
            try:
                job()
            except BaseException:                   # nobody is above this: the thread must go on
                log.exception("a helper stumbled")

    def close(self) -> None:
        """Drop what has not begun, and let all threads end; what has begun is not waited for."""
        with self._changed:
            self._jobs.clear()
            self._closed = True
            self._changed.notify_all()


class Work(NamedTuple):
    """A function for a crew of its own, not done when nobody wants its result any more."""
    function: Callable[[], Any]
    crew: Crew
    wanted: Callable[[], bool]


class Threads:
    """Threads that have something of their own to do; join() returns when all have ended, or the time is up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._threads: Set[threading.Thread] = set()    # those that have begun: only they can be joined
        self._lock = threading.Lock()

    def start(self, function: Callable[[], None]) -> None:
        """Run function() in a thread; RuntimeError when the system has no more."""
        def run() -> None:
            try:
                function()
            except Exception:
                log.exception("%s stumbled", self.name)
            finally:
                with self._lock:                    # not before it was added
                    self._threads.discard(thread)
        thread = threading.Thread(target=run, name=self.name, daemon=True)
        with self._lock:
            thread.start()
            self._threads.add(thread)

    def __len__(self) -> int:
        return len(self._threads)

    def join(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))


class Loop:
    """Carries all tasks in one thread, and commits what came together when nobody has anything to say.

    `commit(parcels)` puts messages on disk and returns for each its refusal or None; `is_heavy(parcel)` says that this
    takes long. A batch that does, or follows one that the disk took long for, is committed in another thread. One that a
    network file system holds up (MooseFS for two minutes, when it lost an answer) does not hold up those after it.
    """

    BATCH = 100                                     # messages committed together at most
    PATIENCE = 0.05                                 # seconds a message waits while others talk
    SLOW = 0.02                                     # seconds for a batch: from there on others do not wait for the disk
    STUCK = 5.0                                     # seconds for a batch: from there on the next does not wait for it, ...
    MOST_STUCK = 8                                  # ... unless there are so many
    TICK = 0.5                                      # seconds between looks at the deadlines

    def __init__(self, commit: Callable[[List[Any]], List[Optional[Exception]]], is_heavy: Callable[[Any], bool],
                 clock: Callable[[], float] = time.monotonic, selector: Callable[[], Any] = selectors.DefaultSelector) -> None:
        self.commit, self.is_heavy, self.clock = commit, is_heavy, clock
        self.selector = selector()
        self.crew = Crew(MAX_HELPERS)
        self.tasks: Set[Task] = set()
        self.talking = 0                            # of them, those that are conversations
        self._parcels: List[Tuple[Task, Any]] = []  # to commit, ...
        self._since = 0.0                           # ... and when the first of them came
        self._committing: Dict[int, float] = {}     # batches that a thread is about, and since when
        self._slow = False
        self._speakers: List[Task] = []
        self._soon: Deque[Tuple[Task, Any, Any, Optional[BaseException]]] = collections.deque()     # threads append
        self._paused: List[Tuple[float, int, Task, float]] = []     # a heap: when, serial number, task, what it awaits
        self._serial = itertools.count()
        self._swept, self._tick = 0.0, self.TICK    # when deadlines were looked at, and how often that is due
        self._ends: Optional[float] = None          # when a stopping loop gives up waiting for messages in flight
        self._thread: Optional[threading.Thread] = None
        self._ear, self._mouth = socket.socketpair()    # a byte wakes the loop
        self._ear.setblocking(False)
        self._mouth.setblocking(False)
        self.selector.register(self._ear, READ, None)

    def start(self) -> None:
        """Carry the tasks in a thread of its own; RuntimeError when there is none to be had."""
        thread = threading.Thread(target=self._run, name="minimail-loop", daemon=True)
        thread.start()
        self._thread = thread                       # only one that began can be joined

    def stop(self, grace: float) -> None:
        """End all tasks, each once it is not in flight, or after `grace` seconds; return when they have ended."""
        self._ends, self._tick = self.clock() + grace, 0.02
        self._wake()
        if self._thread:
            self._thread.join(grace + 2 * self.TICK + 1.0)
        else:
            self._end_all()
        self.crew.close()
        self.selector.close()
        self._ear.close()
        self._mouth.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):          # full: it is awake. Closed: nobody is there
            self._mouth.send(b"\n")

    def _run(self) -> None:
        while self._ends is None or (self.tasks and self.clock() < self._ends + 2 * self.TICK):
            try:
                self._pass()
            except Exception:                       # nobody is above this
                log.exception("the loop stumbled")
        self._end_all()

    def _end_all(self) -> None:
        for task in list(self.tasks):
            self._go_on(task, error=Disconnected())

    def _pass(self) -> None:
        """Run the tasks whose time has come; commit and look at deadlines when those are due."""
        if self._soon or self._speakers or (self._parcels and not self._is_held_up(self.clock())):
            seconds = 0.0
        elif self._paused:                          # until the next pause is over
            seconds = max(0.0, min(self._tick, self._paused[0][0] - self.clock()))
        else:
            seconds = self._tick
        events = self.selector.select(seconds)
        for key, _ in events:
            task = key.data
            if task is None:
                with contextlib.suppress(OSError):
                    self._ear.recv(4096)
            elif task.waiting is key.events:
                self._go_on(task)
            else:                                   # it waits for something else: to be told no more of this
                self._arm(task, 0)
        self._let_speak()
        now = self.clock()
        if self._parcels and not self._is_held_up(now) and (not events or now > self._since + self.PATIENCE
                                                       or len(self._parcels) >= min(self.BATCH, self.talking)):
            self._commit(now)
        while self._paused and self._paused[0][0] <= now:
            _, _, task, what = heapq.heappop(self._paused)
            self._soon.append((task, what, None, None))
        for _ in range(len(self._soon)):
            task, what, value, error = self._soon.popleft()
            if task.waiting is what:                # and has not been told meanwhile that time is up
                self._go_on(task, value, error)
        self._let_speak()
        if now >= self._swept + self._tick:
            self._sweep(now)

    def _let_speak(self) -> None:
        """Let those send who have something to say, one right after the other.

        A peer on this machine that hears several at once is woken once. Measured with ten: a quarter less CPU a message.
        """
        speakers, self._speakers = self._speakers, []
        for task in speakers:
            if task.waiting is SPEAK:
                self._go_on(task)

    def _sweep(self, now: float) -> None:
        """Tell the tasks whose deadline has passed, and when the node stops, those that are not in flight."""
        self._swept = now
        stopping = self._ends is not None
        for task in list(self.tasks):
            waits = task.waiting is READ or task.waiting is WRITE or type(task.waiting) is float
            if waits and (task.deadline <= now or (stopping and not (task.in_flight() and now < self._ends))):  # type: ignore
                self._go_on(task, error=TimedOut())

    def spawn(self, task: Task) -> None:
        """Begin to carry a task: it runs at once, until it waits. For the loop's own thread, or before start()."""
        self.tasks.add(task)
        self.talking += task.talks
        self._go_on(task)

    def _go_on(self, task: Task, value: Any = None, error: Optional[BaseException] = None) -> None:
        """Run a task until it waits again."""
        try:
            what = task.coroutine.send(value) if error is None else task.coroutine.throw(error)
        except BaseException as end:
            task.waiting = None
            self.tasks.discard(task)
            self.talking -= task.talks
            if not isinstance(end, StopIteration):
                log.exception("a task failed")
            return
        task.waiting = what
        if what is READ or what is WRITE:
            if task.armed is not what:
                try:
                    self._arm(task, what)
                except (OSError, ValueError) as error:      # the system watches no more sockets, or this one is closed
                    self._soon.append((task, what, None, error))
        elif what is SPEAK:
            self._speakers.append(task)
        elif type(what) is float:
            if what <= 0:
                self._soon.append((task, what, None, None))
            else:
                heapq.heappush(self._paused, (self.clock() + what, next(self._serial), task, what))
        elif callable(what) or isinstance(what, Work):
            self._do(task, what)
        else:
            self._since = self._since if self._parcels else self.clock()
            self._parcels.append((task, what))

    def _arm(self, task: Task, events: int) -> None:
        """Let the poller watch a task's socket for READ, WRITE or, with 0, nothing."""
        if not task.armed:
            self.selector.register(task.sock, events, task)
        elif events:
            self.selector.modify(task.sock, events, task)
        else:
            self.selector.unregister(task.sock)
        task.armed = events

    def forget(self, task: Task) -> None:
        """Be told that a task is about to close its socket, or to put another one in its place."""
        if task.armed:
            self._arm(task, 0)

    def _is_held_up(self, now: float) -> bool:
        """Return whether the next batch has to wait for one before it."""
        begun = list(self._committing.values())     # threads remove theirs
        return bool(begun) and (len(begun) >= self.MOST_STUCK or now < max(begun) + self.STUCK)

    def _commit(self, now: float) -> None:
        batch, self._parcels = self._parcels[:self.BATCH], self._parcels[self.BATCH:]
        serial = next(self._serial)
        self._committing[serial] = now

        def run() -> None:
            parcels = [parcel for _, parcel in batch]
            try:
                results = self.commit(parcels)
            except Exception as error:
                log.exception("%d messages not stored, or nobody knows", len(batch))
                results = [error] * len(batch)
            self._slow = self.clock() - now > self.SLOW * max(1.0, len(batch) / 20)
            self._soon.extend((task, parcel, refused, None) for (task, parcel), refused in zip(batch, results))
            del self._committing[serial]
            if threading.current_thread() is not self._thread:
                self._wake()
        if not (self._slow or len(self._committing) > 1 or any(self.is_heavy(parcel) for _, parcel in batch)):
            return run()
        try:
            self.crew.do(run)
        except RuntimeError:                        # without threads the disk is waited for
            run()

    def _do(self, task: Task, what: Any) -> None:
        """Let another thread do what a task waits for."""
        work = what if isinstance(what, Work) else Work(what, self.crew, lambda: True)

        def run() -> None:
            value, error = None, None
            try:
                if self._ends is not None and self.clock() > self._ends or not work.wanted():
                    raise Disconnected
                value = work.function()
            except BaseException as raised:
                error = raised
            self._soon.append((task, what, value, error))
            self._wake()
        try:
            work.crew.do(run)
        except RuntimeError as error:
            self._soon.append((task, what, None, error))


def run_blocking(wire: "Wire", coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Drive a coroutine that talks over one wire in this thread, and return its result: for workers, which may wait."""
    error: Optional[BaseException] = None
    while True:
        try:
            what = coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration as end:
            return end.value
        left = wire.deadline - wire.clock()
        error = None if what is SPEAK or (left > 0 and is_ready(wire.sock, what, left)) else TimedOut()


def is_ready(sock: Union[socket.socket, int], events: int, seconds: float) -> bool:
    """Wait at most so many seconds until a socket or pipe can be read or written; return whether it can. ValueError."""
    with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
        selector.register(sock, events)
        return bool(selector.select(seconds))


END_OF_DATA = b"\r\n.\r\n"
UNDECIDED = (b"\r\n.\r", b"\r\n.", b"\r\n", b"\r", b"\n.", b"\n")     # what a block may end with and say nothing yet
LEADING_DOT = expression(rb"\n[.]")                         # memchr finds the newlines: faster than find(), than (?=\.) too
LONG_LINE = expression(rb"(?:(?<=\n)|\A)[^\n]{1000,}")      # its CR included: more than RFC 5322 section 2.1.1 allows


def has_bare_newline(block: bytes) -> bool:
    """True when block has a CR or LF that is not part of a CRLF. One pass in C, as the codec for text files does it."""
    decoder = io.IncrementalNewlineDecoder(None, translate=False)
    decoder.decode(block.decode("latin-1"), final=True)
    return decoder.newlines not in (None, "\r\n")


class Content:
    """Message content as it comes over the wire, in blocks cut anywhere; `dots` for DATA, without for BDAT.

    feed() returns what goes to the file: leading dots removed (RFC 5321 section 4.5.2), a bare CR or LF made CRLF.
    Only CRLF.CRLF ends the data; what came after it is then in `rest`.
    """

    def __init__(self, dots: bool = True) -> None:
        self.dots = dots
        self.held = b"\r\n" if dots else b""        # could be the start of the end, or of a CRLF; here: the line before
        self.skip = len(self.held)                  # bytes of `held` that were never content
        self.finished = False
        self.rest = b""
        self.bare = False                           # a bare CR or LF was seen
        self.unstuffed = False                      # a line began with a single dot and something else: not stuffed

    def feed(self, block: bytes) -> bytes:
        """Return the content in `block`, as far as it is decided."""
        data = self.held + block if self.held else block
        dotted = self.dots and b"." in data and LEADING_DOT.search(data) is not None
        end = data.find(END_OF_DATA) if dotted else -1
        if end >= 0:
            self.finished, self.held = True, b""
            data, self.rest = data[:end + 2], data[end + 5:]
        else:
            undecided = UNDECIDED if self.dots else (b"\r",)
            self.held = next((tail for tail in undecided if data.endswith(tail)), b"")
            data = data[:len(data) - len(self.held)]
        if dotted and b"\r\n." in data:
            self.unstuffed = self.unstuffed or re.search(rb"\r\n\.[^.]", data) is not None
            data = data.replace(b"\r\n.", b"\r\n")
        if self.skip and data:
            data, self.skip = data[self.skip:], 0
        if has_bare_newline(data):
            self.bare = True
            if self.dots:                           # whoever takes a bare LF for a line end doubles dots there, too
                data = re.sub(rb"(?<!\r)\n\.\.", b"\n.", data)
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
        return data

    def end(self) -> bytes:
        """Return what was held back when BDAT's last chunk is there."""
        held, self.held = self.held, b""
        self.bare = self.bare or bool(held)
        return b"\r\n" if held else b""


class Stuffed:
    """A message of whatever line ends as it goes over the wire, in blocks (RFC 1939 section 3, RFC 5321 section 4.5.2)."""

    def __init__(self) -> None:
        self._held = b""                            # a CR whose LF may be in the next block
        self._line_start = True
        self._ended = True                          # the last line has its end, or there is none

    def lines(self, block: bytes) -> bytes:
        """Return the block with CRLF line ends."""
        data = self._held + block if self._held else block
        self._held = b"\r" if data.endswith(b"\r") else b""
        data = data[:-1] if self._held else data
        self._ended = data.endswith(b"\n") if data else self._ended
        return re.sub(rb"(?<!\r)\n", b"\r\n", data)

    def last_end(self) -> bytes:
        """Return what the last line lacks."""
        return b"\r\n" if self._held or not self._ended else b""

    def stuff(self, data: bytes) -> bytes:
        """Return what lines() gave with its leading dots doubled."""
        stuffed = stuff_dots(data, self._line_start)
        self._line_start = data.endswith(b"\n") if data else self._line_start
        return stuffed


def stuff_dots(block: bytes, at_line_start: bool) -> bytes:
    """Return block with leading dots doubled (RFC 5321 section 4.5.2, RFC 1939 section 3)."""
    if b"." in block and LEADING_DOT.search(block):
        block = block.replace(b"\r\n.", b"\r\n..")
    return b"." + block if at_line_start and block.startswith(b".") else block


class Wire:
    """A socket that never blocks: bounded lines, batched output, a deadline that no dripping client can move.

    Output is sent before input is waited for, and never later: so pipelined commands are answered in one piece (RFC 2920)
    and nobody waits for a reply that we hold. `clock` gives the seconds deadlines count in.
    """

    def __init__(self, sock: socket.socket, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.sock = sock
        self.timeout = timeout
        self.clock = clock
        self.deadline = clock() + timeout
        self.input = bytearray()
        self.output: List[Union[bytes, memoryview]] = []
        self.pending = 0                            # bytes in `output`
        self.skipping = False                       # inside a line that was too long
        self.tls = False
        sock.setblocking(False)

    def renew(self, extra: float = 0.0) -> None:
        """Give the next step its full time."""
        self.deadline = self.clock() + self.timeout + extra

    async def line(self, limit: int) -> bytes:
        """Return the next line without its end, CRLF or LF; LineTooLong (above `limit` bytes), Disconnected, TimedOut."""
        if not self.input and not self.skipping:
            data = await self.fill()
            if data.find(b"\n") == len(data) - 1 <= limit:
                return data[:-2] if data.endswith(b"\r\n") else data[:-1]     # one whole line, as nearly always
            self.input += data
        start = 0
        while True:
            end = self.input.find(b"\n", start)
            if end >= 0:
                line = bytes(self.input[:end])
                del self.input[:end + 1]
                if self.skipping or end > limit:
                    self.skipping = False
                    raise LineTooLong
                return line[:-1] if line.endswith(b"\r") else line
            if len(self.input) > limit:
                self.skipping = True
                self.input.clear()
            start = len(self.input)
            self.input += await self.fill()

    async def take(self, size: int) -> bytes:
        """Return up to `size` bytes, of what has been read already or is read now; Disconnected, TimedOut."""
        if not self.input:
            return await self.fill(size)
        data = bytes(self.input[:size])
        del self.input[:size]
        return data

    async def fill(self, size: int = BLOCK) -> bytes:
        """Return input from the socket, unsent output sent first; Disconnected, TimedOut."""
        if self.output:
            await self.flush()
        event = 0 if self.tls and self.sock.pending() else READ     # type: ignore[attr-defined]
        while True:
            if event:
                await wait(event)
            try:
                data = self.sock.recv(size)
            except (OSError, ValueError) as error:
                event = blocked_on(error)
                continue
            if not data:
                raise Disconnected
            return data

    def send(self, data: bytes) -> None:
        """Queue bytes for the other side."""
        if data:                                    # OpenSSL may take a write of nothing for the end (Python 3.8)
            self.output.append(data)
            self.pending += len(data)

    async def drain(self) -> None:
        """Send queued output when it is much, so that it does not pile up; Disconnected, TimedOut."""
        if self.pending >= BLOCK:
            await self.flush()

    async def flush(self) -> None:
        """Send all queued output; Disconnected, TimedOut."""
        if self.output:
            await wait(SPEAK)
        while self.output:
            data = self.output[0] if len(self.output) == 1 else b"".join(self.output)
            try:
                sent = self.sock.send(data)
            except (OSError, ValueError) as error:
                self.output = [data]
                await wait(blocked_on(error, WRITE))
            else:
                self.pending -= sent
                self.output = [memoryview(data)[sent:]] if self.pending else []

    async def send_file(self, fd: int, offset: int, count: int) -> None:
        """Send `count` bytes of a file from `offset`, in the kernel where it can; Disconnected, TimedOut."""
        if self.tls or not hasattr(os, "sendfile"):
            self.send(pread(fd, count, offset))
            return await self.flush()
        await self.flush()
        while count:
            try:
                sent = os.sendfile(self.sock.fileno(), fd, offset, count)
            except OSError as error:
                await wait(blocked_on(error, WRITE))
                continue
            if not sent:
                raise Disconnected                  # the file became shorter: the length we promised cannot be kept
            offset, count = offset + sent, count - sent

    async def start_tls(self, context: "ssl.SSLContext", **how: Any) -> None:
        """Switch to TLS (`how` as for wrap_socket). What came before the handshake is thrown away (RFC 3207 section 4.2).

        Disconnected when the handshake fails, its text saying why; TimedOut.
        """
        await self.flush()
        self.input.clear()
        self.skipping = False
        try:
            self.sock = context.wrap_socket(self.sock, do_handshake_on_connect=False, **how)
        except (OSError, ValueError) as error:
            raise Disconnected("TLS: " + reason_of(error)) from error
        self.tls = True
        while True:
            try:
                return self.sock.do_handshake()
            except (OSError, ValueError) as error:
                try:
                    event = blocked_on(error)
                except Disconnected:
                    raise Disconnected("TLS: " + reason_of(error)) from error
            await wait(event)

    def close(self) -> None:
        """Close so that the last reply still arrives: what the client went on sending would make the kernel reset it."""
        try:
            if self.tls:
                with contextlib.suppress(OSError, ValueError):
                    self.sock.unwrap()              # type: ignore[attr-defined]
            self.sock.recv(BIG_BLOCK)
        except (OSError, ValueError):
            pass
        self.sock.close()


def blocked_on(error: Exception, plain: int = READ) -> int:
    """Return what an operation that would have had to wait is to wait for; Disconnected when the error is a real one.

    `plain` is what it waits for without TLS, where reading may have to write and the other way round.
    """
    if isinstance(error, (BlockingIOError, InterruptedError)):
        return plain
    if type(error).__name__ == "SSLWantReadError":
        return READ
    if type(error).__name__ == "SSLWantWriteError":
        return WRITE
    raise Disconnected(reason_of(error)) from error


def is_timeout(error: OSError) -> bool:
    """True when a blocking operation was not done in its time."""
    return isinstance(error, (socket.timeout, BlockingIOError))


def pread(fd: int, count: int, offset: int) -> bytes:
    """Return up to `count` bytes of a file from `offset`; less at its end."""
    if hasattr(os, "pread"):
        return os.pread(fd, count, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, count)


# ======================================================================================================================
# 5  Durable files.  Writes that survive a crash, locks that end with their process; knows no mail and no protocol.
# ======================================================================================================================

O_EXTRA = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
O_LINKED = O_EXTRA | getattr(os, "O_NONBLOCK", 0)
O_PLAIN = O_LINKED | getattr(os, "O_NOFOLLOW", 0)

NO_LINKS = {getattr(errno, name, -1) for name in ("EPERM", "EACCES", "EOPNOTSUPP", "ENOTSUP", "ENOSYS", "EMLINK", "EXDEV",
                                                  "EINVAL")}    # from os.link() where a file cannot have another name
NO_LOCKS = {getattr(errno, name, -1) for name in ("ENOLCK", "EOPNOTSUPP", "ENOTSUP", "ENOSYS", "EINVAL")}     # from flock()


def lock_file(fd: int, wait: bool = False) -> bool:
    """Lock an open file until it is closed or the process ends; False when somebody else has it. OSError.

    Who waits asks again and again: no call hangs then for as long as somebody else has it, nor where a network file system
    has lost the question.
    """
    if wait and fcntl:
        while not lock_file(fd):
            time.sleep(0.01)
        return True
    try:
        if fcntl:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt
            os.lseek(fd, 0, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def close_quietly(fd: int) -> None:
    """Close what needs nothing more: after fsync() has returned, or reading, an error of close() changes nothing."""
    with contextlib.suppress(OSError):
        os.close(fd)


def unlink_quietly(path: str) -> None:
    """Remove a file that means nothing any more, if that can be done."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def is_same_file(fd: int, path: str) -> bool:
    """Return whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def write_all(fd: int, data: Union[bytes, memoryview]) -> None:
    while data:
        data = memoryview(data)[os.write(fd, data):]


def copy_all(source: str, fd: int) -> None:
    """Write what is in a file into an open one; OSError."""
    with open(source, "rb", buffering=0) as file:
        for block in iter(lambda: file.read(BIG_BLOCK), b""):
            write_all(fd, block)


def open_regular(path: str, flags: int = os.O_RDONLY, links: bool = False) -> int:
    """Open a file that others may have put there and return its fd: no FIFO is waited for, no link followed, unless `links`
    says that who named the file may use one. OSError."""
    fd = os.open(path, flags | (O_LINKED if links else O_PLAIN))
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "not a regular file", path)


def list_directory(path: str) -> List[str]:
    """Return the names in a directory; none when it is not there."""
    try:
        return os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextlib.contextmanager
def opened_directory(path: str) -> Iterator[Tuple[str, Optional[int]]]:
    """Yield what to put before a name in a directory, and a `dir_fd`: so those above it are not asked for again each time.

    On a network file system that is most of what a call takes. Without a directory, or such calls, it is the path, and None.
    """
    try:
        fd = os.open(path, os.O_RDONLY | O_EXTRA) if os.unlink in os.supports_dir_fd else -1
    except OSError:
        fd = -1
    try:
        yield ("", fd) if fd >= 0 else (path + os.sep, None)
    finally:
        close_quietly(fd)


def reach(path: str) -> None:
    """Ask for what only the servers of a file system know, so that nothing answers from what it remembers; OSError.

    A client of CephFS answers stat() itself while nobody elsewhere writes there, also when its cable is pulled.
    """
    try:
        if hasattr(os, "statvfs"):
            os.statvfs(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES):
            raise


def device_beneath(path: str) -> Optional[int]:
    """Return the device on which the mount point of a directory's file system lies; None for the root's own. OSError."""
    device = os.stat(path).st_dev
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        if os.stat(path).st_dev != device:
            return os.stat(path).st_dev
    return None


LEFT_BEHIND = expression(r"[0-9a-f]{8}\.try|.+\.[0-9a-f]{9,24}\.tmp", re.ASCII)     # as open() and write() name things


class Storage:
    """The data directory: durable writes, drafts whose writer is known to live, and how processes tell each other.

    Whoever writes a draft holds a lock on it from its first byte until it is in place, so that any other process (on a
    shared file system, too, if that has locks) can tell what a dead one left behind. Who did something that others wait
    for changes the time on a file in run/; who waits looks at that, at most a tenth of a second apart.

    The directory may be out of reach for a while: on a network, or where a mount has gone. One line in the log says so and
    one that it is back; what was refused meanwhile is done again by who wanted it. Where the answer to a call was lost, the
    file system makes it anew and finds it done: so make(), linked() and rename(), whose names are nobody else's, take
    what is there for their own.
    """

    LOOK = 0.1                                      # seconds between looks at a stamp
    REACH = 1.0                                     # seconds for which an answer of the servers counts
    SILENCE = 5.0                                   # seconds without an answer, then the file system is out of reach

    def __init__(self, root: str, sync: bool = True) -> None:
        self.root = os.path.abspath(root)
        self.run = os.path.join(self.root, "run")
        self.sync = sync
        self.token = os.urandom(4).hex()            # of this process, in the ids of its messages
        self.sweeping = threading.Lock()            # a draft may have two names: who sweeps one is not its writer
        self._sequence = itertools.count(1)
        self._complained: Set[str] = set()
        self._beneath: Optional[int] = None         # the device that the mount point of the directory lies on
        self._asked: Dict[int, float] = {}          # threads that wait for an answer about a stamp, and since when
        self._reached = -self.REACH                 # when its servers answered last
        self.away = 0.0                             # since when it is out of reach; 0: it is there

    def open(self) -> None:
        """Make the directory; OSError, also when nothing can be written there."""
        self.make_directory(self.run)
        self._beneath = device_beneath(self.root)
        path = os.path.join(self.run, self.token + ".try")
        try:
            os.close(self.create(path))
        finally:
            unlink_quietly(path)
        self.sweep(self.run)
        self.sweep(self.root)

    def sweep(self, directory: str) -> None:
        """Remove from a directory what those have left who were killed just when they wrote there."""
        for name in list_directory(directory):
            if LEFT_BEHIND.fullmatch(name):
                self.remove_abandoned(os.path.join(directory, name))

    def new_id(self, now: float) -> str:
        """Return a new message id: time, token of this process, serial number."""
        return "%08x-%05x-%s%x" % (int(now), int(now % 1 * 1e6), self.token, next(self._sequence))

    # Drafts.

    @staticmethod
    def make(path: str) -> int:
        """Make a file and return its fd; OSError."""
        try:
            return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | O_EXTRA, 0o600)
        except FileExistsError:
            fd = open_regular(path, os.O_WRONLY)
            if os.fstat(fd).st_size or not lock_file(fd):   # somebody writes it
                os.close(fd)
                raise
            return fd

    def create(self, path: str) -> int:
        """Make a file, locked while its writer lives, and return its fd; OSError."""
        while True:
            fd = self.make(path)
            try:
                if self.lock(fd, wait=True) and os.fstat(fd).st_nlink:
                    return fd
            except OSError:                         # the file system is going away
                close_quietly(fd)
                unlink_quietly(path)
                raise
            os.close(fd)                            # who sweeps came between the two, and has removed it

    def lock(self, fd: int, wait: bool = False) -> bool:
        """Do what lock_file() does. Where there are no locks, there is one process, we hope.

        OSError when nobody knows, as on a file system that is going away: others may have it.
        """
        try:
            return lock_file(fd, wait)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self.complain("locks", "no locks on this file system, what a crash leaves is not cleaned up: %s" % error)
            return True

    def remove_abandoned(self, path: str) -> None:
        """Remove a draft whose writer is dead, while nobody else can begin to write it."""
        with self.sweeping, contextlib.suppress(OSError):
            fd = open_regular(path, os.O_RDWR)
            try:
                if lock_file(fd) and is_same_file(fd, path):
                    os.unlink(path)
            finally:
                os.close(fd)

    # Who lives, and who waits for what.

    def appear(self) -> int:
        """Let others know that this process has things in its memory; return what vanish() needs, -1 when it cannot."""
        try:
            return self.create(os.path.join(self.run, self.token + ".here"))
        except OSError as error:
            self.complain("here", "others will not see at once that this process has died: %s" % error)
            return -1

    def vanish(self, fd: int) -> None:
        """Let others know that it has nothing any more; a process that dies needs not say so."""
        unlink_quietly(os.path.join(self.run, self.token + ".here"))
        close_quietly(fd)

    def living(self) -> Set[str]:
        """Return the tokens of the processes that appeared and live."""
        for name in self._appeared():
            if name != self.token + ".here":
                self.remove_abandoned(os.path.join(self.run, name))
        return {name[:-len(".here")] for name in self._appeared()}

    def _appeared(self) -> List[str]:
        return [name for name in list_directory(self.run) if name.endswith(".here")]

    def wake(self, kind: str) -> None:
        """Tell all processes on this directory that wait for `kind`: a hint, after the fact, that never fails.

        The time is any of the last year: some file systems keep whole seconds, and two wakes must not look like one.
        """
        path, now = os.path.join(self.run, kind), time.time_ns()
        try:
            os.utime(path, ns=(now, now - 2 * 10**9 * int.from_bytes(os.urandom(3), "big")))
        except OSError:                             # the first one, or somebody removed the directory underneath us
            with contextlib.suppress(OSError):
                self.make_directory(self.run)
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY | O_EXTRA, 0o600))

    def stamp(self, kind: str) -> int:
        """Return a number that changes when somebody calls wake(kind)."""
        me, now = threading.get_ident(), time.monotonic()
        self._asked[me] = now
        try:
            if now >= self._reached + self.REACH:
                reach(self.root)
                self._reached = now
            found = os.stat(os.path.join(self.run, kind)).st_mtime_ns
        except FileNotFoundError:
            found = 0
        except OSError:
            self.is_away()
            return 0
        finally:
            self._asked.pop(me, None)
        if self.away:
            self.is_away()
        return found

    # Whether it is there.

    def is_away(self) -> bool:
        """Return whether the whole directory is out of reach, after a look at it."""
        try:
            self._refuse_beneath()
            reach(self.root)
        except OSError as error:
            return self._note(reason_of(error))
        return self._note(None)

    def report(self, text: str, *arguments: Any) -> None:
        """Log what went wrong on the disk; nothing while the whole directory is out of reach, which is said once."""
        if not self.is_away():
            log.warning(text, *arguments)

    def watch(self) -> None:
        """Note when the file system has not answered for a while; called every second or so, by who never waits for it."""
        asked = list(self._asked.values())
        if asked and time.monotonic() > min(asked) + self.SILENCE:
            self._note("it does not answer")

    def _note(self, problem: Optional[str]) -> bool:
        """Log that the directory has gone out of reach, or come back; return whether it is out of reach."""
        away, self.away = self.away, (self.away or time.monotonic()) if problem else 0.0
        if problem and not away:
            log.error("%s is out of reach: %s; mail is refused for now, or waits", self.root, problem)
        elif away and not problem:
            log.warning("%s is back after %.0f seconds", self.root, time.monotonic() - away)
        return bool(problem)

    def _refuse_beneath(self) -> None:
        """OSError when the directory's mount is gone: what is written to the disk beneath is not seen when it comes back."""
        path, device = self.root, None
        while device is None:
            try:
                device = os.stat(path).st_dev
            except FileNotFoundError:               # removed: it is made anew
                path = os.path.dirname(path)
        if device == self._beneath:
            raise OSError(errno.ENODEV, "its file system is not mounted", self.root)

    # Durable writes.

    def complain(self, what: str, text: str) -> None:
        """Log a warning about this file system, once."""
        if what not in self._complained:
            self._complained.add(what)
            log.warning("%s: %s", self.root, text)

    @staticmethod
    def linked(source: str, target: str) -> bool:
        """Give a file a second name, and return True; False where the file system has no links. OSError."""
        try:
            os.link(source, target)
        except FileExistsError:
            if not os.path.samefile(source, target):
                raise
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return False
        return True

    def link(self, source: str, target: str) -> None:
        """Give a file a second name; where the file system has no links, make a durable copy. OSError."""
        if self.linked(source, target):
            return
        above, name = os.path.split(target)
        tmp = os.path.join(os.path.dirname(above), "tmp")
        draft = os.path.join(tmp if os.path.isdir(tmp) else above, name + ".tmp")     # of a mailbox, or of the queue
        self._put(draft, target, lambda fd: copy_all(source, fd))

    @staticmethod
    def rename(source: str, target: str) -> None:
        """Put a file of ours that is open in its place, and of one that is there; OSError.

        Of a closed file that CephFS renames our host keeps all rights: who wants it on another host waits for the next tick
        of the metadata server, 5 seconds by default.
        """
        try:
            os.replace(source, target)
        except FileNotFoundError:
            if not os.path.exists(target):
                raise

    def move(self, source: str, target: str) -> None:
        """Rename a file that nobody of us has open; OSError."""
        fd = -1
        with contextlib.suppress(OSError):
            fd = open_regular(source)
        try:
            self.rename(source, target)
        finally:
            if fd >= 0:
                close_quietly(fd)

    def make_directory(self, path: str) -> None:
        """Make a directory (0700) and what is missing above it, durably; OSError."""
        for above in self.make_directories([path]):
            self.sync_directory(above)

    def make_directories(self, paths: Sequence[str]) -> List[str]:
        """Make directories (0700) and what is missing above them; return those that must be flushed for it. OSError."""
        changed: Dict[str, None] = {}
        for path in map(os.path.abspath, paths):
            missing = []
            while not os.path.isdir(path):
                missing.append(path)
                path = os.path.dirname(path)
            if missing:
                self._refuse_beneath()
            for path in reversed(missing):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path, 0o700)
                changed[os.path.dirname(path)] = None
        return list(changed)

    def sync_file(self, fd: int) -> None:
        if self.sync:
            os.fsync(fd)

    def sync_directory(self, path: str) -> None:
        """Return when all that happened in the directory before this call is on disk; OSError."""
        if not self.sync or os.name == "nt":        # NTFS journals names itself, and Windows opens no directories
            return
        fd = os.open(path, os.O_RDONLY | O_EXTRA)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            self.complain("sync", "this file system flushes no directories (%s): a power cut may lose what was taken" % error)
        finally:
            os.close(fd)

    def flush(self, things: Iterable[Union[int, str]]) -> Dict[Union[int, str], OSError]:
        """Return when files (fd) and directories (path) are on disk, with the errors of those that are not.

        Writing is begun for all of them first: so they are on their way while the first is waited for, and where there
        is a journal, one commit serves all. Measured on ext4: ten messages together take 1.6 ms rather than 9.8.
        """
        errors: Dict[Union[int, str], OSError] = {}
        if not self.sync:
            return errors
        distinct = list(dict.fromkeys(things))
        if hasattr(os, "posix_fadvise") and len(distinct) > 1:
            for thing in distinct:
                if isinstance(thing, int):
                    with contextlib.suppress(OSError):
                        os.posix_fadvise(thing, 0, 0, os.POSIX_FADV_DONTNEED)
        for thing in distinct:
            try:
                if isinstance(thing, int):
                    os.fsync(thing)
                else:
                    self.sync_directory(thing)
            except OSError as error:
                errors[thing] = error
        return errors

    def write(self, path: str, data: bytes) -> None:
        """Put a file in place with all of `data` or not at all, an older one replaced at once, durably; OSError."""
        self._put("%s.%s%x.tmp" % (path, self.token, next(self._sequence)), path, lambda fd: write_all(fd, data))
        self.sync_directory(os.path.dirname(path))

    def _put(self, draft: str, path: str, fill: Callable[[int], None]) -> None:
        """Put a file in place that fill(fd) has written as a whole; only its name is not on disk yet. OSError."""
        fd = self.create(draft)
        try:
            fill(fd)
            self.sync_file(fd)
            self.rename(draft, path)                # while it is locked: nobody takes it for abandoned
        except BaseException:
            unlink_quietly(draft)
            raise
        finally:
            os.close(fd)


class Draft:
    """A message file while its content comes in; `open_file()` makes it on the first write and returns (fd, path).

    An error of the disk is kept and raised by complete(), so that the rest of the content can be read past it.
    """

    __slots__ = ("id", "limit", "size", "path", "head", "keep_head", "eightbit", "error", "ends_with_newline",
                 "written", "fd", "_open_file", "_buffer", "_buffered")

    def __init__(self, id: str, header: bytes, limit: int, open_file: Callable[[], Tuple[int, str]],
                 keep_head: int) -> None:
        self.id = id
        self.limit = limit                          # bytes of content
        self.size = 0                               # bytes of content so far
        self.path = ""
        self.head = b""                             # the content's beginning, when somebody wants to look at it
        self.keep_head = keep_head                  # bytes of it
        self.eightbit = False
        self.error: Optional[OSError] = None
        self.ends_with_newline = True
        self.written = 0                            # bytes in the file: header and content
        self.fd = -1
        self._open_file = open_file
        self._buffer = [header]
        self._buffered = len(header)

    @property
    def too_large(self) -> bool:
        return self.size > self.limit

    def write(self, block: bytes) -> None:
        """Append content; errors wait for complete()."""
        if not block:
            return
        self.size += len(block)
        if self.error or self.too_large:
            self.discard()
            return
        if len(self.head) < self.keep_head:
            self.head += block[:self.keep_head]
        self.eightbit = self.eightbit or not block.isascii()
        self.ends_with_newline = block.endswith(b"\n")
        self._buffer.append(block)
        self._buffered += len(block)
        if self._buffered >= BLOCK:
            self._flush()

    def _flush(self) -> None:
        data = b"".join(self._buffer) if len(self._buffer) > 1 else self._buffer[0]
        self._buffer, self._buffered = [], 0
        try:
            if self.fd < 0:
                self.fd, self.path = self._open_file()
            write_all(self.fd, data)
            self.written += len(data)
        except OSError as error:
            self.error = error
            self.discard()

    def complete(self) -> int:
        """Write what is left, ended by a line end, and return the fd: what is in it is not on disk yet. OSError."""
        if not self.ends_with_newline:
            self.ends_with_newline = True
            self._buffer.append(b"\r\n")           # ours: does not count against the limit
        if self.error is None and self._buffer:
            self._flush()
        if self.error:
            raise self.error
        return self.fd

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            close_quietly(fd)

    def discard(self) -> None:
        """Drop what is not in the file yet, and remove that when it is not where it belongs."""
        self._buffer, self._buffered = [], 0
        self.close()
        if self.path:
            unlink_quietly(self.path)
            self.path = ""


class Watched:
    """A value made from files, and made anew when one of them changed: users, aliases, certificates.

    `load()` returns it, or raises OSError or ValueError: then the last good one serves on.
    """

    PAUSE = 0.02                                    # seconds for which a look at the files is good enough

    def __init__(self, paths: Sequence[str], load: Callable[[], Any]) -> None:
        self.paths = [path for path in paths if path]
        self.load = load
        self.value: Any = None
        self._stamp: Any = None                     # None: never loaded
        self._checked = 0.0
        self._complaint = ""                        # the last one: said once
        self._lock = threading.Lock()

    def files(self) -> Sequence[str]:
        """Return the paths of the files."""
        return self.paths

    def is_stale(self) -> bool:
        """Return whether get() would have to load; cheap enough for the loop."""
        now = time.monotonic()
        if self._stamp is not None and now - self._checked < self.PAUSE:
            return False
        if self._stamp is None or self._look() != self._stamp:
            return True                             # ... and so it is for everybody until it is loaded
        self._checked = now
        return False

    def _look(self) -> Any:
        stamps = []
        for path in self.files():
            try:
                found = os.stat(path)
                stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
            except FileNotFoundError:
                stamps.append((0, 0, 0))
            except OSError as error:
                self._complain(error)
                return self._stamp
        return stamps

    def get(self, fresh: bool = False) -> Any:
        """Return the value, loaded first if a file changed; who comes while somebody loads waits for that.

        OSError or ValueError when there is none yet and none can be made.
        """
        if not fresh and not self.is_stale():
            return self.value
        with self._lock:
            stamp = self._look()
            if stamp != self._stamp or stamp is None:
                try:
                    self.value = self.load()
                    self._stamp, self._complaint = stamp or [], ""
                except (OSError, ValueError) as error:
                    if self._stamp is None:         # nothing known: better say "later" than "no such user"
                        raise
                    self._complain(error)
        return self.value

    def _complain(self, error: Exception) -> None:
        if self._complaint != str(error):
            self._complaint = str(error)
            log.warning("cannot use %s, going on with what was there: %s", " and ".join(self.files()), error)


class Reloaded(Watched):
    """A small text file, parsed when it is first needed and again whenever it changed.

    `parse` gets the lines as [(number, text)] and a function to complain with; a line it cannot use locks nobody out. A file
    that is not there has no lines, unless it is_away(): with the disk that it is on.
    """

    def __init__(self, path: str, parse: Callable[[List[Tuple[int, str]], Callable[[int, str], None]], Any],
                 is_away: Callable[[], bool] = lambda: False) -> None:
        self.path = path
        self.is_away = is_away
        super().__init__([path], lambda: parse(self.lines(), functools.partial(log.warning, "%s line %d: %s", path)))

    def lines(self) -> List[Tuple[int, str]]:
        """Return the file as numbered lines without comments; one that begins with a space continues the line above."""
        try:
            with open(open_regular(self.path, links=True), encoding="utf-8", errors="replace") as file:
                raw = file.read().splitlines()
        except FileNotFoundError:
            if self.is_away():
                raise
            if self.value:
                log.warning("%s is gone: what stood there does not count any more", self.path)
            return []
        lines: List[Tuple[int, List[str]]] = []
        for number, line in enumerate(raw, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if line[0] in " \t" and lines:
                lines[-1][1].append(line.strip())
            else:
                lines.append((number, [line.strip()]))
        return [(number, " ".join(pieces)) for number, pieces in lines]


class OptionFile(Reloaded):
    """An option's value in a file of its own, read again when it changes; while that is wrong or gone the last good counts."""

    def __init__(self, name: str, path: str, meta: Any) -> None:
        super().__init__(path, lambda lines, complain: read_option(self.texts(), meta, name))
        self.name = name
        self.meta = meta

    def texts(self) -> Any:
        """Return its text, or the list of texts where the option may be given several times; CannotRun."""
        try:
            texts = [split_values(line, self.meta) for _, line in self.lines()]
        except OSError as error:
            raise CannotRun("%s: %s: %s" % (self.name, self.path, reason_of(error))) from None
        if not texts:
            raise CannotRun("%s: %s is not there, or empty" % (self.name, self.path))
        return list(itertools.chain(*texts)) if self.meta["many"] else "\n".join(texts)


def refuse_shared(path: str) -> None:
    """Raise CannotRun when others can write to the data directory: what they put there we would open and follow.

    A group of ours may: that is how a volume is given to a container's user (Kubernetes: fsGroup, mode 2775).
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return
    ours = os.name == "nt" or found.st_gid in (os.getegid(), *os.getgroups())
    if os.name != "nt" and found.st_mode & (0o002 if ours else 0o022):
        if keeps_no_modes(path):                    # exFAT, CIFS, sdcardfs: all that can be done is to say so
            log.warning("%s: this file system keeps no permissions: others may be able to read and change the mail", path)
            return
        raise CannotRun("%s: others can write to it; say chmod %s, or name another with --data" % (
            path, "o-w" if ours else "go-w"))


def keeps_no_modes(directory: str) -> bool:
    """Return whether what is made private here can be written to by others all the same: so it is where modes are made up."""
    try:
        probe = tempfile.mkdtemp(dir=directory)
    except OSError:
        return False
    try:
        return bool(os.stat(probe).st_mode & 0o022)
    finally:
        os.rmdir(probe)


def read_regular(path: str) -> bytes:
    """Return the first MiB of a file that others may have put there, opened as open_regular() does; OSError."""
    with open(open_regular(path), "rb") as file:
        return file.read(1 << 20)


# ======================================================================================================================
# 6  Mailboxes and accounts.  A Maildir per address, who may open it, what an address stands for; knows no protocol.
#
#    tmp/NAME            being written by whoever holds a lock on it; rubbish when nobody does
#    new/NAME, cur/NAME  a whole message, on disk; mutt, Dovecot and others move it from new/ to cur/ and add flags
#    NAME                SECONDS.ID.HOST,S=SIZE,W=SIZE: the UID is what stands before the comma. W is the size with CRLF
#                        line ends (Maildir++), which is what POP3 counts; ours have no others, so S and W are the same.
# ======================================================================================================================

SAFE = expression(r"[a-z0-9._+=-]*")
DEVICE = expression(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)")
OWN_NAME = expression(r"\d+\.([0-9a-f]{8}-[0-9a-f]{5}-[0-9a-f]{9,})\.")
UID = expression(r"[!-~]{1,70}")                    # RFC 1939 section 7
SIZE = expression(r"[nc],(?:[^:]*,)?W=(\d{1,18})(?=$|[:;,])")    # in what of a name follows the place and the UID
NEW = os.sep + "new"
FLAGS = ";2," if os.name == "nt" else ":2,"         # no colons in Windows file names


@functools.lru_cache(maxsize=1000)
def encode_name(text: str, windows: bool = os.name == "nt") -> str:
    """Return the file name for a local part or domain: two different texts never share one, and none leaves its place.

    Refused 553 5.1.3 when it would be longer than file systems allow.
    """
    if SAFE.fullmatch(text) and not text.startswith("."):
        name = text
    else:
        name = "".join(chr(b) if b < 128 and SAFE.fullmatch(chr(b)) else "%%%02X" % b for b in text.encode("utf-8"))
        name = "%2E" + name[1:] if name.startswith(".") else name
    if windows:
        name = "%%%02X" % ord(name[0]) + name[1:] if DEVICE.match(name) else name
        name = name[:-1] + "%2E" if name.endswith(".") else name
    if not 0 < len(name) <= MAX_NAME:
        raise Refused(553, "5.1.3", "address too long for a mailbox" if name else "empty address")
    return name


def decode_name(name: str) -> str:
    """Return the text whose file name is `name`; ValueError when there is none."""
    raw = re.sub(rb"%([0-9A-F]{2})", lambda match: bytes([int(match.group(1), 16)]), name.encode("ascii"))
    text = raw.decode("utf-8")
    if encode_name(text) != name:
        raise ValueError("not a mailbox name")
    return text


class Item(NamedTuple):
    """A message in a mailbox, as its file name tells."""
    uid: str
    size: int                                       # bytes that POP3 sends for it
    place: str                                      # "new" or "cur"
    name: str


class Listing:
    """The messages in a mailbox, oldest first. An Item is made when somebody asks for it: what is kept of each is its name.

    A block is the UIDs of some messages, then their places and what of their names follows the UID; where that is not how
    the name begins, the place is a capital and all of the name follows: "UID/UID/...//nREST/cREST/...".
    """

    BLOCK = 20                                      # messages
    PLACES = {"n": "new", "c": "cur", "N": "new", "C": "cur"}

    def __init__(self, found: Iterable[Tuple[str, str, int]] = ()) -> None:
        """`found` gives UID, place with rest, and size of each message."""
        self.sizes = array.array("Q")
        self._blocks: List[str] = []
        self._unpacked: Tuple[int, List[Item]] = -1, []     # a block's number and items: who reads one goes on to the next
        messages = iter(found)
        for block in iter(lambda: list(itertools.islice(messages, self.BLOCK)), []):
            uids, rests, sizes = zip(*block)
            self._blocks.append("%s//%s" % ("/".join(uids), "/".join(rests)))
            self.sizes.extend(sizes)
        self.total = sum(self.sizes)                # bytes in them

    def uids(self, start: int, end: int) -> List[str]:
        """Return the UIDs of the messages from `start` on, to the one before `end`."""
        first = start // self.BLOCK
        found: List[str] = []
        for block in self._blocks[first:-(-end // self.BLOCK)]:
            found += block.partition("//")[0].split("/")
        return found[start - first * self.BLOCK:end - first * self.BLOCK]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Item:
        number, place = divmod(range(len(self.sizes))[index], self.BLOCK)
        unpacked, items = self._unpacked
        if unpacked != number:
            items = self._items(number)
            self._unpacked = number, items
        return items[place]

    def __iter__(self) -> Iterator[Item]:
        for number in range(len(self._blocks)):
            yield from self._items(number)

    def _items(self, number: int) -> List[Item]:
        """Return the items of a block."""
        uids, _, rests = self._blocks[number].partition("//")
        sizes = self.sizes[number * self.BLOCK:(number + 1) * self.BLOCK]
        return [Item(uid, size, self.PLACES[rest[0]], uid + rest[1:] if rest[0].islower() else rest[1:])
                for uid, size, rest in zip(uids.split("/"), sizes, rests.split("/"))]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Listing) and self._blocks == other._blocks


class Mailboxes:
    """All mailboxes of a data directory. Delivery and reading need no locks; one POP3 session at a time holds one."""

    def __init__(self, storage: Storage, hostname: str = "localhost") -> None:
        self.storage = storage
        self.root = os.path.join(storage.root, "mail")
        self.host = re.sub(r"[^a-z0-9.-]", "", hostname.lower())[:20] or "localhost"
        self.path = functools.lru_cache(maxsize=1000)(self._path)
        self.forget: Optional[Callable[[str], None]] = None     # told the id of a message whose last copy was deleted
        self._listings: "collections.OrderedDict[str, Tuple[Any, Listing]]" = collections.OrderedDict()
        self._listed = 0                            # messages in them
        self._listing_lock = threading.Lock()

    def _path(self, mailbox: str) -> str:
        """Return the directory of a mailbox; Refused when its name is too long for one."""
        local, _, domain = mailbox.rpartition("@")
        return os.path.join(self.root, encode_name(domain), encode_name(local))

    def exists(self, mailbox: str) -> bool:
        """Return whether there is such a mailbox, also when it cannot be read."""
        try:
            return bool(self._stamped(mailbox)[1])
        except OSError:
            return True

    def domains(self) -> List[str]:
        """Return the names of the directories of domains; OSError when the disk is out of reach, which is not to be empty."""
        found = sorted(list_directory(self.root))
        if not found and self.storage.is_away():
            raise OSError(errno.EIO, "out of reach", self.storage.root)
        return found

    def names(self, strict: bool = False) -> Iterator[str]:
        """Yield every mailbox on disk; OSError, with `strict` also when one directory of them is not ours to read."""
        for domain in self.domains():
            yield from (mailbox for mailbox, _ in self.begun(domain, strict) if self.exists(mailbox))

    def begun(self, domain: str, strict: bool = False) -> Iterator[Tuple[str, str]]:
        """Yield (mailbox, path) of each directory in that of a domain which is a mailbox, or the beginning of one."""
        place = os.path.join(self.root, domain)
        for local in sorted(self.permitted(list_directory, place, strict)):
            with contextlib.suppress(ValueError, Refused):
                yield decode_name(local) + "@" + decode_name(domain), os.path.join(place, local)

    def permitted(self, read: Callable[[str], Iterable[Any]], what: str, strict: bool = False) -> Iterable[Any]:
        """Return what is in a mailbox, or another directory; nothing when that is not ours to read, which is said once."""
        try:
            return read(what)
        except PermissionError as error:
            if strict:
                raise
            self.storage.complain(what, "what is in %s is not shown: %s" % (printable(what), error))
            return ()

    def _make(self, mailbox: str, made: List[str]) -> None:
        """Make a mailbox's directories; those that must be flushed for it go into `made`. OSError."""
        path = self.path(mailbox)
        made += self.storage.make_directories([os.path.join(path, place) for place in ("tmp", "cur", "new")])

    def file_name(self, id: str) -> str:
        return "%d.%s.%s" % (int(id[:8], 16), id, self.host)

    def open_draft(self, mailbox: str, id: str, made: List[str]) -> Tuple[int, str]:
        """Make a file in the mailbox's tmp/ and return (fd, path); OSError. Directories to flush for it go into `made`."""
        path = os.sep.join((self.path(mailbox), "tmp", self.file_name(id)))
        try:
            return self.storage.create(path), path
        except FileNotFoundError:
            self._make(mailbox, made)
            return self.storage.create(path), path

    def place(self, draft: Draft, mailboxes: Sequence[str], placed: List[str], made: List[str]) -> None:
        """Put a completed draft into all mailboxes, the paths into `placed`; OSError, with some of it done.

        Directories to flush for it go into `made`.
        The first mailbox's tmp/ has the draft; the others get a link to the same file.
        """
        name = "%s,S=%d,W=%d" % (self.file_name(draft.id), draft.written, draft.written)
        for mailbox in reversed(mailboxes):
            directory = self.path(mailbox) + NEW
            target = directory + os.sep + name
            put: Callable[[str, str], None] = self.storage.rename if mailbox == mailboxes[0] else self.storage.link
            try:
                put(draft.path, target)
            except FileNotFoundError:
                self._make(mailbox, made)
                put(draft.path, target)
            placed.append(target)
            made.append(directory)
        draft.path = ""

    def listing(self, mailbox: str) -> Listing:
        """Return a mailbox's messages, oldest first, from the file names alone; none when there is no mailbox. OSError."""
        path, stamp = self._stamped(mailbox)
        if not stamp:
            return Listing()
        cached = self._recall(path, stamp)
        if cached is not None:
            return cached
        listing = Listing(self._found(path))
        if time.time_ns() - max(stamp)[0] > 2_000_000_000:  # within a clock tick a change might not show in the stamp
            with self._listing_lock:
                self._listed += len(listing) - len(self._listings.pop(path, (None, ()))[1])
                self._listings[path] = (stamp, listing)
                while len(self._listings) > 1 and self._listed > MAX_LISTED:
                    self._listed -= len(self._listings.popitem(last=False)[1][1])
        return listing

    def _found(self, path: str) -> Iterator[Tuple[str, str, int]]:
        """Yield of what is in the directory of a mailbox what a Listing keeps."""
        last = "/"
        for name in sorted_in_steps(self._names(path)):
            base, _, rest = name.partition("/")
            if base == last:
                continue
            match, place = SIZE.match(rest), Listing.PLACES[rest[0]]
            size = int(match.group(1)) if match else size_on_wire(os.sep.join((path, place, base + rest[1:])))
            if size >= 0:
                last = base
                if not UID.fullmatch(base):
                    base, rest = hashlib.sha256(os.fsencode(base)).hexdigest(), rest[0].upper() + base + rest[1:]
                yield base, rest, size

    @staticmethod
    def _names(path: str) -> List[str]:
        """Return the names in a mailbox's directory as BASE/PREST: what begins with BASE, in the place P(new or cur).

        What another program moves meanwhile is there twice, not never: then the two stand together when sorted.
        """
        names: List[str] = []
        for place in ("new", "cur"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(os.path.join(path, place)) as found:
                for entry in found:
                    base, comma, rest = entry.name.partition(",")
                    if base.endswith(FLAGS[:-1]) and comma:
                        base, comma = base[:-2], FLAGS
                    if not base.startswith("."):
                        names.append("%s/%s%s%s" % (base, place[0], comma, rest))
        return names

    def _stamped(self, mailbox: str) -> Tuple[str, List[Tuple[int, int, int]]]:
        """Return a mailbox's path, and what changes when a message comes, goes or is renamed: empty when it is none. OSError.

        One of the two places is enough: a power cut, or a backup without empty directories, may leave no more of it.
        """
        try:
            path = self.path(mailbox)
        except Refused:
            return "", []
        return path, directory_stamps(os.path.join(path, "new", ""), os.path.join(path, "cur", ""))

    def _recall(self, path: str, stamp: List[Tuple[int, int, int]]) -> Optional[Listing]:
        with self._listing_lock:
            cached = self._listings.pop(path, None)
            if not cached or cached[0] != stamp:    # an old one goes before there is a new one: it may be large
                self._listed -= len(cached[1]) if cached else 0
                return None
            self._listings[path] = cached
            return cached[1]

    def remembered(self, mailbox: str) -> Optional[Listing]:
        """Return what listing() would, if that takes no time; None when it does. OSError."""
        path, stamp = self._stamped(mailbox)
        return self._recall(path, stamp) if stamp else Listing()

    def moved(self, mailbox: str, items: Iterable[Item]) -> Iterator[Tuple[Item, str]]:
        """Yield those of the items that another program moved, or changed the flags of, with where their files are now."""
        wanted = {item.name.partition(FLAGS)[0]: item for item in items}
        for place in ("new", "cur") if wanted else ():
            for name in list_directory(os.path.join(self.path(mailbox), place)):
                item = wanted.pop(name.partition(FLAGS)[0], None)
                if item:
                    yield item, os.path.join(self.path(mailbox), place, name)

    def find(self, mailbox: str, item: Item) -> str:
        """Return where an item's file is now, if another program moved it or changed its flags; FileNotFoundError."""
        file = os.path.join(self.path(mailbox), item.place, item.name)
        if os.path.lexists(file):
            return file
        for _, file in self.moved(mailbox, [item]):
            return file
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)

    def open(self, mailbox: str, item: Item, search: bool = True) -> int:
        """Open an item's file for reading and return its fd; OSError. To search for one that was moved may take long."""
        try:
            return open_regular(os.path.join(self.path(mailbox), item.place, item.name))
        except FileNotFoundError:
            if not search:
                raise
            return open_regular(self.find(mailbox, item))

    def start_of(self, mailbox: str, item: Item, count: Optional[int] = None, search: bool = True) -> bytes:
        """Return the first `count` bytes of an item's file; without it, up to one byte more than its size. OSError."""
        try:
            fd = os.open(os.sep.join((self.path(mailbox), item.place, item.name)), os.O_RDONLY | O_PLAIN)
        except FileNotFoundError:
            fd = self.open(mailbox, item, search)
        try:
            return pread(fd, item.size + 1 if count is None else count, 0)      # from a pipe this fails: no need to ask
        finally:
            os.close(fd)

    def delete(self, mailbox: str, items: Iterable[Item]) -> Iterator[Tuple[Item, Optional[OSError]]]:
        """Remove items; yield each that is removed, and each that cannot be, with the error.

        One that is gone already is no error: another thread, or node, may be at it, too.
        """
        missing: List[Item] = []
        with contextlib.ExitStack() as opened:
            places = {place: opened.enter_context(opened_directory(os.path.join(self.path(mailbox), place)))
                      for place in ("new", "cur")}
            known = ((item, places[item.place][0] + item.name, places[item.place][1]) for item in items)
            moved = ((item, file, None) for item, file in self.moved(mailbox, missing))     # begun once all others are done
            for item, file, fd in itertools.chain(known, moved):
                try:
                    last = self.forget and os.stat(file, dir_fd=fd, follow_symlinks=False).st_nlink == 1
                    os.unlink(file, dir_fd=fd)
                    if self.forget and last:
                        self.forget(message_id(item))
                    yield item, None
                except FileNotFoundError:
                    missing.append(item)
                except OSError as error:
                    yield item, error

    def set_seen(self, mailbox: str, item: Item, seen: bool = True) -> None:
        """Move an item to cur/ with or without the flag S, as maildir(5) asks; OSError."""
        file = self.find(mailbox, item)
        base, _, flags = os.path.basename(file).partition(FLAGS)
        flags = "".join(sorted(set(flags) - {"S"} | ({"S"} if seen else set())))
        cur = os.path.join(self.path(mailbox), "cur")
        self.storage.make_directory(cur)
        self.storage.move(file, os.path.join(cur, base + FLAGS + flags))

    def lock(self, mailbox: str) -> int:
        """Hold a mailbox for one POP3 session (RFC 1939 section 4); returns an fd to close, -1 when it does not exist.

        BlockingIOError when another session, in whatever process, has it; OSError.
        """
        if not self.exists(mailbox):
            if self.storage.is_away():              # which is not the same as having no mail
                raise OSError(errno.EIO, "out of reach", self.storage.root)
            return -1
        path = os.path.join(self.path(mailbox), "minimail.lock")
        try:
            fd = os.open(path, os.O_CREAT | os.O_RDWR | O_PLAIN, 0o600)
        except OSError:                             # disk full or read-only: mail can be read all the same
            fd = os.open(self.path(mailbox), os.O_RDONLY | O_EXTRA)
        try:
            if lock_file(fd):
                return fd
            raise BlockingIOError(errno.EAGAIN, "mailbox is in use", path)
        except OSError:
            os.close(fd)
            raise

    def prune(self, mailbox: str, keep: Optional[int], max_age: Optional[float] = None) -> None:
        """Delete all but the newest `keep` messages, and those older than `max_age` seconds, logging each; OSError."""
        items = self.listing(mailbox)
        oldest = time.time() - max_age if max_age else 0.0
        old = (item for index, item in enumerate(items)
               if (keep and index < len(items) - keep) or item_time(item) < oldest)
        for item, error in self.delete(mailbox, old):
            if error:
                raise error
            event("pruned", mailbox=mailbox, uid=item.uid, size=item.size)

    def sweep(self) -> None:
        """Remove what dead processes and, after 36 hours, other programs left in tmp/."""
        for _, place in itertools.chain.from_iterable(map(self.begun, self.domains())):
            tmp = os.path.join(place, "tmp")
            for name in self.permitted(list_directory, tmp):
                path = os.path.join(tmp, name)
                if OWN_NAME.match(name):
                    self.storage.remove_abandoned(path)
                    continue
                with contextlib.suppress(OSError):
                    if time.time() - os.lstat(path).st_mtime > STALE_DRAFT:
                        os.unlink(path)


def directory_stamps(*paths: str) -> List[Tuple[int, int, int]]:
    """Return, of those directories that are there, what changes with what is in them: first a time (ns). OSError."""
    found = []
    for path in paths:
        try:
            stat = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        found.append((stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    return found


def sorted_in_steps(texts: List[str]) -> Iterator[str]:
    """Yield texts in order, with others' turn in between: one sort of a million would hold the interpreter for seconds."""
    marks = sorted(texts[::MAX_STEP])
    parts: List[List[str]] = [[] for _ in range(len(marks) + 1)]
    for text in texts:
        parts[bisect.bisect(marks, text)].append(text)
    texts.clear()                                   # memory for what the caller makes of them
    for number, part in enumerate(parts):
        parts[number] = []
        part.sort()
        yield from part


def size_on_wire(path: str) -> int:
    """Return the size that another program's file has with CRLF line ends, the last one's included; -1 when it is no file."""
    try:
        fd = os.open(path, os.O_RDONLY | O_PLAIN)
    except OSError:                                 # a link, or gone
        return -1
    try:
        block = pread(fd, BLOCK, 0)                 # a directory and a pipe have none
        if len(block) < BLOCK and block.endswith(b"\r\n") and not has_bare_newline(block):
            return len(block)                       # as nearly always
        offset, size, last = 0, 0, b""
        while block:
            crlf = block.count(b"\r\n") + (last + block[:1] == b"\r\n")
            size += len(block) + block.count(b"\n") - crlf
            offset, last = offset + len(block), block[-1:]
            block = pread(fd, BIG_BLOCK, offset)
    except OSError:
        return -1
    finally:
        os.close(fd)
    return size + {b"": 0, b"\n": 0, b"\r": 1}.get(last, 2)      # what the last line's end lacks


def item_time(item: Item) -> float:
    """Return when a message came, in seconds, as its file name tells; that of an odd name is not known: infinity."""
    seconds = item.name.partition(".")[0]
    return float(seconds) if seconds.isascii() and seconds.isdecimal() and len(seconds) < 12 else float("inf")


def message_id(item: Item) -> str:
    """Return the id under which a message was accepted; its UID when another program delivered it."""
    match = OWN_NAME.match(item.name)
    return match.group(1) if match else item.uid


class Message:
    """A message in a mailbox, as the library hands it out."""

    def __init__(self, mailboxes: Mailboxes, mailbox: str, item: Item,
                 envelope: Callable[[Item], Optional[Dict[str, Any]]] = lambda item: None) -> None:
        self._mailboxes, self._item, self._load = mailboxes, item, envelope
        self.recipient = mailbox
        self.uid = item.uid
        self.size = item.size
        self.id = message_id(item)

    def __repr__(self) -> str:
        return "<Message %s to %s, %d bytes>" % (self.uid, self.recipient, self.size)

    @functools.cached_property
    def _envelope(self) -> Optional[Dict[str, Any]]:
        return self._load(self._item)

    @property
    def path(self) -> str:
        """Where the message is now; FileNotFoundError."""
        return self._mailboxes.find(self.recipient, self._item)

    @property
    def received_at(self) -> Any:
        """When the node took it, as an aware datetime; to the microsecond for messages of our own."""
        import datetime
        match = re.match(r"([0-9a-f]{8})-([0-9a-f]{5})-", self.id)
        seconds = int(match.group(1), 16) + int(match.group(2), 16) / 1e6 if match else os.stat(self.path).st_mtime
        return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)

    @property
    def sender(self) -> str:
        """The envelope's reverse-path; "" for the null one."""
        if self._envelope:
            return str(self._envelope["sender"])
        line = self.head(1000).partition(b"\n")[0]
        match = re.match(rb"return-path:\s*<(.*)>\s*$", line, re.IGNORECASE)
        return match.group(1).decode("utf-8", "replace") if match else ""

    @property
    def recipients(self) -> List[str]:
        """The envelope's recipients, Bcc among them; only this mailbox where no transcripts are kept."""
        return list(self._envelope["recipients"]) if self._envelope else [self.recipient]

    def head(self, count: int) -> bytes:
        """Return the first `count` bytes; OSError."""
        return self._mailboxes.start_of(self.recipient, self._item, count)

    def read(self) -> bytes:
        """Return the message as stored; OSError."""
        with open(self._mailboxes.open(self.recipient, self._item), "rb", buffering=0) as file:
            return file.read()

    def email(self) -> "EmailMessage":
        """Return the message parsed."""
        import email.policy
        return email.message_from_bytes(self.read(), policy=email.policy.default)

    def delete(self) -> None:
        """Remove the message from this mailbox; OSError."""
        for _, error in self._mailboxes.delete(self.recipient, [self._item]):
            if error:
                raise error


SCRYPT = {"n": 1 << 14, "r": 8, "p": 1}             # 16 MiB and some 50 ms per password (RFC 7914)
PBKDF2_ROUNDS = 200_000


def pbkdf2(password: bytes, salt: bytes, rounds: int) -> bytes:
    """Return PBKDF2-HMAC-SHA256 (RFC 8018), also where Python was built without OpenSSL."""
    if hasattr(hashlib, "pbkdf2_hmac"):
        return hashlib.pbkdf2_hmac("sha256", password, salt, rounds)
    keyed = hmac.new(password, digestmod="sha256")

    def prf(data: bytes) -> bytes:
        mac = keyed.copy()
        mac.update(data)
        return mac.digest()
    block = prf(salt + b"\0\0\0\1")
    result = int.from_bytes(block, "big")
    for _ in range(rounds - 1):
        block = prf(block)
        result ^= int.from_bytes(block, "big")
    return result.to_bytes(32, "big")


def hash_password(password: str) -> str:
    """Return the record of a password for the users file: $scrypt$n,r,p$salt$hash, or $pbkdf2$rounds$salt$hash."""
    salt = secrets.token_bytes(16)
    secret = password.encode("utf-8", "surrogateescape")
    if hasattr(hashlib, "scrypt"):
        kind, cost, digest = "scrypt", "%(n)d,%(r)d,%(p)d" % SCRYPT, hashlib.scrypt(secret, salt=salt, dklen=32, **SCRYPT)
    else:
        kind, cost, digest = "pbkdf2", str(PBKDF2_ROUNDS), pbkdf2(secret, salt, PBKDF2_ROUNDS)
    return "$%s$%s$%s$%s" % (kind, cost, base64.b64encode(salt).decode(), base64.b64encode(digest).decode())


def check_password(password: str, record: str) -> bool:
    """Return whether a password fits its record, in constant time; ValueError for a record that cannot be read."""
    try:
        empty, kind, cost, salt64, digest64 = record.split("$")
        salt, wanted = base64.b64decode(salt64, validate=True), base64.b64decode(digest64, validate=True)
        numbers = [int(number) for number in cost.split(",")]
    except (ValueError, binascii.Error):
        raise ValueError("not a password record") from None
    secret = password.encode("utf-8", "surrogateescape")
    if kind == "scrypt" and len(numbers) == 3:
        if not hasattr(hashlib, "scrypt"):
            raise ValueError("this Python has no scrypt: set the password again here")
        n, r, p = numbers
        digest = hashlib.scrypt(secret, salt=salt, n=n, r=r, p=p, dklen=len(wanted), maxmem=n * r * 256 + (1 << 20))
    elif kind == "pbkdf2" and len(numbers) == 1 and 0 < numbers[0] < 10_000_000:
        digest = pbkdf2(secret, salt, numbers[0])
    else:
        raise ValueError("unknown kind of password record")
    return hmac.compare_digest(digest, wanted)


def parse_users(lines: List[Tuple[int, str]], complain: Callable[[int, str], None]) -> Dict[str, str]:
    """Return {key: record} of a users file."""
    users: Dict[str, str] = {}
    for number, line in lines:
        name, colon, record = line.rpartition(":")
        try:
            key = parse_address(name).key
            if not re.fullmatch(r"\$(scrypt\$\d+,\d+,\d+|pbkdf2\$\d+)\$[\w+/]+=*\$[\w+/]+=*", record, re.ASCII):
                raise ValueError("no password record")
            if key in users:
                raise ValueError("%s stands there twice" % key)
            users[key] = record
        except (Refused, ValueError) as error:
            complain(number, "ignored: %s" % error)
    return users


def account_key(name: str) -> str:
    """Return the key of an account's name, "" for what is no address."""
    try:
        return parse_address(name).key
    except Refused:
        return ""


def account_name(key: str) -> str:
    """Return an account's name as the users file has it, where # begins a comment."""
    name = str(parse_key(key))
    return '"%s"@%s' % tuple(name.split("@")) if name.startswith("#") else name


class Accounts:
    """The users file: who may log in, by full address."""

    def __init__(self, path: str, is_away: Callable[[], bool] = lambda: False) -> None:
        self.file = Reloaded(path, parse_users, is_away)
        threads = max(1, (os.cpu_count() or 2) // 2)    # so never all cores at once, nor 16 MiB for each thread there is
        self.hashing = Crew(threads, "minimail-password")
        self._turn = threading.Semaphore(threads)
        self._dummy = ""
        self._known: Dict[bytes, str] = {}          # passwords that fitted, as keyed hashes, so that polling is cheap
        self._secret = os.urandom(32)

    def names(self, fresh: bool = False) -> Dict[str, str]:
        users: Dict[str, str] = self.file.get(fresh)
        return users

    def recall(self, name: str, password: str) -> Optional[str]:
        """Return the key of the account if these fitted before and still do; takes next to no time."""
        key, proof = self._proof(name, password)
        record = self._known.get(proof)
        return key if record is not None and self.names().get(key) == record else None

    def _proof(self, name: str, password: str) -> Tuple[str, bytes]:
        key = account_key(name)
        text = ("%s\0%s" % (key, password)).encode("utf-8", "surrogateescape")
        return key, hmac.new(self._secret, text, "sha256").digest()

    def verify(self, name: str, password: str) -> Optional[str]:
        """Return the key of the account, None when name and password do not fit; an unknown name takes as long: some 50 ms."""
        key, proof = self._proof(name, password)
        record = self.names().get(key)
        with self._turn:
            try:
                self._dummy = self._dummy or hash_password("")
                if not check_password(password, record or self._dummy) or not record:
                    return None
            except ValueError as error:
                log.warning("account %s: %s", printable(key), error)
                return None
        if len(self._known) > 1000:
            self._known.clear()
        self._known[proof] = record
        return key

    def change(self, storage: Storage, edit: Callable[[Dict[str, str]], None]) -> None:
        """Let `edit` change {key: record} and write the file anew; lines it does not name stay as they are. OSError."""
        path = self.file.path
        os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
        while True:
            fd = os.open(path + ".lock", os.O_CREAT | os.O_RDWR | O_EXTRA, 0o600)
            lock_file(fd, wait=True)
            if is_same_file(fd, path + ".lock"):    # not one that its last holder has just removed
                break
            os.close(fd)
        try:
            before = dict(self.names(fresh=True))
            after = dict(before)
            edit(after)
            lines = []
            if os.path.exists(path):
                with open(path, encoding="utf-8", errors="surrogateescape") as file:
                    lines = file.read().splitlines()
            kept = []
            for line in lines:
                key = account_key(line.strip().rpartition(":")[0])
                if key not in before or line.lstrip().startswith("#"):
                    kept.append(line)
                elif key in after:
                    kept.append("%s:%s" % (account_name(key), after.pop(key)))
            kept += ["%s:%s" % (account_name(key), record) for key, record in after.items() if key not in before]
            text = "".join(line + "\n" for line in kept)
            storage.write(os.path.abspath(path), text.encode("utf-8", "surrogateescape"))
        finally:
            unlink_quietly(path + ".lock")
            os.close(fd)


ALIAS = expression(r'((?:"(?:[^"\\]|\\.)*"|[^":])+):(.*)')
ALIAS_TARGET = expression(r'(?:"(?:[^"\\]|\\.)*"|[^",]|")+')


def parse_aliases(lines: List[Tuple[int, str]], complain: Callable[[int, str], None], home: str = "") \
        -> Dict[str, List[Address]]:
    """Return {key: targets} of an aliases file, as in aliases(5); bare names belong to `home`, no programs and files."""
    aliases: Dict[str, List[Address]] = {}
    for number, line in lines:
        match = ALIAS.match(line)
        try:
            if not match:
                raise ValueError("expected address: target, target")
            name = at_home(parse_address(match.group(1).strip(), lenient=True), home)
        except (Refused, ValueError) as error:
            complain(number, "ignored: %s" % error)
            continue
        targets = aliases.setdefault(name.key, [])
        for text in map(str.strip, ALIAS_TARGET.findall(match.group(2))):
            try:
                if text.lstrip('"')[:1] in ("|", "/", ":"):
                    raise ValueError("programs and files are not possible")
                if text:
                    targets.append(at_home(parse_address(text.lstrip("\\"), lenient=True), home))
            except (Refused, ValueError) as error:
                complain(number, "target %s ignored: %s" % (printable(text, 70), error))
        if not targets:
            complain(number, "ignored: it has no target")
            del aliases[name.key]
    return aliases


def at_home(address: Address, home: str) -> Address:
    """Return an address with the domain `home` where it has none."""
    return address if address.domain else Address(address.local, home)


def machine_name() -> str:
    """Return this machine's name in lower case, as it may stand in a greeting; "localhost" where it has none of that kind."""
    try:
        return parse_hostname(socket.gethostname())
    except ValueError:
        return "localhost"


class Destinations(NamedTuple):
    """Where the mail of one recipient goes."""
    mailboxes: List[str]
    remote: List[Address]


UNKNOWN_USER = Reply(550, "5.1.1", "no such user here")
ALIAS_LOOP = Reply(550, "5.4.6", "the alias leads back to itself")
ROLES = ("root", "abuse", "mailer-daemon", "hostmaster")        # go where postmaster goes, unless they are somebody


class Expansion:
    """What one recipient becomes while aliases are looked up: each name once, so the work is that of the targets it reads."""

    def __init__(self) -> None:
        self.mailboxes: Dict[str, None] = {}
        self.remote: Dict[str, Address] = {}
        self.above: Dict[str, None] = {}            # the aliases on the way to where we are
        self.done: Set[str] = set()
        self.steps = 0

    def check(self) -> None:
        """Raise Refused when it becomes too much."""
        if self.steps > MAX_ALIAS_STEPS or len(self.above) > MAX_ALIAS_DEPTH \
                or len(self.mailboxes) + len(self.remote) > MAX_EXPANSION:
            raise Refused(550, "5.4.6", "the alias has too many targets")


class Remembered:
    """What aliases became, as long as the files they come from stay the same."""

    def __init__(self, aliases: Dict[str, List[Address]], users: Dict[str, str]) -> None:
        self.aliases = aliases
        self.users = users
        self.found: Dict[str, Union[Destinations, Reply]] = {}
        self.size = 0

    def keep(self, key: str, found: Union[Destinations, Reply]) -> None:
        self.size += 1 + (len(found.mailboxes) + len(found.remote) if isinstance(found, Destinations) else 0)
        if self.size <= MAX_REMEMBERED:
            self.found[key] = found


class AddressBook:
    """What an address stands for: local domains, accounts, aliases, catch-all. Knows who lives here, not who may send."""

    def __init__(self, domains: Sequence[str], accounts: Accounts, aliases_path: str, catch_all: str = "",
                 hostname: str = "localhost") -> None:
        self.domains = {ascii_domain(domain): domain for domain in domains}
        self.home = domains[0] if domains else hostname
        self.capture = not domains
        self.accounts = accounts
        self.aliases = Reloaded(aliases_path, functools.partial(parse_aliases, home=self.home), accounts.file.is_away)
        self.catch_all = catch_all
        self._looked = 0.0                          # when the files were last found unchanged
        self.own_names = {"localhost", "localhost.localdomain", ascii_domain(hostname), machine_name(),
                          *("localhost." + domain for domain in self.domains)}
        self._remembered = Remembered({}, {})
        self._recent: Callable[[Address], Destinations]     # keeps few of any kind: those that cost nothing may be many

    def is_stale(self) -> bool:
        """Return whether files have to be read before the next answer: better not on the loop."""
        now = time.monotonic()
        if self.capture or now - self._looked < Watched.PAUSE:
            return False
        if self.accounts.file.is_stale() or self.aliases.is_stale():
            return True
        self._looked = now
        return False

    def refresh(self) -> None:
        """Read what changed; OSError."""
        if not self.capture:
            self.accounts.file.get()
            self.aliases.get()

    def is_local(self, address: Address) -> bool:
        return self.capture or not address.domain or ascii_domain(lower(address.domain)) in self.domains

    def qualified(self, address: Address) -> Address:
        """Return the address as those we serve mean it: bare names, localhost and this machine's name are the first domain's.

        In capture mode every name is its own, and only bare ones are given the node's.
        """
        if not address.domain:
            return Address(address.local, self.home)
        if self.is_local(address):
            return address
        literal = domain_literal(address.domain)
        own = is_this_host(literal) if literal else ascii_domain(lower(address.domain)) in self.own_names
        return Address(address.local, self.home) if own else address

    def key(self, address: Address) -> str:
        """Return the key of a local address, its domain spelled as in --domain; a bare name gets the first."""
        if not address.domain:
            return "%s@%s" % (lower(address.local), lower(self.home))
        if self.capture:
            return address.key
        domain = lower(address.domain)
        return "%s@%s" % (lower(address.local), self.domains.get(ascii_domain(domain), domain))

    def resolve(self, address: Address) -> Destinations:
        """Return the destinations of one recipient; Refused 550 when it is local and unknown, or an alias loops; OSError.

        What came of an alias is remembered, refusals too: a client may name the same list a thousand times.
        """
        if self.capture:
            return Destinations([self._captured(address)], [])
        if self.is_stale():
            self.refresh()
        aliases, users, memory = self.aliases.value, self.accounts.file.value, self._remembered
        if memory.aliases is not aliases or memory.users is not users or memory.size > MAX_REMEMBERED:
            memory = Remembered(aliases, users)
            self._recent = functools.lru_cache(maxsize=MAX_RECENT)(functools.partial(self._look_up, memory))
            self._remembered = memory               # last: other threads look at this first
        return self._recent(address)

    def _look_up(self, memory: Remembered, address: Address) -> Destinations:
        """Do what resolve() does, with what is known of the files; Refused."""
        found = memory.found.get(address.key)
        if found is None:
            expansion = Expansion()
            try:
                self._expand(address, expansion, memory)
                expansion.check()
                if not expansion.mailboxes and not expansion.remote:
                    raise Refused(UNKNOWN_USER)
                found = Destinations(list(expansion.mailboxes), list(expansion.remote.values()))
            except Refused as refused:
                found = refused.reply
            if expansion.steps > 1:                 # what costs nothing to find out is not kept
                memory.keep(address.key, found)
        if isinstance(found, Reply):
            raise Refused(found)
        return found

    def _expand(self, address: Address, found: Expansion, files: Remembered) -> None:
        """Add to `found` what an address becomes; Refused."""
        found.steps += 1
        found.check()
        if not self.is_local(address):
            found.remote.setdefault(address.key, address)
        else:
            self._expand_local(self.key(address), found, files)

    def _captured(self, address: Address) -> str:
        """Return the mailbox of an address in capture mode; Refused when its name is too long for a file."""
        key = self.key(address)
        for part in key.rpartition("@")[::2]:
            encode_name(part)
        return key

    def _expand_local(self, key: str, found: Expansion, files: Remembered) -> None:
        local, _, domain = key.rpartition("@")
        candidates = [key] + ([local.partition("+")[0] + "@" + domain] if "+" in local[1:] else [])
        for name in candidates:
            if name in files.aliases and name not in found.above:
                return self._expand_alias(name, found, files)
            if name in files.users or name == self.catch_all:
                found.mailboxes[name] = None
                return
            if name in found.above:
                raise Refused(ALIAS_LOOP)
        if self.catch_all:
            found.mailboxes[self.catch_all] = None
        elif local == "postmaster" and (domain == self.home or found.above):
            found.mailboxes[key] = None
        elif local in ROLES or local == "postmaster":
            self._expand_local("postmaster@" + (domain if local in ROLES else self.home), found, files)
        elif found.above:
            log.warning("alias %s: target %s is no mailbox here", next(reversed(list(found.above))), printable(key))
        else:
            raise Refused(UNKNOWN_USER)

    def _expand_alias(self, name: str, found: Expansion, files: Remembered) -> None:
        if name in found.done:                      # a list inside several others
            return
        found.above[name] = None
        for target in files.aliases[name]:
            self._expand(self.qualified(target), found, files)
        del found.above[name]
        found.done.add(name)

    def owns(self, account: str, sender: Address) -> bool:
        """Return whether an account may send as `sender`: its own address, a sub-address, or an alias that leads to it."""
        if not self.is_local(sender):
            return False
        if self.key(sender) == account:
            return True
        try:
            return account in self.resolve(sender).mailboxes and account != self.catch_all
        except Refused:
            return False


# ======================================================================================================================
# 7  Delivery.  Whether a message may go and where; then to all its recipients, or to none: mailboxes here, the queue for
#    elsewhere if there is one. Knows no protocol and no socket.
# ======================================================================================================================

class Policy:
    """A hook for your own rules: override what you need. Each returns nothing, or raises Refused(code, enhanced, text).

    Any other exception refuses with 451 and is logged. Called in threads, possibly several at once.
    """

    def on_connect(self, client: str) -> None:
        """`client` is the IP address."""

    def on_mail(self, client: str, sender: str, user: Optional[str]) -> None:
        """`sender` is the reverse-path, "" for the null one; `user` who logged in."""

    def on_rcpt(self, envelope: Envelope, recipient: str) -> None:
        """`envelope` has the sender and the recipients accepted before this one."""

    def on_message(self, envelope: Envelope, path: str) -> None:
        """The whole message, trace headers first, is in the file `path`, and nowhere else yet."""


class Parcel:
    """A message on its way to disk: the draft, its envelope, where it goes, and what of that has been done."""

    __slots__ = ("draft", "envelope", "mailboxes", "remote", "own", "entry", "placed", "made", "wishes", "done", "forward")

    def __init__(self, draft: Draft, envelope: Envelope, mailboxes: List[str], remote: List[Address], own: int,
                 made: List[str]) -> None:
        self.draft, self.envelope, self.mailboxes, self.remote = draft, envelope, mailboxes, remote
        self.own = own                              # bytes at the file's start that are not for other hosts
        self.entry: Any = None                      # in the queue, not published yet
        self.placed: List[str] = []                 # paths in mailboxes
        self.made = made                            # directories that have new ones in them, to be flushed
        self.wishes: Dict[str, Wish] = {}           # of remote recipients, by key
        self.done: List[Tuple[Address, str, Wish]] = []     # who is served with this, how, and its sender wants to know
        self.forward = False                        # an alias leads elsewhere with it


class Post:
    """Takes messages over: what commit() returned for is on disk, whatever happens next."""

    def __init__(self, mailboxes: Mailboxes, hostname: str, max_size: int, queue: Any = None,
                 clock: Callable[[], float] = time.time) -> None:
        self.mailboxes = mailboxes
        self.storage = mailboxes.storage
        self.hostname = hostname
        self.max_size = max_size
        self.queue = queue                          # section 9; None in capture mode: nothing leaves the machine
        self.clock = clock

    def begin(self, envelope: Envelope, destinations: Sequence[Destinations]) -> Parcel:
        """Return a parcel to write content into; duplicates among its destinations are removed."""
        boxes: Dict[str, None] = {}
        remote: Dict[str, Address] = {}
        for destination in destinations:
            boxes.update(dict.fromkeys(destination.mailboxes))
            if destination.remote:
                remote.update((address.key, address) for address in destination.remote)
        now = self.clock()
        envelope.id = id = self.storage.new_id(now)
        mailboxes, made = list(boxes), []           # type: List[str], List[str]
        header, own = trace_headers(envelope, mailboxes, self.hostname, now)

        def open_file() -> Tuple[int, str]:
            if mailboxes:
                return self.mailboxes.open_draft(mailboxes[0], id, made)
            fd_and_path: Tuple[int, str] = self.queue.open_draft(id)
            return fd_and_path
        draft = Draft(id, header, self.max_size, open_file, BLOCK if self.queue else 0)
        parcel = Parcel(draft, envelope, mailboxes, list(remote.values()), own, made)
        if self.queue and (remote or envelope.wishes):
            self._note_wishes(parcel, destinations)
        return parcel

    @staticmethod
    def _note_wishes(parcel: Parcel, destinations: Sequence[Destinations]) -> None:
        """Note what its sender wants to be told of each recipient, and what of that happens here (RFC 3461 section 5.2.7)."""
        for address, found in zip(parcel.envelope.recipients, destinations):
            parcel.forward = parcel.forward or any(target.key != address.key for target in found.remote)
            wish = parcel.envelope.wishes.get(address.key)
            if wish is None or not parcel.envelope.sender:
                continue
            several = len(found.remote) + len(found.mailboxes) > 1
            if (several or not found.remote) and wish.wants("SUCCESS"):
                parcel.done.append((address, "expanded" if several else "delivered", wish))
            for target in found.remote:
                parcel.wishes.setdefault(target.key, wish.without_success() if several else wish)

    @staticmethod
    def is_heavy(parcel: Parcel) -> bool:
        """Return whether its commit takes long enough for others not to wait for it."""
        return parcel.draft.size > HEAVY_MESSAGE or len(parcel.mailboxes) > HEAVY_DELIVERY

    def commit_all(self, parcels: Sequence[Parcel]) -> List[Optional[Exception]]:
        """Commit several messages together, in two steps that share the disk's flushes: all is written, then put in place.

        Returns for each its refusal, and then nothing of it is left, or None.
        """
        results: List[Optional[Exception]] = [None] * len(parcels)
        for step in self._write, self._place:
            wanted: Dict[int, List[Union[int, str]]] = {}       # what has to be on disk for which of them
            for index, parcel in enumerate(parcels):
                if results[index] is None:
                    try:
                        wanted[index] = step(parcel)
                    except Exception as error:
                        results[index] = self._undo(parcel, error)
            failed = self.storage.flush(itertools.chain(*wanted.values()))
            for index, things in wanted.items() if failed else ():
                errors = [failed[thing] for thing in things if thing in failed]
                if errors:
                    results[index] = self._undo(parcels[index], errors[0])
        for parcel, refused in zip(parcels, results):
            if refused is None:
                parcel.draft.close()
                if parcel.entry:
                    self.queue.submit(parcel.entry)
        if any(parcel.mailboxes and not refused for parcel, refused in zip(parcels, results)):
            self.storage.wake("mail")
        return results

    def _write(self, parcel: Parcel) -> List[Union[int, str]]:
        """Write a message and its queue entry; return the files to flush. Refused, OSError."""
        draft = parcel.draft
        if draft.too_large:
            raise Refused(552, "5.3.4", "message larger than %d bytes" % self.max_size)
        if draft.head and draft.head.lower().count(b"received:") > MAX_RECEIVED and \
                sum(name == "received" for name, _ in split_headers(draft.head)[0]) > MAX_RECEIVED:
            raise Refused(554, "5.4.6", "mail loop: more than %d Received headers" % MAX_RECEIVED)
        files: List[Union[int, str]] = [draft.complete()]
        if parcel.remote or parcel.done:
            parcel.entry = self.queue.add(parcel)
            files.append(parcel.entry.draft)
        return files

    def _place(self, parcel: Parcel) -> List[Union[int, str]]:
        """Put what is on disk where it belongs; return the directories to flush. OSError."""
        directories: List[Union[int, str]] = []
        if parcel.entry:
            directories += self.queue.publish(parcel.entry)
        if parcel.mailboxes:
            self.mailboxes.place(parcel.draft, parcel.mailboxes, parcel.placed, parcel.made)
        parcel.draft.path = ""
        return directories + parcel.made

    def _undo(self, parcel: Parcel, error: Exception) -> Refused:
        """Leave nothing of a message, and return its refusal."""
        for path in parcel.placed:
            unlink_quietly(path)
        if parcel.entry:
            self.queue.withdraw(parcel.entry)
        parcel.draft.discard()
        if isinstance(error, Refused):
            return error
        if isinstance(error, OSError):
            return self.disk_refusal(parcel, error)
        log.error("message %s not stored", parcel.draft.id, exc_info=error)
        return Refused(451, "4.3.0", "cannot store the message, try again later")

    def commit(self, parcel: Parcel) -> None:
        """Return when the message is on disk for every destination; Refused, and then for none of them."""
        refused = self.commit_all([parcel])[0]
        if refused:
            raise refused

    def disk_refusal(self, parcel: Parcel, error: OSError) -> Refused:
        """Return the refusal for an error of the disk (RFC 3463 sections 3.3 and 3.4)."""
        self.storage.report("message %s not stored: %s", parcel.draft.id, error)
        if error.errno == errno.ENOSPC:
            return Refused(452, "4.3.1", "disk full, try again later")
        if error.errno == getattr(errno, "EDQUOT", -1):
            return Refused(452, "4.2.2", "quota exceeded, try again later")
        return Refused(451, "4.3.0", "cannot store the message, try again later")


def may_go(config: Config, address: Address) -> bool:
    """Return whether --relay-to lets mail out to this address; there, `.example.org` is that domain and all below it."""
    domain = lower(address.domain)
    return not config.relay_to or any(
        covers(name, domain) or covers(name.lstrip("."), domain) for name in config.relay_to)


class Door:
    """The one door for mail: SMTP, `sendmail`, the API, bounces and forwards ask here whether it may go, and where.

    `trusted` is said of who may have mail passed on: who logged in, connects from --trust, or sits on this machine.
    """

    def __init__(self, config: Config, book: AddressBook, post: Post, policy: Optional[Policy] = None) -> None:
        self.config, self.book, self.post = config, book, post
        self.policy = policy or Policy()
        self.asks_policy = type(self.policy) is not Policy      # it may take as long as it likes: in a thread
        self.origin: Callable[[Address], Optional[Address]] = lambda address: None      # of what comes back to a forward

    def ask(self, hook: str, *arguments: Any) -> None:
        """Call a hook of the policy; Refused, also when it fails."""
        if not self.asks_policy:
            return
        try:
            getattr(self.policy, hook)(*arguments)
        except Refused:
            raise
        except Exception:
            log.exception("policy %s failed", hook)
            raise Refused(451, "4.3.0", "cannot decide now, try again later") from None

    def check_sender(self, sender: Optional[Address], user: Optional[str]) -> None:
        """Refused when `user`, if one logged in, may not send as `sender` (None: the null reverse-path)."""
        if sender and user is not None and not self.config.capture and not self.book.owns(user, sender):
            raise Refused(553, "5.7.1", "you may not send as this address")

    def destinations(self, envelope: Envelope, address: Address, trusted: bool) -> Destinations:
        """Return where mail for one more recipient goes; Refused when nobody lives there, or it is not ours to pass on."""
        if len(envelope.recipients) >= MAX_RECIPIENTS:
            raise Refused(452, "4.5.3", "more than %d recipients" % MAX_RECIPIENTS)
        if not trusted and not self.book.is_local(address):
            raise Refused(550, "5.7.1", "relaying denied: log in first")
        try:
            found = self.book.resolve(self.origin(address) or address)
        except OSError as error:
            log.warning("cannot tell who lives here: %s", error)
            raise Refused(451, "4.3.0", "cannot look up this address now, try again later") from None
        if found.remote:
            self._check_remote(found.remote)
        return found

    def _check_remote(self, remote: List[Address]) -> None:
        """Refused when something goes elsewhere that may not, or not now."""
        if not self.post.queue:
            raise Refused(550, "5.7.1", "this node passes no mail on")
        if self.post.queue.is_full():
            raise Refused(452, "4.3.1", "the queue is full, try again later")
        for address in remote:
            if not may_go(self.config, address):
                raise Refused(550, "5.7.1", "relaying to this domain is not allowed here")

    def recipient(self, envelope: Envelope, address: Address, trusted: bool) -> Destinations:
        """Enter a recipient into the envelope and return its destinations; Refused."""
        found = self.destinations(envelope, address, trusted)
        self.ask("on_rcpt", envelope, str(address))
        envelope.recipients.append(address)
        return found

    def send(self, envelope: Envelope, recipients: Iterable[Address], content: Union[bytes, Iterable[bytes]],
             user: Optional[str] = None) -> Parcel:
        """Take a whole message over, in blocks or one, from somebody trusted; return the parcel that is on disk; Refused."""
        envelope.trusted = True
        self.check_sender(parse_address(envelope.sender) if envelope.sender else None, user)
        self.ask("on_mail", envelope.client, envelope.sender, user)
        return self.post_all(envelope, [self.recipient(envelope, address, True) for address in recipients], content)

    def post_all(self, envelope: Envelope, destinations: List[Destinations], content: Union[bytes, Iterable[bytes]]) -> Parcel:
        """Take a whole message over for destinations that are settled, and return the parcel that is on disk; Refused."""
        parcel = self.post.begin(envelope, destinations)
        try:
            for block in [content] if isinstance(content, bytes) else content:
                parcel.draft.write(block)
                if parcel.draft.too_large:          # commit() refuses it: the rest need not be read
                    break
            self.finish(parcel)
        except BaseException:
            parcel.draft.discard()
            raise
        self.post.commit(parcel)
        return parcel

    def finish(self, parcel: Parcel) -> None:
        """Ask the policy about a message that is there as a whole; Refused, and then nothing of it is left."""
        parcel.envelope.eightbit = parcel.draft.eightbit
        if self.asks_policy and not parcel.draft.too_large:     # of that there is no file: commit() refuses it
            try:
                parcel.draft.complete()
                self.ask("on_message", parcel.envelope, parcel.draft.path)
            except OSError as error:
                parcel.draft.discard()
                raise self.post.disk_refusal(parcel, error) from error
            except BaseException:
                parcel.draft.discard()
                raise


class Stores(NamedTuple):
    """What the data directory holds, opened; node and commands use the same."""
    hostname: str
    storage: Storage
    mailboxes: Mailboxes
    accounts: Accounts
    book: AddressBook
    post: Post
    door: Door


def open_stores(config: Config, clock: Callable[[], float] = time.time, policy: Optional[Policy] = None) -> Stores:
    """Open the data directory, made where it is missing; OSError."""
    hostname = config.hostname or machine_name()
    refuse_shared(config.data)
    storage = Storage(config.data, not config.no_sync)
    storage.open()
    mailboxes = Mailboxes(storage, hostname)
    accounts = Accounts(config.file("users"), storage.is_away)
    book = AddressBook(config.domain, accounts, config.file("aliases"), config.catch_all, hostname)
    queue = None
    if config.release or not config.capture:        # in capture mode only what is released by hand gets into it
        queue = next(filter(None, (section.queue(storage, config, clock) for section in EXTENSIONS)), None)
    post = Post(mailboxes, hostname, config.max_size, queue, clock)
    return Stores(hostname, storage, mailboxes, accounts, book, post, Door(config, book, post, policy))


def await_mail(storage: Storage, look: Callable[[], Any], until: float, sleep: Callable[[float], Any] = time.sleep) -> Any:
    """Return the first true value that look() gives, tried again whenever mail came in; None after `until` (monotonic).

    `sleep(seconds)` may end early: the library's does when its own node takes mail, or stops, and then it returns False.
    """
    while True:
        stamp, looked = storage.stamp("mail"), time.monotonic()
        found = look()
        if found or looked >= until:
            return found or None
        while storage.stamp("mail") == stamp and time.monotonic() < looked + 2.0:   # a stamp may be coarse, or be missed
            left = until - time.monotonic()
            if left <= 0:
                return None
            woken = sleep(min(left, storage.LOOK))
            if woken is False:
                return None
            if woken:
                break


# What commands need before they look into the stores.

EX_TEMPFAIL = 75                                    # sysexits(3): the caller may try again


def refuse_unused(data: str) -> None:
    """Raise CannotRun where no node was ever at work in the directory: nobody would read the mail."""
    if not any(os.path.lexists(os.path.join(data, name)) for name in ("options.json", "mail", "queue", "run")):
        error = CannotRun("sendmail: %s: no node was ever here, nobody would read the mail; start one there, or name its "
                          "directory with --data or MINIMAIL_DATA" % data)
        error.status = EX_TEMPFAIL
        raise error


def mailbox_named(command: str, text: str, config: Config) -> str:
    """Return the mailbox that a word of the command line means; UsageError."""
    try:
        address = parse_address(text, lenient=True)
    except Refused as refused:
        raise UsageError("%s %s: %s" % (command, printable(text, 100), refused.reply.text)) from None
    return at_home(address, config.domain[0] if config.domain else config.hostname or machine_name()).key


# ======================================================================================================================
# 8  DNS.  Encoding, decoding and what an answer means are pure; a resolver that caches, over one function that sends a
#    query and waits; a fixture name server for tests. Knows nothing of mail but the records.
#
#    resolver = Resolver()                            # asks whom /etc/resolv.conf names, as its options say
#    resolver.mx(domain)                              # [(preference, host, ttl)], host "" in a null MX
#    resolver.addresses(host)                         # [(address, ttl)], /etc/hosts included
#    resolver.lookup(name, TXT)                       # [text], the strings of each record joined; also A, AAAA, PTR ...
#    resolver.query(name, type)                       # [Record], where the TTLs matter
#
#    All block for seconds, so a worker's thread calls them; any number may. None found is []; NoSuchDomain is for good,
#    DNSFailure for now. The name of an address for PTR is ipaddress.ip_address(text).reverse_pointer.
# ======================================================================================================================

A, NS, CNAME, SOA, PTR, MX, TXT, AAAA, OPT = 1, 2, 5, 6, 12, 15, 16, 28, 41
TYPES = {"A": A, "NS": NS, "CNAME": CNAME, "SOA": SOA, "PTR": PTR, "MX": MX, "TXT": TXT, "AAAA": AAAA}
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED, BADVERS = 0, 1, 2, 3, 4, 5, 16
NO_EDNS = (FORMERR, SERVFAIL, NOTIMP, REFUSED, BADVERS)     # what servers say to a question with EDNS they do not like


class DNSError(Exception):
    """A name cannot be looked up."""


class NoSuchDomain(DNSError):
    """The domain does not exist (NXDOMAIN): permanent."""


class DNSFailure(DNSError):
    """No server gave a usable answer: temporary."""


class Record(NamedTuple):
    """A resource record; `data` is an address, a name, a text, (preference, name) of an MX, or a SOA's negative TTL."""
    name: str
    type: int
    ttl: int
    data: Any


class Answer(NamedTuple):
    """A decoded response (RFC 1035 section 4.1)."""
    id: int
    rcode: int
    truncated: bool
    question: Tuple[str, int]                       # ("", 0) in an error without one
    records: List[Record]
    negative_ttl: int = FAILURE_TTL                 # for how long to remember that there is nothing (RFC 2308)
    backed: bool = False                            # somebody stands for it when there is nothing in it


def encode_domain(name: str) -> bytes:
    """Return a name as labels; ValueError when it is none."""
    name = name.rstrip(".")
    labels = [re.sub(rb"\\(\d{3})", lambda match: bytes([int(match.group(1)) & 255]), label.encode("ascii"))
              for label in name.split(".")] if name else []
    encoded = b"".join(bytes([len(label)]) + label for label in labels)
    if any(not 0 < len(label) < 64 for label in labels) or len(encoded) > 254:
        raise ValueError("not a domain name: " + printable(name, 100))
    return encoded + b"\0"


def encode_query(id: int, name: str, type: int, edns: bool = True) -> bytes:
    """Return a query packet, recursion desired, with EDNS0 (RFC 6891) if wanted; ValueError for what is no name."""
    packet = struct.pack(">6H", id, 0x0100, 1, 0, 0, int(edns)) + encode_domain(name) + struct.pack(">2H", type, 1)
    return packet + (struct.pack(">BHHIH", 0, OPT, UDP_SIZE, 0, 0) if edns else b"")


def decode_domain(packet: bytes, offset: int) -> Tuple[str, int]:
    """Return (name in lower case, offset behind it). Pointers lead backwards only, so this ends. ValueError."""
    labels: List[str] = []
    behind, total, limit, jumps = -1, 0, offset, 0
    while True:
        if offset >= len(packet):
            raise ValueError("name runs over the end")
        size = packet[offset]
        if size >= 0xC0:
            if offset + 1 >= len(packet):
                raise ValueError("pointer runs over the end")
            behind = offset + 2 if behind < 0 else behind
            offset = (size & 0x3F) << 8 | packet[offset + 1]
            jumps += 1
            if offset >= limit or jumps > 127:
                raise ValueError("pointer does not lead backwards, or there are too many")
            limit = offset
            continue
        if size >= 0x40 or offset + 1 + size > len(packet):
            raise ValueError("bad label")
        offset += 1
        if size == 0:
            return ".".join(labels), behind if behind >= 0 else offset
        total += size + 1
        if total > 255:
            raise ValueError("name too long")
        # a label may hold any byte: written so that a dot in it is no separator, and nothing reaches a log raw
        labels.append("".join(chr(b).lower() if 0x21 <= b <= 0x7E and b not in b".\\" else "\\%03d" % b
                              for b in packet[offset:offset + size]))
        offset += size


def decode_question(packet: bytes) -> Tuple[Tuple[str, int], int]:
    """Return ((name, type), offset behind it) of a packet with one question of the Internet; ValueError."""
    name, offset = decode_domain(packet, 12)
    if offset + 4 > len(packet):
        raise ValueError("question runs over the end")
    type, klass = struct.unpack_from(">HH", packet, offset)
    if klass != 1:
        raise ValueError("not a question of the Internet")
    return (name, type), offset + 4


def decode_record(packet: bytes, offset: int) -> Tuple[Record, int]:
    """Return (record, offset behind it), the type -1 when it is none of the Internet's; ValueError."""
    name, offset = decode_domain(packet, offset)
    if offset + 10 > len(packet):
        raise ValueError("record runs over the end")
    type, klass, ttl, size = struct.unpack_from(">HHIH", packet, offset)
    end = offset + 10 + size
    if end > len(packet):
        raise ValueError("record data runs over the end")
    if type == OPT:                                 # its class is a size, its TTL begins with the upper bits of the rcode
        return Record(name, OPT, 0, ttl >> 24), end
    if klass != 1:
        return Record(name, -1, 0, None), end
    ttl = ttl if ttl < 1 << 31 else 0               # RFC 2181 section 8
    return Record(name, type, ttl, decode_data(packet, type, offset + 10, end, ttl)), end


def decode_data(packet: bytes, type: int, offset: int, end: int, ttl: int) -> Any:
    """Return the data of a record, as Record says, None of types that nobody here asks for; ValueError."""
    data: Any = None
    behind = end
    if type in (A, AAAA):
        if end - offset != (4 if type == A else 16):
            raise ValueError("bad address size")
        data = socket.inet_ntop(socket.AF_INET if type == A else socket.AF_INET6, packet[offset:end])
    elif type in (CNAME, PTR):
        data, behind = decode_domain(packet, offset)
    elif type == MX:
        host, behind = decode_domain(packet, offset + 2)
        data = (packet[offset] << 8 | packet[offset + 1], host)
    elif type == TXT:
        data = decode_strings(packet[offset:end])
    elif type == SOA:
        _, behind = decode_domain(packet, offset)
        _, behind = decode_domain(packet, behind)
        behind += 20
        if behind == end:
            data = min(ttl, *struct.unpack_from(">I", packet, end - 4))     # RFC 2308 section 5
    if behind != end:
        raise ValueError("bad record data")
    return data


def decode_strings(data: bytes) -> str:
    """Return the character strings of a TXT record as one text (RFC 7208 section 3.3); ValueError."""
    strings, offset = [], 0
    while offset < len(data):
        end = offset + 1 + data[offset]
        if end > len(data):
            raise ValueError("string runs over the end")
        strings.append(data[offset + 1:end])
        offset = end
    return b"".join(strings).decode("utf-8", "replace")


def decode_answer(packet: bytes) -> Answer:
    """Return a response decoded; ValueError for whatever is not one."""
    if len(packet) < 12:
        raise ValueError("too short")
    id, flags, questions, answers, authorities, more = struct.unpack_from(">6H", packet)
    rcode, truncated = flags & 15, bool(flags & 0x0200)
    if not flags & 0x8000 or flags & 0x7800:
        raise ValueError("not a response to a query")
    if len(packet) == 12 and rcode in NO_EDNS:
        return Answer(id, rcode, truncated, ("", 0), [])        # some send a bare header
    if questions != 1 or answers + authorities > MAX_RECORDS:
        raise ValueError("not one question, or too many records")
    question, offset = decode_question(packet)
    records: List[Record] = []                      # of the answer section
    others: List[Record] = []                       # of the authority section
    index = 0
    try:
        for index in range(min(answers + authorities + more, MAX_RECORDS)):
            record, offset = decode_record(packet, offset)
            if record.type == OPT:                  # in whatever section it stands
                rcode = rcode & 15 | record.data << 4
            elif index < answers + authorities:
                (records if index < answers else others).append(record)
    except ValueError:
        if index < answers + authorities and not truncated:     # else it will be asked again anyhow
            raise
    soa = [record.data for record in others if record.type == SOA]
    authoritative, recursive = bool(flags & 0x0400), bool(flags & 0x0080)
    referral = any(record.type == NS for record in others)      # unless there is a SOA beside it (RFC 2308 section 2.2)
    backed = bool(soa) or authoritative or (recursive and not referral)
    return Answer(id, rcode, truncated, question, records, min(soa[0], NEGATIVE_CAP) if soa else FAILURE_TTL, backed)


def answer_to(query: bytes, packet: bytes) -> Optional[Answer]:
    """Return the answer in a packet, None when it is not one to this query (RFC 5452 section 9.1)."""
    try:
        answer = decode_answer(packet)
    except ValueError:
        return None
    asked, _ = decode_question(query)
    return answer if packet[:2] == query[:2] and answer.question in (asked, ("", 0)) else None


def conclude(answer: Answer, name: str, type: int) -> Optional[Tuple[Union[List[Record], NoSuchDomain], int]]:
    """Return what an answer says about a question, and for how long; None when it says nothing.

    That is the records; a CNAME alone when its target has to be asked for; [] or NoSuchDomain. Records that are not on
    the way from the question count for nothing. An error says nothing, nor does a referral ("ask those": a server that
    does not recurse), nor an empty answer of a server that neither knows (AA, a SOA) nor has asked others (RA).
    """
    if answer.rcode not in (NOERROR, NXDOMAIN):
        return None
    chain: List[Record] = []
    for _ in range(MAX_CNAMES):
        found = [record for record in answer.records if record.name == name and record.type == type]
        if found:
            return found, min(record.ttl for record in chain + found)
        alias = [record for record in answer.records if record.name == name and record.type == CNAME]
        if not alias:
            break
        chain.append(alias[0])
        name = alias[0].data
    ttls = [record.ttl for record in chain]
    if answer.rcode == NXDOMAIN:                    # also of a CNAME's target (RFC 6604)
        return NoSuchDomain("no such domain: " + name), min(ttls + [answer.negative_ttl])
    if chain:
        return chain[-1:], min(ttls)
    return ([], answer.negative_ttl) if answer.backed else None


def exchange(server: Endpoint, query: bytes, tcp: bool, seconds: float) -> Answer:
    """Send a query to a name server and return its answer; OSError, ValueError.

    A new socket gives a random port, and only the address that was asked is heard; over UDP what does not fit is ignored
    until the time is up (RFC 5452), over TCP (RFC 7766) nobody else can have sent it.
    """
    deadline = time.monotonic() + seconds
    family, kind, _, _, place = socket.getaddrinfo(         # understands the zone in fe80::1%eth0; asks nobody
        *server, type=socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[0]
    with socket.socket(family, kind) as sock:
        sock.settimeout(seconds)
        sock.connect(place)
        sock.sendall(struct.pack(">H", len(query)) + query if tcp else query)
        if tcp:
            size = receive(sock, 2, deadline)
            answer = answer_to(query, receive(sock, size[0] << 8 | size[1], deadline))
            if answer is None:
                raise ValueError("wrong answer over TCP")
            return answer
        while True:
            sock.settimeout(time_left(deadline))
            answer = answer_to(query, sock.recv(65535))
            if answer:
                return answer


def time_left(deadline: float) -> float:
    """Return the seconds until a deadline of time.monotonic(); socket.timeout when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise socket.timeout("timed out")
    return left


def receive(sock: socket.socket, size: int, deadline: float) -> bytes:
    """Return `size` bytes of a TCP connection; OSError, ValueError when it ends before."""
    data = bytearray()
    while len(data) < size:
        sock.settimeout(time_left(deadline))
        block = sock.recv(size - len(data))
        if not block:
            raise ValueError("TCP answer ends early")
        data += block
    return bytes(data)


# What the system says: resolv.conf(5), hosts(5), nsswitch.conf(5).

@dataclasses.dataclass
class NameServer:
    """A server to ask, and how it did lately (times of the resolver's clock)."""
    endpoint: Endpoint
    down_until: float = 0.0                         # it does not answer: the others are asked first
    plain_until: float = 0.0                        # it cannot cope with EDNS


@dataclasses.dataclass
class NameServers:
    """Whom to ask, and how."""
    servers: List[NameServer]
    timeout: float = 4.0                            # seconds for an answer
    attempts: int = 2                               # rounds over all of them
    rotate: bool = False                            # begin with any of them
    tcp: bool = False                               # use-vc

    def in_turn(self, now: float) -> List[NameServer]:
        """Return the servers in the order in which to ask them."""
        first = secrets.randbelow(len(self.servers)) if self.rotate else 0
        return sorted(self.servers[first:] + self.servers[:first], key=lambda server: server.down_until > now)


def parse_resolv_conf(lines: List[Tuple[int, str]], complain: Callable[[int, str], None]) -> NameServers:
    """Return the name servers and options; edns0 is what we do anyhow, trust-ad is about DNSSEC, which nothing here uses."""
    endpoints: List[Endpoint] = []
    options: List[str] = []
    for number, line in lines:
        keyword, *words = line.split()
        if keyword == "options":
            options += words
        if keyword == "nameserver" and words:
            try:
                endpoints.append((parse_ip(words[0]), 53))
            except ValueError:
                complain(number, "not an IP address: " + printable(words[0], 60))
    found = NameServers([NameServer(endpoint) for endpoint in endpoints[:MAX_NAME_SERVERS] or [("127.0.0.1", 53)]],
                        rotate="rotate" in options, tcp="use-vc" in options)
    most = {"timeout": 30, "attempts": 5}           # as in glibc
    for option in options:
        word, _, value = option.partition(":")
        if word in most and re.fullmatch("[0-9]{1,5}", value):
            setattr(found, word, max(1, min(int(value), most[word])))
    return found


def parse_hosts(lines: List[Tuple[int, str]], complain: Callable[[int, str], None]) -> Dict[str, List[str]]:
    """Return {name: addresses} of hosts(5); IPv4 first, as in Resolver.addresses."""
    hosts: Dict[str, List[str]] = {}
    for _, line in lines:
        address = ""
        for word in line.partition("#")[0].split():
            try:
                address = parse_ip(word)            # the line's, or that of an indented one which was joined to it
            except ValueError:
                if address:
                    hosts.setdefault(word.lower().rstrip("."), []).append(address)
    return {name: sorted(addresses, key=lambda address: ":" in address) for name, addresses in hosts.items()}


def parse_nsswitch(lines: List[Tuple[int, str]], complain: Callable[[int, str], None]) -> List[str]:
    """Return the sources of host names that are known here, in the system's order: of "files" and "dns"."""
    for _, line in lines:
        database, _, sources = line.partition("#")[0].partition(":")
        if database.strip() == "hosts":
            return [source for source in sources.split() if source in ("files", "dns")]
    return ["files", "dns"]


class Lookup:
    """What is known about a question, or being asked: the first who needs it asks, the others wait for its answer."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.until = float("inf")
        self.value: Union[List[Record], DNSError] = DNSFailure("interrupted")
        self.weight = 0                             # bytes in memory, roughly; 0 until it is answered

    def settle(self, value: Union[List[Record], DNSError], until: float) -> None:
        self.value, self.until = value, until
        self.weight = 2000                          # this object and what holds it
        if isinstance(value, list):
            self.weight += sum(200 + len(record.name) + len(str(record.data)) for record in value)


class Resolver:
    """Asks recursive name servers, in turn and with timeouts, and remembers what they said."""

    def __init__(self, servers: Sequence[Endpoint] = (), timeout: float = 4.0, attempts: int = 2,
                 clock: Callable[[], float] = time.monotonic,
                 exchange: Callable[[Endpoint, bytes, bool, float], Answer] = exchange, etc: str = "/etc") -> None:
        self.clock = clock
        self.exchange = exchange
        self._given = NameServers([NameServer(server) for server in servers], timeout, attempts) if servers else None
        self._system = Reloaded(os.path.join(etc, "resolv.conf"), parse_resolv_conf)        # unless servers are given
        self._hosts = Reloaded(os.path.join(etc, "hosts"), parse_hosts)
        self._sources = Reloaded(os.path.join(etc, "nsswitch.conf"), parse_nsswitch)
        self._cache: "collections.OrderedDict[Tuple[str, int], Lookup]" = collections.OrderedDict()
        self._weight = 0                            # bytes, of all that is in the cache
        self._lock = threading.Lock()               # for the cache; never held while somebody is asked

    def query(self, name: str, type: int) -> List[Record]:
        """Return the records of a type, none when there are none, CNAMEs followed; NoSuchDomain, DNSFailure."""
        try:
            encode_domain(name)
        except ValueError as error:
            raise NoSuchDomain(str(error)) from None
        for _ in range(MAX_CNAMES):
            answer = self._cached((name.lower().rstrip("."), type))
            found = [record for record in answer if record.type == type]
            if found or not answer:
                return found
            name = answer[-1].data                  # a CNAME whose target the answer did not tell: ask on
        raise DNSFailure("too many CNAMEs at " + name)

    def lookup(self, name: str, type: int) -> List[Any]:
        """Return the data of the records of a type: addresses, names, texts; NoSuchDomain, DNSFailure."""
        return [record.data for record in self.query(name, type)]

    def mx(self, domain: str) -> List[Tuple[int, str, int]]:
        """Return (preference, host, ttl) of each MX; host "" in the null MX of RFC 7505. NoSuchDomain, DNSFailure."""
        return [record.data + (record.ttl,) for record in self.query(domain, MX)]

    def addresses(self, host: str) -> List[Tuple[str, int]]:
        """Return (address, ttl) of a host, IPv4 first: it is what works most often. NoSuchDomain, DNSFailure.

        The machine's own table counts before DNS or after it, as nsswitch.conf says. IPv4 in IPv6 comes as IPv4.
        """
        with contextlib.suppress(ValueError):
            return [(parse_ip(host), 0)]
        sources = self._file(self._sources, ["files", "dns"])
        known = self._file(self._hosts, {}).get(host.lower().rstrip("."), []) if "files" in sources else []
        if known and sources[0] == "files":
            return [(address, 0) for address in known]
        try:
            found = self._addresses_in_dns(host)
        except DNSError:
            if not known:
                raise
            found = []
        return found or [(address, 0) for address in known]

    @staticmethod
    def _file(file: Reloaded, otherwise: Any) -> Any:
        try:
            return file.get()
        except OSError:                             # said in the log; DNS works without it
            return otherwise

    def _addresses_in_dns(self, host: str) -> List[Tuple[str, int]]:
        found: List[Tuple[str, int]] = []
        failure = None
        for type in (A, AAAA):
            try:
                found += [(parse_ip(record.data), record.ttl) for record in self.query(host, type)]
            except DNSFailure as error:
                failure = error
            except NoSuchDomain:
                if not found:                       # RFC 4074 section 4.2: some servers say so when only AAAA is missing
                    raise
        if failure and not found:
            raise failure
        return found

    def _cached(self, key: Tuple[str, int]) -> List[Record]:
        """Return what is known, asking when nothing is; identical questions of several threads are asked once."""
        with self._lock:
            lookup = self._cache.get(key)
            ours = lookup is None or lookup.until <= self.clock()
            if lookup is None or ours:
                self._weight -= lookup.weight if lookup else 0
                lookup = self._cache[key] = Lookup()
                self._cache.move_to_end(key)
        if ours:
            self._answer(lookup, key)
        lookup.done.wait()
        if isinstance(lookup.value, DNSError):
            raise lookup.value.__class__(*lookup.value.args)
        return lookup.value

    def _answer(self, lookup: Lookup, key: Tuple[str, int]) -> None:
        """Ask, remember the answer, and wake those who wait for it."""
        value, ttl = lookup.value, 0                # in case of an exception that nobody thought of
        try:
            value, ttl = self._ask_all(*key)
        finally:
            with self._lock:
                lookup.settle(value, self.clock() + min(ttl, TTL_CAP))
                if self._cache.get(key) is lookup:  # not evicted meanwhile
                    self._weight += lookup.weight
                while self._weight > CACHE_BYTES:
                    self._weight -= self._cache.popitem(last=False)[1].weight
            lookup.done.set()

    def _ask_all(self, name: str, type: int) -> Tuple[Union[List[Record], DNSError], int]:
        """Return (records, NoSuchDomain or DNSFailure, seconds to remember it) from the first server that knows."""
        try:
            settings: NameServers = self._given or self._system.get()
        except OSError as error:
            return DNSFailure("cannot read %s: %s" % (self._system.path, reason_of(error))), FAILURE_TTL
        failure = "not asked"
        for _ in range(settings.attempts):
            for server in settings.in_turn(self.clock()):
                where = show_endpoint(server.endpoint)
                try:
                    answer = self._ask(server, name, type, settings)
                    server.down_until = 0.0
                except (OSError, ValueError) as error:
                    server.down_until = self.clock() + SERVER_PAUSE
                    failure = "%s: %s" % (where, reason_of(error))
                    continue
                said = conclude(answer, name, type)
                if said:
                    return said
                failure = "%s answered with error %d" % (where, answer.rcode) if answer.rcode else \
                    "%s gave an answer that says nothing, such as a referral" % where
        return DNSFailure(failure), FAILURE_TTL

    def _ask(self, server: NameServer, name: str, type: int, settings: NameServers) -> Answer:
        """Ask one server, and once more without EDNS unless it can cope with that (RFC 6891 section 7); OSError, ValueError.

        What the plain question brings counts. Half the time is enough to see that the other one brings nothing.
        """
        if self.clock() >= server.plain_until:
            with contextlib.suppress(OSError, ValueError):
                answer = self._question(server, name, type, True, settings.timeout / 2, settings.tcp)
                if conclude(answer, name, type):
                    return answer
        answer = self._question(server, name, type, False, settings.timeout, settings.tcp)
        if conclude(answer, name, type) and self.clock() >= server.plain_until:
            server.plain_until = self.clock() + EDNS_PAUSE
        return answer

    def _question(self, server: NameServer, name: str, type: int, edns: bool, seconds: float, tcp: bool) -> Answer:
        """Ask one question, over TCP if the answer was cut short; OSError, ValueError."""
        query = encode_query(secrets.randbelow(65536), name, type, edns)
        answer = self.exchange(server.endpoint, query, tcp, seconds)
        if answer.truncated and not tcp:
            answer = self.exchange(server.endpoint, query, True, seconds)
        if answer.truncated:
            raise ValueError("answer cut short, even over TCP")
        return answer


def encode_answer(query: bytes, records: Sequence[Record], rcode: int = NOERROR, truncated: bool = False) -> bytes:
    """Return the response to a query packet; ValueError for what is no query."""
    if len(query) < 12 or query[2] & 0x80:
        raise ValueError("not a query")
    _, end = decode_question(query)
    packet = query[:2] + struct.pack(">5H", 0x8180 | (0x0200 if truncated else 0) | rcode, 1, len(records), 0, 0)
    head = [packet + query[12:end]]
    for record in records:
        data = encode_data(record)
        head.append(encode_domain(record.name) + struct.pack(">HHIH", record.type, 1, record.ttl, len(data)) + data)
    return b"".join(head)


def encode_data(record: Record) -> bytes:
    if record.type in (A, AAAA):
        return socket.inet_pton(socket.AF_INET if record.type == A else socket.AF_INET6, record.data)
    if record.type == MX:
        return struct.pack(">H", record.data[0]) + encode_domain(record.data[1])
    if record.type == TXT:
        text = record.data.encode("utf-8")
        pieces = [text[start:start + 255] for start in range(0, len(text), 255)]
        return b"".join(bytes([len(piece)]) + piece for piece in pieces)
    return encode_domain(record.data)


class Zone:
    """A name server for tests: `Zone({"example.com": ["MX 10 mx.example.com"], "mx.example.com": ["A 127.0.0.1"]})`.

    Items are A, AAAA, MX (`MX 0 .` is the null MX), CNAME, TXT, PTR, or how to answer: SERVFAIL, REFUSED, TRUNCATED (whole
    only over TCP), SILENT, `SLOW seconds`. A name that is not there is NXDOMAIN. It answers in process: resolver() asks
    it and nobody else. `queries` is what it was asked.
    """

    TTL = 60

    def __init__(self, names: Dict[str, Union[str, Sequence[str]]]) -> None:
        self.names = {name.lower(): [items] if isinstance(items, str) else list(items) for name, items in names.items()}
        self.queries: List[Tuple[str, int]] = []

    def resolver(self) -> Resolver:
        """Return a resolver that knows what is in here; no file of the machine counts."""
        return Resolver([("127.0.0.1", 53)], exchange=self.exchange, etc="/nonexistent")

    def exchange(self, server: Endpoint, query: bytes, tcp: bool, seconds: float) -> Answer:
        """Stand for exchange(): what is SILENT has timed out at once, what is SLOW takes its time."""
        (name, _), _ = decode_question(query)
        for item in self.names.get(name, []):
            if item.startswith("SLOW"):
                wait = float(item.split()[1])
                time.sleep(min(wait, seconds))
                if wait > seconds:
                    raise socket.timeout("timed out")
        packet = self.reply(query, tcp)
        if packet is None:
            raise socket.timeout("timed out")
        return decode_answer(packet)

    def reply(self, query: bytes, tcp: bool) -> Optional[bytes]:
        """Return the packet to answer with, None to stay silent; ValueError for what is no query."""
        (name, type), _ = decode_question(query)
        self.queries.append((name, type))
        if "SILENT" in self.names.get(name, []):
            return None
        records, rcode = self.records(name, type)
        if "TRUNCATED" in self.names.get(name, []) and not tcp:
            return encode_answer(query, [], rcode, truncated=True)
        return encode_answer(query, records, rcode)

    def records(self, name: str, type: int) -> Tuple[List[Record], int]:
        """Return (records, rcode) for a question, CNAMEs followed."""
        found: List[Record] = []
        for _ in range(MAX_CNAMES):
            if name not in self.names:
                return found, NXDOMAIN
            items = self.names[name]
            if "SERVFAIL" in items or "REFUSED" in items:
                return [], SERVFAIL if "SERVFAIL" in items else REFUSED
            found += [Record(name, type, self.TTL, self._data(item)) for item in items
                      if TYPES.get(item.split()[0]) == type]
            alias = next((self._data(item) for item in items if item.startswith("CNAME ")), None)
            if alias is None or type == CNAME:
                break
            found.append(Record(name, CNAME, self.TTL, alias))
            name = alias
        return found, NOERROR

    @staticmethod
    def _data(item: str) -> Any:
        kind, _, data = item.strip().partition(" ")
        if kind == "MX":
            return int(data.split()[0]), data.split()[1].rstrip(".")
        return data.strip() if kind in ("A", "AAAA", "TXT") else data.strip().rstrip(".")


# ======================================================================================================================
# 9  Queue.  Messages that still have to go out, and when. Knows files and locks; nothing of DNS, SMTP or routes.
#
#    Two files in queue/ are the truth about a message: ID.msg, its content, and ID.env, its envelope, which is JSON and
#    replaced whole. Neither ever moves. Who holds the lock on ID.msg, from its first byte to its last, is the only one
#    to touch what belongs to ID; the lock ends with its process. A hint is an empty file that says where to look:
#
#    files under queue/            state                       a crash leaves it so, and then
#    ----------------------------  --------------------------  -------------------------------------------------------
#    ID.msg                        being accepted (no 250 yet)  sweep() removes it once its lock is gone
#    ID.msg ID.env                 waits in a process's memory  sweep() by who lives, or who starts: hint new/ID
#    ID.msg ID.env new/ID          due, for whoever comes      any process takes it up
#    ID.msg ID.env due/SECONDS/ID  waits until SECONDS         is due then
#    ID.msg ID.env busy/DEST/ID    due; DEST has enough to do,  looked at when DEST has less to do, or at the next start
#                                  or cannot be reached now
#      + lock on ID.msg            somebody works on it        free for others
#      + ID.env*.tmp               its envelope is (re)written  the old envelope counts; sweep() removes the other
#    ID.msg                        done, the envelope is gone  as in the first line
#    new/ID alone                  done, or never was          removed when somebody looks at it
#
#         DATA's 250               taken up                    2xx or 5xx for every recipient
#     --> [ new ] ---------------> [ locked ] ----------------------------------------------> (bounce, removed)
#            ^   \                   |     ^
#            |    `-> [ busy ] ------'     | SECONDS are over, or `queue flush`
#            |                       v     |
#            `------ flush -------- [ due ]'      4xx, lost, timed out: envelope replaced, then hinted at
#
#    So nothing that matters depends on two directories being on disk in the right order, and two processes that look
#    at the same hint cannot both send: one has the lock, the other finds what became of it.
# ======================================================================================================================

ENTRY_ID = expression(r"[0-9a-f]+-[0-9a-f]+-[0-9a-f]+", re.ASCII)


@dataclasses.dataclass
class Entry:
    """The envelope of a message in the queue: what stands in ID.env, and nothing else."""
    id: str
    sender: str
    size: int                                       # bytes of content
    offset: int                                     # of the content in ID.msg that goes to other hosts
    queued_at: float                                # as the clock showed it
    next_attempt: float
    recipients: List[Dict[str, Any]]                # address, state (waiting, delivered, failed), last_reply, and once
    attempts: int = 0                               # there was one: status, remote; as asked for: notify, orcpt (RFC 3461)
    eightbit: bool = False
    smtputf8: bool = False
    age: float = 0.0                                # seconds that passed since it was accepted until ...
    noted: List[Any] = dataclasses.field(default_factory=list)      # ... [boot, seconds since it, time of day]
    extra: Dict[str, Any] = dataclasses.field(default_factory=dict)     # ret, envid; what standing keeps of a message

    KINDS = (("id", str), ("sender", str), ("size", int), ("offset", int), ("queued_at", (int, float)),
             ("next_attempt", (int, float)), ("recipients", list), ("attempts", int), ("age", (int, float)),
             ("noted", list), ("extra", dict))

    def encode(self) -> bytes:
        return (json.dumps(vars(self), ensure_ascii=False) + "\n").encode("utf-8")

    @classmethod
    def decode(cls, text: bytes) -> "Entry":
        """Return the entry in an envelope file; ValueError, TypeError, KeyError, Refused when it is none."""
        entry = cls(**json.loads(text))
        for name, kind in cls.KINDS:
            if not isinstance(getattr(entry, name), kind):
                raise TypeError("%s is of the wrong type" % name)
        for recipient in entry.recipients:
            parse_address(recipient["address"])
            for name in ("state", "last_reply"):
                if not isinstance(recipient[name], str):
                    raise TypeError("%s is of the wrong type" % name)
        return entry

    def waiting(self) -> List[Dict[str, Any]]:
        return [recipient for recipient in self.recipients if recipient["state"] == "waiting"]


class Dispatch:
    """What goes on with an entry in this process; never on disk. One thread has it at a time, or holds `mutex`."""

    def __init__(self, entry: Entry, hint: str = "") -> None:
        self.entry = entry
        self.hint = hint                            # path of the hint it was found by
        self.draft = -1                             # fd of the envelope until it is published
        self.copy = -1                              # fd of ID.msg where that is a copy of the draft
        self.lock = -1                              # fd of ID.msg while claimed
        self.lost = False                           # another process has it, or it is done
        self.pending = 0                            # destinations that still have to try
        self.tried = False                          # one of them did, and it has to be tried again
        self.aside = ""                             # a destination that has not been tried
        self.message: Any = None                    # section 11's Outgoing, once made
        self.mutex = threading.Lock()               # destinations of one message may be served at the same time
        self.served = 0                             # of them, those that have it, ...
        self.saved = 0                              # ... as far as that is on disk
        self.saving = threading.Lock()              # held while it is written


class Queue:
    """DATA/queue. Entries are claimed by a lock on their message file, which ends with the process that holds it."""

    def __init__(self, storage: Storage, config: Config, clock: Callable[[], float] = time.time) -> None:
        self.storage = storage
        self.root = os.path.join(storage.root, "queue")
        self.new = os.path.join(self.root, "new")
        self.due = os.path.join(self.root, "due")
        self.busy = os.path.join(self.root, "busy")
        self.clock = clock
        self.steady = time.monotonic if clock is time.time else clock   # seconds that nobody sets back or forth, ...
        self.boot = boot_id()                       # ... since when
        self.submitted: Callable[[Dispatch], bool] = lambda dispatch: False     # the relay of this process
        self.horizon = 1.2 * max(config.retry) + 120    # seconds
        self._counted = (0.0, 0)                    # when its messages were counted, and how many there were

    def is_full(self) -> bool:
        """True when no more can be taken; counted every now and then, as that takes a while."""
        if self.clock() - self._counted[0] > 10:
            self._counted = self.clock(), len(list_directory(self.root)) // 2
        return self._counted[1] >= MAX_QUEUE

    def path(self, id: str, kind: str = "msg") -> str:
        """Return where the message (msg) or the envelope (env) of an entry is."""
        return os.path.join(self.root, id + "." + kind)

    # Coming in.

    def open_draft(self, id: str) -> Tuple[int, str]:
        """Make a locked message file that has no envelope yet and return (fd, path); OSError."""
        path = self.path(id)
        try:
            return self.storage.create(path), path
        except FileNotFoundError:
            self.storage.make_directory(self.root)
            return self.storage.create(path), path

    def add(self, parcel: Parcel) -> Dispatch:
        """Put a finished draft into the queue, and return it with its entry, not published yet; OSError."""
        draft, envelope = parcel.draft, parcel.envelope
        now = self.clock()
        entry = Entry(draft.id, envelope.sender, draft.written - parcel.own, parcel.own, now, now,
                      self._recipients(parcel), eightbit=draft.eightbit, noted=[self.boot, self.steady(), now],
                      extra=self._extra(parcel),
                      smtputf8=envelope.smtputf8 and not draft.head.partition(b"\r\n\r\n")[0].isascii())
        dispatch = Dispatch(entry)
        try:
            if draft.path != self.path(draft.id):
                dispatch.copy = self._take_over(draft, self.path(draft.id))
            dispatch.draft = self.storage.make(self.path(draft.id, "env.tmp"))
            write_all(dispatch.draft, entry.encode())
        except BaseException:
            self.withdraw(dispatch)
            raise
        return dispatch

    @staticmethod
    def _recipients(parcel: Parcel) -> List[Dict[str, Any]]:
        """Return the recipients of an entry: who waits, and who is served but whose sender has to be told."""
        waiting = [dict({"address": str(address), "state": "waiting", "last_reply": ""},
                        **parcel.wishes.get(address.key, Wish()).kept()) for address in parcel.remote]
        return waiting + [dict({"address": str(address), "state": "delivered", "last_reply": "", "action": action},
                               **wish.kept()) for address, action, wish in parcel.done]

    @staticmethod
    def _extra(parcel: Parcel) -> Dict[str, Any]:
        """Return what else is to be known of a message that goes out; only what is not as usual."""
        envelope = parcel.envelope
        extra = {"trusted": envelope.trusted, "forward": parcel.forward, "ret": envelope.ret, "envid": envelope.envid}
        return {name: value for name, value in extra.items() if value}

    def _take_over(self, draft: Draft, path: str) -> int:
        """Give the draft of a mailbox a name here, too, and return -1; the fd of a copy where there are no links. OSError."""
        self.storage.make_directory(self.root)
        if self.storage.linked(draft.path, path):   # one file: the draft's lock holds for both names
            return -1
        fd, _ = self.open_draft(draft.id)
        try:
            copy_all(draft.path, fd)
            self.storage.sync_file(fd)
        except BaseException:
            close_quietly(fd)
            raise
        return fd

    def publish(self, dispatch: Dispatch) -> List[Union[int, str]]:
        """Put the envelope in place, now that it and the message are on disk; return the directories to flush. OSError."""
        self.storage.rename(self.path(dispatch.entry.id, "env.tmp"), self.path(dispatch.entry.id, "env"))
        close_quietly(dispatch.draft)
        dispatch.draft = -1
        return [self.root]

    def withdraw(self, dispatch: Dispatch) -> None:
        """Take an entry out that did not come to count."""
        for kind in ("env", "env.tmp", "msg"):
            unlink_quietly(self.path(dispatch.entry.id, kind))
        self.release(dispatch)

    def submit(self, dispatch: Dispatch) -> None:
        """Let the entry be sent, here or by other processes."""
        self.release(dispatch)
        if not self.submitted(dispatch):
            try:
                self.place_hint(dispatch, self.new)
            except OSError as error:                # it counts all the same: the next start finds it
                log.warning("queue entry %s waits for the next start: %s", dispatch.entry.id, error)
            self.storage.wake("queue")

    def release(self, dispatch: Dispatch) -> None:
        """Close what is open of an entry, and so unlock it."""
        for fd in (dispatch.draft, dispatch.copy, dispatch.lock):
            if fd >= 0:
                close_quietly(fd)
        dispatch.draft = dispatch.copy = dispatch.lock = -1

    # Working on it.

    def read(self, id: str) -> Optional[Entry]:
        """Return an entry; None when it is not there any more, or no envelope that we understand. OSError."""
        try:
            with open(open_regular(self.path(id, "env")), "rb") as file:
                return Entry.decode(file.read())
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, Refused, RecursionError) as error:
            log.warning("queue entry %s cannot be read, left alone: %s", self.path(id, "env"), error)
            return None

    def exists(self, id: str) -> bool:
        return os.path.exists(self.path(id, "env"))

    def claim(self, dispatch: Dispatch) -> bool:
        """Lock an entry and read it anew; False when another process has it, or it is gone. OSError."""
        entry = dispatch.entry
        try:
            fd = os.open(self.path(entry.id), os.O_RDWR | O_EXTRA)
        except FileNotFoundError:
            self._drop_hint(dispatch)
            if self.exists(entry.id):
                log.error("queue entry %s has no message file: dropped", entry.id)
                unlink_quietly(self.path(entry.id, "env"))
            return False
        try:
            fresh = self.read(entry.id) if self.storage.lock(fd) else None
        except OSError:
            os.close(fd)
            raise
        if fresh is None:
            os.close(fd)
            return False
        dispatch.entry, dispatch.lock = fresh, fd
        return True

    def age(self, entry: Entry) -> float:
        """Return the seconds since an entry was accepted: what passed since it was noted, by a clock that nobody sets as
        long as the machine was not started anew; after that by the time of day, which may have been wrong then or now.
        """
        boot, steady, wall = entry.noted if len(entry.noted) == 3 else ("", 0.0, entry.queued_at)
        passed = self.steady() - steady if boot == self.boot else self.clock() - wall
        return entry.age + max(0.0, passed)

    def save(self, dispatch: Dispatch) -> None:
        """Replace the envelope of a claimed entry, durably; OSError."""
        entry = dispatch.entry
        with dispatch.mutex:                        # another destination's worker may be noting what came of it
            entry.age, entry.noted = self.age(entry), [self.boot, self.steady(), self.clock()]
            text = entry.encode()
        self.storage.write(self.path(entry.id, "env"), text)

    def postpone(self, dispatch: Dispatch, until: float) -> None:
        """Record a claimed entry as due at `until` and hint at it there; OSError."""
        dispatch.entry.next_attempt = until
        self.save(dispatch)
        self.place_hint(dispatch, self.due_directory(until))

    def due_directory(self, moment: float) -> str:
        step = max(1, int(moment - self.clock()) // 60)     # long waits share directories
        return os.path.join(self.due, "%012d" % (-int(-moment // step) * step))

    def place_hint(self, dispatch: Dispatch, directory: str) -> None:
        """Hint at an entry in this directory, and nowhere else; OSError. Not flushed: sweep() finds what has no hint."""
        hint = os.path.join(directory, dispatch.entry.id)
        if dispatch.hint == hint and os.path.exists(hint):
            return
        for _ in range(10):                         # whoever emptied the directory may be removing it
            try:
                if dispatch.hint:
                    self.storage.move(dispatch.hint, hint)
                else:
                    os.close(os.open(hint, os.O_CREAT | os.O_WRONLY | O_EXTRA, 0o600))
                break
            except FileNotFoundError:
                if dispatch.hint and not os.path.exists(dispatch.hint):
                    dispatch.hint = ""
                self.storage.make_directories([directory])
        dispatch.hint = hint

    def _drop_hint(self, dispatch: Dispatch) -> None:
        if dispatch.hint:
            unlink_quietly(dispatch.hint)
            dispatch.hint = ""

    def finish(self, dispatch: Dispatch) -> None:
        """Remove a claimed entry: all its recipients are served. OSError."""
        for path in (self.path(dispatch.entry.id, "env"), self.path(dispatch.entry.id)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._drop_hint(dispatch)
        self.release(dispatch)

    def discard(self, id: str) -> bool:
        """Remove an entry that cannot be read; False when somebody works on it. OSError."""
        for kind in "env", "msg":
            with contextlib.suppress(FileNotFoundError):
                self._remove_if_dead(id, "%s.%s" % (id, kind))
        return not self.exists(id)

    # Looking for it.

    def is_later(self, moment: float, now: float) -> bool:
        """Return whether something is due later. What is further off than anybody puts it is due: the clock was set back."""
        return now < moment < now + self.horizon

    def _moments(self) -> List[int]:
        return sorted(int(name) for name in list_directory(self.due) if re.fullmatch(r"\d{12}", name, re.ASCII))

    def due_directories(self, now: float) -> Iterator[str]:
        """Yield the directories whose hints are due, the longest waiting ones last; OSError. Empty old ones are removed."""
        yield self.new
        for moment in self._moments():
            if self.is_later(moment, now):
                continue
            directory = os.path.join(self.due, "%012d" % moment)
            try:
                os.rmdir(directory)
            except OSError:
                yield directory

    def next_due(self, now: float) -> Optional[float]:
        """Return when the next directory is due; OSError."""
        return min((float(moment) for moment in self._moments() if self.is_later(moment, now)), default=None)

    def busy_directories(self) -> List[str]:
        return [os.path.join(self.busy, name) for name in list_directory(self.busy)]

    def _hint_directories(self) -> List[str]:
        return [self.new] + [os.path.join(above, name) for above in (self.due, self.busy) for name in list_directory(above)]

    def hints(self) -> Iterator[str]:
        """Yield the path of every hint."""
        for directory in self._hint_directories():
            for name in list_directory(directory):
                if ENTRY_ID.fullmatch(name):
                    yield os.path.join(directory, name)

    def ids(self) -> List[str]:
        """Return the ids of all entries, oldest first."""
        ids = [name[:-4] for name in list_directory(self.root) if name.endswith(".env")]
        return sorted(filter(ENTRY_ID.fullmatch, ids))

    def entries(self) -> Iterator[Entry]:
        """Yield every entry that can be read."""
        for id in self.ids():
            try:
                entry = self.read(id)
            except OSError as error:
                log.warning("queue entry %s cannot be read: %s", id, error)
                continue
            if entry:
                yield entry

    def sweep(self, in_memory: Container[str] = (), age: float = 0.0, living: Container[str] = ()) -> None:
        """Remove what dead processes left half done, and hint at what nobody could find; OSError.

        Without an age, as at the start, what version 1.0 left is looked for, too. What a living process took less than
        `age` seconds ago is left to it: it is in its memory. Were it hinted at all the same, it would still be sent once,
        by whoever locks it first.
        """
        if not age:
            self._adopt()
        hinted = {name for directory in self._hint_directories() for name in list_directory(directory)}
        names = list_directory(self.root)
        envelopes = {name[:-4] for name in names if name.endswith(".env")}
        for name in names:
            if name.endswith("tmp") or (name.endswith(".msg") and name[:-4] not in envelopes):
                id = name.partition(".")[0]
                with contextlib.suppress(OSError):
                    if ENTRY_ID.fullmatch(id):
                        self._remove_if_dead(id, name)
        for id in envelopes - hinted:
            if ENTRY_ID.fullmatch(id) and id not in in_memory and (
                    int(id[:8], 16) <= self.clock() - age or token_of(id) not in living):
                self.place_hint(Dispatch(Entry(id, "", 0, 0, 0.0, 0.0, [])), self.new)

    def _remove_if_dead(self, id: str, name: str) -> None:
        """Remove a draft that nobody works on; OSError."""
        path = os.path.join(self.root, name)
        with self.storage.sweeping:
            try:
                fd = os.open(self.path(id), os.O_RDWR | O_EXTRA)
            except FileNotFoundError:
                os.unlink(path)
                return
            try:
                if self.storage.lock(fd) and not (name.endswith(".msg") and self.exists(id)):
                    os.unlink(path)
            finally:
                os.close(fd)

    def _adopt(self) -> None:
        """Turn what version 1.0 left, whose hints were the envelopes, into what we have; OSError."""
        names = set(list_directory(self.root))
        for hint in self.hints():
            id = os.path.basename(hint)
            if id + ".env" not in names and os.path.getsize(hint) and os.path.exists(self.path(id)) and not self.exists(id):
                self.storage.move(hint, self.path(id, "env"))
                self.storage.sync_directory(self.root)


def token_of(id: str) -> str:
    """Return the token of the process that took a message."""
    return id.split("-")[2][:8]


def boot_id() -> str:
    """Return what stays the same until the machine starts anew; where nobody knows that, until this process ends."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except (OSError, ValueError):
        return secrets.token_hex(16)


# ======================================================================================================================
# 10  Bounces and other reports.  Pure: what became of a message in, a message to its sender out (RFC 3464, RFC 6533).
# ======================================================================================================================

def original_recipient(orcpt: str, utf8: bool) -> str:
    """Return an ORCPT= as the Original-Recipient of a report, in ASCII unless `utf8`; what would break a line stays coded."""
    kind, _, text = orcpt.partition(";")
    plain = text
    with contextlib.suppress(ValueError):
        plain = utf8_xtext_decode(text) if kind.lower() == "utf-8" else xtext_decode(text)
    if plain.isprintable() and (utf8 or plain.isascii()):
        return "%s;%s" % (kind, plain)
    return "%s;%s" % (kind, utf8_xtext_encode(plain) if kind.lower() == "utf-8" else text)


class Action(NamedTuple):
    """What is to be told, as the field of RFC 3464 section 2.3.3 has it, and in words."""
    subject: str
    before: str                                     # ... the addresses
    after: str                                      # ... that the message was taken over
    digits: str                                     # with which its status may begin


ACTIONS = {
    "failed": Action("Undelivered mail returned to sender", "could not be delivered to:", " and is not tried again.", "54"),
    "delayed": Action("Delayed mail, still being tried", "could not be delivered yet to:",
                      " and is tried until {until}.\r\nYou need not send it again.", "4"),
    "delivered": Action("Successful mail delivery report", "was delivered to:", ".", "2"),
    "relayed": Action("Mail relay report", "was passed on to a server that will not report its delivery, for:", ".", "2"),
    "expanded": Action("Mail expansion report", "was sent on to all who stand behind:", ".", "2")}


class Report(NamedTuple):
    """All that a report says but its recipients."""
    hostname: str
    sender: str                                     # whom it goes to
    id: str                                         # of the message it is about
    queued_at: float
    now: float
    envid: str = ""                                 # ENVID= as written
    until: float = 0.0                              # when a delayed message is given up
    full: bool = False                              # the whole message is enclosed, not its header
    eightbit: bool = False                          # and it has bytes above 127


def report_message(report: Report, recipients: Sequence[Dict[str, Any]], headers: bytes) -> Tuple[bytes, bytes, bytes]:
    """Return a multipart/report in three pieces: what stands before the original message, that, and what stands behind.

    Each recipient has an address, and may have action (else failed), last_reply, remote, orcpt. `headers` are the
    message's, as they went out; with `full` the caller puts the whole message in their place. The report goes out with the
    null reverse-path, so that nobody answers it.
    """
    original = headers.rstrip(b"\r\n") + b"\r\n"
    told = "\n".join([report.id] + [recipient["address"] for recipient in recipients])    # other reports are of others
    boundary = "=_%s.%s" % (report.id, hashlib.sha256(original + told.encode("utf-8", "surrogateescape")).hexdigest()[:16])
    utf8 = not (report.sender.isascii() and all(recipient["address"].isascii() for recipient in recipients))
    clean = not utf8 and original.isascii() and not (report.full and report.eightbit)
    encoding = "Content-Transfer-Encoding: %s" % ("7bit" if clean else "8bit")
    taken, until = rfc5322_date(int(report.queued_at)), rfc5322_date(int(report.until))
    text = ["This is the mail server at %s." % report.hostname, ""]
    present = [name for name in ACTIONS if any(recipient.get("action", "failed") == name for recipient in recipients)]
    for name in present:
        text += ["Your message " + ACTIONS[name].before, ""]
        text += [words_for(recipient, utf8) for recipient in recipients if recipient.get("action", "failed") == name]
        text += ["", "It was taken over on %s as %s%s" % (taken, report.id, ACTIONS[name].after.format(until=until)), ""]
    status = ["Original-Envelope-Id: " + envelope_id(report.envid)] if report.envid else []
    status += ["Reporting-MTA: dns; " + report.hostname, "Arrival-Date: " + taken, ""]
    for recipient in recipients:
        status += status_fields(recipient, utf8, until) + [""]
    kind = ("global" if utf8 else "rfc822") if report.full else "global-headers" if utf8 else "rfc822-headers"
    parts = "\r\n".join([
        "From: Mail Delivery System <mailer-daemon@%s>" % report.hostname, "To: <%s>" % report.sender,
        "Subject: " + ACTIONS[present[0]].subject, "Date: " + rfc5322_date(int(report.now)),
        "Message-ID: <%s.%s@%s>" % (boundary[2:], "bounce" if present[0] == "failed" else present[0], report.hostname),
        "Auto-Submitted: auto-replied", "MIME-Version: 1.0",
        'Content-Type: multipart/report; report-type=delivery-status;\r\n\tboundary="%s"' % boundary, encoding, "",
        "--" + boundary, "Content-Type: text/plain; charset=%s" % ("utf-8" if utf8 else "us-ascii"), encoding, ""] + text + [
        "The message is attached." if report.full else "The headers of the message are attached.", "",
        "--" + boundary, "Content-Type: message/%sdelivery-status" % ("global-" if utf8 else ""), encoding, ""] + status + [
        "--" + boundary, "Content-Type: %s/%s" % ("text" if kind == "rfc822-headers" else "message", kind), encoding, "", ""])
    return parts.encode("utf-8"), original, ("\r\n--%s--\r\n" % boundary).encode()


def fold_reply(text: str, indent: str, utf8: bool) -> str:
    """Return a reply in lines of decent length; what is not ASCII is escaped where the report has to be ASCII."""
    text = text if utf8 else text.encode("ascii", "backslashreplace").decode()
    return ("\r\n" + indent).join(re.findall(r"\S.{0,75}(?=\s|$)|\S{76}|\S+", text)) or "no answer"


def envelope_id(envid: str) -> str:
    """Return an ENVID= decoded, unless that would break the line it stands in."""
    plain = xtext_decode(envid)
    return plain if plain.isascii() and plain.isprintable() else envid


def words_for(recipient: Dict[str, Any], utf8: bool) -> str:
    reply = recipient.get("last_reply", "")
    return "<%s>%s" % (recipient["address"], ":\r\n    " + fold_reply(reply, "    ", utf8) if reply else "")


def status_code(recipient: Dict[str, Any], digits: str = "54") -> str:
    """Return the enhanced code of the reply itself (RFC 3463): a text may hold much that looks like one, an address say."""
    known = str(recipient.get("status") or "")
    if not known:
        said = re.sub(r"^.*? said: ", "", recipient.get("last_reply", ""))
        match = re.match(r"[2-5]\d\d[ -]([245]\.\d{1,3}\.\d{1,3})\b", said, re.ASCII)
        known = match.group(1) if match else ""
    return known if re.fullmatch(r"[%s]\.\d{1,3}\.\d{1,3}" % digits, known, re.ASCII) else digits[0] + ".0.0"


def status_fields(recipient: Dict[str, Any], utf8: bool, until: str) -> List[str]:
    """Return the fields about one recipient (RFC 3464 section 2.3)."""
    action, reply = recipient.get("action", "failed"), recipient.get("last_reply", "")
    fields = ["Original-Recipient: " + original_recipient(recipient["orcpt"], utf8)] if recipient.get("orcpt") else []
    fields += ["Final-Recipient: %s; %s" % ("rfc822" if recipient["address"].isascii() else "utf-8", recipient["address"]),
               "Action: " + action, "Status: " + status_code(recipient, ACTIONS[action].digits)]
    if recipient.get("remote"):
        fields.append("Remote-MTA: dns; " + recipient["remote"])
    if reply or action == "failed":                 # X-: our own words, where no server said anything (section 2.3.6)
        kind = "smtp" if " said: " in reply else "X-Minimail"
        fields.append("Diagnostic-Code: %s; %s" % (kind, fold_reply(re.sub(r"^.*? said: ", "", reply), " ", utf8)))
    return fields + (["Will-Retry-Until: " + until] if action == "delayed" else [])


# ======================================================================================================================
# 11  SMTP client.  One connection to another server, on the same wire as our own server's. Knows no queue.
# ======================================================================================================================

REPLY_LINE = expression(rb"(\d\d\d)(?:([ -])(.*))?", re.DOTALL)
ENHANCED_CODE = expression(r"([245]\.\d{1,3}\.\d{1,3})(?: |$)", re.ASCII)


class PeerFailed(Refused):
    """The other server cannot be used now; `reply` says why."""


class Outgoing(NamedTuple):
    """A message as the client needs it: `head`, then an open file from where its content begins; and what it is like."""
    fd: int
    offset: int
    size: int                                       # bytes of both
    sender: str
    recipients: List[str]
    eightbit: bool
    smtputf8: bool
    head: bytes = b""                               # stands before what the file has
    asked: Dict[str, Dict[str, str]] = {}           # DSN (RFC 3461), as xtext: ret, envid under "", notify, orcpt by recipient


class Peer:
    """An SMTP connection to another server (RFC 5321 as client). Every step has `timeout` seconds.

    Its methods are coroutines on the wire; run_blocking() runs them where a thread may wait.
    """

    def __init__(self, sock: socket.socket, name: str, hostname: str, timeout: float, host: str = "",
                 server: Optional[Server] = None) -> None:
        self.wire = Wire(sock, timeout)
        self.name = name                            # for logs and bounces
        self.host = host                            # whose connection this is, as the MX record has it
        self.server = server                        # that an option names, if it is one
        self.hostname = hostname
        self.extensions: Dict[str, str] = {}
        self.secrets: List[str] = []                # what no text may show, should the peer say it
        self.messages = 0                           # sent over it
        self.mail_refused = False                   # the last MAIL was
        self.broken = False                         # it cannot be used any more
        self._budget = 0                            # bytes that the reply may still have

    # Replies.

    @contextlib.contextmanager
    def step(self, what: str, seconds: Optional[float] = None) -> Iterator[None]:
        """Turn whatever goes wrong on the wire into PeerFailed. `what` is shown: never what was sent."""
        self.wire.renew(0.0 if seconds is None else seconds - self.wire.timeout)
        try:
            yield
        except TimedOut:
            raise PeerFailed(451, "4.4.2", "%s: timeout in %s" % (self.name, what)) from None
        except Disconnected as error:
            reason = ": %s" % error if str(error) else ""
            text = "%s: connection lost in %s%s" % (self.name, what, printable(reason, 200))
            raise PeerFailed(451, "4.4.2", text) from None

    async def reply(self, what: str, seconds: Optional[float] = None) -> Reply:
        """Return the next reply; PeerFailed when there is none, or it is 421.

        As Postfix reads them: the last line has the code, noise is skipped, and a reply may be as long as it likes, of
        which only so much is kept.
        """
        texts: List[bytes] = []
        self._budget, code, more = MAX_REPLY, 0, True
        with self.step(what, seconds):
            while more:
                match = REPLY_LINE.fullmatch(await self._line())
                if match:
                    code, more = int(match.group(1)), match.group(2) == b"-"
                    if len(texts) < MAX_REPLY_LINES:
                        texts.append(match.group(3) or b"")
                    else:
                        texts[-2:] = b"...", match.group(3) or b""
        lines = list(map(self._shown, texts))
        if not 200 <= code <= 599:
            wrong = "not an SMTP reply: %d %s" % (code, lines[-1][:100])
            if what == "RCPT":
                return Reply(451, "4.5.0", wrong)
            raise PeerFailed(451, "4.5.0", "%s: %s" % (self.name, wrong))
        reply = with_enhanced_code(code, lines)
        if code == 421 and what != "RCPT":          # that may be about the one recipient: who means all closes
            raise PeerFailed(self.said(reply))
        return reply

    async def _line(self) -> bytes:
        """Return a line without its end, as much of it as is looked at; PeerFailed when a reply has no end at all."""
        line = b""
        while True:
            end = self.wire.input.find(b"\n")
            taken = len(self.wire.input) if end < 0 else end + 1
            line += self.wire.input[:min(taken, MAX_REPLY_LINE - len(line))]
            del self.wire.input[:taken]
            self._budget -= taken
            if end >= 0:
                return line.rstrip(b"\r\n")
            if self._budget < 0:
                raise PeerFailed(451, "4.5.0", self.name + ": a reply without end")
            self.wire.input += await self.wire.fill(BLOCK)

    def _shown(self, text: bytes) -> str:
        """Return a line of a reply as it may stand in logs and bounces."""
        shown = printable(text, MAX_REPLY_LINE)
        for secret in self.secrets:
            shown = shown.replace(secret, "***")
        return shown if len(shown) <= 500 else printable(shown, 500)

    def said(self, reply: Reply) -> Reply:
        """Return the reply with the name of who gave it, on one line."""
        default = "%d.0.0" % (reply.code // 100)
        return Reply(reply.code, reply.enhanced or default, "%s said: %d %s%s" % (
            self.name, reply.code, reply.enhanced + " " if reply.enhanced else "", reply.text.replace("\n", " / ")))

    def away(self, reply: Reply) -> PeerFailed:
        """Return the failure of a host that does not want to talk: that speaks for it alone, and for now."""
        said = self.said(reply)
        if reply.code // 100 == 4:
            return PeerFailed(said)
        return PeerFailed(450, "4" + reply.enhanced[1:] if reply.enhanced[:1] == "5" else "4.3.2", said.text)

    # Commands.

    async def command(self, text: str, what: str = "") -> Reply:
        """Return the reply to a command line; where that has secrets, `what` is how it is called. PeerFailed."""
        self.wire.send(text.encode("utf-8") + b"\r\n")
        return await self.reply(what or text.partition(" ")[0])

    async def greet(self) -> None:
        """Take the greeting and introduce ourselves; PeerFailed."""
        reply = await self.reply("greeting")
        if reply.code // 100 != 2:
            raise self.away(reply)
        await self.hello()

    async def hello(self) -> None:
        name = self.hostname if "." in self.hostname else address_literal(self.wire.sock.getsockname()[0])
        reply = await self.command("EHLO " + name)
        self.extensions = {}
        if reply.code // 100 == 2:
            for line in reply.text.split("\n")[1:]:
                self._learn(line)
            return
        reply = await self.command("HELO " + name)      # RFC 5321 section 3.2
        if reply.code // 100 != 2:
            raise self.away(reply)

    def _learn(self, line: str) -> None:
        """Note an extension; `AUTH=LOGIN PLAIN`, as old servers have it, says the same as AUTH, and may stand beside it."""
        keyword, _, value = line.strip().partition(" ")
        if keyword.upper().startswith("AUTH="):
            keyword, value = "AUTH", keyword[5:] + " " + value
        if keyword.upper() == "AUTH":
            value = self.extensions.get("AUTH", "") + " " + value
        self.extensions[keyword.upper()] = value

    async def start_tls(self, context: "ssl.SSLContext", hostname: str) -> None:
        """Switch to TLS and introduce ourselves again; PeerFailed."""
        reply = await self.command("STARTTLS")
        if reply.code != 220:
            raise self.away(reply)
        await self.handshake(context, hostname)
        await self.hello()

    async def handshake(self, context: "ssl.SSLContext", hostname: str) -> None:
        with self.step("TLS handshake"):            # in certificates a name has no dot at its end (RFC 6066 section 3)
            await self.wire.start_tls(context, server_side=False, server_hostname=hostname.rstrip("."))
        self.extensions = {}

    # Log-in (RFC 4954).

    async def log_in(self, server: Server) -> None:
        """Log in by the mechanism the URL names, else the best that both know; PeerFailed."""
        offered = self.extensions.get("AUTH", "").lower().split()
        self.secrets = sasl_secrets(server)
        mechanism = server.mechanism or next((name for name in BEST_FIRST if name in offered), "")
        if mechanism not in offered:
            raise PeerFailed(451, "4.7.0", "%s offers no log-in %s" % (
                self.name, "by " + mechanism if mechanism else "that we know"))
        try:
            reply = await self._authenticate(mechanism, server)
        except ValueError:                          # a Python without MD5
            raise PeerFailed(451, "4.7.0", "this Python has no " + mechanism) from None
        if reply.code != 235:
            words = str(reply).replace("\n", " / ")
            raise PeerFailed(451, "4.7.8", "%s did not let us log in: %s" % (self.name, words))

    async def _authenticate(self, mechanism: str, server: Server) -> Reply:
        """Return the last reply of the exchange: each 334 asks for the next response."""
        first, responses = sasl_responses(mechanism, server)
        reply = await self.command("AUTH %s%s" % (mechanism.upper(), " " + in_base64(first) if first else ""), "AUTH")
        for respond in responses:
            if reply.code != 334:
                break
            try:
                challenge = base64.b64decode(reply.text.encode("ascii", "replace"))
            except ValueError:
                challenge = b""
            reply = await self.command(in_base64(respond(challenge)), "AUTH")
        return reply

    # Messages.

    async def send(self, message: Outgoing, at_once: int = MAX_RECIPIENTS_AT_ONCE) -> Dict[str, Reply]:
        """Send a message in as few transactions as the peer takes; return {recipient: reply}.

        PeerFailed when the connection failed before anything was certain; later, `broken` says that it did.
        """
        replies: Dict[str, Reply] = {}
        left = self.acceptable(message, replies)
        self.messages += 1
        while left:
            batch, left = left[:at_once], left[at_once:]
            try:
                some, surplus = await self.transaction(message, batch)
            except PeerFailed as error:
                if not replies:
                    raise
                some, surplus = dict.fromkeys(batch, error.reply), []   # what was said before counts
            replies.update(some)
            left = surplus + left
            if self.broken and left:
                replies.update((recipient, replies.get(recipient) or Reply(
                    451, "4.4.2", self.name + ": connection lost before this recipient's turn")) for recipient in left)
                break
        return replies

    def acceptable(self, message: Outgoing, replies: Dict[str, Reply]) -> List[str]:
        """Return the recipients worth trying; the others get a reply of our own, and nothing is sent for them."""
        limit = self.extensions.get("SIZE", "").strip()
        refusal = None
        if re.fullmatch(r"\d{1,18}", limit, re.ASCII) and 0 < int(limit) < message.size:
            refusal = Reply(552, "5.3.4", "%s takes %s bytes at most, the message has %d" % (self.name, limit, message.size))
        elif message.eightbit and "8BITMIME" not in self.extensions:
            refusal = Reply(554, "5.6.3", "%s takes no 8-bit content (8BITMIME)" % self.name)
        elif "SMTPUTF8" not in self.extensions and (message.smtputf8 or not self.plain(message.sender).isascii()):
            refusal = Reply(550, "5.6.7", "%s takes no UTF-8 addresses or headers (SMTPUTF8)" % self.name)
        good = []
        for recipient in message.recipients:
            if refusal:
                replies[recipient] = refusal
            elif "SMTPUTF8" not in self.extensions and not self.plain(recipient).isascii():
                replies[recipient] = Reply(553, "5.6.7", "%s takes no UTF-8 addresses (SMTPUTF8)" % self.name)
            else:
                good.append(recipient)
        return good

    def plain(self, address: str) -> str:
        """Return an address with its domain as A-labels: all that can be done for a peer without SMTPUTF8."""
        local, at, domain = address.rpartition("@")
        try:
            return address if domain.startswith("[") or not at else local + "@" + ascii_domain(domain)
        except ValueError:
            return address                          # then only SMTPUTF8 will do

    async def transaction(self, message: Outgoing, recipients: List[str]) -> Tuple[Dict[str, Reply], List[str]]:
        """MAIL, RCPT, DATA for one message; return ({recipient: reply}, those for whom another one is worth it).

        PeerFailed when the connection failed before anything was certain.
        """
        answers: List[Reply] = []
        lost = None
        try:
            data = await self.envelope(self.commands(message, recipients), answers)
            final = await self.content(message, answers, data)
        except PeerFailed as error:
            self.broken, lost, final = True, error, error.reply
            self.wire.close()
        self.mail_refused = bool(answers) and answers[0].code // 100 != 2
        taken = not self.mail_refused and any(answer.code // 100 == 2 for answer in answers[1:])
        replies: Dict[str, Reply] = {}
        surplus = []
        for number, recipient in enumerate(recipients, 1):
            answer = answers[0] if self.mail_refused else answers[number] if number < len(answers) else final
            if answer.code // 100 == 2:
                answer = final
            elif taken and (answer.code in (452, 552) or answer.enhanced[1:] == ".5.3"):
                # RFC 5321 section 4.5.3.1.10, RFC 3463 section 3.6: the rest in another transaction.
                surplus.append(recipient)
                answer = answer._replace(code=452, enhanced="4" + answer.enhanced[1:])
            if answer.code == 530 and "STARTTLS" in self.extensions and not self.wire.tls:
                replies[recipient] = self.away(answer).reply    # RFC 3207 section 4: TLS, which failed, may work again
            else:
                replies[recipient] = answer if lost and answer is final else self.said(answer)
        if lost and not any(reply.code // 100 == 5 for reply in replies.values()):
            raise next((PeerFailed(self.said(answer)) for answer in answers[1:] if answer.code == 421), lost)
        return replies, surplus if final.code // 100 != 4 else []

    def commands(self, message: Outgoing, recipients: List[str]) -> List[str]:
        """Return MAIL and the RCPTs of a transaction."""
        utf8 = "SMTPUTF8" in self.extensions and (message.smtputf8 or not all(
            self.plain(address).isascii() for address in [message.sender] + recipients))
        spell = str if utf8 else self.plain
        mail = "MAIL FROM:<%s>" % spell(message.sender)
        if "SIZE" in self.extensions:
            mail += " SIZE=%d" % message.size
        if message.eightbit:
            mail += " BODY=8BITMIME"
        if utf8:
            mail += " SMTPUTF8"
        return [mail + self.asked(message, "", "RET", "ENVID")] + ["RCPT TO:<%s>%s" % (
            spell(recipient), self.asked(message, recipient, "NOTIFY", "ORCPT")) for recipient in recipients]

    def asked(self, message: Outgoing, whom: str, *keywords: str) -> str:
        """Return the parameters by which the sender asked for notices, for a peer that gives some (RFC 3461)."""
        given = message.asked.get(whom, {}) if "DSN" in self.extensions else {}
        return "".join(" %s=%s" % (keyword, given[keyword.lower()]) for keyword in keywords if given.get(keyword.lower()))

    async def envelope(self, commands: List[str], answers: List[Reply]) -> Reply:
        """Send MAIL and RCPTs, the answers into `answers`, and DATA if it makes sense; return its reply. PeerFailed."""
        if "PIPELINING" in self.extensions:
            await self.pipeline(commands + ["DATA"], answers)
            return answers.pop()
        for text in commands:
            answers.append(await self.command(text))
            if answers[0].code // 100 != 2:
                break
        if any(answer.code // 100 == 2 for answer in answers[1:]):
            return await self.command("DATA")
        return Reply(503, "5.5.1", "no recipients")

    async def pipeline(self, commands: List[str], answers: List[Reply]) -> None:
        """Send commands without waiting for each answer (RFC 2920), the answers into `answers`; PeerFailed.

        Never more of them than fit into the smallest buffer are under way: with two small windows both sides would wait
        for the other to read (section 3.1).
        """
        lines = [text.encode("utf-8") + b"\r\n" for text in commands]
        sent = under_way = 0
        for number, text in enumerate(commands):
            while sent < len(lines) and (sent <= number or under_way + len(lines[sent]) <= PIPELINE):
                self.wire.send(lines[sent])
                under_way += len(lines[sent])
                sent += 1
            answers.append(await self.reply(text.partition(" ")[0]))
            under_way -= len(lines[number])

    async def content(self, message: Outgoing, answers: List[Reply], data: Reply) -> Reply:
        """Send the content if somebody is to get it; return the final reply. PeerFailed."""
        taken = answers[0].code // 100 == 2 and any(answer.code // 100 == 2 for answer in answers[1:])
        if data.code // 100 == 3 and taken:
            final = await self.send_content(message)
        else:                                       # RFC 2920 section 3.1: nobody is to get it, but DATA may have been taken
            final = await self.command(".") if data.code // 100 == 3 else data
            try:
                await self.command("RSET")
            except PeerFailed:                      # what it said before still counts
                self.broken = True
                self.wire.close()
        if final.code // 100 in (4, 5) or (data.code // 100 == 3 and final.code // 100 == 2):
            return final
        return Reply(451, "4.5.0", "unexpected reply: %s" % str(final))

    async def send_content(self, message: Outgoing) -> Reply:
        """Send the content to its end and return the reply to it; PeerFailed."""
        line_start = True
        try:
            for block in content_blocks(message):
                with self.step("content"):
                    self.wire.send(stuff_dots(block, line_start))
                    await self.wire.drain()         # the last of it goes out with the dot
                line_start = block.endswith(b"\n")
            with self.step("end of content"):
                self.wire.send((b"" if line_start else b"\r\n") + b".\r\n")
                await self.wire.flush()
        except PeerFailed as lost:
            return await self.last_words(lost)
        return await self.reply("end of content", max(FINAL_WAIT, self.wire.timeout))

    async def last_words(self, lost: PeerFailed) -> Reply:
        """Return why the peer closed in the middle of the content, if it said that; PeerFailed."""
        self.broken = True
        self.wire.output.clear()
        try:
            reply = await self.reply("content", min(5.0, self.wire.timeout))
        except PeerFailed as error:
            raise (error if error.reply.code == 421 else lost) from None
        if reply.code // 100 not in (4, 5):
            raise lost
        return reply

    async def quit(self) -> None:
        """Say goodbye, if there is still somebody to hear it."""
        self.wire.timeout = min(self.wire.timeout, 5.0)
        with contextlib.suppress(PeerFailed):
            await self.command("QUIT")
        self.wire.close()


def with_enhanced_code(code: int, lines: List[str]) -> Reply:
    """Return the Reply of these lines; the enhanced code stands in its own place when it fits (RFC 2034 section 4)."""
    match = ENHANCED_CODE.match(lines[-1])
    enhanced = match.group(1) if match and match.group(1)[0] == str(code)[0] else ""
    if enhanced:
        prefix = enhanced + " "
        lines = [line[len(prefix):] if (line + " ").startswith(prefix) else line for line in lines]
    return Reply(code, enhanced, "\n".join(lines))


def content_blocks(message: Outgoing) -> Iterator[bytes]:
    """Yield a message's content in blocks that never cut a CRLF in two."""
    offset, block = message.offset, message.head
    while True:
        if block.endswith(b"\r"):
            following = pread(message.fd, 1, offset)
            offset, block = offset + len(following), block + following
        if block:
            yield block
        block = pread(message.fd, BIG_BLOCK, offset)
        if not block:
            return
        offset += len(block)


BEST_FIRST = ("cram-md5", "plain", "login", "oauthbearer", "xoauth2")   # of these, what needs no token in the password's place


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def sasl_responses(mechanism: str, server: Server) -> Tuple[bytes, List[Callable[[bytes], bytes]]]:
    """Return (initial response, a function from challenge to response for each further step) of a SASL mechanism.

    PLAIN (RFC 4616), LOGIN, CRAM-MD5 (RFC 2195), OAUTHBEARER (RFC 7628) and XOAUTH2, where an error is a challenge, too.
    """
    user, password = server.user.encode("utf-8"), server.password.encode("utf-8")
    if mechanism == "plain":
        return b"\0%s\0%s" % (user, password), []
    if mechanism == "login":
        return b"", [lambda challenge: user, lambda challenge: password]
    if mechanism == "cram-md5":
        return b"", [lambda challenge: user + b" " + hmac.new(password, challenge, "md5").hexdigest().encode("ascii")]
    if mechanism == "xoauth2":
        return b"user=%s\1auth=Bearer %s\1\1" % (user, password), [lambda challenge: b""]
    name = user.replace(b"=", b"=3D").replace(b",", b"=2C")         # RFC 5801 section 4
    return b"n,a=%s,\1host=%s\1port=%d\1auth=Bearer %s\1\1" % (
        name, server.host.encode("utf-8"), server.port, password), [lambda challenge: b"\1"]


def sasl_secrets(server: Server) -> List[str]:
    """Return all forms in which the password could come back from a peer that repeats what it heard."""
    texts = [in_base64(server.password.encode("utf-8")), server.password]
    for mechanism in ("plain", "xoauth2", "oauthbearer"):
        texts.append(in_base64(sasl_responses(mechanism, server)[0]))
    return [text for text in texts if len(text) > 3]    # what is shorter stands in many a word


# ======================================================================================================================
# 12  Relay.  Where mail for elsewhere goes (RFC 5321 section 5.1), when, and what comes of it.
#
#    One thread, the runner, owns what is in memory: which entries are taken up, which destinations there are, how many
#    workers each has. It calls the functions that others put into its inbox, and does nothing that takes long but look
#    into the queue. A worker is a thread with one connection: it takes jobs of its destination, one after the other,
#    records what came of each, and tells the runner. A job is one message for one destination.
# ======================================================================================================================

class Undeliverable(Refused):
    """There is no way to a destination, now (4xx) or ever (5xx)."""


class OneTooMany(Exception):
    """A host that talks to others of us refused one more connection: nothing was tried."""


class OpportunityMissed(Exception):
    """STARTTLS failed where it was not required."""


class Exchanger(NamedTuple):
    """A host that takes mail for a destination."""
    preference: int
    host: str
    addresses: List[str]
    ttl: int = 0


class Target(NamedTuple):
    """Where the mail of a recipient goes: a domain by its MX records, or a given server."""
    key: str
    domain: str = ""
    server: Optional[Server] = None

    def __str__(self) -> str:
        return str(self.server) if self.server else self.domain


class Security(NamedTuple):
    """What is demanded of a connection; `reason` says by whom."""
    require: bool                                   # TLS, or nothing is sent
    verify: bool                                    # its certificate
    reason: str = ""


class Outbound:
    """What another section may do to mail that leaves, by returning its own from Extension.outbound()."""

    def dress(self, entry: Entry, message: Outgoing) -> Outgoing:
        """Return the message as it is to go out; called once for all destinations. What `entry.extra` keeps is recorded."""
        return message

    def security(self, target: Target, host: str) -> Optional[Security]:
        """Return what the destination itself demands of a connection to this host, None for nothing; Refused: not to it."""
        return None

    def explain(self, target: Target) -> str:
        """Return in words what the destination demands, for `mx`; "" for nothing."""
        return ""


# Where to.

class Routes:
    """Turns addresses into targets, and targets into the hosts to try, in order."""

    def __init__(self, config: Config, hostname: str, resolver: Any, own: Sequence[Endpoint] = (),
                 options: Optional[Callable[[], Config]] = None) -> None:
        self.config = config
        self.options = options or (lambda: config)  # as files say it now: what is in a URL may change
        self.hostname = hostname
        self.resolver = resolver
        self.own = own                              # where we listen for SMTP

    def target(self, address: Address, sender: str = "") -> Target:
        """Return the target for an address: a route for its domain, one for the sender's, the smarthost, or its own domain.

        ValueError.
        """
        config = self.options()
        literal = domain_literal(address.domain)
        domain = lower(address.domain) if literal else ascii_domain(lower(address.domain))
        senders = sender.rpartition("@")[2]
        for prefix, name in ("", domain), ("from:", senders):
            for pattern, server in config.route:
                start, _, rest = pattern.rpartition(":")
                if name and start == prefix.rstrip(":") and covers(rest, name):
                    return self._by_server(server)
        if config.smarthost:
            return Target("smarthost", "", config.smarthost)
        return Target(domain, domain)

    @staticmethod
    def _by_server(server: Server) -> Target:
        """Two log-ins at one server are two targets."""
        digest = hashlib.sha256(repr((server.host, server.port, server.tls, server.user)).encode()).hexdigest()[:12]
        return Target("route %s %s" % (server.host, digest), "", server)

    def renewed(self, target: Target) -> Target:
        """Return a target as its URL is now: the smarthost may be another, a token in the password's place a new one."""
        config, server = self.options(), target.server
        if target.key == "smarthost":
            return target._replace(server=config.smarthost or server)
        for _, other in config.route:
            if server and other[:3] + (other.user,) == server[:3] + (server.user,):
                return target._replace(server=other)
        return target

    def is_own(self, host: str, addresses: Sequence[str]) -> bool:
        """Return whether an exchanger is this node: by its name, or by an address and port that it listens on."""
        if host and ascii_domain(host) in map(ascii_domain, (self.hostname, *self.config.domain)):
            return True
        return self.leads_here(addresses, self.config.mx_port)

    def leads_here(self, addresses: Sequence[str], port: int) -> bool:
        """Return whether a connection to one of these addresses would be to ourselves."""
        bound = [bare_address(host) for host, own_port in self.own if own_port == port]
        wildcard = any(address and address.is_unspecified for address in bound)
        for address in map(bare_address, addresses):
            if address and address.is_unspecified:  # "this host": it leads to its loopback interface
                address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
            if address and (address in bound or (wildcard and is_own_address(str(address)))):
                return True
        return False

    def exchangers(self, target: Target) -> List[Exchanger]:
        """Return the hosts to try, in order (RFC 5321 section 5.1); Undeliverable."""
        if target.server:
            return self._given(target.server)
        literal = domain_literal(target.domain)
        if literal:
            return self._without_ourselves([Exchanger(0, "", [literal])])
        try:
            records = self.resolver.mx(target.domain)
        except NoSuchDomain:
            raise Undeliverable(550, "5.1.2", "no such domain: " + target.domain) from None
        except DNSError as error:
            raise Undeliverable(451, "4.4.3", "%s: %s" % (target.domain, error)) from None
        if any(not host for _, host, _ in records):
            if len(records) == 1:                   # RFC 7505
                raise Undeliverable(556, "5.1.10", "%s takes no mail (null MX)" % target.domain)
            records = [record for record in records if record[1]]
        implicit = not records
        if implicit:
            records = [(0, target.domain, 0)]       # RFC 5321 section 5.1: the domain's own address
        secrets.SystemRandom().shuffle(records)
        records.sort(key=lambda record: int(record[0]))
        return self._with_addresses(target.domain, records, implicit)

    def _with_addresses(self, domain: str, records: Sequence[Tuple[int, str, int]], implicit: bool) -> List[Exchanger]:
        found: List[Exchanger] = []
        failure: Optional[str] = None
        for preference, host, ttl in records[:MAX_EXCHANGERS]:
            if not implicit and self.is_own(host, []):
                found.append(Exchanger(preference, host, [], ttl))
                break                               # what comes after us in preference is of no use to us
            try:
                addresses = self.resolver.addresses(host)
            except NoSuchDomain:
                continue                            # an exchanger without address is skipped
            except DNSError as error:
                failure = str(error)
                continue
            if addresses:
                shortest = min([ttl] * (not implicit) + [address_ttl for _, address_ttl in addresses])
                found.append(Exchanger(preference, host, [address for address, _ in addresses], shortest))
        try:
            hosts = self._without_ourselves(found)
        except Undeliverable:
            if not failure:
                raise
            hosts = []                              # a better one may turn up when DNS answers again
        if not hosts and failure:
            raise Undeliverable(451, "4.4.3", "%s: %s" % (domain, failure))
        if not hosts:
            raise Undeliverable(550, "5.1.2", "%s has no host that takes mail" % domain if not implicit else
                                "%s has no MX and no address" % domain)
        return hosts

    def _without_ourselves(self, hosts: List[Exchanger]) -> List[Exchanger]:
        """Cut off everything from our own preference on: RFC 5321 section 5.1, so that mail never goes in circles."""
        limit = min((host.preference for host in hosts if self.is_own(host.host, host.addresses)), default=None)
        if limit is None:
            return hosts
        hosts = [host for host in hosts if host.preference < limit]
        if not hosts:
            raise Undeliverable(554, "5.4.6", "mail loop: the best exchanger is this host, which does not keep this mail")
        return hosts

    def _given(self, server: Server) -> List[Exchanger]:
        host, addresses = server.host.rstrip("."), []
        failure = Undeliverable(451, "4.4.4", "%s has no address" % host)
        try:
            addresses = [address for address, _ in self.resolver.addresses(host)]
        except NoSuchDomain:
            pass
        except DNSError as error:
            failure = Undeliverable(451, "4.4.3", "%s: %s" % (host, error))
        addresses = addresses or local_addresses(host)
        if not addresses:
            raise failure
        if self.leads_here(addresses, server.port):
            raise Undeliverable(554, "5.4.6", "mail loop: %s is this host, which does not keep this mail" % str(server))
        return [Exchanger(0, host, addresses)]


def local_addresses(host: str) -> List[str]:
    """Return what the machine's own tables (/etc/hosts) say about a host: a smarthost may have no DNS name."""
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, 25, type=socket.SOCK_STREAM)))
    except OSError:
        return []


def bare_address(text: str) -> Any:
    """Return an IP address as such, an IPv4-mapped one as IPv4; None for what is none."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if text == "localhost" else text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def public_addresses() -> List[str]:
    """Return the addresses of this machine that the Internet sees, if it has such; behind NAT there are none to be told."""
    found = []
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((elsewhere, 9))            # sends nothing: it only asks for the way, and so for our end of it
            found.append(sock.getsockname()[0])
    return [address for address in found if ipaddress.ip_address(address).is_global]


def is_own_address(address: str) -> bool:
    """Return whether an IP address is one of this machine's: only such can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((address, 0))
        return True
    except OSError:
        return False


# As whom (--rewrite).

FROM_TOKEN = expression(                            # what has no end ends with the field: so no byte is looked at twice
    rb'"[^"\\]*(?:\\.[^"\\]*)*"?|\([^()\\]*(?:\\.[^()\\]*)*\)?|[^\s<>(),;:"\\]+', re.DOTALL)
FIELDS = expression(rb"(?<=\n)(?![ \t])")


def rewrite_address(address: str, rules: Sequence[Tuple[str, str]]) -> str:
    """Return what the first rule whose pattern fits makes of an address; the address itself when none does."""
    return next((target for pattern, target in rules if fnmatch.fnmatchcase(lower(address), pattern)), address)


def rewrite_from(head: bytes, rules: Sequence[Tuple[str, str]]) -> bytes:
    """Return headers with the addresses in From rewritten; names, comments and everything else stay."""
    def token(match: "re.Match[bytes]") -> bytes:
        text = match.group()
        if text.count(b"@") != 1 or text[:1] in b'"(' or len(text) > MAX_PATH:
            return text
        address = text.decode("utf-8", "surrogateescape")
        return rewrite_address(address, rules).encode("utf-8", "surrogateescape")
    return b"".join(field[:5] + FROM_TOKEN.sub(token, field[5:]) if field[:5].lower() == b"from:" else field
                    for field in FIELDS.split(head))


def rewritten(message: Outgoing, rules: Sequence[Tuple[str, str]]) -> Outgoing:
    """Return the message as --rewrite wants it to go out. The null reverse-path stays what it is."""
    if not rules:
        return message
    if message.sender:
        message = message._replace(sender=rewrite_address(message.sender, rules))
    block = pread(message.fd, MAX_REWRITTEN, message.offset)
    end = block.find(b"\r\n\r\n")
    old = block[:end + 2 if end >= 0 else block.rfind(b"\n") + 1]
    new = rewrite_from(old, rules)
    if new == old:
        return message
    return message._replace(head=new, offset=message.offset + len(old), size=message.size - len(old) + len(new),
                            smtputf8=message.smtputf8 or (old.isascii() and not new.isascii()))


# How much at once.

DEFAULT_LIMIT = Limit("", MAX_SENDERS_PER_HOST, MAX_MESSAGES, MAX_RECIPIENTS_AT_ONCE)


def limit_for(target: Target, limits: Sequence[Limit], processes: int = 1) -> Limit:
    """Return what a destination is given: of each kind what --limit says for it most precisely. Processes share it."""
    name = target.server.host if target.server else target.domain
    ranked = sorted((limit for limit in limits if not limit.domain or covers(limit.domain, name)), key=lambda limit: (
        not limit.domain, limit.domain.startswith("."), -len(limit.domain))) + [DEFAULT_LIMIT]

    def value(field: str) -> Any:
        return next((getattr(limit, field) for limit in ranked if getattr(limit, field) is not None), None)
    rate = value("rate")
    if rate:
        count, seconds = rate
        rate = (count // processes, seconds) if count >= processes else (1, seconds * processes / count)
    return Limit(name, max(1, value("connections") // processes), value("messages"), value("recipients"), rate)


class Job(NamedTuple):
    """A message for one destination."""
    dispatch: Dispatch
    addresses: List[str]


class Destination:
    """What is waiting in memory for one target, and how it did lately. The runner's, but for what is under `turn`."""

    def __init__(self, target: Target, limit: Limit) -> None:
        self.target = target
        self.name = encode_name(target.key)         # of its directory in busy/
        self.limit = limit
        self.turn = threading.Condition()           # notified when there is a job for one that lingers
        self.lingering = 0                          # workers with a connection and nothing to do
        self.jobs: Deque[Job] = collections.deque()
        self.started: Deque[float] = collections.deque(maxlen=limit.rate[0] if limit.rate else 1)  # latest, as the rate wants
        self.peers: Set[Peer] = set()               # connections that were greeted
        self.workers = 0
        self.allowed = 1                            # workers, grows with success ...
        self.ceiling = limit.connections or 1       # ... up to this, which is less ...
        self.narrow_until = 0.0                     # ... for a while after a connection too many
        self.failures = 0                           # in a row, to reach any host
        self.paused_until = 0.0
        self.overflow = False                       # more of it waits in busy/

    def pauses(self, now: float) -> bool:
        return now < self.paused_until

    def has_room(self, now: float) -> bool:
        """Return whether it is worth to take up more for it."""
        return len(self.jobs) < MAX_WAITING and not self.pauses(now)

    def is_idle(self, now: float) -> bool:
        return not (self.jobs or self.workers or self.overflow or self.pauses(now) or self.ready_in(now))

    def ready_in(self, now: float) -> float:
        """Return the seconds until the rate lets another message out."""
        if not self.limit.rate or len(self.started) < self.limit.rate[0]:
            return 0.0
        return max(0.0, min(self.started[0] + self.limit.rate[1] - now, self.limit.rate[1]))

    def take(self, now: float, patience: float = 0.0) -> Optional[Job]:
        """Return the next job, if there is one and its time has come, or one comes within `patience` seconds."""
        with self.turn:
            if patience and not self.jobs:
                self.lingering += 1
                self.turn.wait_for(lambda: self.jobs, patience)
                self.lingering -= 1
            if not self.jobs or self.ready_in(now):
                return None
            if self.limit.rate:
                self.started.append(now)
            return self.jobs.popleft()

    def give_back(self, job: Job, now: float) -> None:
        """Take back a job that was not tried, for there was one connection too many."""
        with self.turn:
            self.jobs.appendleft(job)
            self.ceiling, self.narrow_until = max(1, len(self.peers)), now + NARROW
            self.allowed = min(self.allowed, self.ceiling)

    def succeed(self, now: float) -> None:
        self.failures = 0
        if now >= self.narrow_until:
            self.ceiling = self.limit.connections or 1
        self.allowed = min(self.ceiling, self.allowed + 1)

    def fail(self, reply: Reply, now: float, retry: Sequence[float]) -> None:
        """Pause: it cannot be reached, or nobody there wants to talk. The longer the more often that was so."""
        seconds = min(retry[min(self.failures, len(retry) - 1)] / 2, MAX_PAUSE)
        self.failures += 1
        self.allowed, self.paused_until = 1, now + seconds
        event("paused", destination=printable(str(self.target)), seconds=round(seconds), reply=printable(reply.text, 1000))


class Relay:
    """Takes due entries from the queue into memory, a bounded number, and sends them."""

    def __init__(self, config: Config, stores: Stores, resolver: Any, own: Sequence[Endpoint], clock: Callable[[], float],
                 connect: Callable[..., socket.socket] = socket.create_connection,
                 options: Optional[Callable[[], Config]] = None) -> None:
        self.config = config
        self.stores = stores
        self.queue: Queue = stores.post.queue
        self.storage = stores.storage
        self.hostname = stores.hostname
        self.routes = Routes(config, stores.hostname, resolver, own, options)
        self.outbound: Outbound = next(filter(None, (
            section.outbound(config, stores, resolver) for section in EXTENSIONS)), Outbound())
        self.clock = clock
        self.connect = connect
        self.timeout = config.seconds(300.0)
        self.sent = self.bounced = self.deferred = 0        # recipients, since the start
        self._inbox: "SimpleQueue[Tuple[Callable[..., None], Tuple[Any, ...]]]" = SimpleQueue()
        self._active: Dict[str, Dispatch] = {}          # id -> what is in memory
        self._destinations: Dict[str, Destination] = {}
        self._hungry: Dict[str, Dict[str, Destination]] = {}    # by sender: those that have jobs, but got no worker
        self._later: List[Tuple[float, Callable[..., None], Tuple[Any, ...]]] = []      # what failed, to be done again
        self._threads = Threads("minimail-relay")
        self._workers = 0
        self._working: Dict[str, int] = {}          # sender -> workers that began for it, and ...
        self._held: Dict[str, int] = {}             # ... its entries in memory
        self._starved = False                       # no thread was to be had
        self._rescan = True
        self._more = False                          # there was no room for all that is due
        self._next = 0.0                            # when to look into the queue again
        self._ticked = self._swept = self._looked = 0.0
        self._here = -1                             # what says to others that this process has some
        self._living: Set[str] = set()              # tokens of the processes that have entries in memory
        self._stamps: Tuple[Any, ...] = ()
        self._running = self._stopping = False

    # The runner. These methods are called in its thread, but for start(), stop(), join(), wake() and submitted().

    def start(self) -> None:
        """Begin; RuntimeError when no thread is to be had."""
        self._running = True
        self._threads.start(self._run)

    def stop(self) -> None:
        """Begin to stop: what is being sent goes to its end, nothing new begins."""
        self._stopping = True
        self.wake()

    def join(self, seconds: float) -> None:
        self._threads.join(seconds)

    def wake(self) -> None:
        """Look into the queue at once."""
        self._tell(self._look_at, 0.0)

    def submitted(self, dispatch: Dispatch) -> bool:
        """Take up an entry that this process has just put into the queue; False when it has to wait on disk."""
        held = self._held.get(dispatch.entry.sender, 0)     # what is still in the inbox may be the same sender's
        if self._stopping or held + len(self._active) + SHARES * self._inbox.qsize() >= SHARES * MAX_ACTIVE:
            self._more = True
            return False
        self._tell(self._admit, dispatch)
        return True

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        self._inbox.put((function, arguments))

    def _run(self) -> None:
        self._here = self.storage.appear()
        self._guarded(self._sweep)
        self.queue.submitted = self.submitted       # not before: what has no hint is in nobody's memory then
        while not self._stopping:
            self._guarded(self._turn)
        for dispatch in list(self._active.values()):    # for other processes, and the next start
            if not dispatch.hint and self.queue.exists(dispatch.entry.id):
                self._guarded(self.queue.place_hint, dispatch, self.queue.new)
        self.storage.vanish(self._here)

    def _sweep(self) -> None:
        self.queue.sweep(self._active, SWEEP if self._swept else 0.0, self._living)
        self._swept, self._rescan = self.queue.steady(), True

    def _look_around(self) -> None:
        """Sweep when a process has died that had entries in its memory, and now and then; OSError."""
        before, self._living = self._living, self.storage.living()
        self._looked = self.queue.steady()
        if self.storage.token not in self._living:  # taken for dead: who is cut off from a network file system loses its locks
            close_quietly(self._here)
            self._here = self.storage.appear()
        if before - self._living or self._looked >= self._swept + SWEEP:
            self._guarded(self._sweep)

    def _guarded(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function; whatever happens in it stops nothing else. What the disk refused is done again later."""
        try:
            function(*arguments)
        except OSError as error:
            self.storage.report("queue: %s, later once more", error)
            self._again(function, *arguments)
        except Exception:
            log.exception("the relay stumbled")

    def _again(self, function: Callable[..., None], *arguments: Any) -> None:
        self._later.append((self.queue.steady() + AGAIN, function, arguments))

    def _turn(self) -> None:
        """Wait for something to do, and do it."""
        with contextlib.suppress(Empty):
            function, arguments = self._inbox.get(timeout=TICK)
            self._guarded(function, *arguments)
            for _ in range(self._inbox.qsize()):
                function, arguments = self._inbox.get_nowait()
                self._guarded(function, *arguments)
        if time.monotonic() >= self._ticked + TICK:
            self._tick()
        if self._wants_scan() and not self.storage.away:
            self._guarded(self.scan)

    def _tick(self) -> None:
        """See to what happens without anybody telling."""
        now, away = self.clock(), self.storage.away
        stamps = tuple(self.storage.stamp(kind) for kind in ("queue", "flush"))
        self._ticked = time.monotonic()
        if self.storage.away:
            return
        if away:
            self._swept = 0.0                       # some entries may be in nobody's memory now
        if self._running and (self.queue.steady() >= self._looked + LOOK_AROUND or away) and not self.storage.is_away():
            self._guarded(self._look_around)
        if stamps != self._stamps:
            if self._stamps and stamps[1] != self._stamps[1]:
                for destination in self._destinations.values():
                    destination.paused_until = 0.0  # `queue flush` means now
            self._rescan, self._stamps = True, stamps
        steady = self.queue.steady()
        ready = [item for item in self._later if item[0] <= steady]
        self._later = [item for item in self._later if item[0] > steady]
        for _, function, arguments in ready:
            self._guarded(function, *arguments)
        for name, destination in list(self._destinations.items()):
            self._staff(destination)
            if destination.overflow and len(destination.jobs) <= MAX_WAITING // 2 and not destination.pauses(now):
                self._rescan = True
            if destination.is_idle(now):
                del self._destinations[name]

    def _wants_scan(self) -> bool:
        return self._rescan or self.clock() >= self._next or (self._more and len(self._active) <= MAX_ACTIVE // 2)

    def _look_at(self, moment: float) -> None:
        """Look into the queue again at `moment`, if not before."""
        self._next = min(self._next, moment)

    def scan(self) -> None:
        """Take due entries into memory, as many as there is room and a stint for; OSError."""
        now, until = self.clock(), time.monotonic() + STINT
        self._rescan = self._more = False
        self._next = now + 60.0
        self._look_at(self.queue.next_due(now) or self._next)
        for directory in list(self.queue.due_directories(now)) + self.queue.busy_directories():
            if len(self._active) >= MAX_ACTIVE or self._stopping:
                self._more = True
                return
            self._scan_directory(directory, now, until)
            if time.monotonic() > until:
                self._rescan = True
                return

    def _scan_directory(self, directory: str, now: float, until: float) -> None:
        """Take up the entries that a directory hints at. Nothing that is wrong with one of them stops the others."""
        busy = os.path.basename(directory) if os.path.dirname(directory) == self.queue.busy else ""
        if not self._opens(busy, now):
            return
        failed: Optional[Exception] = None
        try:
            with os.scandir(directory) as found:
                for file in found:
                    if len(self._active) >= MAX_ACTIVE:
                        self._more = True
                        return
                    if not self._opens(busy, now):
                        return
                    try:
                        if ENTRY_ID.fullmatch(file.name):
                            self._take_up(file.path, now)
                    except Exception as error:
                        failed = error
                    if time.monotonic() > until:
                        break
        except OSError as error:
            failed = None if isinstance(error, FileNotFoundError) else error
        if failed:
            self.storage.report("queue: what %s hints at cannot be taken up, later once more: %s", directory, failed)
            self._look_at(now + AGAIN)
        elif directory != self.queue.new:
            with contextlib.suppress(OSError):
                os.rmdir(directory)

    def _opens(self, busy: str, now: float) -> bool:
        """Return whether a directory in busy/ is to be looked at: not while its destination has enough to do, or pauses."""
        destination = self._destinations.get(busy)
        if destination:
            destination.overflow = not destination.has_room(now)
        return not (destination and destination.overflow)

    def _take_up(self, hint: str, now: float) -> None:
        """Take up the entry that is hinted at; OSError. A hint at nothing is removed."""
        id = os.path.basename(hint)
        if id in self._active:
            if self._active[id].hint != hint:       # made by a sweep that did not know yet that it is here: look again
                self._look_at(now + 1.0)
            return
        entry = self.queue.read(id)
        if entry is None:
            unlink_quietly(hint)
        elif self.queue.is_later(entry.next_attempt, now):  # tried a moment ago, or a crash came before it was hinted at
            self.queue.place_hint(Dispatch(entry, hint), self.queue.due_directory(entry.next_attempt))
        else:
            self._admit(Dispatch(entry, hint))

    def _admit(self, dispatch: Dispatch) -> None:
        """Hand an entry to its destinations, but for those that have enough to do or pause; OSError."""
        entry, now = dispatch.entry, self.clock()
        if entry.id in self._active:
            return
        groups: Dict[Target, List[str]] = {}
        for recipient in entry.waiting():
            target = self.routes.target(parse_address(recipient["address"]), entry.sender)
            groups.setdefault(target, []).append(recipient["address"])
        expired = entry.attempts > 0 and self.queue.age(entry) >= self.config.give_up
        open_to = []
        for target, addresses in groups.items():
            destination = self._destination(target)
            if expired or destination.has_room(now):
                open_to.append((destination, Job(dispatch, addresses)))
            else:
                destination.overflow, dispatch.aside = True, destination.name
        if groups and not open_to:
            self.queue.place_hint(dispatch, os.path.join(self.queue.busy, dispatch.aside))
            return
        self._active[entry.id] = dispatch
        tally(self._held, entry.sender, 1)
        dispatch.pending = len(open_to)
        if not groups:                              # served, but a crash came before it was removed
            self._part_over(dispatch)
        for destination, job in open_to:
            destination.jobs.append(job)
            self._staff(destination)

    def _destination(self, target: Target) -> Destination:
        name = encode_name(target.key)
        if name not in self._destinations:
            self._destinations[name] = Destination(target, limit_for(target, self.config.limit, self.config.workers))
        return self._destinations[name]

    def _staff(self, destination: Destination) -> None:
        """Start a worker if there is work for one more, and a thread to be had."""
        if not (destination.jobs and destination.workers < destination.allowed and self._running) or self._stopping or \
                destination.ready_in(self.clock()):
            return
        with destination.turn:
            if destination.lingering >= len(destination.jobs):
                return destination.turn.notify(len(destination.jobs))
            sender = min({job.dispatch.entry.sender for job in destination.jobs}, key=lambda name: self._working.get(name, 0))
        if not self._has_place(sender):
            self._hungry.setdefault(sender, {})[destination.name] = destination
            return
        try:
            self._threads.start(functools.partial(self._work, destination, sender))
        except (RuntimeError, MemoryError) as error:
            if not self._starved:                   # said once; tried again at each tick
                log.warning("no thread for mail to %s now: %s", printable(str(destination.target)), error)
            self._starved = True
            return
        self._starved = False
        destination.workers += 1
        self._workers += 1
        tally(self._working, sender, 1)

    def _has_place(self, sender: str) -> bool:
        """Return whether one more worker may begin for a sender: anybody's hosts may take hours over each step."""
        return self._working.get(sender, 0) + self._workers < SHARES * MAX_SENDERS

    def _left(self, destination: Destination, sender: str) -> None:
        """Count off a worker, and see who wants its place."""
        destination.workers -= 1
        self._workers -= 1
        tally(self._working, sender, -1)
        self._staff(destination)
        for name, hungry in list(self._hungry.items()):
            while hungry and self._has_place(name):
                self._staff(hungry.pop(next(iter(hungry))))
            if not hungry:
                del self._hungry[name]

    def _done(self, dispatch: Dispatch, sent: int, bounced: int, deferred: int) -> None:
        """Forget an entry: it is recorded on disk, or somebody else's; OSError."""
        if self._active.pop(dispatch.entry.id, None):
            tally(self._held, dispatch.entry.sender, -1)
        self.sent, self.bounced, self.deferred = self.sent + sent, self.bounced + bounced, self.deferred + deferred
        if dispatch.lost:
            self._look_at(self.clock() + 1.0)       # see what became of it
            if not dispatch.hint and self.queue.exists(dispatch.entry.id):
                self.queue.place_hint(dispatch, self.queue.new)
        elif deferred:
            self._look_at(dispatch.entry.next_attempt + 1.0)

    # A worker.

    def _work(self, destination: Destination, sender: str) -> None:
        """Send what waits for one destination, over one connection as long as there is more."""
        peer: Optional[Peer] = None
        try:
            while True:
                patience = LINGER if peer and self._running else 0.0    # mail often comes in a stream
                job = None if self._stopping else destination.take(self.clock(), patience)
                if job:
                    peer = self.attempt(destination, peer, job)
                elif peer:
                    self._leave(destination, peer)  # may take a while; what came meanwhile is seen to
                    peer = None
                else:
                    return
        except OneTooMany:
            pass
        finally:
            self._tell(self._left, destination, sender)

    def _leave(self, destination: Destination, peer: Peer) -> None:
        if peer.broken:
            return self._drop(destination, peer)
        run_blocking(peer.wire, peer.quit())
        destination.peers.discard(peer)             # not before: until then the host counts it, and may refuse one more

    def _drop(self, destination: Destination, peer: Peer) -> None:
        destination.peers.discard(peer)
        peer.wire.close()

    def attempt(self, destination: Destination, peer: Optional[Peer], job: Job) -> Optional[Peer]:
        """Try to serve some recipients of an entry; return the connection if it can be used again. OneTooMany."""
        dispatch, started = job.dispatch, self.clock()
        if not self._claim(dispatch):
            self._part_over(dispatch)
            return peer
        recipients = [recipient for recipient in dispatch.entry.waiting() if recipient["address"] in job.addresses]
        narrow = dispatch.entry.extra.get("narrow", 0)  # how often a conversation ended, or there were too many
        if narrow:
            secrets.SystemRandom().shuffle(recipients)  # who ends it stands in nobody's way for ever, ...
        if destination.pauses(started) and (dispatch.entry.attempts or self.queue.age(dispatch.entry) < self.config.give_up):
            destination.overflow, dispatch.aside = True, destination.name
            self._part_over(dispatch)                   # an attempt that was not made is not counted
            return peer
        replies: Dict[str, Reply] = {}
        speakers: Dict[str, Peer] = {}
        try:
            message = self._message(dispatch)._replace(recipients=[recipient["address"] for recipient in recipients])
            at_once = len(recipients) >> narrow         # ... as fewer go together
            peer, replies, speakers = self.deliver(destination, peer, message, at_once)
            if peer is None or any(reply.code == 452 or reply.enhanced[1:] == ".5.3" for reply in replies.values()):
                dispatch.entry.extra["narrow"] = min(narrow + 1, 20)
        except OneTooMany:
            destination.give_back(job, self.clock())
            raise
        except Undeliverable as error:
            peer, replies = None, {recipient["address"]: error.reply for recipient in recipients}
            if error.reply.code < 500:
                destination.fail(error.reply, self.clock(), self.config.retry)
        except Exception as error:
            if isinstance(error, OSError):          # the message cannot be read, or what it is sent with
                self.storage.report("attempt for %s failed: %s", dispatch.entry.id, error)
            else:
                log.exception("attempt for %s failed", dispatch.entry.id)
            if peer:
                self._drop(destination, peer)
            peer, replies = None, dict.fromkeys(job.addresses, Reply(451, "4.3.0", "something went wrong here"))
        if peer:
            destination.succeed(self.clock())
            if destination.jobs and destination.workers < destination.allowed:
                self._tell(self._staff, destination)
        self._record(dispatch, recipients, replies, speakers, self.clock() - started)
        if peer and (peer.broken or peer.messages >= (destination.limit.messages or 1)):
            self._leave(destination, peer)
            return None
        return peer

    def _claim(self, dispatch: Dispatch) -> bool:
        """Claim an entry for this process, once for all its destinations; False when another process has it."""
        with dispatch.mutex:
            if dispatch.lock < 0 and not dispatch.lost:
                try:
                    dispatch.lost = not self.queue.claim(dispatch)
                    if not dispatch.lost and self.queue.is_later(dispatch.entry.next_attempt, self.clock()):
                        self.queue.release(dispatch)    # another process tried it a moment ago
                        dispatch.lost = True
                except OSError as error:
                    self.storage.report("queue entry %s cannot be taken up: %s", dispatch.entry.id, error)
                    dispatch.lost = True
            return not dispatch.lost

    def _message(self, dispatch: Dispatch) -> Outgoing:
        """Return the message as it goes out, made once for all its destinations. OSError, also when there is not all of it."""
        entry = dispatch.entry
        with dispatch.mutex:
            if dispatch.message is None:
                if os.fstat(dispatch.lock).st_size < entry.offset + entry.size:     # as a restore without room leaves it
                    raise OSError(errno.EIO, "the message is cut off", self.queue.path(entry.id))
                asked: Dict[str, Dict[str, str]] = {recipient["address"]: recipient for recipient in entry.recipients}
                asked[""] = entry.extra
                message = Outgoing(dispatch.lock, entry.offset, entry.size, entry.sender, [], entry.eightbit, entry.smtputf8,
                                   asked=asked)
                dispatch.message = self.outbound.dress(entry, rewritten(message, self.routes.options().rewrite))
            made: Outgoing = dispatch.message
            return made

    def deliver(self, destination: Destination, peer: Optional[Peer], message: Outgoing, at_once: int) -> Tuple[
            Optional[Peer], Dict[str, Reply], Dict[str, Peer]]:
        """Send over `peer`, else over the exchangers in turn; return (connection, {recipient: reply}, {recipient: whose}).

        What a host answers 4xx is tried at the next one; a connection lost after the final dot counts as not sent.
        Undeliverable when nobody there could be talked to; OneTooMany.
        """
        at_once = max(1, min(at_once, destination.limit.recipients or 1))
        destination.target = self.routes.renewed(destination.target)
        server = destination.target.server
        if peer and peer.server and server and peer.server[:4] != server[:4]:   # another smarthost, or log-in, since
            self._leave(destination, peer)
            peer = None
        replies: Dict[str, Reply] = {}
        speakers: Dict[str, Peer] = {}
        tried, failure = None, NO_REPLY
        if peer:
            replies = self._go_on(destination, peer, message, at_once)
            speakers = dict.fromkeys(replies, peer)
            peer, tried = (peer, peer.host) if replies else (None, None)
        left = [recipient for recipient in message.recipients if replies.get(recipient, NO_REPLY).code // 100 == 4]
        for exchanger, address in self._hosts(destination.target, left, replies):
            if exchanger.host == tried or not left:
                continue
            try:
                fresh = self.open_peer(destination, exchanger.host, address)
            except PeerFailed as error:
                failure = error.reply
                continue
            try:
                some = run_blocking(fresh.wire, fresh.send(message._replace(recipients=left), at_once))
            except PeerFailed as error:             # what it said was about this message
                self._drop(destination, fresh)
                replies.update(dict.fromkeys(left, error.reply))
                speakers.update(dict.fromkeys(left, fresh))
                continue
            except BaseException:
                self._drop(destination, fresh)
                raise
            if peer:
                self._leave(destination, peer)
            peer, tried = fresh, exchanger.host     # the same host at another address would say the same
            replies.update(some)
            speakers.update(dict.fromkeys(some, fresh))
            left = [recipient for recipient in left if replies[recipient].code // 100 == 4]
        if replies:
            return peer, replies, speakers
        if destination.peers:
            raise OneTooMany
        raise Undeliverable(failure)

    def _hosts(self, target: Target, left: Sequence[str], replies: Dict[str, Reply]) -> Iterator[Tuple[Exchanger, str]]:
        """Yield each host and address to try, when there is somebody left to try it for; Undeliverable if that is all."""
        try:
            exchangers = self.routes.exchangers(target) if left else []
        except Undeliverable:
            if not replies:
                raise
            exchangers = []
        for exchanger in exchangers:
            for address in exchanger.addresses[:MAX_EXCHANGERS]:
                yield exchanger, address

    def _go_on(self, destination: Destination, peer: Peer, message: Outgoing, at_once: int) -> Dict[str, Reply]:
        """Return the replies to one more message on a connection; none when only a new one can tell.

        It may have been idle for too long, or carry no more than so many messages, whatever the words for that are.
        """
        try:
            replies: Dict[str, Reply] = run_blocking(peer.wire, peer.send(message, at_once))
        except PeerFailed:
            replies = {}
        if replies and not peer.mail_refused:
            return replies
        self._leave(destination, peer)
        return {}

    # A connection.

    def open_peer(self, destination: Destination, host: str, address: str) -> Peer:
        """Return a connection ready for MAIL; PeerFailed."""
        server = destination.target.server
        demanded = self.security(destination.target, host, address)
        tries = [(demanded, False), (demanded, True)]
        if demanded.verify and not demanded.require and not server:
            tries.insert(1, (Security(False, False), False))    # better TLS that was not verified than none
        for demands, plain in tries:
            peer = self._connect(host, address, server)
            try:
                run_blocking(peer.wire, self._prepare(peer, address, demands, plain))
                destination.peers.add(peer)
                destination.allowed = max(destination.allowed, min(destination.ceiling, len(destination.peers) + 1))
                self._tell(self._staff, destination)    # however long this one takes, others need not wait for it
                return peer
            except OpportunityMissed as missed:
                peer.wire.close()                   # TLS was only an opportunity: once more without
                if demands.verify:
                    event("tls-unverified", peer=peer.name, reason=str(missed), policy=demands.reason)
            except BaseException:
                peer.wire.close()
                raise
        raise AssertionError

    def security(self, target: Target, host: str, address: str) -> Security:
        """Return what is demanded of a connection: by --relay-tls, for a password's sake, or by the destination itself.

        A password is shown to nobody whose certificate was not verified, unless the URL says so, and never in clear but
        to this machine.
        """
        server, demanded = target.server, Security(False, False)
        if self.config.relay_tls == "require":
            demanded = Security(True, server is None or server.verify, "--relay-tls require")
        if server and server.user:
            demanded = Security(demanded.require or not is_loopback(address), server.verify, demanded.reason or "the password")
        try:
            own = self.outbound.security(target, host)
        except Refused as refused:
            raise PeerFailed(refused.reply) from None
        if own:
            demanded = Security(demanded.require or own.require, demanded.verify or own.verify, demanded.reason or own.reason)
        return demanded

    def _connect(self, host: str, address: str, server: Optional[Server]) -> Peer:
        port = server.port if server else self.config.mx_port
        name = "%s[%s]:%d" % (host or address, address, port)
        try:
            sock = self.connect((address, port), timeout=min(self.timeout, 30.0))
        except OSError as error:
            reason = "timeout" if isinstance(error, socket.timeout) else reason_of(error)
            raise PeerFailed(451, "4.4.1", "cannot connect to %s: %s" % (name, reason)) from None
        with contextlib.suppress(OSError):          # only faster: what is short must not wait for an acknowledgement
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end_when_gone(sock, self.timeout)
        return Peer(sock, name, self.hostname, self.timeout, host, server)

    async def _prepare(self, peer: Peer, address: str, demanded: Security, plain: bool) -> None:
        """Greet, secure the connection and log in; PeerFailed, OpportunityMissed."""
        server = peer.server
        if server and server.tls:
            try:
                await peer.handshake(tls_context(demanded.verify), server.host)
            except CannotRun as error:
                raise PeerFailed(451, "4.7.4", str(error)) from None
        await peer.greet()
        if not peer.wire.tls and not plain:
            await self._secure(peer, peer.host or address, demanded)
        if server and server.user:
            if not peer.wire.tls and not is_loopback(address):
                raise PeerFailed(451, "4.7.0", peer.name + " offers no TLS: the password is not sent in clear")
            await peer.log_in(server)

    async def _secure(self, peer: Peer, name: str, demanded: Security) -> None:
        """Use STARTTLS when it is offered, or insist on it; PeerFailed, OpportunityMissed."""
        if "STARTTLS" not in peer.extensions:
            if demanded.require:
                status = {"the password": "4.7.0", "--relay-tls require": "4.7.4"}.get(demanded.reason, "4.7.5")
                raise PeerFailed(451, status, "%s offers no TLS, which %s asks for" % (peer.name, demanded.reason))
            return
        try:
            context = tls_context(demanded.verify)
        except CannotRun:
            if demanded.require:
                raise PeerFailed(451, "4.7.4", "this Python has no TLS") from None
            return
        try:
            await peer.start_tls(context, name)
        except PeerFailed as error:
            if demanded.require and demanded.reason not in ("the password", "--relay-tls require"):
                text = "%s (%s asks for TLS that is verified)" % (error.reply.text, demanded.reason)
                raise PeerFailed(451, "4.7.5", text) from None
            if demanded.require:
                raise
            raise OpportunityMissed(error.reply.text) from None

    # What came of it.

    def _record(self, dispatch: Dispatch, recipients: List[Dict[str, Any]], replies: Dict[str, Reply],
                speakers: Dict[str, Peer], seconds: float) -> None:
        """Note the replies; when all destinations have been tried, settle the entry."""
        with dispatch.mutex:                        # another destination's worker may be writing the envelope
            for recipient in recipients:
                reply, peer = replies.get(recipient["address"]) or NO_REPLY, speakers.get(recipient["address"])
                recipient.update(                   # whoever knows DSN reports success itself (RFC 3461 section 5.2.2)
                    last_reply=printable(str(reply.text if " said: " in reply.text else reply), 1000), status=reply.enhanced,
                    remote=peer.name.partition("[")[0] if peer else "", informed=bool(peer and "DSN" in peer.extensions),
                    state={2: "delivered", 5: "failed"}.get(reply.code // 100, "waiting"))
                dispatch.tried = dispatch.tried or recipient["state"] == "waiting"
        for recipient in recipients:
            peer = speakers.get(recipient["address"])
            event({"delivered": "sent", "failed": "failed", "waiting": "deferred"}[recipient["state"]], id=dispatch.entry.id,
                  recipient=printable(recipient["address"]), remote=peer.name if peer else "", reply=recipient["last_reply"],
                  seconds=round(seconds, 3))
        self._part_over(dispatch, any(recipient["state"] == "delivered" for recipient in recipients))

    def _part_over(self, dispatch: Dispatch, delivered: bool = False) -> None:
        """One of an entry's destinations is done with; after the last one, nobody else works on it."""
        with dispatch.mutex:
            dispatch.served += delivered
            served, several = dispatch.served, dispatch.pending > 1
        if delivered and several:
            self._save(dispatch, served)            # while it counts as pending: nobody removes the entry meanwhile
        with dispatch.mutex:
            dispatch.pending -= 1
            if dispatch.pending > 0:
                return
        if self._claim(dispatch):
            self._settle(dispatch)
        else:
            self._tell(self._done, dispatch, 0, 0, 0)

    def _save(self, dispatch: Dispatch, served: int) -> None:
        """See that so many destinations are recorded as served: never again to those who have it.

        Who comes while another writes is written with all who came meanwhile: a thousand destinations do not write the
        envelope of a thousand recipients a thousand times.
        """
        with dispatch.saving:
            if dispatch.saved >= served:
                return
            counted = dispatch.served
            try:
                self.queue.save(dispatch)
                dispatch.saved = counted
            except OSError as error:
                self.storage.report("queue entry %s not recorded, later once more: %s", dispatch.entry.id, error)

    def _settle(self, dispatch: Dispatch) -> None:
        """Bounce what failed, postpone what may still work, remove what is done. Nobody else works on the entry now.

        What cannot be recorded stays claimed and in memory, and is tried again: it must not be sent again.
        """
        try:
            counts = self._settled(dispatch)
        except OSError as error:
            if self.storage.is_away() or not isinstance(error, FileNotFoundError) or self.queue.exists(dispatch.entry.id):
                self.storage.report("queue entry %s cannot be recorded, later once more: %s", dispatch.entry.id, error)
                self._tell(self._again, self._settle, dispatch)
                return
            log.warning("queue entry %s was removed meanwhile", dispatch.entry.id)
            counts = 0, 0, 0
        self.queue.release(dispatch)
        self._tell(self._done, dispatch, *counts)

    def _settled(self, dispatch: Dispatch) -> Tuple[int, int, int]:
        """Return how many recipients have the message, do not get it, may still get it; OSError."""
        entry, before = dispatch.entry, len(dispatch.entry.recipients)
        if (entry.attempts or dispatch.tried) and self.queue.age(entry) >= self.config.give_up:
            self._give_up(entry)
        failed = [recipient for recipient in entry.recipients if recipient["state"] == "failed"]
        self.report(dispatch, [dict(recipient, action="failed") for recipient in failed if wish_of(recipient).wants(
            "FAILURE", True)])
        self.report(dispatch, [dict(recipient, action=recipient.get("action", "relayed")) for recipient in entry.recipients
                               if recipient["state"] == "delivered" and wish_of(recipient).wants("SUCCESS")
                               and not recipient.get("informed")])
        entry.recipients = entry.waiting()
        left = len(entry.recipients)
        warned = self._warn(dispatch)
        if not left:
            self.queue.finish(dispatch)
        elif dispatch.tried or not dispatch.aside:
            self._postpone(dispatch)
        else:
            if left < before or warned:
                self.queue.save(dispatch)
            self.queue.place_hint(dispatch, os.path.join(self.queue.busy, dispatch.aside))
        return before - len(failed) - left, len(failed), left if dispatch.tried else 0

    def _give_up(self, entry: Entry) -> None:
        for recipient in entry.waiting():
            recipient.update(state="failed", status=recipient.get("status") or "4.4.7")
            event("given-up", id=entry.id, recipient=printable(recipient["address"]))

    def _postpone(self, dispatch: Dispatch) -> None:
        entry, now = dispatch.entry, self.clock()
        wait = self.config.retry[min(entry.attempts, len(self.config.retry) - 1)]
        wait *= secrets.SystemRandom().uniform(0.9, 1.1)        # so that not all come back at once
        entry.attempts += 1
        self.queue.postpone(dispatch, now + min(wait, max(1.0, self.config.give_up - self.queue.age(entry))))

    def _warn(self, dispatch: Dispatch) -> bool:
        """Tell the sender, once, that its message is late: who asked for that, and our own users (--warn); OSError.

        Returns whether that has to be recorded now.
        """
        entry, warn = dispatch.entry, self.config.warn
        if not entry.sender or warn is None or entry.extra.get("warned") or self.queue.age(entry) < warn:
            return False
        own = self.stores.book.is_local(parse_address(entry.sender))
        late = [dict(recipient, action="delayed") for recipient in entry.waiting() if wish_of(recipient).wants("DELAY", own)]
        self.report(dispatch, late)
        entry.extra["warned"] = True
        return True

    def report(self, dispatch: Dispatch, recipients: List[Dict[str, Any]]) -> None:
        """Tell the sender about recipients, each with its action; OSError when that cannot be stored now.

        A bounce is never bounced (RFC 5321 section 6.1).
        """
        entry = dispatch.entry
        if not recipients:
            return
        about = printable(" ".join(recipient["address"] for recipient in recipients))
        if not entry.sender:
            event("dropped", id=entry.id, reason="a bounce that cannot be delivered", recipients=about)
            return
        utf8 = entry.smtputf8 or not (entry.sender + about).isascii()
        try:
            id = self._send_notice(parse_address(entry.sender), self._report_blocks(dispatch, recipients), utf8)
        except Refused as refused:
            if refused.reply.code < 500:
                raise OSError(errno.EIO, "bounce not stored: %s" % refused) from None
            event("dropped", id=entry.id, reason="no bounce to %s: %s" % (printable(entry.sender), refused), recipients=about)
            return
        event("bounce" if recipients[0]["action"] == "failed" else "report", id=id, about=entry.id,
              sender=printable(entry.sender), recipients=about)

    def _report_blocks(self, dispatch: Dispatch, recipients: List[Dict[str, Any]]) -> Iterator[bytes]:
        """Yield a report; RET=FULL encloses the whole message where something failed (RFC 3461 section 4.3) and it fits."""
        entry = dispatch.entry
        full = entry.extra.get("ret") == "FULL" and recipients[0]["action"] == "failed" \
            and entry.size + BLOCK < self.config.max_size
        report = Report(self.hostname, entry.sender, entry.id, entry.queued_at, self.clock(), entry.extra.get("envid", ""),
                        entry.queued_at + self.config.give_up, full, entry.eightbit)
        fields, _ = split_headers(pread(dispatch.lock, BLOCK, entry.offset))
        before, original, behind = report_message(report, recipients, b"".join(field for _, field in fields))
        yield before
        if full:
            yield from content_blocks(Outgoing(dispatch.lock, entry.offset, entry.size, "", [], False, False))
        else:
            yield original
        yield behind

    def _send_notice(self, recipient: Address, content: Iterable[bytes], utf8: bool) -> str:
        """Send a message of our own and return its id; what is for nobody we know is for postmaster. Refused."""
        book = self.stores.book
        if book.is_local(recipient):
            try:
                book.resolve(recipient)
            except Refused as refused:
                log.warning("a notice for %s goes to postmaster: %s", printable(str(recipient)), refused)
                recipient = Address("postmaster", "")
        id: str = self.stores.door.send(Envelope(sender="", protocol="bounce", smtputf8=utf8), [recipient], content).draft.id
        return id


NO_REPLY = Reply(451, "4.4.1", "not tried")


def tally(counts: Dict[str, int], name: str, more: int) -> None:
    """Count, and keep nothing of who has none."""
    counts[name] = counts.get(name, 0) + more
    if not counts[name]:
        del counts[name]


def end_when_gone(sock: socket.socket, seconds: float) -> None:
    """End a connection whose other end has been gone for so many seconds, where the system knows how.

    Who only thinks is waited for: a host acknowledges what it was sent, and that it is still there.
    """
    whole = max(4, int(seconds))
    for level, name, value in ((socket.SOL_SOCKET, "SO_KEEPALIVE", 1), (socket.IPPROTO_TCP, "TCP_KEEPIDLE", whole // 2),
                               (socket.IPPROTO_TCP, "TCP_KEEPINTVL", whole // 4), (socket.IPPROTO_TCP, "TCP_KEEPCNT", 2),
                               (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 1000 * whole)):
        with contextlib.suppress(OSError, AttributeError, OverflowError):
            sock.setsockopt(level, getattr(socket, name), value)


def wish_of(recipient: Dict[str, Any]) -> Wish:
    """Return what the sender wants to be told of a recipient in the queue."""
    return Wish(str(recipient.get("notify") or ""), str(recipient.get("orcpt") or ""))


def tls_context(verify: bool) -> "ssl.SSLContext":
    """Return a client's context; CannotRun where Python has no TLS. Made anew, as the authorities trusted may change."""
    try:
        import ssl
    except ImportError:
        raise CannotRun("this Python has no ssl module") from None
    if verify:
        context = ssl.create_default_context()
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


# The commands.

def queue_command(config: Config, arguments: List[str]) -> int:
    """Look into the queue, or move things along in it."""
    parser = Parser(prog="minimail.py queue", description=queue_command.__doc__)
    parser.add_argument("action", nargs="?", default="list", choices=["list", "flush", "retry", "drop"])
    parser.add_argument("id", nargs="?", metavar="ID")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    given = parser.parse_args(arguments)
    if (given.action in ("retry", "drop")) is (given.id is None):
        raise UsageError("queue %s: %s" % (given.action, "needs an ID" if given.id is None else "takes no ID"))
    queue = Queue(Storage(config.data, not config.no_sync), config)
    if given.action == "list":
        list_queue(queue, given.json)
        return 0
    ids = queue.ids()
    if given.id is not None:
        ids = [id for id in ids if id == given.id]
        if not ids:
            raise CannotRun("no message %s in the queue" % printable(given.id))
    hints = {os.path.basename(hint): hint for hint in queue.hints()}
    for id in ids:
        entry, drop = queue.read(id), given.action == "drop"
        done = move_along(queue, Dispatch(entry, hints.get(id, "")), drop) if entry else drop and queue.discard(id)
        if not done and given.id is not None:
            raise CannotRun("%s is being sent right now, try again" % id if entry or drop else
                            "%s cannot be sent like that: put its envelope back, or say queue drop %s" % (id, id))
    queue.storage.wake("flush")
    return 0


def move_along(queue: Queue, dispatch: Dispatch, drop: bool) -> bool:
    """Remove an entry, or make it due now; False when somebody works on it. OSError."""
    if not queue.claim(dispatch):
        return False
    if drop:
        queue.finish(dispatch)
        return True
    dispatch.entry.next_attempt = queue.clock()
    queue.save(dispatch)
    queue.place_hint(dispatch, queue.new)
    queue.release(dispatch)
    return True


def list_queue(queue: Queue, as_json: bool) -> None:
    """Print all entries, one after the other: there may be a million."""
    shown = ("id", "sender", "size", "queued_at", "next_attempt", "attempts")
    before = "["
    for entry in queue.entries():
        if not as_json:
            print_entry(entry)
            continue
        fields = dict({name: getattr(entry, name) for name in shown}, recipients=entry.waiting())
        print(before + json.dumps(fields), end="")
        before = ",\n "
    if as_json:
        print("]" if before != "[" else "[]")


def print_entry(entry: Entry) -> None:
    def moment(seconds: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    print("%s %9d %s <%s> attempts=%d next=%s" % (
        entry.id, entry.size, moment(entry.queued_at), printable(entry.sender), entry.attempts, moment(entry.next_attempt)))
    for recipient in entry.waiting():
        print("    %s: %s" % (printable(recipient["address"]), recipient["last_reply"] or "not tried yet"))


def mx_command(config: Config, arguments: List[str]) -> int:
    """Say where mail for a domain or an address would go, and why, without sending anything."""
    parser = Parser(prog="minimail.py mx", description=mx_command.__doc__)
    parser.add_argument("where", metavar="DOMAIN")
    given = parser.parse_args(arguments)
    where = given.where
    try:
        address = parse_address(where) if "@" in where else Address("postmaster", where)
        if domain_literal(address.domain) is None:
            ascii_domain(parse_domain(address.domain))
    except (Refused, ValueError) as error:
        raise UsageError("mx %s: %s" % (printable(where), error)) from None
    hostname = config.hostname or machine_name()
    book = AddressBook(config.domain, Accounts(config.file("users")), config.file("aliases"), config.catch_all, hostname)
    address = book.qualified(address) if config.domain else address
    if config.domain and book.is_local(address):
        return explain_local(book, address, "@" in where)
    routes = Routes(config, hostname, Resolver(config.dns), config.smtp)
    target = routes.target(address)
    try:
        hosts = routes.exchangers(target)
    except Undeliverable as error:
        print("%s: %s" % (printable(where), error.reply))
        return 1
    ttl = min(host.ttl for host in hosts)
    why = "by --smarthost %s" % str(target.server) if target.key == "smarthost" else \
        "by --route to %s" % str(target.server) if target.server else "address literal" if domain_literal(target.domain) else \
        "by the exchangers in DNS (TTL %d)" % ttl if hosts[0].host != target.domain else \
        "no MX record, by the domain's own address (TTL %d)" % ttl
    print("%s: %s" % (printable(where), why))
    for section in EXTENSIONS:
        outbound = section.outbound(config, None, routes.resolver)
        demands = outbound.explain(target) if outbound else ""
        print("demanded: %s\n" % demands if demands else "", end="")
    for host in hosts:
        print("%d %s %s" % (host.preference, host.host or address.domain, " ".join(host.addresses)))
    return 0


def explain_local(book: AddressBook, address: Address, whole: bool) -> int:
    if not whole:
        print("%s: local, its mail is kept here" % address.domain)
        return 0
    try:
        found = book.resolve(address)
    except Refused as refused:
        print("%s: %s" % (printable(str(address)), refused.reply))
        return 1
    key = book.key(address)
    print("%s: %s" % (str(address), "local mailbox" if found.mailboxes == [key] and not found.remote else "local, by alias"))
    for mailbox in found.mailboxes:
        print("0 mailbox %s" % mailbox)
    for remote in found.remote:
        print("0 remote %s" % str(remote))
    return 0


# What sendmail(8) takes. sysexits(3), as those who call it check them:
EX_DATAERR, EX_NOUSER, EX_NOHOST, EX_UNAVAILABLE, EX_NOPERM = 65, 67, 68, 69, 77
FLAGS_WITH_VALUE = "ABCDFLMNORVXbefhopr"            # in the same word or the next; others may have one attached
MBOX_LINE = expression(rb">?From ")
ODD_LINE_END = expression(rb"(?<!\r)\r+\n|\r")      # CRLF, CR CR LF, or CR alone; the look-behind keeps long runs cheap
DROPPED_FIELDS = ("bcc", "resent-bcc", "return-path", "content-length")
ORIGINATORS = ("from", "sender", "reply-to", "to", "cc")


class NotSent(CannotRun):
    """A message that `sendmail` did not take over, and the exit status that says why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__("sendmail: " + text)
        self.status = status


def exit_status(reply: Reply) -> int:
    if reply.code < 500:
        return EX_TEMPFAIL
    known = {"5.1.1": EX_NOUSER, "5.1.2": EX_NOHOST, "5.1.3": EX_DATAERR, "5.7.1": EX_NOPERM}
    return known.get(reply.enhanced, EX_UNAVAILABLE)


def sendmail_command(config: Config, arguments: List[str]) -> int:
    """Take a message on standard input, as /usr/sbin/sendmail does, and queue it durably."""
    flags, words = sendmail_flags(arguments)
    given = dict(flags)
    mode = given.get("b", "q" if "q" in given else "i" if "I" in given else "m")
    if "help" in given:
        print(SENDMAIL_HELP, end="")
        return 0
    if mode in ("p", "q"):
        return queue_command(config, ["list" if mode == "p" else "flush"])
    if mode == "i":                                 # newaliases: they are read when they change
        return 0
    if mode not in ("m", "v"):
        raise UsageError("sendmail -b%s: only -bm, -bs, -bp, -bi and -bv are possible" % printable(mode, 20))
    refuse_unused(config.data)
    stores = open_stores(config)
    try:
        if mode == "v":
            return verify(stores, words)
        return submit(stores, flags, words)
    finally:
        stores.accounts.hashing.close()


SENDMAIL_HELP = """\
usage: minimail.py sendmail [-t] [-i] [-f FROM] [-F NAME] [TO ...] [options]

Takes a message on standard input, as /usr/sbin/sendmail does, and queues it durably.
  -t           recipients also from To, Cc and Bcc (or from Resent-To, Resent-Cc, Resent-Bcc)
  -i, -oi      a line with a single dot does not end the message
  -f, -r FROM  envelope sender             -F NAME  the sender's full name
  -N WHEN      notices: never, or some of success,failure,delay
  -R WHAT      what a bounce returns: full or hdrs      -V ID  an id that it returns, too
  -bs          speak SMTP on standard input and output
  -bp, -q      list the queue, try all of it now (mailq is -bp)
  -bv          only say whether the recipients would be taken
All other flags of sendmail(8) are taken and mean nothing here; the exit status is one of
sysexits(3).
"""


def sendmail_flags(words: Sequence[str]) -> Tuple[List[Tuple[str, str]], List[str]]:
    """Return ([(flag, value)], recipients) by the rules of getopt(3), flags in any place; UsageError."""
    flags: List[Tuple[str, str]] = []
    recipients: List[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            recipients += left
        elif word in ("--help", "--version"):
            flags.append((word[2:], ""))
        elif word.startswith("--"):
            raise UsageError("sendmail: " + show_word(word))
        elif not word.startswith("-"):
            recipients.append(word)
        else:
            flags += word_flags(word[1:], left)
    return flags, recipients


def word_flags(letters: str, left: Iterator[str]) -> Iterator[Tuple[str, str]]:
    """Yield the flags in one word; the last one's value may be the next word."""
    for at, letter in enumerate(letters):
        rest = letters[at + 1:]
        if letter in FLAGS_WITH_VALUE:
            value = rest or next(left, None)
            if value is None:
                raise UsageError("sendmail: -%s needs a value" % letter)
            yield letter, value
            return
        yield letter, rest
        if letter in "qdQ":
            return


class Submission:
    """A message as a local program writes it: line ends of any kind, perhaps an mbox line first, perhaps no header at all.

    The header is held in `fields`, with LF; the body comes in blocks, with CRLF. Without `dots` a lone dot ends it.
    """

    def __init__(self, file: Any, dots: bool) -> None:
        lines = self._lines(file)
        self._blocks = lines if dots else self._until_dot(lines)
        self._ahead = bytearray()                   # read, but not taken
        self.fields: List[Tuple[str, bytes]] = []
        self.read_header()

    @staticmethod
    def _lines(file: Any) -> Iterator[bytes]:
        """Yield the text in blocks with LF as the only line end."""
        held = b""                                  # CRs that an LF may follow
        for raw in iter(lambda: file.read1(BLOCK), b""):
            data = held + raw
            text = data.rstrip(b"\r")
            if len(data) - len(text) > BLOCK:       # no line end, whatever follows
                text = data
            held = data[len(text):]
            if text:
                yield ODD_LINE_END.sub(b"\n", text) if b"\r" in text else text
        if held:
            yield b"\n"

    @staticmethod
    def _until_dot(blocks: Iterator[bytes]) -> Iterator[bytes]:
        """Yield blocks up to a line that is a single dot."""
        held, fresh = b"", True                     # a dot that began a line; are we at the beginning of one?
        for block in blocks:
            data = held + block
            end = -1 if fresh and data.startswith(b".\n") else data.find(b"\n.\n")
            if end >= 0 or data.startswith(b".\n") and fresh:
                yield data[:end + 1]
                return
            held = b"." if data.endswith(b"\n.") or fresh and data == b"." else b""
            data = data[:len(data) - len(held)]
            if data:
                fresh = data.endswith(b"\n")
                yield data

    def _line(self) -> bytes:
        """Return the next line, or the beginning of one that is too long for a header; b"" at the end."""
        looked = 0
        while self._ahead.find(b"\n", looked) < 0 and len(self._ahead) <= MAX_SUBMITTED_HEADER:
            looked = len(self._ahead)
            block = next(self._blocks, None)
            if block is None:
                break
            self._ahead += block
        size = self._ahead.find(b"\n", looked) + 1 or len(self._ahead)
        line = bytes(self._ahead[:size])
        del self._ahead[:size]
        return line

    def read_header(self) -> None:
        """Read `fields`: as far as lines look like a header; what follows, with an empty line or not, is the body. NotSent."""
        line = self._line()
        if MBOX_LINE.match(line):
            line = self._line()
        pieces: List[List[bytes]] = []
        size = 0
        while line.strip(b"\n"):
            if pieces and line[:1] in (b" ", b"\t"):
                pieces[-1].append(line)
            elif FIELD_START.match(line):
                pieces.append([line])
            else:
                break
            size += len(line)
            if size > MAX_SUBMITTED_HEADER:
                raise NotSent(EX_DATAERR, "the header is larger than %d bytes" % MAX_SUBMITTED_HEADER)
            line = self._line()
        if line != b"\n":
            self._ahead[:0] = line
        for piece in pieces:
            name = piece[0].partition(b":")[0].strip().decode("ascii").lower()
            self.fields.append((name, b"".join(piece).rstrip(b"\n") + b"\n"))

    @property
    def resent(self) -> str:
        """The prefix of the fields that count: "resent-" when somebody passes a message on (RFC 5322 section 3.6.6)."""
        return "resent-" if any(name.startswith("resent-") for name, _ in self.fields) else ""

    def recipients(self) -> List[str]:
        """Return the addresses in To, Cc and Bcc, or their Resent- counterparts."""
        names = [self.resent + name for name in ("to", "cc", "bcc")]
        values = [unfold(field.partition(b":")[2]) for name, field in self.fields if name in names]
        return [address for value in values for _, address in read_addresses(value) if address]

    def body(self) -> Iterator[bytes]:
        yield bytes(self._ahead).replace(b"\n", b"\r\n")
        for block in self._blocks:
            yield block.replace(b"\n", b"\r\n")


def submit(stores: Stores, flags: List[Tuple[str, str]], words: Sequence[str]) -> int:
    """Queue the message on standard input for whom it can go to; what else is named comes back to the sender. NotSent."""
    given = dict(flags)
    dots = "i" in given or ("o", "i") in flags
    message = Submission(getattr(sys.stdin, "buffer", None) or io.BytesIO(), dots)
    names = [address for word in words for _, address in read_addresses(word) or [("", word)] if address]
    names += message.recipients() if "t" in given else []
    if not names:
        raise UsageError("sendmail: no recipients: name them, or use -t with To, Cc or Bcc headers")
    if len(names) > MAX_SUBMITTED_NAMES:
        raise NotSent(EX_DATAERR, "more than %d recipients" % MAX_SUBMITTED_NAMES)
    sender = local_sender(stores.book, given.get("f", given.get("r")))
    envelope = Envelope(sender=sender, protocol="local", trusted=True)
    destinations, failed = sort_recipients(stores, envelope, list(dict.fromkeys(names)))
    ask_for_notices(envelope, given)
    later = [pair for pair in failed if pair[1].code < 500 and pair[1].enhanced != "4.5.3"]
    failed = later or failed                        # then nothing is sent, and the caller tries all of it again
    head = submission_headers(message, sender or "mailer-daemon@" + stores.book.home, given.get("F", ""), stores)
    if later or not destinations:
        raise NotSent(exit_status(failed[0][1]), "%s: %s; nothing was sent" % (printable(failed[0][0], 200), failed[0][1]))
    id = store(stores, envelope, destinations, head, message)
    if failed:
        send_back(stores, id, sender, failed, head)
    return 0


def ask_for_notices(envelope: Envelope, given: Dict[str, str]) -> None:
    """Note what -N, -R and -V ask for; UsageError."""
    try:
        said = {"RET": given.get("R", ""), "ENVID": xtext_encode(given.get("V", ""))}
        envelope.ret, envelope.envid = parse_dsn_of_mail(said)
        if given.get("N"):
            wish = parse_dsn_of_rcpt({"NOTIFY": given["N"]})
            envelope.wishes = {address.key: wish for address in envelope.recipients}
    except Refused as refused:
        raise UsageError("sendmail: %s (-N, -R, -V)" % refused.reply.text) from None


def sort_recipients(stores: Stores, envelope: Envelope, names: Sequence[str]) \
        -> Tuple[List[Destinations], List[Tuple[str, Reply]]]:
    """Put those that can be reached into the envelope; return their destinations, and the others with what is wrong."""
    destinations: List[Destinations] = []
    failed: List[Tuple[str, Reply]] = []
    for name in names:
        try:
            address = stores.book.qualified(parse_address(name, lenient=True))
            destinations.append(stores.door.recipient(envelope, address, trusted=True))
        except Refused as refused:
            failed.append((name, refused.reply))
    envelope.smtputf8 = not all(map(str.isascii, [envelope.sender] + list(map(str, envelope.recipients))))
    return destinations, failed


def store(stores: Stores, envelope: Envelope, destinations: List[Destinations], head: bytes, message: Submission) -> str:
    """Write the message to disk as it comes in and return its id; NotSent."""
    content = itertools.chain([head + b"\r\n"], message.body())
    try:
        parcel = stores.door.post_all(envelope, destinations, content)
    except Refused as refused:
        raise NotSent(exit_status(refused.reply), "not accepted: " + str(refused.reply)) from None
    event("message", id=envelope.id, client="local", sender=printable(envelope.sender), recipients=len(envelope.recipients),
          size=parcel.draft.size)
    return envelope.id


def send_back(stores: Stores, id: str, sender: str, failed: List[Tuple[str, Reply]], head: bytes) -> None:
    """Tell the sender who did not get it, or postmaster when that is nobody here; NotSent when nobody can be told."""
    failures = [{"address": printable(name, 300), "last_reply": str(reply)} for name, reply in failed]
    now = time.time()
    content = b"".join(report_message(Report(stores.hostname, sender, id, now, now), failures, head[:BLOCK]))
    for address in (parse_address(sender, lenient=True), Address("postmaster", "")) if sender else ():
        envelope = Envelope(protocol="bounce", smtputf8=not content.isascii())
        try:
            stores.door.send(envelope, [address], content)
            event("bounce", id=envelope.id, about=id, sender=printable(sender), recipients=len(failed))
            return
        except Refused as refused:
            event("undeliverable", id=envelope.id, about=id, sender=printable(str(address)), reason=str(refused))
    name, reply = failed[0]
    raise NotSent(exit_status(reply), "%s: %s; the others were sent to" % (printable(name, 200), reply))


def verify(stores: Stores, words: Sequence[str]) -> int:
    """Say of each recipient whether mail for it would be taken."""
    status = 0
    for word in words:
        _, failed = sort_recipients(stores, Envelope(), [address for _, address in read_addresses(word)] or [word])
        print("%s: %s" % (printable(word, 200), str(failed[0][1]) if failed else "deliverable"))
        status = status or (exit_status(failed[0][1]) if failed else 0)
    return status


def login_name() -> str:
    named = next(filter(None, map(os.environ.get, ("LOGNAME", "USER", "LNAME", "USERNAME"))), None)
    try:
        import pwd
        return named or pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError, OSError):        # Windows has no pwd
        return named or "nobody"


def local_sender(book: AddressBook, text: Optional[str]) -> str:
    """Return the reverse-path that a local user asked for, or the own one; what is no address is told and not used."""
    if text is not None and text.strip() in ("", "<>"):
        return ""
    own = str(book.qualified(Address(re.sub(r"[^A-Za-z0-9._-]", "-", login_name()), "")))
    if text is None:
        return own
    try:
        return str(book.qualified(parse_address(next((address for _, address in read_addresses(text)), text), lenient=True)))
    except Refused:
        log.warning("sendmail -f: %s is no address, %s is used", printable(text, 200), own)
        return own


def submission_headers(message: Submission, sender: str, name: str, stores: Stores) -> bytes:
    """Return a local program's headers as they go out: without Bcc, with Date, From and Message-ID, bare names with our
    domain (RFC 6409 section 8); for a message passed on, the Resent- fields are those that must be there."""
    prefix, present = message.resent, {field for field, _ in message.fields}
    lines = [qualify_field(field, stores.book.home) if name.replace("resent-", "") in ORIGINATORS else field
             for name, field in message.fields if name not in DROPPED_FIELDS]
    head = b"".join(lines).replace(b"\n", b"\r\n")
    now = time.time()
    added = (("Date", rfc5322_date(int(now))), ("From", show_mailbox(name, sender)),
             ("Message-ID", "<%x.%s@%s>" % (int(now), os.urandom(6).hex(), stores.hostname)))
    for field, value in added:
        if prefix + field.lower() not in present:
            head += ("%s%s: %s\r\n" % (prefix.title(), field, value)).encode("utf-8")
    return head


ADDRESS_TOKEN = expression(rb'"(?:[^"\\]|\\.)*"|\\.|\s+|[^\s()<>,;:"\\]+|.', re.DOTALL)


def qualify_field(field: bytes, home: str) -> bytes:
    """Return an address field with @home after each bare name: `From: root (Cron Daemon)` is refused elsewhere.

    A bare name is one word without @, alone between commas or in angle brackets; names of groups and of people are not.
    """
    start = field.index(b":") + 1
    ends: List[int] = []                            # where something is to be put in
    words: List[Tuple[int, int]] = []               # (start, end) of runs without a blank
    depth, closed = 0, False                        # in comments; after an angle address

    def settle() -> None:
        if len(words) == 1 and not closed and b"@" not in field[words[0][0]:words[0][1]]:
            ends.append(words[0][1])
        words.clear()
    for token in ADDRESS_TOKEN.finditer(field, start):
        text = token.group()
        depth = max(0, depth + (text == b"(") - (text == b")"))
        if depth or text == b")" or text.isspace():
            continue
        if text in (b",", b";"):
            settle()
            closed = False
        elif text == b">":
            settle()
            closed = True
        elif text in (b"<", b":"):
            words.clear()
        elif words and words[-1][1] == token.start():
            words[-1] = words[-1][0], token.end()
        else:
            words.append((token.start(), token.end()))
    settle()
    pieces, done = [], 0
    for end in ends:
        pieces += [field[done:end], b"@" + home.encode("utf-8")]
        done = end
    return b"".join(pieces) + field[done:]


def show_mailbox(name: str, address: str) -> str:
    """Return `Name <address>` for a header; the name as a program gave it, in UTF-8 or Latin-1, on one line."""
    raw = os.fsencode(name)
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = raw.decode("latin-1")
    name = "".join(c if c.isprintable() else " " for c in name).strip()[:200]
    if not name:
        return address
    if name.isascii():
        return '"%s" <%s>' % (re.sub(r'([\\"])', r"\\\1", name), address)
    import email.header
    return "%s <%s>" % (email.header.Header(name, "utf-8", maxlinelen=70).encode(linesep="\r\n"), address)


def relay_config(config: Config) -> Config:
    """Return a node's options as the relay has to see them now: a file that holds one may have changed."""
    now = {name: config.current(name) for name in ("smarthost", "route", "rewrite", "release")}
    if config.capture:                              # only what is released by hand gets there
        now.update(smarthost=now["release"], route=())
    return dataclasses.replace(config, **now) if config.capture or config.sources else config


class RelayExtension(Extension):
    """The queue and the relay."""

    name = "relay"
    commands = {"queue": queue_command, "mx": mx_command, "sendmail": sendmail_command}

    def listeners(self, config: Config) -> List[Any]:
        """See that all servers can be spoken to: a Python without TLS cannot use it; CannotRun."""
        routes = [("--route", server) for _, server in config.route]
        for option, server in [("--smarthost", config.smarthost), ("--release", config.release), *routes]:
            if server and server.tls:
                try:
                    tls_context(False)
                except CannotRun as error:
                    raise CannotRun("%s %s: %s; use another Python, or smtp://" % (option, server, error)) from None
        return []

    def queue(self, storage: Storage, config: Config, clock: Callable[[], float]) -> Queue:
        return Queue(storage, config, clock)

    def equip(self, node: Any) -> None:
        node.relay = None
        if node.stores.post.queue and node.relays:
            resolver = Zone(node.zone).resolver() if node.zone is not None else node.resolver or Resolver(node.config.dns)
            own = [endpoint for name, endpoint in node.endpoints() if name in ("smtp", "smtps")]
            node.relay = Relay(relay_config(node.config), node.stores, resolver, own, node.clock,
                               options=lambda: relay_config(node.config))

    def start(self, node: Any) -> None:
        if node.relay:
            node.relay.start()

    def stop(self, node: Any) -> None:
        if node.relay:
            node.relay.stop()

    def join(self, node: Any, seconds: float) -> None:
        if node.relay:
            node.relay.join(seconds)


EXTENSIONS.append(RelayExtension())


# ======================================================================================================================
# 13  Standing: what makes others trust this node. DKIM signatures, SRS for forwards, the MTA-STS policies of others, SPF as
#     others read it, and `check`, which looks at all of it. Keys, addresses, records and policies are read and written by
#     pure functions; queue, client and sessions know nothing of them but the calls of an Extension and an Outbound.
# ======================================================================================================================

# Keys: DER (ITU-T X.690) and PEM, just as much of both as keys and certificates need.

BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, NULL, OID, SEQUENCE = 1, 2, 3, 4, 5, 6, 0x30
RSA_OID, ED25519_OID, SAN_OID = (bytes.fromhex(text) for text in ("2a864886f70d010101", "2b6570", "551d11"))
PEM = expression(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----([^-]+)-----END ")


class DER:
    """Reads one element after the other; nothing in it calls itself, so no nesting can exhaust it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def next_tag(self) -> int:
        """Return the tag of the next element; -1 at the end."""
        return self.data[self.at] if self.at < len(self.data) else -1

    def take(self, *tags: int) -> bytes:
        """Return the content of the next element, which must have one of these tags (none given: any); ValueError."""
        tag, at = self.next_tag(), self.at + 2
        if tag < 0 or at > len(self.data) or (tags and tag not in tags):
            raise ValueError("not the DER element that belongs here")
        size = self.data[at - 1]
        if size > 127:
            count = size & 127
            if not 1 <= count <= 4 or at + count > len(self.data):
                raise ValueError("bad DER length")
            size = int.from_bytes(self.data[at:at + count], "big")
            at += count
        if at + size > len(self.data):
            raise ValueError("DER element runs over the end")
        self.at = at + size
        return self.data[at:at + size]

    def inside(self, *tags: int) -> "DER":
        return DER(self.take(*tags))

    def integer(self) -> int:
        """Return a number that is not negative; ValueError."""
        content = self.take(INTEGER)
        if not content or content[0] & 128:
            raise ValueError("not a positive number")
        return int.from_bytes(content, "big")


def der(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    if len(content) < 128:
        return bytes([tag, len(content)]) + content
    size = len(content).to_bytes((len(content).bit_length() + 7) // 8, "big")
    return bytes([tag, 128 | len(size)]) + size + content


def der_integer(number: int) -> bytes:
    return der(INTEGER, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def pem(label: str, data: bytes) -> bytes:
    text = base64.b64encode(data).decode()
    lines = [text[start:start + 64] for start in range(0, len(text), 64)]
    return "\n".join(["-----BEGIN %s-----" % label] + lines + ["-----END %s-----" % label, ""]).encode()


def unpem(text: bytes, what: str, *labels: bytes) -> Tuple[bytes, DER]:
    """Return (label, content) of the first sequence that a PEM file holds under one of these labels; ValueError."""
    if len(text) > MAX_KEY_FILE:
        raise ValueError("larger than %d bytes: no key" % MAX_KEY_FILE)
    for label, body in PEM.findall(text):
        if label in labels:
            return label, DER(base64.b64decode(b"".join(body.split()), validate=True)).inside(SEQUENCE)
    raise ValueError("no %s in PEM form" % what)


class RSAKey:
    """An RSA key pair (RFC 8017). Signs with the Chinese remainders, which takes a quarter of the time."""

    kind, algorithm = "rsa", "rsa-sha256"
    PREFIX = bytes.fromhex("3031300d060960864801650304020105000420")    # DigestInfo of SHA-256 (RFC 8017 section 9.2)

    def __init__(self, p: int, q: int, e: int = 65537) -> None:
        """ValueError when these cannot be a key's numbers, or are too small or large to be of use."""
        self.n, self.e, self.p, self.q = p * q, e, p, q
        self.bits = self.n.bit_length()
        if not 1024 <= self.bits <= MAX_KEY_BITS:
            raise ValueError("an RSA key of %d bits; 1024 to %d are possible" % (self.bits, MAX_KEY_BITS))  # RFC 8301
        if p == q or not p & q & e & 1 or not 3 <= e < 1 << 64 or min(p, q) < 1 << 256:
            raise ValueError("not the numbers of an RSA key")
        self.dp, self.dq, self.inverse = pow(e, -1, p - 1), pow(e, -1, q - 1), pow(q, -1, p)
        self.sign(bytes(32))

    @classmethod
    def generate(cls, bits: int) -> "RSAKey":
        """Return a new key; 2,048 bits take a second or so."""
        while True:
            p, q = random_prime(bits // 2), random_prime(bits - bits // 2)
            if abs(p - q) >> (bits // 2 - 100):     # FIPS 186-5 section A.1.3; all but impossible
                return cls(p, q)

    @classmethod
    def read(cls, numbers: DER) -> "RSAKey":
        """Return the key in an RSAPrivateKey (RFC 8017 section A.1.2); ValueError."""
        version, n, e, _, p, q = [numbers.integer() for _ in range(6)]
        if version or p * q != n:
            raise ValueError("not the numbers of an RSA key")
        return cls(p, q, e)

    def encode(self) -> bytes:
        """Return the key as PKCS#8 (RFC 5958)."""
        d = pow(self.e, -1, (self.p - 1) * (self.q - 1))
        numbers = (0, self.n, self.e, d, self.p, self.q, self.dp, self.dq, self.inverse)
        return der(SEQUENCE, der_integer(0), der(SEQUENCE, der(OID, RSA_OID), der(NULL)),
                   der(OCTET_STRING, der(SEQUENCE, *map(der_integer, numbers))))

    def public(self) -> bytes:
        """Return what goes into the record's p= (RFC 6376 section 3.6.1): a SubjectPublicKeyInfo."""
        key = der(SEQUENCE, der_integer(self.n), der_integer(self.e))
        return der(SEQUENCE, der(SEQUENCE, der(OID, RSA_OID), der(NULL)), der(BIT_STRING, b"\0", key))

    def sign(self, digest: bytes) -> bytes:
        """Return the signature over a SHA-256 digest. ValueError when it is wrong: half of a wrong one tells the key."""
        message = rsa_padded(digest, self.n)
        blind = secrets.randbelow(self.n - 2) + 2   # the time it takes says nothing about the key
        hidden = message * pow(blind, self.e, self.n) % self.n
        by_p, by_q = pow(hidden, self.dp, self.p), pow(hidden, self.dq, self.q)
        signed = (by_q + (by_p - by_q) * self.inverse % self.p * self.q) * pow(blind, -1, self.n) % self.n
        if pow(signed, self.e, self.n) != message:
            raise ValueError("not the numbers of an RSA key")
        return signed.to_bytes((self.bits + 7) // 8, "big")


def rsa_padded(digest: bytes, n: int) -> int:
    """Return EMSA-PKCS1-v1_5 of a digest (RFC 8017 section 9.2)."""
    size = (n.bit_length() + 7) // 8
    return int.from_bytes(b"\0\1" + (b"\0" + RSAKey.PREFIX + digest).rjust(size - 2, b"\xff"), "big")


def rsa_verifies(public: bytes, signature: bytes, digest: bytes) -> bool:
    """Return whether a signature is that of the key in a SubjectPublicKeyInfo, or bare; ValueError when that is none."""
    key = DER(public).inside(SEQUENCE)
    if key.next_tag() == SEQUENCE:
        if key.inside(SEQUENCE).take(OID) != RSA_OID:
            raise ValueError("not an RSA key")
        key = DER(key.take(BIT_STRING)[1:]).inside(SEQUENCE)
    n, e = key.integer(), key.integer()
    if n.bit_length() > MAX_KEY_BITS or e >= 1 << 64 or n < 1 << 512:
        raise ValueError("an RSA key of %d bits" % n.bit_length())
    return pow(int.from_bytes(signature, "big"), e, n) == rsa_padded(digest, n)


def random_prime(bits: int) -> int:
    """Return a random prime, its two topmost bits set, that fits an exponent of 65537."""
    small = [n for n in range(3, 1000, 2) if all(n % divisor for divisor in range(3, 32, 2) if divisor < n)]
    while True:
        n = secrets.randbits(bits) | 3 << (bits - 2) | 1
        if n % 65537 != 1 and all(n % prime for prime in small) and is_prime(n):
            return n


def is_prime(n: int) -> bool:
    """Return whether an odd number is a prime, wrong at most once in 4**20 (Miller and Rabin)."""
    odd, twos = n - 1, 0
    while not odd & 1:
        odd, twos = odd >> 1, twos + 1
    for _ in range(20):
        x = pow(secrets.randbelow(n - 3) + 2, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


Point: TypeAlias = "Tuple[int, int, int, int]"     # X, Y, Z, T: x = X/Z, y = Y/Z, xy = T/Z (RFC 8032 section 5.1.4)
CURVE_FIELD = 2 ** 255 - 19
CURVE_ORDER = 2 ** 252 + 27742317777372353535851937790883648493
CURVE = -121665 * pow(121666, CURVE_FIELD - 2, CURVE_FIELD) % CURVE_FIELD


def curve_add(a: Point, b: Point) -> Point:
    u, v = (a[1] - a[0]) * (b[1] - b[0]) % CURVE_FIELD, (a[1] + a[0]) * (b[1] + b[0]) % CURVE_FIELD
    w, z = 2 * a[3] * b[3] * CURVE % CURVE_FIELD, 2 * a[2] * b[2] % CURVE_FIELD
    e, f, g, h = v - u, z - w, z + w, v + u
    return e * f % CURVE_FIELD, g * h % CURVE_FIELD, f * g % CURVE_FIELD, e * h % CURVE_FIELD


def curve_multiply(number: int, point: Point) -> Point:
    result: Point = (0, 1, 1, 0)
    while number:
        if number & 1:
            result = curve_add(result, point)
        point = curve_add(point, point)
        number >>= 1
    return result


def curve_encode(point: Point) -> bytes:
    scale = pow(point[2], CURVE_FIELD - 2, CURVE_FIELD)
    x, y = point[0] * scale % CURVE_FIELD, point[1] * scale % CURVE_FIELD
    return (y | (x & 1) << 255).to_bytes(32, "little")


def curve_decode(data: bytes) -> Point:
    """Return the point (RFC 8032 section 5.1.3); ValueError when there is none."""
    y = int.from_bytes(data, "little")
    sign, y = y >> 255, y & ((1 << 255) - 1)
    square = (y * y - 1) * pow(CURVE * y * y + 1, CURVE_FIELD - 2, CURVE_FIELD) % CURVE_FIELD
    x = pow(square, (CURVE_FIELD + 3) // 8, CURVE_FIELD)
    if (x * x - square) % CURVE_FIELD:
        x = x * pow(2, (CURVE_FIELD - 1) // 4, CURVE_FIELD) % CURVE_FIELD
    if len(data) != 32 or y >= CURVE_FIELD or (x * x - square) % CURVE_FIELD or (sign and not x):
        raise ValueError("not a point of the curve")
    x = CURVE_FIELD - x if x & 1 != sign else x
    return x, y, 1, x * y % CURVE_FIELD


BASE = curve_decode(bytes([0x58]) + bytes([0x66]) * 31)


class Ed25519Key:
    """An Ed25519 key pair (RFC 8032 section 5.1)."""

    kind, algorithm, bits = "ed25519", "ed25519-sha256", 256

    def __init__(self, seed: bytes) -> None:
        if len(seed) != 32:
            raise ValueError("an Ed25519 key of %d bytes" % len(seed))
        self.seed = seed
        digest = hashlib.sha512(seed).digest()
        self.scalar = int.from_bytes(digest[:32], "little") & ((1 << 254) - 8) | 1 << 254
        self.prefix = digest[32:]
        self._public = curve_encode(curve_multiply(self.scalar, BASE))

    @classmethod
    def generate(cls, bits: int) -> "Ed25519Key":
        return cls(secrets.token_bytes(32))

    def encode(self) -> bytes:
        """Return the key as PKCS#8 (RFC 8410 section 7)."""
        return der(SEQUENCE, der_integer(0), der(SEQUENCE, der(OID, ED25519_OID)),
                   der(OCTET_STRING, der(OCTET_STRING, self.seed)))

    def public(self) -> bytes:
        """Return what goes into the record's p= (RFC 8463 section 4): the bare 32 bytes."""
        return self._public

    def sign(self, digest: bytes) -> bytes:
        """Return the signature over a SHA-256 digest (RFC 8463 section 3)."""
        r = number_of(self.prefix, digest)
        point = curve_encode(curve_multiply(r, BASE))
        s = (r + number_of(point, self._public, digest) * self.scalar) % CURVE_ORDER
        return point + s.to_bytes(32, "little")


def number_of(*parts: bytes) -> int:
    return int.from_bytes(hashlib.sha512(b"".join(parts)).digest(), "little") % CURVE_ORDER


def ed25519_verifies(public: bytes, signature: bytes, digest: bytes) -> bool:
    """Return whether a signature is that of a public key (RFC 8032 section 5.1.7); ValueError when that is none."""
    key = curve_decode(public)
    s = int.from_bytes(signature[32:], "little")
    right = curve_add(curve_decode(signature[:32]), curve_multiply(number_of(signature[:32], public, digest), key))
    return len(signature) == 64 and s < CURVE_ORDER and curve_encode(curve_multiply(s, BASE)) == curve_encode(right)


SigningKey: TypeAlias = "Union[RSAKey, Ed25519Key]"


def read_key(text: bytes) -> SigningKey:
    """Return the private key in a PEM file as OpenSSL and OpenDKIM write it, PKCS#1 or PKCS#8; ValueError says why not."""
    if b"ENCRYPTED" in text:
        raise ValueError("the key has a passphrase: take it off, as with `openssl pkey -in FILE -out FILE2`")
    label, outer = unpem(text, "private key", b"RSA PRIVATE KEY", b"PRIVATE KEY")
    if label == b"RSA PRIVATE KEY":
        return RSAKey.read(outer)
    outer.integer()
    kind = outer.inside(SEQUENCE).take(OID)
    inner = outer.inside(OCTET_STRING)
    if kind == RSA_OID:
        return RSAKey.read(inner.inside(SEQUENCE))
    if kind == ED25519_OID:
        return Ed25519Key(inner.take(OCTET_STRING))
    raise ValueError("neither an RSA nor an Ed25519 key")


class Certificate(NamedTuple):
    """What `check` wants to know of a certificate."""
    names: List[str]                                # of hosts, in lower case, maybe with a leading *.
    not_after: float                                # seconds since 1970


def read_certificate(text: bytes) -> Certificate:
    """Return names and end of the first certificate in a PEM file (RFC 5280 section 4.1); ValueError."""
    import calendar
    fields = unpem(text, "certificate", b"CERTIFICATE")[1].inside(SEQUENCE)
    if fields.next_tag() == 0xA0:                   # version
        fields.take()
    fields.take(INTEGER)
    fields.take(SEQUENCE), fields.take(SEQUENCE)    # algorithm, issuer
    validity = fields.inside(SEQUENCE)
    validity.take()
    form = "%y%m%d%H%M%SZ" if validity.next_tag() == 0x17 else "%Y%m%d%H%M%SZ"
    end = calendar.timegm(time.strptime(validity.take().decode("ascii"), form))
    return Certificate(certificate_names(fields), end)


def certificate_names(fields: DER) -> List[str]:
    """Return the DNS names among what follows the validity; ValueError."""
    while fields.next_tag() not in (0xA3, -1):
        fields.take()
    extensions = fields.inside(0xA3).inside(SEQUENCE) if fields.next_tag() == 0xA3 else DER(b"")
    names = []
    while extensions.next_tag() == SEQUENCE:
        extension = extensions.inside(SEQUENCE)
        if extension.take(OID) != SAN_OID:
            continue
        if extension.next_tag() == BOOLEAN:
            extension.take()
        alternatives = extension.inside(OCTET_STRING).inside(SEQUENCE)
        while alternatives.next_tag() >= 0:
            is_name = alternatives.next_tag() == 0x82
            name = alternatives.take()
            if is_name:
                names.append(name.decode("ascii", "replace").lower())
    return names


# DKIM (RFC 6376): the signature of a message whose content comes in blocks.

OVERSIGNED = ("from", "sender", "reply-to", "subject", "date", "message-id", "to", "cc", "in-reply-to", "references",
              "mime-version", "content-type", "content-transfer-encoding")
SIGNED = ("resent-date", "resent-from", "resent-to", "resent-cc", "resent-message-id", "list-id", "list-help",
          "list-unsubscribe", "list-unsubscribe-post", "list-subscribe", "list-post", "list-owner", "list-archive")
Fields: TypeAlias = "List[Tuple[str, bytes]]"


class BodyHash:
    """The SHA-256 of a body in relaxed canonicalization (RFC 6376 section 3.4.4), block by block, whatever the blocks."""

    BLANKS = expression(rb"[ \t]{2,}|\t")

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._rest = b""                            # a blank or CR at the end: what it is depends on what follows
        self._newlines = 0                          # line ends that count only when something follows
        self._empty = True

    def update(self, block: bytes) -> None:
        data = self.BLANKS.sub(b" ", self._rest + block).replace(b" \r\n", b"\r\n")
        text = data[:-1] if data.endswith(b"\r") else data
        text = text[:-1] if text.endswith(b" ") else text
        self._rest = data[len(text):]
        content = text.rstrip(b"\r\n")
        ends = text[len(content):]
        whole = len(re.match(rb"(?:\n\r)*", ends[::-1]).group())    # type: ignore[union-attr]
        self._add(text[:len(text) - whole])
        self._newlines += whole // 2

    def _add(self, content: bytes) -> None:
        if not content:
            return
        while self._newlines:
            count = min(self._newlines, BLOCK)
            self._hash.update(b"\r\n" * count)
            self._newlines -= count
        self._hash.update(content)
        self._empty = False

    def digest(self) -> bytes:
        """Return the hash of all; a body that is not empty ends in one line end, the empty one is nothing."""
        self._add(self._rest.rstrip(b" "))
        self._rest, self._newlines = b"", 0
        if not self._empty:
            self._hash.update(b"\r\n")
        return self._hash.digest()


def header_fields(head: bytes) -> Fields:
    """Return (lower-case name, field without its last line end) of each; only CRLF ends a line, as for who verifies."""
    fields = re.split(rb"\r\n(?![ \t])", head)
    return [(field.partition(b":")[0].rstrip(b" \t").decode("ascii", "replace").lower(), field) for field in fields if field]


def relaxed(field: bytes) -> bytes:
    """Return a field in relaxed canonicalization, without a line end (RFC 6376 section 3.4.2)."""
    name, _, value = field.partition(b":")
    value = re.sub(rb"[ \t]+", b" ", value.replace(b"\r\n", b""))
    return name.rstrip(b" \t").lower() + b":" + value.strip(b" ")


def signed_names(fields: Fields) -> List[str]:
    """Return h=: RFC 6376 section 5.4.1's list, each name once more than it is there, so that nobody adds another (8.15).

    What a mailing list adds when it passes mail on unchanged is signed only if it is there already.
    """
    counts = collections.Counter(name for name, _ in fields)
    return [name for name in OVERSIGNED + SIGNED if counts[name] or name in OVERSIGNED for _ in range(counts[name] + 1)]


def fold_list(words: Sequence[str], separator: str) -> str:
    """Return words joined, on lines of decent length: blanks may stand beside the separator."""
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > 70:
            lines.append("")
        lines[-1] += word + separator
    return "\r\n\t ".join(lines)[:-len(separator)] if words else ""


def dkim_signature(key: SigningKey, domain: str, selector: str, fields: Fields, body: bytes, now: float) -> bytes:
    """Return a DKIM-Signature header for a message with these fields and this body hash."""
    names = signed_names(fields)
    bare = "DKIM-Signature: v=1; a=%s; c=relaxed/relaxed; d=%s;\r\n\ts=%s; t=%d;\r\n\th=%s;\r\n\tbh=%s;\r\n\tb=" % (
        key.algorithm, domain, selector, now, fold_list(names, ":"), base64.b64encode(body).decode())
    left: Dict[str, List[bytes]] = {}
    for name, field in fields:
        left.setdefault(name, []).append(field)
    hashed = hashlib.sha256()
    for name in names:
        if left.get(name):                          # several of a name: from the bottom up (RFC 6376 section 5.4.2)
            hashed.update(relaxed(left[name].pop()) + b"\r\n")
    hashed.update(relaxed(bare.encode()))
    text = base64.b64encode(key.sign(hashed.digest())).decode()
    return (bare + "\r\n\t ".join(text[i:i + 72] for i in range(0, len(text), 72)) + "\r\n").encode()


def sign_content(blocks: Iterable[bytes], choose: Callable[[Fields], Sequence[Tuple[str, str, SigningKey]]],
                 now: float) -> bytes:
    """Return the DKIM-Signature headers of a message; `choose` names (domain, selector, key) for its header fields.

    Memory stays flat: of the content only the header is held, and one that is too long gets no signature.
    """
    source = iter(blocks)
    start: List[bytes] = []
    tail, size = b"", 0                             # where the blank line may be cut in two
    for block in source:
        start.append(block)
        size += len(block)
        if b"\r\n\r\n" in tail + block or size > MAX_SIGNED_HEADER:
            break
        tail = (tail + block)[-3:]
    head, blank, body = b"".join(start).partition(b"\r\n\r\n")
    fields = header_fields(head)
    if len(head) > MAX_SIGNED_HEADER or len(fields) > MAX_SIGNED_FIELDS:
        return b""
    keys = choose(fields)
    if not keys:
        return b""
    hashed = BodyHash()
    hashed.update(body)
    for block in source:
        hashed.update(block)
    digest = hashed.digest()
    return b"".join(dkim_signature(key, domain, selector, fields, digest, now) for domain, selector, key in keys)


def author_domains(fields: Fields) -> List[str]:
    """Return the domains of the addresses in From, lower case as A-labels; of what is no address, or too long, none."""
    value = b",".join(field.partition(b":")[2] for name, field in fields if name == "from")
    if len(value) > MAX_COMMAND:                    # who stands at its end would not be known
        return []
    found = (address.rpartition("@")[2].partition("(") for _, address in read_addresses(unfold(value)) if "@" in address)
    domains: List[str] = []
    for domain, _, _ in found:
        with contextlib.suppress(ValueError):
            domains += filter(is_domain, [ascii_domain(domain.strip())])
    return domains


def parse_tags(text: str) -> Dict[str, str]:
    """Return the tags of a DKIM, DMARC or TLSRPT record (RFC 6376 section 3.2); of what is no tag, none."""
    tags: Dict[str, str] = {}
    for part in text.split(";"):
        name, equals, value = part.partition("=")
        if equals:
            tags.setdefault(name.strip(), value.strip())
    return tags


def key_record(key: SigningKey) -> str:
    """Return the text of the TXT record for a key (RFC 6376 section 3.6.1, RFC 8463 section 4)."""
    return "v=DKIM1; k=%s; p=%s" % (key.kind, base64.b64encode(key.public()).decode())


def record_misfit(text: str, key: SigningKey) -> str:
    """Return why signatures of a key do not verify with a published record; "" when they do."""
    tags = parse_tags(text)
    if tags.get("v", "DKIM1") != "DKIM1":
        return "v= is not DKIM1"
    if not tags.get("p"):
        return "the key was revoked: p= is empty" if "p" in tags else "no key in it: there is no p="
    if tags.get("k", "rsa") != key.kind:
        return "it is for another kind of key: k=%s" % printable(tags.get("k", "rsa"), 20)
    if "sha256" not in tags.get("h", "sha256").replace(" ", "").split(":"):
        return "h= does not allow sha256"
    if not {"*", "email"} & set(tags.get("s", "*").replace(" ", "").split(":")):
        return "s= does not allow e-mail"
    digest = hashlib.sha256(b"test").digest()
    try:
        public = base64.b64decode("".join(tags["p"].split()), validate=True)
        verifies = (rsa_verifies if key.kind == "rsa" else ed25519_verifies)(public, key.sign(digest), digest)
    except ValueError as error:
        return "p= is broken: %s" % error
    return "" if verifies else "it holds another key"


def zone_record(name: str, text: str) -> str:
    """Return a TXT record as zone files want it: in strings of at most 255 bytes (RFC 1035 section 3.3)."""
    strings = [text[start:start + 250] for start in range(0, len(text), 250)] or [""]
    quoted = ['"%s"' % re.sub(r'([\\"])', r"\\\1", string) for string in strings]
    return "%s. IN TXT %s" % (name, quoted[0] if len(quoted) == 1 else "(\n\t%s )" % "\n\t".join(quoted))


class Keyring:
    """The keys of our domains: those of --dkim, else what `dkim` left in DATA/dkim/DOMAIN/SELECTOR.pem.

    A file is read again when it changed; one that cannot be used is complained of once, and the last good key stays: also
    when only root could read it, and we no longer are (--run-as).
    """

    _read: Dict[str, Tuple[Any, Optional[SigningKey]]] = {}     # of this process: (stamp, or what is wrong with it; key)

    def __init__(self, config: Config, hostname: str = "") -> None:
        self.config = config
        self.hostname = hostname
        self.root = os.path.join(os.path.abspath(config.data), "dkim")

    def is_empty(self) -> bool:
        """Return whether no domain has a key, which is soon seen."""
        return not self.config.dkim and not os.path.isdir(self.root)

    def file(self, domain: str, selector: str) -> str:
        return os.path.join(self.root, encode_name(ascii_domain(domain)), encode_name(selector) + ".pem")

    def files(self, domain: str) -> List[Tuple[str, str]]:
        """Return (selector, file) of each key for a domain of ours."""
        given = [(selector, file) for own, selector, file in self.config.dkim if own in ("", domain)]
        directory = os.path.join(self.root, encode_name(ascii_domain(domain)))
        made = []
        for name in sorted(list_directory(directory)) if not given else ():
            with contextlib.suppress(ValueError, Refused):      # "._mail.pem", "mail (copy).pem": no selector's
                if name.endswith(".pem"):
                    made.append((decode_name(name[:-4]), os.path.join(directory, name)))
        return (given or made)[:MAX_SIGNATURES]

    def load(self, file: str) -> SigningKey:
        """Return the key in a file; OSError, ValueError."""
        info = os.stat(file)
        stamp = info.st_mtime_ns, info.st_size, info.st_ino
        known = self._read.get(file)
        if known and known[0] == stamp and known[1]:
            return known[1]
        with open(open_regular(file, links=True), "rb") as opened:
            key = read_key(opened.read(MAX_KEY_FILE + 1))
        self._read[file] = stamp, key
        return key

    def keys(self, domain: str) -> List[Tuple[str, str, SigningKey]]:
        """Return (domain, selector, key) of each key for a domain of ours that can be used."""
        found = []
        for selector, file in self.files(domain):
            try:
                key: Optional[SigningKey] = self.load(file)
            except (OSError, ValueError) as error:
                known = self._read.get(file)
                key = known[1] if known else None
                if known is None or known[0] != str(error):
                    self._read[file] = str(error), key
                    log.warning("cannot use the key %s: %s", file, error)
            if key:
                found.append((ascii_domain(domain), selector, key))
        return found

    def check(self) -> None:
        """Raise CannotRun when a file of --dkim cannot be used."""
        for _, _, file in self.config.dkim:
            try:
                self.load(file)
            except (OSError, ValueError) as error:
                raise CannotRun("--dkim: cannot use %s: %s" % (file, getattr(error, "strerror", None) or error)) from None

    def signing_domain(self, authors: Sequence[str], sender: str, trusted: bool) -> str:
        """Return which of our domains answers for a message: From's, else the reverse-path's; "" for none.

        Strangers' mail that an alias sends on is ours to sign by its rewritten reverse-path only, and not when that
        would vouch for a From near our own domains (the alignment of RFC 7489 section 3.1): anybody can write that.
        """
        ours = {ascii_domain(domain): domain for domain in self.config.domain}
        home = next((domain for domain in ours if covers("." + domain, self.hostname)), next(iter(ours), ""))
        ours.setdefault(self.hostname, home)        # bounces are from there
        by_author = next((ours[domain] for domain in authors if domain in ours), "")
        by_sender = ours.get(sender, "")
        if trusted:
            return by_author or by_sender
        near = [author for author in authors for domain in ours if author.split(".")[-2:] == domain.split(".")[-2:]]
        return "" if near or not authors else by_sender

    def sign(self, blocks: Iterable[bytes], sender: str, trusted: bool, now: float) -> bytes:
        """Return the DKIM-Signature headers for a message that leaves; b"" when it is not ours to sign."""
        if not any(map(self.files, self.config.domain)):
            return b""

        def choose(fields: Fields) -> List[Tuple[str, str, SigningKey]]:
            path = sender.rpartition("@")[2]
            with contextlib.suppress(ValueError):
                path = ascii_domain(path)
            domain = self.signing_domain(author_domains(fields), path, trusted)
            return self.keys(domain) if domain else []
        return sign_content(blocks, choose, now)


def dkim_command(config: Config, arguments: List[str]) -> int:
    """Make a key that signs a domain's mail, or show those there are, as the DNS records to publish."""
    parser = Parser(prog="minimail.py dkim", description=dkim_command.__doc__)
    parser.add_argument("domain", metavar="DOMAIN")
    parser.add_argument("selector", nargs="?", metavar="SELECTOR", help="name of the key (default: mail)")
    parser.add_argument("--type", choices=["rsa", "ed25519"], default="rsa", help="default: rsa")
    parser.add_argument("--bits", type=int, choices=[1024, 2048, 3072, 4096], default=2048, help="of an RSA key")
    given = parser.parse_args(arguments)
    try:
        domain, selector = ascii_domain(parse_domain(given.domain)), (given.selector or "mail").lower()
        if not is_domain(selector) or not selector.isascii():
            raise ValueError("expected a selector, as mail or 2026a")
    except ValueError as error:
        raise UsageError("dkim: %s" % error) from None
    keyring = Keyring(config)
    if given.selector or not keyring.files(domain):
        make_key(config, keyring.file(domain, selector), given.type, given.bits)
    for name, file in keyring.files(domain):
        if given.selector in (None, name):
            try:
                text = key_record(keyring.load(file))
            except ValueError as error:
                raise CannotRun("%s: %s" % (file, error)) from None
            place = name + "._domainkey." + domain
            print("%s\n; where a form asks for it as one text, at %s:\n; %s" % (zone_record(place, text), place, text))
    return 0


def make_key(config: Config, file: str, kind: str, bits: int) -> None:
    """Put a new key into a file, durably, 0600; one that is there stays. OSError."""
    storage = Storage(config.data, not config.no_sync)
    storage.make_directory(os.path.dirname(file))
    if not os.path.exists(file):
        key: SigningKey = Ed25519Key.generate(bits) if kind == "ed25519" else RSAKey.generate(bits)
        storage.write(file, pem("PRIVATE KEY", key.encode()))
        print("; a new key, in %s" % file)


# SRS: the Sender Rewriting Scheme, as libsrs2 and postsrsd have it. A forward's reverse-path becomes one of ours, so that SPF
# holds at the next host, and what comes back to it finds its way.

SRS_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
SRS0, SRS1 = ([kind + separator for separator in "=+-"] for kind in ("SRS0", "SRS1"))


def srs_hash(secret: str, *parts: str) -> str:
    text = "".join(parts).encode("utf-8").lower()   # mail hosts may change the case
    return base64.b64encode(hmac.new(secret.encode(), text, hashlib.sha1).digest()).decode()[:4]


def srs_day(now: float) -> str:
    day = int(now // 86400) % 1024
    return SRS_DIGITS[day >> 5] + SRS_DIGITS[day & 31]


def srs_forward(sender: Address, domain: str, secret: str, now: float) -> Address:
    """Return the reverse-path, at our domain, under which mail from `sender` is sent on."""
    kind = sender.local[:5].upper()
    if kind in SRS0:
        host, rest = sender.domain, sender.local[4:]
    elif kind in SRS1 and sender.local[4:].count("=") >= 3:
        _, host, rest = sender.local[5:].split("=", 2)
    else:
        parts = srs_day(now), sender.domain, sender.local
        return Address("=".join(("SRS0", srs_hash(secret, *parts), *parts)), domain)
    return Address("=".join(("SRS1", srs_hash(secret, host, rest), host, rest)), domain)


def srs_reverse(local: str, keys: Sequence[str], now: float) -> Optional[Address]:
    """Return where mail to a local part of the kind goes back to; None for any other; Refused when it is forged or late."""
    kind = local[:5].upper()
    if kind not in SRS0 + SRS1:
        return None
    count = 4 if kind in SRS0 else 3
    said, *signed = local[5:].split("=", count - 1)
    if len(signed) != count - 1 or not said or not all(signed) or not is_domain(signed[-2]) or not any(
            hmac.compare_digest(srs_hash(key, *signed).lower().encode(), said.lower().encode()) for key in keys):
        raise Refused(550, "5.1.1", "not an address that this node made")
    if kind in SRS1:
        return Address("SRS0" + signed[1], signed[0])
    if not is_recent(signed[0], now):
        raise Refused(550, "5.1.1", "too late: mail could come back to this address for %d days" % SRS_DAYS)
    return Address(signed[2], signed[1])


def is_recent(day: str, now: float) -> bool:
    """Return whether an SRS day is one of the last; they come round after 1,024."""
    digits = [SRS_DIGITS.find(c) for c in day.upper()]
    return len(digits) == 2 and min(digits) >= 0 and (int(now // 86400) - digits[0] * 32 - digits[1]) % 1024 <= SRS_DAYS


class SRS:
    """Rewrites reverse-paths with the secrets in DATA/srs, made when first needed; the first one signs, all are good."""

    def __init__(self, config: Config, storage: Storage, clock: Callable[[], float] = time.time) -> None:
        self.domains = [lower(domain) for domain in config.domain]
        self.storage = storage
        self.path = os.path.join(storage.root, "srs")
        self.clock = clock
        self._secrets = Reloaded(self.path, lambda lines, complain: [line for _, line in lines], storage.is_away)

    def secrets(self) -> List[str]:
        found: List[str] = self._secrets.get()
        if not found:
            self._make_secret()
            found = self._secrets.get(fresh=True)
        return found

    def _make_secret(self) -> None:
        """Make the file, which another process may be doing, too: the first one counts that has a secret. OSError."""
        self.storage.make_directory(self.storage.root)
        draft = self.path + "." + os.urandom(4).hex()
        self.storage.write(draft, os.urandom(24).hex().encode() + b"\n")
        try:
            self.storage.link(draft, self.path)
        except FileExistsError:
            if not self._secrets.get(fresh=True):
                log.warning("%s had no secret left: what comes back to addresses made with it is refused", self.path)
                self.storage.rename(draft, self.path)
        finally:
            unlink_quietly(draft)
        self.storage.sync_directory(self.storage.root)

    def forward(self, sender: str) -> str:
        """Return the reverse-path for mail that an alias sends on: ours and the null one stay. OSError."""
        if not sender or not self.domains:          # capture mode: what is released goes as it came
            return sender
        address = parse_address(sender)
        if lower(address.domain) in self.domains or not address.domain or domain_literal(address.domain):
            return sender
        return str(srs_forward(address, self.domains[0], self.secrets()[0], self.clock()))

    def reverse(self, address: Address) -> Optional[Address]:
        """Return where mail to an address of ours goes back to; None when it is none of the kind; Refused."""
        if lower(address.domain) not in self.domains or address.local[:3].upper() != "SRS":
            return None
        return srs_reverse(address.local, self.secrets(), self.clock())


# MTA-STS (RFC 8461): what others publish about TLS to their exchangers.

class STSPolicy(NamedTuple):
    """A domain's policy, and when we got it."""
    id: str
    mode: str                                       # enforce, testing, none
    mx: List[str]
    max_age: int                                    # seconds
    fetched_at: float = 0.0

    def allows(self, host: str) -> bool:
        """Return whether an exchanger is one of the policy's (RFC 8461 section 4.1): a * stands for one label."""
        host = host.lower().rstrip(".")
        return host in self.mx or "*." + host.partition(".")[2] in self.mx


def parse_sts_record(texts: Sequence[str]) -> str:
    """Return the id= of a domain's _mta-sts record; "" when there is none, or not just one (RFC 8461 section 3.1)."""
    found = [text for text in texts if re.match(r"v=STSv1[ \t]*;", text)]
    id = parse_tags(found[0]).get("id", "") if len(found) == 1 else ""
    return id if re.fullmatch(r"[A-Za-z0-9]{1,32}", id) else ""


def parse_sts_policy(text: bytes, id: str, now: float) -> STSPolicy:
    """Return the policy in a file (RFC 8461 section 3.2); ValueError."""
    values: Dict[str, List[str]] = {}
    for line in text[:MAX_STS_POLICY].decode("utf-8", "replace").splitlines():
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), []).append(value.strip())
    mode, age = (values.get(name, [""])[0] for name in ("mode", "max_age"))
    mx = [pattern.lower().rstrip(".") for pattern in values.get("mx", [])]
    if values.get("version", [""])[0] != "STSv1":
        raise ValueError("its version is not STSv1")
    if mode not in ("enforce", "testing", "none"):
        raise ValueError("its mode is none of enforce, testing, none")
    if not re.fullmatch(r"[0-9]{1,10}", age):
        raise ValueError("its max_age is no number of seconds")
    if mode != "none" and not mx:
        raise ValueError("it names no mx")
    if not all(pattern.isascii() and is_domain(pattern[2:] if pattern.startswith("*.") else pattern) for pattern in mx):
        raise ValueError("its mx is no host")
    return STSPolicy(id, mode, mx[:MAX_STS_HOSTS], min(int(age), 31557600), now)


def parse_http_answer(data: bytes, limit: int) -> Tuple[int, Dict[str, str], bytes]:
    """Return (status, headers, body so far) of an HTTP answer; ValueError for what is none or too long."""
    head, blank, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    match = re.match(r"HTTP/1\.[01] (\d{3})(?: |$)", lines[0])
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if not blank or not match or len(head) > 1 << 14:
        raise ValueError("not an HTTP answer")
    if len(body) > limit:
        raise ValueError("longer than %d bytes" % limit)
    return int(match.group(1)), headers, body


class STS:
    """The policies of others, kept in DATA/mta-sts until they are too old (RFC 8461 section 3.3)."""

    def __init__(self, root: str, resolver: Any, write: Callable[[str, bytes], None],
                 clock: Callable[[], float] = time.time, port: int = 443) -> None:
        self.root = os.path.join(root, "mta-sts")
        self.resolver = resolver
        self.write = write                          # puts a file in place
        self.clock = clock
        self.port = port
        self._failed: Dict[str, float] = {}         # until when not to ask again

    def policy(self, domain: str) -> Optional[STSPolicy]:
        """Return the policy that holds for mail to a domain now; None when there is none, or its mode is none.

        What was once fetched holds until max_age, also when the record is gone or nothing can be fetched (section 5.1):
        who can make them vanish must not win by it.
        """
        now = self.clock()
        known = self.kept(encode_name(domain))
        try:
            id = parse_sts_record(self.resolver.lookup("_mta-sts." + domain, TXT))
        except DNSError:
            id = ""
        fresh = known and known.id == id and now - known.fetched_at < STS_REFRESH
        if id and not fresh and self._failed.get(domain, 0.0) <= now:
            try:
                known = self.fetch(domain, id)
                self.keep(domain, known)
            except (OSError, ValueError, DNSError, CannotRun) as error:
                if len(self._failed) > 10000:
                    self._failed = {}
                self._failed[domain] = now + STS_RETRY      # section 3.3: not for each message
                event("sts-failed", domain=domain, reason=printable(reason_of(error), 200))
        return known if known and known.mode != "none" else None

    def kept(self, name: str) -> Optional[STSPolicy]:
        """Return the policy that was kept for a domain, by the name of its file; one that is too old is removed."""
        path = os.path.join(self.root, name)
        try:
            with open(open_regular(path), "rb") as file:
                policy = STSPolicy(**json.loads(file.read(4 * MAX_STS_POLICY)))
            age = self.clock() - policy.fetched_at
            if age > policy.max_age:
                unlink_quietly(path)
            elif age >= 0:                          # else the clock was set back: it may come to its senses
                return policy
        except (OSError, ValueError, TypeError):
            pass
        return None

    def sweep(self) -> None:
        """Remove what is too old: strangers say which domains are asked for."""
        for name in list_directory(self.root):
            self.kept(name)

    def keep(self, domain: str, policy: STSPolicy) -> None:
        """Keep a policy over restarts; when that fails it holds for this time only."""
        try:
            if os.path.isdir(os.path.dirname(self.root)):
                os.makedirs(self.root, 0o700, exist_ok=True)
            self.write(os.path.join(self.root, encode_name(domain)), json.dumps(policy._asdict()).encode())
        except OSError as error:
            log.warning("cannot keep the MTA-STS policy of %s: %s", domain, error)

    def fetch(self, domain: str, id: str) -> STSPolicy:
        """Fetch a policy: HTTPS, verified, no redirects, bounded size and time. OSError, ValueError, DNSError, CannotRun."""
        host, context = "mta-sts." + domain, tls_context(True)
        deadline = time.monotonic() + STS_TIMEOUT
        failure: Optional[OSError] = None
        for address, _ in self.resolver.addresses(host)[:MAX_EXCHANGERS]:
            try:
                with socket.create_connection((address, self.port), timeout=STS_TIMEOUT / 3) as plain, \
                        context.wrap_socket(plain, server_hostname=host, suppress_ragged_eofs=False) as sock:
                    return parse_sts_policy(self._get(sock, host, deadline), id, self.clock())
            except OSError as error:
                failure = error
        raise failure or OSError(errno.EHOSTUNREACH, host + " has no address")

    @staticmethod
    def _get(sock: "ssl.SSLSocket", host: str, deadline: float) -> bytes:
        """Ask for the policy file and return it; OSError, ValueError. As HTTP/1.0: nothing comes in chunks."""
        sock.sendall(("GET /.well-known/mta-sts.txt HTTP/1.0\r\nHost: %s\r\nUser-Agent: minimail/%s\r\n"
                      "Connection: close\r\n\r\n" % (host, __version__)).encode())
        data, wanted = bytearray(), 2 * MAX_STS_POLICY
        while len(data) < wanted:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            block = sock.recv(BLOCK)
            if not block:
                break
            at = max(0, len(data) - 3)
            data.extend(block)
            end = data.find(b"\r\n\r\n", at) if wanted == 2 * MAX_STS_POLICY else -1
            length = parse_http_answer(bytes(data), 2 * MAX_STS_POLICY)[1].get("content-length", "") if end >= 0 else ""
            if length.isdecimal() and len(length) < 10:
                wanted = min(wanted - 1, end + 4 + int(length))
        status, headers, body = parse_http_answer(bytes(data), MAX_STS_POLICY)
        if int(headers.get("content-length", len(body))) != len(body):
            raise ValueError("%s sent %d bytes and said another number" % (host, len(body)))
        if status != 200 or "transfer-encoding" in headers:
            raise ValueError("%s answered with status %d" % (host, status))     # section 3.3: no redirects
        return body


# SPF (RFC 7208), as others read ours: pure but for `lookup(name, type) -> texts`, which raises DNSError.

SPF_TERM = expression(r"([+?~-]?)([A-Za-z][A-Za-z0-9_.-]*)(.*)", re.DOTALL)
SPF_MACRO = expression(r"%(?:([%_-])|\{([slodiphvSLODIPHV])([0-9]{0,3})([rR]?)([.+,/_=-]*)\})")
SPF_RESULTS = {"+": "pass", "-": "fail", "~": "softfail", "?": "neutral"}


class SPFError(Exception):
    """The record cannot be evaluated; `result` is permerror or temperror."""

    def __init__(self, result: str, text: str) -> None:
        super().__init__(text)
        self.result = result


class SPFTerm(NamedTuple):
    """A mechanism or modifier of a record."""
    result: str                                     # when it matches
    name: str
    value: str                                      # behind : or =, a domain maybe with macros
    size4: int                                      # prefix lengths to compare by
    size6: int


def parse_spf(text: str) -> List[SPFTerm]:
    """Return the terms of a record behind its version (RFC 7208 section 4.6.1); SPFError."""
    terms = []
    for word in filter(None, text.split(" ")[1:]):
        try:
            terms.append(parse_spf_term(word))
        except ValueError:
            raise SPFError("permerror", "wrong term: " + printable(word, 80)) from None
    for name in "redirect", "exp":
        if sum(term.name == name + "=" for term in terms) > 1:
            raise SPFError("permerror", "more than one %s=" % name)
    return terms


def parse_spf_term(word: str) -> SPFTerm:
    """Return one term, its name with a = behind when it is a modifier; ValueError, SPFError."""
    match = SPF_TERM.fullmatch(word)
    if not match or not word.isascii():
        raise ValueError("not a term")
    sign, name, value = match.groups()
    name = name.lower()
    if value.startswith("="):
        if sign or (name in ("redirect", "exp") and value == "="):
            raise ValueError("not a modifier")
        spf_check_macros(value)
        return SPFTerm("", name + "=", value[1:], 0, 0)
    result = SPF_RESULTS[sign or "+"]
    size4, size6 = "32", "128"
    if name in ("ip4", "ip6"):
        address, slash, size = value[1:].partition("/")
        kind, limit = (ipaddress.IPv4Address, 32) if name == "ip4" else (ipaddress.IPv6Address, 128)
        if not value.startswith(":"):
            raise ValueError("no address")
        length = prefix_length(size, limit) if slash else limit
        return SPFTerm(result, name, str(kind(address)), length, length)
    if name in ("a", "mx"):
        found = re.fullmatch(r"(.*?)(?:/([0-9]+))?(?://([0-9]+))?", value, re.DOTALL)
        value, size4, size6 = found.group(1), found.group(2) or size4, found.group(3) or size6   # type: ignore[union-attr]
    if name not in ("all", "include", "exists", "a", "mx", "ptr"):
        raise ValueError("not a mechanism")
    if (value and not value.startswith(":")) or value == ":":
        raise ValueError("not a domain")
    if (value and name == "all") or (not value and name in ("include", "exists")):
        raise ValueError("a domain is missing, or does not belong here")
    spf_check_macros(value)
    return SPFTerm(result, name, value[1:], prefix_length(size4, 32), prefix_length(size6, 128))


def prefix_length(text: str, limit: int) -> int:
    """Return the number behind a slash; ValueError."""
    if not re.fullmatch(r"0|[1-9][0-9]{0,2}", text) or int(text) > limit:
        raise ValueError("bad prefix length")
    return int(text)


def spf_check_macros(text: str) -> None:
    if "%" in SPF_MACRO.sub("", text):
        raise SPFError("permerror", "bad macro in " + printable(text, 80))


class SPF:
    """One evaluation: may a host send mail from `sender`? `lookups` counts the terms that cost the reader a question."""

    def __init__(self, lookup: Callable[[str, str], List[str]], host: str, sender: str, helo: str = "") -> None:
        self.lookup = lookup
        self.host = ipaddress.ip_address(host)
        self.type = "A" if self.host.version == 4 else "AAAA"
        self.sender = sender if "@" in sender else "postmaster@" + (sender or helo)
        self.helo = helo
        self.lookups = self.voids = 0
        self.reason = ""                            # what decided

    def check(self, domain: str) -> str:
        """Return none, neutral, pass, fail, softfail, temperror or permerror (RFC 7208 section 2.6)."""
        try:
            return self._evaluate(domain.lower().rstrip("."), 0)
        except SPFError as error:
            self.reason = str(error)
            return error.result

    def _ask(self, name: str, type: str) -> List[str]:
        """Return what DNS says; SPFError. More than two questions without an answer are an error (section 4.6.4)."""
        try:
            found = self.lookup(name, type)
        except NoSuchDomain:
            found = []
        except DNSError as error:
            raise SPFError("temperror", "%s: %s" % (name, error)) from None
        if not found and type != "TXT":
            self.voids += 1
            if self.voids > MAX_SPF_VOIDS:
                raise SPFError("permerror", "more than %d names without an answer" % MAX_SPF_VOIDS)
        return found

    def record(self, domain: str) -> Optional[str]:
        """Return the record of a domain; SPFError when there are several (section 4.5)."""
        if not is_domain(domain) or "." not in domain:
            return None
        found = [text for text in self._ask(domain, "TXT") if re.match(r"v=spf1(?: |$)", text, re.IGNORECASE)]
        if len(found) > 1:
            raise SPFError("permerror", "%s has %d SPF records" % (domain, len(found)))
        return found[0] if found else None

    def _evaluate(self, domain: str, depth: int) -> str:
        text = self.record(domain)
        if text is None:
            return "none"
        terms = parse_spf(text)
        for term in terms:
            if not term.name.endswith("=") and self._matches(term, domain, depth):
                self.reason = self.reason if term.name == "include" else "%s in the record of %s" % (term.name, domain)
                return term.result
        for term in terms:
            if term.name == "redirect=" and not any(term.name == "all" for term in terms):
                self._count(depth)
                result = self._evaluate(self._expand(term.value, domain), depth + 1)
                if result == "none":
                    raise SPFError("permerror", "redirect= leads to no record")
                return result
        self.reason = "nothing in the record of %s matches" % domain
        return "neutral"

    def _count(self, depth: int) -> None:
        self.lookups += 1
        if self.lookups > MAX_SPF_LOOKUPS or depth > MAX_SPF_LOOKUPS:
            raise SPFError("permerror", "more than %d look-ups" % MAX_SPF_LOOKUPS)

    def _matches(self, term: SPFTerm, domain: str, depth: int) -> bool:
        if term.name == "all":
            return True
        if term.name in ("ip4", "ip6"):
            return self._is_in(term.value, term)
        self._count(depth)
        target = self._expand(term.value, domain) if term.value else domain
        if term.name == "include":
            result = self._evaluate(target, depth + 1)
            if result == "none":
                raise SPFError("permerror", "include:%s has no record" % target)
            return result == "pass"
        if term.name == "exists":
            return bool(self._ask(target, "A"))
        if term.name == "ptr":
            return any(name == target or name.endswith("." + target) for name in self._names())
        hosts = self._ask(target, "MX") if term.name == "mx" else [target]
        if len(hosts) > MAX_SPF_LOOKUPS:
            raise SPFError("permerror", "%s has more than %d exchangers" % (target, MAX_SPF_LOOKUPS))
        return any(self._is_in(address, term) for host in hosts if host for address in self._ask(host, self.type))

    def _is_in(self, address: str, term: SPFTerm) -> bool:
        size = term.size4 if self.host.version == 4 else term.size6
        return ipaddress.ip_address(address).version == self.host.version and \
            self.host in ipaddress.ip_network("%s/%d" % (address, size), strict=False)

    def _names(self) -> List[str]:
        """Return the host's names that lead back to it (section 5.5)."""
        found = []
        for name in self._ask(self.host.reverse_pointer, "PTR")[:MAX_SPF_LOOKUPS]:
            try:
                if str(self.host) in self._ask(name, self.type):
                    found.append(name.lower().rstrip("."))
            except SPFError:
                break
        return found

    def _expand(self, text: str, domain: str) -> str:
        """Return a domain with its macros replaced (section 7)."""
        local, _, sender_domain = self.sender.rpartition("@")
        host = ".".join("%x" % (byte >> shift & 15) for byte in self.host.packed for shift in (4, 0)) \
            if self.host.version == 6 else str(self.host)
        values = {"s": self.sender, "l": local, "o": sender_domain, "d": domain, "i": host, "p": "unknown",
                  "v": "in-addr" if self.host.version == 4 else "ip6", "h": self.helo or domain}

        def replace(match: "re.Match[str]") -> str:
            literal, letter, digits, turned, delimiters = match.groups()
            if literal:
                return {"%": "%", "_": " ", "-": "%20"}[literal]
            parts = re.split("[%s]" % re.escape(delimiters or "."), values[letter.lower()])
            parts = parts[::-1] if turned else parts
            value = ".".join(parts[-int(digits):] if digits and int(digits) else parts)
            from urllib.parse import quote
            return quote(value, safe="") if letter.isupper() else value
        expanded = SPF_MACRO.sub(replace, text).lower().rstrip(".")
        return expanded if len(expanded) <= 253 else expanded[-254:].partition(".")[2]


# The doctor.

class Finding(NamedTuple):
    """What `check` found: ok, note (not wrong, but look at it), wrong or skipped; and the records to publish."""
    domain: str
    check: str
    status: str
    text: str
    advice: str = ""
    records: Tuple[str, ...] = ()


NOBODY = "240.0.0.1"                                # an address that none has, not even in a laboratory (RFC 1112 section 4)


class Doctor:
    """Looks at a node's standing from outside and inside. A method check_NAME() yields what it found out about NAME.

    It asks DNS only, and with `connect` the node's own addresses.
    """

    ORDER = ("hostname", "mx", "ptr", "spf", "dkim", "dmarc", "mta_sts", "certificate", "addresses", "port")
    MACHINE = ("clock", "data", "queue")

    def __init__(self, config: Config, hostname: str, resolver: Any, connect: bool = False) -> None:
        self.config = config
        self.hostname = hostname
        self.resolver = resolver
        self.connect = connect
        self.domain = self.check = ""               # what is looked at
        self.addresses: List[str] = []              # of the hostname
        self.keyring = Keyring(config, hostname)

    def examine(self, domains: Sequence[str]) -> Iterator[Finding]:
        """Yield all findings, domain by domain, then those about the machine."""
        for domain in domains:
            self.domain = ascii_domain(domain)
            yield from self._run(self.ORDER)
        self.domain = ""
        yield from self._run(self.MACHINE)

    def _run(self, names: Sequence[str]) -> Iterator[Finding]:
        for name in names:
            self.check = name
            try:
                yield from getattr(self, "check_" + name)()
            except DNSFailure as error:
                yield self.wrong("no answer from DNS: %s" % error, "ask again; if it stays so, look at the name servers")

    def found(self, status: str, text: str, advice: str, *records: str) -> Finding:
        return Finding(self.domain, self.check.replace("_", "-"), status, printable(text, 1000), advice, records)

    def ok(self, text: str) -> Finding:
        return self.found("ok", text, "")

    def note(self, text: str, advice: str = "") -> Finding:
        return self.found("note", text, advice)

    def wrong(self, text: str, advice: str, *records: str) -> Finding:
        return self.found("wrong", text, advice, *records)

    def lookup(self, name: str, type: str) -> List[str]:
        """Return the data of a name's records as texts, of MX the hosts, the best one first; DNSFailure."""
        try:
            found = self.resolver.lookup(name, TYPES[type])
        except NoSuchDomain:
            return []
        return [host for _, host in sorted(found)] if type == "MX" else found

    def addresses_of(self, host: str) -> List[str]:
        """Return a host's addresses as DNS has them: what this machine's hosts file says, nobody else sees. DNSFailure."""
        return self.lookup(host, "A") + self.lookup(host, "AAAA")

    def texts(self, name: str, version: str) -> List[str]:
        """Return the TXT records at a name that begin with a version tag; DNSFailure."""
        return [text for text in self.lookup(name, "TXT") if re.match(re.escape(version) + r"\s*(;|$)", text)]

    def check_hostname(self) -> Iterator[Finding]:
        name, self.addresses = self.hostname, []
        if "." not in name:
            yield self.wrong("%s is not a full name" % name, "give the machine's name in DNS: --hostname NAME")
            return
        self.addresses = self.addresses_of(name)
        private = [address for address in self.addresses if not ipaddress.ip_address(address).is_global]
        if not self.addresses:
            records = ["%s. IN %s %s" % (name, "AAAA" if ":" in own else "A", own) for own in public_addresses()]
            yield self.wrong("%s has no address in DNS" % name, "publish the one that others reach it at", *(
                records or ["; %s. IN A ADDRESS (this machine cannot tell which)" % name]))
        elif private:
            yield self.note("%s has an address that nobody else reaches: %s" % (name, ", ".join(private)))
        else:
            yield self.ok("%s has the addresses %s" % (name, ", ".join(self.addresses)))

    def check_mx(self) -> Iterator[Finding]:
        record = "%s. IN MX 10 %s." % (self.domain, self.hostname)
        try:
            records = sorted(self.resolver.mx(self.domain))
        except NoSuchDomain:
            yield self.wrong("the domain %s does not exist in DNS" % self.domain, "register it, and publish", record)
            return
        leads = [(preference, host) for preference, host, _ in records
                 if host == self.hostname or (host and set(self.addresses_of(host)) & set(self.addresses))]
        if not leads:
            shown = ", ".join(host or "." for _, host, _ in records)
            yield self.wrong("MX leads to %s, not here" % shown if records else "no MX record", "publish", record)
        elif leads[0][0] > records[0][0]:
            yield self.note("MX leads here, but to %s before" % records[0][1], "as a backup only?")
        else:
            yield self.ok("MX leads here, to %s" % leads[0][1])

    def check_ptr(self) -> Iterator[Finding]:
        for address in self.addresses:
            names = self.lookup(ipaddress.ip_address(address).reverse_pointer, "PTR")
            if self.hostname in names:
                yield self.ok("%s is %s" % (address, self.hostname))
            else:
                yield self.wrong("%s is %s, not %s" % (address, " ".join(names) or "nobody", self.hostname),
                                 "have the owner of the address (the VPS's provider) name it",
                                 "%s. IN PTR %s." % (ipaddress.ip_address(address).reverse_pointer, self.hostname))

    def check_spf(self) -> Iterator[Finding]:
        record = zone_record(self.domain, "v=spf1 mx -all")
        first = SPF(self.lookup, NOBODY, "postmaster@" + self.domain, self.hostname)
        result = first.check(self.domain)           # every term is looked at
        if result == "temperror":
            raise DNSFailure(first.reason)
        if result == "none":
            yield self.wrong("no SPF record", "publish", record)
        elif result == "permerror":
            yield self.wrong("the record cannot be used: %s" % first.reason, "correct it, maybe to", record)
        elif result == "pass":
            yield self.wrong("the record lets anybody send: %s" % first.reason, "end it in -all or ~all", record)
        elif self.config.smarthost:
            yield self.note("the record uses %d of %d look-ups" % (first.lookups, MAX_SPF_LOOKUPS),
                            "it has to let the smarthost %s send: see what its owner says" % self.config.smarthost.host)
        else:
            for address in self.addresses:
                spf = SPF(self.lookup, address, "postmaster@" + self.domain, self.hostname)
                result = spf.check(self.domain)
                text = "%s: %s (%s); %d of %d look-ups" % (address, result, spf.reason, first.lookups, MAX_SPF_LOOKUPS)
                yield self.ok(text) if result == "pass" else self.wrong(
                    text, "let the record allow this address, maybe with", record)

    def check_dkim(self) -> Iterator[Finding]:
        if not self.keyring.files(self.domain):
            yield self.wrong("no key: mail leaves unsigned", "make one: minimail.py dkim %s" % self.domain)
        another = "make another: minimail.py dkim %s NAME" % self.domain
        for selector, file in self.keyring.files(self.domain):
            name = selector + "._domainkey." + self.domain
            try:
                key = self.keyring.load(file)
                unsafe = os.name != "nt" and os.stat(file).st_mode & 0o077
            except (OSError, ValueError) as error:
                yield self.wrong("%s: %s" % (file, reason_of(error)), another)
                continue
            texts = self.lookup(name, "TXT")
            misfits = [record_misfit(text, key) for text in texts]
            record = zone_record(name, key_record(key))
            if unsafe:
                yield self.wrong("others may read the key %s" % file, "chmod 600 %s" % file)
            if not texts:
                yield self.wrong("the key %s is not published" % selector, "publish", record)
            elif len(texts) > 1 or misfits[0]:
                yield self.wrong("%s: %s" % (name, misfits[0] or "several records"), "publish in its place", record)
            elif key.kind == "rsa" and key.bits < 2048:
                yield self.note("the key %s fits, but has %d bits only" % (selector, key.bits), another)
            else:
                yield self.ok("the key %s (%s, %d bits) is published, and a test signature verifies" % (
                    selector, key.kind, key.bits))

    def check_dmarc(self) -> Iterator[Finding]:
        record = zone_record("_dmarc." + self.domain, "v=DMARC1; p=none; rua=mailto:postmaster@" + self.domain)
        place, found = "", []
        labels = self.domain.split(".")
        for start in range(max(1, len(labels) - 1)):    # RFC 7489 section 6.6.3: else that of the domain above
            place = "_dmarc." + ".".join(labels[start:])
            found = self.texts(place, "v=DMARC1")
            if found:
                break
        policy = parse_tags(found[0]).get("p", "") if found else ""
        if not found:
            yield self.wrong("no DMARC record", "publish, and p=quarantine once all is well", record)
        elif len(found) > 1 or policy.lower() not in ("none", "quarantine", "reject"):
            yield self.wrong("%s: %s" % (place, "several records" if len(found) > 1 else "its p= is none of "
                             "none, quarantine, reject"), "publish in its place", record)
        else:                                       # we sign with d= and send with a reverse-path of the very domain
            yield self.ok("p=%s at %s; what we sign is aligned with From" % (policy, place))

    def check_mta_sts(self) -> Iterator[Finding]:
        reports = self.texts("_smtp._tls." + self.domain, "v=TLSRPTv1")
        if len(reports) > 1 or (reports and not re.match(r"(mailto|https):", parse_tags(reports[0]).get("rua", ""))):
            yield self.wrong("the TLS reporting record is wrong: it needs one rua=mailto: or https:", "publish",
                             zone_record("_smtp._tls." + self.domain, "v=TLSRPTv1; rua=mailto:postmaster@" + self.domain))
        texts = self.texts("_mta-sts." + self.domain, "v=STSv1")
        if not texts:
            yield self.ok("none published: TLS to here is an opportunity")
            return
        if not parse_sts_record(texts):
            yield self.wrong("the record at _mta-sts.%s is wrong" % self.domain, "publish in its place",
                             zone_record("_mta-sts." + self.domain, "v=STSv1; id=%d" % time.time()))
            return
        if not self.connect:
            yield self.note("published; the policy itself is fetched with --connect only")
            return
        try:
            policy = STS(self.config.data, self.resolver, lambda path, data: None).fetch(self.domain, "check")
        except (OSError, ValueError, DNSError, CannotRun) as error:
            yield self.wrong("the policy of %s cannot be fetched: %s" % (self.domain, reason_of(error)),
                             "let https://mta-sts.%s/.well-known/mta-sts.txt answer with it" % self.domain)
            return
        missing = [host for _, host, _ in self.resolver.mx(self.domain) if not policy.allows(host)]
        if missing and policy.mode != "none":
            yield self.wrong("the policy does not name the exchanger %s" % missing[0], "add it: mx: " + missing[0])
        else:
            yield self.ok("policy %s, for %d days, names all exchangers" % (policy.mode, policy.max_age // 86400))

    def check_certificate(self) -> Iterator[Finding]:
        if not self.config.tls_cert:
            yield self.wrong("no certificate: mail comes in clear",
                             "get one for %s, and --tls-cert FILE --tls-key FILE" % self.hostname)
            return
        try:
            with open(self.config.tls_cert, "rb") as file:
                certificate = read_certificate(file.read(MAX_KEY_FILE + 1))
        except (OSError, ValueError) as error:
            yield self.wrong("%s: %s" % (self.config.tls_cert, reason_of(error)), "give a certificate in PEM form")
            return
        days = (certificate.not_after - time.time()) / 86400
        fits = STSPolicy("", "", certificate.names, 0).allows(self.hostname)
        text = "for %s, %d days left" % (", ".join(certificate.names[:5]) or "nobody", days)
        if days <= 0 or not fits:
            yield self.wrong(text if days > 0 else "it has ended", "get a new one for %s" % self.hostname)
        elif days < 14:
            yield self.note(text, "is it renewed by itself?")
        else:
            yield self.ok(text)

    def check_addresses(self) -> Iterator[Finding]:
        accounts = Accounts(self.config.file("users"))
        book = AddressBook(self.config.domain, accounts, self.config.file("aliases"), self.config.catch_all, self.hostname)
        for name in "postmaster", "abuse":
            address = Address(name, self.domain)
            try:
                found = book.resolve(address)
            except Refused as refused:
                yield self.wrong("%s: %s" % (address, refused.reply), "add an alias: %s: YOU@%s" % (address, self.domain))
                continue
            readers = [box for box in found.mailboxes if box in accounts.names()] + list(map(str, found.remote))
            if readers:
                yield self.ok("%s arrives at %s" % (address, ", ".join(readers[:5])))
            else:
                yield self.note("%s is kept, but nobody can log in to read it" % str(address),
                                "add an alias in %s: %s: YOU@%s" % (self.config.file("aliases"), address, self.domain))

    def check_port(self) -> Iterator[Finding]:
        """Do the node's own addresses answer on the port to which others send?"""
        for address in self.addresses if self.connect else ():
            try:
                with socket.create_connection((address, self.config.mx_port), timeout=10.0) as sock:
                    greeting = sock.recv(MAX_REPLY_LINE)
            except OSError as error:
                yield self.wrong("%s does not answer on port %d: %s" % (address, self.config.mx_port, reason_of(error)),
                                 "listen there (--smtp 0.0.0.0:25), and open the port in firewall and provider's panel")
                continue
            if greeting.startswith(b"220") and self.hostname.encode() in greeting:
                yield self.ok("%s answers on port %d as %s" % (address, self.config.mx_port, self.hostname))
            else:
                yield self.wrong("at %s somebody else answers: %s" % (address, printable(greeting, 100)),
                                 "does another mail server run there?")

    def check_clock(self) -> Iterator[Finding]:
        synchronized = clock_is_synchronized()
        if synchronized is None:
            yield self.found("skipped", "this platform does not tell whether something sets it", "")
        elif synchronized:
            yield self.ok("set by NTP")
        else:
            yield self.note("nobody sets it", "install a time service, as chrony or systemd-timesyncd")

    def check_data(self) -> Iterator[Finding]:
        root = self.config.data
        try:
            info = os.stat(root)
        except OSError as error:
            yield self.wrong("%s: %s" % (root, error.strerror), "start the node once, or give its --data DIR")
            return
        if os.name != "nt" and info.st_mode & 0o077:
            yield self.wrong("others may look into %s" % root, "chmod 700 %s" % root)
        kind = file_system(root)
        missing = broken_promises(root)
        if missing:
            yield self.wrong("%s (%s) breaks promises: %s" % (root, kind, ", ".join(missing)), "use a local disk")
        elif kind in ("tmpfs", "ramfs"):
            yield self.wrong("%s is in memory (%s): all mail is gone at a reboot" % (root, kind), "use a disk")
        elif kind in ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs"):
            yield self.note("%s is on a network (%s)" % (root, kind), "one node only, and a server that keeps locks")
        else:
            yield self.ok("%s is ours alone, on %s, which flushes, links, renames and locks" % (root, kind))

    def check_queue(self) -> Iterator[Finding]:
        """What the queue knows about the way out: when nobody at all can be reached, the port is closed."""
        queue = Queue(Storage(self.config.data), self.config)
        replies = [recipient["last_reply"] for entry in itertools.islice(queue.entries(), 1000)
                   for recipient in entry.waiting() if recipient["last_reply"]]
        silent = sum("cannot connect" in reply for reply in replies)
        if silent > 1 and silent == len(replies):
            yield self.wrong("all %d recipients that wait cannot be connected to" % silent,
                             "is port 25 closed on the way out? Ask the provider, or use --smarthost")
        else:
            yield self.ok("%d recipients wait, %d of them for a host that does not answer" % (len(replies), silent))


def clock_is_synchronized() -> Optional[bool]:
    """Return what the kernel knows (adjtimex(2)); None when it does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        import ctypes
        state: int = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    except (ImportError, OSError, AttributeError):
        return None
    return None if state < 0 else state != 5        # TIME_ERROR


def file_system(path: str) -> str:
    """Return the kind of file system a path is on, "unknown" where /proc does not tell."""
    best, kind = "", "unknown"
    path = os.path.realpath(path) + "/"
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
        for line in file:
            _, place, name = line.split(" ")[:3]
            if path.startswith(place.rstrip("/") + "/") and len(place) >= len(best):
                best, kind = place, name
    return kind


def must_lock(fd: int) -> None:
    if not lock_file(fd):
        raise OSError(errno.ENOLCK, "no locks")


def broken_promises(root: str) -> List[str]:
    """Return what the file system of a directory does not do of all we rely on."""
    missing = []
    first, second = (os.path.join(root, ".check-" + secrets.token_hex(4)) for _ in range(2))
    try:
        fd = os.open(first, os.O_CREAT | os.O_EXCL | os.O_RDWR | O_EXTRA, 0o600)
    except OSError as error:
        return ["making files (%s)" % error.strerror]
    steps: List[Tuple[str, Callable[[], Any]]] = [
        ("fsync", lambda: os.fsync(fd)), ("locks", lambda: must_lock(fd)),
        ("links", lambda: os.link(first, second)), ("rename", lambda: os.replace(second, first + "x"))]
    for name, act in steps:
        try:
            act()
        except OSError:
            missing.append(name)
    close_quietly(fd)
    for path in first, second, first + "x":
        unlink_quietly(path)
    return missing


def check_command(config: Config, arguments: List[str]) -> int:
    """Look at the node's standing: what others' servers see of it, and what to do about it. Status 1 if something is wrong."""
    parser = Parser(prog="minimail.py check", description=check_command.__doc__)
    parser.add_argument("domain", nargs="?", metavar="DOMAIN", help="default: every --domain")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--connect", action="store_true", help="also connect to the node's own addresses")
    given = parser.parse_args(arguments)
    try:
        domains = [parse_domain(given.domain)] if given.domain else list(config.domain)
    except ValueError as error:
        raise UsageError("check %s: %s" % (printable(given.domain), error)) from None
    if not domains:
        raise UsageError("check: which domain? Name it, or give --domain or --data of the node")
    if given.domain and domains[0] not in config.domain:
        config = dataclasses.replace(config, domain=config.domain + (domains[0],))
    hostname = config.hostname or machine_name()
    doctor = Doctor(config, hostname, Resolver(config.dns), given.connect)
    findings = []
    for finding in doctor.examine(domains):
        findings.append(finding)
        if not given.json:
            print("%-7s %s: %s%s" % (finding.status, finding.check, finding.text, finding.advice and " -- " + finding.advice),
                  flush=True)
    wrong = [finding for finding in findings if finding.status == "wrong"]
    if given.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        records = list(dict.fromkeys(record for finding in findings for record in finding.records))
        if records:
            print("\n; to publish:\n" + "\n".join(records) + "\n")
        print("%d things are wrong" % len(wrong) if wrong else "nothing is wrong")
    return 1 if wrong else 0


class Standing(Outbound):
    """What this section does to mail that leaves."""

    def __init__(self, config: Config, hostname: str, storage: Storage, resolver: Any) -> None:
        config = dataclasses.replace(config, data=storage.root)
        self.keyring = Keyring(config, hostname)
        self.srs = SRS(config, storage)
        self.sts = STS(storage.root, resolver, storage.write)
        with contextlib.suppress(PermissionError):  # what is kept there can be fetched again
            self.sts.sweep()
            storage.sweep(self.sts.root)

    def dress(self, entry: Entry, message: Outgoing) -> Outgoing:
        """Return a message with a reverse-path that SPF holds for, and signed; the signature is kept with the entry."""
        if entry.extra.get("forward"):
            message = message._replace(sender=self.srs.forward(message.sender))
        if "signature" not in entry.extra and self.keyring.is_empty():
            return message
        about = hashlib.sha256(message.sender.encode("utf-8") + b"\0" + message.head).hexdigest()[:16]   # not rewritten since
        kept = entry.extra.get("signature")
        if not (isinstance(kept, list) and len(kept) == 2 and kept[0] == about):
            trusted = bool(entry.extra.get("trusted"))
            signature = self.keyring.sign(content_blocks(message), message.sender, trusted, time.time())
            kept = entry.extra["signature"] = [about, signature.decode("ascii")]
        head = str(kept[1]).encode("ascii")
        return message._replace(head=head + message.head, size=message.size + len(head))

    def security(self, target: Target, host: str) -> Optional[Security]:
        """Return what the domain's MTA-STS policy demands (RFC 8461 section 5); Refused when it does not name the host."""
        policy = self._policy(target)
        if policy is None:
            return None
        name, testing = "the MTA-STS policy of " + target.domain, policy.mode == "testing"
        if policy.allows(host):
            return Security(not testing, True, name)
        if not testing:
            raise Refused(451, "4.7.5", "%s does not name the exchanger %s" % (name, host))
        event("sts-testing", domain=target.domain, host=host, reason="the policy does not name it")
        return None

    def explain(self, target: Target) -> str:
        policy = self._policy(target)
        demand = "TLS with a certificate that is verified, at %s (MTA-STS, %s)"
        return demand % (" ".join(policy.mx), policy.mode) if policy else ""

    def _policy(self, target: Target) -> Optional[STSPolicy]:
        if target.server or not target.domain or domain_literal(target.domain):
            return None
        return self.sts.policy(target.domain)


class StandingExtension(Extension):
    """What the queue and the sessions know of this section."""

    name = "standing"
    commands = {"dkim": dkim_command, "check": check_command}

    def listeners(self, config: Config) -> List[Any]:
        """Read the keys of --dkim while we may be root; CannotRun."""
        Keyring(config).check()
        return []

    def outbound(self, config: Config, stores: Any, resolver: Any) -> Standing:
        storage = stores.storage if stores else Storage(config.data, not config.no_sync)
        return Standing(config, stores.hostname if stores else config.hostname, storage, resolver)

    def equip(self, node: Any) -> None:
        if not node.config.capture:
            srs = SRS(node.config, node.stores.storage)
            with contextlib.suppress(OSError):      # now, for later the loop would wait for it; then it is tried again
                srs.secrets()
            node.stores.door.origin = srs.reverse


EXTENSIONS.append(StandingExtension())


# ======================================================================================================================
# 14  Sessions, limits, listeners.  The conversation as such: a coroutine that the loop carries; what all sessions share.
#     Knows sockets, but not what is spoken.
# ======================================================================================================================

class Connections:
    """Counts connections, in all and by client, for --max-connections and --max-per-client, in a table that processes share.

    Each process (`owner`, from 0) writes into its own part of the table only and reads all of it, so no lock is needed.
    """

    def __init__(self, limit: int, per_client: int, processes: int = 1) -> None:
        import mmap
        self.limit, self.per_client = limit, per_client
        self.owner = 0
        self.served = 0                             # by this process, since the start
        self._totals = mmap.mmap(-1, 4 * processes)
        self._slots = mmap.mmap(-1, 16 * limit * processes)     # a digest of the client's address each, else zeros
        self._key = os.urandom(16)
        self._free = list(range(limit))             # slots of this process's part
        self._clients: Dict[str, List[int]] = {}    # who has which of them
        self._lock = threading.Lock()

    def enter(self, client: str) -> str:
        """Count a connection; return why it is refused, "" when it is not."""
        with self._lock:
            if sum(memoryview(self._totals).cast("I")) >= self.limit:
                return "too many connections, try again later"
            digest = b""
            if not is_loopback(client):
                digest = hashlib.blake2b(client_network(client).encode(), digest_size=16, key=self._key).digest()
                if self._slots[:].count(digest) >= self.per_client:
                    return "too many connections from your address, try again later"
            slot = self._free.pop()
            self._clients.setdefault(client, []).append(slot)
            self._put(slot, digest, 1)
            self.served += 1
        return ""

    def leave(self, client: str) -> None:
        with self._lock:
            slot = self._clients[client].pop()
            if not self._clients[client]:
                del self._clients[client]
            self._put(slot, bytes(16), -1)
            self._free.append(slot)

    def _put(self, slot: int, digest: bytes, more: int) -> None:
        memoryview(self._totals).cast("I")[self.owner] += more
        if digest:
            start = 16 * (self.owner * self.limit + slot)
            self._slots[start:start + 16] = digest

    def free_all(self, owner: int) -> None:
        """Free what a dead process had."""
        memoryview(self._totals).cast("I")[owner] = 0
        self._slots[16 * owner * self.limit:16 * (owner + 1) * self.limit] = bytes(16 * self.limit)


class Throttle:
    """Counts passwords tried, before they are verified, by client and by account, in a table that processes share.

    Each count forgets slowly: LOGIN_FAILURES in LOGIN_WINDOW seconds. It stands in two of many buckets, of which the
    lower one counts: so memory is bounded, and a stranger is hardly ever taken for somebody else.
    """

    BUCKETS = 1 << 15                               # of 16 bytes: count, and when it was

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        import mmap
        self.clock = clock
        self._table = mmap.mmap(-1, 16 * self.BUCKETS)
        self._key = os.urandom(16)
        self._lock = threading.Lock()

    def _count(self, kind: str, name: str, more: float = 0.0) -> float:
        """Return how many tries are remembered, `more` added."""
        counts, now = [], self.clock()
        digest = hashlib.blake2b(("%s %s" % (kind, name)).encode("utf-8", "replace"), digest_size=8, key=self._key).digest()
        for half, number in enumerate(struct.unpack("II", digest)):     # never one bucket for both
            place = 16 * (2 * (number % (self.BUCKETS // 2)) + half)
            count, since = struct.unpack_from("dd", self._table, place)
            count = max(0.0, count - (now - since) * LOGIN_FAILURES / LOGIN_WINDOW)
            if more:
                struct.pack_into("dd", self._table, place, max(0.0, count + more), now)
            counts.append(float(count + more))
        return max(0.0, min(counts))

    def shut_out(self, client: str) -> bool:
        """True while the client has had too many wrong passwords."""
        return self._count("client", client_network(client)) > LOGIN_FAILURES - 1

    def charge(self, client: str, account: str) -> bool:
        """Count a try; False when it is one too many, and then it is not to be verified."""
        with self._lock:
            if self.shut_out(client) or self._count("account", account) > ACCOUNT_FAILURES - 1:
                return False
            self._count("client", client_network(client), 1.0)
            self._count("account", account, 1.0)
            return True

    def refund(self, client: str, account: str) -> None:
        """The password was right: take back its own try, but no other."""
        with self._lock:
            self._count("client", client_network(client), -1.0)
            self._count("account", account, -1.0)

    def delay(self, client: str) -> float:
        """Return for how many seconds the answer to a wrong password is kept back."""
        return min(0.25 * (1 + int(self._count("client", client_network(client)))), 3.0)


class Certificates(Watched):
    """The TLS context of our certificate, made anew when the files change, or others are named in a file of options."""

    def __init__(self, config: Config) -> None:
        self.config = config
        super().__init__((), self._load)
        try:
            self.get()
        except (OSError, ValueError) as error:
            cert, key = config.tls_cert, config.tls_key
            raise CannotRun("--tls-cert %s: cannot use it%s: %s" % (
                cert, " with --tls-key " + key if key else "", reason_of(error))) from None

    def files(self) -> List[str]:
        return [path for path in (self.config.current("tls_cert"), self.config.current("tls_key")) if path]

    def _load(self) -> "ssl.SSLContext":
        try:
            import ssl
        except ImportError:
            raise ValueError("this Python has no ssl module; leave the option out or use another Python") from None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)   # OpenSSL 1.1 does it as often as a client likes
        cert, *key = self.files()
        context.load_cert_chain(cert, key[0] if key else None, password=lambda: b"")
        return context

    def context(self) -> "ssl.SSLContext":
        """Return the server's context; the last good one when new files cannot be used."""
        context: "ssl.SSLContext" = self.get(fresh=True)   # a handshake costs more than a look at two files
        return context


class TooManyGuesses(Exception):
    """The client, or somebody at this account, has had too many wrong passwords."""


@dataclasses.dataclass
class Site:
    """What all sessions of a node share."""
    config: Config
    hostname: str
    mailboxes: Mailboxes
    accounts: Accounts
    book: AddressBook
    post: Post
    door: Door
    loop: Loop
    connections: Connections
    throttle: Throttle
    certificates: Optional[Certificates] = None
    recorder: Any = None                            # section 19: transcripts
    faults: Any = None                              # section 20: misbehaviour on purpose
    inbox: Any = None                               # section 22: web inbox and API
    accepted: Callable[[Parcel], None] = lambda parcel: None    # called once the client has its 250
    follow_up: Optional[Callable[[Parcel], None]] = None        # what comes then and may take long: in a thread
    stopping: bool = False
    sessions: Set["Session"] = dataclasses.field(default_factory=set)

    @functools.cached_property
    def trusts(self) -> Callable[[str], bool]:
        """Tells whether a client's IP address is one of --trust; what it said is remembered."""
        return functools.lru_cache(maxsize=1000)(lambda client: is_among(client, self.config.trust))

    def captured(self, name: str) -> str:
        """Return the key of who logs in in capture mode, where any name and password fit."""
        try:
            return self.book.key(parse_address(name, lenient=True))
        except Refused:
            return lower(name)

    def verify(self, client: str, name: str, password: str) -> Optional[str]:
        """Return the account's key, None when name and password do not fit. Takes 50 ms.

        TooManyGuesses when they are not even looked at.
        """
        account = account_key(name) or lower(name)  # however it is spelled
        if not self.throttle.charge(client, account):
            raise TooManyGuesses
        key = self.accounts.verify(name, password)
        if key is None:
            event("login-failed", client=client, user=printable(name, 100))
        else:
            self.throttle.refund(client, account)
        return key


class Stalled(Exception):
    """A fault rule says that nothing more is said here."""


class Session(socketserver.BaseRequestHandler, Task):
    """One client's conversation, a coroutine that the loop carries.

    The verbs are the methods do_VERB(argument) of the subclass: each returns its answer, is a coroutine that does (where it
    touches the wire or takes long), or raises Refused. Only tell() writes.
    """

    protocol = ""
    line_limit = MAX_COMMAND
    timeout = 300.0                                 # seconds
    ASKS_BOOK: Sequence[str] = ()                   # verbs that look into the files of users and aliases
    SHUT_OUT: Reply                                 # to one who has tried too many passwords

    def __init__(self, request: Any, client_address: Any, server: "Listener") -> None:
        # BaseRequestHandler would run the whole conversation here; ours is the loop's.
        self.request, self.client_address, self.server = request, client_address, server
        self.site: Site = server.site
        self.tls_from_start = server.tls
        self.client = clients_address(client_address[0])
        self.user: Optional[str] = None
        self.commands = self.errors = self.idle = 0     # given; wrong; in a row that led nowhere
        self.understood = False                     # one of them was right
        self.over = False
        self.pause = 0.0                            # seconds that a fault rule keeps the next answer back
        self.tape: Any = None
        self.verbose = log.isEnabledFor(logging.DEBUG)
        self.wire = Wire(request, self.site.config.seconds(self.timeout))
        self.site.sessions.add(self)
        self.coroutine = self.converse()

    @property
    def sock(self) -> socket.socket:
        return self.wire.sock

    @property
    def deadline(self) -> float:
        return self.wire.deadline

    async def converse(self) -> None:
        """Take commands and answer them until the session is over."""
        try:
            try:
                await self.open_session()
                while not self.over:
                    await self.next_command()
            except Stalled:
                self.wire.output.clear()
                while True:
                    await self.wire.fill()          # until the client is gone
            except TimedOut:
                self.wire.deadline = self.wire.clock() + 1.0
                self.over = True
                self.farewell()
            await self.wire.flush()
        except (Disconnected, TimedOut) as error:
            if str(error):
                event("lost", protocol=self.protocol, client=self.client, reason=printable(str(error)))
        except Exception:
            log.exception("session with %s failed", self.client)
        finally:
            self.site.loop.forget(self)
            self.wire.close()
            self.site.sessions.discard(self)
            self.site.connections.leave(self.client)
            self.ended()

    async def open_session(self) -> None:
        """Greet; with TLS from the first byte, make the handshake first."""
        if self.tls_from_start:
            await self.start_tls(b"")
        if self.site.door.asks_policy:
            try:
                await wait(lambda: self.site.door.ask("on_connect", self.client))
            except Refused as refused:
                event("refused", protocol=self.protocol, client=self.client, reason=printable(str(refused.reply)))
                self.over = True
                return self.wire.send(self.refusal(refused.reply.text))
        greeting = self.greeting()
        await self.keep_back()
        self.tell(greeting)

    async def next_command(self) -> None:
        """Take a command and answer it."""
        line: Optional[bytes] = None
        try:
            line = await self.wire.line(self.line_limit)
        except LineTooLong:
            pass
        self.commands += 1
        self.wire.renew()
        if self.commands % MAX_TURN == 0:
            await wait(TURN)
        answer = self.command(line) if line is not None else self.refuse("", Refused(
            500, "5.5.2", "line longer than %d bytes" % self.line_limit, close=self.commands == 1))
        if isinstance(answer, types.CoroutineType):
            answer = await answer
        if self.pause:
            await self.keep_back()
        self.tell(answer)
        if self.wire.pending >= BLOCK:
            await self.wire.flush()
        if self.site.stopping and not self.over:
            raise TimedOut

    def command(self, line: bytes) -> Any:
        """Return the answer to one command, or a coroutine that gives it.

        Whatever goes wrong in it is answered, too, and the conversation goes on.
        """
        verb, _, argument = line.partition(b" ")
        name = verb.decode("ascii", "replace").upper()
        method = getattr(self, "do_" + name, None) if name.isalnum() else None
        if self.verbose or self.tape:
            self.heard(line, name, method is not None)
        try:
            if method is None:
                self.not_a_command(line, name)
            if name in self.ASKS_BOOK and self.site.book.is_stale():
                return self.promised(name, self.ask_later(method, name, argument))
            answer = self.ask(method, name, argument)
        except Exception as error:
            return self.failed(name, error)
        if isinstance(answer, types.CoroutineType):
            return self.promised(name, answer)
        self.understood = True
        return answer

    async def promised(self, name: str, promise: Coroutine[Any, Any, Any]) -> Any:
        """Return the answer to a command that waits for something."""
        try:
            answer = await promise
        except Exception as error:
            return self.failed(name, error)
        self.understood = True
        return answer

    async def ask_later(self, method: Any, name: str, argument: bytes) -> Any:
        """Return the answer of a verb that looks into files which have to be read first; Refused."""
        await wait(self.site.book.refresh)
        answer = self.ask(method, name, argument)
        return await answer if isinstance(answer, types.CoroutineType) else answer

    def failed(self, name: str, error: Exception) -> Any:
        """Return the answer to a command in which something went wrong; what ends the conversation is raised again."""
        if isinstance(error, Refused):
            return self.refuse(name, error)
        if isinstance(error, (Disconnected, TimedOut, Stalled)):
            raise error
        if isinstance(error, OSError):
            self.site.mailboxes.storage.report("%s from %s: %s", printable(name, 20), self.client, error)
        else:
            log.error("%s from %s failed", printable(name, 20), self.client, exc_info=error)
        return self.trouble(error)

    async def start_tls(self, go_ahead: bytes) -> None:
        """Make the handshake, once the client was told that it may begin; Refused."""
        if not self.site.certificates or self.wire.tls:
            raise Refused(503, "5.5.1", "TLS is on already" if self.wire.tls else "no TLS here")
        self.wire.send(go_ahead)
        await self.wire.start_tls(self.site.certificates.context(), server_side=True)

    @property
    def may_log_in(self) -> bool:
        """True in capture mode, and where nobody on the network can read along."""
        return self.site.config.capture or self.wire.tls or is_loopback(self.client)

    async def log_in(self, name: str, password: str) -> Optional[str]:
        """Return the account's key, None when name and password do not fit: that is answered more and more slowly. Refused."""
        site = self.site
        if site.config.capture:
            return site.captured(name)
        self.check_guesses()
        known = site.accounts.recall(name, password)
        if known is not None:
            return known
        try:
            key: Optional[str] = await wait(
                Work(lambda: site.verify(self.client, name, password), site.accounts.hashing, self.is_wanted))
        except TooManyGuesses:                      # others came to their end while this one waited for its turn
            raise Refused(self.SHUT_OUT) from None
        if key is None:
            await wait(site.throttle.delay(self.client))
        return key

    async def challenge(self, words: bytes) -> bytes:
        """Return what the client answers to a SASL challenge; Refused, also when it cancels."""
        self.wire.send(words + b"\r\n")
        try:
            response = await self.wire.line(MAX_AUTH_LINE)
        except LineTooLong:
            raise Refused(500, "5.5.6", "response too long") from None
        if response == b"*":
            raise Refused(501, "5.7.0", "cancelled")
        return response

    def check_guesses(self) -> None:
        """Refused when the client has had too many wrong passwords."""
        if not self.site.config.capture and self.site.throttle.shut_out(self.client):
            raise Refused(self.SHUT_OUT)

    def is_wanted(self) -> bool:
        """Return whether the client is still there, and the node goes on: asked before a long calculation."""
        try:
            return not self.site.stopping and socket.socket.recv(self.wire.sock, 1, socket.MSG_PEEK) != b""
        except OSError as error:
            return is_timeout(error)

    def is_no_client(self, line: bytes) -> bool:
        """Return whether a wrong command shows that no mail client speaks: the first with no letter, or the third of three."""
        first = self.commands == 1 and not line[:1].isalpha()
        return not self.understood and (first or self.errors + 1 >= MAX_STRANGE)

    @staticmethod
    async def aside(function: Callable[[], Any]) -> Any:
        """Do something in another thread and return its result."""
        return await wait(function)

    # Misbehaviour on purpose.

    def fault(self, stage: str, subject: str) -> Optional[str]:
        """Return the answer that a fault rule gives instead of the right one; Disconnected, Stalled when it gives none."""
        action: Optional[str] = self.site.faults.take(stage, subject) if self.site.faults else None
        if action is None:
            return None
        event("fault", client=self.client, stage=stage, subject=printable(subject, 100), action=action)
        if action.startswith("delay "):
            self.pause += float(action[6:])
            return None
        if action == "stall":
            raise Stalled
        if action == "drop":
            self.wire.output.clear()
            raise Disconnected
        return action

    async def keep_back(self) -> None:
        """Wait as long as a fault rule wants the next answer to take."""
        if not self.pause:
            return
        seconds, self.pause = self.pause, 0.0
        self.wire.renew(seconds)
        await self.wire.flush()
        await wait(seconds)
        self.wire.renew()

    def shown(self, words: List[str]) -> List[str]:
        """Return what we can do without what a fault rule hides."""
        faults = self.site.faults
        return [word for word in words if not faults.hides(word.split()[0])] if faults else words

    # What the protocol adds.

    @staticmethod
    def refusal(reason: str) -> bytes:
        """Return the words for a connection that is not wanted."""
        raise NotImplementedError

    def greeting(self) -> Any:
        raise NotImplementedError

    def ask(self, method: Any, name: str, argument: bytes) -> Any:
        """Call a verb, and return its answer or a coroutine that gives it; Refused."""
        raise NotImplementedError

    def heard(self, line: bytes, name: str, known: bool) -> None:
        """Note a command. Only what a known one that has no secret says may be kept."""
        if self.verbose:
            log.debug("%s > %s", self.client, printable(self.public(line, name, known)))

    @staticmethod
    def public(line: bytes, name: str, known: bool) -> bytes:
        """Return a command as others may see it: what is not understood may be a password."""
        if not known:
            return b"(%d bytes that are no command)" % len(line)
        return name.encode() + b" ***" if name in ("AUTH", "PASS") else line

    def not_a_command(self, line: bytes, name: str) -> NoReturn:
        raise NotImplementedError

    def refuse(self, name: str, refused: Refused) -> Any:
        """Return the answer to a command that was refused, and count it."""
        raise NotImplementedError

    def trouble(self, error: Exception) -> Any:
        """Return the answer to a command that failed for a reason of ours."""
        raise NotImplementedError

    def tell(self, answer: Any) -> None:
        """Put an answer on the wire; the only place that does."""
        raise NotImplementedError

    def farewell(self) -> None:
        """Say why the session ends, if the protocol has words for it."""

    def ended(self) -> None:
        """Do what is due when the connection is closed."""


def sasl_plain(response: bytes, lenient: bool) -> Tuple[str, str]:
    """Return (name, password) of an AUTH PLAIN response, still base64 (RFC 4616); ValueError. `lenient`: whatever they are."""
    parts = base64.b64decode(b"" if response == b"=" else response, validate=True).split(b"\0")     # RFC 4954 section 4
    if lenient:
        return sasl_text(parts[1 if len(parts) > 1 else 0], True), sasl_text(parts[-1], True)
    if len(parts) != 3 or not parts[1]:
        raise ValueError("expected authzid NUL name NUL password")
    authzid, name, password = (part.decode("utf-8") for part in parts)
    if authzid and lower(authzid) != lower(name):
        raise ValueError("nobody may act for others here")
    return name, password


def sasl_text(data: bytes, lenient: bool) -> str:
    """Return a name or password as text; ValueError for what is not UTF-8, unless `lenient`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        if not lenient:
            raise ValueError("not UTF-8") from None
        return data.decode("latin-1")


class Listener(socketserver.TCPServer, Task):
    """A listening socket, a task of the loop as its sessions are; OSError when the port is taken."""

    request_queue_size = 512
    allow_reuse_address = os.name != "nt"
    talks = False

    def __init__(self, name: str, endpoint: Endpoint, session: Type[Session], tls: bool = False) -> None:
        self.name, self.session, self.tls = name, session, tls
        self.site: Any = None                       # listen() is told: after a fork, and as the user that runs
        try:
            host = endpoint[0].encode() if endpoint[0].isascii() else endpoint[0]       # bytes need no tables for IDNA
            found = socket.getaddrinfo(host, endpoint[1], type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self.address_family = found[0]
            super().__init__(found[4][:2], session)  # type: ignore[arg-type]
        except OSError as error:
            reason = reason_of(error)
            raise CannotRun(error.errno or errno.EINVAL, "--%s %s: cannot listen: %s; choose another address or port" % (
                name, show_endpoint(endpoint), reason)) from None
        self.socket.setblocking(False)              # several processes may be woken for one connection
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)   # its connections inherit it

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)   # so 0.0.0.0 can have the same port
        super().server_bind()

    @property
    def sock(self) -> socket.socket:
        return self.socket

    @property
    def endpoint(self) -> Endpoint:
        address = self.socket.getsockname()
        return address[0], address[1]

    def listen(self, site: Site) -> None:
        """Begin to take connections; for the loop's own thread, or before it starts."""
        self.site = site
        self.coroutine = self.accept()
        site.loop.spawn(self)

    async def accept(self) -> None:
        try:
            while not self.site.stopping:
                await wait(READ)
                try:
                    request, client = self.get_request()
                except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                    continue
                except OSError as error:            # no descriptors left: look again when some may have been freed
                    log.warning("cannot take a connection: %s", error)
                    await wait(0.25)
                    continue
                self.process_request(request, client)
        except (TimedOut, Disconnected):            # the node stops
            pass
        finally:
            self.site.loop.forget(self)
            self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        client = clients_address(client_address[0])
        refusal = self.site.connections.enter(client)
        if refusal:
            event("refused", protocol=self.name, client=client, reason=refusal)
            with contextlib.suppress(OSError):
                if not self.tls:
                    request.setblocking(False)
                    request.send(self.session.refusal(refusal))
            return self.shutdown_request(request)
        if log.isEnabledFor(logging.INFO):
            event("connect", protocol=self.name, client=show_endpoint(client_address[:2]))
        self.site.loop.spawn(self.session(request, client_address, self))


# ======================================================================================================================
# 15  SMTP.  RFC 5321 with PIPELINING, SIZE, 8BITMIME, SMTPUTF8, ENHANCEDSTATUSCODES, CHUNKING, STARTTLS, AUTH.
#     Verbs that wait say so in their first line, async def; the others turn (state, argument) into a reply.
# ======================================================================================================================

OK = Reply(250, "2.0.0", "ok")
SENDER_OK = Reply(250, "2.1.0", "sender ok")
RECIPIENT_OK = Reply(250, "2.1.5", "recipient ok")
GO_AHEAD = Reply(354, "", "go ahead, end with CRLF.CRLF")
NO_HOST_NAME = expression(r"[^A-Za-z0-9.:_\[\]-]")
HTTP_VERBS = (b"GET ", b"POST ", b"HEAD ", b"PUT ", b"DELETE ", b"OPTIONS ", b"CONNECT ", b"PATCH ", b"TRACE ", b"PRI ")


class Transaction:
    """A mail transaction between MAIL and the end of its content (RFC 5321 section 3.3); replaced whole, never reset."""

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope
        self.destinations: List[Destinations] = []
        self.parcel: Optional[Parcel] = None        # once the content has begun, and ...
        self.content: Content                       # ... its decoder


class SMTPSession(Session):
    """An SMTP server's side of a conversation."""

    protocol = "smtp"
    helo = ""
    esmtp = False
    refusals = 0
    transaction: Optional[Transaction] = None
    busy = False                                    # a message is coming in, or on its way to disk
    trusted = False                                 # may have mail passed on, and ...
    lenient = False                                 # ... say things as other servers take them; strangers speak RFC 5321
    started = 0.0
    ASKS_BOOK = ("MAIL", "RCPT", "AUTH")
    SHUT_OUT = Reply(421, "4.7.0", "too many wrong passwords, come back later", close=True)
    SYNCHRONOUS = ("EHLO", "HELO", "DATA", "STARTTLS", "AUTH", "VRFY", "QUIT", "NOOP")  # end a pipeline (RFC 2920)
    BARE = ("STARTTLS", "DATA", "RSET", "QUIT")     # take no argument
    LEADING_ON = ("MAIL", "RCPT", "DATA", "BDAT")   # to a message; the others do not, and have an end some time

    # What every conversation has.

    @staticmethod
    def refusal(reason: str) -> bytes:
        return Reply(421, "4.3.2", reason).encode()

    def greeting(self) -> Reply:
        self.become(None)
        if self.site.recorder:
            self.tape = self.site.recorder.tape(self)
        return self.faulty("connect", self.client) or Reply(220, "", self.site.hostname + " ESMTP minimail")

    def ask(self, method: Any, name: str, argument: bytes) -> Any:
        self.idle += name not in self.LEADING_ON
        if self.idle > MAX_IDLE_COMMANDS:
            raise Refused(421, "4.7.0", "so many commands and no message", close=True)
        text = decode_argument(argument, self.lenient)
        if text and name in self.BARE:
            raise Refused(501, "5.5.4", name + " takes no argument")
        if self.site.door.asks_policy and name in ("MAIL", "RCPT"):
            return self.aside(lambda: method(text))     # its hooks take as long as they like
        return method(text)

    def heard(self, line: bytes, name: str, known: bool) -> None:
        super().heard(line, name, known)
        if self.tape:
            self.tape.heard(self.public(line, name, known), name in self.SYNCHRONOUS and bool(self.wire.input))

    def not_a_command(self, line: bytes, name: str) -> NoReturn:
        if self.commands == 1 and line.startswith(HTTP_VERBS):
            web = self.site.config.web or ()
            hint = "; the web inbox is at http://" + show_endpoint(web[0]) if web else ""
            raise Refused(421, "4.7.0", "this is a mail server and speaks SMTP, not HTTP" + hint, close=True)
        if self.is_no_client(line):
            raise Refused(421, "4.7.0", "this is a mail server and speaks SMTP", close=True)
        if name in ("EXPN", "TURN", "ETRN", "SEND", "SOML", "SAML"):
            raise Refused(502, "5.5.1", "%s is not implemented here" % name)
        raise Refused(500, "5.5.2", "no such command; HELP lists them")

    def refuse(self, name: str, refused: Refused) -> Reply:
        """Return the reply, or a 421 when patience is at its end (RFC 5321 section 4.3.2, RFC 4954 section 4)."""
        reply = refused.reply
        self.idle += name in self.LEADING_ON        # it did not
        if reply.code in (500, 501, 502, 503, 504, 535, 538, 555):
            self.errors += 1
        elif reply.code in (550, 553):
            self.refusals += 1
        if self.errors >= MAX_ERRORS or self.refusals >= MAX_REFUSALS:
            return Reply(421, "4.7.0", "too many errors (the last: %s)" % reply.text.partition("\n")[0], close=True)
        return reply

    def trouble(self, error: Exception) -> Reply:
        return Reply(451, "4.3.0", "something went wrong here, try again later")

    def tell(self, reply: Optional[Reply]) -> None:
        if reply is None:                           # the verb has told it already
            return
        if reply.code >= 400:
            event("refused", protocol="smtp", client=self.client, reason=printable(str(reply)))
        elif self.verbose:
            log.debug("%s < %s", self.client, printable(str(reply)))
        data = reply.encode()
        if self.tape:
            self.tape.said(data)
        self.wire.send(data)
        self.over = self.over or reply.close

    def farewell(self) -> None:
        if self.site.stopping:
            self.tell(Reply(421, "4.3.2", self.site.hostname + " is shutting down, try again later"))
        else:
            self.tell(Reply(421, "4.4.2", self.site.hostname + " waited too long for you, closing"))

    def in_flight(self) -> bool:
        return self.busy

    def ended(self) -> None:
        self.drop_transaction()

    def faulty(self, stage: str, subject: str) -> Optional[Reply]:
        """Return the reply that a fault rule wants here."""
        text = self.fault(stage, subject)
        if text is None:
            return None
        code, _, words = text.partition(" ")
        match = re.match(r"([245]\.\d{1,3}\.\d{1,3}) ?(.*)", words)
        enhanced, words = match.groups() if match else (code[0] + ".0.0", words)
        return Reply(int(code), "" if stage in ("connect", "helo") else enhanced, words or "because a fault rule says so",
                     close=code == "421")

    def raise_fault(self, stage: str, subject: str) -> None:
        if self.site.faults:
            reply = self.faulty(stage, subject)
            if reply:
                raise Refused(reply)

    def raise_content_fault(self, stage: str, envelope: Envelope) -> None:
        """As raise_fault() for what concerns all recipients."""
        if self.site.faults:
            self.raise_fault(stage, " ".join(recipient.key for recipient in envelope.recipients))

    # Who are you?

    def become(self, user: Optional[str]) -> None:
        """Note who logged in, None for nobody, and what follows from that."""
        self.user = user
        self.trusted = user is not None or self.site.trusts(self.client)
        self.lenient = self.trusted or self.site.config.capture

    def do_HELO(self, argument: str) -> Reply:
        self.introduce(argument, esmtp=False)
        return Reply(250, "", self.site.hostname)

    def do_EHLO(self, argument: str) -> Reply:
        """RFC 5321 section 4.1.1.1: announce only what works."""
        self.introduce(argument, esmtp=True)
        words = ["PIPELINING", "SIZE %d" % self.site.config.max_size, "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES",
                 "CHUNKING", "DSN"]
        if self.site.certificates and not self.wire.tls:
            words.append("STARTTLS")
        if self.may_log_in and self.user is None:
            words.append("AUTH PLAIN LOGIN")
        words.append("HELP")
        return Reply(250, "", "\n".join([self.site.hostname] + self.shown(words)))

    def introduce(self, argument: str, esmtp: bool) -> None:
        name = argument.strip()
        if not name or (not self.lenient and (not name.isprintable() or not name.isascii() or " " in name or len(name) > 255)):
            raise Refused(501, "5.5.4", "say your host name: EHLO host.example")
        self.raise_fault("helo", name)
        self.drop_transaction()
        self.helo, self.esmtp = NO_HOST_NAME.sub("?", name[:255]), esmtp

    async def do_STARTTLS(self, argument: str) -> None:
        """RFC 3207. The next word is the client's."""
        await self.start_tls(Reply(220, "2.0.0", "go ahead").encode())
        self.drop_transaction()
        self.helo, self.esmtp = "", False           # section 4.2: forget everything
        self.become(None)
        if self.tape:
            self.tape.restart()

    async def do_AUTH(self, argument: str) -> Reply:
        """RFC 4954, PLAIN and LOGIN."""
        mechanism, _, initial = argument.partition(" ")
        capture = self.site.config.capture
        if not mechanism:
            raise Refused(501, "5.5.4", "AUTH PLAIN or LOGIN")
        if self.user is not None or self.transaction:
            raise Refused(503, "5.5.1", "you are logged in" if self.user is not None else "not during a transaction")
        if not self.esmtp and not capture:
            raise Refused(503, "5.5.1", "say EHLO first")
        if not self.may_log_in:
            raise Refused(538, "5.7.11", "log in over TLS only")
        self.check_guesses()
        try:
            if mechanism.upper() == "PLAIN":
                response = initial.encode() if initial else await self.challenge(b"334 ")
                name, password = sasl_plain(response, capture)
            elif mechanism.upper() == "LOGIN":
                response = initial.encode() if initial else await self.challenge(b"334 " + base64.b64encode(b"Username:"))
                name = sasl_text(base64.b64decode(response, validate=True), capture)
                response = await self.challenge(b"334 " + base64.b64encode(b"Password:"))
                password = sasl_text(base64.b64decode(response, validate=True), capture)
            else:
                raise Refused(504, "5.5.4", "AUTH PLAIN or LOGIN")
        except ValueError:                          # binascii.Error is one; its text could show what was sent
            raise Refused(501, "5.5.2", "bad AUTH response: not base64 of what %s takes" % printable(mechanism, 20)) from None
        self.raise_fault("auth", name)
        self.become(await self.log_in(name, password))
        if self.user is None:
            raise Refused(535, "5.7.8", "name and password do not fit")
        event("login", protocol="smtp", client=self.client, user=printable(self.user))
        return Reply(235, "2.7.0", "welcome")

    # The envelope.

    def do_MAIL(self, argument: str) -> Reply:
        if not self.helo and not self.lenient:
            raise Refused(503, "5.5.1", "say EHLO first")
        if self.transaction:
            raise Refused(503, "5.5.1", "one transaction at a time; RSET ends it")
        sender, rest = self.path_in(argument, "MAIL", "FROM")
        envelope = Envelope(str(sender) if sender else "", helo=self.helo, client=self.client, trusted=self.trusted)
        if rest:
            parameters = parse_parameters(rest)
            envelope.ret, envelope.envid = parse_dsn_of_mail(parameters)
            self.take_parameters(envelope, parameters)
        if not envelope.sender.isascii() and not envelope.smtputf8:
            raise Refused(553, "5.6.7", "this address needs SMTPUTF8")
        self.site.door.check_sender(sender, self.user)
        self.raise_fault("mail", envelope.sender)
        self.site.door.ask("on_mail", self.client, envelope.sender, self.user)
        envelope.protocol = with_keyword(self.esmtp, self.wire.tls, self.user is not None, envelope.smtputf8)
        self.transaction = Transaction(envelope)
        self.started = time.monotonic()
        return SENDER_OK

    def path_in(self, argument: str, verb: str, word: str) -> Tuple[Optional[Address], str]:
        """Return the address of a MAIL or RCPT, None for the null path, and the parameters behind it; Refused."""
        keyword, colon, path = argument.partition(":")
        if keyword.strip().upper() != word or not colon:
            raise Refused(501, "5.5.4", "%s %s:<address>" % (verb, word))
        address, rest = parse_path(path, self.lenient)
        return self.site.book.qualified(address) if address and self.lenient else address, rest

    def take_parameters(self, envelope: Envelope, parameters: Dict[str, str]) -> None:
        """Set what MAIL says about the message (RFC 1870, 6152, 6531, 4954); Refused."""
        for keyword, value in parameters.items():
            if keyword == "SIZE":
                if not re.fullmatch(r"\d{1,20}", value, re.ASCII):
                    raise Refused(501, "5.5.4", "SIZE=bytes")
                envelope.declared = int(value)
                if envelope.declared > self.site.config.max_size:
                    raise Refused(552, "5.3.4", "message larger than %d bytes" % self.site.config.max_size)
            elif keyword == "BODY":
                if value.upper() not in ("7BIT", "8BITMIME"):
                    raise Refused(501, "5.5.4", "BODY=7BIT or 8BITMIME")
                envelope.body = value.upper()
            elif keyword == "SMTPUTF8" and not value:
                envelope.smtputf8 = True
            elif keyword == "AUTH" and value:
                pass                                # RFC 4954 section 5: whom we do not trust may say what it likes
            else:
                raise Refused(555, "5.5.4", "unknown parameter " + printable(keyword, 60))

    def do_RCPT(self, argument: str) -> Reply:
        transaction, door = self.transaction, self.site.door
        if not transaction or transaction.parcel:
            raise Refused(503, "5.5.1", "MAIL comes first" if not transaction else "the content has begun")
        address, rest = self.path_in(argument, "RCPT", "TO")
        if address is None:
            raise Refused(501, "5.1.3", "the null path cannot receive mail")
        envelope = transaction.envelope
        wish = None
        if rest:
            parameters = parse_parameters(rest)
            wish = parse_dsn_of_rcpt(parameters, envelope.smtputf8) if parameters else None
            for parameter in parameters:
                raise Refused(555, "5.5.4", "unknown parameter " + printable(parameter, 60))
        if not envelope.smtputf8 and not str(address).isascii():
            raise Refused(553, "5.6.7", "this address needs SMTPUTF8")
        destinations = door.destinations(envelope, self.of_ours(address), self.trusted)
        if self.site.faults:
            self.raise_fault("rcpt", address.key)
        if door.asks_policy:
            door.ask("on_rcpt", envelope, str(address))
        envelope.recipients.append(address)
        if wish:
            envelope.wishes[address.key] = wish
        transaction.destinations.append(destinations)
        return RECIPIENT_OK

    def of_ours(self, address: Address) -> Address:
        """Return the address, the first domain for the literal of the address that the client reached us at."""
        if not address.domain.startswith("[") or self.site.config.capture:
            return address
        own = domain_literal(address.domain) == clients_address(self.wire.sock.getsockname()[0])
        return Address(address.local, self.site.book.home) if own else address

    # The content.

    async def do_DATA(self, argument: str) -> None:
        """The 250 is a promise: the message is on disk for every recipient."""
        transaction = self.begin_content()
        if transaction.parcel:
            raise Refused(503, "5.5.1", "BDAT has begun, DATA cannot follow")
        parcel = self.begin_parcel(transaction, dots=True)
        await self.keep_back()
        self.tell(GO_AHEAD)
        await self.receive(parcel, transaction.content, None)
        await self.deliver(transaction, parcel)

    async def do_BDAT(self, argument: str) -> Optional[Reply]:
        """RFC 3030: a chunk is read to its end whatever is wrong, so that the conversation stays in step."""
        match = re.fullmatch(r"(\d{1,15})( +LAST)?", argument.strip(), re.ASCII | re.IGNORECASE)
        if not match:
            raise Refused(501, "5.5.4", "BDAT bytes [LAST]")
        count, last = int(match.group(1)), bool(match.group(2))
        try:
            transaction = self.begin_content()
            parcel = transaction.parcel or self.begin_parcel(transaction, dots=False)
        except Refused:
            await self.receive(None, Content(dots=False), count)
            raise
        await self.receive(parcel, transaction.content, count)
        if not last and not parcel.draft.too_large:
            self.idle += not count
            return Reply(250, "2.0.0", "%d bytes" % count)
        self.write_content(parcel, transaction.content.end())
        await self.deliver(transaction, parcel)
        return None

    def begin_content(self) -> Transaction:
        if not self.transaction:
            raise Refused(503, "5.5.1", "MAIL comes first")
        if not self.transaction.destinations:
            raise Refused(554, "5.5.1", "no valid recipients")
        return self.transaction

    def begin_parcel(self, transaction: Transaction, dots: bool) -> Parcel:
        self.raise_content_fault("data", transaction.envelope)
        if self.tape:
            self.tape.begin()
        transaction.parcel = self.site.post.begin(transaction.envelope, transaction.destinations)
        transaction.content = Content(dots)
        return transaction.parcel

    async def receive(self, parcel: Optional[Parcel], content: Content, left: Optional[int]) -> None:
        """Read `left` bytes of content, None: up to its end, into the parcel, None: nowhere.

        What is too large is read and forgotten, but not for ever. The deadline moves with what arrives, at MIN_RATE: a
        client that drips runs into it, and so does one that is silent for --timeout, whatever came before.
        """
        wire, total = self.wire, 0
        started, much = wire.clock(), 2 * self.site.config.max_size + (1 << 26)
        self.busy = True
        try:
            while left != 0 and not content.finished:
                data = await wire.take(BIG_BLOCK if left is None else min(BIG_BLOCK, left))
                block = content.feed(data)
                total += len(data)
                if parcel:
                    self.write_content(parcel, block)
                if left is not None:
                    left -= len(data)
                if total > much:
                    raise Refused(552, "5.3.4", "message larger than %d bytes" % self.site.config.max_size, close=True)
                wire.deadline = min(wire.clock(), started + total / MIN_RATE) + wire.timeout
        finally:
            self.busy = False
        wire.input[:0] = content.rest
        wire.renew()

    def write_content(self, parcel: Parcel, block: bytes) -> None:
        parcel.draft.write(block)
        if self.tape:
            self.tape.block(block)

    async def deliver(self, transaction: Transaction, parcel: Parcel) -> None:
        """Put a message on disk and answer for it; then tell those who wait for mail. Refused."""
        self.transaction = None
        self.busy = True
        try:
            await self.ask_all(transaction, parcel)
            refused = await wait(parcel)
            if refused:
                if self.site.recorder:
                    await wait(functools.partial(self.site.recorder.forget, parcel.draft.id))
                raise refused
        finally:
            self.busy = False
        self.idle = 0
        self.tell(self.answer(parcel))
        try:
            await self.wire.flush()                 # the client has its 250 before anybody else hears of the message
        finally:                                    # if it is gone, the message is there all the same
            if self.tape:
                self.tape.restart()
            self.site.accepted(parcel)
            if self.site.follow_up:
                follow_up = self.site.follow_up
                await wait(lambda: follow_up(parcel))

    async def ask_all(self, transaction: Transaction, parcel: Parcel) -> None:
        """Ask who has a say in a message that is there as a whole; Refused, and then nothing of it is left."""
        door, envelope = self.site.door, transaction.envelope
        try:
            self.raise_content_fault("end", envelope)
            await self.keep_back()
            if door.asks_policy:
                await wait(lambda: door.finish(parcel))
            else:
                door.finish(parcel)
            if self.tape:
                self.tape.save(envelope, transaction.content, parcel)
        except BaseException:
            parcel.draft.discard()
            raise

    def answer(self, parcel: Parcel) -> Reply:
        envelope = parcel.envelope
        if log.isEnabledFor(logging.INFO):
            event("message", id=envelope.id, client=self.client, sender=printable(envelope.sender),
                  recipients=len(envelope.recipients), to=printable(" ".join(map(str, envelope.recipients[:10]))),
                  size=parcel.draft.size, seconds=round(time.monotonic() - self.started, 4))
        return Reply(250, "2.0.0", "accepted as " + envelope.id)

    # The rest.

    def do_RSET(self, argument: str) -> Reply:
        self.drop_transaction()
        return OK

    def drop_transaction(self) -> None:
        if self.transaction and self.transaction.parcel:
            self.transaction.parcel.draft.discard()
        self.transaction = None

    def do_NOOP(self, argument: str) -> Reply:
        return OK

    def do_VRFY(self, argument: str) -> Reply:
        """RFC 5321 section 7.3: who asks is not told who lives here."""
        if not argument.strip():
            raise Refused(501, "5.5.4", "VRFY address")
        return Reply(252, "2.5.0", "send it and see")

    def do_HELP(self, argument: str) -> Reply:
        verbs = sorted(name[3:] for name in dir(self) if name.startswith("do_"))
        return Reply(214, "2.0.0", "RFC 5321 is spoken here: " + " ".join(verbs))

    def do_QUIT(self, argument: str) -> Reply:
        return Reply(221, "2.0.0", self.site.hostname + " says goodbye", close=True)


CONTROL = expression(r"[\x00-\x1f\x7f]")


def decode_argument(argument: bytes, lenient: bool) -> str:
    """Return a command's argument as text; Refused 501 for what is not UTF-8 or has control characters (RFC 6531).

    With `lenient`, what is not UTF-8 is Latin-1.
    """
    try:
        text = argument.decode("utf-8").rstrip(" \t")
    except UnicodeDecodeError:
        if not lenient:
            raise Refused(501, "5.5.2", "not UTF-8") from None
        text = argument.decode("latin-1").rstrip(" \t")
    if not text.isprintable():
        text = re.sub(r":\t+", ": ", text) if lenient else text    # before an address, as Postfix takes it
        if CONTROL.search(text):
            raise Refused(501, "5.5.2", "control characters")
    return text


# ======================================================================================================================
# 16  POP3.  RFC 1939 with TOP, UIDL, CAPA (RFC 2449), AUTH PLAIN (RFC 5034), STLS (RFC 2595), UTF8 (RFC 6856).
# ======================================================================================================================

class POP3Session(Session):
    """A POP3 server's side of a conversation: it works on the listing it made at log-in."""

    protocol = "pop3"
    line_limit = 2048                               # RFC 2449 section 4 asks for 255; UTF-8 names are longer
    timeout = 600.0
    name = ""
    lock = -1
    ASKS_BOOK = ("PASS", "AUTH")
    SHUT_OUT = Reply(500, "", "[AUTH] too many wrong passwords, come back later", close=True)
    BEFORE = ("USER", "PASS", "AUTH", "CAPA", "STLS", "QUIT", "NOOP", "UTF8")   # the AUTHORIZATION state (RFC 1939 section 4)
    ONLY_BEFORE = ("USER", "PASS", "AUTH", "STLS")
    LEADING_ON = ("RETR", "TOP", "DELE")            # the others have an end some time, ...
    ABOUT_ONE = ("LIST", "UIDL")                    # ... but for what clients ask about each message

    @staticmethod
    def refusal(reason: str) -> bytes:
        return b"-ERR [SYS/TEMP] %s\r\n" % printable(reason).encode("utf-8", "replace")

    def greeting(self) -> bytes:
        self.items = Listing()
        self.deleted: Set[int] = set()
        self.total = 0                              # bytes in the messages that are not deleted
        self.fetched = self.bytes = self.removed = 0
        text = self.fault("connect", self.client)
        return b"+OK minimail POP3 server ready\r\n" if text is None else \
            b"-ERR %s\r\n" % (text.partition(" ")[2] or "because a fault rule says so").encode()

    def ask(self, method: Any, name: str, argument: bytes) -> Any:
        if self.user is None and name not in self.BEFORE:
            raise Refused(500, "", "log in first")
        if self.user is not None and name in self.ONLY_BEFORE:
            raise Refused(500, "", "you are logged in")
        self.idle += name not in self.LEADING_ON and not (name in self.ABOUT_ONE and argument.strip())
        if self.idle > MAX_IDLE_COMMANDS:
            raise Refused(500, "", "so many commands that lead nowhere", close=True)
        return method(argument)

    def not_a_command(self, line: bytes, name: str) -> NoReturn:
        raise Refused(500, "", "no such command", close=self.is_no_client(line))

    def refuse(self, name: str, refused: Refused) -> bytes:
        event("refused", protocol="pop3", client=self.client, verb=printable(name, 20) if hasattr(self, "do_" + name) else "",
              reason=refused.reply.text)
        wrong = name not in ("RETR", "TOP", "DELE", "LIST", "UIDL")     # else only the number may be
        self.errors += wrong
        self.idle += not wrong
        self.over = self.over or refused.reply.close or self.errors >= MAX_ERRORS
        return b"-ERR %s\r\n" % printable(refused.reply.text).encode("utf-8", "replace")

    def trouble(self, error: Exception) -> bytes:
        return self.refusal(error.strerror or "error" if isinstance(error, OSError) else "something went wrong here")

    def tell(self, answer: bytes) -> None:
        self.wire.send(answer)

    def raise_fault(self, stage: str, subject: str) -> None:
        text = self.fault(stage, subject)
        if text is not None:
            raise Refused(500, "", text.partition(" ")[2] or "because a fault rule says so", close=text.startswith("421"))

    # Authorization state.

    def do_CAPA(self, argument: bytes) -> bytes:
        words = ["TOP", "UIDL", "RESP-CODES", "AUTH-RESP-CODE", "PIPELINING", "EXPIRE NEVER", "UTF8"]
        if self.may_log_in:
            words += ["USER", "SASL PLAIN"]
        if self.site.certificates and not self.wire.tls and self.user is None:
            words.append("STLS")
        words.append("IMPLEMENTATION minimail-" + __version__)
        return ("+OK\r\n%s\r\n.\r\n" % "\r\n".join(self.shown(words))).encode()

    def do_UTF8(self, argument: bytes) -> bytes:
        """RFC 6856: what we send has always been raw."""
        return b"+OK\r\n"

    async def do_STLS(self, argument: bytes) -> bytes:
        await self.start_tls(b"+OK go ahead\r\n")
        self.name = ""
        return b""

    def check_privacy(self) -> None:
        if not self.may_log_in:
            raise Refused(500, "", "[AUTH] log in over TLS only")
        self.check_guesses()

    def do_USER(self, argument: bytes) -> bytes:
        self.check_privacy()
        self.name = argument.strip().decode("utf-8", "replace")
        if not self.name:
            raise Refused(500, "", "USER address")
        return b"+OK now PASS\r\n"

    async def do_PASS(self, argument: bytes) -> bytes:
        self.check_privacy()
        if not self.name:
            raise Refused(500, "", "USER comes first")
        name, self.name = self.name, ""
        return await self.open_mailbox(name, argument.decode("utf-8", "surrogateescape"))

    async def do_AUTH(self, argument: bytes) -> bytes:
        """RFC 5034."""
        mechanism, _, response = argument.strip().partition(b" ")
        if not mechanism:
            return b"+OK\r\nPLAIN\r\n.\r\n"
        self.check_privacy()
        if mechanism.upper() != b"PLAIN":
            raise Refused(500, "", "AUTH PLAIN")
        if not response:
            response = await self.challenge(b"+ ")
        try:
            name, password = sasl_plain(response, self.site.config.capture)
        except ValueError:
            raise Refused(500, "", "bad AUTH response") from None
        return await self.open_mailbox(name, password)

    async def open_mailbox(self, name: str, password: str) -> bytes:
        self.raise_fault("pop3-login", lower(name))
        user, mailboxes = await self.log_in(name, password), self.site.mailboxes
        if user is None:
            raise Refused(500, "", "[AUTH] name and password do not fit")
        try:
            self.lock = mailboxes.lock(user)
        except BlockingIOError:
            raise Refused(500, "", "[IN-USE] another session has this mailbox") from None
        try:
            items = mailboxes.remembered(user)
            self.items = await wait(lambda: mailboxes.listing(user)) if items is None else items
        except OSError:                             # nobody is logged in, so the lock is nobody's
            self.release()
            raise
        self.user, self.total = user, self.items.total
        event("login", protocol="pop3", client=self.client, user=printable(user), messages=len(self.items))
        return b"+OK %d messages\r\n" % len(self.items)

    # Transaction state. Message numbers count from 1.

    def item(self, argument: bytes) -> Tuple[int, Item]:
        text = argument.strip()
        index = int(text) - 1 if text.isdigit() and len(text) < 10 else -1
        if not 0 <= index < len(self.items) or index in self.deleted:
            raise Refused(500, "", "no such message")
        return index, self.items[index]

    def do_STAT(self, argument: bytes) -> bytes:
        return b"+OK %d %d\r\n" % (len(self.items) - len(self.deleted), self.total)

    async def do_LIST(self, argument: bytes) -> bytes:
        return await self.list(argument, lambda start, end: self.items.sizes[start:end])

    async def do_UIDL(self, argument: bytes) -> bytes:
        return await self.list(argument, self.items.uids)

    async def list(self, argument: bytes, about: Callable[[int, int], Sequence[Any]]) -> bytes:
        """Say something about one message or, some at a time, about all."""
        if argument.strip():
            index = self.item(argument)[0]
            return ("+OK %d %s\r\n" % (index + 1, about(index, index + 1)[0])).encode()
        self.wire.send(b"+OK\r\n")
        for start in range(0, len(self.items), MAX_STEP):
            lines = ["%d %s\r\n" % (index + 1, word) for index, word in enumerate(about(start, start + MAX_STEP), start)
                     if index not in self.deleted]
            self.wire.send("".join(lines).encode())
            if start:
                await self.wire.drain()
                await wait(TURN)
        return b".\r\n"

    async def do_RETR(self, argument: bytes) -> bytes:
        item = self.item(argument)[1]
        self.raise_fault("pop3-retr", self.user or "")
        content = await self.of_file(self.site.mailboxes.start_of, item) if item.size <= BLOCK else b""
        if len(content) == item.size and content.endswith(b"\r\n"):
            answer = b"+OK %d octets\r\n%s.\r\n" % (item.size, stuff_dots(content, True))
        else:
            await self.send_message(item)
            answer = b".\r\n"
        self.idle = 0
        self.fetched += 1
        self.bytes += item.size
        return answer

    async def of_file(self, get: Callable[..., Any], item: Item) -> Any:
        """Return what a function of the mailboxes gives for a message; Refused when it is gone, OSError."""
        user = self.user or ""
        try:
            try:
                return get(user, item, search=False)
            except FileNotFoundError:
                return await wait(lambda: get(user, item))
        except FileNotFoundError:
            raise Refused(500, "", "[SYS/TEMP] the message is gone: another program removed it") from None

    async def send_message(self, item: Item) -> None:
        """Send a message that is large, or not as its name says, without the final dot."""
        fd = await self.of_file(self.site.mailboxes.open, item)
        try:
            native = os.fstat(fd).st_size == item.size and pread(fd, 2, max(0, item.size - 2)) == b"\r\n"
            self.wire.send(b"+OK %d octets\r\n" % item.size)
            await (self.send_blocks(fd, item.size) if native else self.send_converted(fd, None))
        finally:
            os.close(fd)

    async def send_blocks(self, fd: int, size: int) -> None:
        """Send a large message of ours: what has no leading dots goes from file to socket in the kernel."""
        offset, line_start = 0, True
        while offset < size:
            self.wire.renew()
            block = pread(fd, BIG_BLOCK, offset)
            if not block:
                raise Disconnected                  # truncated meanwhile: the promised length cannot be kept
            if block.endswith(b"\r") and len(block) > 1:
                block = block[:-1]                  # never cut a CRLF in two
            if b"." in block and (LEADING_DOT.search(block) or (line_start and block.startswith(b"."))):
                self.wire.send(stuff_dots(block, line_start))
                await self.wire.flush()
            else:
                await self.wire.send_file(fd, offset, len(block))
            line_start = block.endswith(b"\n")
            offset += len(block)
            await wait(TURN)

    async def send_converted(self, fd: int, lines: Optional[int]) -> None:
        """Send a message with CRLF line ends, whoever stored it; with `lines`, its header and so many lines of the body."""
        text, offset = Stuffed(), 0
        top = Top(lines) if lines is not None else None
        while not (top and top.is_done):
            self.wire.renew()
            block = pread(fd, BLOCK, offset)
            data = text.lines(block) if block else text.last_end()
            self.wire.send(text.stuff(top.cut(data) if top else data))
            if not block:
                break
            offset += len(block)
            await self.wire.drain()
            await wait(TURN)

    async def do_TOP(self, argument: bytes) -> bytes:
        words = argument.split()
        if len(words) != 2 or not words[1].isdigit() or len(words[1]) > 9:
            raise Refused(500, "", "TOP message lines")
        fd = await self.of_file(self.site.mailboxes.open, self.item(words[0])[1])
        try:
            self.wire.send(b"+OK\r\n")
            await self.send_converted(fd, int(words[1]))
        finally:
            os.close(fd)
        return b".\r\n"

    def do_DELE(self, argument: bytes) -> bytes:
        index, item = self.item(argument)
        self.deleted.add(index)
        self.total -= item.size
        return b"+OK gone at QUIT\r\n"

    def do_RSET(self, argument: bytes) -> bytes:
        self.total += sum([self.items.sizes[index] for index in self.deleted])
        self.deleted.clear()
        return b"+OK\r\n"

    def do_NOOP(self, argument: bytes) -> bytes:
        return b"+OK\r\n"

    async def do_QUIT(self, argument: bytes) -> bytes:
        """RFC 1939 section 6: only here is anything removed."""
        self.over = True
        if self.user is None:
            return b"+OK\r\n"
        self.raise_fault("pop3-quit", self.user)
        if len(self.deleted) > MAX_REMOVED or self.deleted and self.site.mailboxes.forget:
            await wait(self.remove)                 # what is known of messages may have to be looked for first
        elif self.deleted:
            self.remove()
        failed = len(self.deleted) - self.removed
        self.release()
        if failed:
            return b"-ERR [SYS/PERM] %d deleted messages not removed\r\n" % failed
        return b"+OK\r\n"

    def remove(self) -> None:
        self.removed = len(self.deleted)
        for item, error in self.site.mailboxes.delete(self.user or "", (self.items[index] for index in self.deleted)):
            if error:
                self.removed -= 1
                log.warning("cannot remove %s: %s", item.name, error)

    def release(self) -> None:
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def ended(self) -> None:
        self.release()
        if self.user is not None:
            event("fetch", client=self.client, user=printable(self.user), messages=self.fetched, bytes=self.bytes,
                  deleted=self.removed)


class Top:
    """The beginning of a message: its header and so many lines of the body (RFC 1939 section 7); blocks have CRLF ends."""

    def __init__(self, lines: int) -> None:
        self.left = lines
        self.is_done = False
        self._in_body = False
        self._tail = b"\r\n"                        # what came last: an empty line may begin in it

    def cut(self, data: bytes) -> bytes:
        """Return as much of a block as belongs to it."""
        start = 0
        if not self._in_body:
            found = (self._tail + data).find(b"\r\n\r\n")
            if found < 0:
                self._tail = (self._tail + data)[-3:]
                return data
            self._in_body = True
            start = max(0, found + 4 - len(self._tail))
        count = data.count(b"\n", start)
        if count < self.left:
            self.left -= count
            return data
        self.is_done = True
        rest = data[start:].split(b"\n", self.left)[-1]
        return data[:len(data) - len(rest)]


class POP3Extension(Extension):
    """The POP3 listeners."""

    name = "pop3"

    def listeners(self, config: Config) -> List[Any]:
        return [Listener("pop3", endpoint, POP3Session) for endpoint in config.pop3] + [
            Listener("pop3s", endpoint, POP3Session, tls=True) for endpoint in config.pop3s]


EXTENSIONS.append(POP3Extension())


# ======================================================================================================================
# 17  Node.  Puts everything together; the library's front door.
# ======================================================================================================================

def first_address(name: str) -> Any:
    """Return a property of a node: (host, port) of its first listener of that name, None without one."""
    return property(lambda node: next((endpoint for kind, endpoint in node.endpoints() if kind == name), None),
                    doc="(host, port) of the first %s listener, None without one." % name)


class Node:
    """A mail node: the options of the command line as keywords, `data=None` for a temporary directory.

    The web inbox is off unless given; so is POP3 when `smtp` is given, and the other way round.
    Use it with `with`, or call start() and stop(). A wrong option is TypeError or ValueError naming it, a port that is
    taken an OSError naming it. `on_message(message)` is called once per accepted message, after the client has its 250.
    """

    relays = True                                   # what is queued; not for `sendmail -bs`, whose caller waits for its end

    def __init__(self, *, data: Optional[str] = None, on_message: Optional[Callable[[Message], Any]] = None,
                 policy: Optional[Policy] = None, clock: Callable[[], float] = time.time, resolver: Any = None,
                 **options: Any) -> None:
        if "faults" in options:
            options["fault"] = options.pop("faults")
        zone = options.pop("dns") if isinstance(options.get("dns"), dict) else None
        unknown = set(options) - set(option_fields())
        if unknown:
            raise TypeError("Node() has no option %r" % min(unknown))
        given = {name: value for name, value in options.items() if value is not None or name in LISTENERS}
        given.setdefault("web", "off")
        if "smtp" in given or "pop3" in given:      # then the other one's fixed port would only be in the way
            given.setdefault("smtp", "off")
            given.setdefault("pop3", "off")
        if data is not None:
            given["data"] = data
        config = Config(**read_options(given, lambda name: name))
        check_together(config, lambda name: name)
        check_library({"on_message": on_message, "policy": policy, "clock": clock})
        if config.workers != 1:
            raise ValueError("workers: only the command line forks; start several nodes on one data directory instead")
        self._set_up(config, data is None, on_message, policy, clock, resolver, zone)

    @classmethod
    def from_config(cls, config: Config) -> "Node":
        """Return the node of a command line."""
        node = cls.__new__(cls)
        node._set_up(config, False, None, None, time.time, None, None)
        return node

    def _set_up(self, config: Config, temporary: bool, on_message: Optional[Callable[[Message], Any]],
                policy: Optional[Policy], clock: Callable[[], float], resolver: Any, zone: Any) -> None:
        self.config = config
        self.clock, self.resolver, self.zone = clock, resolver, zone
        self._temporary = temporary
        self._on_message = on_message
        self._policy = policy
        self._listeners: List[Any] = []
        self._certificates: Optional[Certificates] = None
        self.connections = Connections(config.max_connections, config.max_per_client, config.workers)
        self.throttle = Throttle()
        self._arrived = threading.Condition()
        self._running = False
        self.started_at = 0.0
        self.accepted = self.accepted_bytes = 0     # messages, since the start
        self.stores: Optional[Stores] = None
        self.site: Optional[Site] = None
        self.data = "" if temporary else os.path.abspath(config.data)

    # Coming and going.

    def __enter__(self) -> "Node":
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def start(self) -> None:
        """Bind the listeners and begin to serve; nothing when the node runs already. OSError, with all undone."""
        if not self._running:
            self.bind()
            self.serve()

    def bind(self) -> None:
        """Take the ports, and read what only root may read."""
        config = self.config
        if config.tls_cert:
            self._certificates = Certificates(config)
        elif config.smtps or config.pop3s or config.webs:
            raise CannotRun("--smtps, --pop3s and --webs need --tls-cert FILE")
        try:
            for endpoint in config.smtp:
                self._listeners.append(Listener("smtp", endpoint, SMTPSession))
            for endpoint in config.smtps:
                self._listeners.append(Listener("smtps", endpoint, SMTPSession, tls=True))
            for section in EXTENSIONS:
                self._listeners += section.listeners(config)
        except BaseException:
            self._close_listeners()
            raise

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.server_close()
        self._listeners = []

    def serve(self) -> None:
        """Begin to take connections on the bound ports."""
        try:
            if self._temporary:
                self.data = tempfile.mkdtemp(prefix="minimail-")
            self.stores = stores = open_stores(dataclasses.replace(self.config, data=self.data), self.clock, self._policy)
            stores.book.refresh()
            loop = Loop(stores.post.commit_all, stores.post.is_heavy)
            follow_up = self._follow_up if self._on_message or self.config.keep or self.config.max_age else None
            self.site = site = Site(
                self.config, stores.hostname, stores.mailboxes, stores.accounts, stores.book, stores.post, stores.door, loop,
                self.connections, self.throttle, self._certificates, accepted=self._accepted, follow_up=follow_up)
            self._running = True
            for section in EXTENSIONS:
                section.equip(self)
            for listener in self._listeners:
                listener.listen(site)
            loop.start()
            self.started_at = time.time()
            for section in EXTENSIONS:
                section.start(self)
            loop.crew.do(self._sweep)
            if self.config.max_age:
                threading.Thread(target=self._expire, args=(site,), name="minimail-age", daemon=True).start()
        except BaseException as error:
            self.stop()
            self._undo_start()
            if not isinstance(error, OSError):
                raise
            name = ": " + error.filename if isinstance(error.filename, str) else ""
            raise CannotRun(error.errno or errno.EIO, "cannot use the data directory %s%s: %s" % (
                self.data or self.config.data, name, reason_of(error))) from None

    def _sweep(self) -> None:
        """Clean up what dead processes left behind."""
        site = self.site
        try:
            if site:
                site.mailboxes.sweep()
            if site and site.recorder:
                site.recorder.sweep()
        except OSError as error:                    # nothing is taken for gone that cannot be looked at
            log.warning("not all that dead processes left is cleaned up: %s", error)

    def _expire(self, site: Site) -> None:
        """Remove what has become older than --max-age where nothing new comes, until the node stops."""
        age = self.config.max_age or 0.0
        while not site.stopping:
            try:
                for mailbox in site.mailboxes.names():
                    site.mailboxes.prune(mailbox, None, age)
            except OSError as error:
                log.warning("mailboxes keep too much: %s", error)
            due = time.monotonic() + min(max(age / 10, 0.5), 60.0)
            while time.monotonic() < due and not site.stopping:
                time.sleep(site.mailboxes.storage.LOOK)

    def _undo_start(self) -> None:
        self._close_listeners()
        if self.stores:
            self.stores.accounts.hashing.close()
        if self._temporary and self.data:
            shutil.rmtree(self.data, ignore_errors=True)
            self.data = ""
        self.stores = self.site = None

    def stop(self) -> None:
        """End all sessions, each once its message in flight is done, all within 10 seconds; nothing when stopped."""
        if not self._running or not self.site:
            return
        self._running = False
        site, deadline = self.site, time.monotonic() + SHUTDOWN_GRACE
        site.stopping = True
        with self._arrived:
            self._arrived.notify_all()              # who waits for mail
        for section in EXTENSIONS:
            section.stop(self)
        site.loop.stop(SHUTDOWN_GRACE)
        for section in EXTENSIONS:
            section.join(self, max(0.1, deadline - time.monotonic()))
        self._undo_start()

    # Where it is.

    def endpoints(self) -> List[Tuple[str, Endpoint]]:
        """Return (name, (host, port)) of every listener."""
        return [(listener.name, listener.endpoint) for listener in self._listeners]

    smtp_address = first_address("smtp")
    smtps_address = first_address("smtps")
    pop3_address = first_address("pop3")
    pop3s_address = first_address("pop3s")
    web_address = first_address("web")
    webs_address = first_address("webs")

    # The mail in it.

    def _accepted(self, parcel: Parcel) -> None:
        """The client has its 250: wake who waits."""
        with self._arrived:                         # the API calls from threads of its own
            self.accepted += 1
            self.accepted_bytes += parcel.draft.size
            self._arrived.notify_all()
        if self.site and self.site.inbox:
            self.site.inbox.accepted(parcel)

    def _follow_up(self, parcel: Parcel) -> None:
        """Do what follows a delivery and may take long; in a thread. Errors are not for the client, which has its answer."""
        stores = self.stores
        if not stores:
            return
        for mailbox in parcel.mailboxes if self.config.keep or self.config.max_age else ():
            try:
                stores.mailboxes.prune(mailbox, self.config.keep, self.config.max_age)
            except OSError as error:
                log.warning("mailbox %s keeps too much: %s", printable(mailbox), error)
        if self._on_message and parcel.mailboxes:
            try:
                self._on_message(self._message(stores, parcel))
            except Exception:
                log.exception("on_message failed; the message %s is stored", parcel.draft.id)

    @staticmethod
    def _message(stores: Stores, parcel: Parcel) -> Message:
        """Return the message just delivered, in the first of its mailboxes."""
        name = os.path.basename(parcel.placed[-1])
        item = Item(name.partition(",")[0], parcel.draft.written, "new", name)
        return Message(stores.mailboxes, parcel.mailboxes[0], item, lambda _: {
            "sender": parcel.envelope.sender, "recipients": list(map(str, parcel.envelope.recipients))})

    def _envelope(self, item: Item) -> Optional[Dict[str, Any]]:
        recorder = self.site.recorder if self.site else None
        found: Optional[Dict[str, Any]] = recorder.load(message_id(item)) if recorder else None
        return found

    def messages(self, address: Optional[str] = None) -> List[Message]:
        """Return the messages in the mailbox of `address`, or in all of them, oldest first."""
        if not self.stores:
            raise RuntimeError("the node is not running")
        mailboxes = self.stores.mailboxes
        names = mailboxes.names() if address is None else [self._mailbox(address)]
        found = [(name, item) for name in names for item in mailboxes.listing(name)]
        found.sort(key=lambda pair: pair[1].name)
        return [Message(mailboxes, name, item, self._envelope) for name, item in found]

    def send_due(self) -> None:
        """Look into the queue at once: for tests that give the node a `clock` of their own and have moved it."""
        if self.stores:
            self.stores.storage.wake("queue")

    def _mailbox(self, address: str) -> str:
        assert self.stores
        try:
            return self.stores.book.key(parse_address(address, lenient=self.stores.book.capture))
        except Refused as refused:
            raise ValueError("address %r: %s" % (address, refused.reply.text)) from None

    def clear(self) -> None:
        """Delete every message."""
        for message in self.messages():
            message.delete()

    def wait_for(self, address: Optional[str] = None, timeout: float = 10.0, count: Optional[int] = None,
                 match: Union[None, str, Callable[[Message], bool]] = None) -> Any:
        """Return the oldest message to `address` (None: to anybody) that matches, waiting for it if need be.

        `match` is a function of the message, or a search as in the web inbox: "from:x subject:y words".

        With `count=n`, a list of the n oldest. TimeoutError after `timeout` seconds. Woken by delivery, also by other
        processes on the same data directory.
        """
        if not self.stores or not self.site:
            raise RuntimeError("the node is not running")
        fits = extension("wait").matcher(self, match) if isinstance(match, str) else match
        verdicts: Dict[Tuple[str, str], bool] = {}
        matching: List[Message] = []

        def look() -> List[Message]:
            matching.clear()
            for message in self.messages(address):
                key = (message.recipient, message.uid)
                if key not in verdicts:
                    verdicts[key] = fits is None or bool(fits(message))
                if verdicts[key]:
                    matching.append(message)
            return matching if len(matching) >= (count or 1) else []
        found: Optional[List[Message]] = await_mail(self.stores.storage, look, time.monotonic() + timeout, self._pause())
        if not found:
            raise TimeoutError("%d of %d messages for %s within %g seconds" % (
                len(matching), count or 1, address or "anybody", timeout))
        return found[0] if count is None else found[:count]

    def _pause(self) -> Callable[[float], Optional[bool]]:
        """Return a sleep for await_mail() that ends when this node takes mail, or stops."""
        seen = self.accepted

        def sleep(seconds: float) -> Optional[bool]:
            nonlocal seen
            with self._arrived:
                if self.accepted == seen and self._running:
                    self._arrived.wait(seconds)
                changed, seen = self.accepted != seen, self.accepted
                return (changed or None) if self._running else False
        return sleep


LISTENERS = ("smtp", "smtps", "pop3", "pop3s", "web", "webs")


# ======================================================================================================================
# 18  Reading mail.  Pure: the bytes of a message in, what people see out; knows no file, socket or site. Mail is hostile:
#     everything is read once from front to back, within limits of section 2, and what is cut says so. Nothing here fails.
# ======================================================================================================================

# Charsets: those that mail uses, by the labels of https://encoding.spec.whatwg.org/ and some that older mail has.

CHARSETS = {                                        # codecs of Python, tried in this order: labels without their punctuation
    "utf-8": "utf8 unicode11utf8 xunicode20utf8 utf8mb4",
    "cp1252": "latin1 l1 ibm819 iso88591 iso885911987 isoir100 csisolatin1 ascii8 ansi xansi",
    "iso8859-2": "latin2 l2 csisolatin2", "iso8859-3": "latin3 l3 csisolatin3", "iso8859-4": "latin4 l4 csisolatin4",
    "iso8859-5": "cyrillic csisolatincyrillic", "iso8859-6": "arabic asmo708 ecma114 csisolatinarabic",
    "iso8859-7": "greek greek8 elot928 ecma118 suneugreek csisolatingreek", "cp1254": "latin5 l5 csisolatin5 iso88599",
    "iso8859-8": "hebrew visual logical csisolatinhebrew csiso88598e csiso88598i", "iso8859-10": "latin6 l6 csisolatin6",
    "iso8859-15": "latin9 latin0 l9 csisolatin9", "iso8859-16": "latin10", "cp874": "tis620 dos874 iso885911 thai",
    "koi8_r": "koi8r koi koi8 cskoi8r", "koi8_u": "koi8u koi8ru", "cp866": "ibm866 csibm866", "kz1048": "kz1048 rk1048",
    "mac_roman": "macintosh mac xmacroman macroman csmacintosh", "mac_cyrillic": "xmaccyrillic xmacukrainian maccyrillic",
    "mac_latin2": "xmacce xmaccentraleurope", "mac_greek": "xmacgreek", "mac_turkish": "xmacturkish",
    "gb18030": "gb2312 gb231280 gbk gb18030 xgbk chinese csgb2312 csiso58gb231280 isoir58 cp936 ms936 windows936 euccn xeuccn",
    "hz": "hz hzgb2312", "cp950 big5hkscs": "big5 cnbig5 xxbig5 csbig5 cp950 windows950 big5eten",
    "big5hkscs cp950": "big5hkscs",
    "cp932 shift_jis_2004": "shiftjis sjis xsjis csshiftjis ms932 mskanji windows31j cswindows31j cp932 windows932",
    "euc_jp euc_jis_2004": "eucjp xeucjp xeuc cseucpkdfmtjapanese ujis",
    "iso2022_jp iso2022_jp_2 iso2022_jp_3 iso2022_jp_2004": "iso2022jp csiso2022jp iso2022jp1 iso2022jp2 iso2022jp3 "
                                                            "iso2022jp2004 iso2022jpext iso2022jpms xwindowsiso2022jp cp50220 "
                                                            "cp50221 jis",
    "cp949": "euckr cseuckr korean ksc56011987 ksc56011989 ksc5601 csksc56011987 isoir149 cp949 uhc windows949 ms949",
    "johab": "johab cp1361", "iso2022_kr": "iso2022kr csiso2022kr", "utf-7": "utf7 unicode11utf7 csunicode11utf7",
    "utf-16-le": "utf16 utf16le ucs2 iso10646ucs2 unicode csunicode unicodefeff", "utf-16-be": "utf16be unicodefffe",
    "utf-32-le": "utf32 utf32le ucs4", "utf-32-be": "utf32be",
}
CODECS = {label: tuple(codecs.split()) for codecs, labels in CHARSETS.items() for label in labels.split()}
CODE_PAGES = {"437", "720", "737", "775", "850", "852", "855", "857", "858", "860", "861", "862", "863", "864", "865", "866",
              "869", "874", "932", "936", "949", "950", "1125", "1250", "1251", "1252", "1253", "1254", "1255", "1256", "1257",
              "1258"}
JIS_ESCAPE = expression(rb"(\x1b(?:\$[@B]|\$\(D|\([BJIH]))")


@functools.lru_cache(maxsize=200)
def find_codecs(charset: str) -> Tuple[str, ...]:
    """Return the codecs for a charset, () for US-ASCII and what mail does not use: then nothing is known of the text."""
    label = re.sub(r"[^a-z0-9]", "", charset[:60].lower())
    page = re.fullmatch(r"x?(?:cp|ibm|windows|win|ms)0*([1-9]\d{2,3})", label)
    part = re.fullmatch(r"iso8859([1-9]\d?)(?:e|i|19\d\d)?", label)
    if label in CODECS:
        return CODECS[label]
    if page and page.group(1) in CODE_PAGES:
        return CODECS.get("cp" + page.group(1), ("cp" + page.group(1),))
    if part and part.group(1) in {"2", "3", "4", "5", "6", "7", "8", "10", "13", "14", "15", "16"}:
        return ("iso8859-" + part.group(1),)
    if part and part.group(1) in {"1", "9"}:
        return ("cp1252",) if part.group(1) == "1" else ("cp1254",)
    other = python_name(charset)
    return find_codecs(other) if other else ()


def python_name(charset: str) -> str:
    """Return what Python calls a charset, "" when it has no other name for it."""
    from encodings.aliases import aliases
    return aliases.get(re.sub(r"[^a-z0-9]+", "_", charset[:60].lower()), "")


def decode_text(data: bytes, charset: str) -> str:
    """Return bytes as text by the charset they claim or the larger one that is meant; what is wrong costs one character."""
    codecs = find_codecs(charset)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) and (not codecs or codecs[0].startswith("utf")):
        codecs = ("utf-16",)
    if not codecs or codecs[0] == "utf-8":
        return decode_unknown(data)
    for codec in codecs:
        with contextlib.suppress(UnicodeError, LookupError):        # Python may have been built without some
            return whole_characters(data.decode(codec))
    if codecs[0] == "iso2022_jp":
        return decode_japanese(data)
    try:
        return whole_characters(data.decode(codecs[0], "replace"))
    except (UnicodeError, LookupError):
        return decode_unknown(data)


def decode_japanese(data: bytes) -> str:
    """Return ISO-2022-JP as text, with what Windows and telephones put into its empty rows: as cp932 has them."""
    charset, text = b"", []
    for piece in JIS_ESCAPE.split(data):
        if piece.startswith(b"\x1b") and JIS_ESCAPE.fullmatch(piece):
            charset = piece
        elif charset in (b"\x1b$@", b"\x1b$B"):
            text.append(shift_jis(piece).decode("cp932", "replace"))
        elif charset == b"\x1b$(D":
            pairs = zip(piece[::2], piece[1::2])
            text.append(b"".join(bytes((0x8f, row | 0x80, cell | 0x80)) for row, cell in pairs).decode("euc_jp", "replace"))
        elif charset == b"\x1b(I":
            text.append(bytes(byte | 0x80 for byte in piece).decode("cp932", "replace"))
        else:
            text.append(piece.decode("cp932", "replace"))
    return "".join(text)


def shift_jis(data: bytes) -> bytes:
    """Return the 7-bit pairs of JIS X 0208 as Shift_JIS; the arithmetic is that of JIS X 0208 annex 1."""
    found = bytearray()
    cells = iter(data)
    for row in cells:
        if row < 0x21:                              # a line end: those are of one byte
            found.append(row)
            continue
        cell = next(cells, 0)
        lead = (row - 0x21) // 2 + 0x81
        found.append(lead if lead < 0xa0 else lead + 0x40)
        found.append(min(cell + (0x1f if cell < 0x60 else 0x20) if row % 2 else cell + 0x7e, 0xff))
    return bytes(found)


def whole_characters(text: str) -> str:
    """Return text without lone surrogates, which some encodings can produce and no file or reply can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


# Header values: encoded words, parameters, dates.

ENCODED_WORD = expression(r"=\?([^?\s*]{1,60})(?:\*[^?\s]{0,40})?\?([bq])\?((?:[^?]*(?<!=)\?(?!=)){0,8}[^?]*)\?=",
                          re.IGNORECASE)
VALUE_END = r"(?=\s{0,20}(?:[;(]|\Z|[\w*-]{1,40}\s{0,20}=))"
PARAMETER = expression(                             # a quotation mark within a value ends it only where the value can end
    r'([^\s=;"()]{1,80})\s{0,20}=\s{0,20}("[^"\\]*(?:(?:\\.|"(?!' + VALUE_END + r'))[^"\\]*){0,8}"' + VALUE_END +
    r'|"[^"\\]*(?:\\.[^"\\]*)*"|[^;]*)', re.DOTALL)
PARAMETER_BLANK = expression(r"[\s;]*")
PARAMETER_VALUE = expression(r"\s(?=[\w*-]{1,40}=)")
SECTION = expression(r"(.*?)(?:\*(\d{1,3}))?(\*?)", re.DOTALL | re.ASCII)
DATE_LIMIT = 200                                    # characters


def decode_words(value: Union[str, bytes]) -> str:
    """Return a header's value with its encoded words decoded (RFC 2047); those of unknown charsets stay as they came."""
    text = unfold(value) if isinstance(value, bytes) else value
    if "=?" not in text:
        return text
    found: List[str] = []
    run: List[bytes] = []                           # words that follow each other in one charset: characters may be cut in two
    charset, end = "", 0
    for match in ENCODED_WORD.finditer(text):
        data = word_bytes(match.group(2), match.group(3))
        if data is None or not known_charset(match.group(1)):
            continue
        between = text[end:match.start()]
        if run and (between.strip(" ") or match.group(1).lower() != charset):
            found.append(decode_text(b"".join(run), charset))
            run = []
        if between.strip(" ") or not end:
            found.append(between)
        run.append(data)
        charset, end = match.group(1).lower(), match.end()
    found += [decode_text(b"".join(run), charset), text[end:]]
    return re.sub(r"[\r\n]+", " ", "".join(found))


def word_bytes(encoding: str, text: str) -> Optional[bytes]:
    """Return what an encoded word holds, None when it is none."""
    if encoding in "bB":
        return decode_base64(text.encode("ascii", "ignore")) if not re.search(r"[^A-Za-z0-9+/=\s]", text) else None
    return binascii.a2b_qp(text.encode("utf-8"), header=True)


def known_charset(charset: str) -> bool:
    return bool(find_codecs(charset)) or bool({"ascii", "unknown-8bit"} & {charset.lower(), python_name(charset)})


def read_parameters(text: str) -> Tuple[str, Dict[str, str]]:
    """Return (value in lower case, parameters) of a Content-Type or the like (RFC 2045 section 5.1, RFC 2231); never fails.

    Parameters may lack their semicolons and quotes. Of `name*` and `name`, the first is taken.
    """
    value = text[:MAX_ADDRESS].lstrip().partition(";")[0].partition("(")[0].partition(" ")[0]
    value = "" if "=" in value else value           # there is none, parameters only
    position = text.find(value) + len(value)
    pieces: Dict[str, Dict[int, Tuple[bool, str]]] = {}
    for _ in range(MAX_PARAMETERS):
        position = skip_comments(text, position)
        match = PARAMETER.match(text, position)
        if match:
            key, number, encoded, given, position = parameter(match)
            pieces.setdefault(key, {}).setdefault(number, (encoded, given))
        else:                                       # nothing that we understand: on with the next one
            position = text.find(";", position + 1)
            if position < 0:
                break
    found = {name: decode_words(given[0][1]) for name, given in pieces.items() if not name.endswith("*")}
    found.update((name[:-1], join_sections(given)) for name, given in pieces.items() if name.endswith("*"))
    return value.strip("\"'").lower(), found


def parameter(match: Any) -> Tuple[str, int, bool, str, int]:
    """Return (name, with * when it is of RFC 2231; number of its section; whether it is encoded; value; where it ends)."""
    given, end = match.group(2), match.end()
    name, number, starred = SECTION.fullmatch(match.group(1).lower()).groups()      # type: ignore[union-attr]
    if given.startswith('"') and len(given) > 1 and given.endswith('"'):
        given = re.sub(r'\\(["\\])', r"\1", given[1:-1])
    else:
        more = PARAMETER_VALUE.search(given)        # the semicolon before the next parameter is missing
        if more:
            end, given = end - len(given) + more.start(), given[:more.start()]
        if name not in ("name", "filename"):        # a comment; people call their files `a (2).txt` without quotes
            given = given.partition("(")[0]
        given = given.strip().strip('"')
    return name + "*" if starred or number else name, int(number or 0), bool(starred), given, end


def skip_comments(text: str, position: int) -> int:
    """Return where the next parameter begins: after semicolons, blanks and comments."""
    for _ in range(MAX_PARAMETERS):
        position = PARAMETER_BLANK.match(text, position).end()      # type: ignore[union-attr]
        end = comment_end(text, position, position + MAX_ADDRESS) if text.startswith("(", position) else -1
        if end < 0:
            break
        position = end
    return position


def join_sections(sections: Dict[int, Tuple[bool, str]]) -> str:
    """Return the value of a parameter that came in sections, percent-encoded or not (RFC 2231 sections 3 and 4)."""
    from urllib.parse import unquote_to_bytes
    charset, texts = "", []
    for number, (encoded, text) in sorted(sections.items()):
        if encoded and number == min(sections) and text.count("'") >= 2:
            charset, _, text = text.split("'", 2)
        elif encoded and charset:                   # some say it again
            text = re.sub(r"(?i)\A%s'[^']*'" % re.escape(charset), "", text)
        texts.append((encoded, text))
    whole = b""
    for encoded, run in itertools.groupby(texts, lambda section: section[0]):
        text = "".join(text for _, text in run)     # a percent sign and its digits may be cut in two
        whole += unquote_to_bytes(text) if encoded else text.encode("utf-8")
    return decode_text(whole, charset) if charset else decode_words(decode_unknown(whole))


def parse_date(text: str) -> Any:
    """Return a Date header as an aware datetime, None when it is none; without a zone, or with one unknown, it is UTC."""
    import datetime
    try:
        text = re.sub(r"\s(?:(?:GMT|UTC?)\s?)?([+-]\d\d):?(\d\d)\b", r" \1\2", text[:DATE_LIMIT])   # +01:00, GMT+0100
        given = email.utils.parsedate_tz(text)
        if given is None:
            return None
        zone = datetime.timezone(datetime.timedelta(seconds=given[9] or 0))
        return datetime.datetime(*given[:5], min(given[5], 59), tzinfo=zone)       # a leap second
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def iso_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + ".%03d+00:00" % (seconds % 1 * 1000)


# Transfer encodings (RFC 2045 section 6). What can be decoded is.

NOT_BASE64 = bytes(set(range(256)) - set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="))


def decode_base64(data: bytes) -> bytes:
    """Return what base64 holds, whatever stands between its letters; padded pieces may follow each other (RFC 4648)."""
    found = []
    for piece in re.split(b"=+", data.translate(None, NOT_BASE64).rstrip(b"="), maxsplit=MAX_PIECES):
        whole = piece[:-1] if len(piece) % 4 == 1 else piece        # one letter does not make a byte
        with contextlib.suppress(binascii.Error):
            found.append(binascii.a2b_base64(whole + b"=" * (-len(whole) % 4)))
    return b"".join(found)


def decode_uu(data: bytes) -> bytes:
    """Return the lines between `begin` and `end`."""
    start = re.search(rb"^begin [^\n]*\n", data, re.MULTILINE)
    found = []
    for line in io.BytesIO(data[start.end():] if start else b""):
        if line.rstrip() == b"end":
            break
        with contextlib.suppress(binascii.Error):
            length = ((line[0] - 32 & 63) * 4 + 5) // 3             # some encoders put more at the end than they announce
            found.append(binascii.a2b_uu(line.rstrip(b"\r\n")[:length]))
    return b"".join(found) if found else data


def decode_transfer(data: bytes, encoding: str) -> bytes:
    """Return a body decoded; what is of no known encoding as it stands."""
    if encoding == "base64":
        return decode_base64(data)
    if encoding == "quoted-printable":
        return binascii.a2b_qp(re.sub(rb"=[ \t]*(?:\r?\n|\Z)", b"", data))     # some cut an octet's `=XX` in two
    return decode_uu(data) if encoding in ("x-uuencode", "uuencode", "x-uue", "uue") else data


# HTML, as far as a glance needs it: one pass, no tree.

MARKUP = expression(r"<(?=[a-zA-Z/!?])")
TAG_NAME = expression(r"<(/?[a-zA-Z][^\s/>]{0,40})")
TAG_MARK = expression(r"[>=]")
ATTRIBUTE_BLANK = expression(r"[ \t\r\n\f]*")
HIDDEN = {name: expression("</" + name, re.IGNORECASE) for name in (
    "script", "style", "title", "template", "noembed", "noframes")}
BREAKS = frozenset("br p div tr table ul ol li dl dt dd h1 h2 h3 h4 h5 h6 hr blockquote pre section article header footer "
                   "address center form fieldset main nav aside figure figcaption".split())
MAX_ENTITY = 40                                     # characters, and more than ENTITY takes
ENTITY = expression(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]\w{1,31});?", re.ASCII)
ATTRIBUTE = expression(r"([^\s=>\"'/]{1,80})[ \t\r\n\f]*(?:=[ \t\r\n\f]*(\"[^\"]*\"|'[^']*'|[^\s\"'>]+))?")
SENTENCE_MARKS = ".,;:!?'*_`}\u3001\u3002\uff0c\uff09\u300d\u201d\u2019"
URL = expression(r"(?<=<)https?://[^\s<>\"]+(?:\r?\n[^\s<>\"]+)+(?=>)|"       # RFC 3986 appendix C: wrapped
                 r"(?<![A-Za-z0-9])https?://[^\s<>\"\x00-\x1f\x7f]+", re.IGNORECASE)


def attribute_entity(match: Any) -> str:
    """Return what a reference in an attribute means: without a semicolon it is none before "=", letters, digits."""
    from html.entities import html5
    name = match.group()[1:]
    known = name[0] == "#" or (name in html5 and not match.string.startswith("=", match.end()))
    return unescape(match.group()) if known else str(match.group())


def in_pieces(text: str, mark: str, near: int = BLOCK) -> Iterator[str]:
    """Yield text in pieces of BLOCK characters, or less where a mark stands near the end of one: the next begins with it.

    Nobody else gets a turn while one call of an expression goes over a whole text.
    """
    start = 0
    while start < len(text):
        stop = start + BLOCK
        last = text.rfind(mark, max(start + 1, stop - near), stop) if stop < len(text) else -1
        stop = last if last > 0 else stop
        yield text[start:stop]
        start = stop


def unescape(text: str) -> str:
    """Return text with its character references resolved; those of endless length are none."""
    import html
    if "&" not in text:
        return text
    return "".join(ENTITY.sub(lambda match: html.unescape(match.group()), piece) for piece in in_pieces(text, "&", MAX_ENTITY))


def tag_end(html: str, position: int) -> int:
    """Return where the `>` of a tag stands, outside of quoted values; the end of the HTML where there is none."""
    while True:
        mark = TAG_MARK.search(html, position)
        if not mark or mark.group() == ">":
            return mark.start() if mark else len(html)
        position = ATTRIBUTE_BLANK.match(html, mark.end()).end()        # type: ignore[union-attr]
        quote = html[position:position + 1]
        if quote and quote in "\"'":
            closed = html.find(quote, position + 1)
            position = closed + 1 if closed > 0 else position + 1


def html_tokens(html: str) -> Iterator[Tuple[str, str]]:
    """Yield ("", text) and (name of a tag, its attributes); comments, scripts and what else is not shown are left out."""
    position = 0
    while position < len(html):
        markup = MARKUP.search(html, position)
        at = markup.start() if markup else len(html)
        if at > position:
            yield "", html[position:at]
        tag = TAG_NAME.match(html, at)
        if tag:
            end, name = tag_end(html, tag.end()), tag.group(1).lower()
            yield name, html[tag.end():end]
            position = end + 1
            if name in HIDDEN:
                closed = HIDDEN[name].search(html, position)
                position = closed.start() if closed else len(html)
        else:
            comment = html.startswith("<!--", at)
            end = html.find("-->" if comment else ">", at + 2)
            position = end + (3 if comment else 1) if end >= 0 else len(html)


def html_text(html: str) -> str:
    """Return the text of some HTML, a line for a line, without entities."""
    found: List[str] = []
    for name, text in html_tokens(html[:MAX_RENDERED]):
        if not name:
            found.append(re.sub(r"[ \t\r\n\f]+", " ", unescape(text)))
        elif name.lstrip("/") in BREAKS:
            found.append("\n")
        elif name in ("td", "th"):
            found.append(" ")
    text = re.sub(" {2,}", " ", "".join(found)).replace(" \n", "\n").replace("\n ", "\n")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + ("\n[cut here]" if len(html) > MAX_RENDERED else "")


def printable_start(text: str) -> str:
    """Return text up to the first character that does something: to a terminal, to the order of what is shown."""
    return "".join(itertools.takewhile(str.isprintable, text))


def html_links(html: str) -> Iterator[str]:
    """Yield where the links of some HTML lead, as browsers take them: blanks around and line ends within do not count."""
    for name, attributes in html_tokens(html):
        found = ATTRIBUTE.finditer(attributes[:MAX_LINK * 2]) if name in ("a", "area") else ()
        value = next((match.group(2) or "" for match in found if match.group(1).lower() == "href"), "")
        value = value[1:-1] if value[:1] in ("'", '"') else value
        link = printable_start(re.sub(r"[\t\r\n]", "", ENTITY.sub(attribute_entity, value)).strip(" "))
        if re.match(r"https?://", link, re.IGNORECASE):
            yield link.replace(" ", "%20")


def text_links(text: str) -> Iterator[str]:
    """Yield the URLs that stand in text, without the punctuation of the sentence around them."""
    for match in URL.finditer(text):
        link = printable_start("".join(match.group()[:MAX_LINK].split()))
        opened = {")": link.count("(") - link.count(")"), "]": link.count("[") - link.count("]")}
        end = len(link)
        while end and (link[end - 1] in SENTENCE_MARKS or opened.get(link[end - 1], 0) < 0):
            if link[end - 1] in opened:
                opened[link[end - 1]] += 1
            end -= 1
        yield link[:end]


def squeeze(text: str) -> str:
    """Return text with every run of white space made one blank; in pieces, as a list of all its words would take much room."""
    found: List[str] = []
    blank = False
    for start in range(0, len(text), BLOCK):
        piece = text[start:start + BLOCK]
        words = " ".join(piece.split())
        blank = blank or piece[:1].isspace()
        if words:
            found.append(" " + words if blank and found else words)
            blank = piece[-1:].isspace()
    return "".join(found)


# A message and its parts.

CID = expression(r"((?:[=(,]|url\()\s{0,20}(?:(?:[\"']|&quot;|&apos;|&#0*3[49];|&#x0*2[27];)\s{0,20})?)"
                 r"cid(?::|&#0*58;|&#x0*3a;|&colon;)((?:[^\s\"'<>&]|&(?!quot|apos|#0*3[49]|#x0*2[27])){1,998})", re.IGNORECASE)
ACTIVE = expression(r"<(?=/?(?:link|meta|base|i?frame|frameset|object|embed)[\s/>])(/?)", re.IGNORECASE)
REMOTE = expression(r"(?:\b(?:src|srcset|background|poster)\s{0,20}=\s{0,20}(?:[\"']\s{0,20})?|"
                    r"url\(\s{0,20}(?:[\"']|&quot;|&#3[49];)?)(?:https?:)?(?://|&#47;&#47;)", re.IGNORECASE)
META_CHARSET = expression(rb"<meta\b[^>]{0,500}?charset\s{0,20}=\s{0,20}[\"']?\s{0,20}([\w.:-]{1,40})", re.IGNORECASE)
DOCTYPE = expression(r"\s{0,100}<!doctype[^>]{0,500}>", re.IGNORECASE)
IMAGE_NAMES = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/jpe": "image/jpeg", "image/x-png": "image/png",
               "image/x-citrix-jpeg": "image/jpeg", "image/x-citrix-png": "image/png", "image/svg": "image/svg+xml",
               "image/apng": "image/png", "image/x-ms-bmp": "image/bmp", "image/vnd.microsoft.icon": "image/x-icon"}
SUFFIXES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp",
            ".svg": "image/svg+xml", ".bmp": "image/bmp", ".avif": "image/avif"}
IMAGES = {*SUFFIXES.values(), "image/x-icon"}       # those that browsers show, and ...
IMAGE_STARTS = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}      # ... how some begin


class Part:
    """A part of a message: what its header says, and where its body stands in the message."""

    def __init__(self, raw: bytes, id: str, fields: List[Tuple[str, bytes]], start: int, default: str = "text/plain") -> None:
        self.raw, self.id, self.fields, self.start, self.end = raw, id, fields, start, len(raw)
        self.children: List["Part"] = []
        kind, self.parameters = read_parameters(self.field("content-type"))
        type = re.match(r"(?:multipart/(?=multipart/))?([!-.0-~]{1,100}/[!-.0-~]{1,100})(?:/|\Z)", kind)
        self.kind = type.group(1) if type else default
        self.disposition, self._place = read_parameters(self.field("content-disposition"))
        boundary = self.parameters.get("boundary", "").rstrip() if self.kind.startswith("multipart/") else ""
        self.boundary = boundary.encode("utf-8") if len(boundary) < MAX_COMMAND else b""     # longer than what is looked at

    def field(self, name: str) -> str:
        return next((unfold(raw.partition(b":")[2]) for field, raw in self.fields if field == name), "")

    @property
    def name(self) -> str:
        """The file name as it was sent, "" when there is none."""
        return shorten(self._place.get("filename") or self.parameters.get("name") or self._place.get("name") or
                       self.parameters.get("filename") or "", MAX_NAME_SHOWN)

    @property
    def content_id(self) -> str:
        return "".join(self.field("content-id").split())[:MAX_NAME_SHOWN].strip("<>")

    @property
    def encoding(self) -> str:
        """The transfer encoding's name; what stands around it does not count."""
        text = self.field("content-transfer-encoding")[:MAX_ADDRESS]
        name = re.compile(r"[\w-]{1,40}").search(text, skip_comments(text, 0))
        return name.group().lower() if name else ""

    @property
    def is_text(self) -> bool:
        """Whether it is shown among the texts."""
        broken = self.kind.startswith("multipart/")         # and yet without parts: no usable boundary
        return broken or (self.kind in ("text/plain", "text/html") and self.disposition != "attachment")

    @property
    def is_inline(self) -> bool:
        """Whether a file belongs into the text rather than beside it; so does one that only has an ID, or nothing at all."""
        return self.disposition == "inline" or self.is_text or (
            self.disposition != "attachment" and bool(self.content_id or not self.name))

    @property
    def shown_name(self) -> str:
        return self.name or self.content_id or ("message.eml" if self.kind in ("message/rfc822", "message/global") else "")

    def data(self, limit: Optional[int] = None) -> bytes:
        """Return the body decoded, or its first `limit` bytes; an attached message is the bytes that were sent."""
        end = self.end if limit is None else min(self.end, self.start + limit * 3)
        found = decode_transfer(self.raw[self.start:end], self.encoding)
        return found if limit is None else found[:limit]

    def text(self) -> str:
        """Return the body as text; of a long one the beginning, and that it is cut."""
        data = self.data(MAX_TEXT + 1)
        charset = self.parameters.get("charset", "")
        if self.kind == "text/html" and not known_charset(charset):
            named = META_CHARSET.search(data[:4096])
            charset = named.group(1).decode("ascii") if named else charset
            charset = "utf-8" if charset.lower().startswith(("utf-16", "utf16")) else charset
        if len(data) <= MAX_TEXT:
            return decode_text(data, charset)
        return decode_text(data[:MAX_TEXT], charset) + "\n[cut here: the part has %d bytes]\n" % (self.end - self.start)

    def image_type(self) -> str:
        """Return the type of an image that browsers show, "" when it is none."""
        kind = IMAGE_NAMES.get(self.kind, self.kind)
        if kind in IMAGES:
            return kind
        data = self.data(16) if not self.kind.startswith("text/") else b""
        for start in IMAGE_STARTS:
            if data.startswith(start):
                return IMAGE_STARTS[start]
        suffix = os.path.splitext(self.name.lower())[1]
        return SUFFIXES.get(suffix, "") if kind in ("application/octet-stream", "image/*") else ""

    def entry(self) -> Dict[str, Any]:
        """Return the part as an attachment in Mailpit's JSON."""
        data = self.data()
        sums = {}
        for name in ("MD5", "SHA1", "SHA256"):
            with contextlib.suppress(ValueError):   # a Python or a machine that lacks the older ones
                sums[name] = hashlib.new(name.lower(), data).hexdigest()
        return {"PartID": self.id, "FileName": self.shown_name, "ContentType": self.kind, "ContentID": self.content_id,
                "Size": len(data), "Checksums": sums}

    def tree(self) -> Dict[str, Any]:
        """Return the part in few words, and the parts in it."""
        return {"PartID": self.id, "ContentType": self.kind, "FileName": self.name, "Size": self.end - self.start,
                "Children": [child.tree() for child in self.children]}


def read_header(raw: bytes, start: int, stop: int, cut: List[str]) -> Tuple[List[Tuple[str, bytes]], int]:
    """Return (fields, where the body begins) of a header that begins at start and ends at stop or at the first empty line.

    Lines that are no fields are passed over when fields follow (some mailers leave one there), else the body begins with them.
    """
    if raw.startswith((b"\n", b"\r\n"), start):
        return [], raw.index(b"\n", start) + 1
    blank = BLANK_LINE.search(raw, start, stop)
    head, body = (raw[start:blank.start() + 1], blank.end()) if blank else (raw[start:stop], stop)
    fields = split_headers(UNINDENTED.sub(rb"\1 ", head[:MAX_HEAD]), MAX_FIELDS + 1)[0]
    seen = stray = sum(len(field) for _, field in fields)
    while fields and not FIELD_START.match(fields[-1][1]):
        stray -= len(fields.pop()[1])
    if stray < seen:
        body = start + stray
    elif len(head) > MAX_HEAD or len(fields) > MAX_FIELDS:
        cut.append("of a header, the first %d fields and %d bytes are read" % (MAX_FIELDS, MAX_HEAD))
    return [(name, field if len(field) <= MAX_FIELD else field[:MAX_FIELD] + b"... (cut)")
            for name, field in fields[:MAX_FIELDS] if b":" in field], body


class TreeReader:
    """Reads the MIME tree of a message in one pass: each line that could end a part is looked at once (RFC 2046 section 5.1).

    `open` holds the multiparts that are not yet ended, outermost first; `leaf` is the part that the text at hand belongs to.
    """

    def __init__(self, raw: bytes, cut: List[str]) -> None:
        self.raw, self.cut = raw, cut
        self.open: List[Part] = []
        self.leaf: Optional[Part] = None
        self.count = 0

    def read(self) -> Part:
        """Return the message as a part, its parts in it."""
        fields, start = read_header(self.raw, 0, len(self.raw), self.cut)
        root = Part(self.raw, "", fields, start)
        self.enter(root)
        at = self.raw.find(b"\n--", max(start - 1, 0))
        for _ in range(MAX_DELIMITERS):
            if at < 0 or not self.open:
                break
            at = self.raw.find(b"\n--", max(self.delimiter(at), at + 1))
        if at >= 0 and self.open:
            self.cut.append("the message has too many lines that begin with --")
        root.id = root.id if root.children else "1"
        return root

    def enter(self, part: Part) -> None:
        """Go on with a part: into it when it has parts, else through its text."""
        self.leaf = part
        if part.boundary and len(self.open) < MAX_DEPTH:
            self.open.append(part)
            self.leaf = None
        elif part.boundary:
            self.cut.append("parts are nested deeper than %d" % MAX_DEPTH)

    def delimiter(self, at: int) -> int:
        """Take the line after the line end at `at`, if it is a delimiter; return from where to look for the next."""
        end = self.raw.find(b"\n", at + 1, at + 1 + MAX_COMMAND)
        end = end if end >= 0 else min(len(self.raw), at + 1 + MAX_COMMAND)
        line = self.raw[at + 3:end].rstrip(b" \t\r")
        for depth in range(len(self.open) - 1, -1, -1):
            boundary = self.open[depth].boundary
            if line == boundary:
                self.close(depth + 1, at)
                return self.begin(self.open[-1], end + 1)
            if line.endswith(b"--") and line[:-2].rstrip(b" \t") == boundary:
                self.close(depth, at)
                return end - 1
        for depth in range(len(self.open) - 1, -1, -1):
            if line.startswith(self.open[depth].boundary + b"--"):      # something follows that should not
                self.close(depth, at)
                return end - 1
        return at + 1

    def close(self, depth: int, at: int) -> None:
        """End all that is inside of the first `depth` multiparts."""
        at = at - 1 if self.raw[at - 1:at] == b"\r" else at
        for part in self.open[depth:] + ([self.leaf] if self.leaf else []):
            part.end = max(part.start, at)
        del self.open[depth:]
        self.leaf = None

    def begin(self, parent: Part, start: int) -> int:
        """Begin a part; its header ends at an empty line, or where another delimiter could be."""
        self.count += 1
        if self.count > MAX_PARTS:
            self.open.clear()
            self.cut.append("the message has more than %d parts" % MAX_PARTS)
            return start
        following = self.raw.find(b"\n--", start - 1)
        following = following if following >= 0 else len(self.raw)
        fields, body = read_header(self.raw, start, min(following + 1, len(self.raw)), self.cut)
        id = "%s.%d" % (parent.id, len(parent.children) + 1) if parent.id else str(len(parent.children) + 1)
        part = Part(self.raw, id, fields, body, "message/rfc822" if parent.kind == "multipart/digest" else "text/plain")
        parent.children.append(part)
        self.enter(part)
        return body - 1


class View:
    """A message as people see it: page, API, `mail`, `wait` and lint take it from here. What is computed is kept in it."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.cut: List[str] = []                    # sentences that say what is not shown
        self.root = TreeReader(raw, self.cut).read()
        self.fields = self.root.fields
        self.parts = list(leaves(self.root))
        self._people: Dict[str, List[Dict[str, str]]] = {}

    def header(self, name: str) -> str:
        """Return the first header of a name, decoded; "" when there is none."""
        return decode_words(self.root.field(name))

    def headers(self) -> Dict[str, List[str]]:
        """Return all headers by their names as API clients expect them, values as they stand."""
        values: Dict[str, List[str]] = {}
        for name, raw in self.fields:
            key = "-".join(word.capitalize() for word in name.split("-"))
            values.setdefault(key, []).append(unfold(raw.partition(b":")[2]))
        return values

    def addresses(self, name: str) -> List[Dict[str, str]]:
        """Return who stands in the headers of a name. Names are decoded last, so that they do not look like addresses."""
        if name not in self._people:
            text = ",".join(unfold(raw.partition(b":")[2]) for field, raw in self.fields if field == name)[:MAX_FIELD]
            found = read_addresses(text)
            found = itertools.chain.from_iterable(  # some encode the address along with the name
                read_addresses(decode_words(address)) if address.startswith("=?") and not who else [(who, address)]
                for who, address in found)
            if name in ("from", "reply-to"):        # recipients can be bare names
                found = whole_names(found)
            people = ({"Name": shorten(decode_words(who)), "Address": shorten(address)} for who, address in found)
            self._people[name] = first_people(people, MAX_ADDRESSES)
        return self._people[name]

    def date(self, default: str) -> str:
        """Return the Date header in ISO 8601, always with a zone."""
        found = parse_date(self.header("date"))
        return str(found.isoformat()) if found else default

    def part(self, id: str) -> Part:
        """Return a part; KeyError."""
        return {part.id: part for part in self.parts}[id]

    @functools.cached_property
    def bodies(self) -> List[Part]:
        """The parts that are shown as text."""
        return [part for part in self.parts if part.is_text]

    @functools.cached_property
    def plain(self) -> str:
        return "\n".join(part.text() for part in self.bodies if part.kind != "text/html")

    @functools.cached_property
    def html(self) -> str:
        """The message's HTML, as it was sent."""
        return "\n".join(part.text() for part in self.bodies if part.kind == "text/html")

    @functools.cached_property
    def rendered(self) -> str:
        """The text of the HTML."""
        return html_text(self.html)

    @property
    def text(self) -> str:
        """The message's text; made from its HTML when that is all there is."""
        return self.plain if self.plain.strip() else self.rendered or self.plain

    @functools.cached_property
    def others(self) -> List[Part]:
        """The parts that are listed as files: those that are no texts, and texts with a name after the first of their kind."""
        first = {part.kind: part for part in reversed(self.bodies)}
        return [part for part in self.parts if not part.is_text or (part.name and part is not first[part.kind])]

    @property
    def inlines(self) -> List[Part]:
        return [part for part in self.others if part.is_inline]

    @property
    def attachments(self) -> List[Part]:
        return [part for part in self.others if not part.is_inline]

    def links(self) -> List[str]:
        """Return the URLs in the message, in order, each once."""
        found = itertools.chain(html_links(self.html[:MAX_RENDERED]), text_links(self.plain))
        return list(dict.fromkeys(itertools.islice(found, MAX_LINKS)))

    @functools.cached_property
    def has_remote(self) -> bool:
        """Whether the HTML would load something from elsewhere."""
        starts = range(0, len(self.html), BLOCK)    # in pieces that overlap
        return any(REMOTE.search(self.html, start, start + BLOCK + MAX_ADDRESS) for start in starts)

    def framed(self) -> str:
        """Return the HTML with the images that came along. Links open new windows; what would connect by itself is no tag.

        All references together bring in at most twice the message, so that one image named a thousand times stays one message.
        """
        parts = {lower(part.content_id): part for part in reversed(self.parts) if part.content_id}
        urls: Dict[str, str] = {}
        room = 2 * len(self.raw) + BIG_BLOCK

        def put(match: Any) -> str:
            nonlocal room
            from urllib.parse import unquote
            whole = match.group(2)
            ids = (whole, whole.partition(")")[0])
            for id, text in [(id, read(unescape(id))) for id in ids for read in (unquote, str)]:    # "%" may be its own
                name = lower("".join(text.split()).strip("<>"))
                part = parts.get(name)
                kind = part.image_type() if part else ""
                if part and kind:
                    urls[name] = urls.get(name) or "data:%s;base64,%s" % (kind, base64.b64encode(part.data()).decode())
                    room -= len(urls[name])
                    return str(match.group(1) + urls[name] + whole[len(id):]) if room >= 0 else str(match.group())
            return str(match.group())
        html = "".join(CID.sub(put, ACTIVE.sub(r"<\1x-", piece)) for piece in in_pieces(self.html, "<"))
        doctype = DOCTYPE.match(html)
        start = doctype.end() if doctype else 0
        return html[:start] + '<base target="_blank">' + html[start:]

    def snippet(self) -> str:
        """Return how the message begins, in one line."""
        text = squeeze(self.plain[:8000]) or squeeze(html_text(self.html[:BLOCK]))
        return text if len(text) <= MAX_SNIPPET else text[:MAX_SNIPPET] + "..."

    def unsubscribe(self) -> Dict[str, Any]:
        """Return what List-Unsubscribe offers (RFC 2369 section 3.2, RFC 8058), as Mailpit has it."""
        header = self.header("list-unsubscribe")
        links = [link.strip() for link in re.findall(r"<([^<>]*)>", header)[:MAX_PARAMETERS]]
        good = [link for link in links if re.match(r"(?:https?://|mailto:)[^\s]+\Z", link, re.IGNORECASE)]
        wrong = ["%s should be a link or address" % link for link in links if link not in good]
        if header and not links:
            wrong = ["no links in <> found"]
        return {"Header": header, "Links": good, "Errors": ", ".join(wrong),
                "HeaderPost": self.header("list-unsubscribe-post")}

    def calendar(self) -> List[Dict[str, Any]]:
        """Return the events of invitations that came along."""
        kinds = ("text/calendar", "application/ics")
        texts = [part.text() for part in self.parts if part.kind in kinds or part.name.lower().endswith(".ics")][:MAX_EVENTS]
        events = (found for text in dict.fromkeys(texts) for found in read_calendar(text[:MAX_RENDERED]))
        return list(itertools.islice(events, MAX_EVENTS))


def leaves(part: Part) -> Iterator[Part]:
    """Yield the parts that have no parts; a multipart in which none was found is one."""
    if not part.children:
        yield part
    for child in part.children:
        yield from leaves(child)


def whole_names(people: Iterable[Tuple[str, str]]) -> Iterator[Tuple[str, str]]:
    """Yield (name, address) of people of whom each has an @: what comes before `Inc. <a@x>` is the name up to its comma."""
    pieces: List[Tuple[str, str]] = []
    for who, address in people:
        if "@" not in address and not (who and address):
            pieces.append((who, address))
            continue
        if who and pieces:
            who = ", ".join([*map("".join, pieces), who])
        else:
            yield from pieces
        yield who, address
        pieces = []
    yield from pieces


def first_people(people: Iterable[Dict[str, str]], limit: int) -> List[Dict[str, str]]:
    """Return the first people, and as the last one how many more there are."""
    rest = iter(people)
    found = list(itertools.islice(rest, limit))
    more = sum(1 for _ in rest)
    return found + ([{"Name": "... and %d more" % more, "Address": ""}] if more else [])


def shorten(text: str, limit: int = MAX_ADDRESS) -> str:
    return text if len(text) <= limit else text[:limit] + "... (cut)"


def download_name(name: str) -> str:
    """Return a file name that does no harm where it is saved: no directory, no control character, not hidden, not long."""
    name = re.sub(r"[\x00-\x1f\x7f-\x9f/\\:*?\"<>|\u200e\u200f\u202a-\u202e\u2066-\u2069]", "_", name).strip(". ")
    while len(name.encode("utf-8", "replace")) > MAX_NAME - 15:
        stem, suffix = os.path.splitext(name)
        name = stem[:-max(1, (len(name.encode("utf-8", "replace")) - MAX_NAME + 15) // 4)] + suffix[:20]
    return name


# Invitations (RFC 5545).

CALENDAR_LINE = expression(r'([A-Za-z-]{1,40})((?:;(?:[^":;]|"[^"]*"){0,400})*):(.*)', re.DOTALL)


def calendar_time(value: str, parameters: Dict[str, str]) -> str:
    """Return 20261126T100000Z as 2026-11-26T10:00:00Z, with the name of the zone where there is one."""
    match = re.fullmatch(r"(\d{4})(\d\d)(\d\d)(?:T(\d\d)(\d\d)(\d\d)?(Z?))?", value.strip(), re.ASCII)
    if not match:
        return value[:100]
    year, month, day, hour, minute, second, utc = match.groups()
    zone = parameters.get("tzid", "")[:100]
    return "-".join((year, month, day)) + ("T%s:%s:%s%s" % (hour, minute, second or "00", utc) if hour else "") + (
        " " + zone if zone and hour and not utc else "")


def calendar_end(start: str, duration: str) -> str:
    """Return when an event ends that says how long it takes (RFC 5545 section 3.3.6), "" when that is not clear."""
    import datetime
    match = re.fullmatch(r"\+?P(?:(\d{1,5})W)?(?:(\d{1,5})D)?(?:T(?:(\d{1,6})H)?(?:(\d{1,6})M)?(?:(\d{1,9})S)?)?",
                         duration, re.ASCII)
    if not match:
        return ""
    weeks, days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    length = datetime.timedelta(days, seconds, minutes=minutes, hours=hours, weeks=weeks)
    try:
        moment = start[:19]                         # or a day
        return (datetime.datetime.fromisoformat(moment) + length).isoformat()[:len(moment)] + start[19:]
    except (ValueError, OverflowError):
        return ""


def calendar_person(value: str, parameters: Dict[str, str]) -> str:
    address = value.strip()[7:] if value.strip()[:7].lower() == "mailto:" else value.strip()
    return (("%s <%s>" % (parameters["cn"], address)) if parameters.get("cn", address) != address else address)[:MAX_ADDRESS]


def read_calendar(text: str) -> Iterator[Dict[str, Any]]:
    """Yield what, when, where and who of the events in a calendar."""
    method = duration = ""
    event_found: Optional[Dict[str, Any]] = None
    depth = 0                                       # of what stands inside of an event: alarms
    for line in re.sub(r"\r?\n[ \t]", "", text).splitlines():
        match = CALENDAR_LINE.match(line[:MAX_LINK])
        if not match:
            continue
        name, value = match.group(1).lower(), match.group(3)
        parameters = read_parameters("x" + match.group(2))[1]
        plain = re.sub(r"\\([\\;,])", r"\1", re.sub(r"\\[nN]", "\n", value)).strip()
        if name == "method":
            method = plain[:40]
        elif name == "begin" and plain.upper() == "VEVENT":
            event_found = {"Method": method, "Summary": "", "Start": "", "End": "", "Location": "", "Organizer": "",
                           "Attendees": [], "Description": ""}
            duration = ""
        elif event_found is None:
            continue
        elif name in ("begin", "end") and plain.upper() != "VEVENT":
            depth += 1 if name == "begin" else -1
        elif name == "end":
            event_found["End"] = event_found["End"] or calendar_end(event_found["Start"], duration)
            yield event_found
            event_found, depth = None, 0
        elif depth == 0 and name in ("summary", "location", "description"):
            event_found[name.capitalize()] = plain
        elif depth == 0 and name in ("dtstart", "dtend"):
            event_found[name[2:].capitalize()] = calendar_time(value, parameters)
        elif depth == 0 and name == "duration":
            duration = plain
        elif depth == 0 and name == "organizer":
            event_found["Organizer"] = calendar_person(value, parameters)
        elif depth == 0 and name == "attendee" and len(event_found["Attendees"]) <= MAX_ATTENDEES:
            full = len(event_found["Attendees"]) == MAX_ATTENDEES
            event_found["Attendees"].append("... (cut)" if full else calendar_person(value, parameters))


# Searching.

class Searched(NamedTuple):
    """What a message is searched by, in lower case, white space made one blank; computed once for each message."""
    texts: Dict[str, str]                           # by the operator that asks for it; of people, names and addresses
    words: str                                      # people, subject, names of files: where words are besides the text
    headers: str                                    # a line each, "name: value"
    created: float                                  # seconds
    size: int
    attachments: int
    inlines: int
    cut: bool                                       # the text is not all there: what is not in it may yet be in the message

    def cost(self) -> int:
        """Return about how many bytes of memory it takes."""
        texts = [*self.texts.values(), self.words, self.headers]
        return 1000 + sum(len(text) if text.isascii() else 4 * len(text) for text in texts)


def searched(view: View, summary: Dict[str, Any], created: float) -> Searched:
    """Return what a message is searched by, from its view and its entry in the list."""
    def names(people: Iterable[Dict[str, str]]) -> str:
        return "\n".join("%(Name)s %(Address)s" % person for person in people).lower()
    texts = {name: names(view.addresses(name)) for name in ("from", "to", "cc", "reply-to")}
    texts["from"] = texts["from"] or names([summary["From"]])
    texts["bcc"] = names(summary["Bcc"])
    texts["to"] += "\n" + texts["bcc"]              # whom it is to, though no header says so
    texts["subject"] = squeeze(view.header("subject").lower())
    texts["message-id"] = view.header("message-id").lower()
    texts["text"] = squeeze(view.plain.lower()) + "\n" + squeeze(view.rendered.lower())
    words = [texts[name] for name in ("subject", "from", "to", "cc", "reply-to")]
    words += [link.lower() for link in view.links()]
    words += [squeeze(part.shown_name.lower()) for part in view.others]
    headers = "\n".join("%s: %s" % (name, decode_words(raw.partition(b":")[2])) for name, raw in view.fields).lower()
    long = any(part.end - part.start > MAX_TEXT for part in view.bodies) or len(view.html) > MAX_RENDERED
    return Searched(texts, "\n".join(words), headers, created, summary["Size"], len(view.attachments), len(view.inlines),
                    bool(view.cut or long))


def summary_cost(summary: Dict[str, Any]) -> int:
    """Return about how many bytes of memory an entry of the list takes."""
    people = [person for name in ("To", "Cc", "Bcc", "ReplyTo") for person in summary[name]]
    return 3000 + 500 * len(people) + 4 * len(summary["Subject"]) + sum(4 * len(person["Name"]) for person in people)


class Query:
    """A search as Mailpit has it: words and `"phrases"`, all of which must match, operators of OPERATORS, `-` or `!` before
    what must not. `text:` (the body only) and `header:Name=text` are ours. ValueError when it is too long.

    `unknown` lists the terms that look like operators and are none of ours, or have no value that they could mean: a search
    takes them as words, but nobody should delete by them.
    """

    PEOPLE = ("from", "to", "cc", "bcc", "reply-to")
    OPERATORS = PEOPLE + ("addressed", "subject", "message-id", "text", "header", "tag", "is", "has", "before", "after",
                          "larger", "smaller")
    STATES = {"is": ("read", "unread", "tagged"), "has": ("attachment", "attachments", "inline", "inlines")}

    def __init__(self, text: str = "", **fields: str) -> None:
        if len(text) > MAX_SEARCH:
            raise ValueError("a search has at most %d characters" % MAX_SEARCH)
        self.terms: List[Tuple[bool, str, str, float]] = []     # (negated, operator or "", value, number)
        self.unknown: List[str] = []
        for key, value in fields.items():
            if value:
                self.terms.append((False, key, squeeze(value.lower()), 0.0))
        for negation, term in re.findall(r'([-!]*)((?:"[^"]*"?|[^\s"])+)', text):
            self._add(negation, term)
        self.terms = list(dict.fromkeys(self.terms))
        if len(self.terms) > MAX_TERMS:
            raise ValueError("a search has at most %d terms" % MAX_TERMS)

    def _add(self, negation: str, term: str) -> None:
        negated = bool(negation)
        blank = term.isascii() and not any(map(str.isalnum, term))
        if len(negation) > 1 or (negated and blank):            # not what is meant, or what hardly any message has
            self.unknown.append(term)
        key, colon, value = term.replace('"', "").partition(":")
        key, value = key.lower(), squeeze(value.lower())
        number = self.number(key, value)
        if colon and key in self.OPERATORS and value and number is not None:
            self.terms.append((negated, key, value, number))
            return
        operator = key in self.OPERATORS or (not term.startswith('"') and re.fullmatch(r"[a-z][a-z_-]*", key))
        if colon and operator and not value.startswith("//"):
            self.unknown.append(term)
        words = squeeze(term.replace('"', "").lower())
        if words and not (colon and key in self.OPERATORS and not value):       # somebody is still writing it
            self.terms.append((negated, "", words, 0.0))

    @classmethod
    def number(cls, key: str, value: str) -> Optional[float]:
        """Return what the operator compares with, 0.0 where that is no number; None when the value says nothing to it."""
        if key in ("before", "after"):
            return parse_when(value)
        if key in ("larger", "smaller"):
            match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?) ?(?:(k|m|g)?b?)", value, re.ASCII)
            return float(match.group(1)) * {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}.get(match.group(2), 1) if match else None
        if key == "header":
            return 0.0 if value.partition("=")[0] else None
        return 0.0 if value in cls.STATES.get(key, (value,)) else None

    def certain(self) -> "Query":
        """Return itself; ValueError unless it is clear what it means: before something is deleted or changed by it."""
        if self.unknown or not self.terms:
            raise ValueError("nothing is changed by this search: " + (", ".join(self.unknown) or "it is empty"))
        return self

    def matches(self, letter: Any) -> bool:
        """Return whether a message is meant; `letter` has searched(), read and tags."""
        try:
            found = letter.searched()
            return all(self.fits(found, letter, term) for term in self.terms)
        except (FileNotFoundError, PermissionError):    # removed while we looked, or somebody else's
            return False

    def among(self, letters: Iterable[Any]) -> List[Any]:
        """Return the messages that are meant."""
        return [letter for letter in letters if self.matches(letter)]

    @classmethod
    def fits(cls, found: Searched, letter: Any, term: Tuple[bool, str, str, float]) -> bool:
        """Return whether one term holds. Where the text is cut, nobody can say that something is not in it."""
        negated, key, value, number = term
        if cls.holds(found, letter, key, value, number):
            return not negated
        return negated and not (found.cut and key in ("", "text", "header"))

    @classmethod
    def holds(cls, found: Searched, letter: Any, key: str, value: str, number: float) -> bool:
        if not key:
            return value in found.words or value in found.texts["text"]
        if key in found.texts:
            return value in found.texts[key]
        if key == "addressed":
            return any(value in found.texts[name] for name in cls.PEOPLE)
        if key == "header":
            name, equals, wanted = value.partition("=")
            return any(line.startswith(name + ":") and wanted in line[len(name) + 1:] for line in found.headers.split("\n"))
        if key == "tag":
            return value in (tag.lower() for tag in letter.tags)
        if key == "is":
            return bool(letter.tags) if value == "tagged" else bool(letter.read) is (value == "read")
        if key == "has":
            return bool(found.inlines if value.startswith("inline") else found.attachments)
        if key in ("before", "after"):
            return found.created <= number if key == "before" else found.created >= number
        return found.size > number if key == "larger" else found.size < number


def parse_when(text: str) -> Optional[float]:
    """Return the seconds of a moment as people write it into a search, in local time unless it has a zone; None."""
    import datetime
    match = re.fullmatch(r"(\d{4})(?:[-/.](\d{1,2}))?(?:[-/.](\d{1,2}))?"
                         r"(?:[t ](\d{1,2}):(\d\d)(?::(\d\d))?(?:\.\d{1,9})?)?\s*(z|[+-]\d\d:?\d\d)?", text, re.ASCII)
    other = re.fullmatch(r"(\d{1,2})/(\d{1,2})/(\d{4})", text, re.ASCII)
    try:
        if re.fullmatch(r"\d{9,13}", text, re.ASCII):
            return int(text) / (1000.0 if len(text) > 11 else 1.0)
        if match:
            numbers = [int(number or least) for number, least in zip(match.groups(), (1, 1, 1, 0, 0, 0))]
            zone, found = match.group(7), datetime.datetime(*numbers)     # type: ignore[arg-type]
            if zone:
                offset = 0 if zone == "z" else (-1 if zone[0] == "-" else 1) * (int(zone[1:3]) * 60 + int(zone[-2:]))
                found = found.replace(tzinfo=datetime.timezone(datetime.timedelta(minutes=offset)))
            return found.timestamp()
        if other:
            return datetime.datetime(int(other.group(3)), int(other.group(1)), int(other.group(2))).timestamp()
        found = parse_date(text)
        return float(found.timestamp()) if found else None
    except (ValueError, OverflowError, OSError):
        return None


class Cache:
    """What was computed about messages, bounded by the bytes it takes; the longest unused goes first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._kept: "collections.OrderedDict[str, Tuple[Any, int]]" = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Any:
        """Return the value, None when it is not there."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: str, value: Any, cost: int) -> None:
        """Keep a value that takes `cost` bytes, unless it would push out half of the others."""
        with self._lock:                            # two may have computed the same
            self.size -= self._kept.pop(key, (None, 0))[1]
            if cost <= self.limit // 2:
                self._kept[key] = value, cost
                self.size += cost
            while self.size > self.limit:
                self.size -= self._kept.popitem(last=False)[1][1]

    def forget(self, key: str) -> None:
        with self._lock:
            self.size -= self._kept.pop(key, (None, 0))[1]


# ======================================================================================================================
# 19  Transcripts and lint.  What a session said on the way to a message, and what was wrong with it.
# ======================================================================================================================

class Tape:
    """What one SMTP session said and did, as far as it belongs to the message that comes next."""

    def __init__(self, recorder: "Recorder", session: SMTPSession) -> None:
        self.recorder = recorder
        self.session = session
        self.introduction: List[Tuple[str, str]] = []       # what came before the first MAIL: kept for every message
        self.lines: List[Tuple[str, str]] = []
        self.room = MAX_TRANSCRIPT                  # bytes left
        self.habits: Set[str] = set()               # lint rules that the session as such broke
        self.head = b""
        self.longest = self.column = 0
        with contextlib.suppress(OSError):
            if not session.wire.tls and session.wire.sock.recv(1, socket.MSG_PEEK):
                self.habits.add("early-talker")

    def heard(self, line: bytes, more: bool) -> None:
        """Note a command; `more` says that others came with it although the client had to wait for the answer."""
        if more:
            self.habits.add("pipelining")
        if line[:4].upper() == b"MAIL" and not self.introduction:
            self.introduction = [(side, text[:MAX_INTRODUCED]) for side, text in self.lines[-MAX_INTRODUCTION:]]
            self.lines = []
        self.add("C", line)

    def said(self, data: bytes) -> None:
        for line in data.splitlines():
            self.add("S", line)

    def add(self, side: str, line: bytes) -> None:
        if self.room <= 0:
            return
        text = printable(line, 2000)
        self.room -= (1 if text.isascii() else 12) * len(text) + 50     # what a line costs in the file, about
        self.lines.append((side, text) if self.room > 0 else ("S", "(the rest was not kept)"))

    def begin(self) -> None:
        """Content begins."""
        self.head, self.longest, self.column = b"", 0, 0

    def block(self, block: bytes) -> None:
        """Look at content as it passes."""
        if len(self.head) < BLOCK:
            self.head += block[:BLOCK]
        first = block.find(b"\n")
        if first < 0:
            self.column += len(block)
        else:
            self.longest = max(self.longest, self.column + first)
            if len(block) > 1000:
                long = LONG_LINE.search(block)
                self.longest = max(self.longest, len(long.group()) if long else 0)
            self.column = len(block) - block.rfind(b"\n") - 1
        self.longest = max(self.longest, self.column)

    def save(self, envelope: Envelope, content: Content, parcel: Parcel) -> None:
        """Write what is known beside the message; the 250 is in it, though it is only about to be said."""
        lines = self.introduction + self.lines + [("S", "250 2.0.0 accepted as " + envelope.id)]
        known = lint(envelope, content, parcel.draft, self.head, self.longest) + [
            rule for rule in LINT if rule in self.habits]
        self.recorder.save(envelope, lines, known, self.session.wire.tls)

    def restart(self) -> None:
        """Begin with the next message."""
        self.lines = []
        self.room = MAX_TRANSCRIPT
        self.habits.discard("pipelining")


LINT = {                                            # rule: (what is wrong, where it says so)
    "bare-newline": ("A CR or LF stands alone in the content; lines end with CRLF.", "RFC 5321 section 2.3.8"),
    "8bit": ("The content has 8-bit bytes but MAIL did not say BODY=8BITMIME.", "RFC 6152 section 3"),
    "no-date": ("There is no Date header.", "RFC 5322 section 3.6"),
    "no-message-id": ("There is no Message-ID header; receivers use it to tell messages apart.", "RFC 5322 section 3.6.4"),
    "no-from": ("There is no From header.", "RFC 5322 section 3.6"),
    "long-line": ("A line has more than 998 characters.", "RFC 5322 section 2.1.1"),
    "early-talker": ("The client talked before the greeting.", "RFC 5321 section 4.3.1"),
    "pipelining": ("Commands were sent on without waiting where the answer had to be awaited.", "RFC 2920 section 3.1"),
    "size": ("MAIL said another SIZE than the content had, by more than one part in ten.", "RFC 1870 section 6"),
    "header-encoding": ("A header has raw 8-bit characters or a broken encoded word.", "RFC 2047 section 2"),
    "dot-stuffing": ("A line began with a single dot; the client must double it, or text is lost.", "RFC 5321 section 4.5.2"),
}


def lint(envelope: Envelope, content: Content, draft: Draft, head: bytes, longest: int) -> List[str]:
    """Return the rules (keys of LINT) that a message breaks."""
    fields, _ = split_headers(head, MAX_FIELDS)
    names = [name for name, _ in fields]
    raw = b"".join(value for _, value in fields)
    rest = re.sub(rb"=\?[\w-]+(\*\w+)?\?([Bb]\?[\w+/]+=*|[Qq]\?[!->@-~]+)\?=", b"", raw)   # without good encoded words
    size = draft.size
    broken = [
        ("bare-newline", content.bare),
        ("8bit", draft.eightbit and envelope.body != "8BITMIME"),
        ("no-date", "date" not in names),
        ("no-message-id", "message-id" not in names),
        ("no-from", "from" not in names),
        ("long-line", longest > 999),
        ("size", envelope.declared is not None and abs(envelope.declared - size) * 10 > max(size, 100)),
        ("header-encoding", (not raw.isascii() and not envelope.smtputf8) or re.search(rb"=\?[\w*-]+\?\w\?", rest)),
        ("dot-stuffing", content.unstuffed),
    ]
    return [rule for rule, is_broken in broken if is_broken]


RAW_DECODE = json.JSONDecoder().raw_decode


class Recorder:
    """DATA/sessions: how each message came, and its tags. Nothing is promised about that, so nothing is flushed.

    A process appends to a file of its own, a line of JSON for each message; a line that no longer counts is blanked, and a
    file without others removed. Who asks for a record first reads what was appended since the last time.
    """

    FULL = 1 << 24                                  # bytes in a file; then another is begun

    def __init__(self, mailboxes: Mailboxes) -> None:
        self.mailboxes = mailboxes
        self.storage = mailboxes.storage
        self.root = os.path.join(self.storage.root, "sessions")
        self.storage.make_directory(self.root)
        self._writing = threading.Lock()
        self._fd, self._own, self._size = -1, "", 0     # our file, locked while it grows; its name; bytes in it
        self._numbers = itertools.count(1)
        self._looking = threading.Lock()            # what follows is of those who look; taken before the other
        self._places: Dict[str, Tuple[str, int]] = {}   # id: file, where in it the record begins
        self._seen: Dict[str, int] = {}             # file: bytes of it that were looked at, and ...
        self._left: Dict[str, int] = {}             # ... records in them

    def tape(self, session: SMTPSession) -> Tape:
        return Tape(self, session)

    def save(self, envelope: Envelope, lines: Sequence[Tuple[str, str]], rules: Sequence[str], tls: bool) -> None:
        """Note how a message comes."""
        try:
            self._append({
                "id": envelope.id, "sender": envelope.sender, "recipients": [str(r) for r in envelope.recipients],
                "helo": envelope.helo, "client": envelope.client, "protocol": envelope.protocol, "tls": tls,
                "transcript": lines, "lint": rules})
        except OSError as error:
            log.warning("transcript of %s not kept: %s", envelope.id, error)

    def replace(self, record: Dict[str, Any]) -> None:
        """Note something else about a message; OSError."""
        with self._looking:
            self._look()
            self._append(record)
            self._blank(record["id"])

    def load(self, id: str) -> Optional[Dict[str, Any]]:
        """Return what is known about a message, None when that is nothing."""
        with self._looking:
            record = self._read(id)
            if record is None:                      # not known yet, or replaced by another process
                self._look()
                record = self._read(id)
        return record

    @staticmethod
    def explain(rules: Iterable[str]) -> List[Dict[str, str]]:
        """Return what rules that a message broke say."""
        return [{"rule": rule, "text": LINT[rule][0], "rfc": LINT[rule][1]} for rule in rules if rule in LINT]

    def forget(self, id: str) -> None:
        """A message is gone."""
        with self._looking:
            if id not in self._places:
                self._look()
            self._blank(id)

    def sweep(self) -> None:
        """Forget messages that other programs removed."""
        with self._looking:
            self._look()
            gone = set(self._places)
        for name in self.mailboxes.names(strict=True) if gone else ():
            gone.difference_update(map(message_id, self.mailboxes.listing(name)))
        with self._looking:
            old = set()                             # before the first is blanked: a file that grows has some just coming in
            for name in self._seen:
                with contextlib.suppress(OSError):
                    if time.time() - os.stat(self._path(name)).st_mtime > 3600:
                        old.add(name)
            for id in gone & self._places.keys():
                if self._places[id][0] in old:
                    self._blank(id)

    def close(self) -> None:
        """Let the next to start see that nothing is written any more."""
        with self._writing:
            self._end()

    def _path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def _append(self, record: Dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        with self._writing:
            try:
                if self._fd < 0 or self._size > self.FULL or not os.fstat(self._fd).st_nlink:   # somebody removed it
                    self._begin()
                write_all(self._fd, line)
                self._size += len(line)
            except OSError:                         # nothing comes after half a line
                self._end()
                raise

    def _begin(self) -> None:
        self._end()
        self._own, self._size = "%s-%d" % (self.storage.token, next(self._numbers)), 0
        self.storage.make_directory(self.root)
        self._fd = self.storage.make(self._path(self._own))
        with contextlib.suppress(OSError):          # no locks here: then others may remove it too early
            if fcntl:
                lock_file(self._fd)

    def _end(self) -> None:
        close_quietly(self._fd)
        self._fd = -1

    def _look(self) -> None:
        """Learn where the records are that were appended since the last time; remove files that have none any more."""
        names = list(self.mailboxes.permitted(list_directory, self.root))
        gone = self._seen.keys() - set(names)
        if gone:                                    # others removed them
            self._seen = {name: seen for name, seen in self._seen.items() if name not in gone}
            self._left = {name: left for name, left in self._left.items() if name not in gone}
            self._places = {id: place for id, place in self._places.items() if place[0] not in gone}
        for name in names:
            if name.endswith(".json") and name in self._seen:       # nothing is appended to these
                continue
            with contextlib.suppress(OSError), open(open_regular(self._path(name)), "rb") as file:
                offset = self._seen.get(name, 0)
                file.seek(offset)
                for line in file:
                    if line[-1:] != b"\n" and not name.endswith(".json"):     # as once, a file for each
                        break
                    with contextlib.suppress(ValueError):
                        id, _ = RAW_DECODE(line[:MAX_NAME * 6].decode("ascii"), len('{"id": '))
                        self._places[str(id)] = name, offset
                        self._left[name] = self._left.get(name, 0) + 1
                    offset += len(line)
                self._seen[name] = offset
            if self._seen.get(name) and not self._left.get(name):
                with contextlib.suppress(OSError):  # who blanked its last record could not: it was still written to
                    self._remove(name)

    def _read(self, id: str) -> Optional[Dict[str, Any]]:
        name, offset = self._places.get(id, ("", 0))
        try:
            with open(open_regular(self._path(name)), "rb") as file:
                file.seek(offset)
                record: Dict[str, Any] = json.loads(file.readline())
                return record if record["id"] == id else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _blank(self, id: str) -> None:
        """Make a record that is known of none, and remove the file of which it was the last."""
        name, offset = self._places.pop(id, ("", 0))
        if not name:
            return
        with contextlib.suppress(OSError):
            with open(os.open(self._path(name), os.O_RDWR | O_PLAIN), "r+b") as file:
                file.seek(offset)
                length = len(file.readline().rstrip(b"\n"))
                file.seek(offset)
                file.write(b" " * length)
            self._left[name] -= 1
            if not self._left[name]:
                self._remove(name)

    def _remove(self, name: str) -> None:
        """Remove a file in which nothing is left, unless somebody still writes to it; OSError."""
        if name == self._own and self._fd >= 0:
            with self._writing:
                if self._seen[name] == self._size:
                    self._end()
                    os.unlink(self._path(name))
            return
        fd = os.open(self._path(name), os.O_RDWR | O_EXTRA)
        try:
            if fcntl and not lock_file(fd):
                return
        finally:
            os.close(fd)
        os.unlink(self._path(name))


class TranscriptsExtension(Extension):
    """--transcripts."""

    name = "transcripts"

    def recorder(self, mailboxes: Mailboxes) -> Any:
        return Recorder(mailboxes)

    def equip(self, node: Any) -> None:
        site, config = node.site, node.config
        if config.transcripts or (config.transcripts is None and config.capture):
            site.recorder = self.recorder(site.mailboxes)
            site.mailboxes.forget = site.recorder.forget

    def join(self, node: Any, seconds: float) -> None:
        if node.site.recorder:
            node.site.recorder.close()


EXTENSIONS.append(TranscriptsExtension())


# ======================================================================================================================
# 20  Faults.  Misbehaviour on purpose, by rules, so that a client's handling of it can be tried.
# ======================================================================================================================

class Fault:
    """One rule, `STAGE[=PATTERN] ACTION [xCOUNT]`; ValueError when it is none."""

    STAGES = ("connect", "helo", "mail", "rcpt", "data", "end", "auth", "pop3-login", "pop3-retr", "pop3-quit")

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        words = self.text.split()
        self.left: Optional[int] = None             # how many times more; None: always
        if len(words) > 1 and re.fullmatch(r"x\d{1,6}", words[-1]):
            self.left = int(words.pop()[1:])
        self.stage, _, self.pattern = (words[0] if words else "").partition("=")
        self.action = " ".join(words[1:])
        hide = self.stage == "hide" and len(words) == 2
        good = re.fullmatch(r"[45]\d\d( [ -~]+)?|drop|stall|delay \d+(\.\d+)?", self.action)
        if not hide and (self.stage not in self.STAGES or not good):
            raise ValueError("expected STAGE[=PATTERN] ACTION [xCOUNT], or hide EXTENSION; stages: " + " ".join(self.STAGES))


class Faults:
    """The rules in force: the first that matches wins, nothing is random."""

    def __init__(self, rules: Iterable[Fault] = ()) -> None:
        self.rules = list(rules)
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self.rules)

    def hides(self, extension: str) -> bool:
        return any(rule.stage == "hide" and rule.action.upper() == extension.upper() for rule in self.rules)

    def take(self, stage: str, subject: str) -> Optional[str]:
        """Return the action due at this stage, and count it."""
        with self._lock:
            for rule in self.rules:
                subjects = [subject] + subject.split(" ")       # of the content: any of its recipients
                if rule.stage == stage and rule.left != 0 and (not rule.pattern or any(
                        fnmatch.fnmatchcase(lower(one), lower(rule.pattern)) for one in subjects)):
                    if rule.left is not None:
                        rule.left -= 1
                    return rule.action
        return None

    def replace(self, rules: Iterable[str]) -> None:
        """Put other rules in force; ValueError, with nothing changed."""
        self.rules = [Fault(rule) for rule in rules]


class FaultsExtension(Extension):
    """--fault."""

    name = "faults"

    def equip(self, node: Any) -> None:
        node.site.faults = Faults(Fault(rule.text) for rule in node.config.fault)

    def parse_fault(self, text: str) -> Fault:
        return Fault(text)


EXTENSIONS.append(FaultsExtension())


# ======================================================================================================================
# 21  Letters.  Messages as people see and search them, each once however many mailboxes have it; waiting for one.
# ======================================================================================================================

Copies: TypeAlias = "Tuple[Tuple[str, Item], ...]"  # (mailbox, item)


class Letter:
    """An accepted message, however many mailboxes have it; or only the copy in the viewer's own mailbox."""

    def __init__(self, id: str, copies: Copies, letters: "Letters", own: str = "") -> None:
        self.id, self.letters, self.own = id, letters, own
        self.key = "%s %s" % (id, own) if own else id   # by which what is computed about it is remembered
        self.hold(copies)

    def hold(self, copies: Copies) -> None:
        """Be told where the message is now."""
        self.read = all("S" in item.name.partition(FLAGS)[2] for _, item in copies)
        self.copies = copies

    def message(self) -> Message:
        mailbox, item = self.copies[0]
        return Message(self.letters.mailboxes, mailbox, item)

    def open(self) -> BinaryIO:
        """Return the message as a file; OSError."""
        mailbox, item = self.copies[0]
        return os.fdopen(self.letters.mailboxes.open(mailbox, item), "rb")

    def view(self) -> View:
        return View(self.message().read())

    def record(self) -> Dict[str, Any]:
        """Return what was noted when the message came; the others' part of it is not for who sees one mailbox only."""
        recorder = self.letters.recorder
        record = {"id": self.id, "sender": "", "recipients": [mailbox for mailbox, _ in self.copies], "helo": "",
                  "client": "", "protocol": "", "tls": False, "transcript": [], "lint": []}
        known = recorder.load(self.id) if recorder else None
        if not known:
            return dict(record, sender=self.message().sender)
        if self.own:
            return dict(record, sender=known.get("sender", ""), **{key: known[key] for key in ("tags",) if key in known})
        return dict(record, **known)

    @property
    def tags(self) -> List[str]:
        """Those it was given; else those that it came with, in X-Tags or in the addresses (bob+shop@x: shop)."""
        tags: Optional[List[str]] = self.letters.tagged.get(self.key)
        if tags is None:
            record = self.record()
            tags = record.get("tags")
            if tags is None:
                named = View(self.message().head(BLOCK)).header("x-tags").split(",")
                locals = (parse_key(recipient).local for recipient in record["recipients"])
                tags = clean_tags(named + [word for local in locals for word in local.split("+")[1:]])[:MAX_TAGS]
            self.letters.tagged.put(self.key, tags, 200 + sum(map(len, tags)))
        return tags

    def set_tags(self, tags: List[str]) -> None:
        """Note the tags beside what else is known of the message; OSError."""
        recorder = self.letters.recorder
        recorder.replace(dict(recorder.load(self.id) or self.record(), tags=tags))

    def session(self) -> Dict[str, Any]:
        """Return envelope, transcript and lint; what can be told from the message alone where none were kept."""
        record = self.record()
        record["bcc"] = [person["Address"] for person in self.summary()["Bcc"]]
        recorder = self.letters.recorder
        record["lint"] = recorder.explain(record["lint"]) if recorder else []
        return record

    def summary(self, view: Optional[View] = None) -> Dict[str, Any]:
        """Return the entry of a list; what is in the file is read once (not at all with its view) and remembered."""
        known = self.letters.summaries.get(self.key)
        if known is None:
            try:
                known = self._summary(view or self.view())
            except OSError as error:                # may change: nothing to remember
                storage = self.letters.mailboxes.storage
                if isinstance(error, FileNotFoundError) or storage.is_away():
                    raise
                storage.complain(self.id, "message %s cannot be shown: %s" % (self.id, error))
                return dict(self._not_shown(), Read=self.read)
            except Exception as error:              # one message must not hide the others
                log.warning("message %s cannot be shown: %s", self.id, error)
                known = self._not_shown()
            self.letters.summaries.put(self.key, known, summary_cost(known))
        return dict(known, Read=self.read, Tags=self.tags)

    def _not_shown(self) -> Dict[str, Any]:
        message, nobody = self.message(), {"Name": "", "Address": ""}
        return {"ID": self.id, "MessageID": "", "From": nobody, "To": [], "Cc": [], "Bcc": [], "ReplyTo": [],
                "Subject": "(cannot be shown)", "Created": iso_time(message.received_at.timestamp()),
                "Username": "", "Tags": [], "Size": message.size, "Attachments": 0, "Snippet": ""}

    def searched(self) -> Searched:
        """Return what the message is searched by; computed once."""
        found: Optional[Searched] = self.letters.searched.get(self.key)
        if found is None:
            view = self.view()
            found = searched(view, self.summary(view), self.message().received_at.timestamp())
            self.letters.searched.put(self.key, found, found.cost())
        return found

    def _summary(self, view: View) -> Dict[str, Any]:
        message = self.message()
        named = {name: view.addresses(name) for name in ("from", "to", "cc", "reply-to")}
        shown = {same_address(person["Address"]) for name in ("to", "cc") for person in named[name]}
        recipients = self.record()["recipients"]
        named["bcc"] = [{"Name": "", "Address": shorten(who)} for who in recipients if same_address(who) not in shown]
        listed = {name: first_people(people, MAX_NAMED) for name, people in named.items()}
        return {"ID": self.id, "MessageID": shorten(view.header("message-id").strip("<>")),
                "From": (named["from"] or [{"Name": shorten(view.header("from")), "Address": ""}])[0], "To": listed["to"],
                "Cc": listed["cc"], "Bcc": listed["bcc"], "ReplyTo": listed["reply-to"],
                "Subject": shorten(view.header("subject"), MAX_LINK),
                "Created": iso_time(message.received_at.timestamp()), "Username": "", "Tags": [], "Size": message.size,
                "Attachments": len(view.attachments), "Snippet": view.snippet()}

    def whole(self) -> Dict[str, Any]:
        """Return the message as GET /api/v1/message/ID gives it, and what more the page shows of it."""
        view = self.view()
        summary = self.summary(view)
        inline, attached = ([part.entry() for part in parts] for parts in (view.inlines, view.attachments))
        shown = {key: summary[key] for key in ("ID", "MessageID", "Read", "From", "To", "Cc", "Bcc", "ReplyTo", "Subject",
                                               "Tags", "Username", "Size")}
        people = {key: view.addresses(name) for key, name in (("To", "to"), ("Cc", "cc"), ("ReplyTo", "reply-to"))}
        return dict(shown, **people, ReturnPath=self.message().sender, Date=view.date(summary["Created"]), Text=view.text,
                    HTML=view.html, Inline=inline, Attachments=attached,
                    ListUnsubscribe=view.unsubscribe(), Links=view.links(), Calendar=view.calendar(), Tree=view.root.tree(),
                    RemoteImages=view.has_remote, Cut=view.cut)


class Index:
    """All messages of all mailboxes; brought up to date mailbox by mailbox where two stat() calls show a change."""

    def __init__(self, mailboxes: Mailboxes, make: Callable[[str, Copies], Letter], forget: Callable[[str], None]) -> None:
        self.mailboxes, self.make, self.forget = mailboxes, make, forget
        self._lock = threading.Lock()
        self._begun = 0.0                           # when the last look at the disk began
        self._domains: Dict[str, Tuple[Any, List[Tuple[str, str, str]]]] = {}   # directory: stamp, places of its mailboxes
        self._boxes: Dict[str, Tuple[Any, Dict[str, Item]]] = {}    # mailbox: stamp, items by UID
        self._letters: Dict[str, Letter] = {}       # by id
        self._newest: Optional[List[Letter]] = []   # the newest first; None: to be sorted anew

    def letters(self) -> List[Letter]:
        """Return all messages, newest first."""
        self.refresh()
        with self._lock:
            if self._newest is None:
                self._newest = sorted(self._letters.values(), key=lambda letter: letter.copies[0][1].name, reverse=True)
            return self._newest

    def get(self, id: str) -> Optional[Letter]:
        return self._letters.get(id)

    def letter_of(self, message: Message) -> Optional[Letter]:
        """Return what a message in a mailbox is a copy of; None when it has gone."""
        for attempt in range(2):
            letter = self.get(message.id)
            if letter and any(mailbox == message.recipient for mailbox, _ in letter.copies):
                return letter
            if not attempt:
                self.refresh()
        return None

    def refresh(self) -> None:
        """Look at the disk, unless somebody began to after we were called."""
        asked = time.monotonic()
        with self._lock:
            if self._begun > asked:
                return
            self._begun = time.monotonic()
            recent = time.time_ns() - 2_000_000_000     # from then on a clock's tick may hide a change
            places = self._places(recent)
            for mailbox, new, cur in places:
                stamp = settled_stamp(recent, new, cur)
                if stamp is None or mailbox not in self._boxes or self._boxes[mailbox][0] != stamp:
                    self._update(mailbox, stamp, self.mailboxes.permitted(self.mailboxes.listing, mailbox))
            if len(places) < len(self._boxes):
                for mailbox in self._boxes.keys() - {mailbox for mailbox, _, _ in places}:
                    self._update(mailbox, None, ())
                    del self._boxes[mailbox]

    def _places(self, recent: int) -> List[Tuple[str, str, str]]:
        """Return (mailbox, its new/, its cur/) of all; a domain's directory is read again when it has changed."""
        found: List[Tuple[str, str, str]] = []
        for name in self.mailboxes.domains():
            stamp = settled_stamp(recent, os.path.join(self.mailboxes.root, name))
            known = self._domains.get(name)
            if known is None or stamp is None or known[0] != stamp:
                known = self._domains[name] = stamp, [(mailbox, os.path.join(place, "new"), os.path.join(place, "cur"))
                                                      for mailbox, place in self.mailboxes.begun(name)]
            found += known[1]
        return found

    def _update(self, mailbox: str, stamp: Any, items: Iterable[Item]) -> None:
        before = self._boxes[mailbox][1] if mailbox in self._boxes else {}
        after = {item.uid: item for item in items}
        self._boxes[mailbox] = stamp, after
        if before == after:
            return
        for uid in before.keys() - after.keys():
            self._note(mailbox, message_id(before[uid]), ())
        for uid, item in after.items():
            if before.get(uid) != item:
                self._note(mailbox, message_id(item), ((mailbox, item),))

    def _note(self, mailbox: str, id: str, there: Copies) -> None:
        """Note that of a message this is in the mailbox: one copy or none."""
        letter = self._letters.get(id)
        elsewhere = tuple(copy for copy in letter.copies if copy[0] != mailbox) if letter else ()
        if letter and (elsewhere or there):
            letter.hold(elsewhere + there)
        elif there:
            self._letters[id] = self.make(id, there)
            self._newest = None
        elif self._letters.pop(id, None):
            self._newest = None
            self.forget(id)


def settled_stamp(recent: int, *paths: str) -> Any:
    """Return a value that changes with what is in directories; None while they have changed since the time `recent` (ns)."""
    try:
        stamps = directory_stamps(*paths)
    except OSError:
        return None
    return stamps if stamps and max(stamps)[0] <= recent else None


class Letters:
    """All letters there are, and what was computed about them: `recorder` knows how they came, if not None."""

    def __init__(self, mailboxes: Mailboxes, recorder: Any) -> None:
        self.mailboxes, self.recorder = mailboxes, recorder
        self.summaries, self.searched, self.tagged = Cache(MAX_SUMMARIES), Cache(MAX_SEARCHED), Cache(MAX_TAGGED)
        self.index = Index(mailboxes, lambda id, copies: Letter(id, copies, self), self.forget)

    def forget(self, key: str) -> None:
        """Forget what was computed about a message that is gone."""
        for cache in (self.summaries, self.searched, self.tagged):
            cache.forget(key)

    def newest_first(self, own: str = "") -> List[Letter]:
        """Return all letters; or what is in one mailbox, as whoever sees no other sees it."""
        if not own:
            return self.index.letters()
        return [Letter(message_id(item), ((own, item),), self, own) for item in reversed(self.mailboxes.listing(own))]


class Search:
    """A search that goes on while mail comes: each call judges only what the ones before have not."""

    def __init__(self, letters: Letters, own: str, wanted: Query) -> None:
        self.letters, self.own, self.wanted = letters, own, wanted
        self._judged: Dict[str, Copies] = {}        # the flags of a copy, and whether there are others, may count

    def __call__(self) -> Optional[Letter]:
        """Return the oldest letter that matches, None when none does."""
        for letter in reversed(self.letters.newest_first(self.own)):
            copies = letter.copies
            if self._judged.get(letter.id) != copies:
                if self.wanted.matches(letter):
                    return letter
                self._judged[letter.id] = copies
        return None


def clean_tags(tags: Iterable[str]) -> List[str]:
    """Return the tags that are some, sorted, each once."""
    stripped = (tag.strip() for tag in tags)
    return sorted({tag for tag in stripped if 0 < len(tag) <= 100 and all(c.isalnum() or c in " -_.@" for c in tag)})


def wait_command(config: Config, arguments: List[str]) -> int:
    """Wait until a message is there that matches; status 1 when time is up."""
    parser = Parser(prog="minimail.py wait", description=wait_command.__doc__)
    parser.add_argument("address", nargs="?", metavar="ADDRESS")
    parser.add_argument("--from", dest="sender", default="", metavar="X", help="in the From header")
    parser.add_argument("--subject", default="", metavar="X", help="in the subject")
    parser.add_argument("--text", default="", metavar="X", help="in the text")
    parser.add_argument("--timeout", default="30", metavar="SECONDS", help="how long to wait (default 30)")
    parser.add_argument("--print", dest="show", choices=["raw", "text", "links", "json"], help="what to print of it")
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + wait_seconds(given.timeout)
    address = mailbox_named("wait", given.address, config) if given.address else ""
    wanted = Query(**{"from": given.sender, "subject": given.subject, "text": given.text})
    stores = open_stores(config)
    recorder = extension("transcripts").recorder(stores.mailboxes) if has_extension("transcripts") else None
    found = await_mail(stores.storage, Search(Letters(stores.mailboxes, recorder), address, wanted), deadline)
    if found is None:
        raise CannotRun("no such message within %s seconds" % given.timeout)
    show_letter(found, given.show)
    return 0


def wait_seconds(text: str) -> float:
    """Return how long to wait, which may be not at all; UsageError."""
    try:
        return 0.0 if text.strip() == "0" else parse_seconds(text)
    except ValueError as error:
        raise UsageError("wait --timeout %s: %s" % (printable(text, 100), error)) from None


def show_letter(letter: Letter, kind: Optional[str]) -> None:
    if kind == "raw":
        sys.stdout.flush()
        sys.stdout.buffer.write(letter.message().read())
        sys.stdout.buffer.flush()
    elif kind == "text":
        text = letter.view().text
        if sys.stdout.isatty():                     # which obeys control characters
            text = "".join(char if char.isprintable() or char in "\t\n\xa0" else printable(char)
                           for char in text.replace("\r\n", "\n"))
        print(text)
    elif kind == "links":
        print("".join(link + "\n" for link in letter.view().links()), end="")
    elif kind == "json":
        print(json.dumps(letter.whole(), indent=1))


def mail_command(config: Config, arguments: List[str]) -> int:
    """List the mailboxes, or the messages in one."""
    parser = Parser(prog="minimail.py mail", description=mail_command.__doc__)
    parser.add_argument("address", nargs="?", metavar="ADDRESS")
    given = parser.parse_args(arguments)
    mailboxes = Mailboxes(Storage(config.data))
    if given.address is None:
        for name in mailboxes.names():
            items = mailboxes.listing(name)
            print("%6d %12d %s" % (len(items), items.total, printable(name)))
        return 0
    key = mailbox_named("mail", given.address, config)
    for item in mailboxes.listing(key):
        message = Message(mailboxes, key, item)
        try:
            subject = View(message.head(BLOCK)).header("subject")
        except OSError as error:                    # removed while we looked, or it cannot be read
            log.warning("%s: %s", item.uid, error)
            continue
        when = message.received_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        print("%s %s %9d <%s> %s" % (item.uid, when, item.size, printable(message.sender), printable(subject)))
    return 0


class WaitExtension(Extension):
    """Searches for who waits in a program or a shell script."""

    name = "wait"
    commands = {"wait": wait_command, "mail": mail_command}

    def matcher(self, node: Any, search: str) -> Callable[[Message], bool]:
        letters, wanted = node.site.inbox or Letters(node.site.mailboxes, node.site.recorder), Query(search)

        def matches(message: Message) -> bool:
            letter = letters.index.letter_of(message)
            return letter is not None and wanted.matches(letter)
        return matches


EXTENSIONS.append(WaitExtension())


# ======================================================================================================================
# 22  Web.  Inbox and JSON API over HTTP, webhook, page. Mail is hostile: what comes out of a message is data, never
#     markup.
# ======================================================================================================================

# Who asks, for what, and what comes back.

class Viewer(NamedTuple):
    """Who looks at the mail."""
    user: Optional[str] = None                      # who logged in
    own: str = ""                                   # the one mailbox that is shown; "" for all


EVERYTHING = Viewer()                               # who needs no log-in


class Answered(NamedTuple):
    """An HTTP response."""
    status: int
    type: str
    body: bytes = b""
    headers: Dict[str, str] = {}
    file: Optional[BinaryIO] = None                 # sent in blocks instead of the body
    stream: Optional[Iterator[bytes]] = None        # sent as it comes, until the connection ends


class Rejected(Exception):
    """Raised where a request is refused; carries the answer that says so."""

    def __init__(self, status: int, text: str, headers: Optional[Dict[str, str]] = None) -> None:
        super().__init__(text)
        self.answer = text_answer(status, text)._replace(headers=headers or {})


class Route(NamedTuple):
    """A row of ROUTES: what answers which requests, and on what terms."""
    method: str
    pattern: str                                    # of the whole path
    name: str                                       # of the method of Inbox
    body: int = 0                                   # bytes taken
    everything: bool = False                        # only for who sees every mailbox
    waits: bool = False                             # for mail


@dataclasses.dataclass
class Request:
    """An HTTP request whose head has been read; its body comes when a route is found that wants one."""
    method: str
    path: str
    query: Dict[str, str]
    viewer: Viewer = EVERYTHING
    type: str = ""                                  # of the body
    read: Callable[[int], BinaryIO] = lambda limit: io.BytesIO()    # the body, of so many bytes at most; Rejected
    is_over: Callable[[], bool] = lambda: False     # the client has gone, or the node stops
    body: BinaryIO = dataclasses.field(default_factory=io.BytesIO)

    def number(self, name: str, default: int) -> int:
        text = self.query.get(name, "")
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else default

    def content(self) -> bytes:
        """Return the body, once."""
        with self.body:
            return self.body.read()

    def json(self) -> Any:
        """Return what the body means; ValueError."""
        return read_json(self.content())


def read_json(body: bytes) -> Any:
    """Return the value of a JSON text; ValueError also when it has more values or longer numbers than anybody needs."""
    bare, values, at = body.replace(b"\\\\", b"").replace(b'\\"', b""), 0, 0
    while 0 <= at < len(bare):                      # outside of strings, these stand between values
        end = bare.find(b'"', at)
        end = len(bare) if end < 0 else end
        values += 1 + sum(bare.count(mark, at, end) for mark in (b",", b"[", b"{"))
        if values > MAX_JSON_VALUES:
            raise ValueError("more than %d values in the JSON" % MAX_JSON_VALUES)
        at = bare.find(b'"', end + 1) + 1 or -1
    del bare
    return json.loads(body, parse_int=functools.partial(short_number, int), parse_float=functools.partial(short_number, float))


def short_number(kind: Callable[[str], Any], text: str) -> Any:
    if len(text) > 30:                              # to turn digits into a number takes the square of their count
        raise ValueError("a number of %d digits" % len(text))
    return kind(text)


def json_answer(value: Any, status: int = 200) -> Answered:
    return Answered(status, "application/json", json.dumps(value).encode())


def text_answer(status: int, text: str) -> Answered:
    return Answered(status, "text/plain; charset=utf-8", text.encode("utf-8", "replace"))


NOT_FOUND = text_answer(404, "404 page not found")
OK_ANSWER = text_answer(200, "ok")
SAFE_TYPES = ("text/plain", "application/pdf", "audio/mpeg", "video/mp4")     # beside images
LINK = expression(r"<(a|area)(?=[ \t\n\r\f/>])", re.IGNORECASE | re.ASCII)
SCREENS = "".join('<i id=minimail-%d style="position:absolute;top:%dvh"></i>' % (n, 90 * n) for n in range(60))


def in_a_frame(html: str) -> str:
    """Return HTML of View.framed() for a frame of the page: links open windows of their own and do not say where from.

    A tag's name goes up to a blank, "/" or ">", and of two equal attributes the first counts, so this needs no parser.
    At the end stand marks by which the page can scroll what it may not look into.
    """
    marked = r"<\1 target=_blank rel=noreferrer referrerpolicy=no-referrer "
    return "".join(LINK.sub(marked, piece) for piece in in_pieces(html, "<")) + SCREENS


class Inbox(Letters):
    """Turns HTTP requests into answers; knows no socket. Routes are the methods named in ROUTES."""

    def __init__(self, node: Any) -> None:
        super().__init__(node.site.mailboxes, node.site.recorder)
        self.site, self.node = node.site, node
        self.desk = threading.BoundedSemaphore(MAX_DESKS)   # see at_desk()
        self.changed = threading.Condition()
        self.events: "collections.deque[Tuple[int, str]]" = collections.deque(maxlen=1000)
        self.serial = 0
        self.visitors: Set[WebSession] = set()      # connections of the web
        self.threads = Threads("minimail-web")      # that carry them
        self.hook: Optional[WebHook] = None

    def accepted(self, parcel: Parcel) -> None:
        """A message was taken over."""
        if self.hook and parcel.mailboxes:
            self.hook.add(parcel.draft.id)
        self.tell("new")

    def tell(self, kind: str) -> None:
        """Tell the pages that are open, and who waits."""
        with self.changed:
            self.serial += 1
            self.events.append((self.serial, kind))
            self.changed.notify_all()

    def pause(self, seen: int, seconds: float) -> None:
        """Return when something has happened since the serial number `seen`, or after `seconds`."""
        with self.changed:
            if self.serial == seen:
                self.changed.wait(seconds)

    def sleeper(self, is_over: Callable[[], bool]) -> Callable[[float], Optional[bool]]:
        """Return a sleep for await_mail() that ends when something happens here, or it is_over()."""
        seen = self.serial

        def sleep(seconds: float) -> Optional[bool]:
            nonlocal seen
            self.pause(seen, seconds)
            changed, seen = self.serial != seen, self.serial
            return False if is_over() else changed or None
        return sleep

    def stop(self) -> None:
        """The node stops: end what waits, and soon what does not."""
        self.tell("stop")
        for session in list(self.visitors):
            session.hurry()

    def letter(self, request: Request, id: str) -> Letter:
        """Return the message with an id, or the latest; KeyError."""
        letters = self.newest_first(request.viewer.own)
        if id == "latest":
            found = next(filter(Query(request.query.get("query", "")).matches, letters), None)
        elif request.viewer.own:
            found = next((letter for letter in letters if letter.id == id), None)
        else:
            found = self.index.get(id)
        if found is None:
            raise KeyError(id)
        return found

    # Requests.

    def respond(self, request: Request) -> Answered:
        """Answer a request; never fails."""
        try:
            return self._respond(request)
        except Rejected as rejected:
            return rejected.answer
        except (KeyError, FileNotFoundError):
            return text_answer(404, "Message not found")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            return text_answer(400, "Error: " + printable(str(error)))
        except OSError as error:
            self.mailboxes.storage.report("%s %s failed: %s", request.method, printable(request.path), error)
            return text_answer(500, "Error: " + reason_of(error))
        except Exception:
            log.exception("%s %s failed", request.method, printable(request.path))
            return text_answer(500, "something went wrong here")

    def _respond(self, request: Request) -> Answered:
        method = "GET" if request.method == "HEAD" else request.method
        for route in ROUTES:
            match = re.fullmatch(route.pattern, request.path) if route.method == method else None
            if match:
                break
        else:
            return NOT_FOUND
        if route.everything and request.viewer.own:
            raise Rejected(403, "only for accounts that --web-admin names")
        request.body = request.read(route.body)
        with request.body, contextlib.nullcontext() if route.waits else self.at_desk():
            answer: Answered = getattr(self, route.name)(request, **match.groupdict())
        return answer

    @contextlib.contextmanager
    def at_desk(self) -> Iterator[None]:
        """Work on messages, as one of few; Rejected when the others take too long."""
        if not self.desk.acquire(timeout=WEB_TIMEOUT):
            raise Rejected(503, "busy, try again later", {"Retry-After": "5"})
        try:
            yield
        finally:
            self.desk.release()

    def page(self, request: Request) -> Answered:
        nonce = secrets.token_urlsafe(16)
        policy = ("default-src 'none'; style-src 'nonce-%s'; script-src 'nonce-%s'; connect-src 'self'; img-src 'self' data:; "
                  "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'" % (nonce, nonce))
        return Answered(200, "text/html; charset=utf-8", PAGE.replace("{{nonce}}", nonce).encode("utf-8"), {
            "Content-Security-Policy": policy, "X-Frame-Options": "DENY", "Cross-Origin-Opener-Policy": "same-origin"})

    def info(self, request: Request) -> Answered:
        letters, node, config = self.newest_first(request.viewer.own), self.node, self.site.config
        smtp, pop3 = ([show_endpoint(endpoint) for name, endpoint in node.endpoints() if name == kind]
                      for kind in ("smtp", "pop3"))
        return json_answer({
            "Version": "minimail " + __version__, "LatestVersion": "disabled",
            "Database": "" if request.viewer.own else node.data,
            "DatabaseSize": sum(letter.copies[0][1].size for letter in letters), "Messages": len(letters),
            "Unread": sum(not letter.read for letter in letters), "Tags": {}, "capture": config.capture,
            "user": request.viewer.user or "", "all": not request.viewer.own, "smtp": smtp, "pop3": pop3,
            "release": show_endpoint((config.release.host, config.release.port)) if config.release else None,
            "RuntimeStats": {"Uptime": int(time.time() - node.started_at), "Memory": 0, "MessagesDeleted": 0,
                             "SMTPAccepted": node.accepted, "SMTPAcceptedSize": node.accepted_bytes,
                             "SMTPRejected": 0, "SMTPIgnored": 0}})

    def list_messages(self, request: Request) -> Answered:
        letters = self.newest_first(request.viewer.own)
        return self._list(letters, letters, request)

    def search(self, request: Request) -> Answered:
        letters, wanted = self.newest_first(request.viewer.own), Query(request.query.get("query", ""))
        if not wanted.terms:
            raise ValueError("no search query")
        return self._list(wanted.among(letters), letters, request)

    def _list(self, found: List[Letter], every: List[Letter], request: Request) -> Answered:
        start, limit = request.number("start", 0), request.number("limit", 50) or 50
        shown = []
        for letter in found[start:start + limit]:
            with contextlib.suppress(FileNotFoundError):        # removed while we looked
                shown.append(letter.summary())
        return json_answer({
            "total": len(every), "unread": sum(not letter.read for letter in every), "count": len(shown),
            "messages_count": len(found), "messages_unread": sum(not letter.read for letter in found),
            "start": start, "tags": sorted({tag for summary in shown for tag in summary["Tags"]}), "messages": shown})

    def show(self, request: Request, id: str) -> Answered:
        return self._show(self.letter(request, id), request.method != "HEAD")

    def _show(self, letter: Letter, seen: bool = True) -> Answered:
        whole = dict(letter.whole(), Read=True)
        if seen:
            self._set_read([letter], True)
        return json_answer(whole)

    def headers(self, request: Request, id: str) -> Answered:
        values = self.letter(request, id).view().headers()
        for name in ("Content-Type", "Date", "Delivered-To", "From", "Message-Id"):
            values.setdefault(name, [])             # client libraries look these up without asking whether they are there
        return json_answer(values)

    def raw(self, request: Request, id: str) -> Answered:
        letter = self.letter(request, id)
        more = {"Content-Disposition": 'attachment; filename="%s.eml"' % letter.id} if request.query.get("dl") else {}
        return Answered(200, "text/plain; charset=utf-8", headers=more, file=letter.open())

    def part(self, request: Request, id: str, part: str) -> Answered:
        from urllib.parse import quote
        found = self.letter(request, id).view().part(part)
        kind = found.image_type() or found.kind
        name = download_name(found.name) or "part-" + part
        shown = kind in SAFE_TYPES or (bool(found.image_type()) and "svg" not in kind)     # that one can have scripts
        ascii_name = re.sub(r"[^A-Za-z0-9._ -]", "_", name)
        place = "%s; filename=\"%s\"; filename*=UTF-8''%s" % (
            "inline" if shown else "attachment", ascii_name, quote(name, safe=""))
        return Answered(200, kind if shown else "application/octet-stream", found.data(), {
            "Content-Disposition": place, "Content-Security-Policy": "default-src 'none'; sandbox"})

    def session(self, request: Request, id: str) -> Answered:
        return json_answer(self.letter(request, id).session())

    def view_html(self, request: Request, id: str) -> Answered:
        """Serve a message's HTML so that it can do nothing: no script, no form, no load from elsewhere unless asked for."""
        view = self.letter(request, id).view()
        if not view.html:
            return text_answer(404, "This message does not contain a HTML part")
        images = "img-src data: http: https:" if request.query.get("images") else "img-src data:"
        return Answered(200, "text/html; charset=utf-8", in_a_frame(view.framed()).encode("utf-8", "replace"), {
            "Content-Security-Policy": "sandbox allow-popups allow-popups-to-escape-sandbox; default-src 'none'; style-src "
            "'unsafe-inline'; font-src data:; %s; form-action 'none'; base-uri 'none'; frame-ancestors 'self'" % images})

    def view_text(self, request: Request, id: str) -> Answered:
        return text_answer(200, self.letter(request, id).view().text)

    def links(self, request: Request, id: str) -> Answered:
        return json_answer(self.letter(request, id).view().links())

    # What changes something.

    def _chosen(self, request: Request, *parameters: str) -> Tuple[List[Letter], Dict[str, Any]]:
        """Return (messages a request means, its parameters): the IDs it names, the search, else all; ValueError."""
        given: Any = {}
        body = request.content().strip()
        if body:
            given = read_form(body) if request.type.startswith("application/x-www-form-urlencoded") else read_json(body)
        if not isinstance(given, dict):
            raise ValueError('expected {"IDs": [...]}')
        spelling = {name.lower(): name for name in ("IDs", "Search", *parameters)}      # Mailpit takes keys in any case
        given = {spelling.get(key.lower(), key): value for key, value in given.items()}
        ids, search = given.get("IDs") or [], given.get("Search") or ""
        if set(given) - set(spelling.values()) or not isinstance(ids, list) or not isinstance(search, str):
            raise ValueError('expected {"IDs": [...]}')
        if ids and search:
            raise ValueError("either IDs or Search, not both")
        letters = self.newest_first(request.viewer.own)
        if search:
            return Query(search).certain().among(letters), given
        if ids:
            wanted = set(map(str, ids))
            return [letter for letter in letters if letter.id in wanted], given
        return list(letters), given

    def delete(self, request: Request) -> Answered:
        self._delete(self._chosen(request)[0])
        return OK_ANSWER

    def delete_found(self, request: Request) -> Answered:
        wanted = Query(request.query.get("query", "")).certain()
        self._delete(wanted.among(self.newest_first(request.viewer.own)))
        return OK_ANSWER

    def _delete(self, letters: List[Letter]) -> None:
        copies: Dict[str, List[Item]] = {}
        for letter in letters:
            for mailbox, item in letter.copies:
                copies.setdefault(mailbox, []).append(item)
        for mailbox, items in copies.items():
            for _, error in self.mailboxes.delete(mailbox, items):
                if error:
                    raise error
        for letter in letters:
            self.forget(letter.key)
        if letters:
            self.tell("delete")

    def set_read(self, request: Request) -> Answered:
        letters, given = self._chosen(request, "Read")
        self._set_read(letters, given.get("Read") in (True, "true", "True", "1"))
        return OK_ANSWER

    def _set_read(self, letters: List[Letter], seen: bool) -> None:
        changed = [letter for letter in letters if letter.read is not seen]
        for letter in changed:
            for mailbox, item in letter.copies:
                with contextlib.suppress(OSError):
                    self.mailboxes.set_seen(mailbox, item, seen)
        if changed:
            self.tell("read")

    def get_tags(self, request: Request) -> Answered:
        return json_answer(sorted({tag for letter in self.newest_first(request.viewer.own) for tag in letter.tags}))

    def set_tags(self, request: Request) -> Answered:
        """Give messages these tags instead of those they have."""
        letters, given = self._chosen(request, "Tags")
        tags = given.get("Tags")
        if not given.get("IDs") or not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise ValueError('expected {"IDs": [...], "Tags": [...]}')
        wanted = clean_tags(tags)
        if not self.site.recorder:
            raise ValueError("tags are kept with the transcripts; here --transcripts is off")
        if len(wanted) < len({tag.strip() for tag in tags}) or len(wanted) > MAX_TAGS:
            raise ValueError("a tag has 1 to 100 letters, digits, blanks, and - _ . @; a message %d of them" % MAX_TAGS)
        for letter in letters:
            letter.set_tags(wanted)
            self.forget(letter.key)
        self.tell("tags")
        return OK_ANSWER

    def send(self, request: Request) -> Answered:
        """Mailpit's POST /api/v1/send: a message in JSON, delivered like any other."""
        viewer = request.viewer
        try:
            if not self.site.config.capture and viewer.user is None:
                raise ValueError("sending needs a log-in in node mode")
            envelope, content = compose(request.json())
            recipients, envelope.recipients = envelope.recipients, []
            if not self.site.config.capture and not envelope.sender:
                raise ValueError("you may not send as this address")
            return self._sent(self.site.door.send(envelope, recipients, content, viewer.user))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, Refused) as error:
            return json_answer({"Error": printable(str(error) or type(error).__name__)}, 400)

    def _sent(self, parcel: Parcel) -> Answered:
        if self.site.recorder and parcel.mailboxes:
            self.site.recorder.save(parcel.envelope, [], [], False)
        self.site.accepted(parcel)
        if self.site.follow_up:
            self.site.follow_up(parcel)
        return json_answer({"ID": parcel.envelope.id})

    def release(self, request: Request, id: str) -> Answered:
        """Send one captured message on, with the bytes it came with, to the server that --release names."""
        if not self.site.config.release:
            raise Rejected(403, "nothing leaves this machine; --release URL names a server for what shall")
        letter = self.letter(request, id)
        try:
            given = request.json()
            recipients = [parse_address(str(address)) for address in given["To"]] if isinstance(given["To"], list) else []
            if not 0 < len(recipients) <= MAX_RELEASED or not all(address.domain for address in recipients):
                raise ValueError('expected {"To": [...]}, 1 to %d full addresses' % MAX_RELEASED)
            envelope = Envelope(sender=letter.message().sender, recipients=recipients, protocol="HTTP")
            envelope.smtputf8 = not all(str(address).isascii() for address in [envelope.sender, *recipients])
            with letter.open() as file:
                self._sent(self.site.door.post_all(envelope, [Destinations([], recipients)], original(file, letter.id)))
        except (ValueError, TypeError, KeyError, Refused) as error:
            return json_answer({"Error": printable(str(error) or type(error).__name__)}, 400)
        event("released", id=letter.id, to=printable(" ".join(map(str, recipients[:10]))), new_id=envelope.id)
        return OK_ANSWER

    # Waiting.

    def wait(self, request: Request) -> Answered:
        """Long poll: answer as soon as a message matches, also if it came before."""
        search = Search(self, request.viewer.own, Query(request.query.get("query", "")))

        def look() -> Optional[Letter]:
            with self.at_desk():
                return search()
        text = request.query.get("timeout", "30")
        timeout = 0.0 if text == "0" else min(parse_seconds(text), 3600.0)
        letter = await_mail(self.mailboxes.storage, look, time.monotonic() + timeout, self.sleeper(request.is_over))
        if letter is None:
            return text_answer(404, "no such message within %g seconds" % timeout)
        with self.at_desk():
            return self._show(letter)

    def stream(self, request: Request) -> Answered:
        """Server-sent events until the page goes away."""
        return Answered(200, "text/event-stream", stream=self._events(request))

    def _events(self, request: Request) -> Iterator[bytes]:
        storage, seen, said = self.mailboxes.storage, self.serial, time.monotonic()
        stamp = storage.stamp("mail")
        own = self.mailboxes.listing(request.viewer.own) if request.viewer.own else None
        yield b": hello\n\n"
        while not request.is_over():
            self.pause(seen, WAIT_STEP)
            happened = [(serial, kind) for serial, kind in list(self.events) if serial > seen]
            kinds = [kind for _, kind in happened]
            if storage.stamp("mail") != stamp:      # also when another process took it
                stamp = storage.stamp("mail")
                kinds.append("new")
            if happened:
                seen = happened[-1][0]
            if kinds and request.viewer.own:        # what others get is not for everybody's ears
                before, own = own, self.mailboxes.listing(request.viewer.own)
                kinds = [kind for kind in kinds if own != before or kind == "stop"]
            if kinds or time.monotonic() > said + 15:
                said = time.monotonic()
                text = "".join("event: %s\ndata: {}\n\n" % kind for kind in dict.fromkeys(kinds)) or ": still here\n\n"
                yield text.encode()

    # About the node.

    def get_faults(self, request: Request) -> Answered:
        return json_answer([{"rule": rule.text, "left": rule.left} for rule in self._faults().rules])

    def put_faults(self, request: Request) -> Answered:
        given = request.json()
        rules = given.get("rules") if isinstance(given, dict) else given
        if not isinstance(rules, list):
            raise ValueError("expected a list of rules")
        self._faults().replace(str(rule.get("rule", "") if isinstance(rule, dict) else rule) for rule in rules)
        return self.get_faults(request)

    def delete_faults(self, request: Request) -> Answered:
        self._faults().replace(())
        return OK_ANSWER

    def _faults(self) -> Any:
        """Return the rules in force; Rejected when this copy of the file lacks them."""
        if self.site.faults is None:
            raise Rejected(404, "this copy of minimail has no faults section")
        return self.site.faults

    def metrics(self, request: Request) -> Answered:
        node, site = self.node, self.site
        values = [("messages_accepted_total", "counter", node.accepted),
                  ("bytes_accepted_total", "counter", node.accepted_bytes),
                  ("connections_total", "counter", site.connections.served),
                  ("sessions", "gauge", len(site.sessions) + len(self.visitors))]
        relay = getattr(node, "relay", None)
        if relay:
            values += [("recipients_sent_total", "counter", relay.sent),
                       ("recipients_bounced_total", "counter", relay.bounced),
                       ("recipients_deferred_total", "counter", relay.deferred)]
        with contextlib.suppress(OSError):          # on a disk that is out of reach: the rest is told all the same
            values.append(("messages", "gauge", len(self.newest_first())))
            if relay:
                values.append(("queue_entries", "gauge", len(relay.queue.ids())))
        text = "".join("# TYPE minimail_%s %s\nminimail_%s %d\n" % (name, kind, name, value) for name, kind, value in values)
        return Answered(200, "text/plain; version=0.0.4", text.encode())

    def alive(self, request: Request) -> Answered:
        return text_answer(200, "")

    def ready(self, request: Request) -> Answered:
        writable = os.access(self.node.data, os.W_OK) and not self.mailboxes.storage.is_away()
        return text_answer(200 if writable and not self.site.stopping else 503, "")

    def chaos(self, request: Request) -> Answered:
        return text_answer(400, "Chaos is not enabled")

    def webui(self, request: Request) -> Answered:
        release = self.site.config.release
        relay = {"Enabled": True, "SMTPServer": show_endpoint((release.host, release.port)), "ReturnPath": "",
                 "AllowedRecipients": "", "BlockedRecipients": ""} if release else {"Enabled": False}
        return json_answer({"Label": "", "MessageRelay": relay, "SpamAssassin": False, "ChaosEnabled": False,
                            "DuplicatesIgnored": False})


ID = r"/api/v1/message/(?P<id>[^/]+)"
ROUTES = [
    Route("GET", "/", "page"), Route("GET", "/livez", "alive", waits=True), Route("GET", "/readyz", "ready", waits=True),
    Route("GET", "/metrics", "metrics", everything=True),
    Route("GET", "/api/v1/info", "info"), Route("GET", "/api/v1/messages", "list_messages"),
    Route("GET", "/api/v1/search", "search"),
    Route("GET", ID, "show"), Route("GET", ID + "/headers", "headers"), Route("GET", ID + "/raw", "raw"),
    Route("GET", ID + "/session", "session"), Route("GET", ID + "/links", "links"),
    Route("GET", ID + r"/part/(?P<part>[0-9.]+)", "part"),
    Route("GET", r"/view/(?P<id>[^/]+)\.html", "view_html"), Route("GET", r"/view/(?P<id>[^/]+)\.txt", "view_text"),
    Route("DELETE", "/api/v1/messages", "delete", MAX_SMALL_BODY), Route("DELETE", "/api/v1/search", "delete_found"),
    Route("PUT", "/api/v1/messages", "set_read", MAX_SMALL_BODY),
    Route("GET", "/api/v1/tags", "get_tags"), Route("PUT", "/api/v1/tags", "set_tags", MAX_SMALL_BODY),
    Route("POST", "/api/v1/send", "send", MAX_HTTP_BODY), Route("POST", ID + "/release", "release", MAX_SMALL_BODY),
    Route("GET", "/api/v1/wait", "wait", waits=True), Route("GET", "/api/events", "stream", waits=True),
    Route("GET", "/api/v1/faults", "get_faults", everything=True),
    Route("PUT", "/api/v1/faults", "put_faults", MAX_SMALL_BODY, everything=True),
    Route("DELETE", "/api/v1/faults", "delete_faults", everything=True),
    Route("GET", "/api/v1/chaos", "chaos"), Route("GET", "/api/v1/webui", "webui"),
]


def read_form(body: bytes) -> Dict[str, Any]:
    """Return what a form says in place of JSON; ValueError."""
    from urllib.parse import parse_qs
    form = parse_qs(body.decode("utf-8"), keep_blank_values=True, max_num_fields=MAX_JSON_VALUES)
    given: Dict[str, Any] = {"IDs": form.get("IDs") or form.get("ids") or []}
    if not given["IDs"]:
        raise ValueError("no IDs")
    return dict(given, Read=form["Read"][0]) if "Read" in form else given


def original(file: BinaryIO, id: str) -> Iterator[bytes]:
    """Yield a stored message without the trace headers that we put before it."""
    block = file.read(BIG_BLOCK)
    for name in (b"return-path:", b"delivered-to:", b"received:"):
        end = block.find(b"\n") + 1
        while end and block[end:end + 1] in (b" ", b"\t"):
            end = block.find(b"\n", end) + 1
        field = block[:end]
        if field.lower().startswith(name) and (name != b"received:" or b" id %s" % id.encode() in field):
            block = block[end:]
    yield block
    yield from iter(lambda: file.read(BIG_BLOCK), b"")


# A message in JSON becomes one in MIME. Written here, block by block: `email` needs many times a message's size, and
# how it folds long names and takes addresses in UTF-8 depends on the Python.

def compose(given: Dict[str, Any]) -> Tuple[Envelope, Iterator[bytes]]:
    """Return (envelope, content in blocks) of a message given in Mailpit's JSON; ValueError, Refused."""
    if not isinstance(given, dict):
        raise ValueError("expected an object")
    people = {field: [person(who) for who in given.get(field) or []] for field in ("To", "Cc", "Bcc", "ReplyTo")}
    sender = person(given["From"])
    recipients = [address for field in ("To", "Cc", "Bcc") for _, address in people[field]]
    if not recipients:
        raise ValueError("no recipients")
    fields = [("From", address_field([sender]))]
    fields += [(name, address_field(people[field])) for field, name in (("To", "To"), ("Cc", "Cc"), ("ReplyTo", "Reply-To"))
               if people[field]]
    fields += [("Subject", text_field(str(given.get("Subject") or ""))), ("Date", rfc5322_date(int(time.time()))),
               ("Message-ID", "<%s@%s>" % (secrets.token_hex(12), sender[1].domain or "localhost"))]
    fields += extra_fields(given, {name.lower() for name, _ in fields})
    head = "".join("%s: %s\r\n" % field for field in fields) + "MIME-Version: 1.0\r\n"
    envelope = Envelope(sender=str(sender[1]), recipients=recipients, protocol="HTTP", smtputf8=not head.isascii())
    return envelope, itertools.chain([head.encode("utf-8")], message_body(given))


def person(who: Any) -> Tuple[str, Address]:
    """Return (name, address) of {"Name": ..., "Email": ...} or a bare address; ValueError."""
    who = {"Email": who} if isinstance(who, str) else who
    try:
        return str(who.get("Name") or ""), parse_address(str(who["Email"]))
    except Refused:
        raise ValueError("invalid address: " + printable(str(who.get("Email")))) from None


def address_field(people: Sequence[Tuple[str, Address]]) -> str:
    """Return people as a header's value, one a line (RFC 5322 section 3.4); ValueError."""
    entries = []
    for name, address in people:
        if not name.isascii() or len(name) > 60:
            name = encoded_words(one_line(name))
        elif name:
            name = '"%s"' % re.sub(r'(["\\])', r"\\\1", one_line(name))
        entries.append("%s <%s>" % (name, address) if name else str(address))
    return ",\r\n ".join(entries)


def text_field(text: str) -> str:
    """Return text as a header's value; encoded where it must be, or could not be folded otherwise; ValueError."""
    text = one_line(text)
    return text if text.isascii() and text.isprintable() and len(text) < 900 else encoded_words(text)


def one_line(text: str) -> str:
    if "\r" in text or "\n" in text or "\0" in text:
        raise ValueError("a line end in a header")
    return text


def encoded_words(text: str) -> str:
    """Return text as encoded words, none of which is too long or ends within a character (RFC 2047 section 5)."""
    data, words, start = text.encode("utf-8", "replace"), [], 0
    while start < len(data):
        end = min(start + 45, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
        words.append("=?utf-8?b?%s?=" % base64.b64encode(data[start:end]).decode())
        start = end
    return "\r\n ".join(words)


def extra_fields(given: Dict[str, Any], taken: Set[str]) -> List[Tuple[str, str]]:
    """Return the header fields that come as Headers and Tags; ValueError."""
    found = []
    for name, value in (given.get("Headers") or {}).items():
        if not re.fullmatch(r"[!-9;-~]{1,100}", name):
            raise ValueError("bad header name: " + printable(name))
        if name.lower() in taken or name.lower() in ("to", "from", "cc", "bcc", "reply-to", "content-type", "mime-version",
                                                     "content-transfer-encoding"):
            raise ValueError('cannot overwrite header: "%s"' % name)
        found.append((name, text_field(str(value))))
    tags = clean_tags(map(str, given.get("Tags") or []))
    return found + ([("X-Tags", text_field(", ".join(tags)))] if tags else [])


def message_body(given: Dict[str, Any]) -> Iterator[bytes]:
    """Return the blocks of a message from its Content-Type on: text, HTML with what it shows, attachments; ValueError."""
    files = [attachment(entry) for entry in given.get("Attachments") or []]
    shown = [blocks for inline, blocks in files if inline and given.get("HTML")]
    attached = [blocks for inline, blocks in files if not (inline and given.get("HTML"))]
    body = text_part("plain", str(given.get("Text") or ""))
    if given.get("HTML"):
        html = text_part("html", str(given["HTML"]))
        html = multipart("related", [html, *shown]) if shown else html
        body = multipart("alternative", [body, html]) if given.get("Text") else html
    return multipart("mixed", [body, *attached]) if attached else body


def multipart(kind: str, parts: Sequence[Iterator[bytes]]) -> Iterator[bytes]:
    boundary = secrets.token_hex(16).encode()
    yield b'Content-Type: multipart/%s; boundary="%s"\r\n\r\n' % (kind.encode(), boundary)
    for part in parts:
        yield b"--%s\r\n" % boundary
        yield from part
        yield b"\r\n"
    yield b"--%s--\r\n" % boundary


def text_part(kind: str, text: str) -> Iterator[bytes]:
    data = text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "replace")
    plain = data.isascii() and b"\0" not in data and not LONG_LINE.search(data.replace(b"\n", b"\r\n") + b"\r")
    yield b"Content-Type: text/%s; charset=utf-8\r\nContent-Transfer-Encoding: %s\r\n\r\n" % (
        kind.encode(), b"7bit" if plain else b"quoted-printable")
    if not plain:
        data = binascii.b2a_qp(data, istext=True)
    yield data.replace(b"\n", b"\r\n")


def attachment(entry: Dict[str, Any]) -> Tuple[bool, Iterator[bytes]]:
    """Return (whether HTML shows it by its Content-ID, blocks) of an attachment; ValueError."""
    content = str(entry["Content"])
    if content.startswith("data:"):
        content = content[content.find(",", 0, 1000) + 1:]
    content = content.translate(dict.fromkeys(map(ord, " \t\r\n")))
    if len(content) % 4 or not re.fullmatch(r"[A-Za-z0-9+/]*={0,2}", content):
        raise ValueError("an attachment's Content is not base64")
    kind = str(entry.get("ContentType") or "application/octet-stream")
    if not re.fullmatch(r"[\w.+-]{1,100}/[\w.+-]{1,100}", kind, re.ASCII):
        raise ValueError("bad ContentType: " + printable(kind, 100))
    name, id = one_line(str(entry.get("Filename") or "file")), str(entry.get("ContentID") or "")
    if not re.fullmatch(r"[!-;=?-~]{0,200}", id):
        raise ValueError("bad ContentID: " + printable(id, 100))
    head = "Content-Type: %s\r\nContent-Transfer-Encoding: base64\r\nContent-Disposition: %s;%s\r\n" % (
        kind, "inline" if id else "attachment", file_name_parameter(name))
    if id:
        head += "Content-ID: <%s>\r\n" % id
    lines = (content[start:start + 76] for start in range(0, len(content), 76))
    blocks = iter(lambda: "".join(line + "\r\n" for line in itertools.islice(lines, 1000)).encode(), b"")
    return bool(id), itertools.chain([head.encode() + b"\r\n"], blocks)


def file_name_parameter(name: str) -> str:
    """Return a file name as a parameter: as it is, or by RFC 2231 in pieces."""
    if name.isascii() and name.isprintable() and len(name) < 60:
        return ' filename="%s"' % re.sub(r'(["\\])', r"\\\1", name)
    from urllib.parse import quote
    text = quote(name.encode("utf-8", "replace")[:1000], safe="")
    if len(text) < 900:                             # in one piece: more readers know that
        return "\r\n filename*=utf-8''" + text
    pieces = re.findall(r"(?:%..|[^%]){1,20}", text)
    return ";".join("\r\n filename*%d*=%s%s" % (number, "" if number else "utf-8''", piece)
                    for number, piece in enumerate(pieces))


# HTTP. The standard library parses requests; we see to their form, size and time.

HTTP_FIELD = expression(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n")
REQUEST_LINE = expression(rb"[A-Z]+ [\x21-\x7e\x80-\xff]+ HTTP/1\.[01]\r\n")
CHUNK = expression(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
ABSOLUTE = expression(r"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
PAGES = expression(r"/|/view/[^/]+\.(html|txt)")


class Conversation(io.RawIOBase):
    """The bytes of an HTTP connection, both ways, within a deadline for the whole request rather than for each read.

    The deadline moves with what is transferred, at WEB_RATE: who drips runs into it, and so does who was quick and then
    says, or takes, nothing.
    """

    STEP = 1.0                                      # seconds after which a waiting thread looks at the deadline again

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.ahead = b""                            # read to see whether the client is there
        self.seconds = self.deadline = self.latest = float("inf")

    def renew(self, seconds: float) -> None:
        self.seconds = seconds
        self.deadline = min(time.monotonic() + seconds, self.latest)

    def hurry(self, seconds: float) -> None:
        """Come to an end within so many seconds, whatever is renewed."""
        self.latest = time.monotonic() + seconds
        self.deadline = min(self.deadline, self.latest)

    def _attempt(self, operation: Callable[..., int], *arguments: Any) -> int:
        while True:
            left = min(self.deadline, self.latest) - time.monotonic()
            if left <= 0:
                raise socket.timeout("the request took too long")
            self.sock.settimeout(min(left, self.STEP))
            try:
                count = operation(*arguments)
            except socket.timeout:
                continue
            self.deadline = min(self.deadline + count / WEB_RATE, time.monotonic() + self.seconds)
            return count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.ahead:
            data, self.ahead = self.ahead[:len(buffer)], self.ahead[len(buffer):]
            buffer[:len(data)] = data
            return len(data)
        return self._attempt(self.sock.recv_into, buffer)

    def write(self, data: Any) -> int:
        view = memoryview(data)
        while view:
            view = view[self._attempt(self.sock.send, view[:BLOCK]):]
        return len(data)

    def is_gone(self) -> bool:
        """Return whether the client hung up; what it says meanwhile is kept for the next request."""
        if len(self.ahead) > MAX_HTTP_HEAD:
            return True                             # that is no client waiting for an answer
        try:
            self.sock.settimeout(0)
            data = self.sock.recv(BLOCK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:                    # of TLS: more is needed to say so
            return type(error).__name__ not in ("SSLWantReadError", "SSLWantWriteError")
        self.ahead += data
        return not data


if TYPE_CHECKING:
    from http.server import BaseHTTPRequestHandler as HTTPHandler
else:
    HTTPHandler = object                            # see web_handler()


NO_ROOM = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class WebSession(HTTPHandler):
    """An HTTP connection, in a thread of its own."""

    protocol_version = "HTTP/1.1"
    server: WebListener
    site: Site
    inbox: Inbox
    raw_requestline: bytes
    command = requestline = allowed_origin = ""
    unread = False                                  # a body, or what might be one
    length: Optional[int] = 0                       # of the body; None: it comes in chunks

    # The connection.

    def setup(self) -> None:
        self.site, self.tls = self.server.site, self.server.tls
        self.inbox = self.site.inbox
        self.client = clients_address(self.client_address[0])
        self.patience = min(self.site.config.seconds(WEB_TIMEOUT), WEB_TIMEOUT)
        self.site.door.ask("on_connect", self.client)
        self.request.settimeout(self.patience)
        if self.tls:
            assert self.site.certificates
            self.request = self.site.certificates.context().wrap_socket(self.request, server_side=True,
                                                                        do_handshake_on_connect=False)
        self.connection, self.conversation = self.request, Conversation(self.request)
        self.rfile: Any = io.BufferedReader(self.conversation, BLOCK)
        self.wfile: Any = self.conversation
        self.inbox.visitors.add(self)
        if self.site.stopping:                      # stop() may not have seen this one
            self.hurry()
        try:
            self.request.do_handshake() if self.tls else None
        except BaseException:
            self.finish()
            raise

    def handle_one_request(self) -> None:
        try:
            self.conversation.renew(min(self.patience, WEB_IDLE))
            if self.rfile.peek(1):
                self.conversation.renew(self.patience)
                super().handle_one_request()
            else:
                self.close_connection = True
        except OSError as error:                    # its end, by whatever means
            log.debug("web %s: %s", self.client, error)
            self.close_connection = True

    def finish(self) -> None:
        """Close; a client that is still sending what nobody wants gets the time to read why."""
        self.inbox.visitors.discard(self)
        with contextlib.suppress(OSError):
            if self.unread and not self.site.stopping:
                self.conversation.hurry(2.0)
                socket.socket.shutdown(self.request, socket.SHUT_WR)
                while self.rfile.read1(BLOCK):
                    pass
        with contextlib.suppress(OSError):
            self.request.close()

    def hurry(self) -> None:
        """The node stops: be at an end soon."""
        self.conversation.hurry(SHUTDOWN_GRACE / 3)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.request, socket.SHUT_RD)    # not TLS's own shutdown()

    def is_over(self) -> bool:
        return self.site.stopping or self.conversation.is_gone()

    def version_string(self) -> str:
        return "minimail"

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("web %s %s", self.client, printable(format % args))

    # The head of a request.

    def parse_request(self) -> bool:
        """Parse a request's head as the library does, if there is only one way to read it (RFC 9112 sections 5 and 6)."""
        self.command, self.request_version, self.allowed_origin, self.unread = "", "HTTP/1.1", "", False
        conversation = self.rfile
        try:
            if not REQUEST_LINE.fullmatch(self.raw_requestline):
                raise Rejected(400, "no request of HTTP/1.0 or 1.1")
            self.rfile = io.BytesIO(self.read_head())
            if not super().parse_request():
                return False
            self.length = self.body_length()
            return True
        except Rejected as rejected:
            self.unread = self.close_connection = True
            self.give(rejected.answer)
            return False
        finally:
            self.rfile = conversation

    def read_head(self) -> bytes:
        """Return the header fields as they came, none of them folded or odd, up to the empty line; Rejected."""
        lines: List[bytes] = []
        size = 0
        while True:
            line = self.rfile.readline(MAX_HTTP_HEAD)
            size += len(line)
            lines.append(line)
            if line == b"\r\n":
                return b"".join(lines)
            if size >= MAX_HTTP_HEAD or len(lines) > MAX_HTTP_FIELDS:
                raise Rejected(431, "too many header fields")
            if not HTTP_FIELD.fullmatch(line):
                raise Rejected(400, "a bad header field")

    def body_length(self) -> Optional[int]:
        """Return how long the body is, None when it comes in chunks; Rejected (RFC 9112 section 6.3)."""
        lengths, codings = (self.headers.get_all(name, []) for name in ("Content-Length", "Transfer-Encoding"))
        if len(self.headers.get_all("Host", [])) not in ((1,) if self.request_version == "HTTP/1.1" else (0, 1)):
            raise Rejected(400, "one Host, please")
        if len(lengths) + len(codings) > 1 or (codings and self.request_version == "HTTP/1.0"):
            raise Rejected(400, "one Content-Length or Transfer-Encoding, please")
        if codings and codings[0].strip().lower() != "chunked":
            raise Rejected(501, "only chunked, please")
        text = lengths[0].strip() if lengths else "0"
        if not re.fullmatch(r"[0-9]{1,15}", text):
            raise Rejected(400, "a bad Content-Length")
        return None if codings else int(text)

    def handle_expect_100(self) -> bool:
        return True                                 # said once we know that we want the body

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        self.unread = self.close_connection = True
        self.give(text_answer(int(code), message or "Error"))

    # The answer.

    def serve(self) -> None:
        self.unread = self.length != 0
        try:
            self.check_site()
            answer = OPTIONS_ANSWER if self.command == "OPTIONS" else self.inbox.respond(self.read_request())
        except Rejected as rejected:
            answer = rejected.answer
        self.close_connection = self.close_connection or self.unread or answer.stream is not None
        self.give(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = serve

    def read_request(self) -> Request:
        from urllib.parse import parse_qsl, unquote
        path, _, query = self.target.partition("#")[0].partition("?")
        try:
            pairs = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=100))
        except ValueError:
            raise Rejected(400, "too many parameters") from None
        path = unquote(path)
        viewer = EVERYTHING if path in ("/livez", "/readyz") else self.viewer()
        return Request(self.command, path, pairs, viewer, self.headers.get("Content-Type") or "", self.read_body, self.is_over)

    def read_body(self, limit: int) -> BinaryIO:
        """Return the body in a file, one in the data directory when it is large; empty when none is wanted. Rejected."""
        storage = self.site.mailboxes.storage
        file: Any = tempfile.SpooledTemporaryFile(LARGE, dir=storage.run)
        try:
            if limit and self.unread:
                with contextlib.suppress(OSError):  # somebody may have emptied the data directory
                    storage.make_directory(storage.run)
                for block in self.body_blocks(limit):
                    self.keep(file.write, block)
                self.unread = False
                self.keep(file.seek, 0)
        except BaseException:
            with contextlib.suppress(OSError):      # closing writes what is left
                file.close()
            raise
        return file  # type: ignore[no-any-return]

    @staticmethod
    def keep(write: Callable[[Any], Any], what: Any) -> None:
        """Write a piece of a body; Rejected when the disk does not take it."""
        try:
            write(what)
        except OSError as error:
            full = error.errno in NO_ROOM
            log.warning("cannot keep the body of a request: %s", reason_of(error))
            raise Rejected(507 if full else 503, "no room for it" if full else "the data directory takes nothing") from None

    def body_blocks(self, limit: int) -> Iterator[bytes]:
        """Yield the body as it comes; Rejected when it has more than `limit` bytes, before any are read if it says so."""
        too_long = Rejected(413, "more than %d bytes" % limit)
        if (self.length or 0) > limit:
            raise too_long
        if (self.headers.get("Expect") or "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        total = 0
        for block in self.chunks() if self.length is None else self.exactly(self.length):
            total += len(block)
            if total > limit:
                raise too_long
            yield block

    def exactly(self, count: int) -> Iterator[bytes]:
        while count:
            block = self.rfile.read(min(count, BLOCK))
            if not block:
                raise Rejected(400, "the body is shorter than it said")
            count -= len(block)
            yield block

    def chunks(self) -> Iterator[bytes]:
        """Yield the content of a body in chunks (RFC 9112 section 7.1); Rejected."""
        while True:
            match = CHUNK.fullmatch(self.rfile.readline(1000))
            if not match:
                raise Rejected(400, "a bad chunk")
            if not int(match.group(1), 16):
                break
            yield from self.exactly(int(match.group(1), 16))
            if self.rfile.read(2) != b"\r\n":
                raise Rejected(400, "a bad chunk")
        self.read_head()                            # trailer fields: nobody wants them

    def give(self, answer: Answered) -> None:
        with answer.file or contextlib.nullcontext():
            self.send_head(answer)
            if self.command != "HEAD":
                self.conversation.renew(self.patience)
                self.send_body(answer)

    def send_head(self, answer: Answered) -> None:
        self.send_response(answer.status)
        headers = {"Content-Type": answer.type, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
                   "Referrer-Policy": "no-referrer", "X-DNS-Prefetch-Control": "off"}
        if answer.stream is None:
            headers["Content-Length"] = str(os.fstat(answer.file.fileno()).st_size if answer.file else len(answer.body))
        if self.allowed_origin:
            headers.update({"Access-Control-Allow-Origin": self.allowed_origin, "Vary": "Origin"})
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in dict(headers, **answer.headers).items():
            self.send_header(name, value)
        self.end_headers()

    def send_body(self, answer: Answered) -> None:
        self.wfile.write(answer.body)
        if answer.file:
            for block in iter(lambda: answer.file.read(BLOCK), b""):    # type: ignore[union-attr]
                self.wfile.write(block)
        for block in answer.stream or ():
            self.wfile.write(block)
            self.conversation.renew(self.patience)

    # Who may ask.

    def check_site(self) -> None:
        """See that the request is meant for us, and comes from no page of another site; Rejected.

        A name of somebody else's that leads here would give that somebody's pages our mail (DNS rebinding); a page that
        may not read an answer can still see how long it takes.
        """
        absolute = ABSOLUTE.fullmatch(self.path)
        path = absolute.group(2) or "/" if absolute else self.path
        self.target = path.encode("latin-1").decode("utf-8", "replace")
        host = (absolute.group(1) if absolute else self.headers.get("Host") or "").lower()
        allowed = self.site.config.web_allow
        if not is_own_name(host, self.site.hostname) and not any(names_host(entry, host) for entry in allowed):
            raise Rejected(403, "this host name is not served here; --web-allow NAME lets it in")
        origin, fetch = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        if origin is not None and any(names_origin(entry, origin.lower()) for entry in allowed):
            self.allowed_origin = origin
        elif origin is not None and re.sub(r"^https?://", "", origin.lower()) != host:
            raise Rejected(403, "a request from another site; --web-allow ORIGIN lets it in")
        elif fetch not in ("none", "same-origin") and not self.is_navigation():
            raise Rejected(403, "a request from another site; --web-allow ORIGIN lets it in")

    def is_navigation(self) -> bool:
        """Return whether somebody follows a link to one of our pages, in a window of its own."""
        return (self.command == "GET" and self.headers.get("Sec-Fetch-Mode") == "navigate" and
                self.headers.get("Sec-Fetch-Dest") == "document" and bool(PAGES.fullmatch(self.target.partition("?")[0])))

    def viewer(self) -> Viewer:
        """Return who asks, logged in where that is needed; Rejected."""
        site, config = self.site, self.site.config
        inside = is_loopback(self.request.getsockname()[0])
        if config.capture and (inside or not site.accounts.names()):
            return EVERYTHING
        name, password = basic_credentials(self.headers.get("Authorization") or "")
        if inside and not is_account(site, name):   # nobody has to log in, so whatever a browser sends along is ignored
            return EVERYTHING
        if not (config.capture or self.tls or is_loopback(self.client)):
            raise Rejected(403, "log in over TLS (--webs) or from this machine")
        user = self.log_in(name, password)
        if user is None:
            raise Rejected(401, "log in with an account of the users file", {
                "WWW-Authenticate": 'Basic realm="minimail", charset="UTF-8"'})
        everything = config.capture or user in config.web_admin
        return Viewer(user, "" if everything else user)

    def log_in(self, name: str, password: str) -> Optional[str]:
        """Return the account's key, None when name and password do not fit: that is answered more and more slowly."""
        site = self.site
        if not name or site.throttle.shut_out(self.client):
            return None
        known = site.accounts.recall(name, password)
        with contextlib.suppress(TooManyGuesses):
            known = known or site.verify(self.client, name, password)
            if known is None:
                time.sleep(site.throttle.delay(self.client))        # this thread is the client's own
        return known


BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
OPTIONS_ANSWER = Answered(200, "text/plain", headers={
    "Allow": "GET, HEAD, POST, PUT, DELETE, OPTIONS", "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, DELETE",
    "Access-Control-Allow-Headers": "Content-Type, Authorization", "Access-Control-Max-Age": "600"})


def is_own_name(host: str, hostname: str) -> bool:
    """Return whether a Host field names this machine in a way that nobody else's page can use."""
    name = re.sub(r":[0-9]+$", "", host)
    literal = re.fullmatch(r"\[[0-9a-f:.]+\]|[0-9.]+", name)
    return bool(literal) or "." not in name or name.endswith(".localhost") or name == hostname


def names_host(entry: str, host: str) -> bool:
    """Return whether --web-allow has a host; one without a port there has any."""
    name = entry.rpartition("://")[2]
    return name in (host, re.sub(r":[0-9]+$", "", host))


def names_origin(entry: str, origin: str) -> bool:
    """Return whether --web-allow has an origin: itself, or as the name of its host."""
    return entry == origin if "://" in entry else "://" in origin and names_host(entry, origin.partition("://")[2])


def basic_credentials(field: str) -> Tuple[str, str]:
    """Return (name, password) of an Authorization field (RFC 7617), both empty when there are none."""
    kind, _, secret = field.partition(" ")
    try:
        name, _, password = base64.b64decode(secret if kind.lower() == "basic" else "", validate=True).decode().partition(":")
    except ValueError:
        return "", ""
    return name, password


def is_account(site: Site, name: str) -> bool:
    try:
        return site.book.key(parse_address(name)) in site.accounts.names()
    except Refused:
        return False


@functools.lru_cache(maxsize=1)
def web_handler() -> Any:
    """Return WebSession as a handler of http.server, which takes a while to import: at the first connection."""
    from http.server import BaseHTTPRequestHandler
    return type("WebHandler", (WebSession, BaseHTTPRequestHandler), {})


class WebListener(Listener):
    """A listening socket of the web: a thread for each connection, and a share of --max-connections for all of them."""

    def __init__(self, name: str, endpoint: Endpoint, tls: bool = False) -> None:
        super().__init__(name, endpoint, WebSession, tls)       # type: ignore[arg-type]

    def share(self) -> int:
        """Return how many connections the web may have, so that it cannot take them all from mail."""
        config: Config = self.site.config
        return max(1, min(max(4, config.max_connections // WEB_SHARE), config.max_connections - 1) // config.workers)

    def process_request(self, request: Any, client_address: Any) -> None:
        client, threads = clients_address(client_address[0]), self.site.inbox.threads
        refusal = self.site.connections.enter(client)
        if not refusal:
            try:
                if len(threads) < self.share():
                    threads.start(lambda: self.converse(request, client_address))
                    return
                refusal = "too many connections"
            except RuntimeError as error:           # the system has no more threads
                refusal = str(error)
            self.site.connections.leave(client)
        event("refused", protocol=self.name, client=client, reason=refusal)
        with contextlib.suppress(OSError):
            request.setblocking(False)
            if not self.tls:
                request.send(BUSY)
            request.recv(BLOCK)                     # what is left unread would make the answer get lost
        self.shutdown_request(request)

    def converse(self, request: Any, client_address: Any) -> None:
        try:
            web_handler()(request, client_address, self)
        except Refused as refused:
            event("refused", protocol=self.name, client=client_address[0], reason=refused.reply.text)
        except OSError as error:                    # the handshake failed, or the client was gone before it
            log.debug("web %s: %s", client_address[0], error)
        except Exception:
            log.exception("connection from %s failed", client_address)
        finally:
            request.close()
            self.site.connections.leave(clients_address(client_address[0]))


class WebHook:
    """POSTs the summary of each message that comes to a URL: a thread of its own, a few tries, never in the way of mail."""

    WAITS = (0.0, 1.0, 10.0)                        # seconds before each try
    TIMEOUT = 10.0                                  # seconds

    def __init__(self, inbox: Inbox, url: str) -> None:
        self.inbox, self.url = inbox, url
        self.threads = Threads("minimail-web")      # its own: those of the inbox are counted as connections
        self._ids: Deque[str] = collections.deque()

    def add(self, id: str) -> None:
        self._ids.append(id)
        if len(self._ids) > MAX_HOOKED:
            log.warning("webhook: message %s is not told of: too many wait", self._ids.popleft())

    def run(self) -> None:
        """Tell of each message, until the node stops."""
        while not self.inbox.site.stopping:
            serial = self.inbox.serial
            if not self._ids:
                self.inbox.pause(serial, 1.0)
                continue
            try:
                self._tell(self._ids.popleft())
            except Exception:                       # that message's affair
                log.exception("the webhook stumbled")

    def _tell(self, id: str) -> None:
        self.inbox.index.refresh()
        letter = self.inbox.index.get(id)
        if not letter:
            return                                  # deleted already
        data, reason = json.dumps(letter.summary()).encode(), ""
        for wait in self.WAITS:
            self._rest(wait)
            if self.inbox.site.stopping:
                return
            try:
                status = post_json(self.url, data, self.TIMEOUT)
            except Exception as error:              # of sockets, TLS, HTTP
                reason = printable(str(error) or type(error).__name__, 200)
                continue
            if 200 <= status < 300:
                return
            reason = "it answered %d" % status
        log.warning("webhook: message %s is not told of: %s", id, reason)

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.inbox.site.stopping:
            time.sleep(WAIT_STEP)


def post_json(url: str, data: bytes, timeout: float) -> int:
    """POST a JSON text and return the answer's status; OSError, http.client.HTTPException."""
    import http.client
    from urllib.parse import unquote, urlsplit
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    headers = {"Content-Type": "application/json", "User-Agent": "minimail"}
    if parts.username:
        login = "%s:%s" % (unquote(parts.username), unquote(parts.password or ""))
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    connection = kind(str(parts.hostname), parts.port, timeout=timeout)
    try:
        connection.request("POST", (parts.path or "/") + ("?" + parts.query if parts.query else ""), data, headers)
        return connection.getresponse().status
    finally:
        connection.close()


class WebExtension(Extension):
    """The web inbox, its API, the webhook."""

    name = "web"

    def listeners(self, config: Config) -> List[Any]:
        return [WebListener(name, endpoint, tls=name == "webs")
                for name, endpoints in (("web", config.web or ()), ("webs", config.webs)) for endpoint in endpoints]

    def equip(self, node: Any) -> None:
        if node.config.web or node.config.webs or node.config.webhook:
            node.site.inbox = Inbox(node)

    def start(self, node: Any) -> None:
        if node.config.webhook:
            node.site.inbox.hook = hook = WebHook(node.site.inbox, node.config.webhook)
            hook.threads.start(hook.run)

    def stop(self, node: Any) -> None:
        if node.site.inbox:
            node.site.inbox.stop()

    def join(self, node: Any, seconds: float) -> None:
        inbox, until = node.site.inbox, time.monotonic() + seconds
        if inbox:
            inbox.threads.join(seconds)
        if inbox and inbox.hook:
            inbox.hook.threads.join(until - time.monotonic())


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="x-dns-prefetch-control" content="off">
<title>minimail</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E
%3Crect y='2' width='16' height='12' rx='2' fill='%231f686c'/%3E
%3Cpath d='m2 5 6 4 6-4' fill='none' stroke='white' stroke-width='1.5'/%3E%3C/svg%3E">
<style nonce="{{nonce}}">
:root {
  color-scheme: light dark;
  --paper: light-dark(#ffffff, #17191c); --hover: light-dark(#f1f3f2, #24292c);
  --ink: light-dark(#1c2321, #e4e7e5); --faint: light-dark(#5c6663, #98a29f);
  --line: light-dark(#dfe3e1, #2f3538); --pick: light-dark(#e2efee, #1d3334);
  --accent: light-dark(#1f686c, #74c3c2); --warn: light-dark(#8a4b08, #f0b266);
}
* { box-sizing: border-box; min-width: 0; }
[hidden] { display: none !important; }
body {
  margin: 0; height: 100dvh; display: grid; grid: auto minmax(0, 1fr) / minmax(20rem, 2fr) 3fr;
  font: 0.95rem/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
}
a, h1 { color: var(--accent); }
h1 { margin-block: 0; font-size: 1.1rem; }
h2 { margin: 0.5rem 0; font-size: 1.25rem; line-height: 1.3; }
h2, h3, dd, li, pre, p { overflow-wrap: anywhere; }
b { font-weight: 650; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0.1rem 0.9rem; margin: 0.4rem 0; }
dd, ol { margin: 0; padding: 0; list-style: none; }
pre { margin: 0; white-space: pre-wrap; font: 0.85rem/1.5 ui-monospace, monospace; }
pre ~ pre { content-visibility: auto; contain-intrinsic-size: auto 60rem; }
button, input, .button {
  padding: 0.25rem 0.6rem; border: 1px solid transparent; border-radius: 6px;
  font: inherit; color: inherit; background: var(--hover); text-decoration: none;
}
input { border-color: var(--line); background: none; }
::placeholder { color: var(--faint); opacity: 1; }
button:hover:enabled, .button:hover { border-color: var(--accent); }
[aria-pressed=true] { color: var(--accent); border-color: var(--accent); }
button:disabled { opacity: 0.45; }
.primary { color: var(--paper); background: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; border-radius: 4px; }
.primary:focus-visible { outline-offset: 2px; }
h2:focus-visible { outline: none; }
dt, time, .faint, #status, #live, #range, #none, #clear { color: var(--faint); }
time, .faint, #status, #live, #range, #clear { font-size: 0.85rem; }
h1, #status { margin-right: 0.4rem; }
.bar { display: flex; flex-wrap: wrap; gap: 0.4rem; align-items: center; }
.warn, #problem { color: var(--warn); }
header { grid-column: 1 / -1; padding: 0.5rem 1rem; border-bottom: 1px solid var(--line); }
#search { flex: 1 1 12rem; max-width: 30rem; margin-left: auto; }
#clear { background: none; }
#problem { flex-basis: 100%; }
#welcome { grid-column: 1 / -1; max-width: 46rem; padding: 1rem; place-self: center; }
#try { padding: 0.6rem 0.8rem; border-radius: 6px; background: var(--hover); }
nav { display: grid; grid-template-rows: minmax(0, 1fr) auto; border-right: 1px solid var(--line); }
nav .bar { justify-content: space-between; padding: 0.4rem 1rem; border-top: 1px solid var(--line); }
#list, main { overflow: auto; }
#list a {
  display: grid; grid-template-columns: minmax(0, auto) 1fr auto; column-gap: 0.6rem; align-items: baseline;
  padding: 0.5rem 1rem; color: inherit; text-decoration: none;
  border: solid var(--line); border-width: 0 0 1px 3px; border-left-color: transparent;
}
#list a:hover { background: var(--hover); }
#list a[aria-current=true] { background: var(--pick); }
#list .unread { border-left-color: var(--accent); }
#list a > * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#list a:not(.unread) b { font-weight: inherit; }
#list .line { grid-column: 1 / -1; }
#list .people { grid-column: 1 / 3; }
#list time, #list .people + span { justify-self: end; }
.tag { padding: 0 0.4rem; border: 1px solid var(--line); border-radius: 6px; font-size: 0.85rem; }
main { padding: 0.8rem 1.2rem; }
#message, #panel { display: flex; flex-direction: column; }
#message { min-height: 100%; }
#subject { max-height: 8rem; overflow: auto; flex: none; }
#who { max-height: 9rem; overflow: auto; flex: none; }
#tabs { gap: 0; border-bottom: 1px solid var(--line); }
#tabs button { border-width: 0 0 2px; border-radius: 0; background: none; }
#tabs [aria-selected=true] { border-color: var(--accent); color: var(--accent); }
#panel { flex: 1; gap: 0.6rem; padding: 0.6rem 0; }
#panel ul { margin: 0; padding-left: 1.2rem; }
#panel .text { font: inherit; }
#tab-Lint span { color: var(--warn); }
iframe { flex: 1; width: 100%; min-height: 50vh; border: 1px solid var(--line); background: white; color-scheme: light; }
iframe.Phone { max-width: 377px; }
iframe.Tablet { max-width: 770px; }
dialog { width: 28rem; max-width: 90vw; border: 1px solid var(--line); border-radius: 8px; color: inherit;
  background: var(--paper); }
dialog input { width: 100%; margin: 0.6rem 0; }
kbd { font: inherit; border: 1px solid var(--line); border-radius: 4px; padding: 0 0.35em; }
#back { display: none; }
@media (max-width: 46rem) {
  body { grid-template-columns: 100%; }
  body.reading nav, body:not(.reading) main { display: none; }
  #back { display: inline-block; }
  main, header { padding-inline: 0.8rem; }
  main .bar { gap: 0.3rem; }
  main button, .button { padding-inline: 0.45rem; }
  [aria-pressed] { display: none; }
}
</style>
<header class="bar">
  <h1>minimail</h1>
  <span id="status" role="status"></span> <span id="live"></span>
  <input id="search" type="search" aria-label="Search messages" aria-keyshortcuts="/" autocomplete="off"
         placeholder="Search: words, from: to: subject:">
  <button id="clear">Delete all</button>
  <span id="problem" role="alert" hidden></span>
</header>
<section id="welcome" hidden>
  <h2>No mail yet</h2>
  <p>Let your program send to <b id="smtp">this machine</b>. What arrives shows up here at once.</p>
  <p class="capture">Any address will do, with any password or none, and nothing leaves this machine.
    A first message from a shell:</p>
  <pre class="capture" id="try"></pre>
  <p class="capture"><button id="copy" class="primary">Copy</button></p>
</section>
<nav aria-label="Messages">
  <ol id="list" role="list"></ol>
  <div class="bar">
    <button id="newer">‹ Newer</button> <span id="range"></span> <button id="older">Older ›</button>
  </div>
</nav>
<main aria-label="Message">
  <p id="none"><kbd>j</kbd> <kbd>k</kbd> or arrows choose a message · <kbd>Enter</kbd> opens it ·
    <kbd>Space</kbd> reads on · <kbd>Esc</kbd> back · <kbd>/</kbd> search · <kbd>u</kbd> unread · <kbd>d</kbd> delete ·
    <kbd>←</kbd> <kbd>→</kbd> tabs</p>
  <div id="message" hidden>
    <div class="bar">
      <button id="back">‹ Back</button>
      <a id="save" class="button primary">Save</a>
      <button id="release" hidden>Release…</button>
      <button id="toggle" aria-keyshortcuts="u">Mark unread</button>
      <button id="remove" aria-keyshortcuts="d Delete">Delete</button>
    </div>
    <h2 id="subject" dir="auto" tabindex="-1" aria-live="polite"></h2>
    <div id="who"></div>
    <div id="tabs" class="bar" role="tablist" aria-label="Views of the message"></div>
    <div id="panel" role="tabpanel"></div>
  </div>
</main>
<dialog id="releasing" aria-labelledby="release-title">
  <form id="release-form">
    <h2 id="release-title">Release this message</h2>
    <label for="release-to">It goes, as it is, through <bdi id="release-server"></bdi> to these addresses and to
      nobody else:</label>
    <input id="release-to" required autocomplete="off" placeholder="bob@example.com, carol@example.com">
    <p id="release-problem" class="warn" role="alert"></p>
    <div class="bar"><button class="primary">Release</button> <button type="button" id="cancel">Cancel</button></div>
  </form>
</dialog>
<script nonce="{{nonce}}">
"use strict";
// What comes from a message gets onto the page as text, or into a frame that may run nothing. Whoever wrote it may mean to
// keep us busy: it is searched in one pass, and shown in blocks (to lay out a paragraph takes the square of its length).
const PAGE = 50, SHOWN = 300000, MANY = 1000, BLOCK = 4000;
const at = {start: 0, query: "", rows: [], found: 0, asked: 0, timer: 0, live: "",  // the list
            open: "", tab: "", tabs: [], shown: {}, width: "Full", screen: 0};  // the message
const $ = id => document.getElementById(id);
const rowOf = id => $("row-" + id);
const pathOf = id => "api/v1/message/" + encodeURIComponent(id);
const go = id => location.hash = encodeURIComponent(id);
const isRead = id => at.rows.find(message => message.ID === id)?.Read ?? true;
const size = bytes => bytes < 1e6 ? Math.ceil(bytes / 1000) + " kB" : (bytes / 1e6).toFixed(1) + " MB";

function el(tag, props, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

const faint = (...nodes) => el("span", {className: "faint"}, ...nodes);
const own = text => el("bdi", {}, text);  // whatever is in it, it turns nothing around it
const short = (text, most = 200) => text.length > most ? text.slice(0, most) + "…" : text;
const named = who => own(short(who.Name || who.Address));
const full = who => who.Name && who.Address ? [named(who), " <", own(short(who.Address, 400)), ">"] : [named(who)];
const joined = groups => groups.flatMap((nodes, index) => index ? [", ", ...nodes] : nodes);
const twenties = groups => groups.length > 20  // of the first thousand
  ? [...Array(Math.ceil(Math.min(groups.length, MANY) / 20)).keys()].map(i =>
    el("div", {}, ...joined(groups.slice(20 * i, 20 * i + 20)), ","))
    .concat(groups.length > MANY ? "and " + (groups.length - MANY) + " more" : [])
  : joined(groups);
const table = pairs => el("dl", {}, ...pairs.filter(([, value]) => value?.length).flatMap(([name, value]) =>
  [el("dt", {}, name), el("dd", {}, ...typeof value === "string" ? blocks(value).map(own) : value)]));
const list = items => el("ul", {}, ...items.slice(0, MANY).map(item => el("li", {}, ...item)),
  ...items.length > MANY ? [el("li", {className: "warn"}, "and " + (items.length - MANY) + " more")] : []);

function blocks(text) {  // pieces that end with a line if they can
  const found = [];
  for (let piece; text; text = text.slice(piece.length)) {
    piece = text.slice(0, BLOCK);
    if (piece.length < text.length) piece = piece.slice(0, piece.lastIndexOf("\n") + 1) || piece;
    found.push(piece);
  }
  return found;
}

function when(text) {
  const date = new Date(text), today = date.toDateString() === new Date().toDateString();
  return el("time", {dateTime: text, title: date.toLocaleString()}, today
    ? date.toLocaleTimeString([], {timeStyle: "short"})
    : date.toLocaleDateString([], {day: "numeric", month: "short"}));
}

async function ask(path, method = "GET", body) {
  const headers = body ? {"Content-Type": "application/json"} : {};
  const answer = await fetch(path, {method, headers, body: body && JSON.stringify(body)});
  const inJSON = answer.headers.get("Content-Type")?.startsWith("application/json");
  if (!answer.ok) throw new Error((inJSON ? (await answer.json()).Error : await answer.text()) || answer.statusText);
  return answer;
}

const get = async path => (await ask(path)).json();

function say(text) {
  $("problem").textContent = text;
  $("problem").hidden = false;
  setTimeout(() => { $("problem").hidden = true; }, 10000);
}

addEventListener("unhandledrejection", event => {
  event.preventDefault();
  say("That did not work: " + event.reason.message);
});

// The list

async function refresh() {
  const asked = ++at.asked;
  const what = at.query ? "search?query=" + encodeURIComponent(at.query) + "&" : "messages?";
  const answer = await get("api/v1/" + what + "start=" + at.start + "&limit=" + PAGE);
  if (asked !== at.asked) return;  // a newer question is on its way
  at.rows = answer.messages;
  at.found = answer.messages_count;
  if (!at.rows.length && at.start) {  // the page is gone
    at.start = Math.max(0, Math.ceil(at.found / PAGE) - 1) * PAGE;
    return refresh();
  }
  const focused = document.activeElement.id, last = at.start + at.rows.length;
  $("list").replaceChildren(...at.rows.map(row));
  if (focused.startsWith("row-")) $(focused)?.focus({preventScroll: true});
  $("range").textContent = last ? at.start + 1 + " – " + last + " of " + at.found : "Nothing found";
  $("newer").disabled = !at.start;
  $("older").disabled = last >= at.found;
  $("status").textContent = answer.total + " in all, " + answer.unread + " unread";
  $("clear").textContent = at.query ? "Delete found" : "Delete all";
  $("clear").disabled = !at.found;
  $("welcome").hidden = answer.total || at.query;
  document.querySelector("nav").hidden = document.querySelector("main").hidden = !$("welcome").hidden;
  document.title = (answer.unread ? "(" + answer.unread + ") " : "") + "minimail";
  mark();
}

function row(message) {
  const {ID, From, To, Cc, Bcc, Subject, Snippet, Tags, Read, Attachments, Size} = message;
  const people = [...To, ...Cc, ...Bcc], more = people.length > 4 ? people.length - 3 : 0;
  const files = Attachments ? Attachments + " attached · " : "";
  const line = (tag, className, ...nodes) => el(tag, {className, dir: "auto"}, ...nodes);
  return el("li", {}, el("a", {id: "row-" + ID, href: "#" + encodeURIComponent(ID), className: Read ? "" : "unread"},
    el("b", {}, named(From), From.Name || From.Address ? "" : "(no sender)"),
    faint(own(From.Name ? From.Address : "")), when(message.Created),
    line("b", "line subject", short(Subject) || "(no subject)"),
    ...Snippet ? [line("span", "line faint", Snippet)] : [],
    el("span", {className: "people faint"}, "to ", ...joined(people.slice(0, more ? 3 : 4).map(who => [named(who)])),
      more ? " and " + more + " more" : ""),
    faint(...Tags.slice(0, 3).flatMap(tag => [el("bdi", {className: "tag"}, tag), " "]),
      (Tags.length > 3 ? "… " : "") + (Read ? "" : "unread · ") + files + size(Size))));
}

function mark() {  // which message is open
  for (const message of at.rows) rowOf(message.ID).ariaCurrent = message.ID === at.open;
  $("toggle").textContent = isRead(at.open) ? "Mark unread" : "Mark read";
}

async function turn(by) {  // the page; returns the message that is next
  if (by < 0 ? !at.start : at.start + PAGE >= at.found) return "";
  at.start = Math.max(0, at.start + by * PAGE);
  await refresh();
  const next = at.rows.at(by < 0 ? -1 : 0)?.ID || "";
  if (!at.open) rowOf(next)?.focus();
  return next;
}

function soon() {  // many arrivals, one question
  at.timer ||= setTimeout(() => { at.timer = 0; refresh(); }, 150);
}

// What is new. A browser has six connections to a server for all its windows; so one of them, while it has the lock,
// listens for all, and tells the others what to show as the state of things: a reason to look at the list.

const LIVE = "● live", LOST = "○ not connected", WHO = "?";
const windows = new BroadcastChannel("minimail");

function hear(news) {
  if (news === WHO) return at.listens && windows.postMessage(at.live);
  $("live").textContent = at.live = news;
  if (news === LIVE) soon();
}

function tell(news) {
  windows.postMessage(news);
  hear(news);
}

function listen() {
  const events = new EventSource("api/events");
  for (const kind of ["open", "new", "delete", "read", "tags"]) events.addEventListener(kind, () => tell(LIVE));
  events.onerror = () => {
    tell(LOST);
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  };
}

function follow() {
  if (!navigator.locks) {  // a page from another machine without TLS: it asks now and then
    const look = () => refresh().then(() => hear(LIVE), () => hear(LOST)).then(() => setTimeout(look, 3000));
    return look();
  }
  windows.onmessage = event => hear(event.data);
  windows.postMessage(WHO);
  navigator.locks.request("minimail", () => {
    at.listens = true;
    listen();
    return new Promise(() => {});  // until the window is closed
  });
}

// One message

async function open() {
  const id = at.open = decodeURIComponent(location.hash.slice(1));
  document.body.classList.toggle("reading", id);
  $("message").hidden = !id;
  $("none").hidden = id;
  mark();
  if (!id) return;
  $("subject").focus({preventScroll: true});  // from here, the keyboard scrolls the message
  const both = await Promise.all([get(pathOf(id)), get(pathOf(id) + "/session")]).catch(error => {
    if (at.open !== id) return;
    go("");
    throw error;
  });
  if (at.open !== id) return;
  const [message] = both;
  at.open = message.ID;  // of #latest, too
  at.tabs = tabs(...both).filter(tab => tab.there ?? true);
  $("subject").textContent = short(message.Subject, 3 * BLOCK) || "(no subject)";
  $("who").replaceChildren(heads(message));
  $("save").href = pathOf(message.ID) + "/raw?dl=1";
  $("tabs").replaceChildren(...at.tabs.map(({name, count}) => el("button", {role: "tab", id: "tab-" + name,
    onclick: () => view(at.tab = name)}, name, el("span", {className: "faint"}, count ? " " + count : ""))));
  document.querySelector("main").scrollTop = $("subject").scrollTop = $("who").scrollTop = 0;
  mark();
  await view(at.tabs.some(tab => tab.name === at.tab) ? at.tab : at.tabs[0].name);
}

function heads(message) {
  const people = all => twenties(all.map(full)), date = new Date(message.Date).toLocaleString();
  const tag = text => [el("button", {className: "tag", onclick: () => find('tag:"' + text + '"')}, own(text))];
  return table([["From", full(message.From)], ["To", people(message.To)], ["Cc", people(message.Cc)],
    ["Bcc", people(message.Bcc)], ["Reply to", people(message.ReplyTo)], ["Date", date + " · " + size(message.Size)],
    ["Tags", message.Tags.flatMap(tag)],
    ["Cut", message.Cut.map(text => el("div", {className: "warn"}, text))]]);
}

function tabs(message, session) {
  const path = pathOf(message.ID), links = message.Links, calendar = message.Calendar;
  const files = [...message.Attachments, ...message.Inline];
  const file = ({PartID, FileName, ContentType, Size}) => [
    el("a", {href: path + "/part/" + encodeURIComponent(PartID), download: ""}, own(short(FileName || ContentType))),
    faint(...FileName ? [" ", own(ContentType)] : [], " · " + size(Size))];
  const branch = part => part.Children.length ? [own(part.ContentType), list(part.Children.map(branch))] : file(part);
  const fault = ({rule, text, rfc}) => [el("b", {}, rule), " " + text + " ", faint(rfc)];
  return [
    {name: "Calendar", there: calendar.length, show: () => calendar.slice(0, MANY).flatMap(happening)},
    {name: "HTML", there: message.HTML, show: () => framed(message, "")},
    {name: "Text", there: message.Text || !message.HTML, show: () => written(message.Text)},
    {name: "Links", there: links.length, count: links.length, show: () => [list(links.map(href => [link(href)]))]},
    {name: "Files", there: files.length, count: files.length, show: () => [list(files.map(file))]},
    {name: "Parts", show: () => [list([branch(message.Tree)])]},
    {name: "Headers", show: () => headers(path)},
    {name: "Source", show: () => source(path)},
    {name: "Session", show: () => conversation(session)},
    {name: "Lint", count: session.lint.length, show: () =>
      session.lint.length ? [list(session.lint.map(fault))] : ["Nothing to complain about."]},
  ];
}

async function view(name) {
  for (const tab of $("tabs").children) {
    tab.ariaSelected = tab.id === "tab-" + name;
    tab.tabIndex = tab.id === "tab-" + name ? 0 : -1;
  }
  $("panel").ariaBusy = true;
  $("panel").setAttribute("aria-labelledby", "tab-" + name);
  const tab = at.shown = at.tabs.find(tab => tab.name === name), nodes = await tab.show();
  if (tab !== at.shown) return;  // someone has moved on
  $("panel").replaceChildren(...nodes);
  $("panel").ariaBusy = false;
}

async function headers(path) {
  const pairs = Object.entries(await get(path + "/headers"));
  return [table(pairs.flatMap(([name, values]) => values.map(value => [name, value])))];
}

function framed(message, images) {
  const frame = el("iframe", {title: "The message as HTML", className: at.width});
  frame.setAttribute("sandbox", "allow-popups allow-popups-to-escape-sandbox");  // links open windows; nothing else
  frame.src = "view/" + encodeURIComponent(message.ID) + ".html" + images;
  at.screen = 0;
  const again = () => $("panel").replaceChildren(...framed(message, "?images=1"));
  const widths = ["Phone", "Tablet", "Full"].map(name => el("button", {ariaPressed: at.width === name, onclick: event => {
    for (const other of widths) other.ariaPressed = other === event.target;
    frame.className = at.width = name;
  }}, name));
  const said = images ? ["Images on other servers were loaded."] : message.RemoteImages ?
    ["Images on other servers are not loaded.", el("button", {onclick: again}, "Load images")] : [];
  return [el("div", {className: "bar faint"}, ...widths, ...said), frame];
}

function leaf(by) {  // through a frame into which this page cannot look: marks in it stand a screen apart
  const frame = $("panel").querySelector("iframe"), main = document.querySelector("main");
  const more = by < 0 ? !at.screen : main.scrollTop + main.clientHeight < main.scrollHeight - 1;
  if (!frame || more) return false;  // the browser scrolls by itself
  at.screen = Math.max(0, at.screen + by);
  frame.contentWindow.location.replace(frame.src + "#minimail-" + at.screen);
  return true;
}

const link = href => el("a", {href, target: "_blank", rel: "noreferrer"}, own(short(href, BLOCK)));

function linked(text) {  // the text, with what looks like a link made one
  return text.split(/(?<![a-z0-9])(https?:[/][/][^\s<>"]+)/i).flatMap((piece, index) => {
    if (index % 2 === 0) return [piece];
    const after = piece.includes("(") ? ".,;:!?'" : ".,;:!?')]}";
    let end = piece.length;
    while (after.includes(piece[end - 1])) end--;
    return [link(piece.slice(0, end)), piece.slice(end)];
  });
}

function written(text) {
  const pieces = blocks(text.slice(0, SHOWN)).map(piece => el("pre", {className: "text", dir: "auto"}, ...linked(piece)));
  return [el("div", {}, ...pieces),
    ...text.length > SHOWN ? [el("p", {className: "warn"}, "This is the beginning; Save has it all.")] : []];
}

function happening({Method, Summary, Start, End, Location, Organizer, Attendees, Description}) {
  const method = {REQUEST: "Invitation", CANCEL: "Cancelled", REPLY: "Answer"}[Method];
  return [el("h3", {dir: "auto"}, (method ? method + ": " : ""), own(short(Summary || "(no title)"))), table([
    ["When", span(Start, End)], ["Where", linked(short(Location, BLOCK))],
    ["From", Organizer], ["Who", twenties(Attendees.map(who => [own(short(who))]))]]),
    ...written(Description)];
}

function span(start, end) {  // days, or times in the reader's own zone; what names no offset is shown as it is written
  const known = text => /^\d{4}-\d\d-\d\d(T[\d:]{4,8}(Z|[+-]\d\d:?\d\d))?$/.test(text) ? new Date(text) : NaN;
  const from = known(start), to = known(end || start), day = !start.includes("T");
  if (!(from <= to)) return [start, end].filter(Boolean).map(text => text.replace(/^([-\d]{10})T/, "$1 ")).join(" – ");
  if (day && to > from) to.setUTCDate(to.getUTCDate() - 1);  // the end is the day after
  const options = day ? {dateStyle: "full", timeZone: "UTC"} : {dateStyle: "full", timeStyle: "short"};
  return new Intl.DateTimeFormat([], options).formatRange(from, to);
}

async function source(path) {  // as much of it as anyone reads
  const reader = (await ask(path + "/raw")).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", piece = {};
  while (!piece.done && text.length < SHOWN) text += (piece = await reader.read()).value || "";
  reader.cancel();
  return [el("div", {}, ...blocks(text).map(piece => el("pre", {}, piece))),
    piece.done ? "" : "This is the beginning; Save has it all."];
}

function conversation(session) {
  const lines = session.transcript.map(([side, text]) =>
    el("div", {}, el(side === "C" ? "b" : "span", {}, side + ": ", ...blocks(text).map(own))));
  const envelope = [["MAIL FROM", "<" + session.sender + ">"],
    ["RCPT TO", twenties(session.recipients.map(address => [own(address)]))],
    ["Bcc", twenties(session.bcc.map(address => [own(address)]))], ["Client", session.client],
    ["Greeting", session.helo], ["Protocol", session.protocol], ["TLS", session.tls ? "true" : "no"]];
  return [table(envelope), el("pre", {}, ...lines.length ? lines : ["The conversation was not kept."])];
}

// What one can do

function chosen() {
  const id = document.activeElement.id;
  return id.startsWith("row-") ? id.slice(4) : at.open;
}

async function step(by) {
  const index = at.rows.findIndex(message => message.ID === chosen());
  const next = at.rows[index + by]?.ID || (index < 0 ? "" : await turn(by));
  if (!next) return;
  if (!at.open) return rowOf(next)?.focus();
  rowOf(next)?.scrollIntoView({block: "nearest"});
  go(next);
}

async function toggle(id) {
  if (id) await ask("api/v1/messages", "PUT", {IDs: [id], Read: !isRead(id)}).then(refresh);
}

async function remove(id) {
  if (!id) return;  // to the API, no ID means all
  const index = at.rows.findIndex(message => message.ID === id);
  const next = (at.rows[index + 1] || at.rows[index - 1])?.ID || "";
  rowOf(next)?.focus();
  if (at.open === id) go($("back").offsetWidth ? "" : next);
  await ask("api/v1/messages", "DELETE", {IDs: [id]}).then(refresh);
}

async function removeAll() {
  if (!confirm("Delete " + at.found + " messages?")) return;
  await (at.query ? ask("api/v1/search?query=" + encodeURIComponent(at.query), "DELETE")
                  : ask("api/v1/messages", "DELETE", {IDs: []}));
  go("");
  await refresh();
}

function release() {
  $("release-problem").textContent = $("release-to").value = "";
  $("releasing").showModal();
}

async function released(event) {
  event.preventDefault();
  const to = $("release-to").value.split(/[\s,;]+/).filter(Boolean);
  try {
    await ask(pathOf(at.open) + "/release", "POST", {To: to});
    $("releasing").close();
    say("Released to " + to.join(", "));
  } catch (error) {
    $("release-problem").textContent = error.message;
  }
}

function copy() {
  getSelection().selectAllChildren($("try"));
  $("copy").textContent = document.execCommand("copy") ? "Copied" : "Selected: copy it";  // also without TLS
}

function back() {
  const id = at.open;
  go("");
  setTimeout(() => rowOf(id)?.focus());  // once the list is visible again
}

function choose(selector) {
  const tab = $("tabs").querySelector(selector);
  tab?.click();
  tab?.focus();
}

function search() {
  at.query = $("search").value.trim();
  at.start = 0;
  soon();
}

function find(query) {
  $("search").value = query;
  search();
}

const keys = {
  j: () => step(1), ArrowDown: () => step(1), k: () => step(-1), ArrowUp: () => step(-1),
  u: () => toggle(chosen()), d: () => remove(chosen()), Delete: () => remove(chosen()), Escape: back,
  ArrowLeft: () => choose(":has(+ [aria-selected=true])"),
  ArrowRight: () => choose("[aria-selected=true] + *"),
  "/": () => $("search").focus(),
};

addEventListener("keydown", event => {
  const typing = event.target === $("search"), scrolling = $("panel").contains(event.target);
  if ($("releasing").open) return;
  if (event.key === "Escape" && (typing || !at.open)) {
    $("search").blur();
    find("");
  }
  if (event.ctrlKey || event.metaKey || event.altKey || typing) return;
  if (scrolling && event.key.startsWith("Arrow")) return;
  const screens = {PageDown: 1, PageUp: -1, " ": event.shiftKey ? -1 : 1}[event.key];
  if (screens && !event.target.closest("#list, button, a") && leaf(screens)) event.preventDefault();
  if (!Object.hasOwn(keys, event.key)) return;
  event.preventDefault();
  keys[event.key]();
});

const clicks = {newer: () => turn(-1), older: () => turn(1), back, toggle: () => toggle(at.open), copy, release,
                remove: () => remove(at.open), clear: removeAll, cancel: () => $("releasing").close()};
for (const [id, action] of Object.entries(clicks)) $(id).onclick = action;
$("release-form").onsubmit = released;
$("search").oninput = search;
addEventListener("hashchange", open);

follow();
refresh().then(open);
get("api/v1/info").then(({smtp: [address], capture, release}) => {
  $("release").hidden = !release;
  $("release").classList.toggle("primary", release);
  $("save").classList.toggle("primary", !release);
  $("release-server").textContent = release || "";
  if (!address) return;
  const colon = address.lastIndexOf(":"), port = address.slice(colon + 1), given = address.slice(0, colon);
  const host = (/^(0.0.0.0|[[]::])$/.test(given) ? location.hostname : given).replace(/^[[]|]$/g, "");
  const letter = "'me@example.com', 'you@example.com', 'Subject: Hello'";
  $("smtp").textContent = "host " + host + ", port " + port;
  $("try").textContent = `python3 -c "import smtplib; smtplib.SMTP('${host}', ${port}).sendmail(${letter})"`;
  for (const text of document.querySelectorAll(".capture")) text.hidden = !capture;
});
</script>
"""

EXTENSIONS.append(WebExtension())


# ======================================================================================================================
# 23  Selftest.  Tries on this machine what minimail promises.
# ======================================================================================================================

class Selftest:
    """Tries on this machine, in a directory beside the data, what minimail promises; each check_NAME says what holds."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.text = "Subject: selftest\r\n\r\n.a line with a dot\r\n"
        zone = {"far.test": ["MX 10 mx.far.test"], "mx.far.test": ["A 127.0.0.1"], "null.test": ["MX 0 ."]}
        ports: Dict[str, Any] = {"smtp": "127.0.0.1:0", "pop3": "127.0.0.1:0"}
        self.far = Node(data=os.path.join(directory, "far"), faults=["rcpt=bob@* 451 x1"], **ports)
        self.far.start()
        self.near = Node(data=os.path.join(directory, "near"), domain="near.test", catch_all="all@near.test", dns=zone,
                         retry="0.2", mx_port=self.far.smtp_address[1], **ports)
        self.near.start()

    def stop(self) -> None:
        self.near.stop()
        self.far.stop()

    def send(self, node: Node, recipient: str) -> None:
        import smtplib
        with smtplib.SMTP(node.smtp_address[0], node.smtp_address[1], timeout=5) as client:
            client.sendmail("me@near.test", recipient, self.text)

    def check_1_queue_dns_retry(self) -> str:
        self.send(self.near, "bob@far.test")        # refused once, for a while, by the fault rule
        message = self.far.wait_for("bob@far.test", timeout=10)
        assert message.read().endswith(self.text.encode())
        return "queued, found by MX record, refused once, sent again"

    def check_2_bounce(self) -> str:
        self.send(self.near, "nobody@null.test")
        report = self.near.wait_for("all@near.test", timeout=10).email()
        assert report.get_content_type() == "multipart/report" and "5.1.10" in report.as_string()
        return "a null MX comes back as a report with 5.1.10"

    def check_3_accept_store(self) -> str:
        self.send(self.far, "keep@here.test")
        message = self.far.wait_for("keep@here.test", timeout=5)
        assert os.stat(message.path).st_mode & 0o077 == 0 or os.name == "nt"
        return "250 given, the message in its Maildir, readable by its owner only"

    def check_4_fetch(self) -> str:
        import poplib
        client = poplib.POP3(self.far.pop3_address[0], self.far.pop3_address[1], timeout=5)
        client.user("keep@here.test")
        client.pass_("any")
        content = b"\r\n".join(client.retr(1)[1]) + b"\r\n"
        assert content == self.far.messages("keep@here.test")[0].read()
        other = poplib.POP3(self.far.pop3_address[0], self.far.pop3_address[1], timeout=5)
        other.user("keep@here.test")
        try:
            other.pass_("any")
            raise AssertionError("a second session got the mailbox")
        except poplib.error_proto as error:
            assert "[IN-USE]" in str(error)
        client.dele(1)
        client.quit()
        other.quit()
        assert not self.far.messages("keep@here.test")
        return "fetched byte for byte, one session at a time, removed at QUIT"

    def check_5_fsync(self) -> str:
        storage = Storage(os.path.join(self.directory, "storage"))
        storage.open()
        storage.write(os.path.join(storage.root, "file"), b"x")
        errors = storage.flush([storage.root])
        assert not errors, errors
        return "files and directories can be flushed to disk" + ("" if os.name != "nt" else " (files only)")

    def check_6_locks(self) -> str:
        path = os.path.join(self.directory, "lock")
        fds = [os.open(path, os.O_CREAT | os.O_RDWR | O_EXTRA, 0o600) for _ in range(2)]
        first, second = lock_file(fds[0]), lock_file(fds[1])
        for fd in fds:
            os.close(fd)
        assert first and not second
        return "a lock keeps others out until it is closed"

    def check_7_file_names(self) -> str:
        keys = ["../../etc@x.test", ".hidden@x.test", "a%b@x.test", "con@x.test", "\u00fc@x.test", "a b@x.test", "A@x.test"]
        seen = set()
        assert self.far.stores
        for key in keys:
            path = self.far.stores.mailboxes.path(lower(key))
            os.makedirs(path)
            seen.add(os.path.realpath(path).lower())
        root = os.path.realpath(self.far.stores.mailboxes.root).lower()
        assert len(seen) == len(keys) and all(path.startswith(root) for path in seen)
        source = os.path.join(self.directory, "lock")
        os.link(source, source + "2")
        return "odd addresses get a place of their own, hard links work"

    def check_8_dns_packets(self) -> str:
        query = encode_query(7, "far.test", MX)
        packet = encode_answer(query, [Record("far.test", MX, 60, (10, "mx.far.test"))])
        assert decode_answer(packet).records[0].data == (10, "mx.far.test")
        for size in range(len(packet)):
            with contextlib.suppress(ValueError):
                decode_answer(packet[:size])
        return "answers are decoded, broken ones refused"

    def check_9_tls(self) -> str:
        try:
            import ssl
        except ImportError:
            return "skipped: this Python has no ssl module"
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).minimum_version = ssl.TLSVersion.TLSv1_2
        return "%s, TLS 1.2 and later" % ssl.OPENSSL_VERSION


def selftest_command(config: Config, arguments: List[str]) -> int:
    """Try every guarantee on this machine, on free ports and inside the data directory; print a line for each."""
    Parser(prog="minimail.py selftest", description=selftest_command.__doc__).parse_args(arguments)
    log.setLevel(logging.CRITICAL)
    storage, was_there = Storage(config.data), os.path.exists(config.data)
    storage.make_directory(storage.run)
    directory = tempfile.mkdtemp(prefix="selftest-", dir=storage.run)
    failed = 0
    try:
        test = Selftest(directory)
        try:
            for name in sorted(name for name in dir(test) if name.startswith("check_")):
                try:
                    verdict = getattr(test, name)()
                    print("%-4s %s: %s" % ("skip" if verdict.startswith("skipped") else "ok", name[8:], verdict), flush=True)
                except Exception as error:
                    failed += 1
                    print("FAIL %s: %s: %s" % (name[8:], type(error).__name__, printable(str(error))), flush=True)
        finally:
            test.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        for path in () if was_there else (storage.run, storage.root):
            with contextlib.suppress(OSError):      # somebody else uses it by now
                os.rmdir(path)
    print("%d of the guarantees do not hold here" % failed if failed else "all hold")
    return 1 if failed else 0


class SelftestExtension(Extension):
    """One command."""

    name = "selftest"
    commands = {"selftest": selftest_command}


EXTENSIONS.append(SelftestExtension())



# ======================================================================================================================
# 24  Cutting this file: a copy without the sections that somebody does not need, and without this one. Pure: text in, text
#     out, but for the command at its end. What there is to cut is read from the map in the head.
# ======================================================================================================================

class Section(NamedTuple):
    """A section as the map names it: `name` is "" where it must stay, `needs` what it does not run without."""
    number: int
    name: str
    needs: Tuple[str, ...]
    text: str


BANNER = expression(r"^# ={100,}\n# (\d+)  ", re.MULTILINE)
LINE = 120                                          # columns of an import
TAGGED = expression(r"^    ([^\[\n]*) \[(\w+)(?:, needs ([\w ]+))?\]$", re.MULTILINE)     # a line of the map, or of the legend
ARROW = expression(r"(?<![-+])[-+]+> (\d+) ")        # in the drawing


def read_sections(source: str) -> List[Section]:
    """Return the sections of this file's text in their order."""
    banners = [(1, 0)] + [(int(match.group(1)), match.start()) for match in BANNER.finditer(source)]
    ends = [start for _, start in banners[1:]] + [len(source)]
    named = {int(match.group(1).split()[0]): (match.group(2), tuple((match.group(3) or "").split()))
             for match in TAGGED.finditer(source, 0, ends[0]) if match.group(1).strip()[:1].isdigit()}
    return [Section(number, *named.get(number, ("", ())), source[start:end]) for (number, start), end in zip(banners, ends)]


def needed_by(sections: Sequence[Section]) -> Dict[str, Set[str]]:
    """Return {name: names of all that it does not run without} of the optional sections."""
    needs: Dict[str, Set[str]] = {}
    for part in sections:                           # what a section needs stands above it
        if part.name:
            needs.setdefault(part.name, set()).update(*({name} | needs[name] for name in part.needs))
    return needs


def chosen(needs: Dict[str, Set[str]], wanted: Optional[Iterable[str]], unwanted: Iterable[str]) -> Set[str]:
    """Return the names to keep: what is wanted (None: all) with what that needs, less what is unwanted or needs that."""
    known = [name for name in needs if name != "cut"]
    for name in itertools.chain(wanted or (), unwanted):
        if name not in known:
            raise UsageError("cut: there is no section %s (one of: %s)" % (printable(name, 60), " ".join(known)))
    keep = set(needs) if wanted is None else set(wanted).union(*(needs[name] for name in wanted))
    gone = set(unwanted) | {"cut"}
    return {name for name in keep if name not in gone and not needs[name] & gone}


def cut(source: str, keep: Container[str]) -> str:
    """Return this file's text with only these of its optional sections, and nothing that only the others used."""
    sections = read_sections(source)
    left = [part for part in sections if not part.name or part.name in keep]
    numbers = {part.number for part in left}
    rows = TAGGED.sub(lambda row: row.group() if row.group(2) in keep else "\0", left[0].text)
    lines = []
    for line in rows.replace("\0\n", "").split("\n"):
        end = next((arrow.start() for arrow in ARROW.finditer(line) if int(arrow.group(1)) not in numbers), None)
        lines.append(line if end is None else line[:end].rstrip())      # what an arrow to nowhere leads to goes, too
    head = re.sub(r"^ +\|\n(?= *\|?\n)", "", "\n".join(lines), flags=re.MULTILINE)
    drawing, rest = head.split("\nMap", 1)
    head = drawing.rstrip("\n") + "\n\nMap" + rest
    return without_unused(head + "".join(part.text for part in left[1:]))


def without_unused(source: str) -> str:
    """Return a module's text without the imports and definitions that nothing in it comes to use."""
    import ast
    tree = ast.parse(source)
    statements = list(tree.body)
    for statement in tree.body:                     # if TYPE_CHECKING: imports for annotations only
        if isinstance(statement, ast.If) and not statement.orelse:
            statements += statement.body
    uses: Dict[str, Set[str]] = {}                  # by a name's definition
    found: List[str] = []                           # names that are used, and whose definition is still to be looked at
    for statement in statements:
        names, needed = bound_names(statement), used_names(statement)
        for name in names:
            uses.setdefault(name, set()).update(needed)
        if not names or any(name.startswith("__") for name in names):
            found += needed
    used = {"annotations"}                          # of __future__
    while found:
        name = found.pop()
        if name not in used:
            used.add(name)
            found += uses.get(name, ())
    lines: List[Optional[str]] = list(source.split("\n"))
    for statement in statements:
        names = bound_names(statement)
        if names and not any(name in used or name.startswith("__") for name in names):
            first = min([statement.lineno] + [line.lineno for line in getattr(statement, "decorator_list", ())])
            lines[first - 1:statement.end_lineno] = [None] * ((statement.end_lineno or 0) - first + 1)
        elif isinstance(statement, ast.ImportFrom) and not used.issuperset(names):
            kept = import_lines(statement, [name for name in names if name in used])
            lines[statement.lineno - 1] = kept
            lines[statement.lineno:statement.end_lineno] = [None] * ((statement.end_lineno or 0) - statement.lineno)
    return "\n".join(without_holes(lines))


def import_lines(statement: Any, names: Sequence[str]) -> str:
    """Return an import (ast) of these names only, as it is written in this file."""
    import textwrap
    line = "%sfrom %s import " % (" " * statement.col_offset, statement.module)
    if len(line + ", ".join(names)) <= LINE:
        return line + ", ".join(names)
    return textwrap.fill(", ".join(names), LINE - 1, initial_indent=line + "(", subsequent_indent=" " * (len(line) + 1)) + ")"


def bound_names(statement: Any) -> List[str]:
    """Return the names that a statement (ast) of a module defines; none where it does something else, too."""
    import ast
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        named = [name for target in targets for name in (target.elts if isinstance(target, ast.Tuple) else [target])]
        return [name.id for name in named if isinstance(name, ast.Name)]
    if isinstance(statement, ast.If) and not statement.orelse:
        inside = [bound_names(each) for each in statement.body]
        return sum(inside, []) if all(inside) else []
    return []


def used_names(statement: Any) -> Set[str]:
    """Return the names that occur in a statement (ast), also in annotations that are strings."""
    import ast
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            found.add(node.id)
        for quoted in (getattr(node, field, None) for field in ("annotation", "returns", "slice", "elts")):
            for text in quoted if isinstance(quoted, list) else [quoted]:
                text = getattr(text, "value", text)         # Python 3.8 has it in an ast.Index
                text = getattr(text, "value", text)
                if isinstance(text, str):
                    found.update(re.findall(r"\w+", text))
    return found


def without_holes(lines: Iterable[Optional[str]]) -> Iterator[str]:
    """Yield the lines but those that are None, what only commented on them, and one of the gaps around them."""
    gap: List[str] = []
    hole = False
    for is_gap, group in itertools.groupby(lines, lambda line: line == ""):
        before = list(group)
        if is_gap:
            gap = max(gap, ["" for _ in before], key=len) if hole else ["" for _ in before]
            continue
        after = [line for line in before if line is not None]
        hole = len(after) < len(before) and all(line.startswith("#") for line in after)
        if not hole:
            yield from gap
            yield from after
            gap = []
    yield from gap


def cut_command(config: Config, arguments: List[str]) -> int:
    """Write this file without sections that you do not need; without a name, list what may be left out."""
    parser = Parser(prog="minimail.py cut", description=cut_command.__doc__)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--with", dest="wanted", metavar="NAME,...", help="keep these, and what they need; the others go")
    group.add_argument("--without", dest="unwanted", metavar="NAME,...", help="leave these out, and what needs them")
    parser.add_argument("file", nargs="?", metavar="FILE", help="where to write it (default: standard output)")
    given = parser.parse_args(arguments)
    with open(__file__, encoding="utf-8") as file:
        source = file.read()
    sections = read_sections(source)
    needs = needed_by(sections)
    if given.wanted is None and given.unwanted is None:
        if given.file:
            raise UsageError("cut: what to leave out? See `cut` alone, then --with or --without NAME,...")
        print(list_sections(sections, needs), end="")
        return 0
    keep = chosen(needs, None if given.wanted is None else name_list(given.wanted), name_list(given.unwanted or ""))
    if given.file:
        refuse_other_files(given.file, source)
    result = cut(source, keep)
    gone = [name for name in needs if name not in keep and name != "cut"]
    said = "left out: %s; %d of %d lines" % (" ".join(gone) or "nothing", result.count("\n"), source.count("\n"))
    if given.file:
        write_copy(given.file, result)
        print("%s: %s" % (printable(given.file), said))
    else:
        sys.stdout.write(result)
        print("minimail: " + said, file=sys.stderr)
    return 0


def name_list(text: str) -> List[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def list_sections(sections: Sequence[Section], needs: Dict[str, Set[str]]) -> str:
    """Return a table of the optional sections, what has to stay last."""
    lines = {name: sum(part.text.count("\n") for part in sections if part.name == name) for name in [*needs, ""]}
    rows = [(name, lines[name], " ".join(other for other in needs if other in needs[name] - {name}))
            for name in needs if name != "cut"] + [("(the rest)", lines[""], "")]
    return "section       lines  needs\n" + "".join(("%-12s %6d  %s" % row).rstrip() + "\n" for row in rows)


def refuse_other_files(path: str, source: str) -> None:
    """CannotRun when there is a file that is not another copy of this one; OSError."""
    if os.path.lexists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            if os.path.samefile(path, __file__) or not file.read(1000).startswith(source[:source.index("\n\n")]):
                raise CannotRun("%s: is there, and is no other copy of minimail" % printable(path))


def write_copy(path: str, text: str) -> None:
    """Write a copy of this file, whole or not at all; OSError."""
    draft = "%s.%s.new" % (path, os.urandom(4).hex())
    with open(draft, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)
    os.chmod(draft, os.stat(__file__).st_mode & 0o777)
    os.replace(draft, path)


class CutExtension(Extension):
    """One command."""

    name = "cut"
    commands = {"cut": cut_command}


EXTENSIONS.append(CutExtension())


# ======================================================================================================================
# 25  Command line.  Options and environment to a Config, log lines, signals, processes, exit statuses.
# ======================================================================================================================

COMMANDS = {name: function for section in EXTENSIONS for name, function in section.commands.items()}


class Lines(logging.Formatter):
    """One line per event, as text or as a JSON object; tracebacks are folded into the line."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def format(self, record: logging.LogRecord) -> str:
        fields: Dict[str, Any] = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        stamp = "%s.%03dZ" % (self.second(int(record.created)), record.msecs)
        message = record.getMessage()
        if self.kind == "json":
            return json.dumps(dict({"time": stamp, "level": record.levelname.lower(), "event": message}, **fields))
        level = "" if record.levelno in (logging.INFO, logging.DEBUG) else record.levelname.lower() + ": "
        values = list(map(str, fields.values()))
        if "" in values or not is_plain("".join(values)):       # mostly all are: one look at them together
            values = [value if value and is_plain(value) else json.dumps(value, ensure_ascii=not value.isprintable())
                      for value in values]
        words = "".join([" %s=%s" % pair for pair in zip(fields, values)])
        return "%s %s%s%s" % (stamp, level, printable(message, 2000), words)

    @staticmethod
    @functools.lru_cache(maxsize=4)
    def second(time_t: int) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time_t))


def is_plain(text: str) -> bool:
    """Return whether a text can stand in a log line as it is."""
    return text.isascii() and text.isprintable() and " " not in text and '"' not in text


def option_parser() -> Any:
    """Return a parser that knows how to show all Config options; given_options() reads them, in less time."""
    from argparse import SUPPRESS, RawDescriptionHelpFormatter
    parser = Parser(prog="minimail.py", add_help=False,
                    formatter_class=functools.partial(RawDescriptionHelpFormatter, width=HELP_WIDTH),
                    usage="minimail.py [serve] [options]\n       minimail.py %s ..." % "|".join(sorted(COMMANDS)),
                    description="A mail node in one file. Without --domain it captures all mail; with it, it is a real node.",
                    epilog="Every option can be given as an environment variable MINIMAIL_<OPTION> (repeatable ones\n"
                           "comma-separated), or in a file that MINIMAIL_<OPTION>_FILE names.\n"
                           "Commands share the data directory with a running node; each has --help.")
    for name, meta in option_fields().items():
        if not meta["metavar"]:
            parser.add_argument(option_name(name), action="store_const", const="on", help=meta["help"])
            continue
        optional = {"nargs": "?", "const": "on"} if meta["metavar"] == "on|off" else {}
        help = SUPPRESS if sections_missing(name) else meta["help"] + shown_default(name, meta["help"])
        parser.add_argument(option_name(name), metavar=meta["metavar"], action="append" if meta["many"] else None,
                            help=help.replace("%", "%%"), **optional)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--help", "-h", action="store_true", help="print this help and exit")
    return parser


def option_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def shown_default(name: str, help: str) -> str:
    """Return what --help says about an option's default, where its text does not."""
    default: Any = getattr(Config, name)
    if re.search(r"\bdefault", help):
        return ""
    if name in LISTENERS and default:
        default = show_endpoint(default[0])
    elif isinstance(default, tuple):
        default = ",".join("%g" % item if isinstance(item, float) else str(item) for item in default)
    return " (default %s)" % ("%g" % default if isinstance(default, float) else default or "none")


OFFERED = expression(r"(?:tcp|udp|sctp)://\S*")     # what Kubernetes sets for a Service named minimail-...


def environment_options(environ: Any) -> Dict[str, Any]:
    """Return {field: text} of the MINIMAIL_ variables that are set, and of the files they name; UsageError, CannotRun."""
    given = {name: file.texts() for name, file in option_files(environ).items()}
    for name, meta in option_fields().items():
        text = environ.get(variable(name))
        if text is None or OFFERED.fullmatch(text.strip()) or not text.strip() and meta["metavar"]:
            continue
        if name in given:
            raise UsageError("%s and %s_FILE: only one of them can be" % (variable(name), variable(name)))
        given[name] = split_values(text, meta)
    return given


def option_files(environ: Any) -> Dict[str, OptionFile]:
    """Return the files that MINIMAIL_<OPTION>_FILE variables name, not read yet."""
    paths = {name: environ.get(variable(name) + "_FILE", "") for name in option_fields()}
    return {name: OptionFile(variable(name) + "_FILE", path, option_fields()[name]) for name, path in paths.items() if path}


def variable(field: str) -> str:
    return "MINIMAIL_" + field.upper()


def strange_variables(environ: Any) -> str:
    """Return what is to be said about MINIMAIL_ variables that are no options, by name only; "" when there are none."""
    known = [variable(name) for name in option_fields()]
    said = []
    for name in sorted(environ):
        if not name.startswith("MINIMAIL_"):
            continue
        if name in known or name[:-len("_FILE")] in known:
            if OFFERED.fullmatch(environ[name].strip()):
                said.append("%s comes from Kubernetes, not from you" % name)
        elif not OFFERED.fullmatch(environ[name].strip()):
            import difflib
            near = difflib.get_close_matches(name, known, 1, 0.0)[0]
            said.append("%s is no option, is %s meant?" % (printable(name, 60), near))
    more = "; and %d more" % (len(said) - 5) if len(said) > 5 else ""
    return "ignored: " + "; ".join(said[:5]) + more if said else ""


def split_words(argv: Sequence[str], command: str = "") -> Tuple[str, List[Tuple[str, Optional[str]]], List[str]]:
    """Return (command, [(option of ours, its text; None without one)], the command's own words).

    What a command has itself is not ours: the --timeout of `wait`, and every flag with one dash of `sendmail`.
    """
    takes = {option_name(name): meta["metavar"] for name, meta in option_fields().items()
             if (command, name) != ("wait", "timeout")}
    takes.update({"--help": "", "--version": ""})
    ours: List[Tuple[str, Optional[str]]] = []
    own: List[str] = []
    left = collections.deque(argv)
    while left:
        word = left.popleft()
        if word == "--":
            own += [word, *left]
            break
        name, equals, text = word.partition("=")
        if name not in takes:
            own.append(word)
        elif equals:
            ours.append((name, text))
        elif not takes[name] or not left or left[0].startswith("-") or takes[name] == "on|off" and left[0] in COMMANDS:
            ours.append((name, None))
        else:
            ours.append((name, left.popleft()))
    first = next((word for word in own if not word.startswith("-")), "serve")
    if first == "wait" and not command:
        return split_words(argv, first)
    if first in own:
        own.remove(first)
    return first, ours, own


def given_options(ours: Iterable[Tuple[str, Optional[str]]]) -> Dict[str, Any]:
    """Return {field: text, or list of texts} of options; UsageError."""
    fields = dict(option_fields(), help={"metavar": "", "many": False}, version={"metavar": "", "many": False})
    given: Dict[str, Any] = {}
    for option, text in ours:
        name = option[2:].replace("-", "_")
        kind = fields[name]["metavar"]
        if text is not None and not kind:
            raise UsageError("%s: takes no value" % option)
        if text is None and kind not in ("", "on|off"):
            raise UsageError("%s: needs a value: %s" % (option, kind))
        text = "on" if text is None else text
        given[name] = given.get(name, []) + [text] if fields[name]["many"] else text
    return given


def parse_command_line(argv: Sequence[str]) -> Tuple[str, List[str], Dict[str, Any]]:
    """Return (command, its arguments, {field: text}); UsageError."""
    command, ours, own = split_words(argv)
    if command != "sendmail" and "-h" in own:
        own[own.index("-h")] = "--help"
    given = given_options(ours)
    if given.pop("version", ""):
        return "version", [], {}
    if given.pop("help", "") or command == "serve" and "--help" in own:
        if command == "serve":
            return "help", [], {}
        own.append("--help")
    if command not in COMMANDS and command != "serve":
        strange = [word for word in own if word.startswith("-")]
        raise UsageError(show_word(strange[0]) if strange else "no such command%s (one of: serve %s)" % (
            ": " + command if re.fullmatch(r"[a-z-]{1,30}", command) else "", " ".join(sorted(COMMANDS))))
    if command == "serve" and own:
        raise UsageError(show_word(own[0]))
    return command, own, given


def read_config(given: Dict[str, Any], environ: Any, remember: bool = False) -> Config:
    """Return the Config of the command line and, where that is silent, of the environment; UsageError, CannotRun.

    With `remember`, which is for commands, first become the directory's owner; and last comes what the node on the same data
    directory runs with: a `sendmail` called by cron has to know its domains. The node leaves that in DATA/options.json.
    """
    values = read_options(environment_options(environ), variable)
    values.update(read_options(given, option_name))
    sources = {name: file.get for name, file in option_files(environ).items() if name not in given}
    for read in sources.values():
        read()                                      # while we may: who we become may not, and goes on with this
    if remember:
        data = Config(**values).data
        become_owner(data)
        refuse_shared(data)
        if "domain" not in values:
            values = dict(remembered_options(os.path.join(data, "options.json")), **values)
    config = Config(**values, sources=sources)
    check_together(config, option_name)
    return config


def remembered_options(path: str) -> Dict[str, Any]:
    """Return the options that a node left for commands; none when it left none. CannotRun."""
    try:
        loaded = json.loads(read_regular(path).decode("utf-8"))
        if not isinstance(loaded, dict):
            raise ValueError("it holds no options")
        return read_options({name: value for name, value in loaded.items() if name in option_fields()}, lambda name: name)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError) as error:
        raise CannotRun("%s: cannot be read: %s" % (path, error)) from None


class LineRecord(logging.LogRecord):
    """Of a log record what Lines asks for; the rest, as its file and its thread, is most of what one costs.

    Made as by Logger.makeRecord(): for our log only, others in the process have theirs.
    """

    def __init__(self, name: str, level: int, _path: str, _line: int, msg: Any, args: Any, exc_info: Any,
                 _function: Any = None, extra: Any = None, stack: Any = None) -> None:
        self.name, self.levelno, self.levelname = name, level, logging.getLevelName(level)
        self.msg, self.args, self.exc_info, self.exc_text, self.stack_info = msg, args, exc_info, None, stack
        self.created = time.time()
        self.msecs = self.created % 1 * 1000
        vars(self).update(extra or {})


class SystemLog(logging.Handler):
    """Writes to the system's log (syslog(3), facility mail), if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        import syslog
        levels = {logging.INFO: syslog.LOG_INFO, logging.WARNING: syslog.LOG_WARNING}
        syslog.openlog("minimail", syslog.LOG_PID, syslog.LOG_MAIL)
        syslog.syslog(levels.get(record.levelno, syslog.LOG_ERR), self.format(record).partition(" ")[2])


def set_up_logging(config: Config, to_system: bool = False) -> None:
    """Log to standard error, and with `to_system` what `sendmail` does to the system's log, too: its caller keeps nothing."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines(config.log))
    logging.raiseExceptions = False
    logging.logProcesses = logging.logThreads = False
    logging._srcfile = None                         # nobody wants to know the line: half the cost of a record
    log.makeRecord = LineRecord  # type: ignore[method-assign,assignment]
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if config.quiet else logging.DEBUG if config.verbose else logging.INFO)
    if to_system:
        handler.setLevel(log.level)
        log.setLevel(min(log.level, logging.INFO))
        with contextlib.suppress(ImportError):
            import syslog                           # noqa: F401  not on Windows
            system = SystemLog(logging.INFO)
            system.setFormatter(Lines("text"))
            log.addHandler(system)


CALLED_AS = {"sendmail": ["sendmail"], "mailq": ["sendmail", "-bp"], "newaliases": ["sendmail", "-bi"]}


def program_words(argv: Sequence[str]) -> List[str]:
    """Return the words of the command line; a link named sendmail, mailq or newaliases is that command."""
    return CALLED_AS.get(os.path.basename(argv[0]), []) + list(argv[1:])


def open_standard_files() -> None:
    """Open what the caller has closed of standard input, output and error, or the next files opened would be those."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def escape_output() -> None:
    """Let standard output show what its encoding lacks as escapes, where it would fail."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="backslashreplace")


def run_command(words: Sequence[str]) -> int:
    """Do what a command line asks for; return the exit status. UsageError, CannotRun, OSError."""
    command, own, given = parse_command_line(words)
    if command == "version":
        print("minimail " + __version__)
        return 0
    if command == "help":
        print(option_parser().format_help(), end="")
        return 0
    config = read_config(given, os.environ, remember=command != "serve" and "--help" not in own)
    if command != "serve" and not config.verbose:
        config = dataclasses.replace(config, quiet=True)
    set_up_logging(config, command == "sendmail")
    strange = strange_variables(os.environ) if command != "sendmail" else ""     # cron would mail it each time
    if strange:
        log.warning("%s", strange)
    if command == "serve":
        return serve_command(config, dict(environment_options(os.environ), **given))
    if command == "sendmail" and ("-bs" in own or ("-b", "s") in zip(own, own[1:])):
        return smtp_on_standard_input(config)       # that takes a whole node, which sendmail_command() knows nothing of
    return COMMANDS[command](config, own)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line and return its exit status: 0 ended as asked, 1 could not run, 2 wrong usage.

    `sendmail` ends with one of sysexits(3) instead.
    """
    words = program_words(sys.argv) if argv is None else list(argv)
    command, ours, _ = split_words(words)
    usage, cannot = (64, 75) if command == "sendmail" else (2, 1)
    json_wanted = dict(ours).get("--log", os.environ.get("MINIMAIL_LOG")) == "json"     # before they are understood

    def fail(status: int, text: str) -> int:
        text = printable(text, 2000)
        print(json.dumps({"level": "error", "event": text}) if json_wanted else "minimail: " + text, file=sys.stderr)
        return status
    try:
        open_standard_files()
        escape_output()
        os.umask(0o077)
        return run_command(words)
    except UsageError as error:
        return fail(usage, str(error))
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except CannotRun as error:
        return fail(error.status or cannot, error.args[1] if len(error.args) > 1 else str(error))
    except OSError as error:
        name = error.filename + ": " if isinstance(error.filename, str) else ""
        return fail(cannot, "%s%s" % (name, reason_of(error)))
    except SystemExit as stop:                      # argparse after --help of a command
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if command != "sendmail":
            raise
        return fail(70, "sendmail: something is wrong with the program, the message was not taken: %r" % error)


NOT_LEFT = ("data", "log", "quiet", "verbose", "workers", "run_as", "fault", "release", "webhook")    # no command needs these


def leave_options(node: Node, given: Dict[str, Any]) -> None:
    """Write what commands on the same data directory have to know into it, without passwords; OSError."""
    kept = {name: text for name, text in given.items() if name not in LISTENERS + NOT_LEFT}
    for name in ("users", "aliases", "tls_cert", "tls_key"):
        if name in kept:
            kept[name] = os.path.abspath(kept[name])
    config = node.config
    if config.smarthost:
        kept["smarthost"] = str(config.smarthost)
    if config.route:
        kept["route"] = ["%s=%s" % (pattern, server) for pattern, server in config.route]
    text = json.dumps(dict(kept, domain=list(config.domain)), indent=1) + "\n"
    assert node.stores
    node.stores.storage.write(os.path.join(node.data, "options.json"), text.encode("utf-8"))


def serve_command(config: Config, given: Dict[str, Any]) -> int:
    """Run a node until SIGINT or SIGTERM. `given` are the options as texts."""
    if config.workers > 1 and not hasattr(os, "fork"):
        raise CannotRun("--workers: this platform cannot fork; leave the option out")
    if config.web is None and has_extension("web"):
        config = dataclasses.replace(config, web=(("127.0.0.1", 8025),) if config.capture else ())
    if config.workers == 1:
        hold_signals()
    raise_descriptor_limit(config)
    node = Node.from_config(config)
    node.bind()
    public = ["%s %s" % (name, show_endpoint(endpoint)) for name, endpoint in node.endpoints() if not is_loopback(endpoint[0])]
    if config.capture and public:
        log.warning("in capture mode, whoever reaches %s can read and fill every mailbox", " and ".join(public))
    if config.run_as:
        drop_privileges(config.run_as, config.data)
    if config.workers > 1:
        return Workers(node, given).run()
    node.serve()
    leave_options(node, given)
    announce(node)
    wait_for_signal(node)
    event("stopping")
    node.stop()
    return 0


def raise_descriptor_limit(config: Config) -> None:
    """Make room for all the connections there may be, a socket and a draft each; say so when there is none to be had."""
    try:
        import resource
    except ImportError:                             # Windows has no such limit
        return
    wanted = 2 * config.max_connections + 2 * SHARES * MAX_SENDERS + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    if soft < wanted:
        log.warning("only %d open files are allowed where --max-connections %d may need %d: raise the limit (ulimit -n)",
                    soft, config.max_connections, wanted)


def held_signals() -> Set[Any]:
    import signal
    return {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}


def hold_signals() -> None:
    """Let signals wait for wait_for_signal(): a handler would run only when the main thread next wakes up.

    Before any thread starts, as threads inherit this.
    """
    import signal
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, held_signals())


def next_signal(node: Node) -> int:
    """Return the next signal; until then see whether the file system answers, where both can be done (not on macOS)."""
    import signal
    if not hasattr(signal, "sigtimedwait"):
        return signal.sigwait(held_signals())
    while True:
        found = signal.sigtimedwait(held_signals(), 1.0)
        if found and found.si_signo in held_signals():      # not what a debugger that attaches leaves there: any number
            return found.si_signo
        if node.stores:
            node.stores.storage.watch()


def wait_for_signal(node: Node) -> None:
    """Return at SIGINT or SIGTERM; SIGHUP reads the files anew that have changed."""
    import signal
    if hasattr(signal, "sigwait"):
        while next_signal(node) == getattr(signal, "SIGHUP", None):
            event("hangup")
            if node.stores:
                node.stores.book.refresh()
        return
    told: List[int] = []                            # Windows
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: told.append(number))
    while not told:
        time.sleep(0.2)


IMPORTED_LATE = ("argparse", "calendar", "ctypes", "datetime", "difflib", "email.generator", "email.header", "email.parser",
                 "email.policy", "encodings.aliases", "getpass", "html", "html.entities", "http.client", "http.server", "mmap",
                 "poplib", "pwd", "resource", "signal", "smtplib", "ssl", "syslog", "unicodedata", "urllib.parse")


def import_all() -> None:
    """Import what is only needed later, and all codecs, where who we become cannot read Python any more (as in /root)."""
    import pkgutil
    from encodings import __path__ as codecs
    above = os.path.realpath(os.__file__)
    while os.path.dirname(above) != above:
        above = os.path.dirname(above)
        if not os.stat(above).st_mode & 0o001:
            for name in [*LATER, *IMPORTED_LATE, *("encodings." + module.name for module in pkgutil.iter_modules(codecs))]:
                with contextlib.suppress(ImportError):
                    __import__(name)
            return


def become_owner(data: str) -> None:
    """Let root's commands work as the owner of the data directory: what root wrote, the node could not read."""
    try:
        owner = os.stat(data)
    except OSError:
        return
    if hasattr(os, "geteuid") and os.geteuid() == 0 and owner.st_uid != 0:
        import pwd
        try:
            account = pwd.getpwuid(owner.st_uid)
        except KeyError:                            # nobody knows the user
            account = pwd.struct_passwd((str(owner.st_uid), "", owner.st_uid, owner.st_gid, "", "/", ""))
        import_all()
        become(account)


def become(account: Any) -> None:
    """Be the user of an entry of pwd, also in groups and home: what looks for files in root's could not read them. OSError."""
    os.environ.update(HOME=account.pw_dir, USER=account.pw_name, LOGNAME=account.pw_name)
    for variable in [name for name in os.environ if name == "MAIL" or name.startswith(("XDG_", "SUDO_"))]:
        del os.environ[variable]
    os.initgroups(account.pw_name, account.pw_gid)
    os.setgid(account.pw_gid)
    os.setuid(account.pw_uid)


def announce(node: Node) -> None:
    for name, endpoint in node.endpoints():
        print("listening %s %s" % (name, show_endpoint(endpoint)))
    print("ready", flush=True)


def drop_privileges(user: str, data: str) -> None:
    """Become `user` for good, groups too; CannotRun when that is not possible. A missing data directory is made for it."""
    try:
        import pwd
    except ImportError:
        raise CannotRun("--run-as: this platform has no such users") from None
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise CannotRun("--run-as %s: no such user on this machine" % user) from None
    if os.getuid() == account.pw_uid != 0:
        return
    import_all()
    try:
        if not os.path.exists(data):
            os.makedirs(data, mode=0o700)
            os.chown(data, account.pw_uid, account.pw_gid)
        become(account)
    except OSError as error:
        raise CannotRun("--run-as %s: %s; only root can become another user" % (user, reason_of(error))) from None
    if account.pw_uid != 0:
        with contextlib.suppress(OSError):
            os.setuid(0)
            raise CannotRun("--run-as %s: root came back" % user)


class Workers:
    """Processes that share a node's listeners: each serves on its own, one that dies is replaced, all end with the parent."""

    def __init__(self, node: Node, given: Dict[str, Any]) -> None:
        self.node = node
        self.given = given
        self.alive, self.leash = os.pipe()          # children read, only the parent can write: its end is its death
        self.ready_read, self.ready_write = os.pipe()       # a byte from each that serves, and at the end
        self.stopping = False
        self.children: Dict[int, Tuple[int, float]] = {}        # pid: (number, when it began)

    def run(self) -> int:
        """Keep the workers running until told to stop; return the exit status."""
        import signal
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.stop)
        signal.signal(signal.SIGHUP, lambda *_: self.tell(signal.SIGHUP))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held_signals())      # whoever started us may have blocked them
        for number in range(self.node.config.workers):
            self.fork(number)
        if not self.are_ready():
            os.close(self.leash)
            return 1
        announce(self.node)
        self.keep_running()
        event("stopping")
        self.tell(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while self.children and time.monotonic() < deadline:
            pid = self.reap()
            self.children.pop(pid, None) if pid else time.sleep(0.02)
        return 0

    def stop(self, *_: Any) -> None:
        """End soon; in a signal's handler, where an Event's lock may be held by who is interrupted."""
        self.stopping = True
        os.write(self.ready_write, b"\n")

    def are_ready(self) -> bool:
        """Return when all workers serve; False when one of them has ended instead, and said why."""
        ready = 0
        while ready < self.node.config.workers:
            if is_ready(self.ready_read, READ, 0.1):
                ready += len(os.read(self.ready_read, 64))
            elif any(os.waitpid(pid, os.WNOHANG)[0] for pid in self.children):
                return False
        return True

    def keep_running(self) -> None:
        """Start a worker again that ended, until told to stop."""
        due: List[Tuple[float, int]] = []           # workers to start again: (when, number)
        while not self.stopping:
            pid = self.reap()
            if pid:
                number, began = self.children.pop(pid)
                self.node.connections.free_all(number)
                wait = 0.1 if time.monotonic() - began > 5 else 2.0
                log.warning("worker %d ended, another one starts in %g seconds", pid, wait)
                due.append((time.monotonic() + wait, number))
                continue
            for when, number in [entry for entry in due if entry[0] <= time.monotonic()]:
                due.remove((when, number))
                try:
                    self.fork(number)
                except OSError as error:            # no memory, no process left: the others go on
                    log.warning("cannot start a worker: %s", error)
                    due.append((time.monotonic() + 2.0, number))
            if is_ready(self.ready_read, READ, 0.1 if due else 0.5):
                os.read(self.ready_read, 64)

    def tell(self, signum: int) -> None:
        """Send a signal to all workers."""
        for pid in list(self.children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    @staticmethod
    def reap() -> int:
        try:
            return os.waitpid(-1, os.WNOHANG)[0]
        except ChildProcessError:
            return 0

    def fork(self, number: int) -> None:
        import signal
        sys.stdout.flush()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        hold_signals()                              # the child's begin to count in wait_for_signal()
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self.children[pid] = (number, time.monotonic())
            return
        status = 1
        try:
            status = self.work(number)
        except CannotRun as error:
            log.error("%s", error.args[-1])
        except BaseException:
            log.exception("worker failed")
        finally:
            os._exit(status)

    def work(self, number: int) -> int:
        """Be a worker: serve until told to stop, or the parent is gone."""
        import signal
        os.close(self.leash)
        self.node.connections.owner = number
        self.node.serve()
        leave_options(self.node, self.given)

        def follow() -> None:
            os.read(self.alive, 1)                  # returns when nobody can write any more
            os.kill(os.getpid(), signal.SIGTERM)
        threading.Thread(target=follow, name="minimail-leash", daemon=True).start()
        os.write(self.ready_write, b"\n")
        wait_for_signal(self.node)
        self.node.stop()
        return 0


def smtp_on_standard_input(config: Config) -> int:
    """Speak SMTP on standard input and output until the client ends, as `sendmail -bs` does; return the exit status.

    A node of its own on loopback holds the conversation, so that it is the same as any other client's.
    """
    trust = config.trust + (parse_network("127.0.0.1"),)    # who can run this may send
    config = dataclasses.replace(config, smtp=(("127.0.0.1", 0),), smtps=(), pop3=(), pop3s=(), web=(), webs=(), trust=trust,
                                 tls_cert="", tls_key="", run_as="", workers=1)
    refuse_unused(config.data)
    node = Node.from_config(config)
    node.relays = False
    with node, socket.create_connection(node.smtp_address or ("", 0)) as sock:
        threading.Thread(target=copy_input, args=(sock,), daemon=True).start()
        for block in iter(lambda: sock.recv(BLOCK), b""):
            sys.stdout.buffer.write(block)
            sys.stdout.buffer.flush()
    return 0


def copy_input(sock: socket.socket) -> None:
    """Send standard input, past Python's buffer, which a thread may not hold when the process ends."""
    bare, last = None, b" "                         # a local program may end all lines in LF: the first one tells
    with contextlib.suppress(OSError):
        for block in iter(lambda: os.read(0, BLOCK), b""):
            if bare is None and b"\n" in block:
                bare = (last + block)[block.index(b"\n")] != ord("\r")
            last = block[-1:]
            sock.sendall(block.replace(b"\n", b"\r\n") if bare else block)
        sock.shutdown(socket.SHUT_WR)


def user_command(config: Config, arguments: List[str]) -> int:
    """Add, change, remove or list accounts."""
    parser = Parser(prog="minimail.py user", description=user_command.__doc__)
    parser.add_argument("action", choices=["add", "passwd", "remove", "list"])
    parser.add_argument("name", nargs="?", metavar="NAME", help="the full address")
    parser.add_argument("--password-stdin", action="store_true", help="read the password from standard input")
    given = parser.parse_args(arguments)
    accounts = Accounts(config.file("users"))
    if given.action == "list":
        print("".join(name + "\n" for name in sorted(accounts.names())), end="")
        return 0
    try:
        key = parse_address(given.name).key if given.name else ""
    except Refused as refused:
        raise UsageError("user %s %s: %s" % (given.action, printable(given.name, 100), refused.reply.text)) from None
    if "@" not in key:
        raise UsageError("user %s: NAME is a full address, as bob@example.org" % given.action)
    exists = key in accounts.names()
    if exists is (given.action == "add"):
        raise CannotRun("%s %s in %s" % (key, "exists already" if exists else "is not", config.file("users")))
    record = "" if given.action == "remove" else hash_password(ask_password(given.password_stdin))

    def edit(users: Dict[str, str]) -> None:
        if record:
            users[key] = record
        else:
            users.pop(key, None)
    accounts.change(Storage(config.data), edit)
    return 0


def ask_password(from_stdin: bool) -> str:
    """Return a password, asked for twice on a terminal; CannotRun when there is none."""
    if from_stdin:
        password = first_line()
    else:
        import getpass
        if not sys.stdin or not sys.stdin.isatty():
            raise CannotRun("no terminal to ask for the password: use --password-stdin")
        try:
            password = getpass.getpass("Password: ")
            again = getpass.getpass("Again: ")
        except EOFError:                            # Ctrl-D
            print(file=sys.stderr)
            raise CannotRun("no password was given, nothing was changed") from None
        if again != password:
            raise CannotRun("the passwords differ, nothing was changed")
    if not password:
        raise CannotRun("an empty password would let everybody in, nothing was changed")
    return password


def first_line() -> str:
    """Return the first line of standard input, whatever its bytes; CannotRun when it is too long for a password."""
    if not sys.stdin:
        return ""
    file = getattr(sys.stdin, "buffer", sys.stdin)
    line = file.readline(MAX_PASSWORD + 2)
    line = line.decode("utf-8", "surrogateescape") if isinstance(line, bytes) else line
    if len(line.rstrip("\r\n")) > MAX_PASSWORD:
        raise CannotRun("the password is longer than %d bytes, nothing was changed" % MAX_PASSWORD)
    return str(line).rstrip("\r\n")


COMMANDS["user"] = user_command


if __name__ == "__main__":
    sys.exit(main())
