"""Records captions.json: random captions scored by the public COCO caption tools.

    pip install pycocoevalcap        # needs a Java runtime
    python record_captions.py > captions.json
"""

import json
import random
import sys

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

PICTURES = int(sys.argv[1]) if len(sys.argv) > 1 else 40
random.seed(int(sys.argv[2]) if len(sys.argv) > 2 else 7)

WHO = ["man", "woman", "young boy", "girl's friend", "group of people", "couple", "child", "person", "kid", "lady", "dogs", "cat",
       "cow", "geese", "motorcyclist", "surfer", "skateboarder", "children", "police officers", "t-shirt-clad men"]
DOES = ["is riding", "rides", "sits on", "is sitting on", "stands next to", "is standing beside", "looks at", "is holding", "holds",
        "is walking towards", "jumps over", "can't reach", "doesn't see", "isn't near", "has been playing with", "plays with"]
WHAT = ["bicycle", "bike", "sofa", "couch", "photograph", "picture", "automobile", "car", "train", "large building", "big house",
        "slice of pizza", "pieces of cake", "cell phone", "mobile phone", "television", "TV set", "black-and-white cow", "baseball bat",
        "bottle of wine", "traffic light", "stop sign", "street", "road", "wooden table", "desk", "laptop computer", "teddy bear"]
WHERE = ["in the park", "on a beach", "near the ocean", "by the sea", "at night", "in front of a building", "in the background",
         "on the left side of the road", "to the left of the street", "under a cloudy sky", "at 5 p.m.", "in the U.S.",
         "while it's raining", "as well as a lot of people", "along with many other people", "a number of times", "because of the snow"]
ENDS = [".", "", "!", " .", "...", "?", ", which is nice.", "; nobody's there.", " (left).", " - really."]


def phrase(r):
    text = f"{r.choice(['A', 'The', 'Two', 'One', 'An old', 'Several'])} {r.choice(WHO)} {r.choice(DOES)} {r.choice(['a', 'the', 'his', 'some'])} {r.choice(WHAT)}"
    for _ in range(r.randint(0, 2)):
        text += r.choice([" ", ", ", " and "]) + r.choice(WHERE)
    if r.random() < 0.3:
        text += f" and {r.choice(['the', 'a'])} {r.choice(WHAT)}"
    return text + r.choice(ENDS)


def change(text, r):
    words = text.split()
    for _ in range(r.randint(0, 4)):
        i = r.randrange(len(words))
        how = r.random()
        if how < 0.3:
            words.pop(i)
        elif how < 0.6:
            words[i] = r.choice(r.choice(r.choice([WHO, WHAT, DOES])).split())
        elif how < 0.8:
            j = r.randrange(len(words))
            words[i], words[j] = words[j], words[i]
        else:
            words.insert(i, r.choice(words))
        if not words:
            words = ["nothing"]
    return " ".join(words)


references, candidates = {}, {}
for i in range(1, PICTURES + 1):
    texts = [phrase(random) for _ in range(random.randint(1, 3))]
    candidates[i] = change(random.choice(texts), random) if random.random() < 0.8 else phrase(random)
    references[i] = texts

tokenise = PTBTokenizer().tokenize
gts = tokenise({i: [{"caption": text} for text in texts] for i, texts in references.items()})
res = tokenise({i: [{"caption": text}] for i, text in candidates.items()})
order = list(references)
cider, ciders = Cider().compute_score(gts, res)
meteor, meteors = Meteor().compute_score(gts, res)
bleu, _ = Bleu(4).compute_score(gts, res)
rouge, rouges = Rouge().compute_score(gts, res)
json.dump(
    {
        "order": order,
        "references": references,
        "candidates": candidates,
        "expected": {
            "tokenised_references": gts,
            "tokenised_candidates": res,
            "cider": {"mean": float(cider), "per_image": [float(x) for x in ciders]},
            "meteor": {"mean": meteor, "per_image": meteors},
            "bleu": bleu,
            "rouge_l": {"mean": float(rouge), "per_image": [float(x) for x in rouges]},
        },
    },
    sys.stdout,
    indent=0,
)
