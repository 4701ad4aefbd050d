"""How an action fails to be a command that does something; one of them at most for a step."""

from typing import Literal

ParseFailure = Literal["unfinished", "no_thought", "empty"]
"""What was written is no action as the prompt wants it, the first that is true of it:
    unfinished    max_action_tokens were written, and no end of the action among them
    no_thought    the thought has no end, of an agent that is to think first
    empty         no command is left once thought, ends and blanks are taken away
The environment is given what can be read all the same: what follows the thought, where there is one, up to a line break."""
Failure = ParseFailure | Literal["inadmissible"]
"""Or a command was read, but it is none of the admissible ones and changes nothing."""

PARSE_FAILURES: tuple[ParseFailure, ...] = ("unfinished", "no_thought", "empty")
FAILURES: tuple[Failure, ...] = (*PARSE_FAILURES, "inadmissible")
