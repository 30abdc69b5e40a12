#!/usr/bin/python3
# ruff: noqa: UP031, PTH100
"""camera_sim.py - an RTSP camera on this machine that can be told to misbehave.

It is an independent server (GStreamer's gst-rtsp-server, no FFmpeg code on the wire side), for
acceptance tests of anything that reads RTSP.  Run it with Debian's own python (/usr/bin/python3):

  apt-get update && apt-get install -y --no-install-recommends \
      gir1.2-gst-rtsp-server-1.0 gir1.2-gst-plugins-base-1.0 python3-gst-1.0 \
      gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad \
      gstreamer1.0-plugins-ugly gstreamer1.0-libav ffmpeg      # ffmpeg: only for --file

  camera_sim.py --port 8554 --path /cam                          # pattern with burnt-in clock
  camera_sim.py --file clip.mp4                                  # any file, looped, clock burnt in
  camera_sim.py --file clip.mp4 --copy --count 16                # looped, not re-encoded, /cam0 .. /cam15
  camera_sim.py --user u --password p --auth digest              # 401 without them
  camera_sim.py --fault 5:stall:10 --fault 20:restart:3:640x480  # faults, seconds after start
  camera_sim.py --blackhole | --garbage                          # accepts TCP, never answers | answers junk

Faults (--fault AT:KIND[:ARG[:ARG]], or one KIND[:ARG..] a line on standard input):
  stall[:S]        no more RTP for S seconds (no S: for ever); RTSP itself still answers
  hang[:S]         the whole server stops answering for S seconds, sockets stay open
  drop             cut every client's connection (they may connect again at once)
  refuse[:S]       cut every client and close the listening port for S seconds
  restart[:GAP[:WxH]]  reboot: everything gone for GAP seconds (2), then back, optionally another size
  exit[:CODE]      the process ends at once
  freeze[:S]       the same picture again and again (its clock stops), the stream goes on
  black[:S]        black pictures (no clock), the stream goes on
  resize:WxH       new picture size inside the running session
  ptsjump:S        timestamps jump by S seconds (negative: backwards); pictures go on
  corrupt[:S]      encoded pictures are damaged for S seconds
  clear            ends stall, freeze, black and corrupt;   quit  ends the process cleanly
Aliases: --stall-after N [--stall-for S], --drop-after N, --restart-after N [--restart-gap S], --exit-after N

Standard output has one JSON object a line, each with "t" (unix seconds) and "event": ready, connect,
describe, play, teardown, disconnect, denied, media, fault, bye.  Wait for ready before connecting.

The burnt-in clock is two rows of 32 black or white cells over the top of the picture (64 bits: 8 magic,
8 camera number, 40 unix time in 1/100 s, 8 checksum) and a readable HH:MM:SS.cc below it.
read_clock(gray) gives (camera, unix_seconds) or None, from any 2-D array of luma, also after a resize
that keeps the whole picture, e.g. to 336x336.
"""

import argparse
import contextlib
import datetime
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

MAGIC = 0xA5
FONT = dict(
    zip(
        "0123456789:.",
        (
            "111101101101111",
            "010110010010111",
            "111001111100111",
            "111001111001111",
            "101101111001001",
            "111100111001111",
            "111100111101111",
            "111001001001001",
            "111101111101111",
            "111101111001111",
            "000010000010000",
            "000000000000010",
        ),
        strict=False,
    )
)


# ---------------------------------------------------------------- burnt-in clock
def clock_bits(camera, unix):
    centi = int(unix * 100) & ((1 << 40) - 1)
    word = (MAGIC << 48) | ((camera & 0xFF) << 40) | centi
    check = sum(word.to_bytes(7, "big")) & 0xFF
    word = (word << 8) | check
    return [(word >> (63 - i)) & 1 for i in range(64)]


def read_clock(gray):
    """(camera, unix seconds) from a picture's luma (anything indexable [y][x]), or None."""
    h, w = len(gray), len(gray[0])
    full = h / 20.0
    bits = []
    for i in range(64):
        y = int((0.5 + i // 32) * full)
        x = int((i % 32 + 0.5) * w / 32.0)
        v = int(gray[min(y, h - 1)][x])
        if 90 < v < 160:
            return None
        bits.append(1 if v >= 125 else 0)
    word = 0
    for b in bits:
        word = (word << 1) | b
    check, word = word & 0xFF, word >> 8
    if word >> 48 != MAGIC or sum(word.to_bytes(7, "big")) & 0xFF != check:
        return None
    return (word >> 40) & 0xFF, (word & ((1 << 40) - 1)) / 100.0


class Painter:
    """Draws pattern and clock into I420 pictures with nothing but bytes operations."""

    def __init__(self, w, h, camera):
        self.w, self.h, self.camera = w, h, camera
        period = [int(40 + 150 * abs((i / 64.0) % 2 - 1)) for i in range(128)]
        self.row = bytes(period) * (w // 128 + 3)
        self.chroma = {}

    def size(self):
        return self.w * self.h * 3 // 2

    def pattern(self, n):
        w, h = self.w, self.h
        off = (n * 2) % 128
        y = self.row[off : off + w] * h
        bar = (n * 8) % w
        if bar + 16 < w:  # a moving bar over the lower half
            line = self.row[off : off + w]
            line = line[:bar] + b"\xeb" * 16 + line[bar + 16 :]
            y = y[: w * (h // 2)] + line * (h - h // 2)
        hue = (n // 25 + 40 * self.camera) % 256
        if hue not in self.chroma:
            self.chroma = {hue: bytes([96 + hue // 4]) * (w * h // 4) + bytes([160 - hue // 4]) * (w * h // 4)}
        return y + self.chroma[hue]

    def black(self):
        n = self.w * self.h
        return b"\x10" * n + b"\x80" * (n // 2)

    def burn(self, picture, unix):
        """The picture with the machine-readable rows and the digits drawn over it."""
        w, h = self.w, self.h
        bits = clock_bits(self.camera, unix)
        rows = []
        edge = [round(i * w / 32.0) for i in range(33)]
        for half in (bits[:32], bits[32:]):
            rows.append(b"".join((b"\xeb" if b else b"\x10") * (edge[i + 1] - edge[i]) for i, b in enumerate(half)))
        cut = [round(h / 20.0), round(h / 10.0)]
        top = rows[0] * cut[0] + rows[1] * (cut[1] - cut[0])
        text = datetime.datetime.fromtimestamp(unix).strftime("%H:%M:%S.%f")[:11]
        s = max(2, h // 60)
        x0 = w // 16
        lines = []
        for r in range(-1, 6):
            cells = []
            for ch in text:
                glyph = FONT[ch][r * 3 : r * 3 + 3] if 0 <= r < 5 else "000"
                cells.append("".join(glyph) + "0")
            line = b"".join((b"\xeb" if c == "1" else b"\x10") * s for c in "0" + "".join(cells))
            line = line[: w - x0]
            lines.extend([line] * s)
        out = [top]
        base = cut[1] * w
        for i, line in enumerate(lines):
            start = base + i * w
            out.append(picture[start : start + x0] + line + picture[start + x0 + len(line) : start + w])
        out.append(picture[base + len(lines) * w :])
        return b"".join(out)


def say(event, **more):
    line = json.dumps({"t": round(time.time(), 3), "event": event, **more})
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except (BrokenPipeError, ValueError):
        pass


# ---------------------------------------------------------------- options
def options(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="See the head of the file for the faults.")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=8554)
    p.add_argument("--path", default="/cam")
    p.add_argument("--count", type=int, default=1, help="serve PATH0..PATHn-1 instead of PATH")
    p.add_argument("--size", default="1280x720")
    p.add_argument("--fps", type=float, default=25)
    p.add_argument("--gop", type=int, default=50, help="frames between keyframes")
    p.add_argument("--bframes", type=int, default=0)
    p.add_argument("--bitrate", type=int, default=1500, help="kbit/s")
    p.add_argument("--codec", choices=("h264", "h265", "mjpeg"), default="h264")
    p.add_argument("--file", help="play this file in a loop instead of the pattern")
    p.add_argument("--copy", action="store_true", help="with --file: send its H.264/H.265 as it is (no clock)")
    p.add_argument("--no-clock", action="store_true")
    p.add_argument("--camera", type=int, default=0, help="camera number in the clock (0-255)")
    p.add_argument(
        "--audio", action="store_true", help="add a sound track (A-law, 8 kHz); it goes on while video stalls"
    )
    p.add_argument("--user")
    p.add_argument("--password", default="")
    p.add_argument("--auth", choices=("basic", "digest"), default="digest")
    p.add_argument("--transport", choices=("any", "tcp", "udp"), default="any")
    p.add_argument("--loss", type=float, default=0, help="share of RTP packets lost, 0..1")
    p.add_argument(
        "--wrap-after", type=float, help="the 32-bit RTP timestamp wraps this many seconds after a client's start"
    )
    p.add_argument("--fault", action="append", default=[], metavar="AT:KIND[:ARG..]")
    p.add_argument("--stall-after", type=float)
    p.add_argument("--stall-for", type=float)
    p.add_argument("--drop-after", type=float)
    p.add_argument("--restart-after", type=float)
    p.add_argument("--restart-gap", type=float, default=2)
    p.add_argument("--exit-after", type=float)
    p.add_argument("--start-delay", type=float, default=0, help="seconds before the port opens")
    p.add_argument("--blackhole", action="store_true")
    p.add_argument("--garbage", action="store_true")
    o = p.parse_args(argv)
    if o.stall_after is not None:
        o.fault.append(f"{o.stall_after:g}:stall" + (f":{o.stall_for:g}" if o.stall_for is not None else ""))
    if o.drop_after is not None:
        o.fault.append(f"{o.drop_after:g}:drop")
    if o.restart_after is not None:
        o.fault.append(f"{o.restart_after:g}:restart:{o.restart_gap:g}")
    if o.exit_after is not None:
        o.fault.append(f"{o.exit_after:g}:exit")
    if not o.path.startswith("/"):
        o.path = "/" + o.path
    return o


def size_of(text):
    w, h = text.lower().split("x")
    return int(w) // 2 * 2, int(h) // 2 * 2


# ---------------------------------------------------------------- servers that are no cameras
def dumb_server(o):
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((o.host, o.port))
    s.listen(64)
    say("ready", pid=os.getpid(), mode="blackhole" if o.blackhole else "garbage", port=o.port)
    held = []
    while True:
        c, peer = s.accept()
        say("connect", peer="%s:%d" % peer[:2])
        held.append(c)
        if o.garbage:
            try:
                c.recv(4096)
                c.sendall(bytes(random.randrange(256) for _ in range(2000)))
            except OSError:
                pass


# ---------------------------------------------------------------- the camera
class Camera:
    def __init__(self, o):
        import gi

        gi.require_version("Gst", "1.0")
        gi.require_version("GstRtsp", "1.0")
        gi.require_version("GstRtspServer", "1.0")
        from gi.repository import GLib, Gst, GstRtsp, GstRtspServer

        self.o, self.GLib, self.Gst, self.Rtsp, self.Server = o, GLib, Gst, GstRtsp, GstRtspServer
        Gst.init(None)
        self.loop = GLib.MainLoop()
        self.until = {"stall": 0.0, "freeze": 0.0, "black": 0.0, "corrupt": 0.0}  # monotonic; inf: for ever
        self.jump = 0
        self.size = size_of(o.size)
        self.sent = 0
        self.clients = 0
        self.source = None
        self.server = None
        self.pipelines = []

    def on(self, kind):
        return time.monotonic() < self.until[kind]

    # ----- pipeline
    def launch(self):
        o = self.o
        pay = {
            "h264": "rtph264pay config-interval=-1 pt=96",
            "h265": "rtph265pay config-interval=-1 pt=96",
            "mjpeg": "rtpjpegpay pt=26",
        }[o.codec]
        if o.wrap_after is not None:
            pay += " timestamp-offset=%d" % (2**32 - 1 - int(o.wrap_after * 90000))
        tail = f"{pay} ! identity name=pay0 drop-probability={o.loss:g}" if o.loss > 0 else f"{pay} name=pay0"
        if o.audio:
            tail += (
                " audiotestsrc is-live=true wave=ticks ! audio/x-raw,rate=8000,channels=1 ! alawenc ! "
                "rtppcmapay name=pay1 pt=8"
            )
        if o.copy:
            parse = {"h264": "h264parse", "h265": "h265parse", "mjpeg": "jpegparse"}[o.codec]
            return (
                "( appsrc name=src is-live=true format=time max-bytes=4000000 block=true ! tsdemux latency=100 ! "
                f"queue max-size-time=0 max-size-buffers=0 ! {parse} ! identity name=enc ! {tail} )"
            )
        enc = {
            "h264": "x264enc tune=zerolatency speed-preset=ultrafast threads=1 key-int-max=%d bframes=%d bitrate=%d ! "
            "video/x-h264,profile=%s" % (o.gop, o.bframes, o.bitrate, "main" if o.bframes else "constrained-baseline"),
            "h265": "x265enc tune=zerolatency speed-preset=ultrafast key-int-max=%d bitrate=%d ! h265parse"
            % (o.gop, o.bitrate),
            "mjpeg": "jpegenc quality=80",
        }[o.codec]
        if o.bframes:
            enc = enc.replace("tune=zerolatency ", "b-adapt=false ")
        return (
            "( appsrc name=src is-live=true format=time max-bytes=20000000 ! videoconvert n-threads=1 ! "
            f"video/x-raw,format=I420 ! {enc} ! identity name=enc ! {tail} )"
        )

    def configured(self, factory, media, number):
        Gst = self.Gst
        bin_ = media.get_element()
        src = bin_.get_by_name("src")
        stop = threading.Event()
        enc = bin_.get_by_name("enc")
        enc.get_static_pad("src").add_probe(Gst.PadProbeType.BUFFER, self.damage)
        target = self.push_copy if self.o.copy else self.push_raw
        threading.Thread(target=target, args=(src, stop, number), daemon=True).start()
        self.pipelines = [bin_.get_parent()] if self.o.count == 1 else [*self.pipelines, bin_.get_parent()]
        media.connect("unprepared", lambda *_: (stop.set(), say("media", state="stopped")))
        say("media", state="started", path=number)

    def no_waiting(self):
        """A jump in time must reach the wire, so no sink may wait for the clock any more."""
        for pipeline in self.pipelines:
            found = pipeline.iterate_sinks()
            while True:
                result, element = found.next()
                if result != self.Gst.IteratorResult.OK:
                    break
                element.set_property("sync", False)

    def damage(self, pad, info):
        if self.on("corrupt") and random.random() < 0.7:
            return self.Gst.PadProbeReturn.DROP if random.random() < 0.5 else self.trash(info)
        return self.Gst.PadProbeReturn.OK

    def trash(self, info):
        buf = info.get_buffer()
        try:
            n = buf.get_size()
            if n > 200:
                at = random.randrange(60, n - 100)
                buf.fill(at, os.urandom(min(400, n - at)))  # works only where the buffer is writable
        except Exception:
            return self.Gst.PadProbeReturn.DROP
        return self.Gst.PadProbeReturn.OK

    def caps(self, w, h):
        fps = round(self.o.fps * 1000)
        return self.Gst.Caps.from_string(
            "video/x-raw,format=I420,width=%d,height=%d,framerate=%d/1000,pixel-aspect-ratio=1/1" % (w, h, fps)
        )

    def running_time(self, src):
        """The pipeline's running time; 0 while it is still starting and has no base time."""
        clock, base = src.get_clock(), src.get_base_time()
        if clock is None or not base:
            return 0
        return max(0, clock.get_time() - base)

    def push_raw(self, src, stop, number):
        Gst, o = self.Gst, self.o
        size = painter = reader = last = None
        t0 = time.monotonic()
        n = 0
        while not stop.is_set():
            if size != self.size:
                size = self.size
                painter = Painter(size[0], size[1], o.camera + number)
                src.set_property("caps", self.caps(*size))
                if reader:
                    reader.kill()
                reader = self.decoder(size) if o.file else None
            wait = t0 + n / o.fps - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            n += 1
            if reader:
                picture = reader.stdout.read(painter.size())
                if len(picture) < painter.size():
                    say("media", state="file ended")
                    reader = self.decoder(size)
                    continue
            else:
                picture = painter.pattern(n)
            if self.on("stall"):
                continue
            if self.on("black"):
                picture = painter.black()
            elif self.on("freeze") and last and len(last) == painter.size():
                picture = last
            elif not o.no_clock:
                picture = painter.burn(picture, time.time())
            last = picture
            buf = Gst.Buffer.new_wrapped(picture)
            at = max(0, self.running_time(src) + int(self.jump * Gst.SECOND))
            buf.pts = buf.dts = at
            buf.duration = int(Gst.SECOND / o.fps)
            if src.emit("push-buffer", buf) == Gst.FlowReturn.OK:  # not yet OK while the pipeline is starting
                self.sent += 1
        if reader:
            reader.kill()
            reader.wait()

    def decoder(self, size):
        cmd = [
            "ffmpeg",
            "-nostdin",
            "-v",
            "error",
            "-stream_loop",
            "-1",
            "-i",
            self.o.file,
            "-map",
            "0:v:0",
            "-vf",
            "fps=%g,scale=%d:%d,format=yuv420p" % (self.o.fps, size[0], size[1]),
            "-f",
            "rawvideo",
            "-threads",
            "1",
            "-",
        ]
        return subprocess.Popen(cmd, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)

    def push_copy(self, src, stop, number):
        Gst = self.Gst
        src.set_property("caps", Gst.Caps.from_string("video/mpegts,systemstream=true,packetsize=188"))
        cmd = [
            "ffmpeg",
            "-nostdin",
            "-v",
            "error",
            "-re",
            "-stream_loop",
            "-1",
            "-i",
            self.o.file,
            "-map",
            "0:v:0",
            "-c",
            "copy",
            "-muxdelay",
            "0",
            "-pat_period",
            "0.2",
            "-f",
            "mpegts",
            "-",
        ]
        reader = subprocess.Popen(cmd, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        while not stop.is_set():
            data = reader.stdout.read1(188 * 350)
            if not data:
                say("media", state="file ended")
                break
            if self.on("stall"):
                continue
            buf = Gst.Buffer.new_wrapped(data)
            buf.pts = self.running_time(src)
            if src.emit("push-buffer", buf) == Gst.FlowReturn.OK:
                self.sent += 1
        reader.kill()
        reader.wait()

    # ----- server
    def start(self):
        o, S = self.o, self.Server
        self.server = S.RTSPServer.new()
        self.server.set_address(o.host)
        self.server.set_service(str(o.port))
        mounts = self.server.get_mount_points()
        for i in range(o.count):
            f = S.RTSPMediaFactory.new()
            f.set_launch(self.launch())
            f.set_shared(True)
            f.set_latency(0)
            if o.transport == "tcp":
                f.set_protocols(self.Rtsp.RTSPLowerTrans.TCP)
            elif o.transport == "udp":
                f.set_protocols(self.Rtsp.RTSPLowerTrans.UDP)
            f.connect("media-configure", self.configured, i)
            if o.user:
                perm = S.RTSPPermissions.new()
                perm.add_permission_for_role("user", "media.factory.access", True)
                perm.add_permission_for_role("user", "media.factory.construct", True)
                f.set_permissions(perm)
            mounts.add_factory(o.path + (str(i) if o.count > 1 else ""), f)
        if o.user:
            auth = S.RTSPAuth.new()
            token = S.RTSPToken.new()
            token.set_string("media.factory.role", "user")
            if o.auth == "digest":
                auth.set_supported_methods(self.Rtsp.RTSPAuthMethod.DIGEST)
                auth.add_digest(o.user, o.password, token)
            else:
                auth.set_supported_methods(self.Rtsp.RTSPAuthMethod.BASIC)
                auth.add_basic(S.RTSPAuth.make_basic(o.user, o.password), token)
            self.server.set_auth(auth)
        self.server.connect("client-connected", self.connected)
        self.open_port()

    def open_port(self):
        self.source = self.server.attach(None)
        if not self.source:
            say("error", why="port %d is taken" % self.o.port)
            os._exit(3)
        return False

    def connected(self, server, client):
        self.clients += 1
        who = client.get_connection().get_ip()
        say("connect", peer=who, clients=self.clients)
        client.connect("describe-request", lambda c, x: say("describe", uri=x.uri.abspath))
        client.connect("play-request", lambda c, x: say("play", uri=x.uri.abspath))
        client.connect("teardown-request", lambda c, x: say("teardown", uri=x.uri.abspath))
        client.connect("closed", self.closed)

    def closed(self, client):
        self.clients -= 1
        say("disconnect", clients=self.clients)

    def cut(self):
        found = []
        self.server.client_filter(lambda s, c: (found.append(c), self.Server.RTSPFilterResult.KEEP)[1])
        for c in found:
            c.close()
        return len(found)

    # ----- faults; all run in the main loop
    def fault(self, text):
        kind, *arg = text.strip().split(":")
        if not kind:
            return False
        number = float(arg[0]) if arg and kind not in ("resize",) else None
        say("fault", fault=text.strip())
        GLib = self.GLib
        if kind in self.until:
            self.until[kind] = time.monotonic() + (number if number is not None else float("inf"))
        elif kind == "clear":
            for k in self.until:
                self.until[k] = 0.0
        elif kind == "drop":
            self.cut()
        elif kind == "hang":
            self.until["stall"] = time.monotonic() + (number if number is not None else float("inf"))
            time.sleep(number if number is not None else 1e9)
        elif kind == "refuse":
            GLib.Source.remove(self.source)
            self.cut()
            if number is not None:
                GLib.timeout_add(int(number * 1000), self.open_port)
        elif kind == "restart":
            self.reborn(number if number is not None else 2, arg[1] if len(arg) > 1 else None)
        elif kind == "resize":
            self.size = size_of(arg[0])
        elif kind == "ptsjump":
            self.no_waiting()
            self.jump += number
        elif kind == "exit":
            os._exit(int(number or 0))
        elif kind == "quit":
            self.loop.quit()
        else:
            say("error", why="no such fault: " + kind)
        return False

    def reborn(self, gap, size):
        """Same process id, everything else new: the listening socket and all clients are gone meanwhile."""
        argv, skip = [], False
        for a in sys.argv[1:]:  # the schedule is over after a reboot
            if skip:
                skip = False
            elif a in (
                "--fault",
                "--start-delay",
                "--stall-after",
                "--stall-for",
                "--drop-after",
                "--restart-after",
                "--restart-gap",
                "--exit-after",
            ) or (size and a == "--size"):
                skip = True
            elif not a.startswith(
                ("--fault=", "--start-delay=", "--stall-", "--drop-after=", "--restart-", "--exit-after=")
            ):
                argv.append(a)
        argv += ["--start-delay", f"{gap:g}"] + (["--size", size] if size else [])
        for fd in range(3, 1024):
            with contextlib.suppress(OSError):
                os.set_inheritable(fd, False)
        os.execv(sys.executable, [sys.executable, os.path.abspath(__file__), *argv])

    def run(self):
        o, GLib = self.o, self.GLib
        self.start()
        for spec in o.fault:
            at, what = spec.split(":", 1)
            GLib.timeout_add(int(float(at) * 1000), self.fault, what)
        threading.Thread(target=self.stdin, daemon=True).start()
        for s in (signal.SIGTERM, signal.SIGINT):
            GLib.unix_signal_add(GLib.PRIORITY_HIGH, s, lambda *_: (self.loop.quit(), False)[1])
        GLib.timeout_add(2000, lambda: (self.server.get_session_pool().cleanup(), True)[1])
        base = "rtsp://%s:%d%s" % (o.host, o.port, o.path)
        urls = [base + (str(i) if o.count > 1 else "") for i in range(o.count)]
        say("ready", pid=os.getpid(), urls=urls, size=o.size, fps=o.fps, codec=o.codec)
        self.loop.run()
        say("bye", sent=self.sent)
        os._exit(0)

    def stdin(self):
        try:
            for line in sys.stdin:
                if line.strip():
                    self.GLib.idle_add(self.fault, line.strip())
        except (ValueError, OSError):
            pass


def main():
    o = options(sys.argv[1:])
    if o.start_delay:
        time.sleep(o.start_delay)
    if o.blackhole or o.garbage:
        dumb_server(o)
    Camera(o).run()


if __name__ == "__main__":
    main()
