#!/usr/bin/env bash
# Guess: with embeddings on and the last token's vector asked for (pooling "last"), a decoder
#   runs without its head: the vector is taken before it. At most the one row is computed.
# What happens: llama.cpp multiplies every token with the whole vocabulary and keeps the
#   result: tokens x vocabulary x 4 bytes, twice (the graph's and the output's), whatever the
#   batch's logits flags say. With embeddings off for all but the last 64 tokens, and on for
#   those, the vector is the same to the bit, for a sixth of the CPU's time in this model.
# Why it matters: for an embedding model made of an LLM with 151,936 tokens 512 tokens cost
#   2 x 297 MiB, and a small one spends most of its time on numbers nobody reads.
# Seen with llama-cpp-python 0.3.36 (its llama.cpp) and gguf 0.19.0; the first run compiles
# llama.cpp, which takes some minutes. A model of one layer, 65,536 words, 512 tokens:
#   asked for one vector, and got logits of 512 tokens, all of them numbers
#   memory grew by 2 times 512 x 65,536 floats
#   the last 64 alone with embeddings on: same bits, less than 0.5 of the time
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset SOURCE_DATE_EPOCH  # with it llama.cpp is built without AVX
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llama-cpp-python==0.3.36 gguf==0.19.0
cat > "$folder/look.py" <<'PY'
import ctypes
import resource
import sys
import time

import gguf
import numpy as np
from llama_cpp import llama_cpp

WIDTH, INNER, WORDS, TOKENS, LAST = 64, 128, 65_536, 512, 64


def model(path):
    """A qwen2 of one layer with random weights and many words."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(TOKENS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_pooling_type(gguf.PoolingType.LAST)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(WORDS)

    def add(name, *shape, around=0.0):
        values = random.standard_normal(shape, np.float32) * np.float32(0.1)
        writer.add_tensor(name, values + np.float32(around))

    add("token_embd.weight", WORDS, WIDTH)
    add("output_norm.weight", WIDTH, around=1)
    for name in ("attn_norm", "ffn_norm"):
        add(f"blk.0.{name}.weight", WIDTH, around=1)
    for name in ("attn_q", "attn_k", "attn_v"):
        add(f"blk.0.{name}.weight", WIDTH, WIDTH)
        add(f"blk.0.{name}.bias", WIDTH)
    add("blk.0.attn_output.weight", WIDTH, WIDTH)
    for name in ("ffn_gate", "ffn_up"):
        add(f"blk.0.{name}.weight", INNER, WIDTH)
    add("blk.0.ffn_down.weight", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    how = llama_cpp.llama_model_default_params()
    return llama_cpp.llama_model_load_from_file(path.encode(), how)


def decode(context, first, end, *, embeddings):
    """Tokens ``first`` to ``end`` of the text; an output for the text's last one alone."""
    llama_cpp.llama_set_embeddings(context, embeddings)
    batch = llama_cpp.llama_batch_init(end - first, 0, 1)
    batch.n_tokens = end - first
    for row, position in enumerate(range(first, end)):
        batch.token[row] = 7 * position
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = 0
        batch.logits[row] = position == TOKENS - 1
    assert llama_cpp.llama_decode(context, batch) == 0
    llama_cpp.llama_batch_free(batch)


def vector(context, steps):
    """The pooled vector, and the seconds of CPU that it took."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    began = time.process_time()
    for first, end, embeddings in steps:
        decode(context, first, end, embeddings=embeddings)
    row = llama_cpp.llama_get_embeddings_seq(context, 0)
    numbers = np.ctypeslib.as_array(row, (WIDTH,)).copy()
    return numbers, time.process_time() - began


def memory_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
params = llama_cpp.llama_context_default_params()
params.n_ctx = params.n_batch = params.n_ubatch = TOKENS
params.n_threads = params.n_threads_batch = 1
params.embeddings = True
params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_LAST
context = llama_cpp.llama_init_from_model(model(sys.argv[1]), params)
one = [(0, TOKENS, True)]
two = [(0, TOKENS - LAST, False), (TOKENS - LAST, TOKENS, True)]
decode(context, 0, 1, embeddings=False)  # loads what is loaded late
before = memory_bytes()
expected, _ = vector(context, one)
floats = TOKENS * WORDS * 4
grown = (memory_bytes() - before) / floats
logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (TOKENS, WORDS))
computed = int((np.isfinite(logits).all(axis=1) & (logits.std(axis=1) > 0)).sum())
print(f"asked for one vector, and got logits of {computed} tokens, all of them numbers")
print(f"memory grew by {grown:.0f} times {TOKENS} x {WORDS:,} floats")
found, _ = vector(context, two)
bits = "same bits" if found.tobytes() == expected.tobytes() else "other bits"
share = min(vector(context, two)[1] for _ in range(5)) / min(
    vector(context, one)[1] for _ in range(5)
)
print(f"(it takes {share:.2f} of the time)", file=sys.stderr)
less = "less" if share < 0.5 else "not less"
print(f"the last {LAST} alone with embeddings on: {bits}, {less} than 0.5 of the time")
PY
found=$("$folder/venv/bin/python" "$folder/look.py" "$folder/model.gguf")
echo "$found"
test "$found" = "asked for one vector, and got logits of 512 tokens, all of them numbers
memory grew by 2 times 512 x 65,536 floats
the last 64 alone with embeddings on: same bits, less than 0.5 of the time"
