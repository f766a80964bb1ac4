"""What models write before an answer, in the forms of today's models, and how it is split off.

One rule: a block counts only where a reply begins. An answer may show the same tags.
"""
import re

NAMES = ("think", "thinking", "thought", "reasoning", "seed:think", "longcat_think", "hy_think")

# (what opens a block, what closes it), as regular expressions without groups
FORMS = [
    *((f"<{name}>", f"</{name}>") for name in NAMES),  # Qwen, DeepSeek, GLM, Hunyuan, Seed, ...
    (r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Command A
    (r"<\|channel>thought\b", r"<channel\|>"),  # Gemma
    ("<unused94>thought", "<unused95>"),  # MedGemma
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # OpenThinker, Sky-T1
    (r"<\|think\|>", r"<\|end\|>(?:<\|begin\|>assistant)?<\|content\|>"),  # Solar Open
    # gpt-oss: several messages may come before the final one
    (r"(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)(?:[^\n]{0,60}?<\|message\|>)?",
     r"(?:<\|end\|>)?(?:<\|start\|>assistant)?<\|channel\|>final[^\n]{0,60}?<\|message\|>"),
    # Plain words: an opening counts where its closing follows, a closing behind its opening
    ("Here are my reasoning steps:", r"\[BEGIN FINAL RESPONSE\]"),  # Apriel, its closing a tag
    (r"analysis(?=\S)", "assistantfinal"),  # gpt-oss, its tokens taken out
    ("Here(?:'s| is) my thought process:", "Here(?:'s| is) my response:"),  # Granite
    (r"Thinking\.\.\.", r"\.\.\.done thinking\."),  # Ollama's command line
]
FORMS = [(opening, rf"{closing}(?:\s*{closing})*") for opening, closing in FORMS]  # written twice
TAGS, CLOSINGS = FORMS[:-4], [closing for _, closing in FORMS[:-3]]


def any_of(patterns, before=""):
    """A regular expression for one of the patterns, each in its own group."""
    return re.compile(before + "(?:" + "|".join(f"({p})" for p in patterns) + ")", re.IGNORECASE)


# Where a closing tag ends a block for sure: not inside a sentence that is about the tag.
PLACE = r"""(?m:^[ \t]*|(?<=[^\s(\[{"'`“‘«])|(?<=\S["'`”’»])|(?<=[.!?…。])[ \t]+)"""
OPENED = any_of((opening for opening, _ in FORMS), r"[\s\ufeff\u200b]*")
CLOSED = any_of(CLOSINGS, PLACE)
ALONE = any_of((rf"{closing}(?m:[ \t]*$)" for closing in CLOSINGS), r"(?m:^[ \t]*)")
# What shows a tag instead of using it: a block of code, code in a line, quotes right around it.
SHOWN = re.compile(r"(?ms:^[ \t]*```.*?^[ \t]*```)|`[^`\n]+`|(?<!\S)[\"'“‘«](?:"
                   + "|".join(tag for form in TAGS for tag in form) + r")[\"'”’»]",
                   re.IGNORECASE)
# Marks of an answer itself: Command A, Solar, GLM, end tokens; of one after a block: Hunyuan, ERNIE
MARKS = re.compile(
    r"\A\s*<\|(?:START_(?:RESPONSE|TEXT)|begin_of_solution|content)\|>\s*|"
    r"<\|(?:begin|end)_of_box\|>|(?<!\s)(?:\s*(?:<[|｜][\w▁]+[|｜]>|</s>|<turn\|>|<end_of_turn>|"
    r"<seed:eos>|\[END FINAL RESPONSE\])){1,3}\s*\Z")
WRAPPED = re.compile(r"<(answer|response)>", re.IGNORECASE)


def split_thinking(text):
    """(thinking, answer): the blocks of thoughts at the start of a text, and what follows them.

    A block that never ends leaves no answer: the reply was cut. Some chat templates write the
    opening tag into the prompt; then a closing tag that is not only shown ends the block.
    """
    shown = SHOWN.sub(lambda part: "\0" * len(part[0]), text)
    thoughts, start = [], 0
    while len(thoughts) < 9 and (opened := OPENED.match(text, start)):  # each may read all of it
        (opening, closing), inside = FORMS[opened.lastindex - 1], opened.end()
        closed = find(PLACE + closing, shown, inside) or find(closing, shown, inside) or find(
            rf"(?m:^[ \t]*(?:{closing})[ \t]*$)", text, inside)  # an unclosed ``` hid it
        if not closed and opened.lastindex > len(TAGS):
            break
        if not closed:
            return text, ""
        outer = find(PLACE + opening, shown[inside:closed.start()]) and find(
            PLACE + closing, shown, closed.end())  # of a block in a block
        if outer and not find(opening, shown[closed.end():outer.start()]):
            closed = outer
        thoughts.append(text[inside:closed.start()].strip())
        start = closed.end()
    one_is_open = text.count("```") % 2
    if not thoughts and (closed := CLOSED.search(shown) or one_is_open and ALONE.search(text)):
        opening, before = FORMS[closed.lastindex - 1][0], closed.string[:closed.start()]
        line = before.rpartition("\n")[2]
        if not (find(opening, line) or find(rf"(?m:^[ \t]*(?:{opening})|(?:{opening})$)", before)):
            thoughts, start = [text[:closed.start()].strip()], closed.end()
    answer = text[start:].lstrip() if thoughts else text
    if thoughts and (wrapped := WRAPPED.match(answer)):
        answer = re.sub(rf"</{wrapped[1]}>", "", answer[wrapped.end():], count=1).strip()
    return "\n\n".join(filter(None, thoughts)), MARKS.sub("", answer)


def find(pattern, text, start=0):
    return re.compile(pattern, re.IGNORECASE).search(text, start)
