"""Flags and environment of a worker."""

from dataclasses import fields, replace

import pytest

from tandem_engine.config import WorkerConfig, flag_names, parse_args, parse_bytes
from tandem_engine.errors import ConfigError


def test_mock_flag_is_a_model() -> None:
    config = parse_args(["--mock", "h100-8b?speed=10"], {})
    assert config.model == "mock://h100-8b?speed=10"
    assert config.is_mock
    assert config.mock_profile == "h100-8b?speed=10"
    assert config.served_model_name == "h100-8b"
    assert config.max_waiting == 4 * config.max_running


def test_environment_fills_what_flags_leave_open() -> None:
    environ = {
        "POD_NAME": "pod-1",
        "POD_IP": "10.0.0.7",
        "TANDEM_SHM_DIR": "/shm",
        "TANDEM_CACHE_DIR": "/cache",
    }
    config = parse_args(["--model", "hf://org/name@main"], environ)
    assert (config.worker_id, config.publish_host, config.cache_dir) == (
        "pod-1",
        "10.0.0.7",
        "/cache",
    )
    assert config.served_model_name == "org/name"
    assert config.shm_dir == "/shm"


def test_every_start_has_its_own_boot_id() -> None:
    assert parse_args(["--mock", "tiny"], {}).boot_id != parse_args(["--mock", "tiny"], {}).boot_id


def test_publish_host_falls_back_to_the_listening_address() -> None:
    assert WorkerConfig(model="mock://tiny").publish_host == "127.0.0.1"
    assert WorkerConfig(model="mock://tiny", host="10.1.1.1").publish_host == "10.1.1.1"
    assert WorkerConfig(model="hf://a/b").mock_profile == ""


FROM_THE_ENVIRONMENT = {"worker_id", "boot_id", "pod_ip", "shm_dir", "faults"}


def test_every_field_has_a_flag_or_comes_from_the_environment() -> None:
    names = {field.name for field in fields(WorkerConfig)} - FROM_THE_ENVIRONMENT
    flags = {"--" + name.replace("_", "-") for name in names} - {"--kv-memory-bytes"}
    negations = {"--no-cuda-graphs", "--no-checksum"}
    assert flag_names() - flags == {"--mock", "--kv-memory", "--help", "-h", *negations}
    assert flags <= flag_names()


def test_a_flag_left_out_and_a_field_left_out_are_the_same() -> None:
    config = parse_args(["--mock", "tiny"], {})
    same = replace(
        WorkerConfig(model="mock://tiny").resolve_auto({}),
        worker_id=config.worker_id,
        boot_id=config.boot_id,
    )
    assert config == same


@pytest.mark.parametrize(
    ("text", "value"), [("2Gi", 2**31), ("512Mi", 2**29), ("1.5k", 1500), ("77", 77)]
)
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--model", "missing"]),
        (["--model", "name"], ["--model", "scheme", "hf://"]),
        (["--mock", "tiny", "--model", "hf://a/b"], ["--mock", "--model", "drop"]),
        (["--mock", "tiny", "--role", "cook"], ["--role", "prefill"]),
        (["--mock", "tiny", "--http-port", "70000"], ["--http-port", "65535"]),
        (["--mock", "tiny", "--page-size", "0"], ["--page-size"]),
        (["--mock", "tiny", "--gpu-memory-percent", "0"], ["--gpu-memory-percent", "90"]),
        (["--mock", "tiny", "--lease-seconds", "0"], ["--lease-seconds"]),
        (["--mock", "tiny", "--chunk-tokens", "100"], ["--chunk-tokens", "multiple", "128"]),
        (["--mock", "tiny", "--max-batched-tokens", "8"], ["--max-batched-tokens", "64"]),
        (["--mock", "tiny", "--kv-memory", "lots"], ["--kv-memory", "2Gi"]),
        (["--mock", "tiny", "--kv-memory=-1Gi"], ["--kv-memory", "positive"]),
        (["--mock", "tiny", "--nonsense"], ["--nonsense", "--help"]),
        (["--mock", "tiny", "--admin-token-file", "/no"], ["--admin-token-file /no", "mount it"]),
        (["--mock", "tiny", "--admin-token-file", "/dev/null"], ["/dev/null is empty", "write"]),
    ],
)
def test_bad_flags_name_flag_and_remedy(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(argv, {})
    for word in words:
        assert word in str(caught.value)
