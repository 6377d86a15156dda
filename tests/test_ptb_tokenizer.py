"""utils/ptb_tokenizer.py: what the Java tokenizer does, rule by rule. Whole files: tests/test_reference_fsgr.py."""

import pytest

from utils.ptb_tokenizer import PUNCTUATION, tokenize, tokens

CASES = {  # caption: all tokens, as Stanford CoreNLP 3.4.1 prints them
    "A man's dog, isn't it?": "a man 's dog , is n't it ?",
    "I'm you're we've they'll he'd it's": "i 'm you 're we 've they 'll he 'd it 's",
    "CAN'T DON'T won't ain't": "ca n't do n't wo n't ai n't",
    "it's already detached: do n't, it 's": "it 's already detached : do n't , it 's",
    "cannot gonna gotta wanna gimme lemme": "can not gon na got ta wan na gim me lem me",
    "'tis the '80s and 20's, rock 'n' roll": "'t is the '80s and 20 's , rock 'n' roll",
    "5 o'clock, d'oeuvre, O'Neill's": "5 o'clock , d'oeuvre , o'neill 's",
    "the boys' toys": "the boys ' toys",
    "it’s “smart” ‘single’": "it 's `` smart '' ` single '",
    "\"quoted text.\" and 'quoted'": "`` quoted text . '' and ` quoted '",
    "5'10\" tall": "5 ' 10 '' tall",
    "a (b) [c] {d}": "a -lrb- b -rrb- -lsb- c -rsb- -lcb- d -rcb-",
    "wait.. wait... wait…": "wait . . wait ... wait ...",
    "hello!! what?? so?!": "hello !! what ?? so ?!",
    "a--b – c — d - e": "a -- b -- c -- d - e",
    "-dash dash- -5 +5 .5": "- dash dash - -5 +5 .5",
    "T-shirt jack-in-the-box 3-D x-ray": "t-shirt jack-in-the-box 3-d x-ray",
    "black/white and/or w/o w/ a": "black/white and/or w/o w / a",
    "at sidewalk.outside end.Begin": "at sidewalk.outside end.begin",
    "a&b R&B AT&T a*b C++": "a & b r&b at&t a * b c++",
    "#tag @user me@b.com http://foo.com/bar www.foo.com.": "#tag @user me@b.com http://foo.com/bar www.foo.com .",
    "1,000 3.5 12:43 10-29-2011 11.01.2009 9/11 8th 1950s": "1,000 3.5 12:43 10-29-2011 11.01.2009 9/11 8th 1950s",
    "5:54pm 5pm $5.00 50% #1": "5:54 pm 5pm $ 5.00 50 % # 1",
    "2½ cups at 100°": "2 1/2 cups at 100 °",
    "22 3/4 St. is": "22\u00a03/4 st. is",
    "Main St. and 8th Ave. with Mr. Bear, e.g. this": "main st. and 8th ave. with mr. bear , e.g. this",
    "No. 5, no.": "no. 5 , no .",
    "Wash. state. They wash.": "wash. state . they wash .",
    "at 5 p.m. on a T.V. in the U.S.A": "at 5 p.m. on a t.v. in the u.s.a",
    "Q. and I. A hood, plan B. The man": "q. and i . a hood , plan b . the man",
    "café 東京 naïve": "café 東京 naïve",
    "smile \U0001f642 here": "smile here",
    "<eos> snow_boarder": "<eos> snow_boarder",
    "£5 & &amp;": "# 5 & &",
}


@pytest.mark.parametrize("caption", CASES)
def test_tokens(caption):
    assert " ".join(tokens(caption)) == CASES[caption]


def test_punctuation_is_dropped_and_nothing_else():
    assert (
        tokenize('A (red) dog -- isn\'t it? Yes; "it" is: so, !!') == "a -lrb- red -rrb- dog is n't it yes it is so !!"
    )
    assert len(PUNCTUATION) == 17


@pytest.mark.parametrize("blank", ["\t", "\n", "\r\n", "\u00a0", "\u2028", "\x0b", "\x0c", "   "])
def test_every_blank_separates(blank):
    assert tokenize(f" two{blank}words{blank}") == "two words"


def test_nothing_stays_nothing():
    assert tokenize("") == tokenize("  ") == tokenize(".") == tokenize("'") == ""
    assert tokens("") == []


def test_tokens_of_tokens_are_themselves():
    """What a model generates from tokenised captions is scored as it is."""
    for caption in ("a man 's dog is n't on the t-shirt", "two people ca n't ride 8th ave. at 12:43", "the u.s. flag"):
        assert tokenize(caption) == caption
