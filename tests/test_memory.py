"""Running out of memory, and what saves it."""

import pytest
import torch
from conftest import TINY, run_main

import predict
import train
from utils.errors import explain_out_of_memory, is_out_of_memory
from utils.training import memory
from utils.training.memory import accumulate_that_fits

SMALL = {
    "input_shape": (8, 8),
    "channel": 32,
    "channel_mults": (1, 2),
    "num_res_blocks": 1,
    "batch_size": 8,
    "dropout": 0.5,
}


@pytest.fixture
def parts(workplace):
    """(config, parts) of a small job on the 24 images of the workplace."""

    def make(**settings):
        asked = train.Config(**{**SMALL, "device": "cpu", "precision": "fp32", "compile": False, **settings})
        config, device = train.resolve(asked)
        return config, train.prepare(config, device, None, train.saved_settings(asked, config, []))

    return make


def gradients(_, parts):
    parts.diffusion.train()
    generator = torch.Generator().manual_seed(0)
    # a fresh network's branches end in zeros, which let no gradient through
    for parameter in parts.diffusion.model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    x, t = torch.linspace(-1, 1, 4 * 3 * 64).view(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    torch.manual_seed(1)
    parts.diffusion(x, t=t, noise=x.flip(0)).backward()
    return [parameter.grad for parameter in parts.diffusion.model.parameters()]


def test_the_setting_for_checkpointing_reaches_the_network_and_leaves_the_gradients_equal(parts):
    plain, saving = parts(), parts(activation_checkpointing=True)
    assert saving[1].diffusion.model.activation_checkpointing and not plain[1].diffusion.model.activation_checkpointing
    expected = gradients(*plain)
    assert sum(grad.abs().max() > 0 for grad in expected) > 0.9 * len(expected)
    for one, other in zip(expected, gradients(*saving)):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 8 bytes"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_errors_of_all_devices_are_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("free, known", [(100, True), (300, False)])
@pytest.mark.parametrize("words", ["cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", "GET was unable to find an engine to"])
def test_words_of_cudnn_mean_memory_where_the_gpu_is_full(monkeypatch, words, free, known):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 10_000))
    assert is_out_of_memory(RuntimeError(words)) == known


def test_a_driver_that_no_longer_answers_hides_no_error(monkeypatch):
    def fail():
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert not is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"))


@pytest.mark.parametrize("images", [8, 12])
def test_memory_is_measured_with_as_few_images_as_fit(parts, monkeypatch, images):
    config, built = parts()

    def measure(config, context, number):
        if number > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 1000 + 7 * number

    monkeypatch.setattr(memory, "measure_pass", measure)
    assert memory.measure_needs(config, on_gpu(built, images)).per_image == 7


def test_other_errors_pass_unchanged():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as raised, explain_out_of_memory(lambda: "not asked for"):
        raise error
    assert raised.value is error


def test_training_out_of_memory_is_a_line_with_the_settings_and_what_would_fit(parts, monkeypatch):
    config, built = parts()
    needs = memory.measure_needs(config, built)
    there = (needs.fixed + 2.5 * needs.per_image) / memory.USABLE
    monkeypatch.setattr(memory, "device_memory", lambda device: there)

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    # After the failure nothing is tried again: a compiled network would be compiled again.
    monkeypatch.setattr(memory, "measure_pass", None)
    with (
        pytest.raises(ValueError) as raised,
        explain_out_of_memory(lambda: memory.advise(needs, config, built.device)),
    ):
        fail()
    text = str(raised.value)
    assert "\n" not in text and text.startswith("out of memory: training on 8 images at a time needs about")
    assert "--accumulate 4 would fit" in text  # 2 images at a time
    for setting in ("--activation_checkpointing True", "--batch_size", "--channel", "--input_shape"):
        assert setting in text


def test_a_system_that_does_not_tell_its_memory_is_not_said_to_have_none(parts, monkeypatch):
    config, built = parts()
    monkeypatch.setattr(memory, "device_memory", lambda device: 0)  # Windows
    text = memory.advise(memory.measure_needs(config, built), config, built.device)
    assert "MiB; raise --accumulate" in text and " has " not in text


@pytest.mark.parametrize(
    "there, said", [(10, "warning: memory will run out: training on 64"), (30, "memory     "), (0, "memory     ")]
)
def test_memory_that_will_run_out_is_said_before_the_first_step(monkeypatch, capsys, there, said):
    monkeypatch.setattr(memory, "device_memory", lambda device: there * 2**20)
    memory.print_memory(memory.MemoryNeeds(64, 4 * 2**20, 0.25 * 2**20), train.Config(), torch.device("cpu"))
    assert capsys.readouterr().out.startswith(said)


def on_gpu(built, size):
    """A TrainContext on a GPU whose batches have so many images."""
    return built._replace(device=torch.device("cuda", 0), batch_size=size)


@pytest.mark.parametrize("most, tried", [(64, [32, 64]), (31, [32, 8, 16]), (1, [32, 8, 2, 1, 2])])
def test_a_gpu_is_measured_with_as_many_images_as_fit(parts, monkeypatch, most, tried):
    """A pass takes 1000 + 7 n bytes here; the moments come with the first step."""
    config, built = parts()
    weights = 4 * sum(p.numel() for p in built.diffusion.model.parameters())
    numbers = []

    def measure(config, context, number):
        numbers.append(number)
        if number > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 1000 + 7 * number

    monkeypatch.setattr(memory, "measure_pass", measure)
    needs = memory.measure_needs(config, on_gpu(built, 64))
    assert numbers == tried
    assert needs == (None if most == 1 else (64, 1000 + memory.MOMENTS * weights, 7))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_network_needs_its_share(parts, monkeypatch, checkpointing):
    config, built = parts(activation_checkpointing=checkpointing)
    monkeypatch.setattr(memory, "measure_pass", lambda config, context, number: 1000 + 100 * number)
    compiled = memory.measure_needs(train.replace(config, compile=True), on_gpu(built, 64))
    assert compiled.per_image == 100 * memory.COMPILED[checkpointing]
    assert memory.COMPILED[False] < 1 < memory.COMPILED[True]  # checkpointing gains most without the compiler
    assert compiled.fixed == memory.measure_needs(config, on_gpu(built, 64)).fixed


def test_where_no_room_is_left_to_measure_in_the_settings_are_named_still(parts, capsys):
    config, built = parts()
    memory.print_memory(None, config, built.device)
    assert "warning: memory will run out: raise --accumulate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "images, share, now, expected",
    [(16, 64, 1, 4), (15, 64, 1, 8), (16, 32, 1, 2), (1, 12, 2, 12), (0.5, 64, 1, None), (5, 64, 8, 16), (3, 3, 1, 3)],
)
def test_the_parts_of_a_batch_that_fit(images, share, now, expected):
    assert accumulate_that_fits(images, share, now) == expected


def test_train_and_predict_end_in_the_line(workplace, monkeypatch, capsys):
    from utils.errors import run_script

    def fail(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    options = [
        "--input_shape",
        "8,8",
        "--channel",
        "32",
        "--channel_mults",
        "1,",
        "--num_res_blocks",
        "1",
        "--attention_resolutions",
        "()",
        "--batch_size",
        "8",
        "--device",
        "cpu",
        "--preview_period",
        "0",
    ]
    monkeypatch.setattr("sys.argv", ["train.py", *options, "--epochs", "1"])
    train.main()
    capsys.readouterr()
    monkeypatch.setattr("nets.diffusion.GaussianDiffusion.forward", fail)
    monkeypatch.setattr("nets.diffusion.GaussianDiffusion.sample_steps", fail)
    for script, arguments in (
        (train, [*options, "--epochs", "1"]),
        (predict, ["--device", "cpu", "--seed", "1", "--batch_size", "6"]),
    ):
        monkeypatch.setattr("sys.argv", ["script.py", *arguments])
        with pytest.raises(SystemExit) as raised:
            run_script(script.main)
        error = capsys.readouterr().err.splitlines()[-1]
        assert raised.value.code == 1 and error.startswith("error: out of memory"), error
        assert "--batch_size" in error
    assert "--batch_size 3 needs about half" in error


@pytest.mark.parametrize("settings", [("--channel", "32768"), ("--num_res_blocks", "1024", "--channel", "2048")])
def test_a_network_that_no_memory_holds_is_refused_before_it_is_built(workplace, capsys, settings):
    with pytest.raises(SystemExit) as end:
        run_main("train.py", *TINY, "--num_groups", "1", *settings, "--dry_run", "True")
    assert end.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: a network of") and "lower --channel" in error
