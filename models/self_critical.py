"""One step of self-critical training: draw captions, reward them, score them once more with gradient.

Captions are drawn in eval mode and without gradient, so that no graph is kept through the search; then one teacher-
forced forward gives their log-probabilities. Sources: see models/caption_losses.py.

Shapes: B images, k captions each, T words (end token included), V words.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from models.caption_decoding import beam_search, greedy, sample, until_eos
from models.caption_losses import advantages, scst_loss, word_logprobs

END = "<eos>"  # the word that ends a caption in the reward, and must end its references


def spell(tokens: torch.Tensor, vocab: Sequence[str], eos: int, end: bool) -> list[str]:
    """Generated words (R, T) as the reward reads them: joined by blanks; with `end`, a caption that ended says so."""
    captions = []
    for row in tokens.tolist():
        stop = row.index(eos) if eos in row else len(row)
        captions.append(" ".join([vocab[i] for i in row[:stop]] + [END] * (end and stop < len(row))))
    return captions


def self_critical_loss(
    net: Callable,
    model: torch.nn.Module,
    images: torch.Tensor,
    image_ids: list,
    reward: Callable[[list, list[str]], list[float]],
    estimator: str = "beam",
    k: int = 5,
    max_len: int = 20,
    end: bool = True,
    m2_norm: bool = False,
    never: Sequence[int] = (),
) -> tuple[torch.Tensor, dict]:
    """images (B, 3, H, W) -> loss, {reward, words (means of the drawn captions), decode_s, reward_s}.

    net: the model as the optimizer sees it (DDP); model: the same, unwrapped, left in train mode. reward(ids, captions)
    gives a number per caption. estimator: `beam` and `sample` compare k captions of an image, `greedy` draws one.
    never: ids that are not drawn, as validation and inference do not say them.
    """
    t0, decoder = time.perf_counter(), model.decoder
    model.eval()
    with torch.no_grad():
        memory, _ = model.encode(images)
        if estimator == "beam":
            drawn = beam_search(decoder, memory, beam=k, max_len=max_len, out_size=k, never=never)
        else:
            k = 1 if estimator == "greedy" else k
            drawn = sample(decoder, memory, n=k, max_len=max_len, never=never)
        base = greedy(decoder, memory, max_len, never).tokens.flatten(0, 1).cpu() if estimator == "greedy" else None
    model.train()
    T = int(drawn.lengths.max())
    words = drawn.tokens[..., :T].flatten(0, 1)  # (B k, T)
    spoken = spell(words.cpu(), model.cfg.vocab, decoder.eos, end)
    t1 = time.perf_counter()
    rewards = torch.tensor(reward([i for i in image_ids for _ in range(k)], spoken)).view(-1, k)  # (B, k)
    if base is not None:
        base = torch.tensor(reward(image_ids, spell(base, model.cfg.vocab, decoder.eos, end))).view(-1, 1)
    advantage = advantages(rewards, estimator, base).to(images.device)
    t2 = time.perf_counter()
    bos = words.new_full((len(words), 1), decoder.bos)
    logits = net(images, torch.cat([bos, words[:, :-1]], 1))["logits"]  # (B k, T, V)
    logprobs = word_logprobs(logits, words, until_eos(words, decoder.eos), never).view(*drawn.lengths.shape, T)
    if m2_norm:
        logprobs = F.pad(logprobs, (0, max_len - T))
    loss = scst_loss(logprobs, drawn.lengths, advantage, estimator, m2_norm)
    info = {"reward": rewards.mean().item(), "words": drawn.lengths.float().mean().item()}
    return loss, info | {"decode_s": t1 - t0, "reward_s": t2 - t1}
