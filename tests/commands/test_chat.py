"""`chat` in this process: every slash command, prompts that do not fit, Ctrl-C, and a sentence for every mistake."""

import io
import json
import shutil
import signal
from dataclasses import replace

import pytest
from rich.console import Console

from rlbench.commands.chat import chat, parse_arguments
from rlbench.commands.chat_conversation import Conversation, Question, Turn
from rlbench.commands.chat_engine import ChatPolicy, answer_sampling, answering_config, prepare_chat
from rlbench.commands.chat_rewards import ChatRewards
from rlbench.commands.chat_session import COMPARED, INTERRUPTED, NUM_SEEDS, POLICY, Session
from rlbench.commands.run_step import find_step
from rlbench.config.schema import DataConfig, ExampleConfig
from rlbench.engine import hf_engine
from rlbench.training import checkpoint as checkpoints
from tests.commands.chat_runs import answers, talk, train
from tests.loops.conftest import end_of_the_fork_server, tiny_overrides  # noqa: F401 (fixtures)
from tests.loops.test_user_errors import check

STEPS = ["training.num_steps=4", "checkpoint.every_steps=2", "checkpoint.keep_last=6", "evaluation.every_steps=2"]


@pytest.fixture(scope="module")
def run_folder(tiny_overrides, tmp_path_factory):  # noqa: F811
    return train(tmp_path_factory.mktemp("run"), *tiny_overrides, *STEPS)


@pytest.fixture(scope="module")
def opened(run_folder):
    """The run's engine, started once."""
    inputs = prepare_chat(answering_config(run_folder, []))
    policy = ChatPolicy(inputs)
    yield run_folder, inputs, policy
    policy.close()


class Dialogue:
    """A session whose prompts and seeds are noted."""

    def __init__(self, opened, *, compared: bool = False) -> None:
        self.folder, self.inputs, policy = opened
        config = self.inputs.config
        names = [POLICY, COMPARED] if compared else [POLICY]
        sides = {
            name: find_step(self.folder, step, config, may_be_base=True)
            for name, step in zip(names, ["last", "base"], strict=False)
        }
        self.out, self.prompts, self.seeds = io.StringIO(), [], []
        self.conversation = Conversation(config.data, self.inputs.tokenizer)
        self.session = Session(
            self.folder, config, _Watched(policy, self), None, self.conversation,
            answer_sampling(self.inputs, is_greedy=False), Console(file=self.out, width=200), sides=sides, seed=5,
        )  # fmt: skip

    def say(self, *lines: str) -> list:
        """Its answers; `status` is what the session ended with."""
        before = len(self.out.getvalue())
        self.status = self.session.run(iter(lines))
        self.said = self.out.getvalue()[before:]
        return answers(self.said)


class _Watched:
    def __init__(self, policy: ChatPolicy, dialogue: Dialogue) -> None:
        self._policy, self._dialogue = policy, dialogue

    def __getattr__(self, name: str):
        return getattr(self._policy, name)

    def answer(self, prompt, sampling, seed):
        self._dialogue.prompts.append(self._dialogue.inputs.tokenizer.decode(prompt))
        self._dialogue.seeds.append(seed)
        return self._policy.answer(prompt, sampling, seed)


@pytest.fixture
def dialogue(opened) -> Dialogue:
    return Dialogue(opened)


def test_the_conversation_grows_and_new_starts_again(dialogue):
    dialogue.say("one", "two", "/new", "three", "//four", "  ")
    first, third = (dialogue.conversation.turns[0].answers[POLICY], dialogue.prompts[2])

    assert dialogue.prompts[0] == "<user>one\n<assistant>"
    assert dialogue.prompts[1].startswith("<user>one\n<assistant>") and dialogue.prompts[1].endswith(
        "\n<user>two\n<assistant>"
    )
    assert third == "<user>three\n<assistant>"
    assert dialogue.prompts[3] == f"<user>three\n<assistant>{first}\n<user>/four\n<assistant>"
    assert dialogue.seeds == [5, 5, 5, 5] and dialogue.status == 0


def test_retry_draws_again_with_the_next_seed_in_place_of_the_last_answer(dialogue):
    one, two, again = dialogue.say("one", "two", "/retry")

    assert dialogue.seeds == [5, 5, 6] and dialogue.prompts[1] == dialogue.prompts[2]
    assert two.text != again.text and again.facts["seed"] == "6"
    assert len(dialogue.conversation.turns) == 2
    dialogue.say("/retry", "/quit", "unread")
    assert dialogue.seeds == [5, 5, 6, 7] and dialogue.prompts[3] == dialogue.prompts[1]


def test_the_last_seed_is_followed_by_the_first(opened):
    dialogue = Dialogue(opened)
    dialogue.session._seed = NUM_SEEDS - 1
    dialogue.say("one", "/retry")

    assert dialogue.seeds == [NUM_SEEDS - 1, 0]


def test_a_system_prompt_is_set_and_taken_away(dialogue):
    dialogue.say("/system be brief", "one", "/new", "two", "/system", "/new", "three")

    assert dialogue.prompts == [
        "<system>be brief\n<user>one\n<assistant>",
        "<system>be brief\n<user>two\n<assistant>",
        "<user>three\n<assistant>",
    ]


def test_each_side_is_shown_its_own_earlier_answers(opened):
    dialogue = Dialogue(opened, compared=True)
    dialogue.say("one", "two")
    answered = dialogue.conversation.turns[0].answers

    assert answered[POLICY] != answered[COMPARED]
    for prompt, side in zip(dialogue.prompts[2:], (POLICY, COMPARED), strict=True):
        assert prompt == "<user>one\n<assistant>\n<user>two\n<assistant>".replace(
            "<assistant>\n", f"<assistant>{answered[side]}\n"
        )


def test_the_run_s_prompt_stands_before_the_first_turn_alone(opened):
    data = DataConfig(
        system_prompt="S", prompt_template="Q: {prompt}", examples=[ExampleConfig(prompt="e", answer="f")]
    )
    conversation = Conversation(data, opened[1].tokenizer)
    conversation.turns.append(Turn(question=Question(text="one"), answers={"a": "A1", "b": "B1"}))
    prompt = conversation.prompt(Question(text="two"), "b")

    example = "<system>S\n<user>Q: e\n<assistant>f\n"
    assert prompt.text == f"{example}<user>Q: one\n<assistant>B1\n<user>Q: two\n<assistant>"
    assert "Undefined" not in prompt.text and prompt.columns == {}


def test_a_prompt_that_does_not_fit_is_refused_and_the_conversation_stays(dialogue):
    context, answer = 256, 12
    fitting = "x" * (context - answer - len("<user>\n<assistant>"))  # a token is a character
    dialogue.say(fitting + "x", fitting, "y")

    assert len(dialogue.conversation.turns) == 1 and dialogue.prompts == [f"<user>{fitting}\n<assistant>"]
    assert dialogue.said.count("error: ") == 2
    assert "error: the prompt is 245 tokens long, expected at most 244: the context of 256 less" in dialogue.said
    assert "error: the prompt with the conversation so far is " in dialogue.said


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/foo", "there is no /foo, expected one of: /new, /retry"),
        ("/retyr", "did you mean /retry?"),
        ("/new now", "/new is followed by now, expected nothing"),
        ("/retry", "/retry: nothing was answered yet"),
        ("/step", "/step is nothing, expected one of: 2, 4, last, best, base"),
        ("/step x", "/step is x, expected one of: 2, 4, last, best, base"),
        ("/step 3", "/step is 3, of which no checkpoint was kept in"),
        ("/step best", "/step is best, but checkpoint.keep_best is null"),
        ("/problem", "/problem is followed by nothing, expected 1 to 8"),
        ("/problem 9", "/problem is followed by 9, expected 1 to 8"),
        ("/problem -1", "/problem is followed by -1, expected 1 to 8"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_the_dialogue_goes_on(dialogue, line, sentence):
    (answer,) = dialogue.say(line, "one")

    assert dialogue.said.startswith("error: ") and dialogue.said.count("error: ") == 1 and sentence in dialogue.said
    assert answer.facts["weights"].startswith("step 4, ")


def test_what_a_policy_is_compared_with_stays_another(opened):
    dialogue = Dialogue(opened, compared=True)
    dialogue.say("/step base")

    assert "error: /step is base, but base is what it is compared with" in dialogue.said


@pytest.fixture
def interruptible():
    """SIGINT as a terminal's program has it; what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_an_answer_and_twice_in_a_row_ends(dialogue, monkeypatch):
    """The signal arrives in the middle of a generation; what comes after is as if it had not been asked."""
    tokens = iter(range(1, 10**6))
    (expected,) = Dialogue((dialogue.folder, dialogue.inputs, dialogue.session._policy._policy)).say("one")
    with monkeypatch.context() as patch:
        patch.setattr(hf_engine.progress, "mark", lambda: next(tokens) == 4 and signal.raise_signal(signal.SIGINT))
        found = dialogue.say("stop me", "one")
    assert [a.text.split("\n")[-1] for a in found] == expected.text.split("\n")[-1:] and dialogue.status == 0
    assert dialogue.said.count("stopped; the conversation is as before") == 1
    assert [turn.question.text for turn in dialogue.conversation.turns] == ["one"]

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_engine.progress, "mark", interrupt)
    assert dialogue.say("stop me", "and me", "unread") == [] and dialogue.status == INTERRUPTED
    assert dialogue.seeds == [5] * 4


def test_weights_that_the_engine_does_not_hold_never_answer(opened, monkeypatch):
    dialogue = Dialogue(opened)
    policy = opened[2]
    slots = policy.engine._decoder.slots
    load = type(slots).load

    def load_another(self, adapter):
        load(self, replace(adapter, lora_b={name: 2 * b for name, b in adapter.lora_b.items()}))

    (before,) = dialogue.say("/step base", "one", "/new")
    monkeypatch.setattr(type(slots), "load", load_another)
    assert dialogue.say("/step 2", "/step last") == [] and dialogue.said.count("error: ") == 2
    assert "error: the engine does not hold the weights of step 2: the engine holds other values in" in dialogue.said
    monkeypatch.undo()
    still_base, answer = dialogue.say("one", "/step 2", "one")
    assert still_base.text == before.text.split("\n")[-1] and still_base.facts["weights"] == "base"
    assert answer.facts["weights"].startswith("step 2, ")


def test_sixteen_bits_change_between_a_step_and_the_base(run_folder):
    inputs = prepare_chat(answering_config(run_folder, ["model.dtype=bfloat16"]))
    policy, names = ChatPolicy(inputs), ("last", "base", "last")
    fingerprints = []
    for name in names:
        policy.use(find_step(run_folder, name, inputs.config, may_be_base=True))
        held = policy.engine.held_adapter()
        assert any(bool(b.any()) for b in held.lora_b.values()) == (name == "last")
        fingerprints.append(policy.fingerprint)
    policy.close()

    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


def test_a_checkpoint_with_other_weights_than_the_run_recorded_is_refused(run_folder, tmp_path):
    """Its files and manifest agree: only the fingerprint tells."""
    copy = shutil.copytree(run_folder, tmp_path / "run")
    folder = copy / "checkpoints" / "step-000004"
    other = run_folder / "checkpoints" / "step-000002" / "adapter" / "adapter_model.safetensors"
    shutil.copyfile(other, folder / "adapter" / "adapter_model.safetensors")
    (folder / "manifest.json").unlink()
    checkpoints._write_manifest(folder)

    with pytest.raises(ValueError, match=r"have fingerprint \w{20}, but the run recorded \w{20} for step 4"):
        chat([str(copy)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "chat needs the folder of a run"),
        (["seed=3"], "chat needs the folder of a run"),
        (["{run}", "--stepp", "2"], "chat has no option --stepp"),
        (["{run}", "--seed", "x"], "argument --seed"),
        (["{run}", "--seed", "-1"], "--seed is -1, expected a number from 0 to"),
        (["{run}", "--step", "3"], "--step is 3, of which no checkpoint was kept in"),
        (["{run}", "--step", "base", "--compare", "base"], "--step and --compare are both base"),
        (["{run}", "--compare", "4"], "--step and --compare are both step 4"),
        (["{run}", "--compare", "x"], "--compare is x, expected one of: 2, 4, last, best, base"),
        (["{run}/none"], "none; expected the folder of a run"),
        (["{run}", "sampling.temperature=-1"], "sampling.temperature is -1"),
        (["{run}", "sampling.max_tokens=256"], "sampling.max_tokens is 256, but the model's context is 256 tokens"),
        (["{run}", "hardware.profile=gpu"], "hardware.profile is gpu"),
        (["{run}", "lora.rank=8"], "lora.rank=8 says how weights were trained"),
        (["{run}", "training.parameters=full"], "training.parameters=full says how weights were trained"),
        (["{run}", "model.path=/nowhere"], "model.path is /nowhere"),
    ],
)
def test_a_wrong_call_is_one_sentence(run_folder, arguments, sentence):
    with pytest.raises(ValueError) as caught:
        chat([argument.format(run=run_folder) for argument in arguments])

    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_ends_the_command_with_status_2(run_folder):
    check(talk(run_folder, "samplin.top_p=0.5", said=["unread"]), "samplin")
    check(talk(run_folder, "--step", "9", said=["unread"]), "--step is 9, of which no checkpoint was kept")


def test_runs_that_train_no_policy_are_refused(run_folder, tmp_path):
    stage = tmp_path / "chain" / "1_rl"
    shutil.copytree(run_folder, stage, ignore=shutil.ignore_patterns("checkpoints", "rollouts"))
    (tmp_path / "chain" / "chain.json").write_text("{}")
    with pytest.raises(ValueError, match="is a chain of runs; expected the folder of one of its stages: .*chain/1_rl$"):
        chat([str(tmp_path / "chain")])
    saved = _yaml(stage)
    for section in ("rewards", "algorithm", "sampling", "engine", "checks"):
        del saved[section]
    (stage / "config.yaml").write_text(json.dumps(saved | {"stage": "reward_model"}))
    with pytest.raises(ValueError, match="1_rl is a run of stage=reward_model, which answers nothing"):
        chat([str(stage)])


def test_a_temperature_of_zero_is_greedy_and_no_override(opened):
    options = parse_arguments(["run", "sampling.temperature=0.0", "sampling.top_p=0.9"])

    assert options.is_greedy and options.overrides == ["sampling.top_p=0.9"]
    assert not parse_arguments(["run", "sampling.temperature=0.5"]).is_greedy
    assert answer_sampling(opened[1], is_greedy=True).temperature == 0
    assert answer_sampling(opened[1], is_greedy=False).temperature == 1


def test_rewards_that_need_a_row_are_those_that_read_one(opened):
    config = answering_config(opened[0], [])
    own = "rlbench_rewards"
    paths = {
        "right": f"{own}.math_answer.MathAnswer",
        "form": f"{own}.answer_format.AnswerFormat",
        "trl": "tests.commands.trl_rewards.needs_answer",
        "short": "tests.commands.trl_rewards.short",
    }
    template = config.rewards.components["share"]
    config.rewards.components = {name: replace(template, path=path) for name, path in paths.items()}
    config.rewards.allowed_prefixes = ["tests.commands.trl_rewards"]

    assert set(ChatRewards(config, lambda: None)._without_row) == {"form", "short"}


def test_without_its_rewards_a_run_still_answers(run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    saved = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(saved.replace("letter_reward.share_of_a", "letter_reward.gone"))
    done = talk(copy, said=["one"])

    assert done.returncode == 0, done.stderr
    assert "no rewards are shown: rewards.components.share.path is" in done.stdout
    assert [answer.rewards for answer in answers(done.stdout)] == [""]


def test_the_config_of_a_run_on_given_completions_answers_with_what_is_asked_for(run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "rollouts"))
    saved = json.loads(json.dumps(_yaml(copy)))
    saved |= {"stage": "sft", "rewards": {}, "algorithm": {}, "sampling": {}, "engine": {}, "checks": {}}
    saved["sft"]["rows_per_step"], saved["lora"]["dropout"] = 7, 0.1
    (copy / "config.yaml").write_text(json.dumps(saved))
    config = answering_config(copy, ["sampling.top_p=0.5"])

    assert (config.stage, config.sampling.top_p, config.lora.dropout) == ("rl", 0.5, 0.0)
    assert config.sft.rows_per_step is None


def _yaml(folder):
    import yaml

    return yaml.safe_load((folder / "config.yaml").read_text())
