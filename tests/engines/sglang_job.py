"""One SGLang engine in a process of its own, on this machine's CPU or, with KVTIDE_ENGINES_GPU, on its GPU: reads a job from standard
input, writes what came out to the file of the first argument.

job: {"engine": arguments of sglang's Engine, "prompts": [[token, ...]], "new_tokens": number}
result: [{"tokens": [...], "cached": prefix tokens}]
"""

import json
import os
import sys

GPU = bool(os.environ.get("KVTIDE_ENGINES_GPU"))

if __name__ != "__main__" and not GPU:  # a process of the engine's, which begins with this file
    import sglang_cpu  # noqa: F401


def main():
    job = json.load(sys.stdin)
    from sglang.srt.entrypoints.engine import Engine

    how = {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True, "disable_overlap_schedule": True,
           "skip_server_warmup": True, "log_level": "info"}
    if GPU:
        from gpu_sglang import WITHOUT_OTHER_PACKAGES as how
    engine = Engine(**{**how, **job["engine"]})
    result = []
    for prompt in job["prompts"]:  # one after the other: batches of other sizes round differently
        one = engine.generate(input_ids=[prompt], sampling_params={"temperature": 0, "max_new_tokens": job["new_tokens"], "ignore_eos": True})[0]
        result.append({"tokens": one["output_ids"], "cached": one["meta_info"]["cached_tokens"]})
    with open(sys.argv[1], "w") as file:
        json.dump(result, file)
    engine.shutdown()


if __name__ == "__main__":
    main()
