#!/usr/bin/env bash
# Guess: llama_model_quantize keeps the shape of every tensor, and in a file quantised to Q8_0
#   a matrix is Q8_0; a tensor of one dimension is a bias or a norm, and float32.
# What happens: a reranker's classification head, a matrix of 1 x n, is written back with one
#   dimension, in the float16 it had: ggml does not store trailing dimensions of 1, and the
#   quantiser leaves alone what has fewer than two. It is a matrix all the same, and
#   llama.cpp multiplies with it without complaint.
# Why it matters: "one dimension means it is added, so it must be float32" is a rule that many
#   readers and checkers of GGUF have. It refuses every quantised reranker made of a
#   float16 file, with words that blame the download.
# Seen with llama-cpp-python 0.3.36 (its llama.cpp) and gguf 0.19.0; the first run compiles
# llama.cpp, which takes some minutes:
#   before: cls.output.weight shape [32, 1] F16, blk.0.ffn_up.weight shape [32, 64] F16
#   after: cls.output.weight shape [32] F16, blk.0.ffn_up.weight shape [32, 64] Q8_0
#   loads: yes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset SOURCE_DATE_EPOCH  # with it llama.cpp is built without AVX
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llama-cpp-python==0.3.36 gguf==0.19.0
cat > "$folder/look.py" <<'PY'
import sys
import gguf
import llama_cpp
import numpy as np

WIDTH, INNER, CONTEXT = 32, 64, 32
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *("\u2581" + letter for letter in "abcdef")]
random = np.random.default_rng(0)


def ranker(path):
    """A BERT of one layer with random weights and a head that gives one score."""
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_block_count(1)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 4 + [1] * (len(TOKENS) - 4))
    writer.add_token_type_count(2)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_sep_token_id(3)

    def add(name, *shape, dtype=np.float16):
        values = random.standard_normal(shape) * 0.02
        writer.add_tensor(name, values.astype(dtype))

    def layer_norm(name):
        add(f"{name}.weight", WIDTH, dtype=np.float32)
        add(f"{name}.bias", WIDTH, dtype=np.float32)

    def linear(name, rows, columns):
        add(f"{name}.weight", rows, columns)
        add(f"{name}.bias", rows, dtype=np.float32)

    add("token_embd.weight", len(TOKENS), WIDTH)
    add("position_embd.weight", CONTEXT, WIDTH, dtype=np.float32)
    add("token_types.weight", 2, WIDTH, dtype=np.float32)
    layer_norm("token_embd_norm")
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        linear(f"blk.0.{name}", WIDTH, WIDTH)
    linear("blk.0.ffn_up", INNER, WIDTH)
    linear("blk.0.ffn_down", WIDTH, INNER)
    for name in ("attn_output_norm", "layer_output_norm"):
        layer_norm(f"blk.0.{name}")
    linear("cls.output", 1, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shown(path):
    tensors = {one.name: one for one in gguf.GGUFReader(path).tensors}
    names = ("cls.output.weight", "blk.0.ffn_up.weight")
    parts = (
        f"{name} shape {tensors[name].shape.tolist()} {tensors[name].tensor_type.name}"
        for name in names
    )
    return ", ".join(parts)


before, after = f"{sys.argv[1]}/f16.gguf", f"{sys.argv[1]}/q8.gguf"
ranker(before)
quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, None)
how = llama_cpp.llama_model_quantize_default_params()
how.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
assert llama_cpp.llama_model_quantize(before.encode(), after.encode(), how) == 0
print("before:", shown(before))
print("after:", shown(after))
model = llama_cpp.llama_model_load_from_file(
    after.encode(), llama_cpp.llama_model_default_params()
)
print("loads:", "yes" if model else "no")
PY
found=$("$folder/venv/bin/python" "$folder/look.py" "$folder" 2>/dev/null)
echo "$found"
test "$found" = 'before: cls.output.weight shape [32, 1] F16, blk.0.ffn_up.weight shape [32, 64] F16
after: cls.output.weight shape [32] F16, blk.0.ffn_up.weight shape [32, 64] Q8_0
loads: yes'
