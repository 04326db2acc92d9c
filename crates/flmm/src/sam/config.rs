//! Sizes of a SAM: read from `sam_config.json`, known by the name of a public checkpoint, or told by its tensors.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::weights::Params;

/// Sizes of a SAM. Everything else (grid, low-resolution side, layer shapes) follows from these.
///
/// Written as `sam_config.json` beside checkpoints whose sizes are not the public ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamConfig {
    /// Side of the square input in pixels; also the frame of box prompts.
    #[serde(default = "defaults::image_size")]
    pub image_size: usize,
    /// Side of a patch in pixels.
    #[serde(default = "defaults::patch_size")]
    pub patch_size: usize,
    /// Side in tokens of the windows of the blocks that are not global.
    #[serde(default = "defaults::window_size")]
    pub window_size: usize,
    /// Hidden width of an image encoder MLP divided by `embed_dim`.
    #[serde(default = "defaults::mlp_ratio")]
    pub mlp_ratio: f64,
    /// Attention heads of the mask decoder.
    #[serde(default = "defaults::decoder_num_heads")]
    pub decoder_num_heads: usize,
    /// Two-way layers of the mask decoder.
    #[serde(default = "defaults::decoder_depth")]
    pub decoder_depth: usize,
    /// Channels before the last convolution on mask prompts.
    #[serde(default = "defaults::mask_in_chans")]
    pub mask_in_chans: usize,
    /// Width of the image encoder.
    pub embed_dim: usize,
    /// Blocks of the image encoder.
    pub depth: usize,
    /// Attention heads of the image encoder.
    pub num_heads: usize,
    /// Blocks whose attention spans the whole image.
    pub global_attn_indexes: Vec<usize>,
    /// Width of image embedding, prompts and mask decoder.
    #[serde(default = "defaults::prompt_embed_dim")]
    pub prompt_embed_dim: usize,
    /// Hidden width of a mask decoder MLP.
    #[serde(default = "defaults::mlp_dim")]
    pub mlp_dim: usize,
    /// Width of the decoder divided by the inner width of its cross-attention.
    #[serde(default = "defaults::attention_downsample_rate")]
    pub attention_downsample_rate: usize,
    /// Hidden width of the IoU head; the prompt width unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iou_head_hidden_dim: Option<usize>,
}

/// The values that all public checkpoints share.
mod defaults {
    pub(super) fn image_size() -> usize {
        1024
    }
    pub(super) fn patch_size() -> usize {
        16
    }
    pub(super) fn window_size() -> usize {
        14
    }
    pub(super) fn mlp_ratio() -> f64 {
        4.0
    }
    pub(super) fn decoder_num_heads() -> usize {
        8
    }
    pub(super) fn decoder_depth() -> usize {
        2
    }
    pub(super) fn mask_in_chans() -> usize {
        16
    }
    pub(super) fn prompt_embed_dim() -> usize {
        256
    }
    pub(super) fn mlp_dim() -> usize {
        2048
    }
    pub(super) fn attention_downsample_rate() -> usize {
        2
    }
}

impl SamConfig {
    /// Masks the decoder predicts: one for a clear prompt and three for an ambiguous one.
    pub const MASK_TOKENS: usize = 4;
    /// Linear layers of the IoU head and of each hyper-network.
    pub const HEAD_DEPTH: usize = 3;

    /// Public ViT-B (`sam_vit_b_01ec64.pth`).
    pub fn vit_b() -> Self {
        Self::public(768, 12, 12, &[2, 5, 8, 11])
    }

    /// Public ViT-L (`sam_vit_l_0b3195.pth`), the one the method uses.
    pub fn vit_l() -> Self {
        Self::public(1024, 24, 16, &[5, 11, 17, 23])
    }

    /// Public ViT-H (`sam_vit_h_4b8939.pth`).
    pub fn vit_h() -> Self {
        Self::public(1280, 32, 16, &[7, 15, 23, 31])
    }

    /// The public size that a file or model name speaks of (`…vit_b…`, `…vit_l…`, `…vit_h…`).
    pub fn by_name(name: &str) -> Option<Self> {
        let name = name.to_lowercase().replace('-', "_");
        [("vit_b", Self::vit_b()), ("vit_l", Self::vit_l()), ("vit_h", Self::vit_h())]
            .into_iter()
            .find_map(|(key, config)| name.contains(key).then_some(config))
    }

    fn public(embed_dim: usize, depth: usize, num_heads: usize, global: &[usize]) -> Self {
        Self {
            image_size: defaults::image_size(),
            patch_size: defaults::patch_size(),
            window_size: defaults::window_size(),
            mlp_ratio: defaults::mlp_ratio(),
            decoder_num_heads: defaults::decoder_num_heads(),
            decoder_depth: defaults::decoder_depth(),
            mask_in_chans: defaults::mask_in_chans(),
            embed_dim,
            depth,
            num_heads,
            global_attn_indexes: global.to_vec(),
            prompt_embed_dim: defaults::prompt_embed_dim(),
            mlp_dim: defaults::mlp_dim(),
            attention_downsample_rate: defaults::attention_downsample_rate(),
            iou_head_hidden_dim: Some(256),
        }
    }

    /// Reads and checks a `sam_config.json`.
    pub fn from_file(file: &Path) -> Result<Self> {
        let text = crate::weights::files::read_text(file)?;
        let config: Self = serde_json::from_str(&text).map_err(|e| {
            Error::config(
                file,
                format!("not a SAM configuration: {e}"),
                "compare it with the example in the README",
            )
        })?;
        config.validate().map_err(|what| Error::config(file, what, "correct the value"))?;
        Ok(config)
    }

    /// Sizes told by the tensors of a SAM checkpoint with public names; `file` is what errors call it.
    ///
    /// The decoder's head count cannot be seen in any shape: it is taken to be the public one (8).
    pub fn from_tensors(params: &Params, file: &Path) -> Result<Self> {
        let dim = |name: &str, axis: usize| {
            let size = params.shape(name).and_then(|shape| shape.get(axis).copied());
            size.ok_or_else(|| {
                Error::weights(
                    file,
                    format!("tensor `{name}` is missing or has fewer than {} dimensions", axis + 1),
                    "expected a SAM checkpoint with the public tensor names (`image_encoder.*`, `prompt_encoder.*`, \
                     `mask_decoder.*`)",
                )
            })
        };
        let count = |name: &dyn Fn(usize) -> String| (0..).take_while(|&i| params.has(&name(i))).count();

        let patch_size = dim("image_encoder.patch_embed.proj.weight", 2)?;
        let embed_dim = dim("image_encoder.patch_embed.proj.weight", 0)?;
        let grid = dim("image_encoder.pos_embed", 1)?;
        let rel_pos = |i: usize| format!("image_encoder.blocks.{i}.attn.rel_pos_h");
        let depth = count(&rel_pos);
        let mut global_attn_indexes = Vec::new();
        let mut window_size = defaults::window_size();
        for block in 0..depth {
            // A table for n positions per side has the 2n − 1 offsets between them.
            let side = dim(&rel_pos(block), 0)?.div_ceil(2);
            if side == grid {
                global_attn_indexes.push(block);
            } else {
                window_size = side;
            }
        }
        let prompt_embed_dim = dim("prompt_encoder.no_mask_embed.weight", 1)?;
        let inner = dim("mask_decoder.transformer.final_attn_token_to_image.q_proj.weight", 0)?;
        let config = Self {
            image_size: grid * patch_size,
            patch_size,
            window_size,
            mlp_ratio: dim("image_encoder.blocks.0.mlp.lin1.weight", 0)? as f64 / embed_dim.max(1) as f64,
            decoder_num_heads: defaults::decoder_num_heads(),
            decoder_depth: count(&|i| format!("mask_decoder.transformer.layers.{i}.norm1.weight")),
            mask_in_chans: dim("prompt_encoder.mask_downscaling.3.weight", 0)?,
            embed_dim,
            depth,
            num_heads: embed_dim / dim(&rel_pos(0), 1)?.max(1),
            global_attn_indexes,
            prompt_embed_dim,
            mlp_dim: dim("mask_decoder.transformer.layers.0.mlp.lin1.weight", 0)?,
            attention_downsample_rate: prompt_embed_dim / inner.max(1),
            iou_head_hidden_dim: Some(dim("mask_decoder.iou_prediction_head.layers.0.weight", 0)?),
        };
        config.validate().map_err(|what| {
            Error::weights(
                file,
                format!("the tensors describe an impossible SAM: {what}"),
                "download the file again",
            )
        })?;
        Ok(config)
    }

    /// Tokens along a side of the image embedding.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Side of mask prompts and of predicted low-resolution masks.
    pub fn low_res_size(&self) -> usize {
        4 * self.grid()
    }

    /// Hidden width of an image encoder MLP.
    pub(super) fn encoder_mlp_dim(&self) -> usize {
        (self.embed_dim as f64 * self.mlp_ratio) as usize
    }

    /// Inner width of the decoder's cross-attention.
    pub(super) fn cross_attention_dim(&self) -> usize {
        self.prompt_embed_dim / self.attention_downsample_rate
    }

    /// Hidden width of the IoU head.
    pub(super) fn iou_hidden_dim(&self) -> usize {
        self.iou_head_hidden_dim.unwrap_or(self.prompt_embed_dim)
    }

    /// Window side of `block`, `None` if its attention is global.
    pub(super) fn window(&self, block: usize) -> Option<usize> {
        (!self.global_attn_indexes.contains(&block)).then_some(self.window_size)
    }

    /// What is wrong with the sizes, if anything.
    pub fn validate(&self) -> Result<(), String> {
        let sizes = [
            ("image_size", self.image_size),
            ("patch_size", self.patch_size),
            ("window_size", self.window_size),
            ("decoder_num_heads", self.decoder_num_heads),
            ("decoder_depth", self.decoder_depth),
            ("mask_in_chans", self.mask_in_chans),
            ("embed_dim", self.embed_dim),
            ("depth", self.depth),
            ("num_heads", self.num_heads),
            ("prompt_embed_dim", self.prompt_embed_dim),
            ("mlp_dim", self.mlp_dim),
            ("attention_downsample_rate", self.attention_downsample_rate),
            ("iou_head_hidden_dim", self.iou_hidden_dim()),
        ];
        // Far above any real SAM; keeps products of sizes from overflowing.
        if let Some((key, value)) = sizes.iter().find(|(_, value)| !(1..=1 << 16).contains(value)) {
            return Err(format!("`{key}` is {value}, expected 1 to 65536"));
        }
        if !(self.mlp_ratio > 0.0 && self.mlp_ratio <= 64.0 && self.encoder_mlp_dim() > 0) {
            return Err(format!(
                "`mlp_ratio` is {}, expected a number above 0 and at most 64",
                self.mlp_ratio
            ));
        }
        let divides = [
            ("image_size", self.image_size, "patch_size", self.patch_size),
            ("embed_dim", self.embed_dim, "num_heads", self.num_heads),
            ("prompt_embed_dim", self.prompt_embed_dim, "8 (the decoder halves it three times)", 8),
            ("prompt_embed_dim", self.prompt_embed_dim, "decoder_num_heads", self.decoder_num_heads),
            (
                "prompt_embed_dim",
                self.prompt_embed_dim,
                "attention_downsample_rate × decoder_num_heads",
                self.attention_downsample_rate * self.decoder_num_heads,
            ),
            ("mask_in_chans", self.mask_in_chans, "4", 4),
        ];
        for (key, value, divisor_key, divisor) in divides {
            if value % divisor != 0 {
                return Err(format!("`{key}` is {value}, expected a multiple of {divisor_key} ({divisor})"));
            }
        }
        if let Some(block) = self.global_attn_indexes.iter().find(|&&block| block >= self.depth) {
            return Err(format!("`global_attn_indexes` names block {block}, but there are {}", self.depth));
        }
        Ok(())
    }
}
