"""Room LISTENERS: addresses, unix sockets, sockets handed over, TLS.

TLS runs on both loops, since they bring their own; its certificates are made as the
tests run. Nothing here has a fixed port, and nothing waits by sleeping.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

import embellama_server as es
from tests import kit, models
from tests.test_connections import BYE, HEALTH, LOOPS, MANY, Client, embed, post, until

LOOPBACKS = {socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0, 0, 0)}
LOOPBACK = ("127.0.0.1", 0)


@contextlib.contextmanager
def listening(*hosts: tuple[str, int], uds: str = "") -> Iterator[list[socket.socket]]:
    """Listeners, closed at the end."""
    listen = tuple(f"[{host}]:{port}" for host, port in hosts)
    made = es.bind_all(kit.settings(host="none", listen=listen, uds=uds))
    try:
        yield made
    finally:
        for each in made:
            each.close()


def refusal(*hosts: tuple[str, int], uds: str = "") -> str:
    """What is said of addresses that cannot be had."""
    with pytest.raises(es.StartupError) as caught, listening(*hosts, uds=uds):
        pytest.fail("bound")
    return str(caught.value)


def has_ipv6() -> bool:
    """Whether this machine has ::1."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


on_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")


def health(url: str, uds: Path | None = None) -> int:
    """The status of /health, asked by httpx."""
    transport = httpx.HTTPTransport(uds=str(uds) if uds else None)
    with httpx.Client(transport=transport, timeout=kit.DEADLINE_S) as client:
        return client.get(f"{url}/health").status_code


# --- addresses ---


def test_a_port_in_use_is_a_sentence_with_what_to_do() -> None:
    with listening(LOOPBACK) as (taken,):
        port = taken.getsockname()[1]
        assert refusal(("127.0.0.1", port)) == (
            f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another "
            "--port (0: any free one) or --host"
        )


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "\udc80", "a\0b"])
def test_what_is_no_host_is_a_sentence(host: str) -> None:
    said = refusal((host, 0))
    assert said.startswith(f"cannot listen on {host}:0: ")
    assert said.endswith("; choose another --host")


def test_an_unknown_host_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert refusal(("nowhere", 80)) == (
        "cannot listen on nowhere:80: Name or service not known; choose another --host"
    )


def test_an_address_of_another_machine_is_a_sentence() -> None:
    said = refusal(("192.0.2.1", 0))  # for documentation, RFC 5737
    assert "cannot listen on 192.0.2.1:0: Cannot assign requested address" in said


def test_nothing_to_listen_on_is_a_sentence() -> None:
    assert refusal() == "--host none leaves nothing to listen on: add --uds"


def test_one_bad_address_leaves_none_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with socket.create_server(LOOPBACK) as taken:
        refusal(LOOPBACK, LOOPBACK, taken.getsockname()[:2])
    refusal(LOOPBACK, uds=str(tmp_path))
    assert os.listdir("/proc/self/fd") == before


@on_ipv6
def test_ipv4_and_ipv6_may_have_the_same_port() -> None:
    with listening(("::1", 0)) as (first,):
        port = first.getsockname()[1]
        with listening(("0.0.0.0", port)) as (second,):
            assert second.getsockname()[1] == port


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[::1]:8080", ("::1", 8080)),
        ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
        ("localhost:0", ("localhost", 0)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
    ],
)
def test_listen_names_a_host_and_a_port(text: str, expected: tuple[str, int]) -> None:
    assert es.host_and_port(text) == expected


@on_ipv6
@pytest.mark.parametrize("host", ["localhost", "LOCALHOST"])
def test_localhost_is_both_loopbacks_with_one_port(host: str) -> None:
    with listening((host, 0)) as (first, second):
        names = [sock.getsockname()[:2] for sock in (first, second)]
    port = names[0][1]
    assert names == [("127.0.0.1", port), ("::1", port)]


@on_ipv6
def test_a_port_that_is_free_at_one_address_only_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The kernel chooses the port at the first address: at the second it may be in use.
    real = socket.create_server
    taken: list[int] = []

    def listen(
        address: tuple[Any, ...], *, family: int = socket.AF_INET, backlog: int = 1
    ) -> socket.socket:
        if family == socket.AF_INET6 and len(taken) < 2:
            taken.append(address[1])
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        return real(address, family=family, backlog=backlog)

    monkeypatch.setattr(socket, "create_server", listen)
    with listening(("localhost", 0)) as (first, second):
        assert first.getsockname()[1] == second.getsockname()[1]
        assert first.getsockname()[1] not in taken
    # One that was asked for is another matter: clients would reach somebody else there.
    del taken[:]
    with socket.create_server(LOOPBACK) as free:
        port = free.getsockname()[1]
    assert f":{port}: Address already in use" in refusal(("localhost", port))


# Docker's /etc/hosts has ::1 where IPv6 is off; a kernel without it has no such family.
@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_an_address_that_this_box_lacks_is_left_out_if_there_is_another(
    monkeypatch: pytest.MonkeyPatch, number: int, family: int
) -> None:
    real, lacks = socket.create_server, {family}
    found = [(each, 1, 6, "", address) for each, address in LOOPBACKS.items()]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    def listen(address: tuple[Any, ...], *, family: int, backlog: int) -> socket.socket:
        if family in lacks:
            raise OSError(number, os.strerror(number))
        return real(("127.0.0.1", address[1]), backlog=backlog)

    monkeypatch.setattr(socket, "create_server", listen)
    for host in ("localhost", "box"):
        with listening((host, 0)) as made:
            assert len(made) == 1
    lacks |= LOOPBACKS.keys()
    assert os.strerror(number) in refusal(("box", 0))


def test_a_url_is_what_a_client_is_pointed_at(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with listening(LOOPBACK, uds=path) as (tcp, unix):
        port = tcp.getsockname()[1]
        assert es.url_of(tcp, is_tls=False) == f"http://127.0.0.1:{port}"
        assert es.url_of(tcp, is_tls=True) == f"https://127.0.0.1:{port}"
        assert es.url_of(unix, is_tls=True) == f"unix:{path}"  # never TLS


@on_ipv6
def test_an_ipv6_url_has_brackets() -> None:
    with listening(("::1", 0)) as (sock,):
        assert es.url_of(sock, is_tls=False) == f"http://[::1]:{sock.getsockname()[1]}"


@on_ipv6
def test_all_listeners_serve_at_once(tmp_path: Path) -> None:
    path = tmp_path / "s"
    flags = ("--listen", "[::1]:0", "--listen", "localhost:0", "--uds", str(path))
    with kit.started(*flags) as server:
        assert server.process.stdout is not None
        urls = [server.url]
        while not urls[-1].startswith("unix:"):
            urls.append(server.process.stdout.readline().split()[-1])
        assert urls[-1] == f"unix:{path}"
        assert any("[::1]" in url for url in urls)
        assert [health(url) for url in urls[:-1]] == [200] * (len(urls) - 1)
        assert health("http://localhost", path) == 200
        assert server.stop() == 0


# --- unix sockets ---


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_unix_socket_has_the_mode_asked_for(
    tmp_path: Path, mode: int, umask: int
) -> None:
    path = tmp_path / "s"
    before = os.umask(umask)
    try:
        (made,) = es.bind_all(
            kit.settings(host="none", uds=str(path), uds_mode=f"{mode:o}")
        )
        made.close()
        assert os.umask(umask) == umask  # as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_dead_socket_makes_way(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    for _ in range(2):
        with listening(uds=path):
            pass
        assert stat.S_ISSOCK(os.stat(path).st_mode)  # nobody listens


def test_a_live_socket_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with listening(uds=path) as (live,):
        said = refusal(uds=path)
        assert said == f"cannot listen on --uds {path}: another process listens there"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            live.accept()[0].close()


def test_a_live_socket_with_a_full_backlog_is_said_to_be_alive(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with contextlib.ExitStack() as opened:
        live = opened.enter_context(socket.socket(socket.AF_UNIX))
        live.bind(path)
        live.listen(0)
        with pytest.raises(BlockingIOError):
            while True:
                client = opened.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)
        said = refusal(uds=path)
        assert said == f"cannot listen on --uds {path}: another process listens there"
        assert os.path.exists(path)


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "folder":
        path.mkdir()
    else:
        content = tmp_path / "content"
        content.write_text("mine")
        content.rename(path) if kind == "file" else path.symlink_to(content)
    assert "a file of that name that is no socket" in refusal(uds=str(path))
    assert kind == "folder" or path.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none/s", "No such file or directory"),
        ("file/s", "Not a directory"),
        ("x" * 200, "AF_UNIX path too long"),
    ],
)
def test_an_impossible_path_is_a_sentence(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / name)
    assert refusal(uds=path) == f"cannot listen on --uds {path}: {says}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_others_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert refusal(uds=str(tmp_path / "s")).endswith(": Permission denied")


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[str, str]:
    """Flags: a real model, that of the program itself needs one."""
    return "--model-path", str(models.tiny_bert(tmp_path))


def test_a_unix_socket_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with kit.started("--host", "none", "--uds", str(path)) as server:
        assert server.url == f"unix:{path}"
        assert health("http://localhost", path) == 200
        assert server.stop() == 0
    assert not path.exists()


def test_a_unix_socket_goes_with_the_parent(
    tmp_path: Path, tiny: tuple[str, str]
) -> None:
    path = tmp_path / "s"
    flags = ("--host", "none", "--uds", str(path), *tiny)
    with kit.started(*flags, module=(es.__file__,)) as server:
        assert health("http://localhost", path) == 200
        assert server.stop() == 0
    assert not path.exists()


def test_a_unix_socket_goes_with_a_server_that_cannot_start(tmp_path: Path) -> None:
    path, missing = tmp_path / "s", str(kit.fake_gguf(tmp_path))
    flags = ("--host", "none", "--uds", str(path), "--tls-cert", missing)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kit", *flags, "--tls-key", missing],
        cwd=kit.ROOT,
        capture_output=True,
        text=True,
        timeout=kit.DEADLINE_S,
        check=False,
    )
    assert (done.returncode, "TLS: " in done.stderr) == (1, True)
    assert not path.exists()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_is_served_over_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with kit.started("--host", "none", "--uds", str(path)):
        command = ["curl", "-sS", "--fail", "--unix-socket", str(path)]
        command += ["-H", "content-type: application/json", "-d", '{"input": "a"}']
        done = subprocess.run(
            [*command, "http://localhost/v1/embeddings"],
            capture_output=True,
            timeout=kit.DEADLINE_S,
            check=True,
        )
    reply: Any = es.json_codec().loads(done.stdout)
    assert len(reply["data"][0]["embedding"]) == 8


# --- sockets handed over ---

KIT = ("-m", "tests.kit")  # the program with a made-up engine
# What systemd does between fork and exec: descriptors from 3 on, and whom they are for.
LIKE_SYSTEMD = """
import fcntl, os, sys
numbers, listen_pid, *command = sys.argv[1:]
moved = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 100) for n in numbers.split(",")]
for n, number in enumerate(moved):
    os.dup2(number, 3 + n, inheritable=True)
    os.close(number)
os.environ["LISTEN_FDS"] = str(len(moved))
os.environ["LISTEN_PID"] = listen_pid or str(os.getpid())
os.execv(sys.executable, [sys.executable, *command])
"""


@contextlib.contextmanager
def activated(
    *sockets: socket.socket,
    flags: tuple[str, ...] = (),
    module: tuple[str, ...] = KIT,
    listen_pid: str = "",
) -> Iterator[kit.Server]:
    """The program with these sockets from systemd; ``listen_pid`` empty: its own."""
    numbers = [sock.fileno() for sock in sockets]
    shown = ",".join(map(str, numbers))
    before = ("-c", LIKE_SYSTEMD, shown, listen_pid)
    with kit.started(*flags, module=(*before, *module), hand_over=numbers) as server:
        yield server


def test_sockets_handed_over_are_served_and_none_is_bound(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening(LOOPBACK, LOOPBACK, uds=str(path)) as sockets:
        flags = ("--host", "192.0.2.1")  # cannot be bound
        with activated(*sockets, flags=flags) as server:
            urls = [es.url_of(sock, is_tls=False) for sock in sockets]
            assert server.url == urls[0]
            assert [health(url) for url in urls[:2]] == [200, 200]
            assert health("http://localhost", path) == 200
            assert server.stop() == 0
        with socket.create_connection(sockets[0].getsockname()):
            pass  # still ours
    assert path.exists()


def test_a_supervised_server_serves_what_was_handed_over(
    tiny: tuple[str, str],
) -> None:
    with (
        listening(LOOPBACK) as (sock,),
        activated(sock, flags=tiny, module=(es.__file__,)) as server,
    ):
        assert server.url == es.url_of(sock, is_tls=False)
        assert health(server.url) == 200
        assert server.stop() == 0


def test_a_parent_leaves_the_file_of_a_socket_handed_over(
    tmp_path: Path, tiny: tuple[str, str]
) -> None:
    path = tmp_path / "s"
    flags = ("--uds", str(path), *tiny)
    with listening(uds=str(path)) as (sock,):
        with activated(sock, flags=flags, module=(es.__file__,)) as server:
            assert health("http://localhost", path) == 200
            assert server.stop() == 0
        assert path.exists()


def test_sockets_for_another_process_are_ignored() -> None:
    with (
        listening(LOOPBACK) as (sock,),
        activated(sock, listen_pid=str(os.getpid())) as server,
    ):
        assert server.url != es.url_of(sock, is_tls=False)
        assert health(server.url) == 200
        assert server.stop() == 0


@pytest.mark.parametrize(
    "environment", [{}, {"LISTEN_FDS": "1"}, {"LISTEN_FDS": "1", "LISTEN_PID": "1"}]
)
def test_without_our_pid_nothing_is_inherited(environment: dict[str, str]) -> None:
    assert es.inherited_sockets(environment) == {}


def test_no_sockets_are_no_sockets() -> None:
    mine = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"}
    assert es.inherited_sockets(mine) == {}


def test_a_pid_without_a_count_is_no_sockets() -> None:
    # As sd_listen_fds(3) has it.
    assert es.inherited_sockets({"LISTEN_PID": str(os.getpid())}) == {}


def test_a_socket_over_which_nobody_knows_who_comes_is_a_sentence() -> None:
    said = (
        "import os, embellama_server as es\n"
        "es.inherited_sockets({**os.environ, 'LISTEN_PID': str(os.getpid())})\n"
    )
    code = f"import os\nos.dup2(int(os.environ['MADE']), 3)\n{said}"
    other = "socket 0 is neither TCP nor a unix socket"
    for kind, listens, refusal in (
        (socket.SOCK_DGRAM, False, other),
        (socket.SOCK_SEQPACKET, True, other),
        (socket.SOCK_STREAM, False, "socket 0 does not listen"),
        (socket.SOCK_STREAM, True, ""),
    ):
        with socket.socket(socket.AF_UNIX, kind) as made:
            if listens:
                made.bind("")  # a name that the system finds
                made.listen()
            environment = os.environ | {"LISTEN_FDS": "1", "MADE": str(made.fileno())}
            done = subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                pass_fds=(made.fileno(),),
                cwd=kit.ROOT,
                capture_output=True,
                text=True,
                timeout=kit.DEADLINE_S,
                check=False,
            )
        assert refusal in done.stderr
        assert bool(refusal) is bool(done.stderr), done.stderr


def test_a_count_that_is_no_number_is_a_sentence() -> None:
    mine = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "two"}
    with pytest.raises(es.StartupError, match="LISTEN_FDS=two cannot be used: "):
        es.inherited_sockets(mine)


def test_what_was_handed_over_and_is_no_socket_is_a_sentence(tmp_path: Path) -> None:
    environment = os.environ | {"LISTEN_FDS": "1"}
    with (tmp_path / "file").open("w") as file:
        done = subprocess.run(
            [sys.executable, "-c", LIKE_SYSTEMD, str(file.fileno()), "", *KIT],
            cwd=kit.ROOT,
            env=environment,
            pass_fds=[file.fileno()],
            capture_output=True,
            text=True,
            timeout=kit.DEADLINE_S,
            check=False,
        )
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert said.startswith("embellama_server: LISTEN_FDS=1 cannot be used: ")


# --- TLS ---


@dataclass
class Files:
    """A server's certificate and key, as PEM files, and who issued them."""

    folder: Path
    authority: trustme.CA

    @property
    def settings(self) -> dict[str, Any]:
        return {"tls_cert": str(self.cert), "tls_key": str(self.key)}

    @property
    def cert(self) -> Path:
        return self.folder / "cert.pem"

    @property
    def key(self) -> Path:
        return self.folder / "key.pem"

    def renew(self, *, with_key: bool = True) -> None:
        """Another certificate; without its key, the pair does not match."""
        made = self.authority.issue_cert("localhost", "127.0.0.1")
        replace_file(self.cert, b"".join(p.bytes() for p in made.cert_chain_pems))
        if with_key:
            replace_file(self.key, made.private_key_pem.bytes())

    def client(self, identity: trustme.CA | None = None) -> ssl.SSLContext:
        """A client that trusts the server; ``identity`` issues its certificate."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        if identity is not None:
            identity.issue_cert("client@example.org").configure_cert(context)
        return context


def replace_file(path: Path, content: bytes) -> None:
    """At once, as tools do that renew certificates."""
    unfinished = path.with_name(".new")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(tmp_path, trustme.CA())
    made.renew()
    return made


def on_each_loop(test: Callable[..., Awaitable[None]]) -> Any:
    """Run an ``async def test(...)`` on each of LOOPS; nothing may go unhandled."""

    def run(loop: str, **arguments: Any) -> None:
        unhandled: list[dict[str, Any]] = []

        async def body() -> None:
            asyncio.get_running_loop().set_exception_handler(
                lambda _, context: unhandled.append(context)
            )
            async with asyncio.timeout(kit.DEADLINE_S):
                await test(**arguments)

        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(body())
        assert not unhandled

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    first = inspect.Parameter("loop", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [first, *inspect.signature(test).parameters.values()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return pytest.mark.parametrize("loop", LOOPS)(run)


@contextlib.asynccontextmanager
async def connected(
    running: kit.RunningService,
    context: ssl.SSLContext | None,
    *sent: bytes,
    reads_little: bool = False,
    name: str = "localhost",
) -> AsyncIterator[Client]:
    """A connection, over TLS if there is a context; ended without ceremony."""
    sock = socket.socket()
    if reads_little:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, (running.host, running.port))
    streams = await asyncio.open_connection(
        sock=sock, ssl=context, server_hostname=name if context else None
    )
    client = Client(*streams)
    client.send(*sent)
    try:
        yield client
    finally:
        client.writer.transport.abort()


def serial(client: Client) -> str:
    """Which certificate the server showed on this connection."""
    return str(client.writer.get_extra_info("peercert")["serialNumber"])


async def is_served(running: kit.RunningService, context: ssl.SSLContext) -> bool:
    """Whether a request gets an answer, or the connection an end."""
    try:
        async with connected(running, context, BYE) as client:
            return (await client.replies("GET"))[0].status == 200
    except (ssl.SSLError, ConnectionError):
        return False


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@on_each_loop
async def test_tls_1_2_and_1_3_are_spoken(files: Files, version: str) -> None:
    context = files.client()
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    async with (
        kit.running_service(**files.settings) as running,
        connected(running, context, HEALTH, embed("a", close=True)) as client,
    ):
        chosen = client.writer.get_extra_info("ssl_object").version()
        assert chosen == version.replace("_", ".")
        replies = await client.replies("GET", "POST")
        assert [reply.status for reply in replies] == [200, 200]


@on_each_loop
async def test_tls_1_1_is_refused_by_the_server(files: Files) -> None:
    context = files.client()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1_1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # or OpenSSL itself would not
    async with kit.running_service(**files.settings) as running:
        # Had our own side refused, it would be an SSLError.
        with pytest.raises(ConnectionError):
            async with connected(running, context):
                pytest.fail("connected")


@on_each_loop
async def test_http_1_1_is_what_is_agreed_on(files: Files) -> None:
    context = files.client()
    context.set_alpn_protocols(["h2", "http/1.1"])
    async with (
        kit.running_service(**files.settings) as running,
        connected(running, context) as client,
    ):
        agreed = client.writer.get_extra_info("ssl_object").selected_alpn_protocol()
        assert agreed == "http/1.1"


@pytest.mark.parametrize("sent", [HEALTH, b"\x16\x03\x01" + b"\xff" * 99, b"\0" * 999])
@on_each_loop
async def test_what_is_no_tls_is_closed_without_harm(files: Files, sent: bytes) -> None:
    async with kit.running_service(**files.settings) as running:
        async with connected(running, None, sent) as client:
            with contextlib.suppress(ConnectionError):
                assert b"HTTP" not in await client.rest()
        assert await is_served(running, files.client())
        assert " bug " not in running.log.getvalue()


@on_each_loop
async def test_a_handshake_that_does_not_end_is_ended(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "HANDSHAKE_S", 0.1)
    async with (
        kit.running_service(**files.settings) as running,
        connected(running, None, b"\x16\x03\x01") as client,
    ):
        with contextlib.suppress(ConnectionError):
            assert await client.rest() == b""


HELLO = b"\x16\x03\x01"  # a handshake that does not go on


@pytest.mark.parametrize("leaves", ["itself", "at the end of its time", "with us"])
@on_each_loop
async def test_a_handshake_has_a_place_until_it_ends(
    files: Files, leaves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_LINGER_S", 0.1)
    if leaves == "at the end of its time":
        monkeypatch.setattr(es, "HANDSHAKE_S", 0.3)
    async with (
        kit.running_service(max_connections=3, **files.settings) as running,
        contextlib.AsyncExitStack() as opened,
    ):
        connections = running.service.connections
        silent = [
            await opened.enter_async_context(connected(running, None, sent))
            for sent in (HELLO, b"", HELLO)
        ]
        await until(lambda: connections.places == 3)
        async with connected(running, files.client(), embed("a")) as client:
            (reply,) = await client.replies("POST")
            assert (reply.status, reply.error["code"]) == (503, "too_many_connections")
        async with connected(running, files.client(), BYE) as client:
            assert (await client.replies("GET"))[0].status == 200  # /health
        if leaves == "with us":
            running.server.stop()
            await running.task
        elif leaves == "itself":
            for client in silent:
                client.writer.transport.abort()
        await until(lambda: not connections.open)
        assert (connections.places, connections.per_address) == (0, {})
        if leaves != "with us":
            assert await is_served(running, files.client())
        assert " bug " not in running.log.getvalue()


@on_each_loop
async def test_very_many_handshakes_are_a_few_sockets(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "TURNED_AWAY", 4)
    async with (
        kit.running_service(max_connections_per_address=3, **files.settings) as running,
        contextlib.AsyncExitStack() as opened,
    ):
        connections = running.service.connections
        for _ in range(60):
            await opened.enter_async_context(connected(running, None, HELLO))
        await until(lambda: len(connections.open) <= 7)
        assert await is_served(running, files.client())  # it asks for /health
        assert len(connections.open) <= 7
        assert connections.places == 3


@pytest.mark.parametrize("leave", ["tidily", "at once"])
@on_each_loop
async def test_who_leaves_over_tls_is_not_computed_for(
    files: Files, leave: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "HALF_CLOSED_S", 3600)  # TLS has no half-close
    engine = kit.FakeEngine()
    engine.block()
    async with (
        kit.running_service(engine, **files.settings) as running,
        connected(running, files.client(), embed("a")) as client,
    ):
        await asyncio.to_thread(engine.wait_until_computing)
        if leave == "tidily":
            client.writer.close()
        else:
            client.writer.transport.abort()
        await until(lambda: running.backlog.inputs == 0)
        await until(lambda: "status=499" in running.log.getvalue())


@on_each_loop
async def test_a_renewed_certificate_is_for_new_connections(files: Files) -> None:
    context = files.client()
    async with (
        kit.running_service(**files.settings) as running,
        connected(running, context, HEALTH) as old,
    ):
        assert (await old.reply()).status == 200
        files.renew()
        running.server._tick()
        assert "keys and certificates read again" in running.log.getvalue()
        async with connected(running, context, HEALTH) as new:
            assert (await new.reply()).status == 200
            assert serial(new) != serial(old)
        old.send(HEALTH)
        assert (await old.reply()).status == 200


@on_each_loop
async def test_half_a_pair_is_not_used_until_it_is_whole(files: Files) -> None:
    context = files.client()
    async with kit.running_service(**files.settings) as running:
        serials = []
        for with_key in (True, False, True):
            files.renew(with_key=with_key)
            running.server._tick()
            async with connected(running, context, HEALTH) as client:
                assert (await client.reply()).status == 200
                serials.append(serial(client))
        assert serials[0] == serials[1] != serials[2]
        assert running.log.getvalue().count("changed file not used") == 1
        assert "cannot be used: " in running.log.getvalue()


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@on_each_loop
async def test_with_a_client_ca_only_its_clients_are_let_in(
    files: Files, version: str
) -> None:
    ours, others = trustme.CA(), trustme.CA()
    path = files.folder / "clients.pem"
    ours.cert_pem.write_to_path(path)
    chosen = files.settings | {"tls_client_ca": str(path)}
    async with kit.running_service(**chosen) as running:
        for identity, is_let_in in ((None, False), (others, False), (ours, True)):
            context = files.client(identity)
            context.maximum_version = ssl.TLSVersion[version]
            assert await is_served(running, context) is is_let_in


@on_each_loop
async def test_a_client_ca_that_was_replaced_counts_no_more(files: Files) -> None:
    before, after = trustme.CA(), trustme.CA()
    path = files.folder / "clients.pem"
    before.cert_pem.write_to_path(path)
    chosen = files.settings | {"tls_client_ca": str(path)}
    async with kit.running_service(**chosen) as running:
        assert await is_served(running, files.client(before))
        replace_file(path, after.cert_pem.bytes())
        running.server._tick()
        assert await is_served(running, files.client(after))
        assert not await is_served(running, files.client(before))


@on_each_loop
async def test_a_client_that_names_no_host_is_shown_the_newest(files: Files) -> None:
    context = files.client()
    context.check_hostname = False
    async with kit.running_service(**files.settings) as running:
        serials = []
        for _ in range(2):
            async with connected(running, context, HEALTH, name="") as client:
                assert (await client.reply()).status == 200
                serials.append(serial(client))
            files.renew()
            running.server._tick()
        assert serials[0] != serials[1]


def asked_again(
    running: kit.RunningService,
    context: ssl.SSLContext,
    session: ssl.SSLSession | None,
) -> tuple[ssl.SSLSession | None, bool]:
    """One request; the session to resume it with, and whether one was resumed."""
    address = running.host, running.port
    with (
        socket.create_connection(address, timeout=kit.DEADLINE_S) as sock,
        context.wrap_socket(
            sock, server_hostname="localhost", session=session
        ) as client,
    ):
        client.sendall(BYE)
        raw = b""
        while received := client.recv(65536):
            raw += received
        assert kit.parse_reply(raw, "GET").status == 200
        return client.session, bool(client.session_reused)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@on_each_loop
async def test_a_session_of_before_does_not_outlive_its_client_ca(
    files: Files, version: str
) -> None:
    before, after = trustme.CA(), trustme.CA()
    path = files.folder / "clients.pem"
    before.cert_pem.write_to_path(path)
    chosen = files.settings | {"tls_client_ca": str(path)}
    context = files.client(before)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    async with kit.running_service(**chosen) as running:
        session, _ = await asyncio.to_thread(asked_again, running, context, None)
        replace_file(path, after.cert_pem.bytes())
        running.server._tick()
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(asked_again, running, context, session)


@pytest.mark.parametrize(("path", "status"), [("/nope", 404), ("/v1/embeddings", 413)])
@on_each_loop
async def test_an_early_refusal_reaches_who_is_still_sending(
    files: Files, path: str, status: int
) -> None:
    size = (8 << 20) + (status == 413)
    async with (
        kit.running_service(max_body_bytes=8 << 20, **files.settings) as running,
        connected(running, files.client()) as client,
    ):
        client.send(post(path, length=size), bytes(size))
        reply = await client.reply("POST")
        assert (reply.status, reply.headers["connection"]) == (status, "close")
        assert reply.error["message"]


@on_each_loop
async def test_a_large_reply_comes_whole(files: Files) -> None:
    engine = kit.FakeEngine(n_embd=4096)
    async with (
        kit.running_service(engine, **files.settings) as running,
        connected(running, files.client(), MANY, reads_little=True) as client,
    ):
        assert len((await client.reply("POST")).json["data"]) == 500


@pytest.mark.parametrize("close", [True, False])
@on_each_loop
async def test_a_slow_reader_is_not_cut_off(
    files: Files, close: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_LEAVE_S", 0.1)
    engine, asked = kit.FakeEngine(n_embd=4096), embed(*["a"] * 500, close=close)
    async with (
        kit.running_service(engine, keep_alive_s=0.1, **files.settings) as running,
        connected(running, files.client(), asked, reads_little=True) as client,
    ):
        raw = await client.reader.readuntil(b"\r\n\r\n")
        size = int(kit.parse_reply(raw, "HEAD").headers["content-length"])
        step = size // 20 + 1
        for begin in range(0, size, step):
            raw += await client.reader.readexactly(min(step, size - begin))
            await asyncio.sleep(0.03)  # not to wait for anything: it is slow
        assert len(kit.parse_reply(raw, "POST").json["data"]) == 500


@on_each_loop
async def test_who_does_not_read_is_dropped(files: Files) -> None:
    engine = kit.FakeEngine(n_embd=4096)
    times: dict[str, Any] = {"write_timeout_s": 0.3, "keep_alive_s": 3600}
    async with (
        kit.running_service(engine, **times, **files.settings) as running,
        connected(running, files.client(), MANY, reads_little=True),
    ):
        connections = running.service.connections
        await until(lambda: bool(connections.open))
        async with asyncio.timeout(min(kit.DEADLINE_S, 10)):
            await until(lambda: not connections.open)


@on_each_loop
async def test_a_stop_ends_idle_connections(files: Files) -> None:
    async with (
        kit.running_service(**files.settings) as running,
        connected(running, files.client(), HEALTH) as client,
    ):
        await client.reply()
        running.server.stop()
        assert await client.rest() == b""
        assert await running.task == 0


@on_each_loop
async def test_httpx_is_served_over_tls_with_a_certificate(files: Files) -> None:
    path = files.folder / "clients.pem"
    files.authority.cert_pem.write_to_path(path)
    chosen = files.settings | {"tls_client_ca": str(path)}
    async with (
        kit.running_service(**chosen) as running,
        httpx.AsyncClient(verify=files.client(files.authority)) as client,
    ):
        url = f"https://localhost:{running.port}/v1/embeddings"
        for text in ("a", "b"):
            reply = await client.post(url, json={"input": text})
            assert reply.status_code == 200
            assert len(reply.json()["data"][0]["embedding"]) == 8


def break_files(files: Files, which: str) -> es.Settings:
    """TLS files of which one is no use."""
    names = files.settings | {"tls_client_ca": ""}
    if which == "mismatched":
        files.renew(with_key=False)
    elif which == "encrypted":
        key = files.authority.issue_cert("x").private_key_pem.bytes()
        command = ["openssl", "pkcs8", "-topk8", "-passout", "pass:x"]
        done = subprocess.run(command, input=key, capture_output=True, check=True)
        files.key.write_bytes(done.stdout)
    else:
        name, _, how = which.partition(" ")
        path = files.folder / "broken"
        if how == "garbage":
            path.write_bytes(b"garbage")
        elif how == "fifo":  # which would be waited for
            os.mkfifo(path)
        names[name] = str(path)
    return kit.settings(**names)


@pytest.mark.parametrize(
    "which",
    [
        *("tls_cert missing", "tls_key missing", "tls_client_ca missing"),
        *("tls_cert garbage", "tls_key garbage", "tls_client_ca garbage"),
        *("tls_cert fifo", "tls_key fifo", "tls_client_ca fifo"),
        "mismatched",
        pytest.param(
            "encrypted",
            marks=pytest.mark.skipif(
                shutil.which("openssl") is None, reason="no openssl here"
            ),
        ),
    ],
)
def test_tls_files_that_are_no_use_are_a_sentence(files: Files, which: str) -> None:
    broken = break_files(files, which)
    with pytest.raises(es.StartupError) as caught:
        es.maybe_tls_context(broken)
    said = str(caught.value)
    assert said.startswith(f"TLS: {files.cert.parent}")
    assert " cannot be used: " in said
