"""GGUFs that hold a vocabulary and nothing else, out of a tokenizer.json, and hard texts.

llama.cpp's own converter wants the model beside it, and its tokenizer.model.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import gguf

import embellama_server as es
from tests.test_tiny_models import llama

NORMAL, UNKNOWN, CONTROL = 1, 2, 3
USER_DEFINED, UNUSED, BYTE = 4, 5, 6
NEVER_MERGED = 1_000_000  # more than any rank


def written(source: Path, path: Path, pre: str | None) -> Path:
    """A GGUF of that tokenizer.json; ``pre``: its pre-tokenizer; None: SentencePiece."""
    whole = json.loads(source.read_text("utf-8"))
    model, added = whole["model"], {t["id"]: t for t in whole["added_tokens"]}
    count = max(*model["vocab"].values(), *added) + 1
    tokens = [f"[PAD{number}]" for number in range(count)]
    kinds = [UNUSED] * count
    for text, token in model["vocab"].items():
        is_byte = not pre and text.startswith("<0x") and len(text) == 6
        tokens[token], kinds[token] = text, BYTE if is_byte else NORMAL
    for token, about in added.items():
        # As llama.cpp's converter has it: spaces are spaces in what a text may hold.
        text = about["content"]
        is_special = about["special"]
        tokens[token] = text if is_special else text.replace("\u2581", " ")
        kinds[token] = CONTROL if is_special else USER_DEFINED
        if is_special and text == model.get("unk_token") and not pre:
            kinds[token] = UNKNOWN
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2" if pre else "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if pre:
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        writer.add_token_scores([-float(ranks.get(t, NEVER_MERGED)) for t in tokens])
        prepends = '"Prepend"' in json.dumps(whole["normalizer"])
        writer.add_add_space_prefix(prepends)
    return closed(writer, path)


def closed(writer: gguf.GGUFWriter, path: Path) -> Path:
    """The file, with what llama.cpp wants of any model."""
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def tokenizer_of(path: Path, pre: str | None) -> es.Tokenizer:
    """Ours, over a file's vocabulary alone."""
    params = llama().llama_model_default_params()
    params.vocab_only = True
    model = llama().llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp cannot load {path}"
    values = {"tokenizer.ggml.pre": pre} if pre else {}
    return es.Tokenizer(llama(), model, es.GgufHeader(values=values))


# By what is hard about them.
HARD: Mapping[str, tuple[str, ...]] = {
    "ASCII": (
        *("Hello, world! It's 12345 o'clock -- don't (really)", "[1 , 2] {a : b} ' s ."),
        *("I'LL he'S WE'RE x'Ve 'tis", "a  b   c\n\n\td \r\n e", " leading", "trailing  "),
        *("def f(x):\n    return x**2  # ok\n\n\n", "1234567890 3.14159 1,000,000"),
        *("http://x.y/z?q=1&r=2 me@mail.com", "\n", "  ", "\t\tx", "a\x00b\x01c\x7f"),
        *("<b>bold</b> &amp; <s>struck</s>", "{'a': [1 , 2 ], \"b\" : null}"),
    ),
    "composed": (
        *("Café déjà vu naïve", "Straße Größe ﬁne", "Việt Nam tiếng Việt có dấu"),
        *("İstanbul ı ſ", "ἄνθρωπος Ἀθῆναι", "й ё Й Ё", "čšž ŁÓDŹ"),
    ),
    "decomposed": tuple(
        unicodedata.normalize("NFD", text)
        for text in (
            *("Café déjà vu naïve", "Größe", "Việt Nam tiếng Việt có dấu", "ἄνθρωπος"),
            *("й ё Й Ё", "한국어 글 대한민국", "أهلا إلى آخر مسؤول ئ", "がぎぐ パピプ"),
            *("Résumé_été.pdf", "\u212b \u2126 \u1e9b\u0323"),
        )
    ),
    "marks": (
        *("e\u0301\u0316\u0301 a\u0316\u0301", "\u0301first q\u0307\u0323 q\u0323\u0307"),
        *("\u0f71\u0f72 \u05b0\u05bc", "ب\u0651\u064e vs ب\u064e\u0651", "x" + "\u0301" * 70),
        *("<|im_end|>\u0338", "=\u0338 >\u0338 <\u0338", "\U0001d15e\U0001d160 \ufb2c"),
    ),
    "scripts": (
        *("한국어 글 대한민국 1234", "مرحبا بالعالم", "中文汉字漢字", "日本語の文章カタカナー"),
        *("Съешь же ещё этих мягких булок", "שלום עולם", "\uf900\uf901\U0002f800"),
        *("Γειά σου Κόσμε ς", "გამარჯობა", "Բարեւ", "ᎣᏏᏲ", "ሰላም"),
    ),
    "vowel signs": (
        *("हिन्दी में लिखा क़ख़", "বাংলা ড়ঢ়", "தமிழ் கொ", "ไทยภาษา ำ", "မြန်မာ", "ភាសាខ្មែរ"),
        *("السَّلَامُ عَلَيْكُمْ", "తెలుగు", "ಕನ್ನಡ", "മലയാളം", "සිංහල", "བོད་ཡིག"),
    ),
    "symbols": (
        *("👩‍👩‍👧 😀 🦙 ❤️ 🇩🇪 1️⃣", "☃️", "½ ™ ℃ № ① ² ﬃ", "∑∫√≤ → ⇒ ⠿ ░█", "𝐁𝐨𝐥𝐝 𝕏"),
        *("٣٤٥٦ १२३४ １２３４５", "Ⅷ 三百 1²3", "12 345 678,90", "« » „ “ ” … — –"),
    ),
    "spaces": (
        *("a\u00a0b\u3000c\u2003d\u200be\ufefff\u2028g\u0085h", "\u3000\u3000x"),
        *(" \u00a0 \u2009\n \n", "\r\r\n\n\r", "a \n b\n \n c"),
    ),
    "special": (
        *("<|im_start|>user\nhi<|im_end|>", "</s> a</s>b <s>x</s>", "<|endoftext|>"),
        *("<bos><eos><pad><unk>", "<|begin_of_text|> <|eot_id|>", "[INST] [/INST] <mask>"),
        *("<|end|><EOT>[EOT]", "<fim_prefix><PRE><REPO>", "<|im_start|", "a<|im_end|>b"),
        *("<start_of_turn>user\nx<end_of_turn>", "<think> x </think>", "</s>\u0301e\u0301"),
    ),
    "case": ("ABCdef XMLHttp iPhone IPv6 ΑΒΓ ΣΣ ЁЖ ǅ", "O'Brien'S L'ÉTÉ", "it'ſ I'K"),
}  # fmt: skip
RARE = ("\u0378 \U000e0001 \ue000 \ufffd \uffff \U0010ffff", "\u1c89 \ua7cb \U00010d50")


def hard_texts(count: int) -> list[tuple[str, str]]:
    """Kinds and texts: those above, and then as many as there are to be, mixed of them.

    The same each time. A mixture's kind is that of the parts; of some kinds none.
    """
    found = [(kind, text) for kind, texts in HARD.items() for text in texts]
    pick = random.Random(14)
    while len(found) < count:
        kind = pick.choice([*HARD])
        parts = [pick.choice(HARD[kind]) for _ in range(pick.randint(1, 4))]
        begin, end = sorted(pick.choices(range(len(parts[0]) + 1), k=2))
        parts[0] = parts[0][begin:end]
        found.append((kind, pick.choice(["", " ", "\n", ". "]).join(parts)))
    return found
