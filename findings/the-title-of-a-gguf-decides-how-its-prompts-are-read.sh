#!/usr/bin/env bash
# Guess: general.name of a GGUF is for people to read. Two files that differ in it alone turn
#   a text into the same tokens.
# What happens: where the name holds "phi-3" or "phi3", llama.cpp swallows the white space
#   after most special tokens, as Phi-3's own tokeniser does; elsewhere it keeps it. GGUF has
#   no field for this, so the name stands for it. The name that gguf itself makes of the
#   repository's, "Phi 3 Mini 4k Instruct", does not count: no hyphen.
# Why it matters: whoever gives a file a nicer name (a registry, a merge, a fine-tune called
#   after its author) changes every prompt, without a line in the log: another tokenisation
#   than the model was trained with, or another model's newlines gone. Token counts and
#   caches keyed by the vocabulary alone are wrong between the two.
# Seen with llama-cpp-python 0.3.36 (its llama.cpp) and gguf 0.19.0; the first run compiles
# llama.cpp, which takes some minutes:
#   gguf's name for Phi-3-mini-4k-instruct: Phi 3 Mini 4k Instruct
#   Phi 3 Mini 4k Instruct: <|user|> \n h i <|end|> \n <|assistant|> \n
#   Phi3: <|user|> h i <|end|> <|assistant|>
#   My helper: <|user|> \n h i <|end|> \n <|assistant|> \n
#   My helper, no Phi-3: <|user|> h i <|end|> <|assistant|>
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
from llama_cpp import llama_cpp

PROMPT = b"<|user|>\nhi<|end|>\n<|assistant|>\n"
CONTROLS = ["<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>"]
KIND = gguf.TokenType


def tokens_of(path, name):
    """How PROMPT is read with Phi-3's special tokens, in a file of this name."""
    words = {"<unk>": KIND.UNKNOWN}
    words |= dict.fromkeys(CONTROLS, KIND.CONTROL)
    words |= {f"<0x{byte:02X}>": KIND.BYTE for byte in range(256)}
    words |= dict.fromkeys(["\u2581", "h", "i"], KIND.NORMAL)
    texts = list(words)
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_name(name)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types(list(words.values()))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(texts.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    vocab = llama_cpp.llama_model_get_vocab(model)
    ids = (ctypes.c_int32 * 64)()
    count = llama_cpp.llama_tokenize(vocab, PROMPT, len(PROMPT), ids, 64, False, True)
    return [texts[token].replace("<0x0A>", r"\n") for token in ids[:count]]


quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
made = gguf.Metadata.id_to_title("Phi-3-mini-4k-instruct")
print("gguf's name for Phi-3-mini-4k-instruct:", made)
for name in (made, "Phi3", "My helper", "My helper, no Phi-3"):
    print(f"{name}:", *tokens_of(f"{sys.argv[1]}/model.gguf", name))
PY
found=$("$folder/venv/bin/python" "$folder/look.py" "$folder")
echo "$found"
test "$found" = "gguf's name for Phi-3-mini-4k-instruct: Phi 3 Mini 4k Instruct
Phi 3 Mini 4k Instruct: <|user|> \\n h i <|end|> \\n <|assistant|> \\n
Phi3: <|user|> h i <|end|> <|assistant|>
My helper: <|user|> \\n h i <|end|> \\n <|assistant|> \\n
My helper, no Phi-3: <|user|> h i <|end|> <|assistant|>"
