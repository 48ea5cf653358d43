"""A small internet in network namespaces: name servers, a real Postfix, scripted peers, minimail nodes.

    python3 .ci/netlab.py        # bring it up, say how to get in, and take it down at the end of standard input

Every host is a namespace with a cable to one bridge, which lies in a namespace of its own; nothing leads out of there. The
addresses are those reserved for documentation. Needs root, and what install.sh installs; leaves nothing behind.
"""
import atexit
import contextlib
import ctypes
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import lab

HOSTS = {
    "dns": ["192.0.2.2", "192.0.2.3"],                          # nsd, unbound
    "a": ["192.0.2.11", "2001:db8::11"],                        # minimail nodes
    "b": ["192.0.2.12", "2001:db8::12"],
    "x": ["192.0.2.13"],
    "y": ["192.0.2.14"],
    "q": ["192.0.2.15"],
    "sender": ["192.0.2.20", "2001:db8::20"],                   # clients; port 25 is closed here
    "mx": ["192.0.2.30", "2001:db8::30"],                       # Postfix
    "peer": ["192.0.2.%d" % n for n in range(40, 60)],          # scripted servers
    "stranger": ["192.0.2.66", "2001:db8::66"],
}
AUTHORITY, RESOLVER = HOSTS["dns"]
POSTFIX = HOSTS["mx"][0]
CLOSED = HOSTS["sender"][0]     # refuses at once
NOBODY = "192.0.2.90"           # no host has it: unreachable after some seconds
SILENT = "192.0.2.99"           # packets to it are lost without a trace
IPV6 = Path("/proc/net/if_inet6").exists()


# The network

class Network(lab.Resourceful):
    """The namespaces, from `with` to its end; `folder` is for the files of what runs in there."""

    def enter(self):
        self.prefix = "minimail-%d-" % os.getpid()
        self.folder = self.resources.enter_context(lab.folder())
        self.folder.chmod(0o711)  # the servers' users must pass through
        self.resources.callback(self.remove)
        atexit.register(self.resources.close)  # also when an interrupt comes at a bad moment
        self.build()

    def name(self, host):
        """Return the name of a host's namespace."""
        return self.prefix + host

    def build(self):
        """Make the namespaces, the cables, the addresses."""
        hosts = ["wire", *HOSTS]
        ip([], ["netns add " + self.name(host) for host in hosts])
        cables = ["link add bridge type bridge", "link set bridge up"]
        for host in HOSTS:
            cables += ["link add to-%s type veth peer name eth0 netns %s" % (host, self.name(host)),
                       "link set to-%s master bridge up" % host]
        ip(["-n", self.name("wire")], cables)
        for host, addresses in HOSTS.items():
            lines = ["link set lo up", "link set eth0 up", "neigh add %s lladdr 02:00:00:00:00:63 dev eth0" % SILENT]
            for address in addresses:
                if ":" not in address:
                    lines.append("addr add %s/24 dev eth0" % address)
                elif IPV6:
                    lines.append("addr add %s/64 dev eth0 nodad" % address)
            ip(["-n", self.name(host)], lines)
            settings = Path("/etc/netns", self.name(host))
            lab.until(lambda: self.made(settings), what=settings)  # noqa: B023
            (settings / "resolv.conf").write_text("nameserver %s\n" % RESOLVER)

    @staticmethod
    def made(folder):
        """Make a folder; False when another network took the one above away just before."""
        with contextlib.suppress(FileNotFoundError):
            folder.mkdir(parents=True)
        return folder.exists()

    def remove(self):
        """Remove every trace of build(), however far it came."""
        for host in ["wire", *HOSTS]:
            if Path("/run/netns", self.name(host)).exists():
                subprocess.run(["ip", "netns", "delete", self.name(host)], check=True)
            shutil.rmtree(Path("/etc/netns", self.name(host)), ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir("/etc/netns")  # unless others are in there

    def command(self, host, *words):
        """Return the command line that runs a program on a host, with the resolv.conf of that host."""
        return ["ip", "netns", "exec", self.name(host), *words]

    @contextlib.contextmanager
    def inside(self, host):
        """Sockets that this thread makes meanwhile, and programs that it starts, belong to the host."""
        with open("/proc/thread-self/ns/net") as home, open("/run/netns/" + self.name(host)) as there:
            enter_namespace(there)
            try:
                yield
            finally:
                enter_namespace(home)

    def plug(self, host, connected):
        """Plug a host's cable in, or pull it out."""
        ip(["-n", self.name("wire")], ["link set to-%s %s" % (host, "up" if connected else "down")])

    def serve(self, host, command, **more):
        """Start a server on a host; it is ended with the network."""
        with open(self.folder / (host + ".log"), "ab") as log:
            process = lab.start(self.command(host, *command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, **more)
        self.resources.callback(lab.end_group, process)
        return process

    def accepts(self, host, address, port):
        """Return whether a connection from a host to an address is accepted."""
        with self.inside(host):
            return lab.accepts(port, address)


def ip(options, lines):
    """Have iproute2 do several things at once."""
    lab.run(["ip", *options, "-batch", "-"], "".join(line + "\n" for line in lines).encode())


def enter_namespace(namespace):
    """Put this thread into an open network namespace; os.setns() is there from Python 3.12 on only."""
    if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000


# Names

# "@" is the zone's own name; names without a final dot lie under it. Each zone is delegated from the zone "test".
MANY_EXCHANGERS = "".join("@ MX 50 exchanger-number-%02d-of-many\n" % n for n in range(60))
ZONES = {
    "a.test": "@ MX 10 mx\nmx A 192.0.2.11\nmx AAAA 2001:db8::11",
    "b.test": "@ MX 10 mx\nmx A 192.0.2.12",
    "postfix.test": "@ MX 10 mx\nmx A 192.0.2.30",
    # ways to the same Postfix
    "implicit.test": "@ A 192.0.2.30",
    "second.test": "@ MX 20 mx.postfix.test.\n@ MX 10 gone\ngone A " + NOBODY,
    "closed.test": "@ MX 10 closed\n@ MX 20 mx.postfix.test.\nclosed A " + CLOSED,
    "silent.test": "@ MX 10 silent\n@ MX 20 mx.postfix.test.\nsilent A " + SILENT,
    "noaddress.test": "@ MX 10 nowhere\n@ MX 20 mx.postfix.test.\nnowhere TXT none",
    "xn--bcher-kva.test": "@ MX 10 mx.postfix.test.",
    "big.test": "@ MX 10 mx.postfix.test.\n" + MANY_EXCHANGERS,     # does not fit into a UDP answer
    "six.test": "@ MX 10 mx\nmx AAAA 2001:db8::30",
    "both.test": "@ MX 10 mx\nmx A 192.0.2.30\nmx AAAA 2001:db8::30",
    "backup.test": "@ MX 10 mx.postfix.test.\n@ MX 20 mx.a.test.\n@ MX 30 mx.b.test.",
    # two exchangers of equal preference
    "pair.test": "@ MX 10 mx1\n@ MX 10 mx2\nmx1 A 192.0.2.13\nmx2 A 192.0.2.14",
    # scripted peers
    "grey.test": "@ MX 10 mx\nmx A 192.0.2.40",
    "later.test": "@ MX 10 mx\nmx A 192.0.2.41",
    "lost.test": "@ MX 10 mx\nmx A 192.0.2.42",
    "small.test": "@ MX 10 mx\nmx A 192.0.2.43",
    "old.test": "@ MX 10 mx\nmx A 192.0.2.44",
    "slow.test": "@ MX 10 mx\nmx A 192.0.2.45",
    "plain.test": "@ MX 10 mx\nmx A 192.0.2.46",
    # no way at all
    "null.test": "@ MX 0 .\n@ A 192.0.2.30",
    "nohost.test": "@ MX 10 nowhere\nnowhere TXT none",
    "loop.test": "@ MX 10 mx.a.test.",
    "loop-by-address.test": "@ MX 10 another-name\nanother-name A 192.0.2.11",
    "dead.test": "@ MX 10 closed\nclosed A " + CLOSED,
    "hole.test": "@ MX 10 silent\nsilent A " + SILENT,
}
IN_TEST = "ns A %s\ncname CNAME postfix.test.\nservfail NS nowhere.nosuch.test.\n" % AUTHORITY
ZONE_HEAD = "$ORIGIN %s\n$TTL 300\n@ SOA ns.test. root.ns.test. 1 3600 900 604800 60\n@ NS ns.test.\n"


class NameServers:
    """nsd with the zones, from the root down; unbound in front of it, which the other hosts ask."""

    def __init__(self, network):
        self.network, self.folder = network, network.folder / "dns"
        self.folder.mkdir()
        self.write_zones()
        authority = self.write("nsd.conf", self.authority_settings())
        self.write("hints", ". 3600 NS ns.test.\nns.test. 3600 A %s\n" % AUTHORITY)
        resolver = self.write("unbound.conf", self.resolver_settings())
        network.serve("dns", ["nsd", "-d", "-c", authority])
        lab.until(lambda: self.answers(AUTHORITY), 20, "nsd")
        network.serve("dns", ["unbound", "-d", "-c", resolver])
        lab.until(lambda: self.answers(RESOLVER), 20, "unbound")

    def write(self, name, text):
        path = self.folder / name
        path.write_text(text)
        return path

    def write_zones(self):
        delegations = "".join("%s NS ns.test.\n" % zone.split(".")[0] for zone in ZONES)
        self.write("zone.", ZONE_HEAD % "." + "test NS ns.test.\nns.test A %s\n" % AUTHORITY)
        self.write("zone.test", ZONE_HEAD % "test." + IN_TEST + delegations)
        for zone, records in ZONES.items():
            self.write("zone." + zone, ZONE_HEAD % (zone + ".") + records + "\n")

    def authority_settings(self):
        zones = "".join('zone:\n name: "%s"\n zonefile: "%s"\n' % (zone, self.folder / ("zone." + zone.strip(".")))
                        for zone in (".", "test", *ZONES))
        return """server:
 ip-address: %s
 username: ""
 chroot: ""
 zonesdir: "%s"
 database: ""
 pidfile: "nsd.pid"
 xfrdfile: "xfrd.state"
 zonelistfile: "zone.list"
 xfrdir: "%s"
 server-count: 1
remote-control:
 control-enable: no
%s""" % (AUTHORITY, self.folder, self.folder, zones)

    def resolver_settings(self):
        return """server:
 interface: %s
 access-control: 192.0.2.0/24 allow
 username: ""
 chroot: ""
 directory: "%s"
 pidfile: "unbound.pid"
 use-syslog: no
 root-hints: "hints"
 module-config: "iterator"
 do-not-query-localhost: no
 num-threads: 1
 do-daemonize: no
 max-udp-size: 1232
 local-zone: "test." nodefault
remote-control:
 control-enable: no
""" % (RESOLVER, self.folder)

    def answers(self, server):
        """Return whether a name server knows the address of the last zone's exchanger."""
        with self.network.inside("sender"):
            return ask(server, "mx.postfix.test") == [POSTFIX]


def ask(server, name, seconds=1):
    """Return the IPv4 addresses that a name server gives for a name, [] when it gives none (RFC 1035 section 4.1)."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    query = struct.pack("!6H", os.getpid() & 0xFFFF, 0x100, 1, 0, 0, 0) + labels + struct.pack("!BHH", 0, 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(seconds)
        try:
            client.connect((server, 53))
            client.send(query)
            answer = client.recv(4096)
        except OSError:
            return []
    marker = struct.pack("!HHH", 0xC00C, 1, 1)  # the name asked for, type A, class IN; then TTL and length
    pieces = answer[len(query):].split(marker)[1:]
    return [socket.inet_ntoa(piece[6:10]) for piece in pieces if piece[4:6] == b"\0\4"]


class OddNameServer:
    """A name server on an address of the host "peer"; `answer(query, tcp)` returns the packets that it answers with."""

    def __init__(self, network, address, answer):
        self.answer = answer
        with network.inside("peer"):
            family, _, _, _, place = socket.getaddrinfo(address, 53, flags=socket.AI_NUMERICHOST)[0]
            self.udp = socket.socket(family, socket.SOCK_DGRAM)
            self.udp.bind(place)
            self.tcp = socket.create_server(place, family=family)
        for serve in (self.serve_udp, self.serve_tcp):
            threading.Thread(target=serve, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sock in (self.udp, self.tcp):
            with contextlib.suppress(OSError):      # a UDP socket that is not connected says so, and wakes nevertheless
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def serve_udp(self):
        with contextlib.suppress(OSError):          # closed
            while True:
                packet, client = self.udp.recvfrom(4096)
                for answer in self.answer(Query(packet), False) if packet else ():
                    self.udp.sendto(answer, client)

    def serve_tcp(self):
        with contextlib.suppress(OSError):
            while True:
                with self.tcp.accept()[0] as connection, connection.makefile("rb") as stream:
                    (size,) = struct.unpack("!H", stream.read(2))
                    for answer in self.answer(Query(stream.read(size)), True):
                        connection.sendall(struct.pack("!H", len(answer)) + answer)


class Query:
    """A question as a name server sees it (RFC 1035 section 4.1), and the packets to answer it with."""

    TYPES = {"A": 1, "NS": 2, "CNAME": 5, "SOA": 6, "MX": 15, "AAAA": 28, "OPT": 41}

    def __init__(self, packet):
        labels, at = [], 12
        while packet[at]:
            labels.append(packet[at + 1:at + 1 + packet[at]].decode().lower())
            at += packet[at] + 1
        self.id, self.question, self.name = packet[:2], packet[12:at + 5], ".".join(labels)
        self.type, self.edns = struct.unpack("!H", packet[at + 1:at + 3])[0], packet[11] > 0

    def reply(self, answer=(), authority=(), additional=(), rcode=0, flags=0x8180, question=None):
        """Return a response; `flags` are 0x0080 RA, 0x0100 RD, 0x0200 TC, 0x0400 AA, 0x8000 always."""
        counts = len(answer), len(authority), len(additional)
        return self.id + struct.pack("!5H", flags | rcode, 1, *counts) + (question or self.question) + b"".join(
            [*answer, *authority, *additional])

    def record(self, kind, value="", name=None, ttl=60):
        """Return a record of an address (A), of a host (MX 10), or of a name; a SOA has "nothing" remembered for 5 s."""
        data = wire_name(value)
        if kind == "A":
            data = socket.inet_aton(value)
        elif kind == "MX":
            data = b"\0\x0a" + data
        elif kind == "SOA":
            data = wire_name("ns.odd.test") * 2 + struct.pack("!5I", 1, 60, 60, 600, 5)
        elif kind == "OPT":                         # version 0, unless value says that it is not known
            return struct.pack("!BHHBBHH", 0, 41, 1232, 1 if value == "BADVERS" else 0, 0, 0, 0)
        return wire_name(name or self.name) + struct.pack("!HHIH", self.TYPES[kind], 1, ttl, len(data)) + data


def wire_name(name):
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".") if label) + b"\0"


# Postfix

class Postfix:
    """A Postfix of its own on the host "mx": takes mail for `users` into Maildirs, and sends for its own machine."""

    def __init__(self, network, domains, users, certificate):
        self.network, self.folder, self.domains = network, network.folder / "postfix", domains
        self.mail = self.folder / "mail"
        for path in (self.folder, self.mail, self.folder / "queue", self.folder / "data", self.folder / "etc"):
            path.mkdir()
        self.folder.chmod(0o755)
        shutil.chown(self.mail, "nobody")
        shutil.chown(self.folder / "data", "postfix")
        self.write("users", "".join("%s %s/%s/\n" % (user, *reversed(user.split("@"))) for user in users))
        self.write("main.cf", self.settings(*certificate))
        self.write("master.cf", self.services())
        environment = lab.clean_environment(self.folder)
        lab.run(["postfix", "-c", self.folder / "etc", "check"], environment=environment)  # makes the queue's folders
        # "postfix start" would put the master out of our reach
        master = lab.run(["postconf", "-h", "daemon_directory"]).decode().strip() + "/master"
        self.process = network.serve("mx", [master, "-d", "-c", self.folder / "etc"], env=environment)
        lab.until(lambda: network.accepts("mx", "127.0.0.1", 25), 30, "Postfix")

    def write(self, name, text):
        (self.folder / "etc" / name).write_text(text)

    def settings(self, certificate, key):
        """Timeouts and waits are short, so that what takes Postfix hours elsewhere takes seconds here."""
        timeouts = "".join("smtp_%s_timeout = 6s\n" % step for step in (
            "connect", "helo", "starttls", "mail", "rcpt", "data_init", "data_xfer", "data_done", "rset", "quit"))
        return timeouts + """
compatibility_level = 3.6
queue_directory = {0}/queue
data_directory = {0}/data
maillog_file = {0}/log
maillog_file_prefixes = {0}
myhostname = mx.postfix.test
mydestination =
local_recipient_maps =
alias_maps =
alias_database =
inet_interfaces = all
inet_protocols = {1}
mynetworks = 127.0.0.0/8
smtpd_relay_restrictions = permit_mynetworks, reject_unauth_destination
smtpd_client_connection_count_limit = 0
virtual_mailbox_domains = {2}
virtual_mailbox_base = {0}/mail
virtual_mailbox_maps = texthash:{0}/etc/users
virtual_uid_maps = static:65534
virtual_gid_maps = static:65534
virtual_mailbox_limit = 0
message_size_limit = 20000000
smtpd_tls_security_level = may
smtpd_tls_cert_file = {3}
smtpd_tls_key_file = {4}
smtpd_tls_received_header = yes
smtp_tls_security_level = may
smtputf8_enable = yes
minimal_backoff_time = 1s
maximal_backoff_time = 2s
queue_run_delay = 1s
max_idle = 1s
""".format(self.folder, "all" if IPV6 else "ipv4", " ".join(self.domains), certificate, key)

    def services(self):
        """Return master.cf: what a message passes through, nothing in a chroot.

        postlogd stays: when one ends, what the others log meanwhile can fill its socket, and then they wait for ever.
        """
        rows = ["smtp inet n - n - - smtpd", "pickup unix n - n 60 1 pickup", "qmgr unix n - n 300 1 qmgr",
                "tlsmgr unix - - n 1000? 1 tlsmgr", "proxymap unix - - n - - proxymap",
                "postlog unix-dgram n - n - 1 postlogd -o max_idle=1h", "cleanup unix n - n - 0 cleanup",
                "rewrite unix - - n - - trivial-rewrite", "showq unix n - n - - showq", "anvil unix - - n - 1 anvil",
                "virtual unix - n n - - virtual", "flush unix n - n 1000? 0 flush", "scache unix - - n - 1 scache",
                "error unix - - n - - error", "retry unix - - n - - error", "smtp unix - - n - - smtp",
                "relay unix - - n - - smtp", "verify unix - - n - 1 verify"]
        rows += ["%s unix - - n - 0 bounce" % name for name in ("bounce", "defer", "trace")]
        return "".join(row + "\n" for row in rows)

    def senders(self):
        """Return the pids of its clients, which read resolv.conf when they start; they end a second after their work."""
        children = Path("/proc/%d/task/%d/children" % ((self.process.pid,) * 2)).read_text().split()
        with contextlib.suppress(OSError):          # one ends meanwhile: look again
            return [pid for pid in children if Path("/proc", pid, "comm").read_text() == "smtp\n"]
        return children

    def stored(self, address):
        """Return the contents of an address's messages."""
        local, _, domain = address.partition("@")
        return [path.read_bytes() for path in lab.files(self.mail / domain / local / "new")]

    def log(self):
        """Return what it logged."""
        return (self.folder / "log").read_text(errors="backslashreplace")


# Scripted peers

DROP = "drop"


class Peer:
    """An SMTP server of few words on one address of the host "peer", whose every reply can be scripted.

    `answer(line)` sees "CONNECT", each command, and "." for the end of a message, and returns the reply to give instead of the
    good one, DROP to close the connection without a word, or None. With `extensions` None it knows no EHLO.
    `messages` collects (sender, recipients, content) of what it answered 250, `lines` all it was told.
    """

    EXTENSIONS = ("PIPELINING", "8BITMIME", "ENHANCEDSTATUSCODES", "SMTPUTF8")

    def __init__(self, network, address, answer=lambda line: None, extensions=EXTENSIONS):
        self.answer, self.extensions = answer, extensions
        self.messages, self.lines, self.connections = [], [], []
        with network.inside("peer"):
            self.listener = socket.create_server((address, 25))
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Hang up on everybody."""
        for connection in [self.listener, *self.connections]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                connection = self.listener.accept()[0]
                self.connections.append(connection)
                threading.Thread(target=self.talk, args=(connection,), daemon=True).start()

    def talk(self, connection):
        """One session; any trouble with the connection ends it."""
        with contextlib.suppress(OSError, EOFError), connection, connection.makefile("rb") as stream:
            connection.settimeout(60)
            self.say(connection, self.answer("CONNECT") or "220 peer.test ESMTP")
            sender, recipients = None, []
            while True:
                line = read_line(stream).decode("utf-8", "backslashreplace")
                self.lines.append(line)
                verb, argument = line[:4].upper(), line.partition(":")[2].partition(">")[0].strip(" <")
                reply = self.answer(line) or self.good_reply(verb)
                if verb == "MAIL" and reply.startswith("250"):
                    sender, recipients = argument, []
                if verb == "RCPT" and reply.startswith("250"):
                    recipients = [*recipients, argument]
                if verb == "DATA" and not recipients:
                    reply = "554 5.5.1 no recipients"
                self.say(connection, reply)
                if verb == "QUIT":
                    return
                if verb == "DATA" and reply.startswith("354"):
                    content = read_message(stream)
                    reply = self.answer(".") or "250 2.0.0 taken"
                    if reply.startswith("250"):
                        self.messages.append((sender, recipients, content))
                    self.say(connection, reply)

    def say(self, connection, reply):
        if reply == DROP:
            raise EOFError
        connection.sendall(reply.encode() + b"\r\n")

    def good_reply(self, verb):
        """Return what a server says that takes everything."""
        if verb == "EHLO":
            if self.extensions is None:
                return "500 what?"
            words = ["peer.test", *self.extensions]
            return "\r\n".join("250%s%s" % (" " if word is words[-1] else "-", word) for word in words)
        return {"HELO": "250 peer.test", "DATA": "354 go on", "QUIT": "221 2.0.0 bye"}.get(
            verb, "250 2.0.0 fine" if verb in ("MAIL", "RCPT", "RSET", "NOOP") else "500 5.5.1 what?")


def read_line(stream):
    line = stream.readline(1 << 20)
    if not line.endswith(b"\r\n"):
        raise EOFError
    return line[:-2]


def read_message(stream):
    """Return a message's content, without the transparency of dots."""
    lines = []
    while True:
        line = read_line(stream)
        if line == b".":
            return b"".join(line + b"\r\n" for line in lines)
        lines.append(line[1:] if line.startswith(b".") else line)


def greylist():
    """Return an `answer` that puts each pair of sender and recipient off once, as greylisting servers do."""
    seen, sender = set(), [""]

    def answer(line):
        if line.upper().startswith("MAIL"):
            sender[0] = line
        if line.upper().startswith("RCPT") and (sender[0], line) not in seen:
            seen.add((sender[0], line))
            return "451 4.7.1 greylisted, come back later"
        return None
    return answer


# minimail

class Node(lab.Node):
    """A minimail on a host. It is in node mode when the options say so; `before(data)` may prepare its data folder."""

    def __init__(self, network, host, *options, before=None, wrapper=(), **environment):
        words = list(options)
        for option, value in (("--smtp", "0.0.0.0:25"), ("--pop3", "0.0.0.0:110"), ("--dns", RESOLVER)):
            if option not in words:
                words += [option, value]
        super().__init__(*words, environment=lab.clean_environment("/", **environment))
        self.network, self.host, self.wrapper, self.before = network, host, list(wrapper), before
        self.address = HOSTS[host][0]

    def command(self, *words):
        """The wrapper is for the node itself, whose words begin with an option, not for commands beside it."""
        wrapper = self.wrapper if words[0].startswith("-") else []
        return self.network.command(self.host, *wrapper, *super().command(*words))

    def start(self):
        if self.before and not self.data.exists():
            self.data.mkdir(0o700)
            self.before(self.data)
        super().start()

    def run(self, *words, **more):
        """Run a command of minimail on this node's data, beside the running node or without one."""
        return lab.run(self.command(*words), environment=self.environment, **more)

    def cut(self):
        """End it as a power failure would."""
        lab.end_group(self.process)


def make_certificate(folder, *names):
    """Return the files of a self-signed certificate for host names, and of its key."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    lab.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-days", "2", "-subj", "/CN=" + names[0], "-addext", "subjectAltName=" + ",".join("DNS:" + n for n in names),
             "-out", certificate, "-keyout", key])
    return certificate, key


def main():
    """Bring up the network for a look around."""
    began = time.monotonic()
    with Network() as network:
        NameServers(network)
        certificate = make_certificate(network.folder, "mx.postfix.test")
        Postfix(network, ["postfix.test"], ["carol@postfix.test"], certificate)
        print("ready after %.1f s; files are in %s" % (time.monotonic() - began, network.folder))
        for host in HOSTS:
            print("%-9s %s" % (host, " ".join(network.command(host, "bash"))), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
