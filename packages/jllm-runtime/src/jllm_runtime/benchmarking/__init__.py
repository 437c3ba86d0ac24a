"""`jllm bench`: prefill and decode rates of a model, beside the limits of its device."""
