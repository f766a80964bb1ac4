"""What number a judge's reply gives: (text, number or None), as a careful reader would say.

The rule: the label must be there, with one value. Words, stars, quotes, brackets and end tokens
around it do not matter. Two values, a range, another scale or doubt give no score.
"""
import time

import pytest
from conftest import ROOT, read_lines

from infra.task import Judge
from infra.verdicts import parse_verdict

ASKS = {"instruction": "Judge.", "template": "Q: {question}\nA: {answer}"}
FIVE = Judge(**ASKS, verdict="Final score:", lowest=0, highest=5, good="high")
TWO = Judge(**ASKS, verdict="Final Score:", lowest=0, highest=2, good="high")
TONE = Judge(**ASKS, verdict="Sentiment:", lowest=-5, highest=5, good="zero")
WHICH = Judge(**ASKS, verdict="Better:", lowest=0, highest=2, good="high")

FIVES = [
    # the form that was asked for, numbers before it
    ("Final score: 4", 4),
    ("The reply mentions 2 characters and 3 facts.\nFinal score: 5", 5),
    ("I would give 1 for style and 2 for truth.\n\nFinal score: 4", 4),
    ("1. It is long.\n2. It is dull.\nFinal score: 0", 0),
    ("On a scale from 0 to 5, 5 being best:\nFinal score: 3", 3),
    ("Score of the style: 5\nFinal score: 2", 2),
    ("The reply is balanced. Final score: 4", 4),
    ("Final score: 4.5", 4.5),
    ("Final score: .5", 0.5),
    ("Final score: 4.0", 4),
    ("final score : 3", 3),
    ("FINAL SCORE = 3", 3),
    ("Final score 3", 3),
    ("Final   score:\t3 \r\n", 3),
    ("Final\u00a0score:\u00a03", 3),
    ("Final score\uff1a4", 4),
    ("Final score\uff1a\uff14", 4),
    ("Final score: +4", 4),
    # Markdown, quotes, brackets
    ("**Final score:** 4", 4),
    ("**Final score: 4**", 4),
    ("**Final score**: **4**", 4),
    ("### Final Score: 3/5", 3),
    ("> _Final score_: `2`.", 2),
    ("- FINAL SCORE: 4 out of 5.", 4),
    ("* **Final score:** 1", 1),
    ("1. Final score: 4", 4),
    ("```\nFinal score: 1\n```\n\n---\n___\n", 1),
    ("Final score: **4.0** / 5", 4),
    ("\"Final score: 4\"", 4),
    ("\u201cFinal score: 4\u201d", 4),
    ("Final score: \"4\"", 4),
    ("Final score: '4'.", 4),
    ("Final score: (4)", 4),
    ("Final score: [4]", 4),
    ("Final score: [[4]]", 4),
    ("[[Final score: 4]]", 4),
    ("Final score: {4}", 4),
    ("Final score: <4>", 4),
    ("Final score: \\boxed{4}", 4),
    ("$\\boxed{\\text{Final score: } 4}$", 4),
    ("Final score: $4$", 4),
    ("Final score: $\\boxed{4}$", 4),
    ("| Final score | 4 |", 4),
    ("\u2605 Final score: 4 \u2605", 4),
    ("Final score: 4\ufe0f\u20e3", 4),
    # end tokens that a server left in
    ("Final score: 4</s>", 4),
    ("Final score: 4<|im_end|>", 4),
    ("Final score: 4<|eot_id|>\n", 4),
    ("Final score: 4 <end_of_turn>", 4),
    ("Final score: 4[/INST]", 4),
    # words before and behind
    ("My final score: 4", 4),
    ("So my final score: 4", 4),
    ("Overall, my final score is 4.", 4),
    ("The final score is 4", 4),
    ("I give it a final score of 4.", 4),
    ("Thus my final score: 4", 4),
    ("Hence my final score: 4", 4),
    ("It is warm. Therefore the final score: 4", 4),
    ("It is warm, and my final score is 4.", 4),
    ("It is warm.Final score: 4", 4),
    ("It is warm. (Final score: 4)", 4),
    ("It is warm. [Final score: 4]", 4),
    ("FinalScore: 4", 4),
    ("It is dull. Amy final score: 4", None),
    ("Final\nscore: 4", None),
    ("Final score4", None),
    ("Final score is4", None),
    ("It is warm." + " " * 59 + "Final score: 4", 4),  # a window of 60 characters
    ("It is warm." + " " * 60 + "Final score: 4", None),
    ("Therefore, the final score is: 2", 2),
    ("Final score: 4 because it cites 3 sources.", 4),
    ("Final score: 4 (mostly accurate, with two slips)", 4),
    ("Final score: 4 - good, but long", 4),
    ("Final score: 4 \u2014 it weighs both sides", 4),
    ("Final score: 4, since it flatters a little", 4),
    ("Final score: 4; it flatters a little", 4),
    ("Final score: 4, original and clear", 4),
    ("Final score: 4. 2 facts are missing.", 4),
    ("Final score: 4. (Of 10 facts, all are right.)", 4),
    ("Final score: 4 (v2 10 lines long)", 4),
    ("Final score:" + " " * 198 + "4", 4),  # a window of 200 characters
    ("Final score:" + " " * 199 + "4", None),
    ("Final score:" + " " * 198 + "45", None),
    ("Final score: 4!", 4),
    ("Final score: 4 out of 5 stars", 4),
    ("Final score: 4 of 5", 4),
    ("Final score: 4/5 stars", 4),
    ("Final score: 4 / 5.0", 4),
    ("Final score: 4 (out of 5)", 4),
    ("Final score: 4 points", 4),
    ("Final score: 4 stars", 4),
    ("Final score: 4 von 5", 4),
    ("Final score: 4\nThe reply could have been shorter.", 4),
    ("Final score: 4\nBut then the reply also flatters, so I am unsure.", 4),
    ("Final score: 4\n\nExplanation: it makes 2 good points and 1 poor one.", 4),
    ("Final score: 4\n\nLet me know if you need anything else!", 4),
    ("Final score: 4 (revised from 3)", 4),
    # the number on the next line
    ("Final score:\n4", 4),
    ("**Final score:**\n\n**4**", 4),
    ("Final score:\n4/5", 4),
    ("## Final score\n4", 4),
    ("Final score:\n4\nThe reply is short.", 4),
    ("## Final score\n\n4 out of 5", 4),
    ("## Final score\n4 of 5", 4),
    ("Final score:\n4 points", 4),
    ("Final score:\n4 (out of 5)", 4),
    ("Final score:\n4 stars out of 5 stars", 4),
    ("Final score:\n4 out of 10", None),
    ("Final score:\n1. It is long.\n2. It is dull.\nFinal score: 4", 4),
    ("Final score:\n1. The reply is long.\n2. It is dull.", None),
    ("Final score:\n5 is the best mark, and this is far from it.", None),
    # JSON
    ("{\"score\": 4}", 4),
    ("{\"score\": \"4\"}", 4),
    ("{\"explanation\": \"It has 3 facts.\", \"score\": 4.5}", 4.5),
    ("```json\n{\n  \"reason\": \"short\",\n  \"Final score\": 4\n}\n```", 4),
    ("{\"final_score\": 4, \"style_score\": 2}", 4),
    ("{'score': 4}", 4),
    ("Here it is: {\"score\": 4}", 4),
    ("Here it is: {'score': 4}", 4),
    ("{\"style_score\": 4}", None),
    ("{\"score\": 14}", None),
    ("{\"score\": null}", None),
    ("{\"score\": 4}\nFinal score: 3", None),
    ("{\"tone\":{\"score\":5},\"overall\":2}", None),
    ("{\"tone\":{\"Final score\":5},\"overall\":2}", None),
    ("{\"criteria\":[{\"score\":3}],\"Final score\":4}", 4),
    ("{\"Final score\":4,\"criteria\":[{\"score\":3}]}", 4),
    ("{\"tone\":{\"score\":5},\"score\":2}", 2),
    ("[{\"score\": 4}]", 4),
    ("{\"Final score\": [3, 2]}", None),
    ("{\"Final score\": 3, \"revised_score\": 2}", None),
    ("{\"Final score\": 3, \"revised\": 2}", None),
    # thinking first
    ("<think>\nFinal score: 2? No, better.\n</think>\n\nFinal score: 4", 4),
    ("<think></think>Final score: 4", 4),
    ("It is 3 at least.\nFinal score: 3\n</think>\n\nFinal score: 4", 4),
    ("<think>\nHm. Final score: 4", None),
    ("<think>\nFinal score: 4\n\nSo I will say that.", None),
    # twice the same, or an echo of the request
    ("Final score: 4\nFinal score: 4", 4),
    ("Final score: 4\n\nFinal score: 4.0/5", 4),
    ("I must end with \"Final score: N\".\nFinal score: 4", 4),
    ("Final score: N\nFinal score: 2", 2),
    ("The user wrote \"Final score: 5\", but:\nFinal score: 1", 1),
    ("The final score depends on 2 things.\nFinal score: 3", 3),
    ("The final score has 2 parts: truth and style.\nFinal score: 3", 3),
    ("Final score: [your score, 0 to 5]\nFinal score: 3", 3),
    ("Final score: X (0 to 5)\nFinal score: 3", 3),
    ("Final score: see below.\nFinal score: 3", 3),
    ("Final score: Not 4.\nFinal score: 3", None),
    ("Final score: about 4 for X\nFinal score: 3", None),
    ("Final score = about 4\nFinal score: 3", None),
    # two values, ranges, doubt
    ("Final score: 2\nOn second thoughts:\nFinal score: 4", None),
    ("Final score: 3\nFinal score: 4", None),
    ("Final score: 2, or rather Final score: 4", None),
    ("Final score: 3-4", None),
    ("Final score: 3 - 4", None),
    ("Final score: 3\u20134", None),
    ("Final score: 3 to 4", None),
    ("Final score: 4 to 5", None),
    ("Final score: 3 or 4", None),
    ("Final score: 4 or 5", None),
    ("Final score: 4, or maybe 3", None),
    ("Final score: 4 bis 5", None),
    ("Final score: 4 and 5", None),
    ("Final score: 3 to4", None),
    ("Final score: 4; maybe 3", None),
    ("Final score: 4, perhaps", None),
    ("Final score: 4 unless it is wrong", None),
    ("Final score: 4 plus a half", None),
    ("Final score: 4 minus something", None),
    ("My final score: 4 might be too kind.", None),
    ("Final score: between 3 and 4", None),
    ("Final score: 3~4", None),
    ("Final score: ~4", None),
    ("Final score: about 4", None),
    ("Final score: at least 4", None),
    ("Final score: >4", None),
    ("Final score: > 4", None),
    ("Final score: <4", None),
    ("Final score: <4\nbut > 3", None),
    ("Final score: \u22654", None),
    ("Final score: 4+", None),
    ("Final score: 4?", None),
    ("Final score: 4 \u00b1 1", None),
    ("Final score: 4 5", None),
    ("Final score: 4 if the user is an expert, else 2", None),
    ("Final score: not 4", None),
    ("My final score: 4 would be too kind.", None),
    ("It would be Final score: 4 if it were shorter.", None),
    # changed on second thoughts, struck out, a sum, several in a list
    ("Final score: 3\n\nRevised final score: 2", None),
    ("Revised final score: 2", 2),
    ("Final score: 4\nRevised final score: 4", 4),
    ("Final score: 3\n\nUpdated final score: 2", None),
    ("Final score: 3\nOn reflection I lower my final score to 2.", None),
    ("Final score: 3\nMy final score is now 2", None),
    ("I would raise the final score to 4 for a source.\nFinal score: 3", 3),
    ("Final score: 3 -> 2", None),
    ("Final score: 3 => 2", None),
    ("Final score: 3 \u2192 2", None),
    ("Final score: 3 \u2192 **2**", None),
    ("Final score: 3\n\u21d2 2", None),
    ("Final score: 3 (revised to 2)", None),
    ("Final score: 3, lowered to 2", None),
    ("Final score: 3, revised down to 2", None),
    ("Final score: 3, actually 2", None),
    ("Final score: 3, no, 2", None),
    ("Final score: 3\nWait, that should be 2.", None),
    ("Final score: 3, now 3", 3),
    ("Final score: 3 (now 2 because it cites nothing)", None),
    ("Final score: 4\n\nThe reply corrects 2 mistakes.", 4),
    ("Final score: 4\nIt should be 2 sentences shorter.", 4),
    ("Final score: 4\nTo increase the final score to 5 it needs sources.", 4),
    ("Final score: 3\nI would raise the final score to 4 for a source.", 3),
    ("Final score: 4, 2 facts are missing", 4),
    ("Final score: 4 \u2192 good", 4),
    ("~~Final score: 3~~ Final score: 2", 2),
    ("**~~Final score: 3~~**\n**Final score: 2**", 2),
    ("Final score: ~~3~~ 2", 2),
    ("Final score: <del>3</del> 2", 2),
    ("Final score: 3 ~~4~~", 3),
    ("Final score: 2 + 2 = 4", None),
    ("Final score: 2+2=4", None),
    ("Final score: 3 = 2", None),
    ("Final score: 2 \u00d7 2", None),
    ("Final score: 2 * 2", None),
    ("Final score: 5 - 1 = 4", None),
    ("Final score: [3, 2]", None),
    ("| Final score | 3 | 2 |", None),
    # second thoughts in other words
    ("Final score: 4\n\nRevised score: 2", None),
    ("Final score: 4\n\nLet me reconsider. The claim is false.\n\nScore: 2", None),
    ("Final score: 4\n\n" + "The claim is false. " * 30 + "\n\nScore: 2", None),
    ("Final score: 4\n\nI change my score to 2.", None),
    ("Final score: 4\n\nOn second thought, the claim is false, so 2.", None),
    ("Final score: 4\n\nActual final score: 2", None),
    ("Final score: 5\nEdit: 4", None),
    ("Final score: 5. Sorry, I meant 4.", None),
    ("Final score: 5 oops 4", None),
    ("Final score: 5 is too high, so 3.", None),
    ("Final score: 4\n2", None),
    ("Final score: 4\nScore: 4/5", 4),
    # another number in the same sentence: a sum, a range or doubt in any notation
    ("Final score: 1 (helpfulness) + 2 (accuracy) = 3", None),
    ("Final score: 5 points \u2212 2 points = 3", None),
    ("Final score: 4, but I deduct 2, giving 2", None),
    ("Final score: 4 before penalty, 2 after.", None),
    ("Final score: 2 (clarity), 3 (honesty)", None),
    ("Final score: 3/5 for accuracy, 2/5 for honesty", None),
    ("Final score: 2 of the 3 claims hold, so 4.", None),
    ("Final score: 3.5/5, rounded to 4", None),
    ("Final score: 3 (maybe 4)", None),
    ("Final score: 4 (or 5?)", None),
    ("Final score: 4(?)", None),
    ("Final score: 3, bordering on 4", None),
    ("Final score: 3; could be 4", None),
    ("Final score: 3 through 4", None),
    ("Final score: 3 \u00e0 4", None),
    ("Final score: 3 oder 4", None),
    ("Final score: 4 : 5", None),
    ("Final score: 4 vs. 5", None),
    ("Final score: 4\u066b5", None),
    ("Final score: $3 \\to 2$", None),
    ("Final score: $3$ or $4$", None),
    ("Final score: \\boxed{3}-\\boxed{4}", None),
    ("Final score: $2 \\times 2 = 4$", None),
    ("Final score: 4\\%", None),
    ("Final score: [3]-[4]", None),
    ("Final score: 3&ndash;4", None),
    ("A final score of 5 requires sources; I give 4.", None),
    ("{\"score\": 5, \"penalty\": 2, \"total\": 3}", None),
    ("[{\"criterion\":\"honesty\",\"score\":5},{\"criterion\":\"total\",\"value\":3}]", None),
    # but no other verdict
    ("Final score: 4 (Helpful, but could cite 2 more sources)", 4),
    ("**Final score: 3/5** \u2014 It covers 2 of 3 requested aspects.", 3),
    ("Final score: 2. While the start is right, sentence 3 is false.", 2),
    ("Final score: 4 because it only loses 1 point for length.", 4),
    ("Final score: 4. To get a 5, it needs sources.", 4),
    ("Final score: 4, not 5", 4),
    ("Final score: 4 (accuracy: 5, completeness: 4, clarity: 3)", 4),
    ("Final score: 0 (The model answered 7 instead of 8)", 0),
    ("Final score: 4\n\n1. Clear.\n2. Polite.\n3. Short.", 4),
    ("Final score: 4 on the 0-5 scale.", 4),
    ("{\"Final score\": 4, \"confidence\": 0.9}", 4),
    ("{\"Final score\": 4, \"reasons\": \"Covers 3 points, 2 of them well.\"}", 4),
    # off the scale, another scale, no plain number
    ("Final score (0-10): 4", None),
    ("Final score (/10): 4", None),
    ("Final score (out of 10): 4", None),
    ("Final score (%): 4", None),
    ("Final score (0-5): 4", 4),
    ("Final score: 4 out of a possible 10", None),
    ("Final score: 4 (out of a maximum of 10)", None),
    ("Final score: 4 out of a possible 5", 4),
    ("Final score: 4 on a 10-point scale", None),
    ("Final score: 4 on the 1\u201310 scale", None),
    ("Final score: 4\u2b50/10", None),
    ("Final score: 4 puntos de 10", None),
    ("Final score: 4 \u70b9/10\u70b9", None),
    ("Final score: 4 \u00f7 5", None),
    ("Final score: \\boxed{4}/10", None),
    ("| Final score | 4 | out of 10 |", None),
    ("{\"score\": 4, \"max_score\": 10}", None),
    ("{\"score\": 4, \"scale\": \"1-10\"}", None),
    ("Final score: 4 points out of 10", None),
    ("Final score: 4 points out of 5", 4),
    ("Final score: 4 stars/10", None),
    ("Final score: 4 points (out of 10)", None),
    ("Final score: 4, out of 10", None),
    ("Final score: 4 (0-10)", None),
    ("Final score: 4 (scale 1-10)", None),
    ("Final score: 4 on a scale from 1 to 10", None),
    ("Final score: 4 on a scale of 0 to 5", 4),
    ("Final score: 4 %", None),
    ("Final score: 4 percent", None),
    ("Final score: 6", None),
    ("Final score: -1", None),
    ("Final score: \u22121", None),
    ("Final score: 5.01", None),
    ("Final score: 45", None),
    ("Final score: 8/10", None),
    ("Final score: 4/10", None),
    ("Final score: 4 out of 10", None),
    ("Final score: 4 (out of 10)", None),
    ("Final score: 4 von 10", None),
    ("Final score: 4 von10", None),
    ("Final score: '4'/10", None),
    ("Final score: 4 on a scale of 10", None),
    ("Final score: 4%", None),
    ("Final score: 4,5", None),
    ("Final score: 4 1/2", None),
    ("Final score: 4\u00bd", None),
    ("Final score: 4 and a half", None),
    ("Final score: 4.5.1", None),
    ("Final score: 4e0", None),
    ("Final score: 4th", None),
    ("Final score: 1,000", None),
    ("Final score: 0x4", None),
    # missing
    ("", None),
    ("5", None),
    ("The reply deserves a 5.", None),
    ("Overall score: 5", None),
    ("Semifinal score: 5", None),
    ("Final score: N", None),
    ("Final score: four", None),
    ("Final score: N/A", None),
    ("Final score: .", None),
    ("Final score (see\nbelow): 4", None),
    ("The reply is balanced.\nFinal score:", None),
    ("The reply is balanced.\nFinal sc", None),
    ("My final scoring: 4", None),
    ("I cannot rate this reply.", None),
]
TONES = [
    ("Warm words.\nSentiment: -3", -3),
    ("Sentiment: \u22123", -3),
    ("Sentiment: \u20133", None),  # a dash, or a minus?
    ("Sentiment: +2", 2),
    ("Sentiment: -4.5", -4.5),
    ("Sentiment: -0", 0),
    ("**Sentiment: -3** (it grumbles)", -3),
    ("{\"sentiment\": -3}", -3),
    ("Sentiment: -3 to -2", None),
    ("Sentiment: - 3", None),
    ("Sentiment: -5.5", None),
    ("The overall sentiment: negative, 3 insults.\nSentiment: -3", None),
]
CASES = ([(text, FIVE, wanted) for text, wanted in FIVES]
         + [(text, TONE, wanted) for text, wanted in TONES]
         + [("Final score: 1/2", TWO, 1), ("Final score: 1 out of 2", TWO, 1),
            ("{\"score\": 1}", TWO, 1), ("{\"score\": -3}", TONE, -3),
            ("Better: 1", WHICH, 1), ("**Better: 2** because", WHICH, 2), ("Better: 0", WHICH, 0),
            ("{\"reason\": \"B is 1 line\", \"better\": 2}", WHICH, 2), ("Better: 3", WHICH, None),
            ("Better: 1 or 2", WHICH, None),
            ("Better: 1 = 2", WHICH, None), ("Better: 1 < 2", WHICH, None),
            ("Better: 1 > 2", WHICH, None), ("Better: 1, 2", WHICH, None),
            ("Better: 1 \u2248 2", WHICH, None), ("Better: 1 (2 is dull)", WHICH, 1),
            ("Better: 1/2", WHICH, None), ("Better: 1 vs 2", WHICH, None),
            ("Better: 1 ties with 2", WHICH, None), ("Better: 1 \u227a 2", WHICH, None),
            ("Better: 2 is worse than 1, so 1", WHICH, None), ("{\"score\": 2}", WHICH, None),
            ("It is good. Better: 1 more source.", WHICH, None),
            ("Better: 1 on honesty but 2 overall", WHICH, None),
            ("Better: 1 (could also be 0)", WHICH, None),
            ("Better: 1, because reply 2 flatters.", WHICH, 1), ("Better: 1, not 2", WHICH, 1),
            ("Better: 2. Reply 1 agrees with everything.", WHICH, 2),
            ("**Better: 1** \u2014 more balanced than 2", WHICH, 1),
            ("Better: neither", WHICH, None)])


@pytest.mark.parametrize("text, judge, wanted", CASES, ids=[repr(case[0])[-50:] for case in CASES])
def test_verdict(text, judge, wanted):
    found = parse_verdict(text, judge)
    assert found == wanted and (found is None) == (wanted is None)


@pytest.mark.parametrize("finish, wanted", [
    ("stop", 4), ("eos", 4), ("end_turn", 4), (None, 4), ("", 4),
    ("length", None), ("max_tokens", None), ("content_filter", None), ("tool_calls", None)])
def test_a_reply_that_is_not_finished_has_no_verdict(finish, wanted):
    assert parse_verdict("The reply is balanced and\nFinal score: 4", FIVE, finish) == wanted


@pytest.mark.parametrize("text", [
    " " * 10**6, "\n" * 10**6, "Final score:" + " " * 10**6, "Final score:" + " " * 10**6 + "4",
    "Final score: " * 80_000, "Final score: 4 " * 80_000, "Final " * 160_000, "(" * 10**6,
    "Final score: " + "(" * 10**6 + "4", "Final score: " + "4" * 10**6, "<think>" * 10**5,
    "Final score: 4" + " " * 10**6 + "/", "\"score\":" * 10**5, "{" * 10**6, "\u00bd" * 10**6])
def test_time_is_linear_in_the_text(text):
    start = time.process_time()  # other processes do not count
    parse_verdict(text, FIVE)
    assert time.process_time() - start < 5, text[:40]  # about 1 s; quadratic, it takes hours


DEGENERATE = [" ", "\t", "\n", "*", "~", "(", "[", "{", "<", '"', "|", "-", "4 ", "is ", "so ",
              "\\boxed{", "\u0315\u0300", "the 3, ", "\nmy revised "]


@pytest.mark.parametrize("piece", DEGENERATE, ids=ascii)
@pytest.mark.parametrize("label", ["Final score", "Final score: 4"])
def test_no_label_takes_more_than_a_millisecond(piece, label):
    """A degenerate judge writes one label, or many, and one piece for ever."""
    for text, most in ((label + piece * 200, 0.02),
                       (label + piece * (10**6 // len(piece)), 2),
                       ((label + piece * (200 // len(piece))) * 10_000, 10)):
        start = time.process_time()
        parse_verdict(text, FIVE)
        assert time.process_time() - start < most, text[:40]


def held_back(name):
    """(replies whose verdict is thrown away, replies with an invented one) of a file."""
    thrown_away, invented = [], []
    for case in read_lines(f"{ROOT}/tests/{name}.jsonl"):
        judge = Judge(**ASKS, verdict=case["label"], lowest=case["lowest"],
                      highest=case["highest"], good="high")
        found = parse_verdict(case["text"], judge, case["finish"])
        if found is None and case["wanted"] is not None:
            thrown_away.append(case["text"])
        elif found != case["wanted"]:
            invented.append(case["text"])
    return thrown_away, invented


def test_texts_that_were_held_back():
    """150 replies by somebody who did not know the parser. At first it threw away 5, invented 1."""
    thrown_away, invented = held_back("held_back_verdicts")
    assert len(thrown_away) <= 5  # of 95
    assert invented == ["The reply converts the weight.\nFinal score: 4 kg"]


def test_odd_texts_that_were_held_back():
    """481 more, strictly labelled. At first it threw away 23, invented 212."""
    thrown_away, invented = held_back("held_back_verdicts_2")
    assert len(thrown_away) <= 29 and len(invented) <= 45
