"""What `emit` prints for proxies and for Kubernetes, in use: with HAProxy, nginx and a
kubelet that is simulated. Part of ``python -m tests clients``.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

import embellama_server as es
from tests import both, kit, slow
from tests.servers import free_port
from tests.siege import Clients, answers, haproxy_config, wait_until

pytestmark = pytest.mark.clients

EMBED = "/v1/embeddings"
WORDS = " ".join(f"word{n}" for n in range(8))
FRONTS = ("haproxy", "nginx")


def nginx_config(
    folder: Path, front: int, ports: Sequence[int], root_path: str = ""
) -> str:
    """What `emit nginx` prints, with these ports, in a file that stands alone."""
    flags = {"root_path": root_path} if root_path else {}
    deployment = es.Deployment(es.load_settings(flags, {}), "python", "x.py")
    (printed,) = es.nginx_files(deployment).values()
    servers = "".join(f"server 127.0.0.1:{port} max_fails=0;\n" for port in ports)
    printed = re.sub(r"(?m)^ *server [^\n]* max_fails=0;\n", servers, printed, count=1)
    printed = printed.replace("listen 8000;", f"listen 127.0.0.1:{front};")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    return (
        f"user root; daemon off; pid {folder}/pid; error_log stderr; events {{ }}\n"
        f"http {{ access_log off; {paths}\n{printed}}}\n"
    )


@contextlib.contextmanager
def fronted(
    kind: str, folder: Path, ports: Sequence[int], root_path: str = ""
) -> Iterator[str]:
    """The address of a proxy before servers at these ports."""
    program, front = shutil.which(kind), free_port()
    if program is None:
        pytest.skip(f"not installed: {kind}")
    place = folder / f"{kind}.conf"
    if kind == "haproxy":
        place.write_text(haproxy_config(front, ports))
        command = [program, "-db", "-f", str(place)]
    else:
        place.write_text(nginx_config(folder, front, ports, root_path))
        command = [program, "-p", str(folder), "-c", str(place)]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{front}"
    try:
        wait_until(lambda: answers(url, f"{root_path}/ready"))
        yield url
    finally:
        process.terminate()
        process.wait(kit.DEADLINE_S)


# --- streams ---


@pytest.mark.parametrize("kind", FRONTS)
def test_each_part_of_a_stream_passes_as_it_is_made(kind: str, tmp_path: Path) -> None:
    flags = slow.model(tmp_path, "chatter")
    body = {"stream": True, "messages": [{"role": "user", "content": WORDS}]}
    with (
        kit.started(*flags, module=slow.MODULE) as server,
        fronted(kind, tmp_path, [port_of(server)]) as url,
    ):
        connection = http.client.HTTPConnection(url[7:], timeout=kit.DEADLINE_S)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        reply, times, text = connection.getresponse(), [], b""
        while part := reply.read1():
            times.append(time.monotonic())
            text += part
        connection.close()
    assert text.endswith(b"data: [DONE]\n\n")
    assert all(word.encode() in text for word in WORDS.split())
    # A proxy that keeps parts back sends several, or all, at once.
    gaps = [late - early for early, late in itertools.pairwise(times)]
    assert len([gap for gap in gaps if gap > slow.WORD_S / 2]) >= 6, gaps
    assert times[-1] - times[0] > 6 * slow.WORD_S


def port_of(server: kit.Server) -> int:
    """Where it listens."""
    return int(server.url.rpartition(":")[2])


# --- addresses ---


@pytest.mark.parametrize("kind", FRONTS)
def test_two_clients_behind_a_proxy_have_limits_of_their_own(
    kind: str, tmp_path: Path
) -> None:
    limits = ("--rate-limit", "0.001", "--rate-burst", "2")

    def statuses(url: str, source: str, forged: str = "") -> list[int]:
        client = http.client.HTTPConnection(
            url[7:], timeout=kit.DEADLINE_S, source_address=(source, 0)
        )
        found = []
        for _ in range(3):
            headers = {"content-type": "application/json"}
            headers |= {"x-forwarded-for": forged} if forged else {}
            client.request("POST", EMBED, '{"input": "a"}', headers)
            reply = client.getresponse()
            reply.read()
            found.append(reply.status)
        client.close()
        return found

    audit = tmp_path / "audit.jsonl"
    flags = (*limits, "--trusted-proxy", "127.0.0.1", "--audit-log", str(audit))
    with (
        kit.started(*flags) as server,
        fronted(kind, tmp_path, [port_of(server)]) as url,
    ):
        assert statuses(url, "127.0.0.2") == [200, 200, 429]
        assert statuses(url, "127.0.0.3") == [200, 200, 429]
        # What a client writes there itself makes it nobody else.
        assert statuses(url, "127.0.0.2", forged="10.1.1.1") == [429] * 3
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    asked = [line["address"] for line in lines if line["path"] == EMBED]
    assert asked == ["127.0.0.2"] * 3 + ["127.0.0.3"] * 3 + ["127.0.0.2"] * 3


# --- a prefix ---


def test_behind_a_prefix_nginx_finds_every_route_and_nothing_else(
    tmp_path: Path,
) -> None:
    prefix = "/embed/a"
    with (
        kit.started("--root-path", prefix) as server,
        fronted("nginx", tmp_path, [port_of(server)], prefix) as url,
    ):
        client = both.Client(url)
        for path in ("/", "/docs", "/status", "/openapi.json", "/ready", "/v1/models"):
            assert client.get(prefix + path, accept="text/html").status == 200, path
        assert client.post(prefix + EMBED, {"input": "a"}).status == 200
        assert client.get("/ready").status == 404
        client.close()


# --- restarts, one after another ---


def has_embedded(server: kit.Server) -> bool:
    """Whether the front has sent it something: it is ready before HAProxy calls it so."""
    client = both.Client(server.url)
    text = client.get("/metrics").body.decode()
    client.close()
    counted = f'embellama_route_requests_total{{route="{EMBED}"}} '
    return float(text.partition(counted)[2].partition("\n")[0]) > 0


@pytest.mark.parametrize("kind", FRONTS)
def test_two_servers_are_restarted_in_turn_and_no_request_fails(
    kind: str, tmp_path: Path
) -> None:
    ports = [free_port(), free_port()]
    with contextlib.ExitStack() as stack:

        def start(port: int) -> kit.Server:
            flags = ("--drain-grace-s", "3", "--port", str(port))
            return stack.enter_context(kit.started(*flags))

        servers = [start(port) for port in ports]
        url = stack.enter_context(fronted(kind, tmp_path, ports))
        clients = Clients(url, 8)
        with clients.asking():
            for index, port in enumerate(ports):
                wait_until(lambda: all(answers(one.url) for one in servers))
                assert servers[index].stop() == 0
                servers[index] = start(port)
                wait_until(lambda index=index: has_embedded(servers[index]))  # type: ignore[misc]
                seen = len(clients.statuses)
                wait_until(lambda seen=seen: len(clients.statuses) > seen + 300)  # type: ignore[misc]
    assert len(clients.statuses) > 600
    assert set(clients.statuses) == {200}, clients.statuses


# --- Kubernetes ---

FASTER = 10.0  # probes, and the load, by this


@dataclass
class Probe:
    """One of a container's, as kubelet counts it."""

    path: str
    period_s: float
    timeout_s: float
    max_failures: int
    failures: int = 0
    due_at: float = 0.0

    @classmethod
    def of(cls, row: dict[str, Any]) -> Probe:
        """As the YAML has it; what it leaves out is Kubernetes' default."""
        assert row.keys() <= {
            "httpGet",
            "periodSeconds",
            "timeoutSeconds",
            "failureThreshold",
        }
        period_s = row.get("periodSeconds", 10) / FASTER
        timeout_s = row.get("timeoutSeconds", 1) / FASTER
        # Less than this says how busy the machine is.
        timeout_s = max(0.5, timeout_s)
        return cls(
            row["httpGet"]["path"], period_s, timeout_s, row.get("failureThreshold", 3)
        )

    def ask(self, port: int) -> bool | None:
        """Whether it is well; None: not asked yet."""
        if (now := time.monotonic()) < self.due_at:
            return None
        self.due_at = now + self.period_s
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=self.timeout_s)
        try:
            client.request("GET", self.path)
            is_well = 200 <= client.getresponse().status < 400
        except (OSError, http.client.HTTPException):
            is_well = False
        finally:
            client.close()
        self.failures = 0 if is_well else self.failures + 1
        return is_well

    @property
    def has_failed(self) -> bool:
        """Whether it has failed too often in a row."""
        return self.failures >= self.max_failures


@dataclass
class Pod:
    """A container that kubelet starts, probes, restarts and ends."""

    spec: dict[str, Any]
    port: int
    start: Callable[[int], subprocess.Popen[bytes]]
    restarts: int = 0
    is_ready: bool = False
    exit_code: int | None = None
    ended_in_s: float = 0.0
    _is_ending: threading.Event = field(default_factory=threading.Event)

    def live(self) -> None:
        """Thread: kubelet's loop, until the pod is deleted."""
        while not self._is_ending.is_set():
            process = self.start(self.port)
            if self._probed(process):  # which says to restart it
                self.restarts += 1
            self._end(process)

    def _probed(self, process: subprocess.Popen[bytes]) -> bool:
        (container,) = self.spec["containers"]
        startup, readiness, liveness = (
            Probe.of(container[f"{kind}Probe"])
            for kind in ("startup", "readiness", "liveness")
        )
        has_started = False
        while not self._is_ending.wait(0.02):
            if process.poll() is not None:
                return True
            if not has_started:
                has_started = bool(startup.ask(self.port))
                if startup.has_failed:
                    return True
                continue
            if readiness.ask(self.port):
                self.is_ready = True
            if readiness.has_failed:
                self.is_ready = False
            liveness.ask(self.port)
            if liveness.has_failed:
                return True
        return False

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        self.is_ready, begin = False, time.monotonic()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.spec["terminationGracePeriodSeconds"])
        process.kill()
        self.exit_code = process.wait()
        self.ended_in_s = time.monotonic() - begin

    def delete(self) -> None:
        """Tell kubelet to end it; live() returns when it has ended."""
        self._is_ending.set()


def printed_pod(folder: Path) -> tuple[dict[str, Any], str]:
    """The pod's spec that `emit kubernetes` prints, and its TOML."""
    flags = {"model_path": [slow.model(folder, "embedder")[1]]}
    deployment = es.Deployment(es.load_settings(flags, {}), "python", "x.py")
    (text,) = es.kubernetes_files(deployment).values()
    objects = {one["kind"]: one for one in yaml.safe_load_all(text)}
    update = objects["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert update == {"maxUnavailable": 0, "maxSurge": 1}, "what is simulated below"
    config = objects["ConfigMap"]["data"]["embellama.toml"]
    return objects["Deployment"]["spec"]["template"]["spec"], config


def end_all(pods: Sequence[Pod], threads: Sequence[threading.Thread]) -> None:
    """Delete what is still there."""
    for pod in pods:
        pod.delete()
    for thread in threads:
        thread.join(kit.DEADLINE_S)


def test_a_kubelet_that_waits_too_short_a_time_restarts_the_pod(tmp_path: Path) -> None:
    spec, _ = printed_pod(tmp_path)
    spec["containers"][0]["startupProbe"]["failureThreshold"] = 2

    def start(port: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])

    pod = Pod(spec, free_port(), start)
    thread = threading.Thread(target=pod.live)
    thread.start()
    wait_until(lambda: pod.restarts >= 2)
    end_all([pod], [thread])


@pytest.mark.parametrize("load_s", [60.0])
def test_a_rolling_update_of_slow_pods_restarts_none_and_fails_no_request(
    load_s: float, tmp_path: Path
) -> None:
    spec, config = printed_pod(tmp_path)
    place = tmp_path / "embellama.toml"
    assert tomllib.loads(config).keys() == {"model_path"}
    place.write_text(config.replace("/models/", f"{tmp_path}/"))
    (container,) = spec["containers"]
    variables = {row["name"]: row["value"] for row in container["env"]}
    variables |= {"EMBELLAMA_CONFIG": str(place), slow.LOAD_S: str(load_s / FASTER)}
    log = (tmp_path / "log").open("wb")

    def start(port: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *slow.MODULE, "--port", str(port)],
            cwd=kit.ROOT,
            env=os.environ | variables,
            stdout=log,
            stderr=log,
        )

    ports = [free_port() for _ in range(3)]
    pods: list[Pod] = []
    threads: list[threading.Thread] = []

    def create(port: int) -> Pod:
        pod = Pod(spec, port, start)
        threads.append(threading.Thread(target=pod.live))
        threads[-1].start()
        pods.append(pod)
        return pod

    with contextlib.ExitStack() as stack:
        stack.callback(log.close)
        stack.callback(end_all, pods, threads)
        old = [create(port) for port in ports[:2]]
        wait_until(lambda: all(pod.is_ready for pod in old))
        url = stack.enter_context(fronted("haproxy", tmp_path, ports))
        clients = Clients(url, 4)
        free = ports[2:]
        with clients.asking():
            for pod in old:  # one more, then one less
                new = create(free.pop())
                begin = time.monotonic()
                wait_until(lambda new=new: new.is_ready)  # type: ignore[misc]
                assert time.monotonic() - begin >= load_s / FASTER
                pod.delete()
                wait_until(lambda pod=pod: pod.exit_code is not None)  # type: ignore[misc]
                free.append(pod.port)
    assert [pod.restarts for pod in pods] == [0] * 4
    assert [pod.exit_code for pod in pods] == [0] * 4, (tmp_path / "log").read_text()
    grace_s = spec["terminationGracePeriodSeconds"]
    assert max(pod.ended_in_s for pod in pods) < grace_s / 2
    assert set(clients.statuses) == {200}
    assert len(clients.statuses) > 200
