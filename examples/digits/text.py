"""The text side: a CLIP tokenizer made for the captions, and two small CLIP text encoders trained contrastively.

CLIP: A. Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021. The image tower
exists only during training. SD3 reads both encoders' last layer but one, and their projected pooled outputs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from . import data

LENGTH = 16   # tokens per caption with both ends; the longest caption takes 14
START, END = "<|startoftext|>", "<|endoftext|>"


def all_captions(templates: tuple[str, ...] = data.TEMPLATES + data.OPEN_TEMPLATES) -> list[str]:
    """Every caption that the templates can make, sorted."""
    return sorted({data.caption(t, c, numeral) for t in templates for c in data.CONCEPTS for numeral in (False, True)})


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until every word is one token (R. Sennrich et al., 2016)."""
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, parts in pieces.items():
            merged = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            pieces[word] = merged


def write_tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """Makes the tokenizer of the captions, saves it in `folder` and returns it; `pad` as in SD3: END first, "!" second."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = Counter(w for text in all_captions() for w in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text))
    merges = learn_merges(words)
    letters = sorted(ByteLevel.alphabet())   # any other text still tokenizes, byte by byte
    tokens = letters + [c + "</w>" for c in letters] + [a + b for a, b in merges] + [START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab, merges, pad_token=pad, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    # The two files that every CLIP tokenizer class reads, whatever its version.
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return tokenizer


def build(tokenizer: CLIPTokenizer, tokenizer_2: CLIPTokenizer) -> nn.ModuleList:
    """The two text encoders with fresh weights: the sizes differ, as do SD3's, and the second uses plain GELU."""
    def encoder(own: CLIPTokenizer, width: int, heads: int, activation: str) -> CLIPTextModelWithProjection:
        return CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=len(own), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
            num_hidden_layers=3, num_attention_heads=heads, max_position_embeddings=LENGTH, hidden_act=activation,
            bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id))

    return nn.ModuleList([encoder(tokenizer, 64, 2, "quick_gelu"), encoder(tokenizer_2, 96, 3, "gelu")])


class Contrast(nn.Module):
    """Both text encoders beside the throw-away image tower, with CLIP's learned temperature for each."""

    def __init__(self, encoders: nn.ModuleList):
        super().__init__()
        def conv(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(8, o), nn.SiLU())

        self.encoders = encoders
        self.image = nn.Sequential(conv(3, 32), conv(32, 64), conv(64, 96), nn.Flatten(), nn.Linear(96 * 16, 192), nn.SiLU())
        self.project = nn.ModuleList([nn.Linear(192, e.config.projection_dim, bias=False) for e in encoders])
        self.log_scale = nn.Parameter(torch.full((len(encoders),), 2.66))   # log(1 / 0.07), CLIP's start

    def loss(self, images: torch.Tensor, ids: list[torch.Tensor]) -> torch.Tensor:
        """CLIP's symmetric cross-entropy over pictures [N, 3, 32, 32] and token ids, one [N, LENGTH] per encoder."""
        features, target, total = self.image(images), torch.arange(len(images)), 0.0
        for encoder, project, log_scale, tokens in zip(self.encoders, self.project, self.log_scale, ids):
            text = F.normalize(encoder(tokens).text_embeds, dim=-1)
            logits = log_scale.clamp(max=4.6).exp() * F.normalize(project(features), dim=-1) @ text.T
            total = total + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return total / len(ids)


def batch(scans: torch.Tensor, digits: torch.Tensor, tokenizers: list[CLIPTokenizer],
          random: torch.Generator) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Every concept once, so that no two captions of the batch fit the same picture: (pictures, token ids)."""
    rows = [torch.nonzero(digits == d).squeeze(1) for d in range(10)]
    pick = torch.stack([rows[c.digit][torch.randint(len(rows[c.digit]), (), generator=random)] for c in data.CONCEPTS])
    images = data.render(scans[pick], torch.tensor([c.ink for c in data.CONCEPTS]),
                         torch.tensor([c.paper for c in data.CONCEPTS]), random)
    style = torch.randint(len(data.TEMPLATES), (len(data.CONCEPTS), 2), generator=random).tolist()
    texts = [data.caption(data.TEMPLATES[t], c, numeral=bool(k % 2)) for c, (t, k) in zip(data.CONCEPTS, style)]
    return images, [t(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
                    for t in tokenizers]
