# %% 7.1
def long_prompt(prompt_tokens, budget, prefill_s, decode_s):
    return prompt_tokens // budget, budget * prefill_s + decode_s


# %% 7.2
def reusable(prompt, earlier, page_size):
    same = 0
    while same < min(len(prompt), len(earlier)) and prompt[same] == earlier[same]:
        same += 1
    return same


# %% 7.2
def reusable(prompt, earlier, page_size):
    same = 0
    while same < min(len(prompt), len(earlier)) and prompt[same] == earlier[same]:
        same += 1
    return max(same - 1, 0) // page_size * page_size


# %% 7.3
def read_keys(pool, table, length):
    return pool[sorted(table)].reshape(-1, pool.shape[-1])[:length]
