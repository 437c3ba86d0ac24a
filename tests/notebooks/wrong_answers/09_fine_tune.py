# %% 9.1
def merged(w, a, b, alpha):
    return w + alpha * np.einsum("Dr,rNH->DNH", a, b)


# %% 9.2
def masked_loss(logprobs, targets, mask):
    return -(logprobs[np.arange(len(targets)), targets] * mask).mean()


# %% 9.3
def mean_loss(windows, stride):
    return np.mean(np.concatenate(windows))


# %% 9.3
def mean_loss(windows, stride):
    return np.mean([*windows[0], *(loss for window in windows[1:] for loss in window[1:])])
