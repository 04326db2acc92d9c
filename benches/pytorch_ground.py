"""One grounding pass in PyTorch and Hugging Face transformers: the side that compare_ground.py sets beside flmm.

The LMM in bf16 (or f32, if asked) with attention matrices (`output_attentions=True`, eager), SAM and the U-Net in f32, as
the reference runs them; DeepSeek-VL-1.3B, LLaVA-1.5, and LLaVA-1.6 with its views, packed tokens and two sets of maps.
Weights are read from the same bundle that flmm opens; a tensor that is missing, misshapen or left over is an error.
Started by compare_ground.py: makes one pass for every line of standard input and prints one JSON object for each.
"""

import argparse
import glob
import json
import os
import sys
import time

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SamConfig,
    SamModel,
)
from transformers.utils import logging

from compare_pytorch import MaskHead

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
STAGES = ["preprocess", "vision tower", "prefill", "maps", "SAM encoder", "U-Net", "SAM decoder"]


def peak_memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))


def is_mapped(tensor):
    """Whether its numbers lie in the file that they were read from, not in a copy."""
    with open("/proc/self/maps") as file:
        maps = [line.split()[0].split("-") for line in file if line.endswith(".safetensors\n")]
    return any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in maps)


def tensors_of(folder):
    tensors = {}
    for file in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
        tensors |= load_file(file)
    return tensors


def renamed(tensors, rules):
    """Every name with the `rules` applied, one after the other."""
    result = {}
    for name, tensor in tensors.items():
        for old, new in rules:
            name = name.replace(old, new)
        result[name] = tensor
    return result


def loaded(kind, config, tensors, dtype, attention, unread=()):
    """A model of `kind` with exactly these tensors; names that begin as one of `unread` may be missing."""
    model, about = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, attn_implementation=attention, output_loading_info=True
    )
    wrong = {what: sorted(about[f"{what}_keys"]) for what in ("missing", "unexpected", "mismatched")}
    wrong["missing"] = [name for name in wrong["missing"] if not name.startswith(tuple(unread))]
    if any(wrong.values()):
        sys.exit(f"{kind.__name__}: {wrong}")
    return model.eval()


def deepseek_vl(folder, config, dtype):
    text, width = config["language_config"], 1024
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = sizes | {"image_size": 384, "patch_size": 16, "hidden_act": "gelu", "vision_use_head": False}
    tensors = {}
    for name, tensor in tensors_of(folder).items():
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3)):
                tensors[name.replace(".attn.qkv.", f".self_attn.{part}_proj.")] = piece
        elif name.endswith("pos_embed"):
            tensors["model.vision_model.embeddings.position_embedding.weight"] = tensor[0]
        else:
            tensors[name] = tensor
    rules = [
        ("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."),
        ("vision_model.vision_tower.", "model.vision_model."), (".patch_embed.proj.", ".embeddings.patch_embedding."),
        (".blocks.", ".encoder.layers."), (".attn.proj.", ".self_attn.out_proj."), (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."), ("vision_model.norm.", "vision_model.post_layernorm."),
        ("aligner.layers.0.", "model.aligner.linear1."), ("aligner.layers.2.", "model.aligner.linear2."),
    ]  # fmt: skip
    text = text | {"tie_word_embeddings": False, "rms_norm_eps": text.get("rms_norm_eps", 1e-6)}
    config = DeepseekVLConfig(text_config=text, vision_config=vision, image_token_id=100_015, tie_word_embeddings=False)
    return loaded(DeepseekVLForConditionalGeneration, config, renamed(tensors, rules), dtype, "eager")


def llava(folder, config, dtype):
    """LLaVA-1.5, or LLaVA-1.6, whose parts are the same."""
    # Features come from before the last block: nothing reads that block and the norm behind it, and a checkpoint may leave
    # them out.
    last = config["vision_config"]["num_hidden_layers"] - 1
    unread = tuple(f"model.vision_tower.{name}." for name in (f"encoder.layers.{last}", "post_layernorm"))
    kinds = {
        "llava": (LlavaConfig, LlavaForConditionalGeneration),
        "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    }
    config_kind, kind = kinds[config["model_type"]]
    config = config_kind(**{key: value for key, value in config.items() if key != "model_type"})
    return loaded(kind, config, tensors_of(folder), dtype, "eager", unread)


FAMILIES = {"multi_modality": deepseek_vl, "llava": llava, "llava_next": llava}


def sam(folder, head, attention):
    """SAM ViT-L; the head's prompt encoder and mask decoder lie over the public ones."""
    prefix = "sam.model."
    own = {name[len(prefix) :]: tensor for name, tensor in head.items() if name.startswith(prefix)}
    tensors = renamed(tensors_of(folder) | own, [
        ("image_encoder.blocks.", "vision_encoder.layers."), ("image_encoder.", "vision_encoder."),
        ("patch_embed.proj.", "patch_embed.projection."), ("neck.0.", "neck.conv1."), ("neck.1.", "neck.layer_norm1."),
        ("neck.2.", "neck.conv2."), ("neck.3.", "neck.layer_norm2."), ("mask_downscaling.0.", "mask_embed.conv1."),
        ("mask_downscaling.1.", "mask_embed.layer_norm1."), ("mask_downscaling.3.", "mask_embed.conv2."),
        ("mask_downscaling.4.", "mask_embed.layer_norm2."), ("mask_downscaling.6.", "mask_embed.conv3."),
        ("point_embeddings.", "point_embed."), ("output_upscaling.0.", "upscale_conv1."),
        ("output_upscaling.1.", "upscale_layer_norm."), ("output_upscaling.3.", "upscale_conv2."),
        ("norm_final_attn.", "layer_norm_final_attn."), (".norm", ".layer_norm"),
    ])  # fmt: skip
    for name in [name for name in tensors if "iou_prediction_head." in name or "output_hypernetworks_mlps." in name]:
        stem, _, number, kind = name.rsplit(".", 3)
        part = {"0": "proj_in", "1": "layers.0", "2": "proj_out"}[number]
        tensors[f"{stem}.{part}.{kind}#"] = tensors.pop(name)
    tensors = {name.removesuffix("#"): tensor for name, tensor in tensors.items()}
    table = tensors.pop("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix")
    tensors["shared_image_embedding.positional_embedding"] = table
    tensors["prompt_encoder.shared_embedding.positional_embedding"] = table
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"global_attn_indexes": [5, 11, 17, 23]}
    config = SamConfig(vision_config=vision, mask_decoder_config={"layer_norm_eps": 1e-5})
    return loaded(SamModel, config, tensors, torch.float32, attention)


class Head:
    """U-Net, text projection and layer weights."""

    def __init__(self, tensors):
        base, channels = (tensors["mask_head.encoder.0.0.convs.0.conv.weight"].shape[i] for i in (0, 1))
        rules = [(".convs.", "."), (".conv.", ".0."), (".gn.", ".1."), (".conv_block.", ".")]
        rules += [(f"encoder.{i}.{min(i, 1)}.", f"encoder.{i}.") for i in range(4)]
        rules += [(f"decoder.{i}.upsample.interp_upsample.1.", f"up.{i}.") for i in range(3)]
        own = {name[10:]: tensor for name, tensor in tensors.items() if name.startswith("mask_head.")}
        self.mask_head = MaskHead(channels, base).eval()
        self.mask_head.load_state_dict(renamed(own, rules), strict=True)
        self.text_proj = nn.Linear(*reversed(tensors["text_proj.weight"].shape))
        self.text_proj.load_state_dict({name: tensors[f"text_proj.{name}"] for name in ("weight", "bias")})
        self.text_layer_weights = tensors["text_layer_weights"]


class Ground:
    def __init__(self, model, about, sam_attention, dtype):
        folder = os.path.join(model, "lmm")
        with open(os.path.join(folder, "config.json")) as file:
            config = json.load(file)
        with open(os.path.join(folder, "preprocessor_config.json")) as file:
            processor = json.load(file)
        self.mean, self.std = (numpy.array(processor[f"image_{name}"], dtype=numpy.float32) for name in ("mean", "std"))
        self.lmm = FAMILIES[config["model_type"]](folder, config, dtype)
        self.dtype, self.any_resolution = dtype, config["model_type"] == "llava_next"
        head = tensors_of(os.path.join(model, "head"))
        self.sam, self.head = sam(os.path.join(model, "sam"), head, sam_attention), Head(head)
        self.about = about

    def weights(self):
        """Bytes of the weights that a pass needs in memory: of a table that is mapped it reads a few rows only."""
        modules = [self.lmm, self.sam, self.head.mask_head, self.head.text_proj]
        table = self.lmm.get_input_embeddings().weight
        parameters = [parameter for module in modules for parameter in module.parameters()]
        return sum(parameter.nbytes for parameter in parameters) - is_mapped(table) * table.nbytes

    def pixels(self, picture):
        """What the LMM sees: resized, padded with the mean colour (LLaVA-1.6: with black), normalised; for LLaVA-1.6 a view
        of the whole picture without its proportions, then the crops."""
        place = self.about["geometry"]
        (height, width), (top, left), padded = place["image_shape"], place["before"], place["padded_shape"]
        colour = (0, 0, 0) if self.any_resolution else tuple(int(x * 255) for x in self.mean)
        canvas = Image.new("RGB", (padded[1], padded[0]), colour)
        canvas.paste(picture.resize((width, height), Image.BICUBIC), (left, top))
        views = [canvas]
        if self.any_resolution:
            side = self.lmm.config.vision_config.image_size
            views = [picture.resize((side, side), Image.BICUBIC)]
            for y in range(0, padded[0], side):
                views += [canvas.crop((x, y, x + side, y + side)) for x in range(0, padded[1], side)]
        x = (numpy.stack([numpy.asarray(view, dtype=numpy.float32) for view in views]) / 255 - self.mean) / self.std
        return torch.from_numpy(x).permute(0, 3, 1, 2).to(self.dtype)

    def features(self, pixels):
        """The image's tokens `[tokens, hidden]`; for LLaVA-1.6 packed, padding cut off and a newline behind every row."""
        inner = self.lmm.model
        if self.any_resolution:
            sizes = torch.tensor([self.about["geometry"]["original"]])
            features = torch.cat(list(inner.get_image_features(pixels[None], image_sizes=sizes).pooler_output))
        else:
            features = inner.get_image_features(pixels).pooler_output
            features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features.flatten(0, 1)
        if len(features) != self.about["image_tokens"]:
            # The reference cuts padding off in f32, transformers now in f64: a few sizes of pictures differ.
            sys.exit(f"{len(features)} image tokens, flmm has {self.about['image_tokens']}: take a picture of another size")
        return features

    def maps(self, attentions, first, start):
        """Every phrase's attention to the image's tokens, a map of every layer and head `[phrases, maps, rows, columns]`."""
        phrases = [[first + token for token in phrase] for phrase in self.about["phrases"]]
        end = start + self.about["image_tokens"]
        rows = [
            torch.stack([layer[0, :, rows, start:end].float().mean(1).to(self.dtype) for rows in phrases])
            for layer in attentions
        ]
        rows, (height, width) = torch.cat(rows, 1).float(), self.about["grid"]
        if not self.any_resolution:
            return rows.unflatten(2, (height, width))
        # The whole picture, brought to the crops' size, then the crops without their newlines.
        vision = self.lmm.config.vision_config
        side = vision.image_size // vision.patch_size
        whole, fine = rows.split([side * side, height * (width + 1)], 2)
        whole = F.interpolate(whole.unflatten(2, (side, side)), (height, width), mode="bilinear")
        return torch.cat([whole, fine.unflatten(2, (height, width + 1))[..., :width]], 1)

    def sam_pixels(self, picture):
        height, width = self.about["sam_geometry"]["resized"]
        x = numpy.asarray(picture.resize((width, height), Image.BILINEAR), dtype=numpy.float32)
        x = (x - numpy.float32([123.675, 116.28, 103.53])) / numpy.float32([58.395, 57.12, 57.375])
        return F.pad(torch.from_numpy(x).permute(2, 0, 1)[None], (0, 1024 - width, 0, 1024 - height))

    def crop(self, logits):
        place, size = self.about["geometry"], logits.shape[-1]
        if not place["crop"]:
            return logits
        spans = []
        for before, shape, padded in zip(place["before"], place["image_shape"], place["padded_shape"]):
            start = int(before * size / padded)
            spans.append(slice(start, min(start + int(shape * size / padded + 0.5), size)))
        return logits[:, spans[0], spans[1]]

    def refine(self, embedding, coarse, texts):
        """Masks of every phrase at the picture's own size."""
        (height, width), resized = self.about["sam_geometry"]["original"], self.about["sam_geometry"]["resized"]
        pad = min(-1.0, coarse.min().item())
        prompt = F.interpolate(coarse[:, None], tuple(resized), mode="bilinear")
        prompt = F.pad(prompt, (0, 1024 - resized[1], 0, 1024 - resized[0]), value=pad)
        dense = self.sam.prompt_encoder.mask_embed(F.interpolate(prompt, (256, 256), mode="bilinear"))
        inside = F.interpolate(coarse.sigmoid()[:, None], (height, width), mode="bilinear")[:, 0] > 0.5
        boxes = []
        for mask in inside:
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            box = (0, 0, width, height)
            if len(rows):
                box = (columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1)
            boxes.append(box)
        scale = torch.tensor([resized[1] / width, resized[0] / height] * 2)
        corners = self.sam.prompt_encoder._embed_boxes((torch.tensor(boxes) * scale)[:, None])
        positions = self.sam.get_image_wide_positional_embeddings()
        masks = [None] * len(texts)
        # Phrases of equally many tokens at once.
        for length in sorted({len(text) for text in texts}):
            group = [i for i, text in enumerate(texts) if len(text) == length]
            sparse = torch.cat([corners[group], torch.stack([texts[i] for i in group])[:, None]], 2)
            count = len(group)
            low, _ = self.sam.mask_decoder(
                embedding.expand(count, -1, -1, -1), positions.expand(count, -1, -1, -1), sparse, dense[group], False
            )
            for i, mask in zip(group, low[:, 0]):
                masks[i] = mask
        masks = F.interpolate(torch.stack(masks), (1024, 1024), mode="bilinear")[..., : resized[0], : resized[1]]
        return F.interpolate(masks, (height, width), mode="bilinear")[:, 0]

    @torch.inference_mode()
    def pass_once(self, picture, decode=0):
        about, clock, processor = self.about, [time.perf_counter()], [time.process_time()]

        def lap():
            clock.append(time.perf_counter())
            processor.append(time.process_time())

        pixels, sam_pixels = self.pixels(picture), self.sam_pixels(picture)
        lap()
        features = self.features(pixels)
        lap()
        ids, first, start = torch.tensor([about["token_ids"]]), about["caption_start"], about["image_start"]
        table = self.lmm.get_input_embeddings()
        embeds = table(ids.clamp_max(table.num_embeddings - 1))
        embeds[0, start : start + len(features)] = features
        # Of all logits only the last are made, which the reference does not even need.
        out = self.lmm(
            inputs_embeds=embeds, output_attentions=True, output_hidden_states=True, use_cache=True, logits_to_keep=1
        )
        lap()
        maps = self.maps(out.attentions, first, start)
        hidden = torch.stack([state[0, first:] for state in out.hidden_states[1:]]).float()
        lap()
        embedding = self.sam.vision_encoder(sam_pixels)[0]
        lap()
        coarse = self.crop(self.head.mask_head(maps))
        lap()
        states = torch.einsum("l,ltd->td", self.head.text_layer_weights.softmax(0), hidden)
        texts = [self.head.text_proj(states[rows]) for rows in about["phrases"]]
        refined = self.refine(embedding, coarse, texts)
        size = tuple(about["sam_geometry"]["original"])
        masks = [refined > 0, F.interpolate(coarse[:, None], size, mode="bilinear")[:, 0] > 0]
        lap()
        stages = [
            {"wall": b - a, "cpu": d - c} for a, b, c, d in zip(clock, clock[1:], processor, processor[1:])
        ]
        whole = {part: sum(stage[part] for stage in stages) for part in ("wall", "cpu")}
        peak, generated, times = peak_memory(), [], None
        if decode:
            wall, cpu = time.perf_counter(), time.process_time()
            cache = out.cache if "cache" in out else out.past_key_values
            key = "cache" if "cache" in out else "past_key_values"
            logits = out.logits
            for _ in range(decode):
                generated.append(logits[0, -1].argmax().item())
                step = self.lmm(input_ids=torch.tensor([generated[-1:]]), use_cache=True, **{key: cache})
                logits = step.logits
            times = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        result = {"names": STAGES, "stages": stages, "whole": whole, "peak": peak}
        return result | {"generated": generated, "decode": times}, masks


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a bundle: lmm/, sam/, head/")
    parser.add_argument("picture")
    parser.add_argument("about", help="what `flmm bench ground --json` said of the tokens, a JSON file")
    parser.add_argument("masks", help="file to write the masks to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decode", type=int, default=0)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the LMM")
    parser.add_argument("--sam-attention", choices=["sdpa", "eager"], default="eager")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with open(args.about) as file:
        ground = Ground(args.model, json.load(file)["read"], args.sam_attention, DTYPES[args.dtype])
    picture = Image.open(args.picture).convert("RGB")
    opening = peak_memory()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    for _ in sys.stdin:
        result, masks = ground.pass_once(picture, args.decode)
        numpy.savez(args.masks, refined=masks[0].numpy(), coarse=masks[1].numpy())
        result["peak_memory"] = {"opening": opening, "grounding": result.pop("peak")}
        result["weights"] = ground.weights()
        print(json.dumps(result | {"torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
