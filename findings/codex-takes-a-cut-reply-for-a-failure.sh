#!/usr/bin/env bash
# Guess: a reply that reaches its limit ends with response.incomplete and the reason
#   max_output_tokens, as OpenAI documents it; a client shows what came, like a chat client
#   does with finish_reason "length".
# What happens: Codex's CLI shows the text, calls the turn an error and exits with 1. It sends
#   no max_output_tokens of its own, so the limit it fell over is the server's default.
# Why it matters: a server that bounds every reply, so that one client cannot keep it for hours,
#   must give agents more than a chat needs, or their turns fail where nothing is wrong.
# Seen with @openai/codex 0.171.0 (linux-x64, and Node 20), against twenty lines of a server:
#   a reply that ends completed: exit 0
#   the same reply, ended incomplete: exit 1
#   ERROR: Incomplete response returned, reason: max_output_tokens
#   limits asked for: []
set -euo pipefail
folder=$(mktemp -d)
servers=()
trap 'kill "${servers[@]}" 2>/dev/null; rm -rf "$folder"' EXIT
cd "$folder"
npm install --silent --no-fund --no-audit @openai/codex@0.171.0 >/dev/null
cat > server.py <<'PY'
"""Every reply is half a sentence; the argument says how it ends."""
import http.server
import json
import sys

END = sys.argv[1]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        print(json.dumps(asked.get("max_output_tokens")), file=sys.stderr, flush=True)
        part = {"type": "output_text", "text": "Here is half of a", "annotations": []}
        item = {"type": "message", "id": "msg_1", "role": "assistant", "content": []}
        whole = item | {"status": END, "content": [part]}
        begun = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m"}
        ended = begun | {"status": END, "output": [whole]}
        ended["usage"] = {"input_tokens": 9, "output_tokens": 5, "total_tokens": 14}
        if END == "incomplete":
            ended["incomplete_details"] = {"reason": "max_output_tokens"}
        place = {"output_index": 0, "content_index": 0, "item_id": "msg_1"}
        events = (
            {"type": "response.created", "response": begun | {"status": "in_progress"}},
            {"type": "response.output_item.added", "output_index": 0, "item": item},
            {"type": "response.output_text.delta", **place, "delta": part["text"]},
            {"type": "response.output_item.done", "output_index": 0, "item": whole},
            {"type": f"response.{END}", "response": ended},
        )
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for number, event in enumerate(events):
            data = json.dumps(event | {"sequence_number": number})
            self.wfile.write(f"event: {event['type']}\ndata: {data}\n\n".encode())

    def log_message(self, *_):
        pass


server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
PY
# Ask Codex for one turn; its exit status.
turn() {
    local port status=0
    mkdir -p "home-$1" work
    mkfifo "port-$1"
    python3 server.py "$1" > "port-$1" 2> "limits-$1" &
    servers+=($!)
    read -r port < "port-$1"
    printf '%s\n' 'model = "m"' 'model_provider = "local"' \
        '[model_providers.local]' 'name = "local"' 'wire_api = "responses"' \
        "base_url = \"http://127.0.0.1:$port/v1\"" \
        'request_max_retries = 0' 'stream_max_retries = 0' > "home-$1/config.toml"
    CODEX_HOME=$folder/home-$1 timeout 120 node_modules/.bin/codex exec \
        --skip-git-repo-check -C work 'Say a sentence.' </dev/null > "said-$1" 2>&1 || status=$?
    echo "$status"
}
turn completed > status-completed  # in this shell, which ends the servers
turn incomplete > status-incomplete
echo "a reply that ends completed: exit $(cat status-completed)"
echo "the same reply, ended incomplete: exit $(cat status-incomplete)"
grep -m 1 '^ERROR' said-incomplete
limits=$(cat limits-* | grep -v null || true)
echo "limits asked for: [$limits]"
grep -q 'Here is half of a' said-completed
grep -q 'Here is half of a' said-incomplete
test "$(cat status-completed) $(cat status-incomplete) $limits" = "0 1 "
grep -q '^ERROR: Incomplete response returned, reason: max_output_tokens' said-incomplete
