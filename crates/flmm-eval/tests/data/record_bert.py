"""Records bert/: a tiny BERT with random weights and what it makes of some texts.

    pip install "transformers<5" flax        # any back-end of transformers will do
    python record_bert.py bert
"""

import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file
from transformers import BertConfig, BertTokenizer, FlaxBertModel

folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "'", "-", "the", "a", "an", "dog", "cat", "red", "man", "run", "##s", "##ning",
          "##n", "##ed", "street", "book", "of", "in", "on", "left", "s", "cafe", "c", "##a", "##t", "d", "##o", "##g", "1", "##2", "2", "bike"]
(folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
config = BertConfig(vocab_size=len(pieces), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                    max_position_embeddings=40)
(folder / "config.json").write_text(json.dumps({k: v for k, v in config.to_dict().items() if isinstance(v, (int, float, str, bool))}, indent=1))
model = FlaxBertModel(config, seed=3, add_pooling_layer=False)
rng = np.random.default_rng(3)
weights = {}


def walk(tree, path):
    for name, value in tree.items():
        if isinstance(value, dict):
            tree[name] = walk(value, path + [name])
            continue
        value = np.asarray(value)
        # Fresh models have biases of 0 and norms of 1, which would hide mistakes.
        value = (value + rng.normal(0, 0.15, value.shape)).astype(np.float32)
        tree[name] = value
        last = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}[name]
        weights[".".join(path + [last])] = np.ascontiguousarray(value.T if name == "kernel" else value)
    return tree


model.params = walk(model.params, [])
save_file(weights, folder / "model.safetensors")
tokenizer = BertTokenizer(str(folder / "vocab.txt"))
texts = ["The dog", "a red cat", "Café!", "the man's running dog, on 12 streets", "", "books of the cat " * 12, "dogs-cats"]
expected = []
for text in texts:
    inputs = tokenizer(text, return_tensors="np", truncation=True, max_length=40)
    states = model(**inputs).last_hidden_state[0]
    expected.append({"text": text, "ids": inputs["input_ids"][0].tolist(), "mean": np.asarray(states).mean(0).tolist()})
(folder / "expected.json").write_text(json.dumps(expected))
