#!/usr/bin/env bash
# Guess: a step of llama.cpp that computes fewer tokens takes no longer: so whoever drafts
#   tokens (prompt lookup, a small model) tries as many as are likely to be right, and three
#   streams are served faster than four.
# What happens: on a CPU, matrices in a quantised type are multiplied with tokens four (or
#   two) at a time by another routine than single ones; what is left over goes one by one. A
#   step of 3 tokens takes longer than one of 4, and one of 5 longer than one of 6. In float
#   types it is not so.
# Why it matters: a draft of two tokens (a step of three) costs more than a draft of three. A
#   scheduler that fits a line to a step's time by its tokens is wrong where it matters most.
# Seen with llama-cpp-python 0.3.36 (its llama.cpp) and gguf 0.19.0 on x86-64 with AVX-512;
# the first run compiles llama.cpp, which takes some minutes. CPU time of one thread, medians;
# one layer, 65,536 words, 512 wide:
#   q8_0: 3 tokens take longer than 4; 5 take longer than 6
#   f32: 3 tokens take no longer than 4; 5 take no longer than 6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset SOURCE_DATE_EPOCH  # with it llama.cpp is built without AVX
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llama-cpp-python==0.3.36 gguf==0.19.0
cat > "$folder/look.py" <<'PY'
import ctypes
import statistics
import sys
import time

import gguf
import numpy as np
from llama_cpp import llama_cpp

WIDTH, INNER, WORDS, MAX_TOKENS, ROUNDS = 512, 512, 65_536, 8, 25


def model(path, kind):
    """A llama of one layer with random weights of a type."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(8)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(WORDS)

    def matrix(name, rows, columns):
        values = random.standard_normal((rows, columns), np.float32)
        numbers = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, numbers, raw_dtype=kind)

    matrix("token_embd.weight", WORDS, WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(WIDTH, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        matrix(f"blk.0.{name}.weight", WIDTH, WIDTH)
    for name in ("ffn_gate", "ffn_up", "ffn_down"):
        matrix(f"blk.0.{name}.weight", INNER, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    how = llama_cpp.llama_model_default_params()
    return llama_cpp.llama_model_load_from_file(path.encode(), how)


def seconds(context, tokens):
    """CPU time of a step of so many tokens of one sequence, each with its logits."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(tokens, 0, 1)
    batch.n_tokens = tokens
    for row in range(tokens):
        batch.token[row] = 7 * row
        batch.pos[row] = row
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = 0
        batch.logits[row] = True
    began = time.process_time()
    assert llama_cpp.llama_decode(context, batch) == 0
    took = time.process_time() - began
    llama_cpp.llama_batch_free(batch)
    return took


quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
params = llama_cpp.llama_context_default_params()
params.n_ctx = 64
params.n_batch = params.n_ubatch = MAX_TOKENS
params.n_threads = params.n_threads_batch = 1
for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32):
    name = kind.name.lower()
    path = f"{sys.argv[1]}/{name}.gguf"
    context = llama_cpp.llama_init_from_model(model(path, kind), params)
    took = {tokens: [] for tokens in range(1, MAX_TOKENS + 1)}
    for _ in range(ROUNDS):
        for tokens, found in took.items():
            found.append(seconds(context, tokens))
    ms = {tokens: 1e3 * statistics.median(found) for tokens, found in took.items()}
    print(name, {n: round(each, 1) for n, each in ms.items()}, file=sys.stderr)
    said = []
    for tokens in (3, 5):
        # Sums of floats take some percent more or less.
        longer = "longer" if ms[tokens] > 1.08 * ms[tokens + 1] else "no longer"
        said.append(f"take {longer} than {tokens + 1}")
    print(f"{name}: 3 tokens {said[0]}; 5 {said[1]}")
PY
found=$("$folder/venv/bin/python" "$folder/look.py" "$folder")
echo "$found"
test "$found" = "q8_0: 3 tokens take longer than 4; 5 take longer than 6
f32: 3 tokens take no longer than 4; 5 take no longer than 6"
