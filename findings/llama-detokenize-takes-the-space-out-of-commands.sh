#!/usr/bin/env bash
# Guess: llama_detokenize gives the text that llama_tokenize was given: byte-level tokens hold
#   every byte of it, so nothing can get lost on the way.
# What happens: for many of the pre-tokenisers that llama.cpp knows (Llama 3's, GPT-2's,
#   Falcon's; not Qwen 2's) the finished text is tidied like English prose: no space before
#   . , ? ! nor before 's and 've, none around a lone apostrophe. The pieces of the same
#   tokens, one by one, keep them. Neither an argument nor a field of GGUF switches it off.
# Why it matters: `cd ..` and `sed 's/a/b/'` come back as `cd..` and `sed's/a/b/'`: commands
#   and code are broken, and a reply is another text when it is streamed (pieces) than when
#   it is not (llama_detokenize). What is measured on prose never shows it.
# Seen with llama-cpp-python 0.3.36 (its llama.cpp) and gguf 0.19.0; the first run compiles
# llama.cpp, which takes some minutes. Token by token, then with llama_detokenize:
#   llama-bpe: "cd .." "cd.."
#   llama-bpe: "sed 's/a/b/'" "sed's/a/b/'"
#   llama-bpe: "tr ' ' _" "tr'' _"
#   llama-bpe: "[1 , 2]" "[1, 2]"
#   gpt-2: "cd .." "cd.."
#   gpt-2: "sed 's/a/b/'" "sed's/a/b/'"
#   gpt-2: "tr ' ' _" "tr'' _"
#   gpt-2: "[1 , 2]" "[1, 2]"
#   qwen2: all as they were
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

TEXTS = ("cd ..", "sed 's/a/b/'", "tr ' ' _", "[1 , 2]")


def letters_of_bytes():
    """What stands for each byte in such vocabularies: itself, if it can be printed."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def vocabulary(path, pre):
    """All bytes, and one merge: llama.cpp wants some."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*letters_of_bytes(), "xy"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["x y"])
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
    return llama_cpp.llama_model_get_vocab(model)


def tokens_of(vocab, text):
    data = text.encode()
    tokens = (ctypes.c_int32 * 64)()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), tokens, 64, False, False)
    return tokens, count


def piece(vocab, token):
    room = ctypes.create_string_buffer(64)
    size = llama_cpp.llama_token_to_piece(vocab, token, room, 64, 0, True)
    return room.raw[:size]


def whole(vocab, tokens, count):
    room = ctypes.create_string_buffer(256)
    size = llama_cpp.llama_detokenize(vocab, tokens, count, room, 256, False, True)
    return room.raw[:size].decode()


quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
for pre in ("llama-bpe", "gpt-2", "qwen2"):
    vocab = vocabulary(f"{sys.argv[1]}/{pre}.gguf", pre)
    changed = False
    for text in TEXTS:
        tokens, count = tokens_of(vocab, text)
        pieces = b"".join(piece(vocab, token) for token in tokens[:count]).decode()
        assert pieces == text
        if whole(vocab, tokens, count) != text:
            changed = True
            print(f'{pre}: "{pieces}" "{whole(vocab, tokens, count)}"')
    if not changed:
        print(f"{pre}: all as they were")
PY
found=$("$folder/venv/bin/python" "$folder/look.py" "$folder")
echo "$found"
test "$found" = "llama-bpe: \"cd ..\" \"cd..\"
llama-bpe: \"sed 's/a/b/'\" \"sed's/a/b/'\"
llama-bpe: \"tr ' ' _\" \"tr'' _\"
llama-bpe: \"[1 , 2]\" \"[1, 2]\"
gpt-2: \"cd ..\" \"cd..\"
gpt-2: \"sed 's/a/b/'\" \"sed's/a/b/'\"
gpt-2: \"tr ' ' _\" \"tr'' _\"
gpt-2: \"[1 , 2]\" \"[1, 2]\"
qwen2: all as they were"
