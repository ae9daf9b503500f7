"""What the launcher was asked for is what runs, or the run stops and says what to type.

The processes are real and so are Accelerate's ways to start them; only the training is left out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import environment as environment_of_gpus
from accelerate.utils import launch as accelerate_environment

from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.cli.configs import write_files
from accel_gpt2.cli.launcher import shipped_file
from accel_gpt2.errors import UserError
from accel_gpt2.render.accelerate import config_files
from accel_gpt2.train.startup import avoid_broken_links, launched_strategy


@pytest.fixture(scope="module")
def launch_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that `accelerate launch` reads."""
    directory = tmp_path_factory.mktemp("configs")
    write_files(directory, config_files(str(directory)))
    return directory


def launched(*words: str) -> dict[str, str]:
    """The variables that `accelerate launch` gives to the processes that it starts."""
    parser = accelerate_launch.launch_command_parser()
    parsed = parser.parse_args([*words, "train.py"])
    parsed, defaults, _ = accelerate_launch._validate_launch_command(parsed)
    if parsed.use_deepspeed:
        fields = [] if defaults is None else list(defaults.deepspeed_config)
        parsed.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = accelerate_environment.prepare_deepspeed_cmd_env(parsed)
    elif parsed.use_fsdp or parsed.multi_gpu or parsed.use_megatron_lm:
        environment = accelerate_environment.prepare_multi_gpu_env(parsed)
    else:
        _, environment = accelerate_environment.prepare_simple_launcher_cmd_env(parsed)
        return environment
    return environment | {"WORLD_SIZE": str(parsed.num_processes)}  # torchrun's


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_file_is_read_back_as_its_strategy(launch_files: Path, name: str) -> None:
    """From nothing but the variables that Accelerate itself makes of a file."""
    file = launch_files / "accelerate_configs" / f"{name}.yaml"
    assert launched_strategy(launched("--config_file", str(file))) is STRATEGIES[name]


def test_cpu_processes_are_data_parallel(launch_files: Path) -> None:
    """cpu.yaml starts several processes, which a YAML of MULTI_CPU would not."""
    environment = launched("--config_file", str(launch_files / "accelerate_configs" / "cpu.yaml"))
    assert environment["WORLD_SIZE"] == "2"
    assert launched_strategy(environment) is STRATEGIES["ddp"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--use_deepspeed", "--zero_stage=3"], "DeepSpeed without a deepspeed_config_file"),
        (["--use_fsdp"], "asks for FSDP with fsdp_version = 1, and this trains with 2: launch"),
        (
            ["--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"],
            "cpu_ram_efficient_loading = true, and this trains with False",
        ),
        (
            ["--use_deepspeed", "--deepspeed_config_file=none.json"],
            r"none\.json cannot be read .*: write it by `accel-gpt2 configs copy \.`",
        ),
        (["--use_megatron_lm"], "asks for Megatron-LM, which is not supported"),
    ],
)
def test_what_is_no_strategy_of_ours_is_refused(words: list[str], sentence: str) -> None:
    """What another file asks for would train in another way than was planned."""
    with pytest.raises(UserError, match=sentence):
        launched_strategy(launched("--num_processes=2", "--num_machines=1", *words))


def test_a_changed_json_is_refused_with_what_was_changed(tmp_path: Path) -> None:
    """An engine of other buckets would need other memory than the plan's; every key is named."""
    write_files(tmp_path, config_files(str(tmp_path)))
    path = tmp_path / "ds_configs" / "zero2.json"
    config = json.loads(path.read_text("utf-8"))
    config["zero_optimization"]["reduce_bucket_size"] = 500_000_000
    config["zero_optimization"]["cpu_offload"] = True
    path.write_text(json.dumps(config), "utf-8")
    file = tmp_path / "accelerate_configs" / "zero2.yaml"
    with pytest.raises(
        UserError,
        match=r"zero2\.json is not the zero2 that is planned with: zero_optimization\.cpu_offload "
        r"is True, not absent; zero_optimization\.reduce_bucket_size is 500000000, not 10000000\.",
    ):
        launched_strategy(launched("--config_file", str(file)))


@pytest.mark.parametrize("name", ["fsdp2", "zero1", "zero2", "zero3"])
def test_one_process_has_nobody_to_share_with(launch_files: Path, name: str) -> None:
    """The strategies that shard among processes alone are refused where there is one."""
    file = launch_files / "accelerate_configs" / f"{name}.yaml"
    environment = launched("--config_file", str(file), "--num_processes=1")
    with pytest.raises(UserError, match=rf"asks for {name} and started one process.*single\.yaml"):
        launched_strategy(environment)


# Imports once, and then forks each case's processes, as a launcher would start them.
_CASES = """
import json, os, socket, sys, traceback
import torch
from accelerate import Accelerator, notebook_launcher
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.processes import build_accelerator, current_strategy
from accel_gpt2.train.startup import check_started

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def ours():
    return build_accelerator(TrainRecipe(model="gpt2-tiny", trackers=()))

def plain():
    accelerator = Accelerator()
    say("accelerate:", accelerator.num_processes, accelerator.distributed_type.value)
    check_started(accelerator, os.environ)
    return accelerator

def start(build):
    try:
        accelerator = build()
        say("ran:", accelerator.num_processes, current_strategy(accelerator).name)
    except UserError as error:
        say("refused:", error)
    except BaseException:
        traceback.print_exc()

def life(case, environment, port, output):
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(output, 1)
    os.dup2(output, 2)
    build = {"ours": ours, "plain": plain}[case["build"]]
    if case["notebook"]:
        notebook_launcher(start, (build,), num_processes=2, use_port=port)
    else:
        start(build)
    import torch
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # who leaves first would break what the other still connects
    os._exit(0)  # gloo's destructor sometimes does not return

for number, case in enumerate(json.load(sys.stdin)):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world_size = case["environment"].get("WORLD_SIZE")
    children = []
    for rank in range(int(world_size or 1)):
        environment = dict(case["environment"])
        if world_size:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank),
                            "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": world_size}
        output = os.open(f"{sys.argv[1]}/{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        children.append(os.fork() or life(case, environment, port, output))
    for child in children:
        os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def heard(launch_files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the processes of each case said of how they were started, sorted."""
    folder = tmp_path_factory.mktemp("cases")
    multi_cpu = folder / "multi_cpu.yaml"
    multi_cpu.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n", "utf-8")

    def file(name: str) -> list[str]:
        return ["--config_file", str(launch_files / "accelerate_configs" / f"{name}.yaml")]

    on_cpu = {"ACCELERATE_USE_CPU": "true"}
    cases = {
        "--cpu": (["--cpu", "--num_processes=2", "--num_machines=1"], {}, "ours"),
        "MULTI_CPU": (["--config_file", str(multi_cpu)], {}, "ours"),
        "GPUs that are not there": (file("ddp"), {}, "plain"),
        "ddp": (file("ddp"), {}, "ours"),
        "cpu": (file("cpu"), {}, "ours"),
        "DeepSpeed on a CPU": (file("zero2"), on_cpu, "plain"),
        "precision": ([*file("ddp"), "--mixed_precision=bf16"], {}, "ours"),
        "accumulation": (file("ddp"), {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "ours"),
        "clipping": (file("ddp"), {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "ours"),
        "notebook, plain": (None, {}, "plain"),
        "notebook": (None, {}, "ours"),
    }
    own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    told = [
        {
            "environment": {
                **(dict(os.environ) if words is None else launched(*words)),
                **own,
                **more,
            },
            "build": build,
            "notebook": words is None,
        }
        for words, more, build in cases.values()
    ]
    subprocess.run(
        [sys.executable, "-c", _CASES, str(folder)],
        input=json.dumps(told),
        text=True,
        check=True,
        timeout=300,
    )
    texts = [(folder / str(number)).read_text("utf-8") for number in range(len(cases))]
    return {name: sorted(text.splitlines()) for name, text in zip(cases, texts, strict=True)}


ALONE = "refused: The launcher was asked for several processes and started this one alone, as "


@pytest.mark.parametrize(
    ("case", "lines"),
    [
        # What says nothing elsewhere, and trains one process or many that never meet.
        ("--cpu", [ALONE]),
        ("MULTI_CPU", [ALONE]),
        (
            "GPUs that are not there",
            2 * ["accelerate: 1 NO"]
            + 2 * ["refused: The launcher started 2 processes and Accelerate sees 1: they would "],
        ),
        ("ddp", 2 * ["ran: 2 ddp"]),
        ("cpu", 2 * ["ran: 2 ddp"]),
        (
            "DeepSpeed on a CPU",
            2 * ["accelerate: 2 MULTI_CPU"]
            + 2
            * ["refused: The launcher was asked for zero2, and Accelerate made MULTI_CPU of it: "],
        ),
        ("precision", 2 * ["refused: --mixed_precision bf16 of the launcher has no effect"]),
        ("accumulation", 2 * ["refused: The launcher's gradient_accumulation_steps has no effect"]),
        ("clipping", 2 * ["refused: The launcher's gradient_clipping has no effect"]),
        (
            "notebook, plain",
            2 * ["accelerate: 1 NO"] + 2 * ["refused: The launcher started 2 processes and "],
        ),
        ("notebook", 2 * ["ran: 2 ddp"]),
    ],
)
def test_what_runs_is_what_was_asked_for(
    heard: dict[str, list[str]], case: str, lines: list[str]
) -> None:
    """Really launched: either every process is one of the whole, or every process says why not."""
    said = [x for x in heard[case] if x.startswith(("accelerate:", "ran:", "refused:"))]
    assert len(said) == len(lines), heard[case]
    for got, wanted in zip(said, lines, strict=True):
        assert got.startswith(wanted), heard[case]


@pytest.mark.parametrize(
    ("gpu", "count", "driver", "broken"),
    [
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 2, "550.40.06", True),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 2, "550.40.07", False),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 1, "535.1", False),
        ("NVIDIA GeForce RTX 3090", 2, "535.1", False),
    ],
)
def test_links_are_left_alone_but_where_drivers_break_them(
    monkeypatch: pytest.MonkeyPatch, gpu: str, count: int, driver: str, broken: bool
) -> None:
    """RTX 40 pairs under old drivers, and no others; what is set is said, what was set stays."""
    monkeypatch.setattr(environment_of_gpus, "get_gpu_info", lambda: ([gpu] * count, count))
    monkeypatch.setattr(environment_of_gpus, "get_driver_version", lambda: driver)
    environ: dict[str, str] = {}
    said = avoid_broken_links(environ)
    both = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    assert environ == (both if broken else {})
    assert (said is not None) == broken
    if said is not None:
        assert "NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 are set" in said
        assert avoid_broken_links(environ) is None
        theirs = {"NCCL_P2P_DISABLE": "0"}
        avoid_broken_links(theirs)
        assert theirs == {"NCCL_P2P_DISABLE": "0", "NCCL_IB_DISABLE": "1"}


def through_accelerate(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """`accelerate launch` itself, with `launch/train.py` and a small data set."""
    (cwd / "texts").mkdir()
    for split in ("train", "test"):
        rows = [f"{text} {i} in {split},{label}" for i in range(20) for text, label in TEXTS]
        (cwd / "texts" / f"{split}.csv").write_text(
            "\n".join(["text,label", *rows]) + "\n", "utf-8"
        )
    script = shipped_file("launch/train.py").absolute()
    given = ["--model=gpt2-tiny", "--dataset=texts", "--max-steps=1", "--output-dir=run", "--quiet"]
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    return subprocess.run(
        [*accelerate, "launch", *words, str(script), *given],
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


TEXTS = (("apples and pears", "fruit"), ("hammer and nails", "tools"))


@pytest.mark.slow
def test_one_process_in_place_of_two_trains_nothing(tmp_path: Path) -> None:
    """The real command ends with a failure, our sentence and no run directory; without us it would
    train on one process and end with 0."""
    ended = through_accelerate("--cpu", "--num_processes=2", cwd=tmp_path)
    assert ended.returncode != 0
    assert "asked for several processes and started this one alone" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_file_alone_chooses_the_strategy(tmp_path: Path) -> None:
    """The real command with our file, copied as a person copies it: two processes shard each
    class's model, and it is whole at the end."""
    write_files(tmp_path, config_files())
    ended = through_accelerate("--config_file=accelerate_configs/fsdp2.yaml", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    ran = json.loads((tmp_path / "run" / "environment.json").read_text("utf-8"))
    assert (ran["world_size"], ran["strategy"]) == (2, "fsdp2")
    for name in ("class-0-fruit", "class-1-tools"):
        assert (tmp_path / "run" / name / "final" / "model.safetensors").stat().st_size > 10**6
