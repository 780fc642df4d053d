"""Splits captions into words as the COCO caption evaluation does, with rules of the Penn Treebank.

That evaluation (Chen et al. 2015, section 3) uses the tokens of Stanford's PTBTokenizer in lower case, without
punctuation. This file has the rules that matter for captions, as regular expressions, and needs no Java. Like
the original it

- splits contractions: do n't, it 's, they 'll, can not, gon na;
- keeps hyphenated words (half-eaten), numbers (1,000 3.5 12:30), abbreviations with their period (mr. p.m.), web
  addresses, and words with a period inside ("bus.the", where a space is missing) together;
- splits signs from amounts ($ 5, 10 %), and writes brackets as -lrb- and -rrb-, which stay;
- straightens curly quotes, treats dashes as punctuation, and drops most emoji.

It differs for single letters at the end of a caption ("plan b."), where the original looks at the next caption, for
"C++", and for smileys. tests/lmfusion/evaluation/metrics/test_ptb_tokenizer.py compares both if Java is installed.
"""

import re

PUNCTUATION = re.compile(r"\.+|-+|[?!,:;\"'`]|''|``")
"""Tokens that are left out. "!!" and the like stay, as in the original."""
STRAIGHTENED = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": " -- ", "—": " -- ", "…": "...", "\u00ad": "", "\ufe0f": ""}
)
RENAMED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "€": "$", "£": "#", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
}  # fmt: skip
LAST_KNOWN_SIGN = "\uffff"
"""Characters above it, such as most emoji, are dropped."""

# Words whose period is part of them
ABBREVIATIONS = (
    "mr|mrs|ms|dr|drs|messrs|msgr|mme|mlle|prof|rev|gen|maj|gov|col|capt|cmdr|adm|brig|lt|lieut|sgt|cpl|pvt|supt|det|"
    "atty|sen|rep|pres|hon|jr|sr|esq|st|ste|mt|ft|ave|blvd|rd|bldg|sq|dept|univ|inc|co|corp|ltd|mfg|bros|assn|assoc|"
    "intl|natl|est|ext|tel|vs|etc|adj|adv|al|cf|"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|"
    "ala|ariz|calif|colo|conn|dak|fla|ga|ind|kan|kans|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wis|wyo"
)
ABBREVIATIONS_IN_CAPITALS = "Ark|Del|Ill|Mass|Miss|Ore|Pa|Tex|Wash"
ABBREVIATIONS_BEFORE_NUMBERS = "nos?|art|figs?|pp|op|ca"

LETTER = r"[^\W\d_]"
ALNUM = r"[^\W_]"
END = r"(?!\w)"
PART = rf"{ALNUM}+(?:-{LETTER}+){{0,2}}"

RULES = (
    # The web
    r"https?://[^\s\"<>|(){}]+[^\s\"<>|.!?(){},-]",
    r"www\.(?:[^\s\"<>|.!?(){},]+\.)+[a-z]{2,4}(?:/[^\s\"<>|()]+[^\s\"<>|.!?(){},-])?",
    r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    r"</?[a-z][^<>\s]*>",
    r"[@#][a-z_]\w*",
    # Abbreviations: u.s.  e.t.  vitamin c.  mr.  no. 5  r&b
    rf"{LETTER}(?:\.{LETTER})+(?!{ALNUM})\.?|(?!i){LETTER}\.(?!{ALNUM})",
    rf"(?:{ABBREVIATIONS})\.(?!{LETTER})|(?:{ABBREVIATIONS_BEFORE_NUMBERS})\.(?=\s*\d)",
    rf"(?-i:{ABBREVIATIONS_IN_CAPITALS})\.(?!{LETTER})",
    rf"[a-z]&[a-z]{END}|at&t{END}",
    # Apostrophes: '90s  'n'  'em  't is  's  n't  gon na  o'neil
    rf"'\d0s{END}|'(?<!\d.)\d\d{END}",
    rf"'n(?:'|{END})|'(?:em|cause|till?){END}|ol'|rock(?='n'roll)|y'(?=all{END})",
    rf"'t(?=(?:is|was){END})",
    rf"'(?:[smd]|re|ve|ll)(?!{ALNUM})",
    rf"n't{END}",
    rf"can(?=not{END})|(?:gon|wan)(?=na{END})|got(?=ta{END})|(?:lem|gim)(?=me{END})",
    rf"[a-hj-xzn]'{LETTER}{{2,}}(?:-{ALNUM}+)*(?<!'re)(?<!'ve)(?<!'ll)",
    r"ma'am|o'clock|c'mon|d'you",
    # Slashes and hyphens: 1/2  and/or  sky-blue/white  t-shirt  10-15
    r"\d{1,4}/\d{1,4}(?![\w/])",
    rf"{PART}(?:/{PART}){{1,2}}(?![-\w])",
    rf"[a-z0-9][a-z0-9.,]*(?:-(?:(?:[a-z]\.){{2,}}|(?:(?!n't){ALNUM})+))+",
    # Numbers: 1,000  12:30  .5  -5  2nd
    r"[-+]?(?:\d+(?:[.:,]\d+)+|[.:,]\d+(?:[.:,]\d+)*)|[-+]\d+",
    rf"\d+(?:{LETTER}{ALNUM}*)?",
    # Words, up to n't; a full stop without a space after it does not end them
    rf"(?:(?!n't){LETTER})(?:(?!n't){ALNUM})*(?:[.!?]{LETTER}{ALNUM}*)*",
    # Signs
    r"\.{2,}|-{2,}|[?!]+|``|''",
    r"[^\s\w]|_",
)
TOKEN = re.compile("|".join(RULES), re.IGNORECASE)
"""One token. The first rule that matches wins, so the order of RULES matters."""


def tokenize(caption: str) -> list[str]:
    """The words of a caption, in order."""
    found = (match.group().lower() for match in TOKEN.finditer(caption.translate(STRAIGHTENED)))
    return [
        RENAMED.get(token, token)
        for token in found
        if not PUNCTUATION.fullmatch(token) and (len(token) > 1 or token <= LAST_KNOWN_SIGN)
    ]
