"""The tools of a run, for a rollout that takes turns itself: TRL's own loop runs them, one turn at a time."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import trl
from trl.chat_template_utils import parse_response

from ..rollouts.branch import Branch
from ..rollouts.strategy import Response

Named = dict[str, Callable]


@dataclass
class Talk:
    """What was said in a branch, and the environment that it is in."""

    row: int  # of TRL's batch, whose tools it has
    prompt: list  # messages, with the response's own behind them, as TRL's loop keeps them
    plain: Named  # tools by name
    asynchronous: Named
    environment: Any = None
    messages: list = field(default_factory=list)  # of the response
    read: int = 0  # tokens of the response that they are of
    turns: int = 0  # that a tool answered


class TrlTools:
    """Runs tools for branches; `calls` and `failures` are those that were run."""

    def __init__(self, trainer: Any, prompts: list, group: int) -> None:
        self.trainer, self.prompts = trainer, prompts
        self.free = {start // group: list(range(start, start + group)) for start in range(0, len(prompts), group)}
        self.calls = self.failures = 0

    def begin(self, branch: Branch, prompt: int) -> None:
        """Gives a new response to a prompt (its number in the batch) one of the prompt's tools and environments.

        Refuses more responses than the prompt has environments.
        """
        trainer = self.trainer
        if not self.free[prompt]:
            raise ValueError(
                f"a rollout began more responses to prompt {prompt} than it has environments: fork a branch"
            )
        row = self.free[prompt].pop(0)
        branch.talk = Talk(
            row=row,
            prompt=copy.deepcopy(self.prompts[row]),
            plain=trainer._sync_tool_dicts[row],
            asynchronous=trainer._async_tool_dicts[row],
            environment=trainer.environments[row] if trainer.environments else None,
        )

    def copy(self, branch: Branch) -> None:
        """Gives a branch what its parent has said, and a copy of its environment. Refuses one that cannot be copied."""
        assert branch.parent is not None
        talk = talk_of(branch.parent)
        try:
            environment = copy.deepcopy(talk.environment)
        except Exception as error:  # a stranger's object may raise anything
            raise ValueError(
                f"a rollout copies the environment where a branch begins, and {type(talk.environment).__name__} cannot "
                f"be copied: {type(error).__name__}: {error}; give it a __deepcopy__"
            ) from error
        branch.talk = replace(
            talk,
            prompt=copy.deepcopy(talk.prompt),
            messages=copy.deepcopy(talk.messages),
            environment=environment,
            plain=rebound(talk.plain, talk.environment, environment),
            asynchronous=rebound(talk.asynchronous, talk.environment, environment),
        )

    def reply(self, branches: Sequence[Branch]) -> list[list[int] | None]:
        """The tokens of what tools said to each branch; None where it called none or has no turn left."""
        calling = []
        for branch in branches:
            talk, message = talk_of(branch), self._said(branch)
            if message and message.get("tool_calls") and talk.turns < self.trainer.max_tool_calling_iterations:
                calling.append(branch)
        replies = dict(zip(map(id, calling), self._run(calling), strict=True)) if calling else {}
        return [replies.get(id(branch)) for branch in branches]

    def _said(self, branch: Branch) -> dict:
        """The branch's last turn as a message, which is noted; empty where it has no token."""
        trainer, talk = self.trainer, talk_of(branch)
        turn, before = branch.ids[talk.read :], branch.prompt + branch.ids[: talk.read]
        if not turn:
            return {}
        tools = trainer.tools
        if trainer.environment_factories is not None:
            tools = trainer._env_tools[trainer._batch_environments[talk.row]]
        message = parse_response(trainer._tokenizer, turn, prefix=before, tools=tools)
        talk.messages.append(message)
        talk.read = len(branch.ids)
        return message

    def _run(self, branches: list[Branch]) -> list[list[int] | None]:
        """One turn of TRL's loop for branches whose last message calls a tool; it asks for no further tokens here."""
        trainer, talks = self.trainer, [talk_of(each) for each in branches]
        said = [[talk.messages[-1]] for talk in talks]
        swapped = {
            "_sync_tool_dicts": [talk.plain for talk in talks],
            "_async_tool_dicts": [talk.asynchronous for talk in talks],
        }
        if trainer.environment_factories is not None:
            swapped["_batch_environments"] = [trainer._batch_environments[talk.row] for talk in talks]
        before = {name: getattr(trainer, name) for name in swapped}
        try:
            vars(trainer).update(swapped)
            _, said, ids, _, calls, failures, images = trl.GRPOTrainer._tool_call_loop(
                trainer,
                [talk.prompt for talk in talks],
                [each.prompt for each in branches],
                [list(each.ids) for each in branches],
                said,
                None,
                None,
                {},
            )
        finally:
            vars(trainer).update(before)
        if any(images):
            raise ValueError("a rollout reads text alone, and a tool replied with an image")
        self.calls, self.failures = self.calls + calls, self.failures + failures
        replies: list[list[int] | None] = []
        for branch, talk, messages, longer in zip(branches, talks, said, ids, strict=True):
            reply = longer[len(branch.ids) :]
            talk.messages += messages[1:]
            talk.turns += 1
            talk.read += len(reply)
            replies.append(reply or None)
        return replies

    def settle(self, name: str, responses: Sequence[Response]) -> None:
        """Hands TRL the environments that the responses ended in, whose rewards it may ask for.

        Refuses a response that came from no branch with tools.
        """
        for number, each in enumerate(responses):
            if not isinstance(each.talk, Talk):
                raise ValueError(
                    f"the rollout '{name}', response {number} of {len(responses)} (counted from 0): no tool knows it; "
                    "in a run with tools responses come from Branch.response, of branches that Asked.tools.begin knows"
                )
        if self.trainer.environments:
            self.trainer.environments = [talk_of(each).environment for each in responses]


def rebound(tools: Named, old: object, new: object) -> Named:
    """The tools, those of the environment being the copy's."""
    is_of = {name: old is not None and getattr(tool, "__self__", None) is old for name, tool in tools.items()}
    return {name: getattr(new, tool.__name__) if is_of[name] else tool for name, tool in tools.items()}


def talk_of(branch: Branch | Response) -> Talk:
    """What was said in it; it must have begun."""
    assert isinstance(branch.talk, Talk)
    return branch.talk
