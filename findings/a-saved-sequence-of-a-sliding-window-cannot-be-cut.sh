#!/usr/bin/env bash
# Guess: a context made with swa_full keeps all cells of a model with a sliding window, so
#   what llama_state_seq_get_data() saves of a sequence and llama_state_seq_set_data() puts
#   back is the sequence as it was: it can be cut at any token, and go on from there.
# What happens: cells that the last token does not see any more are not saved, although they
#   are in memory. After the restore the positions before the window are gone. To cut the
#   sequence there succeeds, to decode after the cut succeeds, too, and the logits are other
#   ones: layers with a window see fewer tokens than they should, or none.
# Why it matters: a prompt cache that saves whole conversations gives wrong text, and no
#   error, to the next one that begins like one of them and then differs. Either it saves
#   parts that are no longer than the window, or it asks llama_memory_seq_pos_min() before it
#   goes on from a cut (llama.cpp#25297 would save them).
# Seen with llama-cpp-python 0.3.36 (its llama.cpp) and gguf 0.19.0; the first run compiles
# llama.cpp, which takes some minutes. A gemma3 of two layers with random weights and a
# window of 16; 100 tokens, cut to 50, then ten others:
#   kept in memory: first position 0, logits after the cut as if read anew
#   saved and restored: first position 84, logits after the cut differ
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset SOURCE_DATE_EPOCH  # with it llama.cpp is built without AVX
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llama-cpp-python==0.3.36 gguf==0.19.0
cat > "$folder/look.py" <<'PY'
import ctypes
import sys

import gguf
import numpy as np
from llama_cpp import llama_cpp

WIDTH, WORDS, WINDOW, LENGTH, CUT = 64, 500, 16, 100, 50


def model(path):
    """A gemma3 of two layers, both of which see a window only."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_key_length(WIDTH // 2)
    writer.add_value_length(WIDTH // 2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(WINDOW)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(WORDS)

    def matrix(name, rows):
        values = random.standard_normal((rows, WIDTH), np.float32)
        writer.add_tensor(name, values / 4)

    def ones(name, width=WIDTH):
        writer.add_tensor(name, np.ones(width, np.float32))

    matrix("token_embd.weight", WORDS)
    ones("output_norm.weight")
    for layer in range(2):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            ones(f"blk.{layer}.{name}.weight")
        for name in ("attn_q_norm", "attn_k_norm"):
            ones(f"blk.{layer}.{name}.weight", WIDTH // 2)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{name}.weight", WIDTH)
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            matrix(f"blk.{layer}.{name}.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    how = llama_cpp.llama_model_default_params()
    return llama_cpp.llama_model_load_from_file(path.encode(), how)


def read(context, begin, tokens):
    """Let sequence 0 go on with these; return the logits after the last."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for row, token in enumerate(tokens):
        batch.token[row] = token
        batch.pos[row] = begin + row
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = 0
        batch.logits[row] = row == len(tokens) - 1
    assert llama_cpp.llama_decode(context, batch) == 0
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    llama_cpp.llama_batch_free(batch)
    return np.ctypeslib.as_array(logits, (WORDS,)).copy()


quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
loaded = model(f"{sys.argv[1]}/m.gguf")
params = llama_cpp.llama_context_default_params()
params.n_ctx = params.n_batch = params.n_ubatch = 256
params.n_threads = params.n_threads_batch = 1
params.swa_full = True
context = llama_cpp.llama_init_from_model(loaded, params)
memory = llama_cpp.llama_get_memory(context)
random = np.random.default_rng(1)
first = [int(token) for token in random.integers(0, WORDS, LENGTH)]
other = [int(token) for token in random.integers(0, WORDS, 10)]

read(context, 0, first[:CUT])
anew = read(context, CUT, other)
for how in ("kept in memory", "saved and restored"):
    llama_cpp.llama_memory_clear(memory, True)
    read(context, 0, first)
    if how == "saved and restored":
        size = llama_cpp.llama_state_seq_get_size(context, 0)
        state = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_seq_get_data(context, state, size, 0) == size
        llama_cpp.llama_memory_clear(memory, True)
        assert llama_cpp.llama_state_seq_set_data(context, state, size, 0)
    begin = llama_cpp.llama_memory_seq_pos_min(memory, 0)
    assert llama_cpp.llama_memory_seq_rm(memory, 0, CUT, -1)
    off = float(abs(read(context, CUT, other) - anew).max())
    print(how, "moved the logits by", off, "of", float(anew.std()), file=sys.stderr)
    said = "differ" if off > 0.1 * anew.std() else "as if read anew"
    print(f"{how}: first position {begin}, logits after the cut {said}")
PY
found=$("$folder/venv/bin/python" "$folder/look.py" "$folder")
echo "$found"
test "$found" = "kept in memory: first position 0, logits after the cut as if read anew
saved and restored: first position 84, logits after the cut differ"
