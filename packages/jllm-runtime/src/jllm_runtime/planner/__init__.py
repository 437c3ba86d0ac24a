"""`jllm plan`: memory and speed of a model on a machine, without either of them."""
