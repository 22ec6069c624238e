"""How a shared card is split: counts against real models, the learner's parts against DeepSpeed's own tensors."""

from __future__ import annotations

import gc
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError

from launch.cluster import main
from launch.flags import parse
from launch.memory import GIB, MemorySplit, RewardModelSize, learner_parts
from launch.model_shape import ModelShape
from launch.plan import SHARED, Devices, Paths, implied_settings, plan
from launch.preflight import model_shape, reward_model_size, sizes
from launch.run_folder import RunFolder
from launch.start import DEFAULT_RECIPE, RECIPES, find_recipe
from launch.supervisor import Verdict
from learner.batches import empty_micro_batch
from learner.policy import Policy
from learner.ranks import Ranks
from protocol.accelerators import Card
from protocol.addresses import Addresses
from protocol.config import Config
from protocol.errors import ConfigError, Exit, PreflightError
from protocol.settings import build, read_recipe
from tests.models import make_tiny_qwen2
from tests.reward_models import make_reward_model
from tests.vendor_tools import add_nvidia, claim_cuda_torch, path_with

QWEN_HALF_B = ModelShape("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True, False, False)
QWEN_7B = ModelShape("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False, False, False)
CARD = Devices("cuda", 16, (Card("0", "card", 80 * GIB),))


def config(*, vllm: dict[str, Any] | None = None, count: int = 1, **sections: Any) -> Config:
    """Of a run on a shared card, with what follows from that for QWEN_HALF_B."""
    given = {"run": {"share_gpu": True}, "generators": {"count": count}, "vllm": vllm or {}, **sections}
    return Config.model_validate(given)


def one_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A machine with cards, as far as can be seen, and the flags of a run on one of them."""
    add_nvidia(folder / "bin")
    claim_cuda_torch(folder / "packages")
    monkeypatch.setenv("PATH", path_with(folder / "bin"))
    monkeypatch.syspath_prepend(folder / "packages")
    make_tiny_qwen2(folder / "model", tied=True)
    return ("--model", str(folder / "model"), "--dataset", str(folder / "rows.jsonl"), "--share-gpu")


def completed(given: Config, shape: ModelShape | None, devices: Devices = CARD) -> Config:
    settings = build([*implied_settings(given, devices, shape)])
    return given.model_copy(update={"vllm": {**settings.config.vllm, **given.vllm}})


def split(given: Config, shape: ModelShape | None = QWEN_HALF_B, devices: Devices = CARD) -> MemorySplit:
    return MemorySplit.of(completed(given, shape, devices), shape, devices.cards[0].memory_bytes)


def refusal(given: Config, shape: ModelShape = QWEN_HALF_B, devices: Devices = CARD) -> str:
    with pytest.raises(PreflightError) as caught:
        plan(completed(given, shape, devices), devices, Paths(Path("/r"), Path("/runs/a"), "python", 1), shape=shape)
    return str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 24, "attention_bias": True}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"head_dim": 8}),
        ("Mistral", {}),
    ],
)
def test_parameters_are_counted_as_the_real_model_has_them(
    family: str, more: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    real = getattr(transformers, f"{family}Config")(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=None,
        **more,
    )
    real.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(real)
    shape = model_shape(str(tmp_path))
    assert shape is not None
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_known_model_has_its_known_size() -> None:
    assert (QWEN_HALF_B.num_parameters, QWEN_7B.num_parameters) == (494_032_768, 7_615_616_512)  # as on their pages


def test_a_model_that_is_not_understood_has_no_size(tmp_path: Path) -> None:
    for text in ("", "[]", '{"model_type": "mamba"}', '{"model_type": "llama", "hidden_size": "x"}'):
        (tmp_path / "config.json").write_text(text)
        assert model_shape(str(tmp_path)) is None
    assert model_shape(str(tmp_path / "nowhere" / "at" / "all")) is None


@pytest.mark.parametrize(
    ("dtype", "zero", "rank"),
    [("float32", 0, 0), ("float32", 1, 0), ("bfloat16", 0, 0), ("bfloat16", 2, 0), ("bfloat16", 0, 8)],
)
def test_the_learners_parts_are_what_deepspeed_holds(
    dtype: str, zero: int, rank: int, tmp_path: Path, ranks: Ranks
) -> None:
    make_tiny_qwen2(tmp_path, tied=True, vocab=2000).to(torch.float32).save_pretrained(tmp_path)
    given = Config.model_validate(
        {"model": {"path": str(tmp_path), "dtype": dtype}, "learner": {"zero": zero}, "lora": {"rank": rank}}
    )
    shape = model_shape(str(tmp_path))
    assert shape is not None
    before = tensor_bytes()
    policy = Policy.open(given, str(tmp_path), ranks)
    one = torch.zeros(1, dtype=torch.int64)
    batch = replace(empty_micro_batch(), positions=one, targets=one)
    policy._engine.backward(policy._token_outputs(batch).sum())
    policy._engine.step(1e-4)  # makes room for the moments
    policy._engine.backward(policy._token_outputs(batch).sum())  # beside them now: gradients
    held = sum(size for place, size in tensor_bytes().items() if place not in before)
    policy._engine.close()
    wanted = sum(part.size for part in learner_parts(given, shape) if part.is_exact)
    largest = (
        4 * shape.vocabulary * shape.hidden if dtype == "float32" and zero else 0
    )  # one gradient, in its bucket too
    assert wanted * 0.99 < held < wanted * 1.01 + largest


def tensor_bytes() -> dict[int, int]:
    """By address: the size of each storage that a tensor stands in, but for DeepSpeed's bucket of a fixed size."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes() < 100_000_000}


def test_the_generators_take_less_than_half_of_a_card_and_are_told_so_in_bytes() -> None:
    for count in (1, 3):
        values = {value.key: value for value in implied_settings(config(count=count), CARD, QWEN_HALF_B)}
        share = values["vllm.gpu_memory_utilization"].value
        assert share * count == pytest.approx(0.45, abs=0.001)
        parts = split(config(count=count)).generator
        assert parts is not None
        assert values["vllm.kv_cache_memory_bytes"].value == parts.cache_bytes > 0
        assert parts.budget_bytes == pytest.approx(share * 80 * GIB, abs=2)
        assert parts.weights_bytes == 2 * QWEN_HALF_B.num_parameters
        assert {value.origin for key, value in values.items() if key.startswith("vllm.")} == {SHARED}


def test_what_the_user_said_about_vllm_holds() -> None:
    told = config(vllm={"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": GIB})
    assert {value.key for value in implied_settings(told, CARD, QWEN_HALF_B)} == {"run.device"}
    parts = split(told).generator
    assert parts is not None
    assert parts.cache_bytes == GIB
    assert split(told).cache_tokens == GIB // (2 * 2 * 24 * 2 * 64)


def test_only_vllm_is_told_about_memory() -> None:
    assert {v.key for v in implied_settings(config(generators={"engine": "fake"}), CARD, QWEN_HALF_B)} == {"run.device"}


def test_each_algorithm_has_the_models_that_it_needs() -> None:
    def parts(**sections: Any) -> dict[str, int]:
        return {part.what: part.size for part in learner_parts(config(**sections), QWEN_HALF_B)}

    number = QWEN_HALF_B.num_parameters
    assert parts()["moments"] == 8 * number
    assert "reference" not in parts()
    assert parts(kl={"coef": 0.1})["reference"] == 2 * number
    assert parts(algorithm={"advantage": "gae"})["critic"] == 20 * (number + 896 + 1)
    adapters = parts(lora={"rank": 8}, kl={"coef": 0.1})
    assert adapters["weights"] < 2.1 * number
    assert "reference" not in adapters
    assert parts(lora={"rank": 8}, warmup={"steps": 1})["warm start"] == 20 * number
    assert parts(learner={"gradient_checkpointing": True})["activations"] < parts()["activations"] / 5


@pytest.mark.parametrize(
    ("given", "shape", "said"),
    [
        (
            config(),
            QWEN_7B,
            "optimizer of the learner take 141.9 GiB and the generators' weights 14.2 GiB; set lora.rank 16",
        ),
        (config(lora={"rank": 16}, count=6), QWEN_7B, "generators' weights 85.1 GiB; take a smaller model, or leave"),
        (
            config(lora={"rank": 16}, count=3),
            QWEN_7B,
            "weights, 14.2 GiB, to fit into its share of the card, 12.0 GiB of 80.0 GiB",
        ),
        (config(vllm={"gpu_memory_utilization": 0.95}), QWEN_HALF_B, "set vllm.gpu_memory_utilization to 0.88 or"),
    ],
)
def test_what_surely_does_not_fit_is_refused_with_what_to_set(given: Config, shape: ModelShape, said: str) -> None:
    assert said in refusal(given, shape)


def test_the_page_of_devices_shows_the_table_of_its_command() -> None:
    page = (RECIPES.parents[1] / "docs" / "devices.md").read_text(encoding="utf-8")
    command = re.search(r"python launch/cluster\.py (--generators 1 .*) --dry-run", page)
    assert command
    given = build(read_recipe(find_recipe(DEFAULT_RECIPE)).values, parse(command[1].split()).values).config
    notes = [word for note in split(given).notes() for word in " ".join(note).split()]
    assert " ".join(notes) in " ".join(page.split())


def test_what_is_said_to_fit_does() -> None:
    split(config(lora={"rank": 16}), QWEN_7B).check()
    split(config(vllm={"gpu_memory_utilization": 0.88})).check()
    split(config(), None).check()
    split(config(), QWEN_7B, Devices("cuda", 16, (Card("MIG-5f", "MIG slice"),))).check()


def test_the_split_is_spelled_out_and_adds_up() -> None:
    notes = dict(split(config()).notes())
    assert notes["memory"] == "one card, 80.0 GiB; ~: a rule of thumb"
    assert "weights 0.92, master copy 1.84, moments 3.68, gradients 2.76, activations ~" in notes["  learner"]
    assert notes["  generator"].startswith(
        "36.0 GiB, 0.45 of the card for each of 1 (vllm.gpu_memory_utilization): weights"
    )
    assert notes["  left"].startswith("~")
    tight = dict(split(config(learner={"micro_batch_tokens": 1 << 20})).notes())
    assert tight["  left"].endswith("set learner.micro_batch_tokens lower")
    assert "model's size is not known here" in dict(split(config(), None).notes())["memory"]


def test_a_start_fetches_the_shape_of_a_model_that_is_not_here_yet_and_a_dry_run_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the first run of a model would leave vLLM to measure the card, and the second not."""
    make_tiny_qwen2(tmp_path, tied=True)
    fetched = {("some/model", "config.json"): str(tmp_path / "config.json")}

    def fetch(model: str, file: str) -> str:
        if (model, file) not in fetched:
            raise LocalEntryNotFoundError(f"{model} is nowhere")
        return fetched[model, file]

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    wanted = config(model={"path": "some/model"})
    assert sizes(wanted, fetch=False) == (None, None)
    assert sizes(wanted, fetch=True) == (model_shape(str(tmp_path)), None)
    assert sizes(config(model={"path": "other/model"}), fetch=True) == (None, None)
    assert sizes(config(model={"path": "not a/name"}), fetch=True) == (None, None)


@pytest.mark.parametrize("encoder", [False, True])
def test_a_reward_model_is_as_large_as_its_files_say(encoder: bool, tmp_path: Path) -> None:
    """Of a family whose shape is known, and of one that is not."""
    folder = make_reward_model(tmp_path, encoder=encoder)
    size = reward_model_size(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert size.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (size.shape is None) == encoder
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(ConfigError, match=r"cannot read its header: .*; fetch it again, or set rewards\.model\.path"):
        reward_model_size(folder)


def test_each_generators_reward_model_takes_its_part_of_the_card() -> None:
    size = RewardModelSize(GIB, QWEN_HALF_B)

    def made(count: int = 1, **settings: Any) -> MemorySplit:
        given = completed(config(count=count, rewards={"model": {"path": "m", **settings}}), QWEN_HALF_B)
        return MemorySplit.of(given, QWEN_HALF_B, 80 * GIB, size)

    notes = dict(made(count=2).notes())
    assert notes["  scoring"].startswith("4.8 GiB, a reward model for each of 2 generators: weights 2.00, compute ~")
    assert "reward model" not in " ".join(dict(made(device="cpu").notes()).values())
    without, left = dict(split(config()).notes())["  left"], dict(made().notes())["  left"]
    assert float(left.split()[0][1:]) < float(without.split()[0][1:]) - 2.0
    made(dtype="float32").check()
    size = RewardModelSize(9 * GIB, None)
    with pytest.raises(PreflightError, match=r"set vllm\.gpu_memory_utilization to 0\.\d\d or less, or set rewards"):
        made(dtype="float32").check()
    size = RewardModelSize(40 * GIB, None)
    with pytest.raises(PreflightError, match=r"the reward model's 80\.0 GiB; set rewards\.model\.device cpu, set lora"):
        made().check()


def test_the_shares_are_worked_out_anew_when_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One generator becomes three, and the cache that was worked out for one is not kept."""
    flags = one_card(tmp_path, monkeypatch)
    first = build([*parse(flags).values, *implied_settings(config(), CARD, QWEN_HALF_B)])
    run = RunFolder.create(tmp_path / "runs" / "a")
    run.write(first, ["python"], Addresses("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5556"))
    assert first.config.vllm["gpu_memory_utilization"] == 0.45
    again = ("--resume", str(run.path), "--generators", "3", "--dry-run", "--json")
    assert main(again) == Exit.DONE
    vllm = json.loads(capsys.readouterr().out)["settings"]["vllm"]
    assert vllm["gpu_memory_utilization"] == 0.15
    assert vllm["kv_cache_memory_bytes"] < 0.15 * 143771 * (1 << 20)


def test_a_dry_run_with_share_gpu_shows_who_takes_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: a tool that shows cards, a model's config.json, the settings that follow, the table."""
    flags = (*one_card(tmp_path, monkeypatch), "--dry-run")
    assert main(flags) == Exit.DONE
    said = capsys.readouterr().out
    assert "memory      one card, 140.4 GiB" in said
    assert "vllm.gpu_memory_utilization = 0.45  (because of --share-gpu)" in said
    assert "vllm.kv_cache_memory_bytes = " in said
    scored = ("--reward-model", str(make_reward_model(tmp_path / "scores")))
    assert main((*flags, *scored, "--json")) == Exit.DONE
    fields = json.loads(capsys.readouterr().out)
    assert set(fields["memory"]) == {"memory", "learner", "generator", "scoring", "left"}
    assert {p["env"]["CUDA_VISIBLE_DEVICES"] for p in fields["processes"] if p["name"] != "broker"} == {"0"}


def test_the_split_is_printed_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's folder is there already; what would start its processes is not reached."""
    flags = one_card(tmp_path, monkeypatch)

    async def refuse(*_: object) -> Verdict:
        assert "memory      one card" in capsys.readouterr().out
        return Verdict(Exit.INTERRUPTED, "nothing was started")

    monkeypatch.setattr("launch.cluster._supervise", refuse)
    assert main((*flags, "--out", str(tmp_path / "runs"))) == Exit.INTERRUPTED
