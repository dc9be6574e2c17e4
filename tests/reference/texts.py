"""The texts of the vector-accuracy tests, each with a unique kind (its name).

Characters that cannot be seen (or that an editor could change) are written as
escapes, and decomposed text is made with ``unicodedata``, so that this file can
be reformatted, normalised or copied without changing the texts.
"""

import itertools
import unicodedata


def _nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def _words(count: int) -> str:
    """Return ``count`` words, each one token of the model."""
    words = "the small river runs past old stone houses and under a wide bridge"
    return " ".join(itertools.islice(itertools.cycle(words.split()), count))


def _numbered(sentences: str, count: int) -> str:
    """Return ``count`` numbered copies of some sentences."""
    return " ".join(f"{n}. {sentences}" for n in range(1, count + 1))


_MILL = (
    "The mill at the end of the valley had been silent for eleven years when Ada "
    "bought it. The wheel was gone, the roof let in the rain, and a family of "
    "owls had taken over the loft. Her brother said she was mad. The bank said "
    "something similar in a longer letter. But the stones were still there, two "
    "of them, each as heavy as a small car, and under forty years of dust they "
    "were almost as sharp as on the day they were dressed. She swept the floor, "
    "hung a lamp from a beam, and began to read about water."
)
_WHEEL = (
    "Reading about water, it turned out, takes a long time. There was the "
    "question of head and flow, which is to say how far the stream falls and how "
    "much of it there is. There was the question of who owns a stream, which "
    "nobody in the village could answer and everybody had an opinion on. And "
    "there was the wheel itself. A wheel that takes its water at the top needs "
    "a high fall but little of it; a wheel that takes it at the bottom is happy "
    "with a broad, lazy river. Ada had neither. She had a brook that was loud in "
    "March and nearly absent in August, so she drew a wheel that took its water "
    "in the middle, and asked a boat builder whether he could make one."
)
_BREAD = (
    "The boat builder had never made a wheel, but he had made many things that "
    "were round and had to be tight, and he was curious. They worked through "
    "the winter. In the first week of April they opened the gate a hand's width "
    "and stood back. Nothing happened. They opened it a little more, the buckets "
    "filled one after another, and the whole dripping machine leaned forward "
    "like somebody getting out of a deep chair. The shaft groaned, the gears "
    "took up the slack, and upstairs, for the first time in half a generation, "
    "one stone moved over another. The flour was coarse and a little grey, and "
    "there was rather too much grit in it. Ada baked a loaf with it all the "
    "same, and cut it in two while it was still hot."
)
_LETTER = (
    "By the end of the summer people had begun to bring their own grain. Some "
    "came with sacks of rye on the back of a tractor, some with a paper bag of "
    "wheat that they had grown in a garden as an experiment. She kept a tenth "
    "of everything, as millers always have, and wrote each weight in a green "
    "book. The owls moved to the church, complained about the bells, and moved "
    "back. The bank sent a second letter, this time with an order for two loaves "
    "every Friday. When her brother finally visited, he walked around the wheel "
    "three times without a word, put his hand in the spray, and asked what it "
    "would cost to make a second one for the old tannery further down, where "
    "the brook was wider, the fall was lower, and nobody had yet asked the "
    "stream for anything at all."
)

_PYTHON = '''\
from collections import Counter


def most_common_word(path: str, *, min_length: int = 4) -> str | None:
    """Return the most frequent word of a file."""
    with open(path, encoding="utf-8") as handle:
        words = (w.strip(".,;:!?").lower() for line in handle for w in line.split())
        counts = Counter(w for w in words if len(w) >= min_length)
    return max(counts, key=counts.__getitem__) if counts else None
'''
_C = """\
#include <stdio.h>
static unsigned int rotl32(unsigned int x, int k) {
\treturn (x << k) | (x >> (32 - k)); /* k in 1..31 */
}
int main(int argc, char **argv) {
\tfor (int i = 1; i < argc; ++i)
\t\tprintf("%s -> 0x%08X\\n", argv[i], rotl32(0xDEADBEEFu, i & 31));
\treturn argc > 1 ? 0 : -1;
}
"""
_JSON = (
    '{"id": 1042, "name": "Kettle \\u2014 1.7 l", "tags": ["kitchen", "steel"], '
    '"price": {"EUR": 39.90, "USD": null}, "in_stock": true, "sizes": [1e3, -0.5]}'
)
_SHELL = (
    "find . -name '*.log' -mtime +7 -print0 | xargs -0 -r gzip -9 && "
    'for f in *.gz; do echo "${f%.gz}: $(stat -c %s "$f")" >> sizes.txt; done 2>&1'
)

TEXTS: list[tuple[str, str]] = [
    # English
    ("word", "hello"),
    ("word-rare", "Antidisestablishmentarianism"),
    ("english-short", "A man is eating a piece of bread."),
    ("english-short-near", "Somebody eats a slice of bread."),
    ("english-short-far", "The committee postponed the vote on interest rates."),
    ("english-apostrophes", "It's the dogs' bowl, isn't it? Rock 'n' roll \u2019tis."),
    ("english-100-words", _MILL),
    ("english-350-words", f"{_MILL} {_WHEEL} {_BREAD}"),
    ("mixed-case", "tHe QUICK bROWN Fox jUmPs OVER iPhone McDonald NASA eBay"),
    # Length
    ("tokens-510", _words(508)),
    ("tokens-511", _words(509)),
    ("tokens-512", _words(510)),
    ("tokens-513-truncated", _words(510) + " [MASK]"),
    ("truncated-in-a-word", _words(509) + " antidisestablishmentarianism"),
    ("truncated-english", f"{_MILL} {_WHEEL} {_BREAD} {_LETTER}"),
    (
        "truncated-russian",
        _numbered(
            "Мы ещё не решили, поедем ли мы к морю: всё зависит от погоды, от "
            "поезда и от того, найдёт ли мой младший брат свой чемодан.",
            6,
        ),
    ),
    (
        "truncated-chinese",
        _numbered(
            "清晨的市场里，卖菜的老人把新鲜的萝卜排成一行，孩子们在桥边等船，"
            "远处的山还藏在雾里。",
            12,
        ),
    ),
    (
        "truncated-hindi",
        _numbered(
            "मेरी दादी हर शाम आँगन में बैठकर हमें पुरानी कहानियाँ सुनाती थीं और हम चुपचाप सुनते थे।",
            10,
        ),
    ),
    (
        "truncated-arabic",
        _numbered(
            "ذهبنا إلى السوق القديم في الصباح واشترينا الخبز والزيتون ثم عدنا إلى "
            "البيت قبل الظهر.",
            8,
        ),
    ),
    # Code
    ("code-python", _PYTHON),
    ("code-c", _C),
    ("code-json", _JSON),
    ("code-shell", _SHELL),
    ("code-regex", r"^(?:[a-z0-9_\-.]+)@(?P<host>[\w.-]+\.\w{2,})(?<!\.)$|\p{L}*+"),
    # URLs, numbers, punctuation
    ("url", "https://user@example.org:8443/a/b%20c/index.html?q=caf%C3%A9&n=10#top"),
    ("email", "Write to Jane.Doe+lists@mail.example.co.uk or <info@example.org>."),
    ("numbers", "3.14159 1,000,000 -42 +7 1e-9 0x1F 50% 12:34:56 2024-02-29 1/2 №5"),
    ("number-long", "31415926535897932384626433832795028841971693993751"),
    ("punctuation-run", "Wait... what?!?!?! --- *** ((([[[{{{ ~~~ }}}]]]))) ;;;,,,:::"),
    ("punctuation-ascii", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"),
    (
        "punctuation-unicode",
        "\u201cWell\u201d \u2014 \u00bfqu\u00e9? \u2026 \u2039a\u203a",
    ),
    ("punctuation-cjk", "「はい」、『本』。（一）［二］【三】〈四〉《五》・〜！？"),
    ("punctuation-one", "."),
    ("punctuation-danda", "राम आया। सीता गई॥ ؟ ، ؛ ۔ ። ፣ ། ༎ ។ ၊ ။ ։ ՞ ·"),
    # Latin with diacritics
    ("german", "Fünf große Bären äßen übermäßig süße Ölfrüchte in Österreich."),
    ("german-nfd", _nfd("Fünf große Bären äßen übermäßig süße Ölfrüchte im Schnee.")),
    ("german-sharp-s", "STRAẞE Straße STRASSE ẞ ß Fußgängerübergänge"),
    ("french", "L'élève naïf a bientôt reçu où ça ? Œuvre, cœur, ÇA, æther, Noël."),
    ("french-nfd", _nfd("L'élève naïf a reçu une lettre de l'hôtel à Noël, où ça ?")),
    ("vietnamese", "Tiếng Việt có nhiều dấu: đường phố, người, ở đó, Ẫ Ộ Ữ Ỹ Đ."),
    ("vietnamese-nfd", _nfd("Tiếng Việt có nhiều dấu: đường phố, người, ở đây.")),
    ("turkish", "İstanbul'da ılık IŞIK İĞNE ığdır şöyle çığ Iğdır İ I ı i"),
    ("turkish-nfd", _nfd("İstanbul'da ılık İĞNE şöyle çığ gibi İ I ı i")),
    ("polish", "Zażółć gęślą jaźń, ŁÓDŹ, źdźbło, święto, wąż i ćma."),
    ("polish-nfd", _nfd("Zażółć gęślą jaźń, ŁÓDŹ, źdźbło, święto, wąż.")),
    ("czech", "Nejkrásnější kůň běžel přes řeku, ŽLUŤOUČKÝ úpěl ďábelské ódy ť ň."),
    ("czech-nfd", _nfd("Nejkrásnější kůň běžel přes řeku a ŽLUŤOUČKÝ pes štěkal.")),
    ("nordic", "Ærlig Øl på Åland, smørrebrød, þú ert Íslendingur, Ð ð ŋ Đ đ Ł ł"),
    (
        "latin-extended",
        "Ǆ ǅ ǆ Ǉ ǈ ǉ Ǌ ǋ ǌ Ǳ ǲ ǳ ǅungla Ɓ ɓ Əə Ȼ ȼ ſ ŀ ŉ Ĳ ĳ Ɐ Ǎ ǎ Ǖ ȁ ḁ Ṩ",
    ),
    ("ipa", "ˈɪŋɡlɪʃ prəˌnʌnsiˈeɪʃn̩ ʔ ʕ ʒ θ ð t͡ʃ ã"),
    # Greek, Cyrillic, Armenian, Georgian
    ("greek", "Ο ΟΔΥΣΣΕΥΣ και ο Σίσυφος, ΟΔΟΣ οδός, ΰ ΐ Ϊ ώ, ΜΑΪΟΥ."),
    ("greek-nfd", _nfd("Ο Σίσυφος περπατά στην οδό· ΐ ΰ Ώ ήλιος, θάλασσα.")),
    ("greek-polytonic", "ἐν ἀρχῇ ᾧ ᾼ ῥήτωρ Ἑλλάς ϐ ϑ ϕ ϖ ϰ ϱ ϲ"),
    ("cyrillic", "Ёжик и йогурт: съешь ещё этих мягких булок, ЙОД, объём."),
    ("cyrillic-nfd", _nfd("Ёжик и йогурт: мой зелёный чай ещё тёплый, ЙОД.")),
    (
        "ukrainian-serbian",
        "Її ґанок, щось інше, Європа, пʼять; Ђак, њива, џеп, ћуран, Ѐ ѐ Ѝ ѝ",
    ),
    ("armenian", "Բարեւ Ձեզ, ինչպե՞ս եք և ﬓ ՀԱՅԱՍՏԱՆ"),
    ("georgian", "გამარჯობა, თბილისი კარგი ქალაქია. დედა და მამა ᲗᲑᲘᲚᲘᲡᲘ ᲡᲐᲥ Ⴀ ⴀ"),
    # Semitic and Arabic-script
    ("hebrew", "שלום עולם, הילדה קראה ספר ליד הים."),
    ("hebrew-niqqud", "שָׁלוֹם עוֹלָם, הַיַּלְדָּה קָרְאָה סֵפֶר ־ ׳ ״"),
    ("arabic", "الولد يقرأ الكتاب في المدرسة ٣٤٥ لأن آخر إلى ؤ ئ ة ى"),
    ("arabic-harakat", "اَلْوَلَدُ يَقْرَأُ الْكِتَابَ فِي الْمَدْرَسَةِ كـــتاب"),
    ("arabic-presentation", "ﷺ ﷲ (ﻻ ﻼ) ﺍﻟﻌﺮﺑﻴﺔ = العربية ﷽"),
    ("persian", "می\u200cخواهم به خانه\u200cی تو بیایم؛ پنج گربه چای ژاله ۱۲۳"),
    ("urdu", "میں نے ٹھنڈا پانی پیا ہے، یہ ڈاکٹر کی بڑی گاڑی ہے۔ ۀ ۓ"),
    # Brahmic
    ("hindi", "हिन्दी में क्षत्रिय, ज्ञान, श्रृंगार, कौआ, ॐ, दुःख, मैंने ऊँट देखा। १२३"),
    ("hindi-nukta", "क़लम ख़बर ग़ज़ल ज़मीन फ़िल्म लड़का पढ़ना क\u093cलम \u0958 \u095b"),
    ("bengali", "আমি বাংলায় গান গাই, ঢাকা শহরে বৃষ্টি পড়ছে, দৌড়, ক্ষুদ্র, কো \u09df \u09dc"),
    ("bengali-nfd", _nfd("আমি বাংলায় কথা বলি, সে দৌড়ে গেল, কো কৌ, গাঢ় রঙ")),
    ("punjabi-gujarati", "Punjabi ਪੰਜਾਬੀ ਵਿੱਚ ਲਿਖੋ। Gujarati ગુજરાતી લખાણ, Odia ଓଡ଼ିଆ ଭାଷା"),
    ("tamil", "தமிழ் மொழி இனிமையானது, பாடல் மரம் கல்வி வானம் கோவில் கொடி ஸ்ரீ"),
    ("telugu", "తెలుగు భాష చాలా అందమైనది, 24 క్షేత్రం: స్త్రీ!"),
    ("kannada", "ಕನ್ನಡ ಭಾಷೆ ತುಂಬಾ ಸುಂದರ, ನಾರಿನ ನರ ನಾನಾ ಕೋಟೆ"),
    ("malayalam", "മലയാളം ഭാഷ മനോഹരമാണ് (Malayalam), കൊച്ചി, അവൻ അവള്\u200d ൽ ൾ"),
    ("sinhala", "සිංහල භාෂාව ලස්සනයි, කාලය වාරය කවි කලාව ශ්\u200dරී ලංකාව, කෝපි"),
    ("thai", "วันนี้อากาศดีมาก เรา มา ที่ ตลาด กิน เวลา งาน สวน น้ำ ๑๒๓ ฯ ำ"),
    ("lao", "Lao: ສະບາຍດີ ຂ້ອຍມັກກິນເຂົ້າໜຽວ ຳ ໆ"),
    ("khmer", "Khmer: សួស្តី, ខ្ញុំចង់ទៅផ្សារ ព្រះអាទិត្យរះ។"),
    ("burmese", "မင်္ဂလာပါ ကျွန်တော် ရန်ကုန်မှာ နေပါတယ်။ မ မိ မံ မမ"),
    ("tibetan", "བཀྲ་ཤིས་བདེ་ལེགས། ང་བོད་ལ་འགྲོ་གི་ཡོད། ཧཱུྃ"),
    ("ethiopic", "ሰላም ለዓለም፣ Amharic አማርኛ እናገራለሁ። ፩ ፪"),
    ("other-scripts", "ܫܠܡܐ (ދިވެހި) ߒߞߏ, ᏣᎳᎩ ꮳꮃꭹ ᠮᠣᠩᠭᠣᠯ ᚠᚢᚦ 𐐀𐐨 𞤀𞤢 ㄅㄆˊ ꀀꀁ"),
    # East Asian
    ("korean", "안녕하세요, 오늘 날씨가 참 좋네요. 값 읽다 닭 뷁"),
    ("korean-jamo", _nfd("안녕하세요, 오늘은 날씨가 좋다") + " ㄱㄴㄷ ㅏㅑ ㅋㅋㅋ ﾡﾱ"),
    ("japanese", "東京で美味しいラーメンを食べました。がぎぐ パピプ ヴ ゝゞ ー 々"),
    ("japanese-nfd", _nfd("がんばって、パンとバターを食べるぞ。ヴァイオリン")),
    ("chinese-simplified", "我喜欢在图书馆里学习汉语，书很多，也很安静。"),
    ("chinese-traditional", "我喜歡在圖書館裡學習漢語，書很多，也很安靜。"),
    ("chinese-mixed", "在GitHub上有3个Python项目abc中文def123，OK吗？"),
    (
        "cjk-extension",
        (
            "㐀㒵 𠀀𠮷 𪜀 𫝀 𫠠 𬺰 𮯰 𰀀 𱍐 ⼀ ⽥⽥ ⺀ ⺩⺩ 〇 〡 ㆐ ㈱ ㍿ "
            "\uf900 \uf901\uf98e\uf90a \U0002f800 \ufa0e \U0002fa1d"
        ),
    ),
    # Emoji
    ("emoji-one", "😀"),
    ("emoji-sentence", "I love pizza 🍕🍕 so much 😍!!! ❤\ufe0f ♥\ufe0f ☺ ☀\ufe0f ✔"),
    (
        "emoji-zwj",
        (
            "family \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 "
            "rainbow \U0001f3f3\ufe0f\u200d\U0001f308 "
            "coder \U0001f469\U0001f3fd\u200d\U0001f4bb"
        ),
    ),
    ("emoji-skin-tones", "wave 👋🏻👋🏼👋🏽👋🏾👋🏿 thumbs 👍🏿"),
    (
        "emoji-flags-keycaps",
        (
            "\U0001f1e9\U0001f1ea \U0001f1ef\U0001f1f5 1\ufe0f\u20e3 #\ufe0f\u20e3 "
            "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"
        ),
    ),
    # Compatibility characters and symbols
    ("mathematical", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝐛𝐨𝐥𝐝 𝒮𝒸𝓇𝒾𝓅𝓉 𝟘𝟙𝟚 𝛼𝛽 ℝ ℕ ℏ ∑∫√∞ ≤ ≠ ∉ x∈A ⟨a|b⟩"),
    ("superscripts", "x² + y³ = z⁴, H₂O, CO₂, 10⁻⁹, ª º ™ ℠ ① Ⓐ ⓐ ⅓ ½ Ⅷ ⅷ"),
    ("ligatures", "eﬃcient ﬁnd ﬂow oﬀer ﬅyle Ꜳ"),
    (
        "fullwidth",
        (
            "Ｆｕｌｌｗｉｄｔｈ\u3000Ｌａｔｉｎ\u3000１２３！＠＃（ａ，ｂ）："
            "１．５／２？～ ﾊﾛｰ ｶﾞ｡"
        ),
    ),
    ("letterlike", "\u212b \u212a \u2126 \u00c5 K \u03a9 5\u00b5m \u03bcm 20\u2103"),
    ("currency", "$5 €10 £3 ¥100 ₹50 ₿1 ₽7 ₩9 ₫ ₺ ₴ ¢ ¤ ฿ ﷼"),
    ("arrows-boxes", "a → b ⇒ c ⟶ d ↔ ↵ ┌─┬─┐ │█▓▒░│ └─┴─┘ ■ ● ★ ♠ ♫ ⌘ ⏎ ␀ ⠓⠊"),
    (
        "zalgo",
        (
            "h\u0337\u0321\u0358e\u0336\u0301\u0302\u0303l\u0335\u0334\u0323l\u0327"
            "o\u030a\u0308\u0304\u035c\u0361 "
            "w\u20d0orl\u20d2d \u0301lone \u0301\u0302\u0303 a\u1ab0\u1dc0\ufe20b "
            "c\u0489 enclosed\u20dd"
        ),
    ),
    (
        "combining-order",
        "q\u0307\u0323 q\u0323\u0307 \u1e69 s\u0323\u0307 \u1e9b\u0323",
    ),
    # Invisible characters and white space
    (
        "zero-width",
        (
            "zero\u200bwidth non\u200cjoin\u200ding word\u2060joiner \u200eleft\u200f "
            "\u202aembed\u202c \u2066iso\u2069 va\ufe0friation mon\u180egol "
            "fil\u3164ler com\u034fbine"
        ),
    ),
    ("zero-width-only", "\u200b\u200d\u2060"),
    (
        "soft-hyphen",
        "The inter\u00adnational co\u00adoperation of non\u2011stop trains",
    ),
    ("bom", "\ufeffbyte order mark in\ufeffside and at the end\ufeff"),
    (
        "spaces",
        (
            "no\u00a0break\u1680ogham\u2000en\u2003em\u2007figure\u2009thin\u200ahair"
            "\u202fnarrow\u205fmath\u3000wide line\u2028sep paragraph\u2029sep"
        ),
    ),
    ("tabs-newlines", "\tone\ttwo\r\nthree\n\n\nfour\rfive\x0bsix\x0cseven  \n"),
    ("space-only", " "),
    ("spaces-around", "   leading   and    trailing spaces   "),
    (
        "control",
        (
            "bell\x07 back\x08space st\x01art \x1b[31mred\x1b[0m de\x7fl next\x85line "
            "c1\x9fend \x1cfs\x1fus"
        ),
    ),
    ("nul", "before\x00after nul \x00 alone"),
    ("replacement", "broken \ufffd char\ufffdacter \ufffd\ufffd"),
    ("private-use", "icon \ue000 in\uf8ffside \U000f0000 \U0010fffd end"),
    ("unassigned", "un\u0378assigned \u0378 non\ufdd0character \uffff \U0001fffe x"),
    # Long words
    ("word-100", "a" * 100),
    ("word-101", "a" * 101),
    ("word-150", "abcdefghij" * 15),
    ("word-300", "supercalifragile" * 18 + "endingletter"),
    (
        "word-100-in-a-sentence",
        f"This line holds {'electro' * 14}ab and then goes on as usual.",
    ),
    (
        "word-101-in-a-sentence",
        f"This line holds {'electro' * 14}abc and then goes on as usual.",
    ),
    ("word-100-accented", f"long {'é' * 100} and longer {'é' * 101} words"),
    ("word-100-nfd", f"long {_nfd('ü') * 100} and longer {_nfd('ü') * 101} words"),
    ("word-100-cyrillic", f"слово {'ж' * 100} и {'ж' * 101} конец"),
    ("word-100-korean", f"한국어 {'가' * 50} 그리고 {'나' * 51} 끝"),
    ("word-broken-by-punctuation", "ab" * 49 + "-" + "cd" * 49),
    # Special tokens written in the text
    ("special-sep", "first part [SEP] second part"),
    ("special-cls", "[CLS] begins here"),
    ("special-mask", "Paris is the [MASK] of France."),
    ("special-unk", "an [UNK] word and[UNK]glued"),
    ("special-pad", "padding [PAD] [PAD] here"),
    ("special-lower-case", "lower [sep] [cls] [mask] Mixed [Sep] [Mask]"),
    ("special-glued", "a[SEP]b"),
    ("special-spaced", "[ SEP ]"),
    ("special-twice", "[SEP][SEP]"),
    ("special-alone", "[SEP]"),
    ("special-broken", "[[SEP]] [SEP [SE\u200bP] [S\u0301EP] ##ing [unused0] SEP]"),
]
