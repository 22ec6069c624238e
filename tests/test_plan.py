"""Which process goes where, and what is said when it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.plan import Devices, Paths, Plan, ProcessRole, implied_settings, plan
from protocol.accelerators import Card
from protocol.config import Config
from protocol.errors import PreflightError

PATHS = Paths(Path("/repository"), Path("/runs/one"), "python", 29500)
TWO_CORES = Devices("cpu", 2)


def gpus(count: int) -> Devices:
    return Devices("cuda", 16, tuple(Card(str(i), "card") for i in range(count)))


def config(generators: int, ranks: int, **sections: Any) -> Config:
    return Config.model_validate({"generators": {"count": generators}, "learner": {"ranks": ranks}, **sections})


def planned(generators: int, ranks: int, devices: Devices, **sections: Any) -> Plan:
    return plan(config(generators, ranks, **sections), devices, PATHS)


def refusal(generators: int, ranks: int, devices: Devices, **sections: Any) -> str:
    with pytest.raises(PreflightError) as caught:
        planned(generators, ranks, devices, **sections)
    return str(caught.value)


def test_each_generator_has_cards_of_its_own_and_the_ranks_share_a_view_of_theirs() -> None:
    made = planned(2, 3, gpus(7), vllm={"tensor_parallel_size": 2})
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in made.of(ProcessRole.LEARNER)] == ["0,1,2"] * 3
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in made.of(ProcessRole.GENERATOR)] == ["3,4", "5,6"]
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in made.of(ProcessRole.BROKER)] == [""]
    assert [p.device for p in made.processes] == ["cpu", "cuda 0", "cuda 1", "cuda 2", "cuda 3,4", "cuda 5,6"]


def test_learner_ranks_get_what_torchrun_would_give_them() -> None:
    first, second = planned(1, 2, TWO_CORES).of(ProcessRole.LEARNER)
    assert (first.env["RANK"], first.env["LOCAL_RANK"], first.env["WORLD_SIZE"]) == ("0", "0", "2")
    assert (second.env["RANK"], second.env["LOCAL_RANK"]) == ("1", "1")
    assert (second.env["MASTER_ADDR"], second.env["MASTER_PORT"]) == ("127.0.0.1", "29500")


def test_the_processes_of_a_run_have_names_and_the_run_folder() -> None:
    made = planned(2, 1, TWO_CORES)
    assert [p.name for p in made.processes] == ["broker", "learner-0", "generator-0", "generator-1"]
    assert all(p.argv[-2:] == ("--run-dir", "/runs/one") or "--run-dir" in p.argv for p in made.processes)
    assert made.processes[-1].argv[-2:] == ("--name", "generator-1")
    assert all(Path(p.argv[2]).parts[:2] == ("/", "repository") for p in made.processes)


def test_resume_is_the_learners_affair() -> None:
    made = plan(config(1, 2), TWO_CORES, PATHS, resume=True)
    assert [p.name for p in made.processes if "--resume" in p.argv] == ["learner-0", "learner-1"]


@pytest.mark.parametrize(("cores", "threads"), [(2, "1"), (16, "5"), (1, "1")])
def test_on_a_cpu_the_cores_are_shared_out(cores: int, threads: str) -> None:
    made = planned(2, 1, Devices("cpu", cores))
    assert {p.env["OMP_NUM_THREADS"] for p in made.processes} == {threads}
    assert all(p.env["CUDA_VISIBLE_DEVICES"] == "" for p in made.processes)


def test_too_few_cards_name_what_would_fit_in_the_wanted_proportion() -> None:
    said = refusal(2, 6, gpus(4))
    assert said.startswith("this run needs 8 cuda cards (2 generators x 1 + 6 learner ranks), 4 are visible")
    assert "fits here: --generators 1 --learner-gpus 3" in said
    assert "one card: --generators 1 --learner-gpus 1 --share-gpu" in said


@pytest.mark.parametrize(
    ("generators", "ranks", "cards", "parallel"), [(2, 6, 4, 1), (7, 1, 4, 1), (1, 9, 2, 1), (3, 3, 5, 2), (1, 4, 3, 2)]
)
def test_what_is_said_to_fit_does_fit(generators: int, ranks: int, cards: int, parallel: int) -> None:
    vllm = {"tensor_parallel_size": parallel}
    words = refusal(generators, ranks, gpus(cards), vllm=vllm).partition("fits here: ")[2].partition(";")[0].split()
    made = planned(int(words[1]), int(words[3]), gpus(cards), vllm=vllm)
    assert len(made.of(ProcessRole.LEARNER)) + parallel * len(made.of(ProcessRole.GENERATOR)) <= cards


def test_a_single_card_is_shared_or_the_error_says_how() -> None:
    assert "fits here, on one card: --generators 1 --learner-gpus 1 --share-gpu" in refusal(1, 1, gpus(1))
    made = planned(1, 1, gpus(1), run={"share_gpu": True})
    assert {p.env["CUDA_VISIBLE_DEVICES"] for p in made.processes if p.name != "broker"} == {"0"}


def test_two_ranks_do_not_share_a_card() -> None:
    assert "got 2 learner ranks" in refusal(1, 2, gpus(4), run={"share_gpu": True})


def test_without_a_card_the_processor_is_offered() -> None:
    assert refusal(1, 1, Devices("cuda", 4)).endswith("--device cpu")


def test_who_shares_a_card_gets_a_share_of_its_memory_unless_told_otherwise() -> None:
    shared = config(2, 1, run={"share_gpu": True})
    values = {value.key: value.value for value in implied_settings(shared, gpus(1))}
    assert values == {"run.device": "cuda", "vllm.gpu_memory_utilization": 0.225}
    told = config(1, 1, run={"share_gpu": True, "device": "cuda"}, vllm={"gpu_memory_utilization": 0.3})
    assert implied_settings(told, gpus(1)) == []


def test_the_arithmetic_of_a_step_is_spelled_out() -> None:
    notes = dict(planned(2, 1, TWO_CORES, run={"steps": 7}).notes)
    assert notes["one step"].startswith("64 prompts x 8 completions = 512 completions, at most 262,144 sampled tokens")
    assert notes["steps"] == "7"
    assert notes["staleness"].endswith("2 versions old when it is trained; at most 192 groups are open at a time")
    assert notes["note"] == "3 processes compute on 2 cores: they take turns"


def test_a_shared_card_that_is_not_there_is_said() -> None:
    assert dict(planned(1, 1, TWO_CORES, run={"share_gpu": True}).memory)["memory"].endswith("runs on the processor")
    assert planned(1, 1, TWO_CORES).memory == ()


def test_on_rocm_a_process_gets_one_list_in_both_variables_that_count_alike() -> None:
    made = planned(1, 1, Devices("rocm", 16, (Card("0", "card"), Card("1", "card"))))
    [generator] = made.of(ProcessRole.GENERATOR)
    assert generator.env["HIP_VISIBLE_DEVICES"] == generator.env["CUDA_VISIBLE_DEVICES"] == "1"
    assert "ROCR_VISIBLE_DEVICES" not in generator.env  # it stays the user's: ours count what it leaves
    assert made.processes[1].env["DS_ACCELERATOR"] == "cuda"
    [broker] = made.of(ProcessRole.BROKER)
    assert broker.env["HIP_VISIBLE_DEVICES"] == broker.env["CUDA_VISIBLE_DEVICES"] == ""


def test_on_ascend_the_cards_are_in_its_own_variable() -> None:
    made = planned(1, 1, Devices("npu", 16, (Card("4", "910B"), Card("6", "910B"))))
    assert [p.env["ASCEND_RT_VISIBLE_DEVICES"] for p in made.processes] == ["", "4", "6"]
    assert made.processes[1].env["DS_ACCELERATOR"] == "npu"
    assert "CUDA_DEVICE_ORDER" not in made.processes[1].env


def test_cards_are_numbered_as_nvidia_smi_does() -> None:
    assert planned(1, 1, gpus(2)).processes[1].env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_an_evaluation_needs_no_card_for_the_learner_and_no_adapters() -> None:
    only: dict[str, Any] = {"run": {"evaluation_only": True}, "lora": {"rank": 8}}
    made = planned(2, 4, gpus(2), **only)
    implied = {value.key: value.value for value in implied_settings(config(2, 4, **only), gpus(2))}
    assert (implied["learner.ranks"], implied["lora.rank"]) == (1, 0)
    assert [process.device for process in made.of(ProcessRole.GENERATOR)] == ["cuda 0", "cuda 1"]
    assert {process.device for process in made.of(ProcessRole.LEARNER)} == {"cpu"}
    assert [topic for topic, _ in made.notes] == ["evaluation", "generation"]
    said = refusal(3, 4, gpus(2), **only)
    assert said.endswith("(3 generators x 1 + 0 learner ranks), 2 are visible; fits here: --generators 2")
