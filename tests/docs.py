"""README's tables come from the program: written by ``python -m tests docs``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import textwrap
from collections.abc import Callable
from typing import Any

import embellama_server as es
from tests import runbook
from tests.kit import ROOT

README = ROOT / "README.md"


def errors_table() -> str:
    """Every error that a client can be sent."""
    lines = ["| status | code | when | what to do |", "|---|---|---|---|"]
    lines += [
        f"| {row.status} | `{row.code}` | {row.__doc__} | {runbook.ERRORS[row.code]} |"
        for row in es.API_ERRORS
    ]
    return "\n".join(lines)


def metrics_table() -> str:
    """Every metric, and the old names of those that were renamed."""
    lines = ["| metric | kind | what it counts |", "|---|---|---|"]
    for row in es.METRICS:
        label = f"{{{row.label}}}" if row.label else ""
        lines.append(f"| `{row.name}{label}` | {row.kind} | {row.help} |")
    pairs = (f"`{old}` (`{new}`)" for new, old in es.OLD_METRIC_NAMES.items())
    said = f"Names of 0.3.0 are still shown as well: {', '.join(pairs)}."
    return "\n".join([*lines, "", *textwrap.wrap(said, 118)])


def form_table(form: Any) -> str:
    """Every field of a body; required ones first."""
    lines = ["| field | default | what it says |", "|---|---|---|"]
    rows = [(row, row.metadata["row"]) for row in dataclasses.fields(form)]
    rows = [(row, said) for row, said in rows if said.kind.schema != {"type": "null"}]
    for row, said in sorted(rows, key=lambda pair: not pair[1].is_required):
        default = "required" if said.is_required else "-"
        if row.default is not None:
            default = f"`{json.dumps(row.default)}`"
        words = said.kind.schema.get("enum")
        allowed = f" ({', '.join(words)})" if words else ""
        lines.append(f"| `{row.name}` | {default} | {said.help}{allowed} |")
    return "\n".join(lines)


def routes_table() -> str:
    """Every endpoint, by group."""
    lines = ["| endpoint | what it answers |", "|---|---|"]
    for group, routes in itertools.groupby(es.ROUTES, lambda route: route.group):
        lines.append(f"| **{group}** | |")
        for route in routes:
            lines.append(f"| `{route.method} {route.path}` | {route.handler.__doc__} |")
    return "\n".join(lines)


# What a client or a file may take of us: of what; the setting, else the field of
# HttpLimits, else the text itself; whose limit is alike; the error or what else becomes
# of more.
# fmt: off
LIMITS: tuple[tuple[str, str, str, type[es.ApiError] | str], ...] = (
    ("request line, bytes", "request_line_bytes", "nginx 8 KiB, gunicorn 4094", es.TargetTooLong),
    ("header lines, bytes in all", "head_bytes", "node.js 16 KiB, nginx 32 KiB", es.HeaderTooLarge),
    ("header lines", "max_headers", "Apache and gunicorn 100", es.HeaderTooLarge),
    ("chunk line, bytes", "chunk_line_bytes", "hyper, h11: a few KiB", es.MalformedRequest),
    ("its extensions, bytes", "chunk_extension_bytes", "Go refuses long ones", es.MalformedRequest),
    ("chunk lines beyond 16 bytes and twice the data", "chunk_overhead_bytes", "Go 16 KiB", es.MalformedRequest),
    ("body, bytes", "max_body_bytes", "TEI 2 MB, nginx 1 MB; 2048 texts need more", es.BodyTooLarge),
    ("a large body, values", f"{es.MAX_REQUEST_TOKENS:,} (`--max-request-tokens`) and 16 for each of {es.MAX_DOCUMENTS:,} inputs", "-", es.TooManyTokens),
    ("a large body, lists and objects", f"16 for each of {es.MAX_DOCUMENTS:,} inputs (`--max-client-batch-size`)", "-", es.InvalidJson),
    ("pipelined requests, bytes read ahead", str(es.READ_AHEAD_BYTES), "uvicorn 64 KiB", "reading stops until the answer is out"),
    ("requests and replies held, MiB", "max_buffered_mb", "Redis client-output-buffer-limit", es.Overloaded),
    ("connections", "max_connections", "Redis 10,000, nginx 512 a worker", es.TooManyConnections),
    ("connections of one address", "max_connections_per_address", "nginx limit_conn", es.TooManyConnections),
    ("connections beyond, at a time", str(es.TURNED_AWAY), "-", "the oldest is dropped, counted in the log"),
    ("a half-closed connection's request, seconds", f"{es.HALF_CLOSED_S:g}", "-", "its work is dropped"),
    ("a head, seconds", "header_timeout_s", "hyper 30 s, nginx 60 s", es.ReceiveTimeout),
    ("a body, seconds", "body_timeout_s", "nginx 60 s between two reads", es.ReceiveTimeout),
    ("a body, least bytes per second", "min_rate_bytes_s", "Kestrel 240 after 5 s", es.ReceiveTimeout),
    ("a reply, seconds in which some must be read", "write_timeout_s", "nginx send_timeout 60 s", "the connection is dropped"),
    ("a stream, bytes ahead of its reader", str(es._STREAM_AHEAD_BYTES + es._STREAM_UNSENT_BYTES), "Cloudflare advises a TCP_NOTSENT_LOWAT of 16 KiB", "its next part waits"),
    ("an idle connection, seconds", "keep_alive_s", "nginx 75 s; Traefik's and Go's clients 90 s", "it is closed"),
    ("a TLS handshake, seconds", f"{es.HANDSHAKE_S:g}", "nginx 60 s", "the connection is dropped"),
    ("inputs waiting or running", "queue_size", "TEI 512, infinity 32,000; 0 is 65,536 or more", es.Overloaded),
    ("tokens waiting or running", "queue_tokens", "vLLM max_num_queued_tokens", es.Overloaded),
    ("memory of what waits or runs, MiB", "queue_mb", "Redis client-output-buffer-limit", es.Overloaded),
    ("beyond these, for clients with less than an equal part", f"1/{es.RESERVE_PART} more", "Netflix keeps partitions for others", es.Overloaded),
    ("inputs of one request", "max_client_batch_size", "OpenAI 2048, TEI 32; Cohere 10,000 documents, and so here unless set", es.InvalidValue),
    ("a request's inputs, tokens", "max_request_tokens", "OpenAI 300,000; others none, and so here unless set, but for /decode", es.TooManyTokens),
    ("an input, tokens", "max_input_tokens", "OpenAI 8192; 0 is the model's own", es.ContextLengthExceeded),
    ("a request from arrival to reply, seconds", "request_timeout_s", "the OpenAI SDKs' own 600 s", es.RequestTimeout),
    ("of that, the part it may be expected to wait", f"{es.MAX_WAIT_PART:g}", "CoDel drops what has waited too long; here it is not let in", es.Overloaded),
    ("a llama.cpp call, seconds", "stuck_after_s", "gunicorn kills a worker after 30 s", es.EngineFailed),
    ("requests per second of a key or address", "rate_limit", "nginx limit_req, OpenAI", es.RateLimited),
    ("tokens per minute likewise", "token_limit", "OpenAI", es.RateLimited),
    ("a signature's age, seconds", "signature_window_s", "AWS 300 s", es.Unauthorized),
    ("silence of the serving process, seconds", "watchdog_s", "systemd WatchdogSec", "it is killed and started again"),
    ("accepted work after SIGTERM, seconds", "drain_timeout_s", "Kubernetes 30 s", es.NotReady),
    ("a GGUF's tensors, and metadata entries", str(es.MAX_GGUF_ENTRIES), "ggml 2^30", "the model is not loaded"),
    ("the dead-letter file, bytes", str(es.DEAD_LETTER_BYTES), "-", "lines are lost, and counted in the log"),
)
# fmt: on


def default_of(most: str) -> str:
    """The default of a limit, with the flag that changes it if one does."""
    for row in es.SETTING_ROWS:
        if row.name == most:
            return f"{row.default_text} (`{row.flag}`)"
    return str(getattr(es.HttpLimits(), most, most))


def limits_table() -> str:
    """Every limit."""
    lines = ["| limit | default | precedent | more gets |", "|---|---|---|---|"]
    for what, most, precedent, beyond in LIMITS:
        if not isinstance(beyond, str):
            beyond = f"{beyond.status} `{beyond.code}`"
        lines.append(f"| {what} | {default_of(most)} | {precedent} | {beyond} |")
    return "\n".join(lines)


def settings_table() -> str:
    """Every setting: its flags, default, bounds, help, and when a reload changes it."""
    lines = [
        "| flag | default | allowed | what it does | a reload changes it |",
        "|---|---|---|---|---|",
    ]
    for row in es.SETTING_ROWS:
        flags = ", ".join(f"`{flag}`" for flag in row.flags)
        default = row.default_text or "-"
        cells = (flags, default, row.allowed_text, row.help, row.reload)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def emit_table() -> str:
    """Every name that ``emit`` knows, and its files."""
    plain = es.Deployment(es.load_settings({}, {}), "python", "embellama_server.py")
    lines = ["| name | files | what they are |", "|---|---|---|"]
    for name, row in es.EMITTERS.items():
        files = ", ".join(f"`{file}`" for file in row.files(plain))
        lines.append(f"| `{name}` | {files} | {row.help} |")
    return "\n".join(lines)


def alerts_table() -> str:
    """Every alert: the runbook."""
    lines = ["| alert | for | what it means | what to do |", "|---|---|---|---|"]
    lines += [
        f"| {row.name}, {row.severity} | {row.lasting} | {row.meaning} | {row.action} |"
        for row in es.ALERTS
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "endpoints": routes_table,
    "settings": settings_table,
    "errors": errors_table,
    "metrics": metrics_table,
    "limits": limits_table,
    "emit": emit_table,
    "alerts": alerts_table,
    "log": runbook.log_table,
    "request": functools.partial(form_table, es.EmbeddingsForm),
    "chat": functools.partial(form_table, es.ChatForm),
}


def generated(text: str) -> str:
    """``text`` with what stands between each pair of marks made anew."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        made = f"{begin}\n{table()}\n{end}"
        text, found = pattern.subn(lambda _, made=made: made, text)  # type: ignore[misc]
        assert found == 1, f"README must have {begin} ... {end} once"
    return text


def rewrite() -> None:
    """Bring README's tables up to date."""
    README.write_text(generated(README.read_text()))


def commands(language: str) -> list[str]:
    """The fenced blocks of README in a language, in order."""
    blocks: list[str] = re.findall(
        rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL
    )
    return blocks
