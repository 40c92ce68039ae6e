"""The dialogue of `chat`: lines come in, slash commands change it, answers go out with what they are made of."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console

from rlbench.commands.chat_conversation import Conversation, HeldOutProblems, Question, Turn
from rlbench.commands.chat_engine import ChatPolicy
from rlbench.commands.chat_rewards import ChatRewards
from rlbench.commands.run_step import BASE, Found, find_step
from rlbench.config.checks import nearest
from rlbench.config.own_errors import is_raised_by_us
from rlbench.config.schema import RunConfig
from rlbench.records import Completion, Prompt, SamplingParams
from rlbench.tracking.safe_text import printable

POLICY, COMPARED = "policy", "compared"  # sides of a conversation
INTERRUPTED = 130  # exit status
NUM_SEEDS = 2**63  # that engines take
_MARK = "> "


@dataclass(frozen=True, slots=True, kw_only=True)
class SlashCommand:
    act: Callable[[Session, str], None]
    argument: str  # what follows it, in words; "" if nothing does
    meaning: str


class Session:
    """One conversation at a time with one policy, or with two."""

    def __init__(
        self,
        run_folder: Path,
        config: RunConfig,
        policy: ChatPolicy,
        rewards: ChatRewards | None,
        conversation: Conversation,
        sampling: SamplingParams,
        console: Console,
        *,
        sides: dict[str, Found],
        seed: int,
    ) -> None:
        """
        Args:
            run_folder: of the run.
            config: of the run, derived.
            policy: that answers.
            rewards: of the run; None: none are shown.
            conversation: that has not begun.
            sampling: of every answer.
            console: where it is shown.
            sides: the weights of "policy", and of "compared" if there are two.
            seed: of the first answer.
        """
        self._run_folder, self._config = run_folder, config
        self._policy, self._rewards, self._conversation = policy, rewards, conversation
        self._problems = HeldOutProblems(config)
        self._sampling, self._console = sampling, console
        self._sides, self._seed = sides, seed

    def run(self, lines: Iterator[str]) -> int:
        """Exit status: 0 at the end of the lines or after /quit, 130 after two Ctrl-C in a row.

        Raises:
            EngineDeadError: the engine failed.
        """
        num_interrupts = 0
        while True:
            try:
                line = next(lines, "/quit").strip()
                if line == "/quit":
                    return 0
                self._take(line)
                num_interrupts = 0
            except KeyboardInterrupt:
                num_interrupts += 1
                if num_interrupts == 2:
                    return INTERRUPTED
                self._note("\nstopped; the conversation is as before. Ctrl-C again ends, and so does /quit")
            except ValueError as error:
                if not is_raised_by_us(error):
                    raise
                num_interrupts = 0
                self._console.print(f"error: {printable(str(error))}", markup=False, soft_wrap=True)

    def _take(self, line: str) -> None:
        if not line:
            return
        if not line.startswith("/") or line.startswith("//"):
            self._ask(Question(text=line.removeprefix("/") if line.startswith("//") else line))
            return
        name, _, argument = line.partition(" ")
        command, argument = COMMANDS.get(name), argument.strip()
        if command is None:
            guess = nearest(name, COMMANDS, count=1)
            hint = f"; did you mean {guess[0]}?" if guess else ""
            raise ValueError(
                f"there is no {name}, expected one of: {', '.join(COMMANDS)}, or // before a prompt that begins with /"
                f"{hint}"
            )
        if argument and not command.argument:
            raise ValueError(f"{name} is followed by {argument}, expected nothing")
        command.act(self, argument)

    def _ask(self, question: Question) -> None:
        """Answer with every side; the turn joins the conversation when all of them have."""
        prompts = {side: self._fitting_prompt(question, side) for side in self._sides}
        turn = Turn(question=question)
        for side, found in self._sides.items():
            with self._waiting("answering"):
                self._policy.use(found)
                completion = self._policy.answer(prompts[side].token_ids, self._sampling, self._seed)
            turn.answers[side] = self._conversation.text_of(completion)
            self._show(prompts[side], completion, turn.answers[side])
        self._conversation.turns.append(turn)

    def _fitting_prompt(self, question: Question, side: str) -> Prompt:
        prompt = self._conversation.prompt(question, side)
        length, answer, context = len(prompt.token_ids), self._sampling.max_tokens, self._policy.context
        if length + answer > context:
            so_far = "with the conversation so far " if self._conversation.turns else ""
            raise ValueError(
                f"the prompt {so_far}is {length} tokens long, expected at most {context - answer}: the context of "
                f"{context} less sampling.max_tokens of {answer}; /new starts again"
            )
        return prompt

    def _show(self, prompt: Prompt, completion: Completion, text: str) -> None:
        if len(self._sides) > 1:
            self._console.print(f"{self._policy.label}:", style="bold")
        self._console.print(printable(text, keep_newlines=True), markup=False, soft_wrap=True)
        self._note("  " + self._facts(completion))
        if self._rewards is not None and (line := self._rewards.line(prompt, completion, text)):
            self._note(f"  {printable(line)}")

    def _facts(self, completion: Completion) -> str:
        weights = self._policy.label
        if weights != BASE:
            weights = f"{weights}, fingerprint {completion.adapter_fingerprint}"
        return (
            f"{len(completion.token_ids)} tokens, {completion.finish_reason}, "
            f"mean logprob {fmean(completion.sampling_logprobs):.3f}, {weights}, seed {self._seed}"
        )

    def start_again(self, _: str) -> None:
        self._conversation.turns.clear()
        self._note("a new conversation")

    def retry(self, _: str) -> None:
        """The last prompt with the next seed; the answer replaces the last one."""
        if not self._conversation.turns:
            raise ValueError("/retry: nothing was answered yet, expected a prompt first")
        last = self._conversation.turns.pop()
        self._seed = (self._seed + 1) % NUM_SEEDS
        try:
            self._ask(last.question)
        except BaseException:
            self._conversation.turns.append(last)
            raise
        if self._sampling.temperature == 0:
            self._note("sampling.temperature is 0: every seed gives the same answer")

    def set_system_prompt(self, text: str) -> None:
        self._conversation.set_system_prompt(text or None)
        self._note("the system prompt of the answers to come is set" if text else "there is no system prompt now")

    def change_step(self, name: str) -> None:
        found = find_step(self._run_folder, name, self._config, "/step", may_be_base=True)
        compared = self._sides.get(COMPARED)
        if compared is not None and compared.label == found.label:
            raise ValueError(f"/step is {name}, but {found.label} is what it is compared with; expected another")
        self._policy.use(found)
        self._sides[POLICY] = found
        self.say_weights(found)

    def say_weights(self, found: Found) -> None:
        """Which weights answer, and that the engine has them."""
        for line in found.passed_over:
            self._note(line)
        if found.checkpoint is None:
            self._note("base: the engine computes with the weights of model.path alone, without adapter")
        else:
            self._note(
                f"{found.label}: the engine holds the weights of {found.checkpoint.folder} bit for bit, fingerprint "
                f"{self._policy.fingerprint}"
            )

    def pose_problem(self, number: str) -> None:
        """In a conversation of its own, so that the policy sees what it was trained and evaluated on."""
        question = self._problems.question(number)
        self._conversation.turns.clear()
        self._note(f"a new conversation with {question.prompt_id}:")
        self._console.print(printable(question.text, keep_newlines=True), markup=False, soft_wrap=True)
        self._ask(question)

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, soft_wrap=True)

    def _waiting(self, what: str) -> contextlib.AbstractContextManager[object]:
        return self._console.status(what) if self._console.is_terminal else contextlib.nullcontext()


COMMANDS = {
    "/new": SlashCommand(act=Session.start_again, argument="", meaning="starts again"),
    "/retry": SlashCommand(act=Session.retry, argument="", meaning="draws the last answer with the next seed"),
    "/system": SlashCommand(act=Session.set_system_prompt, argument="TEXT", meaning="sets the system prompt"),
    "/step": SlashCommand(act=Session.change_step, argument="N", meaning="changes the checkpoint"),
    "/problem": SlashCommand(act=Session.pose_problem, argument="N", meaning="asks the Nth held-out problem"),
    "/quit": SlashCommand(act=lambda *_: None, argument="", meaning="or Ctrl-D ends"),
}


def input_lines(console: Console) -> Iterator[str]:
    """Lines of standard input; of a pipe or a file each is shown as if it had been typed."""
    return _TypedLines() if sys.stdin.isatty() else _PipedLines(console)


class _TypedLines:
    """An iterator that goes on after Ctrl-C, which would end a generator."""

    def __init__(self) -> None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and history in `input`)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return input(_MARK)
        except EOFError:
            print()
            raise StopIteration from None


class _PipedLines:
    def __init__(self, console: Console) -> None:
        self._console = console

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = sys.stdin.readline()
        if not line:
            raise StopIteration
        self._console.print(f"{_MARK}{printable(line.rstrip())}", markup=False, soft_wrap=True)
        return line
