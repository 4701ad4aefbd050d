"""Turns of the tokenizer's own chat template, written out as the templates of a transcript that only grows.

A chat template renders whole conversations. What it puts around the user's texts is found by rendering conversations of stand-ins
and taking differences. That it is the same around real texts is checked when a `Prompter` is made.
"""

import json
from collections.abc import Sequence
from itertools import takewhile

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dmr_pipeline.errors import UserError, printable
from dmr_pipeline.recipe.agent import Chat, Prompt

BY_HAND = "leave chat out, and write the turns out in opening, turn and action_end"
_WITHOUT = {
    "system": "leave system out, and say it in opening",
    "thinking": "leave thinking out",
    "date": "leave date out",
}
"""Field of `Chat` -> what to do where the template can do without it."""


def rendered(tokenizer: PreTrainedTokenizerBase, chat: Chat, texts: Sequence[str]) -> str:
    """The conversation as the template renders it, up to where the assistant's next text begins.

    Args:
        texts: of the user and the assistant by turns, the user's first and last.

    Raises:
        UserError: there is no template, it does not take such a conversation, or it writes today's date.
    """
    turns = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    turns += [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    given: dict[str, object] = {"enable_thinking": chat.thinking, "date_string": chat.date}
    given = {name: value for name, value in given.items() if value is not None}

    def render(**more: object) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **given, **more))

    if tokenizer.chat_template is None:
        raise UserError("this tokenizer has no chat template")
    try:
        return render(strftime_now=None)  # where it is called all the same, the text would depend on the day
    except (TemplateError, TypeError, ValueError):
        pass
    try:
        render()
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the tokenizer's template refuses the conversation ({printable(error)})") from error
    remedy = ' (give one that stays, such as date: "26 Jul 2024")' if chat.date is None else ", whatever date says"
    raise UserError(f"the tokenizer's template writes today's date{remedy}")


def written_out(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Prompt:
    """The prompt without `chat`: its templates are whole segments, and an action ends with what ends the assistant's turn.

    Raises:
        UserError: as `rendered`; or the template renders earlier turns otherwise once others follow, or does not end the
            assistant's turn with a token of its own.
    """
    chat = prompt.chat
    assert chat is not None
    try:
        return _written_out(tokenizer, prompt, chat)
    except UserError as error:
        remedies = []
        for field, remedy in _WITHOUT.items():
            try:
                if getattr(chat, field) is not None:
                    _written_out(tokenizer, prompt, chat.model_copy(update={field: None}))
                    remedies.append(remedy)
            except UserError:
                continue
        raise UserError(f"agent.prompt.chat: {error}: {'; or '.join([*remedies, BY_HAND])}") from error


def _written_out(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: Chat) -> Prompt:
    begun = "" if prompt.thought_end is None else f"Thought{prompt.thought_end}"
    first, second, third = (
        rendered(tokenizer, chat, texts)
        for texts in (
            ["Sight1"],
            ["Sight1", f"{begun}Deed1", "Sight2"],
            ["Sight1", f"{begun}Deed1", "Sight2", f"{begun}Deed2", "Sight3"],
        )
    )
    for field, name, other in (
        ("thinking", "enable_thinking", not chat.thinking),
        ("date", "date_string", "another day"),
    ):
        unlike = chat.model_copy(update={field: other})
        if getattr(chat, field) is not None and rendered(tokenizer, unlike, ["Sight1"]) == first:
            raise UserError(f"the tokenizer's template does not ask for {name}")
    if [first.count("Sight1"), second.count("Deed1"), second.count("Sight2")] != [1, 1, 1]:
        raise UserError("the tokenizer's template does not render each turn's text once")
    before, _, after = first.partition("Sight1")
    between = second.partition("Deed1")[2].partition("Sight2")[0]
    once = f"{first}{begun}Deed1{between}Sight2{after}"
    for expected, found in ((once, second), (f"{once}{begun}Deed2{between}Sight3{after}", third)):
        if found != expected:
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(expected, found, strict=False)))
            was, became = (json.dumps(text[max(0, shared - 24) : shared + 24]) for text in (expected, found))
            raise UserError(
                f"the tokenizer's template renders earlier turns otherwise once others follow ({was} becomes {became}), so"
                " that no transcript that only grows is what it renders"
            )
    action_end = _end_of_turn(tokenizer, between)
    trims = rendered(tokenizer, chat, ["\n Sight1 \n"]) == first

    def segment(head: str, template: str) -> str:
        return _braced(head) + (template.strip() if trims else template) + _braced(after)

    written = {
        "opening": segment(before, prompt.opening),
        "turn": segment(between.removeprefix(action_end), prompt.turn),
        "action_end": action_end,
    }
    return prompt.model_copy(update={"chat": None, **written})


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, between: str) -> str:
    """The token that ends the assistant's turn, at the beginning of what stands between it and the user's text."""
    ends = [token for token in tokenizer.get_added_vocab() if between.startswith(token)]
    if not ends:
        raise UserError(
            f"the tokenizer's template goes on with {json.dumps(between[:24])} after the assistant's text, which begins with no"
            " special token that could end an action"
        )
    return max(ends, key=len)


def _braced(text: str) -> str:
    """As a template that is filled with it."""
    return text.replace("{", "{{").replace("}", "}}")
