"""A job type of your own: `HANDLER_MODULES=summary_handler PYTHONPATH=examples python worker.py`."""

from worker import Call, JobInput, Result, handles


class Summary(JobInput):
    text: str


@handles("summary_generation", Summary)
async def summarise(call: Call) -> Result:
    messages = [{"role": "user", "content": f"Summarise: {call.input.text}"}]
    answer = await call.provider.text({"model": call.model, "messages": messages}, call.progress)
    return Result({"generated_text": answer.text, "model_used": answer.model, "tokens_used": answer.tokens})
