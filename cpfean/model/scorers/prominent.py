"""CPFEAN's own scorer: gated fusion and prominent-fragment alignment.

Axes:  as in `cpfean.model.scorers.pairs`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from cpfean.config import AlignmentConfig
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.model.scorers.pairs import TINY, Pairs, cosine_from, quadratic_form
from cpfean.model.scorers.prominent_compiled import compiled_scores
from cpfean.model.scorers.prominent_cuda import cuda_scores
from cpfean.model.scorers.scorer import Scorer

# log g of a closed hard gate. Not -inf: an image all of whose gates are closed must not give NaN.
_CLOSED = math.log(1e-6)


class Alignment(NamedTuple):
    """A pair's score and what it was made of.

    Attributes:
        local: score of the fragments, in [-1, 1].
        gates: g, how relevant a region is to the caption; 0 where masked.
        prominence: P, for each region a distribution over the words.
        word_weights: omega, for each caption a distribution over its words.
    """

    local: Float[Tensor, "image caption"]
    gates: Float[Tensor, "image caption region"]
    prominence: Float[Tensor, "image caption word region"]
    word_weights: Float[Tensor, "image caption word"]

    @property
    def named(self) -> Float[Tensor, "image caption word"]:
        """n_k / sum_l n_l: how much of what the gates let through names each word."""
        named_by = (self.prominence @ self.gates[..., None]).squeeze(-1)
        return named_by / named_by.sum(dim=-1, keepdim=True).clamp(min=TINY)


class ProminentAlignment(Scorer):
    """Gates irrelevant regions, and finds the word that is prominent for each region.

    For unit vectors v_r (regions) and w_k (words), S_rk = <v_r, w_k>, and words of salience s_k:

        m_r  = max_k (S_rk + log(s_k) / tau)           relevance of region r to the caption
        g_r  = sigmoid(kappa (m_r - theta_r))          gate
        P_rk = softmax_k(tau S_rk + log s_k)           the word that is prominent for region r
        om_k = (1 + beta n_k) / sum_l (1 + beta n_l),  n_k = sum_r g_r P_rk,  beta = 0 unless
               `prominence` lets words weigh more that relevant regions name
        A_rk = softmax_r(lambda S_rk + log g_r)
        c_k  = sum_r A_rk v_r,   d_r = sum_k P_rk w_k
        local = 1/2 sum_k om_k cos(c_k, w_k) + 1/2 sum_r g_r cos(v_r, d_r) / sum_r g_r

    c and d are never formed: cos(c_k, w_k) = (A'S)_kk / sqrt(A_k' K A_k) and
    cos(v_r, d_r) = (P S')_rr / sqrt(P_r G P_r'), with K and G the Gram matrices of the regions and
    of the words. Rounds after the first replace v_r by the unit vector along v_r + g_r d_r, which
    is kept as its coefficients in the first v and in w.

    The cost of a pair is `region word dim` multiplications for S and
    `region word (region + word)` for the lengths.

    Source: arXiv:2311.02183 (gate, prominent word); the forms of gate and weights are this
    project's, docs/model.md section 4.
    """

    def __init__(self, config: AlignmentConfig, *, dim: int) -> None:
        super().__init__()
        self.gate: Literal["soft", "hard", "off"] = config.gate if config.fusion else "off"
        self.prominence = config.prominence and config.fusion
        self.rounds = config.rounds
        self.word_temperature = config.word_temperature
        self.region_temperature = config.region_temperature
        # What is switched off is not built: data-parallel training waits for every gradient.
        if self.gate != "off":
            self.threshold = nn.Linear(dim, 1)
            nn.init.zeros_(self.threshold.weight)
            nn.init.constant_(self.threshold.bias, config.gate_threshold)
            self.log_sharpness = nn.Parameter(torch.tensor(math.log(config.gate_sharpness)))
        if self.prominence:
            # softplus keeps beta positive; its inverse makes training start at the given value.
            start = max(config.prominence_weight, 1e-3)
            self.raw_prominence_weight = nn.Parameter(torch.tensor(math.log(math.expm1(start))))

    @classmethod
    def from_config(cls, config: AlignmentConfig, *, dim: int) -> ProminentAlignment:
        """All of the settings but those of the pooled part."""
        return cls(config, dim=dim)

    def thresholds(
        self, regions: Float[Tensor, "image region dim"]
    ) -> Float[Tensor, "image region"]:
        """theta_r = theta0 + u . v1_r, from the regions as they are before reasoning."""
        if self.gate == "off":
            return regions.new_zeros(regions.shape[:2])
        return self.threshold(regions).squeeze(-1)

    def constants(self, *, like: Tensor) -> Float[Tensor, "4"]:
        """kappa, tau, lambda and beta, in the type of a tensor; 0 for what is switched off."""
        kappa = like.new_zeros(()) if self.gate == "off" else self.log_sharpness.exp()
        beta = functional.softplus(self.raw_prominence_weight) if self.prominence else 0 * kappa
        # Filled, not copied there: a GPU's host would wait for the copy.
        tau, lam = (
            like.new_full((), number) for number in (self.word_temperature, self.region_temperature)
        )
        return torch.stack([kappa.to(like), tau, lam, beta.to(like)])

    def compiled_scores(
        self, images: ImageEmbeddings, captions: CaptionEmbeddings, *, product_type: torch.dtype
    ) -> Float[Tensor, "image caption"] | None:
        """The kernels for processors and for CUDA, which fuse once."""
        device = images.regions.device.type
        if self.rounds > 1 or device not in ("cpu", "cuda"):
            return None
        lead, constants = self._lead(captions.salience), self.constants(like=images.regions)
        if device == "cpu":
            return compiled_scores(
                images,
                captions,
                lead=lead,
                constants=constants,
                gate=self.gate,
                product_type=product_type,
            )
        return cuda_scores(
            images,
            captions,
            lead=lead,
            constants=constants,
            gate=self.gate,
            prominence=self.prominence,
            product_type=product_type,
        )

    def forward(self, pairs: Pairs) -> Float[Tensor, "image caption"]:
        """The local scores."""
        return self.align(pairs).local

    def align(self, pairs: Pairs) -> Alignment:
        """The local scores with gates, prominent words and word weights."""
        region_gram, word_gram = pairs.region_gram, pairs.word_gram
        first = current = pairs.cosines
        # v_r = own_r v_r(first) + sum_k added_kr w_k
        own = added = None
        for _ in range(self.rounds - 1):
            log_gates = self._log_gates(current, pairs)
            prominent = self._prominence(current, pairs)
            step = log_gates.exp()[:, :, None, :] * prominent
            toward = word_gram @ step
            squared = 1 + 2 * (step * current).sum(dim=2) + (step * toward).sum(dim=2)
            scale = squared.clamp(min=TINY).rsqrt()
            current = (current + toward) * scale[:, :, None, :]
            own = scale if own is None else own * scale
            added = (step if added is None else added + step) * scale[:, :, None, :]

        log_gates = self._log_gates(current, pairs)
        gates = log_gates.exp()
        prominent = self._prominence(current, pairs)
        weights = self._word_weights(gates, prominent, pairs.word_mask)

        logits = self.region_temperature * current + log_gates[:, :, None, :]
        attention = logits.masked_fill(~pairs.region_mask, -torch.inf).softmax(dim=-1)
        if own is None or added is None:
            length = quadratic_form(attention, region_gram)
        else:
            kept = attention * own[:, :, None, :]
            mixed = attention @ added.transpose(2, 3)  # coefficients of c_k in the words
            length = quadratic_form(kept, region_gram)
            length = length + 2 * (mixed * (kept @ first.transpose(2, 3))).sum(dim=-1)
            length = length + (mixed * (mixed @ word_gram)).sum(dim=-1)
        of_words = cosine_from((attention * current).sum(dim=-1), length)

        inner = (prominent * current).sum(dim=2)
        of_regions = cosine_from(inner, ((word_gram @ prominent) * prominent).sum(dim=2))
        relevant = (gates * of_regions).sum(dim=-1) / gates.sum(dim=-1).clamp(min=TINY)
        local = 0.5 * (weights * of_words).sum(dim=-1) + 0.5 * relevant
        return Alignment(local, gates, prominent, weights)

    def _log_gates(
        self, scores: Float[Tensor, "image caption word region"], pairs: Pairs
    ) -> Float[Tensor, "image caption region"]:
        """log g; -inf where a region is masked."""
        if self.gate == "off":
            log_gates = scores.new_zeros(scores.shape[0], scores.shape[1], scores.shape[3])
        else:
            ahead = scores + self._lead(pairs.salience)[..., None]
            relevance = ahead.masked_fill(~pairs.word_mask, -torch.inf).amax(dim=2)
            excess = relevance - pairs.thresholds
            log_gates = functional.logsigmoid(self.log_sharpness.exp() * excess)
            if self.gate == "hard":
                # Straight-through: 0 or 1 going forward, the soft gate's gradient going back.
                hard = torch.zeros_like(excess).masked_fill(excess <= 0, _CLOSED)
                log_gates = log_gates + (hard - log_gates).detach()
        return log_gates.masked_fill(~pairs.region_mask[:, 0], -torch.inf)

    def _lead(self, salience: Float[Tensor, "*caption word"]) -> Float[Tensor, "*caption word"]:
        """log(s) / tau: what a salient word has ahead of others for every region."""
        return salience.clamp(min=TINY).log() / self.word_temperature

    def _prominence(
        self, scores: Float[Tensor, "image caption word region"], pairs: Pairs
    ) -> Float[Tensor, "image caption word region"]:
        logits = self.word_temperature * (scores + self._lead(pairs.salience)[..., None])
        return logits.masked_fill(~pairs.word_mask, -torch.inf).softmax(dim=2)

    def _word_weights(
        self,
        gates: Float[Tensor, "image caption region"],
        prominent: Float[Tensor, "image caption word region"],
        word_mask: Bool[Tensor, "#image caption word 1"],
    ) -> Float[Tensor, "image caption word"]:
        weights = word_mask.squeeze(-1).to(prominent.dtype).expand(prominent.shape[:3])
        if self.prominence:
            named_by = (prominent @ gates[..., None]).squeeze(-1)
            weights = weights * (1 + functional.softplus(self.raw_prominence_weight) * named_by)
        return weights / weights.sum(dim=-1, keepdim=True)
