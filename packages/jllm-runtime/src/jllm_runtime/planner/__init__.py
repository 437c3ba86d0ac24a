"""`jllm plan`: what a model needs on which machine, before anything is bought, rented or downloaded."""
