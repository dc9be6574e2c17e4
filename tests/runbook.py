"""What to do about each error and log line: README's rows that the program does not hold.

``python -m tests docs`` writes them into README; tests/test_runbook.py finds what lacks one.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import embellama_server as es

# By code: what helps. The message of the error itself names the field, limit and number.
# fmt: off
ERRORS: dict[str, str] = {
    "malformed_request": "The message says which byte or line. From a proxy: let it speak HTTP/1.1 (nginx `proxy_http_version 1.1`); TLS to a plain port looks like this too.",
    "invalid_json": "Send UTF-8 JSON with an object on top; a shell that eats quotes is the usual cause.",
    "invalid_value": "Correct the field in `param`; [what it takes](#endpoints) is in `/openapi.json`.",
    "wrong_kind_of_model": "Name another `model`; `/v1/models` says what each can do.",
    "token_ids_not_accepted": "Send texts (LangChain: `check_embedding_ctx_length=False`), or allow ids with `--accept-token-ids` if they are this model's.",
    "context_length_exceeded": "Shorten or split the input, say `truncate`, or raise `--max-input-tokens` or `--context-size` up to the model's own length.",
    "template_error": "The words are the template's: roles in another order, no system message. Else give a `--chat-template`.",
    "max_tokens_per_request": "Send fewer inputs at a time, or raise `--max-request-tokens`.",
    "invalid_api_key": "Compare with the key file: expired (`not_after`), or another server's? For signatures: are both clocks right?",
    "host_not_allowed": "A name of your own: `--allowed-host`. A page: `--cors-origin`. Or set keys, then any Host will do.",
    "admin_only": "Use a key marked `admin`; without keys, the one in the file that the message names.",
    "model_not_found": "The message lists the names; add a `--model-alias`, or serve it.",
    "unknown_url": "The message says which path was probably meant: `/v1/v1` comes of a base URL with `/v1` too many.",
    "method_not_allowed": "The header `Allow` has those that the route knows.",
    "receive_timeout": "A slow network: `--header-timeout-s`, `--body-timeout-s`, `--min-rate-bytes-s`. A proxy that reads bodies first (`proxy_request_buffering on`) spares them.",
    "reload_refused": "Correct what the message names, and reload again; [the old configuration goes on](#stop-and-reload).",
    "model_conflict": "The message says what stands in the way: another load, the last version, equal names.",
    "body_too_large": "Send less at a time, or raise `--max-body-bytes` (and nginx's `client_max_body_size`).",
    "uri_too_long": "Put it into the body: no route of ours needs long paths.",
    "unsupported_media_type": "`Content-Type: application/json`; bodies as gzip or as they are.",
    "expectation_failed": "Send `Expect: 100-continue`, or none.",
    "rate_limit_exceeded": "Wait for `Retry-After`; or raise the key's `rate=`, `tokens=`. Behind a proxy without `--trusted-proxy` all clients share one limit.",
    "header_too_large": "Send fewer cookies: a browser or a single sign-on proxy adds them.",
    "internal_error": "Report the traceback from the log (same request id) and what was asked.",
    "nonfinite_embedding": "`--dead-letter` keeps the text. Does it happen with `--weights f32`? If not, they are too narrow for this model.",
    "engine_failed": "As above; the log's `a call failed` says how. In time: is another program on these cores? `--stuck-after-s`.",
    "transfer_coding_not_implemented": "Send it chunked, or with Content-Length; compress with Content-Encoding.",
    "not_ready": "Wait for `/ready`. For long: [EmbellamaNotReady](#alerts).",
    "model_unavailable": "The message and the log (`not loaded`) say why; correct that, then `POST /admin/models/load` tries at once.",
    "engine_unavailable": "It tries again, or replaces its process, by itself. For long: [EmbellamaEngineBroken](#alerts).",
    "out_of_memory": "Send shorter inputs; else [Memory](#procedures).",
    "overloaded": "Wait for `Retry-After`. For long: [EmbellamaShedding](#alerts).",
    "too_many_connections": "Keep connections and use them again; else `--max-connections`, `--max-connections-per-address`, `ulimit -n`.",
    "request_timeout": "Ask for less at a time or let the client wait longer; else [Slow](#procedures).",
    "http_version_not_supported": "Speak HTTP/1.1; HTTP/2 ends at a proxy.",
}

# Warnings and errors of the log, as written there (... is a part that differs): what each
# means, and what to do.
LOG_LINES: dict[str, tuple[str, str]] = {
    # the server
    "the server has died; starting it again": ("The serving process ended without being asked; `how` says by what.", "The stack of a crash stands above. `SIGKILL`: [Memory](#procedures). `SIGABRT`: it was silent. `SIGILL`: llama.cpp was compiled for another CPU. A crash again and again: go back to the model before."),
    "the server cannot start here": ("It died three times before it was ready; the program ends with 1.", "As above; `check FILE` shows it without serving."),
    "no process for the server now": ("The system lets nobody start a process.", "`ulimit -u`, `TasksMax=`, the container's process limit. It tries again by itself."),
    "no heartbeat: it is ended": ("The serving process was silent for `--watchdog-s`.", "The stack of each thread follows. A machine that swaps or was suspended does this: give it memory, or raise `--watchdog-s`."),
    "it did not end: killed": ("It did not stop in time.", "Raise `--drain-timeout-s` if requests take longer than that."),
    "replacing this process": ("A llama.cpp call does not end, or a thread has died: [EmbellamaWorkerStuck](#alerts).", "By itself. Again: keep what stands above, and serve the model that worked before."),
    "the parent is gone: stopping": ("The process that supervises was killed.", "Whatever runs the service must signal that one, not kill it (`KillMode=mixed`)."),
    "stopped with work unfinished": ("So many requests got 503 at the end of `--drain-timeout-s`.", "Raise it, and with it whatever kills after it (`TimeoutStopSec=`, `terminationGracePeriodSeconds`)."),
    "bug": ("A mistake of ours, with its traceback.", "Report it. That request got a 500; all else goes on."),
    "library replaced": ("orjson or uvloop is missing or too old; Python's own is used.", "Install it if the box is busy: vectors stay the same, replies take longer."),
    "setting ignored": ("A variable in LMServ's words does not fit.", "`reason` says which; use our own flag."),
    # configuration
    "not reloaded, nothing has changed": ("The new configuration is no use, or needs a restart.", "`reason` says what; `--print-config` finds most of it beforehand."),
    "not reloaded: a bug": ("A mistake of ours; the old configuration goes on.", "Report the traceback; restart to use the new one."),
    "SIGHUP: not reloaded, the server is stopping": ("The signal came too late.", "The next start reads the configuration."),
    "changed file not used": ("A key or certificate file was changed and cannot be used.", "`reason` has the line; the old ones go on until it is right."),
    "others may read this file of keys": ("Its mode lets other users read it.", "`chmod 600`, or 640. In a container: as secrets are mounted there."),
    "no admin key written": ("`--cache-dir` cannot be written, so `/admin/...` has no key.", "Set keys or `--uds`, or give it a folder."),
    # files
    "lines lost": ("`--audit-log` or `--dead-letter` cannot be written, or is full.", "`why` says it: [Full disk](#procedures). Requests go on."),
    "not reopened": ("After SIGHUP the file could not be opened; the old one goes on.", "Make its folder writable, and send SIGHUP again."),
    "spans lost": ("The collector of `--otlp-endpoint` is away or slow.", "Look there. Requests go on, spans are not sent again."),
    # clients
    "refused": ("How many were refused by the head or connection alone, by code; and the last of them.", "The code's row under [Errors](#errors)."),
    "no descriptors left": ("The process may open no more files or sockets.", "Raise `ulimit -n` (`LimitNOFILE=`), or lower `--max-connections`."),
    # loading a model
    "not loaded": ("A model could not be loaded; it is tried again after `not_again_for_s`.", "`reason` says why: file, checksum, memory. `check FILE` says it too."),
    "cached model is damaged: rebuilding it": ("The default model in `--cache-dir` fails its checksum.", "Once: nothing. Again: look at the disk (`dmesg`)."),
    "weights not tried": ("`--weights auto` could not measure one type.", "`reason` says why, usually disk or memory. It tries again at the next start."),
    "weights cannot be re-encoded in ...: ...": ("The file's own weights are served, more slowly perhaps.", "Make `--cache-dir` writable, or say `--weights keep`."),
    "--cpu-affinity is not done": ("The system forbids pinning.", "Allow `sched_setaffinity` (`SystemCallFilter=`), or leave the flag out."),
    "too few threads are allowed for --elastic": ("A lone call uses its worker's threads alone.", "Raise `ulimit -u` or `TasksMax=` to `needed`, or say `--no-elastic`."),
    "this model cannot chat": ("The chat template in its file cannot be used; it completes, and refuses chat.", "Give one with `--chat-template`."),
    "pooling is last and this file puts no token at the end of texts: if the model was trained with one, vectors are wrong without --end-token, e.g. ...": ("Perhaps the file was converted without its last token.", "Compare with `check --reference`; then `--end-token`, or convert it again."),
    "this file names no pre-tokenizer (tokenizer.ggml.pre), so texts are cut as llama.cpp guesses and may have other tokens than the model knows: convert it again": ("An old conversion.", "Convert it again; until then compare with `check --reference`."),
    "prompts not read": ("`config_sentence_transformers.json` beside the model cannot be read.", "`reason` says why; correct it, or remove it."),
    "prompts that are no strings are not read": ("Some prompts there are no texts.", "Correct them, or name prompts with `--prompt`."),
    "default_prompt_name beside it, ..., ...": ("That file names a prompt that the model does not have.", "Add it with `--prompt`, or choose another with `--default-prompt-name`."),
    "files beside the model say what is not done here": ("sentence-transformers would do something else with this model.", "`files` says what; `check --reference` tells whether it matters."),
    "llama.cpp's AMX is built wrong and left out": ("The compiler of this llama.cpp (GCC 12.2 is one) spoils its code for Intel's AMX, which would end the process.", "Nothing: weights are computed without it, quantized ones perhaps more slowly. For full speed install a build of a newer compiler, or one without AMX: [Air-gapped boxes](#air-gapped-boxes)."),
    "llama.cpp": ("A warning or error in llama.cpp's own words.", "With an error of ours beside it: the cause. Alone: nothing."),
    # computing
    "a call failed": ("A llama.cpp call failed; each of its inputs is tried once more alone.", "`error` says how. Again and again: [EmbellamaEngineBroken](#alerts)."),
    "a call took far too long": ("It was ended after `--stuck-after-s`; its inputs are tried alone.", "Is another program on these cores, does the machine swap? Else keep the text (`--dead-letter`)."),
    "canary": ("After five failures in a row, a text of our own failed as well; requests get 503.", "[EmbellamaEngineBroken](#alerts). It is tried again by itself; `worked=True` ends it."),
    "a step failed": ("As `a call failed`, where replies grow; they are tried alone.", "`reason` says how."),
    "a step took far too long": ("As `a call took far too long`, where replies grow.", "As there."),
    "a model gave no numbers": ("Its logits were not finite; that reply ended with a 500.", "Once: perhaps the prompt. Often: damaged weights, compare the checksum (`check`)."),
    "no context to generate with": ("No memory for the KV cells; replies get 503 until there is.", "[Memory](#procedures), or a smaller `--context-size`."),
}
# fmt: on


def log_events(source: str) -> set[str]:
    """Each warning and error that a program logs; ``...`` for what differs."""
    found: set[str] = set()
    for scope in ast.walk(ast.parse(source)):
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
            for level, event in _logged(scope):
                if not {*_texts(level, scope)} <= {"debug", "info"}:
                    found.update(_texts(event, scope))
    return found


def _logged(scope: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What a ``Log`` is called with: whatever it hangs on, its name ends with log."""
    for node in ast.walk(scope):
        if not isinstance(node, ast.Call) or len(node.args) != 2:
            continue
        if ast.unparse(node.func).rpartition(".")[2] in ("log", "_log"):
            yield node.args[0], node.args[1]


def _texts(value: ast.expr, scope: ast.AST) -> Iterator[str]:
    """The texts that an expression may be, in its function."""
    match value:
        case ast.Constant():
            yield str(value.value)
        case ast.IfExp():
            yield from _texts(value.body, scope)
            yield from _texts(value.orelse, scope)
        case ast.JoinedStr():
            parts = (
                p.value if isinstance(p, ast.Constant) else "..." for p in value.values
            )
            yield "".join(map(str, parts))
        case ast.Name():
            found = [b for name, b in _bound(scope) if name == value.id]
            for one in found:
                yield from _texts(one, scope)
            if not found:
                yield f"{value.id}, whatever that is"
        case _:
            yield f"{ast.unparse(value)}, whatever that is"


def _bound(scope: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Names and what is assigned to them."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            (target,) = node.targets
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = [*zip(target.elts, node.value.elts, strict=True)]
            yield from ((ast.unparse(one), what) for one, what in pairs)


def our_log_events() -> set[str]:
    """Those of this program."""
    return log_events(Path(inspect.getfile(es)).read_text("utf-8"))


def log_table() -> str:
    """Every warning and error of the log."""
    lines = ["| log line | what it means | what to do |", "|---|---|---|"]
    for event, (meaning, action) in LOG_LINES.items():
        lines.append(f"| `{event}` | {meaning} | {action} |")
    return "\n".join(lines)
