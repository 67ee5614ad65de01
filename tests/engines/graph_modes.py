"""In which CUDA graphs the steps of a vLLM engine of this process run."""

import collections


def count():
    """Steps from now on by vLLM's name of the mode (FULL, PIECEWISE, NONE), warm-ups and captures too; stays empty where vLLM has another
    model runner than V2."""
    steps = collections.Counter()
    try:
        from vllm.v1.worker.gpu import model_runner
    except ImportError:
        return steps
    dispatch = getattr(model_runner, "dispatch_cg_and_sync_dp", None)
    if dispatch is None:
        return steps

    def counted(*arguments, **options):
        result = dispatch(*arguments, **options)
        steps[result[0].cg_mode.name] += 1
        return result

    model_runner.dispatch_cg_and_sync_dp = counted
    return steps
