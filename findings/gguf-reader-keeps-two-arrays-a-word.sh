#!/usr/bin/env bash
# Guess: gguf.GGUFReader maps a file into memory and reads its header; to learn a model's
#   name or context length takes milliseconds and next to no memory, however large it is.
# What happens: the whole header is read at once, and of every word of the vocabulary two
#   numpy arrays are kept, one of which holds its length. 262,144 words (as many as Gemma
#   has; 4 MB) become 524,288 arrays: some eighty times their bytes, and some eighty times
#   as long as a plain loop over them takes. Nothing of it can be left out or put off.
# Why it matters: a tool that lists a folder of models takes ten seconds and a third of a
#   gigabyte for each, for three fields that stand before the vocabulary; on a small box it
#   is killed beside the server. Read what is needed, and skip over arrays by their counts.
# Seen with gguf 0.19.0 and numpy 2.4.6 (on a loaded box 10 s of CPU and 346 MiB, the loop
# 0.13 s; Gemma 3 270M itself 21 s and 630 MiB):
#   arrays kept of 262144 words: 524293
#   memory: over 50 times the file
#   time: over 20 times a loop
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import pathlib
import resource
import struct
import sys
import time

import gguf

WORDS = 262_144
path = pathlib.Path(sys.argv[1])
writer = gguf.GGUFWriter(path, "llama")
writer.add_token_list([f"word{n}" for n in range(WORDS)])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()


def memory_bytes():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


data = path.read_bytes()
begun = time.process_time()
at, words = data.index(b"word0") - 8, []
for _ in range(WORDS):
    (size,) = struct.unpack_from("<Q", data, at)
    words.append(data[at + 8 : at + 8 + size])
    at += 8 + size
loop_s = time.process_time() - begun

before, begun = memory_bytes(), time.process_time()
reader = gguf.GGUFReader(path)
reader_s, taken = time.process_time() - begun, memory_bytes() - before
field = reader.fields["tokenizer.ggml.tokens"]
assert [len(words), words[-1]] == [WORDS, f"word{WORDS - 1}".encode()]
assert field.contents(WORDS - 1) == f"word{WORDS - 1}"

print(f"{reader_s:.1f} s, {taken >> 20} MiB; a loop {loop_s:.2f} s", file=sys.stderr)
print(f"arrays kept of {WORDS} words: {len(field.parts)}")
print("memory:", "over" if taken > 50 * len(data) else "not", "50 times the file")
print("time:", "over" if reader_s > 20 * loop_s else "not", "20 times a loop")
PY
found=$("$folder/venv/bin/python" "$folder/look.py" "$folder/model.gguf")
echo "$found"
test "$found" = 'arrays kept of 262144 words: 524293
memory: over 50 times the file
time: over 20 times a loop'
