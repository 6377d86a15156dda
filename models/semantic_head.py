"""Semantic quantisation of patches: each patch is replaced by the text embedding that fits it best.

Shapes: B images, N patches, E joint image-text width (512), K codebook texts, k texts kept per image, M = B x N.
Sources: Gao et al., FSGR, IEEE TCSVT 2025 (quantisation, local contrast); Zhou et al., MaskCLIP, ECCV 2022 (dense
logits); Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, eq. 2.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

TEMPLATES = (  # from CLIP's list for ImageNet; a scene may hold several things, so the plain ones
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of many {}.",
    "there is a {} in the scene.",
    "a close-up photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
)


class SemanticHead(nn.Module):
    """Which text does a patch look like, among the top_k texts that fit the whole image?

    codebook (K, E) unit rows, frozen; log_scale: CLIP's, ln 100 in the released weights. top_k is clamped to K.
    Training draws the text (Gumbel-softmax, temperature tau); evaluation takes the best. Both are one-hot forward and
    soft backward. count_norm divides a patch's text by 1 + the number of patches that share it, as the source does.
    Computed in float32 whatever autocast says: a logit of 25 has steps of 0.125 in bfloat16.
    """

    def __init__(self, codebook: torch.Tensor, log_scale: float, top_k=20, tau: float = 1.0, count_norm=False):
        super().__init__()
        if codebook.ndim != 2 or top_k < 1 or tau <= 0:
            raise ValueError(f"SemanticHead: codebook {tuple(codebook.shape)}, top_k {top_k}, tau {tau}: "
                             "expected (K, E), at least 1 and above 0")  # fmt: skip
        self.top_k, self.tau, self.count_norm = min(top_k, len(codebook)), tau, count_norm
        self.register_buffer("codebook", codebook.float().clone())
        self.register_buffer("log_scale", torch.tensor(float(log_scale)))

    def forward(self, globals_: torch.Tensor, align: torch.Tensor, dense: bool = False) -> dict[str, torch.Tensor]:
        """globals_ (B, E), align (B, N, E), unit norm -> text_grid (B, N, E), index (B, N) into the codebook,
        logits (B, N, k) of the preselected texts, with dense also dense_logits (B, N, K); float32."""
        with torch.autocast(align.device.type, enabled=False):
            globals_, align, scale = globals_.float(), align.float(), self.log_scale.exp()
            top = (globals_ @ self.codebook.T).topk(self.top_k, dim=1).indices  # (B, k)
            texts = self.codebook[top]  # (B, k, E)
            logits = scale * align @ texts.transpose(1, 2)  # (B, N, k)
            if self.training:
                choice = F.gumbel_softmax(logits, self.tau, hard=True)  # (B, N, k)
            else:
                soft = logits.softmax(-1)
                choice = F.one_hot(logits.argmax(-1), self.top_k) + (soft - soft.detach())
            index = top.gather(1, choice.detach().argmax(-1))  # (B, N)
            if self.count_norm:
                choice = choice / (choice.sum(1, keepdim=True) + 1)
            out = {"text_grid": choice @ texts, "index": index, "logits": logits}
            if dense:
                out["dense_logits"] = scale * align @ self.codebook.T
        return out


# ---- losses on patches


def supcon_loss(
    features: torch.Tensor,
    labels: torch.Tensor,
    tau: float = 0.07,
    max_anchors: int = 4096,
    ignore: int = -1,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Supervised contrastive loss: features of one label attract each other. features (M, C) unit rows, labels (M,).

    A feature labelled `ignore` is neither anchor nor contrast. Of more than max_anchors features a random subset are
    anchors, each against all others: the mean is unbiased and memory is max_anchors x M floats. An anchor without a
    second feature of its label counts 0. Sizes depend on no value, so a GPU need not wait. -> scalar, float32.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"supcon_loss: features {tuple(features.shape)}, labels {tuple(labels.shape)}")
    M, valid = len(features), labels != ignore
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        if M > max_anchors:
            order = torch.rand(M, device=features.device, generator=generator) + 2 * ~valid  # the ignored ones last
            anchors = order.topk(max_anchors, largest=False).indices  # (A,)
        else:
            anchors = torch.arange(M, device=features.device)
        sim = features[anchors] @ features.T / tau  # (A, M)
        others = valid & (torch.arange(M, device=features.device) != anchors[:, None])  # (A, M)
        denominator = sim.masked_fill(~others, -1e4).logsumexp(1, keepdim=True)  # (A, 1)
        positive = others & (labels == labels[anchors, None])
        per_anchor = ((denominator - sim) * positive).sum(1) / positive.sum(1).clamp_min(1)  # (A,)
        return (per_anchor * valid[anchors]).sum() / valid[anchors].sum().clamp_min(1)


def dense_ce_loss(dense_logits: torch.Tensor, patch_labels: torch.Tensor, ignore: int = -1) -> torch.Tensor:
    """Cross-entropy of dense_logits (B, N, K) on patch_labels (B, N), mean over the labelled patches; 0 if none is."""
    if patch_labels.shape != dense_logits.shape[:2]:
        raise ValueError(f"dense_ce_loss: logits {tuple(dense_logits.shape)}, labels {tuple(patch_labels.shape)}")
    flat = dense_logits.float().flatten(0, 1)  # (B*N, K)
    loss = F.cross_entropy(flat, patch_labels.flatten(), ignore_index=ignore, reduction="sum")
    return loss / (patch_labels != ignore).sum().clamp_min(1)


# ---- codebook


@torch.no_grad()
def embed_texts(
    encode_text: Callable, tokenizer: Callable, texts: Sequence[str], device="cpu", batch: int = 512
) -> torch.Tensor:
    """Unit-norm embeddings (len(texts), E) on the CPU; tokenizer: texts -> (n, L) long, encode_text: (n, L) -> (n, E).

    device: where the text tower lies. `clip.encode_text` and `load_tokenizer(folder)` of models/clip.py fit. The end
    token has CLIP's highest id; what follows the last one of a batch is cut off, since a causal tower never sees it.
    """
    parts = []
    for i in range(0, len(texts), batch):
        tokens = tokenizer(list(texts[i : i + batch]))  # (n, L)
        tokens = tokens[:, : int(tokens.argmax(1).max()) + 1].to(device)
        parts.append(F.normalize(encode_text(tokens).float(), dim=-1).cpu())
    return torch.cat(parts)


def build_codebook(
    encode_text: Callable, tokenizer: Callable, names: Sequence[str], templates=TEMPLATES, device="cpu"
) -> torch.Tensor:
    """Text embedding of each name: the mean over templates of unit embeddings, scaled to unit norm -> (K, E)."""
    if not names or len(set(names)) < len(names):
        raise ValueError(f"build_codebook: {len(names)} names, {len(set(names))} of them different; expected a set")
    texts = [template.format(name) for name in names for template in templates]
    embeds = embed_texts(encode_text, tokenizer, texts, device).unflatten(0, (len(names), len(templates)))
    return F.normalize(embeds.mean(1), dim=-1)
