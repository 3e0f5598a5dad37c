"""From chats to texts: end tokens are left out, and the number of rows in a pass does not matter."""

from tasks.arithmetic import Arithmetic
from tests.helpers.generation import greedy_texts

CHAT = Arithmetic().messages("What is (4 - 9) * 6?")


def test_texts_leave_out_the_end_token_and_nothing_else(starter):
    [text] = greedy_texts(starter, [CHAT], 22)
    assert "<|im_end|>" not in text
    assert text.endswith("</answer>")
    [cut] = greedy_texts(starter, [CHAT], 1)
    assert len(starter.tokenizer(cut)["input_ids"]) == 1


def test_greedy_does_not_depend_on_how_many_rows_go_together(starter):
    chats = [Arithmetic().messages(p.question) for p in Arithmetic().held_out("validation", 20)]
    assert greedy_texts(starter, chats, 22, rows=3) == greedy_texts(starter, chats, 22)
