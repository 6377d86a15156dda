"""Penn Treebank tokens of a caption as the COCO evaluation makes them, in Python: no Java.

Reproduces `edu.stanford.nlp.process.PTBTokenizer -preserveLines -lowerCase` of Stanford CoreNLP 3.4.1, and the removal
of 17 punctuation tokens that follows it, from observed output. Each caption stands alone; the Java lexer looks across
the line end, so that the dot of a last `reads K.` depends there on the caption of the next image.

As in the lexer, all rules are tried at a place and the one that covers most characters wins, the first of equals.
The group of a rule is the token; the rest of its match is context, which counts for the length and is read again.
"""

import re

PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())  # so -lrb- is kept
SPELLED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
SPELLED |= {"–": "--", "—": "--", "…": "...", " ": "\u00a0"}
SPELLED |= {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
SPELLED |= {"&amp;": "&", "&lt;": "<", "&gt;": ">", "£": "#", "€": "$", "¢": "cents"}
STRAIGHT = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "\u00ad": None})
TWO_WORDS = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "gimme": 3, "lemme": 3, "'tis": 2, "'twas": 2}  # cut at

# Abbreviations that keep their dot: in any case; only with a capital, being words otherwise; before a number
ABBREVIATIONS = """jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
    ala ariz calif colo conn dak fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wisc wyo
    inc co cos corp pty ptys ptes ltd plc rt bancorp dept bhd assn univ intl sys elec natl mtg mfg invt
    jr sr bros blvd rd esq mr mrs ms dr drs prof profs sen sens rep reps atty attys lt col gen messrs gov govs adm rev
    maj sgt cpl pvt capt st ste ave pres lieut hon brig cmdr comdr pfc spc supt supts det mt ft adj adv asst assoc ens
    insp mlle mme msgr sfc vs etc al seq cf ph sq bldg tel est ext"""
CAPITALISED = "Ark Del Ill La Mass Miss Ore Pa Tex Wash"
BEFORE_NUMBER = "no nos art fig figs p pp prop op ca"
WITH_APOSTROPHE = """'n 'em 'til 'till 'cause '20s '30s '40s '50s '60s '70s '80s '90s 'tis 'twas e'er ne'er o'er ol'
    c'mon li'l nat'l ev'ry s'mores nor'easter dunkin' somethin' cont'd"""
FIRST_WORDS = "A An As At But He Her Here If In It Many More Now One She So Some The There These They This We You"


def _one_of(words: str) -> str:
    return "(?:" + "|".join(re.escape(w) for w in words.split()) + ")"


_L, _A = r"[^\W\d_½¼¾⅓⅔²³¹]", r"[^\W_½¼¾⅓⅔²³¹]"  # a letter; a letter or digit
_NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"
_END = r"(?![^\W_])"
_RULES = [
    rf"({_L}+)n't{_END}",  # do n't
    rf"({_L}+)'(?:[smd]|re|ve|ll){_END}",  # it 's
    rf"(n't|'(?:[smd]|re|ve|ll)){_END}",
    rf"('n'|y'|{_one_of(WITH_APOSTROPHE)}{_END})",
    rf"((?-i:[A-HJ-XZn])'{_L}{{2,}}|{_L}+[aeiouy]'(?:[aeiou]|(?-i:[A-Z])){_L}*)",  # o'clock, pe'e
    r"(</?[a-z!?][^<>]*>)",
    r"((?:https?://|www\.)[^\s\"<>|()]*[^\s\"<>|()\[\]{}.,!?;:'-])",
    r"([a-z0-9][\w.+-]*@\w+(?:[.-]\w+)*)",
    rf"([@#]{_L}{_A}*)",
    r"((?-i:[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]))(?![a-z])",  # :-)
    rf"({_L}{_A}*(?:[.!?]{_L}{_A}*)*)",  # sidewalk.outside
    rf"((?:[dol]'{_A})?{_A}+(?:[-_](?:[dol]'{_A})?{_A}+)*)",  # t-shirt, d'oeuvre, 5pm, 10-29-2011
    rf"([-+]?{_NUMBER}(?:-{_A}+)*)",  # 12:43, 3.5-inch
    r"((?-i:[A-Z]+(?:[+&][A-Z]+)+))",  # AT&T
    r"([a-z0-9]+(?:-[a-z]+){0,2}(?:/[a-z0-9]+(?:-[a-z]+){0,2}){1,2})",  # black/white
    r"((?:\d{1,4}[- ])?\d{1,4}/\d{1,4})",  # 22 3/4
    r"((?:\(\d{2,3}\) ?|(?:\d{2,4}[- ])?\d{2,4}[- ])\d{3,4}[- ]?\d{3,5})",  # telephone
    rf"({_one_of(ABBREVIATIONS)}\.|(?-i:{_one_of(CAPITALISED)})\.)",
    rf"({_one_of(BEFORE_NUMBER)}\.)(?= ?\d)",
    r"([a-z](?:\.[a-z])+\.|(?:ph|ed)\.d\.|[a-z]+-u\.s\.)",
    rf"(^[a-hj-z]\.$|[a-hj-z]\.(?! (?-i:{_one_of(FIRST_WORDS)})\b)(?=.))",  # vitamin c. is
    r"(c\+\+|(?-i:[A-Z]+\$))",
    r"(\.{3,}|--+|[?!]+|\*+|_+|''|``)",
    r"(&(?:amp|lt|gt);)",
    r"([!-~¡-ª¬-º¼-¿×÷–—†-‣…‰-‸€℀-⅏⅓⅔←-⯿])",
]
_RULES = [re.compile(rule, re.IGNORECASE) for rule in _RULES]
_PLAIN = re.compile(r"[A-Za-z]+(?=[ ,;]|$)")  # most words of a caption, where no other rule reaches farther


def tokens(caption: str) -> list[str]:
    """Tokens in lower case with the punctuation. One token may hold a no-break space, as `22 3/4` does.

    Java writes a second dot after some abbreviations at the end; that one is left out.
    """
    text = " ".join(caption.translate(STRAIGHT).split())
    found, at = [], 0
    while at < len(text):
        plain = _PLAIN.match(text, at)
        if plain:
            token = plain.group()
        elif text[at] == " ":
            at += 1
            continue
        else:
            matches = [m for m in (rule.match(text, at) for rule in _RULES) if m]
            if not matches:  # the lexer drops what it does not know, as emoji
                at += 1
                continue
            token = max(matches, key=lambda m: m.end()).group(1)
        cut = TWO_WORDS.get(token.lower(), len(token))
        found += [_spell(text, at, part) for part in (token[:cut], token[cut:]) if part]
        at += len(token)
    return found


def _spell(text: str, at: int, token: str) -> str:
    """The token that stands at text[at], as the lexer writes it."""
    if token in ("'", '"', "''"):
        opens = token != "''" and text[at + 1 : at + 2].isalnum() and not text[at - 1 : at].isalnum()
        return ("`" if opens else "'") * (1 if token == "'" else 2)
    if token.startswith("...") or token.startswith("--"):
        return token[:3] if token[0] == "." else "--"
    return SPELLED.get(token) or "".join(SPELLED.get(c, c) for c in token.lower())


def tokenize(caption: str) -> str:
    """Tokens without the punctuation, joined by blanks: what the metrics take. "" stays ""."""
    return " ".join(t for t in tokens(caption) if t not in PUNCTUATION)
