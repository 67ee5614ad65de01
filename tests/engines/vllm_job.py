"""One vLLM engine in a process of its own: reads a job from standard input, writes what came out to the file of the first argument.

job: {"llm": arguments of vllm.LLM, "batches": [{"prompts": [[token, ...]], "sampling": arguments of SamplingParams}]}
result: {"batches": [[{"tokens": [[...] for each sample], "margins": [nats between the two likeliest tokens, at each token of the first
sample], "cached": prefix tokens, "prompt_logprob": sum, "predictions": number}]], "kv_tokens": tokens that the cache holds,
"preemptions": number, "graphs": {mode of CUDA graphs: steps}, "kvtide": {counter of KvtideConnector: number}}
"""

import json
import sys


def margins(output):
    out = []
    for choices in output.logprobs or []:
        best = sorted((one.logprob for one in choices.values()), reverse=True)
        out.append(best[0] - best[1] if len(best) > 1 else float("inf"))
    return out


def answer(request):
    out = {"tokens": [list(one.token_ids) for one in request.outputs], "margins": margins(request.outputs[0]),
           "cached": request.num_cached_tokens}
    if request.prompt_logprobs:
        losses = [choices[token].logprob for token, choices in zip(request.prompt_token_ids, request.prompt_logprobs) if choices]
        out.update(prompt_logprob=sum(losses), predictions=len(losses))
    return out


def main():
    job = json.load(sys.stdin)
    import graph_modes
    from vllm import LLM, SamplingParams

    modes = graph_modes.count()
    if "kv_events_config" in job["llm"]:
        from vllm.config import KVEventsConfig

        job["llm"]["kv_events_config"] = KVEventsConfig(**job["llm"]["kv_events_config"])
    llm = LLM(**job["llm"])
    modes.clear()
    result = {"batches": [], "graphs": modes}
    for batch in job["batches"]:
        sampling = SamplingParams(detokenize=False, **batch["sampling"])
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in batch["prompts"]], sampling, use_tqdm=False)
        result["batches"].append([answer(output) for output in outputs])
    cache = llm.llm_engine.vllm_config.cache_config
    result["kv_tokens"] = cache.num_gpu_blocks * cache.block_size
    try:
        metrics = {one.name: getattr(one, "value", None) for one in llm.get_metrics()}
        result["preemptions"] = metrics.get("vllm:num_preemptions")
        result["drafts_accepted"] = metrics.get("vllm:spec_decode_num_accepted_tokens")
        result["kvtide"] = {name.removeprefix("vllm:kvtide_"): value for name, value in metrics.items() if name.startswith("vllm:kvtide_")}
    except Exception as error:  # statistics are off
        result["metrics"] = repr(error)
    with open(sys.argv[1], "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
