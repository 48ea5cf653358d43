"""Two nodes on two hosts share one --data on a network file system: load, locks, who wakes whom, and what breaks.

    python3 .ci/check_growth.py [--on cephfs glusterfs moosefs] [--letters N] [-v] [Class[.test]]

The hosts are network namespaces of this machine, each with a mount of its own by FUSE; the storage servers live in a third.
Needs root, /dev/fuse, and what ".ci/install.sh NAME..." installs. Loopback and cables made here only. Without --on it is
MooseFS, which the README names.
"""
# time limit: 300
import argparse
import atexit
import contextlib
import http.client
import json
import os
import poplib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import uuid
from pathlib import Path

import check_crash
import lab
import netlab
from check_crash import FAR, LOCAL, Letter, Load, Sink, node_mode, stored

STORE, HOSTS = "10.99.0.1", {"one": "10.99.0.11", "two": "10.99.0.12"}
# When MooseFS loses an answer about where to write, it keeps that piece of a file locked for two minutes: until then fsync()
# waits, and cannot be interrupted (one pulled cable in five). It keeps the locks of a mount that is gone for one.
PATIENCE = 200                                      # seconds
LETTERS = 200                                       # as many as every run of CI has time for; --letters says otherwise


# Hosts and what they share

class Cables:
    """Network namespaces for the storage servers and two hosts, with a cable to each that can be pulled."""

    def name(self, host):
        return "growth-%d-%s" % (os.getpid(), host)

    def __enter__(self):
        try:
            netlab.ip([], ["netns add " + self.name(host) for host in ("store", *HOSTS)])
            lines = ["link set lo up", "link add bridge type bridge", "link set bridge up",
                     "addr add %s/24 dev bridge" % STORE]
            for host in HOSTS:
                lines += ["link add to-%s type veth peer name eth0 netns %s" % (host, self.name(host)),
                          "link set to-%s master bridge up" % host]
            netlab.ip(["-n", self.name("store")], lines)
            for host, address in HOSTS.items():
                netlab.ip(["-n", self.name(host)], ["link set lo up", "link set eth0 up", "addr add %s/24 dev eth0" % address])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for host in ("store", *HOSTS):
            if Path("/run/netns", self.name(host)).exists():
                subprocess.run(["ip", "netns", "delete", self.name(host)], check=True)

    def command(self, host, *words):
        """Return the command line that runs a program on a host; mounts are seen by all (ip netns exec would hide them)."""
        return ["nsenter", "--net=/run/netns/" + self.name(host), *map(str, words)]

    def plug(self, host, connected):
        """Plug a host's cable in, or pull it out."""
        netlab.ip(["-n", self.name("store")], ["link set to-%s %s" % (host, "up" if connected else "down")])


class Engine:
    """A network file system with two storage servers and a mount for each host."""

    programs = ()
    servers = ()                                    # the storage servers, by what names them
    heart = None                                    # the one server without which there is nothing
    tells_health = False                            # heal() is to be had

    def __init__(self, place, cables):
        self.place, self.cables = place, cables
        self.mounts = {host: place / ("mount-" + host) for host in HOSTS}
        self.clients = {}
        self.running = {}
        self.over = threading.Event()
        self.watching = threading.Thread(target=self.watch_heart, daemon=True)
        for path in self.mounts.values():
            path.mkdir()

    def __enter__(self):
        try:
            self.start()
            self.watching.start()
            for host in HOSTS:
                self.mount(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.over.set()
        if self.watching.ident:
            self.watching.join()
        for host in HOSTS:
            self.unmount(host)
        self.stop()

    def start(self):
        """Start all servers."""

    def stop(self):
        """End all servers."""
        for process in self.running.values():
            lab.end_group(process)

    def run(self, host, *words, seconds=60):
        """Run a command on a host to its end and return what it prints."""
        return lab.run(self.cables.command(host, *words), seconds=seconds, environment=self.environment()).decode()

    def environment(self):
        return dict(os.environ)

    def serve(self, name, host, *words):
        """Start a program that stays, under a name."""
        with open(self.place / (name + ".log"), "ab") as log:
            self.running[name] = lab.start(self.cables.command(host, *words), stdin=subprocess.DEVNULL, stdout=log,
                                           stderr=log, env=self.environment())

    def client(self, host):
        """Return the command line of the program that carries a host's mount, in the foreground."""
        raise NotImplementedError

    def mount(self, host):
        """Mount a host's view; return when it is usable."""
        name = "client-" + host
        deadline = time.monotonic() + 60
        while True:
            self.serve(name, host, *self.client(host))
            with contextlib.suppress(AssertionError):
                lab.until(lambda: self.is_mounted(host) or self.running[name].poll() is not None, 30, "the mount of " + host)
            if self.is_mounted(host):
                return
            lab.end_group(self.running.pop(name))
            assert time.monotonic() < deadline, (self.place / (name + ".log")).read_text(errors="replace")[-3000:]

    def is_mounted(self, host):
        with contextlib.suppress(OSError):
            return os.path.ismount(str(self.mounts[host])) and bool(os.statvfs(str(self.mounts[host])))
        return False

    def kill_client(self, host):
        """kill -9 of what carries a mount: from then on it answers nothing but errors."""
        lab.end_group(self.running.pop("client-" + host))

    def unmount(self, host):
        """Take a mount away, whatever state it is in."""
        if "client-" + host in self.running:
            self.kill_client(host)
        subprocess.run(["umount", "--lazy", str(self.mounts[host])], stderr=subprocess.DEVNULL)

    def kill_server(self, name):
        """kill -9 of a storage server."""
        lab.end_group(self.running.pop(name))

    def start_server(self, name):
        """Start a storage server again."""
        raise NotImplementedError

    def watch_heart(self):
        """Start the one server again when it ends by itself, as systemd would.

        MooseFS 3.0.117's master once died of SIGSEGV just after a start from its change log, of some thirty such starts.
        """
        while not self.over.wait(0.2):
            process = self.running.get(self.heart)
            if process and process.poll() is not None:
                print("%s ended with status %d, and is started again" % (self.heart, process.returncode))
                self.start_server(self.heart)

    def heal(self):
        """Return once both storage servers have everything."""


class GlusterFS(Engine):
    """Two bricks that mirror each other, and an arbiter, which has names only and decides who is right; one glusterd."""

    programs = ("glusterd", "gluster", "glusterfs")
    servers = ("brick1", "brick2")
    tells_health = True
    SETTINGS = ("performance.quick-read", "off", "performance.open-behind", "off", "performance.stat-prefetch", "off",
                "performance.io-cache", "off", "cluster.heal-timeout", "5", "network.ping-timeout", "5",
                "server.keepalive-time", "2", "server.keepalive-interval", "1", "server.keepalive-count", "3",
                "server.tcp-user-timeout", "5")

    def start(self):
        bricks = [*self.servers, "arbiter"]
        for name in ("work", "run", *bricks):
            (self.place / name).mkdir()
        (self.place / "glusterd.vol").write_text("""volume management
 type mgmt/glusterd
 option working-directory {0}/work
 option run-directory {0}/run
 option glusterd-sockfile {0}/socket
 option transport-type socket
 option transport.socket.listen-port 24007
 option transport.socket.bind-address {1}
 option max-port 60999
end-volume
""".format(self.place, STORE))
        self.serve("glusterd", "store", "glusterd", "-N", "-f", self.place / "glusterd.vol", "-p", self.place / "pid",
                   "-l", self.place / "glusterd.log")
        lab.until(self.is_up, 30, "glusterd")
        self.gluster("volume", "create", "mail", "replica", "3", "arbiter", "1",
                     *("%s:%s" % (STORE, self.place / name) for name in bricks), "force")
        for name, value in zip(self.SETTINGS[::2], self.SETTINGS[1::2]):
            self.gluster("volume", "set", "mail", name, value)
        self.gluster("volume", "start", "mail")

    def gluster(self, *words):
        return self.run("store", "gluster", "--mode=script", "--glusterd-sock=%s/socket" % self.place, *words)

    def is_up(self):
        try:
            return self.gluster("volume", "info") or True
        except AssertionError:
            return False

    def client(self, host):
        return ["glusterfs", "-N", "-s", STORE, "--volfile-id=mail", "--attribute-timeout=0", "--entry-timeout=0",
                "-l", self.place / ("client-%s.log" % host), self.mounts[host]]

    def pids(self):
        """Return the processes that glusterd started, by the name of their pid file."""
        return {path.name: int(path.read_text()) for path in (self.place / "run").rglob("*.pid") if path.read_text().strip()}

    def kill_server(self, name):
        for file, pid in self.pids().items():
            if file.endswith(name + ".pid"):
                os.kill(pid, signal.SIGKILL)

    def start_server(self, name):
        self.gluster("volume", "start", "mail", "force")

    def heal(self):
        lab.until(lambda: not self.unhealed(), 90, "healed bricks")

    def unhealed(self):
        """Return what the bricks note as not being everywhere; "gluster volume heal mail info" wants another socket."""
        return [path for path in self.place.glob("*/.glusterfs/indices/*/*")
                if not path.name.startswith(path.parent.name + "-")]

    def stop(self):
        pids = self.pids()
        super().stop()
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class MooseFS(Engine):
    """A master, and two chunk servers that both have everything (goal 2)."""

    programs = ("mfsmaster", "mfschunkserver", "mfsmount")
    servers = ("chunks1", "chunks2")
    heart = "master"

    def start(self):
        place = self.place
        for name in ("master", *self.servers, "disk-chunks1", "disk-chunks2"):
            (place / name).mkdir()
        (place / "master" / "metadata.mfs").write_bytes(b"MFSM NEW")
        (place / "exports").write_text("* / rw,alldirs,maproot=0,mingoal=2\n")
        (place / "topology").write_text("")
        common = "WORKING_USER = root\nWORKING_GROUP = root\n"
        (place / "master.cfg").write_text(common + "DATA_PATH = {0}/master\nEXPORTS_FILENAME = {0}/exports\n"
                                          "TOPOLOGY_FILENAME = {0}/topology\nSESSION_SUSTAIN_TIME = 60\n"
                                          "CHANGELOG_SAVE_MODE = 2\n".format(place))
        self.start_server("master")
        for number, name in enumerate(self.servers):
            (place / (name + ".disks")).write_text("%s/disk-%s\n" % (place, name))
            (place / (name + ".cfg")).write_text(common + (
                "DATA_PATH = {0}/{1}\nHDD_CONF_FILENAME = {0}/{1}.disks\nMASTER_HOST = {2}\nCSSERV_LISTEN_PORT = {3}\n"
                "HDD_LEAVE_SPACE_DEFAULT = 64MiB\nHDD_FSYNC_BEFORE_CLOSE = 1\n").format(place, name, STORE, 9432 + number))
            self.start_server(name)

    def start_server(self, name):
        program = ["mfsmaster", "-a"] if name == "master" else ["mfschunkserver"]   # -a: after a crash, from its change log
        self.serve(name, "store", *program, "-f", "-c", self.place / (name + ".cfg"), "start")

    def client(self, host):
        return ["mfsmount", "-f", "-o", "mfsattrcacheto=0,mfsentrycacheto=0,mfsdirentrycacheto=0", "-H", STORE,
                self.mounts[host]]

    def is_mounted(self, host):
        with contextlib.suppress(OSError):
            return super().is_mounted(host) and os.statvfs(str(self.mounts[host])).f_blocks > 0
        return False


class CephFS(Engine):
    """A monitor, a metadata server, and two OSDs that both have everything.

    What waits for a change that is not in the metadata server's journal yet may wait for its tick: by default 5 seconds.
    """

    programs = ("ceph-mon", "ceph-osd", "ceph-mds", "ceph-fuse", "ceph")
    servers = ("osd0", "osd1")

    def environment(self):
        return dict(os.environ, CEPH_CONF=str(self.place / "ceph.conf"))

    def start(self):
        place = self.place
        for name in ("mon", "mds", "run", *self.servers):
            (place / name).mkdir()
        (place / "ceph.conf").write_text("""[global]
fsid = {0}
mon_host = v2:{1}:3300
public_network = 10.99.0.0/24
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
run_dir = {2}/run
admin_socket = {2}/run/$name.$pid.asok
log_file = {2}/$name.log
crash_dir = {2}
mon_data = {2}/mon
mds_data = {2}/mds
osd_data = {2}/osd$id
osd_pool_default_size = 2
osd_pool_default_min_size = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
bluestore_block_size = 8589934592
mon_osd_min_down_reporters = 1
osd_heartbeat_interval = 2
osd_heartbeat_grace = 6
mon_osd_adjust_heartbeat_grace = false
mon_data_avail_crit = 1
mds_tick_interval = 0.5
client_reconnect_stale = true
mds_session_blocklist_on_timeout = false
""".format(uuid.uuid4(), STORE, place))
        address = "v2:%s:3300" % STORE
        self.run("store", "ceph-mon", "--mkfs", "-i", "a", "--public-addr", address)
        self.serve("mon", "store", "ceph-mon", "-f", "-i", "a", "--public-addr", address)
        for number, name in enumerate(self.servers):
            id = str(uuid.uuid4())
            self.run("store", "ceph", "osd", "new", id, number)
            self.run("store", "ceph-osd", "-i", number, "--mkfs", "--osd-uuid", id)
            self.start_server(name)
        self.serve("mds", "store", "ceph-mds", "-f", "-i", "a")
        for words in (["osd", "pool", "create", "meta", "8"], ["osd", "pool", "create", "data", "8"],
                      ["fs", "new", "mail", "meta", "data"], ["fs", "set", "mail", "session_timeout", "30"]):
            self.run("store", "ceph", *words)
        lab.until(lambda: "up:active" in self.run("store", "ceph", "mds", "stat"), 60, "the metadata server")

    def start_server(self, name):
        self.serve(name, "store", "ceph-osd", "-f", "-i", name[-1])
        lab.until(lambda: self.is_up(name), 60, name)

    def is_up(self, name):
        found = json.loads(self.run("store", "ceph", "osd", "dump", "-f", "json"))["osds"]
        return any(osd["osd"] == int(name[-1]) and osd["up"] for osd in found)

    def client(self, host):
        return ["ceph-fuse", "-f", "-n", "client." + host, self.mounts[host]]


ENGINES = {engine.__name__.lower(): engine for engine in (CephFS, GlusterFS, MooseFS)}


# What holds on all of them

def waits_for_storage(node):
    """Return whether a thread of a node waits for what carries its mount, at this moment."""
    for task in Path("/proc/%d/task" % node.process.pid).iterdir():
        with contextlib.suppress(OSError):          # one that has ended
            if (task / "wchan").read_text() == "request_wait_answer":
                return True
    return False


class Growth(check_crash.Case):
    """Two nodes on two hosts; each test has a data directory of its own."""

    engine = None                                   # set by each engine's class

    @classmethod
    def setUpClass(cls):
        began = time.monotonic()
        cls.contexts = contextlib.ExitStack()
        atexit.register(cls.contexts.close)         # out of time: unittest then calls neither tearDownClass() nor cleanups
        try:
            cls.place = cls.contexts.enter_context(lab.folder())
            cls.cables = cls.contexts.enter_context(Cables())
            cls.shared = cls.contexts.enter_context(cls.engine(cls.place, cls.cables))
        except BaseException:
            cls.tearDownClass()
            raise
        tempfile.tempdir = str(cls.place)           # what the nodes have on the local disk goes with it
        print("%s: mounted twice after %.1f s" % (cls.__name__, time.monotonic() - began))

    @classmethod
    def tearDownClass(cls):
        tempfile.tempdir = None
        cls.contexts.close()
        atexit.unregister(cls.contexts.close)

    def setUp(self):
        self.began = time.monotonic()
        self.addCleanup(lambda: print("%s %.1f s" % (self.id(), time.monotonic() - self.began)))

    def data(self, host):
        return self.shared.mounts[host] / self._testMethodName

    def on(self, host, *options):
        """Start a node on a host."""
        return self.node(*options, "--hostname", host + ".test", data=self.data(host))

    def pair(self, *sinks, options=()):
        return [self.on(host, *node_mode(*sinks), *options) for host in HOSTS]

    def wait_for_empty_queue(self, node, seconds=PATIENCE):
        lab.until(lambda: not [path for path in node.queue() if path.suffix != ".msg"], seconds, "an empty queue")

    def wait_for_the_end(self, *nodes):
        """Return once everything is sent, and no node waits for the storage: it could not be ended then."""
        self.wait_for_empty_queue(nodes[0])
        lab.until(lambda: not any(map(waits_for_storage, nodes)), PATIENCE, "an answer of the storage")

    # Load.

    def test_a_load(self):
        """Both nodes take local and relayed mail; nothing is lost, nothing comes twice."""
        sinks = [self.enter(Sink()), self.enter(Sink())]
        one, two = self.pair(*sinks)
        began = time.monotonic()
        with Load([one.smtp, two.smtp], clients=10, limit=LETTERS) as load:
            load.join(200)
        took = time.monotonic() - began
        self.wait_for_empty_queue(one)
        self.assertEqual(len(load.answered), LETTERS)
        self.check_ledger(one, load.letters, sinks)
        self.assertEqual(stored(one), stored(two), "both hosts see the same")
        for sink in sinks:
            self.assertEqual(set(sink.count().values()), {1})
        print("load: %d letters through two nodes in %.1f s" % (LETTERS, took))
        two.stop()
        self.check_clean(one)

    # POP3.

    def test_b_pop3(self):
        """A session here is one there; what one host delivers or deletes the other sees at its next log-in."""
        one, two = self.pair()
        box = LOCAL[0]
        self.send_all(one.smtp, [Letter("P%d" % n, [box]) for n in range(5)])
        for turn in range(6):
            if turn % 3 == 2:
                threading.Event().wait(3)           # in which both come to remember the listing
                for node in (one, two):
                    node.fetch(box).quit()
            here, there = (one, two) if turn % 2 else (two, one)
            holder = here.fetch(box)
            with self.assertRaisesRegex(poplib.error_proto, "IN-USE"):
                there.fetch(box)
            holder.dele(1)
            holder.quit()
            self.assertEqual(self.names(there, box), ["P%d" % n for n in range(turn + 1, turn + 5)])
            self.send_all(here.smtp, [Letter("P%d" % (turn + 5), [box])])
            self.assertEqual(self.names(there, box), ["P%d" % n for n in range(turn + 1, turn + 6)])
        holder = one.fetch(box)
        one.kill()
        holder.close()
        lab.until(lambda: self.gets(two, box), 60, "the mailbox of a node that was killed")

    def gets(self, node, box):
        with contextlib.suppress(poplib.error_proto):
            node.fetch(box).quit()
            return True
        return False

    def names(self, node, box):
        """Return the names of the letters that a POP3 client of a node sees, in order."""
        client = node.fetch(box)
        found = [check_crash.NAME.search(b"\n".join(client.retr(n + 1)[1])).group(1).decode() for n in range(client.stat()[0])]
        client.quit()
        return found

    # Who notices what.

    def test_c_wake(self):
        """What one host takes wakes those who wait on the other, though stamps may be as coarse as a second."""
        port = lab.free_port()
        sink = self.enter(Sink())
        one = self.on("one", *node_mode(sink))
        self.on("two", *node_mode(sink), "--web", "127.0.0.1:%d" % port)
        waits = []
        for number in range(4):
            name = "W%d" % number
            waiting = threading.Thread(target=self.wait_at, args=(port, name, waits), daemon=True)
            waiting.start()
            threading.Event().wait(0.35)            # in which it has looked once
            self.send_all(one.smtp, [Letter(name, [LOCAL[0]])])
            sent = time.monotonic()
            waiting.join(60)
            self.assertEqual(len(waits), number + 1, "nobody was told of %s" % name)
            waits[-1] -= sent
        print("wait on the other host: %s s" % " ".join("%.1f" % seconds for seconds in waits))
        self.assertLess(max(waits), 15, "not before it asked anew")
        one.stop()                                  # now only the other host sends what is put into the queue here
        took = []
        for number in range(4):
            lab.run([sys.executable, lab.MINIMAIL, "--data", self.data("one"), "sendmail", "-i", "-f", "load@sender.test",
                     FAR], Letter("Q%d" % number, [FAR]).content())
            queued = time.monotonic()
            lab.until(lambda: sink.count()["Q%d" % number, FAR], 30, "Q%d" % number)  # noqa: B023
            took.append(time.monotonic() - queued)
            threading.Event().wait(0.1 * number)    # so that several come within a second, and some do not
        print("queue on the other host: %s s" % " ".join("%.1f" % seconds for seconds in took))
        self.assertLess(max(took), 15, "not before it looked for what nobody knows of")

    def wait_at(self, port, name, waits):
        """Ask a node for a letter that has not come yet; note when it said so."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=150)
        connection.request("GET", "/api/v1/wait?timeout=20&query=subject:" + name)
        if connection.getresponse().status == 200:
            waits.append(time.monotonic())
        connection.close()

    # Nodes that die.

    def test_d_take_over(self):
        """A node dies in the middle of sending: the other sends what it had, and nothing again but what was in flight."""
        sink = self.enter(Sink())
        stalled = check_crash.stall_first_node(self, sink, 60)
        one, two = self.pair(sink)
        self.send_all(one.smtp, [Letter("T%02d" % n, [FAR]) for n in range(20)])
        self.assertTrue(stalled.wait(60))
        threading.Event().wait(2)
        self.assertEqual(sink.count(), {}, "the first node lives")
        one.kill()
        killed = time.monotonic()
        lab.until(lambda: sum(sink.count().values()), 30, "that the other node takes over")
        took = time.monotonic() - killed
        lab.until(lambda: sum(sink.count().values()) == 20, 60, "that the other node sends it all")
        print("taken over after %.1f s, all 20 sent after %.1f s" % (took, time.monotonic() - killed))
        self.assertLess(took, 25, "not before it looked for what nobody knows of")
        self.assertEqual(set(sink.count().values()), {1})
        held = {arrival.name for arrival in sink.arrivals if arrival.helo == "one.test"}
        again = {name for (name, _), count in sink.count(answered=False).items() if count > 1}
        self.assertEqual(again, held, "only what was in flight was sent again")

    # Storage that dies.

    def test_e_storage_server(self):
        """A storage server is killed under load and comes back; then it has everything, alone if need be."""
        sinks = [self.enter(Sink()), self.enter(Sink())]
        one, two = self.pair(*sinks)
        first, second = self.shared.servers
        with Load([one.smtp, two.smtp], clients=8, sizes=(0, 0, 3000)) as load:
            self.more(load, 20)
            self.shared.kill_server(first)
            self.more(load, 20)
            self.shared.start_server(first)
            self.more(load, 20)
        self.wait_for_the_end(one, two)
        self.check_ledger(one, load.letters, sinks)
        if self.shared.tells_health:
            self.shared.heal()
            self.shared.kill_server(second)
            self.check_ledger(two, load.letters, sinks)
            self.shared.start_server(second)
            self.shared.heal()
        print("a storage server killed: %d letters, %d with 250" % (len(load.letters), len(load.answered)))

    def more(self, load, count, seconds=90):
        """Return once so many more letters have their 250."""
        done = len(load.answered)
        lab.until(lambda: len(load.answered) >= done + count, seconds, "%d more letters" % count)

    def test_e_master(self):
        """The one server that all depends on is killed under load: both nodes wait for it, and lose nothing."""
        if not self.shared.heart:
            self.skipTest("there is none")
        one, two = self.pair()
        with Load([one.smtp, two.smtp], clients=8, kinds=[[LOCAL[0]], LOCAL], sizes=(0, 0, 3000)) as load:
            self.more(load, 20)
            self.shared.kill_server(self.shared.heart)
            lab.until(lambda: "out of reach" in one.log() and "out of reach" in two.log(), 60, "a word of it in both logs")
            self.shared.start_server(self.shared.heart)
            began = time.monotonic()
            lab.until(lambda: " is back after " in one.log() and " is back after " in two.log(), 60, "that it is back")
            self.more(load, 20)
        print("the master is back: mail after %.1f s" % (time.monotonic() - began))
        self.wait_for_the_end(two, one)
        self.check_ledger(two, load.letters)

    # Mounts that go away.

    def test_f_cable(self):
        """A host's cable is pulled under load, and plugged in again."""
        with self.outage() as one:
            self.addCleanup(self.cables.plug, "one", True)      # without it no node could be ended
            self.cables.plug("one", False)
            lab.until(lambda: "out of reach" in one.log(), 60, "a word of it in the log")
            threading.Event().wait(3)               # in which nothing more is to be said
            self.cables.plug("one", True)

    def test_g_client(self):
        """What carries a mount is killed; for a while there is no mount, and then one again.

        MooseFS keeps the locks of what was being sent for a minute: only in a long run mail is relayed here.
        """
        with self.outage(check_crash.KINDS if LETTERS > 1000 else [[LOCAL[0]], LOCAL]) as one:
            self.shared.kill_client("one")
            lab.until(lambda: "out of reach" in one.log(), 60, "a word of it in the log")
            self.shared.unmount("one")
            threading.Event().wait(3)               # in which it must not write to the disk beneath
            self.assertEqual(os.listdir(str(self.shared.mounts["one"])), [])
            self.shared.mount("one")

    @contextlib.contextmanager
    def outage(self, kinds=check_crash.KINDS):
        """Load while the first node's mount goes and comes back; then both go on, and nothing is lost."""
        sinks = [self.enter(Sink()), self.enter(Sink())]
        one, two = self.pair(*sinks)
        with Load([one.smtp, two.smtp], clients=8, kinds=kinds, sizes=(0, 0, 3000)) as load:
            self.more(load, 20)
            yield one
            began = time.monotonic()
            lab.until(lambda: " is back after " in one.log(), 90, "a word in the log that it is back")
            self.send_all(one.smtp, [Letter("back", [LOCAL[0]])])
            print("the node took mail again %.1f s after its mount was back" % (time.monotonic() - began))
            self.more(load, 20)
        self.wait_for_the_end(two, one)
        self.check_ledger(two, load.letters)
        lost = [(letter.name, far) for letter in load.answered for far in letter.remote()
                if not sum(sink.count()[letter.name, far] for sink in sinks)]
        self.assertEqual(lost, [], "answered with 250, and gone")
        again = [sent for sink in sinks for sent, count in sink.count().items() if count > 1]
        print("an outage: %d letters, %d with 250, %d sent again" % (len(load.letters), len(load.answered), len(again)))
        self.assertLessEqual(len(again), 20, "more than what was in flight when it was cut off")
        said = [line for line in one.log().splitlines() if "Z warning: " in line or "Z error: " in line]
        self.assertEqual(["out of reach" in line or "is back" in line for line in said], [True, True], said)
        self.assertNotIn("Traceback", one.log() + two.log())


def out_of_time(*_):
    """End all programs before anything is undone: what waits for a mount that does not answer would wait for too long."""
    lab.end_what_is_left()
    raise KeyboardInterrupt


def main():
    global LETTERS
    signal.signal(signal.SIGTERM, out_of_time)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--on", nargs="+", choices=sorted(ENGINES), default=["moosefs"])
    parser.add_argument("--letters", type=int, default=LETTERS)
    given, rest = parser.parse_known_args()
    LETTERS = given.letters
    for name in given.on:
        engine = ENGINES[name]
        missing = [program for program in engine.programs if not shutil.which(program)]
        if missing:
            sys.exit("%s is not installed: run .ci/install.sh %s first" % (missing[0], name))
        globals()[engine.__name__ + "Growth"] = type(engine.__name__ + "Growth", (Growth,), {"engine": engine})
    del globals()["Growth"]
    print("seed %d" % check_crash.SEED)
    with check_crash.lab_folder:
        unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    if os.getuid():
        sys.exit("run this as root: it mounts file systems")
    main()
