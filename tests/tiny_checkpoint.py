"""A tiny random BERT with a tokenizer on disk, and data that it can learn in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

ANIMALS = ("cat", "dog", "horse", "cow", "sheep", "duck")
FOODS = ("bread", "cheese", "apple", "soup", "rice", "cake")
TOOLS = ("hammer", "saw", "drill", "nail", "screw", "file")
FILLERS = ("the", "a", "some", "my", "your", "old", "new", "big", "small", "nice")
WORDS = (*ANIMALS, *FOODS, *TOOLS, *FILLERS)
TOPICS = {"animal": ANIMALS, "food": FOODS, "tool": TOOLS}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 0, "max_position_embeddings": 40},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "mpnet": {"max_position_embeddings": 40},
}


def tokenizer_text() -> str:
    """A word-level tokenizer with BERT's way of marking one sentence and pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    text: str = tokenizer.to_str()
    return text


def make_checkpoint(folder: Path, family: str = "bert", layers: int = 3) -> Path:
    """config.json, model.safetensors and tokenizer.json of a random model, width 32."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(7)
    settings: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        **FAMILY_CONFIGS[family],
    }
    if family == "distilbert":
        settings = {
            k: v for k, v in settings.items() if not k.startswith(("hidden_s", "num_", "inter"))
        }
        settings["n_layers"] = layers
    config = AutoConfig.for_model(family, **settings)
    model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_text())
    return folder


def sentences(n: int, seed: int) -> list[tuple[str, str]]:
    """(text, label): the label is the topic of the one word that is no filler."""
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        label = rng.choice(sorted(TOPICS))
        words = rng.choices(FILLERS, k=rng.randint(1, 6))
        words.insert(rng.randrange(len(words) + 1), rng.choice(TOPICS[label]))
        out.append((" ".join(words), label))
    return out


def write_topics(folder: Path, train: int = 240, dev: int = 60, test: int = 60) -> Path:
    """train.tsv, dev.tsv and test.tsv."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, n, seed in (("train", train, 1), ("dev", dev, 2), ("test", test, 3)):
        lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in sentences(n, seed))]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_similarity(folder: Path, train: int = 240, dev: int = 60) -> Path:
    """Sentence pairs with a score, as JSONL: 1, and 2 for each of the two that is of food, and noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, n, seed in (("train", train, 4), ("dev", dev, 5)):
        rng = random.Random(seed)
        first, second = sentences(n, seed), sentences(n, seed + 100)
        lines = []
        for (a, topic_a), (b, topic_b) in zip(first, second, strict=True):
            score = 1.0 + 2.0 * [topic_a, topic_b].count("food") + rng.uniform(-0.2, 0.2)
            lines.append(json.dumps({"sentence1": a, "sentence2": b, "score": round(score, 3)}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
